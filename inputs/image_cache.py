"""The cache: a set that fits into memory is decoded once, into one file that every later start maps and checks.

Cache files lie in $MINMIM_CACHE, else in minmim/ in the user's cache folder. Their names hold a hash of what they were
made from, so that any change of the images makes a new file. Old ones may be deleted at any time.
"""

import contextlib
import hashlib
import json
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from inputs.images_in_files import cores
from inputs.images_in_memory import Packed
from inputs.once_per_node import say
from runtime import files
from runtime.errors import InputError

PART = 1 << 26  # bytes of a cache file under one checksum
MAGIC = b"minMIM2\n"  # ends a cache file; the number is the format's version
TAIL = struct.Struct("<QI8s")  # length and CRC-32 of the index, MAGIC


def cache_folder() -> Path:
    if folder := os.environ.get("MINMIM_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minmim"


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


def remembered(stem: str, made_from: bytes, compute: Callable[[], list[float]]) -> list[float]:
    """Two numbers that `compute()` finds, from the cache folder if they are there."""
    path = cache_folder() / f"{stem}-{hashlib.sha256(made_from).hexdigest()[:16]}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        low, high = json.loads(path.read_text())
        return [float(low), float(high)]
    numbers = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, json.dumps(numbers))
    return numbers


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
