"""Encoders read from files (our runs', MAE's official weights, timm's, Hugging Face's), and written for the last two.

Read are a run's directory or its encoder; `mae_pretrain_vit_*.pth` and timm's `VisionTransformer`, which share their
names; `ViTMAE…` and `ViT…` of transformers, as a directory or a file. Every tensor of the encoder must be there in its
shape, and what else there is must be a known decoder or classifier, which is named and left aside; anything else
(registers, query norms, relative positions in every block) is refused by name. No file can run code.

Read too are checkpoints named as the official code of CMAE, CAE and ConMIM names its parts (`OFFICIAL`): the encoder
alone, without teacher, decoders and heads. It is tried on weights made up under those names, not on the papers' files.

A state dict says neither the number of heads nor LayerNorm's epsilon. Where a Hugging Face config.json lies beside it,
that does. Otherwise heads follow from the width (`HEADS`), and epsilon is 1e-6 (ours, MAE's, timm's) or, under Hugging
Face's names, its default 1e-12. Nor does it say how images were normalised: evaluate.py uses ImageNet's mean and
deviation, as MAE does, unless told otherwise; some of timm's and Hugging Face's ViTs were trained with 0.5 and 0.5.
Imported positions stay fixed, as ours.
"""

import argparse
import json
import math
import re
import sys
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import SIZES, ViT, pair, relative_places
from runtime import files
from runtime.errors import InputError
from runtime.ranks import rank

# By width: our sizes, and the ViT paper's huge.
HEADS = {width: heads for width, _, heads in SIZES.values()} | {1280: 16}

# Hugging Face's parts by timm's names. Those of a block have one name in all files that transformers has written, and
# since its version 5 another one in memory. Queries, keys and values are apart there.
HF_BLOCK = {
    "norm1": ("layernorm_before", "layernorm_before"),
    "attn.q": ("attention.attention.query", "attention.q_proj"),
    "attn.k": ("attention.attention.key", "attention.k_proj"),
    "attn.v": ("attention.attention.value", "attention.v_proj"),
    "attn.proj": ("attention.output.dense", "attention.o_proj"),
    "norm2": ("layernorm_after", "layernorm_after"),
    "mlp.fc1": ("intermediate.dense", "mlp.fc1"),
    "mlp.fc2": ("output.dense", "mlp.fc2"),
}
HF = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
HF |= {f"blocks.#.{ours}": f"encoder.layer.#.{theirs}" for ours, (theirs, _) in HF_BLOCK.items()}
TIMM = {theirs: ours for ours, theirs in HF.items()}
TIMM |= {f"layers.#.{theirs}": f"blocks.#.{ours}" for ours, (_, theirs) in HF_BLOCK.items()}

# The official code's names by timm's: CMAE's are MMSelfSup's, CAE's and ConMIM's are BEiT's, where keys have no bias.
OFFICIAL = {
    "patch_embed.projection": "patch_embed.proj", "ln1": "norm",
    "layers.#.ln1": "blocks.#.norm1", "layers.#.attn.qkv": "blocks.#.attn.qkv",
    "layers.#.attn.proj": "blocks.#.attn.proj", "layers.#.ln2": "blocks.#.norm2",
    "layers.#.ffn.layers.0.0": "blocks.#.mlp.fc1", "layers.#.ffn.layers.1": "blocks.#.mlp.fc2",
    "blocks.#.gamma_1": "blocks.#.ls1.gamma", "blocks.#.gamma_2": "blocks.#.ls2.gamma",
    "rel_pos_bias.relative_position_bias_table": "relative_table",
}  # fmt: skip

TARGETS = {"timm": "timm.pt", "hf": "hf"}  # what an encoder is written for, and to where beside it

# Decoders of MAE and ViTMAE, and classifiers: no part of an encoder.
ASIDE = re.compile(r"decoder|(embeddings\.)?mask_token$|((lm_)?head|fc_norm|pre_logits|classifier|pooler|projector)\.")


