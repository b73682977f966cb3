"""cmae.py: the views, the branches, every equation in plain loops, every row of Tables 4 and 6."""

import copy
import math
import shlex

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_common import naive_info_nce

import cmae
import mae
from cmae import CMAE, RECIPES, Batch, Config, byol_loss, shift_bounds
from common import StepRandom, ViT, patchify, random_mask, unpatchify
from inputs import augment
from inputs.augment import denormalize
from runtime.errors import InputError
from runtime.optimization import parameter_groups
from train import options

SMALL = dict(decoder_width=16, decoder_depth=3, decoder_heads=2, projector_width=24, projector_out=8)


def small(size=32, B=3, **settings):
    torch.manual_seed(0)
    model = CMAE(ViT(size, 8, 32, 2, 4), Config(**SMALL | settings))
    if model.config.lambda_c:  # a teacher that is not the student
        for parameter in [*model.momentum_encoder.parameters(), *model.momentum_projector.parameters()]:
            parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def batch_for(model, B=3, seed=0):
    torch.manual_seed(seed)
    size, rng = model.encoder.image_size, StepRandom(seed, 0, B)
    ratio = model.config.target_mask_ratio
    return Batch(
        torch.randn(B, 3, size, size),
        random_mask(rng, model.encoder.grid, model.config.mask_ratio),
        torch.randn(B, 3, size, size),
        random_mask(rng, model.encoder.grid, ratio) if ratio else None,
    )


def plain_encoder(vit, images, tokens, norm=True):
    """The encoder on chosen patches of one image, from the convolution on: (3, H, W), [indices] → (1 + V, D)."""
    x = vit.patch_embed.proj(images[None]).flatten(2).transpose(1, 2)[0]
    x = torch.stack([x[i] + vit.pos_embed[0, 1 + i] for i in tokens])
    x = torch.cat([vit.cls_token[0], x])[None]
    for block in vit.blocks:
        x = block(x)
    return (vit.norm(x) if norm else x)[0]


def plain_head(head, rows):
    hidden = [head.hidden(r) for r in rows]
    mean = sum(hidden) / len(hidden)
    variance = sum((h - mean) ** 2 for h in hidden) / len(hidden)
    normed = [(h - mean) / (variance + 1e-6).sqrt() * head.norm.weight + head.norm.bias for h in hidden]
    return [head.out(n.clamp(min=0)) for n in normed]


def plain_decoder(decoder, latents, visible, n):
    """One image's latents (1 + V, D) → features (N, width) in raster order, mask tokens where nothing was seen."""
    x = decoder.embed(latents)
    rows = [x[0] + decoder.pos_embed[0, 0]]
    for i in range(n):
        token = x[1 + visible.index(i)] if i in visible else decoder.mask_token[0, 0]
        rows.append(token + decoder.pos_embed[0, 1 + i])
    x = torch.stack(rows)[None]
    for block in decoder.blocks:
        x = block(x)
    return decoder.norm(x)[0, 1:]


def plain_loss(model, batch):
    """Eq. (1)-(8) image by image, token by token, as §3 reads."""
    c, B, N = model.config, len(batch.images), model.encoder.patches
    l_r, ys, zs = 0.0, [], []
    for b in range(B):
        visible, masked = batch.mask.visible[b].tolist(), batch.mask.masked[b].tolist()
        z_v = plain_encoder(model.encoder, batch.images[b], visible)  # Eq. (1)
        y_m = model.decoder.predict(plain_decoder(model.decoder, z_v, visible, N))  # Eq. (3)
        target = patchify(batch.images[b : b + 1], model.encoder.patch_size)[0]
        for i in masked:  # Eq. (5), with MAE's normalised pixels
            t = (target[i] - target[i].mean()) / (target[i].var() + 1e-6).sqrt()
            l_r += ((y_m[i] - t) ** 2).mean().item() / (len(masked) * B)
        if c.feature_decoder_depth:  # Eq. (4)
            features = model.feature_decoder.predict(plain_decoder(model.feature_decoder, z_v, visible, N))
            ys.append(sum(features) / N)
        else:
            ys.append(sum(z_v[1:]) / len(visible))
        tokens = batch.target_mask.visible[b].tolist() if batch.target_mask else range(N)
        z_t = plain_encoder(model.momentum_encoder, batch.target_images[b], tokens, norm=c.target_norm)
        zs.append(sum(z_t[1:]) / len(tokens))  # Eq. (2)
    y = plain_head(model.predictor, plain_head(model.projector, ys))
    z = plain_head(model.momentum_projector, zs)
    if c.contrast == "infonce":
        l_c = naive_info_nce([r.tolist() for r in y], [r.tolist() for r in z], c.tau)  # Eq. (6), (7)
    else:
        l_c = sum(2 - 2 * (a @ b / a.norm() / b.norm()).item() for a, b in zip(y, z, strict=True)) / B
    l_c *= 2 * c.tau if c.official_scale else 1
    return l_r, l_c, l_r + c.lambda_c * l_c  # Eq. (8)


