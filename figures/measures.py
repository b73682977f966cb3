"""What the figures measure: each definition of a paper is one function, and needs no plot.

Where the papers are unclear, and what stands here
- LC-MAE's attention distance leaves out the class token as query and as key, and each query's weights over the patches
  are brought back to a sum of one: an average distance in pixels, between the centres of patches.
- LC-MAE Eq. (7) compares the attention of mask tokens to patches. Eq. (8) compares what leaves a decoder block (before
  the norm), on masked images, with the last layer of the reference (after its norm), on whole ones.
- LC-MAE Eq. (8) takes a "normalized cosine similarity matrix", "following CutLER". Here that matrix holds the cosines
  as they are, the diagonal included, without CutLER's threshold. CutLER compares the keys of DINO's last attention;
  Eq. (8) speaks of features, and so the outputs of the last block are compared here.
- CMAE's class distances (§4.7) do not say which distance: here 1 - cosine, of the mean of the patch tokens.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor

import mae
from common import Attention, Mask, ViT, take
from inputs import augment
from runtime.errors import InputError


def centred(images, encoder: ViT) -> Tensor:
    """uint8 images → what an encoder sees of them in evaluation, normalised: (B, 3, *its image size)."""
    with augment.views_for(encoder):
        return augment.normalize(augment.center_crop_resize(images, encoder.image_size))


@torch.no_grad()
def features(encoder: ViT, batches: Iterable, of: str = "images") -> Tensor:
    """uint8 images → the mean of each one's patch tokens (n, D), as in evaluate.py, or of="patches": (n, N, D)."""
    parts = (encoder(centred(images, encoder))[:, 1:].float() for images in batches)
    return torch.cat([tokens if of == "patches" else tokens.mean(dim=1) for tokens in parts])


@torch.no_grad()
def calls(parts, work: Callable) -> list[tuple]:
    """(module, its arguments, its named arguments, its result) of each of the modules while `work()` runs them."""
    found = []
    with ExitStack() as hooks:
        for part in parts:
            hooks.enter_context(part.register_forward_hook(lambda *call: found.append(call), with_kwargs=True))
        work()
    return found


def attention_weights(part: Attention, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √d + bias), which `common.Attention` uses but does not return. (B, T, D) → (B, heads, T, T)"""
    q, k, _ = part.qkv(x).unflatten(2, (3, part.heads, -1)).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(2, 3)).float() * q.shape[3] ** -0.5
    return (scores if bias is None else scores + bias).softmax(dim=3)


@torch.no_grad()
def attention_maps(parts, work: Callable) -> list[Tensor]:
    """The attention weights of each `common.Attention` among `parts` while `work()` runs it: (B, heads, T, T) each."""
    return [attention_weights(part, *arguments, **named) for part, arguments, named, _ in calls(parts, work)]


def encoder_maps(encoder: ViT, images, blocks) -> list[Tensor]:
    """Attention of these blocks of the encoder on whole images: (B, heads, 1 + N, 1 + N) each."""
    return attention_maps([block.attn for block in blocks], lambda: encoder(centred(images, encoder)))


def decoding(run, images, mask: Mask) -> tuple[Callable, Tensor]:
    """What applies a run's decoder, and where its sequence has class token and patches, in raster order: (B, 1 + N).

    MAE's has the visible patches first; one with a `features` of its own works in raster order (cmae_loc.py).
    """
    decoder, x = run.decoder, centred(images, run.encoder)
    first = type(decoder).features is mae.Decoder.features
    places = mask.order().argsort(dim=1) if first else mask.order().sort(dim=1).values
    return lambda: decoder.features(run.encoder(x, mask.visible), mask), F.pad(places + 1, (1, 0))


def decoder_maps(run, images, mask: Mask) -> list[Tensor]:
    """Attention of each layer of a run's decoder that attends, in raster order: (B, heads, 1 + N, 1 + N) each."""
    work, order = decoding(run, images, mask)
    maps = attention_maps([block.attn for block in run.decoder.blocks if isinstance(block.attn, Attention)], work)
    rows, columns = order[:, None, :, None], order[:, None, None, :]
    return [m.gather(2, rows.expand_as(m)).gather(3, columns.expand_as(m)) for m in maps]


def decoder_features(run, images, mask: Mask) -> list[Tensor]:
    """What leaves each block of a run's decoder, patches in raster order: (B, N, width) each."""
    work, order = decoding(run, images, mask)
    return [take(x, order[:, 1:]) for *_, x in calls(run.decoder.blocks, work)]


def mask_token_maps(run, batches: Iterable) -> Iterator[list[Tensor]]:
    """LC-MAE §4.1: for each batch of images, all under one mask, what the mask tokens attend to in each decoder layer.

    (B, k, heads, n) a layer, for k mask tokens and n patches: A_l of Eq. (7).
    """
    mask = None
    for images in batches:  # the first batch is the largest
        mask = mask or (run.decoder and run.masks(images, alike=True))
        maps = decoder_maps(run, images, Mask(*(side[: len(images)] for side in mask)))
        yield [m[:, :, 1 + mask.masked[0], 1:].transpose(1, 2) for m in maps]


def attention_distance(maps: Tensor, grid: tuple[int, int], p: int) -> Tensor:
    """LC-MAE §4.2: how far, in pixels, patches look for what they attend to. (B, heads, 1 + N, 1 + N) → (B, heads).

    Σ_j a_ij d_ij / Σ_j a_ij over the patches j, averaged over the patches i; d_ij lies between their centres.
    """
    place = torch.cartesian_prod(*(torch.arange(side, device=maps.device).float() for side in grid))  # (N, 2)
    apart = (place[:, None] - place).square().sum(dim=2).sqrt() * p  # (N, N)
    among = maps[:, :, 1:, 1:]
    return ((among * apart).sum(dim=3) / among.sum(dim=3)).mean(dim=2)


