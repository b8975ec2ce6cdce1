"""Batches for one rank, as a function of the step alone: a restart, another rank count or other micro-batches change no image."""

import threading
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from .. import ops
from .dataset import Dataset, EightBit
from .pixels import to_unit

AHEAD = 4  # micro-batches per worker that are prepared before they are needed
Prepared = tuple[Tensor, Tensor, Future[Tensor]]  # indices and epochs of a micro-batch, and its images


def _workers(count: int) -> ThreadPoolExecutor:
    """Threads whose torch operators use one thread each, since with more these would wait for one another's cores."""
    ours, started = torch.get_num_threads(), threading.Barrier(count + 1)
    pool = ThreadPoolExecutor(count, "feed", initializer=torch.set_num_threads, initargs=(1,))
    for _ in range(count):
        pool.submit(started.wait)
    started.wait()
    torch.set_num_threads(ours)  # new threads start with what was set last, which a worker did
    return pool


class Feed:
    """Local micro-batches of a dataset.

    Position p = step * batch_size + place counts all images ever shown. An endless dataset shows image p at position p. Of a finite one,
    epoch p // epoch_size shows every image once, over all ranks, in the order that `Dataset.order` gives.

    Args:
        dataset: Where images come from.
        batch_size: Images per step over all ranks and micro-batches.
        micro_batches: Micro-batches per step and rank.
        rank, world_size: This process among all.
        seed: Key of the shuffle and of the flips.
        device: Where batches go.
        flip: Mirror half of the images left to right, anew each epoch.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        micro_batches: int,
        rank: int,
        world_size: int,
        seed: int,
        device: torch.device,
        flip: bool = False,
    ) -> None:
        self.dataset, self.batch_size, self.seed, self.device, self.flip = dataset, batch_size, seed, device, flip
        self.micro_batches, self.rank, self.world_size = micro_batches, rank, world_size
        self.micro_size = batch_size // (micro_batches * world_size)
        self.epoch_size = dataset.epoch_size
        self.waited = 0.0  # seconds in which a batch was asked for and not there
        self._orders: OrderedDict[int, Tensor] = OrderedDict()
        self._pool = _workers(dataset.workers) if dataset.workers else None
        self._ahead = max(AHEAD * dataset.workers, -(-dataset.ahead // batch_size) * micro_batches)
        self._prepared: OrderedDict[tuple[int, int], Prepared] = OrderedDict()

    def _order(self, epoch: int) -> Tensor:
        order = self._orders.get(epoch)
        if order is None:
            order = self._orders[epoch] = self.dataset.order(epoch, self.seed, self.batch_size)
            while len(self._orders) > 2:  # the epoch being shown and the next one, which is being prepared
                self._orders.popitem(last=False)
        return order

    def _place(self, micro: int) -> Tensor:
        first = (micro * self.world_size + self.rank) * self.micro_size
        return torch.arange(first, first + self.micro_size)

    def indices(self, step: int, micro: int) -> tuple[Tensor, Tensor]:
        """Which images a micro-batch shows, and in which epoch each. [b] int64 both."""
        position = step * self.batch_size + self._place(micro)
        if self.epoch_size is None:
            return position, torch.zeros_like(position)
        epoch, chosen = position // self.epoch_size, torch.empty_like(position)
        for one in epoch.unique().tolist():
            here = epoch == one
            chosen[here] = self._order(one)[position[here] % self.epoch_size]
        return chosen, epoch

    def _read(self, index: Tensor) -> Tensor:
        dataset = self.dataset
        pixels = dataset.training_pixels(index) if isinstance(dataset, EightBit) else dataset.training_images(index)
        return pixels.pin_memory() if self.device.type == "cuda" and pixels.device.type == "cpu" else pixels

    def _prepare(self, pool: ThreadPoolExecutor, step: int, micro: int) -> Prepared:
        """Take this micro-batch out of those being prepared, and have the next ones prepared as well."""
        if (step, micro) not in self._prepared:  # the first step, or one that does not follow the last
            self._cancel()
        upcoming = (step, micro)
        for _ in range(self._ahead + 1):
            if upcoming not in self._prepared:
                index, epoch = self.indices(*upcoming)
                self._prepared[upcoming] = index, epoch, pool.submit(self._read, index)
            upcoming = (upcoming[0], upcoming[1] + 1) if upcoming[1] + 1 < self.micro_batches else (upcoming[0] + 1, 0)
        return self._prepared.pop((step, micro))

    def _cancel(self) -> None:
        for _, _, future in self._prepared.values():
            future.cancel()
        self._prepared.clear()

    def micro_batch(self, step: int, micro: int) -> tuple[Tensor, Tensor]:
        """x_0 [b, C, H, W] on the device, and the place of each image in the step's whole batch, [b] int64.

        Raises:
            UserError: too many images cannot be read.
        """
        if self._pool:
            index, epoch, future = self._prepare(self._pool, step, micro)
            asked = time.perf_counter()
            try:
                images = future.result()
            except BaseException:
                self._cancel()  # the error ends the program: what is still queued would only delay that
                raise
        else:
            index, epoch = self.indices(step, micro)
            asked = time.perf_counter()
            images = self._read(index)
        self.waited += time.perf_counter() - asked
        images = images.to(self.device, non_blocking=True)
        if images.dtype == torch.uint8:
            images = to_unit(images)
        if self.flip:
            images = torch.where(self._flipped(index, epoch).to(self.device)[:, None, None, None], images.flip(-1), images)
        return images, self._place(micro).to(self.device)

    def _flipped(self, index: Tensor, epoch: Tensor) -> Tensor:
        flipped = torch.empty_like(index, dtype=torch.bool)
        for one in epoch.unique().tolist():
            here = epoch == one
            flipped[here] = ops.random_uniform(self.seed, one, ops.Stream.AUGMENT, index[here], 1)[:, 0] < 0.5
        return flipped

    def close(self) -> None:
        """Stop preparing batches."""
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)
