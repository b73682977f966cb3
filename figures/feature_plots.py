"""What an encoder has learned: its features by class, in the plane, and the images that it finds alike."""

import torch.nn.functional as F

from figures import measures
from figures.drawing import canvas, frame, rounded, short, show
from figures.study import Study, spaced
from inputs import augment


def class_distances(study: Study):
    """CMAE §4.7, Figure 6: distances within and between classes, a dot a class, means in the legend.

    For each run after the first: in how many classes its distance to other centres is larger (the paper: 811 of 1000).
    """
    images, labels = study.labelled(study.count(500), study.args.classes)
    names, numbers = [study.val.classes[c] for c in labels.unique()], {}
    figure, axes = canvas(2, 2, height=6.0)
    figure.suptitle(f"1 - cosine of the features, {len(images)} images, {len(names)} classes (CMAE, Figure 6)")
    titles = {"intra": "between images of a class", "inter": "between class centres"}
    panels = [(f"{which}_{what}", f"{title}: {name}") for which, title in titles.items()
              for what, name in (("mean", "mean"), ("std", "standard deviation"))]  # fmt: skip
    first = {}
    for label, encoder in study.encoders:
        found = measures.class_distances(measures.features(encoder, images).cpu(), labels)
        numbers[label] = {key: {"mean": x.mean().item(), "of_classes": rounded(x)} for key, x in found.items()}
        first = first or found
        larger = numbers[label]["inter_larger_than_first"] = int((found["inter_mean"] > first["inter_mean"]).sum())
        for axis, (key, title) in zip(axes.flat, panels, strict=True):
            more = f", larger in {larger}" * (key == "inter_mean" and found is not first)
            axis.plot(found[key].tolist(), linestyle="", label=f"{label}: {found[key].mean():.4f}{more}")
            axis.set(title=title, xlabel="class", ylabel="distance")
    for axis in axes.flat:
        axis.set_ylim(0, max(1.4 * axis.dataLim.y1, 1e-6))
        axis.legend(loc="upper right", ncols=2)
    return figure, {"classes": names} | numbers


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
        x = measures.features(encoder, images, of).cpu()
        every, x = labels.repeat_interleave(x[..., 0].numel() // len(x)), x.flatten(0, -2)
        names, numbers[label] = ["t-SNE 1", "t-SNE 2"], {}
        if by == "pca":
            points, share = measures.pca(x)
            names = [f"component {i} ({v:.0%})" for i, v in enumerate(share, 1)]
            numbers[label]["variance"] = rounded(share)
        else:
            points = measures.tsne(x, study.runs[0].settings.seed)
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
    queries, bank = study.batches(study.count(6)), study.take("train", spaced(len(train), 1000))
    x, y = (F.normalize(measures.features(run.encoder, some), dim=1).cpu() for some in (queries, bank))
    cosines, at = (x @ y.T).topk(min(k, len(bank)), dim=1)  # (queries, k)
    at, size = bank.index[at], run.encoder.image_size  # positions in the training set
    own, theirs = val.labels.cpu()[queries.index], train.labels.cpu()[at]
    same = theirs == own[:, None]
    figure, axes = canvas(len(queries), 1 + at.shape[1], height=0.7 + 1.55 * len(queries))
    right = same.double().mean().item()
    figure.suptitle(f"Nearest of {len(bank)} training images by {run.label}; boxed: of the same class ({right:.0%})")
    for i, row in enumerate(axes):
        show(row[0], augment.center_crop_resize(val.images(queries.index[i : i + 1]), size)[0])
        row[0].set_title(f"query\n{short(val.classes[own[i]])}", fontsize=9)
        for j, axis in enumerate(row[1:]):
            show(axis, augment.center_crop_resize(train.images(at[i, j : j + 1]), size)[0])
            axis.set_title(f"{cosines[i, j]:.3f}\n{short(train.classes[theirs[i, j]])}", fontsize=9)
            if same[i, j]:
                frame(axis, (0, 0, 1, 1), size)
    numbers = {"queries": queries.index.tolist(), "neighbours": at.tolist(), "cosines": rounded(cosines)}
    return figure, numbers | {"same_class": right}
