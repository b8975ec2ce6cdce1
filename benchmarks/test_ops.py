"""Every op of the registry: correct first, then timed."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from registry import GAUSSIAN_LOG_PROB, NOISE_SAMPLE, OPS, Implementation, Incorrect, Op, Problem, Shape, check, dtype_label, shape_label
from torch import Tensor

from sami_fast import reference


def measure(op: Op, shape: Shape, dtype: torch.dtype, mode: str, name: str, record: Callable[..., None]) -> None:
    """Check the implementation and the baseline it is divided by, and only then hand over to the clock."""
    torch.manual_seed(0)
    problem = Problem.make(op, shape, dtype, mode)
    for checked in {name, op.baseline}:
        check(problem, checked)
    call, baseline = op.implementations[name].call, op.implementations[op.baseline].call
    row = {
        "op": op.name,
        "shape": shape,
        "dtype": dtype_label(dtype),
        "mode": mode,
        "implementation": name,
        "baseline": op.baseline,
        "bytes": op.bytes_moved[mode](shape, dtype.itemsize),
        "flops": op.flops[mode](shape) if op.flops else None,
    }
    record(row, "GFLOP/s" if op.flops else "GB/s", problem.timed(call), problem.timed(baseline), lambda: problem.whole(call))


def _cases() -> Iterator[Any]:
    for op in OPS:
        for shape in op.shapes:
            for dtype in op.dtypes:
                for mode in op.modes:
                    for name, implementation in op.implementations.items():
                        if mode in implementation.modes and (implementation.dtypes is None or dtype in implementation.dtypes):
                            label = (op.name, shape_label(shape).replace(" ", "_"), dtype_label(dtype), mode, name)
                            yield pytest.param(op, shape, dtype, mode, name, id="-".join(label))


@pytest.mark.parametrize(("op", "shape", "dtype", "mode", "name"), list(_cases()))
def test_op(op: Op, shape: Shape, dtype: torch.dtype, mode: str, name: str, record: Callable[..., None]) -> None:
    measure(op, shape, dtype, mode, name, record)


# Wrong in the value, in the first gradient alone, in the second alone.
WRONG = {
    "fwd": lambda z, mu, var: 1.001 * reference.gaussian_log_prob(z, mu, var),
    "bwd": lambda z, mu, var: reference.gaussian_log_prob(z, mu, var) + 0.01 * (mu - mu.detach()).sum(-1),
    "bwd_bwd": lambda z, mu, var: reference.gaussian_log_prob(z, mu, var) + 0.01 * (mu - mu.detach()).square().sum(-1),
}


@pytest.mark.parametrize("mode", WRONG)
def test_wrong_implementation_gets_no_row(mode: str) -> None:
    op = replace(GAUSSIAN_LOG_PROB, implementations={**GAUSSIAN_LOG_PROB.implementations, "wrong": Implementation(WRONG[mode])})
    rows: list[tuple[Any, ...]] = []
    with pytest.raises(Incorrect, match=f"gaussian_log_prob {mode}: wrong, tensor .: relative error"):
        measure(op, op.shapes[0], torch.float32, mode, "wrong", lambda *row: rows.append(row))
    assert not rows
    measure(op, op.shapes[0], torch.float32, mode, "reference", lambda *row: rows.append(row))
    assert len(rows) == 1


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
def test_wrong_noise_gets_no_row(wrong: Implementation, reason: str) -> None:
    op = replace(NOISE_SAMPLE, implementations={**NOISE_SAMPLE.implementations, "wrong": wrong})
    rows: list[tuple[Any, ...]] = []
    with pytest.raises(Incorrect, match=reason):
        measure(op, op.shapes[0], torch.float32, "fwd", "wrong", lambda *row: rows.append(row))
    assert not rows
