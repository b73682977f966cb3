"""Speed and memory, beside peers on the same work.

    python bench.py --peer hf --compile                         MAE's step on this machine beside transformers' ViTMAE
    python bench.py --method mae cmae cae                       what a method costs beside what its FLOPs say
    python bench.py --what input --method mae cmae --peer torchvision
    python bench.py --what start --data tiny-imagenet --data-root DIR       from command to first step, and checkpoints
    python bench.py --what epoch --data tiny-imagenet --data-root DIR       from disk to weights, in train.py
    python bench.py --what scale --method cmae                  8 and 32 A100s, on paper

Contenders take turns within each repeat, and the medians of the repeats are compared, so that what else the machine
does meets all alike; `--cpu-time` counts the seconds that this process computes, for a machine that others share (give
OMP_NUM_THREADS=1). A step is forward, backward, AdamW and the teacher, as in train.py; what `draw` draws is drawn
before. FLOPs are what torch's FlopCounterMode counts in that step without compiling. `share` is that over time and over
the rate of a 2048 x 2048 torch.matmul of the same precision (8192 on a GPU) in the same repeats, in percent; above 100
where our float32 is oneDNN's and torch.matmul MKL's (see `common.linear`). `MB` is what a process of its own holds at
its peak beyond what a tiny model takes: model, optimizer, activations; on a CPU the median of three such processes.
`cost` is a method's time over MAE's, divided by its FLOPs over MAE's.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common import SIZES, StepRandom, ViT, normalize_patches, parameter_groups
from inputs import augment, images_in_files, images_in_memory
from methods import METHODS
from runtime import files, process
from runtime.command_line import Parser
from runtime.errors import InputError
from runtime.run import git_state, versions

PEERS = {"hf": "transformers", "lightly": "lightly", "torchvision": "torchvision"}  # and the package each needs

# -------------------------------------------------------------------------------------------------------------- clock


def interleave(contenders: dict[str, Callable], repeats: int, device: torch.device, cpu_time=False) -> dict[str, float]:
    """Median seconds of one call of each contender, over `repeats` rounds in which all take turns."""
    clock = time.process_time if cpu_time else time.perf_counter

    def seconds(call: Callable, calls: int) -> float:
        begin = clock()
        for _ in range(calls):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (clock() - begin) / calls

    calls = {}
    for name, call in contenders.items():  # warm up, and see how many calls a GPU needs to be timed well
        seconds(call, 2)
        calls[name] = max(1, math.ceil(0.2 / seconds(call, 1))) if device.type == "cuda" else 1
    rounds = [{name: seconds(call, calls[name]) for name, call in contenders.items()} for _ in range(repeats)]
    return {name: statistics.median(times[name] for times in rounds) for name in contenders}


# --------------------------------------------------------------------------------------------------------------- step


def build_method(args, name: str) -> torch.nn.Module:
    """The method on the encoder that is asked for; of a decoder's size, what the method's Config knows is set."""
    usual = zip((args.width, args.depth, args.heads), SIZES[args.model], strict=True)
    Method = METHODS[name]
    fields = {f.name for f in dataclasses.fields(Method.Config)}
    decoder = {key: vars(args)[key] for key in ("decoder_width", "decoder_depth", "decoder_heads") if key in fields}
    encoder = ViT(args.image_size, args.patch_size, *(given or size for given, size in usual))
    return Method(encoder, Method.Config(**decoder))


def draw(args, method, B: int, device: torch.device):
    images = torch.randint(0, 256, (B, 3, args.image_size, args.image_size), dtype=torch.uint8, device=device)
    return method.draw(images, torch.arange(B), StepRandom(0, 0, B, None, device))


def our_loss(args, name: str, B: int, device: torch.device):
    method = build_method(args, name).to(device).train()
    batch = draw(args, method, B, device)
    return method, lambda network: network(batch)["loss"], method.update_teacher


def peer_loss(args, name: str, B: int, device: torch.device):
    """The peer's MAE of the same sizes, on the same images and as many masked patches, with the same target."""
    ours = build_method(args, "mae")
    encoder, decoder, batch = ours.encoder, ours.config, draw(args, ours, B, device)
    if name == "lightly":
        network = LightlyMAE(encoder, decoder).to(device).train()
        return network, lambda network: network(*batch), lambda progress: None
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    sizes = dict(
        hidden_size=encoder.width, num_hidden_layers=len(encoder.blocks),
        num_attention_heads=encoder.blocks[0].attn.heads, intermediate_size=4 * encoder.width,
        image_size=args.image_size, patch_size=args.patch_size, decoder_hidden_size=decoder.decoder_width,
        decoder_num_hidden_layers=decoder.decoder_depth, decoder_num_attention_heads=decoder.decoder_heads,
        decoder_intermediate_size=4 * decoder.decoder_width, mask_ratio=decoder.mask_ratio,
        norm_pix_loss=decoder.norm_pixels,
    )  # fmt: skip
    noise = torch.rand(B, encoder.patches, device=device)
    network = ViTMAEForPreTraining(ViTMAEConfig(**sizes)).to(device).train()
    return network, lambda network: network(pixel_values=batch.images, noise=noise).loss, lambda progress: None


