"""What an enemy, a bad disk or a bad gradient hands in: one line or the right result, never a silent wrong one."""

import contextlib
import io
import itertools
import math
import os
import pickle
import resource
import struct
import sys
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_train import OWN, SMALL, assert_same_bits, log, own

import mae
import train
from common import StepRandom
from inputs import augment, image_cache, image_files, image_sets
from methods import METHODS
from runtime import encoder_files, files
from runtime.command_line import build_encoder
from runtime.errors import InputError
from runtime.log import Log
from train import options


def build(name: str, *flags: str):
    """A method as small as test_train's, at its first weights."""
    args, config, Method = options(["--method", name, *SMALL, *own(name, *flags)])
    torch.manual_seed(0)
    return Method(build_encoder(args), config).train()


def batch_for(method, B: int = 4, seed: int = 0, side: int = 40):
    """Noise over a colour of its own for each image, so that images differ in the mean, too."""
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 128, (B, 3, 1, 1)) + draw.integers(0, 128, (B, 3, side, side))
    return method.draw(torch.from_numpy(pixels.astype(np.uint8)), torch.arange(B), StepRandom(seed, 0, B))


def same(a, b) -> bool:
    try:
        assert_same_bits(a, b)
    except AssertionError:
        return False
    return True


def test_a_run_is_not_laid_out_among_the_images(tmp_path, monkeypatch):
    """Where it would be taken for a class from then on. Beside train/ and val/ it does no harm."""
    monkeypatch.chdir(tmp_path)
    for words in (["."], [str(tmp_path)], ["set", "--out", "set/run"], "set --data-root at --out at/set/run".split()):
        with pytest.raises(InputError, match=r"lies among the images of .*; give another --out"):
            options(["--method", "mae", "--data", *words])
    (tmp_path / "set" / "train").mkdir(parents=True)
    for words in (["set", "--out", "set/run"], ["set", "--out", "setting"], ["shapes", "--out", "shapes/run"]):
        options(["--method", "mae", "--data", *words])


# ------------------------------------------------------------------------------------------------------- checkpoints

