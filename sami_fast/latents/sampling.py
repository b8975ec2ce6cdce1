"""The reverse process, guided by z: sample, reconstruct, traverse, interpolate, edit; and back from an image to its noise: invert.

Every random number is a function of (seed, index of the picture): a picture does not depend on the batch it is computed in.
Images are given in any way that `as_images` knows. Noise, latents and sums are float32, in float64 for a model in float64, and so are the
pictures that come out; networks of 16 bits get their images in 16 bits.
Step k of the stream INIT is the noise added after k reverse steps; step 0 is x_T.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypedDict, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..methods.inputs import ImageLike, as_images
from ..methods.latent_model import LatentModel, Posterior
from ..progress import bar
from ..schedule import alpha_sigma
from . import SOLVERS, STARTS, Solver, Start
from .axes import Axes

UNGUIDED_ETA = 1.0  # with more, what the denoiser draws on its own varies less than the data
GUIDANCE_CLIP = 4.0  # of 16x16 disks: below 3 images miss their latents, without a limit 4 to 7 % of latents far from the data give no disk
NUM_STEPS = 50
COVERAGE = 0.95  # of the data, by the range of a traversal
RANGE_IMAGES = 1000  # that this range is taken from: enough for its ends


def range_rows(count: int) -> Tensor:
    """Which of so many images tell the range of latents, at most `RANGE_IMAGES`: at equal distances, since frames of videos come in their
    order. [n] int64."""
    return torch.linspace(0, count - 1, min(count, RANGE_IMAGES), dtype=torch.float64).round().long()


class SamplerOptions(TypedDict, total=False):
    """The settings of `reverse_process` that `sample`, `reconstruct`, `traverse`, `interpolate` and `edit` pass on."""

    solver: Solver
    num_steps: int
    guidance_scale: float
    guidance_clip: float | None
    eta: float | None
    clip_x_0: bool
    batch_size: int


def resolve_eta(solver: Solver, eta: float | None, *, default: float = UNGUIDED_ETA, x_T: Start = "random") -> float:
    """How much fresh noise a solver takes.

    Args:
        solver: "ddim" takes any eta >= 0, "ancestral" is 1, "dpm2m" 0.
        eta: What the caller asked for; None for the default.
        default: Of "ddim": 1 without z, else the model's `guided_eta`.
        x_T: "inverted" is 0 with any solver: fresh noise would undo what the inversion found.
    Raises:
        ValueError: eta is negative or contradicts solver or x_T, or one of these is unknown.
    """
    for name, value, known in (("solver", solver, SOLVERS), ("x_T", x_T, STARTS)):
        if value not in known:
            raise ValueError(f"{name}: expected {', '.join(known)}, found {value!r}")
    if x_T == "inverted" and solver == "ancestral":
        raise ValueError("solver: expected ddim or dpm2m with x_T inverted, found ancestral")
    if eta is not None and not eta >= 0:
        raise ValueError(f"eta: expected at least 0, found {eta}")
    if (fixed := {"ancestral": 1.0, "dpm2m": 0.0}.get(solver, 0.0 if x_T == "inverted" else None)) is None:
        return default if eta is None else eta
    if eta not in (None, fixed):
        raise ValueError(
            f"eta: expected {fixed:g} or none with {'x_T inverted' if solver == 'ddim' else f'solver {solver}'}, found {eta:g}"
        )
    return fixed


@torch.no_grad()
def reverse_process(
    model: LatentModel,
    x_T: Tensor,  # [B, C, H, W]
    z: Tensor | None = None,  # [B, Z]
    *,
    seed: int = 0,
    index: Tensor | None = None,  # [B]
    solver: Solver = "ddim",
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

    DPM-Solver++(2M) is the DDIM step from an estimate carried on to the middle of the step by the level before:

        x_0 <- x_0 + (x_0 - x_0_before) / 2

    Its levels are uniform in logsnr: with others, long steps after short ones carry too far. Its error falls with the square of the step
    where DDIM's falls with the step; like DDIM it has no fresh noise to correct early levels with.

    A model with a decoder (`LatentModel.decodes`) has no reverse process: its image is the decoder's, and nothing else here matters.

    Args:
        model: Of any method.
        x_T: Starting noise; its dtype is that of the arithmetic, which is float32 at least.
        z: Latents to guide towards; None for the denoiser alone.
        seed: Key of the fresh noise, >= 0.
        index: Which picture each row is, for its fresh noise. int64 >= 0; 0, 1, 2, ... when None.
        solver: "ddim", "ancestral" (ddim at eta 1) or "dpm2m" (deterministic, second order).
        num_steps: Levels, and so evaluations of the denoiser, >= 1.
        guidance_scale: 1 is Bayes' rule, 0 is off.
        guidance_clip: Standard deviations beyond which a z is not pulled harder (`Sami.predict_eps`); None for no limit.
        eta: Amount of fresh noise of "ddim", >= 0. None takes the model's `guided_eta` with z and 1 without.
        clip_x_0: Keep every estimate of x_0 within [-1, 1].
        batch_size: Images at a time; bounds the memory and changes no picture beyond rounding.
    Returns:
        The last estimate of x_0; in [-1, 1] with clip_x_0.
    Raises:
        ValueError: shapes do not fit, or solver, num_steps, eta or batch_size is out of range.
    Source: Song, Meng & Ermon, arXiv:2010.02502; Lu et al., arXiv:2211.01095, algorithm 2; guidance of SAMI, arXiv:2512.17127.
    """
    x_T = x_T.to(model.device, torch.promote_types(x_T.dtype, torch.float32))
    z = None if z is None else torch.as_tensor(z).to(x_T)
    if model.decodes:
        return _decoded(model, x_T, z, clip_x_0, batch_size)
    levels = _Levels(model, x_T, "logsnr" if solver == "dpm2m" else "t", num_steps, guidance_scale, guidance_clip, clip_x_0)
    index = torch.arange(len(x_T), device=x_T.device) if index is None else index.to(x_T.device)
    if index.shape != x_T.shape[:1]:
        raise ValueError(f"index: expected [{len(x_T)}], found {list(index.shape)}")
    eta = resolve_eta(solver, eta, default=UNGUIDED_ETA if z is None else model.guided_eta)
    kept = torch.exp(-0.5 * eta**2 * levels.logsnr.diff())  # share of the old noise in the new
    fresh = (1 - kept.square()).sqrt()

    def reverse(x_t: Tensor, z: Tensor | None, index: Tensor) -> Tensor:
        before = None
        for step in range(num_steps - 1):
            x_0, eps_hat = levels.estimate(step, x_t, z)
            progress.update(len(x_t))
            estimate = x_0
            if solver == "dpm2m" and before is not None:
                estimate = x_0 + 0.5 * (x_0 - before)
                eps_hat = levels.eps(step, x_t, estimate)
            before = x_0
            noise = kept[step] * eps_hat
            if eta > 0:
                noise = noise + fresh[step] * _noise(model, seed, step + 1, index).to(noise)
            x_t = levels.alpha[step + 1] * estimate + levels.sigma[step + 1] * noise
        x_0, _ = levels.estimate(num_steps - 1, x_t, z)
        progress.update(len(x_t))
        return x_0

    with bar(len(x_T) * num_steps, "drawing", "steps of images") as progress:
        return _in_batches(model, reverse, "x_T", x_T, z, index, batch_size)


