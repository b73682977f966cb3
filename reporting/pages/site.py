"""The site: a page for each method, for common.py and for the loop, and an index of them."""

import ast
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from methods import METHODS
from reporting.pages import flow
from reporting.pages.notes import Note, read
from reporting.pages.source import PAGES, Source, source
from runtime import files

TEMPLATES = Path(__file__).parent / "templates"


@dataclass
class Row:
    """Notes, and the lines of code beside them, up to the next note."""

    notes: list[Note] = field(default_factory=list)
    lines: list[dict] = field(default_factory=list)


@dataclass
class Setting:
    """A step that a page can show: what it is called, its chips and its idle lines."""

    name: str
    chips: dict[int, list[flow.Chip]]
    idle: set[int]


def build(out: str) -> None:
    directory = Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    templates = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    templates.globals |= dict(pages=PAGES)
    settings = steps()
    found = []
    for name in PAGES:
        page = page_of(name, settings[name])
        files.write_text(directory / f"{name}.html", templates.get_template("page.html").render(page))
        found.append(page)
    files.write_text(directory / "index.html", templates.get_template("index.html").render(found=found))
    for name in ("style.css", "page.js"):
        files.write_text(directory / name, (TEMPLATES / name).read_text())
    index = [entry for page in found for entry in search_entries(page)]
    files.write_text(directory / "search.js", f"const INDEX = {json.dumps(index, ensure_ascii=False, separators=(',', ':'))};")


def steps() -> dict[str, list[Setting]]:
    """Page → the steps that it shows. common.py shows those of all methods."""
    found = {name: [] for name in PAGES}
    for name in METHODS:
        step, other = flow.run_step(name), flow.run_step(name, other=True)
        chips = flow.chips(step, other)
        for page in (name, "common"):
            label = "its demo recipe" if page == name else f"a step of {name}"
            here = {line: row for (at, line), row in chips.items() if at == page}
            found[page].append(Setting(label, here, flow.idle(source(page), step.ran.get(page, set()))))
        found[name][0].legend = legend(step)
    return found


def legend(step: flow.Step) -> dict[str, int]:
    return {letter: size for letter, size in flow.letters(step).items() if re.fullmatch(r"[A-Za-z]+", letter)}


def page_of(name: str, settings: list[Setting]) -> dict:
    of = source(name)
    title, introduction, sections = read(name)
    first = settings[0] if settings else Setting("", {}, set())
    return dict(
        name=name, title=title, introduction=introduction, rows=rows(of, sections, first), settings=settings,
        legend=getattr(first, "legend", {}), of=of, sections=sections, switches=switches(settings),
        sentence=sentence(of),
    )  # fmt: skip


def sentence(of: Source) -> str:
    """What the file's header says of it: its sentence, or else its first line."""
    header = ast.get_docstring(of.tree)
    found = re.search(r"(?s)(?:^|\n\n|\s)[Ii]n a sentence: (.*?)\n\n", header)
    text = found[1] if found else header.split("\n\n")[0]
    return text[0].upper() + text[1:]


def rows(of: Source, sections: list[Note], setting: Setting) -> list[Row]:
    """The page's grid: a row begins at the top and at each line that has a note."""
    places: dict[int, list[Note]] = {}
    for note in sections:
        places.setdefault(of.place(note.at), []).append(note)
    names: dict[int, list[str]] = {}
    for name, definition in of.definitions.items():
        names.setdefault(definition.first, []).append(name)
    found = [Row()]
    for number, html in enumerate(of.highlighted(), 1):
        if number in places:
            found.append(Row(places[number]))
        text = of.lines[number - 1]
        found[-1].lines.append(dict(
            number=number, html=html, names=names.get(number, []), chips=setting.chips.get(number, []),
            idle=number in setting.idle, indent=len(text) - len(text.lstrip()), noted=number in places,
        ))  # fmt: skip
    return found


def switches(settings: list[Setting]) -> str:
    """JSON of all steps but the first: what differs from it, line by line."""
    found = []
    for setting in settings:
        base = settings[0].chips
        lines = [n for n in base.keys() | setting.chips.keys() if base.get(n) != setting.chips.get(n)]
        found.append(dict(name=setting.name, idle=sorted(setting.idle), chips={n: setting.chips.get(n, []) for n in lines}))
    return json.dumps(found, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def search_entries(page: dict) -> list[list[str]]:
    """What the search finds: (words, what it is, where)."""
    found = [[note.title, note.text[:400], f"{page['name']}.html#{note.anchor}"] for note in page["sections"]]
    for name, definition in page["of"].definitions.items():
        found.append([name, definition.about[:120], f"{page['name']}.html#{name}"])
    return found
