"""What labels make of an encoder by gradient descent: the papers' probes, partial and full fine-tuning.

    python evaluate.py --run runs/cmae-shapes --protocol finetune
    python evaluate.py --run runs/cmae-shapes --protocol partial --blocks 1 --seeds 3

| protocol       | what learns                                       | from                       | by    |
| -------------- | ------------------------------------------------- | -------------------------- | ----- |
| linear --paper | a linear layer behind batch norm                  | the class token            | LARS  |
| attentive      | a query, its cross-attention, a linear layer      | the patches                | SGD   |
| partial        | the last K blocks, a last norm, a linear layer    | the mean patch             | AdamW |
| finetune       | everything                                        | the mean patch             | AdamW |
| supervised     | everything, from random weights                   | the mean patch             | AdamW |

The embeddings (stem, class token, table of relative positions) learn only where all blocks do. So `partial` with K = 0
is the linear probe, as in CMAE (§4.5), and with K = depth it is `finetune`. `supervised` is the bar for pretraining:
the same recipe, but for one learning rate in all layers, as the first ones know nothing yet that should be kept.

One loop trains them all. Its draws come from (seed, step) and its batch is global, so that neither a restart nor the
number of processes changes the result; drop path, as in pretraining, is the exception for the latter.
"""

import copy
import json
import math
import time
import zlib
from collections import OrderedDict
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from common import StepRandom, ViT, initialize, learning_rate, upload
from inputs import augment
from runtime import files
from runtime.errors import InputError
from runtime.randomness import epoch_order
from runtime.ranks import rank, sum_over_ranks, world_size

# ---------------------------------------------------------------------------------------------------------- recipes


@dataclass(frozen=True)
class Recipe:
    """All that can be set; the defaults are MAE's fine-tuning of ViT-B (FINETUNE.md of its code)."""

    epochs: int = 100  # passes over the images
    warmup_epochs: float = 5.0  # of them with a learning rate that grows from 0; if not given, in proportion
    batch_size: int = 1024  # images a step, over all processes (kNN and the fast linear probe: of one process)
    base_lr: float = 5e-4  # peak learning rate for 256 images a step; it grows with the batch
    lr: float = 0.0  # peak learning rate itself; 0: the base's times batch / 256
    min_lr: float = 1e-6  # at the end of the cosine
    optimizer: str = "adamw"  # adamw; lars or sgd, both with momentum 0.9
    weight_decay: float = 0.05  # not on vectors, biases and the class token
    layer_decay: float = 0.65  # learning rate of a block, as a share of the next one's
    drop_path: float = 0.1  # of the last block; grows from 0 linearly
    mixup: float = 0.8  # α of its Beta(α, α); 0: none
    cutmix: float = 1.0  # likewise; where there are both, each pair of images draws one
    smoothing: float = 0.1  # of the labels
    erase: float = 0.25  # chance of an image to lose a box
    randaugment: int = 9  # strength of its operations, of 10; 0: none
    crop_scale: float = 0.08  # least share of an image that a crop keeps; 0: neither crops nor flips
    features: str = "mean"  # what the head sees: the mean of the patches, or cls, the class token
    norm: str = "fresh"  # last norm where blocks learn: fresh, or the pretrained one (CAE)
    head_std: float = 2e-5  # of the linear layer's first weights
    attend_cls: bool = False  # the attentive probe sees the class token too (CAE's code)

    @property
    def peak(self) -> float:
        return self.lr or self.base_lr * self.batch_size / 256

    @property
    def augments(self) -> bool:
        return any((self.crop_scale, self.randaugment, self.erase, self.mixup, self.cutmix))


