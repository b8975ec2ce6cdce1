"""Softmax attention, against torch's own and against loops; its launchers against autograd, and the Triton ones against those."""

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from helpers import normal, relative_error
from sami_fast.kernels import attention as kernels
from sami_fast.kernels._common import recording
from torch.autograd import gradcheck, gradgradcheck

from benchmarks.measure import peak_bytes
from sami_fast.ops import attention

twins = import_module("sami_fast.reference.attention")  # the package's own name of it is the op
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# batch, queries, keys, heads, head size
SHAPES = [(1, 1, 1, 1, 1), (2, 4, 4, 2, 8), (1, 63, 63, 1, 3), (3, 5, 63, 2, 16), (1, 64, 7, 3, 24), (1, 1, 1000, 1, 4)]


def inputs(batch: int, queries: int, keys: int, heads: int, size: int, dtype=torch.float64, grad=False) -> list[torch.Tensor]:
    lengths = (queries, keys, keys)
    return [normal(batch, n, heads, size, seed=seed, dtype=dtype, grad=grad) for seed, n in enumerate(lengths)]


def torch_attention(q, k, v, **options):
    return F.scaled_dot_product_attention(*(a.transpose(1, 2) for a in (q, k, v)), **options).transpose(1, 2)


# Values


@pytest.mark.parametrize("shape", SHAPES)
def test_values(shape):
    arguments = inputs(*shape)
    assert relative_error(attention(*arguments), torch_attention(*arguments)) < 1e-13
    assert relative_error(attention(*arguments, scale=0.7), torch_attention(*arguments, scale=0.7)) < 1e-13


@pytest.mark.parametrize("tokens", [1, 4, 63])
def test_causal_values(tokens):
    arguments = inputs(2, tokens, tokens, 2, 5)
    assert relative_error(attention(*arguments, causal=True), torch_attention(*arguments, is_causal=True)) < 1e-13


def test_one_query_by_hand():
    q, k, v = inputs(2, 3, 4, 2, 5)
    logits = torch.stack([(q[1, 2, 1] * k[1, j, 1]).sum() / 5**0.5 for j in range(4)])
    p = logits.exp() / logits.exp().sum()
    assert relative_error(attention(q, k, v)[1, 2, 1], sum(p[j] * v[1, j, 1] for j in range(4))) < 1e-13


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-2)])
def test_lower_precision(dtype, limit):
    arguments = inputs(2, 16, 16, 2, 8, dtype=dtype)
    out = attention(*arguments)
    assert out.dtype == dtype
    assert relative_error(out, attention(*(a.double() for a in arguments))) < limit


# First gradients


@pytest.mark.parametrize("causal", [False, True])
def test_first_gradients(causal):
    assert gradcheck(lambda *a: attention(*a, causal=causal), inputs(1, 3, 3, 2, 2, grad=True))


@pytest.mark.parametrize("shape", SHAPES[1:5])
def test_first_gradients_against_torch(shape):
    arguments = inputs(*shape, grad=True)
    out = attention(*arguments)
    cotangent = normal(*out.shape, seed=7)
    found = torch.autograd.grad(out, arguments, cotangent)
    expected = torch.autograd.grad(torch_attention(*arguments), arguments, cotangent)
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(found, expected, strict=True))


# Second gradients


@pytest.mark.parametrize("causal", [False, True])
def test_second_gradients(causal):
    assert gradgradcheck(lambda *a: attention(*a, causal=causal), inputs(1, 3, 3, 1, 2, grad=True))


def test_second_gradients_with_more_keys_than_queries():
    assert gradgradcheck(lambda *a: attention(*a, scale=1.3), inputs(2, 2, 3, 1, 2, grad=True))


# Odd inputs


def test_empty_batch():
    arguments = inputs(0, 5, 6, 2, 3, grad=True)
    out = attention(*arguments)
    assert out.shape == (0, 5, 2, 3)
    grads = torch.autograd.grad(out.sum(), arguments, create_graph=True)
    assert [g.shape for g in grads] == [a.shape for a in arguments]


def test_non_contiguous_inputs():
    q, k, v = (normal(2, 3, 5, 4, seed=s).permute(0, 2, 1, 3) for s in range(3))  # heads and tokens swapped in memory
    assert relative_error(attention(q, k, v), attention(q.contiguous(), k.contiguous(), v.contiguous())) < 1e-14


