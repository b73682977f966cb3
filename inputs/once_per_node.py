"""Work that one process of each machine does while the others wait: downloading, decoding, writing the cache."""

import os
import sys
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist
from tqdm import tqdm

from runtime.errors import InputError
from runtime.ranks import rank, world_size


def first_on_node() -> bool:
    return int(os.environ.get("LOCAL_RANK", rank())) == 0


def say(line: str) -> None:
    if first_on_node():
        tqdm.write(line, file=sys.stderr)


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
