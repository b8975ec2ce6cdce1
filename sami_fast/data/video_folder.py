"""Frames of the videos of a folder, decoded by DALI or PyAV: stills for training, ordered clips for evaluation."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..config import DataConfig
from .dali import DaliDecoder
from .decode import DALI_CODECS, DALI_GPU_CODECS, VIDEO_SUFFIXES, BadFile, DecodedFrame, Turn, Video, cut_out, decode_frames, video_facts
from .decoded import Decoded, sizes
from .labels import held_out_files
from .order import pooled_order
from .pixels import core, square, to_unit, with_channels, yuv_to_rgb

LARGEST_WHOLE = 1 << 28  # bytes of a video that is handed to DALI as it is

Frames = dict[int, Tensor]  # frame number -> [C, S, S] uint8


def _facts(path: Path) -> list[Any]:
    """`Video` as plain JSON, evenly spaced times as first and step; and the size of the file."""
    size = path.stat().st_size
    video = video_facts(path)
    pts = video.pts
    even = len(pts) > 1 and (np.diff(pts) == pts[1] - pts[0]).all()
    times = [int(pts[0]), int(pts[1] - pts[0])] if even else pts.tolist()
    return [video.codec, video.width, video.height, bool(even), times, list(video.keys), video.frames, video.fps, list(video.turn), size]


def _video(facts: list[Any]) -> Video:
    codec, width, height, even, times, keys, frames, fps, turn, _ = facts
    pts = times[0] + times[1] * np.arange(frames) if even else np.array(times, np.int64)
    return Video(codec, width, height, pts, tuple(keys), frames, fps, Turn(*turn))


class VideoFolder(Decoded):
    """Frames of every video below a folder.

    Index i is a frame drawn without replacement from all videos (a fixed random order), so that any first n frames are a fair sample;
    a feed takes them in the order of `order` instead.

    Args:
        path: The folder.
        holdout: Share of the *videos*, or of the groups of `holdout_by`, that only evaluation sees.
        split: 0 for training, 1 for evaluation.
        stride: Frames from one used frame to the next.
        stills: Frames of each video that an epoch shows; 0 is every stride-th.
        positions: "random": one at random in each of `stills` equal parts of a video, anew each epoch; "uniform": the middle of each.
        pool: Frames that are decoded ahead and shuffled together.
        clip_length: Frames of a clip.
        others: Settings and errors as in `Decoded`; PyAV must be installed too.
    """

    def __init__(
        self,
        path: str,
        *,
        holdout: float = 0.1,
        split: int = 0,
        stride: int = 1,
        stills: int = 0,
        positions: str = "random",
        pool: int = 4096,
        clip_length: int = 16,
        **others: Any,
    ) -> None:
        super().__init__(path, _facts, VIDEO_SUFFIXES, "videos", **others)
        every = [_video(facts) for facts in self.index.facts]
        offsets = np.cumsum([0] + [video.frames for video in every])  # place of a frame = offset of its video + its number
        chosen = held_out_files(self.index.names, self.groups, holdout, split)
        ascending = np.concatenate([offsets[v] + np.arange(0, every[v].frames, stride) for v in chosen])
        self._show(int(offsets[-1]), ascending[ops.random_permutation(0, 0, ops.Stream.SHUFFLE, len(ascending)).numpy()], "center")
        self.held_out = holdout > 0 and len(every) > 1
        self.videos, self.offsets, self.chosen = every, offsets, chosen
        self.stride, self.stills, self.positions, self.pool, self.clip_length = stride, stills, positions, pool, clip_length
        self._index_of = np.full(int(offsets[-1]), -1)
        self._index_of[self.places] = np.arange(len(self.places))
        self._segments = [video.segments() for video in every]
        starts = [offsets[v] + start for v, segments in enumerate(self._segments) for _, start, _ in segments]
        self._starts = np.array(starts)  # place of the first frame of each segment of all videos
        self._pieces = [(v, *segment) for v, segments in enumerate(self._segments) for segment in segments]
        self._epoch_size = len(self.places) if not stills else int(sum(min(stills, self._used(v)) for v in chosen))
        self.ahead = min(pool, self._epoch_size)
        self._waiting: dict[tuple[int, tuple[int, ...]], Future[Frames]] = {}
        self._recent: OrderedDict[int, Frames] = OrderedDict()  # frames of segments that were decoded lately
        self._broken: set[tuple[int, int]] = set()  # video and number of frames that were lost; they are not tried again
        self._claim = threading.Lock()

    def _dali(self, choice: str, size: int) -> DaliDecoder | None:
        """On a CPU `auto` leaves DALI alone where the core converts frames: DALI writes every frame out in full resolution."""
        dali = super()._dali(choice, size)
        return None if choice == "auto" and dali is not None and dali.device_id is None and core() is not None else dali

    def _used(self, video: int) -> int:
        """Frames of a video that the stride leaves."""
        return -(-self.videos[video].frames // self.stride)

    @classmethod
    def from_config(cls, config: DataConfig, seed: int, split: int) -> Self:
        return cls(config.path, split=split, holdout=config.holdout, **cls.options(config), **asdict(config.video))

    @property
    def epoch_size(self) -> int:
        return self._epoch_size

    def order(self, epoch: int, seed: int, batch_size: int) -> Tensor:
        """Indices of the frames that an epoch shows, in order. [epoch_size] int64."""
        if self.stills:
            picked = []
            draws = ops.random_uniform(seed, epoch, ops.Stream.AUGMENT, torch.from_numpy(self.chosen), self.stills).numpy()
            for v, draw in zip(self.chosen, draws, strict=True):
                used = self._used(v)
                parts = min(self.stills, used)
                edges = np.arange(parts + 1) * used // parts  # rounded to whole frames, so that none lies in two parts
                inside = draw[:parts] if self.positions == "random" else 0.5
                frames = np.minimum(edges[:-1] + (inside * np.diff(edges)).astype(np.int64), edges[1:] - 1)
                picked.append(self.offsets[v] + frames * self.stride)
            places = np.concatenate(picked)
        else:
            places = np.sort(self.places)
        _, run = np.unique(np.searchsorted(self._starts, places, side="right"), return_inverse=True)
        order = pooled_order(torch.from_numpy(run), seed, epoch, self.epoch_size, batch_size, self.pool)
        return torch.from_numpy(self._index_of[places[order.numpy()]])

    # Decoding

    def formats(self) -> list[str]:
        return [video.codec for video in self.videos]

    def contents(self) -> dict[str, Any]:
        frames, rates = [video.frames for video in self.videos], [video.fps for video in self.videos if video.fps]
        return {
            "pixels": sizes([(video.width, video.height) for video in self.videos]),
            "frames": f"{sum(frames)}, {min(frames)} to {max(frames)} in a video",
            "frames per second": f"{median(rates):.4g} (median), {min(rates):.4g} to {max(rates):.4g}" if rates else "unknown",
        }

    def decoder_of(self, number: int) -> tuple[str, str]:
        facts = self.videos[number]
        if self.dali is None:
            return "PyAV", "the compiled core converts its frames faster than DALI on a CPU" if core() else "without DALI"
        on_gpu = self.dali.device_id is not None
        if any(facts.turn):
            return "PyAV", "it is stored turned or mirrored"
        if not len(facts.pts):
            return "PyAV", "its container keeps no times"
        if facts.codec in (DALI_GPU_CODECS if on_gpu else DALI_CODECS):
            return "DALI", f"{facts.codec} is one of its codecs on the {'GPU' if on_gpu else 'CPU'}"
        return "PyAV", f"DALI does not decode {facts.codec} on the {'GPU' if on_gpu else 'CPU'}"

    def files_of(self, index: Tensor) -> np.ndarray:
        return np.searchsorted(self.offsets, self.places_of(index), side="right") - 1

    def in_order(self) -> Tensor:
        """Video after video, each in the order of time."""
        return torch.from_numpy(np.argsort(self.places))

    def sources(self, index: Tensor) -> dict[str, list[Any]]:
        """Where frames come from: "files", names relative to the folder, and "frames", from 0."""
        places, videos = self.places_of(index), self.files_of(index)
        return {"files": [self.index.names[v] for v in videos], "frames": (places - self.offsets[videos]).tolist()}

    def decode(self, places: Sequence[int]) -> list[Tensor | None]:
        pieces = (np.searchsorted(self._starts, places, side="right") - 1).tolist()
        numbers = [int(place - self.offsets[self._pieces[piece][0]]) for piece, place in zip(pieces, places, strict=True)]
        wanted: dict[int, set[int]] = {}
        for piece, number in zip(pieces, numbers, strict=True):
            wanted.setdefault(piece, set()).add(number)
        found: dict[int, Frames] = {}
        for wait in (False, True):  # first what no other thread is decoding, then what others may have finished by now
            for piece in wanted.keys() - found.keys():
                frames = self._segment(piece, sorted(wanted[piece]), wait)
                if frames is not None:
                    found[piece] = frames
        return [found[piece].get(number) for piece, number in zip(pieces, numbers, strict=True)]

    def _segment(self, piece: int, frames: list[int], wait: bool) -> Frames | None:
        """These frames of a segment, without those that cannot be decoded; None where another thread decodes it, unless told to wait.

        Without stills all used frames of it are decoded at once, since the others will be asked for soon.
        """
        v, key, start, stop = self._pieces[piece]
        if not self.stills:
            frames = list(range(-(-start // self.stride) * self.stride, stop, self.stride))
        with self._claim:
            frames = [n for n in frames if (v, n) not in self._broken]
            recent = self._recent.get(piece, {})
            if recent.keys() >= set(frames):
                if recent:
                    self._recent.move_to_end(piece)
                return recent
            job = (piece, tuple(frames))
            mine = job not in self._waiting
            future = self._waiting.setdefault(job, Future())
        if not mine:
            return future.result() if wait else None
        try:
            decoded = self._decode_what_can_be(v, key, frames)
            for number, pixels in decoded.items():
                self._keep(int(self.offsets[v]) + number, pixels)
            with self._claim:
                self._recent[piece] = {**self._recent.get(piece, {}), **decoded}
                self._recent.move_to_end(piece)
                held = sum(map(len, self._recent.values()))
                while held > 2 * self.pool and len(self._recent) > 1:
                    held -= len(self._recent.popitem(last=False)[1])
            future.set_result(decoded)
            return decoded
        except BaseException as error:
            future.set_exception(error)
            raise
        finally:
            with self._claim:
                self._waiting.pop(job, None)

    def _decode_what_can_be(self, v: int, key: int, frames: list[int]) -> Frames:
        """Frames that fail are remembered and not tried again; those before the damage are used.

        Stills are then tried one by one: whether a frame is there must not depend on which others a rank happened to ask for with it.
        """
        try:
            return self._decode_segment(v, key, frames)
        except (OSError, BadFile) as error:
            self.lose(self.index.names[v], getattr(error, "strerror", None) or str(error))
            found = error.found if isinstance(error, BadFile) else {}
        if self.stills and len(frames) > 1:
            return {n: pixels for one in frames for n, pixels in self._decode_what_can_be(v, key, [one]).items()}
        with self._claim:
            self._broken.update((v, n) for n in frames if n not in found)
        return found

    def _decode_segment(self, v: int, key: int, frames: list[int]) -> Frames:
        path, video = self.index.folder / self.index.names[v], self.videos[v]
        if path.stat().st_size != self.index.facts[v][-1]:
            raise BadFile("changed since it was looked at")
        if self.dali is not None and self.decoder_of(v)[0] == "DALI":
            # Else only a part is handed over, since DALI reads through all that it is given, and all of that lies in memory.
            whole = len(self._segments[v]) == 1 and self.index.facts[v][-1] <= LARGEST_WHOLE
            try:
                encoded = np.fromfile(path, np.uint8) if whole else np.frombuffer(cut_out(path, video, key, frames[-1] + 1), np.uint8)
                decoded = self.dali.frames(encoded, [n if whole else n - key for n in frames], square(video.height, video.width))
                return dict(zip(frames, self.fit(decoded, resized=self.dali.resize_inside), strict=True))
            except (RuntimeError, BadFile):
                pass  # PyAV is tried below: it may be more lenient, and else says what is wrong
        return dict(zip(frames, decode_frames(path, video, key, frames, self._small), strict=True))

    def _small(self, frame: DecodedFrame) -> Tensor:
        """[C, S, S] uint8, from the planes where that is possible: the frame is never converted in full."""
        found = frame.planes() if core() is not None else None
        if found is None:
            return self.fit(torch.from_numpy(np.ascontiguousarray(frame.rgb()))[None])[0]
        planes, weights, full_range = found
        channels, size, _ = self.image_shape
        step = -(-planes[0].shape[0] // planes[1].shape[0])
        top, left, side = (n // step * step for n in square(*planes[0].shape))  # on whole pixels of the chroma
        y, u, v = (torch.from_numpy(plane) for plane in planes)
        pixels = yuv_to_rgb(y, u, v, (top, left, side), size, weights, full_range)
        return with_channels(pixels[None], channels)[0]

    # Clips

    @property
    def num_clips(self) -> int:
        """Clips that follow each other without overlap in the videos of this split; shorter videos have none."""
        return int(self._clips_of_each.sum())

    @property
    def _clips_of_each(self) -> np.ndarray:
        return np.array([self._used(v) // self.clip_length for v in self.chosen])

    def clips(self, index: Tensor) -> Tensor:
        """Ordered frames, `stride` apart. [n] int64, below `num_clips` -> [n, T, C, H, W] float32 in [-1, 1]."""
        ends = self._clips_of_each.cumsum()
        clips = []
        for n in index.tolist():
            if not 0 <= n < ends[-1]:
                raise IndexError(f"clip {n} of {ends[-1]}")
            which = int(np.searchsorted(ends, n, side="right"))
            first = (n - (ends[which - 1] if which else 0)) * self.clip_length
            places = self.offsets[self.chosen[which]] + (first + np.arange(self.clip_length)) * self.stride
            clips.append(self.pixels(torch.from_numpy(self._index_of[places])))
        return to_unit(torch.stack(clips))
