"""Datasets as a user might write them, which tests name as tests/own_datasets.py:<name>."""

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from sami_fast import data
from sami_fast.config import DataConfig


def pixels(index: int, side: int = 8) -> Tensor:
    """Image n as bytes. [1, side, side] uint8."""
    return torch.randint(0, 256, (1, side, side), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)


class Pixels(Dataset):
    """Map-style: (image, label)."""

    def __init__(self, count: int = 40, side: int = 8) -> None:
        self.count, self.side = count, side

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return pixels(index, self.side), index


class Stream(IterableDataset):
    """Only ever one after the other, and each time other ones: whoever goes through it twice has two sets."""

    def __init__(self, count: int = 40) -> None:
        self.count, self.rounds = count, 0

    def __iter__(self):
        self.rounds += 1
        yield from ({"pixel_values": pixels(index + 1000 * (self.rounds - 1))} for index in range(self.count))


class Augmented(Pixels):
    """Another image each time."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.randint(0, 256, (1, 8, 8), dtype=torch.uint8), index


class Ours(data.Dataset):
    """One of this package's, of 40 images or without end."""

    image_shape = (1, 8, 8)
    factor_names = ("number",)

    def __init__(self, endless: bool = False) -> None:
        self.size = None if endless else 40

    def images(self, index: Tensor) -> Tensor:
        numbers = [number % 2**31 for number in index.tolist()]
        return torch.stack([pixels(number) for number in numbers]).float() / 127.5 - 1 if numbers else torch.empty(0, 1, 8, 8)

    def factors(self, index: Tensor) -> Tensor:
        return index[:, None].float()

    @property
    def fingerprint(self) -> str:
        return "ours"


class Split(Ours):
    """One that tells its splits apart by itself."""

    @classmethod
    def from_config(cls, config: DataConfig, seed: int, split: int) -> "Split":
        made = cls(**config.kwargs)
        made.split, made.size = split, 30 - 20 * split
        return made

    def images(self, index: Tensor) -> Tensor:
        return super().images(index + 100 * self.split)


def broken(count: int = 40) -> list[Tensor]:
    """No class, but it makes images, one of them too large."""
    return [pixels(index, 9 if index == 39 else 8) for index in range(count)]


def fails() -> None:
    raise FileNotFoundError("no such archive")


class Late(Pixels):
    """Fails at one image alone, which is not among those that are looked at first."""

    def __init__(self) -> None:
        super().__init__(400)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == 7:
            raise OSError("disk gone")
        return super().__getitem__(index)


NOTHING = 3
