"""common.py: masks, patches, positions, the ViT, losses, heads, EMA, schedules, randomness."""

import copy
import itertools
import math
import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import common
from common import (
    MLP,
    SIZES,
    Attention,
    BatchNorm,
    Block,
    ConvEmbed,
    Head,
    LayerScale,
    Mask,
    StepRandom,
    ViT,
    block_mask,
    cosine,
    drop_path,
    ema_update,
    info_nce,
    initialize,
    normalize_patches,
    patchify,
    random_mask,
    reconstruction_loss,
    relative_places,
    restore,
    sincos_positions,
    unpatchify,
    visible_count,
)
from runtime import fast_paths, ranks
from runtime.errors import InputError
from runtime.fast_paths import attend, linear, take
from runtime.optimization import learning_rate, parameter_groups
from runtime.randomness import epoch_order
from runtime.ranks import gather_over_ranks, rank, sum_over_ranks, world_size

grids = st.tuples(st.integers(1, 9), st.integers(1, 9)).filter(lambda g: g[0] * g[1] >= 2)
ratios = st.floats(0.0, 1.0)


def rng(seed=0, step=0, total=4, rows=None):
    return StepRandom(seed, step, total, rows)


def assert_partition(mask: Mask, n: int):
    assert torch.equal(mask.order().sort(dim=1).values, torch.arange(n).expand_as(mask.order()))


# ------------------------------------------------------------------------------------------------------- randomness


@given(st.integers(0, 2**31), st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 3))
def test_ranks_or_parts_together_draw_what_one_process_draws(seed, step, ranks, share):
    total = ranks * share
    whole, once = rng(seed, step, total), rng(seed, step, total)
    rows = [slice(r * share, (r + 1) * share) for r in range(ranks)]
    processes, parts = [rng(seed, step, total, r) for r in rows], [once.of(r) for r in rows]
    draws = [
        lambda r: r.uniform(3, low=-1.0, high=2.0),
        lambda r: r.integers(3, 9, 4),
        lambda r: r.beta(0.6, 0.6),
        lambda r: r.chance(0.4),
        lambda r: r.permutation(7),
        lambda r: random_mask(r, (4, 4), 0.5).order(),
        lambda r: block_mask(r, (4, 4), 7, smallest=2).order(),
        lambda r: r.uniform(),  # after the block mask, whose number of tries varies from image to image
        lambda r: copy.copy(r).uniform(2),  # as `augment.on_host` does
        lambda r: r.chance(0.4),
    ]
    for draw in draws:
        assert torch.equal(drawn := draw(whole), torch.cat([draw(process) for process in processes]))
        assert torch.equal(drawn, torch.cat([draw(part) for part in parts]))
    assert once.generator.bit_generator.state == whole.generator.bit_generator.state  # nothing was drawn twice


def test_draws_differ_between_steps_seeds_and_images():
    same, step, seed = rng(1, 5).uniform(8), rng(1, 6).uniform(8), rng(2, 5).uniform(8)
    assert torch.equal(same, rng(1, 5).uniform(8))
    assert not torch.equal(same, step) and not torch.equal(same, seed) and not torch.equal(same[0], same[1])
    same, step, seed = (rng(*place).child().uniform(8) for place in ((1, 5), (1, 6), (2, 5)))  # of block masks, say
    assert torch.equal(same, rng(1, 5).child().uniform(8))
    assert not torch.equal(same, step) and not torch.equal(same, seed)


def test_streams_of_neighbouring_seeds_and_steps_share_nothing():
    """62-bit numbers are all different by chance: a stream that is another's, or begins within it, shares some."""
    pairs = list(itertools.product([*range(8), 1000, 2**16, 2**31, 2**32 - 1], range(8)))
    begun = [rng(seed, step, total=50) for seed, step in pairs]
    streams = [one.integers(0, 2**62, 4).flatten().tolist() for one in (*begun, *(one.child() for one in begun))]
    assert len(set().union(*streams)) == 2 * len(pairs) * 200


def test_orders_of_neighbouring_epochs_share_nothing_with_each_other_or_with_a_step():
    """Two permutations of a thousand have one place in common on average; all lags are tried."""
    pairs, n = list(itertools.product(range(4), range(4))), 1000
    orders = [epoch_order(seed, epoch, n) for seed, epoch in pairs]
    orders += [torch.from_numpy(rng(seed, step).generator.permutation(n)) for seed, step in pairs]
    for one, other in itertools.combinations(orders, 2):
        lags = (one.argsort() - other.argsort()) % n  # by how much each image is moved
        assert lags.bincount().max() < 20


def test_draws_have_their_ranges_types_and_rates():
    r = rng(total=20_000)
    u, i, b, c = r.uniform(low=2.0, high=5.0), r.integers(3, 7), r.beta(0.5, 0.5), r.chance(0.2)
    assert u.dtype == torch.float32 and 2 <= u.min() < 2.01 and 4.99 < u.max() <= 5
    assert i.dtype == torch.int64 and set(i.tolist()) == {3, 4, 5, 6}
    assert abs(b.mean() - 0.5) < 0.01 and abs(b.var() - 0.125) < 0.005  # variance of Beta(a, a): 1 / (4 (2a + 1))
    assert c.dtype == torch.bool and abs(c.float().mean() - 0.2) < 0.01
    assert b.dtype == torch.float32


@given(st.integers(0, 99), st.integers(0, 99), st.integers(1, 50))
def test_epoch_order_is_a_permutation_of_its_own(seed, epoch, n):
    order = epoch_order(seed, epoch, n)
    assert torch.equal(order.sort().values, torch.arange(n))
    assert torch.equal(order, epoch_order(seed, epoch, n))


