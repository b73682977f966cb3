"""train.py with real processes: exact resume, any number of processes, every error, what is written and printed."""

import contextlib
import errno
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from forked_programs import ROOT, SMOOTH, Program, finish, popen
from PIL import Image
from test_mae import hugging_face

from common import ViT
from inputs import augment, image_cache, image_sets
from methods import METHODS
from runtime import command_line, files, process, run_directory
from runtime.command_line import build_encoder, build_parser, field_comments, settle
from runtime.encoder_files import load_encoder
from runtime.errors import InputError
from runtime.knobs import turned_off
from runtime.randomness import StepRandom
from train import Plan, build, options
from train import train as loop

SMALL = (
    "--image-size 32 --patch-size 8 --width 16 --depth 2 --heads 2 --batch-size 16 --epochs 5 --warmup-epochs 1 "
    "--precision fp32 --device cpu --log-every 1 --no-evaluate"
).split()
DECODER = "--decoder-width 8 --decoder-depth 1 --decoder-heads 2 ".split()
OWN = {  # each method's own knobs, to keep it as small
    "mae": DECODER,
    "cmae": [*DECODER, *"--projector-width 16 --projector-out 8".split()],
    "cmae_loc": [*DECODER, *"--projector-width 16 --projector-out 8 --crop-warmup 0.1 --crop-interval 0.1".split()],
    "cae": "--regressor-depth 1 --decoder-depth 1 --codes 16 --hidden 8 --first-stride 4 --tokenizer-epochs 1".split(),
    "conmim": "--projector-width 16 --projector-out 8".split(),
    "lcmae": [*DECODER, *"--projector-out 16".split()],
    "autoencoder": [*DECODER, "--block", "16"],
    "dvae": "--codes 16 --hidden 8 --first-stride 4".split(),
}


def own(method: str, *flags) -> list:
    """`flags`, and before them the method's own knobs but for those that the flags turn off: they would be refused."""
    words, idle = OWN[method], {}
    with contextlib.suppress(InputError):  # which the test will meet
        idle = dict(turned_off(method, options(list(map(str, ["--method", method, *flags])))[1]))
    pairs = [words[i : i + 2] for i in range(0, len(words), 2)]
    return [word for pair in pairs if pair[0][2:].replace("-", "_") not in idle for word in pair] + [*flags]


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node=2"
ROWS = dict(mae=3, cmae=4, cmae_loc=4, cae=4, conmim=4, lcmae=5, autoencoder=2, dvae=2)  # of reconstruction.png


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of 80 + 20 small smooth images in two classes."""
    root, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, n in (("train", 40), ("val", 10)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                coarse = Image.fromarray(draw.integers(0, 256, (5, 5, 3), dtype=np.uint8))
                coarse.resize((40, 40), Image.Resampling.BICUBIC).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    return os.environ | dict(MINMIM_CACHE=str(tmp_path_factory.mktemp("cache")), OMP_NUM_THREADS="1")


@pytest.fixture
def train(photos, environment, tmp_path):
    """train("--flag", …, processes=2) → the finished run; its directory is `tmp_path / "run"` unless given.

    It is forked, or started by a new Python: `by` is what stands between `python` and the file.
    """
    begun = []

    def start(*flags, method="mae", processes=1, out="run", by=None, before=""):
        words = ["--method", method, "--data", photos, "--out", tmp_path / out, *SMALL]
        words += own(method, *flags) if method in OWN else flags
        where = dict(env=environment, cwd=tmp_path)
        if by is None:
            begun.append(Program("train.py", *words, n=processes, before=before, **where))
        else:
            begun.append(popen(*by.split(), ROOT / "train.py", *words, **where))
        return begun[-1]

    def run(*flags, **how):
        return finish(start(*flags, **how))

    run.start = start
    yield run
    for program in begun:
        program.kill()


def state(run: Path):
    """The checkpoint, less the settings' own directory."""
    checkpoint = files.load(run / "checkpoint.pt")
    del checkpoint["settings"]["out"]
    return checkpoint


def log(run: Path):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def wait_for_lines(process, run: Path, lines: int):
    """Until a run that goes on has logged so many."""
    end = time.time() + 100
    while not (run / "log.jsonl").exists() or len(log(run)) < lines:
        if process.poll() is not None or time.time() > end:
            process.kill()
            raise AssertionError(f"{process.args}: fewer than {lines} lines:\n{process.communicate()[1]}")
        time.sleep(0.01)


