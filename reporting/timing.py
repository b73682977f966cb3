"""Seconds and memory of calls: contenders take turns, and each peak is measured in a process of its own."""

import math
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch


def interleave(contenders: dict[str, Callable], repeats: int, device: torch.device, cpu_time=False) -> dict[str, float]:
    """Median seconds of one call of each contender, over `repeats` rounds in which all take turns."""
    clock = time.process_time if cpu_time else time.perf_counter

    def seconds(call: Callable, calls: int) -> float:
        begin = clock()
        for _ in range(calls):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (clock() - begin) / calls

    calls = {}
    for name, call in contenders.items():  # warm up, and see how many calls a GPU needs to be timed well
        seconds(call, 2)
        calls[name] = max(1, math.ceil(0.2 / seconds(call, 1))) if device.type == "cuda" else 1
    rounds = [{name: seconds(call, calls[name]) for name, call in contenders.items()} for _ in range(repeats)]
    return {name: statistics.median(times[name] for times in rounds) for name in contenders}


def held(what: str) -> int:
    """Bytes of memory that this process holds (VmRSS) or held at its peak (VmHWM); the peak where there is no /proc.

    Linux's getrusage would count the parent's peak too.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(x.split()[1]) * 1024 for x in status.read_text().splitlines() if x.startswith(what + ":"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_a_child(function: Callable, *arguments):
    """What `function(pipe, threads, *arguments)` sends from a new process; None if that dies, of too little memory."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=function, args=(theirs, torch.get_num_threads(), *arguments))
    child.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        return None
    finally:
        child.join()
