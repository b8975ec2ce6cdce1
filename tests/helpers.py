"""What several test files share: random inputs, relative errors, tiny networks."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sami_fast.config import Config, load_config
from sami_fast.methods import METHODS
from sami_fast.models import Denoiser, Encoder
from sami_fast.ops.backend import refusal

TINY = str(Path(__file__).resolve().with_name("tiny.yaml"))


def _kernels() -> list[Any]:
    """Every backend with kernels; those of another device or that are not built are skipped. Triton's run interpreted on a CPU."""
    device, found = ("cuda", ("triton", "cuda")) if torch.cuda.is_available() else ("cpu", ("triton", "cpp"))
    reasons = {name: refusal(name, device, torch.float32) for name in found}
    return [pytest.param(name, marks=[pytest.mark.skip(reason=reason)] if reason else []) for name, reason in reasons.items()]


KERNELS = _kernels()


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, grad: bool = False) -> Tensor:
    """Standard normals that depend on the seed alone."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).requires_grad_(grad)


def positive(*shape: int, low: float, high: float, seed: int = 1, dtype: torch.dtype = torch.float64, grad: bool = False) -> Tensor:
    """Numbers uniform in their logarithm, from low to high; both ends occur where there is more than one number."""
    values = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values = torch.exp(math.log(low) + (math.log(high) - math.log(low)) * values).flatten()
    if values.numel() > 1:
        values[0], values[-1] = low, high
    return values.view(shape).to(dtype).requires_grad_(grad)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude; 0 for two empty tensors, inf where the shapes differ."""
    if found.shape != expected.shape:
        return math.inf
    if expected.numel() == 0:
        return 0.0
    found, expected = found.detach().double(), expected.detach().double()
    difference = (found - expected).abs().max().item()
    return difference / max(expected.abs().max().item(), 1e-300) if difference else 0.0


def tiny_encoder(latent_size: int = 3, seed: int = 0, **changes) -> Encoder:
    """Every kind of layer on 8x8 images, float64."""
    torch.manual_seed(seed)
    arguments = {"image_channels": 1, "image_size": 8, "channels": [4, 6], "blocks": 1, "attention": [4], "groups": 2}
    return Encoder(latent_size=latent_size, **arguments | changes).double()


def tiny_denoiser(seed: int = 1, **changes) -> Denoiser:
    """Every kind of layer on 8x8 images, float64; its output layer is not zero as it is after construction."""
    torch.manual_seed(seed)
    arguments = {"image_channels": 1, "image_size": 8, "channels": [4, 6], "blocks": 1, "groups": 2, "embedding_size": 8}
    denoiser = Denoiser(**arguments | changes)
    nn.init.normal_(denoiser.out.weight, std=0.2)
    return denoiser.double()


def gradients(loss: Tensor, *modules: nn.Module) -> dict[str, Tensor]:
    """d loss / d parameter by name; a parameter that the loss does not reach gets zeros."""
    named = {f"{place}.{name}": p for place, module in enumerate(modules) for name, p in module.named_parameters()}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found, strict=True)}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    """Every gradient within rtol of its own largest entry, or of rounding error on the scale of all of them."""
    assert found.keys() == expected.keys()
    floor = 1e-13 * largest(expected.values())
    for name, want in expected.items():
        error = (found[name] - want).abs().max().item()
        assert error <= rtol * want.abs().max().item() + floor, f"{name}: off by {error:.3g} of {want.abs().max().item():.3g}"


def largest(tensors: Iterable[Tensor]) -> float:
    return max(t.abs().max().item() for t in tensors)


def core_launchers() -> Any:
    """The raw launchers of the compiled core, which have the names and signatures of their twins in sami_fast/reference."""
    if (reason := refusal("cpp", "cpu", torch.float32)) is not None:
        pytest.skip(reason)
    return torch.ops.sami_fast_C


def log_rows(config: Config) -> list[dict[str, Any]]:
    """Rows of a log that nobody trained for, with a checkpoint's row among them; tests/test_train.py holds their keys against real ones."""
    rows = []
    for step in range(5, config.train.steps + 1, 5):
        joint = step > config.first_joint_step
        kl = [1.5 / 8.0**d if joint else 0.0 for d in range(config.encoder.latent_size)]
        rows.append(
            {
                "step": step,
                "images": step * config.train.batch_size,
                "loss_nats": 50.0 / step,
                **dict.fromkeys((term.name for term in METHODS[config.method].terms), 45.0 / step),
                "kl_nats": sum(kl),
                "information_sum_nats": sum(kl),
                "kl_weight": 0.1 if joint else 0.0,
                "learning_rate": 1e-3,
                "images_per_second": 100.0 + step if joint else 1000.0,
                "data_wait": 0.0,
                "seconds": 0.5 * step,
                "kl_per_dim": kl,
                "information_per_dim": kl,
            }
        )
    return [*rows, {"step": config.train.steps, "validation_nats": 3.0}]


def tiny(folder: Path, *overrides: str) -> Config:
    """The smallest run."""
    return load_config(TINY, [f"runs_dir={folder}", *overrides])


def rows(run: Path) -> list[dict[str, Any]]:
    """Of training, in a run's log."""
    return [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss_nats" in row]


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model/model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
