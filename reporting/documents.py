"""The generated parts of the documents: tables of the result files, and the index of what the code cites.

A part lies between `<!-- name -->` and `<!-- /name -->`.
"""

import ast
import json
import re
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path

from methods import METHODS
from reporting import HERE
from reporting.experiments import CLAIMS, RECIPES, TRANSFER, VARIANTS
from reporting.result_files import BASELINES, ROWS, changed, read, result, runs_of, values
from reporting.timing import columns
from runtime.errors import InputError

ITEM = r"\(?(?:[A-Z]\.?)?\d+(?:\.\d+)*[a-e]?(?!\w)\)?"
LIST = rf"{ITEM}(?:(?:, | and |-| to ){ITEM})*"
CITATION = re.compile(rf"(Eqs?\.|Tables?|Fig(?:ure|ures|\.|s\.)|Algorithm) ?({LIST})|(§)({ITEM})")
# Where equations are computed: not in tests, nor in the list of claims.
PLACES = ["", "inputs/", "runtime/", "downstream/", "figures/", "reporting/claim_measures"]
KINDS = {"E": "Eq. ", "T": "Table ", "F": "Figure ", "A": "Algorithm ", "§": "§"}  # by first letter


def table(head: str, rows: Iterable[list]) -> str:
    names = head.split(" | ")
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [names, ["---"] * len(names), *rows])


def spell(numbers: list[float], digits: int | None = None) -> str:
    """Mean ± sample standard deviation; three significant digits unless told how many decimals."""
    if not numbers:
        return ""
    mean = statistics.mean(numbers)
    digits = max(0, 2 - int(f"{mean:e}".split("e")[1])) if digits is None else digits
    return f"{mean:.{digits}f}" + (f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else "")


def names_of(results: Path, folder: str) -> list[str]:
    """The results of a budget, in the order of the table."""
    files = sorted(results.glob(f"{folder}/*.json"))
    return [f"{folder}/{file.stem}" for row in ROWS for file in files if file.stem.split("-")[0] == row]


def setting(config: dict) -> str:
    size = f"{config['classes']} classes of " if "classes" in config else ""
    return f"{size}{config['data']}, {config['model']} encoder, {config['epochs']} epochs"


def commits(runs: list[dict]) -> str:
    return ", ".join(sorted({(run.get("commit") or "?")[:7] + "*" * bool(run.get("dirty")) for run in runs}))


def results_block(results: Path) -> str:
    parts = []
    for folder in ("cpu", "gpu"):
        rows, notes, machines = [], {}, set()
        for name in names_of(results, folder):
            found, label = read(results / f"{name}.json"), f"`{name.split('/')[1]}`"
            runs, last = found["runs"], spell(values(results, f"{name} loss.loss"))
            pixels = [spell(x, 1) for k in ("knn", "linear") if (x := values(results, f"{name} pixels.{k}"))]
            if pixels:
                label, last = "untrained; supervised from scratch", ""
                rows.append(["pixels", len(runs), *pixels, "", "", "", "", ""])
            if "stale" in found:
                notes.setdefault(found["stale"], []).append(name)
                label += " †"
            cells = [spell(values(results, f"{name} {k}.top1"), 1) for k in ("knn", "linear", "attentive", "finetune")]
            minutes = f"{statistics.mean(run['seconds'] for run in runs) / 60:.0f}"
            rows.append([label, len(runs), *cells, last, minutes, f"[{commits(runs)}](../results/{name}.json)"])
            machines |= {run["machine"] for run in runs}
        if not rows:
            parts.append(f"`python reproduce.py --budget {folder}`: not run yet.")
            continue
        head = "method | seeds | kNN | linear | attentive | fine-tuned | loss | minutes | commit, log"
        parts += [
            f"`python reproduce.py --budget {folder}`: {setting(found['config'])}, on {' or '.join(sorted(machines))}. "
            "Top-1 in per cent, mean ± standard deviation over seeds; minutes of a seed with its evaluation; * some "
            "files had changes after the commit.",
            table(head, rows), *(f"† {', '.join(names)}: {why}." for why, names in notes.items()),
        ]  # fmt: skip
    return "\n\n".join(parts)


