"""Images with labels for every pixel, or with boxes and masks of objects, as people's folders hold them.

Each becomes a `Sample`: fitted into a square and padded at the right and below. What is random about image i in epoch e
is a function of (seed, e, i), so it does not matter which process reads it. What is wrong is an `InputError` of one
line: of all boxes when their file is opened, of an image or a map of labels when it is read.
"""

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from inputs import augment, image_files
from runtime.errors import InputError, library

IGNORE = 255  # a pixel of no class
# Photometric distortion by factors of brightness (mmsegmentation adds), contrast, saturation; the hue in full turns.
DISTORTION = (0.875, 1.125), (0.5, 1.5), (0.5, 1.5), (-0.1, 0.1)


class Sample(NamedTuple):
    index: int  # in its set
    image: Tensor  # (3, S, S), normalised, padded with zeros; for windows one side may be longer
    planes: Tensor  # labels (1, S, S) or masks (n, S, S) in training; as they were read in tests
    kinds: Tensor  # (n,) int64, of the masks
    size: tuple[int, int]  # of the image as it was read
    fitted: tuple[int, int]  # of what of it is in the square, at its upper left
    seed: int = 0  # of what a head draws for this image


def fit(image: Tensor, planes: Tensor, fill: int, size: int, rng, jitter=(1.0, 1.0), distort=False, windows=False):
    """Scale an image to fit the square. With NumPy's `rng`: its planes too, by a jittered scale; crop, mirror, distort.

    For `windows` its shorter side fits, and the longer one is cropped in training only.
    """
    scale = size / (min if windows else max)(image.shape[1:]) * (rng.uniform(*jitter) if rng else 1)
    h, w = (max(1, round(side * scale)) for side in image.shape[1:])
    image = augment.resize(image[None], (h, w))[0]
    if rng:
        planes = F.interpolate(planes[None], (h, w), mode="nearest-exact")[0]
        top, left = (int(rng.integers(max(0, side - size) + 1)) for side in (h, w))
        image, planes = (x[:, top : top + size, left : left + size] for x in (image, planes))
        if rng.random() < 0.5:
            image, planes = image.flip(2), planes.flip(2)
        for change, (low, high) in zip(augment.ADJUST, DISTORTION, strict=True) if distort else ():
            if rng.random() < 0.5:
                image = change(image[None], torch.full((1, 1, 1, 1), rng.uniform(low, high)))[0]
        h, w = image.shape[1:]
        planes = F.pad(planes, (0, size - w, 0, size - h), value=fill)
    return F.pad(augment.normalize(image[None])[0], (0, max(0, size - w), 0, max(0, size - h))), planes, (h, w)


class Reader(torch.utils.data.Dataset):
    """(epoch, i) → the Sample of image i, augmented as a function of (seed, epoch, i); without a seed, not at all.

    `views` is for `augment.views_for`, which a process that reads may not inherit, `how` for `fit`.
    """

    def __init__(self, images, size: int, seed: int | None = None, views=None, **how):
        self.images, self.size, self.seed, self.views, self.how = images, size, seed, views, how

    def __getitem__(self, key: tuple[int, int]) -> Sample | InputError:
        epoch, i = key
        try:
            image, planes, kinds = self.images.read(i)
        except InputError as error:  # handed over, as a DataLoader would wrap it in a traceback
            return error
        rng = None if self.seed is None else np.random.default_rng((self.seed, epoch, i))
        with augment.views_for(self.views):
            square, planes, fitted = fit(image, planes, self.images.fill, self.size, rng, **self.how)
        seed = 0 if rng is None else int(rng.integers(2**63))
        return Sample(i, square, planes, kinds, tuple(image.shape[1:]), fitted, seed)

    def batches(self, orders, workers: int) -> Iterator[list[Sample]]:
        how = dict(num_workers=workers, worker_init_fn=image_files.leave_signals_to_parent)
        for batch in DataLoader(self, batch_sampler=orders, collate_fn=list, generator=torch.Generator(), **how):
            for sample in batch:
                if isinstance(sample, InputError):
                    raise sample
            yield batch


