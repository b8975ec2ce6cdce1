"""Group norm with SiLU, against torch's own and against loops; its launchers' twins against autograd (test_core_group_norm_silu.py
holds every backend against those), and what is Triton's alone."""

from functools import partial
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from helpers import KERNELS, normal, relative_error
from sami_fast.kernels import group_norm_silu as kernels
from sami_fast.kernels._common import recording
from torch.autograd import gradcheck, gradgradcheck

from sami_fast import reference
from sami_fast.ops import group_norm_silu

twins = import_module("sami_fast.reference.group_norm_silu")  # the package's own name of it is the op
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

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


def op(x, weight, bias, num_groups, **settings):
    """The op with its arguments in the order of its launchers."""
    return group_norm_silu(x, num_groups, weight, bias, **settings)


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
    assert relative_error(op(*arguments, num_groups, silu=silu), by_hand(*arguments, num_groups, silu=silu)) < 1e-9


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
@pytest.mark.parametrize("given", [(), ("weight",), ("bias",)])
@pytest.mark.parametrize("silu", [False, True])
def test_weight_and_bias_are_optional(given, silu, backend):
    """Values, first and second gradients against torch's group norm, which takes the same arguments in the same order."""
    x, weight, bias = (a.to(DEVICE) for a in inputs((2, 6, 3, 4), torch.float32))
    parameters = {name: value.requires_grad_() for name, value in (("weight", weight), ("bias", bias)) if name in given}

    def found_by(norm, dtype):
        named = {"x": x.detach().to(dtype).requires_grad_(), **{k: v.detach().to(dtype).requires_grad_() for k, v in parameters.items()}}
        weight = named.get("weight")
        if weight is None and dtype == torch.float64:  # torch has no second derivative for a bias alone
            weight = torch.ones(6, dtype=dtype, device=DEVICE)
        y = norm(named["x"], 3, weight, named.get("bias"), 1e-3)
        first = torch.autograd.grad(y, list(named.values()), normal(*y.shape, seed=7).to(y), create_graph=True)
        along = sum((g * normal(*g.shape, seed=8).to(g)).sum() for g in first)
        return [y, *first, *torch.autograd.grad(along, list(named.values()), allow_unused=True, materialize_grads=True)]

    exact = found_by(lambda *a: F.silu(F.group_norm(*a)) if silu else F.group_norm(*a), torch.float64)
    for value, want in zip(found_by(partial(group_norm_silu, silu=silu, backend=backend), torch.float32), exact, strict=True):
        assert relative_error(value, want) < 1e-5 or (value - want).abs().max() < 1e-6


def test_eps():
    arguments = inputs((2, 4, 3))
    found = op(*arguments, 2, eps=0.3)
    assert relative_error(found, by_hand(*arguments, 2, norm_eps=0.3)) < 1e-12


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_lower_precision(dtype, limit):
    arguments = inputs((2, 8, 16, 16), dtype=dtype)
    arguments[0] = arguments[0] + 3  # statistics in the dtype of x would lose the variance
    out = op(*arguments, 4)
    assert out.dtype == dtype
    assert relative_error(out, op(*(a.double() for a in arguments), 4)) < limit


def test_bfloat16_features_with_float32_parameters():
    x, weight, bias = inputs((2, 4, 5, 5), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert op(x.bfloat16(), weight, bias, 2).dtype == torch.bfloat16


# First gradients


@pytest.mark.parametrize("silu", [False, True])
def test_first_gradients(silu):
    assert gradcheck(lambda *a: op(*a, 2, silu=silu), inputs((2, 4, 3), grad=True))


@pytest.mark.parametrize(("shape", "num_groups"), CASES[:1] + CASES[2:5])
def test_first_gradients_against_torch(shape, num_groups):
    arguments = inputs(shape, grad=True)
    cotangent = normal(*shape, seed=7)
    found = torch.autograd.grad(op(*arguments, num_groups), arguments, cotangent)
    expected = torch.autograd.grad(F.silu(F.group_norm(arguments[0], num_groups, *arguments[1:])), arguments, cotangent)
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(found, expected, strict=True))


# Second gradients


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("shape", "num_groups"), [((2, 4, 3), 2), ((1, 3, 2, 2), 1), ((1, 2, 3), 2)])
def test_second_gradients(shape, num_groups, silu):
    assert gradgradcheck(lambda *a: op(*a, num_groups, silu=silu), inputs(shape, grad=True))


