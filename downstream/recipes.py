"""How the papers train probes and fine-tune: the settings, the recipes by name, the augmentations that they ask for.

Augmentations draw for the whole global batch, so that what an image meets does not depend on the number of processes.
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from inputs import augment
from runtime.errors import InputError
from runtime.fast_paths import upload
from runtime.knobs import Part, Share, Size, Weight, check
from runtime.randomness import StepRandom

Below1 = Annotated[float, lambda x: 0 <= x < 1, "from 0 to below 1"]
Tenths = Annotated[int, lambda x: 0 <= x <= 10, "from 0 to 10"]


@dataclass(frozen=True)
class Recipe:
    """All that can be set; the defaults are MAE's fine-tuning of ViT-B (FINETUNE.md of its code)."""

    epochs: Size = 100  # passes over the images
    warmup_epochs: Weight = 5.0  # while the learning rate grows from 0; if not given, in proportion to --epochs
    batch_size: Size = 1024  # images a step, over all processes (kNN and the fast linear probe: of one process)
    base_lr: Weight = 5e-4  # peak learning rate for 256 images a step; it grows with the batch
    lr: Weight = 0.0  # peak learning rate itself; 0: the base's times batch / 256
    min_lr: Weight = 1e-6  # at the end of the cosine
    optimizer: Literal["adamw", "lars", "sgd"] = "adamw"  # adamw; lars or sgd, both with momentum 0.9
    weight_decay: Weight = 0.05  # not on vectors, biases and the class token
    layer_decay: Part = 0.65  # learning rate of a block, as a share of the next one's
    drop_path: Below1 = 0.1  # of the last block; grows from 0 linearly
    mixup: Weight = 0.8  # α of its Beta(α, α); 0: none
    cutmix: Weight = 1.0  # likewise; where there are both, each pair of images draws one
    smoothing: Below1 = 0.1  # of the labels
    erase: Share = 0.25  # chance of an image to lose a box
    randaugment: Tenths = 9  # strength of its operations, of 10; 0: none
    crop_scale: Share = 0.08  # least share of an image that a crop keeps; 0: neither crops nor flips
    features: Literal["mean", "cls"] = "mean"  # what the head sees: the mean of the patches, or cls, the class token
    norm: Literal["fresh", "pretrained"] = "fresh"  # last norm where blocks learn: fresh, or the pretrained one (CAE)
    positions: Literal["fixed", "learned"] = "fixed"  # learned where all blocks do, as by official MAE; not decayed
    head_std: Weight = 2e-5  # of the linear layer's first weights
    attend_cls: bool = False  # the attentive probe sees the class token too (CAE's code)

    def __post_init__(self):
        check(self)
        if self.warmup_epochs > self.epochs:
            raise InputError(f"warmup epochs {self.warmup_epochs:g}: must be at most the {self.epochs} epochs")

    @property
    def peak(self) -> float:
        return self.lr or self.base_lr * self.batch_size / 256

    @property
    def augments(self) -> bool:
        return any((self.crop_scale, self.randaugment, self.erase, self.mixup, self.cutmix))


# Both probes of CAE (Appendix); the linear one, like CMAE's (§4.5), is MAE's, and LC-MAE says nothing of its own. 6.4 =
# .1 · 16384 / 256, and .4 = .0125 · 8192 / 256: the papers give the rate for their batch, proportion is MAE's rule.
CALM = dict(mixup=0.0, cutmix=0.0, smoothing=0.0, erase=0.0, randaugment=0)
PROBE = CALM | dict(epochs=90, warmup_epochs=10.0, min_lr=0.0, weight_decay=0.0, head_std=0.01, features="cls")
LINEAR = PROBE | dict(optimizer="lars", base_lr=0.1, batch_size=16384)
ATTENTIVE = PROBE | dict(optimizer="sgd", base_lr=0.0125, batch_size=8192)


def paper(**tuning) -> dict[str, dict]:
    return dict(linear=LINEAR, attentive=ATTENTIVE, finetune=tuning)


