"""Softmax attention, against torch's own and against loops."""

import pytest
import torch
import torch.nn.functional as F
from helpers import normal, relative_error
from torch.autograd import gradcheck, gradgradcheck

from sami_fast.ops import attention

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
