"""Procedural sprites: one white shape on black, still or moving, with the factors that made it."""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from .. import ops
from ..config import DataConfig
from .dataset import Dataset

RADIUS = 0.2  # of the circle around a sprite of scale 1, in image sides
EDGE_SLOPE = 4.0  # of the soft edge, per pixel: 10% to 90% within 1.1 pixels
DRAWS = 14  # random numbers of an index: 5 for its image, then 5 and 4 for the two ends of its clip


# Each outline fits in the unit circle. Of a point u to the right of the sprite's centre and v below it, both [...], it returns [...]:
# negative inside, positive outside, and near the outline the signed distance to it.


def _box(u: Tensor, v: Tensor, half: float) -> Tensor:
    right, down = u.abs() - half, v.abs() - half
    return torch.hypot(right.clamp_min(0), down.clamp_min(0)) + torch.maximum(right, down).clamp_max(0)


def _square(u: Tensor, v: Tensor) -> Tensor:
    return _box(u, v, math.sqrt(0.5))


def _ellipse(u: Tensor, v: Tensor) -> Tensor:
    """Half as high as wide: f / |grad f| of f = u^2 + 4 v^2 - 1, which is the distance to first order."""
    f = u.square() + 4 * v.square() - 1
    return f / torch.hypot(2 * u, 8 * v).clamp_min(1e-6)


def _heart(u: Tensor, v: Tensor) -> Tensor:
    """A square on its tip and, on each of its two upper sides, a half disk; the tip points down."""
    half_diagonal = (3 - math.sqrt(2)) / 2  # of the square; it and the shift make the unit circle the smallest one around the heart
    v = v - (math.sqrt(2) - 1) / 2  # now seen from the square's centre
    radius = half_diagonal * math.sqrt(0.5)
    square = _box((u + v) * math.sqrt(0.5), (u - v) * math.sqrt(0.5), radius)
    disks = torch.hypot(u.abs() - half_diagonal / 2, v + half_diagonal / 2) - radius
    return torch.minimum(square, disks)


OUTLINES = {"square": _square, "ellipse": _ellipse, "heart": _heart}


