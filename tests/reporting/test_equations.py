"""The annotations of the sources, reporting/pages/equations: what they name exists, and nothing cited is left out."""

import ast
import contextlib
import io
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from test_map import MAP, ROOT, defined, equations, names_in, sections

import train
from methods import METHODS
from reporting.experiments import CLAIMS

FOLDER = ROOT / "reporting" / "pages" / "equations"
NAMES = [*METHODS, "common", "train"]
TESTS = {path.stem: defined(path) for path in (ROOT / "tests").rglob("test_*.py")}


class Section(NamedTuple):
    title: str
    at: str  # a qualified name, or `name | text of one line in it`
    tests: list[str]
    claims: list[str]  # words of one statement each
    formula: str
    text: str


@cache
def read(name: str) -> tuple[str, list[Section], list[str]]:
    """The paragraph below the title, the sections, the lines of the diagram."""
    text = (FOLDER / f"{name}.md").read_text()
    (head, *parts), found, diagram = re.split(r"^## ", text, flags=re.M), [], []
    title, _, intro = head.partition("\n")
    assert title.startswith("# ") and intro.strip() and "\n\n" not in intro.strip()
    for part in parts:
        title, _, body = part.partition("\n")
        if title == "Diagram":
            key, _, lines = body.partition("\n")
            assert key == "diagram:"
            diagram = lines.strip().splitlines()
            continue
        keys, formula, text = re.fullmatch(r"((?:\w+: .+\n)+)\$\$ (.+?) \$\$\n(.+)", body.strip(), re.S).groups()
        keys = dict(line.split(": ", 1) for line in keys.splitlines())
        assert keys.keys() <= {"at", "tests", "claims"}
        claims = keys["claims"].split("; ") if "claims" in keys else []
        found.append(Section(title, keys["at"], keys["tests"].split(", "), claims, formula, text))
    return intro, found, diagram


def line_of(name: str, at: str) -> int:
    """The line that `at` names in the source: that of a definition, or the only one in it that has a text."""
    source = (ROOT / f"{name}.py").read_text()
    qualified, _, text = at.partition(" | ")
    node = ast.parse(source)
    for part in qualified.split("."):
        inner = [x for x in node.body if isinstance(x, ast.ClassDef | ast.FunctionDef) and x.name == part]
        assert len(inner) == 1, f"{name}.py has no {qualified}"
        node = inner[0]
    if not text:
        return node.lineno
    lines = source.splitlines()
    having = [n for n in range(node.lineno, node.end_lineno + 1) if text in lines[n - 1]]
    assert len(having) == 1, f"{name}.py, {qualified}: {len(having)} lines have {text!r}"
    return having[0]


def numbered(title: str) -> set[str]:
    return set(re.findall(r"\((\d)\)", title.partition(":")[0])) if title.startswith("Equation") else set()


def test_a_place_is_found_by_name_and_by_one_text_only():
    assert line_of("mae", "Decoder.forward") < line_of("mae", "Decoder.forward | self.predict(")
    for wrong in ("Decoder.backward", "Decoder.features | x", "Decoder.features | nowhere"):
        with pytest.raises(AssertionError):
            line_of("mae", wrong)


def test_numbers_stand_in_titles():
    assert numbered("Equations (6) and (7): the contrast (§3.3)") == {"6", "7"} and not numbered("Masking (3)")


@pytest.mark.parametrize("name", NAMES)
def test_every_section_has_one_place_of_its_own_in_the_source_s_order(name):
    _, found, diagram = read(name)
    places = [line_of(name, section.at) for section in found]
    assert places == sorted(set(places)), [section.at for section in found]
    assert 6 <= len(found) <= 15
    boxes = [re.split(r" @ ", box) for chain in diagram for box in chain.split(" -> ")]
    assert all(" -> " in chain for chain in diagram) and len(boxes) >= 6
    for box in boxes:
        assert len(box) <= 2 and box[0].strip() == box[0] != ""
        assert len(box) == 1 or line_of(name, box[1])
    linked = [box[0] for box in boxes if len(box) == 2]
    assert linked and len(linked) == len(set(linked)), "a box has one place"


@pytest.mark.parametrize("name", NAMES)
def test_every_equation_that_the_source_cites_has_its_section(name):
    """CMAE's and LC-MAE's numbers in common.py are told apart by the title."""
    _, found, _ = read(name)
    titled = set().union(*(numbered(section.title) for section in found))
    cited = equations((ROOT / f"{name}.py").read_text())
    assert cited <= titled, f"{name}.md has no section of {cited - titled}"
    for method in METHODS if name == "common" else ():
        own = [section for section in found if numbered(section.title)]
        assert all(re.search(r"CMAE|LC-MAE", section.title) for section in own), method


@pytest.mark.parametrize("name", NAMES)
def test_every_test_and_claim_that_is_named_exists(name):
    statements = [claim["statement"] for claim in CLAIMS]
    mapped = {pair for rows in sections().values() for _, cell in rows for pair in names_in(cell)}
    known = 0
    for section in read(name)[1]:
        for test in section.tests:
            file, function = re.fullmatch(r"(test_\w+)\.py::(test_\w+)", test).groups()
            assert function in TESTS.get(file, ()), f"{section.title}: {test}"
            known += (file, function) in mapped
        for words in section.claims:
            assert sum(words in statement for statement in statements) == 1, f"{section.title}: {words}"
    assert known >= len(read(name)[1]) / 2, "most tests of an equation are in tests/README.md"


@cache
def options_of(method: str) -> str:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        train.options(["--method", method, "--help"])
    return shown.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_every_option_that_is_named_exists(name):
    helps = [options_of(method) for method in ([name] if name in METHODS else METHODS)]
    named = re.findall(r"(?<![\w-])(--[a-z][\w-]*)", (FOLDER / f"{name}.md").read_text())
    wrong = {flag for flag in named if not any(re.search(rf"{flag}(?![\w-])", shown) for shown in helps)}
    assert not wrong, f"{name}.md names {wrong}"


@pytest.mark.parametrize("name", NAMES)
def test_every_formula_becomes_mathml(name):
    convert = pytest.importorskip("latex2mathml.converter").convert
    intro, found, _ = read(name)
    inline = [x for text in (intro, *(s.text for s in found)) for x in re.findall(r"\$([^$]+)\$", text)]
    assert all(text.count("$") % 2 == 0 for text in (intro, *(s.text for s in found)))
    for formula in [*(section.formula for section in found), *inline]:
        written = convert(formula)
        tokens = re.findall(r"<m\w+[^>]*>([^<]*)</m\w+>", written)
        assert tokens and not [x for x in tokens if "\\" in x or (x and x in "&{}")], formula


def test_the_map_names_what_holds_the_annotations():
    assert Path(__file__).stem in MAP
