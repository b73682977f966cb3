"""Generated scenes: their label maps and annotations are the masks of what was painted."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from inputs import builtin_scenes

rle = pytest.importorskip("pycocotools.mask")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    builtin_scenes.write(folder, 24, seed=1)
    return folder


def read_scene(folder: Path, split: str, i: int):
    """A scene painted again, its label map from the disk, and its COCO annotations."""
    scene = builtin_scenes.Scene(np.random.default_rng((1, builtin_scenes.HALVES.index(split), i)))
    labels = np.array(Image.open(folder / "SegmentationClass" / f"{split}_{i:05d}.png"))
    about = json.loads((folder / "annotations" / f"instances_{split}.json").read_text())
    return scene, labels, [a for a in about["annotations"] if a["image_id"] == i]


@pytest.mark.parametrize("split, i", [("train", 0), ("train", 7), ("train", 23), ("val", 5)])
def test_label_maps_and_annotations_are_the_scenes_masks(folder, split, i):
    scene, labels, found = read_scene(folder, split, i)
    rows = [(mask, kind) for mask, kind in zip(scene.masks, scene.kinds, strict=True) if mask.any()]
    assert len(rows) == len(found) > 0
    expected = np.zeros((64, 64), int)
    for (mask, kind), annotation in zip(rows, found, strict=True):
        assert not expected[mask].any()  # a pixel belongs to one object
        expected[mask] = 1 + kind
        coded = rle.frPyObjects(annotation["segmentation"], 64, 64)
        assert (rle.decode(coded) == mask).all()
        y, x = np.nonzero(mask)
        assert annotation["bbox"] == [x.min(), y.min(), x.max() + 1 - x.min(), y.max() + 1 - y.min()]
        assert annotation["bbox"] == rle.toBbox(coded).tolist()
        assert annotation["area"] == mask.sum() == rle.area(coded)
        assert annotation["category_id"] == 1 + kind and annotation["iscrowd"] == 0
    assert (labels == expected).all() and 0 < (labels > 0).mean() < 0.7


def test_masks_are_where_the_objects_are_in_the_image():
    """The same scene with its last object in a glaring colour differs from it inside that object's mask."""

    class Marked(builtin_scenes.Scene):
        def paint(self, d, colour, bulge=0.25, surface=0.0):
            if self.drawing == len(self.kinds):
                colour, bulge, surface = np.float32([50, 0, 50])[None, :, None, None], 0, 0.0
            super().paint(d, colour, bulge, surface)

        def bush(self, y, size):
            assert self.drawing == 0  # it is no part of an object, behind it or in front
            super().bush(y, size)

    for seed in range(5):
        plain, marked = (Kind(np.random.default_rng(seed)) for Kind in (builtin_scenes.Scene, Marked))
        glare = (marked.image[..., 0] == 255) & (marked.image[..., 2] == 255)
        differs = (plain.image != marked.image).any(axis=2)
        mask = plain.masks[-1]
        assert (plain.masks[-1] == marked.masks[-1]).all() and mask.sum() > 20
        assert (glare >= mask).all()  # what the mask covers was painted with the object
        assert (differs & ~mask).sum() < 0.6 * mask.sum() + 40  # but for edges that cover less than half a pixel


def test_scenes_are_a_function_of_the_seed(folder, tmp_path):
    builtin_scenes.write(tmp_path / "again", 24, seed=1)
    builtin_scenes.write(tmp_path / "other", 24, seed=2)

    def pixels(place):
        return [(file.name, file.read_bytes()) for file in sorted(place.rglob("*.*"))]

    assert pixels(folder) == pixels(tmp_path / "again") != pixels(tmp_path / "other")
    assert len(list((folder / "JPEGImages").glob("val_*.jpg"))) == 6
