"""Augmentations of whole batches, with parameters of their own for every image; each is tested against torchvision's.

What is random is drawn by `crop_boxes` and `draw_color_jitter`, or straight from `common.StepRandom`; all else here is
a pure function of images and parameters. Images are float32 (B, 3, H, W) in [0, 1] unless said otherwise; parameters
are (B,), and `where` (B,) bool says which images an augmentation touches (None: all).

A `where` on the CPU picks the images there and only those are computed, on a GPU too. One on a GPU computes all of
them and keeps the chosen, since counting those would make the CPU wait for the GPU; as drawn, nothing here waits.
No matrix product is involved, so neither autocast nor TF32 changes a result.

For whom views are made, `views_for` says: by default for squares that are normalised as ImageNet's.
"""

import copy
import math
from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common import MEAN, STD, StepRandom, pair, upload
from runtime.errors import InputError
from runtime.ranks import say

GRAY = (0.2989, 0.587, 0.114)  # ITU-R 601 luma as torchvision rounds it


LEAST_STD = 1e-4  # of a channel; a fortieth of a grey level
STATISTICS_OF = 4096  # images of a set that streams: what `channel_statistics` looks at
VIEWS = [None]  # for whom views are made, the innermost last


@contextmanager
def views_for(encoder):
    """Within this block views are for an encoder, or the settings of a run: crops have the aspect of its `image_size`,
    and `normalize` takes its `mean` and `std`."""
    VIEWS.append(encoder)
    try:
        yield
    finally:
        VIEWS.pop()


def aspects() -> tuple[float, float]:
    """The least and the largest aspect, width by height, of a crop: RandomResizedCrop's times that of the view."""
    H, W = pair(getattr(VIEWS[-1], "image_size", 1))
    return 3 / 4 * (W / H), 4 / 3 * (W / H)


def on_host(rng: StepRandom) -> StepRandom:
    """The same generator, whose draws stay on the CPU: where they decide what is computed, nobody waits for a GPU."""
    rng = copy.copy(rng)
    rng.device = torch.device("cpu")
    return rng


def change(images: Tensor, where: Tensor | None, function: Callable, *parameters: Tensor) -> Tensor:
    """`function(images, *parameters)` for the images chosen by `where`, and the others as they were."""
    if where is None:
        return function(images, *parameters)
    if where.device.type != "cpu":
        return torch.where(where[:, None, None, None], function(images, *parameters), images)
    chosen = upload(where.nonzero()[:, 0], images.device)
    return images.index_copy(0, chosen, function(images[chosen], *(p[chosen] for p in parameters)))


def sizes(images: Tensor | list[Tensor]) -> tuple[int, int] | Tensor:
    """(H, W) of a batch, int64 (B, 2) of a list of images (3, H_i, W_i)."""
    return torch.tensor([i.shape[1:] for i in images]) if isinstance(images, list) else tuple(images.shape[2:])


def crop_boxes(rng: StepRandom, sizes, scale=(0.2, 1.0), ratio: tuple[float, float] | None = None) -> Tensor:
    """int64 (B, 4) on the CPU: top, left, height, width of torchvision's RandomResizedCrop in images of `sizes`.

    Ten tries at an area uniform in `scale` and an aspect ratio log-uniform in `ratio`, by default `aspects`; the first
    that fits is placed uniformly. If none does: the largest central box whose aspect is allowed. `sizes` is (H, W), or
    int64 (B, 2). The draws are unit numbers, so that they do not depend on the sizes of images that other ranks hold.
    """
    rng, ratio = on_host(rng), ratio or aspects()
    tries, place = rng.uniform(2, 10).double(), rng.uniform(2).double()
    sides = torch.as_tensor(sizes).double().expand(len(place), 2)  # (B, 2)
    H, W = sides[:, :1], sides[:, 1:]
    low, high = math.log(ratio[0]), math.log(ratio[1])
    area = H * W * (scale[0] + (scale[1] - scale[0]) * tries[:, 0])  # (B, 10)
    aspect = (low + (high - low) * tries[:, 1]).exp()
    # The fallback stands in an eleventh column, and always fits.
    h = torch.cat([(area / aspect).sqrt().round(), torch.minimum(H, (W / ratio[0]).round().clamp(min=1))], dim=1)
    w = torch.cat([(area * aspect).sqrt().round(), torch.minimum(W, (H * ratio[1]).round().clamp(min=1))], dim=1)
    first = ((h > 0) & (h <= H) & (w > 0) & (w <= W)).int().argmax(dim=1, keepdim=True)
    box = torch.cat([h.gather(1, first), w.gather(1, first)], dim=1)
    corner = torch.where(first == 10, (sides - box) / 2, place * (sides - box + 1)).floor()
    return torch.cat([corner, box], dim=1).long()


