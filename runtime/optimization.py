"""The learning rate of a step, and which parameters AdamW decays."""

from torch import nn

from common import cosine
from runtime.errors import InputError


def learning_rate(step: int, steps: int, warmup: int, peak: float, floor: float = 0.0, decay=cosine) -> float:
    """Linear from 0 over `warmup` steps, then a cosine from `peak` to `floor` at `steps`; per step, as in MAE.

    `decay` is another way from `peak` to `floor`: a function of both and of the progress in [0, 1].
    """
    if step < warmup:
        return peak * step / warmup
    return decay(peak, floor, min(1.0, (step - warmup) / max(1, steps - warmup)))


def parameter_groups(module: nn.Module, weight_decay: float, no_decay: tuple[str, ...] = ()) -> list[dict]:
    """Two AdamW groups: vectors and biases are not decayed, nor what has a part of its name in `no_decay`."""
    decayed, exempt = [], []
    for part in no_decay:
        if not any(part in name for name, _ in module.named_parameters()):
            raise InputError(f"no decay {part!r}: no parameter has that in its name; give cls_token, for example")
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            free = parameter.ndim <= 1 or name.endswith("bias") or any(part in name for part in no_decay)
            (exempt if free else decayed).append(parameter)
    return [dict(params=decayed, weight_decay=weight_decay), dict(params=exempt, weight_decay=0.0)]
