"""Images: procedural disks, arrays from files, and the feed that batches them."""

import logging
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import relative_error

from sami_fast.config import KINDS, OWN, DataConfig, DisksConfig
from sami_fast.data import SOURCES, ArrayImages, Dataset, Disks, Feed, open_dataset
from sami_fast.data.dataset import image_names
from sami_fast.errors import UserError
from sami_fast.ops import Stream, random_uniform

RANGES = {"x": (0.2, 0.8), "y": (0.4, 0.6), "background": (0.0, 0.5), "radius": (0.1, 0.3), "brightness": (0.7, 1.0)}
CONSTANT = RANGES | {"radius": (0.25, 0.25), "brightness": (1.0, 1.0)}
CPU = torch.device("cpu")


def disks(ranges=RANGES, size: int = 16, channels: int = 1, seed: int = 0, split: int = 0) -> Disks:
    return Disks(size, channels, ranges, 1.5, seed, split)


# Disks


@pytest.mark.parametrize(("size", "channels"), [(4, 1), (16, 3), (9, 2)])
def test_every_pixel_of_a_disk(size, channels):
    source, index = disks(size=size, channels=channels), torch.tensor([0, 3, 10**6])
    images, factors = source.images(index), source.factors(index)
    assert images.shape == (3, channels, size, size)
    assert source.image_shape == (channels, size, size)
    assert images.dtype == factors.dtype == torch.float32
    assert images.is_contiguous()
    for image, (x, y, background, radius, brightness) in zip(images, factors.tolist(), strict=True):
        for row in range(size):
            for column in range(size):
                distance = math.hypot(column + 0.5 - x * size, row + 0.5 - y * size)  # pixels
                mask = 1 / (1 + math.exp(-1.5 * (radius * size - distance)))
                pixel = 2 * (brightness * mask + background * (1 - mask)) - 1
                for channel in range(channels):
                    assert image[channel, row, column].item() == pytest.approx(pixel, abs=1e-5)


def test_factors_fill_their_ranges():
    source, index = disks(), torch.arange(4000)
    factors = source.factors(index)
    assert source.factor_names == tuple(RANGES)
    u = random_uniform(0, 0, Stream.FACTORS, index, 5)
    for column, (low, high) in enumerate(RANGES.values()):
        values = factors[:, column]
        assert values.min() >= low
        assert values.max() <= high
        assert relative_error(values, low + (high - low) * u[:, column]) < 1e-6
        assert values.min() < low + 0.01 * (high - low)
        assert values.max() > high - 0.01 * (high - low)
    assert (torch.corrcoef(factors.T) - torch.eye(5)).abs().max() < 5 / 4000**0.5


def test_constant_factors_are_not_reported():
    source, index = disks(CONSTANT), torch.arange(20)
    assert source.factor_names == ("x", "y", "background")
    assert source.factors(index).shape == (20, 3)
    assert torch.equal(source.factors(index), disks().factors(index)[:, :3])  # the others keep their random numbers
    nothing = disks(dict.fromkeys(RANGES, (0.5, 0.5)))
    assert nothing.factor_names == ()
    assert nothing.factors(index).shape == (20, 0)
    assert torch.equal(nothing.images(index[:1]), nothing.images(index[5:6]))


def test_an_image_is_a_function_of_seed_split_and_index():
    index = torch.arange(30)
    images = disks().images(index)
    assert torch.equal(images, disks().images(index))
    assert relative_error(disks().images(torch.tensor([7, 2, 7])), images[[7, 2, 7]]) < 1e-6
    for other in (disks(seed=1), disks(split=1), disks(seed=1, split=1)):
        differs = (other.factors(index) != disks().factors(index)).all(1)
        assert differs.all()
    assert images.min() >= -1
    assert images.max() <= 1
    assert disks().images(torch.zeros(0, dtype=torch.int64)).shape == (0, 1, 16, 16)


# Images from files


def save(folder, array: np.ndarray, name: str = "images.npy") -> str:
    path = folder / name
    if name.endswith(".npz"):
        np.savez(path, array)
    else:
        np.save(path, array)
    return str(path)


def counting(count: int, side: int = 2) -> np.ndarray:
    """uint8 images whose first pixel is their number."""
    array = np.zeros((count, side, side), dtype=np.uint8)
    array[:, 0, 0] = np.arange(count)
    return array


