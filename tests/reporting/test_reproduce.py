"""README's generated parts say what the result files say, stale results are found, and stopped work goes on."""

import ast
import json
import re
import subprocess
from pathlib import Path

import pytest

import reproduce
from reporting import HERE, documents, experiments, result_files
from runtime.errors import InputError

PARTS = [(name, part) for name, parts in documents.BLOCKS.items() for part in parts]


def result(results: Path, name: str, seeds: dict, method: str = "mae", **more) -> Path:
    """A result file; `seeds` is {seed: (measured, last losses)}."""
    runs = [
        dict(seed=seed, commit="0123456789", dirty=False, sources=result_files.sources(method, []), machine="a laptop",
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
    return tmp_path / "results"


# ------------------------------------------------------------------------------------------------------------ tables


def row(text: str, start: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_results_table_is_the_files_means_and_deviations(results):
    block = documents.results_block(results)
    assert row(block, "`mae`") == [
        "`mae`", "2", "41.0 ± 1.4", "", "", "60.5 ± 0.7", "1.50 ± 0.71", "2", "[0123456](../results/cpu/mae.json)",
    ]  # fmt: skip
    assert block.index("`mae`") < block.index("`cmae_loc`")
    assert "10 classes of tiny-imagenet" in block and "on a laptop" in block
    assert "`python reproduce.py --budget gpu`: not run yet." in block


def test_pixels_and_training_from_scratch_have_rows_of_their_own(results):
    measured = top1(knn=30.0, linear=39.0, finetune=55.0) | {"pixels": {"knn": 20.0, "linear": 25.0}}
    result(results, "cpu/scratch", {0: (measured, LOSS)})
    block = documents.results_block(results)
    assert row(block, "pixels")[:5] == ["pixels", "1", "20.0", "25.0", ""]
    assert row(block, "untrained; supervised from scratch")[1:7] == ["1", "30.0", "39.0", "", "55.0", ""]
    assert block.index("pixels") < block.index("`mae`")
    assert "scratch" not in documents.losses_block(results)


def test_a_stale_result_is_marked_with_its_reason(results):
    result(results, "cpu/cae", {0: (top1(knn=1.0), LOSS)}, stale="made before the norm")
    block = documents.results_block(results)
    assert "† cpu/cae: made before the norm" in block and row(block, "`cae` †")


def test_losses_are_means_over_seeds_at_each_epoch(results):
    block = documents.losses_block(results)
    assert row(block, "loss, cpu") == ["loss, cpu", "first step", "epoch 1", "epoch 2"]
    assert row(block, "`mae`") == ["`mae`", "3.00", "2.00", "1.50"]


def test_demo_table_shows_losses_by_share_of_the_run_and_what_the_encoder_gained(tmp_path):
    measured = top1(**{"knn-untrained": 20.0, "knn": 30.04, "linear-untrained": 40.0, "linear": 55.5})
    loss = [{"loss": 8.0 / (1 + epoch)} for epoch in range(9)]
    result(tmp_path, "demo/cae", {0: (measured, loss)}, "cae")
    assert row(documents.demo_block(tmp_path), "[`--method cae`](../results/demo/cae.json)")[1:] == [
        "8", "8.00", "2.67", "1.60", "1.14", "0.889", "20.0 → 30.0", "40.0 → 55.5", "1.5", "1", "0123456",
    ]  # fmt: skip
    assert "on a laptop; minutes with evaluation." in documents.demo_block(
        tmp_path
    ) and "not run yet" in documents.demo_block(tmp_path / "cpu")


def test_dense_transfers_stand_beside_each_other_by_encoder(tmp_path):
    assert "`python reproduce.py --transfer`: not run yet." in documents.transfer_block(tmp_path)
    both = {"fcn-untrained": {"miou": 20.0}, "boxes-supervised": {"box_ap": 3.0, "box_ap50": 9.0}}
    seeds = {seed: (both | {"fcn-mae": {"miou": miou}}, LOSS) for seed, miou in enumerate((30.0, 32.0))}
    result(tmp_path, "transfer/mae", seeds, stale="made before the norm")
    result(tmp_path, "transfer/cmae", {0: ({"boxes-cmae": {"box_ap": 4.0, "box_ap50": 8.0}}, LOSS)}, "cmae")
    block, words = documents.transfer_block(tmp_path), experiments.TRANSFER
    assert row(block, f"`{words['fcn']['words']}`")[1:] == ["miou", "20.0 ± 0.0", "", "31.0 ± 1.4", ""]
    lines = [line for line in block.splitlines() if line.startswith(f"| `{words['boxes']['words']}`")]
    assert [line.split(" | ")[1:] for line in lines] == [
        ["box ap", "not run", "3.0 ± 0.0", "not run", "4.0 |"],
        ["box ap50", "not run", "9.0 ± 0.0", "not run", "8.0 |"],
    ]  # fmt: skip
    assert "[mae](../results/transfer/mae.json), 0123456; [cmae](../results/transfer/cmae.json), 0123456." in block
    assert "† mae: made before the norm." in block


@pytest.mark.parametrize(
    "numbers, digits, spelt",
    [([], None, ""), ([41.0], 1, "41.0"), ([1.0, 2.0], 1, "1.5 ± 0.7"), ([0.0123, 0.0125], None, "0.0124 ± 0.0001"),
     ([123.4], None, "123"), ([1.5], None, "1.50")],
)  # fmt: skip
def test_numbers_are_spelt_as_mean_and_deviation(numbers, digits, spelt):
    assert documents.spell(numbers, digits) == spelt


# ------------------------------------------------------------------------------------------------------------ claims


@pytest.mark.parametrize(
    "high, said",
    [([3.1, 9.0, 3.2], "shown"), ([9.0, 2.9, 9.0], "not shown at this scale"), ([3.0] * 3, "not shown at this scale"),
     ([0.9, 0.0, 0.5], "contradicted"), ([0.0, 0.0, 1.1, 0.0], "not shown at this scale")],
)  # fmt: skip
def test_verdict_wants_every_seed_beyond_every_other(high, said):
    assert documents.verdict([1.0, 3.0, 2.0], high) == said


def test_no_verdict_without_seeds():
    verdict = documents.verdict
    assert verdict([], [1.0, 2.0]) == verdict([1.0, 2.0], []) == "not run"
    few = "not judged: fewer than three seeds"
    assert verdict([1.0, 1.0], [2.0, 3.0, 4.0]) == verdict([2.0, 3.0, 4.0], [1.0, 1.0]) == few


def test_claims_are_judged_by_what_was_measured(results):
    seeds = {i: (top1(knn=50.0, finetune=70.0 + i), LOSS) for i in range(3)}
    result(results, "cpu/cmae_loc", seeds, "cmae_loc")
    for n, said in ((2, "not judged: fewer than three seeds"), (3, "shown")):
        result(results, "cpu/mae", {i: (top1(knn=40.0, finetune=60.0 + i), LOSS) for i in range(n)})
        block = documents.claims_block(results)
        (line,) = [line for line in block.splitlines() if "| it is better than MAE (here" in line]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[6] == said
    assert cells[2:6] == ["62.95 < 65.84", "`finetune.top1`", "61.0 ± 1.0 → 71.0 ± 1.0", "3"]
    assert cells[7] == "[cpu/mae](../results/cpu/mae.json) < [cpu/cmae_loc](../results/cpu/cmae_loc.json)"
    (line,) = [line for line in block.splitlines() if "| it is better than MAE (on all" in line]
    assert "not run" in line and "- **shown** The other CMAE, Table 1: it is better than MAE (here" in block


@pytest.mark.parametrize("claim", experiments.CLAIMS, ids=lambda x: f"{x['paper']} {x['where']} {x['sides'][-1]}")
def test_every_claim_compares_what_its_runs_measure(claim):
    sides = claim["sides"]
    words = dict(gpu="--budget gpu", recipes="--recipes").get(sides[0].split("/")[0], "--claims")
    args = reproduce.options(words.split())
    args.data = "tiny-imagenet"
    works = {work.name: work for work in experiments.plan(args)}
    for side in sides:
        name, measure = side.split()
        measured = {
            *works[name].commands,
            "loss",
            *("knn linear".split() if args.recipes else []),
        }  # by train.py itself
        assert measure.split(".")[0] in measured
    assert len(set(sides)) == len(sides) >= 2


def test_the_cpu_table_and_all_claims_are_three_dozen_runs_at_most():
    args = reproduce.options(["--claims"])
    args.data = "tiny-imagenet"
    names = [work.name for work in experiments.plan(args)]
    assert len(names) == len(set(names)) <= 36
    assert {f"claims/{name}" for name in experiments.VARIANTS} <= set(names)


# ------------------------------------------------------------------------------------------------------------ README


@pytest.fixture
def root(tmp_path):
    """A folder with documents whose generated parts are empty."""
    for name, parts in documents.BLOCKS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("# title\n\n" + "\n\nprose\n\n".join(map(empty, parts)) + "\nend\n")
    return tmp_path


def empty(part: str) -> str:
    return f"<!-- {part} -->\n<!-- /{part} -->"


def write(root, results):
    for name, text in documents.generated(root, results).items():
        (root / name).write_text(text)


def test_the_speeds_are_what_bench_printed_machine_by_machine(results, root):
    assert documents.speed_block(results) == "Not run yet."
    found = dict(device="a laptop", threads=2, versions=dict(torch="2.9"), git=dict(commit="0123456789", dirty=True))
    rows = [dict(name="mae", batch=64, precision="fp32", images_per_second=259.4, ms=3.0), dict(name="hf", batch=64)]
    for name in ("a", "b"):
        (results / "bench" / name).mkdir(parents=True)
        file = results / f"bench/{name}/step.json"
        file.write_text(json.dumps(found | dict(command="python bench.py --peer hf --json step.json", rows=rows)))
    head, *lines = documents.speed_block(results).split("### b")[0].strip().splitlines()
    assert head == "### a" and lines[1] == (
        "a laptop, 2 threads, torch 2.9, commit [0123456*](../results/bench/a/step.json)"
    )
    table = ["what batch type images/s", "mae     64 fp32      259", "hf      64"]
    assert lines[2:] == ["", *(f"    {line}" for line in ["python bench.py --peer hf", *table])]
    write(root, results)
    assert list(documents.problems(root, results)) == []  # and is taken for no training's result


def test_figures_that_were_only_reported_say_so(results):
    measured = top1(knn=31.04, linear=56.8)
    result(results, "first-command", {0: (measured, LOSS)}, "cmae")
    other = top1(knn=32.0, linear=58.0)
    result(results, "demo/cmae", {0: (other, LOSS), 1: (measured, LOSS)}, "cmae")
    (results / "bench/x").mkdir(parents=True)
    told = dict(note="told by a friend; not remade", figures=[["a product", 363, 184]])
    told["first_command"] = [["a friend's, bf16", 5.5, 32.6, 57.4, "no"]]
    (results / "bench/x/reported.json").write_text(json.dumps(told))
    assert "were told by a friend; not remade." in documents.speed_block(results)
    assert row(documents.speed_block(results), "a product") == ["a product", "363", "184"]
    block = documents.first_block(results)
    assert "took 1.5 to 5.5 minutes" in block
    ours = [line for line in block.splitlines() if line.startswith("| a laptop")]
    assert [line.split(" | ")[2:4] for line in ours] == [["31.0", "56.8"], ["32.0", "58.0"]]
    assert [line.split("results/")[1] for line in ours] == ["first-command.json) |", "demo/cmae.json) |"]
    assert "| 5.5 | 32.6 | 57.4 | no |" in block


def test_generated_parts_stand_between_their_lines_and_nothing_else_changes(results, root):
    before = {name: (root / name).read_text() for name in documents.BLOCKS}
    write(root, results)
    written = {name: (root / name).read_text() for name in documents.BLOCKS}
    assert documents.generated(root, results) == written and list(documents.problems(root, results)) == []
    for name, part in PARTS:
        block = documents.BLOCKS[name][part](results)
        assert block in written[name].split(f"<!-- {part} -->")[1].split(f"<!-- /{part} -->")[0]
    shown = {name: re.sub(r"(?s)(<!-- (\w+) -->).*?(<!-- /\2 -->)", r"\1\n\3", text) for name, text in written.items()}
    assert shown == before


@pytest.mark.parametrize("wrong", ["", empty("claims") + "<!-- claims -->", "<!-- claims -->"])
def test_a_document_without_its_lines_is_refused(wrong, results, root):
    (root / "docs/claims.md").write_text(wrong)
    with pytest.raises(InputError, match=r"docs/claims\.md: needs the lines <!-- claims"):
        documents.generated(root, results)


def test_a_number_changed_on_either_side_is_a_problem(results, root):
    write(root, results)
    file = root / "docs/results.md"
    file.write_text(file.read_text().replace("41.0 ±", "43.0 ±"))
    assert list(documents.problems(root, results)) == [
        "docs/results.md: its part 'results' is not what reproduce.py --readme writes"
    ]
    write(root, results)
    file = results / "cpu/mae.json"
    file.write_text(file.read_text().replace('"loss": 4.0', '"loss": 4.5'))
    (found,) = documents.problems(root, results)
    assert "docs/results.md: its part 'losses'" in found


def test_a_broken_result_is_one_line(results):
    (results / "cpu/cae.json").write_text('{"method": "cae", "runs": [')
    with pytest.raises(InputError, match=r"cae\.json: not a result"):
        documents.results_block(results)


def test_documents_and_results_of_this_repository_agree():
    assert list(documents.problems(HERE, HERE / "results")) == []


# ------------------------------------------------------------------------------------------------------------- stale


COMMENT = "\n# a remark\n"
CODE = "\nANSWER = 42\n"


def test_a_result_older_than_its_code_is_found_unless_it_says_why(checkout, results, monkeypatch):
    monkeypatch.setattr(documents, "BLOCKS", {})
    assert list(documents.problems(checkout, results)) == []
    with open(checkout / "cmae_loc.py", "a") as file:
        file.write(CODE)
    (found,) = documents.problems(checkout, results)
    assert found.startswith("cmae_loc.json: of other code than cmae_loc.py now")
    file = results / "cpu/cmae_loc.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"stale": "only a constant was added"}))
    assert list(documents.problems(checkout, results)) == []


def test_a_result_names_every_file_that_its_numbers_depend_on():
    common = {"common.py", "inputs/augment.py", "mae.py", "runtime/fast_paths.py", "runtime/randomness.py"}
    mae, cae = set(result_files.sources("mae", [])), set(result_files.sources("cae", []))
    assert common <= mae and common | {"cae.py", "dvae.py"} <= cae and not mae & {"cae.py", "methods.py", "cmae.py"}
    built_in = result_files.sources("mae", [], "shapes")
    assert set(built_in) - mae == {"inputs/builtin_images.py"}  # they are made by code
    commands = ["train.py --method mae", "evaluate.py --run RUN --protocol finetune", "reproduce.py --measure spread"]
    found = set(result_files.sources("mae", commands))
    assert found >= {"train.py", "evaluate.py", "downstream/training_loop.py", "inputs/image_sets.py"}
    assert "runtime/optimization.py" in found and not found & {"runtime/log.py", "runtime/run_directory.py"}
    assert "reporting/claim_measures.py" in found and not found & {"methods.py", "cmae.py", "reproduce.py"}
    assert not any(name.startswith("tests/") for name in found)


def test_a_changed_import_makes_a_result_old(checkout):
    recorded = result_files.sources("cmae", [])
    with open(checkout / "mae.py", "a") as file:
        file.write(CODE)
    assert result_files.changed(recorded) == ["mae.py"]


def test_comments_and_docstrings_make_no_result_old_where_git_knows_the_old_code(checkout):
    def git(*words):
        return subprocess.run(["git", "-C", checkout, *words], check=True, capture_output=True, text=True).stdout

    try:
        git("init")
    except OSError:
        pytest.skip("needs git")
    recorded, text = result_files.sources("mae", []), (checkout / "mae.py").read_text()
    assert git("hash-object", "-w", "mae.py").strip() == recorded["mae.py"]  # git's own name of the content
    more = text.replace('"""MAE: ', '"""MAE, measured: ').replace('"""Nothing to recompute."""', '"""Nothing."""')
    assert more != text
    (checkout / "mae.py").write_text(more + COMMENT)
    assert result_files.changed(recorded) == []
    (checkout / "mae.py").write_text(text.replace("0.75", "0.76"))
    assert result_files.changed(recorded) == ["mae.py"]
    (checkout / "mae.py").unlink()
    assert result_files.changed(recorded) == ["mae.py"]


@pytest.mark.parametrize(
    "before, after, same",
    [("import launch\nlaunch.load(1)", "from runtime import files\n\nfiles.load(1)", True),
     ("from augment import blur\nblur(1)", "def f():\n    return 1", False),
     ("def f():\n    import torch\n    return torch.ones(2)", "import torch\ndef f():\n    return torch.ones(2)", True),
     ("import torch\ntorch.ones(2)", "import torch\ntorch.zeros(2)", False),
     ("import mae\nself.mae.loss(1)", "import mae\nself.loss(1)", False)],
)  # fmt: skip
def test_code_is_compared_without_the_places_that_it_imports_from(before, after, same):
    assert (result_files.code(before.encode()) == result_files.code(after.encode())) == same


def test_a_file_that_was_renamed_is_found_by_its_old_name(checkout):
    name = "inputs/builtin_images.py"
    recorded = {"shapes.py": result_files.sources("mae", [], "shapes")[name]}
    assert result_files.changed(recorded) == []
    (checkout / name).write_text((checkout / name).read_text() + CODE)
    assert result_files.changed(recorded) == [name]


def test_where_git_does_not_know_the_old_code_any_difference_counts(checkout):
    recorded = result_files.sources("mae", [])
    assert result_files.changed(recorded) == []
    with open(checkout / "mae.py", "a") as file:
        file.write(COMMENT)
    assert result_files.changed(recorded) == ["mae.py"]


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
    return documents.citations()


@pytest.mark.parametrize("paper", MUST)
def test_every_equation_and_table_is_in_the_index(paper, cited):
    for kind, numbers in re.findall(r"([A-Z]\w+\.?) (\S+)", MUST[paper]):
        for number in numbers.split(","):
            assert (paper, f"{kind} {number}") in cited


def piece(text: str, name: str) -> str:
    """The lines of a file's docstring ("header"), or of "function", "Class.method", "Class.field", "CONSTANT"."""

    def names(node) -> list[str]:
        its = [node, getattr(node, "target", None), *getattr(node, "targets", [])]
        return [getattr(x, key, "") for x in its for key in ("name", "id")]

    node = ast.parse(text)
    if name == "header":
        return ast.get_docstring(node)
    for part in name.split("."):
        (node,) = [inner for inner in node.body if part in names(inner)]
    return "\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno])


def test_every_name_in_the_index_is_of_code_that_cites_the_entry(cited):
    assert len(cited) > 60
    for (_, key), links in cited.items():
        assert len(set(links)) == len(links)
        number = re.search(r"[\dA-Z.]*\d[a-e]?$", key)[0]
        for link in links:
            shown, file, name = re.fullmatch(r"\[`(\S+)`\]\((\S+)\) ?(\S*)", link).groups()
            assert file == f"../{shown}"
            text = (HERE / shown).read_text()
            text = piece(text, name) if name else text
            last = int(re.findall(r"\d+", number)[-1])
            spans = re.findall(r"(\d+)(?:-| to )(\d+)", text)
            cites = re.search(rf"(?<![\w.]){re.escape(number)}(?!\w)", text)
            assert cites or any(int(a) <= last <= int(b) for a, b in spans), (key, link)


def test_the_index_names_the_object_and_the_paper(cited):
    def names(paper, key):
        return [re.sub(r"\[`(\S+)`\]\(\S+\)", r"\1", link) for link in cited[paper, key]]

    assert "cmae.py CMAE.forward" in names("CMAE", "Eq. 8") and "cmae.py Config.lambda_c" in names("CMAE", "Eq. 8")
    assert "common.py reconstruction_loss" in names("CMAE", "Eq. 5")  # "Eq. (5) of CMAE"
    assert "cmae_loc.py location_loss" in names("The other CMAE", "Eq. 5")
    assert "figures/measures.py decoder_similarity" in names("LC-MAE", "Eq. 7")  # a file of no paper, which names it
    assert "dvae.py header" in names("CAE", "§G.1")  # "CAE (arXiv 2202.03026v2, §G.1)", in another paper's file
    assert not any(link.startswith("[`common.py") for link in cited["LC-MAE", "Eq. 5"])


@pytest.mark.parametrize(
    "text, found",
    [("(Table 4a, 4b, 6)", ["4a", "4b", "6"]), ("Eq. (6), (7); K", ["6", "7"]), ("Eq. 7 and 8", ["7", "8"]),
     ("Tables 4-9 are", ["4", "5", "6", "7", "8", "9"]), ("Figures 2 to 4)", ["2", "3", "4"]), ("Table A.1", ["A.1"]),
     ("Fig. 5)", ["5"]), ("§3.5, 1)", ["3.5"]), ("Table 2, 5x5", ["2"])],
)  # fmt: skip
def test_lists_and_ranges_of_citations(text, found):
    match = documents.CITATION.search(text)
    assert list(documents.items(match[2] or match[4])) == found