TREE = dict(step=3, settings=dict(lr=0.1, data="é"), method=dict(a=torch.arange(5.0), b=torch.ones(2, 3).half()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "checkpoint.pt"
    files.save(path, TREE)
    assert same(files.load(path), TREE)
    return path.read_bytes()


def refused_or_same(path, content: bytes) -> bool:
    path.write_bytes(content)
    try:
        tree = files.load(path)
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return True
    assert same(tree, TREE)
    return False


def test_no_flipped_bit_of_a_checkpoint_is_loaded_as_something_else(whole, tmp_path):
    """A bit of every other byte, and every bit of a weight's entry in the directory and of the directory's end.

    torch alone hands out memory as it happens to be where a weight is marked as a folder.
    """
    entry = whole.rindex(b"archive/data/1") - 46  # a directory's entry has 46 bytes, then the name
    assert whole[entry : entry + 4] == b"PK\x01\x02"
    bits = [8 * at + at // 2 % 8 for at in range(0, len(whole), 2)] + list(range(8 * entry, 8 * (entry + 46)))
    bits += range(8 * (len(whole) - 22), 8 * len(whole))
    refused = 0
    for at in bits:
        content = bytearray(whole)
        content[at // 8] ^= 1 << at % 8
        refused += refused_or_same(tmp_path / "x.pt", bytes(content))
    assert refused > len(bits) / 2  # the rest is padding and dates


damages = st.tuples(st.sampled_from(["cut", "overwrite", "insert", "remove"]), st.floats(0, 1), st.binary(max_size=40))


def damaged(content: bytes, how: str, where: float, other: bytes) -> bytes:
    at = round(where * len(content))
    if how == "cut":
        return content[:at]
    return content[:at] + (other if how != "remove" else b"") + content[at + (len(other) if how != "insert" else 0) :]


@settings(max_examples=150)
@given(damages)
@example(("cut", 0.0, b""))
@example(("insert", 0.0, b"\0"))
def test_a_checkpoint_that_is_cut_or_spliced_is_refused_in_one_line(whole, tmp_path_factory, damage):
    refused_or_same(tmp_path_factory.getbasetemp() / "x.pt", damaged(whole, *damage))


class Payload:
    """Touches a file when it is unpickled by anything that runs code."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.mark.parametrize("form", ["saved", "legacy", "pickle", "deep"])
def test_a_pickle_payload_does_not_run(tmp_path, form):
    path, touched = tmp_path / "x.pt", tmp_path / "touched"
    tree = dict(step=0, settings=Payload(touched))
    if form == "pickle":
        path.write_bytes(pickle.dumps(tree))
    elif form == "deep":  # two right entries first, then the payload inside a list of a dict
        torch.save(TREE | dict(optimizer=dict(state=[Payload(touched)])), path)
    else:
        torch.save(tree, path, _use_new_zipfile_serialization=form == "saved")
    with pytest.raises(InputError, match="damaged or not written by this program"):
        files.load(path)
    assert not touched.exists()
    if form != "deep":  # it would have run
        with contextlib.suppress(Exception):
            torch.load(path, weights_only=False)
        assert touched.exists()


def test_a_plain_pickle_in_place_of_weights_is_one_line(tmp_path):
    (tmp_path / "plain.pickle").write_bytes(pickle.dumps(dict(a=1)))
    with warnings.catch_warnings(record=True) as warned, pytest.raises(InputError, match="no weights without code"):
        warnings.simplefilter("always")
        encoder_files.read(tmp_path / "plain.pickle")
    assert not warned


# ------------------------------------------------------------------------------------------------------------- caches


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    path = tmp_path_factory.mktemp("cache") / "a.pt"
    chunk = (torch.arange(36, dtype=torch.uint8), torch.tensor([[2, 2], [4, 2]]), torch.tensor([0, 1]), ["bad.png"])
    image_cache.write_cache(path, [chunk])
    return path.read_bytes()


def damaged_or_same(path, content: bytes) -> bool:
    path.write_bytes(content)
    try:
        pixels, labels, bad = image_cache.read_cache(path)
    except InputError:
        return True
    assert pixels.flat.tolist() == list(range(36)) and pixels.sizes.tolist() == [[2, 2], [4, 2]]
    assert labels.tolist() == [0, 1] and bad == ["bad.png"]
    return False


@pytest.mark.parametrize("cuts", [[], [0], [0, 0], [1], [1, 1], [1, 2], [0, 1, 1, 2]])
def test_a_cache_of_any_parts_is_read(cuts, tmp_path):
    """Two images in chunks of none, of one and of both; a chunk without an image brings the name of a bad one."""
    chunks = [(torch.empty(0, dtype=torch.uint8), torch.empty(0, 2).long(), torch.empty(0).long(), ["bad.png"])]
    ends, labels = [0, 12, 36], torch.arange(2)
    flat, sizes = torch.arange(36, dtype=torch.uint8), torch.tensor([[2, 2], [4, 2]])
    for start, end in zip([0, *cuts], [*cuts, 2], strict=True):
        chunks.append((flat[ends[start] : ends[end]], sizes[start:end], labels[start:end], []))
    image_cache.write_cache(tmp_path / "a.pt", chunks)
    assert not damaged_or_same(tmp_path / "a.pt", (tmp_path / "a.pt").read_bytes())


def test_no_flipped_bit_of_a_cache_is_read_as_something_else(cache, tmp_path):
    noticed = 0
    for at in range(0, 8 * len(cache), 5):
        content = bytearray(cache)
        content[at // 8] ^= 1 << at % 8
        noticed += damaged_or_same(tmp_path / "a.pt", bytes(content))
    assert noticed > len(cache) / 2  # the others are of padding, of times, and of what stands twice


@settings(max_examples=200)
@given(damages)
@example(("cut", 0.0, b""))
def test_a_cache_that_is_cut_or_spliced_is_noticed(cache, tmp_path_factory, damage):
    damaged_or_same(tmp_path_factory.getbasetemp() / "a.pt", damaged(cache, *damage))


# ------------------------------------------------------------------------------------------------------------- images


def png_that_claims(width: int, height: int) -> bytes:
    """A file of a hundred bytes whose header promises that many pixels."""

    def part(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 100)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", pixels) + part(b"IEND", b"")


@pytest.mark.parametrize("side", [20_000, 2**31 - 1])
def test_an_enormous_image_is_refused_by_its_header(tmp_path, side):
    """A decompression bomb: memory for it is never taken."""
    path = tmp_path / "bomb.png"
    path.write_bytes(png_that_claims(side, side))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=r"bomb\.png: does not decode as an image"):
        image_files.decode(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


def test_a_bad_image_whose_name_has_line_ends_is_one_line(tmp_path):
    path = tmp_path / "two\nlines \u2028\x1b[31m é 犬.png"
    path.write_bytes(b"no image")
    with pytest.raises(InputError) as refused:
        image_files.decode(path)
    assert str(refused.value).startswith(f"{tmp_path}/two\\nlines \\u2028\\x1b[31m é 犬.png: does not decode")


@settings(max_examples=150)
@given(st.sampled_from(["PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF"]), damages)
def test_a_damaged_image_decodes_or_is_named(tmp_path_factory, kind, damage):
    path, content = tmp_path_factory.getbasetemp() / "a b é.img", io.BytesIO()
    Image.fromarray(np.arange(12 * 9 * 3, dtype=np.uint8).reshape(12, 9, 3)).save(content, kind)
    path.write_bytes(damaged(content.getvalue(), *damage))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of metadata
        try:
            image = image_files.decode(path)
        except InputError as error:
            assert str(error).startswith(f"{path}: does not decode") and "\n" not in str(error)
        else:
            assert image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3


def odd_images(folder):
    """Every kind of image that a folder may hold, under names with spaces and letters of several alphabets."""
    draw = np.random.default_rng(0)
    for split, n in (("train", 3), ("val", 1)):
        for name in ("klasse ß", "犬"):
            place = folder / split / name
            place.mkdir(parents=True)
            for i in range(n):
                picture = Image.fromarray(draw.integers(0, 256, (33, 47, 3), dtype=np.uint8))
                deep = draw.integers(0, 65536, (20, 30), dtype=np.uint16)
                picture.convert("CMYK").save(place / f"print {i}.jpg")
                picture.quantize(16).save(place / f"палитра {i}.png")
                picture.convert("1").save(place / f"bits-{i}.bmp")
                picture.convert("LA").save(place / f"grey, clear {i}.png")
                picture.resize((1, 1)).save(place / f"one pixel {i}.png")
                picture.resize((300, 2)).save(place / f"thin {i}.webp")
                picture.resize((1, 64)).save(place / f'é\' "{i}".png')
                Image.fromarray(deep).save(place / f"deep {i}.png")
    return folder


def train_here(monkeypatch, *words):
    """train.py in this process."""
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, *map(str, words)])
    train.main()


@pytest.mark.parametrize("streams", [False, True])
def test_a_folder_of_odd_images_trains(tmp_path, monkeypatch, streams):
    monkeypatch.setenv("MINMIM_CACHE", str(tmp_path / "cache"))
    if streams:
        monkeypatch.setattr(image_sets, "RESIDENT_LIMIT", 0)
    folder, out = odd_images(tmp_path / "Bilder für mich"), tmp_path / "lauf 1 日"
    words = ["--data", folder, "--out", out, "--epochs", 1, "--workers", 0]
    train_here(monkeypatch, "--method", "cmae", *OWN["cmae"], *words)
    assert [math.isfinite(row["loss"]) for row in log(out)[1:]] == [True] * 3  # 48 images, 16 a step
    (folder / "train" / "犬" / "cut.png").write_bytes(png_that_claims(9, 9))
    with pytest.raises(InputError, match=r"犬/cut\.png: does not decode"):
        train_here(monkeypatch, "--method", "mae", *OWN["mae"], *words, "--resume", "never")
    train_here(monkeypatch, "--method", "mae", *OWN["mae"], *words, "--resume", "never", "--skip-bad-images")


# --------------------------------------------------------------------------------------------------------- NaN and inf


@pytest.mark.parametrize("method", METHODS)
def test_a_nan_in_any_weight_shows_in_the_loss_or_spreads_by_its_gradient(method):
    """torch's attention hides one from heads of 8 channels or fewer; the values' gradient then takes it to the loss."""
    model = build(method)
    batch = batch_for(model)
    assert model(batch)["loss"].isfinite()
    tried = 0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                first, kept = weight.view(-1)[:1], weight.view(-1)[0].item()
                first.fill_(math.nan)
                model.zero_grad()
                with torch.enable_grad():
                    loss = model(batch)["loss"]
                    loss.backward()
                values = [
                    w.grad[-len(w) // 3 :]
                    for part, w in model.named_parameters()
                    if w.grad is not None and part.endswith("qkv.bias")
                ]
                assert loss.isnan() or any(gradient.isnan().any() for gradient in values), name
                first.fill_(kept)
                tried += 1
    assert tried > 10 and model(batch)["loss"].isfinite()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_an_image_that_is_not_finite_shows_in_the_loss(method, value):
    model = build(method)
    batch = batch_for(model)
    for name, pixels in batch._asdict().items():
        if name.endswith("images") and name != "token_images":  # of these only the likeliest codes count
            spoiled = pixels.clone()
            spoiled[1, 2] = value  # all of one channel: a single masked pixel is nobody's business in ConMIM
            assert not model(batch._replace(**{name: spoiled}))["loss"].isfinite(), name


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Eighty images, of which five steps of sixteen are an epoch."""
    monkeypatch.setenv("MINMIM_CACHE", str(tmp_path / "cache"))
    for split, n in (("train", 80), ("val", 8)):
        (tmp_path / "photos" / split / "one").mkdir(parents=True)
        for i in range(n):
            pixels = np.random.default_rng(i).integers(0, 256, (5, 5, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((36, 36)).save(tmp_path / "photos" / split / "one" / f"{i}.png")
    return tmp_path / "photos"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_reaches_no_checkpoint(photos, tmp_path, monkeypatch, value):
    """The loss of the epoch's last step is still a number, but the weights after it are not."""
    words = ["--method", "mae", "--data", photos, "--out", tmp_path / "run", *OWN["mae"], "--epochs", 3]
    forward, calls = mae.MAE.forward, []

    def spoiled(self, batch):
        losses = forward(self, batch)
        calls.append(1)
        if len(calls) == 10:
            losses["loss"].register_hook(lambda gradient: gradient * value)
        return losses

    monkeypatch.setattr(mae.MAE, "forward", spoiled)
    with pytest.raises(InputError, match=r"^weights: not finite at step 10; the last checkpoint is kept"):
        train_here(monkeypatch, *words)
    checkpoint = files.load(tmp_path / "run" / "checkpoint.pt")
    assert checkpoint["step"] == 5 and all(weight.isfinite().all() for weight in checkpoint["method"].values())
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.endswith(".tmp")]
    monkeypatch.setattr(mae.MAE, "forward", forward)
    train_here(monkeypatch, *words)  # goes on from there
    assert files.load(tmp_path / "run" / "checkpoint.pt")["step"] == 15


def test_fp16_leaves_out_a_step_whose_gradient_overflows(photos, tmp_path, monkeypatch):
    """The scaler's part: the weights stay as they were, and training goes on."""
    words = ["--method", "mae", "--data", photos, "--out", tmp_path / "run", *OWN["mae"], "--epochs", 1]
    monkeypatch.setattr(sys.modules[__name__], "SMALL", [x if x != "fp32" else "fp16" for x in SMALL])
    forward, seen = mae.MAE.forward, []

    def spoiled(self, batch):
        losses = forward(self, batch)
        seen.append(self.decoder.predict.weight.detach().clone())
        if len(seen) == 3:
            losses["loss"].register_hook(lambda gradient: gradient * math.inf)
        return losses

    monkeypatch.setattr(mae.MAE, "forward", spoiled)
    train_here(monkeypatch, *words)
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    assert moved[2:] == [False, True] and all(weight.isfinite().all() for weight in seen)


def test_a_checkpoint_with_a_nan_stops_at_once_and_stays(photos, tmp_path, monkeypatch):
    words = ["--method", "mae", "--data", photos, "--out", tmp_path / "run", *OWN["mae"], "--epochs", 2]
    train_here(monkeypatch, *words)
    path = tmp_path / "run" / "checkpoint.pt"
    tree = files.load(path)
    tree["step"] = 5
    tree["method"]["encoder.norm.weight"][0] = math.nan
    files.save(path, tree)
    content = path.read_bytes()
    with pytest.raises(InputError, match=r"^loss: not finite at step 6"):
        train_here(monkeypatch, *words)
    assert path.read_bytes() == content


# ------------------------------------------------------------------------------------------------- a run's directory


def test_a_checkpoint_with_other_innards_is_refused(photos, tmp_path, monkeypatch):
    """Settings that agree, but weights or a state of the optimizer that are not there, or not of these shapes."""
    words = ["--method", "mae", "--data", photos, "--out", tmp_path / "run", *OWN["mae"], "--epochs", 1]
    train_here(monkeypatch, *words)
    path = tmp_path / "run" / "checkpoint.pt"
    good = files.load(path)
    no_weight = {name: weight for name, weight in good["method"].items() if name != "encoder.norm.bias"}
    for change in (
        dict(method=no_weight),
        dict(method=good["method"] | {"encoder.norm.bias": torch.zeros(3)}),
        dict(method=good["method"] | {"stranger": torch.zeros(3)}),
        dict(method=7),
        dict(optimizer={}),
        dict(optimizer=good["optimizer"] | dict(param_groups=[])),
    ):
        files.save(path, good | change)
        with pytest.raises(InputError, match="the checkpoint's weights are not this program's"):
            train_here(monkeypatch, *words)
    for name in ("step", "scaler"):
        files.save(path, {key: value for key, value in good.items() if key != name})
        with pytest.raises(InputError, match="the checkpoint's weights are not this program's"):
            train_here(monkeypatch, *words)


def test_a_damaged_log_is_cleaned_and_the_run_goes_on(photos, tmp_path, monkeypatch):
    words = ["--method", "mae", "--data", photos, "--out", tmp_path / "run", *OWN["mae"], "--epochs", 1]
    train_here(monkeypatch, *words)
    path = tmp_path / "run" / "log.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(
        b"\n".join([*lines[:3], b'{"step": \xff\xfe\0}', b"[]", b"3}", b'{"step": "x"}', *lines[4:], b'{"s'])
        + b'\n{"step": 4}\n{"step": 4, "loss": "low"}\n'
    )
    train_here(monkeypatch, *words)
    assert [row["step"] for row in log(tmp_path / "run")[1:]] == [1, 2, 4, 5]


def test_a_finished_run_without_its_log_says_what_it_can(photos, tmp_path, monkeypatch, capfd):
    words = ["--method", "mae", "--data", photos, "--out", tmp_path / "run", *OWN["mae"], "--max-steps", 1]
    train_here(monkeypatch, *words)
    assert "loss  " in capfd.readouterr().err
    (tmp_path / "run" / "log.jsonl").unlink()
    train_here(monkeypatch, *words)
    said = capfd.readouterr().err
    assert "pictures  " in said and "loss  " not in said and len(log(tmp_path / "run")) == 1


def test_what_a_killed_run_left_half_written_is_removed(photos, tmp_path, monkeypatch):
    words = ["--method", "mae", "--data", photos, "--out", tmp_path / "run", *OWN["mae"], "--max-steps", 1]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".checkpoint.pt.77.tmp").write_bytes(b"half")
    (tmp_path / "run" / "mine.tmp").write_text("a file that is not ours")
    train_here(monkeypatch, *words)
    assert not (tmp_path / "run" / ".checkpoint.pt.77.tmp").exists() and (tmp_path / "run" / "mine.tmp").exists()


# ---------------------------------------------------------------------------------------------------------- full disks


@contextlib.contextmanager
def largest_file(size: int):
    """The kernel lets no file grow beyond so many bytes, and Python gets an OSError; pytest's own report, too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("numbers", [2_000, 3_000, 100_000])  # in the buffer to the end, at its edge, in the middle
def test_a_checkpoint_that_the_disk_does_not_take_is_one_line(tmp_path, numbers):
    """torch.save hides what the disk says in an error of its own."""
    files.save(tmp_path / "x.pt", TREE)
    with largest_file(6_000), pytest.raises(InputError) as caught:
        files.save(tmp_path / "x.pt", dict(a=torch.zeros(numbers)))
    kept = "cannot be written (File too large); what was there before is kept"
    assert str(caught.value) == f"{tmp_path / 'x.pt'}: {kept}"
    assert same(files.load(tmp_path / "x.pt"), TREE) and os.listdir(tmp_path) == ["x.pt"]
    with largest_file(6_000), pytest.raises(InputError, match=r"y\.pt: cannot be written \(File too large\)$"):
        files.save(tmp_path / "y.pt", dict(a=torch.zeros(numbers)))  # where there was nothing


def test_what_is_no_fault_of_the_disk_is_no_input_error(tmp_path):
    def wrong(file):
        raise RuntimeError("a fault of this program")

    with pytest.raises(RuntimeError, match="a fault of this program"):
        files.write_whole(tmp_path / "x", wrong)
    assert not os.listdir(tmp_path)


def test_a_cache_that_the_disk_does_not_take_is_one_line(photos, tmp_path):
    message = r"cannot be written \(File too large\); make room, or set MINMIM_CACHE"
    with largest_file(50_000), pytest.raises(InputError, match=message):
        image_sets.open_set(str(photos))
    assert not os.listdir(tmp_path / "cache")


@pytest.mark.parametrize("size, file", [(1_000, "config.json"), (5_000, "log.jsonl"), (20_000, "checkpoint.pt")])
def test_a_run_on_a_full_disk_ends_in_one_line_that_names_the_file(photos, tmp_path, monkeypatch, size, file):
    words = ["--method", "mae", "--data", photos, "--out", tmp_path / "run", *OWN["mae"], "--epochs", 40]
    image_sets.open_set(str(photos)), image_sets.open_set(str(photos), split="val")  # the caches are there
    with largest_file(size), pytest.raises(InputError, match=rf"{file}: cannot be written \(File too large\)"):
        train_here(monkeypatch, *words, *(["--save-every", 99] if file == "log.jsonl" else []))
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.endswith(".tmp")]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_log_on_a_full_device_is_one_line(tmp_path):
    run = Log(tmp_path / "log.jsonl", {}, 0)
    run.file.close()
    run.file = open("/dev/full", "a", buffering=1)
    with pytest.raises(InputError, match=r"^/dev/full: cannot be written \(No space left on device"):
        run.write(dict(step=1, loss=1.0))
    with contextlib.suppress(OSError):
        run.file.close()


def test_a_place_below_a_file_is_one_line(tmp_path):
    """There is nothing to be removed either. A folder that is missing is made."""
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path / "file" / "x.pt", tmp_path / "file" / "none" / "x.pt"):
        with pytest.raises(InputError, match=r"x\.pt: cannot be written \((Not a directory|File exists)\)"):
            files.save(path, TREE)
    assert (tmp_path / "file").read_text() == "kept"
    files.save(tmp_path / "some" / "none" / "x.pt", TREE)
    assert same(files.load(tmp_path / "some" / "none" / "x.pt"), TREE)


# ----------------------------------------------------------------------------------------------------- augmentations


@settings(max_examples=12)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_the_smallest_images_are_drawn_by_every_method(H, W, seed):
    images = [torch.randint(0, 256, (3, H, W), dtype=torch.uint8), torch.full((3, 1, 1), 255, dtype=torch.uint8)]
    for method in SMALLEST:
        batch = method.draw(images, torch.tensor([0, 1]), StepRandom(seed, 0, 2))
        for name, x in batch._asdict().items():
            assert not name.endswith("images") or x.isfinite().all()
    assert augment.sizes(images).tolist() == [[H, W], [1, 1]]


SMALLEST = [build(name) for name in METHODS]
