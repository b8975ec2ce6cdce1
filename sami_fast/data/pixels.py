"""8-bit pixels on their way to the networks: cropped, resized, grey or colour, then [-1, 1]."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def to_unit(pixels: Tensor) -> Tensor:
    """[...] uint8 -> [...] float32 in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1.0)


def resize(pixels: Tensor, size: int) -> Tensor:
    """The central square, resized with an antialiased triangle filter (as Pillow's bilinear, to one level of 255).

    Args:
        pixels: [n, C, H, W] uint8; channels-last memory is the fast one.
        size: Height and width, in pixels.
    Returns:
        [n, C, size, size] uint8.
    """
    height, width = pixels.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels[:, :, top : top + side, left : left + side]
    return square if side == size else interpolate(square, size=(size, size), mode="bilinear", antialias=True)


def with_channels(pixels: Tensor, channels: int) -> Tensor:
    """Grey (1) from colour, or colour (3) from grey, where they differ. [n, C, H, W] uint8 -> [n, channels, H, W] uint8.

    Raises:
        ValueError: there is no such conversion.
    """
    found = pixels.shape[1]
    if found == channels:
        return pixels
    if found == 1:
        return pixels.expand(-1, channels, -1, -1)
    if found == 3 and channels == 1:
        weights = torch.tensor(LUMA, device=pixels.device).view(1, 3, 1, 1)
        return (pixels.float() * weights).sum(1, keepdim=True).round().to(torch.uint8)
    raise ValueError(f"channels: cannot make {channels} from {found}")


class EightBit:
    """A dataset that holds 8-bit images: `pixels` is its own, `images` follows."""

    image_shape: tuple[int, int, int]  # C, H, W
    size: int | None
    factor_names: tuple[str, ...] = ()

    def pixels(self, index: Tensor) -> Tensor:
        """[n] int64 -> [n, C, H, W] uint8."""
        raise NotImplementedError

    def images(self, index: Tensor) -> Tensor:
        """[n] int64 -> [n, C, H, W] float32 in [-1, 1]."""
        return to_unit(self.pixels(index))

    def factors(self, index: Tensor) -> Tensor:
        """[n] int64 -> [n, F] float32; no factors unless the data has them."""
        return torch.zeros(len(index), len(self.factor_names))
