"""ConMIM: masked image modeling with denoising contrast (Yi et al., arXiv 2205.09616v1).

In a sentence: an encoder sees an image with three quarters of its patches replaced by a mask token, and must find each
hidden patch among all patches of the same image, as a slowly progressing copy sees them in the whole image.

    student:  x ─ mask tokens ─ encoder ─────────── projector ── f(x̂)_j, j masked ─┐
    keys:     x, colours changed ─ slow copy ─ slow projector ─ sg ── f(x)_i ───── L  (Eq. 3)

    question        | paper                | official code                     | here (flag)
    --------------- | -------------------- | --------------------------------- | ------------------------------------
    mask of ViT-B   | 75 %, cells of 32 px | the same, or 75 of 196 in blocks  | (--masking block --mask-ratio 0.382)
    mask token      | for pixels? (Alg. 1) | replaces embeddings               | as the code; positions come after
    positions       | "mostly" as BEiT, §4 | relative alone                    | absolute (--positions relative)
    crop            | no scale (Table 10)  | keeps 8 to 100 % of the area      | the same (--crop-scale)
    colour jitter   | no probability       | .8                                | always (--jitter 0.8)
    greyscale       | not in Table 10      | .2                                | none (--gray 0.2)
    solarise, blur  | .2, .1 (Table 10)    | threshold .5; σ .1-2 at 224 px    | the same, σ in proportion
    projector       | MoCo v3's (§4)       | sees class tokens, each GPU alone | without, all GPUs (--project-class)
    norm of f       | L2 (not in Alg. 1)   | L2                                | L2
    keys' layout    | (N, D, K) in Alg. 1  | transposed                        | transposed
    α               | .996 to 1            | cosine of t/T, t from 0           | of (t + 1)/T: ends at 1
    kept weights    | not said             | the slow copy's                   | the trained (--keep-slow)
    layer scale     | "mostly" as BEiT, §4 | .1 (ViT-L's command: 1e-5)        | none (--layer-scale 0.1)
    weight decay    | .05                  | not on the class token            | on it (--no-decay cls_token)
    initial weights | "mostly" as BEiT, §4 | BEiT's                            | MAE's
    clipping        | 3 (Table 10)         | 1 in its one command, ViT-L's     | 3

The loss is the mean over the masked patches of all images; an image's K keys are its N patches.
Table 4's instance-level row is read as `contrast="instance", masking="none"`: keys are the images of the batch, crop
and flip stay shared, the mean of the tokens enters the projector. Table 5 has keys of a GPU (1 of 16: 128 images), here
of all (`--accumulate 16` makes it 128). The threshold of its filter is not said; similarity to "the anchor" is read
as the cosine with f(x̂)_j. One augmentation for both (Table 6) is read as one view. Tables 4 to 9: 300 epochs.

    torchrun --nproc_per_node=8 train.py --method conmim --data tiny-imagenet --download

Measured: ten classes of Tiny-ImageNet, in docs/results.md; the paper's settings: not run.
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common import (
    BatchNorm,
    Mask,
    ViT,
    block_mask,
    cosine,
    ema_update,
    gather_over_ranks,
    initialize,
    patchify,
    random_mask,
    rank,
    restore,
    take,
    unpatchify,
    visible_count,
)
from inputs import augment
from runtime.errors import InputError
from runtime.knobs import Cosine, Part, Positive, Share, Size, check


@dataclass(frozen=True)
class Config:
    masking: Literal["random", "block", "none"] = "random"  # cells, blocks (Table 7), nothing (Table 4)
    mask_ratio: Share = 0.75  # share of patches hidden (Table 7)
    mask_cell: Size = 2  # random masking hides squares of this many patches a side (Table 10: 32 pixels; ViT-S 16)
    contrast: Literal["patch", "instance"] = "patch"  # Eq. (3), or Eq. (1) of images, by mean token (Table 4)
    dictionary: Literal["image", "batch"] = "image"  # keys of the same image, or of all images (Table 5: of a GPU's)
    filter_above: Cosine = 1.0  # leave out negative keys whose cosine with the anchor exceeds this; 1: none (Table 5)
    tau: Positive = 0.1  # temperature of Eq. (3) (Table 8)
    slow: bool = True  # keys from the slowly progressing copy; without: from the encoder as it is (Table 6)
    momentum: Share = 0.996  # α of the slow copy at the start, growing to 1 along a cosine (Table 9)
    augmentation: Literal["asymmetric", "strong", "basic", "switched"] = "asymmetric"  # strong keys, both, … (Table 6)
    crop_scale: Part = 0.08  # smallest share of the image's area that a crop keeps
    jitter: Share = 1.0  # probability of colour jitter in the strong augmentation (official code: 0.8)
    gray: Share = 0.0  # probability of greyscale in the strong augmentation (official code: 0.2)
    projector_width: Size = 4096  # of the projector's two hidden layers, as in MoCo v3
    projector_out: Size = 256  # dimensions of the contrasted vectors, as in MoCo v3
    project_class: bool = False  # the class token too enters the projector's batch norms (official code)
    keep_slow: bool = False  # keep the slow copy as the encoder (official code), in place of the trained one
    __post_init__ = check


RECIPES = {
    # Table 10 for ViT-B/16. ViT-S: model="small", epochs=300, drop_path=0.1, mask_cell=1.
    "paper": dict(
        model="base", image_size=224, patch_size=16, epochs=800, warmup_epochs=10, batch_size=2048, lr=5e-4,
        min_lr=1e-5, weight_decay=0.05, betas=(0.9, 0.98), clip_grad=3.0,
    ),
    # Tiny-ImageNet at 64 x 64, with a projector in proportion; half the paper's rate for a quarter of its batch. As for
    # ViT-S in the paper, a cell is one patch: in cells of 2, only 4 of the image's 16 cells would be visible.
    "tiny": dict(
        model="tiny", image_size=64, patch_size=8, epochs=100, warmup_epochs=10, batch_size=512, base_lr=1.25e-4,
        min_lr=1e-5, weight_decay=0.05, betas=(0.9, 0.98), clip_grad=3.0, mask_cell=1, crop_scale=0.2,
        projector_width=1024,
    ),
    # The built-in images in minutes of two CPU cores. So short a run learns to tell an image's own keys apart mostly
    # by their places; the keys of other images (Table 5) have the same places, so that what they show must be learned.
    "demo": dict(
        model="nano", image_size=64, patch_size=8, epochs=4, warmup_epochs=1, batch_size=128, lr=3e-3,
        weight_decay=0.05, betas=(0.9, 0.98), clip_grad=3.0, mask_cell=1, dictionary="batch", crop_scale=0.2,
        projector_width=256, projector_out=64, evaluate=True,
    ),
}  # fmt: skip


class Batch(NamedTuple):
    images: Tensor  # (B, 3, H, W) what the student sees, but for the masked patches, normalised
    mask: Mask | None  # None: nothing is masked (Table 4); if patches are contrasted, each is an anchor
    full_images: Tensor  # (B, 3, H, W) what the keys are made of: the same crop and flip, other colours, normalised


class Projector(nn.Module):
    """(rows, D) → (rows, out): MoCo v3's three layers. Biases would vanish in the norms; the last norm has no scale."""

    def __init__(self, width: int, hidden: int, out: int):
        super().__init__()
        self.fc1, self.norm1 = nn.Linear(width, hidden, bias=False), BatchNorm(hidden)
        self.fc2, self.norm2 = nn.Linear(hidden, hidden, bias=False), BatchNorm(hidden)
        self.fc3, self.norm3 = nn.Linear(hidden, out, bias=False), BatchNorm(out, affine=False)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.fc1(x)))
        x = F.relu(self.norm2(self.fc2(x)))
        return self.norm3(self.fc3(x))


