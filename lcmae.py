"""LC-MAE: masked autoencoders from a local contrastive perspective (Yue et al., arXiv 2310.01994v2).

In a sentence: one masked autoencoder sees an image under two masks, and two properties that the paper's §3.2 derives
from MAE's loss become losses of their own: the two outputs of a patch that is hidden in both views point the same way
(L_cross), and hidden patches get outputs as alike as the patches are (L_in). No line computes the derivation itself.

    x ─┬─ m_1 ─ MAE ─ h ─ projector ─ v ─┬─ L_cross    one MAE, one projector, gradient through both views
       └─ m_2 ─ MAE ─ h ─ projector ─ v ─┘             each view also has L_MAE, of h, and L_in, of v

Changes from mae.py: the second mask, the projector, L_cross, L_in, a decoder of 2 blocks, two other decoders (Table 2).

    question           | paper (no code)           | here (flag)
    ------------------ | ------------------------- | ------------------------------------------------------------------
    h                  | pixels (Eq. 1) or tokens  | the predicted pixels; --project tokens: the decoder's last tokens
    "l2-normalized"    | h, in "the original" MAE  | not h: as in MAE's code, the target is standardised (--norm-pixels)
    Eq. (1)            | a sum; a mean in MAE      | mean over patches and values, then over the views
    projector          | a fully connected layer   | the same, with a bias
    Eq. (5)            | a sum                     | mean over patches masked in both views (none: 0), then over images
    Eq. (6)            | a sum, "mean" in the text | mean over pairs i ≠ j, then over the views
    weights            | 1 (of the sums)           | 1 of the means; as sums L_MAE would start 100,000 times L_cross
    L_MAE and L_in     | L_in in a "single" view   | of both views wherever there are two
    rows (b), (d), (f) | two masks for L_cross     | one view: half the masked images of (a), (c), (e) and (g)
    x in Eq. (6)       | "original image patches"  | the encoder's input, not standardised by patch as L_MAE's target is
    base 6e-4, depth 2 | for LC-MAE (§5, §3.3)     | for all rows of Table 1; (b) may be Table 2's MAE run (both 82.9)
    Gaussian decoder   | about 5 x 5, then an MLP  | of all tokens, masked too; sums to 1 at borders; residual: MLP only
    conv decoder       | kernel 5                  | zeros beyond the border; no residual, no MLP
    these two decoders | replace MAE's             | only its blocks; without the class token
    Table A.1          | one image, 5 epochs       | the first of --data; epochs of 1,281,167 crops, one of warm-up

Rows of Table 1 are weights of 0 and 1. Row (b), `--cross-weight 0 --in-weight 0`, at mae.py's settings gives exactly
mae.py's losses. The other tables are of MAE, at a base rate of 1.5e-4 and batch 1024 (§5), so a peak rate of 6e-4,
with the 8 blocks of Figure 4 (`--recipe paper`; `evaluate.py` then fine-tunes):
      Table 2      --cross-weight 0 --in-weight 0 --lr 6e-4 --decoder-depth 8 (or, for it, --decoder average, conv)
      Table 3      --method autoencoder --block 16 (its recipe; then 48, 80, 112; MAE is Table 2's first command)
      Table A.1    --method mae --batch-size 1024 --images 1 --repeat 1281167 --epochs 5 --warmup-epochs 1
The analyses of attention and features (Eq. 7 and 8, Figures 2 to 6) are in figures/.

    torchrun --nproc_per_node=8 train.py --method lcmae --data tiny-imagenet --download

Measured on ten classes of Tiny-ImageNet (docs/results.md, claims.md); the paper's settings: not run. Deviation of √d v
over images at one place, v of length 1 (1: random directions, 0: all alike; untrained .15): (c), L_cross alone, .00002,
the paper's collapse; (g) .32; (e) .018, which the paper calls no collapse: each value has its target, but only h has.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mae
from common import MLP, Mask, ViT, initialize, patchify, random_mask, reconstruction_loss, restore, take, visible_count
from inputs import augment
from runtime.errors import InputError
from runtime.knobs import Count, Part, Share, Size, Weight, check
from runtime.reconstruction_pictures import picture_rows


@dataclass(frozen=True)
class Config:
    mask_ratio: Share = 0.75  # share of patches hidden in each view (§3.3, §5)
    mask_cell: Size = 1  # hide squares of this many patches a side; 1 as in the paper
    mae_weight: Weight = 1.0  # of L_MAE, Eq. (1); 0 leaves it out (Table 1)
    cross_weight: Weight = 1.0  # of L_cross, Eq. (5) (Table 1); 0 leaves it and the second view out
    in_weight: Weight = 1.0  # of L_in, Eq. (6); 0 leaves it out (Table 1)
    projector_out: Size = 1024  # dimensions of v (§5)
    project: Literal["pixels", "tokens"] = "pixels"  # what the projector reads: h of Eq. (1), or the decoder's tokens
    decoder: Literal["transformer", "average", "conv"] = "transformer"  # or Gaussian and MLP, or convolution
    decoder_width: Size = 512  # as in MAE, of any decoder
    decoder_depth: Count = 2  # blocks of the transformer decoder: 2 for LC-MAE (§3.3), 8 in MAE
    decoder_heads: Size = 16  # of the transformer decoder, as in MAE
    norm_pixels: bool = True  # predict each patch standardised by its own mean and variance
    crop_scale: Part = 0.2  # smallest share of the image's area that a crop keeps, as in MAE
    __post_init__ = check


RECIPES = {
    # §5 (epochs: §3.3), on ImageNet-1K with ViT-B/16; others are MAE's. Peak: 2.4e-3.
    "paper": mae.RECIPES["paper"] | dict(epochs=100, warmup_epochs=20, batch_size=1024, base_lr=6e-4),
    # The projector as much wider than a patch's pixels as in the paper: 256 / 192 = 1024 / 768.
    "tiny": mae.RECIPES["tiny"] | dict(base_lr=6e-4, decoder_depth=2, projector_out=256),
    "demo": mae.RECIPES["demo"] | dict(projector_out=256),
}


class Batch(NamedTuple):
    images: Tensor  # (B, 3, H, W), normalised
    mask: Mask  # m_1
    second: Mask | None  # m_2; None where nothing compares two views


class LCMAE(nn.Module):
    Config, RECIPES = Config, RECIPES

    def __init__(self, encoder: ViT, config: Config):
        super().__init__()
        c, P = config, 3 * encoder.patch_size**2
        self.config, self.encoder = c, encoder
        if not (c.mae_weight or c.cross_weight or c.in_weight):
            raise InputError("weights 0, 0, 0: nothing to learn; give --mae-weight, --cross-weight or --in-weight")
        visible_count(encoder.grid, c.mask_ratio, c.mask_cell)  # says at once if nothing would be left
        if c.decoder == "transformer":
            self.decoder = mae.Decoder(encoder, c.decoder_width, c.decoder_depth, c.decoder_heads, P)
        else:
            self.decoder = LocalDecoder(encoder, c.decoder_width, c.decoder, P)
        if c.cross_weight or c.in_weight:
            self.projector = nn.Linear(P if c.project == "pixels" else c.decoder_width, c.projector_out)
            initialize(self.projector)
            if c.project == "tokens" and not c.mae_weight:
                self.decoder.predict = None  # nobody asks for pixels

    def draw(self, images, index, rng) -> Batch:
        """uint8 images → a random crop, perhaps flipped, and one or two masks of it, drawn independently."""
        c, grid = self.config, self.encoder.grid
        boxes = augment.crop_boxes(rng, augment.sizes(images), scale=(c.crop_scale, 1.0))
        views = augment.normalize(augment.crop_resize(images, boxes, self.encoder.image_size, hflip=rng.chance(0.5)))
        mask = random_mask(rng, grid, c.mask_ratio, c.mask_cell)
        return Batch(views, mask, random_mask(rng, grid, c.mask_ratio, c.mask_cell) if c.cross_weight else None)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        c, p = self.config, self.encoder.patch_size
        images, mask = both_views(batch) if c.cross_weight else (batch.images, batch.mask)  # 2 · B rows with L_cross
        tokens, h = self.decode(images, mask)  # h(x, m): (B, M, P)
        losses = {}
        if c.mae_weight:  # Eq. (1)
            losses["reconstruction"] = reconstruction_loss(h, mae.masked_pixels(images, mask, p, c.norm_pixels))
        if c.cross_weight or c.in_weight:
            v = self.projector(h if c.project == "pixels" else tokens)  # the paper's v = p(h(x, m)): (B, M, d)
        if c.cross_weight:
            losses["cross"] = cross_view_loss(*v.chunk(2), batch.mask, batch.second)
        if c.in_weight:
            losses["in"] = in_view_loss(v, take(patchify(images, p), mask.masked))
        weights = {"reconstruction": c.mae_weight, "cross": c.cross_weight, "in": c.in_weight}
        return {"loss": sum(weights[name] * loss for name, loss in losses.items()), **losses}  # §3.3, overall loss

    def decode(self, images: Tensor, mask: Mask) -> tuple[Tensor, Tensor | None]:
        """The decoder's tokens of the masked patches (B, M, width), and the pixels they predict (B, M, P)."""
        latents = self.encoder(images, mask.visible)  # f(x[1 - m]): (B, 1 + V, D)
        tokens = self.decoder.features(latents, mask)[:, mask.visible.shape[1] :]
        return tokens, self.decoder.predict and self.decoder.predict(tokens)

    @torch.no_grad()
    def picture(self, batch: Batch) -> Tensor | None:
        """(rows, B, 3, H, W) in [0, 1]: originals, then what is seen and what is made of it, for each mask."""
        c, encoder = self.config, self.encoder
        if not c.mae_weight:
            return None  # nothing was taught to be pixels
        rows = [
            picture_rows(batch.images, m, self.decode(batch.images, m)[1], encoder, c.norm_pixels)
            for m in (batch.mask, batch.second)
            if m is not None
        ]
        return torch.cat([rows[0], *(more[1:] for more in rows[1:])])