RECIPES = {
    "mae": paper(positions="learned"),  # as its code; the others here keep them fixed, as their papers do not say
    "mae-large": paper(positions="learned", epochs=50, base_lr=1e-3, layer_decay=0.75, drop_path=0.2),
    "cmae": paper(),  # §4.2, pretrained for 300 epochs
    "cmae-1600": paper(base_lr=2.5e-4),
    "cae": paper(batch_size=4096, norm="pretrained"),  # Appendix: 8e-3 for 4096 images
    "cae-small": paper(batch_size=4096, norm="pretrained", epochs=200, base_lr=1e-3, layer_decay=0.75),
    # The drop path of .2 is the code's; the paper gives .1 for pretraining only.
    "cae-large": paper(batch_size=4096, norm="pretrained", epochs=50, base_lr=1.25e-4, layer_decay=0.75, drop_path=0.2),
    # ConMIM's Table 11 searches {1, 2, 4, 5}e-3; its code has 4e-3. Its jitter is idle in code, beside RandAugment.
    "conmim": paper(base_lr=1e-3, warmup_epochs=20.0),
    "conmim-small": paper(base_lr=1e-3, epochs=200, layer_decay=0.8),
    # LC-MAE's §5 has 1e-3, for Table 3's autoencoders too ("the same strategy"), and no layer decay: MAE publishes .75
    # for that rate, .65 for 5e-4.
    **dict.fromkeys(("lcmae", "autoencoder"), paper(base_lr=1e-3, layer_decay=0.75)),
    # §4.2: "frozen and fine-tuned for 100 epochs", which contradicts itself: report both. The rest is unstated.
    "cmae_loc": paper() | dict(linear=LINEAR | dict(epochs=100)),
    # Ours, for 64 pixels: the papers' rates, about as many steps (attentive: 8,730, not 14,040). Not tuned, nor run.
    "tiny": dict(
        linear=LINEAR | dict(batch_size=1024, base_lr=1.6),
        attentive=ATTENTIVE | dict(batch_size=1024, base_lr=0.1),
        finetune=dict(batch_size=512, epochs=30, warmup_epochs=3.0, layer_decay=0.75),
    ),
    # Ours, for about two minutes of two CPU cores. Probes see every image as it is, hence encode it once; their rates
    # are the best of a few on a tenth of the built-in training images. On so few steps mixing would be too much.
    "demo": dict(
        linear=LINEAR | dict(batch_size=256, base_lr=10.0, crop_scale=0.0),
        attentive=ATTENTIVE | dict(batch_size=256, base_lr=0.1, epochs=45, warmup_epochs=5.0, crop_scale=0.0),
        finetune=CALM | dict(batch_size=128, base_lr=1e-3, epochs=15, warmup_epochs=1.5, crop_scale=0.3,
                             layer_decay=0.75, smoothing=0.1),
    ),
}  # fmt: skip

IDLE = dict(  # what a protocol has no use for
    linear={"layer_decay", "drop_path", "norm", "positions", "attend_cls"},
    attentive={"layer_decay", "drop_path", "norm", "positions", "features"},
    finetune={"attend_cls"},
)


def recipe_for(name: str, protocol: str, blocks: int = 1, given: dict | None = None) -> Recipe:
    """The recipe `name` of a protocol, with the fields of `given` in place of its own."""
    if name not in RECIPES:
        raise InputError(f"recipe {name!r}: unknown; choose one of {', '.join(RECIPES)}")
    kind = kind_of(protocol, blocks)
    own, given = RECIPES[name][kind], dict(given or {})
    if given.get("lr") and "base_lr" in given:
        raise InputError("--base-lr: does nothing beside --lr; leave one of them out")
    if idle := IDLE[kind] & given.keys():
        raise InputError(f"{flag(min(idle))}: does nothing to protocol {protocol}; leave it out")
    recipe = Recipe(**own)
    if protocol == "supervised":
        recipe = replace(recipe, layer_decay=1.0)
    if "epochs" in given:
        given.setdefault("warmup_epochs", recipe.warmup_epochs * given["epochs"] / recipe.epochs)
    return replace(recipe, **given)


def flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def kind_of(protocol: str, blocks: int) -> str:
    """Which of a recipe's three parts a protocol follows; partial fine-tuning of no block is the linear probe."""
    frozen = protocol in ("linear", "attentive")
    return protocol if frozen else "linear" if protocol == "partial" and blocks == 0 else "finetune"


def single_boxes(rng: StepRandom, sizes, scale) -> Tensor:
    """`augment.crop_boxes` as MAE's code draws them for probes: one try, cut down to the image."""
    draw, ratio = augment.on_host(rng).uniform(4).double(), augment.aspects()
    sides = torch.as_tensor(sizes).double().expand(len(draw), 2)
    area = sides.prod(dim=1) * (scale[0] + (scale[1] - scale[0]) * draw[:, 0])
    aspect = (math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * draw[:, 1]).exp()
    box = torch.stack([(area / aspect).sqrt(), (area * aspect).sqrt()], dim=1).round().clamp(min=1).minimum(sides)
    return torch.cat([(draw[:, 2:] * (sides - box + 1)).floor(), box], dim=1).long()


