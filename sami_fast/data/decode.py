"""One encoded image, or a run of frames of a video, to 8-bit RGB by Pillow and PyAV; and what a file's header says.

DALI's decoders (`dali.py`) give the same images bit for bit, and the same frames up to rounding and the interpolation of chroma.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np

from ..errors import UserError

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff", ".gif", ".jp2", ".avif"}
)
VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".ogv", ".wmv", ".flv", ".3gp", ".y4m"}
)
DALI_MODES = {"JPEG": {"L", "RGB"}, "PNG": {"1", "L", "RGB"}, "WEBP": {"RGB"}, "BMP": {"L", "RGB"}, "PPM": {"L", "RGB"}}
DALI_CODECS = frozenset({"vp8", "vp9", "mjpeg"})  # on the CPU; a GPU decodes the others too
DALI_GPU_CODECS = DALI_CODECS | {"h264", "hevc", "av1", "mpeg4"}


class BadFile(Exception):
    """A file of the data that cannot be used, and why; it is skipped and counted."""


@cache
def pyav() -> ModuleType:
    """The PyAV package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import av
    except ImportError:
        raise UserError("data.kind video_folder reads videos with PyAV, which is not installed; `pip install 'sami-fast[feed]'`") from None
    av.logging.set_level(None)  # broken files are reported by us, once each
    return av


def image_facts(data: bytes) -> tuple[int, int, str, bool]:
    """Width and height after EXIF rotation, format and mode ("JPEG RGB"), and whether DALI decodes it as we do.

    Only the header is read, unless the end of the file looks cut off.

    Raises:
        BadFile: not an image that Pillow knows, or a truncated one.
    """
    from PIL import Image

    if not data:
        raise BadFile("zero bytes")
    try:
        with Image.open(io.BytesIO(data)) as image:
            kind, mode, moving = image.format, image.mode, getattr(image, "is_animated", False)
            width, height = image.size
            if image.getexif().get(0x0112, 1) >= 5:  # rotated by a quarter turn
                width, height = height, width
            transparent = "transparency" in image.info
    except Exception as error:  # Pillow's plugins raise whatever a broken header leads them to
        raise BadFile("not an image that can be read" if "cannot identify" in str(error) else _reason(error)) from None
    whole = {
        "JPEG": data[-2:] == b"\xff\xd9",
        "PNG": data[-8:-4] == b"IEND",
        "WEBP": len(data) >= 8 + int.from_bytes(data[4:8], "little"),
    }
    if not whole.get(kind, False):
        decode_image(data)
    return width, height, f"{kind} {mode}", mode in DALI_MODES.get(kind, ()) and not moving and not transparent


