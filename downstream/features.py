"""The features that a frozen encoder gives of all images of a set, and the accuracy of scores.

Each image becomes one vector: the encoder sees the whole image, unmasked and cropped at the centre, and its final-norm
tokens are averaged over the patches, or its class token is taken. Under torchrun the ranks share the images, and every
rank gets all features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from common import ViT, pair
from inputs import augment
from runtime import process
from runtime.errors import InputError
from runtime.ranks import gather_over_ranks, rank, world_size


def extract(
    encoder: ViT, image_set, device, batch_size: int = 256, precision: str = "auto", features: str = "mean"
) -> tuple[Tensor, Tensor]:
    """Features (n, D) float32 and labels (n,) of a set of n images, in its order and on every rank."""

    def feature(images: Tensor) -> Tensor:
        tokens = encoder(images).float()  # (B, 1 + N, D)
        return tokens[:, 0] if features == "cls" else tokens[:, 1:].mean(dim=1)

    was_training = encoder.training
    encoder.eval()
    x, labels = of_all(feature, image_set, encoder.image_size, device, batch_size, precision)
    encoder.train(was_training)
    if not x.isfinite().all():
        raise InputError(f"encoder: its features of {image_set.name} are not finite; train it with a smaller --lr")
    return x, labels


@torch.no_grad()
def of_all(function, image_set, size, device, batch_size: int = 256, precision: str = "auto") -> tuple[Tensor, Tensor]:
    """`function` of all images of a set, whole and normalised (B, 3, size, size): (n, …) float32, and labels (n,).

    Each rank takes one block of the set; the last blocks may be shorter or empty. Images that do not decode are left
    out, where the set skips them. Precision "auto" is bf16 on GPUs that have it and float32 elsewhere.
    """
    device, n, labels = torch.device(device), len(image_set), image_set.labels  # an error, if there are none
    precision = {"auto": "bf16" if process.has_bf16(device) else "fp32"}.get(precision, precision)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    block = -(-n // world_size())
    first = min(rank() * block, n)
    mine = torch.arange(first, min(first + block, n))
    shape = function(torch.zeros(1, 3, *pair(size), device=device)).shape[1:]  # a rank without images has to know
    found = torch.zeros(block, 1 + shape.numel(), device=device)  # column 0 is 1 where an image has come
    orders = mine.split(batch_size) if len(mine) else ()
    batches, name, alone = image_set.batches(orders, device), image_set.name, rank() == 0
    for images, index in tqdm(batches, name, len(orders), unit="batch", leave=False, disable=not alone):
        images = augment.normalize(augment.center_crop_resize(images, size))
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            x = function(images).float().flatten(1)
        row = index.to(device) - first
        inside = (row >= 0) & (row < len(mine))  # a bad image's substitute may be another rank's, or come twice
        found[row[inside]] = F.pad(x, (1, 0), value=1.0)[inside]
    found = gather_over_ranks(found)[:n]  # blocks are filled in order, so that all padding is at the end
    came = found[:, 0] == 1
    x = found[:, 1:] if came.all() else found[came, 1:]  # no second copy of what may be gigabytes
    return x.unflatten(1, shape), labels.to(device)[came]


def accuracy(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Scores (n, classes) and labels (n,) → top1 and top5 in per cent; with fewer than five classes top5 is 100.

    Of equal scores the lower class goes first, and a score that is not a number comes last: the same on any device.
    """
    classes = torch.arange(scores.shape[1], device=scores.device)
    own = scores.gather(1, labels[:, None])
    beaten = (scores < own) | ((scores == own) & (classes > labels[:, None]))
    place = scores.shape[1] - 1 - beaten.sum(dim=1)  # 0 is the first
    top1, top5 = (100 * (place < k).sum().item() / len(labels) for k in (1, 5))
    return {"top1": top1, "top5": top5, "n": len(labels)}
