"""grad_x log q(z|x_t), the encoder's own score, and its gradients: the one place where an inner gradient is taken.

    reverse   autograd, twice; any encoder                                                            6F
    sweeps    four passes written out, no double backward; encoders made of the layers of sweeps.py  6F, what auto takes
    dual      the score as a constant, and its gradient through dual numbers: autograd once, so it    8F
              compiles as one graph and works where parameters are partitioned

F is the cost of the encoder's convolutions. All three give the same gradients; what they take within a step stands in docs/performance.md.
With v = dL/dg what arrives for the score g,

    dL/dphi = d/dphi <v, g>,    <v, g> = D_v log q = sum_Z [ lambda_mu mu' + lambda_var var' ],

where (mu', var') is the tangent of the encoder along v, lambda_mu = d / var, lambda_var = 1/2 (d^2 / var - 1) / var, d = z - mu.
"""

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from . import ops
from .errors import UserError
from .ops.backend import never_compiled
from .sweeps import Layer, Tape, sweepable

Encoder = Callable[..., Any]
SCORE_METHODS = ("auto", "reverse", "sweeps", "dual")


def pick(encoder: Encoder, method: str = "auto") -> str:
    """The method that `auto` stands for with this encoder, or the one that was asked for.

    Raises:
        ValueError: unknown method.
        TypeError: this encoder cannot be swept, or takes no tangent.
    """
    if method not in SCORE_METHODS:
        raise ValueError(f"score: expected one of {', '.join(SCORE_METHODS)}, found {method!r}")
    if method == "auto":
        if isinstance(encoder, Layer) and torch.compiler.is_compiling():
            return "dual"
        return "sweeps" if isinstance(encoder, Layer) and not _inside_a_transform() and sweepable(encoder) else "reverse"
    if method == "dual" and not isinstance(encoder, Layer):
        raise TypeError(f"score: dual needs an encoder made of sami_fast.models layers, {type(encoder).__name__} is not; use reverse")
    if method == "sweeps" and not (isinstance(encoder, Layer) and sweepable(encoder)):
        raise TypeError(
            "score: sweeps needs an encoder made of sami_fast.models layers, each used once, without hooks and parametrizations, "
            f"{type(encoder).__name__} is not; use reverse"
        )
    return method


def at_level(encoder: Encoder, t: Tensor) -> Encoder:
    """The encoder of images at the noise levels of t, [S]: itself, unless it is told the level (`adapters.EncoderAdapter`)."""
    return partial(encoder, t=t) if getattr(encoder, "told_level", False) else encoder


def _inside_a_transform() -> bool:
    """Whether torch.func.grad, vmap or the like is at work around this call."""
    return torch._C._are_functorch_transforms_active()


def grad_log_q(
    encoder: Encoder,
    x_t: Tensor,  # [S, C, H, W]
    z: Tensor,  # [S, Z]
    method: str = "auto",
) -> Tensor:  # [S, C, H, W]
    """Gradient of log q(z|x_t) in x_t.

    Args:
        encoder: x -> (mu, var), both [S, Z].
        x_t: Noisy images. [S, C, H, W]; treated as constant.
        z: Latent whose density is differentiated, one per noisy image. [S, Z].
        method: "reverse", "sweeps", "dual", or "auto".
    Returns:
        [S, C, H, W], nats per unit of x.
    Raises:
        As `pick`; RuntimeError: "auto" in a compiled graph that may ask for a gradient.
        NoSecondDerivativeError: in the backward pass, if torch has no second derivative for the encoder's attention.
    Differentiable: once more, in z and in the encoder's parameters, unless called under torch.no_grad (sampling); with "dual" not, there
    `directional` carries the gradient.
    Source: SAMI, arXiv:2512.17127, guidance by Bayes' rule.
    """
    picked = pick(encoder, method)
    if picked == "dual" and method == "auto" and torch.is_grad_enabled():
        raise RuntimeError("score: compiled, the score is a constant; ask for 'dual' and add score.directional, as the training step does")
    ways: dict[str, Callable[..., Tensor]] = {"reverse": reverse, "sweeps": sweeps, "dual": constant}
    return ways[picked](encoder, x_t, z)