def test_second_gradients_by_hand():
    arguments = inputs((2, 4, 5), grad=True)
    cotangent, direction = normal(2, 4, 5, seed=7), normal(2, 4, 5, seed=8)

    def second(out):
        (grad_x,) = torch.autograd.grad(out, arguments[0], cotangent, create_graph=True)
        return torch.autograd.grad(grad_x, arguments[:2], direction)

    found, expected = second(op(*arguments, 2)), second(by_hand(*arguments, 2))
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(found, expected, strict=True))


# Odd inputs


EMPTY = [(0, 4, 3, 3), (2, 4, 0), (2, 4, 0, 3), (0, 4, 0)]


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("shape", EMPTY)
def test_empty(shape, backend):
    arguments = [value.to(DEVICE).requires_grad_() for value in inputs(shape, torch.float32)]
    out = op(*arguments, 2, backend=backend)
    assert out.shape == shape
    grads = torch.autograd.grad(out.sum(), arguments, create_graph=True)
    second = torch.autograd.grad(sum(g.sum() for g in grads), arguments, allow_unused=True, materialize_grads=True)
    for value, first_grad, second_grad in zip(arguments, grads, second, strict=True):
        assert torch.equal(first_grad, torch.zeros_like(value))
        assert torch.equal(second_grad, torch.zeros_like(value))


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (3, 4, 1, 1), (1, 4), (1, 4, 1)])
def test_a_group_of_one_value_leaves_the_bias(shape):
    x, weight, bias = inputs(shape)
    expected = F.silu(bias).view(1, 4, *(1,) * (len(shape) - 2)).expand(shape)
    assert relative_error(op(x, weight, bias, 4), expected) < 1e-9


def test_a_constant_image_leaves_the_bias():
    _, weight, bias = inputs((1, 4, 5, 5))
    out = op(torch.full((1, 4, 5, 5), 7.0, dtype=torch.float64), weight, bias, 2, silu=False)
    assert relative_error(out, bias.view(1, 4, 1, 1).expand(1, 4, 5, 5)) < 1e-9


@pytest.mark.parametrize("scale", [1e-2, 1e9])
def test_scale_of_x_cancels(scale):
    x, weight, bias = inputs((2, 4, 6, 6))
    assert relative_error(op(scale * x, weight, bias, 2, eps=0.0), op(x, weight, bias, 2, eps=0.0)) < 1e-12


def test_non_contiguous_inputs():
    x, weight, bias = normal(2, 5, 3, 4).permute(0, 3, 1, 2), normal(8)[::2], normal(8, seed=1)[::2]
    expected = op(x.contiguous(), weight.contiguous(), bias.contiguous(), 2)
    assert relative_error(op(x, weight, bias, 2), expected) < 1e-13


# The launchers

ALL, NONE = ("weight", "bias", "y_bar", "tangent"), ()
# Shape of x, groups
LAUNCHED = [((2, 4, 3, 3), 2), ((3, 6, 63), 3), ((2, 63, 5, 1), 7), ((2, 8), 2), ((1, 4, 5, 5, 5), 4), ((1, 70, 9), 1), ((1, 32, 64), 2)]
# Several tiles of positions, blocks of channels, and positions split among programs; and whether channels lie together
TILED = [
    ((1, 3, 1001), 1, False),
    ((1, 4, 1024), 2, False),
    ((1, 48, 80), 1, False),
    ((1, 40, 49), 1, False),
    ((1, 2, 4201), 1, False),
    ((1, 7, 1000), 1, True),
    ((1, 8, 1200), 1, True),
    ((1, 48, 300), 1, True),
    ((2, 140), 2, False),
]


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def launcher_inputs(shape, dtype=torch.float32, parameter_dtype=None, last=False, scale=1.0, offset=0.3, device=DEVICE) -> dict:
    """x, three tensors of its shape, two parameters and their two cotangents."""
    order = channels_last if last else torch.Tensor.contiguous
    tensors = {name: order(normal(*shape, seed=seed)).to(device) for seed, name in enumerate(("x", "grad_y", "ggx", "y_bar"))}
    tensors["x"] = scale * tensors["x"] + offset
    tensors = {name: value.to(dtype) for name, value in tensors.items()}
    for seed, name in enumerate(("weight", "bias", "ggweight", "ggbias")):
        tensors[name] = normal(shape[1], seed=4 + seed, dtype=parameter_dtype or dtype).to(device)
    return tensors


