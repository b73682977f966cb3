"""The figures' numbers against loops written from the papers; every figure of every method, by the command."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import analyze
import cmae_loc
import common
import mae
from common import Attention, StepRandom, ViT, random_mask
from inputs import augment
from runtime import files
from runtime.command_line import build_encoder
from runtime.errors import InputError
from train import options

few = settings(max_examples=25)
seeds = st.integers(0, 2**31)


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention(seed: int, *shape: int) -> torch.Tensor:
    return (2 * numbers(seed, *shape)).softmax(dim=-1)


def cos(a, b) -> float:
    a, b = [float(x) for x in a.flatten()], [float(x) for x in b.flatten()]
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


# ---------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("biased", [False, True])
def test_recomputed_attention_is_what_the_module_applies(biased):
    torch.manual_seed(0)
    part, x = Attention(8, 2), numbers(1, 3, 5, 8)
    torch.nn.init.normal_(part.qkv.bias)
    bias = numbers(2, 1, 2, 5, 5) if biased else None
    with torch.no_grad():
        (found,) = analyze.attention_maps([part], lambda: part(x, bias))
        v = part.qkv(x)[:, :, 16:].unflatten(2, (2, 4)).transpose(1, 2)
        applied = part.proj((found @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(applied, part(x, bias))
        q, k = (part.qkv(x)[0, :, at : at + 4].double() for at in (4, 12))  # of the second head
    for i in range(5):
        scores = [float(q[i] @ k[j]) / 2 + (float(bias[0, 1, i, j]) if biased else 0) for j in range(5)]
        total = sum(math.exp(s) for s in scores)
        for j in range(5):
            assert found[0, 1, i, j].item() == pytest.approx(math.exp(scores[j]) / total, abs=1e-6)
    assert not part._forward_pre_hooks


@given(seeds, st.integers(1, 3), st.integers(2, 4), st.integers(1, 9))
@few
def test_attention_distance_is_a_weighted_mean_in_pixels(seed, h, w, p):
    maps = attention(seed, 2, 2, 1 + h * w, 1 + h * w)
    found = analyze.attention_distance(maps, (h, w), p)
    for b in range(2):
        for head in range(2):
            over_queries = 0.0
            for i in range(h * w):
                far, mass = 0.0, 0.0
                for j in range(h * w):
                    weight = float(maps[b, head, 1 + i, 1 + j])
                    far += weight * p * math.hypot(i // w - j // w, i % w - j % w)
                    mass += weight
                over_queries += far / mass
            assert found[b, head].item() == pytest.approx(over_queries / (h * w), rel=1e-5)
    assert (found >= 0).all() and (found <= p * math.hypot(h - 1, w - 1) + 1e-4).all()


def test_attention_distance_of_oneself_is_zero_and_the_class_token_does_not_count():
    oneself = torch.eye(10)[None, None]
    assert analyze.attention_distance(oneself, (3, 3), 8).item() == 0
    other = oneself.clone()
    other[..., 1:, 0] = 5.0  # to the class token
    other[..., 0, 1:] = 7.0  # from it
    assert analyze.attention_distance(other, (3, 3), 8).item() == 0
    right = torch.zeros(1, 1, 3, 3)
    right[..., 1, 2] = right[..., 2, 1] = 0.25  # a quarter of the attention, all of what patches get
    assert analyze.attention_distance(right, (1, 2), 8).item() == 8


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.floats(0.01, 1.0))
@few
def test_mass_region_is_the_smallest_that_holds_the_mass(weights, mass):
    found = analyze.mass_region(torch.tensor(weights, dtype=torch.float64), mass)
    held, wanted, order = 0, mass * sum(weights) - 1e-9, sorted(weights, reverse=True)
    smallest = next(n for n in range(1, len(order) + 1) if sum(order[:n]) >= wanted)
    held = sum(weight for weight, kept in zip(weights, found.tolist(), strict=True) if kept)
    assert held >= wanted and int(found.sum()) == smallest


def test_mass_region_keeps_places():
    weights = torch.tensor([[0.1, 0.6, 0.1, 0.2], [0.3, 0.1, 0.35, 0.25]])
    expected = [[False, True, False, False], [True, False, True, False]]
    assert analyze.mass_region(weights, 0.5).tolist() == expected
    assert analyze.mass_region(weights, 1.0).all()


@given(seeds, st.integers(2, 5))
@few
def test_decoder_similarity_is_equation_7(seed, images):
    maps = attention(seed, images, 3, 2, 4)
    total = sum(cos(maps[i], maps[j]) for i in range(images) for j in range(images) if i != j)
    assert analyze.decoder_similarity(maps) == pytest.approx(total / (images * (images - 1)), rel=1e-6)
    assert analyze.decoder_similarity(maps[:1].expand(images, -1, -1, -1)) == pytest.approx(1)


@given(seeds, st.integers(1, 3))
@few
def test_semantic_similarity_is_equation_8(seed, images):
    reference, ours = numbers(seed, images, 4, 3), numbers(seed + 1, images, 4, 5)
    total = 0.0
    for i in range(images):
        w, v = ([cos(x[i, a], x[i, b]) for a in range(4) for b in range(4)] for x in (reference, ours))
        total += cos(torch.tensor(w, dtype=torch.float64), torch.tensor(v, dtype=torch.float64))
    assert analyze.semantic_similarity(reference, ours) == pytest.approx(total / images, rel=1e-6)
    turn = torch.linalg.qr(numbers(seed + 2, 5, 5).double())[0]
    assert analyze.semantic_similarity(3 * ours.double() @ turn, ours) == pytest.approx(1)


# ----------------------------------------------------------------------------------------------------- features


@given(seeds, st.lists(st.integers(2, 4), min_size=2, max_size=4))
@few
def test_class_distances_are_those_of_section_4_7(seed, sizes):
    x = numbers(seed, sum(sizes), 6).double() + 1
    labels = torch.tensor([3 * c for c, n in enumerate(sizes) for _ in range(n)])
    found = analyze.class_distances(x, labels)
    centres = []
    for c, n in enumerate(sizes):
        group = [x[i] for i in range(len(x)) if labels[i] == 3 * c]
        inside = [1 - cos(group[i], group[j]) for i in range(n) for j in range(i)]
        mean = sum(inside) / len(inside)
        assert found["intra_mean"][c].item() == pytest.approx(mean, abs=1e-9)
        spread = math.sqrt(sum((d - mean) ** 2 for d in inside) / len(inside))
        assert found["intra_std"][c].item() == pytest.approx(spread, abs=1e-9)
        centres.append(sum(group) / n)
    for c in range(len(sizes)):
        between = [1 - cos(centres[c], centres[d]) for d in range(len(sizes)) if d != c]
        mean = sum(between) / len(between)
        assert found["inter_mean"][c].item() == pytest.approx(mean, abs=1e-9)
        spread = math.sqrt(sum((d - mean) ** 2 for d in between) / len(between))
        assert found["inter_std"][c].item() == pytest.approx(spread, abs=1e-9)


def test_class_distances_need_pairs():
    with pytest.raises(InputError, match="two images each; give more --images"):
        analyze.class_distances(numbers(0, 3, 4), torch.tensor([0, 0, 1]))
    with pytest.raises(InputError, match="two classes"):
        analyze.class_distances(numbers(0, 3, 4), torch.tensor([0, 0, 0]))


@given(seeds)
@few
def test_pca_projects_on_the_eigenvectors_of_the_covariance(seed):
    x = numbers(seed, 12, 4).double() * torch.tensor([4.0, 2.0, 1.0, 0.5]) + 3
    points, share = analyze.pca(x)
    centred = x - x.mean(dim=0)
    values, vectors = np.linalg.eigh((centred.T @ centred / 12).numpy())
    for i in range(2):
        direction = vectors[:, -1 - i]
        direction = direction * np.sign(direction[np.abs(direction).argmax()])
        np.testing.assert_allclose(points[:, i].numpy(), centred.numpy() @ direction, atol=1e-6)
        assert share[i].item() == pytest.approx(values[-1 - i] / values.sum())


def test_tsne_without_scikit_learn_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(InputError, match=r'scikit-learn: missing.*pip install "\.\[plots\]"'):
        analyze.tsne(numbers(0, 8, 4), 0)


@given(seeds)
@few
def test_pixels_come_back_by_true_statistics_and_know_nothing_hidden_by_visible_ones(seed):
    patches, mask = numbers(seed, 2, 16, 12).abs() + 1, random_mask(StepRandom(seed, 0, 2), (4, 4), 0.75)
    predicted = common.normalize_patches(patches)
    torch.testing.assert_close(analyze.to_pixels(predicted, patches, mask, (4, 4), True), patches, rtol=1e-4, atol=1e-4)
    by_visible = analyze.to_pixels(predicted, patches, mask, (4, 4), False)
    seen = ~mask.hidden
    torch.testing.assert_close(by_visible[seen], patches[seen], rtol=1e-4, atol=1e-4)
    changed = torch.where(mask.hidden[:, :, None], patches * 7 - 2, patches)
    assert torch.equal(analyze.to_pixels(predicted, changed, mask, (4, 4), False), by_visible)


# ----------------------------------------------------------------------------------------------- runs to look at

SMALL = "--data {data} --recipe demo --image-size 16 --patch-size 4 --width 8 --depth 2 --heads 2 --device cpu"
DECODER = "--decoder-width 8 --decoder-depth 2 --decoder-heads 2"
RUNS = {
    "mae": f"--method mae {DECODER}",
    "raw": f"--method mae {DECODER} --no-norm-pixels",
    "cmae": f"--method cmae {DECODER} --target-mask-ratio 0.5",
    "loc": f"--method cmae_loc {DECODER}",
    "loc-conv": f"--method cmae_loc {DECODER} --decoder conv",
    "lcmae": f"--method lcmae {DECODER}",
    "lcmae-average": f"--method lcmae {DECODER} --decoder average",
    "autoencoder": f"--method autoencoder {DECODER} --block 8",
    "cross": f"--method lcmae {DECODER} --mae-weight 0",
    "cae": "--method cae --codes 8 --hidden 4 --blocks 1 --first-stride 8",
    "pixels": "--method cae --target pixels --norm-pixels",
    "conmim": "--method conmim --projector-width 8 --projector-out 4",
    "dvae": "--method dvae --patch-size 8 --codes 8 --hidden 4 --blocks 1 --first-stride 8",
}
VIT = {"attention-map", "attention-distance", "class-distances", "features", "neighbours"}
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
    "cae": EVERY | VIT | {"reconstruction", "latent-reconstruction", "token-usage"},
    "pixels": EVERY | VIT | {"reconstruction", "latent-reconstruction"},
    "conmim": EVERY | VIT | {"reconstruction"},
    "dvae": EVERY | {"reconstruction", "token-usage"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
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


def study(runs: Path, *names: str, **more) -> analyze.Study:
    words = ["--run", *(str(runs / name) for name in names), "--figure", "all"]
    words += [word for key, value in more.items() for word in ("--" + key, str(value))]
    return analyze.Study(analyze.options(words), torch.device("cpu"))


@pytest.mark.parametrize("name", RUNS)
def test_figures_are_those_that_the_run_can_have(runs, name):
    about, can = study(runs, name, images=6), set()
    for figure, function in analyze.FIGURES.items():
        try:
            drawn, found = function(about)
        except analyze.Absent as reason:
            assert name in str(reason) or "--reference PATH" in str(reason)
            continue
        can.add(figure)
        assert "NaN" not in json.dumps(found) and drawn.get_size_inches()[0] == 9
        texts = [axis.get_title() + axis.get_ylabel() for axis in drawn.axes] + [drawn.get_suptitle()]
        assert any(texts)
    assert can == CAN[name]


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
        assert about["figure"] == figure and about["runs"] == [str(runs / "mae")] and len(about) > 2


def test_several_runs_share_the_axes(runs, monkeypatch, tmp_path, capsys):
    about = study(runs, "mae", "cmae", images=6, reference=runs / "conmim" / "encoder.pt")
    for figure in ("attention-map", "attention-distance", "class-distances", "features", "decoder-similarity"):
        found = analyze.FIGURES[figure](about)[1]
        assert json.dumps(found["mae"]) != json.dumps(found["cmae"]), "both show one run"
        assert ("reference encoder.pt" in found) == (figure != "decoder-similarity")
    with pytest.raises(analyze.Absent, match="shows one run; give one to --run"):
        analyze.views(about)
    run_command(monkeypatch, "--run", runs / "mae", runs / "loc", "--figure", "curves", "--to", tmp_path / "a/b.png")
    assert json.loads((tmp_path / "a/b.json").read_text())["runs"] == [str(runs / "mae"), str(runs / "loc")]
    assert capsys.readouterr().out == f"curves                 {tmp_path}/a/b.png\n"


def test_a_run_has_one_colour_in_every_panel(runs, tmp_path):
    """Also where another run lacks the part that a panel shows."""
    about = study(runs, "mae", "cmae")
    for run, part in zip(about.runs, ("one", "two"), strict=True):
        run.directory = tmp_path / part
        run.directory.mkdir()
        rows = [{}, *({"step": s, "epoch": s, "loss": 1 / s, part: s, "lr": 0.1} for s in (1, 2))]
        (run.directory / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    figure, found = analyze.curves(about)
    assert list(found["cmae"]) == ["step", "epoch", "loss", "one", "lr", "two"]
    panels = {axis.get_title(): axis.get_lines() for axis in figure.axes if axis.get_title()}
    colours = [line.get_color() for line in panels["loss"]]
    assert colours[0] != colours[1]
    assert [line.get_color() for line in panels["two"] if len(line.get_xdata())] == colours[1:]
    assert [line.get_color() for line in panels["one"] if len(line.get_xdata())] == colours[:1]


# ------------------------------------------------------------------------------------- the figures' own numbers


def test_decoders_in_either_order_of_tokens_give_the_same_maps_and_features(runs):
    """cmae_loc's decoder works in raster order, MAE's with visible patches first: the same weights, the same figure."""
    about = study(runs, "mae", "loc")
    one, other = about.runs
    other.method.load_state_dict(one.method.state_dict(), strict=False)  # encoder and decoder
    assert type(other.decoder) is cmae_loc.Decoder and type(one.decoder) is mae.Decoder
    images = about.pictures(3)
    mask = one.masks(images)
    for function in (analyze.decoder_maps, analyze.decoder_features):
        ours, theirs = function(one, images, mask), function(other, images, mask)
        assert len(ours) == 2
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)
    maps = analyze.decoder_maps(one, images, mask)[0]
    torch.testing.assert_close(maps.sum(dim=3), torch.ones(3, 2, 17))


def test_decoder_similarity_compares_mask_tokens_under_one_mask(runs):
    about = study(runs, "mae", images=5)
    (run,), series = about.runs, analyze.decoder_similarities(about)[1]["mae"]
    images = about.pictures(5)
    mask = run.masks(images, alike=True)
    assert all(torch.equal(row, mask.masked[0]) for row in mask.masked) and mask.masked.shape == (5, 12)
    for layer, maps in enumerate(analyze.decoder_maps(run, images, mask)):
        rows = [maps[i][:, [1 + int(q) for q in mask.masked[0]], 1:] for i in range(5)]
        pairs = [cos(rows[i], rows[j]) for i in range(5) for j in range(5) if i != j]
        assert series[layer] == pytest.approx(sum(pairs) / 20, rel=1e-5)
    assert not any(torch.equal(row, run.masks(images).masked[0]) for row in run.masks(images).masked[1:])


def test_semantic_similarity_of_an_encoder_of_another_grid_counts_the_same_patches(runs, tmp_path):
    torch.manual_seed(1)
    coarse = ViT(image_size=16, patch_size=8, width=8, depth=1, heads=2).eval()
    files.save(tmp_path / "encoder.pt", dict(settings=coarse.settings, state_dict=coarse.state_dict()))
    about = study(runs, "mae", reference=tmp_path / "encoder.pt", images=4)
    series = analyze.semantic_similarities(about)[1]["mae"]
    images, (run,) = about.pictures(4), about.runs
    larger = analyze.weights.load_encoder(tmp_path / "encoder.pt", image_size=32)  # 4 x 4 patches of 8
    with torch.no_grad():
        theirs = larger(augment.normalize(augment.center_crop_resize(images, 32)))[:, 1:]
        x = augment.normalize(augment.center_crop_resize(images, 16))
        mask, outputs = run.masks(images), []
        run.decoder.blocks[1].register_forward_hook(lambda *about: outputs.append(about[2]))
        run.decoder.features(run.encoder(x, mask.visible), mask)
    last = common.restore(*outputs[0][:, 1:].split([4, 12], dim=1), mask)
    assert series[1] == pytest.approx(analyze.semantic_similarity(theirs, last), rel=1e-5)


def test_attention_distances_average_heads_and_images(runs):
    about = study(runs, "mae", images=12)
    found = analyze.attention_distances(about)[1]["mae"]
    encoder, images = about.runs[0].encoder, about.pictures(12)
    x = augment.normalize(augment.center_crop_resize(images, 16))
    with torch.no_grad():
        tokens = encoder.blocks[0](
            torch.cat([(encoder.cls_token + encoder.pos_embed[:, :1]).expand(12, -1, -1), encoder.embed(x)], 1)
        )
        maps = analyze.attention_weights(encoder.blocks[1].attn, encoder.blocks[1].norm1(tokens))
    expected = analyze.attention_distance(maps, (4, 4), 4)
    assert found["pixels"][1] == pytest.approx(expected.mean().item(), rel=1e-5)
    assert found["heads"][1] == pytest.approx(expected.mean(dim=0).tolist(), rel=1e-4)


def test_decoder_attention_is_that_of_hidden_patches(runs):
    about = study(runs, "lcmae", images=2)
    (run,), found = about.runs, analyze.decoder_attention(about)[1]["attention"]
    images = about.pictures(2)
    mask = run.masks(images, alike=True)
    maps = analyze.decoder_maps(run, images, mask)
    assert len(found) == 2 * 2 * 2  # places, images, layers
    assert len({(f["row"], f["column"], f["image"], f["layer"]) for f in found}) == 8
    for entry in found:
        query = 4 * entry["row"] + entry["column"]
        assert query in mask.masked[0].tolist()
        expected = maps[entry["layer"] - 1][entry["image"], :, 1 + query].mean(dim=0)
        patches = torch.tensor(entry["patches"]).flatten()
        torch.testing.assert_close(patches, expected[1:], atol=1e-5, rtol=1e-4)
        assert entry["class_token"] + patches.sum().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("query, token", [(None, 0), ("2,1", 10)])
def test_attention_map_asks_the_class_token_or_a_patch_of_the_last_block(runs, query, token):
    about = study(runs, "mae", images=3, **({"query": query} if query else {}))
    found = analyze.attention_map(about)[1]["mae"]
    encoder, x = about.runs[0].encoder, augment.normalize(augment.center_crop_resize(about.pictures(3), 16))
    with torch.no_grad():
        maps = analyze.attention_maps([encoder.blocks[1].attn], lambda: encoder(x))[0]
    expected = sum(maps[:, head, token, 1:] for head in range(2)) / 2
    torch.testing.assert_close(torch.tensor(found["maps"]).flatten(1), expected, atol=1e-5, rtol=1e-4)
    assert found["share_of_patches"] == pytest.approx(analyze.mass_region(expected, 0.5).double().mean(dim=1).tolist())


@pytest.mark.parametrize("name", ["mae", "raw"])
def test_reconstruction_is_what_training_pictures_show(runs, name):
    """The error in the JSON is that of `picture_rows` on the same images and masks; true statistics give another."""
    about = study(runs, name, images=4)
    error = analyze.reconstruction(about)[1]["squared_error_of_hidden_pixels"]
    (run,), images = about.runs, about.pictures(4)
    x, mask = augment.normalize(augment.center_crop_resize(images, 16)), run.draw(images).mask
    with torch.no_grad():
        predicted = run.method.decoder(run.encoder(x, mask.visible), mask)
    index = mask.masked[:, :, None].expand_as(predicted)
    patches = common.patchify(x, 4)
    for i, own in enumerate(error):
        if name == "mae":
            mean, variance = mae.visible_statistics(patches, mask, (4, 4))
            made = predicted * (variance + 1e-6).sqrt() + mean
        else:
            made = predicted
        off = (common.unpatchify(patches.scatter(1, index, made), 4, (4, 4)) - x)[i] * torch.tensor(common.STD)[
            :, None, None
        ]
        assert own == pytest.approx(off.square().sum().item() / (12 * 48), rel=1e-3)
    if name == "mae":
        honest = analyze.reconstruction(about)[1]
        cheating = analyze.reconstruction(study(runs, name, images=4, statistics="true"))[1]
        assert "TRUE" in cheating["statistics"] and "visible neighbours" in honest["statistics"]
        assert cheating["squared_error_of_hidden_pixels"] != error


def test_latent_reconstruction_skips_the_regressor(runs):
    about = study(runs, "pixels", images=4)
    before = analyze.latent_reconstruction(about)[1]
    for parameter in about.runs[0].method.regressor.parameters():
        parameter.data.zero_()
    assert analyze.latent_reconstruction(about)[1] == before
    about.runs[0].method.decoder[0].mlp.fc1.weight.data.mul_(3)
    assert analyze.latent_reconstruction(about)[1] != before


def test_token_usage_counts(runs):
    about = study(runs, "dvae", images=12)
    found = analyze.token_usage(about)[1]["dvae"]
    tokens = about.runs[0].method.encoder.tokens(augment.center_crop_resize(about.pictures(12), 16)).flatten().tolist()
    counts = {code: tokens.count(code) for code in set(tokens)}
    assert found["used"] == len(counts) and found["codes"] == 8
    shares = [counts[code] / len(tokens) for code in found["by_frequency"]]
    assert shares == pytest.approx(found["shares"], abs=1e-6) and shares == sorted(shares, reverse=True)
    assert found["perplexity"] == pytest.approx(math.exp(-sum(s * math.log(s) for s in shares)), rel=1e-5)


def test_neighbours_are_the_training_images_of_largest_cosine(runs):
    about = study(runs, "mae", images=2)
    found = analyze.neighbours(about)[1]
    encoder = about.runs[0].encoder

    def vector(half, i):
        with torch.no_grad():
            return encoder(augment.normalize(augment.center_crop_resize(half.images(torch.tensor([i])), 16)))[
                0, 1:
            ].mean(dim=0)

    for query, near, cosines in zip(found["queries"], found["neighbours"], found["cosines"], strict=True):
        every = [cos(vector(about.val, query), vector(about.train, i)) for i in range(12)]
        assert near == sorted(range(12), key=lambda i: -every[i])[:6]
        assert cosines == pytest.approx(sorted(every, reverse=True)[:6], abs=1e-5)
    own = about.val.labels[found["queries"]][:, None]
    right = (about.train.labels[torch.tensor(found["neighbours"])] == own).double().mean()
    assert found["same_class"] == pytest.approx(right.item())


def test_views_are_cut_from_the_boxes_in_the_numbers(runs):
    about = study(runs, "cmae", images=3)
    found = analyze.views(about)[1]
    images = about.train.images(analyze.spaced(12, 3))
    batch = about.runs[0].draw(images, analyze.spaced(12, 3))
    (crops,), (shifts,) = found["crops"], found["shifts"]
    for i, ((top, left, height, width), (down, right)) in enumerate(zip(crops, shifts, strict=True)):
        box = torch.tensor([[top, left, height, width]])
        masters = [
            augment.crop_resize(images[i : i + 1], box, 18, hflip=torch.tensor([flip])) for flip in (False, True)
        ]
        views = [augment.normalize(master[:, :, :16, :16])[0] for master in masters]
        assert any(torch.allclose(view, batch.images[i], atol=1e-4) for view in views)
        assert 0 <= down <= 2 and 0 <= right <= 2


def test_views_show_the_box_around_what_the_encoder_attends_to(runs):
    about = study(runs, "loc", images=3)
    found = analyze.views(about)[1]
    method, images = about.runs[0].method, about.train.images(analyze.spaced(12, 3))
    x = augment.normalize(augment.crop_resize(images, torch.tensor([[0, 0, 20, 20]] * 3), 16))
    with torch.no_grad():
        maps = analyze.attention_maps([method.encoder.blocks[1].attn], lambda: method.encoder(x))[0]
    heat = maps[:, :, 0, 1:].mean(dim=1).view(3, 4, 4)
    torch.testing.assert_close(torch.tensor(found["heat"]), heat, atol=1e-5, rtol=1e-4)
    boxes = cmae_loc.locate(heat, (16, 16), method.config.crop_threshold)
    torch.testing.assert_close(torch.tensor(found["boxes"]), boxes, atol=0.07, rtol=0)  # a pixel of 16


def test_curves_are_the_log(runs):
    found = analyze.curves(study(runs, "mae"))[1]["mae"]  # the half-written line is left out
    assert found == {"step": [1, 2, 3], "epoch": [0.25, 0.5, 0.75], "loss": [3, 1.5, 1], "part": [1, 0.5, 1 / 3],
                     "lr": [0.1, 0.2, 0.1 * 3]}  # fmt: skip


def test_labelled_images_are_equally_many_of_each_class(runs):
    images, labels = study(runs, "mae").labelled(6, 2)
    assert labels.tolist() == [0, 0, 0, 2, 2, 2] and len(images) == 6
    every = study(runs, "mae").val
    assert torch.equal(images[3], every.images(torch.tensor([8]))[0])


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "name, words, message",
    [
        ("conmim", "decoder-similarity", "decoder-similarity: conmim has no decoder whose mask tokens"),
        ("autoencoder", "decoder-attention", "autoencoder hides nothing"),
        ("mae", "token-usage", "token-usage: mae has no codebook"),
        ("mae", "latent-reconstruction", "latent-reconstruction: mae has no regressor"),
        ("dvae", "features", "features: dvae keeps no ViT"),
        ("cross", "reconstruction", "cross was taught nothing that can be seen"),
        ("conmim", "reconstruction --statistics true", "conmim predicts no patches of pixels"),
        ("raw", "reconstruction --statistics true", "raw predicts pixels as they are; leave out --statistics"),
        ("mae", "semantic-similarity", "give --reference PATH"),
        ("mae", "curves --images 3", "--images: says nothing to curves; leave it out, or draw attention-"),
        ("mae", "features --mass 0.5", "--mass: says nothing to features; leave it out, or draw attention-map"),
        ("mae", "attention-map --mass 1.5", "mass 1.5: must be above 0 and at most 1"),
        ("mae", "attention-map --query 3", "query '3': not a patch; give its row and column, as in 3,4"),
        ("mae", "attention-map --query 4,0", "query 4,0: outside of mae's 4 x 4 patches"),
        ("mae", "features --images 0", "images 0: must be at least 1"),
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
