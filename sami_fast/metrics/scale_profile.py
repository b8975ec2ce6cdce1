"""How much a noisy image still says about each latent dimension, down to which noise level, and whether the encoder knows it.

    I_d(logsnr) = E[ log q(z_d|x_t) - log p(z_d) ],   z ~ q(z|x_0),   p = N(0, 1),   nats

Where z_d is distributed as p over the data, it is at most the mutual information of z_d and x_t, and equal to it if the encoder is
calibrated. It is negative where the encoder is sure of a wrong value.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import kstest
from sklearn.isotonic import isotonic_regression
from torch import Tensor

from .. import ops
from ..methods.latent_model import LatentModel
from ..progress import bar
from ..schedule import alpha_sigma
from .bound import RECONSTRUCTION_STEP, Images
from .checks import as_finite
from .latents import live_dims

PROFILE_STEP = RECONSTRUCTION_STEP + 1  # noise of its own, apart from the bound's


@dataclass(frozen=True)
class ScaleProfile:
    """Information about every latent dimension over noise levels. Arrays of float64; errors are standard errors over the images."""

    logsnr: np.ndarray  # [L] increasing
    information: np.ndarray  # [L, Z] I_d, nats
    information_error: np.ndarray  # [L, Z]
    clean: np.ndarray  # [Z] I_d where x_t is x_0: the mean KL, nats
    clean_error: np.ndarray  # [Z]
    scale: np.ndarray  # [Z] logsnr where I_d is half its clean value; NaN where there is none: see `half_point`
    calibration_mean: np.ndarray  # [L, Z] of (z - mu_t) / std_t, 0 when calibrated
    calibration_std: np.ndarray  # [L, Z] of the same, 1 when calibrated; above 1 the encoder is too sure
    calibration_distance: np.ndarray  # [L, Z] Kolmogorov-Smirnov distance of the same to N(0, 1), 0 to 1; 0.9 / sqrt(N) by chance


def half_point(logsnr: np.ndarray, values: np.ndarray, full: float) -> float:
    """The logsnr at which a curve that climbs from 0 to `full` passes full / 2.

    The curve is measured, so it may wobble, and it may dip below 0. It is cut to [0, full] and replaced by the nondecreasing curve nearest
    to it in least squares, which passes full / 2 once; between two levels it is taken as a line.

    Args:
        logsnr: Noise levels, increasing. [L].
        values: Of the curve there. [L].
        full: Its height, > 0.
    Returns:
        A value between the first and the last level. NaN where the curve never is below full / 2, or still is at the last level, and
        where values are NaN.
    """
    if np.isnan(values).any() or not math.isfinite(full):
        return math.nan
    fitted = isotonic_regression(np.clip(values, 0.0, full))
    above = int(np.searchsorted(fitted, full / 2))
    if above in (0, len(fitted)):
        return math.nan
    return float(np.interp(full / 2, fitted[above - 1 : above + 1], logsnr[above - 1 : above + 1]))


def as_levels(logsnr: Sequence[float] | np.ndarray) -> np.ndarray:
    """Noise levels as float64 [L].

    Raises:
        ValueError: none, more than one axis, not finite, or not increasing.
    """
    levels = as_finite("logsnr", np.asarray(logsnr))
    if levels.ndim != 1 or not levels.size or (np.diff(levels) <= 0).any():
        raise ValueError(f"logsnr: expected increasing levels, [L], found {levels.tolist()}")
    return levels


@torch.no_grad()
def scale_profile(
    model: LatentModel,
    images: Images,
    count: int,
    *,
    logsnr: Sequence[float] | np.ndarray,
    seed: int,
    batch_size: int = 256,
    progress: Callable[[int], object] | None = None,
) -> ScaleProfile:
    """Information, characteristic scale and calibration of every latent dimension.

    The noise is a function of (seed, image), the same at every level: a profile is smooth in logsnr, and its errors go together. The
    mean over z ~ q(z|x_0) is taken in closed form; calibration alone draws z.

    Args:
        model: Its encoder and schedule, and no more; not a deterministic one.
        images: Images by index, in [-1, 1].
        count: N, at least 2.
        logsnr: Noise levels, increasing. [L].
        seed: Key of the noise.
        batch_size: Images at a time. Beside them L N Z numbers are held.
        progress: Called after every batch with the number of images in it, N in all.
    Raises:
        ValueError: fewer than 2 images, or levels that are not increasing.
    Source: SAMI, arXiv:2512.17127, latents and noise levels; Kolmogorov-Smirnov distance by scipy.
    """
    levels = as_levels(logsnr)
    if count < 2:
        raise ValueError(f"count: expected at least 2 images, found {count}")
    clean, information, residual = [], [], []
    with bar(count, "noise levels", "images") as seen:
        for index in torch.arange(count).split(batch_size):
            x_0 = images(index)
            index = index.to(x_0.device)
            posterior = model.encode(x_0)
            z, mu, var = posterior.draw(index, seed).double(), posterior.mu.double(), posterior.var.double()
            at_levels = [_at_level(model, x_0, index, level, seed, z, mu, var) for level in levels.tolist()]
            clean.append(posterior.kl.double().cpu())
            information.append(torch.stack([nats for nats, _ in at_levels]))
            residual.append(torch.stack([deviation for _, deviation in at_levels]))
            (progress or seen.update)(len(index))
    clean, information, residual = torch.cat(clean).numpy(), torch.cat(information, 1).numpy(), torch.cat(residual, 1).numpy()

    root, height, mean = math.sqrt(count), clean.mean(0), information.mean(1)
    scale = np.full(len(height), math.nan)
    for d in live_dims(np.nan_to_num(height, nan=0.0)):  # of a model that gives NaN, nothing has a scale
        scale[d] = half_point(levels, mean[:, d], height[d])
    distance = [[kstest(column, "norm", method="asymp").statistic for column in table.T] for table in residual]
    return ScaleProfile(
        logsnr=levels,
        information=mean,
        information_error=information.std(1, ddof=1) / root,
        clean=height,
        clean_error=clean.std(0, ddof=1) / root,
        scale=scale,
        calibration_mean=residual.mean(1),
        calibration_std=residual.std(1, ddof=1),
        calibration_distance=np.array(distance),
    )


def _at_level(
    model: LatentModel, x_0: Tensor, index: Tensor, logsnr: float, seed: int, z: Tensor, mu: Tensor, var: Tensor
) -> tuple[Tensor, Tensor]:
    """I_d of each image, and (z - mu_t) / std_t. [B, Z] each, float64 on the CPU."""
    level = torch.full((len(x_0), 1), logsnr, dtype=torch.float64, device=x_0.device)
    alpha_t, sigma_t = (v.to(x_0) for v in alpha_sigma(level))
    x_t, _ = ops.noise_sample(x_0, alpha_t, sigma_t, index, seed=seed, step=PROFILE_STEP)
    noisy = model.encode(x_t, model.schedule.t(level).flatten().to(x_0))
    mu_t, var_t = noisy.mu.double(), noisy.var.double()
    nats = 0.5 * (mu.square() + var - ((mu - mu_t).square() + var) / var_t - var_t.log())
    return nats.cpu(), ((z - mu_t) / var_t.sqrt()).cpu()
