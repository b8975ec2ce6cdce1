"""Procedural sprites, still and moving; and the video files that tests and benchmarks write."""

import math
import os
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import relative_error

from benchmarks import write_video as writing
from benchmarks.write_video import available_codecs, write_video
from sami_fast.data.sprites import Sprites

SHAPES = ("square", "ellipse", "heart")
RANGES = {"scale": (0.5, 1.0), "rotation": (0.0, 1.0), "x": (0.2, 0.8), "y": (0.3, 0.7)}
CONSTANT = RANGES | {"scale": (0.75, 0.75), "y": (0.5, 0.5)}
HALF_DIAGONAL = (3 - math.sqrt(2)) / 2  # of the heart's square, where the heart's circle has radius 1
AREAS = {"square": 2.0, "ellipse": math.pi / 2, "heart": (2 + math.pi / 2) * HALF_DIAGONAL**2}  # in squares of that radius


def sprites(
    shapes=SHAPES, ranges=RANGES, size: int = 32, channels: int = 1, seed: int = 0, split: int = 0, clip_length: int = 5
) -> Sprites:
    return Sprites(size, channels, shapes, ranges, seed, split, clip_length)


def drawn(shape: str, scale: float = 1.0, rotation: float = 0.0, x: float = 0.5, y: float = 0.5, size: int = 64) -> torch.Tensor:
    """[H, W]: one sprite."""
    return sprites(size=size).render(torch.tensor([SHAPES.index(shape), scale, rotation, x, y]))[0]


# Still sprites


def box_distance(across: float, along: float, half: float) -> float:
    """Signed, to a square: to its nearest side, or outside of its corners to the nearest corner."""
    across, along = abs(across) - half, abs(along) - half
    return math.hypot(across, along) if across > 0 and along > 0 else max(across, along)


