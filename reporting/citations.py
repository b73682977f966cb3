"""The index of what the code cites: every equation, table and figure of a paper, with the lines that compute it."""

import ast
import re
from pathlib import Path

from methods import METHODS
from reporting import HERE
from reporting.tables import table

ITEM = r"\(?(?:[A-Z]\.?)?\d+(?:\.\d+)*[a-e]?(?!\w)\)?"
LIST = rf"{ITEM}(?:(?:, | and |-| to ){ITEM})*"
CITATION = re.compile(rf"(Eqs?\.|Tables?|Fig(?:ure|ures|\.|s\.)|Algorithm) ?({LIST})|(§)({ITEM})")
PLACES = ["", "inputs/", "runtime/", "downstream/", "figures/", "reporting/measures"]  # other than tests and claims
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
                    links = found.setdefault((paper, KINDS[match[0][0]] + item), {})
                    links.setdefault((file, label), f"[{path}:{number}](../{path}#L{number}) {label}".strip())
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
