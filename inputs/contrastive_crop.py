"""ContrastiveCrop's geometry (Peng et al., arXiv 2202.03278): where an object lies, and crops around it."""

import torch
import torch.nn.functional as F
from torch import Tensor


def locate(heat: Tensor, size: tuple[int, int], k: float) -> Tensor:
    """I = F(1[M > k]), Eq. 1 of The other CMAE: heat map M (B, h, w) → box (B, 4) of what exceeds k.

    A box is top, left, bottom, right, as shares of the sides. Each map is stretched to [0, 1], enlarged bilinearly to
    the image, and framed from the first to the last row and column that somewhere exceed k, as in ContrastiveCrop.
    Where nothing exceeds k, the box is the whole image.
    """
    low, high = heat.amin((1, 2), keepdim=True), heat.amax((1, 2), keepdim=True)
    heat = (heat - low) / (high - low).clamp(min=torch.finfo(heat.dtype).tiny)
    hot = F.interpolate(heat[:, None], size, mode="bilinear")[:, 0] > k  # (B, H, W)
    ends = []
    for line in (hot.any(dim=2).int(), hot.any(dim=1).int()):  # rows (B, H), columns (B, W)
        n = line.shape[1]
        ends.append(torch.stack([line.argmax(dim=1), n - 1 - line.flip(1).argmax(dim=1)], dim=1) / n)  # first, last
    boxes = torch.stack(ends, dim=2).flatten(1)  # (B, 2, 2) → (B, 4)
    whole = heat.new_tensor([0.0, 0.0, 1.0, 1.0])
    return torch.where(hot.any(dim=2).any(dim=1, keepdim=True), boxes, whole)


def place_crops(crops: Tensor, sizes, boxes: Tensor, beta: Tensor) -> Tensor:
    """R_crop, Eq. 1 of The other CMAE: int64 (B, 4) crops (top, left, height, width) keep their size and move.

    A crop's centre moves over its box (B, 4) as far as the crop stays in its image; `beta` (B, 2) in [0, 1] says where
    from end to end. Drawn from Beta(α, α) with α < 1 it crowds at the ends: centre-suppressed. `sizes`, of the images,
    is (H, W) or int64 (B, 2). ContrastiveCrop leaves RandomResizedCrop's rare fallback in the middle; here that moves.
    """
    sides, lengths = torch.as_tensor(sizes).expand(len(crops), 2), crops[:, 2:]  # of images, of crops: (B, 2)
    room = sides - lengths
    low, high = ((edge * sides).long() - lengths // 2 for edge in boxes.split(2, dim=1))  # top left, bottom right
    low, high = low.clamp(min=0).minimum(room), high.clamp(min=0).minimum(room)
    return torch.cat([low + ((high - low) * beta).long(), lengths], dim=1)
