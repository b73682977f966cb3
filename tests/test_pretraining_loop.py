"""train.py against the loop of a paper, written here in plain lines: the same weights, teacher, losses and rates."""

import copy
import json
import math
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forked_programs import SMOOTH, Program, finish
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_train import OWN, environment  # noqa: F401  (a fixture)

import mae
import train
from common import StepRandom, ViT
from dvae import Tokenizer
from methods import METHODS
from runtime import files

TINY = "--image-size 32 --patch-size 8 --width 16 --depth 2 --heads 2 --layer-scale 0.5 --device cpu"
KNOBS = {name: " ".join(words) for name, words in OWN.items()}  # each method's own, to keep it small
KNOBS["cae"] = "--regressor-depth 1 --decoder-depth 1 --tokenizer {}"
KNOBS["dvae"] += " --kl-warmup 0.9 --tau-anneal 1 --tau-end 0.5"
KNOBS["cmae_loc"] += " --crop-warmup 0.6"  # later than the first epoch, so that the number of the epoch matters
for name in ("cmae", "cmae_loc", "conmim"):
    KNOBS[name] += " --momentum 0.7"  # a teacher that moves visibly in ten steps


COARSE = torch.rand(26, 3, 5, 5, generator=torch.Generator().manual_seed(5))
PIXELS = (torch.nn.functional.interpolate(COARSE, 40, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


@pytest.fixture(scope="module")
def place(environment, tmp_path_factory):  # noqa: F811
    """A directory with these images in a folder, of which fewer validate, and a tokenizer for CAE."""
    place = tmp_path_factory.mktemp("loop")
    for split, n in (("train", 26), ("val", 20)):
        (place / "photos" / split / "all").mkdir(parents=True)
        for i, image in enumerate(PIXELS[:n].permute(0, 2, 3, 1).numpy()):
            Image.fromarray(image).save(place / "photos" / split / "all" / f"{i:02}.png")
    torch.manual_seed(3)
    tokenizer = Tokenizer(codes=16, hidden=8, blocks=1, first_stride=4)
    files.save(place / "encoder.pt", dict(settings=tokenizer.settings, state_dict=tokenizer.state_dict()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINMIM_CACHE", environment["MINMIM_CACHE"])
        patch.setattr(torch.nn.functional, "relu", torch.nn.functional.softplus)  # as `SMOOTH` does there
        yield place


class ImageSet:
    """What `end_epoch` asks of one."""

    def __len__(self):
        return len(PIXELS)

    def batches(self, orders, device):
        yield from ((PIXELS[order], order) for order in orders)


def plain_loop(method, o, ranks: int = 1, dtype=None, loss_scale: float = 1.0, adam: bool = True):
    """Pretraining as the papers say it: the rates and mean losses of the steps; `method` holds the weights after them.

    `o` are the options by their names; `o.batch_size` images a step, in `o.accumulate` parts on each of `ranks`.
    """
    n, parts = len(PIXELS) * o.repeat, o.accumulate * ranks
    per_epoch, share = n // o.batch_size, o.batch_size // parts
    steps, warmup = o.epochs * per_epoch, round(o.warmup_epochs * per_epoch)
    if o.max_steps and o.max_steps < steps:
        steps, warmup = o.max_steps, round(warmup * o.max_steps / steps)
    weights = {name: p for name, p in method.named_parameters() if p.requires_grad}
    moments = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in weights.items()}
    rates, losses = [], []
    for step in range(steps):
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng((o.seed, epoch, 1)).permutation(n)[place * o.batch_size :][: o.batch_size]
        index = torch.from_numpy(order % len(PIXELS))
        progress = (step - warmup) / max(1, steps - warmup)
        rates.append(o.lr * step / warmup if step < warmup
                     else o.min_lr + (o.lr - o.min_lr) * (1 + math.cos(math.pi * progress)) / 2)  # fmt: skip
        losses.append(0.0)
        for rank in range(ranks):
            torch.manual_seed(o.seed + (step * ranks + rank) * 1_000_003)  # drop path
            for part in range(o.accumulate):
                begin = (part * ranks + rank) * share
                rows = slice(begin, begin + share)
                batch = method.draw(PIXELS[index[rows]], index[rows], StepRandom(o.seed, step, o.batch_size, rows))
                with torch.autocast("cpu", dtype, enabled=dtype is not None):
                    loss = method(batch)["loss"]
                (loss_scale * loss / parts).backward()
                losses[-1] += loss.item() / parts
        gradients = {name: w.grad.double() / loss_scale for name, w in weights.items() if w.grad is not None}
        norm = math.sqrt(sum(g.square().sum() for g in gradients.values()))
        clip = min(1.0, o.clip_grad / norm) if o.clip_grad else 1.0
        for name, g in gradients.items():
            weight, (first, second) = weights[name], moments[name]
            exempt = weight.ndim <= 1 or name.endswith("bias") or any(part in name for part in o.no_decay)
            first += (1 - o.betas[0]) * (clip * g - first)
            second += (1 - o.betas[1]) * ((clip * g) ** 2 - second)
            root = (second / (1 - o.betas[1] ** (step + 1))).sqrt()
            descent = first / (1 - o.betas[0] ** (step + 1)) / (root + 1e-8) if adam else clip * g
            weight.data -= rates[-1] * (descent + (0 if exempt else o.weight_decay) * weight.data)  # AdamW or SGD
            weight.grad = None
        if hasattr(method, "update_teacher"):
            method.update_teacher((step + 1) / steps)
        if place == per_epoch - 1 and step < steps - 1 and hasattr(method, "end_epoch"):
            method.end_epoch(epoch + 1, steps / per_epoch, ImageSet())
    return rates, losses


PLAIN = dict(
    epochs=3, max_steps=None, batch_size=8, accumulate=1, lr=2e-3, min_lr=0.0, warmup_epochs=0.0, weight_decay=0.05,
    no_decay=[], betas=(0.9, 0.95), clip_grad=0.0, seed=0, repeat=1, drop_path=0.0,
)  # fmt: skip
# All options are given and large enough to show in ten steps, of which three are an epoch.
ALL = dict(
    epochs=4, max_steps=10, batch_size=8, accumulate=2, lr=2e-3, min_lr=1e-3, warmup_epochs=1.3, weight_decay=2.0,
    no_decay=["proj", "token", "input"], betas=(0.7, 0.8), clip_grad=0.05, seed=3, repeat=1, drop_path=0.5,
)  # fmt: skip
OPTIONS = dict(
    epochs=st.integers(1, 3), max_steps=st.none() | st.integers(1, 10), batch_size=st.sampled_from([8, 12, 16]),
    accumulate=st.sampled_from([1, 2]), lr=st.sampled_from([5e-4, 2e-3]), min_lr=st.sampled_from([0.0, 1e-4, 1e-3]),
    warmup_epochs=st.sampled_from([0.0, 0.4, 1.0, 1.7, 5.0]), weight_decay=st.sampled_from([0.0, 0.05, 2.0]),
    no_decay=st.lists(st.sampled_from(["proj", "token", "input", "blocks", "weight"]), unique=True),
    betas=st.sampled_from([(0.9, 0.95), (0.8, 0.99), (0.0, 0.5)]), clip_grad=st.sampled_from([0.0, 0.01, 1.0]),
    seed=st.integers(0, 2**31), repeat=st.sampled_from([1, 2]), drop_path=st.sampled_from([0.0, 0.3]),
)  # fmt: skip


def prepared(method: str, given: dict, place, *more):
    """The words for train.py and, for the plain loop, the method at its first weights and the options."""
    words = [*f"--method {method} --data {place}/photos {TINY} {KNOBS[method].format(place)}".split(), *map(str, more)]
    words += [*"--resume never --no-evaluate --log-every 1 --save-every 9 --drop-path".split(), str(given["drop_path"])]
    _, config, Method = train.options(words)
    torch.manual_seed(given["seed"])
    plain = Method(ViT(32, 8, 16, 2, 2, layer_scale=0.5, drop_path=given["drop_path"]), config).train()
    there = [part for part in given["no_decay"] if any(part in name for name, _ in plain.named_parameters())]
    for option, value in (given | dict(no_decay=there)).items():
        if value is not None:
            words += ["--" + option.replace("_", "-"), *map(str, value if isinstance(value, list | tuple) else [value])]
    return words, plain, SimpleNamespace(**given | dict(no_decay=there))


def assert_alike(run, method, rates, losses, near: float):
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()[1:]]
    assert [row["lr"] for row in rows] == pytest.approx(rates, rel=1e-9)
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=10 * near, abs=10 * near)
    found, expected = files.load(run / "checkpoint.pt")["method"], method.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=near, rtol=near, msg=lambda m, n=name: f"{n}: {m}")


