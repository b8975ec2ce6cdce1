"""The compiled 3x3 convolution and its gradients against torch in float64."""

import pytest
import torch
import torch.nn.functional as F
from helpers import core_launchers, normal, relative_error

# B, C, O, H, W: one of each; sides that are odd or 1; channels that no register divides, or that fill it; more than one block and piece
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 3, 5, 1, 4),
    (2, 5, 3, 7, 1),
    (3, 1, 8, 5, 5),
    (3, 8, 1, 9, 8),
    (2, 2, 2, 2, 3),
    (5, 31, 32, 3, 2),
    (2, 32, 31, 13, 11),
    (2, 200, 17, 6, 5),
    (1, 12, 200, 4, 4),
    (2, 9, 33, 8, 8),
    (4, 64, 64, 4, 4),
    (2, 128, 64, 15, 17),
    (3, 64, 128, 16, 16),
    (2, 3, 32, 64, 64),
    (2, 32, 3, 64, 63),
    (40, 8, 8, 16, 16),
]
# Largest error over the largest value, against float64. Found: 6.4e-7 for y and x_bar, 1.1e-6 for weight_bar, 3.5e-7 for bias_bar; by
# torch itself in float32: 5.4e-7, 9.2e-6 and 4.9e-6.
LIMITS = {"y": 1.5e-6, "x_bar": 1.5e-6, "weight_bar": 3e-6, "bias_bar": 1e-6}


@pytest.fixture(scope="module")
def core():
    return core_launchers()


def inputs(batch, channels, outputs, *sides, dtype=torch.float32):
    """x, weight, bias, grad_y"""
    return (
        normal(batch, channels, *sides, dtype=dtype),
        normal(outputs, channels, 3, 3, seed=1, dtype=dtype),
        normal(outputs, seed=2, dtype=dtype),
        normal(batch, outputs, *sides, seed=3, dtype=dtype),
    )


def run_core(core, x, weight, bias, grad_y):
    weight_bar, bias_bar = core.conv2d_bwd_weight(grad_y, x, True)
    return {
        "y": core.conv2d_fwd(x, weight, bias),
        "x_bar": core.conv2d_bwd_input(grad_y, weight),
        "weight_bar": weight_bar,
        "bias_bar": bias_bar,
    }


def run_torch(x, weight, bias, grad_y):
    ones = [1, 1]
    bars = torch.ops.aten.convolution_backward(grad_y, x, weight, [len(bias)], ones, ones, ones, False, [0, 0], 1, [True, True, True])
    return {"y": F.conv2d(x, weight, bias, padding=1), "x_bar": bars[0], "weight_bar": bars[1], "bias_bar": bars[2]}


def check(core, *given):
    found, expected = run_core(core, *given), run_torch(*(a.double() for a in given))
    for name, limit in LIMITS.items():
        assert found[name].dtype == torch.float32
        assert relative_error(found[name], expected[name]) <= limit, name
    assert found["y"].is_contiguous(memory_format=torch.channels_last)
    assert found["x_bar"].is_contiguous(memory_format=torch.channels_last)
    assert found["weight_bar"].is_contiguous()
    return found


# Values


@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(core, shape):
    check(core, *inputs(*shape))


def test_sums_over_many_positions(core):
    """Values of one sign, whose sums grow with the number of positions."""
    x, weight, bias, grad_y = inputs(8, 8, 16, 64, 64)
    check(core, x.abs(), weight, bias, grad_y.abs())


def test_without_bias(core):
    x, weight, bias, grad_y = inputs(2, 5, 7, 6, 5)
    assert torch.equal(core.conv2d_fwd(x, weight, None), core.conv2d_fwd(x, weight, torch.zeros_like(bias)))
    weight_bar, bias_bar = core.conv2d_bwd_weight(grad_y, x, False)
    assert bias_bar.numel() == 0
    assert torch.equal(weight_bar, core.conv2d_bwd_weight(grad_y, x, True)[0])


@pytest.mark.parametrize("shape", [(2, 5, 7, 9, 6), (3, 32, 16, 8, 8)])
def test_gradients_are_adjoint(core, shape):
    """<y, grad_y> = <x, x_bar> = <weight, weight_bar>"""
    x, weight, _, grad_y = inputs(*shape)
    y, x_bar = core.conv2d_fwd(x, weight, None), core.conv2d_bwd_input(grad_y, weight)
    weight_bar, _ = core.conv2d_bwd_weight(grad_y, x, False)
    products = [(a.double() * b.double()).sum() for a, b in ((y, grad_y), (x, x_bar), (weight, weight_bar))]
    scale = (y.double() * grad_y.double()).abs().sum()
    assert max(products) - min(products) <= 1e-6 * scale


