"""Dense transfer of a pretrained encoder: semantic segmentation, and detection with instance masks.

    python transfer.py --make-scenes data/scenes
    python transfer.py --run runs/mae-shapes --task segment --data data/scenes --image-size 128
    python transfer.py --run runs/mae-shapes --task detect --data data/scenes --image-size 128 --untrained
    torchrun --nproc_per_node=8 -- transfer.py --run RUN --recipe cae-ade20k --data ADEChallengeData2016
    torchrun --nproc_per_node=8 -- transfer.py --run RUN --recipe cae-coco --data COCO
    python transfer.py --run RUN --task detect --format tiny-imagenet --data tiny-imagenet-200

`--data` is a folder of VOC2012, of ADE20K (ADEChallengeData2016), of COCO, with annotations/instances_train*.json and
_val*.json, or of Tiny-ImageNet, with a box for each image. COCO's images lie in the folder that such a name ends in, or
else at paths from DIR. `--make-scenes` writes a small set in both VOC's and COCO's format.

So far run on small sets only, on a CPU; not on VOC, ADE20K or COCO, nor on a GPU.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import torch

from common import ViT, pair
from downstream.dense_prediction import Detector, Segmenter, draw, fine_tune, measure
from downstream.dense_recipes import RECIPES, Recipe, recipe_for
from inputs import builtin_scenes
from inputs.dense_sets import Instances, Reader, Segments
from runtime import encoder_files, files, process
from runtime.command_line import OPTIONS, Help, Parser, add_fields, add_option, count, settle, whole
from runtime.errors import InputError
from runtime.ranks import rank, world_size


def options() -> tuple[argparse.Namespace, Recipe | None]:
    parser = Parser(description="Fine-tune an encoder on a dense task.", formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add("--make-scenes", metavar="DIR", help="write generated scenes with exact labels there, and stop")
    add("--n", type=count, default=200, metavar="N", help="scenes to learn from; a quarter as many are for tests")
    add("--run", metavar="DIR", help="a run's directory, or file of weights")
    add("--untrained", action="store_true", help="the same encoder at its initial weights")
    add("--tuned", metavar="DIR", help="the same encoder as evaluate.py has fine-tuned it, in RUN/finetune/seed-0, say")
    add("--task", choices=["segment", "detect"], help="segment: a label for each pixel; detect: boxes and masks")
    add("--data", metavar="DIR", help="a folder in VOC's, ADE20K's, COCO's or Tiny-ImageNet's format")
    add("--format", choices=["voc", "ade", "coco", "tiny-imagenet"], help="if not given, voc to segment, else coco")
    add("--classes", type=count, metavar="K", help="of Tiny-ImageNet only the first K classes")
    add("--recipe", choices=RECIPES, metavar="NAME", help=", ".join(RECIPES))
    add("--accumulate", type=count, default=1, metavar="N", help="parts of a step, for memory; batch norm sees one")
    add("--workers", type=whole, metavar="N", help="processes that read; if not given, 8 for a GPU, none otherwise")
    add("--resume", default="auto", choices=["auto", "never"], help="continue what is in the run's directory")
    for name, *option in OPTIONS["what to train on what"] + OPTIONS["machine"]:
        if name in ("mean", "std", "device", "precision", "seed"):
            add_option(parser, name, *option[:-1], option[-1].replace(", or auto: by their own", ""))
    add_fields(parser.add_argument_group("in place of the recipe's"), Recipe, unset=True)
    args = parser.parse_args()
    if args.mean == "auto":
        raise InputError("--mean auto: is not looked for here; give the numbers that evaluate.py --mean auto says")
    if args.make_scenes is not None:
        return args, None
    if not args.run or not args.data:
        missing = ", ".join(name for name in ("run", "data") if not getattr(args, name))
        raise InputError(f"{missing}: not given; give --run, --data and --task or --recipe, or --make-scenes")
    if args.tuned and args.untrained:
        raise InputError("--tuned, --untrained: an encoder is one of both; give one")
    own = "task", "format", *(field.name for field in dataclasses.fields(Recipe))
    given = {name: vars(args).pop(name) for name in own if vars(args).get(name) is not None}
    args.task, args.format, recipe = recipe_for(args.recipe, given)
    if args.classes and args.format != "tiny-imagenet":
        raise InputError(f"--classes: does nothing to format {args.format}; leave it out")
    return args, recipe


def load(args: argparse.Namespace, recipe: Recipe, device: torch.device) -> ViT:
    """The encoder that is asked for."""
    encoder = encoder_files.normalised(encoder_files.load_encoder(args.run, device), args.mean, args.std)
    if args.untrained:
        encoder = encoder_files.untrained(encoder, args.seed)
    if args.tuned:
        file = Path(args.tuned) / "checkpoint.pt"
        try:  # in place of its last norm, the head's has learnt
            saved = files.load(file)["classifier"].items()
            saved = {name.removeprefix("encoder.").removeprefix("head."): x for name, x in saved}
            encoder.load_state_dict(saved, strict=False)  # it may have no positions, but has a linear layer
        except (LookupError, TypeError, AttributeError, RuntimeError):
            raise InputError(f"{file}: no fine-tuning of {args.run}; give a folder that evaluate.py wrote") from None
    return encoder_files.resize(encoder, recipe.image_size or pair(encoder.image_size)[0]).to(device)


def main() -> None:
    args, recipe = options()
    if recipe is None:
        return builtin_scenes.write(Path(args.make_scenes), args.n, args.seed)
    device, root = process.start(args.device), Path(args.data)
    encoder = load(args, recipe, device)
    recipe = dataclasses.replace(recipe, image_size=pair(encoder.image_size)[0])
    args.workers = (8 if device.type == "cuda" else 0) if args.workers is None else args.workers
    directory, name = files.results_of(args.run)
    name = f"transfer-{name}{args.task}{'-untrained' * args.untrained}{'-tuned' * bool(args.tuned)}"
    args.compile, args.out = False, str(directory / name)
    settle(args, device)
    torch.manual_seed(args.seed)
    if args.task == "segment":
        sets = [Segments(root, split, args.format) for split in ("train", "val")]
        model = Segmenter(encoder, sets[0].classes, recipe.head, args.precision)
    else:
        sets = [Instances(root, split, args.format, args.classes) for split in ("train", "val")]
        if sets[0].categories != sets[1].categories:
            raise InputError(f"{root}: categories to learn and to test differ; give both files of one set")
        model = Detector(encoder, sets[0].classes, recipe.pyramid, args.precision, sets[0].masks)
    model = model.to(device)
    how = dict(views=argparse.Namespace(mean=encoder.mean, std=encoder.std), windows=recipe.windows)
    train = Reader(sets[0], recipe.image_size, args.seed, jitter=recipe.jitter, distort=recipe.distort, **how)
    kept = dict(directory=directory / name, resume=args.resume == "auto")
    fine_tune(model, train, recipe, device, args.seed, args.workers, args.accumulate, **kept)
    val = Reader(sets[1], recipe.image_size, **how)
    result = measure(model, val, recipe.batch_size, args.workers, device)
    if rank() == 0:
        del args.make_scenes, args.n
        result |= dataclasses.asdict(recipe) | vars(args) | dict(device=str(device), processes=world_size())
        print(json.dumps(result), flush=True)
        draw(model, val, directory / f"{name}.png", device)
        files.write_text(directory / f"{name}.json", json.dumps(result, indent=1) + "\n")
    process.stop()


if __name__ == "__main__":
    process.command(main)