def test_epoch_orders_differ():
    orders = {tuple(epoch_order(seed, epoch, 20).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


# ------------------------------------------------------------------------------------------------------------ ranks


class ThreeRanks:
    """Stands in for torch.distributed: the others hold 10 and 100 times what this rank, the second, has."""

    is_initialized, get_world_size, get_rank = (lambda _: True), (lambda _: 3), (lambda _: 1)

    def all_reduce(self, x):
        x *= 111

    def all_gather(self, parts, x):
        for part, factor in zip(parts, (10, 1, 100), strict=True):
            part.copy_(factor * x)


def test_sums_and_gathers_over_ranks(monkeypatch):
    """Sums go forward and backward, gathers in the order of ranks and without gradient; nothing changes in place."""
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    assert sum_over_ranks(x) is x and torch.equal(gather_over_ranks(x), x) and not gather_over_ranks(x).requires_grad
    assert (world_size(), rank()) == (1, 0)
    monkeypatch.setattr(ranks, "dist", ThreeRanks())
    assert (world_size(), rank()) == (3, 1)
    y, weight = sum_over_ranks(x), torch.tensor([[3.0, 5.0]])
    y.backward(weight)
    assert y.tolist() == [[111, 222]] and x.grad.tolist() == [[333, 555]] and x.tolist() == [[1, 2]]
    assert weight.tolist() == [[3, 5]]
    gathered = gather_over_ranks(x)
    assert gathered.tolist() == [[10, 20], [1, 2], [100, 200]] and not gathered.requires_grad
    monkeypatch.setattr(ThreeRanks, "get_world_size", lambda _: 2)  # two are ranks enough
    assert sum_over_ranks(x).tolist() == [[111, 222]]


# ---------------------------------------------------------------------------------------------- patches and targets


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_patchify_puts_row_column_channel_in_raster_order(B, h, w, p):
    images = torch.randn(B, 3, h * p, w * p)
    patches = patchify(images, p)
    for b, n in [(0, 0), (B - 1, h * w - 1), (0, w - 1)]:
        top, left = n // w * p, n % w * p
        expected = [images[b, c, top + y, left + x] for y in range(p) for x in range(p) for c in range(3)]
        assert patches[b, n].tolist() == [v.item() for v in expected]
    assert torch.equal(unpatchify(patches, p, (h, w)), images)


def test_patchify_refuses_a_size_that_does_not_divide():
    with pytest.raises(InputError, match="30x32 is not divisible by patch size 8"):
        patchify(torch.zeros(1, 3, 30, 32), 8)


def test_normalized_patches_match_a_float64_loop():
    patches = torch.rand(2, 3, 12, dtype=torch.float64)
    patches[1] *= 1e-3  # nearly flat: the epsilon counts
    for b in range(2):
        for i in range(3):
            t = patches[b, i].tolist()
            mean = sum(t) / 12
            variance = sum((v - mean) ** 2 for v in t) / 11  # unbiased
            expected = [(v - mean) / math.sqrt(variance + 1e-6) for v in t]
            assert normalize_patches(patches)[b, i].tolist() == pytest.approx(expected, abs=1e-5)


@given(st.floats(-5, 5), st.floats(0.5, 10))
def test_normalized_patches_ignore_brightness_and_contrast(shift, scale):
    patches = torch.rand(2, 3, 48)
    torch.testing.assert_close(
        normalize_patches(patches * scale + shift), normalize_patches(patches), atol=2e-3, rtol=1e-3
    )


def test_a_flat_patch_has_a_finite_target():
    assert torch.equal(normalize_patches(torch.full((1, 1, 12), 0.7)), torch.zeros(1, 1, 12))


def test_reconstruction_loss_matches_a_float64_loop():
    predicted, target = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    total = 0.0
    for b in range(2):
        for i in range(3):
            total += sum((predicted[b, i, d] - target[b, i, d]).item() ** 2 for d in range(5)) / 5
    assert reconstruction_loss(predicted, target).item() == pytest.approx(total / 6, rel=1e-6)


def test_reconstruction_loss_is_float32_whatever_comes_in():
    low = torch.randn(2, 3, 5).bfloat16()
    assert reconstruction_loss(low, low + 1).dtype == torch.float32


# ------------------------------------------------------------------------------------------------------------ masks


@given(st.integers(2, 400), ratios)
def test_visible_count_is_the_floor_or_refuses(n, ratio):
    exact = n * (1 - ratio)
    if 1 <= exact < n - 1e-6:
        assert visible_count((1, n), ratio) in {math.floor(exact), math.floor(exact + 1e-9)}
    elif exact < 1 - 1e-6:
        with pytest.raises(InputError, match="visible"):
            visible_count((n, 1), ratio)


def test_visible_counts_of_the_papers():
    assert visible_count((14, 14), 0.75) == 49 and visible_count((14, 14), 0.65, 2) == 4 * 17
    assert visible_count((2, 5), 0.9) == 1
    for ratio, left in [(0.0, "masked"), (-1.0, "masked"), (1.0, "visible"), (0.999, "visible")]:
        with pytest.raises(InputError, match=f"mask ratio .* {left}"):
            visible_count((8, 8), ratio)
    with pytest.raises(InputError, match="none of 1 patches or cells masked"):
        visible_count((1, 1), 0.0)


@given(grids, ratios, st.integers(0, 1000), st.integers(1, 3))
def test_random_mask_is_a_partition_with_exact_counts(grid, ratio, seed, cell):
    h, w = grid[0] * cell, grid[1] * cell
    try:
        keep = visible_count(grid, ratio) * cell**2
    except InputError:
        return
    mask = random_mask(rng(seed), (h, w), ratio, cell)
    assert mask.visible.shape == (4, keep) and mask.masked.shape == (4, h * w - keep)
    assert_partition(mask, h * w)
    hidden = mask.hidden()
    assert hidden.shape == (4, h * w) and (hidden.sum(1) == h * w - keep).all()
    assert hidden.gather(1, mask.masked).all() and not hidden.gather(1, mask.visible).any()
    cells = hidden.reshape(4, grid[0], cell, grid[1], cell)
    assert (cells.amax((2, 4)) == cells.amin((2, 4))).all()  # a cell is hidden whole or not at all


@pytest.mark.parametrize("grid, cell", [((7, 8), 2), ((8, 7), 2), ((8, 8), 0)])
def test_random_mask_refuses_cells_that_do_not_fit(grid, cell):
    with pytest.raises(InputError, match=rf"mask cell {cell}: must divide the sides of \({grid[0]}, {grid[1]}\) "):
        random_mask(rng(), grid, 0.5, cell)


@pytest.mark.parametrize("cell", [1, 2])
def test_random_mask_is_uniform_and_independent(cell):
    """Chi-square over positions and over pairs of neighbours: a biased or repeated mask fails."""
    n, draws = 16, 20_000
    hidden = random_mask(rng(7, total=draws), (4 * cell, 4 * cell), 0.75, cell).hidden()
    hidden = hidden.reshape(draws, 4, cell, 4, cell)[:, :, 0, :, 0].flatten(1).double()
    p = 0.75
    z = (hidden.sum(0) - draws * p) / math.sqrt(draws * p * (1 - p))
    # The 16 counts sum to a constant, so Σz²·(n-1)/n is chi-square with 15 degrees of freedom: 99.9 % below 37.7.
    assert (z.square().sum() * (n - 1) / n).item() < 37.7
    together = (hidden[:, :-1] * hidden[:, 1:]).mean(0)  # of two given cells: 12/16 · 11/15
    assert (together - 0.75 * 11 / 15).abs().max() < 0.015
    images = (hidden[:-1] * hidden[1:]).mean()  # of one cell in two images: independent
    assert abs(images - p * p) < 0.005


@given(grids, st.integers(0, 10**6), st.integers(1, 20), st.floats(0.01, 0.99))
def test_block_mask_is_a_partition_with_exact_counts(grid, seed, smallest, share):
    n = grid[0] * grid[1]
    count = min(n - 1, max(1, round(n * share)))
    mask = block_mask(rng(seed, total=2), grid, count, smallest)
    assert mask.masked.shape == (2, count)
    assert_partition(mask, n)
    for indices in mask:
        assert torch.equal(indices, indices.sort(dim=1).values)  # raster order


def plain_block(units, h, w, smallest, missing):
    """The rows and columns of one block, from four unit numbers; None where it would span the grid."""
    area = smallest + units[0] * (missing - smallest)  # `missing` may be the smaller of the two
    aspect = math.exp((2 * units[1] - 1) * math.log(1 / 0.3))
    rows, columns = max(1, round(math.sqrt(area * aspect))), max(1, round(math.sqrt(area / aspect)))
    if rows > max(1, h - 1) or columns > max(1, w - 1):
        return None
    top, left = int(units[2] * (h - rows + 1)), int(units[3] * (w - columns + 1))
    return slice(top, top + rows), slice(left, left + columns)


def plain_block_mask(units, h, w, count, smallest, tries):
    """One image's mask, block after block, as BEiT's generator and CAE's loop around it, from rows of unit numbers."""
    hidden, failures = np.zeros((h, w), dtype=bool), 0
    while missing := count - hidden.sum():
        block = plain_block(next(units), h, w, smallest, missing)
        new = 0 if block is None else hidden[block].size - hidden[block].sum()
        if 0 < new <= missing:
            hidden[block], failures = True, 0
        else:
            failures += 1
            if failures % tries == 0:
                smallest = max(1, smallest // 2)
    return hidden


@given(grids, st.integers(0, 10**6), st.integers(1, 20), st.floats(0.01, 0.99), st.integers(1, 10))
def test_block_masks_are_those_of_a_plain_loop_over_images(grid, seed, smallest, share, tries):
    count = min(math.prod(grid) - 1, max(1, round(math.prod(grid) * share)))
    masks = block_mask(rng(seed), grid, count, smallest, tries).hidden().view(-1, *grid)
    for image, mask in enumerate(masks):
        units = (drawn[image].tolist() for drawn in iter(partial(rng(seed).child().uniform, 4), None))
        assert np.array_equal(mask, plain_block_mask(units, *grid, count, smallest, tries))


def official_mask(draw, h, w, count, smallest):
    """A mask by the official generators of BEiT and CAE, where only a block that spans the grid has no place."""
    hidden = np.zeros((h, w), dtype=bool)
    while missing := count - hidden.sum():
        area = draw.uniform(smallest, missing)  # in either order
        aspect = math.exp(draw.uniform(math.log(0.3), math.log(1 / 0.3)))
        rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if rows < h and columns < w:
            top, left = draw.randint(0, h - rows), draw.randint(0, w - columns)
            block = hidden[top : top + rows, left : left + columns]
            if 0 < block.size - block.sum() <= missing:
                block[:] = True
    return hidden


def shapes(hidden):
    """(n, 3): connected components, patches without a hidden neighbour, length of the border inside the grid."""
    h, w = hidden.shape[1:]
    names = np.pad(np.arange(1, h * w + 1).reshape(h, w) * hidden, ((0, 0), (1, 1), (1, 1)))
    first, before = names[:, 1:-1, 1:-1].copy(), None
    neighbours = [names[:, :-2, 1:-1], names[:, 2:, 1:-1], names[:, 1:-1, :-2], names[:, 1:-1, 2:]]
    alone = (hidden & (np.max(neighbours, axis=0) == 0)).sum((1, 2))
    while not np.array_equal(names, before):  # the greatest name spreads over its component
        before = names.copy()
        names[:, 1:-1, 1:-1] = np.maximum(first, np.max(neighbours, axis=0)) * hidden
    components = (hidden & (names[:, 1:-1, 1:-1] == first)).sum((1, 2))
    border = (hidden[:, 1:] ^ hidden[:, :-1]).sum((1, 2)) + (hidden[:, :, 1:] ^ hidden[:, :, :-1]).sum((1, 2))
    return np.stack([components, alone, border], axis=1).astype(float)


@pytest.mark.parametrize("side,count,smallest", [(14, 98, 16), (8, 32, 5)])
def test_block_masks_have_the_shapes_of_the_official_generators(side, count, smallest, n=2000):
    """Without halving the same distribution; halving after ten failures leaves some more single patches."""
    draw, grid = random.Random(0), (side, side)
    theirs = shapes(np.stack([official_mask(draw, *grid, count, smallest) for _ in range(n)]))
    never, ours = (
        shapes(block_mask(rng(0, total=n), grid, count, smallest, tries).hidden().view(n, *grid).numpy())
        for tries in (10**9, 10)
    )
    z = (never.mean(0) - theirs.mean(0)) / np.sqrt((never.var(0) + theirs.var(0)) / n)
    assert (abs(z) < 4).all()
    assert (abs(ours.mean(0) - theirs.mean(0)) < [0.1, 0.05, 1.5]).all()


def test_block_masks_defaults_are_beits_and_every_image_has_its_own():
    for grid, count in [((14, 14), 98), ((4, 4), 15)]:
        beits = block_mask(rng(), grid, count, smallest=16, tries=10)
        assert torch.equal(block_mask(rng(), grid, count).masked, beits.masked)
    assert len(block_mask(rng(total=200), (14, 14), 98).masked.unique(dim=0)) == 200


def test_block_mask_refuses_to_hide_all_or_nothing():
    for count in (0, 16):
        with pytest.raises(InputError, match="nothing visible or nothing masked"):
            block_mask(rng(), (4, 4), count)


@given(grids, st.integers(0, 1000))
def test_restore_inverts_the_shuffle(grid, seed):
    n = grid[0] * grid[1]
    mask = random_mask(rng(seed), grid, 0.5 if n > 1 else 0)
    tokens = torch.randn(4, n, 3)
    assert torch.equal(restore(take(tokens, mask.visible), take(tokens, mask.masked), mask), tokens)


# -------------------------------------------------------------------------------------------------------------- ViT


@pytest.mark.parametrize("D, h, w", [(12, 3, 5), (48, 1, 500)])
def test_positions_match_a_loop(D, h, w):
    positions = sincos_positions(D, (h, w))[0]
    assert positions[0].tolist() == [0.0] * D
    for y in range(h):
        for x in range(w):
            expected = []
            for place in (x, y):  # the column first
                angles = [place / 10000 ** (k / (D / 4)) for k in range(D // 4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            assert positions[1 + y * w + x].tolist() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(InputError, match="width 10"):
        sincos_positions(10, (2, 2))


@given(st.integers(1, 3), st.sampled_from([5, 300]), st.sampled_from([3, 280]))
def test_attend_matches_scaled_dot_product(heads, queries, keys):
    """In float32, and in bf16 up to its rounding; the gradients too."""
    q, k, v = torch.randn(2, heads, queries, 8), torch.randn(2, heads, keys, 8), torch.randn(2, heads, keys, 8)
    inputs, weights = [x.requires_grad_() for x in (q, k, v)], torch.randn(2, heads, queries, 8)

    def passes(of, dtype):
        y = of(*(x.to(dtype) for x in inputs)).float()
        return y, *torch.autograd.grad((y * weights).sum(), inputs)

    expected = passes(F.scaled_dot_product_attention, torch.float32)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        for ours, theirs in zip(passes(attend, dtype), expected, strict=True):
            assert (ours - theirs).norm() <= bound * theirs.norm()


def test_attend_leaves_all_to_torchs_kernel_but_short_sequences_in_half_precision(monkeypatch):
    taken, kernel = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: taken.append(a) or kernel(*a, **k))
    for queries, keys, dtype, to_kernel in (
        (4, 4, torch.float32, True), (4, 4, torch.float64, True), (4, 4, torch.bfloat16, False),
        (256, 256, torch.bfloat16, False), (256, 257, torch.bfloat16, True),
    ):  # fmt: skip
        taken.clear()
        q, k = torch.randn(1, 1, queries, 8, dtype=dtype), torch.randn(1, 1, keys, 8, dtype=dtype)
        torch.testing.assert_close(attend(q, k, k), kernel(q, k, k), atol=0.05, rtol=0.05)
        assert (len(taken) == 1) == to_kernel
    x = torch.randn(1, 1, 4, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):  # the scores are in bf16 under autocast too
        inside = attend(x, x, x)
    assert torch.equal(inside, attend(x, x, x))


@given(st.sampled_from([5, 300]), st.sampled_from([3, 280]), st.sampled_from([1, 2]))
def test_attend_adds_a_bias_to_the_scores(queries, keys, images):
    q, k, v = torch.randn(2, 3, queries, 8), torch.randn(2, 3, keys, 8), torch.randn(2, 3, keys, 8)
    bias = torch.randn(images, 3, queries, keys)
    expected = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(8) + bias, dim=-1) @ v
    torch.testing.assert_close(attend(q, k, v, bias), expected, atol=1e-5, rtol=1e-4)
    half = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), bias)  # as under autocast
    torch.testing.assert_close(half.float(), expected, atol=0.1, rtol=0.1)


def relative(grid=(2, 3), **settings):
    vit = ViT((8 * grid[0], 8 * grid[1]), 8, 16, 2, 4, positions="relative", **settings)
    assert vit.relative_table.shape == ((2 * grid[0] - 1) * (2 * grid[1] - 1) + 3, 4)
    assert (vit.relative_table == 0).all()
    with torch.no_grad():
        vit.relative_table.normal_()
    return vit


@given(st.integers(1, 4), st.integers(1, 4))
def test_relative_bias_matches_a_loop(h, w):
    vit = relative((h, w))
    bias, n = vit.relative_bias(), (2 * h - 1) * (2 * w - 1)
    assert bias.shape == (1, 4, 1 + h * w, 1 + h * w)
    for i in range(h * w):
        assert torch.equal(bias[0, :, 0, 1 + i], vit.relative_table[n])  # the class token looks at a patch
        assert torch.equal(bias[0, :, 1 + i, 0], vit.relative_table[n + 1])
        for j in range(h * w):
            down, right = i // w - j // w, i % w - j % w
            place = (down + h - 1) * (2 * w - 1) + right + w - 1
            assert torch.equal(bias[0, :, 1 + i, 1 + j], vit.relative_table[place])
    assert torch.equal(bias[0, :, 0, 0], vit.relative_table[n + 2])


def test_relative_places_are_beits():
    beit = pytest.importorskip("transformers.models.beit.modeling_beit").BeitRelativePositionBias
    for grid in ((8, 8), (2, 5)):
        assert torch.equal(relative_places(grid), beit.generate_relative_position_index(grid))


def test_relative_positions_are_all_the_encoder_knows_of_places():
    """Shifting every patch by one place and cutting off the border changes nothing; neither does the table's mean."""
    vit = relative((4, 4))
    images = torch.randn(2, 3, 32, 32)
    assert (vit.pos_embed == 0).all()
    here = torch.tensor([[0, 1, 4, 5]]).expand(2, -1)  # the top left square of four, then one down and right
    torch.testing.assert_close(vit(images.roll((8, 8), (2, 3)), here + 5), vit(images, here), atol=1e-5, rtol=1e-4)
    far = torch.tensor([[0, 1, 4, 15]]).expand(2, -1)
    assert not torch.allclose(vit.encode(vit.embed(images, here), visible=far), vit(images, here), atol=1e-3)
    before = vit(images)
    with torch.no_grad():
        vit.relative_table += 3.0  # the same for every key of a query, which softmax ignores
    torch.testing.assert_close(vit(images), before, atol=1e-5, rtol=1e-4)


def test_relative_bias_serves_every_block_and_any_visible_patches():
    vit = relative((2, 3))
    images, visible = torch.randn(2, 3, 16, 24), torch.tensor([[5, 0, 2], [3, 1, 4]])
    for b in range(2):
        tokens = [0, *(1 + visible[b]).tolist()]
        torch.testing.assert_close(vit.relative_bias(visible)[b], vit.relative_bias()[0][:, tokens][:, :, tokens])
    everything = torch.arange(6).expand(2, -1)
    torch.testing.assert_close(vit(images, everything), vit(images), atol=1e-5, rtol=1e-4)
    x = torch.cat([vit.cls_token.expand(2, -1, -1), vit.patch_embed(images)], dim=1)
    for block in vit.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).reshape(2, 7, 3, 4, 4).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(2, 3) / 2 + vit.relative_bias()
        x = x + block.attn.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 7, 16))
        x = x + block.mlp(block.norm2(x))
    torch.testing.assert_close(vit(images), vit.norm(x), atol=1e-5, rtol=1e-4)
    vit(images).square().sum().backward()
    assert (vit.relative_table.grad.abs().sum(1) > 0).all()
    again = ViT(**vit.settings)
    again.load_state_dict(vit.state_dict())
    assert torch.equal(again(images), vit(images))
    assert "relative_table" in vit.state_dict() and "relative_places" not in vit.state_dict()
    plain = ViT((16, 24), 8, 16, 2, 4)
    assert set(vit.state_dict()) - set(plain.state_dict()) == {"relative_table"} and plain.relative_bias() is None


