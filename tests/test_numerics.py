"""The losses as functions: gradients against float64, symmetry, scale and bounds, half precision, limits of ε and τ."""

import contextlib
import copy
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_bad_input import batch_for, build
from test_train import needs_compiler

from autoencoder import nothing_hidden
from cae import alignment_loss, token_loss
from cmae import byol_loss
from cmae_loc import location_loss
from common import (
    BatchNorm,
    Mask,
    StepRandom,
    ViT,
    ema_update,
    info_nce,
    normalize_patches,
    random_mask,
    reconstruction_loss,
)
from conmim import denoising_contrast
from dvae import gumbel_noise, logit_laplace_loss, relax, uniform_kl
from lcmae import cross_view_loss, in_view_loss
from methods import METHODS
from runtime.command_line import build_encoder
from runtime.errors import InputError
from train import options

few, seeds = settings(max_examples=15), st.integers(0, 10**6)


def normal(seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------- gradients against finite differences of a float64 definition


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def cross_entropy(scores, right):
    """Mean of -log softmax over the last axis."""
    top = scores.max(-1, keepdims=True)
    log_sum = np.log(np.exp(scores - top).sum(-1)) + top[..., 0]
    return (log_sum - np.take_along_axis(scores, right[..., None], -1)[..., 0]).mean()


MASKED = np.array([[5, 0, 3], [1, 2, 4]])  # of six patches, in this order, in two images
MASKS = [Mask(torch.tensor([[1, 2, 4], [0, 3, 5]]), torch.tensor(MASKED))]
MASKS.append(Mask(torch.tensor([[0, 4, 2], [5, 4, 0]]), torch.tensor([[3, 1, 5], [2, 1, 3]])))
PATCHES = np.random.default_rng(9).standard_normal((2, 3, 6))  # x of Eq. (6) of LC-MAE
NOISE = np.random.default_rng(8).gumbel(size=(2, 4, 1, 2))


def plain_cross_view(v, w):
    total = 0.0
    for b in range(2):
        first, second = MASKS[0].masked[b].tolist(), MASKS[1].masked[b].tolist()
        both = set(first) & set(second)
        distances = [1 - unit(v[b, first.index(i)]) @ unit(w[b, second.index(i)]) for i in both]
        total += sum(distances) / len(distances)
    return total / 2


def plain_in_view(v):
    apart = ~np.eye(3, dtype=bool)
    cosines = [unit(x) @ unit(x).swapaxes(1, 2) for x in (v, PATCHES)]
    return np.abs(cosines[0] - cosines[1])[:, apart].mean()


def plain_batch_norm(x):
    y = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-6)
    return (y * np.arange(1, 1 + y.size).reshape(y.shape)).sum() / 10


def plain_relax(logits):
    z = np.exp((logits + NOISE) / 0.5)
    z = z / z.sum(1, keepdims=True)
    return (z * np.arange(z.size).reshape(z.shape)).sum() / 10


def plain_kl(logits):
    q = np.exp(logits - logits.max(1, keepdims=True))
    q = q / q.sum(1, keepdims=True)
    return math.log(4) + (q * np.log(q)).sum(1).mean()


def plain_laplace(mu, log_b):
    x = np.linspace(0.15, 0.85, mu.size).reshape(mu.shape)
    return (np.abs(np.log(x / (1 - x)) - mu) / np.exp(log_b) + log_b + np.log(2 * x * (1 - x))).mean()


def ours_laplace(mu, log_b):
    return logit_laplace_loss(torch.linspace(0.15, 0.85, mu.numel()).reshape(mu.shape), mu, log_b)


def ours_batch_norm(x):
    y = BatchNorm(x.shape[1])(x)
    return (y * torch.arange(1.0, 1 + y.numel()).reshape(y.shape)).sum() / 10


def ours_relax(logits):
    z = relax(logits, torch.tensor(NOISE, dtype=torch.float32), torch.tensor(0.5))
    return (z * torch.arange(z.numel()).reshape(z.shape)).sum() / 10


