"""Folders of small random images, and what the tests of image sets ask of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from inputs import image_sets
from runtime.errors import InputError

ROOT = Path(image_sets.__file__).parent.parent


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


def spoil(path):
    path.write_bytes(path.read_bytes()[:40])


def open_both(folder, monkeypatch, **options):
    resident = image_sets.open_set(str(folder), **options)
    monkeypatch.setattr(image_sets, "RESIDENT_LIMIT", 0)
    streamed = image_sets.open_set(str(folder), **options)
    assert resident.resident and not streamed.resident
    return resident, streamed


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
    (root / "words.txt").write_text("n00\tentity\nn01\tgoldfish, Carassius auratus\nn02\ttabby\nn03\treel\n")
    return root
