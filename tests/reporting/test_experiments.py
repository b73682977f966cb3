"""reproduce.py: which commands it plans, and that stopped work goes on and nothing is done twice."""

import json
import sys
from pathlib import Path

import pytest

import evaluate
import reproduce
import transfer
from methods import METHODS
from reporting import HERE, claim_measures, experiments, result_files
from runtime.errors import InputError
from train import options


def planned(*words, source="tiny-imagenet"):
    args = reproduce.options([*words, "--data-root", "D"])
    args.data = source
    return experiments.plan(args)


@pytest.mark.parametrize("source", ["tiny-imagenet", "shapes"])
@pytest.mark.parametrize("words", ["--budget cpu", "--budget gpu", "--budget gpu --model base", "--claims"])
def test_every_command_is_one_that_a_user_can_type(words, source, monkeypatch):
    for work in planned(*words.split(), source=source):
        for command in work.commands.values():
            script, *given = command.replace("SEED", "3").split()
            if script == "train.py":
                args, _, Method = options(given)
                assert Method is METHODS[work.method] and args.seed == 3 and args.data == source and args.out == "RUN"
                assert (args.data_root == "DIR") == (source == "tiny-imagenet") and not args.evaluate
            elif script == "evaluate.py":
                monkeypatch.setattr(sys, "argv", command.replace("SEED", "3").split())
                args = evaluate.options()
                args.data = source
                evaluate.task_options(args, {"method": work.method})
                assert args.run == "RUN" and vars(args).get("seed", 3) == 3
            else:
                assert reproduce.options(given).measure in claim_measures.MEASURES


def test_the_table_trains_all_methods_for_as_long_at_their_own_rates():
    for words, recipe in (("--budget cpu", "demo"), ("--budget gpu", "tiny")):
        works = planned(*words.split())
        assert [work.name.split("/")[1] for work in works] == ["scratch", *result_files.TABLE]
        settings = [options(work.commands["train"].replace("SEED", "0").split()[1:])[0] for work in works[1:]]
        assert len({(s.epochs, s.warmup_epochs, s.model, s.classes, s.images) for s in settings}) == 1
        for s in settings:
            theirs = METHODS[s.method].RECIPES[recipe]
            theirs = theirs | {"lr": 1e-3} if (recipe, s.method) == ("demo", "conmim") else theirs  # claims.json, "cpu"
            assert s.lr == theirs.get("lr", theirs.get("base_lr", 0) * s.batch_size / 256)
        columns = {"knn", "linear", "attentive", "finetune"}
        assert all(columns <= work.commands.keys() for work in works)
        assert "supervised" in works[0].commands["finetune"] and "--untrained" in works[0].commands["linear"]


def test_the_demo_table_is_of_the_readmes_first_command_with_every_method():
    args = reproduce.options(["--budget", "demo"])
    works = experiments.plan(args)
    assert [work.name for work in works] == [f"demo/{method}" for method in result_files.TABLE]
    for work in works:
        assert list(work.commands) == ["train"]
        given = options(work.commands["train"].replace("SEED", "0").split()[1:])
        assert work.method == given[0].method and given == options(["--method", work.method, "--out", "RUN"])


def test_dense_transfers_are_of_the_demos_encoders_and_each_command_can_be_typed(monkeypatch):
    works = {work.name: work.commands for work in planned("--transfer", source="shapes")}
    for method in ("mae", "cmae"):
        commands = works[f"transfer/{method}"]
        given = options(commands.pop("train").replace("SEED", "0").split()[1:])
        assert given == options(["--method", method, "--out", "RUN"])
        for key, command in commands.items():
            monkeypatch.setattr(sys, "argv", command.replace("SEED", "3").split())
            if command.startswith("evaluate.py"):
                assert key == "supervised" and evaluate.options().protocol == key
                continue
            args, recipe = transfer.options()
            assert recipe is None if key == "scenes" else (args.run, args.seed, args.resume) == ("RUN", 3, "never")
            assert args.untrained == key.endswith("-untrained")
            assert args.tuned == ("RUN/supervised/seed-3" if key.endswith("-supervised") else None)
    assert list(works["transfer/cmae"]) == ["boxes-cmae"] and list(works["transfer/mae"])[:2] == [
        "scenes",
        "supervised",
    ]
    assert {"boxes-mae", "boxes-untrained", "boxes-supervised", "fcn-mae"} <= works["transfer/mae"].keys()


def test_places_are_named_within_words_and_scores_alone_are_kept(tmp_path, monkeypatch):
    args = reproduce.options(["--transfer", "--data-root", "D", "--out", str(tmp_path)])
    monkeypatch.setattr(experiments, "HERE", tmp_path)
    (tmp_path / "transfer.py").write_text("import json, sys; print(json.dumps(dict(miou=1.5, n=2, data=sys.argv[1])))")
    (tmp_path / "reproduce.py").write_text("import json, sys; print(json.dumps(dict(words=sys.argv[1:])))")
    (tmp_path / "train.py").write_text("")
    runner = experiments.Runner(args)
    assert runner.call("transfer.py RUN", tmp_path, 0) == dict(miou=1.5, n=2)
    words = runner.call("reproduce.py RUN/a/seed-SEED DIR/set --seed SEED RUNS", tmp_path, 7)["words"]
    assert words == [f"{tmp_path}/a/seed-7", "D/set", "--seed", "7", "RUNS"]
    (tmp_path / "transfer.py").write_text("")  # as --make-scenes, which says nothing
    assert runner.call("transfer.py --make-scenes RUN/scenes", tmp_path, 0) == {}