KEYS, PLACES = np.random.default_rng(7).standard_normal((2, 6, 5)), np.array([[0, 1, 3], [5, 2, 4]])
LOSSES = {  # ours, the definition, shapes of what gets a gradient
    "MAE and CMAE, Eq. (5)": (
        lambda y: reconstruction_loss(y, torch.tensor(PATCHES)), lambda y: ((y - PATCHES) ** 2).mean(), [(2, 3, 6)]),
    "CMAE, Eq. (6), (7)": (
        lambda y: info_nce(y, torch.tensor(KEYS[0]), 0.2),
        lambda y: cross_entropy(unit(y) @ unit(KEYS[0]).T / 0.2, np.arange(6)), [(6, 5)]),
    "CMAE, BYOL's loss": (
        lambda y: byol_loss(y, torch.tensor(KEYS[0])),
        lambda y: (2 - 2 * (unit(y) * unit(KEYS[0])).sum(-1)).mean(), [(6, 5)]),
    "CMAE-loc, Eq. 5": (
        lambda p: location_loss(p, torch.tensor(MASKED)),
        lambda p: ((p - np.eye(6)[MASKED]) ** 2).mean(), [(2, 3, 6)]),
    "CAE, Eq. (1), alignment": (
        lambda z: alignment_loss(z, torch.tensor(PATCHES)), lambda z: ((z - PATCHES) ** 2).mean(), [(2, 3, 6)]),
    "CAE, Eq. (1), decoding": (
        lambda y: token_loss(y, torch.tensor(MASKED)), lambda y: cross_entropy(y, MASKED), [(2, 3, 6)]),
    "ConMIM, Eq. (3)": (
        lambda a: denoising_contrast(a, torch.tensor(KEYS), torch.tensor(PLACES), 0.3)[0],
        lambda a: cross_entropy(unit(a) @ unit(KEYS).swapaxes(1, 2) / 0.3, PLACES), [(2, 3, 5)]),
    "LC-MAE, Eq. (5)": (lambda v, w: cross_view_loss(v, w, *MASKS), plain_cross_view, [(2, 3, 5), (2, 3, 5)]),
    "LC-MAE, Eq. (6)": (lambda v: in_view_loss(v, torch.tensor(PATCHES)), plain_in_view, [(2, 3, 5)]),
    "d-VAE, logit-Laplace": (ours_laplace, plain_laplace, [(2, 3, 2), (2, 3, 2)]),
    "d-VAE, KL": (uniform_kl, plain_kl, [(2, 4, 1, 2)]),
    "d-VAE, relaxation": (ours_relax, plain_relax, [(2, 4, 1, 2)]),
    "batch norm": (ours_batch_norm, plain_batch_norm, [(4, 3)]),
}  # fmt: skip


@few
@given(seeds)
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_are_those_of_the_definition_in_float64(name, seed):
    """Central differences of the definition, written in numpy, in every coordinate of every input."""
    ours, plain, shapes = LOSSES[name]
    points = [np.random.default_rng((seed, i)).standard_normal(shape) for i, shape in enumerate(shapes)]
    inputs = [torch.tensor(x, dtype=torch.float32, requires_grad=True) for x in points]
    points = [x.detach().double().numpy() for x in inputs]  # the same numbers
    loss = ours(*inputs)
    loss.backward()
    assert loss.item() == pytest.approx(plain(*points), rel=2e-5, abs=2e-5)
    for x, point in zip(inputs, points, strict=True):
        h, expected = 1e-6, np.zeros_like(point)
        for place in np.ndindex(*point.shape):
            kept = point[place]
            sides = []
            for point[place] in (kept + h, kept - h):
                sides.append(plain(*points))
            point[place] = kept
            expected[place] = (sides[0] - sides[1]) / (2 * h)
        off = np.abs(x.grad.double().numpy() - expected)
        assert off.max() < 1e-3 * max(1.0, np.abs(expected).max()), (name, off.max())


@few
@given(seeds)
def test_normalized_patches_have_their_gradient(seed):
    """Through the standardisation itself, as LC-MAE's and a picture's statistics use it; float64 by hand."""
    x = normal(seed, 1, 2, 6).requires_grad_()
    (normalize_patches(x) * torch.arange(12.0).reshape(1, 2, 6)).sum().backward()
    y = x.detach().double().requires_grad_()
    z = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True) + 1e-6).sqrt()
    (z * torch.arange(12.0).reshape(1, 2, 6)).sum().backward()
    torch.testing.assert_close(x.grad.double(), y.grad, atol=1e-3, rtol=1e-3)


# ------------------------------------------------------------------------------- symmetry, scale, bounds, permutations


