"""weight ||eps - eps_hat||^2 + unconditional_weight ||eps - eps_pred||^2 per noisy sample."""

import pytest
import torch
from helpers import normal, positive, relative_error
from torch.autograd import gradcheck, gradgradcheck

from sami_fast.ops import guided_loss

ARGUMENTS = ("eps", "eps_pred", "grad_log_q", "sigma_t", "weight", "unconditional_weight")


def inputs(samples: int, *shape: int, dtype=torch.float64, grad=False) -> list[torch.Tensor]:
    images = [normal(samples, *shape, seed=seed, dtype=dtype, grad=grad) for seed in range(3)]
    return images + [positive(samples, low=0.1, high=3.0, seed=seed, dtype=dtype, grad=grad) for seed in range(3)]


def by_hand(eps, eps_pred, grad_log_q, sigma_t, weight, unconditional_weight):
    """One sample after the other, eps_hat written out."""
    loss, unguided = [], []
    for s in range(len(eps)):
        eps_hat = eps_pred[s] - sigma_t[s] * grad_log_q[s]
        unguided.append(((eps[s] - eps_pred[s]) ** 2).sum())
        loss.append(weight[s] * ((eps[s] - eps_hat) ** 2).sum() + unconditional_weight[s] * unguided[-1])
    return torch.stack(loss), torch.stack(unguided)


# Values

SHAPES = [(1, 1, 1, 1), (3, 1, 8, 8), (63, 3, 5, 7), (2, 1, 1, 1000)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values(shape, dtype):
    arguments = inputs(*shape, dtype=dtype)
    found, expected = guided_loss(*arguments), by_hand(*(a.double() for a in arguments))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        assert relative_error(a, b) < (1e-6 if dtype == torch.float32 else 1e-14)


def test_without_guidance_both_results_agree():
    arguments = inputs(4, 1, 3, 3)
    arguments[2] = torch.zeros_like(arguments[0])
    loss, unguided = guided_loss(*arguments)
    assert relative_error(loss, (arguments[4] + arguments[5]) * unguided) < 1e-14


def test_a_perfect_guided_estimate_costs_nothing():
    eps, _, grad_log_q, sigma_t, weight, _ = inputs(3, 1, 4, 4)
    eps_pred = eps + sigma_t[:, None, None, None] * grad_log_q
    loss, unguided = guided_loss(eps, eps_pred, grad_log_q, sigma_t, weight, torch.zeros(3, dtype=torch.float64))
    assert loss.max() < 1e-28
    assert unguided.min() > 0


# First gradients


def test_first_gradients():
    assert gradcheck(lambda *a: guided_loss(*a)[0], inputs(3, 2, 2, 3, grad=True))


def test_first_gradients_in_closed_form():
    arguments = inputs(5, 1, 3, 3, grad=True)
    eps, eps_pred, grad_log_q, sigma_t, weight, unconditional_weight = arguments
    cotangent = normal(5, seed=8)
    found = torch.autograd.grad(guided_loss(*arguments)[0], arguments, cotangent)
    c, s, w, u = (v.view(-1, 1, 1, 1) for v in (cotangent, sigma_t, weight, unconditional_weight))
    d = eps - eps_pred
    r = d + s * grad_log_q
    expected = (
        2 * c * (w * r + u * d),
        -2 * c * (w * r + u * d),
        2 * c * w * s * r,
        (2 * c * w * r * grad_log_q).flatten(1).sum(1),
        cotangent * (r * r).flatten(1).sum(1),
        cotangent * (d * d).flatten(1).sum(1),
    )
    for name, a, b in zip(ARGUMENTS, found, expected, strict=True):
        assert relative_error(a, b) < 1e-13, name


def test_unguided_is_a_measurement():
    _, unguided = guided_loss(*inputs(2, 1, 2, 2, grad=True))
    assert not unguided.requires_grad


# Second gradients


def test_second_gradients():
    assert gradgradcheck(lambda *a: guided_loss(*a)[0], inputs(2, 1, 2, 3, grad=True))


# Odd inputs


def test_empty_batch():
    arguments = inputs(0, 1, 4, 4, grad=True)
    loss, unguided = guided_loss(*arguments)
    assert loss.shape == unguided.shape == (0,)
    assert all(g.shape == a.shape for g, a in zip(torch.autograd.grad(loss.sum(), arguments), arguments, strict=True))


def test_non_contiguous_inputs():
    images = [normal(2, 3, 5, 4, seed=s).permute(0, 3, 1, 2) for s in range(3)]
    scalars = [positive(4, low=0.1, high=2.0, seed=s)[::2] for s in range(3)]
    found = guided_loss(*images, *scalars)
    expected = guided_loss(*(a.contiguous() for a in (*images, *scalars)))
    assert all(relative_error(a, b) < 1e-14 for a, b in zip(found, expected, strict=True))


def test_inputs_stay_as_they_came():
    arguments = inputs(2, 1, 3, 3)
    before = [a.clone() for a in arguments]
    guided_loss(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


# Error messages


@pytest.mark.parametrize(
    ("position", "shape", "message"),
    [
        (1, (2, 1, 4, 5), r"eps_pred: expected \[2, 1, 4, 4\], found \[2, 1, 4, 5\]"),
        (2, (1, 1, 4, 4), r"grad_log_q: expected \[2, 1, 4, 4\], found \[1, 1, 4, 4\]"),
        (3, (1,), r"sigma_t: expected \[2\], found \[1\]"),
        (4, (2, 1), r"weight: expected \[2\], found \[2, 1\]"),
        (5, (), r"unconditional_weight: expected \[2\], found \[\]"),
    ],
)
def test_wrong_shapes(position, shape, message):
    arguments = inputs(2, 1, 4, 4)
    arguments[position] = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match="^" + message):
        guided_loss(*arguments)
