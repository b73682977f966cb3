"""What flows, measured: one step of a method runs line by line, and every tensor is noted where it is assigned."""

import ast
import dataclasses
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from common import StepRandom
from inputs import builtin_images, image_cache, image_sets
from methods import METHODS
from reporting import HERE
from reporting.pages.ablations import PAPER
from reporting.pages.source import PAGES, Source, source
from runtime import files
from runtime.command_line import build_encoder, pretraining_options

IMAGES = 6


class Value(NamedTuple):
    shape: tuple[int, ...]
    kind: str  # dtype without "torch."
    gradient: bool  # whether it carries one
    mean: float
    deviation: float


class Step(NamedTuple):
    values: dict[tuple[str, int, str], list[Value]]  # (page, line, name) → its values, in the order of their making
    ran: dict[str, set[int]]  # page → the lines that ran
    losses: dict[str, float]
    method: torch.nn.Module
    images: Tensor  # uint8 (B, 3, 64, 64), what it draws the batch from
    batch: tuple


class Visit:
    """One call of a function of ours."""

    def __init__(self, frame, of: Source):
        self.frame, self.of, self.now = frame, of, None  # `now` is the statement that runs

    def assigned(self, returned=None) -> Iterator[tuple[str, object]]:
        """What the statement that has run has made: names, items of dicts, what it returns."""
        here, node = self.frame.f_locals, self.now
        if node is None:
            return
        if isinstance(node, ast.Return):
            yield "return", returned
            return
        for x in ast.walk(header(node)):
            if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store):
                yield x.id, here.get(x.id)
            elif isinstance(x, ast.Subscript) and isinstance(x.ctx, ast.Store) and isinstance(x.slice, ast.Constant):
                yield ast.unparse(x), here[ast.unparse(x.value)][x.slice.value]


class Tracer:
    """Python calls it for each line of the pages' files."""

    def __init__(self):
        self.files = {str(HERE / f"{page}.py"): source(page) for page in PAGES}
        self.stack, self.values, self.ran = [], defaultdict(list), defaultdict(set)

    def trace(self, run: Callable):
        before = sys.gettrace()
        sys.settrace(self.call)
        try:
            return run()
        finally:
            sys.settrace(before)

    def call(self, frame, event, _):
        of = self.files.get(frame.f_code.co_filename)
        if of is None or frame.f_code.co_name.startswith("<"):  # a comprehension is part of a line
            return None
        self.stack.append(Visit(frame, of))
        function = statements(of)[frame.f_lineno]
        for name in frame.f_code.co_varnames[: frame.f_code.co_argcount]:
            value = frame.f_locals[name]
            if name != "batch" or function.name == "forward":  # once is enough
                self.note(of, function.lineno, name, value)
        return self.step

    def step(self, frame, event, returned):
        visit = self.stack[-1]
        node = statements(visit.of).get(frame.f_lineno)
        if event == "line":
            self.ran[visit.of.name].add(frame.f_lineno)
            if node is visit.now or isinstance(visit.now, ast.Return):
                return self.step  # a statement of several lines goes on, or a `with` is left by a return
        for name, value in visit.assigned(returned):
            self.note(visit.of, visit.now.lineno, name, value)
        visit.now = node
        if event == "return":
            self.stack.pop()
        return self.step

    def note(self, of: Source, line: int, name: str, value) -> None:
        for label, tensor in leaves(name, value):
            self.values[of.name, line, label].append(measured(tensor))


def header(node: ast.stmt) -> ast.AST:
    """A statement without the block that it begins."""
    parts = [getattr(node, part) for part in ("target", "items", "test") if hasattr(node, part)]
    block = hasattr(node, "body")
    return ast.Module([part for x in parts for part in (x if isinstance(x, list) else [x])], []) if block else node


def statements(of: Source) -> dict[int, ast.stmt]:
    """Line → the innermost statement that it belongs to; of a block only its header's lines."""
    if not hasattr(of, "statements"):
        of.statements = {}
        for node in ast.walk(of.tree):  # from the outermost on
            if isinstance(node, ast.stmt):
                first = min([node.lineno, *(part.lineno for part in getattr(node, "decorator_list", []))])
                last = max(node.lineno, node.body[0].lineno - 1) if hasattr(node, "body") else node.end_lineno
                of.statements |= dict.fromkeys(range(first, last + 1), node)
    return of.statements


