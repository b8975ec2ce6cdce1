"""Folders of videos: clips encoded here are read back frame for frame, in any container, by both decoders, whole or broken."""

import logging
import os
import re
import shutil
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
import torch

import sami_fast.data.video_folder as video_folder
from benchmarks.write_video import available_codecs, write_video
from sami_fast.data import Feed, Sprites, VideoFolder
from sami_fast.data.dali import available as dali_available
from sami_fast.data.decode import DALI_CODECS, BadFile, Turn, Video, _packets, cut_out, decode_frames, video_facts
from sami_fast.data.order import pooled_order
from sami_fast.errors import UserError

av = pytest.importorskip("av")

# nothing here may hang
pytestmark = [pytest.mark.usefixtures("no_thread_is_left"), pytest.mark.timeout(60)]

CPU = torch.device("cpu")
SIDE, DARK, LIGHT = 64, 30, 220
CODECS = available_codecs()
needs_dali = pytest.mark.skipif(not dali_available(), reason="needs DALI")
DECODERS = ["torch", pytest.param("dali", marks=needs_dali)]


def bars(count: int, clip: int = 0, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """[count, H, W, 3] uint8: frame n is bright in its n + 2 leftmost columns; the lowest quarter has a brightness of the clip's own."""
    frames = np.full((count, height, width, 3), DARK, np.uint8)
    for n in range(count):
        frames[n, :, : n + 2] = LIGHT
    frames[:, 3 * height // 4 :] = DARK + 20 * clip
    return frames


def number_shown(frame: np.ndarray, width: int = SIDE) -> int:
    """Which frame of `bars` this is; [H, W, 3]. An encoder's error of the mean must stay below half a column, 1.5 levels of 255."""
    upper = frame[: 3 * len(frame) // 4 - 2].astype(float)
    return round((upper.mean() - DARK) / (LIGHT - DARK) * width - 2)


def clip_shown(frame: np.ndarray) -> int:
    return round((frame[3 * len(frame) // 4 + 4 :].astype(float).mean() - DARK) / 20)


def shown(pixels: torch.Tensor) -> list[tuple[int, int]]:
    """Clip and number of each frame. [n, 3, H, W] uint8."""
    return [(clip_shown(frame), number_shown(frame)) for frame in pixels.permute(0, 2, 3, 1).numpy()]


def encode(path, frames, codec: str, container: str, *, pixel_format="yuv420p", pts=None, audio=False, **options: str) -> None:
    """As `write_video`, for what that does not write: other containers, uneven times (in milliseconds), a sound track."""
    with av.open(str(path), "w", format=container) as output:
        stream = output.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixel_format
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        sound = output.add_stream("aac", rate=48000) if audio else None
        for n, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if pts is not None:
                frame.pts, frame.time_base = int(pts[n]), Fraction(1, 1000)
            output.mux(stream.encode(frame))
            if sound:
                silence = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
                silence.sample_rate = 48000
                output.mux(sound.encode(silence))
        output.mux(stream.encode(None))
        if sound:
            output.mux(sound.encode(None))


def needs_encoder(name: str) -> None:
    try:
        av.codec.Codec(name, "w")
    except ValueError:
        pytest.skip(f"this PyAV has no {name}")


def one_after_the_other(path) -> list[np.ndarray]:
    """Every frame of a file as a player shows it."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def segment_by_segment(path, video: Video, shortest: int = 8, longest: int = 20) -> list[np.ndarray]:
    return [f for key, start, stop in video.segments(shortest, longest) for f in decode_frames(path, video, key, range(start, stop))]


def check_frames(path, count: int = 60, width: int = SIDE, offset: bool = False) -> Video:
    """Decoded in segments from their key frames, in any order, every frame is bit for bit what a player shows at its place."""
    video, expected = video_facts(path), one_after_the_other(path)
    assert video.frames == len(expected) == count
    for frame, truth in zip(segment_by_segment(path, video), expected, strict=True):
        assert np.array_equal(frame, truth)
    numbers = [number_shown(frame, width) for frame in expected]
    if offset:  # grey and 10-bit encoders stretch all levels a little
        assert numbers == sorted(set(numbers))
    else:
        assert numbers == list(range(count))
    some = sorted({0, count // 3, count - 1})
    for frame, n in zip(decode_frames(path, video, 0, some), some, strict=True):
        assert np.array_equal(frame, expected[n])
    return video


def opened(folder, tmp_path, **settings) -> VideoFolder:
    """Nothing is kept on the disk, so that everything is decoded."""
    return VideoFolder(
        str(folder), **{"holdout": 0.0, "cache_dir": str(tmp_path / "cache"), "cache_gib": 0.0, "workers": 2, "pool": 60} | settings
    )


def places_of(dataset: VideoFolder) -> list[tuple[int, int]]:
    """Video and number of the frame of each index."""
    found = []
    for place in dataset.places.tolist():
        v = int(np.searchsorted(dataset.offsets, place, side="right")) - 1
        found.append((v, place - int(dataset.offsets[v])))
    return found


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A folder with a clip of each codec; names are in the order of the clips' numbers."""
    folder = tmp_path_factory.mktemp("mixed")
    suffixes = {"vp8": ".webm", "mjpeg": ".mov", "h264": ".mp4", "mpeg4": ".avi"}
    for clip, codec in enumerate(CODECS):
        write_video(folder / f"{clip}_{codec}{suffixes.get(codec, '.mkv')}", bars(60, clip), codec=codec, keyframe_interval=12)
    return folder


# Frame for frame


@pytest.mark.parametrize(
    ("suffix", "interval"),
    [(".mkv", 1), (".mkv", 40), (".mp4", None), *((suffix, 7) for suffix in (".mkv", ".mp4", ".mov", ".avi", ".webm"))],
)
@pytest.mark.parametrize("codec", CODECS)
def test_frames_by_number(tmp_path, codec, suffix, interval):
    path = tmp_path / f"clip{suffix}"
    try:
        write_video(path, bars(60), codec=codec, keyframe_interval=interval)
    except (ValueError, av.FFmpegError):
        pytest.skip(f"{suffix} files do not hold {codec}")
    video = check_frames(path)
    assert video.codec == {"h265": "hevc"}.get(codec, codec)
    assert video.keys[0] == 0
    if interval == 7 and len(video.pts):
        assert np.diff([*video.keys, 60]).max() <= 7


@pytest.mark.parametrize(
    ("codec", "suffix", "options"),
    [
        ("h264", ".mp4", {"bf": "3", "x264-params": "b-pyramid=2"}),
        ("h264", ".mkv", {"bf": "3", "x264-params": "open-gop=1:b-pyramid=2"}),
        ("h264", ".avi", {"bf": "3"}),
        ("h264", ".mp4", {"x264-params": "intra-refresh=1"}),
        ("h265", ".mp4", {"x265-params": "log-level=error:open-gop=1:bframes=4:keyint=12:min-keyint=12"}),
        ("h265", ".mkv", {"x265-params": "log-level=error:open-gop=1:bframes=4:keyint=12:min-keyint=12"}),
        ("mpeg4", ".mp4", {"bf": "2"}),
        ("mpeg4", ".avi", {"bf": "2"}),
        ("vp8", ".webm", {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good"}),
        ("vp9", ".webm", {"auto-alt-ref": "6", "lag-in-frames": "25", "deadline": "good"}),
        ("vp9", ".mp4", {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good"}),
    ],
)
def test_frames_in_another_order_than_packets(tmp_path, codec, suffix, options):
    if codec not in CODECS:
        pytest.skip(f"this PyAV does not write {codec}")
    path = tmp_path / f"clip{suffix}"
    write_video(path, bars(60), codec=codec, keyframe_interval=12, options=options)
    check_frames(path)


@pytest.mark.parametrize(
    ("name", "codec", "container", "options"),
    [
        ("a.ts", "libx264", "mpegts", {"g": "12"}),  # no index: seeking lands somewhere
        ("a.ts", "mpeg2video", "mpegts", {"g": "12", "bf": "2"}),
        ("a.mpg", "mpeg1video", "mpeg", {"g": "12"}),  # times of some frames alone
        ("a.mpg", "mpeg2video", "mpeg", {"g": "12", "bf": "2"}),
        ("a.wmv", "wmv2", "asf", {}),
        ("a.flv", "libx264", "flv", {"g": "12"}),
        ("a.flv", "flv1", "flv", {}),
        ("a.y4m", "wrapped_avframe", "yuv4mpegpipe", {}),
        ("raw.mp4", "libx264", "h264", {"g": "12"}),  # no times at all
        ("raw.mp4", "mpeg4", "m4v", {"g": "12"}),
        ("a.mkv", "ffv1", "matroska", {}),
    ],
)
def test_other_containers(tmp_path, name, codec, container, options):
    needs_encoder(codec)
    encode(tmp_path / name, bars(60), codec, container, b="2000000", **options)
    video = check_frames(tmp_path / name)
    assert bool(len(video.pts)) == (container not in ("mpeg", "h264"))
    for key in video.keys:  # wherever seeking lands, decoding starts no later than asked
        with av.open(str(tmp_path / name)) as opened_file:
            first = next(_packets(opened_file, opened_file.streams.video[0], video, key))
            assert first.is_keyframe
            assert not len(video.pts) or first.pts <= video.pts[key]


@pytest.mark.parametrize(
    ("codec", "container"), [("libx264", "mp4"), ("libx264", "matroska"), ("libvpx-vp9", "webm"), ("libvpx", "webm"), ("mjpeg", "matroska")]
)
@pytest.mark.parametrize("start", [0, 5000])
def test_variable_frame_rate(tmp_path, codec, container, start):
    needs_encoder(codec)
    pts = start + 10 * np.cumsum(np.random.default_rng(0).integers(1, 9, 60))
    encode(tmp_path / "a.mkv", bars(60), codec, container, pixel_format="yuvj420p" if codec == "mjpeg" else "yuv420p", pts=pts, g="20")
    video = check_frames(tmp_path / "a.mkv")
    assert len(set(np.diff(video.pts).tolist())) > 3
    facts = video_folder._facts(tmp_path / "a.mkv")
    assert np.array_equal(video_folder._video(facts).pts, video.pts)


def test_a_sound_track_is_passed_over(tmp_path):
    needs_encoder("libx264")
    encode(tmp_path / "a.mp4", bars(60), "libx264", "mp4", audio=True, g="20")
    check_frames(tmp_path / "a.mp4")


@pytest.mark.parametrize("codec", CODECS)
def test_a_video_of_one_frame(tmp_path, codec):
    write_video(tmp_path / "a.mkv", bars(1), codec=codec)
    check_frames(tmp_path / "a.mkv", count=1)
    dataset = opened(tmp_path, tmp_path, clip_length=1)
    assert shown(dataset.pixels(torch.tensor([0, 5, -1]))) == [(0, 0)] * 3
    assert dataset.num_clips == 1


@pytest.mark.parametrize(
    ("codec", "pixel_format", "height", "width"),
    [
        *(("h264", "yuv420p10le", 64, 64), ("h265", "yuv420p10le", 64, 64), ("av1", "yuv420p10le", 64, 64), ("h264", "gray", 64, 64)),
        *(("vp9", "yuv444p", 37, 51), ("h264", "yuv444p", 33, 35), ("mpeg4", None, 16, 16), ("vp8", None, 18, 34), ("vp9", None, 480, 854)),
    ],
)
def test_pixel_formats_and_sizes(tmp_path, codec, pixel_format, height, width):
    if codec not in CODECS:
        pytest.skip(f"this PyAV does not write {codec}")
    count = min(14, width - 2)
    write_video(tmp_path / "a.mkv", bars(count, 0, height, width), codec=codec, pixel_format=pixel_format)
    video = check_frames(tmp_path / "a.mkv", count, width, offset=pixel_format in ("gray", "yuv420p10le"))
    assert (video.height, video.width) == (height, width)
    dataset = opened(tmp_path, tmp_path, image_size=16, channels=1)
    assert dataset.pixels(torch.arange(count)).shape == (count, 1, 16, 16)


@pytest.mark.parametrize("matrix", [(s, 0, 0, t) for s in (1, -1) for t in (1, -1)] + [(0, s, t, 0) for s in (1, -1) for t in (1, -1)])
def test_a_video_that_is_stored_turned_or_mirrored(tmp_path, matrix):
    """The display matrix of the track says so, as telephones write it: all eight ways of EXIF."""
    if "h264" not in CODECS:
        pytest.skip("this PyAV does not write h264")
    path, frames = tmp_path / "a.mp4", bars(20, 0, 48, 64)
    write_video(path, frames, codec="h264")
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 4 + 40  # after version, times, track, duration, layer, group and volume
    assert struct.unpack(">9i", data[place : place + 36])[::4] == (1 << 16, 1 << 16, 1 << 30)
    a, b, c, d = matrix
    data[place : place + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    # Pixel (x, y) is shown at (a x + c y, b x + d y), moved to where no place is negative.
    y, x = np.mgrid[:48, :64]
    right, down = a * x + c * y, b * x + d * y
    right, down = right - right.min(), down - down.min()
    turned = np.zeros((20, down.max() + 1, right.max() + 1, 3), np.uint8)
    turned[:, down, right] = frames
    video = video_facts(path)
    assert (video.height, video.width) == turned.shape[1:3]
    for frame, expected in zip(decode_frames(path, video, 0, range(20)), turned, strict=True):
        assert np.abs(frame.astype(int) - expected).mean() < 3
    dataset = opened(tmp_path, tmp_path, decoder="auto", image_size=48)
    assert any(video.turn) == (matrix != (1, 0, 0, 1))
    if any(video.turn):
        assert dataset.decoder_of(0)[0] == "PyAV"
    square = turned[:, 8:56] if video.turn.transposed else turned[:, :, 8:56]
    shown = dataset.pixels(dataset.in_order()).permute(0, 2, 3, 1).numpy().astype(int)
    assert np.abs(shown - square).mean() < 3


def rewritten(source, target, change) -> None:
    """Copy a file, its packets as `change(number, bytes)` wants them."""
    with av.open(str(source)) as original, av.open(str(target), "w") as output:
        stream = original.streams.video[0]
        copy = output.add_stream_from_template(stream)
        for number, packet in enumerate(packet for packet in original.demux(stream) if packet.size):
            new = av.Packet(change(number, bytearray(bytes(packet))))
            new.pts, new.dts, new.time_base, new.is_keyframe, new.stream = (
                packet.pts,
                packet.dts,
                packet.time_base,
                packet.is_keyframe,
                copy,
            )
            output.mux(new)


@pytest.mark.parametrize("decoder", DECODERS)
def test_frames_that_only_others_refer_to_are_not_counted(tmp_path, decoder):
    """VP8's alternate reference frames are packets of their own."""
    if "vp8" not in CODECS:
        pytest.skip("this PyAV does not write vp8")
    write_video(tmp_path / "plain.webm", bars(60), codec="vp8", keyframe_interval=20)

    def hide(number: int, data: bytearray) -> bytes:
        data[0] &= 0xFF if number not in (7, 8, 25) else ~0x10
        return bytes(data)

    (tmp_path / "hidden").mkdir()
    rewritten(tmp_path / "plain.webm", tmp_path / "hidden" / "a.webm", hide)
    expected = [n for n in range(60) if n not in (7, 8, 25)]
    assert [number_shown(f) for f in one_after_the_other(tmp_path / "hidden" / "a.webm")] == expected
    dataset = opened(tmp_path / "hidden", tmp_path, decoder=decoder)
    assert dataset.videos[0].keys == (0, 18, 37)
    pixels = dataset.pixels(torch.from_numpy(dataset._index_of[np.arange(57)]))
    assert [n for _, n in shown(pixels)] == expected
    assert not dataset.lost


@pytest.mark.parametrize("codec", [c for c in CODECS if c in ("vp8", "vp9", "mjpeg")])
@pytest.mark.parametrize("decoder", DECODERS)
def test_a_size_that_changes_on_the_way(tmp_path, codec, decoder):
    folder = tmp_path / "folder"
    folder.mkdir()
    small, large = tmp_path / "small.mkv", tmp_path / "large.mkv"
    write_video(small, bars(20), codec=codec)
    write_video(large, bars(20, 0, 96, 128), codec=codec)
    with av.open(str(large)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    rewritten(small, folder / "a.mkv", lambda number, data: packets[number - 10] if number >= 10 else bytes(data))
    dataset = opened(folder, tmp_path, decoder=decoder)
    pixels = dataset.pixels(torch.from_numpy(dataset._index_of[np.arange(20)]))
    assert pixels.shape == (20, 3, 64, 64)
    if codec != "mjpeg":  # which starts anywhere
        assert [number_shown(f) for f in pixels[:10].permute(0, 2, 3, 1).numpy()] == list(range(10))
    assert not dataset.lost


# Segments


@pytest.mark.parametrize("frames", [1, 5, 31, 32, 33, 100, 257, 1000])
@pytest.mark.parametrize("interval", [1, 7, 12, 40, 300, 5000])
def test_segments_cover_every_frame_once(frames, interval):
    keys = tuple(range(0, frames, interval))
    video = Video("vp9", 64, 64, np.arange(frames), keys, frames, 25.0, 0)
    segments = video.segments()
    assert [n for _, start, stop in segments for n in range(start, stop)] == list(range(frames))
    for key, start, stop in segments:
        assert key in keys
        assert key == max(k for k in keys if k <= start)
        assert 0 < stop - start <= 256
        assert stop - start >= min(32, frames)


def test_segments_of_a_long_video_of_key_frames_take_linear_time():
    """With time quadratic in the number of frames this would run into the time limit of the file."""
    frames = 300_000
    video = Video("mjpeg", 64, 64, np.arange(frames), tuple(range(frames)), frames, 25.0, 0)
    assert sum(stop - start for _, start, stop in video.segments()) == frames


@pytest.mark.parametrize("codec", [c for c in CODECS if c in DALI_CODECS])
@pytest.mark.parametrize("suffix", [".mkv", ".webm", ".mp4", ".avi"])
def test_what_is_cut_out_holds_the_same_frames(tmp_path, codec, suffix):
    path = tmp_path / f"a{suffix}"
    try:
        write_video(path, bars(60), codec=codec, keyframe_interval=12)
    except (ValueError, av.FFmpegError):
        pytest.skip(f"{suffix} files do not hold {codec}")
    video, expected = video_facts(path), one_after_the_other(path)
    for key, start, stop in video.segments(8, 20):
        (tmp_path / "cut.mkv").write_bytes(cut_out(path, video, key, stop))
        found = one_after_the_other(tmp_path / "cut.mkv")
        assert len(found) <= stop - key + 12
        assert all(np.array_equal(a, b) for a, b in zip(found[start - key : stop - key], expected[start:stop], strict=True))


@pytest.mark.parametrize("decoder", DECODERS)
def test_videos_of_several_segments(tmp_path, monkeypatch, decoder):
    """Each from its own key frame on; for DALI they are cut out of the file."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for codec in CODECS:
        write_video(folder / f"{codec}.mkv", bars(120, 0, 128, 128), codec=codec, keyframe_interval=20)
    cuts, by_pyav = [], set()
    monkeypatch.setattr(video_folder, "cut_out", lambda *arguments: cuts.append(arguments) or cut_out(*arguments))

    def by_pyav_too(path, video, *more):
        by_pyav.add(video.codec)
        return decode_frames(path, video, *more)

    monkeypatch.setattr(video_folder, "decode_frames", by_pyav_too)
    dataset = opened(folder, tmp_path, decoder=decoder, image_size=128, pool=1000)
    assert len(dataset._pieces) == 3 * len(CODECS)
    truth = [np.stack(one_after_the_other(folder / name)).astype(int) for name in dataset.index.names]
    for frame, (v, n) in zip(dataset.pixels(torch.arange(dataset.size)).permute(0, 2, 3, 1).numpy(), places_of(dataset), strict=True):
        near = {other: np.abs(frame - truth[v][other]).mean() for other in (n - 1, n, n + 1) if 0 <= other < 120}
        assert min(near, key=near.__getitem__) == n
        assert near[n] <= 1.1
    assert bool(cuts) == (decoder == "dali")
    codecs = {video.codec for video in dataset.videos}
    assert by_pyav == (
        codecs - DALI_CODECS if decoder == "dali" else codecs
    )  # PyAV, which catches what DALI fails on, had nothing to catch


# Two decoders


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_frame_of_a_mixed_folder(mixed, tmp_path, decoder):
    dataset = opened(mixed, tmp_path, decoder=decoder)
    assert dataset.size == 60 * len(CODECS)
    places = places_of(dataset)
    assert sorted(places) == [(v, n) for v in range(len(CODECS)) for n in range(60)]
    assert places != sorted(places)  # any first few are a fair sample
    assert shown(dataset.pixels(torch.arange(dataset.size))) == places
    arbitrary = torch.tensor([5, 5, 3, dataset.size + 7, 0, dataset.size - 1])  # twice, and counted on behind the end
    assert shown(dataset.pixels(arbitrary)) == [places[int(i) % dataset.size] for i in arbitrary]
    images = dataset.images(torch.arange(4))
    assert images.dtype == torch.float32
    assert torch.equal(((images + 1) * 127.5).round().byte(), dataset.pixels(torch.arange(4)))


@needs_dali
@pytest.mark.parametrize("codec", [c for c in CODECS if c in DALI_CODECS])
def test_both_decoders_show_the_same(tmp_path, codec):
    """Up to the rounding of the colour conversion and the interpolation of colours between their samples: mean 1.1 of 255, at most 3.

    At a sharp edge between two colours the interpolation alone may differ by far more, so the clips are grey and soft.
    """
    source = Sprites(
        64, 3, ["square", "heart"], {"scale": (0.5, 1), "rotation": (0, 1), "x": (0.2, 0.8), "y": (0.2, 0.8)}, 0, clip_length=40
    )
    frames = ((source.clips(torch.tensor([1]))[0] + 1) * 127.5).round().byte().movedim(1, 3).numpy()
    write_video(tmp_path / "a.mkv", frames, codec=codec, keyframe_interval=20)
    by = {decoder: opened(tmp_path, tmp_path, decoder=decoder) for decoder in ("torch", "dali")}
    assert [by[decoder].decoder_of(0)[0] for decoder in by] == ["PyAV", "DALI"]
    inside = {decoder: dataset.pixels(torch.from_numpy(dataset._index_of[np.arange(40)])).int() for decoder, dataset in by.items()}
    difference = (inside["torch"] - inside["dali"]).abs().float()
    assert difference.max() <= 3
    assert difference.mean() <= 1.1
    for pixels in inside.values():  # and both what was encoded: the known path of the sprite
        assert (pixels.permute(0, 2, 3, 1).numpy() - frames.astype(int)).__abs__().mean() < 3


def test_who_decodes_and_why(mixed, tmp_path):
    dataset = opened(mixed, tmp_path, decoder="torch")
    for v in range(len(CODECS)):
        who, why = dataset.decoder_of(v)
        assert who == "PyAV"
        assert why


@needs_dali
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a CPU does")
def test_who_decodes_and_why_with_dali(mixed, tmp_path):
    dataset = opened(mixed, tmp_path, decoder="dali")
    for v, video in enumerate(dataset.videos):
        expected = ("DALI", f"{video.codec} is one of its codecs on the CPU")
        if video.codec not in DALI_CODECS:
            expected = "PyAV", f"DALI does not decode {video.codec} on the CPU"
        assert dataset.decoder_of(v) == expected
    dataset.videos[0] = Video("vp9", 64, 64, np.zeros(0, np.int64), (0,), 60, 25.0, Turn())
    assert dataset.decoder_of(0)[0] == "PyAV"


@needs_dali
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a CPU does")
@pytest.mark.parametrize("has_core", [True, False])
def test_auto_takes_the_faster_decoder(mixed, tmp_path, monkeypatch, has_core):
    """On a CPU that is PyAV with the core's conversion, and DALI where there is no core."""
    monkeypatch.setattr(video_folder, "core", lambda: object() if has_core else None)
    dataset = opened(mixed, tmp_path, decoder="auto")
    for v, video in enumerate(dataset.videos):
        who, why = dataset.decoder_of(v)
        assert who == ("DALI" if video.codec in DALI_CODECS and not has_core else "PyAV")
        assert ("compiled core" in why) == has_core


def test_grey(mixed, tmp_path):
    colour, grey = opened(mixed, tmp_path, decoder="torch"), opened(mixed, tmp_path, decoder="torch", channels=1)
    index = torch.arange(20)
    luma = (colour.pixels(index).float() * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    assert (grey.pixels(index).float() - luma).abs().max() <= 0.51


# Which frames


@pytest.mark.parametrize("stride", [1, 3, 7, 100])
def test_stride(mixed, tmp_path, stride):
    dataset = opened(mixed, tmp_path, decoder="torch", stride=stride)
    used = list(range(0, 60, stride))
    places = places_of(dataset)
    assert sorted(places) == [(v, n) for v in range(len(CODECS)) for n in used]
    assert shown(dataset.pixels(torch.arange(dataset.size))) == places
    assert sorted(dataset.order(0, 0, 8).tolist()) == list(range(dataset.size))


@pytest.mark.parametrize(("stills", "stride"), [(1, 1), (4, 1), (4, 7), (60, 1), (200, 1), (9, 7)])
def test_random_stills(mixed, tmp_path, stills, stride):
    dataset = opened(mixed, tmp_path, decoder="torch", stills=stills, stride=stride)
    used, places = -(-60 // stride), places_of(dataset)
    parts = min(stills, used)
    assert dataset.epoch_size == parts * len(CODECS)
    epochs = []
    for epoch in range(6):
        order = dataset.order(epoch, 5, 8)
        assert torch.equal(order, dataset.order(epoch, 5, 8))  # reproducible
        picked = sorted(places[i] for i in order.tolist())
        for v in range(len(CODECS)):
            numbers = [n // stride for video, n in picked if video == v]
            assert len(set(numbers)) == parts
            assert [n for video, n in picked if video == v] == [n * stride for n in numbers]
            for part, n in enumerate(numbers):  # one of each equal part
                assert part * used // parts <= n < (part + 1) * used // parts
        epochs.append(picked)
    assert any(picked != epochs[0] for picked in epochs) == (parts < used)
    assert parts == used or sorted(places[i] for i in dataset.order(0, 6, 8).tolist()) != epochs[0]


def test_uniform_stills(mixed, tmp_path):
    dataset = opened(mixed, tmp_path, decoder="torch", stills=4, positions="uniform")
    places = places_of(dataset)
    for epoch in range(3):
        picked = sorted(places[i] for i in dataset.order(epoch, 0, 8).tolist())
        assert picked == [(v, n) for v in range(len(CODECS)) for n in (7, 22, 37, 52)]
    assert dataset.order(0, 0, 8).tolist() != dataset.order(1, 0, 8).tolist()


def test_stills_show_the_frames_they_name(mixed, tmp_path):
    dataset = opened(mixed, tmp_path, stills=5)
    order = dataset.order(0, 0, 8)
    assert shown(dataset.pixels(order)) == [places_of(dataset)[i] for i in order.tolist()]


def test_whole_videos_are_held_out(mixed, tmp_path):
    training, evaluation = (opened(mixed, tmp_path, holdout=0.3, split=split) for split in (0, 1))
    videos = [{v for v, _ in places_of(dataset)} for dataset in (training, evaluation)]
    assert not videos[0] & videos[1]
    assert videos[0] | videos[1] == set(range(len(CODECS)))
    assert training.size + evaluation.size == 60 * len(CODECS)
    assert shown(evaluation.pixels(torch.arange(evaluation.size))) == places_of(evaluation)


def test_one_video_cannot_be_held_out(tmp_path):
    write_video(tmp_path / "a.mkv", bars(10), codec=CODECS[0])
    assert [opened(tmp_path, tmp_path, holdout=0.5, split=split).size for split in (0, 1)] == [10, 10]


@pytest.mark.parametrize(("stride", "length", "per_video"), [(1, 16, 3), (2, 16, 1), (1, 60, 1), (7, 3, 3), (1, 61, 0)])
def test_clips(mixed, tmp_path, stride, length, per_video):
    dataset = opened(mixed, tmp_path, stride=stride, clip_length=length)
    assert dataset.num_clips == per_video * len(CODECS)
    if not per_video:
        with pytest.raises(IndexError, match="clip 0 of 0"):
            dataset.clips(torch.tensor([0]))
        return
    clips = dataset.clips(torch.arange(dataset.num_clips))
    assert clips.shape == (dataset.num_clips, length, 3, 64, 64)
    for number, clip in enumerate(clips):
        first = number % per_video * length
        expected = [(number // per_video, n * stride) for n in range(first, first + length)]
        assert shown(((clip + 1) * 127.5).round().byte()) == expected
    with pytest.raises(IndexError, match=f"clip {dataset.num_clips} of {dataset.num_clips}"):
        dataset.clips(torch.tensor([dataset.num_clips]))


# The order of an epoch


@pytest.mark.parametrize("runs", [[1], [5], [3, 1, 4, 1, 5], [64] * 10, [300, 2, 300]])
@pytest.mark.parametrize("batch", [1, 7, 16, 400])
@pytest.mark.parametrize("pool", [1, 20, 256, 100_000])
def test_an_order_shows_every_item_once(runs, batch, pool):
    run = torch.arange(len(runs)).repeat_interleave(torch.tensor(runs))
    orders = [pooled_order(run, 3, epoch, len(run), batch, pool) for epoch in range(4)]
    assert all(torch.equal(order.sort().values, torch.arange(len(run))) for order in orders)
    assert torch.equal(orders[2], pooled_order(run, 3, 2, len(run), batch, pool))
    if len(runs) > 8:
        assert len({tuple(order.tolist()) for order in orders}) == 4
        assert not torch.equal(orders[0], pooled_order(run, 4, 0, len(run), batch, pool))


def test_a_batch_mixes_many_runs():
    run = torch.arange(64).repeat_interleave(40)
    order = pooled_order(run, 0, 0, len(run), 32, 1280)
    mixed = [len(set(run[batch].tolist())) for batch in order.split(32)]
    assert min(mixed) >= 24
    jumps = (run[order].diff() == 0).float().mean()
    assert jumps < 0.1  # frames of one run do not follow each other


def test_runs_are_shown_within_two_pools():
    run = torch.arange(64).repeat_interleave(40)
    order = pooled_order(run, 0, 0, len(run), 32, 640)
    position = torch.empty_like(order)
    position[order] = torch.arange(len(order))
    for items in position.view(64, 40):
        assert items.max() - items.min() < 2 * 640


def counted(dataset: VideoFolder, monkeypatch) -> list[tuple[int, int, int]]:
    """Segments that are decoded: video, first and last frame."""
    calls: list[tuple[int, int, int]] = []
    original = dataset._decode_segment
    monkeypatch.setattr(
        dataset, "_decode_segment", lambda v, key, frames: calls.append((v, frames[0], frames[-1])) or original(v, key, frames)
    )
    return calls


def many(folder, videos: int = 12, count: int = 60):
    folder.mkdir()
    for v in range(videos):
        write_video(folder / f"{v:02}.mkv", bars(count, v % 9), codec="mpeg4", keyframe_interval=30)
    return folder


@pytest.mark.parametrize("pool", [200, 4096])
def test_a_segment_is_decoded_once_per_epoch(tmp_path, monkeypatch, pool):
    dataset = opened(many(tmp_path / "videos"), tmp_path, pool=pool)
    segments = len(dataset._pieces)
    calls = counted(dataset, monkeypatch)
    feed = Feed(dataset, 20, 1, 0, 1, 0, CPU)
    for step in range(dataset.epoch_size // 20):
        feed.micro_batch(step, 0)
        assert sum(map(len, dataset._recent.values())) <= 2 * pool + 60  # held decoded frames do not grow
    feed.close()
    assert len(set(calls)) == segments
    needed_by_the_next_epoch = feed._ahead * 20 // 30 + 12 if pool < 720 else 0
    assert len(calls) <= segments + needed_by_the_next_epoch


def test_ranks_share_the_epoch_and_the_work(tmp_path, monkeypatch):
    folder, batch = many(tmp_path / "videos"), 8
    whole = {}
    for world, micro_batches in ((1, 1), (2, 1), (2, 2), (4, 2)):
        seen, decoded = [], []
        for rank in range(world):
            dataset = opened(folder, tmp_path, pool=480)
            calls = counted(dataset, monkeypatch)
            feed = Feed(dataset, batch, micro_batches, rank, world, 0, CPU)
            mine = []
            for step in range(720 // batch):
                for micro in range(micro_batches):
                    pixels, place = feed.micro_batch(step, micro)
                    index = feed.indices(step, micro)[0].tolist()
                    mine += index
                    for i, p, frame in zip(index, place.tolist(), pixels, strict=True):
                        assert whole.setdefault((step, p), (i, frame.sum().item())) == (i, frame.sum().item())
            feed.close()
            seen.append(set(mine))
            decoded.append(len(set(calls)))
            assert len(mine) == len(seen[-1]) == 720 // world
        assert set().union(*seen) == set(range(720))  # disjoint, since their sizes add up to 720
        # Shared segments are those at the borders of lanes: far from all of them on each rank.
        assert max(decoded) <= (12 if world == 1 else 10)
        assert sum(decoded) <= 12 + 6 * (world - 1)


@pytest.mark.parametrize(("batch", "pool"), [(50, 7), (16, 1), (200, 4096), (7, 3)])
def test_odd_pools_and_batches(tmp_path, batch, pool):
    """A pool below a batch, a batch above the dataset, one video: each epoch still shows each frame once."""
    write_video(tmp_path / "a.mkv", bars(60), codec="mpeg4", keyframe_interval=20)
    dataset = opened(tmp_path, tmp_path, pool=pool)
    feed = Feed(dataset, batch, 1, 0, 1, 0, CPU)
    steps = -(-3 * 60 // batch)
    numbers = []
    for step in range(steps):
        images = feed.micro_batch(step, 0)[0]
        numbers += [n for _, n in shown(((images + 1) * 127.5).round().byte())]
    feed.close()
    for epoch in range(3):
        assert sorted(numbers[60 * epoch : 60 * (epoch + 1)]) == list(range(60))


@pytest.mark.parametrize("settings", [{}, {"stills": 7}, {"stride": 3}, {"pool": 40}])
def test_a_run_goes_on_at_the_exact_frame(mixed, tmp_path, settings):
    def batches(steps) -> list[torch.Tensor]:
        feed = Feed(opened(mixed, tmp_path, **settings), 12, 1, 0, 1, 3, CPU, flip=True)
        found = [feed.micro_batch(step, 0)[0] for step in steps]
        feed.close()
        return found

    whole = batches(range(20))
    for first in (3, 11, 19):
        assert all(torch.equal(a, b) for a, b in zip(batches(range(first, 20)), whole[first:], strict=True))


# Bad files


def good_folder(folder, count: int = 4):
    folder.mkdir(exist_ok=True)
    for v in range(count):
        write_video(folder / f"good_{v}.mkv", bars(40, v), codec="mpeg4", keyframe_interval=10)
    return folder


def front_moov(source, target) -> None:
    with av.open(str(source)) as original, av.open(str(target), "w", options={"movflags": "faststart"}) as output:
        stream = original.streams.video[0]
        copy = output.add_stream_from_template(stream)
        for packet in original.demux(stream):
            if packet.dts is not None:
                packet.stream = copy
                output.mux(packet)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    ("codec", "suffix", "front"),
    [
        *(("h264", ".mp4", False), ("h264", ".mp4", True), ("vp9", ".mp4", True), ("vp9", ".webm", False), ("vp8", ".webm", False)),
        *(("mjpeg", ".avi", False), ("mpeg4", ".avi", False), ("h264", ".mkv", False), ("av1", ".mkv", False), ("mjpeg", ".mov", True)),
    ],
)
def test_cut_off_anywhere(tmp_path, decoder, codec, suffix, front, capfd):
    """Nothing but the first frames of the video, right ones, or none of it."""
    if codec not in CODECS:
        pytest.skip(f"this PyAV does not write {codec}")
    if decoder == "dali" and codec not in DALI_CODECS:
        pytest.skip(f"DALI is not asked for {codec}")
    whole = tmp_path / f"whole{suffix}"
    write_video(whole, bars(40, 8), codec=codec, keyframe_interval=10)
    if front:
        whole.rename(tmp_path / "back.mp4")
        front_moov(tmp_path / "back.mp4", whole)
    data = whole.read_bytes()
    folder = good_folder(tmp_path / "folder", 2)
    usable = 0
    for share in (0.02, 0.3, 0.6, 0.9, 0.999):
        (folder / f"a{suffix}").write_bytes(data[: int(share * len(data))])
        dataset = opened(folder, tmp_path, decoder=decoder, max_bad=0.5)
        cut = [i for i, name in enumerate(dataset.index.names) if name.startswith("a.")]
        usable += bool(cut)
        pixels = dataset.training_pixels(torch.arange(dataset.size))
        for (clip, number), (v, n), name in zip(
            shown(pixels), places_of(dataset), [dataset.index.names[v] for v, _ in places_of(dataset)], strict=True
        ):
            if v in cut and not dataset.lost:
                assert clip == 8
                assert number == n
            elif v not in cut:
                assert (clip, number) == (int(name[5]), n)
    if suffix in (".webm", ".mkv", ".avi") or front:
        assert usable
    assert len(capfd.readouterr().err) < 4000


def broken_kinds(folder) -> dict[str, bytes]:
    write_video(folder / "sample.mp4", bars(40), codec="mpeg4")
    write_video(folder / "sample.mkv", bars(40), codec="mpeg4")
    sample, matroska = (folder / "sample.mp4").read_bytes(), (folder / "sample.mkv").read_bytes()
    (folder / "sample.mp4").unlink()
    (folder / "sample.mkv").unlink()
    with av.open(str(folder / "sound.mp4"), "w") as output:
        sound = output.add_stream("aac", rate=48000)
        for _ in range(20):
            silence = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
            silence.sample_rate = 48000
            output.mux(sound.encode(silence))
        output.mux(sound.encode(None))
    only_sound = (folder / "sound.mp4").read_bytes()
    (folder / "sound.mp4").unlink()
    return {
        "zero.mp4": b"",
        "text.mp4": b"this is not a video\n" * 50,
        "noise.webm": np.random.default_rng(0).bytes(5000),
        "sound.mp4": only_sound,
        "half.mp4": sample[: len(sample) // 2],  # what says where the frames are stands at its end
        "unknown.mkv": matroska.replace(b"V_MPEG4/ISO/ASP", b"V_OF/NO/STANDARD"[:15]),
    }


@pytest.mark.parametrize("decoder", DECODERS)
def test_unusable_files_are_skipped_and_named(tmp_path, decoder, caplog, capfd):
    folder = good_folder(tmp_path / "folder")
    bad = broken_kinds(tmp_path)
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    with caplog.at_level(logging.WARNING, "sami_fast.data"):
        dataset = opened(folder, tmp_path, decoder=decoder, max_bad=0.6)
    assert dataset.index.bad.keys() == bad.keys()
    assert dataset.index.bad["zero.mp4"] == "zero bytes"
    assert dataset.index.bad["sound.mp4"] == "no video stream"
    assert dataset.index.bad["unknown.mkv"] == "no video stream of a known codec"
    assert "skipped 6 of 10 videos" in caplog.text
    for name in bad:
        assert name in caplog.text
    assert shown(dataset.pixels(torch.arange(dataset.size))) == places_of(dataset)
    with pytest.raises(UserError, match=r"data\.path: 6 of 10 videos in .* cannot be read, data\.max_bad=0\.5 allows 5: "):
        opened(folder, tmp_path, decoder=decoder, max_bad=0.5)
    assert capfd.readouterr().err.count("\n") < 20  # the libraries below do not talk


def test_a_file_that_may_not_be_read(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    folder = good_folder(tmp_path / "folder")
    (folder / "good_1.mkv").chmod(0)
    assert opened(folder, tmp_path, max_bad=0.5).index.bad == {"good_1.mkv": "Permission denied"}


def spoil(path, how: str) -> None:
    data = path.read_bytes()
    if how == "vanished":
        path.unlink()
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "shrunk":
        path.write_bytes(data[: len(data) // 3])
    elif how == "text":
        path.write_text("no video" * 100)
    elif how == "sound":
        path.write_bytes(broken_kinds(path.parent)["sound.mp4"])
    else:
        middle = len(data) // 3
        path.write_bytes(data[:middle] + np.random.default_rng(0).bytes(len(data) // 3) + data[2 * middle :])


HOW = ["vanished", "emptied", "shrunk", "text", "sound", "garbage"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("codec", "stills"), [("vp9", 0), ("vp9", 6), ("h264", 6)])
def test_a_video_that_changes_between_index_and_read(tmp_path, codec, how, stills, caplog, monkeypatch, capfd):
    if codec not in CODECS:
        pytest.skip(f"this PyAV does not write {codec}")
    folder = good_folder(tmp_path / "folder", 3)
    write_video(folder / "a.mkv", bars(40, 8), codec=codec, keyframe_interval=10)
    facts = opened(folder, tmp_path).index  # before
    spoil(folder / "a.mkv", how)
    monkeypatch.setattr("sami_fast.data.decoded.build_index", lambda *_, **__: facts)

    def read(world: int, micro_batches: int, first: int = 0, max_bad: float = 0.5, workers: int = 2) -> dict:
        found = {}
        for rank in range(world):
            dataset = opened(folder, tmp_path, stills=stills, max_bad=max_bad, workers=workers)
            feed = Feed(dataset, 12, micro_batches, rank, world, 0, CPU)
            try:
                for step in range(first, dataset.epoch_size // 12):
                    for micro in range(micro_batches):
                        pixels, place = feed.micro_batch(step, micro)
                        found |= {(step, p): frame for p, frame in zip(place.tolist(), pixels, strict=True)}
            finally:
                feed.close()
            if how != "garbage":  # which may leave every frame readable
                assert dataset.lost.keys() <= {"a.mkv"}
                assert dataset.lost or world > 1 or first
        return found

    with caplog.at_level(logging.WARNING, "sami_fast.data"):
        whole = read(1, 1)
    if how != "garbage":
        assert caplog.text.count("a.mkv") == 1  # once, not for every frame
        assert "in training another one takes its place" in caplog.text
    for other in (read(2, 2), read(1, 3), read(1, 1, workers=1)):  # whoever reads what when: the same substitutes
        assert other.keys() == whole.keys()
        assert all(torch.equal(other[key], whole[key]) for key in whole)
    assert all(torch.equal(frame, whole[key]) for key, frame in read(1, 1, first=1).items())
    if how != "garbage":
        with pytest.raises(UserError, match=r"data\.path: 1 of 4 videos in .* cannot be read, data\.max_bad=0\.1 allows 0: a\.mkv"):
            read(1, 1, max_bad=0.1)
    if how != "garbage":  # DALI's own libav says a line for each attempt, which nothing turns off
        assert capfd.readouterr().err.count("\n") < 20


@pytest.mark.parametrize("stills", [0, 6])
def test_what_is_broken_is_not_tried_again(tmp_path, stills, monkeypatch):
    dataset = opened(good_folder(tmp_path / "folder", 2), tmp_path, stills=stills, max_bad=0.5)
    (dataset.index.folder / "good_0.mkv").unlink()
    calls = counted(dataset, monkeypatch)
    dataset.training_pixels(torch.arange(dataset.size))
    tried = len([call for call in calls if call[0] == 0])
    assert 0 < tried <= (41 if stills else 1)
    dataset.training_pixels(torch.arange(dataset.size))
    assert len([call for call in calls if call[0] == 0]) == tried
    assert dataset.ahead == (12 if stills else 60)  # the pool, yet no more than an epoch


@pytest.mark.parametrize("stills", [0, 8])
def test_stills_before_the_damage_are_used(tmp_path, stills, monkeypatch):
    """Whether a frame is there does not depend on which others are asked for with it."""
    folder = good_folder(tmp_path / "folder", 1)
    write_video(folder / "a.mkv", bars(60, 8), codec="mpeg4", keyframe_interval=60)
    dataset = opened(folder, tmp_path, stills=stills, max_bad=0.5, decoder="torch")
    with av.open(str(folder / "a.mkv")) as container:
        half = [packet.pos for packet in container.demux(video=0) if packet.size][30]
    data = (folder / "a.mkv").read_bytes()
    (folder / "a.mkv").write_bytes(data[:half].ljust(len(data), b"\0"))
    v, index = dataset.index.names.index("a.mkv"), dataset.index
    alone = [dataset.decode([int(dataset.offsets[v]) + n])[0] is not None for n in (5, 29, 45, 6)]
    assert alone == [True, True, False, True]
    monkeypatch.setattr("sami_fast.data.decoded.build_index", lambda *_, **__: index)
    again = opened(folder, tmp_path, stills=stills, max_bad=0.5, decoder="torch")
    together = [frame is not None for frame in again.decode([int(again.offsets[v]) + n for n in (5, 29, 45, 6)])]
    assert together == alone


# Trying to break it


def test_many_threads_want_the_same_segments_while_one_fails(tmp_path, monkeypatch):
    folder = good_folder(tmp_path / "folder", 4)
    dataset = opened(folder, tmp_path, pool=50, max_bad=0.5, decoder="torch")
    (folder / "good_2.mkv").write_bytes(b"gone")
    original, guard, running = dataset._decode_segment, threading.Lock(), {}

    def slow(v, key, frames):
        with guard:
            assert (v, *frames) not in running, "decoded twice at the same time"
            running[(v, *frames)] = True
        time.sleep(0.002)
        try:
            return original(v, key, frames)
        finally:
            with guard:
                del running[(v, *frames)]

    monkeypatch.setattr(dataset, "_decode_segment", slow)
    places = places_of(dataset)
    with ThreadPoolExecutor(16) as pool:
        batches = [torch.randperm(160, generator=torch.Generator().manual_seed(seed))[:40] for seed in range(60)]
        for index, pixels in zip(batches, pool.map(dataset.training_pixels, batches), strict=True):
            for wanted, found in zip(index.tolist(), shown(pixels), strict=True):
                assert found == places[wanted] if places[wanted][0] != 2 else found[0] != 2
    assert dataset.lost.keys() == {"good_2.mkv"}
    assert not dataset._waiting


@pytest.mark.parametrize("error", [ValueError("surprise"), MemoryError("no room"), RuntimeError("library")])
def test_an_unforeseen_error_reaches_everyone_who_waits(tmp_path, monkeypatch, error):
    dataset = opened(good_folder(tmp_path / "folder", 1), tmp_path, decoder="torch")
    entered, go = threading.Event(), threading.Event()

    def fail(*_):
        entered.set()
        assert go.wait(20)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "_decode_segment", fail)
        with ThreadPoolExecutor(6) as pool:
            waiting = [pool.submit(dataset.pixels, torch.arange(5)) for _ in range(6)]
            assert entered.wait(20)
            time.sleep(0.05)
            go.set()
            for future in waiting:
                with pytest.raises(type(error), match=str(error)):
                    future.result(timeout=20)
    assert not dataset._waiting
    assert shown(dataset.pixels(torch.arange(5))) == places_of(dataset)[:5]  # and it was not taken for a bad file


def test_nothing_left_to_read(tmp_path):
    folder = good_folder(tmp_path / "folder", 2)
    dataset = opened(folder, tmp_path, max_bad=1.0)
    shutil.rmtree(folder)
    feed = Feed(dataset, 8, 1, 0, 1, 0, CPU)
    with pytest.raises(UserError, match=re.escape(f"data.path: nothing in {folder} can be read any more")):
        feed.micro_batch(0, 0)
    feed.close()


def test_facts_of_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        video_facts(tmp_path / "a.mkv")
    write_video(tmp_path / "a.mkv", bars(20), codec="mpeg4")
    video = video_facts(tmp_path / "a.mkv")
    (tmp_path / "a.mkv").unlink()
    with pytest.raises(FileNotFoundError):
        decode_frames(tmp_path / "a.mkv", video, 0, [3])
    with pytest.raises(FileNotFoundError):
        cut_out(tmp_path / "a.mkv", video, 0, 3)
    (tmp_path / "a.mkv").write_bytes(b"")
    for read in (lambda path: decode_frames(path, video, 0, [3]), lambda path: cut_out(path, video, 0, 3)):
        with pytest.raises(BadFile):
            read(tmp_path / "a.mkv")
