"""dvae.py: the networks beside Hugging Face's, likelihood, KL and noise from their definitions, files, the training."""

import contextlib
import copy
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dvae
from common import StepRandom, ViT
from dvae import (
    DVAE,
    RECIPES,
    Batch,
    Config,
    Tokenizer,
    diversity_loss,
    gumbel_noise,
    load_tokenizer,
    logit_laplace_loss,
    perplexity,
    relax,
    squeeze,
    uniform_kl,
    unsqueeze,
)
from runtime import files
from runtime.errors import InputError

SMALL = dict(codes=12, hidden=8, blocks=1)


def small(size=32, **settings):
    torch.manual_seed(0)
    model = DVAE(ViT(size, 8, 16, 1, 2), Config(**SMALL | settings))
    model.update_teacher(0.2)
    return model


def batch_for(B=3, size=32, seed=0):
    torch.manual_seed(seed)
    return Batch(torch.rand(B, 3, size, size), StepRandom(seed, 0, B).integers(0, 2**32, 2))


# ---------------------------------------------------------------------------------------------------- networks, files


def published(hidden=8, codes=12):
    """DALL-E's encoder as Hugging Face has it, with random weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.FlavaImageCodebookConfig(hidden_size=hidden, vocab_size=codes, num_blocks_per_group=2)
    model = transformers.FlavaImageCodebook(config)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * (
            0.1 if parameter.ndim == 1 else 2 * parameter[0].numel() ** -0.5
        )
    return model


@pytest.mark.parametrize("names", ["hugging face", "DALL-E"])
def test_the_published_encoder_is_read_and_gives_the_same_tokens(tmp_path, names):
    theirs = published()
    state = theirs.state_dict()
    if names == "DALL-E":  # blocks.group_1.block_1.res_path.conv_1.w
        state = {n.replace("group.", "").replace("path.path", "path").replace("weight", "w").replace("bias", "b"): x
                 for n, x in state.items()}  # fmt: skip
        assert "blocks.group_4.block_1.id_path.w" in state and "blocks.output.conv.b" in state
    torch.save(state, tmp_path / "dalle.bin")
    ours = load_tokenizer(str(tmp_path / "dalle.bin"))
    assert ours.settings == dict(codes=12, hidden=8, blocks=2, first_stride=1, decoder=False)
    images = torch.rand(2, 3, 4, 6).repeat_interleave(8, 2).repeat_interleave(8, 3)
    logits = theirs.blocks(squeeze(images))
    torch.testing.assert_close(ours.encoder(squeeze(images)), logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(ours.tokens(images), theirs.get_codebook_indices(0.8 * images + 0.1).flatten(1))
    assert ours.tokens(images).unique().numel() > 1


def test_the_defaults_are_the_published_size():
    with torch.device("meta"):
        tokenizer = Tokenizer()
    assert sum(p.numel() for p in tokenizer.encoder.parameters()) == 53_786_240
    assert tokenizer.decoder.input.out_channels == 128
    assert tokenizer.encoder.groups[0][0].gain == tokenizer.decoder.groups[0][0].gain == 1 / 64
    assert [g[1].skip.__class__.__name__ for g in tokenizer.encoder.groups] == 4 * ["Identity"]
    assert [g[0].convs[-1].out_channels for g in tokenizer.decoder.groups] == [2048, 1024, 512, 256]
    assert [c.kernel_size[0] for c in tokenizer.decoder.groups[0][0].convs] == [1, 3, 3, 3]
    assert tokenizer.decoder.output.out_channels == 6


@pytest.mark.parametrize("first_stride", [1, 2, 4, 8])
def test_a_token_for_each_8_pixels_whatever_the_first_stride(first_stride):
    torch.manual_seed(0)
    tokenizer = Tokenizer(**SMALL, first_stride=first_stride)
    images = torch.rand(2, 3, 16, 40)
    assert tokenizer.encoder(images).shape == (2, 12, 2, 5)
    tokens = tokenizer.tokens(images)
    assert tokens.shape == (2, 10) and torch.equal(
        tokens.unflatten(1, (2, 5)), tokenizer.encoder(squeeze(images)).argmax(1)
    )
    drawn = tokenizer.images(tokens, (2, 5))
    one_hot = torch.zeros(2, 12, 2, 5).scatter(1, tokens.reshape(2, 1, 2, 5), 1.0)
    mu, log_b = tokenizer.decode(one_hot)
    assert mu.shape == log_b.shape == images.shape
    torch.testing.assert_close(drawn, unsqueeze(torch.sigmoid(mu)).detach())


def test_at_a_stride_of_8_the_first_layer_sees_whole_codes():
    images = torch.rand(1, 3, 16, 40, requires_grad=True)
    Tokenizer(**SMALL, first_stride=8).encoder.input(images)[:, :, 1, 2].sum().backward()
    seen = torch.zeros(16, 40, dtype=torch.bool)
    seen[8:16, 16:24] = True
    assert torch.equal(images.grad[0].abs().sum(0) > 0, seen)


@torch.no_grad()
def test_logits_and_distributions_are_float32_under_autocast():
    """In bf16 the two largest logits are sometimes equal, and the first of them would be the token."""
    model = small(codes=8192, first_stride=4)
    features = []
    model.encoder.encoder.output.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    batch = batch_for(B=16)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.encoder.encoder(squeeze(batch.images))
        assert all(y.dtype == torch.float32 for y in model.encoder.decode(logits.softmax(1)))
        tokens = model.encoder.tokens(batch.images)
    last = model.encoder.encoder.output
    exact = torch.einsum("kc,bchw->bkhw", last.weight[:, :, 0, 0], features[0]) + last.bias[:, None, None]
    torch.testing.assert_close(logits, exact, atol=1e-5, rtol=1e-5)
    assert torch.equal(tokens, exact.argmax(1).flatten(1))
    assert (exact.bfloat16().argmax(1) != exact.argmax(1)).any()  # so it was


def test_the_logits_of_a_new_encoder_are_as_large_as_the_noise():
    """Grey gives zero, pictures give logits of order one."""
    torch.manual_seed(0)
    for sizes in (dict(codes=64, hidden=32, blocks=1, first_stride=4), dict(codes=64, hidden=16, blocks=2)):
        tokenizer = Tokenizer(**sizes)
        assert tokenizer.encoder.input(torch.full((1, 3, 32, 32), 0.5))[:, :, 4, 4].abs().max() < 1e-5
        images = torch.nn.functional.interpolate(torch.rand(8, 3, 6, 6), 48, mode="bicubic").clamp(0, 1)
        assert 0.5 < tokenizer.encoder(squeeze(images)).std() < 5
        last = tokenizer.encoder.output.weight  # ten times xavier's
        assert 0.99 < last.abs().max() / (10 * math.sqrt(6 / sum(last.shape[:2]))) < 1 + 1e-6


def test_a_saved_run_is_read_back_from_its_directory_or_file(tmp_path):
    model = small(first_stride=4)
    settings, state = model.encoder.settings, model.encoder.state_dict()
    files.save(tmp_path / "older/encoder.pt", dict(settings=settings, state_dict=state))
    files.save_weights(tmp_path / "run/encoder.safetensors", settings, state, "a test")
    for path in ("older", "older/encoder.pt", "run", "run/encoder.safetensors"):
        again = load_tokenizer(str(tmp_path / path))
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.encoder.parameters(), strict=True))
        assert again.settings == model.encoder.settings


def test_what_is_no_tokenizer_is_refused_in_one_line_that_says_where_to_get_one(tmp_path):
    vit = ViT(32, 8, 16, 1, 2)
    files.save(tmp_path / "vit.pt", dict(settings=vit.settings, state_dict=vit.state_dict()))
    torch.save(dict(weight=torch.zeros(3)), tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(copy.deepcopy(vit), tmp_path / "pickled.pt")  # code: must not run
    (tmp_path / "text.pt").write_text("no weights")
    state = published().state_dict()
    state.pop("blocks.group_2.group.block_1.id_path.bias")
    torch.save(state, tmp_path / "part.pt")
    for name in ("vit.pt", "other.pt", "list.pt", "pickled.pt", "text.pt", "part.pt", "none.pt", "."):
        with pytest.raises(
            InputError, match=r"tokenizer .*give a run of --method dvae, or DALL-E's from https"
        ) as error:
            load_tokenizer(str(tmp_path / name))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", [
    dict(codes=1), dict(hidden=6), dict(hidden=0), dict(blocks=0), dict(first_stride=3), dict(tau=0.0),
    dict(tau_end=-1.0), dict(tau_end=0.0),
])  # fmt: skip
def test_settings_that_cannot_be_built_are_refused(wrong):
    with pytest.raises(InputError):
        small(**wrong)
    with pytest.raises(InputError, match="patch size 16"):
        DVAE(ViT(32, 16, 16, 1, 2), Config(**SMALL))
    small(codes=2, hidden=4)  # the smallest that can


# ------------------------------------------------------------------------------------------------------------ equations


@given(st.floats(0.1, 0.9), st.floats(-3, 3), st.floats(-2, 1))
@settings(max_examples=50)
def test_logit_laplace_is_minus_the_log_density(x, mu, log_b):
    b = math.exp(log_b)
    density = math.exp(-abs(math.log(x / (1 - x)) - mu) / b) / (2 * b * x * (1 - x))
    found = logit_laplace_loss(*(torch.tensor([v], dtype=torch.float64) for v in (x, mu, log_b)))
    assert found.item() == pytest.approx(-math.log(density), abs=1e-9)


def test_logit_laplace_density_integrates_to_one_and_its_loss_is_a_mean():
    x = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    mu, log_b = torch.tensor([0.7, -0.5], dtype=torch.float64)
    b = log_b.exp()
    density = torch.exp(-(x.logit() - mu).abs() / b) / (2 * b * x * (1 - x))
    assert density.mean().item() == pytest.approx(1, abs=1e-4)
    assert logit_laplace_loss(x, mu, log_b).item() == pytest.approx(-density.log().mean().item(), abs=1e-9)


@given(st.integers(2, 9), st.integers(0, 10**6))
def test_kl_to_the_uniform_prior_in_a_loop(K, seed):
    torch.manual_seed(seed)
    logits = 3 * torch.randn(2, K, 2, 3, dtype=torch.float64)
    total = 0.0
    for b in range(2):
        for i in range(2):
            for j in range(3):
                q = [math.exp(v) for v in logits[b, :, i, j].tolist()]
                total += sum(v / sum(q) * math.log(v / sum(q) * K) for v in q)
    assert uniform_kl(logits).item() == pytest.approx(total / 12, abs=1e-9)
    assert uniform_kl(torch.zeros(1, K, 1, 1)).abs() < 1e-6
    sure = torch.zeros(1, K, 1, 1).index_fill(1, torch.tensor([0]), 100.0)
    assert uniform_kl(sure).item() == pytest.approx(math.log(K), abs=1e-5)


@given(st.integers(2, 9), st.integers(0, 10**6))
def test_diversity_is_the_kl_of_the_mean_distribution_in_a_loop(K, seed):
    torch.manual_seed(seed)
    logits = 3 * torch.randn(2, K, 2, 3, dtype=torch.float64)
    q = logits.softmax(1).permute(0, 2, 3, 1).reshape(12, K).tolist()
    mean = [statistics.fmean(token[k] for token in q) for k in range(K)]
    assert diversity_loss(logits).item() == pytest.approx(sum(p * math.log(p * K) for p in mean), abs=1e-5)
    sure = 200 * torch.eye(K)[None, :, None]  # (1, K, 1, K): each token is sure of a code of its own
    assert diversity_loss(sure).abs() < 1e-5 and uniform_kl(sure).item() == pytest.approx(math.log(K), abs=1e-5)
    alike = sure[..., :1].requires_grad_()  # all are sure of one: the others' shares are 0 in float32
    diversity_loss(alike).backward()
    assert diversity_loss(alike).item() == pytest.approx(math.log(K), abs=1e-5) and alike.grad.isfinite().all()


def test_diversity_is_that_of_all_ranks_and_weighs_as_the_kl_does(monkeypatch):
    batch = batch_for(B=4)
    losses, logits = small(diversity_weight=3.0)(batch), small().encoder.encoder(squeeze(batch.images))
    assert losses["diversity"] == diversity_loss(logits) > 0
    plain = small()(batch)
    assert "diversity" not in plain
    assert losses["loss"].item() == pytest.approx((plain["loss"] + 3 / 192 * losses["diversity"]).item(), abs=1e-6)
    monkeypatch.setattr(dvae, "world_size", lambda: 2)  # the other rank has the other half
    monkeypatch.setattr(dvae, "sum_over_ranks", lambda mean: mean + logits[2:].softmax(1).mean((0, 2, 3)))
    assert diversity_loss(logits[:2]).item() == pytest.approx(losses["diversity"].item(), abs=1e-6)


def test_squeeze_and_unsqueeze_are_inverse():
    x = torch.rand(50)
    assert torch.equal(squeeze(x), 0.8 * x + 0.1)
    torch.testing.assert_close(unsqueeze(squeeze(x)), x)
    assert unsqueeze(torch.tensor([0.0, 1.0])).tolist() == [0, 1]


def test_perplexity_counts_the_effective_codes():
    assert perplexity(torch.tensor([[3, 3], [3, 3]]), 8).item() == pytest.approx(1)
    assert perplexity(torch.tensor([[0, 1], [6, 7]]), 8).item() == pytest.approx(4)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert perplexity(torch.tensor([5, 5, 5, 2]), 8).item() == pytest.approx(math.exp(entropy))


# ---------------------------------------------------------------------------------------------------------------- noise


def plain_gumbel(seeds, place):
    x = place
    for seed in seeds:
        x ^= seed
        for _ in range(2):
            x = (((x >> 16) ^ x) * 0x45D9F3B) % 2**32
        x = (x >> 16) ^ x
    return -math.log(-math.log(((x >> 9) + 0.5) / 2**23))


@given(st.lists(st.integers(0, 2**32 - 1), min_size=4, max_size=4))
@settings(max_examples=30)
def test_the_noise_is_the_hash_of_seeds_and_place(seeds):
    noise = gumbel_noise(torch.tensor(seeds).reshape(2, 2), (3, 2, 2))
    assert noise.shape == (2, 3, 2, 2) and noise.dtype == torch.float32
    for b in range(2):
        for place, value in enumerate(noise[b].flatten().tolist()):
            assert value == pytest.approx(plain_gumbel(seeds[2 * b : 2 * b + 2], place), abs=2e-4)


def test_the_noise_is_finite_at_both_ends():
    for x in (0, 2**32 - 1):
        u = (torch.tensor(x) >> 9).float().add(0.5) / 2**23
        assert 0 < u < 1 and (-(-u.log()).log()).isfinite()
    noise = gumbel_noise(StepRandom(0, 0, 8).integers(0, 2**32, 2), (512, 16, 16))
    assert noise.isfinite().all() and noise.max() > 10 and noise.min() < -2


def test_the_noise_is_gumbel_and_independent():
    """Mean, variance and distribution of a million numbers; no correlation over places, images, seeds that are near."""
    noise = gumbel_noise(torch.tensor([[7, 1], [8, 1], [7, 2], [2**32 - 1, 0]]), (64, 4096)).double()
    assert noise.mean().item() == pytest.approx(0.577216, abs=0.005)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.01)
    u = (-(-noise).exp()).exp()  # back to uniform
    counts = torch.histc(u.float(), 256, 0, 1)
    chi_square = ((counts - u.numel() / 256) ** 2 / (u.numel() / 256)).sum().item()
    assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)
    centred = (u - 0.5) * math.sqrt(12)
    n = centred[0].numel()
    for a in range(4):
        for lag in (1, 2, 64, 4096):
            assert abs((centred[a].flatten()[lag:] * centred[a].flatten()[:-lag]).mean()) < 5 / math.sqrt(n)
        for b in range(a):
            assert abs((centred[a] * centred[b]).mean()) < 5 / math.sqrt(n)


def test_an_image_has_its_noise_in_any_batch():
    seeds = StepRandom(3, 4, 6).integers(0, 2**32, 2)
    assert torch.equal(gumbel_noise(seeds, (5, 2, 2))[2:4], gumbel_noise(seeds[2:4], (5, 2, 2)))


def test_relaxed_samples_follow_the_distribution_and_harden_as_tau_falls():
    """The largest of logits + Gumbel noise is a sample of their softmax (the Gumbel-max trick)."""
    logits = torch.tensor([1.0, 0.0, -1.0, 0.5])[None, :, None, None].expand(1, 4, 300, 300)
    noise = gumbel_noise(torch.tensor([[11, 12]]), (4, 300, 300))
    for tau in (1.0, 0.01):
        z = relax(logits, noise, torch.tensor(tau))
        torch.testing.assert_close(z.sum(1), torch.ones(1, 300, 300))
        found = z.argmax(1).flatten().bincount(minlength=4) / 90_000
        torch.testing.assert_close(found, torch.tensor([1.0, 0.0, -1.0, 0.5]).softmax(0), atol=0.01, rtol=0)
    assert z.amax(1).mean() > 0.99
    z = relax(logits, noise, torch.tensor(0.5)).double()
    plain = torch.exp((logits + noise).double() / 0.5)
    torch.testing.assert_close(z, plain / plain.sum(1, keepdim=True), atol=1e-6, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------- training


def test_the_paper_recipe_is_dall_es_appendix_a_2():
    paper, c = RECIPES["paper"], Config()
    assert paper["batch_size"] == 512 and paper["betas"] == (0.9, 0.999) and paper["weight_decay"] == 1e-4
    assert (paper["lr"], paper["min_lr"]) == (1e-4, 1.25e-6)
    assert (c.kl_weight, c.tau, c.tau_end) == (6.6, 1, 1 / 16) and not {"kl_weight", "tau", "codes"} & paper.keys()
    assert paper["image_size"] == 112 and c.crop_scale == 0.08  # CAE's crops


def test_a_part_of_the_paper_recipes_batch_fits_40_gib(monkeypatch):
    """What autograd keeps of it in float32, counted on tensors without values; bf16 keeps six tenths of that."""
    monkeypatch.setattr(torch, "autocast", lambda *words, **more: contextlib.nullcontext())  # there is none on "meta"
    images, kept = RECIPES["paper"]["batch_size"] // RECIPES["paper"]["accumulate"], {}

    def keep(x):
        kept[x.untyped_storage()._cdata] = x  # held, so that no storage's number is given to another
        return x

    with torch.device("meta"):
        model = DVAE(ViT(112, 8, 16, 1, 2), Config())
        batch = Batch(torch.empty(images, 3, 112, 112), torch.empty(images, 2, dtype=torch.int64))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model(batch)["loss"]  # held until all is counted
    assert 10 < sum(x.untyped_storage().nbytes() for x in kept.values()) / 2**30 < 40 and loss.is_meta


@torch.no_grad()
def test_forward_is_the_negative_bound_in_plain_steps():
    model, batch = small(), batch_for()
    x = 0.1 + 0.8 * batch.images
    logits = model.encoder.encoder(x)
    q = logits.softmax(1)
    z = ((q.log() + gumbel_noise(batch.seeds, logits.shape[1:])) / model.tau).softmax(1)
    out = model.encoder.decoder(z)  # μ, then log b
    mu, log_b = out[:, :3], out[:, 3:]
    values, rate, errors = [], [], []
    for b in range(3):
        for c in range(3):
            for i in range(32):
                for j in range(32):
                    v, m, s = x[b, c, i, j].item(), mu[b, c, i, j].item(), log_b[b, c, i, j].item()
                    values.append(abs(math.log(v / (1 - v)) - m) / math.exp(s) + math.log(2 * v * (1 - v)) + s)
                    mean = min(max((1 / (1 + math.exp(-m)) - 0.1) / 0.8, 0), 1)
                    errors.append((mean - batch.images[b, c, i, j].item()) ** 2)
        for i in range(4):
            for j in range(4):
                rate.append(sum(p * math.log(12 * p) for p in q[b, :, i, j].tolist()))
    out = model(batch)
    likelihood, kl = statistics.fmean(values), statistics.fmean(rate)
    beta = 6.6  # after the warm-up
    assert out["likelihood"].item() == pytest.approx(likelihood, abs=1e-5)
    assert out["kl"].item() == pytest.approx(kl, abs=1e-5)
    assert out["reconstruction"].item() == pytest.approx(statistics.fmean(errors), abs=1e-5)
    bound = sum(values) + beta * sum(rate)  # over all pixel values and all tokens
    assert out["loss"].item() == pytest.approx(bound / len(values), abs=1e-5)
    counts = logits.argmax(1).flatten().bincount(minlength=12).double() / 48
    assert out["effective_codes"].item() == pytest.approx(
        math.exp(-sum(p * math.log(p) for p in counts.tolist() if p)), abs=1e-4
    )


def test_gradient_reaches_every_weight():
    model = small(first_stride=2)
    model(batch_for())["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@given(st.floats(0, 1))
def test_temperature_and_beta_follow_their_cosines(progress):
    model = small(tau=2.0, tau_end=0.5, tau_anneal=0.4, kl_weight=3.0, kl_warmup=0.1)
    model.update_teacher(progress)
    t, k = min(1, progress / 0.4), min(1, progress / 0.1)
    assert model.tau.item() == pytest.approx(0.5 + 1.5 * (1 + math.cos(math.pi * t)) / 2, abs=1e-6)
    assert model.beta.item() == pytest.approx(3 * (1 - math.cos(math.pi * k)) / 2, abs=1e-6)


def test_the_schedule_starts_at_its_start_and_is_in_the_checkpoint():
    model = DVAE(ViT(32, 8, 16, 1, 2), Config(**SMALL))
    assert model.tau.item() == 1.0 and model.beta.item() == 0.0
    model.update_teacher(0.3)
    again = DVAE(ViT(32, 8, 16, 1, 2), Config(**SMALL))
    again.load_state_dict(model.state_dict())
    assert again.tau == model.tau and again.beta == model.beta == pytest.approx(6.6)
    model.update_teacher(1.0)
    assert model.tau.item() == 0.0625
    model = small(tau_anneal=0.0, kl_warmup=0.0)
    assert model.tau.item() == 0.0625 and model.beta.item() == pytest.approx(6.6)


def test_draw_gives_crops_and_seeds_of_the_rank():
    model = small()
    images = torch.randint(0, 256, (4, 3, 40, 40), dtype=torch.uint8)
    whole = model.draw(images, torch.arange(4), StepRandom(3, 9, 4))
    assert whole.images.shape == (4, 3, 32, 32) and whole.images.min() >= 0 and whole.images.max() <= 1
    assert whole.seeds.shape == (4, 2) and whole.seeds.unique().numel() == 8 and 2**30 < whole.seeds.max() < 2**32
    for r in range(2):
        rows = slice(2 * r, 2 * r + 2)
        part = model.draw(images[rows], torch.arange(4)[rows], StepRandom(3, 9, 4, rows))
        torch.testing.assert_close(part.images, whole.images[rows], atol=1e-6, rtol=0)
        assert torch.equal(part.seeds, whole.seeds[rows])
    other = model.draw(images, torch.arange(4), StepRandom(3, 10, 4))
    assert not torch.equal(other.seeds, whole.seeds)


def test_draw_crops_and_flips_as_configured():
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8).repeat(64, 1, 1, 1)
    whole = images / 255
    for crop_scale, fewer in ((1.0, 65), (0.9, 32), (0.2, 16)):  # with 1.0 only the whole image fits; none is larger
        views = small(crop_scale=crop_scale).draw(images, torch.arange(64), StepRandom(0, 0, 64)).images
        straight, mirrored = (((views - x).abs().amax((1, 2, 3)) < 1e-4).sum() for x in (whole, whole.flip(3)))
        assert straight + mirrored < fewer
        assert crop_scale < 1 or (straight + mirrored == 64 and 20 < straight < 44)


def test_picture_shows_originals_and_their_tokens_decoded():
    model = small()
    batch = batch_for()
    rows = model.picture(batch)
    assert rows.shape == (2, 3, 3, 32, 32) and torch.equal(rows[0], batch.images)
    assert torch.equal(rows[1], model.encoder.images(model.encoder.tokens(batch.images), (4, 4)))


@pytest.mark.training
def test_a_small_step_down_the_gradient_lowers_the_loss_by_its_first_order_estimate():
    """A step of length t |g| should lower the loss by t |g|² = 3e-4: rounding is a thousandth of that, bends a 30th."""
    for seed in range(4):
        model, batch = small(first_stride=4, hidden=16, kl_weight=0.5), batch_for(B=8, seed=seed)
        before = model(batch)["loss"]
        before.backward()
        square = sum(parameter.grad.double().square().sum().item() for parameter in model.parameters())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 3e-4 / square * parameter.grad
            fall = (before - model(batch)["loss"]).item()
        assert fall == pytest.approx(3e-4, rel=0.4)