@pytest.mark.parametrize(
    ("shape", "image_shape"),
    [
        ((7, 5, 5), (1, 5, 5)),
        ((7, 5, 5, 1), (1, 5, 5)),
        ((7, 5, 5, 3), (3, 5, 5)),
        ((7, 3, 5, 5), (3, 5, 5)),
        ((7, 1, 5, 5), (1, 5, 5)),
        ((7, 4, 8, 8), (4, 8, 8)),
        ((7, 4, 4, 4), (4, 4, 4)),
        ((1, 63, 63), (1, 63, 63)),
    ],
)
def test_layouts(tmp_path, shape, image_shape):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    source = ArrayImages(save(tmp_path, array), holdout=0.0)
    assert source.image_shape == image_shape
    assert source.size == shape[0]
    index = torch.tensor([0, shape[0] - 1])
    images = source.images(index)
    assert images.shape == (2, *image_shape)
    assert images.dtype == torch.float32
    channel_axis = None if len(shape) == 3 else 3 if shape[3] <= 4 else 1
    for image, place in zip(images, index.tolist(), strict=True):
        pixels = array[place].astype(np.float64) / 255 * 2 - 1
        expected = pixels[None] if channel_axis is None else pixels.transpose(2, 0, 1) if channel_axis == 3 else pixels
        assert np.abs(image.numpy() - expected).max() < 1e-6
    assert source.factor_names == ()
    assert source.factors(index).shape == (2, 0)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", ">f8"])
def test_floats_stay_as_they_are(tmp_path, dtype):
    array = np.random.default_rng(0).uniform(-1, 1, (5, 4, 4)).astype(dtype)
    images = ArrayImages(save(tmp_path, array), holdout=0.0).images(torch.arange(5))
    assert images.dtype == torch.float32
    assert np.array_equal(images[:, 0].numpy(), array.astype(np.float32))


def test_ends_of_the_scale(tmp_path):
    array = np.array([0, 255], dtype=np.uint8).reshape(2, 1, 1)
    assert ArrayImages(save(tmp_path, array), holdout=0.0).images(torch.arange(2)).flatten().tolist() == [-1.0, 1.0]


def test_an_npy_is_memory_mapped(tmp_path):
    source = ArrayImages(save(tmp_path, counting(10)))
    base = source.array
    while not isinstance(base, np.memmap):
        assert base is not None
        base = base.base
    assert not base.flags.writeable
    before = source.images(torch.tensor([3]))
    before.add_(1)  # a batch is a copy
    assert torch.equal(source.images(torch.tensor([3])) + 1, before)


def test_npz_entries(tmp_path):
    assert ArrayImages(save(tmp_path, counting(4), "one.npz"), holdout=0.0).size == 4
    np.savez_compressed(tmp_path / "two.npz", labels=np.arange(3), images=counting(3), others=counting(5))
    assert ArrayImages(str(tmp_path / "two.npz"), holdout=0.0).size == 3
    assert ArrayImages(str(tmp_path / "two.npz"), "others", holdout=0.0).size == 5


