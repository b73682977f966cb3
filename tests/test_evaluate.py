"""kNN and the linear probe against loops and optimality conditions; extraction over ranks; the command."""

import contextlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import common
import evaluate
from common import ViT
from inputs import augment
from runtime import process, weights
from runtime.errors import InputError

ROOT = Path(evaluate.__file__).parent


def small_vit(**settings) -> ViT:
    torch.manual_seed(0)
    return ViT(**dict(image_size=16, patch_size=8, width=8, depth=2, heads=2) | settings)


class FakeSet:
    """What `extract` asks of a data.ImageSet: n random images, some of which may not decode."""

    name, classes = "fake", ["a", "b", "c"]

    def __init__(self, n: int, bad=()):
        generator = torch.Generator().manual_seed(n)
        self.pixels = torch.randint(0, 256, (n, 3, 16, 16), generator=generator, dtype=torch.uint8)
        self.labels = torch.randint(0, 3, (n,), generator=generator)
        self.bad = bad

    def __len__(self):
        return len(self.labels)

    def batches(self, orders, device):
        for order in orders:
            order = torch.tensor([self.following(int(i)) for i in order])
            yield self.pixels[order], order

    def following(self, i: int) -> int:
        """The image itself, or the next one that decodes, around the end: what data.ImageSet puts in its place."""
        return self.following((i + 1) % len(self)) if i in self.bad else i


# ---------------------------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("features", ["mean", "cls"])
def test_a_feature_is_the_patch_mean_or_class_token_after_the_final_norm(features):
    encoder, images = small_vit(), FakeSet(5)
    torch.nn.init.uniform_(encoder.norm.weight, 0.5, 2.0)
    x, labels = evaluate.extract(encoder, images, "cpu", batch_size=2, features=features)
    for i in range(5):
        pixels = images.pixels[i].float() / 255
        for channel in range(3):
            pixels[channel] = (pixels[channel] - common.MEAN[channel]) / common.STD[channel]
        tokens = encoder.norm(encoder(pixels[None], norm=False))[0]
        expected = tokens[0] if features == "cls" else sum(tokens[1:]) / 4
        torch.testing.assert_close(x[i], expected.detach(), rtol=1e-5, atol=1e-5)
    assert labels.tolist() == images.labels.tolist() and not x.requires_grad


def test_bf16_works_on_the_encoder_and_ends_in_float32():
    exact, rounded = (evaluate.extract(small_vit(), FakeSet(4), "cpu", precision=p)[0] for p in ("auto", "bf16"))
    assert rounded.dtype == torch.float32 and not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, rtol=0, atol=0.05)


def test_extraction_switches_drop_path_off_and_leaves_the_mode_as_it_was():
    encoder = small_vit(drop_path=0.5).train()
    once, again = (evaluate.extract(encoder, FakeSet(6), "cpu")[0] for _ in range(2))
    assert torch.equal(once, again) and encoder.training


def test_larger_images_and_images_of_many_sizes_are_resized():
    class Mixed(FakeSet):
        def batches(self, orders, device):
            for order in orders:
                yield [torch.full((3, 20 + int(i), 24), 10 * int(i), dtype=torch.uint8) for i in order], order

    x, _ = evaluate.extract(small_vit(), Mixed(4), "cpu", batch_size=3)
    flat = torch.stack([torch.full((3, 16, 16), 10 * i / 255) for i in range(4)])
    expected = small_vit()(augment.normalize(flat))[:, 1:].mean(dim=1)
    torch.testing.assert_close(x, expected.detach(), rtol=1e-4, atol=1e-4)


def test_images_that_are_skipped_take_their_labels_with_them():
    whole, labels = evaluate.extract(small_vit(), FakeSet(7), "cpu")
    x, y = evaluate.extract(small_vit(), FakeSet(7, bad=[0, 4, 5]), "cpu", batch_size=2)
    kept = [1, 2, 3, 6]
    torch.testing.assert_close(x, whole[kept])
    assert y.tolist() == labels[kept].tolist()


def test_features_that_say_nothing_are_refused():
    encoder = small_vit()
    encoder.norm.bias.data[0] = math.nan
    with pytest.raises(InputError, match="not finite"):
        evaluate.extract(encoder, FakeSet(3), "cpu")


