"""Other people's networks, accelerated: the loss and every gradient of a training step are those of plain autograd."""

from collections.abc import Callable

import pytest
import torch
from helpers import largest
from torch import nn

from benchmarks.foreign import PAIRS
from sami_fast.accelerate import Accelerated, accelerate


@pytest.fixture
def step_of(monkeypatch: pytest.MonkeyPatch) -> Callable:
    benchmark = pytest.importorskip("benchmarks.test_accelerate", reason="needs diffusers")

    def build(name: str):
        for package in PAIRS[name].needs:
            pytest.importorskip(package, exc_type=ImportError)
        return benchmark, benchmark.foreign_step(PAIRS[name], batch=2)

    return build


@pytest.mark.parametrize("name", PAIRS)
def test_loss_and_gradients_of_a_step(name, step_of, monkeypatch):
    benchmark, step = step_of(name)
    exact = benchmark.in_torch(step, torch.float64)()
    monkeypatch.setattr(step, "x_0", step.x_0.double())
    step.sami.double()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # of a network's own constants
    try:
        found = benchmark.accelerated(step).ours("auto")()
    finally:
        torch.set_default_dtype(before)
    scale = 1e-3 * largest(exact[1:])
    assert abs(found[0] - exact[0]) < 1e-6 * abs(exact[0])
    for value, want in zip(found[1:], exact[1:], strict=True):
        assert (value - want).abs().max() < 1e-6 * max(want.abs().max().item(), scale)


@pytest.mark.parametrize("name", PAIRS)
def test_it_is_put_back(name, step_of):
    _, step = step_of(name)
    for network in (step.sami.encoder, step.sami.denoiser):
        before = [(type(m), sorted(vars(m))) for m in network.modules()], [p.stride() for p in network.parameters()]
        report = accelerate(network)
        assert any(isinstance(m, Accelerated) for m in network.modules())
        kernels = [m.weight for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in kernels)
        for _ in range(2):
            report.restore()
            assert ([(type(m), sorted(vars(m))) for m in network.modules()], [p.stride() for p in network.parameters()]) == before