def reverse(encoder: Encoder, x_t: Tensor, z: Tensor) -> Tensor:
    """grad_log_q by reverse-mode autograd through any encoder; every operation in it must be differentiable twice."""
    if torch.compiler.is_compiling() or _inside_a_transform():  # where torch.autograd.grad cannot be used
        return torch.func.grad(lambda x: ops.gaussian_log_prob(z, *encoder(x)).sum())(x_t.detach())
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        x_t = x_t.detach().requires_grad_()
        mu, var = encoder(x_t)
        log_q = ops.gaussian_log_prob(z, mu, var)
        (gradient,) = torch.autograd.grad(log_q.sum(), x_t, create_graph=create_graph)
    if create_graph:
        _name_the_cure(getattr(encoder, "func", encoder), gradient)  # of an encoder bound to a level, itself
    return gradient


_differentiable_twice: WeakSet[nn.Module] = WeakSet()


def _name_the_cure(encoder: Encoder, gradient: Tensor) -> None:
    """Where torch has no derivative of the gradient, whoever asks for it is told what to do. Looked at once for each module."""
    if isinstance(encoder, nn.Module) and encoder in _differentiable_twice:
        return
    waiting, seen = [gradient.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name().endswith("NotImplemented"):
            gradient.register_hook(partial(_refuse, type(encoder).__name__))
            return
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
    if isinstance(encoder, nn.Module):
        _differentiable_twice.add(encoder)


class NoSecondDerivativeError(UserError):
    """An encoder holds an operation that torch can differentiate only once."""


def _refuse(name: str, _: Tensor) -> None:
    raise NoSecondDerivativeError(
        f"{name}: the encoder is differentiated twice, and torch's fused attention in it has no second derivative; "
        "sami_fast.accelerate(encoder) puts one in its place that has"
    )


def constant(encoder: Encoder, x_t: Tensor, z: Tensor) -> Tensor:
    """grad_log_q without a graph behind it."""
    with torch.no_grad():
        return reverse(encoder, x_t, z.detach()).detach()


def directional(
    encoder: Encoder,
    x_t: Tensor,  # [S, C, H, W]
    z: Tensor,  # [S, Z]
    v: Tensor,  # [S, C, H, W]
) -> Tensor:  # [S]
    """<v, grad_log_q> as the derivative of log q along v, by dual numbers: its gradient is that of the score under the cotangent v.

    Args:
        encoder: Also (x, tx) -> ((mu, var), (tmu, tvar)), as `models.Encoder` does.
        v: Direction. [S, C, H, W]; treated as constant.
    Differentiable: once, in z and in the encoder's parameters.
    """
    (mu, var), (tmu, tvar) = encoder(x_t.detach(), v.detach())
    d = z - mu
    return (d / var * tmu + 0.5 * (d.square() / var - 1) / var * tvar).sum(-1)


@never_compiled
def sweeps(encoder: Layer, x_t: Tensor, z: Tensor) -> Tensor:
    """grad_log_q by two sweeps over the layers; when its gradient is asked for, two more."""
    return _Sweeps.apply(encoder, x_t.detach(), z, *encoder.parameters())


class _Sweeps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, encoder: Layer, x_t: Tensor, z: Tensor, *parameters: Tensor) -> Tensor:
        device = x_t.device.type
        tape = Tape(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None)
        with torch.autocast(device, enabled=False):
            mu, var = encoder.sweep_forward(x_t, tape)
            launchers = ops.gaussian_launchers(z, mu, var)
            ones = torch.ones_like(z[:, 0])
            _, grad_mu, grad_var = launchers.bwd(ones, z, mu, var)
            gradient = encoder.sweep_adjoint((grad_mu, grad_var), tape)
        ctx.encoder, ctx.tape, ctx.head = encoder, tape, (launchers, ones, mu, var)
        ctx.save_for_backward(x_t, z, *parameters)  # the tape holds them too, but this notices when one was changed in between
        return gradient.to(x_t.dtype)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override] (one output, one cotangent)
        if torch.is_grad_enabled():
            raise RuntimeError("score.sweeps gives one gradient, and create_graph=True asks for more: use the method reverse")
        if ctx.tape is None:
            raise RuntimeError("score.sweeps frees its notes in its first backward pass, and this is a second: use the method reverse")
        _, z, *parameters = ctx.saved_tensors
        tape, (launchers, ones, mu, var) = ctx.tape, ctx.head
        ctx.tape = ctx.head = None
        with torch.autocast(v.device.type, enabled=False):
            tmu, tvar = ctx.encoder.sweep_tangent(v, tape)
            _, z_bar, mu_bar, var_bar = launchers.bwd_bwd(None, tmu, tvar, ones, z, mu, var)
            if any(ctx.needs_input_grad[3:]):
                ctx.encoder.sweep_joint((mu_bar, var_bar), tape, need_input=False)
        return None, None, z_bar, *(tape.gradients.get(p) for p in parameters)
