"""The benchmark sets that show every combination of their factors: dSprites, 3D Shapes, MPI3D. Images stay on the disk.

Sources: Matthey et al., "dSprites", 2017; Burgess & Kim, "3D Shapes", 2018; Gondal et al., NeurIPS 2019 (MPI3D).
"""

import math
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .pixels import EightBit, resize, with_channels
from .storage import expect, find_file, held_out_places, load_array, readable


class FactorImages(EightBit):
    """What all sets with known factors share; each has its own `_read`. A factor with one class is a constant and is not reported.

    Args:
        path: The file or folder, for the messages.
        found: (C, side) of the images that `_read` returns, squares.
        names: Of the factors.
        classes: The class of each factor in each image. [N, F] integers from 0.
        image_size: Side to resize to, in pixels; 0 as it is.
        channels: 1 or 3 to convert to; 0 as it is.
        holdout: Share of the images, a fixed random one, that only evaluation sees; 0: both splits see all.
        split: 0 for training, 1 for evaluation.
    Raises:
        UserError: no images, or no such conversion of channels.
    """

    def __init__(
        self,
        path: Path,
        found: tuple[int, int],
        names: tuple[str, ...],
        classes: np.ndarray,
        image_size: int,
        channels: int,
        holdout: float,
        split: int,
    ) -> None:
        if len(classes) == 0 or found[1] == 0:
            raise UserError(f"data.path: no images in {path}")
        self.path, side = path, image_size or found[1]
        self.image_shape = (channels or found[0], side, side)
        try:
            with_channels(torch.zeros(1, found[0], 1, 1, dtype=torch.uint8), self.image_shape[0])
        except ValueError:
            raise UserError(f"data.channels: expected {found[0]} or 1 for {path}, found {channels}") from None
        varying = np.flatnonzero(classes.max(0) > 0)
        self.factor_names = tuple(names[column] for column in varying)
        self.classes = classes[:, varying].astype(np.int32)
        self.places = held_out_places(len(classes), holdout, split)
        self.size: int | None = len(self.places)

    def _read(self, places: np.ndarray) -> np.ndarray:
        """Images by their place in the whole set. [n] int64 -> [n, H, W] or [n, H, W, C] uint8."""
        raise NotImplementedError

    def pixels(self, index: Tensor) -> Tensor:
        """[n] int64 -> [n, C, H, W] uint8, contiguous.

        Raises:
            UserError: an image on the disk is not what the set's format allows.
        """
        read = torch.from_numpy(self._read(self.places[index.cpu().numpy()]))
        images = read[:, None] if read.dim() == 3 else read.permute(0, 3, 1, 2)
        channels, side, _ = self.image_shape
        if not len(images):  # resizing refuses to have nothing to do
            return torch.zeros(0, channels, side, side, dtype=torch.uint8)
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
        cache_dir: `DataConfig.cache_dir`: the published .npz is compressed, and unpacked there once (3 GB).
        image_size, channels, holdout, split: As in `FactorImages`.
    Raises:
        UserError: missing, damaged or foreign file; shapes or dtypes that are not dSprites'; labels that are not a full grid; pixels other
            than 0 and 1 (among the first images when opened, among the others when read).
    """

    names = ("colour", "shape", "scale", "orientation", "x", "y")
    periods: ClassVar[dict[str, float]] = {"orientation": 39.0}  # the last of the 40 is the first again
    stem = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64"
    files = (f"{stem}.npz", f"{stem}.hdf5", f"{stem}.h5")

    def __init__(
        self, path: str, *, image_size: int = 0, channels: int = 0, holdout: float = 0.1, split: int = 0, cache_dir: str = ""
    ) -> None:
        file = find_file(Path(path), self.files, "dsprites")
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
        super().__init__(file, (1, shape[1]), self.names, classes, image_size, channels, holdout, split)
        self._read(np.arange(min(len(self.array), 1024)))

    def _read(self, places: np.ndarray) -> np.ndarray:
        masks = self.array[places]
        if (highest := masks.max(initial=0)) > 1:
            raise UserError(f"data.path: expected pixels 0 and 1 as 'imgs' in {self.path}, found {highest}")
        return masks * np.uint8(255)


class Shapes3D(FactorImages):
    """3dshapes.h5: one object in a room, [N, 64, 64, 3]. The labels are values such as an angle; factors are their ranks, from 0.

    Args:
        path: The file, or the folder that holds it.
        cache_dir: `DataConfig.cache_dir`: the published file is compressed, and unpacked there once (6 GB).
        image_size, channels, holdout, split: As in `FactorImages`.
    Raises:
        UserError: h5py is missing; missing, damaged or foreign file; shapes or dtypes that are not 3D Shapes'; labels that are not a full
            grid.
    """

    names = ("floor_hue", "wall_hue", "object_hue", "scale", "shape", "orientation")
    periods: ClassVar[dict[str, float]] = {"floor_hue": 10.0, "wall_hue": 10.0, "object_hue": 10.0}
    files = ("3dshapes.h5",)

    def __init__(
        self, path: str, *, image_size: int = 0, channels: int = 0, holdout: float = 0.1, split: int = 0, cache_dir: str = ""
    ) -> None:
        file = find_file(Path(path), self.files, "shapes3d")
        self.array = colour_images(file, cache_dir, "shapes3d")
        labels = np.asarray(load_array(file, "labels", cache_dir, what="shapes3d"))
        good = labels.dtype.kind in "fiu" and labels.shape == (len(self.array), len(self.names)) and bool(np.isfinite(labels).all())
        expect(good, labels, "'labels'", file, f"finite numbers [{len(self.array)}, {len(self.names)}]")
        classes = np.stack([np.unique(column, return_inverse=True)[1].reshape(-1) for column in labels.T], axis=1)
        _check_grid(classes, file, "labels")
        super().__init__(file, (3, self.array.shape[1]), self.names, classes, image_size, channels, holdout, split)

    def _read(self, places: np.ndarray) -> np.ndarray:
        return self.array[places]


class MPI3D(FactorImages):
    """A robot arm that holds an object, [N, 64, 64, 3], rendered or photographed: any of the published .npz.

    The files have no labels; the number of images says which grid it is.

    Args:
        path: The file, or a folder with no other .npz.
        cache_dir: `DataConfig.cache_dir`.
        image_size, channels, holdout, split: As in `FactorImages`.
    Raises:
        UserError: missing, damaged or foreign file; a shape or dtype that is not MPI3D's.
    """

    names = ("colour", "shape", "size", "camera_height", "background", "horizontal", "vertical")
    grids = ((6, 6, 2, 3, 3, 40, 40), (4, 4, 2, 3, 3, 40, 40))  # toy, realistic and real; real_complex

    def __init__(
        self, path: str, *, image_size: int = 0, channels: int = 0, holdout: float = 0.1, split: int = 0, cache_dir: str = ""
    ) -> None:
        file = find_file(Path(path), ("*.npz",), "mpi3d")
        self.array = colour_images(file, cache_dir, "mpi3d")
        sizes = {math.prod(grid): grid for grid in self.grids}
        if len(self.array) not in sizes:
            raise UserError(f"data.path: expected {' or '.join(map(str, sizes))} images in {file}, found {len(self.array)}")
        classes = every_combination(sizes[len(self.array)])
        super().__init__(file, (3, self.array.shape[1]), self.names, classes, image_size, channels, holdout, split)

    def _read(self, places: np.ndarray) -> np.ndarray:
        return self.array[places]


def colour_images(file: Path, cache_dir: str, kind: str) -> np.ndarray:
    """The entry 'images', or a `UserError` unless it is uint8 [N, H, H, 3]."""
    array = load_array(file, "images", cache_dir, what=kind)
    good = array.dtype == np.uint8 and array.ndim == 4 and array.shape[1] == array.shape[2] and array.shape[3] == 3
    expect(good, array, "'images'", file, "uint8 [N, H, H, 3]")
    return array
