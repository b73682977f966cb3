"""What a run shows while it trains, on made-up steps: the lines of the log, the bar, the pictures."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from common import StepRandom
from runtime import log
from runtime.errors import InputError
from runtime.log import Log, Meter, Pictures

CPU = torch.device("cpu")


def losses(value: float) -> dict[str, torch.Tensor]:
    return dict(loss=torch.tensor(value), part=torch.tensor(value / 2))


def rows(place) -> list[dict]:
    return [json.loads(line) for line in (place / "log.jsonl").read_text().splitlines()[1:]]


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless it is set."""
    now = [100.0]
    monkeypatch.setattr(log, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def test_a_line_counts_images_and_seconds_since_the_last_and_epochs_in_parts(tmp_path, clock):
    """A run that goes on after step 20 of 48, of 16 images each, eight steps an epoch. The last has a line too."""
    meter = Meter(SimpleNamespace(batch_size=16, log_every=10), 20, 48, 8, Log(tmp_path / "log.jsonl", {}, 0), CPU)
    assert meter.bar.n == 20 and meter.bar.total == 48
    for step in range(21, 49):
        clock[0] += 0.5 if step <= 30 else 0.25
        meter.update(step, losses(1 / step), 0.1, {})
    assert [row["step"] for row in rows(tmp_path)] == [30, 40, 48]
    assert [row["images_per_second"] for row in rows(tmp_path)] == [32, 64, 64]
    assert [row["seconds"] for row in rows(tmp_path)] == [5, 7.5, 9.5]
    assert [row["epoch"] for row in rows(tmp_path)] == [3.75, 5, 6]
    assert rows(tmp_path)[0]["part"] == pytest.approx(1 / 60) and meter.bar.n == 48


def test_the_first_and_the_last_loss_are_kept_also_of_a_run_that_goes_on(tmp_path):
    one = Log(tmp_path / "log.jsonl", {}, 0)
    for step in (1, 2, 3, 4):
        one.write(dict(step=step, loss=step / 10))
    assert one.losses == [0.1, 0.4]
    again = Log(tmp_path / "log.jsonl", {}, 3)
    assert again.losses == [0.1, 0.3]  # what comes after step 3 is done again
    again.write(dict(step=4, loss=0.5))
    assert again.losses == [0.1, 0.5]


def test_of_several_losses_that_are_not_finite_the_first_is_named(tmp_path):
    meter = Meter(SimpleNamespace(batch_size=16, log_every=10), 0, 50, 8, Log(tmp_path / "log.jsonl", {}, 0), CPU)
    with pytest.raises(InputError, match=r"^loss: not finite at step 4;"):
        for step in range(1, 11):
            meter.update(step, losses(math.nan if step in (4, 7) else 1.0), 0.1, {})
    assert [row["step"] for row in rows(tmp_path)] == [1]


class Painter(torch.nn.Module):
    """Notes what it is given to draw, and in which mode it paints."""

    def __init__(self, paints: bool):
        super().__init__()
        self.paints, self.drawn, self.modes = paints, [], []

    def draw(self, images, index, rng):
        self.drawn.append((images, index, rng.uniform(3)))

    def picture(self, batch):
        self.modes.append(self.training)
        return torch.rand(2, 8, 3, 4, 64) if self.paints else None


@pytest.mark.parametrize("paints", [True, False])
def test_pictures_are_of_images_from_all_over_a_set_that_have_no_place_in_training(tmp_path, paints):
    class Set:
        def __len__(self):
            return 15

        def images(self, index, device):
            return index

    painter = Painter(paints).train()
    pictures = Pictures(Set(), painter, 3, (4, 64), CPU)
    ((images, index, draws),) = painter.drawn
    assert images.tolist() == [0, 2, 4, 6, 8, 10, 12, 14] and index.tolist() == [-1] * 8
    assert torch.equal(draws, StepRandom(3, 2**40, 8).uniform(3))  # those of a step that no run comes to
    pictures.draw(SimpleNamespace(directory=tmp_path, step=1, log=SimpleNamespace(tensorboard=False)))
    assert painter.modes == [False] and painter.training
    assert (tmp_path / "reconstruction.png").exists() == paints
    if paints:  # twice as large, as its longer side has but 64 pixels
        assert Image.open(tmp_path / "reconstruction.png").size == (2 * (8 * 66 + 2), 2 * (2 * 6 + 2))
