"""Time, FLOPs and memory of a training step: ours, that of other libraries' MAE at the same work, and on many A100s."""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from common import SIZES, StepRandom, ViT, normalize_patches
from methods import METHODS
from reporting.timing import held, in_a_child, interleave
from runtime import fast_paths, process
from runtime.command_line import build_encoder, pretraining_options
from runtime.optimization import parameter_groups

PEERS = {"hf": "transformers", "lightly": "lightly", "torchvision": "torchvision"}  # and the package each needs

# One A100 with 80 GB (NVIDIA's data sheet), eight to a machine.
PEAK = 312e12  # FLOP/s of bf16 products
SHARE = 0.45  # of that, assumed of a step
NVLINK = 300e9  # bytes/s out of one GPU within a machine
NETWORK = 200e9  # bytes/s out of one machine: eight cards of 200 Gbit/s; a ring crosses by all of them


def build_method(args, name: str) -> torch.nn.Module:
    """The recipe's method, or one on the encoder that is asked for, with what its Config knows of a decoder's size."""
    if args.recipe:
        theirs, config, Method = pretraining_options(["--method", name, "--recipe", args.recipe], METHODS)
        return Method(build_encoder(theirs), config)
    usual = zip((args.width, args.depth, args.heads), SIZES[args.model], strict=True)
    encoder = ViT(args.image_size, args.patch_size, *(given or size for given, size in usual))
    return METHODS[name](encoder, METHODS[name].Config(**decoder_sizes(args, name)))


def decoder_sizes(args, name: str) -> dict[str, int]:
    keys = ("decoder_width", "decoder_depth", "decoder_heads")
    return {key: vars(args)[key] for key in keys if hasattr(METHODS[name].Config, key)}


def draw(args, method, B: int, device: torch.device):
    images = torch.randint(0, 256, (B, 3, args.image_size, args.image_size), dtype=torch.uint8, device=device)
    return method.draw(images, torch.arange(B), StepRandom(0, 0, B, None, device))


def our_loss(args, name: str, B: int, device: torch.device):
    method = build_method(args, name).to(device).train()
    batch = draw(args, method, B, device)
    return method, lambda network: network(batch)["loss"]


def peer_loss(args, name: str, B: int, device: torch.device):
    """The peer's MAE of the same sizes, on the same images and as many masked patches, with the same target."""
    ours = build_method(args, "mae")
    encoder, decoder, batch = ours.encoder, ours.config, draw(args, ours, B, device)
    if name == "lightly":
        network = LightlyMAE(encoder, decoder).to(device).train()
        return network, lambda network: network(*batch)
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    sizes = dict(
        hidden_size=encoder.width, num_hidden_layers=len(encoder.blocks),
        num_attention_heads=encoder.blocks[0].attn.heads, intermediate_size=4 * encoder.width,
        image_size=encoder.image_size, patch_size=encoder.patch_size, decoder_hidden_size=decoder.decoder_width,
        decoder_num_hidden_layers=decoder.decoder_depth, decoder_num_attention_heads=decoder.decoder_heads,
        decoder_intermediate_size=4 * decoder.decoder_width, mask_ratio=decoder.mask_ratio,
        norm_pix_loss=decoder.norm_pixels,
    )  # fmt: skip
    noise = torch.rand(B, encoder.patches, device=device)
    network = ViTMAEForPreTraining(ViTMAEConfig(**sizes)).to(device).train()
    return network, lambda network: network(pixel_values=batch.images, noise=noise).loss


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
    module, loss_of = (peer_loss if name in PEERS else our_loss)(args, name, B, device)
    optimizer = torch.optim.AdamW(parameter_groups(module, weight_decay=0.05), lr=1e-4, betas=(0.9, 0.95), fused=True)
    network = fast_paths.compiled(module, device) if compiled else module

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(network)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if hasattr(module, "update_teacher"):
            module.update_teacher(0.5)

    return step


