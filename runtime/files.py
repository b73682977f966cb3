"""Files that are written whole or not at all, and read with their checksums."""

import json
import os
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

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


def save_weights(path, settings: dict, state_dict: dict[str, Tensor], made_by: str) -> None:
    """An encoder as .safetensors: its tensors, and as metadata how to build it and a line about what made it."""
    tensors = {name: x.detach().cpu().contiguous() for name, x in state_dict.items()}
    about = dict(format="pt", settings=json.dumps(settings), made_by=made_by, crc32=checksum(tensors))
    write_whole(path, lambda file: file.write(safetensors.torch.save(tensors, about)))


def load(path, instead: str = "make or fetch it again, or give another", mmap: bool = False):
    """What `save` wrote, on the CPU, or `save_weights`. Runs no pickled code, and checks every record's checksum.

    torch does not. Nor does it read a record that is marked as a folder: it would hand out memory as it happens to be.
    """
    damaged = f"{path}: damaged or not written by this program; {instead}"
    try:
        if Path(path).suffix == ".safetensors":
            return load_weights(path)
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None or any(record.external_attr & 0x10 for record in archive.infolist()):
                raise InputError(damaged)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception:  # zipfile, zlib, pickle and torch raise every kind there is
        raise InputError(damaged) from None


def load_weights(path) -> dict:
    """A .safetensors file's tensors as `state_dict`, beside its metadata; of `save_weights`, or of anybody."""
    with safetensors.safe_open(path, "pt") as file:
        about, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if about.get("crc32", "") not in ("", checksum(tensors)):
        raise ValueError
    if "settings" in about:
        settings = json.loads(about["settings"])
        about["settings"] = {key: tuple(x) if isinstance(x, list) else x for key, x in settings.items()}
    return about | dict(state_dict=tensors)


def checksum(tensors: dict[str, Tensor]) -> str:
    """Of all their bytes, which .safetensors has none for."""
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), total)
    return f"{total:08x}"


def encoder_in(directory: Path) -> Path:
    """The file that a run keeps its encoder in; older ones have an encoder.pt."""
    now, older = directory / "encoder.safetensors", directory / "encoder.pt"
    return older if older.is_file() and not now.is_file() else now


def results_of(run: str) -> tuple[Path, str]:
    """Where results of a run, or of a file of weights, are written, and what their names begin with.

    Results of a file lie beside it and have its name, as other files of weights may lie there; an encoder is its run's.
    """
    path = Path(run)
    if path.is_dir():
        return path, ""
    return path.parent, "" if path.stem == "encoder" else f"{path.stem}-"


def differences(theirs: dict, ours: dict, free: set[str] = frozenset()) -> str:
    """What differs between the settings of a checkpoint and those given, but for the `free`; "" if nothing does.

    One that an older version did not have yet does not differ as long as it is off: 0, False or empty.
    """
    keys = sorted(k for k in (theirs.keys() | ours.keys()) - free if (theirs.get(k) or 0) != (ours.get(k) or 0))
    return "; ".join(f"{k} {theirs.get(k)!r} there, {ours.get(k)!r} here" for k in keys)
