"""The protocols that train, as evaluate.py runs them."""

import copy
import json
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from small import CALM, CPU, PROTOCOLS, RICH, Images, classifier_of, same, small_vit, trained

import evaluate
from downstream import protocols, recipes, training_loop
from downstream.recipes import Recipe, recipe_for
from runtime import fast_paths
from runtime.encoder_files import untrained


def evaluated(protocol: str, recipe: Recipe = CALM, encoder=None, **options) -> dict:
    sets = Images(), Images(20, seed=9)
    return protocols.evaluate(encoder or small_vit(), *sets, [protocol], CPU, recipe=recipe, **options)[protocol]


def log(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "seed-0" / "log.jsonl").read_text().splitlines()[1:]]


@pytest.mark.parametrize("images, epochs", [(7, [1, 2, 3, 4, 5]), (20, [2, 5])])
def test_fine_tuning_is_scored_while_it_goes_on_and_does_not_notice(images, epochs, tmp_path, monkeypatch):
    """Every third epoch and the last, if all would take too long. In evaluation no path would be dropped."""
    recipe, val, scores = replace(RICH, epochs=5, drop_path=0.5), Images(images, seed=9), []
    whole, accuracy = trained("finetune", recipe), protocols.accuracy
    monkeypatch.setattr(protocols, "accuracy", lambda *x: scores.append(accuracy(*x)) or scores[-1])
    classifier = classifier_of("finetune", recipe)
    measure = partial(protocols.while_training, classifier, val, (16, CPU, 8, "fp32"), 5, 24)
    (tmp_path / "seed-0").mkdir()
    training_loop.train(classifier, Images(), 3, recipe, CPU, directory=tmp_path / "seed-0", measure=measure)
    assert same(classifier, whole)
    assert [row["epoch"] for row in log(tmp_path) if "top1" in row] == epochs
    assert [row["top1"] for row in log(tmp_path) if "top1" in row] == [score["top1"] for score in scores]
    last = accuracy(*protocols.of_all(whole.logits, val, 16, CPU, 8, "fp32"))
    assert scores[-1] == last


def test_accuracy_is_logged_in_fine_tuning_alone_and_ends_with_the_result(tmp_path):
    for protocol, blocks in [*PROTOCOLS, ("supervised", 1), ("partial", 2)]:
        folder = tmp_path / f"{protocol}-{blocks}"
        found = evaluated(protocol, blocks=blocks, directory=folder, paper=True)
        tops = [row["top1"] for row in log(folder) if "top1" in row]
        assert tops == ([found["top1"]] if protocol in ("finetune", "supervised") or blocks == 2 else []), protocol


@pytest.mark.parametrize("protocol, blocks", PROTOCOLS)
def test_what_the_frozen_part_gives_may_be_kept(monkeypatch, protocol, blocks):
    encoder = small_vit()
    before = copy.deepcopy(encoder.state_dict())
    kept, of_all = [], protocols.of_all

    def spy(function, *others):
        kept.append(getattr(function, "__name__", "") == "frozen")
        return of_all(function, *others)

    monkeypatch.setattr(protocols, "of_all", spy)
    found = evaluated(protocol, blocks=blocks, encoder=encoder, paper=True)
    assert sum(kept) == (protocol != "finetune")
    monkeypatch.setattr(protocols, "KEPT_LIMIT", 0)
    assert evaluated(protocol, blocks=blocks, encoder=encoder, paper=True) == found
    evaluated(protocol, RICH, blocks=blocks, encoder=encoder, paper=True)  # what is augmented is never kept
    assert sum(kept) == (protocol != "finetune")
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())  # nor is it changed


def test_a_training_goes_on_in_the_precision_and_with_the_products_that_it_began_with(monkeypatch, tmp_path):
    monkeypatch.setattr(fast_paths, "as_convolution", False)
    for there, here in ((("fp32", "convolution"), ("bf16", "product")), (("bf16", "product"), ("fp32", "convolution"))):
        for precision, linear in (there, here):
            monkeypatch.setattr(fast_paths, "measured", lambda p=precision, way=linear: dict(precision=p, linear=way))
            found = evaluated("finetune", directory=tmp_path / there[0], seed=4)
            assert (found["precision"], fast_paths.as_convolution) == (there[0], there[1] == "convolution")


@pytest.mark.training
def test_seeds_give_mean_and_sample_deviation():
    found = evaluated("finetune", seed=6, seeds=3)
    each = [evaluated("finetune", seed=seed) for seed in (6, 7, 8)]
    assert [result | {"precision": found["precision"]} for result in found["each"]] == each and found["n"] == 20
    for key in ("top1", "top5"):
        values = [result[key] for result in each]
        assert found[key] == pytest.approx(sum(values) / 3)
        assert found[key + "_std"] == pytest.approx(np.std(values, ddof=1))
    assert len({result["top1"] for result in each}) > 1


