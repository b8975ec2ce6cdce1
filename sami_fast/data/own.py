"""Data of one's own as a `Dataset`: a class that a config names, or an object that was given to `sami_fast.train`.

Taken are: a torch Dataset, or whatever else has `__len__` and `__getitem__`, such as a Hugging Face dataset, a column of one, a list or a
tensor; an iterable, such as an IterableDataset or a WebDataset, whose images are read into memory once; a `Dataset` of this package.

An item is an image, or a tuple or list that begins with one, or a dict with one under one of `IMAGE_KEYS`. An image is a tensor or an
array (C, H, W), (H, W, C) or (H, W) of bytes or floats, a Pillow image, or the bytes of a file of one.
"""

import hashlib
import json
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import DataConfig
from ..errors import UserError, one_line
from ..named import load_named
from ..pictures import as_seen
from .cache import in_words, tell_once
from .dataset import Dataset
from .decode import BadFile, decode_image
from .identity import digest
from .pixels import check_channels, resize, to_unit, with_channels
from .storage import held_out_places

IMAGE_KEYS = ("image", "pixel_values", "img", "images", "jpg", "jpeg", "png", "webp")  # the last four are a WebDataset's
LOOKED_AT = 32  # images, at equal distances, that are looked at before training, and by which data are known again
EVALUATION = 1 << 40  # here begin those images of an endless set that only evaluation sees


class Source:
    """An object with images, and what messages call it."""

    def __init__(self, images: Any, key: str) -> None:
        self.given, self.key = images, key
        self.read: list[Tensor] | None = None  # of an iterable

    def by_index(self, bound_gib: float) -> Any:
        """What has `__len__` and `__getitem__`: the object, or the images of an iterable, which is gone through once.

        Raises:
            UserError: it is neither, or its images need more memory than the bound.
        """
        if isinstance(self.given, str | bytes | Mapping) or (not hasattr(type(self.given), "__iter__") and not _has_items(self.given)):
            parts = ", ".join(map(str, self.given)) if isinstance(self.given, Mapping) else ""
            raise UserError(
                f"{self.key}: expected a torch Dataset, images in a sequence or an iterable, or a sami_fast.data.Dataset, found "
                f"{type(self.given).__name__}{f'; choose one of its {parts[:80]}' if parts else ''}"
            )
        if _has_items(self.given):
            return self.given
        if self.read is None:
            self.read = list(self._within(bound_gib))
        return self.read

    def _within(self, bound_gib: float) -> Iterator[Tensor]:
        count, left = 0, bound_gib * 2**30
        try:
            for item in self.given:
                image = image_of(item).clone()  # a view would keep a whole batch in memory
                left -= image.nbytes
                if left < 0:
                    raise UserError(
                        f"{self.key}: an iterable is read into memory, and {count + 1} images of this one need more than data.cache_gib, "
                        f"{in_words(bound_gib * 2**30)}; raise it, or give a dataset that has __len__ and __getitem__"
                    )
                yield image
                count += 1
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{self.key}: image {count} cannot be used ({in_one_line(error)})") from error


def _has_items(images: Any) -> bool:
    """Whether images can be asked for by index; an IterableDataset has the methods of its base class all the same."""
    try:
        return len(images) >= 0 and hasattr(images, "__getitem__") and not isinstance(images, torch.utils.data.IterableDataset)
    except (TypeError, NotImplementedError):
        return False


class BadImage(Exception):
    """An item is no image, in words."""


def in_one_line(error: Exception) -> str:
    """What is wrong with an item; of what somebody else's code raised, also where."""
    if isinstance(error, BadImage | BadFile):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {frames[-1].filename}, line {frames[-1].lineno}" if len(frames) > 1 else ""
    return f"{type(error).__name__}: {one_line(error)}{where}"


_given: ContextVar[Source | None] = ContextVar("given", default=None)


@contextmanager
def given(images: Any) -> Iterator[None]:
    """Inside, data.kind given stands for this object."""
    token = _given.set(Source(images, "dataset"))
    try:
        yield
    finally:
        _given.reset(token)


