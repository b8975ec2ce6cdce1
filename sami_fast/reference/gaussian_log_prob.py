"""Diagonal Gaussians: log density with the twins of its launchers, KL divergence from the prior, reparameterised sample.

With d = z - mu and r = d / var, a term of the log density is -1/2 (d r + ln var + ln 2 pi); its derivatives are

    in z  -r       in mu  r       in var  1/2 (d r - 1) / var

The twins know nothing of autograd; the launchers in `sami_fast.kernels.gaussian_log_prob` have the same names and signatures.
"""

import math

import torch
from torch import Tensor


def check_gaussian(**tensors: Tensor) -> None:
    """ValueError, by the argument's name, unless all are [B, Z] and equal in shape."""
    (first, expected), *others = tensors.items()
    if expected.dim() != 2:
        raise ValueError(f"{first}: expected [B, Z], found {list(expected.shape)}")
    for name, value in others:
        if value.shape != expected.shape:
            raise ValueError(f"{name}: expected {list(expected.shape)}, found {list(value.shape)}")


def gaussian_log_prob(
    z: Tensor,  # [B, Z]
    mu: Tensor,  # [B, Z]
    var: Tensor,  # [B, Z]
) -> Tensor:  # [B]
    """Log density of a diagonal Gaussian, in nats, summed over the latent axis.

        log_q = -1/2 sum_Z [ (z - mu)^2 / var + ln var + ln 2 pi ]

    Arguments and errors as `sami_fast.ops.gaussian_log_prob` describes them. Differentiable: twice and further, in z, mu and var.
    """
    check_gaussian(z=z, mu=mu, var=var)
    return -0.5 * ((z - mu).square() / var + var.log() + math.log(2 * math.pi)).sum(-1)


def gaussian_log_prob_fwd(
    z: Tensor,  # [B, Z]
    mu: Tensor,  # [B, Z]
    var: Tensor,  # [B, Z]
) -> Tensor:  # [B]
    """log_q."""
    d = z - mu
    return (d * (d / var) + var.log() + math.log(2 * math.pi)).sum(-1).mul_(-0.5)


def gaussian_log_prob_bwd(
    grad: Tensor,  # [B]
    z: Tensor,  # [B, Z]
    mu: Tensor,  # [B, Z]
    var: Tensor,  # [B, Z]
) -> tuple[Tensor, Tensor, Tensor]:  # [B, Z] each
    """grad_z, grad_mu, grad_var: the gradient of <grad, log_q>."""
    d = z - mu
    r = d / var
    grad = grad[:, None]
    grad_mu = grad * r
    return -grad_mu, grad_mu, 0.5 * grad * ((d * r - 1) / var)


def gaussian_log_prob_bwd_bwd(
    ggz: Tensor | None,  # [B, Z]
    ggmu: Tensor | None,  # [B, Z]
    ggvar: Tensor | None,  # [B, Z]
    grad: Tensor,  # [B]
    z: Tensor,  # [B, Z]
    mu: Tensor,  # [B, Z]
    var: Tensor,  # [B, Z]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [B], [B, Z], [B, Z], [B, Z]
    """The gradient of <ggz, grad_z> + <ggmu, grad_mu> + <ggvar, grad_var> with respect to grad, z, mu and var.

    None stands for zeros. With delta = ggmu - ggz:

        gg      = sum_Z [ r delta + 1/2 ggvar (d r - 1) / var ]
        z_bar   = grad (delta + ggvar r) / var
        mu_bar  = -z_bar
        var_bar = grad (-r delta + ggvar (1/2 - d r) / var) / var
    """
    d = z - mu
    r = d / var
    delta = torch.zeros_like(d)
    if ggmu is not None:
        delta += ggmu
    if ggz is not None:
        delta -= ggz
    scaled = torch.zeros_like(d) if ggvar is None else ggvar / var
    grad = grad[:, None]
    z_bar = grad * (delta / var + scaled * r)
    gg = (r * delta + 0.5 * scaled * (d * r - 1)).sum(-1)
    return gg, z_bar, -z_bar, grad * ((scaled * (0.5 - d * r) - r * delta) / var)


def gaussian_kl(
    mu: Tensor,  # [B, Z]
    var: Tensor,  # [B, Z]
) -> Tensor:  # [B, Z]
    """KL( N(mu, var) || N(0, 1) ) of every latent dimension, in nats.

        kl = 1/2 ( mu^2 + var - 1 - ln var )

    Args:
        mu, var: Mean and variance (> 0). [B, Z], float32 or float64.
    Returns:
        [B, Z], dtype of mu, >= 0; sum over the last axis for the KL of an image.
    Raises:
        ValueError: shapes differ.
    Differentiable: twice, in mu and var.
    """
    check_gaussian(mu=mu, var=var)
    return 0.5 * (mu.square() + var - 1.0 - var.log())


def gaussian_reparameterize(
    mu: Tensor,  # [B, Z]
    var: Tensor,  # [B, Z]
    eps_z: Tensor,  # [B, Z]
) -> Tensor:  # [B, Z]
    """z = mu + sqrt(var) eps_z, so that gradients reach mu and var through z.

    Args:
        mu, var: Mean and variance (> 0). [B, Z], float32 or float64.
        eps_z: Standard normal noise, same shape and dtype.
    Raises:
        ValueError: shapes differ.
    Differentiable: twice, in all three.
    Source: Kingma & Welling, arXiv:1312.6114.
    """
    check_gaussian(mu=mu, var=var, eps_z=eps_z)
    return mu + var.sqrt() * eps_z
