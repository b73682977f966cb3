"""What all methods share: patches and targets, masks, a plain ViT, heads, contrast, the teacher's EMA, a schedule.

Shapes, here and in every method file:

    B  images on this rank       N  patches of an image      D  width of the encoder
    V  visible patches           M  masked patches, V+M=N    P  values of a patch, 3·p·p
    p  side of a patch           h, w  patches down, across

Polarity, stated once: a mask *hides*. `Mask.visible` are the patches an encoder may see, `Mask.masked` those it may
not; both hold indices into the grid read row by row, and side by side they are a permutation of 0 … N-1.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.errors import InputError
from runtime.fast_paths import Linear, attend, linear, take, upload, written
from runtime.randomness import StepRandom
from runtime.ranks import gather_over_ranks, rank, sum_over_ranks, world_size

# ImageNet's channel statistics, by which images are normalised unless an encoder has its own.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# (width D, blocks, heads); tiny to large are the ViT and DeiT papers' sizes, nano is ours, for two CPU cores.
SIZES = dict(nano=(128, 4, 4), tiny=(192, 12, 3), small=(384, 12, 6), base=(768, 12, 12), large=(1024, 24, 16))


# ---------------------------------------------------------------------------------------------- patches and targets


def pair(size) -> tuple[int, int]:
    """An int for a square, or (height, width), as (height, width)."""
    return (size, size) if isinstance(size, int) else tuple(size)


def patchify(images: Tensor, p: int) -> Tensor:
    """(B, 3, H, W) → (B, N, P): patches in raster order, values in the order row, column, channel (as in MAE)."""
    B, C, H, W = images.shape
    if H % p or W % p:
        raise InputError(f"image size {H}x{W} is not divisible by patch size {p}")
    rows = images.permute(0, 2, 3, 1).reshape(B, H // p, p, W // p, p * C)  # in this order whole rows are copied
    return rows.transpose(2, 3).reshape(B, (H // p) * (W // p), p * p * C)


def unpatchify(patches: Tensor, p: int, grid: tuple[int, int]) -> Tensor:
    """(B, N, P) → (B, 3, H, W), the inverse of `patchify`; `grid` is (h, w), in patches."""
    h, w = grid
    x = patches.reshape(len(patches), h, w, p, p, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, h * p, w * p)


def normalize_patches(patches: Tensor, eps: float = 1e-6) -> Tensor:
    """MAE's per-patch normalised target, t̂ = (t - mean) / √(var + eps); the variance divides by P-1, as torch's."""
    P = patches.shape[-1]
    unbiased = (P - 1) / P  # layer norm divides by P, but is eight times as fast as torch.var_mean
    return F.layer_norm(written(patches.float()), (P,), eps=eps * unbiased) * math.sqrt(unbiased)


def reconstruction_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over the masked patches, both (B, M, P): MAE's; as means, Eq. (5) of CMAE, (1) of LC-MAE."""
    return F.mse_loss(predicted.float(), target.float())


# ------------------------------------------------------------------------------------------------------------ masks


class Mask(NamedTuple):
    visible: Tensor  # (B, V) int64
    masked: Tensor  # (B, M) int64

    def order(self) -> Tensor:
        """(B, N): the visible patches, then the masked ones."""
        return torch.cat([self.visible, self.masked], dim=1)

    def hidden(self) -> Tensor:
        """(B, N) bool in raster order, True where a patch is masked."""
        return torch.zeros_like(self.order(), dtype=torch.bool).scatter(1, self.masked, True)


def restore(visible: Tensor, masked: Tensor, mask: Mask) -> Tensor:
    """(B, V, D) and (B, M, D) → (B, N, D) in raster order."""
    x = torch.cat([visible, masked], dim=1)
    return torch.empty_like(x).scatter(1, mask.order()[:, :, None].expand_as(x), x)