def test_extreme_logits():
    q, k, v = inputs(1, 3, 5, 1, 4, dtype=torch.float32)
    out = attention(1e4 * q, 1e4 * k, v)
    assert out.isfinite().all()
    best = (q[0, :, 0] @ k[0, :, 0].T).argmax(1)
    assert torch.equal(out[0, :, 0], v[0, best, 0])
    assert relative_error(attention(q, k, v, scale=0.0), v.mean(1, keepdim=True).expand(1, 3, 1, 4)) < 1e-6


# Error messages


@pytest.mark.parametrize(
    ("shapes", "causal", "message"),
    [
        (((2, 3, 4), (2, 3, 1, 4), (2, 3, 1, 4)), False, r"q: expected \[B, S, N, D\], found \[2, 3, 4\]"),
        (((2, 3, 1, 4), (2, 3, 1, 5), (2, 3, 1, 4)), False, r"k: expected \[2, 3, 1, 4\], found \[2, 3, 1, 5\]"),
        (((2, 3, 1, 4), (2, 3, 4), (2, 3, 1, 4)), False, r"k: expected .*, found \[2, 3, 4\]"),
        (((2, 3, 1, 4), (2, 6, 1, 4), (2, 5, 1, 4)), False, r"v: expected \[2, 6, 1, 4\], found \[2, 5, 1, 4\]"),
        (((2, 3, 1, 4), (2, 6, 1, 4), (2, 6, 1, 4)), True, r"causal: expected as many queries as keys, found 3 and 6"),
    ],
)
def test_wrong_shapes(shapes, causal, message):
    with pytest.raises(ValueError, match="^" + message):
        attention(*(torch.zeros(shape) for shape in shapes), causal=causal)


# The launchers that the derivatives are made of, and the Triton kernels with the same signatures

NAMES = ("out", "lse", "grad_q", "grad_k", "grad_v", "tout", "tau", "q_bar", "k_bar", "v_bar")


def launcher_inputs(batch: int, queries: int, keys: int, heads: int, size: int, dtype=torch.float64, joint=True) -> dict:
    lengths = {"q": queries, "k": keys, "v": keys, "tq": queries, "tk": keys, "tv": keys, "grad_out": queries, "out_bar": queries}
    given = {name: normal(batch, n, heads, size, seed=seed, dtype=dtype) for seed, (name, n) in enumerate(lengths.items())}
    return given if joint else given | {"out_bar": None}


def run_launchers(launchers, q, k, v, tq, tk, tv, grad_out, out_bar, scale: float, causal: bool) -> list[torch.Tensor]:
    """What every launcher returns, in the order of NAMES, each fed with what the launchers before it gave."""
    out, lse = launchers.attention_fwd(q, k, v, scale, causal)
    first = launchers.attention_bwd(grad_out, q, k, v, out, lse, scale, causal)
    tout, tau = launchers.attention_tan(tq, tk, tv, q, k, v, out, lse, scale, causal)
    second = launchers.attention_bwd_bwd(tq, tk, tv, grad_out, q, k, v, out, lse, tout, tau, scale, causal, out_bar)
    return [out, lse, *first, tout, tau, *second]


def run_autograd(q, k, v, tq, tk, tv, grad_out, out_bar, scale: float, causal: bool) -> list[torch.Tensor]:
    """The same numbers, from the public reference and autograd alone."""
    q, k, v, grad_out = (x.detach().requires_grad_() for x in (q, k, v, grad_out))
    out = twins.attention(q, k, v, scale=scale, causal=causal)
    first = torch.autograd.grad(out, (q, k, v), grad_out, create_graph=True)
    pairing = sum((g * t).sum() for g, t in zip(first, (tq, tk, tv), strict=True))
    (tout,) = torch.autograd.grad(pairing, grad_out, retain_graph=True)
    if out_bar is not None:
        pairing = pairing + (out_bar * out).sum()
    second = torch.autograd.grad(pairing, (q, k, v))
    hidden = torch.full((q.shape[1], k.shape[1]), float("-inf"), dtype=q.dtype).triu(1) if causal else 0.0

    def logits_of(q, k):
        return scale * torch.einsum("bqnd,bknd->bnqk", q, k) + hidden

    top = logits_of(q.detach(), k.detach()).amax(-1)
    total, tau = torch.func.jvp(lambda q, k: (logits_of(q, k) - top[..., None]).logsumexp(-1), (q.detach(), k.detach()), (tq, tk))
    return [out, torch.stack((top, total)), *first, tout, tau, *second]


