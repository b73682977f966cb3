"""Seconds of train.py as it is typed: from the command to its first step, of an epoch, of a checkpoint."""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from methods import METHODS
from reporting.machine import HERE
from reporting.timing import interleave
from runtime import files
from runtime.errors import InputError


def command(args, name: str, out: Path, *more: str) -> list[str]:
    fields = {f.name for f in dataclasses.fields(METHODS[name].Config)}
    keys = ["data", "data_root", "classes", "model", "width", "depth", "heads", "image_size", "patch_size", "device"]
    keys += [key for key in ("decoder_width", "decoder_depth", "decoder_heads") if key in fields]
    given = {key: vars(args)[key] for key in keys if vars(args)[key] is not None}
    given |= dict(method=name, batch_size=args.batch_size[-1], precision=args.precision[0], lr=1e-3, out=out)
    flags = [word for key, value in given.items() for word in ("--" + key.replace("_", "-"), str(value))]
    flags += ["--compile" if args.compile else "--no-compile", "--no-evaluate", "--resume", "never"]
    return [sys.executable, str(HERE / "train.py"), *flags, *more]


def run_train(words: list[str], out: Path) -> dict:
    """Seconds from the command to its first logged step and to its end, and the most it held in memory."""
    begin, first, pid = time.perf_counter(), None, 0
    log, said = out / "log.jsonl", out.with_suffix(".err")
    with open(said, "w") as errors:
        child = subprocess.Popen(words, stdout=errors, stderr=errors)
        while not pid:
            time.sleep(0.005)
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if first is None and log.exists() and log.read_text().count("\n") > 1:
                first = time.perf_counter() - begin
    total = time.perf_counter() - begin
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        tail = said.read_text().strip().splitlines()
        raise InputError(f"train.py: failed ({tail[-1] if tail else child.returncode}); try {' '.join(words[1:])}")
    resident = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    rows = [json.loads(line) for line in log.read_text().splitlines()[1:]]
    return dict(first_step_seconds=first, total_seconds=total, resident_gib=resident / 2**30, rows=rows)


def bench_epoch(args, device: torch.device) -> list[dict]:
    """Two epochs by train.py, from command to weights on disk; the second is past start and compilation."""
    rows = []
    for name in args.method:
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory) / "run"
            run = run_train(command(args, name, out, "--epochs", "2", "--warmup-epochs", "1"), out)
        log = run.pop("rows")
        last, half = log[-1], next(row for row in log if row["epoch"] >= 1)
        seconds = (last["seconds"] - half["seconds"]) / (last["epoch"] - half["epoch"])
        row = dict(name=name, batch=args.batch_size[-1], precision=args.precision[0], second_epoch_seconds=seconds)
        rows.append(row | dict(images_per_second=last["step"] / 2 * args.batch_size[-1] / seconds) | run)
    return rows


def bench_start(args, device: torch.device) -> list[dict]:
    """Seconds from the command to the first step, the most held in memory, and the seconds of one checkpoint."""
    rows = []
    for name in args.method:
        with tempfile.TemporaryDirectory() as directory:
            outs, more = [Path(directory) / str(i) for i in range(args.repeats)], ("--max-steps", "1")
            runs = [run_train(command(args, name, out, *more), out) for out in outs]
            tree = files.load(outs[-1] / "checkpoint.pt")
            file = Path(directory) / "checkpoint.pt"
            saving = interleave({"save": lambda f=file, t=tree: files.save(f, t)}, args.repeats, torch.device("cpu"))
            row = dict(name=name, first_run_seconds=runs[0]["first_step_seconds"])  # it may build the images' cache
            row |= dict(first_step_seconds=statistics.median(run["first_step_seconds"] for run in runs[1:] or runs))
            row |= dict(resident_gib=max(run["resident_gib"] for run in runs), checkpoint_seconds=saving["save"])
            rows.append(row | dict(checkpoint_megabytes=file.stat().st_size / 1e6))
    return rows
