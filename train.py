"""Pretrain any method on one process or many, the same way.

    python train.py --method cmae                                    built-in images, about two minutes on two cores
    python train.py --method cmae --data tiny-imagenet --download    one GPU
    torchrun --nproc_per_node=8 train.py --method cmae --data imagenet --data-root DIR --recipe paper

A run lives in its directory (`--out`): config.json, log.jsonl, checkpoint.pt, encoder.pt, reconstruction.png. The same
command continues it. Everything random in step t comes from (seed, t) and the order of epoch e from (seed, e), so a
resumed run ends with the bits of one that never stopped, and the number of processes does not change the result.
"""

import dataclasses
import inspect
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import evaluate
from common import StepRandom, ViT, epoch_order, learning_rate, parameter_groups
from inputs import image_sets
from runtime import files, process
from runtime.command_line import build_encoder, options, settle
from runtime.errors import InputError
from runtime.ranks import rank, world_size
from runtime.weights import untrained

# What may differ between a run and its continuation: where and how it runs, not what it computes.
FREE = {"out", "resume", "data_root", "download", "workers", "device", "compile", "save_every", "log_every", "evaluate"}


# ------------------------------------------------------------------------------------------------------------ a run


def main() -> None:
    args, config, Method = options(sys.argv[1:])
    device = process.start(args.device)
    settle(args, device)
    run = Run(args.out)
    train(args, config, Method, device, run)
    process.stop()
    if run.stopped_by:
        sys.exit(128 + run.stopped_by)


