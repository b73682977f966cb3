"""Result files: the commands of a run, its configuration, and for each seed what was measured, where and by which code.

A seed's `sources` are the names that git gives to the contents of every file that its numbers depend on. So a result
shows whether their code is still what made it, in an archive without history too. Where it is not, a field "stale" in
the result file says why the result may stay.
"""

import ast
import hashlib
import json
import os
import re
import shlex
import statistics
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

from reporting import HERE
from reporting.timing import processor
from runtime import files
from runtime.errors import InputError

TABLE = ["mae", "cmae", "cmae_loc", "cae", "conmim", "lcmae"]
BASELINES = "scratch"  # an untrained encoder, supervised training, pixels
ROWS = [BASELINES, *TABLE]
RENAMED = {  # what a file that old results name is called now
    "shapes.py": "inputs/builtin_images.py",
    "downstream/watch.py": "downstream/online_probe.py",
    "inputs/hub.py": "inputs/huggingface_sets.py",
    "inputs/images_in_files.py": "inputs/image_files.py",
    "runtime/fast.py": "runtime/fast_paths.py",
    "runtime/encoders.py": "runtime/encoder_files.py",
}
MEASURED_IN = {"reproduce.py": "reporting/claim_measures.py"}
# The list of all methods, the other image sets, and how a run starts, is logged and is saved.
WITHOUT_NUMBERS = re.compile(r"methods\.py|inputs/builtin|runtime/(?!fast|ranks|encoder_|randomness|optimization)")
# Settings that are not the experiment's: where and how it ran, and the seed, which is beside it.
ELSEWHERE = "out data_root resume download workers save_every log_every evaluate seed device compile precision"


def read(file: Path) -> dict:
    """A result file: {"method", "commands", "config", "runs": a list, one for each seed}."""
    with suppress(ValueError, LookupError, TypeError, AttributeError):
        found = json.loads(file.read_text())
        if {"method", "commands", "config"} <= found.keys() and all("measured" in run for run in found["runs"]):
            return found
    raise InputError(f"{file}: not a result of reproduce.py; delete it, and run its commands again")


def result(found: dict, name: str) -> dict:
    """What a step of reporting/check_gpu.py has found, if it is done."""
    record = found["steps"].get(name, {})
    return record["result"] if record.get("state") == "ok" else {}


def runs_of(results: Path, name: str) -> list[dict]:
    file = results / f"{name}.json"
    return read(file)["runs"] if file.exists() else []


def values(results: Path, side: str) -> list[float]:
    """Of all seeds: "cpu/mae linear.top1" as measured, "cpu/mae loss.accuracy" of the last epoch."""
    name, measure, part = re.split("[ .]", side)
    found = [run["measured"] | dict(loss=run["loss"][-1]) for run in runs_of(results, name)]
    return [run[measure][part] for run in found if part in run.get(measure, {})]


def sources(method: str, commands: Iterable[str], data: str = "") -> dict[str, str]:
    """Each file that the numbers depend on, with its content's name.

    These are the files of the method, of the commands and of the built-in images where they serve, and all that they
    import, but for what no number depends on.
    """
    scripts = {shlex.split(command)[0] for command in commands}
    waiting, found = [f"{method}.py", *(MEASURED_IN.get(script, script) for script in scripts)], {}
    waiting += ["inputs/builtin_images.py"] if data == "shapes" else []
    while waiting:
        if (file := waiting.pop()) not in found and (HERE / file).is_file():
            content = (HERE / file).read_bytes()
            found[file] = blob(content)
            waiting += [name for name in imports(content) if not WITHOUT_NUMBERS.match(name)]
    return dict(sorted(found.items()))


def imports(content: bytes) -> list[str]:
    """What a file imports, as the names that files of ours would have."""
    names = []
    for node in ast.walk(ast.parse(content)):
        names += [name.name for name in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names += [node.module, *(f"{node.module}.{name.name}" for name in node.names)]
    return [name.replace(".", "/") + ".py" for name in names]


def blob(content: bytes) -> str:
    """git's name of a file's content, which needs no git."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def changed(recorded: dict[str, str]) -> list[str]:
    """The files of `sources` whose code is no longer what made a result; `code` says what may differ.

    That takes git, to know the old content; where it does not, any difference counts.
    """
    now = {RENAMED.get(file, file): old for file, old in recorded.items()}
    return [file for file, old in now.items() if not same_code(HERE / file, old)]


def same_code(file: Path, old: str) -> bool:
    now = file.read_bytes() if file.exists() else b""
    if blob(now) == old:
        return True
    try:
        then = subprocess.run(["git", "-C", HERE, "cat-file", "blob", old], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return False
    return code(then) == code(now)


@cache
def code(source: bytes) -> str:
    """A file's code without comments, docstrings and imports; `files.load` and `launch.load` are both `load`."""
    tree, modules = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = node.body[ast.get_docstring(node) is not None :]
            imports = [line for line in node.body if isinstance(line, ast.Import | ast.ImportFrom)]
            modules |= {name.asname or name.name for line in imports for name in line.names}
            node.body = [line for line in node.body if line not in imports]
    prefix = "|".join(map(re.escape, sorted(modules)))
    return re.sub(rf"(?<![\w.])({prefix})\.(?=\w)", "", ast.unparse(tree)) if modules else ast.unparse(tree)


def stands(file: Path, commands: dict, seed: int) -> bool:
    """Whether the result of a seed is there, of all of these commands and of the code as it is now."""
    found = read(file) if file.exists() else {}
    mine = [run for run in found.get("runs", []) if run["seed"] == seed and not changed(run["sources"])]
    return found.get("commands") == commands and bool(mine) and commands.keys() <= {"train", *mine[0]["measured"]}


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


def keep(file: Path, method: str, commands: dict, run: dict) -> None:
    """Into the result file, beside other seeds of the same commands, configuration and code."""
    config, found, runs = run.pop("config"), read(file) if file.exists() else None, [run]
    if found and (found["commands"], found["config"]) == (commands, config):
        runs += [r for r in found["runs"] if r["seed"] != run["seed"] and not changed(r["sources"])]
    tree = dict(method=method, commands=commands, config=config, runs=sorted(runs, key=lambda r: r["seed"]))
    files.write_text(file, json.dumps(tree, indent=1) + "\n")


def machine(found: dict, threads: int) -> str:
    """The kind of machine: the GPU, or the processor's family and how much of it one command had; and the precision."""
    on_gpu = found["settings"]["device"] == "cuda"
    family = " ".join(processor().split()[:2])
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
