"""mae.py: equal to Hugging Face's ViTMAE on the same weights, and to the equations in plain loops."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_cmae import plain_decoder

from common import MEAN, STD, Mask, StepRandom, ViT, patchify, random_mask, take, unpatchify
from inputs.augment import normalize
from mae import MAE, Batch, Config, masked_pixels
from runtime.errors import InputError
from runtime.reconstruction_pictures import picture_rows, visible_statistics

SMALL = Config(decoder_width=16, decoder_depth=2, decoder_heads=2)


def small(config=SMALL, size=32, **settings):
    torch.manual_seed(0)
    return MAE(ViT(size, 8, 32, 2, 4, **settings), config)


def batch_for(model, B=3, seed=0, ratio=0.75):
    torch.manual_seed(seed)
    images = torch.randn(B, 3, model.encoder.image_size, model.encoder.image_size)
    return Batch(images, random_mask(StepRandom(seed, 0, B), model.encoder.grid, ratio))


def hugging_face(model):
    """ViTMAEForPreTraining with this model's weights, whichever of its versions' parameter names is installed."""
    transformers = pytest.importorskip("transformers")
    e, d = model.encoder, model.config
    theirs = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(
        hidden_size=e.width, num_hidden_layers=len(e.blocks), num_attention_heads=e.blocks[0].attn.heads,
        intermediate_size=4 * e.width, image_size=e.image_size, patch_size=e.patch_size, layer_norm_eps=1e-6,
        decoder_hidden_size=d.decoder_width, decoder_num_hidden_layers=d.decoder_depth,
        decoder_num_attention_heads=d.decoder_heads, decoder_intermediate_size=4 * d.decoder_width,
        mask_ratio=d.mask_ratio, norm_pix_loss=d.norm_pixels,
    ))  # fmt: skip
    state = {n: ours_for(n, model) for n in theirs.state_dict()}
    theirs.load_state_dict(state, strict=True)
    return theirs


def ours_for(name, model, grad=False):
    """The tensor of `model`, or its gradient, that Hugging Face calls `name`."""

    def tensor(key):  # fmt: skip
        value = dict(model.named_parameters()) | dict(model.named_buffers())
        return value[key].grad if grad and value[key].requires_grad else value[key].detach()

    for pattern, key in [
        (r"cls_token", "encoder.cls_token"), (r"mask_token", "decoder.mask_token"),
        (r"decoder_pos_embed", "decoder.pos_embed"), (r"position_embeddings", "encoder.pos_embed"),
        (r"projection\.(\w+)", "encoder.patch_embed.proj."), (r"decoder_embed\.(\w+)", "decoder.embed."),
        (r"decoder_norm\.(\w+)", "decoder.norm."), (r"decoder_pred\.(\w+)", "decoder.predict."),
        (r"vit\.layernorm\.(\w+)", "encoder.norm."),
    ]:  # fmt: skip
        if found := re.search(pattern + "$", name):
            return tensor(key + "".join(found.groups()))
    block = ("decoder" if name.startswith("decoder") else "encoder") + ".blocks." + re.search(r"\.(\d+)\.", name)[1]
    leaf = name.rsplit(".", 1)[1]
    if found := re.search(r"attention\.(?:attention\.)?(q|k|v)(?:_proj|uery|ey|alue)\.\w+$", name):
        return tensor(f"{block}.attn.qkv.{leaf}").chunk(3)["qkv".index(found[1])]
    for pattern, part in [
        (r"layernorm_before", "norm1"), (r"layernorm_after", "norm2"),
        (r"(o_proj|attention\.output\.dense)", "attn.proj"),
        (r"(fc1|intermediate\.dense)", "mlp.fc1"), (r"(fc2|\d\.output\.dense)", "mlp.fc2"),
    ]:  # fmt: skip
        if re.search(pattern + r"\.\w+$", name):
            return tensor(f"{block}.{part}.{leaf}")
    raise KeyError(name)


@pytest.mark.parametrize("norm_pixels", [True, False])
@pytest.mark.parametrize("ratio", [0.75, 0.4])
def test_same_weights_and_mask_give_hugging_faces_numbers(norm_pixels, ratio):
    model = small(Config(ratio, 1, 16, 2, 2, norm_pixels))
    theirs = hugging_face(model)
    batch = batch_for(model, ratio=ratio)
    noise = torch.empty(batch.mask.order().shape).scatter(1, batch.mask.order(), torch.arange(16.0).expand(3, -1))
    out = theirs(batch.images, noise=noise)
    assert torch.equal(out.mask.bool(), batch.mask.hidden())  # the mask honoured
    loss = model(batch)["loss"]
    torch.testing.assert_close(loss, out.loss, atol=1e-5, rtol=0)
    predicted = model.decoder(model.encoder(batch.images, batch.mask.visible), batch.mask)
    torch.testing.assert_close(predicted, take(out.logits, batch.mask.masked), atol=1e-5, rtol=0)
    loss.backward()
    out.loss.backward()
    compared = 0
    for name, parameter in theirs.named_parameters():
        if (
            parameter.requires_grad
            and parameter.grad is not None
            and "position" not in name
            and "pos_embed" not in name
        ):
            torch.testing.assert_close(ours_for(name, model, grad=True), parameter.grad, atol=1e-4, rtol=0)
            assert parameter.grad.abs().max() > 1e-6 or name.endswith(("k_proj.bias", "key.bias"))
            compared += 1
    assert compared >= 2 * 16 * 2 + 8


def test_loss_is_the_masked_mean_in_a_loop():
    """Only the masked patches count, each by the mean square over its 3p² values, then over the patches."""
    model, total = small(), 0.0
    batch = batch_for(model)
    latents = model.encoder(batch.images, batch.mask.visible)
    features = model.decoder.predict(model.decoder.features(latents, batch.mask)).double()  # (B, N, P), visible first
    patches, order = patchify(batch.images, 8).double(), batch.mask.order()
    masked = 0
    for b in range(3):
        for place in range(16):
            i = order[b, place]
            if batch.mask.hidden()[b, i]:
                t = patches[b, i]
                t = (t - t.mean()) / (((t - t.mean()) ** 2).sum() / 191 + 1e-6).sqrt()
                total, masked = total + ((features[b, place] - t) ** 2).mean().item(), masked + 1
    assert masked == 3 * 12
    assert model(batch)["loss"].item() == pytest.approx(total / masked, rel=1e-5)


def test_the_decoder_sees_every_token_at_its_own_place():
    """Patch by patch in raster order, mask tokens where nothing was seen, each with its position."""
    model = small()
    batch = batch_for(model)
    latents = model.encoder(batch.images, batch.mask.visible)
    features = model.decoder.features(latents, batch.mask)
    for b in range(3):
        expected = plain_decoder(model.decoder, latents[b], batch.mask.visible[b].tolist(), 16)
        torch.testing.assert_close(features[b], expected[batch.mask.order()[b]], atol=1e-5, rtol=1e-5)


@given(st.integers(0, 1000))
def test_the_order_of_the_mask_does_not_matter(seed):
    model = small()
    batch = batch_for(model, seed=seed)
    ordered = Mask(batch.mask.visible.sort(1).values, batch.mask.masked.flip(1))
    torch.testing.assert_close(model(Batch(batch.images, ordered))["loss"], model(batch)["loss"], atol=1e-5, rtol=1e-5)


def test_visible_pixels_are_no_target_and_masked_ones_no_input():
    model = small()
    batch = batch_for(model)
    target = model.target(batch)
    hidden = batch.mask.hidden()[:, :, None].expand(-1, -1, 192)
    patches = patchify(batch.images, 8)
    other_visible = Batch(unpatchify(torch.where(hidden, patches, patches + 1), 8, (4, 4)), batch.mask)
    assert torch.equal(model.target(other_visible), target)
    other_masked = Batch(unpatchify(torch.where(hidden, patches + torch.randn(192), patches), 8, (4, 4)), batch.mask)
    assert torch.equal(
        model.encoder(other_masked.images, batch.mask.visible), model.encoder(batch.images, batch.mask.visible)
    )
    assert not torch.equal(model(other_masked)["loss"], model(batch)["loss"])


def test_gradient_reaches_everything_that_learns():
    model = small()
    model(batch_for(model))["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_masked_pixels_raw_or_normalised():
    batch = batch_for(small())
    raw = masked_pixels(batch.images, batch.mask, 8, norm=False)
    assert torch.equal(raw, take(patchify(batch.images, 8), batch.mask.masked))
    normed = masked_pixels(batch.images, batch.mask, 8, norm=True)
    torch.testing.assert_close(normed.mean(-1), torch.zeros(3, 12), atol=1e-5, rtol=0)
    torch.testing.assert_close(normed.var(-1), torch.ones(3, 12), atol=1e-4, rtol=0)


def test_draw_gives_normalised_crops_and_masks_of_the_rank():
    model = small()
    images = torch.randint(0, 256, (4, 3, 40, 40), dtype=torch.uint8)
    whole = model.draw(images, torch.arange(4), StepRandom(3, 9, 4))
    assert whole.images.shape == (4, 3, 32, 32) and whole.mask.visible.shape == (4, 4)
    assert whole.images.min() > -2.2 and whole.images.max() < 2.7  # (0 - mean) / std … (1 - mean) / std
    for r in range(2):
        rows = slice(2 * r, 2 * r + 2)
        part = model.draw(images[rows], torch.arange(4)[rows], StepRandom(3, 9, 4, rows))
        torch.testing.assert_close(part.images, whole.images[rows], atol=1e-6, rtol=0)
        assert torch.equal(part.mask.order(), whole.mask.order()[rows])
    listed = model.draw(list(images), torch.arange(4), StepRandom(3, 9, 4))
    torch.testing.assert_close(listed.images, whole.images, atol=1e-4, rtol=0)


def test_a_mask_that_leaves_nothing_or_does_not_fit_is_refused_at_once():
    for ratio, cell in ((0.0, 1), (1.0, 1), (0.8, 2)):
        with pytest.raises(InputError, match="mask ratio"):
            small(Config(mask_ratio=ratio, mask_cell=cell))
    with pytest.raises(InputError, match="mask cell 3: must divide"):
        small(Config(mask_cell=3))


def test_picture_keeps_visible_patches_and_uses_no_hidden_statistics():
    model = small()
    batch = batch_for(model)
    rows = model.picture(batch)
    assert rows.shape == (3, 3, 3, 32, 32) and rows.min() >= 0 and rows.max() <= 1
    original, masked, filled = (patchify(r, 8) for r in rows)
    visible = ~batch.mask.hidden()
    assert torch.equal(filled[visible], original[visible]) and torch.equal(masked[visible], original[visible])
    assert (masked[batch.mask.hidden()].reshape(-1, 64, 3).std(1) < 1e-6).all()  # flat grey
    # A perfect prediction of a constant-contrast image comes out with the neighbours' brightness, not with its own.
    predicted = masked_pixels(batch.images, batch.mask, 8, norm=True)
    darker = unpatchify(
        torch.where(batch.mask.hidden()[:, :, None], patchify(batch.images, 8) - 3, patchify(batch.images, 8)),
        8,
        (4, 4),
    )
    same = picture_rows(darker, batch.mask, predicted, model.encoder, True)[2]
    torch.testing.assert_close(same, picture_rows(batch.images, batch.mask, predicted, model.encoder, True)[2])


@pytest.mark.parametrize("h, w", [(4, 4), (5, 3)])
def test_visible_statistics_are_gaussian_means_of_the_visible(h, w):
    torch.manual_seed(0)
    patches, mask = torch.randn(1, h * w, 192), random_mask(StepRandom(0, 0, 1), (h, w), 0.6)
    mean, variance = visible_statistics(patches, mask, (h, w))
    i = mask.masked[0, 5].item()
    weights, means, variances = [], [], []
    for j in mask.visible[0].tolist():
        d2 = (i // w - j // w) ** 2 + (i % w - j % w) ** 2
        weights.append(torch.tensor(-d2 / 2).exp())
        means.append(patches[0, j].mean())
        variances.append(patches[0, j].var())
    weights = torch.stack(weights) / sum(weights)
    assert mean[0, 5].item() == pytest.approx((weights * torch.stack(means)).sum().item(), abs=1e-5)
    assert variance[0, 5].item() == pytest.approx((weights * torch.stack(variances)).sum().item(), rel=1e-4)


def test_pictures_undo_the_standardisation_and_show_grey_for_what_is_hidden():
    """A prediction times the neighbours' deviation plus their mean; the mean colour of all images where nothing is."""
    torch.manual_seed(0)
    encoder = ViT((24, 40), 8, 32, 1, 4)
    images, mask = 0.2 * torch.randn(2, 3, 24, 40) + 0.3, random_mask(StepRandom(0, 0, 2), (3, 5), 0.6)
    predicted = torch.randn(2, 9, 192)
    mean, variance = visible_statistics(patchify(images, 8), mask, (3, 5))
    _, masked, filled = (patchify(row, 8) for row in picture_rows(images, mask, predicted, encoder, True))
    _, _, raw = (patchify(row, 8) for row in picture_rows(images, mask, 0.1 * predicted, encoder, False))
    colour, spread = torch.tensor([MEAN, STD]).repeat(1, 64)  # row, column, channel
    for b in range(2):
        for place, i in enumerate(mask.masked[b].tolist()):
            value = predicted[b, place] * variance[b, place].sqrt() + mean[b, place]
            torch.testing.assert_close(filled[b, i], (value * spread + colour).clamp(0, 1), atol=1e-5, rtol=0)
            torch.testing.assert_close(raw[b, i], (0.1 * predicted[b, place] * spread + colour).clamp(0, 1))
            torch.testing.assert_close(masked[b, i], colour)
    assert picture_rows(torch.zeros_like(images), mask, predicted, encoder, True).isfinite().all()  # no variance


def test_draw_crops_flips_and_hides_as_configured():
    """With `crop_scale=1` only the whole image fits; cells of 2 x 2 patches are hidden whole."""
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8).repeat(64, 1, 1, 1)
    whole = normalize(images / 255)
    for crop_scale in (1.0, 0.2):
        batch = small(Config(crop_scale=crop_scale, mask_cell=2)).draw(images, torch.arange(64), StepRandom(0, 0, 64))
        straight, mirrored = (((batch.images - x).abs().amax((1, 2, 3)) < 1e-3).sum() for x in (whole, whole.flip(3)))
        assert straight + mirrored == 64 and 20 < straight < 44 if crop_scale == 1 else straight + mirrored < 16
        cells = batch.mask.hidden().reshape(64, 2, 2, 2, 2)
        assert torch.equal(cells, cells[:, :, :1, :, :1].expand_as(cells))


def test_the_decoder_has_maes_epsilon_and_keeps_no_positions_in_a_checkpoint():
    model = small()
    assert {part.eps for part in model.modules() if isinstance(part, torch.nn.LayerNorm)} == {1e-6}
    assert "decoder.pos_embed" not in model.state_dict()
