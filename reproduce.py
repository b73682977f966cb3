"""The results table, the ledger of the papers' claims and README's generated parts, each by one command.

    python reproduce.py --budget demo --jobs 2                     every method as README's first command runs CMAE
    python reproduce.py --budget cpu --data-root DIR --jobs 2      every method and its bars: an hour of two cores
    python reproduce.py --budget gpu --data-root DIR --minutes 9   all of Tiny-ImageNet on one GPU, nine minutes of it
    python reproduce.py --claims --data-root DIR --jobs 2          what the claims need beyond the cpu table
    python reproduce.py --readme                                   README's tables, ledger, losses and index, anew
    python reproduce.py --check                                    which of them, and which results, no longer hold

A piece is a `train.py` command and what is then measured, by commands that anyone can type; --list prints them all.
The same command goes on where it was stopped, and what stands in `results/` from the same commands and the same code is
not done again. Without Tiny-ImageNet the built-in images stand in; a result says so, and lies beside the runs.
"""

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import analyze
import evaluate
from common import patchify
from figures import measures
from inputs import image_cache, image_sets
from reporting.claims import (
    BASELINES,
    CLAIMS,
    HERE,
    ROWS,
    VARIANTS,
    changed,
    curves,
    drawing,
    generated,
    problems,
    read,
    sources,
)
from runtime import files, process
from runtime.errors import InputError

# ---------------------------------------------------------------------------------------------------------- measures


def pixels(study) -> dict:
    """The bar below all encoders: the probes on the image as 8 x 8 average colours."""
    size, device = study.runs[0].settings.image_size, study.device

    def colours(images):
        return F.adaptive_avg_pool2d(images, 8).flatten(1)

    halves = [evaluate.of_all(colours, half.to(device), size, device) for half in (study.train, study.val)]
    found = (*halves[0], *halves[1], len(study.train.classes))
    return {"knn": evaluate.knn(*found)["top1"], "linear": evaluate.linear_probe(*found)["top1"]}


def attention(study) -> dict:
    """The encoder's attention distance in pixels, mean over images, heads and layers (LC-MAE, Figure 6)."""
    encoder = study.runs[0].encoder
    return {"distance": measures.attention_distances(encoder, study.batches(32)).mean().item()}


def positions(study) -> dict:
    """How alike mask tokens attend in different images: in the decoder's first layer, and later (LC-MAE, Eq. 7)."""
    alike = measures.decoder_similarity(measures.mask_token_maps(study.runs[0], study.batches(32)))
    return {"first": alike[0], "later": statistics.mean(alike[1:])}


@torch.no_grad()
def latents(study) -> dict:
    """Squared error of whole images that are encoded and, the regressor skipped, decoded (CAE, Figure 4)."""
    run = study.runs[0]
    x = measures.centred(study.pictures(64), run.encoder.image_size)
    made = run.method.reconstruct(x).float()
    return {"error": (made - patchify(x, run.encoder.patch_size)).square().mean().item()}


def classes(study) -> dict:
    """Distances within and between classes (CMAE, Figure 6)."""
    images, labels = study.labelled(500, 50)
    found = measures.class_distances(measures.features(study.runs[0].encoder, images).cpu(), labels)
    return {key: of_classes.mean().item() for key, of_classes in found.items()}


@torch.no_grad()
def spread(study) -> dict:
    """Deviation of v·√d over images at one place, v of length 1: 0 where v has collapsed (LC-MAE, §3.3)."""
    run, images = study.runs[0], study.pictures(64)
    x, mask = measures.centred(images, run.encoder.image_size), run.masks(images, alike=True)
    tokens, h = run.method.decode(x, mask)
    v = run.method.projector(h if run.method.config.project == "pixels" else tokens)  # (B, M, d)
    v = F.normalize(v.float(), dim=2) * v.shape[2] ** 0.5
    return {"deviation": v.var(dim=0, correction=0).mean().sqrt().item()}


