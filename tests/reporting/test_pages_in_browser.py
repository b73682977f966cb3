"""The pages in a browser: notes stand beside their lines, nothing overflows, settings are chosen, names followed."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("jinja2", reason="pip install '.[pages]'")
from reporting.pages.source import PAGES

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [
    pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium"),
]  # fmt: skip

HARNESS = Path(__file__).with_name("harness.html").read_text()  # opens every page in a frame of each width


@pytest.fixture(scope="module")
def seen(built, tmp_path_factory):
    place = shutil.copytree(built, tmp_path_factory.mktemp("seen") / "site")  # others look at what is in it
    names = [*(f"{page}.html" for page in PAGES), "index.html", "mae-cmae.html"]
    (place / "harness.html").write_text(HARNESS.replace("PAGES", json.dumps(names)))
    words = "--headless --no-sandbox --disable-gpu --allow-file-access-from-files --virtual-time-budget=60000".split()
    size = ["--window-size=1500,1100", "--hide-scrollbars", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run(
        [CHROMIUM, *words, *size, f"--user-data-dir={place}/profile", (place / "harness.html").as_uri()],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    text = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.DOTALL)
    assert text, done.stdout[-500:] + done.stderr[-2000:]
    return json.loads(html.unescape(text[1])), [line for line in done.stderr.splitlines() if ":CONSOLE:" in line]


def test_notes_stand_beside_their_lines_and_nothing_overflows(seen):
    assert len(seen[0]["found"]) == 2 * (len(PAGES) + 2) + 1
    for page in seen[0]["found"]:
        if page["width"] == 1440:
            assert page["gap"] <= 20 and not page["cut"] and page["hole"] < 260, page
        if page["width"] == 390:
            assert page["above"], page
        assert not page["wide"] and page["scroll"] <= 0 and not page["wrapped"] and not page["here"], page
    assert sum(page["notes"] for page in seen[0]["found"]) > 2 * 100


def test_on_a_sheet_of_paper_no_table_of_a_header_is_wrapped_and_nothing_is_folded_away(seen):
    assert seen[0]["print"] == {"wrapped": 0, "folded": 0}


def test_no_page_reports_an_error(seen):
    assert not seen[1]


def test_a_setting_is_chosen_and_left_again(seen):
    plain, other, again = (seen[0][key] for key in ("plain", "other", "again"))
    assert again == plain and plain["changed"] == 0
    assert other["changed"] > 0 and other["idle"] > plain["idle"]  # without contrast most of the step does not run
    assert "contrast" in plain["losses"] and "contrast" not in other["losses"]
    assert "d = 256 " in plain["legend"] and "d = 256 " not in other["legend"]


def test_a_name_is_hovered_and_followed_and_an_equation_found(seen):
    assert seen[0]["hint"].startswith("common.info_nce: cmae.py's Eq. (7)")
    assert seen[0]["leads"].endswith("common.html#info_nce") and "def info_nce(" in seen[0]["arrived"]
    assert seen[0]["hits"][0] == "cmae.html#note-the-pixel-shift-3-2"