def open_own(config: DataConfig, seed: int, split: int) -> Dataset:
    """The dataset of data.kind class or given; arguments and errors as in `open_dataset`."""
    if config.kind == "given":
        source = _given.get()
        if source is None:
            raise UserError(
                "data.kind: given stands for an object that was given to sami_fast.train, and here is none; name other images, or train on "
                "data.class"
            )
    else:
        named = load_named(config.class_, "data.class")
        if isinstance(named, type) and issubclass(named, Dataset) and named.from_config.__func__ is not Dataset.from_config.__func__:
            return named.from_config(config, seed, split)
        source = _made(config.class_, json.dumps(config.kwargs))
    return as_dataset(source, config, split)


@lru_cache(1)  # for both splits: what an iterable gives a second time may be something else
def _made(name: str, arguments: str) -> Source:
    named, kwargs = load_named(name, "data.class"), json.loads(arguments)
    try:
        return Source(named(**kwargs), "data.class")
    except Exception as error:
        raise UserError(f"data.class: {name} cannot be made with data.kwargs {kwargs} ({in_one_line(error)})") from error


def as_dataset(source: Source, config: DataConfig, split: int) -> Dataset:
    """Images of any of the kinds above as a `Dataset`.

    Args:
        source: The images.
        config: For `holdout`, `image_size`, `channels`, `range`, `workers` and `cache_gib`.
        split: 0 for training, 1 for evaluation.
    Raises:
        UserError: they are of none of these kinds, are none, or cannot be used as they are.
    """
    if isinstance(source.given, Dataset):
        return Part(source.given, config.holdout, split, source.key)
    return Items(source.by_index(config.cache_gib), config, split, source.key)


class Items(Dataset):
    """Images by index from a sequence, such as a map-style torch dataset.

    Args:
        items: Has `__len__` and `__getitem__`.
        config, split: As in `as_dataset`.
        key: What messages call it.
    Raises:
        UserError: there are none, or those that are looked at are of different sizes, are not square, or have values out of range.
    """

    def __init__(self, items: Any, config: DataConfig, split: int, key: str) -> None:
        self.items, self.key, self.workers, self.side = items, key, config.workers, config.image_size
        count = len(items)
        if not count:
            raise UserError(f"{key}: expected images, found none")
        self.unit, self.kind = config.range == "unit", type(items).__name__
        self.places = torch.from_numpy(held_out_places(count, config.holdout, split))
        self.held_out, self.size = config.holdout > 0 and count > 1, len(self.places)
        first = self._raw(0)
        channels, height, width = first.shape
        if height != width and not self.side:
            raise UserError(
                f"{key}: expected square images, found {height} x {width} pixels; data.image_size cuts their central squares out and "
                "resizes them"
            )
        check_channels(channels, config.channels, key)
        self.image_shape = (config.channels or channels, self.side or height, self.side or width)
        looked_at = [self._raw(place) for place in self._sample()]
        for place, image in zip(self._sample(), looked_at, strict=True):
            self._fitted(image, place)  # what cannot be used is said now
        if config.range == "auto" and all(image.dtype != torch.uint8 and image.min() >= 0 for image in looked_at):
            tell_once(
                f"{key}: all values of {len(looked_at)} images lie in [0, 1], and are taken for values in [-1, 1], in which images are "
                "grey and bright; data.range=unit says that 0 is black, signed that they are as they should be"
            )

    def _sample(self) -> list[int]:
        count = len(self.items)
        return torch.linspace(0, count - 1, min(LOOKED_AT, count), dtype=torch.float64).round().long().tolist()

    def _raw(self, place: int) -> Tensor:
        """An image as the object has it. [C, H, W], uint8 or float32."""
        try:
            return image_of(self.items[place])
        except Exception as error:
            raise UserError(f"{self.key}: image {place} cannot be used ({in_one_line(error)})") from error

    def _fitted(self, image: Tensor, place: int) -> Tensor:
        """The same as this dataset shows it. [C, H, W] float32 in [-1, 1]."""
        channels, side, _ = self.image_shape
        if image.dtype != torch.uint8:
            low, high = image.min().item(), image.max().item()
            lowest = 0.0 if self.unit else -1.0
            if not (low >= lowest - 1e-3 and high <= 1.001):  # also of NaN
                raise UserError(
                    f"{self.key}: expected floats in [{lowest:g}, 1], found values from {low:g} to {high:g} in image {place}; bytes are "
                    "scaled by themselves where they are uint8"
                )
        if not self.side and image.shape[1:] != (side, side):
            raise UserError(
                f"{self.key}: expected images of one size, found {image.shape[1]} x {image.shape[2]} pixels in image {place} and "
                f"{side} x {side} in image 0; data.image_size resizes them to one"
            )
        try:
            image = with_channels(resize(image[None], side), channels)[0]
        except ValueError:
            raise UserError(f"{self.key}: expected {channels} channel(s), found {image.shape[0]} in image {place}") from None
        return to_unit(image) if image.dtype == torch.uint8 else image * 2 - 1 if self.unit else image

    def images(self, index: Tensor) -> Tensor:
        """[n] int64 -> [n, C, H, W] float32 in [-1, 1]."""
        if not len(index):
            return torch.empty(0, *self.image_shape)
        return torch.stack([self._fitted(self._raw(place), place) for place in self.places[index.cpu()].tolist()])

    @cached_property
    def fingerprint(self) -> str:
        """By some of the images, where these are the same each time they are read; else by their number and shape."""
        once, again = (self._digests() for _ in range(2))
        if once != again:
            tell_once(
                f"{self.key}: an image differs each time it is read, as by random augmentation; a resumed run then sees others than it "
                "would have, and scores are of one such reading"
            )
        shape = "x".join(map(str, self.image_shape))
        return digest([str(len(self.items)), str(self.size), shape, str(self.unit), *(once if once == again else [])])

    def _digests(self) -> list[str]:
        images = [self._raw(place).contiguous().numpy() for place in self._sample()]
        return [hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest() for image in images]

    def facts(self) -> dict[str, Any]:
        return {"items": f"{len(self.items)} of a {self.kind}"}