class LightlyMAE(torch.nn.Module):
    """MAE as lightly's example puts it together from its modules on timm."""

    def __init__(self, encoder: ViT, decoder):
        super().__init__()
        from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
        from timm.models.vision_transformer import VisionTransformer

        D, W, self.p = encoder.width, decoder.decoder_width, encoder.patch_size
        size, depth, heads = encoder.image_size, len(encoder.blocks), encoder.blocks[0].attn.heads
        vit = VisionTransformer(size, self.p, num_classes=0, embed_dim=D, depth=depth, num_heads=heads)
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        self.decoder = MAEDecoderTIMM(num_patches=encoder.patches, patch_size=self.p, embed_dim=D, decoder_embed_dim=W,
                                      decoder_depth=decoder.decoder_depth,
                                      decoder_num_heads=decoder.decoder_heads)  # fmt: skip

    def forward(self, images: Tensor, mask) -> Tensor:
        from lightly.models import utils

        visible, masked = F.pad(mask.visible + 1, (1, 0)), mask.masked + 1  # token 0 is the class token
        x = self.decoder.embed(self.backbone.encode(images=images, idx_keep=visible))
        tokens = utils.repeat_token(self.decoder.mask_token, (len(x), self.backbone.sequence_length))
        x = self.decoder.decode(utils.set_at_index(tokens, visible, x.type_as(tokens)))
        target = normalize_patches(utils.get_at_index(utils.patchify(images, self.p), mask.masked))
        return F.mse_loss(self.decoder.predict(utils.get_at_index(x, masked)), target)


def stepper(args, name: str, B: int, precision: str, compiled: bool, device: torch.device) -> Callable:
    """One training step as a call, of a method or of a peer."""
    torch.manual_seed(0)
    module, loss_of, update_teacher = (peer_loss if name in PEERS else our_loss)(args, name, B, device)
    groups = parameter_groups(module, weight_decay=0.05)
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    network = torch.compile(module) if compiled else module

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(network)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_teacher(0.5)

    return step


def flops(step: Callable) -> int:
    # It cannot count a CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def held(what: str) -> int:
    """Bytes of memory that this process holds (VmRSS) or held at its peak (VmHWM); the peak where there is no /proc.

    Linux's getrusage would count the parent's peak too.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(x.split()[1]) * 1024 for x in status.read_text().splitlines() if x.startswith(what + ":"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_memory(pipe, threads: int, args, name: str, B: int, precision: str, compiled: bool, device) -> None:
    """What three steps hold at their peak; in a process of its own, after a tiny model's step."""
    torch.set_num_threads(threads)
    if device.type == "cpu":
        process.keep_freed_memory()  # as train.py does
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


