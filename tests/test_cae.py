"""cae.py: every part and both losses in plain loops, what carries gradient and what does not, targets, tokenizers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cae
import dvae
from cae import CAE, Batch, Config, CrossBlock, alignment_loss, token_loss
from common import Mask, StepRandom, ViT, block_mask, patchify, sincos_positions, take, unpatchify
from runtime import files
from runtime.errors import InputError

SMALL = dict(codes=12, hidden=8, blocks=1, first_stride=4, regressor_depth=2, decoder_depth=2)


def perturb(model):
    """Weights without zeros and ones, so that every norm, bias and scale matters."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)


def small(size=32, layer_scale=0.3, drop_path=0.0, perturbed=True, **settings):
    torch.manual_seed(0)
    model = CAE(ViT(size, 8, 16, 2, 2, layer_scale, drop_path), Config(**SMALL | settings))
    if perturbed:
        perturb(model)
    return model


def batch_for(model, B=3, seed=0):
    torch.manual_seed(seed)
    size, (h, w) = model.encoder.image_size, model.encoder.grid
    mask = block_mask(StepRandom(seed, 0, B), (h, w), model.masked, smallest=2)
    order = torch.stack([torch.randperm(h * w - model.masked) for _ in range(B)])  # not in raster order
    mask = Mask(mask.visible.gather(1, order), mask.masked.flip(1))
    return Batch(torch.randn(B, 3, size, size), mask, torch.rand(B, 3, 8 * h, 8 * w))


# --------------------------------------------------------------------------------------------- the paper in plain loops


def plain_norm(norm, x):
    x = (x - x.mean()) / (x.var(correction=0) + 1e-6).sqrt()
    return x * norm.weight + (0 if norm.bias is None else norm.bias)


def plain_encoder(vit, image, patches):
    """The encoder on chosen patches of one image: (3, H, W), [indices] → (len, D), without the class token."""
    x = vit.patch_embed.proj(image[None]).flatten(2).transpose(1, 2)[0]
    x = torch.stack([vit.cls_token[0, 0], *(x[i] + vit.pos_embed[0, 1 + i] for i in patches)])[None]
    for block in vit.blocks:
        x = block(x)
    return [plain_norm(vit.norm, row) for row in x[0, 1:]]


def plain_cross_block(block, x, z, position_x, position_z, official=False):
    """Query by query, head by head: lists of vectors (D,) → list of vectors."""
    context, places = z + x, position_z + position_x
    D = len(x[0])
    d, out = D // block.heads, []
    for query, place in zip(x, position_x, strict=True):
        q = block.q(plain_norm(block.norm_q, query + place))
        heads = []
        for h in range(block.heads):
            part = slice(h * d, h * d + d)
            scores, values = [], []
            for c, p in zip(context, places, strict=True):
                k = block.k(plain_norm(block.norm_k, c + p))
                scores.append((q[part] @ k[part]).item() / math.sqrt(d))
                values.append(block.v(plain_norm(block.norm_v, c))[part])
            weights = [math.exp(s) for s in scores]
            heads.append(sum(w / sum(weights) * v for w, v in zip(weights, values, strict=True)))
        y = query + block.ls1(block.proj(torch.cat(heads)))
        normed = plain_norm(block.norm_mlp, y)
        out.append((normed if official else y) + block.ls2(block.mlp(normed)))
    return out


