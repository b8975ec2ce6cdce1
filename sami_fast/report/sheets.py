"""Many small images in one picture, of which a page shows one at a time."""

import base64
import io
from dataclasses import dataclass

import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from ..latents.images import pixels

MOST_BYTES = 900_000  # of a sheet: a page has half a dozen, and stays below 10 MB
QUALITIES = (90, 75, 55, 35, 15)  # of WebP, tried in turn
SMOOTH = 48  # pixels from which an image is enlarged smoothly; below, its pixels are shown as squares


@dataclass(frozen=True)
class Sheet:
    """Images of one size, row by row without gaps."""

    source: str  # a data: address
    columns: int
    rows: int
    width: int  # of one image, pixels
    height: int

    @property
    def smooth(self) -> bool:
        return max(self.width, self.height) >= SMOOTH

    def place(self, number: int) -> tuple[int, int]:
        """Column and row of an image."""
        return number % self.columns, number // self.columns


def sheet(images: Tensor, columns: int, side: int) -> Sheet:
    """A PNG, or a WebP with losses where that has more than `MOST_BYTES`.

    Args:
        images: [N, C, H, W] in [-1, 1], N >= 1.
        columns: Images in a row.
        side: Larger images are shrunk to it, pixels.
    """
    if (largest := max(images.shape[-2:])) > side:
        height, width = (max(1, round(length * side / largest)) for length in images.shape[-2:])
        images = F.interpolate(images.float(), (height, width), mode="area")
    columns = min(columns, len(images))
    small = pixels(F.pad(images, (0, 0, 0, 0, 0, 0, 0, -len(images) % columns)))
    whole = Image.fromarray(rearrange(small, "(row column) h w c -> (row h) (column w) c", column=columns))
    buffer = io.BytesIO()
    whole.save(buffer, format="PNG", optimize=True)
    kind, tries = "png", iter(QUALITIES)
    while buffer.tell() > MOST_BYTES and (quality := next(tries, None)) is not None:
        kind, buffer = "webp", io.BytesIO()
        whole.save(buffer, format="WEBP", quality=quality, method=4)
    source = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Sheet(source, columns, len(small) // columns, small.shape[2], small.shape[1])
