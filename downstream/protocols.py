"""The protocols of evaluate.py by name: each says what an encoder is worth on every validation image.

Two need no training: nearest neighbours, and a linear classifier that is fitted to fixed features. For these each image
becomes one vector: the encoder sees the whole image, unmasked and cropped at the centre, and its final-norm tokens are
averaged over the patches, or its class token is taken. Under torchrun the ranks share the images. What follows is
small, so every rank does all of it on all features and comes to the same numbers. The other protocols train;
classifier.py has the table of what learns.
"""

import argparse
import copy
import statistics
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from common import ViT, pair
from downstream.classifier import Classifier
from downstream.recipes import Recipe, recipe_for
from downstream.training_loop import Kept, train
from inputs import augment
from inputs.image_sets import ImageSet
from runtime import process
from runtime.command_line import settle
from runtime.encoder_files import untrained
from runtime.errors import InputError
from runtime.ranks import gather_over_ranks, rank, world_size

PROTOCOLS = ("knn", "linear", "attentive", "partial", "finetune", "supervised")
SIMILARITIES = 2**26  # that kNN holds at a time: 256 MB
PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # that the linear probe chooses from
KEPT_LIMIT = 16 << 30  # bytes of a frozen encoder's output to hold; above, images are encoded anew each epoch


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
        scored = partial(while_training, classifier, task.val_set, how, recipe.epochs, len(source))
        train(
            classifier, source, task.classes, recipe, task.device, seed, folder, machine.precision, task.accumulate,
            task.resume, scored if classifier.blocks == classifier.depth else None,
        )  # fmt: skip
        results.append(accuracy(*of_all(classifier.logits, task.val_set, *how)))
    how = {"precision": machine.precision}
    if task.seeds == 1:
        return results[0] | how
    columns = [[result[key] for result in results] for key in ("top1", "top5")]
    (top1, top5), (std1, std5) = (list(map(f, columns)) for f in (statistics.mean, statistics.stdev))
    found = dict(top1=top1, top5=top5, top1_std=std1, top5_std=std5, n=results[0]["n"])
    return found | dict(each=results) | how