MEASURES = {measure.__name__: measure for measure in (pixels, attention, positions, latents, classes, spread)}

# ----------------------------------------------------------------------------------------------- what there is to do

EPOCHS = {"cpu": 18, "gpu": 40}  # of pretraining, the same for every method
TUNE_EPOCHS = {"cpu": 15, "gpu": 20}  # of fine-tuning, and of supervised training from scratch


@dataclass(frozen=True)
class Work:
    name: str  # "cpu/mae": of its result file
    method: str
    commands: dict[str, str]  # train, then each measure; RUN, SEED and DIR stand for what is not the experiment's


def plan(args) -> list[Work]:
    """The runs that the command line asks for, in the order of the table."""
    budget = args.budget or "cpu"
    names = [f"{budget}/{name}" for name in ROWS if budget != "demo" or name != BASELINES]
    if args.claims:
        needed = {name for claim in CLAIMS for name in claim.order}
        names = [name for name in [*names, *(f"claims/{name}" for name in VARIANTS)] if name in needed]
    if args.methods:
        chosen, known = args.methods.split(","), [name.split("/")[1] for name in names]
        if unknown := set(chosen) - set(known):
            raise InputError(f"methods {min(unknown)!r}: not among these runs; choose of {','.join(known)}")
        names = [name for name in names if name.split("/")[1] in chosen]
    return [work_of(*name.split("/"), budget, args) for name in names]


