"""Encoders from files: the features of timm and transformers for the same weights; other files refused in one line."""

import argparse
import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import ViT
from runtime import encoder_files, files
from runtime.encoder_files import interpolate, load_encoder, resize
from runtime.errors import InputError
from runtime.starting_weights import fill

SMALL = dict(image_size=16, patch_size=8, width=8, depth=2, heads=2)


def random_vit(**settings) -> ViT:
    """An encoder in which every number is random, so that none can be left out or taken for another."""
    torch.manual_seed(0)
    encoder = ViT(**SMALL | settings).eval()
    for x in encoder.state_dict().values():
        x.normal_(std=0.4)
    return encoder


def pictures(height: int = 16, width: int | None = None) -> Tensor:
    return torch.randn(3, 3, height, width or height, generator=torch.Generator().manual_seed(1))


def features(model, images=None) -> Tensor:
    with torch.no_grad():
        found = (model.forward_features if hasattr(model, "forward_features") else model)(
            pictures() if images is None else images
        )
    return found if isinstance(found, Tensor) else found.last_hidden_state


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def timm_vit(**settings):
    timm = pytest.importorskip("timm")
    torch.manual_seed(2)
    small = dict(img_size=16, patch_size=8, embed_dim=8, depth=2, num_heads=2, num_classes=0)
    model = timm.models.vision_transformer.VisionTransformer(**small | settings).eval()
    for x in model.state_dict().values():
        x.normal_(std=0.4)
    return model


def hf_config(name: str = "ViTConfig", **settings):
    small = dict(image_size=16, patch_size=8, hidden_size=8, num_hidden_layers=2, num_attention_heads=2)
    decoder = dict(decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=2)
    more = dict(intermediate_size=32, encoder_stride=8) | decoder | dict(decoder_intermediate_size=16)
    return getattr(pytest.importorskip("transformers"), name)(**small | more | settings)


def hf_model(name: str, scale: float = 0.4, **settings):
    """Random in every number; at a small `scale` of the embeddings LayerNorm's epsilon shows in the features."""
    config = hf_config("ViTMAEConfig" if "MAE" in name else "ViTConfig", **settings)
    torch.manual_seed(3)
    model = getattr(pytest.importorskip("transformers"), name)(config).eval()
    for key, x in model.state_dict().items():
        x.normal_(std=scale if "embeddings" in key else 0.4)
    return model