@torch.no_grad()
def invert(
    model: LatentModel,
    x_0: ImageLike,  # [N, C, H, W]
    z: Tensor | None = None,  # [N, Z]
    *,
    num_steps: int = NUM_STEPS,
    guidance_scale: float = 1.0,
    guidance_clip: float | None = GUIDANCE_CLIP,
    clip_x_0: bool = True,
    batch_size: int = 64,
) -> Tensor:  # [N, C, H, W]
    """The noise x_T from which `reverse_process` at eta 0 with the same z and settings comes back to an image: DDIM run backwards.

        x_t = alpha_t / alpha_s x_s + (sigma_t - alpha_t sigma_s / alpha_s) eps_hat(x_t, t),   from x_s = x_0, alpha_s = 1, sigma_s = 0

    The right-hand x_t is a guess made with eps_hat of the cleaner level s: still one evaluation per level, and the way there and back
    misses x_0 by the square of the step, not by the step as with eps_hat of s itself.

    The functions of this module invert with the denoiser alone and then guide from that x_T. The guided process forgets whatever noise
    lies along what z tells, so its way back is unstable. On 32 16x16 disks, where z tells everything, 50 steps with guidance both ways
    miss x_0 by a mean squared error of 0.58, guided from the denoiser's own x_T by 0.0002, from random x_T by 0.024.

    Args:
        x_0: Images in [-1, 1]; their dtype is that of the arithmetic, which is float32 at least.
        z: Latents that guide; None for the denoiser alone.
        num_steps, guidance_scale, guidance_clip, clip_x_0, batch_size: As in `reverse_process`, which must be given the same.
    Returns:
        x_T on the model's device.
    Raises:
        ValueError: as `reverse_process`.
    Source: Song, Meng & Ermon, arXiv:2010.02502, section 4.3.
    """
    x_0 = as_images(x_0, model.image_shape, name="x_0", least=model.arithmetic, noisy=True).to(model.device)
    z = None if z is None else torch.as_tensor(z).to(x_0)
    levels = _Levels(model, x_0, "t", num_steps, guidance_scale, guidance_clip, clip_x_0)

    def forward(x_t: Tensor, z: Tensor | None, _: Tensor) -> Tensor:
        alpha_s, sigma_s, eps_hat = 1.0, 0.0, torch.zeros_like(x_t)
        for step in reversed(range(num_steps)):
            shrink = levels.alpha[step] / alpha_s
            share = levels.sigma[step] - shrink * sigma_s
            _, eps_hat = levels.estimate(step, shrink * x_t + share * eps_hat, z)
            x_t = shrink * x_t + share * eps_hat
            alpha_s, sigma_s = levels.alpha[step], levels.sigma[step]
            progress.update(len(x_t))
        return x_t

    with bar(len(x_0) * num_steps, "finding the noise of images", "steps of images") as progress:
        return _in_batches(model, forward, "x_0", x_0, z, torch.arange(len(x_0)), batch_size)


