"""One source file as a page shows it: its definitions by name, where its names lead, its lines highlighted."""

import ast
import re
from collections.abc import Iterator
from functools import cache, cached_property
from html import escape
from typing import NamedTuple

from pygments.lexers import PythonLexer
from pygments.token import STANDARD_TYPES

from methods import METHODS
from reporting import HERE
from runtime.errors import InputError

PAGES = [*METHODS, "common", "train"]
Functions = ast.FunctionDef | ast.AsyncFunctionDef


class Definition(NamedTuple):
    first: int  # its lines, decorators included
    last: int
    about: str  # the first line of its docstring, the comment beside it, or the line itself
    node: ast.AST


@cache
def source(name: str) -> "Source":
    return Source(name, (HERE / (name.replace(".", "/") + ".py")).read_text())


class Source:
    """`name` is the module's, as imports write it."""

    def __init__(self, name: str, text: str):
        self.name, self.text, self.tree = name, text, ast.parse(text)
        self.lines = text.splitlines()
        self.definitions = dict(self.defined(self.tree.body, ""))

    def defined(self, body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, Definition]]:
        """Qualified name → definition of all functions, classes, constants, fields, and of what `__init__` builds."""
        for node in body:
            if isinstance(node, ast.ClassDef | Functions):
                first = min([node.lineno, *(part.lineno for part in node.decorator_list)])
                about = (ast.get_docstring(node) or self.lines[node.lineno - 1].strip()).split("\n")[0]
                yield prefix + node.name, Definition(first, node.end_lineno, about, node)
                if isinstance(node, ast.ClassDef):
                    yield from self.defined(node.body, f"{prefix}{node.name}.")
                elif node.name == "__init__":
                    yield from self.built(node, prefix)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                line = self.lines[node.lineno - 1].strip()
                about = line.split("  # ", 1)[-1]
                for name in names(node):
                    yield prefix + name, Definition(node.lineno, node.end_lineno, about, node)

    def built(self, init: ast.FunctionDef, prefix: str) -> Iterator[tuple[str, Definition]]:
        stored = (x for x in ast.walk(init) if isinstance(x, ast.Attribute) and isinstance(x.ctx, ast.Store))
        for node in stored:
            if ast.unparse(node.value) == "self":
                line = self.lines[node.lineno - 1].strip()
                yield prefix + node.attr, Definition(node.lineno, node.lineno, line, node)

    def place(self, at: str) -> int:
        """The line that `at` names: "CMAE.forward", or "CMAE.forward | text", text that one of its lines contains."""
        name, _, text = (part.strip() for part in at.partition(" | "))
        if name not in self.definitions:
            raise InputError(f"at: {at}: {self.name}.py defines no {name}; give a function, a class or Class.method")
        first, last, *_ = self.definitions[name]
        found = [n for n in range(first, last + 1) if text in self.lines[n - 1]] if text else [first]
        if len(found) != 1:
            raise InputError(f"at: {at}: {len(found)} lines of {name} contain {text!r}; give text that one line has")
        return found[0]

    @cached_property
    def imported(self) -> dict[str, tuple[str, str]]:
        """What a name stands for: (module, name in it), or (module, "")."""
        found = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found |= {alias.asname or alias.name: (alias.name, "") for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    whole = (HERE / node.module / f"{alias.name}.py").exists()  # from runtime import dalle
                    target = (f"{node.module}.{alias.name}", "") if whole else (node.module, alias.name)
                    found[alias.asname or alias.name] = target
        return found

    def find(self, name: str) -> tuple[str, str] | None:
        """Where a name of this file, with or without dots, is defined: (module, qualified name), if in our files."""
        if name in self.definitions:
            return self.name, name
        head, _, rest = name.partition(".")
        if head in self.imported:
            module, within = self.imported[head]
            wanted = ".".join(part for part in (within, rest) if part)
            ours = (HERE / (module.replace(".", "/") + ".py")).exists()
            return (ours and wanted and module != self.name and source(module).find(wanted)) or None
        if rest and head in self.definitions and isinstance(node := self.definitions[head].node, ast.ClassDef):
            found = [self.find(f"{ast.unparse(base)}.{rest}") for base in node.bases]
            return next(filter(None, found), None)
        return None

    @cached_property
    def links(self) -> dict[tuple[int, int], tuple[str, str]]:
        """(line, column) of a name → where it is defined."""
        return {at: target for at, name in Names(self).found.items() if (target := self.find(name))}

    @cached_property
    def html(self) -> list[str]:
        """The lines as HTML: kinds of words as Pygments tells them, and links on our own names."""
        rows, line, column = [""], 1, 0
        for kind, value in PythonLexer(stripnl=False, ensurenl=False).get_tokens(self.text):
            for i, part in enumerate(value.split("\n")):
                if i:
                    rows.append("")
                    line, column = line + 1, 0
                if part:
                    rows[-1] += self.word(STANDARD_TYPES.get(kind, ""), part, self.links.get((line, column)))
                column += len(part)
        return [row.replace('-</span><span class="o">&gt;', "-&gt;") for row in rows[: len(self.lines)]]  # one arrow

    def word(self, kind: str, text: str, target: tuple[str, str] | None) -> str:
        if text == ".":  # where a long line may go on
            return ".<wbr>"
        html = f'<span class="{kind}">{escape(text)}</span>' if kind not in ("", "n", "p", "w") else escape(text)
        if not target:
            return html
        module, name = target
        about = source(module).definitions[name].about
        about = re.sub(r"(?<!other )\bCMAE\b(?!\*)", "cmae.py", about)  # there is another CMAE, whose page has them too
        tag = f'a href="{module}.html#{name}"' if module in PAGES else "span"
        return f'<{tag} class="name" title="{module}.{name}: {escape(about)}">{html}</{tag.split()[0]}>'


def names(node: ast.stmt) -> list[str]:
    """The plain names that a statement assigns."""
    return [x.id for x in ast.walk(node) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)]