def hf_features(model, images=None) -> Tensor:
    """Of a ViTMAE all patches, in their order: nothing masked, and noise that sorts to what it is."""
    images = pictures() if images is None else images
    encoder = getattr(model, "vit", model)
    more = {}
    if "MAE" in type(model).__name__:
        encoder.config.mask_ratio = 0.0
        more["noise"] = torch.arange(encoder.config.image_size**2 // encoder.config.patch_size**2).expand(3, -1).float()
    with torch.no_grad():
        return encoder(images, **more).last_hidden_state


def test_a_run_is_read_from_its_directory_and_from_its_file(tmp_path):
    encoder = random_vit(layer_scale=0.1, positions="relative", stem="conv")
    files.save_weights(tmp_path / "encoder.safetensors", encoder.settings, encoder.state_dict(), "a test")
    torch.save(dict(settings=encoder.settings, state_dict=encoder.state_dict()), tmp_path / "encoder.pt")
    for path in (tmp_path / "encoder.pt", tmp_path / "encoder.safetensors", tmp_path, str(tmp_path)):
        found = load_encoder(path)
        assert found.settings == encoder.settings and not found.training
        assert torch.equal(features(found), features(encoder))
        (tmp_path / "encoder.pt").write_bytes(b"an older version's")  # is read no longer


def test_a_run_says_itself_how_many_heads_it_has(tmp_path):
    encoder = random_vit()
    torch.save(dict(settings=encoder.settings, state_dict=encoder.state_dict()), tmp_path / "encoder.pt")
    with pytest.raises(InputError, match="leave out --heads 4"):
        load_encoder(tmp_path, heads=4)


def mae_names(depth: int) -> list[str]:
    """The encoder of mae_pretrain_vit_*.pth, in its order."""
    block = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    parts = ["patch_embed.proj", *(f"blocks.{i}.{part}" for i in range(depth) for part in block), "norm"]
    return ["cls_token", "pos_embed", *(f"{part}.{kind}" for part in parts for kind in ("weight", "bias"))]


def mae_state(**settings) -> dict:
    state = random_vit(**settings).state_dict()
    return {name: state[name] for name in mae_names(len(state) // 12)}


def mae_decoder() -> dict:
    """What mae_visualize_vit_*_full.pth and a checkpoint of MAE's pretraining hold besides."""
    names = ["decoder_embed", "decoder_blocks.0.norm1", "decoder_blocks.0.attn.qkv", "decoder_norm", "decoder_pred"]
    tensors = {f"{name}.{kind}": torch.zeros(2) for name in names for kind in ("weight", "bias")}
    return {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 5, 8)} | tensors


@pytest.mark.parametrize("form", ["model", "bare", "full", "checkpoint", "legacy", "half", "safetensors"])
def test_maes_official_weights_give_the_features_that_timm_gives(tmp_path, capsys, form):
    state, file = mae_state(), tmp_path / "mae_pretrain_vit_base.pth"
    model = timm_vit()
    model.load_state_dict(state)
    if form == "half":  # and what was saved in 16 bits works in 32
        state = {name: x.half() for name, x in state.items()}
        model.load_state_dict(state)
    full = state | mae_decoder()
    options = argparse.Namespace(model="mae_vit_base_patch16", lr=1e-3, device="cuda")
    if form == "safetensors":
        file = tmp_path / "mae.safetensors"
        safetensors.torch.save_file({name: x.clone() for name, x in state.items()}, file)
    else:
        checkpoint = dict(model=full, optimizer={"state": {}}, epoch=7, scaler={}, args=options)
        saved = dict(model=dict(model=state), full=dict(model=full), checkpoint=checkpoint).get(form, state)
        torch.save(saved, file, _use_new_zipfile_serialization=form != "legacy")
    encoder = load_encoder(file, heads=2)
    assert not encoder.training and {x.dtype for x in encoder.state_dict().values()} == {torch.float32}
    assert encoder.settings == random_vit().settings
    same(features(encoder), features(model))
    aside = "decoder_blocks, decoder_embed, decoder_norm, decoder_pos_embed, decoder_pred, mask_token"
    named = form in ("full", "checkpoint")
    assert capsys.readouterr() == ("", f"{file}: left aside: {aside}\n" if named else "")


def test_imported_weights_can_be_trained_and_their_positions_cannot(tmp_path):
    torch.save(mae_state(), tmp_path / "mae.pth")
    encoder = load_encoder(tmp_path / "mae.pth", heads=2)
    encoder(pictures()).square().sum().backward()
    assert all(p.grad is not None and p.device.type == "cpu" for p in encoder.parameters())
    assert "pos_embed" not in dict(encoder.named_parameters())


@pytest.mark.parametrize("width, heads", [(128, 4), (192, 3)])
def test_known_widths_tell_the_heads(tmp_path, width, heads):
    torch.save(mae_state(width=width, heads=heads), tmp_path / "mae.pth")
    model = timm_vit(embed_dim=width, num_heads=heads)
    model.load_state_dict(mae_state(width=width, heads=heads))
    same(features(load_encoder(tmp_path / "mae.pth")), features(model))


def test_the_heads_of_published_models():
    published = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}  # DeiT, ViT; large and huge have 16 both
    assert published.items() <= encoder_files.HEADS.items()


@pytest.mark.parametrize("settings", [{}, dict(num_classes=3), dict(init_values=0.1), dict(mlp_ratio=3)], ids=str)
def test_timms_weights_give_timms_features(tmp_path, capsys, settings):
    model = timm_vit(**settings)
    torch.save({"state_dict": model.state_dict(), "arch": "vit"}, tmp_path / "timm.pth")
    encoder = load_encoder(tmp_path / "timm.pth", heads=2)
    same(features(encoder), features(model))
    assert bool(encoder.settings["layer_scale"]) == ("init_values" in settings)
    assert capsys.readouterr().err == (f"{tmp_path / 'timm.pth'}: left aside: head\n" if model.num_classes else "")


TIMM_ONLY = {
    "fc_norm": dict(global_pool="avg", num_classes=3),
    "lacks blocks.0.attn.qkv.bias, blocks.1.attn.qkv.bias;": dict(qkv_bias=False),
    "has blocks.0.attn.q_norm.weight": dict(qk_norm=True),
    "has reg_token;": dict(reg_tokens=2, no_embed_class=True),
    "lacks cls_token;": dict(class_token=False, global_pool="", img_size=24, patch_size=12),
    "lacks pos_embed;": dict(pos_embed="none"),
    "has norm_pre.weight, norm_pre.bias;": dict(pre_norm=True),
    "pos_embed is 1x4x8": dict(no_embed_class=True),
    "patch_embed.proj.weight is 8x1x8x8": dict(in_chans=1),
}


@pytest.mark.parametrize("words", TIMM_ONLY)
def test_what_our_vit_has_not_is_refused_by_name(tmp_path, words):
    state = timm_vit(**TIMM_ONLY[words]).state_dict()
    if words.startswith(("lacks cls", "has reg")):  # 4 patches become 5 rows, so that only the name is wrong
        state["pos_embed"] = torch.zeros(1, 5, 8)
    torch.save(state, tmp_path / "timm.pth")
    with pytest.raises(InputError) as error:
        load_encoder(tmp_path / "timm.pth", heads=2)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "timm.pth"))


