"""Softmax attention in tiles, forward to second order: no [S_q, S_k] matrix is ever stored, and every sum has one fixed order.

With s = scale, a dot for the tangent along (tq, tk, tv) = (ggq, ggk, ggv), * elementwise, rowsum over the head or the keys:

    attention_fwd      P = softmax(s Q K^T),  O = P V,  lse = (max_j s Q K^T, ln sum_j exp(s Q K^T - max))               2 products
    attention_bwd      D = rowsum(dO * O),  E = dO V^T - D,  dS = P * E,  dQ = s dS K,  dK = s dS^T Q,  dV = P^T dO      3 + 4
    attention_tan      T = s (Q. K^T + Q K.^T),  tau = rowsum(P * T),  O. = (P * T) V + P V. - tau O                     6
    attention_bwd_bwd  P. = P * (T - tau),  Y = dO V.^T + O_bar V^T,  d. = rowsum(dO * O.) + rowsum(O_bar * O),
                       S_bar = P. * E + P * (Y - d.),  Q_bar = s (S_bar K + dS K.),                                      7 (8)
                       K_bar = s (S_bar^T Q + dS^T Q.),  V_bar = P.^T dO + P^T O_bar                                     8 (10)

The products on the right are S_q x S_k x D each, in brackets with O_bar. A gradient in Q comes from a program per block of queries that
runs over the keys, a gradient in K and V from a program per block of keys that runs over the queries: one matrix more than with atomic
sums, and the same bits in every run. The former stores the row sums D and d. for the latter.

The two parts of lse stay apart: rounding their sum would scale a row of P by as much as its largest logit times the precision, and at
second order differences such as T - tau would no longer vanish where they should. attention_tan looks for the largest logit first, which
is one product more. Products run in the dtype of the inputs (float32 as such, not as TF32) and are summed in float32; whatever is the
product of two factors or summed over a row stays in float32 until then.

Layouts: kernels read [B, S, N, D] with contiguous columns (rows), or with contiguous tokens (feature maps, "inside"); every other stride
must be a multiple of 16 bytes, so that no access is narrower. Other tensors are copied, which costs O(S D) beside O(S^2 D), into rows of a
multiple of 16 bytes with zeros at the end. Gradients are laid out as torch.empty_like of their primals; O and its tangent are contiguous.
"""

import math
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ._common import INTERPRETED, launch

MAX_HEAD_SIZE = 128
LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))
# The interpreter multiplies the bits of bfloat16 as integers, and sums products in an order that depends on their shapes and on the
# processor; in float64 the order does not show, so that all kernels see the same logits, whether of Q K^T or of K Q^T.
IN_FLOAT64 = tl.constexpr(INTERPRETED)

# Run-time numbers that no binary depends on. Strides of a tensor: of its samples, of its heads, and of its tokens or, where those lie
# inside, of its columns. They are parameters one by one because do_not_specialize does not reach into a tuple (Triton 3.6 to 3.9).
_NUMBERS = [f"stride_{x}{axis}" for x in ("q", "k", "v", "tq", "tk", "tv", "dq", "dk", "dv") for axis in "bnr"]
_NUMBERS += ["num_heads", "num_queries", "num_keys", "reach"]


