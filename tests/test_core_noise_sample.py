"""The noising of every backend against its twin, bit for bit."""

import pytest
import torch
from helpers import LaunchersOn, normal, on

from sami_fast.ops.backend import BACKENDS
from sami_fast.reference.noise_sample import noise_sample_fwd

SHAPES = [(1, 1, 1, 1, 1), (3, 1, 1, 8, 8), (2, 3, 3, 5, 7), (5, 2, 1, 16, 16), (2, 4, 3, 33, 31), (1, 2, 8, 25, 41)]  # B, K, C, H, W
PLACE = (2**40 + 3, 2**33, 5)
# In the interpreter Triton cuts bfloat16 off instead of rounding it: test_noise_sample.py
ON = on(torch.float32, torch.float64, torch.float16, torch.bfloat16, backends=["reference", "cpp", "cuda"]) + on(
    torch.float32, torch.float16, backends=["triton"]
)


@pytest.fixture(params=BACKENDS)
def core(request):
    return LaunchersOn("noise_sample", request.param)


def inputs(batch, levels, *shape, dtype=torch.float32):
    angle = normal(batch, levels, seed=9, dtype=dtype)
    return normal(batch, *shape, dtype=dtype), angle.cos().abs(), angle.sin().abs(), torch.arange(batch) * 2**32 + 1


def compare(core, arguments, place=PLACE):
    expected = noise_sample_fwd(*arguments, *place, True)
    found = core.noise_sample_fwd(*arguments, *place, True)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.is_contiguous()
        assert torch.equal(a, b)
    return found


# Values


@pytest.mark.parametrize(("core", "dtype"), ON, indirect=["core"])
@pytest.mark.parametrize("shape", SHAPES)
def test_noisy_images(core, shape, dtype):
    compare(core, inputs(*shape, dtype=dtype))


@pytest.mark.parametrize(("core", "dtype"), ON, indirect=["core"])
def test_noise_that_is_not_stored(core, dtype):
    arguments = inputs(3, 2, 1, 9, 9, dtype=dtype)
    x_t, eps = core.noise_sample_fwd(*arguments, *PLACE, False)
    assert torch.equal(x_t, core.noise_sample_fwd(*arguments, *PLACE, True)[0])
    assert eps is None or eps.numel() == 0  # in the twin, or in the compiled core


@pytest.mark.parametrize(("core", "dtype"), ON, indirect=["core"])
@pytest.mark.parametrize("other", [torch.float16, torch.float32, torch.float64])
def test_amplitudes_of_another_dtype(core, dtype, other):
    x_0, alpha_t, sigma_t, index = inputs(3, 2, 1, 6, 6, dtype=dtype)
    compare(core, [x_0, alpha_t.to(other), sigma_t.to(other), index])


@pytest.mark.gpu
@pytest.mark.parametrize(("core", "dtype"), on(torch.float32, torch.float16, torch.bfloat16, backends=["cuda"]), indirect=["core"])
def test_real_sizes(core, dtype):
    compare(core, inputs(64, 2, 3, 64, 64, dtype=dtype))


# Odd inputs


@pytest.mark.parametrize(("core", "dtype"), ON, indirect=["core"])
def test_strided_and_misaligned_inputs(core, dtype):
    x_0, alpha_t, sigma_t, index = inputs(4, 3, 3, 8, 6, dtype=dtype)
    before = [a.clone() for a in (x_0, alpha_t, sigma_t, index)]
    compare(core, [x_0.transpose(2, 3), alpha_t, sigma_t, index])
    compare(core, [x_0.contiguous(memory_format=torch.channels_last), alpha_t.t().contiguous().t(), sigma_t, index])
    compare(core, [x_0[1:, 1:, 1:, 1:], alpha_t[1:], sigma_t[1:], index[1:]])
    compare(core, [x_0[::2], alpha_t[::2, 1:], sigma_t[::2, 1:], index[::2]])
    compare(core, [x_0[:1].expand(4, 3, 8, 6), alpha_t, sigma_t, index])
    shifted = torch.cat((x_0.flatten()[:1], x_0.flatten()))[1:].view(x_0.shape)
    compare(core, [shifted, alpha_t, sigma_t, index])
    assert all(torch.equal(a, b) for a, b in zip((x_0, alpha_t, sigma_t, index), before, strict=True))


@pytest.mark.parametrize("shape", [(0, 2, 1, 4, 4), (2, 0, 1, 4, 4), (2, 2, 1, 0, 4)])
def test_nothing(core, shape):
    batch, levels, *image = shape
    x_t, eps = core.noise_sample_fwd(*inputs(*shape), *PLACE, True)
    assert x_t.shape == eps.shape == (batch * levels, *image)


@pytest.mark.parametrize("core", ["cpp"], indirect=True)
def test_number_of_threads(core):
    for shape in ((1, 1, 3, 64, 64), (40, 2, 1, 4, 4)):
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(compare(core, inputs(*shape)))
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


# Error messages


@pytest.mark.parametrize("core", ["cpp", "cuda"], indirect=True)
def test_errors(core):
    x_0, alpha_t, sigma_t, index = inputs(3, 2, 1, 4, 4)
    wrong = [
        (x_0[0], alpha_t, sigma_t, index),
        (x_0, alpha_t[:2], sigma_t, index),
        (x_0, alpha_t, sigma_t[:, :1], index),
        (x_0, alpha_t, sigma_t, index[:2]),
        (x_0, alpha_t, sigma_t, index.int()),
    ]
    for arguments in wrong:
        with pytest.raises(RuntimeError, match="noise_sample: expected"):
            core.noise_sample_fwd(*arguments, *PLACE, True)
    wrong = torch.float16 if core.backend == "cpp" else torch.float64
    with pytest.raises(RuntimeError, match="expected float32"):
        core.noise_sample_fwd(x_0.to(wrong), alpha_t, sigma_t, index, *PLACE, True)
