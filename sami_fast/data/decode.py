"""One encoded image, or a run of frames of a video, to 8-bit RGB by Pillow and PyAV; and what a file's header says.

DALI's decoders (`dali.py`) give the same images bit for bit, and the same frames up to rounding and the interpolation of chroma.
"""

import io
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Self, TypeVar
from zlib import crc32

import numpy as np

from ..errors import UserError, one_line
from ..pictures import as_seen, profile_of
from .cache import in_words

HEIC_SUFFIXES = frozenset({".heic", ".heif", ".hif"})
HEIC_HINT = "; HEIC needs pillow-heif, `pip install 'sami-fast[heic]'`"
LARGEST_FILE = 1 << 30  # bytes of an encoded image: more than any of as many pixels as Pillow decodes
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff", ".gif", ".jp2", ".avif"}
)
VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".ogv", ".wmv", ".flv", ".3gp", ".y4m"}
)
# What DALI decodes as Pillow does. Of BMP and PPM, which it reads too, some kinds come out wrong.
DALI_MODES = {"JPEG": {"L", "RGB"}, "PNG": {"1", "L", "RGB"}, "WEBP": {"RGB"}}
PNG = b"\x89PNG\r\n\x1a\n"  # begins every PNG
PLAIN_CHUNKS = {b"IHDR": 25, b"pHYs": 21, b"tIME": 19, b"IDAT": None, b"IEND": 12}  # of a PNG of nothing but pixels, and their lengths
PLAIN_HEADS = {b"\x08\x00\x00\x00": "L", b"\x08\x02\x00\x00": "RGB"}  # 8 bits of grey or colour: what follows a PNG's width and height
PLAIN_PIXELS = 1 << 26  # at most: of larger images Pillow may warn
PNG_TAGS = (b"eXIf", b"Raw profile type ", b"XML:com.adobe.xmp")  # begin the parts of a PNG that may hold an orientation
PLANAR = frozenset({"yuv420p", "yuvj420p", "yuv444p", "yuvj444p"})
BT709, BT601, BT2020 = (0.2126, 0.0722), (0.299, 0.114), (0.2627, 0.0593)  # shares of red and blue in the luma
LUMA_WEIGHTS = {1: BT709, 5: BT601, 6: BT601, 9: BT2020, 10: BT2020}  # by the number that ISO 23091-2 gives them
DALI_CODECS = frozenset({"vp8", "vp9", "mjpeg"})  # on the CPU; a GPU decodes the others too
DALI_GPU_CODECS = DALI_CODECS | {"h264", "hevc", "av1", "mpeg4"}


Frame = TypeVar("Frame")


class BadFile(Exception):
    """A file of the data that cannot be used, and why; it is skipped and counted.

    Args:
        reason: Why.
        found: What could be decoded all the same, by number of the frame.
    """

    def __init__(self, reason: str, found: dict[int, Any] | None = None) -> None:
        super().__init__(reason)
        self.found = found or {}


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


@cache
def image_suffixes() -> frozenset[str]:
    """Endings of the images that can be read here, in lower case."""
    try:
        import_module("pillow_heif").register_heif_opener()
    except ImportError:
        return IMAGE_SUFFIXES
    return IMAGE_SUFFIXES | HEIC_SUFFIXES


def read_image(path: Path) -> np.ndarray:
    """The bytes of a file. [n] uint8.

    Raises:
        BadFile: none, or more than an image has.
        OSError: from the system.
    """
    size = path.stat().st_size
    if size > LARGEST_FILE:  # before it fills the memory
        raise BadFile(f"{in_words(size)}, more than the {in_words(LARGEST_FILE)} of an image file")
    if not size:
        raise BadFile("zero bytes")
    return np.fromfile(path, np.uint8)


