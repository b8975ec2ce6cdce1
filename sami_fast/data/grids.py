"""The benchmark sets that show every combination of their factors: dSprites, 3D Shapes, MPI3D. Images stay on the disk.

Sources: Matthey et al., "dSprites", 2017; Burgess & Kim, "3D Shapes", 2018; Gondal et al., NeurIPS 2019 (MPI3D).
"""

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ..config import DataConfig
from ..errors import UserError
from .dataset import EightBit
from .identity import content_of, digest
from .pixels import check_channels, resize, with_channels
from .storage import expect, find_file, held_out_places, load_array, readable, take


class FactorImages(EightBit):
    """What all sets with known factors share; each has its own `_open`. A factor with one class is a constant and not reported.

    Args:
        path: The file or folder of the set.
        image_size: Side to resize to, in pixels; 0 is `default_size`.
        channels: 1 or 3 to convert to; 0 as it is.
        holdout: Share of the images, a fixed random one, that only evaluation sees; 0: both splits see all.
        split: 0 for training, 1 for evaluation.
        cache_dir: `DataConfig.cache_dir`.
    Raises:
        UserError: missing, damaged or foreign file; no images, or no such conversion of channels.
    """

    names: tuple[str, ...]  # of the factors
    array: np.ndarray  # all images, for the `_read` of this class
    held_in: Sequence[Path] = ()  # files that hold the images; (): the one that `_open` gives
    default_size = 0  # image_size where the user gives none; 0: as the images are

    def __init__(
        self, path: str, *, image_size: int = 0, channels: int = 0, holdout: float = 0.1, split: int = 0, cache_dir: str = ""
    ) -> None:
        image_size = image_size or self.default_size
        self.path, (found, side), classes = self._open(Path(path), image_size, cache_dir)
        if len(classes) == 0 or side == 0:
            raise UserError(f"data.path: no images in {self.path}")
        self.image_shape = (channels or found, image_size or side, image_size or side)
        check_channels(found, channels, self.path)
        varying = np.flatnonzero(classes.max(0) > 0)
        self.factor_names = tuple(self.names[column] for column in varying)
        self.classes = classes[:, varying].astype(np.int32)
        self.places = held_out_places(len(classes), holdout, split)
        self.size, self.held_out = len(self.places), holdout > 0 and len(classes) > 1

    @cached_property
    def fingerprint(self) -> str:
        return digest([*map(content_of, self.held_in or (self.path,)), str(self.size)])

    @classmethod
    def from_config(cls, config: DataConfig, seed: int, split: int) -> Self:
        options = {name: getattr(config, name) for name in ("image_size", "channels", "holdout", "cache_dir")}
        return cls(config.path, split=split, **options)

    def _open(self, path: Path, image_size: int, cache_dir: str) -> tuple[Path, tuple[int, int], np.ndarray]:
        """The file, for messages; (C, side) of the images that `_read` returns, squares; the class of each factor in each image, [N, F]
        integers from 0. `image_size` is what the images will be resized to, for a set that keeps resized ones.
        """
        raise NotImplementedError

    def _read(self, places: np.ndarray) -> np.ndarray:
        """Images by their place in the whole set. [n] int64 -> [n, H, W] or [n, H, W, C] uint8."""
        return take(self.array, places)

    def pixels(self, index: Tensor) -> Tensor:
        """[n] int64 -> [n, C, H, W] uint8, contiguous.

        Raises:
            UserError: an image on the disk is not what the set's format allows.
        """
        read = torch.from_numpy(self._read(self.places[index.cpu().numpy()]))
        images = rearrange(read, "n h w -> n 1 h w" if read.dim() == 3 else "n h w c -> n c h w")
        channels, side, _ = self.image_shape
        return with_channels(resize(images, side), channels).contiguous()

    def factors(self, index: Tensor) -> Tensor:
        """Class of each factor, in the order of `factor_names`. [n] int64 -> [n, F] float32."""
        return torch.from_numpy(self.classes[self.places[index.cpu().numpy()]].astype(np.float32))


def every_combination(sizes: tuple[int, ...]) -> np.ndarray:
    """The classes of a whole grid, the last factor fastest. [prod(sizes), F] int64."""
    return np.stack(np.unravel_index(np.arange(math.prod(sizes)), sizes), axis=1)


def _check_grid(classes: np.ndarray, path: Path, key: str) -> None:
    """A `UserError` unless every combination of classes is there exactly once."""
    sizes = [int(size) + 1 for size in classes.max(0, initial=-1)]
    wanted = math.prod(sizes)
    if classes.min(initial=0) < 0:
        found = f"class {classes.min()}"
    elif wanted != len(classes):
        found = f"{len(classes)} rows"
    elif (different := len(np.unique(np.ravel_multi_index(tuple(classes.T), sizes)))) != wanted:
        found = f"only {different} different rows"
    else:
        return
    raise UserError(
        f"data.path: expected {key!r} in {path} to be every combination of classes 0 to {', '.join(str(s - 1) for s in sizes)} once, "
        f"found {found}"
    )


