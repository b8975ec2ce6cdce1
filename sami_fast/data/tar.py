"""Where the files of a tar archive lie, by its headers alone: nothing is unpacked, and no name in it is opened.

Source of the format: POSIX.1-2001, pax, and the GNU tar manual, "Basic Tar Format".
"""

import hashlib
import os
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from .decode import BadFile

BLOCK = 512  # bytes of a header, and what every file is padded to
READ = 1 << 16  # bytes that are read at once where files are small
CHECKED = 4096  # headers whose checksums are compared at once
LONGEST = 1 << 16  # bytes of a name or of the records that go before a header
END = bytes(BLOCK)
MOST_PADDING = 1 << 20  # bytes of zeros at the end of an archive; more are what a download has not filled yet
REGULAR = frozenset({0, ord("0"), ord("7")})  # kinds of members: plain files, by their different writers
EMPTY = frozenset(b"123456")  # links, devices, folders, pipes: without content, whatever size stands in the header


class Member(NamedTuple):
    """A plain file of an archive.

    Args:
        name: As it is stored.
        offset, size: Where its bytes are, and how many.
    """

    name: bytes
    offset: int
    size: int


class TarHeaders:
    """The plain files of an archive in their order; links, devices, folders and the like are passed over.

    Args:
        stream: The archive, open.
    Raises:
        BadFile: while iterating: damaged, cut off, or no tar archive.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self.file = stream.fileno()
        self.length = os.fstat(self.file).st_size
        self.passed_over = 0  # members that are no plain files
        self._digest = hashlib.blake2b(digest_size=16)
        self._headers: list[bytes] = []
        self._first, self._read = 0, b""

    @property
    def digest(self) -> str:
        """What stands in the headers passed so far, and in the names and records before them, in 32 digits."""
        self._check()
        return self._digest.hexdigest()

    def __iter__(self) -> Iterator[Member]:
        place, long_name, long_size, sparse = 0, b"", -1, False
        while place < self.length or not place or long_name or long_size >= 0:  # some writers leave out the end
            header = self._at(place, BLOCK)
            if header == END:
                self._padding(place)
                break
            self._headers.append(header)
            if len(self._headers) == CHECKED:
                self._check()
            kind, size = header[156], self._number(header[124:136], place)
            if kind == ord("S"):
                self._check()
                raise BadFile(f"a sparse file at byte {place}")
            size = 0 if kind in EMPTY else size
            content = place + BLOCK
            following = content + (size + BLOCK - 1) // BLOCK * BLOCK
            if kind in b"LKxg":  # what the next header has no room for
                if size > LONGEST:
                    raise BadFile(f"a name of {size} bytes at byte {place}")
                if kind in b"Lx":
                    records = self._at(content, size)
                    self._digest.update(records)
                    if kind == ord("L"):
                        long_name = records.rstrip(b"\0")
                    else:
                        long_name, long_size, sparse = self._records(records, place, long_name, long_size, sparse)
            else:
                if long_size >= 0 and kind not in EMPTY:
                    size = long_size
                    following = content + (size + BLOCK - 1) // BLOCK * BLOCK
                if content + size > self.length:
                    self._check()
                    raise BadFile(f"cut off: {self.length} bytes, and a file in it ends at byte {content + size}")
                if kind in REGULAR and not sparse:
                    yield Member(long_name or self._name(header), content, size)
                else:
                    self.passed_over += 1
                long_name, long_size, sparse = b"", -1, False
            place = following
        self._check()

    def _at(self, place: int, size: int) -> bytes:
        """Bytes of the file; more are read ahead where the last file was small."""
        begin = place - self._first
        if begin < 0 or begin + size > len(self._read):
            ahead = READ if 0 <= begin <= len(self._read) + READ // 4 else BLOCK
            self._first, self._read, begin = place, os.pread(self.file, max(ahead, size), place), 0
            if len(self._read) < size:
                self._check()
                raise BadFile(f"cut off: {self.length} bytes, without the end of an archive")
        return self._read[begin : begin + size]

    def _padding(self, begin: int) -> None:
        """A `BadFile` where an end of zeros is none: another file, or a hole, where members should be."""
        whole = self.length - begin <= MOST_PADDING
        if not whole or any(os.pread(self.file, MOST_PADDING, begin)):
            self._check()
            raise BadFile(f"zeros where more should be, from byte {begin}")

    @staticmethod
    def _number(field: bytes, place: int) -> int:
        """Octal digits, or a binary number where the first bit is set."""
        try:
            number = int.from_bytes(field[1:]) if field[0] == 0x80 else int(field.strip(b"\0 ") or b"0", 8)
        except ValueError:
            raise BadFile(f"not a tar archive, or damaged, at byte {place}") from None
        if not 0 <= number < 1 << 62:
            raise BadFile(f"a file of {number} bytes at byte {place}")
        return number

    @staticmethod
    def _name(header: bytes) -> bytes:
        name = header[:100].partition(b"\0")[0]
        prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
        return prefix + b"/" + name if prefix else name

    @staticmethod
    def _records(content: bytes, place: int, name: bytes, size: int, sparse: bool) -> tuple[bytes, int, bool]:
        """Name, size and whether the file is stored without its holes, out of "25 path=some/name\\n" and the like."""
        at, end = 0, len(content.rstrip(b"\0"))
        while at < end:
            digits = content[at : max(content.find(b" ", at, at + 8), at)]
            length = int(digits) if digits.isdigit() else 0
            if not len(digits) + 2 <= length <= len(content) - at:
                raise BadFile(f"damaged records at byte {place}")
            key, _, value = content[at + len(digits) + 1 : at + length - 1].partition(b"=")
            if key == b"path":
                name = value
            elif key == b"size":
                if not value.isdigit() or len(value) > 18:
                    raise BadFile(f"damaged records at byte {place}")
                size = int(value)
            elif key.startswith(b"GNU.sparse."):
                sparse = True
            at += length
        return name, size, sparse

    def _check(self) -> None:
        """Compare the checksums of the headers passed since the last time."""
        joined = b"".join(self._headers)
        headers = np.frombuffer(joined, np.uint8).reshape(-1, BLOCK)
        sums = headers.sum(1, dtype=np.int64) - headers[:, 148:156].sum(1, dtype=np.int64) + 8 * ord(" ")
        for header, total in zip(self._headers, sums.tolist(), strict=True):
            if header[148:156].strip(b"\0 ").lstrip(b"0") != b"%o" % total:
                raise BadFile("not a tar archive, or damaged: a header's checksum does not fit")
        self._digest.update(joined)
        self._headers = []