def assert_same_bits(a, b):
    """Checkpoints: step, weights, teacher and optimizer state."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_bits(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same_bits(x, y)
    else:
        assert a == b


def assert_fine(done):
    assert done.returncode == 0, done.stderr


def assert_refused(done, *words):
    """One line on standard error, exit status 2, no traceback."""
    lines = [x for x in done.stderr.splitlines() if x.strip() and "decoding" not in x]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert all(word in lines[0] for word in words), lines[0]


# ------------------------------------------------------------------------------------------------- a run, its files


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_its_files_and_says_where(train, tmp_path, method):
    run = tmp_path / "run"
    files.write_text(run / "encoder.pt", "an older version's, which this run replaces")
    done = train("--max-steps", 12, method=method, by="" if method == "mae" else None)
    assert_fine(done)
    names = {"config.json", "log.jsonl", "checkpoint.pt", "encoder.safetensors", "reconstruction.png", ".lock"}
    assert {p.name for p in run.iterdir()} - {"dvae"} == names
    rows = log(run)
    assert rows[0]["settings"]["seed"] == 0
    assert rows[0]["config"].keys() == field_comments(METHODS[method].Config).keys()
    assert rows[0] == json.loads((run / "config.json").read_text())
    assert [r["step"] for r in rows[1:]] == list(range(1, 13))
    assert {"step", "epoch", "loss", "lr", "images_per_second", "seconds"} <= rows[1].keys()
    assert rows[1]["lr"] == 0 and rows[5]["epoch"] == 1  # five steps an epoch
    encoder = files.load(run / "encoder.safetensors")
    made_by = rf"minMIM [\d.]+ \((no )?commit.*\): {method} on photos\d+, 2\.4 epochs, seed 0"
    assert re.fullmatch(made_by, encoder["made_by"])
    if method != "dvae":
        assert encoder["settings"]["width"] == 16 and "blocks.1.attn.qkv.weight" in encoder["state_dict"]
    assert Image.open(run / "reconstruction.png").size == (8 * 34 * 4 + 8, ROWS[method] * 34 * 4 + 8)
    learned = sum(moment["exp_avg"].numel() for moment in state(run)["optimizer"]["state"].values())
    assert f" {learned:,} parameters, " in done.stderr  # a teacher's, say, are not among them
    assert "loss" in done.stderr and str(run / "reconstruction.png") in done.stderr
    assert "it/s" not in done.stderr and re.search(r"12/12 .*images/s", done.stderr)  # the bar


def test_weights_move_and_the_loss_falls(train, tmp_path):
    assert_fine(train("--epochs", 20, "--lr", 3e-3, "--save-every", 20))
    losses = [r["loss"] for r in log(tmp_path / "run")[1:]]
    assert sum(losses[-10:]) / 10 < 0.95 * sum(losses[:5]) / 5


def test_summary_compares_with_an_untrained_encoder(train, tmp_path):
    done = train("--max-steps", 5, "--evaluate")
    assert_fine(done)
    assert re.search(r"untrained encoder +[\d.]+ % +[\d.]+ %\n +trained encoder +[\d.]+ % +[\d.]+ %", done.stderr)
    assert json.loads((tmp_path / "run/summary.json").read_text())["trained"]["knn"]["n"] == 20


def test_epochs_of_a_few_repeated_images_show_each_as_often(photos, environment, tmp_path, monkeypatch):
    """48 images an epoch: 16 times each of the first three, in an order of its own, and no other; not in evaluation."""
    import mae
    from train import main

    monkeypatch.setenv("MINMIM_CACHE", environment["MINMIM_CACHE"])
    seen, kept = [], mae.MAE.draw
    first = image_sets.open_set(str(photos)).images(torch.arange(3))

    def draw(self, images, index, rng):
        if index.min() >= 0:  # not the validation images of the picture
            seen.append(index)
            assert torch.equal(images, first[index])
        return kept(self, images, index, rng)

    monkeypatch.setattr(mae.MAE, "draw", draw)
    evaluated = []

    def judge(encoder, *sets, protocols, device):
        evaluated.append([len(s) for s in sets])
        return {protocol: dict(top1=0.0) for protocol in protocols}

    monkeypatch.setattr("train.evaluate", judge)
    flags = ["--images", "3", "--repeat", "16", "--epochs", "2", "--evaluate"]
    argv = ["train.py", "--method", "mae", "--data", str(photos), "--out", str(tmp_path / "run"), *SMALL, *flags]
    monkeypatch.setattr(sys, "argv", argv)
    main()
    epochs = torch.cat(seen).reshape(2, 48)
    assert (torch.stack([epoch.bincount(minlength=3) for epoch in epochs]) == 16).all()
    assert not (epochs[0].view(16, 3) == epochs[0][:3]).all()  # it is not one order of the three again and again
    assert not torch.equal(*epochs) and [r["epoch"] for r in log(tmp_path / "run")[1:]][2::3] == [1, 2]
    assert state(tmp_path / "run")["settings"]["images"] == 3
    assert evaluated == [[80, 20]] * 2  # all images: of the untrained encoder and of the trained one


def test_a_tokenizer_that_is_trained_first_sees_no_other_images(monkeypatch):
    import train as command

    seen = []
    monkeypatch.setattr(command, "train", lambda args, *_: seen.append(args))
    args, _, _ = options("--method cae --batch-size 192 --images 2 --repeat 96 --device cpu".split())
    command.train_first(args, torch.device("cpu"), "dvae")
    assert (seen[0].method, seen[0].images, seen[0].repeat) == ("dvae", 2, 96)
    whole = seen[0].batch_size
    args.accumulate = 3  # in as many parts, which must divide its own batch too
    monkeypatch.setattr(command, "world_size", lambda: 2)
    command.train_first(args, torch.device("cpu"), "dvae")
    assert seen[1].accumulate == 3 and seen[1].batch_size == whole // 6 * 6 < whole
    args, _, _ = options(["--method", "cae", "--recipe", "paper", "--device", "cpu"])
    command.train_first(args, torch.device("cpu"), "dvae")
    assert (args.accumulate, seen[2].accumulate, seen[2].batch_size) == (1, 4, 512)  # the d-VAE's own recipe has four
    shared = dict(
        data_root="here", download=True, classes=2, class_level=3, range=[0.0, 9.0], split=["a", "b"], columns=["x"],
        skip_bad_images=True, workers=3, max_steps=7, precision="bf16", compile=False, seed=5, deterministic=True,
        log_every=4,
    )  # fmt: skip
    vars(args).update(shared, batch_size=2)
    command.train_first(args, torch.device("cpu"), "dvae")
    assert vars(seen[3]).items() >= shared.items() and seen[3].batch_size == 8  # an image for each part


@pytest.mark.slow
@pytest.mark.parametrize("flags, other, differs", [
    (("--images", 1, "--repeat", 96, "--epochs", 10), ("--repeat", 80), "repeat 96 there, 80 here"),
    (("--image-size", 16, 40, "--epochs", 12), ("--image-size", 40), "image_size [16, 40] there, 40 here"),
], ids=["one image", "rectangles"])  # fmt: skip
def test_a_run_resumes_with_the_same_bits_and_processes_share_it(train, tmp_path, flags, other, differs):
    flags = (*flags, "--drop-path", 0, "--save-every", 20)
    assert_fine(train(*flags, out="whole"))
    process = train.start(*flags)
    wait_for_lines(process, tmp_path / "run", 14)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert 12 < state(tmp_path / "run")["step"] < 60
    assert_refused(train(*flags, *other), differs)
    assert_fine(train(*flags))
    assert_same_bits(state(tmp_path / "run"), state(tmp_path / "whole"))
    assert_fine(train(*flags, processes=2, out="two"))
    one, two = state(tmp_path / "whole")["method"], state(tmp_path / "two")["method"]
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


# ------------------------------------------------------------------------------------------------------ exact resume


@pytest.mark.parametrize("by", ["", TORCHRUN], ids=["python", "torchrun"])
def test_sigterm_saves_mid_epoch_and_the_same_command_continues(train, tmp_path, by):
    processes, flags = 2 if by else 1, ["--epochs", 30, "--save-every", 30]
    assert_fine(train(*flags, processes=processes, out="whole"))
    process = train.start(*flags, by=by)
    wait_for_lines(process, tmp_path / "run", 8)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 if by else process.returncode == 143, err
    stopped = state(tmp_path / "run")["step"]
    assert 7 <= stopped < 150
    if not by:
        assert f"stopped at step {stopped} of 150" in err
    done = train(*flags, processes=processes)
    assert_fine(done)
    assert f"from step {stopped}" in done.stderr
    assert_same_bits(state(tmp_path / "run"), state(tmp_path / "whole"))


def test_ctrl_c_ends_with_130(train, tmp_path):
    process = train.start("--epochs", 500, by="")
    wait_for_lines(process, tmp_path / "run", 3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and (tmp_path / "run/checkpoint.pt").exists()


def test_a_finished_run_says_so_again_and_changes_nothing(train, tmp_path):
    assert_fine(train("--max-steps", 5))
    before = state(tmp_path / "run")
    done = train("--max-steps", 5)
    assert_fine(done)
    assert_same_bits(state(tmp_path / "run"), before)
    rows = log(tmp_path / "run")
    assert len(rows) == 6 and f"loss      {rows[1]['loss']:.4f} -> {rows[5]['loss']:.4f}\n" in done.stderr


def test_resume_never_starts_over(train, tmp_path):
    assert_fine(train("--max-steps", 5))
    done = train("--max-steps", 5, "--seed", 1, "--resume", "never")
    assert_fine(done)
    assert state(tmp_path / "run")["settings"]["seed"] == 1 and len(log(tmp_path / "run")) == 6


def test_the_tokenizer_that_is_trained_first_is_kept_and_starts_over_with_its_run(train, tmp_path):
    done = train("--max-steps", 5, method="cae")
    assert_fine(done)
    assert "cae needs a dvae first" in done.stderr and state(tmp_path / "run/dvae")["step"] == 5
    ours, theirs = state(tmp_path / "run")["method"], state(tmp_path / "run/dvae")["method"]
    assert torch.equal(ours["tokenizer.encoder.input.weight"], theirs["encoder.encoder.input.weight"])
    assert_fine(train("--max-steps", 5, "--seed", 1, "--resume", "never", method="cae"))
    assert state(tmp_path / "run/dvae")["settings"]["seed"] == 1


# --------------------------------------------------------------------------------------------- numbers of processes


@pytest.mark.training
@pytest.mark.parametrize("method", METHODS)
def test_one_process_and_two_end_alike(train, tmp_path, method):
    """Twenty steps; batch 64 in one process against 32 in each of two, and against two accumulated parts for MAE."""
    flags = "--max-steps 20 --epochs 20 --save-every 20 --batch-size 64 --drop-path 0".split()  # the last: as stated
    if method == "cae":  # tokens are argmaxes, some of which flip between two d-VAEs that are equal to 1e-5
        assert_fine(train("--max-steps", 20, method="dvae", out="tokenizer"))
        flags += ["--tokenizer", tmp_path / "tokenizer"]
    assert_fine(train(*flags, method=method, out="one", before=SMOOTH))
    done = train(*flags, method=method, processes=2, out="two", before=SMOOTH)
    assert_fine(done)
    assert done.stderr.count("20 steps of 64 on 2 x cpu") == 1
    others = ["two"]
    if method == "mae":  # accumulation shows a contrast fewer negatives
        assert_fine(train(*flags, "--accumulate", 2, method=method, out="parts", before=SMOOTH))
        others.append("parts")
    for other in others:
        for a, b in zip(log(tmp_path / "one")[1:], log(tmp_path / other)[1:], strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=5e-5)
        one, two = state(tmp_path / "one")["method"], state(tmp_path / other)["method"]
        for name in one:
            torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_two_agents_train_log_once_and_save_once(train, tmp_path):
    """A two-node run in small."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    agents = [
        train.start("--max-steps", 10, by=(
            f"-m torch.distributed.run --nnodes=2 --node_rank={r} --master_addr=127.0.0.1 --master_port={port}"))
        for r in range(2)
    ]  # fmt: skip
    errors = [agent.communicate(timeout=120)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], errors
    assert [r["step"] for r in log(tmp_path / "run")[1:]] == list(range(1, 11))
    assert sum("10 steps of 16 on 2 x cpu" in e for e in errors) == 1
    assert not list((tmp_path / "run").glob("*.tmp"))