SWITCHES = {
    "the paper": {},
    "Table 4c, no feature decoder": dict(feature_decoder_depth=0),
    "Table 4c, one block": dict(feature_decoder_depth=1),
    "Table 4c, shared": dict(share_decoder=True),
    "Table 4d": dict(lambda_c=0.5),
    "Table 4e": dict(target_mask_ratio=0.5),
    "§4.4, BYOL": dict(contrast="byol"),
    "official code": dict(official_scale=True, target_norm=False, mask_ratio=0.6),
    "another temperature": dict(tau=0.3),
}


@pytest.mark.parametrize("name", SWITCHES)
@torch.no_grad()
def test_forward_matches_the_equations_in_plain_loops(name):
    model = small(**SWITCHES[name]).double()
    batch = batch_for(model)
    batch = batch._replace(images=batch.images.double(), target_images=batch.target_images.double())
    l_r, l_c, total = plain_loss(model, batch)
    out = model(batch)
    assert out["reconstruction"].item() == pytest.approx(l_r, rel=1e-5)
    assert out["contrast"].item() == pytest.approx(l_c, rel=1e-4, abs=1e-5)
    assert out["loss"].item() == pytest.approx(total, rel=1e-4, abs=1e-5)


def test_lambda_c_zero_is_mae_to_the_bit():
    model = small(lambda_c=0.0)
    plain = mae.MAE(copy.deepcopy(model.encoder), mae.Config(decoder_width=16, decoder_depth=3, decoder_heads=2))
    plain.load_state_dict(model.state_dict(), strict=True)
    batch = batch_for(model)
    assert torch.equal(model(batch)["loss"], plain(mae.Batch(batch.images, batch.mask))["loss"])
    assert list(model(batch)) == ["loss"]
    drawn = model.draw(images_for(), torch.arange(6), StepRandom(0, 1, 6))
    assert drawn.target_images is None and drawn.target_mask is None and len(model.picture(drawn)) == 3


@pytest.mark.parametrize("contrast", ["infonce", "byol"])  # the first cuts its keys off by itself
def test_gradient_reaches_the_online_branch_and_never_the_target(contrast):
    model = small(contrast=contrast)
    model.momentum_encoder.requires_grad_(True)  # were the branch not cut off, this would let gradient in
    model.momentum_projector.requires_grad_(True)
    batch = batch_for(model)
    target_images = batch.target_images.requires_grad_()
    model(batch._replace(target_images=target_images))["contrast"].backward()
    assert target_images.grad is None
    for name, parameter in model.named_parameters():
        if name.startswith("momentum") or name.startswith("decoder.") or not parameter.requires_grad:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    model(batch)["reconstruction"].backward()
    assert all(p.grad.abs().sum() > 0 for p in model.decoder.parameters())


@pytest.mark.parametrize("settings, said", [
    (dict(mask_cell=3), "mask cell 3: must divide"),
    (dict(mask_ratio=0.8, mask_cell=2), "mask ratio 0.8 leaves none of 4 patches or cells visible"),
    (dict(target_mask_ratio=1.0), "mask ratio 1 leaves none of 16"),
])  # fmt: skip
def test_a_mask_that_leaves_nothing_or_does_not_fit_is_refused_at_once(settings, said):
    with pytest.raises(InputError, match=said):
        small(**settings)


