"""A diffusers UNet as it comes and accelerated: first gradients, and a step on a gradient penalty; correct first, then timed."""

import copy
from collections.abc import Callable, Sequence
from functools import cache

import pytest
import torch
from registry import compare
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sami_fast import ops
from sami_fast.accelerate import accelerate
from sami_fast.ops.backend import refusal

diffusers = pytest.importorskip("diffusers")

BASELINE = "torch"  # with its mathematical attention, the only one of its that can be differentiated twice
IMPLEMENTATIONS = (BASELINE, "reference", "cpp")
SHAPE = {"B": 1, "C": 3, "H": 32, "W": 32}


class Problem:
    """A small UNet with attention among 1024 and 256 positions, its input and a cotangent of its result."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = diffusers.UNet2DModel(
            sample_size=32,
            in_channels=3,
            out_channels=3,
            block_out_channels=(32, 64),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=32,
            down_block_types=("AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D"),
        ).eval()
        self.x, self.cotangent = torch.randn(2, *SHAPE.values()).unbind(0)
        self.t = torch.tensor([400])

    def run(self, model: nn.Module, mode: str) -> Sequence[Tensor]:
        """The result, its first gradients (bwd); or those, and the gradients of the penalty on the one in x (bwd_bwd)."""
        x = self.x.to(model.dtype).requires_grad_()
        y = model(x, self.t).sample
        projection = (y * self.cotangent).sum()
        leaves = [x, *model.parameters()]
        if mode == "bwd":
            return y.detach(), *_together(torch.autograd.grad(projection, leaves))
        (score,) = torch.autograd.grad(projection, x, create_graph=True)
        return y.detach(), score.detach(), *_together(torch.autograd.grad(score.square().sum(), leaves, allow_unused=True))

    def runner(self, name: str, mode: str, dtype: torch.dtype = torch.float32) -> Callable[[], Sequence[Tensor]]:
        model = copy.deepcopy(self.model)
        model = model.double() if dtype == torch.float64 else model
        if name != BASELINE:
            accelerate(model)

        def run() -> Sequence[Tensor]:
            with sdpa_kernel(SDPBackend.MATH) if name == BASELINE else ops.use_backend(name):
                return self.run(model, mode)

        return run


def _together(gradients: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """That in x, and all others in a row: some, as of the keys' biases, are nothing but rounding errors."""
    of_x, *of_parameters = gradients
    return of_x, torch.cat([g.flatten() for g in of_parameters if g is not None])


@cache
def prepared(mode: str) -> tuple[Problem, Sequence[Tensor], Sequence[Tensor]]:
    """The problem, and what torch finds in float64 and in float32."""
    problem = Problem()
    return problem, problem.runner(BASELINE, mode, torch.float64)(), problem.runner(BASELINE, mode)()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", ["bwd", "bwd_bwd"])
def test_accelerate(mode: str, name: str, record: Callable[..., None]) -> None:
    if name != BASELINE and (reason := refusal(name, "cpu", torch.float32)) is not None:
        pytest.skip(reason)
    problem, exact, rival = prepared(mode)
    run = problem.runner(name, mode)
    compare(f"accelerate: {name}", "step", run(), exact, rival)
    row = {
        "op": "accelerated UNet",
        "shape": SHAPE,
        "dtype": "float32",
        "mode": mode,
        "implementation": name,
        "baseline": BASELINE,
        "images": SHAPE["B"],
    }
    record(row, "images/s", run, problem.runner(BASELINE, mode), run)
