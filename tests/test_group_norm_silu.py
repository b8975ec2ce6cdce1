"""Group norm with SiLU, against torch's own and against loops."""

import pytest
import torch
import torch.nn.functional as F
from helpers import normal, relative_error
from torch.autograd import gradcheck, gradgradcheck

from sami_fast.ops import group_norm_silu

# shape of x, groups
CASES = [
    ((2, 4, 3, 3), 2),
    ((1, 1, 1, 1), 1),
    ((3, 6, 63), 3),
    ((2, 63, 5, 1), 7),
    ((1, 32, 8, 8), 32),
    ((2, 8), 2),
    ((1, 4, 10, 10, 10), 4),
]


def inputs(shape: tuple[int, ...], dtype=torch.float64, grad=False) -> list[torch.Tensor]:
    return [normal(*s, seed=seed, dtype=dtype, grad=grad) for seed, s in enumerate((shape, shape[1:2], shape[1:2]))]


def by_hand(x, weight, bias, num_groups, norm_eps=1e-5, silu=True):
    """Group after group, channel after channel."""
    out, size = torch.empty_like(x), x.shape[1] // num_groups
    for b in range(x.shape[0]):
        for group in range(num_groups):
            members = x[b, group * size : (group + 1) * size]
            centred = members - members.mean()
            x_hat = centred / (centred.square().mean() + norm_eps).sqrt()
            for c in range(size):
                channel = group * size + c
                out[b, channel] = weight[channel] * x_hat[c] + bias[channel]
    return out / (1 + torch.exp(-out)) if silu else out


# Values


@pytest.mark.parametrize(("shape", "num_groups"), CASES)
@pytest.mark.parametrize("silu", [False, True])
def test_values(shape, num_groups, silu):
    arguments = inputs(shape)
    assert relative_error(group_norm_silu(*arguments, num_groups, silu=silu), by_hand(*arguments, num_groups, silu=silu)) < 1e-9


def test_norm_eps():
    arguments = inputs((2, 4, 3))
    found = group_norm_silu(*arguments, 2, norm_eps=0.3)
    assert relative_error(found, by_hand(*arguments, 2, norm_eps=0.3)) < 1e-12


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_lower_precision(dtype, limit):
    arguments = inputs((2, 8, 16, 16), dtype=dtype)
    arguments[0] = arguments[0] + 3  # statistics in the dtype of x would lose the variance
    out = group_norm_silu(*arguments, 4)
    assert out.dtype == dtype
    assert relative_error(out, group_norm_silu(*(a.double() for a in arguments), 4)) < limit


def test_bfloat16_features_with_float32_parameters():
    x, weight, bias = inputs((2, 4, 5, 5), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert group_norm_silu(x.bfloat16(), weight, bias, 2).dtype == torch.bfloat16


# First gradients


@pytest.mark.parametrize("silu", [False, True])
def test_first_gradients(silu):
    assert gradcheck(lambda *a: group_norm_silu(*a, 2, silu=silu), inputs((2, 4, 3), grad=True))


@pytest.mark.parametrize(("shape", "num_groups"), CASES[:1] + CASES[2:5])
def test_first_gradients_against_torch(shape, num_groups):
    arguments = inputs(shape, grad=True)
    cotangent = normal(*shape, seed=7)
    found = torch.autograd.grad(group_norm_silu(*arguments, num_groups), arguments, cotangent)
    expected = torch.autograd.grad(F.silu(F.group_norm(arguments[0], num_groups, *arguments[1:])), arguments, cotangent)
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(found, expected, strict=True))


# Second gradients


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("shape", "num_groups"), [((2, 4, 3), 2), ((1, 3, 2, 2), 1), ((1, 2, 3), 2)])
def test_second_gradients(shape, num_groups, silu):
    assert gradgradcheck(lambda *a: group_norm_silu(*a, num_groups, silu=silu), inputs(shape, grad=True))


def test_second_gradients_by_hand():
    arguments = inputs((2, 4, 5), grad=True)
    cotangent, direction = normal(2, 4, 5, seed=7), normal(2, 4, 5, seed=8)

    def second(out):
        (grad_x,) = torch.autograd.grad(out, arguments[0], cotangent, create_graph=True)
        return torch.autograd.grad(grad_x, arguments[:2], direction)

    found, expected = second(group_norm_silu(*arguments, 2)), second(by_hand(*arguments, 2))
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(found, expected, strict=True))


# Odd inputs


def test_empty_batch():
    arguments = inputs((0, 4, 3, 3), grad=True)
    out = group_norm_silu(*arguments, 2)
    assert out.shape == (0, 4, 3, 3)
    grads = torch.autograd.grad(out.sum(), arguments, create_graph=True)
    assert [g.shape for g in grads] == [a.shape for a in arguments]


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (3, 4, 1, 1), (1, 4), (1, 4, 1)])
def test_a_group_of_one_value_leaves_the_bias(shape):
    x, weight, bias = inputs(shape)
    expected = F.silu(bias).view(1, 4, *(1,) * (len(shape) - 2)).expand(shape)
    assert relative_error(group_norm_silu(x, weight, bias, 4), expected) < 1e-9


def test_a_constant_image_leaves_the_bias():
    _, weight, bias = inputs((1, 4, 5, 5))
    out = group_norm_silu(torch.full((1, 4, 5, 5), 7.0, dtype=torch.float64), weight, bias, 2, silu=False)
    assert relative_error(out, bias.view(1, 4, 1, 1).expand(1, 4, 5, 5)) < 1e-9


@pytest.mark.parametrize("scale", [1e-2, 1e9])
def test_scale_of_x_cancels(scale):
    x, weight, bias = inputs((2, 4, 6, 6))
    assert (
        relative_error(group_norm_silu(scale * x, weight, bias, 2, norm_eps=0.0), group_norm_silu(x, weight, bias, 2, norm_eps=0.0)) < 1e-12
    )


def test_non_contiguous_inputs():
    x, weight, bias = normal(2, 5, 3, 4).permute(0, 3, 1, 2), normal(8)[::2], normal(8, seed=1)[::2]
    expected = group_norm_silu(x.contiguous(), weight.contiguous(), bias.contiguous(), 2)
    assert relative_error(group_norm_silu(x, weight, bias, 2), expected) < 1e-13


# Error messages


@pytest.mark.parametrize(
    ("weight", "bias", "num_groups", "message"),
    [
        ((4,), (4,), 3, r"num_groups: expected a divisor of 4 channels, found 3"),
        ((3,), (4,), 2, r"weight: expected \[4\], found \[3\]"),
        ((4,), (4, 1), 2, r"bias: expected \[4\], found \[4, 1\]"),
    ],
)
def test_wrong_arguments(weight, bias, num_groups, message):
    with pytest.raises(ValueError, match="^" + message):
        group_norm_silu(torch.zeros(2, 4, 3, 3), torch.zeros(weight), torch.zeros(bias), num_groups)