def test_many_names_are_counted(tmp_path):
    torch.save(timm_vit(qk_norm=True).state_dict(), tmp_path / "timm.pth")
    with pytest.raises(InputError, match=r"q_norm.bias, blocks.0.attn.k_norm.weight and 5 more; give"):
        load_encoder(tmp_path / "timm.pth", heads=2)


HF_MODELS = {
    "ViTMAEForPreTraining": "decoder",
    "ViTMAEModel": None,
    "ViTModel": "pooler",
    "ViTForImageClassification": "classifier",
    "ViTForMaskedImageModeling": "decoder, embeddings",  # whose mask token is among the embeddings
}


@pytest.mark.parametrize("scale", [0.4, 0.01])
@pytest.mark.parametrize("name", HF_MODELS)
def test_a_transformers_directory_gives_transformers_features(tmp_path, capsys, name, scale):
    model = hf_model(name, scale)
    model.save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    assert encoder.settings["heads"] == 2
    same(features(encoder), hf_features(model))
    aside = HF_MODELS[name]
    assert capsys.readouterr().err.endswith(f"left aside: {aside}\n" if aside else "")


@pytest.mark.parametrize("name", ["ViTMAEForPreTraining", "ViTModel"])
def test_the_names_that_transformers_has_in_memory_are_read_too(tmp_path, name):
    model = hf_model(name, scale=0.01)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    same(features(load_encoder(tmp_path, heads=2)), hf_features(model))


HF_BLOCK = {  # of transformers 4, and of 5 in memory
    4: "layernorm_before attention.attention.query attention.attention.key attention.attention.value "
    "attention.output.dense layernorm_after intermediate.dense output.dense",
    5: "layernorm_before attention.q_proj attention.k_proj attention.v_proj attention.o_proj layernorm_after "
    "mlp.fc1 mlp.fc2",
}


