"""The reverse process, guided by z: sample, reconstruct, traverse.

Every random number is a function of (seed, index of the picture): a picture does not depend on the batch it is computed in.
Step k of the stream INIT is the noise added after k reverse steps; step 0 is x_T.
"""

from collections.abc import Sequence
from typing import Literal, TypedDict, Unpack

import torch
from torch import Tensor

from . import ops
from .sami import Posterior, Sami
from .schedule import alpha_sigma

# Chosen on 16x16 disks by how well reconstructions re-encode to their z. What early levels get wrong, only fresh noise lets later levels
# correct: 15 to 23 % of the reconstructions miss some latent by half a standard deviation or more at eta 0, 2 to 3 % at 1, 0.5 % at 2.
GUIDED_ETA = 2.0
UNGUIDED_ETA = 1.0  # more narrows what the denoiser draws on its own
GUIDANCE_CLIP = 4.0  # below 3 the pull is too weak to arrive; without a limit 4 to 7 % of far-off latents give no disk
NUM_STEPS = 50


class SamplerOptions(TypedDict, total=False):
    """The settings of `ddim` that `sample`, `reconstruct` and `traverse` pass on."""

    num_steps: int
    guidance_scale: float
    guidance_clip: float | None
    eta: float | None
    clip_x_0: bool
    batch_size: int


