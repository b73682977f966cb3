"""The command transfer.py: it segments and detects, and refuses in one line what is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import transfer
from common import ViT
from downstream import dense_prediction
from inputs import builtin_scenes
from runtime import fast, files
from runtime.errors import InputError

pytest.importorskip("pycocotools.mask")
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


def chance(folder: Path) -> float:
    """The mIoU of calling every pixel ground, the commonest class."""
    images = dense_prediction.Segments(folder, "val")
    labels = torch.cat([images.read(i)[1].flatten() for i in range(len(images))]).long()
    return dense_prediction.segmentation_scores(dense_prediction.confusion(torch.zeros_like(labels), labels, 5))["miou"]


@pytest.mark.training
@pytest.mark.slow
def test_training_raises_miou_above_chance_and_repeats_itself(run, folder, monkeypatch, capsys):
    words = "--run", run, "--task", "segment", "--data", folder, "--device", "cpu", "--batch-size", 8
    words += "--precision", "fp32"  # auto depends on the machine
    result = call(monkeypatch, capsys, *words, "--epochs", 40, "--lr", 3e-3, "--jitter", 1, 1)
    assert result["miou"] > chance(folder) + 1, result  # over seeds by 6 to 16
    assert json.loads((run / "transfer-segment.json").read_text()) == result
    assert result["n"] == 6 and result["task"] == "segment" and result["image_size"] == 64
    short = [call(monkeypatch, capsys, *words, "--epochs", 1, "--workers", n)["miou"] for n in (0, 2)]
    assert short[0] == short[1]  # nor does it matter who reads


@pytest.mark.parametrize("fastest", ["fp32", "bf16"])
def test_detection_trains_and_measures(run, folder, monkeypatch, capsys, fastest):
    """In the precision that is the fastest here."""
    monkeypatch.setattr(fast, "measured", lambda: dict(precision=fastest, linear="product"))
    types, forward = set(), ViT.embed
    monkeypatch.setattr(ViT, "embed", lambda *a: types.add(torch.is_autocast_enabled("cpu")) or forward(*a))
    words = "--task", "detect", "--data", folder, "--device", "cpu", "--epochs", 1, "--batch-size", 4, "--untrained"
    result = call(monkeypatch, capsys, "--run", run, *words, "--image-size", 32)
    assert all(0 <= result[f"{kind}_{score}"] <= 100 for kind in ("box", "mask") for score in ("ap", "ap50"))
    assert json.loads((run / "transfer-detect-untrained.json").read_text()) == result
    assert result["precision"] == fastest and types == {fastest == "bf16"}


@pytest.mark.training
@pytest.mark.slow
def test_a_detector_learns_four_images_by_heart(folder):
    torch.manual_seed(0)
    images = dense_prediction.Instances(folder, "val")
    reader = dense_prediction.Reader(images, 64)
    samples = [reader[0, i] for i in range(4)]
    model = dense_prediction.Detector(dense_prediction.Features(small_vit(64, width=32)), 4).train()
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
    "from 0 to 4294967295": ((*SEGMENT, "--seed", 2**32), None),
    "jitter 2 1": ((*SEGMENT, "--jitter", 2, 1), None),
    "weight decay nan": ((*SEGMENT, "--weight-decay", "nan"), None),
    "decay at 9 20: must lie between 0 and the 1 epochs": ((*SEGMENT, "--decay-at", 9, 20), None),
    "not divisible by patch size": ((*SEGMENT, "--image-size", 30), None),
    "give a multiple of 32": ((*DETECT, "--image-size", 40), None),
    "larger than the 24 images": ((*SEGMENT, "--batch-size", 25), None),
    "not a COCO annotation file": (DETECT, lambda d: (d / "annotations/instances_train.json").write_text("[1")),
    "instances_train": (DETECT, lambda d: (d / "annotations/instances_train.json").unlink()),
    "no objects": (DETECT, lambda d: (d / "annotations/instances_val.json").write_text('{"images": []}')),
    "does not decode as an image": (SEGMENT, lambda d: (d / "JPEGImages/train_00003.jpg").write_text("x")),
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
    monkeypatch.setattr(dense_prediction, "COCO", None)
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
