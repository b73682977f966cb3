"""What is measured of a method while it trains, if asked for. The training is the same, bit for bit, as without it."""

import torch
from torch import nn

from common import ViT
from downstream.protocols import evaluate
from inputs import image_sets
from runtime.errors import InputError

LEAST = {"train": 1000, "val": 500}  # images of a probe


class Watch:
    """kNN of the encoder, each time on the same images: an eighth of either half of the set, evenly spaced.

    They are at least LEAST, where there are as many, and at most ten times that, so that a probe takes seconds. All
    ranks take part in it.
    """

    def __init__(self, args, method: nn.Module, device: torch.device):
        self.args, self.method, self.device, self.sets = args, method, device, []
        if not args.probe_every:
            return
        if not isinstance(method.encoder, ViT):  # a tokenizer, say
            raise InputError(f"--probe-every {args.probe_every}: {args.method} learns no ViT; leave it out")
        for split, least in LEAST.items():
            whole = image_sets.open_for(args, split)
            _ = whole.labels  # an error, if there are none
            self.sets.append(whole.spaced(min(max(least, len(whole) // 8), 10 * least)).to(device))

    def knn(self) -> float:
        """Top-1 accuracy in per cent."""
        how = dict(batch_size=64, precision=self.args.precision)
        return evaluate(self.method.encoder, *self.sets, ["knn"], self.device, **how)["knn"]["top1"]