def hf_state(version: int, prefix: str = "") -> dict:
    """`random_vit`, under the names of Hugging Face, written out."""
    state, found = random_vit().state_dict(), {}
    found["embeddings.cls_token"] = state["cls_token"]
    found["embeddings.position_embeddings"] = state["pos_embed"]
    for kind in ("weight", "bias"):
        found[f"embeddings.patch_embeddings.projection.{kind}"] = state[f"patch_embed.proj.{kind}"]
        found[f"layernorm.{kind}"] = state[f"norm.{kind}"]
        for i in range(2):
            ours = {part: state[f"blocks.{i}.{part}.{kind}"] for part in ("norm1", "attn.proj", "norm2")}
            qkv, fc1, fc2 = (state[f"blocks.{i}.{part}.{kind}"] for part in ("attn.qkv", "mlp.fc1", "mlp.fc2"))
            tensors = [ours["norm1"], qkv[:8], qkv[8:16], qkv[16:], ours["attn.proj"], ours["norm2"], fc1, fc2]
            layer = f"encoder.layer.{i}" if version == 4 else f"layers.{i}"
            for part, x in zip(HF_BLOCK[version].split(), tensors, strict=True):
                found[f"{layer}.{part}.{kind}"] = x
    return {prefix + name: x.clone() for name, x in found.items()}


@pytest.mark.parametrize("version", HF_BLOCK)
@pytest.mark.parametrize("prefix", ["", "vit.", "vit_mae."])
def test_both_layouts_are_read_with_or_without_a_prefix(tmp_path, prefix, version):
    torch.save(hf_state(version, prefix), tmp_path / "weights.pt")
    found, encoder = load_encoder(tmp_path / "weights.pt", heads=2), random_vit()
    for name, x in encoder.state_dict().items():
        assert torch.equal(found.state_dict()[name], x), name
    assert {part.eps for part in found.modules() if isinstance(part, nn.LayerNorm)} == {1e-12}


def test_a_transformers_directory_without_an_epsilon_has_transformers_own(tmp_path):
    hf_model("ViTModel").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["layer_norm_eps"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_encoder(tmp_path).norm.eps == hf_config("ViTConfig").layer_norm_eps


def test_the_configuration_says_heads_epsilon_and_the_shape_of_the_grid(tmp_path, monkeypatch):
    monkeypatch.setitem(encoder_files.HEADS, 8, 1)  # what the width would suggest
    model = hf_model("ViTModel", 0.01, image_size=(16, 32), num_attention_heads=4, layer_norm_eps=1e-3)
    model.save_pretrained(tmp_path)
    encoder, images = load_encoder(tmp_path), pictures(16, 32)
    assert encoder.grid == (2, 4) and encoder.settings["heads"] == 4 and encoder.norm.eps == 1e-3
    same(features(encoder, images), hf_features(model, images))
    assert load_encoder(tmp_path, heads=2).settings["heads"] == 2


HF_WRONG = {
    "hidden_act is relu": lambda state, config: config.update(hidden_act="relu"),
    "not a ViT's configuration": lambda state, config: config.pop("image_size"),
    "the one that transformers wrote": lambda state, config: config.update(image_size=[16, -16]),
    "config.json: not a ViT's": lambda state, config: config.update(num_attention_heads="two"),
    "cannot be divided among 3 heads": lambda state, config: config.update(num_attention_heads=3),
    "divided among 0 heads": lambda state, config: config.update(num_attention_heads=0),
    "pos_embed is 1x5x8 where this encoder has 1x9x8": lambda state, config: config.update(image_size=[16, 32]),
    "lacks blocks.1.attn.qkv.bias and has blocks.1.attn.q.bias, blocks.1.attn.v.bias;": lambda state, config: state.pop(
        "encoder.layer.1.attention.attention.key.bias"
    ),
    "has embeddings.distillation_token;": lambda state, config: state.update(
        {"embeddings.distillation_token": torch.zeros(1, 1, 8)}
    ),
    "has encoder.layer.0.attention.attention.relative_position_bias.table": lambda state, config: state.update(
        {"encoder.layer.0.attention.attention.relative_position_bias.table": torch.zeros(3)}
    ),
}


@pytest.mark.parametrize("words", HF_WRONG)
def test_what_is_wrong_in_a_transformers_directory_is_said_in_one_line(tmp_path, words):
    state, config = hf_state(4), dict(image_size=16, num_attention_heads=2)
    HF_WRONG[words](state, config)
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as error:
        load_encoder(tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value)


def cut(file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])


