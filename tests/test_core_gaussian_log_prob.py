"""The Gaussian log density, its gradient and its second gradient on every backend, each against its twin.

Errors are relative to the largest value, against the float64 twin on the same numbers. In float32 they were seen to reach 3.8e-7 over all
ranges of variances in the C++ core (gg, whose terms cancel; the others 2.4e-7), and 1e-6 in torch and Triton; in float64 1.0e-15.
"""

import math
from importlib import import_module

import pytest
import torch
from helpers import LaunchersOn, normal, on, positive, relative_error

from sami_fast.ops.backend import BACKENDS

twins = import_module("sami_fast.reference.gaussian_log_prob")
LAUNCHERS = ("gaussian_log_prob_fwd", "gaussian_log_prob_bwd", "gaussian_log_prob_bwd_bwd")
NAMES = ("log_q", "grad_z", "grad_mu", "grad_var", "gg", "z_bar", "mu_bar", "var_bar")
SHAPES = [(1, 1), (2, 3), (63, 5), (200, 10), (4, 63), (5, 128), (3, 512), (1, 1000), (3, 1300)]
RANGES = [(0.2, 4.0), (1e-9, 1e-7), (1e-9, 1e9), (1e7, 1e9)]
ENVELOPE = {torch.float32: 6e-7, torch.float64: 2e-15}
DTYPES = [torch.float32, torch.float64]
ON = [*on(*DTYPES), ("cuda", torch.float64)]
EXACT = pytest.mark.parametrize("core", ["reference", "cpp", "cuda"], indirect=True)  # Triton's have no float64


@pytest.fixture(params=BACKENDS)
def core(request):
    return LaunchersOn("gaussian_log_prob", request.param)


def inputs(batch, size, low=0.2, high=4.0, dtype=torch.float64) -> list[torch.Tensor]:
    """ggz, ggmu, ggvar, grad, z, mu, var; z lies within a few standard deviations."""
    mu, var = normal(batch, size, seed=1), positive(batch, size, low=low, high=high)
    z = mu + var.sqrt() * normal(batch, size, seed=2)
    cotangents = [normal(batch, size, seed=seed) for seed in (4, 5, 6)]
    return [value.to(dtype) for value in (*cotangents, normal(batch, seed=3), z, mu, var)]


def run(module, ggz, ggmu, ggvar, grad, z, mu, var) -> tuple[torch.Tensor, ...]:
    """All results of the three launchers, in the order of NAMES."""
    fwd, bwd, bwd_bwd = (getattr(module, launcher) for launcher in LAUNCHERS)
    return fwd(z, mu, var), *bwd(grad, z, mu, var), *bwd_bwd(ggz, ggmu, ggvar, grad, z, mu, var)


def compare(core, arguments):
    found = run(core, *arguments)
    expected = run(twins, *(None if a is None else a.double() for a in arguments))
    for name, a, b in zip(NAMES, found, expected, strict=True):
        assert a.dtype == arguments[4].dtype
        assert a.is_contiguous() or core.backend == "reference"  # torch keeps the order of axes
        factor = 1 if core.backend in ("cpp", "cuda") else 4
        assert relative_error(a, b) <= factor * ENVELOPE[a.dtype], name
    return found


# Values, first gradients, second gradients


@pytest.mark.parametrize(("core", "dtype"), ON, indirect=["core"])
@pytest.mark.parametrize("shape", SHAPES)
def test_launchers(core, shape, dtype):
    for low, high in RANGES:
        compare(core, inputs(*shape, low, high, dtype))


@pytest.mark.parametrize("given", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1)])
def test_absent_cotangents(core, given):
    for shape in ((7, 10), (2, 700)):
        *cotangents, grad, z, mu, var = inputs(*shape, dtype=torch.float32)
        compare(core, [*(gg if there else None for gg, there in zip(cotangents, given, strict=True)), grad, z, mu, var])


@EXACT
def test_gradients_of_all_launchers(core):
    """The launchers chained by hand, against autograd through the public reference."""
    ggz, ggmu, ggvar, grad, z, mu, var = inputs(6, 9)
    leaves = [a.clone().requires_grad_() for a in (grad, z, mu, var)]
    first = torch.autograd.grad(twins.gaussian_log_prob(*leaves[1:]), leaves[1:], leaves[0], create_graph=True)
    second = torch.autograd.grad(first, leaves, (ggz, ggmu, ggvar))
    found = run(core, ggz, ggmu, ggvar, grad, z, mu, var)
    for a, b in zip(found[1:], (*first, *second), strict=True):
        assert relative_error(a, b) < 1e-14


