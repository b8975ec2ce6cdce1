"""What an encoder's guidance is worth at every noise level: with an image's own latents, and with another image's.

    gain(logsnr) = 1/2 E ||eps - eps_theta||^2 - 1/2 E ||eps - eps_hat||^2,   eps_hat = eps_theta - sigma_t grad log q(z|x_t)

in nats per unit of logsnr: its integral is what guidance takes off the diffusion term of the bound. Latents that tell an image apart gain
with the image's own z and lose with another's. Where another image's z gains as well, the guidance says something that holds for all
images, which an unguided denoiser ought to know: it repairs the denoiser.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..methods.sami import Sami
from ..schedule import alpha_sigma
from .bound import Images
from .scale_profile import PROFILE_STEP, as_levels

GUIDANCE_STEP = PROFILE_STEP + 1  # noise of its own


@dataclass(frozen=True)
class GuidanceProfile:
    """Arrays of float64 over noise levels."""

    logsnr: np.ndarray  # [L] increasing
    gain: np.ndarray  # [L] with an image's own z, nats per unit of logsnr
    other: np.ndarray  # [L] with the z of another image
    zscore_square: np.ndarray  # [L, Z] E (z - mu_t)^2 / var_t, of an image's own z; 1 where the encoder knows how sure it may be

    @property
    def total(self) -> float:
        """Gain with an image's own z over all levels, nats per image."""
        return float(np.trapezoid(self.gain, self.logsnr))

    @property
    def other_total(self) -> float:
        """The same with another image's z."""
        return float(np.trapezoid(self.other, self.logsnr))


@torch.no_grad()
def guidance_profile(
    model: Sami, images: Images, count: int, *, logsnr: Sequence[float] | np.ndarray, seed: int, batch_size: int = 256
) -> GuidanceProfile:
    """Gain of guidance and calibration over noise levels.

    An image's other z is that of the image half of all away: neighbours are alike where images are frames in their order.

    Args:
        model: Encoder, denoiser and schedule.
        images: Images by index, in [-1, 1].
        count: N, at least 2.
        logsnr: Noise levels, increasing. [L].
        seed: Key of the noise, which is the same at every level.
        batch_size: Images at a time.
    Raises:
        ValueError: fewer than 2 images, or levels that are not increasing.
    Source: SAMI, arXiv:2512.17127, guidance by Bayes' rule; the gain is the difference of two of its bounds.
    """
    levels = as_levels(logsnr)
    if count < 2:
        raise ValueError(f"count: expected at least 2 images, found {count}")
    sums, squares = np.zeros((3, len(levels))), np.zeros((len(levels), model.latent_size))
    for index in torch.arange(count).split(batch_size):
        x_0 = images(index)
        index = index.to(x_0.device)
        z = model.encode(x_0).draw(index, seed)
        away = (index + count // 2) % count
        other = model.encode(images(away.cpu())).draw(away, seed)
        for place, level in enumerate(levels.tolist()):
            errors, zscores = _at_level(model, x_0, index, level, seed, z, other)
            sums[:, place] += errors.sum(1).cpu().numpy()
            squares[place] += zscores.square().sum(0).cpu().numpy()
    gain, of_other = 0.5 * (sums[0] - sums[1:]) / count
    return GuidanceProfile(levels, gain, of_other, squares / count)


def _at_level(model: Sami, x_0: Tensor, index: Tensor, logsnr: float, seed: int, z: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """||eps - eps_hat||^2 of each image without guidance, with its own z and with another's, [3, B]; (z - mu_t) / std_t, [B, Z]."""
    level = model.schedule.nearest(torch.full((len(x_0), 1), logsnr, dtype=torch.float64, device=x_0.device))
    alpha_t, sigma_t = (v.to(x_0) for v in alpha_sigma(level))
    x_t, eps = ops.noise_sample(x_0, alpha_t, sigma_t, index, seed=seed, step=GUIDANCE_STEP)
    assert isinstance(eps, Tensor)  # stored, unless asked otherwise
    t = model.schedule.t(level).flatten().to(x_0)
    eps_pred = model.predict_eps(x_t, t)
    guesses = (eps_pred, eps_pred - model.guidance(x_t, t, z), eps_pred - model.guidance(x_t, t, other))
    errors = torch.stack([(eps - guess).double().square().flatten(1).sum(1) for guess in guesses])
    noisy = model.encode(x_t, t)
    return errors, (z.double() - noisy.mu.double()) / noisy.var.double().sqrt()