def curves(results: Path, folder: str) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """Each method, and its (epoch, loss), mean over seeds."""
    for name in names_of(results, folder):
        if BASELINES not in name:
            together = zip(*(run["loss"] for run in runs_of(results, name)), strict=True)
            yield name.split("/")[1], [(at[0]["epoch"], statistics.mean(x["loss"] for x in at)) for at in together]


def demo_block(results: Path) -> str:
    """What `train.py --method NAME` does on the built-in images: losses by share of the run, the encoder's gain."""
    rows, drawn, machines = [], dict(curves(results, "demo")), set()
    for name in names_of(results, "demo"):
        runs, points = runs_of(results, name), drawn[name.split("/")[1]]
        shown = [spell([points[round(i * (len(points) - 1) / 4)][1]]) for i in range(5)]
        label = f"[`--method {name.split('/')[1]}`](../results/{name}.json)"
        rows.append([label, points[-1][0], *shown, *gained(results, name)])
        machines |= {run["machine"] for run in runs}
    if not rows:
        return "`python reproduce.py --budget demo`: not run yet."
    head = "`train.py` | epochs | first loss | ¼ | ½ | ¾ | last | kNN, % | linear, % | minutes | seeds | commit"
    where = f"on {' or '.join(sorted(machines))}; minutes with evaluation."
    return f"`python reproduce.py --budget demo`, {where}\n\n{table(head, rows)}"


def gained(results: Path, name: str) -> list:
    """Accuracies of the untrained encoder and of the trained one, then minutes, seeds and commits."""
    runs = runs_of(results, name)
    gains = [" → ".join(spell(values(results, f"{name} {k}.top1"), 1) for k in (f"{probe}-untrained", probe))
             for probe in ("knn", "linear")]  # fmt: skip
    return [*gains, f"{statistics.mean(run['seconds'] for run in runs) / 60:.1f}", len(runs), commits(runs)]


def recipes_block(results: Path) -> str:
    """Variants of the demo's recipes: what their encoders gain, and what their tokens tell apart."""
    rows = []
    for name, about in RECIPES.items():
        words, name, cells = f"`{about['method']} {about['differs']}`", f"recipes/{name}", ["not run", *[""] * 6]
        if runs_of(results, name):
            parts = [values(results, f"{name} variance.{part}") for part in ("place", "image")]
            cells = [*gained(results, name), *(spell([100 * share for share in part], 0) for part in parts)]
            words = f"[{words}](../results/{name}.json)"
        rows.append([words, *cells])
    return table("`train.py --method` | kNN, % | linear, % | minutes | seeds | commit | place, % | image, %", rows)


def transfer_block(results: Path) -> str:
    """Dense transfers: each with all encoders that it was made with."""
    encoders, rows = dict(untrained="mae", supervised="mae", mae="mae", cmae="cmae"), []  # and the file of each
    for name, row in TRANSFER.items():
        for score in row["scores"].split():
            cells = {e: values(results, f"transfer/{file} {name}-{e}.{score}") for e, file in encoders.items()}
            cells = [(spell(x, 1) or "not run") if e in row["encoders"].split() else "" for e, x in cells.items()]
            rows.append([f"`{row['words']}`", score.replace("_", " "), *cells])
    files = [results / f"transfer/{name}.json" for name in ("mae", "cmae")]
    made = {file.stem: read(file) for file in files if file.exists()}
    links = [f"[{name}](../results/transfer/{name}.json), {commits(found['runs'])}" for name, found in made.items()]
    notes = [f"† {name}: {found['stale']}." for name, found in made.items() if "stale" in found]
    rows = table(" | ".join(["`transfer.py --run RUN`", "score, %", *encoders]), rows)
    return "\n\n".join([f"`python reproduce.py --transfer`: {'; '.join(links) or 'not run yet'}.", rows, *notes])


