"""Arrays without holding them in memory: of published files, mapped where they lie or unpacked once into the cache; or rendered once there.

Also which images evaluation keeps to itself.
"""

import hashlib
import logging
import math
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal
from urllib.parse import quote

import numpy as np

from .. import ops
from ..errors import UserError, one_line
from ..files import absent, locked, write_whole
from ..progress import bar
from . import cache
from .cache import in_words

MEMORY = 256 * 2**20  # bytes; what cannot be mapped and is no larger is read into memory
PIECE = 2**24  # bytes that are unpacked at a time
LARGEST_RATIO = 2000  # of an array to its file; what compresses further, a file of zeros or one that holds nothing yet, is no data

log = logging.getLogger("sami_fast.data")

NPY, HDF5 = b"\x93NUMPY", b"\x89HDF\r\n\x1a\n"
ZIP = (b"PK\x03\x04", b"PK\x05\x06")  # the second is an empty archive


@dataclass(frozen=True)
class Packed:
    """An array that is still inside its file.

    Args:
        dtype, shape: Of the array.
        pieces: Reads its bytes, in order.
        offset: Where its bytes begin in the file if they lie there as they are.
        fortran: The first axis is the fastest.
        form: What the file should be, for the messages.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[bytes]] | None = None
    offset: int | None = None
    fortran: bool = False
    form: str = ""

    @property
    def nbytes(self) -> int:
        # In Python's integers, since a damaged header may ask for more than 64 bits.
        return math.prod(map(int, self.shape), start=self.dtype.itemsize)


def load_array(path: str | Path, key: str, cache_dir: str, *, what: str = "array") -> np.ndarray:
    """An array of an .npy, .npz or HDF5 file, told apart by their first bytes. Nothing is unpickled.

    An .npy, an uncompressed entry of an .npz and a contiguous dataset of HDF5 are memory-mapped where they lie (their checksums, if any,
    are not read). Anything else is read into memory up to `MEMORY` bytes, and above that unpacked once into the cache.

    Args:
        path: The file.
        key: Entry of an .npz or dataset of HDF5; when empty the only one, or else 'images'.
        cache_dir: `DataConfig.cache_dir`.
        what: The kind of data that asks, for the messages: a `DataConfig.kind`.
    Returns:
        The array, read-only, of whatever shape and dtype the file holds.
    Raises:
        UserError: missing, damaged or foreign file; no such entry; HDF5 without h5py; a cache that cannot be written.
    """
    path = Path(path)
    if not path.is_file():
        hint = "; data.kind image_folder and video_folder read folders" if path.is_dir() else ""
        raise UserError(f"data.path: {absent(path, 'file')}{hint}")
    with readable(path):
        with open(path, "rb") as stream:
            magic = stream.read(8)
            before = _before_hdf5(stream)
        if magic.startswith(NPY):
            name, packed = "", _in_npy(path, key, what)
        elif magic.startswith(ZIP):
            name, packed = _in_npz(path, key, what)
        elif magic.startswith(b"MATLAB") or (before and path.suffix == ".mat"):
            raise ValueError("it is a MATLAB file, whose axes are stored in reverse; save the images as one of these, or as plain HDF5")
        elif before is not None:
            name, packed = _in_hdf5(path, key, what, before)
        else:
            raise ValueError(f"it begins with {magic!r}")
        if packed.dtype.hasobject:
            raise ValueError("it holds Python objects")
        return unpack(packed, path, name, cache_dir)


@contextmanager
def readable(path: Path, form: str = "") -> Generator[None]:
    """Any error but a `UserError` means here that the file is damaged or not of its form, and becomes a `UserError`."""
    form = form or ("HDF5 file" if path.suffix in (".h5", ".hdf5") else ".npy or .npz") + " of plain numbers"
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each library raises many kinds
        raise UserError(f"data.path: {path} is not a readable {form} ({one_line(error)})") from None


def expect(good: bool, array: np.ndarray, name: str, path: Path, form: str) -> None:
    """A `UserError` unless the array is as it must be; `form` says how, such as "uint8 [N, H, H]"."""
    if not good:
        raise UserError(f"data.path: expected {name} in {path} to be {form}, found {array.dtype} {list(array.shape)}")


def find_file(path: Path, patterns: Collection[str], kind: str) -> Path:
    """The file itself, or the only one in a folder that matches a pattern.

    Raises:
        UserError: there is none, or more than one.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"data.path: no file or folder {path}")
    found = sorted({file for pattern in patterns for file in path.glob(pattern)})
    if not found:
        raise UserError(f"data.path: no file of data.kind {kind} in {path}, expected {' or '.join(patterns)}")
    if len(found) > 1:
        raise UserError(f"data.path: several files of data.kind {kind} in {path}, expected one of {', '.join(f.name for f in found)}")
    return found[0]