def while_training(classifier: Classifier, val_set, how: tuple, epochs: int, images: int, epoch: int) -> dict:
    """Top-1 accuracy between two epochs of fine-tuning on so many images, in the last epoch and every so many before.

    It takes at most about a tenth of the time: a backward pass takes as long as two forward.
    """
    if (epochs - epoch) % -(-10 * len(val_set) // (3 * images)):
        return {}
    classifier.eval()
    found = accuracy(*of_all(classifier.logits, val_set, *how))
    classifier.train()
    return {"top1": found["top1"]}


def measure(task: Task, protocol: str) -> dict:
    if protocol == "knn":
        return knn(*task.vectors, task.classes, task.k, task.tau)
    if protocol == "linear" and not task.paper:
        return linear_probe(*task.vectors, task.classes)
    return trained(task, protocol)


def evaluate(encoder: ViT, train_set, val_set, protocols, device, **options) -> dict[str, dict]:
    """{protocol: {"top1", "top5" in per cent, "n" validation images, …}}; `options` are the other fields of Task."""
    task = Task(encoder, train_set, val_set, torch.device(device), **options)
    with augment.views_for(encoder):
        return {name: measure(task, name) for name in protocols}


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
    """`function` of all images of a set, whole and normalised (B, 3, *size): (n, …) float32, and labels (n,).

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
    for images, index in tqdm(batches, name, len(orders), unit="batch", leave=False, disable=not alone, delay=2):
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


@torch.no_grad()
def knn(train_features, train_labels, features, labels, classes: int, k: int = 20, tau: float = 0.07) -> dict:
    """Weighted kNN of Wu et al. (arXiv 1805.01978, §3.4), as in DINO: neighbour j votes with exp(cos(x, x_j) / τ).

    Features are (n_train, D) and (n, D). Where there are fewer than k training images, all are neighbours.
    """
    if k < 1 or tau <= 0:
        raise InputError(f"kNN with k {k} and tau {tau:g}: there must be a neighbour and a positive temperature")
    bank, queries = F.normalize(train_features, dim=1), F.normalize(features, dim=1)
    votes = []
    for chunk in queries.split(max(1, SIMILARITIES // len(bank))):
        similarity, neighbours = (chunk @ bank.T).topk(min(k, len(bank)))  # (b, k) each
        weights = (similarity / tau).softmax(dim=1)  # exp(sim/τ) up to a factor per query, which no vote feels
        vote = torch.zeros(len(chunk), classes, device=chunk.device)
        for j in range(weights.shape[1]):  # one by one, so that CUDA adds in a fixed order
            vote.scatter_add_(1, train_labels[neighbours[:, j : j + 1]], weights[:, j : j + 1])
        votes.append(vote)
    return accuracy(torch.cat(votes), labels)


def linear_probe(train_features, train_labels, features, labels, classes: int, penalties=PENALTIES) -> dict:
    """Multinomial logistic regression on standardised features, its L2 penalty chosen on a tenth of the training set.

    Nothing is random: the split is fixed, the problem convex, and it is solved to convergence.
    """
    std, mean = torch.std_mean(train_features, dim=0, correction=0)
    x, z, y = (train_features - mean) / (std + 1e-6), (features - mean) / (std + 1e-6), train_labels
    held, losses = held_out(y), {}
    for penalty in tqdm(penalties, "linear probe", leave=False, disable=rank() > 0):
        weights = fit(x[~held], y[~held], classes, penalty)
        # Cross entropy has its clear minimum where accuracy on so few images is a matter of luck.
        losses[penalty] = F.cross_entropy(logits(x[held], weights), y[held]).item()
    penalty = min(losses, key=losses.get)
    return {**accuracy(logits(z, fit(x, y, classes, penalty)), labels), "penalty": penalty}


def held_out(labels: Tensor) -> Tensor:
    """(n,) bool: the first, eleventh, … image of each class that has more than one."""
    order, count = labels.argsort(stable=True), labels.bincount()
    place = torch.empty_like(labels)  # which of its class an image is
    place[order] = torch.arange(len(labels), device=labels.device) - (count.cumsum(0) - count)[labels[order]]
    return (place % 10 == 0) & (count > 1)[labels]


def logits(x: Tensor, weights: Tensor) -> Tensor:
    """(n, D), (1 + D, classes) → (n, classes); row 0 of the weights is the bias."""
    return torch.addmm(weights[0], x, weights[1:])


@torch.enable_grad()
def fit(x: Tensor, y: Tensor, classes: int, penalty: float) -> Tensor:
    """Minimise mean cross entropy + penalty/2 · ‖W‖² over W and a free bias → (1 + D, classes).

    Features are strongly correlated, so L-BFGS works on U in W = V (Λ + classes · penalty)^(-1/2) U, with V Λ Vᵀ the
    features' covariance: the Hessian at W = 0 becomes a multiple of one, and tens of steps do where 500 did not.
    """
    variance, basis = torch.linalg.eigh((x.T @ x / len(x)).double().cpu())
    basis = (basis * (variance.clamp_min(0) + classes * penalty).rsqrt()).to(x)
    u = torch.zeros(1 + x.shape[1], classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [u], max_iter=200, tolerance_grad=1e-5, tolerance_change=0, history_size=20, line_search_fn="strong_wolfe"
    )

    def weights():
        return torch.cat([u[:1], basis @ u[1:]])

    def closure():
        optimizer.zero_grad()
        loss = penalty / 2 * weights()[1:].square().sum()
        loss.backward()
        for rows, answers in zip(x.split(2**16), y.split(2**16), strict=True):  # the full batch, in bearable pieces
            part = F.cross_entropy(logits(rows, weights()), answers, reduction="sum") / len(x)
            part.backward()
            loss = loss.detach() + part.detach()
        return loss

    optimizer.step(closure)
    return weights().detach()
