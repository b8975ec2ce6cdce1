"""Counter-based random numbers: every draw is a function of (seed, step, stream, sample index, element).

Bits come from Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Normals come from a Box-Muller
transform that uses only IEEE additions, multiplications and correctly rounded square roots, so that any backend can reproduce them bit
for bit.

Counter layout. The elements of one sample are drawn in quads of four, and each sample starts a quad of its own:

    quad   = sample_index * ceil(size / 4) + element // 4        counter words 0, 1 (low, high)
    offset = step * NUM_STREAMS + stream                         counter words 2, 3 (low, high)
    key    = seed                                                key words 0, 1 (low, high)

Since the sample index is the *global* one, results do not depend on the number of ranks, the micro-batch or a restart.
Not differentiable (there is nothing to differentiate).
"""

from enum import IntEnum

import torch
from torch import Tensor

NUM_STREAMS = 16  # fixed: changing it changes every random number of every run
EVALUATION_STEP = 1 << 40  # evaluation draws its noise from here: no training step comes this far


class Stream(IntEnum):
    """What a draw is for. Two purposes never share a stream."""

    EPS = 0  # noise added to images
    EPS_Z = 1  # reparameterisation noise of the latent
    LOGSNR = 2  # position of a noise level inside its stratum
    RANK = 3  # order of the images over the strata
    SHUFFLE = 4  # order of a finite dataset
    FACTORS = 5  # factors of a procedural dataset
    AUGMENT = 6  # flips and crops
    INIT = 7  # starting noise of a sampler
    PRIOR = 8  # latents drawn from the prior


_MASK = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int], rounds: int = 10) -> tuple[Tensor, ...]:
    """Four 32-bit words per counter.

    Args:
        counter: Four int64 tensors of one broadcastable shape, each holding a 32-bit word.
        key: The two 32-bit words of the key.
    Returns:
        Four int64 tensors of that shape, values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # A product wraps modulo 2**64, and a masked shift still yields its exact high word.
        product_a, product_b = c0 * _ROUND_A, c2 * _ROUND_B
        c0, c1, c2, c3 = (
            ((product_b >> 32) & _MASK) ^ c1 ^ k0,
            product_b & _MASK,
            ((product_a >> 32) & _MASK) ^ c3 ^ k1,
            product_a & _MASK,
        )
        k0, k1 = (k0 + _KEY_A) & _MASK, (k1 + _KEY_B) & _MASK
    return c0, c1, c2, c3


def uniform_from_bits(bits: Tensor) -> Tensor:
    """32-bit words (int64) to float32 in [0, 1 - 2**-24], the rule of Triton's `uint_to_uniform_float`."""
    signed = torch.where(bits >= 1 << 31, bits - (1 << 32), bits)
    folded = torch.where(signed < 0, ~signed, signed)
    return folded.to(torch.int32).float() * float.fromhex("0x1.fffffep-32")


# Logarithm on [sqrt(1/2), sqrt(2)) as a polynomial in f = m - 1, highest power first; sine and cosine of a turn, lowest power first.
_LN = (
    0.07149753719568253,
    -0.115712009370327,
    0.11661510914564133,
    -0.12411050498485565,
    0.14249937236309052,
    -0.1666848063468933,
    0.20000708103179932,
    -0.24999989569187164,
    0.3333333134651184,
)
_SIN = (6.2831854820251465, -41.3416633605957, 81.59254455566406, -75.40184020996094)
_COS = (-19.739208221435547, 64.93936920166016, -85.4488296508789, 59.42448425292969)


def _horner(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """Polynomial with the highest power first, each product and sum rounded on its own."""
    total = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * x + coefficient
    return total


def _ln(u: Tensor) -> Tensor:
    bits = u.view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    e = exponent.float()
    return e * 0.693359375 + (e * -2.1219444e-4 + (f + (f * f) * (f * _horner(_LN, f) - 0.5)))


def box_muller(u1: Tensor, u2: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normals from two uniforms, float32 in and out; |n| <= 5.678."""
    u1 = u1.clamp_min(1e-7)
    # float32 square roots are not correctly rounded on every CPU: take them in float64.
    radius = (-2.0 * _ln(u1)).double().sqrt().float()
    quarter = (4.0 * u2 + 0.5).to(torch.int32)
    g = u2 - quarter.float() * 0.25
    w = g * g
    sin = g * _horner(_SIN[::-1], w)
    cos = 1.0 + w * _horner(_COS[::-1], w)
    odd = (quarter & 1).bool()
    sin, cos = torch.where(odd, cos, sin), torch.where(odd, sin, cos)
    cos = torch.where(((quarter + 1) & 2).bool(), -cos, cos)
    sin = torch.where((quarter & 2).bool(), -sin, sin)
    return radius * cos, radius * sin


def random_bits(seed: int, step: int, stream: int, index: Tensor, size: int) -> Tensor:
    """Raw words for a batch of samples.

    Args:
        seed: 64-bit key, >= 0.
        step: Optimiser step (or any counter), >= 0.
        stream: One of `Stream`.
        index: Global sample indices. [S] int64, >= 0.
        size: Elements per sample.
    Returns:
        [S, ceil(size / 4), 4] int64, values in [0, 2**32), on the device of `index`.
    Raises:
        ValueError: there is no such stream.
    """
    if not 0 <= stream < NUM_STREAMS:
        raise ValueError(f"stream: expected 0 to {NUM_STREAMS - 1}, found {stream}")
    quads = -(-size // 4)
    quad = index[:, None] * quads + torch.arange(quads, device=index.device)
    offset = step * NUM_STREAMS + int(stream)
    low, high = torch.full_like(quad, offset & _MASK), torch.full_like(quad, (offset >> 32) & _MASK)
    words = philox4x32((quad & _MASK, (quad >> 32) & _MASK, low, high), (seed & _MASK, (seed >> 32) & _MASK))
    return torch.stack(words, dim=-1)


def random_uniform(seed: int, step: int, stream: int, index: Tensor, size: int) -> Tensor:
    """Uniforms in [0, 1). [S, size] float32; arguments as in `random_bits`."""
    return uniform_from_bits(random_bits(seed, step, stream, index, size)).flatten(1)[:, :size].contiguous()


def random_normal(seed: int, step: int, stream: int, index: Tensor, size: int) -> Tensor:
    """Standard normals. [S, size] float32; arguments as in `random_bits`."""
    u = uniform_from_bits(random_bits(seed, step, stream, index, size))
    n0, n1 = box_muller(u[..., 0], u[..., 1])
    n2, n3 = box_muller(u[..., 2], u[..., 3])
    return torch.stack((n0, n1, n2, n3), dim=-1).flatten(1)[:, :size].contiguous()


def random_permutation(seed: int, step: int, stream: int, length: int, device: torch.device | str = "cpu") -> Tensor:
    """A random order of `range(length)`: the ranks of 64-bit random keys. [length] int64."""
    words = random_bits(seed, step, stream, torch.arange(length, device=device), 2)[:, 0]
    return torch.argsort((words[:, 0] << 31) | (words[:, 1] >> 1), stable=True)