def moved(images: Tensor, matrix: list[list]) -> Tensor:
    """(n, 3, H, W), where pixel (x, y) comes from `matrix` · (x, y, 1); outside the image lies the mean.

    Coordinates run from -1 to 1. Entries are numbers or (n, 1, 1, 1). Bicubic: torch's cubic has a = -3/4, PIL's -1.
    """
    y, x = ((torch.arange(side, device=images.device) * 2 + 1) / side - 1 for side in images.shape[2:])
    y, x = y[:, None, None], x[None, :, None]
    grid = torch.cat([(a * x + b * y + c).expand(len(images), *images.shape[2:], 1) for a, b, c in matrix], dim=3)
    inside = ((grid >= -1) & (grid < 1)).all(dim=3)[:, None]
    found = F.grid_sample(images, grid, mode="bicubic", padding_mode="border", align_corners=False).clamp_(0, 1)
    return torch.where(inside, found, augment.statistics(images)[0])


def by_torchvision(name: str, images: Tensor, *parameters) -> Tensor:
    """An operation of torchvision, which is imported late: it brings the compiler along, two seconds at the start."""
    from torchvision.transforms.v2 import functional

    return getattr(functional, name)(images, *parameters)


def grey(images: Tensor) -> Tensor:
    return (images * 255).round()


def factor(m: Tensor, sign: Tensor) -> Tensor:
    return 1 + 0.9 * sign * m


def posterize(x: Tensor, m: Tensor, sign: Tensor) -> Tensor:
    step = 2 ** (4 + (4 * m).floor())  # keeps 4 bits at m = 0, one at .9, none at 1 (new versions of PIL refuse that)
    return (grey(x) / step).floor() * step / 255


def rotate(x: Tensor, m: Tensor, sign: Tensor) -> Tensor:
    angle, aspect = sign * m * math.radians(30), x.shape[2] / x.shape[3]
    return moved(x, [[angle.cos(), -angle.sin() * aspect, 0], [angle.sin() / aspect, angle.cos(), 0]])


def shear(x: Tensor, amount: Tensor, axis: int) -> Tensor:
    """Pixels move along an axis, 2 or 3, by `amount` times how far they are from the start of the other axis."""
    amount = amount * (x.shape[5 - axis] / x.shape[axis])
    return moved(x, [[1, amount, amount], [0, 1, 0]] if axis == 3 else [[1, 0, 0], [amount, 1, amount]])


# timm's operations whose strength increases with m in [0, 1], for images (n, 3, H, W); m and sign are (n, 1, 1, 1).
OPERATIONS = dict(
    AutoContrast=lambda x, m, sign: by_torchvision("autocontrast", x),
    Equalize=lambda x, m, sign: by_torchvision("equalize", x),
    Invert=lambda x, m, sign: 1 - x,
    Rotate=rotate,
    PosterizeIncreasing=posterize,
    SolarizeIncreasing=lambda x, m, sign: torch.where(grey(x) < 256 - (256 * m).floor(), x, 1 - x),
    SolarizeAdd=lambda x, m, sign: torch.where(grey(x) < 128, x + (110 * m).floor() / 255, x),
    ColorIncreasing=lambda x, m, sign: augment.ADJUST[2](x, factor(m, sign)),
    ContrastIncreasing=lambda x, m, sign: augment.ADJUST[1](x, factor(m, sign)),
    BrightnessIncreasing=lambda x, m, sign: augment.ADJUST[0](x, factor(m, sign)),
    SharpnessIncreasing=lambda x, m, sign: augment.blend(x, by_torchvision("adjust_sharpness", x, 0), factor(m, sign)),
    ShearX=lambda x, m, sign: shear(x, 0.3 * sign * m, axis=3),
    ShearY=lambda x, m, sign: shear(x, 0.3 * sign * m, axis=2),
    TranslateXRel=lambda x, m, sign: moved(x, [[1, 0, 0.9 * sign * m], [0, 1, 0]]),  # .45 of the side, which is 2
    TranslateYRel=lambda x, m, sign: moved(x, [[1, 0, 0], [0, 1, 0.9 * sign * m]]),
)