def work_of(folder: str, name: str, budget: str, args) -> Work:
    if budget == "demo":  # measures itself when it is done
        return Work(f"{folder}/{name}", name, {"train": f"train.py --method {name} --seed SEED --out RUN"})
    epochs, tune = args.epochs or EPOCHS[budget], args.tune_epochs or TUNE_EPOCHS[budget]
    tiny = args.data == "tiny-imagenet"
    if budget == "cpu":
        recipe, model, kept = "demo", "", ""
        subset = " --classes 10 --crop-scale 0.2" if tiny else ""
        measured = "knn linear linear-paper attentive finetune attention classes"
    else:
        recipe, model, subset = "tiny", f" --model {args.model or 'small'} --save-every 5", ""
        kept = " --crop-scale 0"  # the attentive probe sees whole images, each encoded once
        measured = "knn linear attentive finetune classes"
    method, differs, untrained = name, "", ""
    if folder == "claims":
        method, differs, measured = VARIANTS[name]
    elif name == "cmae_loc" and budget == "gpu":  # a fifth of training, as the recipe's are of its own epochs
        differs = "--crop-warmup {0} --crop-interval {0}".format(max(1, epochs // 5))
    elif name == BASELINES:  # one step, for the shape of an encoder
        method, differs, measured = "mae", "--max-steps 1", "pixels knn linear attentive supervised"
        untrained = " --untrained"
    source = f"{args.data}{' --data-root DIR' * tiny}{subset}" + f" --images {args.images}" * bool(args.images)
    train = f"train.py --method {method} --data {source} --recipe {recipe}{model}"
    train += f" --epochs {epochs} --warmup-epochs {max(1, epochs // 9)} --no-evaluate {differs} --seed SEED --out RUN"
    trained = f"--recipe {recipe} --seed SEED"
    protocols = {
        "knn": f"knn{untrained}",
        "linear": f"linear{untrained}",
        "linear-paper": f"linear --paper {trained}",
        "attentive": f"attentive{untrained} {trained}{kept}",
        "finetune": f"finetune {trained} --epochs {tune}",
        "supervised": f"supervised {trained} --epochs {tune}",
    }
    commands = {"train": " ".join(train.split())}
    for key in measured.split():
        column = "finetune" if key == "supervised" else key  # its place in the table
        commands[column] = (
            f"evaluate.py --run RUN --protocol {protocols[key]}" if key in protocols
            else f"reproduce.py --measure {key} --run RUN"
        )  # fmt: skip
    return Work(f"{folder}/{name}" + "-base" * (args.model == "base"), method, commands)


def choose_data(root: str | None) -> str:
    """Tiny-ImageNet where it is, the built-in images otherwise."""
    try:
        image_sets.open_set("tiny-imagenet", root, "val")
        return "tiny-imagenet"
    except InputError as error:
        say(f"{error}\nThe built-in images stand in for Tiny-ImageNet; results go beside the runs.")
        return "shapes"


# ---------------------------------------------------------------------------------------------------------- doing it


class Stopped(Exception):
    """The time is over, or somebody wants an end; the same command goes on."""


class Runner:
    """Pieces, each a work and a seed, `jobs` at a time, for `minutes`: then what runs is asked to save and end."""

    def __init__(self, args):
        self.args, self.out, self.results = args, Path(args.out), Path(args.results)
        self.deadline = time.monotonic() + args.minutes * 60 if args.minutes else float("inf")
        self.threads = max(1, (os.cpu_count() or 1) // args.jobs)
        self.wish, self.writing = threading.Event(), threading.Lock()

    def over(self) -> bool:
        return self.wish.is_set() or time.monotonic() > self.deadline

    def all(self, works: list[Work]) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.wish.set())
        pieces = [(work, seed) for seed in range(self.args.seeds) for work in works]
        with ThreadPoolExecutor(self.args.jobs) as pool:
            ends = list(pool.map(lambda piece: self.piece(*piece), pieces))
        say(", ".join(f"{ends.count(end)} {end}" for end in ("done", "stood already", "left for later")))
        if failed := [end for end in ends if isinstance(end, InputError)]:
            raise InputError(f"{len(failed)} of {len(pieces)} failed, the first: {failed[0]}")

    def piece(self, work: Work, seed: int) -> str | InputError:
        """What became of it."""
        name, result = f"{work.name}, seed {seed}", self.results / f"{work.name}.json"
        try:
            if stands(result, work, seed):
                return "stood already"
            if self.over():  # before there is a directory
                return "left for later"
            folder = self.out / f"{work.name}-{seed}"
            state = self.begin(folder, work)
            for key, command in work.commands.items():
                if key in state["measured"]:
                    continue
                if self.over():
                    return "left for later"
                say(f"{name}: {key}")
                begin = time.monotonic()
                try:
                    state["measured"][key] = self.call(command, folder, seed)
                finally:
                    state["seconds"] += time.monotonic() - begin
                    files.write_text(folder / "reproduce.json", json.dumps(state))
            with self.writing:
                keep(result, work, about(folder, seed, state, self.threads))
            return "done"
        except Stopped:
            return "left for later"
        except InputError as error:
            say(f"{name}: {error}")
            return InputError(f"{name}: {error}")

    def begin(self, folder: Path, work: Work) -> dict:
        """What is done of a piece already; nothing of it, nor of its run, if commands or code have changed since."""
        file = folder / "reproduce.json"
        if file.exists():
            state = json.loads(file.read_text())
            if state["commands"] == work.commands and not changed(state["sources"]):
                return state
            shutil.rmtree(folder)
        elif folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder}: holds what reproduce.py did not make; give another --out")
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "commands": work.commands,
            "sources": sources(work.method, self.args.data),
            "measured": {},
            "seconds": 0.0,
        }
        files.write_text(file, json.dumps(state))
        return state

    def call(self, command: str, folder: Path, seed: int) -> dict:
        """Run it as a user would. The answer is the last line that a measure prints, in JSON."""
        where = self.args.data_root or str(image_cache.cache_folder())
        places = {"RUN": str(folder), "SEED": str(seed), "DIR": where}
        script, *words = [places.get(word, word) for word in shlex.split(command)]
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        with open(folder / "output.txt", "ab") as output:
            process = subprocess.Popen(
                [sys.executable, str(HERE / script), *words], stdout=subprocess.PIPE, stderr=output, env=environment,
                start_new_session=True,
            )  # fmt: skip
            asked, printed = False, None
            while printed is None:
                try:
                    printed, _ = process.communicate(timeout=0.5)
                except subprocess.TimeoutExpired:
                    if self.over() and not asked:  # once: train.py then saves, but a second time it ends at once
                        process.terminate()
                        asked = True
        if process.returncode:
            if self.over():
                raise Stopped
            lines = (folder / "output.txt").read_text(errors="replace").split("\n")
            why = next((line for line in reversed(lines) if line.strip()), "it said nothing")
            raise InputError(f"{script} ended with status {process.returncode}: {why}")
        if script == "train.py":
            return summary(folder)
        answer = json.loads(printed.decode().splitlines()[-1])
        return {k: answer[k] for k in ("top1", "top5", "n")} if "protocol" in answer else answer


