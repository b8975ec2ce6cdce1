"""Group normalisation with the SiLU that usually follows it.

x_hat = (x - mean) rstd,  h = weight x_hat + bias,  s = sigmoid(h),  f1 = s (1 + h (1 - s)),  f2 = s (1 - s) (2 + h (1 - 2 s)).
Without SiLU f1 = 1 and f2 = 0. M[.] is the mean over a group.

Forward
    y = h s, or h
Backward, with w = grad_y f1, u = weight w, a = M[u], b = M[u x_hat]
    grad_x = rstd (u - a - x_hat b),  grad_weight = sum w x_hat,  grad_bias = sum w
Tangent along t, with c = M[t], e = M[t x_hat]
    x_hat_dot = rstd (t - c - x_hat e),  ty = f1 weight x_hat_dot
Second backward along t = ggx, with q = M[u t], k = grad_y f2
    h_dot = weight x_hat_dot + ggweight x_hat + ggbias,  h_bar = k h_dot + y_bar f1,  v = weight h_bar + ggweight w
    gg_y = f1 h_dot
    x_bar = rstd (v - M[v] - x_hat M[v x_hat]) - rstd^2 (e (u - a) + b (t - c) + x_hat (q - a c - 3 b e))
    weight_bar = sum (x_hat_dot w + h_bar x_hat),  bias_bar = sum h_bar
h_bar is affine in c and e, so one sweep of sums gives every group mean of the second backward, those of v included.

How the work is cut. x is B images of C channels and P positions, with channels or positions innermost. A program takes one group of one
image and walks over it in tiles [BLOCK_C, BLOCK_P]. It sweeps twice, first for the sums, then for the result. The first tile stays in
registers, so that a group of one tile is read once; a larger one is usually still in a cache. Where there are too few groups to fill a
GPU, the positions are split among programs and the two sweeps become two launches, with the sums in a buffer between them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import launch

MAX_SPLITS = tl.constexpr(32)


@triton.jit
def _work(channels, positions, num_groups, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr, BLOCK_P: tl.constexpr):
    """What the program works on: a span (image, end of its channels, all channels, all positions), the first of its channels, the first
    of its tiles of positions and the one after the last."""
    # Dividing and multiplying changes neither size, but tells the compiler that rows start on whole vectors.
    if CHANNELS_LAST:
        channels = channels // VECTOR * VECTOR
    else:
        positions = positions // VECTOR * VECTOR
    size = channels // num_groups
    image = (tl.program_id(0) // num_groups).to(tl.int64)
    c_first = (tl.program_id(0) % num_groups) * size
    c_end = c_first + size
    num_tiles = tl.cdiv(positions, BLOCK_P)
    tiles_per_split = tl.cdiv(num_tiles, tl.num_programs(1))
    first = tl.program_id(1) * tiles_per_split
    last = tl.minimum(first + tiles_per_split, num_tiles)
    if CHANNELS_LAST:  # groups start on whole vectors too
        c_first, c_end = tl.multiple_of(c_first, VECTOR), tl.multiple_of(c_end, VECTOR)
    return (image, c_end, channels, positions), c_first, first, last


@triton.jit
def _inside(span, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Offsets from the first element of a tile, the same in every tile; 32 bits do. [BLOCK_C, BLOCK_P]."""
    _, _, channels, positions = span
    c = tl.arange(0, BLOCK_C)[:, None]
    p = tl.arange(0, BLOCK_P)[None, :]
    return p * channels + c if CHANNELS_LAST else c * positions + p


