"""weight ||eps - eps_hat||^2 + unconditional_weight ||eps - eps_pred||^2 per noisy sample."""

import pytest
import torch
from helpers import LaunchersOn, normal, on, positive, relative_error
from torch.autograd import gradcheck, gradgradcheck

from sami_fast.ops import guided_loss
from sami_fast.reference import noise_sample, random_normal
from sami_fast.reference.guided_loss import guided_loss as public
from sami_fast.reference.guided_loss import guided_loss_fwd

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ARGUMENTS = ("eps", "eps_pred", "grad_log_q", "sigma_t", "weight", "unconditional_weight")


def inputs(samples: int, *shape: int, dtype=torch.float64, grad=False) -> list[torch.Tensor]:
    images = [normal(samples, *shape, seed=seed, dtype=dtype, grad=grad) for seed in range(3)]
    return images + [positive(samples, low=0.1, high=3.0, seed=seed, dtype=dtype, grad=grad) for seed in range(3)]


def by_hand(eps, eps_pred, grad_log_q, sigma_t, weight, unconditional_weight):
    """One sample after the other, eps_hat written out."""
    loss, unguided = [], []
    for s in range(len(eps)):
        eps_hat = eps_pred[s] - sigma_t[s] * grad_log_q[s]
        unguided.append(((eps[s] - eps_pred[s]) ** 2).sum())
        loss.append(weight[s] * ((eps[s] - eps_hat) ** 2).sum() + unconditional_weight[s] * unguided[-1])
    return torch.stack(loss), torch.stack(unguided)


# Values

