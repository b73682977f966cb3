"""Speed and memory, beside peers on the same work.

    python bench.py --peer hf lightly                           MAE's step beside transformers' and lightly's
    python bench.py --method mae cmae cae                       what a method costs beside what its FLOPs say
    python bench.py --what input --method mae cmae --peer torchvision
    python bench.py --what start --data tiny-imagenet --data-root DIR       from command to first step, and checkpoints
    python bench.py --what epoch --data tiny-imagenet --data-root DIR       from disk to weights, in train.py
    python bench.py --what host --method mae cmae --batch-size 512 4096     what drawing asks of the host
    python bench.py --what scale --method cmae --recipe paper   8 and 32 A100s, on paper

Contenders take turns within each repeat, and the medians of the repeats are compared, so that what else the machine
does meets all alike; `--cpu-time` counts the seconds that this process computes, for a machine that others share (give
OMP_NUM_THREADS=1). A step is forward, backward, AdamW and the teacher, as in train.py; what `draw` draws is drawn
before. docs/speed.md says what each column is.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path

import torch

from common import SIZES
from methods import METHODS
from reporting import HERE
from reporting.step_speed import PEERS, bench_host, bench_scale, bench_step
from reporting.timing import columns, folder, processor
from reporting.whole_run_speed import bench_epoch, bench_input, bench_start
from runtime import files, process
from runtime.command_line import Parser, count
from runtime.errors import InputError
from runtime.run_directory import git_state, versions

WHAT = dict(
    step=bench_step, input=bench_input, epoch=bench_epoch, start=bench_start, host=bench_host, scale=bench_scale
)


def parse(argv: list[str]) -> argparse.Namespace:
    yes_no = argparse.BooleanOptionalAction
    parser = Parser(description="Speed and memory, beside peers on the same work.", allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--what", default="step", choices=WHAT, help="what to measure")
    add("--method", nargs="+", default=["mae"], choices=METHODS, help="which of ours")
    add("--peer", nargs="+", default=[], choices=PEERS, help="beside whom; of a step hf, lightly, of input torchvision")
    add("--recipe", choices=["demo", "tiny", "paper"], help="sizes of each method's recipe, in place of those below")
    add("--model", default="tiny", choices=SIZES, help="encoder")
    for name, text in (("width", "width"), ("depth", "blocks"), ("heads", "heads")):
        add(f"--{name}", type=int, metavar="N", help=f"{text} of the encoder, in place of the model's")
    for name, usual in (("width", 96), ("depth", 4), ("heads", 3)):
        add(f"--decoder-{name}", type=int, default=usual, metavar="N", help="of MAE's kind of decoder")
    add("--image-size", type=count, default=64, metavar="PIXELS", help="side of a view")
    add("--patch-size", type=count, default=8, metavar="PIXELS", help="side of a patch")
    add("--batch-size", type=int, nargs="+", default=[64, 256], metavar="B", help="images of a step")
    add("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"], help="of products")
    add("--compile", action=yes_no, default=False, help="torch.compile; of a step beside the plain one")
    add("--memory", action=yes_no, default=True, help="measure peaks of steps too")
    add("--cpu-time", action=yes_no, default=False, help="processor time in place of the clock's")
    add("--repeats", type=count, default=9, metavar="N", help="rounds; medians are reported")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="where")
    add("--data", default="shapes", metavar="SET", help="of --what epoch and start")
    add("--data-root", metavar="DIR", help="where it lies")
    add("--classes", type=int, metavar="K", help="its first K classes")
    add("--json", nargs="?", const="", metavar="FILE", help="write every figure [into results/bench]")
    args = parser.parse_args(argv)
    if min(args.batch_size) < 2:
        raise InputError(f"batch size {min(args.batch_size)}: must be at least 2")
    for peer in args.peer:
        if importlib.util.find_spec(PEERS[peer]) is None:
            raise InputError(f"peer {peer}: {PEERS[peer]} is not installed; pip install '.[bench]' brings it")
    return args


def about(device: torch.device, root: str | None) -> dict:
    """Device, threads, versions, commit and command, with DIR for `root`: what a figure needs beside it."""
    installed = [package for package in PEERS.values() if importlib.util.find_spec(package)]
    found = versions() | {package: importlib.metadata.version(package) for package in installed}
    name = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    words = " ".join(["python", Path(sys.argv[0]).name, *("DIR" if word == root else word for word in sys.argv[1:])])
    return dict(device=name, threads=torch.get_num_threads(), versions=found, git=git_state(), command=words)


def main() -> None:
    args = parse(sys.argv[1:])
    device = process.start(args.device)
    args.device = device.type
    rows = list(WHAT[args.what](args, device))
    facts = about(device, args.data_root)
    print(f"{facts['device']}, {facts['threads']} threads, torch {torch.__version__}\n{facts['command']}")
    print(columns(rows))
    if args.json is not None:
        file = Path(args.json or HERE / "results/bench" / folder(facts) / f"{args.what}.json")
        files.write_text(file, json.dumps(facts | dict(rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    process.command(main)
