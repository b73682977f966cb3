"""The command evaluate.py: what it prints and keeps, which options each protocol takes, and what it refuses."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from forked_programs import Program, finish
from PIL import Image
from torch import nn

import evaluate
from common import MEAN, STD, ViT, pair
from runtime import process
from runtime.encoder_files import load_encoder
from runtime.errors import InputError

ROOT = Path(evaluate.__file__).parent


def small_vit(**settings) -> ViT:
    torch.manual_seed(0)
    return ViT(**dict(image_size=16, patch_size=8, width=8, depth=2, heads=2) | settings)


@pytest.fixture
def run(tmp_path):
    """A run directory with an encoder, and an image folder: 2 classes that brightness tells apart, 11 + 7 images."""
    draw = np.random.default_rng(0)
    for half, n in (("train", 11), ("val", 7)):
        for i in range(n):
            folder = tmp_path / "images" / half / "ab"[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = draw.integers(0, 120, (16, 16, 3)) + 130 * (i % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    directory = tmp_path / "run"
    directory.mkdir()
    encoder = small_vit()
    torch.save({"settings": encoder.settings, "state_dict": encoder.state_dict()}, directory / "encoder.pt")
    settings = {"data": str(tmp_path / "images"), "data_root": None, "classes": None, "seed": 3}
    (directory / "config.json").write_text(json.dumps({"settings": settings}))
    return directory


def call(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--device", "cpu", *map(str, words)])
    evaluate.main()


TRAIN = "--recipe demo --batch-size 4 --epochs 12 --seed 1".split()
LARS = "--epochs 60 --lr 40 --features mean".split()  # or the running statistics do not arrive
COMMANDS = {  # what is given, and what of it the result says
    "knn": (["--k", 5], dict(k=5, tau=0.07, features="mean")),
    "linear": ([], dict(features="mean")),
    "linear-paper": (["--paper", *TRAIN, *LARS], dict(optimizer="lars", features="mean", seed=1, crop_scale=0)),
    "attentive": (TRAIN, dict(optimizer="sgd", attend_cls=False, batch_size=4, recipe="demo")),
    "partial-0": (["--blocks", 0, *TRAIN, *LARS], dict(optimizer="lars", blocks=0, lr=40)),
    "partial-1": (["--blocks", 1, *TRAIN, "--lr", 0.01], dict(optimizer="adamw", blocks=1, lr=0.01, layer_decay=0.75)),
    "finetune": ([*TRAIN, "--lr", 0.01, "--seeds", 2], dict(epochs=12, seeds=2, norm="fresh", precision="fp32")),
    "supervised": ([*TRAIN, "--lr", 0.01], dict(layer_decay=1)),
}


@pytest.mark.training
@pytest.mark.parametrize("name", COMMANDS)
def test_the_last_line_is_the_result_and_the_run_keeps_it(run, monkeypatch, capsys, name):
    protocol, (words, said) = name.split("-")[0], COMMANDS[name]
    call(monkeypatch, "--run", run, "--protocol", protocol, "--precision", "fp32", *words)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found == json.loads((run / f"evaluate-{name}.json").read_text())
    assert (found["protocol"], found["n"], found["top5"], found["untrained"]) == (protocol, 7, 100, False)
    assert found["top1"] == 100 or (name == "supervised" and found["top1"] > 50)
    assert found | said == found
    trains = protocol != "knn" and name != "linear"
    assert sorted(os.listdir(run)) == sorted(["config.json", "encoder.pt", f"evaluate-{name}.json", *([name] * trains)])
    for folder in (run / name).glob("*"):
        assert sorted(os.listdir(folder)) == ["checkpoint.pt", "log.jsonl"]
    assert not trains or len(list((run / name).glob("seed-*"))) == found["seeds"]


def test_what_is_trained_is_kept_and_trained_anew_only_if_asked_to(run, monkeypatch):
    words = "--run", run, "--protocol", "attentive", "--precision", "fp32", *TRAIN, "--epochs", 2
    kept, written = run / "attentive" / "seed-1" / "checkpoint.pt", []
    for more in ((), ("--resume", "auto"), ("--resume", "never")):
        call(monkeypatch, *words, *more)
        written.append(kept.stat().st_mtime_ns)
    assert written[0] == written[1] < written[2]
    for other, differs in (
        (["--accumulate", 2], "accumulate 1 there, 2 here"),
        (["--mean", 0, 0, 0], "mean None there"),
    ):
        with pytest.raises(InputError, match=rf"with other settings \({differs}"):
            call(monkeypatch, *words, *other)


IDLE = {
    "--k: does nothing to protocol linear without --paper": "linear --k 5",
    "--epochs: does nothing to protocol linear without --paper": "linear --epochs 5",
    "--epochs: does nothing to protocol knn": "knn --epochs 5",
    "--paper: does nothing to protocol finetune": "finetune --paper",
    "--blocks: does nothing to protocol finetune": "finetune --blocks 1",
    "--features: does nothing to protocol attentive": "attentive --features cls",
    "--untrained: does nothing to protocol supervised": "supervised --untrained",
    "--blocks 3: the encoder has 2; give 0": "partial --blocks 3",
    "epochs 0: must be 1 or more": "finetune --epochs 0",
    "--seeds 0: must be at least 1": "finetune --seeds 0",
    "--seed: 4294967296: must be from 0 to 4294967295": "finetune --seed 4294967296",
    "--batch-size 0: must be at least 1": "knn --batch-size 0",
    "--features 'max': unknown; choose one of mean, cls": "knn --features max",
    "recipe 'deit': unknown; choose one of mae": "finetune --recipe deit",
    "batch size 512: larger than the 11 images": "finetune",
    "invalid choice: 'knnn'": "knnn",
    "image size 20x20 is not divisible by patch size 8": "knn --image-size 20",
    "--image-size: 0: give one number of pixels, or height and width": "knn --image-size 0",
    "--image-size: 16 24 32: give one number": "knn --image-size 16 24 32",
    "--image-size: 16x24: give one number": "knn --image-size 16x24",
    "--mean: 0.5 0.5: give auto, or three numbers": "knn --mean 0.5 0.5",
    "--std: auto: give three numbers": "knn --std auto",
}


@pytest.mark.parametrize("words", IDLE)
def test_what_does_nothing_or_cannot_be_is_refused_in_one_line(run, monkeypatch, words):
    with pytest.raises(InputError, match=words) as error:
        call(monkeypatch, "--run", run, "--protocol", *IDLE[words].split())
    assert "\n" not in str(error.value)
    assert sorted(os.listdir(run)) == ["config.json", "encoder.pt"]


def test_every_option_arrives(run, monkeypatch, capsys):
    found, used = {}, {"knn": dict(precision="fp32")}
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **options: found.update(options) or used)
    options = dict(features="cls", batch_size=3, precision="bf16", k=7, tau=0.2)
    words = [word for name, value in options.items() for word in ("--" + name.replace("_", "-"), value)]
    call(monkeypatch, "--run", run, "--protocol", "knn", *words)
    assert found == options | dict(directory=run / "knn")
    assert json.loads(capsys.readouterr().out)["precision"] == "fp32"  # what was used, not what was asked for


def test_flags_go_before_the_runs_settings(run, monkeypatch, capsys):
    call(monkeypatch, "--run", run / "encoder.pt", "--protocol", "knn", "--classes", 1, "--tau", 0.5)
    found = json.loads(capsys.readouterr().out)
    assert (found["n"], found["classes"], found["tau"]) == (4, 1, 0.5)  # the 4 of class a


def test_images_are_read_as_the_run_has_read_them_unless_a_flag_says_otherwise(run, monkeypatch):
    config = json.loads((run / "config.json").read_text())
    theirs = dict(class_level=1, range=[0.0, 900.0], skip_bad_images=True, download=False, data_root="/", classes=2)
    (run / "config.json").write_text(json.dumps({"settings": config["settings"] | theirs}))
    asked, opened = [], evaluate.image_sets.open_for
    monkeypatch.setattr(
        evaluate.image_sets, "open_for", lambda args, half: asked.append(vars(args)) or opened(args, half)
    )
    call(monkeypatch, "--run", run, "--protocol", "knn")
    call(monkeypatch, "--run", run, "--protocol", "knn", "--range", 0, 500, "--classes", 1)
    own = dict(data=config["settings"]["data"])
    for found, wanted in zip(
        asked[::2], (own | theirs, own | theirs | dict(range=[0.0, 500.0], classes=1)), strict=True
    ):
        assert found | wanted == found
    theirs = dict(split=["train", "test"], columns=["image"])  # of another set than the one that is given, so not read
    (run / "config.json").write_text(json.dumps({"settings": config["settings"] | theirs}))
    call(monkeypatch, "--run", run, "--protocol", "knn", "--data", config["settings"]["data"])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_protocol_sees_images_of_another_size_if_told_so(run, monkeypatch, capsys, name):
    """Two equal numbers are one, and the encoder's own size changes nothing; each size has its own files."""
    epochs = [] if name in ("knn", "linear") else ["--epochs", 1, "--seeds", 1]
    words = "--run", run, "--protocol", name.split("-")[0], *COMMANDS[name][0], *epochs
    sizes = {"": (16, []), "-16x16": (16, [16, 16]), "-24x40": ([24, 40], [24, 40])}
    seen, embed = set(), ViT.embed
    monkeypatch.setattr(ViT, "embed", lambda self, x, *visible: seen.add(x.shape[2:]) or embed(self, x, *visible))
    results = {}
    for name_of_size, (size, given) in sizes.items():
        seen.clear()
        call(monkeypatch, *words, *(["--image-size", *given] if given else []))
        results[name_of_size] = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert results[name_of_size] == json.loads((run / f"evaluate-{name}{name_of_size}.json").read_text())
        assert results[name_of_size]["image_size"] == size and seen == {pair(size)}
        assert bool(epochs) == (run / (name + name_of_size)).is_dir()
        assert bool(epochs) == (results[name_of_size]["precision"] != "auto")  # of a training, what it came to
    assert results[""] == results["-16x16"]