def flops(step: Callable) -> int:
    # It cannot count a CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def first_steps(threads: int, args, name: str, B: int, precision: str, compiled: bool, device) -> tuple[int, float]:
    """Bytes that three steps hold at their peak, and seconds of the first; in a process of its own."""
    torch.set_num_threads(threads)
    process.start(device.type)  # as the process that times: torch's cache of what is compiled goes by these settings
    tiny = dict(recipe=None, width=8, depth=1, heads=1, decoder_width=8, decoder_depth=1, decoder_heads=1)
    stepper(argparse.Namespace(**vars(args) | tiny), name, 2, precision, False, device)()
    before = held("VmRSS")
    step, begin = stepper(args, name, B, precision, compiled, device), time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()  # of compiling, which tries things out
    seconds = time.perf_counter() - begin
    for _ in range(2):
        step()
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else held("VmHWM") - before, seconds


def measured_alone(args, contenders: list[tuple[str, bool]], B: int, precision: str, device) -> dict[tuple, dict]:
    """What a contender's own process shows: MB at its peak, and seconds of a first step that compiles.

    On a GPU four processes go side by side, because most of their time is compiling on a core. The process that times
    all contenders then finds what they have compiled in torch's cache.
    """
    gpu = device.type == "cuda"

    def alone(which: tuple[str, bool]) -> dict:
        times = 1 if gpu else 3  # the gaps in a heap differ by some per cent
        found = [in_a_child(first_steps, args, which[0], B, precision, which[1], device) for _ in range(times)]
        if None in found:
            return dict(megabytes=None)
        peaks, seconds = zip(*found, strict=True)
        row = dict(megabytes=statistics.median(peaks) / 1e6)
        return row | dict(compile_seconds=seconds[0]) if which[1] else row

    with ThreadPoolExecutor(4 if gpu else 1) as pool:
        return dict(zip(contenders, pool.map(alone, contenders), strict=True))


def bench_step(args, device: torch.device) -> Iterator[dict]:
    peers = [peer for peer in args.peer if peer != "torchvision"]
    contenders = [(name, compiled) for name in args.method + peers for compiled in ((False, True)[: 1 + args.compile])]
    n = 8192 if device.type == "cuda" else 2048
    for precision in args.precision:
        a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
        for B in args.batch_size:
            alone = measured_alone(args, contenders, B, precision, device) if args.memory else {}
            counted = {name: flops(stepper(args, name, B, precision, False, device)) for name in args.method + peers}
            steps = {which: stepper(args, which[0], B, precision, which[1], device) for which in contenders}
            timed = steps | {"matmul": lambda a=a, b=b: a @ b}
            seconds = interleave(timed, args.repeats, device, args.cpu_time)
            rate = 2 * n**3 / seconds["matmul"]
            del steps, timed
            for which in contenders:
                (name, compiled), t = which, seconds[which]
                row = dict(name=name + ", compiled" * compiled, batch=B, precision=precision)
                row |= dict(images_per_second=B / t, ms=1e3 * t, gflop=counted[name] / 1e9)
                row |= dict(share=100 * counted[name] / t / rate, matmul_tflops=rate / 1e12)
                row |= alone.get(which, {})
                if len(args.method) > 1 and ("mae", compiled) in seconds and name in args.method:
                    row |= dict(time_by_mae=t / seconds["mae", compiled], flops_by_mae=counted[name] / counted["mae"])
                    row |= dict(cost=row["time_by_mae"] / row["flops_by_mae"])
                row |= {f"by_{peer}": seconds[peer, False] / t for peer in peers if which != (peer, False)}
                yield row


