"""Files of axes with damage drawn by fixed seeds: each is read as it was written or gets one sentence, soon and in little memory."""

import io
import os
import random
import resource
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from sami_fast.errors import UserError
from sami_fast.latents.axes import MOST_BYTES, Axes

AXES = Axes(("round", "red \x1b[31m"), [[1.0, 0.0, 2.0], [0.0, 0.5, 0.0]], [[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]], [0.1, -3.0, 0.0])
SECONDS, MEMORY = 2.0, 2**28  # that one file may take at most, and bytes


def packed(method: int = zipfile.ZIP_DEFLATED, **changed: bytes | np.ndarray) -> bytes:
    """A whole file, some of whose entries are others."""
    arrays = {"names": np.array(AXES.names), "directions": AXES.directions, "readouts": AXES.readouts, "center": AXES.center}
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", method) as archive:
        for name, value in (arrays | changed).items():
            entry = io.BytesIO()
            np.save(entry, value) if isinstance(value, np.ndarray) else entry.write(value)
            archive.writestr(f"{name}.npy", entry.getvalue())
    return whole.getvalue()


def header(text: str, body: bytes = b"") -> bytes:
    """An entry with this header."""
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", min(len(text), 65535)) + text.encode() + body


def field(content: bytes, record: bytes, place: int, form: str, value: int) -> bytes:
    """The file with a number in every header of a kind replaced."""
    found = bytearray(content)
    start = -1
    while (start := content.find(record, start + 1)) >= 0:
        struct.pack_into(form, found, start + place, value)
    return bytes(found)


LOCAL, CENTRAL, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
SHAPES = ("(1000000000000,)", "(9223372036854775807,)", "(-1,)", "(2, 3, 10**9)", "(" + "1, " * 60 + ")", "None", "(" * 3000)
DTYPES = ("|O", "<U999999999", "|V2147483647", "[('a', '<f8')]", "<M8[s]", "nonsense", "<c16")
FORGED = {
    "nothing": b"",
    "zeros": bytes(4096),
    "the end alone": END + bytes(18),
    "an array": header("{'descr': '<f8', 'fortran_order': False, 'shape': (1,), }", bytes(8)),
    "a text": b"names: [a, b]\n" * 9,
    "encrypted": field(field(packed(), CENTRAL, 8, "<H", 1), LOCAL, 6, "<H", 1),
    **{
        f"packed by {method}": field(field(packed(), CENTRAL, 10, "<H", method), LOCAL, 8, "<H", method) for method in (0, 1, 9, 12, 14, 99)
    },
    "says it is empty": field(packed(), CENTRAL, 24, "<I", 0),
    "says it is huge": field(packed(), CENTRAL, 24, "<I", 2**32 - 2),
    "lies elsewhere": field(packed(), CENTRAL, 42, "<I", 2**31),
    "a bomb": packed(center=np.zeros(MOST_BYTES)),
    **{
        f"of shape {shape[:30]}": packed(center=header(f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}\n"))
        for shape in SHAPES
    },
    **{
        f"of type {dtype}": packed(center=header(f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': (3,), }}\n", bytes(24)))
        for dtype in DTYPES
    },
    "a header of 60 KB": packed(center=header("{" + " " * 60000 + "}")),
    "nested": packed(center=header("[" * 9000)),
    "no numbers": packed(center=np.array(["a", "b", "c"])),
    "not finite": packed(directions=np.full((2, 3), np.nan)),
    "too large to square": packed(directions=1e300 * AXES.directions),
    "another shape": packed(names=np.array(["a"])),
    "no axes": packed(names=np.array([], "<U1"), directions=np.zeros((0, 3)), readouts=np.zeros((0, 3))),
    "numbers for names": packed(names=np.array([[[1]]])),
}


def read(path: Path) -> bool:
    """Whether it was read, as it was written; its `UserError` is one line. Fails where either takes long."""
    begin, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found, said = None, ""
    try:
        found = Axes.load(path)
    except UserError as error:
        said = str(error)
    assert (found is None) == said.startswith(f"{path}: ")
    assert "\n" not in said
    assert len(said) < 1000
    assert time.process_time() - begin < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY >> 10
    if found is not None:
        assert found.names == AXES.names
        for name in ("directions", "readouts", "center"):
            np.testing.assert_array_equal(getattr(found, name), getattr(AXES, name))
    return found is not None


def test_what_is_not_damaged_is_read(tmp_path):
    for content in (packed(), packed(zipfile.ZIP_STORED), packed(zipfile.ZIP_LZMA)):
        (tmp_path / "axes.npz").write_bytes(content)
        assert read(tmp_path / "axes.npz")


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_file_gets_one_sentence(what, tmp_path):
    (tmp_path / "axes.npz").write_bytes(FORGED[what])
    assert not read(tmp_path / "axes.npz")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("seed", range(4))
def test_random_damage_is_seen_or_does_none(seed, method, tmp_path):
    """Bits turned over, cut off, pieces moved, doubled, or filled with what numbers in headers may be at worst."""
    dice, whole, counts = random.Random(seed), packed(method), {True: 0, False: 0}
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(dice.choice([1, 1, 1, 3])):
            place, more = dice.randrange(len(content)), dice.choice([1, 2, 4, 8, 60])
            how = dice.randrange(5)
            if how == 0:
                content[place] ^= 1 << dice.randrange(8)
            elif how == 1:
                del content[place : place + more]
            elif how == 2:
                content[place:place] = content[dice.randrange(len(content)) :][:more]
            elif how == 3:
                content[place : place + more] = dice.choice([b"\x00", b"\xff", b"\x7f"]) * more
            elif dice.random() < 0.3:
                del content[place:]
            if not content:
                break
        (tmp_path / "axes.npz").write_bytes(content)
        counts[read(tmp_path / "axes.npz")] += 1
    assert min(counts.values()) > 5  # some damage is none, such as that of a date


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "pipe", tmp_path / "loop", tmp_path, Path("/dev/zero"), tmp_path / "none", tmp_path / ("x" * 300)):
        assert not read(path)
    (tmp_path / "sparse.npz").write_bytes(packed())
    os.truncate(tmp_path / "sparse.npz", 2**40)
    assert not read(tmp_path / "sparse.npz")