SHARED = [(1, ()), (4, ()), (5, ()), (7, (3, 6)), (9, (0, 1, 2))]  # images of a set, and those that do not decode


def _extract_as_one_of(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=ranks)
    found = [evaluate.extract(small_vit(), FakeSet(n, bad), "cpu", batch_size=2) for n, bad in SHARED]
    torch.save(found, f"{folder}/{rank}.pt")
    process.stop()


def test_every_image_counts_once_on_every_rank_whatever_their_number(tmp_path):
    """Three gloo processes: with 4 images the last has none, with 9 the first has but bad ones."""
    torch.multiprocessing.spawn(_extract_as_one_of, (3, str(tmp_path)), nprocs=3)
    for (n, bad), *found in zip(SHARED, *(torch.load(tmp_path / f"{r}.pt") for r in range(3)), strict=True):
        x, y = evaluate.extract(small_vit(), FakeSet(n, bad), "cpu")
        assert len(x) == n - len(bad)
        for features, labels in found:
            torch.testing.assert_close(features, x, rtol=1e-5, atol=1e-6)
            assert torch.equal(labels, y)


# --------------------------------------------------------------------------------------------------------------- kNN


def naive_knn(bank, bank_labels, queries, labels, classes, k, tau) -> tuple[float, float]:
    hits = np.zeros(2)
    for query, label in zip(queries, labels, strict=True):
        cosines = [x @ query / np.sqrt((x @ x) * (query @ query)) for x in bank]
        votes = [0.0] * classes
        for i in sorted(range(len(bank)), key=lambda i: -cosines[i])[:k]:
            votes[bank_labels[i]] += math.exp(cosines[i] / tau)
        guesses = sorted(range(classes), key=lambda c: (-votes[c], c))
        hits += label == guesses[0], label in guesses[: min(5, classes)]
    return tuple(100 * hits / len(queries))


@given(
    seed=st.integers(0, 2**32), n=st.integers(1, 40), queries=st.integers(1, 8), classes=st.integers(1, 8),
    width=st.integers(2, 6), k=st.integers(1, 25), tau=st.floats(0.03, 2), chunk=st.sampled_from([1, 60, 2**26]),
)  # fmt: skip
def test_knn_is_the_naive_vote(seed, n, queries, classes, width, k, tau, chunk):
    draw = np.random.default_rng(seed)
    bank, x = (draw.normal(size=(m, width)).astype(np.float32) * draw.uniform(0.1, 9, (m, 1)) for m in (n, queries))
    bank_labels, labels = (draw.integers(0, classes, m) for m in (n, queries))
    expected = naive_knn(bank.astype(np.float64), bank_labels, x.astype(np.float64), labels, classes, k, tau)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "SIMILARITIES", chunk)
        tensors = [torch.from_numpy(a) for a in (bank.astype(np.float32), bank_labels, x.astype(np.float32), labels)]
        found = evaluate.knn(*tensors, classes, k, tau)
    assert (found["top1"], found["top5"]) == pytest.approx(expected) and found["n"] == queries


def test_a_low_temperature_does_not_overflow():
    bank = torch.tensor([[1.0, 0.0], [1.0, 0.1]])
    found = evaluate.knn(bank, torch.tensor([0, 1]), torch.tensor([[1.0, 0.08]]), torch.tensor([1]), 2, tau=1e-3)
    assert found["top1"] == 100  # exp(1 / τ) is infinite in any float, and two infinite votes would tie


@pytest.mark.parametrize("wrong", [dict(k=0), dict(tau=0.0)])
def test_knn_without_neighbours_or_temperature_is_refused(wrong):
    with pytest.raises(InputError, match="neighbour"):
        evaluate.knn(torch.ones(2, 2), torch.zeros(2).long(), torch.ones(1, 2), torch.zeros(1).long(), 2, **wrong)


def test_a_score_that_is_not_a_number_wins_nothing():
    scores = torch.tensor([[math.nan] * 6, [0.0, 1, 2, 3, 4, 5]])
    found = evaluate.accuracy(scores, torch.tensor([0, 5]))
    assert (found["top1"], found["top5"]) == (50, 50)


