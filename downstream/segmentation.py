"""Semantic segmentation: images with label maps, an FCN head on the patch features, mean intersection over union."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.models.segmentation.fcn import FCNHead

from downstream.dense_prediction import Features, Sample, decode
from runtime.errors import InputError

IGNORE = 255  # a pixel of no class


def lines(path: Path) -> list[str]:
    try:
        found = path.read_text().split("\n")
    except (OSError, ValueError):
        raise InputError(f"{path}: cannot be read; --data must be a folder in VOC's format, or give --format") from None
    if not (found := [line.strip() for line in found if line.strip()]):
        raise InputError(f"{path}: names nothing; give a folder in VOC's format")
    return found


class Segments:
    """Images and maps of class labels: one half, "train" or "val", of a folder in VOC's or ADE20K's format."""

    fill = IGNORE

    def __init__(self, root: Path, split: str, kind: str = "voc"):
        self.reduce = kind == "ade"  # its labels 0, 1, 2 … mean IGNORE, 0, 1 …
        if kind == "ade":
            part = {"train": "training", "val": "validation"}[split]
            images, labels, self.classes = root / "images" / part, root / "annotations" / part, 150
            names = sorted(path.stem for path in images.glob("*.jpg"))
            if not names:
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
        image, file = decode(self.pairs[i][0]), self.pairs[i][1]
        try:
            with Image.open(file) as png:
                labels = np.array(png)
        except Exception as error:  # as in images_in_files.decode
            raise InputError(f"{file}: does not decode as a label map ({type(error).__name__})") from None
        if labels.dtype != np.uint8 or labels.shape != tuple(image.shape[1:]):
            what = f"{labels.dtype} values of shape {labels.shape}"
            raise InputError(f"{file}: holds {what}; must be 8-bit indices, {tuple(image.shape[1:])} as the image")
        if self.reduce:
            labels = labels - np.uint8(1)  # 0 becomes 255
        if (wrong := labels[(labels >= self.classes) & (labels != IGNORE)]).size:
            raise InputError(f"{file}: has label {wrong[0]}; labels must be below {self.classes}, or {IGNORE} for none")
        return image, torch.from_numpy(labels)[None], torch.empty(0, dtype=torch.int64)


class Segmenter(nn.Module):
    """Labels of every pixel, by an FCN head on the patch features and bilinear upsampling."""

    def __init__(self, backbone: Features, classes: int):
        super().__init__()
        self.backbone, self.classes = backbone, classes
        self.head = FCNHead(backbone.out_channels, classes)

    def forward(self, images: Tensor) -> Tensor:  # (B, 3, S, S) → (B, classes, S, S)
        return F.interpolate(self.head(self.backbone(images)), images.shape[2:], mode="bilinear")

    def loss(self, samples: list[Sample], device) -> Tensor:
        """Cross entropy, averaged over the pixels that have a label."""
        logits = self(torch.stack([s.image for s in samples]).to(device))
        labels = torch.stack([s.planes[0] for s in samples]).to(device).long()
        total = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
        return total / (labels != IGNORE).sum().clamp_min(1)

    def measure(self, images: Segments, batches: Iterator[list[Sample]], device) -> dict:
        matrix = torch.zeros(self.classes, self.classes, dtype=torch.int64)
        for samples in batches:
            logits = self(torch.stack([s.image for s in samples]).to(device))
            for x, s in zip(logits, samples, strict=True):
                x = x[None, :, : s.fitted[0], : s.fitted[1]]
                predicted = F.interpolate(x, s.size, mode="bilinear")[0].argmax(dim=0).cpu()
                matrix += confusion(predicted, s.planes[0].long(), self.classes)
        if not matrix.any():
            raise InputError("labels: none in the images to test on; give images whose pixels have labels")
        return segmentation_scores(matrix)


def confusion(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Two maps of labels, any shape → (classes, classes): pixels by true label and prediction; IGNORE is left out."""
    known = labels != IGNORE
    pairs = labels[known] * classes + predicted[known]
    return pairs.bincount(minlength=classes**2).reshape(classes, classes)


def segmentation_scores(matrix: Tensor) -> dict:
    """Mean intersection over union, in per cent, of the classes that were there or were predicted; pixel accuracy."""
    matrix = matrix.double()
    hits = matrix.diagonal()
    union = matrix.sum(0) + matrix.sum(1) - hits
    iou = 100 * (hits / union)[union > 0]
    return {"miou": iou.mean().item(), "pixel_accuracy": 100 * (hits.sum() / matrix.sum()).item()}
