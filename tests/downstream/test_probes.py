"""Features of all images of a set, kNN against the naive vote, the linear probe against its optimality conditions."""

import math

import numpy as np
import pytest
import seed_offset  # noqa: F401
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import common
from common import ViT
from downstream import protocols
from downstream.protocols import extract
from inputs import augment
from runtime import process
from runtime.errors import InputError


def small_vit(**settings) -> ViT:
    torch.manual_seed(0)
    return ViT(**dict(image_size=16, patch_size=8, width=8, depth=2, heads=2) | settings)


class FakeSet:
    """What `extract` asks of a data.ImageSet: n random images, some of which may not decode."""

    name, classes = "fake", ["a", "b", "c"]

    def __init__(self, n: int, bad=()):
        generator = torch.Generator().manual_seed(n)
        self.pixels = torch.randint(0, 256, (n, 3, 16, 16), generator=generator, dtype=torch.uint8)
        self.labels = torch.randint(0, 3, (n,), generator=generator)
        self.bad = bad

    def __len__(self):
        return len(self.labels)

    def batches(self, orders, device):
        for order in orders:
            order = torch.tensor([self.following(int(i)) for i in order])
            yield self.pixels[order], order

    def following(self, i: int) -> int:
        """The image itself, or the next one that decodes, around the end: what data.ImageSet puts in its place."""
        return self.following((i + 1) % len(self)) if i in self.bad else i


@pytest.mark.parametrize("features", ["mean", "cls"])
def test_a_feature_is_the_patch_mean_or_class_token_after_the_final_norm(features):
    encoder, images = small_vit(), FakeSet(5)
    torch.nn.init.uniform_(encoder.norm.weight, 0.5, 2.0)
    x, labels = extract(encoder, images, "cpu", batch_size=2, features=features)
    for i in range(5):
        pixels = images.pixels[i].float() / 255
        for channel in range(3):
            pixels[channel] = (pixels[channel] - common.MEAN[channel]) / common.STD[channel]
        tokens = encoder.norm(encoder(pixels[None], norm=False))[0]
        expected = tokens[0] if features == "cls" else sum(tokens[1:]) / 4
        torch.testing.assert_close(x[i], expected.detach(), rtol=1e-5, atol=1e-5)
    assert labels.tolist() == images.labels.tolist() and not x.requires_grad


def test_bf16_works_on_the_encoder_and_ends_in_float32():
    exact, rounded = (extract(small_vit(), FakeSet(4), "cpu", precision=p)[0] for p in ("auto", "bf16"))
    assert rounded.dtype == torch.float32 and not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, rtol=0, atol=0.05)


def test_extraction_switches_drop_path_off_and_leaves_the_mode_as_it_was():
    encoder = small_vit(drop_path=0.5).train()
    once, again = (extract(encoder, FakeSet(6), "cpu")[0] for _ in range(2))
    assert torch.equal(once, again) and encoder.training


def test_larger_images_and_images_of_many_sizes_are_resized():
    class Mixed(FakeSet):
        def batches(self, orders, device):
            for order in orders:
                yield [torch.full((3, 20 + int(i), 24), 10 * int(i), dtype=torch.uint8) for i in order], order

    x, _ = extract(small_vit(), Mixed(4), "cpu", batch_size=3)
    flat = torch.stack([torch.full((3, 16, 16), 10 * i / 255) for i in range(4)])
    expected = small_vit()(augment.normalize(flat))[:, 1:].mean(dim=1)
    torch.testing.assert_close(x, expected.detach(), rtol=1e-4, atol=1e-4)


def test_images_that_are_skipped_take_their_labels_with_them():
    whole, labels = extract(small_vit(), FakeSet(7), "cpu")
    x, y = extract(small_vit(), FakeSet(7, bad=[0, 4, 5]), "cpu", batch_size=2)
    kept = [1, 2, 3, 6]
    torch.testing.assert_close(x, whole[kept])
    assert y.tolist() == labels[kept].tolist()


def test_features_that_say_nothing_are_refused():
    encoder = small_vit()
    encoder.norm.bias.data[0] = math.nan
    with pytest.raises(InputError, match="not finite"):
        extract(encoder, FakeSet(3), "cpu")


SHARED = [(1, ()), (4, ()), (5, ()), (7, (3, 6)), (9, (0, 1, 2))]  # images of a set, and those that do not decode


def _extract_as_one_of(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=ranks)
    found = [extract(small_vit(), FakeSet(n, bad), "cpu", batch_size=2) for n, bad in SHARED]
    torch.save(found, f"{folder}/{rank}.pt")
    process.stop()


