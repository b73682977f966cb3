"""The cache: when it is made, read, refused and made again, and what a failure leaves."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from made_images import caches, make_folder, pixels, save, the_error
from PIL import Image

from inputs import image_cache, image_files, image_sets


def opened_without_decoding(monkeypatch, *args, **kwargs):
    with monkeypatch.context() as patch:
        patch.setattr(image_files, "decode", lambda *path: pytest.fail(f"decoded {path}"))
        return image_sets.open_set(*args, **kwargs)


def test_second_start_reads_the_cache(tmp_path, cache, monkeypatch):
    make_folder(tmp_path / "set")
    first = image_sets.open_set(str(tmp_path / "set"))
    second = opened_without_decoding(monkeypatch, str(tmp_path / "set"))
    assert torch.equal(first.images(torch.arange(4)), second.images(torch.arange(4)))
    assert torch.equal(first.labels, second.labels) and len(caches(cache)) == 1
    second.pixels.flat[:] = 0  # a mapped set may be written to; the file must not change
    assert torch.equal(
        image_sets.open_set(str(tmp_path / "set")).images(torch.arange(4)), first.images(torch.arange(4))
    )
    monkeypatch.setattr(image_cache, "FORMAT", b"another version's\n")  # which leaves this one's files alone
    image_sets.open_set(str(tmp_path / "set"))
    assert len(caches(cache)) == 2


def test_pixels_are_mapped_so_that_a_machine_s_processes_share_them(tmp_path, cache):
    """No page of them has been touched yet, so that what is written into the file shows."""
    make_folder(tmp_path / "set")
    opened = image_sets.open_set(str(tmp_path / "set"))
    (path,) = cache.iterdir()
    at = path.read_bytes().index(pixels(0).transpose(2, 0, 1).tobytes())
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(b"\7")
    assert pixels(0)[0, 0, 0] != 7 == opened.images(torch.tensor([0]))[0, 0, 0, 0]


def change_pixels(path):
    stamp = path.stat().st_mtime_ns
    Image.fromarray(255 - pixels(0)).save(path)
    os.utime(path, ns=(stamp, stamp + 1))


def change_size(path):
    """At the same moment, as on a disk whose clock is coarse."""
    stamp = path.stat().st_mtime_ns
    Image.fromarray(np.zeros_like(pixels(0))).save(path)
    os.utime(path, ns=(stamp, stamp))


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: change_pixels(folder / "cat" / "000.png"),
        lambda folder: change_size(folder / "cat" / "000.png"),
        lambda folder: os.rename(folder / "cat" / "000.png", folder / "cat" / "new.png"),
        lambda folder: os.unlink(folder / "cat" / "000.png"),
        lambda folder: save(folder / "dog" / "new.png"),
    ],
)
def test_a_changed_file_makes_a_new_cache(tmp_path, cache, change):
    make_folder(tmp_path / "set", n=4)
    image_sets.open_set(str(tmp_path / "set"))
    change(tmp_path / "set")
    opened = image_sets.open_set(str(tmp_path / "set"))
    assert len(caches(cache)) == 2
    paths = [path for of_class in image_files.class_folders(tmp_path / "set", "train")[1] for path in of_class]
    expected = torch.stack([image_files.decode(tmp_path / "set" / path) for path in paths])
    assert torch.equal(opened.images(torch.arange(len(opened))), expected)


def flip(content, at):
    content = bytearray(content)
    content[at] ^= 4
    return bytes(content)


DAMAGES = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "last byte gone": lambda content: content[:-1],
    "flipped in the pixels": lambda content: flip(content, content.index(pixels(0).transpose(2, 0, 1).tobytes())),
    "grown at the front": lambda content: b"\0" + content,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_said_and_made_again(tmp_path, cache, capsys, monkeypatch, damage):
    make_folder(tmp_path / "set")
    expected = image_sets.open_set(str(tmp_path / "set")).images(torch.arange(4))
    (path,) = cache.iterdir()
    sound = path.read_bytes()
    path.write_bytes(DAMAGES[damage](sound))
    capsys.readouterr()
    assert torch.equal(image_sets.open_set(str(tmp_path / "set")).images(torch.arange(4)), expected)
    assert capsys.readouterr().err.startswith(f"{path}: the cache is damaged; making it again")
    assert path.read_bytes() == sound
    opened_without_decoding(monkeypatch, str(tmp_path / "set"))


def test_failed_writing_leaves_nothing(tmp_path, cache, monkeypatch):
    make_folder(tmp_path / "set")

    def full_disk(descriptor):
        assert len(caches(cache)) == 1 and caches(cache)[0].endswith(".tmp")  # not under its name before it is whole
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    line = the_error(str(tmp_path / "set"))
    assert line.startswith(f"{cache}/set-train-") and "cannot be written (No space left on device); make room" in line
    assert caches(cache) == []


def test_interrupted_decoding_leaves_nothing(tmp_path, cache, monkeypatch):
    make_folder(tmp_path / "set")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(image_files, "decode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        image_sets.open_set(str(tmp_path / "set"))
    assert caches(cache) == []


def test_cache_folder(monkeypatch):
    assert image_cache.cache_folder() == Path(os.environ["MINMIM_CACHE"])
    monkeypatch.delenv("MINMIM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert image_cache.cache_folder() == Path("/somewhere/minmim")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert image_cache.cache_folder() == Path.home() / ".cache" / "minmim"
