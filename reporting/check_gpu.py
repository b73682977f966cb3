"""Is minMIM right and fast on this machine's GPU, and does it learn there? All of it in one command.

    python -m reporting.check_gpu --out DIR --minutes 8 --data-root DIR
    python -m reporting.check_gpu --out DIR --device cpu --rehearse        all of it on a CPU, at tiny sizes

The steps come in order of worth. Each is a process of its own, with a limit of time at which it is asked to save and
end. DIR/results.json has what was found, and is written after each step; DIR/log.txt has the ends of what the steps
printed. The same command goes on: it leaves out what is done, and does again what failed or was cut. A step that the
minutes have no room for is not begun. The last steps train for equal times, and share what the steps before them left;
such a training goes on where --work, with its checkpoints, has stayed. docs/speed.md shows what results.json has where
it lies as results/gpu/card-NAME.json.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from reporting import HERE
from reporting.documents import figures
from reporting.result_files import result
from reporting.timing import processor
from reporting.whole_run_speed import EPOCH, watch
from runtime import files, process
from runtime.command_line import Parser
from runtime.errors import InputError
from runtime.run_directory import git_state, versions

VIT_B = "--model base --image-size 224 --patch-size 16 --decoder-width 512 --decoder-depth 8 --decoder-heads 16"
TINY = "--width 16 --depth 2 --heads 2 --decoder-width 8 --decoder-depth 1 --decoder-heads 1 --image-size 32"
METHODS = ("mae", "cmae")  # that are trained
GRACE = 15  # seconds in which a process that was asked to end may save
START = 45  # seconds until a training whose compiled kernels are cached makes its first step
PROBES = {"knn": 15, "linear": 20}  # seconds expected of each
STEPS = "right fast data epochs-mae epochs-cmae others".split()
STEPS += [f"{what}-{method}" for method in METHODS for what in ("learn", *PROBES)]
OPEN = """import json, sys; from inputs.image_sets import open_set
print(json.dumps({split: len(open_set(sys.argv[1], sys.argv[2] or None, split)) for split in ("train", "val")}))"""


class Step(NamedTuple):
    name: str
    seconds: float  # that it is expected to take
    limit: float
    command: str  # after python


def plan(args, found: dict) -> Iterator[Step]:
    """All steps in order of worth. The number of images and the lengths of trainings show once they are found."""
    work, root, device, tiny = shlex.quote(args.work), shlex.quote(args.data_root or ""), args.device, args.rehearse
    images = min(32 if tiny else EPOCH, result(found, "data").get("train", 0))
    repeat = 1 if tiny else EPOCH // max(1, images)
    per_epoch = images * repeat // (4 if tiny else 512)
    sizes = f"{TINY} --batch-size 2 --no-memory" if tiny else f"{VIT_B} --batch-size 256 --compile"
    bench, peer = f"bench.py --device {device} --precision bf16 {sizes} --repeats 3 --method", find_spec("transformers")
    train = f"--data {args.data} --device {device} --recipe tiny --no-evaluate --images {images} "
    train += f"{TINY} --classes 2 --batch-size 4" if tiny else "--model small --batch-size 512"
    train += f" --data-root {root}" * bool(args.data_root) + " --method "
    tests = "tests/test_repository_layout.py -k small" if tiny else "-m cuda"
    tests += " -n auto --maxprocesses 16" * bool(find_spec("xdist"))  # all share one GPU
    yield Step("right", 120, 150, f"-m pytest -q {tests}")
    yield Step("fast", 140, 280, f"{bench} mae cmae{' --peer hf' if peer else ''} --json {work}/fast.json")
    yield Step("data", 30, 90, f"-c {shlex.quote(OPEN)} {args.data} {root}")
    for method in METHODS:
        length = f"--repeat {repeat} --epochs {3 + 120 // max(1, per_epoch)} --max-steps {2 * per_epoch + 120}"
        words = f"{train}{method} {length} --resume never --out {work}/epochs-{method}"
        yield Step(f"epochs-{method}", 70, 120, f"-m reporting.check_gpu --watch {per_epoch} {words}")
    yield Step("others", 140, 280, f"{bench} cmae_loc cae conmim lcmae --json {work}/others.json")
    for method in METHODS:
        epochs, run = found.get("epochs", {}).get(method, 0), f"{work}/learn-{method}"
        seconds = START + epochs * images / EPOCH * result(found, f"epochs-{method}").get("seconds", 0)
        length = f"--epochs {epochs} --warmup-epochs {max(1, epochs // 9)} --save-every 5"
        words = f"train.py {train}{method} {length} --out {run}"
        cut = found["steps"].get(f"learn-{method}", {}).get("state") == "cut"  # it goes on, and any time serves
        yield Step(f"learn-{method}", START if cut else seconds, 1.2 * seconds, words)
        for probe, expected in PROBES.items():
            words = f"evaluate.py --run {run} --protocol {probe} --device {device}"
            yield Step(f"{probe}-{method}", expected, 3 * expected, words)


def share_out(found: dict, left: float) -> None:
    """Fix the epochs of both trainings, for equal times within the seconds left, where their speed is known."""
    speeds = {method: result(found, f"epochs-{method}").get("seconds") for method in METHODS}
    images = result(found, "data").get("train")
    each = left / 2 - START - sum(PROBES.values())
    if "epochs" not in found and images and all(speeds.values()) and each > 0:
        found["epochs"] = {m: max(1, int(0.9 * each * EPOCH / images / seconds)) for m, seconds in speeds.items()}


def call(command: str, limit: float, log: Path, work: Path) -> str:
    """Run python with this command, and all that it starts, for so many seconds at most: "ok", "failed" or "cut"."""
    environment = os.environ | {"MINMIM_CACHE": str(work / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor")}
    with open(log, "w") as output:
        words = [sys.executable, *shlex.split(command)]
        child = subprocess.Popen(words, stdout=output, stderr=output, env=environment, cwd=HERE, start_new_session=True)
    try:
        return "failed" if child.wait(limit) else "ok"
    except subprocess.TimeoutExpired:
        child.terminate()  # train.py then saves
        with suppress(subprocess.TimeoutExpired):
            child.wait(GRACE)
        return "cut"
    finally:  # also where this process is itself asked to end
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def harvest(log: Path, report: Path) -> dict:
    """What a step found: the file that it wrote, else the last line that it printed, read as JSON or as it is."""
    last = [line for line in ["", *log.read_text(errors="replace").splitlines()] if line.strip()][-1:]
    with suppress(ValueError, IndexError):
        if isinstance(found := json.loads(report.read_text() if report.exists() else last[0]), dict):
            return found
    return dict(said="".join(last))


class Session:
    """One call of this command: what is found, and the seconds that are left."""

    def __init__(self, args):
        self.args, self.out, self.work = args, Path(args.out), Path(args.work)
        self.file, self.end = self.out / "results.json", time.monotonic() + 60 * args.minutes - GRACE
        self.found = json.loads(self.file.read_text()) if self.file.exists() else dict(steps={})

    def save(self) -> None:
        text = json.dumps(self.found, indent=1)
        for place, word in ((self.args.work, "WORK"), (self.args.data_root, "DIR")):
            text = text.replace(place, word) if place else text
        files.write_text(self.file, text + "\n")
        logs = sorted(self.work.glob("*.log"), key=lambda log: log.stat().st_mtime)
        tails = [f"==== {log.stem}\n" + log.read_text(errors="replace")[-20_000:] for log in logs]
        files.write_text(self.out / "log.txt", "\n".join(tails))

    def run(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        name = torch.cuda.get_device_name() if self.args.device == "cuda" else processor()
        self.found |= dict(device=name, versions=versions(), data=self.args.data, git=git_state())
        left = self.end - time.monotonic()
        for step in plan(self.args, self.found):  # what is to be expected, said in advance
            if self.wanted(step.name):
                fits = step.seconds <= left
                left -= step.seconds * fits
                print(f"{step.name:14} {step.seconds:4.0f} s{'' if fits else ': no room for it'}", flush=True)
        for name in STEPS:
            if name.startswith("learn"):
                share_out(self.found, self.end - time.monotonic())
            step = next(step for step in plan(self.args, self.found) if step.name == name)  # by now it may know more
            if self.wanted(name) and self.ready(name) and step.seconds <= self.end - time.monotonic():
                self.do(step)

    def wanted(self, name: str) -> bool:
        return name in (self.args.only or STEPS) and self.found["steps"].get(name, {}).get("state") != "ok"

    def ready(self, name: str) -> bool:
        """Whether what a step builds on is there."""
        what, _, method = name.partition("-")
        needs = {"epochs": "data", "learn": f"epochs-{method}"}.get(what, f"learn-{method}")
        return not method or (bool(result(self.found, needs)) and (what != "learn" or "epochs" in self.found))

    def do(self, step: Step) -> None:
        log, report = self.work / f"{step.name}.log", self.work / f"{step.name}.json"
        report.unlink(missing_ok=True)
        self.found["steps"][step.name] = record = dict(state="cut", seconds=0, command=step.command, result={})
        self.save()
        begin = time.monotonic()
        try:
            record["state"] = call(step.command, min(step.limit, self.end - time.monotonic()), log, self.work)
        finally:
            record["seconds"], record["result"] = round(time.monotonic() - begin, 1), harvest(log, report)
            self.save()
        print(f"{step.name:14} {record['state']} after {record['seconds']:.0f} s", flush=True)


def summary(args, found: dict) -> str:
    """One screen: what became of each step, and the figures beside their aims."""
    lines = [f"{found['device']}, torch {found['versions']['torch']}, {found['data']}"]
    for step in plan(args, found):
        record = found["steps"].get(step.name, dict(state="not begun", seconds=0, result={}))
        said = record["result"].get("said", "")[:44]
        lines.append(f"{step.name:13} {record['state']:9} {record['seconds'] or 0:5.0f} s  {said}".rstrip())
    lines += [f"{what:43} {value:>9} {aim:>9} {met}".rstrip() for what, value, aim, met in figures(found)]
    return "\n".join(lines)


def options(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description="Is minMIM right and fast on this GPU, and does it learn?", allow_abbrev=False)
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="where results.json and log.txt go")
    add("--minutes", type=float, default=8, metavar="M", help="begin nothing that ends later [8]")
    add("--data-root", metavar="DIR", help="where Tiny-ImageNet is [built-in images serve]")
    add("--work", metavar="DIR", help="where checkpoints and caches go [OUT/work]")
    add("--device", default="cuda", choices=["cuda", "cpu"], help="a CPU only for --rehearse [cuda]")
    add("--only", nargs="+", choices=STEPS, metavar="STEP", help=f"of {', '.join(STEPS)} these alone")
    add("--rehearse", action="store_true", help="tiny sizes")
    args = parser.parse_args(argv)
    args.work = str(Path(args.work or f"{args.out}/work").resolve())
    args.data_root = args.data_root and str(Path(args.data_root).resolve())
    args.data = "tiny-imagenet" if args.data_root else "shapes"
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda: no GPU found; rehearse with --device cpu --rehearse")
    return args


def main() -> None:
    if sys.argv[1:2] == ["--watch"]:  # a step of the plan, in a process of its own
        return print(json.dumps(watch(int(sys.argv[2]), sys.argv[3:])))
    session = Session(options(sys.argv[1:]))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what runs is ended, and its record written
    session.run()
    print(summary(session.args, session.found))


if __name__ == "__main__":
    process.command(main)