# Both probes of CAE (Appendix); the linear one, like CMAE's and LC-MAE's, is MAE's. 6.4 = .1 · 16384 / 256, and
# .4 = .0125 · 8192 / 256: the papers give the rate for their batch, the rule of proportion is MAE's.
CALM = dict(mixup=0.0, cutmix=0.0, smoothing=0.0, erase=0.0, randaugment=0)
PROBE = CALM | dict(epochs=90, warmup_epochs=10.0, min_lr=0.0, weight_decay=0.0, head_std=0.01, features="cls")
LINEAR = PROBE | dict(optimizer="lars", base_lr=0.1, batch_size=16384)
ATTENTIVE = PROBE | dict(optimizer="sgd", base_lr=0.0125, batch_size=8192)


def paper(**tuning) -> dict[str, dict]:
    return dict(linear=LINEAR, attentive=ATTENTIVE, finetune=tuning)


RECIPES = {
    "mae": paper(),
    "cmae": paper(),  # §4.1, pretrained for 300 epochs
    "cmae-1600": paper(base_lr=2.5e-4),
    "cae": paper(batch_size=4096, norm="pretrained"),  # Appendix: 8e-3 for 4096 images
    "cae-small": paper(batch_size=4096, norm="pretrained", epochs=200, base_lr=1e-3, layer_decay=0.75),
    "cae-large": paper(batch_size=4096, norm="pretrained", epochs=50, base_lr=1.25e-4, layer_decay=0.75),
    # Table 11 searches {1, 2, 4, 5}e-3 and its code gives 4e-3. Its jitter stands idle in code, beside RandAugment.
    "conmim": paper(base_lr=1e-3, warmup_epochs=20.0),
    "conmim-small": paper(base_lr=1e-3, epochs=200, layer_decay=0.8),
    "lcmae": paper(base_lr=1e-3),  # §5; the rest is unstated, hence MAE's
    # §4.2: "frozen and fine-tuned for 100 epochs", which contradicts itself: report both. The rest is unstated.
    "cmae_loc": paper() | dict(linear=LINEAR | dict(epochs=100)),
    # Ours, for 64 pixels: as many steps, at the same rates, as the papers' probes. Not tuned, nor yet run on a GPU.
    "tiny": dict(
        linear=LINEAR | dict(batch_size=1024, base_lr=1.6),
        attentive=ATTENTIVE | dict(batch_size=1024, base_lr=0.1),
        finetune=dict(batch_size=512, epochs=30, warmup_epochs=3.0, layer_decay=0.75),
    ),
    # Ours, for about two minutes of two CPU cores. Probes see every image as it is, hence encode it once; their rates
    # are the best of a few on a tenth of the built-in training images. On so few steps mixing would be too much.
    "demo": dict(
        linear=LINEAR | dict(batch_size=256, base_lr=10.0, crop_scale=0.0),
        attentive=ATTENTIVE | dict(batch_size=256, base_lr=0.1, epochs=45, warmup_epochs=5.0, crop_scale=0.0),
        finetune=CALM | dict(batch_size=128, base_lr=1e-3, epochs=15, warmup_epochs=1.5, crop_scale=0.3,
                             layer_decay=0.75, smoothing=0.1),
    ),
}  # fmt: skip

IDLE = dict(  # what a protocol has no use for
    linear={"layer_decay", "drop_path", "norm", "attend_cls"},
    attentive={"layer_decay", "drop_path", "norm", "features"},
    finetune={"attend_cls"},
)


