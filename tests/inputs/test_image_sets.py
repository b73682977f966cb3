"""Image sets: in memory or streamed, subsets of them, and images that do not decode."""

import os
from types import SimpleNamespace

import pytest
import torch
from made_images import as_tensor, caches, make_folder, open_both, pixels, save, spoil, the_error
from PIL import Image

from inputs import image_files, image_sets
from runtime.errors import InputError
from runtime.ranks import say_once


def test_what_a_command_is_told_of_its_images_reaches_the_set(monkeypatch):
    asked = []
    monkeypatch.setattr(image_sets, "open_set", lambda *words, **more: asked.append((words, more)) or "opened")
    told = dict(download=True, skip_bad_images=True, class_level=2, columns=["a", "b"])
    settings = SimpleNamespace(data="photos", data_root="here", range=[0, 9], split=["x", "y"], classes=None, **told)
    assert image_sets.open_for(settings, "val") == "opened"
    assert asked == [(("photos", "here", "val"), told | dict(value_range=[0, 9], splits=["x", "y"]))]


def test_varied_sizes_come_as_lists(tmp_path):
    make_folder(tmp_path, ("a",), n=1, h=5, w=7)
    make_folder(tmp_path, ("b",), n=1, h=2, w=3)
    make_folder(tmp_path, ("c",), n=1, h=4, w=4)
    opened = image_sets.open_set(str(tmp_path))
    images = opened.images(torch.tensor([2, 0, 1, 0]))
    for image, (h, w) in zip(images, [(4, 4), (5, 7), (2, 3), (5, 7)], strict=True):
        assert torch.equal(image, as_tensor(pixels(0, h, w)))
    one = opened.subset(1)
    assert torch.equal(one.images(torch.tensor([0, 0])), torch.stack([as_tensor(pixels(0, 5, 7))] * 2))


def test_images_of_equal_area_and_different_shape_keep_their_shapes(tmp_path, monkeypatch):
    for i, (h, w) in enumerate(((4, 6), (6, 4), (4, 6), (3, 8))):
        save(tmp_path / "one" / f"{i}.png", seed=i, h=h, w=w)
    for opened in open_both(tmp_path, monkeypatch):  # the second is held out
        images = opened.images(torch.tensor([2, 0, 1]))
        for image, (i, h, w) in zip(images, [(3, 3, 8), (0, 4, 6), (2, 4, 6)], strict=True):
            assert torch.equal(image, as_tensor(pixels(i, h, w)))
    (held_out,) = image_sets.open_set(str(tmp_path), split="val").images(torch.tensor([0]))
    assert held_out.shape == (3, 6, 4)


def test_only_a_sample_is_measured_and_imagenet_always_streams(tmp_path, monkeypatch):
    make_folder(tmp_path / "train", ("cat",), n=50, h=4, w=5)
    make_folder(tmp_path / "train", ("dog",), n=50, h=8, w=5)
    make_folder(tmp_path / "val", n=1)
    paths = [f"train/{name}/{i:03}.png" for name in ("cat", "dog") for i in range(50)]
    files = image_files.Files(tmp_path, paths)
    assert files.survey(sample=6) == (100 * 3 * 6 * 5, False)  # from all over the set
    spoil(tmp_path / "train" / "cat" / "000.png")
    (tmp_path / "train" / "cat" / "000.png").write_bytes(b"")
    assert files.survey(sample=2)[0] == 100 * 3 * 8 * 5  # what has no header does not count
    monkeypatch.setattr(Image, "open", lambda path: pytest.fail("measured"))
    assert not image_sets.open_set("imagenet", tmp_path).resident


def test_to_moves_a_resident_set(tmp_path, monkeypatch):
    make_folder(tmp_path)
    resident, streamed = open_both(tmp_path, monkeypatch)
    assert resident.to("meta") is resident and resident.images(torch.tensor([0]), "meta").device.type == "meta"
    assert streamed.to("meta") is streamed and not streamed.resident


