"""Latent axes turned while they are learnt: to where the images themselves tell them apart.

Latents that come alive together share what they say: each reads a mixture. What tells mixtures from the things mixed is how much each moves
the pixels: along the axes sought, the gradients of two latents have nothing in common on average. No network of SAMI reads latents, so its
encoder's two heads are all that has to be turned, and the steps after that make good what was not exact.
"""

from collections.abc import Callable

import numpy as np
import torch
from scipy.linalg import eigh
from torch import Tensor

from .methods.latent_model import Posterior
from .metrics.latents import information_per_dim, live_dims

IMAGES = 512
PROBES, STEP = 8, 0.02  # pairs of images around each, and how far from it, per pixel
COUPLED = 0.05  # correlation of two latents' gradients that is left as it is: it may be chance, and of latents alike no axes are better
BATCH = 256


@torch.no_grad()
def read(encode: Callable[[Tensor], Posterior], x_0: Tensor, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Latents of images, and how they move together where the pixels move.

    Args:
        encode: x [B, C, H, W] -> mu and var, [B, Z] each; as `LatentModel.encode`.
        x_0: Images in [-1, 1]. [N, C, H, W].
        seed: Of the directions in which pixels are moved.
    Returns:
        mu, var: [N, Z] float64.
        coupling: An estimate of the mean of J J^T, J = d mu / d x, without a pass back: the mean square of differences of mu between
            images a little to either side, along random directions. [Z, Z].
    """
    draws = torch.Generator().manual_seed(seed)
    codes, coupling = [], 0.0
    for x in x_0.split(BATCH):
        posterior = encode(x)
        codes.append(torch.stack((posterior.mu, posterior.var)).double().cpu())
        for _ in range(PROBES):
            aside = STEP * torch.randn(x.shape, generator=draws).to(x)
            moved = (encode(x + aside).mu - encode(x - aside).mu).double().cpu() / (2 * STEP)
            coupling = coupling + moved.T @ moved
    mu, var = torch.cat(codes, 1).numpy()
    return mu, var, np.asarray(coupling) / (PROBES * len(x_0))


def rotation(covariance: np.ndarray, coupling: np.ndarray, coupled: float = COUPLED) -> np.ndarray:
    """The turn after which no two latents' gradients are correlated by more than `coupled`, by Jacobi's method: two axes at a time, each
    pair by 45 degrees at most, so that an axis keeps its place and its sign.

    Args:
        covariance: Of the means over images; gradients are compared per standard deviation. [D, D], of full rank.
        coupling: Mean of J J^T (`read`). [D, D].
        coupled: Correlation of two gradients, 0 to 1.
    Returns:
        [D, D], orthogonal: row d is the new axis d.
    Source: Jacobi's eigenvalue algorithm; the axes are those of `latents.discovery.gradient_axes`.
    """
    values, vectors = eigh(covariance)
    white = vectors / np.sqrt(values) @ vectors.T  # pyrefly: ignore[missing-attribute] (scipy has no types)
    left, turned = white @ coupling @ white, np.eye(len(coupling))
    for _ in range(100):
        before = turned
        for i in range(len(left)):
            for j in range(i + 1, len(left)):
                if abs(left[i, j]) > coupled * np.sqrt(left[i, i] * left[j, j]):
                    angle = 0.5 * np.arctan2(2 * left[i, j], left[i, i] - left[j, j])
                    angle = (angle + np.pi / 4) % (np.pi / 2) - np.pi / 4
                    pair = np.eye(len(left))
                    pair[[i, j], [i, j]], pair[i, j], pair[j, i] = np.cos(angle), np.sin(angle), -np.sin(angle)
                    left, turned = pair @ left @ pair.T, pair @ turned
        if turned is before:
            break
    return turned


def turn_of(mu: np.ndarray, var: np.ndarray, coupling: np.ndarray) -> np.ndarray:
    """The turn of all latents: `rotation` of those that live, the others as they are. Arguments from `read`. [Z, Z]."""
    turn, live = np.eye(mu.shape[1]), np.sort(live_dims(information_per_dim(mu, var)))
    if len(live) > 1:
        inside = np.ix_(live, live)
        turn[inside] = rotation(np.cov(mu[:, live], rowvar=False), coupling[inside])
    return turn
