"""Features of all images of a set: what they are, in any precision, over ranks, with bad images left out."""

import math

import pytest
import torch
import torch.distributed as dist

import common
from common import ViT
from downstream.features import extract
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
