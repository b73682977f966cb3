"""Pretraining on images as people have them: unlabelled, nested, 12 bits deep, in parquet; cut, by two processes."""

import io
import json
import os

import numpy as np
import pytest
import torch
from forked_programs import Program, finish
from PIL import Image
from safetensors.torch import load_file
from test_train import OWN, SMALL

STOP_AT_THE_FIFTH_STEP = """
import mae
drawn, plain = [], mae.MAE.draw
def draw(self, *words):
    drawn.append(1)
    if len(drawn) == 6:  # one was of the pictures
        os.kill(os.getpid(), signal.SIGTERM)
    return plain(self, *words)
mae.MAE.draw = draw
"""
STREAM = "from inputs import image_sets; image_sets.RESIDENT_LIMIT = 0\n"


def make(kind, root):
    """Forty photographs in a flat folder, or in two species of each of two groups, or forty scans of 12 bits.

    Or rows of a table: photographs of many sizes, their thumbnails, labels of two kinds.
    """
    if kind == "parquet":
        return make_parquet(root)
    draw = np.random.default_rng(0)
    for i in range(40):
        folder = root / (f"group {i % 2}/species {i % 4}" if kind == "nested" else ".")
        folder.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(draw.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((40, 36), Image.BICUBIC)
        if kind == "deep":
            scan = np.asarray(coarse.convert("L")).astype(np.uint16) * 16
            Image.fromarray(scan).save(folder / f"{i}.png")
        else:
            coarse.save(folder / f"{i}.jpg")
    return ["--class-level", 2] if kind == "nested" else []


def make_parquet(root):
    pytest.importorskip("datasets")
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    draw, rows = np.random.default_rng(0), []
    root.mkdir()
    for i in range(48):
        content = io.BytesIO()
        coarse = Image.fromarray(draw.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize((34 + i % 7, 36 + i % 3), Image.BICUBIC).save(content, "JPEG")
        rows.append(dict(view=content.getvalue(), small=b"", group=i % 2, species=f"species {i % 4}"))
    parquet.write_table(pyarrow.Table.from_pylist(rows[8:]), root / "train.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows[:8]), root / "test.parquet")
    return ["--columns", "view", "species", "--split", "train", "test"]


@pytest.fixture
def program(tmp_path, cache):
    def run(name, *words, **how):
        environment = os.environ | dict(MINMIM_CACHE=str(cache), HF_HOME=str(cache), OMP_NUM_THREADS="1")
        return finish(Program(name, *words, env=environment, cwd=tmp_path, **how))

    return run


def weights(run):
    return load_file(run / "encoder.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flat", "nested", "deep", "parquet"])
def test_a_run_is_resumed_to_the_bit_and_two_processes_do_as_one(tmp_path, program, kind):
    own, data = make(kind, tmp_path / "set"), "hf:set" if kind == "parquet" else tmp_path / "set"
    words = ["--method", "mae", *SMALL, *OWN["mae"], "--data", data, *own]
    before, labelled = STREAM if kind == "parquet" else "", kind in ("nested", "parquet")
    whole = program("train.py", *words, "--out", tmp_path / "whole", "--evaluate", before=before)
    assert whole.returncode == 0, whole.stderr
    left_out = "evaluate  left out: the images have no labels"
    assert (left_out in whole.stderr) != labelled and ("accuracy on " in whole.stderr) == labelled
    stopped = program("train.py", *words, "--out", tmp_path / "cut", before=before + STOP_AT_THE_FIFTH_STEP)
    assert stopped.returncode == 143, stopped.stderr
    resumed = program("train.py", *words, "--out", tmp_path / "cut", before=before)
    assert resumed.returncode == 0 and resumed.stderr.endswith(" knn\n" if labelled else " knn --data LABELLED\n")
    assert program("train.py", *words, "--out", tmp_path / "two", n=2, before=before).returncode == 0
    expected = weights(tmp_path / "whole")
    for name, value in weights(tmp_path / "cut").items():
        assert torch.equal(value, expected[name]), name
    for name, value in weights(tmp_path / "two").items():
        torch.testing.assert_close(value, expected[name], atol=3e-5, rtol=1e-4, msg=name)
    measured = program("evaluate.py", "--run", tmp_path / "whole", "--protocol", "knn")
    if labelled:  # at the level of the run, or by its columns and splits
        result = json.loads(measured.stdout.splitlines()[-1])
        assert result.items() >= (dict(class_level=2, n=4) if kind == "nested" else dict(split=own[-2:], n=8)).items()
    else:
        line = "set: its images have no labels, which a measure of an encoder needs; sort them into a folder for each"
        assert measured.returncode == 2 and measured.stderr.splitlines()[-1].startswith(line)