def flip(file: Path) -> None:
    """One bit of the last tensor."""
    whole = bytearray(file.read_bytes())
    whole[whole.rindex(torch.tensor(0.75).numpy().tobytes())] ^= 1
    file.write_bytes(whole)


WRONG = {
    "a.pth: no such file": lambda file: None,
    "a.pth: damaged": lambda file: (torch.save(mae_state(), file), cut(file)),
    "damaged or not written": lambda file: (torch.save(mae_state() | {"x": torch.tensor(0.75)}, file), flip(file)),
    "damaged, or no weights": lambda file: (
        torch.save(mae_state(), file, _use_new_zipfile_serialization=False),
        cut(file),
    ),
    "or no weights without code": lambda file: file.write_text("<html>404</html>"),
    "give an encoder.safetensors, .pt, .pth": lambda file: file.write_bytes(b""),
    "weights named as": lambda file: torch.save(dict(model=dict(fc=torch.zeros(2))), file),
    "named as MAE's": lambda file: torch.save([torch.zeros(2)], file),
    "not a minMIM encoder": lambda file: torch.save({0: torch.zeros(2)}, file),
    "timm's or Hugging Face's": lambda file: torch.save({"cls_token": "text"}, file),
    "encoder; give an": lambda file: torch.save({"patch_embed.proj.weight": torch.zeros(2, 2)}, file),
    "lacks cls_token, pos_embed, ": lambda file: torch.save({"patch_embed.proj.weight": torch.zeros(8, 3, 8, 8)}, file),
    "a row for the class token, then a square": lambda file: torch.save(
        mae_state() | {"pos_embed": torch.zeros(1, 7, 8)}, file
    ),
    "pos_embed is 5x8;": lambda file: torch.save(mae_state() | {"pos_embed": torch.zeros(5, 8)}, file),
    "a.pth: not a minMIM": lambda file: torch.save(mae_state() | {"x": torch.zeros(1).expand(10**12)}, file),
    "encoder; give": lambda file: torch.save(mae_state() | {"x": torch.zeros(2, device="meta")}, file),
    "not a minMIM encoder; give": lambda file: torch.save(mae_state() | {"x": torch.eye(2).to_sparse()}, file),
    "cls_token is 8 where": lambda file: torch.save(mae_state() | {"cls_token": torch.zeros(8)}, file),
}


@pytest.mark.parametrize("words", WRONG)
def test_other_files_are_refused_in_one_line(tmp_path, words):
    WRONG[words](tmp_path / "a.pth")
    with pytest.raises(InputError) as error:
        load_encoder(tmp_path / "a.pth", heads=2)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_heads_that_nothing_tells_are_asked_for(tmp_path):
    torch.save(mae_state(), tmp_path / "a.pth")
    with pytest.raises(InputError, match="width 8 does not tell the number of heads; give --heads"):
        load_encoder(tmp_path / "a.pth")
    with pytest.raises(InputError, match="width 8 cannot be divided among -2 heads"):
        load_encoder(tmp_path / "a.pth", heads=-2)


def test_a_directory_without_weights_names_what_was_looked_for(tmp_path):
    with pytest.raises(
        InputError, match=r"encoder.safetensors: no such file, nor model.safetensors or pytorch_model.bin"
    ):
        load_encoder(tmp_path)


def test_safetensors_hold_how_to_build_the_encoder_and_what_made_it(tmp_path):
    """Anybody's reader gives timm's names, and the metadata says the rest."""
    encoder = random_vit(image_size=(16, 24), positions="relative", layer_scale=0.1)
    file = tmp_path / "encoder.safetensors"
    files.save_weights(file, encoder.settings, encoder.state_dict(), "made of numbers")
    tensors = safetensors.torch.load_file(file)
    assert tensors.keys() == encoder.state_dict().keys()
    assert all(torch.equal(tensors[name], x) for name, x in encoder.state_dict().items())
    about = safetensors.safe_open(file, "pt").metadata()
    assert about["format"] == "pt" and about["made_by"] == "made of numbers"
    found = load_encoder(file)
    assert found.settings == encoder.settings and found.settings["image_size"] == (16, 24)
    images = pictures(16, 24)
    assert torch.equal(features(found, images), features(encoder, images))
    found(images).sum().backward()  # and it can learn
    assert found.relative_table.grad is not None


