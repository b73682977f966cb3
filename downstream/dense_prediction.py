"""What stands on an encoder to segment or to detect: a pyramid of its maps, UperNet, Mask R-CNN; and their scores.

How ranks and parts of a step share the images changes nothing, but for drop path, for dropout in the FCN head, and for
batch norm, which sees one part of a step on all ranks. Mask R-CNN's losses are each image's own, and what its heads
sample comes from the sample's seed. Scores are taken at each image's own size.
"""

import contextlib
import io
import itertools
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.detection import MaskRCNN, anchor_utils, faster_rcnn, mask_rcnn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops import FeaturePyramidNetwork, box_convert, masks_to_boxes
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, save_image
from tqdm import tqdm

from common import ViT, cosine, initialize
from downstream.classifier import batch_norm, embed
from downstream.dense_recipes import Recipe
from downstream.training_loop import DTYPES, check_batch, optimize, optimizer_for
from inputs.dense_sets import IGNORE, Instances, Reader, Sample, Segments
from runtime import files
from runtime.errors import InputError, library
from runtime.optimization import learning_rate
from runtime.randomness import orders
from runtime.ranks import rank, sum_over_ranks, world_size

SHOWN, SIDE = 6, 256  # images, and pixels of a side, of the pictures


def four_depths(encoder: ViT) -> list[int]:
    """BEiT's taps: blocks 3, 5, 7 and 11 of 12, counted from 0, and their like. Their maps go without the last norm."""
    encoder.norm.requires_grad_(False)  # what has no gradient could not be averaged over ranks
    return [max(1, round(len(encoder.blocks) * share)) - 1 for share in (1 / 3, 1 / 2, 2 / 3, 1)]


def feature_maps(encoder: ViT, images: Tensor, taps: list[int]) -> list[Tensor]:
    """Normalised images (B, 3, S, S) → float32 (B, D, h, w) after each block of `taps`; if none, of the last norm."""
    x, bias, found = embed(encoder, images), encoder.relative_bias(), []
    for i, block in enumerate(encoder.blocks):
        x = block(x, bias)
        found += [x] * taps.count(i)  # of few blocks one may be tapped twice
    found = found or [encoder.norm(x)]
    return [x[:, 1:].float().transpose(1, 2).unflatten(2, encoder.grid) for x in found]


