"""The other CMAE: a different paper whose method is also called CMAE, not a loss of cmae.py (arXiv 2205.10546).

"Improvements to Self-Supervised Representation Learning for Masked Image Modeling" in a sentence: a masked autoencoder
whose encoder must also recognise its image in another view and tell where each visible patch lies, on crops
that, after some epochs, are drawn around the object that the encoder itself has found.

    q1 (visible) ─ E ─┬─ decoder ──────────────────────────────────────────────── L_con
                      ├─ two layers ─ place of each patch ─────────────────────── L_loc  (Eq. 4, 5)
                      └───────────────┬─ h1 ─ mean ─ P ─┐
    q2 (masked) ── E ─ stop-gradient ─┘                 ├──────────────────────── L_ctr  (Eq. 2, 3)
    k1, k2 ─────── ME, stop-gradient ─── h2 ─ mean ─ MP ┘

Changes from mae.py: ContrastiveCrop, second view, location task, momentum branch; weaker decoders by `--decoder`.

The paper promises code, and none is known. Where it is silent or unclear, this file reads it so:
- Views: "q2 belongs to the unmasked vector" (§3.3) must mean the masked one. The encoder adds a class token to every
  part; Eq. 2-5 use none of them (§3.4 says so of Eq. 4 alone). The paper names no colours: none change (`--key-color`).
- Eq. 3: P takes the mean over h. It has two layers, and its 128 outputs are L2-normalised. τ = 0.2 is MoCo v2's. The
  momentum, 0.996, is that of cmae.py and stays fixed. x_q is contrasted with x_k, but x_k is not contrasted with x_q.
  The other images of the batch give the negatives z_k-.
- Eq. 4: a GELU stands between the two linear layers.
- Eq. 5: its q is the p of Eq. 4. t is one-hot over all N places, not over rows and columns. There is no softmax. The
  formula is literally a sum over the N places (`--no-location-mean`). At λ_loc = 1 its gradient drowns the two other
  losses, so the default is the mean over places, as PyTorch's MSELoss takes it. E knows where each patch lies, which
  makes the task nearly trivial; with `--withhold-positions` the task gets a second pass of E without positions.
- Heat map: the paper tries two and does not say which it kept. The default is the class token's attention, averaged
  over heads. For `--crop-by features` it is the L1 norm of each token before the final LayerNorm, since after
  LayerNorm ContrastiveCrop's own map, the sum of the channels, is 0 for every patch of a new encoder.
- Crops: the threshold, the schedule and Beta's α are ContrastiveCrop's for small images.
- MLP decoder: the MLP runs across tokens in attention's place, as in MLP-Mixer. An MLP on each patch alone would bring
  nothing from the others to a masked patch. Norms, residuals and the MLP across channels stay.
- Convolutional decoder: likewise; "deep" is read as depth-wise. Hybrid: all layers but the first and last are replaced.
- L_con is MAE's, of x_q's standardised patches. Crop, flip, warm-up, Adam's β: mae.py's; patches of 8: its tiny recipe.

    torchrun --nproc_per_node=8 train.py --method cmae_loc --data tiny-imagenet --download --recipe paper

Measured: ten classes of Tiny-ImageNet, in docs/results.md; the paper's settings: not run.
"""

import copy
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import mae
from common import (
    MLP,
    Mask,
    ViT,
    ema_update,
    info_nce,
    initialize,
    random_mask,
    rank,
    reconstruction_loss,
    restore,
    sum_over_ranks,
    take,
    visible_count,
    world_size,
)
from inputs import augment
from inputs.augment import locate, place_crops
from runtime.errors import InputError
from runtime.knobs import Count, Part, Positive, Share, Size, Weight, check
from runtime.reconstruction_pictures import picture_rows


