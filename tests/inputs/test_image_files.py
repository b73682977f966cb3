"""Images in their files: every mode decodes to its pixels, workers read ahead in order, what is damaged is named."""

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from forked_programs import FORKS, server
from made_images import ROOT, as_tensor, caches, make_folder, open_both, pixels, save, spoil, the_error
from PIL import Image

from inputs import (
    image_files,
    image_sets,
)
from runtime.errors import InputError


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
        decoded = image_files.decode(encoded(image, tmp_path / name))
        assert decoded.dtype == torch.uint8 and torch.equal(decoded, as_tensor(expected)), name
    decoded = image_files.decode(encoded(picture, tmp_path / "lossless.webp", lossless=True))
    assert torch.equal(decoded, as_tensor(rgb))


def test_decode_lossy_modes(tmp_path):
    across, down = np.meshgrid(np.arange(0, 256, 8), np.arange(0, 256, 8))
    ramp = np.stack([across, down, np.full((32, 32), 99)], axis=2)
    picture = Image.fromarray(ramp.astype(np.uint8))
    for mode in ("RGB", "CMYK", "L"):
        decoded = image_files.decode(encoded(picture.convert(mode), tmp_path / f"{mode}.JPEG", quality=95)).float()
        expected = as_tensor(np.asarray(picture.convert(mode).convert("RGB"))).float()
        assert decoded.shape == (3, 32, 32) and (decoded - expected).abs().mean() < 3, mode


@pytest.mark.parametrize("format", ["PNG", "TIFF"])  # torchvision reads the first, only Pillow the second
def test_decode_scales_16_bits(tmp_path, format):
    grey = np.array([[0, 257, 300], [32896, 65534, 65535]], dtype=np.uint16)
    decoded = image_files.decode(encoded(Image.fromarray(grey), tmp_path / "deep.png", format=format))
    assert decoded.tolist() == [[[0, 1, 1], [128, 254, 255]]] * 3


