"""What a step must know of the other processes, in any training loop that has torch's process group."""

import torch
from torch import Tensor


def ranks() -> tuple[int, int]:
    """This process' rank, and how many there are; (0, 1) without a process group."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if there else (0, 1)


def mean_over_ranks(local_mean: Tensor) -> Tensor:
    """Average of a small tensor over ranks; the tensor itself where one process works alone."""
    _, count = ranks()
    if count == 1:
        return local_mean
    total = local_mean.clone()
    torch.distributed.all_reduce(total)
    return total / count