def test_every_image_counts_once_on_every_rank_whatever_their_number(tmp_path):
    """Three gloo processes: with 4 images the last has none, with 9 the first has but bad ones."""
    torch.multiprocessing.spawn(_extract_as_one_of, (3, str(tmp_path)), nprocs=3)
    for (n, bad), *found in zip(SHARED, *(torch.load(tmp_path / f"{r}.pt") for r in range(3)), strict=True):
        x, y = extract(small_vit(), FakeSet(n, bad), "cpu")
        assert len(x) == n - len(bad)
        for features, labels in found:
            torch.testing.assert_close(features, x, rtol=1e-5, atol=1e-6)
            assert torch.equal(labels, y)


def naive_knn(bank, bank_labels, queries, labels, classes, k, tau) -> tuple[float, float]:
    hits = np.zeros(2)
    for query, label in zip(queries, labels, strict=True):
        cosines = [x @ query / np.sqrt((x @ x) * (query @ query)) for x in bank]
        votes = [0.0] * classes
        for i in sorted(range(len(bank)), key=lambda i: -cosines[i])[:k]:
            votes[bank_labels[i]] += math.exp(cosines[i] / tau)
        guesses = sorted(range(classes), key=lambda c: (-votes[c], c))
        hits += label == guesses[0], label in guesses[: min(5, classes)]
    return tuple(100 * hits / len(queries))


@given(
    seed=st.integers(0, 2**32), n=st.integers(1, 40), queries=st.integers(1, 8), classes=st.integers(1, 8),
    width=st.integers(2, 6), k=st.integers(1, 25), tau=st.floats(0.03, 2), chunk=st.sampled_from([1, 60, 2**26]),
)  # fmt: skip
def test_knn_is_the_naive_vote(seed, n, queries, classes, width, k, tau, chunk):
    draw = np.random.default_rng(seed)
    bank, x = (draw.normal(size=(m, width)).astype(np.float32) * draw.uniform(0.1, 9, (m, 1)) for m in (n, queries))
    bank_labels, labels = (draw.integers(0, classes, m) for m in (n, queries))
    expected = naive_knn(bank.astype(np.float64), bank_labels, x.astype(np.float64), labels, classes, k, tau)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocols, "SIMILARITIES", chunk)
        tensors = [torch.from_numpy(a) for a in (bank.astype(np.float32), bank_labels, x.astype(np.float32), labels)]
        found = protocols.knn(*tensors, classes, k, tau)
    assert (found["top1"], found["top5"]) == pytest.approx(expected) and found["n"] == queries


def test_a_low_temperature_does_not_overflow():
    bank = torch.tensor([[1.0, 0.0], [1.0, 0.1]])
    found = protocols.knn(bank, torch.tensor([0, 1]), torch.tensor([[1.0, 0.08]]), torch.tensor([1]), 2, tau=1e-3)
    assert found["top1"] == 100  # exp(1 / τ) is infinite in any float, and two infinite votes would tie


@pytest.mark.parametrize("wrong", [dict(k=0), dict(tau=0.0)])
def test_knn_without_neighbours_or_temperature_is_refused(wrong):
    with pytest.raises(InputError, match="neighbour"):
        protocols.knn(torch.ones(2, 2), torch.zeros(2).long(), torch.ones(1, 2), torch.zeros(1).long(), 2, **wrong)


def test_a_score_that_is_not_a_number_wins_nothing():
    scores = torch.tensor([[math.nan] * 6, [0.0, 1, 2, 3, 4, 5]])
    found = protocols.accuracy(scores, torch.tensor([0, 5]))
    assert (found["top1"], found["top5"]) == (50, 50)


def blobs(n: int, classes: int, spread: float, seed: int = 0, width: int = 8):
    """Gaussian blobs around fixed corners."""
    draw = np.random.default_rng(seed)
    corners = np.random.default_rng(99).normal(size=(classes, width))
    labels = draw.integers(0, classes, n)
    x = corners[labels] + spread * draw.normal(size=(n, width))
    return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(labels)


@pytest.mark.parametrize("n", [200, 70_000])  # one piece and two
@pytest.mark.parametrize("penalty", [1e-1, 1e-3])
def test_the_gradient_of_the_penalised_objective_vanishes_at_the_fit(n, penalty):
    x, y = blobs(n, 4, spread=1.0)
    weights = protocols.fit(x, y, 4, penalty)
    x, w = x.double().numpy(), weights.double().numpy()
    scores = x @ w[1:] + w[0]
    share = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True) - np.eye(4)[y.numpy()]  # softmax - one-hot
    np.testing.assert_allclose(x.T @ share / n + penalty * w[1:], 0, atol=1e-4)
    np.testing.assert_allclose(share.mean(axis=0), 0, atol=1e-4)