def load_encoder(path, device="cpu", image_size=None, heads: int | None = None) -> ViT:
    """The encoder of a run or of a file of weights, in evaluation mode, for images of `image_size` if that is given.

    `heads` is for others' weights, and goes before what their configuration says or their width suggests.
    """
    file = weights_file(Path(path))
    encoder, beside, _ = read_encoder(file, heads)
    if beside and rank() == 0:
        print(f"{file}: left aside: {', '.join(parts(beside))}", file=sys.stderr, flush=True)
    return resize(encoder, image_size or encoder.image_size).to(device).eval()


def normalised(encoder: ViT, mean=None, std=None) -> ViT:
    """The encoder, for images that are normalised by these three numbers each, where they are given."""
    for name, numbers in (("mean", mean), ("std", std)):
        if numbers:
            encoder.settings[name] = numbers
            setattr(encoder, name, numbers)
    return encoder


class Found(NamedTuple):
    encoder: ViT
    beside: dict[str, Tensor]  # what else the file holds, by its own names
    decoder_heads: int | None = None  # of a decoder beside it, where the file says so


def read_encoder(file: Path, heads: int | None = None) -> Found:
    """The encoder of a file, for the image size of its positions."""
    saved = read(file)
    if not (isinstance(saved, dict) and "settings" in saved):
        return foreign_encoder(file, saved, heads)
    try:
        state = plain(file, saved["state_dict"])
        encoder = filled(outline(file, saved["settings"], state), state)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError):  # a stranger's
        raise unknown(file) from None
    if heads not in (None, encoder.settings["heads"]):
        raise InputError(f"{file}: says itself how many heads it has; leave out --heads {heads}")
    return Found(encoder, {})


