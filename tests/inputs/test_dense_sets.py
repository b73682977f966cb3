"""Label maps, boxes and masks as folders hold them: augmentation, Tiny-ImageNet's boxes, wrong annotations."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from inputs import augment, builtin_scenes, dense_sets
from runtime.errors import InputError

pytest.importorskip("pycocotools.mask")


def test_distortion_changes_colours_alone_by_the_strengths_and_half_as_often_as_not(monkeypatch):
    image, seen = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8), [[] for _ in range(4)]
    for k, change in enumerate(augment.ADJUST):
        spy = lambda x, factor, k=k, change=change: seen[k].append(factor.item()) or change(x, factor)  # noqa: E731
        monkeypatch.setattr(augment, "ADJUST", (*augment.ADJUST[:k], spy, *augment.ADJUST[k + 1 :]))
    labels = image[:1] // 100
    for seed in range(200):
        views = [
            dense_sets.fit(image, labels, 255, 16, np.random.default_rng(seed), (0.5, 2.0), distort)
            for distort in (False, True)
        ]
        assert torch.equal(views[0][1], views[1][1]) and views[0][2] == views[1][2]  # nor does anything else move
    for factors, (low, high) in zip(seen, [(0.875, 1.125), (0.5, 1.5), (0.5, 1.5), (-0.1, 0.1)], strict=True):
        assert 70 < len(factors) < 130  # of 200; 5 deviations are 35
        span = (high - low) / 10
        assert low <= min(factors) < low + span and high - span < max(factors) <= high


def test_for_windows_the_shorter_side_fits():
    image = torch.zeros(3, 40, 100, dtype=torch.uint8)
    square, _, fitted = dense_sets.fit(image, image[:1], 255, 32, None, windows=True)
    assert square.shape == (3, 32, 80) and fitted == (32, 80)
    square, planes, fitted = dense_sets.fit(image, image[:1], 255, 32, np.random.default_rng(0), windows=True)
    assert square.shape == (3, 32, 32) and planes.shape == (1, 32, 32) and fitted == (32, 32)


# ---------------------------------------------------------------------------------------------------- Tiny-ImageNet

BOXES = {"n01": [(0, 0, 63, 63), (3, 5, 10, 20)], "n02": [(60, 60, 63, 63)]}


@pytest.fixture
def tiny(tmp_path) -> Path:
    """As Tiny-ImageNet's archive: train/CLASS/CLASS_boxes.txt beside images/, and val/val_annotations.txt."""
    for name, boxes in BOXES.items():
        (tmp_path / "train" / name / "images").mkdir(parents=True)
        text = "".join(f"{name}_{i}.JPEG\t" + "\t".join(map(str, box)) + "\n" for i, box in enumerate(boxes))
        (tmp_path / "train" / name / f"{name}_boxes.txt").write_text(text)
        for i in range(len(boxes)):
            Image.new("RGB", (64, 64), (10 * i, 0, 0)).save(tmp_path / "train" / name / "images" / f"{name}_{i}.JPEG")
    (tmp_path / "val/images").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(tmp_path / "val/images/val_0.JPEG")
    (tmp_path / "val/val_annotations.txt").write_text("val_0.JPEG\tn02\t1\t2\t3\t4\n")
    return tmp_path


def test_tiny_imagenets_boxes_are_a_detection_set(tiny):
    train, val = (dense_sets.Instances(tiny, split, "tiny-imagenet") for split in ("train", "val"))
    assert len(train) == 3 and len(val) == 1 and train.classes == 2 and train.categories == val.categories == [1, 2]
    assert not train.masks  # they are but boxes
    for i, (name, box) in enumerate((name, box) for name, boxes in BOXES.items() for box in boxes):
        image, masks, kinds = train.read(i)
        left, top, right, bottom = box
        expected = torch.zeros(64, 64)
        expected[top : bottom + 1, left : right + 1] = 1
        assert image.shape == (3, 64, 64) and torch.equal(masks[0], expected.byte())
        assert kinds.tolist() == [1 + list(BOXES).index(name)]
        (annotation,) = train.coco.imgToAnns[i]
        assert annotation["bbox"] == [left, top, right - left + 1, bottom - top + 1]
        assert annotation["area"] == expected.sum()
    assert train.read(1)[0][0].float().mean() == pytest.approx(10, abs=2)  # the image of that box
    (tiny / "train/n01/images/n01_0.JPEG").unlink()
    assert len(dense_sets.Instances(tiny, "train", "tiny-imagenet")) == 2  # a part of the set
    assert val.read(0)[2].tolist() == [2] and val.coco.imgToAnns[0][0]["bbox"] == [1, 2, 3, 3]


