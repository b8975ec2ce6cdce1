"""The whole step on a GPU: kernels against the reference at real sizes, in every precision, and the same bits twice.

Each kernel's own GPU cases stand in its test file. Not run on hardware so far: no figure here was measured on a GPU.
"""

import copy

import pytest
import torch
from helpers import KERNELS, assert_same_gradients, gradients, normal, relative_error
from torch import Tensor, nn

from sami_fast import ops
from sami_fast.config import load_config
from sami_fast.methods.build import build_model
from sami_fast.models import Denoiser, Encoder
from sami_fast.schedule import UniformLogsnr
from sami_fast.step import Draw, Objective, training_step
from sami_fast.train import TrainingModule

pytestmark = pytest.mark.gpu
SCHEDULE = UniformLogsnr(-7.0, 5.0)
METHODS = ("reverse", "sweeps", "dual")


@pytest.fixture(autouse=True)
def _deterministic_convolutions(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def networks(channels_last: bool = False) -> tuple[nn.Module, nn.Module]:
    """64x64 colour images, attention over 256 and 64 tokens."""
    torch.manual_seed(0)
    encoder = Encoder(3, 64, 16, [32, 64, 128], blocks=1, attention=[16, 8], groups=8)
    denoiser = Denoiser(3, 64, [32, 64, 128], attention=[16], groups=8)
    nn.init.normal_(denoiser.out.weight, std=0.02)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return encoder.cuda().to(memory_format=layout), denoiser.cuda().to(memory_format=layout)


def step(
    encoder: nn.Module, denoiser: nn.Module, backend: str, method: str, bf16: bool = False, **settings
) -> tuple[Tensor, dict[str, Tensor]]:
    batch = 16
    draw = Draw(seed=1, step=2, index=torch.arange(batch, device="cuda"), global_batch=batch)
    objective = Objective(noise_levels=2, unconditional_weight=0.1)
    x_0 = normal(batch, 3, 64, 64).clamp(-1, 1).to("cuda", next(encoder.parameters()).dtype)
    with ops.use_backend(backend), torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        loss, _ = training_step(encoder, denoiser, SCHEDULE, x_0, draw, objective, 0.5, score_method=method, **settings)
    return loss.detach(), gradients(loss, encoder, denoiser)


def test_a_model_lies_channels_last():
    """Weights where training and commands lay them out, and from the image on the results of every convolution."""
    model = build_model(load_config(None, ["data.channels=3", "data.image_size=16"]), (3, 16, 16)).placed("cuda")
    layouts = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.stride(1) == 1, name
            layer.register_forward_hook(lambda *args, name=name: layouts.__setitem__(name, args[-1].stride(1)))
    x = normal(4, 3, 16, 16).cuda()
    model.encoder(x)
    model.denoiser(x, torch.full((4,), 0.5, device="cuda"))
    assert set(layouts.values()) == {1}


@pytest.mark.parametrize("store_eps", [True, False])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bf16", [False, True])
def test_step(method: str, bf16: bool, backend: str, channels_last: bool, store_eps: bool):
    """No further from float64 than three times the reference in the same precision, per parameter, and a floor."""
    encoder, denoiser = networks(channels_last)
    exact_loss, exact = step(copy.deepcopy(encoder).double(), copy.deepcopy(denoiser).double(), "reference", "reverse")
    loss, found = step(encoder, denoiser, backend, method, bf16, store_eps=store_eps)
    rival_loss, rival = step(encoder, denoiser, "reference", "reverse", bf16)
    unit = 2**-8 if bf16 else 2**-23
    assert (loss - exact_loss).abs() <= 3 * (rival_loss - exact_loss).abs() + 8 * unit * exact_loss.abs()
    scale = max(value.abs().max().item() for value in exact.values())
    for name, want in exact.items():
        error, allowed = ((value[name].double() - want).norm().item() for value in (found, rival))
        assert error <= 3 * allowed + 8 * unit * want.norm().item() + unit * scale, name


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bf16", [False, True])
def test_same_bits_twice(method: str, bf16: bool, backend: str):
    encoder, denoiser = networks()
    first, second = (step(encoder, denoiser, backend, method, bf16) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert_same_gradients(first[1], second[1], rtol=0.0)


def test_same_noise_as_on_the_cpu():
    """The bits of a run do not depend on where it runs."""
    index = torch.arange(5, 21)
    for draw in (
        lambda i: ops.random_normal(3, 1 << 40, ops.Stream.EPS, i, 1003),
        lambda i: ops.random_uniform(3, 7, ops.Stream.LOGSNR, i, 1003),
        lambda i: ops.stratified_uniform(i - 5, 4, 16, seed=3, step=7),
    ):
        assert torch.equal(draw(index.cuda()).cpu(), draw(index))


def test_auto_takes_the_kernels():
    for op, devices in ops.describe().items():
        assert devices["cuda"].startswith("reference" if op == "conv2d" else "triton"), op


def test_a_captured_step_replays_as_a_cuda_graph():
    """Sweeps included; another step, other images and weights that were updated give what the plain step gives."""
    config = load_config("disks", ["engine.cuda_graphs=true", "train.batch_size=16"])
    module = TrainingModule(build_model(config, (1, 16, 16)).placed("cuda"), config)
    assert module.captured is not None
    module.captured.wait = 0
    for step in range(5):
        x_0 = normal(16, 1, 16, 16, seed=step).clamp(-1, 1).float().cuda()
        draw = Draw(seed=1, step=step, index=torch.arange(16, device="cuda"), global_batch=16)
        loss, measured, found = module.captured(x_0, draw, 0.3, "both")
        expected, numbers = module.plain(x_0, draw, 0.3, "both")
        wanted = torch.autograd.grad(expected, module.captured.parameters, allow_unused=True)
        for a, b in zip((loss, measured, *found), (expected.detach(), numbers, *wanted), strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert relative_error(a, b) < 1e-4
        with torch.no_grad():
            for p in module.captured.parameters:
                p.mul_(0.99)