def untrained(encoder: ViT, seed: int = 0) -> ViT:
    """The same architecture at its initial weights, a function of the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViT(**encoder.settings).to(encoder.cls_token.device).eval()


def weights_file(path: Path) -> Path:
    """A run's or transformers' file in a directory, or the file itself."""
    path = path.parent if path.name == "checkpoint.pt" else path
    names = ("model.safetensors", "pytorch_model.bin")
    found = [files.encoder_in(path), *(path / name for name in names)] if path.is_dir() else [path]
    for file in found:
        if file.is_file():
            return file
    nor = f", nor {' or '.join(names)} beside it" if path.is_dir() else ""
    raise InputError(f"{found[0]}: no such file{nor}; give a run whose method keeps an encoder, or weights")


def read(file: Path):
    """What torch or safetensors saved in a file, on the CPU."""
    try:
        if file.suffix == ".safetensors":
            return files.load_weights(file)
        # The options, in MAE's and timm's own checkpoints. torch warns of pickles that it then refuses.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if zipfile.is_zipfile(file):
                return files.load(file)
            return torch.load(file, map_location="cpu", weights_only=True)  # torch's format before 1.6
    except InputError:
        raise
    except Exception:  # safetensors, pickle and torch raise every kind there is
        right = "give an encoder.safetensors, .pt, .pth or .bin"
        raise InputError(f"{file}: damaged, or no weights without code; {right}") from None


def unknown(file: Path) -> InputError:
    right = "give an encoder that train.py wrote, or weights named as MAE's, timm's or Hugging Face's"
    return InputError(f"{file}: not a minMIM encoder; {right}")


def foreign_encoder(file: Path, saved, heads: int | None) -> Found:
    """Others' weights: a state dict, or one under "model" (MAE) or "state_dict" (timm's training)."""
    state = saved
    for key in ("model", "state_dict"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    state, beside, config, eps = plain(file, state), {}, {}, 1e-6
    kernel = "embeddings.patch_embeddings.projection.weight"
    if theirs := [name for name in state if name.endswith(kernel)]:
        config = hf_config(file.parent / "config.json")
        eps = config.get("layer_norm_eps", 1e-12)
        state = timm_names(state, prefix=theirs[0].removesuffix(kernel))
    else:
        state, beside = official_names(state)
    kernel = state.get("patch_embed.proj.weight")
    if kernel is None or kernel.ndim != 4 or min(kernel.shape) == 0:
        raise unknown(file)
    width, _, patch_size, _ = kernel.shape
    relative = "relative_table" in state
    if relative and state["relative_table"].ndim == 2:
        heads = heads or state["relative_table"].shape[1]
    if heads is None:
        heads = config.get("num_attention_heads", HEADS.get(width))
    if heads is None:
        raise InputError(f"{file}: width {width} does not tell the number of heads; give --heads")
    if heads < 1 or width % heads:
        raise InputError(f"{file}: width {width} cannot be divided among {heads} heads; give --heads")
    settings = dict(
        image_size=original_size(file, state, patch_size, config), patch_size=patch_size, width=width,
        depth=depth_of(state), heads=heads,
        layer_scale=1e-5 * any(name.endswith("ls1.gamma") for name in state),  # the scale is read, its start unknown
        positions="relative" if relative else "sincos", mlp_ratio=mlp_ratio(state, width),
    )  # fmt: skip
    encoder = outline(file, settings, state)
    if relative:
        state.setdefault("pos_embed", torch.zeros(encoder.pos_embed.shape))
    beside |= {name: x for name, x in state.items() if ASIDE.match(name)}
    encoder = with_epsilon(filled(encoder, compared(file, state, encoder.state_dict())), eps)
    return Found(encoder, beside, config.get("decoder_heads"))


def plain(file: Path, state) -> dict[str, Tensor]:
    """A state dict as it is, unless it is none, or claims tensors that the file does not hold."""
    if not isinstance(state, dict) or not all(isinstance(n, str) and isinstance(x, Tensor) for n, x in state.items()):
        raise unknown(file)
    for x in state.values():
        dense = x.layout == torch.strided and x.device.type == "cpu" and not x.is_quantized
        if not dense or x.untyped_storage().nbytes() < x.numel() * x.element_size():
            raise unknown(file)
    return state


def outline(file: Path, settings: dict, state: dict[str, Tensor]) -> ViT:
    """The encoder of these settings without its numbers, which costs nothing before all shapes are known to fit."""
    if settings["depth"] != depth_of(state):
        raise unknown(file)
    patches = math.prod(side // settings["patch_size"] for side in pair(settings["image_size"]))
    if settings.get("positions") == "relative" and patches > 64**2:  # which are how far apart takes their square
        raise InputError(f"{file}: relative positions of {patches:,} patches; at most 4,096 can be used")
    with torch.device("meta"):
        return ViT(**settings)


def filled(encoder: ViT, state: dict[str, Tensor]) -> ViT:
    """An outline with its numbers."""
    encoder.load_state_dict(state, assign=True)
    if encoder.relative_table is not None:
        encoder.relative_places = relative_places(encoder.grid)
    return encoder


def mlp_ratio(state: dict[str, Tensor], width: int) -> float:
    """By the first block; where that has none, it will be missed by name."""
    first = state.get("blocks.0.mlp.fc1.bias")
    return 4 if first is None or first.ndim != 1 else len(first) / width


def depth_of(state: dict[str, Tensor]) -> int:
    return len({name.split(".")[1] for name in state if name.startswith("blocks.")})


def hf_config(file: Path) -> dict:
    """What transformers' configuration beside the weights says of a ViT; nothing where there is none."""
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text())
        size = found["image_size"]
        config = dict(
            image_size=(int(size[0]), int(size[1])) if isinstance(size, list) else int(size),
            num_attention_heads=int(found["num_attention_heads"]),
            layer_norm_eps=float(found.get("layer_norm_eps", 1e-12)),
            decoder_heads=found.get("decoder_num_attention_heads"),
        )
        if min(pair(config["image_size"])) < 1:
            raise ValueError
        activation = found.get("hidden_act", "gelu")
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        raise InputError(f"{file}: not a ViT's configuration; give the one that transformers wrote") from None
    if activation != "gelu":
        raise InputError(f"{file}: hidden_act is {activation}; this encoder has gelu only")
    return config


