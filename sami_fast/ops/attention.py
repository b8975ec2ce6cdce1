"""Softmax attention that can be differentiated twice, in memory linear in the number of tokens.

`sami_fast::attention` -> `attention_bwd` -> `attention_bwd_bwd`: three chained operators, each the derivative of the one before, every
one on the backend that the first was called with. `lse` and `out` are passed along as saved values: the formulas of `attention_bwd` and
`attention_bwd_bwd` contain how they depend on q, k and v.
"""

import torch
from torch import Tensor

from .. import reference
from ..reference.attention import attention_bwd, attention_bwd_bwd, attention_fwd, attention_tan, check_attention
from .arguments import check_together
from .define import define, linear_in_cotangents, no_third_derivative, saved_arguments
from .launchers import Launcher, Launchers

HEADS = {"triton": (8, 128), "cuda": (1, 128)}  # smallest and largest head size of the kernels


class AttentionLaunchers(Launchers):
    op = "attention"
    fwd = Launcher(attention_fwd)
    bwd = Launcher(attention_bwd)
    tan = Launcher(attention_tan)
    bwd_bwd = Launcher(attention_bwd_bwd)

    @staticmethod
    def limits(like: Tensor) -> dict[str, str]:
        size = like.shape[-1]
        outside = {name: between for name, between in HEADS.items() if not between[0] <= size <= between[1]}
        return {name: f"its head sizes are {low} to {high}, this one is {size}" for name, (low, high) in outside.items()}


def attention(
    q: Tensor,  # [B, S_q, N, D]
    k: Tensor,  # [B, S_k, N, D]
    v: Tensor,  # [B, S_k, N, D]
    *,
    scale: float | None = None,
    causal: bool = False,
    backend: str | None = None,
) -> Tensor:  # [B, S_q, N, D]
    """out = softmax(scale q k^T) v for every head.

    [B, S, N, D], a transposed [B, N, S, D], slices of one projection and the channels of a feature map are read in place where their
    strides are multiples of 16 bytes; a kernel copies others first.
    Other masks than the causal one: add them to the logits of a written-out attention, such as `sami_fast.reference.attention`.

    Args:
        q: Queries. [B, S_q, N, D] (batch, tokens, heads, head size), any floating dtype; kernels take float32, float16, bfloat16 and
            D from 8 to 128, and sum in float32.
        k, v: Keys and values. [B, S_k, N, D], S_k >= 1, dtype of q.
        scale: Factor on the logits; 1 / sqrt(D) when None.
        causal: Query i sees keys j <= i only. Needs S_q == S_k.
        backend: See `sami_fast.use_backend`.
    Returns:
        [B, S_q, N, D], dtype of q.
    Raises:
        ValueError: shapes do not fit, devices differ, or causal with S_q != S_k.
        TypeError: dtypes differ or are not floating.
        BackendError: the backend cannot run this call.
    Differentiable: twice, in q, k and v (the reference further).
    Runs on: C++, Triton, CUDA, reference.
    Source: Vaswani et al., arXiv:1706.03762, eq. 1.
    """
    backend, scale = _prepare(q, k, v, scale, causal, backend)
    if backend == "reference":
        return reference.attention(q, k, v, scale=scale, causal=causal)
    return _attention(q, k, v, scale, causal, backend)[0]


