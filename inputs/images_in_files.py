"""Images left in their files: decoding one, and decoding many ahead of the training loop by worker processes."""

import contextlib
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

CHUNK = 32  # images that a worker hands over at once: keeps shared memory small and the first batch soon there


def decode(path: Path, value_range: tuple[float, float] | None = None) -> Tensor:
    """uint8 RGB (3, H, W) from a file of any mode; transparency and EXIF rotation are ignored.

    Of greys with more than 8 bits, `value_range` becomes 0 … 255; without one, 16 bits do, and floats stay as they are.
    Pillow decodes, as torchvision has announced the end of its own decoders.
    """
    try:
        with Image.open(path) as image:
            if is_deep(image):  # Pillow's own conversion would clip at 255
                grey = torch.from_numpy(np.nan_to_num(np.asarray(image).astype(np.float64)))
                low, high = value_range or ((0, 255) if image.mode == "F" else (0, 65535))
                return ((grey - low) * 255 / (high - low)).clamp(0, 255).to(torch.uint8).repeat(3, 1, 1)
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except Exception as error:  # Pillow's plugins raise every kind there is, SyntaxError included
        what = f"{path}: does not decode as an image ({type(error).__name__})"
        raise InputError(f"{what}; repair or remove it, or give --skip-bad-images") from error


def is_deep(image: Image.Image) -> bool:
    """Whether a picture's one channel has more than 8 bits: 16 or 32, integers or floats."""
    return image.mode.startswith(("I", "F"))


class Files:
    """The images at `paths` below `root`, for a `DataLoader` whose workers ask for one chunk of positions at a time."""

    def __init__(self, root: Path, paths: list[str], value_range: tuple[float, float] | None = None):
        self.root, self.value_range = root, value_range
        self.paths = np.array(paths)  # not a list: its reference counts would be copied into every forked worker

    def __len__(self) -> int:
        return len(self.paths)

    def first(self, n: int) -> "Files":
        return Files(self.root, self.paths[:n], self.value_range)

    def decode(self, i: int) -> Tensor:
        return decode(self.root / self.paths[i], self.value_range)

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

    def decoded(self, labels: Tensor, skip_bad: bool) -> Iterator[tuple[Tensor, Tensor, Tensor, list[str]]]:
        """All images, decoded by all cores, as the chunks of `image_cache.write_cache`."""
        workers = min(cores(), len(self) // 256)  # a few hundred images are done before a process is up
        with tqdm(total=len(self), desc="decoding", unit=" images") as bar:
            for chunk, _, flat, sizes, errors in self.stream([torch.arange(len(self))], workers):
                if errors and not skip_bad:
                    raise InputError(next(iter(errors.values())))
                good = sizes[:, 0] > 0
                yield flat, sizes[good], labels[chunk][good], [str(self.paths[i]) for i in errors]
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
            with contextlib.suppress(Exception), Image.open(self.root / self.paths[i]) as image:  # decoding will tell
                areas.append(image.width * image.height)
                deep |= is_deep(image)
        return 3 * len(self) * float(np.mean(areas or 0)), deep

    def extremes(self) -> list[float]:
        """The lowest and the highest value of all deep greys; those of 16 bits, if there are none."""

        def of_one(path: str) -> list[float]:
            with contextlib.suppress(Exception), Image.open(self.root / path) as image:
                values = np.asarray(image) if is_deep(image) else np.empty(0)
                values = values[np.isfinite(values)]
                return [float(values.min()), float(values.max())] if values.size else []
            return []

        with ThreadPoolExecutor(cores()) as pool:
            bar = tqdm(pool.map(of_one, self.paths.tolist()), "finding the range of values", len(self), unit=" images")
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
        threading.Thread(target=obey, args=(os.getppid(),), daemon=True).start()
