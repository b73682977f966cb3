"""What is measured while a method trains: that it is right, and that the training does not notice."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from forked_programs import Program, finish
from PIL import Image
from test_train import assert_same_bits, environment, own  # noqa: F401  (a fixture)

import train
from common import StepRandom
from downstream import online_probe
from downstream.protocols import evaluate
from inputs import image_sets
from methods import METHODS
from runtime import files
from runtime.encoder_files import load_encoder
from runtime.errors import InputError

SMALL = (
    "--image-size 32 --patch-size 8 --width 16 --depth 2 --heads 2 --drop-path 0.5 --batch-size 8 --epochs 3 --lr 2e-3 "
    "--warmup-epochs 0 --precision fp32 --device cpu --log-every 100 --save-every 2 --no-evaluate --data"
).split()


@pytest.fixture(scope="module")
def photos(tmp_path_factory, environment):  # noqa: F811
    """24 + 12 noisy images of three classes that differ by their colour: an epoch of three steps."""
    root, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, n in (("train", 8), ("val", 4)):
        for channel, name in enumerate(("red", "green", "blue")):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = draw.integers(0, 200, (32, 32, 3), dtype=np.uint8)
                pixels[:, :, channel] += 40
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINMIM_CACHE", environment["MINMIM_CACHE"])
        yield root


def words(method: str, data: Path, out: Path, *more) -> list[str]:
    return list(map(str, ["--method", method, *SMALL, data, "--out", out, *own(method, *more)]))


def train_here(method: str, data: Path, out: Path, *more) -> list[dict]:
    """The lines of the log."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *words(method, data, out, *more)])
        train.main()
    return rows(out)


def interrupted(method: str, *arguments) -> None:
    """`train_here` up to step 8, the second of the third epoch; steps 7 and 8 come after the checkpoint."""
    draw, drawn = METHODS[method].draw, []

    def stopping(self, *arguments):
        drawn.append(arguments)
        if len(drawn) == 10:  # the first draw is that of the picture
            raise KeyboardInterrupt
        return draw(self, *arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(METHODS[method], "draw", stopping)
        train_here(method, *arguments)


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()[1:]]


def weights(out: Path) -> dict:
    saved = files.load(out / "checkpoint.pt")
    return {part: saved[part] for part in ("step", "method", "optimizer")}


@pytest.fixture
def fewer(monkeypatch):
    """Probes of five images of either half."""
    monkeypatch.setattr(online_probe, "LEAST", 5)


@pytest.mark.parametrize("method", ["mae", "cmae", "conmim"])
def test_training_does_not_notice_a_probe(method, photos, tmp_path, fewer):
    """Nor when it is interrupted and goes on. Half of the paths are dropped: in evaluation none would be, and there
    the picture of the second epoch is the first to leave it.
    """
    train_here(method, photos, tmp_path / "plain")
    log = train_here(method, photos, tmp_path / "probed", "--probe-every", 1)
    assert [(row["step"], "knn" in row) for row in log] == [(1, False), (3, True), (6, True), (9, True)]
    assert_same_bits(weights(tmp_path / "probed"), weights(tmp_path / "plain"))
    interrupted(method, photos, tmp_path / "parts", "--probe-every", 1)
    assert weights(tmp_path / "parts")["step"] == 6
    again = train_here(method, photos, tmp_path / "parts", "--probe-every", 3)
    assert_same_bits(weights(tmp_path / "parts"), weights(tmp_path / "plain"))
    assert [(row["step"], row.get("knn")) for row in again] == [(row["step"], row.get("knn")) for row in log]
    images = again[-1]["images_per_second"] * again[-1]["seconds"]
    assert images == pytest.approx(3 * 8, rel=0.2)  # of the three steps since it went on


def test_a_probe_is_knn_of_the_encoder_on_images_of_all_classes(photos, tmp_path, fewer, monkeypatch, capsys):
    seen = []

    def spy(encoder, *sets, **how):
        assert how["precision"] == "fp32"  # the run's
        seen.append([s.images(torch.arange(len(s))) for s in sets] + [s.labels.tolist() for s in sets])
        return evaluate(encoder, *sets, **how)

    monkeypatch.setattr(online_probe, "evaluate", lambda e, a, b, protocols, device, **how: spy(
        e, a, b, protocols=protocols, device=device, **how))  # fmt: skip
    log = train_here("mae", photos, tmp_path, "--probe-every", 2, "--epochs", 5)
    assert [row["step"] for row in log if "knn" in row] == [6, 12, 15]  # and where the run ends
    train_set, val_set = (image_sets.open_set(str(photos), split=split) for split in ("train", "val"))
    places = [0, 5, 11, 17, 23], [0, 2, 5, 8, 11]
    for one in seen:
        for found, whole, place in zip(one[:2], (train_set, val_set), places, strict=True):
            assert torch.equal(found, whole.images(torch.tensor(place)))
        assert one[2:] == [[0, 0, 1, 2, 2], [0, 0, 1, 2, 2]]
    encoder = load_encoder(tmp_path, torch.device("cpu"))
    few = [s.spaced(5) for s in (train_set, val_set)]
    expected = evaluate(encoder, *few, ["knn"], "cpu", batch_size=64, precision="fp32")["knn"]
    assert log[-1]["knn"] == expected["top1"] and expected["n"] == 5
    assert f"kNN {log[-1]['knn']:.1f} %, " in capsys.readouterr().err