@given(seeds, st.floats(0.1, 10), st.floats(-3, 3))
def test_squared_errors_are_symmetric_quadratic_and_blind_to_a_common_shift(seed, scale, shift):
    a, b = normal(seed, 2, 3, 6), normal(seed + 1, 2, 3, 6)
    for loss in (reconstruction_loss, alignment_loss):
        there = loss(a, b)
        torch.testing.assert_close(loss(b, a), there)
        torch.testing.assert_close(loss(scale * a, scale * b), scale**2 * there, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(loss(a + shift, b + shift), there, atol=1e-4, rtol=1e-4)
        assert there > 0 and loss(a, a) == 0


@given(seeds, st.floats(0.01, 100), st.floats(0.01, 100))
def test_losses_of_directions_are_bounded_and_blind_to_length(seed, s, t):
    v, w, x = normal(seed, 2, 3, 5), normal(seed + 1, 2, 3, 5), normal(seed + 2, 2, 3, 6)
    places = torch.tensor(PLACES)
    keys = normal(seed + 3, 2, 6, 5)
    for loss, top in (
        (lambda v, w: byol_loss(v.flatten(0, 1), w.flatten(0, 1)), 4),
        (lambda v, w: cross_view_loss(v, w, *MASKS), 2),
        (lambda v, w: in_view_loss(v, x), 2),
        (lambda v, w: info_nce(v.flatten(0, 1), w.flatten(0, 1), 0.2), math.log(6) + 2 / 0.2),
        (lambda v, w: denoising_contrast(v, keys, places, 0.2)[0], math.log(6) + 2 / 0.2),
    ):
        there = loss(v, w)
        assert 0 <= there <= top
        torch.testing.assert_close(loss(s * v, t * w), there, atol=1e-4, rtol=1e-4)
    assert byol_loss(v, -v).item() == pytest.approx(4, abs=1e-5) and byol_loss(v, s * v).abs() < 1e-5
    assert cross_view_loss(v, w, MASKS[0], MASKS[0]).item() == pytest.approx(
        cross_view_loss(w, v, MASKS[0], MASKS[0]).item(), abs=1e-6
    )
    swapped = cross_view_loss(w, v, MASKS[1], MASKS[0])
    torch.testing.assert_close(cross_view_loss(v, w, *MASKS), swapped, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(byol_loss(v, w), byol_loss(w, v))


@given(st.integers(2, 8), st.sampled_from([0.07, 0.1, 1.0]))
def test_infonce_of_true_and_of_wrong_pairs_has_its_closed_form(n, tau):
    """Orthogonal keys: cosine 1 to one of them, the query's own or another's, and 0 to all the rest."""
    q = torch.eye(n)
    total = math.log(math.exp(1 / tau) + n - 1)
    assert info_nce(q, q, tau).item() == pytest.approx(total - 1 / tau, abs=1e-5)
    assert info_nce(q, q.roll(1, 0), tau).item() == pytest.approx(total, rel=1e-5)


def permuted(batch, order):
    """The images of a batch in another order, with all that belongs to them."""

    def take(x):
        return Mask(*(part[order] for part in x)) if isinstance(x, Mask) else x if x is None else x[order]

    return type(batch)(*(take(x) for x in batch))


@few
@given(seeds, st.permutations(range(4)))
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_no_loss_depends_on_the_order_of_the_images(method, seed, order):
    model = MODELS[method]
    batch = batch_for(model, seed=seed)
    losses, others = model(batch), model(permuted(batch, torch.tensor(order)))
    for name, loss in losses.items():
        torch.testing.assert_close(others[name], loss, atol=1e-5, rtol=1e-4)


@few
@given(seeds)
@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("autoencoder", "dvae")])
@torch.no_grad()
def test_no_loss_depends_on_the_order_in_which_patches_are_listed(method, seed):
    """A mask is two sets: what is read from one place must be compared with what stands there, in any order."""
    model, draw = MODELS[method], torch.Generator().manual_seed(seed)
    batch = batch_for(model, seed=seed)

    def shuffled(index):
        return index.gather(1, torch.rand(index.shape, generator=draw).argsort(1))

    other = type(batch)(*(Mask(*map(shuffled, x)) if isinstance(x, Mask) else x for x in batch))
    for name, loss in model(batch).items():
        torch.testing.assert_close(model(other)[name], loss, atol=1e-5, rtol=1e-4)


MODELS = {name: build(name) for name in METHODS}

BACKENDS = [*((method, "aot_eager") for method in METHODS), pytest.param("mae", "inductor", marks=needs_compiler)]


