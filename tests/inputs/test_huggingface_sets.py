"""Sets of the hub and parquet files: what is found in their columns and splits, and the line that each bad one gets."""

import io

import numpy as np
import pytest
import torch
from made_images import as_tensor, caches, open_both, pixels, the_error
from PIL import Image

from inputs import image_sets
from runtime.errors import InputError
from runtime.ranks import say_once

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(autouse=True)
def library(tmp_path_factory, monkeypatch):
    """The library's own cache: in a folder of this test."""
    folder = tmp_path_factory.mktemp("library")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def encoded(seed, mode="RGB", format="PNG", **size):
    content = io.BytesIO()
    Image.fromarray(pixels(seed, **size)).convert(mode).save(content, format)
    return content.getvalue()


def features(image, label, names=("a",)):
    return datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=list(names))})


def write(folder, labels=(2, 0, 1, 0), split="train", names=("ant", "bee", "cat"), images=None):
    """A split as the hub has it: rows with the images 0, 1, … and labels, in a file that declares both."""
    folder.mkdir(exist_ok=True, parents=True)
    images = [encoded(i) for i in range(len(labels))] if images is None else images
    pictures = [content and dict(bytes=content, path=None) for content in images]
    columns = dict(picture=pictures, what=list(labels))
    declared = features("picture", "what", names)
    datasets.Dataset.from_dict(columns, features=declared).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return f"hf:{folder}"


def write_plain(path, **columns):
    """A file that declares nothing beyond types."""
    path.parent.mkdir(exist_ok=True, parents=True)
    parquet.write_table(pyarrow.table(columns), path)
    return f"hf:{path}"


def seeds(opened, n=12):
    """Which of the images 0, 1, … a set holds, in its order."""
    every = {as_tensor(pixels(i)).numpy().tobytes(): i for i in range(n)}
    return [every[image.numpy().tobytes()] for image in opened.images(torch.arange(len(opened)))]


@pytest.mark.parametrize("streams", [False, True])
def test_images_and_labels_are_read_by_row_in_class_order(tmp_path, monkeypatch, streams):
    name = write(tmp_path / "set")
    write(tmp_path / "set", labels=(1, 1, 0), split="validation", images=[encoded(i) for i in (4, 5, 6)])
    if streams:
        monkeypatch.setattr(image_sets, "RESIDENT_LIMIT", 0)
    train, val = (image_sets.open_set(name, split=split) for split in ("train", "val"))
    assert train.resident != streams and train.classes == val.classes == ["ant", "bee", "cat"]
    assert train.labels.tolist() == [0, 0, 1, 2] and seeds(train) == [1, 3, 2, 0]
    assert val.labels.tolist() == [0, 1, 1] and seeds(val) == [6, 4, 5]
    assert seeds(train.subset(1)) == [1, 3] and seeds(train.first(3)) == [1, 3, 2] and seeds(train.spaced(2)) == [1, 0]
    again = [3, 0, 0, 2]
    for image, i in zip(train.images(torch.tensor(again)), (0, 1, 1, 2), strict=True):
        assert torch.equal(image, as_tensor(pixels(i)))


def test_varied_sizes_and_modes_come_as_lists(tmp_path, monkeypatch):
    contents = [encoded(0, h=5, w=7), encoded(1, "L"), encoded(2, "CMYK", "TIFF"), encoded(3, "P"), encoded(4, "RGBA")]
    for opened in open_both(
        write(tmp_path, range(5), names="abcde", images=contents), monkeypatch, splits=["train"] * 2
    ):
        for image, content in zip(opened.images(torch.arange(5)), contents, strict=True):
            with Image.open(io.BytesIO(content)) as picture:
                assert torch.equal(image, as_tensor(np.array(picture.convert("RGB"))))


