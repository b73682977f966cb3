"""cmae_loc.py: Eq. 1-6 in plain loops, every switch, ContrastiveCrop's map, frame, schedule and placement."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_common import naive_info_nce

import cmae_loc
import mae
from cmae_loc import (
    Batch,
    CMAELoc,
    Config,
    DepthwiseConv,
    TokenMLP,
    class_attention,
    feature_norms,
    locate,
    location_loss,
    place_crops,
)
from common import StepRandom, ViT, patchify, random_mask, sincos_positions, take, unpatchify
from inputs import augment
from runtime.errors import InputError
from train import options

DECODERS = ("transformer", "mlp", "conv", "hybrid-mlp", "hybrid-conv")
SMALL = dict(
    decoder_width=16, decoder_depth=3, decoder_heads=2, projector_width=24, projector_out=8, crop_warmup=0.2,
    crop_interval=0.3,
)  # fmt: skip
SWITCHES = {
    "the paper": {},
    "three layers fewer, half the width": dict(decoder_depth=1, decoder_width=8),
    **{f"§3.5, {kind}": dict(decoder=kind) for kind in DECODERS[1:]},
    "Eq. 5 as a sum": dict(location_mean=False),
    "positions withheld": dict(withhold_positions=True),
    "weights": dict(lambda_ctr=0.5, lambda_loc=2.0, lambda_con=3.0),
    "contrast alone": dict(lambda_loc=0.0, lambda_con=0.0),
    "location alone": dict(lambda_ctr=0.0, lambda_con=0.0),
    "MAE": dict(lambda_ctr=0.0, lambda_loc=0.0),
    "another temperature and ratio": dict(tau=0.07, mask_ratio=0.4),
    "raw pixels": dict(norm_pixels=False),
}


def small(size=32, **settings):
    torch.manual_seed(0)
    model = CMAELoc(ViT(size, 8, 16, 2, 2), Config(**SMALL | settings))
    for name, parameter in model.named_parameters():
        if name.startswith("momentum"):  # a teacher that is not the student
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def batch_for(model, B=3, seed=0):
    torch.manual_seed(seed)
    size, rng, ratio = model.encoder.image_size, StepRandom(seed, 0, B), model.config.mask_ratio
    masks = [random_mask(rng, model.encoder.grid, ratio) for _ in range(2)]
    return Batch(torch.randn(B, 3, size, size), masks[0], torch.randn(B, 3, size, size), masks[1])


def plain_tokens(vit, image, indices, positions=True):
    """One image's patches → the encoder's outputs without the class token, in a dict by place."""
    x = vit.patch_embed.proj(image[None]).flatten(2)[0].T  # (N, D)
    rows = [vit.cls_token[0, 0]] + [x[i] + (vit.pos_embed[0, 1 + i] if positions else 0) for i in indices]
    x = torch.stack(rows)[None]
    for block in vit.blocks:
        x = block(x)
    x = vit.norm(x)[0]
    return x[0], {i: x[1 + place] for place, i in enumerate(indices)}


def plain_layers(module, x):
    first, _, second = module
    return second.weight @ torch.nn.functional.gelu(first.weight @ x + first.bias) + second.bias


def plain_attention_or_less(layer, x, grid):
    """What stands where attention stood, on (1 + N, width)."""
    if isinstance(layer, TokenMLP):
        mixed = [layer.fc2(torch.nn.functional.gelu(layer.fc1(x[:, channel]))) for channel in range(x.shape[1])]
        return torch.stack(mixed, dim=1)
    if isinstance(layer, DepthwiseConv):
        out, (h, w), kernel = torch.zeros_like(x), grid, layer.conv.weight
        for row in range(h):
            for column in range(w):
                total = layer.conv.bias.clone()
                for i in range(3):
                    for j in range(3):
                        r, s = row + i - 1, column + j - 1
                        if 0 <= r < h and 0 <= s < w:
                            total = total + kernel[:, 0, i, j] * x[1 + r * w + s]
                out[1 + row * w + column] = total
        return out
    return layer(x[None])[0]


def plain_decoder(model, cls, tokens):
    """Predictions (N, P) in raster order from the class token and the visible tokens by place."""
    d, N = model.decoder, model.encoder.patches
    width = d.embed.weight.shape[0]
    positions = sincos_positions(width, model.encoder.grid)[0].double()
    rows = [d.embed(cls)] + [d.embed(tokens[i]) if i in tokens else d.mask_token[0, 0] for i in range(N)]
    x = torch.stack(rows) + positions
    for block in d.blocks:
        x = x + plain_attention_or_less(block.attn, block.norm1(x), model.encoder.grid)
        x = x + block.mlp(block.norm2(x))
    return d.predict(d.norm(x[1:]))


def plain_losses(model, batch):
    """Eq. 2-6 image by image, patch by patch, as §3.3 to §3.6 read."""
    c, B, N = model.config, len(batch.images), model.encoder.patches
    z_q, z_k, l_loc, l_con = [], [], 0.0, 0.0
    for b in range(B):
        visible, masked = batch.mask.visible[b].tolist(), batch.mask.masked[b].tolist()
        cls, q1 = plain_tokens(model.encoder, batch.images[b], visible)
        if c.lambda_ctr:
            h1 = q1 | plain_tokens(model.encoder, batch.images[b], masked)[1]  # Eq. 2
            h2 = {}
            for part in batch.key_mask:
                h2 |= plain_tokens(model.momentum_encoder, batch.key_images[b], part[b].tolist())[1]
            assert set(h1) == set(h2) == set(range(N))
            z_q.append(plain_layers(model.projector, sum(h1[i] for i in range(N)) / N).tolist())
            z_k.append(plain_layers(model.momentum_projector, sum(h2[i] for i in range(N)) / N).tolist())
        if c.lambda_loc:
            looked = plain_tokens(model.encoder, batch.images[b], visible, not c.withhold_positions)[1]
            for i in visible:
                p = plain_layers(model.location, looked[i])  # Eq. 4
                error = sum((p[n].item() - (n == i)) ** 2 for n in range(N))
                l_loc += error / (N if c.location_mean else 1) / len(visible) / B  # Eq. 5
        if c.lambda_con:
            predicted, patches = plain_decoder(model, cls, q1), patchify(batch.images[b : b + 1], 8)[0]
            for i in masked:
                t = patches[i]
                t = (t - t.mean()) / (t.var() + 1e-6).sqrt() if c.norm_pixels else t
                l_con += ((predicted[i] - t) ** 2).mean().item() / len(masked) / B
    losses = {}
    if c.lambda_ctr:
        losses["contrast"] = naive_info_nce(z_q, z_k, c.tau)  # Eq. 3
    if c.lambda_loc:
        losses["location"] = l_loc
    if c.lambda_con:
        losses["reconstruction"] = l_con
    weights = dict(contrast=c.lambda_ctr, location=c.lambda_loc, reconstruction=c.lambda_con)
    return losses, sum(weights[name] * value for name, value in losses.items())  # Eq. 6


@pytest.mark.parametrize("name", SWITCHES)
@torch.no_grad()
def test_forward_matches_the_equations_in_plain_loops(name):
    model = small(**SWITCHES[name]).double()
    batch = batch_for(model)
    batch = batch._replace(images=batch.images.double(), key_images=batch.key_images.double())
    losses, total = plain_losses(model, batch)
    out = model(batch)
    assert out.pop("loss").item() == pytest.approx(total, rel=1e-5)
    assert {k: v.item() for k, v in out.items()} == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("name", SWITCHES)
def test_gradient_reaches_everything_that_learns_and_no_momentum(name):
    model = small(**SWITCHES[name])
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert not [n for n in trained if n.startswith("momentum")]
    model.requires_grad_(True)  # were the momentum branch not cut off, this would let gradient in
    model(batch_for(model))["loss"].backward()
    for n, parameter in model.named_parameters():
        if n in trained:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, n
        else:
            assert parameter.grad is None, n


@pytest.mark.parametrize("kind", DECODERS)
def test_every_decoder_hands_the_encoder_a_gradient(kind):
    model = small(decoder=kind)
    model(batch_for(model))["reconstruction"].backward()
    assert all(p.grad.abs().sum() > 0 for p in model.encoder.parameters())
    middle, ends = model.decoder.blocks[1].attn, (model.decoder.blocks[0].attn, model.decoder.blocks[2].attn)
    assert (type(middle) is type(ends[0])) == (not kind.startswith("hybrid"))
    assert type(ends[0]) is type(ends[1])
    if "conv" in kind:  # one 3 x 3 kernel per channel, as many channels as the decoder is wide
        assert middle.conv.weight.shape == (16, 1, 3, 3)
    if "mlp" in kind:  # four times as wide as its 17 tokens, as an MLP across channels is
        assert middle.fc1.weight.shape == (68, 17)


@pytest.mark.parametrize("width", [64, 512])
@torch.no_grad()
def test_a_weaker_layer_begins_as_strong_at_any_width(width):
    """Depth-wise, a kernel has nine values in and nine out: inside, outputs are as large as inputs at any width."""
    torch.manual_seed(0)
    x = torch.randn(2, 1 + 64, width)
    layer = DepthwiseConv(width, (8, 8))
    assert layer.conv.weight.min().item() == pytest.approx(-math.sqrt(1 / 3), abs=0.02)  # uniform: a variance of 1/9
    assert layer.conv.weight.max().item() == pytest.approx(math.sqrt(1 / 3), abs=0.02)
    out = layer(x)
    assert (out[:, 0] == 0).all()
    assert out[:, 1:].unflatten(1, (8, 8))[:, 1:-1, 1:-1].std().item() == pytest.approx(1, abs=0.15)


def test_gradient_stops_at_q2_and_at_the_whole_key_branch():
    """The contrast's gradient on x_q is exactly zero at the masked patches, and flows at the visible ones."""
    model = small()
    batch = batch_for(model)
    batch.images.requires_grad_()
    batch.key_images.requires_grad_()
    model(batch)["contrast"].backward()
    gradient = patchify(batch.images.grad, 8).abs().sum(-1)
    assert (gradient[batch.mask.hidden()] == 0).all() and (gradient[~batch.mask.hidden()] > 0).all()
    assert batch.key_images.grad is None
    model.requires_grad_(True)
    assert not model.z_k(batch).requires_grad
    values = model(batch)["contrast"].item()
    patches = patchify(batch.images.detach(), 8)  # yet q2 is looked at
    changed = unpatchify(patches + torch.randn_like(patches) * batch.mask.hidden()[:, :, None], 8, (4, 4))
    assert model(batch._replace(images=changed))["contrast"].item() != pytest.approx(values, abs=1e-4)


