"""The built-in images: what they promise, and that neither colours nor raw pixels give their classes away."""

import hashlib
import math
import time

import numpy as np
import pytest

from inputs import builtin_images


@pytest.fixture(scope="module")
def images():
    """1500 training images, 500 for validation, with the seconds of processor time that they took."""
    start = time.process_time()
    train, val = builtin_images.generate("train", 1500), builtin_images.generate("val", 500)
    return train, val, time.process_time() - start


def neighbours(train, val, k: int = 20) -> float:
    """Per cent of (features, labels) `val` that most of their k most similar ones (cosine) in `train` name rightly."""
    (x, y), (queries, labels) = train, val
    x, queries = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in (x, queries))
    nearest = np.argsort(-(queries @ x.T), axis=1)[:, :k]
    votes = (y[nearest][:, :, None] == np.arange(len(builtin_images.CLASSES))).sum(axis=1)
    return 100 * (votes.argmax(axis=1) == labels).mean()


def test_full_sets_have_the_promised_size_and_balance():
    for split, n in builtin_images.COUNTS.items():
        x, y = builtin_images.generate(split)
        assert x.shape == (n, 3, 64, 64) and x.dtype == np.uint8
        assert y.shape == (n,) and y.dtype == np.int64
        assert (np.bincount(y) == n // 10).all() and len(builtin_images.CLASSES) == len(
            set(builtin_images.CLASSES)
        ) == 10


@pytest.mark.parametrize("n", [0, 1, 9, 10, 11, 159, 161, 333])
def test_an_image_depends_on_split_and_index_alone(images, n):
    for split, (x, y) in zip(("train", "val"), images[:2], strict=True):
        few, labels = builtin_images.generate(split, n)
        assert few.shape == (n, 3, 64, 64) and (few == x[:n]).all() and (labels == y[:n]).all()
        assert labels.tolist() == [i % 10 for i in range(n)]  # as the classes are listed


def test_the_images_are_the_same_on_every_machine(images):
    """Checksums of the first 200 of each split: a change of the drawing must be meant, as it voids measured numbers."""
    (x, _), (v, _), _ = images
    assert [hashlib.sha256(a[:200].tobytes()).hexdigest()[:16] for a in (x, v)] == [
        "4459c9b53510eceb",
        "f65429f07dc67774",
    ]


def test_no_image_comes_twice_in_or_across_the_splits(images):
    (x, _), (v, _), _ = images
    assert len({image.tobytes() for image in np.concatenate([x, v])}) == len(x) + len(v)


def test_images_are_well_exposed_and_never_flat(images):
    x = images[0][0].astype(float)
    assert 80 < x.mean() < 160  # of the set
    assert (x.std(axis=(1, 2, 3)) > 8).all()  # of each image
    assert ((x == 0) | (x == 255)).mean() < 0.1  # clipped values


def test_an_image_uses_no_number_twice():
    """Parameters are drawn before the textures' numbers begin, for every class."""
    for name in builtin_images.CLASSES:
        picture = builtin_images.Picture(np.full((1, 80 + 9 + 25 + 81 + 289 + 1089 + 4096), 0.5, np.float32))
        getattr(builtin_images, name)(picture)
        picture.finish()
        assert 10 < picture.drawn <= builtin_images.DRAWS


def test_spectrum_falls_like_a_photographs(images):
    """Amplitude falls with frequency about as 1/f between 2 and 16 cycles an image; measured slope -1.5."""
    x = images[0][0][:300].mean(axis=1)
    window = np.hanning(64)[:, None] * np.hanning(64)
    amplitude = np.abs(np.fft.fft2((x - x.mean(axis=(1, 2), keepdims=True)) * window)).mean(axis=0)
    f = np.hypot(*np.meshgrid(np.fft.fftfreq(64, 1 / 64), np.fft.fftfreq(64, 1 / 64)))
    band = (f >= 2) & (f <= 16)
    slope = np.polyfit(np.log(f[band]), np.log(amplitude[band]), 1)[0]
    assert -1.8 < slope < -0.8


def test_pixels_say_little_and_mean_colour_next_to_nothing(images):
    """Chance is 10 %. Brightness and hue are nuisances; the pixels keep some of where things stand."""
    (x, y), (v, w), _ = images
    centred = [(a.reshape(len(a), -1) / 255.0 - 0.45, b) for a, b in ((x, y), (v, w))]
    colours = [(a.mean(axis=(2, 3)) / 255.0 - 0.45, b) for a, b in ((x, y), (v, w))]
    assert 15 < neighbours(*centred) < 28
    assert neighbours(*colours) < 20