def _decoded(model: LatentModel, x_T: Tensor, z: Tensor | None, clip_x_0: bool, batch_size: int) -> Tensor:
    """Images of latents by a model's decoder; x_T only says how many."""

    def decode(_: Tensor, z: Tensor | None, __: Tensor) -> Tensor:
        if z is None:
            raise ValueError("z: expected latents, since a decoder draws nothing without them")
        return model.decode(z).clamp(-1, 1) if clip_x_0 else model.decode(z)

    return _in_batches(model, decode, "x_T", x_T, z, torch.arange(len(x_T)), batch_size)


class _Levels:
    """Noise levels from the noisiest to the cleanest, and the model's estimates at them."""

    def __init__(
        self, model: LatentModel, like: Tensor, uniform: str, num_steps: int, scale: float, clip: float | None, clip_x_0: bool
    ) -> None:
        if not num_steps >= 1:
            raise ValueError(f"num_steps: expected at least 1, found {num_steps}")
        self.model, self.scale, self.clip, self.clip_x_0 = model, scale, clip, clip_x_0
        levels = model.schedule
        if uniform == "t":
            self.t = torch.linspace(1, 0, num_steps, dtype=like.dtype, device=like.device)
            self.logsnr = levels.logsnr(self.t)
        else:
            self.logsnr = torch.linspace(levels.logsnr_min, levels.logsnr_max, num_steps, dtype=like.dtype, device=like.device)
            self.logsnr = levels.nearest(self.logsnr)
            self.t = levels.t(self.logsnr)
        self.alpha, self.sigma = alpha_sigma(self.logsnr)

    def estimate(self, step: int, x_t: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor]:
        """x_0 and eps_hat, which agree on x_t. [B, C, H, W] each."""
        eps_hat = self.model.predict_eps(x_t, self.t[step].expand(len(x_t)), z, self.scale, self.clip)
        x_0 = (x_t - self.sigma[step] * eps_hat) / self.alpha[step]
        if self.clip_x_0:
            x_0 = x_0.clamp(-1, 1)
            eps_hat = self.eps(step, x_t, x_0)
        return x_0, eps_hat

    def eps(self, step: int, x_t: Tensor, x_0: Tensor) -> Tensor:
        return (x_t - self.alpha[step] * x_0) / self.sigma[step]


