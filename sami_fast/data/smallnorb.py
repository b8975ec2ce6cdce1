"""SmallNORB: 50 toys from 18 azimuths and 9 elevations under 6 lights. Source: LeCun, Huang & Bottou, CVPR 2004."""

import gzip
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import ClassVar

import numpy as np

from ..errors import UserError
from ..files import absent
from .grids import FactorImages
from .storage import PIECE, Packed, expect, readable, take, unpack

PARTS = ("smallnorb-5x46789x9x18x6x2x96x96-training", "smallnorb-5x01235x9x18x6x2x96x96-testing")
DTYPES = {0x1E3D4C51: "<f4", 0x1E3D4C53: "<f8", 0x1E3D4C54: "<i4", 0x1E3D4C55: "u1"}  # by magic number


class SmallNORB(FactorImages):
    """Grey stereo pairs, of which the left image is used; training and testing files one after the other, where both are there.

    The toy within its category is a nuisance and no factor. What is gzipped and large is unpacked once, into the cache.

    Args:
        path: The folder of the published files, `*-{training,testing}-{dat,cat,info}.mat`, gzipped or not.
        others: As in `FactorImages`; 0 of image_size is 64.
    Raises:
        UserError: missing, damaged or foreign file; shapes, dtypes or labels that are not SmallNORB's.
    """

    names = ("category", "elevation", "azimuth", "lighting")
    default_size = 64
    periods: ClassVar[dict[str, float]] = {"azimuth": 18.0}

    def _open(self, path: Path, image_size: int, cache_dir: str) -> tuple[Path, tuple[int, int], np.ndarray]:
        if not path.is_dir():
            raise UserError(f"data.path: {absent(path, 'folder')}")
        found = [part for part in PARTS if any(path.glob(f"{part}-*.mat*"))]
        if not found:
            raise UserError(f"data.path: no file of data.kind smallnorb in {path}, expected {' or '.join(f'{p}-dat.mat' for p in PARTS)}")
        opened = [_open_part(path, part, cache_dir) for part in found]
        self.held_in = [file for file, _, _ in opened]
        self.left = [dat[:, 0] for _, dat, _ in opened]
        if len({images.shape[1] for images in self.left}) > 1:
            sides = " and ".join(str(images.shape[1]) for images in self.left)
            raise UserError(f"data.path: expected images of one size in {path}, found sides of {sides} pixels")
        classes = np.concatenate([classes for _, _, classes in opened])
        return path, (1, self.left[0].shape[1]), classes

    def _read(self, places: np.ndarray) -> np.ndarray:
        images, first = np.empty((len(places), *self.left[0].shape[1:]), np.uint8), 0
        for left in self.left:
            here = (places >= first) & (places < first + len(left))
            images[here] = take(left, places[here] - first)
            first += len(left)
        return images


def _open_part(folder: Path, part: str, cache_dir: str) -> tuple[Path, np.ndarray, np.ndarray]:
    """(the file of the images, stereo pairs [N, 2, H, H] uint8, classes [N, 4])."""
    (dat_file, dat), (cat_file, cat), (info_file, info) = (
        _open(folder, f"{part}-{kind}.mat", cache_dir) for kind in ("dat", "cat", "info")
    )
    good = dat.dtype == np.uint8 and dat.ndim == 4 and dat.shape[1] == 2 and dat.shape[2] == dat.shape[3]
    expect(good, dat, "the images", dat_file, "uint8 [N, 2, H, H]")
    expect(cat.dtype == np.int32 and cat.shape == (len(dat),), cat, "the categories", cat_file, f"int32 [{len(dat)}]")
    expect(info.dtype == np.int32 and info.shape == (len(dat), 4), info, "the labels", info_file, f"int32 [{len(dat)}, 4]")
    columns = (
        ("category", cat_file, cat, range(5)),
        ("elevation", info_file, info[:, 1], range(9)),
        ("azimuth", info_file, info[:, 2], range(0, 36, 2)),
        ("lighting", info_file, info[:, 3], range(6)),
    )
    for name, file, labels, allowed in columns:
        if len(wrong := labels[~np.isin(labels, allowed)]):
            step = " in steps of 2" if allowed.step == 2 else ""
            raise UserError(f"data.path: expected {name} 0 to {allowed[-1]}{step} in {file}, found {wrong[0]}")
    return dat_file, dat, np.stack([np.asarray(labels) // allowed.step for _, _, labels, allowed in columns], axis=1)


def _open(folder: Path, name: str, cache_dir: str) -> tuple[Path, np.ndarray]:
    """The file, as it is or else gzipped, and its array."""
    file = next((file for file in (folder / name, folder / f"{name}.gz") if file.is_file()), None)
    if file is None:
        raise UserError(f"data.path: no file {folder / name}, gzipped or not, beside the others of its part")
    zipped, form = file.suffix == ".gz", "SmallNORB file"
    with readable(file, form):
        with gzip.open(file) if zipped else open(file, "rb") as stream:
            dtype, shape = _header(stream)
            start = stream.tell()

        def pieces() -> Iterator[bytes]:
            with gzip.open(file) as stream:
                stream.read(start)
                while piece := stream.read(PIECE):
                    yield piece

        packed = Packed(dtype, shape, pieces, None if zipped else start, form=form)
        if not zipped and file.stat().st_size != start + packed.nbytes:
            raise ValueError(f"it has {file.stat().st_size - start} bytes, not the {packed.nbytes} of its shape {list(shape)}")
        return file, unpack(packed, file, "array", cache_dir)


def _header(stream: BufferedIOBase) -> tuple[np.dtype, tuple[int, ...]]:
    """Magic number, number of axes, and at least three lengths of axes; all little-endian int32."""

    def numbers(count: int) -> list[int]:
        raw = stream.read(4 * count)
        if len(raw) < 4 * count:
            raise ValueError("its header is cut short")
        return np.frombuffer(raw, "<i4").tolist()

    magic, axes = numbers(2)
    if magic not in DTYPES:
        raise ValueError(f"its magic number is {magic & 0xFFFFFFFF:#010x}")
    if not 1 <= axes <= 8:
        raise ValueError(f"its header says {axes} axes")
    lengths = numbers(max(3, axes))[:axes]
    if min(lengths) < 0:
        raise ValueError(f"its header says shape {lengths}")
    return np.dtype(DTYPES[magic]), tuple(lengths)
