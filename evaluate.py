"""What an encoder is worth: kNN and linear probes on its features, and what fine-tuning makes of it.

    python evaluate.py --run runs/cmae-shapes --protocol knn
    python evaluate.py --run runs/cmae-shapes --protocol finetune --seeds 3
    python evaluate.py --run mae_pretrain_vit_base.pth --protocol knn --data tiny-imagenet --data-root DIR
    python evaluate.py --run runs/cmae-shapes --export hf --to vit
    torchrun --nproc_per_node=2 -- evaluate.py --run runs/cmae-shapes --protocol linear --untrained

(The bare -- keeps torchrun of Python 3.11 and older from taking --run for an option of its own.)

The table in downstream/classifier.py says what learns under each protocol that trains. The result is one line of JSON,
which is also written into the run's directory, or beside the file of weights.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from common import pair
from downstream import recipes
from downstream.protocols import PROTOCOLS, Task, evaluate
from inputs import augment, image_sets
from runtime import files, process
from runtime.command_line import OPTIONS, Help, Parser, Sides, add_option, field_comments, seed
from runtime.encoder_files import TARGETS, load_encoder, normalised, untrained, write_export
from runtime.errors import InputError
from runtime.ranks import rank, world_size


def options() -> argparse.Namespace:
    parser = Parser(description="Measure the encoder of a run.", formatter_class=Help, allow_abbrev=False)
    parser.add_argument("--run", required=True, metavar="DIR", help="a run's directory, or file of weights")
    what, unset = parser.add_mutually_exclusive_group(required=True), argparse.SUPPRESS
    what.add_argument("--protocol", choices=PROTOCOLS, help="how to measure")
    what.add_argument("--export", default=unset, choices=TARGETS, help="write the encoder for timm or transformers")
    parser.add_argument("--to", default=unset, metavar="PATH", help="where to (default: timm.pt or hf, beside it)")
    parser.add_argument("--heads", default=unset, type=int, metavar="H", help="of weights whose width does not tell")
    text = "of a view, in place of the encoder's size; its positions are interpolated"
    add_option(parser, "image-size", unset, Sides, "H [W]", text)
    parser.add_argument("--untrained", action="store_true", help="the same encoder at its initial weights")
    group = parser.add_argument_group("images (as the run's, unless given)")
    images = "data data-root classes class-level range split columns mean std download skip-bad-images".split()
    for name, _, *option in OPTIONS["what to train on what"]:
        if name in images:
            add_option(group, name, unset, *option)
    group = parser.add_argument_group("machine")
    for option in OPTIONS["machine"]:
        if option[0] in ("device", "precision"):
            add_option(group, *option)
    group = parser.add_argument_group("kNN", argument_default=unset)
    group.add_argument("--k", type=int, metavar="K", help=f"neighbours that vote [{Task.k}]")
    group.add_argument("--tau", type=float, metavar="T", help=f"temperature of their votes [{Task.tau}]")
    group = parser.add_argument_group("protocols that train (linear only with --paper)", argument_default=unset)
    group.add_argument("--paper", action="store_true", default=unset, help="the papers' linear probe, by LARS")
    group.add_argument("--blocks", type=int, metavar="K", help=f"last blocks that partial trains [{Task.blocks}]")
    group.add_argument("--recipe", metavar="NAME", help=f"{', '.join(recipes.RECIPES)} [by the data]")
    group.add_argument("--seed", type=seed, metavar="N", help=f"of everything random [{Task.seed}]")
    group.add_argument("--seeds", type=int, metavar="N", help=f"trainings, for mean and deviation [{Task.seeds}]")
    group.add_argument("--accumulate", type=int, metavar="N", help=f"parts of a step, for memory [{Task.accumulate}]")
    group.add_argument("--resume", choices=["auto", "never"], help="continue what is in the run's directory [auto]")
    group = parser.add_argument_group("in place of the recipe's", argument_default=unset)
    comments = field_comments(recipes.Recipe)
    for field in dataclasses.fields(recipes.Recipe):
        kind = type(field.default)
        metavar = {int: "N", float: "X", str: "NAME", bool: "switch"}[kind]
        add_option(group, recipes.flag(field.name)[2:], unset, kind, metavar, comments[field.name])
    return parser.parse_args()


ENCODING = ("features", "batch_size")
TRAINING = ("recipe", "seed", "seeds", "accumulate", "resume", *(f.name for f in dataclasses.fields(recipes.Recipe)))
USED = dict.fromkeys(PROTOCOLS, TRAINING)  # the options, beyond those of all, that a protocol has a use for
USED |= {"knn": ("k", "tau", *ENCODING), "linear": ENCODING, "partial": ("blocks", *TRAINING)}


def task_options(args: argparse.Namespace, settings: dict) -> tuple[dict, dict]:
    """The command line → the fields of Task, and what of them to report."""
    given, paper = dict(vars(args)), "paper" in args and args.protocol == "linear"
    used = ("paper", *TRAINING) if paper else USED[args.protocol]
    for name in ("paper", *(name for names in USED.values() for name in names)):
        if name in given and name not in used:
            hint = " without --paper" if args.protocol == "linear" else ""
            raise InputError(f"{recipes.flag(name)}: does nothing to protocol {args.protocol}{hint}; leave it out")
    given = {name: given[name] for name in used if name in given}
    for name in ("batch_size", "seeds", "accumulate"):
        if given.get(name, 1) < 1:
            raise InputError(f"{recipes.flag(name)} {given[name]}: must be at least 1")
    if "recipe" not in used:
        if given.get("features", "mean") not in ("mean", "cls"):
            raise InputError(f"--features {given['features']!r}: unknown; choose one of mean, cls")
        return given, {name: given.get(name, getattr(Task, name)) for name in used}
    method, model = settings.get("method"), settings.get("model")
    its_own = next(name for name in (f"{method}-{model}", method, "mae") if name in recipes.RECIPES)
    name = given.pop("recipe", {"shapes": "demo", "imagenet": its_own}.get(args.data, "tiny"))
    fields = [field.name for field in dataclasses.fields(recipes.Recipe)]
    own = {field: given.pop(field) for field in fields if field in given}
    blocks = given.get("blocks", Task.blocks)
    recipe = recipes.recipe_for(name, args.protocol, blocks, own)
    idle = recipes.IDLE[recipes.kind_of(args.protocol, blocks)]
    report = {field: getattr(recipe, field) for field in fields if field not in idle}
    report |= dict(recipe=name, lr=recipe.peak, seed=given.get("seed", 0), seeds=given.get("seeds", 1))
    if args.protocol == "partial":
        report["blocks"] = blocks
    given["resume"] = given.get("resume") != "never"
    return given | dict(recipe=recipe), report


def run_settings(directory: Path) -> dict:
    """What the run was started with, from its config.json; nothing where there is none."""
    file = directory / "config.json"
    try:
        return dict(json.loads(file.read_text()).get("settings", {})) if file.exists() else {}  # transformers' has none
    except (OSError, ValueError, TypeError, AttributeError):
        raise InputError(f"{file}: not a run's configuration; give one that train.py wrote") from None


def main() -> None:
    args = options()
    if "to" in args and "export" not in args:
        raise InputError(f"--to {args.to}: says where an encoder is written to; give --export too")
    device = process.start(args.device)
    encoder = load_encoder(args.run, device, vars(args).get("image_size"), vars(args).get("heads"))
    directory, name = files.results_of(args.run)
    settings = run_settings(directory)
    if args.untrained:
        encoder = untrained(encoder, settings.get("seed", 0))
    if "export" in args:
        if rank() == 0:
            to = vars(args).get("to") or directory / TARGETS[args.export]
            print(write_export(encoder, args.export, to), flush=True)
            if encoder.settings["mean"] or encoder.settings["std"]:
                print(f"# images: those in [0, 1], minus {encoder.mean}, divided by {encoder.std}", flush=True)
        return process.stop()
    images = ("data", "data_root", "classes", "download", "skip_bad_images")
    kept = ("class_level", "range") if "data" in args else ("class_level", "range", "split", "columns")
    given = {name: settings[name] for name in kept if settings.get(name)} | vars(args)
    args = argparse.Namespace(**{name: settings.get(name) for name in images} | given)
    if args.data is None:
        raise InputError(f"{args.run}: does not say which images to measure on; give --data")
    if args.untrained and args.protocol == "supervised":
        raise InputError("--untrained: does nothing to protocol supervised, which is so anyway; leave it out")
    chosen, report = task_options(args, settings)
    sets = [image_sets.open_for(args, half).to(device) for half in ("train", "val")]
    augment.find_statistics(args, sets[0], device)
    encoder = normalised(encoder, getattr(args, "mean", None), getattr(args, "std", None))
    report |= dict(image_size=encoder.image_size, mean=encoder.mean, std=encoder.std)
    name += args.protocol + ("-paper" if "paper" in args else "")
    name += (f"-{report['blocks']}" if "blocks" in report else "") + ("-untrained" if args.untrained else "")
    name += "-{}x{}".format(*pair(args.image_size)) if "image_size" in args else ""
    chosen |= dict(precision=args.precision, directory=directory / name)
    result = evaluate(encoder, *sets, [args.protocol], device, **chosen)[args.protocol]
    if rank() == 0:
        about = vars(args) | report | dict(device=str(device), processes=world_size())
        result = {"protocol": args.protocol, **result, **(about | result)}
        print(json.dumps(result), flush=True)
        files.write_text(directory / f"evaluate-{name}.json", json.dumps(result, indent=1) + "\n")
    process.stop()


if __name__ == "__main__":
    process.command(main)
