"""iNaturalist: images and labels by its lists, in the official and in torchvision's layout, and what may be wrong."""

import json
from itertools import product

import pytest
import torch
from made_images import as_tensor, pixels, save, the_error

from inputs import image_sets

CATEGORIES = [
    dict(id=n, name=name) for n, name in ((5, "Vulpes vulpes"), (2, "Apis mellifera"), (9, "Amanita muscaria"))
]
LABELS = dict(train=[9, 2, 5, 2], val=[5, 9])


def make(root, year="2018", layout="official"):
    """Images 0, 1, … of training and 10, 11 of validation, listed in the opposite order."""
    for split, labels in LABELS.items():
        folder = f"train_val{year}" if year else split
        files = [f"{folder}/Group {label % 2}/{label}/{split}{i}.jpg.png" for i, label in enumerate(labels)]
        there = dict(official=folder, torchvision=year or dict(train="2021_train", val="2021_valid")[split], inside="")[
            layout
        ]
        for i, file in enumerate(files):
            save(root / there / file.partition("/")[2], seed=i + 10 * (split == "val"))
        images = [dict(id=100 + i, file_name=file) for i, file in enumerate(files)][::-1]
        annotations = [dict(id=i, image_id=100 + i, category_id=label) for i, label in enumerate(labels)]
        content = dict(images=images, annotations=annotations, categories=CATEGORIES)
        (root / f"{split}{year}.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize(
    "year, layout",
    [*product(["2017", "2018", ""], ["official", "torchvision"]), ("2017", "inside"), ("2018", "inside")],
)
def test_images_and_labels_are_those_of_the_lists(tmp_path, year, layout):
    make(tmp_path, year, layout)
    for split, seeds, labels in (("train", [1, 3, 2, 0], [0, 0, 1, 2]), ("val", [10, 11], [1, 2])):
        opened = image_sets.open_set("inaturalist", tmp_path, split)
        assert (
            opened.classes == ["Apis mellifera", "Vulpes vulpes", "Amanita muscaria"] and opened.name == "inaturalist"
        )
        assert opened.labels.tolist() == labels
        assert torch.equal(opened.images(torch.arange(len(seeds))), torch.stack([as_tensor(pixels(s)) for s in seeds]))


def test_what_the_lists_lack_gets_one_line(tmp_path, capsys):
    assert "inaturalist: no folder is given; name" in the_error("inaturalist")
    advice = "give a folder with those of one year, train2018.json and val2018.json"
    assert the_error("inaturalist", tmp_path) == f"{tmp_path}: holds no lists; {advice}"
    make(tmp_path)
    (tmp_path / "val2018.json").rename(tmp_path / "away")
    assert the_error("inaturalist", tmp_path) == f"{tmp_path}: holds train2018.json; {advice}"
    (tmp_path / "away").rename(tmp_path / "val2018.json")
    (tmp_path / "train2019.json").touch()
    assert "holds train2018.json, val2018.json, train2019.json; give" in the_error("inaturalist", tmp_path)
    (tmp_path / "train2019.json").unlink()

    path = tmp_path / "train2018.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | dict(annotations=content["annotations"][:-1])))
    assert image_sets.open_set("inaturalist", tmp_path).labels.tolist() == [0, 1, 2]
    assert f"{path}: 1 images have no label and are left out" in capsys.readouterr().err
    path.write_text(json.dumps(content | dict(annotations=[])))
    assert the_error("inaturalist", tmp_path).startswith(f"{path}: labels no image; fetch it again")
    path.write_text(json.dumps(content | dict(categories=CATEGORIES[1:])))
    file = content["images"][1]["file_name"]
    assert the_error("inaturalist", tmp_path) == f"{path}: {file} is of category 5, which train2018.json does not have"
    assert "val2018.json: train_val2018/Group 1/5/val0" in the_error("inaturalist", tmp_path, "val")
    for damage in (
        "",
        "[]",
        "{}",
        json.dumps(content | dict(images=[])),
        json.dumps(content | dict(images=[dict(id=1)])),
    ):
        path.write_text(damage)
        assert the_error("inaturalist", tmp_path) == f"{path}: is not a list of iNaturalist's images; fetch it again"

    path.write_text(json.dumps(content))
    for i in (1, 0):  # the first is that by which the layout is found
        missing = tmp_path / content["images"][i]["file_name"]
        missing.unlink()
        assert the_error("inaturalist", tmp_path).startswith(f"{missing}: is missing; unpack the archive of the images")
