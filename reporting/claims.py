"""What the runs have shown: result files, the ledger of the papers' claims, and the parts of README made from them.

`reproduce.py` does the runs and calls this file; nothing here trains. README's results table, claims, losses and index
of equations stand between `<!-- name -->` and `<!-- /name -->`, and are what `generated` writes there.

A result file holds the commands of a run, its configuration, and for each seed commit, versions, kind of machine,
losses, measures, and `sources`: the names that git gives to the contents of the method's files. So it shows whether
their code is still what made the result, in an archive without history too. Where it is not, a field "stale" in the
result file says why the result may stay.
"""

import ast
import hashlib
import json
import re
import statistics
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bench import table as columns
from methods import METHODS
from runtime.errors import InputError

HERE = Path(__file__).parent.parent
TABLE = [name for name in METHODS if name not in ("autoencoder", "dvae")]  # a foil of LC-MAE's, and a tokenizer
BASELINES = "scratch"  # an untrained encoder, supervised training, pixels
ROWS = [BASELINES, *TABLE]

# ------------------------------------------------------------------------------------------------------ result files


def read(file: Path) -> dict:
    """A result file: {"method", "commands", "config", "runs": a list, one for each seed}."""
    try:
        found = json.loads(file.read_text())
        if {"method", "commands", "config"} <= found.keys() and all("measured" in run for run in found["runs"]):
            return found
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    raise InputError(f"{file}: not a result of reproduce.py; delete it, and run its commands again")


def runs_of(results: Path, name: str) -> list[dict]:
    file = results / f"{name}.json"
    return read(file)["runs"] if file.exists() else []


def value(run: dict, key: str) -> float | None:
    """Of one seed: "linear.top1" as measured, "loss.accuracy" of the last epoch."""
    name, part = key.split(".")
    return (run["loss"][-1] if name == "loss" else run["measured"].get(name, {})).get(part)


def values(results: Path, side: str) -> list[float]:
    """Of all seeds: "cpu/mae linear.top1"."""
    name, key = side.split()
    return [x for run in runs_of(results, name) if (x := value(run, key)) is not None]


def sources(method: str, data: str = "") -> dict[str, str]:
    """The method's file, those of methods that it imports, that of built-in images: each with its content's name."""
    text = (HERE / f"{method}.py").read_text()
    names = [method, *(name for name in METHODS if re.search(rf"^import {name}$", text, re.MULTILINE))]
    names += ["inputs/builtin_images"] if data == "shapes" else []
    return {f"{name}.py": blob((HERE / f"{name}.py").read_bytes()) for name in names}