def test_processes_of_a_machine_share_its_cores_among_their_workers(tmp_path, monkeypatch):
    make_folder(tmp_path)
    _, streamed = open_both(tmp_path, monkeypatch)
    asked, stream = [], streamed.pixels.stream
    monkeypatch.setattr(image_sets, "cores", lambda: 6)
    monkeypatch.setattr(streamed.pixels, "stream", lambda orders, n, **how: asked.append(n) or stream(orders, 0, **how))
    for processes in ("1", "2", "8"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        list(streamed.batches([torch.tensor([0])]))
    list(streamed.batches([torch.tensor([0])], workers=5))
    assert asked == [6, 3, 1, 5]


@pytest.mark.parametrize("streams", [False, True])
def test_subset_is_the_first_classes(tmp_path, monkeypatch, streams):
    make_folder(tmp_path, ("a", "b", "c"), n=3)
    if streams:
        monkeypatch.setattr(image_sets, "RESIDENT_LIMIT", 0)
    opened = image_sets.open_set(str(tmp_path))
    two = opened.subset(classes=2)
    assert two.classes == ["a", "b"] and two.labels.tolist() == [0, 0, 1, 1] and len(two) == len(two.pixels) == 4
    assert torch.equal(two.images(torch.tensor([3]))[0], as_tensor(pixels(102)))
    assert len(opened.subset(3)) == len(opened) == 6
    for k in (0, 4):
        with pytest.raises(InputError, match=f"cannot take {k} of its classes; give 1 to 3"):
            opened.subset(k)


@pytest.mark.parametrize("streams", [False, True])
def test_first_images_of_any_size(tmp_path, monkeypatch, streams):
    make_folder(tmp_path, ("a",), n=3, h=5, w=7)
    make_folder(tmp_path, ("b",), n=2)
    if streams:
        monkeypatch.setattr(image_sets, "RESIDENT_LIMIT", 0)
    opened = image_sets.open_set(str(tmp_path))  # two of a, one of b: the second of each is held out
    one, three = opened.first(1), opened.first(3)
    assert len(one) == len(one.pixels) == 1 and one.labels.tolist() == [0] and three.labels.tolist() == [0, 0, 1]
    assert len(opened) == 3 and one.classes == ["a", "b"]  # a label still means what it did
    for image in one.images(torch.tensor([0, 0, 0])):  # as often as it is asked for
        assert torch.equal(image, as_tensor(pixels(0, 5, 7)))
    for k in (0, 4):
        with pytest.raises(InputError, match=f"cannot take {k} of its images; give 1 to 3"):
            opened.first(k)


@pytest.mark.parametrize("streams", [False, True])
def test_spaced_images_are_of_all_classes(tmp_path, monkeypatch, streams):
    make_folder(tmp_path / "train", ("a",), n=3, h=5, w=7)
    make_folder(tmp_path / "train", ("b",), n=2)
    make_folder(tmp_path / "val", ("a", "b"), n=1)
    if streams:
        monkeypatch.setattr(image_sets, "RESIDENT_LIMIT", 0)
    opened = image_sets.open_set(str(tmp_path))
    three = opened.spaced(3)
    assert len(three) == len(three.pixels) == 3 and three.labels.tolist() == [0, 0, 1] and three.classes == ["a", "b"]
    for image, whole in zip(three.images(torch.arange(3)), opened.images(torch.tensor([0, 2, 4])), strict=True):
        assert torch.equal(image, whole)
    assert opened.spaced(9).labels.tolist() == opened.labels.tolist() == [0, 0, 0, 1, 1]


def test_bad_image_is_named_or_skipped_and_counted(tmp_path, cache, capsys):
    make_folder(tmp_path / "set", n=4)
    spoil(tmp_path / "set" / "cat" / "002.png")
    spoil(tmp_path / "set" / "dog" / "000.png")
    bad = f"{tmp_path}/set/cat/002.png: does not decode"
    assert the_error(str(tmp_path / "set")).startswith(bad)
    assert caches(cache) == []  # neither a cache nor a temporary file
    capsys.readouterr()
    for _ in range(2):  # decoded, then from the cache in another process
        say_once.cache_clear()
        opened = image_sets.open_set(str(tmp_path / "set"), skip_bad_images=True)
        assert opened.labels.tolist() == [0, 0, 1, 1]
        expected = torch.stack([as_tensor(pixels(seed)) for seed in (0, 3, 102, 103)])
        assert torch.equal(opened.images(torch.arange(4)), expected)
        lines = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
        assert lines == ["set: 2 images that do not decode are left out, cat/002.png the first"]
    assert the_error(str(tmp_path / "set")).startswith(bad)  # though a cache without them is there


def test_bad_images_of_all_chunks_are_counted(tmp_path, capsys):
    make_folder(tmp_path / "set", n=40)  # 72 in train, of which a worker hands over 32 at once
    spoil(tmp_path / "set" / "cat" / "002.png")
    spoil(tmp_path / "set" / "dog" / "039.png")
    assert len(image_sets.open_set(str(tmp_path / "set"), skip_bad_images=True)) == 70
    assert "set: 2 images that do not decode are left out, cat/002.png the first" in capsys.readouterr().err


def test_the_name_of_a_skipped_image_is_printed_on_one_line(tmp_path, capsys):
    make_folder(tmp_path / "set")
    spoil(save(tmp_path / "set" / "cat" / "00\n\x1b[31m.png"))
    image_sets.open_set(str(tmp_path / "set"), skip_bad_images=True)
    line = "set: 1 images that do not decode are left out, cat/00\\n\\x1b[31m.png the first"
    assert line in capsys.readouterr().err.splitlines()


def test_nothing_but_bad_images(tmp_path, cache):
    make_folder(tmp_path / "set", ("one",), n=1)
    spoil(tmp_path / "set" / "one" / "000.png")
    assert "nor does any other image" in the_error(str(tmp_path / "set"), skip_bad_images=True)
    assert caches(cache) == []


def test_missing_file_behind_a_link(tmp_path):
    make_folder(tmp_path / "set", ("one",))
    (tmp_path / "set" / "one" / "link.png").symlink_to(tmp_path / "gone.png")
    assert "link.png: cannot be read (No such file" in the_error(str(tmp_path / "set"))


def test_bytes_are_those_of_the_mean_area_and_any_change_of_a_file_shows(tmp_path):
    make_folder(tmp_path, n=1, h=4, w=5)
    make_folder(tmp_path / "more", n=1, h=8, w=5)
    paths = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("cat/*.png"))
    files = image_files.Files(tmp_path, paths)
    assert len(files) == 2 and files.survey()[0] == 3 * (20 + 40)
    before = files.fingerprint()
    assert files.fingerprint() == before
    os.utime(tmp_path / paths[0], ns=(0, 1))  # as one of the same length that is written over it
    assert files.fingerprint() != before
