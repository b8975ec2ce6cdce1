"""Files that appear whole or not at all, locks between processes, files that are read although a stranger may have made them, `~`."""

import errno
import fcntl
import io
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from .errors import UserError

NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
PARTIAL = ".partial-"  # begins the name of everything half-written; safe to delete when nothing runs
FORGOTTEN = 3600  # seconds without a write after which, where there are no locks, a half-written file is taken for what a kill left
LOCK = "lock"  # in a folder of the cache: whose lock `locked` takes
MOST_JSON = 2**26  # bytes
DEEPEST_JSON = 32  # lists and objects inside each other


def partial_of(path: Path) -> Path:
    """A name beside a file or folder for what is to become it. Nobody else comes to the same, or can guess it and put a link there."""
    return path.with_name(PARTIAL + secrets.token_hex(8))


def expanded(path: str) -> str:
    """A path as a user writes it, with `~` at its beginning for the home folder. A shell puts that in only at the beginning of a word.

    Raises:
        UserError: `~name`, and there is no such user.
    """
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise UserError(f"{path}: no home folder of that name; write ./{path} for a file or folder that begins with ~")
    return found


def absent(path: Path, wanted: str) -> str:
    """Why a "file" or a "folder" cannot be had where it was to be, for a message: there is none, or something else."""
    if not path.exists():
        return f"no {wanted} {path}"
    found = "folder" if path.is_dir() else "file" if path.is_file() else "device or pipe"
    return f"expected a {wanted}, found the {found} {path}"


def is_partial(path: Path) -> bool:
    """Whether a name is of `partial_of`."""
    return re.fullmatch(rf"{re.escape(PARTIAL)}[0-9a-f]{{16}}", path.name) is not None


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write beside the file, flush to the disk, then rename: a reader, a kill or a full disk never leaves a part.

    What killed processes left half-written beside it is removed.

    Args:
        path: The file; an existing one is replaced at the end.
        write: Writes the content to an open binary file.
    Raises:
        OSError: from the system; the old file is as it was, and nothing is left beside it.
    """
    remove_partial(path.parent)
    partial = partial_of(path)
    with _begun(partial) as stream:
        try:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def write_text_whole(path: Path, text: str) -> None:
    """`write_whole` of a string in UTF-8."""
    write_whole(path, lambda stream: stream.write(text.encode()))


def take_lock(file: IO[Any], *, wait: bool) -> bool | None:
    """Lock an open file until it is closed, or its process ends.

    Args:
        file: Open, of any content.
        wait: For another process that holds the lock.
    Returns:
        Whether the lock is taken; None where the file system has no locks, as some network file systems.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None
    return True


def _begun(partial: Path) -> BinaryIO:
    """A new file, locked as long as it is open, by which others know that somebody still writes it."""
    while True:
        stream = open(partial, "xb")  # noqa: SIM115 (the caller closes it)
        take_lock(stream, wait=True)
        if os.fstat(stream.fileno()).st_nlink:
            return stream
        stream.close()  # before it was locked, another process took it for a leftover


def remove_partial(folder: Path) -> None:
    """Remove what killed processes left half-written in a folder; what a living one writes stays."""
    with suppress(OSError):
        for leftover in folder.iterdir():
            if is_partial(leftover):
                # NFS lets only those lock who may write
                with suppress(OSError), _opened(leftover, os.O_RDWR, "r+b") as stream:
                    if not _is_written(stream):
                        leftover.unlink()


def is_removed(path: Path) -> bool:
    """Whether a name stands for what has been removed: NFS gives such a one to a file that some process still has open."""
    return re.fullmatch(r"\.nfs[0-9a-f]{8,}", path.name) is not None


def _is_written(stream: BinaryIO) -> bool:
    taken = take_lock(stream, wait=False)
    return time.time() - os.fstat(stream.fileno()).st_mtime < FORGOTTEN if taken is None else not taken


def open_lock(path: Path) -> BinaryIO:
    """A file that is there to be locked, made if it is not there; never through a link.

    Raises:
        OSError: from the system.
    """
    return open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666), "rb")


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """Inside, no other process is: of those that write the same entry of a cache one works, the others find it done.

    Where nothing can be locked, as on some network file systems and where one may only read, every process works.
    """
    try:
        lock = open_lock(folder / LOCK)
        take_lock(lock, wait=True)
    except OSError:
        lock = None
    try:
        yield
    finally:
        if lock is not None:
            lock.close()


def open_regular(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Open a file to read it. A pipe, which may keep a reader waiting for ever, or a device, which may have no end, is refused.

    Raises:
        OSError: it is no regular file, or from the system.
    """
    return _opened(path, os.O_RDONLY, "rb")


def append_text(path: Path, text: str) -> None:
    """Add to the end of a file, made if it is not there; never through a link, and to regular files alone.

    Raises:
        OSError: it is something else, or from the system.
    """
    with _opened(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, "ab") as stream:
        stream.write(text.encode())


def _opened(path: str | os.PathLike[str], flags: int, mode: str) -> Any:
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(descriptor, mode)


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: as `open_regular`.
        ValueError: it is no JSON, larger than 64 MiB or nested deeper than 32 levels.
    """
    with open_regular(path) as stream:
        content = stream.read(MOST_JSON + 1)
    if len(content) > MOST_JSON:
        raise ValueError(f"larger than {MOST_JSON >> 20} MiB")
    return parse_json(content)


def parse_json(text: str | bytes) -> Any:
    """What JSON says, nested no deeper than 32 levels: code that walks through it may recurse.

    Raises:
        ValueError: it is no such JSON.
    """
    too_deep = ValueError(f"nested deeper than {DEEPEST_JSON} levels")
    try:
        value = json.loads(text)
    except RecursionError:
        raise too_deep from None
    level = [value]
    for _ in range(DEEPEST_JSON):
        inside = [entry.values() if isinstance(entry, dict) else entry for entry in level if isinstance(entry, dict | list)]
        level = [each for values in inside for each in values]
    if level:
        raise too_deep
    return value
