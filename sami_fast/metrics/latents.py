"""What latent dimensions cost, what they hold, and which are in use."""

from collections.abc import Sequence

import numpy as np

from .checks import as_finite, as_table, as_tables

LIVE_NATS = 0.05  # a dimension with less information carries nothing
LIVE_RULE = f"information above {LIVE_NATS:g} nats"  # for messages


def kl_per_dim(mu: np.ndarray, var: np.ndarray) -> np.ndarray:
    """Mean KL( N(mu, var) || N(0, 1) ) of every dimension over the images: its rate, what it costs.

    It is never below the information that the dimension holds, and may be far above: an offset from the prior that all images share costs
    as well.

    Args:
        mu, var: Mean and variance (> 0) of q(z|x). [N, Z].
    Returns:
        [Z], nats.
    Raises:
        ValueError: shapes differ, values are not finite, or a variance is not positive.
    """
    mu, var = _checked(mu, var)
    return (0.5 * (mu**2 + var - 1.0 - np.log(var))).mean(0)


def information_per_dim(mu: np.ndarray, var: np.ndarray) -> np.ndarray:
    """Information I(x; z_d) that a sample of every dimension holds about the image, by the spread of its means over the images:

        1/2 ln( 1 + var(mu_d) / mean(var_d) )

    Exact where the means are normally distributed and the variance is the same for all images; otherwise an estimate. 0 for a dimension
    that reads the same in every image, whatever its KL.

    Args:
        mu, var: Mean and variance (> 0) of q(z|x). [N, Z].
    Returns:
        [Z], nats.
    Raises:
        As `kl_per_dim`.
    """
    mu, var = _checked(mu, var)
    return gaussian_information(mu.var(0), var.mean(0))


def gaussian_information(signal: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """1/2 ln(1 + signal / noise): nats that a Gaussian value of variance `signal` >= 0 leaves in a reading with Gaussian noise of variance
    `noise` > 0. Arrays of one shape."""
    return 0.5 * np.log1p(signal / noise)


def whitening(covariance: np.ndarray) -> np.ndarray:
    """covariance^(-1/2), symmetric. [Z, Z]

    Raises:
        ValueError: the covariance is not of full rank.
    """
    values, vectors = np.linalg.eigh(as_table("total", covariance))
    if values[0] <= 1e-12 * values[-1]:
        rank = int((values > 1e-12 * values[-1]).sum())
        raise ValueError(f"total: expected a covariance of full rank {len(values)} (more images than dimensions), found rank {rank}")
    return vectors / np.sqrt(values) @ vectors.T


def _checked(mu: np.ndarray, var: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mu, var = as_tables(mu=mu, var=var)
    if mu.shape != var.shape:
        raise ValueError(f"var: expected shape {list(mu.shape)}, as mu has, found {list(var.shape)}")
    if not (var > 0).all():
        raise ValueError(f"var: expected positive values, found {var.min():g}")
    return mu, var


def live_dims(information: np.ndarray | Sequence[float]) -> np.ndarray:
    """Dimensions with more information than `LIVE_NATS`: what counts as live is decided here and nowhere else.

    Args:
        information: Of every dimension, nats. [Z].
    Returns:
        Their indices, most informative first. [L] ints, L <= Z.
    Raises:
        ValueError: more than one axis, or as `checks.as_finite`: NaN is no less than the limit, and no more.
    """
    nats = as_finite("information", np.asarray(information))
    if nats.ndim != 1:
        raise ValueError(f"information: expected one value per dimension, [Z], found shape {list(nats.shape)}")
    order = np.argsort(-nats, kind="stable")
    return order[nats[order] > LIVE_NATS]
