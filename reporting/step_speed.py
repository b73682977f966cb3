"""Time, FLOPs and memory of training steps, beside peers on the same work."""

import argparse
import statistics

import torch

from reporting.contenders import flops, stepper
from reporting.timing import held, in_a_child, interleave
from runtime import fast, process


def peak_memory(pipe, threads: int, args, name: str, B: int, precision: str, compiled: bool, device) -> None:
    """What three steps hold at their peak; in a process of its own, after a tiny model's step."""
    torch.set_num_threads(threads)
    if device.type == "cpu":
        process.keep_freed_memory()  # as train.py does
        fast.prepare(device)
    tiny = dict(width=8, depth=1, heads=1, decoder_width=8, decoder_depth=1, decoder_heads=1)
    stepper(argparse.Namespace(**vars(args) | tiny), name, 2, precision, False, device)()
    before = held("VmRSS")
    step = stepper(args, name, B, precision, compiled, device)
    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # of compiling, which tries things out
    for _ in range(2):
        step()
    pipe.send(torch.cuda.max_memory_allocated() if device.type == "cuda" else held("VmHWM") - before)


def bench_step(args, device: torch.device) -> list[dict]:
    rows = []
    peers = [peer for peer in args.peer if peer != "torchvision"]
    contenders = [(name, compiled) for name in args.method + peers for compiled in ((False, True)[: 1 + args.compile])]
    n = 8192 if device.type == "cuda" else 2048
    for precision in args.precision:
        a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
        for B in args.batch_size:
            steps = {which: stepper(args, which[0], B, precision, which[1], device) for which in contenders}
            counted = {name: flops(stepper(args, name, B, precision, False, device)) for name in args.method + peers}
            timed = steps | {"matmul": lambda a=a, b=b: a @ b}
            seconds = interleave(timed, args.repeats, device, args.cpu_time)
            rate = 2 * n**3 / seconds["matmul"]
            del steps, timed
            for which in contenders:
                (name, compiled), t = which, seconds[which]
                row = dict(name=name + ", compiled" * compiled, batch=B, precision=precision)
                row |= dict(images_per_second=B / t, ms=1e3 * t, gflop=counted[name] / 1e9)
                row |= dict(share=100 * counted[name] / t / rate, matmul_tflops=rate / 1e12)
                if args.memory:
                    times = 1 if device.type == "cuda" else 3  # the gaps in a heap differ by some per cent
                    peaks = [in_a_child(peak_memory, args, name, B, precision, compiled, device) for _ in range(times)]
                    row |= dict(megabytes=None if None in peaks else statistics.median(peaks) / 1e6)
                if len(args.method) > 1 and ("mae", compiled) in seconds and name in args.method:
                    row |= dict(time_by_mae=t / seconds["mae", compiled], flops_by_mae=counted[name] / counted["mae"])
                    row |= dict(cost=row["time_by_mae"] / row["flops_by_mae"])
                row |= {f"by_{peer}": seconds[peer, False] / t for peer in peers if which != (peer, False)}
                rows.append(row)
    return rows