@torch.no_grad()
def test_h1_and_h2_hold_every_patch_in_its_place():
    """Eq. 2; the mean that follows would forgive a wrong order."""
    model = small()
    batch = batch_for(model)
    q1 = model.encoder(batch.images, batch.mask.visible)
    sides = ((model.encoder, batch.images, batch.mask), (model.momentum_encoder, batch.key_images, batch.key_mask))
    for h, (vit, images, mask) in zip((model.h1(q1, batch), model.h2(batch)), sides, strict=True):
        for b in range(3):
            rows = {}
            for part in mask:
                rows |= plain_tokens(vit, images[b], part[b].tolist())[1]
            torch.testing.assert_close(h[b], torch.stack([rows[i] for i in range(16)]), atol=1e-5, rtol=1e-5)


def test_q1_and_q2_are_passes_of_their_own():
    model, seen = small(), []
    model.encoder.register_forward_hook(lambda _, inputs, out: seen.append((inputs[1], out)))
    model.momentum_encoder.register_forward_hook(lambda _, inputs, out: seen.append((inputs[1], out)))
    batch = batch_for(model)
    model(batch)
    wanted = [batch.mask.visible, batch.mask.masked, batch.key_mask.visible, batch.key_mask.masked]
    assert all(torch.equal(a, b) for (a, _), b in zip(seen, wanted, strict=True))
    assert [out.shape[1] for _, out in seen] == [5, 13, 5, 13]


