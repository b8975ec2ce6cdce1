"""The negative ELBO of images in nats, with both endpoint terms: an upper bound on -ln p(x_0).

    -ln p(x_0) <= E_z [ prior + diffusion + reconstruction ] + KL( q(z|x_0) || N(0, I) ),   z ~ q(z|x_0)

    prior           KL( q(x_1|x_0) || N(0, I) ) at logsnr_min
    diffusion       1/2 integral E || eps - eps_hat(x_t, t, z) ||^2 d logsnr, one level per image, stratified over the set
    reconstruction  -ln p(x_0 | x_{t=0}, z) at logsnr_max

Source: VDM (Kingma et al., arXiv:2107.00630, eqs. 11-15) with eps_hat guided by z, and another decoder. VDM's reads x_{t=0} alone, which
costs about ln(sigma_0 / pixel step) nats per dimension unless logsnr_max is far above the levels this model is trained on. Ours is the
Gaussian around the model's own guess,

    p(x_0 | x_{t=0}, z) = N(x_hat, decoder_var I),   x_hat = (x_{t=0} - sigma_0 eps_hat) / alpha_0

with one number, decoder_var, fitted on training images. Of a model that decodes, x_hat is what it decodes from z, and the bound is the
reconstruction and the KL; a stochastic diffusion autoencoder has SAMI's terms with its own eps_hat.

For 8-bit images the probability of each pixel's bin under that Gaussian is taken: the bound is on a probability, and bits per dimension
compare with the literature. For continuous images it is a *density* in the units of x: it may be negative, and for noiseless synthetic
images, which fill no volume, it falls without limit as logsnr_max rises. Compare such numbers only between models with one logsnr range.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..methods.latent_model import LatentModel
from ..methods.sami import Sami
from ..schedule import alpha_sigma

RECONSTRUCTION_STEP = ops.EVALUATION_STEP + 1  # the endpoint's noise is not the diffusion term's

Images = Callable[[Tensor], Tensor]  # [n] int64 -> [n, C, H, W] in [-1, 1], on the model's device


@dataclass(frozen=True)
class Bound:
    """Terms of the negative ELBO, one per image, nats. [N] float64 each."""

    diffusion: np.ndarray
    kl: np.ndarray
    prior: np.ndarray
    reconstruction: np.ndarray
    unguided: np.ndarray | None  # the diffusion term without guidance, which is no part of the bound; None of methods that do not guide

    @property
    def total(self) -> np.ndarray:
        return self.diffusion + self.kl + self.prior + self.reconstruction

    @property
    def standard_error(self) -> float | None:
        """Of the mean of `total`, nats; an upper estimate, since the noise levels are stratified. None for a single image."""
        count = len(self.total)
        return float(self.total.std(ddof=1) / math.sqrt(count)) if count > 1 else None


def is_eight_bit(x_0: Tensor) -> bool:
    """Whether every value is one of the 256 levels 2 k / 255 - 1. Any shape."""
    level = (x_0.double() + 1.0) * 127.5
    return bool(((level - level.round()).abs() < 1e-3).all())


def gaussian_nats(x_0: Tensor, mean: Tensor, var: float) -> Tensor:
    """-ln N(x_0; mean, var I), a density. [B, C, H, W] twice -> [B]."""
    return 0.5 * (_square(x_0 - mean) / var + x_0[0].numel() * math.log(2 * math.pi * var))


def eight_bit_nats(x_0: Tensor, mean: Tensor, var: float) -> Tensor:
    """-ln of the probability that N(mean, var I) falls into the 8-bit bins of x_0; the outer bins are open. [B, C, H, W] twice -> [B].

    Args:
        x_0: Values 2 k / 255 - 1.
    """
    x_0, mean, std = x_0.double(), mean.double(), math.sqrt(var)
    upper = torch.where(x_0 > 1 - 1 / 255, math.inf, (x_0 + 1 / 255 - mean) / std)
    lower = torch.where(x_0 < -1 + 1 / 255, -math.inf, (x_0 - 1 / 255 - mean) / std)
    # Work in the tail where the normal distribution function is small: differences near 1 would lose every digit.
    flip = lower + upper > 0
    near, far = torch.where(flip, -lower, upper), torch.where(flip, -upper, lower)
    log_near, log_far = torch.special.log_ndtr(near), torch.special.log_ndtr(far)
    return -(log_near + torch.log1p(-torch.exp(log_far - log_near))).flatten(1).sum(1)


def _guess(model: LatentModel, x_0: Tensor, z: Tensor, index: Tensor, seed: int) -> Tensor:
    """x_hat, the model's guess of x_0 from its cleanest noisy copy, or from z alone. [B, C, H, W]"""
    if model.decodes:
        return model.decode(z)
    t = torch.zeros(len(x_0), dtype=x_0.dtype, device=x_0.device)
    alpha_0, sigma_0 = alpha_sigma(model.schedule.logsnr(t))
    x_t, _ = ops.noise_sample(x_0, alpha_0[:, None], sigma_0[:, None], index, seed=seed, step=RECONSTRUCTION_STEP)
    eps_hat = model.predict_eps(x_t, t, z)
    return (x_t - sigma_0.view(-1, 1, 1, 1) * eps_hat) / alpha_0.view(-1, 1, 1, 1)