def image_of(item: Any) -> Tensor:
    """The image of an item as the object has it. [C, H, W], uint8 or float32.

    Raises:
        BadImage: it is none.
    """
    if isinstance(item, Mapping):
        key = next((key for key in IMAGE_KEYS if key in item), None)
        if key is None:
            raise BadImage(f"expected one of the keys {', '.join(IMAGE_KEYS)}, found {', '.join(map(str, list(item)[:8])) or 'none'}")
        item = item[key]
    elif isinstance(item, tuple | list) and item and not isinstance(item[0], int | float | list):
        return image_of(item[0])
    if isinstance(item, bytes):
        item = decode_image(item)
    elif hasattr(item, "getbands"):  # of Pillow
        grey = item.mode in ("1", "L", "I", "I;16", "I;16B", "I;16L", "I;16N")
        try:
            item = as_seen(item)[..., : 1 if grey else 3]
        except ValueError as error:
            raise BadImage(str(error)) from None
    try:
        image = torch.as_tensor(item if isinstance(item, Tensor) else np.asarray(item)).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise BadImage(f"expected a tensor, an array or a Pillow image, found {type(item).__name__}") from None
    if image.dim() == 2:
        image = image[None]
    if image.dim() != 3 or not image.numel():
        raise BadImage(f"expected an image (C, H, W), (H, W, C) or (H, W), found shape {list(image.shape)}")
    first, height, width = image.shape
    if width <= 4 and not (first <= 4 and height == width):
        image = image.permute(2, 0, 1)
    if image.is_floating_point():
        return image.float()
    if image.dtype == torch.bool or image.is_complex():
        raise BadImage(f"expected bytes or floats, found {image.dtype}")
    if image.dtype != torch.uint8:
        low, high = image.min().item(), image.max().item()
        if low < 0 or high > 255:
            raise BadImage(f"expected whole numbers from 0 to 255, found {low} to {high}")
    return image.to(torch.uint8)


