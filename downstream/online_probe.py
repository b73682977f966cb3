"""What is measured of a method while it trains, if asked for. The training is the same, bit for bit, as without it."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common import ViT
from downstream.protocols import evaluate
from inputs import image_sets
from runtime.errors import InputError
from runtime.ranks import world_size

LEAST, MOST = 300, 10_000  # images of either half that a probe sees


class Watch:
    """kNN of the encoder after some epochs, and the gradient of each loss on it in some steps. All ranks take part.

    kNN sees the same images each time: a twenty-fifth of either half of the set, evenly spaced, but at least LEAST,
    where there are as many, and at most MOST. Gradients are those of the method in float32, neither compiled nor by
    DDP, which leaves the step's own passes as they are.
    """

    def __init__(self, args, method: nn.Module, device: torch.device):
        self.args, self.method, self.device, self.sets = args, method, device, []
        self.weights = [p for p in method.encoder.parameters() if p.requires_grad]
        self.gradients: dict[str, Tensor] = {}  # of the step at hand, each flat and summed over its parts
        if args.log_gradients and not self.weights:  # a momentum encoder that is kept, say
            what = f"the encoder that {args.method} keeps so learns by no gradient"
            raise InputError(f"--log-gradients {args.log_gradients}: {what}; leave it out")
        if not args.probe_every:
            return
        if not isinstance(method.encoder, ViT):  # a tokenizer, say
            raise InputError(f"--probe-every {args.probe_every}: {args.method} learns no ViT; leave it out")
        for split in ("train", "val"):
            whole = image_sets.open_for(args, split)
            _ = whole.labels  # an error, if there are none
            self.sets.append(whole.spaced(min(max(LEAST, len(whole) // 25), MOST)).to(device))

    def see(self, step: int, batch) -> None:
        """What a step, counted from 1, is about to learn from, or a part of it: its gradients are kept if due."""
        if not self.args.log_gradients or step % self.args.log_gradients:
            return
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):  # the step drops these paths
            losses = self.method(batch)
        for name, loss in losses.items():
            if loss.requires_grad:
                found = torch.autograd.grad(loss, self.weights, retain_graph=True, materialize_grads=True)
                flat = torch.cat([g.flatten() for g in found]) / (world_size() * self.args.accumulate)
                self.gradients[name] = self.gradients.get(name, 0) + flat

    def measured(self, probe: bool) -> dict[str, float]:
        """Norms of the step's gradients over all ranks; with `probe`, kNN's top-1 accuracy in per cent."""
        found = {}
        for name, gradient in self.gradients.items():
            if world_size() > 1:
                dist.all_reduce(gradient)
            found[f"gradient_{name}"] = gradient.norm().item()
        self.gradients = {}
        if probe:
            how = dict(batch_size=64, precision=self.args.precision)
            found["knn"] = evaluate(self.method.encoder, *self.sets, ["knn"], self.device, **how)["knn"]["top1"]
        return found