def attention_distances(encoder: ViT, batches: Iterable) -> Tensor:
    """The attention distance of an encoder's blocks and heads, mean over images: (layers, heads), in pixels."""
    every = (encoder_maps(encoder, images, encoder.blocks) for images in batches)
    found = [torch.stack([attention_distance(m, encoder.grid, encoder.patch_size) for m in maps], 1) for maps in every]
    return torch.cat(found).mean(dim=0)


def mass_region(attention: Tensor, mass: float) -> Tensor:
    """CAE Figure 6: the fewest patches that hold a share `mass` of the attention. (…, N) → bool (…, N)."""
    largest, order = attention.cpu().double().sort(dim=-1, descending=True, stable=True)
    before = largest.cumsum(dim=-1) - largest  # what the larger ones hold already
    keep = before < mass * largest.sum(dim=-1, keepdim=True) - 1e-12
    return torch.zeros_like(keep).scatter(-1, order, keep)


def decoder_similarity(batches: Iterable[list[Tensor]]) -> list[float]:
    """S_attn, LC-MAE Eq. (7), of each layer: the mean cosine between the attention maps of two images.

    Batches of (B, k, heads, n) a layer, as `mask_token_maps` gives them. Unit vectors u_i make Eq. (7)
    (‖Σ u_i‖² - I) / (I (I - 1)), so that one vector a layer is kept, however many images there are.
    """
    sums, images = 0, 0
    for layers in batches:
        units = F.normalize(torch.stack(layers).flatten(2).cpu().double(), dim=2)  # (layers, B, k · heads · n)
        sums, images = sums + units.sum(dim=1), images + units.shape[1]
    if images < 2:
        raise InputError(f"images {images}: cannot be compared with another; give at least 2")
    return ((sums.square().sum(dim=1) - images) / (images * (images - 1))).tolist()


def semantic_similarity(reference: Tensor, features: Tensor) -> Tensor:
    """The terms of S_sim, LC-MAE Eq. (8): cos(W_ref, W_dec) of each image, W (n, n) the cosines between its patches.

    (images, n, D) of the reference and (images, n, width) of a decoder layer, both in raster order → (images,).
    """
    x, y = (F.normalize(some.cpu().double(), dim=2) for some in (features, reference))
    return F.cosine_similarity((x @ x.mT).flatten(1), (y @ y.mT).flatten(1), dim=1)


def class_distances(features: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """CMAE §4.7 and Figure 6, for each class: mean and standard deviation of the distances between its images (intra),
    and of those from its centre to the other centres (inter). Every class needs two images.
    (n, D), (n,) → float64 (classes,) each. The deviation divides by the number of distances.
    """
    groups = [features[labels == c].double() for c in labels.unique()]
    if len(groups) < 2 or min(map(len, groups)) < 2:
        raise InputError("class distances: need two classes with two images each; give more --images")
    centres = torch.stack([group.mean(dim=0) for group in groups])
    units = [F.normalize(group, dim=1) for group in (*groups, centres)]
    *inside, between = (1 - unit @ unit.T for unit in units)
    inside = [d[tuple(torch.triu_indices(*d.shape, 1))] for d in inside]  # each pair of images once
    between = between[~torch.eye(len(groups), dtype=torch.bool)].view(len(groups), -1)  # (classes, classes - 1)
    return {
        "intra_mean": torch.stack([d.mean() for d in inside]),
        "intra_std": torch.stack([d.std(correction=0) for d in inside]),
        "inter_mean": between.mean(dim=1),
        "inter_std": between.std(dim=1, correction=0),
    }


def variance_shares(tokens: Tensor) -> dict[str, float]:
    """(images, places, D) → the shares of the tokens' variance: by place, by image, and the rest.

    The two-way analysis of variance: of the means of places, of the means of images; the shares sum to 1.
    """
    x = tokens.double() - tokens.double().mean(dim=(0, 1))
    parts = {"place": x.mean(dim=0), "image": x.mean(dim=1)}
    shares = {name: (mean.square().mean() / x.square().mean()).item() for name, mean in parts.items()}
    return shares | {"rest": 1 - sum(shares.values())}


def patch_labels(labels: Tensor, size, p: int) -> Tensor:
    """CAE, appendix B: a label map (1, H, W) → the label of more than half of the pixels of each patch of what
    `centred` takes, in raster order, or 255 where there is none: (N,)."""
    kinds = labels.unique()
    maps = (labels == kinds[:, None, None, None]).to(torch.uint8) * 255  # (kinds, 1, H, W)
    share, kind = F.avg_pool2d(augment.center_crop_resize(maps, size), p).flatten(1).max(dim=0)
    return torch.where(share > 0.5, kinds[kind], 255)


def pca(x: Tensor) -> tuple[Tensor, Tensor]:
    """(n, D) → its first two principal components (n, 2), and the share of variance in each (2,). Signs are fixed."""
    u, s, v = torch.linalg.svd((x - x.mean(dim=0)).double(), full_matrices=False)
    signs = v.gather(1, v.abs().argmax(dim=1, keepdim=True)).sign()[:, 0]  # a direction's largest entry is positive
    return (u * s * signs)[:, :2], (s.square() / s.square().sum())[:2]


def tsne(x: Tensor, seed: int) -> Tensor:
    """(n, D) → (n, 2), by scikit-learn, which starts from the first two principal components."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise InputError('scikit-learn: missing, and t-SNE needs it; pip install ".[plots]"') from None
    perplexity = min(30.0, (len(x) - 1) / 3)
    return torch.from_numpy(TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(x.cpu().numpy()))
