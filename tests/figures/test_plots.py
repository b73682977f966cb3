"""Each figure shows what it says: its own numbers, computed again from the run's parts."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_analyze import first_weights, study  # noqa: F401  (the fixture `runs`)
from test_figure_measures import cos

import cmae_loc
import common
import mae
from common import ViT
from figures import measures, plots
from figures.encoders_and_images import Absent, spaced
from inputs import augment
from runtime import encoder_files, files


def test_decoders_in_either_order_of_tokens_give_the_same_maps_and_features(runs):
    """cmae_loc's decoder works in raster order, MAE's with visible patches first: the same weights, the same figure."""
    about = study(runs, "mae", "loc")
    one, other = about.runs
    other.method.load_state_dict(one.method.state_dict(), strict=False)  # encoder and decoder
    assert type(other.decoder) is cmae_loc.Decoder and type(one.decoder) is mae.Decoder
    images = about.pictures(3)
    mask = one.masks(images)
    for function in (measures.decoder_maps, measures.decoder_features):
        ours, theirs = function(one, images, mask), function(other, images, mask)
        assert len(ours) == 2
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)
    maps = measures.decoder_maps(one, images, mask)[0]
    torch.testing.assert_close(maps.sum(dim=3), torch.ones(3, 2, 17))


def test_a_run_has_one_colour_in_every_panel(runs, tmp_path):
    """Also where another run lacks the part that a panel shows."""
    about = study(runs, "mae", "cmae")
    for run, part in zip(about.runs, ("one", "two"), strict=True):
        run.directory = tmp_path / part
        run.directory.mkdir()
        rows = [{}, *({"step": s, "epoch": s, "loss": 1 / s, part: s, "lr": 0.1} for s in (1, 2))]
        (run.directory / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    figure, found = plots.curves(about)
    assert list(found["cmae"]) == ["step", "epoch", "loss", "one", "lr", "two"]
    panels = {axis.get_title(): axis.get_lines() for axis in figure.axes if axis.get_title()}
    colours = [line.get_color() for line in panels["loss"]]
    assert colours[0] != colours[1]
    assert [line.get_color() for line in panels["two"] if len(line.get_xdata())] == colours[1:]
    assert [line.get_color() for line in panels["one"] if len(line.get_xdata())] == colours[:1]


def test_decoder_similarity_compares_mask_tokens_under_one_mask(runs):
    about = study(runs, "mae", images=5)
    (run,), series = about.runs, plots.decoder_similarity(about)[1]["mae"]
    images = about.pictures(5)
    mask = run.masks(images, alike=True)
    assert all(torch.equal(row, mask.masked[0]) for row in mask.masked) and mask.masked.shape == (5, 12)
    for layer, maps in enumerate(measures.decoder_maps(run, images, mask)):
        rows = [maps[i][:, [1 + int(q) for q in mask.masked[0]], 1:] for i in range(5)]
        pairs = [cos(rows[i], rows[j]) for i in range(5) for j in range(5) if i != j]
        assert series[layer] == pytest.approx(sum(pairs) / 20, rel=1e-5)
    assert not any(torch.equal(row, run.masks(images).masked[0]) for row in run.masks(images).masked[1:])


def test_semantic_similarity_of_an_encoder_of_another_grid_counts_the_same_patches(runs, tmp_path):
    torch.manual_seed(1)
    coarse = ViT(image_size=16, patch_size=8, width=8, depth=1, heads=2).eval()
    files.save(tmp_path / "encoder.pt", dict(settings=coarse.settings, state_dict=coarse.state_dict()))
    about = study(runs, "mae", reference=tmp_path / "encoder.pt", images=4)
    series = plots.semantic_similarity(about)[1]["mae"]
    images, (run,) = about.pictures(4), about.runs
    larger = encoder_files.load_encoder(tmp_path / "encoder.pt", image_size=32)  # 4 x 4 patches of 8
    with torch.no_grad():
        theirs = larger(augment.normalize(augment.center_crop_resize(images, 32)))[:, 1:]
        x = augment.normalize(augment.center_crop_resize(images, 16))
        mask, outputs = run.masks(images), []
        run.decoder.blocks[1].register_forward_hook(lambda *about: outputs.append(about[2]))
        run.decoder.features(run.encoder(x, mask.visible), mask)
    last = common.restore(*outputs[0][:, 1:].split([4, 12], dim=1), mask)
    assert series[1] == pytest.approx(measures.semantic_similarity(theirs, last).mean().item(), rel=1e-5)


def test_equations_7_and_8_take_a_batch_of_images_at_a_time(runs, monkeypatch):
    monkeypatch.setattr("figures.encoders_and_images.BATCH", 4)
    about, sizes = study(runs, "mae", images=10, reference=runs / "conmim" / "encoder.pt"), []
    run, (_, reference) = about.runs[0], about.encoders[1]
    watch = run.decoder.blocks[0].register_forward_hook(lambda *call: sizes.append(len(call[2])))
    positions, semantic = plots.decoder_similarity(about)[1]["mae"], plots.semantic_similarity(about)[1]["mae"]
    watch.remove()
    assert sizes == [4, 4, 2] * 2
    images, terms = about.pictures(10), [[], []]
    mask = common.Mask(*(side[:1].expand(10, -1) for side in run.masks(images[:4])))
    maps = [m[:, :, 1 + mask.masked[0], 1:].flatten(1) for m in measures.decoder_maps(run, images, mask)]
    for found, layer in zip(positions, maps, strict=True):
        pairs = [cos(layer[i], layer[j]) for i in range(10) for j in range(10) if i != j]
        assert found == pytest.approx(sum(pairs) / 90, rel=1e-5)
    for step, part in enumerate(images.split(4)):
        theirs = measures.features(reference, [part], of="patches")
        for layer, x in enumerate(measures.decoder_features(run, part, run.masks(part, step=step))):
            terms[layer] += measures.semantic_similarity(theirs, x).tolist()
    assert semantic == pytest.approx([sum(layer) / 10 for layer in terms], rel=1e-6)
    assert not torch.equal(run.masks(images[:4]).masked, run.masks(images[:4], step=1).masked)


def test_attention_distances_average_heads_and_images(runs):
    about = study(runs, "mae", images=12)
    found = plots.attention_distance(about)[1]["mae"]
    encoder, images = about.runs[0].encoder, about.pictures(12)
    x = augment.normalize(augment.center_crop_resize(images, 16))
    with torch.no_grad():
        tokens = encoder.blocks[0](
            torch.cat([(encoder.cls_token + encoder.pos_embed[:, :1]).expand(12, -1, -1), encoder.embed(x)], 1)
        )
        maps = measures.attention_weights(encoder.blocks[1].attn, encoder.blocks[1].norm1(tokens))
    expected = measures.attention_distance(maps, (4, 4), 4)
    assert found["pixels"][1] == pytest.approx(expected.mean().item(), rel=1e-5)
    assert found["heads"][1] == pytest.approx(expected.mean(dim=0).tolist(), rel=1e-4)


def test_decoder_attention_is_that_of_hidden_patches(runs):
    about = study(runs, "lcmae", images=2)
    (run,), found = about.runs, plots.decoder_attention(about)[1]["attention"]
    images = about.pictures(2)
    mask = run.masks(images, alike=True)
    maps = measures.decoder_maps(run, images, mask)
    assert len(found) == 2 * 2 * 2  # places, images, layers
    assert len({(f["row"], f["column"], f["image"], f["layer"]) for f in found}) == 8
    for entry in found:
        query = 4 * entry["row"] + entry["column"]
        assert query in mask.masked[0].tolist()
        expected = maps[entry["layer"] - 1][entry["image"], :, 1 + query].mean(dim=0)
        patches = torch.tensor(entry["patches"]).flatten()
        torch.testing.assert_close(patches, expected[1:], atol=1e-5, rtol=1e-4)
        assert entry["class_token"] + patches.sum().item() == pytest.approx(1, abs=1e-4)


def test_layers_of_figure_4_are_the_papers():
    assert plots.layers_of_figure_4(8) == [1, 2, 3, 5, 8]
    assert [plots.layers_of_figure_4(depth) for depth in (1, 2, 4)] == [[1], [1, 2], [1, 2, 3, 4]]
    assert all(plots.layers_of_figure_4(depth)[:: len(plots.layers_of_figure_4(depth)) - 1] == [1, depth]
               for depth in range(2, 25))  # fmt: skip


def test_attention_map_asks_the_class_token_of_the_last_block(runs):
    about = study(runs, "mae", images=3)
    found = plots.attention_map(about)[1]["mae"]
    encoder, x = about.runs[0].encoder, augment.normalize(augment.center_crop_resize(about.pictures(3), 16))
    with torch.no_grad():
        maps = measures.attention_maps([encoder.blocks[1].attn], lambda: encoder(x))[0]
    expected = sum(maps[:, head, 0, 1:] for head in range(2)) / 2
    torch.testing.assert_close(torch.tensor(found["maps"]).flatten(1), expected, atol=1e-5, rtol=1e-4)
    assert found["share_of_patches"] == pytest.approx(measures.mass_region(expected, 0.5).double().mean(dim=1).tolist())


@pytest.mark.parametrize("name", ["mae", "conmim"])
def test_reconstruction_is_what_training_pictures_show(runs, name):
    """Where a decoder predicts patches, of the central squares of the images."""
    about = study(runs, name, images=4)
    figure, found = plots.reconstruction(about)
    (run,), images = about.runs, about.pictures(4)
    batch = run.draw(images)
    if name == "mae":
        batch = mae.Batch(augment.normalize(augment.center_crop_resize(images, 16)), batch.mask)
    rows = run.method.picture(batch)
    shown = np.stack([axis.images[0].get_array() for axis in figure.axes])
    np.testing.assert_allclose(shown, rows.flatten(0, 1).permute(0, 2, 3, 1).numpy(), atol=1e-6)
    assert ", ".join(axis.get_ylabel() for axis in figure.axes[::4]).replace("\n", " ") + "." == found["rows"]


def test_class_distances_are_of_as_many_classes_as_asked_and_compared_with_the_first_run(runs):
    found = plots.class_distances(study(runs, "mae", "cmae", classes=2))[1]
    assert found["classes"] == ["ant", "cow"]
    every = plots.class_distances(study(runs, "mae", "cmae"))[1]
    assert every["classes"] == ["ant", "bee", "cow"]
    one, other = (every[name]["inter_mean"]["of_classes"] for name in ("mae", "cmae"))
    assert every["cmae"]["inter_larger_than_first"] == sum(b > a for a, b in zip(one, other, strict=True))
    assert every["mae"]["inter_larger_than_first"] == 0
    again = plots.class_distances(study(runs, "cmae", "mae"))[1]
    assert again["mae"]["inter_larger_than_first"] == 3 - every["cmae"]["inter_larger_than_first"]


def test_bars_of_token_variance_are_those_of_each_encoder_one_after_another(runs):
    about = study(runs, "mae", "conmim", images=5)
    figure, found = plots.token_variance(about)
    for run in about.runs:
        x = measures.features(run.encoder, about.batches(5), "patches")
        assert found[run.label] == measures.variance_shares(x) and 0 < found[run.label]["place"] < 1
    bars = [[bar.get_x(), bar.get_width()] for bar in figure.axes[0].patches]
    (first, other), (middle, _), (last, _) = (bars[2 * i : 2 * i + 2] for i in range(3))
    assert first == pytest.approx([0, found["mae"]["place"]]) and other == pytest.approx([0, found["conmim"]["place"]])
    assert middle == pytest.approx([first[1], found["mae"]["image"]]) and sum(last) == pytest.approx(1)


def test_patches_are_coloured_by_label_maps(runs, tmp_path):
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("a", "b"):
        labels = np.zeros((16, 16), np.uint8)
        labels[:, 8:], labels[:4] = 2, 255
        Image.fromarray(labels).save(tmp_path / f"SegmentationClass/{name}.png")
        Image.fromarray(np.full((16, 16, 3), 40 * labels[:, :, None], np.uint8)).save(
            tmp_path / f"JPEGImages/{name}.jpg"
        )
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("a\nb\n")
    about = study(runs, "mae", **{"pixels": tmp_path})
    found = plots.features(about)[1]
    assert found["mae"]["labels"] == [0] * 12 + [2] * 12 and about.shown == {"label maps": [0, 1]}
    images, _ = about.label_maps(2)
    x = measures.features(about.runs[0].encoder, images, "patches")
    at = [4 * row + c for half in ((0, 1), (2, 3)) for row in range(8) if row % 4 for c in half]
    torch.testing.assert_close(torch.tensor(found["mae"]["points"]), measures.pca(x.flatten(0, 1)[at])[0].float(),
                               atol=1e-4, rtol=1e-3)  # fmt: skip


def test_latent_reconstruction_skips_the_regressor(runs):
    about = study(runs, "pixels", images=4)
    before = plots.latent_reconstruction(about)[1]
    for parameter in about.runs[0].method.regressor.parameters():
        parameter.data.zero_()
    assert plots.latent_reconstruction(about)[1] == before
    about.runs[0].method.decoder[0].mlp.fc1.weight.data.mul_(3)
    assert plots.latent_reconstruction(about)[1] != before


def test_views_are_cut_from_the_boxes_in_the_numbers(runs):
    about = study(runs, "cmae", images=3)
    found = plots.views(about)[1]
    images = about.train.images(spaced(12, 3))
    batch = about.runs[0].draw(images, spaced(12, 3))
    (crops,), (shifts,) = found["crops"], found["shifts"]
    for i, ((top, left, height, width), (down, right)) in enumerate(zip(crops, shifts, strict=True)):
        box = torch.tensor([[top, left, height, width]])
        masters = [
            augment.crop_resize(images[i : i + 1], box, 18, hflip=torch.tensor([flip])) for flip in (False, True)
        ]
        views = [augment.normalize(master[:, :, :16, :16])[0] for master in masters]
        assert any(torch.allclose(view, batch.images[i], atol=1e-4) for view in views)
        assert 0 <= down <= 2 and 0 <= right <= 2


def test_a_frame_has_the_sides_of_its_box_in_pictures_and_maps_of_any_shape():
    figure, ((axis, *_), _) = plots.gallery("two rows", dict.fromkeys(("a", "b"), torch.zeros(4, 3, 16, 32)))
    assert figure.get_figheight() - 0.8 == pytest.approx(2 * 7.5 / 4 / 2)  # no gaps: they are half as high as wide
    for size in ((16, 32), (4, 2)):
        plots.frame(axis, (0.25, 0.5, 0.5, 0.125), size)
        (h, w), drawn = size, axis.patches[-1]
        assert [*drawn.get_xy()] == [0.5 * w - 0.5, 0.25 * h - 0.5]  # the first pixel begins at -1/2
        assert (drawn.get_height(), drawn.get_width()) == (0.5 * h, 0.125 * w)


def test_views_show_the_box_around_what_the_encoder_attends_to(runs):
    about = study(runs, "loc", images=3)
    found = plots.views(about)[1]
    method, images = about.runs[0].method, about.train.images(spaced(12, 3))
    x = augment.normalize(augment.crop_resize(images, torch.tensor([[0, 0, 20, 20]] * 3), 16))
    with torch.no_grad():
        maps = measures.attention_maps([method.encoder.blocks[1].attn], lambda: method.encoder(x))[0]
    heat = maps[:, :, 0, 1:].mean(dim=1).view(3, 4, 4)
    torch.testing.assert_close(torch.tensor(found["heat"]), heat, atol=1e-5, rtol=1e-4)
    boxes = cmae_loc.locate(heat, (16, 16), method.config.crop_threshold)
    torch.testing.assert_close(torch.tensor(found["boxes"]), boxes, atol=0.07, rtol=0)  # a pixel of 16


def test_what_is_measured_now_and_then_has_a_panel(runs, tmp_path):
    about, rows = study(runs, "mae"), [dict(step=s, epoch=s, loss=1 / s, lr=0.1) for s in (1, 2, 3, 4)]
    about.runs[0].directory = tmp_path
    rows[1]["knn"], rows[2]["knn"] = 30.0, 40.0  # not at first, and not at the end
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, [{}, *rows])))
    figure, found = plots.curves(about)
    (line,) = {axis.get_title(): axis for axis in figure.axes}["kNN, per cent"].get_lines()
    assert [list(line.get_xdata()), list(line.get_ydata())] == [[2, 3], [30, 40]]
    assert found["mae"]["knn"] == [None, 30, 40, None]


def test_fine_tuning_is_the_mean_of_the_seeds_at_each_epoch(runs, tmp_path):
    """As far as all seeds are. Runs that have none are named."""
    about = study(runs, "mae", "cmae")
    logs = {
        ("mae", "finetune", 0): {1: 20.0, 2: 40.0, 3: 50.0}, ("mae", "finetune", 1): {1: 30.0, 2: 50.0},
        ("mae", "supervised", 0): {1: 10.0, 3: 15.0}, ("mae", "linear-paper", 0): {},
        ("cmae", "finetune-8x8", 7): {2: 9.0},
    }  # fmt: skip
    for (name, protocol, seed), tops in logs.items():
        folder = tmp_path / name / protocol / f"seed-{seed}"
        folder.mkdir(parents=True)
        lines = [
            dict(epochs=3),
            *(dict(epoch=e, loss=1.0) | (dict(top1=tops[e]) if e in tops else {}) for e in (1, 2, 3)),
        ]
        (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for run in about.runs:
        run.directory = tmp_path / run.label
    figure, found = plots.fine_tuning(about)
    assert found == {
        "mae": dict(epoch=[1, 2], top1=[25, 45]), "mae, supervised": dict(epoch=[1, 3], top1=[10, 15]),
        "cmae, finetune-8x8": dict(epoch=[2], top1=[9]),
    }  # fmt: skip
    drawn = {line.get_label(): [list(line.get_xdata()), list(line.get_ydata())] for line in figure.axes[0].get_lines()}
    assert drawn == {label: list(points.values()) for label, points in found.items()}
    about.runs[1].directory = tmp_path / "mae" / "linear-paper"
    with pytest.raises(Absent, match=r"^cmae has not been fine-tuned; evaluate\.py --protocol finetune does that$"):
        plots.fine_tuning(about)


def test_curves_are_the_log(runs):
    found = plots.curves(study(runs, "mae"))[1]["mae"]  # the half-written line is left out
    assert found == {"step": [1, 2, 3], "epoch": [0.25, 0.5, 0.75], "loss": [3, 1.5, 1], "part": [1, 0.5, 1 / 3],
                     "lr": [0.1, 0.2, 0.1 * 3]}  # fmt: skip