def assert_results(found: list[torch.Tensor], expected: list[torch.Tensor], limit: float) -> None:
    """Each within `limit` of its own largest value, or of 1 where that is smaller: with a single key most of them are zero."""
    for name, a, b in zip(NAMES, found, expected, strict=True):
        assert a.shape == b.shape, name
        if b.numel():
            error = (a.cpu().double() - b.cpu().double()).abs().max().item()
            assert error <= limit * max(1.0, b.abs().max().item()), f"{name}: off by {error:.2g}"


def double(given: dict) -> dict:
    return {name: None if x is None else x.double().cpu() for name, x in given.items()}


# Plain torch

LEVEL_SHAPES = [(1, 1, 1, 1, 1), (2, 4, 4, 2, 8), (1, 63, 64, 2, 3), (2, 130, 17, 1, 40), (1, 17, 300, 2, 16), (0, 5, 6, 2, 3)]


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("shape", LEVEL_SHAPES)
def test_launchers_against_autograd(shape, joint):
    given = launcher_inputs(*shape, joint=joint)
    assert_results(run_launchers(twins, **given, scale=0.6, causal=False), run_autograd(**given, scale=0.6, causal=False), 1e-12)


@pytest.mark.parametrize("tokens", [1, 17, 300])
def test_causal_launchers_against_autograd(tokens):
    given = launcher_inputs(2, tokens, tokens, 2, 8)
    assert_results(run_launchers(twins, **given, scale=0.6, causal=True), run_autograd(**given, scale=0.6, causal=True), 1e-12)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)])
def test_launchers_in_lower_precision(dtype, limit):
    given = launcher_inputs(2, 140, 33, 2, 16, dtype=dtype)
    found = run_launchers(twins, **given, scale=0.25, causal=False)
    statistics = ("lse", "tau")
    assert [x.dtype for x in found] == [torch.float32 if name in statistics else dtype for name in NAMES]
    assert_results(found, run_launchers(twins, **double(given), scale=0.25, causal=False), limit)


def test_memory_of_the_launchers_grows_linearly():
    def peak(tokens: int) -> int:
        given = launcher_inputs(1, tokens, tokens, 1, 8, dtype=torch.float32)
        return peak_bytes(lambda: run_launchers(twins, **given, scale=0.3, causal=False))

    small, middle, large = (peak(n) for n in (256, 512, 1024))
    assert middle < 2.1 * small
    assert large < 2.1 * middle
    assert large < 4.5 * 4 * 128 * 1024 + 40 * 4 * 1024 * 8  # four matrices of 128 rows; tensors of the size of q


# Triton in its interpreter, against the largest value: float32 within 2e-6 (found: 1e-6), float16 within 2e-3 (found: 7e-4), bfloat16
# within 1.5e-2 (found: 1.1e-2; the interpreter cuts off where a GPU rounds)

LIMITS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
KERNEL_SHAPES = [
    (1, 1, 1, 1, 8),
    (1, 63, 17, 2, 40),
    (1, 17, 130, 1, 96),
    (1, 64, 64, 2, 16),
    (1, 1, 1000, 1, 24),
    (1, 130, 1, 1, 3),
    (1, 70, 65, 1, 128),
]


def on_device(given: dict) -> dict:
    return {name: None if x is None else x.to(DEVICE) for name, x in given.items()}


def check_kernels(given: dict, scale: float, causal: bool = False, factor: float = 1.0) -> list[torch.Tensor]:
    found = run_launchers(kernels, **on_device(given), scale=scale, causal=causal)
    limit = factor * LIMITS[given["q"].dtype]
    assert_results(found, run_launchers(twins, **double(given), scale=scale, causal=causal), limit)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", KERNEL_SHAPES)
def test_kernels(shape, dtype):
    found = check_kernels(launcher_inputs(*shape, dtype=dtype), shape[-1] ** -0.5)
    assert [x.dtype for x in found] == [torch.float32 if name in ("lse", "tau") else dtype for name in NAMES]


@pytest.mark.parametrize("shape", KERNEL_SHAPES[1:3])
def test_kernels_without_out_bar(shape):
    check_kernels(launcher_inputs(*shape, dtype=torch.float32, joint=False), 0.3)


@pytest.mark.parametrize(("tokens", "dtype"), [(1, torch.float32), (63, torch.float16), (130, torch.float32)])
def test_causal_kernels(tokens, dtype):
    check_kernels(launcher_inputs(1, tokens, tokens, 2, 8, dtype=dtype), 0.3, causal=True)