def both_views(batch: Batch) -> tuple[Tensor, Mask]:
    """The images twice, under m_1 and then under m_2: (2·B, 3, H, W), and a mask of 2·B rows."""
    both = Mask(*(torch.cat(pair) for pair in zip(batch.mask, batch.second, strict=True)))
    return torch.cat([batch.images, batch.images]), both


def cross_view_loss(v: Tensor, w: Tensor, mask: Mask, second: Mask) -> Tensor:
    """Eq. (5), as a mean: 1 - cos(v_i, w_i) over the patches i masked in both views, then over images.

    v, w: (B, M, d), in the order of `mask.masked` and of `second.masked`. The gradient flows into both (§3.3).
    """
    # Unit vectors in their places in the image, zero where a patch is visible: the product of two is the cosine.
    v, w = (F.normalize(x.float(), dim=-1) for x in (v, w))
    v, w = (restore(x.new_zeros(*m.visible.shape, x.shape[2]), x, m) for x, m in ((v, mask), (w, second)))  # (B, N, d)
    both = (mask.hidden() & second.hidden()).float()  # m_1 · m_2: (B, N)
    distance = (1 - (v * w).sum(dim=-1)) * both
    return (distance.sum(dim=1) / both.sum(dim=1).clamp(min=1)).mean()


