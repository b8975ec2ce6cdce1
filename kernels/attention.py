"""Softmax attention in tiles, forward to second order: no [S_q, S_k] matrix is ever stored, and every sum has one fixed order.

With s = scale, a dot for the tangent along (tq, tk, tv) = (ggq, ggk, ggv), * elementwise, rowsum over the head or the keys:

    attention_fwd      P = softmax(s Q K^T),  O = P V,  lse = ln sum_j exp(s Q K^T)                                      2 products
    attention_bwd      D = rowsum(dO * O),  E = dO V^T - D,  dS = P * E,  dQ = s dS K,  dK = s dS^T Q,  dV = P^T dO      3 + 4
    attention_tan      T = s (Q. K^T + Q K.^T),  tau = rowsum(P * T),  O. = (P * T) V + P V. - tau O                     5
    attention_bwd_bwd  P. = P * (T - tau),  Y = dO V.^T + O_bar V^T,  d. = rowsum(dO * O.) + rowsum(O_bar * O),
                       S_bar = P. * E + P * (Y - d.),  Q_bar = s (S_bar K + dS K.),                                      7 (8)
                       K_bar = s (S_bar^T Q + dS^T Q.),  V_bar = P.^T dO + P^T O_bar                                     8 (10)

The products on the right are S_q x S_k x D each, in brackets with O_bar. A gradient in Q comes from a program per block of queries that
runs over the keys, a gradient in K and V from a program per block of keys that runs over the queries: one matrix more than with atomic
sums, and the same bits in every run. The former stores the row sums D and d. for the latter.

Exponentials are base 2, so logits carry s log2(e); T, a derivative, carries s alone. Products run in the dtype of the inputs (float32 as
such, not as TF32) and are summed in float32; whatever is the product of two factors or summed over a row stays in float32 until then.

Layouts: q, k, v may have any strides; their gradients, and the tangents and cotangents that look like those, are laid out as
torch.empty_like of them; O and all that looks like it is contiguous. A tangent or cotangent in another layout is copied.
"""

import math
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import INTERPRETED, launch

MAX_HEAD_SIZE = 128
LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))