def resave(file: Path, **about) -> None:
    """The same tensors, with other metadata, and so without the checksum."""
    tensors = safetensors.torch.load_file(file)
    about = {key: x if isinstance(x, str) else json.dumps(x) for key, x in about.items()}
    safetensors.torch.save_file(tensors, file, about)


WRONG_METADATA = [
    "not JSON", [1, 2], {}, dict(SMALL, width=16), dict(SMALL, depth=3), dict(SMALL, depth=10**9),
    dict(SMALL, heads=0), dict(SMALL, patch_size=0), dict(SMALL, width=10**9), dict(SMALL, image_size=10**9),
    dict(SMALL, positions="learned"), dict(SMALL, positions="relative"),
    dict(SMALL, positions="relative", image_size=8 * 10**6), dict(SMALL, speed=1), dict(SMALL, width="8"),
]  # fmt: skip


@pytest.mark.parametrize("settings", WRONG_METADATA, ids=str)
def test_metadata_that_do_not_fit_the_tensors_are_one_line_at_no_cost(tmp_path, settings):
    encoder, file = random_vit(), tmp_path / "encoder.safetensors"
    files.save_weights(file, encoder.settings, encoder.state_dict(), "a test")
    resave(file, settings=settings)
    with pytest.raises(InputError) as error:
        load_encoder(file)
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)
    resave(file, settings=encoder.settings)
    assert torch.equal(features(load_encoder(file)), features(encoder))


@pytest.mark.parametrize("ours", [True, False])
def test_damaged_safetensors_are_one_line(tmp_path, ours):
    encoder, file = random_vit(), tmp_path / "weights.safetensors"
    with torch.no_grad():
        encoder.norm.bias[-1] = 0.75
    if ours:
        files.save_weights(file, encoder.settings, encoder.state_dict(), "a test")
    else:
        safetensors.torch.save_file(mae_state(), file)
    assert load_encoder(file, heads=None if ours else 2).settings == encoder.settings
    for damage in (flip, cut) if ours else (cut,):  # others' have no checksum
        damage(file)
        with pytest.raises(InputError, match="damaged") as error:
            load_encoder(file, heads=2)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_no_file_can_run_code(tmp_path, zipped):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"model": mae_state(), "args": Trap()}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError):
        load_encoder(tmp_path / "a.pth", heads=2)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("new", [(4, 4), (1, 1), (3, 5)])
def test_positions_are_interpolated_as_timm_does_without_antialiasing(new):
    timm = pytest.importorskip("timm")
    rows = torch.randn(1, 1 + 6, 8)
    wanted = timm.layers.resample_abs_pos_embed(rows, list(new), [2, 3], antialias=False)
    torch.testing.assert_close(interpolate(rows[0, 1:], (2, 3), new), wanted[0, 1:])


def test_interpolation_to_the_same_grid_changes_nothing():
    rows = torch.randn(6, 8)
    torch.testing.assert_close(interpolate(rows, (2, 3), (2, 3)), rows)
    encoder = random_vit()
    assert resize(encoder, (16, 16)) is encoder


