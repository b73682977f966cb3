"""Probes and fine-tuning: every formula against a plain loop, what learns and what does not, restarts, ranks."""

import copy
import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.transforms import v2

import evaluate
from common import StepRandom, ViT
from downstream import finetuning
from downstream.finetuning import Classifier, Recipe, recipe_for, trainable_parameters
from inputs import augment
from runtime import files, process
from runtime.errors import InputError

CPU = torch.device("cpu")
SMALL = dict(epochs=2, warmup_epochs=1.0, batch_size=8, base_lr=0.03, drop_path=0.0, crop_scale=0.0, head_std=0.01)
CALM = Recipe(**finetuning.CALM | SMALL)
RICH = replace(CALM, mixup=0.8, cutmix=1.0, smoothing=0.1, erase=0.5, randaugment=9, crop_scale=0.3, layer_decay=0.7)


def small_vit(**options) -> ViT:
    torch.manual_seed(0)
    vit = ViT(**dict(image_size=16, patch_size=8, width=8, depth=2, heads=2) | options)
    for p in vit.parameters():  # nothing that is zero or one by chance of birth
        p.data += 0.1 * torch.randn_like(p)
    return vit.eval()


class Images:
    """What finetuning.py asks of a data.ImageSet: n noisy images, of classes that differ by their colour."""

    name, classes = "fake", ["a", "b", "c"]

    def __init__(self, n: int = 24, size: int = 16, seed: int = 0):
        draw = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(n) % 3
        self.pixels = torch.randint(0, 150, (n, 3, size, size), generator=draw, dtype=torch.uint8)
        self.pixels[torch.arange(n), self.labels] += 100

    def __len__(self):
        return len(self.labels)

    def batches(self, orders, device):
        yield from ((self.pixels[order], order) for order in orders)


def classifier_of(protocol: str, recipe: Recipe = CALM, blocks: int = 1, encoder: ViT | None = None, seed: int = 0):
    return Classifier(encoder or small_vit(), recipe, 3, protocol, blocks, seed)


def trained(protocol: str, recipe: Recipe = CALM, blocks: int = 1, source=None, encoder=None, **options) -> Classifier:
    classifier = classifier_of(protocol, recipe, blocks, encoder)
    finetuning.train(classifier, source or Images(), 3, recipe, CPU, **options)
    return classifier


def same(a: nn.Module, b: nn.Module) -> bool:
    b = b.state_dict()
    return all(torch.equal(value, b[name]) for name, value in a.state_dict().items())


# --------------------------------------------------------------------------------------------------------- recipes


def test_recipes_are_the_papers_tables():
    """Peak rates as printed: CAE's Appendix, ConMIM's Table 11 and script, MAE's blr, LC-MAE's §5."""
    peaks = {
        ("mae", "finetune"): 2e-3, ("cmae", "finetune"): 2e-3, ("cmae-1600", "finetune"): 1e-3,
        ("cae", "finetune"): 8e-3, ("cae-small", "finetune"): 1.6e-2, ("cae-large", "finetune"): 2e-3,
        ("conmim", "finetune"): 4e-3, ("conmim-small", "finetune"): 4e-3, ("lcmae", "finetune"): 4e-3,
        ("cae", "linear"): 6.4, ("mae", "linear"): 6.4, ("cae", "attentive"): 0.4,
    }  # fmt: skip
    for (name, protocol), peak in peaks.items():
        assert recipe_for(name, protocol).peak == pytest.approx(peak), (name, protocol)
    shapes = {
        "mae": (100, 5, 0.65), "cae-small": (200, 5, 0.75), "cae-large": (50, 5, 0.75), "conmim": (100, 20, 0.65),
        "conmim-small": (200, 5, 0.8), "lcmae": (100, 5, 0.65), "cmae_loc": (100, 5, 0.65),
    }  # fmt: skip
    for name, shape in shapes.items():
        recipe = recipe_for(name, "finetune")
        assert (recipe.epochs, recipe.warmup_epochs, recipe.layer_decay) == shape
        assert (recipe.mixup, recipe.cutmix, recipe.smoothing, recipe.erase) == (0.8, 1.0, 0.1, 0.25)
        assert (recipe.randaugment, recipe.drop_path, recipe.weight_decay) == (9, 0.1, 0.05)
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


