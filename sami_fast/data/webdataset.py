"""Images of tar shards, in the layout of WebDataset: what lies side by side under one key, such as 000123.jpg and 000123.json, is a sample.

Every image is read where it lies, by one read at its place: any order, any share and any resume is that of images by index. So neither a
reader in order nor a buffer to shuffle in is needed.
"""

import os
import resource
from collections import Counter, OrderedDict
from collections.abc import Iterator, Set
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile

import numpy as np

from ..errors import UserError
from ..files import locked, open_regular, parse_json, write_whole
from .cache import in_words, writable
from .decode import HEIC_SUFFIXES, IMAGE_SUFFIXES, LARGEST_FILE, BadFile
from .index import Index
from .labels import Column
from .shards import Columns, Names, Shards, encodable, text_of
from .tar import Member, TarHeaders

IMAGES = frozenset(suffix[1:].encode() for suffix in IMAGE_SUFFIXES | HEIC_SUFFIXES)
LABELS = frozenset({b"json", b"cls", b"txt"})
LARGEST_LABEL = 1 << 20  # bytes of a file of labels
FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # that a process may have open; -1: any number
OPEN = min(1024, FILES // 4) if FILES > 0 else 1024  # shards that are kept open
MOST_ENDINGS = 64  # different ones that are counted
ROW = np.dtype([("offset", "<u8"), ("name", "<u8"), ("size", "<u4")])  # of an image, and where its name begins among those of all

Sample = tuple[Member, dict[str, Member]]  # the image, and labels by ending


class TarNames(Names):
    """Names out of the mapped index."""

    def __init__(self, shards: list[str], firsts: np.ndarray, begins: np.ndarray, letters: np.ndarray) -> None:
        super().__init__(len(begins) - 1)
        self.shards, self.firsts, self.begins, self.letters = shards, firsts, begins, letters

    def name(self, place: int) -> str:
        shard = self.shards[int(np.searchsorted(self.firsts, place, side="right")) - 1]
        return f"{shard}/{os.fsdecode(self.letters[int(self.begins[place]) : int(self.begins[place + 1])].tobytes())}"


class WebDataset(Shards):
    """Images of every .tar below a folder, or of a pattern, in the order of shards and of what is in them.

    A sample's labels are the values of its .json, and its .cls and .txt under these names. Arguments and errors as in `Shards`.
    """

    ending, unit = ".tar", "samples"

    def __init__(self, path: str, **others: Any) -> None:
        self._open: OrderedDict[int, BinaryIO] = OrderedDict()
        super().__init__(path, **others)

    def inspect(self, path: Path) -> dict[str, Any]:
        others, fields, rows, names = Counter[str](), {}, [], []
        with open_regular(path) as stream:
            found, headers, letters = os.fstat(stream.fileno()), TarHeaders(stream), 0
            for image, labels in samples(headers, others):
                rows.append((image.offset, letters, min(image.size, LARGEST_FILE + 1)))
                names.append(image.name)
                letters += len(image.name)
                if len(rows) == 1:
                    with suppress(BadFile):  # it is an error for those who ask for labels
                        fields = labels_of_sample(stream, labels)
        if headers.passed_over:
            others[" (links, devices and the like)"] = headers.passed_over
        part = self._part(writable(self.kept), headers.digest)
        if not part.exists():
            part.parent.mkdir(parents=True, exist_ok=True)
            content = {"rows": np.array(rows, ROW), "letters": np.frombuffer(b"".join(names), np.uint8)}
            write_whole(part, lambda stream: np.savez(stream, **content))
        known = {"images": len(rows), "bytes": found.st_size, "time": found.st_mtime_ns, "digest": headers.digest}
        return known | {"fields": [name for name, value in fields.items() if text_of(value) is not None], "others": dict(others)}

    @staticmethod
    def _part(cache: Path, digest: str) -> Path:
        """Where the images of one shard stand, by what is in its headers."""
        return cache / "parts" / digest[:2] / f"{digest[2:]}.npz"

    def names_of(self, index: Index) -> Names:
        stem = index.cache / f"samples_{self.listing}_{index.state}"
        found = self._mapped(stem)
        if found is None:
            stem = writable(stem.parent) / stem.name
            with locked(stem.parent):
                found = self._mapped(stem) or self._joined(stem)
        rows, letters = found
        self._offsets, self._sizes = rows["offset"], rows["size"]
        return TarNames([*self.shards.names], self.firsts, rows["name"], letters)

    def _mapped(self, stem: Path) -> tuple[np.ndarray, np.ndarray] | None:
        """The images of all shards, [N + 1] `ROW`, and the letters of their names, where an earlier run has put them together."""
        with suppress(OSError, EOFError, ValueError):  # not there, or damaged
            mapped = (np.load(stem.with_suffix(ending), mmap_mode="r") for ending in (".npy", ".names.npy"))
            rows, letters = (array.view(np.ndarray) for array in mapped)  # whose single entries are read faster
            if len(rows) == self.firsts[-1] + 1 and int(rows["name"][-1]) == len(letters):
                return rows, letters
        return None

    def _joined(self, stem: Path) -> tuple[np.ndarray, np.ndarray]:
        """Put the images of all shards together, in two files that are then mapped: once in memory, for any number of ranks."""
        for stale in stem.parent.glob(f"samples_{self.listing}_*"):
            if not stale.name.startswith(f"{stem.name}."):  # which, without locks, another process may have just written
                stale.unlink(missing_ok=True)
        count, letters = int(self.firsts[-1]), 0

        def parts() -> Iterator[dict[str, np.ndarray]]:
            for name, facts in zip(self.shards.names, self.shards.facts, strict=True):
                part = self._part(stem.parent, facts["digest"])
                if (found := _arrays(part)) is None:  # not there, or damaged
                    part.unlink(missing_ok=True)
                    with suppress(OSError, BadFile):
                        self.inspect(self.shards.folder / name)
                    if (found := _arrays(part)) is None:
                        raise UserError(f"data.path: {name} in {self.shards.folder} changed while it was looked at")
                yield found

        def write_rows(stream: BinaryIO) -> None:
            nonlocal letters
            header = {"descr": np.lib.format.dtype_to_descr(ROW), "fortran_order": False, "shape": (count + 1,)}
            np.lib.format.write_array_header_1_0(stream, header)
            for part in parts():
                rows = part["rows"]
                rows["name"] += letters
                letters += len(part["letters"])
                stream.write(rows.tobytes())
            stream.write(np.array([(0, letters, 0)], ROW).tobytes())  # where the last name ends

        def write_letters(stream: BinaryIO) -> None:
            np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": (letters,)})
            for part in parts():
                stream.write(part["letters"].tobytes())

        write_whole(stem.with_suffix(".npy"), write_rows)
        write_whole(stem.with_suffix(".names.npy"), write_letters)
        found = self._mapped(stem)
        if found is None:
            raise UserError(f"data.cache_dir: {stem.parent} changed while it was written")
        return found

    def _stream(self, number: int) -> BinaryIO:
        """A shard, open. One that others still read is closed when they have finished."""
        with self._lock:
            if (stream := self._open.get(number)) is not None:
                self._open.move_to_end(number)
                return stream
        try:
            stream = open_regular(self.shards.folder / self.shards.names[number])
            self.check_shard(number, os.fstat(stream.fileno()))
        except (OSError, BadFile) as error:
            raise self.lose_shard(number, getattr(error, "strerror", None) or str(error)) from None
        with self._lock:
            self._open[number] = stream
            if len(self._open) > OPEN:
                self._open.popitem(last=False)
        return stream

    def encoded(self, place: int) -> np.ndarray:
        offset, size = int(self._offsets[place]), int(self._sizes[place])
        if size > LARGEST_FILE:
            raise BadFile(f"more than the {in_words(LARGEST_FILE)} of an image file")
        if not size:
            raise BadFile("zero bytes")
        number = self.shard_of(place)
        stream = self._stream(number)
        try:
            content = os.pread(stream.fileno(), size, offset)
        except OSError as error:
            raise self.lose_shard(number, error.strerror or str(error)) from None
        if len(content) < size:
            raise self.lose_shard(number, "has become shorter")
        return np.frombuffer(content, np.uint8)

    def columns(self, wanted: Set[str] | None) -> dict[str, Column]:
        columns = Columns(self.firsts[-1], wanted)
        for number, name in enumerate(self.shards.names):
            row = int(self.firsts[number])
            try:
                with open_regular(self.shards.folder / name) as stream:
                    self.check_shard(number, os.fstat(stream.fileno()))
                    for _, labels in samples(TarHeaders(stream), Counter()):
                        columns.add(row, labels_of_sample(stream, labels))
                        row += 1
            except (OSError, BadFile) as error:
                raise UserError(f"data.labels: {self.shards.folder}/{name}: {error}") from None
        return columns.columns()


def _arrays(part: Path) -> dict[str, np.ndarray] | None:
    """What stands in a file of `WebDataset.inspect`; None where it is missing or damaged."""
    try:
        with np.load(part) as found:
            return {name: found[name] for name in ("rows", "letters")}
    except (OSError, EOFError, ValueError, LookupError, BadZipFile):
        return None


def samples(headers: TarHeaders, others: Counter[str]) -> Iterator[Sample]:
    """Images with their labels, as soon as all files of their key have passed; what is neither is counted by its ending in `others`."""
    key, image, labels = None, None, {}
    for member in headers:
        folder, _, base = member.name.rpartition(b"/")
        stem, _, ending = base.partition(b".")
        if (folder, stem) != key:
            if image is not None:
                yield image, labels
            key, image, labels = (folder, stem), None, {}
        ending = ending.lower()
        if ending in IMAGES and stem and image is None:
            image = member
        elif ending in LABELS and stem:
            labels[ending.decode()] = member
        else:
            shown = os.fsdecode(b"." + ending)[:40]
            others[shown if shown in others or len(others) < MOST_ENDINGS else "."] += 1
    if image is not None:
        yield image, labels


def labels_of_sample(stream: BinaryIO, labels: dict[str, Member]) -> dict[str, Any]:
    """What the files of labels of a sample say, by name.

    Raises:
        BadFile: one of them is too large or cannot be understood.
    """
    found: dict[str, Any] = {}
    for ending, member in labels.items():
        if member.size > LARGEST_LABEL:
            raise BadFile(f"{os.fsdecode(member.name)} has {in_words(member.size)}, more than the {in_words(LARGEST_LABEL)} of labels")
        content = os.pread(stream.fileno(), member.size, member.offset)
        try:
            value = parse_json(content) if ending == "json" else content.decode()
        except ValueError as error:
            raise BadFile(f"{os.fsdecode(member.name)} cannot be understood ({error})") from None
        found |= {encodable(name): one for name, one in value.items()} if isinstance(value, dict) else {ending: value}
    return found
