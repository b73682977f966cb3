"""On a GPU: what the CPU computes, without waiting for it, compiled, continued, and in a process group of NCCL.

Whatever compares takes two devices, so that a machine without a GPU can try it too: `check(name, CPU, CPU)`.
"""

import copy
import json
import signal
import time

import numpy as np
import pytest
import torch
import torch._inductor.config
import torch.distributed as dist
from test_train import (  # noqa: F401  (three are fixtures)
    OWN,
    SMALL,
    assert_fine,
    assert_same_bits,
    environment,
    log,
    own,
    photos,
    state,
    train,
    wait_for_lines,
)
from torch.nn.parallel import DistributedDataParallel

from common import StepRandom, ema_update
from downstream import recipes, training_loop
from downstream.classifier import Classifier
from downstream.protocols import evaluate, extract
from figures import measures
from inputs import augment, image_cache, image_sets
from methods import METHODS
from runtime import fast_paths, process, ranks
from train import build, options

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA finds none"),
]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
B = 32
CLOSE = 1e-4  # of float32, relative to a norm; one rounding is 6e-8, and a step has some hundred in a row


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    """As a command starts, with float32 that is float32; cuBLAS must hear of determinism before its first product."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    process.start("cuda")
    yield
    torch.use_deterministic_algorithms(False)


def begun(name: str, device: torch.device, *flags: str):
    """A method at its first weights and its optimizer, as train.py builds them: the same on every device."""
    words = ["--method", name, *SMALL, *own(name, "--width", "64", "--batch-size", str(B), *flags)]
    args, config, Method = options(words)
    return build(args, config, Method, device)[:2]


def pixels(n: int = B, *shape: int) -> torch.Tensor:
    coarse = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, 3, 5, 6), dtype=np.uint8))
    return coarse.repeat_interleave(8, 2).repeat_interleave(8, 3)  # (n, 3, 40, 48)


def batch_on(method, device: torch.device, step: int = 1, sizes: bool = False):
    images = [x[:, : 20 + i % 9] for i, x in enumerate(pixels().to(device))] if sizes else pixels().to(device)
    return method.draw(images, torch.arange(B), StepRandom(0, step, B, None, device))


def tensors(tree) -> list[torch.Tensor]:
    """Those of a tuple of tensors, tuples and None, in their order."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [tensor for part in tree or () for tensor in tensors(part)]


def moved(tree, device: torch.device):
    if tree is None or isinstance(tree, torch.Tensor):
        return tree if tree is None else tree.to(device)
    return type(tree)(*(moved(part, device) for part in tree))


def losses_and_gradients(method, batch, half: bool = False) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Of one forward and backward pass, in float32 or with products in bf16; gradients on the CPU."""
    with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=half):
        losses = method(batch)
    losses["loss"].backward()
    module = getattr(method, "_orig_mod", getattr(method, "module", method))  # compiled, under DDP, or as it is
    learn = {name: p for name, p in module.named_parameters() if p.requires_grad}
    gradients = {name: p.grad.detach().cpu().double() for name, p in learn.items()}
    for p in learn.values():
        p.grad = None
    return {name: loss.item() for name, loss in losses.items()}, gradients


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float = CLOSE):
    """Each tensor to `bound` of its norm, or of a thousandth of that of all: sums that cancel leave only rounding."""
    everything = torch.stack([x.norm() for x in expected.values()]).norm()
    assert found.keys() == expected.keys()
    off = {n: ((found[n] - x).norm() / torch.maximum(x.norm(), 1e-3 * everything)).item() for n, x in expected.items()}
    worst = max(off, key=off.get)
    assert off[worst] < bound, f"{worst}: off by {off[worst]:.1e} of its norm"


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Of all gradients together, relative."""
    a, b = (torch.cat([x.flatten() for x in gradients.values()]) for gradients in (found, expected))
    return ((a - b).norm() / b.norm()).item()


# ------------------------------------------------------------------------------------------------------------ a step


def check_draw(name: str, a: torch.device, b: torch.device):
    """Pixels agree to a hundredth of a grey level, masks and seeds to the bit; from a batch, and from a list."""
    flags = ["--target-blur", "0.5", "--target-mask-ratio", "0.5"] if name == "cmae" else []
    flags += ["--gray", "0.5", "--masking", "block"] if name == "conmim" else []
    for sizes in (False, True):
        ours, theirs = (tensors(batch_on(begun(name, d, *flags)[0], d, sizes=sizes)) for d in (a, b))
        for x, y in zip(ours, theirs, strict=True):
            assert y.device.type == b.type and x.dtype == y.dtype
            if x.is_floating_point():
                assert (y.cpu() - x.cpu()).abs().max() < (5e-4 if sizes else 2e-4)  # of pixels in deviations
            else:
                assert torch.equal(y.cpu(), x.cpu())