def decode_image(data: bytes) -> np.ndarray:
    """An image as it is meant to be seen: rotated by its EXIF, first frame, 16 bits scaled to 8, transparent pixels over black.

    Args:
        data: The file's bytes.
    Returns:
        [H, W, 3] uint8.
    Raises:
        BadFile: broken, truncated, or of a mode that is no image (more than four channels).
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data)) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
        if image.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I"):
            values = np.asarray(image).astype(np.int64)
            image = Image.fromarray(((values.clip(0, 65535) + 128) // 257).astype(np.uint8))
        elif image.mode == "F":
            raise BadFile("floating-point pixels without a known range")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
        return np.array(image.convert("RGB"))
    except BadFile:
        raise
    except Exception as error:
        raise BadFile(_reason(error)) from None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


@dataclass(frozen=True)
class Video:
    """What is known of a video file without decoding it.

    Args:
        codec: Name of the codec: "vp9", "h264" ...
        width, height: In pixels, after the rotation that the file asks for.
        pts: Presentation time of each frame, ascending, in the stream's time base; empty where the container keeps none.
        keys: Frames, by number, from which decoding can start.
        frames: Number of frames.
        fps: Mean frame rate, 0 if unknown.
        rotation: In degrees, counter-clockwise.
    """

    codec: str
    width: int
    height: int
    pts: np.ndarray
    keys: tuple[int, ...]
    frames: int
    fps: float
    rotation: int

    def segments(self, shortest: int = 32, longest: int = 256) -> list[tuple[int, int, int]]:
        """Runs of frames (key, start, stop) that are decoded together: groups of pictures, merged while short, cut when very long."""
        starts = [0]
        for key in self.keys:
            if key - starts[-1] >= shortest and self.frames - key >= shortest:
                starts.append(key)
        found = []
        for start, stop in zip(starts, [*starts[1:], self.frames], strict=True):
            pieces = -(-(stop - start) // longest)
            cuts = [start + (stop - start) * piece // pieces for piece in range(pieces + 1)]
            for first, last in pairwise(cuts):
                found.append((max(k for k in (start, *self.keys) if k <= first), first, last))
        return found


def video_facts(path: Path) -> Video:
    """Read a video's packets and its first frame.

    Raises:
        BadFile: not a video, no video stream, no packet, or the first frame cannot be decoded.
    """
    av = pyav()
    if path.stat().st_size == 0:
        raise BadFile("zero bytes")
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            if not container.streams.video:
                raise BadFile("no video stream")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            first = next(container.decode(stream), None)
            if first is None:
                raise BadFile("no frame that can be decoded")
            codec, rotation = stream.codec_context.name, int(first.rotation) % 360
            codec = {"libdav1d": "av1", "libvpx": "vp8", "libvpx-vp9": "vp9"}.get(codec, codec)
            width, height = first.width, first.height
            fps = float(stream.average_rate or 0)
        with av.open(str(path), metadata_errors="ignore") as container:
            stream = container.streams.video[0]
            times, keys, count = [], [], 0
            try:
                for packet in container.demux(stream):
                    if not packet.size or packet.is_discard:
                        continue
                    times.append(packet.pts)
                    if packet.is_keyframe:
                        keys.append((packet.pts, count))
                    count += 1
            except av.FFmpegError:
                pass  # cut off: what came before can be used
    except BadFile:
        raise
    except (av.FFmpegError, ValueError, EOFError, OSError) as error:
        raise BadFile(_reason(error)) from None
    if rotation % 180:
        width, height = height, width
    if None in times or len(set(times)) < len(times):  # frames are counted from the start instead
        return Video(codec, width, height, np.zeros(0, np.int64), (0,), count, fps, rotation)
    pts = np.sort(np.array(times, np.int64))
    return Video(codec, width, height, pts, tuple(np.searchsorted(pts, [t for t, _ in keys]).tolist()), count, fps, rotation)


def decode_frames(path: Path, video: Video, key: int, wanted: Sequence[int]) -> list[np.ndarray]:
    """Frames of a video by PyAV, decoded from one key frame on.

    Args:
        path: The file.
        video: What `video_facts` said of it.
        key: A key frame at or before the first wanted one.
        wanted: Frame numbers, ascending.
    Returns:
        A list of [H, W, 3] uint8, in the order of `wanted`.
    Raises:
        BadFile: a wanted frame is not there or cannot be decoded.
        OSError: the file is gone.
    """
    av = pyav()
    found: dict[int, np.ndarray] = {}
    open(path, "rb").close()  # the system's own error for a file that vanished
    timed = len(video.pts) > 0
    number = {int(t): n for n, t in enumerate(video.pts)} if timed else {}
    needed, last = set(wanted), wanted[-1]
    convert = av.video.reformatter.VideoReformatter()  # one for all frames: making one costs more than using it
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # batches are decoded side by side instead
            if timed and key:
                container.seek(int(video.pts[key]), stream=stream, backward=True)
            for count, frame in enumerate(container.decode(stream)):
                n = number.get(frame.pts, -1) if timed else count
                if n in needed and n not in found:
                    rgb = convert.reformat(frame, format="rgb24").to_ndarray()
                    found[n] = np.rot90(rgb, video.rotation // 90) if video.rotation else rgb
                    if len(found) == len(needed):
                        break
                if n > last and timed:
                    break
    except (av.FFmpegError, ValueError, EOFError) as error:
        if len(found) < len(needed):
            raise BadFile(f"frame {min(needed - found.keys())}: {_reason(error)}") from None
    if len(found) < len(needed):
        raise BadFile(f"frame {min(needed - found.keys())} cannot be decoded")
    return [found[n] for n in wanted]


def cut_out(path: Path, video: Video, key: int, stop: int) -> bytes:
    """The packets of frames from a key frame up to `stop`, exclusive, as a small Matroska file: nothing is decoded.

    Raises:
        BadFile: the packets cannot be read or rewritten.
        OSError: the file is gone.
    """
    av = pyav()
    open(path, "rb").close()
    first, end = int(video.pts[key]), int(video.pts[stop - 1])
    target = io.BytesIO()
    try:
        with av.open(str(path), metadata_errors="ignore") as container, av.open(target, "w", format="matroska") as output:
            stream = container.streams.video[0]
            copy = output.add_stream_from_template(stream)
            container.seek(first, stream=stream, backward=True)
            for packet in container.demux(stream):
                if packet.pts is None or packet.pts < first or packet.is_discard:
                    continue
                if packet.pts > end and packet.is_keyframe:
                    break
                packet.stream = copy
                output.mux(packet)
    except (av.FFmpegError, ValueError, EOFError) as error:
        raise BadFile(_reason(error)) from None
    return target.getvalue()
