"""Images in files: which ones a folder holds for which class, decoding one, and decoding many by worker processes."""

import contextlib
import copy
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from inputs.image_cache import cores, pack
from runtime.errors import InputError
from runtime.ranks import say_once

# In either case. Of an animation the first frame is taken. What Pillow reads by other programs is left alone (.eps).
EXTENSIONS = tuple(".jpg .jpeg .png .ppm .bmp .pgm .tif .tiff .webp .gif".split())
CHUNK = 32  # images that a worker hands over at once: keeps shared memory small and the first batch soon there


def decode(source, value_range: tuple[float, float] | None = None, name: str | None = None) -> Tensor:
    """uint8 RGB (3, H, W) from a path or an open file, of any mode; transparency and EXIF rotation are ignored.

    Of greys with more than 8 bits, `value_range` becomes 0 … 255; without one, 16 bits do, and floats stay as they are.
    `name` stands in messages. Pillow decodes, as torchvision has announced the end of its own decoders.
    """
    try:
        with Image.open(source) as image:
            if is_deep(image):  # Pillow's own conversion would clip at 255
                grey = torch.from_numpy(np.nan_to_num(np.asarray(image).astype(np.float64)))
                low, high = value_range or ((0, 255) if image.mode == "F" else (0, 65535))
                return ((grey - low) * 255 / (high - low)).clamp(0, 255).to(torch.uint8).repeat(3, 1, 1)
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except Exception as error:  # Pillow's plugins raise every kind there is, SyntaxError included
        what = f"{name or source}: does not decode as an image ({type(error).__name__})"
        raise InputError(f"{what}; repair or remove it (train.py, evaluate.py: or --skip-bad-images)") from error


def is_deep(image: Image.Image) -> bool:
    """Whether a picture's one channel has more than 8 bits: 16 or 32, integers or floats."""
    return image.mode.startswith(("I", "F"))


class Files:
    """The images at `paths` below `root`, for a `DataLoader` whose workers ask for one chunk of positions at a time.

    `huggingface_sets.Rows` has other places that images lie at: `source`, `name` and `fingerprint` are of files alone.
    """

    def __init__(self, root: Path, paths: list[str], value_range: tuple[float, float] | None = None):
        self.root, self.value_range = root, value_range
        self.paths = np.array(paths)  # not a list: its reference counts would be copied into every forked worker

    def __len__(self) -> int:
        return len(self.paths)

    def first(self, n: int) -> "Files":
        return self.at(slice(n))

    def at(self, index: slice | Tensor) -> "Files":
        fewer = copy.copy(self)
        fewer.paths = self.paths[index]
        return fewer

    def source(self, i: int):
        """What Pillow opens."""
        return self.root / self.paths[i]

    def name(self, i: int) -> str:
        return str(self.paths[i])

    def decode(self, i: int) -> Tensor:
        return decode(self.source(i), self.value_range, f"{self.root}/{self.name(i)}")

    def __getitem__(self, chunk: tuple[list[int], bool]):
        """(positions, last) → the same, flat pixels, sizes, and {position: error}; what fails has size 0 × 0."""
        images, errors = [], {}
        for i in chunk[0]:
            try:
                images.append(self.decode(i))
            except InputError as error:  # handed over, as a DataLoader would wrap an exception in a traceback
                images.append(torch.empty(3, 0, 0, dtype=torch.uint8))
                errors[i] = str(error)
        return *chunk, *pack(images), errors

    def stream(self, orders: Iterable[Tensor], workers: int, pin: bool = False) -> DataLoader:
        """The images that the index tensors name, in that order, as chunks of `__getitem__`."""
        # The loader draws a seed that nobody uses: from a generator of its own, not from the global one.
        return DataLoader(
            self, None, sampler=chunks(orders), num_workers=workers, prefetch_factor=4 if workers else None,
            pin_memory=pin, worker_init_fn=leave_signals_to_parent, generator=torch.Generator(),
        )  # fmt: skip

    def decoded(self, labels: Tensor, skip_bad: bool) -> Iterator[tuple[Tensor, Tensor, Tensor, list[str]]]:
        """All images, decoded by all cores, as the chunks of `image_cache.write_cache`."""
        workers = min(cores(), len(self) // 256)  # a few hundred images are done before a process is up
        with tqdm(total=len(self), desc="decoding", unit=" images") as bar:
            for chunk, _, flat, sizes, errors in self.stream([torch.arange(len(self))], workers):
                if errors and not skip_bad:
                    raise InputError(next(iter(errors.values())))
                good = sizes[:, 0] > 0
                yield flat, sizes[good], labels[chunk][good], [self.name(i) for i in errors]
                bar.update(len(chunk))

    def following(self, i: int) -> tuple[int, Tensor]:
        """The next image after i that decodes, and its position."""
        for j in range(i + 1, i + len(self)):
            with contextlib.suppress(InputError):
                return j % len(self), self.decode(j % len(self))
        raise InputError(f"{self.root}: no image decodes; give a folder with readable images")

    def survey(self, sample: int = 128) -> tuple[float, bool]:
        """From the headers of an even sample: bytes of all images as uint8 RGB, and whether there are deep greys."""
        areas, deep = [], False
        for i in np.linspace(0, len(self) - 1, min(sample, len(self))).astype(int):
            with contextlib.suppress(Exception), Image.open(self.source(i)) as image:  # decoding will tell
                areas.append(image.width * image.height)
                deep |= is_deep(image)
        return 3 * len(self) * float(np.mean(areas or 0)), deep

    def extremes(self) -> list[float]:
        """The lowest and the highest value of all deep greys; those of 16 bits, if there are none."""

        def of_one(i: int) -> list[float]:
            with contextlib.suppress(Exception), Image.open(self.source(i)) as image:
                values = np.asarray(image) if is_deep(image) else np.empty(0)
                values = values[np.isfinite(values)]
                return [float(values.min()), float(values.max())] if values.size else []
            return []

        with ThreadPoolExecutor(cores()) as pool:
            bar = tqdm(pool.map(of_one, range(len(self))), "finding the range of values", len(self), unit=" images")
            found = [value for pair in bar for value in pair] or [0.0, 65535.0]
        return [min(found), max(max(found), min(found) + 1)]

    def fingerprint(self) -> bytes:
        """What changes when any file does: paths, sizes in bytes, times of change."""
        paths = self.paths.tolist()
        try:
            stats = [os.stat(f"{self.root}/{path}") for path in paths]  # pathlib would take three times as long
        except OSError as error:
            raise InputError(f"{error.filename}: cannot be read ({error.strerror}); repair or remove it") from error
        found = (f"{path}\0{s.st_size}\0{s.st_mtime_ns}\0" for path, s in zip(paths, stats, strict=True))
        return os.fsencode("".join(found))


def chunks(orders: Iterable[Tensor]) -> Iterator[tuple[list[int], bool]]:
    """Cut each index tensor into at most CHUNK positions at a time; True marks the last of an index tensor."""
    for index in orders:
        *most, last = index.split(CHUNK)
        yield from ((piece.tolist(), False) for piece in most)
        yield last.tolist(), True


def leave_signals_to_parent(_worker: int) -> None:
    """Ctrl-C and SIGTERM go to the whole process group, but the parent wants its workers until the step is done.

    So a worker ignores both, save a SIGTERM from its parent, by which Python ends what is left at exit.
    """

    def obey(parent: int) -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # it alone tells who sent a signal; macOS has none
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=obey, args=(multiprocessing.parent_process().pid,), daemon=True).start()


