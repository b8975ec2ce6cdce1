"""A training step: its batch, noise and networks, and the ways through it that the benchmarks compare."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sami_fast import ops
from sami_fast.config import Config, load_config
from sami_fast.engine.compiled import compiled_parts
from sami_fast.methods.build import build_model
from sami_fast.methods.sami import Sami
from sami_fast.reference import gaussian_kl, gaussian_log_prob, gaussian_reparameterize, guided_loss
from sami_fast.reference.step import step as reference_step
from sami_fast.schedule import Schedule
from sami_fast.step import Draw, Objective, StepTerms, training_step

from .counting import Meter
from .machine import best_seconds

# Colour images as faces come, attention in both networks.
FACES = ["data.image_size=64", "data.channels=3", "train.batch_size=16", "encoder.channels=[32,64]", "encoder.attention=[16]"]
FACES += ["denoiser.channels=[32,64,64]", "denoiser.attention=[16]", "denoiser.blocks=1", "objective.unconditional_weight=0.1"]
CONFIGS = {
    "disks": ("disks", ["data.image_size=32", "train.batch_size=32"]),
    "faces": (None, FACES),
    "celeba64": ("celeba64", ["data.path=celeba", "train.batch_size=64"]),
}
SHAPES = {"disks": (1, 32), "faces": (3, 64), "celeba64": (3, 64)}  # channels, size
TINY = ["train.batch_size=2", "encoder.channels=[32,32]", "denoiser.channels=[32,32]", "encoder.attention=[4]", "denoiser.attention=[4]"]
TINY += ["encoder.groups=4", "denoiser.groups=4"]  # with 32 groups a group would hold 4 numbers, too few for a norm
REFERENCE, BASELINE = "reference", "reference, channels-last"  # eager torch as it comes, and in the layout that suits it on most machines
SCORE_METHODS = ("reverse", "sweeps", "dual")  # ways to differentiate the encoder's score; `auto` is sweeps

Gradients = Sequence[Tensor]  # the loss, then one per parameter
Run = Callable[[], Gradients]


def drawn_noise(
    schedule: Schedule, x_0: Tensor, draw: Draw, latent_size: int, levels: int = 1, power: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """t [B, K], eps [B, K, C, H, W] and eps_z [B, Z] as our step draws them; power is that of `Schedule.sample`."""
    t = schedule.sample(draw.index, levels, draw.global_batch, seed=draw.seed, step=draw.step, power=power)
    ones = torch.ones_like(t)
    _, eps = ops.noise_sample(x_0, ones, ones, draw.index, seed=draw.seed, step=draw.step)
    eps_z = ops.random_normal(draw.seed, draw.step, ops.Stream.EPS_Z, draw.index, latent_size)
    return t, eps.unflatten(0, t.shape), eps_z


class Step:
    """One batch: images, noise, networks, and the ways through a step.

    Args:
        sami: The networks, on the device of the images.
        x_0: The images. [B, C, H, W].
        objective, kl_weight: Of the loss.
    """

    def __init__(self, sami: Sami, x_0: Tensor, objective: Objective, kl_weight: float) -> None:
        self.sami, self.x_0, self.objective, self.kl_weight = sami, x_0, objective, kl_weight
        self.device = x_0.device.type
        self.draw = Draw(seed=1, step=2, index=torch.arange(len(x_0), device=x_0.device), global_batch=len(x_0))
        self.shape = dict(zip("BKCHW", (len(x_0), objective.noise_levels, *x_0.shape[1:]), strict=True))

    @classmethod
    def of(cls, config: Config, x_0: Tensor) -> Self:
        """The networks of a config, fresh."""
        _, channels, height, width = x_0.shape
        sami = build_model(config, (channels, height, width))
        assert isinstance(sami, Sami)
        return cls(sami.to(x_0.device), x_0, Objective(**asdict(config.objective)), config.kl_weight.start)

    def loss(
        self, method: str = "auto", denoiser: Callable[[Tensor, Tensor], Tensor] | None = None, **parts: Any
    ) -> tuple[Tensor, StepTerms]:
        """The engine's, which draws its noise; with another denoiser, and with `parts` as arguments of `training_step`."""
        networks = self.sami.encoder, denoiser or self.sami.denoiser, self.sami.schedule
        return training_step(*networks, self.x_0, self.draw, self.objective, self.kl_weight, score_method=method, **parts)

    def noise(self) -> tuple[Tensor, Tensor, Tensor]:
        """t [B, K], eps [B, K, C, H, W] and eps_z [B, Z] of our step."""
        objective = self.objective
        return drawn_noise(self.sami.schedule, self.x_0, self.draw, self.sami.latent_size, objective.noise_levels, objective.time_power)

    def ours(self, backend: str, method: str = "auto", *, compile_for: Config | None = None, bf16: bool = False) -> Run:
        """The engine's step, eager or, with a config, as `engine.compile=step` has it. Draws its noise inside the clock."""
        parameters, parts = list(self.sami.parameters()), {}
        if compile_for is not None:
            engine = replace(compile_for.engine, score=method, compile="step")
            compiled = compiled_parts(self.sami, replace(compile_for, engine=engine))
            parts = {"denoiser": compiled.denoiser, "clean_encoder": compiled.encoder, "terms_of": compiled.guided_terms}

        def run() -> Gradients:
            with ops.use_backend(backend):
                with torch.autocast(self.device, torch.bfloat16, enabled=bf16):
                    loss, _ = self.loss(method, **parts)
                return loss.detach(), *torch.autograd.grad(loss, parameters)

        return run

    def _given(self, dtype: torch.dtype, layout: torch.memory_format) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x_0, t, logsnr, weight, eps and eps_z for those whose noise is drawn beforehand; images in a layout."""
        t, eps, eps_z = (noise.to(dtype) for noise in self.noise())
        eps = eps.flatten(0, 1).contiguous(memory_format=layout).unflatten(0, t.shape)
        objective, schedule = self.objective, self.sami.schedule
        weight = schedule.weight(t, objective.weighting, objective.time_power)
        return self.x_0.to(dtype).contiguous(memory_format=layout), t, schedule.logsnr(t), weight, eps, eps_z

    def reference(
        self, dtype: torch.dtype = torch.float32, *, bf16: bool = False, layout: torch.memory_format = torch.contiguous_format
    ) -> Run:
        """Plain eager torch all through, weights and images in a layout. Is given the noise that ours would draw."""
        sami = copy.deepcopy(self.sami).to(dtype).to(memory_format=layout)
        parameters, given = list(sami.parameters()), self._given(dtype, layout)

        def run() -> Gradients:
            with ops.use_backend("reference"):
                with torch.autocast(self.device, torch.bfloat16, enabled=bf16):
                    loss = reference_step(sami.encoder, sami.denoiser, *given, self.kl_weight, self.objective.unconditional_weight)
                return loss.detach(), *torch.autograd.grad(loss, parameters)

        return run

    def compiled_torch(self, *, bf16: bool = False) -> Run:
        """The same plain torch as one graph of torch.compile, built on torch.func.grad; its noise is given too."""
        sami = copy.deepcopy(self.sami)
        given = self._given(torch.float32, torch.contiguous_format)
        names = [name for name, _ in sami.named_parameters()]
        objective, kl_weight = self.objective, self.kl_weight

        def network(name: str, parameters: dict[str, Tensor]) -> Callable[..., Any]:
            own = {key.removeprefix(f"{name}."): p for key, p in parameters.items() if key.startswith(f"{name}.")}
            return lambda *arguments: functional_call(getattr(sami, name), own, arguments)

        def loss(
            parameters: dict[str, Tensor], x_0: Tensor, t: Tensor, logsnr: Tensor, weight: Tensor, eps: Tensor, eps_z: Tensor
        ) -> Tensor:
            encoder, denoiser = network("encoder", parameters), network("denoiser", parameters)
            levels = t.shape[1]
            mu_0, var_0 = encoder(x_0)
            z = gaussian_reparameterize(mu_0, var_0, eps_z).repeat_interleave(levels, 0)
            alpha_t, sigma_t = torch.sigmoid(logsnr).sqrt()[:, :, None, None, None], torch.sigmoid(-logsnr).sqrt()
            x_t = (alpha_t * x_0[:, None] + sigma_t[:, :, None, None, None] * eps).flatten(0, 1)
            grad_log_q = torch.func.grad(lambda x: gaussian_log_prob(z, *encoder(x)).sum())(x_t)
            w = weight.flatten() / levels
            terms = eps.flatten(0, 1), denoiser(x_t, t.flatten()).to(x_t.dtype), grad_log_q, sigma_t.flatten(), w
            per_sample, _ = guided_loss(*terms, objective.unconditional_weight * w)
            return per_sample.view(-1, levels).sum(1).mean() + kl_weight * gaussian_kl(mu_0, var_0).mean(0).sum()

        step = torch.compile(torch.func.grad_and_value(loss), fullgraph=True, dynamic=False)
        parameters = {name: p.detach() for name, p in sami.named_parameters()}

        def run() -> Gradients:
            with ops.use_backend("reference"), torch.autocast(self.device, torch.bfloat16, enabled=bf16):
                gradients, value = step(parameters, *given)
            return value, *(gradients[name] for name in names)

        return run

    @cache  # noqa: B019  a step lives as long as its test
    def flops(self, method: str) -> dict[str, int]:
        """Multiplications and additions of a step: of the convolutions, and of all matrix products; counted for one image on the CPU."""
        one = Step(copy.deepcopy(self.sami).cpu(), self.x_0[:1].cpu(), self.objective, self.kl_weight)
        plain = method == REFERENCE
        with Meter() as meter:
            one.ours("reference" if plain else "auto", "reverse" if plain else method)()
        return {name: self.shape["B"] * count for name, count in _flops(meter).items()}


def named_step(name: str, device: str, tiny: bool = False) -> tuple[Step, Config]:
    """The step of one of CONFIGS on random images."""
    file, overrides = CONFIGS[name]
    channels, size = SHAPES[name]
    config = load_config(file, [*overrides, *(TINY if tiny else ())])
    torch.manual_seed(0)
    shape = (config.train.batch_size, channels, *[8 if tiny else size] * 2)
    step = Step.of(config, (torch.rand(shape) * 2 - 1).to(device))
    # The denoiser starts as zero, where almost all of its gradients are zero too.
    torch.nn.init.normal_(step.sami.denoiser.out.weight, std=0.02)
    return step, config


def least_bytes(images: Tensor, networks: nn.Module) -> int:
    """What gradients cannot do without: images and weights read, gradients written."""
    weights = sum(p.numel() * p.element_size() for p in networks.parameters())
    return images.numel() * images.element_size() + 2 * weights


def _flops(meter: Meter) -> dict[str, int]:
    return {"flops": meter.flops.total(), "convolution_flops": meter.convolution_flops}


def convolution_bound(run: Callable[[], object], device: str) -> dict[str, Any]:
    """Fields of a row: the FLOPs of a call, and the least time that torch's library needs for the convolutions of it.

    That is what they take by themselves, each in the layout that suits it better.
    """
    with Meter() as meter:
        run()

    def tensor(argument: Any, layout: torch.memory_format) -> Any:
        if not (isinstance(argument, tuple) and len(argument) == 2 and isinstance(argument[0], torch.Size)):
            return argument
        shape, dtype = argument
        made = torch.randn(shape, device=device).to(dtype)
        return made.contiguous(memory_format=layout) if len(shape) == 4 else made

    total = 0.0
    for (func, *arguments), count in meter.convolutions.items():
        best = float("inf")
        for layout in (torch.contiguous_format, torch.channels_last):
            given = [tensor(a, layout) for a in arguments]
            best = min(best, best_seconds(partial(func, *given), device, budget=0.01))
        total += count * best
    return {"bound": "convolutions", "bound_ms": 1e3 * total, **_flops(meter)}