@torch.no_grad()
def fit_decoder_var(model: LatentModel, images: Images, count: int, *, seed: int, batch_size: int = 256) -> float:
    """The decoder's variance: mean squared error per dimension of x_hat over `count` images that the model was trained on.

    Args:
        model, images, count, seed, batch_size: As in `negative_elbo`.
    Returns:
        Variance in the units of x squared, at least 1e-12.
    Raises:
        ValueError: x_hat is not finite.
    """
    total = 0.0
    for index in torch.arange(count).split(batch_size):
        x_0 = images(index)
        index = index.to(x_0.device)
        z = model.encode(x_0).draw(index, seed)
        total += (x_0 - _guess(model, x_0, z, index, seed)).double().square().flatten(1).mean(1).sum().item()
    if not math.isfinite(total):
        raise ValueError(f"x_hat: expected finite images from the model, found a squared error of {total}")
    return max(1e-12, total / count)


@torch.no_grad()
def negative_elbo(
    model: LatentModel, images: Images, count: int, *, seed: int, decoder_var: float, eight_bit: bool, batch_size: int = 256
) -> Bound:
    """The bound on each of the first `count` images; its formula stands at the top of this file.

    Args:
        model: Any encoder and denoiser, or what decodes; not a deterministic encoder, which has no density.
        images: Images by index, in [-1, 1].
        count: N.
        seed: Key of the noise; nothing else is random.
        decoder_var: See `fit_decoder_var`.
        eight_bit: The images hold 256 levels: bound their probability instead of a density.
        batch_size: Images at a time, for memory.
    """
    schedule, decoder_nats = model.schedule, eight_bit_nats if eight_bit else gaussian_nats
    everything = torch.arange(count)
    span = schedule.logsnr_max - schedule.logsnr_min
    # Stratified uniforms, taken over logsnr: the integrand is bounded there, whatever the schedule.
    level = schedule.logsnr_max - span * schedule.sample(everything, 1, count, seed=seed, step=ops.EVALUATION_STEP)  # [N, 1]
    parts = []
    for index in everything.split(batch_size):
        x_0 = images(index)
        # Of a discrete schedule the nearest level: over many images their mean is then the trapezoidal rule over its levels.
        index, logsnr = index.to(x_0.device), schedule.nearest(level[index].to(x_0))
        posterior = model.encode(x_0)
        z = posterior.draw(index, seed)

        reconstruction = decoder_nats(x_0, _guess(model, x_0, z, index, seed), decoder_var)
        nothing = torch.zeros_like(reconstruction)
        diffusion, unguided, prior = nothing, None, nothing
        if not model.decodes:
            alpha_t, sigma_t = alpha_sigma(logsnr)
            x_t, eps = ops.noise_sample(x_0, alpha_t, sigma_t, index, seed=seed, step=ops.EVALUATION_STEP)
            assert isinstance(eps, Tensor)  # stored, unless asked otherwise
            t = schedule.t(logsnr).flatten()
            if isinstance(model, Sami):
                eps_pred = model.predict_eps(x_t, t)
                unguided = 0.5 * span * _square(eps - eps_pred)
                eps_hat = eps_pred - model.guidance(x_t, t, z)
            else:
                eps_hat = model.predict_eps(x_t, t, z)
            diffusion = 0.5 * span * _square(eps - eps_hat)
            alpha_1, sigma_1 = alpha_sigma(torch.tensor(schedule.logsnr_min, dtype=torch.float64))
            prior = 0.5 * (alpha_1**2 * x_0.double().square() + sigma_1**2 - 1.0 - 2.0 * sigma_1.log()).flatten(1).sum(1)
        parts.append((diffusion, posterior.kl.sum(1), prior, reconstruction, unguided))
    *columns, unguided = zip(*parts, strict=True)
    diffusion, kl, prior, reconstruction = (torch.cat(column).double().cpu().numpy() for column in columns)
    without = None if unguided[0] is None else torch.cat(unguided).double().cpu().numpy()
    return Bound(diffusion, kl, prior, reconstruction, without)


def _square(error: Tensor) -> Tensor:
    """Squared norm of each image. [B, C, H, W] -> [B] float64."""
    return error.double().square().flatten(1).sum(1)