def in_a_child(function: Callable, *arguments):
    """What `function(pipe, threads, *arguments)` sends from a new process; None if that dies, of too little memory."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=function, args=(theirs, torch.get_num_threads(), *arguments))
    child.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        return None
    finally:
        child.join()


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


# -------------------------------------------------------------------------------------------------------------- input


def picture_folder(directory: Path, n: int, size: int) -> list[Path]:
    """n JPEG files in one class folder, of smooth noise."""
    from PIL import Image

    (directory / "class").mkdir()
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(n, 3, 8, 8, generator=generator)
    images = (F.interpolate(small, (size, size), mode="bicubic").clamp(0, 1) * 255).byte().permute(0, 2, 3, 1)
    files = [directory / "class" / f"{i:05}.jpg" for i in range(n)]
    for file, image in zip(files, images, strict=True):
        Image.fromarray(image.numpy()).save(file, quality=90)
    return files


def torchvision_views(args, name: str) -> Callable:
    """What mae or cmae draws of an image, by torchvision, image by image: PIL image → normalised view or views."""
    from torchvision.transforms import v2

    S = args.image_size
    tensor = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(augment.MEAN, augment.STD)])

    def crop(size: int) -> Callable:
        bicubic = v2.InterpolationMode.BICUBIC
        return v2.Compose([v2.RandomResizedCrop(size, (0.2, 1.0), interpolation=bicubic), v2.RandomHorizontalFlip()])

    if name == "mae":
        return v2.Compose([crop(S), tensor])
    master = crop(S + round(32 * S / 224))  # as much larger as CMAE shifts its second view
    color = v2.Compose([v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), v2.RandomGrayscale(0.2)])
    shift = v2.RandomCrop(S)

    def views(image):
        image = master(image)
        return tensor(image.crop((0, 0, S, S))), tensor(color(shift(image)))

    return views


def stages(
    args, files: list[Path], packed: images_in_memory.Packed, device: torch.device
) -> dict[str, tuple[Callable, Callable]]:
    """Each stage of an input path on one batch: ours as a call, and torchvision's of one image."""
    from torchvision.datasets.folder import default_loader
    from torchvision.transforms import v2

    B, S = len(files), args.image_size
    images, rng = packed.images(torch.arange(B), device), StepRandom(0, 0, B, None, device)
    views = augment.crop_resize(images, augment.crop_boxes(rng, (S, S)), S)
    pictures = [default_loader(file) for file in files]

    def each(function: Callable) -> Callable:
        return lambda: [function(picture) for picture in pictures]

    return {
        "decode": (lambda: [*map(images_in_files.decode, files)], lambda: [*map(default_loader, files)]),
        "cache": (lambda: packed.images(torch.randperm(B), device), None),
        "crop": (lambda: augment.crop_resize(images, augment.crop_boxes(rng, (S, S)), S),
                 each(v2.RandomResizedCrop(S, (0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC))),
        "colour": (lambda: augment.color_jitter(views, *augment.draw_color_jitter(rng, 0.4, 0.4, 0.4, 0.1)),
                   each(v2.ColorJitter(0.4, 0.4, 0.4, 0.1))),
        "blur": (lambda: augment.gaussian_blur(views, rng.uniform(low=0.1, high=2.0)), each(v2.GaussianBlur(13))),
    }  # fmt: skip


def bench_input(args, device: torch.device) -> list[dict]:
    """Images/s of each stage, then of the whole path of a method's input, as every epoch takes it.

    Ours: from the cache file's memory to `draw`'s batch on the device. Per image: torchvision's ImageFolder, transforms
    and a DataLoader with as many processes as we have threads, from files to a batch on the host. A call is eight
    batches, and leaves no process at work. Stages are one batch and one process, on both sides.
    """
    from torchvision.datasets import ImageFolder

    B, batches, peer = max(args.batch_size), 8, "torchvision" in args.peer
    calls, images = {}, {}  # the latter: images that a call is worth
    with tempfile.TemporaryDirectory() as directory:
        files = picture_folder(Path(directory), B, args.image_size)
        packed = images_in_memory.Packed(*images_in_memory.pack([images_in_files.decode(file) for file in files]))
        packed = images_in_memory.Packed(packed.flat.to(device), packed.sizes)
        for name, (ours, theirs) in stages(args, files, packed, device).items():
            calls[name], images[name] = ours, B
            if peer and theirs:
                calls[name, "torchvision"] = theirs
        for name in args.method:
            method = build_method(args, name).to(device)

            def draw_all(method=method):
                for step in range(batches):
                    index = torch.randperm(B)
                    method.draw(packed.images(index, device), index, StepRandom(0, step, B, None, device))

            calls[name], images[name] = draw_all, B * batches
            if peer and name in ("mae", "cmae"):
                folder = ImageFolder(directory, torchvision_views(args, name))
                workers = 0 if args.cpu_time else torch.get_num_threads()
                loader = torch.utils.data.DataLoader(
                    torch.utils.data.ConcatDataset([folder] * batches), B, shuffle=True, num_workers=workers,
                    persistent_workers=workers > 0,
                )  # fmt: skip
                calls[name, "torchvision"] = lambda loader=loader: [None for _ in loader]
        seconds = interleave(calls, args.repeats, device, args.cpu_time)
    rows = []
    for name, n in images.items():
        row = dict(name=name, batch=B, images_per_second=n / seconds[name])
        if (theirs := seconds.get((name, "torchvision"))) is not None:
            row |= dict(torchvision_images_per_second=n / theirs, by_torchvision=theirs / seconds[name])
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------------------ train.py itself


def command(args, name: str, out: Path, *more: str) -> list[str]:
    fields = {f.name for f in dataclasses.fields(METHODS[name].Config)}
    keys = ["data", "data_root", "classes", "model", "width", "depth", "heads", "image_size", "patch_size", "device"]
    keys += [key for key in ("decoder_width", "decoder_depth", "decoder_heads") if key in fields]
    given = {key: vars(args)[key] for key in keys if vars(args)[key] is not None}
    given |= dict(method=name, batch_size=args.batch_size[-1], precision=args.precision[0], lr=1e-3, out=out)
    flags = [word for key, value in given.items() for word in ("--" + key.replace("_", "-"), str(value))]
    flags += ["--compile" if args.compile else "--no-compile", "--no-evaluate", "--resume", "never"]
    return [sys.executable, str(Path(__file__).with_name("train.py")), *flags, *more]


def run_train(words: list[str], out: Path) -> dict:
    """Seconds from the command to its first logged step and to its end, and the most it held in memory."""
    begin, first, pid = time.perf_counter(), None, 0
    log, said = out / "log.jsonl", out.with_suffix(".err")
    with open(said, "w") as errors:
        child = subprocess.Popen(words, stdout=errors, stderr=errors)
        while not pid:
            time.sleep(0.005)
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if first is None and log.exists() and log.read_text().count("\n") > 1:
                first = time.perf_counter() - begin
    total = time.perf_counter() - begin
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        tail = said.read_text().strip().splitlines()
        raise InputError(f"train.py: failed ({tail[-1] if tail else child.returncode}); try {' '.join(words[1:])}")
    resident = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    rows = [json.loads(line) for line in log.read_text().splitlines()[1:]]
    return dict(first_step_seconds=first, total_seconds=total, resident_gib=resident / 2**30, rows=rows)


def bench_epoch(args, device: torch.device) -> list[dict]:
    """Two epochs by train.py, from command to weights on disk; the second is past start and compilation."""
    rows = []
    for name in args.method:
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory) / "run"
            run = run_train(command(args, name, out, "--epochs", "2", "--warmup-epochs", "1"), out)
        log = run.pop("rows")
        last, half = log[-1], next(row for row in log if row["epoch"] >= 1)
        seconds = (last["seconds"] - half["seconds"]) / (last["epoch"] - half["epoch"])
        row = dict(name=name, batch=args.batch_size[-1], precision=args.precision[0], second_epoch_seconds=seconds)
        rows.append(row | dict(images_per_second=last["step"] / 2 * args.batch_size[-1] / seconds) | run)
    return rows