def blob(content: bytes) -> str:
    """git's name of a file's content, which needs no git."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


RENAMED = {"shapes.py": "inputs/builtin_images.py"}  # what a file that old results name is called now


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


# ------------------------------------------------------------------------------------------------------------ claims

# Runs that claims need beyond the cpu table: the method, what differs from its row there, what is measured.
VARIANTS = {
    "lcmae-cross": ("lcmae", "--mae-weight 0 --in-weight 0", "spread knn"),
    "lcmae-cross-in": ("lcmae", "--mae-weight 0", "spread knn"),
    "lcmae-cross-mae": ("lcmae", "--in-weight 0", "spread knn"),
    "autoencoder": ("autoencoder", "--block 8", "knn linear"),
    "mae-30": ("mae", "--mask-ratio 0.3", "attention"),
    "mae-60": ("mae", "--mask-ratio 0.6", "attention"),
    "mae-90": ("mae", "--mask-ratio 0.9", "attention"),
    "mae-deep": ("mae", "--decoder-depth 4", "positions"),
    "cae-pixels": ("cae", "--target pixels", "latents"),
    "cae-pixels-unaligned": ("cae", "--target pixels --lambda-z 0", "latents"),
    "conmim-unmasked": ("conmim", "--masking none", "linear finetune"),
    "conmim-no-ema": ("conmim", "--no-slow", "linear finetune"),
    "cmae-0": ("cmae", "--lambda-c 0", "linear finetune"),
    "cmae-2": ("cmae", "--lambda-c 2", "linear finetune"),
    "cmae-crops": ("cmae", "--no-pixel-shift", "linear finetune"),
    "cmae-far": ("cmae", "--shift-range 48-63", "linear finetune"),
    "cmae-no-decoder": ("cmae", "--feature-decoder-depth 0", "linear finetune"),
    "cmae-target-75": ("cmae", "--target-mask-ratio 0.75", "linear finetune"),
}


@dataclass(frozen=True)
class Claim:
    paper: str
    where: str
    statement: str
    reported: str  # by the paper, in the order of `order`; of CMAE and ConMIM: ImageNet, fine-tuned
    measure: str  # "linear.top1", as `value` knows it
    order: tuple[str, ...]  # results, from what the paper finds lowest to what it finds highest


def claim(paper: str, where: str, statement: str, reported: str, measure: str, *order: str) -> Claim:
    return Claim(paper, where, statement, reported, measure, order)


TOP1 = "finetune.top1"
CLAIMS = [
    claim("LC-MAE", "Table 1", "L_cross alone collapses; L_in prevents it (v's spread over images)",
          "collapse < 82.5", "spread.deviation", "claims/lcmae-cross", "claims/lcmae-cross-in"),
    claim("LC-MAE", "Table 1", "L_cross alone collapses; L_MAE prevents it (v's spread over images)",
          "collapse < 83.1", "spread.deviation", "claims/lcmae-cross", "claims/lcmae-cross-mae"),
    claim("LC-MAE", "Table 3", "a plain autoencoder probes far below MAE",
          "5.7 < 55.4", "linear.top1", "claims/autoencoder", "cpu/mae"),
    claim("LC-MAE", "Figure 6", "the encoder's attention distance (pixels) grows with the mask ratio: .3 .6 .75 .9",
          "rises", "attention.distance", "claims/mae-30", "claims/mae-60", "cpu/mae", "claims/mae-90"),
    claim("LC-MAE", "Figure 2", "the decoder's first layer attends by position, alike in all images; later ones less",
          "later < first, up to 0.9", "positions.later positions.first", "claims/mae-deep", "claims/mae-deep"),
    claim("CAE", "Figure 4", "with alignment the decoder reads the encoder's latents, the regressor skipped (error)",
          "images < noise", "latents.error", "claims/cae-pixels", "claims/cae-pixels-unaligned"),
    claim("CAE", "Table 1", "linear probing is far below attentive probing",
          "64.1 < 73.8", "linear-paper.top1 attentive.top1", "cpu/cae", "cpu/cae"),
    claim("ConMIM", "Table 4", "without masking the task is trivial (share of patches that are found)",
          "masked < unmasked", "loss.accuracy", "cpu/conmim", "claims/conmim-unmasked"),
    claim("ConMIM", "Table 4", "without masking little is learned",
          "fails < 83.51", TOP1, "claims/conmim-unmasked", "cpu/conmim"),
    claim("ConMIM", "Table 6", "without the slow copy (EMA) less is learned",
          "81.53 < 83.51", TOP1, "claims/conmim-no-ema", "cpu/conmim"),
    claim("CMAE", "Table 4a, 4d", "contrast helps: λ_c 0 and 1", "82.9 < 83.8", TOP1, "claims/cmae-0", "cpu/cmae"),
    claim("CMAE", "Table 4d", "too much of it harms: λ_c 2 and 1", "83.2 < 83.8", TOP1, "claims/cmae-2", "cpu/cmae"),
    claim("CMAE", "Table 4b, 6", "random crops are worse than pixel shifts",
          "83.29 < 83.82", TOP1, "claims/cmae-crops", "cpu/cmae"),
    claim("CMAE", "Table 6", "large shifts are worse than small ones: 48-63 and 0-31",
          "83.48 < 83.82", TOP1, "claims/cmae-far", "cpu/cmae"),
    claim("CMAE", "Table 4c", "the feature decoder helps: 0 and 2 blocks",
          "83.6 < 83.8", TOP1, "claims/cmae-no-decoder", "cpu/cmae"),
    claim("CMAE", "Table 4e", "masking the target branch harms: .75 and 0",
          "83.0 < 83.8", TOP1, "claims/cmae-target-75", "cpu/cmae"),
    claim("CMAE", "Figure 6", "contrast makes classes evenly tight (standard deviation of distances within)",
          ".0189 < .0371", "classes.intra_std", "cpu/cmae", "cpu/mae"),
    claim("CMAE", "Figure 6", "contrast draws classes apart (distance between centres)",
          ".0309 < .0340", "classes.inter_mean", "cpu/mae", "cpu/cmae"),
    claim("The other CMAE", "Table 1", "MAE is below it; ten classes of Tiny-ImageNet here",
          "62.95 < 65.84", TOP1, "cpu/mae", "cpu/cmae_loc"),
    claim("The other CMAE", "Table 1", "MAE is below it; all of Tiny-ImageNet, the GPU's budget",
          "62.95 < 65.84", TOP1, "gpu/mae", "gpu/cmae_loc"),
]  # fmt: skip


def sides(claim: Claim) -> list[str]:
    """What is compared, as `values` takes it."""
    measures = claim.measure.split()
    measures = measures if len(measures) > 1 else measures * len(claim.order)
    return [f"{name} {measure}" for name, measure in zip(claim.order, measures, strict=True)]


def verdict(low: list[float], high: list[float]) -> str:
    """Of what the paper finds lower, and of what it finds higher: every seed of the one beyond every seed of the other.

    That takes no model of the noise. Chance alone does it once in (n + m choose n) times: once in 20 of 3 and 3.
    """
    if not low or not high:
        return "not run"
    if min(len(low), len(high)) < 3:
        return "not judged: fewer than three seeds"
    return "shown" if min(high) > max(low) else "contradicted" if max(high) < min(low) else "not shown at this scale"


RULE = """`python reproduce.py --claims --data-root DIR --jobs 2` does the runs, three seeds of each, those of the cpu
table among them that it needs; `--claims --list` prints every command, `--readme` writes what stands here. A verdict
compares the first with the last of a claim's runs, which stand from what the paper finds lowest to what it finds
highest: *shown* where every seed of the one lies beyond every seed of the other as in the paper, *contradicted* where
it does the other way round, else *not shown at this scale*; *not judged* where a side has fewer than three seeds.
Of three seeds and three, chance alone sets all apart in the paper's direction once in twenty times, so that a row of
this table may well be false. `measure` is what the result files call it: `linear` is the quick probe, `linear-paper`
the paper's. The demo's recipe stands behind all of them, and so CMAE's L_c is scaled by 2τ, as in its official code."""


