"""What is kept on the disk between runs: indices of folders, arrays taken out of their archives, decoded and rendered pixels.

Everything here can be deleted at any time; it is made again.
"""

import errno
import hashlib
import logging
import os
import weakref
import zlib
from pathlib import Path

import numpy as np

from ..environment import cache_home, is_first_rank, temporary_home
from ..files import LOCK, open_lock

log = logging.getLogger("sami_fast.data")
_told: set[object] = set()  # what this process has said

SEED = 0x5A31  # checksums start here, so that zeros, where nothing was written yet, do not pass for an image


def tell_once(message: str, about: object = "") -> None:
    """Warn on the first rank, and once, however often data are opened. `about` tells warnings apart; the message itself when empty."""
    if is_first_rank() and (about or message) not in _told:
        _told.add(about or message)
        log.warning("%s", message)


def in_words(nbytes: float) -> str:
    """A size for a message: "1.5 GiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.4g} TiB"


def base_dir(configured: str) -> Path:
    """The folder of everything that is kept; `configured` is `DataConfig.cache_dir`."""
    return Path(configured) if configured else cache_home() / "sami-fast"


def cache_dir(configured: str, source: Path) -> Path:
    """The folder, which may not be there yet, of what belongs to one file or folder of data.

    Args:
        configured: `DataConfig.cache_dir`.
        source: The data.
    """
    source = source.resolve()
    name = f"{source.name[:48]}-{hashlib.sha256(os.fsencode(source)).hexdigest()[:16]}"  # a name has at most 255 bytes
    return base_dir(configured) / name


def writable(folder: Path) -> Path:
    """The folder, made if need be, or one like it among the temporary ones where it must not be written.

    Raises:
        OSError: it cannot be made for another reason, such as a file of its name.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        open_lock(folder / LOCK).close()
        return folder
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        instead = temporary_home() / folder.name
        instead.mkdir(exist_ok=True)
        tell_once(f"data.cache_dir: {folder} cannot be written ({error.strerror}); what is made is kept in {instead}")
        return instead


class PixelCache:
    """Decoded images in one file, each with a checksum: what is missing, torn or half-written is simply decoded again.

    Any number of processes may read and write at the same time, since all of them write the same bytes.

    Args:
        path: The file.
        count: Images.
        shape: C, H, W.
    """

    def __init__(self, path: Path, count: int, shape: tuple[int, int, int]) -> None:
        self.shape, self.nbytes = shape, int(np.prod(shape))
        self.record = self.nbytes + 4
        self.full = False
        self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        weakref.finalize(self, os.close, self.file)  # not __del__, which at the end of a process finds modules taken down
        if os.fstat(self.file).st_size != count * self.record:
            os.ftruncate(self.file, count * self.record)  # sparse: it takes up disk space only as images are written

    @classmethod
    def open(cls, folder: Path, name: str, state: str, count: int, shape: tuple[int, int, int]) -> "PixelCache":
        """The cache of this name and state of the data; those of other states are deleted.

        Raises:
            OSError: the file cannot be made.
        """
        path = folder / f"{name}_{state}.u8"
        for other in folder.glob(f"{name}_*.u8"):
            if other != path:
                other.unlink(missing_ok=True)
        return cls(path, count, shape)

    def read(self, place: int, into: np.ndarray) -> bool:
        """Fill `into`, contiguous [C, H, W] uint8, if the image is there."""
        record = os.pread(self.file, self.record, place * self.record)
        if len(record) < self.record or int.from_bytes(record[-4:], "little") != zlib.crc32(memoryview(record)[:-4], SEED):
            return False
        into.reshape(-1)[:] = np.frombuffer(record, np.uint8, self.nbytes)
        return True

    def write(self, place: int, pixels: np.ndarray) -> None:
        """Keep one image, [C, H, W] uint8. A full disk ends the keeping, not the run."""
        if self.full:
            return
        data = np.ascontiguousarray(pixels).tobytes()
        try:
            os.pwrite(self.file, data + zlib.crc32(data, SEED).to_bytes(4, "little"), place * self.record)
        except OSError:
            self.full = True
