"""What a decoder predicts for masked patches, as pictures: the rows of reconstruction.png."""

import torch
from torch import Tensor

from common import Mask, ViT, patchify, take, unpatchify
from inputs import augment


def visible_statistics(patches: Tensor, mask: Mask, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Mean and variance (B, M, 1) that the visible patches suggest for each masked one: Gaussian weights of 1 patch.

    Un-normalising a prediction with the true mean and variance of the hidden patch would show what the model never saw.
    """
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)  # (B, N, 1)
    place = torch.cartesian_prod(*(torch.arange(side, device=patches.device).float() for side in grid))  # (N, 2)
    weight = (-torch.cdist(place[mask.masked], place[mask.visible]).square() / 2).softmax(dim=-1)  # (B, M, V)
    return weight @ take(mean, mask.visible), weight @ take(variance, mask.visible)


def picture_rows(images: Tensor, mask: Mask, predicted: Tensor, encoder: ViT, norm: bool, *more) -> Tensor:
    """Originals, masked, reconstructed (true visible patches kept) and `more` images: (rows, B, 3, H, W) in [0, 1]."""
    patches, predicted = patchify(images.float(), encoder.patch_size), predicted.float()
    if norm:
        mean, variance = visible_statistics(patches, mask, encoder.grid)
        predicted = predicted * (variance + 1e-6).sqrt() + mean
    index = mask.masked[:, :, None].expand_as(predicted)
    masked, filled = patches.scatter(1, index, 0.0), patches.scatter(1, index, predicted)
    rows = [images, *(unpatchify(x, encoder.patch_size, encoder.grid) for x in (masked, filled)), *more]
    return torch.stack([augment.denormalize(x.float()) for x in rows]).clamp(0, 1)
