"""README's generated parts say what the result files say, stale results are found, and stopped work goes on."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import analyze
import evaluate
import reproduce
from common import MEAN, STD
from figures import measures
from figures.study import Study
from methods import METHODS
from reporting import claims
from runtime import files
from runtime.command_line import build_encoder, settle
from runtime.errors import InputError
from train import options

LINES = [f"<!-- {name} -->\n<!-- /{name} -->" for name in claims.BLOCKS]
README = "# title\n\n" + "\n\nprose\n\n".join(LINES) + "\nend\n"


def result(results: Path, name: str, seeds: dict, method: str = "mae", **more) -> Path:
    """A result file; `seeds` is {seed: (measured, last losses)}."""
    runs = [
        dict(seed=seed, commit="0123456789", dirty=False, sources=claims.sources(method), machine="a laptop",
             seconds=90, loss=[{"epoch": e, **row} for e, row in enumerate(loss)], measured=measured)
        for seed, (measured, loss) in seeds.items()
    ]  # fmt: skip
    file = results / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    config = dict(data="tiny-imagenet", classes=10, model="nano", epochs=2)
    file.write_text(json.dumps(dict(method=method, commands={}, config=config, runs=runs) | more))
    return file


def top1(**columns) -> dict:
    return {key: {"top1": value} for key, value in columns.items()}


LOSS = [{"loss": 4.0}, {"loss": 2.0}, {"loss": 1.0}]


@pytest.fixture
def results(tmp_path):
    seeds = {0: (top1(knn=40.0, finetune=60.0), LOSS), 1: (top1(knn=42.0, finetune=61.0), [{"loss": 2.0}] * 3)}
    result(tmp_path / "results", "cpu/mae", seeds)
    seeds = {0: (top1(knn=50.0, finetune=70.0), LOSS), 1: (top1(knn=50.0, finetune=70.5), LOSS)}
    result(tmp_path / "results", "cpu/cmae_loc", seeds, "cmae_loc")
    (tmp_path / "results/losses-cpu.svg").write_text(claims.drawing(tmp_path / "results", "cpu"))
    return tmp_path / "results"


# ------------------------------------------------------------------------------------------------------------ tables


def row(text: str, start: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_results_table_is_the_files_means_and_deviations(results):
    block = claims.results_block(results)
    assert row(block, "`mae`") == [
        "`mae`", "2", "41.0 ± 1.4", "", "", "60.5 ± 0.7", "1.50 ± 0.71", "2", "[0123456](results/cpu/mae.json)",
    ]  # fmt: skip
    assert block.index("`mae`") < block.index("`cmae_loc`")
    assert "10 classes of tiny-imagenet" in block and "on a laptop" in block
    assert "`python reproduce.py --budget gpu`: not run yet." in block


def test_pixels_and_training_from_scratch_have_rows_of_their_own(results):
    measured = top1(knn=30.0, linear=39.0, finetune=55.0) | {"pixels": {"knn": 20.0, "linear": 25.0}}
    result(results, "cpu/scratch", {0: (measured, LOSS)})
    block = claims.results_block(results)
    assert row(block, "pixels")[:5] == ["pixels", "1", "20.0", "25.0", ""]
    assert row(block, "untrained; supervised from scratch")[1:7] == ["1", "30.0", "39.0", "", "55.0", ""]
    assert block.index("pixels") < block.index("`mae`")
    assert "scratch" not in claims.losses_block(results) and "scratch" not in claims.drawing(results, "cpu")


def test_a_stale_result_is_marked_with_its_reason(results):
    result(results, "cpu/cae", {0: (top1(knn=1.0), LOSS)}, stale="made before the norm")
    block = claims.results_block(results)
    assert "† cpu/cae: made before the norm" in block and row(block, "`cae` †")


def test_losses_are_means_over_seeds_at_each_epoch(results):
    block = claims.losses_block(results)
    assert row(block, "loss, cpu") == ["loss, cpu", "first step", "epoch 1", "epoch 2"]
    assert row(block, "`mae`") == ["`mae`", "3.00", "2.00", "1.50"]
    drawn = re.findall(r'points="([^"]*)".*\n<text[^>]*>(\w+)<', claims.drawing(results, "cpu"))
    assert [name for _, name in drawn] == ["mae", "cmae_loc"]
    # From 3 down to 1.5 over 2 epochs, in a panel of 180 x 90 that begins at (40, 20).
    assert drawn[0][0] == "40.0,20.0 130.0,80.0 220.0,110.0"


@pytest.mark.parametrize(
    "numbers, digits, spelt",
    [([], None, ""), ([41.0], 1, "41.0"), ([1.0, 2.0], 1, "1.5 ± 0.7"), ([0.0123, 0.0125], None, "0.0124 ± 0.0001"),
     ([123.4], None, "123"), ([1.5], None, "1.50")],
)  # fmt: skip
def test_numbers_are_spelt_as_mean_and_deviation(numbers, digits, spelt):
    assert claims.spell(numbers, digits) == spelt


# ------------------------------------------------------------------------------------------------------------ claims


@pytest.mark.parametrize(
    "high, said",
    [([3.1, 9.0, 3.2], "shown"), ([9.0, 2.9, 9.0], "not shown at this scale"), ([3.0] * 3, "not shown at this scale"),
     ([0.9, 0.0, 0.5], "contradicted"), ([0.0, 0.0, 1.1, 0.0], "not shown at this scale")],
)  # fmt: skip
def test_verdict_wants_every_seed_beyond_every_other(high, said):
    assert claims.verdict([1.0, 3.0, 2.0], high) == said


def test_no_verdict_without_seeds():
    assert claims.verdict([], [1.0, 2.0]) == claims.verdict([1.0, 2.0], []) == "not run"
    few = "not judged: fewer than three seeds"
    assert claims.verdict([1.0, 1.0], [2.0, 3.0, 4.0]) == claims.verdict([2.0, 3.0, 4.0], [1.0, 1.0]) == few


def test_the_ledger_judges_what_was_measured(results):
    seeds = {i: (top1(knn=50.0, finetune=70.0 + i), LOSS) for i in range(3)}
    result(results, "cpu/cmae_loc", seeds, "cmae_loc")
    for n, said in ((2, "not judged: fewer than three seeds"), (3, "shown")):
        result(results, "cpu/mae", {i: (top1(knn=40.0, finetune=60.0 + i), LOSS) for i in range(n)})
        block = claims.claims_block(results)
        (line,) = [line for line in block.splitlines() if "ten classes of Tiny-ImageNet" in line]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[6] == said
    assert cells[2:6] == ["62.95 < 65.84", "`finetune.top1`", "61.0 ± 1.0 → 71.0 ± 1.0", "3"]
    assert cells[7] == "[cpu/mae](results/cpu/mae.json) < [cpu/cmae_loc](results/cpu/cmae_loc.json)"
    (line,) = [line for line in block.splitlines() if "all of Tiny-ImageNet" in line]
    assert "not run" in line


@pytest.mark.parametrize("claim", claims.CLAIMS, ids=lambda claim: f"{claim.paper} {claim.where} {claim.measure}")
def test_every_claim_compares_what_its_runs_measure(claim):
    budget = "gpu" if claim.order[0].startswith("gpu/") else None
    args = reproduce.options(["--budget", "gpu"] if budget else ["--claims"])
    args.data = "tiny-imagenet"
    works = {work.name: work for work in reproduce.plan(args)}
    for side in claims.sides(claim):
        name, measure = side.split()
        assert measure.split(".")[0] in {*works[name].commands, "loss"}
    assert len(set(claims.sides(claim))) == len(claim.order) >= 2


def test_the_gpu_row_of_the_other_cmae_places_its_crops_as_often_as_its_recipe():
    args = reproduce.options(["--budget", "gpu", "--methods", "cmae_loc"])
    args.data = "tiny-imagenet"
    (work,) = reproduce.plan(args)
    assert "--epochs 40 " in work.commands["train"]
    assert "--crop-warmup 8 --crop-interval 8 " in work.commands["train"]  # a fifth, as 20 of 100


def test_the_cpu_table_and_all_claims_are_three_dozen_runs_at_most():
    args = reproduce.options(["--claims"])
    args.data = "tiny-imagenet"
    names = [work.name for work in reproduce.plan(args)]
    assert len(names) == len(set(names)) <= 36
    assert {f"claims/{name}" for name in claims.VARIANTS} <= set(names)


# ------------------------------------------------------------------------------------------------------------ README


def test_the_speeds_are_what_bench_printed_with_machine_versions_and_commit(results):
    assert claims.speed_block(results) == "Not run yet."
    found = dict(device="a laptop", threads=2, versions=dict(torch="2.9"), git=dict(commit="0123456789", dirty=True))
    rows = [dict(name="mae", batch=64, precision="fp32", images_per_second=259.4, ms=3.0), dict(name="hf", batch=64)]
    (results / "bench").mkdir()
    file = results / "bench/step.json"
    file.write_text(json.dumps(found | dict(command="python bench.py --peer hf --json step.json", rows=rows)))
    head, *lines = claims.speed_block(results).splitlines()
    assert head == "a laptop, 2 threads, torch 2.9, commit [0123456*](results/bench/step.json)"
    table = ["what batch type images/s", "mae     64 fp32      259", "hf      64"]
    assert lines == ["", *(f"    {line}" for line in ["python bench.py --peer hf", *table])]
    assert claims.problems(claims.generated(README, results), results) == []  # and is taken for no training's result


def test_generated_parts_stand_between_their_lines_and_nothing_else_changes(results):
    readme = claims.generated(README, results)
    assert claims.generated(readme, results) == readme and claims.problems(readme, results) == []
    assert re.sub(r"(?s)(<!-- (\w+) -->).*?(<!-- /\2 -->)", r"\1\n\3", readme) == README
    for name, block in claims.BLOCKS.items():
        assert block(results) in readme.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0]


@pytest.mark.parametrize("wrong", ["", README + "<!-- claims -->", README.replace("<!-- /index -->", "")])
def test_readme_without_its_lines_is_refused(wrong, results):
    with pytest.raises(InputError, match="needs the lines <!-- "):
        claims.generated(wrong, results)


def test_a_number_changed_on_either_side_is_a_problem(results):
    readme = claims.generated(README, results)
    assert claims.problems(readme.replace("41.0 ±", "43.0 ±"), results) == [
        "README.md: its part 'results' is not what reproduce.py --readme writes"
    ]
    file = results / "cpu/mae.json"
    file.write_text(file.read_text().replace('"loss": 4.0', '"loss": 4.5'))
    found = claims.problems(readme, results)
    assert [line.split()[0] for line in found] == ["README.md:", "losses-cpu.svg:"] and "'losses'" in found[0]
    (results / "losses-cpu.svg").unlink()
    assert any(line.startswith("losses-cpu.svg") for line in claims.problems(readme, results))


def test_a_broken_result_is_one_line(results):
    (results / "cpu/cae.json").write_text('{"method": "cae", "runs": [')
    with pytest.raises(InputError, match=r"cae\.json: not a result"):
        claims.results_block(results)


def test_readme_and_results_of_this_repository_agree():
    assert claims.problems((claims.HERE / "README.md").read_text(), claims.HERE / "results") == []


# ------------------------------------------------------------------------------------------------------------- stale


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder that has only this repository's methods."""
    place = tmp_path / "checkout"
    place.mkdir()
    (place / "inputs").mkdir()
    for name in [*METHODS, "inputs/builtin_images"]:
        shutil.copy(claims.HERE / f"{name}.py", place / f"{name}.py")
    monkeypatch.setattr(claims, "HERE", place)
    monkeypatch.setattr(reproduce, "HERE", place)
    return place


