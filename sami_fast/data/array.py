"""One's own images from an .npy, .npz or HDF5 file."""

from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ..config import DataConfig
from ..errors import UserError
from .cache import tell_once
from .dataset import Dataset
from .identity import content_of, digest
from .pixels import check_channels, resize, with_channels
from .storage import PIECE, load_array, take


class ArrayImages(Dataset):
    """Images of an array (N, H, W), (N, H, W, C) or (N, C, H, W): uint8 scaled to [-1, 1], or floats in the range that `value_range` says.

    The channel axis of a 4-D array is the second if it has 1 to 4 entries and the last two make a square, else the last one.
    Large arrays stay on the disk, as they are: see `storage.load_array`.

    Args:
        path: The file.
        key: Entry of an .npz, dataset of HDF5; see `DataConfig.array_key`.
        holdout: Share of the images, spread evenly over the file, that only evaluation sees (all of them when 0).
        split: 0 for training, 1 for evaluation.
        cache_dir: `DataConfig.cache_dir`.
        value_range: "signed": floats in [-1, 1], as they are; "unit": in [0, 1]; "auto": signed, with a warning where all are in [0, 1].
        image_size: Height and width to resize to, in pixels; 0: as they are.
        channels: 1 for grey, or as many equal ones for an array of grey images; 0: as they are.
    Raises:
        UserError: unreadable file, wrong rank, dtype or range, no images, images that are not square, other channels than can
            be made of theirs.
    """

    def __init__(
        self,
        path: str,
        key: str = "",
        holdout: float = 0.1,
        split: int = 0,
        cache_dir: str = "",
        value_range: str = "auto",
        *,
        image_size: int = 0,
        channels: int = 0,
    ) -> None:
        self.path = path
        array = load_array(Path(path), key, cache_dir)
        if array.ndim == 3:
            array = array[..., None]
        if array.ndim != 4:
            raise UserError(f"data.path: expected images (N, H, W), (N, H, W, C) or (N, C, H, W) in {path}, found shape {array.shape}")
        if array.shape[1] <= 4 and array.shape[2] == array.shape[3] and array.shape[1] != array.shape[2]:
            array = rearrange(array, "n c h w -> n h w c")
        if array.shape[3] > 4:
            raise UserError(f"data.path: expected 1 to 4 channels in {path}, found shape {array.shape}")
        if array.size == 0:
            raise UserError(f"data.path: no images in {path}")
        if array.shape[1] != array.shape[2]:
            raise UserError(f"data.path: expected square images in {path}, found {array.shape[1]} x {array.shape[2]} pixels")
        if array.dtype != np.uint8 and array.dtype.kind != "f":
            raise UserError(f"data.path: expected uint8 or floats in {path}, found {array.dtype}")
        self.unit, self.values = value_range == "unit" and array.dtype.kind == "f", "0 to 255"
        if array.dtype.kind == "f":
            self.values = _checked_range(array, path, value_range)
        places = np.arange(len(array))
        self.held_out = holdout > 0 and len(array) > 1  # else training and evaluation share the images
        if self.held_out:
            held_out = np.floor((places + 1) * holdout) > np.floor(places * holdout)
            if not held_out.any():
                held_out[-1] = True
            places = places[held_out] if split else places[~held_out]
        self.array, self.places, self.size = array, places, len(places)
        check_channels(array.shape[3], channels, path)
        side = image_size or array.shape[1]
        self.image_shape = (channels or array.shape[3], side, side)

    @classmethod
    def from_config(cls, config: DataConfig, seed: int, split: int) -> Self:
        shape = {"image_size": config.image_size, "channels": config.channels}
        return cls(config.path, config.array_key, config.holdout, split, config.cache_dir, config.range, **shape)

    def images(self, index: Tensor) -> Tensor:
        """[n] int64 -> [n, C, H, W] float32 in [-1, 1]."""
        chosen = take(self.array, self.places[index.cpu().numpy()])
        eight_bit = chosen.dtype == np.uint8
        images = torch.from_numpy(np.ascontiguousarray(chosen, dtype=np.uint8 if eight_bit else np.float32))
        channels, side, _ = self.image_shape
        images = with_channels(resize(rearrange(images, "n h w c -> n c h w"), side), channels)
        return images.float() / 127.5 - 1.0 if eight_bit else images * 2.0 - 1.0 if self.unit else images

    @cached_property
    def fingerprint(self) -> str:
        return digest([content_of(Path(self.path)), str(self.size), *(["unit"] if self.unit else [])])

    def facts(self) -> dict[str, Any]:
        return {"file": self.path, "values": f"{self.array.dtype}, {self.values}"}


def _checked_range(array: np.ndarray, path: str, value_range: str) -> str:
    """What values floats have and are taken for, in words; a warning where that may not be what was meant."""
    lowest, rows = -1.0 if value_range != "unit" else 0.0, max(1, PIECE // array[0].nbytes)
    low, high = np.inf, -np.inf
    for first in range(0, len(array), rows):
        block = take(array, np.arange(first, min(first + rows, len(array))))
        low, high = np.minimum(low, block.min()), np.maximum(high, block.max())  # a NaN stays one
        if not (low >= lowest - 1e-3 and high <= 1.001):
            raise UserError(f"data.path: expected floats in [{lowest:g}, 1] in {path}, found values from {low:g} to {high:g}")
    if value_range == "auto" and low >= 0:
        tell_once(
            f"{path}: all values lie in [0, 1], and are taken for values in [-1, 1], in which images are grey and bright; data.range=unit "
            "(--range unit) says that 0 is black, signed that they are as they should be"
        )
    return f"{low:g} to {high:g}, taken for values in [{lowest:g}, 1]"