def double(tensors: dict) -> dict:
    return {name: value.double() for name, value in tensors.items()}


def run_launchers(module, given: dict, num_groups: int, silu: bool = True, parts: tuple[str, ...] = ALL) -> dict:
    """Every result of every launcher by name; `parts` are the optional ones."""
    x, parameters = given["x"], (given["weight"], given["bias"])
    out = {}
    out["y"], out["mean"], out["rstd"] = module.group_norm_silu_fwd(x, *parameters, num_groups, 1e-5, silu)
    saved = x, *parameters, out["mean"], out["rstd"], num_groups, silu
    for name, value in zip(("grad_x", "grad_weight", "grad_bias"), module.group_norm_silu_bwd(given["grad_y"], *saved), strict=True):
        out[name] = value
    out["ty"] = module.group_norm_silu_tan(given["ggx"], *saved)
    ggweight, ggbias, y_bar = (
        given[name] if part in parts else None for name, part in zip(("ggweight", "ggbias", "y_bar"), ALL, strict=False)
    )
    second = module.group_norm_silu_bwd_bwd(given["ggx"], ggweight, ggbias, given["grad_y"], *saved, y_bar, "tangent" in parts)
    for name, value in zip(("gg_y", "x_bar", "weight_bar", "bias_bar"), second, strict=True):
        out[name] = value
    assert (out["gg_y"] is None) == ("tangent" not in parts)
    if out["gg_y"] is None:
        del out["gg_y"]
    return out


def assert_results(found: dict, expected: dict, rtol: float, floor: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        assert found[name].shape == want.shape, name
        if want.numel():
            error, largest = (found[name].double() - want).abs().max().item(), want.abs().max().item()
            assert error <= rtol * largest + floor, f"{name}: off by {error:.3g} of {largest:.3g}"


def autograd_results(given: dict, num_groups: int, silu: bool, parts: tuple[str, ...]) -> dict:
    """What the launchers claim to be, by differentiating the public op."""
    leaves = {name: given[name].clone().requires_grad_() for name in ("grad_y", "x", "weight", "bias")}
    inputs = [leaves[name] for name in ("x", "weight", "bias")]
    y = reference.group_norm_silu(inputs[0], num_groups, *inputs[1:], silu=silu)
    grads = torch.autograd.grad(y, inputs, leaves["grad_y"], create_graph=True)
    objective = (given["ggx"] * grads[0]).sum()
    if "weight" in parts:
        objective = objective + (given["ggweight"] * grads[1]).sum()
    if "bias" in parts:
        objective = objective + (given["ggbias"] * grads[2]).sum()
    if "y_bar" in parts:
        objective = objective + (given["y_bar"] * y).sum()
    second = torch.autograd.grad(objective, list(leaves.values()), allow_unused=True, materialize_grads=True)
    groups = given["x"].reshape(given["x"].shape[0], num_groups, -1)
    out = {"y": y, "mean": groups.mean(-1), "rstd": (groups.var(-1, correction=0) + 1e-5).rsqrt()}
    out |= dict(zip(("grad_x", "grad_weight", "grad_bias"), grads, strict=True))
    x = given["x"]
    out["ty"] = torch.func.jvp(
        lambda x: reference.group_norm_silu(x, num_groups, given["weight"], given["bias"], silu=silu), (x,), (given["ggx"],)
    )[1]
    out |= dict(zip(("gg_y", "x_bar", "weight_bar", "bias_bar"), second, strict=True))
    return {name: value for name, value in out.items() if name != "gg_y" or "tangent" in parts}


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("shape", "num_groups"), LAUNCHED)
def test_twins_are_what_autograd_finds(shape, num_groups, silu):
    given = launcher_inputs(shape, torch.float64, device="cpu")
    assert_results(run_launchers(twins, given, num_groups, silu), autograd_results(given, num_groups, silu, ALL), 1e-12, 1e-12)


