"""Experiments: the commands of each result, of every method and of the variants that claims compare; running them."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from inputs import image_cache
from reporting import HERE
from reporting.result_files import BASELINES, ROWS, about, changed, keep, sources, stands
from runtime import files
from runtime.errors import InputError
from runtime.ranks import say

EPOCHS = {"cpu": 18, "gpu": 40}  # of pretraining, the same for every method
SCORES = r"top\d|n|miou|pixel_accuracy|(box|mask)_ap\d*"  # of what evaluate.py and transfer.py print
TUNE_EPOCHS = {"cpu": 15, "gpu": 20}  # of fine-tuning, and of supervised training from scratch
# What each claim compares is its "sides", from what its paper finds lowest to what it finds highest. "reported" are the
# paper's own numbers in this order; of CMAE and ConMIM they are ImageNet's, fine-tuned. A variant is a run that claims
# need beyond the cpu table: the method, what differs from its row there, what is measured.
LISTED = json.loads((HERE / "reporting/claims.json").read_text())
# "recipes" are runs like those of the demo, for three seeds: what they compare is written in docs/results.md.
CLAIMS, VARIANTS, RECIPES = LISTED["claims"], LISTED["variants"], LISTED["recipes"]
CPU = LISTED["cpu"]  # what differs from a method's demo recipe in its row of the cpu table
# "transfer" are dense transfers of the demo's encoders, each with the encoders that it is made with: those of methods,
# or in their place the one of mae's run as it was before, or as supervised training has left it.
TRANSFER = LISTED["transfer"]
IN_PLACE = {"untrained": "--untrained", "supervised": "--tuned RUN/supervised/seed-SEED"}


@dataclass(frozen=True)
class Work:
    name: str  # "cpu/mae": of its result file
    method: str
    commands: dict[str, str]  # train, then each measure; RUN, SEED and DIR stand for what is not the experiment's


def plan(args) -> list[Work]:
    """The runs that the command line asks for, in the order of the table."""
    budget = args.budget or ("demo" if args.recipes or args.transfer else "cpu")
    names = [f"{budget}/{name}" for name in ROWS if budget != "demo" or name != BASELINES]
    if args.claims:
        needed = {name for claim in CLAIMS for side in claim["sides"] for name in side.split()[:1]}
        names = [name for name in [*names, *(f"claims/{name}" for name in VARIANTS)] if name in needed]
    names = [f"recipes/{name}" for name in RECIPES] if args.recipes else names
    names = ["transfer/mae", "transfer/cmae"] if args.transfer else names
    if args.methods:
        chosen, known = args.methods.split(","), [name.split("/")[1] for name in names]
        if unknown := set(chosen) - set(known):
            raise InputError(f"methods {min(unknown)!r}: not among these runs; choose of {','.join(known)}")
        names = [name for name in names if name.split("/")[1] in chosen]
    return [work_of(*name.split("/"), budget, args) for name in names]


def work_of(folder: str, name: str, budget: str, args) -> Work:
    if budget == "demo":  # measures itself when it is done
        its = RECIPES[name] if folder == "recipes" else dict(method=name, differs="", measured="")
        train = f"train.py --method {its['method']} {its['differs']} --seed SEED --out RUN"
        more = {key: f"reproduce.py --measure {key} --run RUN" for key in its["measured"].split()}
        more |= transfers(name) if folder == "transfer" else {}
        return Work(f"{folder}/{name}", its["method"], {"train": " ".join(train.split())} | more)
    epochs, tiny = EPOCHS[budget], args.data == "tiny-imagenet"
    if budget == "cpu":
        recipe, model, kept = "demo", "", ""
        subset = " --classes 10 --crop-scale 0.2" if tiny else ""
        measured = "knn linear linear-paper attentive finetune attention classes"
    else:
        recipe, model, subset = "tiny", f" --model {args.model or 'small'} --save-every 5", ""
        kept = " --crop-scale 0"  # the attentive probe sees whole images, each encoded once
        measured = "knn linear attentive finetune classes"
    method, differs, untrained = name, CPU.get(name, "") * (budget == "cpu"), " --untrained" * (name == BASELINES)
    if folder == "claims":
        method, differs, measured = (VARIANTS[name][key] for key in ("method", "differs", "measured"))
    elif name == BASELINES:  # one step, for the shape of an encoder
        method, differs, measured = "mae", "--max-steps 1", "pixels knn linear attentive finetune"
    train = f"train.py --method {method} --data {args.data}{' --data-root DIR' * tiny}{subset} --recipe {recipe}{model}"
    train += f" --epochs {epochs} --warmup-epochs {epochs // 9} --no-evaluate {differs} --seed SEED --out RUN"
    trained = f"--recipe {recipe} --seed SEED"
    protocols = {
        "knn": f"knn{untrained}",
        "linear": f"linear{untrained}",
        "linear-paper": f"linear --paper {trained}",
        "attentive": f"attentive{untrained} {trained}{kept}",
        "finetune": f"{'supervised' if name == BASELINES else 'finetune'} {trained} --epochs {TUNE_EPOCHS[budget]}",
    }
    commands = {"train": " ".join(train.split())}
    for key in measured.split():
        commands[key] = f"reproduce.py --measure {key} --run RUN"
        if key in protocols:
            commands[key] = f"evaluate.py --run RUN --protocol {protocols[key]}"
    return Work(f"{folder}/{name}" + "-base" * (args.model == "base"), method, commands)


def transfers(method: str) -> dict[str, str]:
    """What is done with the encoder of a method: "fcn", and of mae "fcn-untrained" too."""
    commands = {
        "scenes": "transfer.py --make-scenes RUN/scenes",
        "supervised": "evaluate.py --run RUN --protocol supervised --seed SEED",
    }
    commands = commands if method == "mae" else {}
    for name, row in TRANSFER.items():
        for encoder in row["encoders"].split():
            if encoder == method or (encoder in IN_PLACE and method == "mae"):
                words = f"transfer.py --run RUN {row['words']} --seed SEED --resume never {IN_PLACE.get(encoder, '')}"
                commands[f"{name}-{encoder}"] = words.strip()
    return commands


class Runner:
    """Pieces, each a work and a seed, `jobs` at a time, for `minutes`: then what runs is asked to save and end."""

    def __init__(self, args):
        self.args, self.out, self.results = args, Path(args.out), Path(args.results)
        self.deadline = time.monotonic() + args.minutes * 60 if args.minutes else float("inf")
        self.threads = max(1, (os.cpu_count() or 1) // args.jobs)
        # One thread at a time reads sources and writes results: Python 3.11 cannot parse in several.
        self.wish, self.alone = threading.Event(), threading.Lock()

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
            folder = self.out / f"{work.name}-{seed}"
            with self.alone:
                if stands(result, work.commands, seed):
                    return "stood already"
                if self.over():  # before there is a directory
                    return "left for later"
                state = self.begin(folder, work)
            for key in [key for key in work.commands if key not in state["measured"]]:
                if self.over():
                    return "left for later"
                say(f"{name}: {key}")
                begin = time.monotonic()
                try:
                    state["measured"][key] = self.call(work.commands[key], folder, seed)
                finally:
                    state["seconds"] += time.monotonic() - begin
                    files.write_text(folder / "reproduce.json", json.dumps(state))
            with self.alone:
                keep(result, work.method, work.commands, about(folder, seed, state, self.threads))
            return "done"
        except InputError as error:
            if self.over():  # a command that was asked to end has failed
                return "left for later"
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
        made_by = sources(work.method, work.commands.values(), self.args.data)
        state = dict(commands=work.commands, sources=made_by, measured={}, seconds=0.0)
        files.write_text(file, json.dumps(state))
        return state

    def call(self, command: str, folder: Path, seed: int) -> dict:
        """Run it as a user would. The answer is the last line that a measure prints, in JSON."""
        where = self.args.data_root or str(image_cache.cache_folder())
        places = {"RUN": str(folder), "SEED": str(seed), "DIR": where}
        script, *words = (re.sub(r"\b(RUN|SEED|DIR)\b", lambda m: places[m[1]], word) for word in shlex.split(command))
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
            lines = (folder / "output.txt").read_text(errors="replace").split("\n")
            why = next((line for line in reversed(lines) if line.strip()), "it said nothing")
            raise InputError(f"{script} ended with status {process.returncode}: {why}")
        if script == "train.py":  # by --no-evaluate it has measured nothing
            file = folder / "summary.json"
            found = json.loads(file.read_text()) if file.exists() else {}
            return {probe + "-untrained" * (of == "untrained"): found[of][probe] for of in found for probe in found[of]}
        answer = json.loads((printed.decode().splitlines() or ["{}"])[-1])
        if script == "reproduce.py":
            return answer
        return {name: x for name, x in answer.items() if re.fullmatch(SCORES, name)}
