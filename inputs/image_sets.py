"""Image sets: the built-in shapes, Tiny-ImageNet, CIFAR, ImageNet or any folder with one folder per class.

`open_set(name, root, split)` gives an `ImageSet`: pixels as uint8 (3, H, W), labels as int64, images in class order.
A small set is decoded once into a cache file and from then on mapped from there, or moved to the GPU as a whole. A
large one stays in its files, and workers read and decode ahead of the training loop.

Cache files lie in $MINMIM_CACHE, else in minmim/ in the user's cache folder. A change of any image makes a new cache
file; old ones may be deleted at any time. Whatever is found wrong with the data is an `InputError` of one line.
"""

import contextlib
import hashlib
import json
import os
import signal
import struct
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import common
from common import upload
from inputs import builtin_images
from inputs.download import fetch, unpack
from runtime.errors import InputError

NAMES = ("shapes", "tiny-imagenet", "cifar10", "cifar100", "imagenet")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")  # in either case
TINY_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
RESIDENT_LIMIT = 4 << 30  # bytes of pixels above which a folder is streamed
CHUNK = 32  # images that a worker hands over at once: keeps shared memory small and the first batch soon there
PART = 1 << 26  # bytes of a cache file under one checksum
MAGIC = b"minMIM2\n"  # ends a cache file; the number is the format's version


# ----------------------------------------------------------------------------------------------------------- pixels


