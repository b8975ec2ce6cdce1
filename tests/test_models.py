"""Encoder and denoiser: shapes, both styles, second gradients, what the encoder cannot know."""

import inspect
import math

import pytest
import torch
from helpers import normal, relative_error, tiny_denoiser, tiny_encoder
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from sami_fast import Sami, ops, score
from sami_fast.models import Denoiser, Encoder
from sami_fast.models.denoiser import time_embedding
from sami_fast.models.encoder import MIN_VAR, smooth_kernels
from sami_fast.models.layers import STYLES, AttentionBlock, GroupNormSiLU
from sami_fast.schedule import Cosine

each_style = pytest.mark.parametrize("style", STYLES)

# image channels, image size, channels, blocks, attention
SIZES = [
    (1, 16, [8, 8, 8], 0, []),
    (3, 32, [8, 12, 16], 1, [8, 4]),
    (3, 24, [6, 10], 2, [12]),
    (2, 8, [5], 1, [4, 8]),
    (1, 4, [3, 7], 0, [1]),
    (1, 9, [6, 5, 4], 1, [9, 5, 3, 2]),  # odd sides, as MNIST's 28 comes to, are rounded up
]


# Values


@each_style
@pytest.mark.parametrize(("image_channels", "size", "channels", "blocks", "attention"), SIZES)
def test_encoder_shapes(image_channels, size, channels, blocks, attention, style):
    attention = [side for side in attention if side < size and side >= size / 2 ** len(channels)]
    encoder = Encoder(image_channels, size, 5, channels, blocks, attention, style=style)
    assert encoder.image_shape == (image_channels, size, size)
    for batch in (1, 3, 0):
        mu, var = encoder(normal(batch, image_channels, size, size, dtype=torch.float32))
        assert mu.shape == var.shape == (batch, 5)
        assert mu.dtype == var.dtype == torch.float32
        assert (var >= MIN_VAR).all()


@each_style
@pytest.mark.parametrize(("image_channels", "size", "channels", "blocks", "attention"), SIZES)
def test_denoiser_shapes(image_channels, size, channels, blocks, attention, style):
    attention = [side for side in attention if side >= size / 2 ** (len(channels) - 1)]
    denoiser = Denoiser(image_channels, size, channels, max(1, blocks), attention, style=style, embedding_size=12)
    assert denoiser.image_shape == (image_channels, size, size)
    for batch in (1, 3, 0):
        x_t = normal(batch, image_channels, size, size, dtype=torch.float32)
        assert denoiser(x_t, torch.linspace(0, 1, batch)).shape == x_t.shape


@each_style
def test_a_new_denoiser_predicts_no_noise(style):
    denoiser = Denoiser(3, 16, [4, 8], style=style)
    assert denoiser(normal(2, 3, 16, 16, dtype=torch.float32), torch.tensor([0.1, 0.9])).abs().max() == 0


@pytest.mark.parametrize("latent_size", [0, 3])
def test_a_denoiser_says_only_what_the_noisy_image_does_not(latent_size):
    schedule = Cosine(-9.0, 6.0)
    plain, beside = (tiny_denoiser(latent_size=latent_size, **more) for more in ({}, {"skip_logsnr": -5.0, "schedule": schedule}))
    t = torch.tensor([0.0, 0.4, 0.8, 1.0], dtype=torch.float64)
    x_t, z = normal(4, 1, 8, 8), [normal(4, latent_size)] if latent_size else []
    logsnr = schedule.logsnr(t) + 5.0
    signal = (1 / (1 + torch.exp(-logsnr))).view(-1, 1, 1, 1)
    expected = (1 - signal).sqrt() * x_t + signal.sqrt() * plain(x_t, t, *z)
    assert relative_error(beside(x_t, t, *z), expected) < 1e-13
    # At the noisiest level all but the noisy image is taken times e^-2, at the cleanest the noisy image times e^-5.5.
    assert signal.sqrt()[[0, 3]].flatten().tolist() == pytest.approx([1.0, math.exp(-2.0)], abs=0.01)


