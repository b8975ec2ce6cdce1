"""Video files made here: frames through PyAV's encoders, and moving sprites whose factors are known in each frame."""

import io
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from sami_fast.data.sprites import Sprites
from sami_fast.errors import UserError
from sami_fast.files import write_whole

CONTAINERS = {".mkv": "matroska", ".webm": "webm", ".mp4": "mp4", ".mov": "mov", ".avi": "avi"}  # suffix: FFmpeg's name


class Encoder(NamedTuple):
    """One of FFmpeg's encoders, with options that favour speed over size at a quality where sprites look the same."""

    name: str
    options: dict[str, str]
    pixel_format: str = "yuv420p"


_QUANTIZER_3 = {"flags": "+qscale", "global_quality": str(3 * 118)}  # 118: FFmpeg's FF_QP2LAMBDA

# The first one that this PyAV has is used.
ENCODERS = {
    "vp9": (Encoder("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "crf": "20", "b": "0"}),),
    "vp8": (Encoder("libvpx", {"deadline": "realtime", "cpu-used": "8", "crf": "10", "b": "4000000"}),),  # here crf needs a bit rate
    "mjpeg": (Encoder("mjpeg", _QUANTIZER_3, "yuvj420p"),),
    "h264": (Encoder("libx264", {"preset": "veryfast", "crf": "18"}),),
    "h265": (Encoder("libx265", {"preset": "veryfast", "crf": "18", "x265-params": "log-level=error"}),),
    "av1": (
        Encoder("libsvtav1", {"preset": "10", "crf": "20"}),
        Encoder("libaom-av1", {"usage": "realtime", "cpu-used": "8", "crf": "20"}),
    ),
    "mpeg4": (Encoder("mpeg4", _QUANTIZER_3),),
}


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise UserError("writing videos needs PyAV: pip install 'sami-fast[feed]'") from error
    return av


def _encoders(codec: str) -> Iterator[Encoder]:
    """Those of the codec that the installed PyAV has, best first."""
    av = _pyav()
    for encoder in ENCODERS.get(codec, ()):
        try:
            av.codec.Codec(encoder.name, "w")
        except ValueError:  # PyAV's UnknownCodecError
            continue
        yield encoder


def available_codecs() -> tuple[str, ...]:
    """Those that `write_video` can write with the installed PyAV.

    Raises:
        UserError: there is no PyAV.
    """
    return tuple(codec for codec in ENCODERS if any(_encoders(codec)))


def write_video(
    path: Path | str,
    frames: np.ndarray,  # [T, H, W, 3]
    *,
    codec: str,
    fps: int | Fraction = 30,
    options: dict[str, str] | None = None,
    pixel_format: str | None = None,
    keyframe_interval: int | None = None,
) -> None:
    """Encode frames as a video file, which appears whole or not at all.

    Args:
        path: The file; its suffix names the container: .mkv (holds every codec), .webm, .mp4, .mov or .avi.
        frames: Colours in the order red, green, blue. [T, H, W, 3] uint8, T > 0.
        codec: One of `available_codecs()`.
        fps: Frames per second.
        options: FFmpeg's names and values for this encoder, in place of or beside those of `ENCODERS`.
        pixel_format: FFmpeg's name; by default 8-bit 4:2:0 (colours at half the resolution), for which H and W must be even.
        keyframe_interval: Frames from one keyframe to the next, at most. None leaves it to the encoder.
    Raises:
        ValueError: frames are something else, or an interval below 1.
        UserError: no PyAV; this build, container or encoder cannot write what was asked for. The sentence says what can be done.
        OSError: from the system; an old file is as it was.
    """
    path, frames = Path(path), np.asarray(frames)
    if frames.ndim != 4 or frames.shape[3] != 3 or not frames.size or frames.dtype != np.uint8:
        raise ValueError(f"frames: expected [T, H, W, 3] uint8, none of them 0, found {list(frames.shape)} {frames.dtype}")
    if keyframe_interval is not None and keyframe_interval < 1:
        raise ValueError(f"keyframe_interval: expected 1 or more, found {keyframe_interval}")
    if path.suffix not in CONTAINERS:
        raise UserError(f"{path}: cannot tell the container from the suffix '{path.suffix}'; use one of {', '.join(CONTAINERS)}")
    encoder = next(_encoders(codec), None)
    if encoder is None:
        raise UserError(f"codec: cannot write '{codec}' here; the installed PyAV writes {', '.join(available_codecs()) or 'none of ours'}")
    encoder = Encoder(encoder.name, encoder.options | (options or {}), pixel_format or encoder.pixel_format)
    _check_pixel_format(encoder, *frames.shape[1:3])
    content = io.BytesIO()  # far smaller than the frames, and a full disk stays an OSError, which PyAV's own writing may turn into another
    _encode(content, path, frames, encoder, fps, keyframe_interval)
    write_whole(path, lambda stream: stream.write(content.getbuffer()))


def _check_pixel_format(encoder: Encoder, height: int, width: int) -> None:
    av = _pyav()
    known = [known.name for known in av.codec.Codec(encoder.name, "w").video_formats or ()]
    if known and encoder.pixel_format not in known:
        raise UserError(f"pixel_format: {encoder.name} cannot write '{encoder.pixel_format}'; it writes {', '.join(known)}")
    sampling = av.VideoFormat(encoder.pixel_format)
    if height % (4 // sampling.chroma_height(4)) or width % (4 // sampling.chroma_width(4)):
        raise UserError(
            f"frames: {encoder.pixel_format} keeps one colour for several pixels and needs even sizes, found {height} x {width}; "
            "change the size, or pixel_format"
        )


def _encode(
    content: io.BytesIO, path: Path, frames: np.ndarray, encoder: Encoder, fps: int | Fraction, keyframe_interval: int | None
) -> None:
    av = _pyav()
    os.environ.setdefault("SVT_LOG", "1")  # libsvtav1 reads it: errors alone on the terminal
    # Where it may, it also gives the thread that calls it a real-time priority, under which nothing else gets to run.
    priority = (os.sched_getscheduler(0), os.sched_getparam(0)) if hasattr(os, "sched_getscheduler") else None
    try:
        with av.open(content, "w", format=CONTAINERS[path.suffix]) as container:
            try:
                video = container.add_stream(encoder.name, rate=fps, options=encoder.options)
            except ValueError as error:
                raise UserError(f"{path}: {path.suffix} files cannot hold {encoder.name}'s video; .mkv files hold every codec") from error
            video.height, video.width = frames.shape[1:3]
            video.pix_fmt = encoder.pixel_format
            if keyframe_interval is not None:
                video.codec_context.gop_size = keyframe_interval
            if encoder.pixel_format.startswith("yuv"):  # say which conversion was used, so that every decoder undoes the same one
                video.codec_context.colorspace = av.video.reformatter.Colorspace.ITU601
                full = encoder.pixel_format.startswith("yuvj")
                video.codec_context.color_range = av.video.reformatter.ColorRange.JPEG if full else av.video.reformatter.ColorRange.MPEG
            container.start_encoding()
            if unused := video.codec_context.options.keys() & encoder.options.keys():
                raise UserError(f"options: {encoder.name} knows no {', '.join(sorted(unused))}")
            for frame in frames:
                container.mux(video.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            container.mux(video.encode(None))  # those that it still holds back
    except av.FFmpegError as error:
        height, width = frames.shape[1:3]
        asked = f"{height} x {width} frames to {path.suffix} with {encoder.options}"
        raise UserError(f"{path}: {encoder.name} cannot write {asked} ({error.strerror}); try larger frames or .mkv") from error
    finally:
        if priority is not None and os.sched_getscheduler(0) != priority[0]:
            os.sched_setscheduler(0, *priority)


def write_sprite_videos(
    folder: Path | str,
    sprites: Sprites,
    count: int,
    *,
    codec: str,
    suffix: str = ".mkv",
    fps: int | Fraction = 30,
    options: dict[str, str] | None = None,
    pixel_format: str | None = None,
    keyframe_interval: int | None = None,
) -> None:
    """Write clips 0 to count - 1 as `sprite_00000.mkv` and so on, and then, in `factors.npz`, what each frame shows.

    Args:
        folder: Made where missing; files of the same names are replaced.
        sprites: The source of the clips; the first of its identical channels is written as grey.
        count: Number of clips.
        suffix: The container, as in `write_video`; so are the rest.
    Writes, to factors.npz (no pickles):
        factors: [count, T, F] float32, columns in the order of `factor_names`.
        factor_names: [F] strings.
        files: [count] strings, names in this folder.
    Raises: as `write_video`.
    """
    settings = {"fps": fps, "options": options, "pixel_format": pixel_format, "keyframe_interval": keyframe_interval}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = [f"sprite_{number:05d}{suffix}" for number in range(count)]
    for number, name in enumerate(files):
        clip = sprites.clips(torch.tensor([number]))[0, :, :1]
        frames = ((clip + 1) * 127.5).round().to(torch.uint8).movedim(1, 3).expand(-1, -1, -1, 3)
        write_video(folder / name, frames.numpy(), codec=codec, **settings)
    known = {
        "factors": sprites.clip_factors(torch.arange(count)).numpy(),
        "factor_names": np.array(sprites.factor_names, dtype=str),
        "files": np.array(files, dtype=str),
    }
    write_whole(folder / "factors.npz", lambda stream: np.savez(stream, **known))