def cubic_taps(
    start: Tensor, length: Tensor, samples: Tensor, first: Tensor, size: int, shrink: float
) -> tuple[Tensor, Tensor]:
    """Pixels and weights that resize [start, start + length) of a line to `samples` and keep `size` from `first` on.

    All are (B,), and no length is more than `shrink` times its samples. Keys' cubic with a = -1/2, stretched where it
    shrinks the image (antialiasing), cut off at the ends of the length and normalised: what PIL and torch's
    `interpolate(antialias=True)` compute. Returns int64 and float32 (B, size, K).
    """
    start, length, samples, first = (x[:, None, None] for x in (start, length, samples, first))
    scale = length / samples
    stretch = scale.clamp(min=1)
    center = (first + torch.arange(size, device=start.device)[:, None] + 0.5) * scale
    K = math.ceil(4 * max(1, shrink))  # pixel centres in an open interval of length 4 · stretch
    pixel = (center - 2 * stretch + 0.5).floor() + torch.arange(K, device=start.device)  # (B, size, K)
    x = (pixel + 0.5 - center).abs() / stretch
    near, far = (1 - x).clamp(min=0), (2 - x).clamp(min=0)
    weight = far.square() * (far - 1) / 2 + near.square() * (1 - 2 * near)  # Keys' two branches, without a branch
    weight = weight * ((pixel >= 0) & (pixel < length))
    pixel = pixel.clamp(min=0).minimum(length - 1).long() + start
    return pixel, weight / weight.sum(dim=2, keepdim=True)


def weighted_rows(x: Tensor, pixel: Tensor, weight: Tensor) -> Tensor:
    """(B, C, n, D) and (B, size, K) → (B, C, size, D): every row out is a weighted sum of K rows in.

    That is what `embedding_bag` computes; the matrix product with its zeros would take over ten times as long.
    """
    B, C, n, _ = x.shape
    row = pixel[:, None] + n * torch.arange(B * C, device=x.device).view(B, C, 1, 1)  # (B, C, size, K)
    weight = weight[:, None].expand_as(row)
    out = F.embedding_bag(row.flatten(0, 2), x.flatten(0, 2), per_sample_weights=weight.flatten(0, 2), mode="sum")
    return out.view(*row.shape[:3], -1)


def separable(images: Tensor, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor]) -> Tensor:
    """(B, C, H, W) → float32 (B, C, h, w), filtered down the rows and then across the columns with per-image taps.

    On a CPU a few images at a time, so that what lies between input and output stays in its cache.
    """
    B, C = images.shape[:2]
    out = torch.empty(B, C, rows[0].shape[1], columns[0].shape[1], device=images.device)
    some = 32 if images.device.type == "cpu" else max(1, B)
    for s in (slice(i, i + some) for i in range(0, B, some)):
        x = weighted_rows(images[s].float(), *(taps[s] for taps in rows))  # (b, C, h, W)
        out[s] = weighted_rows(x.transpose(2, 3), *(taps[s] for taps in columns)).transpose(2, 3)
    return out


def like_sized(boxes: Tensor, most: int) -> list[list[int]]:
    """Positions of the boxes (B, 4), in groups whose `canvas` has at most `most` numbers, or that are a single box."""
    groups, sides = [], (0, 0)
    for i, box in sorted(enumerate(boxes[:, 2:].tolist()), key=lambda pair: max(pair[1])):
        sides = [*map(max, sides, box)]
        if not groups or 3 * math.prod(sides) * (len(groups[-1]) + 1) > most:
            groups, sides = [*groups, []], box
        groups[-1].append(i)
    return groups