# ------------------------------------------------------------------------------------------------------------ errors


def test_wrong_options_get_one_line_and_status_2(train, tmp_path):
    done = train(method="simclr", by="")
    assert_refused(done, "simclr", "mae", "cmae")
    assert_refused(train("--patch-size", 7), "image size 32x32 is not divisible by patch size 7")
    assert not (tmp_path / "run").exists()  # nothing half-written


@pytest.mark.parametrize("flags,words", [
    (["--mask-ratio", "1.0"], ["mask ratio 1", "visible"]),
    (["--mask-ratio", "0"], ["mask ratio 0", "masked"]),
    (["--batch-size", "10000"], ["batch size 10000", "80 images", "give a smaller one"]),
    (["--batch-size", "0"], ["--batch-size: 0: must be at least 1"]),
    (["--accumulate", "3"], ["batch size 16", "3 parts"]),
    (["--recipe", "huge"], ["recipe 'huge'", "paper, tiny, demo"]),
    (["--feature-decoder-depth", "2"], ["unrecognized", "--feature-decoder-depth"]),
    (["--lr", "fast"], ["--lr", "fast"]),
    (["--heads", "3"], ["width 16 is not divisible by 3 heads"]),
    (["--data", "nowhere"], ["nowhere"]),
    (["--classes", "0"], ["classes"]),
    (["--images", "0"], ["--images: 0: must be at least 1"]),
    (["--images", "81"], ["cannot take 81 of its images; give 1 to 80"]),
    (["--images", "1", "--repeat", "15"], ["batch size 16", "15 images", "--repeat"]),
    (["--repeat", "0"], ["--repeat: 0"]),
    (["--seed", "4294967296"], ["--seed: 4294967296: must be from 0 to 4294967295"]),  # would begin as seed 0
    (["--seed", "-1"], ["--seed: -1: must be from 0 to 4294967295"]),
    (["--lr", "nan"], ["--lr: nan: must be 0 or more, and finite"]),
    (["--min-lr", "-3"], ["--min-lr: -3: must be 0 or more"]),
    (["--clip-grad", "inf"], ["--clip-grad: inf: must be 0 or more, and finite"]),
    (["--drop-path", "1"], ["--drop-path: 1: must be at least 0 and below 1"]),
    (["--betas", "0.9", "2"], ["--betas: 2: must be at least 0 and below 1"]),
    (["--workers", "-1"], ["--workers: -1: must be at least 0"]),
    (["--resume", "nowhere.pt"], ["nowhere.pt", "no such"]),
    (["--mean", "0.5", "0.5"], ["--mean: 0.5 0.5: give auto, or three numbers from 0 to 1"]),
    (["--mean", "123.7", "116.3", "103.5"], ["--mean: 123.7 116.3 103.5: give auto, or three", "where 1 is white"]),
    (["--mean", "0.5", "nan", "0.5"], ["--mean: 0.5 nan 0.5: give auto"]),
    (["--std", "0.2", "0", "0.2"], ["--std: 0.2 0 0.2: give three numbers from 0.0001 to 1"]),
    (["--std", "auto"], ["--std: auto: give three numbers"]),
    (["--image-size", "32", "44"], ["image size 32x44 is not divisible by patch size 8"]),
    (["--image-size", "0"], ["--image-size: 0: give one number of pixels, or height and width"]),
    (["--image-size", "32", "32", "32"], ["--image-size: 32 32 32: give one number"]),
    (["--image-size", "32x64"], ["--image-size: 32x64: give one number"]),
])  # fmt: skip
def test_bad_input_is_refused(photos, environment, tmp_path, monkeypatch, capsys, flags, words):
    """In this process, for speed; the test above starts processes for two such lines."""
    from train import main

    monkeypatch.setenv("MINMIM_CACHE", environment["MINMIM_CACHE"])
    out = tmp_path / "run"
    argv = ["train.py", "--method", "mae", "--data", str(photos), "--out", str(out), *SMALL, *flags]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(InputError) as refused:
        main()
    assert "\n" not in str(refused.value) and all(word in str(refused.value) for word in words), refused.value
    assert not (out / "checkpoint.pt").exists()


