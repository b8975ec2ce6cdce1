"""Images in shards: tar archives and parquet files, what is read of them and in which order, what is broken or unsafe, and making them."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from sami_fast.cli import main
from sami_fast.config import DataConfig
from sami_fast.data import Dataset, Feed, WebDataset, open_dataset
from sami_fast.data.decode import BadFile
from sami_fast.data.shards import expanded_braces, find_shards
from sami_fast.errors import AbsentError, UserError

ROOT = Path(__file__).resolve().parents[1]

PER_SHARD, SHARDS = 20, 3
COUNT = PER_SHARD * SHARDS
KINDS = ("webdataset", "parquet")
each_kind = pytest.mark.parametrize("kind", KINDS)


def encoded(value: int, kind: str = "PNG") -> bytes:
    """An image whose every pixel is a number."""
    target = io.BytesIO()
    Image.fromarray(np.full((10, 12, 3), value, np.uint8)).save(target, kind)
    return target.getvalue()


def labels_of(number: int) -> dict[str, object]:
    return {
        "file": f"photo {number}",
        "age": 20 + 0.5 * number,
        "smiling": number % 2 == 0,
        "hair": ("black", "brown", "red")[number % 3],
        "person": f"p{number // 4}",
    }


def add(archive: tarfile.TarFile, name: str, content: bytes = b"", **facts: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in facts.items():
        setattr(info, key, value)
    archive.addfile(info, io.BytesIO(content))


def write_tar(path: Path, numbers: range) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            add(archive, f"{number:04}.json", json.dumps(labels_of(number)).encode())
            add(archive, f"{number:04}.{('png', 'PNG')[number % 2]}", encoded(number))
            add(archive, f"{number:04}.cls", str(number % 4).encode())


def write_parquet(path: Path, numbers: range, group: int = 4) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"image": {"bytes": encoded(n), "path": "/etc/passwd"}} | labels_of(n) | {"cls": n % 4} for n in numbers]
    plain = {"use_dictionary": False, "write_statistics": False, "compression": "none"}
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group, **plain)


ENDINGS = {"webdataset": ".tar", "parquet": ".parquet"}
WRITE = {"webdataset": write_tar, "parquet": write_parquet}


def shards(folder: Path, kind: str) -> Path:
    """Three shards of twenty images; image n has the colour n."""
    for shard in range(SHARDS):
        WRITE[kind](folder / f"{shard:03}{ENDINGS[kind]}", range(shard * PER_SHARD, (shard + 1) * PER_SHARD))
    return folder


def opened(path: Path | str, kind: str, split: int = 0, **settings: object) -> Dataset:
    cache = Path(str(path).partition("{")[0]).parent / "cache"
    defaults = {"image_size": 8, "holdout": 0.0, "cache_dir": str(cache), "decoder": "torch", "cache_gib": 0.0, "workers": 1}
    return open_dataset(DataConfig(kind=kind, path=str(path), **defaults | settings), 0, split)


def numbers(source: Dataset, index: torch.Tensor | None = None) -> list[int]:
    """Which images are shown."""
    images = source.images(torch.arange(source.size) if index is None else index)
    return ((images[:, 0, 4, 4] + 1) * 127.5).round().int().tolist()


@each_kind
def test_every_image_by_its_index(kind, tmp_path):
    folder = shards(tmp_path / "shards", kind)
    source = opened(folder, kind)
    assert numbers(source) == [*range(COUNT)]
    assert numbers(source, torch.tensor([59, 0, 20, 19, 20])) == [59, 0, 20, 19, 20]
    names = source.sources(torch.tensor([0, 41]))["files"]
    assert names == (["000.tar/0000.png", "002.tar/0041.PNG"] if kind == "webdataset" else ["000.parquet/0", "002.parquet/1"])
    # By a pattern; the two splits divide what it names.
    parts = [opened(f"{folder}/{{000,002}}{ENDINGS[kind]}", kind, split, holdout=0.25) for split in (0, 1)]
    assert [part.size for part in parts] == [30, 10]
    assert sorted(numbers(parts[0]) + numbers(parts[1])) == [*range(20), *range(40, 60)]
    shown = source.facts()
    assert shown["shards"].startswith("3, ")
    assert shown[source.unit] == "60, 20 to 20 in a shard"
    assert {"age", "smiling", "cls"} <= {*shown["labels"].partition(";")[0].split(", ")}
    assert shown["pixels"].startswith("12x10")


@each_kind
def test_an_epoch_shows_each_image_once_on_any_number_of_ranks(kind, tmp_path):
    source = opened(shards(tmp_path / "shards", kind), kind)
    one = Feed(source, 6, 1, 0, 1, 3, torch.device("cpu"))
    steps = [one.indices(step, 0)[0] for step in range(COUNT // 6 + 3)]
    assert sorted(torch.cat(steps[: COUNT // 6]).tolist()) == [*range(COUNT)]
    assert steps[0].tolist() != sorted(steps[0].tolist())
    for step in (0, 4, 11):
        ranks = [Feed(opened(tmp_path / "shards", kind), 6, 1, rank, 2, 3, torch.device("cpu")) for rank in range(2)]
        assert torch.equal(torch.cat([rank.indices(step, 0)[0] for rank in ranks]), steps[step])
        images = [rank.micro_batch(step, 0)[0] for rank in ranks]  # as after a resume
        assert torch.equal(torch.cat(images), source.images(steps[step]))
        for feed in ranks:
            feed.close()
    one.close()


# Labels


@each_kind
def test_labels_in_shards_are_those_of_a_table(kind, tmp_path):
    folder = shards(tmp_path / "shards", kind)
    source = opened(folder, kind, labels="all", holdout_by="person", holdout=0.2)
    assert source.factor_names == ("age", "smiling", "hair=black", "hair=brown", "hair=red", "cls")
    assert source.attribute_names == {"smiling", "hair=black", "hair=brown", "hair=red"}
    shown = numbers(source)
    expected = [[20 + 0.5 * n, n % 2 == 0, *(n % 3 == hair for hair in range(3)), n % 4] for n in shown]
    held_out = opened(folder, kind, 1, labels="smiling, age", holdout_by="person", holdout=0.2)
    for again in (source, opened(folder, kind, labels="all", holdout_by="person", holdout=0.2)):  # as read, and as kept
        assert again.factors(torch.arange(source.size)).tolist() == np.array(expected, np.float32).tolist()
    assert held_out.factor_names == ("age", "smiling")
    assert not {n // 4 for n in shown} & {n // 4 for n in numbers(held_out)}
    with pytest.raises(UserError, match=r"data.labels: no label 'agee' in the shards of .*, which have age, "):
        opened(folder, kind, labels="agee")


def test_a_label_that_is_no_number_among_numbers(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number, age in enumerate((3, 4, "old", 5)):
            add(archive, f"x/{number}.jpg", encoded(number, "JPEG"))
            add(archive, f"x/{number}.json", json.dumps({"age": age, "boxes": [1, 2]}).encode())
    with pytest.raises(UserError, match=r"data.labels: expected a number in column 'age' of .* for a.tar/x/2.jpg, found 'old'"):
        opened(tmp_path / "a.tar", "webdataset", labels="all")
    assert numbers(opened(tmp_path / "a.tar", "webdataset")) == [0, 1, 2, 3]  # who asks for no labels


# What is broken, and what is unsafe


@each_kind
def test_a_missing_and_a_truncated_shard_are_named_and_counted(kind, tmp_path, caplog):
    folder, ending = shards(tmp_path / "shards", kind), ENDINGS[kind]
    broken = folder / f"001{ending}"
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2 + 100])
    with pytest.raises(UserError, match=rf"2 of 4 {ending[1:]} shards in .* cannot be read, data.max_bad=0.01 allows 0: 001{ending} \("):
        opened(f"{folder}/{{000..003}}{ending}", kind)
    source = opened(f"{folder}/{{000..003}}{ending}", kind, max_bad=0.5)
    assert numbers(source) == [*range(20), *range(40, 60)]
    assert source.facts()["unreadable"].startswith(f"2 shards: 001{ending} (")
    assert f"003{ending} (No such file or directory)" in source.facts()["unreadable"]
    # One that vanishes while it is used: in training others stand for its images, the same in every run.
    source = opened(f"{folder}/{{000..003}}{ending}", kind, max_bad=0.75)
    (folder / f"002{ending}").unlink()
    with pytest.raises(AbsentError, match=rf"002{ending}/.*: No such file or directory"):
        source.images(torch.tensor([25]))
    pixels = source.training_pixels(torch.tensor([5, 39]))[:, 0, 4, 4]
    assert pixels.tolist() == [5, 19]
    assert source.training_pixels(torch.arange(20, 40))[:, 0, 4, 4].tolist() == [*range(20)]  # image by image
    assert caplog.text.count("No such file or directory; in training") == 1
    source = opened(f"{folder}/{{000..001}}{ending}", kind, max_bad=0.5)
    (folder / f"000{ending}").unlink()
    with pytest.raises(UserError, match=rf"2 of 2 {ending[1:]} shards"):
        source.training_pixels(torch.tensor([5]))


@each_kind
def test_an_image_that_does_not_decode_is_counted_among_the_images(kind, tmp_path):
    folder = shards(tmp_path / "shards", kind)
    broken = folder / f"001{ENDINGS[kind]}"
    place = broken.read_bytes().index(encoded(23))
    with open(broken, "r+b") as stream:
        stream.seek(place + 10)
        stream.write(b"\xff" * 20)
    source = opened(folder, kind, max_bad=0.02)
    assert source.training_pixels(torch.tensor([22, 23, 24]))[:, 0, 4, 4].tolist() == [22, 24, 24]
    assert [*source.lost] == [source.index.names[23]]
    source.max_bad, source.lost = 0.0, {}
    with pytest.raises(UserError, match=rf"1 of 60 {source.unit} in .* cannot be read"):
        source.training_pixels(torch.tensor([23]))


def test_unsafe_archives(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(encoded(200))
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        add(archive, "0.png", type=tarfile.SYMTYPE, linkname=str(secret))
        add(archive, "1.png", type=tarfile.LNKTYPE, linkname="2.png")
        add(archive, "null.png", type=tarfile.CHRTYPE, devmajor=1, devminor=3)
        add(archive, "../../up\n\x1b[31m.png", encoded(2))
        add(archive, "/etc/" + "long" * 50 + ".png", encoded(3))
        add(archive, "4.png", b"")
        add(archive, "5.tiff", encoded(5, "TIFF"))
        add(archive, "5.mp4", b"video")
    source = opened(tmp_path / "a.tar", "webdataset", max_bad=0.5)
    assert source.size == 4
    assert source.training_pixels(torch.arange(4))[:, 0, 4, 4].tolist() == [2, 3, 5, 5]
    assert [*source.lost.values()] == ["zero bytes"]
    assert source.facts()["left out"] == "3  (links, devices and the like), 1 .mp4"
    with pytest.raises(AbsentError) as error:
        source.images(torch.tensor([2]))
    assert "4.png: zero bytes" in str(error.value)

    whole = (tmp_path / "a.tar").read_bytes()
    header = whole.index(b"4.png")

    def with_size(size: bytes, fits: bool = True) -> bytes:
        """The archive with another size of a file, whose header's checksum fits or does not."""
        block = bytearray(whole[header : header + 512])
        block[124:136], block[148:156] = size, b" " * 8
        block[148:156] = b"%06o\0 " % (sum(block) + (not fits))
        return whole[:header] + block + whole[header + 512 :]

    for damaged, reason in (
        (with_size(b"77777777777\0"), "cut off"),
        (with_size(b"7777777777x\0"), "not a tar archive, or damaged"),
        (with_size(b"00000000000\0", fits=False), "checksum"),
        (b"no archive" * 200, "not a tar archive"),
        (whole[: header - 500], "cut off"),
        (whole[: header + 100], "cut off"),
        (whole + b"more", "zeros where more should be, from byte"),
        (b"", "cut off"),
    ):
        (tmp_path / "b.tar").write_bytes(damaged)
        with pytest.raises(UserError, match=rf"b.tar \(.*{reason}"):
            opened(tmp_path / "b.tar", "webdataset")
    (tmp_path / "b.tar").write_bytes(whole[:header])  # some writers leave out the end
    assert numbers(opened(tmp_path / "b.tar", "webdataset")) == [2, 3]


