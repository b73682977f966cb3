"""Encoders written for timm and transformers: they give our features there; what they lack is refused first."""

import os
import sys

import pytest
import torch
from test_encoder_import import features, hf_features, hf_model, hf_state, mae_names, pictures, random_vit, same
from torch import Tensor

import evaluate
from runtime import encoder_files
from runtime.encoder_files import export, load_encoder, write_export
from runtime.errors import InputError


def run_lines(lines: str, images: Tensor) -> Tensor:
    place = dict(images=images)
    with torch.no_grad():
        exec(lines, place)
    return place["tokens"]


@pytest.mark.parametrize(
    "settings", [{}, dict(image_size=(16, 32), heads=4), dict(layer_scale=0.1), dict(mlp_ratio=3)], ids=str
)
def test_timm_takes_our_weights_and_gives_our_features(tmp_path, settings):
    pytest.importorskip("timm")
    encoder = random_vit(**settings, drop_path=0.5)
    images = pictures(16, 32 if "image_size" in settings else 16)
    lines = write_export(encoder, "timm", tmp_path / "timm.pt")
    same(run_lines(lines, images), features(encoder, images))
    if "image_size" not in settings:  # whose grid a state dict does not tell
        assert torch.equal(features(load_encoder(tmp_path / "timm.pt", heads=2)), features(encoder))


@pytest.mark.parametrize("settings", [{}, dict(image_size=(16, 32), heads=4), dict(mlp_ratio=3)], ids=str)
def test_transformers_takes_our_weights_and_gives_our_features(tmp_path, settings):
    transformers = pytest.importorskip("transformers")
    encoder = random_vit(**settings)
    for x in (encoder.cls_token, encoder.pos_embed, encoder.patch_embed.proj.weight, encoder.patch_embed.proj.bias):
        x.data *= 0.01  # so that another epsilon would show
    images = pictures(16, 32 if "image_size" in settings else 16)
    lines = write_export(encoder, "hf", tmp_path / "hf")
    same(run_lines(lines, images), features(encoder, images))
    _, told = transformers.ViTModel.from_pretrained(tmp_path / "hf", add_pooling_layer=False, output_loading_info=True)
    assert not any(told.values()), told
    assert torch.equal(features(load_encoder(tmp_path / "hf"), images), features(encoder, images))


def test_the_state_dict_for_transformers_has_the_names_written_out():
    found, wanted = export(random_vit(), "hf"), hf_state(4)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert export(random_vit(), "timm").keys() == set(mae_names(2))


def test_hugging_faces_weights_reach_timm_with_their_epsilon(tmp_path):
    pytest.importorskip("timm")
    model = hf_model("ViTModel", scale=0.01)
    model.save_pretrained(tmp_path)
    lines = write_export(load_encoder(tmp_path), "timm", tmp_path / "timm.pt")
    same(run_lines(lines, pictures()), hf_features(model))


def test_in_transformers_an_export_drops_nothing_while_it_learns(tmp_path):
    transformers = pytest.importorskip("transformers")
    write_export(random_vit(), "hf", tmp_path / "hf")
    vit, images = transformers.ViTModel.from_pretrained(tmp_path / "hf", add_pooling_layer=False), pictures()
    with torch.no_grad():
        tested, learning = (vit.train(learns)(images).last_hidden_state for learns in (False, True))
    assert torch.equal(tested, learning)


def test_an_export_is_a_copy():
    encoder = random_vit()
    for kind in encoder_files.TARGETS:
        for x in export(encoder, kind).values():
            x.zero_()
    assert all(x.any() for x in encoder.state_dict().values())


@pytest.mark.parametrize(
    "kind, settings, words",
    [
        ("timm", dict(stem="conv"), "conv stem, which timm's VisionTransformer has not"),
        ("hf", dict(stem="conv"), "conv stem, which transformers' ViTModel has not"),
        ("timm", dict(positions="relative"), "relative positions, which timm's"),
        ("hf", dict(positions="relative"), "relative positions, which transformers'"),
        ("hf", dict(layer_scale=0.1), "layer scale, which transformers'"),
    ],
)
def test_what_the_target_has_not_is_refused_before_anything_is_written(tmp_path, kind, settings, words):
    with pytest.raises(InputError, match=words) as error:
        write_export(random_vit(**settings), kind, tmp_path / "out")
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", encoder_files.TARGETS)
def test_where_nothing_can_be_written_is_said_in_one_line(tmp_path, kind):
    (tmp_path / "file").write_text("kept")
    for to in (tmp_path / "file" / "where", *[tmp_path / "file"] * (kind == "hf")):
        with pytest.raises(InputError, match="cannot be") as error:
            write_export(random_vit(), kind, to)
        assert "\n" not in str(error.value)
    assert (tmp_path / "file").read_text() == "kept" and os.listdir(tmp_path) == ["file"]


@pytest.fixture
def run(tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    encoder = random_vit()
    torch.save(dict(settings=encoder.settings, state_dict=encoder.state_dict()), directory / "encoder.pt")
    return directory


def call(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--device", "cpu", *map(str, words)])
    evaluate.main()


@pytest.mark.parametrize("kind", encoder_files.TARGETS)
def test_the_command_exports_beside_the_encoder_or_where_it_is_told(run, tmp_path, monkeypatch, capsys, kind):
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    wanted = features(random_vit())
    for path, to in ((run, ()), (run / "encoder.pt", ("--to", tmp_path / "there"))):
        call(monkeypatch, "--run", path, "--export", kind, *to)
        lines = capsys.readouterr().out
        assert repr(str(to[1] if to else run / encoder_files.TARGETS[kind])) in lines
        same(run_lines(lines, pictures()), wanted)


def test_the_command_measures_others_weights(run, tmp_path, monkeypatch, capsys):
    """A transformers directory has a config.json of its own, which is no run's."""
    call(monkeypatch, "--run", run, "--export", "hf")
    call(monkeypatch, "--run", run, "--export", "timm")
    capsys.readouterr()
    seen = []
    monkeypatch.setattr(evaluate, "evaluate", lambda encoder, *_, **__: seen.append(encoder) or {"knn": {}})
    monkeypatch.setattr(evaluate.image_sets, "open_set", lambda *_, **__: evaluate.image_sets)
    monkeypatch.setattr(evaluate.image_sets, "to", lambda device: None, raising=False)
    for words in ((run / "hf",), (run / "timm.pt", "--heads", 2)):
        call(monkeypatch, "--run", *words, "--protocol", "knn", "--data", "shapes")
    for encoder in seen:
        assert torch.equal(features(encoder), features(random_vit()))
    assert len(seen) == 2


@pytest.mark.parametrize("words", ["", "--protocol knn --export timm", "--export onnx"])
def test_either_measure_or_export(run, monkeypatch, capsys, words):
    with pytest.raises((SystemExit, InputError)) as ended:
        call(monkeypatch, "--run", run, *words.split())
    said = f"{ended.value}\n{capsys.readouterr().err}"
    assert "--export" in said and getattr(ended.value, "code", 2) == 2


def test_a_place_without_an_export_is_refused(run, monkeypatch):
    with pytest.raises(InputError, match=r"--to there: .* give --export too"):
        call(monkeypatch, "--run", run, "--protocol", "knn", "--to", "there")
