"""The loop that trains probes, fine-tunes classifiers and, as `optimize`, whatever else has an encoder in it.

What is random in a step comes from (seed, step) and the batch is the global one, so neither a restart nor the number
of processes changes the result. Drop path is the exception, as in pretraining: its draws depend on that number.
"""

import json
import math
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from downstream.classifier import Classifier, trainable_parameters
from downstream.recipes import Recipe, augmented
from runtime import fast_paths, files
from runtime.errors import InputError
from runtime.fast_paths import upload
from runtime.optimization import learning_rate
from runtime.randomness import StepRandom, orders, rows_of_rank
from runtime.ranks import rank, sum_over_ranks, world_size

SAVE_EVERY = 30.0  # seconds between checkpoints, which are written at the ends of epochs
BAR = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}, {remaining} left]"
DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
EMBEDDINGS = ("encoder.patch_embed", "encoder.cls_token", "encoder.pos_embed")


def train(
    classifier: Classifier, source, classes: int, recipe: Recipe, device, seed: int = 0, directory: Path | None = None,
    precision: str = "fp32", accumulate: int = 1, resume: bool = True, measure: Callable | None = None,
) -> None:  # fmt: skip
    """Train in place on `source`, an ImageSet or what was `Kept` of one; ends in evaluation mode.

    `accumulate` divides a step into parts to save memory. Batch norm still sees the whole batch, as only the frozen
    layers before it work in parts. The other options are those of `optimize`.
    """
    autocast = partial(torch.autocast, device.type, DTYPES[precision], enabled=precision != "fp32")
    check_batch(recipe.batch_size, len(source), accumulate, bool(recipe.mixup or recipe.cutmix))
    per_epoch, share = len(source) // recipe.batch_size, recipe.batch_size // world_size()
    steps, warmup = recipe.epochs * per_epoch, round(recipe.warmup_epochs * per_epoch)
    settings = dict(
        asdict(recipe), kind=classifier.kind, blocks=classifier.blocks, classes=classes, images=len(source), seed=seed,
        precision=precision, accumulate=accumulate,
    )  # fmt: skip

    def loss(x: Tensor, targets: Tensor) -> Tensor:
        with autocast():
            scores = classifier(x)
        return F.cross_entropy(scores, targets, label_smoothing=recipe.smoothing) * len(x) / share

    def losses(todo) -> Iterator[Iterator[Tensor]]:
        for parts in prepared_steps(classifier, source, classes, recipe, device, seed, accumulate, autocast, todo):
            yield (loss(*part) for part in parts)

    def rate(step: int) -> float:
        return learning_rate(step, steps, warmup, recipe.peak, recipe.min_lr)

    what = f"{classifier.kind} {classifier.blocks}/{classifier.depth}"
    optimizer = optimizer_for(classifier, recipe, device)
    optimize(classifier, optimizer, rate, losses, steps, per_epoch, settings, device, what, directory, resume, measure)


