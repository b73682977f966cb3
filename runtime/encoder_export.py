"""An encoder's weights written for timm or for transformers, with the lines of Python that read them there."""

import json
from pathlib import Path

from torch import Tensor

from common import ViT
from runtime import files
from runtime.encoder_import import HF, renamed
from runtime.errors import InputError

TARGETS = {"timm": "timm.pt", "hf": "hf"}  # what is written to where, beside the encoder


def export(encoder: ViT, kind: str) -> dict[str, Tensor]:
    """The state dict that timm's VisionTransformer ("timm") or transformers' ViTModel ("hf") has for these weights."""
    target = {"timm": "timm's VisionTransformer", "hf": "transformers' ViTModel"}[kind]
    settings, has_not = encoder.settings, f"which {target} has not; it cannot be exported there"
    if settings["stem"] != "linear":
        raise InputError(f"encoder: has a {settings['stem']} stem, {has_not}")
    if settings["positions"] != "sincos":
        raise InputError(f"encoder: has {settings['positions']} positions, {has_not}")
    state = {name: x.detach().cpu().clone() for name, x in encoder.state_dict().items()}
    if kind == "timm":
        return state
    if settings["layer_scale"]:
        raise InputError(f"encoder: has layer scale, {has_not}")
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
        intermediate_size=4 * encoder.width, hidden_act="gelu", layer_norm_eps=eps, qkv_bias=True,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made ({error.strerror}); give a directory with --to") from None
    files.save(path / "pytorch_model.bin", state)
    files.write_text(path / "config.json", json.dumps(config, indent=1) + "\n")
    return (
        f"from transformers import ViTModel\nvit = ViTModel.from_pretrained({str(path)!r}, add_pooling_layer=False)\n"
        + "tokens = vit(images).last_hidden_state  # (B, 1 + patches, width), the class token first"
    )
