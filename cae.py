"""CAE: context autoencoder for self-supervised representation learning (Chen et al., arXiv 2202.03026v2).

In a sentence: from the encoder's latents of the visible patches, a regressor predicts the latents of the masked ones,
aligned with what the same encoder makes of those alone, and a decoder reads the targets off the predicted latents.

    X_v ─ encoder ─ Z_v ─ regressor ─ Z_m ─┬─ decoder ─ Y_m ───────── decoding loss   (Eq. 1)
    X_m ─ encoder ─ Z̄_m ─ stop-gradient ───┴───────────────────────── alignment loss  (Eq. 1, times λ)

    question          | paper                | official code                      | here (flag)
    ----------------- | -------------------- | ---------------------------------- | -----------------------------------
    target            | DALL-E tokens (§2.2) | the same                           | tokens of a d-VAE trained first
    other targets     | App. G.1; Figure 4   | VQGAN, a d-VAE of one's own        | pixels, DALL-E (--target)
    tokenizer's image | the input image      | the same crop, by Lanczos          | the same crop, bicubic
    crop              | "standard"           | keeps 8 to 100 % of the area       | the same (--crop-scale)
    mask              | 98 of 196, in blocks | BEiT's blocks of 16 or more        | the same, in proportion
    kind of positions | not said             | MAE's, in all three parts          | the same
    in the regressor  | for attention, §2.1  | for queries and keys only          | the same
    its residual      | not said             | is itself normalised               | is not (--official-residual)
    class token       | in the encoder, §4.2 | there only                         | the same
    alignment         | Z_m with Z̄_m         | after norms; Z̄_m of this step      | the same
    drop path         | .1                   | each pass draws its own            | the same
    no decoder        | a linear layer, §4.3 | positions and norm stay            | a linear layer (--decoder-depth 0)
    initial weights   | not said             | xavier; kernel, tokens cut at ±.02 | MAE's
    ViT-S, the rest   | not said             | 12 heads; linear and norm, then 768 | (--heads 12); decoder 384 wide
    ViT-L, the rest   | not said             | layer scale 1e-5; BEiT's initial   | (--layer-scale 1e-5); MAE's initial
    clipping, last lr | almost as BEiT's     | 3 and 1e-5                         | the same (demo: 3 and 0)

The d-VAE (dvae.py) stands in for DALL-E's weights, which are not here; in Table 7 a d-VAE is as good for ViT-B. Without
`--tokenizer` it is trained first. The mask tokens see Z_v and each other, and Z_v stays as it is.

    python train.py --method cae    torchrun --nproc_per_node=8 train.py --method cae --data imagenet --data-root DIR

Measured: ten classes of Tiny-ImageNet, in docs/results.md; the paper's settings: not run.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dvae
import mae
from common import (
    MLP,
    Block,
    LayerScale,
    Mask,
    ViT,
    attend,
    block_mask,
    drop_path,
    initialize,
    patchify,
    reconstruction_loss,
    sincos_positions,
    unpatchify,
    visible_count,
)
from inputs import augment
from runtime import dalle_weights
from runtime.errors import InputError
from runtime.knobs import Count, Part, Share, Size, Weight, check
from runtime.reconstruction_pictures import picture_rows


@dataclass(frozen=True)
class Config:
    target: Literal["dvae", "dalle", "pixels"] = "dvae"  # tokens of a d-VAE or DALL-E (Table 7, §2.2), pixels (Fig. 4)
    tokenizer: str = ""  # a run of --method dvae, or DALL-E's weights; not given: a dvae is trained first
    mask_ratio: Share = 0.5  # share of patches hidden, in blocks (§2.2)
    regressor_depth: Size = 4  # cross-attention blocks (§4.1)
    decoder_depth: Count = 4  # self-attention blocks (§4.1); 0: a linear layer in their place (§4.3)
    lambda_z: Weight = 2.0  # λ of Eq. (1); 0: no alignment (Table 2, whose first row has no decoder either)
    norm_pixels: bool = False  # pixels: each patch standardised by its own mean and variance
    official_residual: bool = False  # the regressor's residual itself is normalised before the MLP (official code)
    crop_scale: Part = 0.08  # smallest share of the image's area that a crop keeps
    tokenizer_epochs: Size = 20  # of the dvae that is trained first (--method dvae --help says more)
    codes: Size = 8192  # of that dvae: size of the codebook
    hidden: Size = 256  # of that dvae: channels at the finest resolution
    blocks: Size = 2  # of that dvae: residual blocks at each resolution
    first_stride: Size = 1  # of that dvae: stride of the first convolution
    __post_init__ = check


def tokenizer_settings(recipe: str) -> dict:
    """The settings of the tokenizer that is trained first: those of dvae.py's recipe of that name."""
    theirs = dvae.RECIPES[recipe]
    ours = {name: theirs[name] for name in ("codes", "hidden", "blocks", "first_stride") if name in theirs}
    return dict(tokenizer_epochs=theirs["epochs"]) | ours


