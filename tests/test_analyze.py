"""analyze.py draws every figure that a run can have, says why not the others, and refuses in one line."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import analyze
from figures.encoders_and_images import Absent, Study
from runtime import files
from runtime.command_line import build_encoder
from runtime.errors import InputError
from train import options

SMALL = "--data {data} --recipe demo --image-size 16 --patch-size 4 --width 8 --depth 2 --heads 2 --device cpu"
DECODER = "--decoder-width 8 --decoder-depth 2 --decoder-heads 2"
RUNS = {
    "mae": f"--method mae {DECODER}",
    "raw": f"--method mae {DECODER} --no-norm-pixels",
    "cmae": f"--method cmae {DECODER} --target-mask-ratio 0.5",
    "loc": f"--method cmae_loc {DECODER}",
    "loc-conv": f"--method cmae_loc {DECODER} --decoder conv",
    "lcmae": f"--method lcmae {DECODER}",
    "lcmae-average": "--method lcmae --decoder-width 8 --decoder average",
    "autoencoder": f"--method autoencoder {DECODER} --block 8",
    "cross": f"--method lcmae {DECODER} --mae-weight 0",
    "cae": "--method cae --codes 8 --hidden 4 --blocks 1 --first-stride 8",
    "pixels": "--method cae --target pixels --norm-pixels",
    "conmim": "--method conmim --projector-width 8 --projector-out 4",
    "loc-wide": f"--method cmae_loc {DECODER} --image-size 16 24",
    "cae-wide": "--method cae --codes 8 --hidden 4 --blocks 1 --first-stride 8 --image-size 16 24",
    "dvae": "--method dvae --patch-size 8 --codes 8 --hidden 4 --blocks 1 --first-stride 8",
}
VIT = {"attention-map", "attention-distance", "class-distances", "features", "token-variance"}
EVERY, DECODED = {"curves", "views"}, {"decoder-similarity", "decoder-attention"}
CAN = {
    "mae": EVERY | VIT | DECODED | {"reconstruction"},
    "raw": EVERY | VIT | DECODED | {"reconstruction"},
    "cmae": EVERY | VIT | DECODED | {"reconstruction"},
    "loc": EVERY | VIT | DECODED | {"reconstruction"},
    "loc-conv": EVERY | VIT | {"reconstruction"},
    "lcmae": EVERY | VIT | DECODED | {"reconstruction"},
    "lcmae-average": EVERY | VIT | {"reconstruction"},
    "autoencoder": EVERY | VIT | {"reconstruction"},
    "cross": EVERY | VIT | DECODED,
    "cae": EVERY | VIT | {"reconstruction", "latent-reconstruction"},
    "pixels": EVERY | VIT | {"reconstruction", "latent-reconstruction"},
    "conmim": EVERY | VIT | {"reconstruction"},
    "loc-wide": EVERY | VIT | DECODED | {"reconstruction"},
    "cae-wide": EVERY | VIT | {"reconstruction", "latent-reconstruction"},
    "dvae": EVERY | {"reconstruction"},
}


@pytest.fixture(scope="module", name="runs")
def first_weights(tmp_path_factory):
    """A directory with one run of every kind at its first weights, as train.py lays them out."""
    place = tmp_path_factory.mktemp("runs")
    patch = pytest.MonkeyPatch()
    patch.setenv("MINMIM_CACHE", str(place / "cache"))
    draw = np.random.default_rng(0)
    for split, name, i in ((s, c, i) for s in ("train", "val") for c in ("ant", "bee", "cow") for i in range(4)):
        (place / "data" / split / name).mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 256, (5, 5, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
        Image.fromarray(pixels).save(place / "data" / split / name / f"{i}.png")
    for name, flags in RUNS.items():
        args, config, Method = options((SMALL.format(data=place / "data") + " " + flags).split())
        torch.manual_seed(0)
        method = Method(build_encoder(args), config)
        for parameter in method.parameters():  # so that nothing is zero, or the same, by initialisation alone
            parameter.data += 0.05 * torch.randn_like(parameter)
        (place / name).mkdir()
        about = dict(method=args.method, settings=vars(args), config=dataclasses.asdict(config))
        (place / name / "config.json").write_text(json.dumps(about))
        steps = [
            dict(step=s, epoch=s / 4, loss=3 / s, part=1 / s, lr=0.1 * s, images_per_second=9, seconds=1)
            for s in (1, 2, 3)
        ]
        lines = [json.dumps(line) for line in [about, *steps]] + ['{"step": 4, "lo']
        (place / name / "log.jsonl").write_text("\n".join(lines))
        files.save(place / name / "checkpoint.pt", dict(step=3, method=method.state_dict()))
        files.save(
            place / name / "encoder.pt", dict(settings=method.encoder.settings, state_dict=method.encoder.state_dict())
        )
    yield place
    patch.undo()


def run_command(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["analyze.py", *map(str, words), "--device", "cpu"])
    analyze.main()


def study(runs: Path, *names: str, **more) -> Study:
    words = ["--run", *(str(runs / name) for name in names), "--figure", "all"]
    words += [word for key, value in more.items() for word in ("--" + key, str(value))]
    return Study(analyze.options(words), torch.device("cpu"))


@pytest.mark.parametrize("name", RUNS)
def test_figures_are_those_that_the_run_can_have(runs, name):
    about, can = study(runs, name, images=6), set()
    for figure, function in analyze.FIGURES.items():
        try:
            drawn, found = function(about)
        except Absent as reason:
            assert name in str(reason) or "--reference PATH" in str(reason)
            continue
        can.add(figure)
        assert "NaN" not in json.dumps(found) and drawn.get_size_inches()[0] == 9
        texts = [axis.get_title() + axis.get_ylabel() for axis in drawn.axes] + [drawn.get_suptitle()]
        assert any(texts)
    assert can == CAN[name]


def test_images_without_labels_are_said_where_a_figure_needs_labels(runs):
    without = study(runs, "mae", images=4, data=runs / "data" / "val" / "ant")
    for figure in ("class-distances", "features"):
        with pytest.raises(Absent, match=r"the images of .*ant have no labels"):
            analyze.FIGURES[figure](without)


def test_all_draws_what_can_be_and_says_why_not_the_rest(runs, monkeypatch, capsys):
    run_command(monkeypatch, "--run", runs / "mae", "--figure", "all", "--images", 4)
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(said) == list(analyze.FIGURES)
    for figure, rest in said.items():
        if figure not in CAN["mae"]:
            assert rest.startswith("skipped: ")
            continue
        assert rest == str(runs / "mae" / "figures" / f"{figure}.png")
        picture, about = Image.open(rest), json.loads(Path(rest).with_suffix(".json").read_text())
        assert picture.width == 900 and len(set(picture.convert("L").resize((90, 90)).tobytes())) > 20
        shown = {"curves": set(), "views": {"train"}}.get(figure, {"val"})
        assert set(about.get("images", ())) == shown, "images of another figure"
        assert about["figure"] == figure and about["runs"] == [str(runs / "mae")] and len(about) > 2


def test_several_runs_share_the_axes(runs, monkeypatch, tmp_path, capsys):
    about = study(runs, "mae", "cmae", images=6, reference=runs / "conmim" / "encoder.pt")
    for figure in ("attention-map", "attention-distance", "class-distances", "features", "decoder-similarity"):
        found = analyze.FIGURES[figure](about)[1]
        assert json.dumps(found["mae"]) != json.dumps(found["cmae"]), "both show one run"
        assert ("reference encoder.pt" in found) == (figure != "decoder-similarity")
    with pytest.raises(Absent, match="shows one run; give one to --run"):
        analyze.FIGURES["views"](about)
    run_command(monkeypatch, "--run", runs / "mae", runs / "loc", "--figure", "curves", "--to", tmp_path / "a/b.png")
    assert json.loads((tmp_path / "a/b.json").read_text())["runs"] == [str(runs / "mae"), str(runs / "loc")]
    assert capsys.readouterr().out == f"curves                 {tmp_path}/a/b.png\n"


@pytest.mark.parametrize(
    "name, words, message",
    [
        ("conmim", "decoder-similarity", "decoder-similarity: conmim has no decoder whose mask tokens"),
        ("autoencoder", "decoder-attention", "autoencoder hides nothing"),
        ("mae", "latent-reconstruction", "latent-reconstruction: mae has no regressor"),
        ("dvae", "features", "features: dvae keeps no ViT"),
        ("cross", "reconstruction", "cross was taught nothing that can be seen"),
        ("mae", "semantic-similarity", "give --reference PATH"),
        ("mae", "curves --images 3", "--images: does nothing to curves; leave it out, or draw attention-"),
        ("mae", "features --images 0", "--images: 0: must be at least 1"),
        ("mae", "class-distances --classes 1", "classes 1: must be at least 2"),
        ("mae", "features --classes 9", "--classes: does nothing to features; leave it out, or draw class-distances"),
        ("mae", "decoder-similarity --images 1", "images 1: cannot be compared"),
        ("mae", "all --to x.png", "to x.png: must end in .png, and take one figure"),
        ("mae", "curves --to x.pdf", "to x.pdf: must end in .png"),
        ("nowhere", "curves", "config.json: no configuration of a run"),
        ("mae", "tsne", "argument --figure: invalid choice: 'tsne'"),
    ],
)
def test_what_cannot_be_is_one_line(runs, name, words, message, monkeypatch):
    with pytest.raises(InputError) as error:
        run_command(monkeypatch, "--run", runs / name, "--figure", *words.split())
    assert message in str(error.value) and "\n" not in str(error.value)


def test_weights_stand_beside_runs_and_alone(runs, monkeypatch, tmp_path):
    """LC-MAE Figure 5 compares encoders that others have published."""
    weights = [tmp_path / f"{name}.pt" for name in ("dino", "deit")]
    for file, name in zip(weights, ("conmim", "cae"), strict=True):
        file.write_bytes((runs / name / "encoder.pt").read_bytes())

    def numbers(*words):
        run_command(monkeypatch, *words, "--images", 4, "--to", tmp_path / "a.png")
        return json.loads((tmp_path / "a.json").read_text())

    figure = ("--figure", "attention-distance")
    beside = numbers("--run", runs / "mae", *weights, *figure)
    alone = numbers("--run", *weights, *figure, "--data", runs / "data")
    run = numbers("--run", runs / "mae", runs / "conmim", *figure)
    assert beside["dino.pt"] == alone["dino.pt"] == run["conmim"] != beside["deit.pt"]
    references = numbers("--run", runs / "mae", *figure, "--reference", *weights)
    assert references["reference deit.pt"] == beside["deit.pt"]
    alike = [runs / name / "encoder.pt" for name in ("conmim", "cae")]
    named = numbers("--run", runs / "mae", *figure, "--reference", *alike)
    assert [named[f"reference {file}"] for file in alike] == [beside["dino.pt"], beside["deit.pt"]]
    both = numbers("--run", runs / "mae", "--figure", "semantic-similarity", "--reference", *weights)
    one = numbers("--run", runs / "mae", "--figure", "semantic-similarity", "--reference", weights[1])
    assert both["reference"] == [str(file) for file in weights]
    assert both["mae, reference deit.pt"] == one["mae"] != both["mae, reference dino.pt"]
    with pytest.raises(InputError, match=r"data: dino\.pt does not say which images to show; give --data"):
        numbers("--run", *weights, *figure)
    for name in ("curves", "views", "reconstruction", "decoder-similarity", "latent-reconstruction"):
        with pytest.raises(InputError, match=r"dino\.pt is a file, of which only the encoder is read; give a run"):
            run_command(monkeypatch, "--run", weights[0], "--figure", name, "--data", runs / "data")


def test_the_json_says_which_images_and_references(runs, monkeypatch, tmp_path):
    def about(*words):
        run_command(monkeypatch, "--run", runs / "mae", "--to", tmp_path / "a.png", "--figure", *words)
        return json.loads((tmp_path / "a.json").read_text())

    file = str(runs / "cmae" / "encoder.pt")
    assert about("attention-map", "--images", 3)["images"] == {"val": [0, 5, 11]}
    for figure, split in (("decoder-similarity", "val"), ("semantic-similarity", "val"), ("views", "train")):
        more = ["--reference", file] if figure == "semantic-similarity" else []
        found = about(figure, "--images", 2, *more)
        assert found["images"] == {split: [0, 11]} and found["data"] == str(runs / "data")
        assert found.get("reference") == (more[1:] or None)
    assert about("class-distances", "--classes", 2, "--images", 4)["images"] == {"val": [0, 3, 8, 11]}
    assert "images" not in about("curves")


def test_a_run_with_a_setting_that_is_gone_is_drawn_if_it_did_nothing(runs, tmp_path, monkeypatch):
    for name in ("log.jsonl", "checkpoint.pt"):
        (tmp_path / name).write_bytes((runs / "lcmae" / name).read_bytes())
    for block, what in ((0, None), (8, "does not fit its config.json")):
        about = json.loads((runs / "lcmae" / "config.json").read_text())
        about["config"]["block"] = block
        (tmp_path / "config.json").write_text(json.dumps(about))
        if what is None:
            run_command(monkeypatch, "--run", tmp_path, "--figure", "attention-map", "--images", 2)
        else:
            with pytest.raises(InputError, match=what):
                run_command(monkeypatch, "--run", tmp_path, "--figure", "attention-map", "--images", 2)


def test_without_matplotlib_it_is_one_line(runs, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r'^matplotlib: not installed, and figures need it; pip install "\.\[plots\]"$'
    ):
        run_command(monkeypatch, "--run", runs / "mae", "--figure", "curves")


def test_a_checkpoint_of_another_method_is_one_line(runs, tmp_path, monkeypatch):
    for name, source in (("config.json", "mae"), ("log.jsonl", "mae"), ("checkpoint.pt", "conmim")):
        (tmp_path / name).write_bytes((runs / source / name).read_bytes())
    with pytest.raises(InputError, match=r"checkpoint.pt: does not fit its config.json"):
        run_command(monkeypatch, "--run", tmp_path, "--figure", "attention-map")


def test_labelled_images_are_equally_many_of_each_class(runs):
    images, labels = study(runs, "mae").labelled(6, 2)
    images = torch.cat(list(images))
    assert labels.tolist() == [0, 0, 0, 2, 2, 2] and len(images) == 6
    every = study(runs, "mae").val
    assert torch.equal(images[3], every.images(torch.tensor([8]))[0])