def test_zeros_are_no_end_of_an_archive(tmp_path):
    with tarfile.open(tmp_path / "whole.tar", "w") as archive:
        for number in range(300):
            add(archive, f"{number}.png", encoded(number % 250) + bytes(9000))
    whole = (tmp_path / "whole.tar").read_bytes()
    half = len(whole) // 2
    for damaged in (whole[:half] + bytes(len(whole) - half), whole[:half] + bytes(2**14) + whole[half + 2**14 :]):
        (tmp_path / "a.tar").write_bytes(damaged)
        with pytest.raises(UserError, match=r"a.tar \(zeros where more should be, from byte 1\d{6}\)"):
            opened(tmp_path / "a.tar", "webdataset")


def test_members_that_are_not_as_they_look(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        add(archive, "0.png", encoded(0))
        add(archive, "1.png", encoded(1), pax_headers={"GNU.sparse.major": "1"})
        link = tarfile.TarInfo("2.png")
        link.type, link.linkname, link.size = tarfile.LNKTYPE, "0.png", 1000  # as some writers have it, without content
        archive.addfile(link)
        add(archive, "3.png", encoded(3), pax_headers={f"a{n}": "" for n in range(5000)} | {"path": "three.png"})
    source = opened(tmp_path / "a.tar", "webdataset")
    assert [*source.index.names] == ["a.tar/0.png", "a.tar/three.png"]
    assert numbers(source) == [0, 3]
    assert source.facts()["left out"] == "2  (links, devices and the like)"
    with tarfile.open(tmp_path / "b.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        add(archive, "0.png", encoded(0))
        add(archive, "1.png", encoded(1), type=tarfile.GNUTYPE_SPARSE)
    with pytest.raises(UserError, match=r"b.tar \(a sparse file at byte 1024\)"):
        opened(tmp_path / "b.tar", "webdataset")


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_shards_that_differ_in_long_names_alone(form, tmp_path):
    for shard, name in (("a", "x" * 100 + "1"), ("b", "x" * 100 + "2")):
        (tmp_path / "shards").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / "shards" / f"{shard}.tar", "w", format=form) as archive:
            add(archive, f"{name}.png", encoded(1))
    assert [name[-5:] for name in opened(tmp_path / "shards", "webdataset").index.names] == ["1.png", "2.png"]


# Parquet files that say what is not so


def parquet_of(path: Path, images: list[bytes], name: str = "image", **settings: object) -> Path:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({name: images}), path, **{"use_dictionary": False, "compression": "none"} | settings)
    return path


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_parquet_file_that_says_another_number_of_rows(everywhere, tmp_path):
    path = parquet_of(tmp_path / "a.parquet", [encoded(n) for n in range(50)], store_schema=False)
    content = path.read_bytes()
    begin = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    footer, fifty, other = content[begin:], b"\x16\x64", b"\x16\x68"  # in Thrift's compact form
    path.write_bytes(content[:begin] + footer.replace(fifty, other, -1 if everywhere else 1))
    if not everywhere:
        with pytest.raises(UserError, match="its row groups have another number of rows than it says"):
            opened(path, "parquet")
        return
    source = opened(path, "parquet", max_bad=0.5)
    assert source.size == 52
    with pytest.raises(AbsentError, match=r"a.parquet/3: its row group "):
        source.images(torch.tensor([3]))


