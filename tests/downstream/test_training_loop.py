"""Training: what is learned, restarts, parts of a step, ranks, precision."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from small import CALM, CPU, PROTOCOLS, RICH, Images, same, small_vit, trained

from downstream import features, training_loop
from downstream.classifier import Classifier
from runtime import files, process
from runtime.errors import InputError


@pytest.mark.training
@pytest.mark.parametrize("protocol, blocks", PROTOCOLS)
def test_a_small_set_is_learned_and_a_repeat_learns_the_same(protocol, blocks):
    optimizer = {"linear": "lars", "attentive": "sgd"}.get(protocol, "adamw")
    rate = {"lars": 40.0, "sgd": 0.3, "adamw": 0.01}[optimizer]
    recipe = replace(CALM, epochs=12, optimizer=optimizer, lr=rate, drop_path=0.1)
    val = Images(60, seed=9)

    def score():
        classifier = trained(protocol, recipe, blocks, Images(48))
        return features.of_all(classifier.logits, val, 16, CPU)

    scores, y = score()
    assert features.accuracy(scores, y)["top1"] > 70  # 33 by chance
    assert torch.equal(score()[0], scores)


@pytest.mark.parametrize("protocol, blocks", PROTOCOLS)
def test_a_run_that_was_stopped_ends_with_the_bits_of_one_that_was_not(tmp_path, monkeypatch, protocol, blocks):
    monkeypatch.setattr(training_loop, "SAVE_EVERY", 0.0)
    recipe = replace(RICH, epochs=3, drop_path=0.2)
    whole = trained(protocol, recipe, blocks, directory=tmp_path / "whole")
    forward, calls = Classifier.forward, []

    def stopping(self, x):
        calls.append(x)
        if len(calls) == 5:  # in the second epoch of three steps
            raise KeyboardInterrupt
        return forward(self, x)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Classifier, "forward", stopping)
        trained(protocol, recipe, blocks, directory=tmp_path / "parts")
    assert files.load(tmp_path / "parts" / "checkpoint.pt")["step"] == 3
    again = trained(protocol, recipe, blocks, directory=tmp_path / "parts")
    assert same(whole, again)
    log = [[json.loads(line) for line in open(tmp_path / name / "log.jsonl")] for name in ("whole", "parts")]
    for rows in log:
        for row in rows[1:]:
            del row["images_per_second"]
    assert log[0] == log[1] and [row["step"] for row in log[0][1:]] == [3, 6, 9]
    monkeypatch.setattr(Classifier, "forward", None)  # what is done is not done again
    assert same(whole, trained(protocol, recipe, blocks, directory=tmp_path / "parts"))


def test_a_checkpoint_of_other_settings_or_of_another_encoder_is_refused(tmp_path):
    trained("linear", directory=tmp_path)
    other = small_vit()
    other.cls_token.data += 1
    longer = dict(recipe=replace(CALM, epochs=3))
    for changed, said in ((longer, "epochs 2 there, 3 here"), (dict(encoder=other), "encoder ")):
        with pytest.raises(InputError, match=said) as error:
            trained("linear", directory=tmp_path, **changed)
        assert "\n" not in str(error.value) and "--resume never" in str(error.value)
    fresh = trained("linear", replace(CALM, epochs=3), directory=tmp_path, resume=False)
    assert same(fresh, trained("linear", replace(CALM, epochs=3)))
    (tmp_path / "checkpoint.pt").write_bytes(b"no")
    with pytest.raises(InputError, match="damaged"):
        trained("linear", directory=tmp_path)


@pytest.mark.training
@pytest.mark.parametrize("protocol, blocks", PROTOCOLS)
def test_parts_of_a_step_make_the_step(protocol, blocks):
    recipe = replace(RICH, lr=0.01, optimizer="sgd")
    one, two = (trained(protocol, recipe, blocks, accumulate=n) for n in (1, 2))
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, two.state_dict()[name], rtol=1e-4, atol=1e-5)


def _train_as_one_of(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=ranks)
    recipe = replace(RICH, lr=0.01, optimizer="sgd")
    found = [trained(protocol, recipe, blocks).state_dict() for protocol, blocks in PROTOCOLS]
    trained("linear", recipe, directory=Path(folder) / "run")
    found.append(trained("linear", recipe, directory=Path(folder) / "run").state_dict())  # rank 0's, on all
    torch.save(found, f"{folder}/{rank}.pt")
    process.stop()


@pytest.mark.training
@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path):
    torch.multiprocessing.spawn(_train_as_one_of, (2, str(tmp_path)), nprocs=2)
    recipe = replace(RICH, lr=0.01, optimizer="sgd")
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for (protocol, blocks), state in zip([*PROTOCOLS, PROTOCOLS[0]], found, strict=True):
            for name, value in trained(protocol, recipe, blocks).state_dict().items():
                torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_shared_or_filled_is_refused():
    for recipe, options, said in (
        (replace(CALM, batch_size=25), {}, "batch size 25: larger than the 24 images"),
        (replace(CALM, batch_size=9), dict(accumulate=2), "batch size 9: cannot be shared by 1 processes x 2 parts$"),
        (replace(CALM, batch_size=9, mixup=0.8), {}, "an even number of images"),
        (replace(CALM, lr=1e38, warmup_epochs=0.0, optimizer="sgd"), {}, "loss: not finite in epoch 1"),
    ):
        with pytest.raises(InputError, match=said):
            trained("finetune", recipe, **options)


@pytest.mark.training
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_learns_nearly_the_same(precision):
    exact, rounded = (trained("finetune", precision=p) for p in ("fp32", precision))
    assert all(p.dtype == torch.float32 for p in rounded.parameters()) and not same(exact, rounded)
    images = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(exact.logits(images), rounded.logits(images), rtol=0.1, atol=0.15)


def test_autocast_ends_with_the_forward_pass(monkeypatch):
    seen = []
    backward = torch.Tensor.backward
    spy = lambda self: seen.append(torch.is_autocast_enabled("cpu")) or backward(self)  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "backward", spy)
    for protocol, blocks in PROTOCOLS:
        trained(protocol, blocks=blocks, precision="bf16")
    assert len(seen) == 24 and not any(seen)