def canvas(images: list[Tensor], boxes: Tensor) -> Tensor:
    """uint8 (B, 3, h, w) that has each box (B, 4) of its image (3, H_i, W_i) in the upper left corner.

    h and w are the largest height and width; beyond a smaller box lie other pixels. Each row is a window on all images
    in one line, so the GPU copies all images at once.
    """
    device, (h, w), (top, left, height, _) = images[0].device, boxes[:, 2:].amax(dim=0).tolist(), boxes.T
    line = torch.cat([*(image.flatten() for image in images), images[0].new_zeros(w)])  # room for the last window
    H, W = sizes(images).T
    start = (3 * H * W).cumsum(0) - 3 * H * W + top * W + left
    start, plane, W, last = upload(torch.stack([start, H * W, W, height - 1]), device)[:, :, None, None]
    row = start + plane * torch.arange(3, device=device)[:, None] + W * torch.arange(h, device=device).minimum(last)
    return line.unfold(0, w, 1)[row]


def resample(
    images: Tensor | list[Tensor], boxes: Tensor, samples: Tensor, first: Tensor, size, hflip: Tensor | None = None
) -> Tensor:
    """Each box (B, 4) resized to `samples` (B, 2), of which `size` rows and columns from `first` (B, 2) on are kept.

    A list of images is computed in groups of similar sizes. All parameters are on the CPU; `hflip` may be anywhere.
    """
    B, (H, W) = len(boxes), pair(size)
    if isinstance(images, list):
        device = images[0].device
        most = 2**20 if device.type == "cpu" else 2**26  # what a core's cache holds; 256 MiB as float32
        views = torch.empty(B, 3, H, W, device=device)
        for some in like_sized(boxes, most):
            crops, whole = canvas([images[i] for i in some], boxes[some]), F.pad(boxes[some, 2:], (2, 0))
            places = upload(torch.tensor(some), device)
            flips = None if hflip is None else upload(hflip, device)[places]
            views[places] = resample(crops, whole, samples[some], first[some], size, flips)
        return views
    shrink = max([1, *(boxes[:, 2:] / samples).flatten().tolist()])
    numbers = upload(torch.cat([boxes, samples, first], dim=1), images.device)
    pixel, weight = cubic_taps(*numbers.T.flatten().chunk(4), max(H, W), shrink)  # (2 · B, …, K): down, then across
    rows, columns = (pixel[:B, :H], weight[:B, :H] / 255), (pixel[B:, :W], weight[B:, :W])
    if hflip is not None:
        mirror = upload(hflip, images.device)[:, None, None]
        columns = tuple(torch.where(mirror, taps.flip(1), taps) for taps in columns)
    return separable(images, rows, columns).clamp_(0, 1)


def crop_resize(images: Tensor | list[Tensor], boxes: Tensor, size, hflip: Tensor | None = None) -> Tensor:
    """uint8 (B, 3, H, W), or a list of (3, H_i, W_i), cropped to `boxes` (B, 4) → float32 (B, 3, *size) in [0, 1].

    `size`, here and below, is an int for a square, or (height, width). Bicubic and antialiased as torchvision's
    `resized_crop`, though not rounded to whole grey levels; `hflip` (B,) bool mirrors the views it marks.
    """
    samples = torch.tensor(pair(size)).expand(len(boxes), 2)
    return resample(images, boxes, samples, torch.zeros_like(samples), size, hflip)


