"""Procedural disks: one bright antialiased disk on a uniform background, with the factors that made it."""

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from .. import ops
from ..config import DataConfig
from .dataset import Dataset


class Disks(Dataset):
    """Endless images of one disk; image n is a function of (seed, split, n).

        mask  = sigmoid(edge_slope (radius - distance to the centre)), in pixels
        pixel = 2 (brightness mask + background (1 - mask)) - 1

    Args:
        image_size: H = W in pixels.
        channels: Identical channels.
        ranges: (low, high) of each factor, uniform: "x", "y" (centre) and "radius" in fractions of the image side,
            "background" and "brightness" in [0, 1]. A factor with low == high is a constant and is not reported.
        edge_slope: Steepness of the soft edge, per pixel.
        seed: Key of the factors.
        split: 0 for training, any other number for images that training never sees.
    """

    factor_order = ("x", "y", "background", "radius", "brightness")

    def __init__(
        self, image_size: int, channels: int, ranges: Mapping[str, Sequence[float]], edge_slope: float, seed: int, split: int = 0
    ) -> None:
        self.image_shape = (channels, image_size, image_size)
        self.ranges = {name: tuple(ranges[name]) for name in self.factor_order}
        self.edge_slope, self.seed, self.split = edge_slope, seed, split
        narrow = torch.tensor(list(self.ranges.values())).diff(dim=1)[:, 0] == 0  # compared in float32, in which factors are drawn
        self.factor_names = tuple(name for name, constant in zip(self.ranges, narrow.tolist(), strict=True) if not constant)
        self.size = None  # endless

    @classmethod
    def from_config(cls, config: DataConfig, seed: int, split: int) -> Self:
        ranges = vars(config.disks)  # settings have the names of the factors
        return cls(config.image_size or 16, config.channels or 1, ranges, config.disks.edge_slope, seed, split)

    def _draw(self, index: Tensor) -> Tensor:
        # "auto": the images are drawn on the feed's device, whatever backend the step has been told to use.
        u = ops.random_uniform(self.seed, self.split, ops.Stream.FACTORS, index, len(self.ranges), backend="auto")
        low, high = torch.tensor(list(self.ranges.values()), device=index.device).unbind(1)
        return low + (high - low) * u

    def images(self, index: Tensor) -> Tensor:
        """[n] int64 -> [n, C, H, W] float32 in [-1, 1]."""
        x, y, background, radius, brightness = (factor[:, None, None] for factor in self._draw(index).unbind(1))
        channels, side, _ = self.image_shape
        centres = (torch.arange(side, device=index.device) + 0.5) / side
        distance = ((centres[None, None, :] - x).square() + (centres[None, :, None] - y).square()).sqrt()
        mask = torch.sigmoid(self.edge_slope * side * (radius - distance))
        pixels = 2.0 * (brightness * mask + background * (1.0 - mask)) - 1.0
        return pixels[:, None].expand(-1, channels, -1, -1).contiguous()

    def factors(self, index: Tensor) -> Tensor:
        """[n] int64 -> [n, F] float32, columns in the order of `factor_names`."""
        columns = [self.factor_order.index(name) for name in self.factor_names]
        return self._draw(index)[:, columns]
