"""LC-MAE: the plain autoencoder that it compares MAE with (Yue et al., arXiv 2310.01994v2, §4.2, Figure 7, Table 3).

In a sentence: nothing is hidden; the encoder sees every patch, and for each of them MAE's decoder predicts the block of
pixels around it, from the patch itself up to seven patches a side, so that the block sets how far a token must look.

Changes from mae.py: no mask, a target larger than a patch, the loss on every patch.

    question                    | paper (there is no code)    | here (flag)
    --------------------------- | --------------------------- | ------------------------------------------------------
    pixels beyond the border    | not said                    | no target, and not counted where a block is standardised
    target standardised         | not said (MAE's is)         | yes, each block by its own statistics (--no-norm-pixels)
    decoder                     | not said                    | MAE's 8 blocks, whose mask token stays unused
    base rate, batch, schedule  | of MAE: 1.5e-4, 1024 (§5)   | the same; 100 epochs, as §4.1 and §4.2 give for MAE

The rows of Table 3 are `--block 16`, 48, 80 and 112 under `--recipe paper`, whose patches are 16 pixels wide.

    torchrun --nproc_per_node=8 train.py --method autoencoder --data imagenet --data-root DIR

Measured: ten classes of Tiny-ImageNet, in docs/claims.md (eight points below MAE); the paper's settings: not run.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mae
from common import Mask, ViT, split, unpatchify
from inputs import augment
from mae import Batch
from runtime.errors import InputError
from runtime.knobs import Count, Part, Size, check


@dataclass(frozen=True)
class Config:
    block: Size = 48  # pixels a side of the block that each token predicts (Table 3)
    decoder_width: Size = 512  # as in MAE
    decoder_depth: Count = 8  # blocks, as in MAE
    decoder_heads: Size = 16  # as in MAE
    norm_pixels: bool = True  # predict each block standardised by its own mean and variance
    crop_scale: Part = 0.2  # smallest share of the image's area that a crop keeps
    __post_init__ = check


RECIPES = {
    "paper": mae.RECIPES["paper"] | dict(epochs=100, warmup_epochs=20, batch_size=1024),
    "tiny": mae.RECIPES["tiny"] | dict(block=24),
    "demo": mae.RECIPES["demo"] | dict(block=24),
}


class Autoencoder(nn.Module):
    Config, RECIPES = Config, RECIPES

    def __init__(self, encoder: ViT, config: Config):
        super().__init__()
        c, p = config, encoder.patch_size
        if c.block < p or (c.block - p) % 2:
            raise InputError(f"block {c.block}: cannot be centred on a patch of {p}; give {p}, {p + 2}, {p + 4}, …")
        self.config, self.encoder = c, encoder
        self.decoder = mae.Decoder(encoder, c.decoder_width, c.decoder_depth, c.decoder_heads, 3 * c.block**2)
        self.decoder.mask_token.requires_grad_(False)  # nothing is hidden

    def draw(self, images, index, rng) -> Batch:
        """uint8 images → a random crop, perhaps flipped, and a mask that hides nothing."""
        boxes = augment.crop_boxes(rng, augment.sizes(images), scale=(self.config.crop_scale, 1.0))
        views = augment.normalize(augment.crop_resize(images, boxes, self.encoder.image_size, hflip=rng.chance(0.5)))
        return Batch(views, nothing_hidden(views, self.encoder.patches))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": block_loss(self.predict_blocks(batch), *self.blocks(batch.images))}

    def predict_blocks(self, batch: Batch) -> Tensor:
        """Figure 7: every patch in, for every token a block out. → (B, N, 3·b·b)"""
        return self.decoder.predict(self.decoder.features(self.encoder(batch.images), batch.mask))

    def blocks(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The target (B, N, 3·b·b), and which of its values lie in the image (N, 3·b·b)."""
        blocks, inside = centred_blocks(images, self.encoder.patch_size, self.config.block)
        if self.config.norm_pixels:
            mean, variance = block_statistics(blocks, inside)
            blocks = (blocks - mean) / (variance + 1e-6).sqrt()
        return blocks, inside

    @torch.no_grad()
    def picture(self, batch: Batch) -> Tensor:
        """(2, B, 3, H, W) in [0, 1]: the originals, and of the blocks predicted the patches at their centres."""
        images, p, b = batch.images.float(), self.encoder.patch_size, self.config.block
        made = self.predict_blocks(batch).float()
        if self.config.norm_pixels:  # by the statistics of what the encoder saw, as nothing is hidden
            mean, variance = block_statistics(*centred_blocks(images, p, b))
            made = made * (variance + 1e-6).sqrt() + mean
        centre = slice((b - p) // 2, (b + p) // 2)
        patches = made.unflatten(2, (b, b, 3))[:, :, centre, centre].flatten(2)
        rows = [images, unpatchify(patches, p, self.encoder.grid)]
        return torch.stack([augment.denormalize(x) for x in rows]).clamp(0, 1)


def nothing_hidden(images: Tensor, n: int) -> Mask:
    return split(torch.arange(n, device=images.device).expand(len(images), -1), n)


def centred_blocks(images: Tensor, p: int, b: int) -> tuple[Tensor, Tensor]:
    """(B, 3, H, W) → the b × b pixels around each patch, (B, N, 3·b·b), values in the order row, column, channel.

    Also which of them lie in the image, float (N, 3·b·b); those beyond its border are zero.
    """

    def cut(x: Tensor) -> Tensor:
        x = F.pad(x, [(b - p) // 2] * 4).unfold(2, b, p).unfold(3, b, p)  # (B, 3, h, w, b, b)
        return x.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)

    return cut(images), cut(torch.ones_like(images[:1], dtype=torch.float32))[0]


def block_statistics(blocks: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (B, N, 1) of each block over what lies in the image; the variance divides by n-1, as MAE's."""
    n = inside.sum(dim=-1, keepdim=True)
    mean = (blocks.float() * inside).sum(dim=-1, keepdim=True) / n
    return mean, ((blocks - mean) * inside).square().sum(dim=-1, keepdim=True) / (n - 1)


def block_loss(predicted: Tensor, target: Tensor, inside: Tensor) -> Tensor:
    """Eq. (1) with nothing masked and b × b pixels: the mean over each block's values in the image, then over tokens.

    (B, N, 3·b·b) predicted and target, (N, 3·b·b) inside → scalar.
    """
    error = (predicted.float() - target.float()).square() * inside
    return (error.sum(dim=-1) / inside.sum(dim=-1)).mean()