def train_here(words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *words])
        train.main()


@pytest.mark.training
@settings(max_examples=2)
@given(st.fixed_dictionaries(OPTIONS))
@example(PLAIN)
@example(ALL)
@pytest.mark.parametrize("method", METHODS)
def test_pretraining_is_that_of_a_plain_loop(method, place, given):
    """In float32. Rounding was seen to come to 5e-6 in weights and 4e-5 in losses (CMAE's)."""
    with tempfile.TemporaryDirectory() as run:
        words, plain, o = prepared(method, given, place, "--precision", "fp32", "--out", run)
        train_here(words)
        assert_alike(Path(run), plain, *plain_loop(plain, o), 1e-4)


@pytest.mark.training
@pytest.mark.parametrize("clip_grad", [0.0, 0.3])
@pytest.mark.parametrize("method", ["mae", "conmim"])
def test_by_gradient_descent_the_size_of_gradients_shows(method, clip_grad, place, tmp_path, monkeypatch):
    """AdamW would take the same steps if all gradients were twice as large. Some of these steps are clipped."""
    given = ALL | dict(clip_grad=clip_grad, lr=0.05, weight_decay=0.1)
    words, plain, o = prepared(method, given, place, "--precision", "fp32", "--out", tmp_path)
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, lr, **_: torch.optim.SGD(groups, lr=lr))
    train_here(words)
    assert_alike(tmp_path, plain, *plain_loop(plain, o, adam=False), 1e-4)