def center_crop_resize(images: Tensor | list[Tensor], size) -> Tensor:
    """uint8 (B, 3, H, W), or a list of (3, H_i, W_i) → float32 (B, 3, *size) in [0, 1], for evaluation.

    Images are made as small as covers 256/224 of `size`, or beyond 224 pixels `size` itself (as in MAE's code), and the
    centre is cut out: of squares, what torchvision's Resize and CenterCrop do. Images of that size are taken whole.
    """
    if not isinstance(images, list) and images.shape[2:] == pair(size):
        return images.float().div_(255)
    sides, view = torch.as_tensor(sizes(images)).expand(len(images), 2), torch.tensor(pair(size))
    cover = torch.tensor([round(side * 256 / 224) if max(pair(size)) <= 224 else side for side in pair(size)])
    tight = (cover * sides.flip(1)).argmax(dim=1, keepdim=True)  # the side of which less would be too little
    samples = cover[tight] * sides // sides.gather(1, tight)
    samples = samples.where((sides != view).any(dim=1, keepdim=True), view)
    first = ((samples - view) / 2).round().long()
    return resample(images, F.pad(sides, (2, 0)), samples, first, size)


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 (B, 3, H, W) → float32 (B, 3, *size) in [0, 1], bicubic and antialiased, by torch's own kernel."""
    return F.interpolate(images.float(), size, mode="bicubic", antialias=True).div_(255).clamp_(0, 1)


def shift_crop(master: Tensor, offsets: Tensor, size) -> Tensor:
    """(B, 3, H + p, W + p) → (B, 3, *size): CMAE's pixel shift (§3.2), windows `offsets` (B, 2) down and right.

    Offsets may go from 0 to p, and §3.2 stays below p; two views of one master agree to the bit wherever they overlap.
    """
    down, right = upload(offsets, master.device).unbind(1)
    H, W = pair(size)
    windows = master.unfold(2, H, 1).unfold(3, W, 1)  # (B, 3, p + 1, p + 1, H, W), a view
    return windows[torch.arange(len(master), device=master.device), :, down, right]


def locate(heat: Tensor, size: tuple[int, int], k: float) -> Tensor:
    """I = F(1[M > k]), Eq. 1 of The other CMAE: heat map M (B, h, w) → box (B, 4) of what exceeds k.

    A box is top, left, bottom, right, as shares of the sides. Each map is stretched to [0, 1], enlarged bilinearly to
    the image, and framed from the first to the last row and column that somewhere exceed k, as in ContrastiveCrop.
    Where nothing exceeds k, the box is the whole image.
    """
    low, high = heat.amin((1, 2), keepdim=True), heat.amax((1, 2), keepdim=True)
    heat = (heat - low) / (high - low).clamp(min=torch.finfo(heat.dtype).tiny)
    hot = F.interpolate(heat[:, None], size, mode="bilinear")[:, 0] > k  # (B, H, W)
    ends = []
    for line in (hot.any(dim=2).int(), hot.any(dim=1).int()):  # rows (B, H), columns (B, W)
        n = line.shape[1]
        ends.append(torch.stack([line.argmax(dim=1), n - 1 - line.flip(1).argmax(dim=1)], dim=1) / n)  # first, last
    boxes = torch.stack(ends, dim=2).flatten(1)  # (B, 2, 2) → (B, 4)
    whole = heat.new_tensor([0.0, 0.0, 1.0, 1.0])
    return torch.where(hot.any(dim=2).any(dim=1, keepdim=True), boxes, whole)