WRONG = {
    "recipe 'mea': unknown; choose one of mae": dict(name="mea"),
    "--epochs 0: must be at least 1": dict(given=dict(epochs=0)),
    "--smoothing 1: must be in": dict(given=dict(smoothing=1.0)),
    "--randaugment 11: must be in 0 … 10": dict(given=dict(randaugment=11)),
    "--mixup -1: must be at least 0": dict(given=dict(mixup=-1.0)),
    "--lr nan": dict(given=dict(lr=math.nan)),
    "--warmup-epochs 200: must be in 0 … 100": dict(given=dict(warmup_epochs=200.0)),
    "--optimizer 'adam': unknown; choose one of adamw": dict(given=dict(optimizer="adam")),
    "--norm 'new': unknown": dict(given=dict(norm="new")),
    "--layer-decay: does nothing to protocol linear": dict(protocol="linear", given=dict(layer_decay=0.5)),
    "--features: does nothing to protocol attentive": dict(protocol="attentive", given=dict(features="cls")),
    "--attend-cls: does nothing to protocol finetune": dict(given=dict(attend_cls=True)),
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_recipe_is_refused_in_one_line(words):
    with pytest.raises(InputError, match=words) as error:
        recipe_for(**dict(name="mae", protocol="finetune") | WRONG[words])
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------------- heads


def test_batch_norm_is_torchs_in_training_and_afterwards():
    mine, torchs = finetuning.BatchNorm(5, eps=1e-2), nn.BatchNorm1d(5, eps=1e-2, affine=False)
    for seed in range(3):
        torch.manual_seed(seed)
        a = (3 * torch.randn(4, 5) + 1).requires_grad_()
        b = a.detach().clone().requires_grad_()
        weights = torch.randn(4, 5)
        (mine(a) * weights).sum().backward()
        (torchs(b) * weights).sum().backward()
        torch.testing.assert_close(mine(a), torchs(b))
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    mine.eval(), torchs.eval()
    torch.testing.assert_close(mine(a), torchs(b))


@pytest.mark.parametrize("heads, tokens", [(1, 5), (2, 4), (4, 1)])
def test_the_attentive_probe_is_a_plain_cross_attention(heads, tokens):
    torch.manual_seed(heads)
    head = finetuning.AttentiveHead(8, heads, 3)
    assert not head.query.any()  # CAE's start
    for p in head.parameters():
        nn.init.normal_(p, std=0.7)
    x = torch.randn(6, tokens, 8)
    w = {name: p.detach().double().numpy() for name, p in head.named_parameters()}
    d, pooled = 8 // heads, []
    query = w["q.weight"] @ w["query"][0] + w["q.bias"]
    for image in x.double().numpy():
        keys = [w["k.weight"] @ token for token in image]
        values = [w["v.weight"] @ token + w["v.bias"] for token in image]
        parts = []
        for h in range(heads):
            own = slice(h * d, (h + 1) * d)
            scores = np.array([query[own] @ key[own] / math.sqrt(d) for key in keys])
            shares = np.exp(scores) / np.exp(scores).sum()
            parts.append(sum(share * value[own] for share, value in zip(shares, values, strict=True)))
        pooled.append(w["proj.weight"] @ np.concatenate(parts) + w["proj.bias"])
    pooled = np.array(pooled)

    def out(mean, variance):
        return (pooled - mean) / np.sqrt(variance + 1e-5) @ w["out.weight"].T + w["out.bias"]

    np.testing.assert_allclose(head(x).detach(), out(pooled.mean(0), pooled.var(0)), rtol=1e-3, atol=1e-3)
    head.eval()  # from zero and one, a tenth of the way to the batch's
    mean, variance = 0.1 * pooled.mean(0), 0.9 + 0.1 * pooled.var(0, ddof=1)
    np.testing.assert_allclose(head(x).detach(), out(mean, variance), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("protocol", ["linear", "attentive"])
def test_what_a_probe_says_of_an_image_does_not_depend_on_its_company(protocol):
    classifier, images = trained(protocol), torch.randn(5, 3, 16, 16)
    together = classifier.logits(images)
    alone = torch.cat([classifier.logits(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert together.std(dim=0).min() > 1e-4


def test_the_attentive_probe_sees_patches_and_the_class_token_only_if_asked_to():
    encoder, images = small_vit(), torch.randn(2, 3, 16, 16)
    tokens = encoder(images)
    for attend_cls, seen in ((False, tokens[:, 1:]), (True, tokens)):
        found = classifier_of("attentive", replace(CALM, attend_cls=attend_cls), encoder=encoder).frozen(images)
        torch.testing.assert_close(found, seen)


@pytest.mark.parametrize("positions", ["sincos", "relative"])
@pytest.mark.parametrize("features", ["mean", "cls"])
def test_a_linear_head_stands_on_the_final_norm_and_a_tuned_one_brings_its_own(features, positions):
    encoder, images = small_vit(positions=positions), torch.randn(3, 3, 16, 16)
    recipe = replace(CALM, features=features, norm="pretrained")

    def pool(x):
        return x[:, 0] if features == "cls" else x[:, 1:].mean(dim=1)

    torch.testing.assert_close(classifier_of("linear", recipe, encoder=encoder).frozen(images), pool(encoder(images)))
    for protocol, blocks in (("partial", 1), ("partial", 2), ("finetune", 1)):
        head = (classifier := classifier_of(protocol, recipe, blocks, encoder)).eval().head
        expected = head.out(encoder.norm(pool(encoder(images, norm=False))))
        torch.testing.assert_close(classifier.logits(images), expected)
        fresh = classifier_of(protocol, replace(recipe, norm="fresh"), blocks, encoder).head.norm
        assert torch.equal(fresh.weight, torch.ones(8)) and not fresh.bias.any()


# ------------------------------------------------------------------------------------------------------ what learns


def names(protocol: str, blocks: int = 1, **options) -> set[str]:
    return set(trainable_parameters(classifier_of(protocol, blocks=blocks, encoder=small_vit(**options))))


def test_what_learns_under_each_protocol():
    encoder = {name for name, _ in small_vit().named_parameters()} - {"norm.weight", "norm.bias"}
    block = {k: {"encoder." + name for name in encoder if name.startswith(f"blocks.{k}.")} for k in (0, 1)}
    head = {"head.out.weight", "head.out.bias"}
    tuned = head | {"head.norm.weight", "head.norm.bias"}
    assert names("linear") == names("partial", 0) == head
    assert names("partial", 1) == tuned | block[1]
    assert names("partial", 2) == names("finetune") == names("supervised") == tuned | {"encoder." + n for n in encoder}
    attention = "query q.weight q.bias k.weight v.weight v.bias proj.weight proj.bias".split()
    assert names("attentive") == head | {"head." + name for name in attention}
    assert "encoder.relative_table" in names("partial", 2, positions="relative")
    assert "encoder.relative_table" not in names("partial", 1, positions="relative")


PROTOCOLS = [("linear", 1), ("attentive", 1), ("partial", 1), ("finetune", 1)]


@pytest.mark.parametrize("protocol, blocks", [*PROTOCOLS, ("partial", 0)])
def test_what_is_frozen_keeps_its_bits_and_all_else_moves(protocol, blocks):
    recipe = replace(CALM, drop_path=0.3)
    before, after = classifier_of(protocol, recipe, blocks), trained(protocol, recipe, blocks)
    learns, old = trainable_parameters(before), before.state_dict()
    for name, value in after.state_dict().items():
        moves = name in learns or name in ("head.norm.mean", "head.norm.variance")
        assert torch.equal(old[name], value) != moves, name


def test_partial_fine_tuning_is_the_probe_at_one_end_and_fine_tuning_at_the_other():
    images = torch.randn(4, 3, 16, 16)
    lars = replace(CALM, optimizer="lars", lr=1.0, features="cls")
    ends = [(("partial", lars, 0), ("linear", lars)), (("partial", CALM, 2), ("finetune", CALM))]
    for one, other in ends:
        assert torch.equal(trained(*one).logits(images), trained(*other).logits(images))


def test_drop_path_grows_over_the_blocks_and_leaves_the_frozen_ones_alone():
    recipe = replace(CALM, drop_path=0.3)
    for blocks, rates in ((0, [0, 0, 0, 0]), (2, [0, 0, 0.2, 0.3]), (4, [0, 0.1, 0.2, 0.3])):
        encoder = classifier_of("partial", recipe, blocks, small_vit(depth=4, drop_path=0.5)).encoder
        assert [block.drop_path for block in encoder.blocks] == pytest.approx(rates)


@pytest.mark.parametrize("blocks", [-1, 3])
def test_a_number_of_blocks_that_is_not_there_is_refused(blocks):
    with pytest.raises(InputError, match=f"--blocks {blocks}: the encoder has 2; give 0 .* to 2"):
        classifier_of("partial", blocks=blocks)


# ------------------------------------------------------------------------------------------------------- optimizers


def test_layer_decay_scales_each_layer_by_its_distance_from_the_head():
    classifier = classifier_of("finetune", encoder=small_vit(positions="relative", layer_scale=0.1))
    groups = finetuning.layer_decay_groups(classifier, 0.05, 0.5)
    found = {id(p): (group["scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found) == len(trainable_parameters(classifier))
    scales = {"patch_embed": 0.125, "cls_token": 0.125, "blocks.0": 0.25, "blocks.1": 0.5, "table": 1, "head": 1}
    for name, p in trainable_parameters(classifier).items():
        scale = next(value for part, value in scales.items() if part in name)
        vector = any(part in name for part in ("bias", "norm", "gamma", "cls_token"))
        assert found[id(p)] == (scale, 0.0 if vector else 0.05), name


def test_the_learning_rate_of_a_step_reaches_every_layer_by_its_scale(monkeypatch):
    seen = []

    class Spy(torch.optim.SGD):
        def step(self):
            seen.append({group["scale"]: group["lr"] for group in self.param_groups})
            return super().step()

    groups = finetuning.layer_decay_groups
    monkeypatch.setattr(finetuning, "optimizer_for", lambda c, r, _: Spy(groups(c, 0, r.layer_decay), lr=9))
    recipe = replace(CALM, layer_decay=0.5, lr=0.4, min_lr=0.1)
    trained("finetune", recipe)
    rates = [0, 0.4 / 3, 0.8 / 3, 0.4]  # three steps of warm-up, then half a cosine over the other three
    rates += [0.1 + 0.3 * (1 + math.cos(math.pi * t / 3)) / 2 for t in (1, 2)]
    for step, rate in zip(seen, rates, strict=True):
        assert step == pytest.approx({scale: rate * scale for scale in (1, 0.5, 0.25, 0.125)})


def test_lars_is_the_plain_rule():
    torch.manual_seed(0)
    start = [torch.randn(3, 4), torch.randn(4), torch.zeros(2, 2), torch.randn(2, 3)]
    tensors = [nn.Parameter(p.clone()) for p in start]
    optimizer = finetuning.LARS(tensors, lr=0.5, momentum=0.9, weight_decay=0.1, trust=0.02)
    weights, speeds = [p.double().numpy() for p in start], [0.0] * 4
    for step in range(4):
        optimizer.param_groups[0]["lr"] = lr = 0.5 / (step + 1)
        for i, p in enumerate(tensors):
            gradient = torch.randn_like(p) if i < 3 else torch.zeros_like(p)
            p.grad, g = gradient, gradient.double().numpy()
            if p.ndim > 1:
                g = g + 0.1 * weights[i]
                sizes = np.sqrt((weights[i] ** 2).sum()), np.sqrt((g**2).sum())
                g = g * (0.02 * sizes[0] / sizes[1] if min(sizes) > 0 else 1)
            speeds[i] = 0.9 * speeds[i] + g
            weights[i] = weights[i] - lr * speeds[i]
        optimizer.step()
        for p, expected in zip(tensors, weights, strict=True):
            np.testing.assert_allclose(p.detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name, kind, says",
    [
        ("adamw", torch.optim.AdamW, dict(betas=(0.9, 0.999), eps=1e-8)),
        ("sgd", torch.optim.SGD, dict(momentum=0.9, nesterov=False)),
        ("lars", finetuning.LARS, dict(momentum=0.9, trust=0.001)),
    ],
)
def test_the_optimizer_is_the_recipes(name, kind, says):
    optimizer = finetuning.optimizer_for(classifier_of("finetune"), replace(CALM, optimizer=name), CPU)
    assert type(optimizer) is kind
    assert {key: optimizer.defaults[key] for key in says} == says


# --------------------------------------------------------------------------------------------------- augmentations


def labels(n: int, classes: int = 5) -> torch.Tensor:
    return nn.functional.one_hot(torch.arange(n) % classes, classes).float()


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32), mixup=st.sampled_from([0.0, 0.8]), cutmix=st.sampled_from([0.0, 1.0]))
def test_mixing_and_its_labels_are_the_plain_loops(seed, mixup, cutmix):
    n, H, W = 8, 6, 10
    images, y = torch.rand(n, 3, H, W), labels(n)
    found, targets = finetuning.mix(images, y, StepRandom(seed, 3, n), mixup, cutmix)
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
    """The first step's logged loss, from logits of a head whose weights are known."""
    recipe = replace(CALM, epochs=1, warmup_epochs=0.0, batch_size=24, mixup=0.8, smoothing=0.1, lr=1e-9)
    classifier = classifier_of("finetune", recipe)
    x, y = finetuning.prepared(*_first(recipe), 3, recipe, 16, StepRandom(0, 0, 24), False)
    scores = classifier.eval().logits(x).detach().double().numpy()
    expected = 0.0
    for row, target in zip(scores, y.double().numpy(), strict=True):
        smooth = 0.9 * target + 0.1 / 3
        expected -= (smooth * (row - np.log(np.exp(row).sum()))).sum() / 24
    losses = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetuning.Progress, "end_epoch", lambda self, row, last: losses.append(row["loss"]))
        finetuning.train(classifier, Images(), 3, recipe, CPU)
    assert losses == [pytest.approx(expected, rel=1e-5)]


def _first(recipe):
    order = finetuning.epoch_order(0, 0, 24)[: recipe.batch_size]
    return Images().pixels[order], Images().labels[order]


def test_an_erased_box_has_its_shape_and_share_and_noise_of_one_sheet():
    images = torch.full((400, 3, 20, 30), 7.0)
    found = finetuning.erase(images, StepRandom(0, 0, 400), 0.25)
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


def test_randaugment_is_two_operations_at_nine_tenths(monkeypatch):
    """One draw for all images; its operation and sign from torch's generator, its strength by arithmetic."""
    monkeypatch.setattr(finetuning, "DRAWS", 1)
    space, images, compared = list(v2.RandAugment._AUGMENTATION_SPACE), torch.rand(2, 3, 8, 8), set()
    gray = 0.2989 * images[:, 0] + 0.587 * images[:, 1] + 0.114 * images[:, 2]
    for seed in range(150):
        found = finetuning.rand_augment(images, StepRandom(seed, 0, 2), 9)
        torch.manual_seed(int(np.random.default_rng((seed, 0)).integers(0, 2**31, 1)[0]))
        expected = images
        for _ in range(2):
            if torch.rand(1) >= 0.5:
                continue
            kind = space[int(torch.randint(len(space), ()))]
            sign = -1 if kind in ("Brightness", "Color") and torch.rand(()) <= 0.5 else 1
            known = {
                "Brightness": lambda x, s=sign: (x * (1 + 0.81 * s)).clamp(0, 1),
                "Color": lambda x, s=sign: (gray[:, None] + (1 + 0.81 * s) * (x - gray[:, None])).clamp(0, 1),
                "Solarize": lambda x: torch.where(x >= 0.1, 1 - x, x),
                "Posterize": lambda x: (x * 16).floor() / 16,  # 8 - round(.9 · 4) = 4 bits
                "Identity": lambda x: x.clone(),
            }
            if expected is not images or kind not in known:
                expected = None
                break
            expected, kinds = known[kind](images), kind
        if expected is not None and expected is not images:
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
            compared.add(kinds)
    assert compared == {"Brightness", "Color", "Solarize", "Posterize", "Identity"}


def test_a_probes_crop_is_drawn_once_and_cut_down_to_the_image():
    H, W, n = 20, 50, 500
    found = finetuning.single_boxes(StepRandom(5, 1, n), (H, W), (0.08, 1.0)).tolist()
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


def test_probes_crop_by_one_draw_tuning_by_ten_and_half_of_the_views_are_mirrored(monkeypatch):
    used, crop_resize = [], augment.crop_resize
    monkeypatch.setattr(augment, "crop_resize", lambda *args: used.append(args) or crop_resize(*args))
    images = torch.zeros(200, 3, 16, 24, dtype=torch.uint8)
    for probe, draw in ((True, finetuning.single_boxes), (False, augment.crop_boxes)):
        finetuning.prepared(
            images, torch.zeros(200).long(), 3, replace(CALM, crop_scale=0.2), 16, StepRandom(1, 2, 200), probe
        )
        _, boxes, size, mirrored = used.pop()
        assert torch.equal(boxes, draw(StepRandom(1, 2, 200), (16, 24), (0.2, 1.0)))
        assert size == 16 and 75 < mirrored.sum() < 125


def test_without_crops_an_image_is_seen_as_in_validation():
    images, y = Images(4).pixels, Images(4).labels
    x, targets = finetuning.prepared(images, y, 3, CALM, 16, StepRandom(1, 2, 4), True)
    assert torch.equal(x, augment.normalize(images.float() / 255))
    assert torch.equal(targets, nn.functional.one_hot(y, 3).float())


def test_an_images_part_does_not_depend_on_who_prepares_it():
    images, y = Images(8).pixels, Images(8).labels
    for probe in (False, True):
        state = torch.get_rng_state()
        whole = finetuning.prepared(images, y, 3, RICH, 16, StepRandom(1, 2, 8), probe)
        assert torch.equal(state, torch.get_rng_state())
        parts = []
        for rows in (slice(0, 2), slice(2, 8)):
            parts.append(finetuning.prepared(images[rows], y[rows], 3, RICH, 16, StepRandom(1, 2, 8, rows), probe))
        for one, halves in zip(whole, zip(*parts, strict=True), strict=True):
            torch.testing.assert_close(one, torch.cat(halves), rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- training


@pytest.mark.training
@pytest.mark.parametrize("protocol, blocks", PROTOCOLS)
def test_a_small_set_is_learned_and_a_repeat_learns_the_same(protocol, blocks):
    optimizer = {"linear": "lars", "attentive": "sgd"}.get(protocol, "adamw")
    rate = {"lars": 40.0, "sgd": 0.3, "adamw": 0.01}[optimizer]
    recipe = replace(CALM, epochs=12, optimizer=optimizer, lr=rate, drop_path=0.1)
    val = Images(60, seed=9)

    def score():
        classifier = trained(protocol, recipe, blocks, Images(48))
        return evaluate.of_all(classifier.logits, val, 16, CPU)

    scores, y = score()
    assert evaluate.accuracy(scores, y)["top1"] > 70  # 33 by chance
    assert torch.equal(score()[0], scores)


@pytest.mark.parametrize("protocol, blocks", PROTOCOLS)
def test_a_run_that_was_stopped_ends_with_the_bits_of_one_that_was_not(tmp_path, monkeypatch, protocol, blocks):
    monkeypatch.setattr(finetuning, "SAVE_EVERY", 0.0)
    recipe = replace(RICH, epochs=3, drop_path=0.2)
    whole = trained(protocol, recipe, blocks, directory=tmp_path / "whole")
    forward, calls = Classifier.forward, []

    def stopping(self, x):
        calls.append(x)
        if len(calls) == 5:  # in the second epoch of three steps
            raise KeyboardInterrupt
        return forward(self, x)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Classifier, "forward", stopping)
        trained(protocol, recipe, blocks, directory=tmp_path / "parts")
    assert files.load(tmp_path / "parts" / "checkpoint.pt")["step"] == 3
    again = trained(protocol, recipe, blocks, directory=tmp_path / "parts")
    assert same(whole, again)
    log = [[json.loads(line) for line in open(tmp_path / name / "log.jsonl")] for name in ("whole", "parts")]
    for rows in log:
        for row in rows[1:]:
            del row["images_per_second"]
    assert log[0] == log[1] and [row["step"] for row in log[0][1:]] == [3, 6, 9]
    monkeypatch.setattr(Classifier, "forward", None)  # what is done is not done again
    assert same(whole, trained(protocol, recipe, blocks, directory=tmp_path / "parts"))


def test_a_checkpoint_of_other_settings_or_of_another_encoder_is_refused(tmp_path):
    trained("linear", directory=tmp_path)
    other = small_vit()
    other.cls_token.data += 1
    longer = dict(recipe=replace(CALM, epochs=3))
    for changed, said in ((longer, "epochs 2 there, 3 here"), (dict(encoder=other), "encoder ")):
        with pytest.raises(InputError, match=said) as error:
            trained("linear", directory=tmp_path, **changed)
        assert "\n" not in str(error.value) and "--resume never" in str(error.value)
    fresh = trained("linear", replace(CALM, epochs=3), directory=tmp_path, resume=False)
    assert same(fresh, trained("linear", replace(CALM, epochs=3)))
    (tmp_path / "checkpoint.pt").write_bytes(b"no")
    with pytest.raises(InputError, match="damaged"):
        trained("linear", directory=tmp_path)


@pytest.mark.training
@pytest.mark.parametrize("protocol, blocks", PROTOCOLS)
def test_parts_of_a_step_make_the_step(protocol, blocks):
    recipe = replace(RICH, lr=0.01, optimizer="sgd")
    one, two = (trained(protocol, recipe, blocks, accumulate=n) for n in (1, 2))
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, two.state_dict()[name], rtol=1e-4, atol=1e-5)


def _train_as_one_of(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=ranks)
    recipe = replace(RICH, lr=0.01, optimizer="sgd")
    found = [trained(protocol, recipe, blocks).state_dict() for protocol, blocks in PROTOCOLS]
    trained("linear", recipe, directory=finetuning.Path(folder) / "run")
    found.append(trained("linear", recipe, directory=finetuning.Path(folder) / "run").state_dict())  # rank 0's, on all
    torch.save(found, f"{folder}/{rank}.pt")
    process.stop()


@pytest.mark.training
@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path):
    torch.multiprocessing.spawn(_train_as_one_of, (2, str(tmp_path)), nprocs=2)
    recipe = replace(RICH, lr=0.01, optimizer="sgd")
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for (protocol, blocks), state in zip([*PROTOCOLS, PROTOCOLS[0]], found, strict=True):
            for name, value in trained(protocol, recipe, blocks).state_dict().items():
                torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_shared_or_filled_is_refused():
    for recipe, options, said in (
        (replace(CALM, batch_size=25), {}, "batch size 25: larger than the 24 images"),
        (replace(CALM, batch_size=9), dict(accumulate=2), "batch size 9: cannot be shared by 1 processes x 2 parts$"),
        (replace(CALM, batch_size=9, mixup=0.8), {}, "an even number of images"),
        (replace(CALM, lr=1e38, warmup_epochs=0.0, optimizer="sgd"), {}, "loss: not finite in epoch 1"),
    ):
        with pytest.raises(InputError, match=said):
            trained("finetune", recipe, **options)


@pytest.mark.training
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_learns_nearly_the_same(precision):
    exact, rounded = (trained("finetune", precision=p) for p in ("fp32", precision))
    assert all(p.dtype == torch.float32 for p in rounded.parameters()) and not same(exact, rounded)
    images = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(exact.logits(images), rounded.logits(images), rtol=0.1, atol=0.15)


def test_autocast_ends_with_the_forward_pass(monkeypatch):
    seen = []
    backward = torch.Tensor.backward
    spy = lambda self: seen.append(torch.is_autocast_enabled("cpu")) or backward(self)  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "backward", spy)
    for protocol, blocks in PROTOCOLS:
        trained(protocol, blocks=blocks, precision="bf16")
    assert len(seen) == 24 and not any(seen)


# ------------------------------------------------------------------------------------------------------ by evaluate


def evaluated(protocol: str, recipe: Recipe = CALM, encoder=None, **options) -> dict:
    sets = Images(), Images(20, seed=9)
    return evaluate.evaluate(encoder or small_vit(), *sets, [protocol], CPU, recipe=recipe, **options)[protocol]


@pytest.mark.parametrize("protocol, blocks", PROTOCOLS)
def test_what_the_frozen_part_gives_may_be_kept(monkeypatch, protocol, blocks):
    encoder = small_vit()
    before = copy.deepcopy(encoder.state_dict())
    kept, of_all = [], evaluate.of_all

    def spy(function, *others):
        kept.append(getattr(function, "__name__", "") == "frozen")
        return of_all(function, *others)

    monkeypatch.setattr(evaluate, "of_all", spy)
    found = evaluated(protocol, blocks=blocks, encoder=encoder, paper=True)
    assert sum(kept) == (protocol != "finetune")
    monkeypatch.setattr(evaluate, "KEPT_LIMIT", 0)
    assert evaluated(protocol, blocks=blocks, encoder=encoder, paper=True) == found
    evaluated(protocol, RICH, blocks=blocks, encoder=encoder, paper=True)  # what is augmented is never kept
    assert sum(kept) == (protocol != "finetune")
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())  # nor is it changed


@pytest.mark.training
def test_seeds_give_mean_and_sample_deviation():
    found = evaluated("finetune", seed=6, seeds=3)
    each = [evaluated("finetune", seed=seed) for seed in (6, 7, 8)]
    assert [result | {"precision": found["precision"]} for result in found["each"]] == each and found["n"] == 20
    for key in ("top1", "top5"):
        values = [result[key] for result in each]
        assert found[key] == pytest.approx(sum(values) / 3)
        assert found[key + "_std"] == pytest.approx(np.std(values, ddof=1))
    assert len({result["top1"] for result in each}) > 1


def test_supervised_starts_from_random_weights_of_its_seed(monkeypatch):
    starts = []
    monkeypatch.setattr(finetuning, "train", lambda classifier, *_: starts.append(classifier.encoder))
    encoder = small_vit()
    for protocol, seed in (("supervised", 1), ("supervised", 2), ("finetune", 1)):
        evaluated(protocol, seed=seed, encoder=encoder)
    one, two, three = starts
    assert same(one, evaluate.untrained(encoder, 1)) and not same(one, two)
    assert same(three, encoder) and three is not encoder


def test_heads_differ_by_seed_and_not_by_torchs_state():
    one = classifier_of("linear", seed=1)
    torch.manual_seed(77)
    state = torch.get_rng_state()
    assert same(one, classifier_of("linear", seed=1, encoder=one.encoder))
    torch.manual_seed(77)
    classifier_of("linear", seed=2, encoder=one.encoder)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(one.head.out.weight, classifier_of("linear", seed=2).head.out.weight)
    assert 0 < one.head.out.weight.abs().max() <= 0.02 and not one.head.out.bias.any()


def test_every_field_has_its_words_and_arrives_by_its_option(monkeypatch):
    comments = evaluate.field_comments(Recipe)
    assert set(comments) == set(asdict(Recipe()))
    given = dict(
        epochs=7, warmup_epochs=2.0, batch_size=6, base_lr=0.1, lr=0.2, min_lr=0.01, optimizer="sgd", weight_decay=0.3,
        layer_decay=0.4, drop_path=0.2, mixup=0.5, cutmix=0.6, smoothing=0.2, erase=0.1, randaugment=4, crop_scale=0.5,
        features="cls", norm="pretrained", head_std=0.3,
    )  # fmt: skip
    words = [word for name, value in given.items() for word in (finetuning.flag(name), str(value))]
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--run", "x", "--protocol", "finetune", "--data", "shapes", *words])
    options, report = evaluate.task_options(evaluate.options(), {})
    assert options["recipe"] == Recipe(**given) and report["recipe"] == "demo" and report["lr"] == 0.2
    words = "--run x --protocol attentive --data imagenet --attend-cls".split()
    monkeypatch.setattr("sys.argv", ["evaluate.py", *words])
    options, report = evaluate.task_options(evaluate.options(), dict(method="cae"))
    assert options["recipe"] == replace(recipe_for("cae", "attentive"), attend_cls=True) and report["recipe"] == "cae"


def test_a_start_does_not_wait_for_the_compiler():
    """torchvision and torch.optim bring it along, two seconds; a kNN probe and --help want neither."""
    code = "import sys, evaluate, train; assert not {'torchvision', 'torch._dynamo'} & sys.modules.keys()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(finetuning.__file__).parents[1], stderr=subprocess.PIPE
    )
    assert done.returncode == 0, done.stderr
