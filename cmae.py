"""CMAE: contrastive masked autoencoders are stronger vision learners (Huang et al., arXiv 2207.13532v3).

In a sentence: a masked autoencoder whose encoder must also, through a small feature decoder that fills in the masked
patches' features, recognise its own image among the batch, as a momentum encoder sees it whole and slightly shifted.

    online:  I_s ─ mask ─ encoder ─┬─ pixel decoder ──────────────────────────── L_r  (Eq. 5)
                                   └─ feature decoder ─ mean ─ projector ─ predictor ─┐
    target:  I_t ─ momentum encoder ─ mean ─ momentum projector (no gradient) ─────── L_c  (Eq. 7)

The released code multiplies L_c by 2τ = 0.14, which the paper does not say. The paper's recipe, the default here, thus
weighs L_c 7.1 times as strongly as the released code; `--official-scale` follows the code. The demo recipe sets it.

Changes from mae.py: two views of a larger crop, the feature decoder, the two heads, the momentum branch, L_c.

    question         | paper             | official code                   | here (flag)
    ---------------- | ----------------- | ------------------------------- | -------------------------------------------
    weight of L_c    | 1 (Table 4d)      | 2τ λ_c = 0.14                   | the paper's (the code's: --official-scale)
    mask             | §4.1: as MAE's    | 65 %, squares of 2 x 2 patches  | the paper's (--mask-ratio, --mask-cell)
    last target norm | as online's, §3.1 | none                            | kept (--no-target-norm)
    target colours   | jitter, grey §3.2 | also blur; grey: R, B swapped   | no blur (--target-blur 0.5)
    feature output   | as F_t's features | a patch's 768 values            | as wide as the encoder
    layers of heads  | not said (§3.3)   | Linear, BN, ReLU, Linear        | the same (--projector-width, -out)
    initial heads    | not said          | PyTorch's: deviation .021, .015 | MAE's: .029, .033 (projector's two layers)
    class token      | not said          | in every part, but in no mean   | the same
    weight decay     | .05               | of BN scales, of no tokens      | of tokens (--no-decay cls_token mask_token)
    shared decoder   | tried (Table 4c)  | none                            | its embedding, mask token and first blocks
    shifts           | 0-31 pixels       | 0-31 of 224 pixels              | in proportion: 0-8 of 64 pixels
    size of CMAE*    | a ViT's (§4.1)    | has no CMAE*                    | 89.1 M, ViT-B 85.6 M (--stem conv)

Slips of the paper: §3.2 once calls the online view I_t; Eq. (4) lacks its index i, Eq. (5) the mean over pixels.
The rows of Table 4, from the top, as we read it: row 2 of 4a may mask its target too, row 1 of 4b may be MAE (82.9).
    4a: `--method mae`; `--no-pixel-shift --feature-decoder-depth 0`; `--feature-decoder-depth 0`; the defaults
    4b: `--no-target-color --shift-range 0`; `--no-target-color --no-pixel-shift`; `--no-target-color`; the defaults
What the official code calls small is `--model base --depth 8 --heads 8 --mlp-ratio 3`.
With λ_c = 0 it "degenerates to the baseline MAE" (§4.4), but still sees the corner of a larger master image here.

    python train.py --method cmae    torchrun --nproc_per_node=8 train.py --method cmae --data tiny-imagenet --download

Measured: ten classes of Tiny-ImageNet, in docs/results.md; ImageNet: not run.
"""

import copy
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

import mae
from common import Head, Mask, ViT, ema_update, info_nce, pair, random_mask, reconstruction_loss, visible_count
from inputs import augment
from runtime.errors import InputError
from runtime.knobs import Count, Part, Positive, Share, Size, Weight, check
from runtime.reconstruction_pictures import picture_rows


@dataclass(frozen=True)
class Config:
    mask_ratio: Share = 0.75  # share of patches hidden from the online encoder (official code: 0.65)
    mask_cell: Size = 1  # either mask hides squares of this many patches a side (official code: 2)
    decoder_width: Size = 512  # of both decoders
    decoder_depth: Count = 8  # blocks of the pixel decoder
    decoder_heads: Size = 16  # of both decoders
    norm_pixels: bool = True  # predict each patch standardised by its own mean and variance (§3.3)
    crop_scale: Part = 0.2  # smallest share of the image's area that the master crop keeps
    pixel_shift: bool = True  # both views from one master image; without: two random crops (Table 4a, 4b, 6)
    shift_range: str = "0-31"  # shifts of the target view, in pixels at 224, scaled to the image (Table 6)
    target_color: bool = True  # colour jitter and greyscale, on the target view only (Table 4b)
    target_blur: Share = 0.0  # probability of Gaussian blur on the target view (official code: 0.5)
    target_mask_ratio: Share = 0.0  # share of patches hidden from the momentum encoder (Table 4e)
    target_norm: bool = True  # the momentum encoder ends with its final norm (official code: without)
    feature_decoder_depth: Count = 2  # blocks; 0 contrasts the mean of the visible latents (Table 4a, 4c)
    share_decoder: bool = False  # the feature decoder shares the pixel decoder's weights (Table 4c)
    projector_width: Count = 0  # hidden width of both heads; 0 is twice the encoder's (official code: 1536 for 768)
    projector_out: Size = 256  # dimensions of the contrasted vectors (as in the official code)
    contrast: Literal["infonce", "byol"] = "infonce"  # Eq. (7), or "byol": positives alone (§3.3, §4.4)
    tau: Positive = 0.07  # temperature of Eq. (7)
    lambda_c: Weight = 1.0  # weight of L_c in Eq. (8) (Table 4d); 0: no second branch (§4.4)
    official_scale: bool = False  # L_c, BYOL's too, times 2τ, as the official code scales InfoNCE
    momentum: Share = 0.996  # μ of the momentum encoder, fixed (§3.1), and of its projection head (§3.3)
    __post_init__ = check


