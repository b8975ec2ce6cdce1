"""The launchers of group norm on every backend against their twins in plain torch."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import LaunchersOn, normal, on, relative_error
from test_group_norm_silu import ALL, EMPTY, LAUNCHED, NONE, TILED, assert_results, double, launcher_inputs, run_launchers, twins

from sami_fast.ops.backend import BACKENDS

# Largest error over the largest value, against float64. Found, of the C++ core: 3e-15 and 6e-7.
LIMITS = {torch.float64: 2e-14, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
DTYPES = list(LIMITS)
# In lower precision Triton, whose interpreter takes its time, has the one case below.
ON = (
    on(*DTYPES, backends=["cpp", "cuda"])
    + on(torch.float32, torch.float64, backends=["reference"])
    + on(torch.float32, backends=["triton"])
)
# Rows of registers: fewer elements than one, one and a few more, channels that are no whole number of them
ROWS = [
    ((2, 3, 2), 1),
    ((1, 6, 5), 2),
    ((2, 24, 17), 3),
    ((1, 40, 33), 5),
    ((3, 10, 130), 2),
    ((1, 36, 7, 9), 4),
    ((2, 200, 3), 8),
    ((1, 7, 1), 1),
]


@pytest.fixture
def core(backend):
    """What a launcher leaves out is an empty tensor in the compiled core, and None in its twin."""
    launchers = LaunchersOn("group_norm_silu", backend)

    def bwd_bwd(*args):
        gg_y, *rest = launchers.group_norm_silu_bwd_bwd(*args)
        return gg_y if args[-1] else None, *rest

    names = ("group_norm_silu_fwd", "group_norm_silu_bwd", "group_norm_silu_tan")
    return SimpleNamespace(backend=backend, **{name: getattr(launchers, name) for name in names}, group_norm_silu_bwd_bwd=bwd_bwd)


def check(core, given: dict, num_groups: int, silu: bool = True, parts: tuple[str, ...] = ALL, limit: float | None = None) -> dict:
    found, expected = run_launchers(core, given, num_groups, silu, parts), run_launchers(twins, double(given), num_groups, silu, parts)
    limit = LIMITS[given["x"].dtype] if limit is None else limit
    assert_results(found, expected, limit, limit)
    return found


@pytest.mark.parametrize(("backend", "dtype"), ON)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("shape", "num_groups"), LAUNCHED + ROWS)
def test_launchers(core, shape, num_groups, silu, last, dtype):
    check(core, launcher_inputs(shape, dtype, last=last), num_groups, silu)


@pytest.mark.parametrize(("backend", "dtype"), ON)
@pytest.mark.parametrize(("shape", "num_groups", "last"), TILED)
def test_launchers_of_many_pieces(core, shape, num_groups, last, dtype):
    check(core, launcher_inputs(shape, dtype, last=last), num_groups)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("parameter_dtype", [None, torch.float32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_lower_precision(core, dtype, limit, parameter_dtype):
    """Results differ from the exact ones by their own rounding; float32 parameters keep float32 gradients."""
    given = launcher_inputs((2, 8, 10, 10), dtype, parameter_dtype)
    found, expected = run_launchers(core, given, 2), run_launchers(twins, double(given), 2)
    assert_results(found, expected, limit)
    assert found["mean"].dtype == found["rstd"].dtype == torch.float32
    for name in ("y", "grad_x", "ty", "gg_y", "x_bar"):
        assert found[name].dtype == dtype
    for name in ("grad_weight", "grad_bias", "weight_bar", "bias_bar"):
        assert found[name].dtype == (parameter_dtype or dtype)
    exact = ("mean", "rstd", *(("grad_weight", "grad_bias", "weight_bar", "bias_bar") if parameter_dtype else ()))
    assert_results({name: found[name] for name in exact}, {name: expected[name] for name in exact}, 2e-6)


@pytest.mark.parametrize("parts", [NONE, ("weight",), ("bias", "tangent"), ("y_bar",), ("weight", "y_bar", "tangent")])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_optional_parts(core, last, parts):
    check(core, launcher_inputs((2, 6, 7), torch.float32, last=last), 2, parts=parts)


@pytest.mark.parametrize("backend", ["cpp"])
@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("last", [False, True])
def test_threads_change_no_bit(core, last, threads):
    given = launcher_inputs((5, 24, 37, 11), last=last)
    alone = run_launchers(core, given, 3)
    torch.set_num_threads(threads)
    together = run_launchers(core, given, 3)
    assert all(torch.equal(alone[name], value) for name, value in together.items())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("last", [False, True])
def test_launchers_keep_the_layout_of_x(core, last):
    """Whatever the layout of the other tensors, which here have the other one."""
    given, other = launcher_inputs((2, 6, 4, 5), last=last), launcher_inputs((2, 6, 4, 5), last=not last)
    found = check(core, {**other, "x": given["x"]}, 2)
    for name in ("y", "grad_x", "ty", "gg_y", "x_bar"):
        assert found[name].stride() == given["x"].stride(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_views(core):
    given = launcher_inputs((2, 6, 4, 5))
    views = {name: value.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3) for name, value in given.items() if value.dim() == 4}
    views |= {name: torch.stack([value, value], 1)[:, 0] for name, value in given.items() if value.dim() == 1}
    check(core, views, 3)
    # Starting between two registers, inside memory that is no multiple of them
    for last in (False, True):
        given = launcher_inputs((2, 6, 4, 5), last=last)
        check(core, {name: torch.cat([value.new_zeros(1, *value.shape[1:]), value])[1:] for name, value in given.items()}, 3)
    check(core, {**given, "grad_y": torch.full((), 0.7).expand(2, 6, 4, 5)}, 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", EMPTY)
def test_launchers_of_nothing(core, shape, last):
    out = run_launchers(core, launcher_inputs(shape, last=last), 2)
    for name in ("mean", "rstd"):
        assert out[name].shape == (shape[0], 2), name  # of no values: any number will do
        assert out[name].isfinite().all(), name
    for name in ("y", "grad_x", "ty", "gg_y", "x_bar"):
        assert out[name].shape == shape
    for name in ("grad_weight", "grad_bias", "weight_bar", "bias_bar"):
        assert torch.equal(out[name], torch.zeros(4)), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 0, 4, 4), (2, 0), (0, 0, 3)])
def test_launchers_without_channels(core, shape):
    out = run_launchers(core, launcher_inputs(shape), 2)
    assert all(out[name].shape == shape for name in ("y", "grad_x", "ty", "gg_y", "x_bar"))
    assert all(out[name].shape == (0,) for name in ("grad_weight", "grad_bias", "weight_bar", "bias_bar"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 4, 5, 5), (1, 4, 1, 1), (3, 4)])
def test_launchers_of_constant_groups(core, shape):
    """Variance 0: x_hat is 0, rstd 1 / sqrt(norm_eps), and nothing divides by zero."""
    given = launcher_inputs(shape, scale=0.0, offset=7.0)
    out = run_launchers(core, given, 4)
    bias = given["bias"].view(1, 4, *(1,) * (len(shape) - 2)).expand(shape)
    # torch's own forward, which the reference uses, computes x scale + shift, a difference of large numbers here
    assert relative_error(out["y"], F.silu(bias)) < (2e-4 if core.backend == "reference" else 1e-6)
    assert relative_error(out["mean"], torch.full_like(out["mean"], 7.0)) == 0
    assert relative_error(out["rstd"], torch.full_like(out["rstd"], 1e5**0.5)) < 1e-6
    assert out["grad_weight"].abs().max() == 0
    assert_results(out, run_launchers(twins, double(given), 4), 1e-5, 0.05)  # rstd^2 = 1e5 times rounding errors remain


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("shape", "last"), [((2, 8, 16, 16), False), ((2, 8, 16, 16), True), ((1, 2, 4200), False)])
def test_launchers_far_from_zero(core, shape, last):
    """float32 holds 1e4 + normals to 5e-4, and the mean no better; E[x^2] - mean^2 would be lost altogether."""
    given = launcher_inputs(shape, offset=1e4, last=last)
    found, expected = run_launchers(core, given, 2), run_launchers(twins, double(given), 2)
    # torch's own statistics, which the reference uses, are worse than those of the kernels
    assert_results({"rstd": found["rstd"]}, {"rstd": expected["rstd"]}, 2e-4 if core.backend == "reference" else 2e-6)
    assert_results(found, expected, 5e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_launchers_where_silu_is_flat(core):
    """|h| of hundreds: sigmoid is 0 or 1 to the last bit, and exp(-h) overflows."""
    given = launcher_inputs((1, 4, 40))
    given["weight"] = 300 * given["weight"]
    found = check(core, given, 2, limit=2e-4)
    assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e21, 1e25, 1e35])
def test_what_float32_cannot_square_leaves_the_bias(core, scale):
    bias = normal(4, seed=1, dtype=torch.float32)
    y, _, rstd = core.group_norm_silu_fwd(scale * normal(1, 4, 9, dtype=torch.float32), torch.ones(4), bias, 2, 1e-5, True)
    assert (rstd == 0).all()
    assert relative_error(y, F.silu(bias)[None, :, None].expand(1, 4, 9)) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_stay_as_they_were(core):
    given = launcher_inputs((2, 4, 6))
    before = {name: value.clone() for name, value in given.items()}
    for silu in (False, True):
        out = run_launchers(core, given, 2, silu)
        assert all(torch.equal(given[name], value) for name, value in before.items())
        storages = [value.untyped_storage().data_ptr() for value in (*out.values(), *given.values())]
        assert len(set(storages)) == len(storages)
