"""What the figures are made of: axes, rows of pictures, maps, frames and outlines, by matplotlib."""

import textwrap

import torch
import torch.nn.functional as F
from torch import Tensor

from common import Mask, patchify, unpatchify

WIDTH = 9.0  # inches, of 100 pixels
STYLE = {  # colours differ in lightness, lines and classes also in their markers, so that grey prints tell them apart
    "savefig.dpi": 100, "font.size": 10, "axes.titlesize": 10, "figure.titlesize": 12, "legend.frameon": False,
    "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False,
    "image.cmap": "cividis", "lines.markersize": 5,
    "axes.prop_cycle": "cycler(color=['#0b3c6f', '#d55e00', '#009e73', '#cc79a7', '#56b4e9', '#8a6d00', '#000000', "
    "'#e69f00', '#7f7f7f', '#7b3294'], marker=['o', 's', '^', 'D', 'v', 'P', 'X', '*', '<', '>'])",
}  # fmt: skip


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


def show(axis, picture: Tensor) -> None:
    """A picture (3, H, W) in [0, 1] or a map (h, w), without ticks."""
    x = picture.detach().float().cpu()
    axis.imshow((x.permute(1, 2, 0).clamp(0, 1) if x.ndim == 3 else x).numpy(), interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    axis.grid(False)


def gallery(title: str, rows: dict[str, Tensor | list], caption: str = ""):
    """Rows of n pictures (3, H, W) or maps (h, w), each named at its left; returns the figure and its axes."""
    n = len(next(iter(rows.values())))
    figure, axes = canvas(len(rows), n, height=0.8 + len(rows) * (WIDTH - 1.5) / max(n, 4))
    figure.suptitle(title)
    figure.supxlabel(textwrap.fill(caption, 120), fontsize=10)
    for row, (name, pictures) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(row, pictures, strict=True):
            show(axis, picture)
        row[0].set_ylabel(textwrap.fill(name, 18), rotation=0, ha="right", va="center", multialignment="right")
    return figure, axes


def frame(axis, box, size: int, style: str = "-") -> None:
    """A rectangle (top, left, height, width), given as shares of what is shown at `size` pixels a side."""
    from matplotlib.patches import Rectangle

    top, left, height, width = (float(x) * size for x in box)
    for color, line in (("white", 3.5), ("black", 1.5)):  # seen on any ground
        how = dict(color=color, linewidth=line, linestyle=style if color == "black" else "-")
        axis.add_patch(Rectangle((left - 0.5, top - 0.5), width, height, fill=False, clip_on=False, **how))


def outline(axis, region: Tensor, fine: int = 16) -> None:
    """The border of a region bool (h, w) of a map's cells."""
    cells = region.cpu().float().repeat_interleave(fine, 0).repeat_interleave(fine, 1)
    y, x = (((torch.arange(side + 2) - 0.5) / fine - 0.5).tolist() for side in cells.shape)
    for color, width in (("white", 3), ("#1f4fff", 1.5)):
        axis.contour(x, y, F.pad(cells, (1, 1, 1, 1)).numpy(), levels=[0.5], colors=color, linewidths=width)


def circle(axis, row: float, column: float) -> None:
    axis.plot(column, row, "o", color="red", markersize=9, fillstyle="none", markeredgewidth=2)


def greyed(pictures: Tensor, mask: Mask, p: int, grid: tuple[int, int]) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] with their hidden patches grey."""
    return unpatchify(patchify(pictures, p).masked_fill(mask.hidden[:, :, None], 0.5), p, grid)


def short(name: str) -> str:
    return textwrap.shorten(name.split(",")[0], 17, placeholder="…")


def rounded(x) -> list:
    return torch.as_tensor(x).cpu().double().mul(1e6).round().div(1e6).tolist()