def test_a_file_that_declares_nothing_is_read_by_its_types(tmp_path, capsys):
    contents = [encoded(i) for i in range(4)]
    file = tmp_path / "a.parquet"
    for images in (contents, [dict(bytes=content, path="x.png") for content in contents]):
        name = write_plain(file, image=images, label=[30, 7, 30, 7], width=[8] * 4, caption=list("abcd"))
        train, val = (image_sets.open_set(name, split=split) for split in ("train", "val"))
        assert (
            train.classes == ["7", "30"] and seeds(train) == [1, 0] and seeds(val) == [3, 2]
        )  # one in ten is held out
    write_plain(file, image=pyarrow.array(contents, pyarrow.large_binary()), label=["owl", "emu", None, "owl"])
    train = image_sets.open_set(f"hf:{tmp_path.name}/a.parquet", tmp_path.parent, splits=["train", "train"])
    assert train.classes == ["emu", "owl"] and seeds(train) == [1, 0, 3]
    assert "1 images have no label and are left out" in capsys.readouterr().err
    (tmp_path / "0.png").write_bytes(contents[2])
    name = write_plain(file, image=[dict(bytes=None, path=str(tmp_path / "0.png"))] * 2, kind=["a", "b"])
    train = image_sets.open_set(name)
    assert not train.classes and seeds(train) == [2]
    assert (
        "no labels are found; if one of image, kind holds them, give --columns IMAGE LABEL" in capsys.readouterr().err
    )
    with pytest.raises(InputError, match="its images have no labels"):
        train.labels  # noqa: B018


def test_columns_that_leave_a_doubt_are_named_and_may_be_chosen(tmp_path):
    contents = [encoded(i) for i in range(4)]
    rows = dict(a=contents, b=contents[::-1], label=[0, 0, 1, 1], target=list("xyxy"), size=[1.5] * 4)
    name = write_plain(tmp_path / "a.parquet", **rows)
    there = "a (binary), b (binary), label (int64), target (string), size (float64)"
    assert the_error(name) == f"{name}: several columns hold images; choose by --columns IMAGE LABEL of {there}"
    opened = image_sets.open_set(name, columns=["b", "target"], splits=["train", "train"])
    assert opened.classes == ["x", "y"] and seeds(opened) == [3, 1, 2, 0]
    assert not image_sets.open_set(name, columns=["a"]).classes
    for columns in (["label"], ["a", "size"], ["a", "none"], ["a", "label", "target"], ["a", "b"]):
        assert f"cannot take --columns {' '.join(columns)} of {there}; the first" in the_error(name, columns=columns)
    declared = datasets.Features(dict(x=datasets.Image(), y=datasets.Value("binary")))
    both = datasets.Dataset.from_dict(dict(x=[dict(bytes=contents[0])], y=[b"no image"]), features=declared)
    both.to_parquet(tmp_path / "declared.parquet")
    assert seeds(image_sets.open_set(f"hf:{tmp_path}/declared.parquet", splits=["train", "train"])) == [0]
    del rows["b"]
    name = write_plain(tmp_path / "a.parquet", **rows)
    assert "several columns may be the labels; choose by --columns IMAGE LABEL of a (binary), label" in the_error(name)
    name = write_plain(tmp_path / "a.parquet", image=pyarrow.nulls(3), name=list("abc"), box=[dict(x=1)] * 3)
    assert the_error(name) == f"{name}: no column holds images; it has image (null), name (string), box (struct)"


def test_splits_are_found_by_their_usual_names_and_may_be_chosen(tmp_path):
    name, images = write(tmp_path), [encoded(i) for i in range(4, 8)]
    write(tmp_path, split="test", images=images)
    assert seeds(image_sets.open_set(name, split="val")) == [5, 7, 6, 4]
    write(tmp_path, labels=(-1, -1, None, -1), split="test", images=images)  # as ImageNet hides them
    assert seeds(image_sets.open_set(name)) == [1, 2, 0] and seeds(image_sets.open_set(name, split="val")) == [3]
    write(tmp_path, split="valid", images=images[::-1])
    assert seeds(image_sets.open_set(name)) == [1, 3, 2, 0] and seeds(image_sets.open_set(name, split="val")) == [
        6,
        4,
        5,
        7,
    ]
    hidden = image_sets.open_set(name, split="val", splits=["train", "test"])
    assert not hidden.classes and len(hidden) == 4
    assert seeds(image_sets.open_set(name, splits=["validation"])) == [6, 5, 7]
    assert seeds(image_sets.open_set(name, split="val", splits=["validation", "train"])) == [1, 3, 2, 0]
    for splits in (["dev"], ["train", "dev"], ["train"] * 3):
        line = f"{name}: cannot take --split {' '.join(splits)}; give one or two of train, validation, test"
        assert the_error(name, splits=splits) == line
    for option in (dict(splits=["train"]), dict(columns=["a"])):
        assert "shapes: has no splits or columns to choose; leave out --" in the_error("shapes", **option)


