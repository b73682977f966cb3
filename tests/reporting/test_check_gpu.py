"""reporting/check_gpu.py: what fits, what is done again, what a cut leaves, how waiting is measured; on a CPU."""

import json
import os
import sys
import time

import pytest

from methods import METHODS
from reporting import check_gpu, documents, whole_run_speed
from runtime.errors import InputError
from runtime.log import Meter


def options(out, more=""):
    return check_gpu.options(f"--out {out} --device cpu --rehearse {more}".split())


def done(**results):
    return dict(steps={name.replace("_", "-"): dict(state="ok", result=r) for name, r in results.items()})


def test_a_step_is_begun_where_there_is_time_for_it_and_what_is_done_takes_none(tmp_path, monkeypatch, capsys):
    begun, session = (
        [],
        check_gpu.Session(options(tmp_path, "--minutes 1 --only others data knn-mae knn-cmae linear-mae")),
    )
    session.found |= done(knn_mae={}, data=dict(train=9), learn_cmae=dict(said="done"))
    monkeypatch.setattr(check_gpu.Session, "do", lambda self, step: begun.append(step.name))
    session.run()
    assert begun == ["knn-cmae"]  # no room for `others`, no encoder for linear-mae
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert said.keys() == {"others", "knn-cmae", "linear-mae"} and said["others"] == "140 s: no room for it"
    assert said["knn-cmae"].endswith(" s")


def test_two_trainings_share_what_is_left_and_keep_their_lengths(tmp_path):
    found = done(data=dict(train=50_000), epochs_mae=dict(seconds=4), epochs_cmae=dict(seconds=8))
    check_gpu.share_out(found, 2 * (200 + check_gpu.START + sum(check_gpu.PROBES.values())))
    assert found["epochs"] == dict(mae=90, cmae=45)  # 90 % of 200 seconds by 2 and 4 seconds an epoch
    check_gpu.share_out(found, 9999)
    assert found["epochs"] == dict(mae=90, cmae=45)
    args = check_gpu.options(f"--out {tmp_path} --device cpu".split())
    steps = {step.name: step for step in check_gpu.plan(args, found)}
    assert steps["learn-mae"].seconds == steps["learn-cmae"].seconds == check_gpu.START + 180
    assert list(steps) == check_gpu.STEPS and "--epochs 90 --warmup-epochs 10" in steps["learn-mae"].command
    found["steps"]["learn-mae"] = dict(state="cut")  # goes on in any time
    again = {step.name: step for step in check_gpu.plan(args, found)}["learn-mae"]
    assert again.seconds == check_gpu.START and again.limit == steps["learn-mae"].limit > steps["learn-mae"].seconds
    slow = done(data=dict(train=50_000), epochs_mae=dict(seconds=4))
    check_gpu.share_out(slow, 9999)
    assert "epochs" not in slow


def test_a_call_ends_at_its_limit_with_all_that_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(check_gpu, "GRACE", 1)
    child = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    begin = time.monotonic()
    state = check_gpu.call(f'-c "{child}"', 2, tmp_path / "log", tmp_path)
    assert state == "cut" and time.monotonic() - begin < 30
    pid = int((tmp_path / "log").read_text())
    for _ in range(100):  # until whoever inherits it has noticed
        if not os.path.exists(f"/proc/{pid}") or "zombie" in open(f"/proc/{pid}/status").read():
            break
        time.sleep(0.1)
    else:
        pytest.fail("what the step had started goes on")
    assert check_gpu.call('-c "raise SystemExit(3)"', 60, tmp_path / "log", tmp_path) == "failed"
    assert check_gpu.call('-c "print(1)"', 60, tmp_path / "log", tmp_path) == "ok"


def test_a_result_is_a_file_or_the_last_line(tmp_path):
    log, report = tmp_path / "log", tmp_path / "report"
    log.write_text('bar 10%\r{"top1": 5}\n\n')
    assert check_gpu.harvest(log, report) == dict(top1=5)
    log.write_text("...\n3 failed, 4 passed\n")
    assert check_gpu.harvest(log, report) == dict(said="3 failed, 4 passed")
    report.write_text('{"rows": []}')
    assert check_gpu.harvest(log, report) == dict(rows=[])