def losses_block(results: Path) -> str:
    parts = []
    for folder in ("cpu", "gpu"):
        if found := dict(curves(results, folder)):
            epochs = [epoch for epoch, _ in next(iter(found.values()))]
            shown = sorted({epochs[round(i * (len(epochs) - 1) / 6)] for i in range(7)})
            rows = [[f"`{name}`", *(spell([dict(points)[e]]) if e in dict(points) else "" for e in shown)]
                    for name, points in found.items()]  # fmt: skip
            head = " | ".join([f"loss, {folder}", "first step", *(f"epoch {e}" for e in shown[1:])])
            parts += [table(head, rows)]
    return "\n\n".join(parts) or "Not run yet."


def verdict(low: list[float], high: list[float]) -> str:
    """Of what the paper finds lower, and of what it finds higher: every seed of the one beyond every seed of the other.

    That takes no model of the noise. Chance alone does it once in (n + m choose n) times: once in 20 of 3 and 3.
    """
    if not low or not high:
        return "not run"
    if min(len(low), len(high)) < 3:
        return "not judged: fewer than three seeds"
    return "shown" if min(high) > max(low) else "contradicted" if max(high) < min(low) else "not shown at this scale"


def claims_block(results: Path) -> str:
    rows, verdicts = [], []
    for claim in CLAIMS:
        found = [values(results, side) for side in claim["sides"]]
        names, measures = (dict.fromkeys(parts) for parts in zip(*map(str.split, claim["sides"]), strict=True))
        links = [f"[{name}](../results/{name}.json)" if runs_of(results, name) else name for name in names]
        counts = [len(x) for x in found]
        seeds = " → ".join(map(str, counts if len(set(counts)) > 1 else counts[:1]))
        measured = " → ".join(spell(x) for x in found) if all(found) else ""
        measure = ", ".join(f"`{measure}`" for measure in measures)
        said, where, states = verdict(found[0], found[-1]), f"{claim['paper']}, {claim['where']}", claim["statement"]
        verdicts.append(f"- **{said}** {where}: {states}.")
        rows.append([where, states, claim["reported"], measure, measured, seeds, said, " < ".join(links)])
    head = "paper | claim, from lower to higher | its numbers | measure | mean ± deviation | seeds | verdict | runs"
    differs = [[f"claims/{name}", f"`--method {v['method']} {v['differs']}`"] for name, v in VARIANTS.items()]
    runs = table("run | in place of its method's row in the cpu table", differs)
    return "\n\n".join(["\n".join(verdicts), table(head, rows), runs])


def speed_block(results: Path) -> str:
    """What was measured on GPUs; what `bench.py --json` wrote, machine by machine; figures that were only reported."""
    parts = []
    for file in sorted(results.glob("gpu/card-*.json")):
        found, link = json.loads(file.read_text()), f"../results/gpu/{file.name}"
        about = f"{found['device']}, torch {found['versions']['torch']}, [commands and commits]({link})"
        parts += [f"### {found['device']}", about, table("what | figure | aim | reached", figures(found))]
        for name in ("fast", "others"):
            if result(found, name):
                parts += printed(result(found, name) | dict(git=found["git"]), link)
    for folder in sorted(path for path in results.glob("bench/*") if path.is_dir()):
        parts.append(f"### {folder.name}")
        for file in sorted(folder.glob("*.json")):
            found, link = json.loads(file.read_text()), f"../results/bench/{folder.name}/{file.name}"
            if "figures" in found:
                parts.append(f"[These figures]({link}) were {found['note']}.")
                parts.append(table("what | float32 | bf16", found["figures"]))
            else:
                parts += printed(found, link)
    return "\n\n".join(parts) or "Not run yet."


