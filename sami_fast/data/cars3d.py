"""Cars3D: 183 car models from 4 elevations and 24 azimuths. Source: Reed et al., NeurIPS 2015."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from einops import rearrange

from ..errors import UserError
from .grids import FactorImages, colour_images, every_combination
from .pixels import resize
from .storage import MEMORY, Packed, find_file, readable, stamp, take, unpack

ELEVATIONS, AZIMUTHS, IDENTITIES = 4, 24, 183


class Cars3D(FactorImages):
    """Either the published folder, cars/list.txt and one cars/*.mat per car, or its repackaging as an .npz of [17568, 64, 64, 3].

    The .mat files are decoded and resized once, into the cache (216 MB at 64 pixels). The .npz has no labels: its images are ordered by
    elevation, azimuth and identity, the last the fastest.

    Args:
        path: The .npz, the folder that holds it, the folder of list.txt, or its parent.
        others: As in `FactorImages`; 0 of image_size is 64.
    Raises:
        UserError: missing, damaged or foreign file; a shape or dtype that is not Cars3D's; a car twice in the list.
    """

    names = ("elevation", "azimuth", "identity")
    default_size = 64
    periods: ClassVar[dict[str, float]] = {"azimuth": 24.0}

    def _open(self, path: Path, image_size: int, cache_dir: str) -> tuple[Path, tuple[int, int], np.ndarray]:
        cars = IDENTITIES
        self.rows: np.ndarray | None = None  # row of the array that holds each image, where the array has another order
        file = find_file(path, ("list.txt", "cars/list.txt", "*.npz"), "cars3d")
        if file.name == "list.txt":
            cars = self._open_folder(file, image_size, cache_dir)
        else:
            self.array = colour_images(file, cache_dir, "cars3d")
            expected = ELEVATIONS * AZIMUTHS * IDENTITIES
            if len(self.array) != expected:
                raise UserError(f"data.path: expected {expected} images in {file}, found {len(self.array)}")
        return file, (3, self.array.shape[1]), every_combination((ELEVATIONS, AZIMUTHS, cars))

    def _open_folder(self, listing: Path, side: int, cache_dir: str) -> int:
        """Decode every car of the list, in its order. Returns how many there are."""
        with readable(listing, "list of names"):
            names = [line.strip().removesuffix(".mat") for line in listing.read_text("utf-8").splitlines() if line.strip()]
        files = [listing.parent / f"{name}.mat" for name in names]
        if not files:
            raise UserError(f"data.path: no names in {listing}")
        if len(set(names)) < len(names):
            raise UserError(f"data.path: {max(names, key=names.count)!r} is more than once in {listing}")
        if missing := [file for file in files if not file.is_file()]:
            raise UserError(f"data.path: no file {missing[0]}, which {listing} names")

        self.held_in = files

        def decoded() -> Iterator[bytes]:  # one car at a time, each 96 images
            for file in files:
                views = resize(rearrange(torch.from_numpy(_views(file)), "n h w c -> n c h w"), side)
                yield rearrange(views, "n c h w -> n h w c").contiguous().numpy().tobytes()

        shape = (len(files), ELEVATIONS, AZIMUTHS, side, side, 3)
        packed = Packed(np.dtype(np.uint8), shape, decoded)
        cached = unpack(packed, listing.parent, f"cars-{side}", cache_dir, stamp(listing, *files), memory=0)
        self.array = rearrange(cached, "car elevation azimuth h w c -> (car elevation azimuth) h w c")
        # The cache holds one car after the other; the classes, as the .npz, count cars fastest.
        self.rows = rearrange(np.arange(len(self.array)), "(car view) -> (view car)", car=len(files))
        return len(files)

    def _read(self, places: np.ndarray) -> np.ndarray:
        return take(self.array, places if self.rows is None else self.rows[places])


def _views(file: Path) -> np.ndarray:
    """All images of a car. [elevation * azimuth, H, H, 3] uint8."""
    import scipy.io  # late: it takes a while to load, and only this needs it

    with readable(file, "MATLAB file"):
        found = {name: (shape, kind) for name, shape, kind in scipy.io.whosmat(file)}  # before a file of any size is unpacked into memory
        if "im" not in found:
            raise UserError(f"data.path: no entry 'im' in {file}; data.kind cars3d needs it")
        shape, kind = found["im"]
        whole = len(shape) == 5 and shape[0] == shape[1] and shape[2:] == (3, AZIMUTHS, ELEVATIONS)
        if kind != "uint8" or not whole or not 0 < math.prod(shape) <= MEMORY:
            form = f"uint8 [H, H, 3, {AZIMUTHS}, {ELEVATIONS}]"
            raise UserError(f"data.path: expected 'im' in {file} to be {form}, found {kind} {list(shape)}")
        images = scipy.io.loadmat(file, variable_names=["im"])["im"]
    return np.ascontiguousarray(rearrange(images, "h w c azimuth elevation -> (elevation azimuth) h w c"))
