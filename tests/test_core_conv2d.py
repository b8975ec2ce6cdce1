"""The compiled convolution and its gradients against torch in float64."""

import pytest
import torch
import torch.nn.functional as F
from helpers import core_launchers, normal, relative_error

# B, C, O, H, W: one of each; sides that are odd or 1; channels that no register divides, or that fill it; more than one block and piece;
# sides that tiles of 4x4 results divide or not, and where those of 2x2 take over
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
WINOGRAD = (3, 1, 1)  # size of the kernel, stride, padding
DIRECT = [(3, 2, 1), (1, 1, 0), (1, 2, 0), (3, 1, 0), (3, 3, 2), (5, 2, 1)]
DIRECT_SHAPES = [(1, 1, 1, 5, 6), (3, 1, 8, 9, 8), (2, 8, 1, 7, 16), (2, 31, 33, 13, 12), (40, 8, 16, 8, 8), (1, 40, 24, 31, 32)]
# Largest error over the largest value, against float64. Found with tiles of 4x4: 3e-6 for y and x_bar, 4e-6 for weight_bar, 1e-6 for
# bias_bar; with 2x2: 6.4e-7 and 1.1e-6; by torch itself in float32: 5.4e-7, 9.2e-6 and 4.9e-6.
LIMITS = {"y": 5e-6, "x_bar": 5e-6, "weight_bar": 6e-6, "bias_bar": 1.5e-6}
DIRECT_LIMITS = {"y": 1.5e-6, "x_bar": 1.5e-6, "weight_bar": 4e-6, "bias_bar": 1.5e-6}


@pytest.fixture(scope="module")
def core():
    return core_launchers()


def inputs(batch, channels, outputs, height, width, settings=WINOGRAD):
    """x, weight, bias, grad_y"""
    size, stride, padding = settings
    sides = [(side + 2 * padding - size) // stride + 1 for side in (height, width)]
    return (
        normal(batch, channels, height, width, dtype=torch.float32),
        normal(outputs, channels, size, size, seed=1, dtype=torch.float32),
        normal(outputs, seed=2, dtype=torch.float32),
        normal(batch, outputs, *sides, seed=3, dtype=torch.float32),
    )


def run_core(core, x, weight, bias, grad_y, settings=WINOGRAD):
    size, *steps = settings
    weight_bar, bias_bar = core.conv2d_bwd_weight(grad_y, x, True, *steps, size)
    return {
        "y": core.conv2d_fwd(x, weight, bias, *steps),
        "x_bar": core.conv2d_bwd_input(grad_y, weight, *steps, *x.shape[2:]),
        "weight_bar": weight_bar,
        "bias_bar": bias_bar,
    }


def run_torch(x, weight, bias, grad_y, settings=WINOGRAD):
    _, stride, padding = settings
    settings = [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1
    bars = torch.ops.aten.convolution_backward(grad_y, x, weight, [len(bias)], *settings, [True, True, True])
    return {"y": F.conv2d(x, weight, bias, stride, padding), "x_bar": bars[0], "weight_bar": bars[1], "bias_bar": bars[2]}


def check(core, *given, settings=WINOGRAD):
    found, expected = run_core(core, *given, settings), run_torch(*(a.double() for a in given), settings)
    for name, limit in (LIMITS if settings == WINOGRAD else DIRECT_LIMITS).items():
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


@pytest.mark.parametrize("settings", DIRECT)
@pytest.mark.parametrize("shape", DIRECT_SHAPES)
def test_other_settings_against_float64(core, shape, settings):
    check(core, *inputs(*shape, settings), settings=settings)


def test_sums_over_many_positions(core):
    """Values of one sign, whose sums grow with the number of positions."""
    x, weight, bias, grad_y = inputs(8, 8, 16, 64, 64)
    check(core, x.abs(), weight, bias, grad_y.abs())


def test_without_bias(core):
    x, weight, bias, grad_y = inputs(2, 5, 7, 6, 5)
    assert torch.equal(core.conv2d_fwd(x, weight, None, 1, 1), core.conv2d_fwd(x, weight, torch.zeros_like(bias), 1, 1))
    weight_bar, bias_bar = core.conv2d_bwd_weight(grad_y, x, False, 1, 1, 3)
    assert bias_bar.numel() == 0
    assert torch.equal(weight_bar, core.conv2d_bwd_weight(grad_y, x, True, 1, 1, 3)[0])


@pytest.mark.parametrize("shape", [(2, 5, 7, 9, 6), (3, 32, 16, 8, 8)])
def test_gradients_are_adjoint(core, shape):
    """<y, grad_y> = <x, x_bar> = <weight, weight_bar>"""
    x, weight, _, grad_y = inputs(*shape)
    y, x_bar = core.conv2d_fwd(x, weight, None, 1, 1), core.conv2d_bwd_input(grad_y, weight, 1, 1, *x.shape[2:])
    weight_bar, _ = core.conv2d_bwd_weight(grad_y, x, False, 1, 1, 3)
    products = [(a.double() * b.double()).sum() for a, b in ((y, grad_y), (x, x_bar), (weight, weight_bar))]
    scale = (y.double() * grad_y.double()).abs().sum()
    assert max(products) - min(products) <= 1e-6 * scale


@pytest.mark.parametrize("pixel", [(0, 0), (0, 4), (4, 2), (5, 0), (5, 4)])
def test_one_pixel(core, pixel):
    """A single 1 in the input gives the weights, exactly with tiles of 2x2, which 6x5 pixels are cut into."""
    x, weight = torch.zeros(1, 1, 6, 5), torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    x[0, 0, pixel[0], pixel[1]] = 1.0
    assert torch.equal(core.conv2d_fwd(x, weight, None, 1, 1), F.conv2d(x, weight, padding=1))
    assert torch.equal(core.conv2d_bwd_input(x, weight, 1, 1, 6, 5), F.conv2d(x, weight.flip(2, 3), padding=1))


@pytest.mark.parametrize(("side", "largest"), [(6, 1 / 5), (8, 1 / 120)])
def test_range(core, side, largest):
    """Pixels up to that share of float32's range, with tiles of 2x2 and of 4x4 results."""
    x = torch.full((1, 1, side, side), largest * torch.finfo(torch.float32).max)
    x[:, :, ::2] *= -1
    x[:, :, :, ::3] *= -1
    weight = torch.full((1, 1, 3, 3), 1 / 9)
    assert relative_error(core.conv2d_fwd(x, weight, None, 1, 1), F.conv2d(x.double(), weight.double(), padding=1)) < 5e-6


def test_pixels_that_no_result_sees(core):
    """A kernel of one pixel steps over them; images smaller than a kernel have no results."""
    grad_x = core.conv2d_bwd_input(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1), 2, 0, 4, 3)
    assert torch.equal(grad_x[0, 0], torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 0, 1], [0, 0, 0]]))
    assert core.conv2d_fwd(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 3, 3), None, 1, 0).shape == (1, 1, 0, 0)
    assert torch.equal(core.conv2d_bwd_input(torch.ones(1, 1, 0, 0), torch.ones(1, 1, 3, 3), 1, 0, 2, 2), torch.zeros(1, 1, 2, 2))


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


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((2, 64, 32, 33, 31), WINOGRAD),
        ((40, 8, 12, 8, 8), WINOGRAD),
        ((1, 200, 40, 6, 6), WINOGRAD),
        ((40, 32, 12, 8, 8), (3, 2, 1)),
        ((3, 64, 32, 31, 33), (1, 1, 0)),
    ],
)
def test_number_of_threads(core, shape, settings):
    given, results = inputs(*shape, settings), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run_core(core, *given, settings))
    for other in results[1:]:
        assert all(torch.equal(other[name], results[0][name]) for name in other)