COMMENT = "\n# a remark\n"
CODE = "\nANSWER = 42\n"


def test_a_result_older_than_its_code_is_found_unless_it_says_why(checkout, results, monkeypatch):
    monkeypatch.setattr(claims, "BLOCKS", {})
    assert claims.problems("", results) == []
    with open(checkout / "cmae_loc.py", "a") as file:
        file.write(CODE)
    (found,) = claims.problems("", results)
    assert found.startswith("cmae_loc.json: of other code than cmae_loc.py now")
    file = results / "cpu/cmae_loc.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"stale": "only a constant was added"}))
    assert claims.problems("", results) == []


def test_a_method_stands_on_those_that_it_imports(checkout):
    assert set(claims.sources("mae")) == {"mae.py"} and set(claims.sources("cae")) == {"cae.py", "mae.py", "dvae.py"}
    # Built-in images are made by code.
    assert set(claims.sources("mae", "shapes")) == {
        "mae.py",
        "inputs/builtin_images.py",
    }
    recorded = claims.sources("cmae")
    with open(checkout / "mae.py", "a") as file:
        file.write(CODE)
    assert claims.changed(recorded) == ["mae.py"]


def test_comments_and_docstrings_make_no_result_old_where_git_knows_the_old_code(checkout):
    def git(*words):
        return subprocess.run(["git", "-C", checkout, *words], check=True, capture_output=True, text=True).stdout

    try:
        git("init")
    except OSError:
        pytest.skip("needs git")
    recorded, text = claims.sources("mae"), (checkout / "mae.py").read_text()
    assert git("hash-object", "-w", "mae.py").strip() == recorded["mae.py"]  # git's own name of the content
    more = text.replace('"""MAE: ', '"""MAE, measured: ').replace('"""Nothing to recompute."""', '"""Nothing."""')
    assert more != text
    (checkout / "mae.py").write_text(more + COMMENT)
    assert claims.changed(recorded) == []
    (checkout / "mae.py").write_text(text.replace("mask_ratio: float = 0.75", "mask_ratio: float = 0.76"))
    assert claims.changed(recorded) == ["mae.py"]
    (checkout / "mae.py").unlink()
    assert claims.changed(recorded) == ["mae.py"]