@pytest.mark.training
def test_separable_classes_are_all_told_apart_and_random_labels_are_guessed_by_chance():
    train, val = blobs(1000, 10, 0.1, seed=1), blobs(2000, 10, 0.1, seed=2)
    assert protocols.linear_probe(*train, *val, 10)["top1"] == 100
    noise = torch.from_numpy(np.random.default_rng(3).integers(0, 10, 3000))
    found = protocols.linear_probe(train[0], noise[:1000], val[0], noise[1000:], 10)
    assert abs(found["top1"] - 10) < 3 and abs(found["top5"] - 50) < 5


@pytest.mark.training
def test_the_probe_does_not_see_units_and_repeats_itself_exactly():
    train, val = blobs(400, 5, 1.5, seed=1), blobs(300, 5, 1.5, seed=2)
    found = protocols.linear_probe(*train, *val, 5)
    assert found == protocols.linear_probe(*train, *val, 5)
    scale, shift = torch.logspace(-2, 2, 8), torch.linspace(-50, 50, 8)
    moved = protocols.linear_probe(train[0] * scale + shift, train[1], val[0] * scale + shift, val[1], 5)
    assert moved["top1"] == pytest.approx(found["top1"], abs=0.7) and moved["penalty"] == found["penalty"]


def test_what_the_probe_says_of_an_image_does_not_depend_on_the_others_that_it_is_tested_on():
    """Features are standardised by the training set: validation images in halves of other statistics score the same."""
    train, (x, y) = blobs(300, 5, 1.5, seed=1), blobs(200, 5, 1.5, seed=2)
    order = x[:, 0].argsort()  # the halves have other means and, above all, smaller deviations
    whole, *halves = (
        protocols.linear_probe(*train, x[rows], y[rows], 5, penalties=(1e-3,))
        for rows in (order, order[:40], order[40:])
    )
    hits = [round(found["top1"] * found["n"] / 100) for found in (whole, *halves)]
    assert hits[0] == sum(hits[1:]) and hits[0] > 60


@pytest.mark.training
def test_a_feature_that_never_varies_does_no_harm():
    train, val = blobs(400, 5, 0.3, seed=1), blobs(300, 5, 0.3, seed=2)
    flat = [torch.cat([x, torch.full((len(x), 1), 3.0)], dim=1) for x in (train[0], val[0])]
    found = protocols.linear_probe(flat[0], train[1], flat[1], val[1], 5)
    assert found["top1"] == pytest.approx(protocols.linear_probe(*train, *val, 5)["top1"], abs=0.7)


@pytest.mark.training
def test_the_penalty_is_chosen_on_a_tenth_of_training_and_the_fit_repeated_on_all(monkeypatch):
    train, val = blobs(120, 4, 3.0, seed=1, width=40), blobs(200, 4, 3.0, seed=2, width=40)
    x = (train[0] - train[0].mean(dim=0)) / train[0].std(dim=0, correction=0)
    held, losses = protocols.held_out(train[1]), {}
    for penalty in protocols.PENALTIES:
        w = protocols.fit(x[~held], train[1][~held], 4, penalty)
        shares = (x[held] @ w[1:] + w[0]).softmax(dim=1)
        losses[penalty] = -sum(math.log(p[label]) for p, label in zip(shares, train[1][held], strict=True))
    best = min(losses, key=losses.get)
    assert best not in (protocols.PENALTIES[0], protocols.PENALTIES[-1])  # or there were no choice to test
    rows, fit = [], protocols.fit
    monkeypatch.setattr(protocols, "fit", lambda x, *others: rows.append(len(x)) or fit(x, *others))
    found = protocols.linear_probe(*train, *val, 4)
    assert found["penalty"] == best
    assert rows == [int((~held).sum())] * len(protocols.PENALTIES) + [120]
    assert protocols.linear_probe(*train, val[0], 3 - val[1], 4)["penalty"] == found["penalty"]  # blind to validation


@given(st.lists(st.integers(0, 4), min_size=1, max_size=200))
def test_a_tenth_of_each_class_is_held_out(labels):
    held = protocols.held_out(torch.tensor(labels)).tolist()
    seen = [0] * 5
    for label, out in zip(labels, held, strict=True):
        assert out == (seen[label] % 10 == 0 and labels.count(label) > 1)
        seen[label] += 1


@settings(max_examples=5)
@given(classes=st.integers(1, 4), seed=st.integers(0, 99))
def test_with_fewer_than_five_classes_top5_is_full(classes, seed):
    train, val = blobs(30, classes, 2.0, seed), blobs(20, classes, 2.0, seed + 1)
    for protocol in (protocols.knn, protocols.linear_probe):
        assert protocol(*train, *val, classes)["top5"] == 100
