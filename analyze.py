"""The papers' figures, by name, from a run directory: a PNG, and the numbers it shows as JSON beside it.

    python analyze.py --run runs/mae-shapes --figure all                      into runs/mae-shapes/figures/
    python analyze.py --run runs/mae runs/mae-45 --figure attention-distance  several runs on one axis
    python analyze.py --run runs/cae --figure attention-map --to map.png

What a figure shows decides which runs can have it: a method is asked for its decoder, its codes, its heat map, never
for its name. Images come from the first run's validation set, evenly spaced, centred and whole (`views`: from the
training set, as `draw` cuts them), so that several runs are shown the same. Needs matplotlib: pip install ".[plots]".

Where the papers are unclear, and what stands here
- LC-MAE's attention distance leaves out the class token as query and as key, and each query's weights over the patches
  are brought back to a sum of one: an average distance in pixels, between the centres of patches.
- Eq. (7) compares the attention of mask tokens to patches, Eq. (8) what leaves a decoder block (before the norm) with
  the reference's last layer (after it); the decoder works on masked images there, the reference on whole ones.
- CMAE's class distances (§4.7) do not say which distance: here 1 - cosine, of the patch tokens' mean.
"""

import argparse
import importlib.util
import json
import re
import textwrap
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cmae_loc
import dvae
import mae
from common import Attention, Mask, StepRandom, ViT, patchify, restore, take, unpatchify
from inputs import augment, image_sets
from methods import METHODS
from runtime import files, process, weights
from runtime.command_line import Parser, build_encoder, field_comments
from runtime.errors import InputError

WIDTH = 9.0  # inches, of 100 pixels
STYLE = {  # colours differ in lightness, lines and classes also in their markers, so that grey prints tell them apart
    "savefig.dpi": 100, "font.size": 10, "axes.titlesize": 10, "figure.titlesize": 12, "legend.frameon": False,
    "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False,
    "image.cmap": "cividis", "lines.markersize": 5,
    "axes.prop_cycle": "cycler(color=['#0b3c6f', '#d55e00', '#009e73', '#cc79a7', '#56b4e9', '#8a6d00', '#000000', "
    "'#e69f00', '#7f7f7f', '#7b3294'], marker=['o', 's', '^', 'D', 'v', 'P', 'X', '*', '<', '>'])",
}  # fmt: skip


class Absent(InputError):
    """A figure that these runs cannot have: `--figure all` goes on without it."""


# ------------------------------------------------------------------------------------------------- numbers: attention


def attention_weights(part: Attention, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √d + bias), which `common.Attention` uses but does not return. (B, T, D) → (B, heads, T, T)"""
    q, k, _ = part.qkv(x).unflatten(2, (3, part.heads, -1)).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(2, 3)).float() * q.shape[3] ** -0.5
    return (scores if bias is None else scores + bias).softmax(dim=3)


@torch.no_grad()
def attention_maps(parts, work: Callable) -> list[Tensor]:
    """The attention weights of each `common.Attention` among `parts` while `work()` runs it: (B, heads, T, T) each."""
    maps = []

    def note(part, arguments, named):
        maps.append(attention_weights(part, *arguments, **named))

    hooks = [part.register_forward_pre_hook(note, with_kwargs=True) for part in parts]
    try:
        work()
    finally:
        for hook in hooks:
            hook.remove()
    return maps


def attention_distance(maps: Tensor, grid: tuple[int, int], p: int) -> Tensor:
    """LC-MAE §4.2: how far, in pixels, patches look for what they attend to. (B, heads, 1 + N, 1 + N) → (B, heads).

    Σ_j a_ij d_ij / Σ_j a_ij over the patches j, averaged over the patches i; d_ij lies between their centres.
    """
    places = torch.arange(grid[0] * grid[1], device=maps.device)
    place = torch.stack([places // grid[1], places % grid[1]], dim=1).float()  # (N, 2) row and column
    apart = (place[:, None] - place).square().sum(dim=2).sqrt() * p  # (N, N)
    among = maps[:, :, 1:, 1:]
    return ((among * apart).sum(dim=3) / among.sum(dim=3)).mean(dim=2)


def mass_region(attention: Tensor, mass: float) -> Tensor:
    """CAE Figure 6: the fewest patches that hold a share `mass` of the attention. (…, N) → bool (…, N)."""
    largest, order = attention.cpu().double().sort(dim=-1, descending=True, stable=True)
    before = largest.cumsum(dim=-1) - largest  # what the larger ones hold already
    keep = before < mass * largest.sum(dim=-1, keepdim=True) - 1e-12
    return torch.zeros_like(keep).scatter(-1, order, keep)


def decoder_similarity(maps: Tensor) -> float:
    """S_attn, LC-MAE Eq. (7): the mean cosine between the attention maps of two images. (images, k, heads, n) → scalar.

    Unit vectors u_i make it (‖Σ u_i‖² - I) / (I (I - 1)): all pairs for the price of one sum.
    """
    u = F.normalize(maps.flatten(1).cpu().double(), dim=1)
    return ((u.sum(dim=0).square().sum() - len(u)) / (len(u) * (len(u) - 1))).item()


def semantic_similarity(reference: Tensor, features: Tensor) -> float:
    """S_sim, LC-MAE Eq. (8): the mean over images of cos(W_ref, W_dec), W (n, n) the cosines between patches.

    (images, n, D) of the reference and (images, n, width) of a decoder layer, both in raster order.
    """
    x, y = (F.normalize(some.cpu().double(), dim=2) for some in (features, reference))
    return F.cosine_similarity((x @ x.mT).flatten(1), (y @ y.mT).flatten(1), dim=1).mean().item()


# -------------------------------------------------------------------------------------------------- numbers: features


def cosine_distances(x: Tensor) -> Tensor:
    """(n, D) → float64 (n·(n-1)/2,): 1 - cosine of every two rows."""
    x = F.normalize(x.double(), dim=1)
    i, j = torch.triu_indices(len(x), len(x), 1, device=x.device)
    return 1 - (x @ x.T)[i, j]


def class_distances(features: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """CMAE §4.7 and Figure 6, for each class: mean and standard deviation of the distances between its images (intra),
    and of those from its centre to the other centres (inter). (n, D), (n,) → float64 (classes,) each.

    Every class needs two images. The deviation divides by the number of distances.
    """
    groups = [features[labels == c].double() for c in labels.unique()]
    if len(groups) < 2 or min(map(len, groups)) < 2:
        raise InputError("class distances: need two classes with two images each; give more --images")
    inside = [cosine_distances(group) for group in groups]
    centres = F.normalize(torch.stack([group.mean(dim=0) for group in groups]), dim=1)
    other = ~torch.eye(len(groups), dtype=torch.bool, device=features.device)
    between = (1 - centres @ centres.T)[other].view(len(groups), -1)  # (classes, classes - 1)
    return {
        "intra_mean": torch.stack([d.mean() for d in inside]),
        "intra_std": torch.stack([d.std(correction=0) for d in inside]),
        "inter_mean": between.mean(dim=1),
        "inter_std": between.std(dim=1, correction=0),
    }


def pca(x: Tensor, k: int = 2) -> tuple[Tensor, Tensor]:
    """(n, D) → its first k principal components (n, k), and the share of variance in each (k,). Signs are fixed."""
    u, s, v = torch.linalg.svd((x - x.mean(dim=0)).double(), full_matrices=False)
    signs = v.gather(1, v.abs().argmax(dim=1, keepdim=True)).sign()[:, 0]  # a direction's largest entry is positive
    return (u * s * signs)[:, :k], (s.square() / s.square().sum())[:k]


def tsne(x: Tensor, seed: int) -> Tensor:
    """(n, D) → (n, 2), by scikit-learn, begun from its first two principal components."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise InputError('scikit-learn: missing, and t-SNE needs it; pip install ".[plots]"') from None
    perplexity = min(30.0, (len(x) - 1) / 3)
    return torch.from_numpy(TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(x.cpu().numpy()))


