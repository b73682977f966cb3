"""Folders of images: which files and classes are found, what is held out, and the line that each bad folder gets."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from made_images import as_tensor, make_folder, pixels, save, the_error

from inputs import image_files, image_sets
from runtime.errors import InputError


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
    classes, (one, two) = image_files.class_folders(tmp_path, "train")
    every = image_files.image_files(tmp_path, tmp_path / "class one")
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
    assert the_error(str(tmp_path)).startswith(f"{tmp_path}: holds no images (.jpg")
    (tmp_path / "dog").mkdir()
    assert the_error(str(tmp_path)).startswith(f"{tmp_path}/dog: holds no images (.jpg")
    save(tmp_path / "dog" / "1.png")
    assert the_error(str(tmp_path), split="val").startswith(f"{tmp_path}: one image, or one per class, leaves none")


def test_class_folders_that_differ(tmp_path):
    make_folder(tmp_path / "train", ("a", "b", "c"))
    make_folder(tmp_path / "val", ("a", "d"))
    for split in ("train", "val"):
        line = the_error(str(tmp_path), split=split)
        assert line == f"{tmp_path}: class folders differ, only in train/: b, c, only in val/: d"


def test_a_lonely_val_is_not_taken_for_held_out_images(tmp_path):
    make_folder(tmp_path / "val")
    assert "val/ holds class folders but train/ does not" in the_error("imagenet", tmp_path)


def test_every_format_is_found_and_decodes(tmp_path):
    for i, name in enumerate("a.jpg b.JPEG c.png d.ppm e.bmp f.pgm g.tif h.TIFF i.webp j.gif".split()):
        save(tmp_path / name, seed=i)
    (tmp_path / "drawing.eps").write_text("%!PS")
    images = image_sets.open_set(str(tmp_path)).images(torch.arange(9))  # the second is held out
    assert images.shape == (9, 3, 6, 8)
    for at, seed in ((1, 2), (2, 3), (3, 4), (5, 6), (6, 7)):  # the lossless ones in colour
        assert torch.equal(images[at], as_tensor(pixels(seed))), seed


# ----------------------------------------------------------------------------------------------------- without labels


@pytest.mark.parametrize("layout", ["flat", "train", "train and val", "train, test and val"])
def test_a_folder_without_class_folders_has_images_without_labels(tmp_path, layout):
    if "test" in layout:
        save(tmp_path / "test" / "1.png")
    for i in range(12):
        save(tmp_path / ("" if layout == "flat" else "train") / f"{i:02}.png", seed=i)
    if "and val" in layout:
        save(tmp_path / "val" / "x.png", seed=90), save(tmp_path / "val" / "._x.png", seed=91)
    train, val = (image_sets.open_set(str(tmp_path), split=split) for split in ("train", "val"))
    seeds = range(12) if "and val" in layout else [0, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert torch.equal(train.images(torch.arange(len(train))), torch.stack([as_tensor(pixels(s)) for s in seeds]))
    held_out = [90] if "and val" in layout else [1, 11]
    assert torch.equal(val.images(torch.arange(len(val))), torch.stack([as_tensor(pixels(s)) for s in held_out]))
    for use in (lambda: train.labels, lambda: train.subset(1), lambda: train.first(2).labels):
        with pytest.raises(InputError, match="its images have no labels, which a measure of an encoder needs; sort"):
            use()


def test_images_beside_class_folders_are_left_out_and_said(tmp_path, capsys):
    make_folder(tmp_path)
    save(tmp_path / "loose.png"), save(tmp_path / "more.GIF")
    train = image_sets.open_set(str(tmp_path))
    line = f"{tmp_path}: 2 images that lie beside or above the class folders have no label and are left out; --class"
    assert capsys.readouterr().err.startswith(line) and len(train) == 4 and train.classes == ["cat", "dog"]
    image_sets.open_set(str(tmp_path), split="val")
    assert "left out" not in capsys.readouterr().err  # said once


@pytest.mark.parametrize("below", [("",), ("train", "val"), ("val",)])
def test_level_0_takes_every_image_without_labels_however_folders_are_named(tmp_path, capsys, below):
    for place in below:
        make_nested(tmp_path / place)
        save(tmp_path / place / "loose.png"), save(tmp_path / place / "birds" / "above.png")
    train, val = (image_sets.open_set(str(tmp_path), split=split, class_level=0) for split in ("train", "val"))
    assert (len(train), len(val)) == ((14, 14) if "train" in below else (12, 2))
    assert train.classes == val.classes == [] and capsys.readouterr().err.count("left out") == 0


def test_one_image_without_labels_leaves_none_to_hold_out(tmp_path):
    save(tmp_path / "1.png")
    assert len(image_sets.open_set(str(tmp_path))) == 1
    assert the_error(str(tmp_path), split="val").startswith(f"{tmp_path}: one image, or one per class, leaves none")


# ------------------------------------------------------------------------------------------------------ nested folders


def make_nested(root):
    for i, name in enumerate(("birds/owl", "birds/tit", "plants/fern", "plants/moss")):
        for k in range(3):
            save(root / name / f"{k}.png", seed=10 * i + k)


@pytest.mark.parametrize("below", ["", "train"])
def test_which_level_became_the_classes_is_said_and_may_be_chosen(tmp_path, capsys, below):
    make_nested(tmp_path / below)
    top = image_sets.open_set(str(tmp_path))
    said = (
        "the 2 folders at the top (birds, plants) became the classes, though they hold folders; --class-level 2 takes"
    )
    assert top.classes == ["birds", "plants"] and said in capsys.readouterr().err
    image_sets.open_set(str(tmp_path))
    assert "became" not in capsys.readouterr().err  # a run that opens it again, to measure, has said so
    deep, val = (image_sets.open_set(str(tmp_path), split=split, class_level=2) for split in ("train", "val"))
    assert deep.classes == val.classes == ["birds/owl", "birds/tit", "plants/fern", "plants/moss"]
    assert deep.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and val.labels.tolist() == [0, 1, 2, 3]
    assert torch.equal(val.images(torch.tensor([2])), as_tensor(pixels(21))[None])
    assert "became" not in capsys.readouterr().err
    for level, line in [(3, "holds no folders at level 3; give a --class-level up to 2"), (-1, "must be 0, for")]:
        assert line in the_error(str(tmp_path), class_level=level)


def test_levels_of_train_and_val_must_agree_and_images_above_the_level_are_left_out(tmp_path, capsys):
    make_nested(tmp_path / "train"), make_nested(tmp_path / "val")
    save(tmp_path / "train" / "birds" / "loose.png")
    assert len(image_sets.open_set(str(tmp_path), class_level=2)) == 12
    assert f"{tmp_path}/train: 1 images that lie beside or above" in capsys.readouterr().err
    save(tmp_path / "val" / "fungi" / "cep" / "0.png")
    assert "only in train/: none, only in val/: fungi/cep" in the_error(str(tmp_path), class_level=2)
    (tmp_path / "flat").mkdir()
    save(tmp_path / "flat" / "1.png")
    assert "holds no class folders; leave out --class-level" in the_error(str(tmp_path / "flat"), class_level=2)


def test_a_folder_in_every_class_is_no_level(tmp_path, capsys):
    """As Tiny-ImageNet's train/CLASS/images/."""
    for name in ("cat", "dog"):
        save(tmp_path / name / "images" / "1.png")
    image_sets.open_set(str(tmp_path))
    assert "became" not in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- ImageNet's flat val/

