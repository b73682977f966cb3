"""Speed of what surrounds a step: the input path beside torchvision's, and train.py as it is typed."""

import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from common import StepRandom
from inputs import augment, image_cache, image_files
from methods import METHODS
from reporting import HERE
from reporting.step_speed import build_method, decoder_sizes
from reporting.timing import RSS_UNIT, interleave
from runtime import files
from runtime.errors import InputError
from runtime.log import Meter

EPOCH = 100_000  # images of an epoch of Tiny-ImageNet


def picture_folder(directory: Path, n: int, size: int) -> list[Path]:
    """n JPEG files in one class folder, of smooth noise."""
    from PIL import Image

    (directory / "class").mkdir()
    small = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = (F.interpolate(small, (size, size), mode="bicubic").clamp(0, 1) * 255).byte().permute(0, 2, 3, 1)
    paths = [directory / "class" / f"{i:05}.jpg" for i in range(n)]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image.numpy()).save(path, quality=90)
    return paths


def torchvision_views(args, name: str) -> Callable:
    """What mae or cmae draws of an image, by torchvision, image by image: PIL image → normalised view or views."""
    from torchvision.transforms import v2

    S = args.image_size
    tensor = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(augment.MEAN, augment.STD)])

    def crop(size: int) -> Callable:
        bicubic = v2.InterpolationMode.BICUBIC
        return v2.Compose([v2.RandomResizedCrop(size, (0.2, 1.0), interpolation=bicubic), v2.RandomHorizontalFlip()])

    if name == "mae":
        return v2.Compose([crop(S), tensor])
    master = crop(S + round(32 * S / 224))  # as much larger as CMAE shifts its second view
    color = v2.Compose([v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), v2.RandomGrayscale(0.2)])
    shift = v2.RandomCrop(S)

    def views(image):
        image = master(image)
        return tensor(image.crop((0, 0, S, S))), tensor(color(shift(image)))

    return views