def lines(path: Path) -> list[str]:
    with contextlib.suppress(OSError, ValueError):
        if found := [line.strip() for line in path.read_text().split("\n") if line.strip()]:
            return found
    raise InputError(f"{path}: cannot be read, or names nothing; give --data a folder in the --format that is given")


class Segments:
    """Images and maps of class labels: one half, "train" or "val", of a folder in VOC's or ADE20K's format."""

    fill = IGNORE

    def __init__(self, root: Path, split: str, kind: str = "voc"):
        self.reduce = kind == "ade"  # its labels 0, 1, 2 … mean IGNORE, 0, 1 …
        if self.reduce:
            part = {"train": "training", "val": "validation"}[split]
            images, labels, self.classes = root / "images" / part, root / "annotations" / part, 150
            if not (names := sorted(path.stem for path in images.glob("*.jpg"))):
                raise InputError(f"{images}: no images; give the folder ADEChallengeData2016")
        else:
            images, labels, known = root / "JPEGImages", root / "SegmentationClass", root / "labels.txt"
            names = lines(root / "ImageSets" / "Segmentation" / f"{split}.txt")
            self.classes = len(lines(known)) if known.exists() else 21  # VOC has no such file; --make-scenes writes it
        self.pairs = [(images / f"{name}.jpg", labels / f"{name}.png") for name in names]

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """uint8 image (3, H, W) and labels (1, H, W); no kinds, as labels have their own."""
        image, file = image_files.decode(self.pairs[i][0]), self.pairs[i][1]
        try:
            with Image.open(file) as png:
                labels = np.array(png)
        except Exception as error:  # as in images_in_files.decode
            raise InputError(f"{file}: does not decode as a label map ({type(error).__name__})") from None
        if labels.dtype != np.uint8 or labels.shape != tuple(image.shape[1:]):
            what = f"{labels.dtype} values of shape {labels.shape}"
            raise InputError(f"{file}: holds {what}; must be 8-bit indices, {tuple(image.shape[1:])} as the image")
        labels = labels - np.uint8(self.reduce)  # 0 becomes 255
        if (wrong := labels[(labels >= self.classes) & (labels != IGNORE)]).size:
            raise InputError(f"{file}: has label {wrong[0]}; labels must be below {self.classes}, or {IGNORE} for none")
        return image, torch.from_numpy(labels)[None], torch.empty(0, dtype=torch.int64)


class Instances:
    """Images with the masks of their objects, of a COCO annotation file or of Tiny-ImageNet; crowds are left out."""

    fill = 0

    def __init__(self, root: Path, split: str, kind: str = "coco", classes: int | None = None):
        self.coco = library("pycocotools.coco", "coco", "detection").COCO()
        self.masks = kind == "coco"  # else they are the boxes, filled
        found = coco_file(root, split) if self.masks else tiny_imagenet_boxes(root, split, classes)
        self.file, self.folder, boxes = found
        try:
            self.coco.dataset = boxes or json.loads(self.file.read_text())
            with contextlib.redirect_stdout(io.StringIO()):  # what pycocotools says of its doings
                self.coco.createIndex()
            self.categories = sorted(self.coco.cats)  # COCO's ids have gaps; ours are 1 … K in their order
            objects = {a["image_id"] for a in self.coco.anns.values() if not a.get("iscrowd")}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            raise InputError(f"{self.file}: not a COCO annotation file") from None
        for number, annotation in self.coco.anns.items():
            if wrong := flaw(annotation, self.coco):
                raise InputError(f"{self.file}: annotation {number} {wrong}; mend it or leave it out")
        self.classes = len(self.categories)
        self.ids = sorted(objects if split == "train" else self.coco.imgs)  # nothing to learn without objects
        if not objects:
            raise InputError(f"{self.file}: has no objects to detect")

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """uint8 image (3, H, W), masks (n, H, W) of 0 and 1, and kinds (n,) from 1."""
        found = [a for a in self.coco.imgToAnns[self.ids[i]] if not a.get("iscrowd")]
        try:
            file = self.folder / self.coco.imgs[self.ids[i]]["file_name"]
            masks = [self.coco.annToMask(a) for a in found]
        except Exception as error:  # pycocotools checks little of what it is given
            raise InputError(f"{self.file}: image {self.ids[i]} is wrongly annotated ({error!r})") from None
        kinds = torch.tensor([1 + self.categories.index(a["category_id"]) for a in found], dtype=torch.int64)
        image = image_files.decode(file)
        if any(mask.shape != image.shape[1:] for mask in masks):
            raise InputError(f"{file}: not of the size that its annotations are for")
        return image, torch.from_numpy(np.stack(masks)) if masks else image.new_empty(0, *image.shape[1:]), kinds


