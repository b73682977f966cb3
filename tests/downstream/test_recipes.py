"""The recipes are the papers' tables, and what they do to images is what plain loops do, image by image."""

import math
import statistics
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small import CALM, CPU, RICH, Images, classifier_of
from timm.data import auto_augment
from torch import nn
from torchvision.transforms import v2

from common import StepRandom
from downstream import dense_recipes, recipes, training_loop
from downstream.recipes import recipe_for
from inputs import augment
from runtime.errors import InputError
from runtime.randomness import epoch_order


def test_recipes_are_the_papers_tables():
    """Peak rates as printed: CAE's Appendix, ConMIM's Table 11 and script, MAE's blr, LC-MAE's §5."""
    peaks = {
        ("mae", "finetune"): 2e-3, ("cmae", "finetune"): 2e-3, ("cmae-1600", "finetune"): 1e-3,
        ("cae", "finetune"): 8e-3, ("cae-small", "finetune"): 1.6e-2, ("cae-large", "finetune"): 2e-3,
        ("mae-large", "finetune"): 4e-3,
        ("conmim", "finetune"): 4e-3, ("conmim-small", "finetune"): 4e-3, ("lcmae", "finetune"): 4e-3,
        ("cae", "linear"): 6.4, ("mae", "linear"): 6.4, ("cae", "attentive"): 0.4,
    }  # fmt: skip
    for (name, protocol), peak in peaks.items():
        assert recipe_for(name, protocol).peak == pytest.approx(peak), (name, protocol)
    shapes = {
        "mae": (100, 5, 0.65), "cae-small": (200, 5, 0.75), "cae-large": (50, 5, 0.75), "conmim": (100, 20, 0.65),
        "conmim-small": (200, 5, 0.8), "lcmae": (100, 5, 0.75), "cmae_loc": (100, 5, 0.65),
        "mae-large": (50, 5, 0.75),
    }  # fmt: skip
    for name, shape in shapes.items():
        recipe = recipe_for(name, "finetune")
        assert (recipe.epochs, recipe.warmup_epochs, recipe.layer_decay) == shape
        assert (recipe.mixup, recipe.cutmix, recipe.smoothing, recipe.erase) == (0.8, 1.0, 0.1, 0.25)
        drop_path = 0.2 if name.endswith("large") else 0.1
        assert (recipe.randaugment, recipe.drop_path, recipe.weight_decay) == (9, drop_path, 0.05)
        assert (recipe.positions == "learned") == name.startswith("mae")
    for protocol in ("linear", "attentive"):
        recipe = recipe_for("cae", protocol)
        assert (recipe.epochs, recipe.warmup_epochs, recipe.weight_decay, recipe.crop_scale) == (90, 10, 0, 0.08)
        assert not any((recipe.mixup, recipe.cutmix, recipe.smoothing, recipe.erase, recipe.randaugment))


def test_what_is_given_goes_before_the_recipe_and_the_warm_up_shrinks_with_the_epochs():
    recipe = recipe_for("mae", "finetune", given=dict(epochs=20, batch_size=512, mixup=0.0))
    assert (recipe.epochs, recipe.warmup_epochs, recipe.peak, recipe.mixup, recipe.cutmix) == (20, 1, 1e-3, 0, 1)
    assert recipe_for("mae", "finetune", given=dict(lr=0.5)).peak == 0.5
    assert recipe_for("mae", "finetune", given=dict(epochs=20, warmup_epochs=4.0)).warmup_epochs == 4


def test_partial_of_no_block_follows_the_linear_recipe_and_supervised_learns_alike_in_all_layers():
    assert recipe_for("mae", "partial", 0) == recipe_for("mae", "linear")
    assert recipe_for("mae", "partial", 1) == recipe_for("mae", "finetune")
    assert recipe_for("mae", "supervised") == replace(recipe_for("mae", "finetune"), layer_decay=1.0)
    assert recipe_for("mae", "supervised", given=dict(layer_decay=0.5)).layer_decay == 0.5


