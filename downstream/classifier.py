"""An encoder with a classifier's head: what of it learns in the papers' probes, partial and full fine-tuning.

| protocol       | what learns                                       | from                       | by    |
| -------------- | ------------------------------------------------- | -------------------------- | ----- |
| linear --paper | a linear layer behind batch norm                  | the class token            | LARS  |
| attentive      | a query, its cross-attention, a linear layer      | the patches                | SGD   |
| partial        | the last K blocks, a last norm, a linear layer    | the mean patch             | AdamW |
| finetune       | everything                                        | the mean patch             | AdamW |
| supervised     | everything, from random weights                   | the mean patch             | AdamW |

The embeddings (stem, class token, positions if the recipe has them learned) learn only where all blocks do. So
`partial` with K = 0 is the linear probe, as in CMAE (§4.5), and with K = depth it is `finetune`. `supervised` is what
pretraining has to beat: it follows the same recipe, but all layers have one learning rate, as the first ones hold
nothing to keep yet.
"""

import copy
from collections import OrderedDict

import torch
from torch import Tensor, nn

from common import ViT, initialize
from downstream.recipes import Recipe, kind_of
from runtime.errors import InputError
from runtime.ranks import sum_over_ranks, world_size


class BatchNorm(nn.Module):
    """(B, D) → (B, D), without scale and shift: the global batch's statistics in training, running ones afterwards.

    `nn.SyncBatchNorm` refuses CPU tensors. CAE's code never leaves training here, so that its test images are
    normalised by one another.
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps, self.momentum = eps, 0.1
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return batch_norm(x, self.mean, self.variance, self.training, self.momentum, self.eps)


def batch_norm(x: Tensor, mean: Tensor, variance: Tensor, training: bool, momentum: float, eps: float) -> Tensor:
    """(B, C, …) → float32: in training by the statistics over all ranks, towards which the running ones (C,) move."""
    with torch.autocast(x.device.type, enabled=False):
        x = x.float().movedim(1, -1)
        if training:
            running, rest = (mean, variance), tuple(range(x.ndim - 1))
            n = x.numel() // len(mean) * world_size()
            mean = sum_over_ranks(x.sum(rest)) / n
            variance = sum_over_ranks((x - mean).square().sum(rest)) / n
            running[0].lerp_(mean.detach(), momentum)
            running[1].lerp_(variance.detach() * n / max(1, n - 1), momentum)  # unbiased, as torch's
        return ((x - mean) * (variance + eps).rsqrt()).movedim(-1, 1)


class AttentiveHead(nn.Module):
    """CAE's attentive probe, (B, T, D) → (B, classes): one cross-attention without residual or MLP, BN, a linear layer.

    With a single query the keys need no projection: q · (K x) = (Kᵀ q) · x; nor the values: Σ a V x = V Σ a x. The
    keys' bias would add one number to all scores of a head, so there is none. CAE's code also has layer norms that
    learn before q, k and v, and Nesterov's momentum, which its paper does not mention.
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
            right = f"give 0 (a linear probe) to {self.depth}"
            raise InputError(f"--blocks {blocks}: the encoder has {self.depth}; {right}")
        self.features, self.first, width = recipe.features, 0 if recipe.attend_cls else 1, encoder.width
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
        if recipe.positions == "learned" and self.blocks == self.depth and encoder.relative_table is None:
            positions = nn.Parameter(encoder.pos_embed.clone())
            del encoder.pos_embed  # a buffer until now
            encoder.pos_embed = positions
        encoder.requires_grad_(self.blocks == self.depth)
        encoder.norm.requires_grad_(False)  # where blocks learn, the head's norm stands in its place
        for i, block in enumerate(encoder.blocks):
            learns = i >= self.depth - self.blocks
            block.requires_grad_(learns).drop_path = recipe.drop_path * i / max(1, self.depth - 1) * learns

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
        x = self.through(embed(self.encoder, images), self.encoder.blocks[: self.depth - self.blocks])
        return x if self.blocks else self.pool(self.encoder.norm(x)).float()

    def forward(self, x: Tensor) -> Tensor:  # what `frozen` gives → (B, classes)
        if self.blocks == self.depth:
            x = embed(self.encoder, x)
        if self.blocks:
            x = self.pool(self.through(x, self.encoder.blocks[self.depth - self.blocks :]))
        return self.head(x).float()

    def logits(self, images: Tensor) -> Tensor:
        return self(self.frozen(images))


def embed(encoder: ViT, images: Tensor) -> Tensor:  # (B, 3, H, W) → (B, 1 + N, D)
    x, cls = encoder.embed(images), encoder.cls_token + encoder.pos_embed[:, :1]
    return torch.cat([cls.to(x.dtype).expand(len(x), -1, -1), x], dim=1)


def trainable_parameters(classifier: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in classifier.named_parameters() if p.requires_grad}
