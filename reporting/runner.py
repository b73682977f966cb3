"""Runs the commands of experiments, several at a time and within a time limit, and keeps what they measure."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from inputs import image_cache
from reporting import HERE
from reporting.experiments import Work
from reporting.result_files import about, changed, keep, sources, stands
from runtime import files
from runtime.errors import InputError


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
            if stands(result, work.commands, seed):
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
                keep(result, work.method, work.commands, about(folder, seed, state, self.threads))
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
        made_by = sources(work.method, work.commands.values(), self.args.data)
        state = dict(commands=work.commands, sources=made_by, measured={}, seconds=0.0)
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
