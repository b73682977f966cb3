"""Encoders from files and into files."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import launch
from common import InputError, ViT, pair

# --------------------------------------------------------------------------------------------------------------- in


def load_encoder(path, device="cpu", image_size=None) -> ViT:
    """The encoder of a run directory or of an encoder.pt, in evaluation mode, for images of `image_size` if given."""
    file = Path(path) / "encoder.pt" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise InputError(f"{file}: no such file; give the directory of a run whose method keeps an encoder")
    saved = launch.load(file)
    try:
        encoder = ViT(**saved["settings"])
        encoder.load_state_dict(saved["state_dict"])
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError):  # whatever a stranger's file may lack
        raise InputError(f"{file}: not a minMIM encoder; give an encoder.pt that train.py wrote") from None
    return resize(encoder, image_size or encoder.image_size).to(device).eval()


def untrained(encoder: ViT, seed: int = 0) -> ViT:
    """The same architecture at its initial weights, a function of the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViT(**encoder.settings).to(encoder.cls_token.device).eval()


# ---------------------------------------------------------------------------------------------------------- positions


def interpolate(rows: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """(h·w, D) on a grid → (h'·w', D) on another, bicubic and not antialiased, as in MAE's code."""
    grid = rows.reshape(*old, -1).permute(2, 0, 1)[None]
    return F.interpolate(grid, size=new, mode="bicubic", align_corners=False)[0].flatten(1).T


def resize(encoder: ViT, image_size) -> ViT:
    """The encoder for images of another size: a new one with the same weights, its positions interpolated.

    Sine-cosine positions too are stretched, not continued: a patch keeps the position of its place in the picture.
    """
    if pair(image_size) == pair(encoder.image_size):
        return encoder
    resized, state = ViT(**encoder.settings | dict(image_size=image_size)), encoder.state_dict()
    cls, patches = state["pos_embed"][0].split([1, encoder.patches])
    state["pos_embed"] = torch.cat([cls, interpolate(patches, encoder.grid, resized.grid)])[None]
    if encoder.relative_table is not None:  # a row for each offset, then three of the class token
        old, new = ([2 * side - 1 for side in e.grid] for e in (encoder, resized))
        offsets, cls = state["relative_table"].split([math.prod(old), 3])
        state["relative_table"] = torch.cat([interpolate(offsets, old, new), cls])
    resized.load_state_dict(state)
    return resized
