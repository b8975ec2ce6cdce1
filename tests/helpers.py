"""What several test files share: random inputs, relative errors, tiny networks."""

import json
import math
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from emulator import Emulator
from emulator import missing as emulator_missing
from safetensors.torch import load_file
from torch import Tensor, nn

from sami_fast.config import Config, load_config
from sami_fast.methods import METHODS
from sami_fast.models import Denoiser, Encoder
from sami_fast.ops.backend import BACKENDS, DTYPES, refusal

TINY = str(Path(__file__).resolve().with_name("tiny.yaml"))


GPU = torch.cuda.is_available()


def _marked(names: Iterable[str], reasons: dict[str, str | None]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.skip(reason=reason)] if (reason := reasons[name]) else []) for name in names]


def _kernels() -> list[Any]:
    """Every backend with kernels for tensors of one device. On a CPU Triton's run interpreted and CUDA's in the emulator, which stands in
    for it wherever a test has a parameter `backend` (conftest.py)."""
    if GPU:
        return _marked(("triton", "cuda"), {name: refusal(name, "cuda", torch.float32) for name in ("triton", "cuda")})
    reasons = {name: refusal(name, "cpu", torch.float32) for name in ("triton", "cpp")}
    return _marked(("triton", "cpp", "cuda"), reasons | {"cuda": emulator_missing()})


KERNELS = _kernels()


def on(*dtypes: torch.dtype, backends: Iterable[str] = BACKENDS) -> list[Any]:
    """(backend, dtype) for `dtypes` and every backend that takes them, wherever it runs."""
    return [
        pytest.param(backend, dtype, id=f"{backend}-{str(dtype).removeprefix('torch.')}")
        for backend in backends
        for dtype in dtypes
        if dtype in DTYPES.get(backend, (dtype,))
    ]


class LaunchersOn:
    """The launchers of a file on a backend, under the names of their twins, for tensors of the CPU: where the backend is on a GPU they go
    there and back. Tests are skipped where it cannot run."""

    def __init__(self, file: str, backend: str) -> None:
        self.backend, self._moves = backend, GPU and backend in ("triton", "cuda")
        if backend == "cuda" and not GPU:
            self._home: Any = emulator()
        elif (reason := refusal(backend, "cuda" if self._moves else "cpu", None)) is not None:
            pytest.skip(reason)
        elif backend in ("cpp", "cuda"):
            self._home = torch.ops.sami_fast_C
        else:
            self._home = import_module(f"sami_fast.{'reference' if backend == 'reference' else 'kernels'}.{file}")

    def __getattr__(self, name: str) -> Any:
        launcher = getattr(self._home, name)
        if not self._moves:
            return launcher
        return lambda *args, **options: _moved(launcher(*_moved(args, "cuda"), **options), "cpu")


def _moved(values: Any, device: str) -> Any:
    if isinstance(values, (tuple, list)):
        return type(values)(_moved(value, device) for value in values)
    return values.to(device) if isinstance(values, Tensor) else values


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


@cache
def emulator() -> Emulator:
    """csrc/cuda on a CPU, every load and store checked; tests that change its settings put them back."""
    if (reason := emulator_missing()) is not None:
        pytest.skip(reason)
    return Emulator()


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
