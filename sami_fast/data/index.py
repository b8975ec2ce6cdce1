"""The usable files of a folder and what is known of each, kept on the disk so that only new and changed files are looked at again."""

import errno
import json
import logging
import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError, printable
from ..files import absent, append_text, locked, open_regular, write_text_whole
from ..progress import bar, hms
from . import cache
from .cache import tell_once
from .decode import HEIC_HINT, HEIC_SUFFIXES, BadFile
from .identity import content_of, digest

VERSION = 4  # of what is known of a file, and of how it is decoded
INSPECTORS = 4  # threads that look into files, more than there may be cores: they mostly wait for the disk
PIECE = 256  # files after which what was found in them is kept
PROGRESS = 20.0  # seconds between two words on how far the looking has come
DENIED = os.strerror(errno.EACCES)
SHOWN = 20  # names of bad files that the log shows; all of them stand in a file beside the index

log = logging.getLogger("sami_fast.data")

Entry = list[Any]  # size, times, "" or why it cannot be used, content, facts


@dataclass(frozen=True)
class Index:
    """Files of a folder, in the order of their names.

    Args:
        folder: The folder.
        cache: Where its index and decoded pixels are kept.
        names: Usable files, paths relative to the folder with forward slashes.
        facts: What the inspection found, one per name.
        bad: Unusable files and why.
        contents: `content_of` each.
        others: Files with other endings, which are left out: how many of each.
    """

    folder: Path
    cache: Path
    names: Sequence[str]
    facts: Sequence[Any]
    bad: dict[str, str]
    contents: Sequence[str]
    others: Mapping[str, int]

    @property
    def state(self) -> str:
        """Changes when a usable file comes, goes or gets another content, and with the way of decoding."""
        return digest([str(VERSION), *(f"{name} {content}" for name, content in zip(self.names, self.contents, strict=True))])


