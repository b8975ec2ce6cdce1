"""Diagonal Gaussians: log density, KL divergence from the prior, reparameterised sample."""

import math

from torch import Tensor


def _check_same_shape(**tensors: Tensor) -> None:
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

    Args:
        z: Point. [B, Z], float32 or float64.
        mu: Mean, same shape and dtype as z.
        var: Variance, > 0, same shape and dtype as z.
    Returns:
        [B], dtype of z.
    Raises:
        ValueError: shapes differ.
    Differentiable: twice, in z, mu and var.
    Source: SAMI, arXiv:2512.17127, encoder density.
    """
    _check_same_shape(z=z, mu=mu, var=var)
    return -0.5 * ((z - mu).square() / var + var.log() + math.log(2 * math.pi)).sum(-1)


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
    _check_same_shape(mu=mu, var=var)
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
    _check_same_shape(mu=mu, var=var, eps_z=eps_z)
    return mu + var.sqrt() * eps_z