def test_a_denoiser_beside_the_noisy_image_can_be_differentiated_twice():
    denoiser = tiny_denoiser(skip_logsnr=-5.0, schedule=Cosine(-9.0, 6.0))
    x_t, t = normal(1, 1, 8, 8).requires_grad_(), torch.tensor([0.9], dtype=torch.float64)
    assert gradcheck(lambda x: denoiser(x, t), (x_t,))
    assert gradgradcheck(lambda x: denoiser(x, t), (x_t,))


def test_a_denoiser_that_does_not_know_what_t_means_says_so():
    denoiser, x_t, t = tiny_denoiser(skip_logsnr=-5.0), normal(1, 1, 8, 8), torch.tensor([0.5], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"skip_logsnr: needs to know what t means: Denoiser\(..., schedule=...\) or `use`"):
        denoiser(x_t, t)
    model = Sami(tiny_encoder(), denoiser, Cosine(-9.0, 6.0))  # knows it, and tells
    expected = tiny_denoiser(skip_logsnr=-5.0, schedule=Cosine(-9.0, 6.0))(x_t, t)
    assert torch.equal(model.predict_eps(x_t, t), expected)
    with pytest.raises(ValueError, match=r"schedule: the denoiser was made for .*'logsnr_max': 6.0.*, found .*'logsnr_max': 5.0"):
        Sami(tiny_encoder(), denoiser, Cosine(-9.0, 5.0))
    plain = tiny_denoiser()
    for highest in (6.0, 5.0):  # what t means is nothing to it
        Sami(tiny_encoder(), plain, Cosine(-9.0, highest))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_denoiser_beside_the_noisy_image_returns_its_dtype(dtype):
    denoiser = tiny_denoiser(skip_logsnr=-5.0, schedule=Cosine(-9.0, 6.0)).to(dtype)
    for of_time in (torch.float32, torch.float64):
        assert denoiser(normal(2, 1, 8, 8).to(dtype), torch.tensor([0.1, 0.9], dtype=of_time)).dtype == dtype


@each_style
@pytest.mark.parametrize("init_std", [0.3, 0.97])
def test_a_new_encoder_is_close_to_its_initial_deviation(style, init_std):
    torch.manual_seed(0)
    _, var = Encoder(1, 16, 8, [16, 16], style=style, init_std=init_std)(normal(20, 1, 16, 16, dtype=torch.float32))
    assert var.sqrt().mean().item() == pytest.approx(init_std, rel=0.1)


def test_smooth_kernels_are_a_blur_of_the_same_variance():
    blur = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]])
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Conv2d(32, 64, 3), torch.nn.Conv2d(64, 64, 1))
    before, pointwise = layers[0].weight.detach().clone(), layers[1].weight.detach().clone()
    smooth_kernels(layers, 1.0)
    whole = layers[0].weight.detach()
    torch.testing.assert_close(whole / whole[:, :, :1, :1], blur.expand_as(whole))
    assert whole.square().mean().item() == pytest.approx(before.square().mean().item(), rel=0.05)
    assert torch.equal(layers[1].weight, pointwise)


def test_a_smooth_encoder_sees_a_faint_colour_through_noise():
    """Its latents follow a colour that covers an image, at a tenth of the noise; those of independent kernels hardly do."""
    generator = torch.Generator().manual_seed(1)
    colours = torch.randn(512, 3, generator=generator)
    x = 0.1 * colours[:, :, None, None] + torch.randn(512, 3, 32, 32, generator=generator)
    explained = {}
    for smooth in (0.0, 0.5):
        torch.manual_seed(0)
        encoder = Encoder(3, 32, 16, [32, 32, 32], smooth=smooth)
        with torch.no_grad():
            mu = encoder(x)[0]
        mu = mu - mu.mean(0)
        fitted = colours @ torch.linalg.lstsq(colours, mu).solution
        explained[smooth] = (fitted.square().sum() / mu.square().sum()).item()
    assert explained[0.5] > 2 * explained[0.0] > 0, explained


def test_images_do_not_mix():
    encoder, denoiser = tiny_encoder(), tiny_denoiser(attention=[4, 8])
    x, t = normal(3, 1, 8, 8), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    for b in range(3):
        alone = slice(b, b + 1)
        for together, single in zip(encoder(x), encoder(x[alone]), strict=True):
            assert relative_error(together[alone], single) < 1e-12
        assert relative_error(denoiser(x, t)[alone], denoiser(x[alone], t[alone])) < 1e-12