def test_more_gpus_than_there_are(train):
    gpus = torch.cuda.device_count()
    done = train("--device", "cuda", processes=gpus + 1)
    assert done.returncode != 0 and f"device cuda: {gpus + 1} GPUs asked for, {gpus} found" in done.stderr


def test_batch_size_not_divisible_by_the_processes(train):
    done = train("--batch-size", 15, by=TORCHRUN)
    assert done.returncode != 0 and done.stderr.count("batch size 15: cannot be shared by 2 processes") == 1


def test_a_checkpoint_of_another_run_is_refused_with_what_differs(train, tmp_path):
    assert_fine(train("--max-steps", 5))
    done = train("--max-steps", 5, "--mask-ratio", "0.5", "--lr", "0.1")
    assert_refused(done, "checkpoint.pt", "mask_ratio 0.75 there, 0.5 here", "lr ")
    assert_refused(train("--max-steps", 5, method="cmae"), "method 'mae' there, 'cmae' here")


@pytest.mark.parametrize("damage", ["cut", "flip", "pickle", "text", "other"])
def test_a_damaged_checkpoint_is_refused(train, tmp_path, damage):
    assert_fine(train("--max-steps", 5))
    path = tmp_path / "run/checkpoint.pt"
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "flip":
        content[len(content) // 2] ^= 1  # in the middle of some weight
    elif damage == "text":
        content = b"not a checkpoint"
    elif damage == "other":
        torch.save([1, 2], path)
        content = path.read_bytes()
    else:  # a pickle that would run a command

        class Payload:
            def __reduce__(self):
                return os.system, (f"touch {tmp_path / 'executed'}",)

        torch.save(dict(step=0, settings=Payload()), path)
        content = path.read_bytes()
    path.write_bytes(content)
    assert_refused(train("--max-steps", 5), str(path))
    assert not (tmp_path / "executed").exists()


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(train, tmp_path):
    done = train("--epochs", 30, "--lr", "1e30", "--warmup-epochs", 3)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    step = int(re.search(r"^loss: not finite at step (\d+)", done.stderr, re.MULTILINE)[1])
    path = tmp_path / "run/checkpoint.pt"
    if path.exists():
        assert state(tmp_path / "run")["step"] < step
        assert all(v.isfinite().all() for v in state(tmp_path / "run")["method"].values())


def test_two_runs_cannot_write_one_directory(train, tmp_path):
    first = train.start("--epochs", 1000)
    wait_for_lines(first, tmp_path / "run", 1)
    assert_refused(train("--epochs", 1000), "another run is writing here")
    first.kill()
    first.communicate()


def test_where_files_have_no_locks_a_run_goes_without(tmp_path, monkeypatch):
    """As on Lustre and NFS, by how they are mounted."""
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    run_directory.lay_out(tmp_path)


def test_only_rank_0_looks_for_files(tmp_path, monkeypatch):
    """The others may stand on machines that do not have them."""
    args, config, _ = options(["--method", "mae", "--out", str(tmp_path / "run"), *SMALL, *OWN["mae"]])
    ours = run_directory.Run(args, config, 0)
    monkeypatch.setattr(run_directory, "rank", lambda: 1)
    ours.open()
    assert ours.step == 0 and ours.log is None and not (tmp_path / "run").exists()


def test_whether_a_run_goes_on_is_what_rank_0_sees(tmp_path, monkeypatch):
    args = types.SimpleNamespace(out=str(tmp_path), resume="auto")
    assert not command_line.goes_on(args)
    monkeypatch.setattr(command_line, "world_size", lambda: 2)
    monkeypatch.setattr(command_line.dist, "broadcast_object_list", lambda found: found.__setitem__(0, True))
    assert command_line.goes_on(args)


def test_a_place_that_cannot_be_written_is_refused(train, tmp_path):
    (tmp_path / "run").write_text("a file where the directory should be")
    assert_refused(train("--max-steps", 5), str(tmp_path / "run"))


# ------------------------------------------------------------------------------------------------------ whole files


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    files.save(path, dict(a=torch.ones(3)))

    def full(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"x\.pt: cannot be written .*No space left"):
        files.write_whole(path, full)
    assert torch.equal(files.load(path)["a"], torch.ones(3)) and [p.name for p in tmp_path.iterdir()] == ["x.pt"]
    did = []
    for name in ("fsync", "replace"):
        plain = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *words, name=name, plain=plain: did.append(name) or plain(*words))
    files.save(path, dict(a=1))
    assert did == ["fsync", "replace", "fsync"]  # the file is on the disk before it has its name; then the name is
    with pytest.raises(InputError, match="no such file"):
        files.load(tmp_path / "y.pt")