def figures(found: dict) -> Iterator[list]:
    """What reporting/check_gpu.py has measured, the figure, what was aimed at, and whether it is reached."""

    def row(what: str, value: float | None, sign: str, aim: float, unit: str) -> Iterator[list]:
        if value is not None:
            met = value >= aim if sign == "≥" else value <= aim
            yield [what, f"{value:.3g}{unit}", f"{sign} {aim:g}{unit}", "yes" if met else "no"]

    if said := found["steps"].get("right", {}).get("result", {}).get("said"):
        passed = found["steps"]["right"]["state"] == "ok"
        yield ["tests that use the GPU", said.split(" in ")[0], "all pass", "yes" if passed else "no"]
    for line in [*result(found, "fast").get("rows", []), *result(found, "others").get("rows", [])]:
        if line["name"] == "mae, compiled" and "by_hf" in line:
            yield from row("mae, compiled: times as fast as ViTMAE", line["by_hf"], "≥", 2, "")
        if not line["name"].startswith("hf"):
            yield from row(f"{line['name']}: share of the matrix rate", line["share"], "≥", 45, " %")
    for method, aim in (("mae", 4), ("cmae", 8)):
        epoch = result(found, f"epochs-{method}")
        yield from row(f"{method}: epoch of 100,000 images, ViT-S/8", epoch.get("seconds"), "≤", aim, " s")
        yield from row(f"{method}: a step waits for images and draws", epoch.get("waits"), "≤", 3, " %")
    for name, record in found["steps"].items():
        if name.startswith(("knn", "linear")) and record["state"] == "ok":
            epochs, top1 = found["epochs"][name.split("-")[1]], record["result"]["top1"]
            yield [f"{name} after {epochs} epochs", f"{top1:.1f} %", "", ""]


def printed(found: dict, link: str) -> list[str]:
    """Where a command of bench.py ran; the command and its table."""
    where = f"{found['device']}, {found['threads']} threads, torch {found['versions']['torch']}, "
    lines = [found["command"].split(" --json")[0], *columns(found["rows"]).splitlines()]
    return [f"{where}commit [{commits([found['git']])}]({link})", "\n".join(f"    {x}".rstrip() for x in lines)]


def first_block(results: Path) -> str:
    """README's first command on every machine where it was timed; the demo's table has it too, on one thread."""
    rows = []
    for name in ("first-command", "demo/cmae"):
        for run in (run for run in runs_of(results, name) if run["seed"] == 0):
            top1 = [round(run["measured"][probe]["top1"], 1) for probe in ("knn", "linear")]
            rows.append([run["machine"], round(run["seconds"] / 60, 1), *top1, f"[log](../results/{name}.json)"])
    for file in sorted(results.glob("bench/*/reported.json")):
        rows += json.loads(file.read_text())["first_command"]
    if not rows:
        return "Not run yet."
    low, high = min(row[1] for row in rows), max(row[1] for row in rows)
    head = "machine and precision | minutes (from a log: with evaluation) | kNN, % | linear, % | source"
    return f"It took {low} to {high} minutes on the machines below.\n\n{table(head, rows)}"


def papers() -> dict[str, str]:
    """Method file → its paper's name, as its header begins."""
    return {name: ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text())).split(":")[0] for name in METHODS}


def citations() -> dict[tuple[str, str], list[str]]:
    """(paper, "Eq. 5") → all that cite it, each a link to its file and its name there: "CMAE.forward", "header".

    A method's file cites its own paper unless it names another; the other files cite the last that a line names.
    """
    own, found = papers(), {}
    name = "|".join(sorted(map(re.escape, own.values()), key=len, reverse=True))
    files = [file for place in PLACES for file in HERE.glob(f"{place}*.py")]
    for file in sorted(files, key=lambda file: (file.stem not in own, file)):
        text, path = file.read_text(), file.relative_to(HERE)
        tree = ast.parse(text)
        inside = [(1, tree.body[0].end_lineno, "header"), *places(tree)] if tree.body else []
        for number, line in enumerate(text.splitlines(), 1):
            for match in CITATION.finditer(line):
                before = line[: match.start()]
                paper = re.match(rf" of ({name})(?!\w)", line[match.end() :])
                paper = paper or re.search(rf"(?<![\w-])({name})(?:'s)?(?: \(arXiv [\d.v]+)?,? ?\(?$", before)
                if file.stem not in own:
                    paper = paper or re.search(rf".*(?<![\w-])({name})(?!\w)", before)
                if not (paper := paper[1] if paper else own.get(file.stem)):
                    continue
                label = max([place for place in inside if place[0] <= number <= place[1]], default=(0, 0, ""))[2]
                for item in items(match[2] or match[4]):
                    links = found.setdefault((paper, KINDS[match[0][0]] + item), [])
                    links += [link] if (link := f"[`{path}`](../{path}) {label}".strip()) not in links else []
    return found