RECIPES = {
    # Appendix A, on ImageNet-1K with ViT-B; 800 and 1600 epochs with 20 and 40 of warm-up for the best results. Betas,
    # clipping, floor and layer scale are BEiT's ("almost the same as BEiT") and the official code's.
    "paper": dict(
        model="base", image_size=224, patch_size=16, layer_scale=0.1, drop_path=0.1, epochs=300, warmup_epochs=10,
        batch_size=2048, lr=1.5e-3, min_lr=1e-5, weight_decay=0.05, betas=(0.9, 0.999), clip_grad=3.0,
        **tokenizer_settings("paper"),
    ),
    # Tiny-ImageNet at 64 x 64, with the learning rate in proportion to the batch.
    "tiny": dict(
        model="tiny", image_size=64, patch_size=8, layer_scale=0.1, drop_path=0.1, epochs=100, warmup_epochs=10,
        batch_size=512, lr=3.75e-4, min_lr=1e-5, weight_decay=0.05, betas=(0.9, 0.999), clip_grad=3.0, crop_scale=0.2,
        **tokenizer_settings("tiny"),
    ),
    # The built-in images; a step takes three times as long as MAE's, so that there are fewer epochs: too few for layer
    # scales that begin at .1, or for large batches.
    "demo": dict(
        model="nano", image_size=64, patch_size=8, epochs=6, warmup_epochs=1, batch_size=64, lr=1e-3,
        weight_decay=0.05, betas=(0.9, 0.999), clip_grad=3.0, crop_scale=0.2, regressor_depth=2, decoder_depth=2,
        evaluate=True, **tokenizer_settings("demo"),
    ),
}  # fmt: skip


class Batch(NamedTuple):
    images: Tensor  # (B, 3, H, W), normalised
    mask: Mask
    token_images: Tensor | None  # (B, 3, 8h, 8w) in [0, 1], the same crops for the tokenizer; None for pixels


class CrossBlock(nn.Module):
    """Queries attend to Z_v and to each other: x + attention, then x + MLP.

    x (B, M, D), Z_v (B, V, D) and their positions, of the same shapes → (B, M, D).
    """

    def __init__(self, width: int, heads: int, layer_scale: float, rate: float, official_residual: bool):
        super().__init__()
        self.heads, self.drop_path, self.official_residual = heads, rate, official_residual
        # A bias in the keys adds one number to all of a query's scores, which softmax ignores: it would never learn.
        self.norm_q, self.norm_v, self.norm_mlp = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.norm_k = nn.LayerNorm(width, eps=1e-6, bias=False)
        self.q, self.v, self.proj = (nn.Linear(width, width) for _ in range(3))
        self.k = nn.Linear(width, width, bias=False)
        self.mlp = MLP(width, 4 * width)
        self.ls1, self.ls2 = (LayerScale(width, layer_scale) if layer_scale else nn.Identity() for _ in range(2))

    def attend(self, x: Tensor, z_v: Tensor, position_m: Tensor, position_v: Tensor) -> Tensor:
        context = torch.cat([z_v, x], dim=1)  # (B, V + M, D): keys and values are the same, but for positions
        positions = torch.cat([position_v, position_m], dim=1)
        q = self.q(self.norm_q(x + position_m))
        k = self.k(self.norm_k(context + positions))
        v = self.v(self.norm_v(context))
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, z_v: Tensor, position_m: Tensor, position_v: Tensor) -> Tensor:
        y = self.attend(x, z_v, position_m, position_v)
        x = x + drop_path(self.ls1(y), self.drop_path, self.training)
        y = self.norm_mlp(x)
        if self.official_residual:
            x = y
        return x + drop_path(self.ls2(self.mlp(y)), self.drop_path, self.training)


def token_loss(predicted: Tensor, tokens: Tensor) -> Tensor:
    """ℓ_y(Y_m, Ȳ_m) of Eq. (1): cross entropy, averaged over the masked patches. (B, M, codes), (B, M) → scalar."""
    return F.cross_entropy(predicted.float().flatten(0, 1), tokens.flatten())


