"""A copy of the code, for tests that change it; the pages, and the steps that they show."""

import shutil

import pytest

from methods import METHODS
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


@pytest.fixture(scope="session")
def steps():
    """Method → its step as the pages run it, and the one of other sizes with nothing stopped."""
    from reporting.pages import traced_step

    return {name: (traced_step.run_step(name), traced_step.run_step(name, other=True)) for name in METHODS}


@pytest.fixture(scope="session")
def built(steps, tmp_path_factory):
    """The site, with one setting beside the paper's, for CMAE."""
    from reporting.pages import site, traced_step

    def run(name, changes=None, other=False, run_step=traced_step.run_step):
        return run_step(name, changes, other) if changes else steps[name][other]

    place = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site, "SWITCHES", {"cmae": site.SWITCHES["cmae"][:1]})
        patch.setattr(traced_step, "run_step", run)
        site.build(str(place), runs=str(place))
    return place