SHAPES = [(1, 1, 1, 1), (3, 1, 8, 8), (63, 3, 5, 7), (2, 1, 1, 1000)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values(shape, dtype):
    arguments = inputs(*shape, dtype=dtype)
    found, expected = guided_loss(*arguments), by_hand(*(a.double() for a in arguments))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        assert relative_error(a, b) < (1e-6 if dtype == torch.float32 else 1e-14)


def test_without_guidance_both_results_agree():
    arguments = inputs(4, 1, 3, 3)
    arguments[2] = torch.zeros_like(arguments[0])
    loss, unguided = guided_loss(*arguments)
    assert relative_error(loss, (arguments[4] + arguments[5]) * unguided) < 1e-14


def test_a_perfect_guided_estimate_costs_nothing():
    eps, _, grad_log_q, sigma_t, weight, _ = inputs(3, 1, 4, 4)
    eps_pred = eps + sigma_t[:, None, None, None] * grad_log_q
    loss, unguided = guided_loss(eps, eps_pred, grad_log_q, sigma_t, weight, torch.zeros(3, dtype=torch.float64))
    assert loss.max() < 1e-28
    assert unguided.min() > 0


# First gradients


def test_first_gradients():
    assert gradcheck(lambda *a: guided_loss(*a)[0], inputs(3, 2, 2, 3, grad=True))


def test_first_gradients_in_closed_form():
    arguments = inputs(5, 1, 3, 3, grad=True)
    eps, eps_pred, grad_log_q, sigma_t, weight, unconditional_weight = arguments
    cotangent = normal(5, seed=8)
    found = torch.autograd.grad(guided_loss(*arguments)[0], arguments, cotangent)
    c, s, w, u = (v.view(-1, 1, 1, 1) for v in (cotangent, sigma_t, weight, unconditional_weight))
    d = eps - eps_pred
    r = d + s * grad_log_q
    expected = (
        2 * c * (w * r + u * d),
        -2 * c * (w * r + u * d),
        2 * c * w * s * r,
        (2 * c * w * r * grad_log_q).flatten(1).sum(1),
        cotangent * (r * r).flatten(1).sum(1),
        cotangent * (d * d).flatten(1).sum(1),
    )
    for name, a, b in zip(ARGUMENTS, found, expected, strict=True):
        assert relative_error(a, b) < 1e-13, name


def test_unguided_is_a_measurement():
    _, unguided = guided_loss(*inputs(2, 1, 2, 2, grad=True))
    assert not unguided.requires_grad


# The twin of the launcher, in float64


@pytest.mark.parametrize("shape", SHAPES)
def test_twin_against_autograd(shape):
    arguments = inputs(*shape, grad=True)
    loss, unguided = public(*arguments)
    upstream = normal(shape[0], seed=8)
    expected = torch.autograd.grad(loss, arguments[1:3], upstream)
    found = guided_loss_fwd(*(a.detach() for a in arguments), None, 1, 0, 0, 0)
    assert torch.equal(found[0], loss)
    assert torch.equal(found[1], unguided)
    for cotangent, gradient in zip(found[2:], expected, strict=True):
        assert relative_error(upstream.view(-1, 1, 1, 1) * cotangent, gradient) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_twin_draws_the_noise_that_was_added(dtype):
    index = torch.tensor([4, 0, 2**33])
    alpha_t = torch.full((3, 2), 0.5)
    _, eps = noise_sample(normal(3, 3, 5, 7, dtype=dtype), alpha_t, alpha_t, index, seed=1, step=2, stream=5)
    _, *others = inputs(6, 3, 5, 7, dtype=dtype)
    stored, drawn = guided_loss_fwd(eps, *others, None, 1, 0, 0, 0), guided_loss_fwd(None, *others, index, 2, 1, 2, 5)
    assert all(torch.equal(a, b) for a, b in zip(stored, drawn, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_in_float32(dtype):
    halves = [a.to(dtype) for a in inputs(4, 3, 20, 20)[:3]] + inputs(4, 1)[3:]
    halves[3:] = [a.float() for a in halves[3:]]
    found, expected = public(*halves), public(*(a.double() for a in halves))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert relative_error(a, b) < 1e-6


# Kernels. Errors are relative to the largest value, against the float64 twin on the same numbers. In Triton's interpreter sums were seen to
# be 1.2e-7 off, cotangents 1.6e-7 in float32 and half a unit in the last place in float16, but a whole one in bfloat16, which it cuts off
# where a GPU rounds it; so it does with noise that it draws, and then everything shows that (1.5e-2).

SUMS = 4e-7
COTANGENTS = {torch.float32: 3e-7, torch.float16: 5e-4, torch.bfloat16: 2.1e-3 if DEVICE == "cuda" else 8e-3}
CUT_NOISE = 2e-2
CONTIGUOUS, LAST = torch.contiguous_format, torch.channels_last


@pytest.fixture(params=["cpp", "triton", "cuda"])
def kernels(request):
    return LaunchersOn("guided_loss", request.param)


def compare(kernels, eps, others, index=None, levels=1, *place, eps_stored=True):
    """Launcher against the float64 twin; returns what the launcher gave. `eps` is the noise, handed over only when `eps_stored`."""
    expected = guided_loss_fwd(eps.double(), *(a.double() for a in others), None, 1, 0, 0, 0)
    key = (None, 1, 0, 0, 0) if eps_stored else (index.to(DEVICE), levels, *place)
    found = kernels.guided_loss_fwd(eps.to(DEVICE) if eps_stored else None, *(a.to(DEVICE) for a in others), *key)
    dtype = others[0].dtype
    cut = CUT_NOISE if kernels.backend == "triton" and DEVICE == "cpu" and dtype == torch.bfloat16 and not eps_stored else 0.0
    for name, a, b in zip(("loss", "unguided", "grad_eps_pred", "grad_grad_log_q"), found, expected, strict=True):
        assert a.dtype == (torch.float32 if a.dim() == 1 else dtype), name
        assert relative_error(a.cpu(), b) <= max(cut, SUMS if a.dim() == 1 else COTANGENTS[dtype]), name
    return found


def device_inputs(samples, *shape, dtype=torch.float32, layouts=(CONTIGUOUS, CONTIGUOUS)):
    """eps_pred, grad_log_q in `dtype` and layout, the scalars in float32."""
    _, eps_pred, grad_log_q, *scalars = inputs(samples, *shape)
    images = [x.to(dtype).contiguous(memory_format=layout) for x, layout in zip((eps_pred, grad_log_q), layouts, strict=True)]
    return images + [x.float() for x in scalars]


@pytest.mark.parametrize(
    ("kernels", "dtype"), on(torch.float32, torch.float16, torch.bfloat16, backends=["cpp", "triton", "cuda"]), indirect=["kernels"]
)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 1, 8, 8), (4, 3, 5, 7), (2, 1, 1, 1000), (2, 3, 32, 16)])
@pytest.mark.parametrize("eps_stored", [True, False])
def test_kernels(kernels, shape, dtype, eps_stored):
    index = torch.tensor([5]) if shape[0] % 2 else torch.tensor([5, 2**32 + 1])
    levels = shape[0] // len(index)
    samples = (index[:, None] * levels + torch.arange(levels)).flatten()
    eps = random_normal(7, 8, 1, samples, shape[1] * shape[2] * shape[3]).to(dtype).view(shape)
    compare(kernels, eps, device_inputs(*shape, dtype=dtype), index, levels, 7, 8, 1, eps_stored=eps_stored)