def test_decode_takes_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    frames[0].save(tmp_path / "moving.jpg", format="GIF", save_all=True, append_images=frames[1:])
    assert image_files.decode(tmp_path / "moving.jpg")[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("content", [b"", b"not an image", "cut"])
def test_decode_names_what_does_not_decode(tmp_path, content):
    whole = save(tmp_path / "a b é.png", h=32, w=32).read_bytes()
    (tmp_path / "a b é.png").write_bytes(whole[: len(whole) // 2] if content == "cut" else content)
    with pytest.raises(InputError, match=r"a b é\.png: does not decode .*--skip-bad-images\)$"):
        image_files.decode(tmp_path / "a b é.png")


@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_equals_resident_in_the_order_asked_for(tmp_path, monkeypatch, workers):
    for c, name in enumerate(("cat", "dog")):
        for i in range(60):
            save(tmp_path / name / f"{i:03}.png", seed=100 * c + i, h=3 + i % 5, w=4 + i % 3)
    resident, streamed = open_both(tmp_path, monkeypatch)
    n = len(resident)
    orders = [*torch.randperm(n).split(70), torch.randperm(n)[: image_files.CHUNK], torch.tensor([5])]
    for part in (orders, orders[2:]):  # a whole epoch, and one that starts in its middle
        state = torch.get_rng_state()
        got = list(streamed.batches(iter(part), workers=workers))
        assert torch.equal(torch.get_rng_state(), state)  # reading draws nothing
        for (a, i), (b, j), order in zip(got, resident.batches(part), part, strict=True):
            assert torch.equal(i, order) and torch.equal(j, order) and len(a) == len(b) == len(order)
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    one, other = (s.images(torch.tensor([9, 3])) for s in (resident, streamed))
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


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
    begun = image_sets.open_set(str(tmp_path), skip_bad_images=True).batches([torch.arange(10)] * 2, workers=workers)
    next(begun)
    begun.close()  # as training does, which asks for as many batches as it has steps
    assert capsys.readouterr().err.endswith(": 3 images so far do not decode; others stood in for them\n")
    for fewer in (opened.first(9), opened.spaced(9)):  # which skip as the whole does
        assert len(fewer.images(torch.arange(9))) == 9


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


def wait_as_a_worker(ready):
    image_files.leave_signals_to_parent(0)
    ready.set()
    time.sleep(60)


@pytest.mark.skipif(not FORKS, reason="a server forks processes on Linux only")
def test_a_worker_obeys_who_asked_for_it_not_the_server_that_forked_it():
    """Python 3.14 forks every worker from a server."""
    ready = server().Event()
    worker = server().Process(target=wait_as_a_worker, args=(ready,))
    worker.start()
    assert ready.wait(60)
    subprocess.run(["kill", str(worker.pid)], check=True)
    worker.join(0.5)
    assert worker.is_alive()
    worker.terminate()
    worker.join(30)
    assert worker.exitcode == 0


# ----------------------------------------------------------------------------------------------------- more than 8 bits


def deep(path, values, dtype=np.uint16):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, dtype=dtype)).save(path)


def scaled(values, low, high):
    exact = np.floor((np.asarray(values, dtype=np.float64) - low) * 255 / (high - low)).clip(0, 255)
    return torch.tensor(exact, dtype=torch.uint8).expand(3, -1, -1)


def make_scan(root, n=12):
    """12-bit values in 16 bits; the lowest of the training images, 100, and the highest, 4090, in different files."""
    draw = np.random.default_rng(0)
    scans = [draw.integers(200, 3000, (4, 5)) for _ in range(n)]
    scans[3][0, 0], scans[5][1, 1], scans[1][0, 0] = 100, 4090, 60_000  # the last is held out
    for i, scan in enumerate(scans):
        deep(root / f"{i:02}.{'tif' if i % 2 else 'png'}", scan)
    return scans


@pytest.mark.parametrize("streams", [False, True])
def test_greys_of_12_bits_are_scaled_by_the_range_of_the_training_images(tmp_path, monkeypatch, cache, streams, capsys):
    scans = make_scan(tmp_path / "set")
    if streams:
        monkeypatch.setattr(image_sets, "RESIDENT_LIMIT", 0)
    for again in (False, True):
        train, val = (image_sets.open_set(str(tmp_path / "set"), split=split) for split in ("train", "val"))
        kept = [i for i in range(12) if i % 10 != 1]
        for image, i in zip(train.images(torch.arange(10)), kept, strict=True):
            assert torch.equal(image, scaled(scans[i], 100, 4090)), i
        for image, i in zip(val.images(torch.arange(2)), (1, 11), strict=True):  # by the training images' range, too
            assert torch.equal(image, scaled(scans[i], 100, 4090)), i
        assert torch.stack(list(train.images(torch.arange(10)))).unique().numel() > 60
        assert torch.equal(train.first(2).images(torch.tensor([1]))[0], scaled(scans[2], 100, 4090))
        assert [name for name in caches(cache) if name.startswith("set-range-")], again
        line = "set: greys from 100, which becomes black, to 4090; --range sets others\n"
        assert capsys.readouterr().err.count(line) == (not again)  # said once
        monkeypatch.setattr(image_files.Files, "extremes", lambda _: pytest.fail("looked for twice"))


def test_a_given_range_is_taken_and_makes_a_cache_of_its_own(tmp_path, monkeypatch, cache):
    scans = make_scan(tmp_path / "set")
    own = image_sets.open_set(str(tmp_path / "set"))
    monkeypatch.setattr(image_files.Files, "extremes", lambda _: pytest.fail("looked for"))
    for low, high in ((0, 65535), (-1000, 3000)):
        given = image_sets.open_set(str(tmp_path / "set"), value_range=[low, high])
        assert torch.equal(given.images(torch.tensor([0]))[0], scaled(scans[0], low, high))
        assert not torch.equal(given.images(torch.tensor([0])), own.images(torch.tensor([0])))
    for wrong in ((5, 5), (6, 5), (0, float("nan")), (float("-inf"), 0)):
        assert "the first must be below the second" in the_error(str(tmp_path / "set"), value_range=wrong)


def test_the_range_is_looked_for_anew_where_an_image_has_changed(tmp_path):
    scans = make_scan(tmp_path / "set")
    image_sets.open_set(str(tmp_path / "set"))
    scans[3][0, 0] = 10
    deep(tmp_path / "set" / "03.tif", scans[3])
    changed = image_sets.open_set(str(tmp_path / "set"))
    assert torch.equal(changed.images(torch.tensor([0]))[0], scaled(scans[0], 10, 4090))


def test_a_damaged_memory_of_the_range_is_found_again(tmp_path, cache):
    make_scan(tmp_path / "set")
    expected = image_sets.open_set(str(tmp_path / "set")).images(torch.arange(10))
    for content in ("", "[1]", "[1, 2, 3]", '["a", "b"]', "null", "{}"):
        (path,) = cache.glob("set-range-*.json")
        path.write_text(content)
        assert torch.equal(image_sets.open_set(str(tmp_path / "set")).images(torch.arange(10)), expected), content


def test_floats_constant_greys_and_bad_images_have_a_range_too(tmp_path):
    deep(tmp_path / "a" / "1.tif", [[-2.0, np.nan], [0.5, 3.0]], np.float32)
    (tmp_path / "a" / "0.tif").write_bytes((tmp_path / "a" / "1.tif").read_bytes())
    files = image_files.Files(tmp_path, ["a/0.tif", "a/1.tif"])
    assert files.extremes() == [-2.0, 3.0] and files.survey() == (2 * 12, True)
    (image,) = image_sets.open_set(str(tmp_path)).images(torch.arange(1))
    assert image[0].tolist() == [[0, 102], [127, 255]]  # what is no number counts as 0
    spoil(tmp_path / "a" / "0.tif")
    assert files.extremes() == [-2.0, 3.0]
    deep(tmp_path / "b" / "1.png", [[7, 7]])
    constant = image_files.Files(tmp_path, ["b/1.png"])
    assert constant.extremes() == [7.0, 8.0]
    save(tmp_path / "c" / "1.png")
    shallow = image_files.Files(tmp_path, ["c/1.png"])
    assert shallow.survey()[1] is False and shallow.extremes() == [0.0, 65535.0]
