"""What data are: the same content is the same data, wherever it lies and whenever it was written.

Times only say whether what is kept of a file still holds (`index`, `storage.stamp`): where they differ, the file is looked at again.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from ..files import open_regular

BLOCK, BLOCKS = 2**16, 2**10  # bytes, and how many such samples stand for a file that is larger than all of them: 64 MiB


def content_of(path: Path, block: int = BLOCK, blocks: int = BLOCKS) -> str:
    """What a file holds, in 32 digits: its size and all of its bytes, or of a larger file samples at equal distances.

    Raises:
        OSError: from the system.
    """
    with open_regular(path) as stream:
        size = stream.seek(0, 2)
        digest = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=16)
        step = max(block, (size - block) // (blocks - 1))
        for place in range(0, size, step):
            stream.seek(place)
            digest.update(stream.read(block))
    return digest.hexdigest()


def digest(parts: Iterable[str]) -> str:
    """A short name for a list of texts, of which a dataset's `fingerprint` is made: a resumed run must see the same files."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode("utf-8", "surrogateescape") + b"\0")
    return found.hexdigest()[:16]