def check_step(name: str, a: torch.device, b: torch.device):
    """In float32 losses, every gradient, the steps of optimizer and teacher; in bf16 loss and the gradient in all."""
    (ours, our_optimizer), (theirs, their_optimizer) = begun(name, a), begun(name, b)
    assert_same_bits(moved_state(theirs), moved_state(ours))
    batch = batch_on(ours, a)
    losses, gradients = losses_and_gradients(ours, batch)
    their_losses, their_gradients = losses_and_gradients(theirs, moved(batch, b))
    assert their_losses == pytest.approx(losses, rel=CLOSE)
    assert_close(their_gradients, gradients)

    half_losses, half = losses_and_gradients(ours, batch, half=True)
    their_half_losses, their_half = losses_and_gradients(theirs, moved(batch, b), half=True)
    off = distance(half, gradients)
    assert 1e-4 < distance(their_half, gradients) < 3 * off  # products are rounded, and as harmlessly as here
    assert their_half_losses["loss"] == pytest.approx(half_losses["loss"], rel=3 * off)

    for method, optimizer in ((ours, our_optimizer), (theirs, their_optimizer)):  # from the same gradients
        for key, p in method.named_parameters():
            p.grad = gradients[key].to(p) if key in gradients else None
        optimizer.step()
        if hasattr(method, "update_teacher"):
            method.update_teacher(0.5)
    for key, x in moved_state(ours).items():
        torch.testing.assert_close(moved_state(theirs)[key], x, rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


def moved_state(method) -> dict[str, torch.Tensor]:
    return {name: x.cpu() for name, x in method.state_dict().items()}


@pytest.mark.parametrize("name", METHODS)
def test_a_step_on_a_gpu_is_that_of_the_cpu(name):
    check_draw(name, CPU, GPU)
    check_step(name, CPU, GPU)


@pytest.mark.parametrize("name", METHODS)
def test_nothing_in_a_step_waits_for_the_gpu(name):
    """A synchronisation inside would raise. The images lie there already; the first steps make what is made once."""
    method, optimizer = begun(name, GPU)
    images, index = pixels().to(GPU), torch.arange(B)

    def step(number: int):
        batch = method.draw(images, index, StepRandom(0, number, B, None, GPU))
        with torch.autocast("cuda", torch.bfloat16):
            losses = method(batch)
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(method.parameters(), 3.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if hasattr(method, "update_teacher"):
            method.update_teacher(0.5)

    for number in range(3):
        step(number)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(3, 6):
            step(number)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_repeats(name: str, device: torch.device):
    method, _ = begun(name, device, "--deterministic")
    batch = batch_on(method, device)
    found = [losses_and_gradients(method, batch) for _ in range(3)]
    assert found[0][0] == found[1][0] == found[2][0]
    assert_same_bits(found[1][1], found[0][1])
    assert_same_bits(found[2][1], found[0][1])


@pytest.mark.parametrize("name", METHODS)
def test_a_deterministic_step_repeats_itself_to_the_bit(name):
    """No operation of any method is without a deterministic kernel, either: torch would refuse it."""
    check_repeats(name, GPU)


def check_compiled(name: str, device: torch.device):
    """As train.py compiles it: CUDA graphs are recorded in the second step, and replay on batches of their own."""
    method, _ = begun(name, device)
    compiled = fast_paths.compiled(method, device)
    for step in range(1, 6):
        batch = batch_on(method, device, step)
        losses, gradients = losses_and_gradients(method, batch)
        with torch._inductor.config.patch(compile_threads=4):  # workers of pytest -n share the cores
            theirs, their_gradients = losses_and_gradients(compiled, batch)
        assert theirs == pytest.approx(losses, rel=CLOSE)
        assert_close(their_gradients, gradients)


@pytest.mark.parametrize("name", ["mae", "cmae", "cae", "conmim"])
def test_compiled_is_plain(name):
    check_compiled(name, GPU)


def check_optimizer_and_teacher(a: torch.device, b: torch.device):
    """AdamW's fused and foreach kernels take the plain one's steps, and the EMA is its formula."""
    found = []
    for device, how in ((a, {}), (b, dict(fused=True)), (b, dict(foreach=True))):
        method, _ = begun("cmae", device)
        learn = [p for p in method.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learn, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.05, **how)
        for step in range(3):
            draw = np.random.default_rng(step)
            for p in learn:
                p.grad = torch.from_numpy(draw.standard_normal(p.shape, dtype=np.float32)).to(device)
            optimizer.step()
        before, student = copy.deepcopy(method.momentum_encoder), method.encoder
        ema_update(method.momentum_encoder, student, 0.9)
        parts = (before, student, method.momentum_encoder)
        for old, new, mean in zip(*(part.parameters() for part in parts), strict=True):
            torch.testing.assert_close(mean, 0.9 * old + 0.1 * new, rtol=1e-5, atol=1e-6)
        found.append(moved_state(method))
    for other in found[1:]:
        for key, x in found[0].items():
            torch.testing.assert_close(other[key], x, rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


def test_fused_and_foreach_kernels_take_the_plain_steps():
    check_optimizer_and_teacher(CPU, GPU)


# ------------------------------------------------------------------------------------------------------- whole runs


def check_run(train, tmp_path, device: str, precision: str, compiles: bool):  # noqa: F811
    """With everything left to the machine, and then a measurement of what was trained."""
    flags = ["--device", device, "--precision", "auto", "--max-steps", 12, "--evaluate"]
    assert_fine(train(*flags, method="cmae", by=""))
    settings = log(tmp_path / "run")[0]["settings"]
    assert (settings["device"], settings["precision"], settings["compile"]) == (device, precision, compiles)
    losses = [row["loss"] for row in log(tmp_path / "run")[1:]]
    assert len(losses) == 12 and np.isfinite(losses).all()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["trained"]["knn"]["n"] == summary["trained"]["linear"]["n"] == 20


def test_a_run_takes_bf16_and_compiles(train, tmp_path):  # noqa: F811
    check_run(train, tmp_path, "cuda", "bf16", True)


def check_resume(train, tmp_path, device: str):  # noqa: F811
    """Killed without warning after some checkpoint, and continued."""
    flags = ["--device", device, "--precision", "auto", "--no-compile", "--deterministic", "--epochs", 40]
    whole = train.start(*flags, method="cmae", by="", out="whole")
    killed = train.start(*flags, method="cmae", by="")
    wait_for_lines(killed, tmp_path / "run", 30)
    end = time.time() + 60
    while not (tmp_path / "run" / "checkpoint.pt").exists() and time.time() < end:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert 0 < state(tmp_path / "run")["step"] < 200
    assert_fine(train(*flags, method="cmae", by=""))
    whole.communicate(timeout=120)
    assert whole.returncode == 0 and state(tmp_path / "whole")["step"] == 200
    assert_same_bits(state(tmp_path / "run"), state(tmp_path / "whole"))


def test_a_deterministic_run_that_was_killed_ends_with_the_same_bits(train, tmp_path):  # noqa: F811
    check_resume(train, tmp_path, "cuda")


def check_group(tmp_path, monkeypatch, device: torch.device, backend: str):
    """A group of one: its collectives give back what they are given, and DDP's step is the plain one."""
    method, _ = begun("cmae", device)
    batch = batch_on(method, device)
    losses, gradients = losses_and_gradients(method, batch)
    gpu = device if backend == "nccl" else None
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group(backend, store=store, rank=0, world_size=1, device_id=gpu)
    try:
        x = torch.arange(6.0, device=device).view(3, 2).requires_grad_()
        y = ranks._SumOverRanks.apply(x)
        y.square().sum().backward()
        assert torch.equal(y, x) and torch.equal(x.grad, 2 * x)
        with monkeypatch.context() as patch:
            sizes = iter([2, 1])  # a group of one has a way of its own, which is not wanted here
            patch.setattr(ranks, "world_size", lambda: next(sizes))
            assert torch.equal(ranks.gather_over_ranks(x), x)
        network = DistributedDataParallel(method, gradient_as_bucket_view=True)
        their_losses, their_gradients = losses_and_gradients(network, batch)
        assert their_losses == pytest.approx(losses, rel=CLOSE)
        assert_close(their_gradients, gradients)
    finally:
        process.stop()


def test_a_group_of_nccl_with_one_process_takes_the_plain_step(tmp_path, monkeypatch):
    check_group(tmp_path, monkeypatch, GPU, "nccl")


# --------------------------------------------------------------------------------------------------- what follows it


def image_set(n: int, device: torch.device) -> image_sets.ImageSet:
    """Images of three classes, which differ by their colour, in class order."""
    labels = torch.arange(n) * 3 // n
    images = torch.from_numpy(np.random.default_rng(n).integers(0, 150, (n, 3, 36, 32), dtype=np.uint8))
    images[torch.arange(n), labels] += 5
    flat = image_cache.Packed(*image_cache.pack(list(images)))
    return image_sets.ImageSet("colours", ["red", "green", "blue"], labels, flat).to(device)


def check_probes(a: torch.device, b: torch.device):
    """Accuracies differ by one image of 60 at most; features agree, in bf16 too."""
    found, features = [], []
    for device in (a, b):
        encoder = begun("mae", device)[0].encoder
        sets = [image_set(n, device) for n in (90, 60)]
        found.append(evaluate(encoder, *sets, ("knn", "linear"), device, precision="fp32"))
        features += [extract(encoder, sets[1], device, precision=precision)[0].cpu() for precision in ("fp32", "bf16")]
    for protocol in ("knn", "linear"):
        assert found[0][protocol]["top1"] > 40  # of chance's 33
        assert found[1][protocol]["top1"] == pytest.approx(found[0][protocol]["top1"], abs=100 / 60 + 1e-6)
    ours, half, theirs, their_half = features
    assert (theirs - ours).norm() < CLOSE * ours.norm()
    assert 0 < (their_half - ours).norm() < 3 * (half - ours).norm()


def test_probes_measure_what_they_measure_on_the_cpu():
    check_probes(CPU, GPU)


def check_fine_tuning(tmp_path, a: torch.device, b: torch.device):
    """All that a recipe draws is drawn alike; RandAugment works on whole grey levels, which may tip over by one."""
    recipe = recipes.recipe_for("demo", "finetune", given=dict(
        epochs=2, warmup_epochs=1.0, batch_size=30, mixup=0.8, cutmix=1.0, erase=0.5, randaugment=9, base_lr=0.01,
        drop_path=0.0,
    ))  # fmt: skip
    drawn, losses = [], []
    for device in (a, b):
        images, index = image_set(30, device), torch.arange(30)
        rng = StepRandom(0, 1, 30, None, device)
        labels = images.labels.to(device)
        drawn.append(recipes.augmented(images.images(index, device), labels, 3, recipe, 32, rng, probe=False))
        classifier = Classifier(begun("mae", device)[0].encoder, recipe, 3, "finetune")
        folder = tmp_path / str(len(losses))
        training_loop.train(classifier.to(device), image_set(90, device), 3, recipe, device, directory=folder)
        losses.append([json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()[1:]])
    (x, targets), (y, their_targets) = drawn
    off = (y.cpu() - x.cpu()).abs()
    assert off.mean() < 5e-3 and off.flatten().quantile(0.9) < 0.05  # in deviations, of which pixels have some four
    torch.testing.assert_close(their_targets.cpu(), targets.cpu())
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], rel=0.03)


def test_fine_tuning_with_all_that_a_recipe_draws(tmp_path):
    check_fine_tuning(tmp_path, CPU, GPU)


def check_measures(a: torch.device, b: torch.device):
    found = []
    for device in (a, b):
        encoder, images = begun("mae", device)[0].encoder.eval(), pixels().to(device)
        points = measures.features(encoder, [images[:20], images[20:]])
        distances = measures.class_distances(points, torch.arange(B, device=device) % 3)
        found.append([
            points, measures.features(encoder, [images], of="patches"), *measures.pca(points), *distances.values(),
            measures.attention_distances(encoder, [images]), *measures.encoder_maps(encoder, images, encoder.blocks),
        ])  # fmt: skip
    for x, y in zip(*found, strict=True):
        assert (y.cpu() - x.cpu()).norm() < 10 * CLOSE * x.norm()


def test_figures_measure_what_they_measure_on_the_cpu():
    check_measures(CPU, GPU)


def check_dense(a: torch.device, b: torch.device):
    """The loss of both heads, and the gradients of the FCN's."""
    dense = pytest.importorskip("downstream.dense_prediction")
    x = augment.normalize(augment.center_crop_resize(pixels(4), 32))
    masks = torch.zeros(2, 32, 32, dtype=torch.uint8)
    masks[0, 4:20, 4:20] = masks[1, 16:30, 10:28] = 1
    losses, gradients, kinds = [], [], torch.tensor([1, 2])
    for device in (a, b):
        encoder = begun("mae", device)[0].encoder
        torch.manual_seed(0)
        segmenter = dense.Segmenter(encoder, 3).to(device).train()
        samples = [dense.Sample(0, image, masks.amax(0)[None], kinds[:0], (32, 32), (32, 32)) for image in x]
        for part in segmenter.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0  # whose draws are the device's own
        loss = segmenter.loss(samples, device)
        loss.backward()
        losses.append(loss.item())
        learn = dict(segmenter.named_parameters())
        gradients.append({n: p.grad.cpu().double() for n, p in learn.items() if p.grad is not None})
        detector = dense.Detector(encoder, 3).to(device).train()
        found = [dense.Sample(0, image, masks, kinds, (32, 32), (32, 32)) for image in x]
        loss = detector.loss(found, device)
        loss.backward()
        assert loss.isfinite()
    assert losses[1] == pytest.approx(losses[0], rel=CLOSE)
    assert_close(gradients[1], gradients[0], 10 * CLOSE)


def test_dense_heads_take_a_step():
    check_dense(CPU, GPU)
