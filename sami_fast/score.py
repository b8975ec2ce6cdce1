"""grad_x log q(z|x_t), the encoder's own score, kept differentiable: the one place where an inner gradient is taken."""

from collections.abc import Callable

import torch
from torch import Tensor

from . import ops

Encoder = Callable[[Tensor], tuple[Tensor, Tensor]]


def reverse(
    encoder: Encoder,
    x_t: Tensor,  # [S, C, H, W]
    z: Tensor,  # [S, Z]
) -> Tensor:  # [S, C, H, W]
    """grad_log_q by reverse-mode autograd through any encoder.

    Args:
        encoder: x -> (mu, var), both [S, Z]; every operation in it must be differentiable twice.
        x_t: Noisy images. [S, C, H, W]; treated as constant.
        z: Latent whose density is differentiated, one per noisy image. [S, Z].
    Returns:
        grad_log_q: [S, C, H, W], nats per unit of x.
    Differentiable: once more, in z and in the encoder's parameters, unless called under torch.no_grad (sampling).
    Source: SAMI, arXiv:2512.17127, guidance by Bayes' rule.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        x_t = x_t.detach().requires_grad_()
        mu, var = encoder(x_t)
        log_q = ops.gaussian_log_prob(z, mu, var)
        (grad_log_q,) = torch.autograd.grad(log_q.sum(), x_t, create_graph=create_graph)
    return grad_log_q
