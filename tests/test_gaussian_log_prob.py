"""Diagonal Gaussians: log density, KL divergence and reparameterised sample, against torch.distributions and closed forms.

The log density's launchers against autograd, and the Triton ones against those.
"""

from importlib import import_module

import pytest
import torch
from helpers import normal, positive, relative_error
from sami_fast.kernels import gaussian_log_prob as kernels
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from sami_fast import reference
from sami_fast.ops import gaussian_kl, gaussian_log_prob, gaussian_reparameterize

twins = import_module("sami_fast.reference.gaussian_log_prob")  # the package's own name of it is the op
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

SHAPES = [(1, 1), (2, 3), (63, 5), (4, 63), (1, 1000)]


def inputs(batch: int, size: int, low=0.2, high=4.0, dtype=torch.float64, grad=False) -> list[torch.Tensor]:
    z, mu = (normal(batch, size, seed=seed, dtype=dtype, grad=grad) for seed in range(2))
    return [z, mu, positive(batch, size, low=low, high=high, dtype=dtype, grad=grad)]


# Values


@pytest.mark.parametrize("shape", SHAPES)
def test_log_density(shape):
    z, mu, var = inputs(*shape)
    assert gaussian_log_prob(z, mu, var).shape == shape[:1]
    assert relative_error(gaussian_log_prob(z, mu, var), Normal(mu, var.sqrt()).log_prob(z).sum(-1)) < 1e-13


def test_log_density_against_the_full_covariance():
    z, mu, var = inputs(6, 4)
    assert relative_error(gaussian_log_prob(z, mu, var), MultivariateNormal(mu, var.diag_embed()).log_prob(z)) < 1e-13


@pytest.mark.parametrize("shape", SHAPES)
def test_kl(shape):
    _, mu, var = inputs(*shape)
    expected = kl_divergence(Normal(mu, var.sqrt()), Normal(torch.zeros_like(mu), torch.ones_like(mu)))
    found = gaussian_kl(mu, var)
    assert relative_error(found, expected) < 1e-13
    assert found.min() >= 0
    assert gaussian_kl(torch.zeros(2, 3), torch.ones(2, 3)).abs().max() == 0


def test_kl_is_the_mean_log_ratio_of_samples():
    _, mu, var = inputs(1, 2)
    z = gaussian_reparameterize(mu.expand(200_000, 2), var.expand(200_000, 2), normal(200_000, 2, seed=4))
    prior = gaussian_log_prob(z, torch.zeros_like(z), torch.ones_like(z))
    ratio = gaussian_log_prob(z, mu.expand_as(z), var.expand_as(z)) - prior
    assert abs(ratio.mean() - gaussian_kl(mu, var).sum()) < 4 * ratio.std() / len(ratio) ** 0.5


def test_sample():
    eps_z, mu, var = inputs(5, 3)
    assert relative_error(gaussian_reparameterize(mu, var, eps_z), mu + var**0.5 * eps_z) < 1e-15
    assert torch.equal(gaussian_reparameterize(mu, var, torch.zeros_like(mu)), mu)


@pytest.mark.parametrize("magnitude", [1e-9, 1e-4, 1.0, 1e4, 1e9])
def test_float32_over_all_variances(magnitude):
    var = positive(50, 4, low=0.5 * magnitude, high=2 * magnitude, dtype=torch.float32)
    mu = normal(50, 4, seed=1, dtype=torch.float32)
    z = gaussian_reparameterize(mu, var, normal(50, 4, seed=2, dtype=torch.float32))
    z, mu, var = (a.detach() for a in (z, mu, var))
    exact = [a.double() for a in (z, mu, var)]
    assert relative_error(gaussian_log_prob(z, mu, var), gaussian_log_prob(*exact)) < 2e-6
    assert relative_error(gaussian_kl(mu, var), gaussian_kl(*exact[1:])) < 2e-6
    assert gaussian_kl(mu, var).min() > -1e-6


# First gradients


def test_first_gradients():
    z, mu, var = inputs(2, 3, grad=True)
    assert gradcheck(gaussian_log_prob, (z, mu, var))
    assert gradcheck(gaussian_kl, (mu, var))
    assert gradcheck(gaussian_reparameterize, (mu, var, z))


