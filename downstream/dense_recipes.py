"""How the papers fine-tune for segmentation and detection: the settings, and the papers' by name.

Left out are what the papers add or take from their code: Cascade Mask R-CNN (CMAE's ‡, CAE's Table 5), relative
positions where pretraining had none (ConMIM, Tables 12 and 13), windowed attention (ConMIM §5.3), intermediate
fine-tuning on ImageNet (ConMIM's *), tests at several scales. Nothing here has been run on ADE20K or COCO yet.
"""

from dataclasses import dataclass
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
    schedule: Literal["cosine", "linear"] = "cosine"  # of the rate to zero: cosine, or linear
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

    def __post_init__(self):
        check(self)
        if not 0 < self.jitter[0] <= self.jitter[1]:
            given = " ".join(f"{x:g}" for x in self.jitter)
            raise InputError(f"jitter {given}: give a smallest and a largest positive scale")
        if self.decay_at and not 0 < min(self.decay_at) <= max(self.decay_at) < self.epochs:
            given = " ".join(map(str, self.decay_at))
            raise InputError(f"decay at {given}: must lie between 0 and the {self.epochs} epochs")

    @property
    def peak(self) -> float:
        return self.lr


# CAE, Appendix A: 160k steps of 16 images of 512 pixels; "we follow the code" of BEiT. Warm-up, schedule and weight
# decay are unsaid there and those of ConMIM's Table 12, which follows BEiT too: 1500 steps, linear, .05.
ADE = dict(task="segment", format="ade", head="upernet", image_size=512, distort=True, windows=True,
           steps=160_000, batch_size=16, warmup=1500 / 160_000, schedule="linear")  # fmt: skip
# CAE, Appendix A: batch 32, 12 epochs, a tenth after 9 and 11; the shorter side 480 to 800, the longer up to 1333,
# for which 1024 times .6 to 1 stands here. Warm-up (we take a 50th of the steps) and weight decay are unsaid.
COCO = dict(task="detect", format="coco", pyramid="beit", image_size=1024, jitter=(0.6, 1.0), epochs=12,
            decay_at=(9, 11), batch_size=32, warmup=0.02, layer_decay=0.75, drop_path=0.2)  # fmt: skip
# ConMIM, §5.3 and Table 13: large-scale jitter, 25 epochs of 64 images of 1024 pixels, a cosine, weight decay .1.
LONG = dict(task="detect", format="coco", pyramid="beit", image_size=1024, jitter=(0.1, 2.0), epochs=25,
            batch_size=64, warmup=0.02, lr=1e-4, drop_path=0.1, weight_decay=0.1)  # fmt: skip

RECIPES = {
    # Appendix A searches {1, 2, 3, 4}e-4 for ViT-B, {3, 4, 5}e-5 for ViT-L; Table 3 does not say which was the best.
    "cae-ade20k": ADE | dict(lr=3e-4, layer_decay=0.65, drop_path=0.1),
    "cae-large-ade20k": ADE | dict(lr=4e-5, layer_decay=0.95, drop_path=0.15),
    "cae-coco": COCO | dict(lr=3e-4),
    "cae-small-coco": COCO | dict(lr=3e-4, drop_path=0.1),
    "cae-large-coco": COCO | dict(lr=2e-4, layer_decay=0.8),
    "conmim-ade20k": ADE | dict(lr=5e-5, layer_decay=0.9, drop_path=0.1),  # Table 12 searches {1, 3, 5, 7}e-5
    "conmim-coco": LONG,
    # CMAE, §4.3: UperNet "following the settings of compared methods", of which we take CAE's.
    "cmae-ade20k": ADE | dict(lr=3e-4, layer_decay=0.65, drop_path=0.1),
    # §4.3: 100 epochs, 1e-4, a cosine, weight decay .1. "Following MAE": ConMIM, who do too, give jitter and batch.
    "cmae-coco": LONG | dict(epochs=100),
}

IDLE = dict(segment={"pyramid"}, detect={"head", "windows"})  # what a task has no use for


def recipe_for(name: str | None, given: dict) -> tuple[str, str, Recipe]:
    """Task, format of the folder, and the other settings: each as `given` or else as the recipe `name` has it."""
    own = RECIPES.get(name, {}) | ({"steps": 0} if "epochs" in given else {}) | given
    task = own.pop("task", None)
    if task is None:
        raise InputError("task: none given; give --task, or a --recipe that has one")
    kind = own.pop("format", {"segment": "voc", "detect": "coco"}[task])
    if (kind in ("voc", "ade")) != (task == "segment"):
        raise InputError(f"format {kind}: not for --task {task}; voc and ade segment, coco and tiny-imagenet detect")
    if idle := IDLE[task] & given.keys():
        raise InputError(f"{flag(min(idle))}: does nothing to task {task}; leave it out")
    return task, kind, Recipe(**own)
