"""Speed: the machine, the seconds and the memory of calls on it, and the columns of bench.py's tables."""

import math
import multiprocessing
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

# Heads of the table for the fields of a row; a field without one is for --json alone.
HEADS = dict(
    name="what", gpus="GPUs", batch="batch", images_per_gpu="batch", precision="type", images_per_second="images/s",
    torchvision_images_per_second="theirs", gflop="GFLOP", share="share", megabytes="MB", cost="cost", by_hf="x hf",
    by_lightly="x lightly", by_torchvision="x theirs", first_run_seconds="first s", first_step_seconds="to step s",
    second_epoch_seconds="epoch s", total_seconds="all s", resident_gib="GiB", checkpoint_seconds="save s",
    checkpoint_megabytes="MB", tflop_per_gpu="TFLOP", compute_ms="ms", all_reduce_megabytes="sum MB",
    all_reduce_ms="sum ms", gathered_keys_megabytes="keys MB", memory_gib="GiB", first_limit="limit",
    host_ms="host ms", launches="launches", draw_ms="draw ms",
)  # fmt: skip
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes that getrusage counts memory in


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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT


def in_a_child(function: Callable, *arguments):
    """What `function(threads, *arguments)` returns in a new process; None if that has too little memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=forget_main) as pool:
        try:
            return pool.submit(function, torch.get_num_threads(), *arguments).result()
        except (BrokenProcessPool, torch.OutOfMemoryError):
            return None


def forget_main() -> None:
    """Have torch find in its cache what another process has compiled.

    It looks for a pickle, in which the first module that holds torch is named; this one would hold it in a child alone.
    """
    sys.modules.pop("__mp_main__", None)


def processor() -> str:
    """The model of the CPU without marks and clock: "AMD EPYC 7B13", "Intel Xeon Platinum 8481C"."""
    file = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", file.read_text()) if file.exists() else None
    name = model[1] if model else platform.processor() or platform.machine()
    return " ".join(re.sub(r"\(\w+\)|@.*|\bCPU\b|(\d+-Core )?\bProcessor\b", " ", name).split())


def folder(facts: dict) -> str:
    """Where `bench.py --json` keeps this machine's results: "amd-epyc-torch2", of the device and torch's version."""
    words = re.findall(r"[a-z0-9]+", facts["device"].lower())
    return "-".join([*words, "torch" + facts["versions"]["torch"].split(".")[0]])


def columns(rows: list[dict]) -> str:
    """The rows in columns, at most 80 characters wide for every table of bench.py."""
    fields = [f for f in HEADS if any(f in row for row in rows)]

    def cell(value) -> str:
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
        return "" if value is None else str(value)

    cells = [[HEADS[f] for f in fields], *([cell(row.get(f)) for f in fields] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in cells)
    return "\n".join(map(" ".join, lines))
