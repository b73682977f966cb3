"""Generated scenes with exact labels, for dense transfer: several of the built-in objects in one setting.

    python transfer.py --make-scenes data/scenes

Objects are those of builtin_images.py, smaller, two to four of four kinds in a picture of 64 x 64. What hides what is
known as it is painted, so that the labels of every pixel and the masks of all objects are exact. The same scenes are
written in VOC's format and in COCO's. A scene is a function of (seed, half, position) alone.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from inputs import builtin_images
from inputs.builtin_images import DRAWS, SIZE, Picture
from runtime import files
from runtime.errors import InputError

KINDS = ("house", "tree", "car", "cat")  # labels 1 … 4; 0 is the ground
HALVES = ("train", "val")


class Scene(Picture):
    """Two to four of the built-in objects in one setting; `owner` (64, 64): of which each pixel is, from 1, or 0."""

    def __init__(self, rng: np.random.Generator):
        super().__init__(rng.random((1, 2 * SIZE**2), dtype=np.float32))  # more than enough
        self.rng, self.owner, self.drawing, self.objects = rng, np.zeros((SIZE, SIZE), int), 0, 0
        self.places = rng.permutation([(x, y) for x in (-0.5, 0.5) for y in (-0.4, 0.4)])
        self.kinds = rng.integers(0, len(KINDS), rng.integers(2, 5))
        for kind in self.kinds:
            self.numbers[:, :DRAWS], self.drawn = rng.random((1, DRAWS), dtype=np.float32), 0
            getattr(builtin_images, KINDS[kind])(self)  # calls `scene`, then `paint` for each part
            self.drawing = 0  # what is painted next belongs to no object
        self.image = self.finish()[0].transpose(1, 2, 0)
        self.masks = [self.owner == 1 + k for k in range(self.objects)]

    def scene(self, settings, tilt, low=-0.3, high=0.4):
        """The first object brings the setting; each gets a quarter of the picture, roughly, and less than full size."""
        if self.objects == 0:
            super().scene(settings, tilt, low, high)
        x, y = np.float32(self.places[self.objects] + self.rng.uniform(-0.15, 0.15, 2))
        size = np.float32(self.rng.uniform(0.45, 0.75))
        self.x, self.y, self.pixels = (self.frame[0] - x) / size, (self.frame[1] - y) / size, SIZE / 2 * size
        self.glow = 1 + 0.08 * self.texture + self.light[0] * self.x + self.light[1] * self.y
        self.objects = self.drawing = self.objects + 1

    def paint(self, d, colour, bulge=0.25, surface=0.0):
        """Paint, and let what is painted hide what was there: a pixel belongs to a part that covers half of it."""
        super().paint(d, colour, bulge, surface)
        self.owner[np.broadcast_to(d < 0, (1, SIZE, SIZE))[0]] = self.drawing


def write(folder: Path, n: int, seed: int) -> None:
    """Write n scenes to learn from and a quarter as many to test on, the same ones in VOC's and in COCO's format."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder}: is there already; give a new folder to --make-scenes")
    images, labels = folder / "JPEGImages", folder / "SegmentationClass"
    try:
        for part in (images, labels):
            part.mkdir(parents=True)
        files.write_text(folder / "labels.txt", "\n".join(("background", *KINDS)) + "\n")
        for half, (split, count) in enumerate(zip(HALVES, (n, -(-n // 4)), strict=True)):
            names = [f"{split}_{i:05d}" for i in range(count)]
            about = dict(images=[], annotations=[], categories=[dict(id=1 + k, name=v) for k, v in enumerate(KINDS)])
            for i, name in enumerate(tqdm(names, split, unit="scene", leave=False)):
                scene = Scene(np.random.default_rng((seed, half, i)))
                Image.fromarray(scene.image).save(images / f"{name}.jpg", quality=95)
                png = Image.fromarray(np.append(0, 1 + scene.kinds).astype(np.uint8)[scene.owner])
                png.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128])  # VOC's first five colours
                png.save(labels / f"{name}.png")
                about["images"].append(dict(id=i, file_name=f"JPEGImages/{name}.jpg", height=SIZE, width=SIZE))
                about["annotations"] += annotations(scene, i)
            files.write_text(folder / f"ImageSets/Segmentation/{split}.txt", "\n".join(names) + "\n")
            files.write_text(folder / f"annotations/instances_{split}.json", json.dumps(about) + "\n")
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); give another to --make-scenes") from None


def annotations(scene: Scene, image: int) -> Iterator[dict]:
    """COCO's account of a scene's objects that show, their masks as lengths of runs of 0, 1, 0, … down the columns."""
    for k, mask in enumerate(scene.masks):
        if mask.any():
            rows, columns = mask.nonzero()
            box = [int(n) for n in (columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1)]
            changes = np.flatnonzero(np.diff(mask.T.ravel(), prepend=0))
            runs = np.diff(changes, prepend=0, append=mask.size).tolist()
            about = dict(id=1 + 4 * image + k, image_id=image, category_id=1 + int(scene.kinds[k]), area=len(rows))
            yield about | dict(bbox=box, iscrowd=0, segmentation=dict(size=[SIZE, SIZE], counts=runs))