# ------------------------------------------------------------------------------------------------------------ tables


def table(head: str, rows: list[list]) -> str:
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


def commits(runs: list[dict]) -> str:
    return ", ".join(sorted({(run["commit"] or "?")[:7] + "*" * bool(run["dirty"]) for run in runs}))


def results_block(results: Path) -> str:
    parts = []
    for folder in ("cpu", "gpu"):
        rows, notes, machines, name = [], {}, set(), None
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
            rows.append([label, len(runs), *cells, last, minutes, f"[{commits(runs)}](results/{name}.json)"])
            machines |= {run["machine"] for run in runs}
        if name is None:
            parts.append(f"`python reproduce.py --budget {folder}`: not run yet.")
            continue
        config = found["config"]
        size = f"{config['classes']} classes of " if "classes" in config else ""
        head = "method | seeds | kNN | linear | attentive | fine-tuned | loss | minutes | commit, log"
        parts += [
            f"`python reproduce.py --budget {folder}`: {size}{config['data']}, {config['model']} encoder, "
            f"{config['epochs']} epochs, on {' or '.join(sorted(machines))}. Top-1 in per cent, mean ± standard "
            "deviation over seeds; minutes of a seed, measuring included; * a tree with changes.",
            table(head, rows), *(f"† {', '.join(names)}: {why}" for why, names in notes.items()),
        ]  # fmt: skip
    return "\n\n".join(parts)


def curves(results: Path, folder: str) -> dict[str, list[tuple[float, float]]]:
    """Method → (epoch, loss), mean over seeds."""
    found = {}
    for name in names_of(results, folder):
        if BASELINES not in name:
            together = zip(*(run["loss"] for run in runs_of(results, name)), strict=True)
            found[name.split("/")[1]] = [(at[0]["epoch"], statistics.mean(x["loss"] for x in at)) for at in together]
    return found


def demo_block(results: Path) -> str:
    """What `train.py --method NAME` does on the built-in images: losses by share of the run, the encoder's gain."""
    rows, drawn, machines = [], curves(results, "demo"), set()
    for name in names_of(results, "demo"):
        runs, points = runs_of(results, name), drawn[name.split("/")[1]]
        shown = [spell([points[round(i * (len(points) - 1) / 4)][1]]) for i in range(5)]
        gains = [" → ".join(spell(values(results, f"{name} {k}.top1"), 1) for k in (f"{probe}-untrained", probe))
                 for probe in ("knn", "linear")]  # fmt: skip
        minutes = f"{statistics.mean(run['seconds'] for run in runs) / 60:.1f}"
        label = f"[`--method {name.split('/')[1]}`](results/{name}.json)"
        rows.append([label, points[-1][0], *shown, *gains, minutes, len(runs), commits(runs)])
        machines |= {run["machine"] for run in runs}
    if not rows:
        return "`python reproduce.py --budget demo`: not run yet."
    head = "`train.py` | epochs | first loss | ¼ | ½ | ¾ | last | kNN, % | linear, % | minutes | seeds | commit"
    return f"`python reproduce.py --budget demo`, on {' or '.join(sorted(machines))}.\n\n{table(head, rows)}"


