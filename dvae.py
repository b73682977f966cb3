"""d-VAE: the discrete autoencoder whose codes are CAE's targets (Ramesh et al., arXiv 2102.12092, §2.1 and App. A).

In a sentence: a convolutional encoder gives each 8 x 8 pixels a distribution over a codebook, a decoder draws the image
from relaxed samples of it, and both maximise the evidence lower bound; afterwards the likeliest codes are the tokens.

    image ─ encoder ─ logits ─ Gumbel-softmax at τ ─ decoder ─ logit-Laplace ──── reconstruction   (App. A.3)
                         └──────────── KL to the uniform prior, times β ───────── L = -ELBO        (Eq. 1)

CAE (arXiv 2202.03026v2, §G.1) trains a d-VAE on ImageNet-1K and finds it as good as DALL-E's (CAE's Table 7; with ViT-L
it is a little worse), but says no more about it. CAE's code can load such a d-VAE (three strided convolutions, two
residual blocks, 8192 codes of 512 channels, squared or smooth L1 error), but does not say how it was trained; the loss
there has the entropy of the batch's mean distribution in place of the KL (here beside it: --diversity-weight). This
file therefore follows DALL-E: its networks (released code), its likelihood, its β and its cosines of τ and β (App. A).
The defaults are the released model, and `load_tokenizer` reads the weights of that model's encoder.

Differences from DALL-E
- Training is much shorter. τ falls over half of it (DALL-E: 150,000 of 3 million steps), β rises over a twentieth of it
  (DALL-E: 5,000 steps), and the learning rate falls until its end. The weights are not averaged.
- Images are cropped and flipped as in CAE, to 112 pixels instead of 256.
- The recipes "tiny" and "demo" are smaller and shorter still, and their β is 1.
- Initial weights are those of common.py, scaled (see `Tokenizer`).
- The Gumbel noise is a hash of two integers per image and the place in the grid of logits, computed in the forward
  pass. To draw images x tokens x codes numbers on the CPU would take longer than the step.

    python train.py --method dvae    torchrun --nproc_per_node=8 train.py --method dvae --data imagenet --data-root DIR

Its encoder holds the `Tokenizer` and not a ViT: `train.py --method cae --tokenizer` reads it, evaluate.py does not.
Measured as for CAE's row in docs/results.md: 195 steps of 128 images of ten classes of Tiny-ImageNet, two seeds. Of 128
codes 12 and 11 are effective, as most die within the first hundred steps; the squared error of pixels in [0, 1] is .025
and .024. With `--diversity-weight 16`, 68 and 48 are effective, at an error of .026 and .028. The linear probe of a CAE
of 12 epochs does not rise by that (45.6 and 45.4 % without it, 43.8 and 45.8 % with it), so the recipes leave it out.
Other weights, and the released model's size: not run.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import ViT, cosine, initialize, sum_over_ranks, world_size
from inputs import augment
from runtime import dalle_weights, files
from runtime.errors import InputError
from runtime.knobs import Part, Positive, Share, Size, Weight, check

STRIDE = 8  # pixels a side that a code stands for: three halvings
WANTED = f"give a run of --method dvae, or DALL-E's from {dalle_weights.PUBLISHED}"


@dataclass(frozen=True)
class Config:
    codes: Size = 8192  # size of the codebook
    hidden: Size = 256  # channels at the finest resolution; twice as many after each halving
    blocks: Size = 2  # residual blocks at each resolution
    first_stride: Size = 1  # of the first convolution: 1 in DALL-E; 2, 4 or 8 leave out the finest resolutions
    kl_weight: Weight = 6.6  # β of Eq. (1) at the end of its rise; 1: the evidence lower bound (§2)
    diversity_weight: Weight = 0.0  # of the KL of the batch's mean distribution, beside β (CAE's code); 0: none
    kl_warmup: Share = 0.05  # share of training over which β rises from 0 along a cosine
    tau: Positive = 1.0  # τ, the temperature of the Gumbel-softmax, at the start (App. A.2)
    tau_end: Positive = 0.0625  # τ at the end of its cosine (App. A.2)
    tau_anneal: Share = 0.5  # share of training over which τ falls
    crop_scale: Part = 0.08  # smallest share of the image's area that a crop keeps
    __post_init__ = check


RECIPES = {
    # App. A.2, on the 112 pixels at which CAE tokenizes; 20 epochs are ours (DALL-E: 3 million steps of 512 images).
    # An image keeps 176 MiB in bf16 for the backward pass: 88 GiB for 512 at once, 22 GiB in four parts.
    "paper": dict(
        image_size=112, patch_size=8, epochs=20, warmup_epochs=0, batch_size=512, accumulate=4, lr=1e-4, min_lr=1.25e-6,
        weight_decay=1e-4, betas=(0.9, 0.999),
    ),
    "tiny": dict(
        image_size=64, patch_size=8, epochs=10, warmup_epochs=0.5, batch_size=256, lr=1e-3, weight_decay=1e-4,
        betas=(0.9, 0.999), codes=1024, hidden=128, blocks=2, first_stride=2, kl_weight=1.0, crop_scale=0.2,
    ),
    "demo": dict(
        image_size=64, patch_size=8, epochs=5, warmup_epochs=0.5, batch_size=128, lr=3e-3, weight_decay=1e-4,
        betas=(0.9, 0.999), codes=128, hidden=32, blocks=1, first_stride=4, kl_weight=1.0, crop_scale=0.2,
    ),
}  # fmt: skip


class Batch(NamedTuple):
    images: Tensor  # (B, 3, H, W) in [0, 1]
    seeds: Tensor  # (B, 2) int64 in [0, 2^32), of the Gumbel noise


class ConvBlock(nn.Module):
    """x + gain · four convolutions with a ReLU before each, through a quarter of the channels."""

    def __init__(self, n_in: int, n_out: int, kernels: tuple[int, ...], gain: float):
        super().__init__()
        widths = [n_in] + 3 * [n_out // 4] + [n_out]
        self.skip = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        self.convs = nn.ModuleList(
            nn.Conv2d(widths[i], widths[i + 1], k, padding=k // 2) for i, k in enumerate(kernels)
        )
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv in self.convs:
            y = conv(F.relu(y))
        return self.skip(x) + self.gain * y


class Stack(nn.Module):
    """A first layer, a group of residual blocks per resolution with `resize` in between, ReLU, a 1 x 1 convolution.

    The last layer is float32 under autocast too, as in DALL-E's encoder: of 8192 logits in bf16 the two largest are
    sometimes equal.
    """

    def __init__(self, first: nn.Conv2d, widths: list[int], out: int, blocks: int, kernels: tuple[int, ...], resize):
        super().__init__()
        self.input = first
        before, gain = [first.out_channels, *widths], 1 / (len(widths) * blocks) ** 2
        self.groups = nn.ModuleList(
            nn.ModuleList(ConvBlock(before[g] if i == 0 else width, width, kernels, gain) for i in range(blocks))
            for g, width in enumerate(widths)
        )
        self.output = nn.Conv2d(widths[-1], out, 1)
        self.resize = resize

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x)
        for g, group in enumerate(self.groups):
            x = self.resize(x) if g else x
            for block in group:
                x = block(x)
        with torch.autocast(x.device.type, enabled=False):
            return self.output(F.relu(x).to(self.output.weight.dtype))


class Tokenizer(nn.Module):
    """DALL-E's encoder and, unless only tokens are wanted, its decoder. Pixels are in [0, 1] outside of it."""

    def __init__(
        self, codes: int = 8192, hidden: int = 256, blocks: int = 2, first_stride: int = 1, decoder: bool = True
    ):
        super().__init__()
        if codes < 2:
            raise InputError(f"codes {codes}: must be at least 2")
        if hidden % 4:
            raise InputError(f"hidden {hidden}: must be a multiple of 4 channels")
        if first_stride not in (1, 2, 4, 8):
            raise InputError(f"first stride {first_stride}: must be 1, 2, 4 or 8")
        self.settings = dict(codes=codes, hidden=hidden, blocks=blocks, first_stride=first_stride, decoder=decoder)
        widths = [hidden * 2**i for i in range(5 - first_stride.bit_length())]  # four from 1 pixel to 8, three from 2 …
        first = nn.Conv2d(3, hidden, max(7, first_stride), stride=first_stride, padding=3 if first_stride < 8 else 0)
        self.encoder = Stack(first, widths, codes, blocks, (3, 3, 3, 1), nn.MaxPool2d(2))
        self.decoder = None
        if decoder:  # its first layer is the codebook: 128 numbers a code
            first, double = nn.Conv2d(codes, min(128, widths[-1]), 1), nn.Upsample(scale_factor=2)
            self.decoder = Stack(first, widths[::-1], 6 * first_stride**2, blocks, (1, 3, 3, 3), double)
        initialize(self)
        # At first grey gives zero, and pictures logits of order one, as the Gumbel noise: otherwise all places have the
        # same likeliest code, and noise drowns the others, until the decoder no longer listens.
        self.encoder.input.bias.data = -self.encoder.input.weight.data.sum((1, 2, 3)) / 2
        self.encoder.output.weight.data *= 10

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Shares of the codes (B, K, h, w) → μ and log b (B, 3, H, W) of the logit-Laplace distribution of pixels."""
        x = F.pixel_shuffle(self.decoder(z), self.settings["first_stride"])
        return x.chunk(2, dim=1)

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] → (B, N) int64: the likeliest code of each 8 x 8 pixels, in raster order.

        All but the last layer is computed in the run's precision, as DALL-E's encoder computes in float16 on a GPU; in
        bf16 1 % of the codes are others than in float32, which takes several times as long.
        """
        return self.encoder(squeeze(images)).argmax(dim=1).flatten(1)

    @torch.no_grad()
    def images(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, N) → (B, 3, H, W) in [0, 1]: what the decoder makes of codes."""
        z = F.one_hot(tokens, self.settings["codes"]).float().transpose(1, 2).unflatten(2, grid)
        return unsqueeze(self.decode(z)[0].sigmoid())


def load_tokenizer(file: str) -> Tokenizer:
    """A run of --method dvae (its directory or its encoder), or DALL-E's encoder: a plain state dict. Never code."""
    path = files.encoder_in(Path(file)) if Path(file).is_dir() else Path(file)
    if not path.is_file():
        raise InputError(f"tokenizer {path}: no such file; {WANTED}")
    try:
        saved = files.load(path)
        ours = "state_dict" in saved
        settings, weights = (saved["settings"], saved["state_dict"]) if ours else dalle_weights.encoder(saved)
        tokenizer = Tokenizer(**settings)
        tokenizer.load_state_dict(weights)
        return tokenizer
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError):  # InputError is a ValueError
        raise InputError(f"tokenizer {path}: not one; {WANTED}") from None


