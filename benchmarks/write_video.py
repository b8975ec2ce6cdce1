"""Small video files for tests and benchmarks, through PyAV's encoders. What an encoder cannot write raises PyAV's own errors."""

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np


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


def _encoders(codec: str) -> Iterator[Encoder]:
    """Those of the codec that the installed PyAV has, best first."""
    import av

    for encoder in ENCODERS.get(codec, ()):
        try:
            av.codec.Codec(encoder.name, "w")
        except ValueError:  # PyAV's UnknownCodecError
            continue
        yield encoder


def available_codecs() -> tuple[str, ...]:
    """Those that `write_video` can write with the installed PyAV."""
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
    """Encode frames as a video file.

    Args:
        path: The file; its suffix names the container, of which .mkv holds every codec.
        frames: Colours in the order red, green, blue. [T, H, W, 3] uint8, T > 0.
        codec: One of `available_codecs()`.
        fps: Frames per second.
        options: FFmpeg's names and values for this encoder, in place of or beside those of `ENCODERS`.
        pixel_format: FFmpeg's name; by default 8-bit 4:2:0 (colours at half the resolution), for which H and W must be even.
        keyframe_interval: Frames from one keyframe to the next, at most. None leaves it to the encoder.
    Raises:
        ValueError: the installed PyAV has no encoder for the codec.
    """
    import av

    encoder = next(_encoders(codec), None)
    if encoder is None:
        raise ValueError(f"codec: cannot write {codec!r} here; the installed PyAV writes {', '.join(available_codecs())}")
    pixel_format = pixel_format or encoder.pixel_format
    os.environ.setdefault("SVT_LOG", "1")  # libsvtav1 reads it: errors alone on the terminal
    # Where it may, it also gives the thread that calls it a real-time priority, under which nothing else gets to run.
    priority = (os.sched_getscheduler(0), os.sched_getparam(0)) if hasattr(os, "sched_getscheduler") else None
    try:
        with av.open(str(path), "w") as container:
            video = container.add_stream(encoder.name, rate=fps, options=encoder.options | (options or {}))
            video.height, video.width = frames.shape[1:3]
            video.pix_fmt = pixel_format
            if keyframe_interval is not None:
                video.codec_context.gop_size = keyframe_interval
            if pixel_format.startswith("yuv"):  # say which conversion was used, so that every decoder undoes the same one
                video.codec_context.colorspace = av.video.reformatter.Colorspace.ITU601
                full = pixel_format.startswith("yuvj")
                video.codec_context.color_range = av.video.reformatter.ColorRange.JPEG if full else av.video.reformatter.ColorRange.MPEG
            for frame in frames:
                container.mux(video.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            container.mux(video.encode(None))  # those that it still holds back
    finally:
        if priority is not None and os.sched_getscheduler(0) != priority[0]:
            os.sched_setscheduler(0, *priority)
