"""What is kept on the disk between runs: indices of folders, arrays taken out of their archives, decoded pixels.

Everything here can be deleted at any time; it is made again.
"""

import hashlib
import os
import zlib
from pathlib import Path

import numpy as np

SEED = 0x5A31  # of the checksums: a hole in the file, all zeros, must not look like a record


def cache_dir(configured: str, source: Path) -> Path:
    """The folder, made, of what belongs to one file or folder of data.

    Args:
        configured: `DataConfig.cache_dir`.
        source: The data.
    Raises:
        OSError: the folder cannot be made.
    """
    base = Path(configured) if configured else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sami-fast"
    source = source.resolve()
    folder = base / f"{source.name}-{hashlib.sha256(str(source).encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


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
        self.file: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if os.fstat(self.file).st_size != count * self.record:
            os.ftruncate(self.file, count * self.record)  # sparse: takes room as it fills

    def _checksum(self, pixels: memoryview | bytes) -> int:
        return zlib.crc32(pixels, SEED)

    def read(self, place: int, into: np.ndarray) -> bool:
        """Fill `into`, contiguous [C, H, W] uint8, if the image is there."""
        if self.file is None:
            return False
        record = os.pread(self.file, self.record, place * self.record)
        if len(record) < self.record or int.from_bytes(record[-4:], "little") != self._checksum(memoryview(record)[:-4]):
            return False
        into.reshape(-1)[:] = np.frombuffer(record, np.uint8, self.nbytes)
        return True

    def write(self, place: int, pixels: np.ndarray) -> None:
        """Keep one image, [C, H, W] uint8. A full disk ends the writing, not the run."""
        if self.file is None:
            return
        data = np.ascontiguousarray(pixels).tobytes()
        try:
            os.pwrite(self.file, data + self._checksum(data).to_bytes(4, "little"), place * self.record)
        except OSError:
            self.close()

    def close(self) -> None:
        if self.file is not None:
            file, self.file = self.file, None
            os.close(file)

    def __del__(self) -> None:
        self.close()
