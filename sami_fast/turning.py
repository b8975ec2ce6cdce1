"""Latent axes turned while they are learnt: to where the images themselves tell them apart.

Latents that come alive together share what they say: each reads a mixture. What tells mixtures from the things mixed is how much each moves
the pixels: along the axes sought, the gradients of two latents have nothing in common on average. The prior is the same along all axes, and
no network of SAMI reads latents, so its encoder's two heads are all that has to be turned.
"""

from collections.abc import Callable
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from .methods.latent_model import Posterior
from .metrics.latents import information_per_dim, live_dims, whitening

IMAGES = 512
PROBES, STEP = 8, 0.02  # pairs of images around each, and how far from it, per pixel
COUPLED = 0.05  # correlation of two latents' gradients that is left as it is: it may be chance, and of latents alike no axes are better


@torch.no_grad()
def read(
    encode: Callable[[Tensor], Posterior], images: Callable[[Tensor], Tensor], places: Tensor, batch_size: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Latents of images, and how they move together where the pixels move.

    Args:
        encode: x [B, C, H, W] -> mu and var, [B, Z] each; as `LatentModel.encode`.
        images: Places -> images in [-1, 1], [B, C, H, W].
        places: Of the images. [N] int64.
        batch_size: Images at a time.
        seed: Of the directions in which pixels are moved.
    Returns:
        mu, var: [N, Z] float64.
        coupling: An estimate of the mean of J J^T, J = d mu / d x, without a backward pass: the mean square of differences of mu between
            images a little to either side, along random directions. [Z, Z].
    """
    draws = torch.Generator().manual_seed(seed)
    codes, coupling = [], 0.0
    for some in places.split(batch_size):
        x = images(some)
        posterior = encode(x)
        codes.append(torch.stack((posterior.mu, posterior.var)).double().cpu())
        for _ in range(PROBES):
            aside = STEP * torch.randn(x.shape, generator=draws).to(x)
            moved = (encode(x + aside).mu - encode(x - aside).mu).double().cpu() / (2 * STEP)
            coupling = coupling + moved.T @ moved
    mu, var = torch.cat(codes, 1).numpy()
    return mu, var, np.asarray(coupling) / (PROBES * len(places))


def rotation(covariance: np.ndarray, coupling: np.ndarray, coupled: float = COUPLED) -> np.ndarray:
    """The turn after which the gradients of no two latents are correlated by more than `coupled`, by Jacobi's method: two axes at a time,
    each pair by 45 degrees at most, so that an axis keeps its place and its sign.

    The turn is found for latents of covariance I, and is exact for those. Others it leaves coupled a little, and what is a rotation leaves
    their prior as it is, which a map that made them independent would not.

    Args:
        covariance: Of the means over images, of full rank. [D, D].
        coupling: Mean of J J^T (`read`). [D, D].
        coupled: Correlation of two gradients, 0 to 1.
    Returns:
        [D, D], orthogonal: row d is the new axis d.
    Raises:
        ValueError: the covariance is not of full rank.
    Source: Jacobi's eigenvalue algorithm; the axes are those of `latents.discovery.gradient_axes`.
    """
    white = whitening(covariance)
    left, turned = white @ coupling @ white, np.eye(len(coupling))
    for _ in range(100):
        quiet = True
        for i in range(len(left)):
            for j in range(i + 1, len(left)):
                if abs(left[i, j]) > coupled * np.sqrt(left[i, i] * left[j, j]):
                    quiet = False
                    angle = 0.5 * np.arctan2(2 * left[i, j], left[i, i] - left[j, j])
                    angle = (angle + np.pi / 4) % (np.pi / 2) - np.pi / 4
                    pair = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
                    left[[i, j]] = pair @ left[[i, j]]
                    left[:, [i, j]] = left[:, [i, j]] @ pair.T
                    turned[[i, j]] = pair @ turned[[i, j]]
        if quiet:
            break
    return turned


def turn_of(mu: np.ndarray, var: np.ndarray, coupling: np.ndarray) -> np.ndarray:
    """The turn of all latents: `rotation` of those that live, the others as they are. Nothing turns where the images are too few to tell
    the live ones apart. Arguments from `read`. [Z, Z]."""
    turn, live = np.eye(mu.shape[1]), np.sort(live_dims(information_per_dim(mu, var)))
    if len(live) > 1:
        inside = np.ix_(live, live)
        with suppress(ValueError):  # of a covariance that is not of full rank
            turn[inside] = rotation(np.cov(mu[:, live], rowvar=False), coupling[inside])
    return turn
