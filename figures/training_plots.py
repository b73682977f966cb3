"""What a run does: its losses, the views that it is shown, what it makes of what is hidden, the codes that it uses."""

import re
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import cmae_loc
import dvae
import mae
from common import Mask, patchify, restore, unpatchify
from figures.drawing import canvas, frame, gallery, greyed, rounded
from figures.measures import centred, to_pixels
from figures.study import Absent, Run, Study, spaced
from inputs import augment
from runtime.command_line import field_comments
from runtime.errors import InputError


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
    run, method, at = study.only(), study.runs[0].method, spaced(len(study.train), study.count(6))
    images, size = study.train.images(study.take("train", at).index, study.device), run.settings.image_size
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
    images, numbers = study.batches(study.count(500)), {}
    figure, ((axis,),) = canvas()
    for run in study.runs:
        own = hasattr(run.method.encoder, "tokens")
        tokenizer = run.method.encoder if own else getattr(run.method, "tokenizer", None)
        if tokenizer is None:
            raise Absent(f"{run.label} has no codebook; give a run of a d-VAE, or of a method that uses one")
        grid, codes = run.method.grid if own else run.encoder.grid, tokenizer.settings["codes"]
        tokens = torch.cat([tokenizer.tokens(token_images(part, grid)) for part in images])
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
