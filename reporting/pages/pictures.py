"""Pictures in their place: what a step draws, where its views are cut from, what a trained decoder fills in."""

import base64
import io
from html import escape
from unittest import mock

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import cmae_loc
from common import StepRandom
from figures.plots import batch_pictures, picture_names
from inputs import augment
from reporting.pages.flow import Step
from reporting.pages.source import Source

ZOOM = 2  # the boxes' lines are one pixel of an enlarged picture


def drawn(step: Step) -> str:
    """The images with the crops that are cut from them, then every view and mask of the batch; heat maps and boxes."""
    method, n = step.method, len(step.images)
    with mock.patch.object(augment, "crop_resize", wraps=augment.crop_resize) as crop:
        batch = method.draw(step.images, torch.arange(n), StepRandom(0, 0, n))
    whole = step.images / 255
    places = torch.stack([call.args[1] for call in crop.call_args_list]).unique(dim=0)
    framed = whole.repeat_interleave(ZOOM, 2).repeat_interleave(ZOOM, 3)
    for boxes in places:
        framed = outlined(framed, boxes * ZOOM)
    rows = {"images, and what is cut from them": framed}
    crop_by = getattr(method.config, "crop_by", "none")
    if crop_by != "none":
        with torch.no_grad():
            heat = cmae_loc.HEAT[crop_by](method.encoder, augment.normalize(whole)).unflatten(1, method.encoder.grid)
        top, left, bottom, right = cmae_loc.locate(heat, whole.shape[2:], method.config.crop_threshold).T * len(
            framed[0, 0]
        )
        heat = heat / heat.amax(dim=(1, 2), keepdim=True)
        heat = F.interpolate(heat[:, None], framed.shape[2:], mode="bilinear").expand(-1, 3, -1, -1)
        boxes = torch.stack([top, left, bottom - top, right - left], dim=1)
        rows["heat map M of the encoder, and the box around it"] = outlined(heat, boxes)
    patch = getattr(method, "student", method.encoder)
    return strips(rows | batch_pictures(batch, whole, getattr(patch, "patch_size", 8)))


def filled_in(step: Step) -> str:
    """What a method's `picture` shows, of the batch of its step; nothing where it has learned nothing to see."""
    picture = step.method.eval().picture(step.batch)
    return "" if picture is None else strips(picture_names(step.method, picture)[0])


def outlined(pictures: Tensor, boxes: Tensor) -> Tensor:
    """Boxes (top, left, height, width) in pixels, in white within black."""
    pictures = pictures.clone()
    for picture, box in zip(pictures, boxes.round().long().tolist(), strict=True):
        (top, left), (bottom, right) = box[:2], (box[0] + box[2] - 1, box[1] + box[3] - 1)
        for edge, value in ((0, 0.0), (1, 1.0)):
            rows, columns = slice(top + edge, bottom + 1 - edge), slice(left + edge, right + 1 - edge)
            for y in (top + edge, bottom - edge):
                picture[:, y, columns] = value
            for x in (left + edge, right - edge):
                picture[:, rows, x] = value
    return pictures


def strips(rows: dict[str, Tensor]) -> str:
    """Each row as one small picture with its name."""
    found = ""
    for name, pictures in rows.items():
        pixels = (torch.cat([*pictures.detach().float().clamp(0, 1)], dim=2) * 255).round().byte().permute(1, 2, 0)
        file = io.BytesIO()
        Image.fromarray(pixels.contiguous().numpy()).save(file, "webp", quality=86)
        data = base64.b64encode(file.getvalue()).decode()
        size = f'width="{len(pictures) * 64}" height="64"'
        found += f'<p><img src="data:image/webp;base64,{data}" alt="" {size}><span>{escape(name)}</span></p>'
    return f'<figure class="pictures">{found}</figure>'


def places(of: Source, name: str) -> tuple[int, int]:
    """The last lines of a method's `draw` and `picture`."""
    return tuple(of.definitions[f"{name}.{member}"].last for member in ("draw", "picture"))
