"""The figures, one function each: (study) → the matplotlib figure, and the numbers that it shows.

First what a run does, then where it looks, what its encoder has learned, and last how it is drawn. A run that cannot
have a figure is told so by `Absent`: runs are asked for a decoder or a regressor, not for the name of their method.
"""

import re
import statistics
import textwrap
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import cmae_loc
import mae
from common import Mask, pair, patchify, unpatchify
from figures import measures
from figures.encoders_and_images import Absent, Study, spaced
from inputs import augment
from runtime.command_line import field_comments

WIDTH = 9.0  # inches, of 100 pixels
STYLE = Path(__file__).with_name("style.mplstyle")


def curves(study: Study):
    """The loss, its parts, what was measured beside them, and the learning rate along training."""
    logs, leave = {run.label: run.log for run in study.runs}, {"step", "epoch", "images_per_second", "seconds"}
    names = list(dict.fromkeys(key for log in logs.values() for row in log for key in row if key not in leave))
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
        title = {"lr": "learning rate", "knn": "kNN, per cent"}.get(name, name.replace("_", " "))
        axis.set(title=title, xlabel="epoch")
    axes[0, 0].legend()
    keys = ["step", "epoch", *names]
    return figure, {label: {key: [row.get(key) for row in log] for key in keys} for label, log in logs.items()}


def fine_tuning(study: Study):
    """CMAE Figure 5: top-1 accuracy of the validation images along fine-tuning; of several seeds, the mean.

    Training from random weights (`evaluate.py --protocol supervised`) is drawn beside it where it was done.
    """
    numbers = {}
    for run in study.runs:
        for name, tops in run.fine_tuned.items():
            label = run.label if name == "finetune" else f"{run.label}, {name}"
            numbers[label] = {"epoch": list(tops), "top1": [statistics.mean(top1) for top1 in tops.values()]}
    figure, ((axis,),) = canvas()
    for label, points in numbers.items():
        axis.plot(points["epoch"], points["top1"], label=label, markevery=0.1)
    axis.set(title="Fine-tuning (CMAE, Figure 5)", xlabel="epoch", ylabel="top-1 accuracy, per cent")
    axis.legend()
    return figure, numbers


def reconstruction(study: Study):
    """The rows of reconstruction.png: for most methods what a decoder makes of what is hidden (as MAE's Figure 2)."""
    run, images = study.only(), study.pictures(study.args.images or 8)
    batch = run.draw(images)
    if isinstance(getattr(run.method, "decoder", None), mae.Decoder):
        batch = batch._replace(images=measures.centred(images, run.encoder))
    picture = run.method.picture(batch)
    if picture is None:
        raise Absent(f"{run.label} was taught nothing that can be seen; give a run that predicts pixels or tokens")
    rows, about = picture_names(run.method, picture)
    return gallery(f"Reconstruction by {run.label}", rows, about if "row 1" in rows else "")[0], {"rows": about}


def picture_names(method, picture: Tensor) -> tuple[dict[str, Tensor], str]:
    """The rows of a method's `picture` by the names that its docstring has for them, and these words."""
    about = " ".join(method.picture.__doc__.split("\n\n")[0].split()).split(": ", 1)[-1]
    names = about.rstrip(".").split(", ")
    named = len(names) == len(picture)
    return {names[i] if named else f"row {i + 1}": row for i, row in enumerate(picture)}, about