def plain_losses(model, batch):
    """Eq. (1) image by image and token by token, from §2 and Figure 2 (a)."""
    c, B, D = model.config, len(batch.images), model.encoder.width
    position = sincos_positions(D, model.encoder.grid)[0, 1:].double()
    l_y = l_z = 0.0
    for b in range(B):
        visible, masked = batch.mask.visible[b].tolist(), batch.mask.masked[b].tolist()
        z_v = plain_encoder(model.encoder, batch.images[b], visible)
        target = plain_encoder(model.encoder, batch.images[b], masked)
        p_v, p_m = [position[i] for i in visible], [position[i] for i in masked]
        z_m = [model.mask_token[0, 0]] * len(masked)
        for block in model.regressor:
            z_m = plain_cross_block(block, z_m, z_v, p_m, p_v, c.official_residual)
        z_m = [plain_norm(model.regressor_norm, z) for z in z_m]
        for z, t in zip(z_m, target, strict=True):
            l_z += sum((v - u) ** 2 for v, u in zip(z.tolist(), t.tolist(), strict=True)) / (D * len(masked) * B)
        y = torch.stack(z_m)
        if c.decoder_depth:
            y = (y + torch.stack(p_m))[None]
            for block in model.decoder:
                y = block(y)
            y = torch.stack([plain_norm(model.decoder_norm, row) for row in y[0]])
        y = y @ model.predict.weight.T + model.predict.bias
        if c.target == "pixels":
            patches = patchify(batch.images[b : b + 1], 8)[0]
            for i, row in zip(masked, y, strict=True):
                t = patches[i]
                t = (t - t.mean()) / (t.var() + 1e-6).sqrt() if c.norm_pixels else t
                l_y += ((row - t) ** 2).mean().item() / (len(masked) * B)
        else:
            logits = model.tokenizer.encoder(0.1 + 0.8 * batch.token_images[b : b + 1])[0]  # (codes, h, w)
            for i, row in zip(masked, y.tolist(), strict=True):
                scores = logits[:, i // model.encoder.grid[1], i % model.encoder.grid[1]].tolist()
                code = scores.index(max(scores))
                total = sum(math.exp(v) for v in row)
                l_y -= math.log(math.exp(row[code]) / total) / (len(masked) * B)
    return l_y, l_z, l_y + c.lambda_z * l_z


SWITCHES = {
    "the paper": {},
    "Table 2, no alignment": dict(lambda_z=0.0),
    "Table 2, no decoder": dict(decoder_depth=0),
    "Table 2, neither": dict(decoder_depth=0, lambda_z=0.0),
    "λ = 1 (Appendix A)": dict(lambda_z=1.0),
    "Figure 4, pixels": dict(target="pixels"),
    "Figure 4, no alignment": dict(target="pixels", lambda_z=0.0),
    "standardised pixels": dict(target="pixels", norm_pixels=True),
    "official residual": dict(official_residual=True),
    "no layer scale": dict(layer_scale=0.0),
    "one block of each": dict(regressor_depth=1, decoder_depth=1),
    "another mask ratio": dict(mask_ratio=0.7),
}


@pytest.mark.parametrize("name", SWITCHES)
@torch.no_grad()
def test_forward_matches_the_paper_in_plain_loops(name):
    model = small(**SWITCHES[name]).double()
    batch = batch_for(model, B=2)
    batch = batch._replace(images=batch.images.double(), token_images=batch.token_images.double())
    l_y, l_z, total = plain_losses(model, batch)
    out = model(batch)
    assert out["loss"].item() == pytest.approx(total, rel=1e-4)
    assert l_z > 1e-3
    if model.config.lambda_z:
        assert list(out) == ["loss", "decoding", "alignment"]
        assert out["decoding"].item() == pytest.approx(l_y, rel=1e-4)
        assert out["alignment"].item() == pytest.approx(l_z, rel=1e-4)
    else:
        assert list(out) == ["loss"]


def test_lambda_is_two_and_half_is_masked():
    """Eq. (1), §2.2: 98 of 196."""
    assert Config().lambda_z == 2 and Config().regressor_depth == Config().decoder_depth == 4
    model = CAE(ViT(224, 16, 16, 1, 2), Config(target="pixels"))
    assert model.masked == 98


def test_the_paper_recipe_is_appendix_a():
    paper = cae.RECIPES["paper"]
    expected = dict(model="base", image_size=224, patch_size=16, epochs=300, warmup_epochs=10, batch_size=2048)
    assert expected.items() <= paper.items() and "base_lr" not in paper  # the rate is not scaled by the batch
    assert (paper["lr"], paper["weight_decay"], paper["drop_path"]) == (1.5e-3, 0.05, 0.1)
    # BEiT's, as in the official script
    assert (paper["betas"], paper["clip_grad"], paper["min_lr"], paper["layer_scale"]) == ((0.9, 0.999), 3, 1e-5, 0.1)
    c = Config(**{k: v for k, v in paper.items() if k in Config.__dataclass_fields__})
    assert c == Config(tokenizer_epochs=dvae.RECIPES["paper"]["epochs"]) and c.codes == 8192


def test_the_tokenizer_that_is_trained_first_is_that_of_dvaes_recipe():
    for name, recipe in cae.RECIPES.items():
        theirs = {k: v for k, v in dvae.RECIPES[name].items() if k in ("codes", "hidden", "blocks", "first_stride")}
        assert theirs.items() <= (dvae.Config().__dict__ | recipe).items()
        assert cae.tokenizer_settings(name) == theirs | dict(tokenizer_epochs=dvae.RECIPES[name]["epochs"])


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 10**6))
def test_the_losses_are_means_over_all_masked_patches(B, M, seed):
    torch.manual_seed(seed)
    z, t = torch.randn(B, M, 3, dtype=torch.float64), torch.randn(B, M, 3, dtype=torch.float64)
    distance = sum((a - b) ** 2 for a, b in zip(z.flatten().tolist(), t.flatten().tolist(), strict=True))
    assert alignment_loss(z, t).item() == pytest.approx(distance / (3 * B * M), rel=1e-5)
    tokens = torch.randint(3, (B, M))
    nll = 0.0
    for b in range(B):
        for i in range(M):
            nll -= math.log(math.exp(z[b, i, tokens[b, i]]) / sum(math.exp(v) for v in z[b, i].tolist()))
    assert token_loss(z, tokens).item() == pytest.approx(nll / (B * M), rel=1e-5)
    assert alignment_loss(z, z) == 0


