"""What a GPU asks of a method, as a machine without one can see it: one graph, no idle weight, nobody who waits."""

import contextlib
import dataclasses
import typing

import numpy as np
import pytest
import torch
from test_map_of_tests import SHORT
from test_train import SMALL, own

from common import StepRandom
from methods import METHODS
from runtime.command_line import build_encoder
from train import options

# Where a number switches something on or off. Words and truths are switches all.
NUMBERS = {
    ("mae", "mask_cell"): 2, ("cmae", "target_blur"): 0.5, ("cmae", "target_mask_ratio"): 0.5,
    ("cmae", "feature_decoder_depth"): 0, ("cmae", "lambda_c"): 0.0, ("cmae_loc", "lambda_ctr"): 0.0,
    ("cmae_loc", "lambda_loc"): 0.0, ("cmae_loc", "lambda_con"): 0.0, ("cae", "decoder_depth"): 0,
    ("cae", "lambda_z"): 0.0, ("conmim", "filter_above"): 0.5, ("lcmae", "mae_weight"): 0.0,
    ("lcmae", "cross_weight"): 0.0, ("lcmae", "in_weight"): 0.0, ("autoencoder", "block"): 8,
    ("dvae", "first_stride"): 8,
}  # fmt: skip
BESIDE = {  # what a switch needs beside it
    ("cmae", "share_decoder"): dict(feature_decoder_depth=1),
    ("cmae_loc", "decoder"): dict(decoder_depth=3),
    ("cae", "norm_pixels"): dict(target="pixels"),
    ("conmim", "slow"): dict(keep_slow=False),
    ("lcmae", "project"): dict(mae_weight=0.0),
}
ENCODERS = ["--positions relative", "--stem conv", "--layer-scale 0.1 --drop-path 0.1"]
B = 4
# These change what is drawn, or a number, or leave out a part of the first configuration's graph.
LESS = set("pixel_shift target_color target_blur official_scale norm_pixels key_color augmentation crop_by mask_cell "
           "keep_slow target_norm lambda_c lambda_ctr lambda_loc lambda_con lambda_z cross_weight in_weight "
           "mae_weight block first_stride".split())  # fmt: skip


def switches(name: str) -> list[dict]:
    """The knobs of a method, one after another at each of their other ways: its configurations beside the first."""
    found = []
    for field in dataclasses.fields(METHODS[name].Config):
        ways = typing.get_args(field.type) if typing.get_origin(field.type) is typing.Literal else []
        if isinstance(field.default, bool):
            ways = [True, False]
        elif (name, field.name) in NUMBERS:
            ways = [NUMBERS[name, field.name]]
        found += [BESIDE.get((name, field.name), {}) | {field.name: way} for way in ways if way != field.default]
    return [knobs for knobs in found if knobs.get("target") != "dalle"]  # whose weights are not here


CASES = [(name, knobs, "") for name in METHODS for knobs in [{}, *switches(name)]]
CASES += [("mae", {}, flags) for flags in ENCODERS]
GRAPHS = [case for case in CASES if not case[1] or not case[1].keys() <= LESS]


def named(case) -> str:
    name, knobs, flags = case
    return " ".join([name, *(f"{key}={value}" for key, value in knobs.items()), flags]).strip()


def method_of(case, device: str = "cpu"):
    name, knobs, flags = case
    args, config, Method = options(["--method", name, *SMALL, *own(name, "--depth", "1", *flags.split())])
    torch.manual_seed(0)
    return Method(build_encoder(args), dataclasses.replace(config, **SHORT.get(name, {}) | knobs)).to(device).train()


def batch_of(method, step: int, device: str = "cpu"):
    pixels = np.random.default_rng(step).integers(0, 256, (B, 3, 40, 36), dtype=np.uint8)
    images = torch.from_numpy(pixels).to(device)
    return method.draw(images, torch.arange(B), StepRandom(0, step, B, None, device))


@pytest.mark.parametrize("case", CASES, ids=named)
def test_nothing_in_a_step_reads_the_device_and_no_weight_is_idle(case, monkeypatch):
    """On a device without memory: what asked for a value there would raise. DDP waits for each weight's gradient."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **how: contextlib.nullcontext())  # which knows no such device
    method = method_of(case, "meta")
    method(batch_of(method, 0, "meta"))["loss"].backward()
    if hasattr(method, "update_teacher"):
        method.update_teacher(0.5)
    idle = [name for name, p in method.named_parameters() if p.requires_grad == (p.grad is None)]
    assert not idle


@pytest.mark.parametrize("case", GRAPHS, ids=named)
def test_a_method_is_one_graph_compiled_once(case):
    """A break would raise, and a new batch, mask or teacher that is compiled anew would count."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    method = method_of(case)
    compiled = torch.compile(method, backend=backend, fullgraph=True)
    for step in range(2):
        losses = compiled(batch_of(method, step))
        losses["loss"].backward()
        if hasattr(method, "update_teacher"):
            method.update_teacher(step)
    assert len(graphs) == 1
