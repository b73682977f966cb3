"""Images a second of the input path and of its stages, beside torchvision's image by image."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from common import StepRandom
from inputs import augment, images_in_files, images_in_memory
from reporting.step_speed import build_method
from reporting.timing import interleave


def picture_folder(directory: Path, n: int, size: int) -> list[Path]:
    """n JPEG files in one class folder, of smooth noise."""
    from PIL import Image

    (directory / "class").mkdir()
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(n, 3, 8, 8, generator=generator)
    images = (F.interpolate(small, (size, size), mode="bicubic").clamp(0, 1) * 255).byte().permute(0, 2, 3, 1)
    files = [directory / "class" / f"{i:05}.jpg" for i in range(n)]
    for file, image in zip(files, images, strict=True):
        Image.fromarray(image.numpy()).save(file, quality=90)
    return files


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


def stages(
    args, files: list[Path], packed: images_in_memory.Packed, device: torch.device
) -> dict[str, tuple[Callable, Callable]]:
    """Each stage of an input path on one batch: ours as a call, and torchvision's of one image."""
    from torchvision.datasets.folder import default_loader
    from torchvision.transforms import v2

    B, S = len(files), args.image_size
    images, rng = packed.images(torch.arange(B), device), StepRandom(0, 0, B, None, device)
    views = augment.crop_resize(images, augment.crop_boxes(rng, (S, S)), S)
    pictures = [default_loader(file) for file in files]

    def each(function: Callable) -> Callable:
        return lambda: [function(picture) for picture in pictures]

    return {
        "decode": (lambda: [*map(images_in_files.decode, files)], lambda: [*map(default_loader, files)]),
        "cache": (lambda: packed.images(torch.randperm(B), device), None),
        "crop": (lambda: augment.crop_resize(images, augment.crop_boxes(rng, (S, S)), S),
                 each(v2.RandomResizedCrop(S, (0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC))),
        "colour": (lambda: augment.color_jitter(views, *augment.draw_color_jitter(rng, 0.4, 0.4, 0.4, 0.1)),
                   each(v2.ColorJitter(0.4, 0.4, 0.4, 0.1))),
        "blur": (lambda: augment.gaussian_blur(views, rng.uniform(low=0.1, high=2.0)), each(v2.GaussianBlur(13))),
    }  # fmt: skip


def bench_input(args, device: torch.device) -> list[dict]:
    """Images/s of each stage, then of the whole path of a method's input, as every epoch takes it.

    Ours: from the cache file's memory to `draw`'s batch on the device. Per image: torchvision's ImageFolder, transforms
    and a DataLoader with as many processes as we have threads, from files to a batch on the host. A call is eight
    batches, and leaves no process at work. Stages are one batch and one process, on both sides.
    """
    from torchvision.datasets import ImageFolder

    B, batches, peer = max(args.batch_size), 8, "torchvision" in args.peer
    calls, images = {}, {}  # the latter: images that a call is worth
    with tempfile.TemporaryDirectory() as directory:
        files = picture_folder(Path(directory), B, args.image_size)
        packed = images_in_memory.Packed(*images_in_memory.pack([images_in_files.decode(file) for file in files]))
        packed = images_in_memory.Packed(packed.flat.to(device), packed.sizes)
        for name, (ours, theirs) in stages(args, files, packed, device).items():
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
    rows = []
    for name, n in images.items():
        row = dict(name=name, batch=B, images_per_second=n / seconds[name])
        if (theirs := seconds.get((name, "torchvision"))) is not None:
            row |= dict(torchvision_images_per_second=n / theirs, by_torchvision=theirs / seconds[name])
        rows.append(row)
    return rows
