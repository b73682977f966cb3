"""Folders of images: which files and classes are found, what is held out, and the line that each bad folder gets."""

import pytest
import torch
from made_images import as_tensor, make_folder, pixels, save, the_error

from inputs import image_folders, image_sets


def test_folder_with_train_and_val(tmp_path):
    make_folder(tmp_path / "train", n=3)
    save(tmp_path / "val" / "cat" / "x.png", seed=7)
    save(tmp_path / "val" / "dog" / "deeper" / "x.PNG", seed=8)
    train, val = (image_sets.open_set(str(tmp_path), split=split) for split in ("train", "val"))
    assert train.classes == val.classes == ["cat", "dog"] and train.name == tmp_path.name and train.resident
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1] and train.labels.dtype == torch.int64
    expected = torch.stack([as_tensor(pixels(seed)) for seed in (0, 1, 2, 100, 101, 102)])
    assert torch.equal(train.images(torch.arange(6)), expected)
    assert torch.equal(val.images(torch.tensor([1, 0])), torch.stack([as_tensor(pixels(8)), as_tensor(pixels(7))]))


@pytest.mark.parametrize("below", ["", "train"])
def test_without_val_every_tenth_image_is_held_out(tmp_path, below):
    make_folder(tmp_path / below, n=23)
    save(tmp_path / below / "train" / "only.png")  # a class that is called train, with one image
    train, val = (image_sets.open_set(str(tmp_path), split=split) for split in ("train", "val"))
    assert train.classes == val.classes == ["cat", "dog", "train"]
    assert train.labels.bincount().tolist() == [20, 20, 1] and val.labels.tolist() == [0] * 3 + [1] * 3
    held_out = torch.stack([as_tensor(pixels(seed)) for seed in (1, 11, 21, 101, 111, 121)])
    assert torch.equal(val.images(torch.arange(6)), held_out)
    seen = {image.numpy().tobytes() for image in train.images(torch.arange(40))}
    assert len(seen) == 40 and not seen & {image.numpy().tobytes() for image in val.images(torch.arange(6))}


def test_listing_is_sorted_recursive_and_minds_names(tmp_path):
    names = ["b/é ü.jpeg", "a b.JPG", "z.WebP", "日本.bmp", ".hidden.png", "notes.txt", "deep/er/1.png", "._a b.JPG"]
    for name in reversed(names):
        path = tmp_path / "class one" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / ".git").mkdir()
    (tmp_path / "class two").mkdir()
    (tmp_path / "class two" / "link").symlink_to(tmp_path / "class one")
    classes, (one, two) = image_folders.class_folders(tmp_path, "train")
    every = image_folders.image_files(tmp_path, tmp_path / "class one")
    expected = ["a b.JPG", "b/é ü.jpeg", "deep/er/1.png", "z.WebP", "日本.bmp"]
    assert every == [f"class one/{name}" for name in expected] and classes == ["class one", "class two"]
    assert one == every[:1] + every[2:] and two == [path.replace("one", "two/link") for path in one]


@pytest.mark.parametrize("name, root", [(".", None), ("imagenet", "."), ("../set", None), ("set", "..")])
def test_a_folder_may_be_the_one_that_one_is_in(tmp_path, monkeypatch, name, root):
    for split in ("train", "val"):
        make_folder(tmp_path / "set" / split)
    expected = image_sets.open_set(str(tmp_path / "set"))
    monkeypatch.chdir(tmp_path / "set")
    found = image_sets.open_set(name, root)
    assert len(found) == 6 and found.classes == expected.classes
    assert torch.equal(torch.stack(list(found.images(torch.arange(6)))), expected.images(torch.arange(6)))


def test_names_survive_decoding(tmp_path):
    for i, name in enumerate(("a b.png", "é.png", "日本 語.png")):
        save(tmp_path / "klasse ß" / name, seed=i)
    opened = image_sets.open_set(str(tmp_path))
    assert torch.equal(opened.images(torch.arange(2)), torch.stack([as_tensor(pixels(i)) for i in (0, 2)]))


def test_a_folder_may_be_named_relative_to_root(tmp_path):
    make_folder(tmp_path / "pets")
    assert image_sets.open_set("pets", tmp_path).name == "pets"


def test_folder_errors(tmp_path):
    assert the_error("imagnet").startswith("imagnet: neither an image set nor a folder; give one of shapes, tiny-imag")
    assert "no such split" in the_error("shapes", split="test")
    assert the_error("imagenet").startswith("imagenet: no folder is given")
    assert the_error("imagenet", tmp_path / "none").startswith(f"{tmp_path}/none: no such folder")
    assert the_error(str(tmp_path)).startswith(f"{tmp_path}: holds no class folders")
    (tmp_path / "dog").mkdir()
    assert the_error(str(tmp_path)).startswith(f"{tmp_path}/dog: holds no images (.jpg")
    save(tmp_path / "dog" / "1.png")
    assert the_error(str(tmp_path), split="val").startswith(f"{tmp_path}: one image per class leaves none to hold out")


def test_class_folders_that_differ(tmp_path):
    make_folder(tmp_path / "train", ("a", "b", "c"))
    make_folder(tmp_path / "val", ("a", "d"))
    for split in ("train", "val"):
        line = the_error(str(tmp_path), split=split)
        assert line == f"{tmp_path}: class folders differ, only in train/: b, c, only in val/: d"


def test_flat_or_lonely_val_is_not_taken_for_held_out_images(tmp_path):
    make_folder(tmp_path / "train")
    save(tmp_path / "val" / "1.png")
    assert "only in train/: cat, dog, only in val/: none" in the_error("imagenet", tmp_path)
    make_folder(tmp_path / "other" / "val")
    assert "val/ holds class folders but train/ does not" in the_error("imagenet", tmp_path / "other")
