"""Images held in memory, on any device: one flat tensor of pixels, so that images of any sizes lie in one place."""

import torch
from torch import Tensor

from common import upload


def pack(images: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Images (3, H_i, W_i) end to end as one flat uint8 tensor, and their sizes, int64 (B, 2)."""
    return torch.cat([image.reshape(-1) for image in images]), torch.tensor([image.shape[1:] for image in images])


class Packed:
    """Images held in memory: one flat uint8 tensor on any device, and their sizes (N, 2) on the CPU."""

    def __init__(self, flat: Tensor, sizes: Tensor):
        self.flat, self.sizes = flat, sizes
        self.ends = 3 * sizes.prod(dim=1).cumsum(0)  # (N,) where each image ends in `flat`
        self.uniform = bool((sizes == sizes[:1]).all())

    def __len__(self) -> int:
        return len(self.sizes)

    def first(self, n: int) -> "Packed":
        return Packed(self.flat[: 3 * int(self.sizes[:n].prod(dim=1).sum())], self.sizes[:n])

    def view(self, i: int) -> Tensor:
        (h, w), end = self.sizes[i].tolist(), int(self.ends[i])
        return self.flat[end - 3 * h * w : end].view(3, h, w)

    def images(self, index: Tensor, device: torch.device) -> Tensor | list[Tensor]:
        """(B,) → uint8 (B, 3, H, W) if all images of the set have one size, else a list of (3, H_i, W_i)."""
        if self.uniform:
            whole = self.flat.view(-1, 3, *self.sizes[0].tolist())
            rows = upload(index, whole.device)
            return whole.index_select(0, rows).to(device)  # moves rows, where [index] moves numbers
        flat, sizes = pack([self.view(i) for i in index.tolist()])
        batch = Packed(flat.to(device), sizes)  # one transfer
        return [batch.view(i) for i in range(len(batch))]
