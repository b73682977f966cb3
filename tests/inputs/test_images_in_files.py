"""Images in their files: every mode decodes to its pixels, workers read ahead in order, what is damaged is named."""

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from made_images import ROOT, as_tensor, make_folder, open_both, pixels, save, spoil
from PIL import Image

from inputs import (
    image_sets,
    images_in_files,
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
        decoded = images_in_files.decode(encoded(image, tmp_path / name))
        assert decoded.dtype == torch.uint8 and torch.equal(decoded, as_tensor(expected)), name
    decoded = images_in_files.decode(encoded(picture, tmp_path / "lossless.webp", lossless=True))
    assert torch.equal(decoded, as_tensor(rgb))


def test_decode_lossy_modes(tmp_path):
    across, down = np.meshgrid(np.arange(0, 256, 8), np.arange(0, 256, 8))
    ramp = np.stack([across, down, np.full((32, 32), 99)], axis=2)
    picture = Image.fromarray(ramp.astype(np.uint8))
    for mode in ("RGB", "CMYK", "L"):
        decoded = images_in_files.decode(encoded(picture.convert(mode), tmp_path / f"{mode}.JPEG", quality=95)).float()
        expected = as_tensor(np.asarray(picture.convert(mode).convert("RGB"))).float()
        assert decoded.shape == (3, 32, 32) and (decoded - expected).abs().mean() < 3, mode


@pytest.mark.parametrize("format", ["PNG", "TIFF"])  # torchvision reads the first, only Pillow the second
def test_decode_scales_16_bits(tmp_path, format):
    grey = np.array([[0, 257, 300], [32896, 65534, 65535]], dtype=np.uint16)
    decoded = images_in_files.decode(encoded(Image.fromarray(grey), tmp_path / "deep.png", format=format))
    assert decoded.tolist() == [[[0, 1, 1], [128, 254, 255]]] * 3


def test_decode_takes_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    frames[0].save(tmp_path / "moving.jpg", format="GIF", save_all=True, append_images=frames[1:])
    assert images_in_files.decode(tmp_path / "moving.jpg")[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("content", [b"", b"not an image", "cut"])
def test_decode_names_what_does_not_decode(tmp_path, content):
    whole = save(tmp_path / "a b é.png", h=32, w=32).read_bytes()
    (tmp_path / "a b é.png").write_bytes(whole[: len(whole) // 2] if content == "cut" else content)
    with pytest.raises(InputError, match=r"a b é\.png: does not decode .*--skip-bad-images$"):
        images_in_files.decode(tmp_path / "a b é.png")


@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_equals_resident_in_the_order_asked_for(tmp_path, monkeypatch, workers):
    for c, name in enumerate(("cat", "dog")):
        for i in range(60):
            save(tmp_path / name / f"{i:03}.png", seed=100 * c + i, h=3 + i % 5, w=4 + i % 3)
    resident, streamed = open_both(tmp_path, monkeypatch)
    n = len(resident)
    orders = [*torch.randperm(n).split(70), torch.randperm(n)[: images_in_files.CHUNK], torch.tensor([5])]
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
