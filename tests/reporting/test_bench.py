"""bench.py: the same work for all contenders, counted FLOPs, medians in turns, tables of 80 columns, errors."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from torchvision.datasets.folder import default_loader

import bench
from reporting import step_speed, timing, whole_run_speed
from runtime import fast_paths
from runtime.errors import InputError

TINY = "--width 16 --depth 2 --heads 2 --decoder-width 8 --decoder-depth 1 --decoder-heads 1 --image-size 32"
CPU = torch.device("cpu")


def parse(more=""):
    return bench.parse(f"{TINY} --batch-size 2 --repeats 1 {more}".split())


def vit_flops(tokens, width, depth, hidden=4):
    """Forward: qkv, scores, weighted values, output, two layers of the MLP; two FLOPs a multiplication."""
    return depth * 2 * (tokens * width * width * (4 + 2 * hidden) + 2 * tokens * tokens * width)


@pytest.mark.parametrize("convolution", [True, False])
def test_counted_flops_of_mae_are_those_of_its_products(monkeypatch, convolution):
    monkeypatch.setattr(fast_paths, "as_convolution", convolution)  # a convolution's are counted like a product's
    B, N, V, D, W, P = 2, 16, 4, 16, 8, 192
    forward = vit_flops(1 + V, D, 2) + vit_flops(1 + N, W, 1)
    embed = 2 * V * P * D  # its backward multiplies for the kernel alone, pixels need no gradient
    rest = 2 * (1 + V) * D * W + 2 * (N - V) * W * P
    expected = B * (3 * (forward + rest) + 2 * embed)
    assert step_speed.flops(step_speed.stepper(parse(), "mae", B, "fp32", False, CPU)) == expected


@pytest.mark.parametrize("name", ["mae", "cmae", "hf", "lightly"])
def test_a_step_trains_its_contender(name, monkeypatch):
    if name in step_speed.PEERS:
        pytest.importorskip(step_speed.PEERS[name])
    seen, builder = [], step_speed.peer_loss if name in step_speed.PEERS else step_speed.our_loss

    def keep(*a):
        seen.append(builder(*a))
        return seen[-1]

    monkeypatch.setattr(step_speed, builder.__name__, keep)
    step = step_speed.stepper(parse(), name, 2, "fp32", False, CPU)
    module, loss_of = seen[0]
    before = loss_of(module).item()
    for _ in range(20):
        step()
    assert loss_of(module).item() < before
    assert all(p.grad is None for p in module.parameters())


def test_the_peer_has_our_sizes_target_and_share_of_masked_patches():
    # That both are then one function is test_mae::test_same_weights_and_mask_give_hugging_faces_numbers.
    pytest.importorskip("transformers")
    args = parse()
    ours, theirs = step_speed.build_method(args, "mae"), step_speed.peer_loss(args, "hf", 2, CPU)[0]
    trained = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (ours, theirs)]
    assert trained[0] == trained[1]
    assert theirs.config.norm_pix_loss and theirs.config.mask_ratio == ours.config.mask_ratio


def test_contenders_take_turns_and_medians_are_reported(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    costs = {"a": iter([9, 9, 1, 5, 2]), "b": iter([9, 9, 4, 4, 7])}  # the first two warm up

    def call(name):
        order.append(name)
        now[0] += next(costs[name])

    found = timing.interleave({n: lambda n=n: call(n) for n in costs}, 3, CPU)
    assert found == {"a": 2, "b": 4} and order[-6:] == ["a", "b"] * 3


def test_step_rows_share_ratios_and_costs(monkeypatch):
    pytest.importorskip("transformers")
    seconds = {("hf", False): 1.5, ("cmae", False): 2.0}
    monkeypatch.setattr(step_speed, "interleave", lambda calls, *_: dict.fromkeys(calls, 0.5) | seconds)
    args = parse("--method mae cmae --peer hf --precision fp32 --no-memory")
    mae, cmae, hf = step_speed.bench_step(args, CPU)
    assert mae["by_hf"] == 3 and cmae["by_hf"] == 0.75 and "by_hf" not in hf and mae["images_per_second"] == 4
    assert mae["cost"] == 1 and cmae["time_by_mae"] == 4
    assert cmae["cost"] == pytest.approx(4 * mae["gflop"] / cmae["gflop"])
    assert mae["share"] == pytest.approx(100 * mae["gflop"] * 1e9 / (2 * 2048**3))


@pytest.mark.slow
def test_memory_is_measured_beyond_the_imports_and_grows_with_the_batch():
    args = parse()
    small, large = (step_speed.measured_alone(args, [("mae", False)], B, "fp32", CPU) for B in (2, 512))
    (small,), (large,) = small.values(), large.values()
    assert large["megabytes"] - small["megabytes"] > 20  # the encoder alone keeps over 40 kB an image


def test_a_child_finds_in_torchs_cache_what_its_parent_has_compiled(tmp_path):
    file = tmp_path / "command.py"  # which holds torch, as bench.py does
    file.write_text("""import pickle, torch
