"""Softmax attention in plain torch: the public operator, differentiable to any order, and the twins of its launchers.

`attention` is the truth: a few lines that autograd can differentiate, O(S_q S_k) memory. The twins below it are explicit formulas with the
names and signatures of the launchers in `sami_fast.kernels`; they work in blocks of query rows, so their memory is O(S_q + S_k).
With s = scale, P = softmax(s Q K^T), E = dO V^T - D, D = rowsum(dO * O), dS = P * E, and a dot for the tangent along (tq, tk, tv):

    attention_fwd      O = P V,  lse = (max_j s Q K^T, ln sum_j exp(s Q K^T - max))
    attention_bwd      dQ = s dS K,  dK = s dS^T Q,  dV = P^T dO
    attention_tan      T = s (Q. K^T + Q K.^T),  tau = rowsum(P * T),  P. = P * (T - tau),  O. = P. V + P V.
    attention_bwd_bwd  Y = dO V.^T + O_bar V^T,  d. = rowsum(dO * O.) + rowsum(O_bar * O),  S_bar = P. * E + P * (Y - d.),
                       Q_bar = s (S_bar K + dS K.),  K_bar = s (S_bar^T Q + dS^T Q.),  V_bar = P.^T dO + P^T O_bar

S_bar is the tangent of dS at fixed dO: the Hessian is symmetric, so the gradient of <ggq, dQ> + ... is a tangent of (dQ, dK, dV).
The two parts of lse stay apart: rounding their sum would scale a whole row of P by as much as the largest logit times the precision, and
the differences E, T - tau and Y - d. would no longer vanish where they should.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

ROWS = 128  # queries per block: matrices of [B * N, ROWS, S_k], large enough for full speed, small enough for the caches


def check_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    """Raise ValueError where shapes do not fit, naming the argument, what was expected and what came."""
    if q.dim() != 4:
        raise ValueError(f"q: expected [B, S, N, D], found {list(q.shape)}")
    expected = (q.shape[0], k.shape[1] if k.dim() == 4 else -1, *q.shape[2:])
    for name, value in (("k", k), ("v", v)):
        if value.shape != expected:
            raise ValueError(f"{name}: expected {list(expected)}, found {list(value.shape)}")
    if k.shape[1] == 0:
        raise ValueError("k: expected at least one key, found none")
    if q.shape[3] == 0:
        raise ValueError("q: expected a head size of at least 1, found 0")
    if causal and q.shape[1] != k.shape[1]:
        raise ValueError(f"causal: expected as many queries as keys, found {q.shape[1]} and {k.shape[1]}")


def attention(
    q: Tensor,  # [B, S_q, N, D]
    k: Tensor,  # [B, S_k, N, D]
    v: Tensor,  # [B, S_k, N, D]
    *,
    scale: float | None = None,
    causal: bool = False,
) -> Tensor:  # [B, S_q, N, D]
    """out = softmax(scale q k^T) v for every head, as `sami_fast.ops.attention` describes it, differentiable to any order."""
    check_attention(q, k, v, causal)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = scale * torch.einsum("bqnd,bknd->bnqk", q, k)
    if causal:
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        logits = logits.masked_fill(hidden, float("-inf"))
    return torch.einsum("bnqk,bknd->bqnd", logits.softmax(-1), v)


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
) -> tuple[Tensor, Tensor]:  # [B, S_q, N, D] twice
    """`attention` and its tangent along (tq, tk, tv), written out so that autograd can differentiate both."""
    check_attention(q, k, v, causal)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = scale * torch.einsum("bqnd,bknd->bnqk", q, k)
    t = scale * (torch.einsum("bqnd,bknd->bnqk", tq, k) + torch.einsum("bqnd,bknd->bnqk", q, tk))
    if causal:
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        logits = logits.masked_fill(hidden, float("-inf"))
    p = logits.softmax(-1)
    tp = p * (t - (p * t).sum(-1, keepdim=True))
    out = torch.einsum("bnqk,bknd->bqnd", p, v)
    return out, torch.einsum("bnqk,bknd->bqnd", tp, v) + torch.einsum("bnqk,bknd->bqnd", p, tv)


def _heads(*tensors: Tensor) -> list[Tensor]:
    """[B, S, N, D] -> [B * N, S, D] for bmm, in the dtype of the sums."""
    kind = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return [x.to(kind).transpose(1, 2).flatten(0, 1) for x in tensors]


def _store(target: Tensor, heads: Tensor) -> None:
    """[B * N, S, D] -> [B, S, N, D], in the dtype and layout of the target."""
    target.copy_(heads.unflatten(0, (target.shape[0], target.shape[2])).transpose(1, 2))


def _blocks(queries: int, keys: int, causal: bool) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries, each with the keys that it sees."""
    for start in range(0, queries, ROWS):
        stop = min(start + ROWS, queries)
        yield slice(start, stop), slice(0, stop if causal else keys)


