"""reconstruction.png: what a method predicts for eight images, drawn again as training goes on."""

from pathlib import Path

import torch

from common import StepRandom
from runtime import files
from runtime.ranks import rank


class Pictures:
    """Eight images of the set, their masks and what the method predicts, the same images and masks each time."""

    def __init__(self, image_set, method: torch.nn.Module, seed: int, image_size: int, device, n: int = 8):
        if rank() > 0:
            return
        index = torch.linspace(0, len(image_set) - 1, n).long()
        with torch.no_grad():
            nowhere = torch.full((n,), -1)  # these images have no place in the training set
            rng = StepRandom(seed, 2**40, n, None, device)
            self.batch = method.draw(image_set.images(index, device), nowhere, rng)
        self.method, self.zoom = method, max(1, 128 // image_size)

    def draw(self, directory: Path) -> None:
        if rank() > 0:
            return
        self.method.eval()
        rows = self.method.picture(self.batch)  # (rows, n, 3, H, W)
        self.method.train()
        if rows is None:
            return
        from torchvision.utils import make_grid, save_image  # here: the first step need not wait for it

        grid = make_grid(rows.flatten(0, 1).cpu(), nrow=rows.shape[1], padding=2, pad_value=1.0)
        grid = grid.repeat_interleave(self.zoom, dim=1).repeat_interleave(self.zoom, dim=2)
        files.write_whole(directory / "reconstruction.png", lambda file: save_image(grid, file, format="png"))
