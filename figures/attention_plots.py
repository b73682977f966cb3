"""Where encoders and decoders look: their attention as maps, distances and similarities (CAE Figure 6, LC-MAE §4)."""

import torch

from figures import measures
from figures.drawing import WIDTH, canvas, circle, gallery, greyed, lines, outline, rounded, show
from figures.study import Absent, Study
from inputs import augment
from runtime.errors import InputError


def attention_map(study: Study):
    """CAE Figure 6: the last block's attention from the class token (or a patch), with the region of half its mass."""
    images, mass, query = study.pictures(study.count(8)), study.args.mass, study.args.query
    rows, regions, numbers = {"input": augment.center_crop_resize(images, study.encoders[0][1].image_size)}, [], {}
    for label, encoder in study.encoders:
        h, w = encoder.grid
        if query and not (query[0] < h and query[1] < w):
            raise InputError(f"query {query[0]},{query[1]}: outside of {label}'s {h} x {w} patches; count from 0,0")
        (maps,) = measures.encoder_maps(encoder, images, encoder.blocks[-1:])
        attention = maps[:, :, 1 + query[0] * w + query[1] if query else 0, 1:].mean(dim=1)  # (B, N)
        region = measures.mass_region(attention, mass)
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
    images = study.batches(study.count(32))
    heads = {label: measures.attention_distances(encoder, images) for label, encoder in study.encoders}
    series = {label: x.mean(dim=1).tolist() for label, x in heads.items()}
    figure, axis = lines("Attention distance of the encoder; dots: heads", "layer", "mean distance (pixels)", series)
    for line, x in zip(axis.get_lines(), heads.values(), strict=True):
        layers = torch.arange(1, 1 + len(x))[:, None].expand_as(x)
        axis.scatter(layers.tolist(), x.tolist(), s=10, color=line.get_color(), alpha=0.4)
    return figure, {label: {"pixels": series[label], "heads": rounded(x)} for label, x in heads.items()}


def decoder_similarities(study: Study):
    """LC-MAE Figure 2, Eq. (7): how alike a decoder layer's attention is in different images, under one mask."""
    images = study.batches(study.count(32))
    series = {run.label: measures.decoder_similarity(measures.mask_token_maps(run, images)) for run in study.runs}
    title = "Attention of mask tokens: similarity between images (LC-MAE, Eq. 7)"
    return lines(title, "decoder layer that attends", "mean cosine", series)[0], series


def semantic_similarities(study: Study):
    """LC-MAE Figure 3, Eq. (8): how alike patches are to each other in a decoder layer and in a reference encoder."""
    if not study.args.reference:
        raise Absent("needs an encoder to compare with, as DINO's; give --reference PATH")
    images, series, one = study.batches(study.count(32)), {}, len(study.args.reference) == 1
    for run in study.runs:
        for name, reference in study.references(run.decoder and run.encoder.grid):
            terms = []
            for step, part in enumerate(images):
                theirs = measures.features(reference, [part], of="patches")
                layers = measures.decoder_features(run, part, run.masks(part, step=step))
                terms.append(torch.stack([measures.semantic_similarity(theirs, layer) for layer in layers]))
            series[run.label if one else f"{run.label}, {name}"] = torch.cat(terms, dim=1).mean(dim=1).tolist()
    title = f"Similarities between patches: decoder layers and {name if one else 'references'} (LC-MAE, Eq. 8)"
    return lines(title, "decoder layer", "mean cosine", series)[0], series


def decoder_attention(study: Study):
    """LC-MAE Figure 4: where the mask tokens of two places look, in up to five decoder layers, mean over heads."""
    run, images = study.only(), study.pictures(study.count(2))
    mask, (h, w), p = run.decoder and run.masks(images, alike=True), run.encoder.grid, run.encoder.patch_size
    maps = [m.mean(dim=1) for m in measures.decoder_maps(run, images, mask)]  # (B, 1 + N, 1 + N) each
    layers, masked, numbers = figure_4_layers(len(maps)), mask.masked[0].sort().values, []
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
            cls, patches = maps[layer - 1][i, 1 + q, 0].item(), maps[layer - 1][i, 1 + q, 1:].view(h, w)
            show(axis, patches)
            circle(axis, q // w, q % w)
            axis.set_xlabel(f"class token {cls:.0%}", fontsize=9, labelpad=1)
            about = {"image": i, "row": q // w, "column": q % w, "layer": layer}
            numbers.append(about | {"class_token": cls, "patches": rounded(patches)})
    for axis, name in zip(axes[0], ["input", "masked", *(f"layer {layer}" for layer in layers)], strict=True):
        axis.set_title(name)
    return figure, {"attention": numbers}


def figure_4_layers(depth: int) -> list[int]:
    """At most five layers, counted from 1, evenly spaced by their logarithm: 1, 2, 3, 5, 8 of 8, as in the paper."""
    return sorted({round(depth ** (i / 4)) for i in range(5)})