@pytest.mark.parametrize(("core", "dtype"), ON, indirect=["core"])
def test_logarithm_over_all_variances(core, dtype):
    """z = mu leaves the logarithm alone: normal, subnormal (float32), infinite, negative and NaN."""
    tiny = torch.finfo(dtype).tiny
    var = positive(1000, 1, low=tiny * 1e-6 if dtype == torch.float32 else tiny, high=1e38, dtype=dtype)
    zeros = torch.zeros_like(var)
    exact = -0.5 * (var.double().log() + math.log(2 * math.pi))
    error = (core.gaussian_log_prob_fwd(zeros, zeros, var).double() - exact[:, 0]).abs() / exact[:, 0].abs().clamp_min(1.0)
    assert error.max() <= (2e-7 if dtype == torch.float32 else 1e-15)
    ends = torch.tensor([[math.inf], [-1.0], [math.nan]], dtype=dtype)
    found = core.gaussian_log_prob_fwd(zeros[:3] + 1.0, zeros[:3], ends)
    assert found[0] == -math.inf
    assert found[1:].isnan().all()


# Odd inputs


@pytest.mark.parametrize(("core", "dtype"), ON, indirect=["core"])
def test_strided_and_misaligned_inputs(core, dtype):
    arguments = inputs(8, 20, dtype=dtype)
    before = [a.clone() for a in arguments]
    grad = arguments[3]
    images = [a for a in arguments if a is not grad]
    for view in (
        lambda a: a[:, 3:13],
        lambda a: a.t().contiguous().t(),
        lambda a: a[::2, ::2],
        lambda a: a[:1].expand(8, 20),
        lambda a: a[1:, 1:],
    ):
        views = [view(a) for a in images]
        short = grad.repeat_interleave(2)[::2][: len(views[0])]
        compare(core, [*views[:3], short, *views[3:]])
    head = torch.cat((images[4], images[5]), dim=1)  # a chunked head
    compare(core, [*images[:3], grad[:1].expand(8), images[3], *head.chunk(2, dim=1)])
    shifted = [torch.cat((a.flatten()[:1], a.flatten()))[1:].view(a.shape) for a in arguments]
    compare(core, shifted)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_nothing(core, shape):
    matrix, row = torch.ones(shape), torch.ones(shape[0])
    arguments = matrix, matrix, matrix, row, matrix, matrix, matrix
    for name, a, b in zip(NAMES, run(core, *arguments), run(twins, *arguments), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("core", ["cpp"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_number_of_threads(core, dtype):
    for shape in ((3000, 7), (40, 1000), (2, 5000)):
        arguments = inputs(*shape, dtype=dtype)
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(core, *arguments))
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_a_row_does_not_depend_on_its_company(core):
    ggz, ggmu, ggvar, grad, z, mu, var = inputs(150, 11, dtype=torch.float32)
    together = run(core, ggz, ggmu, ggvar, grad, z, mu, var)
    for row in (slice(0, 1), slice(77, 78), slice(149, 150)):
        alone = run(core, *(a[row] for a in (ggz, ggmu, ggvar, grad, z, mu, var)))
        assert all(torch.equal(a[row], b) for a, b in zip(together, alone, strict=True))


# Error messages


@pytest.mark.parametrize("core", ["cpp", "cuda"], indirect=True)
def test_errors(core):
    ggz, _, ggvar, grad, z, mu, var = inputs(4, 5)
    with pytest.raises(RuntimeError, match=r"expected z \[B, Z\]"):
        core.gaussian_log_prob_fwd(grad, grad, grad)
    for wrong in (mu[:2], mu[:, :3], mu.float()):
        with pytest.raises(RuntimeError, match="expected mu and var like z"):
            core.gaussian_log_prob_fwd(z, wrong, var)
        with pytest.raises(RuntimeError, match="gaussian_log_prob: expected"):
            core.gaussian_log_prob_bwd_bwd(ggz, wrong, ggvar, grad, z, mu, var)
    with pytest.raises(RuntimeError, match=r"expected grad \[B\] like z"):
        core.gaussian_log_prob_bwd(grad[:2], z, mu, var)
    with pytest.raises(RuntimeError, match="expected float32 or float64"):
        core.gaussian_log_prob_fwd(z.half(), mu.half(), var.half())