def outline_distance(shape: str, point: complex) -> float:
    """Of a point seen from an upright sprite with a circle of radius 1; the imaginary axis points down."""
    if shape == "square":
        return box_distance(point.real, point.imag, 1 / math.sqrt(2))
    if shape == "ellipse":
        f, gradient = point.real**2 + (2 * point.imag) ** 2 - 1, complex(2 * point.real, 8 * point.imag)
        return f / abs(gradient)
    point -= 0.5j * (math.sqrt(2) - 1)
    side = math.sqrt(2) * HALF_DIAGONAL
    turned = point * complex(1, 1) / math.sqrt(2)  # by an eighth of a turn: the square stands on a side
    lobes = [complex(sign * HALF_DIAGONAL / 2, -HALF_DIAGONAL / 2) for sign in (-1, 1)]
    return min(box_distance(turned.real, turned.imag, side / 2), *(abs(point - lobe) - side / 2 for lobe in lobes))


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (17, 3)])
def test_every_pixel_of_a_sprite(size, channels):
    source, index = sprites(size=size, channels=channels), torch.arange(8)
    images, factors = source.images(index), source.factors(index)
    assert set(factors[:, 0].tolist()) == {0, 1, 2}
    assert images.shape == (8, channels, size, size)
    assert source.image_shape == (channels, size, size)
    assert source.size is None
    assert images.dtype == factors.dtype == torch.float32
    assert images.is_contiguous()
    for image, (shape, scale, rotation, x, y) in zip(images, factors.tolist(), strict=True):
        radius = 0.2 * scale * size  # pixels
        for row in range(size):
            for column in range(size):
                point = complex(column + 0.5 - x * size, row + 0.5 - y * size) / radius
                upright = point * complex(math.cos(2 * math.pi * rotation), -math.sin(2 * math.pi * rotation))
                pixel = 2 / (1 + math.exp(4 * radius * outline_distance(SHAPES[int(shape)], upright))) - 1
                for channel in range(channels):
                    assert image[channel, row, column].item() == pytest.approx(pixel, abs=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rotation", [0.0, 0.3])
def test_the_area_grows_with_the_square_of_the_scale(shape, rotation):
    for scale in (0.5, 1.0, 2.0):
        covered = (drawn(shape, scale, rotation, 0.51, 0.48) + 1).double().sum().item() / 2  # pixels
        assert covered == pytest.approx(AREAS[shape] * (0.2 * scale * 64) ** 2, rel=0.03 / scale)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_sprite_touches_its_circle_and_stays_inside(shape):
    centres = (torch.arange(64) + 0.5) / 64 - 0.5
    away = torch.hypot(centres[:, None], centres[None, :])[(drawn(shape, 2.0) > 0)]  # scale 2: a radius of 0.4 sides
    assert 0.4 - 1.5 / 64 < away.max() < 0.4 + 0.5 / 64


def test_turns():
    def change(shape: str, turns: float) -> float:
        return (drawn(shape, rotation=0.05 + turns) - drawn(shape, rotation=0.05)).abs().max().item()

    same, other = 1e-3, 0.5
    assert change("square", 0.25) < same
    assert change("square", 0.125) > other
    assert change("ellipse", 0.5) < same
    assert change("ellipse", 0.25) > other
    assert change("heart", 0.5) > other
    for shape in SHAPES:
        assert change(shape, 1.0) < same
        upright = drawn(shape)
        assert torch.allclose(upright, upright.flip(1), atol=same)  # its left is its right
        assert torch.allclose(drawn(shape, rotation=0.25), upright.rot90(-1), atol=same)  # clockwise
    widths = (drawn("heart", 2.0) > 0).sum(1)
    widths = widths[widths > 0]
    assert widths[0] > 2 * widths[-1]  # upright it ends in a point, downwards


@pytest.mark.parametrize("shape", SHAPES)
def test_whole_pixels_of_translation_shift_the_image(shape):
    image = drawn(shape, 0.8, 0.1, 0.5, 0.5)
    shifted = drawn(shape, 0.8, 0.1, 0.5 + 7 / 64, 0.5 - 5 / 64)
    assert torch.allclose(shifted, image.roll((-5, 7), (0, 1)), atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_edge_is_soft(shape):
    image = drawn(shape, rotation=0.07)
    assert image.min() >= -1
    assert image.max() <= 1
    assert image.max() > 0.999
    assert image.min() < -0.999
    grey = (image.abs() < 0.99).sum().item()
    assert 20 < grey < 200  # of 4096: a line about one pixel wide, whose length is the outline's
    for step in ({"scale": 1.001}, {"rotation": 0.0705}, {"x": 0.5005}, {"y": 0.5005}):  # each moves the outline by 0.05 pixels or less
        change = (drawn(shape, **{"rotation": 0.07} | step) - image).abs().max().item()
        assert 1e-4 < change < 0.15


def test_factors_fill_their_ranges():
    source, index = sprites(), torch.arange(4000)
    factors = source.factors(index)
    assert source.factor_names == ("shape", *RANGES)
    assert factors.shape == (4000, 5)
    for column, (low, high) in enumerate(RANGES.values(), start=1):
        values = factors[:, column]
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high
        assert values.mean().item() == pytest.approx((low + high) / 2, abs=0.03 * (high - low))
    counts = factors[:, 0].long().bincount(minlength=3)
    assert (counts / 4000 - 1 / 3).abs().max() < 4 * (2 / 9 / 4000) ** 0.5
    assert (torch.corrcoef(factors.T) - torch.eye(5)).abs().max() < 5 / 4000**0.5


def test_constant_factors_are_not_reported():
    index = torch.arange(20)
    source, full = sprites(ranges=CONSTANT), sprites()
    assert source.factor_names == ("shape", "rotation", "x")
    assert torch.equal(source.factors(index), full.factors(index)[:, [0, 2, 3]])  # the others keep their random numbers
    assert torch.equal(source.clip_factors(index), full.clip_factors(index)[..., [0, 2, 3]])
    one = sprites(shapes=["heart"])
    assert one.factor_names == tuple(RANGES)
    assert torch.equal(one.factors(index), full.factors(index)[:, 1:])
    nothing = sprites(["square"], dict.fromkeys(RANGES, (0.5, 0.5)))
    assert nothing.factor_names == ()
    assert nothing.factors(index).shape == (20, 0)
    assert nothing.clip_factors(index).shape == (20, 5, 0)
    assert torch.equal(nothing.images(index[:1]), nothing.clips(index[5:6])[:, 3])


def test_the_shape_is_its_number_in_the_list():
    index = torch.arange(12)
    images, reordered = sprites().images(index), sprites(("heart", "square", "ellipse")).images(index)
    shapes = sprites().factors(index)[:, 0].tolist()
    states = sprites().factors(index)
    for number, shape in enumerate(shapes):
        state = states[number].clone()
        state[0] = SHAPES.index(("heart", "square", "ellipse")[int(shape)])
        assert torch.equal(reordered[number], sprites().render(state))
    assert not torch.equal(images, reordered)


def test_images_and_clips_are_functions_of_seed_split_and_index():
    index = torch.arange(30)
    source = sprites()
    images, clips = source.images(index), source.clips(index)
    assert torch.equal(images, sprites().images(index))
    assert torch.equal(clips, sprites().clips(index))
    assert relative_error(source.images(torch.tensor([7, 2, 7])), images[[7, 2, 7]]) < 1e-6
    assert relative_error(source.clips(torch.tensor([7, 2, 7])), clips[[7, 2, 7]]) < 1e-6
    for other in (sprites(seed=1), sprites(split=1), sprites(seed=1, split=1)):
        assert (other.factors(index) != source.factors(index))[:, 1:].all()
        assert (other.clip_factors(index) != source.clip_factors(index))[..., 1:].all()
    assert source.images(torch.zeros(0, dtype=torch.int64)).shape == (0, 1, 32, 32)
    assert source.clips(torch.zeros(0, dtype=torch.int64)).shape == (0, 5, 1, 32, 32)


# Moving sprites


def test_every_frame_is_the_image_of_its_factors():
    source, index = sprites(channels=3, clip_length=4), torch.arange(9)
    clips, factors = source.clips(index), source.clip_factors(index)
    assert clips.shape == (9, 4, 3, 32, 32)
    assert factors.shape == (9, 4, 5)
    assert clips.dtype == factors.dtype == torch.float32
    for clip, states in zip(clips, factors, strict=True):
        for frame, state in zip(clip, states, strict=True):
            assert torch.allclose(frame, source.render(state), atol=1e-5)


def test_clips_move_straight_at_constant_velocity_between_two_draws():
    factors = sprites(clip_length=16).clip_factors(torch.arange(2000))
    assert factors.diff(n=2, dim=1).abs().max() < 1e-6
    assert (factors[..., 0].diff(dim=1) == 0).all()  # the shape stays
    assert (factors[..., 1:].diff(dim=1) != 0).all()
    for column, (low, high) in enumerate(RANGES.values(), start=1):
        assert factors[..., column].min() >= low
        assert factors[..., column].max() <= high
        for end in (0, -1):
            values = factors[:, end, column]
            assert values.min() < low + 0.02 * (high - low)
            assert values.max() > high - 0.02 * (high - low)
    ends = torch.cat((factors[:, 0], factors[:, -1, 1:]), 1)
    assert (torch.corrcoef(ends.T) - torch.eye(9)).abs().max() < 5 / 2000**0.5
    # Straight: as long as the distance between its ends, in factors of one unit each.
    path = factors[..., 1:].double()
    length = path.diff(dim=1).norm(dim=2).sum(1)
    assert relative_error(length, (path[:, -1] - path[:, 0]).norm(dim=1)) < 1e-6


def test_clips_and_images_do_not_share_random_numbers():
    source, count = sprites(), 3000
    stills, moving = source.factors(torch.arange(count)), source.clip_factors(torch.arange(count))
    for end in (0, -1):
        for column in range(1, 5):
            assert torch.isin(stills[:, column], moving[:, end, column]).float().mean() < 0.01  # float32 numbers meet by chance
        both = torch.corrcoef(torch.cat((stills, moving[:, end]), 1).T)[:5, 5:]
        assert both.abs().max() < 5 / count**0.5


def test_a_clip_of_one_frame():
    source, index = sprites(clip_length=1), torch.arange(6)
    assert source.clips(index).shape == (6, 1, 1, 32, 32)
    assert torch.equal(source.clip_factors(index)[:, 0], sprites(clip_length=7).clip_factors(index)[:, 0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shapes": []}, "shapes: expected some of square, ellipse, heart, found []"),
        ({"shapes": ["square", "star"]}, "shapes: expected some of square, ellipse, heart, found ['square', 'star']"),
        ({"clip_length": 0}, "clip_length: expected 1 or more, found 0"),
    ],
)
def test_impossible_sprites(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        sprites(**arguments)


# Video files


def frames_of(clip: torch.Tensor) -> np.ndarray:
    """[T, 1, H, W] in [-1, 1] -> [T, H, W, 3] uint8."""
    return ((clip + 1) * 127.5).round().byte().movedim(1, 3).expand(-1, -1, -1, 3).numpy()


def coloured(length: int = 12, height: int = 48, width: int = 64) -> np.ndarray:
    """[T, H, W, 3] uint8: smooth colours that drift."""
    time, row, column = np.meshgrid(np.arange(length), np.arange(height), np.arange(width), indexing="ij")
    red, green = 255 * column / (width - 1), 255 * row / (height - 1)
    return np.stack((red, green, 127.5 + 100 * np.sin(time / 5 + column / 20)), axis=-1).round().astype(np.uint8)


def decode(path) -> tuple[np.ndarray, list[float], list[int]]:
    """The frames, their times in seconds, and which of them are keyframes."""
    av = pytest.importorskip("av")
    with av.open(str(path)) as container:
        decoded = list(container.decode(video=0))
    keys = [number for number, frame in enumerate(decoded) if frame.key_frame]
    return np.stack([frame.to_ndarray(format="rgb24") for frame in decoded]), [float(frame.time) for frame in decoded], keys


def mean_error(found: np.ndarray, expected: np.ndarray) -> float:
    """In levels of 255."""
    return np.abs(found.astype(float) - expected).mean().item()


@pytest.fixture
def all_codecs():
    pytest.importorskip("av")
    return available_codecs()


@pytest.mark.parametrize("codec", list(writing.ENCODERS))
def test_what_is_encoded_is_decoded(tmp_path, all_codecs, codec, capfd):
    if codec not in all_codecs:
        pytest.skip(f"this PyAV does not write {codec}")
    for name, frames, limit in (
        ("sprite", frames_of(sprites(size=64, clip_length=20).clips(torch.tensor([3]))[0]), 1.0),
        ("colours", coloured(), 5.0),  # the colours' resolution is halved
    ):
        path = tmp_path / f"{name}.mkv"
        write_video(path, frames, codec=codec, fps=25)
        found, times, _ = decode(path)
        assert found.shape == frames.shape
        assert mean_error(found, frames) < limit
        assert mean_error(found[::-1], frames) > 2 * mean_error(found, frames)  # in this order
        assert np.diff(times) == pytest.approx(1 / 25, abs=1.1e-3)  # .mkv counts milliseconds
    assert capfd.readouterr() == ("", "")  # encoders do not talk


@pytest.mark.parametrize("codec", ["h264", "vp9", "mpeg4", "av1", "h265", "vp8"])
def test_keyframes_are_no_farther_apart_than_asked(tmp_path, all_codecs, codec):
    if codec not in all_codecs:
        pytest.skip(f"this PyAV does not write {codec}")
    write_video(tmp_path / "a.mkv", coloured(14), codec=codec, keyframe_interval=4)
    _, _, keys = decode(tmp_path / "a.mkv")
    assert keys[0] == 0
    assert np.diff([*keys, 14]).max() <= 4
    write_video(tmp_path / "b.mkv", coloured(3), codec=codec, keyframe_interval=1)
    assert decode(tmp_path / "b.mkv")[2] == [0, 1, 2]


def test_settings(tmp_path, all_codecs):
    if "h264" not in all_codecs:
        pytest.skip("this PyAV does not write h264")
    frames = coloured()
    for suffix in (".mkv", ".mp4", ".mov", ".avi"):
        write_video(tmp_path / f"a{suffix}", frames, codec="h264")
        assert mean_error(decode(tmp_path / f"a{suffix}")[0], frames) < 5
    write_video(str(tmp_path / "sharp.mkv"), frames, codec="h264", pixel_format="yuv444p", options={"crf": "0"})
    assert mean_error(decode(tmp_path / "sharp.mkv")[0], frames) < 1.5  # what is left is rounding of the colours
    odd = coloured(height=33, width=35)
    write_video(tmp_path / "odd.mkv", odd, codec="h264", pixel_format="yuv444p")
    assert decode(tmp_path / "odd.mkv")[0].shape == odd.shape
    write_video(tmp_path / "film.mp4", frames, codec="h264", fps=Fraction(24000, 1001))
    assert np.diff(decode(tmp_path / "film.mp4")[1]) == pytest.approx(1001 / 24000, abs=1e-4)
    write_video(tmp_path / "view.mkv", frames[:, ::2, ::2], codec="h264")  # memory need not be contiguous
    assert mean_error(decode(tmp_path / "view.mkv")[0], frames[:, ::2, ::2]) < 8
    write_video(tmp_path / "one.mkv", frames[:1], codec="h264")
    assert len(decode(tmp_path / "one.mkv")[0]) == 1


def test_encoders_that_this_build_lacks(tmp_path, all_codecs, monkeypatch):
    lacking = writing.Encoder("no_such_encoder", {})
    monkeypatch.setattr(writing, "ENCODERS", {"av1": (lacking,), "h264": (lacking, writing.Encoder("mpeg4", {}))})
    assert available_codecs() == ("h264",)
    with pytest.raises(ValueError, match="codec: cannot write 'av1' here; the installed PyAV writes h264"):
        write_video(tmp_path / "a.mkv", coloured(2), codec="av1")
    write_video(tmp_path / "a.mkv", coloured(2), codec="h264")  # the next in line
    assert len(decode(tmp_path / "a.mkv")[0]) == 2


def test_writing_leaves_the_threads_priority_alone(tmp_path):
    """SVT-AV1 makes the thread that calls it a real-time one where it may; everything else on the machine would then wait for it."""
    before = os.sched_getscheduler(0)
    for codec in available_codecs():
        write_video(tmp_path / f"{codec}.mkv", np.zeros((3, 64, 64, 3), np.uint8), codec=codec)
        assert os.sched_getscheduler(0) == before, codec
