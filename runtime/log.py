"""What a run shows while it trains: lines of log.jsonl, the progress bar, reconstruction.png, TensorBoard's events."""

import json
import math
import sys
import time
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from common import StepRandom, pair
from runtime import files
from runtime.errors import InputError
from runtime.ranks import rank, sum_over_ranks, world_size

BAR = "{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}, {remaining} left]"


class Log:
    """log.jsonl: a first line with the configuration, then a line of numbers every `--log-every` steps.

    A run that is continued keeps the lines of the steps that its checkpoint has seen. Later steps are done again, and
    lines that were cut off or damaged are left out. With `tensorboard`, the same numbers and the pictures also go into
    event files beside it.
    """

    def __init__(self, path: Path, about: dict, step: int, tensorboard: bool | None = False):
        self.first, self.tensorboard = step + 1, tensorboard
        lines, self.losses = [], []  # the first loss and the last, if there is any
        for line in path.read_text(errors="replace").splitlines() if step and path.exists() else []:
            with suppress(ValueError, TypeError, LookupError):
                row = json.loads(line)
                if row["step"] <= step:
                    self.losses = [*self.losses[:1], float(row["loss"])]
                    lines.append(line)
        files.write_text(path, "\n".join([json.dumps(about), *lines]) + "\n")
        self.file = open(path, "a", buffering=1)

    @cached_property
    def events(self):
        """The writer of event files. From the first step on, what earlier files hold does not count any more."""
        from torch.utils.tensorboard import SummaryWriter  # a second that other runs need not wait

        return SummaryWriter(Path(self.file.name).parent, purge_step=self.first)

    def write(self, row: dict) -> None:
        self.losses = [*self.losses[:1], row["loss"]]
        try:
            self.file.write(json.dumps(row) + "\n")
            for name in row.keys() - {"step"} if self.tensorboard else ():
                self.events.add_scalar(name, row[name], row["step"])
            if self.tensorboard:
                self.events.flush()  # so that its curves, too, are whole when the run is killed
        except OSError as error:
            reason = f"cannot be written ({error.strerror}); the last checkpoint is kept"
            raise InputError(f"{self.file.name}: {reason}") from None


class Meter:
    """Sends loss, rate and speed to the bar and to the log. It reads the device only when it writes."""

    def __init__(self, args, first: int, steps: int, steps_per_epoch: int, log: Log | None, device: torch.device):
        self.args, self.steps, self.steps_per_epoch, self.log = args, steps, steps_per_epoch, log
        self.bad_step = torch.full((), math.inf, device=device)  # first step whose loss was not finite
        self.begin = self.since = time.perf_counter()
        self.logged, self.knn = first, ""
        rarely = 0.5 if sys.stderr.isatty() else 30  # seconds between redraws, on a screen or in a log file
        self.bar = tqdm(total=steps, initial=first, disable=rank() > 0, bar_format=BAR, mininterval=rarely)

    def update(self, step: int, losses: dict[str, Tensor], rate: float, measured: dict[str, float]) -> None:
        """Count a step; log it if it is the first, the last or due, or if something was measured after it."""
        bad = torch.where(losses["loss"].isfinite(), math.inf, float(step))
        self.bad_step = torch.minimum(self.bad_step, bad)
        self.bar.update()
        if step % self.args.log_every and step not in (1, self.steps) and not measured:
            return
        values = (sum_over_ranks(torch.stack([v.float() for v in losses.values()])) / world_size()).tolist()
        now = time.perf_counter()
        speed = (step - self.logged) * self.args.batch_size / (now - self.since)
        row = dict(step=step, epoch=round(step / self.steps_per_epoch, 4), **dict(zip(losses, values, strict=True)))
        row |= measured | dict(lr=rate, images_per_second=round(speed, 1), seconds=round(now - self.begin, 3))
        self.check_finite()
        if self.log:
            self.log.write(row)
        self.logged, self.since = step, now
        self.knn = f"kNN {row['knn']:.1f} %, " if "knn" in row else self.knn
        self.bar.set_postfix_str(f"loss {row['loss']:.3f}, {self.knn}{speed:,.0f} images/s", refresh=False)

    def check_finite(self, method: torch.nn.Module | None = None, step: int = 0) -> None:
        """Refuse to go on if a loss was not finite or, after `step`, a weight of `method` is not: by a bad gradient."""
        if world_size() > 1:
            dist.all_reduce(self.bad_step, dist.ReduceOp.MIN)
        what, bad_step = "loss", self.bad_step.item()
        if method is not None and bad_step == math.inf and not all(p.isfinite().all() for p in method.parameters()):
            what, bad_step = "weights", step
        if bad_step < math.inf:
            advice = "Try a lower --lr, --clip-grad 1, or --precision bf16 or fp32"
            raise InputError(f"{what}: not finite at step {bad_step:.0f}; the last checkpoint is kept. {advice}")


class Pictures:
    """reconstruction.png: eight images, their masks and what the method predicts, each time the same ones."""

    def __init__(self, image_set, method: torch.nn.Module, seed: int, image_size, device, n: int = 8):
        if rank() > 0:
            return
        index = torch.linspace(0, len(image_set) - 1, n).long()
        nowhere = torch.full((n,), -1)  # these images have no place in the training set
        with torch.no_grad():
            self.batch = method.draw(image_set.images(index, device), nowhere, StepRandom(seed, 2**40, n, None, device))
        self.method, self.zoom = method, max(1, 128 // max(pair(image_size)))

    def draw(self, run) -> None:
        """Into the directory of a run, as it was after its step."""
        if rank() > 0:
            return
        self.method.eval()
        rows = self.method.picture(self.batch)  # (rows, n, 3, H, W)
        self.method.train()
        if rows is None:
            return
        from torchvision.utils import make_grid, save_image  # here: the first step need not wait for it

        grid = make_grid(rows.flatten(0, 1).cpu(), nrow=rows.shape[1], padding=2, pad_value=1.0)
        if run.log.tensorboard:
            run.log.events.add_image("reconstruction", grid, run.step)
            run.log.events.flush()
        grid = grid.repeat_interleave(self.zoom, dim=1).repeat_interleave(self.zoom, dim=2)
        files.write_whole(run.directory / "reconstruction.png", lambda file: save_image(grid, file, format="png"))