@pytest.mark.slow
@pytest.mark.parametrize("method, backend", BACKENDS)
def test_a_compiled_step_is_one_graph_with_the_same_numbers(method, backend):
    """A break in the graph would cost a GPU time, and a compiler memory: both sides keep what the other reads."""
    model, batch = MODELS[method], batch_for(MODELS[method])
    losses, gradients = [], []
    for compiled in (False, True):
        copied = copy.deepcopy(model)  # batch norm remembers
        out = (torch.compile(copied, fullgraph=True, backend=backend) if compiled else copied)(batch)
        out["loss"].backward()
        losses.append(out)
        gradients.append({name: p.grad for name, p in copied.named_parameters() if p.grad is not None})
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-3)


# --------------------------------------------------------------------------------------- any size, any ratio, any batch

grids = st.tuples(st.integers(1, 4), st.integers(1, 4)).filter(lambda grid: grid[0] * grid[1] >= 3)


@settings(max_examples=12)
@given(grids, st.sampled_from([2, 4, 8]), st.floats(0.2, 0.8), st.integers(2, 5), seeds, st.booleans())
def test_losses_are_finite_for_any_grid_patch_ratio_batch_and_type(grid, p, ratio, B, seed, double):
    """Images need not be square where the API allows it: in the encoder, in masks, in the losses."""
    dtype = torch.float64 if double else torch.float32
    torch.manual_seed(seed)
    vit = ViT((grid[0] * p, grid[1] * p), p, 8, 1, 2)
    try:
        mask = random_mask(StepRandom(seed, 0, B), grid, ratio)
    except InputError:
        assume(False)
    images = torch.randn(B, 3, grid[0] * p, grid[1] * p, dtype=dtype)
    for name, Method in METHODS.items():
        fields = dict(decoder_width=8, decoder_depth=1, decoder_heads=2, projector_width=8, projector_out=4)
        fields |= dict(mask_ratio=ratio, target="pixels", mask_cell=1)
        config = Method.Config(**{k: v for k, v in fields.items() if k in Method.Config.__dataclass_fields__})
        if name in ("dvae", "cmae") and (name == "dvae" or grid[0] != grid[1]):  # shifts are of square images
            continue
        encoder = copy.deepcopy(vit)
        encoder.image_size = grid[0] * p if grid[0] == grid[1] else encoder.image_size
        model = Method(encoder, config).to(dtype)
        values = dict(images=images, full_images=images, target_images=images, key_images=images, mask=mask)
        if name == "autoencoder":
            values["mask"] = nothing_hidden(images, vit.patches)
        values |= dict(key_mask=mask, second=mask, target_mask=None, token_images=None)
        batch = sys.modules[Method.__module__].Batch(
            **{k: values[k] for k in sys.modules[Method.__module__].Batch._fields}
        )
        loss = model(batch)["loss"]
        assert loss.ndim == 0 and loss.isfinite(), name
        loss.backward()
        gradients = [w.grad for w in model.encoder.parameters() if w.grad is not None]
        assert gradients and all(g.isfinite().all() for g in gradients), name


# -------------------------------------------------------------------------------------------------------- any device

FLAGS = {
    "conmim": ["--dictionary batch --filter-above 0.5", "--masking none --contrast instance"],
    "cae": ["--target pixels"], "cmae": ["--stem conv"], "lcmae": ["--decoder average"],
}  # fmt: skip


