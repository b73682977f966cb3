"""What a figure is drawn of: runs or files of weights, the images that they are shown, and what was asked for."""

import inspect
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

import mae
from common import Attention, Mask, StepRandom, ViT
from inputs import augment, image_sets
from inputs.dense_sets import Segments
from methods import METHODS
from runtime import encoder_files, files
from runtime.command_line import build_encoder
from runtime.errors import InputError

BATCH = 32  # images at a time


class Absent(InputError):
    """A figure that these runs cannot have: `--figure all` goes on without it."""


class Run:
    """A run directory: its settings, its log, and its method as last saved. Or a file of an encoder's weights."""

    def __init__(self, path, device):
        self.path, self.device, self.label = Path(path), device, Path(path).resolve().name
        self.directory = self.path.parent if self.path.is_file() else self.path
        self.settings = SimpleNamespace(data=None, data_root=None, classes=None, skip_bad_images=False, seed=0)
        if self.path.is_file():
            return
        file = self.directory / "config.json"
        try:
            about = json.loads(file.read_text())
            self.settings, self.config = SimpleNamespace(**about["settings"]), about["config"]
            self.Method = METHODS[about["method"]]
        except (OSError, ValueError, TypeError, LookupError):
            raise InputError(f"{file}: no configuration of a run; give a directory that train.py wrote") from None

    @cached_property
    def method(self) -> nn.Module:
        if self.path.is_file():
            raise Absent(f"{self.label} is a file, of which only the encoder is read; give a run")
        file = self.directory / "checkpoint.pt"
        try:
            known = inspect.signature(self.Method.Config).parameters
            config = {name: x for name, x in self.config.items() if x or name in known}  # what is off may be gone
            method = self.Method(build_encoder(self.settings), self.Method.Config(**config))
            method.load_state_dict(files.load(file)["method"])
        except (LookupError, TypeError, AttributeError, RuntimeError):
            raise InputError(f"{file}: does not fit its config.json and this version; train the run anew") from None
        return method.to(self.device).eval()

    @cached_property
    def encoder(self) -> ViT:
        if self.path.is_file():
            return encoder_files.load_encoder(self.path, self.device)
        if not isinstance(self.method.encoder, ViT):
            raise Absent(f"{self.label} keeps no ViT; give a run that does")
        return self.method.encoder

    @property
    def decoder(self) -> mae.Decoder:
        """A decoder that is given mask tokens and attends to them: MAE's, under whatever method."""
        found = getattr(self.method, "decoder", None)
        if not isinstance(found, mae.Decoder) or not any(isinstance(block.attn, Attention) for block in found.blocks):
            raise Absent(f"{self.label} has no decoder whose mask tokens attend to patches; give a run of MAE's kind")
        return found

    @torch.no_grad()
    def draw(self, images, index: Tensor | None = None, step: int = 0):
        """What a training step would make of these images; always the same. Index -1: none of the training set."""
        index = torch.full((len(images),), -1) if index is None else index
        rng = StepRandom(self.settings.seed, 2**40 + step, len(images), None, self.device)
        with augment.views_for(self.settings):
            return self.method.draw(images, index, rng)

    def masks(self, images, alike: bool = False, step: int = 0) -> Mask:
        """Masks as in training, or the first of them for all images."""
        mask = self.draw(images, step=step).mask
        if not mask.masked.shape[1]:
            raise Absent(f"{self.label} hides nothing, so that its decoder knows no mask token; give a run that masks")
        return Mask(*(side[:1].expand_as(side) for side in mask)) if alike else mask

    @property
    def log(self) -> list[dict]:
        if self.path.is_file():
            raise Absent(f"{self.label} is a file, of which only the encoder is read; give a run")
        if not (rows := read_log(self.directory / "log.jsonl")):
            raise Absent(f"{self.label} has logged no step yet; wait for one")
        return rows

    @property
    def fine_tuned(self) -> dict[str, dict[int, list[float]]]:
        """Folder of an `evaluate.py` → epoch → top-1 accuracy of each seed, where all seeds have been measured."""
        found: dict[str, list[dict]] = {}
        for file in sorted(self.directory.glob("*/seed-*/log.jsonl")):
            tops = {row["epoch"]: row["top1"] for row in read_log(file) if "top1" in row}
            found.setdefault(file.parts[-3], []).append(tops)
        tops = {name: {epoch: [seed[epoch] for seed in seeds] for epoch in seeds[0] if all(epoch in s for s in seeds)}
                for name, seeds in found.items()}  # fmt: skip
        if not any(tops.values()):
            raise Absent(f"{self.label} has not been fine-tuned; evaluate.py --protocol finetune does that")
        return {name: by_epoch for name, by_epoch in tops.items() if by_epoch}