@pytest.mark.parametrize("layouts", [(CONTIGUOUS, LAST), (LAST, CONTIGUOUS), (LAST, LAST)])
@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (2, 3, 5, 7), (2, 1, 8, 8), (2, 5, 2, 2), (1, 3, 32, 40)])
@pytest.mark.parametrize("eps_stored", [True, False])
def test_kernels_layouts(kernels, shape, layouts, eps_stored):
    index = torch.arange(3, 3 + shape[0])
    others = device_inputs(*shape, layouts=layouts)
    eps = random_normal(7, 8, 1, index, shape[1] * shape[2] * shape[3]).view(shape)
    found = compare(kernels, eps, others, index, 1, 7, 8, 1, eps_stored=eps_stored)
    if shape[2] * shape[3] % 4 == 0:  # quads of noise then lie in one channel each, and nothing is copied
        assert [x.stride() for x in found[2:]] == [x.stride() for x in others[:2]]


def test_kernels_other_layouts(kernels):
    """Slices, transposed and expanded tensors."""
    eps, eps_pred, grad_log_q, *scalars = (a.float() for a in inputs(4, 3, 8, 8))
    scalars = [a.repeat_interleave(2)[::2] for a in scalars]
    compare(
        kernels, eps.transpose(2, 3), [eps_pred[:, :, ::2].repeat(1, 1, 2, 1).transpose(2, 3), grad_log_q[:1].expand(4, 3, 8, 8), *scalars]
    )
    compare(kernels, eps[:, :, 1:, 2:5], [eps_pred[:, :, 1:, 2:5], grad_log_q[:, :, :7, :3], *scalars])
    compare(kernels, eps[::2, :2], [eps_pred[::2, :2], grad_log_q[1::2, 1:], *(a[::2] for a in scalars)])


def test_kernels_weights_from_nothing_to_huge(kernels):
    for weight, unconditional_weight in ((0.0, 0.0), (0.0, 1e9), (1e9, 0.0), (1e-9, 1e9), (1e9, 1e-9)):
        eps, eps_pred, grad_log_q, sigma_t, _, _ = (a.float() for a in inputs(3, 1, 5, 5))
        compare(kernels, eps, [eps_pred, grad_log_q, sigma_t, torch.full((3,), weight), torch.full((3,), unconditional_weight)])


def test_kernels_estimates_from_tiny_to_huge(kernels):
    for scale in (0.0, 1e-18, 1e15):
        eps, eps_pred, grad_log_q, *scalars = (a.float() for a in inputs(3, 1, 5, 5))
        compare(kernels, eps, [scale * eps_pred, grad_log_q, *scalars])
        compare(kernels, eps, [eps_pred, scale * grad_log_q, *scalars])


def test_kernels_a_nan_stays_in_its_sample(kernels):
    eps, *others = (a.float() for a in inputs(3, 1, 5, 5))
    clean = kernels.guided_loss_fwd(*(a.to(DEVICE) for a in (eps, *others)), None, 1, 0, 0, 0)
    others[0][1, 0, 4, 4] = float("nan")
    found = kernels.guided_loss_fwd(*(a.to(DEVICE) for a in (eps, *others)), None, 1, 0, 0, 0)
    for a, b in zip(found, clean, strict=True):
        assert a[1].isnan().any()
        assert torch.equal(a[::2], b[::2])


