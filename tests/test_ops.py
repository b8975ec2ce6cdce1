"""What all ops have in common: chained derivatives, torch.func and torch.compile, the choice of a backend, bad arguments."""

import inspect
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import KERNELS, core_launchers, normal, positive, relative_error
from torch import Tensor

import sami_fast
from sami_fast import ops, reference
from sami_fast.ops import BackendError, backend, use_backend
from sami_fast.ops.backend import BACKENDS, refusal
from sami_fast.ops.conv2d import ConvolutionLaunchers
from sami_fast.ops.launchers import Launcher, Launchers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPERATORS = torch.ops.sami_fast
INDEX = torch.tensor([0, 5])


def norm_inputs(dtype: torch.dtype) -> list[Tensor]:
    return [normal(2, 4, 3, 2, dtype=dtype), normal(4, seed=1, dtype=dtype), normal(4, seed=2, dtype=dtype)]


def attention_inputs(dtype: torch.dtype) -> list[Tensor]:
    return [normal(1, 5, 2, 8, seed=0, dtype=dtype), *(normal(1, 7, 2, 8, seed=seed, dtype=dtype) for seed in (1, 2))]


def gaussian_inputs(dtype: torch.dtype) -> list[Tensor]:
    return [normal(3, 5, dtype=dtype), normal(3, 5, seed=1, dtype=dtype), positive(3, 5, low=0.3, high=3.0, dtype=dtype)]


def noise_inputs(dtype: torch.dtype) -> list[Tensor]:
    return [normal(2, 1, 3, 5, dtype=dtype), *(positive(2, 3, low=0.1, high=1.0, seed=seed, dtype=dtype) for seed in (1, 2))]


def loss_inputs(dtype: torch.dtype) -> list[Tensor]:
    return [
        *(normal(4, 1, 3, 5, seed=seed, dtype=dtype) for seed in range(3)),
        *(positive(4, low=0.2, high=2.0, seed=seed, dtype=dtype) for seed in range(3)),
    ]


@dataclass(frozen=True)
class Case:
    """An op: what it is called with, and three ways to call it that must agree."""

    inputs: Callable[[torch.dtype], list[Tensor]]
    public: Callable[..., Any]
    operator: Callable[..., Any]  # (backend, *inputs)
    truth: Callable[..., Any]


CASES = {
    "attention": Case(
        attention_inputs,
        lambda q, k, v, **kw: ops.attention(q, k, v, scale=0.4, **kw),
        lambda backend, q, k, v: OPERATORS.attention(q, k, v, 0.4, False, backend)[0],
        lambda q, k, v: reference.attention(q, k, v, scale=0.4),
    ),
    "causal attention": Case(
        lambda dtype: [normal(1, 7, 2, 8, seed=9, dtype=dtype), *attention_inputs(dtype)[1:]],
        lambda q, k, v, **kw: ops.attention(q, k, v, causal=True, **kw),
        lambda backend, q, k, v: OPERATORS.attention(q, k, v, 8**-0.5, True, backend)[0],
        lambda q, k, v: reference.attention(q, k, v, causal=True),
    ),
    "group_norm_silu": Case(
        norm_inputs,
        lambda x, w, b, **kw: ops.group_norm_silu(x, 2, w, b, **kw),
        lambda backend, x, w, b: OPERATORS.group_norm_silu(x, w, b, 2, 1e-5, True, backend)[0],
        lambda x, w, b: reference.group_norm_silu(x, 2, w, b),
    ),
    "group_norm": Case(
        norm_inputs,
        lambda x, w, b, **kw: ops.group_norm_silu(x, 4, w, b, 1e-3, silu=False, **kw),
        lambda backend, x, w, b: OPERATORS.group_norm_silu(x, w, b, 4, 1e-3, False, backend)[0],
        lambda x, w, b: reference.group_norm_silu(x, 4, w, b, 1e-3, silu=False),
    ),
    "gaussian_log_prob": Case(
        gaussian_inputs,
        ops.gaussian_log_prob,
        lambda backend, z, mu, var: OPERATORS.gaussian_log_prob(z, mu, var, backend),
        reference.gaussian_log_prob,
    ),
    "noise_sample": Case(
        noise_inputs,
        lambda x, a, s, **kw: ops.noise_sample(x, a, s, INDEX.to(x.device), seed=3, step=4, **kw)[0],
        lambda backend, x, a, s: OPERATORS.noise_sample(x, a, s, INDEX, 3, 4, 0, True, backend)[0],
        lambda x, a, s: reference.noise_sample(x, a, s, INDEX.to(x.device), seed=3, step=4)[0],
    ),
    "noise_sample, eps dropped": Case(
        noise_inputs,
        lambda x, a, s, **kw: ops.noise_sample(x, a, s, INDEX.to(x.device), seed=3, step=4, store_eps=False, **kw)[0],
        lambda backend, x, a, s: OPERATORS.noise_sample(x, a, s, INDEX, 3, 4, 0, False, backend)[0],
        lambda x, a, s: reference.noise_sample(x, a, s, INDEX.to(x.device), seed=3, step=4)[0],
    ),
    "guided_loss": Case(
        loss_inputs,
        lambda *args, **kw: ops.guided_loss(*args, **kw)[0],
        lambda backend, *args: OPERATORS.guided_loss(*args, None, 1, 0, 0, 0, backend)[0],
        lambda *args: reference.guided_loss(*args)[0],
    ),
}


