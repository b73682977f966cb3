"""Reading command lines: the options of pretraining, and the parser and help page that all commands share.

Settings are the defaults below, then the recipe (`RECIPES` beside the method), then what is given.
"""

import argparse
import dataclasses
import importlib.util
import inspect
import json
import math
import os
import re
import shutil
import sys
import typing
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

from common import SIZES, ViT
from inputs.augment import LEAST_STD
from inputs.image_sets import NAMES
from runtime import fast_paths, process
from runtime.errors import InputError
from runtime.knobs import turned_off
from runtime.ranks import rank, world_size


def number(kind: type, least: float, below: float, right: str) -> Callable[[str], float]:
    """What reads a number from `least` to what is less than `below`, or says what is `right`."""

    def read(word: str):
        if not least <= kind(word) < below:
            raise argparse.ArgumentTypeError(f"{word}: must be {right}")
        return kind(word)

    read.__name__ = kind.__name__  # which stands in argparse's message of what is no number
    return read


count = number(int, 1, math.inf, "at least 1")
whole = number(int, 0, math.inf, "at least 0")
amount = number(float, 0, math.inf, "0 or more, and finite")
share = number(float, 0, 1, "at least 0 and below 1")
seed = number(int, 0, 2**32, f"from 0 to {2**32 - 1}")  # torch tells no more apart, so that larger ones would repeat


class Sides(argparse.Action):
    """Reads one number for a square, or height and width. Two equal ones are kept as one: it is the same run."""

    def __call__(self, parser, args, words, option=None):
        if not 1 <= len(words) <= 2 or not all(word.isdecimal() and int(word) > 0 for word in words):
            parser.error(f"argument {option}: {' '.join(words)}: give one number of pixels, or height and width")
        sides = [int(word) for word in words]
        setattr(args, self.dest, sides[0] if sides[0] == sides[-1] else sides)


class Channels(argparse.Action):
    """Reads a mean or deviation for each channel, as shares of white; of a mean also the word auto."""

    def __call__(self, parser, args, words, option=None):
        auto, least = ("auto, or ", 0) if self.dest == "mean" else ("", LEAST_STD)
        with suppress(ValueError):
            numbers = None if auto and words == ["auto"] else [float(word) for word in words]
            if numbers is None or (len(numbers) == 3 and all(least <= x <= 1 for x in numbers)):
                return setattr(args, self.dest, numbers or "auto")
        right = f"give {auto}three numbers from {least:g} to 1, for red, green and blue, where 1 is white"
        parser.error(f"argument {option}: {' '.join(words)}: {right}")


