"""Images in memory, and the cache: a set that fits there is decoded once, into a file that later starts map and check.

Cache files lie in $MINMIM_CACHE, else in minmim/ in the user's cache folder. Their names hold a hash of what they were
made from, so that any change of the images makes a new file. Old ones may be deleted at any time. One process of each
machine makes them while the others wait.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from common import upload
from runtime import files
from runtime.errors import InputError
from runtime.ranks import rank, say, world_size

FORMAT = b"minMIM4\n"  # of cache files, with its version


def pack(images: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Images (3, H_i, W_i) end to end as one flat uint8 tensor, and their sizes, int64 (B, 2)."""
    return torch.cat([image.reshape(-1) for image in images]), torch.tensor([image.shape[1:] for image in images])


class Packed:
    """Images of any sizes in memory: one flat uint8 tensor on any device, and their sizes (N, 2) on the CPU."""

    def __init__(self, flat: Tensor, sizes: Tensor):
        self.flat, self.sizes = flat, sizes
        self.ends = 3 * sizes.prod(dim=1).cumsum(0)  # (N,) where each image ends in `flat`
        self.uniform = bool((sizes == sizes[:1]).all())

    def __len__(self) -> int:
        return len(self.sizes)

    def first(self, n: int) -> "Packed":
        return Packed(self.flat[: int(self.ends[n - 1])], self.sizes[:n])

    def at(self, index: Tensor) -> "Packed":
        return Packed(*pack([self.view(i) for i in index.tolist()]))

    def view(self, i: int) -> Tensor:
        (h, w), end = self.sizes[i].tolist(), int(self.ends[i])
        return self.flat[end - 3 * h * w : end].view(3, h, w)

    def images(self, index: Tensor, device: torch.device) -> Tensor | list[Tensor]:
        """(B,) → uint8 (B, 3, H, W) if all images of the set have one size, else a list of (3, H_i, W_i)."""
        if self.uniform:
            whole = self.flat.view(-1, 3, *self.sizes[0].tolist())
            rows = upload(index, whole.device)
            return whole.index_select(0, rows).to(device)  # moves rows, where [index] moves numbers
        flat, sizes = pack([self.view(i) for i in index.tolist()])
        batch = Packed(flat.to(device), sizes)  # one transfer
        return [batch.view(i) for i in range(len(batch))]


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def cache_folder() -> Path:
    if folder := os.environ.get("MINMIM_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minmim"


def cached(stem: str, made_from: bytes, chunks: Callable[[], Iterable]) -> tuple[Packed, Tensor, list[str]]:
    """Pixels, labels and names of bad images, from the cache file if it is there and sound, else from `chunks()`."""
    path = cache_folder() / f"{stem}-{hashlib.sha256(FORMAT + made_from).hexdigest()[:16]}.pt"
    if path.exists():
        try:
            return read_cache(path)
        except InputError:
            say(f"{path}: the cache is damaged; making it again")
    write_cache(path, chunks())
    return read_cache(path)


def remembered(stem: str, made_from: bytes, compute: Callable[[], list[float]]) -> list[float]:
    """Two numbers that `compute()` finds, from the cache folder if they are there."""
    path = cache_folder() / f"{stem}-{hashlib.sha256(made_from).hexdigest()[:16]}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        low, high = json.loads(path.read_text())
        return [float(low), float(high)]
    numbers = compute()
    files.write_text(path, json.dumps(numbers))
    return numbers


def write_cache(path: Path, chunks: Iterable[tuple[Tensor, Tensor, Tensor, list[str]]]) -> None:
    """A chunk is flat pixels, sizes (b, 2), labels (b,), and the names of images left out."""
    *tensors, names = zip(*chunks, strict=True)
    flat, sizes, labels = map(torch.cat, tensors)
    bad = list(chain(*names))
    if not len(labels):
        raise InputError(f"{bad[0]}: does not decode, nor does any other image; give a folder of images")
    advice = "; make room, or set MINMIM_CACHE"
    files.write_whole(path, lambda file: torch.save((flat, sizes, labels, bad), file), advice)


def read_cache(path: Path) -> tuple[Packed, Tensor, list[str]]:
    """What `write_cache` wrote, after checking every byte; the pixels are mapped from the file."""
    flat, sizes, labels, bad = files.load(path, mmap=True)
    return Packed(flat, sizes), labels, bad


def first_on_node() -> bool:
    return int(os.environ.get("LOCAL_RANK", rank())) == 0


def in_turn(work: Callable):
    """work() on rank 0, then on the first rank of each other node, then on all others, who find the work done.

    Nodes may or may not share their disks. An error ends it on every rank, with the same line.
    """
    if world_size() == 1:
        return work()
    # A group of its own, as downloading and decoding may outlast the default group's time limit. It stays until the
    # program ends: torch 2.6 may hang where a group goes whose thread is not yet done with the last collective.
    group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    my_turn = 0 if rank() == 0 else 1 if first_on_node() else 2
    for turn in range(3):
        error, errors = None, [None] * world_size()
        if turn == my_turn:
            try:
                result = work()
            except Exception as e:
                error = e
        dist.all_gather_object(errors, error and (str(error) or repr(error)), group=group)
        if any(errors):
            raise error or InputError(next(filter(None, errors)))
    return result
