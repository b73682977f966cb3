"""Dense transfer: scenes against their own masks, scores against loops, the grid's orientation, the command."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import transfer
from common import ViT
from inputs import builtin_scenes
from runtime import files
from runtime.errors import InputError

rle = pytest.importorskip("pycocotools.mask")
ROOT = Path(transfer.__file__).parent


def small_vit(size: int = 32, p: int = 8, width: int = 16) -> ViT:
    torch.manual_seed(0)
    return ViT(size, p, width, depth=2, heads=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    builtin_scenes.write(folder, 24, seed=1)
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    encoder = small_vit(64, width=32)
    files.save(tmp_path / "encoder.pt", dict(settings=encoder.settings, state_dict=encoder.state_dict()))
    return tmp_path


def call(monkeypatch, capsys, *words) -> dict:
    monkeypatch.setattr(sys, "argv", ["transfer.py", *map(str, words)])
    transfer.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


# ------------------------------------------------------------------------------------------------------------- scenes


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
            if self.solid and len(self.masks) == len(self.kinds):
                colour, bulge, surface = np.float32([50, 0, 50])[None, :, None, None], 0, 0.0
            super().paint(d, colour, bulge, surface)

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


@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 2**32 - 1))
def test_run_lengths_are_cocos(h, w, seed):
    mask = np.random.default_rng(seed).random((h, w)) < 0.5
    runs, value, count = [], False, 0
    for x in range(w):
        for y in range(h):
            if mask[y, x] != value:
                runs.append(count)
                value, count = not value, 0
            count += 1
    assert builtin_scenes.run_lengths(mask) == [*runs, count]
    assert (rle.decode(rle.frPyObjects(dict(size=[h, w], counts=[*runs, count]), h, w)) == mask).all()


# ------------------------------------------------------------------------------------------------------------- scores


@given(st.integers(2, 5), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_segmentation_scores_are_the_definitions(classes, n, seed):
    rng = np.random.default_rng(seed)
    labels = rng.choice([*range(classes), transfer.IGNORE], n)
    labels[0] = 0  # one at least
    predicted = rng.integers(0, classes, n)
    ious, hits, known = [], 0, 0
    for c in range(classes):
        both = sum(p == c and t == c for p, t in zip(predicted, labels, strict=True))
        either = sum((p == c or t == c) and t != transfer.IGNORE for p, t in zip(predicted, labels, strict=True))
        if either:
            ious.append(both / either)
    for p, t in zip(predicted, labels, strict=True):
        known += t != transfer.IGNORE
        hits += p == t
    matrix = transfer.confusion(torch.from_numpy(predicted), torch.from_numpy(labels), classes)
    scores = transfer.segmentation_scores(matrix)
    assert scores["miou"] == pytest.approx(100 * sum(ious) / len(ious))
    assert scores["pixel_accuracy"] == pytest.approx(100 * hits / known)


def truth_as_found(images: transfer.Instances, size: int, move: int = 0):
    """For each image, what a perfect detector would say in a square of `size`, its masks moved to the right."""
    reader = transfer.Reader(images, size)
    for i in range(len(images)):
        sample = reader[0, i]
        masks = torch.nn.functional.interpolate(sample.planes[None], sample.fitted, mode="nearest-exact")[0].roll(
            move, 2
        )
        goal = transfer.target(masks, sample.kinds)
        found = dict(boxes=goal["boxes"], labels=goal["labels"], scores=torch.ones(len(goal["labels"])))
        yield found | dict(masks=goal["masks"][:, None].float()), sample


@pytest.mark.parametrize("size", [64, 128])
def test_perfect_detections_score_100_and_moved_ones_less(folder, size):
    images = transfer.Instances(folder, "val")
    results = [r for found, s in truth_as_found(images, size) for r in transfer.detections(images, found, s)]
    scores = transfer.detection_scores(images.coco, results)
    assert scores == pytest.approx(dict(box_ap=100, box_ap50=100, mask_ap=100, mask_ap50=100))
    moved = [r for found, s in truth_as_found(images, size, size // 32) for r in transfer.detections(images, found, s)]
    for kind in ("box", "mask"):
        assert transfer.detection_scores(images.coco, moved)[f"{kind}_ap"] < 90
    wrong = [dict(r, category_id=1 + r["category_id"] % 4) for r in results]
    assert transfer.detection_scores(images.coco, wrong)["mask_ap"] < 50
    assert transfer.detection_scores(images.coco, []) == dict(box_ap=0, box_ap50=0, mask_ap=0, mask_ap50=0)


# ------------------------------------------------------------------------------------------------------ from the disk


@pytest.mark.parametrize("H, W", [(40, 64), (64, 40), (100, 30), (16, 16)])
def test_an_image_is_fitted_into_the_square_and_labels_stay_on_its_pixels(H, W):
    """Labels are drawn into the image itself, so that wherever it goes, they must be found again."""
    generator = torch.Generator().manual_seed(H)
    coarse = torch.randint(0, 2, (1, 1, 4, 4), generator=generator)
    labels = torch.nn.functional.interpolate(coarse.float(), (H, W), mode="nearest-exact")[0].byte()
    image = (labels * 255).repeat(3, 1, 1)
    square, planes, fitted = transfer.fit(image, labels, 255, 64, None)
    assert square.shape == (3, 64, 64) and planes is labels
    assert fitted == (round(H * 64 / max(H, W)), round(W * 64 / max(H, W)))
    assert not square[:, fitted[0] :].any() and not square[:, :, fitted[1] :].any()
    views = set()
    for seed in range(20):
        square, planes, (h, w) = transfer.fit(image, labels, 255, 64, np.random.default_rng(seed), (0.5, 2))
        assert square.shape == (3, 64, 64) and planes.shape == (1, 64, 64)
        assert (planes[:, :h, :w] != 255).all() and (planes == 255).sum() == 64 * 64 - h * w
        bright = square[0, :h, :w] > 0
        assert (bright == (planes[0, :h, :w] == 1)).float().mean() > 0.85  # they differ at edges
        views.add((h, w, planes.sum().item()))
    assert len(views) > 10


def test_ade_labels_are_reduced_by_one_and_0_is_no_class(tmp_path):
    for part, values in (("training", [0, 1, 2, 150]), ("validation", [0, 1, 2, 151])):
        for kind in ("images", "annotations"):
            (tmp_path / kind / part).mkdir(parents=True)
        Image.new("RGB", (2, 2)).save(tmp_path / "images" / part / "a.jpg")
        Image.fromarray(np.uint8(values).reshape(2, 2)).save(tmp_path / "annotations" / part / "a.png")
    train, val = (transfer.Segments(tmp_path, split, "ade") for split in ("train", "val"))
    assert train.classes == 150 and train.read(0)[1].tolist() == [[[255, 0], [1, 149]]]
    with pytest.raises(InputError, match="label 150"):
        val.read(0)


def test_targets_are_the_masks_that_show_with_boxes_up_to_their_last_pixels_ends():
    masks = torch.zeros(3, 8, 8, dtype=torch.uint8)
    masks[0, 2:4, 1:6], masks[2, 7, 7] = 1, 1
    goal = transfer.target(masks, torch.tensor([4, 5, 6]))
    assert goal["labels"].tolist() == [4, 6] and torch.equal(goal["masks"], masks[[0, 2]])
    assert goal["boxes"].tolist() == [[1, 2, 6, 4], [7, 7, 8, 8]]


def test_crowds_are_left_out_and_images_without_objects_serve_tests_only(folder, tmp_path):
    for split in ("train", "val"):
        about = json.loads((folder / "annotations" / f"instances_{split}.json").read_text())
        for a in about["annotations"]:
            a["iscrowd"] = int(a["image_id"] == 0)
            a["category_id"] *= 10  # COCO's have gaps
        about["categories"] = [dict(id=10 * k, name=str(k)) for k in range(1, 5)]
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / f"annotations/instances_{split}2017.json").write_text(json.dumps(about))
    (tmp_path / "JPEGImages").symlink_to(folder / "JPEGImages")
    train, val = (transfer.Instances(tmp_path, split) for split in ("train", "val"))
    assert len(train) == 23 and 0 not in train.ids and len(val) == 6
    assert len(val.read(0)[1]) == 0 and train.categories == [10, 20, 30, 40]
    assert set(torch.cat([train.read(i)[2] for i in range(23)]).tolist()) == {1, 2, 3, 4}


# -------------------------------------------------------------------------------------------------------------- models


def test_a_bright_patch_lights_up_its_own_cell():
    encoder = small_vit()
    for block in encoder.blocks:  # no attention: a cell then depends on its own patch alone
        torch.nn.init.zeros_(block.attn.proj.weight)
    features = transfer.Features(encoder)
    dark, bright = torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32)
    bright[:, :, 8:16, 24:32] = 1  # row 1, column 3
    changed = (features(bright) - features(dark)).abs().sum(dim=1)[0]
    assert features(dark).shape == (1, 16, 4, 4)
    assert changed[1, 3] > 0 and changed.count_nonzero() == 1


def test_freezing_trains_the_heads_only_and_drops_no_paths():
    torch.manual_seed(0)
    frozen = transfer.Segmenter(transfer.Features(ViT(32, 8, 16, 2, 2, drop_path=0.9), freeze=True), 3).train()
    assert not frozen.backbone.encoder.training and frozen.head.training
    assert not any(p.requires_grad for p in frozen.backbone.parameters())
    assert all(p.requires_grad for p in frozen.head.parameters())
    assert transfer.Segmenter(transfer.Features(small_vit()), 3).train().backbone.encoder.training


@pytest.mark.parametrize("p, size", [(8, 64), (16, 128)])
def test_the_pyramid_has_its_strides_and_each_level_sees_its_own_place(p, size):
    encoder = small_vit(size, p)
    for block in encoder.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
    pyramid = transfer.Pyramid(transfer.Features(encoder), 8)
    bright = torch.zeros(1, 3, size, size)
    bright[:, :, 4 * p : 5 * p, 6 * p : 7 * p] = 1
    with torch.no_grad():
        dark, lit = pyramid(torch.zeros_like(bright)), pyramid(bright)
    assert list(dark) == ["0", "1", "2", "3", "pool"]
    for (name, a), stride in zip(dark.items(), (p // 4, p // 2, p, 2 * p, 4 * p), strict=True):
        assert a.shape == (1, 8, size // stride, size // stride), name
        rows, columns = (lit[name] - a).abs().sum(dim=1)[0].nonzero().T
        if name != "pool":  # the patch's own cells, and one around them from the convolution
            for found, start in ((rows, 4 * p), (columns, 6 * p)):
                first, last = start // stride, max(start // stride, (start + p) // stride - 1)
                assert (found.min(), found.max()) == (max(0, first - 1), min(size // stride - 1, last + 1)), name
    torch.testing.assert_close(dark["pool"], dark["3"][:, :, ::2, ::2])


def test_anchors_stand_on_the_maps_strides():
    detector = transfer.Detector(transfer.Features(small_vit(64)), 4).eval()
    images = torch.zeros(2, 3, 64, 64)
    maps = list(detector.rcnn.backbone(images).values())
    generate, found = detector.rcnn.rpn.anchor_generator, detector.rcnn.transform(list(images))[0]
    assert found.tensors.shape == images.shape and torch.equal(found.tensors, images)  # neither scaled nor shifted
    anchors = generate(found, maps)[0]
    centres, first = (anchors[:, :2] + anchors[:, 2:]) / 2, 0
    for level, stride in zip(maps, (2, 4, 8, 16, 32), strict=True):
        mine = slice(first, first + 3 * level.shape[2] * level.shape[3])
        assert centres[mine].unique().tolist() == list(range(0, 64, stride))
        sides = (anchors[mine, 2:] - anchors[mine, :2]).prod(dim=1).sqrt()
        assert ((sides / (8 * stride) - 1).abs() < 0.1).all()
        first = mine.stop
    assert first == len(anchors)


# ------------------------------------------------------------------------------------------------------------- command


def chance(folder: Path) -> float:
    """The mIoU of calling every pixel ground, the commonest class."""
    images = transfer.Segments(folder, "val")
    labels = torch.cat([images.read(i)[1].flatten() for i in range(len(images))]).long()
    return transfer.segmentation_scores(transfer.confusion(torch.zeros_like(labels), labels, 5))["miou"]


@pytest.mark.training
@pytest.mark.slow
def test_training_raises_miou_above_chance_and_repeats_itself(run, folder, monkeypatch, capsys):
    words = "--run", run, "--task", "segment", "--data", folder, "--device", "cpu", "--batch-size", 8
    result = call(monkeypatch, capsys, *words, "--epochs", 40, "--lr", 3e-3, "--jitter", 1, 1)
    assert result["miou"] > chance(folder) + 2, result
    assert json.loads((run / "transfer-segment.json").read_text()) == result
    assert result["n"] == 6 and result["task"] == "segment" and result["image_size"] == 64
    short = [call(monkeypatch, capsys, *words, "--epochs", 1, "--workers", n)["miou"] for n in (0, 2)]
    assert short[0] == short[1]  # nor does it matter who reads


def test_detection_trains_and_measures(run, folder, monkeypatch, capsys):
    words = "--task", "detect", "--data", folder, "--device", "cpu", "--epochs", 1, "--batch-size", 4, "--untrained"
    result = call(monkeypatch, capsys, "--run", run, *words, "--image-size", 32)
    assert all(0 <= result[f"{kind}_{score}"] <= 100 for kind in ("box", "mask") for score in ("ap", "ap50"))
    assert json.loads((run / "transfer-detect-untrained.json").read_text()) == result


@pytest.mark.training
@pytest.mark.slow
def test_a_detector_learns_four_images_by_heart(folder):
    torch.manual_seed(0)
    images = transfer.Instances(folder, "val")
    reader = transfer.Reader(images, 64)
    samples = [reader[0, i] for i in range(4)]
    model = transfer.Detector(transfer.Features(small_vit(64, width=32)), 4).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(150):
        optimizer.zero_grad()
        model.loss(samples, "cpu").backward()
        optimizer.step()
    for annotation in list(images.coco.anns.values()):  # of the images that it has seen
        if annotation["image_id"] > 3:
            images.coco.dataset["annotations"].remove(annotation)
    images.coco.createIndex()
    with torch.no_grad():
        scores = model.eval().measure(images, iter([samples]), "cpu")
    assert scores["box_ap50"] > 50 and scores["mask_ap50"] > 50, scores


def wrong_label(place: Path) -> None:
    labels = Image.open(place / "SegmentationClass/val_00000.png")
    labels.putpixel((3, 4), 9)
    labels.save(place / "SegmentationClass/val_00000.png")


def another_size(place: Path) -> None:
    Image.new("RGB", (9, 9)).save(place / "JPEGImages/train_00000.jpg")


SEGMENT, DETECT = ("--task", "segment"), ("--task", "detect")
REFUSED = {
    "none given": ((), None),
    "coco: not for": ((*SEGMENT, "--format", "coco"), None),
    "must be at least 1": ((*SEGMENT, "--epochs", 0), None),
    "jitter 2 1": ((*SEGMENT, "--jitter", 2, 1), None),
    "not divisible by patch size": ((*SEGMENT, "--image-size", 30), None),
    "give a multiple of 32": ((*DETECT, "--image-size", 40), None),
    "larger than the 24 images": ((*SEGMENT, "--batch-size", 25), None),
    "not a COCO annotation file": (DETECT, lambda d: (d / "annotations/instances_train.json").write_text("[1")),
    "instances_train": (DETECT, lambda d: (d / "annotations/instances_train.json").unlink()),
    "no objects": (DETECT, lambda d: (d / "annotations/instances_val.json").write_text('{"images": []}')),
    "missing, or does not decode": (SEGMENT, lambda d: (d / "JPEGImages/train_00003.jpg").write_text("x")),
    "does not decode as a label map": (SEGMENT, lambda d: (d / "SegmentationClass/train_00003.png").unlink()),
    "as the image": (SEGMENT, another_size),
    "not of the size": (DETECT, another_size),
    "has label 9": (SEGMENT, wrong_label),
    "names nothing": (SEGMENT, lambda d: (d / "ImageSets/Segmentation/val.txt").write_text("\n")),
    "cannot be read": (SEGMENT, lambda d: (d / "ImageSets/Segmentation/val.txt").unlink()),
    "give a smaller --lr": ((*SEGMENT, "--lr", 1e30, "--epochs", 4), None),
    "is there already": (("--make-scenes", "."), None),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_wrong_is_said_in_one_line(run, folder, monkeypatch, capsys, words):
    options, spoil = REFUSED[words]
    place = run / "data"
    builtin_scenes.write(place, 24, seed=1) if spoil else place.symlink_to(folder)
    if spoil:
        spoil(place)
    common = "--run", run, "--data", place, "--device", "cpu", "--batch-size", 8, "--epochs", 1, "--image-size", 32
    with pytest.raises(InputError, match=words) as error:
        call(monkeypatch, capsys, *common, *options)
    assert "\n" not in str(error.value) and not list(run.glob("transfer-*"))


def test_torchrun_and_a_missing_library_are_refused(run, folder, monkeypatch, capsys):
    words = "--run", run, "--data", folder, *DETECT
    monkeypatch.setattr(transfer, "COCO", None)
    with pytest.raises(InputError, match=r"pip install .*\[coco\]"):
        call(monkeypatch, capsys, *words, "--device", "cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="torchrun"):
        call(monkeypatch, capsys, *words)


def test_a_bad_image_ends_the_program_with_one_line_and_status_2_whoever_reads(run):
    builtin_scenes.write(run / "data", 8, seed=0)
    (run / "data/JPEGImages/train_00003.jpg").write_text("x")
    words = [sys.executable, "transfer.py", "--run", run, "--data", run / "data", *SEGMENT, "--batch-size", "4"]
    done = subprocess.run(
        [*map(str, words), "--device", "cpu", "--workers", "2"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    said = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip() and "step" not in line]
    assert done.returncode == 2 and done.stdout == "" and len(said) == 1 and "train_00003.jpg" in said[0]