# Odd inputs


@pytest.mark.parametrize("settings", [WINOGRAD, (3, 2, 1)])
@pytest.mark.parametrize("shape", [(0, 3, 5, 4, 4), (2, 3, 5, 0, 4), (2, 3, 5, 4, 0)])
def test_nothing(core, shape, settings):
    given = inputs(*shape, settings)
    found = run_core(core, *given, settings)
    assert found["y"].shape == given[3].shape
    assert found["x_bar"].shape == given[0].shape
    assert torch.equal(found["weight_bar"], torch.zeros(5, 3, 3, 3))
    assert torch.equal(found["bias_bar"], torch.zeros(5))


def test_errors(core):
    x, weight, bias, grad_y = inputs(2, 3, 5, 4, 4)
    wrong = [
        (core.conv2d_fwd, (x[0], weight, bias, 1, 1)),
        (core.conv2d_fwd, (x[:, :2], weight, bias, 1, 1)),
        (core.conv2d_fwd, (x[:, :0], weight[:, :0], bias, 1, 1)),
        (core.conv2d_fwd, (x, weight[:, :, :1], bias, 1, 1)),
        (core.conv2d_fwd, (x, weight, bias[:4], 1, 1)),
        (core.conv2d_fwd, (x.double(), weight, bias, 1, 1)),
        (core.conv2d_fwd, (x, weight.half(), bias, 1, 1)),
        (core.conv2d_fwd, (x, weight, bias.double(), 1, 1)),
        (core.conv2d_fwd, (x, weight, bias, 0, 1)),
        (core.conv2d_fwd, (x, weight, bias, 1, 3)),
        (core.conv2d_bwd_input, (grad_y[:, :4], weight, 1, 1, 4, 4)),
        (core.conv2d_bwd_input, (grad_y.double(), weight, 1, 1, 4, 4)),
        (core.conv2d_bwd_input, (grad_y, weight, 1, 1, 4, 5)),
        (core.conv2d_bwd_weight, (grad_y[:1], x, True, 1, 1, 3)),
        (core.conv2d_bwd_weight, (grad_y[:, :, 1:], x, True, 1, 1, 3)),
        (core.conv2d_bwd_weight, (grad_y, x.bfloat16(), True, 1, 1, 3)),
        (core.conv2d_bwd_weight, (grad_y, x, True, 2, 1, 3)),
        (core.conv2d_bwd_weight, (grad_y, x, True, 1, 0, 0)),
    ]
    for launcher, arguments in wrong:
        with pytest.raises(RuntimeError, match=r"conv2d_.*: expected"):
            launcher(*arguments)
