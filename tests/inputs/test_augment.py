"""Every augmentation against torchvision's own function, image by image, and every draw against its definition."""

import itertools
import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torchvision.transforms as v1
import torchvision.transforms.functional as tv
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import InterpolationMode, v2

from common import MEAN, STD, StepRandom, pair
from inputs import augment, image_cache, image_sets
from runtime.errors import InputError

seeds = st.integers(0, 2**32)
SMALL = settings(max_examples=25)
sizes = st.integers(2, 64).map(pair) | st.tuples(*[st.integers(2, 64)] * 2)  # torch 2.14 errs at a width of 1


def pixels(seed: int, B: int, H: int, W: int) -> torch.Tensor:
    """uint8 noise over a ramp, with patches of black, white and gray, where hue and chroma have their corners."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(B, 3, H, W, generator=g) * 0.6 + torch.linspace(0, 0.4, W)
    x[0, :, : H // 3] = x[0, :1, : H // 3]  # gray
    x[-1, :, :, : W // 3] = torch.rand(3, 1, 1, generator=g).round()  # a corner of the colour cube
    return (x * 255).round().to(torch.uint8)


def unit(seed: int, B: int, *shape: int) -> torch.Tensor:
    return torch.rand(B, *shape, generator=torch.Generator().manual_seed(seed + 1))


def boxes_in(seed: int, B: int, H: int, W: int) -> torch.Tensor:
    """Any boxes at all: one pixel, whole images, thin strips."""
    u = unit(seed, B, 4).double()
    h, w = (1 + u[:, 0] * H).floor().clamp(max=H), (1 + u[:, 1] * W).floor().clamp(max=W)
    return torch.stack([(u[:, 2] * (H - h + 1)).floor(), (u[:, 3] * (W - w + 1)).floor(), h, w], 1).long()


# ------------------------------------------------------------------------------------------------- crops and resizing


def resized_crop(image, box, size):
    """torchvision's, in float32, without the rounding to whole grey levels that it does for uint8."""
    view = tv.resized_crop(image.float() / 255, *box, [*pair(size)], InterpolationMode.BICUBIC, antialias=True)
    return view.clamp(0, 1)


@SMALL
@given(seeds, st.integers(1, 5), st.integers(1, 40), st.integers(1, 40), sizes)
def test_crop_resize_matches_torchvision(seed, B, H, W, size):
    images, boxes, flips = pixels(seed, B, H, W), boxes_in(seed, B, H, W), unit(seed, B) < 0.5
    views = augment.crop_resize(images, boxes, size, flips)
    assert views.dtype == torch.float32 and views.shape == (B, 3, *size) and views.is_contiguous()
    for image, box, flip, view in zip(images, boxes.tolist(), flips, views, strict=True):
        expected = resized_crop(image, box, size)
        assert_close(view, tv.hflip(expected) if flip else expected, atol=2e-5, rtol=0)
    assert_close(augment.crop_resize(list(images), boxes, size, flips), views, atol=2e-5, rtol=0)
    mirrored = augment.change(views, flips, lambda x: x.flip(3))
    assert_close(augment.crop_resize(images, boxes, size), mirrored, atol=0, rtol=0)


@pytest.mark.parametrize("size", [1, 24, 37])
def test_a_square_given_by_two_numbers_is_the_same_to_the_bit(size):
    images, boxes, flips = pixels(0, 5, 40, 48), boxes_in(0, 5, 40, 48), unit(0, 5) < 0.5
    for some in (images, [*images]):
        for function, more in ((augment.crop_resize, (boxes,)), (augment.center_crop_resize, ())):
            assert torch.equal(function(some, *more, size), function(some, *more, (size, size)))
    assert torch.equal(*(augment.crop_resize(images, boxes, s, flips) for s in (size, (size, size))))


def test_crop_resize_matches_pil_up_to_its_rounding():
    images, boxes = pixels(0, 8, 64, 64) // 2 + 64, boxes_in(3, 8, 64, 64)  # no overshoot, which PIL cuts off twice
    for image, box, view in zip(images, boxes.tolist(), augment.crop_resize(images, boxes, 64), strict=True):
        pil = tv.resized_crop(tv.to_pil_image(image), *box, [64, 64], InterpolationMode.BICUBIC)
        assert (tv.to_tensor(pil) - view).abs().max() <= 1.51 / 255  # PIL rounds after either direction