class Part(Dataset):
    """The images of a `Dataset` that one split sees, where its class does not tell splits apart: `data.holdout` of them, chosen at random,
    are evaluation's; of an endless one, those from 2^40 on. Clips are not divided: what they show is the class' own affair.

    Raises:
        UserError: the dataset lacks what it must give, or gives something else.
    """

    def __init__(self, whole: Dataset, holdout: float, split: int, key: str) -> None:
        self.whole, self.key = whole, key
        name = type(whole).__name__
        if lacking := [one for one in ("image_shape", "size") if not hasattr(whole, one)]:
            raise UserError(f"{key}: {name} must give image_shape, size and images, and has no {lacking[0]}")
        if whole.size is not None and whole.size < 1:
            raise UserError(f"{key}: expected images, found none")
        for attribute in ("image_shape", "factor_names", "attribute_names", "periods", "complete", "workers", "ahead", "clip_length"):
            setattr(self, attribute, getattr(whole, attribute))
        self.size, self.places = whole.size, None
        self.first = split * EVALUATION
        if whole.size is not None:
            self.places = torch.from_numpy(held_out_places(whole.size, holdout, split))
            self.held_out, self.size = holdout > 0 and whole.size > 1, len(self.places)
            if self.held_out and whole.epoch_size != whole.size:
                raise UserError(
                    f"{key}: an epoch of {name} shows {whole.epoch_size} of its {whole.size} images, of which data.holdout cannot be "
                    "taken; tell the splits apart in its from_config, or set data.holdout=0"
                )
        try:
            image = whole.images(self._at(torch.zeros(1, dtype=torch.int64)))
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{key}: {name}.images fails ({in_one_line(error)})") from error
        found = f"{list(image.shape)} {image.dtype}" if isinstance(image, Tensor) else type(image).__name__
        if found != (expected := f"{[1, *self.image_shape]} {torch.float32}"):
            raise UserError(f"{key}: expected {expected} from {name}.images of one index, found {found}")
        if not image.abs().max() <= 1.001:
            raise UserError(f"{key}: expected values in [-1, 1] from {name}.images, found {image.min():g} to {image.max():g}")

    def _at(self, index: Tensor) -> Tensor:
        return index + self.first if self.places is None else self.places.to(index.device)[index]

    def images(self, index: Tensor) -> Tensor:
        """[n] int64 -> [n, C, H, W] float32 in [-1, 1]."""
        return self.whole.images(self._at(index))

    def read(self, index: Tensor) -> tuple[Tensor, dict[int, str]]:
        return self.whole.read(self._at(index))

    def training_images(self, index: Tensor) -> Tensor:
        return self.whole.training_images(self._at(index))

    def factors(self, index: Tensor) -> Tensor:
        """[n] int64 -> [n, F] float32, columns in the order of `factor_names`."""
        return self.whole.factors(self._at(index))

    def clips(self, index: Tensor) -> Tensor:
        return self.whole.clips(index)

    @property
    def num_clips(self) -> int | None:
        return self.whole.num_clips

    @property
    def epoch_size(self) -> int | None:
        return self.size if self.held_out else self.whole.epoch_size

    def order(self, epoch: int, seed: int, batch_size: int) -> Tensor:
        if type(self.whole).order is Dataset.order:
            return super().order(epoch, seed, batch_size)
        return self._of_this_split(self.whole.order(epoch, seed, batch_size))

    def in_order(self) -> Tensor:
        return self._of_this_split(self.whole.in_order())

    def _of_this_split(self, index: Tensor) -> Tensor:
        """Those of the whole's indices that this split sees, as its own, in the same order."""
        if self.places is None:
            return index - self.first
        places = self.places.to(index.device)
        own = torch.searchsorted(places, index).clamp_max(len(places) - 1)
        return own[places[own] == index]

    def unreadable(self) -> dict[str, str]:
        return self.whole.unreadable()

    def sources(self, index: Tensor) -> dict[str, list[Any]]:
        return self.whole.sources(self._at(index))

    def facts(self) -> dict[str, Any]:
        return self.whole.facts()

    @property
    def fingerprint(self) -> str:
        return digest([self.whole.fingerprint, str(self.size)]) if self.whole.fingerprint else ""
