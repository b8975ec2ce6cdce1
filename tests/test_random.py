"""Philox, uniforms, normals and permutations, against plain Python integers and numpy float32 arithmetic."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from sami_fast.kernels import random as kernels
from scipy import stats

from sami_fast import reference
from sami_fast.reference.random import (
    NUM_STREAMS,
    Stream,
    box_muller,
    philox4x32,
    random_bits,
    random_normal,
    random_permutation,
    random_uniform,
    uniform_from_bits,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WORD = 0xFFFFFFFF

# Counter, key and result, from the known-answer file of Random123.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

# seed, step, stream, index, size
DRAWS = [
    (0, 0, Stream.EPS, 0, 4),
    (1, 2, Stream.EPS_Z, 3, 1),
    (7, 1, Stream.LOGSNR, 5, 3),
    (7, 1, Stream.RANK, 1, 5),
    (12345, 999, Stream.SHUFFLE, 63, 63),
    (2**32 - 1, 2**28 - 1, Stream.FACTORS, 2**31, 66),
    (2**32, 2**28, Stream.AUGMENT, 2**32 - 1, 7),
    (2**32 + 5, 2**32 + 3, Stream.INIT, 2**32, 1000),
    (2**63 - 1, 2**40, Stream.PRIOR, 2**40 + 11, 9),
    (2**64 - 1, 2**60 - 1, NUM_STREAMS - 1, 2**45, 2),
]


def python_philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 in Python's unbounded integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (second >> 32) ^ c1 ^ k0, second & WORD, (first >> 32) ^ c3 ^ k1, first & WORD
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def python_words(seed: int, step: int, stream: int, index: int, size: int) -> list[int]:
    """The words of one sample by the counter layout, element by element."""
    offset = step * 16 + int(stream)
    words = []
    for element in range(size):
        quad = index * ((size + 3) // 4) + element // 4
        counter = (quad % 2**32, quad // 2**32, offset % 2**32, offset // 2**32)
        words.append(python_philox(counter, (seed % 2**32, seed // 2**32))[element % 4])
    return words


def numpy_uniform(words: list[int]) -> np.ndarray:
    folded = [w if w < 2**31 else 2**32 - 1 - w for w in words]
    return np.array(folded, dtype=np.int32).astype(np.float32) * np.float32(float.fromhex("0x1.fffffep-32"))


def numpy_box_muller(u1: np.ndarray, u2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The published polynomial Box-Muller in numpy float32, one rounding per operation."""
    f32 = np.float32
    u1 = np.maximum(u1, f32(1e-7))
    bits = u1.view(np.int32)
    exponent = (bits - np.int32(0x3F3504F3)) >> np.int32(23)
    f = (bits - (exponent << np.int32(23))).view(np.float32) - f32(1)
    e = exponent.astype(np.float32)
    polynomial = np.zeros_like(f)
    for c in (
        *(0.07149753719568253, -0.115712009370327, 0.11661510914564133, -0.12411050498485565, 0.14249937236309052),
        *(-0.1666848063468933, 0.20000708103179932, -0.24999989569187164, 0.3333333134651184),
    ):
        polynomial = polynomial * f + f32(c)
    ln = e * f32(0.693359375) + (e * f32(-2.1219444e-4) + (f + (f * f) * (f * polynomial - f32(0.5))))
    radius = np.sqrt(f32(-2) * ln)
    quarter = (f32(4) * u2 + f32(0.5)).astype(np.int32)
    g = u2 - quarter.astype(np.float32) * f32(0.25)
    w = g * g
    sin = g * (f32(6.2831854820251465) + w * (f32(-41.3416633605957) + w * (f32(81.59254455566406) + w * f32(-75.40184020996094))))
    cos = f32(1) + w * (f32(-19.739208221435547) + w * (f32(64.93936920166016) + w * (f32(-85.4488296508789) + w * f32(59.42448425292969))))
    quadrant = quarter % 4
    cos, sin = (np.choose(quadrant, options) for options in ((cos, -sin, -cos, sin), (sin, cos, -sin, -cos)))
    return radius * cos, radius * sin


