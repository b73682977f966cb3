"""The protocols of evaluate.py by name: each says what an encoder is worth on every validation image.

What follows after the features is small for kNN and the fast linear probe, so every rank does all of it and comes to
the same numbers. The other protocols train; classifier.py has the table of what learns.
"""

import argparse
import copy
import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from common import ViT, pair
from downstream.classifier import Classifier
from downstream.probes import accuracy, extract, knn, linear_probe, of_all
from downstream.recipes import Recipe, recipe_for
from downstream.training_loop import Kept, train
from inputs.image_sets import ImageSet
from runtime.command_line import settle
from runtime.encoders import untrained


@dataclass(frozen=True)
class Task:
    """An encoder, the two halves of an image set, and every option of every protocol."""

    encoder: ViT
    train_set: ImageSet
    val_set: ImageSet
    device: torch.device
    features: str = "mean"  # of the patch tokens, or "cls"
    batch_size: int = 256  # images encoded at a time, on each rank
    precision: str = "auto"  # bf16 on CUDA; elsewhere float32, or in training what is fast
    k: int = 20  # neighbours
    tau: float = 0.07  # their temperature
    # Of the protocols that train:
    recipe: Recipe | None = None  # the demo's, where none is given
    paper: bool = False  # the linear probe of the papers, by LARS
    blocks: int = 1  # that partial fine-tuning trains
    seed: int = 0  # of the first training
    seeds: int = 1  # trainings
    accumulate: int = 1  # parts of a step
    directory: Path | None = None  # for checkpoints and logs
    resume: bool = True  # from there

    @property
    def classes(self) -> int:
        return len(self.train_set.classes)

    @cached_property
    def vectors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features and labels of the training set, then of the validation set; encoded once for all protocols."""
        how = self.device, self.batch_size, self.precision, self.features
        return *extract(self.encoder, self.train_set, *how), *extract(self.encoder, self.val_set, *how)


KEPT_LIMIT = 16 << 30  # bytes of a frozen encoder's output to hold; above, images are encoded anew each epoch


def trained(task: Task, protocol: str) -> dict:
    """Train, then measure; over several seeds the mean and the sample standard deviation."""
    recipe = task.recipe or recipe_for("demo", protocol, task.blocks)
    machine = argparse.Namespace(precision=task.precision, compile=False, resume="auto" if task.resume else "never",
                                 out=task.directory and task.directory / f"seed-{task.seed}")  # fmt: skip
    settle(machine, task.device)
    source, results = task.train_set, []
    for seed in range(task.seed, task.seed + task.seeds):
        encoder = untrained(task.encoder, seed) if protocol == "supervised" else copy.deepcopy(task.encoder)
        classifier = Classifier(encoder, recipe, task.classes, protocol, task.blocks, seed).eval()
        how = (encoder.image_size, task.device, task.batch_size, machine.precision)
        if source is task.train_set and classifier.blocks < classifier.depth and not recipe.augments:
            values = classifier.frozen(torch.zeros(1, 3, *pair(encoder.image_size), device=task.device)).numel()
            if 4 * values * len(source) <= KEPT_LIMIT:
                source = Kept(*of_all(classifier.frozen, source, *how))  # for all seeds
        folder = task.directory and task.directory / f"seed-{seed}"
        train(
            classifier, source, task.classes, recipe, task.device, seed, folder, machine.precision, task.accumulate,
            task.resume,
        )  # fmt: skip
        results.append(accuracy(*of_all(classifier.logits, task.val_set, *how)))
    how = {"precision": machine.precision}
    if task.seeds == 1:
        return results[0] | how
    columns = [[result[key] for result in results] for key in ("top1", "top5")]
    (top1, top5), (std1, std5) = (list(map(f, columns)) for f in (statistics.mean, statistics.stdev))
    found = dict(top1=top1, top5=top5, top1_std=std1, top5_std=std5, n=results[0]["n"])
    return found | dict(each=results) | how


PROTOCOLS = ("knn", "linear", "attentive", "partial", "finetune", "supervised")


def measure(task: Task, protocol: str) -> dict:
    if protocol == "knn":
        return knn(*task.vectors, task.classes, task.k, task.tau)
    if protocol == "linear" and not task.paper:
        return linear_probe(*task.vectors, task.classes)
    return trained(task, protocol)


def evaluate(encoder: ViT, train_set, val_set, protocols, device, **options) -> dict[str, dict]:
    """{protocol: {"top1", "top5" in per cent, "n" validation images, …}}; `options` are the other fields of Task."""
    task = Task(encoder, train_set, val_set, torch.device(device), **options)
    return {name: measure(task, name) for name in protocols}