def stamp(*files: Path) -> str:
    """What changes when one of the files is written anew: 16 digits made of their names, sizes and times, those of the system too."""
    known = [(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns, stat.st_ctime_ns) for file in files]
    return hashlib.sha256(repr(known).encode()).hexdigest()[:16]


def held_out_places(count: int, holdout: float, split: int) -> np.ndarray:
    """Which of `count` images a split sees, in order: a fixed random share is held out, since every n-th would follow a factor grid.

    Args:
        count: Images.
        holdout: Share of them that only evaluation sees; at least one image, but never all. 0: both splits see everything.
        split: 0 for training, 1 for evaluation.
    Returns:
        [n] int64, ascending.
    """
    if holdout <= 0 or count < 2:
        return np.arange(count)
    order = ops.random_permutation(0, 0, ops.Stream.SHUFFLE, count).numpy()
    first = min(max(round(holdout * count), 1), count - 1)
    return np.sort(order[:first] if split else order[first:])


# Unpacking


def unpack(packed: Packed, source: Path, name: str, cache_dir: str, version: str = "", memory: int | None = None) -> np.ndarray:
    """The array: mapped where it lies, in memory, or in the cache folder of its source.

    Args:
        packed: The array.
        source: The file or folder that it comes from.
        name: Names it among the arrays of the source.
        cache_dir: `DataConfig.cache_dir`.
        version: Changes when the source does; the `stamp` of the source when empty.
        memory: Largest array, in bytes, that is read into memory; `MEMORY` when None.
    Raises:
        UserError: the source is damaged, or the cache cannot be written.
    """
    order = "F" if packed.fortran else "C"
    if packed.nbytes == 0:  # nothing to map
        return np.empty(packed.shape, packed.dtype)
    if packed.offset is not None:
        return _mapped(source, packed.dtype, packed.offset, packed.shape, order)
    if packed.nbytes <= (MEMORY if memory is None else memory):
        flat, filled = np.empty(packed.nbytes, np.uint8), 0
        for piece in _pieces(packed, source):
            flat[filled : filled + len(piece)] = np.frombuffer(piece, np.uint8)
            filled += len(piece)
        flat.flags.writeable = False
        return flat.view(packed.dtype).reshape(packed.shape, order=order)
    if source.is_file() and packed.nbytes > LARGEST_RATIO * (size := source.stat().st_size):
        raise UserError(f"data.path: {source} has {in_words(size)} and would unpack to {in_words(packed.nbytes)}: it holds no images")
    return _from_cache(packed, source, name, cache_dir, version or stamp(source))


def _from_cache(packed: Packed, source: Path, name: str, cache_dir: str, version: str) -> np.ndarray:
    name = quote(name, safe="")
    file = cache.cache_dir(cache_dir, source) / f"{name}-{version}.npy"
    try:
        # What was unpacked from an earlier state of the source goes.
        return _made_once(file, packed, lambda: _pieces(packed, source), rf"{re.escape(name)}-[0-9a-f]{{16}}\.npy")
    except OSError as error:
        raise UserError(f"data.cache_dir: cannot unpack {source} there ({error})") from None


def rendered(kind: str, name: str, shape: tuple[int, ...], pieces: Callable[[], Iterator[bytes]], cache_dir: str) -> np.ndarray:
    """Images that a program renders: made once, by one process while others wait for it, and mapped from the cache.

    Args:
        kind: A `DataConfig.kind`, whose folder in the cache it is.
        name: Of the file there; another one for every other content.
        shape: Of the array.
        pieces: Renders its bytes, in order, an image at a time.
        cache_dir: `DataConfig.cache_dir`.
    Returns:
        The array, uint8 and read-only.
    Raises:
        UserError: the cache cannot be written.
    """
    packed = Packed(np.dtype(np.uint8), shape)
    file = cache.base_dir(cache_dir) / kind / f"{name}.npy"

    def render() -> Iterator[bytes]:
        count = math.prod(shape[:-3])
        log.warning("data.kind %s: rendering %d images into %s, once", kind, count, file)
        with bar(count, "rendering", "images") as progress:
            for image in pieces():
                yield image
                progress.update()

    try:
        return _made_once(file, packed, render)
    except OSError as error:
        raise UserError(f"data.cache_dir: cannot keep the images of data.kind {kind} there ({error})") from None