def train(args, config, Method, device: torch.device, run: "Run"):
    """One run from its first or next step to its last, or until it is asked to stop; returns the method."""
    share = divide(args.batch_size, args.accumulate)
    image_set = open_set(args, "train")
    if args.images:  # here alone: evaluation has all images
        image_set = image_set.first(args.images)
    image_set, n = image_set.to(device), len(image_set) * args.repeat  # n images an epoch
    steps_per_epoch = n // args.batch_size
    if steps_per_epoch == 0:
        raise InputError(f"batch size {args.batch_size}: larger than an epoch, {n} images of {args.data}; see --repeat")
    steps = args.epochs * steps_per_epoch
    warmup = round(args.warmup_epochs * steps_per_epoch)
    if args.max_steps and args.max_steps < steps:  # a shorter run of the same shape
        steps, warmup = args.max_steps, round(warmup * args.max_steps / steps)

    torch.manual_seed(args.seed)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    method = Method(build_encoder(args), config).to(device).train()
    groups = parameter_groups(method, args.weight_decay, tuple(args.no_decay))
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=tuple(args.betas), fused=device.type in ("cpu", "cuda"))
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    run.images = len(image_set)  # in a checkpoint's settings this takes the place of --images
    first = run.open(args, config, method, optimizer, scaler)
    if first == 0 and hasattr(method, "prepare"):
        method.prepare(partial(train_first, args, device))
    run.listen()
    network = distribute(method)
    compiled = torch.compile(network) if args.compile else network
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.precision)
    say(f"{args.method} on {args.data}: {len(image_set):,} images, {count(method):,} parameters, {steps} steps of "
        f"{args.batch_size} on {world_size()} x {device.type} in {args.precision}, into {args.out}")  # fmt: skip

    def rows_of(step: int, part: int) -> slice:  # of the global batch, for this rank
        begin = (part * world_size() + rank()) * share
        return slice(begin, begin + share)

    def indices():
        for step in range(first, steps):
            epoch, place = divmod(step, steps_per_epoch)
            if step == first or place == 0:  # once an epoch: a million images take a tenth of a second
                order = epoch_order(args.seed, epoch, n) % len(image_set)
            batch = order[place * args.batch_size :][: args.batch_size]
            yield from (batch[rows_of(step, part)] for part in range(args.accumulate))

    def learn(step: int, part: int, images, index) -> dict[str, Tensor]:  # adds to the gradients
        rng = StepRandom(args.seed, step, args.batch_size, rows_of(step, part), device)
        batch = method.draw(images, index, rng)
        if world_size() > 1:
            network.require_backward_grad_sync = part == args.accumulate - 1  # once a step is enough
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            parts = compiled(batch)
        scaler.scale(parts["loss"] / args.accumulate).backward()
        return parts

    if 0 < first < steps and world_size() > 2:
        # After its first backward pass DDP lays its buckets out anew, and with them the order in which ranks are added
        # up. The run that is continued was past that: a pass that is thrown away gets this one past it, too.
        index = next(indices())
        learn(first, args.accumulate - 1, image_set.images(index, device), index)
        optimizer.zero_grad(set_to_none=True)

    batches = image_set.batches(indices(), device, workers=args.workers)
    show = Pictures(args, method, device)
    rarely = 0.5 if sys.stderr.isatty() else 30  # seconds between redraws, on a screen or in a log file
    with tqdm(total=steps, initial=first, disable=rank() > 0, bar_format=BAR, mininterval=rarely) as bar:
        meter = Meter(args, first, steps_per_epoch, bar, run, device)
        for step in range(first, steps):
            rate = learning_rate(step, steps, warmup, args.lr, args.min_lr)
            for group in optimizer.param_groups:
                group["lr"] = rate
            torch.manual_seed(args.seed + (step * world_size() + rank()) * 1_000_003)  # drop path's only
            losses: dict[str, Tensor] = {}
            for part in range(args.accumulate):
                parts = learn(step, part, *next(batches))
                losses = {k: losses.get(k, 0) + v.detach() / args.accumulate for k, v in parts.items()}
            if args.clip_grad:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(method.parameters(), args.clip_grad)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            method.update_teacher((step + 1) / steps)

            done, epoch_done = step + 1, (step + 1) % steps_per_epoch == 0
            if epoch_done and done < steps:  # nothing follows the last
                method.end_epoch(step // steps_per_epoch, image_set)
            meter.update(done, losses, rate, last=done == steps)
            stopping = run.asked_to_stop()
            epoch = done / steps_per_epoch
            if stopping or done == steps or (epoch_done and epoch % args.save_every == 0):
                meter.check_finite()
                if not torch.stack([p.isfinite().all() for p in method.parameters()]).all():  # by a bad gradient
                    raise not_finite("weights", done)
                run.save(done, args, method, optimizer, scaler)
                show(run.directory)
            if stopping:
                say(f"stopped at step {done} of {steps}; the same command continues from there")
                break
    if not run.stopped_by:
        summary(args, method.encoder, meter, run, device)
    return method


def train_first(args, device: torch.device, name: str, **settings):
    """Another method, trained before the one of `args` on the same images and machine, in `<out>/<name>`."""
    same = "data data_root download classes images repeat skip_bad_images workers recipe max_steps device precision"
    same = [*same.split(), "accumulate", "seed", "deterministic", "log_every"]
    flags = ["--method", name, "--out", f"{args.out}/{name}", "--no-evaluate"]
    flags += ["--resume", "never"] if args.resume == "never" else []
    flags.append("--compile" if args.compile else "--no-compile")
    for option, value in ({key: getattr(args, key) for key in same} | settings).items():
        if value is not None and value is not False:
            flags += ["--" + option.replace("_", "-")] + ([] if value is True else [str(value)])
    theirs, config, Method = options(flags)
    settle(theirs, device)
    parts = world_size() * args.accumulate
    theirs.batch_size = max(parts, min(theirs.batch_size, args.batch_size) // parts * parts)
    say(f"{args.method} needs a {name} first, which goes to {theirs.out}")
    run = Run(theirs.out)
    method = train(theirs, config, Method, device, run)
    if run.stopped_by:
        process.stop()
        sys.exit(128 + run.stopped_by)
    return method


def distribute(method: torch.nn.Module) -> torch.nn.Module:
    """The method, with gradients averaged over ranks if there are several."""
    if world_size() == 1:
        return method
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # until torch 2.14
    # Buffers are constants, so nothing has to be broadcast before each step.
    return DistributedDataParallel(method, gradient_as_bucket_view=True, **{name: False})


BAR = "{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}, {remaining} left]"


def divide(batch_size: int, accumulate: int) -> int:
    """Images of the global batch that one process takes at a time."""
    share, rest = divmod(batch_size, world_size() * accumulate)
    if rest or not share:
        raise InputError(
            f"batch size {batch_size}: not divisible by {world_size()} processes x {accumulate} accumulated parts"
        )
    return share


def open_set(args, split: str):
    image_set = image_sets.open_set(
        args.data, args.data_root, split, download=args.download, skip_bad_images=args.skip_bad_images
    )
    return image_set.subset(classes=args.classes) if args.classes else image_set


def count(module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def say(line: str) -> None:
    if rank() == 0:
        tqdm.write(line, file=sys.stderr)


def summary(args, encoder: ViT, meter: "Meter", run: "Run", device) -> None:
    """What a person wants to know at the end: the loss, the pictures, and whether the encoder learned something."""
    say(f"\nloss      {meter.first_loss:.4f} -> {meter.loss:.4f}")
    say(f"pictures  {run.directory / 'reconstruction.png'}\nencoder   {run.directory / 'encoder.pt'}")
    if not isinstance(encoder, ViT):  # a tokenizer, say
        return
    if not args.evaluate:
        say(f"evaluate  python evaluate.py --run {run.directory} --protocol knn")
        return
    sets = [open_set(args, split).to(device) for split in ("train", "val")]
    encoders = {"untrained": untrained(encoder, args.seed), "trained": encoder.eval()}
    results = {
        name: evaluate.evaluate(e, *sets, protocols=("knn", "linear"), device=device) for name, e in encoders.items()
    }
    say(f"accuracy on {len(sets[1]):,} validation images   kNN       linear")
    for name, result in results.items():
        say(f"  {name + ' encoder':38}{result['knn']['top1']:5.1f} %   {result['linear']['top1']:5.1f} %")
    if rank() == 0:
        files.write_text(run.directory / "summary.json", json.dumps(results, indent=1) + "\n")


# ------------------------------------------------------------------------------------------ log, pictures, directory


class Meter:
    """Loss, rate and speed to the bar and to log.jsonl; reads the device only when it writes."""

    def __init__(self, args, first: int, steps_per_epoch: int, bar: tqdm, run: "Run", device):
        self.args, self.steps_per_epoch, self.bar, self.run = args, steps_per_epoch, bar, run
        self.bad_step = torch.full((), math.inf, device=device)  # first step whose loss was not finite
        self.begin = self.since = time.perf_counter()
        self.logged = first
        self.first_loss, self.loss = run.logged_losses()

    def update(self, step: int, losses: dict[str, Tensor], rate: float, last: bool) -> None:
        bad = torch.where(losses["loss"].isfinite(), math.inf, float(step))
        self.bad_step = torch.minimum(self.bad_step, bad)
        self.bar.update()
        if step % self.args.log_every and not last and step > 1:
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
        self.run.log(row)
        self.loss = row["loss"]
        self.first_loss = self.first_loss or self.loss
        self.logged, self.since = step, now
        self.bar.set_postfix_str(f"loss {self.loss:.3f}, {speed:,.0f} images/s", refresh=False)

    def check_finite(self) -> None:
        if world_size() > 1:
            dist.all_reduce(self.bad_step, dist.ReduceOp.MIN)
        if (step := self.bad_step.item()) < math.inf:
            raise not_finite("loss", int(step))


def not_finite(what: str, step: int) -> InputError:
    return InputError(
        f"{what}: not finite at step {step}; the last checkpoint is kept. "
        "Try a lower --lr, --clip-grad 1, or --precision bf16 or fp32"
    )


class Pictures:
    """reconstruction.png: eight validation images, their masks and what the method predicts, the same each time."""

    def __init__(self, args, method, device, n: int = 8):
        images = open_set(args, "val")  # on every rank: one of them may have to build the cache for the others
        if rank() > 0:
            return
        index = torch.linspace(0, len(images) - 1, n).long()
        with torch.no_grad():
            nowhere = torch.full((n,), -1)  # these images have no place in the training set
            rng = StepRandom(args.seed, 2**40, n, None, device)
            self.batch = method.draw(images.images(index, device), nowhere, rng)
        self.method, self.zoom = method, max(1, 128 // args.image_size)

    def __call__(self, directory: Path) -> None:
        if rank() > 0:
            return
        self.method.eval()
        rows = self.method.picture(self.batch)  # (rows, n, 3, H, W)
        self.method.train()
        if rows is None:
            return
        from torchvision.utils import make_grid, save_image  # here: the first step need not wait for it

        grid = make_grid(rows.flatten(0, 1).cpu(), nrow=rows.shape[1], padding=2, pad_value=1.0)
        grid = grid.repeat_interleave(self.zoom, dim=1).repeat_interleave(self.zoom, dim=2)
        files.write_whole(directory / "reconstruction.png", lambda file: save_image(grid, file, format="png"))


class Run:
    """A run directory, which rank 0 alone writes, and the wish to stop, which any rank may receive."""

    def __init__(self, directory):
        self.directory, self.images, self.stopped_by, self.signal = Path(directory), 0, 0, 0
        # Agreement goes over gloo on the CPU, so that asking every step never waits for a GPU.
        self.control = dist.new_group(backend="gloo") if world_size() > 1 else None

    def listen(self) -> None:
        """From here on the first SIGTERM or Ctrl-C lets the running step finish; a second one acts at once."""

        def wish(number, frame):
            self.signal = number
            signal.signal(number, signal.SIG_DFL)

        signal.signal(signal.SIGTERM, wish)
        signal.signal(signal.SIGINT, wish)

    def asked_to_stop(self) -> bool:
        number = torch.tensor(self.signal)
        if self.control is not None:
            dist.all_reduce(number, dist.ReduceOp.MAX, group=self.control)
        self.stopped_by = int(number)
        return self.stopped_by != 0

    def open(self, args, config, method, optimizer, scaler) -> int:
        """Lay out the directory and load its checkpoint if there is one; returns the first step to do."""
        found: list = [None]
        settings = vars(args) | dataclasses.asdict(config) | dict(images=self.images)
        if rank() == 0:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                self.lock()
                for left in self.directory.glob(".*.tmp"):  # by a run that was killed while it wrote
                    left.unlink()
            except OSError as error:
                raise InputError(
                    f"{self.directory}: cannot be written ({error.strerror}); give another --out"
                ) from None
            found = [self.read(args, settings)]
        if world_size() > 1:
            dist.broadcast_object_list(found, group=self.control)
        step = 0
        if found[0] is not None:
            try:
                step = found[0]["step"]
                method.load_state_dict(found[0]["method"])
                optimizer.load_state_dict(found[0]["optimizer"])
                scaler.load_state_dict(found[0]["scaler"])
            except (LookupError, TypeError, ValueError, AttributeError, RuntimeError):
                raise InputError(
                    f"{self.directory}: the checkpoint's weights are not this program's; give --resume never"
                ) from None
            say(f"continuing {self.directory} from step {step}")
        if rank() == 0:
            about = dict(
                method=args.method, settings=vars(args), config=dataclasses.asdict(config), world_size=world_size(),
                argv=sys.argv, versions=versions(), git=git_state(),
            )  # fmt: skip
            files.write_text(self.directory / "config.json", json.dumps(about, indent=1) + "\n")
            self.open_log(about, step)
        return step

    def lock(self) -> None:
        """Two runs must not write one directory. The lock dies with the process; where there is none, there is none."""
        try:
            import fcntl
        except ImportError:  # Windows
            return
        self.lock_file = open(self.directory / ".lock", "w")
        try:
            fcntl.flock(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.directory}: another run is writing here; give another --out") from None
        except OSError:  # a file system without locks: some of Lustre's and NFS's
            pass

    def read(self, args, settings: dict):
        path = self.directory / "checkpoint.pt" if args.resume in ("auto", "never") else Path(args.resume)
        if args.resume == "never" or (args.resume == "auto" and not path.exists()):
            return None
        if not path.exists():
            raise InputError(f"{path}: no such checkpoint; give a file, auto or never to --resume")
        checkpoint = files.load(path)
        if not isinstance(checkpoint, dict) or "settings" not in checkpoint:
            raise InputError(f"{path}: not a checkpoint of train.py; give another --resume")
        if differs := files.differences(checkpoint["settings"], settings, FREE):
            raise InputError(f"{path}: of another run ({differs}); give the same, another --out or --resume never")
        return checkpoint

    def save(self, step: int, args, method, optimizer, scaler) -> None:
        if rank() > 0:
            return
        settings = vars(args) | dataclasses.asdict(method.config) | dict(images=self.images)
        states = dict(method=method.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
        files.save(self.directory / "checkpoint.pt", dict(step=step, settings=settings) | states)
        encoder = dict(settings=method.encoder.settings, state_dict=method.encoder.state_dict())
        files.save(self.directory / "encoder.pt", encoder)

    def open_log(self, about: dict, step: int) -> None:
        """One configuration line, then the steps that the checkpoint has seen; what came after it is done again."""
        path, lines = self.directory / "log.jsonl", []
        if step and path.exists():
            for line in path.read_text(errors="replace").splitlines():
                with suppress(ValueError, TypeError, LookupError):  # a line cut off or damaged is left out
                    if json.loads(line)["step"] <= step:
                        lines.append(line)
        files.write_text(path, "\n".join([json.dumps(about), *lines]) + "\n")
        self.log_file = open(path, "a", buffering=1)

    def logged_losses(self) -> tuple[float | None, float | None]:
        """The first and the last loss in the log, of a run that is continued; rank 0 has it, and maybe no other."""
        if rank() != 0:
            return None, None
        rows = [json.loads(line) for line in (self.directory / "log.jsonl").read_text().splitlines()[1:]]
        return (rows[0]["loss"], rows[-1]["loss"]) if rows else (None, None)

    def log(self, row: dict) -> None:
        if rank() == 0:
            try:
                self.log_file.write(json.dumps(row) + "\n")
            except OSError as error:
                name = self.log_file.name
                raise InputError(f"{name}: cannot be written ({error.strerror}); the last checkpoint is kept") from None


def versions() -> dict:
    names = dict(python=platform.python_version(), torch=torch.__version__, machine=platform.machine())
    return names | (dict(gpu=torch.cuda.get_device_name()) if torch.cuda.is_available() else {})


def git_state() -> dict:
    """Commit of the checkout that these files lie in, and whether its code differs; nothing where there is none."""

    def git(*words):  # fmt: skip
        here = Path(__file__).parent
        return subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return dict(commit=git("rev-parse", "HEAD"), dirty=bool(git("status", "--porcelain", "--", "*.py")))
    except (OSError, subprocess.CalledProcessError):
        return {}


if __name__ == "__main__":
    process.command(main)
