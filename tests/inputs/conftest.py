"""Every test of inputs has a cache folder of its own, which is not there yet, and no line has been said before it."""

import pytest

from runtime.ranks import say_once


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("home") / "cache"
    monkeypatch.setenv("MINMIM_CACHE", str(folder))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    say_once.cache_clear()
    return folder