def _in_batches(
    model: LatentModel,
    run: Callable[[Tensor, Tensor | None, Tensor], Tensor],
    name: str,
    x: Tensor,
    z: Tensor | None,
    index: Tensor,
    batch_size: int,
) -> Tensor:
    if x.dim() != 4 or x.shape[1:] != model.image_shape:
        raise ValueError(f"{name}: expected [B, {', '.join(map(str, model.image_shape))}], found {list(x.shape)}")
    if z is not None and (z.dim() != 2 or len(z) != len(x)):
        raise ValueError(f"z: expected [{len(x)}, Z], found {list(z.shape)}")
    if not batch_size >= 1:
        raise ValueError(f"batch_size: expected at least 1, found {batch_size}")
    parts = [slice(first, first + batch_size) for first in range(0, max(1, len(x)), batch_size)]
    return torch.cat([run(x[part], None if z is None else z[part], index[part]) for part in parts])


def _noise(model: LatentModel, seed: int, step: int, index: Tensor) -> Tensor:
    """[B] -> [B, C, H, W] float32."""
    channels, height, width = model.image_shape
    return ops.random_normal(seed, step, ops.Stream.INIT, index, channels * height * width).view(-1, channels, height, width)


def _index(model: LatentModel, count: int, first: int) -> Tensor:
    return torch.arange(first, first + count, device=model.device)


def starting_noise(model: LatentModel, count: int, seed: int, first: int = 0) -> Tensor:
    """x_T of the pictures first, first + 1, ... of a seed. [count, C, H, W] float32 (float64 for a float64 model) on the model's device."""
    return _noise(model, seed, 0, _index(model, count, first)).to(model.arithmetic)


def prior_latents(model: LatentModel, count: int, seed: int, first: int = 0) -> Tensor:
    """z ~ N(0, I) of the pictures first, first + 1, ... of a seed. [count, Z] on the model's device, dtype as of `starting_noise`."""
    return ops.random_normal(seed, 0, ops.Stream.PRIOR, _index(model, count, first), model.latent_size).to(model.arithmetic)


def clean_images(model: LatentModel, x_0: ImageLike, name: str = "x_0") -> Tensor:
    """Clean images as the model takes them, on the device where they are. [N, C, H, W], at least float32; errors as `as_images`."""
    return as_images(x_0, model.image_shape, name=name, least=model.arithmetic)


@torch.no_grad()
def encode(model: LatentModel, x_0: ImageLike, batch_size: int = 256) -> Posterior:
    """q(z|x_0) of many images, without gradient and in bounded memory.

    Args:
        x_0: [N, C, H, W] in [-1, 1], on any device, N >= 1; or as in `as_images`.
        batch_size: Images at a time.
    Returns:
        mu and var, [N, Z] on the model's device.
    Raises:
        ValueError: the images are not of the model's shape, or not in [-1, 1].
        TypeError: they are no images.
    """
    x_0 = clean_images(model, x_0)
    parts = [model.encode(part.to(model.device)) for part in x_0.split(batch_size)]
    return Posterior(torch.cat([part.mu for part in parts]), torch.cat([part.var for part in parts]))


def posterior_latents(model: LatentModel, x_0: ImageLike, *, seed: int, first: int = 0) -> Tensor:
    """z ~ q(z|x_0), one per image: over many images, latents of the aggregated posterior.

    Args:
        x_0: [N, C, H, W] in [-1, 1].
        seed, first: Image i draws with index first + i.
    Returns:
        [N, Z] on the model's device.
    """
    posterior = encode(model, x_0)
    return posterior.draw(_index(model, len(posterior.mu), first), seed)


