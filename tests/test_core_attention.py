"""The launchers of attention on every backend against their twins in plain torch."""

import math

import pytest
import torch
from helpers import GPU, LaunchersOn, normal, on, relative_error
from test_attention import (
    LARGE_LOGITS,
    NAMES,
    assert_loses_no_more_than_autograd,
    assert_results,
    double,
    heads_outside,
    launcher_inputs,
    of_a_projection,
    off_by_one,
    run_autograd,
    run_launchers,
    tokens_inside,
    twins,
)

from sami_fast.ops.backend import BACKENDS

# batch, queries, keys, heads, head size: one of each, a block and one more, more of one than of the other, sizes that no register divides
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 63, 65, 2, 3),
    (1, 130, 17, 1, 40),
    (2, 17, 300, 2, 16),
    (8, 64, 64, 4, 32),
    (1, 700, 90, 1, 64),
    (1, 40, 129, 1, 72),
    (1, 66, 33, 1, 130),
    (0, 5, 6, 2, 3),
    (2, 0, 5, 1, 8),
    (2, 63, 17, 2, 40),
    (1, 70, 129, 1, 128),
]
# Largest error over the largest value (or 1), against float64. Found, of the C++ core: 2.9e-15 and 1.9e-6; the twins themselves, in
# float32: 1.1e-6.
LIMITS = {torch.float64: 2e-14, torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = list(LIMITS)


@pytest.fixture
def core(backend):
    return LaunchersOn("attention", backend)


def takes(backend: str, shape: tuple[int, ...]) -> bool:
    """Kernels on GPUs have heads of up to 128; interpreted and emulated ones take seconds where others take none."""
    products = math.prod(shape)
    return backend in ("reference", "cpp") or (shape[-1] <= 128 and (GPU or products <= {"triton": 60_000, "cuda": 1_200_000}[backend]))


def check(core, given: dict, scale: float, causal: bool = False, limit: float | None = None) -> list[torch.Tensor]:
    found = run_launchers(core, **given, scale=scale, causal=causal)
    dtype = given["q"].dtype
    sums = torch.promote_types(dtype, torch.float32)
    assert [x.dtype for x in found] == [sums if name in ("lse", "tau") else dtype for name in NAMES]
    expected = run_launchers(twins, **double(given), scale=scale, causal=causal)
    assert_results(found, expected, LIMITS[given["q"].dtype] if limit is None else limit)
    return found


@pytest.mark.parametrize(("backend", "dtype"), on(*DTYPES))
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_launchers(core, shape, joint, dtype):
    if not takes(core.backend, shape):
        pytest.skip("not for this backend")
    check(core, launcher_inputs(*shape, dtype=dtype, joint=joint), shape[-1] ** -0.5)


@pytest.mark.parametrize(("backend", "dtype"), on(*DTYPES))
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 130, 520])
def test_causal_launchers(core, tokens, dtype):
    if not takes(core.backend, (1, tokens, tokens, 2, 8)):
        pytest.skip("not for this backend")
    check(core, launcher_inputs(1, tokens, tokens, 2, 8, dtype=dtype), 0.6, causal=True)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("causal", [False, True])
def test_against_autograd(core, causal):
    given = launcher_inputs(2, 37, 37, 2, 8)
    assert_results(run_launchers(core, **given, scale=0.6, causal=causal), run_autograd(**given, scale=0.6, causal=causal), 1e-12)


# The same bits whatever runs them


