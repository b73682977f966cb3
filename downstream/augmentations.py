"""What labelled images meet before a classifier learns from them: crops, RandAugment, erasing, mixup, CutMix.

All draws are for the whole global batch, so that what an image meets does not depend on the number of processes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from downstream.recipes import Recipe
from inputs import augment
from runtime.fast import upload
from runtime.randomness import StepRandom


def single_boxes(rng: StepRandom, sizes, scale, ratio=(3 / 4, 4 / 3)) -> Tensor:
    """`augment.crop_boxes` as MAE's code draws them for probes: one try, cut down to the image."""
    draw = augment.on_host(rng).uniform(4).double()
    sides = torch.as_tensor(sizes).double().expand(len(draw), 2)
    area = sides.prod(dim=1) * (scale[0] + (scale[1] - scale[0]) * draw[:, 0])
    aspect = (math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * draw[:, 1]).exp()
    box = torch.stack([(area / aspect).sqrt(), (area * aspect).sqrt()], dim=1).round().clamp(min=1).minimum(sides)
    return torch.cat([(draw[:, 2:] * (sides - box + 1)).floor(), box], dim=1).long()


DRAWS = 64  # of RandAugment in a step


def rand_augment(images: Tensor, rng: StepRandom, strength: int) -> Tensor:
    """timm's rand-m9-inc1 by torchvision: two operations, each with a chance of 1/2, `strength` tenths of their range.

    (B, 3, H, W) in [0, 1]. torchvision's own default, 9 of 30, would be a third as strong. It draws once for all that
    it is given, so each image takes one of DRAWS draws of the step, wherever it lies. timm's noise on the strength and
    its Invert and SolarizeAdd are left out; Identity is torchvision's.
    """
    from torchvision.transforms import InterpolationMode, v2  # brings the compiler along: two seconds at the start

    one = v2.RandAugment(1, strength, 11, InterpolationMode.BILINEAR, fill=list(augment.MEAN))
    change = v2.Compose([v2.RandomApply([one], p=0.5) for _ in range(2)])
    seeds, choice = rng.generator.integers(0, 2**31, DRAWS).tolist(), augment.on_host(rng).integers(0, DRAWS)
    images = images.clone()
    with torch.random.fork_rng(devices=[]):
        for k in choice.unique().tolist():
            torch.default_generator.manual_seed(seeds[k])
            chosen = (choice == k).nonzero()[:, 0].to(images.device, non_blocking=True)
            images[chosen] = change(images[chosen])
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


def augmented(images, labels: Tensor, classes: int, recipe: Recipe, size: int, rng: StepRandom, probe: bool):
    """uint8 images → normalised (B, 3, size, size), and targets (B, classes), with all that the recipe draws."""
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