def place_crops(crops: Tensor, sizes, boxes: Tensor, beta: Tensor) -> Tensor:
    """R_crop, Eq. 1 of The other CMAE: int64 (B, 4) crops (top, left, height, width) keep their size and move.

    A crop's centre moves over its box (B, 4) as far as the crop stays in its image; `beta` (B, 2) in [0, 1] says where
    from end to end. Drawn from Beta(α, α) with α < 1 it crowds at the ends: centre-suppressed. `sizes`, of the images,
    is (H, W) or int64 (B, 2). ContrastiveCrop leaves RandomResizedCrop's rare fallback in the middle; here that moves.
    """
    sides, lengths = torch.as_tensor(sizes).expand(len(crops), 2), crops[:, 2:]  # of images, of crops: (B, 2)
    room = sides - lengths
    low, high = ((edge * sides).long() - lengths // 2 for edge in boxes.split(2, dim=1))  # top left, bottom right
    low, high = low.clamp(min=0).minimum(room), high.clamp(min=0).minimum(room)
    return torch.cat([low + ((high - low) * beta).long(), lengths], dim=1)


def luminance(images: Tensor) -> Tensor:
    """(B, 3, H, W) → (B, 1, H, W)."""
    red, green, blue = images.split(1, dim=1)
    return (red * GRAY[0]).add_(green, alpha=GRAY[1]).add_(blue, alpha=GRAY[2])


def blend(images: Tensor, other: Tensor | int, factor: Tensor) -> Tensor:
    """From `other` (factor 0) to the images (1) and beyond, cut to [0, 1]. `factor` is (B, 1, 1, 1), here and below."""
    return (images * factor).add_(other * (1 - factor)).clamp_(0, 1)


def adjust_hue(images: Tensor, factor: Tensor) -> Tensor:
    """The hue of HSV turned by `factor` full turns.

    With V the largest, m the least of r, g, b and C = V - m, the hue in sixths of a turn is ±(1 + (g + b - r - m) / C),
    with the sign of g - b, and back: r, g, b = m + C · clamp((|hue - 3| - 1, 2 - |hue - 2|, 2 - |hue - 4|), 0, 1).
    """
    red, green, blue = images.split(1, dim=1)
    least, chroma = images.amin(1, keepdim=True), images.amax(1, keepdim=True)
    chroma = chroma.sub_(least)
    angle = (green + blue).sub_(red).sub_(least).div_(chroma.clamp(min=1e-12)).add_(1)  # from red, in 0 … 3
    hue = angle.copysign_(green - blue).add_(6 * factor)
    hue = hue.sub_((hue / 6).floor_().mul_(6))  # in 0 … 6
    red, green, blue = (hue - 3).abs_().sub_(1), 2 - (hue - 2).abs_(), 2 - (hue - 4).abs_()
    return torch.cat([red, green, blue], dim=1).clamp_(0, 1).mul_(chroma).add_(least)


ADJUST = (
    lambda images, factor: blend(images, 0, factor),  # brightness
    lambda images, factor: blend(images, luminance(images.mean((2, 3), keepdim=True)), factor),  # contrast
    lambda images, factor: blend(images, luminance(images), factor),  # saturation
    adjust_hue,
)


class ColorJitter(NamedTuple):
    """Parameters of `color_jitter`, in its order. `order` and `where` stay on the CPU."""

    order: Tensor  # (B, 4) int64: a permutation of the places in ADJUST
    brightness: Tensor  # (B,) factors, 1 changes nothing; so the next two
    contrast: Tensor
    saturation: Tensor
    hue: Tensor  # (B,) in turns, 0 changes nothing
    where: Tensor | None = None  # (B,) bool


def draw_color_jitter(
    rng: StepRandom, brightness: float, contrast: float, saturation: float, hue: float, probability: float = 1.0
) -> ColorJitter:
    """Factors uniform in [max(0, 1 - s), 1 + s], the hue's in [-s, s], as torchvision's ColorJitter draws them."""
    order, where = on_host(rng).permutation(4), on_host(rng).chance(probability)
    factors = (rng.uniform(low=max(0.0, 1 - s), high=1 + s) for s in (brightness, contrast, saturation))
    return ColorJitter(order, *factors, rng.uniform(low=-hue, high=hue), where)


def color_jitter(images: Tensor, *jitter: Tensor | None) -> Tensor:
    """torchvision's ColorJitter with the parameters of `ColorJitter`, each image in its own order."""
    order, *factors, where = ColorJitter(*jitter)
    images, order = images.clone(), order.cpu()
    order = order if where is None else order.masked_fill(~where.cpu()[:, None], -1)
    factors = upload(torch.stack(factors)[:, :, None, None, None], images.device)
    chosen = [(order[:, place] == kind).nonzero()[:, 0] for place in range(4) for kind in range(4)]
    for i, rows in enumerate(upload(torch.cat(chosen), images.device).split([len(rows) for rows in chosen])):
        images[rows] = ADJUST[i % 4](images[rows], factors[i % 4, rows])
    return images


def grayscale(images: Tensor, where: Tensor | None = None) -> Tensor:
    return change(images, where, lambda x: luminance(x).expand_as(x))


def solarize(images: Tensor, threshold: float, where: Tensor | None = None) -> Tensor:
    """Inverts the values of `threshold` and above."""
    return change(images, where, lambda x: torch.where(x >= threshold, 1 - x, x))


def gaussian_blur(images: Tensor, sigma: Tensor, where: Tensor | None = None) -> Tensor:
    """torchvision's GaussianBlur with `sigma` (B,) in pixels, best on the CPU, where it is read. 0 changes nothing.

    The taps reach three σ of their own image, and no less than 6 pixels (three of the largest σ of the papers' codes).
    The border is reflected, so they must reach less far than the image.
    """
    reach = (3 * sigma.cpu()).ceil().clamp(min=6)  # (B,)
    furthest = int(reach.max()) if len(reach) else 0
    step = torch.arange(-furthest, furthest + 1, device=images.device)

    def taps(n: int, sigma: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
        pixel = (torch.arange(n, device=images.device)[:, None] + step).abs()
        pixel = (n - 1) - ((n - 1) - pixel).abs()  # (n, K), reflected at both ends
        weight = torch.exp(-0.5 * (step / sigma.clamp(min=1e-3)[:, None]).square())  # (B, K)
        weight = weight * (step.abs() <= reach[:, None])  # whatever the other images of the batch need
        weight = weight / weight.sum(dim=1, keepdim=True)
        return pixel.expand(len(sigma), -1, -1), weight[:, None].expand(-1, n, -1)

    def blur(x: Tensor, *widths: Tensor) -> Tensor:
        return separable(x, taps(x.shape[2], *widths), taps(x.shape[3], *widths))

    return change(images, where, blur, upload(sigma, images.device), upload(reach, images.device))


def statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (3, 1, 1) by which views are normalised."""
    own = getattr(VIEWS[-1], "mean", None) or MEAN, getattr(VIEWS[-1], "std", None) or STD
    constants = torch.tensor(own, dtype=images.dtype)[:, :, None, None]
    return upload(constants, images.device).unbind(0)


def channel_statistics(image_set, device) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel over the images of a set, as shares of white, to six digits.

    Each image counts alike. Of a set that streams, 4096 images are looked at, evenly spaced. The sums are of whole
    numbers, so that every machine finds the same.
    """
    n = len(image_set) if image_set.resident else min(STATISTICS_OF, len(image_set))
    at = torch.linspace(0, len(image_set) - 1, n, dtype=torch.float64).round().long()
    sums = torch.zeros(2, 3, dtype=torch.float64)  # of values and of their squares
    for images, _ in image_set.batches(at.split(256), device):
        for x in images if isinstance(images, list) else [images]:
            x = x.reshape(-1, 3, x.shape[-2] * x.shape[-1]).int()
            sums += torch.stack([x.sum((0, 2)), x.square().sum((0, 2))]).cpu() / x.shape[2]
    mean, square = sums / n
    mean, std = (
        [round(v, 6) for v in (x / 255).tolist()] for x in (mean, (square - mean.square()).clamp(min=0).sqrt())
    )
    if min(std) < LEAST_STD:
        raise InputError(f"{image_set.name}: a channel of its images is the same everywhere; give --mean and --std")
    say(f"{image_set.name}: mean {' '.join(map(str, mean))}, deviation {' '.join(map(str, std))}")
    return mean, std


def find_statistics(settings, image_set, device) -> None:
    """Put the images' own numbers in place of `mean` auto, and their deviation beside it unless one is given."""
    if getattr(settings, "mean", None) == "auto":
        settings.mean, std = channel_statistics(image_set, device)
        settings.std = getattr(settings, "std", None) or std


def normalize(images: Tensor) -> Tensor:
    mean, std = statistics(images)
    return (images - mean).div_(std)


def denormalize(images: Tensor) -> Tensor:
    mean, std = statistics(images)
    return images * std + mean