def test_crop_resize_takes_a_list_of_differing_sizes():
    images = [pixels(i, 1, 20 + 7 * i, 50 - 9 * i)[0] for i in range(4)]
    assert augment.sizes(torch.zeros(4, 3, 20, 50)) == (20, 50)
    assert augment.sizes(images).tolist() == [[20 + 7 * i, 50 - 9 * i] for i in range(4)]
    boxes = augment.crop_boxes(StepRandom(0, 0, 4), augment.sizes(images))
    flips = torch.tensor([True, False, True, False])
    for image, box, flip, view in zip(
        images, boxes.tolist(), flips, augment.crop_resize(images, boxes, 24, flips), strict=True
    ):
        expected = resized_crop(image, box, 24)
        assert_close(view, tv.hflip(expected) if flip else expected, atol=1e-5, rtol=0)


def test_a_list_gives_what_its_images_give_alone_whatever_their_sizes():
    """In many groups and not in the order of sizes, strips and an image of the right size among them."""
    g = torch.Generator().manual_seed(0)
    shapes = [(32, 32), (700, 600), (9, 500), *torch.randint(20, 300, (40, 2), generator=g).tolist(), (40, 2)]
    images = [pixels(i, 1, H, W)[0] for i, (H, W) in enumerate(shapes)]
    boxes, flips = augment.crop_boxes(StepRandom(0, 0, 44), shapes), unit(0, 44) < 0.5
    assert len(augment.like_sized(boxes, 2**20)) > 2
    views, centres = augment.crop_resize(images, boxes, 32, flips), augment.center_crop_resize(images, 32)
    for i, image in enumerate(images):
        s = slice(i, i + 1)
        assert_close(views[s], augment.crop_resize(image[None], boxes[s], 32, flips[s]), atol=1e-5, rtol=0)
        assert_close(centres[s], augment.center_crop_resize(image[None], 32), atol=1e-5, rtol=0)
    assert_close(centres[0], images[0] / 255, atol=1e-6, rtol=0)


@SMALL
@given(seeds, st.integers(1, 60), st.integers(1, 10**5))
def test_groups_of_like_size_fill_their_canvas_and_no_more(seed, B, most):
    boxes = boxes_in(seed, B, 100, 90)
    groups = augment.like_sized(boxes, most)
    order = [i for group in groups for i in group]
    longest = boxes[order, 2:].amax(dim=1)
    assert sorted(order) == list(range(B)) and torch.equal(longest, longest.sort().values)

    def numbers(some: list[int]) -> int:
        return 3 * len(some) * int(boxes[some, 2:].amax(dim=0).prod())

    assert all(numbers(group) <= most or len(group) == 1 for group in groups)
    assert all(numbers([*group, after[0]]) > most for group, after in itertools.pairwise(groups))


def test_a_canvas_has_every_box_in_its_corner():
    """The last box is at the end of all pixels, and lower and narrower than the canvas."""
    images, boxes = [pixels(0, 1, 9, 5)[0], pixels(1, 1, 4, 8)[0]], torch.tensor([[1, 0, 7, 5], [2, 4, 2, 4]])
    packed = augment.canvas(images, boxes)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 3, 7, 5)
    assert torch.equal(packed[0], images[0][:, 1:8]) and torch.equal(packed[1, :, :2, :4], images[1][:, 2:, 4:])