def sample(
    model: LatentModel,
    count: int,
    *,
    seed: int,
    first: int = 0,
    z: Tensor | Literal["prior"] | None = "prior",
    **options: Unpack[SamplerOptions],
) -> Tensor:  # [count, C, H, W]
    """New images.

    Args:
        model: Of any method.
        count: How many, >= 1.
        seed: Key of all noise, >= 0.
        first: Index of the first picture: 10 pictures from 0 and 10 from 10 are the 20 from 0.
        z: "prior" draws latents from N(0, I); [count, Z] are latents to guide towards, say of `posterior_latents`; None lets the
            denoiser draw alone.
        options: See `reverse_process`.
    Returns:
        [count, C, H, W] in [-1, 1].
    """
    latents = prior_latents(model, count, seed, first) if isinstance(z, str) else z
    return reverse_process(
        model, starting_noise(model, count, seed, first), latents, seed=seed, index=_index(model, count, first), **options
    )


def _inverted(model: LatentModel, x_0: Tensor, mu: Tensor, options: SamplerOptions) -> Tensor:
    z = None if model.guides else mu  # a denoiser that is told z knows nothing without it
    kept: Any = {name: value for name, value in options.items() if name in ("num_steps", "clip_x_0", "batch_size")}
    return invert(model, x_0, z, **kept)


def _guided(
    model: LatentModel,
    x_0: Tensor,  # [N, C, H, W]; random noise has no use for it
    mu: Tensor,  # [N, Z] of q(z|x_0)
    latents: Tensor,  # [N, V, Z]
    x_T: Start,
    seed: int,
    first: int,
    options: SamplerOptions,
) -> Tensor:  # [N, V, C, H, W]
    """V pictures of each image from one starting noise: that of picture first + i, or the one that x_0 is made of."""
    eta = resolve_eta(options.get("solver", "ddim"), options.get("eta"), default=model.guided_eta, x_T=x_T)
    count, views, _ = latents.shape
    noise = _inverted(model, x_0, mu, options) if x_T == "inverted" else starting_noise(model, count, seed, first)
    noise, index = noise.repeat_interleave(views, 0), _index(model, count, first).repeat_interleave(views)
    images = reverse_process(model, noise, latents.flatten(0, 1), seed=seed, index=index, **options | {"eta": eta})
    return images.unflatten(0, (count, views))


def reconstruct(
    model: LatentModel,
    x_0: ImageLike,  # [N, C, H, W]
    *,
    seed: int,
    first: int = 0,
    x_T: Start = "random",
    **options: Unpack[SamplerOptions],
) -> Tensor:  # [N, C, H, W]
    """Images from noise and from the mean of q(z|x_0): what z does not know of x_0 comes out new, or, inverted, comes back.

    Args:
        x_0: In [-1, 1], or as in `as_images`.
        seed, first: The noise of image i is that of picture first + i.
        x_T: "random", or "inverted" (`invert`, by the denoiser alone), which implies eta 0.
        options: See `reverse_process`.
    Returns:
        In [-1, 1], on the model's device.
    Raises:
        ValueError, TypeError: as `as_images`, `reverse_process` and `resolve_eta`.
    """
    x_0 = clean_images(model, x_0)
    mu = encode(model, x_0).mu
    return _guided(model, x_0, mu, mu[:, None], x_T, seed, first, options)[:, 0]


def _picked(axis: int | Tensor, axes: Axes | None, latent_size: int) -> tuple[Axes, int]:
    """Every way to name an axis as one of `Axes`."""
    if isinstance(axis, Tensor):
        if axis.shape != (latent_size,):
            raise ValueError(f"axis: expected a number or a direction [{latent_size}], found a tensor {list(axis.shape)}")
        return Axes.along(axis.detach().double().cpu().numpy()), 0
    return axes or Axes.of_latents(latent_size), axis