def recipe_for(name: str, protocol: str, blocks: int = 1, given: dict | None = None) -> Recipe:
    """The recipe `name` of a protocol, with the fields of `given` in place of its own."""
    if name not in RECIPES:
        raise InputError(f"recipe {name!r}: unknown; choose one of {', '.join(RECIPES)}")
    kind = kind_of(protocol, blocks)
    own, given = RECIPES[name][kind], dict(given or {})
    if idle := IDLE[kind] & given.keys():
        raise InputError(f"{flag(min(idle))}: does nothing to protocol {protocol}; leave it out")
    recipe = Recipe(**own)
    if protocol == "supervised":
        recipe = replace(recipe, layer_decay=1.0)
    if "epochs" in given:
        given.setdefault("warmup_epochs", recipe.warmup_epochs * given["epochs"] / recipe.epochs)
    recipe = replace(recipe, **given)
    limits = dict(
        epochs=(1, None), batch_size=(1, None), smoothing=(0, 0.999), erase=(0, 1), drop_path=(0, 0.999),
        randaugment=(0, 10), crop_scale=(0, 1), layer_decay=(1e-3, 1), warmup_epochs=(0, recipe.epochs),
    )  # fmt: skip
    for field in fields(Recipe):
        value, (low, high) = getattr(recipe, field.name), limits.get(field.name, (0, None))
        if not isinstance(value, str) and not (low <= value <= (math.inf if high is None else high)):
            right = f"at least {low:g}" if high is None else f"in {low:g} … {high:g}"
            raise InputError(f"{flag(field.name)} {value:g}: must be {right}")
    choices = dict(optimizer=("adamw", "lars", "sgd"), features=("mean", "cls"), norm=("fresh", "pretrained"))
    for key, right in choices.items():
        if getattr(recipe, key) not in right:
            raise InputError(f"{flag(key)} {getattr(recipe, key)!r}: unknown; choose one of {', '.join(right)}")
    return recipe


def flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def kind_of(protocol: str, blocks: int) -> str:
    """Which of a recipe's three parts a protocol follows; partial fine-tuning of no block is the linear probe."""
    frozen = protocol in ("linear", "attentive")
    return protocol if frozen else "linear" if protocol == "partial" and blocks == 0 else "finetune"


# ------------------------------------------------------------------------------------------------------------ heads