def squeeze(images: Tensor, eps: float = 0.1) -> Tensor:
    """[0, 1] → [ε, 1 - ε], where the logit-Laplace distribution lives (App. A.3)."""
    return (1 - 2 * eps) * images + eps


def unsqueeze(x: Tensor, eps: float = 0.1) -> Tensor:
    return ((x - eps) / (1 - 2 * eps)).clamp(0, 1)


def logit_laplace_loss(x: Tensor, mu: Tensor, log_b: Tensor) -> Tensor:
    """-log f(x | μ, b), f = exp(-|logit x - μ| / b) / (2 b x (1 - x)) (App. A.3), averaged over all values."""
    log_density = -(x.logit() - mu).abs() * (-log_b).exp() - log_b - (2 * x * (1 - x)).log()
    return -log_density.mean()


def uniform_kl(logits: Tensor) -> Tensor:
    """KL(q ‖ uniform) = log K - H(q) in nats, averaged over tokens. (B, K, h, w) → scalar, in [0, log K]."""
    log_q = logits.log_softmax(dim=1)
    return math.log(logits.shape[1]) + (log_q.exp() * log_q).sum(dim=1).mean()


def diversity_loss(logits: Tensor) -> Tensor:
    """KL(q̄ ‖ uniform) = log K - H(q̄) in nats, of the mean q̄ of q over the tokens of all ranks. (B, K, h, w) → scalar.

    `DiscreteVAE.forward` of CAE's code has -H(q̄) by this name, with the same 1e-6, as q may be 0 in float32.
    """
    q = sum_over_ranks(logits.softmax(dim=1).mean(dim=(0, 2, 3))) / world_size()
    return math.log(logits.shape[1]) + (q * (q + 1e-6).log()).sum()