def to_pixels(predicted: Tensor, patches: Tensor, mask: Mask, grid: tuple[int, int], true_statistics: bool) -> Tensor:
    """Predictions standardised patch by patch → pixels, both (B, N, P) in raster order.

    Visible patches get back their own mean and variance; hidden ones those of the visible around them, or their own
    (`true_statistics`), which no model knows.
    """
    variance, mean = torch.var_mean(patches, dim=2, keepdim=True)
    if not true_statistics:
        around = mae.visible_statistics(patches, mask, grid)  # (B, M, 1) each
        index = mask.masked[:, :, None]
        mean, variance = mean.scatter(1, index, around[0]), variance.scatter(1, index, around[1])
    return predicted * (variance + 1e-6).sqrt() + mean


# -------------------------------------------------------------------------------------------------------------- runs


class Run:
    """A run directory: its settings, its log, and its method with the weights of its last checkpoint."""

    def __init__(self, directory, device):
        self.directory, self.device, self.label = Path(directory), device, Path(directory).resolve().name
        file = self.directory / "config.json"
        try:
            about = json.loads(file.read_text())
            self.settings, self.config = SimpleNamespace(**about["settings"]), about["config"]
            self.Method = METHODS[about["method"]]
        except (OSError, ValueError, TypeError, LookupError):
            raise InputError(f"{file}: no configuration of a run; give a directory that train.py wrote") from None

    @cached_property
    def method(self) -> nn.Module:
        file = self.directory / "checkpoint.pt"
        saved = files.load(file)
        try:
            method = self.Method(build_encoder(self.settings), self.Method.Config(**self.config))
            method.load_state_dict(saved["method"])
        except InputError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError):
            raise InputError(f"{file}: does not fit its config.json and this version; train the run anew") from None
        return method.to(self.device).eval()

    @property
    def encoder(self) -> ViT:
        if not isinstance(self.method.encoder, ViT):
            raise Absent(f"{self.label} keeps no ViT; give a run that does")
        return self.method.encoder

    @property
    def decoder(self) -> mae.Decoder:
        """A decoder that is given mask tokens and attends to them: MAE's, under whatever method."""
        found = getattr(self.method, "decoder", None)
        if not isinstance(found, mae.Decoder) or not any(isinstance(block.attn, Attention) for block in found.blocks):
            raise Absent(f"{self.label} has no decoder whose mask tokens attend to patches; give a run of MAE's kind")
        return found

    @torch.no_grad()
    def draw(self, images, index: Tensor | None = None):
        """What a training step would make of these images; always the same. Index -1: none of the training set."""
        index = torch.full((len(images),), -1) if index is None else index
        return self.method.draw(images, index, StepRandom(self.settings.seed, 2**40, len(images), None, self.device))

    def masks(self, images, alike: bool = False) -> Mask:
        """Masks as in training, or the first of them for all images."""
        mask = self.draw(images).mask
        if not mask.masked.shape[1]:
            raise Absent(f"{self.label} hides nothing, so that its decoder knows no mask token; give a run that masks")
        return Mask(*(side[:1].expand_as(side) for side in mask)) if alike else mask

    @property
    def log(self) -> list[dict]:
        file = self.directory / "log.jsonl"
        try:  # a line that is being written may end early
            rows = [json.loads(line) for line in file.read_text().splitlines()[1:] if line.endswith("}")]
        except (OSError, ValueError):
            raise InputError(f"{file}: no log of a run; give a directory that train.py wrote") from None
        if not rows:
            raise Absent(f"{self.label} has logged no step yet; wait for one")
        return rows


