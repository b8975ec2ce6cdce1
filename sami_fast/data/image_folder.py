"""Images of a folder, and CelebA: decoded by DALI or Pillow, cropped to a square, resized."""

from collections.abc import Sequence
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


def _facts(path: Path) -> tuple[int, int, str, bool]:
    return image_facts(read_image(path).tobytes())


class ImageFolder(Decoded):
    """Every image below a folder, in the order of their names.

    Args:
        path: The folder.
        holdout: Share of the images, or of the groups of `holdout_by`, a fixed random choice, that only evaluation sees.
        split: 0 for training, 1 for evaluation.
        names: The files of this dataset, already split, instead of all below the folder.
        part: Which part these are, for the cache.
        crop: See `square`.
        others: Settings and errors as in `Decoded`.
    """

    def __init__(
        self,
        path: str,
        *,
        holdout: float = 0.1,
        split: int = 0,
        names: Sequence[str] | None = None,
        part: str = "",
        crop: str = "center",
        **others: Any,
    ) -> None:
        super().__init__(path, _facts, image_suffixes(), "images", names, **others)
        self.crop = crop
        self._not_dali: set[int] = set()  # places of images that DALI could not decode and Pillow could
        count = len(self.index.names)
        self.held_out = names is not None or (holdout > 0 and count > 1)
        places = held_out_files(self.index.names, self.groups, 0.0 if names is not None else holdout, split)
        self._show(count, places, f"{crop}-{part}" if part else crop)

    @classmethod
    def from_config(cls, config: DataConfig, seed: int, split: int) -> Self:
        return cls(config.path, split=split, holdout=config.holdout, **cls.options(config))

    def formats(self) -> list[str]:
        return [form for _, _, form, _ in self.index.facts]

    def contents(self) -> dict[str, Any]:
        return {"pixels": sizes([(width, height) for width, height, _, _ in self.index.facts])}

    def decoder_of(self, number: int) -> tuple[str, str]:
        kind, suits = self.index.facts[number][2:]
        if self.dali is None:
            return "Pillow", "without DALI"
        return ("DALI", f"{kind} is one of its formats") if suits else ("Pillow", f"{kind} needs more than DALI's decoder does")

    def files_of(self, index: Tensor) -> np.ndarray:
        return self.places_of(index)

    def sources(self, index: Tensor) -> dict[str, list[Any]]:
        """Where images come from: "files", names relative to the folder."""
        return {"files": [self.index.names[place] for place in self.places_of(index)]}

    def decode(self, places: Sequence[int]) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        for first in range(0, len(places), MAX_BATCH):
            found += self._decode(places[first : first + MAX_BATCH])
        return found

    def _decode(self, places: Sequence[int]) -> list[Tensor | None]:
        encoded: dict[int, np.ndarray] = {}
        for place in set(places):
            if self.index.names[place] in self.lost:
                continue
            try:
                encoded[place] = read_image(self.index.folder / self.index.names[place])
            except (OSError, BadFile) as error:
                self.lose(self.index.names[place], getattr(error, "strerror", None) or str(error))
        found: dict[int, Tensor | None] = dict.fromkeys(places)
        for_dali = [p for p in encoded if self.dali and self.index.facts[p][3] and p not in self._not_dali]
        found |= self._by_dali({place: without_profile(encoded[place]) for place in for_dali})
        for place, data in encoded.items():
            if found[place] is None:
                try:
                    found[place] = self.fit(torch.from_numpy(decode_image(data.tobytes()))[None], self.crop)[0]
                    if place in for_dali:  # one image that fails makes DALI fail the whole batch: it is not tried there again
                        self._not_dali.add(place)
                except BadFile as error:
                    self.lose(self.index.names[place], str(error))
        return [found[place] for place in places]

    def _by_dali(self, encoded: dict[int, np.ndarray]) -> dict[int, Tensor]:
        """By DALI in one batch; where one of them is broken, each on its own, and those that fail are left out."""
        if not encoded or self.dali is None:
            return {}
        boxes = [square(self.index.facts[place][1], self.index.facts[place][0], self.crop) for place in encoded]
        try:
            decoded = self.dali.images([*encoded.values()], boxes)
            inside = self.dali.resize_inside
            return {p: self.fit(pixels[None], self.crop, resized=inside)[0] for p, pixels in zip(encoded, decoded, strict=True)}
        except RuntimeError:
            if len(encoded) == 1:
                return {}
            return {place: pixels for one in encoded for place, pixels in self._by_dali({one: encoded[one]}).items()}


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