@pytest.mark.parametrize("eps_stored", [True, False])
def test_kernels_empty_batch(kernels, eps_stored):
    eps, *others = (a.float().to(DEVICE) for a in inputs(0, 3, 4, 4))
    index = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    found = kernels.guided_loss_fwd(eps if eps_stored else None, *others, index, 2, 0, 0, 0)
    assert [x.shape for x in found] == [(0,), (0,), (0, 3, 4, 4), (0, 3, 4, 4)]


def test_kernels_results_share_no_memory(kernels):
    found = kernels.guided_loss_fwd(*(a.float().to(DEVICE) for a in inputs(3, 3, 32, 32)), None, 1, 0, 0, 0)
    assert len({x.untyped_storage().data_ptr() for x in found}) == 4


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kernels", "dtype"), on(torch.float32, torch.float16, torch.bfloat16, backends=["triton", "cuda"]), indirect=["kernels"]
)
@pytest.mark.parametrize("layouts", [(CONTIGUOUS, CONTIGUOUS), (LAST, LAST), (LAST, CONTIGUOUS)])
@pytest.mark.parametrize("shape", [(64, 3, 64, 64), (32, 3, 63, 61)])
@pytest.mark.parametrize("eps_stored", [True, False])
def test_kernels_at_real_sizes(kernels, shape, layouts, dtype, eps_stored):
    index = torch.arange(shape[0] // 4) + 2**30
    samples = (index[:, None] * 4 + torch.arange(4)).flatten()
    eps = random_normal(7, 2**33, 0, samples, shape[1] * shape[2] * shape[3]).to(dtype).view(shape)
    others = device_inputs(*shape, dtype=dtype, layouts=layouts)
    first = compare(kernels, eps, others, index, 4, 7, 2**33, 0, eps_stored=eps_stored)
    arguments = [eps.to(DEVICE) if eps_stored else None, *(a.to(DEVICE) for a in others), index.to(DEVICE), 4, 7, 2**33, 0]
    second = kernels.guided_loss_fwd(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Second gradients


def test_second_gradients():
    assert gradgradcheck(lambda *a: guided_loss(*a)[0], inputs(2, 1, 2, 3, grad=True))


# Odd inputs


def test_empty_batch():
    arguments = inputs(0, 1, 4, 4, grad=True)
    loss, unguided = guided_loss(*arguments)
    assert loss.shape == unguided.shape == (0,)
    assert all(g.shape == a.shape for g, a in zip(torch.autograd.grad(loss.sum(), arguments), arguments, strict=True))


def test_non_contiguous_inputs():
    images = [normal(2, 3, 5, 4, seed=s).permute(0, 3, 1, 2) for s in range(3)]
    scalars = [positive(4, low=0.1, high=2.0, seed=s)[::2] for s in range(3)]
    found = guided_loss(*images, *scalars)
    expected = guided_loss(*(a.contiguous() for a in (*images, *scalars)))
    assert all(relative_error(a, b) < 1e-14 for a, b in zip(found, expected, strict=True))


def test_inputs_stay_as_they_came():
    arguments = inputs(2, 1, 3, 3)
    before = [a.clone() for a in arguments]
    guided_loss(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


# Error messages


@pytest.mark.parametrize(
    ("position", "shape", "message"),
    [
        (1, (2, 1, 4, 5), r"eps_pred: expected \[2, 1, 4, 4\], found \[2, 1, 4, 5\]"),
        (2, (1, 1, 4, 4), r"grad_log_q: expected \[2, 1, 4, 4\], found \[1, 1, 4, 4\]"),
        (3, (1,), r"sigma_t: expected \[2\], found \[1\]"),
        (4, (2, 1), r"weight: expected \[2\], found \[2, 1\]"),
        (5, (), r"unconditional_weight: expected \[2\], found \[\]"),
    ],
)
def test_wrong_shapes(position, shape, message):
    arguments = inputs(2, 1, 4, 4)
    arguments[position] = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match="^" + message):
        guided_loss(*arguments)
