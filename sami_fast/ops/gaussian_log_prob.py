"""Log density of a diagonal Gaussian that can be differentiated twice.

`sami_fast::gaussian_log_prob` -> `gaussian_log_prob_bwd` -> `gaussian_log_prob_bwd_bwd`: three chained operators, each the derivative of
the one before. KL divergence and reparameterised sample are elementwise on [B, Z]: plain torch of the reference, which a compiler fuses.
"""

import torch
from torch import Tensor

from .. import reference
from ..reference.gaussian_log_prob import check_gaussian, gaussian_log_prob_bwd, gaussian_log_prob_bwd_bwd, gaussian_log_prob_fwd
from .arguments import check_together
from .define import define, linear_in_cotangents, saved_arguments
from .launchers import Launcher, Launchers


class GaussianLaunchers(Launchers):
    op = "gaussian_log_prob"
    fwd = Launcher(gaussian_log_prob_fwd)
    bwd = Launcher(gaussian_log_prob_bwd)
    bwd_bwd = Launcher(gaussian_log_prob_bwd_bwd)

    @staticmethod
    def limits(like: Tensor) -> dict[str, str]:
        return {} if like.dtype == torch.float32 else dict.fromkeys(("triton", "cuda"), "it takes float32 alone")


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


def gaussian_launchers(z: Tensor, mu: Tensor, var: Tensor) -> GaussianLaunchers:
    """Those of the backend in force, for a caller that orders the derivatives itself; the arguments of `gaussian_log_prob` are checked."""
    return GaussianLaunchers(_prepare(z, mu, var, None))


def _prepare(z: Tensor, mu: Tensor, var: Tensor, backend: str | None) -> str:
    check_gaussian(z=z, mu=mu, var=var)
    check_together("gaussian_log_prob", z=z, mu=mu, var=var)
    return GaussianLaunchers.choose(backend, z)


def _fwd_formula(ctx, grad):
    return (None,) * 4 if grad is None else (*_gaussian_log_prob_bwd(grad, *saved_arguments(ctx)), None)


def _bwd_formula(ctx, *cotangents):
    if all(gg is None for gg in cotangents):
        return (None,) * 5
    saved = saved_arguments(ctx)
    cotangents = (torch.zeros_like(saved[1]) if gg is None else gg for gg in cotangents)
    return *_gaussian_log_prob_bwd_bwd(*cotangents, *saved), None


_gaussian_log_prob = define("gaussian_log_prob", GaussianLaunchers.fwd, None, _fwd_formula)
_gaussian_log_prob_bwd = define("gaussian_log_prob_bwd", GaussianLaunchers.bwd, None, _bwd_formula)
_gaussian_log_prob_bwd_bwd = define("gaussian_log_prob_bwd_bwd", GaussianLaunchers.bwd_bwd, None, linear_in_cotangents("gaussian_log_prob"))
