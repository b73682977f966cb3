"""Every state in which a run can be left, continued by one and by two processes; signals; what only rank 0 knows."""

import os
import signal
import subprocess
from types import SimpleNamespace

import pytest
import torch
from forked_programs import Program
from test_train import (  # noqa: F401  (`photos` and `environment` are fixtures)
    OWN,
    SMALL,
    assert_same_bits,
    environment,
    log,
    own,
    photos,
    state,
)

from runtime import files, run_directory
from train import build, options


@pytest.fixture
def start(photos, environment, tmp_path):  # noqa: F811
    """start("--flag", …, method=…, n=2, out="run", before="…") → the program, started."""
    begun = []

    def begin(*flags, method="mae", n=1, out="run", before=""):
        words = ["--method", method, "--data", photos, "--out", tmp_path / out, *SMALL, *own(method, *flags)]
        begun.append(Program("train.py", *words, n=n, env=environment, cwd=tmp_path, before=before))
        return begun[-1]

    yield begin
    for program in begun:
        program.kill()


def assert_fine(program: Program) -> str:
    assert program.wait() == [0] * len(program.processes) and "Traceback" not in program.stderr, program.stderr
    return program.stderr


# --------------------------------------------------------------------------------------- states in which a run is left

# Each kills the process that comes to this place of a CAE run, whose d-VAE is trained first and evaluated nowhere.
DIE = """
def die():
    os.kill(os.getpid(), signal.SIGKILL)
def before(owner, name, here, after=False):
    plain = getattr(owner, name)
    def wrapped(*words, **more):
        if not here(*words):
            return plain(*words, **more)
        if after:
            plain(*words, **more)
        die()
    setattr(owner, name, wrapped)
"""
PLACES = {
    "before the tokenizer's first step": "before(train, 'loop', lambda args, *_: args.method == 'dvae')",
    "in the tokenizer's first save": "before(os, 'replace', lambda _, to: str(to).endswith('dvae/checkpoint.pt'))",
    "between tokenizer and method": "before(train, 'train_first', lambda *_: True, after=True)",
    "before the first step": "before(train, 'loop', lambda args, *_: args.method == 'cae')",
    "in the first save": "before(os, 'replace', lambda _, to: str(to).endswith('run/checkpoint.pt'))",
    "before the encoder is saved": "before(os, 'replace', lambda _, to: str(to).endswith('run/encoder.safetensors'))",
    "before the picture": "before(train.Pictures, 'draw', lambda self, run: run.directory.name == 'run')",
    "in the final evaluation": "before(train, 'evaluate', lambda *_: True)",
    "before the summary is written": "before(os, 'replace', lambda _, to: str(to).endswith('run/summary.json'))",
}


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2])
def test_a_run_left_in_any_state_is_continued_and_ends_with_the_same_bits(start, tmp_path, n):
    def results():
        place = tmp_path / "run"
        losses = [(row["step"], row["loss"]) for row in log(place)[1:]]
        encoders = [files.load(folder / "encoder.safetensors")["state_dict"] for folder in (place, place / "dvae")]
        return state(place), state(place / "dvae"), encoders, losses, (place / "summary.json").read_text()

    flags = dict(method="cae", n=n)
    words = ["--epochs", 2, "--max-steps", 7, "--tokenizer-epochs", 1, "--evaluate"]  # saves after steps 5 and 7
    assert_fine(start(*words, **flags))
    whole = results()
    assert_fine(start(*words, **flags))  # finished
    assert_same_bits(results(), whole)
    for place, kill in PLACES.items():
        os.rename(tmp_path / "run", tmp_path / f"before {place}")
        killed = start(*words, **flags, before=DIE + kill)
        assert -signal.SIGKILL in killed.wait(), f"{place}: {killed.stderr}"
        assert not (tmp_path / "run/summary.json").exists(), place
        assert_fine(start(*words, **flags))
        assert_same_bits(results(), whole)