@dataclass(frozen=True)
class Config:
    mask_ratio: Share = 0.75  # share of patches hidden in each view (§4.2)
    decoder: Literal["transformer", "mlp", "conv", "hybrid-mlp", "hybrid-conv"] = "transformer"  # (§3.5, 2-4)
    decoder_width: Size = 512  # channels of every layer; weaker with 256, 128 or 64 (§3.5, 1)
    decoder_depth: Count = 8  # layers; weaker with fewer, two at a time (§3.5, 1)
    decoder_heads: Size = 16  # of the layers that attend
    norm_pixels: bool = True  # predict each patch standardised by its own mean and variance (MAE's)
    crop_scale: Part = 0.2  # smallest share of the image's area that a crop keeps
    crop_by: Literal["attention", "features", "none"] = "attention"  # ContrastiveCrop's map; none: plain crops (§3.2)
    crop_warmup: Share = 0.2  # share of the run before the boxes are first computed, in whole epochs, at least one
    crop_interval: Part = 0.2  # share of the run between computing the boxes, likewise (ContrastiveCrop: a fifth each)
    crop_threshold: Share = 0.1  # k of Eq. 1, on a heat map stretched to 0 … 1
    crop_alpha: Positive = 0.1  # crop centres: Beta(α, α), below 1 seldom mid-box (ContrastiveCrop on ImageNet: 0.6)
    key_color: bool = False  # colour jitter and greyscale on the second view (not the paper's; strengths of cmae)
    projector_width: Count = 0  # hidden width of P; 0 is the encoder's
    projector_out: Size = 128  # dimensions of the contrasted vectors
    tau: Positive = 0.2  # temperature of Eq. 3
    momentum: Share = 0.996  # share of ME and MP that a step keeps (§3.3 has no number)
    withhold_positions: bool = False  # the location task sees patches without their positions
    location_mean: bool = True  # average the error over the N places; without: add it up over them, as Eq. 5 does
    lambda_ctr: Weight = 1.0  # weight of the contrastive loss in Eq. 6; 0 builds no momentum branch
    lambda_loc: Weight = 1.0  # weight of the location loss in Eq. 6
    lambda_con: Weight = 1.0  # weight of the reconstruction loss in Eq. 6
    __post_init__ = check


RECIPES = {
    # §4.2, on Tiny-ImageNet; MAE's rule makes its base rate of 1e-3 a peak of 2.5e-4 at batch 64. Eq. 5 is averaged.
    "paper": dict(
        model="base", image_size=64, patch_size=8, epochs=300, warmup_epochs=40, batch_size=64, base_lr=1e-3,
        weight_decay=0.05, betas=(0.9, 0.95),
    ),
    "tiny": mae.RECIPES["tiny"],
    "demo": mae.RECIPES["demo"] | dict(batch_size=64, lr=1.5e-3),  # so few epochs need smaller steps, and more of them
}  # fmt: skip


class Batch(NamedTuple):
    images: Tensor  # (B, 3, H, W) x_q, normalised
    mask: Mask  # its q1 (visible) and q2 (masked)
    key_images: Tensor  # (B, 3, H, W) x_k, normalised
    key_mask: Mask  # its k1 and k2


def class_attention(encoder: ViT, images: Tensor) -> Tensor:
    """(B, 3, H, W) → (B, N): what the class token attends to in the last block, averaged over heads."""
    attention, inputs = encoder.blocks[-1].attn, []
    watch = attention.register_forward_pre_hook(lambda _, arguments: inputs.extend(arguments))
    encoder(images)
    watch.remove()
    x, bias = inputs  # (B, 1 + N, D), and the bias of relative positions or None
    q, k, _ = attention.qkv(x).unflatten(2, (3, attention.heads, -1)).permute(2, 0, 3, 1, 4)
    scores = q[:, :, :1] @ k.transpose(2, 3) * q.shape[3] ** -0.5  # (B, heads, 1, 1 + N)
    scores = scores if bias is None else scores + bias[:, :, :1]
    return scores.softmax(dim=3)[:, :, 0, 1:].mean(dim=1)


