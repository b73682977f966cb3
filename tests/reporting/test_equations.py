"""The annotations of the sources, reporting/pages/equations: what they name exists, and nothing cited is left out."""
# ruff: noqa: E402  the extra `pages` may be missing

import contextlib
import io
import re
from functools import cache

import pytest
from test_map_of_tests import ROOT, defined, equations, names_in, sections

for library in ("pygments", "jinja2", "latex2mathml", "markdown_it", "mdit_py_plugins"):
    pytest.importorskip(library, reason="pip install '.[pages]'")

import train
from methods import METHODS
from reporting.pages import annotations, diagram
from reporting.pages.source import PAGES, source

TESTS = {path.stem: defined(path) for path in (ROOT / "tests").rglob("test_*.py")}


def numbered(title: str) -> set[str]:
    return set(re.findall(r"\((\d)\)", title.partition(":")[0])) if title.startswith("Equation") else set()


def test_numbers_stand_in_titles():
    assert numbered("Equations (6) and (7): the contrast (§3.3)") == {"6", "7"} and not numbered("Masking (3)")


@pytest.mark.parametrize("name", PAGES)
def test_every_section_has_one_place_of_its_own_in_the_source_s_order(name):
    page = annotations.read(name)
    places = [source(name).place(note.at) for note in page.notes]
    assert places == sorted(set(places)), [note.at for note in page.notes]
    assert 6 <= len(places) <= 15


@pytest.mark.parametrize("name", PAGES)
def test_boxes_of_diagrams_have_one_place_each_in_the_source(name):
    chains = annotations.read(name).diagram
    assert chains and all(" -> " in chain for chain in chains)
    boxes = [box for chain in chains for box in chain.split(" -> ")]
    linked = [box.split(" @ ") for box in boxes if "@" in box]
    assert all(source(name).place(at) for _, at in linked)
    assert len({words for words, _ in linked}) == len(linked) == len({diagram.words(box) for box in boxes})


@pytest.mark.parametrize("name", PAGES)
def test_every_equation_that_the_source_cites_has_its_section(name):
    titles = [note.title for note in annotations.read(name).notes]
    cited = equations((ROOT / f"{name}.py").read_text())
    missing = cited - set().union(*map(numbered, titles))
    assert not missing, f"{name}.md has no section of {missing}"
    if name == "common":  # two papers have numbers there
        assert all(re.search("CMAE|LC-MAE", title) for title in titles if numbered(title))


@pytest.mark.parametrize("name", PAGES)
def test_every_test_that_is_named_exists(name):
    """And most are in tests/README.md. That the claims exist, the reading of the file looks after."""
    mapped = {pair for rows in sections().values() for _, cell in rows for pair in names_in(cell)}
    known, page = 0, annotations.read(name)
    for note in page.notes:
        for test in note.tests:
            file, function = re.fullmatch(r"(test_\w+)\.py::(test_\w+)", test).groups()
            assert function in TESTS.get(file, ()), f"{note.title}: {test}"
            known += (file, function) in mapped
        assert note.tests, note.title
    assert known >= len(page.notes) / 2


@cache
def options_of(method: str) -> str:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        train.options(["--method", method, "--help"])
    return shown.getvalue()


@pytest.mark.parametrize("name", PAGES)
def test_every_option_that_is_named_exists(name):
    helps = [options_of(method) for method in ([name] if name in METHODS else METHODS)]
    named = re.findall(r"(?<![\w-])(--[a-z][\w-]*)", (annotations.EQUATIONS / f"{name}.md").read_text())
    wrong = {flag for flag in named if not any(re.search(rf"{flag}(?![\w-])", shown) for shown in helps)}
    assert not wrong, f"{name}.md names {wrong}"


@pytest.mark.parametrize("name", PAGES)
def test_every_section_has_a_formula_and_every_formula_becomes_mathml(name):
    """What the library does not know, the reading refuses; a $ without its other end would be left."""
    page = annotations.read(name)
    for note in page.notes:
        html = "".join(note.parts(1))
        assert note.text.startswith("$$ ") and 'display="block"' in html and "$" not in html, note.title
    assert "$" not in page.introduction