def optimize(
    model: nn.Module, optimizer, rate: Callable, losses: Callable, steps: int, per_epoch: int, settings: dict, device,
    what: str, directory: Path | None = None, resume: bool = True, measure: Callable | None = None,
) -> None:  # fmt: skip
    """Take `steps` steps with `model`, which has an `encoder`; ends in evaluation mode.

    `rate(step)` is the learning rate. `losses(todo)` gives for each step of the range `todo` its losses, whose sum is
    this rank's; the ranks' are averaged. `settings` are what a checkpoint must agree with. With a `directory`,
    checkpoint.pt and log.jsonl lie there, and the same call continues. What `measure(epoch)` returns is logged.
    """
    scaler = torch.amp.GradScaler(device.type, enabled=settings["precision"] == "fp16")
    checksum = zlib.crc32(b"".join(x.cpu().numpy().tobytes() for x in model.encoder.state_dict().values()))
    views = {name: model.encoder.settings[name] for name in ("mean", "std")}
    settings |= views | dict(encoder=checksum, linear="convolution" if fast_paths.as_convolution else "product")
    run = Progress(directory, settings, model, dict(optimizer=optimizer, scaler=scaler), resume)
    model.train()
    begin, since, total = time.perf_counter(), run.step, torch.zeros((), device=device)
    with tqdm(total=steps, initial=run.step, desc=what, bar_format=BAR, leave=False, disable=rank() > 0) as bar:
        todo = range(run.step, steps)
        for step, parts in zip(todo, losses(todo), strict=True):
            torch.manual_seed(settings["seed"] + (step * world_size() + rank()) * 1_000_003)  # drop path draws from it
            total += take_step(optimizer, parts, now := rate(step), scaler)
            bar.update()
            epoch = -(-(step + 1) // per_epoch)
            if (step + 1) % per_epoch == 0 or step + 1 == steps:
                done = step + 1 - since
                loss = (sum_over_ranks(total) / world_size() / done).item()
                speed = done * settings["batch_size"] / (time.perf_counter() - begin)
                if not math.isfinite(loss):
                    raise InputError(f"loss: not finite in epoch {epoch}; try a lower --lr")
                row = dict(step=step + 1, epoch=epoch, loss=loss, lr=now, images_per_second=round(speed, 1))
                row |= measure(epoch) if measure else {}
                run.end_epoch(row, last=step + 1 == steps)
                bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} images/s", refresh=False)
                begin, since, total = time.perf_counter(), step + 1, torch.zeros((), device=device)
    model.eval()


@dataclass
class Kept:
    """What `Classifier.frozen` gave for all images of a set, in their order: x (n, …) and labels (n,)."""

    x: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, orders, device):
        yield from ((self.x[upload(order, device)], order) for order in orders)


def check_batch(batch_size: int, images: int, accumulate: int, mixes: bool = False) -> None:
    rows_of_rank(batch_size, accumulate, mixes)
    if images < batch_size:
        raise InputError(f"batch size {batch_size}: larger than the {images} images; give --batch-size")


def prepared_steps(
    classifier: Classifier, source, classes: int, recipe: Recipe, device, seed: int, accumulate: int, autocast, steps
) -> Iterator[Iterable[tuple[Tensor, Tensor]]]:
    """This rank's parts of the batch of each of `steps`: the input of the layers that learn, and targets (B, classes).

    Where only a head learns, the parts are put together for its batch norm.
    """
    labels, rows = source.labels.to(device), rows_of_rank(recipe.batch_size, accumulate)

    def prepare(step: int, part: slice, x, index: Tensor) -> tuple[Tensor, Tensor]:
        y = labels[upload(index, device)]
        if isinstance(source, Kept):
            return x, F.one_hot(y, classes).float()
        rng = StepRandom(seed, step, recipe.batch_size, part, device)
        x, y = augmented(x, y, classes, recipe, classifier.encoder.image_size, rng, probe=classifier.blocks == 0)
        with autocast():
            return classifier.frozen(x), y

    places = (order for _, order in orders(seed, len(source), recipe.batch_size, accumulate, steps))
    batches = source.batches(places, device)
    for step in steps:
        parts = (prepare(step, part, *next(batches)) for part in rows)
        if classifier.blocks == 0:
            parts = [tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))]
        yield parts


