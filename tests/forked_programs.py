"""Programs of this project, started from a process that has imported everything: fifty take the time of five that
import torch.

What such a start cannot show is how a program imports and how Python ends. test_train.py, by torchrun and without, and
test_commands.py have a new Python start each program at least once.
"""

import functools
import json
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
from unittest import mock

import seed_offset  # noqa: F401

ROOT = Path(__file__).parent.parent
# `before` of programs whose weights are compared: a rounding may switch a unit of ReLU on or off, and Adam makes whole
# steps of what follows.
SMOOTH = "import torch; torch.nn.functional.relu = torch.nn.functional.softplus"
PROGRAMS = ["train", "evaluate", "analyze", "transfer", "bench", "reproduce"]
FORKS = sys.platform == "linux"  # elsewhere each process imports for itself: a Mac's libraries do not bear a fork


@functools.cache
def server():
    """The processes' parent, on one thread. There is but one: conftest.py starts it before a test starts another."""
    context = multiprocessing.get_context("forkserver" if FORKS else "spawn")
    if FORKS:
        context.set_forkserver_preload(["forked_programs", *PROGRAMS])
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(sys.path)):
            multiprocessing.forkserver.ensure_running()
    return context


def be(program: str, words: list[str], environment: dict, place: str, said: list[str], before: str) -> None:
    """In a process of its own: what `python program words` would be, after the lines of `before`."""
    for descriptor, name in enumerate(said, 1):
        with open(name, "wb") as file:
            os.dup2(file.fileno(), descriptor)
    assert not FORKS or set(PROGRAMS) <= sys.modules.keys(), "the server could not import the programs"
    os.setpgrp()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(place)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method(None, force=True)  # its own processes start as everybody's
    sys.argv = [program, *words]
    if before:  # which changes these modules, not what is run as a program
        import train
        from runtime import files, process

        exec(before, dict(train=train, process=process, files=files, os=os, signal=signal))
        process.command(sys.modules[Path(program).stem].main)
    else:
        runpy.run_path(program, run_name="__main__")


class Program:
    """`python program words`, or its `n` processes as torchrun would start them.

    `args`, `returncode`, `poll`, `communicate`, `send_signal` and `kill` are as Popen's, so a test may have either.
    """

    def __init__(self, program: str, *words, env: dict, cwd: Path, n: int = 1, before: str = ""):
        self.args = [str(ROOT / program), *map(str, words)]
        self.place = tempfile.TemporaryDirectory()
        self.held = socket.socket()  # keeps its port from others; Linux lets rank 0 listen there all the same
        self.held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.held.bind(("127.0.0.1", 0))
        many = dict(WORLD_SIZE=n, LOCAL_WORLD_SIZE=n, MASTER_ADDR="127.0.0.1", MASTER_PORT=self.held.getsockname()[1])
        if n == 1 or not FORKS:
            self.held.close()
        self.processes, self.said = [], []
        for r in range(n):
            environment = env | (many | dict(RANK=r, LOCAL_RANK=r) if n > 1 else {})
            environment = {name: str(value) for name, value in environment.items()}
            self.said.append([f"{self.place.name}/{name}-{r}" for name in ("stdout", "stderr")])
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
            raise AssertionError(f"{self.args}: not done after {seconds} s:\n{self.stderr}")
        return [process.exitcode for process in self.processes]

    def read(self, descriptor: int) -> str:
        files = [Path(said[descriptor - 1]) for said in self.said]
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

    def poll(self) -> int | None:
        return None if any(process.is_alive() for process in self.processes) else self.returncode

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        self.wait(timeout)
        return self.read(1), self.read(2)

    def send_signal(self, number: int) -> None:
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def finish(started: Program | subprocess.Popen, timeout: float = 300) -> subprocess.CompletedProcess:
    """Of either, as subprocess.run gives it."""
    try:
        out, err = started.communicate(timeout=timeout)
    finally:
        started.kill()  # which does nothing to what has ended
    return subprocess.CompletedProcess(started.args, started.returncode, out, err)


def popen(*words, **where) -> subprocess.Popen:
    """A new Python."""
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *map(str, words)], stdout=pipe, stderr=pipe, text=True, **where)


def rewrite(path: str) -> None:
    """A hundred times."""
    from runtime import files

    for i in range(101):
        files.write_text(path, json.dumps([i] * 5_000))
