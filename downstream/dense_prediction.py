"""Segmentation and detection from an encoder's patches as a map: images fitted into a square, training, heads, scores.

Images are scaled to fit a square and padded at the right and below; scores are taken at each image's own size. What is
random about image i in an epoch is a function of (seed, epoch, i), so it does not matter which process reads it.
"""

import contextlib
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.detection import MaskRCNN, anchor_utils, faster_rcnn, mask_rcnn
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops import MultiScaleRoIAlign, masks_to_boxes
from tqdm import tqdm

from common import ViT
from downstream.training_loop import take_step
from inputs import augment, images_in_files
from runtime.errors import InputError
from runtime.optimization import learning_rate, parameter_groups
from runtime.randomness import epoch_order

try:
    from pycocotools import mask as rle
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
except ImportError:  # refused where detection is asked for
    COCO = None

IGNORE = 255  # a pixel of no class


class Sample(NamedTuple):
    index: int  # in its set
    image: Tensor  # (3, S, S), normalised, padded with zeros
    planes: Tensor  # labels (1, S, S) or masks (n, S, S) in training; as they were read in tests
    kinds: Tensor  # (n,) int64, of the masks
    size: tuple[int, int]  # of the image as it was read
    fitted: tuple[int, int]  # of what of it is in the square, at its upper left


def fit(image: Tensor, planes: Tensor, fill: int, size: int, rng: np.random.Generator | None, jitter=(1.0, 1.0)):
    """Scale an image to fit the square. With `rng`: its planes too, by a jittered scale; crop and mirror both."""
    scale = size / max(image.shape[1:]) * (rng.uniform(*jitter) if rng else 1)
    h, w = (max(1, round(side * scale)) for side in image.shape[1:])
    image = augment.normalize(augment.resize(image[None], (h, w)))[0]
    if rng:
        planes = F.interpolate(planes[None], (h, w), mode="nearest-exact")[0]
        top, left = (int(rng.integers(max(0, side - size) + 1)) for side in (h, w))
        image, planes = (x[:, top : top + size, left : left + size] for x in (image, planes))
        if rng.random() < 0.5:
            image, planes = image.flip(2), planes.flip(2)
        h, w = image.shape[1:]
        planes = F.pad(planes, (0, size - w, 0, size - h), value=fill)
    return F.pad(image, (0, size - w, 0, size - h)), planes, (h, w)


class Reader(torch.utils.data.Dataset):
    """(epoch, i) → the Sample of image i, its augmentation a function of (seed, epoch, i); without a seed, none."""

    def __init__(self, images, size: int, seed: int | None = None, jitter=(1.0, 1.0)):
        self.images, self.size, self.seed, self.jitter = images, size, seed, jitter

    def __getitem__(self, key: tuple[int, int]) -> Sample | InputError:
        epoch, i = key
        try:
            image, planes, kinds = self.images.read(i)
        except InputError as error:  # handed over, as a DataLoader would wrap it in a traceback
            return error
        rng = None if self.seed is None else np.random.default_rng((self.seed, epoch, i))
        square, planes, fitted = fit(image, planes, self.images.fill, self.size, rng, self.jitter)
        return Sample(i, square, planes, kinds, tuple(image.shape[1:]), fitted)

    def batches(self, orders, workers: int) -> Iterator[list[Sample]]:
        loader = DataLoader(
            self, batch_sampler=orders, collate_fn=list, num_workers=workers, generator=torch.Generator(),
            worker_init_fn=images_in_files.leave_signals_to_parent,
        )  # fmt: skip
        for batch in loader:
            for sample in batch:
                if isinstance(sample, InputError):
                    raise sample
            yield batch


class Features(nn.Module):
    """An encoder as a dense backbone: normalised images (B, 3, S, S) → (B, D, h, w), its final-norm patch tokens.

    It alone runs in bf16: heads stay in float32, because boxes rounded to bf16 would be off by pixels.
    """

    def __init__(self, encoder: ViT, bf16: bool = False):
        super().__init__()
        self.encoder, self.out_channels, self.bf16 = encoder, encoder.width, bf16

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            tokens = self.encoder(images)[:, 1:]  # (B, N, D)
        return tokens.float().transpose(1, 2).unflatten(2, self.encoder.grid)