class Names(ast.NodeVisitor):
    """Every name in a file that is written with what we know of it: (line, column) → a name that `Source.find` takes.

    A parameter's annotation says what its attributes are; `self` is of its class, `c` and `config` of `Config`.
    """

    def __init__(self, of: Source):
        self.of, self.found, self.kinds, self.local = of, {}, {}, set()
        self.visit(of.tree)

    def put(self, line: int, column: int, name: str | None) -> None:
        if name:  # ast counts bytes, a page counts characters
            self.found[line, len(self.of.lines[line - 1].encode()[:column].decode())] = name

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        before, self.kinds = self.kinds, {"self": node.name, "c": "Config", "config": "Config"}
        self.generic_visit(node)
        self.kinds = before

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        arguments = [*node.args.args, *node.args.kwonlyargs]
        before = self.kinds, self.local
        self.kinds = self.kinds | {x.arg: kind(x.annotation) for x in arguments if x.annotation}
        stored = {name for statement in node.body for name in names(statement)}
        self.local = self.local | {x.arg for x in arguments} | stored
        self.generic_visit(node)
        self.kinds, self.local = before

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load) and node.id not in self.local:
            self.put(node.lineno, node.col_offset, node.id)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.put(node.end_lineno, node.end_col_offset - len(node.attr.encode()), self.name_of(node))
        self.visit(node.value)

    def visit_alias(self, node: ast.alias) -> None:
        self.put(node.lineno, node.col_offset, node.name.split(".")[-1])

    def name_of(self, node: ast.Attribute) -> str | None:
        value = node.value
        if isinstance(value, ast.Name):
            if value.id in self.kinds:
                return f"{self.kinds[value.id]}.{node.attr}"
            return None if value.id in self.local else f"{value.id}.{node.attr}"
        if isinstance(value, ast.Attribute) and value.attr == "config":
            return f"Config.{node.attr}"
        if isinstance(value, ast.Attribute) and (target := self.of.find(self.name_of(value) or "")):
            definition = source(target[0]).definitions[target[1]].node
            if isinstance(definition, ast.AnnAssign):  # a field: batch.mask.visible
                return f"{kind(definition.annotation)}.{node.attr}"
        return None


def kind(annotation: ast.expr) -> str:
    """The class that an annotation names first: "Mask" of `Mask | None`."""
    return re.split(r"\W", ast.unparse(annotation))[0]
