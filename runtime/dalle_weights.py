"""The published encoder of DALL-E's d-VAE: where it is, and its weights by the names of dvae.py."""

import re

PUBLISHED = (
    "https://huggingface.co/facebook/flava-image-codebook (pytorch_model.bin), or the state dict, saved by torch.save, "
    "of https://cdn.openai.com/dall-e/encoder.pkl"
)


def encoder(saved: dict) -> tuple[dict, dict]:
    """A state dict of DALL-E's or Hugging Face's → how to build the Tokenizer, and its encoder's weights."""
    weights = {our_name(name): value for name, value in saved.items()}
    (codes, _, _, _), (hidden, _, _, _) = (weights[f"encoder.{end}.weight"].shape for end in ("output", "input"))
    blocks = sum(name.startswith("encoder.groups.0") for name in weights) // 8  # four weights and biases in each
    return dict(codes=codes, hidden=hidden, blocks=blocks, decoder=False), weights


def our_name(theirs: str) -> str:
    """DALL-E's or Hugging Face's name of a weight → ours: blocks.group_1.block_2.res_path.conv_3.w …"""
    name = theirs.replace("res_path.path.", "res_path.").replace(".group.", ".")
    name = re.sub(r"group_(\d)\.block_(\d)", lambda m: f"groups.{int(m[1]) - 1}.{int(m[2]) - 1}", name)
    name = re.sub(r"res_path\.conv_(\d)", lambda m: f"convs.{int(m[1]) - 1}", name)
    name = name.replace("blocks.", "encoder.").replace("id_path", "skip").replace("output.conv", "output")
    return re.sub(r"\.(w|b)$", lambda m: {"w": ".weight", "b": ".bias"}[m[1]], name)
