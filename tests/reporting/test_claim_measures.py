"""The measures behind the claims: each against its definition."""

import json
import math
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import analyze
import reproduce
from common import MEAN, STD
from downstream.protocols import knn
from figures import measures as figure_measures
from figures.encoders_and_images import Study
from reporting import claim_measures, result_files
from runtime import files
from runtime.command_line import build_encoder, settle
from train import options


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A `Study` of a run at random weights, of any method, on noise of two classes."""
    place, patch = tmp_path_factory.mktemp("study"), pytest.MonkeyPatch()
    patch.setenv("MINMIM_CACHE", str(place / "cache"))
    draw = np.random.default_rng(0)
    for split, name, i in ((s, c, i) for s in ("train", "val") for c in ("ant", "bee") for i in range(4)):
        (place / "data" / split / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(place / f"data/{split}/{name}/{i}.png")

    def make(method: str, flags: str = "") -> Study:
        words = f"--method {method} --data {place / 'data'} --recipe demo --image-size 16 --patch-size 4 --width 8"
        args, config, Method = options(f"{words} --depth 2 --heads 2 --batch-size 8 --device cpu {flags}".split())
        settle(args, torch.device("cpu"))
        torch.manual_seed(1)
        folder = place / f"{method}{len(list(place.iterdir()))}"
        folder.mkdir()
        about = dict(method=method, settings=vars(args), config=vars(config))
        (folder / "config.json").write_text(json.dumps(about))
        files.save(folder / "checkpoint.pt", dict(method=Method(build_encoder(args), config).state_dict()))
        return Study(analyze.options(["--run", str(folder), "--figure", "all"]), torch.device("cpu"))

    yield make
    patch.undo()


def test_spread_is_the_deviation_of_unit_vectors_over_images(study):
    its = study("lcmae", "--mae-weight 0 --in-weight 0 --projector-out 6")
    found = claim_measures.spread(its)["deviation"]
    run, images = its.runs[0], its.pictures(64)
    mask = run.masks(images, alike=True)
    with torch.no_grad():
        _, h = run.method.decode(figure_measures.centred(images, run.encoder), mask)
        v = run.method.projector(h).double()
    total, n = 0.0, len(v)
    for place in range(v.shape[1]):
        unit = [[x / math.sqrt(sum(y * y for y in image)) for x in image] for image in v[:, place].tolist()]
        for d in range(6):
            mean = sum(image[d] for image in unit) / n
            total += sum((image[d] - mean) ** 2 for image in unit) / n
    assert found == pytest.approx(math.sqrt(total / v.shape[1]), rel=1e-4) and found > 0.01
    torch.nn.init.zeros_(run.method.projector.weight)
    torch.nn.init.ones_(run.method.projector.bias)
    assert claim_measures.spread(its)["deviation"] == pytest.approx(0, abs=1e-6)


def test_latent_error_is_of_all_pixels_decoded_without_the_regressor(study):
    its = study("cae", "--target pixels")
    method = its.runs[0].method
    torch.nn.init.zeros_(method.predict.weight)
    torch.nn.init.constant_(method.predict.bias, 0.5)
    x = figure_measures.centred(its.pictures(64), its.runs[0].encoder).double()
    assert claim_measures.latents(its)["error"] == pytest.approx((x - 0.5).square().mean().item(), rel=1e-5)
    for block in method.regressor:
        block.mlp.fc2.bias.data += 1e3  # what is skipped cannot matter
    assert claim_measures.latents(its)["error"] == pytest.approx((x - 0.5).square().mean().item(), rel=1e-5)


def test_positions_and_attention_are_the_figures_own_numbers(study):
    its = study("mae", "--decoder-depth 3")
    run, images = its.runs[0], its.pictures(32)
    mask = run.masks(images, alike=True)
    alike = []
    for m in figure_measures.decoder_maps(run, images, mask):
        rows = m[:, :, 1 + mask.masked[0], 1:].flatten(1).double()
        pairs = [torch.cosine_similarity(rows[i], rows[j], dim=0).item() for i in range(8) for j in range(8) if i != j]
        alike.append(sum(pairs) / len(pairs))
    found = claim_measures.positions(its)
    assert found == pytest.approx({"first": alike[0], "later": (alike[1] + alike[2]) / 2}, rel=1e-6)
    with torch.no_grad():
        for block in run.encoder.blocks:
            block.attn.qkv.weight.zero_()  # all attend to all alike, in a grid of 4 x 4 patches of 4 pixels
    places = [(i // 4, i % 4) for i in range(16)]
    mean = sum(4 * math.dist(a, b) for a in places for b in places) / 256
    assert claim_measures.attention(its)["distance"] == pytest.approx(mean, rel=1e-5)


def test_pixels_and_classes_measure_the_set_not_a_random_one(study):
    its = study("mae")
    found = claim_measures.pixels(its)
    assert set(found) == {"knn", "linear"} and all(0 <= x <= 100 for x in found.values())
    x = []
    for half in (its.train, its.val):  # 16 pixels a side: each colour is the mean of four, normalised
        pixels = half.images(torch.arange(8), "cpu").double() / 255
        four = [pixels[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
        x.append(((sum(four) / 4 - mean) / std).flatten(1).float())
    expected = knn(x[0], its.train.labels, x[1], its.val.labels, 2)
    assert found["knn"] == expected["top1"]
    distances = claim_measures.classes(its)
    images, labels = its.labelled(500, 50)
    direct = figure_measures.class_distances(figure_measures.features(its.runs[0].encoder, images), labels)
    assert distances["intra_std"] == pytest.approx(direct["intra_std"].mean().item())
    assert distances.keys() == {"intra_mean", "intra_std", "inter_mean", "inter_std"}


def test_a_measure_is_a_command_that_prints_one_line(study, monkeypatch, capsys):
    folder = study("mae").runs[0].directory
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--measure", "classes", "--run", str(folder)])
    reproduce.main()
    assert set(json.loads(capsys.readouterr().out)) == {"intra_mean", "intra_std", "inter_mean", "inter_std"}


def test_a_machine_is_told_by_its_kind():
    gpu = dict(versions=dict(gpu="NVIDIA H200"), settings=dict(device="cuda", precision="bf16"))
    assert result_files.machine(gpu, 4) == "NVIDIA H200, bf16"
    cpu = dict(versions=dict(gpu="NVIDIA H200"), settings=dict(device="cpu", precision="fp32"))
    assert re.fullmatch(r"\w+ ?\S*, 4 of \d+ cores, fp32", result_files.machine(cpu, 4))


def test_keys_are_found_by_place_alone_where_they_hold_nothing_else(study, monkeypatch):
    its = study("conmim", "--mask-cell 1 --projector-width 8 --projector-out 16")
    run = its.runs[0]
    places = torch.eye(16).expand(8, 16, 16)
    monkeypatch.setattr(run.method, "anchors", lambda images, mask: places)
    monkeypatch.setattr(run.method, "keys", lambda images: places)
    assert claim_measures.keys(its) == {"own": 1, "another": 1}
    inside = torch.stack([torch.eye(16).roll(image, 0) for image in range(8)])  # each image's places hold other codes
    monkeypatch.setattr(run.method, "anchors", lambda images, mask: inside)
    monkeypatch.setattr(run.method, "keys", lambda images: inside)
    assert claim_measures.keys(its) == {"own": 1, "another": 0}


def test_the_variance_measured_is_of_the_encoders_patches(study):
    its = study("mae")
    tokens = figure_measures.features(its.runs[0].encoder, its.batches(256), of="patches")
    assert claim_measures.variance(its) == figure_measures.variance_shares(tokens)
