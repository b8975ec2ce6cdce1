"""Convolution through the compiled core: torch's own results, layouts and derivatives, at any order; and when it is torch's own."""

import copy
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from helpers import core_launchers, normal, relative_error

from benchmarks.steps import Step
from sami_fast import ops
from sami_fast.config import load_config

twins = import_module("sami_fast.reference.conv2d")
operators = torch.ops.sami_fast
module = import_module("sami_fast.ops.conv2d")
PAIRS = {"stride": (1, 1), "padding": (1, 1)}


@pytest.fixture(autouse=True)
def _core():
    core_launchers()


def inputs(*shape: int, out: int = 8, dtype: torch.dtype = torch.float32, size: int = 3) -> list[torch.Tensor]:
    """x, weight and bias."""
    return [normal(*s, seed=seed, dtype=dtype, grad=True) for seed, s in enumerate((shape, (out, shape[1], size, size), (out,)))]


def two_derivatives(function, arguments) -> list[torch.Tensor]:
    value = function(*arguments)
    first = torch.autograd.grad(value, arguments, normal(*value.shape, seed=9).to(value), create_graph=True)
    along = sum((g * normal(*g.shape, seed=20 + place).to(g)).sum() for place, g in enumerate(first))
    return [value, *first, *torch.autograd.grad(along + value.square().sum(), arguments)]


