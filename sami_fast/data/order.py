"""The order in which an epoch shows the frames of videos: mixed, and yet cheap to decode.

A compressed frame is decoded from the last key frame on, so neighbouring frames, a *run*, cost little more together than one of them alone.
In a plain random order nearly every frame would need its whole run decoded again; run after run, a batch would hold frames that look alike.
So runs are decoded in random order, a *pool* of them at a time, and each *lane*, a place in the batch, shows the runs that fall to it in
that pool. With runs A = 0 1, B = 2 3, C = 4 5, D = 6 7, batches of two and pools of four frames, that is of two steps:

    runs in random order     C, A in the first pool, D, B in the second
    lane 0                   4 5 | 6 7    which each pool shuffles, to 5 4 | 6 7
    lane 1                   0 1 | 2 3    and to 0 1 | 3 2
    batches                  (5, 0) (4, 1) (6, 3) (7, 2)

Every batch mixes two runs; each run is decoded once and used up soon. A rank owns some of the lanes, and decodes little beside their runs.
"""

import torch
from torch import Tensor

from .. import ops

SECOND_DRAW = 1 << 40  # added to the epoch, so that the second of its two permutations differs from the first and from other epochs'


def pooled_order(run: Tensor, seed: int, epoch: int, epoch_size: int, batch_size: int, pool: int) -> Tensor:
    """Order of one epoch, the same for any number of ranks.

    Args:
        run: Which run each item of the epoch belongs to, items of a run side by side. [n] int64, from 0.
        seed, epoch: Key of the shuffle.
        epoch_size: Items of each epoch, n; positions of earlier epochs end at epoch * epoch_size.
        batch_size: Items per step over all ranks, the number of lanes.
        pool: Items of a pool; rounded to whole batches.
    Returns:
        [n] int64: the item at each position of the epoch.
    """
    # Items in the random order of their runs.
    count = len(run)
    lengths = torch.bincount(run)
    first = lengths.cumsum(0) - lengths
    runs = ops.random_permutation(seed, epoch, ops.Stream.SHUFFLE, len(lengths))
    lengths_of = lengths[runs]
    begin = lengths_of.cumsum(0) - lengths_of
    items = torch.arange(count) - begin.repeat_interleave(lengths_of) + first[runs].repeat_interleave(lengths_of)

    # A cell is the part of a lane that lies in one pool. Sorting shuffled positions by their cell keeps them shuffled within it.
    position = epoch * epoch_size + torch.arange(count)
    row = position // batch_size - (epoch * epoch_size) // batch_size
    lane = position % batch_size
    rows = max(1, pool // batch_size)
    cell = (row // rows) * batch_size + lane
    shuffled = ops.random_permutation(seed, epoch + SECOND_DRAW, ops.Stream.SHUFFLE, count)
    filled = shuffled[torch.argsort(cell[shuffled], stable=True)]
    order = torch.empty_like(items)
    order[filled] = items
    return order