@pytest.mark.parametrize("n", [1, 2])
def test_a_run_left_by_one_process_is_continued_by_two_and_by_two_by_one(start, tmp_path, n):
    """It ends nearly alike, as rounding differs; the walk of all states above costs too much to be taken twice."""
    place = tmp_path / "run"

    def results():
        losses = [row["loss"] for row in log(place)[1:]]
        return losses, [files.load(folder / "encoder.safetensors")["state_dict"] for folder in (place, place / "dvae")]

    words = "--epochs 2 --max-steps 7 --tokenizer-epochs 1 --lr 1e-4 --drop-path 0 --log-every 1 --evaluate".split()
    assert_fine(start(*words, method="cae", n=n))
    losses, encoders = results()
    for state_left in ("between tokenizer and method", "before the encoder is saved"):
        os.rename(place, tmp_path / f"before {state_left}")
        killed = start(*words, method="cae", n=n, before=DIE + PLACES[state_left])
        assert -signal.SIGKILL in killed.wait(), killed.stderr
        said = assert_fine(start(*words, method="cae", n=3 - n))
        assert "continuing" in said and (place / "summary.json").exists()
        assert ("cae needs a dvae first" in said) == (state_left == "between tokenizer and method")
        theirs = results()
        assert theirs[0] == pytest.approx(losses, rel=3e-3)
        for one, two in zip(encoders, theirs[1], strict=True):
            for name in one:
                torch.testing.assert_close(two[name], one[name], atol=1e-4, rtol=1e-4)


# What befalls one of two ranks alone: what it does in its first save, and its exit status.
FATES = {
    "full disk": ("import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, resource.RLIM_INFINITY))", 0, 2),
    "rank 0 killed": ("os.kill(os.getpid(), signal.SIGKILL)", 0, -signal.SIGKILL),
    "rank 1 killed": ("os.kill(os.getpid(), signal.SIGKILL)", 1, -signal.SIGKILL),
}


@pytest.mark.parametrize("fate", FATES)
def test_a_rank_that_is_left_alone_ends_soon_with_one_line(start, tmp_path, fate):
    """No traceback may bury what the first one says. The same command then ends the run."""
    what, who, status = FATES[fate]
    script = f"""
plain = train.Run.save
def save(self, step):
    if os.environ["RANK"] == "{who}":
        {what}
    plain(self, step)
train.Run.save = save
"""
    program = start("--epochs", 2, n=2, before=script)
    found = program.wait(30)
    assert found[who] == status and found[1 - who] == 1 and "Traceback" not in program.stderr, program.stderr
    assert program.stderr.count("another rank has ended; what it said, or torchrun says of it, tells why") == 1
    assert program.stderr.count("checkpoint.pt: cannot be written (File too large)") == (fate == "full disk")
    assert_fine(start("--epochs", 2, n=2))


def test_a_finished_run_of_two_processes_says_so_again(start, tmp_path):
    """Only rank 0 has the log, and its first and last loss."""
    for expected in ("2 steps of 16", "continuing"):
        said = assert_fine(start("--max-steps", 2, n=2))
        assert expected in said and said.count("loss      ") == said.count("pictures  ") == 1
    (tmp_path / "run/log.jsonl").unlink()
    assert assert_fine(start("--max-steps", 2, n=2)).count("pictures  ") == 1


# Nothing of a tensor's size may be pickled, and all ranks must get what rank 0 has read.
SMALL_MESSAGES = """
import torch.distributed as dist
from torch.utils._pytree import tree_leaves
plain = dist.broadcast_object_list
def spy(objects, *words, **more):
    assert all(x.device.type == "meta" for x in tree_leaves(objects) if hasattr(x, "device"))
    plain(objects, *words, **more)
dist.broadcast_object_list = spy
load = files.load
def only_rank_0(*words, **how):
    assert os.environ["RANK"] == "0" or how  # images are mapped by all
    return load(*words, **how)
files.load = only_rank_0
"""