@pytest.mark.training
@pytest.mark.parametrize("method", ["mae", "dvae"])  # whose images do not look at each other
def test_two_processes_pretrain_as_a_plain_loop_of_two(method, place, tmp_path, environment):  # noqa: F811
    """Gradients and logged losses are means over ranks and parts, and each rank drops paths of its own."""
    words, _, o = prepared(method, ALL, place, "--precision", "fp32", "--out", tmp_path / "run")
    two = Program("train.py", *words, n=2, env=environment, cwd=tmp_path, before=SMOOTH)
    _, plain, o = prepared(method, ALL, place)
    rates, losses = plain_loop(plain, o, ranks=2)
    assert finish(two).returncode == 0, two.stderr
    assert_alike(tmp_path / "run", plain, rates, losses, 1e-4)


@pytest.mark.training
@pytest.mark.parametrize("clip_grad", [0.0, 0.05])
@pytest.mark.parametrize("precision, dtype, scale", [("bf16", torch.bfloat16, 1.0), ("fp16", torch.float16, 2.0**16)])
def test_low_precision_is_autocast_to_it_and_a_scaled_loss(precision, dtype, scale, clip_grad, place, tmp_path):
    """What a block gives has the type, weights keep float32, and the scale of fp16's loss is gone before the norm."""
    given = PLAIN | dict(clip_grad=clip_grad)
    words, plain, o = prepared("mae", given, place, "--precision", precision, "--out", tmp_path)
    seen, init = [], mae.MAE.__init__

    def watched(self, *arguments):
        init(self, *arguments)
        self.encoder.blocks[0].mlp.fc1.register_forward_hook(lambda _, __, out: seen.append(out.dtype))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mae.MAE, "__init__", watched)
        train_here(words)
    assert set(seen[:9]) == {dtype}
    saved = files.load(tmp_path / "checkpoint.pt")
    assert all(w.dtype == torch.float32 for n, w in saved["method"].items())
    assert saved["scaler"].get("scale", 1.0) == scale  # bf16 needs none
    start, end = copy.deepcopy(plain.state_dict()), plain.state_dict()  # the latter is what the loop changes
    _, losses = plain_loop(plain, o, dtype=dtype, loss_scale=scale)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()[1:]]
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=5e-3)
    far, way = (sum((x[n] - end[n]).square().sum() for n in end).sqrt() for x in (saved["method"], start))
    assert far < 0.015 * way  # seen over thirty seeds: .0036; without clipping .08, clipped by the scaled norm .8


