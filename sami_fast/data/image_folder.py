"""Images of a folder, and CelebA: decoded by DALI or Pillow, cropped to a square, resized."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ..config import DataConfig
from .celeba import celeba_listing
from .dali import MAX_BATCH
from .decode import BadFile, decode_image, image_facts, image_suffixes, read_image, without_profile
from .decoded import Decoded, sizes
from .labels import held_out_files
from .pixels import square

ImageFacts = tuple[int, int, str, bool]  # as of `image_facts`


def _facts(path: Path) -> ImageFacts:
    return image_facts(read_image(path).tobytes())


class Encoded(Decoded):
    """Images of which each is the content of an image file, wherever that lies.

    Args:
        path, inspect, suffixes, what, names: As in `Decoded`.
        holdout: Share of the images, or of the groups of `holdout_by`, a fixed random choice, that only evaluation sees.
        split: 0 for training, 1 for evaluation.
        part: Which part these are, for the cache, where `names` are already split.
        crop: See `square`.
        others: Settings and errors as in `Decoded`.
    """

    def __init__(
        self,
        path: str,
        inspect: Callable[[Path], Any],
        suffixes: frozenset[str],
        what: str,
        names: Sequence[str] | None = None,
        *,
        holdout: float = 0.1,
        split: int = 0,
        part: str = "",
        crop: str = "center",
        **others: Any,
    ) -> None:
        super().__init__(path, inspect, suffixes, what, names, **others)
        self.crop = crop
        self._not_dali: set[int] = set()  # places of images that DALI could not decode and Pillow could
        count = len(self.index.names)
        self.held_out = names is not None or (holdout > 0 and count > 1)
        places = held_out_files(self.index.names, self.groups, 0.0 if names is not None else holdout, split)
        self._show(count, places, f"{crop}-{part}" if part else crop)

    @classmethod
    def from_config(cls, config: DataConfig, seed: int, split: int) -> Self:
        return cls(config.path, split=split, holdout=config.holdout, **cls.options(config))

    def encoded(self, place: int) -> np.ndarray:
        """The content of an image file, by its place. [n] uint8.

        Raises:
            OSError, BadFile: it cannot be read.
        """
        raise NotImplementedError

    def facts_of(self, place: int, encoded: np.ndarray) -> ImageFacts:
        """What is known of an image, by its place and its content. May raise `BadFile`."""
        raise NotImplementedError

    def described(self, kind: str, suits: bool) -> tuple[str, str]:
        """Who decodes images of a format and mode, and why."""
        if self.dali is None:
            return "Pillow", "without DALI"
        return ("DALI", f"{kind} is one of its formats") if suits else ("Pillow", f"{kind} needs more than DALI's decoder does")

    def files_of(self, index: Tensor) -> np.ndarray:
        return self.places_of(index)

    def sources(self, index: Tensor) -> dict[str, list[Any]]:
        """Where images come from: "files", names relative to the folder."""
        return {"files": [self.index.names[int(place)] for place in self.places_of(index)]}

    def decode(self, places: Sequence[int]) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        for first in range(0, len(places), MAX_BATCH):
            found += self._decode(places[first : first + MAX_BATCH])
        return found

    def _decode(self, places: Sequence[int]) -> list[Tensor | None]:
        encoded: dict[int, np.ndarray] = {}
        facts: dict[int, ImageFacts] = {}
        for place in set(places):
            if self.any_lost() and self.why_lost(self.index.names[place]):
                continue
            try:
                data = self.encoded(place)
                if self.dali:
                    facts[place] = self.facts_of(place, data)
                encoded[place] = data
            except (OSError, BadFile) as error:
                name = self.index.names[place]
                if not self.why_lost(name):  # else it is lost with all of its shard
                    self.lose(name, getattr(error, "strerror", None) or str(error))
        found: dict[int, Tensor | None] = dict.fromkeys(places)
        for_dali = [p for p in facts if facts[p][3] and p not in self._not_dali]
        found |= self._by_dali({place: without_profile(encoded[place]) for place in for_dali}, facts)
        for place, data in encoded.items():
            if found[place] is None:
                try:
                    found[place] = self.fit(torch.from_numpy(decode_image(data.tobytes()))[None], self.crop)[0]
                    if place in for_dali:  # one image that fails makes DALI fail the whole batch: it is not tried there again
                        self._not_dali.add(place)
                except BadFile as error:
                    self.lose(self.index.names[place], str(error))
        return [found[place] for place in places]

    def _by_dali(self, encoded: dict[int, np.ndarray], facts: dict[int, ImageFacts]) -> dict[int, Tensor]:
        """By DALI in one batch; where one of them is broken, each on its own, and those that fail are left out."""
        if not encoded or self.dali is None:
            return {}
        boxes = [square(facts[place][1], facts[place][0], self.crop) for place in encoded]
        try:
            decoded = self.dali.images([*encoded.values()], boxes)
            inside = self.dali.resize_inside
            return {p: self.fit(pixels[None], self.crop, resized=inside)[0] for p, pixels in zip(encoded, decoded, strict=True)}
        except RuntimeError:
            if len(encoded) == 1:
                return {}
            return {place: pixels for one in encoded for place, pixels in self._by_dali({one: encoded[one]}, facts).items()}


class ImageFolder(Encoded):
    """Every image below a folder, in the order of their names.

    Args:
        path: The folder.
        names: The files of this dataset, already split, instead of all below the folder.
        others: Settings and errors as in `Encoded`.
    """

    def __init__(self, path: str, *, names: Sequence[str] | None = None, **others: Any) -> None:
        super().__init__(path, _facts, image_suffixes(), "images", names, **others)

    def formats(self) -> list[str]:
        return [form for _, _, form, _ in self.index.facts]

    def contents(self) -> dict[str, Any]:
        return {"pixels": sizes([(width, height) for width, height, _, _ in self.index.facts])}

    def decoder_of(self, number: int) -> tuple[str, str]:
        return self.described(*self.index.facts[number][2:])

    def encoded(self, place: int) -> np.ndarray:
        return read_image(self.index.folder / self.index.names[place])

    def facts_of(self, place: int, encoded: np.ndarray) -> ImageFacts:
        return self.index.facts[place]


class CelebA(ImageFolder):
    """CelebA's aligned images with the forty attributes as factors and the official partition.

    Args:
        path: The folder that holds the image folder, the attributes and the partition, in either of the published layouts.
        crop: See `square`.
        evaluation: "valid" or "test", what split 1 shows.
        others: As in `ImageFolder`.
    Source: Liu et al., ICCV 2015.
    """

    def __init__(self, path: str, *, split: int = 0, crop: str = "center", evaluation: str = "valid", **others: Any) -> None:
        folder, names, attributes, self.factor_names = celeba_listing(Path(path), split, evaluation)
        by_name = dict(zip(names, attributes, strict=True))
        self.attribute_names = frozenset(self.factor_names)
        super().__init__(str(folder), split=split, crop=crop, names=names, part=evaluation if split else "train", **others)
        self._attributes = torch.from_numpy(np.stack([by_name[name] for name in self.index.names]).astype(np.float32))

    @classmethod
    def from_config(cls, config: DataConfig, seed: int, split: int) -> Self:
        return cls(config.path, split=split, crop=config.celeba.crop, evaluation=config.celeba.evaluation, **cls.options(config))

    def factors(self, index: Tensor) -> Tensor:
        """[n] int64 -> [n, 40] float32, 0 or 1."""
        return self._attributes[self.places_of(index)]
