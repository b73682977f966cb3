"""That nothing is left out: the map of tests in README.md, the knobs of every method, the commands in every header."""

import argparse
import ast
import copy
import dataclasses
import importlib
import inspect
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from test_train import OWN, SMALL

import train
from common import StepRandom
from inputs import image_cache, image_sets
from methods import METHODS
from runtime import knobs
from runtime.command_line import build_encoder, build_parser

ROOT = Path(__file__).parent.parent
MAP = (ROOT / "tests" / "README.md").read_text()


# -------------------------------------------------------------------------------------------------------------- the map


def sections() -> dict[str, list[tuple[str, str]]]:
    """Heading → the rows of its table: what, and the tests of it."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in MAP.splitlines():
        if line.startswith("## "):
            rows = found.setdefault(line[3:].strip(), [])
        elif line.startswith("| ") and not line.startswith(("| what", "| ---")):
            what, tests = line.strip("| ").rsplit(" | ", 1)
            rows.append((what, tests))
    return found


def names_in(cell: str) -> list[tuple[str, str]]:
    """`a::x`, `y` and `b::z` → (a, x), (a, y), (b, z): a name without a file is of the file before it."""
    named, file = [], ""
    for name in re.findall(r"`([\w:]+)`", cell):
        file, _, test = name.rpartition("::") if "::" in name else (file, "", name)
        named.append((file, test))
    return named


def equations(text: str) -> set[str]:
    """The numbers of all equations that a text cites: Eq. (6), (7); Eq. 2-5; Eq. (1) and (3)."""
    found = set()
    for cited in re.findall(r"Eq\. (\(?\d\)?(?:(?:, | and |-)\(?\d\)?(?![.\d]))*)", text):
        ends = [int(n) for n in re.findall(r"\d", cited)]
        found |= set(map(str, range(ends[0], ends[-1] + 1) if "-" in cited else ends))
    return found


def test_citations_are_read_as_they_are_written():
    assert equations("Eq. (6), (7); see Eq. 2-5 and Eq. (1) and (3), the mean of 4") == set("1234567")
    assert equations("(Eq. 4, 5) are two layers; Eq. 5, ‖p - t‖²") == {"4", "5"}


def defined(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def test_every_test_that_the_map_names_exists():
    functions = {path.stem: defined(path) for path in (ROOT / "tests").rglob("test_*.py")}
    count = 0
    for heading, rows in sections().items():
        for what, cell in rows:
            named = names_in(cell)
            assert named, f"{heading}: {what} names no test"
            for file, test in named:
                assert test.startswith("test_") and test in functions.get(file, ()), (
                    f"{heading}, {what}: {file}::{test}"
                )
                count += 1
    assert count > 150


@pytest.mark.parametrize("method", METHODS)
def test_the_map_has_every_equation_and_every_knob(method):
    source = (ROOT / f"{method}.py").read_text()
    rows = sections()[f"{method}.py"]
    listed = "\n".join(what for what, _ in rows)
    missing = equations(source) - equations(listed)
    assert not missing, f"equations {missing} of {method}.py are not in tests/README.md"
    knobs = {field.name for field in dataclasses.fields(METHODS[method].Config)}
    named = set(re.findall(r"`(\w+)`", listed))
    assert not knobs - named, f"knobs {knobs - named} of {method}.py are not in tests/README.md"
    assert not named - knobs, f"{named - knobs} in tests/README.md are no knobs of {method}.py"
    tables = set(re.findall(r"Table (\w+(?:\.\d+)?)", inspect.getsource(METHODS[method].Config)))
    assert not tables - set(re.findall(r"Tables? (\w+(?:\.\d+)?)", listed)), f"tables of {method}.py"


# ---------------------------------------------------------------------------------------------------- no idle knobs

# What a knob is set to, where neither the opposite nor twice its value would do.
OTHER = {
    "decoder": "mlp", "crop_by": "features", "masking": "block", "contrast": "instance", "dictionary": "image",
    "augmentation": "strong", "target": "pixels", "tokenizer": "given", "project": "tokens", "shift_range": "0-100",
    "mask_ratio": 0.6, "mask_cell": 2, "crop_scale": 0.9, "target_blur": 1.0, "target_mask_ratio": 0.5,
    "crop_threshold": 0.3, "filter_above": 0.0, "jitter": 0.0, "gray": 1.0, "block": 24, "feature_decoder_depth": 1,
    "first_stride": 8, "kl_warmup": 1.0, "tau_anneal": 1.0, "momentum": 0.5,
    "crop_warmup": 0.6, "crop_interval": 0.6,
}  # fmt: skip
# What it needs beside it to matter, and what it is set to in a method where another value would be wrong.
BESIDE = {
    ("cmae", "contrast"): dict(contrast="byol"),
    ("cmae", "share_decoder"): dict(feature_decoder_depth=1),
    ("lcmae", "decoder"): dict(decoder="conv"),
    ("cae", "norm_pixels"): dict(target="pixels"),
    ("conmim", "keep_slow"): dict(momentum=0.9),
}
SHORT = dict(cmae_loc=dict(crop_warmup=0.1, crop_interval=0.1, crop_threshold=0.8), dvae=dict(blocks=1))


def config_of(name: str):
    args, config, Method = train.options(["--method", name, *SMALL, *OWN[name], "--image-size", "64"])
    return args, dataclasses.replace(config, **SHORT.get(name, {})), Method


def traces(name: str, knobs: dict) -> list:
    """All that a short life of a method shows: what is asked of others, lost, built and kept."""
    args, config, Method = config_of(name)
    torch.manual_seed(0)
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        if name == "cae":
            tokens = sys.modules[Method.__module__].dvae
            patch.setattr(tokens, "load_tokenizer", lambda file: asked.append(file) or tokens.Tokenizer(16, 8))
        method = Method(build_encoder(args), dataclasses.replace(config, **knobs))
    if name == "cae":  # what train.py hands to it: a function that trains another method
        method.prepare(lambda _, **words: asked.append(words) or Trained(copy.deepcopy(method.tokenizer)))
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 3, 80, 72), dtype=np.uint8))
    flat = image_cache.Packed(*image_cache.pack(list(pixels)))
    images = image_sets.ImageSet("six", ["one"], torch.zeros(6, dtype=torch.int64), flat)
    seen, index = [], torch.arange(6)
    for step in range(3):
        with torch.no_grad():
            losses = method(method.draw(images.images(index), index, StepRandom(0, step, 6)))
            seen += [round(loss.item(), 5) for loss in losses.values()]
            for weight in method.parameters():
                weight += 0.05 * torch.randn(weight.shape) if weight.requires_grad else 0.0
        if hasattr(method, "update_teacher"):
            method.update_teacher((step + 1) / 4)
        if hasattr(method, "end_epoch"):
            method.end_epoch(step + 1, 3, images)
    shapes = [tuple(weight.shape) for weight in method.parameters()]
    kept = [round(weight.abs().sum().item(), 3) for weight in method.encoder.parameters()]
    return [asked, seen, shapes, kept]


class Trained(NamedTuple):
    encoder: torch.nn.Module


KNOBS = [(name, field.name) for name, Method in METHODS.items() for field in dataclasses.fields(Method.Config)]
PLAIN: dict[str, list] = {}


@pytest.mark.parametrize("name, knob", KNOBS, ids=lambda word: word)
def test_no_knob_does_nothing(name, knob):
    """Another value changes a loss, what is built, or what is kept; the same value changes nothing."""
    base = dict(BESIDE.get((name, knob), {}))
    value, before = base.pop(knob, OTHER.get(knob)), getattr(config_of(name)[1], knob)
    if value is None:
        value = not before if isinstance(before, bool) else 2 * before or 1
    key = f"{name} {sorted(base.items())}"
    if key not in PLAIN:
        PLAIN[key] = traces(name, base)
        assert traces(name, base) == PLAIN[key]  # what is compared depends on nothing else
    assert value != before and traces(name, base | {knob: value}) != PLAIN[key]


IDLE = [
    (name, settings, knob) for name, pairs in knobs.IDLE.items() for settings, idle in pairs for knob in idle.split()
]  # fmt: skip


@pytest.mark.parametrize("name, settings, knob", IDLE, ids=str)
def test_a_knob_that_is_refused_would_do_nothing(name, settings, knob):
    settings = {key: OTHER[key] if value is True else value for key, value in settings.items()}
    config = dataclasses.replace(config_of(name)[1], **settings)
    before, value = getattr(config, knob), OTHER.get(knob)
    value = value if value is not None else not before if isinstance(before, bool) else 2 * before or 1
    if (name, knob) == ("cmae", "contrast"):
        value = "byol"
    assert value != before and traces(name, settings | {knob: value}) == traces(name, settings)


# ------------------------------------------------------------------------------------------------ commands in headers


def commands() -> list[tuple[str, str]]:
    """(file, command) of all that a module's header or a document indents and that begins with python or torchrun."""
    found = []
    for path in sorted(ROOT.glob("*.py")):
        header = ast.get_docstring(ast.parse(path.read_text()), clean=False) or ""
        for line in header.splitlines():
            if line.startswith("    "):
                parts = re.split(r"\s{2,}", line.strip())
                found += [(path.name, part) for part in parts if re.match(r"(python|torchrun) ", part)]
    for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]:
        lines = [line for line in path.read_text().splitlines() if re.match(r" {4,}(python|torchrun) \S*", line)]
        found += [(path.name, line.strip()) for line in lines]
    return found


