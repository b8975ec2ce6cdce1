"""How strong the strongest patterns in the images are, from which follows how much noise hides all of them, and how little some."""

import math

import torch

from .dataset import Dataset

SAMPLE = 512  # images; the largest of their eigenvalues is known to a few per cent, which moves the level by a few hundredths
BELOW = 3.0  # how far the noisiest level lies below the one where noise is as strong as the strongest component
ABOVE = 1.0  # how far the cleanest guided level lies above the one where noise is as strong as the last of Z components


def eigenvalues(dataset: Dataset) -> list[float]:
    """Variances along the principal components of an evenly spaced sample of the images, values in [-1, 1] (not per pixel), descending."""
    count = SAMPLE if dataset.size is None else min(SAMPLE, dataset.size)
    index = torch.arange(count) * ((dataset.size or count) // count)
    images = torch.cat([dataset.training_images(part).flatten(1).double().cpu() for part in index.split(64)])
    images = images - images.mean(0)
    return torch.linalg.eigvalsh(images @ images.T / count).flip(0).tolist()  # the same as of the covariance, which is larger


def noisiest_level(variances: list[float]) -> float:
    """logsnr at which the strongest component of the images has drowned: -ln(its variance) - 3, to a tenth, within [-15, 0].

    A noisier level costs time and teaches neither network anything. A cleaner one leaves the coarsest structure in sight at every level,
    and latents are never asked for it.
    """
    return round(min(0.0, max(-15.0, _level(variances[0]) - BELOW)), 1)


def cleanest_guided_level(variances: list[float], latents: int) -> float:
    """logsnr up to which Z latents guide: -ln(variance of the Z-th strongest component) + 1, to a tenth, within [-10, 15].

    Z numbers can at best tell the Z strongest components. At cleaner levels the image itself shows these, and all that a latent could gain
    there is in details: far more nats than in what is largest in the images, which latents then overlook.
    """
    return round(min(15.0, max(-10.0, _level(variances[min(latents, len(variances)) - 1]) + ABOVE)), 1)


def _level(variance: float) -> float:
    """logsnr at which noise is as strong as a component of this variance."""
    return -math.log(max(variance, 1e-7))