def test_a_probe_takes_a_twenty_fifth_of_either_half_within_its_bounds(monkeypatch):
    class Fake:
        labels = None

        def __init__(self, n):
            self.n = n

        def __len__(self):
            return self.n

        def spaced(self, n):
            return Fake(min(n, self.n))

        def to(self, device):
            return self

    for halves, taken in (((8_000, 2_000), [320, 300]), ((200, 30), [200, 30]), ((1_000_000, 50_000), [10_000, 2_000])):
        whole = dict(zip(("train", "val"), halves, strict=True))
        monkeypatch.setattr(image_sets, "open_for", lambda args, split, n=whole: Fake(n[split]))
        args, config, Method = train.options("--method mae --probe-every 1 --device cpu".split())
        found = online_probe.Watch(args, train.build(args, config, Method, torch.device("cpu"))[0], torch.device("cpu"))
        assert [*map(len, found.sets)] == taken


def gradients(method: torch.nn.Module, losses: torch.Tensor) -> torch.Tensor:
    weights = [p for p in method.encoder.parameters() if p.requires_grad]
    found = torch.autograd.grad(losses, weights, retain_graph=True, allow_unused=True)
    return torch.cat(
        [torch.zeros(w.numel()) if g is None else g.flatten() for w, g in zip(weights, found, strict=True)]
    )


@pytest.mark.training
@pytest.mark.parametrize("method", ["cmae", "conmim", "dvae"])
def test_gradients_are_those_that_the_encoder_learns_from(method, photos, tmp_path, monkeypatch):
    """Of each loss, and under drop path: the total's are the step's own, in two parts."""
    seen, AdamW = [], torch.optim.AdamW

    class Spy(AdamW):
        def step(self):
            own = [p.grad for p in learned[-1].encoder.parameters() if p.grad is not None]
            seen.append(torch.cat([g.flatten() for g in own]).norm().item())
            return super().step()

    def building(*arguments):
        built = build(*arguments)
        learned.append(built[0])
        return built

    learned, build = [], train.build
    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    monkeypatch.setattr(train, "build", building)
    log = train_here(
        method, photos, tmp_path, "--log-gradients", 3, "--accumulate", 2, "--log-every", 1, "--clip-grad", 0
    )
    assert [row["step"] for row in log if "gradient_loss" in row] == [3, 6, 9]
    for row in log[2::3]:
        assert row["gradient_loss"] == pytest.approx(seen[row["step"] - 1], rel=1e-4)
    parts = {name for name in log[2] if name.startswith("gradient_")}
    assert parts == {"cmae": {"gradient_loss", "gradient_reconstruction", "gradient_contrast"}}.get(method, parts)
    assert all(name.removeprefix("gradient_") in log[2] for name in parts)


@pytest.mark.training
def test_each_loss_has_its_own_gradient_in_float32(photos, tmp_path):
    """CMAE's first step, whose weights and draws are those of the seed; whatever the precision of the run."""
    for precision in ("fp32", "bf16"):
        flags = ["--log-gradients", 1, "--max-steps", 1, "--precision", precision, "--drop-path", 0]
        (row,) = train_here("cmae", photos, tmp_path / precision, *flags)
        args, config, Method = train.options(words("cmae", photos, tmp_path, *flags))
        method = train.build(args, config, Method, torch.device("cpu"))[0]
        images = image_sets.open_set(str(photos))
        index = next(train.Plan(args, len(images)).indices(0))
        losses = method(method.draw(images.images(index), index, StepRandom(0, 0, 8)))
        assert len(losses) == 3
        for name, loss in losses.items():
            expected = gradients(method, loss).norm().item()
            assert row[f"gradient_{name}"] == pytest.approx(expected, rel=1e-4) and expected > 0