def _logits(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    """scale q k^T of a block, which ends on the diagonal when causal. [B * N, rows, keys]"""
    logits = torch.bmm(scale * q, k.mT)
    if causal:
        hidden = torch.ones(logits.shape[1:], dtype=torch.bool, device=q.device).triu(k.shape[1] - q.shape[1] + 1)
        logits.masked_fill_(hidden, float("-inf"))
    return logits


def _probabilities(q: Tensor, k: Tensor, lse: Tensor, scale: float, causal: bool) -> Tensor:
    top, log_total = lse.unsqueeze(-1)
    return _logits(q, k, scale, causal).sub_(top).sub_(log_total).exp_()


def _logit_tangent(tq: Tensor, tk: Tensor, q: Tensor, k: Tensor, scale: float) -> Tensor:
    return torch.bmm(scale * tq, k.mT).baddbmm_(q, tk.mT, alpha=scale)


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    """[B * N, rows, 1]"""
    return torch.linalg.vecdot(a, b).unsqueeze(-1)


@torch.no_grad()
def attention_fwd(
    q: Tensor,  # [B, S_q, N, D]
    k: Tensor,  # [B, S_k, N, D]
    v: Tensor,  # [B, S_k, N, D]
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:  # [B, S_q, N, D], [2, B, N, S_q]
    """The output, contiguous, and lse, in two parts: max_j scale q k_j, and the natural logarithm of sum_j exp(scale q k_j - max).

    lse is float32, float64 for float64.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    q, k, v = _heads(q, k, v)
    lse = torch.empty((2, *q.shape[:2]), dtype=q.dtype, device=q.device)
    for rows, cols in _blocks(q.shape[1], k.shape[1], causal):
        logits = _logits(q[:, rows], k[:, cols], scale, causal)
        top = logits.amax(-1, keepdim=True)
        p = logits.sub_(top).exp_()  # not yet divided by its sum, which is done on the smaller product
        total = p.sum(-1, keepdim=True)
        _store(out[:, rows], torch.bmm(p, v[:, cols]).div_(total))
        lse[0, :, rows], lse[1, :, rows] = top.squeeze(-1), total.log().squeeze(-1)
    return out, lse.unflatten(1, (out.shape[0], out.shape[2]))


@torch.no_grad()
def attention_bwd(
    grad_out: Tensor,  # [B, S_q, N, D]
    q: Tensor,  # [B, S_q, N, D]
    k: Tensor,  # [B, S_k, N, D]
    v: Tensor,  # [B, S_k, N, D]
    out: Tensor,  # [B, S_q, N, D]
    lse: Tensor,  # [2, B, N, S_q]
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of <grad_out, out> with respect to q, k and v, each laid out as torch.empty_like of its primal."""
    grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k, v))
    grad_out, q, k, v, out = _heads(grad_out, q, k, v, out)
    lse = lse.flatten(1, 2)
    sum_k, sum_v = torch.zeros_like(k), torch.zeros_like(v)
    for rows, cols in _blocks(q.shape[1], k.shape[1], causal):
        p = _probabilities(q[:, rows], k[:, cols], lse[:, :, rows], scale, causal)
        sum_v[:, cols].baddbmm_(p.mT, grad_out[:, rows])
        e = torch.bmm(grad_out[:, rows], v[:, cols].mT).sub_(_row_dot(grad_out[:, rows], out[:, rows]))
        ds = e.mul_(p)
        _store(grad_q[:, rows], torch.bmm(ds, k[:, cols]).mul_(scale))
        sum_k[:, cols].baddbmm_(ds.mT, q[:, rows], alpha=scale)
        del p, e, ds  # before the next block's are made
    _store(grad_k, sum_k)
    _store(grad_v, sum_v)
    return grad_q, grad_k, grad_v


