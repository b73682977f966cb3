"""Image sets: what is listed, decoded, cached, streamed and downloaded, and the line that each bad input gets.

Every test builds its own folders, archives and servers below a temporary folder.
"""

import contextlib
import http.server
import io
import os
import pickle
import stat
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torchvision.datasets.cifar
from PIL import Image

from inputs import download, image_sets
from runtime.errors import InputError

ROOT = Path(image_sets.__file__).parent.parent


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("home") / "cache"  # not there yet
    monkeypatch.setenv("MINMIM_CACHE", str(folder))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return folder


def pixels(seed, h=6, w=8):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


def save(path, seed=0, **size):
    """Write a random image; its pixels come back from the file exactly, if its name asks for a lossless format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed, **size)).save(path)
    return path


def as_tensor(array):
    return torch.tensor(array).permute(2, 0, 1)


def make_folder(root, classes=("cat", "dog"), n=3, **size):
    for c, name in enumerate(classes):
        for i in range(n):
            save(root / name / f"{i:03}.png", seed=100 * c + i, **size)
    return root


def caches(cache):
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


def the_error(*args, **kwargs):
    """The one line that opening a set raises."""
    with pytest.raises(InputError) as caught:
        image_sets.open_set(*args, **kwargs)
    line = str(caught.value)
    assert "\n" not in line
    return line


# ---------------------------------------------------------------------------------------------------------- decoding


def encoded(image, path, **options):
    image.save(path, **options)
    return path


def test_decode_gives_the_pixels_of_every_mode(tmp_path):
    rgb = pixels(0)
    picture = Image.fromarray(rgb)
    grey = np.asarray(picture.convert("L"))
    palette = picture.quantize(16)
    for name, image, expected in [
        ("rgb.png", picture, rgb),
        ("rgb.bmp", picture, rgb),
        ("rgba.png", picture.convert("RGBA"), rgb),
        ("grey.png", picture.convert("L"), np.stack([grey] * 3, axis=2)),
        ("palette.png", palette, np.asarray(palette.convert("RGB"))),
    ]:
        decoded = image_sets.decode(encoded(image, tmp_path / name))
        assert decoded.dtype == torch.uint8 and torch.equal(decoded, as_tensor(expected)), name
    decoded = image_sets.decode(encoded(picture, tmp_path / "lossless.webp", lossless=True))
    assert torch.equal(decoded, as_tensor(rgb))


def test_decode_lossy_modes(tmp_path):
    across, down = np.meshgrid(np.arange(0, 256, 8), np.arange(0, 256, 8))
    ramp = np.stack([across, down, np.full((32, 32), 99)], axis=2)
    picture = Image.fromarray(ramp.astype(np.uint8))
    for mode in ("RGB", "CMYK", "L"):
        decoded = image_sets.decode(encoded(picture.convert(mode), tmp_path / f"{mode}.JPEG", quality=95)).float()
        expected = as_tensor(np.asarray(picture.convert(mode).convert("RGB"))).float()
        assert decoded.shape == (3, 32, 32) and (decoded - expected).abs().mean() < 3, mode


@pytest.mark.parametrize("format", ["PNG", "TIFF"])  # torchvision reads the first, only Pillow the second
def test_decode_scales_16_bits(tmp_path, format):
    grey = np.array([[0, 257, 300], [32896, 65534, 65535]], dtype=np.uint16)
    decoded = image_sets.decode(encoded(Image.fromarray(grey), tmp_path / "deep.png", format=format))
    assert decoded.tolist() == [[[0, 1, 1], [128, 254, 255]]] * 3


def test_decode_takes_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    frames[0].save(tmp_path / "moving.jpg", format="GIF", save_all=True, append_images=frames[1:])
    assert image_sets.decode(tmp_path / "moving.jpg")[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("content", [b"", b"not an image", "cut"])
def test_decode_names_what_does_not_decode(tmp_path, content):
    whole = save(tmp_path / "a b é.png", h=32, w=32).read_bytes()
    (tmp_path / "a b é.png").write_bytes(whole[: len(whole) // 2] if content == "cut" else content)
    with pytest.raises(InputError, match=r"a b é\.png: does not decode .*--skip-bad-images$"):
        image_sets.decode(tmp_path / "a b é.png")


# ------------------------------------------------------------------------------------------------------ class folders


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
    classes, (one, two) = image_sets.class_folders(tmp_path, "train")
    every = image_sets.image_files(tmp_path, tmp_path / "class one")
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


# --------------------------------------------------------------------------------------------------------- bad images


def spoil(path):
    path.write_bytes(path.read_bytes()[:40])


def test_bad_image_is_named_or_skipped_and_counted(tmp_path, cache, capsys):
    make_folder(tmp_path / "set", n=4)
    spoil(tmp_path / "set" / "cat" / "002.png")
    spoil(tmp_path / "set" / "dog" / "000.png")
    bad = f"{tmp_path}/set/cat/002.png: does not decode"
    assert the_error(str(tmp_path / "set")).startswith(bad)
    assert caches(cache) == []  # neither a cache nor a temporary file
    capsys.readouterr()
    for _ in range(2):  # decoded, then from the cache
        opened = image_sets.open_set(str(tmp_path / "set"), skip_bad_images=True)
        assert opened.labels.tolist() == [0, 0, 1, 1]
        expected = torch.stack([as_tensor(pixels(seed)) for seed in (0, 3, 102, 103)])
        assert torch.equal(opened.images(torch.arange(4)), expected)
        lines = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
        assert lines == ["set: 2 images that do not decode are left out, cat/002.png the first"]
    assert the_error(str(tmp_path / "set")).startswith(bad)  # though a cache without them is there


def test_nothing_but_bad_images(tmp_path, cache):
    make_folder(tmp_path / "set", ("one",), n=1)
    spoil(tmp_path / "set" / "one" / "000.png")
    assert "nor does any other image" in the_error(str(tmp_path / "set"), skip_bad_images=True)
    assert caches(cache) == []


def test_missing_file_behind_a_link(tmp_path):
    make_folder(tmp_path / "set", ("one",))
    (tmp_path / "set" / "one" / "link.png").symlink_to(tmp_path / "gone.png")
    assert "link.png: cannot be read (No such file" in the_error(str(tmp_path / "set"))


# -------------------------------------------------------------------------------------------------------------- cache


def opened_without_decoding(monkeypatch, *args, **kwargs):
    with monkeypatch.context() as patch:
        patch.setattr(image_sets, "decode", lambda path: pytest.fail(f"decoded {path}"))
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
    paths = [path for of_class in image_sets.class_folders(tmp_path / "set", "train")[1] for path in of_class]
    expected = torch.stack([image_sets.decode(tmp_path / "set" / path) for path in paths])
    assert torch.equal(opened.images(torch.arange(len(opened))), expected)


def flip(content, at):
    content = bytearray(content)
    content[at] ^= 4
    return bytes(content)


DAMAGES = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "last byte gone": lambda content: content[:-1],
    "flipped in the pixels": lambda content: flip(content, 100),
    "flipped in the index": lambda content: flip(content, len(content) - 100),
    "flipped in the tail": lambda content: flip(content, len(content) - 20),
    "grown at the front": lambda content: b"\0" + content,
    "of another set": lambda content: content.replace(b'"key": "', b'"key": "0'),
    "another format": lambda content: content[:-2] + b"0\n",
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
    assert capsys.readouterr().err.startswith(f"{path}: the cache is damaged (")
    assert path.read_bytes() == sound
    opened_without_decoding(monkeypatch, str(tmp_path / "set"))


def test_a_sound_cache_of_another_set_is_refused(tmp_path, cache):
    """Index and checksums agree, but the key is not the one asked for."""
    chunk = (torch.zeros(12, dtype=torch.uint8), torch.tensor([[2, 2]]), torch.tensor([0]), [])
    image_sets.write_cache(cache / "a.cache", "this key", [chunk])
    assert len(image_sets.read_cache(cache / "a.cache", "this key")[0]) == 1
    with pytest.raises(ValueError, match="belongs to other images"):
        image_sets.read_cache(cache / "a.cache", "that key")


def test_failed_writing_leaves_nothing(tmp_path, cache, monkeypatch):
    make_folder(tmp_path / "set")

    def full_disk(descriptor):
        assert len(caches(cache)) == 1 and caches(cache)[0].endswith(".part")  # not under its name before it is whole
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    line = the_error(str(tmp_path / "set"))
    assert line.startswith(f"{cache}/set-train-") and "cannot be written (No space left on device); make room" in line
    assert caches(cache) == []


def test_interrupted_decoding_leaves_nothing(tmp_path, cache, monkeypatch):
    make_folder(tmp_path / "set")

    def interrupt(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(image_sets, "decode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        image_sets.open_set(str(tmp_path / "set"))
    assert caches(cache) == []


def test_cache_folder(monkeypatch):
    assert image_sets.cache_folder() == Path(os.environ["MINMIM_CACHE"])
    monkeypatch.delenv("MINMIM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert image_sets.cache_folder() == Path("/somewhere/minmim")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert image_sets.cache_folder() == Path.home() / ".cache" / "minmim"


# -------------------------------------------------------------------------------------- memory, streaming, subsets


def open_both(folder, monkeypatch, **options):
    resident = image_sets.open_set(str(folder), **options)
    monkeypatch.setattr(image_sets, "RESIDENT_LIMIT", 0)
    streamed = image_sets.open_set(str(folder), **options)
    assert resident.resident and not streamed.resident
    return resident, streamed


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


@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_equals_resident_in_the_order_asked_for(tmp_path, monkeypatch, workers):
    for c, name in enumerate(("cat", "dog")):
        for i in range(60):
            save(tmp_path / name / f"{i:03}.png", seed=100 * c + i, h=3 + i % 5, w=4 + i % 3)
    resident, streamed = open_both(tmp_path, monkeypatch)
    n = len(resident)
    orders = [*torch.randperm(n).split(70), torch.randperm(n)[: image_sets.CHUNK], torch.tensor([5])]
    for part in (orders, orders[2:]):  # a whole epoch, and one that starts in its middle
        state = torch.get_rng_state()
        got = list(streamed.batches(iter(part), workers=workers))
        assert torch.equal(torch.get_rng_state(), state)  # reading draws nothing
        for (a, i), (b, j), order in zip(got, resident.batches(part), part, strict=True):
            assert torch.equal(i, order) and torch.equal(j, order) and len(a) == len(b) == len(order)
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    one, other = (s.images(torch.tensor([9, 3])) for s in (resident, streamed))
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def test_only_a_sample_is_measured_and_imagenet_always_streams(tmp_path, monkeypatch):
    make_folder(tmp_path / "train", n=100, h=4, w=5)
    make_folder(tmp_path / "val", n=1)
    files = image_sets.Files(tmp_path, [f"train/cat/{i:03}.png" for i in range(100)])
    assert image_sets.decoded_bytes(files, sample=7) == 100 * 3 * 4 * 5
    spoil(tmp_path / "train" / "cat" / "000.png")
    (tmp_path / "train" / "cat" / "000.png").write_bytes(b"")
    assert image_sets.decoded_bytes(files) == 100 * 3 * 4 * 5  # what has no header does not count
    monkeypatch.setattr(Image, "open", lambda path: pytest.fail("measured"))
    assert not image_sets.open_set("imagenet", tmp_path).resident


@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_replaces_bad_images_or_names_them(tmp_path, monkeypatch, capsys, workers):
    make_folder(tmp_path, n=6)  # 5 of each class are in train: 0, 2, 3, 4, 5
    for name in ("002", "003"):
        spoil(tmp_path / "cat" / f"{name}.png")
    spoil(tmp_path / "dog" / "005.png")
    monkeypatch.setattr(image_sets, "RESIDENT_LIMIT", 0)
    with pytest.raises(InputError) as caught:
        list(image_sets.open_set(str(tmp_path)).batches([torch.arange(10)], workers=workers))
    assert str(caught.value).startswith(f"{tmp_path}/cat/002.png: does not decode")
    assert "\n" not in str(caught.value)
    opened = image_sets.open_set(str(tmp_path), skip_bad_images=True)
    capsys.readouterr()
    for said in (f"{opened.name}: 3 images so far do not decode; others stood in for them\n", ""):
        ((images, index),) = opened.batches([torch.arange(10)], workers=workers)
        assert index.tolist() == [0, 3, 3, 3, 4, 5, 6, 7, 8, 0]  # the last is followed by the first
        seeds = [0, 4, 4, 4, 5, 100, 102, 103, 104, 0]
        assert all(torch.equal(a, as_tensor(pixels(b))) for a, b in zip(images, seeds, strict=True))
        assert capsys.readouterr().err == said  # once, not again in the next epoch


def test_streaming_nothing_but_bad_images(tmp_path, monkeypatch):
    make_folder(tmp_path, ("one",), n=1)
    spoil(tmp_path / "one" / "000.png")
    monkeypatch.setattr(image_sets, "RESIDENT_LIMIT", -1)
    opened = image_sets.open_set(str(tmp_path), skip_bad_images=True)
    with pytest.raises(InputError, match="no image decodes"):
        opened.images(torch.tensor([0]))


STREAM = """
import multiprocessing, subprocess, sys, torch
from inputs import image_sets
image_sets.RESIDENT_LIMIT = 0
opened = image_sets.open_set(sys.argv[1])
orders = torch.arange(len(opened)).repeat(20).split(64)
for leave in (False, True):
    batches = opened.batches(orders, workers=2)
    seen = len(next(batches)[1])
    workers = [str(process.pid) for process in multiprocessing.active_children()]
    assert len(workers) == 2
    for name in ("-INT", "-TERM"):  # from a third process, as a terminal or a cluster would
        subprocess.run(["kill", name, *workers], check=True)
    seen += 0 if leave else sum(len(index) for _, index in batches)
    print(*workers if leave else [seen], flush=True)
