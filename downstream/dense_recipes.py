"""How the papers fine-tune for segmentation and detection: the settings, and in dense_recipes.json the papers' by name.

Left out are what the papers add or take from their code: Cascade Mask R-CNN (CMAE's ‡, CAE's Table 5), relative
positions where pretraining had none (ConMIM, Tables 12 and 13), windowed attention (ConMIM §5.3).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from downstream.recipes import Below1, flag
from runtime.errors import InputError
from runtime.knobs import Count, Part, Positive, Share, Size, Weight, check


@dataclass(frozen=True)
class Recipe:
    """All that can be set; the defaults are ours, for small sets."""

    epochs: Size = 20  # passes over the images
    steps: Count = 0  # steps in place of passes; 0: as many as the passes take
    batch_size: Size = 16  # images a step, over all processes
    lr: Positive = 5e-4  # peak learning rate
    warmup: Share = 0.1  # share of the steps in which the rate grows from 0
    schedule: Literal["cosine", "linear"] = "cosine"  # of the rate to zero
    decay_at: tuple[int, ...] = ()  # after so many epochs a tenth of the rate, in place of a schedule
    weight_decay: Weight = 0.05  # not on vectors, biases and the class token
    layer_decay: Part = 1.0  # learning rate of a block, as a share of the next one's
    drop_path: Below1 = 0.0  # of the last block; grows from 0 linearly
    image_size: Count = 0  # side of the square; 0: the encoder's
    jitter: tuple[float, float] = (0.5, 2.0)  # of the scale, in training
    distort: bool = False  # brightness, contrast, saturation and hue, in training
    windows: bool = False  # fit the shorter side, not the longer one, into the square; test by windows that overlap
    head: Literal["fcn", "upernet"] = "fcn"  # of segmentation: fcn on the last map, or upernet on four
    pyramid: Literal["vitdet", "beit"] = "vitdet"  # of detection: vitdet (of the last map), or beit (of four depths)

    optimizer = "adamw"  # with betas .9 and .999, as ConMIM's
    peak = property(lambda self: self.lr)

    def __post_init__(self):
        check(self)
        if not 0 < self.jitter[0] <= self.jitter[1]:
            raise InputError("jitter {:g} {:g}: give a smallest and a largest positive scale".format(*self.jitter))
        if self.decay_at and not 0 < min(self.decay_at) <= max(self.decay_at) < self.epochs:
            given = " ".join(map(str, self.decay_at))
            raise InputError(f"decay at {given}: must lie between 0 and the {self.epochs} epochs")


# By name, each with the source of its values: as another one of them, but for what it gives itself.
RECIPES: dict[str, dict] = {}
for name, own in json.loads(Path(__file__).with_suffix(".json").read_text()).items():
    RECIPES[name] = RECIPES.get(own.pop("like", None), {}) | own

IDLE = dict(segment={"pyramid"}, detect={"head", "windows"})  # what a task has no use for


def recipe_for(name: str | None, given: dict) -> tuple[str, str, Recipe]:
    """Task, format of the folder, and the other settings: each as `given` or else as the recipe `name` has it."""
    own = RECIPES.get(name, {}) | ({"steps": 0} if "epochs" in given else {}) | given
    own = {name: tuple(x) if isinstance(x, list) else x for name, x in own.items() if name != "source"}
    if (task := own.pop("task", None)) is None:
        raise InputError("task: none given; give --task, or a --recipe that has one")
    kind = own.pop("format", {"segment": "voc", "detect": "coco"}[task])
    if (kind in ("voc", "ade")) != (task == "segment"):
        raise InputError(f"format {kind}: not for --task {task}; voc and ade segment, coco and tiny-imagenet detect")
    if idle := IDLE[task] & given.keys():
        raise InputError(f"{flag(min(idle))}: does nothing to task {task}; leave it out")
    return task, kind, Recipe(**own)