def test_supervised_starts_from_random_weights_of_its_seed(monkeypatch):
    starts = []
    monkeypatch.setattr(protocols, "train", lambda classifier, *_: starts.append(classifier.encoder))
    encoder = small_vit()
    for protocol, seeds in (("supervised", 2), ("finetune", 1)):
        evaluated(protocol, seed=1, seeds=seeds, encoder=encoder)
    one, two, three = starts
    assert same(one, untrained(encoder, 1)) and same(two, untrained(encoder, 2)) and not same(one, two)
    assert same(three, encoder) and three is not encoder


def test_heads_differ_by_seed_and_not_by_torchs_state():
    one = classifier_of("linear", seed=1)
    torch.manual_seed(77)
    state = torch.get_rng_state()
    assert same(one, classifier_of("linear", seed=1, encoder=one.encoder))
    torch.manual_seed(77)
    classifier_of("linear", seed=2, encoder=one.encoder)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(one.head.out.weight, classifier_of("linear", seed=2).head.out.weight)
    assert 0 < one.head.out.weight.abs().max() <= 0.02 and not one.head.out.bias.any()


def test_each_protocol_is_measured_as_it_says_and_trains_by_the_demo_s_recipe_where_none_is_given(monkeypatch):
    recipes = []
    monkeypatch.setattr(protocols, "train", lambda classifier, source, classes, recipe, *_: recipes.append(recipe))
    for name in ("knn", "linear_probe"):
        monkeypatch.setattr(protocols, name, lambda *_, name=name: name)
    names = ("knn", "linear", "partial", "finetune")
    found = protocols.evaluate(small_vit(), Images(), Images(20, seed=9), names, CPU)
    assert (found["knn"], found["linear"]) == ("knn", "linear_probe")
    assert recipes == [recipe_for("demo", "partial"), recipe_for("demo", "finetune")]
    assert found["finetune"]["n"] == 20


def test_both_halves_are_encoded_as_asked_for(monkeypatch):
    sets, asked, encoder = (Images(), Images(20, seed=9)), [], small_vit()
    monkeypatch.setattr(protocols, "extract", lambda *words: asked.append(words) or (None, None))
    monkeypatch.setattr(protocols, "knn", lambda *_: {})
    protocols.evaluate(encoder, *sets, ["knn"], CPU, features="cls", batch_size=7, precision="bf16")
    assert asked == [(encoder, half, CPU, 7, "bf16", "cls") for half in sets]


def test_every_field_has_its_words_and_arrives_by_its_option(monkeypatch):
    comments = evaluate.field_comments(Recipe)
    assert set(comments) == set(asdict(Recipe()))
    given = dict(
        epochs=7, warmup_epochs=2.0, batch_size=6, lr=0.2, min_lr=0.01, optimizer="sgd", weight_decay=0.3,
        layer_decay=0.4, drop_path=0.2, mixup=0.5, cutmix=0.6, smoothing=0.2, erase=0.1, randaugment=4, crop_scale=0.5,
        features="cls", norm="pretrained", head_std=0.3, positions="learned",
    )  # fmt: skip
    words = [word for name, value in given.items() for word in (recipes.flag(name), str(value))]
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--run", "x", "--protocol", "finetune", "--data", "shapes", *words])
    options, report = evaluate.task_options(evaluate.options(), {})
    own = recipe_for("demo", "finetune").base_lr  # beside --lr it does nothing
    assert options["recipe"] == Recipe(**given, base_lr=own) and report["recipe"] == "demo" and report["lr"] == 0.2
    words = "--run x --protocol finetune --data shapes --base-lr 0.3".split()
    monkeypatch.setattr("sys.argv", ["evaluate.py", *words])
    options, report = evaluate.task_options(evaluate.options(), {})
    assert options["recipe"].base_lr == 0.3 and report["lr"] == 0.3 * options["recipe"].batch_size / 256
    words = "--run x --protocol attentive --data imagenet --attend-cls".split()
    monkeypatch.setattr("sys.argv", ["evaluate.py", *words])
    options, report = evaluate.task_options(evaluate.options(), dict(method="cae"))
    assert options["recipe"] == replace(recipe_for("cae", "attentive"), attend_cls=True) and report["recipe"] == "cae"
    own = {
        "cae small": "cae-small",
        "mae large": "mae-large",
        "conmim large": "conmim",
        "autoencoder tiny": "autoencoder",
    }
    for run, name in own.items():
        run = dict(zip(("method", "model"), run.split(), strict=True))
        assert evaluate.task_options(evaluate.options(), run)[1]["recipe"] == name


def test_a_start_does_not_wait_for_the_compiler():
    """torchvision and torch.optim bring it along, two seconds; a kNN probe and --help want neither."""
    code = "import sys, evaluate, train; assert not {'torchvision', 'torch._dynamo'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(evaluate.__file__).parent, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