class Progress:
    """One training's checkpoint.pt, with its log in it, and log.jsonl; rank 0 alone reads and writes them, if any."""

    def __init__(self, directory: Path | None, settings: dict, model: nn.Module, states: dict, resume: bool):
        self.directory, self.settings, self.model, self.states = directory, settings, model, states
        self.step, self.rows, self.saved = 0, [], time.monotonic()
        found = [self.read() if directory and resume and rank() == 0 else None]
        if directory and world_size() > 1:
            dist.broadcast_object_list(found)
        if found[0] is not None:
            self.step, self.rows = found[0]["step"], found[0]["log"]
            model.load_state_dict(found[0]["classifier"], strict=False)  # what is frozen is not in it
            for name, holder in states.items():
                holder.load_state_dict(found[0][name])

    def read(self) -> dict | None:
        path = self.directory / "checkpoint.pt"
        if not path.exists():
            return None
        saved = files.load(path)
        if not isinstance(saved, dict) or "settings" not in saved:
            raise InputError(f"{path}: not a checkpoint of fine-tuning; give --resume never to start over")
        theirs = saved["settings"]
        if "positions" in self.settings:
            theirs = dict(positions="fixed") | theirs  # they were before they could be learned
        if differs := files.differences(theirs, self.settings, {"linear"}):
            raise InputError(f"{path}: with other settings ({differs}); give --resume never to start over")
        return saved

    def end_epoch(self, row: dict, last: bool) -> None:
        self.rows.append(row)
        if self.directory is None or rank() > 0 or not (last or time.monotonic() - self.saved >= SAVE_EVERY):
            return
        learns, state = trainable_parameters(self.model), self.model.state_dict()
        learned = {name: value for name, value in state.items() if name in learns or not name.startswith("encoder.")}
        states = {name: holder.state_dict() for name, holder in self.states.items()}
        tree = dict(step=row["step"], settings=self.settings, log=self.rows, classifier=learned) | states
        files.save(self.directory / "checkpoint.pt", tree)
        lines = [json.dumps(line) for line in (self.settings, *self.rows)]
        files.write_text(self.directory / "log.jsonl", "\n".join(lines) + "\n")
        self.saved = time.monotonic()


def layer_decay_groups(model: nn.Module, weight_decay: float, decay: float) -> list[dict]:
    """Groups with their `scale` of the learning rate, decay^(depth + 1 - layer): what learns last moved least (BEiT).

    Layer 0 are stem, class token and learned positions, layer i is the i-th block, and depth + 1 are the last norm, the
    head and, as in BEiT's code, the table of relative positions that all blocks share.
    """
    depth = len(model.encoder.blocks)
    groups: dict[tuple, list] = {}
    for name, p in trainable_parameters(model).items():
        layer = int(name.split(".")[2]) + 1 if name.startswith("encoder.blocks.") else depth + 1
        layer = 0 if name.startswith(EMBEDDINGS) else layer
        exempt = p.ndim <= 1 or name in EMBEDDINGS
        groups.setdefault((layer, 0.0 if exempt else weight_decay), []).append(p)
    return [
        dict(params=group, weight_decay=wd, scale=decay ** (depth + 1 - layer)) for (layer, wd), group in groups.items()
    ]


class LARS(torch.optim.Optimizer):
    """SGD whose steps are as long, for each matrix, as `trust` times its norm (You et al., arXiv 1708.03888).

    v ← momentum · v + trust · ‖w‖ / ‖g + λw‖ · (g + λw);  w ← w - lr · v. Vectors and biases take plain steps.
    """

    def __init__(self, params, lr: float, momentum: float = 0.9, weight_decay: float = 0.0, trust: float = 0.001):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                g = p.grad
                if p.ndim > 1:
                    g = g + group["weight_decay"] * p
                    w_norm, g_norm = p.norm(), g.norm()
                    g = g * torch.where((w_norm > 0) & (g_norm > 0), group["trust"] * w_norm / g_norm, 1.0)
                v = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.sub_(v.mul_(group["momentum"]).add_(g), alpha=group["lr"])


def optimizer_for(model: nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    groups = layer_decay_groups(model, recipe.weight_decay, recipe.layer_decay)
    if recipe.optimizer == "lars":
        return LARS(groups, lr=recipe.peak)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.peak, momentum=0.9)
    return torch.optim.AdamW(groups, lr=recipe.peak, betas=(0.9, 0.999), fused=device.type in ("cpu", "cuda"))


def take_step(optimizer: torch.optim.Optimizer, losses: Iterable[Tensor], rate: float, scaler) -> Tensor:
    """One step down the sum of `losses` at a learning rate → that sum, without gradient.

    A loss may be made when its turn comes, so that the graph of only one is held at a time.
    """
    total = 0.0
    for loss in losses:
        scaler.scale(loss).backward()
        total = total + loss.detach()
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)
    average_gradients([p for group in optimizer.param_groups for p in group["params"]])
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Over ranks, in one reduction after the backward pass: for a ViT-B 344 MB, some milliseconds between GPUs."""
    if world_size() == 1:
        return
    gradients = [p.grad for p in parameters]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    for g, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        g.copy_(part.view_as(g))