class BatchNorm(nn.Module):
    """(B, D) → (B, D), without scale and shift: the global batch's statistics in training, running ones afterwards.

    `nn.SyncBatchNorm` refuses CPU tensors. CAE's code never leaves training here, so that its test images are
    normalised by one another.
    """

    def __init__(self, width: int, eps: float, momentum: float = 0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x, mean, variance = x.float(), self.mean, self.variance
            if self.training:
                n = len(x) * world_size()
                mean = sum_over_ranks(x.sum(dim=0)) / n
                variance = sum_over_ranks((x - mean).square().sum(dim=0)) / n
                self.mean.lerp_(mean.detach(), self.momentum)
                self.variance.lerp_(variance.detach() * n / max(1, n - 1), self.momentum)  # unbiased, as torch's
            return (x - mean) * (variance + self.eps).rsqrt()


class AttentiveHead(nn.Module):
    """CAE's attentive probe, (B, T, D) → (B, classes): one cross-attention without residual or MLP, BN, a linear layer.

    With a single query the keys need no projection: q · (K x) = (Kᵀ q) · x; nor the values: Σ a V x = V Σ a x. The
    keys' bias would add one number to all scores of a head, so there is none.
    """

    def __init__(self, width: int, heads: int, classes: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.zeros(1, width))
        self.q, self.v, self.proj = (nn.Linear(width, width) for _ in range(3))
        self.k = nn.Linear(width, width, bias=False)
        self.norm = BatchNorm(width, eps=1e-5)
        self.out = nn.Linear(width, classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        h, d = self.heads, x.shape[2] // self.heads
        keys, values = (part.weight.unflatten(0, (h, d)) for part in (self.k, self.v))  # (h, d, D)
        asked = (self.q(self.query).view(h, 1, d) @ keys)[:, 0] * d**-0.5  # (h, D)
        weights = (x @ asked.T).softmax(dim=1).to(x.dtype)  # (B, T, h)
        seen = torch.einsum("bth,btd->bhd", weights, x)  # (B, h, D)
        x = torch.einsum("bhi,hoi->bho", seen, values).flatten(1) + self.v.bias
        return self.out(self.norm(self.proj(x)))


class Classifier(nn.Module):
    """An encoder of which the last `blocks` blocks learn, and a head. `frozen` then `forward`: images → logits.

    What does not learn is cut off in `frozen`, so it costs no backward pass, and what it gives can be kept.
    """

    def __init__(self, encoder: ViT, recipe: Recipe, classes: int, protocol: str, blocks: int = 1, seed: int = 0):
        super().__init__()
        self.encoder, self.depth = encoder, len(encoder.blocks)
        self.kind = kind_of(protocol, blocks)
        self.blocks = 0 if self.kind != "finetune" else blocks if protocol == "partial" else self.depth
        if not 0 <= self.blocks <= self.depth:
            raise InputError(
                f"--blocks {blocks}: the encoder has {self.depth}; give 0 (a linear probe) to {self.depth}"
            )
        self.features, self.first = recipe.features, 0 if recipe.attend_cls else 1
        width = encoder.width
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            if self.kind == "attentive":
                self.head = AttentiveHead(width, encoder.settings["heads"], classes)
            else:
                norm = nn.LayerNorm(width, eps=1e-6) if self.blocks else BatchNorm(width, eps=1e-6)
                if self.blocks and recipe.norm == "pretrained":
                    norm = copy.deepcopy(encoder.norm)
                self.head = nn.Sequential(OrderedDict(norm=norm, out=nn.Linear(width, classes)))
            std = recipe.head_std
            nn.init.trunc_normal_(self.head.out.weight, std=std, a=-2 * std, b=2 * std)
            nn.init.zeros_(self.head.out.bias)
        self.head.to(encoder.cls_token.device)
        encoder.requires_grad_(self.blocks == self.depth)
        encoder.norm.requires_grad_(False)  # where blocks learn, the head's norm stands in its place
        for i, block in enumerate(encoder.blocks):
            learns = i >= self.depth - self.blocks
            block.requires_grad_(learns).drop_path = recipe.drop_path * i / max(1, self.depth - 1) * learns

    def embed(self, images: Tensor) -> Tensor:  # (B, 3, H, W) → (B, 1 + N, D)
        x = self.encoder.embed(images)
        cls = self.encoder.cls_token + self.encoder.pos_embed[:, :1]
        return torch.cat([cls.to(x.dtype).expand(len(x), -1, -1), x], dim=1)

    def through(self, x: Tensor, blocks) -> Tensor:
        bias = self.encoder.relative_bias()
        for block in blocks:
            x = block(x, bias)
        return x

    def pool(self, x: Tensor) -> Tensor:
        if self.kind == "attentive":
            return x[:, self.first :]
        return x[:, 0] if self.features == "cls" else x[:, 1:].mean(dim=1)

    @torch.no_grad()
    def frozen(self, images: Tensor) -> Tensor:
        """Normalised (B, 3, H, W) → what the learning part starts from: images, tokens, or the head's input."""
        if self.blocks == self.depth:
            return images
        x = self.through(self.embed(images), self.encoder.blocks[: self.depth - self.blocks])
        return x if self.blocks else self.pool(self.encoder.norm(x)).float()

    def forward(self, x: Tensor) -> Tensor:  # what `frozen` gives → (B, classes)
        if self.blocks == self.depth:
            x = self.embed(x)
        if self.blocks:
            x = self.pool(self.through(x, self.encoder.blocks[self.depth - self.blocks :]))
        return self.head(x).float()

    def logits(self, images: Tensor) -> Tensor:
        return self(self.frozen(images))


def trainable_parameters(classifier: Classifier) -> dict[str, nn.Parameter]:
    return {name: p for name, p in classifier.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------------------------------------------- optimizers


def layer_decay_groups(classifier: Classifier, weight_decay: float, decay: float) -> list[dict]:
    """Groups with their `scale` of the learning rate, decay^(depth + 1 - layer): what learns last moved least (BEiT).

    Layer 0 are stem and class token, layer i the i-th block, depth + 1 last norm, head and, as in BEiT's code, the
    table of relative positions that all blocks share.
    """
    groups: dict[tuple, list] = {}
    for name, p in trainable_parameters(classifier).items():
        layer = int(name.split(".")[2]) + 1 if name.startswith("encoder.blocks.") else classifier.depth + 1
        layer = 0 if name.startswith(("encoder.patch_embed", "encoder.cls_token")) else layer
        exempt = p.ndim <= 1 or name == "encoder.cls_token"
        groups.setdefault((layer, 0.0 if exempt else weight_decay), []).append(p)
    return [
        dict(params=group, weight_decay=wd, scale=decay ** (classifier.depth + 1 - layer))
        for (layer, wd), group in groups.items()
    ]


class LARS(torch.optim.Optimizer):
    """SGD whose steps are as long, for each matrix, as `trust` times its norm (You et al., arXiv 1708.03888).

    v ← momentum · v + trust · ‖w‖ / ‖g + λw‖ · (g + λw);  w ← w - lr · v. Vectors and biases take plain steps.
    """

    def __init__(self, params, lr: float, momentum: float = 0.9, weight_decay: float = 0.0, trust: float = 0.001):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                g = p.grad
                if p.ndim > 1:
                    g = g + group["weight_decay"] * p
                    w_norm, g_norm = p.norm(), g.norm()
                    g = g * torch.where((w_norm > 0) & (g_norm > 0), group["trust"] * w_norm / g_norm, 1.0)
                v = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.sub_(v.mul_(group["momentum"]).add_(g), alpha=group["lr"])


def optimizer_for(classifier: Classifier, recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    groups = layer_decay_groups(classifier, recipe.weight_decay, recipe.layer_decay)
    if recipe.optimizer == "lars":
        return LARS(groups, lr=recipe.peak)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.peak, momentum=0.9)
    return torch.optim.AdamW(groups, lr=recipe.peak, betas=(0.9, 0.999), fused=device.type in ("cpu", "cuda"))


# ---------------------------------------------------------------------------------------------------- augmentations


def single_boxes(rng: StepRandom, sizes, scale, ratio=(3 / 4, 4 / 3)) -> Tensor:
    """`augment.crop_boxes` as MAE's code draws them for probes: one try, cut down to the image."""
    draw = augment.on_host(rng).uniform(4).double()
    sides = torch.as_tensor(sizes).double().expand(len(draw), 2)
    area = sides.prod(dim=1) * (scale[0] + (scale[1] - scale[0]) * draw[:, 0])
    aspect = (math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * draw[:, 1]).exp()
    box = torch.stack([(area / aspect).sqrt(), (area * aspect).sqrt()], dim=1).round().clamp(min=1).minimum(sides)
    return torch.cat([(draw[:, 2:] * (sides - box + 1)).floor(), box], dim=1).long()


DRAWS = 64  # of RandAugment in a step


def rand_augment(images: Tensor, rng: StepRandom, strength: int) -> Tensor:
    """timm's rand-m9-inc1 by torchvision: two operations, each with a chance of 1/2, `strength` tenths of their range.

    (B, 3, H, W) in [0, 1]. torchvision's own default, 9 of 30, would be a third as strong. It draws once for all that
    it is given, so each image takes one of DRAWS draws of the step, wherever it lies. timm's noise on the strength and
    its Invert and SolarizeAdd are left out; Identity is torchvision's.
    """
    from torchvision.transforms import InterpolationMode, v2  # brings the compiler along: two seconds at the start

    one = v2.RandAugment(1, strength, 11, InterpolationMode.BILINEAR, fill=list(augment.MEAN))
    change = v2.Compose([v2.RandomApply([one], p=0.5) for _ in range(2)])
    seeds, choice = rng.generator.integers(0, 2**31, DRAWS).tolist(), augment.on_host(rng).integers(0, DRAWS)
    images = images.clone()
    with torch.random.fork_rng(devices=[]):
        for k in choice.unique().tolist():
            torch.default_generator.manual_seed(seeds[k])
            chosen = (choice == k).nonzero()[:, 0].to(images.device, non_blocking=True)
            images[chosen] = change(images[chosen])
    return images


def erase(images: Tensor, rng: StepRandom, probability: float) -> Tensor:
    """Random erasing (arXiv 1708.04896) with noise, after normalisation, as MAE's: boxes of 2 % to a third of the area.

    torchvision's would erase one box from all images. The noise is one sheet a step, of which each box shows its part.
    """
    H, W = images.shape[2:]
    top, left, height, width = augment.crop_boxes(rng, (H, W), (0.02, 1 / 3), (0.3, 1 / 0.3)).unbind(1)
    height = height * augment.on_host(rng).chance(probability)  # a box without height erases nothing
    noise = torch.from_numpy(rng.generator.standard_normal((3, H, W), dtype="float32"))
    inside = inside_boxes(images, top, top + height, left, left + width)
    return torch.where(inside, upload(noise, images.device), images)


def inside_boxes(images: Tensor, *sides: Tensor) -> Tensor:
    """bool (B, 1, H, W): the pixels of each image between its top, bottom, left and right, (B,) each."""
    sides = torch.stack(sides).to(images.device, non_blocking=True)
    top, bottom, left, right = sides[:, :, None, None, None]
    y = torch.arange(images.shape[2], device=images.device)[:, None]
    x = torch.arange(images.shape[3], device=images.device)
    return (top <= y) & (y < bottom) & (left <= x) & (x < right)


def mix(images: Tensor, targets: Tensor, rng: StepRandom, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """Each image with its neighbour, 0 with 1, 2 with 3, …, by mixup or CutMix; `targets` (B, classes) alike.

    Pairs stay together however many processes share the batch; torchvision's MixUp and CutMix, which mix the batch
    with itself rolled by one, would not. λ is each pair's own, where timm has one for a batch. With λ ~ Beta(α, α),
    mixup keeps λ of every pixel, CutMix all pixels but those in a box of the area 1 - λ, cut at the border: either
    way the label keeps what share of the image stayed.
    """
    if not (mixup or cutmix):
        return images, targets
    H, W = images.shape[2:]
    rng = augment.on_host(rng)
    cut = rng.chance(0.5 if mixup and cutmix else float(cutmix > 0))
    soft, hard, center = rng.beta(mixup or 1.0, mixup or 1.0), rng.beta(cutmix or 1.0, cutmix or 1.0), rng.uniform(2)
    cut, soft, hard, center = (x[::2].repeat_interleave(2, dim=0) for x in (cut, soft, hard, center))
    half = (1 - hard).sqrt() / 2
    y, x = (center[:, 0] * H).floor(), (center[:, 1] * W).floor()
    h, w = (half * H).floor(), (half * W).floor()
    sides = (y - h).clamp(min=0), (y + h).clamp(max=H), (x - w).clamp(min=0), (x + w).clamp(max=W)
    cut, soft = (t.to(images.device, non_blocking=True)[:, None, None, None] for t in (cut, soft))
    keep = torch.where(cut, (~inside_boxes(images, *sides)).float(), soft.expand(-1, 1, H, W))
    share = keep.mean(dim=(2, 3))  # (B, 1)

    def other(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)

    return other(images).lerp(images, keep), other(targets).lerp(targets, share)


def prepared(images, labels: Tensor, classes: int, recipe: Recipe, size: int, rng: StepRandom, probe: bool):
    """uint8 images → normalised (B, 3, size, size), and targets (B, classes), with all that the recipe draws."""
    if recipe.crop_scale:
        draw = single_boxes if probe else augment.crop_boxes
        boxes = draw(rng, augment.sizes(images), (recipe.crop_scale, 1.0))
        images = augment.crop_resize(images, boxes, size, rng.chance(0.5))
    else:
        images = augment.center_crop_resize(images, size)
    if recipe.randaugment:
        images = rand_augment(images, rng, recipe.randaugment)
    images = augment.normalize(images)
    if recipe.erase:
        images = erase(images, rng, recipe.erase)
    return mix(images, F.one_hot(labels, classes).float(), rng, recipe.mixup, recipe.cutmix)


# --------------------------------------------------------------------------------------------------------- training


@dataclass
class Kept:
    """What `Classifier.frozen` gave for all images of a set, in their place: x (n, …) and labels (n,)."""

    x: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, orders, device):
        yield from ((self.x[upload(order, device)], order) for order in orders)


SAVE_EVERY = 30.0  # seconds between checkpoints, at the ends of epochs
BAR = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}, {remaining} left]"


def train(
    classifier: Classifier, source, classes: int, recipe: Recipe, device, seed: int = 0, directory: Path | None = None,
    precision: str = "fp32", accumulate: int = 1, resume: bool = True,
) -> None:  # fmt: skip
    """Train in place on `source`, an ImageSet or what was `Kept` of one; ends in evaluation mode.

    With a `directory`, checkpoint.pt and log.jsonl lie there, and the same call continues. `accumulate` parts of a step
    save memory, not more: batch norm still sees the whole batch, as only the frozen part before it is done in parts.
    """
    kept, size, ranks = isinstance(source, Kept), classifier.encoder.image_size, world_size()
    share, rest = divmod(recipe.batch_size, ranks * accumulate)
    mixes = bool(recipe.mixup or recipe.cutmix)
    if rest or not share or (mixes and share % 2):
        pairs = ", each an even number of images to mix" if mixes else ""
        raise InputError(
            f"batch size {recipe.batch_size}: cannot be shared by {ranks} processes x {accumulate} parts{pairs}"
        )
    steps_per_epoch = len(source) // recipe.batch_size
    if steps_per_epoch == 0:
        raise InputError(f"batch size {recipe.batch_size}: larger than the {len(source)} images; give --batch-size")
    steps, warmup = recipe.epochs * steps_per_epoch, round(recipe.warmup_epochs * steps_per_epoch)

    parameters = trainable_parameters(classifier)
    optimizer = optimizer_for(classifier, recipe, device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    settings = dict(
        asdict(recipe), kind=classifier.kind, blocks=classifier.blocks, classes=classes, images=len(source), seed=seed,
        precision=precision, accumulate=accumulate, encoder=checksum(classifier.encoder),
    )  # fmt: skip
    run = Progress(directory, settings, classifier, optimizer, scaler, resume)

    def rows_of(part: int) -> slice:
        begin = (part * ranks + rank()) * share
        return slice(begin, begin + share)

    def orders():
        for step in range(run.step, steps):
            epoch, place = divmod(step, steps_per_epoch)
            order = epoch_order(seed, epoch, len(source))[place * recipe.batch_size :][: recipe.batch_size]
            yield from (order[rows_of(part)] for part in range(accumulate))

    batches, labels = source.batches(orders(), device), source.labels.to(device)

    def parts_of(step: int):
        """What the learning part starts from and its targets, part by part."""
        for part in range(accumulate):
            x, index = next(batches)
            y = labels[upload(index, device)]
            if kept:
                y = F.one_hot(y, classes).float()
            else:
                rng = StepRandom(seed, step, recipe.batch_size, rows_of(part), device)
                x, y = prepared(x, y, classes, recipe, size, rng, probe=classifier.blocks == 0)
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    x = classifier.frozen(x)
            yield x, y  # outside of autocast, which would go on

    classifier.train()
    begin, total = time.perf_counter(), torch.zeros((), device=device)
    what = f"{classifier.kind} {classifier.blocks}/{classifier.depth}"
    with tqdm(total=steps, initial=run.step, desc=what, bar_format=BAR, leave=False, disable=rank() > 0) as bar:
        for step in range(run.step, steps):
            rate = learning_rate(step, steps, warmup, recipe.peak, recipe.min_lr)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            torch.manual_seed(seed + (step * ranks + rank()) * 1_000_003)  # drop path's only
            parts = parts_of(step)
            if classifier.blocks == 0:
                parts = [tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))]
            for x, y in parts:
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    scores = classifier(x)
                loss = F.cross_entropy(scores, y, label_smoothing=recipe.smoothing) * len(x) / (share * accumulate)
                scaler.scale(loss).backward()
                total += loss.detach()
            average_gradients(parameters.values())
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            bar.update()
            if (step + 1) % steps_per_epoch == 0:
                loss, seconds = (sum_over_ranks(total) / ranks / steps_per_epoch).item(), time.perf_counter() - begin
                if not math.isfinite(loss):
                    raise InputError(f"loss: not finite in epoch {(step + 1) // steps_per_epoch}; try a lower --lr")
                speed = steps_per_epoch * recipe.batch_size / seconds
                row = dict(step=step + 1, epoch=(step + 1) // steps_per_epoch, loss=loss, lr=rate)
                run.end_epoch(row | dict(images_per_second=round(speed, 1)), last=step + 1 == steps)
                bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} images/s", refresh=False)
                begin, total = time.perf_counter(), torch.zeros((), device=device)
    classifier.eval()