def summary(folder: Path) -> dict:
    """What a run has measured itself: "knn", "linear", and both of the untrained encoder; nothing by --no-evaluate."""
    file = folder / "summary.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    return {name + "-untrained" * (of == "untrained"): found[of][name] for of in found for name in found[of]}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------ result files

# What is not the experiment's: where and how it ran, and the seed, which is beside it.
ELSEWHERE = "out data_root resume download workers save_every log_every evaluate seed device compile precision"


def stands(file: Path, work: Work, seed: int) -> bool:
    """Whether a result is there, of these commands and this code."""
    found = read(file) if file.exists() else {}
    mine = [run for run in found.get("runs", []) if run["seed"] == seed and not changed(run["sources"])]
    return found.get("commands") == work.commands and bool(mine)


def about(folder: Path, seed: int, state: dict, threads: int) -> dict:
    """One seed's part of a result file, the configuration included."""
    found = json.loads((folder / "config.json").read_text())
    settings = {k: v for k, v in found["settings"].items() if k not in ELSEWHERE.split() and v is not None}
    measured = {k: v for k, v in state["measured"].items() if k != "train"} | state["measured"]["train"]
    return dict(
        seed=seed, commit=found["git"].get("commit"), dirty=found["git"].get("dirty"), sources=state["sources"],
        versions=found["versions"], machine=machine(found, threads), seconds=round(state["seconds"]),
        loss=losses(folder / "log.jsonl"), measured=measured,
        config=settings | found["config"],
    )  # fmt: skip


def keep(file: Path, work: Work, run: dict) -> None:
    """Into the result file, beside other seeds of the same commands, configuration and code."""
    config, found, runs = run.pop("config"), read(file) if file.exists() else None, [run]
    if found and (found["commands"], found["config"]) == (work.commands, config):
        runs += [r for r in found["runs"] if r["seed"] != run["seed"] and not changed(r["sources"])]
    file.parent.mkdir(parents=True, exist_ok=True)
    tree = dict(method=work.method, commands=work.commands, config=config, runs=sorted(runs, key=lambda r: r["seed"]))
    files.write_text(file, json.dumps(tree, indent=1) + "\n")


def machine(found: dict, threads: int) -> str:
    """Its kind, not its name: the GPU, or the processor's family and how much of it one command had; the precision."""
    file = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", file.read_text()) if file.exists() else None
    family = " ".join(re.sub(r"\(\w+\)", "", model[1] if model else platform.machine()).split()[:2])
    on_gpu = found["settings"]["device"] == "cuda"
    kind = found["versions"]["gpu"] if on_gpu else f"{family}, {threads} of {os.cpu_count()} cores"
    return f"{kind}, {found['settings']['precision']}"


