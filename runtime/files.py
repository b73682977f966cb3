"""Files that are written whole or not at all, and read with their checksums."""

import os
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from runtime.errors import InputError


def write_whole(path, write: Callable, advice: str = "") -> None:
    """Let `write(file)` fill a temporary file beside `path`, then rename it: all of it or none. Makes the folder."""
    path = Path(path)
    kept = "; what was there before is kept" if os.path.exists(path) else ""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__  # torch.save hides what the disk said
        if not isinstance(reason, OSError):
            raise
        raise InputError(f"{path}: cannot be written ({reason.strerror}){advice}{kept}") from None
    finally:
        with suppress(OSError):  # it may never have been there
            temporary.unlink()
    if hasattr(os, "O_DIRECTORY"):  # the rename too
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)


def write_text(path, text: str) -> None:
    write_whole(path, lambda file: file.write(text.encode()))


def save(path, tree) -> None:
    """`torch.save`, whole or not at all."""
    write_whole(path, lambda file: torch.save(tree, file))


def load(path, instead: str = "make or fetch it again, or give another"):
    """What `save` wrote, on the CPU. Runs no pickled code, and checks every record's checksum, which torch does not.

    Nor does torch read a record that is marked as a folder: it would hand out memory as it happens to be.
    """
    damaged = f"{path}: damaged or not written by this program; {instead}"
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None or any(record.external_attr & 0x10 for record in archive.infolist()):
                raise InputError(damaged)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception:  # zipfile, zlib, pickle and torch raise every kind there is
        raise InputError(damaged) from None


def differences(theirs: dict, ours: dict, free: set[str] = frozenset()) -> str:
    """What differs between the settings of a checkpoint and those given, but for the `free`; "" if nothing does.

    One that an older version did not have yet does not differ as long as it is off: 0, False or empty.
    """
    keys = sorted(k for k in (theirs.keys() | ours.keys()) - free if (theirs.get(k) or 0) != (ours.get(k) or 0))
    return "; ".join(f"{k} {theirs.get(k)!r} there, {ours.get(k)!r} here" for k in keys)
