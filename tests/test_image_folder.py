"""Folders of encoded images, and CelebA: what is decoded, by whom, what happens to broken files, and what is kept on the disk."""

import errno
import hashlib
import io
import json
import logging
import multiprocessing
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageFile, ImageOps, features

from sami_fast import files
from sami_fast.config import DataConfig
from sami_fast.data import CelebA, Feed, ImageFolder, cache, decode, image_folder, index, open_dataset
from sami_fast.data.cache import PixelCache, cache_dir
from sami_fast.data.dali import DaliDecoder, available
from sami_fast.data.decode import BadFile, decode_image, image_facts, image_suffixes
from sami_fast.data.identity import content_of
from sami_fast.data.image_folder import square
from sami_fast.data.pixels import resize, with_channels
from sami_fast.errors import AbsentError, UserError

dali = pytest.mark.skipif(not available(), reason="DALI is not installed")
both_decoders = pytest.mark.parametrize("decoder", ["torch", pytest.param("dali", marks=dali)])
H, W = 40, 56
CENTRE = (slice(0, 40), slice(8, 48))  # the central square


# Files


def photo(height: int = H, width: int = W, channels: int = 3, seed: int = 0) -> np.ndarray:
    """[H, W, C] uint8: smooth, a little noisy, the same in no two corners or channels."""
    y, x = np.mgrid[:height, :width]
    waves = [110 + 70 * np.sin(x / (5 + c) + seed) * np.cos(y / (4 + c)) + 30 * x / width + 20 * y / height for c in range(channels)]
    return (np.stack(waves, -1) + np.random.default_rng(seed).normal(0, 4, (height, width, channels))).clip(0, 255).astype(np.uint8)


def encoded(pixels: np.ndarray | Image.Image, kind: str, **options: object) -> bytes:
    target = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(target, kind, **options)
    return target.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(values: np.ndarray, depth: int, colour: int, before: bytes = b"", after: bytes = b"", interlaced: bool = False) -> bytes:
    """A PNG of a kind that Pillow does not write. values: [H, W, C] uint8 or big-endian uint16."""
    height, width = values.shape[:2]
    seven = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    passes = seven if interlaced else [(0, 0, 1, 1)]
    rows = b"".join(b"\0" + row.tobytes() for y, x, dy, dx in passes for row in values[y::dy, x::dx])
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, int(interlaced))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + chunk(b"IDAT", zlib.compress(rows)) + after + chunk(b"IEND", b"")


def exif(orientation: object) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def over_black(pixels: np.ndarray) -> np.ndarray:
    """[H, W, C + 1] with alpha -> [H, W, 3]."""
    seen = pixels[..., :-1].astype(np.float64) * pixels[..., -1:] / 255
    return np.repeat(seen, 3, -1) if seen.shape[-1] == 1 else seen


