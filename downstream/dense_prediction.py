"""What segmentation and detection share: images fitted into a square, an encoder's patches as a map, training, scores.

Images are scaled to fit a square and padded at the right and below; scores are taken at each image's own size. What is
random about image i in an epoch is a function of (seed, epoch, i), so it does not matter which process reads it.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from common import ViT
from downstream.training_loop import take_step
from inputs import augment, images_in_files
from runtime.errors import InputError
from runtime.optimization import learning_rate, parameter_groups
from runtime.randomness import epoch_order


class Sample(NamedTuple):
    index: int  # in its set
    image: Tensor  # (3, S, S), normalised, padded with zeros
    planes: Tensor  # labels (1, S, S) or masks (n, S, S) in training; as they were read in tests
    kinds: Tensor  # (n,) int64, of the masks
    size: tuple[int, int]  # of the image as it was read
    fitted: tuple[int, int]  # of what of it is in the square, at its upper left


def fit(image: Tensor, planes: Tensor, fill: int, size: int, rng: np.random.Generator | None, jitter=(1.0, 1.0)):
    """Scale an image to fit the square. With `rng`: its planes too, by a jittered scale; crop and mirror both."""
    scale = size / max(image.shape[1:]) * (rng.uniform(*jitter) if rng else 1)
    h, w = (max(1, round(side * scale)) for side in image.shape[1:])
    image = augment.normalize(augment.resize(image[None], (h, w)))[0]
    if rng:
        planes = F.interpolate(planes[None], (h, w), mode="nearest-exact")[0]
        top, left = (int(rng.integers(max(0, side - size) + 1)) for side in (h, w))
        image, planes = (x[:, top : top + size, left : left + size] for x in (image, planes))
        if rng.random() < 0.5:
            image, planes = image.flip(2), planes.flip(2)
        h, w = image.shape[1:]
        planes = F.pad(planes, (0, size - w, 0, size - h), value=fill)
    return F.pad(image, (0, size - w, 0, size - h)), planes, (h, w)


class Reader(torch.utils.data.Dataset):
    """(epoch, i) → the Sample of image i, its augmentation a function of (seed, epoch, i); without a seed, none."""

    def __init__(self, images, size: int, seed: int | None = None, jitter=(1.0, 1.0)):
        self.images, self.size, self.seed, self.jitter = images, size, seed, jitter

    def __getitem__(self, key: tuple[int, int]) -> Sample | InputError:
        epoch, i = key
        try:
            image, planes, kinds = self.images.read(i)
        except InputError as error:  # handed over, as a DataLoader would wrap it in a traceback
            return error
        rng = None if self.seed is None else np.random.default_rng((self.seed, epoch, i))
        square, planes, fitted = fit(image, planes, self.images.fill, self.size, rng, self.jitter)
        return Sample(i, square, planes, kinds, tuple(image.shape[1:]), fitted)

    def batches(self, orders, workers: int) -> Iterator[list[Sample]]:
        loader = DataLoader(
            self, batch_sampler=orders, collate_fn=list, num_workers=workers, generator=torch.Generator(),
            worker_init_fn=images_in_files.leave_signals_to_parent,
        )  # fmt: skip
        for batch in loader:
            for sample in batch:
                if isinstance(sample, InputError):
                    raise sample
            yield batch


def decode(path: Path) -> Tensor:
    try:
        return images_in_files.decode(path)
    except InputError:  # whose advice is not for here
        raise InputError(f"{path}: missing, or does not decode as an image") from None


class Features(nn.Module):
    """An encoder as a dense backbone: normalised images (B, 3, S, S) → (B, D, h, w), its final-norm patch tokens.

    It alone runs in bf16: heads stay in float32, because boxes rounded to bf16 would be off by pixels.
    """

    def __init__(self, encoder: ViT, freeze: bool = False, bf16: bool = False):
        super().__init__()
        self.encoder, self.out_channels, self.bf16 = encoder.requires_grad_(not freeze), encoder.width, bf16
        self.freeze = freeze

    def train(self, mode: bool = True) -> "Features":
        super().train(mode)
        self.encoder.train(mode and not self.freeze)  # a frozen encoder drops no paths
        return self

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            tokens = self.encoder(images)[:, 1:]  # (B, N, D)
        return tokens.float().transpose(1, 2).unflatten(2, self.encoder.grid)


def fine_tune(model: nn.Module, reader: Reader, args, device: torch.device) -> None:
    """AdamW, a tenth of the steps to warm up, then a cosine to zero; the heads and, unless frozen, the encoder."""
    n, B = len(reader.images), args.batch_size
    if n < B:
        raise InputError(f"batch size {B}: larger than the {n} images to learn from")
    steps = args.epochs * (n // B)

    def orders():
        for epoch in range(args.epochs):
            keys = [(epoch, i) for i in epoch_order(args.seed, epoch, n).tolist()]
            yield from (keys[k : k + B] for k in range(0, n - B + 1, B))

    groups = parameter_groups(model, weight_decay=0.05)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=device.type in ("cpu", "cuda"))
    scaler = torch.amp.GradScaler(device.type, enabled=False)  # bf16 needs none
    model.train()
    with tqdm(reader.batches(orders(), args.workers), args.task, steps, unit="step", leave=False) as bar:
        for step, samples in enumerate(bar):
            rate = learning_rate(step, steps, steps // 10, args.lr)
            loss = take_step(optimizer, [model.loss(samples, device)], rate, scaler).item()
            if not math.isfinite(loss):
                raise InputError(f"loss: not finite in step {step + 1} of {steps}; give a smaller --lr")
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)


@torch.no_grad()
def measure(model: nn.Module, reader: Reader, args, device: torch.device) -> dict:
    n, B = len(reader.images), args.batch_size
    orders = [[(0, i) for i in range(k, min(k + B, n))] for k in range(0, n, B)]
    model.eval()
    with tqdm(reader.batches(orders, args.workers), "measure", len(orders), unit="batch", leave=False) as bar:
        return {**model.measure(reader.images, bar, device), "n": n}