def gumbel_noise(seeds: Tensor, shape: torch.Size) -> Tensor:
    """(B, 2) integers below 2^32 → float32 (B, *shape), standard Gumbel: -log(-log u).

    u comes from an integer hash of the place, once for each seed: a function of the image's seeds alone, hence
    the same in any batch, on any device, for any number of processes.
    """
    x = torch.arange(math.prod(shape), device=seeds.device).repeat(len(seeds), 1)  # (B, places), changed in place
    for seed in seeds.T:
        x ^= seed[:, None]
        for _ in range(2):  # products stay below 2^59: no overflow
            x ^= x >> 16
            x *= 0x45D9F3B
            x &= 0xFFFFFFFF
        x ^= x >> 16
    u = (x >> 9).float().add_(0.5).div_(2**23)  # 23 bits: never 0 and never 1 in float32
    return u.log_().neg_().log_().neg_().unflatten(1, shape)


def relax(logits: Tensor, noise: Tensor, tau: Tensor) -> Tensor:
    """Gumbel-softmax: softmax((log q + g) / τ) over the codes, which tends to a sample of q as τ → 0. (B, K, h, w)."""
    return ((logits + noise) / tau).softmax(dim=1)


@torch.no_grad()
def perplexity(tokens: Tensor, codes: int) -> Tensor:
    """How many codes are effective, over the images of all ranks: exp of the entropy of their frequencies."""
    ones = torch.ones(tokens.numel(), device=tokens.device)
    frequency = sum_over_ranks(torch.zeros(codes, device=tokens.device).scatter_add(0, tokens.flatten(), ones))
    frequency = frequency / frequency.sum()
    return torch.special.entr(frequency).sum().exp()


