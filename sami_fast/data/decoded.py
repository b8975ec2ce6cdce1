"""What images and videos from folders share: the cache of decoded pixels, and what happens to an image that cannot be read."""

import os
import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .cache import PixelCache
from .dali import DaliDecoder
from .dali import available as dali_available
from .index import Index, fingerprint, log, plain, report_bad
from .pixels import EightBit, resize, square, with_channels

GIB = 1 << 30


def dali_decoder(choice: str, size: int) -> DaliDecoder | None:
    """The decoder that `DataConfig.decoder` asks for: DALI's on this rank's GPU or the CPU, or None for Pillow and PyAV."""
    if choice == "torch" or (choice == "auto" and not dali_available()):
        return None
    return DaliDecoder(torch.cuda.current_device() if torch.cuda.is_available() else None, size)


class Decoded(EightBit):
    """Images that have to be decoded, each once if there is room to keep them.

    An image that cannot be decoded is replaced by the one after it, logged and counted; when more files than `max_bad` are lost, reading
    ends with an error. Any number of threads may read at the same time.

    Args:
        index: The files.
        count: Images or frames in all of them.
        image_shape: C, H, W to crop and resize to.
        places: Which of these this dataset shows, [size] int64.
        dali: DALI's decoder, or None for Pillow and PyAV.
        max_bad: Largest share of unreadable files.
        cache_gib: Room for decoded pixels.
        variant: Name of the crop, for the cache.
        what: "images" or "videos".
        workers: Batches decoded at a time by the feed; 0 is the number of CPU cores per rank.
    """

    def __init__(
        self,
        index: Index,
        count: int,
        image_shape: tuple[int, int, int],
        places: np.ndarray,
        *,
        dali: DaliDecoder | None,
        max_bad: float,
        cache_gib: float,
        variant: str,
        what: str,
        workers: int,
    ) -> None:
        self.index, self.image_shape, self.places, self.size = index, image_shape, places, len(places)
        self.max_bad, self.what = max_bad, what
        self.workers = workers or max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self.lost: dict[str, str] = {}  # files that turned out to be unreadable while they were read
        self._lock = threading.Lock()
        self.device = torch.device("cpu" if dali is None or dali.device_id is None else f"cuda:{dali.device_id}")
        self.dali = dali
        self.cache: PixelCache | None = None
        if count * (int(np.prod(image_shape)) + 4) <= cache_gib * GIB:
            channels, side, _ = image_shape
            try:
                self.cache = PixelCache.open(index.cache, f"{what}_{side}x{channels}_{variant}", index.state, count, image_shape)
            except OSError as error:
                log.warning("%s: decoded pixels are not kept: %s", index.cache, error.strerror)

    def decode(self, places: Sequence[int]) -> list[Tensor | None]:
        """Decode images by place: [C, H, W] uint8 each, None where that failed and `lose` was told."""
        raise NotImplementedError

    def fit(self, frames: Tensor, crop: str = "center", *, resized: bool = False) -> Tensor:
        """[F, H, W, 3] uint8, unless a pipeline has cropped and resized them -> [F, C, S, S] uint8, in memory of its own."""
        channels, size, _ = self.image_shape
        frames = frames.permute(0, 3, 1, 2)
        if not resized:
            frames = resize(frames, size, square(*frames.shape[2:], crop))
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
        log.warning("%s: %s; another one takes its place", plain(f"{self.index.folder}/{name}"), reason)
        total = len(self.index.names) + len(self.index.bad)
        if len(bad) > self.max_bad * total:
            report_bad(self.index.folder, bad, total, self.max_bad, self.what, self.index.cache)

    def pixels(self, index: Tensor) -> Tensor:
        """[n] int64 -> [n, C, H, W] uint8."""
        wanted = index.cpu().numpy() % self.size
        found: list[Tensor | None] = [self._kept(int(self.places[n])) for n in wanted]
        for _ in range(self.size + 1):
            missing = [slot for slot, pixels in enumerate(found) if pixels is None]
            if not missing:
                return torch.stack([pixels.to(self.device) for pixels in found])
            decoded = self.decode([int(self.places[wanted[slot]]) for slot in missing])
            for slot, pixels in zip(missing, decoded, strict=True):
                if pixels is not None:
                    found[slot] = pixels
                    self._keep(int(self.places[wanted[slot]]), pixels)
                else:
                    wanted[slot] = (wanted[slot] + 1) % self.size
                    found[slot] = self._kept(int(self.places[wanted[slot]]))
        raise UserError(f"data.path: nothing in {self.index.folder} can be read any more")

    def _kept(self, place: int) -> Tensor | None:
        if self.cache is None:
            return None
        pixels = np.empty(self.image_shape, np.uint8)
        return torch.from_numpy(pixels) if self.cache.read(place, pixels) else None

    def _keep(self, place: int, pixels: Tensor) -> None:
        if self.cache is not None:
            self.cache.write(place, pixels.cpu().numpy())

    @property
    def fingerprint(self) -> str:
        """Changes with the files: a run goes on only with the data it began with."""
        return fingerprint([*self.index.names, str(self.size)])