def test_every_command_has_a_header_that_shows_how_it_is_called():
    shown = {word for _, command in commands() for word in shlex.split(command) if word.endswith(".py")}
    programs = {path.name for path in ROOT.glob("*.py") if "process.command(main)" in path.read_text()}
    assert programs == shown


class Understood(Exception):
    """The command line was read; nothing more is wanted."""


@pytest.mark.parametrize("file, command", commands(), ids=lambda word: word[:70])
def test_commands_in_headers_are_understood(file, command, monkeypatch):
    """Each by its program's own parser; what they do, the programs' own tests run on small sets."""
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    program, words = words[at], words[at + 1 :]
    if program == "train.py" and "--help" not in words:
        args, config, Method = train.options(words)
        assert Method is METHODS[args.method] and isinstance(config, Method.Config)
        assert file.removesuffix(".py") not in METHODS or args.method == file.removesuffix(".py")
        named = args.data not in ("shapes", "FOLDER") and "/" not in args.data and ":" not in args.data
        assert args.data_root or args.download or not named, "who has not the images yet is refused"
        return
    parse = argparse.ArgumentParser.parse_args

    def stop(self, *arguments):
        raise Understood(parse(self, *arguments))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [program, *words])
    with pytest.raises(SystemExit if "--help" in words else Understood):
        importlib.import_module(program.removesuffix(".py")).main()


@pytest.mark.parametrize("name", METHODS)
def test_every_flag_of_a_header_is_an_option(name):
    """Its own, or one of the method that the header names beside it: CAE's for dvae, the autoencoder's for LC-MAE."""
    header = ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text()))
    parsers = [build_parser(method, METHODS) for method in (name, "autoencoder", "cae")]
    known = {"--nproc_per_node", "--nproc"} | {word for parser in parsers for word in parser._option_string_actions}
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", header))
    assert flags and flags <= known, flags - known