def losses_block(results: Path) -> str:
    parts = []
    for folder in ("cpu", "gpu"):
        if found := curves(results, folder):
            epochs = [epoch for epoch, _ in next(iter(found.values()))]
            shown = sorted({epochs[round(i * (len(epochs) - 1) / 6)] for i in range(7)})
            rows = [[f"`{name}`", *(spell([dict(points)[e]]) if e in dict(points) else "" for e in shown)]
                    for name, points in found.items()]  # fmt: skip
            head = " | ".join([f"loss, {folder}", "first step", *(f"epoch {e}" for e in shown[1:])])
            parts += [table(head, rows), f"![Losses, each method on its own scale](results/losses-{folder}.svg)"]
    return "\n\n".join(parts) or "Not run yet."


def drawing(results: Path, folder: str) -> str:
    """The losses as SVG: a panel for each method, on its own scale."""
    panels = []
    for i, (name, points) in enumerate(curves(results, folder).items()):
        low, high, last = min(y for _, y in points), max(y for _, y in points), points[-1][0]
        line = " ".join(f"{40 + 180 * x / last:.1f},{20 + 90 * (high - y) / (high - low or 1):.1f}" for x, y in points)
        panels.append(
            f'<g transform="translate({i % 3 * 240},{i // 3 * 140})">\n'
            '<path d="M40 20V110H220" fill="none" stroke="#888"/>\n'
            f'<polyline points="{line}" fill="none" stroke="#0b3c6f" stroke-width="2"/>\n'
            f'<text x="130" y="14" text-anchor="middle">{name}</text>\n'
            f'<text x="220" y="124" text-anchor="end">epoch {last}</text>\n'
            f'<text x="36" y="26" text-anchor="end">{high:.2f}</text>\n'
            f'<text x="36" y="110" text-anchor="end">{low:.2f}</text>\n</g>\n'
        )
    size = f'viewBox="0 0 720 {140 * -(-len(panels) // 3)}" font-family="sans-serif" font-size="11"'
    ground = '<rect width="100%" height="100%" fill="#fff"/>\n'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{ground}{"".join(panels)}</svg>\n'


def claims_block(results: Path) -> str:
    rows = []
    for claim in CLAIMS:
        found = [values(results, side) for side in sides(claim)]
        names = dict.fromkeys(claim.order)
        links = [f"[{name}](results/{name}.json)" if runs_of(results, name) else name for name in names]
        counts = [len(x) for x in found]
        seeds = " → ".join(map(str, counts if len(set(counts)) > 1 else counts[:1]))
        measured = " → ".join(spell(x) for x in found) if all(found) else ""
        measure = ", ".join(f"`{measure}`" for measure in claim.measure.split())
        rows.append([f"{claim.paper}, {claim.where}", claim.statement, claim.reported, measure, measured, seeds,
                     verdict(found[0], found[-1]), " < ".join(links)])  # fmt: skip
    head = "paper | claim, from lower to higher | its numbers | measure | mean ± deviation | seeds | verdict | runs"
    differs = [[f"claims/{name}", f"`--method {m} {flags}`"] for name, (m, flags, _) in VARIANTS.items()]
    return "\n\n".join([RULE, table(head, rows), table("run | in place of its method's row in the cpu table", differs)])


def speed_block(results: Path) -> str:
    """What `bench.py --json` wrote, as it printed it."""
    parts = []
    for file in sorted(results.glob("bench/*.json")):
        found = json.loads(file.read_text())
        commit = (found["git"].get("commit") or "?")[:7] + "*" * bool(found["git"].get("dirty"))
        where = f"{found['device']}, {found['threads']} threads, torch {found['versions']['torch']}, "
        where += f"commit [{commit}](results/bench/{file.name})"
        lines = [found["command"].split(" --json")[0], *columns(found["rows"]).splitlines()]
        parts += [where, "\n".join(f"    {line}".rstrip() for line in lines)]
    return "\n\n".join(parts) or "Not run yet."


# ------------------------------------------------------------------------------------------- index of what is cited