def test_without_tiny_imagenet_the_built_in_images_stand_in_and_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINMIM_CACHE", str(tmp_path / "cache"))
    assert reproduce.choose_data(str(tmp_path)) == "shapes"
    assert capsys.readouterr().err.endswith("results go beside the runs.\n")
    monkeypatch.setattr(reproduce.image_sets, "open_set", lambda *_: None)
    assert reproduce.choose_data(None) == "tiny-imagenet"


@pytest.mark.parametrize(
    "name, flags, where",
    [
        ("shapes", ["cpu"], "out/results"),
        ("shapes", ["cpu", "--results", "mine"], "mine"),
        ("tiny-imagenet", ["cpu"], HERE / "results"),
        ("tiny-imagenet", ["demo"], HERE / "results"),
    ],
)
def test_results_of_built_in_images_never_replace_those_of_tiny_imagenet(monkeypatch, name, flags, where):
    class Runner:
        def __init__(self, args):
            self.args = args

        def all(self, works):
            assert works and Path(self.args.results) == Path(where)
            assert self.args.data == ("shapes" if "demo" in flags else name)  # whose file is among the sources

    monkeypatch.setattr(reproduce, "Runner", Runner)
    monkeypatch.setattr(reproduce, "choose_data", lambda root: name)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--out", "out", "--budget", *flags])
    reproduce.main()


def test_seeds_unless_given():
    given = {words: reproduce.options(words.split()).seeds for words in ("--budget cpu", "--budget gpu", "--claims")}
    assert given == {"--budget cpu": 1, "--budget gpu": 1, "--claims": 3}
    assert reproduce.options("--claims --seeds 5".split()).seeds == 5