def test_reconstruction_alone_is_mae():
    model = small(lambda_ctr=0.0, lambda_loc=0.0)
    plain = mae.MAE(copy.deepcopy(model.encoder), mae.Config(decoder_width=16, decoder_depth=3, decoder_heads=2))
    state = model.state_dict()
    del state["_extra_state"]
    plain.load_state_dict(state, strict=True)
    batch = batch_for(model)
    theirs = plain(mae.Batch(batch.images, batch.mask))["loss"]
    torch.testing.assert_close(model(batch)["loss"], theirs, atol=1e-6, rtol=1e-6)


def test_ema_moves_encoder_and_projector_toward_the_student():
    model = small(momentum=0.9)
    before = copy.deepcopy(model)
    model.update_teacher(0.5)
    for name, parameter in model.named_parameters():
        old = before.get_parameter(name)
        if name.startswith("momentum_"):
            old = 0.9 * old + 0.1 * before.get_parameter(name.removeprefix("momentum_"))
        torch.testing.assert_close(parameter, old)
    fresh = CMAELoc(ViT(32, 8, 16, 2, 2), Config(**SMALL))  # ME and MP start as E and P
    for name, parameter in fresh.named_parameters():
        if name.startswith("momentum_"):
            assert torch.equal(parameter, fresh.get_parameter(name.removeprefix("momentum_")))
    small(lambda_ctr=0.0).update_teacher(0.5)


# --------------------------------------------------------------------------------------------------- location (Eq. 5)


def test_a_perfect_predictor_has_no_location_loss():
    visible = random_mask(StepRandom(0, 0, 5), (4, 4), 0.75).visible
    assert location_loss(torch.nn.functional.one_hot(visible, 16).float(), visible) == 0


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 10**6))
def test_location_loss_is_the_squared_distance_to_the_one_hot_place(B, V, seed):
    torch.manual_seed(seed)
    p, visible = torch.randn(B, V, 9), torch.randint(0, 9, (B, V))
    total = 0.0
    for b in range(B):
        for v in range(V):
            t = [float(n == visible[b, v]) for n in range(9)]
            total += sum((x - y) ** 2 for x, y in zip(p[b, v].double().tolist(), t, strict=True))
    assert location_loss(p, visible, mean=False).item() == pytest.approx(total / (B * V), rel=1e-5)
    assert location_loss(p, visible).item() == pytest.approx(total / (B * V * 9), rel=1e-5)
    # A predictor that knows nothing, and says so, does worse than one that is right half the time.
    nothing = location_loss(torch.full_like(p, 1 / 9), visible, mean=False).item()
    assert nothing == pytest.approx(1 - 1 / 9, rel=1e-5)


