"""What values a method's knobs may take: the types of its Config's fields, each with its domain, and their check."""

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


def check(config) -> None:
    """Refuse the first knob whose value is outside of the domain of its type. NaN is outside of all of them."""
    for name, kind in get_type_hints(type(config), include_extras=True).items():
        value, knob = getattr(config, name), name.replace("_", " ")
        if get_origin(kind) is Literal and value not in (words := get_args(kind)):
            raise InputError(f"{knob} {value!r}: unknown; choose {', '.join(words[:-1])} or {words[-1]}")
        holds, domain = getattr(kind, "__metadata__", (lambda x: True, ""))
        if not holds(value):
            raise InputError(f"{knob} {value:g}: must be {domain}")