def stages(args, paths: list[Path], packed, device: torch.device) -> dict[str, tuple[Callable, Callable | None]]:
    """Each stage of an input path on one batch: ours as a call, and torchvision's of one image."""
    from torchvision.datasets.folder import default_loader
    from torchvision.transforms import v2

    B, S = len(paths), args.image_size
    images, rng = packed.images(torch.arange(B), device), StepRandom(0, 0, B, None, device)
    views = augment.crop_resize(images, augment.crop_boxes(rng, (S, S)), S)
    pictures = [default_loader(path) for path in paths]

    def each(function: Callable) -> Callable:
        return lambda: [function(picture) for picture in pictures]

    return {
        "decode": (lambda: [*map(image_files.decode, paths)], lambda: [*map(default_loader, paths)]),
        "cache": (lambda: packed.images(torch.randperm(B), device), None),
        "crop": (lambda: augment.crop_resize(images, augment.crop_boxes(rng, (S, S)), S),
                 each(v2.RandomResizedCrop(S, (0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC))),
        "colour": (lambda: augment.color_jitter(views, *augment.draw_color_jitter(rng, 0.4, 0.4, 0.4, 0.1)),
                   each(v2.ColorJitter(0.4, 0.4, 0.4, 0.1))),
        "blur": (lambda: augment.gaussian_blur(views, rng.uniform(low=0.1, high=2.0)), each(v2.GaussianBlur(13))),
    }  # fmt: skip


def bench_input(args, device: torch.device) -> Iterator[dict]:
    """Images/s of each stage, then of the whole path of a method's input, as every epoch takes it.

    Ours: from the cache file's memory to `draw`'s batch on the device. Per image: torchvision's ImageFolder, transforms
    and a DataLoader with as many processes as we have threads, from files to a batch on the host. A call is eight
    batches, and leaves no process at work. Stages are one batch and one process, on both sides.
    """
    from torchvision.datasets import ImageFolder

    B, batches, peer = max(args.batch_size), 8, "torchvision" in args.peer
    calls, images = {}, {}  # the latter: images that a call is worth
    with tempfile.TemporaryDirectory() as directory:
        paths = picture_folder(Path(directory), B, args.image_size)
        packed = image_cache.Packed(*image_cache.pack([image_files.decode(path) for path in paths]))
        packed = image_cache.Packed(packed.flat.to(device), packed.sizes)
        for name, (ours, theirs) in stages(args, paths, packed, device).items():
            calls[name], images[name] = ours, B
            if peer and theirs:
                calls[name, "torchvision"] = theirs
        for name in args.method:
            method = build_method(args, name).to(device)

            def draw_all(method=method):
                for step in range(batches):
                    index = torch.randperm(B)
                    method.draw(packed.images(index, device), index, StepRandom(0, step, B, None, device))

            calls[name], images[name] = draw_all, B * batches
            if peer and name in ("mae", "cmae"):
                folder = ImageFolder(directory, torchvision_views(args, name))
                workers = 0 if args.cpu_time else torch.get_num_threads()
                loader = torch.utils.data.DataLoader(
                    torch.utils.data.ConcatDataset([folder] * batches), B, shuffle=True, num_workers=workers,
                    persistent_workers=workers > 0,
                )  # fmt: skip
                calls[name, "torchvision"] = lambda loader=loader: [None for _ in loader]
        seconds = interleave(calls, args.repeats, device, args.cpu_time)
    for name, n in images.items():
        row = dict(name=name, batch=B, images_per_second=n / seconds[name])
        if theirs := seconds.get((name, "torchvision")):
            row |= dict(torchvision_images_per_second=n / theirs, by_torchvision=theirs / seconds[name])
        yield row


def run_train(args, name: str, out: Path, *more: str) -> dict:
    """Seconds from train.py's command to its first logged step and to its end, the most it held in memory, its log."""
    keys = ["data", "data_root", "classes", "model", "width", "depth", "heads", "image_size", "patch_size", "device"]
    given = {key: vars(args)[key] for key in keys if vars(args)[key] is not None} | decoder_sizes(args, name)
    given |= dict(method=name, batch_size=args.batch_size[-1], precision=args.precision[0], lr=1e-3, out=out)
    flags = [word for key, value in given.items() for word in ("--" + key.replace("_", "-"), str(value))]
    flags += ["--compile" if args.compile else "--no-compile", "--no-evaluate", "--resume", "never"]
    words = [sys.executable, str(HERE / "train.py"), *flags, *more]
    begin, first, pid = time.perf_counter(), None, 0
    log, said = out / "log.jsonl", out.with_suffix(".err")
    with open(said, "w") as errors:
        child = subprocess.Popen(words, stdout=errors, stderr=errors)
        while not pid:
            time.sleep(0.005)
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if first is None and log.exists() and log.read_text().count("\n") > 1:
                first = time.perf_counter() - begin
    total = time.perf_counter() - begin
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        tail = said.read_text().strip().splitlines()
        raise InputError(f"train.py: failed ({tail[-1] if tail else child.returncode}); try {' '.join(words[1:])}")
    rows = [json.loads(line) for line in log.read_text().splitlines()[1:]]
    gib = usage.ru_maxrss * RSS_UNIT / 2**30
    return dict(first_step_seconds=first, total_seconds=total, resident_gib=gib, rows=rows)


def bench_epoch(args, device: torch.device) -> Iterator[dict]:
    """Two epochs by train.py, from command to weights on disk; the second is past start and compilation."""
    for name in args.method:
        with tempfile.TemporaryDirectory() as directory:
            run = run_train(args, name, Path(directory) / "run", "--epochs", "2", "--warmup-epochs", "1")
        log = run.pop("rows")
        last, half = log[-1], next(row for row in log if row["epoch"] >= 1)
        seconds = (last["seconds"] - half["seconds"]) / (last["epoch"] - half["epoch"])
        row = dict(name=name, batch=args.batch_size[-1], precision=args.precision[0], second_epoch_seconds=seconds)
        yield row | dict(images_per_second=last["step"] / 2 * args.batch_size[-1] / seconds) | run


def bench_start(args, device: torch.device) -> Iterator[dict]:
    """Seconds from the command to the first step, the most held in memory, and the seconds of one checkpoint."""
    for name in args.method:
        with tempfile.TemporaryDirectory() as directory:
            outs = [Path(directory) / str(i) for i in range(args.repeats)]
            runs = [run_train(args, name, out, "--max-steps", "1") for out in outs]
            tree, file = files.load(outs[-1] / "checkpoint.pt"), Path(directory) / "checkpoint.pt"
            saving = interleave({"save": lambda f=file, t=tree: files.save(f, t)}, args.repeats, torch.device("cpu"))
            row = dict(name=name, first_run_seconds=runs[0]["first_step_seconds"])  # it may build the images' cache
            row |= dict(first_step_seconds=statistics.median(run["first_step_seconds"] for run in runs[1:] or runs))
            row |= dict(resident_gib=max(run["resident_gib"] for run in runs), checkpoint_seconds=saving["save"])
            yield row | dict(checkpoint_megabytes=file.stat().st_size / 1e6)


def watch(per_epoch: int, words: list[str]) -> dict:
    """Seconds of train.py's second epoch per 100,000 images, and per cent of a step that images and draws cost.

    For the latter, 50 steps as they are stand beside 50 on one batch that was drawn before.
    """
    Method, begin = METHODS[words[words.index("--method") + 1]], 2 * per_epoch + 10
    draw, update, batch = Method.draw, Meter.update, []
    marks = dict.fromkeys((begin, begin + 50, begin + 60, begin + 110))  # steps, and when they were done

    def drawn(*given):
        if marks[begin + 50] is None:
            batch[:] = [draw(*given)]
        return batch[0]

    def watched(meter, step, *rest):
        update(meter, step, *rest)
        if step in marks:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            marks[step] = time.perf_counter()

    Method.draw, Meter.update, sys.argv = drawn, watched, ["train.py", *words]
    runpy.run_path(str(HERE / "train.py"), run_name="__main__")
    out = Path(words[words.index("--out") + 1])
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()[1:]]
    first, last = (next(row for row in log if row["step"] >= n * per_epoch) for n in (1, 2))
    settings = json.loads((out / "config.json").read_text())["settings"]
    images = (last["step"] - first["step"]) * settings["batch_size"]
    times = list(marks.values())
    waits = 100 * (1 - (times[3] - times[2]) / (times[1] - times[0]))
    return dict(seconds=(last["seconds"] - first["seconds"]) * EPOCH / images, waits=max(0.0, waits))
