"""The processes of a run, its ranks: how many there are, and what they exchange."""

import functools
import sys

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from runtime.errors import printable


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def say(*lines: str) -> None:
    """Print lines above the progress bar, once for all processes."""
    for line in lines if rank() == 0 else ():
        tqdm.write(printable(line), file=sys.stderr)


@functools.cache
def say_once(line: str) -> None:
    """`say`, unless this process has said it: whoever measures at the end opens the images again."""
    say(line)


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks. Every rank's loss depends on every rank's input, so the gradients are summed over ranks too."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    backward = forward


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of `x` over all ranks, with gradient; `x` itself in a single process."""
    return _SumOverRanks.apply(x) if world_size() > 1 else x


@torch.no_grad()
def gather_over_ranks(x: Tensor) -> Tensor:
    """(B, …) on each rank → (B·ranks, …) in rank order, without gradient."""
    if world_size() == 1:
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)