WRONG = {
    "recipe 'mea': unknown; choose one of mae": dict(name="mea"),
    "epochs 0: must be 1 or more": dict(given=dict(epochs=0)),
    "smoothing 1: must be from 0 to below 1": dict(given=dict(smoothing=1.0)),
    "randaugment 11: must be from 0 to 10": dict(given=dict(randaugment=11)),
    "mixup -1: must be 0 or more": dict(given=dict(mixup=-1.0)),
    "lr nan": dict(given=dict(lr=math.nan)),
    "warmup epochs 200: must be at most the 100 epochs": dict(given=dict(warmup_epochs=200.0)),
    "optimizer 'adam': unknown; choose adamw, lars or sgd": dict(given=dict(optimizer="adam")),
    "norm 'new': unknown": dict(given=dict(norm="new")),
    "--layer-decay: does nothing to protocol linear": dict(protocol="linear", given=dict(layer_decay=0.5)),
    "--features: does nothing to protocol attentive": dict(protocol="attentive", given=dict(features="cls")),
    "--attend-cls: does nothing to protocol finetune": dict(given=dict(attend_cls=True)),
    "--base-lr: does nothing beside --lr": dict(given=dict(lr=1e-3, base_lr=1e-3)),
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_recipe_is_refused_in_one_line(words):
    with pytest.raises(InputError, match=words) as error:
        recipe_for(**dict(name="mae", protocol="finetune") | WRONG[words])
    assert "\n" not in str(error.value)


def labels(n: int, classes: int = 5) -> torch.Tensor:
    return nn.functional.one_hot(torch.arange(n) % classes, classes).float()


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32), mixup=st.sampled_from([0.0, 0.8]), cutmix=st.sampled_from([0.0, 1.0]))
def test_mixing_and_its_labels_are_the_plain_loops(seed, mixup, cutmix):
    n, H, W = 8, 6, 10
    images, y = torch.rand(n, 3, H, W), labels(n)
    found, targets = recipes.mix(images, y, StepRandom(seed, 3, n), mixup, cutmix)
    draw = np.random.default_rng((seed, 3))  # the draws of a StepRandom, in the order of mix
    if mixup or cutmix:
        cut = draw.random(n) < (0.5 if mixup and cutmix else cutmix > 0)
        soft, hard = (draw.beta(a or 1, a or 1, n).astype(np.float32) for a in (mixup, cutmix))
        center = draw.random((n, 2), dtype=np.float32)
    x, y = images.double().numpy(), y.double().numpy()
    for i in range(n):
        pair, other = i - i % 2, i + 1 - 2 * (i % 2)
        expected, share = x[i].copy(), 1.0
        if (mixup or cutmix) and cut[pair]:
            half = 0.5 * math.sqrt(1 - float(hard[pair]))
            row, column, h, w = int(center[pair, 0] * H), int(center[pair, 1] * W), int(half * H), int(half * W)
            lost = 0
            for r in range(max(0, row - h), min(H, row + h)):
                for c in range(max(0, column - w), min(W, column + w)):
                    expected[:, r, c] = x[other][:, r, c]
                    lost += 1
            share = 1 - lost / (H * W)
        elif mixup or cutmix:
            share = float(soft[pair])
            expected = share * x[i] + (1 - share) * x[other]
        np.testing.assert_allclose(found[i], expected, atol=1e-6)
        np.testing.assert_allclose(targets[i], share * y[i] + (1 - share) * y[other], atol=1e-6)


def test_smoothing_and_mixed_labels_make_the_loss_of_the_plain_loop():
    """The mean over an epoch's two steps, as it is logged, from logits of a head that hardly learns."""
    recipe = replace(CALM, epochs=1, warmup_epochs=0.0, batch_size=12, mixup=0.8, smoothing=0.1, lr=1e-9)
    classifier, images, expected = classifier_of("finetune", recipe), Images(), 0.0
    for step, rows in enumerate(epoch_order(0, 0, 24).split(12)):
        draws = StepRandom(0, step, 12)
        x, y = recipes.augmented(images.pixels[rows], images.labels[rows], 3, recipe, 16, draws, False)
        scores = classifier.eval().logits(x).detach().double().numpy()
        for row, target in zip(scores, y.double().numpy(), strict=True):
            smooth = 0.9 * target + 0.1 / 3
            expected -= (smooth * (row - np.log(np.exp(row).sum()))).sum() / 24
    losses = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_loop.Progress, "end_epoch", lambda self, row, last: losses.append(row["loss"]))
        training_loop.train(classifier, images, 3, recipe, CPU)
    assert losses == [pytest.approx(expected, rel=1e-5)]


def test_an_erased_box_has_its_shape_and_share_and_noise_of_one_sheet():
    images = torch.full((400, 3, 20, 30), 7.0)
    found = recipes.erase(images, StepRandom(0, 0, 400), 0.25)
    gone = (found != 7).all(dim=1)
    assert torch.equal(gone, (found != 7).any(dim=1))
    sheet, boxes = torch.zeros(3, 20, 30), 0
    for image, where in zip(found, gone, strict=True):
        if not where.any():
            continue
        boxes += 1
        rows, columns = where.any(dim=1).nonzero()[:, 0], where.any(dim=0).nonzero()[:, 0]
        h, w = len(rows), len(columns)
        assert where.sum() == h * w == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        assert 0.015 < h * w / 600 < 0.37 and 0.2 < h / w < 5
        clash = where & (sheet != 0).all(dim=0)
        assert torch.equal(sheet[:, clash], image[:, clash])
        sheet[:, where] = image[:, where]
    assert 70 < boxes < 130
    assert abs(sheet.mean()) < 0.1 and abs(sheet.std() - 1) < 0.1 and not torch.equal(sheet[0], sheet[1])
    next_step = recipes.erase(images, StepRandom(0, 1, 400), 0.25)
    both = (found != 7) & (next_step != 7)
    assert both.any() and not torch.equal(found[both], next_step[both])


