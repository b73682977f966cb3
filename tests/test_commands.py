"""Every command that the documents and the headers show, but for train.py's, is run: on a small run, in a short form.

train.py's are run for every method by test_train.py, by one process and by two; here and there `test_map_of_tests.py`
sees to it that each is understood as it stands.
"""

import importlib.util
import shlex
from pathlib import Path

import pytest
from forked_programs import PROGRAMS, ROOT, Program, finish, popen
from test_map_of_tests import commands
from test_train import OWN, SMALL, assert_fine, environment, photos  # noqa: F401  (fixtures)

QUICK = "--epochs 1 --warmup-epochs 0 --batch-size 16 --resume never".split()
TINY = "--width 16 --depth 1 --heads 1 --decoder-width 16 --decoder-depth 1 --decoder-heads 1 --image-size 32".split()
SHORT = {  # what is given beside a command's own words, by program and a word that it has
    ("evaluate.py", "--paper"): QUICK,
    ("evaluate.py", "attentive"): QUICK,
    ("evaluate.py", "partial"): QUICK,
    ("evaluate.py", "finetune"): QUICK,
    ("evaluate.py", "supervised"): QUICK,
    ("transfer.py", "--make-scenes"): ["--n", "8"],
    ("transfer.py", "--task"): ["--epochs", "1", "--batch-size", "4", "--resume", "never"],
    ("bench.py", "bench.py"): [*TINY, "--batch-size", "2", "--repeats", "1", "--no-memory", "--precision", "fp32"],
    ("reproduce.py", "--data-root"): ["--list"],
    ("reproduce.py", "demo"): ["--list"],
    ("reproduce.py", "--recipes"): ["--list"],
}
ELSEWHERE = {  # commands that are not run here, and why
    "cae-ade20k": "the papers' dense recipes are run on folders that test_transfer.py makes",
    "cae-coco": "as above",
    "--format": "ADE20K's layout is made, and learnt from, in test_transfer.py",
    "--readme": "it would write the documents; test_reproduce.py has it write copies",
}
SHOWN = {command: None for _, command in commands() if "train.py" not in command and "pytest" not in command}


@pytest.fixture(scope="session")
def place(photos, environment, tmp_path_factory):  # noqa: F811
    """A folder with a run of CMAE, and scenes."""
    folder = tmp_path_factory.mktemp("commands")
    words = ["train.py", "--method", "cmae", "--data", photos, "--out", folder / "run", *SMALL, *OWN["cmae"]]
    begin = [words, ["transfer.py", "--make-scenes", folder / "scenes", "--n", "8"]]
    for script, *words in begin:
        words += ["--max-steps", "3"] if script == "train.py" else []
        assert_fine(finish(Program(script, *words, env=environment, cwd=folder)))
    return folder


def short(command: str, place, photos) -> list[str]:  # noqa: F811
    """The command with the small run, set and scenes in place of what it names, and fewer epochs, images, processes."""
    words, program = [], next(word for word in shlex.split(command) if word.endswith(".py"))
    before = ""
    for word in shlex.split(command):
        if before == "--data":
            word = str(place / "scenes") if program == "transfer.py" else str(photos)
        elif before == "--to" or before == "--make-scenes":
            word = str(place / "new" / word)
        elif before == "--image-size":
            word = "64"
        elif word == program:
            word = str(ROOT / program)
        elif word == "DIR":
            word = str(place)
        elif word == "RUN" or word.startswith(("runs/", "mae_pretrain")):
            word = str(place / "run")
        elif word.startswith("--nproc_per_node"):
            word = "--nproc_per_node=2"
        before = word
        words.append(word)
    words = ["-m", "torch.distributed.run", "--standalone", *words[1:]] if words[0] == "torchrun" else words[1:]
    for flag in {"--data-root", "--classes"} & set(words) if program == "bench.py" else ():
        at = words.index(flag)
        del words[at : at + 2]
    words = [word for word in words if word != "--compile"]  # which takes a minute
    if importlib.util.find_spec("lightly") is None:  # it comes with bench, not with test; the other peer is still run
        words = [word for word in words if word != "lightly"]
    if words[-1] == "--json":  # without a file it would write into results/
        words.append(str(place / "new/figures.json"))
    extra = [flag for (script, mark), flags in SHORT.items() if script == program and mark in command for flag in flags]
    return [*words, *extra]


def options(command: str) -> dict[str, set[str]]:
    """The words of each option in its short form, the last ones where an option is given twice."""
    found, flag = {"--method": {"mae"}} if "bench.py" in command else {}, ""  # what is measured unless one is named
    for word in short(command, Path("place"), "photos"):
        flag = word if word.startswith("--") or not flag else flag
        found[flag] = {word} if word == flag else found[flag] | {word}
    return found


def does_more(command: str, than: str) -> bool:
    """Whether its short form does all that another's does: it has its words, and beside them no option but --json."""
    ours, theirs = options(command), options(than)
    return ours.keys() - {"--json"} == theirs.keys() and all(theirs[flag] <= ours[flag] for flag in theirs)


ALONE = [command for command in SHOWN if not any(word in command.split() for word in ELSEWHERE)]
# Many differ in what their short forms leave out: of these the one that does the most is run, or the first.
RUN = [
    command
    for i, command in enumerate(ALONE)
    if not any(does_more(other, command) for other in ALONE[:i])
    and not any(does_more(other, command) and not does_more(command, other) for other in ALONE[i:])
]
NEW = [f"python {name}.py" for name in PROGRAMS if name != "train"] + ["torchrun"]  # by a new Python, once each
FIRST = [next(c for c in RUN if start in c and "hf" not in c) for start in NEW]


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN)
def test_every_command_runs_in_short(command, place, photos, environment):  # noqa: F811
    pytest.importorskip("matplotlib" if "analyze.py" in command else "torch")
    pytest.importorskip("transformers" if "hf" in command.split() else "torch")
    pytest.importorskip("pycocotools" if "detect" in command else "torch")
    (place / "new").mkdir(exist_ok=True)
    words, where = short(command, place, photos), dict(env=environment, cwd=place / "new")
    if command in FIRST:
        done = finish(popen(*words, **where))
    else:
        at = words.index("--") + 1 if words[0] == "-m" else 0  # past torchrun's own
        done = finish(Program(*words[at:], n=2 if at else 1, **where))
    if "--check" in command:  # what it finds, if anything, is test_reproduce.py's
        assert done.returncode in (0, 2) and "Traceback" not in done.stderr
    else:
        assert_fine(done)
