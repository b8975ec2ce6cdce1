"""Softmax attention written out, differentiable to any order; O(N_q N_k) memory."""

import torch
from torch import Tensor


def attention(
    q: Tensor,  # [B, S_q, N, D]
    k: Tensor,  # [B, S_k, N, D]
    v: Tensor,  # [B, S_k, N, D]
    *,
    scale: float | None = None,
    causal: bool = False,
) -> Tensor:  # [B, S_q, N, D]
    """out = softmax(scale q k^T) v for every head.

    Args:
        q: Queries. [B, S_q, N, D] (batch, tokens, heads, head size), any floating dtype.
        k, v: Keys and values. [B, S_k, N, D], dtype of q.
        scale: Factor on the logits; 1 / sqrt(D) when None.
        causal: Query i sees keys j <= i only. Needs S_q == S_k.
    Returns:
        [B, S_q, N, D], dtype of q.
    Raises:
        ValueError: shapes do not fit, or causal with S_q != S_k.
    Differentiable: twice, in q, k and v.
    Source: Vaswani et al., arXiv:1706.03762, eq. 1.
    """
    if q.dim() != 4:
        raise ValueError(f"q: expected [B, S, N, D], found {list(q.shape)}")
    expected = (q.shape[0], k.shape[1] if k.dim() == 4 else -1, *q.shape[2:])
    for name, value in (("k", k), ("v", v)):
        if value.shape != expected:
            raise ValueError(f"{name}: expected {list(expected)}, found {list(value.shape)}")
    if causal and q.shape[1] != k.shape[1]:
        raise ValueError(f"causal: expected as many queries as keys, found {q.shape[1]} and {k.shape[1]}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = scale * torch.einsum("bqnd,bknd->bnqk", q, k)
    if causal:
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        logits = logits.masked_fill(hidden, float("-inf"))
    return torch.einsum("bnqk,bknd->bqnd", logits.softmax(-1), v)
