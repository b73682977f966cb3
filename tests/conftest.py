"""Shared by all tests: hypothesis profiles, and one thread for each worker of `pytest -n`: no fight for cores."""

import os
import sys

import seed_offset  # noqa: F401
import torch
from hypothesis import HealthCheck, settings

from runtime import fast_paths

settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("default"), derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "default")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the commands that tests start
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
# Else two runs of which the same bits are promised might measure differently, where both ways are about as fast.
os.environ.setdefault("MINMIM_LINEAR", fast_paths.measured()["linear"])


def pytest_configure(config):
    """Only `-m cuda` sees a GPU: commands that other tests start would take it, and they promise a CPU's bits."""
    if "cuda" not in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_finish(session):
    """Where Python 3.14 starts every process from one server, the first to start it says what it imports."""
    if "forked_programs" in sys.modules:
        sys.modules["forked_programs"].server()