def alignment_loss(z_m: Tensor, z_bar_m: Tensor) -> Tensor:
    """ℓ_z(Z_m, sg[Z̄_m]) of Eq. (1): mean squared error, both (B, M, D); Z̄_m carries no gradient."""
    return (z_m.float() - z_bar_m.detach().float()).square().mean()


class CAE(nn.Module):
    Config, RECIPES = Config, RECIPES

    def __init__(self, encoder: ViT, config: Config):
        super().__init__()
        c, D = config, encoder.width
        if c.target == "dalle" and not c.tokenizer:
            raise InputError(f"target dalle: no weights; give them to --tokenizer: {dalle_weights.PUBLISHED}")
        if c.tokenizer and c.target == "pixels":
            raise InputError(f"tokenizer {c.tokenizer}: pixels need none; leave it out, or give another --target")
        if c.norm_pixels and c.target != "pixels":
            raise InputError("norm pixels: tokens are no pixels; leave it out, or give --target pixels")
        self.config, self.encoder = c, encoder
        self.masked = encoder.patches - visible_count(encoder.grid, c.mask_ratio)
        if c.target == "pixels":
            self.tokenizer = None
        elif c.tokenizer:
            self.tokenizer = dvae.load_tokenizer(c.tokenizer).requires_grad_(False)
            if (c.target == "dalle") != (self.tokenizer.decoder is None):  # DALL-E's comes without
                raise InputError(f"target {c.target}: {c.tokenizer} is the other kind; give --target dvae or dalle")
        else:  # `prepare` trains it
            self.tokenizer = dvae.Tokenizer(c.codes, c.hidden, c.blocks, c.first_stride).requires_grad_(False)

        heads, layer_scale = encoder.blocks[0].attn.heads, encoder.settings["layer_scale"]

        def rates(depth: int) -> list[float]:
            return [encoder.settings["drop_path"] * i / max(1, depth - 1) for i in range(depth)]

        self.token_size = tuple(dvae.STRIDE * side for side in encoder.grid)  # pixels of the tokenizer's images
        self.register_buffer("pos_embed", sincos_positions(D, encoder.grid)[0, 1:], persistent=False)  # (N, D)
        self.mask_token = nn.Parameter(torch.empty(1, 1, D))  # Q_m, the same for all masked patches
        self.regressor = nn.ModuleList(
            CrossBlock(D, heads, layer_scale, rate, c.official_residual) for rate in rates(c.regressor_depth)
        )
        self.regressor_norm = nn.LayerNorm(D, eps=1e-6)
        self.decoder = nn.ModuleList(Block(D, heads, 4, layer_scale, rate) for rate in rates(c.decoder_depth))
        self.decoder_norm = nn.LayerNorm(D, eps=1e-6) if c.decoder_depth else nn.Identity()
        out = 3 * encoder.patch_size**2 if self.tokenizer is None else self.tokenizer.settings["codes"]
        self.predict = nn.Linear(D, out)
        for part in (self.regressor, self.decoder, self.predict):
            initialize(part)
        nn.init.normal_(self.mask_token, std=0.02)

    def prepare(self, pretrain) -> None:
        """Before the first step, if there is no tokenizer: train one. From here on it is part of every checkpoint.

        `pretrain(method, **settings)` trains another method on the same images and machine, in the run directory of
        this one, and returns it.
        """
        c = self.config
        if c.target == "dvae" and not c.tokenizer:
            trained = pretrain(
                "dvae", image_size=self.token_size, patch_size=dvae.STRIDE, epochs=c.tokenizer_epochs, codes=c.codes,
                hidden=c.hidden, blocks=c.blocks, first_stride=c.first_stride, crop_scale=c.crop_scale,
            )  # fmt: skip
            self.tokenizer.load_state_dict(trained.encoder.state_dict())

    def draw(self, images, index, rng) -> Batch:
        """uint8 images → a random crop, perhaps flipped, a block-wise mask, and the crop as the tokenizer wants it."""
        grid, size = self.encoder.grid, self.encoder.image_size
        boxes = augment.crop_boxes(rng, augment.sizes(images), scale=(self.config.crop_scale, 1.0))
        flips = rng.chance(0.5)
        views = augment.crop_resize(images, boxes, size, hflip=flips)
        mask = block_mask(rng, grid, self.masked, smallest=max(1, round(16 / 196 * self.encoder.patches)))
        token_images = None
        if self.tokenizer is not None:
            token_images = views
            if views.shape[2:] != self.token_size:
                token_images = augment.crop_resize(images, boxes, self.token_size, hflip=flips)
        return Batch(augment.normalize(views), mask, token_images)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        z_v = self.encoder(batch.images, batch.mask.visible)[:, 1:]  # Z_v, without class token: (B, V, D)
        z_m = self.regress(z_v, batch.mask)  # Z_m: (B, M, D)
        y_m = self.decode(z_m, batch.mask.masked)  # Y_m: (B, M, codes or P)
        y_bar_m = self.targets(batch)  # Ȳ_m: tokens (B, M), or pixels (B, M, P)
        l_y = token_loss(y_m, y_bar_m) if self.tokenizer else reconstruction_loss(y_m, y_bar_m)
        if self.config.lambda_z == 0:
            return {"loss": l_y}
        z_bar_m = self.masked_latents(batch)  # Z̄_m: (B, M, D), no gradient
        l_z = alignment_loss(z_m, z_bar_m)
        return {"loss": l_y + self.config.lambda_z * l_z, "decoding": l_y, "alignment": l_z}  # Eq. (1)

    def regress(self, z_v: Tensor, mask: Mask) -> Tensor:
        """H: latents of the visible patches → predicted latents of the masked ones. (B, V, D) → (B, M, D)."""
        position_m, position_v = (self.pos_embed[patches].to(z_v.dtype) for patches in (mask.masked, mask.visible))
        x = self.mask_token.to(z_v.dtype).expand_as(position_m)
        for block in self.regressor:
            x = block(x, z_v, position_m, position_v)
        return self.regressor_norm(x)

    @torch.no_grad()
    def masked_latents(self, batch: Batch) -> Tensor:
        """Z̄_m: the same encoder, with its present weights, on the masked patches alone; no gradient. → (B, M, D)."""
        return self.encoder(batch.images, batch.mask.masked)[:, 1:]

    def decode(self, z: Tensor, patches: Tensor) -> Tensor:
        """G: latents and the places of their patches, nothing else. (B, M, D), (B, M) → (B, M, codes or P)."""
        if self.config.decoder_depth:
            z = z + self.pos_embed[patches]
        for block in self.decoder:
            z = block(z)
        return self.predict(self.decoder_norm(z))

    def targets(self, batch: Batch) -> Tensor:
        """Ȳ_m: the tokens of the masked patches (B, M), or their pixels (B, M, P)."""
        if self.tokenizer:
            return self.tokenizer.tokens(batch.token_images).gather(1, batch.mask.masked)
        return mae.masked_pixels(batch.images, batch.mask, self.encoder.patch_size, self.config.norm_pixels)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Figure 4: encode all patches, skip the regressor, decode. (B, 3, H, W) → (B, N, codes or P)."""
        patches = torch.arange(self.encoder.patches, device=images.device).expand(len(images), -1)
        return self.decode(self.encoder(images)[:, 1:], patches)

    @torch.no_grad()
    def picture(self, batch: Batch) -> Tensor:
        """(4, B, 3, H, W) in [0, 1]: originals, what the encoder saw, the masked patches decoded, then as in Figure 4.

        Tokens are shown as the d-VAE's decoder draws them; DALL-E's encoder has none, which leaves two rows.
        """
        everything = self.reconstruct(batch.images)  # (B, N, codes or P)
        predicted = self.decode(
            self.regress(self.encoder(batch.images, batch.mask.visible)[:, 1:], batch.mask), batch.mask.masked
        )
        if self.tokenizer is None:
            if self.config.norm_pixels:  # every patch was seen, so its own mean and variance may be used
                var, mean = torch.var_mean(patchify(batch.images, self.encoder.patch_size), dim=-1, keepdim=True)
                everything = everything * (var + 1e-6).sqrt() + mean
            full = unpatchify(everything, self.encoder.patch_size, self.encoder.grid)
            return picture_rows(batch.images, batch.mask, predicted, self.encoder, self.config.norm_pixels, full)
        pixels = torch.zeros(*predicted.shape[:2], 3 * self.encoder.patch_size**2, device=predicted.device)
        rows = picture_rows(batch.images, batch.mask, pixels, self.encoder, norm=False)[:2]
        if self.tokenizer.decoder is None:
            return rows
        tokens = self.tokenizer.tokens(batch.token_images).scatter(1, batch.mask.masked, predicted.argmax(dim=2))
        drawn = [self.tokenizer.images(t, self.encoder.grid) for t in (tokens, everything.argmax(dim=2))]
        return torch.stack([*rows, *(F.interpolate(x, rows.shape[-2:]) for x in drawn)])
