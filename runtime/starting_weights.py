"""What `--init` gives a new method: an encoder, and MAE's decoder where both have one that fits."""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from common import ViT, sincos_positions
from runtime import encoder_files, files
from runtime.encoder_files import HF_BLOCK, Found, depth_of, parts, read_encoder, renamed, resize, with_qkv
from runtime.errors import InputError
from runtime.ranks import say

# Parts of mae.py's decoder by their names in MAE's official weights, and in Hugging Face's; "decoder_encoder" is what
# transformers 5 writes.
DECODER = {f"decoder_{part}": part for part in ("embed", "norm", "pos_embed")} | {"decoder_pred": "predict"}
for ours, names in HF_BLOCK.items():
    for name in names:
        DECODER |= {f"{layer}.#.{name}": f"blocks.#.{ours}" for layer in ("decoder_layers", "decoder_encoder.layer")}
DECODER |= {f"decoder_blocks.#.{part}": f"blocks.#.{part}" for part in [*HF_BLOCK, "attn.qkv"]}


def fill(encoder: ViT, path, heads: int | None = None) -> Found:
    """Copy the weights of a run or file into an encoder of the same architecture, refusing any other.

    Positions are interpolated where the image size differs. LayerNorm's epsilon stays the encoder's own, 1e-6.
    """
    found = read_encoder(encoder_files.weights_file(Path(path)), heads)
    names = "patch_size width depth heads mlp_ratio stem positions layer_scale".split()
    theirs, ours = ({n: bool(e.settings[n]) if n == "layer_scale" else e.settings[n] for n in names}
                    for e in (found.encoder, encoder))  # fmt: skip
    if differs := files.differences(theirs, ours):
        raise InputError(f"{path}: does not fit this encoder ({differs}); give the options that make it so")
    if [*found.encoder.mean, *found.encoder.std] != [*encoder.mean, *encoder.std]:
        words = " ".join(map(str, ["--mean", *found.encoder.mean, "--std", *found.encoder.std]))
        say(f"{path}: knows images normalised otherwise; {words} would go on with that")
    with torch.random.fork_rng(devices=[]):  # the rest of a method draws what it would draw without these weights
        encoder.load_state_dict(resize(found.encoder, encoder.image_size).state_dict())
    file = Path(path, "checkpoint.pt") if Path(path).is_dir() else Path(path)
    return from_checkpoint(found.encoder, file) if file.name == "checkpoint.pt" and file.exists() else found


def from_checkpoint(encoder: ViT, file: Path) -> Found:
    """The encoder of a run, and beside it what the run's checkpoint holds of its method."""
    saved = files.load(file, "give the encoder.safetensors beside it, for the encoder alone")
    try:
        state, heads = encoder_files.plain(file, saved["method"]), saved["settings"].get("decoder_heads")
    except (LookupError, TypeError, AttributeError):
        raise InputError(f"{file}: not a checkpoint of train.py; give another --init") from None
    return Found(encoder, {n: x for n, x in state.items() if not re.match(r"(\w*encoder|student)\.", n)}, heads)


def fill_decoder(method: nn.Module, encoder: ViT, found: Found, name: str) -> list[str]:
    """Copy MAE's decoder into a method that has it; a line each on what was taken, what was left, what begins anew."""
    state = {n: x for n, x in found.beside.items() if n.startswith("decoder") or n == "mask_token"}
    theirs = with_qkv({renamed(n.removeprefix("decoder."), DECODER): x for n, x in state.items()})
    taken, left = [encoder], parts(found.beside)
    if "embed.weight" in theirs:
        left = parts(found.beside.keys() - state.keys())
        if why := misfit(method, theirs, found):
            left.append(f"decoder ({why})")
        else:
            method.decoder.load_state_dict({n: x for n, x in theirs.items() if n != "pos_embed"})
            taken.append(method.decoder)
    known = {id(p) for part in taken for p in part.parameters()}
    anew = [n for n, p in method.named_parameters() if p.requires_grad and id(p) not in known]
    said = {"taken": ["encoder", "decoder"][: len(taken)], "left aside": left, "begins anew": parts(anew)}
    return [f"{name}: {what}: {', '.join(names)}" for what, names in said.items() if names]


def misfit(method: nn.Module, theirs: dict[str, Tensor], found: Found) -> str:
    """Why a decoder of MAE's kind cannot be the one of the method; "" if it can."""
    mine = getattr(method, "decoder", nn.Module()).state_dict()
    if "embed.weight" not in mine:
        return "this method has none of MAE's kind"
    heads = method.config.decoder_heads

    def kind(state: dict[str, Tensor], heads) -> dict:
        width, values = (state[n].shape[:1].numel() if n in state else 0 for n in ("embed.weight", "predict.weight"))
        return dict(decoder_width=width, decoder_depth=depth_of(state), decoder_heads=heads, values=values)

    if differs := files.differences(kind(theirs, found.decoder_heads or heads), kind(mine, heads)):
        return differs
    if {n: x.shape for n, x in theirs.items() if n != "pos_embed"} != {n: x.shape for n, x in mine.items()}:
        return "its parts are others"
    expected = sincos_positions(method.config.decoder_width, found.encoder.grid)
    x = theirs.get("pos_embed", expected)  # the method's own are fixed, and no part of its checkpoints
    fits = x.shape == expected.shape and torch.allclose(x.float(), expected, atol=1e-3)
    return "" if fits else "its positions are not MAE's sines and cosines"
