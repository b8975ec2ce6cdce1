"""Other people's networks as they come and accelerated: a diffusers UNet's first gradients and gradient penalty, and SAMI's step with the
four pairs of `foreign.py`. Correct first, then timed."""

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

from .foreign import PAIRS, TIMESTEPS, Pair
from .measure import Contestant, check_close
from .steps import Run, Step, convolution_bound, least_bytes

diffusers = pytest.importorskip("diffusers")

TORCH = "torch"  # with its mathematical attention, the only one of its that can be differentiated twice
LAST = "torch, channels-last"
IMPLEMENTATIONS = (LAST, TORCH, "reference", "cpp")
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

    def run(self, model: nn.Module, mode: str, layout: torch.memory_format) -> Sequence[Tensor]:
        """The result, its first gradients (bwd); or those, and the gradients of the penalty on the one in x (bwd_bwd)."""
        x = self.x.detach().to(model.dtype).contiguous(memory_format=layout).requires_grad_()
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
        plain, layout = name in (LAST, TORCH), torch.channels_last if name == LAST else torch.contiguous_format
        model = model.to(memory_format=layout)
        if not plain:
            accelerate(model)

        def run() -> Sequence[Tensor]:
            with sdpa_kernel(SDPBackend.MATH) if plain else ops.use_backend(name):
                return self.run(model, mode, layout)

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
        if name in (LAST, TORCH) or refusal(name, "cpu", torch.float32) is None:
            check = partial(check_close, name, "step", truth=exact, same_dtype=rival)
            ready.append(Contestant.ready(name, partial(runner, name), check, "cpu"))
    return ready


@pytest.mark.parametrize("mode", ["bwd", "bwd_bwd"])
def test_accelerate(mode: str, compete: Callable[..., None]) -> None:
    problem = UNetGradients()
    exact, rival = problem.runner(TORCH, mode, torch.float64)(), problem.runner(TORCH, mode)()
    ready = contestants(lambda name: problem.runner(name, mode), exact, rival)
    described = {"op": "diffusers UNet, accelerated", "shape": SHAPE, "dtype": "float32", "mode": mode, "images": SHAPE["B"]}
    described["bytes"] = least_bytes(problem.x, problem.model)
    compete(described | convolution_bound(problem.runner(TORCH, mode), "cpu"), ready, LAST)


LATENTS = 8
FOREIGN = {"B": 16, "K": 1, "C": 3, "H": 32, "W": 32}


class Adapted(nn.Module):
    """Somebody's encoder as x -> (mu, var), by its convention."""

    def __init__(self, network: nn.Module, returns: str) -> None:
        super().__init__()
        self.network, self.returns = network, returns

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.network(x)
        if isinstance(found, torch.distributions.Distribution):
            return found.mean, found.variance
        mu, other = found if isinstance(found, tuple) else found.chunk(2, 1)
        return mu, {"mu_logvar": torch.exp, "mu_std": torch.square}[self.returns](other)


def foreign_step(pair: Pair, batch: int = FOREIGN["B"]) -> Step:
    """One batch for two networks of other people, none of whose weights is zero."""
    torch.manual_seed(0)
    alphas = torch.linspace(0.9999, 0.001, TIMESTEPS, dtype=torch.float64)
    schedule, denoiser = Discrete(timestep_levels(alphas).tolist()), pair.denoiser()
    if pair.time == "timestep":
        prediction = {"eps": "epsilon", "v": "v_prediction"}[pair.predicts]
        denoiser = DiscreteTimeDenoiser(denoiser, alphas, schedule, prediction=prediction, fractional=False)
    sami = Sami(Adapted(pair.encoder(), pair.returns), denoiser, schedule, latent_size=LATENTS)
    with torch.no_grad():
        for p in sami.parameters():
            p.add_(0.02 * torch.randn_like(p))
    x_0 = torch.randn(batch, *(FOREIGN[letter] for letter in "CHW")).clamp(-1, 1)
    return Step(sami, x_0, Objective(), 0.1)


def in_torch(step: Step, dtype: torch.dtype = torch.float32, layout: torch.memory_format = torch.contiguous_format) -> Run:
    """The method by autograd alone, the networks as they come; their constants are of the dtype too."""
    plain = step.reference(dtype, layout=layout)

    def run() -> Sequence[Tensor]:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                return plain()
        finally:
            torch.set_default_dtype(before)

    return run


def accelerated(step: Step) -> Step:
    """The engine's step, both networks accelerated."""
    sami = copy.deepcopy(step.sami)
    accelerate(sami.encoder)
    accelerate(sami.denoiser)
    return Step(sami, step.x_0, step.objective, step.kl_weight)


@pytest.mark.parametrize("name", PAIRS)
def test_foreign_step(name: str, compete: Callable[..., None]) -> None:
    """Loss and all gradients of both networks: plain torch in both layouts, and accelerated."""
    for package in PAIRS[name].needs:
        pytest.importorskip(package, exc_type=ImportError)
    step = foreign_step(PAIRS[name])
    fast, exact, rival = accelerated(step), in_torch(step, torch.float64)(), in_torch(step)()
    makers = {
        LAST: partial(in_torch, step, layout=torch.channels_last),
        TORCH: partial(in_torch, step),
        "cpp": partial(fast.ours, "cpp"),
    }
    ready = [
        Contestant.ready(who, make, partial(check_close, who, "step", truth=exact, same_dtype=rival), "cpu")
        for who, make in makers.items()
        if who != "cpp" or refusal("cpp", "cpu", torch.float32) is None
    ]
    described = {"op": f"foreign step, {name}", "shape": FOREIGN, "dtype": "float32", "mode": "step", "images": FOREIGN["B"]}
    described["bytes"] = least_bytes(step.x_0, step.sami)
    compete(described | convolution_bound(in_torch(step), "cpu"), ready, LAST, targets={"cpp": 1.15})