def test_epochs_end_and_are_saved_when_they_should(place, tmp_path, monkeypatch, capsys):
    """Three of two steps: `end_epoch` follows the first two, and what it tells is said; every second is saved."""
    ended, saved, save = [], [], train.Run.save

    def told():  # in the precision of the steps
        return f"told, autocast: {torch.is_autocast_enabled('cpu')}"

    monkeypatch.setattr(mae.MAE, "end_epoch", lambda self, *words: ended.append(words) or told(), False)
    monkeypatch.setattr(train.Run, "save", lambda self, step: (saved.append(step), save(self, step)))
    words = f"--method mae --data {place}/photos {TINY} {KNOBS['mae']} --epochs 3 --batch-size 13 --save-every 2"
    words += " --no-evaluate --precision bf16 --out"
    train_here([*words.split(), str(tmp_path / "run")])
    assert [(done, of, len(images)) for done, of, images in ended] == [(1, 3, 26), (2, 3, 26)]
    assert capsys.readouterr().err.count("told, autocast: True") == 2 and saved == [4, 6]
    train_here([*words.split(), str(tmp_path / "shorter"), "--max-steps", "3"])
    assert [(done, of) for done, of, _ in ended[2:]] == [(1, 1.5)] and saved[2:] == [3]
    args, *_ = train.options([*words.split(), "elsewhere", "--max-steps", "99"])
    assert train.Plan(args, 26).steps == 6  # never more than the epochs have


@pytest.mark.parametrize("told", [True, False])
def test_options_that_change_no_number_arrive(told, place, tmp_path, monkeypatch):
    """How many workers read, whether the method is compiled, and whether a GPU has to repeat itself."""
    workers, compiled, deterministic = [], [], []
    batches = train.image_sets.ImageSet.batches

    def watched(images, orders, device="cpu", **how):
        workers.append(how["workers"])
        return batches(images, orders, device, **how)

    monkeypatch.setattr(train.image_sets.ImageSet, "batches", watched)
    monkeypatch.setattr(torch, "compile", lambda network, **how: compiled.append(network) or network)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", deterministic.append)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    words = f"--method mae --data {place}/photos {TINY} {KNOBS['mae']} --max-steps 1 --batch-size 13 --no-evaluate"
    words += " --compile --workers 3 --deterministic" if told else " --no-compile"
    train_here([*words.split(), "--precision", "fp32", "--out", str(tmp_path / "run")])
    assert workers == [3 if told else None, 0]  # of training, and of the pictures
    assert len(compiled) == told and deterministic == [True] * told


def test_pictures_are_of_the_validation_images_and_drawn_by_the_seed(place, tmp_path, monkeypatch):
    asked, pictures = [], train.Pictures
    monkeypatch.setattr(train, "Pictures", lambda *words: asked.append(words) or pictures(*words))
    words = f"--method mae --data {place}/photos {TINY} {KNOBS['mae']} --max-steps 1 --batch-size 13 --no-evaluate"
    train_here([*words.split(), *"--seed 7 --precision fp32 --out".split(), str(tmp_path / "run")])
    ((images, _, seed, *_),) = asked
    assert len(images) == 20 and seed == 7  # of training 26


def test_the_summary_is_of_the_run_s_encoder_and_of_one_at_the_first_weights_of_its_seed(
    place, tmp_path, monkeypatch, capsys
):
    measured = []

    def evaluate(encoder, train_set, val_set, protocols, device):
        measured.append((encoder.training, encoder.state_dict()))
        return dict(knn=dict(top1=1.0), linear=dict(top1=2.0))

    monkeypatch.setattr(train, "evaluate", evaluate)
    words = (
        f"--method mae --data {place}/photos {TINY} {KNOBS['mae']} --max-steps 3 --batch-size 13 --seed 3 --evaluate"
    )
    train_here([*words.split(), *"--precision fp32 --log-every 1 --out".split(), str(tmp_path / "run")])
    rows = [json.loads(line) for line in open(tmp_path / "run/log.jsonl")]
    assert f"loss      {rows[1]['loss']:.4f} -> {rows[3]['loss']:.4f}\n" in capsys.readouterr().err
    saved = files.load(tmp_path / "run/encoder.safetensors")
    torch.manual_seed(3)
    expected = ViT(**saved["settings"]).state_dict(), saved["state_dict"]
    for (training, found), weights in zip(measured, expected, strict=True):
        assert not training
        for name, value in weights.items():
            assert torch.equal(found[name], value), name
