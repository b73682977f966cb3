"""Layer decay, LARS and the choice of optimizer, against plain rules."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from small import CALM, CPU, classifier_of, small_vit, trained
from torch import nn

from downstream import optimizers, training_loop
from downstream.classifier import trainable_parameters


def test_layer_decay_scales_each_layer_by_its_distance_from_the_head():
    classifier = classifier_of("finetune", encoder=small_vit(positions="relative", layer_scale=0.1))
    groups = optimizers.layer_decay_groups(classifier, 0.05, 0.5)
    found = {id(p): (group["scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found) == len(trainable_parameters(classifier))
    scales = {"patch_embed": 0.125, "cls_token": 0.125, "blocks.0": 0.25, "blocks.1": 0.5, "table": 1, "head": 1}
    for name, p in trainable_parameters(classifier).items():
        scale = next(value for part, value in scales.items() if part in name)
        vector = any(part in name for part in ("bias", "norm", "gamma", "cls_token"))
        assert found[id(p)] == (scale, 0.0 if vector else 0.05), name


def test_the_learning_rate_of_a_step_reaches_every_layer_by_its_scale(monkeypatch):
    seen = []

    class Spy(torch.optim.SGD):
        def step(self):
            seen.append({group["scale"]: group["lr"] for group in self.param_groups})
            return super().step()

    groups = optimizers.layer_decay_groups
    monkeypatch.setattr(training_loop, "optimizer_for", lambda c, r, _: Spy(groups(c, 0, r.layer_decay), lr=9))
    recipe = replace(CALM, layer_decay=0.5, lr=0.4, min_lr=0.1)
    trained("finetune", recipe)
    rates = [0, 0.4 / 3, 0.8 / 3, 0.4]  # three steps of warm-up, then half a cosine over the other three
    rates += [0.1 + 0.3 * (1 + math.cos(math.pi * t / 3)) / 2 for t in (1, 2)]
    for step, rate in zip(seen, rates, strict=True):
        assert step == pytest.approx({scale: rate * scale for scale in (1, 0.5, 0.25, 0.125)})


def test_lars_is_the_plain_rule():
    torch.manual_seed(0)
    start = [torch.randn(3, 4), torch.randn(4), torch.zeros(2, 2), torch.randn(2, 3)]
    tensors = [nn.Parameter(p.clone()) for p in start]
    optimizer = optimizers.LARS(tensors, lr=0.5, momentum=0.9, weight_decay=0.1, trust=0.02)
    weights, speeds = [p.double().numpy() for p in start], [0.0] * 4
    for step in range(4):
        optimizer.param_groups[0]["lr"] = lr = 0.5 / (step + 1)
        for i, p in enumerate(tensors):
            gradient = torch.randn_like(p) if i < 3 else torch.zeros_like(p)
            p.grad, g = gradient, gradient.double().numpy()
            if p.ndim > 1:
                g = g + 0.1 * weights[i]
                sizes = np.sqrt((weights[i] ** 2).sum()), np.sqrt((g**2).sum())
                g = g * (0.02 * sizes[0] / sizes[1] if min(sizes) > 0 else 1)
            speeds[i] = 0.9 * speeds[i] + g
            weights[i] = weights[i] - lr * speeds[i]
        optimizer.step()
        for p, expected in zip(tensors, weights, strict=True):
            np.testing.assert_allclose(p.detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name, kind, says",
    [
        ("adamw", torch.optim.AdamW, dict(betas=(0.9, 0.999), eps=1e-8)),
        ("sgd", torch.optim.SGD, dict(momentum=0.9, nesterov=False)),
        ("lars", optimizers.LARS, dict(momentum=0.9, trust=0.001)),
    ],
)
def test_the_optimizer_is_the_recipes(name, kind, says):
    optimizer = optimizers.optimizer_for(classifier_of("finetune"), replace(CALM, optimizer=name), CPU)
    assert type(optimizer) is kind
    assert {key: optimizer.defaults[key] for key in says} == says
