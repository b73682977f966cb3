"""All that is random in a run: functions of (seed, step) and of (seed, epoch), and of nothing else."""

import copy
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from runtime.errors import InputError
from runtime.fast_paths import upload
from runtime.ranks import rank, world_size


class StepRandom:
    """All that is random in one step, a function of (seed, step) alone.

    Every call draws for the whole global batch (`total` images) and returns the rows of this rank, so that what an
    image meets does not depend on how many processes share the work. The draws are made on the CPU: the same numbers
    on every device, and no generator state that a checkpoint would have to carry.
    """

    def __init__(self, seed: int, step: int, total: int, rows: slice | None = None, device="cpu"):
        self.generator = np.random.default_rng((seed, step))
        self.total, self.rows, self.device = total, rows or slice(0, total), torch.device(device)
        self.drawn, self.places = [], itertools.count()

    def of(self, rows: slice) -> "StepRandom":
        """The same draws from the first on, for other rows of the batch. What has been drawn is not drawn again."""
        other = copy.copy(self)
        other.rows, other.places = rows, itertools.count()
        return other

    def child(self) -> "StepRandom":
        """One with draws of its own, kept on the CPU, as many as it takes: what its parent draws next is the same."""
        return self._once(lambda: StepRandom(int(self.generator.integers(2**63)), 0, self.total)).of(self.rows)

    def _once(self, draw: Callable, *args, **options):
        """`draw(...)`, or what it has returned for other rows."""
        if (place := next(self.places)) == len(self.drawn):
            self.drawn.append(draw(*args, **options))
        return self.drawn[place]

    def _tensor(self, rows: np.ndarray) -> Tensor:
        return upload(torch.from_numpy(rows), self.device)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """float32 (B, *shape), uniform in [low, high)."""
        units = self._once(self.generator.random, (self.total, *shape), dtype=np.float32)
        return self._tensor(units[self.rows]) * (high - low) + low

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int64 (B, *shape), uniform in low … high-1."""
        return self._tensor(self._once(self.generator.integers, low, high, (self.total, *shape))[self.rows])

    def beta(self, a: float, b: float, *shape: int) -> Tensor:
        """float32 (B, *shape), from Beta(a, b)."""
        drawn = self._once(self.generator.beta, a, b, (self.total, *shape))
        return self._tensor(drawn[self.rows].astype(np.float32))

    def chance(self, probability: float) -> Tensor:
        """bool (B,), True with the given probability."""
        return self._tensor(self._once(self.generator.random, self.total)[self.rows] < probability)

    def permutation(self, n: int) -> Tensor:
        """int64 (B, n), one uniform permutation of 0 … n-1 per image: the order of float64 noise (float32 in MAE)."""
        noise = self._once(self.generator.random, (self.total, n))
        return self._tensor(noise[self.rows].argsort(axis=1))


def epoch_order(seed: int, epoch: int, n: int) -> Tensor:
    """int64 (n,): the order in which epoch `epoch` visits the n images, a function of (seed, epoch) alone."""
    return torch.from_numpy(np.random.default_rng((seed, epoch, 1)).permutation(n))


def rows_of_rank(batch_size: int, accumulate: int, even: bool = False) -> list[slice]:
    """The rows of the global batch that this rank computes, a slice for each part of the step."""
    ranks = world_size()
    share, rest = divmod(batch_size, ranks * accumulate)
    if rest or not share or (even and share % 2):
        parts = f"{ranks} processes x {accumulate} parts" + ", each an even number of images to mix" * even
        raise InputError(f"batch size {batch_size}: cannot be shared by {parts}")
    return [slice(k * share, (k + 1) * share) for k in range(rank(), ranks * accumulate, ranks)]


def orders(seed: int, images: int, batch_size: int, accumulate: int, steps) -> Iterator[tuple[int, Tensor]]:
    """For each part of each of `steps`: the epoch, and the positions of the images that this rank takes."""
    rows, per_epoch, drawn = rows_of_rank(batch_size, accumulate), images // batch_size, None
    for step in steps:
        epoch, place = divmod(step, per_epoch)
        if epoch != drawn:  # once an epoch: a million images take a tenth of a second
            drawn, order = epoch, epoch_order(seed, epoch, images)
        yield from ((epoch, order[place * batch_size :][part]) for part in rows)