@triton.jit
def _place(size, num_heads, num_queries, BLOCK: tl.constexpr):
    """Which block of rows, and of which head of which sample, this program works on, and how many row statistics there are in all."""
    num_blocks = tl.cdiv(size, BLOCK)  # one grid axis: the others end at 65535
    head = (tl.program_id(0) // num_blocks).to(tl.int64)
    num_stats = (tl.num_programs(0) // num_blocks).to(tl.int64) * num_queries
    return (tl.program_id(0) % num_blocks) * BLOCK, head, head // num_heads, head % num_heads, num_stats


@triton.jit
def _rows(ptr, b, n, stride_b, stride_n, stride_r, size, INSIDE: tl.constexpr):
    """A head: its address, the steps between its tokens and between its columns, its length. Strides come in units of 16 bytes."""
    # The compiler sees through a product with a constant, so that all accesses below are 16 bytes wide, whatever the numbers are.
    WIDTH: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    head = ptr + (b * stride_b + n * stride_n) * WIDTH
    if INSIDE:
        return head, 1, stride_r * WIDTH, size // WIDTH * WIDTH
    else:
        return head, stride_r * WIDTH, 1, size


@triton.jit
def _load(x_rows, start, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, HEAD_SIZE: tl.constexpr, column=0):
    """Rows from start on. Zeros beyond the last row and the last column add nothing to any product."""
    ptr, stride_s, stride_d, size = x_rows
    # Offsets inside a tile are int32 and the same for all tiles of a loop, which saves registers.
    columns = column + tl.arange(0, BLOCK_C)
    tile = (tl.arange(0, BLOCK) * stride_s)[:, None] + (columns * stride_d)[None, :]
    mask = (start + tl.arange(0, BLOCK) < size)[:, None]
    if (BLOCK_C - HEAD_SIZE) % BLOCK_C:  # BLOCK_C first: the interpreter cannot divide by the constexpr that a shape is
        mask = mask & (columns < HEAD_SIZE)[None, :]
    return tl.load(ptr + tl.cast(start, tl.int64) * stride_s + tile, mask=mask, other=0.0)


@triton.jit
def _gather(x_rows, places, BLOCK_D: tl.constexpr, HEAD_SIZE: tl.constexpr):
    """The rows at places, all of which exist."""
    ptr, stride_s, stride_d, _ = x_rows
    columns = tl.arange(0, BLOCK_D)
    return tl.load(
        ptr + (places.to(tl.int64) * stride_s)[:, None] + (columns * stride_d)[None, :], mask=(columns < HEAD_SIZE)[None, :], other=0.0
    )


@triton.jit
def _store(x_rows, start, values, HEAD_SIZE: tl.constexpr):
    ptr, stride_s, stride_d, size = x_rows
    # int64 from the start, unlike in _load: offsets that both have in common would occupy registers all along the loop between them.
    tile = (start + tl.arange(0, values.shape[0])).to(tl.int64) * stride_s
    columns = tl.arange(0, values.shape[1])
    mask = (start + tl.arange(0, values.shape[0]) < size)[:, None]
    if values.shape[1] > HEAD_SIZE:
        mask = mask & (columns < HEAD_SIZE)[None, :]
    tl.store(ptr + (tile[:, None] + (columns * stride_d)[None, :]), values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dot(a, b, acc=None):
    if IN_FLOAT64:
        product = tl.dot(a.to(tl.float64), b.to(tl.float64)).to(tl.float32)
        return product if acc is None else acc + product
    else:
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
            part = _load(a_rows, a_start, a.shape[0], BLOCK_C, HEAD_SIZE, column)
            total = _dot(part, tl.trans(_load(b_rows, b_start, b.shape[0], BLOCK_C, HEAD_SIZE, column)), total)
        return total


@triton.jit
def _weighted(p, x, x_rows, x_start, HEAD_SIZE: tl.constexpr, BLOCK_C: tl.constexpr, acc):
    """p x + acc. Where heads do not fit the registers (see _product), x is unused and read again here, whole."""
    if x.shape[1] == BLOCK_C:
        return _dot(p.to(x.dtype), x, acc)
    else:
        return _dot(p, _load(x_rows, x_start, x.shape[0], x.shape[1], HEAD_SIZE), acc)


@triton.jit
def _products(
    a_rows, a_start, b_rows, b_start, HEAD_SIZE: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
    HAS_A3: tl.constexpr, HAS_B3: tl.constexpr,
):  # fmt: skip
    """The four score matrices of the second order between two blocks, in one loop over columns.

    s = a0 b0^T, t = a1 b0^T + a0 b1^T, e = a2 b2^T, y = a2 b3^T + a3 b2^T. One of a and b is the side of queries (Q, its tangent, dO,
    O_bar), the other the side of keys (K, its tangent, V, its tangent). A product with an absent a3 or b3 is left out.
    """
    a0, a1, a2, a3 = a_rows
    b0, b1, b2, b3 = b_rows
    s = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    t = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    e = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    y = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    for column in range(0, HEAD_SIZE, BLOCK_C):
        a = _load(a0, a_start, BLOCK_A, BLOCK_C, HEAD_SIZE, column)
        b = tl.trans(_load(b0, b_start, BLOCK_B, BLOCK_C, HEAD_SIZE, column))
        s = _dot(a, b, s)
        t = _dot(_load(a1, a_start, BLOCK_A, BLOCK_C, HEAD_SIZE, column), b, t)
        t = _dot(a, tl.trans(_load(b1, b_start, BLOCK_B, BLOCK_C, HEAD_SIZE, column)), t)
        a = _load(a2, a_start, BLOCK_A, BLOCK_C, HEAD_SIZE, column)
        b = tl.trans(_load(b2, b_start, BLOCK_B, BLOCK_C, HEAD_SIZE, column))
        e = _dot(a, b, e)
        if HAS_B3:
            y = _dot(a, tl.trans(_load(b3, b_start, BLOCK_B, BLOCK_C, HEAD_SIZE, column)), y)
        if HAS_A3:
            y = _dot(_load(a3, a_start, BLOCK_A, BLOCK_C, HEAD_SIZE, column), b, y)
    return s, t, e, y


@triton.jit
def _row_dot(a, b):
    return tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)


@triton.jit
def _logits(products, scale, seen):
    # The selection keeps the compiler from contracting this product and the subtraction of the maximum that follows into one rounding.
    # So every kernel has the same logits, and those that the maximum was taken of.
    return tl.where(seen, products * scale, float("-inf"))


@triton.jit
def _statistics(head_ptr, rows, num_stats, seen):
    """lse of some queries: the largest logit, and log2 of the sum relative to it; infinity where not seen, which makes P zero."""
    top = tl.load(head_ptr + rows, mask=seen, other=0.0)
    return top, tl.load(head_ptr + num_stats + rows, mask=seen, other=float("inf")) * LOG2_E


@triton.jit
def _probabilities(products, scale, top, log_total, seen):
    """exp(scale products - lse) where seen, else 0."""
    return tl.exp2((_logits(products, scale, seen) - top) * LOG2_E - log_total)


@triton.jit(do_not_specialize=_NUMBERS)
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, scale,
    stride_qb, stride_qn, stride_qr, stride_kb, stride_kn, stride_kr, stride_vb, stride_vn, stride_vr,
    num_heads, num_queries, num_keys, reach, HEAD_SIZE: tl.constexpr, INSIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """O and lse of a block of queries: softmax with a running maximum. Query i sees keys up to i + reach."""
    q_start, head, b, n, num_stats = _place(num_queries, num_heads, num_queries, BLOCK_Q)
    o_head, o_stride = (b * num_queries * num_heads + n) * HEAD_SIZE, num_heads * HEAD_SIZE
    q_rows = _rows(q_ptr, b, n, stride_qb, stride_qn, stride_qr, num_queries, INSIDE)
    k_rows = _rows(k_ptr, b, n, stride_kb, stride_kn, stride_kr, num_keys, INSIDE)
    v_rows = _rows(v_ptr, b, n, stride_vb, stride_vn, stride_vr, num_keys, INSIDE)
    rows = q_start + tl.arange(0, BLOCK_Q)
    q = _load(q_rows, q_start, BLOCK_Q, BLOCK_D, HEAD_SIZE)

    last_seen = tl.minimum(num_keys - 1, rows + reach)  # one bound for the end of the keys and for the diagonal
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for k_start in range(0, tl.minimum(num_keys, q_start + BLOCK_Q + reach), BLOCK_K):
        k = _load(k_rows, k_start, BLOCK_K, BLOCK_D, HEAD_SIZE)
        v = _load(v_rows, k_start, BLOCK_K, BLOCK_D, HEAD_SIZE)
        seen = (k_start + tl.arange(0, BLOCK_K))[None, :] <= last_seen[:, None]
        logits = _logits(_product(q, q_rows, q_start, k, k_rows, k_start, HEAD_SIZE, BLOCK_C), scale, seen)
        new_top = tl.maximum(top, tl.max(logits, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # while all logits of a row are, -inf - -inf would be NaN for good
        p = tl.exp2((logits - shift[:, None]) * LOG2_E)
        shrink = tl.exp2((top - shift) * LOG2_E)
        total = total * shrink + tl.sum(p, 1)
        acc = _weighted(p, v, v_rows, k_start, HEAD_SIZE, BLOCK_C, acc * shrink[:, None])
        top = new_top

    _store((out_ptr + o_head, o_stride, 1, num_queries), q_start, acc / total[:, None], HEAD_SIZE)
    stats = head * num_queries + rows
    tl.store(lse_ptr + stats, top, mask=rows < num_queries)
    tl.store(lse_ptr + num_stats + stats, tl.log2(total) * LN_2, mask=rows < num_queries)


@triton.jit(do_not_specialize=_NUMBERS)
def _attention_bwd_q_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, dq_ptr, delta_ptr, scale,
    stride_qb, stride_qn, stride_qr, stride_kb, stride_kn, stride_kr, stride_vb, stride_vn, stride_vr,
    stride_dqb, stride_dqn, stride_dqr,
    num_heads, num_queries, num_keys, reach, HEAD_SIZE: tl.constexpr, INSIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dQ of a block of queries, and delta = D for the pass over keys."""
    q_start, head, b, n, num_stats = _place(num_queries, num_heads, num_queries, BLOCK_Q)
    o_head, o_stride = (b * num_queries * num_heads + n) * HEAD_SIZE, num_heads * HEAD_SIZE
    q_rows = _rows(q_ptr, b, n, stride_qb, stride_qn, stride_qr, num_queries, INSIDE)
    k_rows = _rows(k_ptr, b, n, stride_kb, stride_kn, stride_kr, num_keys, INSIDE)
    v_rows = _rows(v_ptr, b, n, stride_vb, stride_vn, stride_vr, num_keys, INSIDE)
    grad_out_rows = (grad_out_ptr + o_head, o_stride, 1, num_queries)
    rows = q_start + tl.arange(0, BLOCK_Q)
    stats = head * num_queries + rows
    q = _load(q_rows, q_start, BLOCK_Q, BLOCK_D, HEAD_SIZE)
    grad_out = _load(grad_out_rows, q_start, BLOCK_Q, BLOCK_D, HEAD_SIZE)
    out = _load((out_ptr + o_head, o_stride, 1, num_queries), q_start, BLOCK_Q, BLOCK_D, HEAD_SIZE)
    delta = _row_dot(grad_out, out)
    tl.store(delta_ptr + stats, delta, mask=rows < num_queries)
    top, log_total = _statistics(lse_ptr + head * num_queries, rows, num_stats, rows < num_queries)

    last_seen = tl.minimum(num_keys - 1, rows + reach)
    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for k_start in range(0, tl.minimum(num_keys, q_start + BLOCK_Q + reach), BLOCK_K):
        k = _load(k_rows, k_start, BLOCK_K, BLOCK_D, HEAD_SIZE)
        v = _load(v_rows, k_start, BLOCK_K, BLOCK_D, HEAD_SIZE)
        seen = (k_start + tl.arange(0, BLOCK_K))[None, :] <= last_seen[:, None]
        p = _probabilities(
            _product(q, q_rows, q_start, k, k_rows, k_start, HEAD_SIZE, BLOCK_C), scale, top[:, None], log_total[:, None], seen
        )
        ds = p * (_product(grad_out, grad_out_rows, q_start, v, v_rows, k_start, HEAD_SIZE, BLOCK_C) - delta[:, None])
        dq = _weighted(ds, k, k_rows, k_start, HEAD_SIZE, BLOCK_C, dq)

    dq_rows = _rows(dq_ptr, b, n, stride_dqb, stride_dqn, stride_dqr, num_queries, INSIDE)
    _store(dq_rows, q_start, dq * scale, HEAD_SIZE)


@triton.jit(do_not_specialize=_NUMBERS)
def _attention_bwd_kv_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, scale,
    stride_qb, stride_qn, stride_qr, stride_kb, stride_kn, stride_kr, stride_vb, stride_vn, stride_vr,
    stride_dkb, stride_dkn, stride_dkr, stride_dvb, stride_dvn, stride_dvr,
    num_heads, num_queries, num_keys, reach, HEAD_SIZE: tl.constexpr, INSIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dK and dV of a block of keys. Score tiles are [keys, queries], so that P and dS need no transposition."""
    k_start, head, b, n, num_stats = _place(num_keys, num_heads, num_queries, BLOCK_K)
    o_head, o_stride = (b * num_queries * num_heads + n) * HEAD_SIZE, num_heads * HEAD_SIZE
    q_rows = _rows(q_ptr, b, n, stride_qb, stride_qn, stride_qr, num_queries, INSIDE)
    k_rows = _rows(k_ptr, b, n, stride_kb, stride_kn, stride_kr, num_keys, INSIDE)
    v_rows = _rows(v_ptr, b, n, stride_vb, stride_vn, stride_vr, num_keys, INSIDE)
    grad_out_rows = (grad_out_ptr + o_head, o_stride, 1, num_queries)
    keys = k_start + tl.arange(0, BLOCK_K)
    k = _load(k_rows, k_start, BLOCK_K, BLOCK_D, HEAD_SIZE)
    v = _load(v_rows, k_start, BLOCK_K, BLOCK_D, HEAD_SIZE)

    stats = head * num_queries
    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for q_start in range(tl.maximum(k_start - reach, 0) // BLOCK_Q * BLOCK_Q, num_queries, BLOCK_Q):
        rows = q_start + tl.arange(0, BLOCK_Q)
        q = _load(q_rows, q_start, BLOCK_Q, BLOCK_D, HEAD_SIZE)
        grad_out = _load(grad_out_rows, q_start, BLOCK_Q, BLOCK_D, HEAD_SIZE)
        products = _product(k, k_rows, k_start, q, q_rows, q_start, HEAD_SIZE, BLOCK_C)
        # P is zero in rows beyond the last query. Results of keys beyond the last one are never stored.
        top, log_total = _statistics(lse_ptr + stats, rows, num_stats, rows < num_queries)
        last_seen = tl.where(rows < num_queries, rows + reach, -1)  # nothing for those beyond, whose zeros times infinity would be NaN
        p = _probabilities(products, scale, top[None, :], log_total[None, :], keys[:, None] <= last_seen[None, :])
        dv = _weighted(p, grad_out, grad_out_rows, q_start, HEAD_SIZE, BLOCK_C, dv)
        delta = tl.load(delta_ptr + stats + rows, mask=rows < num_queries, other=0.0)
        ds = p * (_product(v, v_rows, k_start, grad_out, grad_out_rows, q_start, HEAD_SIZE, BLOCK_C) - delta[None, :])
        dk = _weighted(ds, q, q_rows, q_start, HEAD_SIZE, BLOCK_C, dk)

    dk_rows = _rows(dk_ptr, b, n, stride_dkb, stride_dkn, stride_dkr, num_keys, INSIDE)
    dv_rows = _rows(dv_ptr, b, n, stride_dvb, stride_dvn, stride_dvr, num_keys, INSIDE)
    _store(dk_rows, k_start, dk * scale, HEAD_SIZE)
    _store(dv_rows, k_start, dv, HEAD_SIZE)


@triton.jit(do_not_specialize=_NUMBERS)
def _attention_tan_kernel(
    tq_ptr, tk_ptr, tv_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, tout_ptr, tau_ptr, scale,
    stride_qb, stride_qn, stride_qr, stride_kb, stride_kn, stride_kr, stride_vb, stride_vn, stride_vr,
    stride_tqb, stride_tqn, stride_tqr, stride_tkb, stride_tkn, stride_tkr, stride_tvb, stride_tvn, stride_tvr,
    num_heads, num_queries, num_keys, reach, HEAD_SIZE: tl.constexpr, INSIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Tangent of O and tau of a block of queries; tau enters linearly, so it is subtracted at the end.

    A large part of T common to all keys would cost the differences their digits. So T of the key with the largest logit, found in a
    first sweep, is subtracted from all. Where that key has all the weight, the difference is exactly zero.
    """
    q_start, head, b, n, num_stats = _place(num_queries, num_heads, num_queries, BLOCK_Q)
    o_head, o_stride = (b * num_queries * num_heads + n) * HEAD_SIZE, num_heads * HEAD_SIZE
    q_rows = _rows(q_ptr, b, n, stride_qb, stride_qn, stride_qr, num_queries, INSIDE)
    k_rows = _rows(k_ptr, b, n, stride_kb, stride_kn, stride_kr, num_keys, INSIDE)
    v_rows = _rows(v_ptr, b, n, stride_vb, stride_vn, stride_vr, num_keys, INSIDE)
    tq_rows = _rows(tq_ptr, b, n, stride_tqb, stride_tqn, stride_tqr, num_queries, INSIDE)
    tk_rows = _rows(tk_ptr, b, n, stride_tkb, stride_tkn, stride_tkr, num_keys, INSIDE)
    tv_rows = _rows(tv_ptr, b, n, stride_tvb, stride_tvn, stride_tvr, num_keys, INSIDE)
    rows = q_start + tl.arange(0, BLOCK_Q)
    stats = head * num_queries + rows
    q = _load(q_rows, q_start, BLOCK_Q, BLOCK_D, HEAD_SIZE)
    tq = _load(tq_rows, q_start, BLOCK_Q, BLOCK_D, HEAD_SIZE)
    top, log_total = _statistics(lse_ptr + head * num_queries, rows, num_stats, rows < num_queries)

    last_seen = tl.minimum(num_keys - 1, rows + reach)
    largest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    best = tl.zeros([BLOCK_Q], tl.int32)
    for k_start in range(0, tl.minimum(num_keys, q_start + BLOCK_Q + reach), BLOCK_K):
        k = _load(k_rows, k_start, BLOCK_K, BLOCK_D, HEAD_SIZE)
        keys = (k_start + tl.arange(0, BLOCK_K))[None, :]
        logits = _logits(_product(q, q_rows, q_start, k, k_rows, k_start, HEAD_SIZE, BLOCK_C), scale, keys <= last_seen[:, None])
        block_largest = tl.max(logits, 1)
        block_best = tl.max(tl.where(logits == block_largest[:, None], keys, 0), 1)
        best = tl.where(block_largest > largest, block_best, best)
        largest = tl.maximum(largest, block_largest)
    shift = scale * (_row_dot(tq, _gather(k_rows, best, BLOCK_D, HEAD_SIZE)) + _row_dot(q, _gather(tk_rows, best, BLOCK_D, HEAD_SIZE)))

    tau = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for k_start in range(0, tl.minimum(num_keys, q_start + BLOCK_Q + reach), BLOCK_K):
        k = _load(k_rows, k_start, BLOCK_K, BLOCK_D, HEAD_SIZE)
        tk = _load(tk_rows, k_start, BLOCK_K, BLOCK_D, HEAD_SIZE)
        v = _load(v_rows, k_start, BLOCK_K, BLOCK_D, HEAD_SIZE)
        tv = _load(tv_rows, k_start, BLOCK_K, BLOCK_D, HEAD_SIZE)
        seen = (k_start + tl.arange(0, BLOCK_K))[None, :] <= last_seen[:, None]
        p = _probabilities(
            _product(q, q_rows, q_start, k, k_rows, k_start, HEAD_SIZE, BLOCK_C), scale, top[:, None], log_total[:, None], seen
        )
        t = _product(tq, tq_rows, q_start, k, k_rows, k_start, HEAD_SIZE, BLOCK_C)
        pt = p * (_product(q, q_rows, q_start, tk, tk_rows, k_start, HEAD_SIZE, BLOCK_C, t) * scale - shift[:, None])
        tau += tl.sum(pt, 1)
        acc = _weighted(pt, v, v_rows, k_start, HEAD_SIZE, BLOCK_C, acc)
        acc = _weighted(p, tv, tv_rows, k_start, HEAD_SIZE, BLOCK_C, acc)

    out = _load((out_ptr + o_head, o_stride, 1, num_queries), q_start, BLOCK_Q, BLOCK_D, HEAD_SIZE)
    acc -= tau[:, None] * out.to(tl.float32)
    _store((tout_ptr + o_head, o_stride, 1, num_queries), q_start, acc, HEAD_SIZE)
    tl.store(tau_ptr + stats, tau + shift, mask=rows < num_queries)


@triton.jit(do_not_specialize=_NUMBERS)
def _attention_bwd_bwd_q_kernel(
    ggq_ptr, ggk_ptr, ggv_ptr, grad_out_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, tout_ptr, tau_ptr, out_bar_ptr,
    q_bar_ptr, delta_ptr, y_mean_ptr, scale,
    stride_qb, stride_qn, stride_qr, stride_kb, stride_kn, stride_kr, stride_vb, stride_vn, stride_vr,
    stride_tqb, stride_tqn, stride_tqr, stride_tkb, stride_tkn, stride_tkr, stride_tvb, stride_tvn, stride_tvr,
    stride_dqb, stride_dqn, stride_dqr, num_heads, num_queries, num_keys, reach, HEAD_SIZE: tl.constexpr, INSIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Q_bar of a block of queries, and delta = D and y_mean = d. for the pass over keys. out_bar_ptr may be None."""
    q_start, head, b, n, num_stats = _place(num_queries, num_heads, num_queries, BLOCK_Q)
    o_head, o_stride = (b * num_queries * num_heads + n) * HEAD_SIZE, num_heads * HEAD_SIZE
    q_rows = _rows(q_ptr, b, n, stride_qb, stride_qn, stride_qr, num_queries, INSIDE)
    k_rows = _rows(k_ptr, b, n, stride_kb, stride_kn, stride_kr, num_keys, INSIDE)
    v_rows = _rows(v_ptr, b, n, stride_vb, stride_vn, stride_vr, num_keys, INSIDE)
    ggq_rows = _rows(ggq_ptr, b, n, stride_tqb, stride_tqn, stride_tqr, num_queries, INSIDE)
    ggk_rows = _rows(ggk_ptr, b, n, stride_tkb, stride_tkn, stride_tkr, num_keys, INSIDE)
    ggv_rows = _rows(ggv_ptr, b, n, stride_tvb, stride_tvn, stride_tvr, num_keys, INSIDE)
    grad_out_rows = (grad_out_ptr + o_head, o_stride, 1, num_queries)
    rows = q_start + tl.arange(0, BLOCK_Q)
    stats = head * num_queries + rows
    q = _load(q_rows, q_start, BLOCK_Q, BLOCK_D, HEAD_SIZE)
    ggq = _load(ggq_rows, q_start, BLOCK_Q, BLOCK_D, HEAD_SIZE)
    grad_out = _load(grad_out_rows, q_start, BLOCK_Q, BLOCK_D, HEAD_SIZE)
    out = _load((out_ptr + o_head, o_stride, 1, num_queries), q_start, BLOCK_Q, BLOCK_D, HEAD_SIZE)
    delta = _row_dot(grad_out, out)
    tout = _load((tout_ptr + o_head, o_stride, 1, num_queries), q_start, BLOCK_Q, BLOCK_D, HEAD_SIZE)
    y_mean = _row_dot(grad_out, tout)
    out_bar_rows = (out_bar_ptr + o_head if out_bar_ptr is not None else grad_out_ptr, o_stride, 1, num_queries)
    if out_bar_ptr is not None:
        out_bar = _load(out_bar_rows, q_start, BLOCK_Q, BLOCK_D, HEAD_SIZE)
        y_mean += _row_dot(out_bar, out)
    tl.store(delta_ptr + stats, delta, mask=rows < num_queries)
    tl.store(y_mean_ptr + stats, y_mean, mask=rows < num_queries)
    top, log_total = _statistics(lse_ptr + head * num_queries, rows, num_stats, rows < num_queries)
    tau = tl.load(tau_ptr + stats, mask=rows < num_queries, other=0.0)

    last_seen = tl.minimum(num_keys - 1, rows + reach)
    q_bar = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for k_start in range(0, tl.minimum(num_keys, q_start + BLOCK_Q + reach), BLOCK_K):
        k = _load(k_rows, k_start, BLOCK_K, BLOCK_D, HEAD_SIZE)
        ggk = _load(ggk_rows, k_start, BLOCK_K, BLOCK_D, HEAD_SIZE)
        v = _load(v_rows, k_start, BLOCK_K, BLOCK_D, HEAD_SIZE)
        ggv = _load(ggv_rows, k_start, BLOCK_K, BLOCK_D, HEAD_SIZE)
        seen = (k_start + tl.arange(0, BLOCK_K))[None, :] <= last_seen[:, None]
        if BLOCK_C < BLOCK_D:
            s, t, e, y = _products(
                (q_rows, ggq_rows, grad_out_rows, out_bar_rows), q_start, (k_rows, ggk_rows, v_rows, ggv_rows), k_start,
                HEAD_SIZE, BLOCK_Q, BLOCK_K, BLOCK_C, out_bar_ptr is not None, True,
            )  # fmt: skip
        else:
            s = _dot(q, tl.trans(k))
            t = _dot(q, tl.trans(ggk), _dot(ggq, tl.trans(k)))
            e = _dot(grad_out, tl.trans(v))
            y = _dot(grad_out, tl.trans(ggv))
            if out_bar_ptr is not None:
                y = _dot(out_bar, tl.trans(v), y)
        p = _probabilities(s, scale, top[:, None], log_total[:, None], seen)
        ds = p * (e - delta[:, None])
        q_bar = _weighted(ds, ggk, ggk_rows, k_start, HEAD_SIZE, BLOCK_C, q_bar)
        # P. * E = (T - tau) * dS
        s_bar = (t * scale - tau[:, None]) * ds + p * (y - y_mean[:, None])
        q_bar = _weighted(s_bar, k, k_rows, k_start, HEAD_SIZE, BLOCK_C, q_bar)

    q_bar_rows = _rows(q_bar_ptr, b, n, stride_dqb, stride_dqn, stride_dqr, num_queries, INSIDE)
    _store(q_bar_rows, q_start, q_bar * scale, HEAD_SIZE)


@triton.jit(do_not_specialize=_NUMBERS)
def _attention_bwd_bwd_kv_kernel(
    ggq_ptr, ggk_ptr, ggv_ptr, grad_out_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, tau_ptr, out_bar_ptr,
    delta_ptr, y_mean_ptr, k_bar_ptr, v_bar_ptr, scale,
    stride_qb, stride_qn, stride_qr, stride_kb, stride_kn, stride_kr, stride_vb, stride_vn, stride_vr,
    stride_tqb, stride_tqn, stride_tqr, stride_tkb, stride_tkn, stride_tkr, stride_tvb, stride_tvn, stride_tvr,
    stride_dkb, stride_dkn, stride_dkr, stride_dvb, stride_dvn, stride_dvr,
    num_heads, num_queries, num_keys, reach, HEAD_SIZE: tl.constexpr, INSIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """K_bar and V_bar of a block of keys, on score tiles [keys, queries]. out_bar_ptr may be None."""
    k_start, head, b, n, num_stats = _place(num_keys, num_heads, num_queries, BLOCK_K)
    o_head, o_stride = (b * num_queries * num_heads + n) * HEAD_SIZE, num_heads * HEAD_SIZE
    q_rows = _rows(q_ptr, b, n, stride_qb, stride_qn, stride_qr, num_queries, INSIDE)
    k_rows = _rows(k_ptr, b, n, stride_kb, stride_kn, stride_kr, num_keys, INSIDE)
    v_rows = _rows(v_ptr, b, n, stride_vb, stride_vn, stride_vr, num_keys, INSIDE)
    ggq_rows = _rows(ggq_ptr, b, n, stride_tqb, stride_tqn, stride_tqr, num_queries, INSIDE)
    ggk_rows = _rows(ggk_ptr, b, n, stride_tkb, stride_tkn, stride_tkr, num_keys, INSIDE)
    ggv_rows = _rows(ggv_ptr, b, n, stride_tvb, stride_tvn, stride_tvr, num_keys, INSIDE)
    grad_out_rows = (grad_out_ptr + o_head, o_stride, 1, num_queries)
    out_bar_rows = (out_bar_ptr + o_head if out_bar_ptr is not None else grad_out_ptr, o_stride, 1, num_queries)
    keys = k_start + tl.arange(0, BLOCK_K)
    k = _load(k_rows, k_start, BLOCK_K, BLOCK_D, HEAD_SIZE)
    v = _load(v_rows, k_start, BLOCK_K, BLOCK_D, HEAD_SIZE)
    ggk = _load(ggk_rows, k_start, BLOCK_K, BLOCK_D, HEAD_SIZE)
    ggv = _load(ggv_rows, k_start, BLOCK_K, BLOCK_D, HEAD_SIZE)

    stats = head * num_queries
    k_bar = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    v_bar = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for q_start in range(tl.maximum(k_start - reach, 0) // BLOCK_Q * BLOCK_Q, num_queries, BLOCK_Q):
        rows = q_start + tl.arange(0, BLOCK_Q)
        q = _load(q_rows, q_start, BLOCK_Q, BLOCK_D, HEAD_SIZE)
        ggq = _load(ggq_rows, q_start, BLOCK_Q, BLOCK_D, HEAD_SIZE)
        grad_out = _load(grad_out_rows, q_start, BLOCK_Q, BLOCK_D, HEAD_SIZE)
        top, log_total = _statistics(lse_ptr + stats, rows, num_stats, rows < num_queries)
        seen = keys[:, None] <= (rows + reach)[None, :]
        if BLOCK_C < BLOCK_D:
            s, t, e, y = _products(
                (k_rows, ggk_rows, v_rows, ggv_rows), k_start, (q_rows, ggq_rows, grad_out_rows, out_bar_rows), q_start,
                HEAD_SIZE, BLOCK_K, BLOCK_Q, BLOCK_C, True, out_bar_ptr is not None,
            )  # fmt: skip
        else:
            s = _dot(k, tl.trans(q))
            t = _dot(ggk, tl.trans(q), _dot(k, tl.trans(ggq)))
            e = _dot(v, tl.trans(grad_out))
            y = _dot(ggv, tl.trans(grad_out))
        p = _probabilities(s, scale, top[None, :], log_total[None, :], seen)
        # To save registers, row statistics are loaded where they are used, and sums are formed as early as possible.
        t = t * scale - tl.load(tau_ptr + stats + rows, mask=rows < num_queries, other=0.0)[None, :]
        v_bar = _weighted(p * t, grad_out, grad_out_rows, q_start, HEAD_SIZE, BLOCK_C, v_bar)
        delta = tl.load(delta_ptr + stats + rows, mask=rows < num_queries, other=0.0)
        ds = p * (e - delta[None, :])
        k_bar = _weighted(ds, ggq, ggq_rows, q_start, HEAD_SIZE, BLOCK_C, k_bar)
        s_bar = t * ds
        if out_bar_ptr is not None:
            out_bar = _load(out_bar_rows, q_start, BLOCK_Q, BLOCK_D, HEAD_SIZE)
            if BLOCK_C == BLOCK_D:
                y = _dot(v, tl.trans(out_bar), y)
            v_bar = _weighted(p, out_bar, out_bar_rows, q_start, HEAD_SIZE, BLOCK_C, v_bar)
        y_mean = tl.load(y_mean_ptr + stats + rows, mask=rows < num_queries, other=0.0)
        s_bar += p * (y - y_mean[None, :])
        k_bar = _weighted(s_bar, q, q_rows, q_start, HEAD_SIZE, BLOCK_C, k_bar)

    k_bar_rows = _rows(k_bar_ptr, b, n, stride_dkb, stride_dkn, stride_dkr, num_keys, INSIDE)
    v_bar_rows = _rows(v_bar_ptr, b, n, stride_dvb, stride_dvn, stride_dvr, num_keys, INSIDE)
    _store(k_bar_rows, k_start, k_bar * scale, HEAD_SIZE)
    _store(v_bar_rows, k_start, v_bar, HEAD_SIZE)


# BLOCK_Q, BLOCK_K, warps, stages for BLOCK_D = 16, 32, 64 and 128, by kernel and bits per element. Chosen by what the compiler reports for
# sm_90, where none spills, not by timing.
# 16 bits: four warps (one warp group) per 64 rows, so that a feature map of 64 tokens fills its tile, and two to four programs share a
# multiprocessor, the exponentials of one overlapping with the products of another. 32 rows per step where 64 would spill. Heads of 128 at
# second order need the accumulators of eight warps.
# 32 bits (see _product): the side that is summed over in registers is 16 wide, as a thread holds that many operands per row and column.
_SIZES = (16, 32, 64, 128)
_TILES = {
    ("fwd", 16): ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2)),
    ("bwd_q", 16): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
    ("bwd_kv", 16): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (32, 128, 8, 2)),
    ("tan", 16): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2)),
    ("bwd_bwd_q", 16): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (128, 32, 8, 2)),
    ("bwd_bwd_kv", 16): ((64, 64, 4, 2), (64, 64, 4, 2), (32, 64, 4, 2), (16, 128, 8, 2)),
    ("fwd", 32): ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    ("bwd_q", 32): ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), (32, 16, 4, 1)),
    ("bwd_kv", 32): ((16, 32, 4, 1), (16, 32, 4, 1), (16, 32, 4, 1), (16, 16, 8, 1)),
    ("tan", 32): ((32, 16, 4, 1), (32, 16, 4, 1), (32, 16, 4, 1), (32, 16, 4, 1)),
    ("bwd_bwd_q", 32): ((64, 16, 8, 1), (32, 32, 8, 1), (64, 16, 8, 1), (16, 16, 4, 1)),
    ("bwd_bwd_kv", 32): ((16, 32, 4, 1), (16, 32, 4, 1), (16, 32, 4, 1), (16, 32, 8, 1)),
}
_KERNELS = {
    "fwd": _attention_fwd_kernel,
    "bwd_q": _attention_bwd_q_kernel,
    "bwd_kv": _attention_bwd_kv_kernel,
    "tan": _attention_tan_kernel,
    "bwd_bwd_q": _attention_bwd_bwd_q_kernel,
    "bwd_bwd_kv": _attention_bwd_bwd_kv_kernel,
}


