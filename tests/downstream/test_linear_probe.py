"""The fast linear probe against its optimality conditions, and how it chooses its penalty."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from downstream import knn, linear_probe


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
    weights = linear_probe.fit(x, y, 4, penalty)
    x, w = x.double().numpy(), weights.double().numpy()
    scores = x @ w[1:] + w[0]
    share = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True) - np.eye(4)[y.numpy()]  # softmax - one-hot
    np.testing.assert_allclose(x.T @ share / n + penalty * w[1:], 0, atol=1e-4)
    np.testing.assert_allclose(share.mean(axis=0), 0, atol=1e-4)


@pytest.mark.training
def test_separable_classes_are_all_told_apart_and_random_labels_are_guessed_by_chance():
    train, val = blobs(1000, 10, 0.1, seed=1), blobs(2000, 10, 0.1, seed=2)
    assert linear_probe.linear_probe(*train, *val, 10)["top1"] == 100
    noise = torch.from_numpy(np.random.default_rng(3).integers(0, 10, 3000))
    found = linear_probe.linear_probe(train[0], noise[:1000], val[0], noise[1000:], 10)
    assert abs(found["top1"] - 10) < 3 and abs(found["top5"] - 50) < 5


@pytest.mark.training
def test_the_probe_does_not_see_units_and_repeats_itself_exactly():
    train, val = blobs(400, 5, 1.5, seed=1), blobs(300, 5, 1.5, seed=2)
    found = linear_probe.linear_probe(*train, *val, 5)
    assert found == linear_probe.linear_probe(*train, *val, 5)
    scale, shift = torch.logspace(-2, 2, 8), torch.linspace(-50, 50, 8)
    moved = linear_probe.linear_probe(train[0] * scale + shift, train[1], val[0] * scale + shift, val[1], 5)
    assert moved["top1"] == pytest.approx(found["top1"], abs=0.7) and moved["penalty"] == found["penalty"]


def test_what_the_probe_says_of_an_image_does_not_depend_on_the_others_that_it_is_tested_on():
    """Features are standardised by the training set: validation images in halves of other statistics score the same."""
    train, (x, y) = blobs(300, 5, 1.5, seed=1), blobs(200, 5, 1.5, seed=2)
    order = x[:, 0].argsort()  # the halves have other means and, above all, smaller deviations
    whole, *halves = (
        linear_probe.linear_probe(*train, x[rows], y[rows], 5, penalties=(1e-3,))
        for rows in (order, order[:40], order[40:])
    )
    hits = [round(found["top1"] * found["n"] / 100) for found in (whole, *halves)]
    assert hits[0] == sum(hits[1:]) and hits[0] > 60


@pytest.mark.training
def test_a_feature_that_never_varies_does_no_harm():
    train, val = blobs(400, 5, 0.3, seed=1), blobs(300, 5, 0.3, seed=2)
    flat = [torch.cat([x, torch.full((len(x), 1), 3.0)], dim=1) for x in (train[0], val[0])]
    found = linear_probe.linear_probe(flat[0], train[1], flat[1], val[1], 5)
    assert found["top1"] == pytest.approx(linear_probe.linear_probe(*train, *val, 5)["top1"], abs=0.7)


@pytest.mark.training
def test_the_penalty_is_chosen_on_a_tenth_of_training_and_the_fit_repeated_on_all(monkeypatch):
    train, val = blobs(120, 4, 3.0, seed=1, width=40), blobs(200, 4, 3.0, seed=2, width=40)
    x = (train[0] - train[0].mean(dim=0)) / train[0].std(dim=0, correction=0)
    held, losses = linear_probe.held_out(train[1]), {}
    for penalty in linear_probe.PENALTIES:
        w = linear_probe.fit(x[~held], train[1][~held], 4, penalty)
        shares = (x[held] @ w[1:] + w[0]).softmax(dim=1)
        losses[penalty] = -sum(math.log(p[label]) for p, label in zip(shares, train[1][held], strict=True))
    best = min(losses, key=losses.get)
    assert best not in (linear_probe.PENALTIES[0], linear_probe.PENALTIES[-1])  # or there were no choice to test
    rows, fit = [], linear_probe.fit
    monkeypatch.setattr(linear_probe, "fit", lambda x, *others: rows.append(len(x)) or fit(x, *others))
    found = linear_probe.linear_probe(*train, *val, 4)
    assert found["penalty"] == best
    assert rows == [int((~held).sum())] * len(linear_probe.PENALTIES) + [120]
    assert (
        linear_probe.linear_probe(*train, val[0], 3 - val[1], 4)["penalty"] == found["penalty"]
    )  # blind to validation


@given(st.lists(st.integers(0, 4), min_size=1, max_size=200))
def test_a_tenth_of_each_class_is_held_out(labels):
    held = linear_probe.held_out(torch.tensor(labels)).tolist()
    seen = [0] * 5
    for label, out in zip(labels, held, strict=True):
        assert out == (seen[label] % 10 == 0 and labels.count(label) > 1)
        seen[label] += 1


@settings(max_examples=5)
@given(classes=st.integers(1, 4), seed=st.integers(0, 99))
def test_with_fewer_than_five_classes_top5_is_full(classes, seed):
    train, val = blobs(30, classes, 2.0, seed), blobs(20, classes, 2.0, seed + 1)
    for protocol in (knn.knn, linear_probe.linear_probe):
        assert protocol(*train, *val, classes)["top5"] == 100
