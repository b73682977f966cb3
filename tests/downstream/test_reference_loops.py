"""Fine-tuning and dense training against plain loops, written as the papers would, under every option of the loops.

The plain loops share the models and augmentations with the real ones, which have tests of their own, but neither order,
schedule, optimizer, layer decay, smoothing nor accumulation. bf16 and fp16: what flows, and what the scaler does.
"""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from small import CALM, CPU, PROTOCOLS, Images, classifier_of, small_vit, trained

from common import StepRandom
from downstream import dense_prediction, dense_recipes, recipes, training_loop
from downstream.classifier import Classifier
from inputs import dense_sets


def rate_at(step: int, steps: int, warmup: int, peak: float, floor: float) -> float:
    if step < warmup:
        return peak * step / warmup
    return floor + (peak - floor) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


class Rule:
    """One parameter and its optimizer, in float64."""

    def __init__(self, name: str, p, optimizer: str, decay: float):
        self.w, self.kind, self.t = p.detach().double(), optimizer, 0
        self.m, self.v = torch.zeros_like(self.w), torch.zeros_like(self.w)
        self.matrix = p.ndim > 1
        self.decay = decay if self.matrix and not name.endswith(("cls_token", "pos_embed")) else 0.0

    def step(self, g, rate: float):
        self.t += 1
        if self.kind == "adamw":
            self.m, self.v = 0.9 * self.m + 0.1 * g, 0.999 * self.v + 0.001 * g**2
            m, v = self.m / (1 - 0.9**self.t), self.v / (1 - 0.999**self.t)
            self.w = self.w * (1 - rate * self.decay) - rate * m / (v.sqrt() + 1e-8)
            return self.w
        g = g + self.decay * self.w
        if self.kind == "lars" and self.matrix and self.w.any() and g.any():
            g = 0.001 * g * self.w.norm() / g.norm()
        self.m = 0.9 * self.m + g
        self.w = self.w - rate * self.m
        return self.w