def test_shared_decoder_shares_all_but_norm_and_output():
    model = small(share_decoder=True, feature_decoder_depth=2)
    shared = {id(p) for p in model.decoder.parameters()} & {id(p) for p in model.feature_decoder.parameters()}
    own = [n for n, p in model.feature_decoder.named_parameters() if id(p) not in shared]
    assert own == ["norm.weight", "norm.bias", "predict.weight", "predict.bias"]
    assert len(model.feature_decoder.blocks) == 2 and len(model.decoder.blocks) == 3
    assert len(small(share_decoder=True, feature_decoder_depth=1).feature_decoder.blocks) == 1
    separate = small(feature_decoder_depth=2)
    assert not {id(p) for p in separate.decoder.parameters()} & {id(p) for p in separate.feature_decoder.parameters()}
    for blocks in (0, 4):
        with pytest.raises(InputError, match=f"feature decoder of {blocks} blocks: .* give 1 to 3"):
            small(share_decoder=True, feature_decoder_depth=blocks)


def test_the_momentum_encoder_sees_everything_or_the_unmasked():
    for ratio in (0.0, 0.5):
        model = small(target_mask_ratio=ratio)
        batch = batch_for(model)
        z = model.target_feature(batch.target_images, batch.target_mask)
        hidden = batch.target_mask.hidden() if ratio else torch.zeros(3, 16, dtype=torch.bool)
        patches = patchify(batch.target_images, 8)
        changed = unpatchify(patches + torch.randn_like(patches) * hidden[:, :, None], 8, (4, 4))
        assert torch.equal(model.target_feature(changed, batch.target_mask), z)
        changed = unpatchify(patches + torch.randn_like(patches) * ~hidden[:, :, None], 8, (4, 4))
        assert not torch.allclose(model.target_feature(changed, batch.target_mask), z)


def test_ema_moves_encoder_and_projector_only_toward_the_student():
    model = small(momentum=0.9)
    before = copy.deepcopy(model)
    model.update_teacher(0.5)
    for part in ("encoder", "projector"):
        students, teachers = getattr(model, part).parameters(), getattr(model, "momentum_" + part).parameters()
        olds = getattr(before, "momentum_" + part).parameters()
        for student, teacher, old in zip(students, teachers, olds, strict=True):
            torch.testing.assert_close(teacher, 0.9 * old + 0.1 * student)
    for name, parameter in model.named_parameters():
        if not name.startswith("momentum"):
            assert torch.equal(parameter, before.get_parameter(name))


def test_teacher_starts_as_the_student_and_is_not_trained():
    model = CMAE(ViT(32, 8, 32, 2, 4), Config(**SMALL))
    for part in ("encoder", "projector"):
        pairs = zip(getattr(model, part).parameters(), getattr(model, "momentum_" + part).parameters(), strict=True)
        assert all(torch.equal(s, t) and s.requires_grad and not t.requires_grad for s, t in pairs)


def test_heads_are_twice_as_wide_as_the_encoder_where_no_width_is_given():
    for width, hidden in ((0, 64), (24, 24)):
        model = small(projector_width=width)
        assert (model.projector.hidden.weight.shape, model.predictor.hidden.weight.shape) == ((hidden, 32), (hidden, 8))
        assert model.projector.out.weight.shape == model.predictor.out.weight.shape == (8, hidden)


@given(st.integers(2, 6), st.integers(0, 10**6))
def test_byol_loss_is_the_squared_distance_of_unit_vectors(n, seed):
    torch.manual_seed(seed)
    y, z = torch.randn(n, 5), torch.randn(n, 5)
    unit = y / y.norm(dim=1, keepdim=True) - z / z.norm(dim=1, keepdim=True)
    assert byol_loss(y, z).item() == pytest.approx(unit.square().sum(1).mean().item(), abs=1e-5)
    assert byol_loss(y, 3 * y).abs() < 1e-5 and byol_loss(y, -y).item() == pytest.approx(4, abs=1e-5)


# ------------------------------------------------------------------------------------- the paper's settings and tables

PLAIN = dict(target_color=False)
CROPS = dict(pixel_shift=False)
ENCODER = dict(feature_decoder_depth=0)
ROWS = {  # from the top; {} is the default, which every table contains
    "4a": [CROPS | ENCODER, ENCODER, {}],  # before these comes MAE
    "4b": [dict(shift_range="0") | PLAIN, CROPS | PLAIN, PLAIN, {}],
    "4c": [ENCODER, {}, dict(share_decoder=True)]
    + [dict(feature_decoder_depth=4, share_decoder=share) for share in (False, True)],
    "4d": [dict(lambda_c=0.1), dict(lambda_c=0.5), {}, dict(lambda_c=1.5), dict(lambda_c=2.0)],
    "4e": [{}] + [dict(target_mask_ratio=ratio) for ratio in (0.25, 0.5, 0.65, 0.75)],
    "6": [CROPS] + [dict(shift_range=r) for r in ("0", "0-15")] + [{}]
    + [dict(shift_range=r) for r in ("0-47", "0-63", "32-47", "48-63")],
}  # fmt: skip


