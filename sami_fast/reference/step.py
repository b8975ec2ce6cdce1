"""The mathematics of a step with every random number given: what the engine's step must equal, in any dtype."""

from collections.abc import Callable

import torch
from torch import Tensor

from .gaussian_log_prob import gaussian_kl, gaussian_log_prob, gaussian_reparameterize
from .guided_loss import guided_loss


def step(
    encoder: Callable[[Tensor], tuple[Tensor, Tensor]],
    denoiser: Callable[[Tensor, Tensor], Tensor],
    x_0: Tensor,  # [B, C, H, W]
    t: Tensor,  # [B, K]
    logsnr: Tensor,  # [B, K]
    weight: Tensor,  # [B, K]
    eps: Tensor,  # [B, K, C, H, W]
    eps_z: Tensor,  # [B, Z]
    kl_weight: float,
    unconditional_weight: float = 0.0,
    free_bits: float = 0.0,
) -> Tensor:  # scalar
    """Loss of SAMI in nats per image, differentiable in every parameter through autograd alone.

        x_t     = alpha_t x_0 + sigma_t eps
        eps_hat = eps_theta(x_t, t) - sigma_t grad_{x_t} log q(z | x_t),   z = mu(x_0) + std(x_0) eps_z
        L       = mean_B [ mean_K w ( ||eps - eps_hat||^2 + u ||eps - eps_theta||^2 ) ] + beta sum_Z KL_Z

    with KL_Z the batch mean of KL( q(z | x_0) || N(0, I) ) in each dimension, without gradient where it is at most the free bits.

    Args:
        encoder: x -> (mu, var).
        denoiser: (x_t, t) -> eps_pred.
        x_0: Clean images in [-1, 1].
        t, logsnr: Noise levels, the denoiser's argument and the natural log of alpha_t^2 / sigma_t^2.
        weight: w of each level.
        eps, eps_z: Standard normal noise of the images and of the latent.
        kl_weight: beta.
        unconditional_weight: u.
        free_bits: Nats per latent dimension that cost nothing.
    Source: SAMI, arXiv:2512.17127.
    """
    levels = t.shape[1]
    mu_0, var_0 = encoder(x_0)
    z = gaussian_reparameterize(mu_0, var_0, eps_z).repeat_interleave(levels, 0)

    alpha_t = torch.sigmoid(logsnr).sqrt()[:, :, None, None, None]
    sigma_t = torch.sigmoid(-logsnr).sqrt()
    x_t = (alpha_t * x_0[:, None] + sigma_t[:, :, None, None, None] * eps).flatten(0, 1)

    eps_pred = denoiser(x_t, t.flatten())
    x_leaf = x_t.detach().requires_grad_()
    log_q = gaussian_log_prob(z, *encoder(x_leaf))
    (grad_log_q,) = torch.autograd.grad(log_q.sum(), x_leaf, create_graph=True)

    w = weight.flatten() / levels
    per_sample, _ = guided_loss(eps.flatten(0, 1), eps_pred, grad_log_q, sigma_t.flatten(), w, unconditional_weight * w)
    kl = gaussian_kl(mu_0, var_0).mean(0)  # [Z]
    kl = torch.where(kl > free_bits, kl, kl.detach())
    return per_sample.view(-1, levels).sum(1).mean() + kl_weight * kl.sum()
