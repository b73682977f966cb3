"""Two methods side by side: their definitions by name, and of those that both have the lines that differ."""

import ast
from difflib import SequenceMatcher
from typing import NamedTuple

from methods import METHODS
from reporting.pages.source import source


class Block(NamedTuple):
    """A definition of either file, or what stands between two; `lines` are (number, HTML, only here, indent)."""

    name: str
    lines: list[tuple[int, str, bool, int]]


def blocks(page: str) -> dict[str, range]:
    """Name → lines, without a gap: the header, imports, each definition, each method of a class."""
    of, found = source(page), {"header": 1}
    for node in of.tree.body[1:]:
        other = "imports" if isinstance(node, ast.Import | ast.ImportFrom) else f"line {node.lineno}"
        name = next((name for name, d in of.definitions.items() if d.node is node), other)
        found.setdefault(name, first_line(of, node))
        if isinstance(node, ast.ClassDef):
            inner = [x for x in node.body if isinstance(x, ast.FunctionDef)]
            found |= {f"{node.name}.{x.name}": first_line(of, x) for x in inner}
    starts = [*found.values(), len(of.lines) + 1]
    return {
        name.replace(METHODS[page].__name__, "the method"): range(starts[i], starts[i + 1])
        for i, name in enumerate(found)
    }


def first_line(of, node: ast.stmt) -> int:
    """With its decorators and the comment right above."""
    line = min([node.lineno, *(part.lineno for part in getattr(node, "decorator_list", []))])
    while of.lines[line - 2].startswith("# "):
        line -= 1
    return line


def compare(left: str, right: str) -> list[tuple[Block | None, Block | None]]:
    """The definitions of both in their orders; those of one name beside each other."""
    (a, ours), (b, theirs) = ((blocks(page), list(blocks(page))) for page in (left, right))
    pairs: list[tuple[str | None, str | None]] = []
    for how, i, j, k, m in SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes():
        if how == "equal":
            pairs += zip(ours[i:j], theirs[k:m], strict=True)
        else:
            pairs += [(name, None) for name in ours[i:j]] + [(None, name) for name in theirs[k:m]]
    for name in set(ours) & set(theirs):  # at different places in the two: beside the right one's
        if (name, None) in pairs:
            pairs.remove((name, None))
            pairs[pairs.index((None, name))] = (name, name)
    return [(block(left, x, a, right, b), block(right, y, b, left, a)) for x, y in pairs]


def block(page: str, name: str | None, spans: dict, other: str, theirs: dict) -> Block | None:
    if name is None:
        return None
    of = source(page)
    there = {source(other).lines[n - 1].strip() for n in theirs.get(name, ())} | {""}
    lines = [(n, of.html[n - 1], of.lines[n - 1]) for n in spans[name]]
    return Block(name, [(n, html, s.strip() not in there, len(s) - len(s.lstrip())) for n, html, s in lines])