def test_a_checkpoint_goes_to_all_ranks_one_tensor_at_a_time(start, tmp_path):
    whole = start("--epochs", 2, n=2, out="whole")
    assert_fine(whole)
    kill = "before(train.Pictures, 'draw', lambda *_: True)"
    assert -signal.SIGKILL in start("--epochs", 2, n=2, before=DIE + kill).wait()
    assert state(tmp_path / "run")["step"] == 5
    assert "from step 5" in assert_fine(start("--epochs", 2, n=2, before=SMALL_MESSAGES))
    assert_same_bits(state(tmp_path / "run"), state(tmp_path / "whole"))


def test_a_refusal_by_rank_0_is_every_rank_s(start, tmp_path):
    """The others do not wait for it, nor end in a traceback."""
    assert_fine(start("--max-steps", 1))
    refused = start("--max-steps", 1, "--seed", 5, n=2)
    assert refused.wait() == [2, 2] and "Traceback" not in refused.stderr, refused.stderr
    assert refused.lines()[-1].endswith("(seed 0 there, 5 here); give the same, another --out or --resume never")


def test_weights_optimizer_and_scale_of_the_loss_are_all_restored(tmp_path):
    """And the encoder says how many epochs it has seen, of which each shows its images twice."""
    words = ["--method", "mae", "--out", str(tmp_path), *SMALL, *OWN["mae"], "--precision", "fp16", "--repeat", "2"]
    args, config, Method = options(words)
    for step in (3, 0):
        args.seed = step  # other weights at the start
        method, optimizer, scaler = build(args, config, Method, torch.device("cpu"))
        args.seed = 0
        ours = run_directory.Run(args, config, 32, method=method, optimizer=optimizer, scaler=scaler)
        ours.open()
        if step:
            sum(p.sum() for p in method.parameters() if p.requires_grad).backward()
            optimizer.step()
            scaler.load_state_dict(scaler.state_dict() | dict(scale=8.0))
            ours.save(step)
            expected = [part.state_dict() for part in (method, optimizer, scaler)]
            ours.lock_file.close()
    assert ours.step == 3 and scaler.get_scale() == 8
    assert_same_bits([part.state_dict() for part in (method, optimizer, scaler)], expected)
    assert "mae on shapes, 0.75 epochs, seed 0" in files.load(tmp_path / "encoder.safetensors")["made_by"]


def test_only_where_and_how_a_run_goes_on_may_differ_from_how_it_began():
    """Nothing that its images, their order, its weights or its steps depend on."""
    where = {"out", "resume", "data_root", "download", "workers", "device", "compile", "linear"}
    told = {"save_every", "log_every", "probe_every", "log_gradients", "tensorboard", "evaluate"}
    assert where | told == run_directory.FREE


def test_the_commit_is_that_of_the_program_and_only_code_makes_it_dirty(tmp_path, monkeypatch):
    place = tmp_path / "program"
    (place / "runtime").mkdir(parents=True)
    monkeypatch.setattr(run_directory, "__file__", str(place / "runtime/run_directory.py"))
    assert run_directory.git_state() == {}

    def git(*words):
        me = ["-c", "user.name=me", "-c", "user.email=me@here"]
        return subprocess.run(["git", "-C", place, *me, *words], check=True, capture_output=True, text=True).stdout

    git("init")
    for name in ("train.py", "README.md"):
        (place / name).write_text("one")
    git("add", "-A"), git("commit", "-m", "first")
    clean = dict(commit=git("rev-parse", "HEAD").strip(), dirty=False)
    monkeypatch.chdir(tmp_path)
    assert run_directory.git_state() == clean
    (place / "README.md").write_text("two")
    assert run_directory.git_state() == clean
    (place / "train.py").write_text("two")
    assert run_directory.git_state() == clean | dict(dirty=True)


def test_a_setting_that_an_older_version_lacks_differs_only_if_it_is_on():
    theirs = dict(seed=0, tau=1.0)
    for off in (0, 0.0, False, "", None, []):
        assert files.differences(theirs, theirs | dict(new=off)) == ""
    assert files.differences(theirs, theirs | dict(new=2.0)) == "new None there, 2.0 here"
    assert files.differences(theirs, dict(seed=5, tau=1.0)) == "seed 0 there, 5 here"
    assert files.differences(theirs, dict(seed=0, tau=0.0)) == "tau 1.0 there, 0.0 here"
    assert files.differences(theirs, dict(seed=5, tau=1.0), {"seed"}) == ""