@pytest.mark.parametrize(
    "before, after, same",
    [("import launch\nlaunch.load(1)", "from runtime import files\n\nfiles.load(1)", True),
     ("from augment import blur\nblur(1)", "def f():\n    return 1", False),
     ("def f():\n    import torch\n    return torch.ones(2)", "import torch\ndef f():\n    return torch.ones(2)", True),
     ("import torch\ntorch.ones(2)", "import torch\ntorch.zeros(2)", False),
     ("import mae\nself.mae.loss(1)", "import mae\nself.loss(1)", False)],
)  # fmt: skip
def test_code_is_compared_without_the_places_that_it_imports_from(before, after, same):
    assert (claims.code(before.encode()) == claims.code(after.encode())) == same


def test_a_file_that_was_renamed_is_found_by_its_old_name(checkout):
    name = "inputs/builtin_images.py"
    recorded = {"shapes.py": claims.sources("mae", "shapes")[name]}
    assert claims.changed(recorded) == []
    (checkout / name).write_text((checkout / name).read_text() + CODE)
    assert claims.changed(recorded) == [name]


def test_where_git_does_not_know_the_old_code_any_difference_counts(checkout):
    recorded = claims.sources("mae")
    assert claims.changed(recorded) == []
    with open(checkout / "mae.py", "a") as file:
        file.write(COMMENT)
    assert claims.changed(recorded) == ["mae.py"]