@pytest.mark.parametrize("words", ["knn", "linear", "finetune --recipe demo --batch-size 4 --epochs 1"])
def test_images_are_normalised_by_the_mean_and_deviation_of_the_encoder(run, monkeypatch, words):
    encoder = small_vit(mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])
    torch.save({"settings": encoder.settings, "state_dict": encoder.state_dict()}, run / "encoder.pt")
    mean, std = (torch.tensor(values)[:, None, None] for values in (encoder.mean, encoder.std))
    seen, embed = [], ViT.embed
    monkeypatch.setattr(ViT, "embed", lambda self, x, *visible: seen.append(x) or embed(self, x, *visible))
    call(monkeypatch, "--run", run, "--protocol", *words.split(), "--precision", "fp32")
    pixels = torch.cat([x for x in seen if x.any()]) * std + mean  # a first pass, for shapes, is of zeros
    whole = pixels if words in ("knn", "linear") else pixels[-7:]  # what trains is cropped
    assert len(whole) >= 7 and whole.min() >= -1e-6 and whole.max() > 0.9
    torch.testing.assert_close(255 * whole, (255 * whole).round(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("own", [None, [0.4, 0.5, 0.6]])
def test_mean_and_deviation_may_be_given_or_found_and_are_in_the_result(run, monkeypatch, capsys, own):
    """Those of the encoder, or ImageNet's, stand in for what is not given; auto are those of the training images."""
    encoder = small_vit(mean=own, std=own)
    torch.save({"settings": encoder.settings, "state_dict": encoder.state_dict()}, run / "encoder.pt")
    pixels = np.stack([np.asarray(Image.open(file)) for file in run.parent.glob("images/train/*/*.png")]) / 255
    found, usual = [f(pixels, axis=(0, 1, 2)) for f in (np.mean, np.std)], [own or MEAN, own or STD]
    seen, embed = [], ViT.embed
    monkeypatch.setattr(ViT, "embed", lambda self, x, *visible: seen.append(x) or embed(self, x, *visible))
    one, other = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    for words, mean, std in (
        ([], *usual),
        (["--mean", *one], one, usual[1]),
        (["--std", *other], usual[0], other),
        (["--mean", "auto"], *found),
        (["--mean", "auto", "--std", *other], found[0], other),
    ):
        seen.clear()
        call(monkeypatch, "--run", run, "--protocol", "knn", "--precision", "fp32", *words)
        result = json.loads(capsys.readouterr().out)
        np.testing.assert_allclose([result["mean"], result["std"]], [mean, std], atol=1e-6)
        mean, std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (mean, std))
        grey = 255 * (torch.cat([x for x in seen if x.any()]) * std + mean)
        torch.testing.assert_close(grey, grey.round().clamp(0, 255), atol=1e-2, rtol=0)


def test_positions_of_another_size_are_interpolated_and_the_rest_is_the_runs(run, monkeypatch):
    used, encoder = [], load_encoder(run)
    monkeypatch.setattr(evaluate, "evaluate", lambda encoder, *_, **__: used.append(encoder) or {"knn": {}})
    call(monkeypatch, "--run", run, "--protocol", "knn", "--image-size", 32, 16)
    state = encoder.state_dict()
    grid = state["pos_embed"][0, 1:].reshape(2, 2, 8).permute(2, 0, 1)[None]
    new = nn.functional.interpolate(grid, (4, 2), mode="bicubic").flatten(2).transpose(1, 2)  # as in MAE's code
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], new], dim=1)
    for key, x in used[0].state_dict().items():
        torch.testing.assert_close(x, state[key], rtol=0, atol=1e-6 if key == "pos_embed" else 0)


