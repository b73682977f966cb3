"""Image sets: the built-in images, Tiny-ImageNet, CIFAR, ImageNet, any folder of images, any set of the hub's kind.

`open_set(name, root, split)` gives an `ImageSet`: pixels as uint8 (3, H, W), labels as int64, images in class order.
A small set is decoded once into a cache file and from then on mapped from there, or moved to the GPU as a whole. A
large one stays in its files, and workers read and decode ahead of the training loop. Whatever is found wrong with the
data is an `InputError` of one line. Tiny-ImageNet is fetched here: a transfer goes on where it broke off, is verified
by a checksum, and is unpacked into the set's folder and nowhere else.
"""

import hashlib
import http.client
import itertools
import math
import os
import shutil
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from inputs import builtin_images, huggingface_sets, inaturalist
from inputs.image_cache import Packed, cache_folder, cached, cores, in_turn, remembered
from inputs.image_files import Files, class_folders, image_files
from runtime.errors import InputError
from runtime.ranks import say, say_once

NAMES = ("shapes", "tiny-imagenet", "cifar10", "cifar100", "imagenet", "inaturalist")
OPTIONS = ("download", "skip_bad_images", "class_level", "columns")
TINY_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
RESIDENT_LIMIT = 4 << 30  # bytes of pixels above which a folder is streamed


class ImageSet:
    """N images in class order, with labels int64 (N,) and the names of the classes; none if there are no labels."""

    def __init__(self, name: str, classes: list[str], labels: Tensor, pixels: Packed | Files, skip_bad: bool = False):
        self.name, self.classes, self._labels, self.pixels, self.skip_bad = name, classes, labels, pixels, skip_bad
        self.resident = isinstance(pixels, Packed)  # held in memory, rather than streamed
        self.bad = set()  # positions that a stream found undecodable

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def labels(self) -> Tensor:
        """The class of each image, int64 (N,); an InputError if the images have none."""
        if self.classes:
            return self._labels
        what = "sort them into a folder for each class, or give --columns of hf: sets"
        raise InputError(f"{self.name}: its images have no labels, which a measure of an encoder needs; {what}")

    def to(self, device) -> "ImageSet":
        """Move a resident set; a streamed one stays as it is."""
        if self.resident:
            self.pixels = Packed(self.pixels.flat.to(device), self.pixels.sizes)
        return self

    def subset(self, classes: int) -> "ImageSet":
        """The images of the first `classes` classes."""
        n = int((self.labels < classes).sum())  # a prefix, as images lie in class order
        if not 1 <= classes <= len(self.classes):
            raise InputError(f"{self.name}: cannot take {classes} of its classes; give 1 to {len(self.classes)}")
        subset = self.first(n)
        subset.classes = self.classes[:classes]
        return subset

    def first(self, n: int) -> "ImageSet":
        """The first `n` images, all of the first class while that has as many."""
        if not 1 <= n <= len(self):
            raise InputError(f"{self.name}: cannot take {n} of its images; give 1 to {len(self)}")
        return ImageSet(self.name, self.classes, self._labels[:n], self.pixels.first(n), self.skip_bad)

    def spaced(self, n: int) -> "ImageSet":
        """`n` images, evenly spaced and so of all classes, or all if there are fewer."""
        index = torch.linspace(0, len(self) - 1, min(n, len(self))).long()
        return ImageSet(self.name, self.classes, self._labels[index], self.pixels.at(index), self.skip_bad)

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
        try:
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
        finally:  # training takes as many as it has steps, and never asks for the end
            if len(self.bad) > known:
                say(f"{self.name}: {len(self.bad)} images so far do not decode; others stood in for them")


def open_for(settings, split: str) -> ImageSet:
    """The split of the set that a command's settings name, cut to the classes that they ask for."""
    given = vars(settings)
    options = {name: given[name] for name in OPTIONS if given.get(name) is not None}
    options |= dict(value_range=given.get("range"), splits=given.get("split") or ())
    image_set = open_set(settings.data, given.get("data_root"), split, **options)
    return image_set.subset(settings.classes) if given.get("classes") else image_set