# Group → its options: name, default, kind, metavar, help. A kind is a type, or the list of words to choose from. Of
# bool, the metavar "switch" means a flag that can only be given, else there is a --no- form beside it. An action reads
# its words itself.
OPTIONS = {
    "what to train on what": [
        ("data", "shapes", str, "SET",
         "shapes, tiny-imagenet, cifar10, cifar100, imagenet, inaturalist, a folder of images, or hf:NAME"),
        ("data-root", None, str, "DIR", "where the images of a named set are or shall be"),
        ("download", None, bool, "switch", "fetch the set if it is not there"),
        ("classes", None, count, "K", "only the first K classes of the set"),
        ("class-level", None, int, "N", "level of folders that the classes are; 1: at the top; 0: take no labels"),
        ("range", None, float, "LOW HIGH", "black and white of 16-bit greys; if not given, the set's own extremes"),
        ("split", None, str, "NAME...", "of an hf: set, to train on and to validate on [train validation]"),
        ("columns", None, str, "NAME...", "of an hf: set, of images and of labels; if not given, found by type"),
        ("mean", None, Channels, "R G B", "normalise images by this, or auto: by their own; if unknown, ImageNet's"),
        ("std", None, Channels, "R G B", "and by this deviation; if not given: as the mean, their own or ImageNet's"),
        ("images", None, count, "K", "pretrain on the first K images only; evaluation still has all"),
        ("repeat", 1, count, "N", "each image N times an epoch, as one image needs (LC-MAE, Table A.1)"),
        ("skip-bad-images", None, bool, "switch", "leave out images that do not decode"),
        ("recipe", None, str, "NAME", "demo (minutes on two cores), tiny (64 pixels), paper"),
    ],
    "encoder": [
        ("model", "nano", list(SIZES), "SIZE", "nano, tiny, small, base, large"),
        ("image-size", 64, Sides, "H [W]", "pixels of a view: its side, or its height and width"),
        ("patch-size", 8, int, "PIXELS", "side of a patch"),
        ("width", None, int, "D", "in place of the model's"),
        ("depth", None, int, "BLOCKS", "in place of the model's"),
        ("heads", None, int, "N", "in place of the model's"),
        ("mlp-ratio", None, count, "N", "width of an MLP by the encoder's, in place of 4 (CMAE's code, small: 3)"),
        ("layer-scale", 0.0, amount, "X", "initial scale of residuals; 0: none"),
        ("drop-path", 0.0, share, "RATE", "of the last block; grows linearly from 0 in the first"),
        ("stem", "linear", ["linear", "conv"], "KIND", "patch embedding: linear, or conv (CMAE*)"),
        ("positions", "sincos", ["sincos", "relative"], "KIND", "of tokens: sincos, or relative (ConMIM's code)"),
        ("init", None, str, "FILE", "go on from this encoder: a run, or MAE's, timm's, Hugging Face's weights"),
    ],
    "optimisation": [
        ("epochs", 20, count, "N", "passes over the images"),
        ("max-steps", None, count, "N", "a shorter run of the same shape"),
        ("batch-size", 128, count, "B", "images per step, over all processes"),
        ("accumulate", 1, count, "N", "parts that a step is done in; contrast sees one part's images at a time"),
        ("lr", None, amount, "RATE", "peak learning rate; if no default is shown, the recipe's base rate times B/256"),
        ("min-lr", 0.0, amount, "RATE", "learning rate at the end of the cosine"),
        ("warmup-epochs", 2, amount, "N", "in which the rate grows from 0; by default fewer if --epochs are no more"),
        ("weight-decay", 0.05, amount, "X", "of AdamW; biases and vectors are not decayed"),
        ("no-decay", [], str, "PART...", "parameters with PART in their name are not decayed either"),
        ("betas", (0.9, 0.95), share, "BETA", "of AdamW"),
        ("clip-grad", 0.0, amount, "NORM", "largest norm of the gradient; 0: any"),
    ],
    "machine": [
        ("device", "auto", ["auto", "cpu", "cuda", "mps"], "NAME", "auto, cpu, cuda, mps"),
        ("precision", "auto", ["auto", "fp32", "bf16", "fp16"], "NAME", "auto, fp32 (without TF32), bf16, fp16"),
        ("compile", None, bool, None, "torch.compile the method; on CUDA by default, if a C compiler is there"),
        ("workers", None, whole, "N", "processes that decode a set too large to hold"),
        ("seed", 0, seed, "N", "of everything random"),
        ("deterministic", False, bool, "switch", "make CUDA repeat itself bit by bit, more slowly"),
    ],
    "run directory": [
        ("out", None, str, "DIR", "runs/METHOD-DATA if not given"),
        ("resume", "auto", str, "HOW", "auto: continue what --out holds; never; or a file"),
        ("save-every", 1, count, "EPOCHS", "epochs between checkpoints and pictures"),
        ("log-every", 10, count, "STEPS", "steps between lines of log.jsonl"),
        ("probe-every", None, count, "EPOCHS", "epochs between measures of the encoder's kNN on a fixed few images"),
        ("log-gradients", None, count, "STEPS", "steps between norms of each loss's gradient on the encoder"),
        ("tensorboard", None, bool, "switch", "write the log and the pictures for TensorBoard, too"),
        ("evaluate", False, bool, None, "kNN and linear accuracy at the end, beside an untrained encoder's"),
    ],
}  # fmt: skip