def float64_box_muller(u1: np.ndarray, u2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    radius = np.sqrt(-2.0 * np.log(np.maximum(u1, np.float32(1e-7)).astype(np.float64)))
    angle = 2.0 * np.pi * u2.astype(np.float64)
    return radius * np.cos(angle), radius * np.sin(angle)


def same_bits(found: torch.Tensor, expected: np.ndarray) -> bool:
    """Equal as 32-bit patterns, signs of zeros included."""
    found = found.contiguous().numpy()
    return found.dtype == expected.dtype == np.float32 and np.array_equal(found.view(np.int32), expected.view(np.int32))


# Values


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    words = philox4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(w.item() for w in words) == expected
    assert python_philox(counter, key) == expected


@pytest.mark.parametrize("draw", DRAWS)
def test_words_follow_the_counter_layout(draw):
    seed, step, stream, index, size = draw
    found = random_bits(seed, step, stream, torch.tensor([index]), size)
    assert found.shape == (1, -(-size // 4), 4)
    assert found.flatten()[:size].tolist() == python_words(*draw)


@pytest.mark.parametrize("draw", DRAWS)
def test_uniforms_and_normals_bit_for_bit(draw):
    seed, step, stream, index, size = draw
    quads = -(-size // 4)
    # whole quads, so that every pair of uniforms is known
    words = [w for q in range(quads) for w in python_words(seed, step, stream, index * quads + q, 4)]
    u = numpy_uniform(words)
    assert same_bits(random_uniform(seed, step, stream, torch.tensor([index]), size)[0], u[:size])
    normals = np.stack(numpy_box_muller(u[0::2].copy(), u[1::2].copy()), axis=1).ravel()
    assert same_bits(random_normal(seed, step, stream, torch.tensor([index]), size)[0], normals[:size])


def test_many_normals_bit_for_bit_and_close_to_float64():
    index = torch.arange(40)
    u = random_uniform(11, 4, Stream.EPS, index, 5000).numpy()
    found = random_normal(11, 4, Stream.EPS, index, 5000)
    pairs = u.reshape(-1, 2)
    u1, u2 = pairs[:, 0].copy(), pairs[:, 1].copy()
    assert same_bits(found, np.stack(numpy_box_muller(u1, u2), axis=1).reshape(found.shape))
    exact = np.stack(float64_box_muller(u1, u2), axis=1).reshape(found.shape)
    assert np.abs(found.numpy() - exact).max() < 5e-7


def test_extreme_uniforms():
    words = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1])
    u = uniform_from_bits(words)
    assert same_bits(u, numpy_uniform(words.tolist()))
    assert u.min() == 0.0
    assert u.max().item() == 1.0 - 2.0**-24
    ends = [0.0, 2.0**-32, 1e-7, 1.1e-7, 0.5, 0.70710677, 0.70710683, 1.0 - 2.0**-24]
    turns = [0.0, 2.0**-32, *(eighth / 8 + nudge for eighth in range(1, 8) for nudge in (-(2.0**-24), 0.0, 2.0**-24)), 1.0 - 2.0**-24]
    u1, u2 = (a.ravel().astype(np.float32) for a in np.meshgrid(ends, turns))
    found = box_muller(torch.from_numpy(u1), torch.from_numpy(u2))
    for n, bitwise, exact in zip(found, numpy_box_muller(u1, u2), float64_box_muller(u1, u2), strict=True):
        assert same_bits(n, bitwise)
        assert np.abs(n.numpy() - exact).max() < 5e-7
        assert n.abs().max() <= 5.678


def test_moments_and_distribution():
    count = 250_000
    u = random_uniform(3, 14, Stream.FACTORS, torch.arange(250), 1000).flatten().double().numpy()
    n = random_normal(3, 14, Stream.EPS, torch.arange(250), 1000).flatten().double().numpy()
    assert abs(u.mean() - 0.5) < 5 * (1 / 12 / count) ** 0.5
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((n**power).mean() - moment) < 5 * (variance / count) ** 0.5
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    assert stats.kstest(n, "norm").pvalue > 1e-3
    lanes = n.reshape(-1, 4)
    assert np.abs(np.corrcoef(lanes.T) - np.eye(4)).max() < 5 / len(lanes) ** 0.5


def test_every_argument_changes_the_numbers():
    index, count = torch.arange(10), 20_000
    base = (5, 9, Stream.EPS)
    others = [(6, 9, 0), (5 + 2**32, 9, 0), (5, 10, 0), (5, 9 + 2**32, 0), *((5, 9, s) for s in list(Stream)[1:])]
    first = random_normal(*base, index, count // 10).flatten()
    for other in others:
        second = random_normal(*other, index, count // 10).flatten()
        assert (first == second).float().mean() < 1e-3
        assert abs((first * second).mean().item()) < 5 / count**0.5, other
    assert len({int(s) for s in Stream}) == len(Stream) <= NUM_STREAMS


def test_permutation_is_a_permutation():
    for length in (1, 2, 63, 1000):
        order = random_permutation(0, 0, Stream.RANK, length)
        assert order.dtype == torch.int64
        assert order.sort().values.tolist() == list(range(length))
    orders = [random_permutation(seed, step, stream, 100).tolist() for seed, step, stream in ((0, 0, 3), (0, 1, 3), (1, 0, 3), (0, 0, 4))]
    assert len({tuple(order) for order in orders}) == 4
    assert orders[0] == random_permutation(0, 0, 3, 100).tolist()
    # every image comes to every place equally often
    counts = np.zeros((5, 5))
    for step in range(500):
        counts[np.arange(5), random_permutation(8, step, Stream.RANK, 5).numpy()] += 1
    assert stats.chisquare(counts.ravel(), ddof=8).pvalue > 1e-3


# Triton, bit for bit


@triton.jit
def _box_muller_kernel(bits_ptr, out_ptr, SIZE: tl.constexpr):
    """Normals of every pair of words, so that words which a generator hardly ever yields can be tried."""
    i = tl.arange(0, SIZE)
    u = kernels.uniform_from_bits(tl.load(bits_ptr + i).to(tl.uint32))
    n0, n1 = kernels.box_muller(u[:, None] + tl.zeros((SIZE, SIZE), tl.float32), u[None, :] + tl.zeros((SIZE, SIZE), tl.float32))
    place = i[:, None] * SIZE + i[None, :]
    tl.store(out_ptr + place, n0)
    tl.store(out_ptr + SIZE * SIZE + place, n1)


def equal_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal as 32-bit patterns on any two devices, signs of zeros included."""
    assert found.dtype == expected.dtype == torch.float32
    return torch.equal(found.cpu().contiguous().view(torch.int32), expected.cpu().contiguous().view(torch.int32))


@pytest.mark.parametrize("draw", ["random_uniform", "random_normal"])
@pytest.mark.parametrize(("seed", "step", "stream", "index", "size"), DRAWS)
def test_triton_draws(draw, seed, step, stream, index, size):
    indices = torch.tensor([index, 0, index + 1])
    found = getattr(kernels, draw)(seed, step, stream, indices.to(DEVICE), size)
    assert found.shape == (3, size)
    assert equal_bits(found, getattr(reference, draw)(seed, step, stream, indices, size))


@pytest.mark.parametrize("draw", ["random_uniform", "random_normal"])
@pytest.mark.parametrize("size", [1, 4, 63, 1000])
def test_triton_draws_of_many_samples(draw, size):
    indices = torch.arange(1, 400, 3) * 2**31
    found = getattr(kernels, draw)(3, 4, Stream.EPS_Z, indices[::2].to(DEVICE), size)
    assert equal_bits(found, getattr(reference, draw)(3, 4, Stream.EPS_Z, indices[::2], size))


def test_triton_box_muller_of_rare_words():
    # Ends and middle of the range, the smallest uniforms that count, and words within rounding of every eighth of a turn.
    words = [0, 1, 2**31 - 1, 2**31, WORD - 1, WORD, 213, 214, 215, 216, *(n * 2**28 + near for n in range(1, 8) for near in (0, 64, 128))]
    words = torch.tensor([*words, 2**30 + 256])
    assert len(words) == 32
    u = uniform_from_bits(words)
    expected = torch.stack(box_muller(*torch.broadcast_tensors(u[:, None], u[None, :])))
    found = torch.empty(2, 32, 32, device=DEVICE)
    _box_muller_kernel[(1,)](words.to(DEVICE), found, SIZE=32, enable_fp_fusion=False)
    assert equal_bits(found, expected)
    assert ((expected == 0) & expected.signbit()).any()  # a negative zero is among them


def test_triton_constants_are_those_of_the_reference():
    assert (kernels.NUM_STREAMS, kernels.STREAM_LOGSNR, kernels.STREAM_RANK) == (NUM_STREAMS, Stream.LOGSNR, Stream.RANK)


def test_triton_without_samples_or_elements():
    for draw in (kernels.random_normal, kernels.random_uniform):
        assert draw(0, 0, 0, torch.zeros(0, dtype=torch.int64, device=DEVICE), 5).shape == (0, 5)
        assert draw(0, 0, 0, torch.arange(3, device=DEVICE), 0).shape == (3, 0)


def test_seed_and_step_compile_nothing_anew():
    """The values of the four counter words, small, large, 1 or a multiple of 16, choose no other binary."""
    code = """
import torch
from sami_fast.kernels import guided_loss, noise_sample, random
from sami_fast.kernels._common import recording
from sami_fast.kernels.aot import _specialise
x, a, i = torch.empty(2, 1, 4, 4, device="meta"), torch.empty(2, 1, device="meta"), torch.empty(2, dtype=torch.int64, device="meta")
found = {}
for seed, step in ((0, 0), (1, 1), (16, 1), (7, 3), (2**31, 2**27), (2**32 + 1, 2**59 - 1), (2**64 - 1, 2**28 + 1), (2**63, 2**32)):
    with recording() as launches:
        random.random_normal(seed, step, 1, i, 4)
        random.stratified_uniform(i, 4, 8, seed=seed, step=step)
        noise_sample.noise_sample_fwd(x, a, a, i, seed, step, 0, True)
        guided_loss.guided_loss_fwd(None, x, x, a[:, 0], a[:, 0], a[:, 0], i, 1, seed, step, 0)
    for item in launches:
        kinds = [_specialise("", v, not p.do_not_specialize) for v, p in zip(item.args, item.kernel.params)]
        found.setdefault(item.kernel.fn.__name__, set()).add(str(kinds))
print(sorted((name, len(kinds)) for name, kinds in found.items()))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    names = ("_guided_loss_fwd_kernel", "_noise_sample_fwd_kernel", "_random_kernel", "_sort_keys_kernel", "_stratified_uniform_kernel")
    assert process.stdout.strip() == str([(name, 1) for name in names]), process.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("draw", ["random_uniform", "random_normal"])
@pytest.mark.parametrize("size", [10, 3 * 64 * 64, 3 * 63 * 63])
def test_triton_draws_at_real_sizes(draw, size):
    indices = torch.arange(512) + 2**34
    found = [getattr(kernels, draw)(2**64 - 3, 2**33, Stream.EPS, indices.to(DEVICE), size) for _ in range(2)]
    assert equal_bits(*found)
    assert equal_bits(found[0], getattr(reference, draw)(2**64 - 3, 2**33, Stream.EPS, indices, size))


# Odd inputs


@pytest.mark.parametrize("size", [1, 2, 3, 5, 63, 64, 1000])
@pytest.mark.parametrize("draw", [random_uniform, random_normal])
def test_a_sample_does_not_depend_on_its_company(draw, size):
    index = torch.tensor([4, 0, 2**33 + 1, 17, 5])
    together = draw(1, 2, Stream.EPS, index, size)
    assert together.shape == (5, size)
    alone = torch.cat([draw(1, 2, Stream.EPS, index[i : i + 1], size) for i in range(5)])
    assert torch.equal(together, alone)
    assert torch.equal(together[[3, 1]], draw(1, 2, Stream.EPS, index[[3, 1]], size))
    assert torch.equal(together[::2], draw(1, 2, Stream.EPS, index[::2], size))  # non-contiguous indices


def test_samples_share_no_words():
    words = random_bits(0, 0, Stream.EPS, torch.arange(100), 7).flatten()
    assert words.unique().numel() == words.numel()


def test_no_samples_and_no_elements():
    nobody = torch.zeros(0, dtype=torch.int64)
    assert random_normal(0, 0, Stream.EPS, nobody, 5).shape == (0, 5)
    assert random_uniform(0, 0, Stream.EPS, nobody, 5).shape == (0, 5)
    assert random_normal(0, 0, Stream.EPS, torch.arange(3), 0).shape == (3, 0)
    assert random_permutation(0, 0, Stream.RANK, 0).shape == (0,)


# Error messages


@pytest.mark.parametrize("stream", [-1, NUM_STREAMS])
@pytest.mark.parametrize("draw", [random_uniform, random_normal, random_bits])
def test_unknown_stream(draw, stream):
    with pytest.raises(ValueError, match=f"stream: expected 0 to {NUM_STREAMS - 1}, found {stream}"):
        draw(0, 0, stream, torch.arange(2), 4)