def _starts_aligned(x: Tensor) -> bool:
    """Tensors without data, which are asked for shapes alone, count as aligned."""
    return x.is_meta or isinstance(x, FakeTensor) or x.data_ptr() % 16 == 0


def _readable(x: Tensor, inside: bool) -> bool:
    """Whether kernels take x where it lies: one stride is 1, and all else is a multiple of 16 bytes, so that no access is narrower."""
    width = 16 // x.element_size()
    unit = 1 if inside else 3
    steps = [i for dim, (n, i) in enumerate(zip(x.shape, x.stride(), strict=True)) if dim != unit and n > 1]
    return (
        x.stride(unit) == 1
        and all(n % width == 0 for n in (x.shape[3], x.shape[unit], *steps))
        and MAX_HEAD_SIZE * x.stride(4 - unit) < 2**31  # offsets inside a tile are int32
        and _starts_aligned(x)
    )


def _room(x: Tensor, inside: bool) -> Tensor:
    """Uninitialised memory of the shape of x that kernels can use; heads may be padded with extra columns."""
    batch, tokens, heads, size = x.shape
    if inside:
        return x.new_empty(batch, heads, size, tokens).permute(0, 3, 1, 2)
    width = 16 // x.element_size()
    return x.new_empty(batch, tokens, heads, triton.cdiv(size, width) * width)


