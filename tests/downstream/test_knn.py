"""kNN against the naive vote, and the accuracy of scores."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from downstream import features, knn
from runtime.errors import InputError


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
        patch.setattr(knn, "SIMILARITIES", chunk)
        tensors = [torch.from_numpy(a) for a in (bank.astype(np.float32), bank_labels, x.astype(np.float32), labels)]
        found = knn.knn(*tensors, classes, k, tau)
    assert (found["top1"], found["top5"]) == pytest.approx(expected) and found["n"] == queries


def test_a_low_temperature_does_not_overflow():
    bank = torch.tensor([[1.0, 0.0], [1.0, 0.1]])
    found = knn.knn(bank, torch.tensor([0, 1]), torch.tensor([[1.0, 0.08]]), torch.tensor([1]), 2, tau=1e-3)
    assert found["top1"] == 100  # exp(1 / τ) is infinite in any float, and two infinite votes would tie


@pytest.mark.parametrize("wrong", [dict(k=0), dict(tau=0.0)])
def test_knn_without_neighbours_or_temperature_is_refused(wrong):
    with pytest.raises(InputError, match="neighbour"):
        knn.knn(torch.ones(2, 2), torch.zeros(2).long(), torch.ones(1, 2), torch.zeros(1).long(), 2, **wrong)


def test_a_score_that_is_not_a_number_wins_nothing():
    scores = torch.tensor([[math.nan] * 6, [0.0, 1, 2, 3, 4, 5]])
    found = features.accuracy(scores, torch.tensor([0, 5]))
    assert (found["top1"], found["top5"]) == (50, 50)