class ConMIM(nn.Module):
    Config, RECIPES = Config, RECIPES

    def __init__(self, encoder: ViT, config: Config):
        super().__init__()
        c = config
        if c.keep_slow and not c.slow:
            raise InputError("keep slow: there is no slow copy to keep; leave out one of the two switches")
        self.config, self.student = c, encoder
        if c.masking != "none":
            cell = c.mask_cell if c.masking == "random" else 1
            visible_count(encoder.grid, c.mask_ratio, cell)  # says at once if nothing would be left
            self.mask_token = nn.Parameter(torch.empty(1, 1, encoder.width).normal_(std=0.02))
        # A vector added to every token's feature vanishes in the projector's first batch norm: it would only drift.
        encoder.norm.bias.requires_grad_(False)
        self.projector = Projector(encoder.width, c.projector_width, c.projector_out)
        if c.slow:
            self.slow_encoder = copy.deepcopy(encoder).requires_grad_(False)
            self.slow_projector = copy.deepcopy(self.projector).requires_grad_(False)

    @property
    def encoder(self) -> ViT:
        """What is kept after pretraining, without the projector (§4)."""
        return self.slow_encoder if self.config.keep_slow else self.student

    def draw(self, images, index, rng) -> Batch:
        """uint8 images → one crop of each, perhaps flipped, in two colourings, and a mask (§4, asymmetric design)."""
        c = self.config
        boxes = augment.crop_boxes(rng, augment.sizes(images), scale=(c.crop_scale, 1.0))
        basic = augment.crop_resize(images, boxes, self.student.image_size, hflip=rng.chance(0.5))
        mask = self.draw_mask(rng)
        strong = basic if c.augmentation == "basic" else self.strengthen(basic, rng)
        seen = strong if c.augmentation in ("strong", "switched") else basic
        full = strong if c.augmentation in ("strong", "asymmetric") else basic
        return Batch(augment.normalize(seen), mask, augment.normalize(full))

    def draw_mask(self, rng) -> Mask | None:
        c, grid, N = self.config, self.student.grid, self.student.patches
        if c.masking == "none":
            return None
        if c.masking == "random":
            return random_mask(rng, grid, c.mask_ratio, c.mask_cell)
        smallest = max(1, round(16 * N / 196))  # BEiT's 16 of 196 patches, in proportion
        return block_mask(rng, grid, N - visible_count(grid, c.mask_ratio), smallest)

    def strengthen(self, images: Tensor, rng) -> Tensor:
        """The strong augmentation of Table 10 on basic views in [0, 1]; nothing in it moves a patch."""
        c, host = self.config, augment.on_host(rng)
        jitter = augment.draw_color_jitter(rng, 0.4, 0.4, 0.2, 0.1, probability=c.jitter)
        images = augment.color_jitter(images, *jitter)
        images = augment.grayscale(images, host.chance(c.gray))
        sigma = host.uniform(low=0.1, high=2.0) * min(images.shape[2:]) / 224  # pixels
        images = augment.gaussian_blur(images, sigma, host.chance(0.1))
        return augment.solarize(images, 0.5, host.chance(0.2))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        anchors = self.anchors(batch.images, batch.mask)  # f(x̂): (B, K, d)
        keys = self.keys(batch.full_images)  # sg[f(x)]: (B, K, d)
        places = self.places(batch)  # j ∈ M: (B, M)
        anchors = take(anchors, places)  # (B, M, d)
        if self.config.dictionary == "batch" or self.config.contrast == "instance":
            anchors, keys, places = whole_batch(anchors, keys, places)
        loss, accuracy = contrast_in_parts(anchors, keys, places, self.config.tau, self.config.filter_above)
        return {"loss": loss, "accuracy": accuracy}

    def anchors(self, images: Tensor, mask: Mask | None) -> Tensor:
        """The corrupted images, seen by the student: (B, 3, H, W) → (B, K, d), or (B, 1, d) of whole images."""
        return self.project(self.student.encode(self.corrupt(images, mask)), self.projector)

    def corrupt(self, images: Tensor, mask: Mask | None) -> Tensor:
        """x̂: patch embeddings with the mask token in place of the masked ones, then positions. → (B, N, D)"""
        if mask is None:
            return self.student.embed(images)
        visible = self.student.patch_embed(images, mask.visible)  # (B, V, D)
        masked = self.mask_token.to(visible.dtype).expand(*mask.masked.shape, -1)  # (B, M, D)
        return restore(visible, masked, mask) + self.student.pos_embed[:, 1:]

    @torch.no_grad()
    def keys(self, images: Tensor) -> Tensor:
        """The whole images, seen by the slow copy: (B, 3, H, W) → (B, K, d), or (B, 1, d), without gradient."""
        if not self.config.slow:
            return self.project(self.student(images), self.projector)
        return self.project(self.slow_encoder(images), self.slow_projector)

    def project(self, tokens: Tensor, projector: Projector) -> Tensor:
        """(B, 1 + N, D) → (B, N, d) of the patches, or (B, 1, d) of their mean; the class token is dropped."""
        if self.config.contrast == "instance":
            tokens = tokens[:, 1:].mean(dim=1, keepdim=True)
        elif not self.config.project_class:
            tokens = tokens[:, 1:]
        z = projector(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
        return z[:, -self.student.patches :]

    def places(self, batch: Batch) -> Tensor:
        """(B, M): which of an image's keys are looked for, by the anchors of the same places."""
        if batch.mask is not None and self.config.contrast == "patch":
            return batch.mask.masked
        K = self.student.patches if self.config.contrast == "patch" else 1
        return torch.arange(K, device=batch.images.device).expand(len(batch.images), -1)

    def update_teacher(self, progress: float) -> None:
        """θ̃ ← (1 - α) θ + α θ̃ (§4), α from 0.996 to 1 on a cosine (Table 10), projector included."""
        if self.config.slow:
            alpha = cosine(self.config.momentum, 1.0, progress)
            ema_update(self.slow_encoder, self.student, alpha)
            ema_update(self.slow_projector, self.projector, alpha)

    @torch.no_grad()
    def picture(self, batch: Batch) -> Tensor | None:
        """(4, B, 3, H, W) in [0, 1]: the crops, what the student saw, what it found, and what the keys were made of.

        What it found: on each masked place the patch of the same image whose key fits the prediction best.
        """
        if batch.mask is None or self.config.contrast == "instance":
            return None  # nothing hidden is predicted
        anchors = take(self.anchors(batch.images, batch.mask), batch.mask.masked)
        found = cosines(anchors, self.keys(batch.full_images)).argmax(dim=2)  # (B, M)
        patches, grid = patchify(batch.images, self.student.patch_size), self.student.grid
        index = batch.mask.masked[:, :, None].expand(-1, -1, patches.shape[2])
        rows = [patches, patches.scatter(1, index, 0.0), patches.scatter(1, index, take(patches, found))]
        rows = [*(unpatchify(x, self.student.patch_size, grid) for x in rows), batch.full_images]
        return torch.stack([augment.denormalize(x.float()) for x in rows]).clamp(0, 1)


SCORES = 2**28  # similarities at a time, 1 GiB; 148 of 196 patches of 512 images have 28 times as many with all keys


def cosines(anchors: Tensor, keys: Tensor) -> Tensor:
    """⟨·, ·⟩ of §3.1, the dot products of L2-normalised vectors: (S, M, d), (S, K, d) → float32 (S, M, K)."""
    with torch.autocast(anchors.device.type, enabled=False):
        return F.normalize(anchors.float(), dim=-1) @ F.normalize(keys.float(), dim=-1).transpose(1, 2)


def denoising_contrast(
    anchors: Tensor, keys: Tensor, places: Tensor, tau: float, filter_above: Cosine = 1.0
) -> tuple[Tensor, Tensor]:
    """Eq. (3): E_{j∈M} -log(exp(⟨f(x̂)_j, sg[f(x)_j]⟩/τ) / Σ_i exp(⟨f(x̂)_j, sg[f(x)_i]⟩/τ)), in S dictionaries.

    (S, M, d) anchors, (S, K, d) keys, (S, M) the places of the right ones among these → the loss, and how often the
    right key is the most similar one left. Negative keys more similar than `filter_above` are left out (Table 5).
    """
    if keys.shape[1] == 1:
        raise InputError("one image at a time: its key has no negatives; give a larger --batch-size")
    similarity = cosines(anchors, keys.detach())  # (S, M, K)
    if filter_above < 1:
        negative = torch.arange(keys.shape[1], device=keys.device) != places[:, :, None]
        similarity = similarity.masked_fill(negative & (similarity > filter_above), -math.inf)
    loss = F.cross_entropy((similarity / tau).flatten(0, 1), places.flatten())
    return loss, (similarity.detach().argmax(dim=2) == places).float().mean()


def contrast_in_parts(anchors: Tensor, keys: Tensor, places: Tensor, *settings: float) -> tuple[Tensor, Tensor]:
    """`denoising_contrast` with at most `SCORES` similarities in memory, which the backward pass computes again."""
    n = math.ceil(anchors.shape[1] * keys.shape[:2].numel() / SCORES)
    if n == 1:
        return denoising_contrast(anchors, keys, places, *settings)
    loss, accuracy = 0.0, 0.0
    for a, p in zip(anchors.chunk(n, dim=1), places.chunk(n, dim=1), strict=True):
        means = checkpoint(denoising_contrast, a, keys, p, *settings, use_reentrant=False, preserve_rng_state=False)
        share = p.numel() / places.numel()
        loss, accuracy = loss + share * means[0], accuracy + share * means[1]
    return loss, accuracy


def whole_batch(anchors: Tensor, keys: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """B images with a dictionary each → one dictionary of the keys of all images on all ranks.

    (B, M, d), (B, K, d), (B, M) → (1, B·M, d), (1, ranks·B·K, d), (1, B·M).
    """
    B, K, _ = keys.shape
    first = (rank() * B + torch.arange(B, device=keys.device)) * K  # each image's first key
    places = places + first[:, None]
    return tuple(x.flatten(0, 1)[None] for x in (anchors, gather_over_ranks(keys), places))
