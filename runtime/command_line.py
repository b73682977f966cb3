"""The command line of train.py: what can be set, what a recipe sets, and how `--help` reads.

Settings are the defaults below, then the recipe (`RECIPES` beside the method), then what is given. Every knob of a
method is a field of its `Config`; the comment beside the field is its help text.
"""

import argparse
import dataclasses
import importlib.util
import inspect
import re
import shutil
import sys
from pathlib import Path

import torch

from common import SIZES, ViT
from methods import METHODS
from runtime import process
from runtime.errors import InputError


def options(argv: list[str]):
    """The command line → the settings, the method's Config, the method."""
    what = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    what.add_argument("--method")
    what.add_argument("--data", default="shapes")
    what.add_argument("--recipe")
    known, _ = what.parse_known_args(argv)
    if known.method is None and not {"-h", "--help"} & set(argv):
        raise InputError(f"method: none given; choose --method {', '.join(METHODS)}")
    if known.method is not None and known.method not in METHODS:
        raise InputError(f"method {known.method!r}: unknown; choose one of {', '.join(METHODS)}")
    recipe = known.recipe or {"shapes": "demo", "imagenet": "paper"}.get(known.data, "tiny")
    Method = METHODS.get(known.method)
    recipes = Method.RECIPES if Method else {}
    if Method and recipe not in recipes:
        raise InputError(f"recipe {recipe!r}: unknown; choose one of {', '.join(recipes)}")

    parser = build_parser(known.method, Method)
    chosen = dict(recipes.get(recipe, {}))
    base_lr = chosen.pop("base_lr", None)
    parser.set_defaults(recipe=recipe, **chosen)
    args = parser.parse_args(argv)
    if args.lr is None:
        args.lr = base_lr * args.batch_size / 256  # the linear scaling rule of the papers
    if args.epochs <= args.warmup_epochs and not any(word.split("=")[0] == "--warmup-epochs" for word in argv):
        args.warmup_epochs *= args.epochs / parser.get_default("epochs")  # or the rate would never reach its peak
    args.out = args.out or f"runs/{args.method}-{re.sub(r'[^A-Za-z0-9]+', '-', str(args.data)).strip('-')}"
    args.betas = list(args.betas)
    for name in "epochs max_steps batch_size accumulate classes images repeat save_every log_every".split():
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"{name.replace('_', ' ')} {getattr(args, name)}: must be at least 1")
    fields = [f.name for f in dataclasses.fields(Method.Config)]
    config = Method.Config(**{name: vars(args).pop(name) for name in fields})
    return args, config, Method


def settle(args, device: torch.device) -> None:
    """What the machine decides: the kind of device, the precision that is fast there, whether to compile."""
    args.device = device.type
    if args.precision == "auto":
        if args.device == "cuda":
            args.precision = "bf16" if process.has_bf16(device) else "fp16"
        else:  # processors without bf16 instructions emulate them, slowly
            flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
            args.precision = "bf16" if args.device == "cpu" and re.search("avx512_bf16|amx_bf16", flags) else "fp32"
    if args.compile is None:
        compiles = args.device == "cuda" and torch.cuda.get_device_capability() >= (7, 0)  # Triton's least
        args.compile = compiles and importlib.util.find_spec("triton") is not None


