"""A copy of the code, for tests that change it."""

import shutil

import pytest

from reporting import HERE, experiments, result_files


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder that has a copy of this repository's code."""
    place = tmp_path / "checkout"
    for folder in ("", "inputs", "runtime", "downstream", "figures", "reporting"):
        (place / folder).mkdir()
        for file in (HERE / folder).glob("*.py"):
            shutil.copy(file, place / folder)
    monkeypatch.setattr(result_files, "HERE", place)
    monkeypatch.setattr(experiments, "HERE", place)
    return place