class DSprites(FactorImages):
    """White shapes on black, [N, 64, 64] of 0 and 1: the .npz, or its HDF5 twin. The factor "colour" has one value and is not reported.

    A square looks the same after a quarter turn and an ellipse after half a turn, while "orientation" counts a whole one.

    Args:
        path: The file, or the folder that holds it.
        cache_dir: `DataConfig.cache_dir`; the published .npz is compressed, and unpacked there once (3 GB).
        others: As in `FactorImages`.
    Raises:
        UserError: missing, damaged or foreign file; shapes or dtypes that are not dSprites'; labels that are not a full grid; pixels other
            than 0 and 1 (among the first images when opened, among the others when read).
    """

    names = ("colour", "shape", "scale", "orientation", "x", "y")
    periods: ClassVar[dict[str, float]] = {"orientation": 39.0}  # the last of the 40 is the first again
    stem = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64"
    files = (f"{stem}.npz", f"{stem}.hdf5", f"{stem}.h5")

    def _open(self, path: Path, image_size: int, cache_dir: str) -> tuple[Path, tuple[int, int], np.ndarray]:
        file = find_file(path, self.files, "dsprites")
        with readable(file), open(file, "rb") as stream:
            labels = "latents_classes" if stream.read(2) == b"PK" else "latents/classes"
        self.array = load_array(file, "imgs", cache_dir, what="dsprites")
        shape = self.array.shape
        good = self.array.dtype == np.uint8 and len(shape) == 3 and shape[1] == shape[2]
        expect(good, self.array, "'imgs'", file, "uint8 [N, H, H]")
        classes = np.asarray(load_array(file, labels, cache_dir, what="dsprites"))
        good = classes.dtype.kind in "iu" and classes.shape == (len(self.array), len(self.names))
        expect(good, classes, repr(labels), file, f"integers [{len(self.array)}, {len(self.names)}]")
        _check_grid(classes.astype(np.int64), file, labels)
        self.path = file
        self._read(np.arange(min(len(self.array), 1024)))
        return file, (1, shape[1]), classes

    def _read(self, places: np.ndarray) -> np.ndarray:
        masks = take(self.array, places)
        if (highest := masks.max(initial=0)) > 1:
            raise UserError(f"data.path: expected pixels 0 and 1 as 'imgs' in {self.path}, found {highest}")
        return masks * np.uint8(255)


class Shapes3D(FactorImages):
    """3dshapes.h5: one object in a room, [N, 64, 64, 3]. The labels are values such as an angle; factors are their ranks, from 0.

    Args:
        path: The file, or the folder that holds it.
        cache_dir: `DataConfig.cache_dir`; the published file is compressed, and unpacked there once (6 GB).
        others: As in `FactorImages`.
    Raises:
        UserError: h5py is missing; missing, damaged or foreign file; shapes or dtypes that are not 3D Shapes'; labels that are not a full
            grid.
    """

    names = ("floor_hue", "wall_hue", "object_hue", "scale", "shape", "orientation")
    periods: ClassVar[dict[str, float]] = {"floor_hue": 10.0, "wall_hue": 10.0, "object_hue": 10.0}
    files = ("3dshapes.h5",)

    def _open(self, path: Path, image_size: int, cache_dir: str) -> tuple[Path, tuple[int, int], np.ndarray]:
        file = find_file(path, self.files, "shapes3d")
        self.array = colour_images(file, cache_dir, "shapes3d")
        labels = np.asarray(load_array(file, "labels", cache_dir, what="shapes3d"))
        good = labels.dtype.kind in "fiu" and labels.shape == (len(self.array), len(self.names)) and bool(np.isfinite(labels).all())
        expect(good, labels, "'labels'", file, f"finite numbers [{len(self.array)}, {len(self.names)}]")
        classes = np.stack([np.unique(column, return_inverse=True)[1].reshape(-1) for column in labels.T], axis=1)
        _check_grid(classes, file, "labels")
        return file, (3, self.array.shape[1]), classes


class MPI3D(FactorImages):
    """A robot arm that holds an object, [N, 64, 64, 3], rendered or photographed: any of the published .npz.

    The files have no labels; the number of images says which grid it is.

    Args:
        path: The file, or a folder with no other .npz.
        others: As in `FactorImages`.
    Raises:
        UserError: missing, damaged or foreign file; a shape or dtype that is not MPI3D's.
    """

    names = ("colour", "shape", "size", "camera_height", "background", "horizontal", "vertical")
    grids = ((6, 6, 2, 3, 3, 40, 40), (4, 4, 2, 3, 3, 40, 40))  # toy, realistic and real; real_complex

    def _open(self, path: Path, image_size: int, cache_dir: str) -> tuple[Path, tuple[int, int], np.ndarray]:
        file = find_file(path, ("*.npz",), "mpi3d")
        self.array = colour_images(file, cache_dir, "mpi3d")
        sizes = {math.prod(grid): grid for grid in self.grids}
        if len(self.array) not in sizes:
            raise UserError(f"data.path: expected {' or '.join(map(str, sizes))} images in {file}, found {len(self.array)}")
        classes = every_combination(sizes[len(self.array)])
        return file, (3, self.array.shape[1]), classes


def colour_images(file: Path, cache_dir: str, kind: str) -> np.ndarray:
    """The entry 'images', or a `UserError` unless it is uint8 [N, H, H, 3]."""
    array = load_array(file, "images", cache_dir, what=kind)
    good = array.dtype == np.uint8 and array.ndim == 4 and array.shape[1] == array.shape[2] and array.shape[3] == 3
    expect(good, array, "'images'", file, "uint8 [N, H, H, 3]")
    return array