# ----------------------------------------------------------------------------------------------------- command line


@pytest.mark.skipif(sys.platform != "linux", reason="counts what glibc hands back")
def test_a_step_s_memory_is_not_handed_back_to_the_system_on_a_cpu(monkeypatch):
    script = """
        import resource, sys, torch
        from runtime import process
        if sys.argv[1] == "kept":
            process.start("cpu")
        for step in range(20):
            begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            held = [torch.ones(1 << 20) for _ in range(20)]  # 80 MB, 20,480 pages
            del held
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begin)
    """

    def faults(how: str) -> int:
        words = [sys.executable, "-c", textwrap.dedent(script), how]
        return int(subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout)

    if faults("as it is") > 1000:  # not every system clears pages one by one
        assert faults("kept") < 1000
    calls = []
    monkeypatch.setattr(process.ctypes, "CDLL", lambda _: types.SimpleNamespace(mallopt=lambda *a: calls.append(a)))
    process.start("cpu")
    assert calls == [(-3, 1 << 25), (-1, 2**31 - 1)]


@pytest.mark.parametrize("method", METHODS)
def test_help_shows_every_knob_with_its_comment_and_default(method):
    text = build_parser(method, METHODS).format_help()
    flat = re.sub(r"\s+", " ", text)
    for name, comment in field_comments(METHODS[method].Config).items():
        assert "--" + name.replace("_", "-") in text and comment in flat, name
    assert max(map(len, text.splitlines())) <= 100
    for title in ("what to train on what", "encoder", "optimisation", "machine", "run directory", f"{method}: "):
        assert title in text