def bench_start(args, device: torch.device) -> list[dict]:
    """Seconds from the command to the first step, the most held in memory, and the seconds of one checkpoint."""
    rows = []
    for name in args.method:
        with tempfile.TemporaryDirectory() as directory:
            outs, more = [Path(directory) / str(i) for i in range(args.repeats)], ("--max-steps", "1")
            runs = [run_train(command(args, name, out, *more), out) for out in outs]
            tree = files.load(outs[-1] / "checkpoint.pt")
            file = Path(directory) / "checkpoint.pt"
            saving = interleave({"save": lambda f=file, t=tree: files.save(f, t)}, args.repeats, torch.device("cpu"))
            row = dict(name=name, first_run_seconds=runs[0]["first_step_seconds"])  # it may build the images' cache
            row |= dict(first_step_seconds=statistics.median(run["first_step_seconds"] for run in runs[1:] or runs))
            row |= dict(resident_gib=max(run["resident_gib"] for run in runs), checkpoint_seconds=saving["save"])
            rows.append(row | dict(checkpoint_megabytes=file.stat().st_size / 1e6))
    return rows


# ----------------------------------------------------------------------------------------------------- scale, on paper

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


# ------------------------------------------------------------------------------------------------------------- command

WHAT = {"step": bench_step, "input": bench_input, "epoch": bench_epoch, "start": bench_start, "scale": bench_scale}

