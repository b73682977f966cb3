"""Detection with instance masks: COCO's annotations, Mask R-CNN on a simple feature pyramid, average precision."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign, masks_to_boxes

from downstream.dense_prediction import Features, Sample, decode
from runtime.errors import InputError

try:
    from pycocotools import mask as rle
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
except ImportError:  # refused where detection is asked for
    COCO = None


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
        image = decode(file)
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
            rpn_anchor_generator=AnchorGenerator(anchors, ((0.5, 1.0, 2.0),) * 5),
            rpn_batch_size_per_image=min(256, regions), box_batch_size_per_image=regions,
            box_roi_pool=MultiScaleRoIAlign(levels, 7, 2), mask_roi_pool=MultiScaleRoIAlign(levels, 14, 2),
            box_head=TwoMLPHead(C * 7 * 7, 4 * C), box_predictor=FastRCNNPredictor(4 * C, 1 + classes),
            mask_head=MaskRCNNHeads(C, [C] * 4, 1), mask_predictor=MaskRCNNPredictor(C, C, 1 + classes),
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