# ------------------------------------------------------------------------------------------------ what sees what


def test_the_encoder_never_sees_masked_patches_and_the_decoder_never_visible_latents():
    model = small(target="pixels")
    batch = batch_for(model)._replace(token_images=None)
    images = batch.images.requires_grad_()
    z_v = model.encoder(images, batch.mask.visible)[:, 1:]
    model.decode(model.regress(z_v, batch.mask), batch.mask.masked).square().sum().backward()
    gradient = patchify(images.grad, 8).abs().sum(-1)
    assert (gradient[batch.mask.hidden()] == 0).all() and (gradient[~batch.mask.hidden()] > 0).all()
    # Given Z_m, the decoder's answer is a function of the masked places alone.
    z_m = torch.randn(3, model.masked, 16)
    assert model.decode(z_m, batch.mask.masked).shape == (3, model.masked, 192)
    swapped = model.decode(z_m.flip(1), batch.mask.masked.flip(1)).flip(1)
    torch.testing.assert_close(swapped, model.decode(z_m, batch.mask.masked), atol=1e-5, rtol=1e-5)
    elsewhere = model.decode(z_m, batch.mask.masked.flip(1))
    assert not torch.allclose(elsewhere, model.decode(z_m, batch.mask.masked), atol=1e-3)


def test_alignment_is_the_same_encoder_on_the_complement():
    model = small()
    batch = batch_for(model)
    complement = Mask(batch.mask.masked, batch.mask.visible)
    expected = model.encoder(batch.images, complement.visible)[:, 1:]
    assert torch.equal(model.masked_latents(batch), expected)
    z_m = model.regress(model.encoder(batch.images, batch.mask.visible)[:, 1:], batch.mask)
    torch.testing.assert_close(model(batch)["alignment"], (z_m - expected).square().mean())
    with torch.no_grad():
        model.encoder.blocks[0].mlp.fc1.weight += 0.1  # at this moment: there is no copy that could lag behind
    assert torch.equal(model.masked_latents(batch), model.encoder(batch.images, batch.mask.masked)[:, 1:])
    assert not torch.allclose(model.masked_latents(batch), expected)


def test_no_gradient_through_the_target_of_alignment():
    """The alignment's gradient at masked pixels is exactly zero, at visible ones it is not."""
    model = small()
    batch = batch_for(model)
    images = batch.images.requires_grad_()
    model(batch._replace(images=images))["alignment"].backward()
    gradient = patchify(images.grad, 8).abs().sum(-1)
    assert (gradient[batch.mask.hidden()] == 0).all() and (gradient[~batch.mask.hidden()] > 0).all()
    assert not model.masked_latents(batch).requires_grad
    target = torch.randn(2, 3, 4, requires_grad=True)
    alignment_loss(torch.randn(2, 3, 4, requires_grad=True), target).backward()
    assert target.grad is None