# ------------------------------------------------------------------------------------------------------------- index

MUST = {  # every equation of the papers that has code, and the tables that have switches
    "CMAE": "Eq. 1,2,3,4,5,6,7,8 Table 4a,4b,4c,4d,4e,6",
    "The other CMAE": "Eq. 1,2,3,4,5,6",
    "CAE": "Eq. 1 Table 2,7 Figure 4",
    "ConMIM": "Eq. 1,3 Table 4,5,6,7,8,9,10",
    "LC-MAE": "Eq. 1,5,6,7,8 Table 1,2,3,A.1 Figure 2,3,4,5,6,7",
    "MAE": "Table 1a,1b,1d,8",
}


@pytest.fixture(scope="module")
def cited():
    return claims.citations()


@pytest.mark.parametrize("paper", MUST)
def test_every_equation_and_table_is_in_the_index(paper, cited):
    for kind, numbers in re.findall(r"([A-Z]\w+\.?) (\S+)", MUST[paper]):
        for number in numbers.split(","):
            assert (paper, f"{kind} {number}") in cited


def test_every_line_of_the_index_leads_to_its_citation(cited):
    assert len(cited) > 60
    for (_, key), links in cited.items():
        number = re.search(r"[\dA-Z.]*\d[a-e]?$", key)[0]
        for link in links:
            shown, line, file, again = re.match(r"\[(\S+):(\d+)\]\((\S+)#L(\d+)\)", link).groups()
            assert (shown, line) == (file, again)
            text = (claims.HERE / file).read_text().splitlines()[int(line) - 1]
            last = re.search(r"\d+", number)[0]
            spans = re.findall(r"(\d+)(?:-| to )(\d+)", text)
            assert number in text or any(int(a) <= int(last) <= int(b) for a, b in spans), (key, link)