def test_attention_matches_torch():
    ours, theirs = Attention(24, 3), torch.nn.MultiheadAttention(24, 3, batch_first=True)
    theirs.load_state_dict({
        "in_proj_weight": ours.qkv.weight, "in_proj_bias": ours.qkv.bias,
        "out_proj.weight": ours.proj.weight, "out_proj.bias": ours.proj.bias,
    })  # fmt: skip
    x = torch.randn(2, 7, 24)
    ours.qkv.bias.data.normal_()
    theirs.in_proj_bias.data.copy_(ours.qkv.bias)
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0], atol=1e-5, rtol=1e-4)
    ours(x).square().sum().backward()
    q, k, v = ours.qkv.bias.grad.chunk(3)
    assert (k == 0).all() and (q != 0).all() and (v != 0).all()  # exactly zero, not noise for Adam to blow up
    with pytest.raises(InputError, match="24 is not divisible by 5"):
        Attention(24, 5)


def test_block_is_pre_norm_with_layer_scale():
    block = Block(8, 2, layer_scale=0.3)
    x = torch.randn(2, 5, 8)
    y = x + 0.3 * block.attn(block.norm1(x))
    torch.testing.assert_close(block(x), y + 0.3 * block.mlp(block.norm2(y)))
    assert isinstance(block.ls1, LayerScale) and isinstance(Block(8, 2).ls1, torch.nn.Identity)
    assert MLP(8, 32).fc1.weight.shape == (32, 8) and block.norm1.eps == 1e-6