class Launches(TorchDispatchMode):
    """Counts what runs on a device, kernels and copies to it but no views, and the host's seconds for all of it."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.kind, self.count, self.seconds = device.type, 0, 0.0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        begin = time.perf_counter()
        found = op(*args, **(kwargs or {}))
        first = found[0] if isinstance(found, list | tuple) else found
        if isinstance(first, Tensor) and first.device.type == self.kind:
            self.count += not op.is_view
            self.seconds += time.perf_counter() - begin
        return found


def bench_host(args, device: torch.device) -> Iterator[dict]:
    """What a `draw` asks of the host: to compute crops, masks and other numbers, and to launch all the rest.

    The former is what a batch takes beyond two images, less what its launches take. On a CPU "meta" is the device.
    """
    gpu, device = device.type == "cuda", device if device.type == "cuda" else torch.device("meta")
    for name in args.method:
        method = build_method(args, name).to(device)

        def drawn(B: int, counting, method=method) -> float:
            if gpu:
                torch.cuda.synchronize()
            begin = time.perf_counter()
            with counting:
                draw(args, method, B, device)
            return 1e3 * (time.perf_counter() - begin - getattr(counting, "seconds", 0.0))

        two = statistics.median(drawn(2, Launches(device)) for _ in range(args.repeats))
        for B in args.batch_size:
            alone = [drawn(B, launches := Launches(device)) for _ in range(args.repeats)]
            row = dict(name=name, batch=B, host_ms=statistics.median(alone) - two, launches=launches.count)
            whole = [drawn(B, nullcontext()) for _ in range(args.repeats)]
            yield row | dict(draw_ms=statistics.median(whole)) if gpu else row


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
    saving = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
    as_on_a_gpu = mock.patch.object(fast_paths, "PLAIN_SCORES", 0)  # whose attention keeps no scores
    with as_on_a_gpu, saving, torch.autocast("cpu", torch.bfloat16):
        loss = method(batch)["loss"]  # held until all is counted: memory that is free again would be counted once
        assert loss.ndim == 0
        return sum(kept.values())


def bench_scale(args, device: torch.device) -> Iterator[dict]:
    """What a step of a global batch costs on 8 and 32 A100s, from FLOPs and activations counted on few images here.

    Gradients are all-reduced as float32 in a ring: every GPU sends 2 (n - 1) / n of their bytes. Memory: 16 bytes a
    trained weight (itself, gradient, two of Adam's), 4 a frozen one (the teacher), and what the backward pass needs of
    the images that are done at once: a GPU's share, or of a recipe that accumulates, a part of it.
    """
    images, cpu = max(args.batch_size), torch.device("cpu")
    for name in args.method:
        method = build_method(args, name).train()
        trained, frozen = (sum(p.numel() for p in method.parameters() if p.requires_grad is x) for x in (True, False))
        per_image = flops(stepper(args, name, 2, "bf16", False, cpu)) / 2
        parts = METHODS[name].RECIPES.get(args.recipe, {}).get("accumulate", 1)
        two, four = (activations(args, method, B) for B in (2, 4))  # some are copies of weights, whatever the batch
        gathers = hasattr(method.config, "tau") and getattr(method.config, "dictionary", "batch") == "batch"
        key = getattr(method.config, "projector_out", 0) if gathers else 0  # values of it
        for n in (8, 32):
            share = images // n
            reduced = 2 * (n - 1) / n * 4 * trained
            compute, communicate = share * per_image / (SHARE * PEAK), reduced / (NVLINK if n <= 8 else NETWORK)
            kept = two + (share / parts - 2) * (four - two) / 2
            memory, slow = (16 * trained + 4 * frozen + kept) / 2**30, max(compute, communicate)
            yield dict(
                name=name, gpus=n, images_per_gpu=share, tflop_per_gpu=share * per_image / 1e12,
                compute_ms=1e3 * compute, all_reduce_megabytes=reduced / 1e6, all_reduce_ms=1e3 * communicate,
                gathered_keys_megabytes=(n - 1) * share * key * 4 / 1e6, memory_gib=memory,
                images_per_second=images / slow,
                first_limit="memory" if memory > 80 else "compute" if slow == compute else "all-reduce",
            )  # fmt: skip
