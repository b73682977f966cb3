"""lcmae.py: the views, Eq. (1), (5), (6) in plain loops, each row of Tables 1 and 2, the collapse of setting (c)."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from test_cmae import plain_decoder, plain_encoder

import lcmae
import mae
from common import Mask, StepRandom, ViT, normalize_patches, patchify, random_mask, split
from lcmae import (
    LCMAE,
    Batch,
    Config,
    LocalDecoder,
    both_views,
    cross_view_loss,
    gaussian_weights,
    in_view_loss,
)
from runtime.errors import InputError
from runtime.optimization import parameter_groups
from train import options

SMALL = dict(decoder_width=16, decoder_depth=2, decoder_heads=2, projector_out=8)
ALONE = dict(mae_weight=1.0, cross_weight=0.0, in_weight=0.0)  # Table 1, setting (b)
SWITCHES = {
    "Table 1a": {},
    "Table 1b": ALONE,
    "Table 1c": dict(mae_weight=0.0, in_weight=0.0),
    "Table 1d": dict(mae_weight=0.0, cross_weight=0.0),
    "Table 1e": dict(in_weight=0.0),
    "Table 1f": dict(cross_weight=0.0),
    "Table 1g": dict(mae_weight=0.0),
    "weights": dict(mae_weight=0.3, cross_weight=2.0, in_weight=0.7),
    "tokens": dict(project="tokens"),
    "tokens, Table 1g": dict(project="tokens", mae_weight=0.0),
    "raw pixels": dict(norm_pixels=False),
    "few masked": dict(mask_ratio=0.3),
    "Table 2, average": dict(decoder="average") | ALONE,
    "Table 2, conv": dict(decoder="conv") | ALONE,
    "Table 2, average, all losses": dict(decoder="average", project="tokens"),
    "Table 2, conv, all losses": dict(decoder="conv"),
}


def small(size=32, **settings):
    torch.manual_seed(0)
    return LCMAE(ViT(size, 8, 32, 2, 4), Config(**SMALL | settings))


def batch_for(model, B=3, seed=0):
    torch.manual_seed(seed)
    c, size = model.config, model.encoder.image_size
    images, rng = torch.randn(B, 3, size, size), StepRandom(seed, 0, B)
    masks = [random_mask(rng, model.encoder.grid, c.mask_ratio) for _ in range(2)]
    return Batch(images, masks[0], masks[1] if c.cross_weight else None)


# ------------------------------------------------------------------------------------------------------- plain loops


def plain_local(decoder, kind, latents, visible, grid):
    """One image's latents (1 + V, D) → the local decoder's features (N, width) in raster order, patch by patch."""
    h, w = grid
    x = decoder.embed(latents)
    tokens = [x[1 + visible.index(i)] if i in visible else decoder.mask_token[0, 0] for i in range(h * w)]
    tokens = [token + decoder.pos_embed[0, 1 + i] for i, token in enumerate(tokens)]
    rows = []
    for i in range(h * w):
        out, total = 0, 0
        for down, right in itertools.product(range(-2, 3), repeat=2):
            row, column = i // w + down, i % w + right
            if 0 <= row < h and 0 <= column < w:
                if kind == "conv":
                    out = out + decoder.conv.weight[:, :, down + 2, right + 2] @ tokens[row * w + column]
                else:
                    weight = math.exp(-(down**2 + right**2) / 2)
                    out, total = out + weight * tokens[row * w + column], total + weight
        if kind == "conv":
            out = out + decoder.conv.bias
        else:
            out = out / total
            out = out + decoder.mlp(decoder.norm1(out))
        rows.append(decoder.norm(out))
    return torch.stack(rows)


def plain_features(model, image, visible):
    latents = plain_encoder(model.encoder, image, visible)
    if model.config.decoder == "transformer":
        return plain_decoder(model.decoder, latents, visible, model.encoder.patches)
    return plain_local(model.decoder, model.config.decoder, latents, visible, model.encoder.grid)


def plain_cos(a, b):
    return (a @ b / (a.norm() * b.norm())).item()


def plain_cross(v, w):
    """Eq. (5) as a mean, for one image: two dicts of vectors by patch."""
    both = v.keys() & w.keys()
    return sum(1 - plain_cos(v[i], w[i]) for i in both) / len(both) if both else 0.0


def plain_in(v, x):
    """Eq. (6) as a mean, for one view of one image: two dicts of vectors by patch."""
    pairs = [(i, j) for i in v for j in v if i != j]
    return sum(abs(plain_cos(v[i], v[j]) - plain_cos(x[i], x[j])) for i, j in pairs) / len(pairs)


def plain_losses(model, batch):
    """Eq. (1), (5), (6) image by image, view by view, patch by patch, as §3 reads."""
    c, B = model.config, len(batch.images)
    views = [batch.mask, batch.second] if c.cross_weight else [batch.mask]
    losses = {"reconstruction": 0.0, "cross": 0.0, "in": 0.0}
    for b in range(B):
        x, vs = patchify(batch.images[b : b + 1], 8)[0], []
        for mask in views:
            visible, masked = mask.visible[b].tolist(), mask.masked[b].tolist()
            tokens, v = plain_features(model, batch.images[b], visible), {}
            for i in masked:
                if c.mae_weight or c.project == "pixels":
                    h = model.decoder.predict(tokens[i])
                if c.mae_weight:
                    t = (x[i] - x[i].mean()) / (x[i].var() + 1e-6).sqrt() if c.norm_pixels else x[i]
                    losses["reconstruction"] += ((h - t) ** 2).mean().item() / (len(masked) * B * len(views))
                if c.cross_weight or c.in_weight:
                    v[i] = model.projector(h if c.project == "pixels" else tokens[i])
            vs.append(v)
        if c.cross_weight:
            losses["cross"] += plain_cross(*vs) / B
        if c.in_weight:
            losses["in"] += sum(plain_in(v, x) for v in vs) / (B * len(vs))
    return losses


@pytest.mark.parametrize("name", SWITCHES)
@torch.no_grad()
def test_forward_matches_the_equations_in_plain_loops(name):
    model = small(**SWITCHES[name]).double()
    batch = batch_for(model)
    batch = batch._replace(images=batch.images.double())
    c, out = model.config, model(batch)
    expected = plain_losses(model, batch)
    weights = {"reconstruction": c.mae_weight, "cross": c.cross_weight, "in": c.in_weight}
    assert out.keys() - {"loss"} == {part for part, weight in weights.items() if weight}
    for part in out.keys() - {"loss"}:
        assert out[part].item() == pytest.approx(expected[part], rel=1e-4), part
    total = sum(weights[part] * expected[part] for part in weights)
    assert out["loss"].item() == pytest.approx(total, rel=1e-4)
    if batch.second is not None:  # the mean over images is not the mean over patches
        assert len({*(batch.mask.hidden() & batch.second.hidden()).sum(1).tolist()}) > 1


# ----------------------------------------------------------------------------------------------------------- Table 1


def test_weights_1_0_0_are_mae_to_the_bit_over_whole_training_steps():
    """Setting (b): the same weights from one seed, the same draws, losses, gradients and steps, and nothing more."""
    ours = small(**ALONE, crop_scale=0.5)
    torch.manual_seed(0)
    config = mae.Config(decoder_width=16, decoder_depth=2, decoder_heads=2, crop_scale=0.5)
    theirs = mae.MAE(ViT(32, 8, 32, 2, 4), config)
    images = torch.randint(0, 256, (4, 3, 40, 40), dtype=torch.uint8)
    optimizers = [torch.optim.AdamW(parameter_groups(m, 0.05), lr=1e-2) for m in (ours, theirs)]
    for step in range(3):
        batches = [m.draw(images, torch.arange(4), StepRandom(0, step, 4)) for m in (ours, theirs)]
        assert torch.equal(batches[0].images, batches[1].images)
        assert torch.equal(batches[0].mask.order(), batches[1].mask.order()) and batches[0].second is None
        losses = [m(b)["loss"] for m, b in zip((ours, theirs), batches, strict=True)]
        assert torch.equal(*losses)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    states = [m.state_dict() for m in (ours, theirs)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert torch.equal(ours.picture(batches[0]), theirs.picture(batches[1]))


def test_two_equal_masks_are_mae_without_distance_between_the_views():
    model = small()
    batch = batch_for(model)
    batch = batch._replace(second=batch.mask)
    alone = small(**ALONE)
    out = model(batch)
    assert out["cross"].abs() < 1e-6
    torch.testing.assert_close(out["reconstruction"], alone(batch)["loss"])


@pytest.mark.parametrize("name", SWITCHES)
def test_gradient_reaches_everything_that_is_built(name):
    model = small(**SWITCHES[name])
    model(batch_for(model))["loss"].backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name


def test_only_what_a_setting_needs_is_built():
    built = {name: {n.split(".")[0] for n, _ in small(**s).named_parameters()} for name, s in SWITCHES.items()}
    assert all(("projector" in parts) == (name not in WITHOUT) for name, parts in built.items())
    assert small(project="tokens", mae_weight=0.0).decoder.predict is None
    assert small(project="tokens").projector.in_features == 16 and small().projector.in_features == 192
    projector = small().projector  # initialised as all the rest is: zero biases, xavier-uniform weights
    assert not projector.bias.any() and 0.99 < projector.weight.abs().max() / math.sqrt(6 / (192 + 8)) <= 1


WITHOUT = {n for n, s in SWITCHES.items() if {**s, **ALONE} == s}


def test_each_loss_sees_both_views_with_gradient():
    """§3.3: no stop-gradient. Were one view cut off, exchanging the two would change the gradient."""
    for part in ("reconstruction", "cross", "in"):
        model, gradients = small(), []
        batch = batch_for(model)
        for swapped in (batch, batch._replace(mask=batch.second, second=batch.mask)):
            model.zero_grad()
            model(swapped)[part].backward()
            gradients.append(model.encoder.patch_embed.proj.weight.grad.clone())
        torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-3)
        assert gradients[0].abs().sum() > 0


def test_images_weigh_the_same_however_they_are_shared_out():
    """Two ranks of two images average to one of four, though each image has its own number of patches in Eq. (5)."""
    for ratio in (0.75, 0.1):
        model = small(mask_ratio=ratio)
        batch = batch_for(model, B=4, seed=5)
        counts = (batch.mask.hidden() & batch.second.hidden()).sum(1)
        assert counts[:2].sum() != counts[2:].sum() and (ratio > 0.5 or counts.min() == 0)
        halves = [
            model(Batch(batch.images[r], *(Mask(m.visible[r], m.masked[r]) for m in (batch.mask, batch.second))))
            for r in (slice(0, 2), slice(2, 4))
        ]
        for part, whole in model(batch).items():
            torch.testing.assert_close(sum(half[part] for half in halves) / 2, whole)


@pytest.mark.training
@pytest.mark.slow
def test_cross_alone_collapses_and_the_other_losses_prevent_it():
    """§3.3: setting (c) ends in a constant point; L_in (g) or L_MAE (e) beside it, or L_in alone (d), do not."""
    left = {name: trained_spread(SWITCHES["Table 1" + name]) for name in "cdeg"}
    # 0.08 before training. Over seeds (c) ends at 0.0004 to 0.0013, the least of the others at 0.035 to 0.079.
    assert left["c"] < 0.008 and min(left["d"], left["e"], left["g"]) > 5 * left["c"], left


def trained_spread(weights, steps=100, size=64, n=256):
    """Standard deviation over images of the unit vector v at a patch, times √d, after training on colour gradients."""
    torch.manual_seed(1)
    slopes, ramp = torch.randn(2, n, 3, 1, 1), torch.linspace(-1, 1, 32)
    images = (((slopes[0] * ramp[:, None] + slopes[1] * ramp) / 6 + 0.5).clamp(0, 1) * 255).to(torch.uint8)
    model = small(projector_out=32, **weights)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=3e-3, betas=(0.9, 0.95))
    for step in range(steps):
        index = torch.arange(step * size, (step + 1) * size) % n
        optimizer.zero_grad()
        model(model.draw(images[index], index, StepRandom(0, step, size)))["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        batch = model.draw(images, torch.arange(n), StepRandom(0, steps, n))
        mask = Mask(*(part[:1].expand(n, -1) for part in batch.mask))  # one for all, to see the images apart
        v = F.normalize(model.projector(model.decode(batch.images, mask)[1]), dim=-1)
    return v.std(0).mean().item() * math.sqrt(32)


# -------------------------------------------------------------------------------------------------- Eq. (5), Eq. (6)


@st.composite
def two_masks(draw):
    B, n = draw(st.integers(1, 4)), draw(st.integers(2, 12))
    keep, seed = draw(st.integers(1, n - 1)), draw(st.integers(0, 10**6))
    torch.manual_seed(seed)
    masks = [split(torch.rand(B, n).argsort(1), keep) for _ in range(2)]
    return *masks, torch.randn(B, n - keep, 5), torch.randn(B, n - keep, 5)


@given(two_masks())
def test_cross_view_loss_is_eq_5(drawn):
    mask, second, v, w = drawn
    loss = cross_view_loss(v, w, mask, second)
    expected = [
        plain_cross(*({i: x.double() for i, x in zip(m.masked[b].tolist(), y[b], strict=True)} for m, y in views))
        for views in [((mask, v), (second, w))]
        for b in range(len(v))
    ]
    assert loss.item() == pytest.approx(sum(expected) / len(v), abs=1e-5)
    assert -1e-6 <= loss <= 2 + 1e-6
    torch.testing.assert_close(cross_view_loss(w, v, second, mask), loss)  # symmetric
    torch.testing.assert_close(cross_view_loss(3 * v, 0.1 * w, mask, second), loss)  # lengths do not matter
    flipped = Mask(mask.visible, mask.masked.flip(1))
    torch.testing.assert_close(cross_view_loss(v.flip(1), w, flipped, second), loss)  # nor does the order
    assert cross_view_loss(v, 2 * v, mask, mask).abs() < 1e-5  # equal views
    torch.testing.assert_close(cross_view_loss(v, -v, mask, mask), torch.tensor(2.0))  # opposite ones


@given(two_masks())
def test_only_patches_masked_in_both_views_get_gradient_from_eq_5(drawn):
    mask, second, v, w = drawn
    assume(bool((mask.hidden() & second.hidden()).any()))
    v.requires_grad_(), w.requires_grad_()
    cross_view_loss(v, w, mask, second).backward()
    for x, own, other in ((v, mask, second), (w, second, mask)):
        shared = other.hidden().gather(1, own.masked)  # (B, M)
        moved = x.grad.abs().sum(-1) > 0
        assert torch.equal(moved, shared)


@given(two_masks())
def test_cross_view_loss_is_half_the_squared_distance_of_unit_vectors(drawn):
    mask, _, v, w = drawn
    unit = [F.normalize(x, dim=-1) for x in (v, w)]
    distance = (unit[0] - unit[1]).square().sum(-1).mean()  # all of `mask` is masked in both
    torch.testing.assert_close(2 * cross_view_loss(v, w, mask, mask), distance, atol=1e-5, rtol=1e-5)


def test_no_patch_masked_in_both_views_costs_nothing():
    mask, second = (Mask(torch.tensor([o[2:]]), torch.tensor([o[:2]])) for o in ([0, 1, 2, 3], [2, 3, 0, 1]))
    v = torch.randn(1, 2, 5, requires_grad=True)
    loss = cross_view_loss(v, v, mask, second)
    loss.backward()
    assert loss == 0 and torch.equal(v.grad, torch.zeros_like(v))


@given(st.integers(1, 3), st.integers(1, 6), st.integers(0, 10**6))
def test_in_view_loss_is_eq_6(B, M, seed):
    torch.manual_seed(seed)
    v, x = torch.randn(B, M, 4), torch.randn(B, M, 6)
    loss = in_view_loss(v, x)
    if M == 1:  # no pair
        assert loss == 0
        return
    expected = [plain_in(*(dict(enumerate(y[b].double())) for y in (v, x))) for b in range(B)]
    assert loss.item() == pytest.approx(sum(expected) / B, abs=1e-5)
    assert 0 <= loss <= 2
    turn = torch.linalg.qr(torch.randn(6, 6)).Q
    lengths = torch.rand(B, M, 1) + 0.1
    torch.testing.assert_close(in_view_loss(x @ turn * lengths, x), torch.zeros(()), atol=1e-5, rtol=0)
    order = torch.randperm(M)
    torch.testing.assert_close(in_view_loss(v[:, order], x[:, order]), loss)
    constant = torch.ones(B, M, 4)  # a collapsed output pays
    assert in_view_loss(constant, x).item() == pytest.approx(
        sum(1 - plain_cos(x[b, i], x[b, j]) for b in range(B) for i in range(M) for j in range(M) if i != j)
        / (B * M * (M - 1)),
        abs=1e-4,
    )


def test_in_view_loss_leaves_out_the_diagonal_even_of_a_patch_of_zeros():
    v, x = torch.eye(3)[None], torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    assert in_view_loss(v, x) == 0  # all pairs are orthogonal, and cos(x_0, x_0) would be 0, not 1


def test_in_view_loss_compares_with_the_masked_input_patches():
    """x are the pixels that the encoder is given, not the per-patch normalised ones of L_MAE."""
    model = small(**SWITCHES["Table 1d"])
    batch = batch_for(model)
    brighter = batch._replace(images=batch.images + 5)  # all patches alike now, though normalised they are the same
    _, h = model.decode(brighter.images, brighter.mask)
    x = patchify(brighter.images, 8).gather(1, batch.mask.masked[:, :, None].expand(-1, -1, 192))
    torch.testing.assert_close(model(brighter)["in"], in_view_loss(model.projector(h), x))
    assert (model(brighter)["in"] - in_view_loss(model.projector(h), normalize_patches(x))).abs() > 0.1


# ----------------------------------------------------------------------------------------------------------- Table 2


@given(st.integers(1, 7), st.integers(1, 7), st.sampled_from([1.0, 0.7]))
def test_gaussian_weights_are_normalised_inside_the_image(h, w, sigma):
    weights = gaussian_weights((h, w), sigma) if sigma != 1 else gaussian_weights((h, w))
    torch.testing.assert_close(weights.sum(1), torch.ones(h * w))
    for i, j in itertools.product(range(h * w), repeat=2):
        down, right = abs(i // w - j // w), abs(i % w - j % w)
        ratio = math.exp(-(down**2 + right**2) / (2 * sigma**2)) if max(down, right) <= 2 else 0
        assert (weights[i, j] / weights[i, i]).item() == pytest.approx(ratio, abs=1e-6)


@pytest.mark.parametrize("kind", ["average", "conv"])
def test_local_decoders_have_maes_epsilon_and_keep_no_weights_in_a_checkpoint(kind):
    decoder = LocalDecoder(ViT(32, 8, 32, 1, 4), 16, kind, 12)
    assert {part.eps for part in decoder.modules() if isinstance(part, torch.nn.LayerNorm)} == {1e-6}
    assert not {"weights", "pos_embed"} & decoder.state_dict().keys()
    assert kind == "conv" or decoder.mlp.fc1.weight.shape == (4 * 16, 16)


@pytest.mark.parametrize("kind", ["average", "conv"])
def test_local_decoders_reach_five_by_five_patches_and_no_class_token(kind):
    torch.manual_seed(0)
    encoder = ViT((48, 64), 8, 32, 1, 4)
    decoder = LocalDecoder(encoder, 16, kind, 12)
    mask = random_mask(StepRandom(0, 0, 1), encoder.grid, 0.6)
    latents = torch.randn(1, 1 + mask.visible.shape[1], 32, requires_grad=True)
    predicted = decoder(latents, mask)
    assert predicted.shape == (1, mask.masked.shape[1], 12)
    for place, i in enumerate(mask.masked[0].tolist()):
        (gradient,) = torch.autograd.grad(predicted[0, place].square().sum(), latents, retain_graph=True)
        moved = gradient[0].abs().sum(-1) > 0
        near = [abs(i // 8 - j // 8) <= 2 and abs(i % 8 - j % 8) <= 2 for j in mask.visible[0].tolist()]
        assert moved.tolist() == [False, *near]


# ------------------------------------------------------------------------------------------------- draw and pictures


def images_for(n=6, side=48):
    torch.manual_seed(5)
    return (F.interpolate(torch.rand(n, 3, 6, 6), side, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


def test_draw_gives_two_independent_masks_of_one_crop():
    model = small(64)
    images = images_for().repeat(50, 1, 1, 1)
    batch = model.draw(images, torch.arange(300), StepRandom(2, 3, 300))
    assert batch.images.shape == (300, 3, 64, 64) and batch.mask.visible.shape == batch.second.visible.shape == (
        300,
        16,
    )
    shared = (batch.mask.hidden() & batch.second.hidden()).float().mean(1)
    assert 0.555 < shared.mean() < 0.57 and shared.std() > 0  # 0.75² = 0.5625 of the patches, a standard error of 0.001
    images, mask = both_views(batch)
    assert torch.equal(images, torch.cat([batch.images, batch.images]))
    assert torch.equal(mask.hidden(), torch.cat([batch.mask.hidden(), batch.second.hidden()]))


def test_draw_hides_what_the_setting_asks_for():
    images = images_for()
    one = small(**SWITCHES["Table 1f"]).draw(images, torch.arange(6), StepRandom(2, 3, 6))
    assert one.second is None and one.mask.visible.shape == (6, 4)
    cells = small(64, mask_cell=2, mask_ratio=0.5).draw(images, torch.arange(6), StepRandom(2, 3, 6))
    for mask in (cells.mask, cells.second):
        squares = mask.hidden().reshape(6, 4, 2, 4, 2).float().mean((2, 4))
        assert ((squares == 0) | (squares == 1)).all() and (squares.mean((1, 2)) == 0.5).all()


@pytest.mark.parametrize("settings", [{}, ALONE])
def test_rows_of_ranks_are_those_of_one_process(settings):
    model, images = small(**settings), images_for()
    whole = model.draw(images, torch.arange(6), StepRandom(3, 4, 6))
    for r in range(2):
        rows = slice(3 * r, 3 * r + 3)
        part = model.draw(images[rows], torch.arange(6)[rows], StepRandom(3, 4, 6, rows))
        torch.testing.assert_close(part.images, whole.images[rows], atol=1e-5, rtol=0)
        assert torch.equal(part.mask.order(), whole.mask.order()[rows])
        assert (part.second is None) == (whole.second is None)
        if part.second is not None:
            assert torch.equal(part.second.order(), whole.second.order()[rows])


def test_picture_shows_both_views_and_nothing_that_was_not_taught():
    rows = {name: (m := small(**s)).picture(batch_for(m)) for name, s in SWITCHES.items()}
    for name, picture in rows.items():
        settings = Config(**SMALL | SWITCHES[name])
        if not settings.mae_weight:
            assert picture is None
            continue
        assert len(picture) == (5 if settings.cross_weight else 3)
        assert picture.shape[1:] == (3, 3, 32, 32) and picture.min() >= 0 and picture.max() <= 1
    model = small()
    batch = batch_for(model)
    swapped = model.picture(batch._replace(mask=batch.second, second=batch.mask))
    torch.testing.assert_close(model.picture(batch)[[0, 3, 4, 1, 2]], swapped, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------ recipes and errors


def test_the_paper_recipe_is_section_5():
    paper = lcmae.RECIPES["paper"]
    expected = dict(model="base", image_size=224, patch_size=16, epochs=100, warmup_epochs=20, batch_size=1024)
    assert expected.items() <= paper.items() and paper["base_lr"] == 6e-4
    c = Config(**{k: v for k, v in paper.items() if k in Config.__dataclass_fields__})
    assert (c.mask_ratio, c.decoder_depth, c.projector_out) == (0.75, 2, 1024)
    assert (c.mae_weight, c.cross_weight, c.in_weight) == (1, 1, 1)
    same = {f.name for f in dataclasses.fields(mae.Config)} - {"decoder_depth"}
    assert all(getattr(c, name) == getattr(mae.Config(), name) for name in same)


def test_the_headers_commands_set_what_the_other_tables_say():
    """Tables 2, 3, A.1: MAE at 1.5e-4 · 1024 / 256, 8 decoder blocks (Figure 4), §5's schedule."""
    header = {line.strip().split("  ")[0]: line.split("--", 1)[1] for line in lcmae.__doc__.splitlines()
              if line.startswith("      Table")}  # fmt: skip
    assert header.keys() == {"Table 2", "Table 3", "Table A.1"}
    for table, line in header.items():
        method = [] if "--method" in line else ["--method", "lcmae"]
        flags = ("--" + line.split("(")[0]).split()
        args, config, _ = options([*method, "--recipe", "paper", *flags])
        assert args.lr == pytest.approx(6e-4) and args.batch_size == 1024 and config.decoder_depth == 8
        assert args.model == "base" and getattr(config, "mask_ratio", 0.75) == 0.75
        if table == "Table A.1":
            assert (args.method, args.images, args.repeat, args.epochs) == ("mae", 1, 1_281_167, 5)
            assert args.warmup_epochs < args.epochs
            continue
        assert (args.epochs, args.warmup_epochs) == (100, 20)
        if table == "Table 3":
            assert args.method == "autoencoder" and config.block == args.patch_size == 16
        else:
            assert (config.mae_weight, config.cross_weight, config.in_weight) == (1, 0, 0)


@pytest.mark.parametrize("settings,message", [
    (dict(decoder="mlp"), "decoder 'mlp': unknown; choose transformer, average or conv"),
    (dict(project="latents"), "project 'latents': unknown; choose pixels or tokens"),
    (ALONE | dict(mae_weight=0.0), "weights 0, 0, 0: nothing to learn"),
    (dict(mask_ratio=1.0), "mask ratio"),
    (dict(mask_cell=3), "mask cell 3: must divide"),
])  # fmt: skip
def test_what_cannot_work_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        small(**settings)


def test_losses_are_float32_under_autocast():
    for settings in SWITCHES.values():
        model = small(**settings)
        batch = batch_for(model)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(batch)
        for part, value in out.items():
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, copy.deepcopy(model)(batch)[part], atol=0.05, rtol=0.05)