if sys.argv[2] == "pause":
    multiprocessing.Event().wait()
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["exit", "pause"])
def test_workers_leave_signals_to_the_parent(tmp_path, end):
    """They outlive Ctrl-C and SIGTERM, and end with their parent in the middle of an epoch, quietly or by SIGKILL."""
    make_folder(tmp_path, n=40)
    command = [sys.executable, "-c", STREAM, str(tmp_path), end]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as run:
        assert run.stdout.readline() == "1440\n"  # 20 times the 72 images of the train split
        workers = run.stdout.readline().split()
        if end == "exit":
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.wait(timeout=60)
        run.kill()  # which does nothing to what has ended
        assert (run.wait(), run.stderr.read()) == (0 if end == "exit" else -9, "")
    assert len(workers) == 2
    for _ in range(150):  # an orphan looks for its parent every five seconds
        if not any(Path(f"/proc/{pid}").exists() for pid in workers):
            return
        time.sleep(0.1)
    pytest.fail("workers outlived their parent")


def test_to_moves_a_resident_set(tmp_path, monkeypatch):
    make_folder(tmp_path)
    resident, streamed = open_both(tmp_path, monkeypatch)
    assert resident.to("meta") is resident and resident.images(torch.tensor([0]), "meta").device.type == "meta"
    assert streamed.to("meta") is streamed and not streamed.resident


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


