"""What a frozen encoder's features are worth: weighted kNN, and a linear probe on cached features.

    python evaluate.py --run runs/cmae-shapes --protocol knn
    torchrun --nproc_per_node=2 -- evaluate.py --run runs/cmae-shapes --protocol linear --untrained

(The bare -- keeps torchrun of Python 3.11 and older from taking --run for an option of its own.)

Each image becomes one vector: the encoder sees all of it, unmasked and centre-cropped, and its final-norm tokens are
averaged over the patches (or the class token is taken). Under torchrun the ranks share the encoding; what follows is
small, so every rank does all of it and comes to the same numbers.
"""

import argparse
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import augment
import data
import launch
from common import InputError, ViT, gather_over_ranks, rank, world_size
from weights import TARGETS, load_encoder, untrained, write_export

# ---------------------------------------------------------------------------------------------------------- features


@torch.no_grad()
def extract(
    encoder: ViT, image_set, device, batch_size: int = 256, precision: str = "auto", features: str = "mean"
) -> tuple[Tensor, Tensor]:
    """Features (n, D) float32 and labels (n,) of a set of n images, in its order and on every rank.

    Each rank encodes one block of the set; the last blocks may be shorter or empty. Images that do not decode are left
    out, where the set skips them. Precision "auto" is bf16 on CUDA and float32 elsewhere.
    """
    device, n = torch.device(device), len(image_set)
    bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    block = -(-n // world_size())
    first = min(rank() * block, n)
    mine = torch.arange(first, min(first + block, n))
    found = torch.zeros(block, 1 + encoder.width, device=device)  # column 0 is 1 where an image has come
    orders = mine.split(batch_size) if len(mine) else ()
    batches = tqdm(
        image_set.batches(orders, device), image_set.name, len(orders), unit="batch", leave=False, disable=rank() > 0
    )
    was_training = encoder.training
    encoder.eval()
    for images, index in batches:
        images = augment.normalize(augment.center_crop_resize(images, encoder.image_size))
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            tokens = encoder(images).float()  # (B, 1 + N, D)
        x = tokens[:, 0] if features == "cls" else tokens[:, 1:].mean(dim=1)
        row = index.to(device) - first
        inside = (row >= 0) & (row < len(mine))  # a bad image's substitute may be another rank's, or come twice
        found[row[inside]] = F.pad(x, (1, 0), value=1.0)[inside]
    encoder.train(was_training)
    found = gather_over_ranks(found)[:n]  # blocks are filled in order, so that all padding is at the end
    came, x = found[:, 0] == 1, found[:, 1:]
    if not x.isfinite().all():
        raise InputError(f"encoder: its features of {image_set.name} are not finite; train it with a smaller --lr")
    return x[came], image_set.labels.to(device)[came]


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


# --------------------------------------------------------------------------------------------------------------- kNN

SIMILARITIES = 2**26  # to hold at a time: 256 MB


@torch.no_grad()
def knn(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    classes: int,
    k: int = 20,
    tau: float = 0.07,
) -> dict[str, float]:
    """Weighted kNN of Wu et al. (arXiv 1805.01978, §3.4), as in DINO: neighbour j votes with exp(cos(x, x_j) / τ).

    Features are (n_train, D) and (n, D). Fewer than k training images all become neighbours.
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


# ------------------------------------------------------------------------------------------------------ linear probe

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)


def linear_probe(
    train_features: Tensor, train_labels: Tensor, features: Tensor, labels: Tensor, classes: int, penalties=PENALTIES
) -> dict[str, float]:
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


# --------------------------------------------------------------------------------------------------------- protocols


@dataclass(frozen=True)
class Task:
    """An encoder, the two halves of an image set, and every option of every protocol."""

    encoder: ViT
    train_set: data.ImageSet
    val_set: data.ImageSet
    device: torch.device
    features: str = "mean"  # of the patch tokens, or "cls"
    batch_size: int = 256  # images a step, on each rank
    precision: str = "auto"  # bf16 on CUDA, float32 elsewhere
    k: int = 20  # neighbours
    tau: float = 0.07  # their temperature

    @property
    def classes(self) -> int:
        return len(self.train_set.classes)

    @cached_property
    def vectors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features and labels of the training set, then of the validation set; encoded once for all protocols."""
        return tuple(
            x
            for half in (self.train_set, self.val_set)
            for x in extract(self.encoder, half, self.device, self.batch_size, self.precision, self.features)
        )


PROTOCOLS = {
    "knn": lambda task: knn(*task.vectors, task.classes, task.k, task.tau),
    "linear": lambda task: linear_probe(*task.vectors, task.classes),
}


def evaluate(encoder: ViT, train_set, val_set, protocols, device, **options) -> dict[str, dict]:
    """{protocol: {"top1", "top5" in per cent, "n" validation images, …}}; `options` are the other fields of Task."""
    task = Task(encoder, train_set, val_set, torch.device(device), **options)
    return {name: PROTOCOLS[name](task) for name in protocols}


# ----------------------------------------------------------------------------------------------------------- command


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure the encoder of a run.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--run", required=True, metavar="DIR", help="a run's directory, or weights: see weights.py")
    what, unset = parser.add_mutually_exclusive_group(required=True), argparse.SUPPRESS
    what.add_argument("--protocol", choices=PROTOCOLS, help="how to measure")
    what.add_argument("--export", default=unset, choices=TARGETS, help="write the encoder for timm or transformers")
    parser.add_argument("--to", default=unset, metavar="PATH", help="where to (default: timm.pt or hf, beside it)")
    parser.add_argument("--heads", default=unset, type=int, metavar="H", help="of weights whose width does not tell")
    parser.add_argument("--untrained", action="store_true", help="the same encoder at its initial weights")
    group = parser.add_argument_group("images (as the run's, unless given)", argument_default=argparse.SUPPRESS)
    group.add_argument("--data", metavar="SET", help="shapes, tiny-imagenet, cifar10, cifar100, imagenet, or a folder")
    group.add_argument("--data-root", metavar="DIR", help="where the images of a named set are or shall be")
    group.add_argument("--classes", type=int, metavar="K", help="only the first K classes")
    group.add_argument("--download", action="store_true", help="fetch the set if it is not there")
    group.add_argument("--skip-bad-images", action="store_true", help="count images that do not decode, and go on")
    group = parser.add_argument_group("features")
    group.add_argument("--features", default=Task.features, choices=["mean", "cls"], help="patch mean or class token")
    group.add_argument("--batch-size", type=int, default=Task.batch_size, metavar="B", help="images a step and process")
    group.add_argument("--precision", default=Task.precision, choices=["auto", "fp32", "bf16"], help="of the encoder")
    group.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where to work")
    group = parser.add_argument_group("kNN")
    group.add_argument("--k", type=int, default=Task.k, metavar="K", help="neighbours that vote")
    group.add_argument("--tau", type=float, default=Task.tau, metavar="T", help="temperature of their votes")
    return parser.parse_args()


def run_settings(directory: Path) -> dict:
    """What the run was started with, from its config.json; nothing where there is none."""
    file = directory / "config.json"
    try:
        return dict(json.loads(file.read_text()).get("settings", {})) if file.exists() else {}  # transformers' has none
    except (OSError, ValueError, TypeError, AttributeError):
        raise InputError(f"{file}: not a run's configuration; give one that train.py wrote") from None


def main() -> None:
    args = options()
    if args.batch_size < 1:
        raise InputError(f"batch size {args.batch_size}: must be at least 1")
    if "to" in args and "export" not in args:
        raise InputError(f"--to {args.to}: says where an encoder is written to; give --export too")
    device = launch.start(args.device)
    encoder = load_encoder(args.run, device, heads=vars(args).get("heads"))
    directory = Path(args.run) if Path(args.run).is_dir() else Path(args.run).parent
    settings = run_settings(directory)
    if args.untrained:
        encoder = untrained(encoder, settings.get("seed", 0))
    if "export" in args:
        if rank() == 0:
            to = vars(args).get("to") or directory / TARGETS[args.export]
            print(write_export(encoder, args.export, to), flush=True)
        return launch.stop()
    images = ("data", "data_root", "classes", "download", "skip_bad_images")
    args = argparse.Namespace(**{name: settings.get(name) for name in images} | vars(args))
    if args.data is None:
        raise InputError(f"{directory}: has no config.json that names its images; give --data")
    sets = [
        data.open_set(args.data, args.data_root, half, download=args.download, skip_bad_images=args.skip_bad_images)
        for half in ("train", "val")
    ]
    sets = [(half.subset(classes=args.classes) if args.classes else half).to(device) for half in sets]
    result = evaluate(
        encoder, *sets, [args.protocol], device, features=args.features, batch_size=args.batch_size,
        precision=args.precision, k=args.k, tau=args.tau,
    )[args.protocol]  # fmt: skip
    if rank() == 0:
        result = {"protocol": args.protocol, **result, **vars(args), "device": str(device), "processes": world_size()}
        print(json.dumps(result), flush=True)
        name = f"evaluate-{args.protocol}{'-untrained' if args.untrained else ''}.json"
        launch.write_text(directory / name, json.dumps(result, indent=1) + "\n")
    launch.stop()


if __name__ == "__main__":
    launch.command(main)