WNIDS = ("n01", "n02", "n03")
OFFICIAL = [f"ILSVRC2012_val_{i:08}" for i in range(1, 6)]
ANSWERS = ("n02", "n01", "n03", "n02", "n01")
NUMBERS = {"n01": 3, "n02": 1, "n03": 2}


def make_imagenet(root):
    make_folder(root / "train", WNIDS, n=2)
    for i, name in enumerate(OFFICIAL):
        save(root / "val" / f"{name}.JPEG", seed=i)
    return root


def give_kaggle(folder):
    rows = [f"{name},{wnid} 1 2 3 4 {wnid} 5 6 7 8" for name, wnid in zip(OFFICIAL, ANSWERS, strict=True)]
    (folder / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows[::-1], ""]))


def give_kit(folder):
    folder = folder / "ILSVRC2012_devkit_t12" / "data"
    folder.mkdir(parents=True)
    truth = "".join(f"{NUMBERS[wnid]}\n" for wnid in ANSWERS)
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text(truth)
    (folder / "map_clsloc.txt").write_text("".join(f"{wnid} {n} a_word\n" for wnid, n in NUMBERS.items()))


def give_official_kit(folder):
    """As ILSVRC2012_devkit_t12.tar.gz is unpacked: classes are structs of MATLAB, with those above them in WordNet."""
    give_kit(folder)
    kit = folder / "ILSVRC2012_devkit_t12" / "data"
    (kit / "map_clsloc.txt").unlink()
    fields = "ILSVRC2012_ID WNID words gloss num_children children wordnet_height num_train_images".split()
    rows = [
        (float(n), wnid, "kit fox, Vulpes macrotis", "a fox", 0.0, np.empty(0), 0.0, 1300.0)
        for wnid, n in NUMBERS.items()
    ]
    rows.append((4.0, "n04", "animal", "a living thing", 3.0, np.array([1.0, 2.0, 3.0]), 1.0, 0.0))
    table = np.array(rows, [(field, object) for field in fields])[:, None]
    pytest.importorskip("scipy.io").savemat(kit / "meta.mat", dict(synsets=table))


