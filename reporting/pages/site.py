"""The site: a page for each method, for common.py and for the loop, pairs of methods side by side, and an index."""

import ast
import json
import re
from dataclasses import dataclass, field
from html import unescape
from itertools import combinations
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from methods import METHODS
from reporting.pages import annotations, claims_and_losses, diagram, pictures, side_by_side, traced_step
from reporting.pages.ablations import SWITCHES
from reporting.pages.source import PAGES, Source, source
from runtime import files

TEMPLATES = Path(__file__).parent / "templates"


@dataclass
class Row:
    """A note, and the lines of code beside it, up to the next note."""

    note: annotations.Note | None = None
    lines: list[dict] = field(default_factory=list)

    def text(self) -> list[str]:
        """What stands of its note, and what is folded away so that the note is no higher than its lines."""
        return self.note.parts(len(self.lines) + sum(6 for line in self.lines if line["below"]))


@dataclass
class Setting:
    """A step that a page can show."""

    name: str
    losses: str
    chips: dict[int, list[traced_step.Chip]]
    idle: set[int]
    legend: dict[str, str]  # of the letters of its chips


def build(out: str, runs: str = "runs") -> None:
    """Pictures of what is filled in are those of the runs METHOD-shapes in `runs`, where there are some."""
    directory = Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    templates = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    templates.globals |= dict(pages=PAGES, methods=METHODS, measured=claims_and_losses.measured)

    def write(file: str, template: str, **values) -> None:
        files.write_text(directory / file, templates.get_template(template).render(**values))

    settings, below = steps(Path(runs))
    found = [page_of(name, settings[name], below.get(name, {})) for name in PAGES]
    for page in found:
        write(f"{page['name']}.html", "page.html", **page)
    for left, right in combinations(METHODS, 2):
        write(f"{left}-{right}.html", "beside.html", left=left, right=right, blocks=side_by_side.compare(left, right))
    write("index.html", "index.html", found=found)
    for name in ("style.css", "page.js"):
        files.write_text(directory / name, (TEMPLATES / name).read_text())
    index = [entry for page in found for entry in search_entries(page)]
    files.write_text(directory / "search.js", f"const INDEX = {compact(index)};\n")


def compact(value) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def steps(runs: Path) -> tuple[dict[str, list[Setting]], dict[str, dict[int, str]]]:
    """Page → the steps that it shows: a method's under each of its settings; in common.py those of all methods.

    And page → line → what is shown below it.
    """
    found, below = {name: [] for name in PAGES}, {}
    for name in METHODS:
        for label, changes in [("as by default", {}), *SWITCHES.get(name, [])]:
            step, other = traced_step.run_step(name, changes), traced_step.run_step(name, changes, other=True)
            chips, pages = traced_step.chips(step, other), {name: label}
            if not changes:
                pages["common"], below[name] = f"a step of {name}", shown(name, step, runs)
            losses = ", ".join(f"{key} {value:.4g}" for key, value in step.losses.items())
            for page, title in pages.items():
                here = {line: row for (at, line), row in chips.items() if at == page}
                idle = traced_step.idle(source(page), step.ran.get(page, set()))
                found[page].append(Setting(title, losses, here, idle, traced_step.legend(step, here.values())))
    return found, below


def shown(name: str, step: traced_step.Step, runs: Path) -> dict[int, str]:
    """Line → what is below it: the batch after `draw`, losses after `forward`, after `picture` what is filled in."""
    draw, forward, picture = (
        source(name).definitions[f"{METHODS[name].__name__}.{at}"].last for at in ("draw", "forward", "picture")
    )
    found = {draw: pictures.drawn(step), forward: claims_and_losses.curve(name)}
    if (checkpoint := runs / f"{name}-shapes" / "checkpoint.pt").exists():
        found[picture] = pictures.made(traced_step.run_step(name, checkpoint=checkpoint))
    return found


def page_of(name: str, settings: list[Setting], below: dict[int, str]) -> dict:
    of, page = source(name), annotations.read(name)
    first = settings[0] if settings else Setting("", "", {}, set(), {})
    return dict(
        name=name, page=page, of=of, rows=rows(of, page.notes, first, below), settings=settings,
        diagram=diagram.draw(page.diagram, of), sentence=sentence(of), switches=switches(settings),
    )  # fmt: skip


def sentence(of: Source) -> str:
    """What the file's header says of it: its sentence, or else its first line."""
    header = ast.get_docstring(of.tree)
    found = re.search(r"(?s)(?:^|\s)[Ii]n a sentence: (.*?)\n\n", header)
    text = found[1] if found else header.split("\n\n")[0]
    return text[0].upper() + text[1:]


def rows(of: Source, sections: list[annotations.Note], setting: Setting, below: dict[int, str]) -> list[Row]:
    """The page's grid: a row begins at the top and at each line that has a note."""
    places = {of.place(note.at): note for note in sections}
    names: dict[int, list[str]] = {}
    for name, definition in of.definitions.items():
        names.setdefault(definition.first, []).append(name)
    found = [Row()]
    for number, (text, html) in enumerate(zip(of.lines, of.html, strict=True), 1):
        if number in places:
            found.append(Row(places[number]))
        indent = len(text) - len(text.lstrip())
        found[-1].lines.append(dict(
            number=number, html=html, names=names.get(number, []), chips=setting.chips.get(number, []),
            idle=number in setting.idle, indent=indent, noted=number in places,
            below=below.get(number, ""), drawn=number <= of.tree.body[0].end_lineno and indent >= 4,
        ))  # fmt: skip
    return found


def switches(settings: list[Setting]) -> str:
    """JSON of all steps: their idle lines, and the chips of the lines that differ from the first step's."""
    found = []
    for setting in settings:
        base = settings[0].chips
        lines = [n for n in sorted(base.keys() | setting.chips.keys()) if base.get(n) != setting.chips.get(n)]
        chips = {n: setting.chips.get(n, []) for n in lines}
        found.append(vars(setting) | dict(idle=sorted(setting.idle), chips=chips))
    return compact(found)


def search_entries(page: dict) -> list[list[str]]:
    """What the search finds: what it is, its words, where. A symbol is found as it is shown and as LaTeX has it."""
    name, found = page["name"], []
    for note in page["page"].notes:
        shown = unescape(re.sub("<.+?>", "", "".join(note.parts(0)))).strip()
        found.append([note.title, f"{shown} {note.text.splitlines()[0]}", f"{name}.html#{note.anchor}"])
    found += [[key, d.about[:120], f"{name}.html#{key}"] for key, d in page["of"].definitions.items()]
    return found
