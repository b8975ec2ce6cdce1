"""What sets that a program renders share: all images are made once, into the cache folder, and read from there."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any, ClassVar

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ..config import DataConfig
from ..errors import UserError
from .dataset import EightBit
from .pixels import with_channels
from .storage import held_out_places, rendered, take


def needed(kind: str, package: str) -> Any:
    """A package that the extra of the same name as a `DataConfig.kind` brings, or a `UserError` that says so."""
    try:
        return import_module(package)
    except ImportError:
        name = package.partition(".")[0].replace("_", "-")
        raise UserError(f"data.kind {kind} renders with {name}, which is not installed; `pip install 'sami-fast[{kind}]'`") from None


class Rendered(EightBit):
    """Images that depend on the settings alone, are rendered when a set is first opened, and kept. A subclass has a `_rendered`.

    Where several processes open a set, one of them renders and the others wait for it.

    Args:
        count: Images, of training and evaluation together.
        settings: All that decides what is rendered, but their number and size, as plain JSON.
        image_size: H = W in pixels.
        channels: 3, or 1 for grey.
        holdout: Share of the images, a fixed random one, that only evaluation sees; 0: both splits see all.
        split: 0 for training, 1 for evaluation.
        cache_dir: `DataConfig.cache_dir`.
    Raises:
        UserError: the package that renders is not installed, or the cache cannot be written.
    """

    kind: ClassVar[str]  # `DataConfig.kind`
    version: ClassVar[int] = 1  # of the renderer: with another one, all images are rendered anew

    def __init__(
        self,
        count: int,
        settings: Mapping[str, Any],
        *,
        image_size: int = 64,
        channels: int = 3,
        holdout: float = 0.1,
        split: int = 0,
        cache_dir: str = "",
    ) -> None:
        self.image_shape, self.cache_dir = (channels, image_size, image_size), cache_dir
        self.places = held_out_places(count, holdout, split)
        self.size, self.held_out = len(self.places), holdout > 0 and count > 1
        self._digest = self._of(settings, count)
        self.array = self._kept(f"images-{image_size}-{self._digest}", (count,), lambda: self._rendered(torch.arange(count)))

    @staticmethod
    def options(config: DataConfig, split: int) -> dict[str, Any]:
        """The arguments that all of these share."""
        sizes = {"image_size": config.image_size or 64, "channels": config.channels or 3}
        return sizes | {"holdout": config.holdout, "split": split, "cache_dir": config.cache_dir}

    def _rendered(self, numbers: Tensor) -> Iterator[np.ndarray]:
        """Images by their place among all, [n] int64: [S, S, 3] uint8 each, in order."""
        raise NotImplementedError

    def _of(self, settings: Mapping[str, Any], *counts: int) -> str:
        """What changes with all that is rendered: 16 digits."""
        return hashlib.sha256(json.dumps([self.version, self.image_shape[1], counts, settings], sort_keys=True).encode()).hexdigest()[:16]

    def _kept(self, name: str, counts: tuple[int, ...], images: Callable[[], Iterator[np.ndarray]]) -> np.ndarray:
        """Images of the cache by the name of their file, rendered now if they are not there. [*counts, S, S, 3] uint8."""
        shape = (*counts, *self.image_shape[1:], 3)
        return rendered(self.kind, name, shape, lambda: (image.tobytes() for image in images()), self.cache_dir)

    def places_of(self, index: Tensor) -> np.ndarray:
        """Places among all images. [n] int64 both."""
        return self.places[index.cpu().numpy()]

    def pixels(self, index: Tensor) -> Tensor:
        """[n] int64 -> [n, C, H, W] uint8, contiguous."""
        return self._in_channels(take(self.array, self.places_of(index)))

    def _in_channels(self, images: np.ndarray) -> Tensor:
        """[n, S, S, 3] -> [n, C, S, S] uint8."""
        return with_channels(rearrange(torch.from_numpy(images), "n h w c -> n c h w"), self.image_shape[0]).contiguous()

    @property
    def fingerprint(self) -> str:
        return self._digest

    def facts(self) -> dict[str, Any]:
        return {"rendered": f"{len(self.array)} images, once, into {getattr(self.array, 'filename', 'memory')}"}