def fine_tune(model: nn.Module, reader: Reader, args, device: torch.device) -> None:
    """AdamW over heads and encoder: a tenth of the steps to warm up, then a cosine to zero, or steps at `decay_at`."""
    n, B = len(reader.images), args.batch_size
    if n < B:
        raise InputError(f"batch size {B}: larger than the {n} images to learn from")
    steps = args.epochs * (n // B)

    def orders():
        for epoch in range(args.epochs):
            keys = [(epoch, i) for i in epoch_order(args.seed, epoch, n).tolist()]
            yield from (keys[k : k + B] for k in range(0, n - B + 1, B))

    groups = parameter_groups(model, weight_decay=args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=device.type in ("cpu", "cuda"))
    scaler = torch.amp.GradScaler(device.type, enabled=False)  # bf16 needs none
    model.train()
    with tqdm(reader.batches(orders(), args.workers), args.task, steps, unit="step", leave=False) as bar:
        for step, samples in enumerate(bar):
            peak = args.lr * 0.1 ** sum(step >= epoch * (n // B) for epoch in args.decay_at)
            rate = learning_rate(step, steps, steps // 10, peak, peak if args.decay_at else 0.0)
            loss = take_step(optimizer, [model.loss(samples, device)], rate, scaler).item()
            if not math.isfinite(loss):
                raise InputError(f"loss: not finite in step {step + 1} of {steps}; give a smaller --lr")
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)


@torch.no_grad()
def measure(model: nn.Module, reader: Reader, args, device: torch.device) -> dict:
    n, B = len(reader.images), args.batch_size
    orders = [[(0, i) for i in range(k, min(k + B, n))] for k in range(0, n, B)]
    model.eval()
    with tqdm(reader.batches(orders, args.workers), "measure", len(orders), unit="batch", leave=False) as bar:
        return {**model.measure(reader.images, bar, device), "n": n}


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
        image, file = images_in_files.decode(self.pairs[i][0]), self.pairs[i][1]
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


class Instances:
    """Images of a COCO annotation file, with the masks of their objects; crowds are left out."""

    fill = 0

    def __init__(self, root: Path, split: str):
        if COCO is None:
            raise InputError('pycocotools: not installed, and detection needs it; pip install ".[coco]"')
        files = sorted(root.glob(f"annotations/instances_{split}*.json"))
        if not files:
            raise InputError(f"{root}: has no annotations/instances_{split}*.json; give a folder in COCO's format")
        self.file = files[0]
        folder = root / files[0].stem.removeprefix("instances_")
        self.folder = folder if folder.is_dir() else root
        try:
            self.coco = quietly(COCO, str(files[0]))
            self.categories = sorted(self.coco.cats)  # COCO's ids have gaps; ours are 1 … K in their order
            objects = {a["image_id"] for a in self.coco.anns.values() if not a.get("iscrowd")}
        except (OSError, ValueError, LookupError, TypeError, AssertionError):
            raise InputError(f"{files[0]}: not a COCO annotation file") from None
        self.classes = len(self.categories)
        self.ids = sorted(objects if split == "train" else self.coco.imgs)  # nothing to learn without objects
        if not objects:
            raise InputError(f"{files[0]}: has no objects to detect")

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """uint8 image (3, H, W), masks (n, H, W) of 0 and 1, and kinds (n,) from 1."""
        found = [a for a in self.coco.imgToAnns[self.ids[i]] if not a.get("iscrowd")]
        try:
            file = self.folder / self.coco.imgs[self.ids[i]]["file_name"]
            masks = [self.coco.annToMask(a) for a in found]
            kinds = torch.tensor([1 + self.categories.index(a["category_id"]) for a in found], dtype=torch.int64)
        except Exception as error:  # pycocotools checks little of what it is given
            raise InputError(f"{self.file}: image {self.ids[i]} is wrongly annotated ({error!r})") from None
        image = images_in_files.decode(file)
        if any(mask.shape != image.shape[1:] for mask in masks):
            raise InputError(f"{file}: not of the size that its annotations are for")
        return image, torch.from_numpy(np.stack(masks)) if masks else image.new_empty(0, *image.shape[1:]), kinds


def quietly(function, *arguments):
    """pycocotools prints what it does; standard output is for the result."""
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*arguments)


class Pyramid(nn.Module):
    """ViTDet's simple feature pyramid: maps at 4, 2, 1, 1/2 times the last map's resolution, all from that map.

    For patches of 16 pixels those are strides 4, 8, 16, 32; a fifth map, every other place of the fourth, is for
    proposals only. Each is (B, channels, …), after convolutions of 1 and 3, with layer norms over the channels.
    """

    def __init__(self, backbone: Features, channels: int):
        super().__init__()
        self.backbone, self.out_channels = backbone, channels
        D = backbone.out_channels

        def double(width: int) -> nn.Module:
            return nn.ConvTranspose2d(width, width // 2, kernel_size=2, stride=2)

        self.levels = nn.ModuleList(
            nn.Sequential(
                *change, nn.Conv2d(width, channels, 1, bias=False), LayerNorm2d(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False), LayerNorm2d(channels),
            )
            for change, width in (
                ([double(D), LayerNorm2d(D // 2), nn.GELU(), double(D // 2)], D // 4),
                ([double(D)], D // 2), ([], D), ([nn.MaxPool2d(2)], D),
            )
        )  # fmt: skip

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.backbone(images)
        maps = {str(k): level(x).contiguous() for k, level in enumerate(self.levels)}
        return maps | {"pool": maps["3"][:, :, ::2, ::2]}


class Detector(nn.Module):
    """torchvision's Mask R-CNN on the pyramid, in torchvision's proportions: its own sizes from 512 channels up."""

    def __init__(self, backbone: Features, classes: int):
        super().__init__()
        encoder = backbone.encoder
        p, size, C = encoder.patch_size, encoder.patch_size * encoder.grid[0], min(256, encoder.width // 2)
        if p % 4 or size % (4 * p):  # or strides would not be whole
            wanted = f"a multiple of {4 * p}" if p % 4 == 0 else "patches whose side is divisible by 4"
            raise InputError(f"image size {size}, patches of {p}: cannot be halved and doubled twice; give {wanted}")
        regions = min(512, max(32, encoder.patches // 2))  # of an image that the heads learn from
        levels, anchors = ["0", "1", "2", "3"], tuple((2 * p * 2**k,) for k in range(5))  # eight strides wide
        self.rcnn = MaskRCNN(
            Pyramid(backbone, C),
            min_size=size, max_size=size, size_divisible=1, image_mean=[0.0] * 3, image_std=[1.0] * 3,  # as it is
            rpn_anchor_generator=anchor_utils.AnchorGenerator(anchors, ((0.5, 1.0, 2.0),) * 5),
            rpn_batch_size_per_image=min(256, regions), box_batch_size_per_image=regions,
            box_roi_pool=MultiScaleRoIAlign(levels, 7, 2), mask_roi_pool=MultiScaleRoIAlign(levels, 14, 2),
            box_head=faster_rcnn.TwoMLPHead(C * 7 * 7, 4 * C),
            box_predictor=faster_rcnn.FastRCNNPredictor(4 * C, 1 + classes),
            mask_head=mask_rcnn.MaskRCNNHeads(C, [C] * 4, 1),
            mask_predictor=mask_rcnn.MaskRCNNPredictor(C, C, 1 + classes),
        )  # fmt: skip

    def loss(self, samples: list[Sample], device) -> Tensor:
        images = [s.image.to(device) for s in samples]
        return sum(self.rcnn(images, [target(s.planes.to(device), s.kinds.to(device)) for s in samples]).values())

    def measure(self, images: Instances, batches: Iterator[list[Sample]], device) -> dict:
        results = []
        for samples in batches:
            for found, s in zip(self.rcnn([s.image.to(device) for s in samples]), samples, strict=True):
                results += detections(images, found, s)
        return detection_scores(images.coco, results)


def target(masks: Tensor, kinds: Tensor) -> dict[str, Tensor]:
    """Masks (n, S, S) and kinds (n,) → what Mask R-CNN learns from: those still visible, with their boxes."""
    there = (masks > 0).flatten(1).any(dim=1)
    masks, kinds = masks[there], kinds[there]
    # A box ends where its last pixel ends, one beyond the index that torchvision gives.
    boxes = masks_to_boxes(masks) + masks.new_tensor([0, 0, 1, 1], dtype=torch.float32)
    return {"boxes": boxes, "labels": kinds, "masks": masks}


def detections(images: Instances, found: dict[str, Tensor], s: Sample) -> list[dict]:
    """One image's detections in the square → COCO results at the image's own size."""
    (H, W), (h, w) = s.size, s.fitted
    boxes = found["boxes"] * found["boxes"].new_tensor([W / w, H / h, W / w, H / h])
    boxes = boxes.clamp_min(0).minimum(boxes.new_tensor([W, H, W, H]))
    boxes[:, 2:] -= boxes[:, :2]  # to x, y, width, height
    masks = found["masks"][:, :, :h, :w]
    if len(masks) and (h, w) != (H, W):
        masks = F.interpolate(masks, (H, W), mode="bilinear")
    coded = rle.encode(np.asfortranarray((masks[:, 0] > 0.5).permute(1, 2, 0).to(torch.uint8).cpu().numpy()))
    return [
        dict(image_id=images.ids[s.index], category_id=images.categories[kind - 1], bbox=box, score=score,
             segmentation=mask)
        for kind, box, score, mask in zip(
            found["labels"].tolist(), boxes.tolist(), found["scores"].tolist(), coded, strict=True)
    ]  # fmt: skip


def detection_scores(truth, results: list[dict]) -> dict[str, float]:
    """COCO's average precision of boxes and masks, in per cent: over IoU .5 to .95, and at .5."""
    scores = {}
    for name, kind in (("box", "bbox"), ("mask", "segm")):
        ap = ap50 = 0.0
        if results:  # pycocotools does not take none
            judge = COCOeval(truth, quietly(truth.loadRes, results), kind)
            for step in (judge.evaluate, judge.accumulate, judge.summarize):
                quietly(step)
            ap, ap50 = 100 * judge.stats[:2]
        scores |= {f"{name}_ap": float(ap), f"{name}_ap50": float(ap50)}
    return scores
