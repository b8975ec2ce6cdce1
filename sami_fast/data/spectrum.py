"""How strong the strongest pattern in the images is, from which follows how much noise it takes to hide all of them."""

import math

import torch

from .dataset import Dataset

SAMPLE = 512  # images; the largest of their eigenvalues is known to a few per cent, which moves the level by a few hundredths
BELOW = 3.0  # how far the noisiest level lies below the one where noise is as strong as the strongest component


def largest_eigenvalue(dataset: Dataset) -> float:
    """Variance along the first principal component of an evenly spaced sample of the images, values in [-1, 1] (not per pixel)."""
    count = SAMPLE if dataset.size is None else min(SAMPLE, dataset.size)
    index = torch.arange(count) * ((dataset.size or count) // count)
    images = torch.cat([dataset.training_images(part).flatten(1).double().cpu() for part in index.split(64)])
    images = images - images.mean(0)
    return torch.linalg.eigvalsh(images @ images.T / count)[-1].item()  # the same as of the covariance, which is larger


def noisiest_level(dataset: Dataset) -> float:
    """logsnr at which the strongest component of the images has drowned: -ln(its variance) - 3, to a tenth, within [-15, 0].

    A noisier level costs time and teaches neither network anything. A cleaner one leaves the coarsest structure in sight at every level,
    and latents are never asked for it.
    """
    level = -math.log(max(largest_eigenvalue(dataset), 1e-6)) - BELOW
    return round(min(0.0, max(-15.0, level)), 1)