def image_facts(data: bytes) -> tuple[int, int, str, bool]:
    """Width and height after EXIF rotation, format and mode ("JPEG RGB"), and whether DALI decodes it as we do.

    Only the header is read, unless the end of the file looks cut off or the format does not tell.

    Raises:
        BadFile: not an image that Pillow knows, or a truncated one.
    """
    from PIL import Image

    if not data:
        raise BadFile("zero bytes")
    if (plain := _plain_png(data)) is not None:
        return plain
    try:
        with Image.open(io.BytesIO(data)) as image:
            kind, mode, moving = image.format or "", image.mode, getattr(image, "is_animated", False)
            width, height = image.size
            # getexif decodes all of a PNG to find tags behind the pixels.
            tagged = kind != "PNG" or any(
                tag in data[start:end] for name, start, end in chunks(data) if name != b"IDAT" for tag in PNG_TAGS
            )
            orientation = image.getexif().get(0x0112, 1) if tagged else 1
            if orientation in (5, 6, 7, 8):  # rotated by a quarter turn
                width, height = height, width
            transparent, profiled = "transparency" in image.info, profile_of(image) is not None
    except Exception as error:  # Pillow's plugins raise whatever a broken header leads them to
        raise BadFile("not an image that can be read" if "cannot identify" in str(error) else _reason(error)) from None
    whole = {
        "JPEG": data[-2:] == b"\xff\xd9",
        "PNG": data[-8:-4] == b"IEND",
        "WEBP": len(data) >= 8 + int.from_bytes(data[4:8], "little"),
    }
    if not whole.get(kind, False):
        height, width = decode_image(data).shape[:2]
    odd = {  # where DALI fails or gives other pixels
        "JPEG": orientation != 1 and b"tiff:Orientation" in data,  # it reads EXIF, not XMP
        "PNG": orientation != 1 or data[24:25] > b"\x08",  # the same, and it rounds 16 bits in another way
        "WEBP": data[12:16] == b"VP8X",  # may hold metadata, transparency or an animation
    }
    suits = mode in DALI_MODES.get(kind, ()) and not (moving or transparent or profiled or odd[kind])
    return width, height, f"{kind} {mode}", suits


def _plain_png(data: bytes) -> tuple[int, int, str, bool] | None:
    """`image_facts` of a PNG of nothing but pixels, several times as fast as by Pillow; shards need them of each image they read."""
    found = [*chunks(data)]
    names = [name for name, *_ in found]
    if names[:1] != [b"IHDR"] or b"IDAT" not in names or data[-8:-4] != b"IEND" or not PLAIN_CHUNKS.keys() >= {*names}:
        return None
    for name, start, end in found:  # those that Pillow would check, too
        if name != b"IDAT" and (
            names.count(name) > 1
            or end - start != PLAIN_CHUNKS[name]
            or crc32(data[start + 4 : end - 4]) != int.from_bytes(data[end - 4 : end])
        ):
            return None
    width, height, mode = int.from_bytes(data[16:20]), int.from_bytes(data[20:24]), PLAIN_HEADS.get(data[24:28])
    if mode is None or not 0 < width * height <= PLAIN_PIXELS:
        return None
    return width, height, f"PNG {mode}", True


