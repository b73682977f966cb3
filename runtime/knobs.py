"""What values a method's knobs may take: the types of its Config's fields with their domains, and knobs turned off."""

from collections.abc import Iterator
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import torch

from runtime.errors import InputError

LARGEST = torch.finfo(torch.float32).max  # what is larger is not finite where it is used

# A type, the test that a value must pass, and the domain in words
Share = Annotated[float, lambda x: 0 <= x <= 1, "from 0 to 1"]
Part = Annotated[float, lambda x: 0 < x <= 1, "above 0 and at most 1"]
Cosine = Annotated[float, lambda x: -1 <= x <= 1, "from -1 to 1"]
Positive = Annotated[float, lambda x: 0 < x <= LARGEST, "above 0 and finite"]
Weight = Annotated[float, lambda x: 0 <= x <= LARGEST, "0 or more and finite"]
Count = Annotated[int, lambda x: x >= 0, "0 or more"]
Size = Annotated[int, lambda x: x >= 1, "1 or more"]

DVAE = "tokenizer_epochs codes hidden blocks first_stride"
HEADS = "momentum projector_width projector_out"
# Of each method: settings, and the knobs that they turn off. True stands for any name that is given.
IDLE = dict(
    cmae=[
        (dict(lambda_c=0), f"target_color target_blur target_mask_ratio target_norm feature_decoder_depth {HEADS}"),
        (dict(lambda_c=0), "contrast tau official_scale"),
        (dict(pixel_shift=False), "shift_range"),
        (dict(contrast="byol", official_scale=False), "tau"),
    ],
    cmae_loc=[
        (dict(crop_by="none"), "crop_warmup crop_interval crop_threshold"),
        (dict(lambda_ctr=0), f"tau {HEADS}"),
        (dict(lambda_loc=0), "location_mean withhold_positions"),
        (dict(lambda_con=0), "norm_pixels"),
    ],
    cae=[(dict(tokenizer=True), DVAE), (dict(target="pixels"), DVAE)],
    conmim=[
        (dict(masking="none"), "mask_ratio mask_cell"),
        (dict(masking="block"), "mask_cell"),
        (dict(contrast="instance"), "dictionary"),
        (dict(slow=False), "momentum"),
        (dict(augmentation="basic"), "jitter gray"),
    ],
    lcmae=[
        (dict(decoder="average"), "decoder_depth decoder_heads"),
        (dict(decoder="conv"), "decoder_depth decoder_heads"),
        (dict(mae_weight=0), "norm_pixels"),
        (dict(cross_weight=0, in_weight=0), "project projector_out"),
    ],
)


def check(config) -> None:
    """Refuse the first knob whose value is outside of the domain of its type. NaN is outside of all of them."""
    for name, kind in get_type_hints(type(config), include_extras=True).items():
        value, knob = getattr(config, name), name.replace("_", " ")
        if get_origin(kind) is Literal and value not in (words := get_args(kind)):
            raise InputError(f"{knob} {value!r}: unknown; choose {', '.join(words[:-1])} or {words[-1]}")
        holds, domain = getattr(kind, "__metadata__", (lambda x: True, ""))
        if not holds(value):
            raise InputError(f"{knob} {value:g}: must be {domain}")


def turned_off(method: str, config) -> Iterator[tuple[str, str]]:
    """The knobs that do nothing beside a Config's other settings, each with these settings in words."""
    for settings, knobs in IDLE.get(method, ()):
        values = {name: getattr(config, name) for name in settings}
        if all(value == (bool(values[name]) if value is True else values[name]) for name, value in settings.items()):
            why = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())
            yield from ((knob, why) for knob in knobs.split())
