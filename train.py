"""Pretrain any method on one process or many, the same way.

    python train.py --method cmae                                    built-in images, 2.4 to 5.5 minutes on two cores
    python train.py --method cmae --data tiny-imagenet --download    one GPU
    torchrun --nproc_per_node=8 train.py --method cmae --data imagenet --data-root DIR --recipe paper

`loop` is the loop that every method runs in. A method's `draw` turns uint8 images into a batch: crops, masks, colours
and whatever else a step draws are decided and applied there. Called as a module on that batch, the method draws nothing
but drop path and returns a dict of losses: `loss` is what is minimised, all are logged as means over the processes. A
`loss` that is not finite ends the run when it next logs or saves, before anything is saved. A method's `encoder` is
what a run is for: the student's ViT, unless the method says otherwise. Optional members: `update_teacher` moves the
teacher after each step, `end_epoch` is given the whole image set on every process after each epoch but the last, and
`prepare` can have another method trained first, in `<out>/<its name>`, whose weights become part of this one's.

A run lives in its directory (`--out`): config.json, log.jsonl, checkpoint.pt, encoder.safetensors, pictures, a summary.
The same command resumes it. Everything random in step t comes from (seed, t) and the order of epoch e from (seed, e).
So a resumed run ends with the same bits as an uninterrupted one of as many processes (on a GPU only with
--deterministic). Neither the number of processes nor that of --accumulate's parts changes a draw, except drop path's.
The host prepares the next step while the GPU computes. It waits for the GPU only where it logs, saves or measures, and
in `end_epoch`.
"""

import json
import os
import sys
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common import StepRandom, ViT
from downstream.online_probe import Watch
from downstream.protocols import evaluate
from inputs import augment, image_sets
from methods import METHODS
from runtime import fast_paths, files, process
from runtime.command_line import build_encoder, goes_on, pretraining_options, settle
from runtime.encoder_files import untrained
from runtime.errors import InputError
from runtime.log import Meter, Pictures
from runtime.optimization import learning_rate, parameter_groups
from runtime.randomness import orders, rows_of_rank
from runtime.ranks import rank, say, world_size
from runtime.run_directory import Run
from runtime.starting_weights import fill, fill_decoder


def main() -> None:
    args, config, Method = options(sys.argv[1:])
    device = process.start(args.device)
    settle(args, device)
    train(args, config, Method, device)
    process.stop()


# Called with a list of words, it returns the settings, the method's Config and the method's class.
options = partial(pretraining_options, methods=METHODS)


def train(args, config, Method, device: torch.device) -> nn.Module:
    """Train a method from its first or next step to its last and return it. A run that is stopped exits the program."""
    rows_of_rank(args.batch_size, args.accumulate)  # to refuse a batch that cannot be shared before images are read
    images = image_sets.open_for(args, "train")
    images = (images.first(args.images) if args.images else images).to(device)  # if in memory; files stay on the disk
    augment.find_statistics(args, images, device)  # of `--mean auto`, into `args`
    plan = Plan(args, len(images))
    method, optimizer, scaler = build(args, config, Method, device)
    watch = Watch(args, method, device)  # measures along the way, if asked to; no step depends on it
    run = Run(args, config, len(images), method=method, optimizer=optimizer, scaler=scaler)
    run.open()  # loads the checkpoint, if there is one to continue from
    if run.step == 0 and hasattr(method, "prepare"):
        method.prepare(partial(train_first, args, device))
    trainable = sum(p.numel() for p in method.parameters() if p.requires_grad)
    say(f"{args.method} on {args.data}: {len(images):,} images, {trainable:,} parameters, {plan.steps} steps of "
        f"{args.batch_size} on {world_size()} x {device.type} in {args.precision}, into {args.out}")  # fmt: skip
    with augment.views_for(args):  # `draw` crops to their --image-size and standardises by their --mean and --std
        loop(args, plan, run, images, watch, device)
    if run.stopped_by:  # the number of a signal, the same on all processes
        say(f"stopped at step {run.step} of {plan.steps}; the same command continues from there")
        process.stop()
        sys.exit(128 + run.stopped_by)
    summary(args, method.encoder, run, images.classes, device)
    return method


