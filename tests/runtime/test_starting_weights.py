"""What `--init` takes beside the encoder: MAE's decoder, from public weights and from runs, wherever it fits."""

import dataclasses

import pytest
import torch
from test_encoder_import import hf_model, mae_state
from test_train import OWN, SMALL

from common import ViT, sincos_positions
from runtime import files
from runtime.command_line import build_encoder
from runtime.errors import InputError
from runtime.starting_weights import fill, fill_decoder
from train import options

NANO = "--image-size 16 --patch-size 8 --width 8 --depth 2 --heads 2".split()  # as test_encoder_import's
DECODER = "--decoder-width 8 --decoder-depth 1 --decoder-heads 2".split()


def made(name: str, *flags, seed: int = 0):
    """A new method, its encoder and its settings."""
    args, config, Method = options(["--method", name, "--device", "cpu", *flags])
    torch.manual_seed(seed)
    encoder = build_encoder(args)
    return Method(encoder, config), encoder, vars(args) | dataclasses.asdict(config)


def given(name: str, file, *flags) -> tuple:
    """A new method that was given what the file holds, what was said, and the same one as its seed makes it."""
    method, encoder, _ = made(name, *flags)
    lines = fill_decoder(method, encoder, fill(encoder, file, 2), "it")
    return method, lines, made(name, *flags)[0]


