"""Nearest neighbours: the training images that are most like a new one vote for its class."""

import torch
import torch.nn.functional as F

from downstream.features import accuracy
from runtime.errors import InputError

SIMILARITIES = 2**26  # to hold at a time: 256 MB


@torch.no_grad()
def knn(train_features, train_labels, features, labels, classes: int, k: int = 20, tau: float = 0.07) -> dict:
    """Weighted kNN of Wu et al. (arXiv 1805.01978, §3.4), as in DINO: neighbour j votes with exp(cos(x, x_j) / τ).

    Features are (n_train, D) and (n, D). Where there are fewer than k training images, all are neighbours.
    """
    if k < 1 or tau <= 0:
        raise InputError(f"kNN with k {k} and tau {tau:g}: there must be a neighbour and a positive temperature")
    bank, queries = F.normalize(train_features, dim=1), F.normalize(features, dim=1)
    votes = []
    for chunk in queries.split(max(1, SIMILARITIES // len(bank))):
        similarity, neighbours = (chunk @ bank.T).topk(min(k, len(bank)))  # (b, k) each
        weights = (similarity / tau).softmax(dim=1)  # exp(sim/τ) up to a factor per query, which no vote feels
        vote = torch.zeros(len(chunk), classes, device=chunk.device)
        for j in range(weights.shape[1]):  # one by one, so that CUDA adds in a fixed order
            vote.scatter_add_(1, train_labels[neighbours[:, j : j + 1]], weights[:, j : j + 1])
        votes.append(vote)
    return accuracy(torch.cat(votes), labels)