from reporting import timing
def key(threads=1):
    return pickle.dumps(torch.contiguous_format)  # a part of the key
if __name__ == "__main__":
    assert timing.in_a_child(key) == key()
""")
    subprocess.run([sys.executable, file], env=os.environ | {"PYTHONPATH": str(bench.HERE)}, check=True, timeout=120)


def test_input_rows_and_the_torchvision_path(tmp_path, monkeypatch):
    files, args = whole_run_speed.picture_folder(tmp_path, 4, 32), parse()
    image = default_loader(files[0])
    assert whole_run_speed.torchvision_views(args, "mae")(image).shape == (3, 32, 32)
    views = whole_run_speed.torchvision_views(args, "cmae")(image)
    assert [v.shape for v in views] == [(3, 32, 32)] * 2 and not torch.equal(*views)
    seconds = {True: 4.0, False: 1.0}  # of calls that go image by image, and of the others
    sort = lambda calls, *_: {k: seconds[type(calls[k]()) is list] for k in calls}  # noqa: E731
    monkeypatch.setattr(whole_run_speed, "interleave", sort)
    *parts, mae, cmae = whole_run_speed.bench_input(parse("--method mae cae --peer torchvision --cpu-time"), CPU)
    assert [part["name"] for part in parts] == ["decode", "cache", "crop", "colour", "blur"]
    for part in parts:  # one batch, one image of it after the other at torchvision's; its cache has no peer
        assert part["images_per_second"] in (2, 2 / 4)
        assert (part["name"] == "cache") == ("by_torchvision" not in part)
    assert mae["images_per_second"] == 8 * 2 and mae["torchvision_images_per_second"] == 8 * 2 / 4
    assert mae["by_torchvision"] == 4 and "by_torchvision" not in cmae


def test_launches_are_kernels_and_copies_but_no_views_and_nothing_on_the_host():
    with step_speed.Launches(torch.device("meta")) as launches:
        x = torch.arange(6).to("meta")  # a copy
        (x.view(2, 3)[0] + 1).relu_()
        torch.arange(6).square()
    assert launches.count == 3 and launches.seconds > 0


def test_drawing_launches_as_much_for_any_number_of_images():
    args = bench.parse(f"{TINY} --batch-size 64 128 --repeats 2 --what host --method mae cmae".split())
    few, many, *cmae = step_speed.bench_host(args, CPU)
    assert few["launches"] == many["launches"] > 20 and cmae[1]["launches"] == cmae[0]["launches"] > few["launches"]
    assert all(row["name"] == name and "draw_ms" not in row for row, name in ((few, "mae"), (cmae[0], "cmae")))


def test_scale_halves_a_gpus_share_and_all_reduces_a_ring():
    args = bench.parse(f"{TINY} --batch-size 64 --what scale --method cmae".split())
    few, many = step_speed.bench_scale(args, CPU)
    method = step_speed.build_method(args, "cmae")
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    assert few["all_reduce_megabytes"] == pytest.approx(2 * 7 / 8 * 4 * trained / 1e6)
    assert many["all_reduce_megabytes"] == pytest.approx(2 * 31 / 32 * 4 * trained / 1e6)
    assert few["tflop_per_gpu"] == pytest.approx(4 * many["tflop_per_gpu"])
    assert few["gathered_keys_megabytes"] == pytest.approx(7 * 8 * 256 * 4 / 1e6)
    assert few["memory_gib"] > many["memory_gib"] > 16 * trained / 2**30


def test_a_recipe_gives_the_sizes_and_the_parts_of_a_step(monkeypatch):
    args = bench.parse("--batch-size 64 --what scale --method mae --recipe demo".split())
    mae = step_speed.build_method(args, "mae")
    assert mae.encoder.width == 128  # the demo's nano; bench.py's own is tiny
    weights = 16 * sum(p.numel() for p in mae.parameters())
    for parts, images in ((1, 8), (2, 4)):  # 64 images on 8 GPUs, and those of them that are done at once
        monkeypatch.setitem(step_speed.METHODS["mae"].RECIPES["demo"], "accumulate", parts)
        found = next(step_speed.bench_scale(args, CPU))["memory_gib"] * 2**30
        assert found - weights == pytest.approx(step_speed.activations(args, mae, images), rel=1e-4)


def test_activations_have_no_attention_scores_as_on_a_gpu(monkeypatch):
    calls, attention = [], torch.nn.functional.scaled_dot_product_attention
    spy = lambda *a, **more: calls.append(a[0].dtype) or attention(*a, **more)  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    step_speed.activations(parse(), step_speed.build_method(parse(), "mae"), 2)
    assert calls == 3 * [torch.bfloat16] and fast_paths.PLAIN_SCORES > 0


def test_activations_count_each_storage_once_and_no_weights():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(1000))

        def draw(self, images, index, rng):
            return torch.ones(len(images), 1000)

        def forward(self, x):
            y = x * self.w  # keeps x, and w, which does not count
            return {"loss": (y * y).sum()}  # keeps y twice

    assert step_speed.activations(parse(), Twice(), 3) == 2 * 3 * 1000 * 4


def test_command_prints_80_columns_and_writes_every_figure(monkeypatch, capsys, tmp_path):
    file = tmp_path / "f.json"
    words = f"bench.py {TINY} --batch-size 2 --repeats 1 --method mae cmae --no-memory --json {file} --device cpu"
    monkeypatch.setattr(sys, "argv", words.split())
    bench.main()
    found = json.loads(file.read_text())
    assert found["command"] == "python " + words and found["threads"] == torch.get_num_threads()
    assert found["versions"]["torch"] == torch.__version__ and found["device"]
    assert [(r["name"], r["precision"]) for r in found["rows"]] == [
        (n, p) for p in ("fp32", "bf16") for n in ("mae", "cmae")
    ]
    assert all(math.isfinite(v) for r in found["rows"] for v in r.values() if isinstance(v, float))
    printed = capsys.readouterr().out
    assert "images/s" in printed


def test_a_machine_has_a_folder_of_its_own_and_adds_to_it(monkeypatch, tmp_path):
    models = {"AMD EPYC 7B13 64-Core Processor": "amd-epyc-7b13-torch2",
              "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz": "intel-xeon-platinum-8481c-torch2"}  # fmt: skip
    monkeypatch.setattr(bench, "HERE", tmp_path)
    for model in models:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: {model}\n")
        monkeypatch.setattr(timing, "Path", lambda name: tmp_path / "cpuinfo")
        words = f"bench.py {TINY} --batch-size 2 --repeats 1 --precision fp32 --no-memory --device cpu --json"
        monkeypatch.setattr(sys, "argv", words.split())
        bench.main()
    found = {file.parent.name: json.loads(file.read_text()) for file in tmp_path.rglob("step.json")}
    assert set(found) == set(models.values())
    assert found["intel-xeon-platinum-8481c-torch2"]["device"] == "Intel Xeon Platinum 8481C"


def test_tables_stay_within_80_columns():
    row = dict(name="cmae_loc, compiled", batch=4096, precision="bf16", images_per_second=123456.0, gflop=12345.0,
               share=100.0, megabytes=123456.0, cost=1.234, by_hf=1.234,
               by_lightly=1.234)  # fmt: skip
    start = dict(name="cmae_loc", first_run_seconds=100.0, first_step_seconds=4.5, resident_gib=1.234,
                 checkpoint_seconds=0.123, checkpoint_megabytes=1234.0)  # fmt: skip
    scale = dict(name="cmae_loc", gpus=32, images_per_gpu=512, images_per_second=12345.0, tflop_per_gpu=12.3,
                 compute_ms=123.0, all_reduce_megabytes=1234.0, all_reduce_ms=12.3, gathered_keys_megabytes=4.1,
                 memory_gib=79.0, first_limit="all-reduce")  # fmt: skip
    for one in (row, start, scale):
        text = timing.columns([one])
        assert max(map(len, text.splitlines())) <= 80 and "cmae_loc" in text


@pytest.mark.parametrize(
    "words, says",
    [
        ("--batch-size 1", "at least 2"),
        ("--repeats 0", "at least 1"),
        ("--peer jax", "invalid choice"),
        ("--method none", "invalid choice"),
    ],
)
def test_wrong_settings_are_refused(words, says):
    with pytest.raises(InputError, match=says):
        bench.parse(words.split())


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(step_speed.PEERS, "hf", "no_such_package")
    with pytest.raises(InputError, match="peer hf: no_such_package is not installed"):
        bench.parse(["--peer", "hf"])


@pytest.mark.slow
def test_start_and_epoch_run_train_py(tmp_path, monkeypatch):
    args = parse("--classes 2 --what start --precision fp32 --device cpu --repeats 2")
    (start,) = whole_run_speed.bench_start(args, CPU)
    assert start["first_step_seconds"] > 0.5 and start["first_run_seconds"] > 0.5  # torch alone takes as long
    assert start["checkpoint_megabytes"] > 0 and start["resident_gib"] > 0.1
    args.batch_size = [-1]
    with pytest.raises(InputError, match=r"train\.py: failed \(argument --batch-size: -1"):
        next(whole_run_speed.bench_epoch(args, CPU))
