"""What is there for speed alone: each function first names the plain expression that it equals, as tests show."""

import functools
import os
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.ranks import world_size

# Whether `linear` computes float32 products as convolutions. A run sets it once, before its first step.
as_convolution = False
PLAIN_SCORES = 256 * 256  # queries times keys up to which `attend` multiplies plainly on a CPU in half precision


def upload(x: Tensor, device: torch.device) -> Tensor:
    """`x.to(device)`. From the CPU to a GPU it goes by pinned memory, so that nothing waits for the copy."""
    pin = device.type == "cuda" and x.device.type == "cpu"
    return x.pin_memory().to(device, non_blocking=True) if pin else x.to(device)


def take(x: Tensor, index: Tensor) -> Tensor:
    """`x[torch.arange(B)[:, None], index]`, (B, N, D) and (B, K) indices of tokens → (B, K, D), as a copy of rows."""
    rows = index + x.shape[1] * torch.arange(len(x), device=x.device)[:, None]
    return x.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, index.shape)


def written(x: Tensor) -> Tensor:
    """`x`, contiguous. A compiler writes it to memory now instead of computing it anew at each use."""
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, weight, bias)`, (B, T, D) → (B, T, out); in float32 as a convolution where that was measured faster.

    On x86 torch leaves float32 products to MKL, which is slow on AMD's processors, and convolutions to oneDNN.
    """
    plain = not as_convolution or x.device.type != "cpu" or x.dtype != torch.float32 or x.ndim != 3
    if plain or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    columns = x[:, :, None].permute(0, 3, 1, 2)  # (B, D, T, 1)
    return F.conv2d(columns, weight[:, :, None, None], bias).permute(0, 2, 3, 1)[:, :, 0]


class Linear(nn.Linear):
    """`nn.Linear`, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √d + bias) v over (B, heads, tokens, d); a bias is (B or 1, heads, queries, keys).

    This is `F.scaled_dot_product_attention`, which takes several times as long as the plain products for short
    sequences in half precision on a CPU.
    """
    bias = None if bias is None else bias.to(q.dtype)
    if q.device.type == "cpu" and q.dtype.itemsize == 2 and q.shape[-2] * k.shape[-2] <= PLAIN_SCORES:
        with torch.autocast("cpu", enabled=False):  # else scores go through float32 and back; softmax adds in it
            scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
            return (scores if bias is None else scores + bias).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def compiled(network: nn.Module, device: torch.device, accumulate: int = 1) -> nn.Module:
    """`torch.compile(network)`. One GPU gets each pass as one CUDA graph: a host launches small kernels too slowly.

    CUDA graphs do not add up the gradients of several parts of a batch, and do not go together with DDP.
    """
    whole = device.type == "cuda" and world_size() == 1 and accumulate == 1
    return torch.compile(network, mode="reduce-overhead" if whole else None)


def multiplies_bf16() -> bool:
    """Whether oneDNN multiplies in bf16 on this CPU, in hardware or not; where it does not, bf16 is hopelessly slow."""
    try:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):  # a torch without oneDNN
        return False


def seconds(rounds: int = 3) -> dict[str, float]:
    """Processor time of a linear layer's forward and backward pass, on 32 images of 17 tokens, in each way there is.

    On one thread and by its own clock, so that what else the machine does counts little; the ways take turns.
    """
    ways = ["product"] + ["convolution"] * torch.backends.mkldnn.is_available() + ["bf16"] * multiplies_bf16()
    x, weight, bias = torch.ones(32, 17, 192), torch.ones(768, 192), torch.ones(768)
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    found, threads, before = dict.fromkeys(ways, float("inf")), torch.get_num_threads(), as_convolution
    torch.set_num_threads(1)
    try:
        for way in ways * rounds:
            begin = time.thread_time()
            use(way)
            with torch.autocast("cpu", torch.bfloat16, enabled=way == "bf16"):
                torch.autograd.grad(linear(x, weight, bias).sum(), inputs)
            found[way] = min(found[way], time.thread_time() - begin)
    finally:
        use("convolution" if before else "product")
        torch.set_num_threads(threads)
    return found


@functools.cache
def measured() -> dict[str, str]:
    """What is fastest on this CPU: `precision`, fp32 or bf16, and for `linear` in fp32 product or convolution.

    It takes less than a tenth of a second, once per process. A run records what it took, so that it can go on alike.
    Where both ways are about as fast, $MINMIM_LINEAR names one, so that two runs have the same bits.
    """
    t, linear = seconds(), os.environ.get("MINMIM_LINEAR")
    if linear not in t.keys() - {"bf16"}:
        linear = "convolution" if 1.2 * t.get("convolution", float("inf")) < t["product"] else "product"
    return dict(precision="bf16" if t.get("bf16", float("inf")) < t[linear] else "fp32", linear=linear)


def use(way: str | None) -> None:
    """Have `linear` compute float32 products in a way that `measured` names; None is as "product"."""
    global as_convolution
    as_convolution = way == "convolution"
