"""Images as pixels, alone or side by side, and as a PNG."""

from typing import BinaryIO

import numpy as np
from einops import rearrange, repeat
from torch import Tensor

GAP = 2  # pixels between two images of a grid
SMALLEST_SIDE = 64  # smaller images are enlarged to about this side, so that single pixels can be seen


def pixels(images: Tensor) -> np.ndarray:
    """[N, C, H, W] in [-1, 1], values outside clipped -> [N, H, W, 3] uint8: the first three channels, or of fewer the first in grey."""
    shown = images[:, :3] if images.shape[1] >= 3 else repeat(images[:, :1], "n 1 h w -> n 3 h w")
    return rearrange(((shown.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte(), "n c h w -> n h w c").numpy()


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
    count, _, height, width = images.shape
    scale = max(1, SMALLEST_SIDE // max(height, width)) if scale is None else scale
    if min(columns, scale) < 1:
        raise ValueError(f"columns, scale: expected at least 1, found {columns} and {scale}")
    enlarged = repeat(pixels(images), "n h w c -> n (h down) (w right) c", down=scale, right=scale)
    # Each image gets its gap below and to the right, and the last row is filled up with empty places.
    padded = np.pad(enlarged, ((0, -count % columns), (0, GAP), (0, GAP), (0, 0)), constant_values=255)
    return rearrange(padded, "(row column) h w c -> (row h) (column w) c", column=columns)[:-GAP, :-GAP]


def write_png(stream: BinaryIO, grid: np.ndarray) -> None:
    """Write [H, W, 3] uint8 as a PNG to an open binary file."""
    from PIL import Image

    Image.fromarray(grid).save(stream, format="PNG")