# ------------------------------------------------------------------------------------------------------ linear probe


def blobs(n: int, classes: int, spread: float, seed: int = 0, width: int = 8):
    """Gaussian blobs around fixed corners."""
    draw = np.random.default_rng(seed)
    corners = np.random.default_rng(99).normal(size=(classes, width))
    labels = draw.integers(0, classes, n)
    x = corners[labels] + spread * draw.normal(size=(n, width))
    return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(labels)


@pytest.mark.parametrize("n", [200, 70_000])  # one piece and two
@pytest.mark.parametrize("penalty", [1e-1, 1e-3])
def test_the_gradient_of_the_penalised_objective_vanishes_at_the_fit(n, penalty):
    x, y = blobs(n, 4, spread=1.0)
    weights = evaluate.fit(x, y, 4, penalty)
    x, w = x.double().numpy(), weights.double().numpy()
    scores = x @ w[1:] + w[0]
    share = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True) - np.eye(4)[y.numpy()]  # softmax - one-hot
    np.testing.assert_allclose(x.T @ share / n + penalty * w[1:], 0, atol=1e-4)
    np.testing.assert_allclose(share.mean(axis=0), 0, atol=1e-4)


@pytest.mark.training
def test_separable_classes_are_all_told_apart_and_random_labels_are_guessed_by_chance():
    train, val = blobs(1000, 10, 0.1, seed=1), blobs(2000, 10, 0.1, seed=2)
    assert evaluate.linear_probe(*train, *val, 10)["top1"] == 100
    noise = torch.from_numpy(np.random.default_rng(3).integers(0, 10, 3000))
    found = evaluate.linear_probe(train[0], noise[:1000], val[0], noise[1000:], 10)
    assert abs(found["top1"] - 10) < 3 and abs(found["top5"] - 50) < 5


@pytest.mark.training
def test_the_probe_does_not_see_units_and_repeats_itself_exactly():
    train, val = blobs(400, 5, 1.5, seed=1), blobs(300, 5, 1.5, seed=2)
    found = evaluate.linear_probe(*train, *val, 5)
    assert found == evaluate.linear_probe(*train, *val, 5)
    scale, shift = torch.logspace(-2, 2, 8), torch.linspace(-50, 50, 8)
    moved = evaluate.linear_probe(train[0] * scale + shift, train[1], val[0] * scale + shift, val[1], 5)
    assert moved["top1"] == pytest.approx(found["top1"], abs=0.7) and moved["penalty"] == found["penalty"]


@pytest.mark.training
def test_a_feature_that_never_varies_does_no_harm():
    train, val = blobs(400, 5, 0.3, seed=1), blobs(300, 5, 0.3, seed=2)
    flat = [torch.cat([x, torch.full((len(x), 1), 3.0)], dim=1) for x in (train[0], val[0])]
    found = evaluate.linear_probe(flat[0], train[1], flat[1], val[1], 5)
    assert found["top1"] == pytest.approx(evaluate.linear_probe(*train, *val, 5)["top1"], abs=0.7)


@pytest.mark.training
def test_the_penalty_is_chosen_on_a_tenth_of_training_and_the_fit_repeated_on_all(monkeypatch):
    train, val = blobs(120, 4, 3.0, seed=1, width=40), blobs(200, 4, 3.0, seed=2, width=40)
    x = (train[0] - train[0].mean(dim=0)) / train[0].std(dim=0, correction=0)
    held, losses = evaluate.held_out(train[1]), {}
    for penalty in evaluate.PENALTIES:
        w = evaluate.fit(x[~held], train[1][~held], 4, penalty)
        shares = (x[held] @ w[1:] + w[0]).softmax(dim=1)
        losses[penalty] = -sum(math.log(p[label]) for p, label in zip(shares, train[1][held], strict=True))
    best = min(losses, key=losses.get)
    assert best not in (evaluate.PENALTIES[0], evaluate.PENALTIES[-1])  # or there were no choice to test
    rows, fit = [], evaluate.fit
    monkeypatch.setattr(evaluate, "fit", lambda x, *others: rows.append(len(x)) or fit(x, *others))
    found = evaluate.linear_probe(*train, *val, 4)
    assert found["penalty"] == best
    assert rows == [int((~held).sum())] * len(evaluate.PENALTIES) + [120]
    assert evaluate.linear_probe(*train, val[0], 3 - val[1], 4)["penalty"] == found["penalty"]  # blind to validation


