"""The figures' numbers against loops written from the papers."""

import math
import sys
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import Attention, ViT
from figures import measures
from runtime.errors import InputError

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


@pytest.mark.parametrize("biased", [False, True])
def test_recomputed_attention_is_what_the_module_applies(biased):
    torch.manual_seed(0)
    part, x = Attention(8, 2), numbers(1, 3, 5, 8)
    torch.nn.init.normal_(part.qkv.bias)
    bias = numbers(2, 1, 2, 5, 5) if biased else None
    with torch.no_grad():
        (found,) = measures.attention_maps([part], lambda: part(x, bias))
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
    found = measures.attention_distance(maps, (h, w), p)
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


def test_what_an_encoder_is_shown_is_normalised_by_its_own_mean_and_deviation():
    pixels = (torch.arange(3 * 8 * 16) % 256).to(torch.uint8).view(1, 3, 8, 16)
    encoder = ViT((8, 16), 8, 8, 1, 2, mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])
    mean, std = (torch.tensor(values)[:, None, None] for values in (encoder.mean, encoder.std))
    torch.testing.assert_close(measures.centred(pixels, encoder), (pixels / 255 - mean) / std)


def test_attention_distance_of_oneself_is_zero_and_the_class_token_does_not_count():
    oneself = torch.eye(10)[None, None]
    assert measures.attention_distance(oneself, (3, 3), 8).item() == 0
    other = oneself.clone()
    other[..., 1:, 0] = 5.0  # to the class token
    other[..., 0, 1:] = 7.0  # from it
    assert measures.attention_distance(other, (3, 3), 8).item() == 0
    right = torch.zeros(1, 1, 3, 3)
    right[..., 1, 2] = right[..., 2, 1] = 0.25  # a quarter of the attention, all of what patches get
    assert measures.attention_distance(right, (1, 2), 8).item() == 8


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.floats(0.01, 1.0))
@few
def test_mass_region_is_the_smallest_that_holds_the_mass(weights, mass):
    found = measures.mass_region(torch.tensor(weights, dtype=torch.float64), mass)
    held, wanted, order = 0, mass * sum(weights) - 1e-9, sorted(weights, reverse=True)
    smallest = next(n for n in range(1, len(order) + 1) if sum(order[:n]) >= wanted)
    held = sum(weight for weight, kept in zip(weights, found.tolist(), strict=True) if kept)
    assert held >= wanted and int(found.sum()) == smallest


def test_mass_region_keeps_places():
    weights = torch.tensor([[0.1, 0.6, 0.1, 0.2], [0.3, 0.1, 0.35, 0.25]])
    expected = [[False, True, False, False], [True, False, True, False]]
    assert measures.mass_region(weights, 0.5).tolist() == expected
    assert measures.mass_region(weights, 1.0).all()


@given(seeds, st.integers(2, 5))
@few
def test_decoder_similarity_is_equation_7(seed, images):
    maps = attention(seed, images, 3, 2, 4)
    total = sum(cos(maps[i], maps[j]) for i in range(images) for j in range(images) if i != j)
    same = maps[:1].expand(images, -1, -1, -1)
    batches = [[maps[:1], same[:1]], [maps[1:], same[1:]]]  # of two layers
    expected = [total / (images * (images - 1)), 1]
    assert measures.decoder_similarity(batches) == pytest.approx(expected, rel=1e-6)


def test_decoder_similarity_keeps_no_maps_of_earlier_images():
    """A thousand images at the paper's scale would need 15 GB; here the maps of two batches may live at a time."""
    alive = []

    def batches():
        for i in range(5):
            maps = attention(i, 2, 3, 2, 4)
            assert sum(reference() is not None for reference in alive) <= 2
            alive.append(weakref.ref(maps))
            yield [maps]

    assert len(measures.decoder_similarity(batches())) == 1 and len(alive) == 5
    with pytest.raises(InputError, match="images 1: cannot be compared with another; give at least 2"):
        measures.decoder_similarity([[attention(0, 1, 3, 2, 4)]])


