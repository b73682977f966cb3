"""The results table, the papers' claims and the generated parts of the documents, each by one command.

    python reproduce.py --budget demo --jobs 2                     every method as README's first command runs CMAE
    python reproduce.py --budget cpu --data-root DIR --jobs 2      every method and its bars: an hour of two cores
    python reproduce.py --budget gpu --data-root DIR --minutes 9   all of Tiny-ImageNet on one GPU, nine minutes of it
    python reproduce.py --claims --data-root DIR --jobs 2          what the claims need beyond the cpu table
    python reproduce.py --recipes --jobs 2                         variants of the demo's recipes, three seeds of each
    python reproduce.py --transfer --data-root DIR --jobs 2        dense transfers of the demo's encoders, three seeds
    python reproduce.py --readme                                   the tables in docs/, anew
    python reproduce.py --check                                    which tables and results no longer hold

A piece is a `train.py` command and what is then measured, by commands that anyone can type; --list prints them all.
The same command goes on where it was stopped, and what stands in `results/` from the same commands and the same code is
not done again. Without Tiny-ImageNet the built-in images stand in; a result says so, and lies beside the runs.
"""

import argparse
import json
from pathlib import Path

import analyze
from inputs import image_sets
from reporting import HERE
from reporting.claim_measures import MEASURES
from reporting.documents import generated, problems
from reporting.experiments import EPOCHS, Runner, plan
from runtime import files, process
from runtime.command_line import Parser, count
from runtime.errors import InputError
from runtime.ranks import say


def choose_data(root: str | None) -> str:
    """Tiny-ImageNet where it is, the built-in images otherwise."""
    try:
        image_sets.open_set("tiny-imagenet", root, "val")
        return "tiny-imagenet"
    except InputError as error:
        say(str(error), "The built-in images stand in for Tiny-ImageNet; results go beside the runs.")
        return "shapes"


def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Make the results and the tables of them.", allow_abbrev=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--budget", choices=["demo", *EPOCHS], help="a results table: of minutes, of an hour, of a GPU")
    what.add_argument("--claims", action="store_true", help="the runs that the claims compare")
    what.add_argument("--recipes", action="store_true", help="variants of the demo's recipes, for docs/results.md")
    what.add_argument("--transfer", action="store_true", help="dense transfers of mae's and cmae's demo encoders")
    what.add_argument("--readme", action="store_true", help="write the generated parts of the documents")
    what.add_argument("--check", action="store_true", help="say what in the documents and results no longer holds")
    what.add_argument("--measure", choices=MEASURES, metavar="NAME", help=f"one of {', '.join(MEASURES)}, of --run")
    add = parser.add_argument
    add("--run", metavar="DIR", help="the run to measure; prints a line of JSON")
    add("--list", action="store_true", help="print the commands, run none")
    add("--methods", metavar="A,B", help="only these runs")
    add("--seeds", type=count, metavar="N", help="seeds 0 to N-1 [a budget 1, others 3]")
    add("--jobs", type=count, default=1, metavar="N", help="pieces at a time; they share the cores [1]")
    add("--minutes", type=float, metavar="M", help="stop after so many; the same command goes on")
    add("--data-root", metavar="DIR", help="where Tiny-ImageNet is")
    add("--out", default="runs/reproduce", metavar="DIR", help="where the runs go [runs/reproduce]")
    add("--results", metavar="DIR", help="where the result files are [results; of the built-in images OUT/results]")
    add("--model", choices=["small", "base"], help="of the gpu budget [small]")
    args = parser.parse_args(argv)
    runs = args.budget or args.claims or args.recipes or args.transfer
    idle = ["model"] * (args.budget != "gpu") + ([] if runs else "list methods seeds minutes data_root".split())
    idle += ["data_root"] * bool(args.recipes or args.budget == "demo")
    if idle := [name for name in idle if getattr(args, name)]:
        raise InputError(f"{idle[0].replace('_', ' ')}: does nothing here; leave it out")
    if bool(args.measure) != bool(args.run):
        raise InputError("measure: needs a run, and a run a measure; give both")
    if args.minutes is not None and args.minutes <= 0:
        raise InputError(f"minutes {args.minutes:g}: must be above 0")
    args.seeds = args.seeds or (3 if args.claims or args.recipes or args.transfer else 1)
    args.results = args.results or HERE / "results"
    return args


def main() -> None:
    args = options()
    results = Path(args.results)
    if args.measure:
        study = analyze.Study(analyze.options(["--run", args.run, "--figure", "all"]), process.start())
        print(json.dumps(MEASURES[args.measure](study)), flush=True)
    elif args.check:
        if found := list(problems(HERE, results)):
            raise InputError("\n".join(found))
    elif args.readme:
        for name, text in generated(HERE, results).items():
            files.write_text(HERE / name, text)
    else:
        demo = args.recipes or args.transfer or args.budget == "demo"
        args.data = "shapes" if demo else choose_data(args.data_root)
        if not demo and args.data == "shapes" and results == HERE / "results":  # where Tiny-ImageNet's stay
            args.results = Path(args.out) / "results"
        works = plan(args)
        if not args.list:
            return Runner(args).all(works)
        for work in works:
            print(work.name, *(f"python {command}" for command in work.commands.values()), sep="\n    ")


if __name__ == "__main__":
    process.command(main)
