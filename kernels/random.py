"""Counter-based random numbers on the device: the words, uniforms and normals of `sami_fast.reference.random`, bit for bit.

    quad   = sample_index * ceil(size / 4) + element // 4        counter words 0, 1 (low, high)
    offset = step * NUM_STREAMS + stream                         counter words 2, 3 (low, high)
    key    = seed                                                key words 0, 1 (low, high)

Philox4x32-10 makes four words of a quad, Box-Muller two normals of two words. Equality of the bits needs `fp_fusion=False` in every
launch, since a contracted product and sum rounds once instead of twice, and `tl.sqrt_rn` and `tl.div_rn`, the correctly rounded forms.

Seed and offset travel as 32-bit words that Triton specialises neither on value nor on alignment: no step compiles anything anew.
Nothing here is differentiable.
"""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import launch

NUM_STREAMS = 16  # the number and the two streams below repeat `sami_fast.reference.random`, which this package does not import
STREAM_LOGSNR = 2
STREAM_RANK = 3

COUNTER = ("seed_low", "seed_high", "offset_low", "offset_high")  # arguments of every kernel that draws


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Ten rounds: four uint32 words of four uint32 counter words and two uint32 key words."""
    for _ in tl.static_range(10):
        # One 32 x 32 -> 64 bit product holds both words that the round needs.
        product_a = c0.to(tl.uint64) * 0xD2511F53
        product_b = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product_b >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = product_b.to(tl.uint32)
        c2 = (product_a >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = product_a.to(tl.uint32)
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def random_words(quad, seed_low, seed_high, offset_low, offset_high):
    """The four uint32 words of each quad (int64); the words of seed and offset come as int32."""
    return philox4x32(
        quad.to(tl.uint32),
        (quad >> 32).to(tl.uint32),
        offset_low.to(tl.uint32, bitcast=True),
        offset_high.to(tl.uint32, bitcast=True),
        seed_low.to(tl.uint32, bitcast=True),
        seed_high.to(tl.uint32, bitcast=True),
    )


@triton.jit
def uniform_from_bits(bits):
    """uint32 to float32 in [0, 1 - 2**-24]."""
    signed = bits.to(tl.int32, bitcast=True)
    return tl.where(signed < 0, ~signed, signed).to(tl.float32) * 4.6566125955216364e-10  # 0x1.fffffep-32


@triton.jit
def _ln(u):
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = 0.07149753719568253 * f + -0.115712009370327
    p = p * f + 0.11661510914564133
    p = p * f + -0.12411050498485565
    p = p * f + 0.14249937236309052
    p = p * f + -0.1666848063468933
    p = p * f + 0.20000708103179932
    p = p * f + -0.24999989569187164
    p = p * f + 0.3333333134651184
    e = exponent.to(tl.float32)
    return e * 0.693359375 + (e * -2.1219444e-4 + (f + (f * f) * (f * p - 0.5)))


@triton.jit
def box_muller(u1, u2):
    """Two independent standard normals from two uniforms, float32; nothing but IEEE sums, products and a correctly rounded root."""
    radius = tl.sqrt_rn(-2.0 * _ln(tl.maximum(u1, 1e-7)))
    quarter = (4.0 * u2 + 0.5).to(tl.int32)
    g = u2 - quarter.to(tl.float32) * 0.25
    w = g * g
    sin = -75.40184020996094 * w + 81.59254455566406
    sin = sin * w + -41.3416633605957
    sin = g * (sin * w + 6.2831854820251465)
    cos = 59.42448425292969 * w + -85.4488296508789
    cos = cos * w + 64.93936920166016
    cos = 1.0 + w * (cos * w + -19.739208221435547)
    odd = (quarter & 1) != 0
    first, second = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    # A product with -1, since up to Triton 3.8 a minus is 0 - x and loses the sign of a zero.
    first = tl.where(((quarter + 1) & 2) != 0, -1.0 * first, first)
    second = tl.where((quarter & 2) != 0, -1.0 * second, second)
    return radius * first, radius * second


@triton.jit
def join4(a, b, c, d):
    """Four [Q] to [Q, 4], the four of a quad side by side in the registers of one thread."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (a.shape[0], 4))


@triton.jit
def random_normals(quad, seed_low, seed_high, offset_low, offset_high):
    """[Q] int64 to [Q, 4] float32: the standard normals of each quad."""
    w0, w1, w2, w3 = random_words(quad, seed_low, seed_high, offset_low, offset_high)
    n0, n1 = box_muller(uniform_from_bits(w0), uniform_from_bits(w1))
    n2, n3 = box_muller(uniform_from_bits(w2), uniform_from_bits(w3))
    return join4(n0, n1, n2, n3)


@triton.jit
def random_uniforms(quad, seed_low, seed_high, offset_low, offset_high):
    """[Q] int64 to [Q, 4] float32: the uniforms of each quad."""
    w0, w1, w2, w3 = random_words(quad, seed_low, seed_high, offset_low, offset_high)
    return uniform_from_bits(join4(w0, w1, w2, w3))