def in_view_loss(v: Tensor, x: Tensor) -> Tensor:
    """Eq. (6), as a mean: |cos(v_i, v_j) - cos(x_i, x_j)| over the pairs i ≠ j of an image's masked patches.

    v: (B, M, d), x: the input patches (B, M, P). A patch or vector of zeros has the cosine 0 to every other.
    """
    pairs = 1 - torch.eye(v.shape[1], device=v.device)
    difference = (cosine_matrix(v) - cosine_matrix(x)).abs() * pairs
    return difference.sum(dim=(1, 2)).mean() / pairs.sum().clamp(min=1)


def cosine_matrix(x: Tensor) -> Tensor:
    """(B, M, d) → (B, M, M), the cosine between each two of an image's vectors; in float32, as they are subtracted."""
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(x.float(), dim=-1)
        return x @ x.transpose(1, 2)


class LocalDecoder(mae.Decoder):
    """MAE's decoder, its blocks replaced by something that reaches 5 x 5 patches (§4.1, Table 2).

    "average": a fixed Gaussian mean, then the MLP half of a transformer block. "conv": a convolution.
    """

    def __init__(self, encoder: ViT, width: int, kind: str, out: int):
        super().__init__(encoder, width, 0, 1, out)  # no blocks
        self.grid, self.kind = encoder.grid, kind
        if kind == "conv":
            self.conv = nn.Conv2d(width, width, kernel_size=5, padding=2)
            initialize(self.conv)
        else:
            self.register_buffer("weights", gaussian_weights(encoder.grid), persistent=False)
            self.norm1, self.mlp = nn.LayerNorm(width, eps=1e-6), MLP(width, 4 * width)
            initialize(self.mlp)

    def features(self, latents: Tensor, mask: Mask) -> Tensor:
        """(B, 1 + V, D) → (B, N, width): visible patches, then masked ones, as in MAE's."""
        x = self.embed(latents[:, 1:])
        tokens = self.mask_token.to(x.dtype).expand(len(x), mask.masked.shape[1], -1)
        x = restore(x, tokens, mask) + self.pos_embed[:, 1:]  # (B, N, width), raster order
        if self.kind == "conv":
            x = self.conv(x.transpose(1, 2).unflatten(2, self.grid)).flatten(2).transpose(1, 2)
        else:
            x = self.weights @ x
            x = x + self.mlp(self.norm1(x))
        return self.norm(take(x, mask.order()))


def gaussian_weights(grid: tuple[int, int], sigma: float = 1.0, reach: int = 2) -> Tensor:
    """(N, N): row i weighs the patches around patch i by exp(-d²/2σ²), `reach` to each side; each row sums to one."""
    place = torch.cartesian_prod(*(torch.arange(side) for side in grid))  # (N, 2) row and column
    apart = (place[:, None] - place).abs()  # (N, N, 2)
    weights = torch.exp(-apart.square().sum(-1) / (2 * sigma**2)) * (apart <= reach).all(-1)
    return weights / weights.sum(dim=1, keepdim=True)
