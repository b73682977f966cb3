"""README: its commands parse, its files exist, its snippet runs."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from common import SIZES, ViT
from methods import METHODS
from train import options

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [line.strip() for line in README.splitlines() if line.startswith("    ") and ".py" in line]


@pytest.mark.parametrize("line", [c for c in COMMANDS if "train.py" in c and "--help" not in c])
def test_every_training_command_parses(line):
    words = shlex.split(line[line.index("train.py") :])[1:]
    args, _, Method = options([*words, "--device", "cpu"])
    assert Method is METHODS[args.method]


def test_every_file_named_exists_and_every_module_is_named():
    named = set(re.findall(r"`(\w+\.py)`", README))
    assert named == {p.name for p in ROOT.glob("*.py")}


def test_the_timm_snippet_runs(tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    snippet = re.search(r"((?:    .*\n)+)", README[README.index("saved = torch.load") - 4 :])[1]
    (tmp_path / "runs/cmae-shapes").mkdir(parents=True)
    encoder = ViT(64, 8, *SIZES["nano"])
    torch.save(
        dict(settings=encoder.settings, state_dict=encoder.state_dict()), tmp_path / "runs/cmae-shapes/encoder.pt"
    )
    monkeypatch.chdir(tmp_path)
    place = dict(torch=torch, timm=timm)
    exec("\n".join(line[4:] for line in snippet.splitlines()), place)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(place["vit"].eval().forward_features(images), encoder(images), atol=1e-4, rtol=1e-3)