@pytest.mark.parametrize(
    "capability, triton, compiler, precision, compiles",
    [((8, 0), True, "gcc", "bf16", True), ((8, 0), False, "gcc", "bf16", False), ((7, 5), True, "my-cc", "fp16", True),
     ((8, 0), True, "other-cc", "bf16", False), ((6, 0), True, "gcc", "fp16", False)],
)  # fmt: skip
def test_a_gpu_is_asked_what_it_can_do(monkeypatch, capability, triton, compiler, precision, compiles):
    """torch counts emulated bf16 as bf16 unless told not to; below 7.0, or without a compiler of C, Triton fails."""

    def bf16(including_emulation=True):
        return including_emulation or capability >= (8, 0)

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: (name == "triton" and triton) or None)
    monkeypatch.setattr(shutil, "which", lambda name: name if name == compiler else None)
    monkeypatch.setenv("CC", "my-cc")
    args = types.SimpleNamespace(precision="auto", compile=None, resume="never")
    settle(args, torch.device("cuda"))
    assert (args.device, args.precision, args.compile) == ("cuda", precision, compiles)


def test_gpus_are_counted_on_each_machine_and_each_process_takes_its_own(monkeypatch):
    """The twelfth of sixteen processes on two machines with eight GPUs each, which this one has not."""
    taken, begun = [], []
    for name, value in dict(WORLD_SIZE=16, RANK=11, LOCAL_WORLD_SIZE=8, LOCAL_RANK=3).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(process.dist, "rendezvous", lambda _: iter([("store", 11, 16)]))
    monkeypatch.setattr(process.dist, "PrefixStore", lambda *words: words)
    monkeypatch.setattr(process.dist, "init_process_group", lambda *words, **more: begun.append((words, more)))
    gpu = torch.device("cuda", 3)
    assert process.start("cuda") == gpu and taken == [3]
    store = ("attempt 0", "store")
    assert begun == [(("nccl",), dict(store=store, rank=11, world_size=16, device_id=gpu))]


def test_float32_is_float32_on_a_gpu_too():
    """torch's default is TF32 in convolutions, and not in products."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    process.start("cpu")
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32


def test_warm_up_leaves_time_to_train():
    """MAE's tiny recipe warms up for 10 of 100 epochs, whatever their number, unless that would be all of them."""

    def warmup(words):
        return options(f"--method mae --recipe tiny --device cpu {words}".split())[0].warmup_epochs

    assert warmup("") == warmup("--epochs 200") == warmup("--epochs 11") == 10
    assert warmup("--epochs 10") == 1 and warmup("--epochs 5") == 0.5
    assert warmup("--epochs 5 --warmup-epochs 6") == warmup("--epochs=5 --warmup-epochs=6") == 6  # given is given


def test_settings_come_from_defaults_then_recipe_then_flags():
    args, config, Method = options(["--method", "mae", "--recipe", "tiny", "--decoder-depth", "3", "--device", "cpu"])
    assert (args.model, args.batch_size, config.decoder_depth, config.decoder_width) == ("tiny", 512, 3, 128)
    assert args.lr == pytest.approx(Method.RECIPES["tiny"]["base_lr"] * 2)  # times B / 256
    larger = options("--method mae --recipe tiny --batch-size 1024 --device cpu".split())[0]
    assert larger.lr == pytest.approx(2 * args.lr)
    args = options(["--method", "mae", "--data", "/some/my set/", "--device", "cpu"])[0]
    assert (args.recipe, args.out) == ("tiny", "runs/mae-some-my-set")
    args, _, _ = options(["--method", "mae", "--data", "imagenet", "--device", "cpu", "--lr", "0.5"])
    assert (args.recipe, args.model, args.lr, args.batch_size) == ("paper", "base", 0.5, 4096)
    assert options(["--method", "mae", "--device", "cpu"])[0].recipe == "demo"
    args, config, _ = options(["--method", "cmae", "--no-pixel-shift", "--no-compile", "--device", "cpu"])
    assert not config.pixel_shift and config.target_color and args.out == "runs/cmae-shapes"


def test_the_papers_recipe_is_the_papers():
    for method in ("mae", "cmae"):
        args, config, _ = options(f"--method {method} --recipe paper --device cpu".split())
        assert args.lr == pytest.approx(1.5e-4 * 4096 / 256) and args.batch_size == 4096 and args.warmup_epochs == 40
        assert args.betas == [0.9, 0.95] and args.weight_decay == 0.05 and config.mask_ratio == 0.75
        assert (config.decoder_width, config.decoder_depth, config.decoder_heads) == (512, 8, 16)
    assert (config.tau, config.lambda_c, config.momentum, config.feature_decoder_depth) == (0.07, 1.0, 0.996, 2)


def test_the_images_own_mean_and_deviation_are_found_kept_and_used(train, photos, tmp_path):
    """They are those of the files, also for the encoder; a run goes on with them and with no others."""
    assert_fine(train("--max-steps", 2, out="plain"))
    assert_fine(train("--max-steps", 2, "--mean", "auto"))
    pixels = np.stack([np.asarray(Image.open(file)) for file in photos.glob("train/*/*.png")]) / 255
    settings, encoder = log(tmp_path / "run")[0]["settings"], load_encoder(tmp_path / "run")
    for name, wanted in (("mean", pixels.mean((0, 1, 2))), ("std", pixels.std((0, 1, 2)))):
        np.testing.assert_allclose(settings[name], wanted, atol=1e-6, rtol=0)
        assert [*getattr(encoder, name)] == [*encoder.settings[name]] == settings[name]
    assert log(tmp_path / "plain")[0]["settings"]["mean"] is None
    assert log(tmp_path / "plain")[1]["loss"] != log(tmp_path / "run")[1]["loss"]
    again = train("--max-steps", 2, "--mean", "auto")
    assert again.returncode == 0 and "continuing" in again.stderr
    assert_refused(train("--max-steps", 2), "of another run (mean [0.", "std [0.")
    done = train("--max-steps", 2, "--init", tmp_path / "run", out="next")
    assert done.returncode == 0 and "normalised otherwise; --mean 0." in done.stderr