@pytest.mark.parametrize("method", ["mae", "conmim"])
def test_training_does_not_notice_that_gradients_are_logged(method, photos, tmp_path):
    train_here(method, photos, tmp_path / "plain")
    log = train_here(method, photos, tmp_path / "logged", "--log-gradients", 2)
    assert [row["step"] for row in log if "gradient_loss" in row] == [2, 4, 6, 8]
    assert_same_bits(weights(tmp_path / "logged"), weights(tmp_path / "plain"))


def test_gradients_that_are_none_are_refused_in_one_line(photos, tmp_path):
    with pytest.raises(InputError, match="--log-gradients 5: the encoder that conmim keeps so learns by no gradient;"):
        train_here("conmim", photos, tmp_path / "run", "--keep-slow", "--log-gradients", 5)
    assert not (tmp_path / "run").exists()


def test_tensorboard_shows_the_log_and_the_pictures_each_step_once(photos, tmp_path, fewer):
    """Also where a run was killed after its checkpoint, or starts over in its directory."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def written(purge: bool = True):
        found = events.EventAccumulator(str(tmp_path), dict(scalars=0, images=0), purge_orphaned_data=purge)
        return found.Reload()

    flags = ["--tensorboard", "--log-every", 1, "--probe-every", 2]
    interrupted("cmae", photos, tmp_path, *flags)
    log = train_here("cmae", photos, tmp_path, *flags)
    assert [e.step for e in written(False).Scalars("loss")] == [1, 2, 3, 4, 5, 6, 7, 8, 7, 8, 9]
    for seed in (0, 1):
        if seed:
            log = train_here("cmae", photos, tmp_path, *flags, "--resume", "never", "--seed", seed)
        found = written()
        assert set(found.Tags()["scalars"]) == set().union(*log) - {"step"} > {"loss", "contrast", "lr", "knn"}
        for name in found.Tags()["scalars"]:
            there = {row["step"]: row[name] for row in log if name in row}
            shown = found.Scalars(name)
            assert [event.step for event in shown] == list(there), name
            assert [event.value for event in shown] == pytest.approx(list(there.values()), rel=1e-6)
        pictures = found.Images("reconstruction")
        assert [event.step for event in pictures] == [6, 9]
        last = np.array(Image.open(io.BytesIO(pictures[-1].encoded_image_string)))
        shown = np.array(Image.open(tmp_path / "reconstruction.png"))[::4, ::4]  # rounded, where TensorBoard cuts off
        np.testing.assert_allclose(last, shown.astype(int), atol=1)
        files = set(tmp_path.glob("events*"))
        train_here("cmae", photos, tmp_path, *flags, "--seed", seed)  # finished, it writes nothing more
        assert set(tmp_path.glob("events*")) == files


def test_without_tensorboard_it_is_one_line(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'^--tensorboard: not installed; pip install "\.\[tensorboard\]"$'):
        train_here("mae", photos, tmp_path / "run", "--tensorboard")
    assert not (tmp_path / "run").exists()


@pytest.mark.training
@pytest.mark.slow
def test_two_processes_probe_together_and_do_not_notice(photos, tmp_path, environment):  # noqa: F811
    flags = ["--drop-path", 0, "--log-gradients", 1]
    one = train_here("cmae", photos, tmp_path / "one", *flags)
    flags += ["--probe-every", 1, "--tensorboard"]
    for out, more in (("plain", ["--drop-path", 0]), ("probed", flags)):
        two = Program("train.py", *words("cmae", photos, tmp_path / out, *more), n=2, env=environment, cwd=tmp_path)
        assert finish(two).returncode == 0, two.stderr
    assert_same_bits(weights(tmp_path / "probed"), weights(tmp_path / "plain"))
    assert [row["step"] for row in rows(tmp_path / "probed") if "knn" in row] == [3, 6, 9]
    assert len(list((tmp_path / "probed").glob("events*"))) == 1
    for name in ("gradient_loss", "gradient_contrast"):
        both = zip(one, rows(tmp_path / "probed"), strict=True)
        assert all(a[name] == pytest.approx(b[name], rel=1e-3) for a, b in both)


def test_a_probe_that_cannot_be_is_one_line_before_anything_is_done(photos, tmp_path):
    for method, data, more, said in (
        ("dvae", photos, ["--probe-every", 3], "--probe-every 3: dvae learns no ViT; leave it out"),
        (
            "mae",
            photos / "train" / "red",
            ["--probe-every", 1, "--batch-size", 4],
            "red: its images have no labels",
        ),
        ("mae", photos, ["--probe-every", 0], "--probe-every: 0: must be at least 1"),
    ):
        with pytest.raises(InputError, match=said) as error:
            train_here(method, data, tmp_path / "run", *more)
        assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