def test_labels_that_are_missing_or_out_of_range(tmp_path, capsys):
    name = write(tmp_path / "a", labels=(None, 1, -1, 0))
    opened = image_sets.open_set(name, splits=["train", "train"])
    assert opened.labels.tolist() == [0, 1] and seeds(opened) == [3, 1]
    assert f"{name}/train: 2 images have no label and are left out" in capsys.readouterr().err
    name = write(tmp_path / "b", labels=(None, -1, None, None))
    assert not image_sets.open_set(name).classes and len(image_sets.open_set(name)) == 3
    capsys.readouterr()
    for columns, line in (([], 1), (["picture", "what"], 1), (["picture"], 0)):  # by type; asked for; not asked for
        say_once.cache_clear()
        assert not image_sets.open_set(name, columns=columns).classes
        said = capsys.readouterr().err
        assert said.count("no labels are found; if one of picture, what holds them, give --columns IMAGE") == line
    rows = pyarrow.table(parquet.read_table(tmp_path / "a" / "train-00000-of-00001.parquet"))
    for wrong in (3, -2):
        changed = rows.set_column(1, "what", pyarrow.array([0, 1, wrong, 2]))
        (tmp_path / "c").mkdir(exist_ok=True)
        parquet.write_table(changed, tmp_path / "c" / "train.parquet")
        line = f"hf:{tmp_path}/c/train: row 2 has the label {wrong}, which none of the 3 classes has"
        assert the_error(f"hf:{tmp_path}/c") == line
    write_plain(tmp_path / "d" / "train.parquet", image=[encoded(0)] * 2, label=["a", "b"])
    write_plain(tmp_path / "d" / "test.parquet", image=[encoded(0)] * 2, label=["b", "c"])
    line = f"hf:{tmp_path}/d/test: row 1 has the label c, which none of the 2 classes has"
    assert the_error(f"hf:{tmp_path}/d", split="val") == line


@pytest.mark.parametrize("streams", [False, True])
def test_an_image_that_does_not_decode_is_named_by_its_row_or_skipped(tmp_path, monkeypatch, capsys, cache, streams):
    name = write(tmp_path / "set", images=[encoded(0), encoded(1)[:40], encoded(2), None])
    if streams:
        monkeypatch.setattr(image_sets, "RESIDENT_LIMIT", 0)
    both = dict(splits=["train", "train"])
    bad = f"{name}/train/row 1: does not decode as an image (UnidentifiedImageError); repair or remove it"
    if streams:
        with pytest.raises(InputError, match=r"row 1: does not decode"):
            image_sets.open_set(name, **both).images(torch.arange(4))
        images, index = next(image_sets.open_set(name, skip_bad_images=True, **both).batches([torch.arange(4)]))
        assert index.tolist() == [2, 2, 2, 3] and torch.equal(images[3], as_tensor(pixels(0)))
        return
    assert the_error(name, **both).startswith(bad) and caches(cache) == []
    for _ in range(2):  # decoded, then from the cache in another process
        say_once.cache_clear()
        opened = image_sets.open_set(name, skip_bad_images=True, **both)
        assert seeds(opened) == [2, 0] and opened.labels.tolist() == [1, 2]
        assert f"{name}: 2 images that do not decode are left out, row 1 the first" in capsys.readouterr().err
    assert the_error(name, **both).startswith(bad)


