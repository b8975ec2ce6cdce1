"""The whole training step: the engine's against the reference's with the same noise given; correct first, then timed."""

import copy
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from registry import compare
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sami_fast import ops
from sami_fast.compiled import compiled_parts
from sami_fast.config import Config, load_config
from sami_fast.data import open_dataset
from sami_fast.networks import build_model
from sami_fast.reference.step import step as reference_step
from sami_fast.sami import Sami
from sami_fast.step import Draw, Objective, training_step

CONFIGS = {
    "disks": ("disks", ["data.image_size=32", "train.batch_size=32"]),
    # Colour images as faces come, attention in both networks.
    "faces": (
        None,
        [
            "data.image_size=64",
            "data.channels=3",
            "encoder.channels=[32,64,64,64]",
            "encoder.attention=[8]",
            "denoiser.channels=[32,64,64,64]",
            "denoiser.attention=[8]",
            "train.batch_size=32",
            "objective.unconditional_weight=0.1",
        ],
    ),
}
TARGET = 2.0  # of the engine's own choice, over the eager reference
BASELINE = "reference"
IMPLEMENTATIONS = (
    BASELINE,
    "reverse",
    "sweeps",
    "dual",
)  # the engine's by the method that differentiates the encoder's score; auto: sweeps


class Step:
    """One batch of a config: images, noise, networks, and the two ways through it."""

    def __init__(self, config: Config) -> None:
        dataset = open_dataset(config.data, config.seed)
        self.sami = build_model(config, dataset.image_shape)
        # The denoiser starts as zero, where almost all of its gradients are zero too.
        with torch.no_grad():
            torch.nn.init.normal_(self.sami.denoiser.out.weight, std=0.02)
        self.config = config
        self.objective = Objective(**asdict(config.objective))
        self.kl_weight = config.kl_weight.start
        batch = config.train.batch_size
        index = torch.arange(batch)
        self.x_0 = dataset.images(index)
        self.draw = Draw(seed=1, step=2, index=index, global_batch=batch)
        self.shape = {"B": batch, "K": self.objective.noise_levels} | dict(zip("CHW", dataset.image_shape, strict=True))

    def noise(self) -> tuple[Tensor, Tensor, Tensor]:
        """t [B, K], eps [B, K, C, H, W] and eps_z [B, Z] of the engine's step."""
        draw, levels, schedule = self.draw, self.objective.noise_levels, self.sami.schedule
        t = schedule.sample(draw.index, levels, draw.global_batch, seed=draw.seed, step=draw.step, power=self.objective.time_power)
        ones = torch.ones_like(t)
        _, eps = ops.noise_sample(self.x_0, ones, ones, draw.index, seed=draw.seed, step=draw.step)
        eps_z = ops.random_normal(draw.seed, draw.step, ops.Stream.EPS_Z, draw.index, self.sami.encoder.latent_size)
        return t, eps.unflatten(0, t.shape), eps_z

    def engine(self, score_method: str, compiled: str = "none") -> Callable[[], Sequence[Tensor]]:
        """Draws its noise inside the clock. `compiled` is `engine.compile`."""
        sami, parameters = self.sami, list(self.sami.parameters())
        engine = replace(self.config.engine, score=score_method, compile=compiled)
        parts = compiled_parts(sami, replace(self.config, engine=engine))
        compiled_kwargs = {"score_method": parts.score_method, "clean_encoder": parts.encoder, "terms_of": parts.guided_terms}

        def run() -> Sequence[Tensor]:
            networks = sami.encoder, parts.denoiser, sami.schedule
            loss, _ = training_step(*networks, self.x_0, self.draw, self.objective, self.kl_weight, **compiled_kwargs)
            return loss.detach(), *torch.autograd.grad(loss, parameters)

        return run

    def reference(self, dtype: torch.dtype = torch.float32) -> Callable[[], Sequence[Tensor]]:
        """Plain eager torch all through. Is given the noise that the engine would draw."""
        sami: Sami = copy.deepcopy(self.sami).to(dtype)
        parameters, objective = list(sami.parameters()), self.objective
        t, eps, eps_z = (noise.to(dtype) for noise in self.noise())
        x_0, logsnr = self.x_0.to(dtype), sami.schedule.logsnr(t)
        weight = sami.schedule.weight(t, objective.weighting, objective.time_power)

        def run() -> Sequence[Tensor]:
            networks = sami.encoder, sami.denoiser
            with ops.use_backend("reference"):
                loss = reference_step(*networks, x_0, t, logsnr, weight, eps, eps_z, self.kl_weight, objective.unconditional_weight)
                return loss.detach(), *torch.autograd.grad(loss, parameters)

        return run


