"""How weights learn: a learning rate for each layer (BEiT), LARS, and one step of any optimizer on all ranks."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from downstream.classifier import Classifier, trainable_parameters
from downstream.recipes import Recipe
from runtime.ranks import world_size

EMBEDDINGS = ("encoder.patch_embed", "encoder.cls_token", "encoder.pos_embed")


def layer_decay_groups(classifier: Classifier, weight_decay: float, decay: float) -> list[dict]:
    """Groups with their `scale` of the learning rate, decay^(depth + 1 - layer): what learns last moved least (BEiT).

    Layer 0 are stem, class token and learned positions, layer i is the i-th block, and depth + 1 are the last norm, the
    head and, as in BEiT's code, the table of relative positions that all blocks share.
    """
    groups: dict[tuple, list] = {}
    for name, p in trainable_parameters(classifier).items():
        layer = int(name.split(".")[2]) + 1 if name.startswith("encoder.blocks.") else classifier.depth + 1
        layer = 0 if name.startswith(EMBEDDINGS) else layer
        exempt = p.ndim <= 1 or name in EMBEDDINGS
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


def take_step(optimizer: torch.optim.Optimizer, losses: Iterable[Tensor], rate: float, scaler) -> Tensor:
    """One step down the sum of `losses` at a learning rate → that sum, without gradient.

    A loss may be made when its turn comes, so that the graph of only one is held at a time.
    """
    total = 0.0
    for loss in losses:
        scaler.scale(loss).backward()
        total = total + loss.detach()
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)
    average_gradients([p for group in optimizer.param_groups for p in group["params"]])
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Over ranks, in one reduction after the backward pass: for a ViT-B 344 MB, some milliseconds between GPUs."""
    if world_size() == 1:
        return
    gradients = [p.grad for p in parameters]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    for g, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        g.copy_(part.view_as(g))