def average_gradients(parameters) -> None:
    """Over ranks, in one reduction after the backward pass: for a ViT-B 344 MB, some milliseconds between GPUs."""
    if world_size() == 1:
        return
    gradients = [p.grad for p in parameters]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    for g, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        g.copy_(part.view_as(g))


def checksum(module: nn.Module) -> int:
    value = 0
    for tensor in module.state_dict().values():
        value = zlib.crc32(tensor.detach().cpu().contiguous().numpy(), value)
    return value


class Progress:
    """checkpoint.pt and log.jsonl of one training, which rank 0 alone reads and writes; without a directory, nothing.

    The log is part of the checkpoint, so the two never disagree.
    """

    def __init__(self, directory, settings: dict, classifier: Classifier, optimizer, scaler, resume: bool):
        self.directory, self.settings, self.classifier = directory, settings, classifier
        self.states, self.saved = dict(optimizer=optimizer, scaler=scaler), time.monotonic()
        self.step, self.rows = 0, []
        found = [self.read() if directory and resume and rank() == 0 else None]
        if directory and world_size() > 1:
            dist.broadcast_object_list(found)
        if found[0] is not None:
            self.step, self.rows = found[0]["step"], found[0]["log"]
            classifier.load_state_dict(found[0]["classifier"], strict=False)  # what is frozen is not in it
            for name, holder in self.states.items():
                holder.load_state_dict(found[0][name])

    def read(self) -> dict | None:
        path = self.directory / "checkpoint.pt"
        if not path.exists():
            return None
        saved = files.load(path)
        if not isinstance(saved, dict) or "settings" not in saved:
            raise InputError(f"{path}: not a checkpoint of evaluate.py; give --resume never to start over")
        if differs := files.differences(saved["settings"], self.settings):
            raise InputError(f"{path}: with other settings ({differs}); give --resume never to start over")
        return saved

    def end_epoch(self, row: dict, last: bool) -> None:
        self.rows.append(row)
        if self.directory is None or rank() > 0 or not (last or time.monotonic() - self.saved >= SAVE_EVERY):
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        learned = {
            name: value
            for name, value in self.classifier.state_dict().items()
            if name in trainable_parameters(self.classifier) or name.startswith("head.")
        }
        states = {name: holder.state_dict() for name, holder in self.states.items()}
        tree = dict(step=row["step"], settings=self.settings, log=self.rows, classifier=learned) | states
        files.save(self.directory / "checkpoint.pt", tree)
        lines = [json.dumps(line) for line in (self.settings, *self.rows)]
        files.write_text(self.directory / "log.jsonl", "\n".join(lines) + "\n")
        self.saved = time.monotonic()
