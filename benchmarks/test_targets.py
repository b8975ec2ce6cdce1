"""What the compiled core aims at: ratios to eager torch on the CPU, through the second order where there is one; correct first."""

from collections.abc import Callable

import pytest
import torch
from registry import ATTENTION, GROUP_NORM_SILU, GUIDED_LOSS, NOISE_SAMPLE, Op, Problem, Shape, check, peak_bytes

from sami_fast import ops
from sami_fast.ops.backend import refusal

pytestmark = pytest.mark.skipif(refusal("cpp", "cpu", torch.float32) is not None, reason="the compiled core was not built")


def _row(op: str, shape: Shape, mode: str, baseline: str, target: float, **work: int) -> dict[str, object]:
    return {
        "op": op,
        "shape": shape,
        "dtype": "float32",
        "mode": mode,
        "implementation": "cpp",
        "baseline": baseline,
        "target": target,
        **work,
    }


@pytest.mark.parametrize("rival", ["reference", "torch"])
@pytest.mark.parametrize(
    "shape",
    [
        {"B": 64, "K": 1, "C": 1, "H": 32, "W": 32},
        {"B": 32, "K": 1, "C": 3, "H": 64, "W": 64},
        {"B": 16, "K": 4, "C": 3, "H": 32, "W": 32},
    ],
)
def test_noise_and_loss(shape: Shape, rival: str, record: Callable[..., None]) -> None:
    """Noising of clean images, and the loss with its gradients in eps_pred and grad_log_q: all of a step that is not a network.

    Against eager torch that draws the same numbers (reference), and against torch.randn, whose numbers depend on what was drawn before.
    """
    samples = {"S": shape["B"] * shape["K"]} | {letter: shape[letter] for letter in "CHW"}
    noising, loss = Problem.make(NOISE_SAMPLE, shape, torch.float32, "fwd"), Problem.make(GUIDED_LOSS, samples, torch.float32, "bwd")
    names = {"cpp": ("cpp", "cpp"), "reference": ("reference", "reference"), "torch": ("torch.randn", "torch.mse_loss")}
    for noise_name, loss_name in (names["cpp"], names[rival]):
        check(noising, noise_name)
        check(loss, loss_name)
    _, eps_pred, grad_log_q, *scalars = loss.args
    cotangent = loss.cotangents[0]

    def run(name: str) -> list[torch.Tensor]:
        noise_name, loss_name = names[name]
        leaves = [eps_pred.detach().requires_grad_(), grad_log_q.detach().requires_grad_()]
        x_t, eps = NOISE_SAMPLE.implementations[noise_name].call(*noising.args, **noising.kwargs)
        weighted, _ = GUIDED_LOSS.implementations[loss_name].call(eps, *leaves, *scalars)
        return [x_t, *torch.autograd.grad(weighted, leaves, cotangent)]

    elements = NOISE_SAMPLE.bytes_moved["fwd"](shape, 4) + GUIDED_LOSS.bytes_moved["bwd"](samples, 4)
    row = _row("noise_sample + guided_loss", shape, "fwd + bwd", " + ".join(sorted(set(names[rival]))), 4.0, bytes=elements)
    record(row, "GB/s", lambda: run("cpp"), lambda: run(rival), lambda: run("cpp"))


@pytest.mark.parametrize(
    ("op", "shape", "target"),
    [
        (GROUP_NORM_SILU, {"B": 32, "C": 64, "H": 16, "W": 16, "G": 4}, 3.0),
        (GROUP_NORM_SILU, {"B": 32, "C": 32, "H": 64, "W": 64, "G": 4}, 3.0),
        (ATTENTION, {"B": 1, "S": 1024, "N": 4, "D": 64}, 2.0),
        (ATTENTION, {"B": 8, "S": 1024, "N": 2, "D": 32}, 2.0),
    ],
    ids=lambda value: value.name if isinstance(value, Op) else None,
)
def test_through_second_order(op: Op, shape: Shape, target: float, record: Callable[..., None]) -> None:
    """Forward, first gradients, and the gradients of those."""
    for mode in op.modes:
        check(Problem.make(op, shape, torch.float32, mode), "cpp")
    problem = Problem.make(op, shape, torch.float32, "bwd_bwd")
    call, baseline = (op.implementations[name].call for name in ("cpp", op.baseline))
    moved = sum(op.bytes_moved[mode](shape, 4) for mode in ("fwd", "bwd_bwd"))
    row = _row(op.name, shape, "fwd + bwd_bwd", op.baseline, target, bytes=moved)
    record(row, "GB/s", lambda: problem.whole(call), lambda: problem.whole(baseline), lambda: problem.whole(call))


def test_attention_memory_is_linear() -> None:
    def peak(tokens: int) -> int:
        problem = Problem.make(ATTENTION, {"B": 1, "S": tokens, "N": 4, "D": 32}, torch.float32, "bwd_bwd")
        return peak_bytes(lambda: problem.whole(ATTENTION.implementations["cpp"].call))

    assert peak(4096) <= 1.2 * 4 * peak(1024)


@pytest.mark.parametrize("call", [ops.attention, ops.group_norm_silu])
def test_the_core_is_what_auto_takes(call: Callable[..., torch.Tensor]) -> None:
    assert ops.describe()[call.__name__]["cpu"].startswith("cpp")