@pytest.mark.parametrize("give", [give_kaggle, give_kit, give_official_kit])
@pytest.mark.parametrize("where", [".", "../.."])
def test_a_val_as_it_is_unpacked_has_the_labels_that_lie_near(tmp_path, give, where):
    root = make_imagenet(tmp_path / "one" / "two" / "set")
    give(root / where)
    val = image_sets.open_set("imagenet", root, "val")
    assert val.classes == list(WNIDS) and val.labels.tolist() == [0, 0, 1, 1, 2]
    assert [Path(path).stem[-1] for path in val.pixels.paths] == ["2", "5", "1", "4", "3"]
    assert len(image_sets.open_set("imagenet", root)) == 6


def test_a_val_as_it_is_unpacked_without_labels_gets_a_line_that_says_what_to_do(tmp_path, monkeypatch):
    root = make_imagenet(tmp_path)
    for split in ("train", "val"):
        line = the_error("imagenet", root, split)
        assert line.startswith(f"{root}/val: holds no class folders") and "put LOC_val_solution.csv (Kaggle's)" in line
    give_kit(root)
    kit = root / "ILSVRC2012_devkit_t12" / "data"
    (kit / "map_clsloc.txt").rename(kit / "away")
    assert "nor is a list of its labels near" in the_error("imagenet", root)
    (kit / "meta.mat").write_bytes(b"no matrix")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "scipy.io", None)
        assert (
            the_error("imagenet", root)
            == f"{kit}/meta.mat: needs scipy to be read, which is not installed; pip install scipy"
        )
    if importlib.util.find_spec("scipy"):
        assert the_error("imagenet", root).startswith(f"{kit}/meta.mat: is not the list of labels that it should be")
    for content in ("n01 one kit_fox", "n01 9 kit_fox", "n01", "", b"\xff\xfe\x00"):
        (kit / "map_clsloc.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
        assert "is not the list of labels that it should be; fetch it again" in the_error("imagenet", root), content
    give_kaggle(root)
    assert image_sets.open_set("imagenet", root, "val").labels.tolist() == [0, 0, 1, 1, 2]
    save(root / "val" / "mine.png")
    assert the_error("imagenet", root).startswith(f"{root}/val/mine.png: not in LOC_val_solution.csv; remove it")
    (root / "val" / "mine.png").unlink()
    text = (root / "LOC_val_solution.csv").read_text()
    (root / "LOC_val_solution.csv").write_text(text.replace("n03", "n77"))
    assert "00000003.JPEG: of class n77, which train/ does not have" in the_error("imagenet", root)
    (root / "LOC_val_solution.csv").write_text(text.replace("n03", "n02"))
    assert (
        the_error("imagenet", root) == f"{root}/val: holds no image of class n03, which train/ has; both need the same"
    )
    (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\nILSVRC2012_val_00000001\n")
    assert "LOC_val_solution.csv: is not the list of labels that it should be" in the_error("imagenet", root)