def _stat(path: Path) -> Entry:
    """Size and times; the second time is the system's own, and changes whatever a copying program does to the first."""
    try:
        found = path.stat()
    except (OSError, ValueError):  # ValueError: a zero byte in a listed name
        return [-1, -1, -1]
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _walk(folder: Path, suffixes: frozenset[str]) -> tuple[list[str], Counter[str]]:
    """Names with these suffixes below a folder, sorted, and how many others of each. Links to folders are followed, circles are not."""

    def unreadable(error: OSError) -> None:
        log.warning("%s: skipped a folder: %s", printable(str(error.filename)), error.strerror)

    names, others, seen = [], Counter(), set()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=unreadable):
        try:
            here = os.stat(place)
        except OSError as error:  # gone since its names were read
            unreadable(error)
            continue
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
            ending = os.path.splitext(name)[1].lower()
            if ending in suffixes:
                names.append(name if prefix == "." else f"{prefix}/{name}".replace(os.sep, "/"))
            else:
                others[ending] += 1
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
    content: Callable[[Path], str] = content_of,
    piece: int = 0,
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
        content: What a file holds, in a few digits.
        piece: Files after which what was found in them is kept; 0: `PIECE`.
    Raises:
        UserError: no such folder, no usable file, or more unusable files than `max_bad` allows.
    """
    try:
        there = folder.is_dir()
    except OSError as error:
        raise UserError(f"data.path: cannot reach the folder {folder} ({error.strerror})") from None
    if not there:
        raise UserError(f"data.path: {absent(folder, 'folder')}")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise UserError(f"data.path: no permission to read the folder {folder}")
    others: Counter[str] = Counter()
    listed = sorted(names) if names is not None else None
    if listed is None:
        listed, others = _walk(folder, suffixes)
    hint = HEIC_HINT if what == "images" and HEIC_SUFFIXES & others.keys() else ""
    if not listed:
        some = ", ".join(sorted(suffixes)[:6])
        found = f"{others.total()} other file(s)" + (f": {left_out(others)}" if others else "")
        raise UserError(f"data.path: no {what} in {folder}; expected files ending in {some} ..., found {found}{hint}")
    if others:
        share = others.total() / (others.total() + len(listed))
        tell_once(f"{folder}: {share:.2%} of the files are left out, by their endings: {left_out(others)}{hint}")
    place = cache.cache_dir(configured_cache, folder)
    stats = {name: _stat(folder / name) for name in listed}
    known = _read(place / f"{what}.json")
    new = {*_stale(folder, known, stats)}
    if new:
        try:
            place = cache.writable(place)
            file, lines = place / f"{what}.json", place / f"{what}.jsonl"
            with locked(place):
                held = _read(file)
                known |= held | _read_lines(lines)  # another process may have looked meanwhile
                if stale := _stale(folder, known, stats):
                    for entries in _look(folder, {name: stats[name] for name in stale}, inspect, what, content, piece or PIECE):
                        known |= entries
                        _append(lines, entries)
                    kept = known if names is not None else {name: known[name] for name in listed}
                    if kept != held:  # it is the same where a file could not be reached, this time as before
                        _write(file, json.dumps({"version": VERSION, "files": kept}))
                    lines.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"data.cache_dir: cannot keep the index of {folder} there ({error})") from None
    bad = {name: known[name][3] for name in listed if known[name][3]}
    report_bad(folder, bad, len(listed), max_bad, what, place, known=not bad.keys() & new)
    good = [name for name in listed if not known[name][3]]
    if not good:
        raise UserError(f"data.path: none of the {len(listed)} {what} in {folder} can be read: {shown(bad, 3)}")
    return Index(folder, place, good, [known[name][5] for name in good], bad, [known[name][4] for name in good], others)


def _stale(folder: Path, known: Mapping[str, Entry], stats: Mapping[str, Entry]) -> list[str]:
    """Files that are new or have changed since they were looked at, or were closed to whoever looked and are open to this user."""

    def is_opened(name: str) -> bool:
        with suppress(OSError):
            open_regular(folder / name).close()
            return True
        return False

    return [
        name
        for name, found in stats.items()
        if (entry := known.get(name)) is None or entry[:3] != found or (entry[3] == DENIED and is_opened(name))
    ]


def _look(
    folder: Path, stats: Mapping[str, Entry], inspect: Callable[[Path], Any], what: str, content: Callable[[Path], str], piece: int
) -> Iterator[dict[str, Entry]]:
    """What is found in files, some at a time. `stats` of each were taken before."""

    def one(name: str) -> Entry:
        path = folder / name
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # reading from a pipe or a device may never end
                raise BadFile("not a regular file")
            facts = inspect(path)
            return [*stats[name], "", content(path), facts]
        except BadFile as error:
            return [*stats[name], str(error), "", None]
        except PermissionError:
            return [*stats[name], DENIED, "", None]
        except (OSError, ValueError) as error:  # may pass, as a lost network does: -1 fits no file, so it is looked at again
            return [-1, -1, -1, getattr(error, "strerror", None) or str(error), "", None]

    begin = told = time.monotonic()
    waiting = list(stats)
    with ThreadPoolExecutor(INSPECTORS) as pool, bar(len(waiting), f"looking at {printable(folder.name)}", what) as progress:
        for first in range(0, len(waiting), piece):
            names = waiting[first : first + piece]
            yield dict(zip(names, pool.map(one, names), strict=True))
            progress.update(len(names))
            done, now = first + len(names), time.monotonic()
            if progress.disable and now - told > PROGRESS:
                told, left = now, (now - begin) / done * (len(waiting) - done)
                log.warning("%s: looked at %d of %d new or changed %s, %s left", folder, done, len(waiting), what, hms(left))


def left_out(others: Mapping[str, int]) -> str:
    """How many files of which endings, most first."""
    first = sorted(others.items(), key=lambda item: (-item[1], item[0]))
    named = ", ".join(f"{count} {printable(ending) or 'without one'}" for ending, count in first[:SHOWN])
    return named + (f" and {len(first) - SHOWN} more endings" if len(first) > SHOWN else "")


def _read(file: Path) -> dict[str, Entry]:
    try:
        with open_regular(file) as stream:
            content = json.load(stream)
        files = content["files"] if content["version"] == VERSION else {}
        return {name: entry for name, entry in files.items() if len(entry) == 6}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}  # missing, cut off, or of another version: it is made anew


def _read_lines(file: Path) -> dict[str, Entry]:
    """What a process had found that was killed before it had looked at every file."""
    found = {}
    with suppress(OSError), open_regular(file) as stream:
        for line in stream:
            with suppress(ValueError, TypeError):  # cut off
                version, name, entry = json.loads(line)
                if version == VERSION and len(entry) == 6:
                    found[name] = entry
    return found


def _append(file: Path, entries: Mapping[str, Entry]) -> None:
    with suppress(OSError):  # a full disk: `_write` says so in the end
        append_text(file, "".join(json.dumps([VERSION, name, entry]) + "\n" for name, entry in entries.items()))


def _write(file: Path, text: str) -> None:
    """A full disk is no reason to end a run that only reads."""
    try:
        write_text_whole(file, text)
    except OSError as error:
        log.warning("%s: not written: %s", file, error.strerror)


def shown(bad: dict[str, str], most: int) -> str:
    """Names and reasons for a message."""
    first = [f"{printable(name)} ({reason})" for name, reason in list(bad.items())[:most]]
    return ", ".join(first) + (f" and {len(bad) - most} more" if len(bad) > most else "")


def report_bad(folder: Path, bad: dict[str, str], total: int, max_bad: float, what: str, cache: Path, known: bool = False) -> None:
    """Log skipped files, unless an earlier command has: they are `known` by the index.

    Raises:
        UserError: they are more than the allowed share.
    """
    if not bad:
        return
    everything = cache / f"unreadable_{what}.txt"
    if not known:
        _write(everything, "".join(f"{name!a}: {printable(reason)}\n" for name, reason in bad.items()))
    if len(bad) > max_bad * total:
        raise UserError(
            f"data.path: {len(bad)} of {total} {what} in {folder} cannot be read, data.max_bad={max_bad:g} allows "
            f"{int(max_bad * total)}: {shown(bad, 3)}; all of them: {everything}"
        )
    if not known:
        tell_once(f"{folder}: skipped {len(bad)} of {total} {what}: {shown(bad, SHOWN)}")
