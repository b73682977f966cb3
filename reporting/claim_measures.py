"""What `reproduce.py --measure` takes from a run beyond accuracies: the numbers behind the papers' claims."""

import statistics

import torch
import torch.nn.functional as F

from common import patchify, take
from downstream.protocols import knn, linear_probe, of_all
from figures import measures


def pixels(study) -> dict:
    """The bar below all encoders: the probes on the image as 8 x 8 average colours."""
    size, device = study.runs[0].settings.image_size, study.device

    def colours(images):
        return F.adaptive_avg_pool2d(images, 8).flatten(1)

    halves = [of_all(colours, half.to(device), size, device) for half in (study.train, study.val)]
    found = (*halves[0], *halves[1], len(study.train.classes))
    return {"knn": knn(*found)["top1"], "linear": linear_probe(*found)["top1"]}


def attention(study) -> dict:
    """The encoder's attention distance in pixels, mean over images, heads and layers (LC-MAE, Figure 6)."""
    encoder = study.runs[0].encoder
    return {"distance": measures.attention_distances(encoder, study.batches(32)).mean().item()}


def positions(study) -> dict:
    """How alike mask tokens attend in different images: in the decoder's first layer, and later (LC-MAE, Eq. 7)."""
    alike = measures.decoder_similarity(measures.mask_token_maps(study.runs[0], study.batches(32)))
    return {"first": alike[0], "later": statistics.mean(alike[1:])}


@torch.no_grad()
def latents(study) -> dict:
    """Squared error of whole images that are encoded and, the regressor skipped, decoded (CAE, Figure 4)."""
    run = study.runs[0]
    x = measures.centred(study.pictures(64), run.encoder)
    made = run.method.reconstruct(x).float()
    return {"error": (made - patchify(x, run.encoder.patch_size)).square().mean().item()}


def classes(study) -> dict:
    """Distances within and between classes (CMAE, Figure 6)."""
    images, labels = study.labelled(500, 50)
    found = measures.class_distances(measures.features(study.runs[0].encoder, images).cpu(), labels)
    return {key: of_classes.mean().item() for key, of_classes in found.items()}


@torch.no_grad()
def spread(study) -> dict:
    """Deviation of v·√d over images at one place, v of length 1: 0 where v has collapsed (LC-MAE, §3.3)."""
    run, images = study.runs[0], study.pictures(64)
    x, mask = measures.centred(images, run.encoder), run.masks(images, alike=True)
    tokens, h = run.method.decode(x, mask)
    v = run.method.projector(h if run.method.config.project == "pixels" else tokens)  # (B, M, d)
    v = F.normalize(v.float(), dim=2) * v.shape[2] ** 0.5
    return {"deviation": v.var(dim=0, correction=0).mean().sqrt().item()}


def variance(study) -> dict:
    """Shares of the variance of the encoder's patch tokens: by place, by image, and the rest."""
    tokens = measures.features(study.runs[0].encoder, study.batches(256), of="patches")
    return measures.variance_shares(tokens)


@torch.no_grad()
def keys(study) -> dict:
    """Share of hidden patches found among the keys of their image; and, by place alone, among another's (ConMIM)."""
    run = study.runs[0]
    batch = run.draw(study.pictures(256))
    anchors = F.normalize(take(run.method.anchors(batch.images, batch.mask), batch.mask.masked), dim=2)
    own = F.normalize(run.method.keys(batch.full_images), dim=2)
    sides = {"own": own, "another": own.roll(len(own) // 2, dims=0)}  # half the set away: mostly of another class
    found = {name: (anchors @ side.mT).argmax(dim=2) for name, side in sides.items()}
    return {name: (places == batch.mask.masked).double().mean().item() for name, places in found.items()}


MEASURES = {m.__name__: m for m in (pixels, attention, positions, latents, classes, spread, variance, keys)}