@triton.jit
def _tile(span, c_begin, tile, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """The offset of a tile's first element, and which of the tile's elements exist. [BLOCK_C, BLOCK_P]."""
    image, c_end, channels, positions = span
    c = c_begin + tl.arange(0, BLOCK_C)
    p_begin = tile * BLOCK_P
    p = p_begin + tl.arange(0, BLOCK_P)
    start = image * channels * positions
    if CHANNELS_LAST:
        start += tl.cast(p_begin, tl.int64) * channels + c_begin
    else:
        start += tl.cast(c_begin, tl.int64) * positions + p_begin
    return start, (c < c_end)[:, None] & (p < positions)[None, :]


@triton.jit
def _load(ptrs, at, mask):
    """A tile of each tensor. `at` is the offset of the tile, a number, and those inside it."""
    start, inside = at
    return [tl.load(ptr + start + inside, mask, other=0.0) for ptr in ptrs]


@triton.jit
def _channel(ptr, c_begin, c_end, BLOCK_C: tl.constexpr):
    """A parameter of the tile's channels. [BLOCK_C, 1]."""
    c = c_begin + tl.arange(0, BLOCK_C)
    return tl.load(ptr + c, c < c_end, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _plus(a, b):
    """Sums of two tuples, item by item."""
    result = ()
    for k in tl.static_range(len(a)):
        result += (a[k] + b[k],)
    return result


@triton.jit
def _totals(values):
    return [tl.sum(value) for value in values]


@triton.jit
def _store_sums(ptr, values):
    """The sums of this split. The buffer is [B, G, number of sums, splits]."""
    for k in tl.static_range(len(values)):
        row = tl.program_id(0).to(tl.int64) * len(values) + k
        tl.store(ptr + row * tl.num_programs(1) + tl.program_id(1), values[k])


@triton.jit
def _load_sums(ptr, NUM: tl.constexpr):
    """NUM sums of every split. [MAX_SPLITS] each, zero where there is no split."""
    split = tl.arange(0, MAX_SPLITS)
    sums = ()
    for k in tl.static_range(NUM):
        row = (tl.program_id(0).to(tl.int64) * NUM + k) * tl.num_programs(1)
        sums += (tl.load(ptr + row + split, split < tl.num_programs(1), other=0.0),)
    return sums


@triton.jit
def _store_channel(ptr, span, c_begin, values, BLOCK_C: tl.constexpr):
    """Sums per channel, [B, splits, C], which the launcher adds up for the gradient of a parameter."""
    image, c_end, channels, _ = span
    c = c_begin + tl.arange(0, BLOCK_C)
    tl.store(ptr + (image * tl.num_programs(1) + tl.program_id(1)) * channels + c, values, c < c_end)


@triton.jit
def _fold(values, CHANNELS_LAST: tl.constexpr):
    """Adds fours of neighbours in memory. One thread holds all four, so tiles are summed without an exchange until the very end."""
    c: tl.constexpr = values.shape[0]
    p: tl.constexpr = values.shape[1]
    return tl.sum(tl.reshape(values, [c // 4, 4, p]), 1) if CHANNELS_LAST else tl.sum(tl.reshape(values, [c, p // 4, 4]), 2)


@triton.jit
def _count(span, c_begin, tile, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """How many elements of a tile exist."""
    _, c_end, _, positions = span
    return tl.minimum(c_end - c_begin, BLOCK_C).to(tl.float32) * tl.minimum(positions - tile * BLOCK_P, BLOCK_P)


@triton.jit
def _moments(x, shift, mask, count):
    """Mean and sum of squared deviations of x - shift at a tile of `count` elements."""
    x = tl.where(mask, x - shift, 0.0)
    mean = tl.sum(x) / count
    d = tl.where(mask, x - mean, 0.0)
    return mean, tl.sum(d * d)


@triton.jit
def _activation(x_hat, gamma, beta, silu):
    """y at a tile."""
    h = x_hat * gamma + beta
    return tl.where(silu, h * tl.sigmoid(h), h)


@triton.jit
def _slopes(x_hat, gamma, beta, silu):
    """f1 and f2 at a tile; the compiler drops the one that is not used."""
    h = x_hat * gamma + beta
    s = tl.sigmoid(h)
    f1 = tl.where(silu, s * (1.0 + h * (1.0 - s)), 1.0)
    return f1, tl.where(silu, s * (1.0 - s) * (2.0 + h * (1.0 - 2.0 * s)), 0.0)


@triton.jit
def _x_hat(x, mask, norm):
    """Normalised x at a tile, 0 outside the mask, so that sums over the tile need no mask of their own."""
    mean, rstd = norm
    # x * rstd - mean * rstd would lose the digits of an x far from zero.
    return tl.where(mask, (x.to(tl.float32) - mean) * rstd, 0.0)


@triton.jit(do_not_specialize=["channels", "positions", "num_groups", "norm_eps"])
def _group_norm_silu_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, sums_ptr,
    channels, positions, num_groups, norm_eps, silu, sums, apply,
    CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    span, c_first, first, last = _work(channels, positions, num_groups, CHANNELS_LAST, VECTOR, BLOCK_P)
    c_end = span[1]
    inside = _inside(span, CHANNELS_LAST, BLOCK_C, BLOCK_P)
    start, mask = _tile(span, c_first, first, CHANNELS_LAST, BLOCK_C, BLOCK_P)
    kept = tl.load(x_ptr + start + inside, mask, other=0.0)

    if sums:
        # A mean far from zero carries the rounding error of a number of its size, too much for differences between means of tiles. So all
        # of them are means of x less the mean of the first tile.
        x = kept.to(tl.float32)
        count = _count(span, c_first, first, BLOCK_C, BLOCK_P)
        shift = tl.sum(x) / count
        mean, m2 = _moments(x, shift, mask, count)
        for c_begin in range(c_first, c_end, BLOCK_C):
            for tile in range(tl.where(c_begin == c_first, first + 1, first), last):
                at, there = _tile(span, c_begin, tile, CHANNELS_LAST, BLOCK_C, BLOCK_P)
                x = tl.load(x_ptr + at + inside, there, other=0.0).to(tl.float32)
                more = _count(span, c_begin, tile, BLOCK_C, BLOCK_P)
                its_mean, its_m2 = _moments(x, shift, there, more)
                # Chan, Golub and LeVeque's rule for the moments of two parts together
                difference = its_mean - mean
                share = more / (count + more)
                m2 += its_m2 + difference * difference * (count * share)
                mean += difference * share
                count += more
    else:
        counts, shifts, means, m2s = _load_sums(sums_ptr, 4)
        shift = tl.load(sums_ptr + (tl.program_id(0).to(tl.int64) * 4 + 1) * tl.num_programs(1))
        means = shifts - shift + means
        count = tl.sum(counts, 0)
        mean = tl.sum(counts * means, 0) / count
        m2 = tl.sum(m2s + counts * (means - mean) * (means - mean), 0)

    if apply:
        mean += shift
        norm = mean, 1.0 / tl.sqrt_rn(m2 / count + norm_eps)
        writes = tl.program_id(1) == 0
        tl.store(mean_ptr + tl.program_id(0), mean, writes)
        tl.store(rstd_ptr + tl.program_id(0), norm[1], writes)
        gamma = _channel(weight_ptr, c_first, c_end, BLOCK_C)
        beta = _channel(bias_ptr, c_first, c_end, BLOCK_C)
        tl.store(y_ptr + start + inside, _activation(_x_hat(kept, mask, norm), gamma, beta, silu), mask)
        for c_begin in range(c_first, c_end, BLOCK_C):
            gamma = _channel(weight_ptr, c_begin, c_end, BLOCK_C)
            beta = _channel(bias_ptr, c_begin, c_end, BLOCK_C)
            for tile in range(tl.where(c_begin == c_first, first + 1, first), last):
                at, there = _tile(span, c_begin, tile, CHANNELS_LAST, BLOCK_C, BLOCK_P)
                x_hat = _x_hat(tl.load(x_ptr + at + inside, there, other=0.0), there, norm)
                tl.store(y_ptr + at + inside, _activation(x_hat, gamma, beta, silu), there)
    else:
        _store_sums(sums_ptr, (count, shift, mean, m2))


@triton.jit
def _slope_and_x_hat(x, dy, mask, norm, parameters, silu):
    """w = grad_y f1 and x_hat at a tile."""
    gamma, beta = parameters
    x_hat = _x_hat(x, mask, norm)
    return dy.to(tl.float32) * _slopes(x_hat, gamma, beta, silu)[0], x_hat


@triton.jit(do_not_specialize=["channels", "positions", "num_groups"])
def _group_norm_silu_bwd_kernel(
    x_ptr, dy_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, dx_ptr, dweight_ptr, dbias_ptr, sums_ptr,
    channels, positions, num_groups, silu, sums, apply,
    CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    span, c_first, first, last = _work(channels, positions, num_groups, CHANNELS_LAST, VECTOR, BLOCK_P)
    c_end = span[1]
    inside = _inside(span, CHANNELS_LAST, BLOCK_C, BLOCK_P)
    start, mask = _tile(span, c_first, first, CHANNELS_LAST, BLOCK_C, BLOCK_P)
    norm = tl.load(mean_ptr + tl.program_id(0)), tl.load(rstd_ptr + tl.program_id(0))
    kept_x, kept_dy = _load((x_ptr, dy_ptr), (start, inside), mask)
    kept_parameters = _channel(weight_ptr, c_first, c_end, BLOCK_C), _channel(bias_ptr, c_first, c_end, BLOCK_C)

    if sums:
        w, x_hat = _slope_and_x_hat(kept_x, kept_dy, mask, norm, kept_parameters, silu)
        a = 0.0
        b = 0.0
        sum_w = tl.sum(w, 1)
        sum_wx = tl.sum(w * x_hat, 1)
        for c_begin in range(c_first, c_end, BLOCK_C):
            parameters = _channel(weight_ptr, c_begin, c_end, BLOCK_C), _channel(bias_ptr, c_begin, c_end, BLOCK_C)
            for tile in range(tl.where(c_begin == c_first, first + 1, first), last):
                at, there = _tile(span, c_begin, tile, CHANNELS_LAST, BLOCK_C, BLOCK_P)
                x, dy = _load((x_ptr, dy_ptr), (at, inside), there)
                w, x_hat = _slope_and_x_hat(x, dy, there, norm, parameters, silu)
                sum_w += tl.sum(w, 1)
                sum_wx += tl.sum(w * x_hat, 1)
            _store_channel(dbias_ptr, span, c_begin, sum_w, BLOCK_C)
            _store_channel(dweight_ptr, span, c_begin, sum_wx, BLOCK_C)
            a += tl.sum(parameters[0] * sum_w[:, None])
            b += tl.sum(parameters[0] * sum_wx[:, None])
            sum_w = tl.zeros_like(sum_w)
            sum_wx = tl.zeros_like(sum_wx)
    else:
        a, b = _totals(_load_sums(sums_ptr, 2))

    if apply:
        size = (channels // num_groups).to(tl.float32) * positions
        a /= size
        b /= size
        w, x_hat = _slope_and_x_hat(kept_x, kept_dy, mask, norm, kept_parameters, silu)
        tl.store(dx_ptr + start + inside, norm[1] * (kept_parameters[0] * w - a - x_hat * b), mask)
        for c_begin in range(c_first, c_end, BLOCK_C):
            parameters = _channel(weight_ptr, c_begin, c_end, BLOCK_C), _channel(bias_ptr, c_begin, c_end, BLOCK_C)
            for tile in range(tl.where(c_begin == c_first, first + 1, first), last):
                at, there = _tile(span, c_begin, tile, CHANNELS_LAST, BLOCK_C, BLOCK_P)
                x, dy = _load((x_ptr, dy_ptr), (at, inside), there)
                w, x_hat = _slope_and_x_hat(x, dy, there, norm, parameters, silu)
                tl.store(dx_ptr + at + inside, norm[1] * (parameters[0] * w - a - x_hat * b), there)
    else:
        _store_sums(sums_ptr, (a, b))


@triton.jit(do_not_specialize=["channels", "positions", "num_groups"])
def _group_norm_silu_tan_kernel(
    x_ptr, tx_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, ty_ptr, sums_ptr,
    channels, positions, num_groups, silu, sums, apply,
    CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    span, c_first, first, last = _work(channels, positions, num_groups, CHANNELS_LAST, VECTOR, BLOCK_P)
    c_end = span[1]
    inside = _inside(span, CHANNELS_LAST, BLOCK_C, BLOCK_P)
    start, mask = _tile(span, c_first, first, CHANNELS_LAST, BLOCK_C, BLOCK_P)
    norm = tl.load(mean_ptr + tl.program_id(0)), tl.load(rstd_ptr + tl.program_id(0))
    kept_x, kept_t = _load((x_ptr, tx_ptr), (start, inside), mask)

    if sums:
        t = kept_t.to(tl.float32)
        c = _fold(t, CHANNELS_LAST)
        e = _fold(t * _x_hat(kept_x, mask, norm), CHANNELS_LAST)
        for c_begin in range(c_first, c_end, BLOCK_C):
            for tile in range(tl.where(c_begin == c_first, first + 1, first), last):
                at, there = _tile(span, c_begin, tile, CHANNELS_LAST, BLOCK_C, BLOCK_P)
                t = tl.load(tx_ptr + at + inside, there, other=0.0).to(tl.float32)
                c += _fold(t, CHANNELS_LAST)
                e += _fold(t * _x_hat(tl.load(x_ptr + at + inside, there, other=0.0), there, norm), CHANNELS_LAST)
        c = tl.sum(c)
        e = tl.sum(e)
    else:
        c, e = _totals(_load_sums(sums_ptr, 2))

    if apply:
        size = (channels // num_groups).to(tl.float32) * positions
        c /= size
        e /= size
        gamma = _channel(weight_ptr, c_first, c_end, BLOCK_C)
        beta = _channel(bias_ptr, c_first, c_end, BLOCK_C)
        x_hat = _x_hat(kept_x, mask, norm)
        h_dot = gamma * norm[1] * (kept_t.to(tl.float32) - c - x_hat * e)
        tl.store(ty_ptr + start + inside, _slopes(x_hat, gamma, beta, silu)[0] * h_dot, mask)
        for c_begin in range(c_first, c_end, BLOCK_C):
            gamma = _channel(weight_ptr, c_begin, c_end, BLOCK_C)
            beta = _channel(bias_ptr, c_begin, c_end, BLOCK_C)
            for tile in range(tl.where(c_begin == c_first, first + 1, first), last):
                at, there = _tile(span, c_begin, tile, CHANNELS_LAST, BLOCK_C, BLOCK_P)
                x_hat = _x_hat(tl.load(x_ptr + at + inside, there, other=0.0), there, norm)
                h_dot = gamma * norm[1] * (tl.load(tx_ptr + at + inside, there, other=0.0).to(tl.float32) - c - x_hat * e)
                tl.store(ty_ptr + at + inside, _slopes(x_hat, gamma, beta, silu)[0] * h_dot, there)
    else:
        _store_sums(sums_ptr, (c, e))


@triton.jit
def _second_tile(ptrs, at, mask, has_y_bar):
    """x, t, grad_y and y_bar at a tile, the last zero where it is absent."""
    x_ptr, ggx_ptr, dy_ptr, y_bar_ptr = ptrs
    x, t, dy = _load((x_ptr, ggx_ptr, dy_ptr), at, mask)
    return x, t, dy, tl.load(y_bar_ptr + at[0] + at[1], mask & has_y_bar, other=0.0)


@triton.jit
def _second_channel(ptrs, c_begin, ends, BLOCK_C: tl.constexpr):
    """weight, bias, ggweight and ggbias of the tile's channels, each up to an end of its own: 0 for one that is absent, so all zeros."""
    weight_ptr, bias_ptr, ggweight_ptr, ggbias_ptr = ptrs
    c_end, ggweight_end, ggbias_end = ends
    return (
        _channel(weight_ptr, c_begin, c_end, BLOCK_C),
        _channel(bias_ptr, c_begin, c_end, BLOCK_C),
        _channel(ggweight_ptr, c_begin, ggweight_end, BLOCK_C),
        _channel(ggbias_ptr, c_begin, ggbias_end, BLOCK_C),
    )


@triton.jit
def _second_sums(tile, mask, norm, parameters, silu, CHANNELS_LAST: tl.constexpr):
    """The twelve sums, folded, from which all group means of the second backward follow: sum_t, sum_tx, sum_u, sum_ux, sum_ut, sum_k,
    sum_kx, sum_kxx, sum_kt, sum_kxt, sum_r, sum_rx.

    Here x = x_hat, u = weight grad_y f1, k = weight^2 grad_y f2, and r is the part of v without c and e.
    """
    x, t, dy, y_bar = tile
    gamma, beta, dd_gamma, dd_beta = parameters
    x = _x_hat(x, mask, norm)
    t = t.to(tl.float32)
    dy = dy.to(tl.float32)
    f1, f2 = _slopes(x, gamma, beta, silu)
    w = dy * f1
    k = dy * f2
    u = gamma * w
    r = gamma * (k * (dd_gamma * x + dd_beta) + y_bar.to(tl.float32) * f1) + dd_gamma * w
    k = gamma * gamma * k
    kx = k * x
    return [_fold(value, CHANNELS_LAST) for value in (t, t * x, u, u * x, u * t, k, kx, kx * x, k * t, kx * t, r, r * x)]


@triton.jit
def _second_results(tile, mask, norm, parameters, silu, means):
    """gg_y and x_bar at a tile, and its sums for weight_bar and bias_bar."""
    x, t, dy, y_bar = tile
    gamma, beta, dd_gamma, dd_beta = parameters
    a, b, c, e, p0, p1, x_coefficient = means
    rstd = norm[1]
    x = _x_hat(x, mask, norm)
    t = t.to(tl.float32) - c
    f1, f2 = _slopes(x, gamma, beta, silu)
    dy = dy.to(tl.float32)
    w = dy * f1
    x_dot = rstd * (t - x * e)
    h_dot = gamma * x_dot + dd_gamma * x + dd_beta
    h_bar = dy * f2 * h_dot + y_bar.to(tl.float32) * f1
    v = gamma * h_bar + dd_gamma * w
    rest = e * (gamma * w - a) + b * t + x * x_coefficient
    x_bar = rstd * (v - p0 - x * p1 - rstd * rest)
    return f1 * h_dot, x_bar, tl.sum(x_dot * w + h_bar * x, 1), tl.sum(h_bar, 1)


@triton.jit(do_not_specialize=["channels", "positions", "num_groups"])
def _group_norm_silu_bwd_bwd_kernel(
    x_ptr, ggx_ptr, dy_ptr, y_bar_ptr, weight_ptr, bias_ptr, ggweight_ptr, ggbias_ptr, mean_ptr, rstd_ptr,
    ggy_ptr, x_bar_ptr, weight_bar_ptr, bias_bar_ptr, sums_ptr,
    channels, positions, num_groups, silu, has_y_bar, has_ggweight, has_ggbias, need_tangent, sums, apply,
    CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    # Optional tensors need no variant of the kernel: run-time flags mask off their loads and stores.
    span, c_first, first, last = _work(channels, positions, num_groups, CHANNELS_LAST, VECTOR, BLOCK_P)
    c_end = span[1]
    inside = _inside(span, CHANNELS_LAST, BLOCK_C, BLOCK_P)
    start, mask = _tile(span, c_first, first, CHANNELS_LAST, BLOCK_C, BLOCK_P)
    norm = tl.load(mean_ptr + tl.program_id(0)), tl.load(rstd_ptr + tl.program_id(0))
    ends = c_end, tl.where(has_ggweight, c_end, 0), tl.where(has_ggbias, c_end, 0)
    tile_ptrs = x_ptr, ggx_ptr, dy_ptr, y_bar_ptr
    channel_ptrs = weight_ptr, bias_ptr, ggweight_ptr, ggbias_ptr
    kept = _second_tile(tile_ptrs, (start, inside), mask, has_y_bar)
    kept_parameters = _second_channel(channel_ptrs, c_first, ends, BLOCK_C)

    if sums:
        folded = _second_sums(kept, mask, norm, kept_parameters, silu, CHANNELS_LAST)
        for c_begin in range(c_first, c_end, BLOCK_C):
            parameters = _second_channel(channel_ptrs, c_begin, ends, BLOCK_C)
            for tile in range(tl.where(c_begin == c_first, first + 1, first), last):
                at, there = _tile(span, c_begin, tile, CHANNELS_LAST, BLOCK_C, BLOCK_P)
                values = _second_tile(tile_ptrs, (at, inside), there, has_y_bar)
                folded = _plus(folded, _second_sums(values, there, norm, parameters, silu, CHANNELS_LAST))
        totals = _totals(folded)
    else:
        totals = _totals(_load_sums(sums_ptr, 12))

    if apply:
        sum_t, sum_tx, sum_u, sum_ux, sum_ut, sum_k, sum_kx, sum_kxx, sum_kt, sum_kxt, sum_r, sum_rx = totals
        size = (channels // num_groups).to(tl.float32) * positions
        a = sum_u / size
        b = sum_ux / size
        c = sum_t / size
        e = sum_tx / size
        # M[v] and M[v x_hat], now that c and e are known
        p0 = (norm[1] * (sum_kt - c * sum_k - e * sum_kx) + sum_r) / size
        p1 = (norm[1] * (sum_kxt - c * sum_kx - e * sum_kxx) + sum_rx) / size
        means = a, b, c, e, p0, p1, sum_ut / size - a * c - 3.0 * b * e

        gg_y, x_bar, weight_bar, bias_bar = _second_results(kept, mask, norm, kept_parameters, silu, means)
        tl.store(ggy_ptr + start + inside, gg_y, mask & need_tangent)
        tl.store(x_bar_ptr + start + inside, x_bar, mask)
        for c_begin in range(c_first, c_end, BLOCK_C):
            parameters = _second_channel(channel_ptrs, c_begin, ends, BLOCK_C)
            for tile in range(tl.where(c_begin == c_first, first + 1, first), last):
                at, there = _tile(span, c_begin, tile, CHANNELS_LAST, BLOCK_C, BLOCK_P)
                values = _second_tile(tile_ptrs, (at, inside), there, has_y_bar)
                gg_y, x_bar, more_weight_bar, more_bias_bar = _second_results(values, there, norm, parameters, silu, means)
                tl.store(ggy_ptr + at + inside, gg_y, there & need_tangent)
                tl.store(x_bar_ptr + at + inside, x_bar, there)
                weight_bar += more_weight_bar
                bias_bar += more_bias_bar
            _store_channel(weight_bar_ptr, span, c_begin, weight_bar, BLOCK_C)
            _store_channel(bias_bar_ptr, span, c_begin, bias_bar, BLOCK_C)
            weight_bar = tl.zeros_like(weight_bar)
            bias_bar = tl.zeros_like(bias_bar)
    else:
        _store_sums(sums_ptr, totals)


@dataclass(frozen=True)
class _Plan:
    """How one call is cut into programs and tiles."""

    channels_last: bool
    vector: int  # elements; rows along the contiguous axis start and end at multiples of it
    block_c: int
    block_p: int
    num_splits: int  # 0 where there is nothing to do
    num_warps: int


ENOUGH_PROGRAMS = 512  # to fill a GPU: about two waves on the largest of today's
TILES_PER_PROGRAM = 4  # at least; for fewer, a second launch does not pay


def _plan(x: Tensor, num_groups: int, num_warps: int) -> _Plan:
    batch, channels = x.shape[:2]
    positions = x.shape[2:].numel()
    size = channels // num_groups
    # Tiles are shaped by which axis is contiguous in memory. Vectors run along it: 16 bytes where its length allows, else one element.
    channels_last, whole = not x.is_contiguous() or positions == 1, 16 // x.element_size()
    if channels_last:
        # Vectors of 4 too, as groups of 4 channels are common. With channels first, few images would use them (6 x 6, 14 x 14 pixels).
        vector = next(width for width in (whole, 4, 1) if size % width == 0)
        block_c = 8 if size <= 8 else 32
    else:
        vector = whole if positions % whole == 0 else 1
        few, rows_of_many = (64, 2) if vector > 1 else (16, 4)
        block_c = 32 if positions <= few else 8 if positions <= 256 else rows_of_many
    elements = 8 if vector > 1 else 4  # per thread: fewer without vectors, where each element's address takes registers of its own
    block_p = max(elements * 32 * num_warps // block_c, 4)  # _fold takes fours
    tiles = -(-positions // block_p)
    wanted = -(-ENOUGH_PROGRAMS // max(batch * num_groups, 1))
    splits = max(min(wanted, tiles, tiles * -(-size // block_c) // TILES_PER_PROGRAM, MAX_SPLITS.value), 1)
    # The kernel rounds the number of tiles per split up, so fewer splits may do; none may be left without a tile.
    splits = -(-tiles // -(-tiles // splits)) if x.numel() else 0
    return _Plan(channels_last, vector, block_c, block_p, splits, num_warps)


def _aligned(value: Tensor) -> Tensor:
    """value, or a copy where its address is no multiple of 16 bytes: kernels are compiled for aligned pointers only."""
    return value.clone() if value.storage_offset() * value.element_size() % 16 else value


def _channels_together(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.movedim(1, -1).is_contiguous()


def _dense(x: Tensor) -> Tensor:
    """x itself where channels or positions lie together, else a contiguous copy."""
    return _aligned(x) if x.is_contiguous() or _channels_together(x) else x.contiguous()


def _like(value: Tensor, x: Tensor) -> Tensor:
    """value in the dtype and the layout of x, which is dense."""
    if value.dtype == x.dtype and (value.is_contiguous() if x.is_contiguous() else _channels_together(value)):
        return _aligned(value)
    return torch.empty_like(x).copy_(value)


def _parameter(value: Tensor) -> Tensor:
    """[C] or [B, G] in float32: one binary for all dtypes of the parameters."""
    return _aligned(value.float().contiguous())


def _launch(
    kernel: triton.JITFunction, plan: _Plan, x: Tensor, num_groups: int, *arguments: Tensor, after: tuple[float | bool, ...]
) -> None:
    """One launch that sweeps twice, or two that sweep once each."""
    sizes = x.shape[1], x.shape[2:].numel(), num_groups
    grid = x.shape[0] * num_groups, plan.num_splits
    tile = {"CHANNELS_LAST": plan.channels_last, "VECTOR": plan.vector, "BLOCK_C": plan.block_c, "BLOCK_P": plan.block_p}
    for sums, apply in [(True, True)] if plan.num_splits == 1 else [(True, False), (False, True)]:
        launch(kernel, grid, x, *arguments, *sizes, *after, sums, apply, num_warps=plan.num_warps, **tile)


def _sums(plan: _Plan, count: int, like: Tensor) -> Tensor:
    """The buffer between two launches, for `like` [B, G]; a single launch does not use it, and `like` stands in."""
    return like if plan.num_splits == 1 else like.new_empty(like.numel() * count * plan.num_splits)


def group_norm_silu_fwd(
    x: Tensor,  # [B, C, ...]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    num_groups: int,
    norm_eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # [B, C, ...], [B, G], [B, G]
    """y; mean and rstd = 1 / sqrt(variance + norm_eps) of each group, float32; both 0 where a group has no elements."""
    x, gamma, beta = _dense(x), _parameter(weight), _parameter(bias)
    plan, y = _plan(x, num_groups, num_warps=8), torch.empty_like(x)
    allocate = torch.empty if plan.num_splits else torch.zeros
    mean, rstd = (allocate(x.shape[0], num_groups, dtype=torch.float32, device=x.device) for _ in range(2))
    arguments = gamma, beta, y, mean, rstd, _sums(plan, 4, mean)
    _launch(_group_norm_silu_fwd_kernel, plan, x, num_groups, *arguments, after=(norm_eps, silu))
    return y, mean, rstd


def group_norm_silu_bwd(
    grad_y: Tensor,  # [B, C, ...]
    x: Tensor,  # [B, C, ...]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    mean: Tensor,  # [B, G]
    rstd: Tensor,  # [B, G]
    num_groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # [B, C, ...], [C], [C]
    """grad_x, grad_weight, grad_bias: the gradient of <grad_y, y>."""
    x, gamma, beta = _dense(x), _parameter(weight), _parameter(bias)
    plan, grad_x = _plan(x, num_groups, num_warps=8), torch.empty_like(x)
    grad_weight, grad_bias = (mean.new_empty(x.shape[0] * plan.num_splits, x.shape[1]) for _ in range(2))
    arguments = _like(grad_y, x), gamma, beta, _parameter(mean), _parameter(rstd), grad_x, grad_weight, grad_bias, _sums(plan, 2, mean)
    _launch(_group_norm_silu_bwd_kernel, plan, x, num_groups, *arguments, after=(silu,))
    return grad_x, grad_weight.sum(0).to(weight.dtype), grad_bias.sum(0).to(bias.dtype)


def group_norm_silu_tan(
    tx: Tensor,  # [B, C, ...]
    x: Tensor,  # [B, C, ...]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    mean: Tensor,  # [B, G]
    rstd: Tensor,  # [B, G]
    num_groups: int,
    silu: bool,
) -> Tensor:  # [B, C, ...]
    """ty: the tangent of y along tx, parameters constant."""
    x, gamma, beta = _dense(x), _parameter(weight), _parameter(bias)
    plan, ty = _plan(x, num_groups, num_warps=4), torch.empty_like(x)
    arguments = _like(tx, x), gamma, beta, _parameter(mean), _parameter(rstd), ty, _sums(plan, 2, mean)
    _launch(_group_norm_silu_tan_kernel, plan, x, num_groups, *arguments, after=(silu,))
    return ty


def group_norm_silu_bwd_bwd(
    ggx: Tensor,  # [B, C, ...]
    ggweight: Tensor | None,  # [C]
    ggbias: Tensor | None,  # [C]
    grad_y: Tensor,  # [B, C, ...]
    x: Tensor,  # [B, C, ...]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    mean: Tensor,  # [B, G]
    rstd: Tensor,  # [B, G]
    num_groups: int,
    silu: bool,
    y_bar: Tensor | None,  # [B, C, ...]
    need_tangent: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:  # [B, C, ...] or None, [B, C, ...], [C], [C]
    """gg_y (None unless need_tangent), x_bar, weight_bar, bias_bar.

    The gradient of <ggx, grad_x> + <ggweight, grad_weight> + <ggbias, grad_bias> + <y_bar, y>, where terms that are None are left out,
    with respect to grad_y, x, weight and bias; the dependence of mean and rstd on x is included.
    """
    x, gamma, beta = _dense(x), _parameter(weight), _parameter(bias)
    plan, x_bar = _plan(x, num_groups, num_warps=4), torch.empty_like(x)
    gg_y = torch.empty_like(x) if need_tangent else None
    weight_bar, bias_bar = (mean.new_empty(x.shape[0] * plan.num_splits, x.shape[1]) for _ in range(2))
    # An absent tensor is never read or written, but its pointer must be valid and of the right type.
    inputs = _like(ggx, x), _like(grad_y, x), x if y_bar is None else _like(y_bar, x)
    parameters = gamma, beta, *(gamma if value is None else _parameter(value) for value in (ggweight, ggbias))
    outputs = x_bar if gg_y is None else gg_y, x_bar, weight_bar, bias_bar
    arguments = *inputs, *parameters, _parameter(mean), _parameter(rstd), *outputs, _sums(plan, 12, mean)
    flags = silu, y_bar is not None, ggweight is not None, ggbias is not None, need_tangent
    _launch(_group_norm_silu_bwd_bwd_kernel, plan, x, num_groups, *arguments, after=flags)
    return gg_y, x_bar, weight_bar.sum(0).to(weight.dtype), bias_bar.sum(0).to(bias.dtype)


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every dtype, layout, tile and vector of `_plan`; the splits and the optional parts choose no binary."""
    # Groups, channels and positions, channels last or not: tile by tile, whole vectors before half ones before none
    first = [(4, 32, positions, False) for positions in (64, 9, 256, 49, 4096, 1023)]
    last = [(4, 4 * size, 256, True) for size in (8, 4, 7, 32, 12, 10)]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for num_groups, channels, positions, channels_last in first + last:

            def call(
                dtype: torch.dtype = dtype,
                num_groups: int = num_groups,
                shape: tuple[int, int, int] = (2, channels, positions),
                channels_last: bool = channels_last,
            ) -> None:
                x = torch.empty(shape, dtype=dtype, device="meta")
                x = x.mT.contiguous().mT if channels_last else x
                weight = torch.empty(shape[1], device="meta")
                _, mean, rstd = group_norm_silu_fwd(x, weight, weight, num_groups, 1e-5, True)
                group_norm_silu_bwd(x, x, weight, weight, mean, rstd, num_groups, True)
                group_norm_silu_tan(x, x, weight, weight, mean, rstd, num_groups, True)
                group_norm_silu_bwd_bwd(x, weight, weight, x, x, weight, weight, mean, rstd, num_groups, True, x, True)

            layout = "channels last" if channels_last else "channels first"
            yield f"{str(dtype)[6:]}, {layout}, C = {channels}, P = {positions}, G = {num_groups}", call
