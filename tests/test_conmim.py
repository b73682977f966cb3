"""conmim.py: both branches and Eq. (3) in plain loops under every switch, stop-gradients, views, masks, the copy."""

import copy
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import conmim
from common import StepRandom, ViT, cosine, patchify, random_mask, unpatchify
from conmim import Batch, Config, ConMIM, Projector, cosines, denoising_contrast, whole_batch
from inputs import augment
from inputs.augment import denormalize
from runtime.errors import InputError
from train import options

SMALL = dict(projector_width=12, projector_out=6)


def small(size=32, fresh=False, encoder=None, **switches):
    torch.manual_seed(0)
    model = ConMIM(ViT(size, 8, 16, 2, 2, **encoder or {}), Config(**SMALL | switches))
    for name, parameter in [] if fresh else model.named_parameters():
        if name.startswith("slow"):  # a copy that lags behind
            parameter.data += 0.05 * torch.randn_like(parameter)
        elif name.endswith(("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "table")):
            parameter.data += 0.3 * torch.randn_like(parameter)  # what begins at one or zero must be seen to act
    return model


def batch_for(model, B=3, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    size, c = model.student.image_size, model.config
    mask = None if c.masking == "none" else random_mask(StepRandom(seed, 0, B), model.student.grid, c.mask_ratio)
    return Batch(torch.randn(B, 3, size, size, dtype=dtype), mask, torch.randn(B, 3, size, size, dtype=dtype))


# --------------------------------------------------------------------------------------- the whole step, in plain loops


def plain_bias(vit):
    """What a table of relative positions adds to the score of query i and key j, pair by pair; None without one."""
    if vit.relative_table is None:
        return None
    (h, w), table = vit.grid, vit.relative_table
    rows = []
    for i in range(-1, h * w):
        for j in range(-1, h * w):
            if i < 0 or j < 0:
                rows.append(table[{(True, False): -3, (False, True): -2, (True, True): -1}[i < 0, j < 0]])
            else:
                down, right = i // w - j // w, i % w - j % w
                rows.append(table[(down + h - 1) * (2 * w - 1) + right + w - 1])
    return torch.stack(rows).reshape(1, h * w + 1, h * w + 1, -1).permute(0, 3, 1, 2)


def plain_encoder(vit, image, masked=(), mask_token=None):
    """One image, from the convolution on: (3, H, W) → (1 + N, D), with the mask token on the masked places."""
    patches = vit.patch_embed.proj(image[None]).flatten(2).transpose(1, 2)[0]
    rows = [vit.cls_token[0, 0] + vit.pos_embed[0, 0]]
    for i in range(vit.patches):
        rows.append((mask_token[0, 0] if i in masked else patches[i]) + vit.pos_embed[0, 1 + i])
    x = torch.stack(rows)[None]
    for block in vit.blocks:
        x = block(x, plain_bias(vit))
    return vit.norm(x)[0]


def plain_projector(projector, rows):
    for fc, norm, last in ((projector.fc1, projector.norm1, False), (projector.fc2, projector.norm2, False),
                           (projector.fc3, projector.norm3, True)):  # fmt: skip
        rows = [fc.weight @ r for r in rows]
        mean = sum(rows) / len(rows)
        variance = sum((r - mean) ** 2 for r in rows) / len(rows)
        rows = [(r - mean) / (variance + 1e-6).sqrt() for r in rows]
        if not last:
            rows = [(r * norm.weight + norm.bias).clamp(min=0) for r in rows]
    return rows


def plain_features(vit, projector, images, config, masked=None, mask_token=None):
    """The projected tokens f(·) of each image: [image][patch] → (d,)."""
    tokens = [plain_encoder(vit, x, masked[b] if masked else (), mask_token) for b, x in enumerate(images)]
    if config.contrast == "instance":
        lists = [[sum(t[1:]) / (len(t) - 1)] for t in tokens]
    else:
        lists = [list(t if config.project_class else t[1:]) for t in tokens]
    rows = iter(plain_projector(projector, [r for rows in lists for r in rows]))
    lists = [[next(rows) for _ in x] for x in lists]
    return [x[1:] for x in lists] if config.project_class else lists


def plain_loss(model, batch):
    """Eq. (3), image by image, masked patch by masked patch, key by key → the loss and the share of right look-ups."""
    c, B = model.config, len(batch.images)
    masked = batch.mask.masked.tolist() if batch.mask else None
    anchors = plain_features(
        model.student, model.projector, batch.images, c, masked, getattr(model, "mask_token", None)
    )
    teacher = (model.slow_encoder, model.slow_projector) if c.slow else (model.student, model.projector)
    keys = plain_features(*teacher, batch.full_images, c)
    total, right, count = 0.0, 0, 0
    for b in range(B):
        for j in masked[b] if masked and c.contrast == "patch" else range(len(anchors[b])):
            others = range(B) if c.dictionary == "batch" or c.contrast == "instance" else [b]
            scores = {}
            for image in others:
                for i, key in enumerate(keys[image]):
                    cos = (anchors[b][j] @ key / anchors[b][j].norm() / key.norm()).item()
                    if (image, i) == (b, j) or c.filter_above >= 1 or cos <= c.filter_above:
                        scores[image, i] = cos
            total -= math.log(math.exp(scores[b, j] / c.tau) / sum(math.exp(s / c.tau) for s in scores.values()))
            right += max(scores, key=scores.get) == (b, j)
            count += 1
    return total / count, right / count


SWITCHES = {
    "the paper": {},
    "Table 4, instance-level": dict(contrast="instance", masking="none"),
    "instance-level, yet masked": dict(contrast="instance"),
    "Table 4, nothing masked": dict(masking="none"),
    "Table 5, more keys": dict(dictionary="batch"),
    "Table 5, fewer keys": dict(filter_above=0.1),
    "Table 5, both": dict(dictionary="batch", filter_above=0.1),
    "Table 6, no slow copy": dict(slow=False),
    "Table 7": dict(mask_ratio=0.5),
    "Table 8": dict(tau=0.2),
    "the code's statistics": dict(project_class=True),
    "the code's positions": dict(encoder=dict(positions="relative", layer_scale=0.1)),
}


@pytest.mark.parametrize("name", SWITCHES)
@torch.no_grad()
def test_forward_matches_the_equation_in_plain_loops(name):
    model = small(**SWITCHES[name]).double()
    batch = batch_for(model, dtype=torch.float64)
    loss, accuracy = plain_loss(model, batch)
    out = model(batch)
    assert out["loss"].item() == pytest.approx(loss, rel=1e-4)
    assert out["accuracy"].item() == pytest.approx(accuracy, abs=1e-6)
    assert list(out) == ["loss", "accuracy"]


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.booleans(), st.sampled_from(["image", "batch"]))
def test_an_identical_copy_without_mask_finds_every_key(seed, slow, dictionary):
    """§3 of the issue: identity student, no masking, equal views."""
    model = small(fresh=True, masking="none", slow=slow, dictionary=dictionary)
    batch = batch_for(model, seed=seed)
    assert model(batch._replace(full_images=batch.images))["accuracy"] == 1


def test_masked_pixels_reach_the_keys_only():
    for encoder in ({}, dict(stem="conv"), dict(positions="relative")):
        model = small(encoder=encoder)
        batch = batch_for(model)
        noise = torch.randn_like(patchify(batch.images, 8))
        hidden = batch.mask.hidden()[:, :, None]
        masked, visible = (unpatchify(patchify(batch.images, 8) + noise * m, 8, (4, 4)) for m in (hidden, ~hidden))
        anchors = model.anchors(batch.images, batch.mask)
        assert anchors.shape == (3, 16, 6)
        assert torch.equal(model.anchors(masked, batch.mask), anchors)
        assert not torch.allclose(model.anchors(visible, batch.mask), anchors)
        assert not torch.allclose(model.keys(masked), model.keys(batch.images))


def test_the_mask_token_stands_for_embeddings_and_has_a_position():
    model = small()
    batch = batch_for(model)
    x, vit = model.corrupt(batch.images, batch.mask), model.student
    whole = vit.embed(batch.images)
    for b in range(3):
        for i in range(16):
            hidden = i in batch.mask.masked[b].tolist()
            expected = model.mask_token[0, 0] + vit.pos_embed[0, 1 + i] if hidden else whole[b, i]
            torch.testing.assert_close(x[b, i], expected, atol=1e-5, rtol=1e-5)
    assert not hasattr(small(masking="none"), "mask_token")
    assert 0.005 < model.mask_token.std() < 0.05  # at first as all tokens: 0.02


# --------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", SWITCHES)
def test_gradient_reaches_all_that_learns_and_nothing_else(name):
    model = small(**SWITCHES[name])
    for parameter in model.parameters():  # were the copy not cut off, this would let gradient in
        if parameter is not model.student.norm.bias:
            parameter.requires_grad_()
    batch = batch_for(model)
    full = batch.full_images.requires_grad_()
    out = model(batch._replace(full_images=full))
    out["loss"].backward()
    assert full.grad is None and not out["accuracy"].requires_grad
    assert not model.keys(full).requires_grad  # cut off at once, so that no graph is kept
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.startswith("slow") or parameter is model.student.norm.bias:
            assert parameter.grad is None, parameter_name
        elif parameter_name.endswith("mask_token") or model.config.contrast == "patch":
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name


def test_without_a_copy_the_keys_are_constants():
    """Table 6's last row still has Eq. (3)'s sg: the gradient is the one with the keys' numbers put in by hand."""
    model, constant = small(slow=False), small(slow=False)
    batch = batch_for(model)
    assert not any(n.startswith("slow") for n, _ in model.named_parameters())
    keys = model.keys(batch.full_images).clone()
    constant.keys = lambda images: keys
    model(batch)["loss"].backward()
    constant(batch)["loss"].backward()
    for ours, theirs in zip(model.parameters(), constant.parameters(), strict=True):
        assert ours.grad is theirs.grad is None or torch.equal(ours.grad, theirs.grad)


def test_only_masked_places_are_looked_up():
    model = small()
    batch = batch_for(model)
    original, kept = model.anchors, {}

    def keep(images, mask):
        kept["anchors"] = original(images, mask)
        kept["anchors"].retain_grad()
        return kept["anchors"]

    model.anchors = keep
    model(batch)["loss"].backward()
    got = kept["anchors"].grad.abs().sum(2) > 0
    assert torch.equal(got, batch.mask.hidden())


def test_what_the_batch_norm_removes_is_not_trained():
    """A vector added to every token's feature changes nothing, so the encoder's last bias could only drift on noise."""
    for switches in ({}, dict(project_class=True), dict(contrast="instance")):
        model = small(**switches)
        batch = batch_for(model)
        frozen = [n for n, p in model.named_parameters() if not p.requires_grad and not n.startswith("slow")]
        assert frozen == ["student.norm.bias"]
        before = model(batch)["loss"]
        model.student.norm.bias += torch.randn(16)
        torch.testing.assert_close(model(batch)["loss"], before, atol=1e-4, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------------- Eq. (3)


def draw_dictionaries(seed, S=2, M=3, K=5, d=4):
    torch.manual_seed(seed)
    return torch.randn(S, M, d), torch.randn(S, K, d), torch.stack([torch.randperm(K)[:M] for _ in range(S)])


@given(st.integers(0, 10**6), st.floats(0.1, 30), st.sampled_from([0.05, 0.1, 1.0]))
def test_denoising_contrast_ignores_length_and_the_order_of_keys_and_anchors(seed, scale, tau):
    anchors, keys, places = draw_dictionaries(seed)
    loss, accuracy = denoising_contrast(anchors, keys, places, tau)
    assert loss >= 0
    torch.manual_seed(seed + 1)
    order, rows = torch.randperm(5), torch.randperm(3)
    others = scale * anchors[:, rows], keys[:, order] / scale, order.argsort()[places[:, rows]]
    again, same = denoising_contrast(*others, tau)
    torch.testing.assert_close(again, loss, atol=1e-4, rtol=1e-4)
    assert same == accuracy
    assert cosines(anchors, keys).abs().max() <= 1 + 1e-5


def test_denoising_contrast_limits():
    eye, places = torch.eye(4)[None], torch.arange(4)[None]
    loss, accuracy = denoising_contrast(eye, eye, places, 0.01)
    assert loss < 1e-6 and accuracy == 1
    loss, accuracy = denoising_contrast(eye, eye, (places + 1) % 4, 0.5)
    assert loss.item() == pytest.approx(math.log(math.exp(2) + 3), rel=1e-5) and accuracy == 0
    for d in range(2, 20):  # all keys alike: ln K, though rounding takes some cosines beyond 1
        alike = denoising_contrast(torch.ones(2, 3, d), torch.ones(2, 7, d), torch.zeros(2, 3).long(), 0.1, 1.0)[0]
        assert alike.item() == pytest.approx(math.log(7), rel=1e-5)
    assert denoising_contrast(eye, eye, places, 0.5, 0.0)[0] == denoising_contrast(eye, eye, places, 0.5)[0]  # 0 stays
    half = denoising_contrast(eye.bfloat16(), eye.bfloat16(), places, 0.1)[0]
    assert half.dtype == torch.float32


def test_keys_get_no_gradient_and_anchors_do():
    anchors, keys, places = draw_dictionaries(0)
    denoising_contrast(anchors.requires_grad_(), keys.requires_grad_(), places, 0.1)[0].backward()
    assert keys.grad is None and anchors.grad.abs().sum() > 0


@given(st.integers(0, 10**6), st.floats(-1, 0.9))
def test_filtered_negatives_cost_nothing_and_get_no_force(seed, threshold):
    """Table 5: leaving out negatives can only lower the loss, never touches the right key, and none at -1 leaves 0."""
    anchors, keys, places = draw_dictionaries(seed)
    every, _ = denoising_contrast(anchors, keys, places, 0.1)
    fewer, _ = denoising_contrast(anchors, keys, places, 0.1, threshold)
    assert 0 <= fewer <= every + 1e-5 and fewer.isfinite()
    alone, accuracy = denoising_contrast(anchors, keys, places, 0.1, -1.1)
    assert alone == 0 and accuracy == 1


@pytest.mark.parametrize("switches", [{}, dict(dictionary="batch"), dict(dictionary="batch", filter_above=0.1)])
def test_a_large_dictionary_is_searched_in_parts_that_the_backward_pass_computes_again(monkeypatch, switches):
    """One anchor or some in a part, and fewer in the last one: the same loss and gradient."""
    model = small(40, mask_cell=1, **switches)
    batch = batch_for(model, B=5)
    plain = model(batch)
    plain["loss"].backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    kept = []
    for scores in (125, 7 * 125, 10 * 125):  # 5 images of 25 patches: similarities of 1, 7 and 10 anchors
        monkeypatch.setattr(conmim, "SCORES", scores)
        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
            parts = model(batch)
        parts["loss"].backward()
        for name in plain:
            torch.testing.assert_close(parts[name], plain[name], atol=1e-6, rtol=1e-6)
        ours = [p.grad for p in model.parameters() if p.grad is not None]
        assert all((a - b).norm() <= 1e-4 * b.norm() for a, b in zip(ours, gradients, strict=True))  # seen: 6e-6
    assert not any(shape[-1:] in [(25,), (125,)] for shape in kept)  # no similarities: one value for each key


def test_a_whole_batch_is_one_dictionary_in_the_order_of_ranks(monkeypatch):
    """On rank 1 of 2 the right keys lie behind those of rank 0."""
    anchors, keys, places = draw_dictionaries(1)
    a, k, p = whole_batch(anchors, keys, places)
    assert a.shape == (1, 6, 4) and k.shape == (1, 10, 4) and p.shape == (1, 6)
    other = torch.randn(2, 5, 4)
    monkeypatch.setattr(conmim, "rank", lambda: 1)
    monkeypatch.setattr(conmim, "gather_over_ranks", lambda x: torch.cat([other, x]))
    a, k, p = whole_batch(anchors, keys, places)
    assert k.shape == (1, 20, 4)
    for b in range(2):
        for m in range(3):
            assert torch.equal(a[0, 3 * b + m], anchors[b, m])
            assert torch.equal(k[0, p[0, 3 * b + m]], keys[b, places[b, m]])


# -------------------------------------------------------------------------------------------- projector and slow copy


def test_projector_is_moco_v3s():
    projector = Projector(16, 4096, 256)
    shapes = {n: tuple(p.shape) for n, p in projector.named_parameters()}
    assert shapes == {
        "fc1.weight": (4096, 16), "norm1.weight": (4096,), "norm1.bias": (4096,), "fc2.weight": (4096, 4096),
        "norm2.weight": (4096,), "norm2.bias": (4096,), "fc3.weight": (256, 4096),
    }  # fmt: skip
    assert (Config().projector_width, Config().projector_out) == (4096, 256)


def test_one_rank_projects_alone_when_evaluating(monkeypatch):
    """Pictures are drawn by rank 0 alone: a collective there would wait for ever; the numbers are those of training."""
    model = small()
    batch = batch_for(model)
    trained = model.anchors(batch.images, batch.mask)

    def wait(x):
        raise AssertionError("waits for other ranks")

    monkeypatch.setattr("common.sum_over_ranks", wait)
    monkeypatch.setattr("common.world_size", lambda: 2)
    model.eval()
    torch.testing.assert_close(model.anchors(batch.images, batch.mask), trained, atol=1e-5, rtol=1e-4)
    assert model.picture(batch).shape == (4, 3, 3, 32, 32)
    with pytest.raises(AssertionError, match="waits"):
        model.train()(batch)


@given(st.floats(0, 1))
@settings(max_examples=10)
def test_the_copy_follows_ever_more_slowly(progress):
    """α = 1 - 0.004 (1 + cos πt) / 2, from 0.996 to 1, for encoder, projector and nothing else."""
    model = small()
    before = copy.deepcopy(model)
    model.update_teacher(progress)
    alpha = 1 - 0.004 * (1 + math.cos(math.pi * progress)) / 2
    assert alpha == pytest.approx(cosine(Config().momentum, 1, progress))
    for slow, student in (("slow_encoder", "student"), ("slow_projector", "projector")):
        for name, new in getattr(model, slow).named_parameters():
            old = getattr(before, slow).get_parameter(name).double()
            expected = alpha * old + (1 - alpha) * getattr(before, student).get_parameter(name).double()
            torch.testing.assert_close(new.double(), expected, atol=1e-8, rtol=1e-6)
    for name, parameter in model.named_parameters():
        if not name.startswith("slow"):
            assert torch.equal(parameter, before.get_parameter(name))


def test_the_copy_begins_as_the_student_and_is_not_trained():
    model = small(fresh=True)
    for slow, student in (("slow_encoder", "student"), ("slow_projector", "projector")):
        pairs = zip(getattr(model, slow).parameters(), getattr(model, student).parameters(), strict=True)
        assert all(torch.equal(a, b) and a is not b and not a.requires_grad for a, b in pairs)
    alone = small(slow=False)
    alone.update_teacher(0.5)  # nothing to follow


def test_the_kept_encoder_is_the_students_or_the_copys():
    model = small()
    assert model.encoder is model.student
    model = small(keep_slow=True)
    assert model.encoder is model.slow_encoder and model.encoder.settings == model.student.settings
    with pytest.raises(InputError, match="keep slow: there is no slow copy"):
        small(keep_slow=True, slow=False)


# --------------------------------------------------------------------------------------------------- views and masks


def images_for(n=6, side=48):
    torch.manual_seed(5)
    coarse = torch.rand(n, 3, 6, 6)
    return (torch.nn.functional.interpolate(coarse, side, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


def draw(seed=0, n=6, size=32, change=None, **switches):
    model = small(size, **switches)
    if change:
        model.strengthen = lambda views, rng: change(views)
    images = images_for().repeat(math.ceil(n / 6), 1, 1, 1)[:n]
    return model, model.draw(images, torch.arange(n), StepRandom(seed, 1, n))


@pytest.mark.parametrize("augmentation,seen,full", [
    ("asymmetric", False, True), ("strong", True, True), ("basic", False, False), ("switched", True, False),
])  # fmt: skip
def test_views_share_crop_and_flip_and_differ_as_table_6_says(augmentation, seen, full):
    """With the strong augmentation replaced by the negative, each input is the basic view or its negative."""
    _, batch = draw(augmentation=augmentation, change=lambda views: 1 - views)
    _, plain = draw(augmentation="basic", change=lambda views: pytest.fail("colours that nobody sees"))
    for view, strong in ((batch.images, seen), (batch.full_images, full)):
        basic = denormalize(plain.images)
        torch.testing.assert_close(denormalize(view), 1 - basic if strong else basic, atol=1e-5, rtol=0)
    assert torch.equal(batch.mask.order(), plain.mask.order())
    assert plain.images.shape == (6, 3, 32, 32) and plain.images.min() > -2.2 and plain.images.max() < 2.7
    assert not torch.allclose(plain.images[0], draw(seed=1, augmentation="basic")[1].images[0])


@pytest.mark.parametrize("jitter,gray", [(1.0, 0.0), (0.8, 0.2)])
def test_strong_augmentation_is_table_10s(monkeypatch, jitter, gray):
    """ColorJitter(0.4, 0.4, 0.2, 0.1), GaussianBlur(0.1), Solarization(0.2), in this order, as often as it says."""
    n, seen = 3000, {}

    def record(name):
        def apply(images, *parameters):
            seen[name] = parameters
            return images

        monkeypatch.setattr(augment, name, apply)

    for name in ("color_jitter", "grayscale", "gaussian_blur", "solarize"):
        record(name)
    model = small(64, jitter=jitter, gray=gray)
    model.strengthen(torch.zeros(1, 1, 1, 1).expand(n, 3, 64, 64), StepRandom(0, 0, n))
    assert list(seen) == ["color_jitter", "grayscale", "gaussian_blur", "solarize"]
    parameters = augment.ColorJitter(*seen["color_jitter"])
    for values, middle, strength in ((parameters.brightness, 1, 0.4), (parameters.contrast, 1, 0.4),
                                     (parameters.saturation, 1, 0.2), (parameters.hue, 0, 0.1)):  # fmt: skip
        assert values.min() == pytest.approx(middle - strength, abs=2e-3)
        assert values.max() == pytest.approx(middle + strength, abs=2e-3)
    sigma, blurred = seen["gaussian_blur"]
    assert sigma.min() == pytest.approx(0.1 * 64 / 224, abs=1e-3) and sigma.max() == pytest.approx(
        2 * 64 / 224, abs=1e-3
    )
    threshold, solarized = seen["solarize"]
    assert threshold == 0.5
    for where, rate in ((parameters.where, jitter), (seen["grayscale"][0], gray), (blurred, 0.1), (solarized, 0.2)):
        assert where.double().mean().item() == pytest.approx(rate, abs=0.025) and where.device.type == "cpu"


def test_strong_views_are_new_colours_of_the_same_patches():
    _, batch = draw(n=48)
    changed = (batch.images - batch.full_images).abs().amax((1, 2, 3)) > 1e-3
    assert changed.all()  # jitter has no probability in the paper
    assert denormalize(batch.full_images).min() + 1e-6 >= 0 and denormalize(batch.full_images).max() <= 1 + 1e-6


def test_crops_keep_the_share_they_are_told_and_half_are_flipped():
    """With `crop_scale=1` only the whole image fits, upright or flipped; none is larger: from 0.9 on few are whole."""
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8).repeat(64, 1, 1, 1)
    whole = images / 255
    for crop_scale, fewer in ((1.0, 65), (0.9, 32), (0.2, 16)):
        model = small(crop_scale=crop_scale, augmentation="basic")
        views = denormalize(model.draw(images, torch.arange(64), StepRandom(0, 0, 64)).images)
        upright, flipped = (((views - w).abs().amax((1, 2, 3)) < 1e-3).sum() for w in (whole, whole.flip(3)))
        assert upright + flipped < fewer
        assert crop_scale < 1 or (upright + flipped == 64 and 20 < upright < 44)
    assert Config().crop_scale == 0.08


def test_masks_are_cells_blocks_or_none():
    model, batch = draw(n=20, size=64)
    hidden = batch.mask.hidden().reshape(20, 4, 2, 4, 2)
    assert (hidden.amax((2, 4)) == hidden.amin((2, 4))).all() and (hidden.sum((1, 2, 3, 4)) == 48).all()  # 12 of 16
    single, batch = draw(n=20, size=64, mask_cell=1, mask_ratio=0.6)
    assert batch.mask.masked.shape == (20, 64 - 25) and single.config.masking == "random"

    def joined(mask):  # how often a hidden patch's right neighbour is hidden
        grid = mask.hidden().reshape(20, 8, 8).double()
        return (grid[:, :, 1:] * grid[:, :, :-1]).sum() / grid[:, :, :-1].sum()

    _, blocks = draw(n=20, size=64, masking="block", mask_ratio=0.4)
    _, specks = draw(n=20, size=64, mask_cell=1, mask_ratio=0.4)
    assert blocks.mask.masked.shape == specks.mask.masked.shape == (20, 26)
    assert joined(blocks.mask) > joined(specks.mask) + 0.15
    assert draw(masking="none")[1].mask is None
    paper = ConMIM(ViT(224, 16, 16, 1, 2), Config(**SMALL))
    assert paper.draw_mask(StepRandom(0, 0, 2)).masked.shape == (2, 148)  # ⌈0.75 · 49⌉ cells of four
    official = ConMIM(ViT(224, 16, 16, 1, 2), Config(**SMALL, masking="block", mask_ratio=0.382))
    assert official.draw_mask(StepRandom(0, 0, 2)).masked.shape == (2, 75)
    assert model.draw_mask(StepRandom(0, 0, 2)).masked.shape == (2, 48)


def test_smallest_blocks_are_in_proportion_to_beits(monkeypatch):
    asked = {}
    monkeypatch.setattr(
        conmim, "block_mask", lambda rng, grid, count, smallest: asked.update({grid: (count, smallest)})
    )
    for size, p in ((224, 16), (64, 8), (32, 8), (256, 8)):
        vit = ViT(size, p, 16, 1, 2)
        ConMIM(vit, Config(**SMALL, masking="block")).draw_mask(None)
    assert asked == {(14, 14): (147, 16), (8, 8): (48, 5), (4, 4): (12, 1), (32, 32): (768, 84)}


@pytest.mark.parametrize("switches", [{}, dict(masking="block"), dict(gray=0.2, jitter=0.8)])
def test_rows_of_ranks_are_those_of_one_process(switches):
    model, images = small(**switches), images_for()
    whole = model.draw(images, torch.arange(6), StepRandom(3, 4, 6))
    for r in range(2):
        rows = slice(3 * r, 3 * r + 3)
        part = model.draw(images[rows], torch.arange(6)[rows], StepRandom(3, 4, 6, rows))
        torch.testing.assert_close(part.images, whole.images[rows], atol=1e-5, rtol=0)
        torch.testing.assert_close(part.full_images, whole.full_images[rows], atol=1e-4, rtol=0)
        assert torch.equal(part.mask.order(), whole.mask.order()[rows])


def test_picture_shows_the_patches_that_are_found():
    model, batch = draw()
    rows = model.picture(batch)
    assert rows.shape == (4, 6, 3, 32, 32) and rows.min() >= 0 and rows.max() <= 1
    original, seen, found, full = rows
    hidden = batch.mask.hidden()
    for row in (seen, found):
        assert torch.equal(patchify(row, 8)[~hidden], patchify(original, 8)[~hidden])
    assert (patchify(seen, 8)[hidden].reshape(-1, 64, 3).std(1) < 1e-6).all()
    torch.testing.assert_close(full, denormalize(batch.full_images).clamp(0, 1))
    sources = [[tuple(p.tolist()) for p in x] for x in patchify(original, 8)]
    assert all(tuple(p.tolist()) in sources[b] for b, x in enumerate(patchify(found, 8)) for p in x)
    model.anchors = lambda images, mask: model.keys(batch.full_images)  # one who knows
    assert torch.equal(model.picture(batch)[2], original)
    model.anchors = lambda images, mask: model.keys(batch.full_images).roll(1, dims=1)  # one who is one patch behind
    off = patchify(model.picture(batch)[2], 8)
    assert torch.equal(off[hidden], patchify(original, 8).roll(1, dims=1)[hidden])
    for switches in (dict(masking="none"), dict(contrast="instance")):
        model, batch = draw(**switches)
        assert model.picture(batch) is None


# ------------------------------------------------------------------------------------------------- settings and errors


@pytest.mark.parametrize("name", ["masking", "contrast", "dictionary", "augmentation"])
def test_an_unknown_choice_is_refused(name):
    with pytest.raises(InputError, match=f"{name} 'odd': unknown; choose "):
        small(**{name: "odd"})


def test_a_mask_ratio_that_leaves_nothing_is_refused():
    for switches in (dict(mask_ratio=0.0), dict(mask_ratio=0.9), dict(masking="block", mask_ratio=1.0)):
        with pytest.raises(InputError, match=r"mask ratio .* of (4|16) patches"):
            small(**switches)  # four cells of four patches: 0.9 leaves none visible
    small(masking="none", mask_ratio=0.0)


@pytest.mark.parametrize("cell", [3, 8])
def test_cells_that_do_not_fill_the_grid_are_refused(cell):
    with pytest.raises(InputError, match=rf"mask cell {cell}: must divide the sides of \(4, 4\) patches"):
        small(mask_cell=cell)
    small(24, mask_cell=cell, masking="block")  # has no cells, and may have three patches a side


def test_one_image_cannot_be_contrasted_with_images():
    model = small(contrast="instance", masking="none")
    with pytest.raises(InputError, match="one image at a time: its key has no negatives; give a larger --batch-size"):
        model(model.draw(images_for(1), torch.arange(1), StepRandom(0, 0, 1)))


def test_the_header_names_switches_that_exist():
    (row,) = re.findall(r'`(contrast="[^`]+)`', conmim.__doc__)
    ConMIM(ViT(224, 16, 16, 1, 2), Config(**SMALL | eval(f"dict({row})")))
    shown = re.findall(r"[(`](--[^)`]+)[)`]", conmim.__doc__)
    assert len(shown) == 10
    before, config, _ = options(["--method", "conmim", "--recipe", "paper"])
    for flags in shown:
        flags += " 0.2" if flags == "--crop-scale" else ""
        args, c, _ = options(["--method", "conmim", "--recipe", "paper", *flags.split()])
        assert (args, c) != (before, config)  # each changes something


def test_recipe_is_table_10s():
    paper = dict(ConMIM.RECIPES["paper"])
    assert paper == dict(
        model="base", image_size=224, patch_size=16, epochs=800, batch_size=2048, betas=(0.9, 0.98), lr=5e-4,
        min_lr=1e-5, warmup_epochs=10, clip_grad=3.0, weight_decay=0.05,
    )  # fmt: skip
    small = "--method conmim --recipe paper --model small --epochs 300 --drop-path 0.1 --mask-cell 1"  # ViT-S
    args, c, _ = options(small.split())
    assert (args.lr, args.min_lr, args.epochs, args.warmup_epochs, args.drop_path) == (5e-4, 1e-5, 300, 10, 0.1)
    assert c == Config(mask_cell=1)
    c = Config()
    assert (c.mask_ratio, c.mask_cell, c.tau, c.momentum) == (0.75, 2, 0.1, 0.996)
    assert (c.jitter, c.gray, c.masking, c.augmentation, c.filter_above) == (1.0, 0.0, "random", "asymmetric", 1.0)