@triton.jit(do_not_specialize=["size", "num_quads", *COUNTER])
def _random_kernel(
    index_ptr, out_ptr,
    size,  # elements per sample
    num_quads,  # of all samples
    seed_low, seed_high, offset_low, offset_high, NORMAL: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Writes 4 bytes per element and reads 8 per sample; samples may be shorter than a block, so blocks run across them."""
    quads = (size + 3) // 4
    start = tl.program_id(0).to(tl.int64) * BLOCK_Q
    # Only the block's first place needs a 64-bit division.
    first_sample = start // quads
    place = (start - first_sample * quads).to(tl.int32) + tl.arange(0, BLOCK_Q)
    sample = first_sample + place // quads
    place = place % quads
    exists = start + tl.arange(0, BLOCK_Q) < num_quads
    quad = tl.load(index_ptr + sample, mask=exists, other=0) * quads + place
    if NORMAL:
        values = random_normals(quad, seed_low, seed_high, offset_low, offset_high)
    else:
        values = random_uniforms(quad, seed_low, seed_high, offset_low, offset_high)
    element = place[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(out_ptr + sample[:, None] * size + element, values, mask=exists[:, None] & (element < size))


@triton.jit(do_not_specialize=["size", *COUNTER])
def _sort_keys_kernel(out_ptr, size, seed_low, seed_high, offset_low, offset_high, BLOCK_Q: tl.constexpr):
    """The 63-bit keys by which `random_permutation` sorts its elements; writes 8 bytes each."""
    j = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    w0, w1, _, _ = random_words(j, seed_low, seed_high, offset_low, offset_high)
    tl.store(out_ptr + j, (w0.to(tl.int64) << 31) | (w1 >> 1).to(tl.int64), mask=j < size)


@triton.jit(do_not_specialize=["num_quads", "levels", "global_batch", *COUNTER])
def _stratified_uniform_kernel(
    index_ptr, order_ptr, out_ptr,
    num_quads,  # of levels, of all images
    levels, global_batch, seed_low, seed_high, offset_low, offset_high, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Reads 16 bytes per image and quad of its levels, writes 4 per level; NaN where the image lies outside the batch."""
    quads = (levels + 3) // 4
    i = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    image, quad = i // quads, i % quads
    index = tl.load(index_ptr + image, mask=i < num_quads, other=-1)
    inside = (index >= 0) & (index < global_batch)
    rank = tl.load(order_ptr + index, mask=inside, other=0).to(tl.float32)
    v = random_uniforms(index * quads + quad, seed_low, seed_high, offset_low, offset_high)
    k = quad[:, None] * 4 + tl.arange(0, 4)[None, :]
    u = tl.div_rn(k.to(tl.float32) + tl.div_rn(rank[:, None] + v, global_batch.to(tl.float32)), levels.to(tl.float32))
    tl.store(
        out_ptr + image[:, None] * levels + k, tl.where(inside[:, None], u, float("nan")), mask=(i < num_quads)[:, None] & (k < levels)
    )


BLOCK_Q = 256  # quads of elements, or keys, per program


def counter(seed: int, step: int, stream: int) -> tuple[int, ...]:
    """Seed and offset as the four signed 32-bit words that kernels take: low and high word of each."""
    offset = step * NUM_STREAMS + stream
    words = (seed & 0xFFFFFFFF, seed >> 32, offset & 0xFFFFFFFF, offset >> 32)
    return tuple(word - (1 << 32) if word >> 31 else word for word in words)


def _random(normal: bool, seed: int, step: int, stream: int, index: Tensor, size: int) -> Tensor:
    out = index.new_empty((index.shape[0], size), dtype=torch.float32)
    num_quads = index.shape[0] * triton.cdiv(size, 4)
    arguments = index.contiguous(), out, size, num_quads, *counter(seed, step, stream)
    launch(_random_kernel, (triton.cdiv(num_quads, BLOCK_Q),), *arguments, fp_fusion=False, NORMAL=normal, BLOCK_Q=BLOCK_Q)
    return out


def random_normal(seed: int, step: int, stream: int, index: Tensor, size: int) -> Tensor:
    """Standard normals of samples `index` [S] int64. [S, size] float32."""
    return _random(True, seed, step, stream, index, size)


def random_uniform(seed: int, step: int, stream: int, index: Tensor, size: int) -> Tensor:
    """Uniforms in [0, 1) of samples `index` [S] int64. [S, size] float32."""
    return _random(False, seed, step, stream, index, size)


def stratified_uniform(index: Tensor, levels: int, global_batch: int, *, seed: int, step: int) -> Tensor:
    """Nested stratified uniforms of the images at `index` [B] int64, 0 <= index < global_batch. [B, levels] float32.

    An index outside the batch gets NaN.
    """
    out = index.new_empty((index.shape[0], levels), dtype=torch.float32)
    if not out.numel():
        return out
    keys, num_quads = index.new_empty(global_batch), index.shape[0] * triton.cdiv(levels, 4)
    rank, logsnr = counter(seed, step, STREAM_RANK), counter(seed, step, STREAM_LOGSNR)
    launch(_sort_keys_kernel, (triton.cdiv(global_batch, BLOCK_Q),), keys, global_batch, *rank, fp_fusion=False, BLOCK_Q=BLOCK_Q)
    arguments = index.contiguous(), keys.argsort(stable=True), out, num_quads, levels, global_batch, *logsnr
    launch(_stratified_uniform_kernel, (triton.cdiv(num_quads, BLOCK_Q),), *arguments, fp_fusion=False, BLOCK_Q=BLOCK_Q)
    return out


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    index = torch.empty(8, dtype=torch.int64, device="meta")
    yield "normals", lambda: random_normal(0, 0, 0, index, 10)
    yield "uniforms", lambda: random_uniform(0, 0, 0, index, 10)
    yield "strata", lambda: stratified_uniform(index, 4, 64, seed=0, step=0)
