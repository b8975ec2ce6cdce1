"""Published sets of images with known factors: each loader on a small file of the published format, written here."""

import gzip
import io
import os
import re
import shutil
import struct
import sys
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from numpy.testing import assert_array_equal
from PIL import Image

from sami_fast import files
from sami_fast.data import ArrayImages, cache, storage
from sami_fast.data.cars3d import Cars3D
from sami_fast.data.celeba import celeba_listing
from sami_fast.data.grids import MPI3D, DSprites, Shapes3D
from sami_fast.data.pixels import resize, with_channels
from sami_fast.data.smallnorb import PARTS, SmallNORB
from sami_fast.data.storage import held_out_places, load_array
from sami_fast.errors import UserError


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def grid(*sizes: int) -> np.ndarray:
    """Every combination, the last factor fastest."""
    return np.array(list(np.ndindex(*sizes)))


def everything(source) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [n, C, H, W] and factors [n, F], checked for form."""
    index = torch.arange(source.size)
    pixels, factors = source.pixels(index), source.factors(index)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (source.size, *source.image_shape)
    assert pixels.is_contiguous()
    assert factors.dtype == torch.float32
    assert factors.shape == (source.size, len(source.factor_names))
    images = source.images(index[:3])
    assert images.dtype == torch.float32
    assert torch.equal(images, pixels[:3].float() / 127.5 - 1)
    mixed = torch.tensor([source.size - 1, 0, source.size - 1])
    assert torch.equal(source.pixels(mixed), pixels[mixed])
    assert torch.equal(source.factors(mixed), factors[mixed])
    assert source.pixels(index[:0]).shape == (0, *source.image_shape)
    assert source.factors(index[:0]).shape == (0, len(source.factor_names))
    return pixels.numpy(), factors.numpy()


def is_mapped(array: np.ndarray | None) -> bool:
    while array is not None and not isinstance(array, np.memmap):
        array = array.base
    return array is not None and array._mmap is not None


def hdf5(path: Path, mode: str = "w"):
    """An open file; the case is skipped where h5py is missing."""
    return pytest.importorskip("h5py").File(path, mode)


def refused(message: str):
    return pytest.raises(UserError, match=f"^{message}")


def flip_byte(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)


# Arrays of files


def write(path: Path, array: np.ndarray, how: str, key: str = "images") -> Path:
    """The array as one entry among others."""
    other = np.arange(3)
    if how == "npy":
        np.save(path, array)
    elif how == "stored":
        np.savez(path, before=other, **{key: array}, after=other)
    elif how == "compressed":
        np.savez_compressed(path, before=other, **{key: array}, after=other)
    else:
        settings = {
            "contiguous": {},
            "chunked": {"chunks": True},
            "gzip": {"compression": "gzip", "chunks": (min((3, *array.shape[:1])), *array.shape[1:])},
        }
        with hdf5(path) as file:
            file["before"] = other
            file.create_dataset(key, data=array, **settings[how])
    return path


FORMATS = {"npy": "npy", "stored": "npz", "compressed": "npz", "contiguous": "h5", "chunked": "h5", "gzip": "hdf5"}
MAPPED = ("npy", "stored", "contiguous")


@pytest.mark.parametrize("memory", [0, 2**28], ids=["cached", "in-memory"])
@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize(("dtype", "shape"), [("u1", (10, 4, 4, 3)), (">f8", (7, 5)), ("f4", (1001,)), ("?", (2, 3))])
def test_every_format_gives_the_array(tmp_path, monkeypatch, memory, how, dtype, shape):
    monkeypatch.setattr(storage, "MEMORY", memory)
    monkeypatch.setattr(storage, "PIECE", 100)  # several pieces
    array = noise(*shape).astype(dtype)
    path = write(tmp_path / f"file.{FORMATS[how]}", array, how)
    loaded = load_array(path, "" if how == "npy" else "images", str(tmp_path / "cache"))
    assert_array_equal(loaded, array, strict=True)
    assert not loaded.flags.writeable
    assert is_mapped(loaded) == (how in MAPPED or memory == 0)
    assert (tmp_path / "cache").exists() == (how not in MAPPED and memory == 0)


@pytest.mark.parametrize("how", [how for how in FORMATS if FORMATS[how] != "npy"])
def test_empty_and_scalar_arrays(tmp_path, how):
    for array in (np.zeros((0, 3), np.float32), np.float64(7)):
        if how in ("chunked", "gzip") and not array.size * array.ndim:
            continue  # HDF5 does not chunk these
        loaded = load_array(write(tmp_path / f"file.{FORMATS[how]}", array, how), "images", str(tmp_path))
        assert_array_equal(loaded, array)
        assert loaded.shape == array.shape


@pytest.mark.parametrize("how", ["npy", "stored", "compressed"])
@pytest.mark.parametrize("memory", [0, 2**28])
def test_the_first_axis_may_be_the_fastest(tmp_path, monkeypatch, how, memory):
    monkeypatch.setattr(storage, "MEMORY", memory)
    array = np.asfortranarray(noise(6, 5, 4))
    loaded = load_array(write(tmp_path / f"file.{FORMATS[how]}", array, how), "" if how == "npy" else "images", str(tmp_path))
    assert loaded.flags.f_contiguous
    assert_array_equal(loaded, array, strict=True)


def test_an_npz_that_python_2_wrote(tmp_path):
    """As dSprites was: sizes end with L. Also an extra field in the local header, an entry before, and a pickled one that is not read."""
    array = noise(4, 3, 3)
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (4L, 3L, 3L), }"
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    entry = zipfile.ZipInfo("imgs.npy")
    entry.extra = struct.pack("<HH6s", 0x7777, 6, b"sixtee")
    with zipfile.ZipFile(tmp_path / "old.npz", "w") as archive:
        pickled = io.BytesIO()
        np.save(pickled, np.array({"date": 2017}, dtype=object))
        archive.writestr("metadata.npy", pickled.getvalue())
        archive.writestr(entry, b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + array.tobytes())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_array(tmp_path / "old.npz", "imgs", str(tmp_path))
    assert is_mapped(loaded)
    assert_array_equal(loaded, array, strict=True)
    with refused(r"data\.path: .*old\.npz is not a readable \.npy or \.npz of plain numbers \(it holds Python objects\)$"):
        load_array(tmp_path / "old.npz", "metadata", str(tmp_path))


def test_nested_datasets(tmp_path):
    with hdf5(tmp_path / "file.h5") as file:
        file["latents/classes"] = np.arange(4)
        file["late"] = np.arange(2)
        file.create_dataset("unwritten", (3,), "f4", fillvalue=7)
        file["text"] = ["a", "b"]
        file["nothing"] = sys.modules["h5py"].Empty("f4")
    load = lambda key: load_array(tmp_path / "file.h5", key, str(tmp_path))  # noqa: E731
    assert load("latents/classes").tolist() == [0, 1, 2, 3]
    assert load("unwritten").tolist() == [7, 7, 7]
    for key, reason in (("text", "it holds Python objects"), ("nothing", "'nothing' has no shape")):
        with refused(rf"data\.path: .*file\.h5 is not a readable HDF5 file of plain numbers \({reason}\)$"):
            load(key)
    with refused(r"data\.array_key: no entry 'latents' in .*file\.h5, which holds late, latents/classes, nothing, text, unwritten$"):
        load("latents")


def test_the_cache_is_reused_and_redone_when_the_source_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "MEMORY", 0)
    path, cached = tmp_path / "images.npz", tmp_path / "cache"
    load = lambda: load_array(path, "images", str(cached))  # noqa: E731
    files = lambda: sorted(cached.rglob("*.npy"))  # noqa: E731

    first = noise(20, 4, 4)
    write(path, first, "compressed")
    assert_array_equal(load(), first)
    (file,) = files()
    assert file.parent == cache.cache_dir(str(cached), path)
    assert_array_equal(np.load(file), first)
    np.save(file, 255 - first)  # so that a second reading shows
    assert_array_equal(load(), 255 - first)

    os.utime(path, ns=(0, 10**9))  # another time
    old = load()
    assert_array_equal(old, first)
    flat = first * 0
    write(path, flat, "compressed")  # another size, at the same time
    os.utime(path, ns=(0, 10**9))
    assert_array_equal(load(), flat)
    assert len(files()) == 1  # the stale one is gone
    assert_array_equal(old, first)  # but not for those who have it open

    (file,) = files()
    file.write_bytes(file.read_bytes()[:-1])  # a damaged cache
    assert_array_equal(load(), flat)


def test_entries_of_one_file_do_not_evict_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "MEMORY", 0)
    arrays = {"a": noise(5), "a-1f": noise(6), "b/c": noise(7), "b_c": noise(8), "../d": noise(9)}
    np.savez_compressed(tmp_path / "many.npz", **arrays)
    for _ in range(2):
        for key, array in arrays.items():
            assert_array_equal(load_array(tmp_path / "many.npz", key, str(tmp_path / "cache")), array)
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == len(arrays)
    assert len(list(cache.cache_dir(str(tmp_path / "cache"), tmp_path / "many.npz").glob("*.npy"))) == len(arrays)


@pytest.mark.parametrize("how", ["compressed", "gzip"])
def test_nothing_half_written_stays(tmp_path, monkeypatch, how):
    monkeypatch.setattr(storage, "MEMORY", 0)
    monkeypatch.setattr(storage, "PIECE", 1000)
    path, cached = write(tmp_path / f"file.{FORMATS[how]}", noise(60, 10, 10), how), tmp_path / "cache"
    content = path.read_bytes()
    place = len(content) // 2
    if how == "gzip":
        with hdf5(path, "r") as file:
            place = file["images"].id.get_chunk_info(9).byte_offset + 50
    flip_byte(path, place)
    with refused(rf"data\.path: {re.escape(str(path))} is not a readable .* of plain numbers \("):
        load_array(path, "images", str(cached))
    assert [file.name for file in cached.rglob("*") if file.is_file()] == ["lock"]
    killed, busy = (files.partial_of(cache.cache_dir(str(cached), path) / "x.npy") for _ in range(2))
    killed.touch()
    path.write_bytes(content)
    with files._begun(busy):  # as another process holds what it writes
        assert_array_equal(load_array(path, "images", str(cached)), noise(60, 10, 10))
    assert not killed.exists()
    assert busy.exists()


def test_only_one_of_many_unpacks(tmp_path, monkeypatch):
    """As the ranks of a run, which all start at the same time."""
    monkeypatch.setattr(storage, "MEMORY", 0)
    array, written, original = noise(300, 30, 30), [], storage.write_whole
    path = write(tmp_path / "images.npz", array, "compressed")

    def slow(*arguments) -> None:
        written.append(arguments[0])
        time.sleep(0.1)  # the others arrive meanwhile
        original(*arguments)

    monkeypatch.setattr(storage, "write_whole", slow)
    with ThreadPoolExecutor(4) as pool:
        for loaded in pool.map(lambda _: load_array(path, "images", str(tmp_path / "cache")), range(4)):
            assert_array_equal(loaded, array)
    assert len(written) == 1


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "MEMORY", 0)
    path = write(tmp_path / "images.npz", noise(5), "compressed")
    with refused(rf"data\.cache_dir: cannot unpack {path} there \(.*Not a directory"):
        load_array(path, "images", str(path))

    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "write_whole", full)
    with refused(rf"data\.cache_dir: cannot unpack {path} there \(.*No space left"):
        load_array(path, "images", str(tmp_path / "cache"))


@pytest.mark.parametrize("how", FORMATS)
def test_files_that_are_cut_short(tmp_path, how):
    path = write(tmp_path / f"file.{FORMATS[how]}", noise(50, 8, 8), how)
    content = path.read_bytes()
    form = "HDF5 file" if "h" in FORMATS[how] else r"\.npy or \.npz"
    for length in (0, 3, 9, 60, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with refused(rf"data\.path: {re.escape(str(path))} is not a readable {form} of plain numbers \(.+\)$"):
            load_array(path, "" if how == "npy" else "images", str(tmp_path))


def test_an_npz_whose_entry_does_not_fit_its_header(tmp_path):
    content = io.BytesIO()
    np.save(content, noise(10))
    for change, compression in ((content.getvalue()[:-1], 0), (content.getvalue() + b"0", 0), (content.getvalue()[:-4], 8)):
        with zipfile.ZipFile(tmp_path / "file.npz", "w", compression) as archive:
            archive.writestr("images.npy", change)
        with refused(rf"data\.path: .*\('images' has {len(change) - 128} bytes, not the 10 of its shape \(10,\)\)$"):
            load_array(tmp_path / "file.npz", "", str(tmp_path))


def test_which_entry(tmp_path):
    path = write(tmp_path / "file.npz", noise(4), "stored")
    assert_array_equal(load_array(path, "", ""), noise(4))
    with refused(rf"data\.array_key: no entry 'other' in {path}, which holds before, images, after$"):
        load_array(path, "other", "")
    with refused(rf"data\.path: no entry 'imgs' in {path}, which holds before, images, after; data\.kind dsprites needs it$"):
        load_array(path, "imgs", "", what="dsprites")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("notes.txt", "hello")
    with refused(rf"data\.array_key: 'notes\.txt' in {path} is not an array$"):
        load_array(path, "notes.txt", "")
    write(tmp_path / "file.npy", noise(4), "npy")
    with refused(r"data\.array_key: .*file\.npy holds one array without a name; leave the key empty$"):
        load_array(tmp_path / "file.npy", "images", "")
    with refused(r"data\.path: .*file\.npy holds one array without a name; data\.kind mpi3d needs one named 'images'$"):
        load_array(tmp_path / "file.npy", "images", "", what="mpi3d")
    with refused(rf"data\.path: no file {tmp_path / 'none.npy'}$"):
        load_array(tmp_path / "none.npy", "", "")
    (tmp_path / "text.h5").write_text("not one of them")
    with refused(r"data\.path: .*text\.h5 is not a readable HDF5 file of plain numbers \(it begins with b'not one '\)$"):
        load_array(tmp_path / "text.h5", "", "")


@pytest.mark.parametrize("how", MAPPED)
@pytest.mark.parametrize("shape", [(50, 8, 8, 3), (50, 3, 8, 8)])
def test_a_file_that_becomes_shorter_under_a_run(tmp_path, how, shape):
    """Mapped memory that is gone would end the process by a signal."""
    array = noise(*shape)
    path = write(tmp_path / f"file.{FORMATS[how]}", array, how)
    source = ArrayImages(str(path), "" if how == "npy" else "images", holdout=0.0)
    index = torch.tensor([3, 4, 5, 49, 0])
    chosen = torch.from_numpy(array)[index]
    expected = (chosen if shape[1] == 3 else chosen.permute(0, 3, 1, 2)).float() / 127.5 - 1
    assert torch.equal(source.images(index), expected)
    os.truncate(path, path.stat().st_size // 2)
    assert torch.equal(source.images(index[:3]), expected[:3])
    with refused(rf"data\.path: {path} has become shorter while it was in use$"):
        source.images(index)


def test_rows_of_views(tmp_path, monkeypatch):
    """Whatever stands first, second or last in the file."""
    monkeypatch.setattr(storage, "MEMORY", 0)
    array = noise(9, 2, 5, 6).astype(">i4")
    for order in "CF":
        np.save(tmp_path / "file.npy", np.asarray(array, order=order))
        mapped = load_array(tmp_path / "file.npy", "", "")
        places = np.array([8, 0, 1, 2, 2])
        views = lambda a: (a, a[:, 0], np.moveaxis(a, 1, -1), a[..., None], a[2:], a[:, :, ::2])  # noqa: E731
        for seen, whole in zip(views(mapped), views(array), strict=True):
            inside = places % len(whole)
            assert_array_equal(storage.take(seen, inside), whole[inside], strict=True)
            assert storage.take(seen, inside[:0]).shape == (0, *whole.shape[1:])
        os.truncate(tmp_path / "file.npy", 200)
        with refused(r"data\.path: .*file\.npy has become shorter"):
            storage.take(mapped, places)
    np.save(tmp_path / "file.npy", array)
    with pytest.raises(IndexError, match="image 9 of 9"):
        storage.take(load_array(tmp_path / "file.npy", "", ""), np.array([9]))


def test_hdf5_reads_no_other_file(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(4 * 8 * 8))
    h5py = pytest.importorskip("h5py")
    with hdf5(tmp_path / "external.h5") as file:
        file.create_dataset("images", (4, 8, 8), "u1", external=[(str(secret), 0, 4 * 8 * 8)])
    with hdf5(tmp_path / "other.h5") as file:
        file["images"] = noise(4, 8, 8)
    with hdf5(tmp_path / "virtual.h5") as file:
        layout = h5py.VirtualLayout((4, 8, 8), "u1")
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "images", (4, 8, 8))
        file.create_virtual_dataset("images", layout)
    with hdf5(tmp_path / "link.h5") as file:
        file["images"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "images")
    for kind in ("external", "virtual"):
        with refused(rf"data\.path: .*{kind}\.h5 is not a readable HDF5 file .* \('images' lies in other files, by {kind} storage\)$"):
            load_array(tmp_path / f"{kind}.h5", "images", str(tmp_path))
    with refused(r"data\.array_key: no entry 'images' in .*link\.h5, which holds nothing$"):
        load_array(tmp_path / "link.h5", "images", str(tmp_path))


def test_what_would_unpack_to_more_than_there_is_room_for(tmp_path, monkeypatch):
    """A few kilobytes that say they are terabytes: nothing is written."""
    with hdf5(tmp_path / "file.h5") as file:
        file.create_dataset("images", (2 * 10**9, 64, 64, 3), "u1", chunks=(1, 64, 64, 3))
    with refused(rf"data\.path: {tmp_path}/file\.h5 has .* KiB and would unpack to 22\.35 TiB: it holds no images$"):
        load_array(tmp_path / "file.h5", "", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "LARGEST_RATIO", 10**15)
    with refused(r"data\.cache_dir: expected room for 22\.35 TiB in .*cache.*, found .* [GT]iB$"):
        load_array(tmp_path / "file.h5", "", str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").rglob("*.npy"))


def test_matlab_files_are_named(tmp_path):
    """Since version 7.3 they are HDF5 behind a block of 512 bytes, in which MATLAB, or nobody, says what it is."""
    h5py = pytest.importorskip("h5py")
    for name, head in (("zeros.mat", b""), ("text.h5", b"MATLAB 7.3 MAT-file, Platform: GLNXA64"), ("other.h5", b"")):
        with h5py.File(tmp_path / name, "w", userblock_size=512) as file:
            file["images"] = noise(4, 8, 8)
        with open(tmp_path / name, "r+b") as stream:
            stream.write(head)
    scipy.io.savemat(tmp_path / "old.mat", {"images": noise(4, 8, 8)})
    for name in ("zeros.mat", "text.h5", "old.mat"):
        with refused(rf"data\.path: .*{name} is not a readable .* \(it is a MATLAB file, whose axes are stored in reverse; save .*\)$"):
            load_array(tmp_path / name, "", str(tmp_path))
    assert_array_equal(load_array(tmp_path / "other.h5", "", str(tmp_path)), noise(4, 8, 8))


def test_files_of_pytorch_are_named(tmp_path):
    torch.save(torch.zeros(4, 8, 8), tmp_path / "images.pt")  # an archive like an .npz
    with refused(r"data\.path: .*images\.pt is not a readable .* \(it is a PyTorch file; save the images as one of these\)$"):
        load_array(tmp_path / "images.pt", "", str(tmp_path))


def test_hdf5_without_h5py(tmp_path, monkeypatch):
    path = write(tmp_path / "3dshapes.h5", noise(2, 4, 4, 3), "contiguous")
    monkeypatch.setitem(sys.modules, "h5py", None)
    message = r"reads HDF5, and h5py is not installed; `pip install 'sami-fast\[feed\]'`$"
    with refused(rf"data\.kind shapes3d {message}"):
        Shapes3D(str(path))
    with refused(rf"data\.kind array {message}"):
        ArrayImages(str(path))


@pytest.mark.parametrize("how", FORMATS)
def test_ones_own_images_in_every_format(tmp_path, monkeypatch, how):
    monkeypatch.setattr(storage, "MEMORY", 0)
    array = noise(9, 5, 5)
    path = write(tmp_path / f"mine.{FORMATS[how]}", array, how)
    source = ArrayImages(str(path), "", 0.0, 0, str(tmp_path))
    assert is_mapped(source.array)
    assert_array_equal(((source.images(torch.arange(9)) + 1) * 127.5).round().numpy()[:, 0], array)


# Which images are held out


@pytest.mark.parametrize("count", [1, 2, 3, 10, 1000])
@pytest.mark.parametrize("holdout", [0.0, 0.001, 0.1, 0.5, 0.9])
def test_held_out_places(count, holdout):
    training, evaluation = (held_out_places(count, holdout, split) for split in (0, 1))
    if holdout == 0 or count == 1:
        assert training.tolist() == evaluation.tolist() == list(range(count))
        return
    assert sorted([*training, *evaluation]) == list(range(count))
    assert len(evaluation) == min(max(round(holdout * count), 1), count - 1)
    for places in (training, evaluation):
        assert (np.diff(places) > 0).all()
        assert places.dtype == np.int64
    assert_array_equal(held_out_places(count, holdout, 1), evaluation)


def test_held_out_places_do_not_follow_a_grid():
    """Each class of each factor is held out about as often as the others."""
    held_out = grid(10, 10, 10, 10)[held_out_places(10**4, 0.1, 1)]
    for column in held_out.T:
        assert np.abs(np.bincount(column, minlength=10) - 100).max() < 4 * (100 * 0.9) ** 0.5


# Grids

SPRITES = (1, 3, 2, 4, 3, 2)
ROOMS = (2, 3, 2, 4, 2, 3)


def sprite_arrays() -> dict[str, np.ndarray]:
    classes = grid(*SPRITES)
    return {"imgs": noise(len(classes), 8, 8) % 2, "latents_classes": classes, "latents_values": classes * 0.5}


def write_sprites(folder: Path, how: str, **changes: np.ndarray) -> Path:
    arrays = sprite_arrays() | changes
    if how in ("stored", "compressed"):
        path = folder / f"{DSprites.stem}.npz"
        save = np.savez if how == "stored" else np.savez_compressed
        save(path, metadata=np.array({"date": 2017}, dtype=object), **arrays)
        return path
    path = folder / f"{DSprites.stem}.{'hdf5' if how == 'gzip' else 'h5'}"
    with hdf5(path) as file:
        for key, array in arrays.items():
            settings = {"compression": "gzip"} if how == "gzip" and array.ndim == 3 else {}
            file.create_dataset(key.replace("_", "/"), data=array, **settings)
    return path


def room_arrays() -> dict[str, np.ndarray]:
    classes = grid(*ROOMS)
    spread = [np.linspace(*ends, size) for ends, size in zip(((0, 0.9),) * 3 + ((0.75, 1.25), (0, 3), (-30, 30)), ROOMS, strict=True)]
    labels = np.stack([values[column] for values, column in zip(spread, classes.T, strict=True)], axis=1)
    return {"images": noise(len(classes), 6, 6, 3), "labels": labels}


def write_rooms(folder: Path, how: str = "contiguous", **changes: np.ndarray) -> Path:
    with hdf5(folder / "3dshapes.h5") as file:
        for key, array in (room_arrays() | changes).items():
            file.create_dataset(key, data=array, **({"compression": "gzip"} if how == "gzip" and array.ndim == 4 else {}))
    return folder / "3dshapes.h5"


@pytest.mark.parametrize("how", ["stored", "compressed", "contiguous", "gzip"])
@pytest.mark.parametrize("memory", [0, 2**28])
@pytest.mark.parametrize("folder", [False, True])
def test_dsprites(tmp_path, monkeypatch, how, memory, folder):
    monkeypatch.setattr(storage, "MEMORY", memory)
    path = write_sprites(tmp_path, how)
    source = DSprites(str(tmp_path if folder else path), holdout=0.0, cache_dir=str(tmp_path / "cache"))
    assert source.factor_names == ("shape", "scale", "orientation", "x", "y")  # the colour is constant
    assert source.image_shape == (1, 8, 8)
    assert is_mapped(source.array) == (how in MAPPED or memory == 0)
    pixels, factors = everything(source)
    arrays = sprite_arrays()
    assert_array_equal(pixels[:, 0], arrays["imgs"] * 255)
    assert set(np.unique(pixels)) == {0, 255}
    assert_array_equal(factors, arrays["latents_classes"][:, 1:])


@pytest.mark.parametrize("how", ["contiguous", "gzip"])
def test_shapes3d(tmp_path, how):
    source = Shapes3D(str(write_rooms(tmp_path, how)), holdout=0.0, cache_dir=str(tmp_path / "cache"))
    assert source.factor_names == ("floor_hue", "wall_hue", "object_hue", "scale", "shape", "orientation")
    assert is_mapped(source.array) == (how == "contiguous")
    pixels, factors = everything(source)
    assert_array_equal(pixels, room_arrays()["images"].transpose(0, 3, 1, 2))
    assert_array_equal(factors, grid(*ROOMS))


def test_labels_say_what_is_where(tmp_path):
    """In any order of the images."""
    order, arrays = np.random.default_rng(0).permutation(len(grid(*SPRITES))), sprite_arrays()
    path = write_sprites(tmp_path, "stored", latents_classes=arrays["latents_classes"][order])
    _, factors = everything(DSprites(str(path), holdout=0.0))
    assert_array_equal(factors, arrays["latents_classes"][order][:, 1:])


@pytest.mark.parametrize(("sizes", "side", "how"), [((6, 6, 2, 3, 3, 40, 40), 1, "compressed"), ((4, 4, 2, 3, 3, 40, 40), 2, "stored")])
def test_mpi3d(tmp_path, sizes, side, how):
    count = int(np.prod(sizes))
    assert count in (1036800, 460800)
    images = noise(count, side, side, 3)
    (np.savez if how == "stored" else np.savez_compressed)(tmp_path / "any_name.npz", images=images)
    source = MPI3D(str(tmp_path), holdout=0.0, cache_dir=str(tmp_path / "cache"))
    assert source.factor_names == ("colour", "shape", "size", "camera_height", "background", "horizontal", "vertical")
    assert (source.size, source.image_shape) == (count, (3, side, side))
    assert is_mapped(source.array) == (how == "stored")
    index = torch.tensor([0, 1, 39, 40, 1600, 4800, 14400, 28800, count - 1])
    assert_array_equal(source.pixels(index).numpy(), images[index.numpy()].transpose(0, 3, 1, 2))
    expected = [
        [0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 1],
        [0, 0, 0, 0, 0, 0, 39],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 0, 0, 0],
        [0, 0, 1, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0, 0],
        [size - 1 for size in sizes],
    ]
    assert_array_equal(source.factors(index).numpy(), expected)


def test_splits_share_no_image(tmp_path):
    images = np.zeros((len(grid(*ROOMS)), 2, 2, 3), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = np.divmod(np.arange(len(images)), 256)
    path = write_rooms(tmp_path, images=images)
    seen = []
    for split in (0, 1):
        pixels, factors = everything(Shapes3D(str(path), holdout=0.25, split=split))
        numbers = pixels[:, 0, 0, 0].astype(int) * 256 + pixels[:, 1, 0, 0]
        assert_array_equal(factors, grid(*ROOMS)[numbers])
        seen.append(numbers.tolist())
    assert sorted(seen[0] + seen[1]) == list(range(len(images)))
    assert len(seen[1]) == len(images) // 4
    assert seen[1] == held_out_places(len(images), 0.25, 1).tolist()


@pytest.mark.parametrize(("size", "channels"), [(0, 0), (3, 0), (12, 1), (0, 1), (0, 3), (4, 3)])
def test_size_and_channels(tmp_path, size, channels):
    write_rooms(tmp_path)
    write_sprites(tmp_path, "stored")
    for kind in (Shapes3D, DSprites):
        plain = kind(str(tmp_path), holdout=0.0)
        source = kind(str(tmp_path), image_size=size, channels=channels, holdout=0.0)
        assert source.image_shape == (channels or plain.image_shape[0], size or plain.image_shape[1], size or plain.image_shape[1])
        pixels, factors = everything(source)
        original, same_factors = everything(plain)
        resized = resize(torch.from_numpy(original), source.image_shape[1])
        assert np.abs(pixels.astype(int) - with_channels(resized, source.image_shape[0]).numpy()).max() <= 1  # memory layouts round apart
        assert_array_equal(factors, same_factors)


CLASSES = grid(*SPRITES)
DOUBLED = np.concatenate((CLASSES[:-1], CLASSES[:1]))
LABELS = room_arrays()["labels"]
GRID_ERRORS = {
    "sprite-rank": (DSprites, {"imgs": noise(144, 8)}, r"expected 'imgs' in .* to be uint8 \[N, H, H\], found uint8 \[144, 8\]$"),
    "sprite-side": (DSprites, {"imgs": noise(144, 8, 7)}, r"expected 'imgs' in .* to be uint8 \[N, H, H\], found uint8 \[144, 8, 7\]$"),
    "sprite-dtype": (DSprites, {"imgs": np.zeros((144, 8, 8))}, r"expected 'imgs' in .* to be uint8 \[N, H, H\], found float64 "),
    "sprite-pixels": (DSprites, {"imgs": noise(144, 8, 8)}, r"expected pixels 0 and 1 as 'imgs' in .*npz, found 255$"),
    "sprite-count": (
        DSprites,
        {"latents_classes": CLASSES[1:]},
        r"expected 'latents_classes' in .* to be integers \[144, 6\], found int64 \[143, 6\]$",
    ),
    "sprite-labels-dtype": (DSprites, {"latents_classes": CLASSES * 1.0}, r"expected 'latents_classes' .*, found float64 \[144, 6\]$"),
    "sprite-twice": (
        DSprites,
        {"latents_classes": DOUBLED},
        r"expected 'latents_classes' in .* to be every combination of classes 0 to 0, 2, 1, 3, 2, 1 once, found only 143 different rows$",
    ),
    "sprite-negative": (DSprites, {"latents_classes": CLASSES - 1}, r"expected 'latents_classes' .* once, found class -1$"),
    "sprite-large": (DSprites, {"latents_classes": CLASSES * 10**15}, r"expected 'latents_classes' .* once, found 144 rows$"),
    "sprite-none": (DSprites, {"imgs": noise(0, 8, 8), "latents_classes": CLASSES[:0]}, r"no images in "),
    "sprite-empty": (DSprites, {"imgs": noise(144, 0, 0)}, r"no images in "),
    "room-rank": (
        Shapes3D,
        {"images": noise(288, 6, 6)},
        r"expected 'images' in .* to be uint8 \[N, H, H, 3\], found uint8 \[288, 6, 6\]$",
    ),
    "room-channels": (Shapes3D, {"images": noise(288, 6, 6, 1)}, r"expected 'images' in .*, found uint8 \[288, 6, 6, 1\]$"),
    "room-count": (Shapes3D, {"labels": LABELS[1:]}, r"expected 'labels' in .* to be finite numbers \[288, 6\], found float64 \[287, 6\]$"),
    "room-nan": (Shapes3D, {"labels": np.where(LABELS == 30, np.nan, LABELS)}, r"expected 'labels' in .* to be finite numbers "),
    "room-grid": (
        Shapes3D,
        {"labels": LABELS[[1, *range(1, 288)]]},
        r"expected 'labels' .* 0 to 1, 2, 1, 3, 1, 2 once, found only 287 different rows$",
    ),
}


@pytest.mark.parametrize("case", GRID_ERRORS)
def test_unsuitable_grids(tmp_path, case):
    kind, changes, message = GRID_ERRORS[case]
    path = write_sprites(tmp_path, "stored", **changes) if kind is DSprites else write_rooms(tmp_path, **changes)
    with refused(rf"data\.path: (?:{message})"):
        kind(str(path), cache_dir=str(tmp_path))


def test_a_late_sprite_that_is_not_0_or_1(tmp_path):
    """Beyond those that are looked at when the file is opened."""
    classes = grid(1, 3, 4, 10, 5, 3)
    images = noise(len(classes), 2, 2) % 2
    images[-1, 0, 0] = 2
    path = write_sprites(tmp_path, "stored", imgs=images, latents_classes=classes)
    source = DSprites(str(path), holdout=0.0)
    source.pixels(torch.arange(1024, len(classes) - 1))
    with refused(r"data\.path: expected pixels 0 and 1 as 'imgs' in .*\.npz, found 2$"):
        source.pixels(torch.tensor([len(classes) - 1]))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((100, 2, 2, 3), r"expected 1036800 or 460800 images in .*, found 100$"),
        ((100, 2, 2), r"expected 'images' in .* to be uint8 \[N, H, H, 3\], found uint8 \[100, 2, 2\]$"),
        ((0, 2, 2, 3), r"expected 1036800 or 460800 images in .*, found 0$"),
    ],
)
def test_unsuitable_mpi3d(tmp_path, shape, message):
    np.savez(tmp_path / "mpi3d_toy.npz", images=noise(*shape))
    with refused(rf"data\.path: {message}"):
        MPI3D(str(tmp_path))


@pytest.mark.parametrize("channels", [2, 4])
def test_impossible_channels(tmp_path, channels):
    with refused(rf"data\.channels: expected 3 or 1 for .*3dshapes\.h5, found {channels}$"):
        Shapes3D(str(write_rooms(tmp_path)), channels=channels)


@pytest.mark.parametrize(
    ("kind", "name", "files"),
    [
        (DSprites, "dsprites", DSprites.files),
        (Shapes3D, "shapes3d", Shapes3D.files),
        (MPI3D, "mpi3d", ("*.npz",)),
        (Cars3D, "cars3d", ("list.txt", "cars/list.txt", "*.npz")),
    ],
)
def test_where_the_file_is(tmp_path, kind, name, files):
    with refused(rf"data\.path: no file or folder {tmp_path / 'none'}$"):
        kind(str(tmp_path / "none"))
    with refused(rf"data\.path: no file of data\.kind {name} in {tmp_path}, expected {re.escape(' or '.join(files))}$"):
        kind(str(tmp_path))
    text = tmp_path / "README.md"
    text.write_text("not the data")
    with refused(rf"data\.path: {text} is not a readable \.npy or \.npz of plain numbers \(it begins with b'not the '\)$"):
        kind(str(text))


def test_several_candidates(tmp_path):
    write_sprites(tmp_path, "stored")
    write_sprites(tmp_path, "gzip")
    expected = f"{DSprites.stem}.hdf5, {DSprites.stem}.npz"
    with refused(rf"data\.path: several files of data\.kind dsprites in {tmp_path}, expected one of {expected}$"):
        DSprites(str(tmp_path))
    (tmp_path / "real.npz").touch()
    with refused(rf"data\.path: several files of data\.kind mpi3d in {tmp_path}, expected one of .*npz, real\.npz$"):
        MPI3D(str(tmp_path))


# Cars3D


def write_cars(folder: Path, side: int = 128, cars: int = 3, **changes: np.ndarray) -> np.ndarray:
    """The published folder, with few cars. Returns their images, [car, elevation, azimuth, H, W, 3]."""
    cars_folder = folder / "cars"
    cars_folder.mkdir(parents=True, exist_ok=True)
    images = noise(cars, 4, 24, 2, 2, 3).repeat(side // 2, 3).repeat(side // 2, 4)
    names = [f"car_{number:03d}_mesh" for number in (7, 1, 30, 2)[:cars]]  # not the order of a sorted folder
    (cars_folder / "list.txt").write_text("\n".join(names) + "\n")
    for name, views in zip(names, images, strict=True):
        entries = {"im": changes.get(name, views.transpose(2, 3, 4, 1, 0)), "mask": np.zeros(3)}
        scipy.io.savemat(cars_folder / f"{name}.mat", entries, do_compression=True)
    return images


@pytest.mark.parametrize("below", ["", "cars", "cars/list.txt"])
def test_cars3d_from_its_folder(tmp_path, monkeypatch, below):
    images = write_cars(tmp_path / "data")
    source = Cars3D(str(tmp_path / "data" / below), holdout=0.0, cache_dir=str(tmp_path / "cache"))
    assert source.factor_names == ("elevation", "azimuth", "identity")
    assert source.image_shape == (3, 64, 64)
    assert is_mapped(source.array)
    pixels, factors = everything(source)
    assert_array_equal(factors, grid(4, 24, 3))
    for number, (elevation, azimuth, car) in list(enumerate(grid(4, 24, 3)))[::7]:
        resized = Image.fromarray(images[car, elevation, azimuth]).resize((64, 64), Image.Resampling.BILINEAR)
        assert np.abs(pixels[number].transpose(1, 2, 0).astype(int) - np.asarray(resized)).max() <= 1

    monkeypatch.setattr(scipy.io, "loadmat", None)  # decoded once
    again, _ = everything(Cars3D(str(tmp_path / "data"), holdout=0.0, cache_dir=str(tmp_path / "cache")))
    assert_array_equal(again, pixels)


def test_published_sets_are_known_by_their_content(tmp_path):
    """At any place; and another image is another set."""
    sources = []
    write_cars(tmp_path / "here", side=8)
    write_norb(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")  # MATLAB files written twice hold the second of each
    for name in ("here", "there"):
        sources.append([kind(str(tmp_path / name), cache_dir=str(tmp_path / "cache")) for kind in (Cars3D, SmallNORB)])
    for one, other in zip(*sources, strict=True):
        assert one.fingerprint == other.fingerprint
    write_cars(tmp_path / "there", side=8, car_001_mesh=np.zeros_like(noise(8, 8, 3, 24, 4)))
    flip_byte(tmp_path / "there" / f"{PARTS[0]}-dat.mat", 5000)
    for one, kind in zip(sources[0], (Cars3D, SmallNORB), strict=True):
        assert kind(str(tmp_path / "there"), cache_dir=str(tmp_path / "cache")).fingerprint != one.fingerprint


def test_cars3d_is_decoded_again_when_a_car_or_the_size_changes(tmp_path):
    arguments = {"image_size": 2, "holdout": 0.0, "cache_dir": str(tmp_path / "cache")}
    images = write_cars(tmp_path, side=2, cars=2)
    expected = images.transpose(2, 1, 0, 5, 3, 4).swapaxes(0, 1).reshape(-1, 3, 2, 2)
    assert_array_equal(everything(Cars3D(str(tmp_path), **arguments))[0], expected)
    changed = 255 - images[1]
    scipy.io.savemat(tmp_path / "cars" / "car_001_mesh.mat", {"im": changed.transpose(2, 3, 4, 1, 0)})
    expected[1::2] = 255 - expected[1::2]
    assert_array_equal(everything(Cars3D(str(tmp_path), **arguments))[0], expected)
    small = Cars3D(str(tmp_path), **(arguments | {"image_size": 4, "channels": 1}))
    assert small.image_shape == (1, 4, 4)
    everything(small)
    assert sorted(file.name[:7] for file in (tmp_path / "cache").rglob("*.npy")) == ["cars-2-", "cars-4-"]


def test_cars3d_from_an_npz(tmp_path):
    images = noise(4 * 24 * 183, 2, 2, 3)
    np.savez_compressed(tmp_path / "cars3d.npz", images=images)
    source = Cars3D(str(tmp_path), image_size=2, holdout=0.0)
    pixels, factors = everything(source)
    assert_array_equal(pixels, images.transpose(0, 3, 1, 2))
    assert_array_equal(factors, grid(4, 24, 183))
    assert Cars3D(str(tmp_path)).image_shape == (3, 64, 64)
    training, evaluation = (Cars3D(str(tmp_path), holdout=0.1, split=split) for split in (0, 1))
    assert (training.size, evaluation.size) == (17568 - 1757, 1757)


CAR = np.zeros((2, 2, 3, 24, 4), np.uint8)
CAR_ERRORS = [
    (CAR[:, :1], r"expected 'im' in .*car_001_mesh\.mat to be uint8 \[H, H, 3, 24, 4\], found uint8 \[2, 1, 3, 24, 4\]$"),
    (CAR.swapaxes(3, 4), r"expected 'im' in .* to be uint8 \[H, H, 3, 24, 4\], found uint8 \[2, 2, 3, 4, 24\]$"),
    (CAR.astype(np.float32), r"expected 'im' in .* to be uint8 \[H, H, 3, 24, 4\], found single "),
    (CAR[0, 0], r"expected 'im' in .* to be uint8 \[H, H, 3, 24, 4\], found uint8 \[3, 24, 4\]$"),
]


@pytest.mark.parametrize(("car", "message"), CAR_ERRORS)
def test_unsuitable_cars(tmp_path, car, message):
    write_cars(tmp_path, side=2, car_001_mesh=car)
    with refused(rf"data\.path: {message}"):
        Cars3D(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").rglob("*npy"))


def test_damaged_cars(tmp_path):
    arguments = {"cache_dir": str(tmp_path / "cache"), "image_size": 2}
    write_cars(tmp_path, side=2)
    cars, listing = tmp_path / "cars", tmp_path / "cars" / "list.txt"
    names = listing.read_text()
    for text, message in (
        ("", rf"no names in {listing}$"),
        (names + "car_007_mesh.mat", rf"'car_007_mesh' is more than once in {listing}$"),
        (names + "car_009_mesh\n", rf"no file {cars / 'car_009_mesh.mat'}, which {listing} names$"),
    ):
        listing.write_text(text)
        with refused(rf"data\.path: {message}"):
            Cars3D(str(tmp_path), **arguments)
    listing.write_bytes(b"\xff\xfe\xfd")
    with refused(rf"data\.path: {listing} is not a readable list of names \("):
        Cars3D(str(tmp_path), **arguments)
    listing.write_text(names)
    car = cars / "car_030_mesh.mat"
    content = car.read_bytes()
    for damaged in (b"", b"not MATLAB's" * 30, content[:150], content[: len(content) // 2]):
        car.write_bytes(damaged)
        with refused(rf"data\.path: {car} is not a readable MATLAB file \("):
            Cars3D(str(tmp_path), **arguments)
    scipy.io.savemat(car, {"mask": np.zeros(3)})
    with refused(rf"data\.path: no entry 'im' in {car}; data\.kind cars3d needs it$"):
        Cars3D(str(tmp_path), **arguments)
    assert not list((tmp_path / "cache").rglob("*npy"))
    np.savez(tmp_path / "cars3d.npz", images=noise(96, 2, 2, 3))
    with refused(r"data\.path: expected 17568 images in .*cars3d\.npz, found 96$"):
        Cars3D(str(tmp_path / "cars3d.npz"))
    with refused(r"data\.path: several files of data\.kind cars3d in .*, expected one of "):
        Cars3D(str(tmp_path))


# SmallNORB


def norb_bytes(array: np.ndarray) -> bytes:
    """The published format: magic, axes, at least three lengths, data; little-endian."""
    magic = {"|u1": 0x1E3D4C55, "<i4": 0x1E3D4C54, "<f4": 0x1E3D4C51, "<f8": 0x1E3D4C53}[array.dtype.str]
    lengths = array.shape + (1,) * (3 - array.ndim)
    return struct.pack(f"<ii{len(lengths)}i", magic, array.ndim, *lengths) + array.tobytes()


def norb_arrays(count: int, side: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    limits = {"instance": (0, 10, 1), "elevation": (0, 9, 1), "azimuth": (0, 18, 2), "lighting": (0, 6, 1)}
    info = np.stack([rng.integers(low, high, count) * step for low, high, step in limits.values()], axis=1)
    return {
        "dat": noise(count, 2, side, side, seed=seed),
        "cat": rng.permutation(np.arange(count) % 5).astype("<i4"),
        "info": info.astype("<i4"),
    }


def write_norb(folder: Path, part: int = 0, zipped: bool = False, count: int = 20, side: int = 96, **changes) -> dict[str, np.ndarray]:
    folder.mkdir(exist_ok=True)
    arrays = norb_arrays(count, side, part) | changes
    for kind, array in arrays.items():
        content = norb_bytes(array)
        path = folder / f"{PARTS[part]}-{kind}.mat"
        if zipped:
            path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content))
        else:
            path.write_bytes(content)
    return arrays


def norb_factors(arrays: dict[str, np.ndarray]) -> np.ndarray:
    info = arrays["info"]
    return np.stack((arrays["cat"], info[:, 1], info[:, 2] // 2, info[:, 3]), axis=1)


@pytest.mark.parametrize("memory", [0, 2**28])
@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("parts", [(0,), (1,), (0, 1)])
def test_smallnorb(tmp_path, monkeypatch, memory, zipped, parts):
    monkeypatch.setattr(storage, "MEMORY", memory)
    written = [write_norb(tmp_path / "norb", part, zipped, 15 + part) for part in parts]
    arguments = {"holdout": 0.0, "cache_dir": str(tmp_path / "cache")}
    source = SmallNORB(str(tmp_path / "norb"), image_size=96, **arguments)
    assert source.factor_names == ("category", "elevation", "azimuth", "lighting")
    assert all(is_mapped(left) == (not zipped or memory == 0) for left in source.left)
    pixels, factors = everything(source)
    left = np.concatenate([arrays["dat"][:, 0] for arrays in written])
    assert left.max() > 127  # these are not signed
    assert_array_equal(pixels[:, 0], left)
    assert_array_equal(factors, np.concatenate([norb_factors(arrays) for arrays in written]))
    small = SmallNORB(str(tmp_path / "norb"), **arguments)
    assert small.image_shape == (1, 64, 64)
    resized = np.stack([np.asarray(Image.fromarray(image).resize((64, 64), Image.Resampling.BILINEAR)) for image in left])
    assert np.abs(everything(small)[0][:, 0].astype(int) - resized).max() <= 1


def test_smallnorb_unzipped_beside_zipped(tmp_path):
    """The unzipped one, which can be mapped; splits and colour on the way."""
    write_norb(tmp_path, zipped=True)
    write_norb(tmp_path, zipped=False)
    training, evaluation = (SmallNORB(str(tmp_path), image_size=96, channels=3, holdout=0.3, split=split) for split in (0, 1))
    assert is_mapped(training.left[0])
    assert (training.size, evaluation.size) == (14, 6)
    seen = np.concatenate([everything(source)[0] for source in (training, evaluation)])
    assert_array_equal(seen[:, 0], seen[:, 2])
    wanted = norb_arrays(20, 96, 0)["dat"][:, 0]
    assert sorted(image.tobytes() for image in seen[:, 0]) == sorted(image.tobytes() for image in wanted)


def changed(column: int, value: int) -> dict[str, np.ndarray]:
    info = norb_arrays(20, 4, 0)["info"]
    info[3, column] = value
    return {"info": info}


NORB_ERRORS = [
    ({"dat": noise(20, 2, 4, 3)}, r"expected the images in .*-dat\.mat to be uint8 \[N, 2, H, H\], found uint8 \[20, 2, 4, 3\]$"),
    ({"dat": noise(20, 1, 4, 4)}, r"expected the images in .*-dat\.mat to be uint8 \[N, 2, H, H\], found uint8 \[20, 1, 4, 4\]$"),
    ({"dat": np.zeros((20, 2, 4, 4), "<f4")}, r"expected the images in .*-dat\.mat to be uint8 .*, found float32 "),
    ({"cat": np.zeros(19, "<i4")}, r"expected the categories in .*-cat\.mat to be int32 \[20\], found int32 \[19\]$"),
    ({"cat": np.zeros(20, "<f8")}, r"expected the categories in .*-cat\.mat to be int32 \[20\], found float64 \[20\]$"),
    ({"info": np.zeros((20, 3), "<i4")}, r"expected the labels in .*-info\.mat to be int32 \[20, 4\], found int32 \[20, 3\]$"),
    ({"cat": np.full(20, 5, "<i4")}, r"expected category 0 to 4 in .*-cat\.mat, found 5$"),
    (changed(1, 9), r"expected elevation 0 to 8 in .*-info\.mat, found 9$"),
    (changed(1, -1), r"expected elevation 0 to 8 in .*-info\.mat, found -1$"),
    (changed(2, 36), r"expected azimuth 0 to 34 in steps of 2 in .*-info\.mat, found 36$"),
    (changed(2, 7), r"expected azimuth 0 to 34 in steps of 2 in .*-info\.mat, found 7$"),
    (changed(3, 6), r"expected lighting 0 to 5 in .*-info\.mat, found 6$"),
]


@pytest.mark.parametrize(("changes", "message"), NORB_ERRORS)
def test_unsuitable_smallnorb(tmp_path, changes, message):
    write_norb(tmp_path, side=4, **changes)
    with refused(rf"data\.path: {message}"):
        SmallNORB(str(tmp_path))


HEADER = struct.pack("<6i", 0x1E3D4C55, 4, 20, 2, 4, 4)
DAMAGED_NORB = [
    (b"", "its header is cut short"),
    (HEADER[:14], "its header is cut short"),
    (struct.pack("<5i", 0x1E3D4C52, 3, 1, 1, 1), "its magic number is 0x1e3d4c52"),
    (struct.pack(">5i", 0x1E3D4C55, 3, 1, 1, 1), "its magic number is 0x554c3d1e"),
    (struct.pack("<5i", 0x1E3D4C55, 0, 1, 1, 1), "its header says 0 axes"),
    (struct.pack("<5i", 0x1E3D4C55, 99, 1, 1, 1), "its header says 99 axes"),
    (struct.pack("<5i", 0x1E3D4C55, 3, 1, -1, 1), r"its header says shape \[1, -1, 1\]"),
    (HEADER + bytes(639), r"it has 639 bytes, not the 640 of its shape \[20, 2, 4, 4\]|it holds fewer bytes than its header says"),
    (HEADER + bytes(641), r"it has 641 bytes, not the 640 of its shape \[20, 2, 4, 4\]|it holds more bytes than its header says"),
]


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("memory", [0, 2**28])
@pytest.mark.parametrize(("content", "reason"), DAMAGED_NORB)
def test_damaged_smallnorb(tmp_path, monkeypatch, zipped, memory, content, reason):
    monkeypatch.setattr(storage, "MEMORY", memory)
    write_norb(tmp_path / "norb", side=4, zipped=zipped)
    path = tmp_path / "norb" / f"{PARTS[0]}-dat.mat{'.gz' if zipped else ''}"
    path.write_bytes(gzip.compress(content) if zipped else content)
    with refused(rf"data\.path: {re.escape(str(path))} is not a readable SmallNORB file \((?:{reason})\)$"):
        SmallNORB(str(tmp_path / "norb"), cache_dir=str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").rglob("*npy"))


@pytest.mark.parametrize("memory", [0, 2**28])
def test_a_damaged_gzip_of_smallnorb(tmp_path, monkeypatch, memory):
    monkeypatch.setattr(storage, "MEMORY", memory)
    write_norb(tmp_path / "norb", zipped=True)
    path = tmp_path / "norb" / f"{PARTS[0]}-dat.mat.gz"
    content = path.read_bytes()
    for damaged in (b"not gzip", content[:-9], content[:-8] + bytes(4) + content[-4:]):  # the last one: another checksum
        path.write_bytes(damaged)
        with refused(rf"data\.path: {path} is not a readable SmallNORB file \("):
            SmallNORB(str(tmp_path / "norb"), cache_dir=str(tmp_path / "cache"))
        assert not list((tmp_path / "cache").rglob("*npy"))


def test_missing_files_of_smallnorb(tmp_path):
    with refused(rf"data\.path: no folder {tmp_path / 'none'}$"):
        SmallNORB(str(tmp_path / "none"))
    with refused(rf"data\.path: no file of data\.kind smallnorb in {tmp_path}, expected {PARTS[0]}-dat\.mat or {PARTS[1]}-dat\.mat$"):
        SmallNORB(str(tmp_path))
    write_norb(tmp_path, side=4)
    write_norb(tmp_path, 1, side=6)
    with refused(rf"data\.path: expected images of one size in {tmp_path}, found sides of 4 and 6 pixels$"):
        SmallNORB(str(tmp_path))
    (tmp_path / f"{PARTS[1]}-cat.mat").unlink()
    with refused(rf"data\.path: no file {tmp_path}/{PARTS[1]}-cat\.mat, gzipped or not, beside the others of its part$"):
        SmallNORB(str(tmp_path))


# CelebA

NAMES = tuple(f"Attribute_{number}" for number in range(40))


def write_celeba(folder: Path, nested: bool = False, attributes: str | None = None, partition: str | None = None) -> np.ndarray:
    """Nine images, three of each part, not in blocks. Returns their attributes."""
    values = np.random.default_rng(0).integers(0, 2, (9, 40))
    rows = [f"{number + 1:06d}.jpg  " + " ".join(f"{2 * value - 1:2d}" for value in row) for number, row in enumerate(values)]
    texts, images = (
        ({"Anno": "", "Eval": ""}, "img_align_celeba") if not nested else ({"Anno": "Anno", "Eval": "Eval"}, "Img/img_align_celeba")
    )
    (folder / images).mkdir(parents=True)
    for below in texts.values():
        (folder / below).mkdir(exist_ok=True)
    text = "\n".join(("9", " ".join(NAMES) + " ", *rows, ""))
    (folder / texts["Anno"] / "list_attr_celeba.txt").write_text(text if attributes is None else attributes)
    text = "".join(f"{number + 1:06d}.jpg {number % 3}\r\n" for number in range(9))
    (folder / texts["Eval"] / "list_eval_partition.txt").write_text(text if partition is None else partition)
    return values


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("split", "evaluation", "part"), [(0, "valid", 0), (0, "test", 0), (1, "valid", 1), (1, "test", 2)])
def test_celeba(tmp_path, nested, split, evaluation, part):
    values = write_celeba(tmp_path, nested)
    images, names, attributes, attribute_names = celeba_listing(tmp_path, split, evaluation)
    assert images == tmp_path / ("Img/img_align_celeba" if nested else "img_align_celeba")
    assert names == [f"{number + 1:06d}.jpg" for number in (part, part + 3, part + 6)]
    assert attribute_names == NAMES
    assert_array_equal(attributes, values[[part, part + 3, part + 6]].astype(np.float32), strict=True)


HEAD = f"1\n{' '.join(NAMES)}\n"
ROW = "000001.jpg " + " ".join(["1"] * 40)
ATTRIBUTE_ERRORS = [
    ("", r"expected the number of images in line 1 of .*list_attr_celeba\.txt, found ''$"),
    ("5_o_Clock_Shadow Bald\n", r"expected the number of images in line 1 of .*, found '5_o_Clock_Shadow Bald'$"),
    ("2" + HEAD[1:] + ROW, r"expected 2 images after the two first lines of .*, as line 1 says, found 1$"),
    ("0", r"expected 0 images after the two first lines of .*, as line 1 says, found -1$"),
    ("1\nBald Young\n" + ROW, r"expected 40 names in line 2 of .*list_attr_celeba\.txt, found 2$"),
    (HEAD + ROW[:-2], r"expected a name and 40 values in line 3 of .*, found 39 values$"),
    (HEAD + ROW + " 1", r"expected a name and 40 values in line 3 of .*, found 41 values$"),
    (HEAD + ROW[:-1] + "0", r"expected -1 or 1 in line 3 of .*list_attr_celeba\.txt, found '0'$"),
    (f"2{HEAD[1:]}{ROW}\n{ROW}", r"a name is more than once in .*list_attr_celeba\.txt$"),
    (HEAD + ROW, r"8 names of .*list_eval_partition\.txt are not in .*list_attr_celeba\.txt, such as 000002\.jpg$"),
]
PARTITION_ERRORS = [
    ("", r"9 names of .*list_attr_celeba\.txt are not in .*list_eval_partition\.txt, such as 000001\.jpg$"),
    ("000001.jpg 3", r"expected a name and 0, 1 or 2 in line 1 of .*list_eval_partition\.txt, found '000001\.jpg 3'$"),
    ("000001.jpg 1\n000002.jpg", r"expected a name and 0, 1 or 2 in line 2 of .*, found '000002\.jpg'$"),
    ("000001.jpg 1\n000001.jpg 1", r"000001\.jpg is more than once in .*list_eval_partition\.txt$"),
    (
        "".join(f"{number + 1:06d}.jpg 1\n" for number in range(9)),
        r"no image has partition 0 \(train\) in .*list_eval_partition\.txt$",
    ),
]


@pytest.mark.parametrize(
    ("which", "text", "message"),
    [*(("attributes", *case) for case in ATTRIBUTE_ERRORS), *(("partition", *case) for case in PARTITION_ERRORS)],
)
def test_unsuitable_celeba(tmp_path, which, text, message):
    write_celeba(tmp_path, **{which: text})
    with refused(rf"data\.path: {message}"):
        celeba_listing(tmp_path, 0, "valid")


def test_missing_files_of_celeba(tmp_path):
    with refused(rf"data\.path: no folder {tmp_path / 'none'}$"):
        celeba_listing(tmp_path / "none", 0, "valid")
    write_celeba(tmp_path)
    binary = tmp_path / "list_eval_partition.txt"
    binary.write_bytes(b"\xff\xd8\xff\xe0")
    with refused(rf"data\.path: {binary} is not a readable text file \("):
        celeba_listing(tmp_path, 0, "valid")
    for name, below in (("list_eval_partition.txt", "Eval"), ("list_attr_celeba.txt", "Anno"), ("img_align_celeba", "Img")):
        path = tmp_path / name
        path.rmdir() if path.is_dir() else path.unlink()
        with refused(rf"data\.path: neither {name} nor {below}/{name} in {tmp_path}$"):
            celeba_listing(tmp_path, 0, "valid")


def test_a_file_in_place_of_the_images_of_celeba(tmp_path):
    write_celeba(tmp_path)
    (tmp_path / "img_align_celeba").rmdir()
    (tmp_path / "img_align_celeba").touch()
    with refused(rf"data\.path: expected {tmp_path / 'img_align_celeba'} to be a folder of images$"):
        celeba_listing(tmp_path, 0, "valid")
