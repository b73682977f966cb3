"""Work that one process of each machine does while the others wait."""

import io
import os
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist
from made_images import caches, make_folder, pixels, spoil

from inputs import image_cache, image_files, image_sets
from runtime.errors import InputError


def open_on_rank(rank, folder, meeting, out):
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    decoded, plain = [], image_files.decode
    image_files.decode = lambda *path: decoded.append(path) or plain(*path)
    sys.stderr = io.StringIO()
    try:
        image_sets.open_set(str(folder))
    except InputError as error:
        line = str(error)
    opened = image_sets.open_set(str(folder), skip_bad_images=True)  # the error has left the ranks fit to go on
    result = [line, len(opened), opened.images(torch.arange(len(opened))).sum().item()]
    out.put((rank, result, len(decoded) > 0, sys.stderr.getvalue().count("left out")))


def test_one_rank_builds_the_cache_and_its_error_reaches_all(tmp_path, cache):
    make_folder(tmp_path / "set", n=5)
    spoil(tmp_path / "set" / "cat" / "003.png")
    context = torch.multiprocessing.get_context("spawn")
    out = context.Queue()
    ranks = [context.Process(target=open_on_rank, args=(i, tmp_path / "set", tmp_path / "meet", out)) for i in (0, 1)]
    for process in ranks:
        process.start()
    (_, first, worked, said), (_, second, worked_too, said_too) = sorted(out.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join()
    assert "cat/003.png: does not decode" in first[0]
    assert first[1:] == [7, sum(int(pixels(seed).sum()) for seed in (0, 2, 4, 100, 102, 103, 104))]
    assert first == second and (worked, worked_too) == (True, False) and (said, said_too) == (1, 0)
    assert len(caches(cache)) == 1


@pytest.mark.parametrize("shared", [True, False])
def test_turns_of_several_nodes(monkeypatch, shared):
    """Four ranks on two nodes, simulated by threads: who works when, whether or not the nodes share a disk."""
    ranks, local = 4, [0, 1, 0, 1]
    me, barrier, slots = threading.local(), threading.Barrier(ranks), [None] * ranks

    def gather(into, value, group):
        slots[me.rank] = value
        barrier.wait()
        into[:] = slots
        barrier.wait()

    monkeypatch.setattr(image_cache, "world_size", lambda: ranks)
    monkeypatch.setattr(image_cache, "rank", lambda: me.rank)
    monkeypatch.setattr(image_cache, "first_on_node", lambda: local[me.rank] == 0)
    monkeypatch.setattr(image_cache.dist, "new_group", lambda **_: None)
    monkeypatch.setattr(image_cache.dist, "destroy_process_group", lambda _: None)
    monkeypatch.setattr(image_cache.dist, "all_gather_object", gather)
    disks, built, results = [set(), set()], [], [None] * ranks

    def work():
        time.sleep(0.1 * (local[me.rank] == 0))  # who does not wait for its turn is ahead now
        disk = disks[0 if shared else me.rank // 2]
        if "set" not in disk:
            built.append(me.rank)
            disk.add("set")
        return me.rank

    def run(rank):
        me.rank = rank
        results[rank] = image_cache.in_turn(work)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert built == ([0] if shared else [0, 2]) and results == [0, 1, 2, 3]


def test_first_on_node(monkeypatch):
    assert image_cache.first_on_node()
    monkeypatch.setattr(image_cache, "rank", lambda: 3)
    assert not image_cache.first_on_node()
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert image_cache.first_on_node()