# ------------------------------------------------------------------------------------------------------- official sets

WNIDS = ("n02", "n01", "n03")  # the order of wnids.txt is not the sorted one


def make_tiny(root):
    """A Tiny-ImageNet of three classes, two training images and one for validation each."""
    for c, wnid in enumerate(WNIDS):
        for i in range(2):
            image = Image.fromarray(pixels(10 * c + i))
            path = root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            (image.convert("L") if i else image).save(path, format="PNG")  # lossless, whatever the name says
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("boxes")
    rows = []
    for i, wnid in enumerate(("n03", "n02", "n01")):
        path = root / "val" / "images" / f"val_{i}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(50 + i)).save(path, format="PNG")
        rows.append(f"val_{i}.JPEG\t{wnid}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(rows))
    (root / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    (root / "words.txt").write_text("n00\tentity\nn01\tgoldfish, Carassius auratus\nn02\tcat\nn03\treel\n")
    return root


@pytest.mark.parametrize("parent", [False, True])
def test_tiny_imagenet(tmp_path, parent):
    folder = make_tiny(tmp_path / "tiny-imagenet-200")
    train, val = (
        image_sets.open_set("tiny-imagenet", tmp_path if parent else folder, split) for split in ("train", "val")
    )
    assert train.classes == val.classes == ["cat", "goldfish, Carassius auratus", "reel"]
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
    assert f"{image_sets.cache_folder()}: no tiny-imagenet-200/ there" in the_error("tiny-imagenet")
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


def test_class_order_keeps_the_order_within_a_class():
    labels = np.random.default_rng(0).integers(0, 3, 1000)
    flat, sizes, ordered = image_sets.in_class_order(np.arange(3000).reshape(1000, 3, 1, 1), labels)
    expected = [i for c in range(3) for i in range(1000) if labels[i] == c]
    assert (flat[::3] // 3).tolist() == expected and ordered.tolist() == sorted(labels)
    assert sizes.tolist() == [[1, 1]] * 1000


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


# ------------------------------------------------------------------------------------------------------------ download


class Server:
    """Serves `content`; the i-th answer breaks off after `breaks[i]` bytes. `seen` holds the Range of each request."""

    def __init__(self, content, breaks=(), ranges=True):
        served, breaks = self, list(breaks)
        self.content, self.seen = content, []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked = self.headers["Range"]
                served.seen.append(asked)
                if served.content is None:
                    return self.send_error(404)
                start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and ranges else 0
                if asked and start >= len(served.content):
                    return self.send_error(416)
                body = served.content[start:]
                self.send_response(206 if asked and ranges else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: breaks.pop(0) if breaks else None])

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/tiny-imagenet-200.zip"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def md5(content):
    return image_sets.hashlib.md5(content).hexdigest()


CONTENT = np.random.default_rng(1).bytes(200_000)


def test_fetch_shows_a_bar(tmp_path, capsys):
    with Server(CONTENT) as server:
        download.fetch(server.url, tmp_path / "new" / "file", md5(CONTENT))
    assert (tmp_path / "new" / "file").read_bytes() == CONTENT and server.seen == [None]
    assert "downloading: 100%" in capsys.readouterr().err


def test_fetch_resumes_a_broken_transfer(tmp_path):
    with Server(CONTENT, breaks=[70_000, 50_000]) as server:
        download.fetch(server.url, tmp_path / "file", md5(CONTENT))
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.seen == [None, "bytes=70000-", "bytes=120000-"]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_fetch_goes_on_in_a_later_run(tmp_path):
    with Server(CONTENT, breaks=[9_000] * 2) as server:
        with pytest.raises(InputError, match=r"download failed \(the transfer breaks off\); the same command goes on"):
            download.fetch(server.url, tmp_path / "file", md5(CONTENT), tries=2)
        assert (tmp_path / "file.part").read_bytes() == CONTENT[:18_000] and not (tmp_path / "file").exists()
        download.fetch(server.url, tmp_path / "file", md5(CONTENT))
    assert (tmp_path / "file").read_bytes() == CONTENT and server.seen[-1] == "bytes=18000-"


def test_fetch_starts_over_where_ranges_are_not_served(tmp_path):
    with Server(CONTENT, breaks=[70_000], ranges=False) as server:
        download.fetch(server.url, tmp_path / "file", md5(CONTENT))
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_fetch_of_a_part_that_is_whole(tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT)
    with Server(CONTENT) as server:
        download.fetch(server.url, tmp_path / "file", md5(CONTENT))
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_fetch_refuses_a_wrong_checksum(tmp_path):
    with (
        Server(CONTENT) as server,
        pytest.raises(InputError, match=rf"^{server.url}: md5 is {md5(CONTENT)}, should be 0+; removed"),
    ):
        download.fetch(server.url, tmp_path / "file", "0" * 32)
    assert list(tmp_path.iterdir()) == []


def test_fetch_of_nothing(tmp_path):
    with Server(None) as server, pytest.raises(InputError, match=r"download failed \(HTTP Error 404: Not Found\)"):
        download.fetch(server.url, tmp_path / "file", md5(CONTENT))
    with pytest.raises(InputError, match=r"download failed .*refused"):  # the server is gone
        download.fetch(server.url, tmp_path / "file", md5(CONTENT))


def zipped(*members):
    """A zip of (name or ZipInfo, content) members."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in members:
            archive.writestr(name, text)
    return content.getvalue()


def serve_tiny(tmp_path, monkeypatch):
    source = make_tiny(tmp_path / "source")
    files = [path for path in sorted(source.rglob("*")) if path.is_file()]
    content = zipped(*[(f"tiny-imagenet-200/{path.relative_to(source)}", path.read_bytes()) for path in files])
    server = Server(content, breaks=[500])
    monkeypatch.setattr(image_sets, "TINY_URL", server.url)
    monkeypatch.setattr(image_sets, "TINY_MD5", md5(content))
    return server


def test_tiny_imagenet_download(tmp_path, monkeypatch):
    with serve_tiny(tmp_path, monkeypatch) as server:
        opened = image_sets.open_set("tiny-imagenet", tmp_path / "to", download=True)
        again = image_sets.open_set("tiny-imagenet", tmp_path / "to", download=True)
        assert server.seen == [None, "bytes=500-"]  # what is there is not fetched again
    assert len(opened) == 6 and torch.equal(opened.images(torch.arange(6)), again.images(torch.arange(6)))
    assert os.listdir(tmp_path / "to") == ["tiny-imagenet-200"]


def link(name):
    member = zipfile.ZipInfo(name)
    member.create_system, member.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return member


@pytest.mark.parametrize("name", ["../outside", "set/../../outside", "/tmp/outside", link("set/link")])
def test_unpack_refuses_links_and_members_outside(tmp_path, name):
    (tmp_path / "box").mkdir()
    archive = tmp_path / "box" / "a.zip"
    archive.write_bytes(zipped(("set/fine", "1"), (name, "/etc/passwd")))
    with pytest.raises(
        InputError, match=r"a\.zip: member .*(outside|link) is a link or lands outside; nothing unpacked"
    ):
        download.unpack(archive, tmp_path / "box" / "set")
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "box", archive]


def test_unpack_of_damaged_or_other_archives(tmp_path):
    archive = tmp_path / "a.zip"
    whole = zipped(("set/one", "1" * 100), ("set/two", "2" * 100))
    for content in (
        b"no zip",
        whole[: len(whole) // 2],
        whole.replace(b"2" * 100, b"3" * 100),
        zipped(("other/x", "")),
    ):
        archive.write_bytes(content)
        with pytest.raises(InputError, match=r"a\.zip: cannot be unpacked"):
            download.unpack(archive, tmp_path / "set")
        assert list(tmp_path.iterdir()) == [archive]
    archive.write_bytes(whole)
    download.unpack(archive, tmp_path / "set")
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["one", "two"]


# --------------------------------------------------------------------------------------------------------------- ranks


def open_on_rank(rank, folder, meeting, out):
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    decoded, plain = [], image_sets.decode
    image_sets.decode = lambda path: decoded.append(path) or plain(path)
    sys.stderr = io.StringIO()
    try:
        image_sets.open_set(str(folder))
    except InputError as error:
        line = str(error)
    opened = image_sets.open_set(str(folder), skip_bad_images=True)  # the error has left the ranks fit to go on
    result = [line, len(opened), opened.images(torch.arange(len(opened))).sum().item()]
    out.put((rank, result, len(decoded) > 0, sys.stderr.getvalue().count("left out")))


def test_one_rank_builds_the_cache_and_its_error_reaches_all(tmp_path, cache):
    make_folder(tmp_path / "set", n=5)
    spoil(tmp_path / "set" / "cat" / "003.png")
    context = torch.multiprocessing.get_context("spawn")
    out = context.Queue()
    ranks = [context.Process(target=open_on_rank, args=(i, tmp_path / "set", tmp_path / "meet", out)) for i in (0, 1)]
    for process in ranks:
        process.start()
    (_, first, worked, said), (_, second, worked_too, said_too) = sorted(out.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join()
    assert "cat/003.png: does not decode" in first[0]
    assert first[1:] == [7, sum(int(pixels(seed).sum()) for seed in (0, 2, 4, 100, 102, 103, 104))]
    assert first == second and (worked, worked_too) == (True, False) and (said, said_too) == (1, 0)
    assert len(caches(cache)) == 1


@pytest.mark.parametrize("shared", [True, False])
def test_turns_of_several_nodes(monkeypatch, shared):
    """Four ranks on two nodes, simulated by threads: who works when, whether or not the nodes share a disk."""
    ranks, local = 4, [0, 1, 0, 1]
    me, barrier, slots = threading.local(), threading.Barrier(ranks), [None] * ranks

    def gather(into, value, group):
        slots[me.rank] = value
        barrier.wait()
        into[:] = slots
        barrier.wait()

    monkeypatch.setattr(image_sets.common, "world_size", lambda: ranks)
    monkeypatch.setattr(image_sets.common, "rank", lambda: me.rank)
    monkeypatch.setattr(image_sets, "first_on_node", lambda: local[me.rank] == 0)
    monkeypatch.setattr(image_sets.dist, "new_group", lambda **_: None)
    monkeypatch.setattr(image_sets.dist, "destroy_process_group", lambda _: None)
    monkeypatch.setattr(image_sets.dist, "all_gather_object", gather)
    disks, built, results = [set(), set()], [], [None] * ranks

    def work():
        disk = disks[0 if shared else me.rank // 2]
        if "set" not in disk:
            built.append(me.rank)
            disk.add("set")
        return me.rank

    def run(rank):
        me.rank = rank
        results[rank] = image_sets.in_turn(work)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert built == ([0] if shared else [0, 2]) and results == [0, 1, 2, 3]


def test_first_on_node(monkeypatch):
    assert image_sets.first_on_node()
    monkeypatch.setattr(image_sets.common, "rank", lambda: 3)
    assert not image_sets.first_on_node()
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert image_sets.first_on_node()