def test_each_class_varies_in_colour_and_shares_it_with_others(images):
    (x, y), _, _ = images
    mean = x.mean(axis=(2, 3))  # (n, 3)
    centres = np.stack([mean[y == c].mean(axis=0) for c in range(10)])
    within = np.stack([mean[y == c].std(axis=0) for c in range(10)])
    assert within.min() > 2 * centres.std(axis=0).max()


def test_painting_is_quick(images):
    assert images[2] < 20  # seconds for 2000 images; about one is usual


def test_signed_distances_by_hand():
    """On a picture of coordinates alone: inside negative, outside positive, with the distance's size."""

    class Point:
        x, y = (np.float32(v).reshape(1, 1, 1) for v in (0.5, 0.0))

    assert builtin_images.ellipse(Point, 0, 0, 0.2, 0.2).item() == pytest.approx(0.3)
    assert builtin_images.ellipse(Point, 0, 0, 0.1, 0.6, np.pi / 2).item() == pytest.approx(
        -0.1 * (1 - 0.5 / 0.6), abs=1e-6
    )
    assert builtin_images.box(Point, 0.2, 0, 0.1, 0.4).item() == pytest.approx(0.2)
    square = ((-1, -1), (1, -1), (1, 1), (-1, 1))
    assert builtin_images.polygon(Point, *square).item() == pytest.approx(-0.5)


def test_a_part_covers_half_a_pixel_on_its_edge():
    picture = builtin_images.Picture(np.full((1, builtin_images.DRAWS + 1493 + 4096), 0.5, np.float32))
    picture.canvas = np.zeros((1, 3, 64, 64), np.float32)
    picture.paint(picture.x - picture.x[..., 32:33] + 0 * picture.y, np.ones((1, 3, 1, 1), np.float32), bulge=0)
    row = picture.canvas[0, 0, 10]
    assert np.allclose(row[:32], 1, atol=1e-5) and row[32] == pytest.approx(0.5) and (row[33:] == 0).all()


def flat_picture():
    """One canvas whose numbers are all one half, so that a contrast is 0.45, a size 1.025 and a phase 0.5."""
    return builtin_images.Picture(np.full((1, builtin_images.DRAWS + 1493 + 4096), 0.5, np.float32))


def test_stripes_are_triangle_waves_of_their_period():
    p = flat_picture()
    made = builtin_images.stripes(p, p.x, 0.4)
    for x, value in zip(p.x[0, 0], made[0, 0], strict=True):
        t = float(x) / (0.4 * 1.025) + 0.5
        distance = abs(t - round(t))  # to the nearest crest
        assert value == pytest.approx(0.45 * (1 - 4 * distance), abs=1e-4)


def test_bricks_lie_half_on_and_scales_in_columns():
    """Joints between bricks of the next row stand over the middle of this one's; likewise for scales."""
    p = flat_picture()
    high, wide = 0.25, 0.5
    made = builtin_images.bricks(p, high, wide)[0]
    size = 1.025
    for i in range(0, 64, 3):
        for j in range(0, 64, 3):
            v = float(p.y[0, i, 0]) / (high * size) + 0.5
            u = float(p.x[0, 0, j]) / (wide * size) + math.floor(v) / 2 + 0.5
            edge = max(abs(v % 1 - 0.5), abs(u % 1 - 0.5))
            assert made[i, j] == pytest.approx(0.45 * (1 - 2 * min(max(12 * (edge - 0.36), 0), 1)), abs=1e-3)
    made = builtin_images.scales(p := flat_picture(), 0.25)[0]
    for i in range(0, 64, 3):
        for j in range(0, 64, 3):
            u = float(p.x[0, 0, j]) / (0.25 * size) + 0.5
            v = float(p.y[0, i, 0]) / (0.25 * size) + math.floor(u) / 2 + 0.5
            assert made[i, j] == pytest.approx(0.45 * (1.4 - 2.4 * math.hypot(u % 1, v % 1 - 0.5)), abs=1e-3)


def test_a_surface_lightens_and_darkens_what_it_covers():
    plain, striped = flat_picture(), flat_picture()
    for picture, surface in ((plain, 0.0), (striped, np.float32(0.5))):
        picture.canvas = np.zeros((1, 3, 64, 64), np.float32)
        picture.glow = np.float32(1)
        picture.paint(picture.x + 0 * picture.y, np.ones((1, 3, 1, 1), np.float32), bulge=0, surface=surface)
    assert np.allclose(striped.canvas, 1.5 * plain.canvas, atol=1e-6) and plain.canvas[0, 0, 0, 0] == 1