def official(width: int = 8, depth: int = 1, values: int = 192) -> dict:
    """MAE's official weights, all random but the decoder's positions."""
    torch.manual_seed(5)
    shapes = {"decoder_embed": (width, 8), "decoder_norm": (width,), "decoder_pred": (values, width)}
    for i in range(depth):
        block = dict(norm1=(width,), norm2=(width,)) | {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
        block |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
        shapes |= {f"decoder_blocks.{i}.{part}": shape for part, shape in block.items()}
    state = mae_state() | {"mask_token": torch.randn(1, 1, width), "head.weight": torch.randn(3, 8)}
    for name, shape in shapes.items():
        state |= {f"{name}.weight": torch.randn(shape), f"{name}.bias": torch.randn(shape[:1])}
    return state | {"decoder_pos_embed": sincos_positions(width, (2, 2))}


OTHERS = {  # what differs: the method, its options, the weights, why the decoder is left
    "the same": ("mae", DECODER, official(), ""),
    "cmae": ("cmae", DECODER, official(), ""),
    "cmae_loc": ("cmae_loc", DECODER, official(), ""),
    "lcmae": ("lcmae", DECODER, official(), ""),
    "half precision": ("mae", DECODER, {n: x.half() for n, x in official().items()}, ""),
    "another image size": ("mae", [*DECODER, "--image-size", "32"], official(), ""),
    "depth": ("mae", DECODER, official(depth=2), "decoder_depth 2 there, 1 here"),
    "width": ("mae", DECODER, official(width=16), "decoder_width 16 there, 8 here"),
    "target": ("autoencoder", [*DECODER, "--block", "16"], official(), "values 192 there, 768 here"),
    "kind": ("lcmae", ["--decoder-width", "8", "--decoder", "conv"], official(), "decoder_depth 1 there, 0 here"),
    "parts": ("cmae_loc", [*DECODER, "--decoder", "conv"], official(), "its parts are others"),
    "none": ("conmim", ["--mask-cell", "1"], official(), "this method has none of MAE's kind"),
    "positions": (
        "mae", DECODER, official() | {"decoder_pos_embed": torch.randn(1, 5, 8)},
        "its positions are not MAE's sines and cosines",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERS)
def test_a_decoder_is_taken_where_it_fits_and_else_named_with_what_differs(tmp_path, what):
    name, flags, state, why = OTHERS[what]
    torch.save(dict(model=state), tmp_path / "mae.pth")
    method, lines, fresh = given(name, tmp_path / "mae.pth", *NANO, *flags)
    assert lines[0] == ("it: taken: encoder" if why else "it: taken: encoder, decoder")
    assert lines[1] == (f"it: left aside: head, decoder ({why})" if why else "it: left aside: head")
    for key, x in method.state_dict().items():
        if key.startswith("decoder.") and not why:
            theirs = "mask_token" if key == "decoder.mask_token" else key.replace("decoder.", "decoder_", 1)
            assert torch.equal(x, state[theirs.replace("predict", "pred")].float()), key
        elif not key.startswith(("encoder", "student", "momentum_encoder", "slow_encoder")):
            assert torch.equal(x, fresh.state_dict()[key]), key


def test_the_configuration_beside_the_weights_says_the_decoders_heads(tmp_path):
    hf_model("ViTMAEForPreTraining", decoder_num_attention_heads=4, decoder_intermediate_size=32).save_pretrained(
        tmp_path
    )
    lines = given("mae", tmp_path, *NANO, *DECODER)[1]
    assert lines[1] == "it: left aside: decoder (decoder_heads 4 there, 2 here)"


def test_images_that_the_weights_know_by_another_deviation_alone_are_said(tmp_path, capsys):
    theirs = ViT(16, 8, 8, 2, 2, std=[0.5, 0.6, 0.7])
    files.save_weights(tmp_path / "e.safetensors", theirs.settings, theirs.state_dict(), "a test")
    fill(ViT(16, 8, 8, 2, 2, std=[0.5, 0.6, 0.7]), tmp_path / "e.safetensors")
    assert capsys.readouterr().err == ""
    fill(ViT(16, 8, 8, 2, 2), tmp_path / "e.safetensors")
    assert "--std 0.5 0.6 0.7 would go on with that" in capsys.readouterr().err


def save_run(place, name: str, *flags) -> dict:
    method, _, settings = made(name, *flags, seed=1)
    checkpoint = dict(step=3, settings=settings, method=method.state_dict())
    files.save(place / "checkpoint.pt", checkpoint)
    files.save_weights(place / "encoder.safetensors", method.encoder.settings, method.encoder.state_dict(), "a test")
    return checkpoint


@pytest.mark.parametrize("theirs, ours", [("mae", "cmae"), ("cmae", "mae"), ("lcmae", "cmae_loc")])
def test_a_run_gives_its_decoder_to_whatever_method_has_the_same(tmp_path, theirs, ours):
    state = save_run(tmp_path, theirs, *SMALL, *OWN[theirs])["method"]
    for path in (tmp_path, tmp_path / "checkpoint.pt"):
        args, config, Method = options(["--method", ours, *SMALL, *OWN[ours]])
        encoder = build_encoder(args)
        found = fill(encoder, path)
        method = Method(encoder, config)
        assert fill_decoder(method, encoder, found, "it")[0] == "it: taken: encoder, decoder"
        for key, x in method.state_dict().items():
            if key.startswith(("encoder.", "decoder.")):
                assert torch.equal(x, state[key]), key
            elif key.startswith("momentum_encoder."):
                assert torch.equal(x, state[key.removeprefix("momentum_")]), key
    file = tmp_path / "encoder.safetensors"
    encoder = build_encoder(args)
    lines = fill_decoder(Method(encoder, config), encoder, fill(encoder, file), "it")
    assert lines[0] == "it: taken: encoder" and "begins anew: decoder" in lines[1]


def test_a_run_whose_decoder_has_other_heads_keeps_it(tmp_path):
    save_run(tmp_path, "mae", *SMALL, *OWN["mae"])
    args, config, Method = options(["--method", "mae", *SMALL, *OWN["mae"], "--decoder-heads", "4"])
    encoder = build_encoder(args)
    lines = fill_decoder(Method(encoder, config), encoder, fill(encoder, tmp_path), "it")
    assert lines[1] == "it: left aside: decoder (decoder_heads 2 there, 4 here)"


WRONG = {
    "a list": lambda good: [1, 2],
    "no method": lambda good: {key: x for key, x in good.items() if key != "method"},
    "no settings": lambda good: {key: x for key, x in good.items() if key != "settings"},
    "a method of words": lambda good: good | dict(method=dict(decoder="words")),
    "more than it holds": lambda good: good | dict(method={"decoder.embed.weight": torch.zeros(1).expand(10**12)}),
}


@pytest.mark.parametrize("what", [*WRONG, "half a file"])
def test_what_is_no_checkpoint_is_one_line(tmp_path, what):
    flags, file = [*SMALL, *OWN["mae"]], tmp_path / "checkpoint.pt"
    good = save_run(tmp_path, "mae", *flags)
    if what in WRONG:
        files.save(file, WRONG[what](good))
    else:
        file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(InputError) as error:
        fill(made("mae", *flags)[1], tmp_path)
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)
