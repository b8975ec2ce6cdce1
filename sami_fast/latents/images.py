"""Images side by side, as an array of pixels or a PNG."""

from typing import BinaryIO

import numpy as np
from torch import Tensor

GAP = 2  # pixels between two images of a grid
SMALLEST_SIDE = 64  # smaller images are enlarged to about this side, so that single pixels can be seen


def image_grid(images: Tensor, columns: int, scale: int | None = None) -> np.ndarray:
    """Images in rows of `columns`, on white.

    Args:
        images: [N, C, H, W] in [-1, 1], N >= 1; values outside are clipped. Three channels and more show the first three as red,
            green and blue; fewer show the first in grey.
        columns: Images per row, >= 1.
        scale: Each pixel becomes scale x scale pixels; None enlarges small images to a side of about 64.
    Returns:
        [rows * (scale * H + GAP) - GAP, columns * (scale * W + GAP) - GAP, 3] uint8.
    Raises:
        ValueError: images is not [N, C, H, W] or empty; columns or scale is below 1.
    """
    if images.dim() != 4 or 0 in images.shape:
        raise ValueError(f"images: expected [N, C, H, W] with no empty axis, found {list(images.shape)}")
    count, channels, height, width = images.shape
    scale = max(1, SMALLEST_SIDE // max(height, width)) if scale is None else scale
    if min(columns, scale) < 1:
        raise ValueError(f"columns, scale: expected at least 1, found {columns} and {scale}")
    shown = images[:, :3] if channels >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    pixels = ((shown.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    pixels = pixels.repeat_interleave(scale, 2).repeat_interleave(scale, 3).permute(0, 2, 3, 1).numpy()  # [N, H, W, 3]
    height, width = pixels.shape[1] + GAP, pixels.shape[2] + GAP
    grid = np.full((-(-count // columns) * height - GAP, columns * width - GAP, 3), 255, np.uint8)
    for place, image in enumerate(pixels):
        top, left = place // columns * height, place % columns * width
        grid[top : top + height - GAP, left : left + width - GAP] = image
    return grid


def write_png(stream: BinaryIO, grid: np.ndarray) -> None:
    """Write [H, W, 3] uint8 as a PNG to an open binary file."""
    from PIL import Image

    Image.fromarray(grid).save(stream, format="PNG")