class Help(argparse.HelpFormatter):
    """Each option with its value under this recipe in brackets; as wide as the terminal, up to 100 columns."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=30, width=min(100, shutil.get_terminal_size().columns - 2))

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


def build_parser(name: str | None, Method) -> Parser:
    idea = (
        inspect.getdoc(sys.modules[Method.__module__]).split("\n\n")[:2]
        if Method
        else ["Pretrain a method; its own options show with --method NAME --help."]
    )
    parser = Parser(
        description="\n".join(idea).replace("\n", " "), formatter_class=Help, allow_abbrev=False,
        usage=f"train.py --method {name or '{' + ','.join(METHODS) + '}'} [options]",
    )  # fmt: skip

    def group(title, *arguments):
        box = parser.add_argument_group(title)
        for flag, settings in arguments:
            box.add_argument(flag, **settings)

    group(
        "what to train on what",
        ("--method", dict(choices=METHODS, help="one file each", metavar="NAME")),
        ("--data", dict(default="shapes", metavar="SET",
                        help="shapes, tiny-imagenet, cifar10, cifar100, imagenet, or a folder of class folders")),
        ("--data-root", dict(metavar="DIR", help="where the images of a named set are or shall be")),
        ("--download", dict(action="store_true", default=None, help="fetch the set if it is not there")),
        ("--classes", dict(type=int, metavar="K", help="only the first K classes of the set")),
        ("--images", dict(type=int, metavar="K", help="pretrain on the first K images only; evaluation still has all")),
        ("--repeat", dict(type=int, default=1, metavar="N",
                          help="each image N times an epoch, as one image needs (LC-MAE, Table A.1)")),
        ("--skip-bad-images", dict(action="store_true", default=None, help="leave out images that do not decode")),
        ("--recipe", dict(metavar="NAME", help="demo (two minutes on two cores), tiny (64 pixels), paper")),
    )  # fmt: skip
    group(
        "encoder",
        ("--model", dict(default="nano", choices=SIZES, metavar="SIZE", help="nano, tiny, small, base, large")),
        ("--image-size", dict(type=int, default=64, metavar="PIXELS", help="side of a view")),
        ("--patch-size", dict(type=int, default=8, metavar="PIXELS", help="side of a patch")),
        ("--width", dict(type=int, metavar="D", help="in place of the model's")),
        ("--depth", dict(type=int, metavar="BLOCKS", help="in place of the model's")),
        ("--heads", dict(type=int, metavar="N", help="in place of the model's")),
        ("--layer-scale", dict(type=float, default=0.0, metavar="X", help="initial scale of residuals; 0: none")),
        ("--drop-path", dict(type=float, default=0.0, metavar="RATE", help="of the last block; grows from 0 linearly")),
        ("--stem", dict(default="linear", choices=["linear", "conv"], metavar="KIND",
                        help="patch embedding: linear, or conv (CMAE*)")),
        ("--positions", dict(default="sincos", choices=["sincos", "relative"], metavar="KIND",
                             help="sincos, on the tokens, or relative, a table in the attention (ConMIM's code)")),
    )  # fmt: skip
    group(
        "optimisation",
        ("--epochs", dict(type=int, default=20, metavar="N", help="passes over the images")),
        ("--max-steps", dict(type=int, metavar="N", help="a shorter run of the same shape")),
        ("--batch-size", dict(type=int, default=128, metavar="B", help="images per step, over all processes")),
        ("--accumulate", dict(type=int, default=1, metavar="N",
                              help="parts that a step is done in; contrast sees one part's images at a time")),
        ("--lr", dict(type=float, metavar="RATE", help="peak learning rate; if not given, the recipe's, times B/256")),
        ("--min-lr", dict(type=float, default=0.0, metavar="RATE", help="at the end of the cosine")),
        ("--warmup-epochs", dict(type=float, default=2, metavar="N",
                                 help="linear from 0; not given, in proportion if --epochs are no more")),
        ("--weight-decay", dict(type=float, default=0.05, metavar="X", help="of AdamW; not on biases and vectors")),
        ("--no-decay", dict(nargs="*", default=[], metavar="PART", help="nor on parameters with this in their name")),
        ("--betas", dict(type=float, nargs=2, default=(0.9, 0.95), metavar="BETA", help="of AdamW")),
        ("--clip-grad", dict(type=float, default=0.0, metavar="NORM", help="largest gradient norm; 0: any")),
    )  # fmt: skip
    group(
        "machine",
        ("--device", dict(default="auto", choices=["auto", "cpu", "cuda", "mps"], metavar="NAME",
                          help="auto, cpu, cuda, mps")),
        ("--precision", dict(default="auto", choices=["auto", "fp32", "bf16", "fp16"], metavar="NAME",
                             help="auto, fp32, bf16, fp16")),
        ("--compile", dict(action=argparse.BooleanOptionalAction, help="torch.compile the method; on CUDA by default")),
        ("--workers", dict(type=int, metavar="N", help="processes that decode a set too large to hold")),
        ("--seed", dict(type=int, default=0, metavar="N", help="of everything random")),
        ("--deterministic", dict(action="store_true", help="CUDA too repeats itself bit by bit, more slowly")),
    )  # fmt: skip
    group(
        "run directory",
        ("--out", dict(metavar="DIR", help="runs/METHOD-DATA if not given")),
        ("--resume", dict(default="auto", metavar="HOW", help="auto: continue what --out holds; never; or a file")),
        ("--save-every", dict(type=int, default=1, metavar="EPOCHS", help="between checkpoints and pictures")),
        ("--log-every", dict(type=int, default=10, metavar="STEPS", help="between lines of log.jsonl")),
        ("--evaluate", dict(action=argparse.BooleanOptionalAction, default=False,
                            help="kNN and linear accuracy at the end, beside an untrained encoder's")),
    )  # fmt: skip
    if Method:
        comments = field_comments(Method.Config)
        knobs = parser.add_argument_group(f"{name}: the method's own (tables and sections are the paper's)")
        for field in dataclasses.fields(Method.Config):
            flag, kind = "--" + field.name.replace("_", "-"), type(field.default)
            how = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(
                type=kind, metavar={int: "N", float: "X", str: "HOW"}[kind])  # fmt: skip
            knobs.add_argument(flag, default=field.default, help=comments[field.name], **how)
    return parser


def field_comments(Config) -> dict[str, str]:
    """The comment beside each field of a Config is its help text: every knob is described in one place."""
    pattern = r"^    (\w+): [^#\n]+#\s*(.+)$"
    return dict(re.findall(pattern, inspect.getsource(Config), re.MULTILINE))


def build_encoder(args) -> ViT:
    width, depth, heads = (given or size for given, size in zip(
        (args.width, args.depth, args.heads), SIZES[args.model], strict=True))  # fmt: skip
    return ViT(args.image_size, args.patch_size, width, depth, heads, args.layer_scale, args.drop_path, args.stem,
               args.positions)  # fmt: skip