def test_withheld_positions_leave_only_what_is_in_the_patches():
    """Patches carried to other places give the same tokens; with positions they do not."""
    for withhold in (True, False):
        model = small(withhold_positions=withhold)
        batch = batch_for(model)
        elsewhere = batch.mask.visible.flip(1)
        patches = patchify(batch.images, 8)
        seen = take(patches, batch.mask.visible)
        moved = patches.scatter(1, elsewhere[:, :, None].expand_as(seen), seen)
        moved = batch._replace(images=unpatchify(moved, 8, (4, 4)), mask=batch.mask._replace(visible=elsewhere))
        tokens = [model.place_tokens(model.encoder(b.images, b.mask.visible), b) for b in (batch, moved)]
        assert torch.allclose(*tokens, atol=1e-5) == withhold


# ------------------------------------------------------------------------------------------------ ContrastiveCrop


@pytest.mark.parametrize("positions", ["sincos", "relative"])
@torch.no_grad()
def test_class_attention_in_a_loop(positions):
    torch.manual_seed(0)
    vit, images = ViT(32, 8, 16, 3, 2, positions=positions), torch.randn(2, 3, 32, 32)
    if positions == "relative":
        vit.relative_table += torch.randn_like(vit.relative_table)
    bias = vit.relative_bias()
    heat = class_attention(vit, images)
    assert (
        heat.shape == (2, 16)
        and (heat > 0).all()
        and (heat.sum(1) < 1).all()
        and not vit.blocks[2].attn._forward_pre_hooks
    )
    for b in range(2):
        x = torch.cat([vit.cls_token[0], vit.patch_embed(images)[b] + vit.pos_embed[0, 1:]])
        x = vit.blocks[2].norm1(vit.blocks[1](vit.blocks[0](x[None], bias), bias)[0])
        qkv = x @ vit.blocks[2].attn.qkv.weight.T + vit.blocks[2].attn.qkv.bias
        mean = torch.zeros(16)
        for head in range(2):
            q, k = qkv[0, 8 * head : 8 * head + 8], qkv[:, 16 + 8 * head : 24 + 8 * head]
            scores = [q @ k[t] / 8**0.5 + (0 if bias is None else bias[0, head, 0, t]) for t in range(17)]
            mean += torch.stack(scores).softmax(0)[1:] / 2
        torch.testing.assert_close(heat[b], mean, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_feature_norms_are_of_the_last_block_before_the_norm():
    model = small()
    images = torch.randn(2, 3, 32, 32)
    x = torch.cat([model.encoder.cls_token.expand(2, -1, -1), model.encoder.embed(images)], dim=1)
    for block in model.encoder.blocks:
        x = block(x)
    heat = feature_norms(model.encoder, images)
    torch.testing.assert_close(heat, x[:, 1:].abs().sum(2))
    assert heat.std(dim=1).min() > 0.1  # it tells patches apart; the channels' sum after the norm would not
    assert model.encoder(images).sum(2).abs().max() < 1e-4


def plain_locate(heat, size, k):
    """One map: stretch, enlarge bilinearly (pixel centres, edges repeated), first and last row and column above k."""
    (h, w), (H, W) = heat.shape, size
    low, high = heat.min(), heat.max()
    if low == high:
        return [0, 0, 1, 1]
    heat = (heat - low) / (high - low)
    big = np.zeros((H, W))
    for i in range(H):
        for j in range(W):
            y, x = max(0.0, (i + 0.5) * h / H - 0.5), max(0.0, (j + 0.5) * w / W - 0.5)
            r, s = int(y), int(x)
            fy, fx = y - r, x - s
            r1, s1 = min(r + 1, h - 1), min(s + 1, w - 1)
            upper = heat[r, s] * (1 - fx) + heat[r, s1] * fx
            big[i, j] = upper * (1 - fy) + (heat[r1, s] * (1 - fx) + heat[r1, s1] * fx) * fy
    rows = [i for i in range(H) if big[i].max() > k]
    columns = [j for j in range(W) if big[:, j].max() > k]
    return [rows[0] / H, columns[0] / W, rows[-1] / H, columns[-1] / W] if rows else [0, 0, 1, 1]


@given(st.integers(0, 10**6), st.sampled_from([0.1, 0.5, 0.8, 0.97]), st.sampled_from([(16, 12), (8, 24)]))
def test_locate_frames_what_exceeds_the_threshold(seed, k, size):
    heat = np.random.default_rng(seed).random((3, 4, 3)) ** 4
    boxes = locate(torch.from_numpy(heat), size, k)
    expected = [plain_locate(h, size, k) for h in heat]
    torch.testing.assert_close(boxes, torch.tensor(expected, dtype=torch.float64))
    assert (boxes[:, :2] <= boxes[:, 2:]).all()
    wider = locate(torch.from_numpy(heat), size, k / 2)
    found = boxes[:, 3] < 1  # elsewhere nothing exceeds k
    assert (wider[:, :2] <= boxes[:, :2])[found].all() and (wider[:, 2:] >= boxes[:, 2:])[found].all()


def test_locate_finds_a_bright_patch_and_takes_all_where_there_is_none():
    heat = torch.zeros(3, 8, 8)
    heat[0, 2, 5] = 7.0  # row 2, column 5: pixels 16-24 and 40-48 of 64, and half a patch around
    heat[1] = 4.0
    heat[2, 3, 3] = 1.0  # between pixels' centres, where the enlarged map stays below 0.9
    boxes = locate(heat, (64, 64), 0.5)
    assert torch.equal((boxes[0] * 64).int(), torch.tensor([16, 40, 23, 47], dtype=torch.int32))
    assert boxes[1].tolist() == [0, 0, 1, 1]
    assert locate(heat, (64, 64), 0.9)[2].tolist() == [0, 0, 1, 1]
    above = locate(heat, (64, 64), 0.0)[0]  # what does not exceed k, here the zeros around, is left out
    assert (above * 64).tolist() == [12, 36, 27, 51]


unit = st.floats(0, 1, width=32)


@given(
    st.tuples(st.integers(1, 60), st.integers(1, 60)), st.tuples(unit, unit), st.tuples(unit, unit, unit, unit),
    st.tuples(unit, unit),
)  # fmt: skip
def test_placed_crops_stay_inside_with_their_centres_as_near_the_box_as_can_be(sides, share, box, beta):
    height, width = (max(1, round(s * n)) for s, n in zip(share, sides, strict=True))
    box = [*(min(box[i], box[i + 2]) for i in range(2)), *(max(box[i], box[i + 2]) for i in range(2))]
    crop, box = torch.tensor([[7, 7, height, width]]), torch.tensor([box])

    def placed(*beta):
        return place_crops(crop, sides, box, torch.tensor([beta]))[0].tolist()

    ends = placed(0.0, 0.0), placed(1.0, 1.0)
    got = placed(*beta)
    assert got[2:] == [height, width]
    for axis in range(2):
        side, length = sides[axis], (height, width)[axis]
        assert 0 <= got[axis] <= side - length  # inside the image
        for end, edge in zip(ends, (axis, axis + 2), strict=True):
            wanted = int(np.float32(box[0, edge]) * np.float32(side)) - length // 2  # the centre on the box's edge
            assert end[axis] == min(max(wanted, 0), side - length)
        low, high = ends[0][axis], ends[1][axis]
        assert got[axis] == low + int(np.float32(high - low) * np.float32(beta[axis]))
        if low > 0 and high < side - length:  # nothing in the way: the centre lies in the box
            assert box[0, axis] * side - 1 <= got[axis] + length / 2 <= box[0, axis + 2] * side + 1


def test_each_image_has_its_own_size_box_and_place():
    crops = torch.tensor([[0, 0, 10, 20], [0, 0, 4, 4]])
    boxes = torch.tensor([[0.25, 0.5, 0.75, 1.0], [0.0, 0.0, 0.5, 0.5]])
    placed = place_crops(crops, torch.tensor([[40, 80], [20, 30]]), boxes, torch.tensor([[0.5, 0.0], [1.0, 0.9]]))
    # Rows 10-5 … 30-5, half way; columns 40-10 … min(80-10, 60), at their start. Then 10-2 at the end; 0 … 13, at 0.9.
    assert placed.tolist() == [[15, 30, 10, 20], [8, 11, 4, 4]]


def test_centres_are_suppressed_in_the_middle_of_the_box():
    """Beta(0.1, 0.1) is U-shaped: Beta(α, α)'s middle half holds 7 % of it, a uniform law's half."""

    def places(alpha, n=4000):
        beta = StepRandom(0, 0, n).beta(alpha, alpha, 2)
        crops = torch.tensor([0, 0, 10, 10]).expand(n, 4)
        top_left = place_crops(crops, (100, 100), torch.tensor([0.2, 0.2, 0.8, 0.8]).expand(n, 4), beta)[:, :2]
        return (top_left.float() + 5 - 50) / 30  # -1 … 1 over the box

    for alpha, low, high in ((0.1, 0.05, 0.10), (0.6, 0.3, 0.42), (1.0, 0.45, 0.55)):
        x = places(alpha)
        assert x.min() >= -1 and x.max() <= 1 and x.mean().abs() < 0.05
        assert low < (x.abs() < 0.5).float().mean() < high


class Stub:
    """An image set of given images, counting what is asked for."""

    def __init__(self, images):
        self.pixels, self.asked = images, []

    def __len__(self):
        return len(self.pixels)

    def batches(self, orders, device):
        for index in orders:
            self.asked += index.tolist()
            chosen = [self.pixels[i].to(device) for i in index]
            yield torch.stack(chosen) if isinstance(self.pixels, torch.Tensor) else chosen, index


def images_for(n=7, side=40):
    torch.manual_seed(5)
    coarse = torch.rand(n, 3, 5, 5)
    return (torch.nn.functional.interpolate(coarse, side, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


@pytest.mark.parametrize("crop_by", ["attention", "features"])
def test_boxes_are_those_of_every_image_on_its_own(crop_by):
    model, images = small(crop_by=crop_by, crop_threshold=0.7), images_for()
    model.train()
    boxes = model.compute_boxes(Stub(images), chunk=3)
    assert model.training and model.encoder.training
    for i, image in enumerate(images):
        whole = augment.normalize(augment.resize(image[None], (32, 32)))
        with torch.no_grad():
            heat = dict(attention=class_attention, features=feature_norms)[crop_by](model.encoder, whole)
        expected = plain_locate(heat[0].double().reshape(4, 4).numpy(), (32, 32), 0.7)
        torch.testing.assert_close(boxes[i], torch.tensor(expected, dtype=torch.float32))
    assert len(boxes.unique(dim=0)) > 3
    listed = model.compute_boxes(Stub([*images[:6], images_for(1, 52)[0][:, :, :44]]), chunk=3)
    torch.testing.assert_close(listed[:6], boxes[:6])


def test_boxes_do_not_depend_on_drop_path():
    torch.manual_seed(0)
    config = Config(**SMALL, crop_by="features", crop_threshold=0.7)  # so that boxes differ where features do
    model = CMAELoc(ViT(32, 8, 16, 2, 2, drop_path=0.5), config).train()
    images = images_for(20)
    assert torch.equal(*(model.compute_boxes(Stub(images), chunk=3) for _ in range(2)))
    model.encoder.eval()
    model.compute_boxes(Stub(images_for()))
    assert not model.encoder.training


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_ranks_share_the_images_and_all_end_with_the_same_boxes(monkeypatch, ranks):
    model, images, asked, parts = small(), images_for(), [], []
    alone = model.compute_boxes(Stub(images), chunk=2)
    monkeypatch.setattr(cmae_loc, "world_size", lambda: ranks)
    monkeypatch.setattr(cmae_loc, "sum_over_ranks", lambda x: parts.append(x) or x)
    for r in range(ranks):
        monkeypatch.setattr(cmae_loc, "rank", lambda r=r: r)
        share = Stub(images)
        model.compute_boxes(share, chunk=2)
        asked += share.asked
    assert sorted(asked) == list(range(7))  # every image once
    assert torch.equal(sum(parts), alone)  # to the bit


def schedule(epochs, crop_warmup, crop_interval, **settings):
    """After which of these epochs but the last the boxes are computed."""
    model, images, computed = small(crop_warmup=crop_warmup, crop_interval=crop_interval, **settings), images_for(), []
    for done in range(1, math.ceil(epochs)):
        before = model.boxes
        model.end_epoch(done, epochs, Stub(images))
        computed += [done] * (model.boxes is not before)
    return computed


def test_boxes_are_computed_when_shares_of_the_run_are_over():
    assert schedule(10, 0.2, 0.3) == [2, 5, 8]
    assert schedule(20, 0.2, 0.2) == [4, 8, 12, 16]  # though 0.2 · 3 + 0.2 is not 0.8 in floating point
    assert schedule(8, 0.2, 0.2) == [2, 4, 6]  # to whole epochs: 1.6 is nearer to 2
    assert schedule(4, 0.2, 0.2) == [1, 2, 3]  # no run is too short for a crop
    assert schedule(6, 0, 1) == [1]  # no warm-up: as soon as an epoch is over
    assert schedule(6, 1, 0.2) == []  # plain crops to the end
    assert schedule(2.5, 0.8, 0.8) == [2]  # --max-steps may end a run inside of an epoch
    assert schedule(6, 0.2, 0.2, crop_by="none") == []


def test_a_line_says_how_large_the_boxes_are(monkeypatch):
    model = small()
    boxes = torch.tensor([[0, 0, 1, 1], [0, 0.5, 1, 1], [0.25, 0, 0.75, 0.5], [0, 0, 1, 1]])
    monkeypatch.setattr(model, "compute_boxes", lambda images: boxes)
    line = model.end_epoch(2, 10, None)
    assert line == "boxes for crops after epoch 2: mean area 0.69"
    assert model.end_epoch(3, 10, None) is None  # none computed


@pytest.mark.parametrize("crop_by", ["attention", "features"])
def test_boxes_are_computed_in_the_precision_of_the_run(crop_by):
    """train.py calls `end_epoch` as it calls the method: in bf16, the encoder's products are bf16."""
    model, seen = small(crop_by=crop_by), []
    model.encoder.blocks[-1].mlp.fc1.register_forward_hook(lambda _, inputs, out: seen.append(out.dtype))
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            model.end_epoch(2, 10, Stub(images_for()))
        assert set(seen) == {dtype} and model.boxes.dtype == torch.float32
        seen.clear()


def test_boxes_survive_a_checkpoint_whatever_their_number():
    model = small()
    for _ in range(2):  # before there are any, and after
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        other = small()
        other.boxes = torch.rand(3, 4)
        other.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(other.boxes, model.boxes)
        model.end_epoch(2, 10, Stub(images_for()))
    assert len(model.boxes) == 7


# -------------------------------------------------------------------------------------------------------------- draw


def test_plain_crops_before_there_are_boxes_and_for_images_of_other_sets():
    model, images = small(), images_for()
    rng = StepRandom(3, 4, 7)
    batch = model.draw(images, torch.arange(7), StepRandom(3, 4, 7))
    boxes = augment.crop_boxes(rng, (40, 40), scale=(0.2, 1.0))
    rng.beta(0.1, 0.1, 2)
    expected = augment.normalize(augment.crop_resize(images, boxes, 32, hflip=rng.chance(0.5)))
    torch.testing.assert_close(batch.images, expected)
    assert (batch.images - batch.key_images).abs().amax((1, 2, 3)).min() > 0.1  # a crop of its own
    assert not torch.equal(batch.mask.hidden(), batch.key_mask.hidden())
    assert batch.mask.visible.shape == batch.key_mask.visible.shape == (7, 4)
    model.boxes = torch.rand(7, 2).repeat(1, 2)
    other = model.draw(images, torch.full((7,), -1), StepRandom(3, 4, 7))
    assert all(torch.equal(a, b) for a, b in zip(flat(other), flat(batch), strict=True))
    placed = model.draw(images, torch.arange(7), StepRandom(3, 4, 7))
    assert torch.equal(placed.mask.order(), batch.mask.order()) and not torch.equal(placed.images, batch.images)


def flat(batch):
    return [batch.images, *batch.mask, batch.key_images, *batch.key_mask]


def test_both_views_lie_where_the_images_own_box_is(monkeypatch):
    """Images whose red is the row and green the column show where a crop was taken."""
    n = 64
    ramp = torch.arange(64).float() * 4
    image = torch.stack([ramp[:, None].expand(64, 64), ramp.expand(64, 64), torch.zeros(64, 64)]).to(torch.uint8)
    model = small(crop_scale=0.05)
    corner = torch.tensor([[0.1, 0.2], [0.8, 0.3], [0.5, 0.9]])
    model.boxes = corner.repeat(1, 2)  # points: the centre has one place, unless the image's edge is in the way
    index = torch.arange(n) % 3
    boxes = []
    monkeypatch.setattr(augment, "crop_resize", lambda images, crops, size, hflip: (
        boxes.append(crops), torch.zeros(len(images), 3, size, size))[1])  # fmt: skip
    model.draw(image.expand(n, -1, -1, -1), index, StepRandom(0, 0, n))
    assert len(boxes) == 2 and not torch.equal(boxes[0], boxes[1])
    for crops in boxes:
        start, size = crops[:, :2], crops[:, 2:]
        wanted = (corner[index] * 64).long() - size // 2
        assert torch.equal(start, wanted.clamp(min=0).minimum(64 - size))
        area = size.prod(dim=1) / 64**2
        assert area.min() < 0.15 and area.max() > 0.7  # sizes as ever, from `crop_scale` up


def test_rows_of_ranks_are_those_of_one_process():
    model, images = small(key_color=True), images_for(6)
    for boxes in (torch.zeros(0, 4), torch.tensor([0.2, 0.3, 0.6, 0.7]).expand(6, 4)):
        model.boxes = boxes
        whole = flat(model.draw(images, torch.arange(6), StepRandom(3, 4, 6)))
        for r in range(2):
            rows = slice(3 * r, 3 * r + 3)
            part = flat(model.draw(images[rows], torch.arange(6)[rows], StepRandom(3, 4, 6, rows)))
            for a, b in zip(part, whole, strict=True):
                torch.testing.assert_close(a, b[rows], atol=1e-5, rtol=0)
        listed = flat(model.draw(list(images), torch.arange(6), StepRandom(3, 4, 6)))
        for a, b in zip(listed, whole, strict=True):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=0)


def test_colour_changes_the_second_view_only():
    images = images_for(60)
    plain, coloured = (small(key_color=on).draw(images, torch.arange(60), StepRandom(1, 1, 60)) for on in (False, True))
    assert torch.equal(plain.images, coloured.images)
    changed = (plain.key_images - coloured.key_images).abs().amax((1, 2, 3)) > 1e-3
    assert 0.6 < changed.float().mean() <= 1  # 1 - 0.2 · 0.8 expected


def test_colours_are_jittered_as_often_and_as_strongly_as_in_cmae(monkeypatch):
    """ColorJitter(0.4, 0.4, 0.4, 0.1) with a probability of 0.8, greyscale with 0.2."""
    seen = {}
    for name in ("color_jitter", "grayscale"):
        monkeypatch.setattr(augment, name, lambda x, *parameters, name=name: seen.update({name: parameters}) or x)
    small(key_color=True).draw(images_for(2, 8).repeat(1500, 1, 1, 1), torch.arange(3000), StepRandom(0, 0, 3000))
    jitter, (gray,) = augment.ColorJitter(*seen["color_jitter"]), seen["grayscale"]
    for values, middle, strength in zip(jitter[1:5], (1, 1, 1, 0), (0.4, 0.4, 0.4, 0.1), strict=True):
        assert values.min() == pytest.approx(middle - strength, abs=2e-3)
        assert values.max() == pytest.approx(middle + strength, abs=2e-3)
    assert jitter.where.double().mean().item() == pytest.approx(0.8, abs=0.025)
    assert gray.double().mean().item() == pytest.approx(0.2, abs=0.025)


def test_picture_has_the_second_view_as_its_last_row():
    model = small()
    batch = model.draw(images_for(), torch.full((7,), -1), StepRandom(0, 0, 7))
    rows = model.picture(batch)
    assert rows.shape == (4, 7, 3, 32, 32) and rows.min() >= 0 and rows.max() <= 1
    torch.testing.assert_close(rows[3], augment.denormalize(batch.key_images).clamp(0, 1))
    assert small(lambda_con=0.0).picture(batch) is None


def test_what_a_switch_turns_off_is_not_built():
    names = {n.split(".")[0] for n, _ in small(lambda_con=0.0, lambda_loc=0.0).named_parameters()}
    assert names == {"encoder", "projector", "momentum_encoder", "momentum_projector"}
    assert {n.split(".")[0] for n, _ in small(lambda_ctr=0.0).named_parameters()} == {"encoder", "decoder", "location"}


def test_the_projector_is_as_wide_as_the_encoder_where_no_width_is_given():
    for width, hidden in ((0, 16), (24, 24)):
        first, _, second = small(projector_width=width).projector
        assert first.weight.shape == (hidden, 16) and second.weight.shape == (8, hidden)


@pytest.mark.parametrize("settings,words", [
    (dict(decoder="rnn"), "decoder 'rnn': unknown; choose transformer, mlp, conv, hybrid-mlp or hybrid-conv"),
    (dict(decoder="hybrid-mlp", decoder_depth=2), "has no middle"), (dict(crop_by="eye"), "crop by 'eye': unknown"),
    (dict(crop_interval=0.0), "must be above 0"), (dict(crop_warmup=4.0), "crop warmup 4: must be from 0 to 1"),
    (dict(crop_alpha=0.0), "must be above 0"),
    (dict(crop_threshold=1.0), "crop threshold 1: no heat map exceeds it"),
    (dict(crop_threshold=-0.1), "crop threshold -0.1"),
    (dict(mask_ratio=1.0), "mask ratio"),
    (dict(lambda_ctr=0.0, lambda_loc=0.0, lambda_con=0.0), "all three weights are 0"),
])  # fmt: skip
def test_wrong_settings_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        small(**settings)
    small(crop_threshold=0.0)  # the smallest that is allowed


def test_relative_positions_work_but_cannot_be_withheld():
    encoder = ViT(32, 8, 16, 2, 2, positions="relative")
    model = CMAELoc(encoder, Config(**SMALL))
    model(batch_for(model))["loss"].backward()
    assert all(p.grad.abs().sum() > 0 for p in encoder.parameters())
    assert model.compute_boxes(Stub(images_for())).shape == (7, 4)
    with pytest.raises(InputError, match="cannot be withheld"):
        CMAELoc(encoder, Config(withhold_positions=True))


def test_settings_are_the_papers_and_contrastive_crops():
    """§3.2 to §4.2, and what the header says stands where they are silent, as the command line hands it on."""
    args, c, _ = options("--method cmae_loc --data tiny-imagenet --recipe paper".split())
    assert (args.model, args.epochs, args.batch_size, args.weight_decay) == ("base", 300, 64, 0.05)
    assert (args.image_size, args.patch_size, args.warmup_epochs, args.betas) == (64, 8, 40, [0.9, 0.95])
    assert args.lr == pytest.approx(1e-3 * 64 / 256) == 2.5e-4 and args.min_lr == args.clip_grad == args.drop_path == 0
    assert c == Config() and (c.mask_ratio, c.lambda_ctr, c.lambda_loc, c.lambda_con) == (0.75, 1, 1, 1)
    assert (c.decoder, c.decoder_width, c.decoder_depth, c.decoder_heads) == ("transformer", 512, 8, 16)
    assert (c.crop_by, c.crop_scale, c.crop_threshold, c.crop_alpha) == ("attention", 0.2, 0.1, 0.1)
    assert (c.projector_out, c.tau, c.momentum, c.key_color, c.norm_pixels) == (128, 0.2, 0.996, False, True)
    for recipe in CMAELoc.RECIPES:
        args, c, _ = options(["--method", "cmae_loc", "--recipe", recipe])
        assert c.crop_warmup == c.crop_interval == 1 / 5 and c.location_mean
