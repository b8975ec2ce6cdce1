"""Score-weighted loss: the guided denoising error of every noisy sample, with both cotangents from the same pass over memory.

`sami_fast::guided_loss` returns the cotangents beside the loss. Its formula scales them, which is plain torch and can be differentiated
again: the loss is quadratic, so what arrives for the cotangents themselves is a sum of products.
"""

import torch
from torch import Tensor

from .. import reference
from ..reference.guided_loss import check_guided_loss, guided_loss_fwd
from .arguments import check_device, check_together
from .define import define
from .launchers import Launcher, Launchers
from .noise_sample import Noise
from .random import check_draw, check_index


class GuidedLossLaunchers(Launchers):
    op = "guided_loss"
    fwd = Launcher(guided_loss_fwd)


def guided_loss(
    eps: Tensor | Noise,  # [S, C, H, W]
    eps_pred: Tensor,  # [S, C, H, W]
    grad_log_q: Tensor,  # [S, C, H, W]
    sigma_t: Tensor,  # [S]
    weight: Tensor,  # [S]
    unconditional_weight: Tensor,  # [S]
    *,
    return_cotangent: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:  # [S], [S] (, [S, C, H, W])
    """Weighted squared error of the guided noise estimate, and the unguided error beside it.

        eps_hat = eps_pred - sigma_t grad_log_q
        loss    = weight sum (eps - eps_hat)^2 + unconditional_weight sum (eps - eps_pred)^2

    Args:
        eps: Noise that was added, [S, C, H, W]; or the `Noise` that `noise_sample` gave, to draw it again here.
        eps_pred: The denoiser's estimate of it. [S, C, H, W], any floating dtype; sums run in float32 (float64 for float64). In
            float16 the cotangents are kept in float16, so `weight` times a residual has to stay below 65504.
        grad_log_q: Gradient of log q(z|x_t) in x_t, in nats per unit of x, same shape and dtype.
        sigma_t: Noise amplitude per sample. [S].
        weight: Weight of the guided error per sample. [S].
        unconditional_weight: Weight of the unguided error per sample. [S].
        return_cotangent: Also return d loss / d grad_log_q.
        backend: See `sami_fast.use_backend`.
    Returns:
        loss: [S], weighted.
        unguided: [S], sum of (eps - eps_pred)^2, unweighted and without gradient: a measurement.
        cotangent: [S, C, H, W] when asked for, without gradient.
    Raises:
        ValueError: shapes do not fit or devices differ.
        TypeError: dtypes differ or are not floating.
        BackendError: the backend cannot run this call.
    Differentiable: twice and further, in eps_pred, grad_log_q, eps, sigma_t and both weights.
    Runs on: C++, Triton, CUDA, reference.
    Source: SAMI, arXiv:2512.17127, training objective.
    """
    noise, given = (eps, None) if isinstance(eps, Noise) else (None, eps)
    check_guided_loss(given, eps_pred, grad_log_q, sigma_t, weight, unconditional_weight)
    if noise and noise.index.shape[0] * noise.levels != eps_pred.shape[0]:
        raise ValueError(f"eps: expected noise for {eps_pred.shape[0]} samples, found {noise.index.shape[0]} x {noise.levels}")
    if noise:
        check_index(noise.index)
        check_draw(noise.seed, noise.step, noise.stream)
    check_together("guided_loss", eps_pred=eps_pred, grad_log_q=grad_log_q, eps=given)
    check_together("guided_loss", sigma_t=sigma_t, weight=weight, unconditional_weight=unconditional_weight)
    check_device("guided_loss", eps_pred=eps_pred, sigma_t=sigma_t, **({"eps": noise.index} if noise else {}))
    backend = GuidedLossLaunchers.choose(backend, eps_pred)
    if backend == "reference":
        eps = eps.draw(eps_pred, backend) if isinstance(eps, Noise) else eps
        loss, unguided = reference.guided_loss(eps, eps_pred, grad_log_q, sigma_t, weight, unconditional_weight)
        if not return_cotangent:
            return loss, unguided
        sigma, factor = sigma_t.view(-1, 1, 1, 1), (2 * weight * sigma_t).view(-1, 1, 1, 1)
        return loss, unguided, (factor * (eps - eps_pred + sigma * grad_log_q)).detach()
    key = (noise.index, noise.levels, noise.seed, noise.step, noise.stream) if noise else (None, 1, 0, 0, 0)
    loss, unguided, _, cotangent = _guided_loss(given, eps_pred, grad_log_q, sigma_t, weight, unconditional_weight, *key, backend)
    return (loss, unguided, cotangent.detach()) if return_cotangent else (loss, unguided)


def _save(ctx, inputs, output):
    *tensors, index, levels, seed, step, stream, ctx.backend = inputs
    _, unguided, grad_eps_pred, grad_grad_log_q = output
    ctx.noise = None if index is None else (levels, seed, step, stream)
    ctx.mark_non_differentiable(unguided)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, index, grad_eps_pred, grad_grad_log_q)


def _formula(ctx, grad, _, a, b):
    """grad [S] arrives for the loss; a and b, [S, C, H, W], for the two cotangents when this is differentiated again."""
    eps, eps_pred, grad_log_q, sigma_t, weight, unconditional_weight, index, v_eps_pred, v_grad_log_q = ctx.saved_tensors
    if grad is None and a is None and b is None:
        return (None,) * 12
    grad = torch.zeros_like(sigma_t) if grad is None else grad

    c, s, w, u = (value.view(-1, 1, 1, 1) for value in (grad, sigma_t, weight, unconditional_weight))
    to_eps_pred, to_grad_log_q = c * v_eps_pred, c * v_grad_log_q
    if a is not None:
        to_eps_pred, to_grad_log_q = to_eps_pred + 2 * (w + u) * a, to_grad_log_q - 2 * w * s * a
    if b is not None:
        to_eps_pred, to_grad_log_q = to_eps_pred - 2 * w * s * b, to_grad_log_q + 2 * w * s * s * b
    to_eps_pred, to_grad_log_q = to_eps_pred.to(eps_pred.dtype), to_grad_log_q.to(grad_log_q.dtype)
    to_eps = -to_eps_pred if ctx.needs_input_grad[0] else None
    to_scalars = (None, None, None)
    if any(ctx.needs_input_grad[3:6]):
        if ctx.noise is not None:
            eps = Noise(index, *ctx.noise).draw(eps_pred, ctx.backend)
        d = eps - eps_pred
        r = d + s * grad_log_q
        a, b = (torch.zeros_like(d) if x is None else x for x in (a, b))
        densities = (
            2 * w * (c * r * grad_log_q - a * grad_log_q + b * (r + s * grad_log_q)),
            c * r * r - 2 * a * r + 2 * b * s * r,
            c * d * d - 2 * a * d,
        )
        to_scalars = (density.flatten(1).sum(1).to(sigma_t.dtype) for density in densities)
    return to_eps, to_eps_pred, to_grad_log_q, *to_scalars, *(None,) * 6


_guided_loss = define("guided_loss", GuidedLossLaunchers.fwd, _save, _formula)
