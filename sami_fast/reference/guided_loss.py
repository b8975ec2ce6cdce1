"""Score-weighted loss: the guided denoising error of every noisy sample, in nats."""

import torch
from torch import Tensor

from .random import random_normal


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

    Arguments, results and errors as `sami_fast.ops.guided_loss` describes them; eps is a tensor here. Differentiable: twice and further, in
    eps_pred, grad_log_q, eps, sigma_t and both weights.
    """
    check_guided_loss(eps, eps_pred, grad_log_q, sigma_t, weight, unconditional_weight)
    loss, unguided, _, _ = _residuals(eps, eps_pred, grad_log_q, sigma_t, weight, unconditional_weight)
    return loss, unguided.detach()


def check_guided_loss(
    eps: Tensor | None, eps_pred: Tensor, grad_log_q: Tensor, sigma_t: Tensor, weight: Tensor, unconditional_weight: Tensor
) -> None:
    """Raise the ValueError of `guided_loss` where shapes differ; without eps, those of eps_pred are what is expected."""
    shape = eps_pred.shape if eps is None else eps.shape
    if len(shape) != 4:
        raise ValueError(f"{'eps_pred' if eps is None else 'eps'}: expected [S, C, H, W], found {list(shape)}")
    for name, value in (("eps_pred", eps_pred), ("grad_log_q", grad_log_q)):
        if value.shape != shape:
            raise ValueError(f"{name}: expected {list(shape)}, found {list(value.shape)}")
    for name, value in (("sigma_t", sigma_t), ("weight", weight), ("unconditional_weight", unconditional_weight)):
        if value.shape != shape[:1]:
            raise ValueError(f"{name}: expected [{shape[0]}], found {list(value.shape)}")


def _residuals(
    eps: Tensor, eps_pred: Tensor, grad_log_q: Tensor, sigma_t: Tensor, weight: Tensor, unconditional_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, unguided [S], and the guided and the unguided residual of every element."""
    wide = torch.promote_types(eps_pred.dtype, torch.float32)
    eps, eps_pred, grad_log_q, sigma_t, weight, unconditional_weight = (
        value.to(wide) for value in (eps, eps_pred, grad_log_q, sigma_t, weight, unconditional_weight)
    )
    d = eps - eps_pred
    r = d + sigma_t.view(-1, 1, 1, 1) * grad_log_q
    unguided = d.square().flatten(1).sum(1)
    return weight * r.square().flatten(1).sum(1) + unconditional_weight * unguided, unguided, r, d


def guided_loss_fwd(
    eps: Tensor | None,  # [S, C, H, W]
    eps_pred: Tensor,  # [S, C, H, W]
    grad_log_q: Tensor,  # [S, C, H, W]
    sigma_t: Tensor,  # [S]
    weight: Tensor,  # [S]
    unconditional_weight: Tensor,  # [S]
    index: Tensor | None,  # [B]
    levels: int,
    seed: int,
    step: int,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [S], [S], [S, C, H, W] twice
    """loss, unguided, and for an upstream gradient of 1 per sample d loss / d eps_pred and d loss / d grad_log_q.

        r = eps - eps_pred + sigma_t grad_log_q        d = eps - eps_pred
        d loss / d eps_pred   = -2 (weight r + unconditional_weight d)
        d loss / d grad_log_q =  2 weight sigma_t r

    Without eps, the noise is drawn again as `noise_sample` drew it for the images at `index` and this many levels, rounded to the dtype of
    eps_pred. The cotangents have the dtypes of their tensors, the sums float32 (float64 for float64).
    """
    if eps is None:
        assert index is not None
        sample = (index[:, None] * levels + torch.arange(levels, device=index.device)).flatten()
        eps = random_normal(seed, step, stream, sample, eps_pred.shape[1:].numel()).to(eps_pred.dtype).view(eps_pred.shape)
    loss, unguided, r, d = _residuals(eps, eps_pred, grad_log_q, sigma_t, weight, unconditional_weight)
    sigma, w, u = (value.to(r.dtype).view(-1, 1, 1, 1) for value in (sigma_t, weight, unconditional_weight))
    grad_eps_pred, grad_grad_log_q = -2 * (w * r + u * d), 2 * w * sigma * r
    return loss, unguided, grad_eps_pred.to(eps_pred.dtype), grad_grad_log_q.to(grad_log_q.dtype)