@pytest.mark.parametrize("parts", [NONE, ("weight",), ("bias", "tangent"), ("y_bar",), ("weight", "y_bar", "tangent")])
@pytest.mark.parametrize("silu", [False, True])
def test_optional_parts(silu, parts):
    given = launcher_inputs((2, 6, 7), torch.float64, device="cpu")
    expected = autograd_results(given, 2, silu, parts)
    assert_results(run_launchers(twins, given, 2, silu, parts), expected, 1e-12, 1e-12)


def test_tangent_and_joint_backward_are_one_second_backward():
    given = launcher_inputs((2, 4, 9), torch.float64, device="cpu")
    out = run_launchers(twins, given, 2, parts=("tangent",))
    assert relative_error(out["ty"], out["gg_y"]) < 1e-14


def test_large_groups_are_split_and_small_ones_are_not():
    def splits(shape, num_groups, last):
        x = torch.empty(shape, device="meta")
        return kernels._plan(channels_last(x) if last else x, num_groups, num_warps=4).num_splits

    assert [splits(*case) for case in TILED] == [2, 1, 1, 1, 7, 4, 2, 5, 1]
    assert splits((8, 128, 256, 256), 32, False) > 1
    assert splits((32, 64, 16, 16), 4, False) == splits((64, 32, 8, 8), 8, True) == 1
    for positions in (1, 63, 1000, 4096, 70_000, 10**7):  # every split has a tile, and together they have all
        for last in (False, True):
            x = torch.empty(1, 4, positions, device="meta")
            plan = kernels._plan(channels_last(x) if last else x, 2, num_warps=8)
            tiles = -(-positions // plan.block_p)
            each = -(-tiles // plan.num_splits)
            assert 1 <= plan.num_splits <= kernels.MAX_SPLITS.value
            assert (plan.num_splits - 1) * each < tiles <= plan.num_splits * each


def binaries(call) -> set[tuple]:
    """What selects the binaries of the kernels that a call launches: types, compile-time constants, schedule."""
    with recording() as launches:
        call()
    for item in launches:
        tensors = [value for value in item.args if isinstance(value, torch.Tensor)]
        assert all(value.storage_offset() * value.element_size() % 16 == 0 for value in tensors)
    return {
        (
            item.kernel.fn.__name__,
            *(value.dtype if isinstance(value, torch.Tensor) else type(value) for value in item.args),
            *sorted(item.constants.items()),
            item.num_warps,
            item.num_stages,
        )
        for item in launches
    }


def test_every_binary_is_compiled_ahead_of_time():
    compiled = set().union(*(binaries(call) for _, call in kernels.aot_cases()))
    found = set()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for size in (1, 2, 4, 5, 8, 9, 12, 16, 33):
            for positions in (1, 2, 16, 17, 36, 63, 64, 65, 72, 255, 256, 257, 1000):
                for last, start in ((False, 0), (True, 0), (False, 1), (True, 1)):
                    shape = 2, 3 * size, positions
                    values = torch.empty(start + 6 * size * positions, dtype=dtype, device="meta")[start:]
                    x = values.view(2, positions, 3 * size).mT if last else values.view(shape)
                    parameter = torch.empty(3 * size + start, dtype=dtype, device="meta")[start:]
                    given = dict.fromkeys(("x", "grad_y", "ggx", "y_bar"), x)
                    given |= dict.fromkeys(("weight", "bias", "ggweight", "ggbias"), parameter)
                    found |= binaries(partial(run_launchers, kernels, given, 3))
    assert found == compiled


def assert_real_size(shape, num_groups, dtype, last) -> None:
    """Measured on nothing yet: limits are those of the small sizes, with room for longer sums."""
    limit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}[dtype]
    given = launcher_inputs(shape, dtype, last=last)
    found, again = run_launchers(kernels, given, num_groups), run_launchers(kernels, given, num_groups)
    assert all(torch.equal(value, again[name]) for name, value in found.items())
    assert_results(found, run_launchers(twins, double(given), num_groups), limit)


@pytest.mark.gpu
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "num_groups"),
    [((32, 64, 16, 16), 4), ((64, 32, 8, 8), 8), ((8, 128, 64, 64), 32), ((4, 64, 256, 256), 4), ((16, 512, 7, 7), 1)],
)
def test_kernels_at_real_sizes(shape, num_groups, dtype, last):
    assert_real_size(shape, num_groups, dtype, last)


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
        op(torch.zeros(2, 4, 3, 3), torch.zeros(weight), torch.zeros(bias), num_groups)