def renamed(name: str, names: dict[str, str]) -> str:
    """`layers.3.mlp.fc1.bias` → `blocks.3.mlp.fc1.bias` by a table of parts; an unknown name stays what it is."""
    part, dot, kind = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "")
    number = re.search(r"(?<=\.)\d+(?=\.)", part)
    if number:
        part = part[: number.start()] + "#" + part[number.end() :]
    return names[part].replace("#", number[0] if number else "#") + dot + kind if part in names else name


def timm_names(state: dict, prefix: str) -> dict:
    """transformers' state dict → timm's: names without "vit.", and queries, keys and values in one matrix."""
    return with_qkv({renamed(name.removeprefix(prefix), TIMM): x for name, x in state.items()})


def with_qkv(state: dict) -> dict:
    for name in [n for n in state if ".attn.q." in n]:
        three = [name.replace(".q.", f".{part}.") for part in "qkv"]
        if all(n in state and state[n].shape == state[name].shape != () for n in three):  # else they will be named
            state[name.replace(".q.", ".qkv.")] = torch.cat([state.pop(n) for n in three])
    return state


def official_names(state: dict) -> tuple[dict, dict]:
    """The official CMAE's, CAE's or ConMIM's state dict → the encoder's, by timm's names, and what else there is."""
    beside: dict[str, Tensor] = {}
    for prefix in ("encoder.", "backbone."):
        if any(name.startswith(f"{prefix}patch_embed.proj") for name in state):
            beside |= {name: x for name, x in state.items() if not name.startswith(prefix)}
            state = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
    state = {renamed(name, OFFICIAL): x for name, x in state.items() if name != "rel_pos_bias.relative_position_index"}
    for q in [name for name in state if name.endswith("attn.q_bias")]:
        v = q.replace("q_bias", "v_bias")
        if v in state and state[v].ndim == state[q].ndim == 1:  # else it will be named
            q_bias, v_bias = state.pop(q), state.pop(v)
            state[q.replace("q_bias", "qkv.bias")] = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
    return state, beside