def test_the_denoiser_reads_the_noise_level():
    denoiser, x_t = tiny_denoiser(), normal(1, 1, 8, 8)
    first, second = (denoiser(x_t, torch.tensor([t], dtype=torch.float64)) for t in (0.3, 0.31))
    assert relative_error(first, second) > 1e-4


def test_time_embedding():
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    for size in (2, 8, 64):
        embedding = time_embedding(t, size)
        assert embedding.shape == (3, size)
        half = size // 2
        for b in range(3):
            for i in range(half):
                angle = math.pi * 1000.0 ** (i / max(half - 1, 1)) * t[b].item()
                assert embedding[b, i].item() == pytest.approx(math.sin(angle), abs=1e-9)
                assert embedding[b, half + i].item() == pytest.approx(math.cos(angle), abs=1e-9)
    assert time_embedding(t.float(), 8).dtype == torch.float32


def test_the_encoder_is_blind_to_the_noise_level():
    """No time among its inputs, and no layer that could take one."""
    assert list(inspect.signature(Encoder.forward).parameters) == ["self", "x", "tx"]  # a tangent of x, no time
    encoder = tiny_encoder()
    assert not any("embed" in name for name, _ in encoder.named_parameters())
    assert not list(encoder.buffers())
    x = normal(2, 1, 8, 8)
    before = encoder(x)
    encoder(10 * normal(4, 1, 8, 8, seed=5))  # nor a memory of what came before
    assert all(torch.equal(a, b) for a, b in zip(before, encoder(x), strict=True))


def test_bias_free_relu_has_no_biases_where_it_says_so():
    encoder = Encoder(3, 16, 4, [8, 8], 1, [8], style="bias_free_relu")
    denoiser = Denoiser(3, 16, [8, 8], 1, [8], style="bias_free_relu")
    for network in (encoder, denoiser):
        convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
        assert convolutions
        assert all(m.bias is None for m in convolutions)
        assert not any(isinstance(m, GroupNormSiLU) for m in network.modules())
    assert encoder.mu.bias is None
    assert encoder.raw_var.bias is not None  # sets the initial deviation


def test_bias_free_relu_is_positively_homogeneous():
    encoder, x = tiny_encoder(style="bias_free_relu", attention=[]), normal(3, 1, 8, 8)
    for factor in (1e-3, 2.5, 1e4):
        assert relative_error(encoder.body(factor * x), factor * encoder.body(x)) < 1e-13
        assert relative_error(encoder(factor * x)[0], factor * encoder(x)[0]) < 1e-13


def test_norm_has_the_parameters_of_torch():
    ours, theirs = GroupNormSiLU(8, 4), nn.GroupNorm(4, 8)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    for channels, groups, expected in ((8, 4, 4), (6, 4, 3), (7, 4, 1), (3, 8, 3), (5, 5, 5)):
        assert GroupNormSiLU(channels, groups).num_groups == expected


@pytest.mark.parametrize(("channels", "heads"), [(3, 1), (64, 1), (65, 5), (96, 2), (128, 2), (127, 127)])
def test_attention_heads_are_at_most_64_wide(channels, heads):
    assert AttentionBlock(channels, 1, STYLES[0]).attention.num_heads == heads


def test_attention_block_by_hand():
    torch.manual_seed(0)
    block, x = AttentionBlock(4, 2, STYLES[0]).double(), normal(2, 4, 3, 5)
    block.attention.num_heads = 2
    h = nn.functional.group_norm(x, 2, block.norm.weight, block.norm.bias)
    out = torch.empty_like(x)
    for b in range(2):
        qkv = torch.einsum("oc,chw->ohw", block.qkv.weight[:, :, 0, 0], h[b]) + block.qkv.bias[:, None, None]
        q, k, v = qkv.flatten(1).view(3, 2, 2, 15)
        heads = [v[n] @ torch.softmax(q[n].T @ k[n] / 2**0.5, -1).T for n in range(2)]
        out[b] = torch.einsum("oc,chw->ohw", block.out.weight[:, :, 0, 0], torch.cat(heads).view(4, 3, 5)) + block.out.bias[:, None, None]
    assert relative_error(block(x), x + out) < 1e-12


# First gradients


