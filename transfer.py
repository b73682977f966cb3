"""Dense transfer of a pretrained encoder: semantic segmentation, and detection with instance masks.

    python transfer.py --make-scenes data/scenes
    python transfer.py --run runs/mae-shapes --task segment --data data/scenes --image-size 128
    python transfer.py --run runs/mae-shapes --task detect --data data/scenes --image-size 128 --untrained
    python transfer.py --run RUN --task segment --format ade --data ADEChallengeData2016 --image-size 512
    python transfer.py --run RUN --task detect --data COCO --image-size 1024

Segmentation puts torchvision's FCN head on the last patch features; detection puts torchvision's Mask R-CNN on a simple
feature pyramid, made of that map alone (ViTDet, arXiv 2203.16527, §3). One process; torchrun is refused.

`--data` is a folder of VOC2012, of ADE20K (ADEChallengeData2016), or of COCO, with annotations/instances_train*.json
and _val*.json. COCO's images lie in the folder that such a name ends in, or else at paths from DIR. `--make-scenes`
writes a small set in both VOC's and COCO's format.

So far run on generated scenes only, on a CPU; not on VOC, ADE20K or COCO, nor on a GPU.
"""

import argparse
import json
import math
import os
from pathlib import Path

import torch

from common import pair
from downstream.dense_prediction import Detector, Features, Instances, Reader, Segmenter, Segments, fine_tune, measure
from inputs import builtin_scenes
from runtime import encoders, files, process
from runtime.command_line import Help, Parser, fastest, seed
from runtime.errors import InputError


def options() -> argparse.Namespace:
    parser = Parser(description="Fine-tune an encoder on a dense task.", formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add("--make-scenes", metavar="DIR", help="write generated scenes with exact labels there, and stop")
    add("--n", type=int, default=200, metavar="N", help="scenes to learn from; a quarter as many are for tests")
    add("--run", metavar="DIR", help="a run's directory, or an encoder.pt")
    add("--task", choices=["segment", "detect"], help="segment: a label for each pixel; detect: boxes and masks")
    add("--data", metavar="DIR", help="a folder in VOC's, ADE20K's or COCO's format")
    add("--format", choices=["voc", "ade", "coco"], help="if not given, voc to segment and coco to detect")
    add("--untrained", action="store_true", help="the same encoder at its initial weights")
    add("--image-size", type=int, metavar="PIXELS", help="side of the square; if not given, the encoder's")
    add("--epochs", type=int, default=20, metavar="N", help="passes over the images")
    add("--batch-size", type=int, default=16, metavar="B", help="images per step")
    add("--lr", type=float, default=5e-4, metavar="RATE", help="peak learning rate")
    add("--weight-decay", type=float, default=0.05, metavar="X", help="CMAE's and ConMIM's detectors: 0.1")
    add("--decay-at", type=int, nargs="+", default=[], metavar="N",
        help="after so many epochs a tenth of the rate (CAE's detector, of 12: 9 11); else a cosine")  # fmt: skip
    add("--jitter", type=float, nargs=2, default=(0.5, 2.0), metavar="X", help="of the scale, in training")
    add("--seed", type=seed, default=0, metavar="N", help="of everything random")
    add("--workers", type=int, metavar="N", help="processes that read; if not given, 8 for a GPU, none otherwise")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], metavar="NAME", help="auto, cpu, cuda")
    add("--precision", default="auto", choices=["auto", "fp32", "bf16"], metavar="NAME", help="auto, fp32, bf16")
    args = parser.parse_args()
    for name, least in dict(n=1, image_size=1, epochs=1, batch_size=1, workers=0).items():
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise InputError(f"{name.replace('_', ' ')} {getattr(args, name)}: must be at least {least}")
    if not 0 <= args.weight_decay < math.inf:
        raise InputError(f"weight decay {args.weight_decay:g}: must be at least 0 and finite")
    if args.decay_at and not 0 < min(args.decay_at) <= max(args.decay_at) < args.epochs:
        given = " ".join(map(str, args.decay_at))
        raise InputError(f"decay at {given}: must lie between 0 and the {args.epochs} epochs")
    if not 0 < args.jitter[0] <= args.jitter[1]:
        raise InputError(f"jitter {args.jitter[0]:g} {args.jitter[1]:g}: give a smallest and a largest positive scale")
    if args.make_scenes is None:
        for name in ("run", "task", "data"):
            if getattr(args, name) is None:
                raise InputError(f"{name}: none given; give --run, --task and --data, or --make-scenes")
        args.format = args.format or {"segment": "voc", "detect": "coco"}[args.task]
        if (args.format == "coco") != (args.task == "detect"):
            raise InputError(f"format {args.format}: not for --task {args.task}; voc and ade segment, coco detects")
    return args


def main() -> None:
    args = options()
    if args.make_scenes is not None:
        return builtin_scenes.write(Path(args.make_scenes), args.n, args.seed)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("transfer.py: works in one process; start it without torchrun")
    device = process.start(args.device)
    encoder = encoders.load_encoder(args.run, device)
    if args.untrained:
        encoder = encoders.untrained(encoder, args.seed)
    args.image_size = args.image_size or pair(encoder.image_size)[0]
    encoder = encoders.resize(encoder, args.image_size).to(device)
    args.workers = (8 if device.type == "cuda" else 0) if args.workers is None else args.workers
    root = Path(args.data)
    if args.task == "segment":
        sets, Task = [Segments(root, split, args.format) for split in ("train", "val")], Segmenter
    else:
        sets, Task = [Instances(root, split) for split in ("train", "val")], Detector
        if sets[0].categories != sets[1].categories:
            raise InputError(f"{root}: categories to learn and to test differ; give both files of one set")
    torch.manual_seed(args.seed)
    if args.precision == "auto":
        args.precision = "bf16" if fastest(device)["precision"] == "bf16" else "fp32"
    model = Task(Features(encoder, args.precision == "bf16"), sets[0].classes).to(device)
    fine_tune(model, Reader(sets[0], args.image_size, args.seed, args.jitter), args, device)
    result = measure(model, Reader(sets[1], args.image_size), args, device)
    del args.make_scenes, args.n
    result = {**result, **vars(args), "device": str(device)}
    print(json.dumps(result), flush=True)
    directory = Path(args.run) if Path(args.run).is_dir() else Path(args.run).parent
    name = f"transfer-{args.task}{'-untrained' if args.untrained else ''}.json"
    files.write_text(directory / name, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    process.command(main)