def coco_file(root: Path, split: str) -> tuple[Path, Path, None]:
    """The annotation file of a split, and the folder that its images lie in."""
    if not (files := sorted(root.glob(f"annotations/instances_{split}*.json"))):
        raise InputError(f"{root}: has no annotations/instances_{split}*.json; give a folder in COCO's format")
    folder = root / files[0].stem.removeprefix("instances_")
    return files[0], folder if folder.is_dir() else root, None


def flaw(annotation: dict, coco) -> str | None:
    """What is wrong with an annotation, if anything; pycocotools would take four numbers, two points, for a box."""
    try:
        (x, y, w, h), outlines, _, _ = (annotation[key] for key in ("bbox", "segmentation", "area", "iscrowd"))
        for what, listed in (("image", coco.imgs), ("category", coco.cats)):
            if (number := annotation[f"{what}_id"]) not in listed:
                return f"is of {what} {number}, which is not listed"
        image = coco.imgs[annotation["image_id"]]
        if min(w, h, x + w, y + h, image["width"] - x, image["height"] - y) < 0:
            return f"has the box {annotation['bbox']}, outside of its image"
        if not outlines:
            return "has an empty segmentation"
        if isinstance(outlines, list) and min(map(len, outlines)) < 6:
            return "has a polygon of fewer than three points"
    except (LookupError, TypeError, ValueError) as error:
        return f"is not one of COCO's ({error!r})"


def tiny_imagenet_boxes(root: Path, split: str, classes: int | None = None) -> tuple[Path, Path, dict]:
    """Tiny-ImageNet's boxes, one for each image, its first and last pixels given, as a COCO annotation file says it.

    Of the first `classes` classes, if that is given; of the training images those that are there.
    """
    if not (lists := sorted(root.glob("train/*/*_boxes.txt"))[:classes]):
        raise InputError(f"{root}: has no train/CLASS/CLASS_boxes.txt; give the folder tiny-imagenet-200")
    kinds = {file.parent.name: 1 + k for k, file in enumerate(lists)}
    about = dict(images=[], annotations=[], categories=[dict(id=k, name=name) for name, k in kinds.items()])
    lists = lists if split == "train" else [root / "val/val_annotations.txt"]
    for i, (file, line) in enumerate((path, line) for path in lists for line in lines(path)):
        try:  # only in the list for tests does the class stand after the image
            name, *kind, left, top, right, bottom = line.split()
            (kind,) = kind if split == "val" else [file.parent.name]
            x, y, w, h = int(left), int(top), int(right) + 1 - int(left), int(bottom) + 1 - int(top)
        except ValueError:
            raise InputError(f"{file}: holds {line!r}; must be an image, its class and four numbers") from None
        image = file.parent / "images" / name
        if (classes and kind not in kinds) or (split == "train" and not image.exists()):
            continue
        about["images"].append(dict(id=i, file_name=str(image.relative_to(root)), width=64, height=64))
        box = dict(bbox=[x, y, w, h], area=w * h, segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]], iscrowd=0)
        about["annotations"].append(box | dict(id=1 + i, image_id=i, category_id=kinds.get(kind, kind)))
    return root / split, root, about
