"""What an encoder is worth: kNN and a linear probe on its features, or what finetuning.py makes of it.

    python evaluate.py --run runs/cmae-shapes --protocol knn
    python evaluate.py --run runs/cmae-shapes --protocol finetune --seeds 3
    torchrun --nproc_per_node=2 -- evaluate.py --run runs/cmae-shapes --protocol linear --untrained

(The bare -- keeps torchrun of Python 3.11 and older from taking --run for an option of its own.)

For kNN and the fast linear probe each image becomes one vector: the encoder sees all of it, unmasked and
centre-cropped, and its final-norm tokens are averaged over the patches (or the class token is taken). Under torchrun
the ranks share the encoding; what follows is small, so every rank does all of it and comes to the same numbers. The
other protocols train, as the table in finetuning.py says. All are measured on every validation image, once.
"""

import argparse
import copy
import dataclasses
import json
import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from common import ViT, pair
from downstream import finetuning
from inputs import augment, image_sets
from runtime import files, process
from runtime.command_line import Help, Parser, field_comments, settle
from runtime.errors import InputError
from runtime.ranks import gather_over_ranks, rank, world_size
from runtime.weights import TARGETS, load_encoder, untrained, write_export

# ---------------------------------------------------------------------------------------------------------- features


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
    device, n = torch.device(device), len(image_set)
    precision = {"auto": "bf16" if process.has_bf16(device) else "fp32"}.get(precision, precision)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    block = -(-n // world_size())
    first = min(rank() * block, n)
    mine = torch.arange(first, min(first + block, n))
    shape = function(torch.zeros(1, 3, *pair(size), device=device)).shape[1:]  # a rank without images has to know
    found = torch.zeros(block, 1 + shape.numel(), device=device)  # column 0 is 1 where an image has come
    orders = mine.split(batch_size) if len(mine) else ()
    batches = tqdm(
        image_set.batches(orders, device), image_set.name, len(orders), unit="batch", leave=False, disable=rank() > 0
    )
    for images, index in batches:
        images = augment.normalize(augment.center_crop_resize(images, size))
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            x = function(images).float().flatten(1)
        row = index.to(device) - first
        inside = (row >= 0) & (row < len(mine))  # a bad image's substitute may be another rank's, or come twice
        found[row[inside]] = F.pad(x, (1, 0), value=1.0)[inside]
    found = gather_over_ranks(found)[:n]  # blocks are filled in order, so that all padding is at the end
    came = found[:, 0] == 1
    x = found[:, 1:] if came.all() else found[came, 1:]  # no second copy of what may be gigabytes
    return x.unflatten(1, shape), image_set.labels.to(device)[came]


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
    train_set: image_sets.ImageSet
    val_set: image_sets.ImageSet
    device: torch.device
    features: str = "mean"  # of the patch tokens, or "cls"
    batch_size: int = 256  # images encoded at a time, on each rank
    precision: str = "auto"  # bf16 on CUDA; elsewhere float32, or in training what is fast
    k: int = 20  # neighbours
    tau: float = 0.07  # their temperature
    # Of the protocols that train:
    recipe: finetuning.Recipe | None = None  # the demo's, where none is given
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
        return tuple(
            x
            for half in (self.train_set, self.val_set)
            for x in extract(self.encoder, half, self.device, self.batch_size, self.precision, self.features)
        )


KEPT_LIMIT = 16 << 30  # bytes of a frozen encoder's output to hold; above, images are encoded anew each epoch


def trained(task: Task, protocol: str) -> dict:
    """What finetuning.py makes of the encoder, measured; over several seeds mean and sample standard deviation."""
    recipe = task.recipe or finetuning.recipe_for("demo", protocol, task.blocks)
    machine = argparse.Namespace(precision=task.precision, compile=False, resume="auto" if task.resume else "never",
                                 out=task.directory and task.directory / f"seed-{task.seed}")  # fmt: skip
    settle(machine, task.device)
    source, results = task.train_set, []
    for seed in range(task.seed, task.seed + task.seeds):
        encoder = untrained(task.encoder, seed) if protocol == "supervised" else copy.deepcopy(task.encoder)
        classifier = finetuning.Classifier(encoder, recipe, task.classes, protocol, task.blocks, seed).eval()
        how = (encoder.image_size, task.device, task.batch_size, machine.precision)
        if source is task.train_set and classifier.blocks < classifier.depth and not recipe.augments:
            values = classifier.frozen(torch.zeros(1, 3, *pair(encoder.image_size), device=task.device)).numel()
            if 4 * values * len(source) <= KEPT_LIMIT:
                source = finetuning.Kept(*of_all(classifier.frozen, source, *how))  # for all seeds
        folder = task.directory and task.directory / f"seed-{seed}"
        finetuning.train(
            classifier, source, task.classes, recipe, task.device, seed, folder, machine.precision, task.accumulate,
            task.resume,
        )  # fmt: skip
        results.append(accuracy(*of_all(classifier.logits, task.val_set, *how)))
    how = {"precision": machine.precision}
    if task.seeds == 1:
        return results[0] | how
    columns = {key: [result[key] for result in results] for key in ("top1", "top5")}
    means = {key: statistics.mean(column) for key, column in columns.items()}
    deviations = {f"{key}_std": statistics.stdev(column) for key, column in columns.items()}
    return {**means, **deviations, "n": results[0]["n"], "each": results, **how}


PROTOCOLS = {
    "knn": lambda task: knn(*task.vectors, task.classes, task.k, task.tau),
    "linear": lambda task: trained(task, "linear") if task.paper else linear_probe(*task.vectors, task.classes),
    "attentive": lambda task: trained(task, "attentive"),
    "partial": lambda task: trained(task, "partial"),
    "finetune": lambda task: trained(task, "finetune"),
    "supervised": lambda task: trained(task, "supervised"),
}


def evaluate(encoder: ViT, train_set, val_set, protocols, device, **options) -> dict[str, dict]:
    """{protocol: {"top1", "top5" in per cent, "n" validation images, …}}; `options` are the other fields of Task."""
    task = Task(encoder, train_set, val_set, torch.device(device), **options)
    return {name: PROTOCOLS[name](task) for name in protocols}


# ----------------------------------------------------------------------------------------------------------- command


def options() -> argparse.Namespace:
    parser = Parser(description="Measure the encoder of a run.", formatter_class=Help, allow_abbrev=False)
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
    group = parser.add_argument_group("machine")
    group.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"], help="of the encoder")
    group.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where to work")
    group = parser.add_argument_group("kNN", argument_default=unset)
    group.add_argument("--k", type=int, metavar="K", help=f"neighbours that vote [{Task.k}]")
    group.add_argument("--tau", type=float, metavar="T", help=f"temperature of their votes [{Task.tau}]")
    group = parser.add_argument_group("protocols that train (linear only with --paper)", argument_default=unset)
    group.add_argument("--paper", action="store_true", default=unset, help="the papers' linear probe, by LARS")
    group.add_argument("--blocks", type=int, metavar="K", help=f"last blocks that partial trains [{Task.blocks}]")
    group.add_argument("--recipe", metavar="NAME", help=", ".join(finetuning.RECIPES))
    group.add_argument("--seed", type=int, metavar="N", help=f"of everything random [{Task.seed}]")
    group.add_argument("--seeds", type=int, metavar="N", help=f"trainings, for mean and deviation [{Task.seeds}]")
    group.add_argument("--accumulate", type=int, metavar="N", help=f"parts of a step, for memory [{Task.accumulate}]")
    group.add_argument("--resume", choices=["auto", "never"], help="continue what is in the run's directory [auto]")
    group = parser.add_argument_group("in place of the recipe's", argument_default=unset)
    comments = field_comments(finetuning.Recipe)
    for field in dataclasses.fields(finetuning.Recipe):
        kind = type(field.default)
        how = dict(action="store_true", default=unset) if kind is bool else dict(
            type=kind, metavar={int: "N", float: "X", str: "NAME"}[kind])  # fmt: skip
        group.add_argument(finetuning.flag(field.name), help=comments[field.name], **how)
    return parser.parse_args()


ENCODING = ("features", "batch_size")
TRAINING = ("recipe", "seed", "seeds", "accumulate", "resume", *(f.name for f in dataclasses.fields(finetuning.Recipe)))
USED = {  # the options, beyond those of all, that a protocol has a use for
    "knn": ("k", "tau", *ENCODING),
    "linear": ENCODING,
    "attentive": TRAINING,
    "partial": ("blocks", *TRAINING),
    "finetune": TRAINING,
    "supervised": TRAINING,
}


def task_options(args: argparse.Namespace, settings: dict) -> tuple[dict, dict]:
    """The command line → the fields of Task, and what of them to report."""
    given, paper = dict(vars(args)), "paper" in args and args.protocol == "linear"
    used = ("paper", *TRAINING) if paper else USED[args.protocol]
    for name in ("paper", *(name for names in USED.values() for name in names)):
        if name in given and name not in used:
            hint = " without --paper" if args.protocol == "linear" else ""
            raise InputError(f"{finetuning.flag(name)}: does nothing to protocol {args.protocol}{hint}; leave it out")
    given = {name: given[name] for name in used if name in given}
    for name in ("batch_size", "seeds", "accumulate"):
        if given.get(name, 1) < 1:
            raise InputError(f"{finetuning.flag(name)} {given[name]}: must be at least 1")
    if "recipe" not in used:
        if given.get("features", "mean") not in ("mean", "cls"):
            raise InputError(f"--features {given['features']!r}: unknown; choose one of mean, cls")
        return given, {name: given.get(name, getattr(Task, name)) for name in used}
    its_own = settings.get("method") if settings.get("method") in finetuning.RECIPES else "mae"
    name = given.pop("recipe", {"shapes": "demo", "imagenet": its_own}.get(args.data, "tiny"))
    fields = [field.name for field in dataclasses.fields(finetuning.Recipe)]
    own = {field: given.pop(field) for field in fields if field in given}
    blocks = given.get("blocks", Task.blocks)
    recipe = finetuning.recipe_for(name, args.protocol, blocks, own)
    idle = finetuning.IDLE[finetuning.kind_of(args.protocol, blocks)]
    report = {field: getattr(recipe, field) for field in fields if field not in idle}
    report |= dict(recipe=name, lr=recipe.peak, seed=given.get("seed", 0), seeds=given.get("seeds", 1))
    if args.protocol == "partial":
        report["blocks"] = blocks
    given["resume"] = given.get("resume") != "never"
    return given | dict(recipe=recipe), report


def run_settings(directory: Path) -> dict:
    """What the run was started with, from its config.json; nothing where there is none."""
    file = directory / "config.json"
    try:
        return dict(json.loads(file.read_text()).get("settings", {})) if file.exists() else {}  # transformers' has none
    except (OSError, ValueError, TypeError, AttributeError):
        raise InputError(f"{file}: not a run's configuration; give one that train.py wrote") from None


def main() -> None:
    args = options()
    if "to" in args and "export" not in args:
        raise InputError(f"--to {args.to}: says where an encoder is written to; give --export too")
    device = process.start(args.device)
    encoder = load_encoder(args.run, device, heads=vars(args).get("heads"))
    directory = Path(args.run) if Path(args.run).is_dir() else Path(args.run).parent
    settings = run_settings(directory)
    if args.untrained:
        encoder = untrained(encoder, settings.get("seed", 0))
    if "export" in args:
        if rank() == 0:
            to = vars(args).get("to") or directory / TARGETS[args.export]
            print(write_export(encoder, args.export, to), flush=True)
        return process.stop()
    images = ("data", "data_root", "classes", "download", "skip_bad_images")
    args = argparse.Namespace(**{name: settings.get(name) for name in images} | vars(args))
    if args.data is None:
        raise InputError(f"{directory}: has no config.json that names its images; give --data")
    if args.untrained and args.protocol == "supervised":
        raise InputError("--untrained: does nothing to protocol supervised, which is so anyway; leave it out")
    chosen, report = task_options(args, settings)
    sets = [
        image_sets.open_set(
            args.data, args.data_root, half, download=args.download, skip_bad_images=args.skip_bad_images
        )
        for half in ("train", "val")
    ]
    sets = [(half.subset(classes=args.classes) if args.classes else half).to(device) for half in sets]
    name = args.protocol + ("-paper" if "paper" in args else "")
    name += (f"-{report['blocks']}" if "blocks" in report else "") + ("-untrained" if args.untrained else "")
    result = evaluate(
        encoder, *sets, [args.protocol], device, precision=args.precision, directory=directory / name, **chosen
    )[args.protocol]
    if rank() == 0:
        about = vars(args) | report | dict(device=str(device), processes=world_size())
        result = {"protocol": args.protocol, **result, **(about | result)}
        print(json.dumps(result), flush=True)
        files.write_text(directory / f"evaluate-{name}.json", json.dumps(result, indent=1) + "\n")
    process.stop()


if __name__ == "__main__":
    process.command(main)