@pytest.mark.parametrize("pixel", [(0, 0), (0, 4), (5, 2), (6, 0), (6, 4)])
def test_one_pixel(core, pixel):
    """A single 1 in the input gives the weights, exactly."""
    x, weight = torch.zeros(1, 1, 7, 5), torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    x[0, 0, pixel[0], pixel[1]] = 1.0
    assert torch.equal(core.conv2d_fwd(x, weight, None), F.conv2d(x, weight, padding=1))
    assert torch.equal(core.conv2d_bwd_input(x, weight), F.conv2d(x, weight.flip(2, 3), padding=1))


# Layouts


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def part(x):
    """Some of a bigger tensor, whose rest is NaN."""
    bigger = torch.full([size + 2 for size in x.shape], float("nan"))
    view = bigger[(slice(1, -1),) * x.dim()]
    return view.copy_(x)


def misaligned(x):
    """At an odd offset of a larger storage, whose rest is NaN, with channels last."""
    storage = torch.full((x.numel() + 2,), float("nan"))
    ordered = channels_last(x)
    return storage[1:-1].as_strided(x.shape, ordered.stride()).copy_(x)


def transposed(x):
    return x.transpose(0, -1).contiguous().transpose(0, -1)


LAYOUTS = [channels_last, part, misaligned, transposed]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 5, 7, 6, 5), (3, 40, 17, 4, 7), (2, 1, 16, 5, 5), (3, 16, 8, 1, 1)])
def test_layouts(core, shape, layout):
    given = inputs(*shape)
    expected = run_core(core, *given)
    arranged = [layout(a) for a in given]
    before = [a.clone() for a in arranged]
    found = check(core, *arranged)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(torch.equal(a, b) for a, b in zip(arranged, before, strict=True))


# The same bits whatever runs them


@pytest.mark.parametrize("shape", [(2, 64, 32, 33, 31), (40, 8, 12, 8, 8), (1, 200, 40, 6, 6)])
def test_number_of_threads(core, shape):
    given, results = inputs(*shape), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run_core(core, *given))
    for other in results[1:]:
        assert all(torch.equal(other[name], results[0][name]) for name in other)


# Odd inputs


@pytest.mark.parametrize("shape", [(0, 3, 5, 4, 4), (2, 3, 5, 0, 4), (2, 3, 5, 4, 0)])
def test_nothing(core, shape):
    given = inputs(*shape)
    found = run_core(core, *given)
    assert found["y"].shape == given[3].shape
    assert found["x_bar"].shape == given[0].shape
    assert torch.equal(found["weight_bar"], torch.zeros(5, 3, 3, 3))
    assert torch.equal(found["bias_bar"], torch.zeros(5))


def test_errors(core):
    x, weight, bias, grad_y = inputs(2, 3, 5, 4, 4)
    wrong = [
        (core.conv2d_fwd, (x[0], weight, bias)),
        (core.conv2d_fwd, (x[:, :2], weight, bias)),
        (core.conv2d_fwd, (x[:, :0], weight[:, :0], bias)),
        (core.conv2d_fwd, (x, weight[:, :, :1], bias)),
        (core.conv2d_fwd, (x, weight, bias[:4])),
        (core.conv2d_fwd, (x.double(), weight, bias)),
        (core.conv2d_fwd, (x, weight.half(), bias)),
        (core.conv2d_fwd, (x, weight, bias.double())),
        (core.conv2d_bwd_input, (grad_y[:, :4], weight)),
        (core.conv2d_bwd_input, (grad_y.double(), weight)),
        (core.conv2d_bwd_weight, (grad_y[:1], x, True)),
        (core.conv2d_bwd_weight, (grad_y[:, :, 1:], x, True)),
        (core.conv2d_bwd_weight, (grad_y, x.bfloat16(), True)),
    ]
    for launcher, arguments in wrong:
        with pytest.raises(RuntimeError, match=r"conv2d_.*: expected"):
            launcher(*arguments)