def test_a_step_waits_as_long_as_its_draws_take(tmp_path, monkeypatch):
    """Draws that sleep three times as long as the rest of a step takes are three quarters of it, on any machine; of the
    epochs, the second is measured.
    """
    plain, drawn = METHODS["mae"].draw, [time.perf_counter()]

    def slow(*given):
        time.sleep(min(5, max(0.05, 3 * (time.perf_counter() - drawn[0]))))
        batch = plain(*given)
        drawn[0] = time.perf_counter()
        return batch

    monkeypatch.setattr(METHODS["mae"], "draw", slow)
    monkeypatch.setattr(Meter, "update", Meter.update)
    monkeypatch.setattr(sys, "argv", sys.argv)
    words = (
        f"--method mae --data shapes {check_gpu.TINY} --images 64 --batch-size 8 --epochs 18 --device cpu --no-evaluate"
    )
    found = whole_run_speed.watch(
        8, [*words.split(), "--precision", "fp32", "--log-every", "8", "--out", str(tmp_path)]
    )
    assert found["waits"] > 60 and found["seconds"] > 0.05 / 8 * 100_000


def test_figures_stand_beside_their_aims_in_the_document(tmp_path):
    rows = [
        dict(name=n, batch=2, share=50.0, by_hf=by) for n, by in {"mae, compiled": 1.5, "hf, compiled": 1.2}.items()
    ]
    report = dict(
        device="A card", threads=1, versions=dict(torch="2.11"), git={}, command="python b --json F", rows=rows
    )
    found = done(fast=report, epochs_mae=dict(seconds=3.5, waits=4.0), knn_mae=dict(top1=20.0))
    found["steps"]["right"] = dict(state="failed", result=dict(said="1 failed, 9 passed in 3.00s"))
    found |= dict(device="A card", versions=dict(torch="2.11"), git=dict(commit="0123456789"), epochs=dict(mae=7))
    figures = {row[0]: row[1:] for row in documents.figures(found)}
    assert figures == {
        "tests that use the GPU": ["1 failed, 9 passed", "all pass", "no"],
        "mae, compiled: times as fast as ViTMAE": ["1.5", "≥ 2", "no"],
        "mae, compiled: share of the matrix rate": ["50 %", "≥ 45 %", "yes"],
        "mae: epoch of 100,000 images, ViT-S/8": ["3.5 s", "≤ 4 s", "yes"],
        "mae: a step waits for images and draws": ["4 %", "≤ 3 %", "no"],
        "knn-mae after 7 epochs": ["20.0 %", "", ""],
    }
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu/card-a.json").write_text(json.dumps(found))
    text = documents.speed_block(tmp_path)
    assert "### A card" in text and "| knn-mae after 7 epochs | 20.0 % |" in text
    assert "A card, 1 threads, torch 2.11, commit [0123456](../results/gpu/card-a.json)\n\n    python b\n" in text
    found["steps"]["fast"]["state"] = "cut"
    assert "mae, compiled: share of the matrix rate" not in str(list(documents.figures(found)))


def test_without_a_gpu_only_a_rehearsal_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(check_gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no GPU found; rehearse"):
        check_gpu.options(["--out", str(tmp_path)])


@pytest.mark.slow
def test_a_rehearsal_does_everything_and_goes_on_where_it_was_cut(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # its steps have limits, and cores that other tests share

    def run(more="--minutes 14"):
        monkeypatch.setattr(sys, "argv", f"check_gpu --out {tmp_path} --device cpu --rehearse {more}".split())
        check_gpu.main()
        return json.loads((tmp_path / "results.json").read_text()), capsys.readouterr().out

    found, printed = run()
    states = {name: record["state"] for name, record in found["steps"].items()}
    assert states == dict.fromkeys(check_gpu.STEPS, "ok"), (tmp_path / "log.txt").read_text()
    assert [row["name"] for row in check_gpu.result(found, "fast")["rows"]][:2] == ["mae", "cmae"]
    assert (
        check_gpu.result(found, "epochs-mae")["seconds"] > 0 and 0 < check_gpu.result(found, "knn-cmae")["top1"] <= 100
    )
    assert str(tmp_path) not in (tmp_path / "results.json").read_text()
    assert len(printed.splitlines()) < 60 and max(map(len, printed.splitlines())) <= 80
    again, printed = run("--only knn-mae data")
    assert again == found and "after" not in printed.split("torch")[0]
    found["steps"]["data"]["state"] = "cut"
    (tmp_path / "results.json").write_text(json.dumps(found))
    again, printed = run("--minutes 0.3")  # too short for it
    assert again["steps"]["data"]["state"] == "cut" and "data             30 s: no room for it" in printed
    again, printed = run()
    assert again["steps"]["data"]["state"] == "ok" and printed.count(" after ") - printed.count(" epochs") == 1
    assert {name: r for name, r in again["steps"].items() if name != "data"} == {
        name: r for name, r in found["steps"].items() if name != "data"
    }