@pytest.mark.parametrize("method, flags", [(name, word) for name in METHODS for word in ["", *FLAGS.get(name, [])]])
def test_what_a_method_makes_is_where_its_images_are(method, flags, monkeypatch):
    """The meta device has shapes and no numbers. What stays on the CPU by mistake meets the rest in an error there."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it does not know that device
    model = build(method, *flags.split())

    def away(x):
        return x if x is None else type(x)(*map(away, x)) if isinstance(x, tuple) else x.to("meta")

    batch = away(batch_for(model))
    made = [*model.to("meta")(batch).values(), model.picture(batch)]
    assert all(x.device.type == "meta" for x in made if x is not None)


# ------------------------------------------------------------------------------------------------------ half precision

# Relative error of a loss whose every product is rounded to 8 bits (2⁻⁸ = 0.4 %) or to 11 (2⁻¹¹ = 0.05 %), after two
# blocks; temperatures of 0.07 multiply it by up to 14. And the cosine of the gradient with that in float32. Over a
# hundred seeds the errors come to 0.033 and 0.006, the cosines to 0.996 and 0.9993.
PRECISIONS = {"bf16": (torch.bfloat16, 0.06, 0.98), "fp16": (torch.float16, 0.008, 0.998)}


@pytest.mark.training
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_gives_nearly_the_loss_and_gradient_of_float32(method, precision, monkeypatch):
    """With softplus for ReLU: a rounding may switch a unit of ReLU on or off, and with it a part of the gradient."""
    monkeypatch.setattr(torch.nn.functional, "relu", torch.nn.functional.softplus)
    dtype, near, parallel = PRECISIONS[precision]
    model = copy.deepcopy(MODELS[method])
    batch = batch_for(model, B=8, seed=3)
    gradients, results = [], []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype, enabled=enabled):
            losses = model(batch)
        model.zero_grad()
        (1024 * losses["loss"]).backward()  # as the scaler would, so that fp16 loses no small ones
        gradients.append(torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None]))
        results.append(losses)
    assert all(loss.dtype == torch.float32 for loss in results[1].values())
    for name in results[0]:
        if name not in ("accuracy", "effective_codes"):  # counts of argmaxes
            plain, half = results[0][name].item(), results[1][name].item()
            assert half == pytest.approx(plain, rel=near, abs=near / 10), name
    assert torch.cosine_similarity(*gradients, dim=0) > parallel
    assert not torch.equal(*gradients)  # half precision it was


@pytest.mark.training
@pytest.mark.parametrize(
    "method, precision", [(name, "bf16") for name in METHODS if name != "dvae"] + [("mae", "fp16"), ("cmae", "fp16")]
)
def test_many_small_patches_train_in_half_precision(method, precision):
    """64 x 64 pixels in patches of 2: 1024 tokens, attention in torch's own kernel, softmaxes over a thousand keys."""
    words = "--image-size 64 --patch-size 2 --width 8 --depth 1 --heads 1 --decoder-width 8 --decoder-heads 1"
    words += " --decoder-depth 1 --projector-width 8 --projector-out 4 --regressor-depth 1 --target pixels"
    Config = METHODS[method].Config.__dataclass_fields__
    words = words.split()
    known = {"--image-size", "--patch-size", "--width", "--depth", "--heads"}
    pairs = [(a, b) for a, b in zip(words[::2], words[1::2], strict=True)]
    words = [x for a, b in pairs if a in known or a[2:].replace("-", "_") in Config for x in (a, b)]
    args, config, Method = options(["--method", method, "--device", "cpu", *words])
    torch.manual_seed(0)
    model = Method(build_encoder(args), config).train()
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=3e-3)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16", init_scale=2.0**12)
    batch, seen = batch_for(model, B=2, side=64), []
    for step in range(4):
        with torch.autocast("cpu", PRECISIONS[precision][0]):
            loss = model(batch)["loss"]
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if hasattr(model, "update_teacher"):
            model.update_teacher(step / 4)
        seen.append(loss.item())
    assert all(map(math.isfinite, seen)) and min(seen) < seen[0]
    assert all(weight.isfinite().all() for weight in model.parameters())


# ----------------------------------------------------------------------------------------------- limits of τ and ε


@pytest.mark.parametrize("tau", [1e-4, 1e-3, 0.07, 1e3])
def test_contrast_is_finite_at_any_temperature_with_a_gradient_that_fits(tau):
    q, k = normal(0, 6, 5).requires_grad_(), normal(1, 6, 5)
    cosines = torch.nn.functional.normalize(q.detach(), dim=1).double() @ torch.nn.functional.normalize(k).double().T
    loss = info_nce(q, k, tau)
    loss.backward()
    expected = (torch.logsumexp(cosines / tau, 1) - cosines.diag() / tau).mean().item()
    assert loss.item() == pytest.approx(expected, rel=1e-3, abs=1e-3) and q.grad.isfinite().all()
    if tau == 1e3:
        assert loss.item() == pytest.approx(math.log(6), abs=1e-3)
    anchors = q.detach()[None].requires_grad_()
    loss, _ = denoising_contrast(anchors, k[None], torch.arange(6)[None], tau)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-3, abs=1e-3) and anchors.grad.isfinite().all()


@pytest.mark.parametrize("tau", [1e-3, 0.0625, 1e3])
def test_relaxation_is_a_distribution_at_any_temperature(tau):
    logits = normal(0, 2, 16, 3, 3, scale=5).requires_grad_()
    noise = gumbel_noise(torch.tensor([[1, 2], [3, 4]]), logits.shape[1:])
    z = relax(logits, noise, torch.tensor(tau))
    torch.testing.assert_close(z.sum(1), torch.ones(2, 3, 3))
    if tau == 1e-3:  # one code each, the likeliest with its noise
        assert torch.equal(z.argmax(1), (logits + noise).argmax(1)) and z.amax(1).min() > 0.99
    (z * normal(1, *z.shape)).sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("b", [-30.0, 30.0])