def pack(images: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Images (3, H_i, W_i) end to end as one flat uint8 tensor, and their sizes, int64 (B, 2)."""
    return torch.cat([image.reshape(-1) for image in images]), torch.tensor([image.shape[1:] for image in images])


class Packed:
    """Images held in memory: one flat uint8 tensor on any device, and their sizes (N, 2) on the CPU."""

    def __init__(self, flat: Tensor, sizes: Tensor):
        self.flat, self.sizes = flat, sizes
        self.ends = 3 * sizes.prod(dim=1).cumsum(0)  # (N,) where each image ends in `flat`
        self.uniform = bool((sizes == sizes[:1]).all())

    def __len__(self) -> int:
        return len(self.sizes)

    def first(self, n: int) -> "Packed":
        return Packed(self.flat[: 3 * int(self.sizes[:n].prod(dim=1).sum())], self.sizes[:n])

    def view(self, i: int) -> Tensor:
        (h, w), end = self.sizes[i].tolist(), int(self.ends[i])
        return self.flat[end - 3 * h * w : end].view(3, h, w)

    def images(self, index: Tensor, device: torch.device) -> Tensor | list[Tensor]:
        """(B,) → uint8 (B, 3, H, W) if all images of the set have one size, else a list of (3, H_i, W_i)."""
        if self.uniform:
            whole = self.flat.view(-1, 3, *self.sizes[0].tolist())
            rows = upload(index, whole.device)
            return whole.index_select(0, rows).to(device)  # moves rows, where [index] moves numbers
        flat, sizes = pack([self.view(i) for i in index.tolist()])
        batch = Packed(flat.to(device), sizes)  # one transfer
        return [batch.view(i) for i in range(len(batch))]


class Files:
    """Images left in their files, for a `DataLoader` whose workers ask for one chunk of positions at a time."""

    def __init__(self, root: Path, paths: list[str]):
        self.root = root
        self.paths = np.array(paths)  # not a list: its reference counts would be copied into every forked worker

    def __len__(self) -> int:
        return len(self.paths)

    def first(self, n: int) -> "Files":
        return Files(self.root, self.paths[:n])

    def __getitem__(self, chunk: tuple[list[int], bool]):
        """(positions, last) → the same, flat pixels, sizes, and {position: error}; what fails has size 0 × 0."""
        images, errors = [], {}
        for i in chunk[0]:
            try:
                images.append(decode(self.root / self.paths[i]))
            except InputError as error:  # handed over, as a DataLoader would wrap an exception in a traceback
                images.append(torch.empty(3, 0, 0, dtype=torch.uint8))
                errors[i] = str(error)
        return *chunk, *pack(images), errors

    def stream(self, orders: Iterable[Tensor], workers: int, pin: bool = False) -> DataLoader:
        """The images that the index tensors name, in that order, as chunks of `__getitem__`."""
        return DataLoader(
            self,
            sampler=chunks(orders),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            pin_memory=pin,
            worker_init_fn=leave_signals_to_parent,
            generator=torch.Generator(),  # the loader draws a seed that nobody uses; not from the global generator
        )

    def following(self, i: int) -> tuple[int, Tensor]:
        """The next image after i that decodes, and its position."""
        for j in range(i + 1, i + len(self)):
            with contextlib.suppress(InputError):
                return j % len(self), decode(self.root / self.paths[j % len(self)])
        raise InputError(f"{self.root}: no image decodes; give a folder with readable images")


def chunks(orders: Iterable[Tensor]) -> Iterator[tuple[list[int], bool]]:
    """Cut each index tensor into at most CHUNK positions at a time; True marks the last of an index tensor."""
    for index in orders:
        *most, last = index.split(CHUNK)
        yield from ((piece.tolist(), False) for piece in most)
        yield last.tolist(), True


def decode(path: Path) -> Tensor:
    """uint8 RGB (3, H, W) from a file of any mode. 16 bits are scaled to 8, transparency and EXIF rotation ignored.

    By Pillow, as torchvision has announced the end of its own decoders.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip at 255
                grey = torch.from_numpy(np.asarray(image).astype(np.int32)).clamp(0, 65535)
                return (grey // 257).to(torch.uint8).repeat(3, 1, 1)
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except Exception as error:  # Pillow's plugins raise every kind there is, SyntaxError included
        what = f"{path}: does not decode as an image ({type(error).__name__})"
        raise InputError(f"{what}; repair or remove it, or give --skip-bad-images") from error


def leave_signals_to_parent(_worker: int) -> None:
    """Ctrl-C and SIGTERM go to the whole process group, but the parent wants its workers until the step is done.

    So a worker ignores both, save a SIGTERM from its parent, by which Python ends what is left at exit.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # it alone tells who sent a signal; macOS has none
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()


def _obey_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


# -------------------------------------------------------------------------------------------------------- image set


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
        return shape_set(split)
    if name in ("cifar10", "cifar100"):
        return cifar(name, root or cache_folder(), split, download)
    if name == "tiny-imagenet":
        root = tiny_imagenet_root(root or cache_folder(), download)
        classes, paths = tiny_imagenet(root, split)
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
    if name == "imagenet" or decoded_bytes(files) > RESIDENT_LIMIT:
        return ImageSet(title, classes, labels, files, skip_bad)
    made_from = fingerprint(files, labels)
    pixels, labels, bad = cached(f"{title}-{split}", made_from, lambda: decoded(files, labels, skip_bad))
    if bad and not skip_bad:  # the cache was made while they could be skipped
        decode(root / bad[0])
    if bad:
        say(f"{title}: {len(bad)} images that do not decode are left out, {bad[0]} the first")
    return ImageSet(title, classes, labels, pixels, skip_bad)


def decoded_bytes(files: Files, sample: int = 128) -> float:
    """What all the images would take as uint8 RGB, from the headers of an even sample."""
    areas = []
    for i in np.linspace(0, len(files) - 1, min(sample, len(files))).astype(int):
        with contextlib.suppress(Exception), Image.open(files.root / files.paths[i]) as image:  # decoding will tell
            areas.append(image.width * image.height)
    return 3 * len(files) * float(np.mean(areas or 0))


# ----------------------------------------------------------------------------------------- folders and official sets


def class_folders(root: Path, split: str) -> tuple[list[str], list[list[str]]]:
    """Class names, sorted, and the images of each as sorted paths relative to `root`.

    Either train/ and val/ hold the same class folders, or there is no val/: then the class folders lie in train/ or
    in `root` itself, and the second of every ten images of a class (by sorted path) is held out as "val"; "train" is
    the rest.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give one that holds a folder of images for each class")
    train, val = root / "train", root / "val"
    if subfolders(val) and not subfolders(train):
        raise InputError(f"{root}: val/ holds class folders but train/ does not; both need the same")
    base = train if subfolders(train) else root  # a class may be called "train"
    classes = subfolders(base)
    if not classes:
        raise InputError(f"{root}: holds no class folders; give a folder that holds a folder of images for each class")
    if base == train and val.is_dir():
        here, there = set(classes), set(subfolders(val))
        if here != there:
            only = [", ".join(sorted(a - b)[:3]) or "none" for a, b in ((here, there), (there, here))]
            raise InputError(f"{root}: class folders differ, only in train/: {only[0]}, only in val/: {only[1]}")
        return classes, [image_files(root, root / split / name) for name in classes]
    paths = [image_files(root, base / name) for name in classes]
    paths = [[p for i, p in enumerate(of_class) if (i % 10 == 1) == (split == "val")] for of_class in paths]
    if not any(paths):
        raise InputError(f"{root}: one image per class leaves none to hold out; add images, or a folder val/")
    return classes, paths


def subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def image_files(root: Path, folder: Path) -> list[str]:
    """Sorted paths, relative to `root`, of all images below `folder`; hidden files are passed over."""
    paths = []
    for base, _, names in os.walk(folder, followlinks=True):
        inside = os.path.relpath(base, root)  # once a folder: a million images wait for each step here
        paths += [f"{inside}/{name}" for name in names if name.lower().endswith(EXTENSIONS) and name[0] != "."]
    if not paths:
        raise InputError(f"{folder}: holds no images ({' '.join(EXTENSIONS)}); add some, or remove the folder")
    return sorted(paths)


def tiny_imagenet_root(root: Path, download: bool) -> Path:
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
    if split == "train":
        paths = [image_files(root, root / "train" / wnid) for wnid in wnids]
    else:
        annotations = root / "val" / "val_annotations.txt"
        if not annotations.is_file():
            raise InputError(f"{annotations}: is missing; unpack the official archive again, or give --download")
        rows = [line.split("\t") for line in annotations.read_text().splitlines()]  # file, wnid, box
        present = set(image_files(root, root / "val" / "images"))
        of_class = {wnid: [] for wnid in wnids}
        for image, wnid, *_ in rows:
            if wnid not in of_class:
                raise InputError(
                    f"{annotations}: class {wnid} of {image} is not in wnids.txt; train and val must agree"
                )
            if (path := f"val/images/{image}") not in present:
                raise InputError(f"{root}/{path}: is missing; unpack the official archive again")
            of_class[wnid].append(path)
        paths = [sorted(of_class[wnid]) for wnid in wnids]
    return [names.get(wnid, wnid) for wnid in wnids], paths


def in_class_order(images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 (N, 3, H, W) and labels (N,) → flat pixels, sizes and labels."""
    order = np.argsort(labels, kind="stable")
    flat = torch.from_numpy(images[order].reshape(-1))
    return flat, torch.tensor(images.shape[2:]).expand(len(images), 2), torch.from_numpy(labels[order])


def shape_set(split: str) -> ImageSet:
    source = Path(builtin_images.__file__).read_bytes() + np.__version__.encode()
    pixels, labels, _ = cached(
        f"shapes-{split}", source, lambda: [(*in_class_order(*builtin_images.generate(split)), [])]
    )
    return ImageSet("shapes", list(builtin_images.CLASSES), labels, pixels)


def cifar(name: str, root: Path, split: str, download: bool) -> ImageSet:
    from torchvision.datasets import CIFAR10, CIFAR100  # a third of a second that other sets need not wait

    try:
        source = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name](root, train=split == "train", download=download)
    except (RuntimeError, OSError) as error:  # the first is torchvision's word for missing and for damaged
        what = f"{name} cannot be fetched ({error}); try again" if download else f"{name} is missing or damaged"
        raise InputError(f"{root}: {what}; --download fetches it") from error
    images = source.data.transpose(0, 3, 1, 2)
    flat, sizes, labels = in_class_order(images, np.array(source.targets, dtype=np.int64))
    return ImageSet(name, source.classes, labels, Packed(flat, sizes))


# ----------------------------------------------------------------------------------------------- cache of small sets

TAIL = struct.Struct("<QI8s")  # length and CRC-32 of the index, MAGIC


def cache_folder() -> Path:
    if folder := os.environ.get("MINMIM_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minmim"


def fingerprint(files: Files, labels: Tensor) -> bytes:
    """What a cache of these files is made from: paths, sizes in bytes, times of change, labels."""
    lines = []
    try:
        for path in files.paths.tolist():
            s = os.stat(f"{files.root}/{path}")  # pathlib would take three times as long
            lines.append(f"{path}\0{s.st_size}\0{s.st_mtime_ns}\0")
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror}); repair or remove it") from error
    return os.fsencode("".join(lines)) + labels.numpy().tobytes()


def cached(stem: str, made_from: bytes, chunks: Callable[[], Iterable]) -> tuple[Packed, Tensor, list[str]]:
    """Pixels, labels and names of bad images, from the cache file if it is there and sound, else from `chunks()`."""
    key = hashlib.sha256(MAGIC + made_from).hexdigest()
    path = cache_folder() / f"{stem}-{key[:16]}.cache"
    if path.exists():
        try:
            return read_cache(path, key)
        except ValueError as damage:
            say(f"{path}: the cache is damaged ({damage}); making it again")
    try:
        write_cache(path, key, chunks())
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); make room, or set MINMIM_CACHE") from error
    return read_cache(path, key)


def write_cache(path: Path, key: str, chunks: Iterable[tuple[Tensor, Tensor, Tensor, list[str]]]) -> None:
    """The pixels of all chunks, then height, width and label of each image, an index in JSON, its length and checksum.

    A chunk is flat pixels, sizes (b, 2), labels (b,), and the names of images left out. The file takes its name only
    when it is whole and on disk.
    """
    numbers, bad, crcs, size = [], [], [], 0

    def write(array: np.ndarray) -> None:  # checksums of what was meant, not of what the disk made of it
        nonlocal size
        rest = memoryview(array.tobytes())
        file.write(rest)
        while rest:
            if size % PART == 0:
                crcs.append(0)
            now = rest[: PART - size % PART]
            crcs[-1] = zlib.crc32(now, crcs[-1])
            size, rest = size + len(now), rest[len(now) :]

    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    try:
        with open(descriptor, "wb") as file:
            for flat, chunk_sizes, chunk_labels, chunk_bad in chunks:
                write(flat.numpy())
                numbers.append(torch.cat([chunk_sizes, chunk_labels[:, None]], dim=1))
                bad += chunk_bad
            if not sum(map(len, numbers)):
                raise InputError(f"{bad[0]}: does not decode, nor does any other image; give a folder of images")
            table = torch.cat(numbers).numpy()  # int64 (N, 3); as JSON it would take longer to read than all to check
            write(table)
            index = json.dumps(dict(key=key, crc32=crcs, images=len(table), bad=bad)).encode()
            file.write(index + TAIL.pack(len(index), zlib.crc32(index), MAGIC))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_cache(path: Path, key: str) -> tuple[Packed, Tensor, list[str]]:
    """Map the pixels of a cache file, after checking every byte; raise ValueError if it is not what was written."""
    with open(path, "rb") as file:
        end = path.stat().st_size - TAIL.size
        if end < 0:
            raise ValueError("it is too short")
        file.seek(end)
        length, checksum, magic = TAIL.unpack(file.read())
        file.seek(max(0, end - length))
        if magic != MAGIC or length > end or zlib.crc32(index := file.read(length)) != checksum:
            raise ValueError("its end is not that of a cache")
        index = json.loads(index)
        if index["key"] != key:
            raise ValueError("it belongs to other images")
        total = end - length
        if checksums(path, total) != index["crc32"]:
            raise ValueError("its checksum differs")
        n = index["images"]
        file.seek(total - 3 * 8 * n)
        table = torch.from_numpy(np.fromfile(file, np.int64, 3 * n).reshape(n, 3))
    sizes, labels = table[:, :2], table[:, 2].clone()
    if 3 * int(sizes.prod(dim=1).sum()) != total - 3 * 8 * n:
        raise ValueError("its sizes are not those of its pixels")
    flat = np.memmap(path, np.uint8, mode="c", shape=(total - 3 * 8 * n,))  # "c": writable, never written back
    return Packed(torch.from_numpy(flat), sizes), labels, index["bad"]


def checksums(path: str | Path, total: int) -> list[int]:
    """CRC-32 of each PART of a file's first `total` bytes, by all cores, though at most eight."""

    def of_part(start: int) -> int:  # by reading: checking the mapped pages would make them all resident
        checksum, end, piece = 0, min(total, start + PART), memoryview(bytearray(1 << 20))
        with open(path, "rb") as file:
            file.seek(start)
            for at in range(start, end, len(piece)):
                checksum = zlib.crc32(piece[: file.readinto(piece[: end - at])], checksum)
        return checksum

    with ThreadPoolExecutor(min(8, cores())) as pool:  # reading and zlib leave Python free
        return list(pool.map(of_part, range(0, total, PART)))


def decoded(files: Files, labels: Tensor, skip_bad: bool) -> Iterator[tuple[Tensor, Tensor, Tensor, list[str]]]:
    """The chunks of `write_cache`, decoded by all cores."""
    workers = min(cores(), len(files) // 256)  # a few hundred images are done before a process is up
    with tqdm(total=len(files), desc="decoding", unit=" images") as bar:
        for chunk, _, flat, sizes, errors in files.stream([torch.arange(len(files))], workers):
            if errors and not skip_bad:
                raise InputError(next(iter(errors.values())))
            good = sizes[:, 0] > 0
            yield flat, sizes[good], labels[chunk][good], [str(files.paths[i]) for i in errors]
            bar.update(len(chunk))


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# ------------------------------------------------------------------------------------------------------------ ranks


def first_on_node() -> bool:
    return int(os.environ.get("LOCAL_RANK", common.rank())) == 0


def say(line: str) -> None:
    if first_on_node():
        tqdm.write(line, file=sys.stderr)


def in_turn(work: Callable):
    """work() on rank 0, then on the first rank of each other node, then on all others, who find the work done.

    Nodes may or may not share their disks. An error ends it on every rank, with the same line.
    """
    if common.world_size() == 1:
        return work()
    # A group of its own, as downloading and decoding may outlast the default group's time limit. It stays until the
    # program ends: torch 2.6 may hang where a group goes whose thread is not yet done with the last collective.
    group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    my_turn = 0 if common.rank() == 0 else 1 if first_on_node() else 2
    for turn in range(3):
        error = None
        if turn == my_turn:
            try:
                result = work()
            except Exception as e:
                error = e
        errors = [None] * common.world_size()
        dist.all_gather_object(errors, error and (str(error) or repr(error)), group=group)
        if any(errors):
            raise error or InputError(next(filter(None, errors)))
    return result