def losses(log: Path, points: int = 18) -> list[dict]:
    """The first step, then means over at most so many evenly spaced epochs."""
    rows = [json.loads(line) for line in log.read_text().splitlines()[1:]]
    keys = [key for key in rows[0] if key not in ("step", "epoch", "lr", "images_per_second", "seconds")]
    epochs = max(1, round(rows[-1]["epoch"]))
    kept = [dict(epoch=0) | {key: round(rows[0][key], 4) for key in keys}]
    for epoch in sorted({round(epochs * i / points) for i in range(1, points + 1)} - {0}):
        within = [row for row in rows if epoch - 1 < row["epoch"] <= epoch] or rows[-1:]
        kept.append(dict(epoch=epoch) | {key: round(statistics.mean(row[key] for row in within), 4) for key in keys})
    return kept


# ----------------------------------------------------------------------------------------------------------- command


def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make the results and README's tables of them.", allow_abbrev=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--budget", choices=["demo", *EPOCHS], help="a results table: of minutes, of an hour, of a GPU")
    what.add_argument("--claims", action="store_true", help="the runs behind the ledger of claims")
    what.add_argument("--readme", action="store_true", help="write the generated parts of README.md")
    what.add_argument("--check", action="store_true", help="say what in README.md and results no longer holds")
    what.add_argument("--measure", choices=MEASURES, metavar="NAME", help=f"one of {', '.join(MEASURES)}, of --run")
    add = parser.add_argument
    add("--run", metavar="DIR", help="the run to measure; prints a line of JSON")
    add("--list", action="store_true", help="print the commands, run none")
    add("--methods", metavar="A,B", help="only these runs")
    add("--seeds", type=int, metavar="N", help="seeds 0 to N-1 [a budget 1, claims 3]")
    add("--jobs", type=int, default=1, metavar="N", help="pieces at a time; they share the cores [1]")
    add("--minutes", type=float, metavar="M", help="stop after so many; the same command goes on")
    add("--data-root", metavar="DIR", help="where Tiny-ImageNet is")
    add("--out", default="runs/reproduce", metavar="DIR", help="where the runs go [runs/reproduce]")
    add("--results", metavar="DIR", help="where the result files are [results; of the built-in images OUT/results]")
    add("--model", choices=["small", "base"], help="of the gpu budget [small]")
    add("--epochs", type=int, metavar="N", help=f"of pretraining {EPOCHS}")
    add("--tune-epochs", type=int, metavar="N", help=f"of fine-tuning and supervised training {TUNE_EPOCHS}")
    add("--images", type=int, metavar="K", help="a rehearsal: pretrain on the first K; needs --results of its own")
    args = parser.parse_args(argv)
    if args.images and not args.results:
        raise InputError("images: makes a rehearsal, which must not lie among the results; give --results")
    runs = "list methods seeds minutes data_root model epochs tune_epochs images".split()
    idle = ["model"] if args.budget == "cpu" or args.claims else [] if args.budget else runs
    idle = "data_root model epochs tune_epochs images".split() if args.budget == "demo" else idle
    if idle := [name for name in idle if getattr(args, name)]:
        raise InputError(f"{idle[0].replace('_', ' ')}: does nothing here; leave it out")
    if bool(args.measure) != bool(args.run):
        raise InputError("measure: needs a run, and a run a measure; give both")
    for name in ("seeds", "jobs", "minutes", "epochs", "tune_epochs"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise InputError(f"{name.replace('_', ' ')} {getattr(args, name):g}: must be above 0")
    args.seeds = args.seeds or (3 if args.claims else 1)
    args.results = args.results or HERE / "results"
    return args


def main() -> None:
    args = options()
    results, readme = Path(args.results), HERE / "README.md"
    if args.measure:
        study = analyze.Study(analyze.options(["--run", args.run, "--figure", "all"]), process.start())
        print(json.dumps(MEASURES[args.measure](study)), flush=True)
    elif args.check:
        if found := problems(readme.read_text(), results):
            raise InputError("\n".join(found))
    elif args.readme:
        for folder in ("cpu", "gpu"):
            if curves(results, folder):
                files.write_text(results / f"losses-{folder}.svg", drawing(results, folder))
        files.write_text(readme, generated(readme.read_text(), results))
    else:
        demo = args.budget == "demo"
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