def test_drop_path_drops_whole_images_and_keeps_the_mean():
    x = torch.ones(4000, 2, 3)
    y = drop_path(x, 0.25, training=True)
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert torch.equal(y.amin((1, 2)), y.amax((1, 2)))
    assert abs(y.mean() - 1) < 0.05
    assert drop_path(x, 0.25, training=False) is x and drop_path(x, 0.0, training=True) is x


def test_drop_path_leaves_out_either_branch_of_a_block_and_none_in_evaluation():
    torch.manual_seed(0)
    x = torch.randn(200, 3, 8)
    for silent in ("attn.proj", "mlp.fc2"):  # one branch adds nothing, so that the other is seen
        block = Block(8, 2, drop_path=0.5)
        for parameter in block.get_submodule(silent).parameters():
            parameter.data.zero_()
        out = (block(x) == x).all(dim=2).all(dim=1)
        assert 60 < out.sum() < 140 and not (block.eval()(x) == x).all(dim=2).any()


@pytest.mark.parametrize("stem", ["linear", "conv"])
def test_all_is_made_where_its_input_is(stem):
    """On torch's device of shapes without numbers, where a tensor of the CPU's is refused as it is beside a GPU's."""
    vit = ViT(32, 8, 32, 1, 4, stem=stem, drop_path=0.5).to("meta")
    images, random = torch.empty(2, 3, 32, 32, device="meta"), StepRandom(0, 0, 2, device="meta")
    for mask in (random_mask(random, (4, 4), 0.5), random_mask(random, (4, 4), 0.5, 2), block_mask(random, (4, 4), 8)):
        assert mask.order().device.type == mask.hidden().device.type == vit(images, mask.visible).device.type == "meta"
    assert drop_path(images.flatten(2), 0.5, training=True).device.type == "meta"