def plain_fine_tuning(classifier: Classifier, images: Images, recipe, blocks: int, seed: int, parts: int) -> None:
    n, B = len(images), recipe.batch_size
    per_epoch, peak = n // B, recipe.lr or recipe.base_lr * B / 256
    steps, warmup = recipe.epochs * per_epoch, round(recipe.warmup_epochs * per_epoch)
    learning = {name: p for name, p in classifier.named_parameters() if p.requires_grad}
    rules = {name: Rule(name, p, recipe.optimizer, recipe.weight_decay) for name, p in learning.items()}
    classifier.train()
    for t in range(steps):
        order = np.random.default_rng((seed, t // per_epoch, 1)).permutation(n)[t % per_epoch * B :][:B]
        pixels, labels, rng = images.pixels[order], images.labels[order], StepRandom(seed, t, B)
        x, y = recipes.augmented(pixels, labels, 3, recipe, 16, rng, probe=blocks == 0)
        torch.manual_seed(seed + t * 1_000_003)
        scores = torch.cat([classifier.logits(part) for part in x.chunk(parts if blocks else 1)])
        y = (1 - recipe.smoothing) * y + recipe.smoothing / 3
        loss = -(y * scores.log_softmax(dim=1)).sum(dim=1).mean()
        gradients = torch.autograd.grad(loss, learning.values())
        rate = rate_at(t, steps, warmup, peak, recipe.min_lr)
        for (name, p), g in zip(learning.items(), gradients, strict=True):
            layer = 3  # the head; the class token and the patches are layer 0
            if name.startswith("encoder.") and "table" not in name:
                layer = int(name.split(".")[2]) + 1 if "blocks" in name else 0
            p.data = rules[name].step(g.double(), rate * recipe.layer_decay ** (3 - layer)).float()
    classifier.eval()


OPTIONS = dict(
    warmup_epochs=st.sampled_from([0.0, 1.0, 2.4]), min_lr=st.sampled_from([0.0, 0.004]),
    weight_decay=st.sampled_from([0.0, 2.0]), layer_decay=st.sampled_from([1.0, 0.6]),
    drop_path=st.sampled_from([0.0, 0.4]), mixup=st.sampled_from([0.0, 0.8]), cutmix=st.sampled_from([0.0, 1.0]),
    smoothing=st.sampled_from([0.0, 0.2]), erase=st.sampled_from([0.0, 0.5]), crop_scale=st.sampled_from([0.0, 0.3]),
    randaugment=st.sampled_from([0, 9]), features=st.sampled_from(["mean", "cls"]),
    norm=st.sampled_from(["fresh", "pretrained"]), positions=st.sampled_from(["fixed", "learned"]),
)  # fmt: skip


@pytest.mark.training
@settings(max_examples=15, phases=[Phase.generate])
@given(
    protocol=st.sampled_from([*PROTOCOLS, ("supervised", 1), ("partial", 0), ("partial", 2)]),
    options=st.fixed_dictionaries(OPTIONS), how=st.sampled_from(["adamw", "sgd", "lars"]), by_base=st.booleans(),
    parts=st.sampled_from([1, 2]), seed=st.sampled_from([0, 5]), positions=st.sampled_from(["sincos", "relative"]),
)  # fmt: skip
def test_ten_steps_of_fine_tuning_are_the_plain_loops(protocol, options, how, by_base, parts, seed, positions):
    if protocol[0] == "attentive" and how == "adamw":
        how = "sgd"  # Adam would blow up the rounding noise of biases in front of batch norm, whose gradient is zero
    lr = dict(adamw=0.01, sgd=0.1, lars=20.0)[how]
    recipe = replace(CALM, **options, optimizer=how, epochs=5, **{"base_lr": 32 * lr} if by_base else {"lr": lr})
    encoder, images = small_vit(positions=positions), Images(20)  # 2 steps of 8 an epoch, 4 images left over
    real, plain = (
        classifier_of(protocol[0], recipe, protocol[1], copy.deepcopy(encoder), seed).train() for _ in range(2)
    )
    plain_fine_tuning(plain, images, recipe, plain.blocks, seed, parts)
    source = images
    if real.blocks < real.depth and not recipe.augments:  # then evaluate.py hands over what the frozen part gave
        pixels = recipes.augment.normalize(images.pixels.float() / 255)
        source = training_loop.Kept(real.eval().frozen(pixels), images.labels)
    training_loop.train(real, source, 3, recipe, CPU, seed, accumulate=parts)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(real.state_dict()[name], value, rtol=2e-3, atol=2e-4, msg=name)


class Scenes:
    """Images of two sizes and their label maps, as dense_sets.Reader reads them."""

    fill = dense_sets.IGNORE

    def __len__(self) -> int:
        return 9

    def read(self, i: int):
        draw = torch.Generator().manual_seed(i)
        image = torch.randint(0, 256, (3, 20 + 8 * (i % 2), 24), generator=draw, dtype=torch.uint8)
        return image, (image[:1] // 100).clone(), torch.empty(0, dtype=torch.int64)


@pytest.mark.training
@settings(max_examples=8, phases=[Phase.generate])
@given(
    seed=st.sampled_from([0, 3]), lr=st.sampled_from([1e-3, 5e-3]), jitter=st.sampled_from([(1.0, 1.0), (0.5, 2.0)]),
    decay=st.sampled_from([0.05, 5.0]), decay_at=st.sampled_from([(), (2,), (2, 3)]), drop=st.sampled_from([0.0, 0.3]),
    schedule=st.sampled_from(["cosine", "linear"]), layer_decay=st.sampled_from([1.0, 0.6]),
    parts=st.sampled_from([1, 2]), head=st.sampled_from(["fcn", "upernet"]), distort=st.booleans(),
    warmup=st.sampled_from([0.1, 0.35]),
)  # fmt: skip
def test_ten_steps_of_dense_training_are_the_plain_loops(
    seed, lr, jitter, decay, decay_at, drop, schedule, layer_decay, parts, head, distort, warmup
):
    pytest.importorskip("transformers" if head == "upernet" else "torch")
    torch.manual_seed(0)
    real = dense_prediction.Segmenter(small_vit(), 3, head)
    plain, scenes = copy.deepcopy(real), Scenes()
    # UperNet's batch norms remove biases before them: their gradients are rounding, which Adam would blow up. Of two
    # images one norm makes signs, of four nearly, so that rounding would grow at a higher rate.
    how, close = "adamw", 0.05 * lr
    if head == "upernet":
        how, lr, parts = "sgd", lr / 10, 1
    recipe = type("OfChoice", (dense_recipes.Recipe,), dict(optimizer=how))(
        epochs=5, batch_size=4, lr=lr, weight_decay=decay, decay_at=decay_at, schedule=schedule, drop_path=drop,
        layer_decay=layer_decay, warmup=warmup,
    )  # fmt: skip
    reader = dense_sets.Reader(scenes, 16, seed, jitter=jitter, distort=distort)
    dense_prediction.fine_tune(real, reader, recipe, CPU, seed, accumulate=parts)
    learning = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    rules = {name: Rule(name, p, how, decay) for name, p in learning.items()}
    plain.encoder.blocks[1].drop_path = drop
    plain.train()
    for t in range(10):  # two an epoch, 1 image is left over
        epoch, samples = t // 2, []
        for i in np.random.default_rng((seed, epoch, 1)).permutation(9)[t % 2 * 4 :][:4].tolist():
            image, labels, kinds = scenes.read(i)
            rng = np.random.default_rng((seed, epoch, i))
            square, labels, fitted = dense_sets.fit(image, labels, 255, 16, rng, jitter, distort)
            samples.append(dense_sets.Sample(i, square, labels, kinds, image.shape[1:], fitted))
        torch.manual_seed(seed + t * 1_000_003)  # of drop path, and of dropout in the head
        size = 4 // parts
        losses = [plain.loss(samples[k : k + size], CPU) / parts for k in range(0, 4, size)]
        gradients = torch.autograd.grad(sum(losses), learning.values())
        start = int(10 * warmup)
        if t < start:
            rate = lr * t / start
        elif decay_at:
            rate = lr / 10 ** sum(epoch >= e for e in decay_at)
        else:
            rate = rate_at(t, 10, start, lr, 0.0) if schedule == "cosine" else lr * (10 - t) / (10 - start)
        for (name, p), g in zip(learning.items(), gradients, strict=True):
            layer = 3  # heads, and the last norm
            if name.startswith("encoder.") and not name.startswith("encoder.norm"):
                layer = int(name.split(".")[2]) + 1 if "blocks" in name else 0
            p.data = rules[name].step(g.double(), rate * layer_decay ** (3 - layer)).float()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(real.state_dict()[name], value, rtol=2e-3, atol=close, msg=name)


# ------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("protocol, blocks", PROTOCOLS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_products_flow_in_the_precision_and_scores_and_weights_in_float32(precision, protocol, blocks):
    half = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    classifier, seen = classifier_of(protocol, replace(CALM, crop_scale=0.5), blocks), {}

    def note(name):
        return lambda part, inputs, output: seen.setdefault(name, set()).add(output.dtype)

    for i, block in enumerate(classifier.encoder.blocks):
        block.mlp.fc1.register_forward_hook(note(i))
    classifier.head.out.register_forward_hook(note("out"))
    classifier.register_forward_hook(note("scores"))
    training_loop.train(classifier, Images(), 3, replace(CALM, crop_scale=0.5), CPU, precision=precision)
    assert seen == {0: {half}, 1: {half}, "out": {half}, "scores": {torch.float32}}
    assert {p.dtype for p in classifier.state_dict().values()} == {torch.float32}


def test_fp16_scales_the_loss_up_and_the_gradients_down_and_skips_what_overflows(monkeypatch, tmp_path):
    before, after, overflows = [], [], {3}
    step, update = torch.amp.GradScaler.step, torch.optim.SGD.step

    def scaled(self, optimizer):
        first = next(p for group in optimizer.param_groups for p in group["params"])
        if len(before) in overflows:
            first.grad.fill_(math.inf)
        before.append((self.get_scale(), first.grad.norm().item(), first.detach().clone()))
        step(self, optimizer)
        before[-1] += (torch.equal(first, before[-1][2]),)

    def stepped(self, *args, **kwargs):
        after.append(self.param_groups[0]["params"][0].grad.norm().item())
        return update(self, *args, **kwargs)

    recipe = replace(CALM, optimizer="sgd", warmup_epochs=0.0)
    monkeypatch.setattr(torch.amp.GradScaler, "step", scaled)
    monkeypatch.setattr(torch.optim.SGD, "step", stepped)
    trained("finetune", recipe, precision="fp16", directory=tmp_path)
    scales, large, _, kept = zip(*before, strict=True)
    assert scales == (65536,) * 4 + (32768,) * 2 and kept == (False, False, False, True, False, False)
    assert after == pytest.approx([norm / s for i, (norm, s) in enumerate(zip(large, scales, strict=True)) if i != 3])
    saved = torch.load(tmp_path / "checkpoint.pt")["scaler"]
    assert saved["scale"] == 32768 and saved["_growth_tracker"] == 2
    for kept in (before, after, overflows):
        kept.clear()
    trained("finetune", recipe, precision="bf16")
    assert {scale for scale, *_ in before} == {1.0} and after == pytest.approx([norm for _, norm, *_ in before])