@pytest.mark.parametrize("count", [1, 2, 3, 10, 63, 200])
@pytest.mark.parametrize("holdout", [0.001, 0.1, 0.25, 0.4, 0.5, 0.75, 0.9])
def test_holdout(tmp_path, count, holdout):
    path = save(tmp_path, counting(count))
    seen = []
    for split in (0, 1):
        source = ArrayImages(path, holdout=holdout, split=split)
        images = source.images(torch.arange(source.size))
        seen.append(((images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist())
    training, evaluation = seen
    if count == 1:  # nothing to divide: both see the one image
        assert training == evaluation == [0]
        return
    assert training
    assert evaluation
    assert sorted(training + evaluation) == list(range(count))
    assert len(evaluation) == pytest.approx(max(1, holdout * count), abs=1)
    gaps = np.diff(evaluation)  # evenly spread
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_no_holdout_gives_everything_to_both(tmp_path):
    path = save(tmp_path, counting(9))
    assert [ArrayImages(path, holdout=0.0, split=split).size for split in (0, 1)] == [9, 9]


FILE_ERRORS = [
    (np.zeros(5, np.uint8), r"data\.path: expected images \(N, H, W\), \(N, H, W, C\) or \(N, C, H, W\) in .*, found shape \(5,\)"),
    (np.uint8(3), r"found shape \(\)"),
    (np.zeros((2, 8, 8, 8), np.uint8), r"data\.path: expected 1 to 4 channels in .*, found shape \(2, 8, 8, 8\)"),
    (np.zeros((0, 8, 8), np.uint8), r"data\.path: no images in "),
    (np.zeros((3, 8, 8, 0), np.float32), r"data\.path: no images in "),
    (np.zeros((3, 0, 0), np.float32), r"data\.path: no images in "),
    (np.zeros((2, 8, 9), np.uint8), r"data\.path: expected square images in .*, found 8 x 9 pixels"),
    (np.zeros((2, 8, 8), np.int64), r"data\.path: expected uint8 or floats in .*, found int64"),
    (np.zeros((2, 8, 8), bool), r"data\.path: expected uint8 or floats in .*, found bool"),
    (np.full((2, 8, 8), 255.0), r"data\.path: expected floats in \[-1, 1\] in .*, found values from 255 to 255"),
    (np.full((2, 8, 8), np.nan, np.float32), r"data\.path: expected floats in \[-1, 1\] in .*, found values from nan to nan"),
    (np.concatenate((np.zeros((2000, 2, 2)), np.full((1, 2, 2), -3.0))), r"found values from -3 to 0"),
]


@pytest.mark.parametrize(
    ("array", "message"), FILE_ERRORS, ids=lambda value: value if isinstance(value, str) else f"{value.dtype}{value.shape}"
)
def test_unsuitable_arrays(tmp_path, array, message):
    with pytest.raises(UserError, match=message):
        ArrayImages(save(tmp_path, array))


def test_unreadable_files(tmp_path):
    good = tmp_path / "good.npy"
    np.save(good, counting(50, side=16))
    cut, text, objects = tmp_path / "cut.npy", tmp_path / "text.npz", tmp_path / "objects.npy"
    cut.write_bytes(good.read_bytes()[:500])
    text.write_text("not an archive")
    np.save(objects, np.array([{}, []], dtype=object), allow_pickle=True)
    for path in (cut, text, objects):
        with pytest.raises(UserError, match=re.escape(f"data.path: {path} is not a readable .npy or .npz of plain numbers")):
            ArrayImages(str(path))
    for path, found in ((tmp_path / "missing.npy", "no file"), (tmp_path, "expected a file, found the folder")):
        with pytest.raises(UserError, match=re.escape(f"data.path: {found} {path}")):
            ArrayImages(str(path))


def test_wrong_entry_of_an_npz(tmp_path):
    path = tmp_path / "several.npz"
    np.savez(path, a=counting(2), b=counting(2))
    for key, name in (("c", "c"), ("", "images")):
        with pytest.raises(UserError, match=re.escape(f"data.array_key: no entry {name!r} in {path}, which holds a, b")):
            ArrayImages(str(path), key)
    np.savez(tmp_path / "empty.npz")
    with pytest.raises(UserError, match="which holds nothing"):
        ArrayImages(str(tmp_path / "empty.npz"))


def test_the_same_content_is_the_same_data(tmp_path):
    first = ArrayImages(save(tmp_path, counting(200)))
    copy = tmp_path / "copy.npy"
    copy.write_bytes(Path(first.path).read_bytes())
    os.utime(copy, (5, 5))
    assert ArrayImages(str(copy)).fingerprint == first.fingerprint
    other = counting(200)
    other[150] += 1
    found = {first.fingerprint, ArrayImages(save(tmp_path, other)).fingerprint, ArrayImages(save(tmp_path, counting(10))).fingerprint}
    assert len(found | {ArrayImages(str(copy), holdout=0.5).fingerprint}) == 4


def test_the_range_of_floats(tmp_path, caplog):
    """Nobody guesses: what all lies in [0, 1] is said to be odd, once, and a setting says what it is."""
    unit = np.linspace(0, 1, 4 * 8 * 8, dtype=np.float32).reshape(4, 8, 8)
    path = save(tmp_path, unit)
    signed = torch.from_numpy(unit)[:, None]
    with caplog.at_level(logging.WARNING, "sami_fast.data"):
        sources = {kind: ArrayImages(path, holdout=0.0, value_range=kind) for kind in ("auto", "auto", "signed", "unit")}
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: all values lie in [0, 1], and are taken for values in [-1, 1], in which images are grey and bright; data.range=unit "
        "(--range unit) says that 0 is black, signed that they are as they should be"
    ]
    index = torch.arange(4)
    assert torch.equal(sources["auto"].images(index), signed)
    assert torch.equal(sources["signed"].images(index), signed)
    assert torch.equal(sources["unit"].images(index), signed * 2 - 1)
    assert sources["unit"].facts()["values"] == "float32, 0 to 1, taken for values in [0, 1]"
    assert len({source.fingerprint for source in sources.values()}) == 2
    with pytest.raises(UserError, match=r"expected floats in \[0, 1\] in .*, found values from -1 to 1"):
        ArrayImages(save(tmp_path, unit * 2 - 1), value_range="unit")
    caplog.clear()
    ArrayImages(path)  # which now holds values below 0
    ArrayImages(save(tmp_path, (unit * 255).astype(np.uint8)), value_range="unit")  # bytes have one meaning
    assert not caplog.records
    with pytest.raises(UserError, match=r"^data\.range: has no effect with data\.kind disks; it is for array, class, given$"):
        DataConfig(range="unit")


def test_open_dataset(tmp_path):
    config = DataConfig(image_size=8, channels=2, disks=DisksConfig(x=[0.5, 0.5]))
    training, evaluation = open_dataset(config, seed=3), open_dataset(config, seed=3, split=1)
    assert isinstance(training, Disks)
    assert training.image_shape == (2, 8, 8)
    assert training.factor_names == ("y", "background")
    assert training.size is None
    assert not torch.equal(training.images(torch.arange(2)), evaluation.images(torch.arange(2)))
    path = save(tmp_path, counting(20))
    training, evaluation = (open_dataset(DataConfig(kind="array", path=path, holdout=0.25), 0, split) for split in (0, 1))
    assert (training.size, evaluation.size) == (15, 5)
    assert (*SOURCES, *OWN) == KINDS


# The feed


class Numbers(Dataset):
    """A dataset whose image n is the number n."""

    image_shape = (1, 1, 1)

    def __init__(self, size: int | None) -> None:
        self.size = size

    def images(self, index: torch.Tensor) -> torch.Tensor:
        return index.float().view(-1, 1, 1, 1)


def shown(size: int | None, step: int, batch: int, micro_batches: int = 1, world_size: int = 1, seed: int = 0) -> dict[int, int]:
    """Place in the step's whole batch -> image, over all ranks and micro-batches."""
    found: dict[int, int] = {}
    for rank in range(world_size):
        feed = Feed(Numbers(size), batch, micro_batches, rank, world_size, seed, CPU)
        for micro in range(micro_batches):
            x_0, place = feed.micro_batch(step, micro)
            assert x_0.shape == (batch // micro_batches // world_size, 1, 1, 1)
            assert place.dtype == torch.int64
            assert not found.keys() & set(place.tolist())
            found |= dict(zip(place.tolist(), x_0.flatten().int().tolist(), strict=True))
    return found


@pytest.mark.parametrize("size", [None, 7, 100, 24])
@pytest.mark.parametrize(("micro_batches", "world_size"), [(2, 1), (1, 3), (2, 3), (4, 6), (24, 1)])
def test_any_split_shows_the_same_batch(size, micro_batches, world_size):
    for step in (0, 1, 5):
        whole = shown(size, step, 24)
        assert sorted(whole) == list(range(24))
        assert shown(size, step, 24, micro_batches, world_size) == whole


def test_what_images_are_called():
    class Turned(Dataset):
        size = 4

        def in_order(self):
            return torch.tensor([2, 0, 3, 1])

    class Videos(Turned):
        def sources(self, index):
            return {"files": ["a.mp4"] * len(index), "frames": index.tolist()}

    index = torch.tensor([3, 2])
    assert image_names(Turned(), index) == ["#2", "#0"]  # by which a person counts them, as --image does
    assert image_names(Videos(), index) == ["a.mp4 #3", "a.mp4 #2"]
    Turned.size = None
    assert image_names(Turned(), index) == ["#3", "#2"]


def test_an_endless_dataset_counts_on():
    assert [shown(None, step, 5)[place] for step in (0, 1, 7) for place in range(5)] == [*range(10), *range(35, 40)]


@pytest.mark.parametrize(("size", "batch"), [(10, 5), (7, 4), (63, 16), (5, 12), (1, 3), (8, 8)])
def test_a_finite_dataset_shows_every_image_once_per_epoch(size, batch):
    """Also where an epoch ends inside a batch."""
    epochs = 3
    steps = -(-size * epochs // batch)
    feed = Feed(Numbers(size), batch, 1, 0, 1, 0, CPU)
    stream = [int(v) for step in range(steps) for v in feed.micro_batch(step, 0)[0].flatten()]
    orders = [stream[size * epoch : size * (epoch + 1)] for epoch in range(epochs)]
    assert all(sorted(order) == list(range(size)) for order in orders)
    if size > 4:
        assert len({tuple(order) for order in orders}) == epochs


def test_a_batch_is_a_function_of_the_step():
    feed = Feed(Numbers(10), 6, 1, 0, 1, 0, CPU)
    forwards = [feed.micro_batch(step, 0)[0].flatten().tolist() for step in range(6)]
    backwards = [feed.micro_batch(step, 0)[0].flatten().tolist() for step in reversed(range(6))]
    assert forwards == backwards[::-1]
    assert shown(100, 0, 50) != shown(100, 0, 50, seed=1)


def test_the_feed_shows_what_the_dataset_holds(tmp_path):
    source = ArrayImages(save(tmp_path, counting(20)), holdout=0.0)
    x_0, place = Feed(source, 20, 1, 0, 1, 0, CPU).micro_batch(0, 0)
    assert sorted(((x_0[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()) == list(range(20))
    assert place.tolist() == list(range(20))