def places(tree, prefix: str = ""):
    """(first line, last line, name) of every function, class, method, field and constant."""
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", node)
        if name := getattr(target, "name", None) or getattr(target, "id", None):
            yield node.lineno, node.end_lineno, prefix + name
        if isinstance(node, ast.ClassDef):
            yield from places(node, f"{node.name}.")


def items(text: str) -> Iterator[str]:
    """ "(4), (5)" → 4, 5; "2 to 6" and "4-9": all between."""
    for part in re.split(r", | and ", text.replace("(", "").replace(")", "")):
        ends = re.split(r"-| to ", part)
        yield from map(str, range(int(ends[0]), int(ends[1]) + 1)) if len(ends) == 2 else ends


def index_block(results: Path) -> str:
    def order(key: str):
        return list(KINDS).index(key[0]), [int(n) for n in re.findall(r"\d+", key)], key

    found, parts = citations(), []
    for paper in dict.fromkeys(papers().values()):
        keys = sorted((key for of, key in found if of == paper), key=order)
        rows = table("cited | where", [[key, ", ".join(found[paper, key])] for key in keys])
        parts.append(f"<details><summary>{paper}</summary>\n\n{rows}\n\n</details>")
    return "\n\n".join(parts)


BLOCKS = {  # document: its generated parts, and the function of the results that writes each
    "docs/results.md": dict(results=results_block, losses=losses_block, first=first_block, demo=demo_block,
                            recipes=recipes_block, transfer=transfer_block),
    "docs/claims.md": {"claims": claims_block},
    "docs/speed.md": {"speed": speed_block},
    "docs/equations.md": {"index": index_block},
}  # fmt: skip


def split(name: str, text: str, part: str) -> tuple[str, str, str]:
    """A document up to the first line of a part, the part, and what follows."""
    begin, end = f"<!-- {part} -->", f"<!-- /{part} -->"
    found = re.fullmatch(f"(.*{begin})(.*)({end}.*)", text, re.DOTALL)
    if not found or text.count(begin) != 1 or text.count(end) != 1:
        raise InputError(f"{name}: needs the lines {begin} and {end} in this order, once each")
    return found.groups()


def generated(root: Path, results: Path) -> dict[str, str]:
    """The documents with their generated parts made anew."""
    texts = {name: (root / name).read_text() for name in BLOCKS}
    for name, parts in BLOCKS.items():
        for part, block in parts.items():
            before, _, after = split(name, texts[name], part)
            texts[name] = f"{before}\n\n{block(results)}\n\n{after}"
    return texts


def problems(root: Path, results: Path) -> Iterator[str]:
    """What no longer holds: generated parts, and results whose code has changed and that do not say so."""
    for name, parts in BLOCKS.items():
        text = (root / name).read_text()
        other = [part for part, block in parts.items() if split(name, text, part)[1] != f"\n\n{block(results)}\n\n"]
        yield from (f"{name}: its part {part!r} is not what reproduce.py --readme writes" for part in other)
    for file in sorted(set(results.rglob("*.json")) - {*results.glob("bench/**/*"), *results.glob("gpu/card-*")}):
        made = read(file)
        old = sorted({name for run in made["runs"] for name in changed(run["sources"])})
        if old and not made.get("stale"):
            why = 'run it again, or say in a field "stale" why it may stay'
            yield f"{file.name}: of other code than {', '.join(old)} now; {why}"
