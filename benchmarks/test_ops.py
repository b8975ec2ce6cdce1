"""Every op of the registry in every mode: all implementations correct first, then timed in turn."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from sami_fast import ops, reference
from sami_fast.ops.backend import refusal

from .measure import Incorrect, dtype_label, gather, peak_bytes
from .registry import ATTENTION, GAUSSIAN_LOG_PROB, NOISE_SAMPLE, OPS, Implementation, Op, Problem, Shape
from .table import is_ours, shape_label


def names_of(op: Op, shape: Shape, dtype: torch.dtype, mode: str, device: str) -> list[str]:
    """Who takes part. Compiling costs seconds: it is left to the last shape, which is the one with most work."""
    last = shape in [shapes[-1] for shapes in op.shapes.values() if shapes]
    taking = {name: i for name, i in op.implementations.items() if i.takes(mode, dtype, device)}
    return [name for name, i in taking.items() if last or not i.compiled]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "comparison" not in metafunc.fixturenames:
        return
    device, tiny = metafunc.config.getoption("--device"), metafunc.config.getoption("--tiny")
    cases = list(_cases(device, "tiny" if tiny else device))
    metafunc.parametrize("comparison", [case for _, case in cases], ids=[label for label, _ in cases])


def _cases(device: str, sizes: str) -> Iterator[tuple[str, tuple[Op, Shape, torch.dtype, str]]]:
    for op in OPS:
        for shape in op.shapes[sizes]:
            for dtype in op.dtypes:
                if device == "cpu" and dtype != torch.float32:
                    continue  # nobody trains in bfloat16 there, and the core does not take it
                for mode in op.modes:
                    yield "-".join((op.name, shape_label(shape).replace(" ", "_"), dtype_label(dtype), mode)), (op, shape, dtype, mode)


def test_op(comparison: tuple[Op, Shape, torch.dtype, str], device: str, compete: Callable[..., None]) -> None:
    op, shape, dtype, mode = comparison
    torch.manual_seed(0)
    problem = Problem.make(op, shape, dtype, mode, device)
    names = names_of(op, shape, dtype, mode, device)
    contestants, wrong = gather({name: partial(problem.contestant, name) for name in names})
    described = {
        "op": op.name,
        "shape": shape,
        "dtype": dtype_label(dtype),
        "mode": mode,
        "bytes": problem.bytes(),
        "flops": op.flops[mode](shape) if op.flops else None,
    }
    targets = {"cpp": op.targets[mode]} if mode in op.targets else None
    forgiven = [name for name in names if name != "reference" and not is_ours({"implementation": name})]
    compete(described, contestants, op.baseline, dtype, targets=targets, wrong=wrong, forgiven=forgiven)


# Wrong in the value, in the first gradient alone, in the second alone.
WRONG = {
    "fwd": lambda z, mu, var: 1.001 * reference.gaussian_log_prob(z, mu, var),
    "bwd": lambda z, mu, var: reference.gaussian_log_prob(z, mu, var) + 0.01 * (mu - mu.detach()).sum(-1),
    "bwd_bwd": lambda z, mu, var: reference.gaussian_log_prob(z, mu, var) + 0.01 * (mu - mu.detach()).square().sum(-1),
}


def rivals_of(op: Op, **implementations: Implementation) -> Op:
    return replace(op, implementations=op.implementations | implementations)


@pytest.mark.parametrize("mode", WRONG)
def test_wrong_implementation_gets_no_row(mode: str, device: str, compete: Callable[..., None]) -> None:
    op = rivals_of(GAUSSIAN_LOG_PROB, wrong=Implementation(WRONG[mode]))
    shape = op.shapes["tiny"][0]
    with pytest.raises(Incorrect, match=f"gaussian_log_prob {mode}: wrong, tensor .: relative error"):
        Problem.make(op, shape, torch.float32, mode, device).contestant("wrong")
    rows: list[Any] = []
    test_op((op, shape, torch.float32, mode), device, lambda *given, **named: rows.append((given, named)))
    ((_, contestants, *_), named), *_ = rows
    assert "reference" in [c.name for c in contestants]
    assert "wrong" not in [c.name for c in contestants]
    assert "relative error" in named["wrong"]["wrong"]


def test_our_own_wrong_implementation_fails(device: str, compete: Callable[..., None], benchmark: Any) -> None:
    benchmark.disabled = True
    op = rivals_of(GAUSSIAN_LOG_PROB, cpp_wrong=Implementation(WRONG["fwd"]))
    with pytest.raises(pytest.fail.Exception, match="cpp_wrong: Incorrect"):
        test_op((op, op.shapes["tiny"][0], torch.float32, "fwd"), device, compete)


def _noise(scale: float = 1.0, mix: float = 1.0, seed_shift: int = 0) -> Callable[..., tuple[Tensor, Tensor]]:
    def noise_sample(x_0: Tensor, alpha_t: Tensor, sigma_t: Tensor, index: Tensor, *, seed: int, step: int) -> tuple[Tensor, Tensor]:
        x_t, eps = reference.noise_sample(x_0, alpha_t, sigma_t, index, seed=seed + seed_shift, step=step)
        return mix * x_t, scale * eps

    return noise_sample


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (Implementation(_noise(scale=1.1), own_noise=True), "variance of eps"),
        (Implementation(_noise(mix=1.001), own_noise=True), "x_t is not"),
        (Implementation(_noise(seed_shift=1)), "relative error"),
    ],
    ids=["scale", "mixture", "other bits"],
)
def test_wrong_noise_gets_no_row(wrong: Implementation, reason: str, device: str) -> None:
    op = rivals_of(NOISE_SAMPLE, wrong=wrong)
    with pytest.raises(Incorrect, match=reason):
        Problem.make(op, op.shapes["cpu"][0], torch.float32, "fwd", device).contestant("wrong")


@pytest.mark.skipif(refusal("cpp", "cpu", torch.float32) is not None, reason="the compiled core was not built")
def test_attention_memory_is_linear() -> None:
    def peak(tokens: int) -> int:
        problem = Problem.make(ATTENTION, {"B": 1, "S": tokens, "N": 4, "D": 32}, torch.float32, "bwd_bwd")
        return peak_bytes(problem.runner(ATTENTION.implementations["cpp"]), "cpu")

    assert peak(4096) <= 1.2 * 4 * peak(1024)


def test_a_public_op_has_its_comparison() -> None:
    assert set(ops.describe()) <= {op.name for op in OPS}