def _smooth(n=4, size=(32, 32)):
    """Images of whole grey levels between which every cubic interpolates alike."""
    y, x = torch.meshgrid(*map(torch.arange, size), indexing="ij")
    waves = [torch.stack([(x * a + y * b) / 12 + c + i for a, b, c in ((1, 1, 0), (1, -1, 2), (0.5, 2, 4))])
             for i in range(n)]  # fmt: skip
    return ((torch.stack(waves).sin() * 0.45 + 0.5) * 255).round() / 255


@pytest.mark.parametrize("size", [(32, 32), (32, 64)], ids=str)
@pytest.mark.parametrize("name", recipes.OPERATIONS)
def test_randaugments_operations_are_timms(name, size, monkeypatch):
    """Within rounding to grey levels; geometry on smooth images, apart from the pixels on the border of the fill."""
    assert list(recipes.OPERATIONS) == auto_augment.rand_augment_choices("", increasing=True)
    images, (signs, strengths) = _smooth(4, size), ([1, -1, 1, -1], [0.9, 0.87, 0.3, 0.99])
    m, sign = (torch.tensor(x).float()[:, None, None, None] for x in (strengths, signs))
    found = recipes.OPERATIONS[name](images, m, sign)
    fill = tuple(round(255 * x) for x in augment.MEAN)
    for image, mine, s, level in zip(images, found, signs, m.flatten().tolist(), strict=True):
        monkeypatch.setattr(auto_augment, "_randomly_negate", lambda v, s=s: s * v)
        strength = auto_augment.LEVEL_TO_ARG[name]
        arguments = strength(10 * level, {}) if strength else ()
        picture = auto_augment.NAME_TO_OP[name](
            v2.functional.to_pil_image(image), *arguments, fillcolor=fill, resample=Image.Resampling.BICUBIC
        )
        off = (255 * mine - torch.tensor(np.array(picture)).permute(2, 0, 1)).abs().amax(dim=0)
        assert (off > 2.5).float().mean() < (0.03 if name[:5] in ("Rotat", "Shear", "Trans") else 1e-9), (level, off)


def test_randaugment_draws_two_operations_strengths_and_signs_for_each_image():
    """A plain loop over the images, with the generator's draws in their order."""
    images = _smooth(60)
    found = recipes.rand_augment(images, StepRandom(3, 0, 60), 9)
    draw = np.random.default_rng((3, 0))
    kinds = draw.integers(0, 15, (60, 2))
    chances, units, halves = (draw.random((60, 2), dtype=np.float32) for _ in range(3))
    untouched = 0
    for i, image in enumerate(images):
        expected = image[None]
        for place in range(2):
            if chances[i, place] < 0.5:
                tenths = min(10, max(0, statistics.NormalDist(9, 0.5).inv_cdf(float(units[i, place]))))
                m, sign = (torch.full((1, 1, 1, 1), x) for x in (tenths / 10, -1.0 if halves[i, place] < 0.5 else 1.0))
                expected = list(recipes.OPERATIONS.values())[kinds[i, place]](expected, m, sign)
        torch.testing.assert_close(found[i], expected[0], rtol=0, atol=1e-3)
        untouched += torch.equal(found[i], image)
    assert 5 < untouched < 28  # a quarter of them, as well as those that an operation leaves as they were
    assert torch.equal(images, _smooth(60))


def test_a_probes_crop_is_drawn_once_and_cut_down_to_the_image():
    H, W, n = 20, 50, 500
    found = recipes.single_boxes(StepRandom(5, 1, n), (H, W), (0.08, 1.0)).tolist()
    draws = np.random.default_rng((5, 1)).random((n, 4), dtype=np.float32).astype(np.float64)
    cut = 0
    for (top, left, h, w), (area, aspect, down, right) in zip(found, draws, strict=True):
        target = H * W * (0.08 + 0.92 * area)
        ratio = math.exp(math.log(3 / 4) + aspect * (math.log(4 / 3) - math.log(3 / 4)))
        height, width = round(math.sqrt(target / ratio)), round(math.sqrt(target * ratio))
        cut += height > H
        assert (h, w) == (min(height, H), min(width, W))
        assert (top, left) == (int(down * (H - h + 1)), int(right * (W - w + 1)))
    assert cut > 50  # torchvision's would have drawn these again


