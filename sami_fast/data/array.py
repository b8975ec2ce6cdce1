"""One's own images from an .npy, .npz or HDF5 file."""

from pathlib import Path
from typing import Self

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ..config import DataConfig
from ..errors import UserError
from .dataset import Dataset
from .storage import load_array


class ArrayImages(Dataset):
    """Images of an array (N, H, W), (N, H, W, C) or (N, C, H, W): uint8 scaled to [-1, 1], or floats in [-1, 1] as they are.

    The channel axis of a 4-D array is the second if it has 1 to 4 entries and the last two make a square, else the last one.
    Large arrays stay on the disk: see `storage.load_array`.

    Args:
        path: The file.
        key: Entry of an .npz, dataset of HDF5; see `DataConfig.array_key`.
        holdout: Share of the images, spread evenly over the file, that only evaluation sees (all of them when 0).
        split: 0 for training, 1 for evaluation.
        cache_dir: `DataConfig.cache_dir`.
    Raises:
        UserError: unreadable file, wrong rank, dtype or range, no images, images that are not square.
    """

    def __init__(self, path: str, key: str = "", holdout: float = 0.1, split: int = 0, cache_dir: str = "") -> None:
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
        if array.dtype.kind == "f":
            for block in range(0, len(array), 1024):
                low, high = array[block : block + 1024].min(), array[block : block + 1024].max()
                if not (low >= -1.001 and high <= 1.001):
                    raise UserError(f"data.path: expected floats in [-1, 1] in {path}, found values from {low:g} to {high:g}")
        places = np.arange(len(array))
        self.held_out = holdout > 0 and len(array) > 1  # else training and evaluation share the images
        if self.held_out:
            held_out = np.floor((places + 1) * holdout) > np.floor(places * holdout)
            if not held_out.any():
                held_out[-1] = True
            places = places[held_out] if split else places[~held_out]
        self.array, self.places, self.size = array, places, len(places)
        self.image_shape = (array.shape[3], array.shape[1], array.shape[2])

    @classmethod
    def from_config(cls, config: DataConfig, seed: int, split: int) -> Self:
        return cls(config.path, config.array_key, config.holdout, split, config.cache_dir)

    def images(self, index: Tensor) -> Tensor:
        """[n] int64 -> [n, C, H, W] float32 in [-1, 1]."""
        chosen = self.array[self.places[index.cpu().numpy()]]
        images = rearrange(torch.from_numpy(np.ascontiguousarray(chosen, dtype=np.float32)), "n h w c -> n c h w")
        return images / 127.5 - 1.0 if chosen.dtype == np.uint8 else images