@given(st.lists(st.integers(0, 4), min_size=1, max_size=200))
def test_a_tenth_of_each_class_is_held_out(labels):
    held = evaluate.held_out(torch.tensor(labels)).tolist()
    seen = [0] * 5
    for label, out in zip(labels, held, strict=True):
        assert out == (seen[label] % 10 == 0 and labels.count(label) > 1)
        seen[label] += 1


@settings(max_examples=5)
@given(classes=st.integers(1, 4), seed=st.integers(0, 99))
def test_with_fewer_than_five_classes_top5_is_full(classes, seed):
    train, val = blobs(30, classes, 2.0, seed), blobs(20, classes, 2.0, seed + 1)
    for protocol in (evaluate.knn, evaluate.linear_probe):
        assert protocol(*train, *val, classes)["top5"] == 100


# ----------------------------------------------------------------------------------------------------------- command


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


IDLE = {
    "--k: does nothing to protocol linear without --paper": "linear --k 5",
    "--epochs: does nothing to protocol linear without --paper": "linear --epochs 5",
    "--epochs: does nothing to protocol knn": "knn --epochs 5",
    "--paper: does nothing to protocol finetune": "finetune --paper",
    "--blocks: does nothing to protocol finetune": "finetune --blocks 1",
    "--features: does nothing to protocol attentive": "attentive --features cls",
    "--untrained: does nothing to protocol supervised": "supervised --untrained",
    "--blocks 3: the encoder has 2; give 0": "partial --blocks 3",
    "--epochs 0: must be at least 1": "finetune --epochs 0",
    "--seeds 0: must be at least 1": "finetune --seeds 0",
    "--batch-size 0: must be at least 1": "knn --batch-size 0",
    "--features 'max': unknown; choose one of mean, cls": "knn --features max",
    "recipe 'deit': unknown; choose one of mae": "finetune --recipe deit",
    "batch size 512: larger than the 11 images": "finetune",
    "invalid choice: 'knnn'": "knnn",
}


@pytest.mark.parametrize("words", IDLE)
def test_what_does_nothing_or_cannot_be_is_refused_in_one_line(run, monkeypatch, words):
    with pytest.raises(InputError, match=words) as error:
        call(monkeypatch, "--run", run, "--protocol", *IDLE[words].split())
    assert "\n" not in str(error.value)
    assert sorted(os.listdir(run)) == ["config.json", "encoder.pt"]


def test_every_option_arrives(run, monkeypatch):
    found = {}
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **options: found.update(options) or {"knn": {}})
    options = dict(features="cls", batch_size=3, precision="bf16", k=7, tau=0.2)
    words = [word for name, value in options.items() for word in ("--" + name.replace("_", "-"), value)]
    call(monkeypatch, "--run", run, "--protocol", "knn", *words)
    assert found == options | dict(directory=run / "knn")


def test_flags_go_before_the_runs_settings(run, monkeypatch, capsys):
    call(monkeypatch, "--run", run / "encoder.pt", "--protocol", "knn", "--classes", 1, "--tau", 0.5)
    found = json.loads(capsys.readouterr().out)
    assert (found["n"], found["classes"], found["tau"]) == (4, 1, 0.5)  # the 4 of class a


def test_untrained_is_the_same_architecture_at_weights_of_the_runs_seed(run, monkeypatch, capsys):
    used = []
    monkeypatch.setattr(evaluate, "evaluate", lambda encoder, *_, **__: used.append(encoder) or {"knn": {}})
    for words in ((), ("--untrained",), ("--untrained",)):
        call(monkeypatch, "--run", run, "--protocol", "knn", *words)
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
    "give an encoder.pt": lambda run: torch.save({"settings": {}, "state_dict": {}}, run / "encoder.pt"),
    "encoder.pt that train.py": lambda run: torch.save(["settings"], run / "encoder.pt"),
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
        weights.load_encoder(run)
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
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--")
    done = shell(*torchrun, "evaluate.py", "--run", run, "--protocol", "linear", "--device", "cpu")
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