ITEM = r"\(?(?:[A-Z]\.?)?\d+(?:\.\d+)*[a-e]?(?!\w)\)?"
LIST = rf"{ITEM}(?:(?:, | and |-| to ){ITEM})*"
CITATION = re.compile(rf"(Eqs?\.|Tables?|Fig(?:ure|ures|\.|s\.)|Algorithm) ?({LIST})|(§)({ITEM})")
KINDS = {"E": "Eq. ", "T": "Table ", "F": "Figure ", "A": "Algorithm ", "§": "§"}  # by first letter


def papers() -> dict[str, str]:
    """Method file → its paper's name, as its header begins."""
    return {name: ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text())).split(":")[0] for name in METHODS}


def citations() -> dict[tuple[str, str], list[str]]:
    """(paper, "Eq. 5") → links to all that cite it: functions, classes, fields, headers.

    A method's file cites its own paper unless it names another; the other files cite the last that a line names.
    """
    own, found = papers(), {}
    name = "|".join(sorted(map(re.escape, own.values()), key=len, reverse=True))
    files = {*HERE.glob("*.py"), *HERE.glob("[!.t]*/*.py")} - {Path(__file__)}  # the claims are in README itself
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
                    links = found.setdefault((paper, KINDS[match[0][0]] + item), {})
                    links.setdefault((file, label), f"[{path}:{number}]({path}#L{number}) {label}".strip())
    return {key: list(links.values()) for key, links in found.items()}


def places(tree, prefix: str = ""):
    """(first line, last line, name) of every function, class, method, field and constant."""
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", node)
        if name := getattr(target, "name", None) or getattr(target, "id", None):
            yield node.lineno, node.end_lineno, prefix + name
        if isinstance(node, ast.ClassDef):
            yield from places(node, f"{node.name}.")


def items(text: str) -> list[str]:
    """ "(4), (5)" → 4, 5; "2 to 6" and "4-9": all between."""
    listed = []
    for part in re.split(r", | and ", text.replace("(", "").replace(")", "")):
        ends = re.split(r"-| to ", part)
        listed += map(str, range(int(ends[0]), int(ends[1]) + 1)) if len(ends) == 2 else ends
    return listed


def index_block(results: Path) -> str:
    def order(key: str):
        return list(KINDS).index(key[0]), [int(n) for n in re.findall(r"\d+", key)], key

    found, parts = citations(), []
    for paper in dict.fromkeys(papers().values()):
        keys = sorted((key for of, key in found if of == paper), key=order)
        rows = table("cited | where", [[key, ", ".join(found[paper, key])] for key in keys])
        parts.append(f"<details><summary>{paper}</summary>\n\n{rows}\n\n</details>")
    return "\n\n".join(parts)


# ------------------------------------------------------------------------------------------------------------ README

BLOCKS = {
    "demo": demo_block, "results": results_block, "claims": claims_block, "losses": losses_block, "speed": speed_block,
    "index": index_block,
}  # fmt: skip


def parts_of(readme: str, name: str) -> tuple[str, str, str]:
    """README up to a block's first line, the block, and what follows."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if readme.count(begin) != 1 or readme.count(end) != 1 or readme.index(end) < readme.index(begin):
        raise InputError(f"README.md: needs the lines {begin} and {end} in this order, once each")
    before, rest = readme.split(begin)
    block, after = rest.split(end)
    return before + begin, block, end + after


def generated(readme: str, results: Path) -> str:
    """README with its blocks made anew."""
    for name, block in BLOCKS.items():
        before, _, after = parts_of(readme, name)
        readme = f"{before}\n\n{block(results)}\n\n{after}"
    return readme


def problems(readme: str, results: Path) -> list[str]:
    """What no longer holds: parts of README, drawings, and results whose code has changed and that do not say so."""
    again = generated(readme, results)
    found = [
        f"README.md: its part {name!r} is not what reproduce.py --readme writes"
        for name in BLOCKS
        if parts_of(readme, name)[1] != parts_of(again, name)[1]
    ]
    for folder in ("cpu", "gpu"):
        file = results / f"losses-{folder}.svg"
        if curves(results, folder) and (not file.exists() or file.read_text() != drawing(results, folder)):
            found.append(f"{file.name}: is not what reproduce.py --readme writes")
    for file in sorted(set(results.rglob("*.json")) - set(results.glob("bench/*.json"))):
        result = read(file)
        old = sorted({name for run in result["runs"] for name in changed(run["sources"])})
        if old and not result.get("stale"):
            found.append(f"{file.name}: of other code than {', '.join(old)} now; run it again, or say in a field "
                         '"stale" why it may stay')  # fmt: skip
    return found