def test_the_index_names_the_object_and_the_paper(cited):
    def names(paper, key):
        return [re.sub(r"\[(\S+):\d+\]\(\S+\)", r"\1", link) for link in cited[paper, key]]

    assert "cmae.py CMAE.forward" in names("CMAE", "Eq. 8") and "cmae.py Config.lambda_c" in names("CMAE", "Eq. 8")
    assert "common.py reconstruction_loss" in names("CMAE", "Eq. 5")  # "Eq. (5) of CMAE"
    assert "cmae_loc.py location_loss" in names("The other CMAE", "Eq. 5")
    assert "figures/measures.py decoder_similarity" in names("LC-MAE", "Eq. 7")  # a file of no paper, which names it
    assert "dvae.py header" in names("CAE", "§G.1")  # "CAE (arXiv 2202.03026v2, §G.1)", in another paper's file
    assert not any(link.startswith("[common.py") for link in cited["LC-MAE", "Eq. 5"])


@pytest.mark.parametrize(
    "text, found",
    [("(Table 4a, 4b, 6)", ["4a", "4b", "6"]), ("Eq. (6), (7); K", ["6", "7"]), ("Eq. 7 and 8", ["7", "8"]),
     ("Tables 4-9 are", ["4", "5", "6", "7", "8", "9"]), ("Figures 2 to 4)", ["2", "3", "4"]), ("Table A.1", ["A.1"]),
     ("Fig. 5)", ["5"]), ("§3.5, 1)", ["3.5"]), ("Table 2, 5x5", ["2"])],
)  # fmt: skip
def test_lists_and_ranges_of_citations(text, found):
    match = claims.CITATION.search(text)
    assert claims.items(match[2] or match[4]) == found


# ---------------------------------------------------------------------------------------------------------- commands


def planned(*words, source="tiny-imagenet"):
    args = reproduce.options([*words, "--data-root", "D"])
    args.data = source
    return reproduce.plan(args)


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
                assert reproduce.options(given).measure in reproduce.MEASURES


def test_the_table_trains_all_methods_for_as_long_at_their_own_rates():
    for words, recipe in (("--budget cpu", "demo"), ("--budget gpu", "tiny")):
        works = planned(*words.split())
        assert [work.name.split("/")[1] for work in works] == ["scratch", *claims.TABLE]
        settings = [options(work.commands["train"].replace("SEED", "0").split()[1:])[0] for work in works[1:]]
        assert len({(s.epochs, s.warmup_epochs, s.model, s.classes, s.images) for s in settings}) == 1
        for s in settings:
            theirs = METHODS[s.method].RECIPES[recipe]
            assert s.lr == theirs.get("lr", theirs.get("base_lr", 0) * s.batch_size / 256)
        columns = {"knn", "linear", "attentive", "finetune"}
        assert all(columns <= work.commands.keys() for work in works)
        assert "supervised" in works[0].commands["finetune"] and "--untrained" in works[0].commands["linear"]


def test_the_demo_table_is_of_the_readmes_first_command_with_every_method():
    args = reproduce.options(["--budget", "demo"])
    works = reproduce.plan(args)
    assert [work.name for work in works] == [f"demo/{method}" for method in claims.TABLE]
    for work in works:
        assert list(work.commands) == ["train"]
        given = options(work.commands["train"].replace("SEED", "0").split()[1:])
        assert work.method == given[0].method and given == options(["--method", work.method, "--out", "RUN"])


def test_demo_table_shows_losses_by_share_of_the_run_and_what_the_encoder_gained(tmp_path):
    measured = top1(**{"knn-untrained": 20.0, "knn": 30.04, "linear-untrained": 40.0, "linear": 55.5})
    loss = [{"loss": 8.0 / (1 + epoch)} for epoch in range(9)]
    result(tmp_path, "demo/cae", {0: (measured, loss)}, "cae")
    assert row(claims.demo_block(tmp_path), "[`--method cae`](results/demo/cae.json)")[1:] == [
        "8", "8.00", "2.67", "1.60", "1.14", "0.889", "20.0 → 30.0", "40.0 → 55.5", "1.5", "1", "0123456",
    ]  # fmt: skip
    assert "on a laptop." in claims.demo_block(tmp_path) and "not run yet" in claims.demo_block(tmp_path / "cpu")


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
        ("tiny-imagenet", ["cpu"], reproduce.HERE / "results"),
        ("tiny-imagenet", ["demo"], reproduce.HERE / "results"),
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


