"""A run's directory: its checkpoint and how a run is continued from it, its lock, and the wish to stop."""

import dataclasses
import json
import platform
import re
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map_only

from runtime import files
from runtime.command_line import checkpoint_of
from runtime.errors import InputError
from runtime.log import Log
from runtime.ranks import rank, say, world_size

# What may differ between a run and its continuation: where and how it runs, not what it computes.
FREE = set("out resume data_root download workers device compile linear evaluate".split())
FREE |= set("save_every log_every probe_every tensorboard log_gradients".split())


class Run:
    """A run directory, which rank 0 alone writes, and the wish to stop, which any rank may receive."""

    def __init__(self, args, config, images: int, **parts):
        """`images` is the number of images trained on; `parts` are method, optimizer and scaler, in this order."""
        self.args, self.config, self.parts, self.directory = args, config, parts, Path(args.out)
        self.settings = vars(args) | dataclasses.asdict(config) | dict(images=images)
        self.step, self.log, self.signal, self.stopped_by = 0, None, 0, 0
        # Ranks agree and wait for each other's files over gloo on the CPU, where nothing waits for a GPU.
        self.control = dist.new_group(backend="gloo") if world_size() > 1 else None

    @contextmanager
    def listening(self):
        """Within this block the first SIGTERM or Ctrl-C lets the running step finish; a second one acts at once."""

        def wish(number, frame):
            self.signal = number
            signal.signal(number, signal.SIG_DFL)

        before = {number: signal.signal(number, wish) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        self.asked_to_stop(0)  # a signal may have come after the last step had asked

    def asked_to_stop(self, step: int) -> bool:
        """Whether any rank has received a signal; all ranks get the same answer.

        Several ranks ask each other after every tenth batch only, as that takes a third of a millisecond.
        """
        parts = self.args.accumulate  # batches a step
        if self.control is None:
            self.stopped_by = self.signal
        elif step * parts % 10 < parts:
            number = torch.tensor(self.signal)
            dist.all_reduce(number, dist.ReduceOp.MAX, group=self.control)
            self.stopped_by = int(number)
        return self.stopped_by != 0

    def open(self) -> None:
        """Lay out the directory and load its checkpoint if there is one; `step` is then the first step to do."""
        found = None
        if rank() == 0:
            try:
                self.lock_file = lay_out(self.directory)
                found = self.read()
            except InputError as error:
                found = error
        if world_size() > 1:
            found = from_rank_0(found, self.control)
        if isinstance(found, InputError):
            raise found
        if found is not None:
            try:
                self.step = found["step"]
                for name, part in self.parts.items():
                    part.load_state_dict(found[name])
            except (LookupError, TypeError, ValueError, AttributeError, RuntimeError):
                wrong = "the checkpoint's weights are not this program's; give --resume never"
                raise InputError(f"{self.directory}: {wrong}") from None
            say(f"continuing {self.directory} from step {self.step}")
        if rank() == 0:
            self.about = about = dict(
                method=self.args.method, settings=vars(self.args), config=dataclasses.asdict(self.config),
                world_size=world_size(), argv=sys.argv, versions=versions(), git=git_state(),
            )  # fmt: skip
            files.write_text(self.directory / "config.json", json.dumps(about, indent=1) + "\n")
            self.log = Log(self.directory / "log.jsonl", about, self.step, self.args.tensorboard)

    def read(self) -> dict | None:
        """The checkpoint that `--resume` asks for, which must be of this run; None if there is nothing to continue."""
        path = checkpoint_of(self.args)
        if path is None or (self.args.resume == "auto" and not path.exists()):
            return None
        if not path.exists():
            raise InputError(f"{path}: no such checkpoint; give a file, auto or never to --resume")
        checkpoint = files.load(path, "give --resume never to start over")
        if not isinstance(checkpoint, dict) or "settings" not in checkpoint:
            raise InputError(f"{path}: not a checkpoint of train.py; give another --resume")
        if differs := files.differences(checkpoint["settings"], self.settings, FREE):
            raise InputError(f"{path}: of another run ({differs}); give the same, another --out or --resume never")
        return checkpoint

    def made_by(self) -> str:
        """A line about what made the weights: program, method, images, how long."""
        s, versions, git = self.settings, self.about["versions"], self.about["git"]
        epochs = self.step / (s["images"] * s["repeat"] // s["batch_size"])
        commit = f"commit {git['commit'][:12]}{' with changes' * git['dirty']}" if git else "no commit"
        return (
            f"minMIM {versions['minmim']} ({commit}): {s['method']} on {Path(s['data']).name}, {epochs:.4g} epochs, "
            f"seed {s['seed']}" + (f", from {Path(s['init']).name}" if s["init"] else "")
        )

    def save(self, step: int) -> None:
        """Write checkpoint.pt, from which the run can be continued after `step`, and encoder.safetensors."""
        self.step = step
        if rank() == 0:
            states = {name: part.state_dict() for name, part in self.parts.items()}
            files.save(self.directory / "checkpoint.pt", dict(step=step, settings=self.settings) | states)
            encoder = self.parts["method"].encoder
            file = self.directory / "encoder.safetensors"
            files.save_weights(file, encoder.settings, encoder.state_dict(), self.made_by())
            file.with_suffix(".pt").unlink(missing_ok=True)  # an older version's, which would stay as it was
        if self.control is not None:
            # The others wait here, up to half an hour. In the next step NCCL would end the run after ten minutes.
            dist.barrier(self.control)


def lay_out(directory: Path):
    """Make the directory, lock it, and remove what a run that was killed left half-written; returns the lock.

    The lock keeps a second run from writing there, and dies with the process.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        held = open(directory / ".lock", "w")
        with suppress(ImportError):  # Windows has no such locks
            import fcntl

            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{directory}: another run is writing here; give another --out") from None
            except OSError:  # nor have some file systems, of Lustre's and NFS's
                pass
        for left in directory.glob(".*.tmp"):
            left.unlink()
    except OSError as error:
        raise InputError(f"{directory}: cannot be written ({error.strerror}); give another --out") from None
    return held


def from_rank_0(tree, group):
    """Dicts and lists of tensors on the CPU, which rank 0 has → the same on every rank.

    Only rank 0 is sure to see the file: a run on several machines may have no shared disk. Tensors go one by one, so
    that nothing of the size of a checkpoint is ever pickled.
    """
    tensors: list[Tensor] = []

    def receive(outline: Tensor) -> Tensor:
        x = tensors.pop(0).contiguous() if rank() == 0 else torch.empty(outline.shape, dtype=outline.dtype)
        if x.numel():
            dist.broadcast(x.reshape(-1).view(torch.uint8), 0, group=group)
        return x

    outline = [tree_map_only(Tensor, lambda x: tensors.append(x) or x.to("meta"), tree)]
    dist.broadcast_object_list(outline, group=group)
    return tree_map_only(Tensor, receive, outline[0])


def versions() -> dict:
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    ours = re.search(r'(?m)^version = "(.+)"', project)[1]
    names = dict(minmim=ours, python=platform.python_version(), torch=torch.__version__, machine=platform.machine())
    return names | (dict(gpu=torch.cuda.get_device_name()) if torch.cuda.is_available() else {})


def git_state() -> dict:
    """Commit of the checkout that these files lie in, and whether its code differs; nothing where there is none."""

    def git(*words):
        here = Path(__file__).parent.parent
        return subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return dict(commit=git("rev-parse", "HEAD"), dirty=bool(git("status", "--porcelain", "--", "*.py")))
    except (OSError, subprocess.CalledProcessError):
        return {}
