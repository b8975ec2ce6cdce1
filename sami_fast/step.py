"""One training step of SAMI, in the order and the symbols of the paper (arXiv:2512.17127).

Every term is in nats per image. With weighting "elbo" and kl_weight 1, `loss` is the negative ELBO up to its two endpoint terms.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops, score
from .schedule import Schedule, alpha_sigma


@dataclass(frozen=True)
class Draw:
    """Which random numbers a step uses: they depend on nothing else."""

    seed: int
    step: int
    index: Tensor  # [B] int64, place of each image in the step's whole batch over ranks and micro-batches
    global_batch: int  # images in that whole batch
    latent_step: int | None = None  # of the latents' noise, where a step shows the noisy images of another again


@dataclass(frozen=True)
class Objective:
    """Constants of the loss.

    Attributes:
        weighting: "elbo", "simple", "min_snr" or "sigmoid" (`Schedule.weight`).
        noise_levels: K, noisy copies of each image per step.
        time_power: a of the density a t^(a-1) that noise levels are drawn from.
        unconditional_weight: u, weight of the denoiser's own error without guidance.
        free_bits: Nats per latent dimension below which the batch mean of the KL costs nothing.
    """

    weighting: str = "elbo"
    noise_levels: int = 1
    time_power: float = 1.0
    unconditional_weight: float = 0.0
    free_bits: float = 0.0


@dataclass(frozen=True)
class StepTerms:
    """What a step measured, without gradient; nats."""

    diffusion: Tensor  # [B] guided denoising term
    unguided: Tensor  # [B] the same integral without guidance
    kl: Tensor  # [B, Z] raw KL per latent dimension, no free-bits floor
    mu: Tensor  # [B, Z] of q(z|x_0)
    var: Tensor  # [B, Z]


def noised(
    schedule: Schedule, x_0: Tensor, draw: Draw, objective: Objective, store_eps: bool, first: float = 0.0
) -> tuple[Tensor, Tensor | ops.Noise, Tensor, Tensor, Tensor]:
    """x_t and eps [B*K, C, H, W]; t from `first` on, sigma_t and weight [B*K], the weight divided by K so that a sum over levels is their
    mean."""
    of_step = {"seed": draw.seed, "step": draw.step, "power": objective.time_power, "first": first}
    t = schedule.sample(draw.index, objective.noise_levels, draw.global_batch, **of_step).to(x_0.dtype)  # [B, K]
    alpha_t, sigma_t = alpha_sigma(schedule.logsnr(t))
    x_t, eps = ops.noise_sample(x_0, alpha_t, sigma_t, draw.index, seed=draw.seed, step=draw.step, store_eps=store_eps)
    weight = schedule.weight(t, objective.weighting, objective.time_power, first) / objective.noise_levels
    return x_t, eps, t.flatten(), sigma_t.flatten(), weight.flatten()


def per_image(per_sample: Tensor, levels: int) -> Tensor:
    """The sum over the noise levels of each image. [B*K] -> [B]."""
    return per_sample.view(-1, levels).sum(1)


def guided_terms(
    encoder: score.Encoder,
    denoiser: Callable[[Tensor, Tensor], Tensor],
    x_t: Tensor,  # [S, C, H, W]
    z: Tensor,  # [S, Z]
    eps: Tensor | ops.Noise,  # [S, C, H, W]
    t: Tensor,  # [S]
    sigma_t: Tensor,  # [S]
    weight: Tensor,  # [S]
    unconditional_weight: float,
    score_method: str,
) -> tuple[Tensor, Tensor]:
    """The denoising terms of noisy images whose latents are drawn: where a step does its work, and one graph under torch.compile.

    Args:
        encoder, denoiser, score_method: As in `training_step`.
        x_t, eps, t, sigma_t, weight: As `noised` returns them.
        z: Latents, one per noisy image.
        unconditional_weight: u.
    Returns:
        weighted: the guided term and u times the unguided one, in nats, with its gradient. [S].
        unguided: ||eps - eps_theta||^2 without its weight, and without gradient. [S].
    """
    # eps_hat = eps_theta(x_t, t) - sigma_t grad_{x_t} log q(z | x_t)
    eps_pred = denoiser(x_t, t).to(x_t.dtype)
    encoder = score.at_level(encoder, t)
    grad_log_q = score.grad_log_q(encoder, x_t, z, score_method)

    # w ||eps - eps_hat||^2 + u w ||eps - eps_theta||^2
    weighted, unguided, cotangent = ops.guided_loss(
        eps, eps_pred, grad_log_q, sigma_t, weight, unconditional_weight * weight, return_cotangent=True
    )
    if score_method == "dual":
        # The score was a constant in the loss: its gradient comes through <dL/dg, g>, whose own value is taken off again.
        directional = score.directional(encoder, x_t, z, cotangent)
        weighted = weighted + (directional - directional.detach())
    return weighted, unguided


def training_step(
    encoder: score.Encoder,
    denoiser: Callable[[Tensor, Tensor], Tensor],
    schedule: Schedule,
    x_0: Tensor,  # [B, C, H, W] in [-1, 1]
    draw: Draw,
    objective: Objective,
    kl_weight: float | Tensor,
    *,
    score_method: str = "auto",
    store_eps: bool = True,
    global_mean: Callable[[Tensor], Tensor] = lambda local_mean: local_mean,
    clean_encoder: score.Encoder | None = None,
    terms_of: Callable[..., tuple[Tensor, Tensor]] = guided_terms,
    guided_from: float = 0.0,
    shown_from: float = 0.0,
) -> tuple[Tensor, StepTerms]:
    """The loss of one batch: both networks learn from it.

    Args:
        encoder: x -> (mu, var), [B, Z] each; blind to the noise level, or an `adapters.EncoderAdapter` that is told it.
        denoiser: (x_t, t) -> eps_pred, t [S] in [0, 1].
        schedule: Noise levels.
        x_0: Clean images.
        draw: Which random numbers to use.
        objective: Constants of the loss.
        kl_weight: beta at this step; 1 is the bound.
        score_method: How the encoder's score is differentiated (`score.SCORE_METHODS`); all give the same gradients.
        store_eps: Keep the noise from noising to loss; otherwise it is drawn twice, for 4 bytes per noisy pixel less memory.
        global_mean: Averages a [Z] tensor over ranks; free bits are granted to the mean of one micro-batch of all ranks.
        clean_encoder, terms_of: `encoder` for the clean images and `guided_terms`, either of them compiled.
        guided_from: t below which latents do not guide.
        shown_from: t below which no noisy image is shown: the terms are integrals from there on.
    Returns:
        loss: scalar, nats per image, mean over the batch.
        terms: The measured parts.
    Differentiable: once, in the parameters of both networks (the encoder's own score is differentiated on the way).
    """
    levels = objective.noise_levels
    score_method = score.pick(encoder, score_method)

    # z ~ q(z | x_0), one per image, shared by its K noise levels
    mu_0, var_0 = (encoder if clean_encoder is None else clean_encoder)(x_0)
    latent_step = draw.step if draw.latent_step is None else draw.latent_step
    eps_z = ops.random_normal(draw.seed, latent_step, ops.Stream.EPS_Z, draw.index, mu_0.shape[1]).to(mu_0.dtype)
    z = ops.gaussian_reparameterize(mu_0, var_0, eps_z).repeat_interleave(levels, 0)

    # x_t = alpha_t x_0 + sigma_t eps
    x_t, eps, t, sigma_t, weight = noised(schedule, x_0, draw, objective, store_eps, shown_from)
    if guided_from > shown_from:
        sigma_t = sigma_t * (t >= guided_from)  # which the score is multiplied by, and nothing else

    # w ||eps - eps_hat||^2 + u w ||eps - eps_theta||^2, then the K levels of each image together
    weighted, unguided = terms_of(encoder, denoiser, x_t, z, eps, t, sigma_t, weight, objective.unconditional_weight, score_method)
    diffusion, unguided = per_image(weighted, levels), per_image(weight * unguided, levels)

    # KL( q(z | x_0) || N(0, I) ), each dimension's batch mean free up to the free bits
    kl = ops.gaussian_kl(mu_0, var_0)
    kl_cost = kl.mean(0)
    if objective.free_bits > 0:
        charged = global_mean(kl_cost.detach()) > objective.free_bits
        kl_cost = torch.where(charged, kl_cost, kl_cost.detach())

    loss = diffusion.mean() + kl_weight * kl_cost.sum()
    guided = diffusion.detach() - objective.unconditional_weight * unguided
    return loss, StepTerms(guided, unguided, kl.detach(), mu_0.detach(), var_0.detach())


def denoising_step(
    denoiser: Callable[[Tensor, Tensor], Tensor],
    schedule: Schedule,
    x_0: Tensor,  # [B, C, H, W] in [-1, 1]
    draw: Draw,
    objective: Objective,
    *,
    store_eps: bool = True,
) -> tuple[Tensor, Tensor]:
    """The loss of one batch for the denoiser alone, without guidance: its warm-up.

    Returns:
        loss: scalar, nats per image.
        unguided: [B] the same per image, without gradient.
    """
    unguided = unguided_error(denoiser, schedule, x_0, draw, objective, store_eps)
    return unguided.mean(), unguided.detach()


def unguided_error(
    denoiser: Callable[[Tensor, Tensor], Tensor], schedule: Schedule, x_0: Tensor, draw: Draw, objective: Objective, store_eps: bool
) -> Tensor:
    """The denoising term of each image by the denoiser alone, in nats, with its gradient; arguments as in `denoising_step`. [B]."""
    x_t, eps, t, sigma_t, weight = noised(schedule, x_0, draw, objective, store_eps)
    eps_pred = denoiser(x_t, t).to(x_t.dtype)
    per_sample, _ = ops.guided_loss(eps, eps_pred, torch.zeros_like(x_t), sigma_t, weight, torch.zeros_like(weight))
    return per_image(per_sample, objective.noise_levels)