def _made_once(file: Path, packed: Packed, pieces: Callable[[], Iterator[bytes]], replaces: str = "") -> np.ndarray:
    """The array of a file of the cache, which is written first if it is not there.

    Args:
        file: The .npy; its folder may not be there.
        packed: Its dtype and shape.
        pieces: Makes its bytes, in order.
        replaces: A pattern of the names of files that it takes the place of.
    Raises:
        UserError: there is no room for it, or it is gone again.
        OSError: from the system.
    """
    if (array := _reopened(file, packed)) is not None:
        return array
    file = cache.writable(file.parent) / file.name
    with locked(file.parent):
        if (array := _reopened(file, packed)) is not None:  # another process was faster
            return array
        for stale in [entry for entry in file.parent.iterdir() if re.fullmatch(replaces, entry.name)]:
            stale.unlink(missing_ok=True)
        if packed.nbytes > (free := shutil.disk_usage(file.parent).free):
            raise UserError(f"data.cache_dir: expected room for {in_words(packed.nbytes)} in {file.parent}, found {in_words(free)}")
        write_whole(file, lambda stream: _write_npy(stream, packed, pieces()))
    if (array := _reopened(file, packed)) is None:
        raise UserError(f"data.cache_dir: {file} changed while it was read")
    return array


def _reopened(file: Path, packed: Packed) -> np.ndarray | None:
    """What an earlier run unpacked, if it is there and whole."""
    try:
        with open(file, "rb") as stream:
            shape, fortran, dtype = _npy_header(stream)
            if (shape, fortran, dtype) != (packed.shape, packed.fortran, packed.dtype):
                return None
            start = stream.tell()
        return _mapped(file, dtype, start, shape, "F" if fortran else "C")
    except (OSError, ValueError):
        return None


def _mapped(file: Path, dtype: np.dtype, start: int, shape: tuple[int, ...], order: Literal["C", "F"]) -> np.memmap:
    """An array where it lies; its file stays open for `take`."""
    stream = open(file, "rb")  # noqa: SIM115 (closed with the array)
    array = np.memmap(stream, dtype, "r", start, shape, order)
    vars(array)["stream"] = stream
    return array


def _origin(array: Any) -> Any | None:
    """The `_mapped` array that an array is a view of, if it is of one."""
    while isinstance(array, np.ndarray) and "stream" not in getattr(array, "__dict__", {}):
        array = array.base
    return array if isinstance(array, np.ndarray) else None


def take(array: np.ndarray, places: np.ndarray) -> np.ndarray:
    """array[places], of the first axis. To be used for whatever is read during a run.

    A file that becomes shorter takes mapped memory away, and touching that ends the process without a word. So of an array that is mapped,
    whole or as a view, rows are read from the file. Only where the first axis is the fastest, and a row lies all over the file, is its
    length looked at instead, just before.

    Raises:
        UserError: the file has become shorter.
    """
    origin = _origin(array)
    if origin is None or not len(array):
        return array[places]
    stream, row = origin.stream, array[0]
    start = origin.offset + array.ctypes.data - origin.ctypes.data
    span = row.itemsize + sum((count - 1) * stride for count, stride in zip(row.shape, row.strides, strict=True))
    shorter = UserError(f"data.path: {stream.name} has become shorter while it was in use")
    if span != row.nbytes:
        if os.fstat(stream.fileno()).st_size < origin.offset + origin.nbytes:
            raise shorter
        return array[places]
    rows, stride = np.empty((len(places), *row.shape), row.dtype), array.strides[0]
    runs = np.split(np.arange(len(places)), np.flatnonzero((np.diff(places) != 1) | (stride != span)) + 1)  # of rows that lie side by side
    for run in runs if len(places) else []:
        if not 0 <= (first := int(places[run[0]])) <= len(array) - len(run):
            raise IndexError(f"image {first} of {len(array)}")
        read = os.pread(stream.fileno(), span * len(run), start + first * stride)
        if len(read) < span * len(run):
            raise shorter
        rows[run[0] : run[-1] + 1] = np.ndarray((len(run), *row.shape), row.dtype, read, 0, (stride, *row.strides))
    return rows


def _write_npy(stream: BinaryIO, packed: Packed, pieces: Iterator[bytes]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(packed.dtype), "fortran_order": packed.fortran, "shape": packed.shape}
    np.lib.format.write_array_header_1_0(stream, header)
    for piece in pieces:
        stream.write(piece)


def _pieces(packed: Packed, source: Path) -> Iterator[bytes]:
    """The bytes, as many as there must be; an error of the source, and only that, becomes a `UserError`."""
    assert packed.pieces is not None
    with readable(source, packed.form):
        left = packed.nbytes
        for piece in packed.pieces():
            left -= len(piece)
            if left < 0:
                break
            yield piece
        if left:
            raise ValueError(f"it holds {'more' if left < 0 else 'fewer'} bytes than its header says")


