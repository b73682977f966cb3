"""Shared by all tests: hypothesis profiles, and one thread, so that two workers do not fight over two cores."""

import os

import torch
from hypothesis import HealthCheck, settings

settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("default"), derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "default")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