@pytest.mark.parametrize(("low", "high"), [(1e-9, 1e-7), (1e-9, 1e9), (1e7, 1e9)])
def test_first_and_second_gradients_in_closed_form(low, high):
    """Over all variances, where finite differences see nothing."""
    z, mu, var = inputs(40, 3, low, high, grad=True)
    cotangent = normal(40, seed=5)
    found = torch.autograd.grad(gaussian_log_prob(z, mu, var), (z, mu, var), cotangent, create_graph=True)
    c, d = cotangent[:, None], z - mu
    expected = (-c * d / var, c * d / var, 0.5 * c * (d * d / var - 1) / var)
    assert all(((a - b).abs() <= 1e-12 * b.abs()).all() for a, b in zip(found, expected, strict=True))

    toward_z, toward_var = normal(40, 3, seed=6), normal(40, 3, seed=7)
    second = torch.autograd.grad((found[0], found[2]), (z, mu, var), (toward_z, toward_var))
    zz, zv, vv = -c / var, c * d / var**2, c * (0.5 / var**2 - d * d / var**3)
    expected = (zz * toward_z + zv * toward_var, -zz * toward_z - zv * toward_var, zv * toward_z + vv * toward_var)
    for a, b in zip(second, expected, strict=True):
        assert ((a - b).abs() <= 1e-9 * b.abs().max(1, keepdim=True).values + 1e-300).all()


# Second gradients


def test_second_gradients():
    z, mu, var = inputs(2, 3, grad=True)
    assert gradgradcheck(gaussian_log_prob, (z, mu, var))
    assert gradgradcheck(gaussian_kl, (mu, var))
    assert gradgradcheck(gaussian_reparameterize, (mu, var, z))


# Odd inputs


def test_empty_batch():
    z, mu, var = inputs(0, 3, grad=True)
    log_q = gaussian_log_prob(z, mu, var)
    assert log_q.shape == (0,)
    assert gaussian_kl(mu, var).shape == gaussian_reparameterize(mu, var, z).shape == (0, 3)
    (grad_z,) = torch.autograd.grad(log_q.sum(), z, create_graph=True)
    assert torch.autograd.grad(grad_z.sum(), mu)[0].shape == (0, 3)


def test_non_contiguous_inputs():
    z, mu, var = (a.t() for a in inputs(3, 5))
    dense = [a.contiguous() for a in (z, mu, var)]
    assert relative_error(gaussian_log_prob(z, mu, var), gaussian_log_prob(*dense)) < 1e-14
    assert torch.equal(gaussian_kl(mu, var), gaussian_kl(*dense[1:]))
    assert torch.equal(gaussian_reparameterize(mu, var, z), gaussian_reparameterize(dense[1], dense[2], dense[0]))


# The launchers

RANGES = [(0.2, 4.0), (1e-9, 1e-7), (1e-9, 1e9), (1e7, 1e9)]
NAMES = ("log_q", "grad_z", "grad_mu", "grad_var", "gg", "z_bar", "mu_bar", "var_bar")


def launcher_inputs(batch: int, size: int, low: float, high: float, dtype=torch.float32, device=DEVICE) -> list[torch.Tensor]:
    """z, mu, var, grad and the three cotangents; z lies within a few standard deviations."""
    mu, var = normal(batch, size, seed=1), positive(batch, size, low=low, high=high)
    z = mu + var.sqrt() * normal(batch, size, seed=2)
    more = [normal(batch, seed=3), *(normal(batch, size, seed=seed) for seed in (4, 5, 6))]
    return [value.to(device, dtype) for value in (z, mu, var, *more)]


def run_launchers(module, z, mu, var, grad, ggz, ggmu, ggvar) -> tuple[torch.Tensor, ...]:
    point = z, mu, var
    first = module.gaussian_log_prob_bwd(grad, *point)
    return module.gaussian_log_prob_fwd(*point), *first, *module.gaussian_log_prob_bwd_bwd(ggz, ggmu, ggvar, grad, *point)


def assert_results(found, expected, rtol: float) -> None:
    """Each row within rtol of its largest entry; log_q and gg, sums of terms of both signs, of their largest of all."""
    for name, a, b in zip(NAMES, found, expected, strict=True):
        assert a.shape == b.shape, name
        largest = b.abs().amax() if b.dim() == 1 and b.numel() else b.abs().amax(-1, keepdim=True)
        assert ((a.double() - b).abs() <= rtol * largest).all(), name


