"""The reverse process guided by latents: ours against the same DDIM steps in eager torch, in both layouts, and by diffusers."""

import copy
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from sami_fast import ops
from sami_fast.latents.sampling import reverse_process
from sami_fast.methods.sami import Sami
from sami_fast.ops.backend import AUTO, refusal
from sami_fast.reference import gaussian_log_prob
from sami_fast.schedule import alpha_sigma

from .measure import Contestant, check_close
from .rivals import missing
from .steps import BASELINE, REFERENCE, convolution_bound, named_step
from .table import OURS

IMAGES = 8
STEPS = 4  # evaluations of the denoiser; deterministic (eta 0), so that all end at the same images


def guided_eps(sami: Sami, x_t: Tensor, t: Tensor, sigma_t: Tensor, z: Tensor) -> Tensor:
    """eps_theta(x_t, t) - sigma_t grad log q(z|x_t), through autograd."""
    with torch.enable_grad():
        leaf = x_t.detach().requires_grad_()
        (grad_log_q,) = torch.autograd.grad(gaussian_log_prob(z, *sami.encoder(leaf)).sum(), leaf)
    return sami.denoiser(x_t, t) - sigma_t * grad_log_q


@torch.no_grad()
def in_plain_torch(sami: Sami, x_T: Tensor, z: Tensor) -> Tensor:
    times = torch.linspace(1, 0, STEPS, dtype=x_T.dtype, device=x_T.device)
    alpha, sigma = alpha_sigma(sami.schedule.logsnr(times))
    x_t = x_T
    for step in range(STEPS):
        eps_hat = guided_eps(sami, x_t, times[step].expand(len(x_t)), sigma[step], z)
        x_0 = (x_t - sigma[step] * eps_hat) / alpha[step]
        if step + 1 < STEPS:
            x_t = alpha[step + 1] * x_0 + sigma[step + 1] * eps_hat
    return x_0


def through_diffusers(sami: Sami, x_T: Tensor, z: Tensor) -> Callable[[], Tensor]:
    """diffusers' DDIMScheduler over our noise levels, its timestep n being the level that many from the cleanest."""
    from diffusers import DDIMScheduler

    times = torch.linspace(1, 0, STEPS, dtype=x_T.dtype, device=x_T.device)
    alpha, sigma = alpha_sigma(sami.schedule.logsnr(times))
    scheduler = DDIMScheduler(num_train_timesteps=STEPS, clip_sample=False, set_alpha_to_one=True)
    scheduler.alphas_cumprod = alpha.square().flip(0).cpu()
    scheduler.set_timesteps(STEPS, device=x_T.device)

    @torch.no_grad()
    def run() -> Tensor:
        x_t = x_T
        for step, timestep in enumerate(scheduler.timesteps):
            eps_hat = guided_eps(sami, x_t, times[step].expand(len(x_t)), sigma[step], z)
            x_t = scheduler.step(eps_hat, timestep, x_t, eta=0.0).prev_sample
        return x_t

    return run


def with_backend(backend: str, call: Callable[[], Tensor]) -> Callable[[], Sequence[Tensor]]:
    def run() -> Sequence[Tensor]:
        with ops.use_backend(backend):
            return (call(),)

    return run


@pytest.mark.parametrize("name", ["disks", "faces"])
def test_sample(name: str, device: str, compete: Callable[..., None], request: pytest.FixtureRequest) -> None:
    step, _ = named_step(name, device, request.config.getoption("--tiny"))
    sami = step.sami.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(IMAGES, *step.x_0.shape[1:], generator=generator).to(device)
    z = torch.randn(len(x_T), sami.latent_size, generator=generator).to(device)
    ours = partial(reverse_process, sami, x_T, z, num_steps=STEPS, eta=0.0, guidance_clip=None, clip_x_0=False)
    last = copy.deepcopy(sami).to(memory_format=torch.channels_last), x_T.contiguous(memory_format=torch.channels_last)
    runs = {
        BASELINE: with_backend("reference", partial(in_plain_torch, *last, z)),
        REFERENCE: with_backend("reference", partial(in_plain_torch, sami, x_T, z)),
    }
    if missing("diffusers") is None:
        runs["diffusers DDIMScheduler"] = with_backend("reference", through_diffusers(sami, x_T, z))
    for backend in AUTO[device]:
        if backend in OURS and refusal(backend, device, torch.float32) is None:
            runs[backend] = with_backend(backend, ours)
    exact = with_backend("reference", partial(in_plain_torch, copy.deepcopy(sami).double(), x_T.double(), z.double()))()
    yardstick, ready = runs[REFERENCE](), []
    for contestant, run in runs.items():
        check = partial(check_close, f"sample {name}: {contestant}", "sample", truth=exact, same_dtype=yardstick)
        ready.append(Contestant.ready(contestant, lambda run=run: run, check, device))
    shape = {"B": IMAGES} | {letter: step.shape[letter] for letter in "CHW"}
    described = {"op": f"sample {name}", "shape": shape, "dtype": "float32", "mode": "sample", "images": len(x_T), "num_steps": STEPS}
    described |= convolution_bound(runs[BASELINE], device) | {"bytes": 2 * x_T.numel() * x_T.element_size()}
    compete(described, ready, BASELINE)