def test_more_images_of_many_sizes_need_no_more_launches():
    """A launch is an operation that computes, on torch's device of shapes without numbers as it would be on a GPU."""

    class Launches(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            alias = function._schema.returns[0].alias_info  # of a view: it has one that is not written to
            out = function(*args, **(kwargs or {}))
            self.number += getattr(out, "is_meta", False) and (alias is None or alias.is_write)
            return out

    numbers = []
    for B in (4, 64):
        images = [torch.empty(3, 30 + i, 60 - i // 2, dtype=torch.uint8, device="meta") for i in range(B)]
        boxes = augment.crop_boxes(StepRandom(0, 0, B), augment.sizes(images))
        with Launches() as launches:
            augment.crop_resize(images, boxes, 24, torch.zeros(B, dtype=torch.bool))
            augment.center_crop_resize(images, 24)
        numbers.append(launches.number)
    assert 20 < numbers[0] == numbers[1] < 200


def test_crop_resize_of_the_whole_image_is_the_image():
    images = pixels(0, 3, 16, 16)
    whole = torch.tensor([[0, 0, 16, 16]]).expand(3, -1)
    assert_close(augment.crop_resize(images, whole, 16), images.float() / 255, atol=1e-6, rtol=0)


@pytest.mark.parametrize("n, size, taps", [(64, 64, 4), (32, 64, 4), (96, 64, 6), (100, 64, 7), (128, 32, 16)])
def test_a_sample_has_as_many_taps_as_the_kernel_is_wide(n, size, taps):
    start, length, samples = torch.tensor([[0], [n], [size]])
    pixel, weight = augment.cubic_taps(start, length, samples, start, size, n / size)
    assert pixel.shape == weight.shape == (1, size, taps)


@pytest.mark.parametrize("B", [0, 31, 32, 33, 70])
def test_filtering_a_few_at_a_time_gives_what_one_at_a_time_gives(B):
    images, boxes, sigma = pixels(0, 70, 20, 24), boxes_in(0, 70, 20, 24), unit(0, 70)
    for whole, single in [
        (augment.crop_resize(images[:B], boxes[:B], 16), lambda i: augment.crop_resize(images[i], boxes[i], 16)),
        (
            augment.gaussian_blur(images[:B] / 255, sigma[:B]),
            lambda i: augment.gaussian_blur(images[i] / 255, sigma[i]),
        ),
    ]:
        assert len(whole) == B and all(torch.equal(whole[i : i + 1], single(slice(i, i + 1))) for i in range(B))


def test_crop_resize_ignores_autocast():
    images, boxes = pixels(0, 2, 16, 16), boxes_in(0, 2, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = augment.crop_resize(images, boxes, 24)
    assert torch.equal(inside, augment.crop_resize(images, boxes, 24))


ranges = st.tuples(st.floats(0.05, 1.0), st.floats(0.05, 1.0)).map(sorted)
ratios = st.tuples(st.floats(0.3, 3.0), st.floats(0.3, 3.0)).map(sorted)


@settings(max_examples=60)
@given(seeds, st.integers(1, 300), st.integers(1, 300), ranges, ratios)
@example(0, 1, 1, (0.5, 0.5), (0.5, 0.5))
@example(0, 2, 1, (0.5, 0.5), (3.0, 3.0))
@example(0, 1, 2, (0.5, 0.5), (0.3, 0.3))
def test_crop_boxes_are_those_of_torchvision_given_the_same_draws(seed, H, W, scale, ratio):
    """torchvision's get_params runs on a stand-in for torch that hands out our unit numbers."""
    B = 6
    rng = StepRandom(seed, 0, B)
    tries, place = rng.uniform(2, 10).double(), rng.uniform(2).double()
    boxes = augment.crop_boxes(StepRandom(seed, 0, B), (H, W), scale, ratio)
    assert boxes.dtype == torch.int64 and boxes.device.type == "cpu"
    for b in range(B):
        units, places = iter(tries[b].T.flatten().tolist()), iter(place[b].tolist())

        def uniform(low, high, units=units):
            u = next(units)
            return torch.tensor(float(low) + (float(high) - float(low)) * u, dtype=torch.float64)

        fake = SimpleNamespace(
            empty=lambda n, uniform=uniform: SimpleNamespace(uniform_=uniform),
            tensor=lambda x: torch.tensor(x, dtype=torch.float64),
            randint=lambda low, high, size, places=places: torch.tensor(low + math.floor(next(places) * (high - low))),
            log=torch.log,
            exp=torch.exp,
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(v1.transforms, "torch", fake)
            patch.setattr(v1.transforms.F, "get_dimensions", lambda image: (3, H, W))
            theirs = v1.RandomResizedCrop.get_params(None, scale, ratio)
        if min(theirs[2:]) > 0:
            assert tuple(boxes[b].tolist()) == theirs
        else:  # torchvision's fallback in an image of a pixel or two can be empty; ours keeps a pixel
            assert boxes[b, 2:].tolist() == [max(1, side) for side in theirs[2:]]


@SMALL
@given(seeds, st.integers(1, 500), st.integers(1, 500))
def test_crop_boxes_stay_inside(seed, H, W):
    top, left, height, width = augment.crop_boxes(StepRandom(seed, 0, 64), (H, W)).unbind(1)
    assert (top >= 0).all() and (left >= 0).all() and (height >= 1).all() and (width >= 1).all()
    assert (top + height <= H).all() and (left + width <= W).all()


@pytest.mark.parametrize("H, W", [(64, 64), (60, 100), (300, 120)])
def test_crop_boxes_are_distributed_as_torchvision_draws_them(H, W):
    """Kolmogorov-Smirnov distance of area, aspect and position between 4,000 boxes of ours and 4,000 of torchvision."""
    n, image = 4000, torch.empty(3, H, W)
    torch.manual_seed(0)
    theirs = torch.tensor([v1.RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(n)])
    ours = augment.crop_boxes(StepRandom(0, 0, n), (H, W))
    for value in (
        lambda t, s, h, w: h * w,
        lambda t, s, h, w: w / h,
        lambda t, s, h, w: (t + 0.5) / (H - h + 1),
        lambda t, s, h, w: (s + 0.5) / (W - w + 1),
    ):
        a, b = (value(*boxes.double().unbind(1)).sort().values for boxes in (ours, theirs))
        every = torch.cat([a, b])
        distance = (torch.searchsorted(a, every, right=True) - torch.searchsorted(b, every, right=True)).abs().max() / n
        assert distance < 1.95 * math.sqrt(2 / n)  # exceeded by one in a thousand


@pytest.mark.parametrize("H, W, box", [(10, 200, (0, 93, 10, 13)), (200, 10, (93, 0, 13, 10))])
def test_crop_boxes_fall_back_to_the_centre(H, W, box):
    boxes = augment.crop_boxes(StepRandom(0, 0, 5), (H, W))  # no box of a fifth of the area fits
    assert boxes.tolist() == [list(box)] * 5
    assert v1.RandomResizedCrop.get_params(torch.empty(3, H, W), [0.2, 1.0], [3 / 4, 4 / 3]) == box


@SMALL
@given(seeds, st.integers(1, 3), st.integers(1, 5))
def test_draws_of_ranks_are_rows_of_the_whole(seed, ranks, rows):
    """… though a rank does not know the sizes of the others' images."""
    total = ranks * rows
    sizes = (unit(seed, total, 2) * 100 + 1).long()

    def draw(mine: slice):
        rng = StepRandom(seed, 3, total, mine)
        return [
            augment.crop_boxes(rng, sizes[mine]),
            *augment.draw_color_jitter(rng, 0.4, 0.4, 0.2, 0.1, 0.8),
            rng.uniform(),  # what is drawn next, too
        ]

    parts = [draw(slice(r * rows, (r + 1) * rows)) for r in range(ranks)]
    for whole, *pieces in zip(draw(slice(0, total)), *parts, strict=True):
        assert torch.equal(whole, torch.cat(pieces))


@SMALL
@given(seeds, st.integers(1, 90), st.integers(1, 90), sizes)
@example(0, 64, 128, (32, 64))
@example(1, 128, 64, (32, 64))
@example(2, 32, 64, (32, 64))
@example(3, 70, 90, (224, 224))
@example(4, 70, 90, (225, 225))
def test_center_crop_resize_matches_torchvision(seed, H, W, size):
    """Of a rectangle, torchvision's Resize is told both sides: the smallest that cover the view and its margin."""
    image = pixels(seed, 1, H, W)[0]
    h, w = (round(side * 256 / 224) if max(size) <= 224 else side for side in size)
    expected = image.float() / 255
    if size != (H, W):
        whole = [h] if h == w else max([h, h * W // H], [w * H // W, w])
        expected = tv.resize(expected, whole, InterpolationMode.BICUBIC, antialias=True)
        expected = tv.center_crop(expected, [*size]).clamp(0, 1)
    assert_close(augment.center_crop_resize(image[None], size)[0], expected, atol=2e-5, rtol=0)
    assert_close(augment.center_crop_resize([image[:, :1], image], size)[1], expected, atol=2e-5, rtol=0)


@SMALL
@given(seeds, st.integers(1, 12), st.integers(1, 12), st.integers(0, 6))
def test_shift_crop_is_a_window_of_the_master(seed, H, W, p):
    """Offsets 0 and p are both reached; p + 1 is refused; two views agree exactly where they overlap."""
    B, size = 4, (H, W)
    master = unit(seed, B, 3, H + p, W + p)
    offsets = (unit(seed + 7, B, 2) * (p + 1)).long()
    offsets[0], offsets[1] = 0, p
    views = augment.shift_crop(master, offsets, size)
    for image, (down, right), view in zip(master, offsets.tolist(), views, strict=True):
        assert torch.equal(view, image[:, down : down + H, right : right + W])
    assert torch.equal(views[0], master[0, :, :H, :W]) and torch.equal(views[1], master[1, :, p:, p:])
    for b, (down, right) in enumerate(offsets.tolist()):  # against the unshifted view
        if down < H and right < W:
            assert torch.equal(views[b, :, : H - down, : W - right], master[b, :, down:H, right:W])
    with pytest.raises(IndexError):
        augment.shift_crop(master, torch.tensor([[0, p + 1]] * B), size)


# ------------------------------------------------------------------------------------------------------------- colour

ADJUST = tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue


@pytest.mark.parametrize("ours, theirs", [*zip(augment.ADJUST, ADJUST, strict=True)], ids=lambda f: f.__name__)
@given(data=st.data(), seed=seeds, B=st.integers(1, 4))
@SMALL
def test_adjustments_match_torchvision(ours, theirs, data, seed, B):
    strengths = st.floats(-0.5, 0.5, width=32) if theirs is tv.adjust_hue else st.floats(0, 3, width=32)
    images, factors = pixels(seed, B, 9, 12).float() / 255, [data.draw(strengths) for _ in range(B)]
    kept = images.clone()
    for image, factor, out in zip(
        images, factors, ours(images, torch.tensor(factors)[:, None, None, None]), strict=True
    ):
        assert_close(out, theirs(image, factor), atol=5e-6, rtol=0)
    assert torch.equal(images, kept)  # none works in place on what it was given


def test_a_hue_turned_by_whole_turns_is_what_it_was():
    images, factor = pixels(0, 4, 9, 12).float() / 255, torch.tensor([-0.4, 0.0, 0.2, 0.5])[:, None, None, None]
    for turns in (-2, 1, 3):
        assert_close(augment.adjust_hue(images, factor + turns), augment.adjust_hue(images, factor), atol=2e-5, rtol=0)


@SMALL
@given(seeds, st.integers(1, 12), st.booleans())
def test_color_jitter_matches_torchvision_in_every_image_s_own_order(seed, B, everywhere):
    images = pixels(seed, B, 8, 8).float() / 255
    jitter = augment.draw_color_jitter(StepRandom(seed, 0, B), 0.4, 0.8, 1.5, 0.5, 0.5)
    if everywhere:
        jitter = jitter._replace(where=None)
    out = augment.color_jitter(images, *jitter)
    for b in range(B):
        expected = images[b]
        if everywhere or jitter.where[b]:
            for kind in jitter.order[b].tolist():
                expected = ADJUST[kind](expected, float(jitter[1 + kind][b]))
        assert_close(out[b], expected, atol=2e-5, rtol=0)


def test_color_jitter_draws_what_torchvision_draws():
    n = 20_000
    jitter = augment.draw_color_jitter(StepRandom(1, 0, n), 0.4, 1.5, 0.2, 0.1, 0.8)
    for drawn, low, high in zip(jitter[1:5], (0.6, 0.0, 0.8, -0.1), (1.4, 2.5, 1.2, 0.1), strict=True):
        assert low <= drawn.min() < low + 0.01 * (high - low) and high - 0.01 * (high - low) < drawn.max() <= high
        assert abs(drawn.mean() - (low + high) / 2) < 0.02 * (high - low)
    orders, counts = jitter.order.unique(dim=0, return_counts=True)
    assert len(orders) == 24 and (counts / n - 1 / 24).abs().max() < 0.007  # five standard deviations
    assert abs(jitter.where.float().mean() - 0.8) < 0.015


def test_color_jitter_of_zero_strength_changes_nothing():
    images = pixels(0, 5, 8, 8).float() / 255
    jitter = augment.draw_color_jitter(StepRandom(0, 0, 5), 0, 0, 0, 0)
    assert_close(augment.color_jitter(images, *jitter), images, atol=1e-6, rtol=0)
    one = torch.ones(5, 1, 1, 1)
    for adjust in augment.ADJUST[:3]:
        assert torch.equal(adjust(images, one), images)


@SMALL
@given(seeds, st.integers(1, 6), st.integers(0, 255).map(lambda grey: grey / 255))
def test_flip_gray_and_solarize_match_torchvision_where_chosen(seed, B, threshold):
    images, where = pixels(seed, B, 7, 10).float() / 255, unit(seed, B) < 0.5
    for ours, theirs in (
        (augment.change(images, where, lambda x: x.flip(3)), tv.hflip),
        (augment.grayscale(images, where), lambda x: tv.rgb_to_grayscale(x, 3)),
        (augment.solarize(images, threshold, where), lambda x: tv.solarize(x, threshold)),
    ):
        for image, chosen, out in zip(images, where, ours, strict=True):
            assert_close(out, theirs(image) if chosen else image, atol=1e-6 if chosen else 0, rtol=0)


@SMALL
@given(seeds, st.integers(1, 5), st.integers(9, 20), st.integers(9, 20), st.booleans())
def test_gaussian_blur_matches_torchvision_where_chosen(seed, B, H, W, everywhere):
    """With taps that reach three sigma and at least six pixels, each image's own."""
    images, sigma = pixels(seed, B, H, W).float() / 255, unit(seed, B) * 2.6 + 0.05
    where = None if everywhere else unit(seed + 7, B) < 0.5
    out = augment.gaussian_blur(images, sigma, where)
    for b in range(B):
        if everywhere or where[b]:
            taps = 2 * max(6, math.ceil(3 * float(sigma[b]))) + 1
            expected = tv.gaussian_blur(images[b], [taps] * 2, [float(sigma[b])] * 2)
            assert_close(out[b], expected, atol=2e-6, rtol=0)
        else:
            assert torch.equal(out[b], images[b])


@pytest.mark.parametrize("size", [64, 224, 384, 512])
def test_gaussian_blur_is_a_gaussians_at_any_image_size(size):
    """The widest blur of the papers, 2 pixels of 224, against a convolution in float64 with taps out to eight sigma.

    Black meets white in it, where the taps that are left out matter most: by half a grey level, and by seven at 384 if
    there were always 13.
    """
    sigma = 2.0 * size / 224
    reach = math.ceil(8 * sigma)
    images = (unit(size, 2, 3, size, reach + 9) < 0.5).float()
    images[1] = (torch.arange(size) < size // 2)[:, None] != (torch.arange(reach + 9) < reach // 2)
    out = augment.gaussian_blur(images, torch.tensor([sigma, sigma]))
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1).double() / sigma).square())
    taps = taps / taps.sum()
    x = functional.pad(images.double(), [reach] * 4, mode="reflect").flatten(0, 1)[:, None]
    x = functional.conv2d(functional.conv2d(x, taps.view(1, 1, 1, -1)), taps.view(1, 1, -1, 1))
    assert 255 * (out - x.view_as(out)).abs().max() < 0.5


def test_gaussian_blur_of_an_image_does_not_depend_on_the_batch_and_without_width_changes_nothing():
    images, sigma = pixels(0, 2, 16, 16).float() / 255, torch.tensor([2.1, 4.0])
    assert torch.equal(augment.gaussian_blur(images, sigma)[:1], augment.gaussian_blur(images[:1], sigma[:1]))
    assert torch.equal(augment.gaussian_blur(images, torch.zeros(2)), images)


def test_normalize_matches_torchvision_and_denormalize_is_its_inverse():
    images = pixels(0, 3, 8, 8).float() / 255
    assert_close(augment.normalize(images), v2.functional.normalize(images, list(MEAN), list(STD)))
    assert_close(augment.denormalize(augment.normalize(images)), images, atol=1e-6, rtol=0)
    double = torch.stack([(x - m) / s for x, m, s in zip(images.double().unbind(1), MEAN, STD, strict=True)], dim=1)
    assert_close(augment.normalize(images.double()), double, atol=1e-12, rtol=0)


def test_views_are_normalised_as_those_want_for_whom_they_are_made():
    images, grey = unit(0, 2, 3, 4, 5), SimpleNamespace(mean=[0.2, 0.3, 0.4], std=[0.1, 0.5, 0.9])
    default = augment.normalize(images)
    with augment.views_for(grey):
        found = augment.normalize(images)
        assert_close(found, v2.functional.normalize(images, grey.mean, grey.std))
        assert_close(augment.denormalize(found), images)
        with augment.views_for(SimpleNamespace(mean=None, std=None)):
            assert torch.equal(augment.normalize(images), default)
        assert torch.equal(augment.normalize(images), found)
    with pytest.raises(ValueError), augment.views_for(grey):
        raise ValueError
    assert torch.equal(augment.normalize(images), default)


@pytest.mark.parametrize("size", [(64, 128), (40, 24), (32, 32), 32])
def test_crops_for_a_rectangle_have_its_aspect(size):
    """So that views of whole images of that shape are among them; of squares nothing changes, to the bit."""
    H, W = pair(size)
    within, n = (10 * H, 10 * W), 400
    with augment.views_for(SimpleNamespace(image_size=size)):
        boxes = augment.crop_boxes(StepRandom(0, 0, n), within)
    ratio = (3 / 4, 4 / 3) if H == W else (0.75 * W / H, 4 / 3 * W / H)
    assert torch.equal(boxes, augment.crop_boxes(StepRandom(0, 0, n), within, ratio=ratio))
    areas = boxes[:, 2:].prod(dim=1) / (100 * H * W)
    assert 0.9 < areas.max() <= 1 and 0.19 < areas.min() < 0.25


class Stream:
    """Images that are not in memory: number i is all i % 256, in every channel 0, 1, 2 more."""

    name, resident = "stream", False

    def __len__(self):
        return 10**5

    def batches(self, orders, device):
        for index in orders:
            grey = (index % 200).to(torch.uint8)[:, None] + torch.arange(3, dtype=torch.uint8)
            yield [x[:, None, None].expand(3, 2, 2 + i % 2) for i, x in enumerate(grey)], index


def test_statistics_of_the_channels_are_those_of_all_images_or_of_a_fixed_sample(capsys):
    def found(images):
        flat = image_cache.Packed(*image_cache.pack(images))
        named = image_sets.ImageSet("six", ["one"], torch.zeros(len(images), dtype=torch.int64), flat)
        return augment.channel_statistics(named, torch.device("cpu"))

    alike = pixels(3, 300, 9, 5)
    x = alike.double().div(255).transpose(0, 1).flatten(1)
    mean, std = found([*alike])
    assert_close(
        torch.tensor([mean, std]).double(), torch.stack([x.mean(1), x.std(1, correction=0)]), atol=1e-6, rtol=0
    )
    assert "six: mean" in capsys.readouterr().err
    some = [pixels(4, 1, 9, 5)[0], pixels(5, 1, 3, 2)[0]]  # each image counts alike, whatever its size
    first, second = (image.double().div(255).flatten(1) for image in some)
    mean = (first.mean(1) + second.mean(1)) / 2
    square = (first.square().mean(1) + second.square().mean(1)) / 2
    wanted = torch.stack([mean, (square - mean.square()).sqrt()])
    assert_close(torch.tensor(found(some)).double(), wanted, atol=1e-6, rtol=0)
    at = torch.linspace(0, 10**5 - 1, 4096).round() % 200
    mean, std = augment.channel_statistics(Stream(), torch.device("cpu"))
    for channel in range(3):
        assert mean[channel] == pytest.approx(((at + channel).mean() / 255).item(), abs=2e-3)
        assert std[channel] == pytest.approx((at.std() / 255).item(), abs=2e-3)
    with pytest.raises(InputError, match=r"six: a channel of its images is the same everywhere; give --mean and --std"):
        found([torch.full((3, 4, 4), 7, dtype=torch.uint8)])


def all_kinds(images, boxes, flips, jitter, where, sigma, offsets):
    x = augment.shift_crop(augment.crop_resize(images, boxes, 40, flips), offsets, 32)
    x = augment.grayscale(augment.color_jitter(x, *jitter), where)
    return augment.normalize(augment.solarize(augment.gaussian_blur(x, sigma, where), 0.5, where.logical_not()))


@pytest.mark.parametrize("where_on", ["cpu", "meta"])
def test_all_is_computed_where_the_images_are(where_on):
    """On torch's device of shapes without numbers, where a tensor of the CPU's is refused as it is beside a GPU's."""
    rng, images = StepRandom(0, 0, 4), torch.empty(4, 3, 40, 48, dtype=torch.uint8, device="meta")
    boxes, jitter = augment.crop_boxes(rng, (40, 48)), augment.draw_color_jitter(rng, 0.4, 0.4, 0.4, 0.1, 0.8)
    flips, where = rng.chance(0.5), rng.chance(0.5).to(where_on)
    for given_as in (images, list(images)):
        views = all_kinds(given_as, boxes, flips, jitter, where, rng.uniform(), rng.integers(0, 9, 2))
        assert augment.denormalize(views).device.type == "meta" and views.shape == (4, 3, 32, 32)
    there = StepRandom(0, 0, 4, device="meta")
    jitter = augment.draw_color_jitter(there, 0.4, 0.4, 0.4, 0.1)
    assert augment.crop_boxes(there, (40, 48)).device == jitter.order.device == jitter.where.device == rng.device
    assert jitter.hue.device == there.device


@pytest.mark.parametrize("given_as, number", [(torch.clone, 11), (list, 13)])
def test_what_goes_to_another_device_goes_by_upload(given_as, number, monkeypatch):
    """That is, by pinned memory, without waiting for the GPU."""
    rng, images, by = StepRandom(0, 0, 4), torch.empty(4, 3, 40, 48, dtype=torch.uint8, device="meta"), []
    plain = torch.Tensor.to

    def to(x, *where, **how):
        moved = plain(x, *where, **how)
        if moved.device != x.device:
            by.append(sys._getframe(1).f_code.co_name)
        return moved

    monkeypatch.setattr(torch.Tensor, "to", to)
    boxes, jitter = augment.crop_boxes(rng, (40, 48)), augment.draw_color_jitter(rng, 0.4, 0.4, 0.4, 0.1, 0.8)
    images, offsets = given_as(images), rng.integers(0, 9, 2)
    all_kinds(images, boxes, rng.chance(0.5), jitter, rng.chance(0.5), rng.uniform(), offsets)
    assert set(by) == {"upload"} and len(by) == number


class OnAGPU(torch.Tensor):
    """A tensor that says so."""

    device = torch.device("cuda")


@SMALL
@given(seeds, st.integers(1, 6))
def test_a_choice_on_the_cpu_computes_the_chosen_and_one_on_a_gpu_all(seed, B):
    images, where, factor = unit(seed, B, 3, 5, 7), unit(seed, B) < 0.5, unit(seed + 1, B)[:, None, None, None]
    computed = []

    def multiply(x, factor):
        computed.append(len(x))
        return x * factor

    here = augment.change(images, where, multiply, factor)
    there = augment.change(images, where.as_subclass(OnAGPU), multiply, factor)
    expected = torch.stack(
        [image * f if chosen else image for image, f, chosen in zip(images, factor, where, strict=True)]
    )
    assert torch.equal(here, expected) and torch.equal(torch.Tensor(there), expected)
    assert computed == [where.sum(), B]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA finds none")
@pytest.mark.parametrize("shape", [(3, 3024, 4032), (3, 2600, 2600), (3, 50, 9000)])
def test_a_gpu_takes_large_photos(shape):
    """A pixel of the view is made of hundreds in each direction; torch's own CUDA kernel would refuse that."""
    photo = torch.randint(0, 256, shape, dtype=torch.uint8)
    boxes = torch.tensor([[0, 0, *shape[1:]]])
    for function in (lambda x: augment.crop_resize([x], boxes, 64), lambda x: augment.center_crop_resize([x], 32)):
        close = dict(atol=1e-4, rtol=0)
        torch.testing.assert_close(function(photo.cuda()).cpu(), function(photo), **close)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA finds none")
@pytest.mark.parametrize("where_on", ["cpu", "cuda"])
def test_a_gpu_gives_what_the_cpu_gives_without_waiting(where_on):
    """A synchronisation inside would raise. TF32 and autocast are on, and must not matter."""
    images, B = pixels(0, 32, 40, 48), 32
    rng = StepRandom(0, 0, B)
    boxes, flips, where = augment.crop_boxes(rng, (40, 48)), rng.chance(0.5), rng.chance(0.5)
    jitter, sigma, offsets = (
        augment.draw_color_jitter(rng, 0.4, 0.4, 0.4, 0.1, 0.8),
        rng.uniform(),
        rng.integers(0, 9, 2),
    )

    here = all_kinds(images, boxes, flips, jitter, where, sigma, offsets)
    batches = images.cuda(), list(images.cuda())
    there = boxes, flips.cuda(), jitter, where.to(where_on), sigma, offsets.cuda()
    torch.set_float32_matmul_precision("high")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            outs = [all_kinds(given_as, *there) for given_as in batches]
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.set_float32_matmul_precision("highest")
    for out in outs:
        assert (out.cpu() - here).abs().flatten().quantile(0.999) < 1e-4  # a value at solarize's threshold may tip over
