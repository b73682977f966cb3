"""runtime/fast_paths.py: the choice by measurement; test_common.py has that a fast way equals its plain expression."""

import time

import pytest
import torch
import torch.nn.functional as F

from runtime import fast_paths, process


@pytest.fixture
def times(monkeypatch):
    """times(product=…, convolution=…, bf16=…) → what is then measured to be the fastest, or `way` where given."""

    def choose(way="", **seconds):
        monkeypatch.setattr(fast_paths, "seconds", lambda: seconds)
        monkeypatch.setenv("MINMIM_LINEAR", way)
        return fast_paths.measured.__wrapped__()

    return choose


def test_the_faster_precision_is_taken_and_a_convolution_where_it_is_clearly_faster(times):
    assert times(product=2.0, convolution=1.0, bf16=0.5) == dict(precision="bf16", linear="convolution")
    assert times(product=2.0, convolution=1.0, bf16=1.5) == dict(precision="fp32", linear="convolution")
    assert times(product=1.0, convolution=0.82, bf16=1.5) == dict(precision="fp32", linear="convolution")
    assert times(product=1.0, convolution=0.85, bf16=1.5) == dict(precision="fp32", linear="product")
    assert times(product=1.0, convolution=0.9, bf16=0.95) == dict(precision="bf16", linear="product")
    assert times(product=1.0) == dict(precision="fp32", linear="product")  # a torch without oneDNN


def test_a_way_that_is_named_is_taken_where_there_is_one(times):
    assert times("product", product=2.0, convolution=1.0, bf16=1.5) == dict(precision="bf16", linear="product")
    assert times("convolution", product=1.0, convolution=2.0, bf16=1.5) == dict(precision="bf16", linear="convolution")
    assert times("convolution", product=1.0)["linear"] == times("bf16", product=1.0, bf16=2.0)["linear"] == "product"


def test_each_way_is_measured_as_it_would_run(monkeypatch):
    """The convolution as one, bf16 under autocast; thread count and way are afterwards what they were."""
    taken, linear, conv2d = [], F.linear, F.conv2d
    monkeypatch.setattr(F, "linear", lambda *a: taken.append(torch.is_autocast_enabled("cpu")) or linear(*a))
    monkeypatch.setattr(F, "conv2d", lambda *a: taken.append("convolution") or conv2d(*a))
    monkeypatch.setattr(fast_paths, "multiplies_bf16", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(fast_paths, "as_convolution", True)
    threads = torch.get_num_threads()
    found = fast_paths.seconds()
    assert taken == [False, "convolution", True] * 3 and list(found) == ["product", "convolution", "bf16"]
    assert all(0 < t < 60 for t in found.values())
    assert fast_paths.as_convolution and torch.get_num_threads() == threads


def test_a_torch_without_onednn_has_one_way(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    assert list(fast_paths.seconds()) == ["product"]


def test_a_machine_is_measured_once_and_a_gpu_not_at_all(monkeypatch):
    calls = []
    monkeypatch.delenv("MINMIM_LINEAR")
    monkeypatch.setattr(fast_paths, "seconds", lambda: calls.append(time.time()) or dict(product=2.0, convolution=1.0))
    monkeypatch.setattr(fast_paths, "as_convolution", False)
    fast_paths.measured.cache_clear()
    try:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
        assert process.start("cuda").type == "cuda" and not calls and not fast_paths.as_convolution
        for _ in range(2):
            process.start("cpu")
        assert len(calls) == 1 and fast_paths.as_convolution
    finally:
        fast_paths.measured.cache_clear()


def test_what_is_written_down_is_the_same_tensor():
    x = torch.randn(3, 4, requires_grad=True)
    y = fast_paths.written(x.T)
    assert y.is_contiguous() and torch.equal(y, x.T)
    (y * torch.arange(12.0).view(4, 3)).sum().backward()
    assert torch.equal(x.grad, torch.arange(12.0).view(4, 3).T)


def test_uploading_to_the_cpu_is_no_copy():
    x = torch.randn(3)
    assert fast_paths.upload(x, torch.device("cpu")) is x


def test_one_gpu_takes_a_pass_as_one_graph_unless_gradients_are_added_up_or_shared(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda network, mode: mode)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert fast_paths.compiled(None, cuda) == fast_paths.compiled(None, cuda, 1) == "reduce-overhead"
    assert fast_paths.compiled(None, cuda, 2) is None and fast_paths.compiled(None, cpu) is None
    monkeypatch.setattr(fast_paths, "world_size", lambda: 2)
    assert fast_paths.compiled(None, cuda) is None