@torch.no_grad()
def losses_of(**settings):
    model = small(decoder_depth=4, **settings)
    return model(model.draw(images_for(), torch.arange(6), StepRandom(0, 1, 6)))


@pytest.mark.parametrize("table", ROWS)
def test_every_row_of_tables_4_and_6_is_a_setting_of_its_own(table):
    """Each row trains, and on the same images no two come to the same loss: no switch does nothing."""
    losses = [losses_of(**row)["loss"].item() for row in ROWS[table]]
    assert all(math.isfinite(x) for x in losses) and len(set(losses)) == len(losses)
    assert [x == losses_of()["loss"].item() for x in losses] == [row == {} for row in ROWS[table]]


def test_the_paper_recipe_and_the_defaults_are_the_papers():
    recipe = RECIPES["paper"]  # §4.1, Table 4's 300 epochs
    assert (recipe["model"], recipe["epochs"], recipe["warmup_epochs"]) == ("base", 300, 40)
    assert (recipe["batch_size"], recipe["base_lr"]) == (4096, 1.5e-4)
    assert (recipe["betas"], recipe["weight_decay"]) == ((0.9, 0.95), 0.05)
    assert not set(recipe) & set(Config.__dataclass_fields__)  # the ablations' defaults stand
    c = Config()
    assert (c.mask_ratio, c.shift_range, c.feature_decoder_depth, c.target_mask_ratio) == (0.75, "0-31", 2, 0)
    assert (c.tau, c.lambda_c, c.momentum, c.contrast) == (0.07, 1, 0.996, "infonce")
    assert c.pixel_shift and c.target_color and not c.share_decoder and not c.official_scale


def test_the_headers_command_spares_the_tokens_weight_decay():
    flag = cmae.__doc__.split("(--no-decay")[1].split(")")[0]
    args, _, _ = options(["--method", "cmae", "--no-decay", *shlex.split(flag)])
    model = small()
    spared = {id(p) for p in parameter_groups(model, 0.05, tuple(args.no_decay))[1]["params"]}
    for name, parameter in model.named_parameters():
        if name.endswith("_token") and parameter.requires_grad:
            assert id(parameter) in spared, name
    assert id(model.encoder.blocks[0].mlp.fc1.weight) not in spared


# ------------------------------------------------------------------------------------------------------------ views


@pytest.mark.parametrize("text,size,expected", [
    ("0-31", 224, (0, 32)), ("32-47", 224, (32, 48)), ("48-63", 224, (48, 64)), ("0", 224, (0, 0)), ("0-0", 64, (0, 0)),
    ("0-31", 64, (0, 9)), ("32-47", 64, (9, 14)), ("15", 224, (0, 16)), ("64-127", 448, (128, 256)),
])  # fmt: skip
def test_shift_bounds_of_table_6(text, size, expected):
    assert shift_bounds(text, size) == expected


@given(st.integers(0, 80), st.integers(0, 80), st.integers(16, 300))
def test_shift_bounds_leave_at_least_one_shift(a, b, size):
    low, p = shift_bounds(f"{min(a, b)}-{max(a, b)}", size)
    assert 0 <= low < max(p, 1)
    if b:
        assert abs(p - (max(a, b) + 1) * size / 224) <= 1


@pytest.mark.parametrize("text", ["", "a-b", "5-3", "-3", "1-2-3"])
def test_a_wrong_shift_range_is_refused(text):
    with pytest.raises(InputError, match="shift range"):
        small(shift_range=text)