def read_log(file: Path) -> list[dict]:
    """The lines of a log.jsonl but for the first. One that is being written may end early."""
    try:
        return [json.loads(line) for line in file.read_text().splitlines()[1:] if line.endswith("}")]
    except (OSError, ValueError):
        raise InputError(f"{file}: no log of a run; give a directory that train.py wrote") from None


class Study:
    """The runs of one command, the images that they are shown, and what was asked for."""

    def __init__(self, args, device):
        self.args, self.device, self.shown = args, device, {}
        self.runs = [Run(path, device) for path in args.run]
        about = self.runs[0].settings
        self.data = args.data or about.data, args.data_root or about.data_root  # the set's name, and its folder
        if len({run.label for run in self.runs}) < len(self.runs):
            for run in self.runs:
                run.label = str(run.path)

    def only(self) -> Run:
        if len(self.runs) > 1:
            raise Absent("shows one run; give one to --run")
        return self.runs[0]

    def open(self, split: str) -> image_sets.ImageSet:
        if self.data[0] is None:
            raise InputError(f"data: {self.runs[0].label} does not say which images to show; give --data")
        own = dict.fromkeys("classes class_level range split columns".split()) if self.args.data else {}
        names = dict(data=self.data[0], data_root=self.data[1], download=False)
        return image_sets.open_for(SimpleNamespace(**vars(self.runs[0].settings) | names | own), split)

    @cached_property
    def val(self) -> image_sets.ImageSet:
        return self.open("val")

    @cached_property
    def train(self) -> image_sets.ImageSet:
        found, first = self.open("train"), getattr(self.runs[0].settings, "images", None)
        return found.first(first) if first and not self.args.data else found  # a run may train on few

    def take(self, index: Tensor) -> Iterator:
        """Validation images, a batch at a time, so that they may be many. `shown` keeps which, for the JSON."""
        self.shown["val"] = index.tolist()
        return (self.val.images(part, self.device) for part in index.split(BATCH))

    def batches(self, n: int) -> Iterator:
        """n validation images, evenly spaced."""
        return self.take(spaced(len(self.val), n))

    def pictures(self, n: int):
        """The same at once: uint8 (n, 3, H, W), or a list where sizes vary."""
        self.shown["val"] = spaced(len(self.val), n).tolist()
        return self.val.images(torch.tensor(self.shown["val"]), self.device)

    def labelled(self, n: int, classes: int) -> tuple[Iterator, Tensor]:
        """About n validation images, equally many of each of at most `classes` classes, and their labels (n,)."""
        if not self.val.classes:
            raise Absent(f"the images of {self.data[0]} have no labels")
        labels = self.val.labels.cpu()
        chosen = labels.unique()
        groups = [(labels == c).nonzero()[:, 0] for c in chosen[spaced(len(chosen), classes)]]
        at = torch.cat([group[spaced(len(group), max(2, n // len(groups)))] for group in groups])
        return self.take(at), labels[at]

    def label_maps(self, n: int) -> tuple[list, list[Tensor]]:
        """n validation images of --pixels, as batches of one, and their maps (1, H, W)."""
        root = Path(self.args.pixels)
        found = Segments(root, "val", "ade" if (root / "annotations" / "validation").is_dir() else "voc")
        self.shown["label maps"] = spaced(len(found), n).tolist()
        pairs = [found.read(i) for i in self.shown["label maps"]]
        return [[image.to(self.device)] for image, *_ in pairs], [labels for _, labels, _ in pairs]

    def references(self, grid: tuple[int, int] | None = None) -> Iterator[tuple[str, ViT]]:
        """The encoders of --reference; where a grid is given, for images so large that they have as many patches."""
        names = [Path(path).name for path in self.args.reference]
        for path, name in zip(self.args.reference, names, strict=True):
            encoder = encoder_files.load_encoder(path, self.device)
            if grid and encoder.grid != grid:
                encoder = encoder_files.load_encoder(path, self.device, [side * encoder.patch_size for side in grid])
            yield f"reference {name if names.count(name) == 1 else path}", encoder

    @cached_property
    def encoders(self) -> list[tuple[str, ViT]]:
        return [(run.label, run.encoder) for run in self.runs] + list(self.references())


def spaced(total: int, n: int) -> Tensor:
    """At most n of 0 … total-1, evenly spaced."""
    return torch.linspace(0, total - 1, min(n, total)).long()