# Formats


def _npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, first axis fastest, dtype); the stream is left where the numbers begin."""
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"it has version {version} of the npy format")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "saved by Python 2", as dSprites was: nothing a user could change
        return read(stream)


def _entry(names: Collection[str], key: str, path: Path, what: str) -> str:
    """The entry that is meant, or a `UserError`."""
    chosen = key or (next(iter(names)) if len(names) == 1 else "images")
    if chosen not in names:
        setting = "data.array_key" if what == "array" else "data.path"
        needed = "" if what == "array" else f"; data.kind {what} needs it"
        raise UserError(f"{setting}: no entry {chosen!r} in {path}, which holds {', '.join(names) or 'nothing'}{needed}")
    return chosen


def _in_npy(path: Path, key: str, what: str) -> Packed:
    if key and what == "array":
        raise UserError(f"data.array_key: {path} holds one array without a name; leave the key empty")
    if key:
        raise UserError(f"data.path: {path} holds one array without a name; data.kind {what} needs one named {key!r}")
    with open(path, "rb") as stream:
        shape, fortran, dtype = _npy_header(stream)
        return Packed(dtype, shape, None, stream.tell(), fortran)


def _in_npz(path: Path, key: str, what: str) -> tuple[str, Packed]:
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
        if any(name.endswith("/data.pkl") for name in entries):
            raise ValueError("it is a PyTorch file; save the images as one of these")
        name = _entry(entries, key, path, what)
        entry = entries[name]
        with archive.open(entry) as stream:
            if stream.read(len(NPY)) != NPY:
                raise UserError(f"data.{'array_key' if what == 'array' else 'path'}: {name!r} in {path} is not an array")
        with archive.open(entry) as stream:
            shape, fortran, dtype = _npy_header(stream)
            start = stream.tell()
    offset = None
    if entry.compress_type == zipfile.ZIP_STORED:
        with open(path, "rb") as file:
            file.seek(entry.header_offset)
            local = file.read(30)  # ends with the lengths of the name and of the extra field, which both follow
        offset = entry.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little") + start

    def pieces() -> Iterator[bytes]:
        with zipfile.ZipFile(path) as archive, archive.open(entry) as stream:
            stream.read(start)
            while piece := stream.read(PIECE):  # up to the end, since only there zipfile compares the checksum
                yield piece

    packed = Packed(dtype, shape, pieces, offset, fortran)
    if not dtype.hasobject and entry.file_size != start + packed.nbytes:
        raise ValueError(f"{name!r} has {entry.file_size - start} bytes, not the {packed.nbytes} of its shape {shape}")
    return name, packed


def _before_hdf5(stream: BinaryIO) -> int | None:
    """Where HDF5 begins, behind a block of the user's own of 512 bytes, 1024, 2048 ..., if anywhere."""
    for place in (0, *(512 << n for n in range(12))):
        stream.seek(place)
        if stream.read(len(HDF5)) == HDF5:
            return place
    return None


def _in_hdf5(path: Path, key: str, what: str, before: int) -> tuple[str, Packed]:
    try:
        import h5py
    except ImportError:
        raise UserError(f"data.kind {what} reads HDF5, and h5py is not installed; `pip install 'sami-fast[feed]'`") from None

    with h5py.File(path, "r") as file:
        names: list[str] = []
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        name = _entry(names, key, path, what)
        dataset = file[name]
        shape, dtype, chunks = dataset.shape, dataset.dtype, dataset.chunks
        if shape is None:
            raise ValueError(f"{name!r} has no shape")
        if dataset.external or dataset.is_virtual:  # any file that this user may read could be passed off as images
            raise ValueError(f"{name!r} lies in other files, by {'external' if dataset.external else 'virtual'} storage")
        packed = Packed(dtype, shape)
        as_it_is = not before and chunks is None and dataset.id.get_storage_size() == packed.nbytes
        offset = dataset.id.get_offset() if as_it_is else None

    def pieces() -> Iterator[bytes]:
        with h5py.File(path, "r") as file:
            dataset = file[name]
            if not shape:
                yield dataset[()].tobytes()
                return
            block = chunks[0] if chunks else 1  # whole chunks, so that each is unpacked once
            rows = max(PIECE * shape[0] // packed.nbytes // block, 1) * block
            for first in range(0, shape[0], rows):
                yield dataset[first : first + rows].tobytes()

    return name, Packed(dtype, shape, pieces, offset)
