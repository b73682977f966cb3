"""Pictures in their place: what a step draws, where its views are cut from, what a trained method makes of them."""

import base64
import io
from html import escape
from unittest import mock

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import cmae_loc
import mae
from common import Mask, StepRandom, ViT, pair
from figures import measures
from figures.plots import batch_pictures, picture_names
from inputs import augment
from reporting.pages.traced_step import Step

ZOOM = 2  # the boxes' lines are three pixels of an enlarged picture
WHITE, ORANGE = (1.0, 1.0, 1.0), (1.0, 0.6, 0.1)


def drawn(step: Step) -> str:
    """The images with what is cut from them, then every view and mask of the batch; heat maps, windows and boxes."""
    method, n = step.method, len(step.images)
    spies = (mock.patch.object(augment, f, wraps=getattr(augment, f)) for f in ("crop_resize", "shift_crop"))
    with next(spies) as crop, next(spies) as shift:
        batch = method.draw(step.images, torch.arange(n), StepRandom(0, 0, n))
    whole = step.images / 255
    framed = enlarged(whole)
    for boxes in torch.stack([call.args[1] for call in crop.call_args_list]).unique(dim=0):
        framed = outlined(framed, boxes * ZOOM)
    rows = {"images; framed: what is cut from them, at times mirrored": framed}
    if shift.called:
        master, offsets, size = shift.call_args.args
        sides = torch.tensor(pair(size)).expand(n, 2)
        windows = outlined(enlarged(master), ZOOM * torch.cat([0 * sides, sides], dim=1))
        windows = outlined(windows, ZOOM * torch.cat([offsets, sides], dim=1), ORANGE)
        rows["the master image, cut from the frame; white: the online window; orange: the target's"] = windows
    crop_by = getattr(method.config, "crop_by", "none")
    if crop_by != "none":
        with torch.no_grad():
            heat = cmae_loc.HEAT[crop_by](method.encoder, augment.normalize(whole)).unflatten(1, method.encoder.grid)
        boxes = cmae_loc.locate(heat, whole.shape[2:], method.config.crop_threshold) * framed.shape[2]
        boxes[:, 2:] -= boxes[:, :2]  # to heights and widths
        rows["heat map M of the encoder, and the box around it"] = outlined(shades(heat, framed.shape[2:]), boxes)
    return strips(rows | batch_pictures(batch, whole, getattr(method.encoder, "patch_size", 8)))


def made(step: Step) -> str:
    """What a trained method's `picture` shows of the batch of its step, and what its encoder attends to."""
    method, images = step.method.eval(), step.batch[0]
    picture, rows, caption = method.picture(step.batch), {}, ""
    if picture is not None:
        rows, about = picture_names(method, picture)
        caption = about if "row 1" in rows else ""
    if isinstance(method.encoder, ViT):
        attention = method.encoder.blocks[-1].attn
        (maps,) = measures.attention_maps([attention], lambda: method.encoder(images))
        maps = maps[:, :, 0, 1:].mean(dim=1).unflatten(1, method.encoder.grid)
        rows["attention of the class token in the last block, mean over heads"] = shades(maps, images.shape[2:])
    mask = next((x for x in step.batch if isinstance(x, Mask)), None)
    if mask and mask.masked.numel() and isinstance(getattr(method, "decoder", None), mae.Decoder):
        rows["attention of the framed hidden patch in the decoder's last block"] = decoding(method, images, mask)
    return strips(rows, caption)


def decoding(method, images: Tensor, mask: Mask) -> Tensor:
    """Which patches one hidden patch of each image looks at in the decoder, mean over heads, with a frame around it."""
    p, (_, width) = method.encoder.patch_size, method.encoder.grid
    with mock.patch.object(measures, "centred", lambda views, _: views):  # they are cropped and normalised already
        *_, maps = measures.decoder_maps(method, images, mask)
    place = mask.masked[:, 0]
    maps = maps.mean(dim=1)[torch.arange(len(place)), 1 + place, 1:].unflatten(1, method.encoder.grid)
    frames = torch.stack([place // width, place % width, *2 * [torch.ones_like(place)]], dim=1) * p * ZOOM
    return outlined(enlarged(shades(maps, images.shape[2:])), frames, ORANGE)


def enlarged(pictures: Tensor) -> Tensor:
    return pictures.repeat_interleave(ZOOM, 2).repeat_interleave(ZOOM, 3)


def shades(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (B, h, w) as pictures (B, 3, *size), white where each is largest."""
    maps = (maps / maps.amax(dim=(1, 2), keepdim=True))[:, None]
    return F.interpolate(maps, size, mode="bilinear").expand(-1, 3, -1, -1)


def outlined(pictures: Tensor, boxes: Tensor, colour: tuple = WHITE) -> Tensor:
    """Boxes (top, left, height, width) in pixels, in a colour within black."""
    pictures = pictures.clone()
    for picture, box in zip(pictures, boxes.round().long().tolist(), strict=True):
        (top, left), (bottom, right) = box[:2], (box[0] + box[2] - 1, box[1] + box[3] - 1)
        for edge, shade in ((0, (0.0, 0.0, 0.0)), (1, colour), (2, colour)):
            rows, columns = slice(top + edge, bottom + 1 - edge), slice(left + edge, right + 1 - edge)
            for y in (top + edge, bottom - edge):
                picture[:, y, columns] = picture.new_tensor(shade)[:, None]
            for x in (left + edge, right - edge):
                picture[:, rows, x] = picture.new_tensor(shade)[:, None]
    return pictures


def strips(rows: dict[str, Tensor], caption: str = "") -> str:
    """Each row as one small picture with its name."""
    found = ""
    for name, pictures in rows.items():
        pixels = (torch.cat([*pictures.detach().float().clamp(0, 1)], dim=2) * 255).round().byte().permute(1, 2, 0)
        file = io.BytesIO()
        Image.fromarray(pixels.contiguous().numpy()).save(file, "webp", quality=86)
        data = base64.b64encode(file.getvalue()).decode()
        side = 96 if pictures.shape[2] > 96 else 64  # what has lines on it is larger
        size = f'width="{len(pictures) * side}" height="{side}"'
        found += f'<p><img src="data:image/webp;base64,{data}" alt="" {size}><span>{escape(name)}</span></p>'
    return f'<figure class="pictures">{found}<figcaption>{escape(caption)}</figcaption></figure>' if found else ""