def test_rehearsals_need_a_place_of_their_own_and_names_must_be_known():
    with pytest.raises(InputError, match="give --results"):
        reproduce.options(["--budget", "cpu", "--images", "64"])
    with pytest.raises(InputError, match=r"'simclr': not among these runs; choose of scratch,mae,cmae,"):
        planned("--budget", "cpu", "--methods", "mae,simclr")
    with pytest.raises(InputError, match="jobs 0: must be above 0"):
        reproduce.options(["--budget", "cpu", "--jobs", "0"])
    for words in (
        "--budget cpu --model base", "--claims --model small", "--readme --epochs 3", "--check --list",
        "--budget demo --epochs 3", "--budget demo --images 64 --results x",
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
        reproduce.Runner(args).all([reproduce.Work("cpu/mae", "mae", commands)])
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
    assert run["sources"] == claims.sources("mae", "shapes")
    assert [row["epoch"] for row in run["loss"]] == [0, 1, 2, 3, 4]
    assert [row["loss"] for row in run["loss"]] == [9.0, 8.5, 6.5, 4.5, 2.5]  # the first step, then means of two
    assert "private" not in bench.file.read_text() and str(bench.out) not in bench.file.read_text()
    assert bench(seeds=2) == []  # it stands
    assert len(bench(seeds=3)) == 2 and len(json.loads(bench.file.read_text())["runs"]) == 3


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
        file.write(CODE)
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
    monkeypatch.setattr(reproduce.os, "cpu_count", lambda: 8)
    assert all(line.endswith("threads 4") for line in bench("--jobs", "2", seeds=2) if line.startswith("train"))
    assert {run["machine"].split(", ")[1] for run in json.loads(bench.file.read_text())["runs"]} == {"4 of 8 cores"}


def test_a_directory_of_something_else_is_left_alone(bench):
    (bench.out / "mae-0").mkdir(parents=True)
    (bench.out / "mae-0/thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds what reproduce"):
        bench()
    assert (bench.out / "mae-0/thesis.txt").read_text() == "mine"


# ---------------------------------------------------------------------------------------------------------- measures


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A `Study` of a run at random weights, of any method, on noise of two classes."""
    place, patch = tmp_path_factory.mktemp("study"), pytest.MonkeyPatch()
    patch.setenv("MINMIM_CACHE", str(place / "cache"))
    draw = np.random.default_rng(0)
    for split, name, i in ((s, c, i) for s in ("train", "val") for c in ("ant", "bee") for i in range(4)):
        (place / "data" / split / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(place / f"data/{split}/{name}/{i}.png")

    def make(method: str, flags: str = "") -> Study:
        words = f"--method {method} --data {place / 'data'} --recipe demo --image-size 16 --patch-size 4 --width 8"
        args, config, Method = options(f"{words} --depth 2 --heads 2 --batch-size 8 --device cpu {flags}".split())
        settle(args, torch.device("cpu"))
        torch.manual_seed(1)
        folder = place / f"{method}{len(list(place.iterdir()))}"
        folder.mkdir()
        about = dict(method=method, settings=vars(args), config=vars(config))
        (folder / "config.json").write_text(json.dumps(about))
        files.save(folder / "checkpoint.pt", dict(method=Method(build_encoder(args), config).state_dict()))
        return Study(analyze.options(["--run", str(folder), "--figure", "all"]), torch.device("cpu"))

    yield make
    patch.undo()


def test_spread_is_the_deviation_of_unit_vectors_over_images(study):
    its = study("lcmae", "--mae-weight 0 --in-weight 0 --projector-out 6")
    found = reproduce.spread(its)["deviation"]
    run, images = its.runs[0], its.pictures(64)
    mask = run.masks(images, alike=True)
    with torch.no_grad():
        _, h = run.method.decode(measures.centred(images, 16), mask)
        v = run.method.projector(h).double()
    total, n = 0.0, len(v)
    for place in range(v.shape[1]):
        unit = [[x / math.sqrt(sum(y * y for y in image)) for x in image] for image in v[:, place].tolist()]
        for d in range(6):
            mean = sum(image[d] for image in unit) / n
            total += sum((image[d] - mean) ** 2 for image in unit) / n
    assert found == pytest.approx(math.sqrt(total / v.shape[1]), rel=1e-4) and found > 0.01
    torch.nn.init.zeros_(run.method.projector.weight)
    torch.nn.init.ones_(run.method.projector.bias)
    assert reproduce.spread(its)["deviation"] == pytest.approx(0, abs=1e-6)


def test_latent_error_is_of_all_pixels_decoded_without_the_regressor(study):
    its = study("cae", "--target pixels")
    method = its.runs[0].method
    torch.nn.init.zeros_(method.predict.weight)
    torch.nn.init.constant_(method.predict.bias, 0.5)
    x = measures.centred(its.pictures(64), 16).double()
    assert reproduce.latents(its)["error"] == pytest.approx((x - 0.5).square().mean().item(), rel=1e-5)
    for block in method.regressor:
        block.mlp.fc2.bias.data += 1e3  # what is skipped cannot matter
    assert reproduce.latents(its)["error"] == pytest.approx((x - 0.5).square().mean().item(), rel=1e-5)


def test_positions_and_attention_are_the_figures_own_numbers(study):
    its = study("mae", "--decoder-depth 3")
    run, images = its.runs[0], its.pictures(32)
    mask = run.masks(images, alike=True)
    alike = []
    for m in measures.decoder_maps(run, images, mask):
        rows = m[:, :, 1 + mask.masked[0], 1:].flatten(1).double()
        pairs = [torch.cosine_similarity(rows[i], rows[j], dim=0).item() for i in range(8) for j in range(8) if i != j]
        alike.append(sum(pairs) / len(pairs))
    found = reproduce.positions(its)
    assert found == pytest.approx({"first": alike[0], "later": (alike[1] + alike[2]) / 2}, rel=1e-6)
    with torch.no_grad():
        for block in run.encoder.blocks:
            block.attn.qkv.weight.zero_()  # all attend to all alike, in a grid of 4 x 4 patches of 4 pixels
    places = [(i // 4, i % 4) for i in range(16)]
    mean = sum(4 * math.dist(a, b) for a in places for b in places) / 256
    assert reproduce.attention(its)["distance"] == pytest.approx(mean, rel=1e-5)


def test_pixels_and_classes_measure_the_set_not_a_random_one(study):
    its = study("mae")
    found = reproduce.pixels(its)
    assert set(found) == {"knn", "linear"} and all(0 <= x <= 100 for x in found.values())
    x = []
    for half in (its.train, its.val):  # 16 pixels a side: each colour is the mean of four, normalised
        pixels = half.images(torch.arange(8), "cpu").double() / 255
        four = [pixels[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
        x.append(((sum(four) / 4 - mean) / std).flatten(1).float())
    expected = evaluate.knn(x[0], its.train.labels, x[1], its.val.labels, 2)
    assert found["knn"] == expected["top1"]
    distances = reproduce.classes(its)
    images, labels = its.labelled(500, 50)
    direct = measures.class_distances(measures.features(its.runs[0].encoder, images), labels)
    assert distances["intra_std"] == pytest.approx(direct["intra_std"].mean().item())
    assert distances.keys() == {"intra_mean", "intra_std", "inter_mean", "inter_std"}


def test_a_measure_is_a_command_that_prints_one_line(study, monkeypatch, capsys):
    folder = study("mae").runs[0].directory
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--measure", "classes", "--run", str(folder)])
    reproduce.main()
    assert set(json.loads(capsys.readouterr().out)) == {"intra_mean", "intra_std", "inter_mean", "inter_std"}


def test_a_machine_is_told_by_its_kind():
    gpu = dict(versions=dict(gpu="NVIDIA H200"), settings=dict(device="cuda", precision="bf16"))
    assert reproduce.machine(gpu, 4) == "NVIDIA H200, bf16"
    cpu = dict(versions=dict(gpu="NVIDIA H200"), settings=dict(device="cpu", precision="fp32"))
    assert re.fullmatch(r"\w+ ?\S*, 4 of \d+ cores, fp32", reproduce.machine(cpu, 4))
