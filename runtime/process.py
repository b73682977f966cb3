"""How a command starts, fails and stops: its device, the group of its processes, its exit status."""

import ctypes
import gc
import os
import sys
import time

import torch
import torch.distributed as dist

from runtime import fast_paths
from runtime.errors import InputError


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next: to get it anew from the system costs a tenth of a small step."""
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
    torch.set_float32_matmul_precision("highest")  # float32 is float32; who wants speed takes bf16
    torch.backends.cudnn.allow_tf32 = False  # torch's default would compute convolutions alone in TF32
    if device == "cpu":
        keep_freed_memory()
        fast_paths.use(fast_paths.measured()["linear"])
    if ranks > 1:
        # torchrun --max-restarts hands out the store of the attempt before, with addresses of processes that are gone.
        store, rank, _ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore("attempt " + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend, gpu = ("nccl", chosen) if device == "cuda" else ("gloo", None)
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, device_id=gpu)
    return chosen


def stop() -> None:
    """Leave the process group. Without the barrier some gloo processes abort at exit (seen with torch 2.15)."""
    if dist.is_initialized():
        dist.barrier()
        # Before torch 2.8 the next call holds Python's lock while it waits for gloo's threads. If one of these still
        # needs the lock, to free a tensor, neither ever ends. Asleep, we leave the lock to them.
        time.sleep(0.1)
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
    except RuntimeError as error:
        gone = any(word in str(error) for word in ("by peer", "Broken pipe"))  # what gloo says of a rank that is gone
        if not (gone and dist.is_initialized()):
            raise
        time.sleep(1)  # in which torchrun ends this rank, if the other one has failed, and its own words stand alone
        print("another rank has ended; what it said, or torchrun says of it, tells why", file=sys.stderr, flush=True)
        status = 1
    except KeyboardInterrupt:
        status = 130
    else:
        return
    if dist.is_initialized():
        os._exit(status)  # the others may wait in a collective: leave without taking part, and without an abort
    sys.exit(status)