def test_a_run_that_was_killed_keeps_the_mean_and_deviation_that_it_began_with(train, photos, tmp_path):
    """Unchanged, it ends with the bits of one that was not killed, and nothing is looked for again. Nor is it where an
    image has come to the folder: if that is of no matter to the run, it goes on, else that alone is the matter.
    """
    shutil.copytree(photos, tmp_path / "photos")
    flags = ["--data", tmp_path / "photos", "--mean", "auto", "--images", 64]
    whole = train(*flags, out="whole")
    assert_fine(whole)
    begun = train.start(*flags)
    wait_for_lines(begun, tmp_path / "run", 7)  # in the second epoch
    begun.kill()
    saved = files.load(tmp_path / "run/checkpoint.pt")
    assert 0 < saved["step"] < files.load(tmp_path / "whole/checkpoint.pt")["step"]
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    done = train(*flags, out="again")
    assert_fine(done)
    assert "deviation" in whole.stderr and "deviation" not in done.stderr
    assert_same_bits(state(tmp_path / "again"), state(tmp_path / "whole"))
    Image.new("RGB", (40, 40)).save(tmp_path / "photos/train/cat/0.0.png")  # the first of all
    assert_fine(train(*flags))
    for name in ("mean", "std"):
        assert log(tmp_path / "run")[0]["settings"][name] == saved["settings"][name]
    assert_fine(train(*flags[:4], "--max-steps", 1, out="all"))
    (tmp_path / "photos/train/cat/0.0.png").unlink()
    assert_refused(train(*flags[:4], "--max-steps", 1, out="all"), "of another run (images 81 there, 80 here);")


def test_views_are_normalised_by_the_settings_of_their_run(photos, environment, tmp_path, monkeypatch):
    """A batch of the loop, pictures and what is measured now and then: all by the same mean and deviation."""
    monkeypatch.setenv("MINMIM_CACHE", environment["MINMIM_CACHE"])
    seen, normalize = set(), augment.normalize
    monkeypatch.setattr(augment, "normalize", lambda x: seen.add(tuple(map(tuple, found(x)))) or normalize(x))

    def found(x):
        return [part.flatten().tolist() for part in augment.statistics(x.double())]

    words = ["--method", "cmae", "--data", photos, "--out", tmp_path / "run", *SMALL, *OWN["cmae"], "--max-steps", 2]
    words += ["--mean", 0.1, 0.2, 0.3, "--std", 0.5, 0.6, 0.7, "--evaluate"]
    args, config, Method = options([*map(str, words)])
    settle(args, torch.device("cpu"))
    loop(args, config, Method, torch.device("cpu"))
    assert seen == {((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))}


def test_auto_is_of_the_images_that_are_trained_on_and_leaves_a_given_deviation(
    photos, environment, tmp_path, monkeypatch
):
    monkeypatch.setenv("MINMIM_CACHE", environment["MINMIM_CACHE"])
    words = ["--method", "mae", "--data", photos, "--out", tmp_path / "run", *SMALL, *OWN["mae"], "--max-steps", 1]
    words += ["--images", 16, "--mean", "auto", "--std", 0.5, 0.6, 0.7]
    args, config, Method = options([*map(str, words)])
    settle(args, torch.device("cpu"))
    method = loop(args, config, Method, torch.device("cpu"))
    first = image_sets.open_set(str(photos)).images(torch.arange(16)).double().mean((0, 2, 3)) / 255
    torch.testing.assert_close(torch.tensor(method.encoder.mean).double(), first, atol=1e-6, rtol=0)
    assert [*method.encoder.std] == args.std == [0.5, 0.6, 0.7]


@pytest.mark.parametrize(
    "name",
    "mlp-ratio epochs max-steps batch-size accumulate classes images repeat save-every log-every probe-every "
    "log-gradients".split(),
)
def test_counts_are_at_least_one(name):
    with pytest.raises(InputError, match=f"--{name}: 0: must be at least 1"):
        options(["--method", "mae", "--device", "cpu", f"--{name}", "0"])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_from_rectangles_and_two_equal_numbers_are_a_square(name):
    given = ["--method", name, *SMALL, *OWN[name], *["--patch-size", "16"] * (name == "cae"), "--image-size"]
    args, config, Method = options([*given, "32", "64"])
    assert args.image_size == [32, 64] and vars(options([*given, "32", "32"])[0]) == vars(options([*given, "32"])[0])
    method, pixels = build(args, config, Method, torch.device("cpu"))[0], torch.randint(0, 256, (4, 3, 40, 72))
    flat = image_cache.Packed(*image_cache.pack([*pixels.to(torch.uint8)]))
    images = image_sets.ImageSet("four", ["one"], torch.zeros(4, dtype=torch.int64), flat)
    batch = method.draw(images.images(torch.arange(4)), torch.arange(4), StepRandom(0, 0, 4))
    shapes = {x.shape[2:] for x in batch if isinstance(x, torch.Tensor) and x.ndim == 4}
    assert shapes == {(32, 64)} | ({(16, 32)} if name == "cae" else set())  # its tokenizer's: 8 pixels a patch
    loss = method(batch)["loss"]
    loss.backward()
    assert loss.isfinite() and method.eval().picture(batch).shape[1:] == (4, 3, 32, 64)
    if hasattr(method, "end_epoch"):
        method.end_epoch(1, 1, images)
        assert method.boxes.shape == (4, 4)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "dvae"])