# ------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_in_the_final_evaluation_ends_it_at_once(start, tmp_path, number, status):
    script = f"""
plain = train.evaluate
def interrupted(*words, **more):
    os.kill(os.getpid(), {int(number)})
    return plain(*words, **more)
train.evaluate = interrupted
"""
    program = start("--max-steps", 1, "--evaluate", before=script)
    assert program.wait() == [status] and "Traceback" not in program.stderr, program.stderr
    assert "accuracy" not in program.stderr and state(tmp_path / "run")["step"] == 1
    assert "accuracy" in assert_fine(start("--max-steps", 1, "--evaluate"))


@pytest.mark.parametrize("n", [1, 2])
def test_a_signal_after_the_last_step_has_asked_for_one_is_not_lost(start, tmp_path, n):
    """It comes, to the last rank, while the first one saves. Rank 0 too must know of it before it evaluates."""
    script = f"""
plain = train.Run.save
def save(self, step):
    plain(self, step)
    if os.environ.get("RANK", "0") == "{n - 1}":
        os.kill(os.getpid(), signal.SIGTERM)
train.Run.save = save
"""
    program = start("--max-steps", 1, "--evaluate", n=n, before=script)
    assert program.wait() == [128 + signal.SIGTERM] * n, program.stderr
    assert "stopped at step 1 of 1" in program.stderr and "accuracy" not in program.stderr
    assert "accuracy" in assert_fine(start("--max-steps", 1, "--evaluate", n=n))


@pytest.mark.parametrize("parts", [1, 3, 4, 10, 16])
def test_several_ranks_ask_each_other_after_every_tenth_batch(monkeypatch, parts):
    """Of a step of many batches after each; what another rank has received is then known to all."""
    ours, asked = run_directory.Run.__new__(run_directory.Run), []
    ours.signal, ours.stopped_by, ours.control, ours.args = 0, 0, "group", SimpleNamespace(accumulate=parts)
    monkeypatch.setattr(
        run_directory.dist, "all_reduce", lambda x, *_, group: asked.append(step) or x.fill_(signal.SIGTERM)
    )
    for step in range(1, 31):
        assert ours.asked_to_stop(step) == bool(asked)
    whole_tens = [step for step in range(1, 31) if step * parts // 10 > (step - 1) * parts // 10]
    assert asked == whole_tens and ours.stopped_by == signal.SIGTERM
    step = 0  # when the loop is left
    ours.asked_to_stop(step)
    assert asked[-1] == 0


def test_the_others_wait_for_the_checkpoint_where_no_gpu_counts_the_minutes(start):
    """Rank 0 takes long to write it. No rank leaves `save` before it is there."""
    script = """
plain, save = run_directory.files.save, train.Run.save
def slowly(*words):
    time.sleep(1)
    plain(*words)
def saved(self, step):
    save(self, step)
    print("found", (self.directory / "encoder.safetensors").exists(), file=sys.stderr)
run_directory.files.save, train.Run.save = slowly, saved
"""
    program = start("--max-steps", 1, n=2, before="import sys, time\nfrom runtime import run_directory\n" + script)
    assert assert_fine(program).count("found True") == 2


def test_handlers_do_not_outlive_the_loop(tmp_path):
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    ours = run_directory.Run.__new__(run_directory.Run)
    ours.signal, ours.stopped_by, ours.control, ours.args = 0, 0, None, SimpleNamespace(accumulate=1)
    with ours.listening():
        assert [signal.getsignal(number) for number in numbers] != before
        assert not ours.asked_to_stop(1)
        signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # a second one acts at once
        assert ours.asked_to_stop(1) and ours.stopped_by == signal.SIGTERM
    assert [signal.getsignal(number) for number in numbers] == before
    with pytest.raises(ZeroDivisionError), ours.listening():
        _ = 1 / 0
    assert [signal.getsignal(number) for number in numbers] == before
