"""How a command starts, fails, stops, and keeps its files whole. Nothing here is about learning."""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError

import torch

from common import InputError


def write_whole(path, write: Callable) -> None:
    """Let `write(file)` fill a temporary file beside `path`, flush it to disk and rename it: all of it or none."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); what was there before is kept") from None
    finally:
        temporary.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):  # the rename too
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)


def write_text(path, text: str) -> None:
    write_whole(path, lambda file: file.write(text.encode()))


def save(path, tree) -> None:
    """`torch.save`, whole or not at all."""
    write_whole(path, lambda file: torch.save(tree, file))


def load(path):
    """What `save` wrote, on the CPU. Reads no pickled code, and checks every record's checksum, which torch does not."""
    damaged = f"{path}: damaged or not written by this program; delete it, or give another"
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise InputError(damaged)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except InputError:
        raise
    except (OSError, EOFError, ValueError, KeyError, RuntimeError, NotImplementedError, zipfile.BadZipFile,
            UnpicklingError):  # fmt: skip
        raise InputError(damaged) from None
