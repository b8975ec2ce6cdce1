"""8-bit pixels on their way to the networks: cropped, resized, grey or colour, then [-1, 1]."""

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..errors import UserError
from ..ops.backend import refusal
from ..pictures import luma

Box = tuple[int, int, int]  # top, left and side of the square that is cut out of an image, in pixels


def to_unit(pixels: Tensor) -> Tensor:
    """[...] uint8 -> [...] float32 in [-1, 1]."""
    if pixels.device.type == "cpu":  # by numpy: torch's threads would keep spinning on cores that decode
        unit = np.divide(pixels.numpy(), np.float32(127.5), dtype=np.float32)
        return torch.from_numpy(np.subtract(unit, np.float32(1.0), out=unit))
    return pixels.float().div_(127.5).sub_(1.0)


def square(height: int, width: int, crop: str = "center") -> Box:
    """Top, left and side of the square that is used of an image.

    "center" is the central square, "tight" the central two thirds of it, "face" rows 57 to 185 and columns 25 to 153 of an aligned CelebA
    image (Preechakul et al., CVPR 2022).
    """
    if crop == "face" and height >= 185 and width >= 153:
        return 57, 25, 128
    side = min(height, width)
    if crop == "tight":
        side = max(1, round(side * 2 / 3))
    return (height - side) // 2, (width - side) // 2, side


def resize(pixels: Tensor, size: int, box: Box | None = None) -> Tensor:
    """A square of images, resized with an antialiased triangle filter (as Pillow's bilinear, to one level of 255).

    Args:
        pixels: [n, C, H, W] uint8, or float32; channels-last memory is the fast one.
        size: Height and width, in pixels.
        box: The square that is used; the central one when None.
    Returns:
        [n, C, size, size], of the same dtype.
    """
    top, left, side = box or square(pixels.shape[2], pixels.shape[3])
    part = pixels[:, :, top : top + side, left : left + side]
    if side == size:
        return part
    if not len(part):  # torch cannot resize an empty batch
        return part.new_empty(*part.shape[:2], size, size)
    return interpolate(part, size=(size, size), mode="bilinear", antialias=True)


def yuv_to_rgb(y: Tensor, u: Tensor, v: Tensor, box: Box, size: int, weights: tuple[float, float], full_range: bool) -> Tensor:
    """A square of a decoded frame as a small RGB image. Each plane is resized as by `resize` before the colours are mixed.

    The compiled core does it several times faster than a conversion of the whole frame; without the core it is done here.

    Args:
        y: Luma. [H, W] uint8, rows contiguous.
        u, v: Chroma, as fine as y or half as fine in both directions, uint8.
        box: Top, left and side of the square, on whole pixels of the chroma.
        size: Height and width of the image, in pixels.
        weights: Red's and blue's share of the luma; (0.299, 0.114) for ITU-R BT.601, (0.2126, 0.0722) for BT.709.
        full_range: Values use all of 0 to 255; else 16 to 235 and 16 to 240.
    Returns:
        [3, size, size] uint8.
    """
    compiled = core()
    if compiled is not None:
        return compiled.yuv_to_rgb(y, u, v, *box, size, *weights, full_range)
    down = -(-y.shape[0] // u.shape[0])
    planes = []
    for plane, step in ((y, 1), (u, down), (v, down)):
        top, left, side = (n // step for n in box)
        square = plane[top : top + side, left : left + side].float()[None, None]
        planes.append(interpolate(square, size=(size, size), mode="bilinear", antialias=True)[0, 0])
    luma, colour = (1.0, 1.0) if full_range else (255 / 219, 255 / 224)
    red, blue = weights
    y, u, v = (planes[0] - (0 if full_range else 16)) * luma, (planes[1] - 128) * colour, (planes[2] - 128) * colour
    redness, blueness = 2 * (1 - red) * v, 2 * (1 - blue) * u
    rgb = torch.stack((y + redness, y - (blueness * blue + redness * red) / (1 - red - blue), y + blueness))
    return (rgb.clamp(0, 255) + 0.5).to(torch.uint8)


def core() -> Any | None:
    """The launchers of the compiled core, or None where it was not built."""
    return torch.ops.sami_fast_C if refusal("cpp", "cpu", None) is None else None


def with_channels(pixels: Tensor, channels: int) -> Tensor:
    """Grey (1) from colour, or any number of equal channels from grey, where they differ. [n, C, H, W] -> [n, channels, H, W].

    Raises:
        ValueError: there is no such conversion.
    """
    found = pixels.shape[1]
    if found == channels:
        return pixels
    if found == 1:
        return pixels.expand(-1, channels, -1, -1)
    if found == 3 and channels == 1:
        return luma(pixels)
    raise ValueError(f"channels: cannot make {channels} from {found}")


def check_channels(found: int, asked: int, path: str | os.PathLike[str]) -> None:
    """A `UserError` where `with_channels` cannot make the channels that are asked for of those of a file; 0 asks for none."""
    if asked not in (0, found) and found != 1 and (found, asked) != (3, 1):
        raise UserError(f"data.channels: expected {'3 or 1' if found == 3 else found} for {path}, found {asked}")