RECIPES = {
    # §4.1 on ImageNet-1K (§4.2); 300 epochs in the ablations (§4.4), 1600 for the best results (Table 2).
    "paper": mae.RECIPES["paper"] | dict(epochs=300),
    "tiny": mae.RECIPES["tiny"],
    # A step takes twice MAE's time. In so short a run L_c at its full weight leaves L_r a little higher.
    "demo": mae.RECIPES["demo"] | dict(epochs=12, batch_size=64, lr=1.5e-3, official_scale=True),
}


class Batch(NamedTuple):
    images: Tensor  # (B, 3, H, W) the online view I_s, normalised
    mask: Mask
    target_images: Tensor | None  # (B, 3, H, W) the target view I_t, normalised; None if nothing is contrasted
    target_mask: Mask | None  # what the momentum encoder does not see (Table 4e); None: it sees everything


def shift_bounds(shift_range: str, size: int) -> tuple[int, int]:
    """Pixels at 224, as "a-b" or "b" for "0-b" → (low, p) at `size`, p being §3.2's, not a patch's side.

    Shifts r are low ≤ r < p, in a master image that is size + p wide; p = 0: no shift at all.
    """
    try:
        low, high = [int(n) for n in shift_range.split("-")] if "-" in shift_range else (0, int(shift_range))
    except ValueError:
        raise InputError(f"shift range {shift_range!r}: not a range; give one like 0-31") from None
    if not 0 <= low <= high:
        raise InputError(f"shift range {shift_range!r}: must rise from 0 or more; give one like 0-31")
    if high == 0:
        return 0, 0
    p = max(1, round((high + 1) * size / 224))
    return min(round(low * size / 224), p - 1), p