def original_size(file: Path, state: dict, patch_size: int, config: dict) -> int | tuple[int, int]:
    """The size of the images that the positions are for: a square's, where no configuration says otherwise."""
    if "image_size" in config:
        return config["image_size"]
    if "relative_table" in state:
        rows = state["relative_table"].shape[:1].numel()
        return max(1, (math.isqrt(max(0, rows - 3)) + 1) // 2) * patch_size
    positions = state.get("pos_embed", torch.empty(1, 2, 0))  # where there are none, they will be missed by name
    rows = positions.shape[1] - 1 if positions.ndim == 3 else 0
    side = math.isqrt(max(0, rows))
    if rows < 1 or side**2 != rows:
        shape = "x".join(map(str, positions.shape))
        raise InputError(f"{file}: pos_embed is {shape}; needed is a row for the class token, then a square of patches")
    return side * patch_size


def compared(file: Path, state: dict, expected: dict) -> dict:
    """The tensors of `expected`, all there and in its shapes, and beside them nothing strange."""
    missing, more = [n for n in expected if n not in state], [n for n in state if n not in expected]
    if "fc_norm.weight" in more and "norm.weight" in missing:
        raise InputError(f"{file}: has fc_norm, which follows the mean, and no norm; give weights that have norm")
    strange = [n for n in more if not ASIDE.match(n)]
    if missing or strange:
        wrong = [f"lacks {few(missing)}"] * bool(missing) + [f"has {few(strange)}"] * bool(strange)
        right = "give a plain ViT: class token, absolute positions, biases, a final norm and nothing else"
        raise InputError(f"{file}: {' and '.join(wrong)}; {right}")
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            theirs, ours = ("x".join(map(str, x.shape)) for x in (state[name], tensor))
            raise InputError(f"{file}: {name} is {theirs} where this encoder has {ours}; give a plain ViT")
    return {name: state[name].float() for name in expected}


def parts(names) -> list[str]:
    return sorted({name.split(".")[0] for name in names})


def few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def with_epsilon(encoder: ViT, eps: float) -> ViT:
    for part in encoder.modules():
        if isinstance(part, nn.LayerNorm):
            part.eps = eps
    return encoder


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
    return with_epsilon(resized, encoder.norm.eps)


def export(encoder: ViT, kind: str) -> dict[str, Tensor]:
    """The state dict that timm's VisionTransformer ("timm") or transformers' ViTModel ("hf") has for these weights."""
    target = {"timm": "timm's VisionTransformer", "hf": "transformers' ViTModel"}[kind]
    stem, positions, layer_scale = (encoder.settings[name] for name in ("stem", "positions", "layer_scale"))
    special = {f"a {stem} stem": stem != "linear", f"{positions} positions": positions != "sincos"}
    for what, has in (special | {"layer scale": kind == "hf" and layer_scale}).items():
        if has:
            raise InputError(f"encoder: has {what}, which {target} has not; it cannot be exported there")
    state = {name: x.detach().cpu().clone() for name, x in encoder.state_dict().items()}
    if kind == "timm":
        return state
    for name in [n for n in state if "attn.qkv." in n]:
        for part, x in zip("qkv", state.pop(name).chunk(3), strict=True):
            state[name.replace("attn.qkv.", f"attn.{part}.")] = x.clone()
    return {renamed(name, HF): x for name, x in state.items()}


def write_export(encoder: ViT, kind: str, path) -> str:
    """Write a file for timm, or a directory for transformers → the lines of Python that read it."""
    path, state = Path(path), export(encoder, kind)
    size, settings, eps = encoder.image_size, encoder.settings, encoder.norm.eps
    if kind == "timm":
        files.save(path, state)
        more = f", init_values={settings['layer_scale']}" if settings["layer_scale"] else ""
        more += f", mlp_ratio={settings['mlp_ratio']}" if settings["mlp_ratio"] != 4 else ""
        more += f", norm_layer=partial(torch.nn.LayerNorm, eps={eps})" if eps != 1e-6 else ""
        return (
            ("from functools import partial\n" if "partial" in more else "")
            + "import torch\nfrom timm.models.vision_transformer import VisionTransformer\n"
            + f"vit = VisionTransformer(img_size={size}, patch_size={encoder.patch_size}, embed_dim={encoder.width}, "
            + f"depth={settings['depth']}, num_heads={settings['heads']}, num_classes=0{more}).eval()\n"
            + f"vit.load_state_dict(torch.load({str(path)!r}, weights_only=True))\n"
            + "tokens = vit.forward_features(images)  # (B, 1 + patches, width), the class token first"
        )
    config = dict(
        model_type="vit", architectures=["ViTModel"], image_size=size, patch_size=encoder.patch_size, num_channels=3,
        hidden_size=encoder.width, num_hidden_layers=settings["depth"], num_attention_heads=settings["heads"],
        intermediate_size=encoder.blocks[0].mlp.fc1.out_features, hidden_act="gelu", layer_norm_eps=eps, qkv_bias=True,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    files.save(path / "pytorch_model.bin", state)
    files.write_text(path / "config.json", json.dumps(config, indent=1) + "\n")
    return (
        f"from transformers import ViTModel\nvit = ViTModel.from_pretrained({str(path)!r}, add_pooling_layer=False)\n"
        + "tokens = vit(images).last_hidden_state  # (B, 1 + patches, width), the class token first"
    )
