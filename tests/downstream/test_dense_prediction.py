"""Segmentation and detection: scores against loops, labels on their pixels, the grid's orientation."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from common import ViT
from downstream import dense_prediction
from inputs import augment, builtin_scenes, dense_sets
from runtime.errors import InputError

rle = pytest.importorskip("pycocotools.mask")


def small_vit(size: int = 32, p: int = 8, width: int = 16) -> ViT:
    torch.manual_seed(0)
    return ViT(size, p, width, depth=2, heads=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    builtin_scenes.write(folder, 24, seed=1)
    return folder


def test_what_is_read_is_normalised_for_its_encoder_in_whatever_process(folder):
    images = dense_sets.Segments(folder, "val")
    views = argparse.Namespace(mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])
    (plain,), (own,) = (
        next(dense_sets.Reader(images, 64, views=v).batches([[(0, 0)]], workers))
        for v, workers in ((None, 0), (views, 1))
    )
    h, w = own.fitted
    pixels = augment.denormalize(plain.image)[:, :h, :w]
    with augment.views_for(views):
        torch.testing.assert_close(own.image[:, :h, :w], augment.normalize(pixels), atol=1e-5, rtol=0)


@given(st.integers(2, 5), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_segmentation_scores_are_the_definitions(classes, n, seed):
    rng = np.random.default_rng(seed)
    labels = rng.choice([*range(classes), dense_sets.IGNORE], n)
    labels[0] = 0  # one at least
    predicted = rng.integers(0, classes, n)
    ious, hits, known = [], 0, 0
    for c in range(classes):
        both = sum(p == c and t == c for p, t in zip(predicted, labels, strict=True))
        either = sum((p == c or t == c) and t != dense_sets.IGNORE for p, t in zip(predicted, labels, strict=True))
        if either:
            ious.append(both / either)
    for p, t in zip(predicted, labels, strict=True):
        known += t != dense_sets.IGNORE
        hits += p == t
    matrix = dense_prediction.confusion(torch.from_numpy(predicted), torch.from_numpy(labels), classes)
    scores = dense_prediction.segmentation_scores(matrix)
    assert scores["miou"] == pytest.approx(100 * sum(ious) / len(ious))
    assert scores["pixel_accuracy"] == pytest.approx(100 * hits / known)


def truth_as_found(images: dense_sets.Instances, size: int, move: int = 0):
    """For each image, what a perfect detector would say of it, its masks moved to the right."""
    reader = dense_sets.Reader(images, size)
    for i in range(len(images)):
        sample = reader[0, i]
        goal = dense_prediction.target(sample.planes.roll(move, 2), sample.kinds)
        found = dict(boxes=goal["boxes"], labels=goal["labels"], scores=torch.ones(len(goal["labels"])))
        yield found | dict(masks=goal["masks"][:, None].float()), sample


def test_perfect_detections_score_100_and_moved_ones_less(folder):
    images = dense_sets.Instances(folder, "val")
    results = [
        r for found, s in truth_as_found(images, 64) for r in dense_prediction.detections(images, found, s.index)
    ]
    scores = dense_prediction.detection_scores(images.coco, results)
    assert scores == pytest.approx(
        {f"{kind}_{score}": 100 for kind in ("box", "mask") for score in ("ap", "ap50", "ap75")}
    )
    moved = [
        r for found, s in truth_as_found(images, 64, 2) for r in dense_prediction.detections(images, found, s.index)
    ]
    for kind in ("box", "mask"):
        assert dense_prediction.detection_scores(images.coco, moved)[f"{kind}_ap"] < 90
    wrong = [dict(r, category_id=1 + r["category_id"] % 4) for r in results]
    assert dense_prediction.detection_scores(images.coco, wrong)["mask_ap"] < 50
    assert set(dense_prediction.detection_scores(images.coco, []).values()) == {0}
    assert list(dense_prediction.detection_scores(images.coco, [], masks=False)) == ["box_ap", "box_ap50", "box_ap75"]


def test_of_labels_that_shrink_the_middle_one_stays():
    """As bicubic pixels lie: of four rows that become two, the second and the fourth, not the first and the third."""
    labels = torch.arange(4, dtype=torch.uint8)[:, None].expand(1, 4, 4).contiguous()
    _, planes, _ = dense_sets.fit(labels.repeat(3, 1, 1), labels, 255, 2, np.random.default_rng(0))
    assert planes[0].tolist() == [[1, 1], [3, 3]]


def test_detections_are_scaled_to_the_image_by_each_of_its_sides(monkeypatch):
    """They may scale apart, as sides in the square are whole: here 100 x 3 pixels are fitted as 32 x 1."""
    sample = dense_sets.Sample(0, torch.zeros(3, 32, 32), torch.empty(0), torch.empty(0), (100, 3), (32, 1))
    found = dict(boxes=torch.tensor([[0.0, 0.0, 1.0, 16.0]]), labels=torch.tensor([1]), scores=torch.ones(1))
    model = dense_prediction.Detector(small_vit(), 1).eval()
    monkeypatch.setattr(model.rcnn.rpn, "forward", lambda images, levels: (images.image_sizes, {}))
    seen, found = [], found | dict(masks=torch.ones(1, 1, 28, 28))
    monkeypatch.setattr(model.rcnn.roi_heads, "forward", lambda _, *where: ([found], seen.append(where)))
    (there,) = model.predict([sample], "cpu")
    assert seen == [([(32, 1)], [(32, 1)])]  # nothing is looked for beyond the image
    assert there["masks"].shape == (1, 1, 100, 3)
    assert (there["masks"][0, 0, 2:48] > 0.5).all() and not there["masks"][0, 0, 53:].any()
    (result,) = dense_prediction.detections(argparse.Namespace(ids=[7], categories=[5]), there, 0)
    assert result["bbox"] == [0, 0, 3, 50] and (result["image_id"], result["category_id"]) == (7, 5)


def test_of_confusions_the_rows_are_the_true_labels():
    assert dense_prediction.confusion(torch.tensor([1, 1, 0]), torch.tensor([0, 0, 0]), 2).tolist() == [[1, 2], [0, 0]]


@pytest.mark.parametrize("H, W", [(40, 64), (64, 40), (100, 30), (16, 16)])
def test_an_image_is_fitted_into_the_square_and_labels_stay_on_its_pixels(H, W):
    """Labels are drawn into the image itself, so that wherever it goes, they must be found again."""
    generator = torch.Generator().manual_seed(H)
    coarse = torch.randint(0, 2, (1, 1, 4, 4), generator=generator)
    labels = torch.nn.functional.interpolate(coarse.float(), (H, W), mode="nearest-exact")[0].byte()
    image = (labels * 255).repeat(3, 1, 1)
    square, planes, fitted = dense_sets.fit(image, labels, 255, 64, None)
    assert square.shape == (3, 64, 64) and planes is labels
    assert fitted == (round(H * 64 / max(H, W)), round(W * 64 / max(H, W)))
    assert not square[:, fitted[0] :].any() and not square[:, :, fitted[1] :].any()
    views = set()
    for seed in range(20):
        square, planes, (h, w) = dense_sets.fit(image, labels, 255, 64, np.random.default_rng(seed), (0.5, 2))
        assert square.shape == (3, 64, 64) and planes.shape == (1, 64, 64)
        assert (planes[:, :h, :w] != 255).all() and (planes == 255).sum() == 64 * 64 - h * w
        bright = square[0, :h, :w] > 0
        assert (bright == (planes[0, :h, :w] == 1)).float().mean() > 0.85  # they differ at edges
        views.add((h, w, planes.sum().item()))
    assert len(views) > 10


def test_half_of_the_views_are_mirrored_and_tests_are_not():
    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    image[:, :, :4] = 255
    labels, mirrored = (image[:1] > 0).byte(), 0
    for seed in range(80):
        square, planes, _ = dense_sets.fit(image, labels, 255, 16, np.random.default_rng(seed))
        assert torch.equal(square[0] > 0, planes[0] == 1)
        mirrored += torch.equal(planes, labels.flip(2))
    assert 25 < mirrored < 55
    assert all((dense_sets.fit(image, labels, 255, 16, None)[0][0, :, :4] > 0).all() for _ in range(9))


def test_ade_labels_are_reduced_by_one_and_0_is_no_class(tmp_path):
    for part, values in (("training", [0, 1, 2, 150]), ("validation", [0, 1, 2, 151])):
        for kind in ("images", "annotations"):
            (tmp_path / kind / part).mkdir(parents=True)
        Image.new("RGB", (2, 2)).save(tmp_path / "images" / part / "a.jpg")
        Image.fromarray(np.uint8(values).reshape(2, 2)).save(tmp_path / "annotations" / part / "a.png")
    train, val = (dense_sets.Segments(tmp_path, split, "ade") for split in ("train", "val"))
    assert train.classes == 150 and train.read(0)[1].tolist() == [[[255, 0], [1, 149]]]
    with pytest.raises(InputError, match="label 150"):
        val.read(0)


def test_targets_are_the_masks_that_show_with_boxes_up_to_their_last_pixels_ends():
    masks = torch.zeros(3, 8, 8, dtype=torch.uint8)
    masks[0, 2:4, 1:6], masks[2, 7, 7] = 1, 1
    goal = dense_prediction.target(masks, torch.tensor([4, 5, 6]))
    assert goal["labels"].tolist() == [4, 6] and torch.equal(goal["masks"], masks[[0, 2]])
    assert goal["boxes"].tolist() == [[1, 2, 6, 4], [7, 7, 8, 8]]


def test_crowds_are_left_out_and_images_without_objects_serve_tests_only(folder, tmp_path):
    for split in ("train", "val"):
        about = json.loads((folder / "annotations" / f"instances_{split}.json").read_text())
        for a in about["annotations"]:
            a["iscrowd"] = int(a["image_id"] == 0)
            a["category_id"] *= 10  # COCO's have gaps
        about["categories"] = [dict(id=10 * k, name=str(k)) for k in range(1, 5)]
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / f"annotations/instances_{split}2017.json").write_text(json.dumps(about))
    (tmp_path / "JPEGImages").symlink_to(folder / "JPEGImages")
    train, val = (dense_sets.Instances(tmp_path, split) for split in ("train", "val"))
    assert len(train) == 23 and 0 not in train.ids and len(val) == 6
    assert len(val.read(0)[1]) == 0 and train.categories == [10, 20, 30, 40]
    assert set(torch.cat([train.read(i)[2] for i in range(23)]).tolist()) == {1, 2, 3, 4}


def test_images_lie_in_the_folder_that_coco_names_after_the_split(folder, tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_val2017.json").symlink_to(folder / "annotations/instances_val.json")
    (tmp_path / "val2017").mkdir()
    (tmp_path / "val2017/JPEGImages").symlink_to(folder / "JPEGImages")
    ours, theirs = dense_sets.Instances(tmp_path, "val"), dense_sets.Instances(folder, "val")
    assert all(torch.equal(x, y) for x, y in zip(ours.read(0), theirs.read(0), strict=True))


def test_a_bright_patch_lights_up_its_own_cell():
    encoder = small_vit()
    for block in encoder.blocks:  # no attention: a cell then depends on its own patch alone
        torch.nn.init.zeros_(block.attn.proj.weight)
    dark, bright = torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32)
    bright[:, :, 8:16, 24:32] = 1  # row 1, column 3
    (lit,), (unlit,) = (dense_prediction.feature_maps(encoder, x, []) for x in (bright, dark))
    changed = (lit - unlit).abs().sum(dim=1)[0]
    assert unlit.shape == (1, 16, 4, 4)
    assert changed[1, 3] > 0 and changed.count_nonzero() == 1


@pytest.mark.parametrize("depth, taps", [(12, [3, 5, 7, 11]), (24, [7, 11, 15, 23]), (4, [0, 1, 2, 3]), (1, [0] * 4)])
@pytest.mark.parametrize("positions", ["sincos", "relative"])
def test_taps_are_beits_and_each_gives_what_its_block_gives(depth, taps, positions):
    torch.manual_seed(0)
    encoder, seen = ViT(16, 8, 8, depth=depth, heads=2, positions=positions), []
    for p in encoder.parameters():  # no table of positions is zero
        p.data += 0.1 * torch.randn_like(p)
    for block in encoder.blocks:
        block.register_forward_hook(lambda part, x, y: seen.append(y))
    assert dense_prediction.four_depths(encoder) == taps
    images = torch.randn(2, 3, 16, 16)
    maps = dense_prediction.feature_maps(encoder, images, taps)
    for x, i in zip(maps, taps, strict=True):
        assert torch.equal(x.flatten(2).mT, seen[i][:, 1:])
    (last,) = dense_prediction.feature_maps(encoder, images, [])
    torch.testing.assert_close(last.flatten(2).mT, encoder(images)[:, 1:])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_encoder_works_in_the_precision_and_all_ends_in_float32(precision):
    half = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    models = [
        dense_prediction.Segmenter(small_vit(), 3, precision=precision),
        dense_prediction.Detector(small_vit(), 3, "beit", precision),
    ]
    for model, heads in zip(models, (half, torch.float32), strict=True):
        seen = {}
        note = lambda name, seen: lambda part, x, y: seen.update({name: y.dtype})  # noqa: E731
        model.encoder.blocks[0].mlp.fc1.register_forward_hook(note("encoder", seen))
        head = model.heads[0][0] if isinstance(model, dense_prediction.Segmenter) else model.rcnn.roi_heads.box_head.fc6
        head.register_forward_hook(note("head", seen))
        sample = dense_sets.Sample(
            0, torch.randn(3, 32, 32), torch.ones(1, 32, 32).byte(), torch.tensor([1]), (32, 32), (32, 32)
        )
        assert model.train().loss([sample, sample], "cpu").dtype == torch.float32
        assert seen == dict(encoder=half, head=heads)


def test_the_pyramid_of_four_depths_is_transformers_beits():
    beit = pytest.importorskip("transformers.models.beit.modeling_beit")
    if not hasattr(beit, "BeitFPNNeck"):
        pytest.skip("this transformers has BEiT's pyramid in no class of its own")
    torch.manual_seed(0)
    ours, theirs = dense_prediction.Pyramid(8, "beit").train(), beit.BeitFPNNeck(beit.BeitConfig(hidden_size=8)).train()
    first = next(p for p in theirs.parameters() if p.ndim == 1)  # a bias that batch norm removes
    for a, b in zip(ours.parameters(), (p for p in theirs.parameters() if p is not first), strict=True):
        a.data = b.data + 0.1
        b.data = a.data.clone()
    maps = [torch.randn(2, 8, 4, 4) for _ in range(4)]
    for a, b in zip(ours(maps), theirs(maps), strict=True):
        torch.testing.assert_close(a, b)


def test_upernets_auxiliary_head_is_transformers_on_the_third_map_and_weighs_two_fifths():
    transformers = pytest.importorskip("transformers")
    from transformers.models.upernet import modeling_upernet

    model = dense_prediction.Segmenter(small_vit(), 3, "upernet").eval()
    config = transformers.UperNetConfig(num_labels=3, auxiliary_in_channels=16, auxiliary_channels=16)
    theirs = modeling_upernet.UperNetForSemanticSegmentation(config).auxiliary_head.eval()
    for a, b in zip(model.heads[1].parameters(), theirs.parameters(), strict=True):
        b.data = a.data.clone()
    images = torch.randn(2, 3, 32, 32)
    maps = model.pyramid(dense_prediction.feature_maps(model.encoder, images, model.taps))
    torch.testing.assert_close(model.heads[1](maps[2]), theirs(maps))
    assert len(model(images)) == 1  # the auxiliary one is for training
    model.train()
    samples = [
        dense_sets.Sample(i, x, torch.randint(0, 3, (1, 32, 32)), None, (32, 32), (32, 32))
        for i, x in enumerate(images)
    ]
    labels = torch.stack([s.planes[0] for s in samples])
    maps = model.pyramid(dense_prediction.feature_maps(model.encoder, images, model.taps))
    scores = [head(x) for head, x in zip(model.heads, (maps, maps[2]), strict=True)]
    scores = [torch.nn.functional.interpolate(x, (32, 32), mode="bilinear") for x in scores]
    main, auxiliary = (torch.nn.functional.cross_entropy(x, labels) for x in scores)
    torch.testing.assert_close(model.loss(samples, "cpu"), main + 0.4 * auxiliary)


def test_a_segmenters_loss_is_the_mean_over_all_pixels_and_none_where_there_is_no_label():
    torch.manual_seed(0)
    model = dense_prediction.Segmenter(small_vit(), 3).eval()
    labels = torch.randint(0, 3, (2, 1, 32, 32))
    labels[0, :, :20] = labels[1, :, :, 5:] = dense_sets.IGNORE
    samples = [dense_sets.Sample(i, torch.randn(3, 32, 32), labels[i], None, (32, 32), (32, 32)) for i in (0, 1)]
    loss, total = model.loss(samples, "cpu"), 0.0
    for s in samples:
        shares = model(s.image[None])[0][0].detach().double().softmax(dim=0)
        for row, column in (s.planes[0] != dense_sets.IGNORE).nonzero().tolist():
            total -= shares[s.planes[0, row, column], row, column].log().item()
    assert loss.item() == pytest.approx(total / (2 * 32 * 32), rel=1e-5)


def test_scores_are_taken_at_an_images_own_size_without_the_padding():
    """A model that reads the labels off the image; in padding or stretched they would be wrong."""
    labels = torch.zeros(1, 40, 20, dtype=torch.uint8)
    labels[:, 20:, 10:] = 1
    image = (255 * labels).repeat(3, 1, 1)
    square, planes, fitted = dense_sets.fit(image, labels, 255, 32, None)
    model = dense_prediction.Segmenter(small_vit(), 2)
    model.forward = lambda images: [torch.stack([-images[:, 0], images[:, 0]], dim=1)]
    samples = [dense_sets.Sample(0, square, planes, None, (40, 20), fitted)]
    assert model.measure(None, iter([samples]), "cpu")["pixel_accuracy"] > 95


def test_batch_norm_of_a_single_value_is_its_bias_and_of_more_is_torchs():
    """UperNet pools its coarsest map to one place: of a part with one image that is one value a channel."""
    ours, theirs = dense_prediction.BatchNorm(3).train(), torch.nn.BatchNorm2d(3).train()
    ours.bias.data += 2
    assert torch.equal(ours(torch.randn(1, 3, 1, 1)), torch.full((1, 3, 1, 1), 2.0))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(ours(x), theirs(x)) and torch.equal(ours.running_var, theirs.running_var)


@pytest.mark.parametrize("length, size", [(32, 32), (33, 32), (64, 32), (100, 32), (7, 3), (5, 1)])
def test_windows_cover_a_length_and_overlap_by_a_third_at_least(length, size):
    found = dense_prediction.starts(length, size)
    assert {i for start in found for i in range(start, start + size)} == set(range(length))
    assert found == sorted(set(found)) and all(b - a <= max(1, size * 2 // 3) for a, b in zip(found, found[1:]))  # noqa: B905, RUF007


def test_windows_are_put_together_in_their_places_and_averaged():
    """A model that reads the labels off the image, as long as four squares; and one that tells where a window is."""
    labels = (torch.arange(60)[:, None] // 7 + torch.arange(20) // 5).remainder(2).byte()[None]
    square, planes, fitted = dense_sets.fit((255 * labels).repeat(3, 1, 1), labels, 255, 32, None, windows=True)
    assert square.shape == (3, 96, 32) and fitted == (96, 32)
    model = dense_prediction.Segmenter(small_vit(), 2)
    model.forward = lambda images: [torch.stack([-images[:, 0], images[:, 0]], dim=1)]
    sample = dense_sets.Sample(0, square, planes, None, (60, 20), fitted)
    assert (model.predict([sample, sample], "cpu")[1] == labels[0]).float().mean() > 0.95
    votes = torch.tensor([3.0, -1, -1, -1, -1])[:, None, None].expand(-1, 32, 32)  # of windows at 0, 21, 42, 63, 64
    model.forward = lambda images: [torch.stack([votes, 0 * votes], dim=1)]
    (found,) = model.predict([sample._replace(size=(96, 32))], "cpu")
    assert found[:32].unique().tolist() == [0] and found[32:].unique().tolist() == [1]  # 3 - 1 > 0 where two overlap
    image = torch.cat([torch.full((3, 16, 32), -1.0), torch.full((3, 32, 32), 2.0)], dim=1)  # two windows from row 16
    model.forward = lambda images: [torch.stack([images[:, 0], 0 * images[:, 0]], dim=1)]
    (found,) = model.predict([sample._replace(image=image, size=(96, 64), fitted=(48, 32))], "cpu")
    assert found[31].unique().tolist() == [1] and found[32].unique().tolist() == [0]  # .75 · -1 + .25 · 2 < 0


def test_what_is_measured_does_not_train():
    class Model(torch.nn.Module):
        def measure(self, images, batches, device):
            return dict(
                training=self.training, grad=torch.is_grad_enabled(), seen=[s.index for b in batches for s in b]
            )

    class Three:
        fill = 0
        __len__ = lambda self: 3  # noqa: E731
        read = lambda self, i: (torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(1, 8, 8), torch.zeros(1))  # noqa: E731

    found = dense_prediction.measure(Model().train(), dense_sets.Reader(Three(), 8), 2, 0, torch.device("cpu"))
    assert found == dict(training=False, grad=False, seen=[0, 1, 2], n=3)


@pytest.mark.parametrize("kind", ["vitdet", "beit"])
@pytest.mark.parametrize("p, size", [(8, 64), (16, 128)])
def test_the_pyramid_has_its_strides_and_each_level_sees_its_own_place(kind, p, size):
    encoder = small_vit(size, p)
    for block in encoder.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
    taps = dense_prediction.four_depths(encoder) if kind == "beit" else []
    pyramid = dense_prediction.Neck(16, 8, kind).eval()
    bright = torch.zeros(1, 3, size, size)
    bright[:, :, 4 * p : 5 * p, 6 * p : 7 * p] = 1
    with torch.no_grad():
        dark, lit = (
            pyramid(dense_prediction.feature_maps(encoder, x, taps)) for x in (torch.zeros_like(bright), bright)
        )
    assert list(dark) == ["0", "1", "2", "3", "pool"]
    for (name, a), stride in zip(dark.items(), (p // 4, p // 2, p, 2 * p, 4 * p), strict=True):
        assert a.shape == (1, 8, size // stride, size // stride), name
        rows, columns = (lit[name] - a).abs().sum(dim=1)[0].nonzero().T
        if name != "pool":  # the patch's own cells, and one around them from the convolution
            for found, start in ((rows, 4 * p), (columns, 6 * p)):
                first, last = start // stride, max(start // stride, (start + p) // stride - 1)
                if kind == "beit":  # what comes from above spans the cell of the coarsest level, of twice a patch
                    first, last = start // (2 * p) * (2 * p) // stride, (start // (2 * p) + 1) * (2 * p) // stride - 1
                assert (found.min(), found.max()) == (max(0, first - 1), min(size // stride - 1, last + 1)), name
    torch.testing.assert_close(dark["pool"], dark["3"][:, :, ::2, ::2])


def test_anchors_stand_on_the_maps_strides():
    detector = dense_prediction.Detector(small_vit(64), 4).eval()
    sample = dense_sets.Sample(0, torch.zeros(3, 64, 64), torch.empty(0), torch.empty(0), (64, 64), (64, 64))
    images, maps = detector.levels([sample, sample], "cpu")
    assert images.image_sizes == [(64, 64)] * 2
    anchors, maps = detector.rcnn.rpn.anchor_generator(images, list(maps.values()))[0], list(maps.values())
    centres, first = (anchors[:, :2] + anchors[:, 2:]) / 2, 0
    for level, stride in zip(maps, (2, 4, 8, 16, 32), strict=True):
        mine = slice(first, first + 3 * level.shape[2] * level.shape[3])
        assert centres[mine].unique().tolist() == list(range(0, 64, stride))
        sides = (anchors[mine, 2:] - anchors[mine, :2]).prod(dim=1).sqrt()
        assert ((sides / (8 * stride) - 1).abs() < 0.1).all()
        first = mine.stop
    assert first == len(anchors)


@pytest.mark.parametrize("pyramid", ["vitdet", "beit"])
@pytest.mark.parametrize("masks", [True, False])
def test_a_detectors_loss_is_the_mean_of_each_images_own_and_repeats_itself(folder, pyramid, masks, monkeypatch):
    images = dense_sets.Instances(folder, "train")
    reader = dense_sets.Reader(images, 64, seed=3)
    samples = [reader[0, i] for i in range(3)]
    samples.append(samples[0]._replace(planes=samples[0].planes[:0], kinds=samples[0].kinds[:0]))  # nothing left of it
    model = dense_prediction.Detector(small_vit(64, width=32), 4, pyramid, masks=masks).train()
    model.rcnn.backbone.eval()  # batch norm would see who is together
    alone = torch.stack([model.loss([s], "cpu") for s in samples])
    images, levels = model.levels(samples, "cpu")
    for name, x in levels.items():
        levels[name] = torch.cat([model.levels([s], "cpu")[1][name] for s in samples])
        torch.testing.assert_close(x, levels[name], atol=1e-4, rtol=1e-4)
    with monkeypatch.context() as patch:  # the same to the bit: a rounding may exchange proposals that are nearly equal
        patch.setattr(model, "levels", lambda samples, device: (images, levels))
        torch.testing.assert_close(model.loss(samples, "cpu"), alone.mean())
    model.loss(samples, "cpu").backward()
    learn = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learn == {name for name, p in model.named_parameters() if p.grad is not None}
    assert ("encoder.norm.weight" in learn) == (pyramid == "vitdet") and any("mask" in n for n in learn) == masks
    assert len({s.seed for s in samples}) == 3
    other = model.loss([samples[0]._replace(seed=1)], "cpu")
    assert other != alone[0]  # other anchors and regions


def test_pictures_show_the_image_the_truth_and_what_is_found(folder, tmp_path):
    """Where a model finds the truth, the second and the third column are the same, and the first is the image."""
    images = dense_sets.Segments(folder, "val")
    reader, model = dense_sets.Reader(images, 64), dense_prediction.Segmenter(small_vit(64), 5)
    model.predict = lambda samples, device: [s.planes[0].long() for s in samples]
    dense_prediction.draw(model, reader, tmp_path / "a.png", "cpu")
    first, truth, found = np.split(np.array(Image.open(tmp_path / "a.png")).astype(int), 3, axis=1)
    assert first.shape == (6 * 256, 256, 3) and np.array_equal(truth, found) and not np.array_equal(first, truth)
    assert np.array_equal(first[:256:4, ::4], images.read(0)[0].permute(1, 2, 0).numpy())
    model.predict = lambda samples, device: [(s.planes[0] == 0).long() for s in samples]
    dense_prediction.draw(model, reader, tmp_path / "a.png", "cpu")
    _, same, wrong = np.split(np.array(Image.open(tmp_path / "a.png")).astype(int), 3, axis=1)
    assert np.array_equal(truth, same) and (truth != wrong).any(axis=2).mean() > 0.9
    instances = dense_sets.Instances(folder, "val")
    model, reader = dense_prediction.Detector(small_vit(64), 4), dense_sets.Reader(instances, 64)
    perfect = dict((s.index, found) for found, s in truth_as_found(instances, 64))
    for drop in ((), ("masks",)):
        model.predict = lambda samples, device, drop=drop: [
            {name: x for name, x in perfect[s.index].items() if name not in drop} for s in samples
        ]
        dense_prediction.draw(model, reader, tmp_path / "b.png", "cpu")
        first, truth, found = np.split(np.array(Image.open(tmp_path / "b.png")), 3, axis=1)
        assert (truth == found).mean() > 0.999 if not drop else 0.01 < (first != found).mean() < 0.1  # boxes alone
    for nothing in perfect.values():
        nothing["scores"] *= 0.4
    dense_prediction.draw(model, reader, tmp_path / "b.png", "cpu")
    first, _, found = np.split(np.array(Image.open(tmp_path / "b.png")), 3, axis=1)
    assert np.array_equal(first, found)