def test_files_of_weights_that_lie_side_by_side_keep_results_of_their_own(run, monkeypatch, capsys):
    words = ["--protocol", "partial", "--blocks", 0, "--data", run.parent / "images", *TRAIN, "--epochs", 1]
    for seed, name in enumerate(("one.pt", "other.v2.pt")):
        torch.manual_seed(seed)
        encoder = ViT(**small_vit().settings)
        torch.save({"settings": encoder.settings, "state_dict": encoder.state_dict()}, run / name)
        call(monkeypatch, "--run", run / name, *words)  # would not go on with the other's
    call(monkeypatch, "--run", run / "encoder.pt", *words)
    names = ["one-partial-0", "other.v2-partial-0", "partial-0"]
    found = [json.loads((run / f"evaluate-{name}.json").read_text())["run"] for name in names]
    assert found == [str(run / name) for name in ("one.pt", "other.v2.pt", "encoder.pt")]
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == names


def test_untrained_is_the_same_architecture_at_weights_of_the_runs_seed(run, monkeypatch, capsys):
    used = []
    monkeypatch.setattr(evaluate, "evaluate", lambda encoder, *_, **__: used.append(encoder) or {"knn": {}})
    state = torch.get_rng_state()
    for words in ((), ("--untrained",), ("--untrained",)):
        call(monkeypatch, "--run", run, "--protocol", "knn", *words)
    assert torch.equal(torch.get_rng_state(), state)
    trained, once, again = used
    assert trained.settings == once.settings
    torch.manual_seed(3)
    for name, value in ViT(**once.settings).state_dict().items():
        assert torch.equal(value, once.state_dict()[name]) and torch.equal(value, again.state_dict()[name])
    assert not torch.equal(trained.blocks[0].mlp.fc1.weight, once.blocks[0].mlp.fc1.weight)
    assert (run / "evaluate-knn-untrained.json").exists()


