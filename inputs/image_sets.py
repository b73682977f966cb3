"""Image sets: the built-in shapes, Tiny-ImageNet, CIFAR, ImageNet or any folder with one folder per class.

`open_set(name, root, split)` gives an `ImageSet`: pixels as uint8 (3, H, W), labels as int64, images in class order.
A small set is decoded once into a cache file and from then on mapped from there, or moved to the GPU as a whole. A
large one stays in its files, and workers read and decode ahead of the training loop. Whatever is found wrong with the
data is an `InputError` of one line.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from inputs import named_sets
from inputs.image_cache import cache_folder, cached
from inputs.image_folders import class_folders
from inputs.images_in_files import Files, cores, decode
from inputs.images_in_memory import Packed
from inputs.once_per_node import in_turn, say
from runtime.errors import InputError

NAMES = ("shapes", "tiny-imagenet", "cifar10", "cifar100", "imagenet")
RESIDENT_LIMIT = 4 << 30  # bytes of pixels above which a folder is streamed


class ImageSet:
    """N images in class order, with labels int64 (N,) and the names of the classes."""

    def __init__(self, name: str, classes: list[str], labels: Tensor, pixels: Packed | Files, skip_bad: bool = False):
        self.name, self.classes, self.labels, self.pixels, self.skip_bad = name, classes, labels, pixels, skip_bad
        self.bad = set()  # positions that a stream found undecodable

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def resident(self) -> bool:
        """Whether the pixels are held in memory, rather than streamed."""
        return isinstance(self.pixels, Packed)

    def to(self, device) -> "ImageSet":
        """Move a resident set; a streamed one stays as it is."""
        if self.resident:
            self.pixels = Packed(self.pixels.flat.to(device), self.pixels.sizes)
        return self

    def subset(self, classes: int) -> "ImageSet":
        """The images of the first `classes` classes."""
        if not 1 <= classes <= len(self.classes):
            raise InputError(f"{self.name}: cannot take {classes} of its classes; give 1 to {len(self.classes)}")
        subset = self.first(int((self.labels < classes).sum()))  # a prefix, as images lie in class order
        subset.classes = self.classes[:classes]
        return subset

    def first(self, n: int) -> "ImageSet":
        """The first `n` images, all of the first class while that has as many."""
        if not 1 <= n <= len(self):
            raise InputError(f"{self.name}: cannot take {n} of its images; give 1 to {len(self)}")
        return ImageSet(self.name, self.classes, self.labels[:n], self.pixels.first(n), self.skip_bad)

    def images(self, index: Tensor, device="cpu") -> Tensor | list[Tensor]:
        """(B,) → uint8 (B, 3, H, W) on the device, or a list of (3, H_i, W_i) if sizes vary or the set is streamed."""
        return next(self.batches([index], device, workers=0))[0]

    def batches(self, orders: Iterable[Tensor], device="cpu", workers: int | None = None):
        """Yield (images, index) for each index tensor of `orders`, in their order; images as from `images`.

        A streamed set reads ahead in `workers` processes, by default one per core of this rank's share. With
        `skip_bad_images`, an image that does not decode is replaced by the next one that does, so that batches keep
        their size; the index that is yielded says what the batch really holds.
        """
        device = torch.device(device)
        if self.resident:
            yield from ((self.pixels.images(index, device), index) for index in orders)
            return
        if workers is None:
            workers = max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        known, images, positions = len(self.bad), [], []
        for chunk, last, flat, sizes, errors in self.pixels.stream(orders, workers, pin=device.type == "cuda"):
            if errors and not self.skip_bad:
                raise InputError(next(iter(errors.values())))
            self.bad.update(errors)
            packed = Packed(flat.to(device, non_blocking=True), sizes)
            for k, i in enumerate(chunk):
                image = packed.view(k)
                if i in errors:
                    i, image = self.pixels.following(i)
                images.append(image.to(device))
                positions.append(i)
            if last:
                yield images, torch.tensor(positions)
                images, positions = [], []
        if len(self.bad) > known:
            say(f"{self.name}: {len(self.bad)} images so far do not decode; others stood in for them")


def open_set(
    name: str,
    root: str | Path | None = None,
    split: str = "train",
    *,
    download: bool = False,
    skip_bad_images: bool = False,
) -> ImageSet:
    """Open one split of an image set.

    name: one of NAMES, or a folder (relative to `root`, if both are given) as `class_folders` describes it.
    root: where the data lie, for tiny-imagenet and cifar by default the cache folder; there `download` puts them.
    split: "train" or "val"; for CIFAR, "val" is its test set.
    skip_bad_images: leave out images that do not decode, and count them in one line, instead of raising InputError.

    ImageNet always streams; another folder does above RESIDENT_LIMIT bytes of pixels, estimated from the image
    headers of a sample. Under torch.distributed every rank has to call this; the first on each node does the work.
    """
    return in_turn(lambda: _open_set(name, None if root is None else Path(root), split, download, skip_bad_images))


def _open_set(name: str, root: Path | None, split: str, download: bool, skip_bad: bool) -> ImageSet:
    if split not in ("train", "val"):
        raise InputError(f"{split}: no such split; there are train and val")
    if name == "shapes":
        return ImageSet(name, *named_sets.shapes(split))
    if name in ("cifar10", "cifar100"):
        return ImageSet(name, *named_sets.cifar(name, root or cache_folder(), split, download))
    if name == "tiny-imagenet":
        root = named_sets.tiny_imagenet_root(root or cache_folder(), download)
        classes, paths = named_sets.tiny_imagenet(root, split)
    elif name == "imagenet" and root is None:
        raise InputError("imagenet: no folder is given; name the one that holds train/ and val/ with --data-root")
    elif name == "imagenet" or ((root or Path()) / name).is_dir():
        root = root if name == "imagenet" else (root or Path()) / name
        classes, paths = class_folders(root, split)
    else:
        raise InputError(f"{name}: neither an image set nor a folder; give one of {', '.join(NAMES)}, or a folder")
    title = name if name in NAMES else root.resolve().name
    files = Files(root, [path for of_class in paths for path in of_class])
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(of_class) for of_class in paths]))
    if name == "imagenet" or files.decoded_bytes() > RESIDENT_LIMIT:
        return ImageSet(title, classes, labels, files, skip_bad)
    made_from = files.fingerprint() + labels.numpy().tobytes()
    pixels, labels, bad = cached(f"{title}-{split}", made_from, lambda: files.decoded(labels, skip_bad))
    if bad and not skip_bad:  # the cache was made while they could be skipped
        decode(root / bad[0])
    if bad:
        say(f"{title}: {len(bad)} images that do not decode are left out, {bad[0]} the first")
    return ImageSet(title, classes, labels, pixels, skip_bad)