@pytest.mark.parametrize("backend", ["cpp"])
@pytest.mark.parametrize("shape", [(1, 1100, 70, 1, 16), (3, 65, 130, 2, 24)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_number_of_threads(core, shape, dtype):
    given = launcher_inputs(*shape, dtype=dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run_launchers(core, **given, scale=0.3, causal=False))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def spread(x: torch.Tensor) -> torch.Tensor:
    """No dimension of stride 1."""
    storage = torch.full((*x.shape, 2), float("nan"), dtype=x.dtype, device=x.device)
    return storage[..., 1].copy_(x)


LAYOUTS = [heads_outside, tokens_inside, of_a_projection, off_by_one, spread]


# queries, keys, head size: all of it fit for 16-byte accesses, or heads, or tokens, or neither
@pytest.mark.parametrize("sizes", [(16, 40, 16), (33, 75, 24), (16, 40, 10), (17, 49, 9)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("backend", "dtype"), on(torch.float32, torch.float16, backends=["cpp", "cuda"]) + on(torch.float32, backends=["reference", "triton"])
)
def test_layouts(core, layout, sizes, dtype):
    """The same bits from the compiled kernels; torch takes other products for other strides, and Triton other tiles."""
    shape = 2, *sizes[:2], 2, sizes[2]
    if not takes(core.backend, shape):
        pytest.skip("not for this backend")
    given = launcher_inputs(*shape, dtype=dtype)
    expected = run_launchers(core, **given, scale=0.3, causal=False)
    # Once the tensors that define the layout, once all of them, cotangents too.
    for names in (("q", "k", "v"), given):
        arranged = given | {name: layout(given[name]) for name in names}
        before = {name: x.clone() for name, x in arranged.items()}
        found = run_launchers(core, **arranged, scale=0.3, causal=False)
        strides = [x.stride() for x in run_launchers(twins, **arranged, scale=0.3, causal=False)]
        if core.backend in ("cpp", "cuda"):
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        else:
            assert_results(found, expected, 1e-6)
        assert [x.stride() for x in found] == strides
        assert all(torch.equal(arranged[name], x) for name, x in before.items())  # inputs stay as they came


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_that_differ_and_expanded_cotangents(core):
    given = launcher_inputs(1, 20, 33, 2, 8, dtype=torch.float32)
    given |= {"q": tokens_inside(given["q"]), "k": of_a_projection(given["k"]), "v": heads_outside(given["v"])}
    given |= {"grad_out": torch.tensor(0.7).expand(1, 20, 2, 8), "tk": torch.tensor([[0.3], [-1.1]]).expand(1, 33, 2, 8)}
    check(core, given, 0.3)


# Odd values


@pytest.mark.parametrize("backend", BACKENDS)
def test_sharp_softmax(core):
    check(core, launcher_inputs(1, 20, 40, 1, 16, dtype=torch.float32), 4.0, limit=1e-5)  # found: 2.9e-6; the twins: 5.0e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", LARGE_LOGITS)
def test_large_logits(core, case):
    assert_loses_no_more_than_autograd(core, case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_key_has_all_the_weight(core):
    """Its tangent is that of its value alone, however large T is, and whatever block of keys it lies in."""
    given = launcher_inputs(1, 64, 500, 1, 16, dtype=torch.float32)
    given["q"] *= 1e4
    out, lse = core.attention_fwd(given["q"], given["k"], given["v"], 0.25, False)
    tout, _ = core.attention_tan(*(given[name] for name in ("tq", "tk", "tv", "q", "k", "v")), out, lse, 0.25, False)
    best = torch.einsum("bqnd,bknd->bnqk", given["q"], given["k"])[0, 0].topk(2)
    alone = 0.25 * (best.values[:, 0] - best.values[:, 1]) > 30
    assert alone.sum() > 50
    assert relative_error(tout[0, alone, 0], given["tv"][0, best.indices[alone, 0], 0]) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_and_vanishing_logits(core):
    given = launcher_inputs(1, 6, 9, 1, 8, dtype=torch.float32)
    for scale in (1e6, -1e6, 0.0):
        assert all(x.isfinite().all() for x in run_launchers(core, **given, scale=scale, causal=False))
    check(core, given, 0.0)
    check(core, given, -0.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row(core):
    given = launcher_inputs(1, 70, 40, 1, 8, dtype=torch.float32)
    given["q"][0, 3, 0, 5] = float("nan")
    out, lse = core.attention_fwd(given["q"], given["k"], given["v"], 0.3, False)
    assert out[0, 3].isnan().all()
    assert lse[:, 0, 0, 3].isnan().any()
    assert out.isnan().sum() == 8
    grad_q, grad_k, grad_v = core.attention_bwd(given["grad_out"], given["q"], given["k"], given["v"], out, lse, 0.3, False)
    assert grad_q.isnan().sum() == 8
    assert grad_k.isnan().all()
    assert grad_v.isnan().all()


@pytest.mark.parametrize("backend", ["cpp", "cuda"])
def test_wrong_shapes(core):
    """Twins and Triton's launchers check nothing: their caller does."""
    q, k, v = (normal(1, n, 2, 4, dtype=torch.float32) for n in (3, 5, 5))
    with pytest.raises(RuntimeError, match="v: unexpected size of dimension 1"):
        core.attention_fwd(q, k, v[:, :4], 1.0, False)
    with pytest.raises(RuntimeError, match="causal: expected as many queries as keys"):
        core.attention_fwd(q, k, v, 1.0, True)
    with pytest.raises(RuntimeError, match="v: another dtype than q"):
        core.attention_fwd(q, k, v.half(), 1.0, False)
    out, lse = core.attention_fwd(q, k, v, 1.0, False)
    with pytest.raises(RuntimeError, match=r"lse: expected \[2, B, N, S\]"):
        core.attention_bwd(out, q, k, v, out, lse[0], 1.0, False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hidden", [-torch.inf, -3e38])
def test_keys_that_count_for_nothing(core, hidden):
    """A whole block of logits at -infinity, by input or by overflow, comes before those that count."""
    given = launcher_inputs(1, 5, 300, 1, 8, dtype=torch.float32)
    q, k, v = (given[name].clone() for name in "qkv")
    q[..., 0], k[..., 0] = 1e3, 0.0
    k[:, :200, :, 0] = hidden
    out, lse = core.attention_fwd(q, k, v, 1.0, False)
    expected, expected_lse = core.attention_fwd(q, k[:, 200:], v[:, 200:], 1.0, False)
    assert relative_error(out, expected) < 1e-6
    assert relative_error(lse, expected_lse) < 1e-6
    nothing, _ = core.attention_fwd(q, k[:, :200], v[:, :200], 1.0, False)
    assert nothing.isnan().all()
    _, *found = core.attention_bwd(given["grad_out"], q, k, v, out, lse, 1.0, False)
    _, *expected = core.attention_bwd(given["grad_out"], q, k[:, 200:], v[:, 200:], out, lse, 1.0, False)
    for of_all, of_rest in zip(found, expected, strict=True):
        assert not of_all[:, :200].any()
        assert relative_error(of_all[:, 200:], of_rest) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "dtype"), on(torch.float32, torch.float16, torch.bfloat16, backends=["cuda"]))
def test_real_sizes(core, dtype):
    check(core, launcher_inputs(16, 256, 256, 4, 64, dtype=dtype), 0.125)
    check(core, launcher_inputs(2, 1024, 1024, 2, 64, dtype=dtype), 0.125, causal=True)
