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

    with rank a random order of the global batch and v uniform, as `sami_fast.ops.stratified_uniform` describes it.
    """
    rank = random_permutation(seed, step, Stream.RANK, global_batch, index.device)[index]
    v = random_uniform(seed, step, Stream.LOGSNR, index, levels)
    k = torch.arange(levels, device=index.device)
    # Divisors are tensors: on a GPU torch divides by a number through its rounded reciprocal, and the bits would depend on the device.
    whole, strata = torch.full_like(v, global_batch), torch.full_like(v, levels)
    return (k + (rank[:, None] + v) / whole) / strata
