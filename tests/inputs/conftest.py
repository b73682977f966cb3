"""Every test of inputs has a cache folder of its own, which is not there yet."""

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("home") / "cache"
    monkeypatch.setenv("MINMIM_CACHE", str(folder))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return folder