class DVAE(nn.Module):
    Config, RECIPES = Config, RECIPES

    def __init__(self, encoder: ViT, config: Config):
        """Of `encoder` only the sizes matter: the tokenizer takes its place."""
        super().__init__()
        if encoder.patch_size != STRIDE:
            raise InputError(f"patch size {encoder.patch_size}: a code stands for {STRIDE} pixels; give {STRIDE}")
        self.config, self.image_size, self.grid = config, encoder.image_size, encoder.grid
        self.encoder = Tokenizer(config.codes, config.hidden, config.blocks, config.first_stride)
        for name in ("tau", "beta"):  # buffers, so that a checkpoint keeps them
            self.register_buffer(name, torch.zeros(()))
        self.update_teacher(0.0)

    def draw(self, images, index, rng) -> Batch:
        """uint8 images → a random crop, perhaps flipped, and the seeds of its noise."""
        boxes = augment.crop_boxes(rng, augment.sizes(images), scale=(self.config.crop_scale, 1.0))
        views = augment.crop_resize(images, boxes, self.image_size, hflip=rng.chance(0.5))
        return Batch(views, rng.integers(0, 2**32, 2))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        x = squeeze(batch.images)
        logits = self.encoder.encoder(x)  # (B, K, h, w)
        z = relax(logits, gumbel_noise(batch.seeds, logits.shape[1:]), self.tau)
        mu, log_b = self.encoder.decode(z)  # (B, 3, H, W) each
        likelihood = logit_laplace_loss(x, mu, log_b)
        kl = uniform_kl(logits)
        # The bound sums over tokens and over pixel values; a mean over values leaves β / (3 · 8 · 8) (App. A.2).
        losses = {
            "loss": likelihood + self.beta / (3 * STRIDE**2) * kl,
            "likelihood": likelihood,
            "kl": kl,
            "reconstruction": (unsqueeze(mu.sigmoid()) - batch.images).square().mean(),  # of pixels in [0, 1]
            "effective_codes": perplexity(logits.argmax(dim=1), self.config.codes),
        }
        if self.config.diversity_weight:
            losses["diversity"] = diversity_loss(logits)
            losses["loss"] = losses["loss"] + self.config.diversity_weight / (3 * STRIDE**2) * losses["diversity"]
        return losses

    def update_teacher(self, progress: float) -> None:
        """There is no teacher; τ falls and β rises with the share of training that is done (App. A.2)."""
        c = self.config
        self.tau.fill_(cosine(c.tau, c.tau_end, min(1.0, progress / c.tau_anneal) if c.tau_anneal else 1.0))
        self.beta.fill_(cosine(0.0, c.kl_weight, min(1.0, progress / c.kl_warmup) if c.kl_warmup else 1.0))

    @torch.no_grad()
    def picture(self, batch: Batch) -> Tensor:
        """(2, B, 3, H, W) in [0, 1]: originals, and what the decoder makes of their tokens."""
        return torch.stack([batch.images, self.encoder.images(self.encoder.tokens(batch.images), self.grid)])