def decode_image(data: bytes) -> np.ndarray:
    """An image as it is meant to be seen: rotated by its EXIF, in sRGB, first frame, 16 bits scaled to 8, transparent pixels over black.

    16 bits of grey are rounded; of 16 bits of colour Pillow keeps the upper 8, which is at most one level off.

    Args:
        data: The file's bytes.
    Returns:
        [H, W, 3] uint8.
    Raises:
        BadFile: broken, truncated, or of a mode that is no image (more than four channels).
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as opened:
            opened.load()
            return as_seen(opened)
    except Exception as error:
        raise BadFile(_reason(error)) from None


def chunks(data: bytes | np.ndarray) -> Iterator[tuple[bytes, int, int]]:
    """The parts of a PNG: the name of each, and where it begins and ends, its length and checksum included. None of other files."""
    view = memoryview(data)  # pyrefly: ignore[bad-argument-type] (NumPy 2 arrays are buffers)
    place = len(PNG) if view[:8] == PNG else len(view)
    while place + 12 <= len(view):
        end = place + 12 + int.from_bytes(view[place : place + 4])
        yield bytes(view[place + 4 : place + 8]), place, end
        place = end


def without_profile(data: np.ndarray) -> np.ndarray:
    """A PNG without its colour profile, which DALI does not apply and libpng complains of on stderr; other files as they are. [n] uint8."""
    for name, start, end in chunks(data):
        if name == b"iCCP":
            return np.concatenate((data[:start], data[end:]))
        if name == b"IDAT":
            break
    return data


def _reason(error: Exception) -> str:
    return one_line(error, 120)


class Turn(NamedTuple):
    """How a frame is shown: rows and columns exchanged, then mirrored; one of eight ways, as of EXIF. By default as it is stored."""

    transposed: bool = False
    upside_down: bool = False
    mirrored: bool = False

    @classmethod
    def of_matrix(cls, matrix: Sequence[int]) -> Self:
        """What a display matrix asks for, to the nearest quarter turn: pixel (x, y) is shown at (a x + c y, b x + d y)."""
        a, b, _, c, d = matrix[:5]
        if abs(a) + abs(d) >= abs(b) + abs(c):
            return cls(False, d < 0, a < 0)
        return cls(True, b < 0, c < 0)

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """[H, W, C] -> [H, W, C], or [W, H, C] where transposed."""
        turned = pixels.swapaxes(0, 1) if self.transposed else pixels
        return turned[:: -1 if self.upside_down else 1, :: -1 if self.mirrored else 1]


def _turn_of(frame: Any) -> Turn:
    found = frame.side_data.get("DISPLAYMATRIX")
    return Turn() if found is None else Turn.of_matrix(np.frombuffer(found, np.int32, 9).tolist())


@dataclass(frozen=True)
class Video:
    """What is known of a video file without decoding it.

    Args:
        codec: Name of the codec: "vp9", "h264" ...
        width, height: In pixels, after the turn that the file asks for.
        pts: Presentation time of each frame, ascending, in the stream's time base; empty where the container keeps none.
        keys: Frames, by number, from which decoding can start.
        frames: Number of frames.
        fps: Mean frame rate, 0 if unknown.
        turn: From the frames as they are stored to what is shown.
    """

    codec: str
    width: int
    height: int
    pts: np.ndarray
    keys: tuple[int, ...]
    frames: int
    fps: float
    turn: Turn

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
                found.append((self.key_before(first), first, last))
        return found

    def key_before(self, frame: int) -> int:
        """The last key frame at or before a frame; 0 where there is none."""
        place = bisect_right(self.keys, frame)
        return self.keys[place - 1] if place else 0


def video_facts(path: Path) -> Video:
    """Read a video's packets and its first frame.

    Raises:
        BadFile: not a video, no video stream, no packet, or the first frame cannot be decoded.
        OSError: the file is gone or may not be read.
    """
    av = pyav()
    if path.stat().st_size == 0:
        raise BadFile("zero bytes")
    open(path, "rb").close()  # raises the system's error for a file that may not be read; PyAV's says less
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            stream = _stream(container)
            stream.codec_context.thread_count = 1
            first = next(container.decode(stream), None)
            if first is None:
                raise BadFile("no frame that can be decoded")
            codec, turn = stream.codec_context.name, _turn_of(first)
            codec = {"libdav1d": "av1", "libvpx": "vp8", "libvpx-vp9": "vp9"}.get(codec, codec)
            width, height = first.width, first.height
            fps = float(stream.average_rate or 0)
            # MPEG program streams time only some frames; AVI times packets, which H.264 and H.265 put in another order than frames.
            mixed_up = codec in ("h264", "hevc") and stream.codec_context.has_b_frames
            untimed = container.format.name == "mpeg" or (container.format.name == "avi" and mixed_up)
        with av.open(str(path), metadata_errors="ignore") as container:
            stream = _stream(container)
            times, keys = [], []
            try:
                for packet in container.demux(stream):
                    if not packet.size or packet.is_discard or packet.is_corrupt or (codec == "vp8" and not _is_shown(packet)):
                        continue
                    times.append(packet.pts)
                    if packet.is_keyframe:
                        keys.append(packet.pts)
            except av.FFmpegError:
                pass  # cut off: what came before can be used
    except BadFile:
        raise
    except (av.FFmpegError, ValueError, EOFError, OSError) as error:
        raise BadFile(_reason(error)) from None
    if not times:
        raise BadFile("no frame that can be decoded")
    if turn.transposed:
        width, height = height, width
    if untimed or None in times or len(set(times)) < len(times):  # times do not tell frames apart: these are counted from the start
        return Video(codec, width, height, np.zeros(0, np.int64), (0,), len(times), fps, turn)
    pts = np.sort(np.array(times, np.int64))
    numbers = sorted(set(np.searchsorted(pts, keys).tolist()))
    return Video(codec, width, height, pts, tuple(numbers), len(times), fps, turn)


def _stream(container: Any) -> Any:
    """The video stream that a player would show, rather than a cover picture.

    Raises:
        BadFile: there is none.
    """
    if not container.streams.video:
        raise BadFile("no video stream")
    stream = container.streams.best("video")
    if stream is None or stream.codec_context is None:
        raise BadFile("no video stream of a known codec")
    return stream


def _is_shown(packet: Any) -> bool:
    """Whether a VP8 packet is a frame to see, not only one that others refer to: RFC 6386, section 9.1."""
    return bool(memoryview(packet)[0] & 0x10)


class DecodedFrame:
    """A frame in the memory of PyAV's decoder, valid until it decodes the next one."""

    def __init__(self, frame: Any, reformatter: Any, turn: Turn) -> None:
        self._frame, self._reformatter, self._turn = frame, reformatter, turn

    def rgb(self) -> np.ndarray:
        """[H, W, 3] uint8, turned as the file asks for."""
        return self._turn(self._reformatter.reformat(self._frame, format="rgb24").to_ndarray())

    def planes(self) -> tuple[list[np.ndarray], tuple[float, float], bool] | None:
        """Luma and two planes of chroma [H, W] uint8, the shares of red and blue in the luma, and whether values use the full range.

        None where the frame is turned or one pixel wide, or its planes are not 8 bits, or chroma is coarser in one direction only.
        """
        frame = self._frame
        if any(self._turn) or min(frame.width, frame.height) < 2 or frame.format.name not in PLANAR:
            return None
        planes = [np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width] for plane in frame.planes]
        return planes, LUMA_WEIGHTS.get(int(frame.colorspace), BT601), "j" in frame.format.name or int(frame.color_range) == 2


