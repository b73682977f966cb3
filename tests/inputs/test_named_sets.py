"""Sets that have names: Tiny-ImageNet's official layout, the built-in images, CIFAR."""

import pickle

import numpy as np
import pytest
import torch
import torchvision.datasets.cifar
from made_images import as_tensor, caches, make_tiny, pixels, the_error
from PIL import Image

from inputs import image_cache, image_sets


@pytest.mark.parametrize("parent", [False, True])
def test_tiny_imagenet(tmp_path, parent):
    folder = make_tiny(tmp_path / "tiny-imagenet-200")
    train, val = (
        image_sets.open_set("tiny-imagenet", tmp_path if parent else folder, split) for split in ("train", "val")
    )
    assert train.classes == val.classes == ["tabby", "goldfish, Carassius auratus", "reel"]
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2] and val.labels.tolist() == [0, 1, 2]
    images = train.images(torch.arange(6))
    assert images.shape == (6, 3, 6, 8) and torch.equal(images[2], as_tensor(pixels(10)))
    grey = np.asarray(Image.fromarray(pixels(11)).convert("L"))
    assert torch.equal(images[3], torch.tensor(grey).expand(3, -1, -1))
    assert torch.equal(val.images(torch.arange(3)), torch.stack([as_tensor(pixels(s)) for s in (51, 52, 50)]))
    assert torch.equal(val.subset(2).images(torch.tensor([1])), as_tensor(pixels(52))[None])


def test_annotations_may_change_and_lie_in_any_order(tmp_path):
    make_tiny(tmp_path)
    assert image_sets.open_set("tiny-imagenet", tmp_path, "val").labels.tolist() == [0, 1, 2]
    annotations = tmp_path / "val" / "val_annotations.txt"
    rows = annotations.read_text().replace("n01", "n02").splitlines(keepends=True)
    annotations.write_text("".join(reversed(rows)))
    val = image_sets.open_set(
        "tiny-imagenet", tmp_path, "val"
    )  # the same images in the same order, but not of these classes
    assert val.labels.tolist() == [0, 0, 2]
    assert torch.equal(val.images(torch.arange(3)), torch.stack([as_tensor(pixels(s)) for s in (51, 52, 50)]))


def test_tiny_imagenet_errors(tmp_path):
    assert "no tiny-imagenet-200/ there" in the_error("tiny-imagenet", tmp_path)
    assert f"{image_cache.cache_folder()}: no tiny-imagenet-200/ there" in the_error("tiny-imagenet")
    make_tiny(tmp_path)
    annotations = tmp_path / "val" / "val_annotations.txt"
    rows = annotations.read_text()
    annotations.write_text(rows.replace("n01", "n99"))
    assert "class n99 of val_2.JPEG is not in wnids.txt" in the_error("tiny-imagenet", tmp_path, "val")
    annotations.write_text(rows + "val_3.JPEG\tn01\n")
    assert "val/images/val_3.JPEG: is missing" in the_error("tiny-imagenet", tmp_path, "val")
    annotations.unlink()
    assert "val_annotations.txt: is missing" in the_error("tiny-imagenet", tmp_path, "val")
    (tmp_path / "wnids.txt").write_text("n01 n77")
    assert "train/n77: holds no images" in the_error("tiny-imagenet", tmp_path)


def test_shapes_are_cached_in_class_order(monkeypatch, cache):
    images, labels = np.stack([pixels(i).transpose(2, 0, 1) for i in range(4)]), np.array([1, 0, 1, 0])
    monkeypatch.setattr(image_sets.builtin_images, "CLASSES", ("a", "b"))
    calls = []
    monkeypatch.setattr(image_sets.builtin_images, "generate", lambda split: calls.append(split) or (images, labels))
    for _ in range(2):
        opened = image_sets.open_set("shapes")
        assert opened.classes == ["a", "b"] and opened.labels.tolist() == [0, 0, 1, 1] and opened.resident
        assert torch.equal(opened.images(torch.arange(4)), torch.from_numpy(images[[1, 3, 0, 2]]))
    image_sets.open_set("shapes", split="val")
    assert calls == ["train", "val"] and len(caches(cache)) == 2


def test_cifar(tmp_path, monkeypatch):
    assert the_error("cifar10", tmp_path) == f"{tmp_path}: cifar10 is missing or damaged; --download fetches it"
    rows = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8)
    (tmp_path / "cifar-100-python").mkdir()
    for name, content in [
        ("train", {"data": rows, "fine_labels": [2, 0, 1, 0, 2, 1]}),
        ("test", {"data": rows[:2], "fine_labels": [1, 0]}),
        ("meta", {"fine_label_names": ["apple", "bear", "cup"]}),
    ]:
        (tmp_path / "cifar-100-python" / name).write_bytes(pickle.dumps(content))
    assert "cifar100 is missing or damaged" in the_error(
        "cifar100", tmp_path
    )  # the checksums are not the official ones
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    train, val = (image_sets.open_set("cifar100", tmp_path, split) for split in ("train", "val"))
    assert train.classes == ["apple", "bear", "cup"] and train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    expected = torch.from_numpy(rows.reshape(6, 3, 32, 32)[[1, 3, 2, 5, 0, 4]])
    assert torch.equal(train.images(torch.arange(6)), expected) and val.labels.tolist() == [0, 1]


def test_cifar_download_that_fails(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", unreachable)
    assert "cifar10 cannot be fetched (no route to host)" in the_error("cifar10", tmp_path, download=True)


def test_class_order_keeps_the_order_within_a_class():
    labels = np.random.default_rng(0).integers(0, 3, 1000)
    flat, sizes, ordered = image_sets.in_class_order(np.arange(3000).reshape(1000, 3, 1, 1), labels)
    expected = [i for c in range(3) for i in range(1000) if labels[i] == c]
    assert (flat[::3] // 3).tolist() == expected and ordered.tolist() == sorted(labels)
    assert sizes.tolist() == [[1, 1]] * 1000
