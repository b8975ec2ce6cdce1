"""Diagonal Gaussians: log density, KL divergence from the prior, reparameterised sample; all can be differentiated twice.

The log density is `sami_fast::gaussian_log_prob` -> `gaussian_log_prob_bwd` -> `gaussian_log_prob_bwd_bwd`, three chained operators, each
the derivative of the one before. KL and sample are elementwise on [B, Z]: plain torch, which a compiler fuses.
"""

from types import ModuleType

import torch
from torch import Tensor

from .. import reference
from ..reference.gaussian_log_prob import check_gaussian, gaussian_kl, gaussian_reparameterize
from .arguments import check_together
from .backend import choose, levels
from .define import define, no_third_derivative, saved_arguments

__all__ = ["gaussian_kl", "gaussian_levels", "gaussian_log_prob", "gaussian_reparameterize"]


def gaussian_log_prob(
    z: Tensor,  # [B, Z]
    mu: Tensor,  # [B, Z]
    var: Tensor,  # [B, Z]
    *,
    backend: str | None = None,
) -> Tensor:  # [B]
    """Log density of a diagonal Gaussian, in nats, summed over the latent axis.

        log_q = -1/2 sum_Z [ (z - mu)^2 / var + ln var + ln 2 pi ]

    Args:
        z: Point. [B, Z], float32 or float64; the kernel takes float32.
        mu: Mean, same shape and dtype as z.
        var: Variance, > 0, same shape and dtype as z.
        backend: See `sami_fast.use_backend`.
    Returns:
        [B], dtype of z.
    Raises:
        ValueError: shapes or devices differ.
        TypeError: dtypes differ or are not floating.
        BackendError: the backend cannot run this call.
    Differentiable: twice, in z, mu and var (the reference further).
    Runs on: C++, Triton, CUDA, reference.
    Source: SAMI, arXiv:2512.17127, encoder density.
    """
    backend = _prepare(z, mu, var, backend)
    if backend == "reference":
        return reference.gaussian_log_prob(z, mu, var)
    return _gaussian_log_prob(z, mu, var, backend)


def gaussian_levels(z: Tensor, mu: Tensor, var: Tensor) -> ModuleType:
    """The level functions of the backend in force for these arguments of `gaussian_log_prob`, which are checked."""
    return levels("gaussian_log_prob", _prepare(z, mu, var, None))


def _prepare(z: Tensor, mu: Tensor, var: Tensor, backend: str | None) -> str:
    check_gaussian(z=z, mu=mu, var=var)
    check_together("gaussian_log_prob", z=z, mu=mu, var=var)
    limit = None if z.dtype == torch.float32 else "it takes float32 alone"
    return choose("gaussian_log_prob", backend, z, triton=limit, cuda=limit)


def _fwd(z: Tensor, mu: Tensor, var: Tensor, backend: str) -> Tensor:
    return levels("gaussian_log_prob", backend).gaussian_log_prob_fwd(z, mu, var)


def _fwd_formula(ctx, grad):
    return (None,) * 4 if grad is None else (*_gaussian_log_prob_bwd(grad, *saved_arguments(ctx)), None)


def _bwd(grad: Tensor, z: Tensor, mu: Tensor, var: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return levels("gaussian_log_prob", backend).gaussian_log_prob_bwd(grad, z, mu, var)


def _bwd_formula(ctx, *cotangents):
    if all(gg is None for gg in cotangents):
        return (None,) * 5
    saved = saved_arguments(ctx)
    cotangents = (torch.zeros_like(saved[1]) if gg is None else gg for gg in cotangents)
    return *_gaussian_log_prob_bwd_bwd(*cotangents, *saved), None


def _bwd_bwd(
    ggz: Tensor, ggmu: Tensor, ggvar: Tensor, grad: Tensor, z: Tensor, mu: Tensor, var: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return levels("gaussian_log_prob", backend).gaussian_log_prob_bwd_bwd(ggz, ggmu, ggvar, grad, z, mu, var)


_gaussian_log_prob = define("gaussian_log_prob", _fwd, None, _fwd_formula)
_gaussian_log_prob_bwd = define("gaussian_log_prob_bwd", _bwd, None, _bwd_formula)
_gaussian_log_prob_bwd_bwd = define("gaussian_log_prob_bwd_bwd", _bwd_bwd, None, no_third_derivative("gaussian_log_prob"))