def loop(args, plan: "Plan", run: Run, images: image_sets.ImageSet, watch: Watch, device: torch.device) -> None:
    """The steps of a run from `run.step` on: each draws a batch, learns from it, moves the teacher, logs and saves."""
    method, optimizer, scaler = run.parts.values()
    network = distribute(method)
    forward = fast_paths.compiled(network, device, args.accumulate) if args.compile else network
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.precision)
    autocast = torch.autocast(device.type, dtype, enabled=dtype is not None)

    def losses_of(batch) -> dict[str, Tensor]:
        with autocast:
            return forward(batch)

    if 0 < run.step < plan.steps and world_size() > 2:
        # After its first backward pass DDP groups its gradients anew, and then adds up those of three or more processes
        # in another order. The interrupted run had done so too. A pass whose gradients are thrown away does it here.
        index = next(plan.indices(run.step))
        rng = StepRandom(args.seed, run.step, args.batch_size, plan.rows[0], device)
        losses_of(method.draw(images.images(index, device), index, rng))["loss"].backward()
        optimizer.zero_grad(set_to_none=True)
    batches = images.batches(plan.indices(run.step), device, workers=args.workers)
    pictures = Pictures(image_sets.open_for(args, "val"), method, args.seed, args.image_size, device)

    meter = Meter(args, run.step, plan.steps, plan.steps_per_epoch, run.log, device)
    with run.listening(), meter.bar:  # to SIGTERM and Ctrl-C; `asked_to_stop` tells all processes in the same step
        for step in range(run.step, plan.steps):
            rate = learning_rate(step, plan.steps, plan.warmup, args.lr, args.min_lr)  # warm-up, then a cosine
            for group in optimizer.param_groups:
                group["lr"] = rate
            torch.manual_seed(args.seed + (step * world_size() + rank()) * 1_000_003)  # only drop path draws from it
            rng, losses = StepRandom(args.seed, step, args.batch_size, device=device), {}
            for part in range(args.accumulate):
                if world_size() > 1:  # gradients are averaged over the processes once a step, in its last part
                    network.require_backward_grad_sync = part == args.accumulate - 1
                batch = method.draw(*next(batches), rng.of(plan.rows[part]))
                watch.see(step + 1, batch)
                found = losses_of(batch)
                scaler.scale(found["loss"] / args.accumulate).backward()
                losses = {k: losses.get(k, 0) + v.detach() / args.accumulate for k, v in found.items()}
            if args.clip_grad:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(method.parameters(), args.clip_grad)
            scaler.step(optimizer)  # with fp16 a step that overflows is left out; rate and teacher go on
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            if hasattr(method, "update_teacher"):
                method.update_teacher((step + 1) / plan.steps)
            done = step + 1
            if plan.ends(done, 1) and done < plan.steps and hasattr(method, "end_epoch"):
                with autocast:
                    told = method.end_epoch(done // plan.steps_per_epoch, plan.steps / plan.steps_per_epoch, images)
                if told:
                    say(told)
            meter.update(done, losses, rate, watch.measured(probe=plan.ends(done, args.probe_every)))
            stopping = run.asked_to_stop(done)  # several processes agree every tenth batch, without the GPU
            if stopping or plan.ends(done, args.save_every):
                meter.check_finite(method, done)  # the `loss` of every step so far, and the weights
                run.save(done)
                pictures.draw(run)
            if stopping:
                break


class Plan:
    """How long a run is, and which images each process takes in which step. An epoch drops a partial last batch."""

    def __init__(self, args, images: int):
        self.args, self.images, self.n = args, images, images * args.repeat  # n images an epoch
        self.rows = rows_of_rank(args.batch_size, args.accumulate)  # this process's, for each part of a step
        self.steps_per_epoch = self.n // args.batch_size
        if self.steps_per_epoch == 0:
            what = f"larger than an epoch, {self.n} images of {args.data}; give a smaller one, or --repeat"
            raise InputError(f"batch size {args.batch_size}: {what}")
        self.steps = args.epochs * self.steps_per_epoch
        self.warmup = round(args.warmup_epochs * self.steps_per_epoch)
        if args.max_steps and args.max_steps < self.steps:  # the schedules of rate and teacher are compressed, not cut
            self.steps, self.warmup = args.max_steps, round(self.warmup * args.max_steps / self.steps)

    def ends(self, done: int, every: int | None) -> bool:
        """Whether after so many steps the run ends, or an epoch that `every` divides; never if `every` is None."""
        epochs, rest = divmod(done, self.steps_per_epoch)
        return every is not None and (done == self.steps or (rest == 0 and epochs % every == 0))

    def indices(self, first: int) -> Iterator[Tensor]:
        """From step `first` on, part after part, the positions in the image set that this process takes."""
        args, todo = self.args, range(first, self.steps)
        for _, places in orders(args.seed, self.n, args.batch_size, args.accumulate, todo):
            yield places % self.images


def build(args, config, Method, device: torch.device):
    """The method, whose weights come from the seed and from `--init`; its optimizer; and the scaler that fp16 needs."""
    torch.manual_seed(args.seed)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    encoder = build_encoder(args)
    found = fill(encoder, args.init, args.heads) if args.init and not goes_on(args) else None
    method = Method(encoder, config)
    if not isinstance(method.encoder, ViT) and (args.init or args.mean or args.std):  # a tokenizer, say
        raise InputError(f"--init, --mean, --std: {args.method} learns no ViT, which they are for; leave them out")
    if found:  # a teacher was copied from the encoder, which is filled; what the file lacks keeps the seed's weights
        say(*fill_decoder(method, encoder, found, args.init))
    method.to(device).train()
    groups = parameter_groups(method, args.weight_decay, tuple(args.no_decay))
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=tuple(args.betas), fused=device.type in ("cpu", "cuda"))
    return method, optimizer, torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")