def _operand(x: Tensor, inside: bool = False, dense: bool = True) -> Tensor:
    """x, or a copy of it where kernels cannot read it: O(S D) before O(S^2 D). Extra columns are zeros, which add nothing."""
    if _readable(x, inside) and (not dense or x.is_contiguous()):
        return x
    room = _room(x, inside)
    room[..., : x.shape[3]] = x
    room[..., x.shape[3] :] = 0
    return room


def _operands(*tensors: Tensor) -> tuple[bool, list[Tensor]]:
    """Whether tokens lie inside in all of q, k and v; these, and the tangents that may follow them, all in that layout or all in rows."""
    inside = all(_readable(x, True) for x in tensors[:3])
    return inside, [_operand(x, inside, dense=False) for x in tensors]


def _per_query(x: Tensor) -> Tensor:
    """Row statistics, contiguous."""
    x = x.contiguous()
    return x if _starts_aligned(x) else x.clone()


def _gradient(primal: Tensor, inside: bool) -> Tensor:
    """Where a kernel writes the gradient of primal: the tensor to return, where kernels can write one laid out like primal."""
    return torch.empty_like(primal) if _readable(torch.empty_like(primal, device="meta"), inside) else _room(primal, inside)


def _returned(result: Tensor, primal: Tensor) -> Tensor:
    """A gradient laid out as torch.empty_like of its primal."""
    like = torch.empty_like(primal, device="meta")
    if result.shape == like.shape and result.stride() == like.stride():
        return result
    return torch.empty_like(primal).copy_(result[..., : primal.shape[3]])