# Heads of the table for the fields of a row; a field without one is for --json alone.
HEADS = dict(
    name="what", gpus="GPUs", batch="batch", images_per_gpu="batch", precision="type", images_per_second="images/s",
    torchvision_images_per_second="theirs", gflop="GFLOP", share="share", megabytes="MB", cost="cost", by_hf="x hf",
    by_lightly="x lightly", by_torchvision="x theirs", first_run_seconds="first s", first_step_seconds="to step s",
    second_epoch_seconds="epoch s", total_seconds="all s", resident_gib="GiB", checkpoint_seconds="save s",
    checkpoint_megabytes="MB", tflop_per_gpu="TFLOP", compute_ms="ms", all_reduce_megabytes="sum MB",
    all_reduce_ms="sum ms", gathered_keys_megabytes="keys MB", memory_gb="GB", first_limit="limit",
)  # fmt: skip


def table(rows: list[dict]) -> str:
    """The rows in columns, at most 80 characters wide for every table that this file prints."""
    fields = [f for f in HEADS if any(f in row for row in rows)]

    def cell(value) -> str:
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
        return "" if value is None else str(value)

    cells = [[HEADS[f] for f in fields], *([cell(row.get(f)) for f in fields] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (" ".join(text.rjust(w) for text, w in zip(line[1:], widths[1:], strict=True)) for line in cells)
    return "\n".join(f"{line[0].ljust(widths[0])} {rest}" for line, rest in zip(cells, lines, strict=True))


def parse(argv: list[str]) -> argparse.Namespace:
    yes_no = argparse.BooleanOptionalAction
    parser = Parser(description="Speed and memory, beside peers on the same work.", allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--what", default="step", choices=WHAT, help="what to measure")
    add("--method", nargs="+", default=["mae"], choices=METHODS, help="which of ours")
    add("--peer", nargs="+", default=[], choices=PEERS, help="beside whom; of a step hf, lightly, of input torchvision")
    add("--model", default="tiny", choices=SIZES, help="encoder")
    for name, text in (("width", "width"), ("depth", "blocks"), ("heads", "heads")):
        add(f"--{name}", type=int, metavar="N", help=f"{text} of the encoder, in place of the model's")
    for name, usual in (("width", 96), ("depth", 4), ("heads", 3)):
        add(f"--decoder-{name}", type=int, default=usual, metavar="N", help="of MAE's kind of decoder")
    add("--image-size", type=int, default=64, metavar="PIXELS", help="side of a view")
    add("--patch-size", type=int, default=8, metavar="PIXELS", help="side of a patch")
    add("--batch-size", type=int, nargs="+", default=[64, 256], metavar="B", help="images of a step")
    add("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"], help="of products")
    add("--compile", action=yes_no, default=False, help="torch.compile; of a step beside the plain one")
    add("--memory", action=yes_no, default=True, help="measure peaks of steps too")
    add("--cpu-time", action=yes_no, default=False, help="processor time in place of the clock's")
    add("--repeats", type=int, default=9, metavar="N", help="rounds; medians are reported")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="where")
    add("--data", default="shapes", metavar="SET", help="of --what epoch and start")
    add("--data-root", metavar="DIR", help="where it lies")
    add("--classes", type=int, metavar="K", help="its first K classes")
    add("--json", metavar="FILE", help="write every figure there, with machine, versions and command")
    args = parser.parse_args(argv)
    for name in ("repeats", "image_size", "patch_size"):
        if vars(args)[name] < 1:
            raise InputError(f"{name.replace('_', ' ')} {vars(args)[name]}: must be at least 1")
    if min(args.batch_size) < 2:
        raise InputError(f"batch size {min(args.batch_size)}: must be at least 2")
    for peer in args.peer:
        if importlib.util.find_spec(PEERS[peer]) is None:
            raise InputError(f"peer {peer}: {PEERS[peer]} is not installed; pip install '.[bench]' brings it")
    return args


def about(device: torch.device) -> dict:
    """Device, threads, versions, commit and command: what a figure needs beside it."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    if device.type == "cpu" and Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = models[0].split(":")[1].strip() if models else name
    found = versions()
    for package in PEERS.values():
        if importlib.util.find_spec(package):
            found[package] = importlib.metadata.version(package)
    words = "python " + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return dict(device=name, threads=torch.get_num_threads(), versions=found, git=git_state(), command=words)


def main() -> None:
    args = parse(sys.argv[1:])
    device = process.start(args.device)
    args.device = device.type
    rows = WHAT[args.what](args, device)
    facts = about(device)
    print(f"{facts['device']}, {facts['threads']} threads, torch {torch.__version__}\n{facts['command']}")
    print(table(rows))
    if args.json:
        files.write_text(args.json, json.dumps(facts | dict(rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    process.command(main)
