"""A step as a GPU would run it, counted: layouts, kernels, FLOPs and bytes; and the weights that lie as it wants them."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from benchmarks.budgets import refusals
from sami_fast import plan, score
from sami_fast.config import load_config
from sami_fast.gpu_step import PRIME, Trace, trace
from sami_fast.models import Encoder
from sami_fast.models.layers import lay_out_weights
from sami_fast.ops.conv2d import channels_last, for_convolutions

needs_triton = pytest.mark.skipif("gpu" in refusals(), reason="Triton is not installed")
SHAPE = (3, 16, 16)
SMALL = [
    *("data.image_size=16", "data.channels=3", "train.batch_size=122", "objective.noise_levels=2"),
    *("encoder.channels=[8,16]", "encoder.blocks=1", "denoiser.channels=[8,16]", "denoiser.embedding_size=16"),
    *("encoder.attention=[8]", "denoiser.attention=[8]"),
]


def step_of(images, method="sweeps", laid_out=True):
    config = load_config(None, SMALL)
    model = plan.networks_of(config, SHAPE)
    return config, trace(config, model, SHAPE, images, method, laid_out)


# ---- what is counted


@needs_triton
@pytest.mark.parametrize(
    ("x_last", "weight_last", "runs_last", "copied"),
    [
        (False, False, False, []),
        (False, True, True, ["convolution's x"]),
        (True, False, True, ["convolution's weight"]),
        (True, True, True, []),
    ],
)
def test_a_convolution_chooses_its_layout_as_cudnn_does(x_last, weight_last, runs_last, copied):
    with FakeTensorMode():
        x, weight = torch.empty(2, 3, 8, 8), torch.empty(4, 3, 3, 3)
        x, weight = (channels_last(t) if last else t for t, last in ((x, x_last), (weight, weight_last)))
        counted = Trace(2)
        with counted.recording():
            y = F.conv2d(x, weight, torch.empty(4), padding=1)
    assert (y.stride(1) == 1) == runs_last
    assert counted.channels_outside == (not runs_last)
    assert counted.relaid == copied
    assert [kernel.name for kernel in counted.kernels] == ["copy"] * len(copied) + ["convolution", "add_"]
    assert counted.flops == 2 * y.numel() * 3 * 9
    assert counted.kernels[-2].bytes == 4 * (x.numel() + weight.numel() + y.numel())


@needs_triton
@pytest.mark.parametrize("method", ["reverse", "sweeps", "dual"])
def test_the_flops_are_those_of_the_plan(method):
    config, step = step_of(PRIME, method)
    networks = plan.count_networks(config, plan.networks_of(config, SHAPE), SHAPE)
    expected = sum(plan.step_flops(config, *networks, method).values()) * PRIME / config.train.batch_size
    assert step.micro.flops == pytest.approx(expected, rel=0.02)


@needs_triton
def test_one_trace_serves_every_number_of_images():
    """Bytes of other batches follow from those of one; the number of kernels is nearly the same."""
    config, one = step_of(PRIME)
    _, other = step_of(16)
    found = plan.busy(one, config, plan.GPUS["h100-sxm"], 16)
    assert found.bytes == pytest.approx(other.micro.bytes + other.update.bytes, rel=0.02)
    assert found.kernels == pytest.approx(len(other.micro.kernels) + len(other.update.kernels), rel=0.05)
    assert found.host == (8e-6 * found.kernels, 12e-6 * found.kernels)


@needs_triton
def test_channels_lie_innermost_all_through():
    """But for the images at three doors, and the last features, which the heads take in the order of their weights."""
    _, step = step_of(16)
    assert step.micro.channels_outside == 0
    assert sorted(step.micro.relaid) == ["clone"] * 6 + ["copy_"] * 4
    _, step = step_of(16, laid_out=False)
    assert step.micro.channels_outside == 0
    assert step.micro.relaid.count("convolution's weight") > 40


# ---- weights


def test_weights_that_are_laid_out_stay_what_they_are():
    torch.manual_seed(0)
    encoder = Encoder(1, 16, 4, [8, 16], blocks=1, attention=[8]).double()
    x, z = torch.randn(2, 1, 16, 16).double(), torch.randn(2, 4).double().requires_grad_()
    plain = copy.deepcopy(encoder)
    before = list(encoder.parameters())
    lay_out_weights(encoder)
    assert [id(p) for p in encoder.parameters()] == [id(p) for p in before]
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.stride(1) == 1  # also where one channel leaves torch to guess
            assert module.weight.data.contiguous().view(torch.uint8).is_contiguous()  # what DeepSpeed does with them
    for (name, p), q in zip(encoder.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q), name
    found, expected = (
        torch.autograd.grad(score.grad_log_q(network, x, z, method).square().sum(), [z, *network.parameters()])
        for network, method in ((encoder, "sweeps"), (plain, "reverse"))
    )
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-12)


def test_images_stay_as_they_are_on_a_cpu():
    x = torch.randn(2, 3, 4, 4)
    assert for_convolutions(x) is x
