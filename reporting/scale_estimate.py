"""What a step of a global batch would cost on 8 and 32 A100s: an estimate on paper, no measurement."""

import torch
from torch import Tensor

from reporting.step_speed import build_method, draw, flops, stepper

# One A100 with 80 GB (NVIDIA's data sheet), eight to a machine.
PEAK = 312e12  # FLOP/s of bf16 products
SHARE = 0.45  # of that, assumed of a step
NVLINK = 300e9  # bytes/s out of one GPU within a machine
NETWORK = 200e9  # bytes/s out of one machine: eight cards of 200 Gbit/s; a ring crosses by all of them


def activations(args, method, B: int) -> int:
    """Bytes that autograd keeps for the backward pass of a bf16 step: every storage once, weights not."""
    kept = {}
    weights = {p.untyped_storage().data_ptr() for p in method.parameters()}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    batch = draw(args, method, B, torch.device("cpu"))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        loss = method(batch)["loss"]  # held until all is counted: memory that is free again would be counted once
        assert loss.ndim == 0
        return sum(kept.values())


def bench_scale(args, device: torch.device) -> list[dict]:
    """What a step of a global batch costs on 8 and 32 A100s, from FLOPs and activations counted on few images here.

    Gradients are all-reduced as float32 in a ring: every GPU sends 2 (n - 1) / n of their bytes. Memory: 16 bytes a
    trained weight (itself, gradient, two of Adam's), 4 a frozen one (the teacher), and the activations, which include
    the attention's scores, though a GPU does not keep those.
    """
    rows, images, cpu = [], max(args.batch_size), torch.device("cpu")
    for name in args.method:
        method = build_method(args, name).train()
        trained, frozen = (sum(p.numel() for p in method.parameters() if p.requires_grad is x) for x in (True, False))
        per_image = flops(stepper(args, name, 2, "bf16", False, cpu)) / 2
        kept = (activations(args, method, 4) - activations(args, method, 2)) / 2
        key = getattr(method.config, "projector_out", 0) if hasattr(method.config, "tau") else 0  # values of it
        for n in (8, 32):
            share = images // n
            reduced = 2 * (n - 1) / n * 4 * trained
            compute, communicate = share * per_image / (SHARE * PEAK), reduced / (NVLINK if n <= 8 else NETWORK)
            row = dict(name=name, gpus=n, images_per_gpu=share, tflop_per_gpu=share * per_image / 1e12)
            row |= dict(compute_ms=1e3 * compute, all_reduce_megabytes=reduced / 1e6, all_reduce_ms=1e3 * communicate)
            row |= dict(gathered_keys_megabytes=(n - 1) * share * key * 4 / 1e6)
            row |= dict(memory_gb=(16 * trained + 4 * frozen + share * kept) / 1e9)
            row |= dict(images_per_second=images / max(compute, communicate))
            slow = "all-reduce" if communicate > compute else "compute"
            rows.append(row | dict(first_limit="memory" if row["memory_gb"] > 80 else slow))
    return rows