def test_init_gives_every_method_the_encoder_and_its_teacher_a_copy_and_changes_nothing_else(name, tmp_path):
    def made(*flags):
        args, config, Method = options(["--method", name, *SMALL, *own(name, *flags)])
        return build(args, config, Method, torch.device("cpu"))[0]

    given = {key: torch.randn(x.shape) for key, x in made().encoder.state_dict().items()}
    before = made().state_dict()
    for patches in (16, 36):  # of images of this size, and of 48 pixels, for which positions are interpolated
        given["pos_embed"] = torch.randn(1, 1 + patches, 16)
        torch.save(dict(model=given), tmp_path / "mae.pth")  # as MAE's official weights are
        method = made("--init", str(tmp_path / "mae.pth"), "--heads", "2")
        if patches == 36:
            given["pos_embed"] = method.encoder.pos_embed
        copies = 0
        for key, x in method.state_dict().items():
            owner, _, rest = key.partition(".")
            owned = owner in ("encoder", "student", "momentum_encoder", "slow_encoder")
            assert torch.equal(x, given[rest] if owned else before[key]), key
            copies += owned and owner not in ("encoder", "student")
        assert copies == (len(given) if name in ("cmae", "cmae_loc", "conmim") else 0)


def test_cmaes_small_vit_is_built_by_its_flags():
    words = "--method cmae --device cpu --model base --patch-size 16 --image-size 224 --depth 8 --heads 8 --mlp-ratio 3"
    encoder = build_encoder(options(words.split())[0])
    assert len(encoder.blocks) == 8 and encoder.blocks[7].mlp.fc1.weight.shape == (2304, 768)
    assert encoder.blocks[0].attn.heads == 8 and encoder.settings["mlp_ratio"] == 3
    for wrong in ("0", "-1"):
        with pytest.raises(InputError, match=f"--mlp-ratio: {wrong}: must be at least 1"):
            options([*words.split()[:-1], wrong])
    assert ViT().blocks[0].mlp.fc1.out_features == 4 * 128


def test_init_is_needed_once_and_recorded(train, tmp_path):
    finish(train.start("--max-steps", 1, "--save-every", 1, out="first"))
    moved = tmp_path / "weights.safetensors"
    shutil.copy(tmp_path / "first/encoder.safetensors", moved)
    flags = ["--init", moved, "--lr", 0, "--min-lr", 0, "--weight-decay", 0, "--epochs", 1, "--warmup-epochs", 0]
    done = train(*flags, method="conmim")
    assert f"{moved}: taken: encoder\n{moved}: begins anew: mask_token, projector\n" in done.stderr
    ours, theirs = (files.load(tmp_path / run / "encoder.safetensors")["state_dict"] for run in ("run", "first"))
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []  # a rate of 0: as it began
    assert files.load(tmp_path / "run/checkpoint.pt")["settings"]["init"] == str(moved)
    moved.unlink()
    again = train(*flags, method="conmim")
    assert again.returncode == 0 and "continuing" in again.stderr and "taken" not in again.stderr
    assert_refused(
        train(*flags[2:], method="conmim"), "init", "weights.safetensors"
    )  # another run than one from scratch


def test_init_that_cannot_be_is_one_line(train, tmp_path):
    assert_refused(train("--init", tmp_path / "none.pth"), "none.pth", "no such file")
    assert_refused(train("--mean", 0.5, 0.5, 0.5, method="dvae"), "--mean, --std: dvae learns no ViT")
    wider = ViT(32, 8, 32, 2, 2)
    files.save_weights(tmp_path / "wide.safetensors", wider.settings, wider.state_dict(), "a test")
    assert_refused(train("--init", tmp_path / "wide.safetensors"), "wide.safetensors", "width 32 there, 16 here")
    assert not (tmp_path / "run").exists()  # refused before anything is written


@pytest.mark.parametrize("layout", ["official", "transformers"])
def test_the_first_loss_from_maes_public_weights_is_that_of_the_public_model(train, photos, tmp_path, layout):
    """Encoder and decoder: transformers' model is given the same weights, images and mask."""
    words = ["--method", "mae", "--data", str(photos), *SMALL, *DECODER]
    args, config, Method = options(words)
    model = build(args, config, Method, torch.device("cpu"))[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    theirs = hugging_face(model)
    if layout == "official":
        parts = [
            ("decoder.", "decoder_"),
            ("decoder_mask", "mask"),
            ("decoder_predict", "decoder_pred"),
            ("encoder.", ""),
        ]
        state = {"decoder_pos_embed": model.decoder.pos_embed}
        for name, x in model.state_dict().items():
            for ours, official in parts:
                name = name.replace(ours, official)
            state[name] = x
        torch.save(dict(model=state, epoch=799), tmp_path / "public")
    else:
        theirs.save_pretrained(tmp_path / "public")
    done = train("--max-steps", 1, "--init", tmp_path / "public", "--heads", 2)
    assert (
        "public: taken: encoder, decoder\n" in done.stderr and "aside" not in done.stderr and "anew" not in done.stderr
    )
    images = image_sets.open_for(args, "train")
    index = next(Plan(args, len(images)).indices(0))
    batch = model.draw(images.images(index, torch.device("cpu")), index, StepRandom(args.seed, 0, len(index)))
    noise = torch.empty(batch.mask.order().shape).scatter(1, batch.mask.order(), torch.arange(16.0).expand(16, -1))
    expected = theirs(batch.images, noise=noise).loss.item()
    assert log(tmp_path / "run")[1]["loss"] == pytest.approx(expected, rel=1e-4)
    fresh = build(args, config, Method, torch.device("cpu"))[0]
    assert abs(fresh(batch)["loss"].item() / expected - 1) > 0.01  # by the seed's weights it is another
