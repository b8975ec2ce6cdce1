"""Score-weighted loss: the guided denoising error of every noisy sample, in nats."""

from torch import Tensor


def guided_loss(
    eps: Tensor,  # [S, C, H, W]
    eps_pred: Tensor,  # [S, C, H, W]
    grad_log_q: Tensor,  # [S, C, H, W]
    sigma_t: Tensor,  # [S]
    weight: Tensor,  # [S]
    unconditional_weight: Tensor,  # [S]
) -> tuple[Tensor, Tensor]:  # [S], [S]
    """Weighted squared error of the guided noise estimate, and the unguided error beside it.

        eps_hat = eps_pred - sigma_t grad_log_q
        loss    = weight sum (eps - eps_hat)^2 + unconditional_weight sum (eps - eps_pred)^2

    Args:
        eps: Noise that was added. [S, C, H, W], float32 or float64.
        eps_pred: The denoiser's estimate of it, same shape and dtype.
        grad_log_q: Gradient of log q(z|x_t) in x_t, in nats per unit of x, same shape and dtype.
        sigma_t: Noise amplitude per sample. [S].
        weight: Weight of the guided error per sample. [S].
        unconditional_weight: Weight of the unguided error per sample. [S].
    Returns:
        loss: [S], weighted.
        unguided: [S], sum of (eps - eps_pred)^2, unweighted and without gradient: a measurement.
    Raises:
        ValueError: shapes differ.
    Differentiable: twice, in eps_pred, grad_log_q, eps, sigma_t and both weights.
    Source: SAMI, arXiv:2512.17127, training objective.
    """
    for name, value in (("eps_pred", eps_pred), ("grad_log_q", grad_log_q)):
        if value.shape != eps.shape:
            raise ValueError(f"{name}: expected {list(eps.shape)}, found {list(value.shape)}")
    for name, value in (("sigma_t", sigma_t), ("weight", weight), ("unconditional_weight", unconditional_weight)):
        if value.shape != eps.shape[:1]:
            raise ValueError(f"{name}: expected [{eps.shape[0]}], found {list(value.shape)}")
    unguided_residual = eps - eps_pred
    guided_residual = unguided_residual + sigma_t.view(-1, 1, 1, 1) * grad_log_q
    guided = guided_residual.square().flatten(1).sum(1)
    unguided = unguided_residual.square().flatten(1).sum(1)
    return weight * guided + unconditional_weight * unguided, unguided.detach()