def rand_augment(images: Tensor, rng: StepRandom, strength: int) -> Tensor:
    """timm's rand-m9-mstd0.5-inc1, as MAE's code asks for it: two operations, each with a chance of 1/2.

    (B, 3, H, W) in [0, 1]. Each image draws its own operations, signs and strengths; a strength is normal around
    `strength` tenths of the operation's range, with a standard deviation of half a tenth. timm's rounds to grey levels.
    """
    rng = augment.on_host(rng)
    kinds, applied = rng.integers(0, len(OPERATIONS), 2), rng.uniform(2) < 0.5
    m = (strength + 0.5 * torch.special.ndtri(rng.uniform(2))).clamp(0, 10) / 10
    sign = 1.0 - 2 * (rng.uniform(2) < 0.5)
    parameters, images = upload(torch.stack([m, sign])[..., None, None, None], images.device), images.clone()
    for place in range(2):
        for kind, change in enumerate(OPERATIONS.values()):
            chosen = ((kinds[:, place] == kind) & applied[:, place]).nonzero()[:, 0]
            if len(chosen):
                rows = upload(chosen, images.device)
                images[rows] = change(images[rows], *parameters[:, rows, place])
    return images


def erase(images: Tensor, rng: StepRandom, probability: float) -> Tensor:
    """Random erasing (arXiv 1708.04896) with noise, after normalisation, as MAE's: boxes of 2 % to a third of the area.

    torchvision's would erase one box from all images. The noise is one sheet a step, of which each box shows its part.
    """
    H, W = images.shape[2:]
    top, left, height, width = augment.crop_boxes(rng, (H, W), (0.02, 1 / 3), (0.3, 1 / 0.3)).unbind(1)
    height = height * augment.on_host(rng).chance(probability)  # a box without height erases nothing
    noise = torch.from_numpy(rng.generator.standard_normal((3, H, W), dtype="float32"))
    inside = inside_boxes(images, top, top + height, left, left + width)
    return torch.where(inside, upload(noise, images.device), images)


def inside_boxes(images: Tensor, *sides: Tensor) -> Tensor:
    """bool (B, 1, H, W): the pixels of each image between its top, bottom, left and right, (B,) each."""
    sides = torch.stack(sides).to(images.device, non_blocking=True)
    top, bottom, left, right = sides[:, :, None, None, None]
    y = torch.arange(images.shape[2], device=images.device)[:, None]
    x = torch.arange(images.shape[3], device=images.device)
    return (top <= y) & (y < bottom) & (left <= x) & (x < right)


def mix(images: Tensor, targets: Tensor, rng: StepRandom, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """Each image with its neighbour, 0 with 1, 2 with 3, …, by mixup or CutMix; `targets` (B, classes) alike.

    Pairs stay together however many processes share the batch; torchvision's MixUp and CutMix, which mix the batch
    with itself rolled by one, would not. λ is each pair's own, where timm has one for a batch. With λ ~ Beta(α, α),
    mixup keeps λ of every pixel, CutMix all pixels but those in a box of the area 1 - λ, cut at the border: either
    way the label keeps what share of the image stayed.
    """
    if not (mixup or cutmix):
        return images, targets
    H, W = images.shape[2:]
    rng = augment.on_host(rng)
    cut = rng.chance(0.5 if mixup and cutmix else float(cutmix > 0))
    soft, hard, center = rng.beta(mixup or 1.0, mixup or 1.0), rng.beta(cutmix or 1.0, cutmix or 1.0), rng.uniform(2)
    cut, soft, hard, center = (x[::2].repeat_interleave(2, dim=0) for x in (cut, soft, hard, center))
    half = (1 - hard).sqrt() / 2
    y, x = (center[:, 0] * H).floor(), (center[:, 1] * W).floor()
    h, w = (half * H).floor(), (half * W).floor()
    sides = (y - h).clamp(min=0), (y + h).clamp(max=H), (x - w).clamp(min=0), (x + w).clamp(max=W)
    cut, soft = (t.to(images.device, non_blocking=True)[:, None, None, None] for t in (cut, soft))
    keep = torch.where(cut, (~inside_boxes(images, *sides)).float(), soft.expand(-1, 1, H, W))
    share = keep.mean(dim=(2, 3))  # (B, 1)

    def other(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)

    return other(images).lerp(images, keep), other(targets).lerp(targets, share)


def augmented(images, labels: Tensor, classes: int, recipe: Recipe, size, rng: StepRandom, probe: bool):
    """uint8 images → normalised (B, 3, *size), and targets (B, classes), with all that the recipe draws."""
    if recipe.crop_scale:
        draw = single_boxes if probe else augment.crop_boxes
        boxes = draw(rng, augment.sizes(images), (recipe.crop_scale, 1.0))
        images = augment.crop_resize(images, boxes, size, rng.chance(0.5))
    else:
        images = augment.center_crop_resize(images, size)
    if recipe.randaugment:
        images = rand_augment(images, rng, recipe.randaugment)
    images = augment.normalize(images)
    if recipe.erase:
        images = erase(images, rng, recipe.erase)
    return mix(images, F.one_hot(labels, classes).float(), rng, recipe.mixup, recipe.cutmix)