def batch_pictures(batch, whole: Tensor, p: int) -> dict[str, Tensor]:
    """The pictures in a batch, (B, 3, H, W) in [0, 1], by what the comments of its fields say; `whole`: uncropped."""
    rows, comments, view = {}, field_comments(type(batch)), whole
    for name, value in batch._asdict().items():
        about = re.sub(r"\(B, 3, [^)]*\)|in \[0, 1\]|, normalised|;.*|None:.*", "", comments.get(name, "")).strip(" ,")
        about = name.replace("_", " ") + (f": {about}" if about else "")
        if isinstance(value, Mask):
            rows[f"{about}; grey is hidden"] = greyed(view, value, p, (view.shape[2] // p, view.shape[3] // p))
        elif isinstance(value, Tensor) and value.ndim == 4:
            rows[about] = view = value if value.min() >= 0 else augment.denormalize(value)  # below 0: normalised
    return rows


def views(study: Study):
    """What each branch sees of the training images: crops, shifts, colours, masks; ContrastiveCrop's map and box."""
    run, method, at = study.only(), study.runs[0].method, spaced(len(study.train), study.args.images or 6)
    size, p = pair(run.settings.image_size), run.settings.patch_size
    grid = size[0] // p, size[1] // p
    images, study.shown["train"] = study.train.images(at, study.device), at.tolist()
    spies = (mock.patch.object(augment, f, wraps=getattr(augment, f)) for f in ("crop_resize", "shift_crop"))
    with next(spies) as crop, next(spies) as shift:  # remember where the views are cut from
        batch = run.draw(images, None if study.args.data else at)
    crops = [call.args[1].cpu() for call in crop.call_args_list]
    crops = [c for i, c in enumerate(crops) if not any(torch.equal(c, other) for other in crops[:i])]
    sizes = torch.as_tensor(augment.sizes(images)).expand(len(images), 2)
    whole = augment.crop_resize(images, F.pad(sizes, (2, 0)), size)
    rows = {"training image, crops": whole} | batch_pictures(batch, whole, p)
    numbers = {"crops": [c.tolist() for c in crops], "shifts": [call.args[1].tolist() for call in shift.call_args_list]}
    if (crop_by := getattr(method.config, "crop_by", "none")) != "none":
        with torch.no_grad():
            heat = cmae_loc.HEAT[crop_by](method.encoder, augment.normalize(whole)).unflatten(1, grid)
        boxes = cmae_loc.locate(heat, size, method.config.crop_threshold)  # top, left, bottom, right
        rows["heat map and box"] = heat
        numbers |= {"heat": rounded(heat), "boxes": rounded(boxes)}
    figure, axes = gallery(f"What {run.label} is shown in one step", rows)
    for places, line in zip(crops, ("-", "--", ":"), strict=False):
        for axis, box in zip(axes[0], places / sizes.repeat(1, 2), strict=True):
            frame(axis, box, size, line)
    for axis, (top, left, bottom, right) in zip(axes[-1], numbers.get("boxes", ()), strict=False):
        frame(axis, (top, left, bottom - top, right - left), grid)
    for axis, (down, right) in zip(axes[-1], next(iter(numbers["shifts"]), ()), strict=False):
        axis.set_xlabel(f"shifted by {down}, {right}", fontsize=9, labelpad=1)
    return figure, numbers


def latent_reconstruction(study: Study):
    """CAE Figure 4: the whole image encoded and, past the regressor, decoded; several runs one below another."""
    images, rows, numbers = study.pictures(study.args.images or 8), {}, {}
    for run in study.runs:
        if not hasattr(run.method, "reconstruct"):
            raise Absent(f"{run.label} has no regressor to leave out; give a run of CAE's kind")
        encoder, tokenizer, x = run.encoder, run.method.tokenizer, measures.centred(images, run.encoder)
        original = rows.setdefault("original", augment.denormalize(x))
        with torch.no_grad():
            made = run.method.reconstruct(x).float()  # (B, N, codes or P)
        if tokenizer is None:
            if run.method.config.norm_pixels:  # nothing is hidden: each patch may have its own statistics back
                variance, mean = torch.var_mean(patchify(x, encoder.patch_size), dim=2, keepdim=True)
                made = made * (variance + 1e-6).sqrt() + mean
            with augment.views_for(encoder):
                made = augment.denormalize(unpatchify(made, encoder.patch_size, encoder.grid)).clamp(0, 1)
        elif tokenizer.decoder is None:
            raise Absent(f"{run.label} predicts tokens that nothing here can draw; give a run with pixels or a dvae")
        else:
            small = augment.center_crop_resize(images, run.method.token_size)
            tokens, made = tokenizer.tokens(small), made.argmax(dim=2)
            numbers[f"{run.label}: tokens right"] = (made == tokens).float().mean().item()
            rows["from its true tokens"] = tokenizer.images(tokens, encoder.grid)
            made = tokenizer.images(made, encoder.grid)
        rows[run.label] = made
        error = F.interpolate(made, original.shape[2:]) - original
        numbers[f"{run.label}: squared error"] = rounded(error.square().mean(dim=(1, 2, 3)))
    return gallery("Encoded whole, decoded without the regressor (CAE, Figure 4)", rows)[0], numbers


def attention_map(study: Study):
    """CAE Figure 6: the last block's attention from the class token, with the region of half its mass."""
    images = study.pictures(study.args.images or 8)
    rows, regions, numbers = {"input": augment.center_crop_resize(images, study.encoders[0][1].image_size)}, [], {}
    for label, encoder in study.encoders:
        (maps,) = measures.encoder_maps(encoder, images, encoder.blocks[-1:])
        attention = maps[:, :, 0, 1:].mean(dim=1)  # (B, N)
        region = measures.mass_region(attention, 0.5)
        rows[label], share = attention.unflatten(1, encoder.grid), region.double().mean(dim=1)
        regions += region.unflatten(1, encoder.grid)
        numbers[label] = {"share_of_patches": rounded(share), "mean": share.mean().item(), "maps": rounded(rows[label])}
    title = "Attention of the class token in the last block, mean over heads; outlined: 50% of its mass"
    figure, axes = gallery(title, rows, "share of the patches inside the outline")
    for axis, region in zip(axes[1:].flat, regions, strict=True):
        outline(axis, region)
        axis.set_xlabel(f"{region.double().mean():.0%}", labelpad=1)
    return figure, numbers


def attention_distance(study: Study):
    """LC-MAE Figures 5 and 6: mean attention distance of each layer of the encoder; dots are heads."""
    n = study.args.images or 32
    heads = {label: measures.attention_distances(encoder, study.batches(n)) for label, encoder in study.encoders}
    series = {label: x.mean(dim=1).tolist() for label, x in heads.items()}
    figure, axis = lines("Attention distance of the encoder; dots: heads", "layer", "mean distance (pixels)", series)
    for line, x in zip(axis.get_lines(), heads.values(), strict=True):
        layers = torch.arange(1, 1 + len(x))[:, None].expand_as(x)
        axis.scatter(layers.tolist(), x.tolist(), s=10, color=line.get_color(), alpha=0.4)
    return figure, {label: {"pixels": series[label], "heads": rounded(x)} for label, x in heads.items()}


def decoder_similarity(study: Study):
    """LC-MAE Figure 2, Eq. (7): how alike a decoder layer's attention is in different images, under one mask."""
    maps = {run.label: measures.mask_token_maps(run, study.batches(study.args.images or 32)) for run in study.runs}
    series = {label: measures.decoder_similarity(its) for label, its in maps.items()}
    title = "Attention of mask tokens: similarity between images (LC-MAE, Eq. 7)"
    return lines(title, "decoder layer that attends", "mean cosine", series)[0], series


def semantic_similarity(study: Study):
    """LC-MAE Figure 3, Eq. (8): how alike patches are to each other in a decoder layer and in a reference encoder."""
    if not study.args.reference:
        raise Absent("needs an encoder to compare with, as DINO's; give --reference PATH")
    series, one = {}, len(study.args.reference) == 1
    for run in study.runs:
        for name, reference in study.references(run.decoder and run.encoder.grid):
            terms = []
            for step, part in enumerate(study.batches(study.args.images or 32)):
                theirs = measures.features(reference, [part], of="patches")
                layers = measures.decoder_features(run, part, run.masks(part, step=step))
                terms.append(torch.stack([measures.semantic_similarity(theirs, layer) for layer in layers]))
            series[run.label if one else f"{run.label}, {name}"] = torch.cat(terms, dim=1).mean(dim=1).tolist()
    title = f"Similarities between patches: decoder layers and {name if one else 'references'} (LC-MAE, Eq. 8)"
    return lines(title, "decoder layer", "mean cosine", series)[0], series


def decoder_attention(study: Study):
    """LC-MAE Figure 4: where the mask tokens of two places look, in up to five decoder layers, mean over heads."""
    run, images = study.only(), study.pictures(study.args.images or 2)
    mask, (h, w), p = run.decoder and run.masks(images, alike=True), run.encoder.grid, run.encoder.patch_size
    maps = [m.mean(dim=1) for m in measures.decoder_maps(run, images, mask)]  # (B, 1 + N, 1 + N) each
    layers, masked, rows, numbers = layers_of_figure_4(len(maps)), mask.masked[0].sort().values, {}, []
    pictures = augment.center_crop_resize(images, run.encoder.image_size)
    seen = greyed(pictures, mask, p, (h, w))
    for q in masked[[len(masked) // 3, 2 * len(masked) // 3]].tolist():
        for i in range(len(images)):
            looks = [maps[layer - 1][i, 1 + q] for layer in layers]  # (1 + N,) each
            rows[f"image {i}, patch {q // w},{q % w}"] = [pictures[i], seen[i], *(x[1:].view(h, w) for x in looks)]
            about = {"image": i, "row": q // w, "column": q % w}
            numbers += [about | {"layer": layer, "class_token": x[0].item(), "patches": rounded(x[1:].view(h, w))}
                        for layer, x in zip(layers, looks, strict=True)]  # fmt: skip
    title = f"Attention of a mask token (circle) in the decoder of {run.label}, mean over heads"
    figure, axes = gallery(title, rows, "below each map: the share of the attention that the class token gets")
    for axis, name in zip(axes[0], ["input", "masked", *(f"layer {layer}" for layer in layers)], strict=True):
        axis.set_title(name)
    for axis, look in zip(axes[:, 2:].flat, numbers, strict=True):
        circle(axis, look["row"], look["column"])
        axis.set_xlabel(f"{look['class_token']:.0%}", fontsize=9, labelpad=1)
    for axis, look in zip(axes[:, 1], numbers[:: len(layers)], strict=True):
        circle(axis, *((look[side] + 0.5) * p - 0.5 for side in ("row", "column")))
    return figure, {"attention": numbers}


def layers_of_figure_4(depth: int) -> list[int]:
    """At most five layers, counted from 1, evenly spaced by their logarithm: 1, 2, 3, 5, 8 of 8, as in the paper."""
    return sorted({round(depth ** (i / 4)) for i in range(5)})


def class_distances(study: Study):
    """CMAE §4.7, Figure 6: distances within and between classes, a dot a class, means in the legend.

    For each run after the first: in how many classes its distance to other centres is larger (the paper: 811 of 1000).
    """
    numbers, first = {}, {}
    figure, axes = canvas(2, 2, height=6.0)
    titles = {"intra": "between images of a class", "inter": "between class centres"}
    panels = [(f"{which}_{what}", f"{title}: {name}") for which, title in titles.items()
              for what, name in (("mean", "mean"), ("std", "standard deviation"))]  # fmt: skip
    for label, encoder in study.encoders:
        images, labels = study.labelled(study.args.images or 500, study.args.classes)
        found = measures.class_distances(measures.features(encoder, images).cpu(), labels)
        first = first or found
        larger = int((found["inter_mean"] > first["inter_mean"]).sum())
        numbers[label] = {key: {"mean": x.mean().item(), "of_classes": rounded(x)} for key, x in found.items()}
        numbers[label]["inter_larger_than_first"] = larger
        for axis, (key, title) in zip(axes.flat, panels, strict=True):
            more = f" (above {study.encoders[0][0]} in {larger})" * (key == "inter_mean" and found is not first)
            axis.plot(found[key].tolist(), linestyle="", label=f"{label}: {found[key].mean():.4f}{more}")
            axis.set(title=title, xlabel="class", ylabel="distance")
    for axis in axes.flat:
        axis.set_ylim(0, max((1.1 + 0.14 * len(study.encoders)) * axis.dataLim.y1, 1e-6))  # the legend is above dots
        axis.legend(loc="upper right")
    names = [study.val.classes[c] for c in labels.unique()]
    figure.suptitle(f"1 - cosine of the features, {len(labels)} images, {len(names)} classes (CMAE, Figure 6)")
    return figure, {"classes": names} | numbers


def token_variance(study: Study):
    """What the patch tokens of the encoder tell apart: shares of their variance by place, by image, and the rest."""
    n, shares = study.args.images or 256, {}
    for label, encoder in study.encoders:
        shares[label] = measures.variance_shares(measures.features(encoder, study.batches(n), of="patches"))
    figure, ((axis,),) = canvas(height=1.4 + 0.4 * len(shares))
    begins = [0.0] * len(shares)
    for part in ("place", "image", "rest"):
        widths = [its[part] for its in shares.values()]
        axis.barh(list(shares), widths, left=begins, label=part)
        begins = [begin + width for begin, width in zip(begins, widths, strict=True)]
    axis.set(title="Variance of the encoder's patch tokens", xlabel="share")
    axis.legend()
    return figure, shares


def features(study: Study):
    """Features of images in the plane, by principal components or t-SNE, coloured by their classes.

    With --pixels, of their patches (CAE Figure 5), coloured by what most of a patch's pixels are: the ten most
    frequent labels, at most 1000 patches of each. The paper has 500 images and the labels of ADE20K.
    """
    maps, of = study.args.pixels, "patches" if study.args.pixels else "images"
    n, numbers = study.args.images or (500 if of == "images" else 50), {}
    figure, axes = canvas(1, len(study.encoders), height=1.6 + 6 / len(study.encoders) ** 0.7)
    for axis, (label, encoder) in zip(axes[0], study.encoders, strict=True):
        images, labels = study.label_maps(n) if maps else study.labelled(n, 10)
        x = measures.features(encoder, images, of).cpu()
        if maps:
            every = torch.cat([measures.patch_labels(one, encoder.image_size, encoder.patch_size) for one in labels])
            kinds, count = every[every < 255].unique(return_counts=True)
            most = kinds[count.argsort(descending=True, stable=True)[:10]]
            at = torch.cat([(every == c).nonzero()[:1000, 0] for c in most])
            every, x = every[at], x.flatten(0, 1)[at]
        else:
            every, numbers["labels"] = labels, labels.tolist()
        names, numbers[label] = ["t-SNE 1", "t-SNE 2"], {"labels": every.tolist()} if maps else {}
        if study.args.projection == "pca":
            points, share = measures.pca(x)
            names = [f"component {i} ({v:.0%})" for i, v in enumerate(share, 1)]
            numbers[label]["variance"] = rounded(share)
        else:
            points = measures.tsne(x, study.runs[0].settings.seed)
        numbers[label]["points"] = rounded(points)
        for c in every.unique().tolist():
            name = f"label {c}" if maps else textwrap.shorten(study.val.classes[c].split(",")[0], 17, placeholder="…")
            axis.plot(*points[every == c].T.numpy(), linestyle="", label=name, alpha=0.7,
                      markersize=5 if of == "images" else 2.5)  # fmt: skip
        axis.set(title=label, xlabel=names[0], ylabel=names[1])
    figure.suptitle(f"Features of {len(labels)} images" + (", patch by patch" if of == "patches" else ""))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, markerscale=1.5)
    return figure, numbers


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


def gallery(title: str, rows: dict[str, Tensor | list], caption: str = ""):
    """Rows of n pictures (3, H, W) or maps (h, w), each named at its left; returns the figure and its axes."""
    first = next(iter(rows.values()))
    n, (h, w) = len(first), first[0].shape[-2:]
    figure, axes = canvas(len(rows), n, height=0.8 + len(rows) * (WIDTH - 1.5) / max(n, 4) * h / w)
    figure.suptitle(title)
    figure.supxlabel(textwrap.fill(caption, 120), fontsize=10)
    for row, (name, pictures) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(row, pictures, strict=True):
            x = picture.detach().float().cpu()
            axis.imshow((x.permute(1, 2, 0).clamp(0, 1) if x.ndim == 3 else x).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            axis.grid(False)
        row[0].set_ylabel(textwrap.fill(name, 18), rotation=0, ha="right", va="center", multialignment="right")
    return figure, axes


def frame(axis, box, size: tuple[int, int], style: str = "-") -> None:
    """A rectangle (top, left, height, width), given as shares of the sides of what is shown, a picture or a map."""
    from matplotlib.patches import Rectangle

    top, left, height, width = (float(x) * side for x, side in zip(box, size * 2, strict=True))
    for how in (dict(color="white", linewidth=3.5), dict(color="black", linewidth=1.5, linestyle=style)):
        axis.add_patch(Rectangle((left - 0.5, top - 0.5), width, height, fill=False, clip_on=False, **how))


def outline(axis, region: Tensor) -> None:
    """The border of a region bool (h, w) of a map's cells."""
    cells = region.cpu().float().repeat_interleave(16, 0).repeat_interleave(16, 1)  # so that corners are square
    y, x = (((torch.arange(side + 2) - 0.5) / 16 - 0.5).tolist() for side in cells.shape)
    for color, width in (("white", 3), ("#1f4fff", 1.5)):
        axis.contour(x, y, F.pad(cells, (1, 1, 1, 1)).numpy(), levels=[0.5], colors=color, linewidths=width)


def circle(axis, row: float, column: float) -> None:
    axis.plot(column, row, "o", color="red", markersize=9, fillstyle="none", markeredgewidth=2)


def greyed(pictures: Tensor, mask: Mask, p: int, grid: tuple[int, int]) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] with their hidden patches grey."""
    return unpatchify(patchify(pictures, p).masked_fill(mask.hidden()[:, :, None], 0.5), p, grid)


def rounded(x) -> list:
    return torch.as_tensor(x).cpu().double().mul(1e6).round().div(1e6).tolist()