def formats() -> dict[str, tuple[str, bytes, np.ndarray | None, float, bool]]:
    """Name -> (suffix, file, [H, W, 3] that it shows or None for what Pillow says, levels it may be off, whether DALI decodes it)."""
    colour, grey = photo(), photo(channels=1)[..., 0]
    other, image = photo(seed=5), Image.fromarray(colour)
    three = np.repeat(grey[..., None], 3, -1)
    rgba, la = photo(channels=4), photo(channels=2)
    clear = rgba.copy()
    clear[..., 3] = np.where(np.arange(W) < 20, 0, clear[..., 3])
    deep = np.random.default_rng(1).integers(0, 65536, (H, W, 3)).astype(np.uint16)
    palette, bits = image.quantize(32), Image.fromarray(grey).convert("1")
    moving = {"save_all": True, "append_images": [Image.fromarray(other)], "duration": 100}
    shown = {"palette": np.array(palette.convert("RGB")), "bits": np.array(bits.convert("RGB"))}
    found = {
        "jpeg": (".jpg", encoded(colour, "JPEG", quality=90), None, 0, True),
        "jpeg 4:4:4": (".JPG", encoded(colour, "JPEG", subsampling=0), None, 0, True),
        "jpeg 4:2:2": (".jpeg", encoded(colour, "JPEG", subsampling=1), None, 0, True),
        "jpeg progressive": (".jpe", encoded(colour, "JPEG", progressive=True), None, 0, True),
        "jpeg restarts": (".jfif", encoded(colour, "JPEG", restart_marker_blocks=3), None, 0, True),
        "jpeg without YCbCr": (".jpg", encoded(colour, "JPEG", keep_rgb=True), None, 0, True),
        "jpeg grey": (".jpg", encoded(grey, "JPEG"), None, 0, True),
        "jpeg cmyk": (".jpg", encoded(image.convert("CMYK"), "JPEG"), None, 0, False),
        "jpeg and more behind it": (".jpg", encoded(colour, "JPEG") + bytes(100), None, 0, True),
        "png 1": (".png", encoded(bits, "PNG"), shown["bits"], 0, True),
        "png L": (".PNG", encoded(grey, "PNG"), three, 0, True),
        "png RGB": (".png", encoded(colour, "PNG"), colour, 0, True),
        "png P": (".png", encoded(palette, "PNG"), shown["palette"], 0, False),
        "png LA": (".png", encoded(Image.fromarray(la, "LA"), "PNG"), over_black(la), 1, False),
        "png RGBA": (".png", encoded(clear, "PNG"), over_black(clear), 1, False),
        "png 16-bit grey": (".png", encoded(deep[..., 0].copy(), "PNG"), np.rint(np.repeat(deep[..., :1], 3, -1) / 257), 0, False),
        "png 16-bit colour": (".png", png(deep.astype(">u2"), 16, 2), np.rint(deep / 257), 1, False),
        "png interlaced": (".png", png(colour, 8, 2, interlaced=True), colour, 0, True),
        "png with gamma": (".png", png(colour, 8, 2, before=chunk(b"gAMA", struct.pack(">I", 100000))), colour, 0, True),
        "png without its end": (".png", encoded(colour, "PNG")[:-12], colour, 0, True),
        "png animated": (".png", encoded(colour, "PNG", **moving), colour, 0, False),
        "bmp": (".bmp", encoded(colour, "BMP"), colour, 0, False),
        "bmp P": (".bmp", encoded(palette, "BMP"), shown["palette"], 0, False),
        "ppm": (".ppm", encoded(colour, "PPM"), colour, 0, False),
        "ppm up to 100": (".ppm", b"P6 %d %d 100\n" % (W, H) + (colour // 3).tobytes(), colour // 3 * 2.55, 0.5001, False),
        "pgm": (".pgm", encoded(grey, "PPM"), three, 0, False),
        "pbm": (".pbm", encoded(bits, "PPM"), shown["bits"], 0, False),
        "tiff": (".tif", encoded(colour, "TIFF"), colour, 0, False),
        "tiff packed": (".tiff", encoded(colour, "TIFF", compression="tiff_lzw"), colour, 0, False),
        "gif": (".gif", encoded(palette, "GIF"), shown["palette"], 0, False),
        "gif animated": (
            ".gif",
            encoded(palette, "GIF", save_all=True, append_images=[Image.fromarray(other)]),
            shown["palette"],
            0,
            False,
        ),
        "png named jpg": (".jpg", encoded(colour, "PNG"), colour, 0, True),
        "jpeg named png": (".png", encoded(colour, "JPEG"), None, 0, True),
    }
    if features.check("webp"):
        found |= {
            "webp": (".webp", encoded(colour, "WEBP"), None, 0, True),
            "webp lossless": (".webp", encoded(colour, "WEBP", lossless=True), colour, 0, True),
            "webp alpha": (".webp", encoded(clear, "WEBP", lossless=True, exact=True), over_black(clear), 1, False),
            "webp tagged": (".webp", encoded(colour, "WEBP", lossless=True, exif=exif(1)), colour, 0, False),
            "webp animated": (".webp", encoded(colour, "WEBP", lossless=True, **moving), colour, 0, False),
        }
    if features.check("jpg_2000"):
        found["jpeg 2000"] = (".jp2", encoded(colour, "JPEG2000"), colour, 0, False)
    if features.check("avif"):
        found["avif"] = (".avif", encoded(colour, "AVIF"), None, 0, False)
    return found


FORMATS = formats()
each_format = pytest.mark.parametrize("name", FORMATS)


def expected(name: str) -> np.ndarray:
    _, data, pixels, _, _ = FORMATS[name]
    return np.array(Image.open(io.BytesIO(data)).convert("RGB")) if pixels is None else pixels


def write(folder: Path, contents: dict[str, bytes]) -> Path:
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def numbered(count: int, size: int = 16) -> dict[str, bytes]:
    """PNGs whose every pixel is their number."""
    return {f"{n:03}.png": encoded(np.full((size, size, 3), n, np.uint8), "PNG") for n in range(count)}


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "images"
    made.mkdir()
    return made


def opened(folder: Path, **settings: object) -> ImageFolder:
    defaults = {
        "image_size": 16,
        "holdout": 0.0,
        "cache_dir": str(folder.parent / "cache"),
        "decoder": "torch",
        "max_bad": 0.0,
        "workers": 1,
    }
    return ImageFolder(str(folder), **defaults | settings)


def every(source: ImageFolder) -> torch.Tensor:
    """As training sees them."""
    return source.training_pixels(torch.arange(source.size))


def numbers(source: ImageFolder) -> list[int]:
    """Which of the `numbered` images are shown, in the order of their places."""
    return every(source)[:, 0, 0, 0].tolist()


def kept(folder: Path) -> list[Path]:
    """All that lies in the cache of the folder, but the lock."""
    return sorted(p for p in cache_dir(str(folder.parent / "cache"), folder).rglob("*") if p.is_file() and p.name != "lock")


def index_file(folder: Path) -> Path:
    return cache_dir(str(folder.parent / "cache"), folder) / "images.json"


def inspected(monkeypatch) -> list[str]:
    """The names of the files that are looked at from now on."""
    found, inspect = [], image_folder._facts

    def facts(path):
        found.append(path.name)
        return inspect(path)

    monkeypatch.setattr(image_folder, "_facts", facts)
    return found


# Formats


@pytest.fixture(scope="module")
def all_formats(tmp_path_factory):
    """By decoder: every format, [C, 40, 40] by its name. They are read together, in one batch."""
    folder, made = tmp_path_factory.mktemp("formats") / "images", {}
    write(folder, {f"{name}{FORMATS[name][0]}": FORMATS[name][1] for name in FORMATS})

    def read(decoder):
        if decoder not in made:
            source = opened(folder, decoder=decoder, image_size=H, cache_gib=0.0)
            found = dict(zip([name.rpartition(".")[0] for name in source.index.names], every(source), strict=True))
            made[decoder] = source, found
        return made[decoder]

    return read


@both_decoders
@each_format
def test_every_pixel_of_every_format(all_formats, name, decoder):
    """At its own size, so that only decoding is seen: lossless files against the pixels that were written."""
    found = all_formats(decoder)[1][name].permute(1, 2, 0).numpy()
    assert found.dtype == np.uint8
    assert np.abs(found - expected(name)[CENTRE].astype(np.float64)).max() <= FORMATS[name][3]


@each_format
def test_lossy_files_show_what_was_written(name):
    """What Pillow says of them is the reference above: not of another channel order, another frame or inverted."""
    suits = {"jpeg cmyk": 12.0, "jpeg grey": 6.0}
    source = photo(channels=1).repeat(3, -1) if name == "jpeg grey" else photo()
    if FORMATS[name][2] is None:
        assert np.abs(expected(name) - source.astype(np.float64)).mean() < suits.get(name, 8.0)


@dali
@each_format
def test_both_decoders_give_the_same_pixels(all_formats, name):
    """Bound 0: both hold libjpeg-turbo, libpng and libwebp, decode in full, and are resized by the same function."""
    assert torch.equal(all_formats("dali")[1][name], all_formats("torch")[1][name])


@dali
@pytest.mark.parametrize("size", [8, 17, 63])
def test_both_decoders_give_the_same_pixels_resized(tmp_path, size):
    folder = write(tmp_path / "images", {f"{n}{FORMATS[name][0]}": FORMATS[name][1] for n, name in enumerate(FORMATS)})
    for channels in (1, 3):
        by_dali, by_pillow = (
            every(opened(folder, decoder=d, image_size=size, channels=channels, cache_gib=0.0)) for d in ("dali", "torch")
        )
        assert by_dali.shape == (len(FORMATS), channels, size, size)
        assert torch.equal(by_dali, by_pillow)


@dali
def test_who_decodes_what(all_formats):
    source = all_formats("dali")[0]
    for place, file in enumerate(source.index.names):
        name = file.rpartition(".")[0]
        who, why = source.decoder_of(place)
        assert (name, who) == (name, "DALI" if FORMATS[name][4] else "Pillow")
        assert why.startswith(source.index.facts[place][2])
    assert {opened(source.index.folder, image_size=H).decoder_of(place)[0] for place in range(source.size)} == {"Pillow"}


@dali
def test_a_file_that_only_pillow_decodes_spoils_one_batch(tmp_path, monkeypatch):
    """One failure makes DALI decode the whole batch one by one, so it is not asked for such a file again."""
    contents = {f"{n}.png": encoded(photo(16, 16, seed=n), "PNG") for n in range(5)}
    folder = write(tmp_path / "images", contents | {"5.png": contents["4.png"][:-12]})
    source, batches = opened(folder, decoder="dali", cache_gib=0.0), []
    assert source.index.facts[5][3]
    images = source.dali.images
    monkeypatch.setattr(source.dali, "images", lambda data, boxes: batches.append(len(data)) or images(data, boxes))
    first = every(source)
    assert batches == [6, 1, 1, 1, 1, 1, 1]
    assert torch.equal(first, every(source))
    assert batches[7:] == [5]
    assert torch.equal(first[4], first[5])
    assert not source.lost


@dali
@pytest.mark.parametrize(("height", "width", "size"), [(64, 64, 24), (90, 120, 32), (30, 20, 64), (200, 100, 33), (64, 64, 64)])
def test_resizing_in_the_pipeline(folder, height, width, size):
    """What a GPU would run, here on the CPU. Measured: inside at most 1 level (rounding), 0.19 in the mean; at the border at most 8
    levels, where DALI's filter sees the pixels around the crop, or repeats the last one, and ours has fewer weights. Mean 0.28."""
    write(folder, {"a.png": encoded(photo(height, width), "PNG"), "b.jpg": encoded(photo(height, width, seed=3), "JPEG")})
    ours = every(opened(folder, image_size=size, cache_gib=0.0)).int()
    source = opened(folder, image_size=size, cache_gib=0.0, decoder="dali")
    source.dali = DaliDecoder(None, size, resize_inside=True)
    difference = (every(source).int() - ours).abs()
    assert difference[:, :, 1:-1, 1:-1].max() <= 1
    assert difference.max() <= 12
    assert difference.float().mean() < 0.5


@dali
def test_a_crop_in_the_pipeline_and_outside_of_it(folder):
    """Where the pipeline resizes, an image that Pillow decodes must still be cropped, also if it has the size already."""
    write(folder, {"dali.png": encoded(photo(24, 24), "PNG"), "pillow.bmp": encoded(photo(24, 24), "BMP")})
    source = opened(folder, image_size=24, cache_gib=0.0, decoder="dali", crop="tight")
    source.dali = DaliDecoder(None, 24, resize_inside=True)
    assert [source.decoder_of(place)[0] for place in (0, 1)] == ["DALI", "Pillow"]
    inside, outside = every(source).int()
    assert (inside - outside).abs()[:, 1:-1, 1:-1].max() <= 1
    assert (outside - torch.from_numpy(photo(24, 24)).permute(2, 0, 1).int()).abs().float().mean() > 4


@pytest.mark.parametrize(("height", "width", "size"), [(64, 64, 24), (91, 120, 32), (30, 21, 64), (1, 1, 4), (1, 300, 8), (7, 5, 5)])
def test_resized_as_pillow_does(folder, height, width, size):
    pixels = photo(height, width)
    write(folder, {"a.png": encoded(pixels, "PNG")})
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    cropped = Image.fromarray(pixels[top : top + side, left : left + side])
    wanted = np.array(cropped.resize((size, size), Image.Resampling.BILINEAR)).astype(int)
    found = every(opened(folder, image_size=size))[0].permute(1, 2, 0).numpy()
    assert np.abs(found - wanted).max() <= 1


@pytest.mark.parametrize(
    ("height", "width", "crop", "box"),
    [
        (40, 56, "center", (0, 8, 40)),
        (57, 40, "center", (8, 0, 40)),
        (1, 9, "center", (0, 4, 1)),
        (218, 178, "center", (20, 0, 178)),
        (218, 178, "tight", (49, 29, 119)),
        (1, 1, "tight", (0, 0, 1)),
        (218, 178, "face", (57, 25, 128)),
        (185, 153, "face", (57, 25, 128)),
        (184, 153, "face", (15, 0, 153)),  # not an aligned image: its centre
        (185, 152, "face", (16, 0, 152)),
    ],
)
def test_crops(folder, height, width, crop, box):
    assert square(height, width, crop) == box
    top, left, side = box
    pixels = photo(height, width)
    write(folder, {"a.png": encoded(pixels, "PNG")})
    found = every(opened(folder, crop=crop, image_size=max(side, 4)))[0]
    cut = torch.from_numpy(pixels[top : top + side, left : left + side]).permute(2, 0, 1)
    assert torch.equal(found, cut if side >= 4 else resize(cut[None], 4)[0])


@both_decoders
def test_grey_and_colour(folder, decoder):
    colour, grey = photo(16, 16), photo(16, 16, 1)[..., 0]
    write(folder, {"colour.png": encoded(colour, "PNG"), "grey.png": encoded(grey, "PNG")})
    source = opened(folder, decoder=decoder, channels=1)
    assert source.image_shape == (1, 16, 16)
    found = every(source)[:, 0].numpy()
    assert np.abs(found[0] - colour @ np.array([0.299, 0.587, 0.114])).max() <= 0.5 + 1e-4
    assert np.array_equal(found[1], grey)
    assert torch.equal(every(opened(folder, decoder=decoder, channels=3))[1], torch.from_numpy(grey).expand(3, 16, 16))
    with pytest.raises(ValueError, match="channels: cannot make 2 from 3"):
        with_channels(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), 2)


TURNED = {  # what is seen of the stored pixels, by the EXIF standard's numbers
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@both_decoders
@pytest.mark.parametrize("orientation", [*TURNED, 0, 9, 65535])
def test_exif_orientation(folder, orientation, decoder):
    colour, xmp = photo(), f'<rdf:Description tiff:Orientation="{orientation % 10}"/>'.encode()
    contents = {
        "a.jpg": encoded(colour, "JPEG", exif=exif(orientation)),
        "b.png": encoded(colour, "PNG", exif=exif(orientation)),
        "c.tif": encoded(colour, "TIFF", exif=exif(orientation)),
        "d.png": png(colour, 8, 2, after=chunk(b"eXIf", exif(orientation).removeprefix(b"Exif\0\0"))),  # behind the pixels
        "e.jpg": encoded(colour, "JPEG", xmp=xmp),
        "e.png": png(colour, 8, 2, before=chunk(b"iTXt", b"XML:com.adobe.xmp" + bytes(5) + xmp)),
    }
    if features.check("webp"):
        contents["f.webp"] = encoded(colour, "WEBP", lossless=True, exif=exif(orientation))
    write(folder, contents)
    source = opened(folder, decoder=decoder, image_size=H, cache_gib=0.0)
    assert len(source.index.names) == len(contents)
    for name, facts, found in zip(source.index.names, source.index.facts, every(source), strict=True):
        stored = np.array(Image.open(io.BytesIO(encoded(colour, "JPEG")))) if name.endswith("jpg") else colour
        number = orientation % 10 if name.startswith("e.") else orientation
        seen = TURNED.get(number, TURNED[1])(stored)
        assert (name, facts[0], facts[1]) == (name, seen.shape[1], seen.shape[0])
        top, left, side = square(*seen.shape[:2])
        assert np.array_equal(found.permute(1, 2, 0).numpy(), seen[top : top + side, left : left + side]), name


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@both_decoders
@pytest.mark.parametrize(
    "tags",
    [b"Exif\0\0", b"Exif\0\0not a TIFF", exif(6)[:18], b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x02\0\0\0006\0\0\0\0\0\0\0"],
    ids=["empty", "text", "cut", "a string as orientation"],
)
def test_broken_exif_is_no_reason_to_lose_an_image(folder, tags, decoder):
    write(folder, {"a.jpg": encoded(photo(), "JPEG", exif=tags)})
    found = every(opened(folder, decoder=decoder, image_size=H))[0].permute(1, 2, 0).numpy()
    assert np.array_equal(found, expected("jpeg named png")[CENTRE])


def test_known_answers_of_16_bits():
    values = np.array([[0, 128, 129, 257 * 7, 257 * 7 + 128, 257 * 7 + 129, 65406, 65407, 65535]], np.uint16)
    answer = [0, 0, 1, 7, 7, 8, 254, 255, 255]  # the nearest of 257 * level
    for kind in ("PNG", "TIFF"):
        assert decode_image(encoded(values, kind)).tolist() == [[[level] * 3 for level in answer]]
    deep = np.repeat(values.T[None], 3, -1).astype(">u2")
    assert decode_image(png(deep, 16, 2))[0, :, 0].tolist() == [value >> 8 for value in values[0].tolist()]


def test_the_smallest_files():
    for data, pixels in ((b"P5 1 1 255\n\x07", [[[7, 7, 7]]]), (b"P4 1 1\n\x80", [[[0, 0, 0]]]), (b"P3 1 1 9 9 0 3\n", [[[255, 0, 85]]])):
        assert decode_image(data).tolist() == pixels
        assert image_facts(data)[:2] == (1, 1)


def test_known_answers_of_alpha():
    colours = [(200, 100, 50, 255), (200, 100, 50, 0), (200, 100, 50, 51), (255, 255, 255, 1)]
    found = decode_image(encoded(np.array([colours], np.uint8), "PNG"))[0]
    assert found.tolist() == [[200, 100, 50], [0, 0, 0], [40, 20, 10], [1, 1, 1]]
    listed = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    listed.putpalette([10, 20, 30, 40, 50, 60])
    assert decode_image(encoded(listed, "PNG", transparency=1)).tolist() == [[[10, 20, 30], [0, 0, 0]]]
    assert decode_image(encoded(np.array([[[9, 8, 7], [1, 2, 3]]], np.uint8), "PNG", transparency=(1, 2, 3))).tolist() == [
        [[9, 8, 7], [0, 0, 0]]
    ]
    assert image_facts(encoded(listed, "GIF", transparency=1))[3] is False


def test_floats_have_no_known_range(folder):
    write(folder, {"a.tif": encoded(np.ones((8, 8), np.float32), "TIFF")})
    with pytest.raises(UserError, match=r"a\.tif \(floating-point pixels without a known range\)"):
        opened(folder)


def test_looking_at_a_file_does_not_decode_it(monkeypatch):
    """Start-up looks at every file: its header is enough. (Pillow decodes a PNG to look for EXIF behind the pixels.)"""
    kinds = ["PNG", "JPEG"] + ["WEBP"] * features.check("webp")
    contents = [encoded(photo(), kind) for kind in kinds]
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    assert [image_facts(data)[:3] for data in contents] == [(W, H, f"{kind} RGB") for kind in kinds]


PNGS = {
    "grey": lambda: encoded(photo()[..., 0], "PNG"),
    "colour": lambda: encoded(photo(), "PNG"),
    "one bit": lambda: encoded(Image.fromarray(photo()[..., 0] > 99), "PNG"),
    "palette": lambda: encoded(Image.fromarray(photo()).quantize(7), "PNG"),
    "alpha": lambda: encoded(np.dstack((photo(), photo()[..., 0])), "PNG"),
    "16 bits": lambda: encoded(photo()[..., 0].astype(np.uint16), "PNG"),
    "a transparent colour": lambda: encoded(photo(), "PNG", transparency=(1, 2, 3)),
    "profile": lambda: encoded(photo(), "PNG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
    "orientation": lambda: encoded(photo(), "PNG", exif=exif(6)),
    "resolution": lambda: encoded(photo(), "PNG", dpi=(72, 72)),
    "interlaced": lambda: png(photo(), 8, 2, interlaced=True),
    "moving": lambda: encoded(Image.fromarray(photo()), "PNG", save_all=True, append_images=[Image.fromarray(photo()[::-1])]),
    "orientation at the end": lambda: png(photo(), 8, 2, after=chunk(b"eXIf", exif(6)[6:])),
    "more behind it": lambda: encoded(photo(), "PNG") + b"more",
    "a second header": lambda: png(photo(), 8, 2, before=chunk(b"IHDR", struct.pack(">IIBBBBB", 5, 6, 8, 0, 0, 0, 0))),
}
BROKEN_PNGS = {
    "checksum of the header": lambda: bytes(byte ^ (place == 30) for place, byte in enumerate(encoded(photo(), "PNG"))),
    "checksum of the resolution": lambda: png(photo(), 8, 2, before=chunk(b"pHYs", bytes(9))[:-1] + b"x"),
    "cut resolution": lambda: png(photo(), 8, 2, before=chunk(b"pHYs", b"abc")),
}


@pytest.mark.parametrize("kind", PNGS)
def test_facts_of_a_png_are_pillows(kind, monkeypatch):
    """Read without Pillow where nothing but pixels is in it; the others are left to Pillow."""
    data = PNGS[kind]()
    plain = decode._plain_png(data)
    assert (plain is not None) == (kind in ("grey", "colour", "resolution", "interlaced"))
    monkeypatch.setattr(decode, "_plain_png", lambda data: None)
    assert plain in (None, image_facts(data))


@pytest.mark.parametrize("kind", BROKEN_PNGS)
def test_a_broken_png_is_left_to_pillow(kind):
    data = BROKEN_PNGS[kind]()
    assert decode._plain_png(data) is None
    with pytest.raises(BadFile):
        image_facts(data)


@pytest.mark.parametrize("cut", [1, 9, 20, 26, 40, 200, -20, -12, -8, -1])
def test_a_png_that_is_cut_off_is_left_to_pillow(cut):
    assert decode._plain_png(encoded(photo(), "PNG")[:cut]) is None


# Bad files


def cut(kind: str, **options: object) -> dict[str, bytes]:
    data = encoded(photo(), kind, **options)
    return {f"{kind.lower()} cut at {share:.0%}": data[: int(share * len(data))] for share in (0.01, 0.1, 0.5, 0.9, 0.99)}


def damaged(kind: str, **options: object) -> bytes:
    """Whole by its header and its end, broken in between."""
    data = encoded(photo(), kind, **options)
    return data[: len(data) // 2] + b"\xff" * 64 + data[len(data) // 2 + 64 :]


BROKEN = {
    "zero bytes": b"",
    "one byte": b"\xff",
    "text": b"this is not an image\n" * 50,
    "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "another format": b"RIFF\x24\0\0\0WAVEfmt " + bytes(100),
    "only zeros": bytes(5000),
    "header only": encoded(photo(), "PNG")[:33],
    "absurd size": png(np.zeros((1, 1, 3), np.uint8), 8, 2).replace(struct.pack(">II", 1, 1), struct.pack(">II", 2**31 - 1, 2**31 - 1)),
    **cut("JPEG"),
    **cut("JPEG", progressive=True),
    **cut("PNG"),
    **cut("BMP"),
    **(cut("WEBP") if features.check("webp") else {}),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_seen_at_the_start(folder, case, caplog):
    write(folder, numbered(10) | {"bad.jpg": BROKEN[case]})
    with caplog.at_level(logging.WARNING, "sami_fast.data"):
        source = opened(folder, max_bad=0.1)
    assert list(source.index.bad) == ["bad.jpg"]
    assert source.index.names == list(numbered(10))
    assert numbers(source) == list(range(10))
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{folder}: skipped 1 of 11 images: bad.jpg (")
    if case == "zero bytes":
        assert "bad.jpg (zero bytes)" in record.getMessage()
    with pytest.raises(UserError, match=r"^data\.path: 1 of 11 images in .* cannot be read, data\.max_bad=0\.09 allows 0: bad\.jpg \("):
        opened(folder, max_bad=0.09)


@both_decoders
@pytest.mark.parametrize("case", [*BROKEN, "gone", "a folder"])
def test_a_file_that_breaks_after_the_start(folder, case, decoder, caplog):
    """The next image takes its place, in every instance the same; it is logged once and spoils no other image of its batch."""
    write(folder, numbered(10))
    sources = [opened(folder, max_bad=0.1, decoder=decoder, cache_gib=0.0) for _ in range(2)]
    (folder / "004.png").unlink()
    if case == "a folder":
        (folder / "004.png").mkdir()
    elif case != "gone":
        (folder / "004.png").write_bytes(BROKEN[case])
    with caplog.at_level(logging.WARNING, "sami_fast.data"):
        for source in sources:
            for _ in range(2):
                assert numbers(source) == [0, 1, 2, 3, 5, 5, 6, 7, 8, 9]
            assert list(source.lost) == ["004.png"]
    assert [re.sub(r": .*;", ": why;", record.getMessage()) for record in caplog.records] == [
        f"{folder}/004.png: why; in training another one takes its place"
    ] * 2


def test_an_image_that_is_asked_for_is_not_replaced(folder):
    write(folder, numbered(4))
    source = opened(folder, max_bad=0.5, cache_gib=0.0)
    (folder / "001.png").write_bytes(b"broken")
    images, absent = source.read(torch.tensor([2, 1, 0]))
    assert list(absent) == [1]
    assert absent[1].startswith("001.png: cannot identify image file")
    assert ((images[:, 0, 0, 0] + 1) * 127.5).round().tolist() == [2, 0, 0]
    for ask in (source.pixels, source.images):
        with pytest.raises(AbsentError, match=rf"^data\.path: cannot read {folder}/001\.png: "):
            ask(torch.tensor([0, 1]))
    assert source.training_pixels(torch.tensor([0, 1]))[:, 0, 0, 0].tolist() == [0, 2]
    assert ((source.training_images(torch.tensor([1]))[0, 0, 0, 0] + 1) * 127.5).round() == 2


def test_a_file_that_is_too_large_for_an_image(folder):
    write(folder, numbered(2))
    with open(folder / "sparse.jpg", "wb") as file:
        file.write(encoded(photo(), "JPEG"))
        file.truncate(30 * 2**30)
    source = opened(folder, max_bad=0.5)
    assert source.index.bad == {"sparse.jpg": "30 GiB, more than the 1 GiB of an image file"}
    assert numbers(source) == [0, 1]
    grown = opened(folder, max_bad=0.7, cache_gib=0.0)
    os.truncate(folder / "001.png", 30 * 2**30)  # after it was looked at
    assert grown.read(torch.arange(2))[1] == {1: "001.png: 30 GiB, more than the 1 GiB of an image file"}


# Colour profiles


def swapped() -> bytes:
    """A profile of colours in which red is blue and blue red, and which otherwise is sRGB."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"?XYZ").replace(b"bXYZ", b"rXYZ").replace(b"?XYZ", b"bXYZ")


@pytest.mark.skipif(not features.check("littlecms2"), reason="this Pillow was built without LittleCMS")
@both_decoders
def test_colour_profiles_are_applied(folder, decoder):
    colour = photo(16, 16)
    rgba = np.dstack((colour, np.full((16, 16), 255, np.uint8)))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    files = {
        "0.png": encoded(colour, "PNG", icc_profile=swapped()),
        "1.png": encoded(rgba, "PNG", icc_profile=swapped()),
        "2.tif": encoded(colour, "TIFF", icc_profile=swapped()),
        "3.png": encoded(colour, "PNG", icc_profile=srgb),
        "4.png": encoded(colour, "PNG", icc_profile=b"no profile"),
        "5.png": encoded(colour[..., 0].copy(), "PNG", icc_profile=swapped()),  # of another kind than the image
    }
    source = opened(write(folder, files), decoder=decoder)
    found = every(source).permute(0, 2, 3, 1).numpy().astype(int)
    for image in found[:3]:
        assert np.abs(image - colour[..., ::-1]).max() <= 2
    assert np.array_equal(found[3], colour)
    assert np.array_equal(found[4], colour)
    assert np.array_equal(found[5], np.repeat(colour[..., :1], 3, -1))
    if decoder == "dali":
        assert [source.decoder_of(n)[0] for n in range(6)] == ["Pillow"] * 3 + ["DALI"] * 3


@pytest.mark.skipif(not features.check("littlecms2"), reason="this Pillow was built without LittleCMS")
def test_a_jpeg_of_another_profile_is_shown_the_same_by_both(folder):
    write(folder, {"a.jpg": encoded(photo(64, 64), "JPEG", icc_profile=swapped()), "b.jpg": encoded(photo(64, 64), "JPEG")})
    places = torch.arange(2)
    one, other = every(opened(folder)).numpy().astype(int)
    assert np.abs(one[::-1] - other).max() <= 4
    if available():
        assert torch.equal(opened(folder, decoder="dali", cache_gib=0.0).pixels(places), opened(folder, cache_gib=0.0).pixels(places))


# Files that are left out


def test_what_is_left_out_is_told_once(folder, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr(image_folder, "image_suffixes", image_suffixes.__wrapped__)
    write(folder, numbered(3) | {"a.heic": b"", "b.HEIC": b"", "c.txt": b"", "sub/d.dng": b"", "e": b""})
    with caplog.at_level(logging.WARNING, "sami_fast.data"):
        for _ in range(2):
            source = opened(folder)
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder}: 62.50% of the files are left out, by their endings: 2 .heic, 1 without one, 1 .dng, 1 .txt; HEIC needs pillow-heif, "
        "`pip install 'sami-fast[heic]'`"
    ]
    assert source.facts()["left out"] == "2 .heic, 1 without one, 1 .dng, 1 .txt"


def test_heic(folder):
    pillow_heif = pytest.importorskip("pillow_heif", reason="needs pillow-heif: pip install 'sami-fast[heic]'")
    write(folder, numbered(1))
    pillow_heif.from_pillow(Image.fromarray(photo(64, 64))).save(folder / "a.heic", quality=100)
    source = opened(folder, image_size=64)
    assert source.index.names == ["000.png", "a.heic"]
    assert np.abs(every(source)[1].permute(1, 2, 0).numpy().astype(int) - photo(64, 64)).mean() < 4
    assert source.decoder_of(1)[0] == "Pillow"


@both_decoders
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_damage_that_only_decoding_finds(folder, kind, decoder):
    if kind == "WEBP" and not features.check("webp"):
        pytest.skip("Pillow without WebP")
    bad = damaged(kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert image_facts(bad)[:2] == (W, H)
    with pytest.raises(BadFile):
        decode_image(bad)
    write(folder, numbered(4) | {"000_bad.png": bad})
    source = opened(folder, max_bad=0.2, decoder=decoder)
    assert not source.index.bad
    assert numbers(source) == [0, 1, 1, 2, 3]
    assert list(source.lost) == ["000_bad.png"]
    strict = opened(folder, max_bad=0.19, decoder=decoder, cache_gib=0.0)
    with pytest.raises(UserError, match=r"^data\.path: 1 of 5 images in .* cannot be read, data\.max_bad=0\.19 allows 0: 000_bad\.png \("):
        every(strict)


@both_decoders
def test_damage_inside_a_jpeg_spoils_nothing_else(folder, decoder):
    """Most of it cannot be told from an image; where the decoders differ (DALI's forgives more), another image takes its place."""
    write(folder, {"0.jpg": encoded(photo(), "JPEG"), "1.jpg": damaged("JPEG"), "2.png": encoded(photo(seed=2), "PNG")})
    source = opened(folder, max_bad=0.5, decoder=decoder, image_size=H)
    found = every(source)
    assert np.array_equal(found[0].permute(1, 2, 0).numpy(), expected("jpeg named png")[CENTRE])
    assert np.array_equal(found[2].permute(1, 2, 0).numpy(), photo(seed=2)[CENTRE])
    if source.lost:
        assert torch.equal(found[1], found[2])
    else:
        assert torch.equal(found[1, :, :8], found[0, :, :8])  # above the damage


@both_decoders
def test_too_many_bad_files(folder, decoder):
    write(folder, numbered(20) | {f"bad{n:02}.jpg": b"x" for n in range(5)})
    sentence = (
        rf"^data\.path: 5 of 25 images in {re.escape(str(folder))} cannot be read, data\.max_bad=0\.1 allows 2: "
        rf"bad00\.jpg \(not an image that can be read\), bad01\.jpg \(.*\), bad02\.jpg \(.*\) and 2 more; all of them: (.*)$"
    )
    with pytest.raises(UserError, match=sentence) as caught:
        opened(folder, max_bad=0.1, decoder=decoder)
    listed = Path(re.match(sentence, str(caught.value))[1]).read_text().splitlines()
    assert listed == [f"'bad{n:02}.jpg': not an image that can be read" for n in range(5)]
    source = opened(folder, max_bad=0.2, decoder=decoder, cache_gib=0.0)
    assert numbers(source) == list(range(20))
    (folder / "007.png").unlink()  # one more while it runs
    with pytest.raises(UserError, match=r"^data\.path: 6 of 25 images in .* data\.max_bad=0\.2 allows 5: "):
        every(source)


def test_what_an_earlier_command_has_said_is_not_said_again(folder, caplog, monkeypatch):
    write(folder, numbered(10) | {"bad.jpg": b""})
    opened(folder, max_bad=0.1)
    monkeypatch.setattr(cache, "_told", set())  # another process
    with caplog.at_level(logging.WARNING, "sami_fast.data"):
        caplog.clear()
        assert list(opened(folder, max_bad=0.1).index.bad) == ["bad.jpg"]
        assert not caplog.records
        write(folder, {"worse.jpg": b""})
        opened(folder, max_bad=0.2)
    assert "skipped 2 of 12 images: bad.jpg (zero bytes), worse.jpg (zero bytes)" in caplog.text


@dali
@pytest.mark.parametrize("profile", [b"bad\0\0" + zlib.compress(b"x" * 200), "srgb"])
def test_a_png_with_a_colour_profile_is_decoded_without_a_word(folder, profile, capfd):
    """libpng, which DALI uses, complains of damaged ones and of many that are common."""
    if profile == "srgb":
        profile = b"sRGB\0\0" + zlib.compress(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    plain = encoded(photo(), "PNG")
    write(folder, {"a.png": plain, "b.png": plain[:33] + chunk(b"iCCP", profile) + plain[33:]})
    source = opened(folder, decoder="dali", cache_gib=0.0)
    assert source.decoder_of(1)[0] == "DALI"
    first, second = source.pixels(torch.arange(2))
    assert torch.equal(first, second)
    assert capfd.readouterr().err == ""


def test_very_many_bad_files_are_counted_and_some_named(folder, caplog):
    write(folder, numbered(3) | {f"bad{n:03}.jpg": b"" for n in range(200)})
    with caplog.at_level(logging.WARNING, "sami_fast.data"):
        source = opened(folder, max_bad=0.99)
        opened(folder, max_bad=0.99)  # told once
    (record,) = caplog.records
    text = record.getMessage()
    assert "skipped 200 of 203 images" in text
    assert text.endswith("bad019.jpg (zero bytes) and 180 more")
    assert numbers(source) == [0, 1, 2]


@both_decoders
@pytest.mark.parametrize("count", [1, 2, 5])
def test_nothing_left(folder, count, decoder):
    write(folder, numbered(count))
    source = opened(folder, max_bad=1.0, decoder=decoder, cache_gib=0.0)
    assert numbers(source) == list(range(count))
    for name in source.index.names[1:]:
        (folder / name).unlink()
    assert numbers(source) == [0] * count  # the last one left stands for all
    (folder / "000.png").write_bytes(b"")
    with pytest.raises(UserError, match=f"^{re.escape(f'data.path: nothing in {folder} can be read any more')}$"):
        every(source)
    with pytest.raises(UserError, match=r"^data\.path: none of the 1 images in .* can be read: 000\.png \(zero bytes\)$"):
        opened(folder, max_bad=1.0)


def test_a_replaced_file_is_shown_as_it_is_now(folder):
    """Another size, another format, fewer channels: nothing of what the index knew is needed to read it."""
    write(folder, {"a.jpg": encoded(photo(), "JPEG"), "b.png": encoded(photo(16, 16), "PNG")})
    for decoder in ("torch", *(["dali"] if available() else [])):
        write(folder, {"a.jpg": encoded(photo(), "JPEG")})
        source = opened(folder, decoder=decoder, cache_gib=0.0)
        write(folder, {"a.jpg": encoded(photo(16, 20, 1)[..., 0], "PNG")})
        assert np.array_equal(every(source)[0, 0].numpy(), photo(16, 20, 1)[:, 2:18, 0])


def test_permissions(folder):
    """In a child of our own, since the superuser may read everything."""
    write(folder, numbered(10) | {"sub/x.png": numbered(1)["000.png"], "shut/y.png": numbered(1)["000.png"]})
    (folder.parent / "cache").mkdir()
    for path, mode in ((folder.parent, 0o755), (folder.parent / "cache", 0o777), (folder / "003.png", 0), (folder / "shut", 0)):
        path.chmod(mode)

    def look(connection):
        os.chdir(folder.parent)  # the folders above may be closed to others
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        logs: list[str] = []
        index.log.handlers[:] = [type("Kept", (logging.Handler,), {"emit": lambda self, record: logs.append(record.getMessage())})()]
        source = opened(Path("images"), max_bad=0.1, cache_dir="cache")
        found = [source.index.bad, source.index.names, numbers(source)]
        written, said = index_file(Path("images")).stat().st_mtime_ns, len(logs)
        assert opened(Path("images"), max_bad=0.1, cache_dir="cache").index.bad == found[0]
        found.append(index_file(Path("images")).stat().st_mtime_ns == written)  # what was closed is remembered
        found.append([message for message in logs[said:] if "003.png" in message])  # and not said again
        for path in ("images/shut", "images/shut/inside"):
            with pytest.raises(UserError) as refused:
                opened(Path(path), cache_dir="cache")
            found.append(str(refused.value))
        connection.send((found, logs))
        connection.close()

    try:
        (bad, names, shown, remembered, said_again, *refused), logs = in_a_child(look)
    finally:
        (folder / "shut").chmod(0o755)
    assert bad == {"003.png": "Permission denied"}
    assert names == [name for name in numbered(10) if name != "003.png"] + ["sub/x.png"]
    assert shown == [0, 1, 2, *range(4, 10), 0]
    assert remembered
    assert not said_again
    assert refused == [
        "data.path: no permission to read the folder images/shut",
        "data.path: cannot reach the folder images/shut/inside (Permission denied)",
    ]
    assert "images/shut: skipped a folder: Permission denied" in logs
    (folder / "003.png").chmod(0o644)  # neither its size nor its time changes, yet it is found
    assert "003.png" in opened(folder, cache_dir=str(folder.parent / "cache")).index.names


def in_a_child(work):
    """What `work` sends from a forked process."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=work, args=(there,))
    child.start()
    there.close()
    try:
        return here.recv()
    finally:
        child.join(30)
        assert child.exitcode == 0


def test_links_pipes_and_folders(tmp_path, folder):
    write(folder, numbered(3) | {"sub/003.png": encoded(np.full((16, 16, 3), 3, np.uint8), "PNG")})
    outside = write(tmp_path / "outside", {"004.png": encoded(np.full((16, 16, 3), 4, np.uint8), "PNG")})
    (folder / "away").symlink_to(outside)  # followed
    (folder / "sub" / "circle").symlink_to(folder)  # not again
    (folder / "twice").symlink_to("sub")  # the first name counts
    (folder / "dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (folder / "itself.jpg").symlink_to("itself.jpg")
    (folder / "link.png").symlink_to("001.png")
    (folder / "folder.jpg").mkdir()
    write(folder / "folder.jpg", {"005.png": encoded(np.full((16, 16, 3), 5, np.uint8), "PNG")})
    os.mkfifo(folder / "pipe.jpg")  # reading it would never end
    (folder / "zero.png").symlink_to("/dev/zero")  # neither would this
    source = opened(folder, max_bad=0.5)
    assert source.index.names == ["000.png", "001.png", "002.png", "away/004.png", "folder.jpg/005.png", "link.png", "sub/003.png"]
    assert numbers(source) == [0, 1, 2, 4, 5, 1, 3]
    assert source.index.bad.keys() == {"dangling.jpg", "itself.jpg", "pipe.jpg", "zero.png"}
    assert source.index.bad["dangling.jpg"] == "No such file or directory"
    assert source.index.bad["pipe.jpg"] == source.index.bad["zero.png"] == "not a regular file"
    write(tmp_path, {"nowhere.jpg": numbered(1)["000.png"]})
    assert "dangling.jpg" in opened(folder, max_bad=0.5).index.names


def test_of_two_links_to_a_folder_the_first_name_counts(tmp_path, folder, monkeypatch):
    """However the file system lists them: every rank and every machine must see the same names."""
    outside = write(tmp_path / "outside", numbered(2))
    for name in ("b", "a", "c"):
        (folder / name).symlink_to(outside)
    walk = os.walk

    def backwards(*arguments, **options):
        for place, folders, names in walk(*arguments, **options):
            folders.sort(reverse=True)
            yield place, folders, names

    monkeypatch.setattr(index.os, "walk", backwards)
    assert opened(folder).index.names == ["a/000.png", "a/001.png"]


@both_decoders
def test_odd_names(folder, decoder, caplog):
    names = [
        b"\xc3\xbcmlaut \xe2\x9c\x93.png",
        b"latin-\xfc.png",
        b"new\nline.png",
        b"-rf *.png",
        b"%s{}.png",
        b"a" * 240 + b".png",
        b"\xff/\xfe.png",
    ]
    for name in names:
        path = folder / os.fsdecode(name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(numbered(2)["001.png"])
    (folder / os.fsdecode(b"bad\xfc\n\x1b[31m.jpg")).write_bytes(b"")
    with caplog.at_level(logging.WARNING, "sami_fast.data"):
        source = opened(folder, max_bad=0.25, decoder=decoder, cache_gib=0.0)
        assert sorted(os.fsencode(name) for name in source.index.names) == sorted(names)
        assert numbers(source) == [1] * len(names)
        assert opened(folder, max_bad=0.25).fingerprint == source.fingerprint
        (folder / os.fsdecode(b"new\nline.png")).unlink()
        every(source)
    for record in caplog.records:
        assert record.getMessage().isprintable()  # a name cannot forge a line of the log
    assert r"bad\udcfc\n\x1b[31m.jpg (zero bytes)" in caplog.text
    with pytest.raises(UserError, match=r"bad\\udcfc"):
        opened(folder)


def test_odd_names_of_the_folder(tmp_path):
    for name in (os.fsdecode(b"f\xfc"), "x" * 250, "\N{SNOWMAN}" * 80, "[a]*", "a/../b"):
        (tmp_path / name.partition("/")[0]).mkdir()
        folder = write(tmp_path / name, numbered(2))
        for _ in range(2):  # cold and warm
            assert numbers(opened(folder, cache_dir=str(tmp_path / "elsewhere"))) == [0, 1]
    with pytest.raises(UserError, match=r"^data\.path: cannot reach the folder .* \(File name too long\)$"):
        opened(tmp_path / ("x" * 300))


def test_hidden_files_and_others_are_ignored(folder):
    write(
        folder,
        numbered(2) | {".hidden.png": b"", "._000.png": b"", ".git/x.png": b"", "notes.txt": b"", "sub/more.json": b"", "noend": b""},
    )
    source = opened(folder)
    assert source.index.names == ["000.png", "001.png"]
    assert source.index.others == {".txt": 1, ".json": 1, "": 1}


@pytest.mark.parametrize(
    ("contents", "sentence"),
    [
        ({}, r"no images in {0}; expected files ending in \.avif, \.bmp, \.gif, .* \.\.\., found 0 other file\(s\)$"),
        (
            {"a.txt": b"", "b.mp4": b"", "sub/c": b""},
            r"no images in {0}; expected files ending in .*, found 3 other file\(s\): 1 without one, 1 \.mp4, 1 \.txt$",
        ),
        ({".hidden.png": b""}, r"no images in {0}; expected .*, found 0 other file\(s\)$"),
        (None, r"no folder {0}$"),
    ],
)
def test_folders_without_images(tmp_path, contents, sentence):
    folder = tmp_path / "images"
    if contents is not None:
        folder.mkdir()
        write(folder, contents)
    with pytest.raises(UserError, match=r"^data\.path: " + sentence.format(re.escape(str(folder)))):
        opened(folder)
    assert not (tmp_path / "cache").exists()  # nothing is made for a folder that cannot be used


def test_a_file_is_no_folder(folder):
    write(folder, numbered(1))
    for path in (folder / "000.png", folder / "000.png" / "sub"):
        found = f"expected a folder, found the file {path}" if path.is_file() else f"no folder {path}"
        with pytest.raises(UserError, match=f"^{re.escape(f'data.path: {found}')}$"):
            opened(path)


def test_dali_that_is_not_there(folder, monkeypatch):
    write(folder, numbered(1))
    monkeypatch.setattr("sami_fast.data.dali.available", lambda: False)
    with pytest.raises(UserError, match=r"^data\.decoder: dali is asked for, but DALI is not installed"):
        opened(folder, decoder="dali")
    monkeypatch.setattr("sami_fast.data.decoded.dali_available", lambda: False)
    assert opened(folder, decoder="auto").dali is None


# The index


def test_a_warm_start_opens_no_file(folder, monkeypatch):
    write(folder, numbered(5) | {"bad.jpg": b"x"})
    looked = inspected(monkeypatch)
    cold = opened(folder, max_bad=0.2)
    assert sorted(looked) == [*numbered(5), "bad.jpg"]
    looked.clear()
    warm = opened(folder, max_bad=0.2)
    assert looked == []
    assert warm.index.names == cold.index.names
    assert [list(facts) for facts in warm.index.facts] == [list(facts) for facts in cold.index.facts]
    assert (warm.index.bad, warm.index.state, warm.fingerprint) == (cold.index.bad, cold.index.state, cold.fingerprint)


def test_new_and_changed_files_are_looked_at_again(folder, monkeypatch):
    write(folder, numbered(5))
    looked = inspected(monkeypatch)
    before = opened(folder).index
    looked.clear()
    write(folder, {"005.png": numbered(6)["005.png"], "001.png": encoded(np.full((20, 18, 3), 9, np.uint8), "PNG")})
    os.utime(folder / "002.png", ns=(0, 12345))
    (folder / "003.png").unlink()
    after = opened(folder).index
    assert sorted(looked) == ["001.png", "002.png", "005.png"]
    assert after.names == ["000.png", "001.png", "002.png", "004.png", "005.png"]
    assert after.facts[1][:2] == (18, 20)
    assert after.state != before.state
    assert json.loads(index_file(folder).read_text())["files"].keys() == set(after.names)
    looked.clear()
    assert opened(folder).index.state == after.state
    assert looked == []


@pytest.mark.parametrize(
    "content",
    [
        *(
            b"",
            b"{",
            b"null",
            b"[]",
            b"3",
            b"\xff\xfe\0",
            b'{"version": 2}',
            b'{"version": 2, "files": null}',
            b'{"version": 2, "files": [1, 2]}',
        ),
        *(b'{"version": 2, "files": {"000.png": null}}', b'{"version": 2, "files": {"000.png": [1]}}', b'{"version": 0, "files": {}}'),
    ],
)
def test_a_corrupt_index_is_made_anew(folder, content, monkeypatch):
    write(folder, numbered(3))
    before, whole = opened(folder).index, index_file(folder).read_bytes()
    index_file(folder).write_bytes(content)
    looked = inspected(monkeypatch)
    assert opened(folder).index == before
    assert sorted(looked) == before.names
    assert index_file(folder).read_bytes() == whole


def test_a_torn_index_is_made_anew(folder):
    write(folder, numbered(3))
    before, whole = opened(folder).index, index_file(folder).read_bytes()
    for length in range(0, len(whole), 17):
        index_file(folder).write_bytes(whole[:length])
        assert opened(folder).index == before
        assert index_file(folder).read_bytes() == whole


def test_nothing_half_written_stays(folder, monkeypatch, caplog):
    write(folder, numbered(3))
    opened(folder, cache_gib=0.0)
    assert [path.name for path in kept(folder)] == ["images.json"]
    whole = index_file(folder).read_bytes()
    write(folder, {"003.png": numbered(4)["003.png"]})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with caplog.at_level(logging.WARNING, "sami_fast.data"):
        assert numbers(opened(folder, cache_gib=0.0)) == [0, 1, 2, 3]  # a run that only reads goes on
    assert f"{index_file(folder)}: not written: No space left on device" in caplog.text
    assert [path.name for path in kept(folder)] == ["images.json"]
    assert index_file(folder).read_bytes() == whole


def test_a_cache_that_cannot_be_made(tmp_path, folder):
    write(folder, numbered(1))
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "sub"):
        sentence = f"data.cache_dir: cannot keep the index of {folder} there ("
        with pytest.raises(UserError, match=f"^{re.escape(sentence)}"):
            opened(folder, cache_dir=str(place))


def test_where_the_cache_lies(folder, tmp_path, monkeypatch):
    write(folder, numbered(1))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert opened(folder, cache_dir="").index.cache.parent == tmp_path / "xdg" / "sami-fast"
    monkeypatch.chdir(tmp_path)
    assert opened(Path("images"), cache_dir="").index.cache == opened(folder, cache_dir="").index.cache
    other = tmp_path / "other" / "images"
    write(other, numbered(1))
    assert opened(other, cache_dir="").index.cache != opened(folder, cache_dir="").index.cache


@pytest.mark.parametrize("holdout", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("count", [1, 2, 11])
def test_two_splits(folder, count, holdout):
    write(folder, numbered(count))
    training, evaluation = (opened(folder, holdout=holdout, split=split) for split in (0, 1))
    assert training.fingerprint == opened(folder, holdout=holdout).fingerprint
    if holdout == 0 or count == 1:
        assert numbers(training) == numbers(evaluation) == list(range(count))
        return
    seen = [numbers(training), numbers(evaluation)]
    assert sorted(seen[0] + seen[1]) == list(range(count))
    assert len(seen[1]) == max(1, round(holdout * count))
    assert training.fingerprint != evaluation.fingerprint or len(seen[0]) == len(seen[1])


def test_the_fingerprint_changes_with_the_files(folder):
    write(folder, numbered(5))
    found = [opened(folder).fingerprint]
    write(folder, {"more.png": numbered(1)["000.png"]})
    found.append(opened(folder).fingerprint)
    (folder / "more.png").rename(folder / "renamed.png")
    found.append(opened(folder).fingerprint)
    (folder / "001.png").write_bytes(b"")
    found.append(opened(folder, max_bad=0.5).fingerprint)
    found.append(opened(folder, max_bad=0.5, holdout=0.5).fingerprint)
    assert len(set(found)) == 5
    (folder / "renamed.png").unlink()
    (folder / "001.png").write_bytes(numbered(2)["001.png"])
    assert opened(folder).fingerprint == found[0]
    shutil.copytree(folder, folder.parent / "copy")
    assert opened(folder.parent / "copy").fingerprint == found[0]  # a run may move to another machine


def test_the_same_names_with_other_content_are_other_data(folder):
    """And the same content at another place and time is the same data."""
    write(folder, {f"{n}.ppm": encoded(np.full((8, 8, 3), n, np.uint8), "PPM") for n in range(4)})
    before = opened(folder)
    times = (folder / "2.ppm").stat()
    (folder / "2.ppm").write_bytes(encoded(np.full((8, 8, 3), 99, np.uint8), "PPM"))  # as long
    os.utime(folder / "2.ppm", ns=(times.st_atime_ns, times.st_mtime_ns))  # and as old, as unpacking programs make it
    after = opened(folder)
    assert after.fingerprint != before.fingerprint
    assert numbers(after) == [0, 1, 99, 3]
    for file in folder.iterdir():
        os.utime(file, (5, 5))
    (folder.parent / "elsewhere").mkdir()
    for file in folder.iterdir():
        (folder.parent / "elsewhere" / file.name).write_bytes(file.read_bytes())
    for other in (opened(folder), opened(folder.parent / "elsewhere")):
        assert (other.fingerprint, other.index.state) == (after.fingerprint, after.index.state)


def test_samples_stand_for_a_large_file(tmp_path):
    path, found = tmp_path / "file", set()
    for content in (bytes(100), bytes(99), b"\1" + bytes(99), bytes(99) + b"\1", bytes(49) + b"\1" + bytes(50), b"", bytes(3), b"\0\0\1"):
        path.write_bytes(content)
        found.add(content_of(path, 4, 5))
        assert content_of(path, 4, 5) in found
    assert len(found) == 8
    path.write_bytes(bytes(10) + b"\1" + bytes(89))
    assert content_of(path, 4, 5) in found  # between two samples: the price


def test_a_killed_look_goes_on_where_it_was(folder, monkeypatch):
    write(folder, numbered(40))
    monkeypatch.setattr(index, "PIECE", 8)
    looked = inspected(monkeypatch)
    inspect = image_folder._facts

    def killed(path):
        if path.name == "020.png":
            os._exit(9)
        return inspect(path)

    child = multiprocessing.get_context("fork").Process(
        target=lambda: monkeypatch.setattr(image_folder, "_facts", killed) or opened(folder)
    )
    child.start()
    child.join(60)
    assert child.exitcode == 9
    assert numbers(opened(folder)) == list(range(40))
    assert sorted(looked) == [f"{n:03}.png" for n in range(16, 40)]
    assert not list(index_file(folder).parent.glob("*.jsonl"))


def test_only_one_process_looks(folder, tmp_path, monkeypatch):
    """The others wait for it, and read what it found."""
    write(folder, numbered(8))
    inspect = image_folder._facts

    def slow(path):
        with open(tmp_path / "looked", "a") as file:
            file.write(f"{path.name}\n")
        time.sleep(0.05)
        return inspect(path)

    monkeypatch.setattr(image_folder, "_facts", slow)
    children = [multiprocessing.get_context("fork").Process(target=opened, args=(folder,)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert sorted((tmp_path / "looked").read_text().split()) == sorted(numbered(8))


def test_progress_is_told(folder, monkeypatch, caplog):
    write(folder, numbered(6))
    monkeypatch.setattr(index, "PIECE", 2)
    monkeypatch.setattr(index, "PROGRESS", 0.0)
    with caplog.at_level(logging.WARNING, "sami_fast.data"):
        opened(folder)
    assert re.search(r"images: looked at 2 of 6 new or changed images, \d+:\d\d:\d\d left", caplog.text)


@pytest.fixture
def nobody():
    """A place that everybody can reach, and no right to write into what root has made."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("only root can become nobody")
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        yield Path(place)
        os.seteuid(0)


def test_a_cache_that_must_not_be_written(nobody, monkeypatch, caplog):
    """What is in it is used, and what is not goes to the temporary folder."""
    folder = nobody / "images"
    write(folder, numbered(3))
    cached = opened(folder, cache_gib=0.0).index.cache
    write(folder, {"003.png": numbered(4)["003.png"]})
    (nobody / "tmp").mkdir()
    os.chmod(nobody / "tmp", 0o777)
    monkeypatch.setattr(tempfile, "tempdir", str(nobody / "tmp"))
    looked = inspected(monkeypatch)
    os.seteuid(65534)
    with caplog.at_level(logging.WARNING, "sami_fast.data"):
        assert numbers(opened(folder)) == [0, 1, 2, 3]
        assert looked == ["003.png"]
        assert numbers(opened(folder)) == [0, 1, 2, 3]
    assert looked == ["003.png"]
    found = f"data.cache_dir: {cached} cannot be written (Permission denied); what is made is kept in {nobody}/tmp/sami-fast-65534/"
    assert caplog.text.count(found) == 1
    assert len(list((nobody / "tmp").rglob("*.u8"))) == 1


def test_without_a_home(folder, tmp_path, monkeypatch):
    write(folder, numbered(2))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    assert opened(folder, cache_dir="").index.cache.parent == tmp_path / f"sami-fast-{os.geteuid()}/sami-fast"


# Decoded pixels


def undecodable(monkeypatch) -> None:
    monkeypatch.setattr(ImageFolder, "_decode", lambda self, places: pytest.fail(f"decoded {places}"))


@both_decoders
def test_the_second_epoch_does_not_decode(folder, decoder, monkeypatch):
    write(folder, {f"{n}.jpg": encoded(photo(seed=n), "JPEG") for n in range(4)})
    source = opened(folder, decoder=decoder)
    first = every(source)
    undecodable(monkeypatch)
    assert torch.equal(every(source), first)
    assert torch.equal(every(opened(folder, decoder=decoder)), first)  # nor does the next run
    (file,) = [path for path in kept(folder) if path.suffix == ".u8"]
    assert file.stat().st_size == 4 * (3 * 16 * 16 + 4)


def test_an_image_substituted_is_not_kept_as_the_lost_one(folder):
    write(folder, numbered(3))
    source = opened(folder, max_bad=0.5)
    (folder / "001.png").rename(folder / "away")
    assert numbers(source) == [0, 2, 2]
    (folder / "away").rename(folder / "001.png")
    again = opened(folder)
    assert again.index.state == source.index.state  # the same records
    assert numbers(again) == [0, 1, 2]


@pytest.mark.parametrize("harm", ["torn", "flipped", "zeros", "shortened", "longer", "emptied"])
def test_damaged_records_are_decoded_again(folder, harm, monkeypatch):
    write(folder, {f"{n}.png": encoded(photo(16, 16, seed=n), "PNG") for n in range(3)})
    first = every(opened(folder))
    (file,) = [path for path in kept(folder) if path.suffix == ".u8"]
    content = bytearray(file.read_bytes())
    record = len(content) // 3
    if harm == "torn":
        content[record + 100 : 2 * record] = bytes(record - 100)
    elif harm == "flipped":
        content[record + 5] ^= 1
    elif harm == "zeros":
        content[record : 2 * record] = bytes(record)
    file.write_bytes({"shortened": content[: record + 50], "longer": content + b"x", "emptied": b""}.get(harm, content))
    decoded, decode = [], ImageFolder._decode
    monkeypatch.setattr(ImageFolder, "_decode", lambda self, places: decoded.append(places) or decode(self, places))
    assert torch.equal(every(opened(folder)), first)
    assert decoded == {"shortened": [[1, 2]], "longer": [], "emptied": [[0, 1, 2]]}.get(harm, [[1]])
    assert torch.equal(every(opened(folder)), first)
    assert len(decoded) == (harm != "longer")


def test_pixels_of_an_earlier_state_are_deleted(folder):
    write(folder, numbered(3))
    every(opened(folder))
    (before,) = [path for path in kept(folder) if path.suffix == ".u8"]
    every(opened(folder, image_size=8))
    every(opened(folder, channels=1))
    every(opened(folder, crop="tight"))
    assert len([path for path in kept(folder) if path.suffix == ".u8"]) == 4  # these may be wanted again
    write(folder, {"001.png": encoded(np.full((16, 16, 3), 77, np.uint8), "PNG")})
    assert numbers(opened(folder)) == [0, 77, 2]
    assert not before.exists()
    assert len([path for path in kept(folder) if path.suffix == ".u8"]) == 4


def test_a_full_disk_ends_the_keeping_not_the_run(folder, monkeypatch):
    write(folder, numbered(4))
    source, tries = opened(folder), []

    def full(*arguments):
        tries.append(arguments)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    assert numbers(source) == numbers(source) == [0, 1, 2, 3]
    assert len(tries) == 1
    monkeypatch.undo()
    monkeypatch.setattr(os, "pwrite", lambda file, data, place: len(data) // 2)  # half of it fits
    assert numbers(opened(folder)) == [0, 1, 2, 3]


def test_a_cache_that_cannot_be_opened(folder, monkeypatch, caplog):
    write(folder, numbered(2))

    def refuse(*arguments):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(PixelCache, "open", refuse)
    with caplog.at_level(logging.WARNING, "sami_fast.data"):
        source = opened(folder)
    assert "decoded pixels are not kept: Read-only file system" in caplog.text
    assert numbers(source) == [0, 1]


def test_no_room_for_pixels(folder):
    write(folder, numbered(3))
    record = 3 * 16 * 16 + 4
    for room in (0.0, (3 * record - 1) / 2**30):
        source = opened(folder, cache_gib=room)
        assert numbers(source) == [0, 1, 2]
        assert source.cache is None
    assert [path.name for path in kept(folder)] == ["images.json"]
    assert opened(folder, cache_gib=3 * record / 2**30).cache is not None


@both_decoders
def test_threads(folder, decoder):
    write(folder, {f"{n}.jpg": encoded(photo(seed=n), "JPEG") for n in range(12)} | {"bad.png": damaged("PNG")})
    wanted = every(opened(folder, decoder=decoder, cache_gib=0.0, max_bad=0.1))
    source, generator = opened(folder, decoder=decoder, max_bad=0.1), np.random.default_rng(0)
    batches = [torch.from_numpy(generator.integers(0, 13, 7)) for _ in range(24)]
    with ThreadPoolExecutor(6) as pool:
        for batch, found in zip(batches, pool.map(source.training_pixels, batches), strict=True):
            assert torch.equal(found, wanted[batch])
    assert list(source.lost) == ["bad.png"]


def test_processes(folder):
    """All begin at once, without an index: each makes its own, and the last one whole stays."""
    write(folder, {f"{n}.jpg": encoded(photo(seed=n), "JPEG") for n in range(12)})
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.SimpleQueue()

    def read(start):
        barrier.wait(30)
        source = opened(folder)
        order = (torch.arange(12) * 5 + start) % 12
        found = torch.empty(12, 3, 16, 16, dtype=torch.uint8)
        for part in order.split(3):
            found[part] = source.pixels(part)
        results.put(hashlib.sha256(found.numpy().tobytes()).hexdigest())

    children = [context.Process(target=read, args=(start,)) for start in range(3)]
    for child in children:
        child.start()
    digests = {results.get() for _ in children}
    for child in children:
        child.join(30)
        assert child.exitcode == 0
    wanted = every(opened(folder, cache_gib=0.0))
    assert digests == {hashlib.sha256(wanted.numpy().tobytes()).hexdigest()}
    assert torch.equal(every(opened(folder)), wanted)
    assert sorted(path.suffix for path in kept(folder)) == [".json", ".u8"]


def test_more_images_than_a_batch_of_the_decoder(folder):
    write(folder, {f"{n:03}.png": encoded(np.full((4, 4, 3), n % 251, np.uint8), "PNG") for n in range(300)})
    for decoder in ("torch", *(["dali"] if available() else [])):
        source = opened(folder, decoder=decoder, image_size=4, cache_gib=0.0)
        assert numbers(source) == [n % 251 for n in range(300)]
    twice = source.pixels(torch.tensor([7, 7, 2, 7, 299 + 1]))  # also the same one more than once, and round again
    assert twice[:, 0, 0, 0].tolist() == [7, 7, 2, 7, 0]


def test_batches_own_their_memory(folder):
    """The decoder's memory is used again by its next batch."""
    write(folder, numbered(8))
    for decoder in ("torch", *(["dali"] if available() else [])):
        source = opened(folder, decoder=decoder, cache_gib=0.0)
        first = source.pixels(torch.arange(4))
        source.pixels(torch.arange(4, 8))
        assert first[:, 0, 0, 0].tolist() == [0, 1, 2, 3]


def test_through_the_config_and_the_feed(folder):
    write(folder, numbered(12))
    config = DataConfig(kind="image_folder", path=str(folder), image_size=8, channels=1, cache_dir=str(folder.parent / "cache"), workers=2)
    training, evaluation = (open_dataset(config, 0, split) for split in (0, 1))
    assert (training.size, evaluation.size, training.image_shape, training.workers) == (11, 1, (1, 8, 8), 2)
    feed = Feed(training, 11, 1, 0, 1, 0, torch.device("cpu"))
    try:
        images, _ = feed.micro_batch(0, 0)
    finally:
        feed.close()
    assert images.dtype == torch.float32
    shown = ((images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    held = ((evaluation.images(torch.arange(1))[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    assert sorted(shown + held) == list(range(12))


# CelebA


PARTS = [0, 0, 1, 2, 0, 1, 0, 2, 0, 0]  # of image n
TRAINING, VALIDATION, TEST = [0, 1, 4, 6, 8, 9], [2, 5], [3, 7]
NAMES = [f"{n + 1:06}.jpg" for n in range(10)]


def write_celeba(folder: Path, nested: bool = False) -> np.ndarray:
    """Ten images of one colour that tells their number; attribute a of image n is random. [10, 40] float32, 0 or 1."""
    values = np.random.default_rng(0).integers(0, 2, (10, 40))
    rows = [f"{name} {' '.join(f'{2 * v - 1:2}' for v in row)}" for name, row in zip(NAMES, values, strict=True)]
    text = "\n".join(["10", " ".join(f"Attribute_{a}" for a in range(40)), *rows]) + "\n"
    below = {"images": "Img/img_align_celeba", "attributes": "Anno/", "parts": "Eval/"} if nested else {"images": "img_align_celeba"}
    write(
        folder,
        {f"{below['images']}/{name}": encoded(np.full((218, 178, 3), 20 * n, np.uint8), "JPEG") for n, name in enumerate(NAMES)}
        | {f"{below.get('attributes', '')}list_attr_celeba.txt": text.encode()}
        | {
            f"{below.get('parts', '')}list_eval_partition.txt": "".join(
                f"{name} {part}\n" for name, part in zip(NAMES, PARTS, strict=True)
            ).encode()
        },
    )
    return values.astype(np.float32)


def celeba(folder: Path, **settings: object) -> CelebA:
    return CelebA(str(folder), **{"image_size": 16, "cache_dir": str(folder / "cache"), "decoder": "torch", "workers": 1} | settings)


def aligned(source: CelebA, values: np.ndarray) -> list[int]:
    """Which images are shown; each must come with its own attributes."""
    place = torch.arange(source.size)
    shown = [round(level / 20) for level in source.pixels(place)[:, 0, 8, 8].tolist()]
    assert np.array_equal(source.factors(place).numpy(), values[shown])
    return shown


@both_decoders
@pytest.mark.parametrize("nested", [False, True])
def test_celeba_from_end_to_end(tmp_path, nested, decoder):
    values = write_celeba(tmp_path, nested)
    training, validation = (celeba(tmp_path, decoder=decoder, split=split) for split in (0, 1))
    test = celeba(tmp_path, decoder=decoder, split=1, evaluation="test")
    assert [aligned(source, values) for source in (training, validation, test)] == [TRAINING, VALIDATION, TEST]
    assert training.factor_names == tuple(f"Attribute_{a}" for a in range(40))
    assert training.attribute_names == {*training.factor_names}
    assert training.factors(torch.tensor([1])).dtype == torch.float32
    assert len({source.fingerprint for source in (training, validation, test)}) == 3


@both_decoders
@pytest.mark.parametrize("harm", ["missing", "zero bytes", "garbage"])
def test_celeba_with_a_bad_image(tmp_path, harm, decoder):
    """The attributes stay with their images."""
    values = write_celeba(tmp_path)
    file = tmp_path / "img_align_celeba" / NAMES[4]
    file.unlink() if harm == "missing" else file.write_bytes(b"" if harm == "zero bytes" else b"x" * 1000)
    source = celeba(tmp_path, decoder=decoder, max_bad=0.2)
    assert list(source.index.bad) == [NAMES[4]]
    assert aligned(source, values) == [n for n in TRAINING if n != 4]
    with pytest.raises(UserError, match=r"^data\.path: 1 of 6 images in .*img_align_celeba cannot be read, .* 000005\.jpg \("):
        celeba(tmp_path, decoder=decoder)
    assert aligned(celeba(tmp_path, decoder=decoder, split=1), values) == VALIDATION  # the other part is whole


def test_celeba_lists_what_it_shows(tmp_path):
    """Files that no list names are not shown, and both parts share one index."""
    values = write_celeba(tmp_path)
    write(tmp_path / "img_align_celeba", {"extra.jpg": encoded(photo(), "JPEG"), "broken.jpg": b""})
    assert aligned(celeba(tmp_path), values) == TRAINING
    celeba(tmp_path, split=1)
    images = tmp_path / "img_align_celeba"
    known = json.loads((cache_dir(str(tmp_path / "cache"), images) / "images.json").read_text())["files"]
    assert known.keys() == {NAMES[n] for n in TRAINING + VALIDATION}


def test_parts_of_celeba_keep_their_pixels_apart(tmp_path, monkeypatch):
    values = write_celeba(tmp_path)
    sources = [celeba(tmp_path), celeba(tmp_path, split=1)]
    for source in sources:
        aligned(source, values)
    images = ImageFolder(str(tmp_path / "img_align_celeba"), image_size=16, cache_dir=str(tmp_path / "cache"), decoder="torch", holdout=0.0)
    every(images)  # the same folder seen as any other
    undecodable(monkeypatch)
    assert [aligned(celeba(tmp_path, split=split), values) for split in (0, 1)] == [TRAINING, VALIDATION]


@pytest.mark.parametrize(("crop", "box"), [("center", (20, 0, 178)), ("tight", (49, 29, 119)), ("face", (57, 25, 128))])
def test_crops_of_celeba(tmp_path, crop, box):
    write_celeba(tmp_path)
    pixels, (top, left, side) = photo(218, 178), box
    (tmp_path / "img_align_celeba" / NAMES[0]).write_bytes(encoded(pixels, "PNG"))
    config = DataConfig(kind="celeba", path=str(tmp_path), image_size=32, cache_dir=str(tmp_path / "cache"), decoder="torch")
    source = open_dataset(DataConfig(**{**vars(config), "celeba": type(config.celeba)(crop=crop)}), 0)
    cut = Image.fromarray(pixels[top : top + side, left : left + side]).resize((32, 32), Image.Resampling.BILINEAR)
    assert np.abs(source.pixels(torch.tensor([0]))[0].permute(1, 2, 0).numpy().astype(int) - np.array(cut)).max() <= 1


def test_exif_transpose_agrees():
    """`TURNED` is the standard's table; Pillow's own must be the same."""
    for orientation, turn in TURNED.items():
        image = Image.open(io.BytesIO(encoded(photo(), "PNG", exif=exif(orientation))))
        assert np.array_equal(np.array(ImageOps.exif_transpose(image)), turn(photo()))


def test_a_cache_that_is_open_at_the_end_of_a_process_says_nothing(tmp_path):
    code = """
import pathlib, sys
from sami_fast.data.cache import PixelCache
cache = PixelCache(pathlib.Path(sys.argv[1]), 3, (1, 2, 2))
held = cache  # by a module, which lets go of it after `os` is taken down
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "cache.u8")], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