def test_every_parameter_takes_part():
    encoder, denoiser, x = tiny_encoder(), tiny_denoiser(attention=[4]), normal(2, 1, 8, 8)
    sum(head.square().sum() for head in encoder(x)).backward()
    denoiser(x, torch.tensor([0.2, 0.7], dtype=torch.float64)).square().sum().backward()
    for network in (encoder, denoiser):
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def test_denoiser_first_gradient():
    denoiser = tiny_denoiser(image_size=4, channels=[3, 4], groups=1)
    t = torch.tensor([0.4], dtype=torch.float64)
    assert gradcheck(lambda x_t: denoiser(x_t, t), normal(1, 1, 4, 4, grad=True))


# Second gradients


@pytest.mark.parametrize("attention", [[], [2]])
def test_log_q_is_differentiable_twice_in_the_image(attention):
    encoder = tiny_encoder(latent_size=2, image_size=4, channels=[3, 4], attention=attention, groups=1)
    z = normal(1, 2, seed=3, grad=True)
    x = normal(1, 1, 4, 4, grad=True)

    def log_q(x, z):
        return ops.gaussian_log_prob(z, *encoder(x))

    assert gradcheck(log_q, (x, z))
    assert gradgradcheck(log_q, (x, z))


def test_the_score_is_differentiable_in_latent_and_parameters():
    encoder = tiny_encoder(latent_size=2, image_size=4, channels=[3], attention=[2], groups=1)
    names, values = zip(*encoder.named_parameters(), strict=True)
    x_t, z = normal(2, 1, 4, 4), normal(2, 2, seed=3, grad=True)
    inner = [v.detach().clone().requires_grad_() for v in values]

    def grad_log_q(z, *weights):
        network = dict(zip(names, weights, strict=True))
        return score.reverse(lambda x: torch.func.functional_call(encoder, network, (x,)), x_t, z)

    assert gradcheck(grad_log_q, (z, *inner), fast_mode=True)


# Odd inputs


def test_bfloat16_autocast_keeps_the_heads_in_float32():
    encoder, denoiser = Encoder(1, 16, 4, [8, 8], 1, [4]), Denoiser(1, 16, [8, 8], attention=[8])
    nn.init.normal_(denoiser.out.weight, std=0.1)
    x = normal(2, 1, 16, 16, dtype=torch.float32)
    exact = encoder(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder.body(x).dtype == torch.bfloat16
        rounded = encoder(x)
        assert denoiser(x, torch.tensor([0.1, 0.5])).isfinite().all()
    for full, half in zip(exact, rounded, strict=True):
        assert half.dtype == torch.float32
        assert relative_error(half, full) < 0.05


@each_style
def test_non_contiguous_images(style):
    encoder, denoiser = tiny_encoder(style=style), tiny_denoiser(style=style)
    x, t = normal(2, 8, 8, 1).permute(0, 3, 1, 2), torch.tensor([0.3, 0.6], dtype=torch.float64)
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(encoder(x), encoder(x.contiguous()), strict=True))
    assert relative_error(denoiser(x, t), denoiser(x.contiguous(), t)) < 1e-12


# Error messages


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Encoder(1, 7, 4, [8, 8, 8]), r"image size 7 is below 8, which the encoder's 3 halvings need"),
        (lambda: Encoder(1, 16, 4, [8, 8], attention=[16]), r"attention 16: the encoder has no such resolution, its own are 8, 4"),
        (lambda: Denoiser(1, 16, [8, 8], attention=[4]), r"attention 4: the denoiser has no such resolution, its own are 16, 8"),
        (lambda: Denoiser(1, 3, [8, 8, 8]), r"image size 3 is below 4, which the denoiser's 2 halvings need"),
        (lambda: Encoder(1, 16, 4, [8], style="relu"), r"style: expected one of group_norm_silu, silu, bias_free_relu, found 'relu'"),
        *(
            (lambda value=value: Denoiser(1, 16, [8], skip_logsnr=value), r"skip_logsnr: expected a number or -inf, found ")
            for value in ("x", None, [1], True, math.nan, math.inf)
        ),
        (lambda: Denoiser(1, 16, [8], style="relu"), r"style: expected one of group_norm_silu, silu, bias_free_relu, found 'relu'"),
    ],
)
def test_wrong_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()