@torch.no_grad()
def ddim(
    sami: Sami,
    x_T: Tensor,  # [B, C, H, W]
    z: Tensor | None = None,  # [B, Z]
    *,
    seed: int = 0,
    index: Tensor | None = None,  # [B]
    num_steps: int = NUM_STEPS,
    guidance_scale: float = 1.0,
    guidance_clip: float | None = GUIDANCE_CLIP,
    eta: float | None = None,
    clip_x_0: bool = True,
    batch_size: int = 64,
) -> Tensor:  # [B, C, H, W]
    """Images from noise, guided towards z.

        x_0   = (x_t - sigma_t eps_hat) / alpha_t,                        clipped to [-1, 1], and eps_hat made to agree
        x_s   = alpha_s x_0 + sigma_s (kept eps_hat + sqrt(1 - kept^2) n),  n ~ N(0, I)
        kept  = exp(-eta^2 (logsnr_s - logsnr_t) / 2)

    Levels are uniform in t: the schedule's own density of levels, which training saw. eta 0 is DDIM, eta 1 DDPM's ancestral sampling;
    above 1 the fresh noise works as Langevin steps, in the exponential form that stays stable at any eta.

    Args:
        sami: The model.
        x_T: Starting noise; its dtype is that of the arithmetic.
        z: Latents to guide towards; None for the denoiser alone.
        seed: Key of the fresh noise, >= 0.
        index: Which picture each row is, for its fresh noise. int64 >= 0; 0, 1, 2, ... when None.
        num_steps: Levels, and so evaluations of the denoiser, >= 1.
        guidance_scale: 1 is Bayes' rule, 0 is off.
        guidance_clip: Standard deviations beyond which a z is not pulled harder (`Sami.predict_eps`); None for no limit.
        eta: Amount of fresh noise, >= 0. None takes 2 with z and 1 without.
        clip_x_0: Keep every estimate of x_0 within [-1, 1].
        batch_size: Images at a time; bounds the memory and changes no picture beyond rounding.
    Returns:
        The last estimate of x_0; in [-1, 1] with clip_x_0.
    Raises:
        ValueError: shapes do not fit, or num_steps, eta or batch_size is out of range.
    Source: Song, Meng & Ermon, arXiv:2010.02502; guidance of SAMI, arXiv:2512.17127.
    """
    if x_T.shape[1:] != sami.image_shape:
        raise ValueError(f"x_T: expected [B, {', '.join(map(str, sami.image_shape))}], found {list(x_T.shape)}")
    if z is not None and (z.dim() != 2 or len(z) != len(x_T)):
        raise ValueError(f"z: expected [{len(x_T)}, Z], found {list(z.shape)}")
    index = torch.arange(len(x_T), device=x_T.device) if index is None else index.to(x_T.device)
    if index.shape != x_T.shape[:1]:
        raise ValueError(f"index: expected [{len(x_T)}], found {list(index.shape)}")
    eta = (UNGUIDED_ETA if z is None else GUIDED_ETA) if eta is None else eta
    for name, value, low in (("num_steps", num_steps, 1), ("eta", eta, 0), ("batch_size", batch_size, 1)):
        if not value >= low:
            raise ValueError(f"{name}: expected at least {low}, found {value}")

    t = torch.linspace(1, 0, num_steps, dtype=x_T.dtype, device=x_T.device)
    logsnr = sami.schedule.logsnr(t)
    alpha, sigma = alpha_sigma(logsnr)
    kept = torch.exp(-0.5 * eta**2 * logsnr.diff())  # share of the old noise in the new
    fresh = (1 - kept.square()).sqrt()

    def reverse(x_t: Tensor, z: Tensor | None, index: Tensor) -> Tensor:
        for step in range(num_steps):
            eps_hat = sami.predict_eps(x_t, t[step].expand(len(x_t)), z, guidance_scale, guidance_clip)
            x_0 = (x_t - sigma[step] * eps_hat) / alpha[step]
            if clip_x_0:
                x_0 = x_0.clamp(-1, 1)
                eps_hat = (x_t - alpha[step] * x_0) / sigma[step]
            if step + 1 < num_steps:
                noise = kept[step] * eps_hat
                if eta > 0:
                    noise = noise + fresh[step] * _noise(sami, seed, step + 1, index).to(noise)
                x_t = alpha[step + 1] * x_0 + sigma[step + 1] * noise
        return x_0

    latents = [None] * -(-len(x_T) // batch_size) if z is None else z.split(batch_size)
    parts = zip(x_T.split(batch_size), latents, index.split(batch_size), strict=True)
    return torch.cat([reverse(*part) for part in parts])


def _noise(sami: Sami, seed: int, step: int, index: Tensor) -> Tensor:
    """[B] -> [B, C, H, W] float32."""
    channels, height, width = sami.image_shape
    return ops.random_normal(seed, step, ops.Stream.INIT, index, channels * height * width).view(-1, channels, height, width)


def _index(sami: Sami, count: int, first: int) -> Tensor:
    return torch.arange(first, first + count, device=sami.device)


def starting_noise(sami: Sami, count: int, seed: int, first: int = 0) -> Tensor:
    """x_T of the pictures first, first + 1, ... of a seed. [count, C, H, W] float32 on the model's device."""
    return _noise(sami, seed, 0, _index(sami, count, first))


def prior_latents(sami: Sami, count: int, seed: int, first: int = 0) -> Tensor:
    """z ~ N(0, I) of the pictures first, first + 1, ... of a seed. [count, Z] float32 on the model's device."""
    return ops.random_normal(seed, 0, ops.Stream.PRIOR, _index(sami, count, first), sami.latent_size)


@torch.no_grad()
def encode(sami: Sami, x_0: Tensor, batch_size: int = 256) -> Posterior:
    """q(z|x_0) of many images, without gradient and in bounded memory.

    Args:
        x_0: [N, C, H, W] in [-1, 1], on any device, N >= 1.
        batch_size: Images at a time.
    Returns:
        mu and var, [N, Z] on the model's device.
    Raises:
        ValueError: the images are not of the model's shape.
    """
    if x_0.shape[1:] != sami.image_shape:
        raise ValueError(f"x_0: expected [N, {', '.join(map(str, sami.image_shape))}], found {list(x_0.shape)}")
    parts = [sami.encode(part.to(sami.device)) for part in x_0.split(batch_size)]
    return Posterior(torch.cat([part.mu for part in parts]), torch.cat([part.var for part in parts]))


def posterior_latents(sami: Sami, x_0: Tensor, *, seed: int, first: int = 0) -> Tensor:
    """z ~ q(z|x_0), one per image: over many images, latents of the aggregated posterior.

    Args:
        x_0: [N, C, H, W] in [-1, 1].
        seed, first: Image i draws with index first + i.
    Returns:
        [N, Z] on the model's device.
    """
    return encode(sami, x_0).draw(_index(sami, len(x_0), first), seed)


def sample(
    sami: Sami, count: int, *, seed: int, first: int = 0, z: Tensor | Literal["prior"] | None = "prior", **options: Unpack[SamplerOptions]
) -> Tensor:  # [count, C, H, W]
    """New images.

    Args:
        sami: The model.
        count: How many, >= 1.
        seed: Key of all noise, >= 0.
        first: Index of the first picture: 10 pictures from 0 and 10 from 10 are the 20 from 0.
        z: "prior" draws latents from N(0, I); [count, Z] are latents to guide towards, say of `posterior_latents`; None lets the
            denoiser draw alone.
        options: See `ddim`.
    Returns:
        [count, C, H, W] in [-1, 1].
    """
    latents = prior_latents(sami, count, seed, first) if isinstance(z, str) else z
    return ddim(sami, starting_noise(sami, count, seed, first), latents, seed=seed, index=_index(sami, count, first), **options)


def reconstruct(
    sami: Sami,
    x_0: Tensor,  # [N, C, H, W]
    *,
    seed: int,
    first: int = 0,
    **options: Unpack[SamplerOptions],
) -> Tensor:  # [N, C, H, W]
    """Images from noise and from the mean of q(z|x_0): what z does not know of x_0 comes out new.

    Args:
        x_0: In [-1, 1].
        seed, first: The noise of image i is that of picture first + i.
        options: See `ddim`.
    Returns:
        In [-1, 1], on the model's device.
    """
    return sample(sami, len(x_0), seed=seed, first=first, z=encode(sami, x_0).mu, **options)


def traverse(
    sami: Sami,
    start: Tensor,  # [1, C, H, W] or [1, Z]
    axis: int,
    values: Sequence[float] | Tensor,  # [V]
    *,
    seed: int,
    first: int = 0,
    **options: Unpack[SamplerOptions],
) -> Tensor:  # [V, C, H, W]
    """One latent dimension moved over values; the other dimensions and all noise are the same in every picture.

    Args:
        start: An image in [-1, 1], whose mean latent is used, or a latent.
        axis: Dimension to move, 0 to Z - 1.
        values: What it is set to.
        seed, first: The noise is that of picture `first`.
        options: See `ddim`.
    Returns:
        One image per value, in [-1, 1].
    Raises:
        ValueError: start is not one image or latent, or there is no such axis.
    """
    if len(start) != 1:
        raise ValueError(f"start: expected one image or latent, found {len(start)}")
    z = encode(sami, start).mu if start.dim() == 4 else start.to(sami.device)
    if not 0 <= axis < z.shape[1]:
        raise ValueError(f"axis: expected 0 to {z.shape[1] - 1}, found {axis}")
    values = torch.as_tensor(values, dtype=z.dtype, device=z.device)
    moved = z.repeat(len(values), 1)
    moved[:, axis] = values
    x_T = starting_noise(sami, 1, seed, first).expand(len(values), -1, -1, -1)
    return ddim(sami, x_T, moved, seed=seed, index=_index(sami, 1, first).expand(len(values)), **options)


def axis_values(mu: Tensor, axis: int, count: int, coverage: float = 0.98) -> Tensor:
    """Equally spaced values over the range that a latent takes on the data.

    Args:
        mu: Means of q(z|x_0) over the data. [N, Z].
        axis: Dimension.
        count: Values.
        coverage: Share of the images within the range.
    Returns:
        [count] increasing.
    """
    tail = (1 - coverage) / 2
    low, high = torch.quantile(mu[:, axis], torch.tensor([tail, 1 - tail], dtype=mu.dtype, device=mu.device)).tolist()
    return torch.linspace(low, high, count, dtype=mu.dtype, device=mu.device)