@triton.jit
def _place(size, num_heads, BLOCK: tl.constexpr):
    """Which block of rows, and of which head, this program works on. One grid axis: the others end at 65535."""
    num_blocks = tl.cdiv(size, BLOCK)
    head = tl.program_id(0) // num_blocks
    return (tl.program_id(0) % num_blocks) * BLOCK, head, (head // num_heads).to(tl.int64), (head % num_heads).to(tl.int64)


@triton.jit
def _head(ptr, b, n, stride_b, stride_n, ALIGN: tl.constexpr):
    """Pointer to a head."""
    offset = b * stride_b + n * stride_n
    # Triton sees only multiples of 16 elements by itself; ALIGN keeps 16-byte loads alive for head sizes such as 40.
    if ALIGN > 1:
        offset = tl.multiple_of(offset, ALIGN)
    return ptr + offset


@triton.jit
def _load(x_rows, start, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, HEAD_SIZE: tl.constexpr, ALIGN: tl.constexpr, column=0):
    """Rows from start on. Zeros beyond the last row and the last column add nothing to any product."""
    ptr, stride_s, stride_d, size = x_rows
    # Offsets inside a tile are int32 and the same for all tiles of a loop, which saves registers.
    tile = tl.arange(0, BLOCK) * stride_s
    if ALIGN > 1:
        tile = tl.multiple_of(tile, ALIGN)
    columns = column + tl.arange(0, BLOCK_C)
    mask = (start + tl.arange(0, BLOCK) < size)[:, None]
    if (BLOCK_C - HEAD_SIZE) % BLOCK_C:  # BLOCK_C first: the interpreter cannot divide by the constexpr that a shape is
        mask = mask & (columns < HEAD_SIZE)[None, :]
    return tl.load(ptr + tl.cast(start, tl.int64) * stride_s + (tile[:, None] + (columns * stride_d)[None, :]), mask=mask, other=0.0)


@triton.jit
def _store(x_rows, start, values, HEAD_SIZE: tl.constexpr, ALIGN: tl.constexpr):
    ptr, stride_s, stride_d, size = x_rows
    # int64 from the start, unlike in _load: offsets that both have in common would occupy registers all along the loop between them.
    tile = (start + tl.arange(0, values.shape[0])).to(tl.int64) * stride_s
    if ALIGN > 1:
        tile = tl.multiple_of(tile, ALIGN)
    columns = tl.arange(0, values.shape[1])
    mask = (start + tl.arange(0, values.shape[0]) < size)[:, None]
    if values.shape[1] > HEAD_SIZE:
        mask = mask & (columns < HEAD_SIZE)[None, :]
    tl.store(ptr + (tile[:, None] + (columns * stride_d)[None, :]), values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dot(a, b, acc=None):
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _product(a, a_rows, a_start, b, b_rows, b_start, HEAD_SIZE: tl.constexpr, BLOCK_C: tl.constexpr, acc=None):
    """a b^T + acc, summed over the columns of two tiles.

    Outside the tensor cores, in float32, operands sit in registers, whole rows per thread, and a head does not fit. So the columns are
    taken BLOCK_C at a time and read again, from the cache; a and b are then unused and never loaded.
    """
    if a.shape[1] == BLOCK_C:
        return _dot(a, tl.trans(b), acc)
    else:
        total = tl.zeros([a.shape[0], b.shape[0]], tl.float32) if acc is None else acc
        for column in range(0, HEAD_SIZE, BLOCK_C):
            part = _load(a_rows, a_start, a.shape[0], BLOCK_C, HEAD_SIZE, 1, column)
            total = _dot(part, tl.trans(_load(b_rows, b_start, b.shape[0], BLOCK_C, HEAD_SIZE, 1, column)), total)
        return total


@triton.jit
def _weighted(p, x, x_rows, x_start, HEAD_SIZE: tl.constexpr, BLOCK_C: tl.constexpr, acc):
    """p x + acc. Like the operands of _product, x is read again, here whole, where it cannot be kept."""
    if x.shape[1] == BLOCK_C:
        return _dot(p.to(x.dtype), x, acc)
    else:
        return _dot(p, _load(x_rows, x_start, x.shape[0], x.shape[1], HEAD_SIZE, 1), acc)


@triton.jit
def _products(
    a0_rows, a1_rows, a2_rows, a3_rows, a_start, b0_rows, b1_rows, b2_rows, b3_rows, b_start,
    HEAD_SIZE: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
    HAS_A3: tl.constexpr, HAS_B3: tl.constexpr,
):  # fmt: skip
    """All that the second order takes from two blocks, in one loop over columns: products of q and k, of their tangents, and of dO with V.

    a0 b0^T, a1 b0^T + a0 b1^T, a2 b2^T, a2 b3^T + a3 b2^T, for the a of queries and the b of keys or the other way round.
    """
    s = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    t = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    e = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    y = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    for column in range(0, HEAD_SIZE, BLOCK_C):
        a = _load(a0_rows, a_start, BLOCK_A, BLOCK_C, HEAD_SIZE, 1, column)
        b = tl.trans(_load(b0_rows, b_start, BLOCK_B, BLOCK_C, HEAD_SIZE, 1, column))
        s = _dot(a, b, s)
        t = _dot(_load(a1_rows, a_start, BLOCK_A, BLOCK_C, HEAD_SIZE, 1, column), b, t)
        t = _dot(a, tl.trans(_load(b1_rows, b_start, BLOCK_B, BLOCK_C, HEAD_SIZE, 1, column)), t)
        a = _load(a2_rows, a_start, BLOCK_A, BLOCK_C, HEAD_SIZE, 1, column)
        b = tl.trans(_load(b2_rows, b_start, BLOCK_B, BLOCK_C, HEAD_SIZE, 1, column))
        e = _dot(a, b, e)
        if HAS_B3:
            y = _dot(a, tl.trans(_load(b3_rows, b_start, BLOCK_B, BLOCK_C, HEAD_SIZE, 1, column)), y)
        if HAS_A3:
            y = _dot(_load(a3_rows, a_start, BLOCK_A, BLOCK_C, HEAD_SIZE, 1, column), b, y)
    return s, t, e, y


@triton.jit
def _row_dot(a, b):
    return tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)


@triton.jit
def _probabilities(products, scale, lse2, seen):
    """exp(scale products - lse) where seen, else 0; lse2 is lse in base 2."""
    return tl.exp2(tl.where(seen, products * (scale * LOG2_E) - lse2, float("-inf")))


@triton.jit(do_not_specialize=["num_heads", "reach"])
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, scale,
    stride_qb, stride_qs, stride_qn, stride_qd, stride_kb, stride_ks, stride_kn, stride_kd, stride_vb, stride_vs, stride_vn, stride_vd,
    num_heads, num_queries, num_keys, reach, HEAD_SIZE: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """O and lse of a block of queries: softmax with a running maximum. Query i sees keys up to i + reach."""
    q_start, head, b, n = _place(num_queries, num_heads, BLOCK_Q)
    o_head, o_stride = (b * num_queries * num_heads + n) * HEAD_SIZE, num_heads * HEAD_SIZE
    q_rows = (_head(q_ptr, b, n, stride_qb, stride_qn, ALIGN), stride_qs, stride_qd, num_queries)
    k_rows = (_head(k_ptr, b, n, stride_kb, stride_kn, ALIGN), stride_ks, stride_kd, num_keys)
    v_rows = (_head(v_ptr, b, n, stride_vb, stride_vn, ALIGN), stride_vs, stride_vd, num_keys)
    rows = q_start + tl.arange(0, BLOCK_Q)
    q = _load(q_rows, q_start, BLOCK_Q, BLOCK_D, HEAD_SIZE, ALIGN)

    last_seen = tl.minimum(num_keys - 1, rows + reach)  # one bound for the end of the keys and for the diagonal
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for k_start in range(0, tl.minimum(num_keys, q_start + BLOCK_Q + reach), BLOCK_K):
        k = _load(k_rows, k_start, BLOCK_K, BLOCK_D, HEAD_SIZE, ALIGN)
        v = _load(v_rows, k_start, BLOCK_K, BLOCK_D, HEAD_SIZE, ALIGN)
        seen = (k_start + tl.arange(0, BLOCK_K))[None, :] <= last_seen[:, None]
        logits = _product(q, q_rows, q_start, k, k_rows, k_start, HEAD_SIZE, BLOCK_C) * (scale * LOG2_E)
        logits = tl.where(seen, logits, float("-inf"))
        # Every row sees the first key, so the maximum is finite from the first block on.
        new_top = tl.maximum(top, tl.max(logits, 1))
        p = tl.exp2(logits - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        acc = _weighted(p, v, v_rows, k_start, HEAD_SIZE, BLOCK_C, acc * shrink[:, None])
        top = new_top

    _store((out_ptr + o_head, o_stride, 1, num_queries), q_start, acc / total[:, None], HEAD_SIZE, 1)
    tl.store(lse_ptr + head.to(tl.int64) * num_queries + rows, (top + tl.log2(total)) * LN_2, mask=rows < num_queries)


@triton.jit(do_not_specialize=["num_heads", "reach"])
def _attention_bwd_q_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, dq_ptr, delta_ptr, scale,
    stride_qb, stride_qs, stride_qn, stride_qd, stride_kb, stride_ks, stride_kn, stride_kd, stride_vb, stride_vs, stride_vn, stride_vd,
    stride_dqb, stride_dqs, stride_dqn, stride_dqd,
    num_heads, num_queries, num_keys, reach, HEAD_SIZE: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dQ of a block of queries, and delta = D for the pass over keys."""
    q_start, head, b, n = _place(num_queries, num_heads, BLOCK_Q)
    o_head, o_stride = (b * num_queries * num_heads + n) * HEAD_SIZE, num_heads * HEAD_SIZE
    q_rows = (_head(q_ptr, b, n, stride_qb, stride_qn, ALIGN), stride_qs, stride_qd, num_queries)
    k_rows = (_head(k_ptr, b, n, stride_kb, stride_kn, ALIGN), stride_ks, stride_kd, num_keys)
    v_rows = (_head(v_ptr, b, n, stride_vb, stride_vn, ALIGN), stride_vs, stride_vd, num_keys)
    grad_out_rows = (grad_out_ptr + o_head, o_stride, 1, num_queries)
    rows = q_start + tl.arange(0, BLOCK_Q)
    stats = head.to(tl.int64) * num_queries + rows
    q = _load(q_rows, q_start, BLOCK_Q, BLOCK_D, HEAD_SIZE, ALIGN)
    grad_out = _load(grad_out_rows, q_start, BLOCK_Q, BLOCK_D, HEAD_SIZE, 1)
    out = _load((out_ptr + o_head, o_stride, 1, num_queries), q_start, BLOCK_Q, BLOCK_D, HEAD_SIZE, 1)
    delta = _row_dot(grad_out, out)
    tl.store(delta_ptr + stats, delta, mask=rows < num_queries)
    lse2 = tl.load(lse_ptr + stats, mask=rows < num_queries, other=float("inf")) * LOG2_E

    last_seen = tl.minimum(num_keys - 1, rows + reach)
    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for k_start in range(0, tl.minimum(num_keys, q_start + BLOCK_Q + reach), BLOCK_K):
        k = _load(k_rows, k_start, BLOCK_K, BLOCK_D, HEAD_SIZE, ALIGN)
        v = _load(v_rows, k_start, BLOCK_K, BLOCK_D, HEAD_SIZE, ALIGN)
        seen = (k_start + tl.arange(0, BLOCK_K))[None, :] <= last_seen[:, None]
        p = _probabilities(_product(q, q_rows, q_start, k, k_rows, k_start, HEAD_SIZE, BLOCK_C), scale, lse2[:, None], seen)
        ds = p * (_product(grad_out, grad_out_rows, q_start, v, v_rows, k_start, HEAD_SIZE, BLOCK_C) - delta[:, None])
        dq = _weighted(ds, k, k_rows, k_start, HEAD_SIZE, BLOCK_C, dq)

    dq_rows = (_head(dq_ptr, b, n, stride_dqb, stride_dqn, ALIGN), stride_dqs, stride_dqd, num_queries)
    _store(dq_rows, q_start, dq * scale, HEAD_SIZE, ALIGN)


@triton.jit(do_not_specialize=["num_heads", "reach"])
def _attention_bwd_kv_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, scale,
    stride_qb, stride_qs, stride_qn, stride_qd, stride_kb, stride_ks, stride_kn, stride_kd, stride_vb, stride_vs, stride_vn, stride_vd,
    stride_dkb, stride_dks, stride_dkn, stride_dkd, stride_dvb, stride_dvs, stride_dvn, stride_dvd,
    num_heads, num_queries, num_keys, reach, HEAD_SIZE: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dK and dV of a block of keys; all score tiles are transposed, [keys, queries], which spares a transposition of P and dS."""
    k_start, head, b, n = _place(num_keys, num_heads, BLOCK_K)
    o_head, o_stride = (b * num_queries * num_heads + n) * HEAD_SIZE, num_heads * HEAD_SIZE
    q_rows = (_head(q_ptr, b, n, stride_qb, stride_qn, ALIGN), stride_qs, stride_qd, num_queries)
    k_rows = (_head(k_ptr, b, n, stride_kb, stride_kn, ALIGN), stride_ks, stride_kd, num_keys)
    v_rows = (_head(v_ptr, b, n, stride_vb, stride_vn, ALIGN), stride_vs, stride_vd, num_keys)
    grad_out_rows = (grad_out_ptr + o_head, o_stride, 1, num_queries)
    keys = k_start + tl.arange(0, BLOCK_K)
    k = _load(k_rows, k_start, BLOCK_K, BLOCK_D, HEAD_SIZE, ALIGN)
    v = _load(v_rows, k_start, BLOCK_K, BLOCK_D, HEAD_SIZE, ALIGN)

    stats = head.to(tl.int64) * num_queries
    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for q_start in range(tl.maximum(k_start - reach, 0) // BLOCK_Q * BLOCK_Q, num_queries, BLOCK_Q):
        rows = q_start + tl.arange(0, BLOCK_Q)
        q = _load(q_rows, q_start, BLOCK_Q, BLOCK_D, HEAD_SIZE, ALIGN)
        grad_out = _load(grad_out_rows, q_start, BLOCK_Q, BLOCK_D, HEAD_SIZE, 1)
        # lse = +inf makes P vanish in the rows beyond the last query. What keys beyond the last one give is never stored.
        lse2 = tl.load(lse_ptr + stats + rows, mask=rows < num_queries, other=float("inf")) * LOG2_E
        seen = keys[:, None] <= (rows + reach)[None, :]
        p = _probabilities(_product(k, k_rows, k_start, q, q_rows, q_start, HEAD_SIZE, BLOCK_C), scale, lse2[None, :], seen)
        dv = _weighted(p, grad_out, grad_out_rows, q_start, HEAD_SIZE, BLOCK_C, dv)
        delta = tl.load(delta_ptr + stats + rows, mask=rows < num_queries, other=0.0)
        ds = p * (_product(v, v_rows, k_start, grad_out, grad_out_rows, q_start, HEAD_SIZE, BLOCK_C) - delta[None, :])
        dk = _weighted(ds, q, q_rows, q_start, HEAD_SIZE, BLOCK_C, dk)

    dk_rows = (_head(dk_ptr, b, n, stride_dkb, stride_dkn, ALIGN), stride_dks, stride_dkd, num_keys)
    dv_rows = (_head(dv_ptr, b, n, stride_dvb, stride_dvn, ALIGN), stride_dvs, stride_dvd, num_keys)
    _store(dk_rows, k_start, dk * scale, HEAD_SIZE, ALIGN)
    _store(dv_rows, k_start, dv, HEAD_SIZE, ALIGN)


@triton.jit(do_not_specialize=["num_heads", "reach"])
def _attention_tan_kernel(
    tq_ptr, tk_ptr, tv_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, tout_ptr, tau_ptr, scale,
    stride_qb, stride_qs, stride_qn, stride_qd, stride_kb, stride_ks, stride_kn, stride_kd, stride_vb, stride_vs, stride_vn, stride_vd,
    stride_dqb, stride_dqs, stride_dqn, stride_dqd, stride_dkb, stride_dks, stride_dkn, stride_dkd,
    stride_dvb, stride_dvs, stride_dvn, stride_dvd,
    num_heads, num_queries, num_keys, reach, HEAD_SIZE: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Tangent of O and tau of a block of queries in one sweep: tau enters linearly, so it is subtracted at the end."""
    q_start, head, b, n = _place(num_queries, num_heads, BLOCK_Q)
    o_head, o_stride = (b * num_queries * num_heads + n) * HEAD_SIZE, num_heads * HEAD_SIZE
    q_rows = (_head(q_ptr, b, n, stride_qb, stride_qn, ALIGN), stride_qs, stride_qd, num_queries)
    k_rows = (_head(k_ptr, b, n, stride_kb, stride_kn, ALIGN), stride_ks, stride_kd, num_keys)
    v_rows = (_head(v_ptr, b, n, stride_vb, stride_vn, ALIGN), stride_vs, stride_vd, num_keys)
    tq_rows = (_head(tq_ptr, b, n, stride_dqb, stride_dqn, ALIGN), stride_dqs, stride_dqd, num_queries)
    tk_rows = (_head(tk_ptr, b, n, stride_dkb, stride_dkn, ALIGN), stride_dks, stride_dkd, num_keys)
    tv_rows = (_head(tv_ptr, b, n, stride_dvb, stride_dvn, ALIGN), stride_dvs, stride_dvd, num_keys)
    rows = q_start + tl.arange(0, BLOCK_Q)
    stats = head.to(tl.int64) * num_queries + rows
    q = _load(q_rows, q_start, BLOCK_Q, BLOCK_D, HEAD_SIZE, ALIGN)
    tq = _load(tq_rows, q_start, BLOCK_Q, BLOCK_D, HEAD_SIZE, ALIGN)
    lse2 = tl.load(lse_ptr + stats, mask=rows < num_queries, other=float("inf")) * LOG2_E

    last_seen = tl.minimum(num_keys - 1, rows + reach)
    tau = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for k_start in range(0, tl.minimum(num_keys, q_start + BLOCK_Q + reach), BLOCK_K):
        k = _load(k_rows, k_start, BLOCK_K, BLOCK_D, HEAD_SIZE, ALIGN)
        tk = _load(tk_rows, k_start, BLOCK_K, BLOCK_D, HEAD_SIZE, ALIGN)
        v = _load(v_rows, k_start, BLOCK_K, BLOCK_D, HEAD_SIZE, ALIGN)
        tv = _load(tv_rows, k_start, BLOCK_K, BLOCK_D, HEAD_SIZE, ALIGN)
        seen = (k_start + tl.arange(0, BLOCK_K))[None, :] <= last_seen[:, None]
        p = _probabilities(_product(q, q_rows, q_start, k, k_rows, k_start, HEAD_SIZE, BLOCK_C), scale, lse2[:, None], seen)
        t = _product(tq, tq_rows, q_start, k, k_rows, k_start, HEAD_SIZE, BLOCK_C)
        pt = p * (_product(q, q_rows, q_start, tk, tk_rows, k_start, HEAD_SIZE, BLOCK_C, t) * scale)
        tau += tl.sum(pt, 1)
        acc = _weighted(pt, v, v_rows, k_start, HEAD_SIZE, BLOCK_C, acc)
        acc = _weighted(p, tv, tv_rows, k_start, HEAD_SIZE, BLOCK_C, acc)

    out = _load((out_ptr + o_head, o_stride, 1, num_queries), q_start, BLOCK_Q, BLOCK_D, HEAD_SIZE, 1)
    acc -= tau[:, None] * out.to(tl.float32)
    _store((tout_ptr + o_head, o_stride, 1, num_queries), q_start, acc, HEAD_SIZE, 1)
    tl.store(tau_ptr + stats, tau, mask=rows < num_queries)


@triton.jit(do_not_specialize=["num_heads", "reach"])
def _attention_bwd_bwd_q_kernel(
    ggq_ptr, ggk_ptr, ggv_ptr, grad_out_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, tout_ptr, tau_ptr, out_bar_ptr,
    q_bar_ptr, delta_ptr, y_mean_ptr, scale,
    stride_qb, stride_qs, stride_qn, stride_qd, stride_kb, stride_ks, stride_kn, stride_kd, stride_vb, stride_vs, stride_vn, stride_vd,
    stride_dqb, stride_dqs, stride_dqn, stride_dqd, stride_dkb, stride_dks, stride_dkn, stride_dkd,
    stride_dvb, stride_dvs, stride_dvn, stride_dvd,
    num_heads, num_queries, num_keys, reach, HEAD_SIZE: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Q_bar of a block of queries, and delta = D and y_mean = d. for the pass over keys. out_bar_ptr may be None."""
    q_start, head, b, n = _place(num_queries, num_heads, BLOCK_Q)
    o_head, o_stride = (b * num_queries * num_heads + n) * HEAD_SIZE, num_heads * HEAD_SIZE
    q_rows = (_head(q_ptr, b, n, stride_qb, stride_qn, ALIGN), stride_qs, stride_qd, num_queries)
    k_rows = (_head(k_ptr, b, n, stride_kb, stride_kn, ALIGN), stride_ks, stride_kd, num_keys)
    v_rows = (_head(v_ptr, b, n, stride_vb, stride_vn, ALIGN), stride_vs, stride_vd, num_keys)
    ggq_rows = (_head(ggq_ptr, b, n, stride_dqb, stride_dqn, ALIGN), stride_dqs, stride_dqd, num_queries)
    ggk_rows = (_head(ggk_ptr, b, n, stride_dkb, stride_dkn, ALIGN), stride_dks, stride_dkd, num_keys)
    ggv_rows = (_head(ggv_ptr, b, n, stride_dvb, stride_dvn, ALIGN), stride_dvs, stride_dvd, num_keys)
    grad_out_rows = (grad_out_ptr + o_head, o_stride, 1, num_queries)
    rows = q_start + tl.arange(0, BLOCK_Q)
    stats = head.to(tl.int64) * num_queries + rows
    q = _load(q_rows, q_start, BLOCK_Q, BLOCK_D, HEAD_SIZE, ALIGN)
    ggq = _load(ggq_rows, q_start, BLOCK_Q, BLOCK_D, HEAD_SIZE, ALIGN)
    grad_out = _load(grad_out_rows, q_start, BLOCK_Q, BLOCK_D, HEAD_SIZE, 1)
    out = _load((out_ptr + o_head, o_stride, 1, num_queries), q_start, BLOCK_Q, BLOCK_D, HEAD_SIZE, 1)
    delta = _row_dot(grad_out, out)
    tout = _load((tout_ptr + o_head, o_stride, 1, num_queries), q_start, BLOCK_Q, BLOCK_D, HEAD_SIZE, 1)
    y_mean = _row_dot(grad_out, tout)
    out_bar_rows = (out_bar_ptr + o_head if out_bar_ptr is not None else grad_out_ptr, o_stride, 1, num_queries)
    if out_bar_ptr is not None:
        out_bar = _load(out_bar_rows, q_start, BLOCK_Q, BLOCK_D, HEAD_SIZE, 1)
        y_mean += _row_dot(out_bar, out)
    tl.store(delta_ptr + stats, delta, mask=rows < num_queries)
    tl.store(y_mean_ptr + stats, y_mean, mask=rows < num_queries)
    lse2 = tl.load(lse_ptr + stats, mask=rows < num_queries, other=float("inf")) * LOG2_E
    tau = tl.load(tau_ptr + stats, mask=rows < num_queries, other=0.0)

    last_seen = tl.minimum(num_keys - 1, rows + reach)
    q_bar = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for k_start in range(0, tl.minimum(num_keys, q_start + BLOCK_Q + reach), BLOCK_K):
        k = _load(k_rows, k_start, BLOCK_K, BLOCK_D, HEAD_SIZE, ALIGN)
        ggk = _load(ggk_rows, k_start, BLOCK_K, BLOCK_D, HEAD_SIZE, ALIGN)
        v = _load(v_rows, k_start, BLOCK_K, BLOCK_D, HEAD_SIZE, ALIGN)
        ggv = _load(ggv_rows, k_start, BLOCK_K, BLOCK_D, HEAD_SIZE, ALIGN)
        seen = (k_start + tl.arange(0, BLOCK_K))[None, :] <= last_seen[:, None]
        if BLOCK_C < BLOCK_D:
            s, t, e, y = _products(
                q_rows, ggq_rows, grad_out_rows, out_bar_rows, q_start, k_rows, ggk_rows, v_rows, ggv_rows, k_start,
                HEAD_SIZE, BLOCK_Q, BLOCK_K, BLOCK_C, out_bar_ptr is not None, True,
            )  # fmt: skip
        else:
            s = _dot(q, tl.trans(k))
            t = _dot(q, tl.trans(ggk), _dot(ggq, tl.trans(k)))
            e = _dot(grad_out, tl.trans(v))
            y = _dot(grad_out, tl.trans(ggv))
            if out_bar_ptr is not None:
                y = _dot(out_bar, tl.trans(v), y)
        p = _probabilities(s, scale, lse2[:, None], seen)
        ds = p * (e - delta[:, None])
        q_bar = _weighted(ds, ggk, ggk_rows, k_start, HEAD_SIZE, BLOCK_C, q_bar)
        # P. * E = (T - tau) * dS
        s_bar = (t * scale - tau[:, None]) * ds + p * (y - y_mean[:, None])
        q_bar = _weighted(s_bar, k, k_rows, k_start, HEAD_SIZE, BLOCK_C, q_bar)

    q_bar_rows = (_head(q_bar_ptr, b, n, stride_dqb, stride_dqn, ALIGN), stride_dqs, stride_dqd, num_queries)
    _store(q_bar_rows, q_start, q_bar * scale, HEAD_SIZE, ALIGN)


@triton.jit(do_not_specialize=["num_heads", "reach"])
def _attention_bwd_bwd_kv_kernel(
    ggq_ptr, ggk_ptr, ggv_ptr, grad_out_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, tau_ptr, out_bar_ptr,
    delta_ptr, y_mean_ptr, k_bar_ptr, v_bar_ptr, scale,
    stride_qb, stride_qs, stride_qn, stride_qd, stride_kb, stride_ks, stride_kn, stride_kd, stride_vb, stride_vs, stride_vn, stride_vd,
    stride_dqb, stride_dqs, stride_dqn, stride_dqd, stride_dkb, stride_dks, stride_dkn, stride_dkd,
    stride_dvb, stride_dvs, stride_dvn, stride_dvd,
    num_heads, num_queries, num_keys, reach, HEAD_SIZE: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """K_bar and V_bar of a block of keys, on transposed score tiles, [keys, queries]. out_bar_ptr may be None."""
    k_start, head, b, n = _place(num_keys, num_heads, BLOCK_K)
    o_head, o_stride = (b * num_queries * num_heads + n) * HEAD_SIZE, num_heads * HEAD_SIZE
    q_rows = (_head(q_ptr, b, n, stride_qb, stride_qn, ALIGN), stride_qs, stride_qd, num_queries)
    k_rows = (_head(k_ptr, b, n, stride_kb, stride_kn, ALIGN), stride_ks, stride_kd, num_keys)
    v_rows = (_head(v_ptr, b, n, stride_vb, stride_vn, ALIGN), stride_vs, stride_vd, num_keys)
    ggq_rows = (_head(ggq_ptr, b, n, stride_dqb, stride_dqn, ALIGN), stride_dqs, stride_dqd, num_queries)
    ggk_rows = (_head(ggk_ptr, b, n, stride_dkb, stride_dkn, ALIGN), stride_dks, stride_dkd, num_keys)
    ggv_rows = (_head(ggv_ptr, b, n, stride_dvb, stride_dvn, ALIGN), stride_dvs, stride_dvd, num_keys)
    grad_out_rows = (grad_out_ptr + o_head, o_stride, 1, num_queries)
    out_bar_rows = (out_bar_ptr + o_head if out_bar_ptr is not None else grad_out_ptr, o_stride, 1, num_queries)
    keys = k_start + tl.arange(0, BLOCK_K)
    k = _load(k_rows, k_start, BLOCK_K, BLOCK_D, HEAD_SIZE, ALIGN)
    v = _load(v_rows, k_start, BLOCK_K, BLOCK_D, HEAD_SIZE, ALIGN)
    ggk = _load(ggk_rows, k_start, BLOCK_K, BLOCK_D, HEAD_SIZE, ALIGN)
    ggv = _load(ggv_rows, k_start, BLOCK_K, BLOCK_D, HEAD_SIZE, ALIGN)

    stats = head.to(tl.int64) * num_queries
    k_bar = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    v_bar = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for q_start in range(tl.maximum(k_start - reach, 0) // BLOCK_Q * BLOCK_Q, num_queries, BLOCK_Q):
        rows = q_start + tl.arange(0, BLOCK_Q)
        q = _load(q_rows, q_start, BLOCK_Q, BLOCK_D, HEAD_SIZE, ALIGN)
        ggq = _load(ggq_rows, q_start, BLOCK_Q, BLOCK_D, HEAD_SIZE, ALIGN)
        grad_out = _load(grad_out_rows, q_start, BLOCK_Q, BLOCK_D, HEAD_SIZE, 1)
        lse2 = tl.load(lse_ptr + stats + rows, mask=rows < num_queries, other=float("inf")) * LOG2_E
        seen = keys[:, None] <= (rows + reach)[None, :]
        if BLOCK_C < BLOCK_D:
            s, t, e, y = _products(
                k_rows, ggk_rows, v_rows, ggv_rows, k_start, q_rows, ggq_rows, grad_out_rows, out_bar_rows, q_start,
                HEAD_SIZE, BLOCK_K, BLOCK_Q, BLOCK_C, True, out_bar_ptr is not None,
            )  # fmt: skip
        else:
            s = _dot(k, tl.trans(q))
            t = _dot(ggk, tl.trans(q), _dot(k, tl.trans(ggq)))
            e = _dot(v, tl.trans(grad_out))
            y = _dot(ggv, tl.trans(grad_out))
        p = _probabilities(s, scale, lse2[None, :], seen)
        # Registers are short: row statistics are loaded where they are used, and sums are formed as soon as they can be.
        t = t * scale - tl.load(tau_ptr + stats + rows, mask=rows < num_queries, other=0.0)[None, :]
        v_bar = _weighted(p * t, grad_out, grad_out_rows, q_start, HEAD_SIZE, BLOCK_C, v_bar)
        delta = tl.load(delta_ptr + stats + rows, mask=rows < num_queries, other=0.0)
        ds = p * (e - delta[None, :])
        k_bar = _weighted(ds, ggq, ggq_rows, q_start, HEAD_SIZE, BLOCK_C, k_bar)
        s_bar = t * ds
        if out_bar_ptr is not None:
            out_bar = _load(out_bar_rows, q_start, BLOCK_Q, BLOCK_D, HEAD_SIZE, 1)
            if BLOCK_C == BLOCK_D:
                y = _dot(v, tl.trans(out_bar), y)
            v_bar = _weighted(p, out_bar, out_bar_rows, q_start, HEAD_SIZE, BLOCK_C, v_bar)
        y_mean = tl.load(y_mean_ptr + stats + rows, mask=rows < num_queries, other=0.0)
        s_bar += p * (y - y_mean[None, :])
        k_bar = _weighted(s_bar, q, q_rows, q_start, HEAD_SIZE, BLOCK_C, k_bar)

    k_bar_rows = (_head(k_bar_ptr, b, n, stride_dkb, stride_dkn, ALIGN), stride_dks, stride_dkd, num_keys)
    v_bar_rows = (_head(v_bar_ptr, b, n, stride_dvb, stride_dvn, ALIGN), stride_dvs, stride_dvd, num_keys)
    _store(k_bar_rows, k_start, k_bar * scale, HEAD_SIZE, ALIGN)
    _store(v_bar_rows, k_start, v_bar, HEAD_SIZE, ALIGN)


# BLOCK_Q, BLOCK_K, warps, stages for BLOCK_D = 16, 32, 64 and 128, by kernel and bytes per element; chosen from what the compiler reports
# for sm_90, where none spills, and not yet by timing. 16 bits: four warps, one warp group, per 64 rows, so that a feature map of 64 tokens
# fills its tile, two to four programs share a multiprocessor, and one's exponentials overlap with another's products; 32 rows per step
# where 64 spill. Heads of 128 at second order need the accumulators of eight warps. 32 bits: see _product; the side that is summed over
# in registers is 16 wide, because a thread holds that many operands per row and column.
_SIZES = (16, 32, 64, 128)
_TILES = {
    (_attention_fwd_kernel, 2): ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2)),
    (_attention_bwd_q_kernel, 2): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
    (_attention_bwd_kv_kernel, 2): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (32, 64, 4, 2)),
    (_attention_tan_kernel, 2): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2)),
    (_attention_bwd_bwd_q_kernel, 2): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (128, 32, 8, 2)),
    (_attention_bwd_bwd_kv_kernel, 2): ((64, 64, 4, 2), (64, 64, 4, 2), (32, 64, 4, 2), (16, 128, 8, 2)),
    (_attention_fwd_kernel, 4): ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    (_attention_bwd_q_kernel, 4): ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), (32, 16, 4, 1)),
    (_attention_bwd_kv_kernel, 4): ((16, 32, 4, 1), (16, 32, 4, 1), (16, 32, 4, 1), (16, 32, 8, 1)),
    (_attention_tan_kernel, 4): ((32, 16, 4, 1), (32, 16, 4, 1), (32, 16, 4, 1), (32, 16, 4, 1)),
    (_attention_bwd_bwd_q_kernel, 4): ((32, 16, 4, 1), (32, 16, 4, 1), (64, 16, 8, 1), (32, 16, 8, 1)),
    (_attention_bwd_bwd_kv_kernel, 4): ((16, 32, 4, 1), (16, 32, 4, 1), (16, 32, 4, 1), (16, 32, 8, 1)),
}


