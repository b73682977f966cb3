"""Heads against plain loops, and what of an encoder learns under each protocol."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from small import CALM, PROTOCOLS, classifier_of, small_vit, trained
from torch import nn

from downstream import classifier
from downstream.classifier import trainable_parameters
from downstream.recipes import recipe_for
from runtime.errors import InputError


def test_batch_norm_is_torchs_in_training_and_afterwards():
    mine, torchs = classifier.BatchNorm(5, eps=1e-2), nn.BatchNorm1d(5, eps=1e-2, affine=False)
    for seed in range(3):
        torch.manual_seed(seed)
        a = (3 * torch.randn(4, 5) + 1).requires_grad_()
        b = a.detach().clone().requires_grad_()
        weights = torch.randn(4, 5)
        (mine(a) * weights).sum().backward()
        (torchs(b) * weights).sum().backward()
        torch.testing.assert_close(mine(a), torchs(b))
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    mine.eval(), torchs.eval()
    torch.testing.assert_close(mine(a), torchs(b))


@pytest.mark.parametrize("heads, tokens", [(1, 5), (2, 4), (4, 1)])
def test_the_attentive_probe_is_a_plain_cross_attention(heads, tokens):
    torch.manual_seed(heads)
    head = classifier.AttentiveHead(8, heads, 3)
    assert not head.query.any()  # CAE's start
    for p in head.parameters():
        nn.init.normal_(p, std=0.7)
    x = torch.randn(6, tokens, 8)
    w = {name: p.detach().double().numpy() for name, p in head.named_parameters()}
    d, pooled = 8 // heads, []
    query = w["q.weight"] @ w["query"][0] + w["q.bias"]
    for image in x.double().numpy():
        keys = [w["k.weight"] @ token for token in image]
        values = [w["v.weight"] @ token + w["v.bias"] for token in image]
        parts = []
        for h in range(heads):
            own = slice(h * d, (h + 1) * d)
            scores = np.array([query[own] @ key[own] / math.sqrt(d) for key in keys])
            shares = np.exp(scores) / np.exp(scores).sum()
            parts.append(sum(share * value[own] for share, value in zip(shares, values, strict=True)))
        pooled.append(w["proj.weight"] @ np.concatenate(parts) + w["proj.bias"])
    pooled = np.array(pooled)

    def out(mean, variance):
        return (pooled - mean) / np.sqrt(variance + 1e-5) @ w["out.weight"].T + w["out.bias"]

    np.testing.assert_allclose(head(x).detach(), out(pooled.mean(0), pooled.var(0)), rtol=1e-3, atol=1e-3)
    head.eval()  # from zero and one, a tenth of the way to the batch's
    mean, variance = 0.1 * pooled.mean(0), 0.9 + 0.1 * pooled.var(0, ddof=1)
    np.testing.assert_allclose(head(x).detach(), out(mean, variance), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("protocol", ["linear", "attentive"])
def test_what_a_probe_says_of_an_image_does_not_depend_on_its_company(protocol):
    classifier, images = trained(protocol), torch.randn(5, 3, 16, 16)
    together = classifier.logits(images)
    alone = torch.cat([classifier.logits(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert together.std(dim=0).min() > 1e-4


def test_the_attentive_probe_sees_patches_and_the_class_token_only_if_asked_to():
    encoder, images = small_vit(), torch.randn(2, 3, 16, 16)
    tokens = encoder(images)
    for attend_cls, seen in ((False, tokens[:, 1:]), (True, tokens)):
        found = classifier_of("attentive", replace(CALM, attend_cls=attend_cls), encoder=encoder).frozen(images)
        torch.testing.assert_close(found, seen)


@pytest.mark.parametrize("positions", ["sincos", "relative"])
@pytest.mark.parametrize("features", ["mean", "cls"])
def test_a_linear_head_stands_on_the_final_norm_and_a_tuned_one_brings_its_own(features, positions):
    encoder, images = small_vit(positions=positions), torch.randn(3, 3, 16, 16)
    if positions == "sincos":
        encoder.pos_embed[:, 0] = torch.randn(8)  # the class token has a place too, in weights of others
    recipe = replace(CALM, features=features, norm="pretrained")

    def pool(x):
        return x[:, 0] if features == "cls" else x[:, 1:].mean(dim=1)

    torch.testing.assert_close(classifier_of("linear", recipe, encoder=encoder).frozen(images), pool(encoder(images)))
    for protocol, blocks in (("partial", 1), ("partial", 2), ("finetune", 1)):
        head = (classifier := classifier_of(protocol, recipe, blocks, encoder)).eval().head
        expected = head.out(encoder.norm(pool(encoder(images, norm=False))))
        torch.testing.assert_close(classifier.logits(images), expected)
        fresh = classifier_of(protocol, replace(recipe, norm="fresh"), blocks, encoder).head.norm
        assert torch.equal(fresh.weight, torch.ones(8)) and not fresh.bias.any()


def names(protocol: str, blocks: int = 1, **options) -> set[str]:
    return set(trainable_parameters(classifier_of(protocol, blocks=blocks, encoder=small_vit(**options))))


def test_what_learns_under_each_protocol():
    encoder = {name for name, _ in small_vit().named_parameters()} - {"norm.weight", "norm.bias"}
    block = {k: {"encoder." + name for name in encoder if name.startswith(f"blocks.{k}.")} for k in (0, 1)}
    head = {"head.out.weight", "head.out.bias"}
    tuned = head | {"head.norm.weight", "head.norm.bias"}
    assert names("linear") == names("partial", 0) == head
    assert names("partial", 1) == tuned | block[1]
    assert set(trainable_parameters(classifier_of("partial", replace(CALM, norm="pretrained")))) == tuned | block[1]
    assert names("partial", 2) == names("finetune") == names("supervised") == tuned | {"encoder." + n for n in encoder}
    attention = "query q.weight q.bias k.weight v.weight v.bias proj.weight proj.bias".split()
    assert names("attentive") == head | {"head." + name for name in attention}
    assert "encoder.relative_table" in names("partial", 2, positions="relative")
    assert "encoder.relative_table" not in names("partial", 1, positions="relative")


@pytest.mark.parametrize("protocol, blocks", [*PROTOCOLS, ("partial", 0)])
def test_what_is_frozen_keeps_its_bits_and_all_else_moves(protocol, blocks):
    recipe = replace(CALM, drop_path=0.3)
    before, after = classifier_of(protocol, recipe, blocks), trained(protocol, recipe, blocks)
    learns, old = trainable_parameters(before), before.state_dict()
    for name, value in after.state_dict().items():
        moves = name in learns or name in ("head.norm.mean", "head.norm.variance")
        assert torch.equal(old[name], value) != moves, name


def test_partial_fine_tuning_is_the_probe_at_one_end_and_fine_tuning_at_the_other():
    images = torch.randn(4, 3, 16, 16)
    lars = replace(CALM, optimizer="lars", lr=1.0, features="cls")
    ends = [(("partial", lars, 0), ("linear", lars)), (("partial", CALM, 2), ("finetune", CALM))]
    for one, other in ends:
        assert torch.equal(trained(*one).logits(images), trained(*other).logits(images))


def test_drop_path_grows_over_the_blocks_and_leaves_the_frozen_ones_alone():
    recipe = replace(CALM, drop_path=0.3)
    for blocks, rates in ((0, [0, 0, 0, 0]), (2, [0, 0, 0.2, 0.3]), (4, [0, 0.1, 0.2, 0.3])):
        encoder = classifier_of("partial", recipe, blocks, small_vit(depth=4, drop_path=0.5)).encoder
        assert [block.drop_path for block in encoder.blocks] == pytest.approx(rates)


@pytest.mark.parametrize("blocks", [-1, 3])
def test_a_number_of_blocks_that_is_not_there_is_refused(blocks):
    with pytest.raises(InputError, match=f"--blocks {blocks}: the encoder has 2; give 0 .* to 2"):
        classifier_of("partial", blocks=blocks)


def test_positions_learn_in_full_fine_tuning_where_the_recipe_says_so():
    """And only then: MAE's own recipe, but not a partial tuning, nor an encoder with relative positions."""
    assert recipe_for("mae", "finetune").positions == "learned" and recipe_for("cmae", "finetune").positions == "fixed"
    learned = replace(CALM, positions="learned")
    for protocol, blocks, expected in (("finetune", 1, True), ("partial", 2, True), ("partial", 1, False)):
        before, after = classifier_of(protocol, learned, blocks), trained(protocol, learned, blocks)
        assert ("encoder.pos_embed" in trainable_parameters(before)) == expected
        moved = after.encoder.pos_embed - before.encoder.pos_embed
        assert bool(moved.any()) == expected and moved.shape == (1, 5, 8)
    assert not classifier_of(
        "finetune", learned, encoder=small_vit(positions="relative")
    ).encoder.pos_embed.requires_grad
    assert not trained("finetune").encoder.pos_embed.requires_grad