def leaves(name: str, value) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a value: its own, its fields', its items'."""
    if name.startswith("_"):
        return
    if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter):
        yield name, value
    elif hasattr(value, "_asdict"):
        for field, part in value._asdict().items():
            yield from leaves(field if name == "return" else f"{name}.{field}", part)
    elif isinstance(value, tuple | list) and len(value) <= 3:
        for i, part in enumerate(value):
            yield from leaves(f"{name}[{i}]", part)
    elif isinstance(value, dict) and name == "return":
        for key, part in value.items():
            yield from leaves(str(key), part)


def measured(x: Tensor) -> Value:
    numbers = x.detach().double()
    mean, deviation = (numbers.mean().item(), numbers.std(correction=0).item()) if x.numel() else (0.0, 0.0)
    return Value(tuple(x.shape), str(x.dtype)[6:], x.requires_grad, mean, deviation)


# ----------------------------------------------------------------------------------------------------- the step


# Sizes in which no two letters are alike, to tell which letter a number stands for; a mask cell of 2 fits.
OTHER = dict(
    mask_ratio=0.6, target_mask_ratio=0.6, decoder_width=40, decoder_heads=5, projector_out=44, projector_width=72,
    codes=52, hidden=20, block=25,
)  # fmt: skip


def run_step(name: str, changes: dict | None = None, other: bool = False, checkpoint: Path | None = None) -> Step:
    """One step of a method at the sizes of its demo recipe, with some settings changed.

    Weights are the first, or those of a checkpoint; where boxes are computed between epochs, they are once before it.
    `other` has all sizes different, and nothing that stops a gradient.
    """
    args, config, Method = pretraining_options(["--method", name, "--recipe", "demo"], METHODS)
    config, n = dataclasses.replace(config, **PAPER.get(name, {}) | (changes or {})), IMAGES
    if other:
        args.patch_size, args.width, args.heads, n = 8 if name in ("cae", "dvae") else 5, 84, 3, IMAGES - 1
        args.image_size = 6 * args.patch_size  # those two take 8 pixels for a token
        sizes = {key: value for key, value in OTHER.items() if getattr(config, key, 0)}
        config = dataclasses.replace(config, **sizes)
    pixels = list(torch.from_numpy(builtin_images.generate("train", n)[0]))
    packed = image_cache.Packed(*image_cache.pack(pixels))
    images, index = image_sets.ImageSet("built-in", ["one"], torch.zeros(n, dtype=torch.int64), packed), torch.arange(n)
    tracer = Tracer()

    def build() -> torch.nn.Module:
        torch.manual_seed(0)
        method = Method(build_encoder(args), config).train()
        if checkpoint:
            method.load_state_dict(files.load(checkpoint)["method"])
        return method

    def step() -> tuple[tuple, dict]:
        if hasattr(method, "end_epoch"):
            method.end_epoch(1, 1, images)
            method.boxes = method.boxes.data
        batch = method.draw(images.images(index), index, StepRandom(0, 0, n))
        return batch, {key: value.item() for key, value in method(batch).items()}

    method = tracer.trace(build)
    with unstopped(method) if other else nullcontext():
        batch, losses = tracer.trace(step)
    tracer.trace(lambda: method.update_teacher(0.5) if hasattr(method, "update_teacher") else None)
    return Step(dict(tracer.values), dict(tracer.ran), losses, method, images.images(index), batch)


@contextmanager
def unstopped(method: torch.nn.Module):
    """Nothing stops a gradient: no `no_grad`, no `detach`, no frozen weight."""
    method.requires_grad_(True)
    with (
        mock.patch.object(torch.no_grad, "__enter__", lambda self: None),
        mock.patch.object(torch.no_grad, "__exit__", lambda self, *error: None),
        mock.patch.object(Tensor, "detach", lambda self: self),
    ):
        yield


MEANINGS = dict(
    B="images", N="patches", D="channels of the encoder", P="values of a patch", V="visible patches",
    M="masked patches", d="channels of what is contrasted", width="channels of the decoder", codes="codes", K="codes",
    b="pixels a side of a block", hidden="channels at first", H="pixels a side of an image (W too)",
    h="patches a side (w too)", p="pixels a side of a patch", heads="heads of the encoder",
)  # fmt: skip


def letters(step: Step) -> dict[str, int]:
    """What the sizes of a step are called, the most telling first, as in the legend of common.py and in docstrings."""
    method, c = step.method, step.method.config
    vit = getattr(method, "student", method.encoder)
    vit = vit if hasattr(vit, "blocks") else None  # a tokenizer is none
    h = (vit or method).grid[0]
    found = dict(B=len(step.batch[0]), N=h * h)
    if vit:
        found |= dict(D=vit.width, P=3 * vit.patch_size**2)
    if mask := next((x for x in step.batch if hasattr(x, "visible")), None):
        found |= dict(V=mask.visible.shape[1], M=mask.masked.shape[1])
    knobs = dict(projector_out="d", decoder_width="width", codes="codes" if vit else "K", block="b", hidden="hidden")
    found |= {letter: getattr(c, knob) for knob, letter in knobs.items() if getattr(c, knob, 0)}
    found |= dict(H=(vit or method).image_size, h=h)  # W and w are the same
    found |= dict(p=vit.patch_size, heads=vit.blocks[0].attn.heads) if vit else {}
    found |= dict(p=method.shifts[1]) if hasattr(method, "shifts") else {}  # cmae.py's p is the shift's bound
    base = dict(found)
    found |= {f"1+{x}": 1 + base[x] for x in "VNM" if base.get(x)}
    found |= {f"{k}·{x}": k * base[x] for k, x in product((2, 3, 4), ("B", "D", "width", "h", "d")) if x in base}
    found |= {f"{x}·{y}": base[x] * base[y] for x, y in product("BK", "NMV") if base.get(x) and base.get(y)}
    found |= {"D/heads": base["D"] // base["heads"]} if vit else {}
    found |= {"hidden/4": base["hidden"] // 4} if "hidden" in base else {}
    found |= {"3·b·b": 3 * base["b"] ** 2} if "b" in base else {}
    found |= {"3·p": 3 * base["p"]} if vit else {}
    found |= {"H+p": base["H"] + base["p"]} if hasattr(method, "shifts") else {}
    return found


def legend(step: Step, rows: Iterable[list["Chip"]]) -> dict[str, str]:
    """What the letters of these chips stand for, and N."""
    used = {"N"}.union(*(re.findall(r"[A-Za-z]+", chip.shape) for row in rows for chip in row))
    meanings = MEANINGS | (dict(p="pixels, more than any shift") if hasattr(step.method, "shifts") else {})
    return {letter: f"{size} {meanings[letter]}" for letter, size in letters(step).items() if letter in used}


class Chip(NamedTuple):
    """What stands beside a line: a name, its shape in letters, whether gradient flows, and the rest on hover."""

    name: str
    shape: str
    gradient: str  # "flows", "stopped", or "data"
    about: str


def chips(step: Step, other: Step) -> dict[tuple[str, int], list[Chip]]:
    """(page, line) → its chips. A size has the letter that has it in both steps; see `run_step`."""
    here, there, known = letters(step), letters(other), {}
    for letter in here:
        if letter in there and (here[letter] != there[letter] or here[letter] > 100):
            known.setdefault((here[letter], there[letter]), letter)
    found = defaultdict(list)
    for (page, line, name), values in step.values.items():
        pairs = list(zip(values, other.values.get((page, line, name), values), strict=False))
        shapes = [symbolic(a.shape, b.shape, known) for a, b in pairs]
        found[page, line].append(chip(name, values, shapes, pairs[0][1].gradient))
    return dict(found)


def symbolic(shape: tuple, other: tuple, known: dict) -> str:
    words = [known.get((a, b), str(a)) for a, b in zip(shape, other, strict=True)]
    for i in range(1, len(words)):  # pictures are square here
        if words[i] in words[:i]:
            words[i] = re.sub(r"\b[Hh]\b", lambda side: dict(H="W", h="w")[side[0]], words[i])
    return ", ".join(words)


def chip(name: str, values: list[Value], shapes: list[str], could: bool) -> Chip:
    """`could`: whether a gradient would come here if nothing stopped it."""
    first = values[0]
    gradient = "flows" if first.gradient else "stopped" if could else "data"
    about = f"{' × '.join(map(str, first.shape)) or 'one number'}, {first.kind}"
    if first.kind.startswith("float"):
        about += f", mean {first.mean:.3g}, deviation {first.deviation:.3g}" if first.shape else f", {first.mean:.4g}"
        about += {"flows": "; carries gradient", "stopped": "; no gradient flows back from here"}.get(gradient, "")
    if len(values) > 1:
        also = list(dict.fromkeys(s for s in shapes if s != shapes[0]))
        about += f"; the first of {len(values)}" + (f", others are ({'), ('.join(also[:4])})" if also else "")
    shape = f"({shapes[0]})" if first.shape else f"{first.mean:.4g}"
    return Chip(name.replace("return", "→", 1), shape, gradient, about)


def idle(of: Source, ran: set[int]) -> set[int]:
    """Lines of functions that do not run."""
    found = set()
    for function in (x for x in ast.walk(of.tree) if isinstance(x, ast.FunctionDef)):
        for node in (x for block in function.body for x in ast.walk(block) if isinstance(x, ast.stmt)):
            lines = set(range(node.lineno, node.end_lineno + 1))
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            found |= lines if not docstring and not lines & ran else set()
    return found