def test_names_must_be_known_and_options_do_something():
    with pytest.raises(InputError, match=r"'simclr': not among these runs; choose of scratch,mae,cmae,"):
        planned("--budget", "cpu", "--methods", "mae,simclr")
    with pytest.raises(InputError, match="--jobs: 0: must be at least 1"):
        reproduce.options(["--budget", "cpu", "--jobs", "0"])
    for words in (
        "--budget cpu --model base", "--claims --model small", "--readme --seeds 3", "--check --list",
        "--budget demo --data-root D", "--transfer --model base", "--recipes --data-root D",
    ):  # fmt: skip
        with pytest.raises(InputError, match="does nothing here"):
            reproduce.options(words.split())
    assert [w.name for w in planned("--budget", "gpu", "--model", "base", "--methods", "cae,mae")] == [
        "gpu/mae-base", "gpu/cae-base",
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- running

TRAIN = """
import json, os, pathlib, signal, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
assert out.is_dir()
with open(out.parent / "calls.txt", "a") as file:
    file.write("train " + " ".join(sys.argv[1:]) + f" threads {os.environ['OMP_NUM_THREADS']}\\n")
if (out.parent / "slow").exists() and not (out / "half").exists():
    def stop(*_):  # as train.py's: it takes a step's time to save, and a second signal does not wait for it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(1.2)
        (out / "half").touch()
        sys.exit(143)
    signal.signal(signal.SIGTERM, stop)
    (out.parent / "began").touch()
    time.sleep(60)
settings = dict(epochs=4, precision="bf16", device="cpu", out=str(out), seed=int(sys.argv[-3]))
config = dict(settings=settings, config=dict(tau=0.1), git={}, versions={})
(out / "config.json").write_text(json.dumps(config))
rows = [dict(step=s, epoch=s / 2, loss=10.0 - s, lr=1.0, images_per_second=1.0, seconds=s) for s in range(1, 9)]
(out / "log.jsonl").write_text("\\n".join(json.dumps(row) for row in [config, *rows]))
if (out.parent / "measures").exists():
    probes = {of: {p: dict(top1=len(of + p)) for p in ("knn", "linear")} for of in ("untrained", "trained")}
    (out / "summary.json").write_text(json.dumps(probes))
"""
EVALUATE = """
import json, pathlib, sys
run = pathlib.Path(sys.argv[sys.argv.index("--run") + 1])
with open(run.parent / "calls.txt", "a") as file:
    file.write("evaluate " + sys.argv[-1] + "\\n")
if (run.parent / "broken").exists():
    sys.exit("the probe is broken")
print(json.dumps({"protocol": "knn", "top1": 50.0, "top5": 90.0, "n": 10, "data_root": "/private"}))
"""


KNN = {"knn": "evaluate.py --run RUN --protocol knn"}


@pytest.fixture
def bench(checkout, tmp_path):
    """A checkout whose commands do nothing but tell that they were called, and how to run works in it."""
    (checkout / "train.py").write_text(TRAIN)
    (checkout / "evaluate.py").write_text(EVALUATE)

    def run(*words, commands=None, seeds=1):
        given = ["--budget", "cpu", "--out", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
        args = reproduce.options([*given, "--seeds", str(seeds), *words])
        args.data = "shapes"
        commands = commands or {"train": "train.py --seed SEED --out RUN"} | KNN
        experiments.Runner(args).all([experiments.Work("cpu/mae", "mae", commands)])
        file = tmp_path / "out/cpu/calls.txt"
        called = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return called

    run.out, run.file = tmp_path / "out/cpu", tmp_path / "results/cpu/mae.json"
    return run


def test_a_piece_is_done_once_and_kept_without_paths(bench):
    called = bench(seeds=2)
    assert sorted(line.split()[0] for line in called) == ["evaluate", "evaluate", "train", "train"]
    found = json.loads(bench.file.read_text())
    assert [run["seed"] for run in found["runs"]] == [0, 1] and found["config"] == {"epochs": 4, "tau": 0.1}
    run = found["runs"][0]
    assert run["measured"] == {"knn": {"top1": 50.0, "top5": 90.0, "n": 10}}
    assert run["sources"] == result_files.sources("mae", ["train.py", "evaluate.py"], "shapes")
    assert [row["epoch"] for row in run["loss"]] == [0, 1, 2, 3, 4]
    assert [row["loss"] for row in run["loss"]] == [9.0, 8.5, 6.5, 4.5, 2.5]  # the first step, then means of two
    assert "private" not in bench.file.read_text() and str(bench.out) not in bench.file.read_text()
    assert bench(seeds=2) == []  # it stands
    assert len(bench(seeds=3)) == 2 and len(json.loads(bench.file.read_text())["runs"]) == 3
    whole = bench.file.read_text()
    bench.file.write_text(whole.replace('"knn"', '"other"', 2).replace('"other"', '"knn"', 1))  # but the command's name
    assert bench(seeds=3) == [] and json.loads(bench.file.read_text()) == json.loads(whole)  # one lacked a measure


def test_what_a_run_measures_itself_is_kept(bench):
    bench.out.mkdir(parents=True)
    (bench.out / "measures").touch()
    bench(commands={"train": "train.py --seed SEED --out RUN"})
    (run,) = json.loads(bench.file.read_text())["runs"]
    top1 = {"knn-untrained": 12, "linear-untrained": 15, "knn": 10, "linear": 13}
    assert {name: found["top1"] for name, found in run["measured"].items()} == top1


def test_other_commands_or_other_code_start_over(bench, checkout):
    bench(seeds=2)
    commands = {"train": "train.py --more --seed SEED --out RUN"} | KNN
    (bench.out / "mae-0/checkpoint.pt").touch()
    assert len(bench(commands=commands)) == 2 and not (bench.out / "mae-0/checkpoint.pt").exists()
    assert [run["seed"] for run in json.loads(bench.file.read_text())["runs"]] == [0]  # the others were not like it
    assert bench(commands=commands) == []
    with open(checkout / "mae.py", "a") as file:
        file.write("\nANSWER = 42\n")
    assert len(bench(commands=commands)) == 2 and bench(commands=commands) == []


def test_what_failed_says_why_and_what_was_done_is_not_done_again(bench):
    bench.out.mkdir(parents=True)
    (bench.out / "broken").touch()
    with pytest.raises(InputError, match=r"^1 of 1 failed, the first: cpu/mae, seed 0: evaluate\.py .* is broken$"):
        bench()
    assert not bench.file.exists()
    (bench.out / "broken").unlink()
    (bench.out / "calls.txt").unlink()
    assert bench() == ["evaluate knn"] and bench.file.exists()


def test_when_the_minutes_are_over_training_is_asked_to_save_and_goes_on_later(bench):
    bench.out.mkdir(parents=True)
    (bench.out / "slow").touch()
    called = bench("--minutes", "0.05", seeds=2)
    assert len(called) <= 1 and not bench.file.exists()  # the second seed was left for later
    if not (bench.out / "mae-0/half").exists():  # the machine was too slow even to begin
        bench("--minutes", "0.5")
    (bench.out / "slow").unlink()
    assert (bench.out / "mae-0/half").exists()
    assert len(bench(seeds=2)) == 4 and (bench.out / "mae-0/half").exists()  # in the same directory
    assert len(json.loads(bench.file.read_text())["runs"]) == 2


def test_jobs_share_the_cores(bench, monkeypatch):
    monkeypatch.setattr(experiments.os, "cpu_count", lambda: 8)
    assert all(line.endswith("threads 4") for line in bench("--jobs", "2", seeds=2) if line.startswith("train"))
    assert {run["machine"].split(", ")[1] for run in json.loads(bench.file.read_text())["runs"]} == {"4 of 8 cores"}


def test_a_directory_of_something_else_is_left_alone(bench):
    (bench.out / "mae-0").mkdir(parents=True)
    (bench.out / "mae-0/thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds what reproduce"):
        bench()
    assert (bench.out / "mae-0/thesis.txt").read_text() == "mine"
