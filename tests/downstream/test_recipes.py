"""The recipes are the papers' tables; what is given goes before them; what cannot be is refused."""

import math
from dataclasses import replace

import pytest

from downstream.recipes import recipe_for
from runtime.errors import InputError


def test_recipes_are_the_papers_tables():
    """Peak rates as printed: CAE's Appendix, ConMIM's Table 11 and script, MAE's blr, LC-MAE's §5."""
    peaks = {
        ("mae", "finetune"): 2e-3, ("cmae", "finetune"): 2e-3, ("cmae-1600", "finetune"): 1e-3,
        ("cae", "finetune"): 8e-3, ("cae-small", "finetune"): 1.6e-2, ("cae-large", "finetune"): 2e-3,
        ("mae-large", "finetune"): 4e-3,
        ("conmim", "finetune"): 4e-3, ("conmim-small", "finetune"): 4e-3, ("lcmae", "finetune"): 4e-3,
        ("cae", "linear"): 6.4, ("mae", "linear"): 6.4, ("cae", "attentive"): 0.4,
    }  # fmt: skip
    for (name, protocol), peak in peaks.items():
        assert recipe_for(name, protocol).peak == pytest.approx(peak), (name, protocol)
    shapes = {
        "mae": (100, 5, 0.65), "cae-small": (200, 5, 0.75), "cae-large": (50, 5, 0.75), "conmim": (100, 20, 0.65),
        "conmim-small": (200, 5, 0.8), "lcmae": (100, 5, 0.75), "cmae_loc": (100, 5, 0.65),
    }  # fmt: skip
    for name, shape in shapes.items():
        recipe = recipe_for(name, "finetune")
        assert (recipe.epochs, recipe.warmup_epochs, recipe.layer_decay) == shape
        assert (recipe.mixup, recipe.cutmix, recipe.smoothing, recipe.erase) == (0.8, 1.0, 0.1, 0.25)
        assert (recipe.randaugment, recipe.drop_path, recipe.weight_decay) == (9, 0.1, 0.05)
    for protocol in ("linear", "attentive"):
        recipe = recipe_for("cae", protocol)
        assert (recipe.epochs, recipe.warmup_epochs, recipe.weight_decay, recipe.crop_scale) == (90, 10, 0, 0.08)
        assert not any((recipe.mixup, recipe.cutmix, recipe.smoothing, recipe.erase, recipe.randaugment))


def test_what_is_given_goes_before_the_recipe_and_the_warm_up_shrinks_with_the_epochs():
    recipe = recipe_for("mae", "finetune", given=dict(epochs=20, batch_size=512, mixup=0.0))
    assert (recipe.epochs, recipe.warmup_epochs, recipe.peak, recipe.mixup, recipe.cutmix) == (20, 1, 1e-3, 0, 1)
    assert recipe_for("mae", "finetune", given=dict(lr=0.5)).peak == 0.5
    assert recipe_for("mae", "finetune", given=dict(epochs=20, warmup_epochs=4.0)).warmup_epochs == 4


def test_partial_of_no_block_follows_the_linear_recipe_and_supervised_learns_alike_in_all_layers():
    assert recipe_for("mae", "partial", 0) == recipe_for("mae", "linear")
    assert recipe_for("mae", "partial", 1) == recipe_for("mae", "finetune")
    assert recipe_for("mae", "supervised") == replace(recipe_for("mae", "finetune"), layer_decay=1.0)


WRONG = {
    "recipe 'mea': unknown; choose one of mae": dict(name="mea"),
    "epochs 0: must be 1 or more": dict(given=dict(epochs=0)),
    "smoothing 1: must be from 0 to below 1": dict(given=dict(smoothing=1.0)),
    "randaugment 11: must be from 0 to 10": dict(given=dict(randaugment=11)),
    "mixup -1: must be 0 or more": dict(given=dict(mixup=-1.0)),
    "lr nan": dict(given=dict(lr=math.nan)),
    "warmup epochs 200: must be at most the 100 epochs": dict(given=dict(warmup_epochs=200.0)),
    "optimizer 'adam': unknown; choose adamw, lars or sgd": dict(given=dict(optimizer="adam")),
    "norm 'new': unknown": dict(given=dict(norm="new")),
    "--layer-decay: does nothing to protocol linear": dict(protocol="linear", given=dict(layer_decay=0.5)),
    "--features: does nothing to protocol attentive": dict(protocol="attentive", given=dict(features="cls")),
    "--attend-cls: does nothing to protocol finetune": dict(given=dict(attend_cls=True)),
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_recipe_is_refused_in_one_line(words):
    with pytest.raises(InputError, match=words) as error:
        recipe_for(**dict(name="mae", protocol="finetune") | WRONG[words])
    assert "\n" not in str(error.value)