@pytest.mark.parametrize("size", [32, (8, 24)])
def test_weights_for_another_image_size_have_timms_resampled_positions(tmp_path, size):
    """And the class token keeps its own, which is not zero here."""
    timm = pytest.importorskip("timm")
    state = mae_state()
    torch.save(state, tmp_path / "mae.pth")
    height, width = (size, size) if isinstance(size, int) else size
    model = timm_vit(img_size=size)
    grid = [height // 8, width // 8]
    state["pos_embed"] = timm.layers.resample_abs_pos_embed(state["pos_embed"], grid, antialias=False)
    model.load_state_dict(state)
    encoder = load_encoder(tmp_path / "mae.pth", image_size=size, heads=2)
    assert encoder.image_size == size and encoder.settings["image_size"] == size
    same(features(encoder, pictures(height, width)), features(model, pictures(height, width)))


def test_a_run_too_is_stretched_and_not_continued(tmp_path):
    torch.manual_seed(0)
    encoder = ViT(**SMALL | dict(image_size=32))
    torch.save(dict(settings=encoder.settings, state_dict=encoder.state_dict()), tmp_path / "encoder.pt")
    larger = load_encoder(tmp_path, image_size=(64, 32))
    old = encoder.pos_embed[0, 1:].reshape(4, 4, 8).permute(2, 0, 1)[None]
    new = F.interpolate(old, (8, 4), mode="bicubic", align_corners=False)[0].permute(1, 2, 0).reshape(32, 8)
    torch.testing.assert_close(larger.pos_embed[0], torch.cat([encoder.pos_embed[0, :1], new]))
    assert larger.settings == encoder.settings | dict(image_size=(64, 32)) and not larger.training


def test_a_size_that_patches_do_not_divide_is_refused(tmp_path):
    torch.save(mae_state(), tmp_path / "mae.pth")
    with pytest.raises(InputError, match="20x20 is not divisible by patch size 8"):
        load_encoder(tmp_path / "mae.pth", image_size=20, heads=2)


def test_relative_positions_are_interpolated_over_their_offsets():
    encoder = random_vit(image_size=(16, 24), positions="relative")
    larger = resize(encoder, (32, 24))
    assert len(larger.relative_table) == 7 * 5 + 3
    for head in range(2):
        old = encoder.relative_table[:-3, head].reshape(1, 1, 3, 5)
        new = F.interpolate(old, (7, 5), mode="bicubic", align_corners=False)
        torch.testing.assert_close(larger.relative_table[:-3, head].reshape(1, 1, 7, 5), new)
    assert torch.equal(larger.relative_table[-3:], encoder.relative_table[-3:])
    # A patch's bias for itself, the middle of the table, stays in the middle.
    alone = encoder.relative_bias()[0, :, 1, 1]
    torch.testing.assert_close(larger.relative_bias()[0, :, 12, 12], alone)


def test_a_resized_import_keeps_its_epsilon(tmp_path):
    torch.save(hf_state(4), tmp_path / "weights.pt")
    encoder = load_encoder(tmp_path / "weights.pt", image_size=32, heads=2)
    assert {part.eps for part in encoder.modules() if isinstance(part, nn.LayerNorm)} == {1e-12}


# --------------------------------------------------------------------------------------- the papers' own checkpoints


def official_state(paper: str, encoder: ViT) -> dict:
    """The encoder under the names of the paper's official code, with other parts beside it."""
    found, other = {}, torch.zeros(2)
    for name, x in encoder.state_dict().items():
        if paper == "cmae":
            name = name.replace("blocks.", "layers.").replace("norm1", "ln1").replace("norm2", "ln2")
            name = name.replace("mlp.fc1", "ffn.layers.0.0").replace("mlp.fc2", "ffn.layers.1")
            name = name.replace("norm.", "ln1.").replace("patch_embed.proj", "patch_embed.projection")
            found["backbone." + name] = x
            continue
        prefix = "encoder." if paper == "cae" else ""
        if name.endswith("qkv.bias"):
            q, _, v = x.chunk(3)
            found |= {prefix + name.replace("qkv.bias", f"{part}_bias"): y for part, y in (("q", q), ("v", v))}
        elif not (paper == "conmim" and name == "pos_embed"):
            name = name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")
            found[prefix + name.replace("relative_table", "rel_pos_bias.relative_position_bias_table")] = x
    more = {
        "cmae": {"target_backbone.cls_token": other, "neck.mask_token": other},
        "cae": {"teacher.patch_embed.proj.weight": other, "mask_token": other},
        "conmim": {"rel_pos_bias.relative_position_index": other, "mask_token": other, "lm_head.weight": other},
    }
    return found | more[paper]


@pytest.mark.parametrize("paper", ["cmae", "cae", "conmim"])
def test_official_checkpoints_give_the_features_of_their_weights(tmp_path, capsys, paper):
    settings = dict(cmae={}, cae=dict(layer_scale=0.1), conmim=dict(layer_scale=0.1, positions="relative"))[paper]
    encoder = random_vit(**settings, image_size=32)
    for name, x in encoder.state_dict().items():
        if paper != "cmae" and name.endswith("qkv.bias"):
            x[8:16] = 0  # keys have none there
        if paper == "conmim" and name == "pos_embed":
            x.zero_()
    key = "state_dict" if paper == "cmae" else "model"
    torch.save({key: official_state(paper, encoder), "meta": {"epoch": 300}}, tmp_path / "paper.pth")
    found = load_encoder(tmp_path / "paper.pth", heads=None if paper == "conmim" else 2)
    assert found.image_size == 32 and found.settings["heads"] == 2
    same(features(found, pictures(32)), features(encoder, pictures(32)))
    aside = dict(cmae="neck, target_backbone", cae="mask_token, teacher", conmim="lm_head, mask_token")[paper]
    assert f"left aside: {aside}\n" in capsys.readouterr().err


def test_a_table_of_relative_positions_is_made_only_for_weights_that_fit_and_only_so_large(tmp_path, monkeypatch):
    state = official_state("conmim", random_vit(layer_scale=0.1, positions="relative"))
    place = "rel_pos_bias.relative_position_bias_table"
    torch.save(state | {place: torch.zeros((2 * 1000 - 1) ** 2 + 3, 2)}, tmp_path / "large.pth")
    with pytest.raises(InputError, match="relative positions of 1,000,000 patches; at most 4,096"):
        load_encoder(tmp_path / "large.pth")
    whole, made = encoder_files.relative_places, []
    monkeypatch.setattr(encoder_files, "relative_places", lambda grid: made.append(grid) or whole(grid))
    torch.save(state | {"norm.weight": torch.zeros(9)}, tmp_path / "wrong.pth")
    with pytest.raises(InputError, match="is 9 where this encoder has 8"):
        load_encoder(tmp_path / "wrong.pth")
    assert not made
    torch.save(state, tmp_path / "right.pth")
    load_encoder(tmp_path / "right.pth")
    assert made == [(2, 2)]


@pytest.mark.parametrize("paper, lost", [("cae", "encoder.blocks.1.attn.v_bias"), ("cmae", "backbone.ln1.weight")])
def test_an_official_checkpoint_that_lacks_a_part_is_refused(tmp_path, paper, lost):
    state = official_state(paper, random_vit(layer_scale=0.1 if paper == "cae" else 0.0))
    del state[lost]
    torch.save(state, tmp_path / "paper.pth")
    with pytest.raises(
        InputError, match={"cae": r"lacks blocks\.1\.attn\.qkv\.bias", "cmae": r"lacks norm\.weight"}[paper]
    ):
        load_encoder(tmp_path / "paper.pth", heads=2)


def test_an_encoder_is_filled_whatever_its_image_size_and_refused_where_the_architecture_differs(tmp_path):
    given = random_vit()
    torch.save(dict(settings=given.settings, state_dict=given.state_dict()), tmp_path / "encoder.pt")
    for size in (given.image_size, 2 * given.image_size, (given.image_size, 2 * given.image_size)):
        encoder = ViT(**given.settings | dict(image_size=size, drop_path=0.1))
        fill(encoder, tmp_path)
        expected = load_encoder(tmp_path, image_size=size).state_dict()
        assert encoder.settings["drop_path"] == 0.1 and encoder.state_dict().keys() == expected.keys()
        assert all(torch.equal(x, expected[key]) for key, x in encoder.state_dict().items())
    for name, value in dict(
        width=32, depth=1, heads=1, mlp_ratio=3, patch_size=4, positions="relative", layer_scale=0.1
    ).items():
        encoder = ViT(**given.settings | {name: value})
        before = encoder.cls_token.clone()
        with pytest.raises(InputError, match=rf"encoder.*does not fit.*{name} .* there, .* here"):
            fill(encoder, tmp_path)
        assert torch.equal(encoder.cls_token, before)
