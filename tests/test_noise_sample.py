"""x_t = alpha_t x_0 + sigma_t eps with the generator inside."""

import pytest
import torch
from helpers import normal, relative_error
from sami_fast.kernels import noise_sample as kernels
from torch.autograd import gradcheck, gradgradcheck

from sami_fast.ops import Stream, noise_sample, random_normal
from sami_fast.reference.noise_sample import noise_sample_fwd

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLACE = {"seed": 3, "step": 5}
# Largest error of Triton's x_t relative to its largest value, against float32 arithmetic on the same noise; the interpreter cuts bfloat16
# off where a GPU rounds it, which moves eps and x_t by up to a unit in the last place each.
TRITON_ENVELOPE = {torch.float32: 0.0, torch.float16: 0.0, torch.bfloat16: 0.0 if DEVICE == "cuda" else 1.2e-2}


def amplitudes(batch: int, levels: int, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    angle = normal(batch, levels, seed=9, dtype=dtype)
    return angle.cos().abs(), angle.sin().abs()


# Values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("batch", "levels", "shape"), [(1, 1, (1, 1, 1)), (3, 1, (1, 8, 8)), (2, 3, (3, 5, 5)), (5, 4, (1, 9, 7)), (1, 2, (8, 5, 25))]
)
def test_every_noisy_image(batch, levels, shape, dtype):
    x_0, index = normal(batch, *shape, dtype=dtype), torch.arange(batch) * 7 + 2
    alpha_t, sigma_t = amplitudes(batch, levels, dtype)
    x_t, eps = noise_sample(x_0, alpha_t, sigma_t, index, **PLACE)
    assert x_t.shape == eps.shape == (batch * levels, *shape)
    assert x_t.dtype == eps.dtype == dtype
    for b in range(batch):
        for k in range(levels):
            sample = torch.tensor([index[b].item() * levels + k])
            noise = random_normal(3, 5, Stream.EPS, sample, x_0[b].numel()).to(dtype).view(shape)
            assert torch.equal(eps[b * levels + k], noise)
            assert relative_error(x_t[b * levels + k], alpha_t[b, k] * x_0[b] + sigma_t[b, k] * noise) < 2e-7


def test_noise_is_standard_normal_and_its_own_for_every_level():
    alpha_t, sigma_t = amplitudes(100, 3)
    _, eps = noise_sample(torch.zeros(100, 1, 16, 16, dtype=torch.float64), alpha_t, sigma_t, torch.arange(100), **PLACE)
    assert abs(eps.mean().item()) < 5 / eps.numel() ** 0.5
    assert abs(eps.var().item() - 1) < 5 * (2 / eps.numel()) ** 0.5
    levels = eps.view(100, 3, -1)
    assert abs((levels[:, 0] * levels[:, 1]).mean().item()) < 5 / levels[:, 0].numel() ** 0.5


def test_stream_seed_and_step_choose_the_noise():
    arguments = normal(2, 1, 4, 4), *amplitudes(2, 1), torch.arange(2)
    draws = [{"seed": 0, "step": 0}, {"seed": 1, "step": 0}, {"seed": 0, "step": 1}, {"seed": 0, "step": 0, "stream": Stream.INIT}]
    noises = [noise_sample(*arguments, **draw)[1] for draw in draws]
    assert torch.equal(noises[0], noise_sample(*arguments, seed=0, step=0, stream=Stream.EPS)[1])
    for noise in noises[1:]:
        assert not (noise == noises[0]).any()


@pytest.mark.parametrize("size", [3, 5, 8])  # 9 and 25 elements are not whole quads
def test_an_image_does_not_depend_on_its_company(size):
    x_0, index = normal(6, 1, size, size), torch.tensor([5, 0, 3, 2, 40, 1])
    alpha_t, sigma_t = amplitudes(6, 2)
    whole = noise_sample(x_0, alpha_t, sigma_t, index, **PLACE)
    parts = [noise_sample(x_0[p], alpha_t[p], sigma_t[p], index[p], **PLACE) for p in (slice(0, 1), slice(1, 4), slice(4, 6))]
    for together, split in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(together, torch.cat(split))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_makes_x_t_of_the_rounded_noise(dtype):
    x_0, index = normal(2, 3, 5, 7, dtype=dtype), torch.tensor([4, 1])
    alpha_t, sigma_t = amplitudes(2, 3, torch.float32)
    x_t, eps = noise_sample(x_0, alpha_t, sigma_t, index, **PLACE)
    assert x_t.dtype == eps.dtype == dtype
    alpha, sigma = (a.view(2, 3, 1, 1, 1) for a in (alpha_t, sigma_t))
    by_hand = alpha * x_0.float()[:, None] + sigma * eps.float().view(2, 3, 3, 5, 7)
    assert torch.equal(x_t, by_hand.flatten(0, 1).to(dtype))
    samples = (index[:, None] * 3 + torch.arange(3)).flatten()
    assert torch.equal(eps, random_normal(3, 5, Stream.EPS, samples, 105).to(dtype).view(6, 3, 5, 7))


# Triton


def on_device(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.to(DEVICE) for t in tensors]


