"""Many processes, and processes that die: the same result for any number of them, and nothing lost or half-written."""

import json
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from forked_programs import ROOT, SMOOTH, Program, finish, popen, rewrite, server
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_train import (  # noqa: F401  (`environment` is a fixture)
    OWN,
    SMALL,
    TORCHRUN,
    assert_same_bits,
    environment,
    log,
    needs_compiler,
    own,
    state,
    wait_for_lines,
)

from methods import METHODS
from runtime import files, randomness
from runtime.errors import InputError


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """82 + 21 images, which no batch and no number of processes here divides."""
    root, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, n in (("train", 41), ("val", 10)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(n + (split == "val" and name == "cat")):
                coarse = Image.fromarray(draw.integers(0, 256, (5, 5, 3), dtype=np.uint8))
                coarse.resize((40, 40), Image.Resampling.BICUBIC).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture
def ranks(photos, environment, tmp_path):  # noqa: F811
    """ranks("--flag", …, method=…, n=4, out="run") → the program, started."""

    begun = []

    def begin(*flags, method="mae", n=1, out="run", before="", **more):
        words = ["--method", method, "--data", photos, "--out", tmp_path / out, *SMALL, *own(method, *flags)]
        begun.append(Program("train.py", *words, n=n, env=environment | more, cwd=tmp_path, before=before))
        return begun[-1]

    yield begin
    for program in begun:
        program.kill()


def assert_fine(run: Program):
    assert run.wait() == [0] * len(run.processes), run.stderr


# --------------------------------------------------------------------------------------------- numbers of processes


def assert_alike(one: Path, other: Path, loss: float, weights: float):
    ours, theirs = ([row["loss"] for row in log(place)[1:]] for place in (one, other))
    assert len(ours) == 20 and ours == pytest.approx(theirs, rel=loss)
    a, b = state(one), state(other)
    assert a["step"] == b["step"] == 20
    for name in a["method"]:
        torch.testing.assert_close(
            b["method"][name], a["method"][name], atol=weights, rtol=weights, msg=lambda m, n=name: f"{n}: {m}"
        )


# Three steps an epoch, of 24 images; ten images of each epoch are left over. At this rate rounding is not blown up.
# Drop path is the one stated exception.
TWENTY = ["--max-steps", 20, "--epochs", 20, "--batch-size", 24, "--lr", 1e-4, "--drop-path", 0, "--save-every", 20]


@pytest.mark.training
@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_one_and_four_processes_end_alike(ranks, tmp_path, method):
    """Twenty steps in two accumulated parts; test_train.py has two processes, without."""
    # CAE's tokens are argmaxes, and one that is nearly a tie may fall to either side in a batch of another size.
    flags = [*TWENTY, "--accumulate", 2, *(["--target", "pixels"] if method == "cae" else [])]
    for n in (1, 4):
        assert_fine(ranks(*flags, method=method, n=n, out=str(n), before=SMOOTH))
    assert_alike(tmp_path / "1", tmp_path / "4", 3e-5, 3e-5)


@pytest.mark.training
@pytest.mark.slow
@pytest.mark.parametrize("method, loss", [(m, 0.15 if m.startswith("cmae") else 0.03) for m in METHODS])
def test_one_two_and_four_processes_end_nearly_alike_in_bf16(ranks, tmp_path, method, loss):
    """bf16 keeps 8 bits: sums in another order differ by 2⁻⁸ or so, losses by less than 1 %, InfoNCE by 1/τ times that.

    Adam's steps have the length of the rate, 20 of them 0.002: weights whose gradient is noise differ by as much.
    """
    flags = [*TWENTY, "--precision", "bf16", *(["--target", "pixels"] if method == "cae" else [])]
    for n in (1, 2, 4):
        assert_fine(ranks(*flags, method=method, n=n, out=str(n), before=SMOOTH))
    for n in ("2", "4"):
        assert_alike(tmp_path / "1", tmp_path / n, loss, 2e-3)


# Graphs are cut and gradients exchanged alike whoever writes the code of a graph: Inductor does it once, for CMAE.
NO_CODE = "import torch, functools; torch.compile = functools.partial(torch.compile, backend='aot_eager')"


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("method, before", [("cmae", ""), ("conmim", NO_CODE)], ids=["cmae", "conmim"])
def test_compiled_processes_end_as_plain_ones(ranks, tmp_path, method, before):
    """GPUs compile unless told not to: two processes, in two parts, with keys and batch norm gathered over both."""
    flags = ["--max-steps", 5, "--batch-size", 24, "--accumulate", 2, "--lr", 1e-4, "--drop-path", 0, "--depth", 1]
    for how in ("compile", "no-compile"):
        run = ranks(*flags, f"--{how}", method=method, n=2, out=how, before=before)
        assert run.wait(600) == [0, 0], run.stderr  # compiling takes a minute, and more on a busy machine
    ours, theirs = ([row["loss"] for row in log(tmp_path / how)[1:]] for how in ("compile", "no-compile"))
    assert len(ours) == 5 and ours == pytest.approx(theirs, rel=3e-5)
    a, b = (state(tmp_path / how)["method"] for how in ("compile", "no-compile"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=3e-5, rtol=3e-5, msg=lambda m, n=name: f"{n}: {m}")


@given(st.integers(1, 4096), st.integers(1, 64), st.integers(1, 9))
def test_the_rows_of_ranks_and_parts_make_up_the_batch(batch_size, ranks, accumulate):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(randomness, "world_size", lambda: ranks)
        if batch_size % (ranks * accumulate):
            with pytest.raises(InputError, match=f"batch size {batch_size}: cannot be shared by {ranks} processes"):
                randomness.rows_of_rank(batch_size, accumulate)
            return
        rows = []
        for rank in range(ranks):
            patch.setattr(randomness, "rank", lambda rank=rank: rank)
            rows += [i for part in randomness.rows_of_rank(batch_size, accumulate) for i in range(batch_size)[part]]
        assert sorted(rows) == list(range(batch_size))


# -------------------------------------------------------------------------------------------------- processes that die


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_killed_at_random_moments_and_resumed_ends_with_the_same_bits(ranks, tmp_path, method):
    """Ten moments (three for the others) of loading, training and saving; the run gets on each time."""
    kills, flags = 10 if method in ("mae", "cmae") else 3, ["--epochs", 20, "--drop-path", 0.2, "--clip-grad", 1]
    assert_fine(ranks(*flags, method=method, out="whole"))
    draw, place, first = random.Random(0), tmp_path / "run", 0.0

    def logged() -> int:
        return (place / "log.jsonl").read_bytes().count(b"\n") if (place / "log.jsonl").exists() else 0

    for _ in range(kills):
        begin, enough = time.time(), logged() + 100 // (kills + 3)  # lest it be done before
        run = ranks(*flags, method=method)
        while not (place / "checkpoint.pt").exists():  # the first time
            assert run.processes[0].is_alive(), run.stderr
            time.sleep(0.01)
        first = first or time.time() - begin
        moment = time.time() + first * draw.uniform(0, 1.5)
        while time.time() < moment and logged() < enough:
            time.sleep(0.002)
        run.processes[0].kill()
        run.processes[0].join()
        assert run.processes[0].exitcode == -signal.SIGKILL  # it was on its way
    assert 0 < state(place)["step"] < 100
    assert_fine(ranks(*flags, method=method))
    assert_same_bits(state(place), state(tmp_path / "whole"))
    ours, theirs = ([(row["step"], row["loss"]) for row in log(each)[1:]] for each in (place, tmp_path / "whole"))
    assert ours == theirs


# The second checkpoint is being written, and half of it is on the disk, when the process is killed.
HALF = """
import io, torch
save, saved = torch.save, []
def half(tree, file):
    saved.append(str(file.name))
    if sum("/.checkpoint.pt" in name for name in saved) < 2:
        return save(tree, file)
    content = io.BytesIO()
    save(tree, content)
    file.write(content.getvalue()[: len(content.getvalue()) // 2])
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = half
"""
# It is whole and on the disk, but has not got its name yet.
UNNAMED = """
replace, named = os.replace, []
def late(old, new):
    named.append(str(new))
    if sum(name.endswith("/checkpoint.pt") for name in named) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(old, new)
os.replace = late
"""
# It has its name, but encoder.safetensors is not there yet.
NAMED = """
replace, named = os.replace, []
def early(old, new):
    replace(old, new)
    named.append(str(new))
    if sum(name.endswith("/checkpoint.pt") for name in named) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = early
"""


def test_killed_while_a_checkpoint_is_written_the_one_before_is_whole(ranks, tmp_path):
    """And the same command ends with the bits of a run that was not killed, leaving nothing half-written."""
    whole = ranks("--epochs", 4, out="whole")
    for name, before, step in (("half", HALF, 5), ("unnamed", UNNAMED, 5), ("named", NAMED, 10)):
        run = ranks("--epochs", 4, out=name, before=before)
        assert run.wait() == [-signal.SIGKILL], run.stderr
        left = [path for path in (tmp_path / name).iterdir() if path.name.endswith(".tmp")]
        assert state(tmp_path / name)["step"] == step and len(left) == (name != "named")
    assert_fine(whole)
    for name in ("half", "unnamed", "named"):
        assert_fine(ranks("--epochs", 4, out=name))
        assert_same_bits(state(tmp_path / name), state(tmp_path / "whole"))
        assert not [path for path in (tmp_path / name).iterdir() if path.name.endswith(".tmp")]
        encoders = [files.load(tmp_path / place / "encoder.safetensors")["state_dict"] for place in (name, "whole")]
        assert_same_bits(*encoders)


def test_sigterm_to_one_of_four_processes_saves_and_ends_all(ranks, tmp_path):
    """A cluster may tell only one of them. All finish the same step; the same command then ends with the same bits."""
    flags = ["--epochs", 20, "--save-every", 20]
    assert_fine(ranks(*flags, n=4, out="whole"))
    run = ranks(*flags, n=4)
    wait_for_lines(run, tmp_path / "run", 7)
    os.kill(run.processes[2].pid, signal.SIGTERM)
    assert run.wait() == [128 + signal.SIGTERM] * 4, run.stderr
    step = state(tmp_path / "run")["step"]
    assert step in range(10, 100, 10) and f"stopped at step {step} of 100" in run.stderr, run.stderr
    assert "Traceback" not in run.stderr
    assert_fine(ranks(*flags, n=4))
    assert_same_bits(state(tmp_path / "run"), state(tmp_path / "whole"))


# Rank 1 dies after step 12 of the first attempt: two steps after the second checkpoint.
DIES = """
import os, signal, sys
sys.path[:0] = [{root!r}]
import train
from runtime import process
plain = train.Meter.update
def update(self, step, *arguments, **names):
    plain(self, step, *arguments, **names)
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and step == 12:
        os.kill(os.getpid(), signal.SIGKILL)
train.Meter.update = update
process.command(train.main)
"""


@pytest.mark.slow
def test_a_worker_that_is_killed_is_started_again_and_the_weights_are_right(ranks, photos, tmp_path, environment):  # noqa: F811
    """torchrun --max-restarts: the processes start over, the run does not."""
    (tmp_path / "train.py").write_text(DIES.format(root=str(ROOT)))
    whole = ranks("--epochs", 4, n=2, out="whole")
    words = ["--method", "mae", "--data", photos, "--out", tmp_path / "run", *SMALL, *OWN["mae"], "--epochs", 4]
    done = finish(popen(*TORCHRUN.split(), "--max-restarts=1", tmp_path / "train.py", *words, env=environment))
    assert done.returncode == 0, done.stderr
    assert f"continuing {tmp_path / 'run'} from step 10" in done.stderr
    assert_fine(whole)
    assert_same_bits(state(tmp_path / "run"), state(tmp_path / "whole"))
    assert [row["step"] for row in log(tmp_path / "run")[1:]] == list(range(1, 21))  # none twice


def test_a_loss_that_is_not_finite_ends_all_processes_with_one_line(ranks, tmp_path):
    """Rank 1 alone meets it, but no rank may wait for another, or save."""
    spoil = """
import mae
plain, calls = mae.MAE.forward, []
def spoiled(self, batch):
    losses = plain(self, batch)
    calls.append(1)
    if len(calls) == 7 and os.environ["RANK"] == "1":
        losses["loss"] = losses["loss"] * float("nan")
    return losses
mae.MAE.forward = spoiled
"""
    run = ranks("--epochs", 4, n=2, before=spoil)
    assert run.wait() == [2, 2], run.stderr
    assert "loss: not finite at step 7; the last checkpoint is kept" in run.stderr and "Traceback" not in run.stderr
    assert state(tmp_path / "run")["step"] == 5


# -------------------------------------------------------------------------------------- what each machine finds fastest

# A stand-in for the measurement: rank 0 finds {0} and {1} the fastest, the other ranks the contrary. Each rank says
# what it then trains with.
FINDS = """
import sys
from runtime import fast_paths
ways = dict(precision=["fp32", "bf16"], linear=["product", "convolution"])
mine = dict(precision="{0}", linear="{1}")
first = os.environ.get("RANK", "0") == "0"
fast_paths.measured = lambda: {{key: next(w for w in both if (w == mine[key]) == first) for key, both in ways.items()}}
plain = train.loop
def loop(args, *others):
    print("trains in", args.precision, args.linear, fast_paths.as_convolution, file=sys.stderr, flush=True)
    plain(args, *others)
train.loop = loop
"""


@pytest.mark.parametrize("n, precision", [(1, "fp32"), (2, "fp32"), (2, "bf16")])
def test_a_run_goes_on_in_the_precision_that_the_machine_it_began_on_chose(ranks, tmp_path, n, precision):
    """Under auto rank 0 chooses for all; the run that is continued decides, whatever the next machine would choose."""
    other = "fp32" if precision == "bf16" else "bf16"
    here, there = FINDS.format(precision, "convolution"), FINDS.format(other, "product")
    length = ["--epochs", 40, "--save-every", 40]
    flags, trains = ["--precision", "auto", *length], f"trains in {precision} convolution True"
    assert_fine(ranks(*flags, n=n, out="whole", before=here))
    run = ranks(*flags, n=n, before=here)
    wait_for_lines(run, tmp_path / "run", 7)
    run.send_signal(signal.SIGTERM)
    assert run.wait() == [128 + signal.SIGTERM] * n and run.stderr.count(trains) == n, run.stderr
    refused = ranks(*length, "--precision", other, n=n, before=there)
    assert refused.wait()[0] == 2 and f"precision '{precision}' there, '{other}' here" in refused.stderr
    again = ranks(*flags, n=n, before=there)
    assert_fine(again)
    assert "continuing" in again.stderr and again.stderr.count(trains) == n
    assert_same_bits(state(tmp_path / "run"), state(tmp_path / "whole"))
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert (settings["precision"], settings["linear"]) == (precision, "convolution")
    (tmp_path / "run/checkpoint.pt").unlink()  # as if killed before the first: config.json has the choice
    before = ranks("--precision", "auto", "--max-steps", 1, n=n, before=there)
    assert_fine(before)
    assert before.stderr.count(trains) == n
    anew = ranks("--precision", "auto", "--epochs", 1, "--resume", "never", n=n, before=there)
    assert_fine(anew)
    assert anew.stderr.count(f"trains in {other} product False") == n


# ------------------------------------------------------------------------------------------------- places to write to


def test_of_two_runs_started_at_once_one_is_refused(ranks, tmp_path):
    """Both begin before there is a cache, a directory or a lock."""
    both = [ranks("--epochs", 2000, MINMIM_CACHE=tmp_path / "new") for _ in range(2)]
    end = time.time() + 100
    while all(run.processes[0].is_alive() for run in both):
        assert time.time() < end
        time.sleep(0.02)
    first, second = sorted(both, key=lambda run: not run.processes[0].is_alive())
    wait_for_lines(first, tmp_path / "run", 3)
    os.kill(first.processes[0].pid, signal.SIGTERM)
    assert second.wait() == [2] and first.wait() == [128 + signal.SIGTERM], first.stderr + second.stderr
    refusal = f"{tmp_path / 'run'}: another run is writing here; give another --out"
    assert [line for line in second.lines() if "decoding" not in line] == [refusal]
    steps = [row["step"] for row in log(tmp_path / "run")[1:]]
    assert steps == list(range(1, len(steps) + 1)) and state(tmp_path / "run")["step"] == len(steps)


@pytest.fixture
def read_only(tmp_path):
    """A directory that nobody may write to; root may write wherever permissions alone forbid it."""
    (tmp_path / "read-only").mkdir(mode=0o555)
    for place in (tmp_path / "read-only", Path("/sys"), Path("/proc")):
        if place.is_dir():
            try:
                with open(place / ".probe", "w"):
                    pass
                os.unlink(place / ".probe")
            except OSError as error:
                return place, error.strerror
    pytest.skip("every directory here can be written to")


@pytest.mark.parametrize("below", ["", "run"])
def test_a_read_only_place_is_refused(ranks, read_only, below):
    place, reason = read_only
    run = ranks("--max-steps", 1, out=place / below)
    assert run.wait() == [2], run.stderr
    (line,) = run.lines()
    assert line.startswith(f"{place / below}: cannot be written (") and line.endswith("); give another --out")
    assert below or reason in line


def test_a_disk_that_fills_up_under_a_run_keeps_its_checkpoint(ranks, tmp_path):
    """The first checkpoint fits; then no file may grow beyond a few kilobytes. The same command ends the run later."""
    full = """
import resource
plain = train.Run.save
def save(self, *arguments):
    plain(self, *arguments)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, resource.RLIM_INFINITY))
train.Run.save = save
"""
    assert_fine(ranks("--epochs", 3, "--save-every", 1, out="whole"))
    run = ranks("--epochs", 3, "--save-every", 1, before=full)
    assert run.wait() == [2], run.stderr
    assert "cannot be written (File too large)" in run.lines()[-1] and "Traceback" not in run.stderr
    assert state(tmp_path / "run")["step"] == 5
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.endswith(".tmp")]
    assert_fine(ranks("--epochs", 3, "--save-every", 1))
    assert_same_bits(state(tmp_path / "run"), state(tmp_path / "whole"))


def test_many_readers_see_only_whole_files(tmp_path):
    """A file that is replaced a hundred times is whole whenever somebody looks."""
    path = tmp_path / "x.json"
    files.write_text(path, json.dumps([0] * 5_000))
    writer = server().Process(target=rewrite, args=(str(path),), daemon=True)
    writer.start()
    seen = set()
    while writer.is_alive():
        numbers = json.loads(path.read_text())
        assert len(numbers) == 5_000 and len(set(numbers)) == 1
        seen.add(numbers[0])
    writer.join()
    assert writer.exitcode == 0 and json.loads(path.read_text())[0] == 100 and len(seen) > 1
    assert os.listdir(tmp_path) == ["x.json"]


def test_two_programs_may_write_one_file_at_once(tmp_path):
    """Each writes under a name of its own, so that what stands in the end is one of the two, whole."""
    writers = [server().Process(target=rewrite, args=(str(tmp_path / "x.json"),), daemon=True) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert set(json.loads((tmp_path / "x.json").read_text())) == {100} and os.listdir(tmp_path) == ["x.json"]
