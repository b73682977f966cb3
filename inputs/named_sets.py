"""Sets that have names: the built-in images, CIFAR, and Tiny-ImageNet in its official layout, which is fetched here.

Fetching goes on where it broke off, is verified by a checksum, and unpacks into the set's folder and nowhere else.
"""

import hashlib
import http.client
import os
import shutil
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from inputs import builtin_images
from inputs.image_cache import Packed, cached
from inputs.images_in_files import image_files
from runtime.errors import InputError

TINY_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


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
