"""Nested stratified uniforms: where the noise levels of a batch lie."""

import torch
from torch import Tensor

from .random import Stream, random_permutation, random_uniform


def stratified_uniform(
    index: Tensor,  # [B]
    levels: int,
    global_batch: int,
    *,
    seed: int,
    step: int,
) -> Tensor:  # [B, K]
    """K uniforms per image: one image covers all K strata, the whole batch covers all global_batch * K of them.

        u = (k + (rank(b) + v_bk) / global_batch) / K

    with rank a random order of the global batch and v uniform. A level picked at random among the K of an image is uniform on [0, 1];
    level k alone is confined to its stratum.

    Args:
        index: Place of each local image in the global batch. [B] int64, 0 <= index < global_batch.
        levels: K, noise levels per image.
        global_batch: Images of one step over all ranks and micro-batches.
        seed, step: See `random.py`.
    Returns:
        [B, K] float32 in [0, 1].
    Differentiable: no; there is nothing to differentiate.
    """
    rank = random_permutation(seed, step, Stream.RANK, global_batch, index.device)[index]
    v = random_uniform(seed, step, Stream.LOGSNR, index, levels)
    k = torch.arange(levels, device=index.device)
    # Divisors are tensors: on a GPU torch divides by a number through its rounded reciprocal, and the bits would depend on the device.
    whole, strata = torch.full_like(v, global_batch), torch.full_like(v, levels)
    return (k + (rank[:, None] + v) / whole) / strata