def decode_frames(
    path: Path, video: Video, key: int, wanted: Sequence[int], fit: Callable[[DecodedFrame], Frame] = DecodedFrame.rgb
) -> list[Frame]:
    """Frames of a video by PyAV, decoded from one key frame on.

    Args:
        path: The file.
        video: What `video_facts` said of it.
        key: A key frame at or before the first wanted one.
        wanted: Frame numbers, ascending.
        fit: Applied to each frame as soon as it is decoded, so that only what it makes of them is held.
    Returns:
        What `fit` made of each, in the order of `wanted`; by default the frames themselves, [H, W, 3] uint8.
    Raises:
        BadFile: a wanted frame is not there or cannot be decoded.
        OSError: the file is gone.
    """
    av = pyav()
    open(path, "rb").close()  # raises the system's error for a file that is gone; PyAV's says less
    found: dict[int, Frame] = {}
    reason = ""
    # Where a picture is refreshed part by part, frames just after the key frame that the container names need the key frame before it too.
    for start in dict.fromkeys((key, video.key_before(max(key - 1, 0)))):
        found.clear()
        try:
            _decode(path, video, start, wanted, fit, found)
        except (av.FFmpegError, ValueError, EOFError, BadFile) as error:
            reason = _reason(error)
        if wanted[0] in found:
            break
    missing = set(wanted) - found.keys()
    if missing:
        raise BadFile(f"frame {min(missing)}" + (f": {reason}" if reason else " cannot be decoded"), found)
    return [found[n] for n in wanted]


def _decode(
    path: Path, video: Video, key: int, wanted: Sequence[int], fit: Callable[[DecodedFrame], Frame], found: dict[int, Frame]
) -> None:
    av = pyav()
    timed = len(video.pts) > 0
    number = {int(t): n for n, t in enumerate(video.pts[key : wanted[-1] + 1], start=key)} if timed else {}
    needed, end = set(wanted), int(video.pts[wanted[-1]]) if timed else 0
    convert = av.video.reformatter.VideoReformatter()  # one for all frames, as making one costs more than using it
    with av.open(str(path), metadata_errors="ignore") as container:
        stream = _stream(container)
        stream.codec_context.thread_count = 1  # batches are decoded side by side instead
        frames = (frame for packet in _packets(container, stream, video, key) for frame in packet.decode())
        for count, frame in enumerate(frames):
            n = number.get(frame.pts, -1) if timed else count
            if n in needed and n not in found:
                found[n] = fit(DecodedFrame(frame, convert, video.turn))
                if len(found) == len(needed):
                    break
            if timed and frame.pts is not None and frame.pts > end:
                break


def _packets(container: Any, stream: Any, video: Video, key: int) -> Iterator[Any]:
    """Packets from a key frame on, or from one before it: containers without an index, as MPEG transport streams, seek by guessing."""
    back = 0
    while key and len(video.pts):
        container.seek(int(video.pts[key]), stream=stream, backward=True)
        packets = (packet for packet in container.demux(stream))
        first = next((packet for packet in packets if packet.is_keyframe), None)
        if first is not None and first.pts is not None and first.pts <= video.pts[key]:
            yield first
            yield from packets
            return
        back = max(1, 2 * back)
        key = video.keys[max(bisect_right(video.keys, key) - 1 - back, 0)]
    if back:
        container.seek(0, backward=True)
    yield from container.demux(stream)


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
            stream = _stream(container)
            copy = output.add_stream_from_template(stream)
            for packet in _packets(container, stream, video, key):
                if packet.pts is None or packet.pts < first or packet.is_discard:
                    continue
                if packet.pts > end and packet.is_keyframe:
                    break
                packet.stream = copy
                output.mux(packet)
    except (av.FFmpegError, ValueError, EOFError) as error:
        raise BadFile(_reason(error)) from None
    return target.getvalue()