class Study:
    """The runs of one command, the images they are shown, and what was asked for."""

    def __init__(self, args, device):
        self.args, self.device, self.runs = args, device, [Run(directory, device) for directory in args.run]
        if len({run.label for run in self.runs}) < len(self.runs):
            for run in self.runs:
                run.label = str(run.directory)

    def only(self) -> Run:
        if len(self.runs) > 1:
            raise Absent("shows one run; give one to --run")
        return self.runs[0]

    def count(self, images: int) -> int:
        return self.args.images or images

    def open(self, split: str) -> image_sets.ImageSet:
        about, given = self.runs[0].settings, self.args
        name, root = given.data or about.data, given.data_root or about.data_root
        found = image_sets.open_set(name, root, split, skip_bad_images=bool(about.skip_bad_images))
        return found.subset(classes=about.classes) if about.classes and not given.data else found

    @cached_property
    def val(self) -> image_sets.ImageSet:
        return self.open("val")

    @cached_property
    def train(self) -> image_sets.ImageSet:
        found, first = self.open("train"), getattr(self.runs[0].settings, "images", None)
        return found.first(first) if first and not self.args.data else found  # a run may train on few

    def pictures(self, n: int):
        """n validation images, evenly spaced: uint8 (n, 3, H, W), or a list where sizes vary."""
        return self.val.images(spaced(len(self.val), n), self.device)

    def labelled(self, n: int, classes: int):
        """About n validation images, equally many of each of at most `classes` classes, and their labels (n,)."""
        labels = self.val.labels.cpu()
        chosen = labels.unique()
        groups = [(labels == c).nonzero()[:, 0] for c in chosen[spaced(len(chosen), classes)]]
        at = torch.cat([group[spaced(len(group), max(2, n // len(groups)))] for group in groups])
        return self.val.images(at, self.device), labels[at]

    @cached_property
    def reference(self) -> list[tuple[str, ViT]]:
        path = self.args.reference
        return [(f"reference {Path(path).name}", weights.load_encoder(path, self.device))] if path else []

    @property
    def encoders(self) -> list[tuple[str, ViT]]:
        return [(run.label, run.encoder) for run in self.runs] + self.reference


def spaced(total: int, n: int) -> Tensor:
    """At most n of 0 … total-1, evenly spaced."""
    return torch.linspace(0, total - 1, min(n, total)).long()


def centred(images, size: int) -> Tensor:
    return augment.normalize(augment.center_crop_resize(images, size))


@torch.no_grad()
def features(encoder: ViT, images, of: str = "images", chunk: int = 64) -> Tensor:
    """uint8 images → the means of their patch tokens (n, D), as evaluate.py has it, or of="patches": (n, N, D)."""
    parts = (encoder(centred(images[i : i + chunk], encoder.image_size))[:, 1:] for i in range(0, len(images), chunk))
    return torch.cat([tokens.float() if of == "patches" else tokens.float().mean(dim=1) for tokens in parts])


def encoder_maps(encoder: ViT, images, blocks) -> list[Tensor]:
    x = centred(images, encoder.image_size)
    return attention_maps([block.attn for block in blocks], lambda: encoder(x))


def decoder_order(decoder: mae.Decoder, mask: Mask) -> Tensor:
    """(B, 1 + N): where in the decoder's sequence class token and patches, in raster order, stand.

    MAE's has the visible patches first; one with a `features` of its own works in raster order (cmae_loc.py).
    """
    first = type(decoder).features is mae.Decoder.features
    places = mask.order.argsort(dim=1) if first else mask.order.sort(dim=1).values
    return F.pad(places + 1, (1, 0))


@torch.no_grad()
def decoder_maps(run: Run, images, mask: Mask) -> list[Tensor]:
    """Attention of each layer of the decoder that attends, in raster order: (B, heads, 1 + N, 1 + N) each."""
    decoder, x = run.decoder, centred(images, run.encoder.image_size)
    parts = [block.attn for block in decoder.blocks if isinstance(block.attn, Attention)]
    maps = attention_maps(parts, lambda: decoder.features(run.encoder(x, mask.visible), mask))
    order = decoder_order(decoder, mask)
    rows, columns = order[:, None, :, None], order[:, None, None, :]
    return [m.gather(2, rows.expand_as(m)).gather(3, columns.expand_as(m)) for m in maps]


@torch.no_grad()
def decoder_features(run: Run, images, mask: Mask) -> list[Tensor]:
    """What leaves each block of the decoder, patches in raster order: (B, N, width) each."""
    decoder, found = run.decoder, []
    hooks = [block.register_forward_hook(lambda *about: found.append(about[2])) for block in decoder.blocks]
    decoder.features(run.encoder(centred(images, run.encoder.image_size), mask.visible), mask)
    for hook in hooks:
        hook.remove()
    return [take(x, decoder_order(decoder, mask)[:, 1:]) for x in found]


# ----------------------------------------------------------------------------------------------------------- drawing


def canvas(rows: int = 1, columns: int = 1, height: float = 4.0):
    """A figure and its axes, an array (rows, columns)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def lines(title: str, x_name: str, y_name: str, series: dict[str, list[float]]):
    """One line per run over the layers 1, 2, …; returns the figure and its axis."""
    figure, ((axis,),) = canvas()
    for name, values in series.items():
        axis.plot(range(1, len(values) + 1), values, label=name)
    axis.set(title=title, xlabel=x_name, ylabel=y_name, xticks=range(1, 1 + max(map(len, series.values()))))
    axis.legend()
    return figure, axis


def show(axis, picture: Tensor) -> None:
    """A picture (3, H, W) in [0, 1] or a map (h, w), without ticks."""
    x = picture.detach().float().cpu()
    axis.imshow((x.permute(1, 2, 0).clamp(0, 1) if x.ndim == 3 else x).numpy(), interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    axis.grid(False)


def gallery(title: str, rows: dict[str, Tensor], caption: str = ""):
    """Rows of pictures (n, 3, H, W) or maps (n, h, w), each named at its left; returns the figure and its axes."""
    n = len(next(iter(rows.values())))
    figure, axes = canvas(len(rows), n, height=0.8 + len(rows) * (WIDTH - 1.5) / max(n, 4))
    figure.suptitle(title)
    figure.supxlabel(textwrap.fill(caption, 120), fontsize=10)
    for row, (name, pictures) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(row, pictures, strict=True):
            show(axis, picture)
        row[0].set_ylabel(textwrap.fill(name, 18), rotation=0, ha="right", va="center", multialignment="right")
    return figure, axes


def frame(axis, box, size: int, style: str = "-") -> None:
    """A rectangle (top, left, height, width), given as shares of what is shown at `size` pixels a side."""
    from matplotlib.patches import Rectangle

    top, left, height, width = (float(x) * size for x in box)
    for color, line in (("white", 3.5), ("black", 1.5)):  # seen on any ground
        how = dict(color=color, linewidth=line, linestyle=style if color == "black" else "-")
        axis.add_patch(Rectangle((left - 0.5, top - 0.5), width, height, fill=False, clip_on=False, **how))


def outline(axis, region: Tensor, fine: int = 16, **how) -> None:
    """The border of a region bool (h, w) of a map's cells."""
    cells = region.cpu().float().repeat_interleave(fine, 0).repeat_interleave(fine, 1)
    y, x = (((torch.arange(side + 2) - 0.5) / fine - 0.5).tolist() for side in cells.shape)
    axis.contour(x, y, F.pad(cells, (1, 1, 1, 1)).numpy(), levels=[0.5], **how)


def circle(axis, row: float, column: float) -> None:
    axis.plot(column, row, "o", color="red", markersize=9, fillstyle="none", markeredgewidth=2)


def greyed(pictures: Tensor, mask: Mask, p: int, grid: tuple[int, int]) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] with their hidden patches grey."""
    return unpatchify(patchify(pictures, p).masked_fill(mask.hidden[:, :, None], 0.5), p, grid)


def short(name: str) -> str:
    return textwrap.shorten(name.split(",")[0], 17, placeholder="…")


def rounded(x) -> list:
    return torch.as_tensor(x).cpu().double().mul(1e6).round().div(1e6).tolist()


# ---------------------------------------------------------------------------------------------- figures: what it does


def curves(study: Study):
    """The loss, its parts and the learning rate along training."""
    logs, leave = {run.label: run.log for run in study.runs}, {"step", "epoch", "images_per_second", "seconds"}
    names = [key for key in dict.fromkeys(key for log in logs.values() for key in log[-1]) if key not in leave]
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, axes = canvas(rows, columns, height=0.6 + 2.7 * rows)
    figure.suptitle("Training curves")
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    for axis, name in zip(axes.flat, names, strict=False):
        for label, log in logs.items():  # a run without this part draws nothing, but keeps its colour for the others
            rows = [row for row in log if name in row]
            axis.plot([r["epoch"] for r in rows], [r[name] for r in rows], label=label, markevery=0.2)
        axis.set(title="learning rate" if name == "lr" else name.replace("_", " "), xlabel="epoch")
    axes[0, 0].legend()
    keys = ["step", "epoch", *names]
    return figure, {label: {key: [row.get(key) for row in log] for key in keys} for label, log in logs.items()}


def reconstruction(study: Study):
    """What the decoder makes of what is hidden (as MAE's Figure 2); other methods draw what they do predict."""
    run, args, images = study.only(), study.args, study.pictures(study.count(8))
    mask, rows = pixel_mask(run, images), None
    if mask is None:
        if not args.keep_visible or args.statistics == "true":
            raise InputError(f"{run.label} predicts no patches of pixels; leave out --no-keep-visible and --statistics")
        rows = run.method.picture(run.draw(images))
        if rows is None:
            raise Absent(f"{run.label} was taught nothing that can be seen; give a run that predicts pixels or tokens")
        about = " ".join(run.method.picture.__doc__.split("\n\n")[0].split()).split(": ", 1)[-1]
        rows = {f"row {i}": row for i, row in enumerate(rows, start=1)}
        return gallery(f"Reconstruction by {run.label}", rows, f"Rows: {about}")[0], {"rows": about}
    method, encoder, norm = run.method, run.encoder, run.method.config.norm_pixels
    if not norm and args.statistics == "true":
        raise InputError(f"{run.label} predicts pixels as they are; leave out --statistics")
    p, grid, x, V = encoder.patch_size, encoder.grid, centred(images, encoder.image_size), mask.visible.shape[1]
    with torch.no_grad():
        predicted = method.decoder.predict(method.decoder.features(encoder(x, mask.visible), mask)).float()
    predicted, patches = restore(predicted[:, :V], predicted[:, V:], mask), patchify(x, p)  # (B, N, P), raster order
    if norm:
        predicted = to_pixels(predicted, patches, mask, grid, args.statistics == "true")
    hidden = mask.hidden[:, :, None]
    made = torch.where(hidden, predicted, patches) if args.keep_visible else predicted
    made, original = (augment.denormalize(unpatchify(y, p, grid)) for y in (made, patches))
    source = dict(true="TRUE ones, which the model cannot know", visible="those of visible neighbours")
    caption = f"mean and variance of hidden patches: {source[args.statistics]}" if norm else "pixels as predicted"
    kept = "visible patches kept" if args.keep_visible else "visible patches predicted too"
    rows = {"original": original, "masked": greyed(original, mask, p, grid), f"decoded, {kept}": made}
    error = (patchify(made - original, p).square() * hidden).sum(dim=(1, 2)) / (hidden.sum(dim=(1, 2)) * 3 * p * p)
    numbers = {"statistics": caption, "visible": kept, "squared_error_of_hidden_pixels": rounded(error)}
    return gallery(f"Reconstruction by {run.label}", rows, caption)[0], numbers


def pixel_mask(run: Run, images) -> Mask | None:
    """Masks for a method with MAE's decoder that predicts the pixels of hidden patches; None for others."""
    decoder = getattr(run.method, "decoder", None)
    if not isinstance(decoder, mae.Decoder) or decoder.predict is None:
        return None
    mask, taught = run.draw(images).mask, run.method.picture(run.draw(images)) is not None
    pixels = decoder.predict.out_features == 3 * run.encoder.patch_size**2
    return mask if taught and pixels and mask.masked.shape[1] else None


def views(study: Study):
    """What each branch sees of the training images: crops, shifts, colours, masks; ContrastiveCrop's map and box."""
    run, at = study.only(), spaced(len(study.train), study.count(6))
    images, method, size = study.train.images(at, study.device), run.method, run.settings.image_size
    grid, p = (size // run.settings.patch_size,) * 2, run.settings.patch_size
    spies = (mock.patch.object(augment, f, wraps=getattr(augment, f)) for f in ("crop_resize", "shift_crop"))
    with next(spies) as crop, next(spies) as shift:  # remember where the views are cut from
        batch = run.draw(images, None if study.args.data else at)
    crops = [call.args[1].cpu() for call in crop.call_args_list]
    crops = [c for i, c in enumerate(crops) if not any(torch.equal(c, other) for other in crops[:i])]
    sizes = torch.as_tensor(augment.sizes(images)).expand(len(images), 2)
    whole = augment.crop_resize(images, F.pad(sizes, (2, 0)), size)
    rows, comments, view = {"training image, crops": whole}, field_comments(type(batch)), whole
    for name, value in batch._asdict().items():
        about = re.sub(r"\(B, 3, [^)]*\)|in \[0, 1\]|, normalised|;.*|None:.*", "", comments.get(name, "")).strip(" ,")
        about = name.replace("_", " ") + (f": {about}" if about else "")
        if isinstance(value, Mask):
            rows[about] = greyed(view, value, p, grid)
        elif isinstance(value, Tensor) and value.ndim == 4:
            rows[about] = view = value if value.min() >= 0 else augment.denormalize(value)  # below 0: normalised
    numbers = {"crops": [c.tolist() for c in crops], "shifts": [call.args[1].tolist() for call in shift.call_args_list]}
    located = getattr(method.config, "crop_by", "none") != "none"
    if located:
        with torch.no_grad():
            heat = cmae_loc.HEAT[method.config.crop_by](method.encoder, augment.normalize(whole)).unflatten(1, grid)
        boxes = cmae_loc.locate(heat, (size, size), method.config.crop_threshold)  # top, left, bottom, right
        rows["heat map and box"] = heat
        numbers |= {"heat": rounded(heat), "boxes": rounded(boxes)}
    figure, axes = gallery(f"What {run.label} is shown in one step", rows)
    for places, line in zip(crops, ("-", "--", ":"), strict=False):
        for axis, box in zip(axes[0], places / sizes.repeat(1, 2), strict=True):
            frame(axis, box, size, line)
    for axis, box in zip(axes[-1], boxes if located else (), strict=False):
        frame(axis, (*box[:2], *(box[2:] - box[:2])), grid[0])
    for axis, (down, right) in zip(axes[-1], numbers["shifts"][0] if numbers["shifts"] else (), strict=False):
        axis.set_xlabel(f"shifted by {down}, {right}", fontsize=9, labelpad=1)
    return figure, numbers


def latent_reconstruction(study: Study):
    """CAE Figure 4: the whole image encoded and, past the regressor, decoded; several runs one below another."""
    images, rows, numbers = study.pictures(study.count(8)), {}, {}
    for run in study.runs:
        if not hasattr(run.method, "reconstruct"):
            raise Absent(f"{run.label} has no regressor to leave out; give a run of CAE's kind")
        encoder, tokenizer, x = run.encoder, run.method.tokenizer, centred(images, run.encoder.image_size)
        original = rows.setdefault("original", augment.denormalize(x))
        with torch.no_grad():
            made = run.method.reconstruct(x).float()  # (B, N, codes or P)
        if tokenizer is None:
            if run.method.config.norm_pixels:  # nothing is hidden: each patch may have its own statistics back
                made = to_pixels(made, patchify(x, encoder.patch_size), None, encoder.grid, true_statistics=True)
            made = augment.denormalize(unpatchify(made, encoder.patch_size, encoder.grid)).clamp(0, 1)
        elif tokenizer.decoder is None:
            raise Absent(f"{run.label} predicts tokens that nothing here can draw; give a run with pixels or a dvae")
        else:
            tokens, made = tokenizer.tokens(token_images(images, encoder.grid)), made.argmax(dim=2)
            numbers[f"{run.label}: tokens right"] = (made == tokens).float().mean().item()
            rows["from its true tokens"] = tokenizer.images(tokens, encoder.grid)
            made = tokenizer.images(made, encoder.grid)
        rows[run.label] = made
        error = F.interpolate(made, original.shape[2:]) - original
        numbers[f"{run.label}: squared error"] = rounded(error.square().mean(dim=(1, 2, 3)))
    return gallery("Encoded whole, decoded without the regressor (CAE, Figure 4)", rows)[0], numbers


def token_images(images, grid: tuple[int, int]) -> Tensor:
    return augment.center_crop_resize(images, dvae.STRIDE * grid[0])


def token_usage(study: Study):
    """Which codes a d-VAE uses, most frequent first; a codebook in full use would follow the dashed line."""
    images, numbers = study.pictures(study.count(500)), {}
    figure, ((axis,),) = canvas()
    for run in study.runs:
        own = hasattr(run.method.encoder, "tokens")
        tokenizer = run.method.encoder if own else getattr(run.method, "tokenizer", None)
        if tokenizer is None:
            raise Absent(f"{run.label} has no codebook; give a run of a d-VAE, or of a method that uses one")
        grid, codes = run.method.grid if own else run.encoder.grid, tokenizer.settings["codes"]
        parts = (images[i : i + 64] for i in range(0, len(images), 64))
        tokens = torch.cat([tokenizer.tokens(token_images(part, grid)) for part in parts])
        count, code = tokens.flatten().bincount(minlength=codes).sort(descending=True)
        used, perplexity, share = int((count > 0).sum()), dvae.perplexity(tokens, codes).item(), count / tokens.numel()
        label = f"{run.label}: {used} of {codes} used, perplexity {perplexity:.0f}"
        axis.plot(range(1, used + 1), share[:used].tolist(), label=label, markersize=3)
        axis.axhline(1 / codes, color="0.4", linestyle="--", linewidth=1)
        numbers[run.label] = {"codes": codes, "used": used, "perplexity": perplexity}
        numbers[run.label] |= {"by_frequency": code[:used].tolist(), "shares": rounded(share[:used])}
    axis.set(yscale="log", xlabel="code, by frequency", ylabel="share of all tokens")
    axis.set_title(f"Use of the codebook over {len(images)} images (dashed: all codes alike)")
    axis.legend()
    return figure, numbers


# ------------------------------------------------------------------------------------------ figures: where it looks


def attention_map(study: Study):
    """CAE Figure 6: the last block's attention from the class token (or a patch), with the region of half its mass."""
    images, mass, query = study.pictures(study.count(8)), study.args.mass, study.args.query
    rows, regions, numbers = {"input": augment.center_crop_resize(images, study.encoders[0][1].image_size)}, [], {}
    for label, encoder in study.encoders:
        h, w = encoder.grid
        if query and not (query[0] < h and query[1] < w):
            raise InputError(f"query {query[0]},{query[1]}: outside of {label}'s {h} x {w} patches; count from 0,0")
        (maps,) = encoder_maps(encoder, images, encoder.blocks[-1:])
        attention = maps[:, :, 1 + query[0] * w + query[1] if query else 0, 1:].mean(dim=1)  # (B, N)
        region = mass_region(attention, mass)
        rows[label], share = attention.unflatten(1, (h, w)), region.double().mean(dim=1)
        regions.append(region.unflatten(1, (h, w)))
        numbers[label] = {"share_of_patches": rounded(share), "mean": share.mean().item(), "maps": rounded(rows[label])}
    asks = f"patch {query[0]},{query[1]}" if query else "the class token"
    title = f"Attention of {asks} in the last block, mean over heads; outlined: {mass:.0%} of its mass"
    figure, axes = gallery(title, rows, "share of the patches inside the outline")
    for row, kept in zip(axes[1:], regions, strict=True):
        for axis, region in zip(row, kept, strict=True):
            outline(axis, region, colors="white", linewidths=3)
            outline(axis, region, colors="#1f4fff", linewidths=1.5)
            axis.set_xlabel(f"{region.double().mean():.0%}", labelpad=1)
            if query:
                circle(axis, *query)
    return figure, numbers


def attention_distances(study: Study):
    """LC-MAE Figures 5 and 6: mean attention distance of each layer of the encoder; dots are heads."""
    images, heads = study.pictures(study.count(32)), {}
    for label, encoder in study.encoders:
        found = []
        for i in range(0, len(images), 16):
            maps = encoder_maps(encoder, images[i : i + 16], encoder.blocks)
            found.append(torch.stack([attention_distance(m, encoder.grid, encoder.patch_size) for m in maps], dim=1))
        heads[label] = torch.cat(found).mean(dim=0)  # (layers, heads)
    series = {label: x.mean(dim=1).tolist() for label, x in heads.items()}
    figure, axis = lines("Attention distance of the encoder; dots: heads", "layer", "mean distance (pixels)", series)
    for line, x in zip(axis.get_lines(), heads.values(), strict=True):
        layers = torch.arange(1, 1 + len(x))[:, None].expand_as(x)
        axis.scatter(layers.tolist(), x.tolist(), s=10, color=line.get_color(), alpha=0.4)
    return figure, {label: {"pixels": series[label], "heads": rounded(x)} for label, x in heads.items()}


def decoder_similarities(study: Study):
    """LC-MAE Figure 2, Eq. (7): how alike a decoder layer's attention is in different images, under one mask."""
    images, series = study.pictures(study.count(32)), {}
    if len(images) < 2:
        raise InputError("images 1: cannot be compared with another; give at least 2")
    for run in study.runs:
        mask, found = run.decoder and run.masks(images, alike=True), []
        for i in range(0, len(images), 16):
            maps = decoder_maps(run, images[i : i + 16], Mask(*(side[i : i + 16] for side in mask)))
            found.append([m[:, :, 1 + mask.masked[0], 1:].transpose(1, 2) for m in maps])  # (B, k, h, n) each
        series[run.label] = [decoder_similarity(torch.cat(parts)) for parts in zip(*found, strict=True)]
    title = "Attention of mask tokens: similarity between images (LC-MAE, Eq. 7)"
    return lines(title, "decoder layer that attends", "mean cosine", series)[0], series


def semantic_similarities(study: Study):
    """LC-MAE Figure 3, Eq. (8): how alike patches are to each other in a decoder layer and in a reference encoder."""
    if not study.reference:
        raise Absent("needs an encoder to compare with, as DINO's; give --reference PATH")
    images, series, (name, reference) = study.pictures(study.count(32)), {}, study.reference[0]
    for run in study.runs:
        layers = decoder_features(run, images, run.decoder and run.masks(images))
        if reference.grid != run.encoder.grid:  # as many patches for the reference, from larger or smaller images
            size = run.encoder.grid[0] * reference.patch_size
            reference = weights.load_encoder(study.args.reference, study.device, size)
        theirs = features(reference, images, of="patches")
        series[run.label] = [semantic_similarity(theirs, layer) for layer in layers]
    title = f"Similarities between patches: decoder layers and {name} (LC-MAE, Eq. 8)"
    return lines(title, "decoder layer", "mean cosine", series)[0], series


def decoder_attention(study: Study):
    """LC-MAE Figure 4: where the mask tokens of two places look, in up to five decoder layers, mean over heads."""
    run, images = study.only(), study.pictures(study.count(2))
    mask, (h, w), p = run.decoder and run.masks(images, alike=True), run.encoder.grid, run.encoder.patch_size
    maps = [m.mean(dim=1) for m in decoder_maps(run, images, mask)]  # (B, 1 + N, 1 + N) each
    layers, masked, numbers = spaced(len(maps), 5).tolist(), mask.masked[0].sort().values, []
    pictures = augment.center_crop_resize(images, run.encoder.image_size)
    seen = greyed(pictures, mask, p, (h, w))
    asked = [(q, i) for q in masked[[len(masked) // 3, 2 * len(masked) // 3]].tolist() for i in range(len(images))]
    columns = 2 + len(layers)
    figure, axes = canvas(len(asked), columns, height=0.7 + len(asked) * (0.25 + WIDTH / max(6, columns)))
    figure.suptitle(f"Attention of a mask token (circle) in the decoder of {run.label}, mean over heads")
    for row, (q, i) in zip(axes, asked, strict=True):
        show(row[0], pictures[i])
        show(row[1], seen[i])
        circle(row[1], (q // w + 0.5) * p - 0.5, (q % w + 0.5) * p - 0.5)
        for axis, layer in zip(row[2:], layers, strict=True):
            cls, patches = maps[layer][i, 1 + q, 0].item(), maps[layer][i, 1 + q, 1:].view(h, w)
            show(axis, patches)
            circle(axis, q // w, q % w)
            axis.set_xlabel(f"class token {cls:.0%}", fontsize=9, labelpad=1)
            about = {"image": i, "row": q // w, "column": q % w, "layer": layer + 1}
            numbers.append(about | {"class_token": cls, "patches": rounded(patches)})
    for axis, name in zip(axes[0], ["input", "masked", *(f"layer {layer + 1}" for layer in layers)], strict=True):
        axis.set_title(name)
    return figure, {"attention": numbers}


# ------------------------------------------------------------------------------------------ figures: what it learned


def class_distance_plots(study: Study):
    """CMAE §4.7, Figure 6: distances within and between classes, a dot a class, means in the legend."""
    images, labels = study.labelled(study.count(500), 50)
    figure, axes = canvas(2, 2, height=6.0)
    figure.suptitle(
        f"1 - cosine of the features, {len(images)} images, {len(labels.unique())} classes (CMAE, Figure 6)"
    )
    titles = {"intra": "between images of a class", "inter": "between class centres"}
    panels = [(f"{which}_{what}", f"{title}: {name}") for which, title in titles.items()
              for what, name in (("mean", "mean"), ("std", "standard deviation"))]  # fmt: skip
    numbers = {"images": len(images), "classes": [study.val.classes[c] for c in labels.unique()]}
    for label, encoder in study.encoders:
        found = class_distances(features(encoder, images).cpu(), labels)
        numbers[label] = {key: {"mean": x.mean().item(), "of_classes": rounded(x)} for key, x in found.items()}
        for axis, (key, title) in zip(axes.flat, panels, strict=True):
            axis.plot(found[key].tolist(), linestyle="", label=f"{label}: {found[key].mean():.4f}")
            axis.set(title=title, xlabel="class", ylabel="distance")
    for axis in axes.flat:
        axis.set_ylim(0, max(1.4 * axis.dataLim.y1, 1e-6))
        axis.legend(loc="upper right", ncols=2)
    return figure, numbers


def feature_plots(study: Study):
    """Features in the plane, by principal components or t-SNE (CAE Figure 5): of images, or of their patches.

    A patch has the colour of its image's class, as the sets here have no segmentation.
    """
    of, by = study.args.of, study.args.projection
    images, labels = study.labelled(study.count(500 if of == "images" else 50), 10)
    figure, axes = canvas(1, len(study.encoders), height=1.6 + 6 / len(study.encoders) ** 0.7)
    figure.suptitle(f"Features of {len(images)} images" + (", patch by patch" if of == "patches" else ""))
    numbers = {"labels": labels.tolist()}
    for axis, (label, encoder) in zip(axes[0], study.encoders, strict=True):
        x = features(encoder, images, of).cpu()
        every, x = labels.repeat_interleave(x[..., 0].numel() // len(x)), x.flatten(0, -2)
        names, numbers[label] = ["t-SNE 1", "t-SNE 2"], {}
        if by == "pca":
            points, share = pca(x)
            names, numbers[label]["variance"] = (
                [f"component {i} ({v:.0%})" for i, v in enumerate(share, 1)],
                rounded(share),
            )
        else:
            points = tsne(x, study.runs[0].settings.seed)
        numbers[label]["points"] = rounded(points)
        for c in labels.unique():
            axis.plot(*points[every == c].T.numpy(), linestyle="", label=short(study.val.classes[c]), alpha=0.7,
                      markersize=5 if of == "images" else 2.5)  # fmt: skip
        axis.set(title=label, xlabel=names[0], ylabel=names[1])
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, markerscale=1.5)
    return figure, numbers


def neighbours(study: Study, k: int = 6):
    """The training images closest to validation images, by the cosine of their features: what kNN votes by."""
    run, val, train = study.only(), study.val, study.train
    asked, bank = spaced(len(val), study.count(6)), spaced(len(train), 1000)
    queries, images = val.images(asked, study.device), train.images(bank, study.device)
    x, y = (F.normalize(features(run.encoder, some), dim=1).cpu() for some in (queries, images))
    cosines, at = (x @ y.T).topk(min(k, len(bank)), dim=1)  # (queries, k)
    own, theirs, size = val.labels.cpu()[asked], train.labels.cpu()[bank][at], run.encoder.image_size
    same = theirs == own[:, None]
    figure, axes = canvas(len(asked), 1 + at.shape[1], height=0.7 + 1.55 * len(asked))
    right = same.double().mean().item()
    figure.suptitle(f"Nearest of {len(bank)} training images by {run.label}; boxed: of the same class ({right:.0%})")
    for i, row in enumerate(axes):
        show(row[0], augment.center_crop_resize(queries[i : i + 1], size)[0])
        row[0].set_title(f"query\n{short(val.classes[own[i]])}", fontsize=9)
        for j, (axis, place) in enumerate(zip(row[1:], at[i].tolist(), strict=True)):
            show(axis, augment.center_crop_resize(images[place : place + 1], size)[0])
            axis.set_title(f"{cosines[i, j]:.3f}\n{short(train.classes[theirs[i, j]])}", fontsize=9)
            if same[i, j]:
                frame(axis, (0, 0, 1, 1), size)
    numbers = {"queries": asked.tolist(), "neighbours": bank[at].tolist(), "cosines": rounded(cosines)}
    return figure, numbers | {"same_class": right}


FIGURES = {
    "reconstruction": reconstruction,
    "curves": curves,
    "views": views,
    "attention-map": attention_map,
    "attention-distance": attention_distances,
    "decoder-similarity": decoder_similarities,
    "semantic-similarity": semantic_similarities,
    "decoder-attention": decoder_attention,
    "class-distances": class_distance_plots,
    "features": feature_plots,
    "latent-reconstruction": latent_reconstruction,
    "token-usage": token_usage,
    "neighbours": neighbours,
}

# The figures that an option is for; given for another it would do nothing, and is refused.
FOR = {
    "keep_visible": {"reconstruction"},
    "statistics": {"reconstruction"},
    "query": {"attention-map"},
    "mass": {"attention-map"},
    "reference": {"attention-map", "attention-distance", "semantic-similarity", "class-distances", "features"},
    "projection": {"features"},
    "of": {"features"},
    "images": set(FIGURES) - {"curves"},
}


# ----------------------------------------------------------------------------------------------------------- command


def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Draw the papers' figures of runs.", allow_abbrev=False)
    add = parser.add_argument
    add("--run", required=True, nargs="+", metavar="RUN", help="run directories; several share the axes")
    add("--figure", required=True, metavar="NAME", choices=[*FIGURES, "all"], help=f"all, or {', '.join(FIGURES)}")
    add("--to", metavar="FILE.png", help="where to; if not given, RUN/figures/NAME.png of the first run")
    add("--images", type=int, metavar="N", help="how many; each figure has a number of its own")
    add("--data", metavar="SET", help="other images than the first run's, named as for train.py")
    add("--data-root", metavar="DIR", help="where they are now")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where to work")
    add = parser.add_argument_group("of some figures").add_argument
    keep = argparse.BooleanOptionalAction
    add("--keep-visible", action=keep, help="reconstruction: visible patches as they are [yes]")
    add("--statistics", choices=["visible", "true"], help="reconstruction: of visible neighbours [yes], or true ones")
    add("--query", metavar="ROW,COLUMN", help="attention-map: of a patch, not of the class token")
    add("--mass", type=float, metavar="SHARE", help="attention-map: inside the outline [0.5]")
    add("--reference", metavar="PATH", help="an encoder to compare with: a run, or weights that weights.py reads")
    add("--projection", choices=["pca", "tsne"], help="features: principal components [yes] or t-SNE")
    add("--of", choices=["images", "patches"], help="features: of images [yes] or of their patches")
    args = parser.parse_args(argv)
    for name, figures in FOR.items():
        if getattr(args, name) is not None and args.figure not in figures | {"all"}:
            good = ", ".join(sorted(figures))
            raise InputError(f"--{name.replace('_', '-')}: says nothing to {args.figure}; leave it out, or draw {good}")
    for name, value in dict(keep_visible=True, statistics="visible", mass=0.5, projection="pca", of="images").items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.images is not None and args.images < 1:
        raise InputError(f"images {args.images}: must be at least 1")
    if not 0 < args.mass <= 1:
        raise InputError(f"mass {args.mass:g}: must be above 0 and at most 1")
    if args.query is not None:
        if not re.fullmatch(r"\d+,\d+", args.query):
            raise InputError(f"query {args.query!r}: not a patch; give its row and column, as in 3,4")
        args.query = tuple(map(int, args.query.split(",")))
    if args.to and (args.figure == "all" or Path(args.to).suffix != ".png"):
        raise InputError(f"to {args.to}: must end in .png, and take one figure, not all")
    return args


def draw(name: str, study: Study, file: Path) -> None:
    """One figure to its PNG, and its numbers to the JSON beside it."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure, numbers = FIGURES[name](study)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{file.parent}: cannot be written ({error.strerror}); give another --to") from None
        files.write_whole(file, lambda out: figure.savefig(out, format="png"))
    about = {"figure": name, "runs": [str(run.directory) for run in study.runs]}
    files.write_text(file.with_suffix(".json"), json.dumps(about | numbers) + "\n")


def main() -> None:
    args = options()
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError('matplotlib: not installed, and figures need it; pip install ".[plots]"')
    study = Study(args, process.start(args.device))
    for name in FIGURES if args.figure == "all" else [args.figure]:
        file = Path(args.to or study.runs[0].directory / "figures" / f"{name}.png")
        try:
            draw(name, study, file)
            print(f"{name:22} {file}", flush=True)
        except Absent as reason:
            if args.figure != "all":
                raise InputError(f"{name}: {reason}") from None
            print(f"{name:22} skipped: {reason}", flush=True)
    process.stop()


if __name__ == "__main__":
    process.command(main)