def attention_dual(
    q: Tensor,  # [B, S_q, N, D]
    k: Tensor,  # [B, S_k, N, D]
    v: Tensor,  # [B, S_k, N, D]
    tq: Tensor,  # [B, S_q, N, D]
    tk: Tensor,  # [B, S_k, N, D]
    tv: Tensor,  # [B, S_k, N, D]
    *,
    scale: float | None = None,
    causal: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # [B, S_q, N, D] twice
    """`attention` and its tangent along (tq, tk, tv): a dual number in, a dual number out.

    Args:
        q, k, v, scale, causal, backend: As in `attention`.
        tq, tk, tv: Tangents, shape and dtype of q, k, v.
    Returns:
        out and its tangent.
    Raises:
        As `attention`.
    Differentiable: once, in all six (the reference further).
    Runs on: C++, Triton, CUDA, reference.
    """
    backend, scale = _prepare(q, k, v, scale, causal, backend)
    check_together("attention_dual", q=q, tq=tq, tk=tk, tv=tv)
    for name, tangent, primal in (("tq", tq, q), ("tk", tk, k), ("tv", tv, v)):
        if tangent.shape != primal.shape:
            raise ValueError(f"{name}: expected {list(primal.shape)}, found {list(tangent.shape)}")
    if backend == "reference":
        return reference.attention_dual(q, k, v, tq, tk, tv, scale=scale, causal=causal)
    return _attention_dual(q, k, v, tq, tk, tv, scale, causal, backend)[:2]


def _prepare(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, backend: str | None) -> tuple[str, float]:
    check_attention(q, k, v, causal)
    check_together("attention", q=q, k=k, v=v)
    return AttentionLaunchers.choose(backend, q), q.shape[-1] ** -0.5 if scale is None else float(scale)


def _save_fwd(ctx, inputs, output):
    q, k, v, *ctx.settings = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse)


def _fwd_formula(ctx, grad_out, _):
    if grad_out is None:
        return (None,) * 6
    return *_attention_bwd(grad_out, *ctx.saved_tensors, *ctx.settings), None, None, None


def _bwd_formula(ctx, ggq, ggk, ggv):
    if ggq is None and ggk is None and ggv is None:
        return (None,) * 9
    saved = saved_arguments(ctx)
    cotangents = (torch.zeros_like(primal) if gg is None else gg for gg, primal in zip((ggq, ggk, ggv), saved[1:4], strict=True))
    return *_attention_bwd_bwd(*cotangents, *saved), None, None, None, None, None


def _bwd_bwd(
    ggq: Tensor,
    ggk: Tensor,
    ggv: Tensor,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    on = AttentionLaunchers(backend)
    tout, tau = on.tan(ggq, ggk, ggv, q, k, v, out, lse, scale, causal)  # tout is also the gradient of grad_out
    return tout, *on.bwd_bwd(ggq, ggk, ggv, grad_out, q, k, v, out, lse, tout, tau, scale, causal, None)


def _dual(
    q: Tensor, k: Tensor, v: Tensor, tq: Tensor, tk: Tensor, tv: Tensor, scale: float, causal: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    on = AttentionLaunchers(backend)
    out, lse = on.fwd(q, k, v, scale, causal)
    return out, *on.tan(tq, tk, tv, q, k, v, out, lse, scale, causal), lse


def _save_dual(ctx, inputs, output):
    *tensors, _, _, _ = inputs
    ctx.settings = inputs[6:]
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _dual_formula(ctx, out_bar, tout_bar, *_):
    out, tout = ctx.saved_tensors[6:8]
    if out_bar is None and tout_bar is None:
        return (None,) * 9
    out_bar = torch.zeros_like(out) if out_bar is None else out_bar
    tout_bar = torch.zeros_like(tout) if tout_bar is None else tout_bar
    return *_attention_dual_bwd(out_bar, tout_bar, *ctx.saved_tensors, *ctx.settings), None, None, None


def _dual_bwd(
    out_bar: Tensor,
    tout_bar: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor,
    tk: Tensor,
    tv: Tensor,
    out: Tensor,
    tout: Tensor,
    tau: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    # <tout_bar, tout> is linear in the tangents, with the first derivative as its matrix; its derivative in q, k, v is the joint backward.
    on = AttentionLaunchers(backend)
    joint = on.bwd_bwd(tq, tk, tv, tout_bar, q, k, v, out, lse, tout, tau, scale, causal, out_bar)
    return *joint, *on.bwd(tout_bar, q, k, v, out, lse, scale, causal)


_attention = define("attention", AttentionLaunchers.fwd, _save_fwd, _fwd_formula)
_attention_bwd = define("attention_bwd", AttentionLaunchers.bwd, None, _bwd_formula)
_attention_bwd_bwd = define("attention_bwd_bwd", _bwd_bwd, None, linear_in_cotangents("attention"))
_attention_dual = define("attention_dual", _dual, _save_dual, _dual_formula)
_attention_dual_bwd = define("attention_dual_bwd", _dual_bwd, None, no_third_derivative("attention_dual"))