def test_a_probes_crop_for_a_rectangle_has_its_aspect():
    with augment.views_for(SimpleNamespace(image_size=(20, 50))):
        boxes = recipes.single_boxes(StepRandom(5, 1, 500), (200, 500), (0.2, 1.0)).double()
    aspects, areas = boxes[:, 3] / boxes[:, 2], boxes[:, 2:].prod(dim=1) / 1e5
    assert 1.8 < aspects.min() < 2 < 3 < aspects.max() < 3.4 and areas.max() > 0.95


def test_probes_crop_by_one_draw_tuning_by_ten_and_half_of_the_views_are_mirrored(monkeypatch):
    used, crop_resize = [], augment.crop_resize
    monkeypatch.setattr(augment, "crop_resize", lambda *args: used.append(args) or crop_resize(*args))
    images = torch.zeros(200, 3, 16, 24, dtype=torch.uint8)
    for probe, draw in ((True, recipes.single_boxes), (False, augment.crop_boxes)):
        recipes.augmented(
            images, torch.zeros(200).long(), 3, replace(CALM, crop_scale=0.2), 16, StepRandom(1, 2, 200), probe
        )
        _, boxes, size, mirrored = used.pop()
        assert torch.equal(boxes, draw(StepRandom(1, 2, 200), (16, 24), (0.2, 1.0)))
        assert size == 16 and 75 < mirrored.sum() < 125


def test_without_crops_an_image_is_seen_as_in_validation():
    images, y = Images(4).pixels, Images(4).labels
    x, targets = recipes.augmented(images, y, 3, CALM, 16, StepRandom(1, 2, 4), True)
    assert torch.equal(x, augment.normalize(images.float() / 255))
    assert torch.equal(targets, nn.functional.one_hot(y, 3).float())


def test_an_images_part_does_not_depend_on_who_prepares_it():
    images, y = Images(8).pixels, Images(8).labels
    for probe in (False, True):
        state = torch.get_rng_state()
        whole = recipes.augmented(images, y, 3, RICH, 16, StepRandom(1, 2, 8), probe)
        assert torch.equal(state, torch.get_rng_state())
        parts = []
        for rows in (slice(0, 2), slice(2, 8)):
            parts.append(recipes.augmented(images[rows], y[rows], 3, RICH, 16, StepRandom(1, 2, 8, rows), probe))
        for one, halves in zip(whole, zip(*parts, strict=True), strict=True):
            torch.testing.assert_close(one, torch.cat(halves), rtol=1e-5, atol=1e-5)


def test_an_image_is_erased_with_the_chance_of_its_recipe():
    images, y = Images(64).pixels, Images(64).labels
    plain, often, always = (
        recipes.augmented(images, y, 3, replace(CALM, erase=chance), 16, StepRandom(1, 2, 64), False)[0]
        for chance in (0.0, 0.6, 1.0)
    )
    assert 26 < (often != plain).flatten(1).any(dim=1).sum() < 51 and (always != plain).flatten(1).any(dim=1).all()
    assert torch.equal(always, recipes.erase(plain, StepRandom(1, 2, 64), 1.0))  # after normalisation


def test_whatever_changes_images_or_mixes_them_augments():
    assert not CALM.augments  # and what a frozen encoder makes of them may be kept
    for change in (dict(crop_scale=0.5), dict(randaugment=1), dict(erase=0.5), dict(mixup=0.5), dict(cutmix=0.5)):
        assert replace(CALM, **change).augments, change


def test_dense_recipes_are_as_printed():
    """CAE's Appendix A, ConMIM's Tables 12 and 13, CMAE §4.3."""
    found = {name: dense_recipes.recipe_for(name, {})[2] for name in dense_recipes.RECIPES}
    coco = {n: (r.epochs, r.batch_size, r.lr, r.weight_decay, r.decay_at) for n, r in found.items() if not r.steps}
    assert coco["cae-coco"] == (12, 32, 3e-4, 0.05, (9, 11)) and coco["cae-large-coco"][2] == 2e-4
    assert coco["conmim-coco"] == (25, 64, 1e-4, 0.1, ()) and coco["cmae-coco"] == (100, 64, 1e-4, 0.1, ())
    ade = {n: (r.steps, r.batch_size, r.head, r.layer_decay, r.drop_path) for n, r in found.items() if r.steps}
    assert ade["cae-ade20k"] == ade["cmae-ade20k"] == (160_000, 16, "upernet", 0.65, 0.1)
    assert ade["cae-large-ade20k"] == (160_000, 16, "upernet", 0.95, 0.15)
    assert ade["conmim-ade20k"] == (160_000, 16, "upernet", 0.9, 0.1) and coco.keys() | ade.keys() == found.keys()
