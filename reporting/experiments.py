"""Which commands make each result: every method under a budget, and the variants that claims compare."""

from dataclasses import dataclass

from reporting.claims import CLAIMS, VARIANTS
from reporting.result_files import BASELINES, ROWS
from runtime.errors import InputError

EPOCHS = {"cpu": 18, "gpu": 40}  # of pretraining, the same for every method
TUNE_EPOCHS = {"cpu": 15, "gpu": 20}  # of fine-tuning, and of supervised training from scratch


@dataclass(frozen=True)
class Work:
    name: str  # "cpu/mae": of its result file
    method: str
    commands: dict[str, str]  # train, then each measure; RUN, SEED and DIR stand for what is not the experiment's


def plan(args) -> list[Work]:
    """The runs that the command line asks for, in the order of the table."""
    budget = args.budget or "cpu"
    names = [f"{budget}/{name}" for name in ROWS if budget != "demo" or name != BASELINES]
    if args.claims:
        needed = {name for claim in CLAIMS for name in claim.order}
        names = [name for name in [*names, *(f"claims/{name}" for name in VARIANTS)] if name in needed]
    if args.methods:
        chosen, known = args.methods.split(","), [name.split("/")[1] for name in names]
        if unknown := set(chosen) - set(known):
            raise InputError(f"methods {min(unknown)!r}: not among these runs; choose of {','.join(known)}")
        names = [name for name in names if name.split("/")[1] in chosen]
    return [work_of(*name.split("/"), budget, args) for name in names]


def work_of(folder: str, name: str, budget: str, args) -> Work:
    if budget == "demo":  # measures itself when it is done
        return Work(f"{folder}/{name}", name, {"train": f"train.py --method {name} --seed SEED --out RUN"})
    epochs, tune = args.epochs or EPOCHS[budget], args.tune_epochs or TUNE_EPOCHS[budget]
    tiny = args.data == "tiny-imagenet"
    if budget == "cpu":
        recipe, model, kept = "demo", "", ""
        subset = " --classes 10 --crop-scale 0.2" if tiny else ""
        measured = "knn linear linear-paper attentive finetune attention classes"
    else:
        recipe, model, subset = "tiny", f" --model {args.model or 'small'} --save-every 5", ""
        kept = " --crop-scale 0"  # the attentive probe sees whole images, each encoded once
        measured = "knn linear attentive finetune classes"
    method, differs, untrained = name, "", ""
    if folder == "claims":
        method, differs, measured = VARIANTS[name]
    elif name == "cmae_loc" and budget == "gpu":  # a fifth of training, as the recipe's are of its own epochs
        differs = "--crop-warmup {0} --crop-interval {0}".format(max(1, epochs // 5))
    elif name == BASELINES:  # one step, for the shape of an encoder
        method, differs, measured = "mae", "--max-steps 1", "pixels knn linear attentive supervised"
        untrained = " --untrained"
    source = f"{args.data}{' --data-root DIR' * tiny}{subset}" + f" --images {args.images}" * bool(args.images)
    train = f"train.py --method {method} --data {source} --recipe {recipe}{model}"
    train += f" --epochs {epochs} --warmup-epochs {max(1, epochs // 9)} --no-evaluate {differs} --seed SEED --out RUN"
    trained = f"--recipe {recipe} --seed SEED"
    protocols = {
        "knn": f"knn{untrained}",
        "linear": f"linear{untrained}",
        "linear-paper": f"linear --paper {trained}",
        "attentive": f"attentive{untrained} {trained}{kept}",
        "finetune": f"finetune {trained} --epochs {tune}",
        "supervised": f"supervised {trained} --epochs {tune}",
    }
    commands = {"train": " ".join(train.split())}
    for key in measured.split():
        column = "finetune" if key == "supervised" else key  # its place in the table
        commands[column] = (
            f"evaluate.py --run RUN --protocol {protocols[key]}" if key in protocols
            else f"reproduce.py --measure {key} --run RUN"
        )  # fmt: skip
    return Work(f"{folder}/{name}" + "-base" * (args.model == "base"), method, commands)