class Sprites(Dataset):
    """Endless images and clips of one sprite; image n and clip n are functions of (seed, split, n), and of different random numbers.

        mask  = sigmoid(-4 signed distance to the outline), in pixels
        pixel = 2 mask - 1

    A clip walks at constant velocity from one state to another, both drawn as an image's is: its path is straight in the factors, and each
    of its frames is the image of the factors it is at. The shape stays.

    Args:
        image_size: H = W in pixels.
        channels: Identical channels.
        shapes: Those that occur, equally often: some of "square", "ellipse" and "heart". The factor is the number in this list.
        ranges: (low, high) of each other factor, uniform: "scale" (1: the circle around the sprite is 0.4 image sides across), "rotation"
            (turns, clockwise), "x" and "y" (centre of that circle, in image sides from the left and from the top). A factor with
            low == high is a constant and is not reported, nor is the shape where there is only one.
        seed: Key of the factors.
        split: 0 for training, any other number for images that training never sees.
        clip_length: T, frames of a clip.
    Raises:
        ValueError: no shapes, an unknown one, or a clip without frames.
    Source: the factors are those of dSprites (https://github.com/google-deepmind/dsprites-dataset); the shapes are our own.
    """

    factor_order = ("shape", "scale", "rotation", "x", "y")
    periods: ClassVar[dict[str, float]] = {"rotation": 1.0}  # factors that come round again

    def __init__(
        self,
        image_size: int,
        channels: int,
        shapes: Sequence[str],
        ranges: Mapping[str, Sequence[float]],
        seed: int,
        split: int = 0,
        clip_length: int = 16,
    ) -> None:
        if not shapes or not set(shapes) <= OUTLINES.keys():
            raise ValueError(f"shapes: expected some of {', '.join(OUTLINES)}, found {list(shapes)}")
        if clip_length < 1:
            raise ValueError(f"clip_length: expected 1 or more, found {clip_length}")
        self.image_shape = (channels, image_size, image_size)
        self.shapes = tuple(shapes)
        self.ranges = {name: tuple(ranges[name]) for name in self.factor_order[1:]}
        self.seed, self.split, self.clip_length = seed, split, clip_length
        narrow = torch.tensor(list(self.ranges.values())).diff(dim=1)[:, 0] == 0  # compared in float32, in which factors are drawn
        constant = [len(self.shapes) == 1, *narrow.tolist()]
        self.factor_names = tuple(name for name, same in zip(self.factor_order, constant, strict=True) if not same)
        self.size = None  # endless

    @classmethod
    def from_config(cls, config: DataConfig, seed: int, split: int) -> Self:
        size, ranges = config.image_size or 64, vars(config.sprites)  # settings have the names of the factors
        return cls(size, config.channels or 1, config.sprites.shapes, ranges, seed, split, config.video.clip_length)

    def images(self, index: Tensor) -> Tensor:
        """[n] int64 -> [n, C, H, W] float32 in [-1, 1], on the device of `index`."""
        return self.render(self._image_states(index))

    def factors(self, index: Tensor) -> Tensor:
        """[n] int64 -> [n, F] float32, columns in the order of `factor_names`."""
        return self._reported(self._image_states(index))

    def clips(self, index: Tensor) -> Tensor:
        """[n] int64 -> [n, T, C, H, W] float32 in [-1, 1], on the device of `index`."""
        return self.render(self._clip_states(index))

    def clip_factors(self, index: Tensor) -> Tensor:
        """[n] int64 -> [n, T, F] float32, columns in the order of `factor_names`."""
        return self._reported(self._clip_states(index))

    def render(self, states: Tensor) -> Tensor:
        """[..., 5] float32, columns in the order of `factor_order` -> [..., C, H, W] float32 in [-1, 1]."""
        shape, scale, rotation, x, y = (factor[..., None, None] for factor in states.unbind(-1))
        channels, side, _ = self.image_shape
        centres = (torch.arange(side, device=states.device) + 0.5) / side
        right, down = centres[None, :] - x, centres[:, None] - y
        cos, sin = torch.cos(2 * math.pi * rotation), torch.sin(2 * math.pi * rotation)
        radius = RADIUS * scale
        u, v = (cos * right + sin * down) / radius, (cos * down - sin * right) / radius
        distance = OUTLINES[self.shapes[0]](u, v)
        for number, name in enumerate(self.shapes[1:], start=1):
            distance = torch.where(shape == number, OUTLINES[name](u, v), distance)
        pixels = 2.0 * torch.sigmoid(-EDGE_SLOPE * side * radius * distance) - 1.0
        return pixels.unsqueeze(-3).repeat_interleave(channels, dim=-3)

    def _image_states(self, index: Tensor) -> Tensor:
        return self._states(self._draw(index)[:, :5])

    def _clip_states(self, index: Tensor) -> Tensor:
        draws = self._draw(index)[:, 5:]
        start, end = self._states(draws[:, :5]), self._states(draws[:, [0, 5, 6, 7, 8]])  # of one shape
        times = torch.linspace(0, 1, self.clip_length, device=index.device)
        return torch.lerp(start[:, None], end[:, None], times[:, None])

    def _draw(self, index: Tensor) -> Tensor:
        # Always as many, also where fewer are used: which random numbers an index gets depends on how many are asked for.
        # "auto": the images are drawn on the feed's device, whatever backend the step has been told to use.
        return ops.random_uniform(self.seed, self.split, ops.Stream.FACTORS, index, DRAWS, backend="auto")

    def _states(self, u: Tensor) -> Tensor:
        """[n, 5] float32 uniforms in [0, 1) -> [n, 5] float32 in the ranges."""
        shape = (u[:, :1] * len(self.shapes)).floor().clamp_max(len(self.shapes) - 1)  # the product may round up to the number of shapes
        low, high = torch.tensor(list(self.ranges.values()), device=u.device).unbind(1)
        return torch.cat((shape, low + (high - low) * u[:, 1:]), dim=1)

    def _reported(self, states: Tensor) -> Tensor:
        return states[..., [self.factor_order.index(name) for name in self.factor_names]]