def feature_norms(encoder: ViT, images: Tensor) -> Tensor:
    """(B, 3, H, W) → (B, N): sums of absolute features of the last block (a ResNet's are never negative)."""
    return encoder(images, norm=False)[:, 1:].abs().sum(dim=2)


HEAT = {"attention": class_attention, "features": feature_norms}


def two_layers(width: int, hidden: int, out: int) -> nn.Sequential:
    """(…, width) → (…, out): linear, GELU, linear. The two MLPs of Eq. 4, and P."""
    layers = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out))
    initialize(layers)
    return layers


class TokenMLP(MLP):
    """An MLP across tokens, the same for every channel, called as attention is: (B, T, D) → (B, T, D)."""

    def __init__(self, tokens: int):
        super().__init__(tokens, 4 * tokens)
        initialize(self)

    def forward(self, x: Tensor, bias: None = None) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class DepthwiseConv(nn.Module):
    """Kernel 3, stride 1, padding 1 over the grid of patches, channel by channel: (B, 1 + N, D) → (B, 1 + N, D)."""

    def __init__(self, width: int, grid: tuple[int, int]):
        super().__init__()
        self.grid = grid
        self.conv = nn.Conv2d(width, width, kernel_size=3, stride=1, padding=1, groups=width)
        nn.init.uniform_(self.conv.weight, -(3**-0.5), 3**-0.5)  # xavier's, as each channel has 9 values in, 9 out
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor, bias: None = None) -> Tensor:  # called as attention is
        patches = x[:, 1:].transpose(1, 2).unflatten(2, self.grid)  # (B, D, h, w)
        patches = self.conv(patches).flatten(2).transpose(1, 2)
        return F.pad(patches, (0, 0, 1, 0))  # nothing is added to the class token


class Decoder(mae.Decoder):
    """mae.py's decoder, in which something weaker may stand in attention's place (§3.5); tokens in raster order."""

    def __init__(self, encoder: ViT, kind: str, width: int, depth: int, heads: int, out: int):
        super().__init__(encoder, width, depth, heads, out)
        if kind == "transformer":
            return
        for block in self.blocks[1:-1] if kind.startswith("hybrid") else self.blocks:
            block.attn = TokenMLP(1 + encoder.patches) if kind.endswith("mlp") else DepthwiseConv(width, encoder.grid)

    def features(self, latents: Tensor, mask: Mask) -> Tensor:
        """(B, 1 + V, D) → (B, N, width): visible patches, then masked ones, though computed in raster order."""
        x = self.embed(latents)
        tokens = self.mask_token.to(x.dtype).expand(len(x), mask.masked.shape[1], -1)
        x = torch.cat([x[:, :1], restore(x[:, 1:], tokens, mask)], dim=1) + self.pos_embed  # (B, 1 + N, width)
        for block in self.blocks:
            x = block(x)
        return take(self.norm(x[:, 1:]), mask.order())