def images_for(n=6, side=48):
    torch.manual_seed(5)
    coarse = torch.rand(n, 3, 6, 6)  # smooth, so that crops differ visibly
    return (torch.nn.functional.interpolate(coarse, side, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


def draw(seed=0, n=64, **settings):
    model = small(**settings)
    images = images_for().repeat(math.ceil(n / 6), 1, 1, 1)[:n]
    return model, model.draw(images, torch.arange(n), StepRandom(seed, 1, n))


def offset_between(view, target, p):
    """The shift (down, right) that makes target the view shifted, found by search over their overlap; None if none."""
    size = view.shape[-1]
    for dy in range(p):
        for dx in range(p):
            if torch.allclose(view[:, dy:, dx:], target[:, : size - dy, : size - dx], atol=1e-6):
                return dy, dx
    return None


@pytest.mark.parametrize("shift_range,low,p", [("0-31", 0, 5), ("32-47", 5, 7), ("0", 0, 1)])
def test_views_share_one_master_image_and_shift_within_bounds(shift_range, low, p):
    """The two views overlap pixel for pixel; all shifts in [low, p) occur, on both axes independently, no other."""
    _, batch = draw(n=240, target_color=False, shift_range=shift_range)
    found = [offset_between(v, t, 9) for v, t in zip(batch.images, batch.target_images, strict=True)]
    assert None not in found
    assert {dy for dy, _ in found} == {dx for _, dx in found} == set(range(low, p))
    assert len(set(found)) == (p - low) ** 2


def test_random_crops_in_place_of_pixel_shift():
    _, batch = draw(target_color=False, pixel_shift=False)
    found = [offset_between(v, t, 5) for v, t in zip(batch.images, batch.target_images, strict=True)]
    assert found.count(None) > 60  # a crop of its own


def test_both_views_are_cropped_and_flipped_as_configured():
    """With `crop_scale=1` only the whole image fits, upright or mirrored: as one master, or each view by itself.

    From 0.9 on, ten tries nearly always find a smaller crop, as no area above 1 is tried.
    """
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8).repeat(64, 1, 1, 1)
    whole = augment.normalize(images / 255)
    for settings, alike in ((dict(shift_range="0"), True), (dict(pixel_shift=False), False)):
        for crop_scale, fewer in ((1.0, 65), (0.9, 32), (0.2, 16)):
            model = small(target_color=False, crop_scale=crop_scale, **settings)
            batch = model.draw(images, torch.arange(64), StepRandom(0, 0, 64))
            mirrored = []
            for view in (batch.images, batch.target_images):
                found = [(view - x).abs().amax((1, 2, 3)) < 1e-3 for x in (whole, whole.flip(3))]
                assert (found[0] | found[1]).sum() < fewer and (crop_scale < 1 or (found[0] | found[1]).all())
                assert crop_scale < 1 or 20 < found[1].sum() < 44
                mirrored.append(found[1])
            assert crop_scale < 1 or torch.equal(*mirrored) == alike


def test_colour_changes_the_target_view_only():
    _, plain = draw(target_color=False)
    _, coloured = draw(target_color=True)
    assert torch.equal(plain.images, coloured.images)  # the online view is never coloured
    changed = (plain.target_images - coloured.target_images).abs().amax((1, 2, 3)) > 1e-3
    assert 0.6 < changed.float().mean() <= 1  # 1 - 0.2 · 0.8 = 0.84 expected
    grey = denormalize(coloured.target_images)
    grey = (grey.amax(1) - grey.amin(1)).amax((1, 2)) < 1e-3
    assert 0.05 < grey.float().mean() < 0.4  # 0.2 expected


def test_colours_are_jittered_as_often_and_as_strongly_as_in_its_code(monkeypatch):
    """ColorJitter(0.4, 0.4, 0.4, 0.1) with a probability of 0.8, greyscale with 0.2, blur of 0.1-2 pixels at 224."""
    seen = {}
    for name in ("color_jitter", "grayscale", "gaussian_blur"):
        monkeypatch.setattr(augment, name, lambda x, *parameters, name=name: seen.update({name: parameters}) or x)
    small(target_blur=0.4).draw(images_for(2, 8).repeat(1500, 1, 1, 1), torch.arange(3000), StepRandom(0, 0, 3000))
    jitter, (gray,) = augment.ColorJitter(*seen["color_jitter"]), seen["grayscale"]
    for values, middle, strength in zip(jitter[1:5], (1, 1, 1, 0), (0.4, 0.4, 0.4, 0.1), strict=True):
        assert values.min() == pytest.approx(middle - strength, abs=2e-3)
        assert values.max() == pytest.approx(middle + strength, abs=2e-3)
    assert jitter.where.double().mean().item() == pytest.approx(0.8, abs=0.025)
    assert gray.double().mean().item() == pytest.approx(0.2, abs=0.025)
    sigma, blurred = seen["gaussian_blur"]
    assert sigma.min() == pytest.approx(0.1 * 32 / 224, abs=1e-3) and sigma.max() == pytest.approx(
        2 * 32 / 224, abs=1e-3
    )
    assert blurred.double().mean().item() == pytest.approx(0.4, abs=0.03)


def test_blur_is_a_switch_of_its_own():
    _, sharp = draw(target_color=False)
    _, blurred = draw(target_color=False, target_blur=1.0)
    assert torch.equal(sharp.images, blurred.images)

    def roughness(x):
        return (x[..., 1:] - x[..., :-1]).square().mean()

    assert roughness(blurred.target_images) < roughness(sharp.target_images)


def test_draw_masks_online_and_target_as_configured():
    _, batch = draw()
    assert batch.target_mask is None and batch.mask.visible.shape == (64, 4)
    _, batch = draw(target_mask_ratio=0.5)
    assert batch.target_mask.visible.shape == (64, 8)
    assert not torch.equal(batch.mask.hidden(), batch.target_mask.hidden())
    official, batch = draw(mask_ratio=0.65, mask_cell=2, target_mask_ratio=0.5, size=64)
    assert official.shifts == (0, 9) and batch.mask.visible.shape == (64, 20)  # ⌊16 · 0.35⌋ = 5 cells of 4
    assert batch.target_mask.visible.shape == (64, 32)
    for mask in (batch.mask, batch.target_mask):
        cells = mask.hidden().reshape(64, 4, 2, 4, 2)
        assert torch.equal(cells, cells[:, :, :1, :, :1].expand_as(cells))  # whole squares of 2 x 2 patches


def test_rows_of_ranks_are_those_of_one_process():
    model = small(target_mask_ratio=0.5, target_blur=0.5)
    images = images_for()
    whole = model.draw(images, torch.arange(6), StepRandom(3, 4, 6))
    for r in range(2):
        rows = slice(3 * r, 3 * r + 3)
        part = model.draw(images[rows], torch.arange(6)[rows], StepRandom(3, 4, 6, rows))
        torch.testing.assert_close(part.images, whole.images[rows], atol=1e-5, rtol=0)
        torch.testing.assert_close(part.target_images, whole.target_images[rows], atol=1e-5, rtol=0)
        assert torch.equal(part.mask.order(), whole.mask.order()[rows])
        assert torch.equal(part.target_mask.order(), whole.target_mask.order()[rows])


def test_an_unknown_contrast_is_refused():
    with pytest.raises(InputError, match="contrast 'simclr': unknown; choose infonce or byol"):
        small(contrast="simclr")


def test_picture_has_the_target_view_as_its_last_row():
    model, batch = draw()
    rows = model.picture(batch)
    assert rows.shape == (4, 64, 3, 32, 32) and rows.min() >= 0 and rows.max() <= 1


def test_one_image_cannot_be_contrasted():
    model = small()
    with pytest.raises(InputError, match="one image at a time: a batch of one has no negatives"):
        model(model.draw(images_for(1), torch.arange(1), StepRandom(0, 0, 1)))
    assert small(contrast="byol")(model.draw(images_for(1), torch.arange(1), StepRandom(0, 0, 1)))["loss"].isfinite()


def test_the_convolutional_stem_masks_every_stage():
    """A patch alone among masked ones has the token of an image of nothing else, whose stages zeros surround."""
    stem = ViT(32, 8, 32, 1, 4, stem="conv").patch_embed
    torch.nn.init.normal_(stem.stages[0].bias)
    images = torch.randn(3, 3, 32, 32)
    for i in (0, 5, 15):
        patch = images[:, :, i // 4 * 8 : i // 4 * 8 + 8, i % 4 * 8 : i % 4 * 8 + 8]
        torch.testing.assert_close(stem(images, torch.full((3, 1), i)), stem(patch), atol=1e-5, rtol=1e-4)


def test_what_the_batch_norm_removes_is_not_trained():
    """A vector added to every feature changes nothing, so the two biases that could only drift on noise stay fixed."""
    model = small()
    batch = batch_for(model)
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad and not n.startswith("momentum")]
    assert frozen == ["feature_decoder.norm.bias", "feature_decoder.predict.bias"]
    before = model(batch)["contrast"]
    for name in frozen:
        model.get_parameter(name).add_(torch.randn_like(model.get_parameter(name)))
    torch.testing.assert_close(model(batch)["contrast"], before, atol=1e-4, rtol=1e-4)