def _truncate(run):
    whole = (run / "encoder.pt").read_bytes()
    (run / "encoder.pt").write_bytes(whole[: len(whole) // 2])


BROKEN = {
    "no such file": lambda run: (run / "encoder.pt").unlink(),
    "damaged": _truncate,
    "not a minMIM encoder": lambda run: torch.save({"weights": torch.zeros(2)}, run / "encoder.pt"),
    "give an encoder that": lambda run: torch.save({"settings": {}, "state_dict": {}}, run / "encoder.pt"),
    "encoder that train.py": lambda run: torch.save(["settings"], run / "encoder.pt"),
    "not a run's configuration": lambda run: (run / "config.json").write_text('{"settings"'),
    "give --data": lambda run: (run / "config.json").unlink(),
    "no.where": lambda run: (run / "config.json").write_text('{"settings": {"data": "/no/where"}}'),
    "cannot be written": lambda run: (run / "evaluate-knn.json").mkdir(),
}


@pytest.mark.parametrize("words", BROKEN)
def test_what_is_wrong_is_said_in_one_line(run, monkeypatch, words):
    BROKEN[words](run)
    with pytest.raises(InputError, match=words) as error:
        call(monkeypatch, "--run", run, "--protocol", "knn")
    assert "\n" not in str(error.value)


def test_a_pickle_is_not_run(run):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(run / "sprung"),)

    torch.save({"settings": Trap(), "state_dict": {}}, run / "encoder.pt")
    with pytest.raises(InputError):
        load_encoder(run)
    assert not (run / "sprung").exists()


def shell(*words) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


def test_bad_input_ends_the_program_with_one_line_and_status_2(run):
    done = shell("evaluate.py", "--run", run / "missing", "--protocol", "knn", "--device", "cpu")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "missing" in done.stderr


def test_two_processes_measure_what_one_does_and_print_it_once(run, monkeypatch, capsys):
    call(monkeypatch, "--run", run, "--protocol", "linear")
    alone = json.loads(capsys.readouterr().out)
    words = ["--run", run, "--protocol", "linear", "--device", "cpu"]  # test_commands.py has it started by torchrun
    done = finish(Program("evaluate.py", *words, env=os.environ | dict(OMP_NUM_THREADS="1"), cwd=ROOT, n=2))
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [alone | {"processes": 2}]


@pytest.mark.parametrize(
    "raised, status, said", [(InputError("x: wrong; right"), 2, "x: wrong; right\n"), (KeyboardInterrupt(), 130, "")]
)
def test_a_command_ends_with_a_line_or_quietly(capsys, raised, status, said):
    def main():
        raise raised

    with pytest.raises(SystemExit) as ended:
        process.command(main)
    assert (ended.value.code, capsys.readouterr().err) == (status, said)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_a_device_that_is_not_there_is_named():
    assert process.start("auto").type in ("cpu", "mps")
    with pytest.raises(InputError, match="device cuda: 1 GPUs asked for, 0 found"):
        process.start("cuda")
    with contextlib.suppress(InputError):  # on a Mac there is one
        assert process.start("mps").type == "mps"