def open_set(
    name: str, root=None, split="train", *, download=False, skip_bad_images=False, class_level=1, value_range=None,
    splits=(), columns=(),
) -> ImageSet:  # fmt: skip
    """Open one split of an image set.

    name: one of NAMES, a folder (relative to `root`, if both are given) as `class_folders` describes it, or what
        `huggingface_sets.find` takes.
    root: where the data lie, for tiny-imagenet and cifar by default the cache folder; there `download` puts them.
    split: "train" or "val"; for CIFAR, "val" is its test set.
    skip_bad_images: leave out images that do not decode, and count them in one line, instead of raising InputError.
    class_level: which level of nested folders the classes are; by default 1, the folders at the top; 0: no classes.
    value_range: what becomes black and white in greys of more than 8 bits, by default the lowest and the highest value
        in the training images, which are looked for once.
    splits, columns: of an hf: set, as `huggingface_sets.find` takes them.

    ImageNet always streams; another folder does above RESIDENT_LIMIT bytes of pixels, estimated from the image
    headers of a sample. Under torch.distributed every rank has to call this; the first on each node does the work.
    """
    if split not in ("train", "val"):
        raise InputError(f"{split}: no such split; there are train and val")
    if value_range and not -math.inf < value_range[0] < value_range[1] < math.inf:
        raise InputError(f"range {value_range[0]:g} {value_range[1]:g}: the first must be below the second")
    if (splits or columns) and not name.startswith(huggingface_sets.PREFIX):
        raise InputError(f"{name}: has no splits or columns to choose; leave out --{'split' if splits else 'columns'}")
    root = None if root is None else Path(root)

    def work() -> ImageSet:
        if name == "shapes":
            return ImageSet(name, *shapes(split))
        if name in ("cifar10", "cifar100"):
            return ImageSet(name, *cifar(name, root or cache_folder(), split, download))
        if name.startswith(huggingface_sets.PREFIX):
            title, find = name, partial(huggingface_sets.find, name, root, splits, columns)
        else:
            folder, listed = find_files(name, root, download, class_level)
            title, find = name if name in NAMES else folder.resolve().name, partial(in_files, folder, listed)
        return open_files(title, find, split, skip_bad_images, value_range)

    return in_turn(work)


def find_files(name: str, root: Path | None, download: bool, class_level: int):
    """The folder of a set's files, and the function (folder, split) → names of classes, paths of each class."""
    if name == "tiny-imagenet":
        return tiny_imagenet_root(root or cache_folder(), download), tiny_imagenet
    if name in ("imagenet", "inaturalist") and root is None:
        what = "train/ and val/" if name == "imagenet" else "the lists of a year"
        raise InputError(f"{name}: no folder is given; name the one that holds {what} with --data-root")
    if name == "inaturalist":
        return root, inaturalist.class_lists
    if name != "imagenet":
        root = (root or Path()) / name
        if not root.is_dir():
            raise InputError(f"{name}: neither an image set nor a folder; give one of {', '.join(NAMES)}, or a folder")
    return root, partial(class_folders, level=class_level)


def in_files(root: Path, listed, split: str) -> tuple[list[str], Files, list[int]]:
    """Names of classes, the images of all in their order, and how many each has, as `listed(root, split)` says."""
    classes, paths = listed(root, split)
    return classes, Files(root, list(itertools.chain(*paths))), list(map(len, paths))


def open_files(title: str, find, split: str, skip_bad: bool, value_range) -> ImageSet:
    """A set that is decoded here, for `open_set`: `find` gives for a split what `in_files` does."""
    classes, files, counts = find(split)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    files.value_range = value_range and tuple(value_range)
    stem = Path(title).name
    size, deep = (math.inf, False) if title == "imagenet" else files.survey()
    if deep and not value_range:
        train = files if split == "train" else find("train")[1]
        low, high = files.value_range = tuple(remembered(f"{stem}-range", train.fingerprint(), train.extremes))
        say_once(f"{title}: greys from {low:g}, which becomes black, to {high:g}; --range sets others")
    if size > RESIDENT_LIMIT:
        return ImageSet(title, classes, labels, files, skip_bad)
    made_from = files.fingerprint() + labels.numpy().tobytes()
    made_from += repr(files.value_range).encode() if files.value_range else b""
    pixels, labels, bad = cached(f"{stem}-{split}", made_from, lambda: files.decoded(labels, skip_bad))
    if bad and not skip_bad:  # the cache was made while they could be skipped
        files.decode([files.name(i) for i in range(len(files))].index(bad[0]))
    if bad:
        say_once(f"{title}: {len(bad)} images that do not decode are left out, {bad[0]} the first")
    return ImageSet(title, classes, labels, pixels, skip_bad)


def shapes(split: str) -> tuple[list[str], Tensor, Packed]:
    """The built-in images: names of classes, labels, pixels. They are painted once and then come from the cache."""
    source = Path(builtin_images.__file__).read_bytes() + np.__version__.encode()
    pixels, labels, _ = cached(
        f"shapes-{split}", source, lambda: [(*in_class_order(*builtin_images.generate(split)), [])]
    )
    return list(builtin_images.CLASSES), labels, pixels


