"""Files that appear whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial-"  # begins the name of everything half-written; safe to delete when nothing runs


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write beside the file, flush to the disk, then rename: a reader, a kill or a full disk never leaves a part.

    Args:
        path: The file; an existing one is replaced at the end.
        write: Writes the content to an open binary file.
    Raises:
        OSError: from the system; the old file is as it was, and nothing is left beside it.
    """
    partial = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
    try:
        with open(partial, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text_whole(path: Path, text: str) -> None:
    """`write_whole` of a string in UTF-8."""
    write_whole(path, lambda stream: stream.write(text.encode()))
