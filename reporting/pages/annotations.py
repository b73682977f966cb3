"""The notes of a page: equations/METHOD.md read into sections, and their Markdown and LaTeX into HTML and MathML."""

import json
import re
from pathlib import Path
from typing import NamedTuple

from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin

from reporting import HERE
from runtime.errors import InputError

EQUATIONS = Path(__file__).parent / "equations"
MARKDOWN = MarkdownIt().use(
    dollarmath_plugin, allow_labels=False, double_inline=True,
    renderer=lambda latex, how: mathml(latex, "block" if how["display_mode"] else "inline"),
)  # fmt: skip
SENTENCE = re.compile(r"[.?!][\")]*\s+(?=[\"$`A-Z])")  # its end, and that another begins


class Note(NamedTuple):
    title: str
    at: str  # as `Source.place` takes it
    tests: list[str]
    claims: list[dict]
    text: str  # Markdown

    @property
    def anchor(self) -> str:
        return "note-" + re.sub(r"\W+", "-", self.title.lower()).strip("-")

    def parts(self, lines: int) -> list[str]:
        """As HTML: the formula with the sentences that fit beside so many lines of code, one at least; the others."""
        formula = self.text.index("$$", 2)
        ends = [found.end() for found in SENTENCE.finditer(self.text, formula)] + [len(self.text)]
        lines += 2 * (5 + (ends[-1] - formula) / 60 <= lines + 2)  # two more if then nothing need be folded
        cut = max([ends[0], *(end for end in ends if 5 + (end - formula) / 60 <= lines)])
        return [render(part) for part in (self.text[:cut], self.text[cut:])]


class Page(NamedTuple):
    title: str
    introduction: str  # HTML
    notes: list[Note]
    diagram: list[str]  # its lines


def read(page: str) -> Page:
    file = EQUATIONS / f"{page}.md"
    head, *parts = re.split(r"(?m)^## ", file.read_text())
    title, _, introduction = head.partition("\n")
    diagram = [part.split("\n", 1)[1] for part in parts if part.startswith("Diagram\n")]
    notes = [section(file, part) for part in parts if not part.startswith("Diagram\n")]
    return Page(title.removeprefix("# "), render(introduction), notes, "".join(diagram).splitlines())


def section(file: Path, text: str) -> Note:
    title, *lines = text.split("\n")
    head = {}
    while lines and (found := re.match(r"(at|tests|claims): *(.*)", lines[0])):
        head[found[1]] = found[2].strip()
        lines.pop(0)
    if not head.get("at"):
        raise InputError(f"{file.name}, {title}: no place; give a line `at: function` or `at: Class.method | text`")
    tests = [name.strip("` ") for name in head.get("tests", "").split(",") if name.strip()]
    claims = [claim(file, name.strip()) for name in head.get("claims", "").split(";") if name.strip()]
    return Note(title.strip(), head["at"], tests, claims, "\n".join(lines).strip())


def claim(file: Path, words: str) -> dict:
    """The one claim of reporting/claims.json whose statement contains these words."""
    listed = json.loads((HERE / "reporting/claims.json").read_text())["claims"]
    found = [claim for claim in listed if words in claim["statement"]]
    if len(found) != 1:
        raise InputError(f"{file.name}: {len(found)} statements of claims.json contain {words!r}; give words of one")
    return found[0]


def render(text: str) -> str:
    """As HTML, in which no line begins with a per cent sign, nor with the comma behind a formula, nor breaks at a ×."""
    html = re.sub(r"(?<=\d) (?=[%×])|(?<=×) (?=\d)", "\N{NO-BREAK SPACE}", MARKDOWN.render(text.strip()))
    formula = r'<span class="math inline">(?:(?!</span>).)*</span>[,.;:)]+'
    return re.sub(formula, r'<span class="keep">\g<0></span>', html)


def mathml(latex: str, display: str) -> str:
    try:  # a prime at the size of other scripts would be a speck
        html = convert(latex.strip(), display=display).replace("<mi>&#x02032", '<mi scriptlevel="0">&#x02032')
    except Exception:  # the library has many kinds of its own
        html = "\\"
    if "\\" in html or "mathvariant" in html:  # what it does not know stays; browsers know no letters by `mathvariant`
        raise InputError(f"{latex.strip()}: not LaTeX that becomes MathML; write it in another way")
    return re.sub(r"<mo>([A-Za-z]{2,}|&#x02016;)</mo>", r"<mi>\1</mi>", html)  # no space around names; ‖ does not grow