def test_drop_path_grows_linearly_over_the_blocks():
    for depth, rates in [(5, [0, 0.05, 0.1, 0.15, 0.2]), (2, [0, 0.2]), (1, [0])]:
        assert [b.drop_path for b in ViT(depth=depth, drop_path=0.2).blocks] == pytest.approx(rates)


@pytest.mark.parametrize("size,patch", [(32, 8), ((24, 40), 8)])
def test_visible_patches_are_embedded_as_in_the_whole_image(size, patch):
    vit = ViT(size, patch, 32, 2, 4)
    vit.norm.weight.data.normal_()  # else twice the norm would be the norm
    H, W = (size, size) if isinstance(size, int) else size
    images = torch.randn(2, 3, H, W)
    mask = random_mask(rng(total=2), vit.grid, 0.5)
    torch.testing.assert_close(vit.embed(images, mask.visible), take(vit.embed(images), mask.visible))
    torch.testing.assert_close(vit.patch_embed(images), vit.patch_embed.proj(images).flatten(2).transpose(1, 2),
                               atol=1e-5, rtol=1e-4)  # fmt: skip
    order = torch.arange(vit.patches).expand(2, -1)  # everything visible is the plain forward pass
    torch.testing.assert_close(vit(images, order), vit(images), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(vit.norm(vit(images, norm=False)), vit(images))


@pytest.mark.parametrize("stem", ["linear", "conv"])
@given(seed=st.integers(0, 1000), ratio=st.sampled_from([0.25, 0.5, 0.75]))
def test_masked_pixels_never_reach_visible_tokens(stem, seed, ratio):
    vit = ViT(32, 8, 32, 2, 4, stem=stem)
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    mask = random_mask(rng(seed, total=2), vit.grid, ratio)
    vit(images, mask.visible).square().sum().backward()
    leaked = patchify(images.grad, 8).abs().amax(-1)  # (B, N)
    assert (leaked[mask.hidden()] == 0).all() and (leaked[~mask.hidden()] > 0).all()


def test_conv_stem_sees_neighbours_but_only_visible_ones():
    """With everything visible the stem overlaps patches, so that the test above guards something."""
    vit = ViT(32, 8, 32, 1, 4, stem="conv")
    for conv in vit.patch_embed.stages:
        conv.bias.data.normal_()  # without a bias the norm would hide whatever a stage's input is multiplied by
    images = torch.randn(1, 3, 32, 32, requires_grad=True)
    vit.patch_embed(images)[0, 5].sum().backward()
    touched = patchify(images.grad, 8).abs().amax(-1)[0] > 0
    assert touched.nonzero()[:, 0].tolist() == [0, 1, 4, 5]  # 3 x 3 in steps of 2 reach up and to the left
    everything = torch.arange(16)[None]
    torch.testing.assert_close(vit.patch_embed(images, everything), vit.patch_embed(images))
    assert {norm.eps for norm in vit.patch_embed.norms} == {1e-6}
    assert [conv.out_channels for conv in ConvEmbed(16, 32).stages] == [8, 8, 16, 32]  # doubled, but for the first
    assert ViT(4, 2, 32, 1, 4, stem="conv")(torch.randn(1, 3, 4, 4)).shape == (1, 5, 32)  # one stage is the least
    for size, patch in [(36, 12), (4, 1)]:
        with pytest.raises(InputError, match=f"{patch} is no power of two"):
            ViT(size, patch, 32, 1, 4, stem="conv")


def test_encoder_loads_into_timm_and_gives_the_same_features():
    timm = pytest.importorskip("timm")
    for size, settings in [("tiny", {}), ("nano", dict(layer_scale=0.1))]:
        width, depth, heads = SIZES[size]
        ours = ViT(64, 8, width, depth, heads, **settings).eval()
        theirs = timm.models.vision_transformer.VisionTransformer(
            img_size=64, patch_size=8, embed_dim=width, depth=depth, num_heads=heads, num_classes=0,
            init_values=settings.get("layer_scale"),
        ).eval()  # fmt: skip
        theirs.load_state_dict(ours.state_dict(), strict=True)
        images = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(ours(images), theirs.forward_features(images), atol=2e-5, rtol=1e-4)


def test_initialisation_is_maes():
    torch.manual_seed(0)
    vit = ViT(64, 8, 192, 2, 3)
    bound = math.sqrt(6 / (192 + 576))  # xavier over the fused 3D x D matrix
    qkv = vit.blocks[0].attn.qkv
    assert qkv.bias.abs().max() == 0 and 0.97 * bound < qkv.weight.abs().max() <= bound
    bound = math.sqrt(6 / (192 + 192))  # the patch kernel as a D x 3p² matrix
    assert 0.97 * bound < vit.patch_embed.proj.weight.abs().max() <= bound
    assert 0.01 < vit.cls_token.std() < 0.03
    assert "pos_embed" in vit.state_dict() and "pos_embed" not in dict(vit.named_parameters())
    plain = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False))
    initialize(plain)  # a layer without bias is no obstacle


