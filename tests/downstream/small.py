"""Small classifiers, and images that they learn quickly: what the tests of downstream/ share."""

from dataclasses import replace

import seed_offset  # noqa: F401
import torch
from torch import nn

from common import ViT
from downstream import recipes, training_loop
from downstream.classifier import Classifier
from downstream.recipes import Recipe

CPU = torch.device("cpu")
SMALL = dict(epochs=2, warmup_epochs=1.0, batch_size=8, base_lr=0.03, drop_path=0.0, crop_scale=0.0, head_std=0.01)
CALM = Recipe(**recipes.CALM | SMALL)
PROTOCOLS = [("linear", 1), ("attentive", 1), ("partial", 1), ("finetune", 1)]  # with their blocks
RICH = replace(CALM, mixup=0.8, cutmix=1.0, smoothing=0.1, erase=0.5, randaugment=9, crop_scale=0.3, layer_decay=0.7)


def small_vit(**options) -> ViT:
    torch.manual_seed(0)
    vit = ViT(**dict(image_size=16, patch_size=8, width=8, depth=2, heads=2) | options)
    for p in vit.parameters():  # nothing that is zero or one by chance of birth
        p.data += 0.1 * torch.randn_like(p)
    return vit.eval()


class Images:
    """What the training loop asks of an ImageSet: n noisy images, of classes that differ by their colour."""

    name, classes = "fake", ["a", "b", "c"]

    def __init__(self, n: int = 24, size: int = 16, seed: int = 0):
        draw = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(n) % 3
        self.pixels = torch.randint(0, 150, (n, 3, size, size), generator=draw, dtype=torch.uint8)
        self.pixels[torch.arange(n), self.labels] += 100

    def __len__(self):
        return len(self.labels)

    def batches(self, orders, device):
        yield from ((self.pixels[order], order) for order in orders)


def classifier_of(protocol: str, recipe: Recipe = CALM, blocks: int = 1, encoder: ViT | None = None, seed: int = 0):
    return Classifier(encoder or small_vit(), recipe, 3, protocol, blocks, seed)


def trained(protocol: str, recipe: Recipe = CALM, blocks: int = 1, source=None, encoder=None, **options) -> Classifier:
    classifier = classifier_of(protocol, recipe, blocks, encoder)
    training_loop.train(classifier, source or Images(), 3, recipe, CPU, **options)
    return classifier


def same(a: nn.Module, b: nn.Module) -> bool:
    b = b.state_dict()
    return all(torch.equal(value, b[name]) for name, value in a.state_dict().items())