def pretraining_options(argv: list[str], methods: dict[str, type]):
    """The command line → the settings, the method's Config, the method's class; `methods` are those to choose from."""
    what = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("method", "data", "recipe"):
        what.add_argument(f"--{name}")
    known, _ = what.parse_known_args(argv)
    if known.method is None and not {"-h", "--help"} & set(argv):
        raise InputError(f"method: none given; choose --method {', '.join(methods)}")
    if known.method is not None and known.method not in methods:
        raise InputError(f"method {known.method!r}: unknown; choose one of {', '.join(methods)}")
    recipe = known.recipe or {None: "demo", "shapes": "demo", "imagenet": "paper"}.get(known.data, "tiny")
    Method = methods.get(known.method)
    recipes = Method.RECIPES if Method else {}
    if Method and recipe not in recipes:
        raise InputError(f"recipe {recipe!r}: unknown; choose one of {', '.join(recipes)}")

    parser = build_parser(known.method, methods)
    parser.set_defaults(recipe=recipe, **recipes.get(recipe, {}))
    args = parser.parse_args(argv)
    base_lr = vars(args).pop("base_lr", None)
    if args.lr is None:
        args.lr = base_lr * args.batch_size / 256  # the linear scaling rule of the papers
    if args.epochs <= args.warmup_epochs and not any(word.split("=")[0] == "--warmup-epochs" for word in argv):
        args.warmup_epochs *= args.epochs / parser.get_default("epochs")  # or the rate would never reach its peak
    args.out = args.out or f"runs/{args.method}-{re.sub(r'[^A-Za-z0-9]+', '-', str(args.data)).strip('-')}"
    images = Path(args.data_root or "", args.data).resolve()
    if args.data not in NAMES and Path(args.out).resolve().is_relative_to(images) and not (images / "train").is_dir():
        raise InputError(f"out {args.out}: lies among the images of {args.data}; give another --out")
    args.betas = list(args.betas)
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise InputError('--tensorboard: not installed; pip install ".[tensorboard]"')
    config = Method.Config(**{field.name: vars(args).pop(field.name) for field in dataclasses.fields(Method.Config)})
    flags = {re.sub(r"^--(no-)?|=.*", "", word).replace("-", "_") for word in argv if word[:2] == "--"}
    for knob, why in turned_off(args.method, config):
        if knob in flags:
            raise InputError(f"{knob.replace('_', ' ')}: does nothing with {why}; leave it out")
    return args, config, Method