class CMAELoc(nn.Module):
    Config, RECIPES = Config, RECIPES

    def __init__(self, encoder: ViT, config: Config):
        super().__init__()
        c, D = config, encoder.width
        if c.decoder.startswith("hybrid") and c.decoder_depth < 3:
            raise InputError(f"decoder {c.decoder}: has no middle in {c.decoder_depth} layers; give at least 3")
        if c.crop_threshold == 1:  # Eq. 1 asks for M > k, and M ends at 1
            raise InputError("crop threshold 1: no heat map exceeds it; give one from 0 to below 1")
        if c.withhold_positions and encoder.relative_table is not None:
            raise InputError("positions relative: are part of the attention and cannot be withheld; give sincos")
        if not (c.lambda_ctr or c.lambda_loc or c.lambda_con):
            raise InputError("lambda: all three weights are 0, so nothing would be learned; give one above 0")
        visible_count(encoder.grid, c.mask_ratio)  # says at once if nothing would be left
        self.config, self.encoder = c, encoder  # E
        self.boxes = torch.zeros(0, 4)  # of all training images, once computed; on the CPU, where crops are drawn
        if c.lambda_con:
            P = 3 * encoder.patch_size**2
            self.decoder = Decoder(encoder, c.decoder, c.decoder_width, c.decoder_depth, c.decoder_heads, P)
        if c.lambda_loc:
            self.location = two_layers(D, D, encoder.patches)
        if c.lambda_ctr:
            self.projector = two_layers(D, c.projector_width or D, c.projector_out)  # P
            self.momentum_encoder = copy.deepcopy(encoder).requires_grad_(False)  # ME
            self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)  # MP

    def get_extra_state(self) -> Tensor:
        """The boxes go into the checkpoint; no buffer, as their number is not known before the first are computed."""
        return self.boxes

    def set_extra_state(self, boxes: Tensor) -> None:
        self.boxes = boxes.cpu()

    def draw(self, images, index, rng) -> Batch:
        """uint8 images → the two views of §3.3, each with its mask. Index -1: not one of the training set."""
        c, view = self.config, self.draw_view(images, index, rng)
        key_view = self.draw_view(images, index, rng)
        if c.key_color:
            jitter = augment.draw_color_jitter(rng, 0.4, 0.4, 0.4, 0.1, probability=0.8)
            key_view = augment.grayscale(augment.color_jitter(key_view, *jitter), rng.chance(0.2))
        mask, key_mask = (random_mask(rng, self.encoder.grid, c.mask_ratio) for _ in range(2))
        return Batch(augment.normalize(view), mask, augment.normalize(key_view), key_mask)

    def draw_view(self, images, index, rng) -> Tensor:
        """A random crop, around the image's box where it has one, perhaps flipped: (B, 3, H, W) in [0, 1]."""
        c, sizes = self.config, augment.sizes(images)
        crops = augment.crop_boxes(rng, sizes, scale=(c.crop_scale, 1.0))
        beta = augment.on_host(rng).beta(c.crop_alpha, c.crop_alpha, 2)  # in any case: later draws stay the same
        if len(self.boxes):
            index = index.cpu()
            crops = torch.where(index[:, None] < 0, crops, place_crops(crops, sizes, self.boxes[index], beta))
        return augment.crop_resize(images, crops, self.encoder.image_size, hflip=rng.chance(0.5))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        c, losses = self.config, {}
        q1 = self.encoder(batch.images, batch.mask.visible)  # (B, 1 + V, D)
        if c.lambda_ctr:
            z_q = self.projector(self.h1(q1, batch).mean(dim=1))  # (B, d)
            losses["contrast"] = info_nce(z_q, self.z_k(batch), c.tau)  # Eq. 3
        if c.lambda_loc:
            p = self.location(self.place_tokens(q1, batch)[:, 1:])  # Eq. 4: (B, V, N)
            losses["location"] = location_loss(p, batch.mask.visible, c.location_mean)  # Eq. 5
        if c.lambda_con:
            pixels = mae.masked_pixels(batch.images, batch.mask, self.encoder.patch_size, c.norm_pixels)
            losses["reconstruction"] = reconstruction_loss(self.decoder(q1, batch.mask), pixels)
        weights = dict(contrast=c.lambda_ctr, location=c.lambda_loc, reconstruction=c.lambda_con)
        return {"loss": sum(weights[name] * loss for name, loss in losses.items()), **losses}  # Eq. 6

    def h1(self, q1: Tensor, batch: Batch) -> Tensor:
        """restore(concat[q1, detach(q2)]), Eq. 2: all patches of x_q, in raster order. (B, 1 + V, D) → (B, N, D)."""
        with torch.no_grad():
            q2 = self.encoder(batch.images, batch.mask.masked)  # (B, 1 + M, D)
        return restore(q1[:, 1:], q2[:, 1:], batch.mask)

    def h2(self, batch: Batch) -> Tensor:
        """restore(concat[k1, k2]), Eq. 2: all patches of x_k as the momentum encoder sees them. → (B, N, D)."""
        k1, k2 = (self.momentum_encoder(batch.key_images, part)[:, 1:] for part in batch.key_mask)
        return restore(k1, k2, batch.key_mask)

    @torch.no_grad()
    def z_k(self, batch: Batch) -> Tensor:
        """The mean of h2, through MP, all without gradient. → (B, d)."""
        return self.momentum_projector(self.h2(batch).mean(dim=1))

    def place_tokens(self, q1: Tensor, batch: Batch) -> Tensor:
        """What the location task looks at: q1, or the same patches encoded without their positions. (B, 1 + V, D)."""
        if not self.config.withhold_positions:
            return q1
        return self.encoder.encode(self.encoder.patch_embed(batch.images, batch.mask.visible))

    def update_teacher(self, progress: float) -> None:
        """ME and MP follow E and P (§3.3)."""
        if self.config.lambda_ctr:
            ema_update(self.momentum_encoder, self.encoder, self.config.momentum)
            ema_update(self.momentum_projector, self.projector, self.config.momentum)

    def end_epoch(self, done: int, epochs: float, image_set) -> str | None:
        """Computes the boxes after `crop_warmup` of the epochs, then every `crop_interval`, and tells their size."""
        first, every = (max(1, round(share * epochs)) for share in (self.config.crop_warmup, self.config.crop_interval))
        if self.config.crop_by == "none" or done < first or (done - first) % every:
            return None
        self.boxes = self.compute_boxes(image_set)
        area = (self.boxes[:, 2:] - self.boxes[:, :2]).prod(dim=1)  # shares of the image
        return f"boxes for crops after epoch {done}: mean area {area.mean():.2f}"

    @torch.no_grad()
    def compute_boxes(self, image_set, chunk: int = 128) -> Tensor:
        """The box of every image, seen whole, unflipped, without drop path: (images, 4) on the CPU, on every rank.

        The ranks share chunks of images; as these are the same for any number of ranks, so is every box.
        """
        c, e, device = self.config, self.encoder, self.encoder.cls_token.device
        boxes = torch.zeros(len(image_set), 4, device=device)
        chunks = torch.arange(len(image_set)).split(chunk)[rank() :: world_size()]
        training = e.training
        e.eval()
        bar = tqdm(chunks, "boxes", leave=False, disable=rank() > 0, delay=10, mininterval=5)  # on long passes only
        # Boxes lie at the index asked for: at a bad image's stand-in's, two ranks might add theirs up.
        for index, (images, _) in zip(bar, image_set.batches(chunks, device), strict=True):
            whole = torch.as_tensor(augment.sizes(images)).expand(len(images), 2)
            views = augment.crop_resize(images, F.pad(whole, (2, 0)), e.image_size)
            heat = HEAT[c.crop_by](e, augment.normalize(views)).float()  # M: (B, N)
            boxes[index.to(device)] = locate(heat.unflatten(1, e.grid), views.shape[2:], c.crop_threshold)
        e.train(training)
        return sum_over_ranks(boxes).cpu()

    @torch.no_grad()
    def picture(self, batch: Batch) -> Tensor | None:
        """(4, B, 3, H, W) in [0, 1]: originals, what the encoder saw, reconstructions, the second views."""
        if not self.config.lambda_con:
            return None
        predicted = self.decoder(self.encoder(batch.images, batch.mask.visible), batch.mask)
        norm = self.config.norm_pixels
        return picture_rows(batch.images, batch.mask, predicted, self.encoder, norm, batch.key_images)


def location_loss(p: Tensor, visible: Tensor, mean: bool = True) -> Tensor:
    """Eq. 5, ‖p - t‖², or its mean over places, averaged over patches; t is the one-hot place of each patch.

    (B, V, N), (B, V) → scalar.
    """
    error = (p.float() - F.one_hot(visible, p.shape[2])).square()
    return error.mean() if mean else error.sum(dim=2).mean()