def heads_outside(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def tokens_inside(x: torch.Tensor) -> torch.Tensor:
    """A view of a feature map [B, N * D, H, W]."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def of_a_projection(x: torch.Tensor) -> torch.Tensor:
    """A slice of a fused [B, S, 3, N, D], whose other parts are NaN."""
    fused = torch.full((*x.shape[:2], 3, *x.shape[2:]), float("nan"), dtype=x.dtype)
    fused[:, :, 1] = x
    return fused[:, :, 1]


def off_by_one(x: torch.Tensor) -> torch.Tensor:
    """Contiguous, but not on a multiple of 16 bytes."""
    return torch.cat([x.new_full((1,), float("nan")), x.flatten()])[1:].view(x.shape)


def accesses(x: torch.Tensor) -> list[tuple[bool, bool]]:
    """Of every kernel that the launchers start on tensors like x: whether tokens lie inside, and whether it reads x where it is."""
    with recording() as launches:
        out, lse = kernels.attention_fwd(x, x, x, 0.3, False)
        grads = kernels.attention_bwd(out, x, x, x, out, lse, 0.3, False)
        tout, tau = kernels.attention_tan(*grads, x, x, x, out, lse, 0.3, False)
        kernels.attention_bwd_bwd(*grads, out, x, x, x, out, lse, tout, tau, 0.3, False, None)
    return [(launch.constants["INSIDE"], any(value is x for value in launch.args)) for launch in launches]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_kernels_read_in_place(dtype):
    x = torch.empty(2, 56, 3, 40, dtype=dtype)
    for arranged in (x, heads_outside(x), of_a_projection(x)):
        assert accesses(arranged) == [(False, True)] * 6
    assert accesses(tokens_inside(x)) == [(True, True)] * 6
    odd = torch.empty(2, 49, 3, 40, dtype=dtype)
    for arranged in (tokens_inside(odd), off_by_one(x), x[..., ::2], x[..., :39]):
        assert accesses(arranged) == [(False, False)] * 6


# What float32 loses to large logits, in the launchers and in autograd of the reference: D, offset of q, of k, factor of q
LARGE_LOGITS = {
    "offsets": (64, 1.0, 10.0, 1.0),
    "offset of the keys": (16, 0.0, 300.0, 1.0),
    "saturated": (16, 0.0, 0.0, 1e4),
}


def assert_loses_no_more_than_autograd(launchers, case):
    """At most three times the error of autograd (found: 1.9), and a few roundings of what cancels where the true value is zero."""
    size, q_offset, k_offset, factor = LARGE_LOGITS[case]
    given = launcher_inputs(1, 64, 128, 1, size, dtype=torch.float32)
    given |= {"q": factor * (given["q"] + q_offset), "k": given["k"] + k_offset}
    options = {"scale": size**-0.5, "causal": False}
    exact = run_launchers(twins, **double(given), **options)
    found, autograd = run_launchers(launchers, **given, **options), run_autograd(**given, **options)
    # Saturated, P is one-hot and E, a difference, is zero: what is left of its terms is multiplied by k in dQ and by q in dK.
    e = torch.einsum("bqnd,bknd->bnqk", given["grad_out"], given["v"]).abs().max().item()
    q, k = (options["scale"] * e * given[name].abs().max().item() if case == "saturated" else 0.0 for name in "qk")
    floor = {"grad_q": k, "grad_k": q, "q_bar": k, "k_bar": q}
    for name, a, b, c in zip(NAMES, found, autograd, exact, strict=True):
        limit = 3 * (b.double() - c).abs().max().item() + 5e-7 * max(c.abs().max().item(), floor.get(name, 0.0))
        error = (a.cpu().double() - c).abs().max().item()
        assert error <= limit, f"{name}: off by {error:.2g}, allowed {limit:.2g}"


# On a GPU, at real sizes

REAL_SHAPES = [(16, 256, 256, 4, 64), (2, 1024, 1024, 2, 128), (2, 1000, 333, 3, 40), (8, 64, 64, 8, 32), (1, 4096, 4096, 1, 16)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", REAL_SHAPES)
def test_kernels_at_real_sizes(shape, dtype):
    causal = shape[1] == 1024
    given = launcher_inputs(*shape, dtype=dtype)
    first = check_kernels(given, shape[-1] ** -0.5, causal, factor=2.0)
    again = run_launchers(kernels, **on_device(given), scale=shape[-1] ** -0.5, causal=causal)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [heads_outside, tokens_inside, of_a_projection])
def test_layouts_at_real_sizes(layout, dtype):
    given = launcher_inputs(4, 256, 256, 4, 64, dtype=dtype)
    check_kernels({name: layout(x) for name, x in given.items()}, 0.125, factor=2.0)