def assert_same(x_0: torch.Tensor, alpha_t: torch.Tensor, sigma_t: torch.Tensor, index: torch.Tensor, *place: int) -> None:
    """Launcher against its twin, with the noise stored and without."""
    expected = noise_sample_fwd(x_0, alpha_t, sigma_t, index, *place, True)
    arguments = *on_device(x_0, alpha_t, sigma_t, index), *place
    found = kernels.noise_sample_fwd(*arguments, True)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == x_0.dtype
        assert a.is_contiguous()
        assert relative_error(a.cpu(), b) <= TRITON_ENVELOPE[x_0.dtype]
    x_t, nothing = kernels.noise_sample_fwd(*arguments, False)
    assert nothing is None
    assert torch.equal(x_t, found[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "levels", "shape"),
    [(1, 1, (1, 1, 1)), (3, 1, (1, 8, 8)), (2, 3, (3, 5, 5)), (2, 4, (1, 9, 7)), (1, 2, (8, 5, 25)), (2, 2, (3, 16, 16))],
)
def test_triton(batch, levels, shape, dtype):
    x_0, index = normal(batch, *shape, dtype=dtype), torch.arange(batch) * 7 + 2
    assert_same(x_0, *amplitudes(batch, levels, torch.float32), index, 3, 5, Stream.EPS)


def test_triton_large_counters_and_values():
    x_0 = normal(2, 1, 5, 6, dtype=torch.float32) * torch.tensor([1e30, 1e-30]).view(2, 1, 1, 1)
    index = torch.tensor([2**40 - 1, 2**33 + 5])
    assert_same(x_0, *amplitudes(2, 3, torch.float32), index, 2**64 - 1, 2**59 - 1, Stream.INIT)


def test_triton_non_contiguous_inputs():
    alpha_t, sigma_t = (a.t() for a in amplitudes(3, 2, torch.float32))
    index = torch.arange(6)[::3]
    assert_same(normal(2, 4, 5, 3, dtype=torch.float32).permute(0, 3, 1, 2), alpha_t, sigma_t, index, 0, 1, Stream.EPS)
    assert_same(normal(2, 1, 1, 5, dtype=torch.float32).expand(2, 3, 4, 5), alpha_t, sigma_t, index, 0, 1, Stream.EPS)


def test_triton_amplitudes_in_half_precision():
    alpha_t, sigma_t = amplitudes(2, 2, torch.float16)
    assert_same(normal(2, 1, 4, 4, dtype=torch.float16), alpha_t, sigma_t, torch.arange(2), 0, 1, Stream.EPS)


def test_triton_empty_batch():
    nothing = torch.zeros(0, 1, 4, 4, device=DEVICE)
    amplitude, index = torch.zeros(0, 3, device=DEVICE), torch.zeros(0, dtype=torch.int64, device=DEVICE)
    x_t, eps = kernels.noise_sample_fwd(nothing, amplitude, amplitude, index, 0, 0, 0, True)
    assert x_t.shape == eps.shape == (0, 1, 4, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("batch", "levels", "shape"), [(64, 4, (3, 64, 64)), (16, 3, (3, 63, 61)), (256, 1, (1, 64, 64))])
def test_triton_at_real_sizes(batch, levels, shape, dtype):
    arguments = normal(batch, *shape, dtype=dtype), *amplitudes(batch, levels, torch.float32), torch.arange(batch) + 2**31
    assert_same(*arguments, 11, 2**35, Stream.EPS)
    first, second = (kernels.noise_sample_fwd(*on_device(*arguments), 11, 2**35, Stream.EPS, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Gradients


def test_first_and_second_gradients():
    x_0 = normal(2, 1, 3, 2, grad=True)
    alpha_t, sigma_t = (a.clone().requires_grad_() for a in amplitudes(2, 3))
    index = torch.tensor([4, 1])
    assert gradcheck(lambda *a: noise_sample(*a, index, **PLACE), (x_0, alpha_t, sigma_t))
    assert gradgradcheck(lambda *a: noise_sample(*a, index, **PLACE)[0], (x_0, alpha_t, sigma_t))


# Odd inputs


def test_empty_batch():
    nothing = torch.zeros(0, 1, 4, 4)
    x_t, eps = noise_sample(nothing, torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), **PLACE)
    assert x_t.shape == eps.shape == (0, 1, 4, 4)


def test_non_contiguous_inputs():
    x_0, index = normal(2, 4, 5, 3).permute(0, 3, 1, 2), torch.arange(6)[::3]
    alpha_t, sigma_t = (a.t() for a in amplitudes(3, 2))
    found = noise_sample(x_0, alpha_t, sigma_t, index, **PLACE)
    expected = noise_sample(x_0.contiguous(), alpha_t.contiguous(), sigma_t.contiguous(), index.contiguous(), **PLACE)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# Error messages


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 4, 4), (2, 3), (2, 3), (2,)), r"x_0: expected \[B, C, H, W\], found \[2, 4, 4\]"),
        (((2, 1, 4, 4), (1, 3), (2, 3), (2,)), r"alpha_t: expected \[2, 3\], found \[1, 3\]"),
        (((2, 1, 4, 4), (3,), (2, 3), (2,)), r"alpha_t: expected \[B, K\], found \[3\]"),
        (((2, 1, 4, 4), (2, 3), (2, 4), (2,)), r"sigma_t: expected \[2, 3\], found \[2, 4\]"),
        (((2, 1, 4, 4), (2, 3), (2, 3), (3,)), r"index: expected \[2\], found \[3\]"),
    ],
)
def test_wrong_shapes(shapes, message):
    x_0, alpha_t, sigma_t, index = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        noise_sample(x_0, alpha_t, sigma_t, index.long(), **PLACE)
