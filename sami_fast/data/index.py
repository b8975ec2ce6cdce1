"""The usable files of a folder and what is known of each, kept on the disk so that only new and changed files are looked at again."""

import hashlib
import json
import logging
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import write_text_whole
from .cache import cache_dir
from .decode import BadFile

VERSION = 2
INSPECTORS = 4  # threads that look into files, more than there may be cores: they mostly wait for the disk
SHOWN = 20  # names of bad files that the log shows; all of them stand in a file beside the index

log = logging.getLogger("sami_fast.data")
_told: set[tuple[Any, ...]] = set()  # folders and bad files that this process has warned of


@dataclass(frozen=True)
class Index:
    """Files of a folder, in the order of their names.

    Args:
        folder: The folder.
        cache: Where its index and decoded pixels are kept.
        names: Usable files, paths relative to the folder with forward slashes.
        facts: What the inspection found, one per name.
        bad: Unusable files and why.
        others: Number of files with other suffixes, which are ignored.
        state: Changes when a usable file comes, goes or is written anew.
    """

    folder: Path
    cache: Path
    names: list[str]
    facts: list[Any]
    bad: dict[str, str]
    others: int
    state: str


def _stat(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except (OSError, ValueError):  # ValueError: a zero byte in a listed name
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _walk(folder: Path, suffixes: frozenset[str]) -> tuple[list[str], int]:
    """Names with these suffixes below a folder, sorted, and the number of other files. Links to folders are followed, circles are not."""

    def unreadable(error: OSError) -> None:
        log.warning("%s: skipped a folder: %s", plain(str(error.filename)), error.strerror)

    names, others, seen = [], 0, set()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=unreadable):
        here = os.stat(place)
        if (here.st_dev, here.st_ino) in seen:
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        # In order, so that of two links to a folder always the same one is followed.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        prefix = os.path.relpath(place, folder)
        for name in files:
            if name.startswith("."):
                continue
            if os.path.splitext(name)[1].lower() in suffixes:
                names.append(name if prefix == "." else f"{prefix}/{name}".replace(os.sep, "/"))
            else:
                others += 1
    return sorted(names), others


def build_index(
    folder: Path,
    inspect: Callable[[Path], Any],
    suffixes: frozenset[str],
    *,
    what: str,
    max_bad: float,
    configured_cache: str = "",
    names: Sequence[str] | None = None,
) -> Index:
    """Look at every file of a folder, or only at those that are new or changed since the last time.

    Args:
        folder: The folder.
        inspect: What is to be known of a file, as plain JSON; raises `BadFile` or `OSError`.
        suffixes: Of the files that count, in lower case.
        what: "images" or "videos", for messages; also names the index.
        max_bad: Largest share of unusable files.
        configured_cache: `DataConfig.cache_dir`.
        names: The files, if they are listed somewhere, instead of all below the folder.
    Raises:
        UserError: no such folder, no usable file, or more unusable files than `max_bad` allows.
    """
    try:
        there = folder.is_dir()
    except OSError as error:
        raise UserError(f"data.path: cannot reach the folder {folder} ({error.strerror})") from None
    if not there:
        raise UserError(f"data.path: no folder {folder}")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise UserError(f"data.path: no permission to read the folder {folder}")
    others = 0
    listed = sorted(names) if names is not None else None
    if listed is None:
        listed, others = _walk(folder, suffixes)
    if not listed:
        some = ", ".join(sorted(suffixes)[:6])
        raise UserError(f"data.path: no {what} in {folder}; expected files ending in {some} ..., found {others} other file(s)")
    try:
        cache = cache_dir(configured_cache, folder)
    except OSError as error:
        raise UserError(f"data.cache_dir: cannot keep the index of {folder} there ({error})") from None
    file = cache / f"{what}.json"
    known = _read(file)
    found = known.copy()
    stats = {name: _stat(folder / name) for name in listed}
    stale = [name for name in listed if name not in known or tuple(known[name][:2]) != stats[name]]

    def look(name: str) -> list[Any]:
        path = folder / name
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # reading from a pipe or a device may never end
                raise BadFile("not a regular file")
            return [*stats[name], "", inspect(path)]
        except BadFile as error:
            return [*stats[name], str(error), None]
        except (OSError, ValueError) as error:  # may pass, as a lost network does: -1 fits no file, so it is looked at again
            return [-1, -1, getattr(error, "strerror", None) or str(error), None]

    if stale:
        if len(stale) > 10_000:
            log.warning("%s: looking at %d new or changed %s", folder, len(stale), what)
        with ThreadPoolExecutor(INSPECTORS) as pool:
            found.update(zip(stale, pool.map(look, stale, chunksize=64), strict=True))
        entries = found if names is not None else {name: found[name] for name in listed}
        _write(file, json.dumps({"version": VERSION, "files": entries}))
    bad = {name: found[name][2] for name in listed if found[name][2]}
    report_bad(folder, bad, len(listed), max_bad, what, cache)
    good = [name for name in listed if not found[name][2]]
    if not good:
        raise UserError(f"data.path: none of the {len(listed)} {what} in {folder} can be read: {shown(bad, 3)}")
    state = fingerprint(f"{name} {found[name][:2]}" for name in good)
    return Index(folder, cache, good, [found[name][3] for name in good], bad, others, state)


def _read(file: Path) -> dict[str, list[Any]]:
    try:
        content = json.loads(file.read_text())
        files = content["files"] if content["version"] == VERSION else {}
        return {name: entry for name, entry in files.items() if len(entry) == 4}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}  # missing, cut off, or of another version: it is made anew


def _write(file: Path, text: str) -> None:
    """A full disk is no reason to end a run that only reads."""
    try:
        write_text_whole(file, text)
    except OSError as error:
        log.warning("%s: not written: %s", file, error.strerror)


def plain(name: str) -> str:
    """A file name for a message: bytes that are no text, line breaks and the like are escaped."""
    return name if name.isprintable() else ascii(name)


def shown(bad: dict[str, str], most: int) -> str:
    """Names and reasons for a message."""
    first = [f"{plain(name)} ({reason})" for name, reason in list(bad.items())[:most]]
    return ", ".join(first) + (f" and {len(bad) - most} more" if len(bad) > most else "")


def report_bad(folder: Path, bad: dict[str, str], total: int, max_bad: float, what: str, cache: Path) -> None:
    """Log skipped files.

    Raises:
        UserError: they are more than the allowed share.
    """
    if not bad:
        return
    everything = cache / f"unreadable_{what}.txt"
    _write(everything, "".join(f"{name!a}: {plain(reason)}\n" for name, reason in bad.items()))
    if len(bad) > max_bad * total:
        raise UserError(
            f"data.path: {len(bad)} of {total} {what} in {folder} cannot be read, data.max_bad={max_bad:g} allows "
            f"{int(max_bad * total)}: {shown(bad, 3)}; all of them: {everything}"
        )
    if os.environ.get("RANK", "0") == "0" and (folder, *bad) not in _told:  # one warning, however often the folder is opened
        _told.add((folder, *bad))
        log.warning("%s: skipped %d of %d %s: %s", folder, len(bad), total, what, shown(bad, SHOWN))


def fingerprint(parts: Iterable[str]) -> str:
    """A short name for a list of names: a resumed run must see the same files."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()[:16]