def settle(args, device: torch.device) -> None:
    """What is fast on this machine, unless the run that is continued has it: precision, float32 products, compiling.

    From that run comes, too, what `--mean auto` found of the images with which it began.
    """
    args.device = device.type
    both = [fastest(device) | begun(args) if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(both)
    (found,) = both
    if args.precision == "auto":
        args.precision = found["precision"]
    if getattr(args, "mean", None) == "auto" and "mean" in found:
        args.mean, args.std = found["mean"], args.std or found.get("std")
    args.linear = found["linear"]
    fast_paths.use(args.linear)
    if args.compile is None:
        compiles = args.device == "cuda" and torch.cuda.get_device_capability() >= (7, 0)  # Triton's least
        compilers = os.environ.get("CC", "gcc"), "gcc", "clang"  # of C, one of which Triton needs
        args.compile = compiles and importlib.util.find_spec("triton") is not None and any(map(shutil.which, compilers))


def fastest(device: torch.device) -> dict:
    """The precision that suits the device, and how a CPU computes float32 products."""
    if device.type == "cpu":
        return fast_paths.measured()
    half = "bf16" if process.has_bf16(device) else "fp16"
    return dict(precision=half if device.type == "cuda" else "fp32", linear=None)


def checkpoint_of(args) -> Path | None:
    """Where the checkpoint is that `--resume` continues from, if it is there; None: none is wanted."""
    if args.resume == "never" or not args.out:
        return None
    return Path(args.out, "checkpoint.pt") if args.resume == "auto" else Path(args.resume)


def goes_on(args) -> bool:
    """Whether there is a checkpoint to continue from, as rank 0 sees it."""
    found = [bool(path := checkpoint_of(args)) and path.exists()]
    if world_size() > 1:
        dist.broadcast_object_list(found)
    return found[0]


def begun(args) -> dict:
    """What the run that `--resume` continues has settled, by its checkpoint or, before one, in part by config.json."""
    path = checkpoint_of(args)
    if path is None:
        return {}
    with suppress(Exception):  # whoever reads the whole file says what is wrong with it
        settled = ("precision", "linear")
        if path.exists():
            settings = torch.load(path, "cpu", weights_only=True, mmap=True)["settings"]
            settled += ("mean", "std")  # a run without a checkpoint begins anew, perhaps with other images
        else:
            settings = json.loads(path.with_name("config.json").read_text())["settings"]
        return {key: settings[key] for key in settled if settings.get(key)}
    return {}


class Help(argparse.HelpFormatter):
    """Each option with its value under this recipe in brackets; as wide as the terminal, up to 100 columns."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=30, width=min(100, shutil.get_terminal_size().columns - 2))

    def _format_args(self, action, default_metavar):
        own = action.nargs == "+" and " " in action.metavar  # says itself how many words there may be
        return action.metavar if own else super()._format_args(action, default_metavar)

    def _get_help_string(self, action):
        value = action.default
        if isinstance(value, bool):
            value = "yes" if value else "no"
        elif isinstance(value, list | tuple):
            value = " ".join(map(str, value))
        text = action.help.replace("%", "%%")
        return text if value in (None, "", argparse.SUPPRESS) else f"{text} [{value}]"


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; see --help")


def build_parser(name: str | None, methods: dict[str, type]) -> "Parser":
    """The options of pretraining, and if the method is named, those of its Config."""
    Method, idea = methods.get(name), "Pretrain a method; its own options show with --method NAME --help."
    if Method:
        idea = " ".join(inspect.getdoc(sys.modules[Method.__module__]).split("\n\n")[:2]).replace("\n", " ")
    usage = f"train.py --method {name or '{' + ','.join(methods) + '}'} [options]"
    parser = Parser(description=idea, formatter_class=Help, allow_abbrev=False, usage=usage)
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        if "data" in options[0]:
            add_option(group, "method", None, list(methods), "NAME", "one file each")
        for option in options:
            add_option(group, *option)
    if Method:
        group = parser.add_argument_group(f"{name}: the method's own (tables and sections are the paper's)")
        add_fields(group, Method.Config)
    return parser


def add_fields(group, Config, unset: bool = False) -> None:
    """An option for each field of a Config, or `unset`, which leaves out of the result what is not given."""
    comments = field_comments(Config)
    for field in dataclasses.fields(Config):
        kind, given = type(field.default), typing.get_args(field.type)
        metavar = {int: "N", float: "X", str: "HOW", bool: None, tuple: "N..." if ... in given else "LEAST MOST"}[kind]
        if typing.get_origin(field.type) is typing.Literal:
            metavar = "|".join(given)
        kind, default = given[0] if kind is tuple else kind, argparse.SUPPRESS if unset else field.default
        add_option(group, field.name.replace("_", "-"), default, kind, metavar, comments[field.name])


def add_option(group, name: str, default, kind, metavar: str | None, text: str) -> None:
    """Add a row of `OPTIONS` to a group of an argparse parser."""
    how = dict(metavar=metavar, choices=kind) if isinstance(kind, list) else dict(metavar=metavar, type=kind)
    if kind is bool:
        how = dict(action="store_true" if metavar == "switch" else argparse.BooleanOptionalAction)
    elif isinstance(kind, type) and issubclass(kind, argparse.Action):
        how = dict(action=kind, nargs="+", metavar=metavar)
    elif " " in (metavar or ""):
        how |= dict(nargs=len(metavar.split()), metavar=tuple(metavar.split()))
    elif (metavar or "").endswith("..."):
        how |= dict(nargs="*", metavar=metavar.removesuffix("..."))
    elif isinstance(default, list | tuple):
        how["nargs"] = len(default)
    group.add_argument(f"--{name}", default=default, help=text, **how)


def field_comments(Config) -> dict[str, str]:
    """The comment beside each field of a Config is its help text: every knob is described in one place."""
    pattern = r"^    (\w+): [^#\n]+#\s*(.+)$"
    return dict(re.findall(pattern, inspect.getsource(Config), re.MULTILINE))


def build_encoder(args) -> ViT:
    size = [given or own for given, own in zip((args.width, args.depth, args.heads), SIZES[args.model], strict=True)]
    kinds = args.layer_scale, args.drop_path, args.stem, args.positions
    newer = {k: v for k, v in vars(args).items() if k in ("mean", "std", "mlp_ratio") and v}
    return ViT(args.image_size, args.patch_size, *size, *kinds, **newer)  # older runs lack these