@torch.no_grad()
def attention_tan(
    tq: Tensor,  # [B, S_q, N, D]
    tk: Tensor,  # [B, S_k, N, D]
    tv: Tensor,  # [B, S_k, N, D]
    q: Tensor,  # [B, S_q, N, D]
    k: Tensor,  # [B, S_k, N, D]
    v: Tensor,  # [B, S_k, N, D]
    out: Tensor,  # [B, S_q, N, D]
    lse: Tensor,  # [2, B, N, S_q]
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:  # [B, S_q, N, D], [B, N, S_q]
    """Tangent of out along (tq, tk, tv), contiguous, and tau: the tangent of the sum of both parts of lse, in its dtype."""
    tout = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tau = torch.empty(lse.shape[1:], dtype=lse.dtype, device=lse.device)
    tq, tk, tv, q, k, v = _heads(tq, tk, tv, q, k, v)
    lse, tau_heads = lse.flatten(1, 2), tau.view(q.shape[:2])
    for rows, cols in _blocks(q.shape[1], k.shape[1], causal):
        p = _probabilities(q[:, rows], k[:, cols], lse[:, :, rows], scale, causal)
        t = _logit_tangent(tq[:, rows], tk[:, cols], q[:, rows], k[:, cols], scale)
        t_mean = _row_dot(p, t)
        tau_heads[:, rows] = t_mean.squeeze(-1)
        result = torch.bmm(p, tv[:, cols])
        tp = t.sub_(t_mean).mul_(p)
        _store(tout[:, rows], result.baddbmm_(tp, v[:, cols]))
    return tout, tau


@torch.no_grad()
def attention_bwd_bwd(
    ggq: Tensor,  # [B, S_q, N, D]
    ggk: Tensor,  # [B, S_k, N, D]
    ggv: Tensor,  # [B, S_k, N, D]
    grad_out: Tensor,  # [B, S_q, N, D]
    q: Tensor,  # [B, S_q, N, D]
    k: Tensor,  # [B, S_k, N, D]
    v: Tensor,  # [B, S_k, N, D]
    out: Tensor,  # [B, S_q, N, D]
    lse: Tensor,  # [2, B, N, S_q]
    tout: Tensor,  # [B, S_q, N, D]
    tau: Tensor,  # [B, N, S_q]
    scale: float,
    causal: bool,
    out_bar: Tensor | None,  # [B, S_q, N, D]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of <ggq, grad_q> + <ggk, grad_k> + <ggv, grad_v> + <out_bar, out> with respect to q, k and v at fixed grad_out.

    tout and tau are what attention_tan gave along (ggq, ggk, ggv); tout is also the gradient with respect to grad_out. None for
    out_bar leaves its term out. Each result is laid out as torch.empty_like of its primal.
    """
    q_bar, k_bar, v_bar = (torch.empty_like(x) for x in (q, k, v))
    ggq, ggk, ggv, grad_out, q, k, v, out, tout = _heads(ggq, ggk, ggv, grad_out, q, k, v, out, tout)
    out_bar = None if out_bar is None else _heads(out_bar)[0]
    lse, tau = lse.flatten(1, 2), tau.flatten(0, 1)
    sum_k, sum_v = torch.zeros_like(k), torch.zeros_like(v)
    for rows, cols in _blocks(q.shape[1], k.shape[1], causal):
        p = _probabilities(q[:, rows], k[:, cols], lse[:, :, rows], scale, causal)
        e = torch.bmm(grad_out[:, rows], v[:, cols].mT).sub_(_row_dot(grad_out[:, rows], out[:, rows]))
        y = torch.bmm(grad_out[:, rows], ggv[:, cols].mT)
        y_mean = _row_dot(grad_out[:, rows], tout[:, rows])
        if out_bar is not None:
            y.baddbmm_(out_bar[:, rows], v[:, cols].mT)
            y_mean += _row_dot(out_bar[:, rows], out[:, rows])
            sum_v[:, cols].baddbmm_(p.mT, out_bar[:, rows])
        tp = _logit_tangent(ggq[:, rows], ggk[:, cols], q[:, rows], k[:, cols], scale).sub_(tau[:, rows, None]).mul_(p)
        sum_v[:, cols].baddbmm_(tp.mT, grad_out[:, rows])
        # Four block matrices at a time: p, e, y and tp, each reused for what it turns into.
        s_bar = y.sub_(y_mean).mul_(p).addcmul_(tp, e)
        ds = e.mul_(p)
        _store(q_bar[:, rows], torch.bmm(s_bar, k[:, cols]).baddbmm_(ds, ggk[:, cols]).mul_(scale))
        sum_k[:, cols].baddbmm_(s_bar.mT, q[:, rows], alpha=scale).baddbmm_(ds.mT, ggq[:, rows], alpha=scale)
        del p, e, y, tp, s_bar, ds  # before the next block's are made
    _store(k_bar, sum_k)
    _store(v_bar, sum_v)
    return q_bar, k_bar, v_bar