class BatchNorm(nn.BatchNorm2d):
    """Over the images of all ranks. `nn.SyncBatchNorm` refuses CPU tensors, and torch's a single value a channel."""

    def forward(self, x: Tensor) -> Tensor:  # (B, C, h, w)
        if not self.training or (world_size() == 1 and x[:, 0].numel() > 1):
            return super().forward(x)
        x = batch_norm(x, self.running_mean, self.running_var, True, self.momentum, self.eps)
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class Pyramid(nn.Module):
    """Four maps at 4, 2, 1, 1/2 times the patches' resolution: for patches of 16 pixels, strides 4, 8, 16, 32.

    "beit" makes each of its own map, from four depths, and keeps their width D. "vitdet" makes all of the last map
    (arXiv 2203.16527, §3); its first two are D/4 and D/2 wide. `widths` are those of the four.
    """

    def __init__(self, D: int, kind: str):
        super().__init__()
        up = partial(nn.ConvTranspose2d, kernel_size=2, stride=2)
        half, quarter, Norm = (D, D, nn.BatchNorm2d) if kind == "beit" else (D // 2, D // 4, LayerNorm2d)
        first = up(D, half, bias=kind != "beit")  # batch norm would remove a bias
        four_times = nn.Sequential(first, Norm(half), nn.GELU(), up(half, quarter))
        self.levels = nn.ModuleList([four_times, up(D, half), nn.Identity(), nn.MaxPool2d(2)])
        self.widths = [quarter, half, D, D]

    def forward(self, maps: list[Tensor]) -> list[Tensor]:  # one map, or four
        maps = maps * (len(self.levels) // len(maps))
        return [level(x).contiguous() for level, x in zip(self.levels, maps, strict=True)]


def upernet(D: int, classes: int) -> nn.ModuleList:
    """transformers' UperNet head and its auxiliary FCN, matrices initialised as CMAE says (§4.3), by Xavier's rule."""
    theirs = library("transformers.models.upernet.modeling_upernet", "upernet", "UperNet")
    C = min(512, 2 * D)  # 512, and 256 in the auxiliary head, from a ViT-S up
    config = SimpleNamespace(pool_scales=(1, 2, 3, 6), hidden_size=C, num_labels=classes)
    auxiliary = [theirs.UperNetConvModule(D, C // 2, kernel_size=3, padding=1), nn.Conv2d(C // 2, classes, 1)]
    heads = nn.ModuleList([theirs.UperNetHead(config, [D] * 4), nn.Sequential(*auxiliary)])
    initialize(heads)
    return heads


class Segmenter(nn.Module):
    """Labels of every pixel: an FCN head on the last map, or UperNet on four, and bilinear upsampling."""

    def __init__(self, encoder: ViT, classes: int, head: str = "fcn", precision: str = "fp32"):
        super().__init__()
        self.encoder, self.classes, self.precision = encoder, classes, precision
        self.taps, D = four_depths(encoder) if head == "upernet" else [], encoder.width
        self.pyramid = Pyramid(D, "beit") if self.taps else nn.Identity()
        self.heads = upernet(D, classes) if self.taps else nn.ModuleList([FCNHead(D, classes)])

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, S, S) → float32 (B, classes, S, S) of the head and, in training, of the auxiliary one."""
        with torch.autocast(images.device.type, DTYPES[self.precision], enabled=self.precision != "fp32"):
            maps = self.pyramid(feature_maps(self.encoder, images, self.taps))
            seen = [maps, maps[2]][: 1 + self.training] if self.taps else maps
            found = [head(x) for head, x in zip(self.heads, seen, strict=False)]
        return [F.interpolate(x.float(), images.shape[2:], mode="bilinear") for x in found]

    def loss(self, samples: list[Sample], device) -> Tensor:
        """Mean cross entropy of all pixels, 0 where no label is, as mmsegmentation; plus .4 of the auxiliary head's."""
        images = torch.stack([s.image for s in samples]).to(device)
        labels = torch.stack([s.planes[0] for s in samples]).to(device).long()
        losses = [F.cross_entropy(x, labels, ignore_index=IGNORE, reduction="sum") for x in self(images)]
        return sum(weight * loss for weight, loss in zip((1.0, 0.4), losses, strict=False)) / labels.numel()

    def predict(self, samples: list[Sample], device) -> list[Tensor]:
        """Labels (H, W) of each image at its own size. What exceeds the square is seen by overlapping windows."""
        S, found = self.encoder.patch_size * self.encoder.grid[0], []
        for s in samples:
            places = itertools.product(*(starts(side, S) for side in s.image.shape[1:]))
            windows = [(slice(None), slice(top, top + S), slice(left, left + S)) for top, left in places]
            total = torch.zeros(2, self.classes, *s.image.shape[1:], device=device)  # of logits, and their number
            for window, x in zip(windows, self(torch.stack([s.image[w] for w in windows]).to(device))[0], strict=True):
                total[0][window] += x
                total[1][window] += 1
            mean = (total[0] / total[1])[None, :, : s.fitted[0], : s.fitted[1]]
            found.append(F.interpolate(mean, s.size, mode="bilinear")[0].argmax(dim=0).cpu())
        return found

    def measure(self, images: Segments, batches: Iterator[list[Sample]], device) -> dict:
        matrix = torch.zeros(self.classes, self.classes, dtype=torch.int64)
        for samples in batches:
            for predicted, s in zip(self.predict(samples, device), samples, strict=True):
                matrix += confusion(predicted, s.planes[0].long(), self.classes)
        matrix = sum_over_ranks(matrix.to(device)).cpu()
        if not matrix.any():
            raise InputError("labels: none in the images to test on; give images whose pixels have labels")
        return segmentation_scores(matrix)

    def shown(self, image: Tensor, s: Sample, found: Tensor | None = None) -> Tensor:
        """The image with a colour for each class that was `found`, or else that is truly there."""
        masks = (s.planes[0] if found is None else found) == torch.arange(self.classes)[:, None, None]
        return draw_segmentation_masks(image, masks, 0.6)


def starts(length: int, size: int) -> list[int]:
    """Where windows of `size` begin that cover a length, two thirds of a window apart."""
    return [*range(0, length - size, max(1, size * 2 // 3)), max(0, length - size)]


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


class Neck(nn.Module):
    """A pyramid's four maps, all `out_channels` wide, and a fifth, every other place of the fourth, for proposals only.

    "beit" has lateral and top-down convolutions, "vitdet" convolutions of 1 and 3 with layer norms, level by level.
    """

    def __init__(self, D: int, channels: int, kind: str):
        super().__init__()
        self.pyramid, self.out_channels, self.top_down = Pyramid(D, kind), channels, kind == "beit"
        widths = self.pyramid.widths
        self.out = FeaturePyramidNetwork(widths, channels) if self.top_down else nn.ModuleList(nn.Sequential(
            nn.Conv2d(width, channels, 1, bias=False), LayerNorm2d(channels),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), LayerNorm2d(channels),
        ) for width in widths)  # fmt: skip

    def forward(self, maps: list[Tensor]) -> dict[str, Tensor]:
        levels = dict(zip("0123", self.pyramid(maps), strict=True))
        levels = self.out(levels) if self.top_down else {k: self.out[int(k)](x) for k, x in levels.items()}
        return levels | {"pool": levels["3"][:, :, ::2, ::2]}


class Detector(nn.Module):
    """torchvision's Mask R-CNN on a pyramid, in torchvision's proportions: its own sizes from 512 channels up.

    Without `masks` it is Faster R-CNN. The encoder alone works in the precision: boxes rounded to bf16 would be off by
    pixels.
    """

    def __init__(self, encoder: ViT, classes: int, pyramid: str = "vitdet", precision: str = "fp32", masks=True):
        super().__init__()
        self.encoder, self.precision = encoder, precision
        self.taps = four_depths(encoder) if pyramid == "beit" else []
        p, size, C = encoder.patch_size, encoder.patch_size * encoder.grid[0], min(256, encoder.width // 2)
        if p % 4 or size % (4 * p):  # or strides would not be whole
            raise InputError(f"image size {size}, patches of {p}: give a multiple of {4 * p}, and patches of one of 4")
        regions = min(512, max(32, encoder.patches // 2))  # of an image that the heads learn from
        anchors = tuple((2 * p * 2**k,) for k in range(5))  # eight strides wide
        self.rcnn = MaskRCNN(
            Neck(encoder.width, C, pyramid),
            rpn_anchor_generator=anchor_utils.AnchorGenerator(anchors, ((0.5, 1.0, 2.0),) * 5),
            rpn_batch_size_per_image=min(256, regions), box_batch_size_per_image=regions,
            box_head=faster_rcnn.TwoMLPHead(C * 7 * 7, 4 * C),
            box_predictor=faster_rcnn.FastRCNNPredictor(4 * C, 1 + classes),
            mask_head=mask_rcnn.MaskRCNNHeads(C, [C] * 4, 1),
            mask_predictor=mask_rcnn.MaskRCNNPredictor(C, C, 1 + classes),
        )  # fmt: skip
        if not masks:
            heads = self.rcnn.roi_heads
            heads.mask_roi_pool = heads.mask_head = heads.mask_predictor = None

    def levels(self, samples: list[Sample], device) -> tuple[ImageList, dict[str, Tensor]]:
        images = torch.stack([s.image for s in samples]).to(device)
        with torch.autocast(images.device.type, DTYPES[self.precision], enabled=self.precision != "fp32"):
            maps = feature_maps(self.encoder, images, self.taps)
        return ImageList(images, [s.fitted for s in samples]), self.rcnn.backbone(maps)

    def loss(self, samples: list[Sample], device) -> Tensor:
        """The mean over images of the sum of Mask R-CNN's five losses, each computed for one image alone."""
        images, levels = self.levels(samples, device)
        total = 0.0
        for i, s in enumerate(samples):
            torch.manual_seed(s.seed)  # of the anchors and regions to learn from
            one = {name: x[i : i + 1] for name, x in levels.items()}
            truth = [target(s.planes.to(device), s.kinds.to(device))]
            regions, proposing = self.rcnn.rpn(ImageList(images.tensors[i : i + 1], [s.fitted]), one, truth)
            _, refining = self.rcnn.roi_heads(one, regions, [s.fitted], truth)
            total = total + sum((proposing | refining).values())
        return total / len(samples)

    def predict(self, samples: list[Sample], device) -> list[dict[str, Tensor]]:
        """Boxes (n, 4), labels and scores (n,), masks (n, 1, H, W), of each image at its own size."""
        images, levels = self.levels(samples, device)
        regions, _ = self.rcnn.rpn(images, levels)
        found, _ = self.rcnn.roi_heads(levels, regions, images.image_sizes)
        return self.rcnn.transform.postprocess(found, images.image_sizes, [s.size for s in samples])

    def measure(self, images: Instances, batches: Iterator[list[Sample]], device) -> dict:
        results = []
        for samples in batches:
            for found, s in zip(self.predict(samples, device), samples, strict=True):
                results += detections(images, found, s.index)
        every = [results] * world_size()
        if world_size() > 1:
            dist.all_gather_object(every, results)
        return detection_scores(images.coco, [result for part in every for result in part], images.masks)

    def shown(self, image: Tensor, s: Sample, found: dict | None = None) -> Tensor:
        """The image with the boxes and masks that were `found` with a score of a half or more, or else the truth."""
        sure = slice(None) if found is None else found["scores"].cpu() >= 0.5
        found = {name: x.cpu()[sure] for name, x in (found or target(s.planes, s.kinds)).items()}
        colors = [(37 * k % 256, 97 * k % 256, 173 * k % 256) for k in (found["labels"] + 1).tolist()]
        if "masks" in found and colors:
            image = draw_segmentation_masks(image, found["masks"].flatten(0, -3) > 0.5, 0.6, colors)
        return draw_bounding_boxes(image, found["boxes"], colors=colors) if colors else image


def target(masks: Tensor, kinds: Tensor) -> dict[str, Tensor]:
    """Masks (n, S, S) and kinds (n,) → what Mask R-CNN learns from: those still visible, with their boxes."""
    there = (masks > 0).flatten(1).any(dim=1)
    masks, kinds = masks[there], kinds[there]
    # A box ends where its last pixel ends, one beyond the index that torchvision gives.
    boxes = masks_to_boxes(masks) + masks.new_tensor([0, 0, 1, 1], dtype=torch.float32)
    return {"boxes": boxes, "labels": kinds, "masks": masks}


def detections(images: Instances, found: dict[str, Tensor], i: int) -> list[dict]:
    """What was found in image i of a set, as COCO's results."""
    boxes = box_convert(found["boxes"], "xyxy", "xywh").tolist()
    rle = library("pycocotools.mask", "coco", "detection")
    results = [
        dict(image_id=images.ids[i], category_id=images.categories[kind - 1], bbox=box, score=score)
        for kind, box, score in zip(found["labels"].tolist(), boxes, found["scores"].tolist(), strict=True)
    ]
    if "masks" in found:
        for result, mask in zip(results, (found["masks"][:, 0] > 0.5).byte().cpu().numpy(), strict=True):
            result["segmentation"] = rle.encode(np.asfortranarray(mask))
    return results


def detection_scores(truth, results: list[dict], masks: bool = True) -> dict[str, float]:
    """COCO's average precision of boxes and masks, in per cent: over IoU .5 to .95, and at .5 and .75."""
    scores, judging = {}, library("pycocotools.cocoeval", "coco", "detection")
    for name, kind in (("box", "bbox"), ("mask", "segm"))[: 1 + masks]:
        found = (0.0, 0.0, 0.0)
        if results:  # pycocotools does not take none
            with contextlib.redirect_stdout(io.StringIO()):  # which is for the result
                judge = judging.COCOeval(truth, truth.loadRes(results), kind)
                judge.evaluate()
                judge.accumulate()
                judge.summarize()
            found = 100 * judge.stats[:3]
        scores |= {f"{name}_{score}": float(x) for score, x in zip(("ap", "ap50", "ap75"), found, strict=True)}
    return scores


def fine_tune(model, reader: Reader, recipe: Recipe, device, seed=0, workers=0, accumulate=1, **how) -> None:
    """Train a Segmenter or Detector in place; `how` is what `optimize` has for its directory."""
    n, B = len(reader.images), recipe.batch_size
    check_batch(B, n, accumulate)
    per_epoch = n // B
    steps = recipe.steps or recipe.epochs * per_epoch
    what, blocks = type(model).__name__.lower(), model.encoder.blocks
    for i, block in enumerate(blocks):
        block.drop_path = recipe.drop_path * i / max(1, len(blocks) - 1)
    for part in model.modules():
        if type(part) is nn.BatchNorm2d:
            part.__class__ = BatchNorm  # which has the same parameters and buffers
    settings = asdict(recipe) | dict(kind=what, images=n, seed=seed, precision=model.precision, accumulate=accumulate)

    def losses(todo) -> Iterator[Iterator[Tensor]]:
        keys = ([(epoch, i) for i in part.tolist()] for epoch, part in orders(seed, n, B, accumulate, todo))
        batches = reader.batches(keys, workers)
        for _ in todo:
            yield (model.loss(next(batches), device) / accumulate for _ in range(accumulate))

    def rate(step: int) -> float:
        peak = recipe.lr * 0.1 ** sum(step >= epoch * per_epoch for epoch in recipe.decay_at)
        floor = peak if recipe.decay_at else 0.0
        decay = cosine if recipe.schedule == "cosine" else lambda start, end, t: start + (end - start) * t
        return learning_rate(step, steps, int(steps * recipe.warmup), peak, floor, decay)

    optimizer = optimizer_for(model, recipe, device)
    optimize(model, optimizer, rate, losses, steps, per_epoch, settings, device, what, **how)


@torch.no_grad()
def measure(model: nn.Module, reader: Reader, batch_size: int, workers: int, device: torch.device) -> dict:
    """The model's scores of all images, of which each rank takes its share."""
    n = len(reader.images)
    mine = [(0, i) for i in range(rank(), n, world_size())]
    parts = [mine[k : k + batch_size] for k in range(0, len(mine), batch_size)]
    model.eval()
    with tqdm(reader.batches(parts, workers), "measure", len(parts), leave=False, disable=rank() > 0) as bar:
        return {**model.measure(reader.images, bar, device), "n": n}


@torch.no_grad()
def draw(model: nn.Module, reader: Reader, path, device: torch.device) -> None:
    """A picture of a few images: each as it is, what is true of it, and what the model finds."""
    n = len(reader.images)
    samples = [reader[0, i * n // min(n, SHOWN)] for i in range(min(n, SHOWN))]
    views = []
    for s, found in zip(samples, model.eval().predict(samples, device), strict=True):
        image = reader.images.read(s.index)[0]
        row = image, model.shown(image, s), model.shown(image, s, found)
        views += [F.interpolate(x[None].float() / 255, (SIDE, SIDE))[0] for x in row]
    files.write_whole(path, lambda file: save_image(views, file, format="png", nrow=3, padding=0))