def test_sizes_and_settings():
    assert SIZES["base"] == (768, 12, 12)
    assert (
        sum(p.numel() for p in ViT(224, 16, *SIZES["base"]).parameters()) == 85_798_656 - 197 * 768
    )  # timm's, less pos
    vit = ViT(32, 8, 32, 1, 4, layer_scale=0.1, stem="conv")
    again = ViT(**vit.settings)
    again.load_state_dict(vit.state_dict())
    every = dict(image_size=(16, 24), patch_size=4, width=16, depth=2, heads=2, layer_scale=0.1, drop_path=0.2,
                 mlp_ratio=3, stem="conv", positions="relative", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))  # fmt: skip
    assert ViT(**every).settings == every
    plain = ViT().settings
    assert (plain["width"], plain["depth"], plain["heads"]) == SIZES["nano"]
    for H, W in [(60, 60), (60, 64), (64, 60)]:
        with pytest.raises(InputError, match=f"image size {H}x{W} is not divisible by patch size 8"):
            ViT((H, W), 8)


# ------------------------------------------------------------------------------------------------ heads and contrast


@given(st.integers(2, 9), st.booleans())
def test_batch_norm_matches_torch(n, affine):
    ours, theirs = BatchNorm(5, affine, eps=1e-5), torch.nn.BatchNorm1d(5, eps=1e-5, affine=affine).double()
    if affine:
        with torch.no_grad():
            for norm in (ours, theirs):
                norm.weight.copy_(torch.arange(5) + 1.0)
                norm.bias.copy_(torch.arange(5) - 2.0)
    x = torch.randn(n, 5).double() * 3 + 10  # two that are close have a large gradient, and float32 few digits of it
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.testing.assert_close(ours(a), theirs(b), atol=1e-6, rtol=1e-6)
    weight = torch.randn(n, 5)
    (ours(a) * weight).sum().backward()
    (theirs(b) * weight).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-6)
    assert torch.equal(ours.eval()(x), ours.train()(x))  # always the statistics of the batch


@pytest.mark.parametrize("affine, dtype", [(True, torch.float32), (False, torch.float32), (True, torch.bfloat16)])
def test_batch_norm_of_two_ranks_is_that_of_their_whole_batch(affine, dtype, monkeypatch):
    torch.manual_seed(0)
    norm = BatchNorm(5, affine, eps=0.5)
    if affine:
        with torch.no_grad():
            norm.weight.copy_(torch.arange(5) + 2.0)
            norm.bias.copy_(torch.arange(5) - 2.5)
    x = (torch.randn(8, 5) * 3 + 100).to(dtype)
    whole, other = norm(x.float()), x[4:].float()
    theirs = iter([other.sum(0), (other - x.float().mean(0)).square().sum(0)])
    monkeypatch.setattr(common, "world_size", lambda: 2)
    monkeypatch.setattr(common, "sum_over_ranks", lambda y: y + next(theirs).to(y.dtype))
    mine, rounding = norm(x[:4]), 1e-4 if dtype == torch.float32 else 0.005
    torch.testing.assert_close(mine, whole[:4].to(dtype), atol=rounding, rtol=rounding)


def test_head_is_linear_norm_relu_linear():
    head = Head(6, 10, 4)
    x = torch.randn(5, 6)
    hidden = torch.relu(torch.nn.functional.batch_norm(head.hidden(x), None, None, training=True, eps=1e-6))
    torch.testing.assert_close(head(x), hidden @ head.out.weight.T, atol=1e-5, rtol=1e-4)
    assert head.hidden.bias is None and head.out.bias is None


def naive_info_nce(q, k, tau):
    """Eq. (6) and (7) of CMAE in plain loops."""
    total, n = 0.0, len(q)
    for b in range(n):
        rho = [
            sum(x * y for x, y in zip(q[b], k[c], strict=True))
            / math.sqrt(sum(x * x for x in q[b]))
            / math.sqrt(sum(y * y for y in k[c]))
            for c in range(n)
        ]
        top = max(rho)
        total -= (rho[b] - top) / tau - math.log(sum(math.exp((r - top) / tau) for r in rho))
    return total / n


@given(st.integers(2, 6), st.integers(2, 5), st.sampled_from([0.07, 0.2, 1.0]), st.integers(0, 10**6))
def test_info_nce_matches_the_loop(n, d, tau, seed):
    draw = np.random.default_rng(seed)
    q, k = draw.standard_normal((n, d)), draw.standard_normal((n, d))
    expected = naive_info_nce(q.tolist(), k.tolist(), tau)
    assert info_nce(torch.tensor(q), torch.tensor(k), tau).item() == pytest.approx(expected, abs=1e-4, rel=1e-4)