@pytest.mark.parametrize("steps", [(1, 1), (2, 1)])
def test_formulas_to_any_order(steps):
    """The chain over the twins, in float64."""
    arguments = [normal(*s, seed=seed, grad=True) for seed, s in enumerate(((2, 2, 3, 4), (3, 2, 3, 3), (3,)))]
    stride, padding = steps

    def chain(x, weight, bias):
        return operators.conv2d(x, weight, bias, stride, padding, "reference")

    def gradients(x, weight, bias):
        value = operators.conv2d(x, weight, bias, stride, padding, "reference")
        return torch.autograd.grad(value.sin().sum(), (x, weight, bias), create_graph=True)

    assert torch.autograd.gradcheck(chain, arguments)
    assert torch.autograd.gradgradcheck(chain, arguments)
    assert torch.autograd.gradgradcheck(gradients, arguments)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((2, 8, 5, 7), (3, 1, 1)),  # kernel, stride, padding
        ((1, 24, 16, 16), (3, 1, 1)),
        ((3, 9, 4, 6), (3, 1, 1)),
        ((2, 33, 12, 5), (3, 1, 1)),
        ((16, 4, 4, 4), (3, 1, 1)),
        ((2, 1, 9, 8), (3, 1, 1)),
        ((3, 9, 11, 16), (3, 2, 1)),
        ((2, 1, 14, 13), (3, 2, 1)),
        ((2, 24, 9, 5), (1, 1, 0)),
        ((3, 9, 11, 16), (1, 2, 0)),
        ((2, 8, 11, 12), (3, 1, 0)),
    ],
)
def test_derivatives(shape, settings, last):
    size, stride, padding = settings
    arguments = inputs(*shape, out=12, size=size)
    if last:
        arguments[0] = arguments[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    assert module._is_ours(*arguments[:2], (stride, stride), (padding, padding), (1, 1), 1)
    found = two_derivatives(lambda *a: ops.conv2d(*a, stride, padding), arguments)
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    expected = two_derivatives(lambda *a: F.conv2d(*a, stride, padding), [a.detach().double().requires_grad_() for a in arguments])
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 5e-6


@pytest.mark.parametrize("bias", [False, True])
def test_backward_with_masks(bias):
    x, weight, _ = (a.detach() for a in inputs(2, 8, 6, 6))
    grad_y = normal(2, 8, 6, 6, seed=5, dtype=torch.float32)
    settings = (1, 1), (1, 1), (1, 1), 1
    expected = torch.ops.aten.convolution_backward(grad_y, x, weight, [8], (1, 1), (1, 1), (1, 1), False, (0, 0), 1, (True, True, True))
    for mask in [(True, False, False), (False, True, bias), (True, True, bias), (False, False, bias)]:
        found = ops.conv2d_backward(grad_y, x, weight, *settings, mask)
        for asked, a, b in zip(mask, found, expected, strict=True):
            assert (a is not None) == asked
            assert a is None or relative_error(a, b) < 2e-6


@pytest.mark.parametrize("operator", ["conv2d", "conv2d_bwd_input", "conv2d_bwd_weight"])
def test_opcheck(operator):
    x, weight, bias = inputs(2, 8, 6, 5)
    grad_y = normal(2, 8, 6, 5, seed=5, dtype=torch.float32, grad=True)
    arguments = {
        "conv2d": (x, weight, bias, 1, 1),
        "conv2d_bwd_input": (grad_y, weight, 1, 1, 6, 5),
        "conv2d_bwd_weight": (grad_y, x, True, 1, 1, 3),
    }[operator]
    torch.library.opcheck(getattr(operators, operator).default, (*arguments, "cpp"))


def test_compiled():
    torch._dynamo.reset()
    arguments = inputs(2, 8, 6, 6)

    def penalty(*a):
        return torch.func.grad(lambda x: ops.conv2d(x, *a[1:], **PAIRS).sin().sum())(a[0]).square().sum()

    compiled = torch.compile(penalty, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(f(*arguments), arguments) for f in (compiled, penalty))
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "changed",
    [
        {"stride": (2, 1)},
        {"padding": (0, 1)},
        {"padding": (3, 3)},
        {"stride": (2, 2), "size": (8, 3, 3)},
        {"dilation": (2, 2), "padding": (2, 2)},
        {"groups": 2},
        {"dtype": torch.float64},
        {"size": (8, 1, 1)},
    ],
)
def test_everything_else_is_torchs(changed):
    """In channels-last memory all the same."""
    changed = dict(changed)
    dtype, size, groups = changed.pop("dtype", torch.float32), changed.pop("size", (8, 6, 6)), changed.get("groups", 1)
    x, weight, bias = inputs(2, *size, dtype=dtype)
    weight = weight[:, : size[0] // groups]
    settings = PAIRS | {"dilation": (1, 1), "groups": 1} | changed
    assert not module._is_ours(x, weight, settings["stride"], settings["padding"], settings["dilation"], groups)
    found = ops.conv2d(x, weight, bias, **settings)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(found, F.conv2d(x, weight, bias, **settings)) < 1e-6


def test_one_channel_lies_as_the_others_do():
    x = normal(2, 1, 4, 5)
    assert twins.channels_last(x).stride() == (20, 1, 5, 1)
    assert torch.equal(twins.channels_last(x), x)
    weight = normal(8, 1, 3, 3, seed=1)
    assert ops.conv2d(x, weight, **PAIRS).is_contiguous(memory_format=torch.channels_last)


def test_autocast_and_reference_are_torchs():
    x, weight, bias = inputs(2, 8, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.conv2d(x, weight, bias, **PAIRS).dtype == torch.bfloat16
    with ops.use_backend("reference"):
        assert torch.equal(ops.conv2d(x, weight, bias, **PAIRS), F.conv2d(x, weight, bias, 1, 1))
    assert torch.func.jvp(lambda x: ops.conv2d(x, weight, bias, **PAIRS), (x,), (x,))[0].shape == x.shape


def test_arguments_as_torch_takes_them():
    x, weight, bias = (a.detach() for a in inputs(2, 8, 6, 6))
    for arguments in [
        (x, weight, bias, 1, 1),
        (x[0], weight, bias, 1, 1),
        (x, weight, None, 2),
        (x, weight, bias, 1, "same"),
        (x[:0], weight, bias, 1, 1),
    ]:
        assert relative_error(ops.conv2d(*arguments), F.conv2d(*arguments)) < 2e-6
    with pytest.raises(ValueError, match=r"grad_y: expected \[2, 8, 6, 6\], found \[1, 8, 6, 6\]"):
        ops.conv2d_backward(x[:1], x, weight, 1, 1, 1, 1, (True, False, False))
    with pytest.raises(ops.BackendError, match="backend: expected auto"):
        ops.conv2d(x, weight, backend="cudnn")
    assert ops.describe()["conv2d"]["cpu"] == "cpp"


@pytest.mark.parametrize(("name", "size"), [("disks", 16), ("sprites", 32)])
def test_gradients_of_a_step_are_as_exact_as_torchs(name, size):
    """All of them together, against float64; torch in channels-last memory too. Found: 7e-7 and 6e-7; torch's 1.5e-6 and 3.7e-6."""
    config = load_config(name)
    x_0 = normal(16, 1, size, size, dtype=torch.float32).tanh()
    torch.manual_seed(0)
    step = Step.of(config, x_0)
    torch.nn.init.normal_(step.sami.denoiser.out.weight, std=0.02)  # it starts as zero, where almost all gradients are zero too
    sami = copy.deepcopy(step.sami).to(memory_format=torch.channels_last)
    rival = Step(sami, x_0.contiguous(memory_format=torch.channels_last), step.objective, step.kl_weight)

    def flat(run):
        return torch.cat([gradient.double().flatten() for gradient in run()[1:]])

    exact = flat(step.reference(torch.float64))
    ours, torchs = ((flat(run) - exact).norm() / exact.norm() for run in (step.ours("auto"), rival.reference()))
    assert ours <= max(torchs, 1e-6)
