"""Which latent dimensions are in use."""

import numpy as np

LIVE_NATS = 0.05  # a dimension with a smaller mean KL carries nothing


def kl_per_dim(mu: np.ndarray, var: np.ndarray) -> np.ndarray:
    """Mean KL( N(mu, var) || N(0, 1) ) of every dimension over the images, nats. [N, Z], [N, Z] -> [Z]."""
    return (0.5 * (mu**2 + var - 1.0 - np.log(var))).mean(0)


def live_dims(kl: np.ndarray) -> np.ndarray:
    """Indices of the dimensions above `LIVE_NATS`, most informative first. [Z] -> [L]."""
    order = np.argsort(-kl, kind="stable")
    return order[kl[order] > LIVE_NATS]