def _as_latent(model: LatentModel, start: Any) -> Tensor | None:
    """What is no image as latents [N, Z]; None for an image."""
    shape = tuple(getattr(start, "shape", ()))
    if len(shape) not in (1, 2) or shape == model.image_shape[1:]:  # that of a grey image without its channel
        return None
    if shape[-1] != model.latent_size:
        raise ValueError(f"start: expected one image or latent [1, {model.latent_size}], found {list(shape)}")
    return torch.as_tensor(start).to(model.device, model.arithmetic).view(-1, shape[-1])


def traverse(
    model: LatentModel,
    start: ImageLike,  # [1, C, H, W] or [1, Z]
    axis: int | Tensor,
    values: Sequence[float] | Tensor,  # [V]
    *,
    seed: int,
    first: int = 0,
    axes: Axes | None = None,
    x_T: Start = "random",
    **options: Unpack[SamplerOptions],
) -> Tensor:  # [V, C, H, W]
    """One coordinate of the latent moved over values; the others and all noise are the same in every picture.

    Args:
        start: An image in [-1, 1], or as in `as_images`, whose mean latent is used; or a latent.
        axis: Latent dimension to move, 0 to Z - 1; with `axes`, which of these; or a direction [Z] d, whose coordinate is <z, d> / |d|^2.
        values: What the coordinate is set to.
        seed, first: The noise is that of picture `first`.
        axes: Directions and how to read them.
        x_T: "random", or "inverted" (`invert`): the noise that `start`, an image, is made of; implies eta 0.
        options: See `reverse_process`.
    Returns:
        One image per value, in [-1, 1].
    Raises:
        ValueError, TypeError: start is not one image or latent, there is no such axis, or as `reverse_process` and `resolve_eta`.
    """
    latent = _as_latent(model, start)
    if latent is not None and x_T == "inverted":
        raise ValueError(f"start: expected an image [1, C, H, W] with x_T inverted, found {list(latent.shape)}")
    start = clean_images(model, start, "start") if latent is None else latent
    if len(start) != 1:
        raise ValueError(f"start: expected one image or latent, found {len(start)}")
    z = encode(model, start).mu if latent is None else latent
    picked, row = _picked(axis, axes, z.shape[1])
    goals = np.asarray(torch.as_tensor(values).cpu(), dtype=np.float64)
    moved = picked.moved(z.cpu().numpy().repeat(len(goals), 0), row, goals)
    return _guided(model, start, z, torch.from_numpy(moved).to(z)[None], x_T, seed, first, options)[0]


def edit(
    model: LatentModel,
    x_0: ImageLike,  # [N, C, H, W]
    axis: int | Tensor,
    amounts: Sequence[float] | Tensor,  # [V]
    *,
    seed: int = 0,
    first: int = 0,
    axes: Axes | None = None,
    x_T: Start = "inverted",
    **options: Unpack[SamplerOptions],
) -> Tensor:  # [N, V, C, H, W]
    """Images with one coordinate of their latent changed by given amounts: z becomes the mean of q(z|x_0) plus amount * direction.

    Args:
        x_0: In [-1, 1], or as in `as_images`.
        axis, axes: As in `traverse`; a direction [Z] is taken as long as it is.
        amounts: What is added; 0 reconstructs the image.
        seed, first: With x_T "random", the noise of image i is that of picture first + i.
        x_T: "inverted" keeps what z does not know of the image, and implies eta 0; "random" draws it anew.
        options: See `reverse_process`.
    Returns:
        One image per image and amount, in [-1, 1], on the model's device.
    Raises:
        ValueError, TypeError: there is no such axis, or as `as_images`, `reverse_process` and `resolve_eta`.
    """
    x_0 = clean_images(model, x_0)
    mu = encode(model, x_0).mu
    picked, row = _picked(axis, axes, mu.shape[1])
    added = np.asarray(torch.as_tensor(amounts).cpu(), dtype=np.float64)
    shifted = picked.shifted(mu.cpu().numpy().repeat(len(added), 0), row, np.tile(added, len(mu)))
    latents = torch.from_numpy(shifted).to(mu).unflatten(0, (len(mu), len(added)))
    return _guided(model, x_0, mu, latents, x_T, seed, first, options)