def visible_count(grid: tuple[int, int], ratio: float, cell: int = 1) -> int:
    """Patches in the ⌊n(1-ratio)⌋ of n cells that stay visible, as in MAE; both sides must keep at least one."""
    if cell < 1 or any(side % cell for side in grid):
        raise InputError(f"mask cell {cell}: must divide the sides of {grid} patches; 1 always does")
    n = math.prod(grid) // cell**2
    keep = int(n * (1 - ratio) + 1e-9)  # the epsilon: 10 · (1 - 0.9) is 0.99… in floating point
    if not 0 < keep < n:
        left = "visible" if keep <= 0 else "masked"
        raise InputError(f"mask ratio {ratio:g} leaves none of {n} patches or cells {left}; give one between 0 and 1")
    return keep * cell**2


def split(order: Tensor, keep: int) -> Mask:
    return Mask(order[:, :keep].contiguous(), order[:, keep:].contiguous())


def random_mask(rng: StepRandom, grid: tuple[int, int], ratio: float, cell: int = 1) -> Mask:
    """Hide a uniformly random share `ratio` of cells of `cell` × `cell` patches; the count is exact in every image."""
    keep, (h, w) = visible_count(grid, ratio, cell), grid
    cells = rng.permutation((h // cell) * (w // cell))  # (B, cells)
    if cell == 1:
        return split(cells, keep)
    row, column = cells // (w // cell) * cell, cells % (w // cell) * cell  # of each cell's first patch
    inside = torch.arange(cell, device=cells.device)
    patches = (row[:, :, None, None] + inside[:, None]) * w + column[:, :, None, None] + inside
    return split(patches.flatten(1), keep)


def block_mask(rng: StepRandom, grid: tuple[int, int], count: int, smallest: int = 16, tries: int = 10) -> Mask:
    """BEiT's block-wise mask, continued as in CAE until exactly `count` patches of every image are hidden.

    A block's area is uniform between `smallest` and the number of missing patches, whichever of them is larger; its
    aspect ratio is log-uniform in [0.3, 1/0.3]. A block that is as high or as wide as the grid, or hides nothing new or
    more than is missing, is drawn again. After `tries` failures in a row `smallest` is halved.
    """
    if not (N := math.prod(grid)) > count > 0:
        raise InputError(f"{count} masked patches of {N} leave nothing visible or nothing masked")
    draws = rng.child()  # of its own, since ranks may need different numbers of tries
    B = len(range(rng.total)[rng.rows])  # this rank's images of the global batch
    hidden, missing = np.zeros((B, *grid), dtype=bool), np.full(B, count)
    least, failures, lines = np.full(B, smallest), np.zeros(B, dtype=int), [_lines(side) for side in grid]
    while len(i := missing.nonzero()[0]):  # the images that are not finished
        block = _blocks(draws.uniform(4).numpy()[i].astype(float), lines, least[i], missing[i])
        new = (block & ~hidden[i]).sum((1, 2))
        good = (new > 0) & (new <= missing[i])
        hidden[i[good]] |= block[good]
        missing[i[good]] -= new[good]
        failures[i] = np.where(good, 0, failures[i] + 1)
        least[i] = np.where(~good & (failures[i] % tries == 0), np.maximum(1, least[i] // 2), least[i])
    return Mask(*(upload(torch.as_tensor(np.flatnonzero(x).reshape(B, -1) % N), rng.device) for x in (~hidden, hidden)))


def _lines(side: int) -> np.ndarray:
    """bool (length, first, patch): the patches of a side that a block covers, by its length; none if it covers all."""
    length, first, patch = np.ogrid[: side + 2, :side, :side]
    return (length <= max(1, side - 1)) & (first <= patch) & (patch < first + length)


def _blocks(units: np.ndarray, lines: list[np.ndarray], smallest: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """bool (B, h, w), a block for each row of unit numbers (B, 4); an empty one instead of one that spans the grid."""
    area, aspect = smallest + units[:, 0] * (missing - smallest), 0.3 ** (1 - 2 * units[:, 1])
    inside = []
    for line, length, place in zip(lines, (area * aspect, area / aspect), units.T[2:], strict=True):
        length = np.rint(np.sqrt(length)).clip(1, len(line) - 1).astype(int)
        inside.append(line[length, (place * (len(line) - 1 - length)).astype(int)])
    return inside[0][:, :, None] & inside[1][:, None]


# -------------------------------------------------------------------------------------------------------------- ViT


def sincos_positions(width: int, grid: tuple[int, int]) -> Tensor:
    """(1, 1 + N, D) frozen 2-D sine-cosine positions; row 0, the class token's, is zero.

    As in MAE's code: the first D/2 channels encode the column, the rest the row, each D/4 sines then D/4 cosines with
    frequencies 10000^(-k/(D/4)). CMAE's and CAE's code put the row first, which changes nothing but names.
    """
    if width % 4:
        raise InputError(f"width {width} is not divisible by 4, which sine-cosine positions need")
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(*(torch.arange(s, dtype=torch.float64) for s in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * omega for axis in (column, row)]  # (N, D/4) each
    positions = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), positions])[None].float()


def relative_places(grid: tuple[int, int]) -> Tensor:
    """int64 (1 + N, 1 + N): which row of BEiT's table of relative positions stands for query i and key j.

    One row for each of the (2h-1)(2w-1) offsets between patches, then class to patch, patch to class, class to class.
    """
    h, w = grid
    row, column = (x.flatten() for x in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    down, right = row[:, None] - row + h - 1, column[:, None] - column + w - 1
    offsets = (2 * h - 1) * (2 * w - 1)
    places = F.pad(down * (2 * w - 1) + right, (1, 0, 1, 0), value=offsets)
    places[1:, 0], places[0, 0] = offsets + 1, offsets + 2
    return places


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise InputError(f"width {width} is not divisible by {heads} heads")
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:  # (B, T, D) → (B, T, D)
        B, T, D = x.shape
        # The keys' bias adds one number to all of a query's scores, which softmax ignores: its exact gradient is zero,
        # and cut off here, because Adam would blow the rounding noise in its place up to full steps.
        q_bias, k_bias, v_bias = self.qkv.bias.chunk(3)
        x = linear(x, self.qkv.weight, torch.cat([q_bias, k_bias.detach(), v_bias]))
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in x.chunk(3, dim=2))
        return self.proj(attend(q, k, v, bias).transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    def __init__(self, width: int, value: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), float(value)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Leave out a residual branch of whole images at random, scaling those that stay by 1 / (1 - rate).

    The only draw inside a forward pass. It comes from torch's own generator, which the training loop seeds from
    (seed, step, rank): resuming stays exact, but results depend on the number of processes.
    """
    if rate == 0.0 or not training:
        return x
    keep = torch.rand(x.shape[0], 1, 1, device=x.device) >= rate
    return x * keep.to(x.dtype) / (1 - rate)


class Block(nn.Module):
    """Pre-norm transformer block: x + ls1·attention(norm1 x), then x + ls2·mlp(norm2 x)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4, layer_scale: float = 0, drop_path: float = 0):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn = Attention(width, heads)
        self.mlp = MLP(width, int(width * mlp_ratio))
        self.ls1, self.ls2 = (LayerScale(width, layer_scale) if layer_scale else nn.Identity() for _ in range(2))
        self.drop_path = drop_path

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        x = x + drop_path(self.ls1(self.attn(self.norm1(x), bias)), self.drop_path, self.training)
        return x + drop_path(self.ls2(self.mlp(self.norm2(x))), self.drop_path, self.training)


class PatchEmbed(nn.Module):
    """One linear map per patch, held as timm's convolution kernel. Only the patches asked for are multiplied."""

    def __init__(self, p: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=p, stride=p)

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tensor:  # (B, 3, H, W) → (B, V or N, D)
        patches = patchify(images, self.proj.kernel_size[0])
        if visible is not None:
            patches = take(patches, visible)
        kernel = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # to the order row, column, channel
        return linear(patches, kernel, self.proj.bias)


class ConvEmbed(nn.Module):
    """The convolutional token projection of CMAE* (§4.1); its layers are ours: 3 × 3, stride 2, until a patch is left.

    Overlapping kernels would carry masked pixels into visible tokens, so whatever stands on a masked patch is set to
    zero before each convolution, as in ConvMAE; normalisation is per position, so it cannot carry anything.
    """

    def __init__(self, p: int, width: int):
        super().__init__()
        stages = p.bit_length() - 1
        if p != 2**stages or stages < 1:
            raise InputError(f"the convolutional stem halves the image until a patch is left; {p} is no power of two")
        channels = [3] + [max(8, width >> (stages - i)) for i in range(1, stages)] + [width]
        self.stages = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in itertools.pairwise(channels))
        self.norms = nn.ModuleList(nn.LayerNorm(c, eps=1e-6) for c in channels[1:])
        self.proj = nn.Conv2d(width, width, kernel_size=1)

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        (B, _, H, W), p, seen = images.shape, 2 ** len(self.stages), None
        if visible is not None:
            seen = torch.zeros(B, (H // p) * (W // p), dtype=images.dtype, device=images.device)
            seen = seen.scatter(1, visible, 1.0).reshape(B, 1, H // p, W // p)
        x = images
        for conv, norm in zip(self.stages, self.norms, strict=True):
            x = x if seen is None else x * F.interpolate(seen, size=x.shape[-2:], mode="nearest").to(x.dtype)
            x = F.gelu(norm(conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        x = self.proj(x).flatten(2).transpose(1, 2)  # (B, N, D)
        return x if visible is None else take(x, visible)


class ViT(nn.Module):
    """A plain Vision Transformer with timm's parameter names: class token, fixed positions, final norm.

    `stem` is "linear" (a ViT) or "conv" (CMAE*). `drop_path` grows linearly over the blocks from 0 to its value.
    `positions` are "sincos", or "relative": tokens get none, and a learned table that all blocks share adds to the
    attention of each head a number for every offset between two patches (BEiT's, as in ConMIM's code).
    `mean` and `std` are triples, those by which its images are normalised; None: ImageNet's.
    """

    def __init__(
        self, image_size: int | tuple[int, int] = 64, patch_size: int = 8, width: int = 128, depth: int = 4,
        heads: int = 4, layer_scale: float = 0.0, drop_path: float = 0.0, stem: str = "linear",
        positions: str = "sincos", mean=None, std=None, mlp_ratio: float = 4,
    ):  # fmt: skip
        super().__init__()
        self.settings = dict(
            image_size=image_size, patch_size=patch_size, width=width, depth=depth, heads=heads,
            layer_scale=layer_scale, drop_path=drop_path, stem=stem, positions=positions, mean=mean, std=std,
            mlp_ratio=mlp_ratio,
        )  # fmt: skip
        H, W = pair(image_size)
        if H % patch_size or W % patch_size:
            raise InputError(f"image size {H}x{W} is not divisible by patch size {patch_size}")
        self.width, self.image_size, self.patch_size = width, image_size, patch_size
        self.mean, self.std = mean or MEAN, std or STD
        self.grid = H // patch_size, W // patch_size
        self.patches = self.grid[0] * self.grid[1]
        self.patch_embed = {"linear": PatchEmbed, "conv": ConvEmbed}[stem](patch_size, width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        absolute = {"sincos": True, "relative": False}[positions]
        fixed = sincos_positions(width, self.grid)
        self.register_buffer("pos_embed", fixed if absolute else torch.zeros_like(fixed))  # (1, 1 + N, D)
        self.relative_table = None
        if not absolute:
            self.register_buffer("relative_places", relative_places(self.grid), persistent=False)
            self.relative_table = nn.Parameter(torch.zeros(math.prod(2 * side - 1 for side in self.grid) + 3, heads))
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, layer_scale, rate) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        initialize(self)

    def embed(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) → (B, N, D) patch embeddings with positions, or the (B, V) chosen ones: (B, V, D)."""
        tokens, positions = self.patch_embed(images, visible), self.pos_embed[:, 1:]
        return tokens + (positions if visible is None else positions[0][visible])

    def relative_bias(self, visible: Tensor | None = None) -> Tensor | None:
        """(1, heads, 1 + N, 1 + N) for all queries and keys, (B, heads, 1 + V, 1 + V) for the `visible` (B, V)."""
        if self.relative_table is None:
            return None
        places = self.relative_places[None]
        if visible is not None:
            tokens = F.pad(visible + 1, (1, 0))  # (B, 1 + V), the class token is token 0
            places = self.relative_places[tokens[:, :, None], tokens[:, None, :]]
        return self.relative_table[places].permute(0, 3, 1, 2).contiguous()  # as fused attention needs it

    def encode(self, tokens: Tensor, norm: bool = True, visible: Tensor | None = None) -> Tensor:
        """(B, T, D) embedded patches → (B, 1 + T, D): the class token first, then the patches in their order.

        Relative positions must know which patches these are: the `visible` (B, T), or all in raster order.
        """
        cls = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls.to(tokens.dtype).expand(len(tokens), -1, -1), tokens], dim=1)
        bias = self.relative_bias(visible)
        for block in self.blocks:
            x = block(x, bias)
        return self.norm(x) if norm else x

    def forward(self, images: Tensor, visible: Tensor | None = None, norm: bool = True) -> Tensor:
        """Normalised images (B, 3, H, W) → (B, 1 + N, D); with `visible` (B, V), only those patches: (B, 1 + V, D)."""
        return self.encode(self.embed(images, visible), norm, visible)


def initialize(module: nn.Module) -> None:
    """MAE's initialisation: xavier-uniform matrices (patch kernels flattened to one), zero biases, N(0, .02) tokens."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(part.weight.view(part.weight.shape[0], -1))
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        for name, parameter in part.named_parameters(recurse=False):
            if name.endswith("_token"):
                nn.init.normal_(parameter, std=0.02)


# -------------------------------------------------------------------------------------- heads, contrast, the teacher


class BatchNorm(nn.Module):
    """Batch norm over the rows of all ranks, which `nn.SyncBatchNorm` refuses on CPUs; keeps no running statistics."""

    def __init__(self, width: int, affine: bool = True, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:  # (rows, D) → (rows, D)
        with torch.autocast(x.device.type, enabled=False):
            y = x if x.dtype == torch.float64 else x.float()
            # A picture is drawn by one rank, in evaluation: it must not wait for the others.
            ranks, total = (world_size(), sum_over_ranks) if self.training else (1, nn.Identity())
            n = len(y) * ranks
            y = y - total(y.sum(0)) / n
            variance = total(y.square().sum(0)) / n
            y = y * (variance + self.eps).rsqrt()
            if self.weight is not None:
                y = y * self.weight + self.bias
            return y.to(x.dtype)


class Head(nn.Module):
    """(rows, D) → (rows, out): Linear, BatchNorm, ReLU, Linear. Projection and prediction heads of BYOL's shape."""

    def __init__(self, width: int, hidden: int, out: int):
        super().__init__()
        self.hidden = nn.Linear(width, hidden, bias=False)  # batch norm would remove it
        self.norm = BatchNorm(hidden)
        self.out = nn.Linear(hidden, out, bias=False)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.norm(self.hidden(x))))


def info_nce(queries: Tensor, keys: Tensor, tau: float) -> Tensor:
    """CMAE's Eq. (7), (B, d), (B, d) → scalar: -log(exp(ρ⁺/τ) / Σ_j exp(ρ_j/τ)), averaged over the queries.

    ρ are cosine similarities, Eq. (6) of CMAE. Key b of the same rank is query b's positive; the keys of all other
    images of all ranks are its negatives. Keys carry no gradient.
    """
    with torch.autocast(queries.device.type, enabled=False):
        queries = F.normalize(queries.float(), dim=-1)
        keys = gather_over_ranks(F.normalize(keys.float(), dim=-1))
        if len(keys) == 1:
            raise InputError("one image at a time: a batch of one has no negatives; give a larger --batch-size")
        positives = torch.arange(len(queries), device=queries.device) + rank() * len(queries)
        return F.cross_entropy(queries @ keys.T / tau, positives)


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, mu: float) -> None:
    """θ_t ← μ θ_t + (1 - μ) θ_s for every parameter. Buffers are constants here and need no update."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - mu)


def cosine(start: float, end: float, progress: float) -> float:
    """From `start` at progress 0 to `end` at progress 1 along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
