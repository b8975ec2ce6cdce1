"""Other people's networks as they come and accelerated: a diffusers UNet's first gradients and gradient penalty, and SAMI's step with an
encoder and a UNet in plain torch. Correct first, then timed."""

import copy
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sami_fast import ops
from sami_fast.accelerate import accelerate
from sami_fast.methods.sami import Sami
from sami_fast.ops.backend import refusal
from sami_fast.pretrained import DiscreteTimeDenoiser, timestep_levels
from sami_fast.schedule import Discrete
from sami_fast.step import Objective

from .measure import Contestant, check_close
from .steps import Run, Step, convolution_bound, least_bytes

diffusers = pytest.importorskip("diffusers")

BASELINE = "torch"  # with its mathematical attention, the only one of its that can be differentiated twice
IMPLEMENTATIONS = (BASELINE, "reference", "cpp")
SHAPE = {"B": 1, "C": 3, "H": 32, "W": 32}


class UNetGradients:
    """A small UNet with attention among 1024 and 256 positions, its input and a cotangent of its result."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = diffusers.UNet2DModel(
            sample_size=32,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=32,
            block_out_channels=(32, 64),
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


def contestants(
    runner: Callable[[str], Callable[[], Sequence[Tensor]]], exact: Sequence[Tensor], rival: Sequence[Tensor]
) -> list[Contestant]:
    """Those that can run here, found correct."""
    ready = []
    for name in IMPLEMENTATIONS:
        if name == BASELINE or refusal(name, "cpu", torch.float32) is None:
            check = partial(check_close, name, "step", truth=exact, same_dtype=rival)
            ready.append(Contestant.ready(name, partial(runner, name), check, "cpu"))
    return ready


@pytest.mark.parametrize("mode", ["bwd", "bwd_bwd"])
def test_accelerate(mode: str, compete: Callable[..., None]) -> None:
    problem = UNetGradients()
    exact, rival = problem.runner(BASELINE, mode, torch.float64)(), problem.runner(BASELINE, mode)()
    ready = contestants(lambda name: problem.runner(name, mode), exact, rival)
    described = {"op": "diffusers UNet, accelerated", "shape": SHAPE, "dtype": "float32", "mode": mode, "images": SHAPE["B"]}
    described["bytes"] = least_bytes(problem.x, problem.model)
    compete(described | convolution_bound(problem.runner(BASELINE, mode), "cpu"), ready, BASELINE)


LATENTS = 8
FOREIGN = {"B": 16, "K": 1, "C": 3, "H": 32, "W": 32}


class TheirEncoder(nn.Module):
    """x -> (mu, var) as people write it, in plain torch."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 32), (32, 64), (64, 64)):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(8, after), nn.SiLU()]
            layers += [nn.Conv2d(after, after, 3, 1, 1), nn.GroupNorm(8, after), nn.SiLU()]
        self.body, self.heads = nn.Sequential(*layers, nn.Flatten()), nn.Linear(64 * 16, 2 * LATENTS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, raw_var = self.heads(self.body(x)).chunk(2, 1)
        return mu, nn.functional.softplus(raw_var) + 1e-4


class TheirUNet(nn.Module):
    """(x_t, integer t) -> eps in plain torch: two resolutions, the timestep from a table."""

    def __init__(self, timesteps: int) -> None:
        super().__init__()
        self.embedding, self.first = nn.Embedding(timesteps, 32), nn.Conv2d(3, 32, 3, 1, 1)
        self.down = nn.Sequential(nn.GroupNorm(8, 32), nn.SiLU(), nn.Conv2d(32, 64, 3, 2, 1))
        self.middle = nn.Sequential(nn.GroupNorm(8, 64), nn.SiLU(), nn.Conv2d(64, 64, 3, 1, 1))
        self.up = nn.Sequential(nn.GroupNorm(8, 64), nn.SiLU(), nn.Upsample(scale_factor=2), nn.Conv2d(64, 32, 3, 1, 1))
        self.last = nn.Sequential(nn.GroupNorm(8, 32), nn.SiLU(), nn.Conv2d(32, 3, 3, 1, 1))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        h = self.first(x_t) + self.embedding(t)[:, :, None, None]
        return self.last(h + self.up(self.middle(self.down(h))))


def foreign_step() -> Step:
    """One batch for networks in plain torch."""
    torch.manual_seed(0)
    alphas = torch.linspace(0.9999, 0.001, 1000, dtype=torch.float64)
    schedule = Discrete(timestep_levels(alphas).tolist())
    encoder, unet = TheirEncoder(), TheirUNet(1000)
    x_0 = torch.randn(*(FOREIGN[letter] for letter in "BCHW")).clamp(-1, 1)
    sami = Sami(encoder, DiscreteTimeDenoiser(unet, alphas, schedule, fractional=False), schedule, latent_size=LATENTS)
    return Step(sami, x_0, Objective(), 0.1)


def test_foreign_step(compete: Callable[..., None]) -> None:
    """The method by autograd alone, and the engine's step with both networks accelerated."""
    step = foreign_step()
    accelerated = copy.deepcopy(step.sami)
    accelerate(accelerated.encoder)
    accelerate(accelerated.denoiser.network)
    fast = Step(accelerated, step.x_0, step.objective, step.kl_weight)

    def runner(name: str) -> Run:
        return step.reference() if name == BASELINE else fast.ours(name)

    ready = contestants(runner, step.reference(torch.float64)(), step.reference()())
    described = {"op": "foreign step, accelerated", "shape": FOREIGN, "dtype": "float32", "mode": "step", "images": FOREIGN["B"]}
    described["bytes"] = least_bytes(step.x_0, step.sami)
    compete(described | convolution_bound(step.reference(), "cpu"), ready, BASELINE)