def test_a_changed_file_other_rows_and_another_column_make_another_cache(tmp_path, cache):
    images = [encoded(i) for i in range(4)]
    file = tmp_path / "a.parquet"
    name = write_plain(file, a=images, b=images[::-1], label=[0, 0, 1, 1])
    assert seeds(image_sets.open_set(name, columns=["a", "label"])) == [0, 2]
    assert seeds(image_sets.open_set(name, columns=["b", "label"])) == [3, 1] and len(caches(cache)) == 2
    image_sets.open_set(name, columns=["a", "label"])
    assert len(caches(cache)) == 2
    write_plain(file, a=images[::-1], b=images, label=[1, 0, 1, 1], other=[0, 1, 1, 1])
    assert seeds(image_sets.open_set(name, columns=["a", "label"])) == [2, 3, 0]
    assert seeds(image_sets.open_set(name, columns=["a", "other"])) == [3, 2, 0]  # as many of each class


def test_greys_of_12_bits_have_the_range_of_the_training_images(tmp_path):
    values = np.array([[500, 1500, 2500]], np.uint16)
    contents = []
    for factor in (1, 1, 1.6):
        contents.append(io.BytesIO())
        Image.fromarray((values * factor).astype(np.uint16)).save(contents[-1], "PNG")
    rows = [content.getvalue() for content in contents]
    write_plain(tmp_path / "train.parquet", image=rows[:2], label=[0, 0])
    write_plain(tmp_path / "test.parquet", image=rows[2:], label=[0])
    val = image_sets.open_set(f"hf:{tmp_path}", split="val")
    assert val.images(torch.tensor([0]))[0, 0].tolist() == [[38, 242, 255]]


def raising(error):
    def load_dataset(*words, **more):
        raise error

    return load_dataset


def test_what_cannot_be_opened_gets_one_line(tmp_path, monkeypatch):
    """Files here; what the hub answers is played, as no test reaches it."""
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    (tmp_path / "empty").mkdir()
    write_plain(tmp_path / "differ" / "a.parquet", a=[1])
    write_plain(tmp_path / "differ" / "b.parquet", b=["x"])
    for name, what in {
        "bad.parquet": "cannot be opened (Parquet magic bytes not found",
        "none.parquet": "cannot be opened (Unable to find",
        "empty": "cannot be opened (The directory at",
        "differ": "cannot be opened (Couldn't cast b: string to",
    }.items():
        assert the_error(f"hf:{name}", tmp_path).startswith(f"hf:{name}: {what}")
    errors = datasets.exceptions
    gated = "Dataset 'a/b' is a gated dataset on the Hub. Visit the page to ask for access."
    cause = ValueError("401 Client Error.\nlong")
    for error, what in [
        (
            errors.DatasetNotFoundError(gated),
            "is a gated dataset on the Hub. Visit the page to ask for access); check the",
        ),
        (
            ConnectionError("Couldn't reach 'a/b' on the Hub"),
            "on the Hub); connect, or give parquet files that lie here",
        ),
        (
            ValueError("Config name is missing.\nPick one of ['x', 'y']"),
            "missing. Pick one of ['x', 'y']); give hf: and",
        ),
        (
            KeyError(),
            "(KeyError); give hf: and a parquet file, a folder of them, or OWNER/NAME[:CONFIGURATION] of the hub",
        ),
    ]:
        error.__cause__ = cause
        monkeypatch.setattr(datasets, "load_dataset", raising(error))
        assert what in the_error("hf:a/b")


def test_a_split_without_rows_gets_one_line(monkeypatch):
    table = datasets.Dataset.from_dict(dict(image=[], label=[]), features=features("image", "label"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *words, **more: dict(train=table, test=table))
    assert the_error("hf:a/b") == "hf:a/b/train: holds no rows; give another --split of train, test"


def test_a_set_of_the_hub_is_asked_for_by_name_and_configuration(tmp_path, monkeypatch):
    asked, load = [], datasets.load_dataset
    local = write(tmp_path / "here").removeprefix("hf:")
    monkeypatch.setattr(datasets, "load_dataset", lambda *words, **more: asked.append((words, more)) or load(local))
    assert image_sets.open_set("hf:owner/set:160px", tmp_path).name == "hf:owner/set:160px"
    image_sets.open_set("hf:owner/set")
    assert asked == [
        (("owner/set", "160px"), dict(cache_dir=str(tmp_path))),
        (("owner/set", None), dict(cache_dir=None)),
    ]


def test_without_the_library_a_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    assert 'needs the datasets library, which is not installed; pip install ".[hub]"' in the_error("hf:a/b")