class FlopCounter(TorchDispatchMode):
    """Counts by torch's own formulas; torch's FlopCounterMode hooks into modules and refuses an inner autograd.grad."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.counts[str(func.overloadpacket)] += formula(*args, **(kwargs or {}), out_val=out)
        return out


def flops(run: Callable[[], object]) -> dict[str, int]:
    """Multiplications and additions of one call: of the convolutions, and of all matrix products."""
    with FlopCounter() as counter:
        run()
    return {
        "flops": counter.counts.total(),
        "convolution_flops": sum(count for op, count in counter.counts.items() if "conv" in op),
    }


class Convolutions(TorchDispatchMode):
    """Notes every convolution that torch is asked for, by what decides how long it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.convolution, torch.ops.aten.convolution_backward):
            shapes = (a.shape if isinstance(a, Tensor) else tuple(a) if isinstance(a, list) else a for a in args)  # torch.Size: a tensor
            self.calls[(func, *shapes)] += 1
        return func(*args, **(kwargs or {}))


def convolutions_ms(run: Callable[[], object]) -> float:
    """What the convolutions of a step take by themselves, each in the layout that suits it better: the bound for torch's library."""
    with Convolutions() as noted:
        run()
    total = 0.0
    for (func, *arguments), count in noted.calls.items():
        best = float("inf")
        for layout in (torch.contiguous_format, torch.channels_last):
            tensors = [torch.randn(a) if isinstance(a, torch.Size) else a for a in arguments]
            tensors = [a.contiguous(memory_format=layout) if isinstance(a, Tensor) and a.dim() == 4 else a for a in tensors]
            for _ in range(4):
                start = time.perf_counter()
                func(*tensors)
                best = min(best, time.perf_counter() - start)
        total += count * best
    return 1e3 * total


@cache
def prepared(config_name: str) -> tuple[Config, Step, Sequence[Tensor], Sequence[Tensor], float]:
    """A config, its step, the gradients in float64 and in float32 of the reference, and its convolutions alone."""
    file, overrides = CONFIGS[config_name]
    config = load_config(file, overrides)
    step = Step(config)
    return config, step, step.reference(torch.float64)(), step.reference()(), convolutions_ms(step.reference())


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("config_name", CONFIGS)
def test_step(config_name: str, name: str, record: Callable[..., None]) -> None:
    config, step, exact, rival, convolutions = prepared(config_name)
    run = step.reference() if name == BASELINE else step.engine(name)
    compare(f"step {config_name}: {name}", "step", run(), exact, rival)
    row: dict[str, Any] = {
        "op": f"step {config_name}",
        "shape": step.shape,
        "dtype": "float32",
        "mode": "step",
        "implementation": name,
        "baseline": BASELINE,
        "config": {section: asdict(getattr(config, section)) for section in ("encoder", "denoiser", "schedule", "objective")},
        "images": step.shape["B"],
        "convolutions_ms": convolutions,
        **({"target": TARGET} if name == "sweeps" else {}),
        **flops(run),
    }
    record(row, "images/s", run, step.reference(), run)


@pytest.mark.parametrize("what", ["denoiser", "step"])
def test_compiled_step(what: str, record: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disks step under torch.compile against the same step without, and how long compiling takes with an empty cache and a full one."""
    config, step, exact, rival, _ = prepared("disks")
    score_method = "dual" if what == "step" else "auto"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    eager, seconds = step.engine(score_method), {}
    for kind in ("empty", "full"):
        torch._dynamo.reset()
        run, start = step.engine(score_method, what), time.perf_counter()
        results = run()
        seconds[kind] = time.perf_counter() - start
    compare(f"step disks: compiled {what}", "step", results, exact, rival)
    row = {
        "op": "step disks, compiled",
        "shape": step.shape,
        "dtype": "float32",
        "mode": "step",
        "implementation": what,
        "baseline": f"{score_method}, not compiled",
        "config": {section: asdict(getattr(config, section)) for section in ("encoder", "denoiser", "schedule", "objective")},
        "images": step.shape["B"],
        "compile_seconds": seconds,
    }
    record(row, "images/s", run, eager, None)