def distribute(method: nn.Module) -> nn.Module:
    """The method, with gradients averaged over processes if there are several."""
    if world_size() == 1:
        return method
    network = DistributedDataParallel(method, gradient_as_bucket_view=True)
    network.broadcast_buffers = False  # no step changes a buffer; set here, as torch 2.14 warns of the argument
    return network


def train_first(args, device: torch.device, name: str, **settings) -> nn.Module:
    """Train another method first, on the images and the machine of `args`, in `<out>/<name>`, and return it.

    Its batches are no larger than those of `args`, and have as many parts or more: they must fit the same memory. Its
    rate stays that of its recipe.
    """
    flags = ["--method", name, "--data", args.data, "--recipe", args.recipe, "--out", f"{args.out}/{name}"]
    for option, value in settings.items():
        flags += ["--" + option.replace("_", "-"), *map(str, value if isinstance(value, tuple) else [value])]
    theirs, config, Method = options([*flags, "--no-evaluate"])
    same = "data_root download classes class_level range split columns images repeat skip_bad_images workers max_steps"
    for key in f"{same} device precision compile seed deterministic log_every".split():
        setattr(theirs, key, getattr(args, key))
    theirs.resume = "never" if args.resume == "never" else "auto"
    settle(theirs, device)
    theirs.accumulate = max(theirs.accumulate, args.accumulate)
    parts = world_size() * theirs.accumulate
    theirs.batch_size = max(parts, min(theirs.batch_size, args.batch_size) // parts * parts)
    say(f"{args.method} needs a {name} first, which goes to {theirs.out}")
    return train(theirs, config, Method, device)


def summary(args, encoder: nn.Module, run: Run, classes: list[str], device: torch.device) -> None:
    """What a person wants to know at the end: the loss, the pictures, and whether the encoder learned something."""
    if run.log and run.log.losses:  # rank 0 has the log, which is empty if the file was deleted
        say("", f"loss      {run.log.losses[0]:.4f} -> {run.log.losses[-1]:.4f}")
    say(f"pictures  {run.directory / 'reconstruction.png'}", f"encoder   {run.directory / 'encoder.safetensors'}")
    if not isinstance(encoder, ViT):  # a tokenizer, say
        return
    if not args.evaluate:
        other = "" if classes else " --data LABELLED"
        return say(f"evaluate  python evaluate.py --run {run.directory} --protocol knn{other}")
    sets = [image_sets.open_for(args, split).to(device) for split in ("train", "val")]
    if not all(images.classes for images in sets):
        return say("evaluate  left out: the images have no labels")
    encoders = {"untrained": untrained(encoder, args.seed), "trained": encoder.eval()}
    results = {name: evaluate(e, *sets, protocols=("knn", "linear"), device=device) for name, e in encoders.items()}
    say(f"accuracy on {len(sets[1]):,} validation images   kNN       linear")
    for name, result in results.items():
        say(f"  {name + ' encoder':38}{result['knn']['top1']:5.1f} %   {result['linear']['top1']:5.1f} %")
    if rank() == 0:
        files.write_text(run.directory / "summary.json", json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    process.command(main)
