"""Group normalisation with the SiLU that usually follows it."""

import torch
import torch.nn.functional as F
from torch import Tensor


def group_norm_silu(
    x: Tensor,  # [B, C, ...]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    num_groups: int,
    *,
    norm_eps: float = 1e-5,
    silu: bool = True,
) -> Tensor:  # [B, C, ...]
    """h = weight x_hat + bias with x_hat normalised over each group; returns h sigmoid(h), or h without SiLU.

    Args:
        x: Features. [B, C, ...], float32, float64 or bfloat16 (computed in float32).
        weight, bias: Scale and shift per channel. [C].
        num_groups: G, divides C.
        norm_eps: Added to the variance.
        silu: Apply SiLU after the norm.
    Returns:
        Same shape and dtype as x.
    Raises:
        ValueError: C is not divisible by G, or weight or bias is not [C].
    Differentiable: twice, in x, weight and bias.
    Source: Wu & He, arXiv:1803.08494.
    """
    channels = x.shape[1]
    if channels % num_groups:
        raise ValueError(f"num_groups: expected a divisor of {channels} channels, found {num_groups}")
    for name, value in (("weight", weight), ("bias", bias)):
        if value.shape != (channels,):
            raise ValueError(f"{name}: expected [{channels}], found {list(value.shape)}")
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    # Not F.group_norm: it refuses a single image with a single pixel.
    h = torch.group_norm(wide, num_groups, weight.to(wide.dtype), bias.to(wide.dtype), norm_eps)
    return (F.silu(h) if silu else h).to(x.dtype)
