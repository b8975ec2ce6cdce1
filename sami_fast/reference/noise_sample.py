"""Multiscale noising: K noisy copies of each image, generator inside."""

import torch
from torch import Tensor

from .random import Stream, random_normal


def noise_sample(
    x_0: Tensor,  # [B, C, H, W]
    alpha_t: Tensor,  # [B, K]
    sigma_t: Tensor,  # [B, K]
    index: Tensor,  # [B]
    *,
    seed: int,
    step: int,
    stream: int = Stream.EPS,
) -> tuple[Tensor, Tensor]:  # [B*K, C, H, W] twice
    """Draw x_t = alpha_t x_0 + sigma_t eps with eps ~ N(0, I).

    Arguments, results and errors as `sami_fast.ops.noise_sample` describes them. Differentiable: twice and further, in x_0, alpha_t and
    sigma_t.
    """
    check_noise_sample(x_0, alpha_t, sigma_t, index)
    x_t, eps = noise_sample_fwd(x_0, alpha_t, sigma_t, index, seed, step, stream, True)
    assert eps is not None  # it is stored
    return x_t, eps


def check_noise_sample(x_0: Tensor, alpha_t: Tensor, sigma_t: Tensor, index: Tensor) -> None:
    """Raise the ValueError of `noise_sample` where shapes do not fit."""
    if x_0.dim() != 4:
        raise ValueError(f"x_0: expected [B, C, H, W], found {list(x_0.shape)}")
    if alpha_t.dim() != 2:
        raise ValueError(f"alpha_t: expected [B, K], found {list(alpha_t.shape)}")
    batch, levels = x_0.shape[0], alpha_t.shape[1]
    for name, value in (("alpha_t", alpha_t), ("sigma_t", sigma_t)):
        if value.shape != (batch, levels):
            raise ValueError(f"{name}: expected [{batch}, {levels}], found {list(value.shape)}")
    if index.shape != (batch,):
        raise ValueError(f"index: expected [{batch}], found {list(index.shape)}")


def noise_sample_fwd(
    x_0: Tensor,  # [B, C, H, W]
    alpha_t: Tensor,  # [B, K]
    sigma_t: Tensor,  # [B, K]
    index: Tensor,  # [B]
    seed: int,
    step: int,
    stream: int,
    store_eps: bool,
) -> tuple[Tensor, Tensor | None]:  # [B*K, C, H, W] twice
    """x_t and, where asked for, eps; both contiguous."""
    batch, levels = alpha_t.shape
    sample = (index[:, None] * levels + torch.arange(levels, device=index.device)).flatten()
    eps = random_normal(seed, step, stream, sample, x_0.shape[1:].numel()).to(x_0.dtype).view(batch, levels, *x_0.shape[1:])
    wide = torch.promote_types(x_0.dtype, torch.float32)
    alpha, sigma = (value.to(wide).view(batch, levels, 1, 1, 1) for value in (alpha_t, sigma_t))
    x_t = (alpha * x_0.to(wide)[:, None] + sigma * eps.to(wide)).to(x_0.dtype)
    x_t, eps = x_t.flatten(0, 1).contiguous(), eps.flatten(0, 1).contiguous()
    return x_t, eps if store_eps else None
