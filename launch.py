"""How a command starts, fails, stops, and keeps its files whole. Nothing here is about learning."""

import ctypes
import gc
import os
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

from common import InputError

# ------------------------------------------------------------------------------------------------------------ files


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
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__  # torch.save hides what the disk said
        if not isinstance(reason, OSError):
            raise
        raise InputError(f"{path}: cannot be written ({reason.strerror}); what was there before is kept") from None
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


def load(path):
    """What `save` wrote, on the CPU. Runs no pickled code, and checks every record's checksum, which torch does not.

    Nor does torch read a record that is marked as a folder: it would hand out memory as it happens to be.
    """
    damaged = f"{path}: damaged or not written by this program; delete it, or give another"
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
    """What differs between the settings of a checkpoint and those given, but for the `free`; "" if nothing does."""
    keys = sorted(k for k in (theirs.keys() | ours.keys()) - free if theirs.get(k) != ours.get(k))
    return "; ".join(f"{k} {theirs.get(k)!r} there, {ours.get(k)!r} here" for k in keys)


# ---------------------------------------------------------------------------------------------------------- process


def keep_freed_memory() -> None:
    """Have glibc keep what is freed. It would give back a step's memory at its end and let the system clear it again at
    the next, page by page: a tenth of a small step on a CPU.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, at its upper limit: blocks of 32 MiB come from the heap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def has_bf16(device: torch.device) -> bool:
    """Whether a GPU multiplies in bf16 itself; one before Ampere only emulates it."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def start(device: str = "auto") -> torch.device:
    """The device of this process; under torchrun with several processes also their group: gloo on CPUs, NCCL on GPUs.

    "auto" takes CUDA where there is any, else Apple's GPU for a process on its own, else the CPU.
    """
    ranks, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes on this machine
    if device == "auto":
        alone = "mps" if ranks == 1 and torch.backends.mps.is_available() else "cpu"
        device = "cuda" if torch.cuda.is_available() else alone
    if device == "cuda":
        if here > (gpus := torch.cuda.device_count()):
            right = f"start at most {gpus} processes, or" if gpus else "give"
            raise InputError(f"device cuda: {here} GPUs asked for, {gpus} found; {right} --device cpu")
        torch.cuda.set_device(local)
    elif device == "mps" and (ranks > 1 or not torch.backends.mps.is_available()):
        raise InputError("device mps: serves one process on a Mac with Apple's GPU; give --device cpu")
    chosen = torch.device(device, local) if device == "cuda" else torch.device(device)
    if device == "cpu":
        keep_freed_memory()
    if ranks > 1:
        on_gpu = chosen.type == "cuda"
        # torchrun --max-restarts hands out the store of the attempt before, with addresses of processes that are gone.
        store, rank, _ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore("attempt " + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend, gpu = ("nccl", chosen) if on_gpu else ("gloo", None)
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, device_id=gpu)
    return chosen


def stop() -> None:
    """Leave the process group. Without the barrier some gloo processes abort at exit (seen with torch 2.15)."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def command(main) -> None:
    """Run a command's `main()`: what the user got wrong becomes one line on standard error and exit status 2."""
    gc.freeze()  # modules are no garbage, and to look for some among them costs the start two tenths of a second
    try:
        main()
    except InputError as error:
        # Where all ranks fail alike, torchrun ends the others while they wait, so that the line stands once.
        time.sleep(int(os.environ.get("RANK", 0)) > 0)
        print(error, file=sys.stderr, flush=True)
        status = 2
    except KeyboardInterrupt:
        status = 130
    else:
        return
    finally:
        gc.unfreeze()
    if dist.is_initialized():
        os._exit(status)  # the others may wait in a collective: leave without taking part, and without an abort
    sys.exit(status)