@given(st.integers(2, 6), st.floats(0.1, 50), st.integers(0, 10**6))
def test_info_nce_ignores_length_and_the_order_of_images(n, scale, seed):
    torch.manual_seed(seed)
    q, k, order = torch.randn(n, 4), torch.randn(n, 4), torch.randperm(n)
    loss = info_nce(q, k, 0.1)
    assert loss >= 0
    torch.testing.assert_close(info_nce(q * scale, k / scale, 0.1), loss, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(info_nce(q[order], k[order], 0.1), loss, atol=1e-4, rtol=1e-4)


def test_info_nce_limits():
    eye = torch.eye(4)
    assert info_nce(eye, eye, 0.01) < 1e-6  # every image finds itself
    assert info_nce(torch.ones(4, 3), torch.ones(4, 3), 0.07).item() == pytest.approx(math.log(4), rel=1e-5)


def test_info_nce_of_two_ranks_is_that_of_their_whole_batch(monkeypatch):
    """A rank's queries look for its own keys, behind those of the ranks before it; every rank's are negatives."""
    torch.manual_seed(0)
    q, k = torch.randn(6, 4), torch.randn(6, 4)
    whole, losses = info_nce(q, k, 0.2), []
    for r in range(2):
        monkeypatch.setattr(common, "rank", lambda r=r: r)
        monkeypatch.setattr(common, "gather_over_ranks", lambda x: F.normalize(k, dim=-1))
        losses.append(info_nce(q[3 * r : 3 * r + 3], k[3 * r : 3 * r + 3], 0.2))
    torch.testing.assert_close(sum(losses) / 2, whole)


def test_info_nce_keys_get_no_gradient_and_queries_do():
    q, k = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    info_nce(q, k, 0.1).backward()
    assert k.grad is None and q.grad.abs().sum() > 0


# ---------------------------------------------------------------------------------------- teacher, schedule, optimizer


@given(st.floats(0, 1), st.integers(1, 12))
def test_ema_has_its_closed_form(mu, n):
    """After n steps toward constant weights θ_s: θ_t = μⁿ θ_0 + (1 - μⁿ) θ_s."""
    teacher, student = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    start = [p.detach().double().clone() for p in teacher.parameters()]
    before = [p.detach().clone() for p in student.parameters()]
    for _ in range(n):
        ema_update(teacher, student, mu)
    for t, s, o in zip(teacher.parameters(), student.parameters(), start, strict=True):
        torch.testing.assert_close(t.double(), mu**n * o + (1 - mu**n) * s.double(), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(p, b) for p, b in zip(student.parameters(), before, strict=True))


def test_ema_fixed_point_and_ends():
    student = torch.nn.Linear(3, 2)
    teacher = torch.nn.Linear(3, 2)
    kept = teacher.weight.clone()
    ema_update(teacher, student, 1.0)
    assert torch.equal(teacher.weight, kept)
    ema_update(teacher, student, 0.0)
    assert torch.equal(teacher.weight, student.weight)
    ema_update(teacher, student, 0.996)
    assert torch.equal(teacher.weight, student.weight)


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(0, 1))
def test_cosine_runs_from_start_to_end(a, b, progress):
    assert cosine(a, b, 0) == pytest.approx(a) and cosine(a, b, 1) == pytest.approx(b)
    assert cosine(a, b, 0.5) == pytest.approx((a + b) / 2)
    assert min(a, b) - 1e-9 <= cosine(a, b, progress) <= max(a, b) + 1e-9


@given(st.integers(1, 50), st.integers(1, 200), st.floats(0, 1e-4))
def test_learning_rate_warms_up_and_decays(warmup, rest, floor):
    steps, peak = warmup + rest, 1e-3
    rates = [learning_rate(t, steps, warmup, peak, floor) for t in range(steps + 1)]
    assert rates[0] == 0 and rates[warmup] == pytest.approx(peak) and rates[-1] == pytest.approx(floor)
    for t in range(warmup):
        assert rates[t] == pytest.approx(peak * t / warmup)
    for t in range(warmup, steps + 1):
        share = (t - warmup) / rest
        assert rates[t] == pytest.approx(floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * share)))
    assert learning_rate(0, 10, 0, peak) == peak  # no warm-up
    assert learning_rate(steps + rest, steps, warmup, peak, floor) == pytest.approx(floor)  # it does not rise again


def test_parameter_groups_are_maes_and_optionally_cmaes():
    vit = ViT(32, 8, 32, 1, 4, layer_scale=0.1)
    names = {id(p): n for n, p in vit.named_parameters()}
    vit.norm.weight.requires_grad_(False)
    decayed, exempt = ({names[id(p)] for p in g["params"]} for g in parameter_groups(vit, 0.05))
    assert [g["weight_decay"] for g in parameter_groups(vit, 0.05)] == [0.05, 0.0]
    assert {"cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= decayed
    assert {"blocks.0.norm1.weight", "blocks.0.ls1.gamma", "blocks.0.mlp.fc1.bias"} <= exempt
    assert not decayed & exempt and decayed | exempt | {"norm.weight"} == set(names.values())
    exempt = {names[id(p)] for p in parameter_groups(vit, 0.05, ("cls_token",))[1]["params"]}
    assert "cls_token" in exempt and "patch_embed.proj.weight" not in exempt
    table = torch.nn.Module()
    table.bias, table.weight = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))  # of whatever shape
    assert [[p is table.bias for p in g["params"]] for g in parameter_groups(table, 0.05)] == [[False], [True]]
    with pytest.raises(InputError, match="no decay 'cls_token,mask_token': no parameter"):
        parameter_groups(vit, 0.05, ("cls_token,mask_token",))


# ---------------------------------------------------------------------------------------- uniform masks, uniform shifts


def chi_squares(hidden):
    """(n, cells) bool, the same count in each row → chi-squares of cells and of pairs of cells, per degree of freedom.

    Of a uniform mask both are near 1: cells hidden equally often, and every two of them together equally often.
    """
    hidden = hidden.double()
    n, K = hidden.shape
    p = hidden.mean().item()
    cells = (hidden.sum(0) - n * p).square().sum() / (n * p * (1 - p)) * (K - 1) / K / (K - 1)
    i, j = torch.triu_indices(K, K, 1)
    both = p * (p * K - 1) / (K - 1)  # the probability that two given cells are hidden
    pairs = ((hidden.T @ hidden)[i, j] - n * both).square().mean() / (n * both * (1 - both))
    return cells.item(), pairs.item()


def looks_uniform(hidden) -> bool:
    """With 15 degrees of freedom a uniform mask is above 2.51 once in a thousand; its pairs, with more, less often."""
    cells, pairs = chi_squares(hidden)
    return cells < 2.51 and pairs < 2.51