class CMAE(nn.Module):
    Config, RECIPES = Config, RECIPES

    def __init__(self, encoder: ViT, config: Config):
        super().__init__()
        c, D = config, encoder.width
        for ratio in {c.mask_ratio, c.target_mask_ratio or c.mask_ratio}:
            visible_count(encoder.grid, ratio, c.mask_cell)  # says at once if nothing would be left
        if c.share_decoder and not 0 < c.feature_decoder_depth <= c.decoder_depth:
            n, most = c.feature_decoder_depth, c.decoder_depth
            raise InputError(f"feature decoder of {n} blocks: cannot share the pixel decoder's; give 1 to {most}")
        self.config, self.encoder = c, encoder
        self.shifts = shift_bounds(c.shift_range, min(pair(encoder.image_size)))
        # G_p and, below, G_f of §3.1: the same structure, weights of their own.
        P = 3 * encoder.patch_size**2
        self.decoder = mae.Decoder(encoder, c.decoder_width, c.decoder_depth, c.decoder_heads, P)
        if c.lambda_c == 0:
            return  # MAE
        if c.feature_decoder_depth:
            self.feature_decoder = mae.Decoder(encoder, c.decoder_width, c.feature_decoder_depth, c.decoder_heads, D)
            # A vector added to every image's feature vanishes in the projector's batch norm, so these have no gradient.
            self.feature_decoder.norm.bias.requires_grad_(False)
            self.feature_decoder.predict.bias.requires_grad_(False)
            if c.share_decoder:
                self.feature_decoder.embed = self.decoder.embed
                self.feature_decoder.mask_token = self.decoder.mask_token
                self.feature_decoder.blocks = self.decoder.blocks[: c.feature_decoder_depth]
        self.projector = Head(D, c.projector_width or 2 * D, c.projector_out)
        self.predictor = Head(c.projector_out, c.projector_width or 2 * D, c.projector_out)
        self.momentum_encoder = copy.deepcopy(encoder).requires_grad_(False)  # F_t
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)  # H_t

    def draw(self, images, index, rng) -> Batch:
        """uint8 images → the two views of §3.2 and the online branch's mask."""
        c, (H, W), (_, p) = self.config, pair(self.encoder.image_size), self.shifts
        boxes, flips = augment.crop_boxes(rng, augment.sizes(images), scale=(c.crop_scale, 1.0)), rng.chance(0.5)
        master = augment.crop_resize(images, boxes, (H + p, W + p) if c.pixel_shift else (H, W), hflip=flips)
        view = augment.normalize(master[:, :, :H, :W])  # always the same corner
        target = self.draw_target(images, master, rng) if c.lambda_c else None
        mask, target_mask = random_mask(rng, self.encoder.grid, c.mask_ratio, c.mask_cell), None
        if c.lambda_c and c.target_mask_ratio:
            target_mask = random_mask(rng, self.encoder.grid, c.target_mask_ratio, c.mask_cell)
        return Batch(view, mask, target, target_mask)

    def draw_target(self, images, master: Tensor, rng) -> Tensor:
        """I_t: the master image (B, 3, H + p, W + p) shifted, or another crop, in other colours. → (B, 3, H, W)"""
        c, size, (low, p) = self.config, self.encoder.image_size, self.shifts
        if c.pixel_shift:
            target = augment.shift_crop(master, rng.integers(low, max(p, 1), 2), size)
        else:
            boxes = augment.crop_boxes(rng, augment.sizes(images), scale=(c.crop_scale, 1.0))
            target = augment.crop_resize(images, boxes, size, hflip=rng.chance(0.5))
        if c.target_color:
            target = augment.color_jitter(target, *augment.draw_color_jitter(rng, 0.4, 0.4, 0.4, 0.1, probability=0.8))
            target = augment.grayscale(target, rng.chance(0.2))
        if c.target_blur:
            sigma = augment.on_host(rng).uniform(low=0.1, high=2.0) * min(target.shape[2:]) / 224  # pixels
            target = augment.gaussian_blur(target, sigma, rng.chance(c.target_blur))
        return augment.normalize(target)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        z_s = self.encoder(batch.images, batch.mask.visible)  # z_s^v, Eq. (1): (B, 1 + V, D)
        y_m = self.decoder(z_s, batch.mask)  # y'_m, Eq. (3): (B, M, P)
        pixels = mae.masked_pixels(batch.images, batch.mask, self.encoder.patch_size, self.config.norm_pixels)
        l_r = reconstruction_loss(y_m, pixels)  # Eq. (5)
        if self.config.lambda_c == 0:
            return {"loss": l_r}
        with torch.no_grad():  # the target branch
            z_t = self.target_feature(batch.target_images, batch.target_mask)  # Eq. (2): (B, D)
            z_p = self.momentum_projector(z_t)  # z_t^p: (B, d), d = projector_out
        y_s = self.online_feature(z_s, batch.mask)  # Eq. (4): (B, D)
        y_p = self.predictor(self.projector(y_s))  # y_s^p: (B, d)
        l_c = self.contrast(y_p, z_p)  # Eq. (6), (7); K is the batch of all ranks
        return {"loss": l_r + self.config.lambda_c * l_c, "reconstruction": l_r, "contrast": l_c}  # Eq. (8)

    def online_feature(self, latents: Tensor, mask: Mask) -> Tensor:
        """y_s, Eq. (4): the mean over all N outputs of the feature decoder. (B, 1 + V, D) → (B, D)."""
        if not self.config.feature_decoder_depth:
            return latents[:, 1:].mean(dim=1)
        # The output layer is linear, so it commutes with the mean: one multiplication per image instead of N.
        return self.feature_decoder.predict(self.feature_decoder.features(latents, mask).mean(dim=1))

    def target_feature(self, images: Tensor, mask: Mask | None) -> Tensor:
        """z_t, Eq. (2): the mean over the momentum encoder's outputs. (B, 3, H, W) → (B, D)."""
        return self.momentum_encoder(images, mask and mask.visible, norm=self.config.target_norm)[:, 1:].mean(dim=1)

    def contrast(self, y_p: Tensor, z_p: Tensor) -> Tensor:
        """L_c: y_s^p looks for its z_t^p. Asymmetric (§3.3): the views never swap branches. (B, d), (B, d) → scalar."""
        c = self.config
        loss = info_nce(y_p, z_p, c.tau) if c.contrast == "infonce" else byol_loss(y_p, z_p)
        return 2 * c.tau * loss if c.official_scale else loss

    def update_teacher(self, progress: float) -> None:
        """θ_t ← μ θ_t + (1 - μ) θ_s (§3.1), for the encoder and, as §3.3 says, the projection head."""
        if self.config.lambda_c:
            ema_update(self.momentum_encoder, self.encoder, self.config.momentum)
            ema_update(self.momentum_projector, self.projector, self.config.momentum)

    @torch.no_grad()
    def picture(self, batch: Batch) -> Tensor:
        """(rows, B, 3, H, W) in [0, 1]: originals, what the encoder saw, reconstructions, any target views."""
        predicted = self.decoder(self.encoder(batch.images, batch.mask.visible), batch.mask)
        more = [] if batch.target_images is None else [batch.target_images]
        return picture_rows(batch.images, batch.mask, predicted, self.encoder, self.config.norm_pixels, *more)


def byol_loss(y: Tensor, z: Tensor) -> Tensor:
    """2 - 2ρ⁺, the squared distance of the normalised positive pairs (§3.3 names the loss, BYOL writes it)."""
    return (2 - 2 * torch.cosine_similarity(y.float(), z.float(), dim=-1)).mean()