def _run(part: str, pointers: tuple, layouts: tuple[Tensor, ...], inside: bool, scale: float, causal: bool) -> None:
    """Start a kernel with a program per block of queries or of keys; layouts are the tensors whose strides it takes, q, k, v first."""
    q, k = layouts[:2]
    batch, queries, heads, size = q.shape
    keys = k.shape[1]
    block_d = max(16, triton.next_power_of_2(size))
    wide = q.dtype == torch.float32
    columns = 16 if wide else block_d
    if INTERPRETED:  # its time grows with the number of operations, not with their size
        wide, columns = False, min(block_d, 32) if wide else block_d
    block_q, block_k, num_warps, num_stages = _TILES[part, 32 if wide else 16][_SIZES.index(block_d)]
    blocks = triton.cdiv(keys, block_k) if part.endswith("kv") else triton.cdiv(queries, block_q)
    width = 16 // q.element_size()
    strides = [x.stride(dim) // width for x in layouts for dim in (0, 2, 3 if inside else 1)]
    # A run-time number, so that one binary serves both. It only moves the bound at the end of the keys, which is needed anyway.
    reach = 0 if causal else 2**30
    launch(
        _KERNELS[part], (blocks * batch * heads,), *pointers, scale, *strides, heads, queries, keys, reach,
        HEAD_SIZE=size, INSIDE=inside, BLOCK_D=block_d, BLOCK_C=columns,
        BLOCK_Q=block_q, BLOCK_K=block_k, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """out and lse."""
    size = q.shape[3]
    inside, (q, k, v) = _operands(q, k, v)
    out = _room(q, False)
    lse = torch.empty((2, q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device)
    _run("fwd", (q, k, v, out, lse), (q, k, v), inside, scale, causal)
    return out[..., :size].contiguous(), lse


def attention_bwd(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_q, grad_k, grad_v."""
    primals = q, k, v
    inside, (q, k, v) = _operands(*primals)
    grad_out, out, lse = _operand(grad_out), _operand(out), _per_query(lse)
    dq, dk, dv = (_gradient(x, inside) for x in primals)
    delta = torch.empty(lse.shape[1:], dtype=lse.dtype, device=lse.device)
    _run("bwd_q", (grad_out, q, k, v, out, lse, dq, delta), (q, k, v, dq), inside, scale, causal)
    _run("bwd_kv", (grad_out, q, k, v, lse, delta, dk, dv), (q, k, v, dk, dv), inside, scale, causal)
    return _returned(dq, primals[0]), _returned(dk, primals[1]), _returned(dv, primals[2])


def attention_tan(
    tq: Tensor, tk: Tensor, tv: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """tout and tau."""
    size = q.shape[3]
    inside, (q, k, v, tq, tk, tv) = _operands(q, k, v, tq, tk, tv)
    out, lse = _operand(out), _per_query(lse)
    tout, tau = torch.empty_like(out), torch.empty(lse.shape[1:], dtype=lse.dtype, device=lse.device)
    pointers = (tq, tk, tv, q, k, v, out, lse, tout, tau)
    _run("tan", pointers, (q, k, v, tq, tk, tv), inside, scale, causal)
    return tout[..., :size].contiguous(), tau


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
    primals = q, k, v
    inside, operands = _operands(q, k, v, ggq, ggk, ggv)
    q, k, v, ggq, ggk, ggv = operands
    grad_out, out, tout = _operand(grad_out), _operand(out), _operand(tout)
    lse, tau = _per_query(lse), _per_query(tau)
    out_bar = None if out_bar is None else _operand(out_bar)
    q_bar, k_bar, v_bar = (_gradient(x, inside) for x in primals)
    delta, y_mean = torch.empty_like(tau), torch.empty_like(tau)
    pointers = (ggq, ggk, ggv, grad_out, q, k, v, out, lse, tout, tau, out_bar, q_bar, delta, y_mean)
    _run("bwd_bwd_q", pointers, (*operands, q_bar), inside, scale, causal)
    pointers = (ggq, ggk, ggv, grad_out, q, k, v, lse, tau, out_bar, delta, y_mean, k_bar, v_bar)
    _run("bwd_bwd_kv", pointers, (*operands, k_bar, v_bar), inside, scale, causal)
    return _returned(q_bar, primals[0]), _returned(k_bar, primals[1]), _returned(v_bar, primals[2])


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every tile, dtype and layout, without and with out_bar; strides, lengths and causal are run-time numbers and need no case.

    Heads that fill their tile and heads that do not differ by a mask; each tile meets both, in one layout or the other.
    """

    def all_launchers(x: Tensor, joint: bool) -> None:
        out, lse = attention_fwd(x, x, x, 0.125, False)
        dq, dk, dv = attention_bwd(out, x, x, x, out, lse, 0.125, False)
        tout, tau = attention_tan(dq, dk, dv, x, x, x, out, lse, 0.125, False)
        attention_bwd_bwd(dq, dk, dv, out, x, x, x, out, lse, tout, tau, 0.125, False, out if joint else None)

    def cases(label: str, x: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
        yield label, lambda: all_launchers(x, False)
        yield f"{label}, out_bar", lambda: all_launchers(x, True)

    masked = (8, 24, 40, 96)
    for dtype, name, in_rows, inside in (
        (torch.bfloat16, "bf16", _SIZES, masked),
        (torch.float16, "fp16", masked, _SIZES),
        (torch.float32, "fp32", masked, _SIZES),
    ):
        for size in in_rows:
            yield from cases(f"{name} D={size}", torch.empty(2, 50, 3, size, dtype=dtype, device="meta"))
        for size in inside:
            feature_map = torch.empty(2, 3, size, 48, dtype=dtype, device="meta")  # [B, N, D, S]
            yield from cases(f"{name} D={size}, tokens inside", feature_map.permute(0, 3, 1, 2))