@given(seeds, st.integers(1, 3))
@few
def test_semantic_similarity_is_equation_8(seed, images):
    reference, ours = numbers(seed, images, 4, 3), numbers(seed + 1, images, 4, 5)
    for i in range(images):
        w, v = ([cos(x[i, a], x[i, b]) for a in range(4) for b in range(4)] for x in (reference, ours))
        term = cos(torch.tensor(w, dtype=torch.float64), torch.tensor(v, dtype=torch.float64))
        assert measures.semantic_similarity(reference, ours)[i].item() == pytest.approx(term, rel=1e-6)
    turn = torch.linalg.qr(numbers(seed + 2, 5, 5).double())[0]
    ones = measures.semantic_similarity(3 * ours.double() @ turn, ours)
    torch.testing.assert_close(ones, torch.ones(images, dtype=torch.float64))


@given(seeds, st.lists(st.integers(2, 4), min_size=2, max_size=4))
@few
def test_class_distances_are_those_of_section_4_7(seed, sizes):
    x = numbers(seed, sum(sizes), 6).double() + 1
    labels = torch.tensor([3 * c for c, n in enumerate(sizes) for _ in range(n)])
    found = measures.class_distances(x, labels)
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
        measures.class_distances(numbers(0, 3, 4), torch.tensor([0, 0, 1]))
    with pytest.raises(InputError, match="two classes"):
        measures.class_distances(numbers(0, 3, 4), torch.tensor([0, 0, 0]))


@given(st.integers(0, 10**6), st.tuples(st.integers(2, 5), st.integers(2, 5), st.integers(1, 4)))
def test_variance_is_shared_out_as_in_a_loop(seed, shape):
    """A token is the mean, what its place adds to it, what its image adds, and a rest."""
    x = np.random.default_rng(seed).standard_normal(shape)
    total = dict(place=0.0, image=0.0, rest=0.0)
    for d in range(shape[2]):
        mean = sum(x[i, n, d] for i in range(shape[0]) for n in range(shape[1])) / (shape[0] * shape[1])
        for i in range(shape[0]):
            for n in range(shape[1]):
                place = sum(x[j, n, d] for j in range(shape[0])) / shape[0] - mean
                image = sum(x[i, m, d] for m in range(shape[1])) / shape[1] - mean
                for name, part in dict(place=place, image=image, rest=x[i, n, d] - mean - place - image).items():
                    total[name] += part**2
    found = measures.variance_shares(torch.from_numpy(x))
    assert found == pytest.approx({name: value / sum(total.values()) for name, value in total.items()}, abs=1e-9)


def test_variance_of_codes_of_places_and_of_images_is_theirs():
    code = torch.tensor([[1.0, 5.0], [2.0, 2.0], [9.0, 0.0]])
    for name, tokens in dict(place=code.expand(4, 3, 2), image=code[:, None].expand(3, 4, 2)).items():
        assert measures.variance_shares(tokens + 7)[name] == pytest.approx(1)


@pytest.mark.parametrize("size", [8, 16])
def test_patch_labels_are_those_of_most_pixels(size):
    maps = numbers(0, 8, 8).gt(0.3).long() * 3 + numbers(1, 8, 8).gt(0.3).long() * 4
    labels = maps.repeat_interleave(size // 8, 0).repeat_interleave(size // 8, 1)[None].to(torch.uint8)
    found, p = measures.patch_labels(labels, size, size // 4).tolist(), size // 4
    for i, label in enumerate(found):
        cell = labels[0, i // 4 * p : i // 4 * p + p, i % 4 * p : i % 4 * p + p].flatten().tolist()
        most = max(set(cell), key=cell.count)
        assert label == (most if 2 * cell.count(most) > len(cell) else 255)
    assert 255 in found and len(set(found)) > 2


@given(seeds)
@few
def test_pca_projects_on_the_eigenvectors_of_the_covariance(seed):
    x = numbers(seed, 12, 4).double() * torch.tensor([4.0, 2.0, 1.0, 0.5]) + 3
    points, share = measures.pca(x)
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
        measures.tsne(numbers(0, 8, 4), 0)
