"""Which latent dimensions are in use."""

from collections.abc import Sequence

import numpy as np

from .checks import as_tables

LIVE_NATS = 0.05  # a dimension with a smaller mean KL carries nothing
LIVE_RULE = f"mean KL above {LIVE_NATS:g} nats"  # for messages


def kl_per_dim(mu: np.ndarray, var: np.ndarray) -> np.ndarray:
    """Mean KL( N(mu, var) || N(0, 1) ) of every dimension over the images: its rate.

    Args:
        mu, var: Mean and variance (> 0) of q(z|x). [N, Z].
    Returns:
        [Z], nats.
    Raises:
        ValueError: shapes differ, values are not finite, or a variance is not positive.
    """
    mu, var = as_tables(mu=mu, var=var)
    if mu.shape != var.shape:
        raise ValueError(f"var: expected shape {list(mu.shape)}, as mu has, found {list(var.shape)}")
    if not (var > 0).all():
        raise ValueError(f"var: expected positive values, found {var.min():g}")
    return (0.5 * (mu**2 + var - 1.0 - np.log(var))).mean(0)


def live_dims(kl: np.ndarray | Sequence[float]) -> np.ndarray:
    """Dimensions with a mean KL above `LIVE_NATS`: what counts as live is decided here and nowhere else.

    Args:
        kl: Mean KL of every dimension, nats. [Z].
    Returns:
        Their indices, most informative first. [L] ints, L <= Z.
    Raises:
        ValueError: more than one axis.
    """
    rates = np.asarray(kl)
    if rates.ndim != 1:
        raise ValueError(f"kl: expected one value per dimension, [Z], found shape {list(rates.shape)}")
    order = np.argsort(-rates, kind="stable")
    return order[rates[order] > LIVE_NATS]