def test_losses_are_float32_under_autocast_and_gradients_nearly_the_same():
    """No gradient is lost by a cast, nor by autocast's cache from the target's pass, which has none."""
    gradients = []
    for half in (False, True):
        model = small(target="pixels")
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = model(batch_for(model))
        assert all(loss.dtype == torch.float32 for loss in out.values())
        out["loss"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, exact in gradients[0].items():
        assert (gradients[1][name] - exact).norm() < 0.1 * exact.norm() + 1e-4, name


def test_both_losses_train_the_encoder_and_the_regressor_and_decoding_alone_the_decoder():
    for name in ("decoding", "alignment"):
        model = small()
        model(batch_for(model))[name].backward()
        for key, parameter in model.named_parameters():
            if key.startswith("tokenizer") or (name == "alignment" and key.startswith(("decoder", "predict"))):
                assert parameter.grad is None, key
            else:
                assert parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", SWITCHES)
def test_every_parameter_that_learns_gets_a_gradient_in_every_step(name):
    model = small(**SWITCHES[name], perturbed=False)
    model(batch_for(model))["loss"].backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().max() > 1e-9, key
        else:
            assert key.startswith("tokenizer.") and parameter.grad is None


def test_visible_latents_pass_the_regressor_unchanged_and_the_order_of_patches_does_not_matter():
    model = small()
    batch = batch_for(model)
    z_v = torch.randn(3, 16 - model.masked, 16)
    before, seen = z_v.clone(), []
    for block in model.regressor:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    z_m = model.regress(z_v, batch.mask)
    assert torch.equal(z_v, before) and len(seen) == 2 and all(torch.equal(z, before) for z in seen)
    other = model.regress(z_v.flip(1), Mask(batch.mask.visible.flip(1), batch.mask.masked.flip(1)))
    torch.testing.assert_close(other.flip(1), z_m, atol=1e-5, rtol=1e-5)
    elsewhere = model.regress(z_v, Mask(batch.mask.visible.flip(1), batch.mask.masked))
    assert not torch.allclose(elsewhere, z_m, atol=1e-3)  # where a latent comes from counts
    assert (z_m[:, 0] - z_m[:, 1]).abs().max() > 1e-3  # and where it is asked for


@pytest.mark.parametrize("path", ["q", "k", "v"])
def test_each_way_through_the_regressors_attention_carries_gradient(path):
    """With the other two cut off: queries to the queries alone, keys and values to Z_v and to the queries beside it."""
    block = small().regressor[0]
    for other in {"q", "k", "v"} - {path}:
        block.get_submodule(other).register_forward_hook(lambda module, inputs, output: output.detach())
    x, z_v = (torch.randn(2, n, 16, requires_grad=True) for n in (5, 7))
    y = block.attend(x, z_v, torch.randn(2, 5, 16), torch.randn(2, 7, 16))
    to_x, to_z = torch.autograd.grad((y * torch.randn_like(y)).sum(), (x, z_v), allow_unused=True)
    assert (to_x.abs().sum(2) > 1e-6).all()
    assert to_z is None if path == "q" else (to_z.abs().sum(2) > 1e-6).all()


def test_both_losses_reach_the_encoder_through_z_v_alone_and_decoding_through_z_m():
    """Cut at Z_v nothing reaches the encoder; cut at Z_m decoding reaches neither it nor the regressor."""
    model = small()
    batch = batch_for(model)
    regress, decode = model.regress, model.decode
    for cut, reached in (("z_v", {"regressor", "mask_token", "decoder"}), ("z_m", {"decoder"})):
        if cut == "z_v":
            model.regress, model.decode = (lambda z, mask: regress(z.detach(), mask)), decode
        else:
            model.regress, model.decode = regress, lambda z, patches: decode(z.detach(), patches)
        model.zero_grad()
        model(batch)["decoding"].backward()
        parts = {n.split(".")[0].split("_norm")[0] for n, w in model.named_parameters() if w.grad is not None}
        assert parts - {"predict"} == reached


def test_queries_see_each_other():
    block = CrossBlock(16, 2, 0.0, 0.0, False)
    x, z, p = torch.randn(1, 3, 16), torch.randn(1, 4, 16), torch.zeros(1, 7, 16)
    before = block(x, z, p[:, :3], p[:, 3:])
    after = block(torch.cat([x[:, :2], torch.randn(1, 1, 16)], dim=1), z, p[:, :3], p[:, 3:])
    assert not torch.allclose(before[:, :2], after[:, :2], atol=1e-4)


def test_positions_weigh_but_are_not_values():
    """With uniform weights (no queries, no keys) positions change nothing."""
    block = CrossBlock(16, 2, 0.0, 0.0, False)
    x, z, p = torch.randn(1, 3, 16), torch.randn(1, 4, 16), torch.randn(1, 7, 16)
    assert not torch.allclose(block.attend(x, z, p[:, :3], p[:, 3:]), block.attend(x, z, 0 * p[:, :3], 0 * p[:, 3:]))
    block.k.weight.data.zero_()
    torch.testing.assert_close(
        block.attend(x, z, p[:, :3], p[:, 3:]), block.attend(x, z, 0 * p[:, :3], 0 * p[:, 3:]), atol=1e-6, rtol=1e-5
    )


def test_layer_scale_and_drop_path_are_the_encoders_and_grow_in_each_part():
    model = small(layer_scale=0.1, drop_path=0.3, perturbed=False, regressor_depth=3, decoder_depth=2)
    assert [b.drop_path for b in model.encoder.blocks] == [0, 0.3]
    assert [b.drop_path for b in model.regressor] == pytest.approx([0, 0.15, 0.3])
    assert [b.drop_path for b in model.decoder] == [0, 0.3]
    for block in [*model.encoder.blocks, *model.regressor, *model.decoder]:
        assert (block.ls1.gamma == 0.1).all() and (block.ls2.gamma == 0.1).all()
        assert block.mlp.fc1.weight.shape == (4 * 16, 16)
    model = small(drop_path=0.5, regressor_depth=2)
    batch = batch_for(model)
    assert not torch.equal(model(batch)["loss"], model(batch)["loss"])
    model.eval()
    assert torch.equal(model(batch)["loss"], model(batch)["loss"])


def test_drop_path_leaves_out_either_branch_of_a_regressor_block():
    torch.manual_seed(0)
    block = CrossBlock(16, 2, 0.0, 0.5, False)
    x, z, p = torch.randn(1, 3, 16), torch.randn(1, 4, 16), torch.randn(1, 7, 16)
    attended = 2 * block.attend(x, z, p[:, :3], p[:, 3:])  # 1 / (1 - rate)
    options = [y + m * 2 * block.mlp(block.norm_mlp(y)) for y in (x, x + attended) for m in (0, 1)]
    found = set()
    for _ in range(40):
        out = block(x, z, p[:, :3], p[:, 3:])
        found |= {i for i, option in enumerate(options) if torch.allclose(out, option, atol=1e-5)}
    assert found == {0, 1, 2, 3}


def test_the_same_initialisation_as_the_encoder():
    model = small(perturbed=False)
    for part in (*model.regressor, *model.decoder):
        for name, parameter in part.named_parameters():
            if name.endswith("bias"):
                assert (parameter == 0).all()
    bound = math.sqrt(6 / 32)
    q = model.regressor[0].q.weight
    assert q.abs().max() <= bound and q.abs().max() > 0.9 * bound
    assert 0.005 < model.mask_token.std() < 0.05


def test_every_norm_has_maes_epsilon_and_no_checkpoint_holds_positions():
    for settings in ({}, dict(decoder_depth=0)):
        model = small(**settings)
        assert {part.eps for part in model.modules() if isinstance(part, torch.nn.LayerNorm)} == {1e-6}
        assert "pos_embed" not in model.state_dict()


# ----------------------------------------------------------------------------------------------- draws, targets, tokens


def images_for(n=6, side=48):
    torch.manual_seed(5)
    coarse = torch.rand(n, 3, 6, 6)
    return (torch.nn.functional.interpolate(coarse, side, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


def test_draw_gives_crops_block_masks_and_the_tokenizers_view_of_the_rank():
    model, images = small(), images_for()
    whole = model.draw(images, torch.arange(6), StepRandom(3, 9, 6))
    assert whole.images.shape == (6, 3, 32, 32) and whole.mask.masked.shape == whole.mask.visible.shape == (6, 8)
    mean, std = whole.images.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    torch.testing.assert_close(whole.images * std + mean, whole.token_images)  # 8 pixels a patch: the same crop
    for r in range(2):
        rows = slice(3 * r, 3 * r + 3)
        part = model.draw(images[rows], torch.arange(6)[rows], StepRandom(3, 9, 6, rows))
        torch.testing.assert_close(part.images, whole.images[rows], atol=1e-5, rtol=0)
        torch.testing.assert_close(part.token_images, whole.token_images[rows], atol=1e-5, rtol=0)
        assert torch.equal(part.mask.order(), whole.mask.order()[rows])
    assert small(target="pixels").draw(images, torch.arange(6), StepRandom(3, 9, 6)).token_images is None


def test_other_patches_have_the_same_crop_at_eight_pixels_a_patch():
    torch.manual_seed(0)
    model = CAE(ViT(64, 16, 16, 1, 2), Config(**SMALL))
    batch = model.draw(images_for(side=80), torch.arange(6), StepRandom(0, 1, 6))
    assert batch.images.shape[2:] == (64, 64) and batch.token_images.shape[2:] == (32, 32)
    mean, std = batch.images.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    halved = torch.nn.functional.avg_pool2d(batch.images * std + mean, 2)
    assert (halved - batch.token_images).abs().mean() < 0.01  # crop and flip agree
    assert model.tokenizer.tokens(batch.token_images).shape == (6, 16)
    assert torch.isfinite(model(batch)["loss"])


def test_draw_crops_and_flips_as_configured():
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8).repeat(64, 1, 1, 1)
    whole = images / 255
    for crop_scale, fewer in ((1.0, 65), (0.9, 32), (0.2, 16)):  # with 1.0 only the whole image fits; none is larger
        views = small(crop_scale=crop_scale).draw(images, torch.arange(64), StepRandom(0, 0, 64)).token_images
        straight, mirrored = (((views - x).abs().amax((1, 2, 3)) < 1e-4).sum() for x in (whole, whole.flip(3)))
        assert straight + mirrored < fewer
        assert crop_scale < 1 or (straight + mirrored == 64 and 20 < straight < 44)


@pytest.mark.parametrize("size,p,smallest", [(224, 16, 16), (64, 8, 5), (32, 8, 1), (256, 8, 84)])
def test_blocks_are_no_smaller_than_16_of_196_patches_in_proportion(monkeypatch, size, p, smallest):
    asked = []

    def block_mask_of(rng, grid, count, **settings):
        asked.append((count, settings))
        return block_mask(rng, grid, count, **settings)

    monkeypatch.setattr(cae, "block_mask", block_mask_of)
    model = CAE(ViT(size, p, 16, 1, 2), Config(target="pixels"))
    model.draw(images_for(2, size), torch.arange(2), StepRandom(0, 0, 2))
    assert asked == [((size // p) ** 2 // 2, dict(smallest=smallest))]


def test_masks_are_blocks_of_exactly_half():
    model = CAE(ViT(64, 8, 16, 1, 2), Config(target="pixels"))
    batch = model.draw(images_for(64, 64), torch.arange(64), StepRandom(0, 1, 64))
    hidden = batch.mask.hidden().reshape(64, 8, 8)
    assert (hidden.sum((1, 2)) == 32).all()
    neighbours = (hidden[:, 1:] == hidden[:, :-1]).float().mean()
    assert neighbours > 0.7  # random patches: 0.49


def test_the_tokens_are_those_of_the_masked_patches():
    """A tokenizer that names each place: the loss is zero where the right names are predicted at the right places."""
    model = small(codes=16)
    batch = batch_for(model)
    model.tokenizer.tokens = lambda images: torch.arange(16).expand(len(images), -1)
    sure = 100.0 * torch.nn.functional.one_hot(batch.mask.masked, 16)
    assert token_loss(sure, model.targets(batch)) < 1e-6
    assert token_loss(sure.roll(1, dims=1), model.targets(batch)) > 50


def test_no_tokenizer_stands_in_the_way_of_pixels_and_no_weights_of_it_learn():
    model = small(target="pixels")
    assert model.tokenizer is None and not any("tokenizer" in n for n, _ in model.named_parameters())
    model = small()
    assert not any(p.requires_grad for p in model.tokenizer.parameters())
    assert any(n.startswith("tokenizer.") for n in model.state_dict())  # a checkpoint is enough to go on


# ----------------------------------------------------------------------------------------------------------- tokenizers


def run_of_dvae(directory, **settings):
    torch.manual_seed(3)
    model = dvae.DVAE(
        ViT(32, 8, 16, 1, 2), dvae.Config(**dict(codes=10, hidden=8, blocks=1, first_stride=2) | settings)
    )
    directory.mkdir(exist_ok=True)
    saved = dict(settings=model.encoder.settings, state_dict=model.encoder.state_dict())
    files.save(directory / "encoder.pt", saved)
    return model


def test_a_tokenizer_file_brings_its_own_codebook_and_nothing_is_trained(tmp_path):
    run = run_of_dvae(tmp_path / "run")
    model = small(tokenizer=str(tmp_path / "run"))
    assert model.predict.out_features == 10 and model.tokenizer.settings == run.encoder.settings
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(model.tokenizer.tokens(images), run.encoder.tokens(images))
    model.prepare(lambda *_, **__: pytest.fail("it has one"))
    small(target="pixels").prepare(lambda *_, **__: pytest.fail("it needs none"))


def test_without_a_tokenizer_one_is_trained_and_kept_in_the_state():
    model = CAE(ViT(64, 16, 16, 1, 2), Config(**SMALL, tokenizer_epochs=7, crop_scale=0.3))
    asked = []

    def pretrain(method, **settings):
        asked.append((method, settings))
        torch.manual_seed(4)
        fields = {n: settings[n] for n in ("codes", "hidden", "blocks", "first_stride", "crop_scale")}
        trained = dvae.DVAE(ViT(settings["image_size"], settings["patch_size"], 16, 1, 2), dvae.Config(**fields))
        asked.append(trained.encoder)
        return trained

    model.prepare(pretrain)
    (method, settings), trained = asked
    assert method == "dvae" and settings["epochs"] == 7 and settings["crop_scale"] == 0.3
    assert settings["image_size"] == (32, 32) and settings["patch_size"] == 8  # a grid of 4 x 4, 8 pixels a code
    for ours, theirs in zip(model.tokenizer.parameters(), trained.parameters(), strict=True):
        assert torch.equal(ours, theirs) and not ours.requires_grad
    again = CAE(ViT(64, 16, 16, 1, 2), Config(**SMALL))
    again.load_state_dict(model.state_dict())
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(again.tokenizer.tokens(images), trained.tokens(images))


def test_dalles_encoder_comes_from_a_file_and_who_has_none_learns_where_to_get_it(tmp_path):
    with pytest.raises(InputError, match=r"target dalle: no weights; give them to --tokenizer: https://"):
        small(target="dalle")
    with pytest.raises(InputError, match=r"no such file.*https://"):
        small(target="dalle", tokenizer=str(tmp_path / "missing.pt"))
    torch.manual_seed(2)
    theirs = dvae.Tokenizer(codes=9, hidden=8, blocks=1, decoder=False)
    state = {}
    for name, value in theirs.state_dict().items():  # to the published names
        stem, *rest, leaf = name.removeprefix("encoder.").split(".")
        inner = {"input": "input", "output": "output.conv"}.get(stem)
        if stem == "groups":
            group, block, *part = rest
            part = "id_path" if part == ["skip"] else f"res_path.conv_{int(part[1]) + 1}"
            inner = f"group_{int(group) + 1}.block_{int(block) + 1}.{part}"
        state[f"blocks.{inner}.{leaf[0]}"] = value
    torch.save(state, tmp_path / "dalle.pt")
    model = small(target="dalle", tokenizer=str(tmp_path / "dalle.pt"))
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(model.tokenizer.tokens(images), theirs.tokens(images)) and model.predict.out_features == 9
    assert model.picture(batch_for(model)).shape == (2, 3, 3, 32, 32)  # no decoder to draw tokens with
    model.prepare(lambda *_, **__: pytest.fail("it has one"))
    with pytest.raises(InputError, match=r"target dvae: .*dalle.pt is the other kind; give --target dvae or dalle"):
        small(target="dvae", tokenizer=str(tmp_path / "dalle.pt"))
    ours = dvae.Tokenizer(codes=9, hidden=8, blocks=1)
    files.save(tmp_path / "dvae.pt", dict(settings=ours.settings, state_dict=ours.state_dict()))
    with pytest.raises(InputError, match=r"target dalle: .*dvae.pt is the other kind"):
        small(target="dalle", tokenizer=str(tmp_path / "dvae.pt"))


@pytest.mark.parametrize("wrong,message", [
    (dict(target="clip"), "target 'clip': unknown; choose dvae, dalle or pixels"), (dict(codes=1), "codes 1"),
    (dict(mask_ratio=0.0), "mask ratio"), (dict(mask_ratio=1.0), "mask ratio"),
    (dict(regressor_depth=0), "regressor depth 0: must be 1 or more"),
    (dict(target="pixels", tokenizer="x.pt"), "tokenizer x.pt: pixels need none"),
    (dict(norm_pixels=True), "norm pixels: tokens are no pixels"),
])  # fmt: skip
def test_settings_that_cannot_work_are_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        small(**wrong)


# ------------------------------------------------------------------------------------------------------------- pictures


def test_pictures_of_tokens_are_what_the_dvae_draws():
    model = small()
    batch = batch_for(model)
    rows = model.picture(batch)
    assert rows.shape == (4, 3, 3, 32, 32) and rows.min() >= 0 and rows.max() <= 1
    predicted = model.decode(
        model.regress(model.encoder(batch.images, batch.mask.visible)[:, 1:], batch.mask), batch.mask.masked
    )
    tokens = model.tokenizer.tokens(batch.token_images)
    for b in range(3):
        for place, i in enumerate(batch.mask.masked[b].tolist()):
            tokens[b, i] = predicted[b, place].argmax()
    assert torch.equal(rows[2], model.tokenizer.images(tokens, (4, 4)))
    full = model.reconstruct(batch.images).argmax(-1)
    assert torch.equal(rows[3], model.tokenizer.images(full, (4, 4)))
    hidden = batch.mask.hidden()
    assert (patchify(rows[1], 8)[hidden].reshape(-1, 64, 3).std(1) < 1e-6).all()  # flat grey
    assert torch.equal(patchify(rows[1], 8)[~hidden], patchify(rows[0], 8)[~hidden])


def test_figure_4_encodes_everything_and_skips_the_regressor():
    model = small(target="pixels")
    batch = batch_for(model)._replace(token_images=None)
    full = model.reconstruct(batch.images)
    assert full.shape == (3, 16, 192)
    order = torch.randperm(16).expand(3, -1)
    z = model.encoder(batch.images, order)[:, 1:]
    torch.testing.assert_close(model.decode(z, order), take(full, order), atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        for parameter in model.regressor.parameters():
            parameter.zero_()
    assert torch.equal(model.reconstruct(batch.images), full)
    rows = model.picture(batch)
    assert rows.shape == (4, 3, 3, 32, 32)
    mean, std = batch.images.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    torch.testing.assert_close(rows[3], (unpatchify(full, 8, (4, 4)) * std + mean).clamp(0, 1).detach())


def test_figure_4_with_standardised_pixels_gives_each_patch_its_own_mean_and_variance_back():
    model = small(target="pixels", norm_pixels=True)
    batch = batch_for(model)._replace(token_images=None)
    target = patchify(batch.images, 8)
    perfect = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    model.reconstruct = lambda images: perfect
    rows = model.picture(batch)
    torch.testing.assert_close(rows[3], rows[0], atol=1e-4, rtol=0)


@pytest.mark.training
def test_a_few_steps_on_one_batch_lower_both_losses():
    model = small(layer_scale=0.0, perturbed=False, codes=6)
    batch = batch_for(model, B=8)
    optimizer, first = torch.optim.AdamW(model.parameters(), lr=2e-3), None
    for _ in range(40):
        out = model(batch)
        out["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        first = first or {k: v.item() for k, v in out.items()}
    assert all(out[k].item() < 0.8 * first[k] for k in ("decoding", "alignment"))