@pytest.mark.parametrize(("low", "high"), RANGES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (3, 63)])
@pytest.mark.parametrize("absent", [(), (4,), (5, 6)])
def test_twins_are_what_autograd_finds(shape, low, high, absent):
    given = launcher_inputs(*shape, low, high, torch.float64, "cpu")
    leaves = [value.clone().requires_grad_() for value in (given[3], *given[:3])]
    log_q = reference.gaussian_log_prob(*leaves[1:])
    grads = torch.autograd.grad(log_q, leaves[1:], leaves[0], create_graph=True)
    objective = sum((given[4 + i] * g).sum() for i, g in enumerate(grads) if 4 + i not in absent)
    second = torch.autograd.grad(objective, leaves)
    found = run_launchers(twins, *(None if i in absent else value for i, value in enumerate(given)))
    assert_results(found, (log_q, *grads, *second), 1e-12)


@pytest.mark.parametrize(("low", "high"), RANGES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 63), (2, 600), (1, 1100)])
@pytest.mark.parametrize("module", [twins, kernels])
def test_float32_launchers(module, shape, low, high):
    given = launcher_inputs(*shape, low, high)
    expected = run_launchers(twins, *(value.double() for value in given))
    # measured: 1e-6, where gg is a difference of large terms, else 2e-7
    assert_results(run_launchers(module, *given), expected, 2e-6)


@pytest.mark.parametrize("absent", [(4,), (5,), (6,), (4, 5), (4, 5, 6)])
def test_an_absent_cotangent_is_zero(absent):
    given = launcher_inputs(3, 7, 0.2, 4.0)
    zeros = [torch.zeros_like(value) if i in absent else value for i, value in enumerate(given)]
    given = [None if i in absent else value for i, value in enumerate(given)]
    for module in (twins, kernels):
        for a, b in zip(run_launchers(module, *given), run_launchers(module, *zeros), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("module", [twins, kernels])
def test_launchers_with_views(module):
    """The halves of one head, transposed tensors, and the expanded gradient of a sum."""
    given = launcher_inputs(6, 6, 0.2, 4.0)
    expected = run_launchers(
        twins, *(value.double() for value in given[:3]), torch.ones(6, device=DEVICE).double(), *(v.double() for v in given[4:])
    )
    mu, var = torch.cat(given[1:3], 1).chunk(2, 1)
    z, *cotangents = (value.t().contiguous().t() for value in (given[0], *given[4:]))
    found = run_launchers(module, z, mu, var, torch.ones((), device=DEVICE).expand(6), *cotangents)
    assert_results(found, expected, 2e-6)


@pytest.mark.parametrize("module", [twins, kernels])
def test_launchers_of_an_empty_batch(module):
    shapes = [value.shape for value in run_launchers(module, *launcher_inputs(0, 3, 0.2, 4.0))]
    assert shapes == [(0,), (0, 3), (0, 3), (0, 3), (0,), (0, 3), (0, 3), (0, 3)]


def assert_real_size(shape, low, high) -> None:
    given = launcher_inputs(*shape, low, high)
    found = run_launchers(kernels, *given)
    assert all(torch.equal(a, b) for a, b in zip(found, run_launchers(kernels, *given), strict=True))
    assert_results(found, run_launchers(twins, *(value.double() for value in given)), 5e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(("low", "high"), RANGES)
@pytest.mark.parametrize("shape", [(64, 32), (4096, 128), (512, 4096), (1000, 1000)])
def test_kernels_at_real_sizes(shape, low, high):
    assert_real_size(shape, low, high)


# Error messages

GOOD, LONG, FLAT = (2, 3), (2, 4), (3,)


@pytest.mark.parametrize(
    ("function", "shapes", "message"),
    [
        (gaussian_log_prob, (FLAT, FLAT, FLAT), r"z: expected \[B, Z\], found \[3\]"),
        (gaussian_log_prob, (GOOD, LONG, GOOD), r"mu: expected \[2, 3\], found \[2, 4\]"),
        (gaussian_log_prob, (GOOD, GOOD, FLAT), r"var: expected \[2, 3\], found \[3\]"),
        (gaussian_kl, (FLAT, FLAT), r"mu: expected \[B, Z\], found \[3\]"),
        (gaussian_kl, (GOOD, LONG), r"var: expected \[2, 3\], found \[2, 4\]"),
        (gaussian_reparameterize, (GOOD, LONG, GOOD), r"var: expected \[2, 3\], found \[2, 4\]"),
        (gaussian_reparameterize, (GOOD, GOOD, LONG), r"eps_z: expected \[2, 3\], found \[2, 4\]"),
    ],
)
def test_wrong_shapes(function, shapes, message):
    with pytest.raises(ValueError, match="^" + message):
        function(*(torch.ones(shape) for shape in shapes))
