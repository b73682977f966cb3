"""runtime/knobs.py: every knob of every method has its domain, and what lies outside is refused in one line."""

import dataclasses
import math
import typing
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_train import OWN, SMALL

from common import ViT
from methods import METHODS
from runtime.errors import InputError
from runtime.knobs import Count, Positive, Share, check
from train import options

KNOBS = [(name, field) for name, Method in METHODS.items() for field in dataclasses.fields(Method.Config)]
FREE = {("cae", "tokenizer"), ("cmae", "shift_range")}  # a path, and a range that shift_bounds reads


@dataclasses.dataclass(frozen=True)
class Config:
    tau: Positive = 0.07
    decoder_depth: Count = 2
    mask_ratio: Share = 0.5
    contrast: Literal["infonce", "byol", "none"] = "infonce"
    slow: bool = True
    __post_init__ = check


@pytest.mark.parametrize("knobs, message", [
    (dict(tau=0.0), "tau 0: must be above 0 and finite"), (dict(tau=math.nan), "tau nan: must be above 0"),
    (dict(tau=3.4028234663852889e38), "tau 3.40282e.38: must be above 0 and finite"),
    (dict(tau=math.inf), "tau inf: must be"), (dict(decoder_depth=-1), "decoder depth -1: must be 0 or more"),
    (dict(mask_ratio=1.01), "mask ratio 1.01: must be from 0 to 1"),
    (dict(contrast="simclr"), "contrast 'simclr': unknown; choose infonce, byol or none"),
])  # fmt: skip
def test_what_is_outside_of_a_domain_is_named(knobs, message):
    with pytest.raises(InputError, match=message):
        Config(**knobs)


def test_the_ends_of_a_domain_belong_to_it():
    Config(tau=1e-30, decoder_depth=0, mask_ratio=0.0, contrast="none", slow=False), Config(mask_ratio=1.0)


@pytest.mark.parametrize("name, field", KNOBS, ids=lambda word: getattr(word, "name", word))
def test_every_knob_has_a_domain(name, field):
    kind, listed = field.type, typing.get_origin(field.type) is Literal
    assert kind is bool or listed or hasattr(kind, "__metadata__") or (name, field.name) in FREE
    wild = "odd" if listed else None if kind is bool or kind is str else -2
    if wild is not None:
        with pytest.raises(InputError, match=rf"^{field.name.replace('_', ' ')} .*(must be|unknown)") as caught:
            METHODS[name].Config(**{field.name: wild})
        assert "\n" not in str(caught.value)


VALUES = {
    float: st.floats() | st.sampled_from([0.0, 0.5, 1.0, 2.0]), int: st.integers(-3, 9), str: st.text(max_size=4),
    bool: st.booleans(),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
@given(st.data())
def test_any_value_of_any_knob_builds_a_method_or_is_refused_in_one_line(name, data):
    _, config, Method = options(["--method", name, *SMALL, *OWN[name]])
    field = data.draw(st.sampled_from(dataclasses.fields(config)))
    words = typing.get_args(field.type) if typing.get_origin(field.type) is Literal else ()
    value = data.draw(VALUES[type(field.default)] if not words else st.sampled_from([*words, "odd"]))
    torch.manual_seed(0)
    try:
        Method(ViT(32, 8, 16, 2, 2), dataclasses.replace(config, **{field.name: value}))
    except InputError as error:
        assert "\n" not in str(error).strip()


@pytest.mark.parametrize("line, message", [
    ("cae --target pixels --tokenizer x.pt", "tokenizer x.pt: pixels need none"),
    ("cae --norm-pixels", "norm pixels: tokens are no pixels"),
    ("cmae --feature-decoder-depth -1", "feature decoder depth -1: must be 0 or more"),
    ("cmae --momentum 2", "momentum 2: must be from 0 to 1"), ("conmim --momentum 2", "momentum 2: must be"),
    ("cmae --lambda-c -1", "lambda c -1: must be 0 or more"), ("lcmae --in-weight -1", "in weight -1: must be 0 or"),
    ("cmae --projector-width -1", "projector width -1: must be 0 or more"),
    ("conmim --projector-width 0", "projector width 0: must be 1 or more"),
    ("mae --decoder-heads 0", "decoder heads 0: must be 1 or more"),
    ("cae --tokenizer x.pt --codes 64", "codes: does nothing with tokenizer x.pt; leave it out"),
    ("cae --target pixels --hidden=64", "hidden: does nothing with target pixels; leave it out"),
    ("cmae --lambda-c 0 --no-target-color", "target color: does nothing with lambda c 0.0; leave it out"),
    ("cmae --contrast byol --no-official-scale --tau 0.2", "tau: does nothing with contrast byol, official"),
    ("lcmae --cross-weight 0 --in-weight 0 --project tokens", "project: does nothing with cross weight 0.0, in weight"),
])  # fmt: skip
def test_wild_and_idle_options_are_refused(line, message):
    with pytest.raises(InputError, match=message):
        _, config, Method = options(["--method", *line.split()])
        Method(ViT(32, 8, 16, 2, 2), config)