def biased_masks(n: int = 4000):
    """Wrong ways to draw half of 16 cells, some of which hide every cell equally often."""
    draw = torch.Generator().manual_seed(0)
    noise = torch.rand(n, 16, generator=draw)
    tilt = torch.linspace(0, 0.1, 16)
    start = torch.randint(0, 16, (n, 1), generator=draw)
    eighth = torch.rand(n // 8, 16, generator=draw)
    order = {
        "later cells a little more often": noise + tilt,
        "the first cell never": noise.index_fill(1, torch.tensor([0]), -1.0),
        "a window that wraps around": ((torch.arange(16) - start) % 16).float(),
        "checkerboards": (torch.arange(16) % 2 + start % 2) % 2 + 0.0,
        "one draw for eight images": eighth.repeat_interleave(8, dim=0),
        "noise of a few grey levels, ties by place": (noise * 4).floor() + torch.arange(16) / 100,
    }
    for name, noise in order.items():
        yield name, torch.zeros(n, 16, dtype=torch.bool).scatter(1, noise.argsort(1, descending=True)[:, :8], True)


def test_masks_pass_a_chi_square_that_biased_ones_fail():
    for seed in range(3):
        assert looks_uniform(random_mask(rng(seed, total=4000), (4, 4), 0.5).hidden())
    for name, hidden in biased_masks():
        assert (hidden.sum(1) == 8).all() and not looks_uniform(hidden), name


def test_masks_of_steps_and_images_are_independent():
    """One cell in two steps, in two images, in two seeds, and in the same row of the next step: all uncorrelated."""
    hidden = torch.stack([
        torch.stack([random_mask(rng(seed, step, 500), (4, 4), 0.5).hidden() for step in range(8)]) for seed in range(3)
    ]).double()  # fmt: skip
    centred = hidden - 0.5  # (seeds, steps, images, cells)
    for other in (centred.roll(1, 0), centred.roll(1, 1), centred.roll(1, 2), centred.roll((1, 1), (1, 2))):
        assert (centred * other).mean().abs() < 0.004  # 192,000 products of ±1/4: three standard deviations are 0.0017
    same = (hidden.roll(1, 1) == hidden).all(-1).double().mean()
    assert same < 0.002  # 1 of 12,870 masks


@given(st.integers(0, 40), st.integers(1, 40), st.integers(0, 10**6))
def test_pixel_shifts_are_uniform_between_their_bounds(low, count, seed):
    """CMAE draws low ≤ r < p for each direction: both ends occur, and nothing beyond them."""
    drawn = rng(seed, total=60 * count).integers(low, low + count, 2)
    assert drawn.min() == low and drawn.max() == low + count - 1
    expected = 60.0
    counts = torch.stack([(drawn[:, axis] - low).bincount(minlength=count) for axis in (0, 1)]).double()
    assert (counts - expected).abs().max() < 6 * math.sqrt(expected)  # per place, six standard deviations


# ------------------------------------------------------------------------------------------------------- fast paths


def test_take_and_patchify_and_their_gradients_equal_indexing_by_hand():
    torch.manual_seed(0)
    x, index = torch.randn(3, 5, 4, requires_grad=True), torch.tensor([[4, 0], [1, 1], [2, 3]])
    g = torch.randn(3, 2, 4)
    (take(x, index) * g).sum().backward()
    expected = torch.zeros_like(x)
    for b in range(3):
        for k in range(2):
            assert torch.equal(take(x, index)[b, k], x[b, index[b, k]])
            expected[b, index[b, k]] += g[b, k]
    torch.testing.assert_close(x.grad, expected)
    images = torch.randn(2, 3, 4, 6)
    patches = patchify(images, 2)
    for b, n, row, column, c in itertools.product(range(2), range(6), range(2), range(2), range(3)):
        value = images[b, c, n // 3 * 2 + row, n % 3 * 2 + column]
        assert patches[b, n, (row * 2 + column) * 3 + c] == value


@pytest.mark.parametrize("convolution", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_a_float64_loop_with_its_gradients(bias, convolution, monkeypatch):
    monkeypatch.setattr(fast_paths, "as_convolution", convolution)
    torch.manual_seed(0)
    layer = common.Linear(7, 6, bias=bias)
    inputs = torch.randn(2, 5, 7, requires_grad=True)
    x, weights = inputs[:, 1:], torch.randn(2, 4, 6)  # x is not contiguous
    y = layer(x)
    (y * weights).sum().backward()
    X, W, G = x.detach().double(), layer.weight.detach().double(), weights.double()
    for b, t in itertools.product(range(2), range(4)):
        for o in range(6):
            exact = sum(X[b, t, i] * W[o, i] for i in range(7)) + (layer.bias[o].double() if bias else 0)
            assert y[b, t, o].item() == pytest.approx(exact.item(), abs=1e-5)
        for i in range(7):
            exact = sum(G[b, t, o] * W[o, i] for o in range(6))
            assert inputs.grad[b, 1 + t, i].item() == pytest.approx(exact.item(), abs=1e-5)
    for o, i in itertools.product(range(6), range(7)):
        exact = sum(G[b, t, o] * X[b, t, i] for b, t in itertools.product(range(2), range(4)))
        assert layer.weight.grad[o, i].item() == pytest.approx(exact.item(), abs=1e-5)
    if bias:
        torch.testing.assert_close(layer.bias.grad, weights.sum(dim=(0, 1)))


@pytest.mark.parametrize("shape", [(2, 4, 7), (4, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_in_bf16_equals_a_float64_loop_with_its_gradients(bias, shape):
    """Small integers, whose sums bf16 holds exactly: that the bias is added after the product changes none."""
    torch.manual_seed(0)
    layer = common.Linear(7, 6, bias=bias)
    for tensor in layer.parameters():
        tensor.data = torch.randint(-2, 3, tensor.shape).float()
    x = torch.randint(-2, 3, shape).float().requires_grad_()
    weights = torch.randint(-2, 3, (*shape[:-1], 6)).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    (y * weights).sum().backward()
    X, W, G = x.detach().flatten(0, -2).double(), layer.weight.detach().double(), weights.flatten(0, -2).double()
    for n, o in itertools.product(range(len(X)), range(6)):
        exact = sum(X[n, i] * W[o, i] for i in range(7)) + (layer.bias[o].double() if bias else 0)
        assert y.flatten(0, -2)[n, o] == exact
    for n, i in itertools.product(range(len(X)), range(7)):
        assert x.grad.flatten(0, -2)[n, i] == sum(G[n, o] * W[o, i] for o in range(6))
    for o, i in itertools.product(range(6), range(7)):
        assert layer.weight.grad[o, i] == sum(G[n, o] * X[n, i] for n in range(len(X)))
    if bias:
        assert torch.equal(layer.bias.grad.double(), G.sum(dim=0))


def test_linear_is_a_convolution_in_float32_alone_where_that_was_chosen(monkeypatch):
    taken, conv2d = [], F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *a: taken.append(a) or conv2d(*a))
    layer, x = common.Linear(4, 3), torch.randn(2, 5, 4)
    monkeypatch.setattr(fast_paths, "as_convolution", False)
    plain = layer(x)
    monkeypatch.setattr(fast_paths, "as_convolution", True)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == linear(x, layer.weight).dtype == torch.bfloat16
    assert linear(x.double(), layer.weight.double()).dtype == torch.float64
    assert layer(x[0]).shape == (5, 3) and not taken
    torch.testing.assert_close(layer(x), plain)
    assert len(taken) == 1
