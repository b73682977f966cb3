"""README and docs: README is short, its commands parse, its files and links exist, its table is what was measured."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from common import SIZES, ViT
from methods import METHODS
from reporting.documents import spell
from reporting.result_files import TABLE, runs_of, values
from runtime import files
from train import options

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "docs/guide.md").read_text()
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
COMMANDS = [line.strip() for file in DOCUMENTS for line in file.read_text().splitlines() if line.startswith("    ")]


def test_readme_is_read_in_one_sitting():
    assert len(README.splitlines()) <= 170 and len(README.encode()) <= 12_000
    prose = [line for line in README.splitlines() if not line.startswith(("|", "    ", "!["))]
    assert max(map(len, prose)) <= 80


@pytest.mark.parametrize("line", [c for c in COMMANDS if "train.py" in c and "--help" not in c])
def test_every_training_command_parses(line):
    words = shlex.split(line[line.index("train.py") :])[1:]
    args, _, Method = options([*words, "--device", "cpu"])
    assert Method is METHODS[args.method]


def test_a_newcomer_meets_the_first_command_then_the_tour_and_clusters_elsewhere():
    places = [README.index(text) for text in ("![", "train.py --method cmae", "mae.py](", "--mask-ratio", "torchrun")]
    assert places == sorted(places) and places[1] < 1000 and "nnodes" not in README


def test_every_file_and_folder_at_the_top_is_named_in_the_reading_order():
    order = README.split("## Reading order")[1].split("\n## ")[0]
    assert set(re.findall(r"`(\w+\.py)`", order)) == {p.name for p in ROOT.glob("*.py")}
    seen = [p for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")]  # pytest's cache has a README too
    folders = {p.name for p in seen if list(p.glob("*.py")) or list(p.glob("*.md"))}
    assert set(re.findall(r"`(\w+)/`", order)) == folders | {"results"}
    assert set(re.findall(r"`(\w+\.py)`", README)) == {p.name for p in ROOT.glob("*.py")}


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)
def test_links_lead_somewhere(file):
    links = re.findall(r"\]\(([^)\s]+)\)", file.read_text())
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        if not link.startswith("https://"):
            target = file.parent / path if path else file
            assert target.exists(), link
            if anchor and target.suffix == ".md":
                heads = re.findall(r"(?m)^#+ (.*)", target.read_text())
                assert anchor in [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads], link


def test_every_result_is_cited():
    texts = "".join(file.read_text() for file in DOCUMENTS)
    for file in [*ROOT.glob("results/**/*.json"), *ROOT.glob("results/**/*.png")]:
        assert f"{file.relative_to(ROOT)})" in texts, file


def test_the_table_of_methods_holds_the_measured_means():
    rows = dict(re.findall(r"(?m)^\| `(\w+)\.py` \|.* \| ([\d., ]+) \|$", README))
    for name in TABLE:
        assert rows.pop(name) == ", ".join(mean(f"cpu/{name} {probe}.top1") for probe in ("knn", "linear"))
    assert not rows
    untrained = [mean(f"cpu/scratch {probe}.top1") for probe in ("knn", "linear")]
    assert f"an untrained encoder has {' and '.join(untrained)}" in " ".join(README.split())


def mean(side: str) -> str:
    return spell(values(ROOT / "results", side), 1).split(" ")[0]


def test_the_first_runs_lines_are_those_of_its_result():
    (run,) = runs_of(ROOT / "results", "first-command")
    shown = README.split("It ends with these lines")[1].split("Your numbers")[0]
    assert f"{run['loss'][0]['loss']:.4f} -> {run['loss'][-1]['loss']:.4f}" in shown
    for of, end in (("untrained", "-untrained"), ("trained", "")):
        top1 = [run["measured"][probe + end]["top1"] for probe in ("knn", "linear")]
        (line,) = [line for line in shown.splitlines() if f" {of} encoder" in line]
        assert [float(x) for x in re.findall(r"[\d.]+", line)] == pytest.approx(top1, abs=0.051)


def test_the_timm_snippet_runs(tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    snippet = re.search(r"((?:    .*\n)+)", GUIDE[GUIDE.index("import timm\n") - 4 :])[1]
    encoder = ViT(64, 8, *SIZES["nano"])
    file = tmp_path / "runs/cmae-shapes/encoder.safetensors"
    files.save_weights(file, encoder.settings, encoder.state_dict(), "a test")
    monkeypatch.chdir(tmp_path)
    place = dict(timm=timm)
    exec("\n".join(line[4:] for line in snippet.splitlines()), place)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(place["vit"].eval().forward_features(images), encoder(images), atol=1e-4, rtol=1e-3)