def test_what_a_row_group_unpacks_to_is_limited(tmp_path, monkeypatch):
    image = encoded(7) + bytes(2**20)
    source = opened(parquet_of(tmp_path / "a.parquet", [image] * 64, use_dictionary=True), "parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 2**22
    assert numbers(source, torch.tensor([63])) == [7]
    source = opened(tmp_path / "a.parquet", "parquet", max_bad=0.5)
    monkeypatch.setattr("sami_fast.data.parquet.LARGEST_GROUP", 2**24)
    with pytest.raises(AbsentError, match=r"a.parquet/63: its row group unpacks to more than the 16 MiB that are held in memory"):
        source.images(torch.tensor([63]))


def test_row_groups_of_very_different_sizes_fill_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("sami_fast.data.parquet.HELD", 2**18)
    images = [encoded(n) + bytes(2**17) for n in range(10)] + [encoded(n % 250) for n in range(1000)]
    source = opened(parquet_of(tmp_path / "a.parquet", images, row_group_size=1), "parquet")
    assert numbers(source, torch.arange(10)) == [*range(10)]
    held = sum(future.result()[0].nbytes for future in source._groups.values())
    assert 2**18 < held <= 2**19
    assert held == source._held


def test_a_row_group_that_cannot_be_read_raises_a_new_error_for_each_row(tmp_path):
    path = parquet_of(tmp_path / "a.parquet", [encoded(n) for n in range(20)])
    source, times = opened(path, "parquet"), path.stat()
    with open(path, "r+b") as stream:
        stream.seek(4)
        stream.write(b"\xff" * 64)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    errors = []
    for place in range(20):
        with pytest.raises(BadFile, match="its row group cannot be read") as found:
            source.encoded(place)
        errors.append(found.value)
    assert len({*map(id, errors)}) == 20


def test_a_column_of_images_with_a_dot_in_its_name(tmp_path):
    source = opened(parquet_of(tmp_path / "a.parquet", [encoded(n) for n in range(8)], "my.image"), "parquet")
    assert numbers(source) == [*range(8)]
    assert source.shards.facts[0]["image bytes"] >= sum(len(encoded(n)) for n in range(8))


# What is kept, and labels of strangers


def test_damaged_caches_are_made_anew(tmp_path):
    folder = shards(tmp_path / "shards", "webdataset")
    before = opened(folder, "webdataset", labels="age").factors(torch.arange(COUNT)).tolist()
    for pattern, begins in (("samples_*.npy", 0), ("labels_*.npy", 0), ("*.npz", 50), ("*.npz", 0)):
        damaged = [*(tmp_path / "cache").rglob(pattern)]
        assert damaged
        for file in damaged:
            file.write_bytes(file.read_bytes()[:begins])
        if pattern == "*.npz":  # they are read where the samples are gone
            for file in (tmp_path / "cache").rglob("samples_*.npy"):
                file.unlink()
        source = opened(folder, "webdataset", labels="age")
        assert numbers(source) == [*range(COUNT)]
        assert source.factors(torch.arange(COUNT)).tolist() == before


def test_without_locks_nothing_is_deleted_that_another_process_has_just_written(tmp_path, monkeypatch):
    source = opened(shards(tmp_path / "shards", "webdataset"), "webdataset")
    (rows,) = (file for file in (tmp_path / "cache").rglob("samples_*.npy") if ".names" not in file.name)
    monkeypatch.setattr("sami_fast.data.webdataset.write_whole", lambda path, write: None)
    assert len(source._joined(rows.with_suffix(""))[0]) == COUNT + 1


@each_kind
def test_labels_of_a_shard_that_has_changed_are_not_read(kind, tmp_path):
    source = opened(shards(tmp_path / "shards", kind), kind)
    os.utime(tmp_path / "shards" / f"001{ENDINGS[kind]}", ns=(1, 1))
    with pytest.raises(UserError, match=rf"001{ENDINGS[kind]}: changed since it was looked at"):
        source.label_columns()


def test_labels_of_strangers(tmp_path, capsys):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number in range(4):
            add(archive, f"{number}.png", encoded(number))
            labels = {"ag\x1b[31me": number, "half \ud800": f"\ud800{number % 2}"}
            add(archive, f"{number}.json", json.dumps(labels).encode())
    source = opened(tmp_path / "a.tar", "webdataset", labels="all")
    assert source.factor_names == ("ag\x1b[31me", "half ?=?1")
    settings = ["data.kind=webdataset", f"data.path={tmp_path}/a.tar", "data.labels=all", f"data.cache_dir={tmp_path}/cache"]
    assert main(["data", "images", *settings, "--seconds", "0"]) == 0
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    assert said.out.count("ag\\x1b[31me") == 2  # as a factor, and as a label


def test_labels_that_are_no_text(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    bad = pyarrow.Array.from_buffers(pyarrow.string(), 3, pyarrow.array([b"a", b"\xff\xfe", b"c"], pyarrow.binary()).buffers())
    parquet.write_table(pyarrow.table({"image": [encoded(n) for n in range(3)], "name": bad}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"data.labels: .*a.parquet: 'utf-8' codec can't decode"):
        opened(tmp_path / "a.parquet", "parquet", labels="all")


def test_two_columns_that_make_the_same_label(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number in range(4):
            add(archive, f"{number}.png", encoded(number))
            add(archive, f"{number}.json", json.dumps({"a": "xyzx"[number], "a=x": number}).encode())
    with pytest.raises(UserError, match=r"data.labels: two columns of .* make the label 'a=x'"):
        opened(tmp_path / "a.tar", "webdataset", labels="all")


def test_only_changed_shards_are_looked_at_again(tmp_path, monkeypatch):
    folder = shards(tmp_path / "shards", "webdataset")
    opened(folder, "webdataset")
    looked = []
    inspect = WebDataset.inspect
    monkeypatch.setattr(WebDataset, "inspect", lambda self, path: looked.append(path.name) or inspect(self, path))
    write_tar(folder / "001.tar", range(100, 110))
    source = opened(folder, "webdataset")
    assert looked == ["001.tar"]
    assert numbers(source) == [*range(20), *range(100, 110), *range(40, 60)]
    other = opened(shutil.copytree(folder, tmp_path / "moved" / "shards"), "webdataset")
    assert other.fingerprint == source.fingerprint
    write_tar(folder / "001.tar", range(110, 120))
    assert opened(folder, "webdataset").fingerprint != source.fingerprint


def test_an_image_and_a_label_that_are_corrected(tmp_path):
    """In a file of the same length, and larger than what of it is read at once."""

    def make(corrected: int) -> Dataset:
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            for number in range(120):
                label = number % 2 + (number == corrected)
                pixels = Image.fromarray(np.full((64, 64, 3), 250 if number == corrected else number, np.uint8))
                pixels.save(target := io.BytesIO(), "BMP")
                add(archive, f"{number:03}.bmp", target.getvalue())
                add(archive, f"{number:03}.cls", str(label).encode())
        return opened(tmp_path / "a.tar", "webdataset", labels="cls", cache_gib=1.0)

    before = make(-1)
    assert numbers(before) == [*range(120)]
    after = make(77)
    assert numbers(after, torch.tensor([76, 77])) == [76, 250]
    assert after.factors(torch.tensor([76, 77])).tolist() == [[0], [2]]
    assert after.fingerprint != before.fingerprint
    os.utime(tmp_path / "a.tar", ns=(1, 1))
    touched = opened(tmp_path / "a.tar", "webdataset")
    assert touched.index.state != after.index.state  # what was decoded counts no more
    assert touched.fingerprint == after.fingerprint


def test_patterns(tmp_path):
    assert expanded_braces("a{08..11}.tar") == ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]
    assert expanded_braces("{x,y}{2..1}") == ["x2", "x1", "y2", "y1"]
    for name in ("a/1.tar", "a/2.tar", "b/1.tar"):
        write_tar(tmp_path / name, range(2))
    assert find_shards(f"{tmp_path}/*/1.tar", ".tar") == (tmp_path, ["a/1.tar", "b/1.tar"])
    for path, words in ((f"{tmp_path}/none", "no file or folder"), (f"{tmp_path}/*.tarr", "no file matches"), ("{0..9999999}", "at most")):
        with pytest.raises(UserError, match=words):
            find_shards(path, ".tar")


# Making them


def packed(source: Path | str, folder: Path, *options: str) -> Path:
    assert main(["pack", str(source), str(folder), "--workers", "1", *options]) == 0
    return folder


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


@each_kind
def test_image_files_go_in_as_they_are(kind, tmp_path, capsys):
    folder = tmp_path / "photos"
    for number in range(11):
        (folder / f"p{number // 4}").mkdir(parents=True, exist_ok=True)
        form = ("JPEG", "PNG", "WEBP", "BMP")[number % 4]
        (folder / f"p{number // 4}" / f"a.{number}.{form.lower()}").write_bytes(encoded(20 * number, form))
    (folder / "p0" / "broken.jpg").write_bytes(b"no image")
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("a.*"))
    rows = [f"{name},{20.5 + row},{('x', 'y', 'z')[row % 3]},p{row}" for row, name in enumerate(names)]
    (tmp_path / "labels.csv").write_text("\n".join(("file,age,hair,person", *rows)))
    options = ("--format", kind, "--samples", "4", "--workers", "2", f"data.labels={tmp_path}/labels.csv", "data.max_bad=0.1")
    made = packed(folder, tmp_path / "made", *options)
    assert "11 images in 3 shards" in (said := capsys.readouterr().out)
    assert f"data.kind={kind} data.path={made} data.image_size=64 data.channels=3 data.labels=all" in said
    assert sorted(file.name for file in made.glob("0*")) == [f"00000{n}{ENDINGS[kind]}" for n in range(3)]

    cache = {"cache_dir": str(tmp_path / "cache"), "decoder": "torch", "holdout": 0.0, "max_bad": 0.1}
    before = open_dataset(DataConfig(kind="image_folder", path=str(folder), labels=str(tmp_path / "labels.csv"), **cache), 0)
    after = open_dataset(DataConfig(kind=kind, path=str(made), labels="age,hair,person", **cache), 0)
    index = torch.arange(before.size)
    assert [after.encoded(n).tobytes() for n in range(11)] == [(folder / name).read_bytes() for name in names]
    assert torch.equal(after.pixels(index), before.pixels(index))
    assert after.factor_names == before.factor_names
    assert torch.equal(after.factors(index), before.factors(index))
    assert opened(made, kind, labels="all", holdout_by="file", holdout=0.5).size in (5, 6)
    if kind == "webdataset":
        assert {*opened(made, kind, holdout_by="folder").groups} == {"p0", "p1", "p2"}
        # From shards to shards, with what is known of them.
        again = packed(made, tmp_path / "again", "--format", "parquet", "data.labels=all")
        twice = opened(again, "parquet", labels="age,hair,person", image_size=64)
        assert torch.equal(twice.pixels(index), after.pixels(index))
        assert torch.equal(twice.factors(index), after.factors(index))


def test_other_images_come_back_bit_for_bit(tmp_path, capsys):
    dice = np.random.default_rng(0)
    np.save(tmp_path / "grey.npy", dice.integers(0, 256, (70, 8, 8), dtype=np.uint8))
    packed(tmp_path / "grey.npy", tmp_path / "grey")
    assert "70 images in 1 shards" in capsys.readouterr().out
    array = open_dataset(DataConfig(kind="array", path=str(tmp_path / "grey.npy"), holdout=0.0), 0)
    assert torch.equal(opened(tmp_path / "grey", "webdataset", channels=1).images(torch.arange(70)), array.images(torch.arange(70)))

    packed("disks", tmp_path / "disks", "--count", "5", "--format", "parquet")
    made, drawn = opened(tmp_path / "disks", "parquet", image_size=16, labels="all"), open_dataset(DataConfig(), 0)
    assert (made.images(torch.arange(5)) - drawn.images(torch.arange(5))).abs().max() < 0.51 / 127.5  # they are no bytes
    assert torch.equal(made.factors(torch.arange(5)), drawn.factors(torch.arange(5)))
    assert made.factor_names == drawn.factor_names


def test_frames_of_videos_come_back_bit_for_bit(tmp_path):
    pytest.importorskip("av")
    from benchmarks.write_video import write_video

    frames = np.random.default_rng(0).integers(0, 256, (2, 9, 32, 48, 3), dtype=np.uint8)
    (tmp_path / "clips").mkdir()
    for number, clip in enumerate(frames):
        write_video(tmp_path / "clips" / f"{number}.mkv", clip, codec="mjpeg")
    packed(tmp_path / "clips", tmp_path / "made", "data.image_size=16", "--samples", "7")
    made = opened(tmp_path / "made", "webdataset", image_size=16, holdout_by="folder")
    settings = {"image_size": 16, "holdout": 0.0, "cache_dir": str(tmp_path / "cache")}
    videos = open_dataset(DataConfig(kind="video_folder", path=str(tmp_path / "clips"), **settings), 0)
    assert torch.equal(made.pixels(torch.arange(18)), videos.pixels(videos.in_order()))
    assert {*made.groups} == {"0.mkv", "1.mkv"}
    columns = made.label_columns()
    assert [columns["frame"].texts[code] for code in columns["frame"].codes] == [str(n) for n in range(9)] * 2


def test_an_interrupted_pack_goes_on_and_another_is_refused(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.arange(10 * 64, dtype=np.uint8).reshape(10, 8, 8) // 3)
    made = packed(tmp_path / "a.npy", tmp_path / "made", "--samples", "4")
    whole = {file.name: file.read_bytes() for file in made.iterdir()}
    kept = (made / "000000.tar").stat().st_ino
    (made / "000001.tar").unlink()
    (made / ".partial-0123456789abcdef").write_bytes(b"killed")
    packed(tmp_path / "a.npy", made, "--samples", "4")
    assert {file.name: file.read_bytes() for file in made.iterdir()} == whole
    assert (made / "000000.tar").stat().st_ino == kept
    assert main(["pack", str(tmp_path / "a.npy"), str(made), "--samples", "5", "--workers", "1"]) == 2
    assert "holds 3 shards of something else; choose another folder or add --overwrite" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in made.iterdir()} == whole
    packed(tmp_path / "a.npy", made, "--samples", "10", "--overwrite", "--quality", "90")
    assert [file.name for file in made.glob("0*")] == ["000000.tar"]
    with tarfile.open(made / "000000.tar") as archive:
        assert archive.getnames() == [f"{n:09}.jpg" for n in range(10)]


def test_a_pack_that_goes_on_still_says_what_is_not_in_it(tmp_path, capsys):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number in range(9):
            add(archive, f"{number}.png", encoded(number))
        add(archive, "q\x1b[31m.png")
    said = []
    for _ in range(2):
        made = packed(tmp_path / "a.tar", tmp_path / "made", "--samples", "4", "data.max_bad=0.5")
        said.append(capsys.readouterr().out)
        (made / "000000.tar").unlink()
    assert said[0] == said[1]
    assert "made: 9 images in 3 shards" in said[0]
    assert "1 images could not be read and are not in them: a.tar/q\\x1b[31m.png (zero bytes)\n" in said[0]


def test_what_changes_the_pixels_of_a_source_is_another_pack(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).random((4, 8, 8), np.float32))
    packed(tmp_path / "a.npy", tmp_path / "made", "data.range=unit")
    assert main(["pack", str(tmp_path / "a.npy"), str(tmp_path / "made"), "--workers", "1", "data.range=signed"]) == 2
    assert "holds 1 shards of something else" in capsys.readouterr().err


def test_images_of_formats_that_shards_do_not_have(tmp_path, capsys):
    forms = ("PNG", "MPO", "JPEG2000", "JPEG", "TGA")
    source = parquet_of(tmp_path / "a.parquet", [encoded(40 * n, form) for n, form in enumerate(forms)])
    made = packed(source, tmp_path / "made", "data.max_bad=0.5")
    assert "1 images could not be read and are not in them: a.parquet/4 (tga images have no place in shards)" in capsys.readouterr().out
    with tarfile.open(made / "000000.tar") as archive:
        assert [name.partition(".")[2].partition(".")[2] for name in archive.getnames()[::2]] == ["png", "jpg", "jp2", "jpg"]
    assert numbers(opened(made, "webdataset")) == [0, 40, 80, 120]


def test_workers_end_with_a_command_that_is_killed(tmp_path):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).integers(0, 256, (2000, 128, 128, 3), np.uint8))
    arguments = ["pack", str(tmp_path / "a.npy"), str(tmp_path / "made"), "--workers", "2", "--samples", "1000"]
    command = subprocess.Popen([str(Path(sys.executable).parent / "sami-fast"), *arguments], stderr=subprocess.DEVNULL)
    try:
        while len([*(tmp_path / "made").glob(".partial-*")]) < 2:
            time.sleep(0.05)
            assert command.poll() is None
        workers = psutil.Process(command.pid).children(recursive=True)
        assert len(workers) >= 2
    finally:
        command.kill()
        command.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
    assert not [*(tmp_path / "made").glob("0*")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["disks", "out"], "--count: data.kind disks has no end"),
        (["empty", "out"], "expected images, videos or shards in it, found none"),
        (["nowhere", "out"], "nowhere"),
        (["rgba.npy", "out"], "images in shards have 1 channel or 3, found 4"),
        (["a.npy", "a.npy"], "is a file; expected a folder"),
        (["a.npy", "out", "--count", "11"], "--count: expected at most 10"),
    ],
)
def test_what_cannot_be_packed(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    np.save("rgba.npy", np.zeros((2, 8, 8, 4), np.uint8))
    np.save("a.npy", np.zeros((10, 8, 8), np.uint8))
    assert main(["pack", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Training, and what is done with a trained model


@each_kind
def test_a_run_goes_on_in_the_middle_of_an_epoch_with_another_number_of_ranks(kind, tmp_path):
    """Two ranks are killed, one goes on: every step shows the images that the feed names, and the model encodes shards."""
    from test_feed_training import SETTINGS, shown

    folder, records = shards(tmp_path / "shards", kind), tmp_path / "shown"
    settings = [setting for setting in SETTINGS if not setting.startswith(("data.video", "data.holdout", "data.flip"))]
    places = [f"data.path={folder}", f"data.cache_dir={tmp_path}/cache", f"runs_dir={tmp_path}", "name=run"]
    arguments = ["--config", "images", "--resume", "--no-report", f"data.kind={kind}", "data.labels=all", *places, *settings]

    def run(ranks: int, **environment: str) -> subprocess.CompletedProcess[str]:
        launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(ranks)]
        place = ["--master_port", str(29900 + os.getpid() % 90), str(ROOT / "tests/feed_worker.py"), str(records)]
        command, around = [*launcher, *place, *arguments, "data.holdout=0.1", "train.steps=12"], os.environ | environment
        return subprocess.run(command, env=around, capture_output=True, text=True, timeout=400, check=False)

    assert run(2, DIE_AT_STEP="6").returncode
    assert not (tmp_path / "run/model").exists()
    done = run(1)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "resumed from" in done.stdout + done.stderr

    steps = shown(records, 2)
    data = DataConfig(kind=kind, path=str(folder), image_size=16, cache_dir=str(tmp_path / "cache"), holdout=0.1)
    feed = Feed(open_dataset(data, 0), 8, 1, 0, 1, 0, torch.device("cpu"))
    assert {step: [index for _, (index, _, _) in sorted(row.items())] for step, row in steps.items()} == {
        step: feed.indices(step, 0)[0].tolist() for step in range(12)
    }
    assert main(["encode", str(tmp_path / "run"), "--data", str(folder), "--output", str(tmp_path / "z.npz")]) == 0
    with np.load(tmp_path / "z.npz") as encoded_images:
        assert [*encoded_images["files"]] == [*opened(folder, kind).index.names]
        assert np.isfinite(encoded_images["mu"]).all()
