"""MAE: masked autoencoders are scalable vision learners (He et al., arXiv 2111.06377), the baseline of all the others.

In a sentence: hide three quarters of an image's patches, encode only those that are left, and let a small decoder,
given mask tokens for the missing ones, predict the missing pixels.

Differences from the official code
- The decoder reads visible patches first and masked ones after them, each with its position, instead of putting the
  sequence back in raster order: attention does not see the order, and only the masked patches are predicted.
- Base rate, epochs and normalised targets are those of its published recipe, not the pretraining script's defaults.
- The patch embedding's bias starts at zero as all others do, not at random. Crops are not rounded to grey levels.
Tested equal to Hugging Face's ViTMAEForPreTraining on the same weights and mask: loss, prediction and gradients.

    python train.py --method mae    torchrun --nproc_per_node=8 train.py --method mae --data imagenet --data-root DIR

Measured: ten classes of Tiny-ImageNet, in docs/results.md; ImageNet: not run.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common import (
    Block,
    Linear,
    Mask,
    ViT,
    initialize,
    normalize_patches,
    patchify,
    random_mask,
    reconstruction_loss,
    sincos_positions,
    take,
    visible_count,
)
from inputs import augment
from runtime.knobs import Count, Part, Share, Size, check
from runtime.reconstruction_pictures import picture_rows


@dataclass(frozen=True)
class Config:
    mask_ratio: Share = 0.75  # share of patches hidden (§4, Fig. 5)
    mask_cell: Size = 1  # hide squares of this many patches a side; 1 as in the paper
    decoder_width: Size = 512  # (Table 1b)
    decoder_depth: Count = 8  # blocks (Table 1a)
    decoder_heads: Size = 16  # as in its code
    norm_pixels: bool = True  # predict each patch standardised by its own mean and variance (Table 1d: "w/ norm")
    crop_scale: Part = 0.2  # smallest share of the image's area that a crop keeps, as in its code; 1.0 is the largest
    __post_init__ = check


RECIPES = {
    # Appendix A.1 (Table 8) on ImageNet-1K: 800 epochs as in the paper's ablations, 1600 in its best results. The
    # ablations train ViT-L/16 (`--model large`); ViT-B/16 is what the others here compare themselves with.
    "paper": dict(
        model="base", image_size=224, patch_size=16, epochs=800, warmup_epochs=40, batch_size=4096, base_lr=1.5e-4,
        weight_decay=0.05, betas=(0.9, 0.95),
    ),
    # Tiny-ImageNet at 64 x 64, with a decoder in proportion.
    "tiny": dict(
        model="tiny", image_size=64, patch_size=8, epochs=100, warmup_epochs=10, batch_size=512, base_lr=3e-4,
        weight_decay=0.05, betas=(0.9, 0.95), decoder_width=128, decoder_depth=4, decoder_heads=4,
    ),
    # The built-in images in about two minutes of two CPU cores. Smaller crops would often miss the object.
    "demo": dict(
        model="nano", image_size=64, patch_size=8, epochs=20, warmup_epochs=2, batch_size=128, lr=2e-3,
        weight_decay=0.05, betas=(0.9, 0.95), decoder_width=64, decoder_depth=2, decoder_heads=4, crop_scale=0.5,
        evaluate=True,
    ),
}  # fmt: skip


class Batch(NamedTuple):
    images: Tensor  # (B, 3, H, W), normalised
    mask: Mask


class Decoder(nn.Module):
    """Latents of the visible patches and mask tokens for the others in, one vector per patch out.

    Linear to the decoder's width, mask tokens, positions of its own, transformer blocks, norm, linear to `out` values.
    """

    def __init__(self, encoder: ViT, width: int, depth: int, heads: int, out: int):
        super().__init__()
        self.embed = Linear(encoder.width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.register_buffer("pos_embed", sincos_positions(width, encoder.grid), persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.predict = Linear(width, out)
        initialize(self)

    def features(self, latents: Tensor, mask: Mask) -> Tensor:
        """(B, 1 + V, D) → (B, N, width): visible patches, then masked ones; the class token is dropped."""
        x = self.embed(latents)
        tokens = self.mask_token.to(x.dtype).expand(len(x), mask.masked.shape[1], -1)
        places = self.pos_embed[0, 1:][mask.order()]
        positions = torch.cat([self.pos_embed.expand(len(x), -1, -1)[:, :1], places], dim=1)
        x = torch.cat([x, tokens], dim=1) + positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 1:])

    def forward(self, latents: Tensor, mask: Mask) -> Tensor:
        """(B, 1 + V, D) → (B, M, out): predictions for the masked patches, in the order of `mask.masked`."""
        return self.predict(self.features(latents, mask)[:, mask.visible.shape[1] :])


class MAE(nn.Module):
    Config, RECIPES = Config, RECIPES

    def __init__(self, encoder: ViT, config: Config):
        super().__init__()
        visible_count(encoder.grid, config.mask_ratio, config.mask_cell)  # says at once if nothing would be left
        self.config, self.encoder = config, encoder
        P = 3 * encoder.patch_size**2
        self.decoder = Decoder(encoder, config.decoder_width, config.decoder_depth, config.decoder_heads, P)

    def draw(self, images, index, rng) -> Batch:
        """uint8 images → a random crop, perhaps flipped, and a mask."""
        boxes = augment.crop_boxes(rng, augment.sizes(images), scale=(self.config.crop_scale, 1.0))
        views = augment.crop_resize(images, boxes, self.encoder.image_size, hflip=rng.chance(0.5))
        mask = random_mask(rng, self.encoder.grid, self.config.mask_ratio, self.config.mask_cell)
        return Batch(augment.normalize(views), mask)

    def target(self, batch: Batch) -> Tensor:
        """(B, M, P): the pixels that the decoder should predict."""
        return masked_pixels(batch.images, batch.mask, self.encoder.patch_size, self.config.norm_pixels)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        latents = self.encoder(batch.images, batch.mask.visible)  # (B, 1 + V, D)
        predicted = self.decoder(latents, batch.mask)  # (B, M, P)
        return {"loss": reconstruction_loss(predicted, self.target(batch))}

    @torch.no_grad()
    def picture(self, batch: Batch) -> Tensor:
        """(3, B, 3, H, W) in [0, 1]: the originals, what the encoder saw, what the decoder made of it."""
        predicted = self.decoder(self.encoder(batch.images, batch.mask.visible), batch.mask)
        return picture_rows(batch.images, batch.mask, predicted, self.encoder, self.config.norm_pixels)


def masked_pixels(images: Tensor, mask: Mask, p: int, norm: bool) -> Tensor:
    """(B, 3, H, W) → (B, M, P): the masked patches, each standardised by its own mean and variance if `norm`."""
    patches = take(patchify(images, p), mask.masked)
    return normalize_patches(patches) if norm else patches
