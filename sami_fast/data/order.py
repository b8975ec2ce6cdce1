"""The order in which an epoch shows frames of videos: shuffled, yet so that what is decoded together is shown soon after."""

import torch
from torch import Tensor

from .. import ops

LANE_STEP = 1 << 40  # the second of two permutations of an epoch


def pooled_order(run: Tensor, seed: int, epoch: int, epoch_size: int, batch_size: int, pool: int) -> Tensor:
    """Order of one epoch.

    Runs of items come in random order. Their items fill pools of about `pool` positions, lane by lane, where a lane is a place in the
    batch; inside its part of a lane an item takes a random row. So a batch mixes as many runs as it has places, every run is decoded
    once, and a rank, which owns some of the lanes, decodes little but its own. No other number of ranks changes the order.

    Args:
        run: Which run each item of the epoch belongs to, items of a run side by side. [n] int64, from 0.
        seed, epoch: Key of the shuffle.
        epoch_size: Items of each epoch, n; positions of earlier epochs end at epoch * epoch_size.
        batch_size: Items per step over all ranks.
        pool: Items of a pool; rounded to whole batches.
    Returns:
        [n] int64: the item at each position of the epoch.
    """
    count = len(run)
    lengths = torch.bincount(run)
    first = lengths.cumsum(0) - lengths
    runs = ops.random_permutation(seed, epoch, ops.Stream.SHUFFLE, len(lengths))
    lengths_of = lengths[runs]
    begin = lengths_of.cumsum(0) - lengths_of
    items = torch.arange(count) - begin.repeat_interleave(lengths_of) + first[runs].repeat_interleave(lengths_of)

    position = epoch * epoch_size + torch.arange(count)
    row = position // batch_size - (epoch * epoch_size) // batch_size
    lane = position % batch_size
    rows = max(1, pool // batch_size)
    cell = (row // rows) * batch_size + lane  # cells of a pool and lane are filled in order of their numbers
    shuffled = ops.random_permutation(seed, epoch + LANE_STEP, ops.Stream.SHUFFLE, count)
    filled = shuffled[torch.argsort(cell[shuffled], stable=True)]
    order = torch.empty_like(items)
    order[filled] = items
    return order