@pytest.fixture(autouse=True)
def _only_where_the_op_is(request: pytest.FixtureRequest):
    values = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if values.get("backend", "reference") not in backend.OPS.get(values.get("name"), BACKENDS):
        pytest.skip("the op is not on it")


CHAINED = ("attention", "group_norm_silu", "gaussian_log_prob")  # a third derivative has no formula


def leaves(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [value.detach().to(DEVICE).requires_grad_() for value in inputs]


def two_derivatives(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The value, its first gradients and second gradients, each along cotangents that are not all ones."""
    inputs = leaves(inputs)
    value = function(*inputs)
    like = {"dtype": value.dtype, "device": value.device}
    along = normal(*value.shape, seed=20).to(**like)
    first = torch.autograd.grad(value, inputs, along, create_graph=True)
    # What is linear in everything has a first gradient that depends on nothing.
    products = ((g * normal(*g.shape, seed=21 + place).to(**like)).sum() for place, g in enumerate(first) if g.requires_grad)
    second = torch.autograd.grad(sum(products), inputs, allow_unused=True)
    return [value, *first, *(torch.zeros_like(x) if g is None else g for g, x in zip(second, inputs, strict=True))]


# Launchers


@pytest.mark.parametrize("op", Launchers.__subclasses__(), ids=lambda op: op.op)
@pytest.mark.parametrize("name", ["cpp", "triton"])
def test_launchers_have_the_arguments_of_their_twins(op: type[Launchers], name: str):
    if name not in op.backends:
        pytest.skip("the op is not on it")
    core_launchers() if name == "cpp" else pytest.importorskip("triton")
    launchers = {place: launcher for place, launcher in vars(op).items() if isinstance(launcher, Launcher)}
    assert launchers
    for place, launcher in launchers.items():
        found = getattr(op(name), place)
        names = [a.name for a in found.default._schema.arguments] if name == "cpp" else list(inspect.signature(found).parameters)
        assert names == list(inspect.signature(launcher.twin).parameters)
        assert getattr(op("reference"), place) is launcher.twin


# Derivative formulas, exactly: the chain of operators over the launchers' twins in plain torch, in float64.


@pytest.mark.parametrize("name", CASES)
def test_chain_of_formulas(name: str):
    case = CASES[name]
    inputs = [value.requires_grad_() for value in case.inputs(torch.float64)]

    def chain(*args: Tensor) -> Tensor:
        return case.operator("reference", *args)

    assert torch.autograd.gradcheck(chain, inputs)
    assert torch.autograd.gradgradcheck(chain, inputs)
    for found, want in zip(two_derivatives(chain, inputs), two_derivatives(case.truth, inputs), strict=True):
        assert (found - want).abs().max() < 1e-11 * max(1.0, want.abs().max().item())


def assert_as_exact(found: Tensor, rival: Tensor, exact: Tensor) -> None:
    """At most three times as far from float64 as the reference is in the same precision, and a floor of eight units of rounding."""
    assert found.dtype == rival.dtype
    floor = 8 * torch.finfo(found.dtype).eps
    assert relative_error(found.cpu(), exact.cpu()) <= 3 * relative_error(rival.cpu(), exact.cpu()) + floor


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_to_second_order(name: str, backend: str):
    case = CASES[name]
    exact, rival = (two_derivatives(case.truth, case.inputs(dtype)) for dtype in (torch.float64, torch.float32))
    found = two_derivatives(lambda *args: case.public(*args, backend=backend), case.inputs(torch.float32))
    for values in zip(found, rival, exact, strict=True):
        assert_as_exact(*values)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["cpp"])
def test_compiled_core_in_double_precision(name: str, backend: str):
    """Its own first and second derivatives, exactly."""
    core_launchers()
    case = CASES[name]
    inputs = [value.requires_grad_() for value in case.inputs(torch.float64)]

    def op(*args: Tensor) -> Tensor:
        return case.public(*args, backend=backend)

    assert torch.autograd.gradcheck(op, inputs)
    assert torch.autograd.gradgradcheck(op, inputs)
    for found, want in zip(two_derivatives(op, inputs), two_derivatives(case.truth, inputs), strict=True):
        assert (found - want).abs().max() < 1e-11 * max(1.0, want.abs().max().item())


@pytest.mark.parametrize("name", CHAINED)
@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_a_third_derivative_says_so(name: str, backend: str):
    case = CASES[name]
    inputs = leaves(case.inputs(torch.float32))
    value = case.operator(backend, *inputs)
    for _ in range(2):
        value = sum(g.square().sum() for g in torch.autograd.grad(value.sum(), inputs, create_graph=True))
    with pytest.raises(RuntimeError, match=rf"{name}: this derivative has no kernel; backend='reference' can be differentiated further"):
        torch.autograd.grad(value, inputs)


@pytest.mark.parametrize("name", CHAINED)
@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_hessian_vector_products(name: str, backend: str):
    """By two backward passes, of which the second is in the cotangents of the first, as torch.autograd.functional.hvp has them."""
    case = CASES[name]
    inputs = [value.to(DEVICE) for value in case.inputs(torch.float32)]
    along = [normal(*value.shape, seed=40 + place).to(value) for place, value in enumerate(inputs)]

    def product(function: Callable[..., Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
        cast = [tuple(value.to(dtype) for value in values) for values in (inputs, along)]
        return torch.autograd.functional.hvp(lambda *args: function(*args).sin().sum(), *cast)[1]

    exact = product(case.truth, torch.float64)
    for found, want in zip(product(partial(case.operator, backend), torch.float32), exact, strict=True):
        assert relative_error(found, want) < 1e-5
    if backend in ("reference", "cpp"):
        for found, want in zip(product(partial(case.operator, backend), torch.float64), exact, strict=True):
            assert relative_error(found, want) < 1e-12


@pytest.mark.parametrize("backend", KERNELS)
def test_products_with_some_cotangents(backend: str):
    """Of the first gradients not all are used, and of the second ones not all either."""
    x, weight, bias = leaves(norm_inputs(torch.float32))
    results = []
    for value, dtype in ((OPERATORS.group_norm_silu(x, weight, bias, 2, 1e-5, True, backend)[0], None), (None, torch.float64)):
        if value is None:
            x, weight, bias = leaves([a.detach().to(dtype) for a in (x, weight, bias)])
            value = reference.group_norm_silu(x, 2, weight, bias)
        (grad_x,) = torch.autograd.grad(value.sin().sum(), x, create_graph=True)
        v = normal(*x.shape, seed=3).to(x).requires_grad_()
        (weight_bar,) = torch.autograd.grad(grad_x, weight, v, create_graph=True)
        results.append(torch.autograd.grad(weight_bar, v, normal(4, seed=5).to(x))[0])
    assert relative_error(*results) < 1e-5


@pytest.mark.parametrize("name", CHAINED)
def test_the_reference_goes_on(name: str):
    case = CASES[name]
    inputs = leaves(case.inputs(torch.float64))
    value = case.public(*inputs, backend="reference")
    for _ in range(3):
        value = sum(g.square().sum() for g in torch.autograd.grad(value.sum(), inputs, create_graph=True))
    assert value.isfinite()


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str, backend: str):
    case = CASES[name]
    if backend == "reference" or DEVICE == "cpu":
        captured = capture(lambda: two_derivatives(lambda *args: case.operator(backend, *args), case.inputs(torch.float32)))
        assert captured
        for operator, args in captured:
            torch.library.opcheck(operator, args)


def capture(run: Callable[[], object]) -> list[tuple[Any, tuple[Any, ...]]]:
    """Every operator of this package that runs, once, with its arguments."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: dict[Any, tuple[Any, ...]] = {}

    class Listener(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "sami_fast":
                detached = (a.detach().clone() if isinstance(a, Tensor) else a for a in args)
                differentiable = not func.name().endswith(("bwd_bwd", "dual_bwd"))
                seen.setdefault(
                    func,
                    tuple(a.requires_grad_(differentiable and a.is_floating_point()) if isinstance(a, Tensor) else a for a in detached),
                )
            return func(*args, **(kwargs or {}))

    with Listener():
        run()
    return list(seen.items())


def test_what_opcheck_sees():
    case = CASES["attention"]
    found = capture(lambda: two_derivatives(lambda *args: case.operator("reference", *args), case.inputs(torch.float32)))
    names = {operator.name() for operator, _ in found}
    assert names == {"sami_fast::attention", "sami_fast::attention_bwd", "sami_fast::attention_bwd_bwd"}


# torch.func and torch.compile


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
@pytest.mark.parametrize("name", CASES)
def test_torch_func(name: str, backend: str):
    """grad of grad, and one gradient per sample by vmap."""
    case = CASES[name]

    def first(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args: torch.func.grad(lambda x: function(x, *args[1:]).mul(0.1).sin().sum())(args[0])

    def second(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.func.grad(lambda *args: first(function)(*args).square().sum())

    def on_inputs(order: Callable[..., Callable[..., Tensor]], function: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
        return order(function)(*(value.to(DEVICE) for value in case.inputs(dtype)))

    def by_sample(order: Callable[..., Callable[..., Tensor]]) -> Callable[..., Callable[..., Tensor]]:
        return lambda function: lambda *args: torch.func.vmap(order(function))(*(torch.stack([a, 0.7 * a]) for a in args))

    for order in (first, second, by_sample(first)):
        found = on_inputs(order, lambda *args: case.public(*args, backend=backend), torch.float32)
        assert_as_exact(found, *(on_inputs(order, case.truth, dtype) for dtype in (torch.float32, torch.float64)))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", KERNELS)
def test_forward_mode_says_so(name: str, backend: str):
    case = CASES[name]
    inputs = tuple(value.to(DEVICE) for value in case.inputs(torch.float32))

    def op(*args: Tensor) -> Tensor:
        return case.public(*args, backend=backend)

    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(op, inputs, inputs)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.hessian(lambda x: op(x, *inputs[1:]).sin().sum())(inputs[0])
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        op(torch.autograd.forward_ad.make_dual(inputs[0], inputs[0]), *inputs[1:])


@pytest.mark.parametrize("name", CASES)
def test_forward_mode_takes_the_reference_by_itself(name: str):
    case = CASES[name]
    inputs = tuple(value.to(DEVICE) for value in case.inputs(torch.float64))
    found = torch.func.jvp(case.public, inputs, inputs)
    expected = torch.func.jvp(case.truth, inputs, inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", CASES)
def test_compiled(name: str, backend: str):
    """As one graph around kernels, with an inner gradient and an outer one. (Kernels stay kernels: no C++ needs compiling.)"""
    torch._dynamo.reset()
    case = CASES[name]
    inputs = leaves(case.inputs(torch.float32))

    def penalty(*args: Tensor) -> Tensor:
        return torch.func.grad(lambda x: case.public(x, *args[1:], backend=backend).square().sum())(args[0]).square().sum()

    compiled = torch.compile(penalty, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*inputs), inputs, allow_unused=True)
    expected = torch.autograd.grad(penalty(*inputs), inputs, allow_unused=True)
    for value, want in zip(found, expected, strict=True):
        assert (value is None) == (want is None)
        assert value is None or relative_error(value, want) < 1e-6


def test_compiled_for_changing_sizes():
    """A head size that varies becomes a symbol; a backend that cannot run is the same error as outside."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, backend: ops.attention(q, q, q, backend=backend), backend="eager", fullgraph=True)
    for head in (11, 13, 17):
        q = normal(1, 5, 2, head, dtype=torch.float32)
        assert relative_error(compiled(q, None), reference.attention(q, q, q)) < 1e-6
    with pytest.raises(Exception, match="its head sizes are 8 to 128, this one is 4"):
        compiled(normal(1, 5, 2, 4, dtype=torch.float32), "triton")


def test_compiled_for_changing_numbers():
    """A step that counts up becomes a symbol, too."""
    torch._dynamo.reset()
    image, alpha, sigma, index = normal(2, 1, 4, 4, dtype=torch.float32), torch.full((2, 1), 0.8), torch.full((2, 1), 0.6), torch.arange(2)
    compiled = torch.compile(
        lambda step: ops.noise_sample(image, alpha, sigma, index, seed=3, step=step)[0], backend="eager", fullgraph=True
    )
    for step in (1, 2, 3):
        assert torch.equal(compiled(step), ops.noise_sample(image, alpha, sigma, index, seed=3, step=step)[0])


# Dual numbers


def dual_case(name: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], Callable[..., Any], Callable[..., Any]]:
    """Primals and tangents, the dual op, and the op."""
    if name == "attention":
        primals = attention_inputs(dtype)
        tangents = [normal(*p.shape, seed=30 + i, dtype=dtype) for i, p in enumerate(primals)]
        return primals, tangents, lambda *a, **kw: ops.attention_dual(*a, **kw), reference.attention
    x, weight, bias = norm_inputs(dtype)
    silu = name == "group_norm_silu"
    return (
        [x],
        [normal(*x.shape, seed=30, dtype=dtype)],
        lambda x, tx, **kw: ops.group_norm_silu_dual(x, tx, 2, weight.to(x), bias.to(x), silu=silu, **kw),
        lambda x: reference.group_norm_silu(x, 2, weight.to(x), bias.to(x), silu=silu),
    )


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["attention", "group_norm_silu", "group_norm"])
def test_dual_numbers(name: str, backend: str):
    primals, tangents, dual, op = dual_case(name, torch.float64)
    for found, want in zip(
        dual(*primals, *tangents, backend="reference"), torch.func.jvp(op, tuple(primals), tuple(tangents)), strict=True
    ):
        assert relative_error(found, want) < 1e-12
    inputs = [value.requires_grad_() for value in (*primals, *tangents)]
    for name in ("reference", *(["cpp"] if backend == "cpp" else [])):
        assert torch.autograd.gradcheck(partial(dual, backend=name), inputs)

    def weighted(run: Callable[..., Any], *args: Tensor) -> Tensor:
        value, tangent = run(*args)
        return (normal(*value.shape, seed=40).to(value) * value + normal(*value.shape, seed=41).to(value) * tangent).sum()

    exact = torch.autograd.grad(weighted(partial(dual, backend="reference"), *inputs), inputs)
    narrow = leaves([value.detach().float() for value in inputs])
    found = torch.autograd.grad(weighted(lambda *args: dual(*args, backend=backend), *narrow), narrow)
    for value, want in zip(found, exact, strict=True):
        assert relative_error(value, want.to(DEVICE)) < 1e-6


# Backends


def test_use_backend_nests_and_ends():
    q = attention_inputs(torch.float32)[0].to(DEVICE).requires_grad_()

    def runs_kernels() -> bool:
        return "sami_fast::attention" in {operator.name() for operator, _ in capture(lambda: ops.attention(q, q, q))}

    automatic = runs_kernels()
    assert automatic == (DEVICE == "cuda" or refusal("cpp", "cpu", torch.float32) is None)
    with use_backend("triton"):
        assert runs_kernels()
        with use_backend("reference"):
            assert not runs_kernels()
        with use_backend("auto"):
            assert runs_kernels() == automatic
        assert runs_kernels()
    assert runs_kernels() == automatic
    with pytest.raises(ZeroDivisionError), use_backend("triton"):
        raise ZeroDivisionError
    assert runs_kernels() == automatic
    assert sami_fast.use_backend is use_backend


def test_a_backend_that_does_not_have_the_op(monkeypatch: pytest.MonkeyPatch):
    """auto passes it by; asked for by name it is refused."""
    pytest.importorskip("triton")
    x = normal(1, 4, 4, 4, dtype=torch.float32).to(DEVICE)
    with pytest.raises(BackendError, match=r"conv2d: triton \(backend\) cannot run here: it does not have this op; what can: reference"):
        ConvolutionLaunchers.choose("triton", x)
    monkeypatch.setitem(backend.OPS, "attention", ("reference",))
    assert backend.choose("attention", None, x) == "reference"


def test_threads_choose_for_themselves():
    """Blocks that overlap in time do not see one another, and leave nothing behind."""
    wanted: dict[str, str] = {}
    entered, left = threading.Barrier(2), threading.Event()

    def first() -> None:
        with use_backend("reference"):
            entered.wait(10)
            wanted["first"] = backend._wanted.get()[0]
        left.set()

    def second() -> None:
        with use_backend("triton"):
            entered.wait(10)
            left.wait(10)
            wanted["second"] = backend._wanted.get()[0]

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wanted == {"first": "reference", "second": "triton"}
    assert backend._wanted.get()[0] == "auto"


def test_a_derivative_stays_on_the_backend_of_its_value():
    q = attention_inputs(torch.float32)[0].to(DEVICE).requires_grad_()
    with use_backend("triton"):
        out = ops.attention(q, q, q)
    with use_backend("reference"):
        names = {operator.name() for operator, _ in capture(lambda: torch.autograd.grad(out.sum(), q))}
    assert "sami_fast::attention_bwd" in names


def test_unknown_backend():
    q = attention_inputs(torch.float32)[0]
    with (
        pytest.raises(BackendError, match="use_backend: expected auto, reference, cpp, triton or cuda, found 'tritom'"),
        use_backend("tritom"),
    ):
        pass
    with pytest.raises(BackendError, match="backend: expected auto, reference, cpp, triton or cuda, found 'cudnn'"):
        ops.attention(q, q, q, backend="cudnn")


def test_what_a_backend_cannot_take():
    x = norm_inputs(torch.float64)
    with pytest.raises(
        BackendError, match=r"triton \(backend\) cannot run here: it takes float32, float16, bfloat16, not float64; what can"
    ):
        ops.group_norm_silu(x[0], 2, *x[1:], backend="triton")
    for head in (7, 129):
        q = normal(1, 3, 1, head, dtype=torch.float32)
        with pytest.raises(BackendError, match=rf"its head sizes are 8 to 128, this one is {head}; what can: reference"):
            ops.attention(q, q, q, backend="triton")
        assert ops.attention(q, q, q).shape == q.shape
    z = gaussian_inputs(torch.float16)
    with pytest.raises(BackendError, match="it takes float32 alone"):
        ops.gaussian_log_prob(*z, backend="triton")


SCRIPT = """
import torch
from sami_fast import UserError, ops
q = torch.ones(1, 3, 1, 8)
try:
    print("fine", ops.attention(q, q, q).shape[1])
except UserError as error:
    print(error)
"""


def run_with(**environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "SAMI_FAST_BACKEND")}
    result = subprocess.run([sys.executable, "-c", SCRIPT], env=clean | environment, capture_output=True, text=True, check=True)
    return result.stdout.strip()


def test_environment_variable():
    assert run_with() == "fine 3"
    assert run_with(SAMI_FAST_BACKEND="") == "fine 3"
    assert run_with(SAMI_FAST_BACKEND="reference") == "fine 3"
    assert run_with(SAMI_FAST_BACKEND="triton", TRITON_INTERPRET="1") == "fine 3"
    assert run_with(SAMI_FAST_BACKEND="tpu") == "SAMI_FAST_BACKEND: expected auto, reference, cpp, triton or cuda, found 'tpu'"
    assert run_with(SAMI_FAST_BACKEND="triton").startswith(
        "attention: triton (SAMI_FAST_BACKEND) cannot run here: it needs tensors on a CUDA device, these are on cpu; what can: reference"
    )
    assert run_with(SAMI_FAST_BACKEND="cuda").startswith("attention: cuda (SAMI_FAST_BACKEND) cannot run here: ")


def test_without_triton(tmp_path):
    """A machine without the package: the reference runs, and asking for Triton says what is missing."""
    (tmp_path / "triton.py").write_text("raise ImportError('no triton here')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    assert run_with(PYTHONPATH=path) == "fine 3"
    found = run_with(PYTHONPATH=path, SAMI_FAST_BACKEND="triton")
    assert "triton (SAMI_FAST_BACKEND) cannot run here: Triton cannot be imported (no triton here); what can: reference" in found


def test_describe():
    described = ops.describe()
    assert set(described) >= {"noise_sample", "guided_loss", "attention", "group_norm_silu", "gaussian_log_prob"}
    best = "cpp" if refusal("cpp", "cpu", torch.float32) is None else "reference"
    convolution = described.pop("conv2d")
    assert convolution["cpu"].startswith(best)
    assert "cuda" not in convolution or convolution["cuda"].startswith("reference")
    for devices in described.values():
        assert devices["cpu"].startswith(f"{best} (")
        assert "triton: " in devices["cpu"]
        assert "cuda" not in devices or devices["cuda"].startswith("triton (")


# Bad arguments


def bad_calls() -> dict[str, tuple[Callable[[], object], type[Exception], str]]:
    q, k, v = attention_inputs(torch.float32)
    x, weight, bias = norm_inputs(torch.float32)
    z, mu, var = gaussian_inputs(torch.float32)
    image, alpha, sigma = noise_inputs(torch.float32)
    loss = loss_inputs(torch.float32)
    elsewhere = torch.device("meta")
    noise = ops.Noise(INDEX, 3, 0, 0, 0)
    return {
        "attention rank": (lambda: ops.attention(q[0], k, v), ValueError, r"q: expected \[B, S, N, D\], found \[5, 2, 8\]"),
        "attention shape": (lambda: ops.attention(q, k, v[:, :3]), ValueError, r"v: expected \[1, 7, 2, 8\], found \[1, 3, 2, 8\]"),
        "attention dtype": (
            lambda: ops.attention(q, k.double(), v),
            TypeError,
            "attention: k: expected torch.float32 as q has, found torch.float64",
        ),
        "attention integers": (
            lambda: ops.attention(q.int(), k, v),
            TypeError,
            "attention: q: expected a floating dtype, found torch.int32",
        ),
        "attention device": (
            lambda: ops.attention(q, k, v.to(elsewhere)),
            ValueError,
            "attention: v: expected on cpu as q is, found on meta",
        ),
        "attention causal": (
            lambda: ops.attention(q, k, v, causal=True),
            ValueError,
            "causal: expected as many queries as keys, found 5 and 7",
        ),
        "attention without keys": (lambda: ops.attention(q, k[:, :0], v[:, :0]), ValueError, "k: expected at least one key, found none"),
        "attention without features": (
            lambda: ops.attention(q[..., :0], k[..., :0], v[..., :0]),
            ValueError,
            "q: expected a head size of at least 1, found 0",
        ),
        "dual shape": (lambda: ops.attention_dual(q, k, v, q, k, q), ValueError, r"tv: expected \[1, 7, 2, 8\], found \[1, 5, 2, 8\]"),
        "norm groups": (
            lambda: ops.group_norm_silu(x, 3, weight, bias),
            ValueError,
            "num_groups: expected a divisor of 4 channels, found 3",
        ),
        "norm no groups": (
            lambda: ops.group_norm_silu(x, 0, weight, bias),
            ValueError,
            "num_groups: expected a divisor of 4 channels, found 0",
        ),
        "norm rank": (lambda: ops.group_norm_silu(x[0, :, 0, 0], 2, weight, bias), ValueError, r"x: expected \[B, C, ...\], found \[4\]"),
        "norm order": (
            lambda: ops.group_norm_silu(x, weight, bias, 2),
            TypeError,
            r"num_groups: expected an int, found a tensor; the order",
        ),
        "norm weight": (lambda: ops.group_norm_silu(x, 2, weight[:2], bias), ValueError, r"weight: expected \[4\], found \[2\]"),
        "norm dtypes": (lambda: ops.group_norm_silu(x, 2, weight.double(), bias), TypeError, "bias: expected torch.float64 as weight has"),
        "norm device": (
            lambda: ops.group_norm_silu(x, 2, weight.to(elsewhere), bias.to(elsewhere)),
            ValueError,
            "weight: expected on cpu as x is",
        ),
        "dual norm shape": (lambda: ops.group_norm_silu_dual(x, x[:1], 2, weight, bias), ValueError, r"tx: expected \[2, 4, 3, 2\]"),
        "gaussian shape": (lambda: ops.gaussian_log_prob(z, mu[:1], var), ValueError, r"mu: expected \[3, 5\], found \[1, 5\]"),
        "gaussian dtype": (lambda: ops.gaussian_log_prob(z, mu, var.half()), TypeError, "var: expected torch.float32 as z has"),
        "noise shape": (
            lambda: ops.noise_sample(image, alpha[:1], sigma, INDEX, seed=0, step=0),
            ValueError,
            r"alpha_t: expected \[2, 3\]",
        ),
        "noise of no levels": (
            lambda: ops.noise_sample(image, alpha[0, 0], sigma, INDEX, seed=0, step=0),
            ValueError,
            r"alpha_t: expected \[B, K\], found \[\]",
        ),
        "noise index": (
            lambda: ops.noise_sample(image, alpha, sigma, INDEX.int(), seed=0, step=0),
            TypeError,
            "index: expected torch.int64",
        ),
        "noise stream": (
            lambda: ops.noise_sample(image, alpha, sigma, INDEX, seed=0, step=0, stream=16),
            ValueError,
            "stream: expected 0 to 15, found 16",
        ),
        "loss shape": (lambda: ops.guided_loss(loss[0][:3], *loss[1:]), ValueError, r"eps_pred: expected \[3, 1, 3, 5\]"),
        "loss rank": (
            lambda: ops.guided_loss(*(value[0, 0, 0, 0] if value.dim() > 1 else value for value in loss)),
            ValueError,
            r"eps: expected \[S, C, H, W\], found \[\]",
        ),
        "loss of flat noise": (
            lambda: ops.guided_loss(noise, *(value.flatten() for value in loss[1:])),
            ValueError,
            r"eps_pred: expected \[S, C",
        ),
        "loss dtype": (lambda: ops.guided_loss(loss[0].double(), *loss[1:]), TypeError, "eps: expected torch.float32 as eps_pred has"),
        "loss noise": (lambda: ops.guided_loss(noise, *loss[1:]), ValueError, "eps: expected noise for 4 samples, found 2 x 3"),
        "index dtype": (lambda: ops.random_normal(0, 0, 0, INDEX.int(), 4), TypeError, "index: expected torch.int64, found torch.int32"),
        "levels index": (
            lambda: ops.stratified_uniform(INDEX.double(), 2, 8, seed=0, step=0),
            TypeError,
            "index: expected torch.int64, found torch.float64",
        ),
        "seed": (lambda: ops.random_normal(-1, 0, 0, INDEX, 4), ValueError, r"seed: expected 0 to 2\*\*63 - 1, found -1"),
        "step": (lambda: ops.noise_sample(image, alpha, sigma, INDEX, seed=0, step=-2), ValueError, r"step: expected 0 to .* found -2"),
        "size": (lambda: ops.random_normal(0, 0, 0, INDEX, -1), ValueError, r"size: expected 0 to 2\*\*62 - 1, found -1"),
        "levels": (lambda: ops.stratified_uniform(INDEX, -1, 8, seed=0, step=0), ValueError, "levels: expected 0 to .* found -1"),
        "batch": (lambda: ops.stratified_uniform(INDEX, 1, -8, seed=0, step=0), ValueError, "global_batch: expected 0 to .* found -8"),
        "index rank": (lambda: ops.random_normal(0, 0, 0, INDEX[None], 4), ValueError, r"index: expected \[S\], found \[1, 2\]"),
    }


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
@pytest.mark.parametrize("name", bad_calls())
def test_bad_arguments(name: str, backend: str):
    call, error, message = bad_calls()[name]
    with use_backend(backend), pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_call_of_a_raw_launcher_kills_the_process(seed: int):
    """In another process, since a crash would end this one: half of the calls fit, and a launcher says what is wrong with the others."""
    core_launchers()
    command = [sys.executable, Path(__file__).with_name("launchers_worker.py"), str(seed), "400"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"died of {done.stdout.splitlines()[-1]}: {done.stderr[-1000:]}"
    ran = json.loads(done.stdout.splitlines()[-1])
    assert ran.keys() == {
        schema.name.partition("::")[2] for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("sami_fast_C::")
    }
    assert min(ran.values()) > 0, ran  # what fits is among the calls of each
    assert 100 < sum(ran.values()) < 350  # and what does not