def cifar(name: str, root: Path, split: str, download: bool) -> tuple[list[str], Tensor, Packed]:
    """cifar10 or cifar100: names of classes, labels, pixels."""
    from torchvision.datasets import CIFAR10, CIFAR100  # a third of a second that other sets need not wait

    try:
        source = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name](root, train=split == "train", download=download)
    except (RuntimeError, OSError) as error:  # the first is torchvision's word for missing and for damaged
        what = f"{name} cannot be fetched ({error}); try again" if download else f"{name} is missing or damaged"
        raise InputError(f"{root}: {what}; --download fetches it") from error
    flat, sizes, labels = in_class_order(source.data.transpose(0, 3, 1, 2), np.array(source.targets, dtype=np.int64))
    return source.classes, labels, Packed(flat, sizes)


def in_class_order(images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 (N, 3, H, W) and labels (N,) → flat pixels, sizes and labels."""
    order = np.argsort(labels, kind="stable")
    flat = torch.from_numpy(images[order].reshape(-1))
    return flat, torch.tensor(images.shape[2:]).expand(len(images), 2), torch.from_numpy(labels[order])


def tiny_imagenet_root(root: Path, download: bool) -> Path:
    """`root` or the tiny-imagenet-200/ in it, which `download` puts there."""
    inside = root / "tiny-imagenet-200"
    for folder in (root, inside):
        if (folder / "wnids.txt").is_file():
            return folder
    if not download:
        raise InputError(f"{root}: no tiny-imagenet-200/ there; name its folder with --data-root, or give --download")
    archive = root / "tiny-imagenet-200.zip"
    fetch(TINY_URL, archive, TINY_MD5)
    unpack(archive, inside)
    archive.unlink()
    return inside


def tiny_imagenet(root: Path, split: str) -> tuple[list[str], list[list[str]]]:
    """As `class_folders`, for the official layout; classes in the order of wnids.txt, named as in words.txt."""
    wnids = (root / "wnids.txt").read_text().split()
    words = root / "words.txt"
    names = dict(line.split("\t", 1) for line in words.read_text().splitlines()) if words.is_file() else {}
    names = [names.get(wnid, wnid) for wnid in wnids]
    if split == "train":
        return names, [image_files(root, root / "train" / wnid) for wnid in wnids]
    annotations = root / "val" / "val_annotations.txt"
    if not annotations.is_file():
        raise InputError(f"{annotations}: is missing; unpack the official archive again, or give --download")
    present, of_class = set(image_files(root, root / "val" / "images")), {wnid: [] for wnid in wnids}
    for image, wnid, *_box in (line.split("\t") for line in annotations.read_text().splitlines()):
        if wnid not in of_class:
            raise InputError(f"{annotations}: class {wnid} of {image} is not in wnids.txt; train and val must agree")
        if (path := f"val/images/{image}") not in present:
            raise InputError(f"{root}/{path}: is missing; unpack the official archive again")
        of_class[wnid].append(path)
    return names, [sorted(paths) for paths in of_class.values()]


def fetch(url: str, path: Path, md5: str, tries: int = 5) -> None:
    """Download `url` to `path`, going on with what a broken transfer left in `path`.part, and verify the checksum."""
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    reason = "the transfer breaks off"
    for _ in range(tries):
        try:
            if fetch_rest(url, part):
                break
        except (OSError, http.client.HTTPException) as error:  # OSError covers urllib's and the disk's
            reason = error
    else:
        raise InputError(f"{url}: download failed ({reason}); the same command goes on where it stopped")
    digest = hashlib.md5(part.read_bytes(), usedforsecurity=False).hexdigest()
    if digest != md5:
        part.unlink()
        raise InputError(f"{url}: md5 is {digest}, should be {md5}; removed, try again later")
    os.replace(part, path)


def fetch_rest(url: str, part: Path) -> bool:
    """Append to `part` what is missing; False if the transfer ended too early."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left to send
            return True
        raise
    if response.status != 206:  # the server sends the whole file
        have = 0
    length = response.headers["Content-Length"]
    total = have + int(length) if length else None
    with (
        response,
        open(part, "ab" if have else "wb") as file,
        tqdm.wrapattr(file, "write", total, initial=have, desc="downloading") as shown,
    ):
        shutil.copyfileobj(response, shown)
    return total in (None, part.stat().st_size)


def unpack(archive: Path, target: Path) -> None:
    """Unpack a zip that holds the folder `target`.name next to it: into a temporary folder first, then renamed."""
    try:
        with zipfile.ZipFile(archive) as source, tempfile.TemporaryDirectory(dir=target.parent) as folder:
            for member in tqdm(source.infolist(), desc="unpacking", unit=" files"):
                source.extract(member, folder)  # which makes no links and leaves out any ".."
            os.replace(Path(folder, target.name), target)
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f"{archive}: cannot be unpacked ({error}); remove it and download again") from error