def slerp(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Along the great circle from a to b, which keeps the length that normal noise has in many dimensions.

        sin((1 - w) angle) / sin(angle) a + sin(w angle) / sin(angle) b,   angle between a and b; a straight line where it is 0 or pi

    Args:
        a, b: Two tensors of one shape.
        weights: [V]; 0 gives a, 1 gives b.
    Returns:
        [V, *shape], dtype of a.
    Source: Song, Meng & Ermon, arXiv:2010.02502, eq. 67.
    """
    u, v, w = a.double().flatten(), b.double().flatten(), weights.to(a.device).double()[:, None]
    angle = torch.arccos(torch.clamp(F.cosine_similarity(u, v, 0), -1, 1))
    if torch.sin(angle) < 1e-6:
        return ((1 - w) * u + w * v).view(-1, *a.shape).to(a)
    return ((torch.sin((1 - w) * angle) * u + torch.sin(w * angle) * v) / torch.sin(angle)).view(-1, *a.shape).to(a)


def interpolate(
    model: LatentModel,
    a: ImageLike,  # [1, C, H, W]
    b: ImageLike,  # [1, C, H, W]
    count: int,
    *,
    seed: int = 0,
    first: int = 0,
    x_T: Start = "inverted",
    **options: Unpack[SamplerOptions],
) -> Tensor:  # [count, C, H, W]
    """Pictures on the way from one image to another: latents on the straight line between the means, noise on the great circle.

    Args:
        a, b: Images in [-1, 1], or as in `as_images`.
        count: Pictures, the reconstructions of a and b included, >= 2.
        seed, first: With x_T "random", all pictures have the noise of picture `first`.
        x_T: "inverted" goes from the noise that a is made of to that of b (`slerp`), and implies eta 0.
        options: See `reverse_process`.
    Returns:
        In [-1, 1], on the model's device.
    Raises:
        ValueError, TypeError: a or b is not one image, count is below 2, or as `reverse_process` and `resolve_eta`.
    """
    given = {name: clean_images(model, value, name) for name, value in (("a", a), ("b", b))}
    for name, value in given.items():
        if len(value) != 1:
            raise ValueError(f"{name}: expected one image [1, {', '.join(map(str, model.image_shape))}], found {list(value.shape)}")
    if count < 2:
        raise ValueError(f"count: expected at least 2, found {count}")
    ends = torch.cat([value.to(model.device) for value in given.values()])
    mu, weights = encode(model, ends).mu, torch.linspace(0, 1, count, dtype=torch.float64, device=model.device)
    latents = torch.lerp(mu[:1].double(), mu[1:].double(), weights[:, None]).to(mu)
    if x_T == "random":
        return _guided(model, ends[:1], mu[:1], latents[None], x_T, seed, first, options)[0]
    eta = resolve_eta(options.get("solver", "ddim"), options.get("eta"), default=model.guided_eta, x_T=x_T)
    from_a, from_b = _inverted(model, ends, mu, options)
    noise = slerp(from_a, from_b, weights)
    return reverse_process(model, noise, latents, **options | {"eta": eta})


def axis_values(z: Tensor, axis: int, count: int, coverage: float = COVERAGE) -> Tensor:
    """Equally spaced values over the range that a latent takes on the data.

    Args:
        z: Latents of the data, or coordinates along axes: sampled from q(z|x_0), as those are that training shows the denoiser. The means
            alone of a latent that tells little lie close together, and going from one end of them to the other shows nothing. [N, Z].
        axis: Dimension.
        count: Values.
        coverage: Share of the images within the range.
    Returns:
        [count] increasing.
    """
    tail = (1 - coverage) / 2
    low, high = torch.quantile(z[:, axis], torch.tensor([tail, 1 - tail], dtype=z.dtype, device=z.device)).tolist()
    return torch.linspace(low, high, count, dtype=z.dtype, device=z.device)