def test_of_tiny_imagenet_the_first_classes_alone_can_be_taken(tiny):
    (tiny / "val/val_annotations.txt").write_text("val_0.JPEG\tn02\t1\t2\t3\t4\nval_1.JPEG\tn01\t1\t2\t3\t4\n")
    train, val = (dense_sets.Instances(tiny, split, "tiny-imagenet", 1) for split in ("train", "val"))
    assert train.categories == val.categories == [1] and len(train) == 2 and val.ids == [1]


@pytest.mark.parametrize(
    "file, line, said",
    [
        ("train/n02/n02_boxes.txt", "n02_0.JPEG\t1\t2\t3", "must be an image, its class and four numbers"),
        ("train/n02/n02_boxes.txt", "n02_0.JPEG\t1\t2\t3\tx", "must be an image, its class and four numbers"),
        ("train/n02/n02_boxes.txt", "n02_0.JPEG\t50\t2\t3\t9", "outside of its image"),
        ("train/n02/n02_boxes.txt", "", "names nothing"),
        ("val/val_annotations.txt", "val_0.JPEG\t1\t2\t3\t4", "must be an image, its class and four numbers"),
        ("val/val_annotations.txt", "val_0.JPEG\tn09\t1\t2\t3\t4", "category n09, which is not listed"),
        ("val/val_annotations.txt", "val_0.JPEG\tn02\t70\t2\t99\t4", "outside of its image"),
    ],
)
def test_of_tiny_imagenet_what_is_wrong_is_one_line(tiny, file, line, said):
    (tiny / file).write_text(line + "\n")
    with pytest.raises(InputError, match=said) as error:
        for split in ("train", "val"):
            dense_sets.Instances(tiny, split, "tiny-imagenet")
    assert "\n" not in str(error.value)


def test_a_folder_without_tiny_imagenets_boxes_is_refused(tmp_path):
    with pytest.raises(InputError, match="tiny-imagenet-200"):
        dense_sets.Instances(tmp_path, "train", "tiny-imagenet")


# ------------------------------------------------------------------------------------------------ hostile annotations

FLAWS = {
    "is of category 9, which is not listed": dict(category_id=9),
    "is of image 99, which is not listed": dict(image_id=99),
    "outside of its image": dict(bbox=[70, 1, 5, 5]),
    "the box .*, outside": dict(bbox=[-9, 1, 5, 5]),
    "outside of its": dict(bbox=[1, 1, 5, -5]),
    "an empty segmentation": dict(segmentation=[]),
    "fewer than three points": dict(segmentation=[[1, 1, 9, 1, 9, 9], [1, 1, 9, 9]]),
    "is not one of COCO's": dict(bbox=None),
    "is not one of COCO's .KeyError": dict(area=...),  # ... stands for none at all
    "KeyError.*iscrowd": dict(iscrowd=...),
    "TypeError": dict(bbox=["a", 1, 2, 3]),
}


@pytest.mark.parametrize("said", FLAWS)
def test_a_wrong_annotation_is_named_when_the_file_is_opened(tmp_path, said):
    builtin_scenes.write(tmp_path / "scenes", 4, seed=0)
    file = tmp_path / "scenes/annotations/instances_train.json"
    about = json.loads(file.read_text())
    changed = about["annotations"][2] | FLAWS[said]
    about["annotations"][2] = {name: x for name, x in changed.items() if x is not ...}
    file.write_text(json.dumps(about))
    with pytest.raises(InputError, match=said) as error:
        dense_sets.Instances(tmp_path / "scenes", "train")
    assert "\n" not in str(error.value) and f"{file}: annotation {changed['id']} " in str(error.value)


def test_boxes_at_the_edge_polygons_and_runs_are_fine(tmp_path):
    builtin_scenes.write(tmp_path / "scenes", 4, seed=0)
    file = tmp_path / "scenes/annotations/instances_train.json"
    about = json.loads(file.read_text())
    about["annotations"][0] |= dict(bbox=[0, 0, 64, 64], segmentation=[[0, 0, 64, 0, 64, 64]])
    about["annotations"][1] |= dict(bbox=[60, 3, 4.2, 0])
    file.write_text(json.dumps(about))
    images = dense_sets.Instances(tmp_path / "scenes", "train")
    assert images.read(0)[1][0].float().mean() == pytest.approx(0.5, abs=0.02)


def test_a_missing_image_and_one_without_a_size_are_named(tmp_path):
    builtin_scenes.write(tmp_path / "scenes", 4, seed=0)
    (tmp_path / "scenes/JPEGImages/train_00000.jpg").unlink()
    with pytest.raises(InputError, match=r"train_00000\.jpg"):
        dense_sets.Instances(tmp_path / "scenes", "train").read(0)
