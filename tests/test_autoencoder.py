"""autoencoder.py: blocks around patches, the loss in plain loops, nothing hidden, and the lcmae runs it once was."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_cmae import plain_decoder, plain_encoder
from test_train import assert_fine, assert_refused, environment, photos, train  # noqa: F401  (fixtures)

import autoencoder
import lcmae
import mae
from autoencoder import Autoencoder, Batch, Config, block_loss, block_statistics, centred_blocks, nothing_hidden
from common import StepRandom, ViT, normalize_patches, patchify
from runtime import files
from runtime.errors import InputError

SMALL = dict(decoder_width=16, decoder_depth=2, decoder_heads=2)
SWITCHES = {
    "AE(p)": dict(block=8),
    "AE(3p)": dict(block=24),
    "AE(5p), raw": dict(block=40, norm_pixels=False),
    "even step": dict(block=10),
}


def small(size=32, **settings):
    torch.manual_seed(0)
    return Autoencoder(ViT(size, 8, 32, 2, 4), Config(**SMALL | settings))


def batch_for(model, B=3, seed=0):
    torch.manual_seed(seed)
    images = torch.randn(B, 3, model.encoder.image_size, model.encoder.image_size)
    return Batch(images, nothing_hidden(images, model.encoder.patches))


def plain_autoencoder(model, batch):
    """§4.2 (2): every token predicts the b × b pixels around its patch; those beyond the border do not count."""
    b, (h, w), size = model.config.block, model.encoder.grid, model.encoder.image_size
    total, reach, everything = 0.0, (b - 8) // 2, list(range(h * w))
    for image in batch.images:
        latents = plain_encoder(model.encoder, image, everything)
        predicted = model.decoder.predict(plain_decoder(model.decoder, latents, everything, h * w))
        for i in everything:
            values, pairs = predicted[i].reshape(b, b, 3), []
            for y, x in itertools.product(range(b), repeat=2):
                row, column = i // w * 8 - reach + y, i % w * 8 - reach + x
                if 0 <= row < size and 0 <= column < size:
                    pairs.append((values[y, x], image[:, row, column]))
            said, true = (torch.cat(part) for part in zip(*pairs, strict=True))
            if model.config.norm_pixels:
                true = (true - true.mean()) / (true.var() + 1e-6).sqrt()
            total += ((said - true) ** 2).mean().item() / (h * w * len(batch.images))
    return total


# ---------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SWITCHES)
@torch.no_grad()
def test_forward_matches_table_3_in_plain_loops(name, dtype):
    model = small(**SWITCHES[name]).to(dtype)
    batch = batch_for(model)
    batch = batch._replace(images=batch.images.to(dtype))
    assert model(batch)["loss"].item() == pytest.approx(plain_autoencoder(model, batch), rel=1e-5)


# What `--method lcmae --block B` gave on these weights and images, before the autoencoder had a file of its own.
BEFORE = {  # the loss, and the sum of the absolute gradient
    "AE(p)": (1.0161126, 1.32295),
    "AE(3p)": (1.0102774, 1.01243),
    "AE(5p), raw": (0.5119456, 0.91063),
    "even step": (1.0168320, 1.29837),
}


@pytest.mark.parametrize("name", BEFORE)
def test_numbers_are_those_of_the_old_lcmae_with_a_block(name):
    """Weights and images are sines, which no generator of random numbers can change."""
    model = small(**SWITCHES[name])
    with torch.no_grad():
        for place, (_, weight) in enumerate(sorted(model.named_parameters())):
            weight.copy_(0.1 * torch.sin(place + torch.arange(weight.numel()) * 0.37).view(weight.shape))
    images = torch.sin(torch.arange(2 * 3 * 32 * 32) * 0.011).view(2, 3, 32, 32)
    loss = model(Batch(images, nothing_hidden(images, 16)))["loss"]
    loss.backward()
    gradient = sum(w.grad.abs().sum().item() for w in model.parameters() if w.grad is not None)
    assert (loss.item(), gradient) == pytest.approx(BEFORE[name], rel=1e-4)


def test_gradient_reaches_everything_but_the_mask_token():
    for settings in SWITCHES.values():
        model = small(**settings)
        model(batch_for(model))["loss"].backward()
        for name, weight in model.named_parameters():
            if name == "decoder.mask_token":  # nothing is hidden
                assert not weight.requires_grad
            else:
                assert weight.grad is not None and weight.grad.abs().sum() > 0, name


def test_one_patch_is_mae_with_nothing_hidden():
    model = small(block=8)
    batch = batch_for(model)
    target, inside = model.blocks(batch.images)
    torch.testing.assert_close(target, normalize_patches(patchify(batch.images, 8)), atol=1e-5, rtol=1e-5)
    assert inside.all()
    plain = (model.predict_blocks(batch) - target).square().mean()
    torch.testing.assert_close(model(batch)["loss"], plain)
    assert model.blocks(torch.full_like(batch.images, 0.5))[0].abs().max() < 1e-3  # nothing to standardise


def test_what_lies_beyond_the_border_is_no_target():
    model = small(block=24)
    batch = batch_for(model)
    target, inside = model.blocks(batch.images)
    predicted = torch.randn_like(target, requires_grad=True)
    block_loss(predicted, target, inside).backward()
    assert torch.equal(predicted.grad.abs() > 0, (inside > 0).expand_as(target))
    assert inside.reshape(4, 4, 24, 24, 3)[0, 0, :8].sum() == 0 and inside[5].all()  # above the first; an inner patch
    perfect = target.where(inside > 0, 7.0)
    assert block_loss(perfect, target, inside) == 0


def test_every_pixel_is_seen():
    model = small(block=24)
    batch = batch_for(model)
    images = batch.images.clone().requires_grad_()
    model.predict_blocks(batch._replace(images=images)).square().sum().backward()
    assert (images.grad != 0).float().mean() > 0.99


def test_loss_is_float32_under_autocast():
    for settings in SWITCHES.values():
        model = small(**settings)
        batch = batch_for(model)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch)["loss"]
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, copy.deepcopy(model)(batch)["loss"], atol=0.05, rtol=0.05)


# -------------------------------------------------------------------------------------------------------- the blocks


@given(st.integers(1, 3), st.integers(0, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 10**6))
def test_centred_blocks_are_the_pixels_around_each_patch(p, reach, h, w, seed):
    torch.manual_seed(seed)
    images, b = torch.randn(2, 3, h * p, w * p), p + 2 * reach
    blocks, inside = centred_blocks(images, p, b)
    assert blocks.shape == (2, h * w, 3 * b * b) and inside.shape == (h * w, 3 * b * b)
    for i, y, x, c in itertools.product(range(h * w), range(b), range(b), range(3)):
        row, column, k = i // w * p - reach + y, i % w * p - reach + x, (y * b + x) * 3 + c
        there = 0 <= row < h * p and 0 <= column < w * p
        assert inside[i, k] == there
        assert torch.equal(blocks[:, i, k], images[:, c, row, column] if there else torch.zeros(2))
    centre = blocks.unflatten(2, (b, b, 3))[:, :, reach : reach + p, reach : reach + p].flatten(2)
    assert torch.equal(centre, patchify(images, p))
    assert centred_blocks(images.bfloat16(), p, b)[1].dtype == torch.float32  # what is counted with stays exact


def test_block_statistics_count_what_lies_in_the_image():
    images = torch.randn(2, 3, 24, 24) + 3
    for b in (8, 20):
        blocks, inside = centred_blocks(images, 8, b)
        mean, variance = block_statistics(blocks, inside)
        for n, i in itertools.product(range(2), range(9)):
            values = blocks[n, i][inside[i] > 0]
            torch.testing.assert_close(mean[n, i, 0], values.mean())
            torch.testing.assert_close(variance[n, i, 0], values.var())


# ------------------------------------------------------------------------------------------------- draw and pictures


def images_for(n=6, side=48):
    torch.manual_seed(5)
    return (F.interpolate(torch.rand(n, 3, 6, 6), side, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


def test_draw_is_maes_crop_with_nothing_hidden():
    model, images = small(crop_scale=0.5), images_for()
    theirs = mae.MAE(ViT(32, 8, 32, 1, 4), mae.Config(crop_scale=0.5))
    batch, their = (m.draw(images, torch.arange(6), StepRandom(2, 3, 6)) for m in (model, theirs))
    assert torch.equal(batch.images, their.images)
    assert batch.mask.visible.tolist() == [list(range(16))] * 6 and batch.mask.masked.shape == (6, 0)
    assert nothing_hidden(images.to("meta"), 16).visible.is_meta  # on the device of the images


def test_rows_of_ranks_are_those_of_one_process():
    model, images = small(), images_for()
    whole = model.draw(images, torch.arange(6), StepRandom(3, 4, 6))
    for r in range(2):
        rows = slice(3 * r, 3 * r + 3)
        part = model.draw(images[rows], torch.arange(6)[rows], StepRandom(3, 4, 6, rows))
        torch.testing.assert_close(part.images, whole.images[rows], atol=1e-5, rtol=0)
        assert torch.equal(part.mask.order(), whole.mask.order()[rows])


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("block", [8, 10, 24])
def test_picture_of_perfect_blocks_is_the_image(norm, block, monkeypatch):
    model = small(block=block, norm_pixels=norm)
    batch = batch_for(model)
    monkeypatch.setattr(model, "predict_blocks", lambda batch: model.blocks(batch.images)[0])
    picture = model.picture(batch)
    assert picture.shape == (2, 3, 3, 32, 32) and picture.min() >= 0 and picture.max() <= 1
    torch.testing.assert_close(picture[1], picture[0], atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------ recipes and errors


def test_the_paper_recipe_is_lcmaes_at_maes_rate():
    """§5: base rate 1.5e-4 for MAE, 6e-4 for LC-MAE; the rest is the same."""
    paper, theirs = autoencoder.RECIPES["paper"], lcmae.RECIPES["paper"]
    assert paper == theirs | dict(base_lr=1.5e-4)
    assert all(getattr(Config(), name) == getattr(mae.Config(), name) for name in [*SMALL, "norm_pixels", "crop_scale"])


@pytest.mark.parametrize("block", [9, 6])
def test_a_block_that_cannot_be_centred_is_refused(block):
    with pytest.raises(InputError, match=f"block {block}: cannot be centred on a patch of 8; give 8, 10, 12"):
        small(block=block)


def test_an_older_lcmae_run_continues_and_one_with_a_block_is_refused(train, tmp_path):  # noqa: F811
    assert_fine(train("--max-steps", 2, method="lcmae"))
    path = tmp_path / "run/checkpoint.pt"
    checkpoint = files.load(path)
    for block in (0, 8):
        files.save(path, checkpoint | dict(settings=checkpoint["settings"] | dict(block=block)))
        done = train("--max-steps", 2, method="lcmae")
        assert_fine(done) if block == 0 else assert_refused(done, "checkpoint.pt: of another run (block 8 there, None")
