"""Programs of this project, started from a process that has imported everything: fifty take the time of five that
import torch.

What such a start cannot show, a program that does not import all it needs, is seen where a new Python starts it:
test_commands.py has one for each program.
"""

import functools
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAMS = ["train", "evaluate", "analyze", "transfer", "bench", "reproduce"]


@functools.cache
def server():
    """The processes' parent, which runs on one thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["forked", *PROGRAMS])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))  # to find what it shall import
        multiprocessing.forkserver.ensure_running()
    return context


def be(program: str, words: list[str], environment: dict, place: str, said: list[Path], before: str) -> None:
    """In a process of its own: what `python program words` would be, after the lines of `before`."""
    os.setpgrp()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(place)
    for descriptor, file in enumerate(said, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method(None, force=True)  # its own processes start as everybody's
    sys.argv = [program, *words]
    if before:  # which changes these modules, not what is run as a program
        import launch
        import train

        exec(before, dict(train=train, launch=launch, os=os, signal=signal))
        launch.command(train.main)
    else:
        runpy.run_path(program, run_name="__main__")


class Program:
    """`python program words`, or its `n` processes as torchrun would start them. Below are also Popen's names."""

    def __init__(self, program: str, *words, n: int = 1, env=os.environ, cwd: Path = ROOT, before: str = ""):
        self.args = [str(ROOT / program), *map(str, words)]
        self.place = tempfile.TemporaryDirectory()
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        many = dict(WORLD_SIZE=n, LOCAL_WORLD_SIZE=n, MASTER_ADDR="127.0.0.1", MASTER_PORT=port) if n > 1 else {}
        self.processes, self.said = [], []
        for r in range(n):
            rank = dict(RANK=r, LOCAL_RANK=r) if n > 1 else {}
            environment = {name: str(value) for name, value in (env | many | rank).items()}
            self.said.append([Path(self.place.name) / f"{name}-{r}" for name in ("stdout", "stderr")])
            arguments = self.args[0], self.args[1:], environment, str(cwd), self.said[r], before
            self.processes.append(server().Process(target=be, args=arguments))
            self.processes[r].start()

    def wait(self, seconds: float = 120) -> list[int]:
        """All exit statuses, once all have ended."""
        end = time.time() + seconds
        for process in self.processes:
            process.join(max(0.1, end - time.time()))
        if any(process.is_alive() for process in self.processes):
            self.kill()
            raise subprocess.TimeoutExpired(self.args, seconds, stderr=self.stderr)
        return [process.exitcode for process in self.processes]

    def read(self, descriptor: int) -> str:
        files = [said[descriptor - 1] for said in self.said]
        return "".join(file.read_text() for file in files if file.exists())

    @property
    def stderr(self) -> str:
        """What they have said so far."""
        return self.read(2)

    def lines(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.strip()]

    @property
    def returncode(self) -> int | None:
        """The first that is not 0."""
        return next((process.exitcode for process in self.processes if process.exitcode != 0), 0)

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        self.wait(timeout)
        return self.read(1), self.read(2)

    def send_signal(self, number: int) -> None:
        for process in self.processes:
            os.kill(process.pid, number)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def run(*words, timeout: float = 300, **where) -> subprocess.CompletedProcess:
    """As subprocess.run does."""
    program = Program(*words, **where)
    out, err = program.communicate(timeout)
    return subprocess.CompletedProcess(program.args, program.returncode, out, err)
