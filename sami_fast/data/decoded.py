"""What images and videos from folders share: the cache of decoded pixels, and what happens to an image that cannot be read."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ..config import DataConfig
from ..environment import cores_of_rank
from ..errors import AbsentError, UserError, printable
from .cache import PixelCache, writable
from .dali import DaliDecoder
from .dali import available as dali_available
from .dataset import EightBit
from .identity import digest
from .index import Index, build_index, left_out, log, report_bad, shown
from .labels import Column, Labels, folders_of, read_columns, read_labels
from .pixels import resize, square, to_unit, with_channels

GIB = 1 << 30
SHOWN_BAD = 10  # names of unreadable files among the facts


def sizes(found: Sequence[tuple[int, int]]) -> str:
    """Widths and heights in words: all the same, or smallest, middle and largest by area."""
    ordered = sorted(found, key=lambda size: size[0] * size[1])
    picked = dict.fromkeys((ordered[0], ordered[len(ordered) // 2], ordered[-1]))
    return " to ".join(f"{width}x{height}" for width, height in picked) + (f", {len(set(found))} different" if len(set(found)) > 1 else "")


class Decoded(EightBit):
    """Images that have to be decoded, each once if there is room to keep them. A subclass says by `_show` which of them a split has.

    In training the image after it stands for one that cannot be decoded; who asks for it by its place learns that it is absent. It is
    logged and counted; when more files than `max_bad` are lost, reading ends with an error. Any number of threads may read at the same
    time.

    Args:
        path: The folder.
        inspect, suffixes, what, names: As in `build_index`.
        image_size: Height and width to crop and resize to, in pixels; 0 is 64.
        channels: 3 or 1; 0 is 3.
        decoder: "auto", "dali" or "torch"; see `DataConfig.decoder`.
        max_bad, cache_dir, cache_gib, workers, labels, holdout_by: See `DataConfig`.
    Raises:
        UserError: no such folder, no files of the kind, too many unreadable ones, labels that do not fit them, or DALI is asked for and
            not installed.
    """

    complete = False
    places: np.ndarray  # [size] int64, which of all images or frames this dataset shows
    count: int  # images or frames in all files

    def __init__(
        self,
        path: str,
        inspect: Callable[[Path], Any],
        suffixes: frozenset[str],
        what: str,
        names: Sequence[str] | None = None,
        *,
        image_size: int = 0,
        channels: int = 0,
        decoder: str = "auto",
        max_bad: float = 0.01,
        cache_dir: str = "",
        cache_gib: float = 4.0,
        workers: int = 0,
        labels: str = "",
        holdout_by: str = "",
    ) -> None:
        self.index = self._look(path, inspect, suffixes, what, names, max_bad, cache_dir)
        self.label_table, self.labels = labels, self._labels(labels, holdout_by)
        if self.labels is not None:
            self.factor_names, self.attribute_names = self.labels.names, self.labels.attributes
        self.holdout_by = holdout_by
        self.groups = folders_of(self.index.names) if holdout_by == "folder" else self.labels.groups if self.labels else None
        size = image_size or 64
        self.image_shape = (channels or 3, size, size)
        self.max_bad, self.cache_gib, self.what = max_bad, cache_gib, what
        self.workers = workers or cores_of_rank()
        self.lost: dict[str, str] = {}  # files that turned out to be unreadable while they were read
        self._lock = threading.Lock()
        self.dali = self._dali(decoder, size)
        self.device = torch.device("cpu" if self.dali is None or self.dali.device_id is None else f"cuda:{self.dali.device_id}")
        self.cache: PixelCache | None = None

    def _look(
        self,
        path: str,
        inspect: Callable[[Path], Any],
        suffixes: frozenset[str],
        what: str,
        names: Sequence[str] | None,
        max_bad: float,
        cache_dir: str,
    ) -> Index:
        return build_index(Path(path), inspect, suffixes, what=what, max_bad=max_bad, configured_cache=cache_dir, names=names)

    def _labels(self, labels: str, holdout_by: str) -> Labels | None:
        column = "" if holdout_by == "folder" else holdout_by
        return read_labels(labels, self.index.names, self.index.bad, column) if labels else None

    def label_columns(self) -> dict[str, Column]:
        """All that is known of each file of the index, as its table has it."""
        return read_columns(self.label_table, self.index.names, self.index.bad) if self.label_table else {}

    def _dali(self, choice: str, size: int) -> DaliDecoder | None:
        """The decoder that `DataConfig.decoder` asks for: DALI's on this rank's GPU or the CPU, or None for Pillow and PyAV."""
        if choice == "torch" or (choice == "auto" and not dali_available()):
            return None
        return DaliDecoder(torch.cuda.current_device() if torch.cuda.is_available() else None, size)

    def _show(self, count: int, places: np.ndarray, variant: str) -> None:
        """Show these `places` among `count` images or frames. Decoded ones are kept if there is room for all; `variant` names the crop."""
        self.count, self.places, self.size = count, places, len(places)
        if count * (int(np.prod(self.image_shape)) + 4) <= self.cache_gib * GIB:
            channels, side, _ = self.image_shape
            name = f"{self.what}_{side}x{channels}_{variant}"
            try:
                self.cache = PixelCache.open(writable(self.index.cache), name, self.index.state, count, self.image_shape)
            except OSError as error:
                log.warning("%s: decoded pixels are not kept: %s", self.index.cache, error.strerror)

    def files_of(self, index: Tensor) -> np.ndarray:
        """From which file of the index images are. [n] int64 both."""
        raise NotImplementedError

    def factors(self, index: Tensor) -> Tensor:
        """What `data.labels` says of the files that images are from. [n] int64 -> [n, F] float32."""
        return super().factors(index) if self.labels is None else torch.from_numpy(self.labels.values[self.files_of(index)])

    @staticmethod
    def options(config: DataConfig) -> dict[str, Any]:
        """The arguments that all of these share."""
        names = ("image_size", "channels", "decoder", "max_bad", "cache_dir", "cache_gib", "workers", "labels", "holdout_by")
        return {name: getattr(config, name) for name in names}

    def decode(self, places: Sequence[int]) -> list[Tensor | None]:
        """Decode images by place: [C, H, W] uint8 each, None where that failed, after a call of `lose`."""
        raise NotImplementedError

    def decoder_of(self, number: int) -> tuple[str, str]:
        """Who decodes a file, by its number in the index, and why."""
        raise NotImplementedError

    def formats(self) -> list[str]:
        """The format or codec of each file of the index."""
        raise NotImplementedError

    def contents(self) -> dict[str, Any]:
        """What the files hold, for `facts`: sizes and, of videos, frames."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        index = self.index
        decoders = Counter((form, *self.decoder_of(n)) for n, form in enumerate(self.formats()))
        return {
            "folder": str(index.folder),
            "files": len(index.names),
            **self.contents(),
            "decoders": [f"{count} x {form}: {decoder}, {why}" for (form, decoder, why), count in decoders.most_common()],
            "left out": left_out(index.others) or "no file with another ending",
            "unreadable": f"{len(index.bad)}" + (f": {shown(index.bad, SHOWN_BAD)}" if index.bad else ""),
            **self.notes(),
        }

    def notes(self) -> dict[str, Any]:
        """The last of `facts`: what is kept, how images are held out, what is not scored."""
        kept = "not kept (data.cache_gib)"
        if self.cache is not None:
            room = self.count * self.cache.record / GIB
            kept = f"kept in {self.index.cache}, {room:.2f} GiB when complete; later epochs and runs read them there"
        return {
            "decoded pixels": kept,
            **({"held out by": f"{self.holdout_by}, {len({*self.groups})} groups"} if self.groups else {}),
            **({"not scored": ", ".join(self.labels.unscored)} if self.labels is not None and self.labels.unscored else {}),
        }

    def fit(self, frames: Tensor, crop: str = "center", *, resized: bool = False) -> Tensor:
        """[F, H, W, 3] uint8, unless a pipeline has cropped and resized them -> [F, C, S, S] uint8, in memory of its own."""
        channels, size, _ = self.image_shape
        frames = rearrange(frames, "f h w c -> f c h w")
        if not resized:
            frames = resize(frames, size, square(frames.shape[2], frames.shape[3], crop))
        return with_channels(frames, channels).clone(memory_format=torch.contiguous_format)

    def places_of(self, index: Tensor) -> np.ndarray:
        """Places among all images or frames. [n] int64 both."""
        return self.places[index.cpu().numpy() % self.size]

    def lose(self, name: str, reason: str) -> None:
        """Count a file that cannot be read.

        Raises:
            UserError: they have become too many.
        """
        with self._lock:
            if name in self.lost:
                return
            self.lost[name] = reason
            bad = self.index.bad | self.lost
        log.warning("%s: %s; in training another one takes its place", printable(f"{self.index.folder}/{name}"), reason)
        total = len(self.index.names) + len(self.index.bad)
        if len(bad) > self.max_bad * total:
            report_bad(self.index.folder, bad, total, self.max_bad, self.what, self.index.cache)

    def any_lost(self) -> bool:
        """Whether anything could not be read."""
        return bool(self.lost)

    def why_lost(self, name: str) -> str:
        """Why a file of the index could not be read; "" where nothing is wrong with it so far."""
        return self.lost.get(name, "")

    def _at(self, places: Sequence[int]) -> list[Tensor | None]:
        """[C, H, W] uint8 each; None where it cannot be decoded."""
        found = [self._kept(place) for place in places]
        missing = [slot for slot, pixels in enumerate(found) if pixels is None]
        decoded = self.decode([places[slot] for slot in missing]) if missing else []
        for slot, pixels in zip(missing, decoded, strict=True):
            if pixels is not None:
                found[slot] = pixels
                self._keep(places[slot], pixels)
        return [None if pixels is None else pixels.to(self.device) for pixels in found]

    def _read(self, index: Tensor) -> tuple[Tensor, dict[int, str]]:
        """[n] int64 -> [n, C, H, W] uint8, zeros where one is absent; and why it is, by its place among the n."""
        found = self._at(self.places_of(index).tolist())
        files, absent = self.files_of(index), {}
        for slot, pixels in enumerate(found):
            if pixels is None:
                name = self.index.names[files[slot]]
                absent[slot] = f"{printable(name)}: {self.why_lost(name) or 'cannot be decoded'}"
        nothing = torch.zeros(self.image_shape, dtype=torch.uint8, device=self.device)
        return torch.stack([nothing if pixels is None else pixels for pixels in found]), absent

    def read(self, index: Tensor) -> tuple[Tensor, dict[int, str]]:
        pixels, absent = self._read(index)
        return to_unit(pixels), absent

    def pixels(self, index: Tensor) -> Tensor:
        """[n] int64 -> [n, C, H, W] uint8."""
        pixels, absent = self._read(index)
        for reason in absent.values():
            raise AbsentError(f"data.path: cannot read {self.index.folder}/{reason}")
        return pixels

    def training_pixels(self, index: Tensor) -> Tensor:
        """[n] int64 -> [n, C, H, W] uint8."""
        size = len(self.places)
        wanted = index.cpu().numpy() % size
        found: list[Tensor | None] = [None] * len(wanted)
        for _ in range(size + 1):
            missing = [slot for slot, pixels in enumerate(found) if pixels is None]
            if not missing:
                return torch.stack([pixels for pixels in found if pixels is not None])
            for slot, pixels in zip(missing, self._at([int(self.places[wanted[slot]]) for slot in missing]), strict=True):
                found[slot] = pixels
                if pixels is None:
                    wanted[slot] = (wanted[slot] + self._instead(int(self.places[wanted[slot]]))) % size
        raise UserError(f"data.path: nothing in {self.index.folder} can be read any more")

    def _instead(self, place: int) -> int:
        """How many images further on the one is that stands for a lost one in training."""
        return 1

    def unreadable(self) -> dict[str, str]:
        return self.index.bad

    def _kept(self, place: int) -> Tensor | None:
        if self.cache is None:
            return None
        pixels = np.empty(self.image_shape, np.uint8)
        return torch.from_numpy(pixels) if self.cache.read(place, pixels) else None

    def _keep(self, place: int, pixels: Tensor) -> None:
        if self.cache is not None:
            self.cache.write(place, pixels.cpu().numpy())

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the files and what is in them: a run goes on only with the data it began with."""
        grouped = map(str, self.places) if self.groups else []  # another table may group other files together
        return digest([*self.index.names, *self.index.contents, str(self.size), *grouped])