def class_folders(root: Path, split: str, level: int = 1) -> tuple[list[str], list[list[str]]]:
    """Class names, sorted, and the images of each as sorted paths relative to `root`.

    Either train/ and val/ hold the same class folders, or there is no val/: then the class folders lie in train/ or
    in `root` itself, and the second of every ten images of a class (by sorted path) is held out as "val"; "train" is
    the rest. Where folders lie in folders, those at `level` are the classes. Where there are none, or at level 0, the
    images have no labels: no class names, and one list with every image below train/ and val/, or below `root`.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give one that holds images, or a folder of images for each class")
    train, val = root / "train", root / "val"
    if level and subfolders(val) and not subfolders(train):
        raise InputError(f"{root}: val/ holds class folders but train/ does not; both need the same")
    base = train if subfolders(train) else root  # a class may be called "train"
    if level == 0 or (base == root and set(subfolders(root)) <= {"train", "val", "test"}):
        if level > 1:
            raise InputError(f"{root}: holds no class folders; leave out --class-level")
        if train.is_dir() and val.is_dir():
            return [], [image_files(root, root / split)]
        return [], held_out(root, [image_files(root, train if train.is_dir() else root)], split)
    classes = folders_at(base, level, aloud=split == "train")
    if base == root or not val.is_dir():
        paths = held_out(root, [image_files(root, base / name) for name in classes], split)
    elif subfolders(val):
        if (here := set(classes)) != (there := set(folders_at(val, level))):
            only = [", ".join(sorted(names)[:3]) or "none" for names in (here - there, there - here)]
            raise InputError(f"{root}: class folders differ, only in train/: {only[0]}, only in val/: {only[1]}")
        paths = [image_files(root, root / split / name) for name in classes]
    else:
        paths = flat_val(root, classes)  # for both splits, so that what is wrong with it shows at once
        paths = paths if split == "val" else [image_files(root, train / name) for name in classes]
    below = {path.rpartition("/")[0] for of_class in paths for path in of_class[:1] + of_class[-1:]}
    if split == "train" and level == 1 and len(below) > len(classes):
        some = ", ".join(classes[:3]) + (", …" if len(classes) > 3 else "")
        what = f"the {len(classes)} folders at the top ({some}) became the classes, though they hold folders"
        say_once(f"{root}: {what}; --class-level 2 takes those")
    return classes, paths


def held_out(root: Path, paths: list[list[str]], split: str) -> list[list[str]]:
    """Of every ten images of each list the second as "val", the rest as "train"."""
    paths = [[p for i, p in enumerate(of_class) if (i % 10 == 1) == (split == "val")] for of_class in paths]
    if not any(paths):
        raise InputError(
            f"{root}: one image, or one per class, leaves none to hold out; add images, or a set for validation"
        )
    return paths


def subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def folders_at(base: Path, level: int, aloud: bool = False) -> list[str]:
    """The folders `level` steps below `base`, by their paths from there; `aloud` says how many images lie above."""
    if level < 1:
        raise InputError(f"class level {level}: must be 0, for no classes, or from 1 on, the folders at the top")
    folders, loose = [""], 0
    for depth in range(level):
        if aloud:
            loose += sum(is_image(entry.name) for folder in folders for entry in os.scandir(base / folder))
        folders = [os.path.join(folder, name) for folder in folders for name in subfolders(base / folder)]
        if not folders:
            raise InputError(f"{base}: holds no folders at level {depth + 1}; give a --class-level up to {depth}")
    if loose:
        what = f"{loose} images that lie beside or above the class folders have no label and are left out"
        say_once(f"{base}: {what}; --class-level 0 takes all images, without labels")
    return sorted(folders)


def is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and name[0] != "."


def image_files(root: Path, folder: Path) -> list[str]:
    """Sorted paths, relative to `root`, of all images below `folder`; hidden files are passed over."""
    paths = []
    for base, _, names in os.walk(folder, followlinks=True):
        inside = os.path.relpath(base, root)  # once a folder: a million images wait for each step here
        inside = "" if inside == "." else f"{inside}/"
        paths += [inside + name for name in names if is_image(name)]
    if not paths:
        raise InputError(f"{folder}: holds no images ({' '.join(EXTENSIONS)}); add some, or remove the folder")
    return sorted(paths)


def flat_val(root: Path, classes: list[str]) -> list[list[str]]:
    """ImageNet's val/ as it is unpacked, without class folders: the images of each class, by a list that lies near.

    That is Kaggle's LOC_val_solution.csv, or ILSVRC2012_validation_ground_truth.txt with the numbers of classes in the
    official meta.mat or in map_clsloc.txt: in `root`, up to three folders above it, or in a development kit in these.
    """
    kits = ("", "ILSVRC2012_devkit_t12/data", "devkit/data")
    near = [place / kit for place in (root, *list(root.absolute().parents)[:3]) for kit in kits]
    names = "LOC_val_solution.csv ILSVRC2012_validation_ground_truth.txt map_clsloc.txt meta.mat".split()
    solution, truth, *numbers = (next((p / n for p in near if (p / n).is_file()), None) for n in names)
    numbering = numbers[0] or numbers[1]
    if not solution and not (truth and numbering):
        what = f"put {names[0]} (Kaggle's), or {names[1]} and {names[3]} (the development kit's), beside val/"
        what = f"holds no class folders, nor is a list of its labels near; {what}"
        raise InputError(f"{root}/val: {what}, or sort the images into class folders")
    synsets = {} if solution else numbered_synsets(numbering)
    try:
        if solution:  # ImageId,class box …
            rows = [line.split(",") for line in solution.read_text().splitlines()[1:] if line]
            labels = {image: found.split()[0] for image, found, *_ in rows}
        else:
            numbers = enumerate(truth.read_text().split(), 1)
            labels = {f"ILSVRC2012_val_{i:08}": synsets[number] for i, number in numbers}
    except (OSError, ValueError, LookupError):
        raise InputError(f"{solution or truth}: is not the list of labels that it should be; fetch it again") from None
    of_class = {name: [] for name in classes}
    for path in image_files(root, root / "val"):
        if (label := labels.get(Path(path).stem)) not in of_class:
            what = f"of class {label}, which train/ does not have" if label else f"not in {(solution or truth).name}"
            raise InputError(f"{root}/{path}: {what}; remove it, or mend the other")
        of_class[label].append(path)
    if empty := [name for name, paths in of_class.items() if not paths]:
        raise InputError(f"{root}/val: holds no image of class {empty[0]}, which train/ has; both need the same")
    return list(of_class.values())


def numbered_synsets(path: Path) -> dict[str, str]:
    """The number by which ImageNet's ground truth calls each class → its name, from map_clsloc.txt or meta.mat."""
    try:
        if path.suffix == ".txt":
            return {number: name for name, number, *_ in map(str.split, path.read_text().splitlines())}
        from scipy.io import loadmat

        rows = loadmat(path, squeeze_me=True)["synsets"]
        return {str(int(row["ILSVRC2012_ID"])): str(row["WNID"]) for row in rows}
    except ImportError:
        raise InputError(f"{path}: needs scipy to be read, which is not installed; pip install scipy") from None
    except Exception:  # scipy raises many kinds
        raise InputError(f"{path}: is not the list of labels that it should be; fetch it again") from None