def _same_strides(a: Tensor, b: Tensor) -> bool:
    return all(n == 1 or i == j for n, i, j in zip(a.shape, a.stride(), b.stride(), strict=True))


def _within_reach(x: Tensor) -> Tensor:
    """Offsets inside a tile are int32: a view that spreads one over 2^31 elements is copied."""
    return x if MAX_HEAD_SIZE * (x.stride(1) + x.stride(3)) < 2**31 else x.contiguous()


def _laid_out(x: Tensor, primal: Tensor) -> Tensor:
    """A cotangent or tangent in the layout of its primal's gradient, copied only if it has another."""
    like = torch.empty_like(primal, device="meta")
    return x if _same_strides(x, like) else torch.empty_like(primal).copy_(x)


def _aligned(*tensors: Tensor) -> int:
    """How many elements 16-byte accesses take where every row of every tensor starts at a multiple of that, else 1."""
    width = 16 // tensors[0].element_size()
    rows = all(x.stride(3) == 1 and all(n == 1 or i % width == 0 for n, i in zip(x.shape[:3], x.stride(), strict=False)) for x in tensors)
    return width if rows else 1


def _run(kernel: Callable, pointers: tuple, layouts: tuple[Tensor, ...], scale: float, causal: bool, per_query: bool) -> None:
    """Start a kernel with a program per block of queries or of keys; layouts are the tensors whose strides it takes, q, k, v first."""
    q, k = layouts[:2]
    batch, queries, heads, size = q.shape
    keys = k.shape[1]
    block_d = max(16, triton.next_power_of_2(size))
    wide = q.dtype == torch.float32
    columns = 16 if wide else block_d
    if INTERPRETED:  # its time goes with the number of operations, not with their size
        wide, columns = False, min(block_d, 32) if wide else block_d
    block_q, block_k, warps, stages = _TILES[kernel, 4 if wide else 2][_SIZES.index(block_d)]
    blocks = triton.cdiv(queries, block_q) if per_query else triton.cdiv(keys, block_k)
    strides = [i for x in layouts for i in x.stride()]
    # A number, not a flag: one binary serves both, and its bound on the keys costs what that at their end does.
    reach = 0 if causal else 2**30
    launch(
        kernel, (blocks * batch * heads,), *pointers, scale, *strides, heads, queries, keys, reach,
        HEAD_SIZE=size, ALIGN=_aligned(*layouts), BLOCK_Q=block_q, BLOCK_K=block_k, BLOCK_D=block_d,
        BLOCK_C=columns, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """out and lse."""
    q, k, v = (_within_reach(x) for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device)
    _run(_attention_fwd_kernel, (q, k, v, out, lse), (q, k, v), scale, causal, True)
    return out, lse


def attention_bwd(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_q, grad_k, grad_v."""
    q, k, v = (_within_reach(x) for x in (q, k, v))
    grad_out, out, lse = grad_out.contiguous(), out.contiguous(), lse.contiguous()
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    delta = torch.empty_like(lse)
    _run(_attention_bwd_q_kernel, (grad_out, q, k, v, out, lse, dq, delta), (q, k, v, dq), scale, causal, True)
    _run(_attention_bwd_kv_kernel, (grad_out, q, k, v, lse, delta, dk, dv), (q, k, v, dk, dv), scale, causal, False)
    return dq, dk, dv


def attention_tan(
    tq: Tensor, tk: Tensor, tv: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """tout and tau."""
    q, k, v = (_within_reach(x) for x in (q, k, v))
    tq, tk, tv = (_laid_out(x, primal) for x, primal in zip((tq, tk, tv), (q, k, v), strict=True))
    out, lse = out.contiguous(), lse.contiguous()
    tout, tau = torch.empty_like(out), torch.empty_like(lse)
    _run(_attention_tan_kernel, (tq, tk, tv, q, k, v, out, lse, tout, tau), (q, k, v, tq, tk, tv), scale, causal, True)
    return tout, tau


def attention_bwd_bwd(
    ggq: Tensor,
    ggk: Tensor,
    ggv: Tensor,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tout: Tensor,
    tau: Tensor,
    scale: float,
    causal: bool,
    out_bar: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q_bar, k_bar, v_bar."""
    q, k, v = (_within_reach(x) for x in (q, k, v))
    ggq, ggk, ggv = (_laid_out(x, primal) for x, primal in zip((ggq, ggk, ggv), (q, k, v), strict=True))
    grad_out, out, lse, tout, tau = (x.contiguous() for x in (grad_out, out, lse, tout, tau))
    out_bar = None if out_bar is None else out_bar.contiguous()
    q_bar, k_bar, v_bar = (torch.empty_like(x) for x in (q, k, v))
    delta, y_mean = torch.empty_like(lse), torch.empty_like(lse)
    layouts = (q, k, v, ggq, ggk, ggv)
    pointers = (ggq, ggk, ggv, grad_out, q, k, v, out, lse, tout, tau, out_bar, q_bar, delta, y_mean)
    _run(_attention_bwd_bwd_q_kernel, pointers, layouts, scale, causal, True)
    pointers = (ggq, ggk, ggv, grad_out, q, k, v, lse, tau, out_bar, delta, y_mean, k_bar, v_bar)
    _run(_attention_bwd_bwd_kv_kernel, pointers, layouts, scale, causal, False)
    return q_bar, k_bar, v_bar


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every tile, dtype and kind of layout, without and with out_bar. Causal is a run-time number and needs no case of its own."""

    def every_level(x: Tensor, joint: bool) -> None:
        out, lse = attention_fwd(x, x, x, 0.125, False)
        dq, dk, dv = attention_bwd(out, x, x, x, out, lse, 0.125, False)
        tout, tau = attention_tan(dq, dk, dv, x, x, x, out, lse, 0.125, False)
        attention_bwd_bwd(dq, dk, dv, out, x, x, x, out, lse, tout, tau, 0.125, False, out if joint else None)

    def cases(label: str, x: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
        yield label, lambda: every_level(x, False)
        yield f"{label}, out_bar", lambda: every_level(x, True)

    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")):
        for size in _SIZES:
            yield from cases(f"{name} D={size}", torch.empty(2, 50, 3, size, dtype=dtype, device="meta"))
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        yield from cases(f"{name} D=40", torch.empty(2, 50, 3, 40, dtype=dtype, device="meta"))
        feature_map = torch.empty(2, 3, 64, 64, dtype=dtype, device="meta")  # [B, N, D, S]
        yield from cases(f"{name} D=64 tokens inside", feature_map.permute(0, 3, 1, 2))
    # Sizes and strides of 1, which Triton compiles in.
    yield from cases("fp32 D=1, one token", torch.empty(1, 1, 1, 1, device="meta"))
