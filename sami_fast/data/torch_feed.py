"""Batches for one rank, as a function of the step alone: a restart, another rank count or other micro-batches change no image."""

from typing import Protocol

import torch
from torch import Tensor

from .. import ops


class Dataset(Protocol):
    """Images by index."""

    image_shape: tuple[int, int, int]  # C, H, W
    size: int | None  # number of images; None is endless
    factor_names: tuple[str, ...]  # empty when the factors are unknown

    def images(self, index: Tensor) -> Tensor:
        """[n] int64 -> [n, C, H, W] float32 in [-1, 1]."""

    def factors(self, index: Tensor) -> Tensor:
        """[n] int64 -> [n, F] float32."""


class TorchFeed:
    """Local micro-batches of a dataset.

    Position p = step * batch_size + place counts all images ever shown. An endless dataset shows image p; a finite one shows
    p modulo its size through a new permutation each epoch.

    Args:
        dataset: Where images come from.
        batch_size: Images per step over all ranks and micro-batches.
        micro_batches: Micro-batches per step and rank.
        rank, world_size: This process among all.
        seed: Key of the shuffle.
        device: Where batches go.
    """

    def __init__(
        self, dataset: Dataset, batch_size: int, micro_batches: int, rank: int, world_size: int, seed: int, device: torch.device
    ) -> None:
        self.dataset, self.batch_size, self.seed, self.device = dataset, batch_size, seed, device
        self.micro_batches, self.rank, self.world_size = micro_batches, rank, world_size
        self.micro_size = batch_size // (micro_batches * world_size)
        self._epoch, self._order = -1, torch.empty(0)

    def _shuffled(self, position: Tensor) -> Tensor:
        if self.dataset.size is None:
            return position
        chosen = torch.empty_like(position)
        for epoch in (position // self.dataset.size).unique().tolist():
            if epoch != self._epoch:
                self._epoch, self._order = epoch, ops.random_permutation(self.seed, epoch, ops.Stream.SHUFFLE, self.dataset.size)
            here = position // self.dataset.size == epoch
            chosen[here] = self._order[position[here] % self.dataset.size]
        return chosen

    def micro_batch(self, step: int, micro: int) -> tuple[Tensor, Tensor]:
        """x_0 [b, C, H, W] on the device, and the place of each image in the step's whole batch, [b] int64."""
        first = (micro * self.world_size + self.rank) * self.micro_size
        place = torch.arange(first, first + self.micro_size)
        x_0 = self.dataset.images(self._shuffled(step * self.batch_size + place))
        return x_0.to(self.device, non_blocking=True), place.to(self.device)