def test_logit_laplace_is_finite_where_it_can_be(b):
    """A width of e^±30: the density is nearly a spike or nearly flat."""
    x, log_b = torch.tensor([0.1, 0.5, 0.9]), torch.full((3,), b)
    expected = (x.double().logit().abs() * math.exp(-b) + b + (2 * x.double() * (1 - x.double())).log()).mean().item()
    assert logit_laplace_loss(x, torch.zeros(3), log_b).item() == pytest.approx(expected, rel=1e-4)


@given(seeds, st.sampled_from([1e-8, 1e-4, 1.0, 1e4]), st.floats(-10, 10))
def test_standardised_patches_are_bounded_however_flat_or_steep(seed, scale, shift):
    """P values of mean 0 and variance 1 (over P-1) are at most (P-1)/√P; ε makes flat ones smaller, never larger."""
    patches = normal(seed, 1, 3, 12, scale=scale) + shift
    out = normalize_patches(patches)
    assert out.isfinite().all() and out.abs().max() <= 11 / math.sqrt(12) + 1e-3
    assert out.sum(-1).abs().max() < 1e-2 * max(1.0, out.abs().max().item() * 12)
    if scale >= 1:
        torch.testing.assert_close(out.var(-1), torch.ones(1, 3), atol=1e-3, rtol=1e-3)
    if scale == 1e-8:
        assert out.abs().max() < 0.05 + 12e-3 * abs(shift)  # rounding of the shift, over √ε


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_patches_are_standardised_in_float32(dtype):
    patches = (200 * normal(0, 1, 2, 48)).to(dtype)  # squares of it overflow in float16
    out = normalize_patches(patches)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, normalize_patches(patches.float()))


def test_batch_norm_at_its_limits():
    """A column that never varies, a batch of one row, values of 10⁴: finite, with finite gradients."""
    for x in (torch.full((4, 3), 5.0), normal(0, 1, 3), normal(0, 4, 3, scale=1e4), torch.zeros(4, 3)):
        x = x.clone().requires_grad_()
        y = BatchNorm(3)(x)
        y.square().sum().backward()
        assert y.isfinite().all() and x.grad.isfinite().all()
        if (x[:1] == x).all():
            assert y.abs().max() < 1e-2
    half = BatchNorm(3)(normal(0, 64, 3, scale=1e4).half())  # sums and squares overflow in float16
    assert half.dtype == torch.float16 and half.isfinite().all() and abs(half.float().var(0).mean() - 1) < 0.05


def test_directions_of_zero_vectors_are_finite():
    zeros = torch.zeros(3, 5, requires_grad=True)
    for loss in (
        info_nce(zeros, normal(0, 3, 5), 0.07),
        byol_loss(zeros, normal(0, 3, 5)),
        denoising_contrast(zeros[None], normal(0, 1, 3, 5), torch.arange(3)[None], 0.1)[0],
        in_view_loss(zeros[None], normal(0, 1, 3, 6)),
    ):
        zeros.grad = None
        loss.backward()
        assert loss.isfinite() and zeros.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------------------- EMA


@given(seeds, st.floats(0, 1), st.integers(1, 8))
def test_ema_of_a_moving_student_has_its_closed_form(seed, mu, n):
    """θ_n = μⁿ θ_0 + (1 - μ) Σ μⁿ⁻ⁱ s_i, i from 1 to n."""
    teacher, student = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    expected = mu**n * teacher.weight.detach().double()
    for i in range(1, n + 1):
        with torch.no_grad():
            student.weight.copy_(normal(seed + i, 2, 2))
        expected = expected + (1 - mu) * mu ** (n - i) * student.weight.detach().double()
        ema_update(teacher, student, mu)
    torch.testing.assert_close(teacher.weight.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [name for name in METHODS if hasattr(METHODS[name], "update_teacher")])
def test_a_teacher_equal_to_its_student_stays_so_to_the_bit(method):
    """The fixed point, at the start, in the middle and at the end of the schedule."""
    model = build(method)
    before = copy.deepcopy(model.state_dict())
    for progress in (1e-6, 0.5, 1.0):
        model.update_teacher(progress)
        for name, weight in model.state_dict().items():
            if name not in ("tau", "beta"):  # the d-VAE's schedules
                torch.testing.assert_close(weight, before[name], atol=1e-7, rtol=1e-6)
