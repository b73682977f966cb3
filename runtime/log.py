"""What a run writes down while it trains: lines of log.jsonl, and the progress bar."""

import json
import math
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from runtime import files
from runtime.errors import InputError
from runtime.ranks import rank, world_size

BAR = "{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}, {remaining} left]"


class Log:
    """log.jsonl: a first line with the configuration, then a line of numbers every `--log-every` steps.

    A run that is continued keeps the lines of the steps that its checkpoint has seen. Later steps are done again, and
    lines that were cut off or damaged are left out.
    """

    def __init__(self, path: Path, about: dict, step: int):
        lines, self.losses = [], []  # the first loss and the last, if there is any
        for line in path.read_text(errors="replace").splitlines() if step and path.exists() else []:
            with suppress(ValueError, TypeError, LookupError):
                row = json.loads(line)
                if row["step"] <= step:
                    self.losses = [*self.losses[:1], float(row["loss"])]
                    lines.append(line)
        files.write_text(path, "\n".join([json.dumps(about), *lines]) + "\n")
        self.file = open(path, "a", buffering=1)

    def write(self, row: dict) -> None:
        self.losses = [*self.losses[:1], row["loss"]]
        try:
            self.file.write(json.dumps(row) + "\n")
        except OSError as error:
            reason = f"cannot be written ({error.strerror}); the last checkpoint is kept"
            raise InputError(f"{self.file.name}: {reason}") from None


class Meter:
    """Sends loss, rate and speed to the bar and to the log. It reads the device only when it writes."""

    def __init__(self, args, first: int, steps: int, steps_per_epoch: int, log: Log | None, device: torch.device):
        self.args, self.steps, self.steps_per_epoch, self.log = args, steps, steps_per_epoch, log
        self.bad_step = torch.full((), math.inf, device=device)  # first step whose loss was not finite
        self.begin = self.since = time.perf_counter()
        self.logged = first
        rarely = 0.5 if sys.stderr.isatty() else 30  # seconds between redraws, on a screen or in a log file
        self.bar = tqdm(total=steps, initial=first, disable=rank() > 0, bar_format=BAR, mininterval=rarely)

    def update(self, step: int, losses: dict[str, Tensor], rate: float) -> None:
        """Count a step; log it if it is the first, the last or due."""
        bad = torch.where(losses["loss"].isfinite(), math.inf, float(step))
        self.bad_step = torch.minimum(self.bad_step, bad)
        self.bar.update()
        if step % self.args.log_every and step not in (1, self.steps):
            return
        values = torch.stack([v.float() for v in losses.values()])
        if world_size() > 1:
            dist.all_reduce(values)
        values = (values / world_size()).tolist()
        now = time.perf_counter()
        speed = (step - self.logged) * self.args.batch_size / (now - self.since)
        row = dict(step=step, epoch=round(step / self.steps_per_epoch, 4), **dict(zip(losses, values, strict=True)))
        row |= dict(lr=rate, images_per_second=round(speed, 1), seconds=round(now - self.begin, 3))
        self.check_finite()
        if self.log:
            self.log.write(row)
        self.logged, self.since = step, now
        self.bar.set_postfix_str(f"loss {row['loss']:.3f}, {speed:,.0f} images/s", refresh=False)

    def check_finite(self, method: torch.nn.Module | None = None, step: int = 0) -> None:
        """Refuse to go on if a loss was not finite or, after `step`, a weight of `method` is not: by a bad gradient."""
        if world_size() > 1:
            dist.all_reduce(self.bad_step, dist.ReduceOp.MIN)
        what, bad_step = "loss", self.bad_step.item()
        if method is not None and not torch.stack([p.isfinite().all() for p in method.parameters()]).all():
            what, bad_step = ("weights", step) if bad_step == math.inf else (what, bad_step)
        if bad_step < math.inf:
            advice = "Try a lower --lr, --clip-grad 1, or --precision bf16 or fp32"
            raise InputError(f"{what}: not finite at step {bad_step:.0f}; the last checkpoint is kept. {advice}")
