"""The reverse process: exact Gaussians, guidance, what a picture depends on, the functions built on it, errors."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from sami_fast.errors import UserError
from sami_fast.latents.axes import Axes
from sami_fast.latents.images import GAP, image_grid
from sami_fast.latents.sampling import (
    RANGE_IMAGES,
    axis_values,
    edit,
    encode,
    interpolate,
    invert,
    posterior_latents,
    prior_latents,
    range_rows,
    reconstruct,
    resolve_eta,
    reverse_process,
    sample,
    slerp,
    starting_noise,
    traverse,
)
from sami_fast.methods.baselines import DiffAE
from sami_fast.methods.sami import Sami
from sami_fast.schedule import SCHEDULES, alpha_sigma


@pytest.fixture
def sami() -> Sami:
    """8x8 images, 3 latents, random networks whose outputs are not zero."""
    torch.manual_seed(0)
    image = {"image_channels": 1, "image_size": 8}
    architecture = {
        "encoder": image | {"latent_size": 3, "channels": [8, 8]},
        "denoiser": image | {"channels": [4, 8], "embedding_size": 8},
    }
    sami = Sami.build(architecture, {"kind": "cosine", "logsnr_min": -7.0, "logsnr_max": 5.0})
    nn.init.normal_(sami.denoiser.out.weight, std=0.1)
    nn.init.normal_(sami.encoder.mu.weight, std=0.2)
    return sami.eval()


class ExactGaussian:
    """Pixels N(mean, std^2) and z = A x_0 + noise_std n with orthonormal rows A: both networks in closed form, float64.

    An exact q(z|x_t) depends on the noise level, which encoders are not told: this one remembers the level the denoiser saw last.
    """

    mean, std, noise_std = 0.3, 0.5, 0.1

    def __init__(self, schedule_kind: str = "uniform_logsnr") -> None:
        self.A = torch.linalg.qr(torch.randn(4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0].T
        self.schedule = SCHEDULES[schedule_kind](-9.0, 9.0)
        self.alpha_t = self.sigma_t = torch.tensor(0.0)
        owner = self

        class ExactEncoder(nn.Module):
            image_shape = (1, 2, 2)

            def forward(self, x_t):
                return owner.q(x_t)

        self.sami = Sami(ExactEncoder(), self.eps, self.schedule)

    def _x_0(self, x_t):
        gain = self.alpha_t * self.std**2 / (self.alpha_t**2 * self.std**2 + self.sigma_t**2)
        return self.mean + gain * (x_t - self.alpha_t * self.mean)

    def eps(self, x_t, t):
        self.alpha_t, self.sigma_t = alpha_sigma(self.schedule.logsnr(t[0]))
        return (x_t - self.alpha_t * self._x_0(x_t)) / self.sigma_t

    def q(self, x_t):
        x_0_var = self.std**2 * self.sigma_t**2 / (self.alpha_t**2 * self.std**2 + self.sigma_t**2)
        mu = self._x_0(x_t).flatten(1) @ self.A.T
        return mu, torch.full_like(mu, 1.0) * (x_0_var + self.noise_std**2)

    def posterior(self, z):
        """Mean and standard deviation of the pixels given z. [4], [4]."""
        gain = self.std**2 / (self.std**2 + self.noise_std**2)
        mean = self.mean + gain * self.A.T @ (z - self.A @ torch.full((4,), self.mean, dtype=torch.float64))
        return mean, (self.std**2 * (1 - gain * (self.A.T @ self.A).diagonal())).sqrt()


def noise(count: int) -> torch.Tensor:
    return torch.randn(count, 1, 2, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["uniform_logsnr", "cosine"])
@pytest.mark.parametrize("eta", [0.0, 1.0, 2.0])
def test_an_exact_denoiser_gives_the_data(eta, kind):
    exact = ExactGaussian(kind)
    x_0 = reverse_process(exact.sami, noise(4000), num_steps=400, eta=eta, clip_x_0=False, batch_size=4000).flatten(1)
    assert torch.allclose(x_0.mean(0), torch.full((4,), exact.mean, dtype=torch.float64), atol=0.03)
    # first-order steps lose a little variance, the more the larger eta: 2 to 3 % of the standard deviation at eta 2
    assert torch.allclose(x_0.std(0), torch.full((4,), exact.std, dtype=torch.float64), rtol=0.05)


def test_without_fresh_noise_the_map_is_the_probability_flow():
    """For Gaussian data that flow keeps every pixel's quantile: x_0 = mean + std (x_T - alpha_T mean) / std_T."""
    exact, x_T = ExactGaussian(), noise(5)
    x_0 = reverse_process(exact.sami, x_T, num_steps=2000, eta=0.0, clip_x_0=False)
    alpha_T, sigma_T = alpha_sigma(torch.tensor(-9.0, dtype=torch.float64))
    quantile = (x_T - alpha_T * exact.mean) / (alpha_T**2 * exact.std**2 + sigma_T**2).sqrt()
    assert torch.allclose(x_0, exact.mean + exact.std * quantile, atol=0.01)


def flow_error(exact, num_steps, **options):
    """Distance from the last estimate along the probability flow, E[x_0 | x_t] where that flow ends."""
    x_T = noise(5)
    found = reverse_process(exact.sami, x_T, num_steps=num_steps, clip_x_0=False, **options)
    (alpha_T, sigma_T), (alpha_0, sigma_0) = (alpha_sigma(torch.tensor(end, dtype=torch.float64)) for end in (-9.0, 9.0))
    quantile = (x_T - alpha_T * exact.mean) / (alpha_T**2 * exact.std**2 + sigma_T**2).sqrt()
    exact.alpha_t, exact.sigma_t = alpha_0, sigma_0
    x_t = alpha_0 * exact.mean + (alpha_0**2 * exact.std**2 + sigma_0**2).sqrt() * quantile
    return (found - exact._x_0(x_t)).abs().max().item()


@pytest.mark.parametrize("kind", ["uniform_logsnr", "cosine", "linear_beta"])
def test_dpm2m_is_of_second_order(kind):
    exact = ExactGaussian(kind)
    errors = {solver: [flow_error(exact, n, solver=solver, eta=0.0) for n in (101, 201, 401)] for solver in ("ddim", "dpm2m")}
    for solver, order in (("ddim", 2.0), ("dpm2m", 4.0)):  # the step halves: 100, 200, 400 steps between the levels
        for coarse, fine in pairwise(errors[solver]):
            assert coarse / fine == pytest.approx(order, rel=0.05), (solver, errors[solver])
    assert all(second < 0.2 * first for first, second in zip(errors["ddim"], errors["dpm2m"], strict=True))


def test_dpm2m_is_deterministic_and_batch_independent(sami):
    z = prior_latents(sami, 5, 0)
    together = reverse_process(sami, starting_noise(sami, 5, 0), z, solver="dpm2m", num_steps=6, seed=1)
    assert torch.allclose(
        together, reverse_process(sami, starting_noise(sami, 5, 0), z, solver="dpm2m", num_steps=6, seed=2, batch_size=2), atol=1e-5
    )
    assert together.abs().max() <= 1
    assert not torch.allclose(together, reverse_process(sami, starting_noise(sami, 5, 0), z, eta=0.0, num_steps=6), atol=1e-3)
    x_T = starting_noise(sami, 5, 0)  # with one level before, nothing to carry on
    assert torch.allclose(*(reverse_process(sami, x_T, num_steps=2, **kind) for kind in ({"solver": "dpm2m"}, {"eta": 0.0})), atol=1e-4)


def test_ancestral_is_eta_1(sami):
    z = prior_latents(sami, 2, 0)
    assert torch.equal(sample(sami, 2, seed=0, z=z, num_steps=5, solver="ancestral"), sample(sami, 2, seed=0, z=z, num_steps=5, eta=1.0))


def test_resolve_eta():
    assert [resolve_eta("ddim", None, default=default) for default in (2.0, 1.0)] == [2.0, 1.0]
    assert [resolve_eta(solver, None, default=2.0) for solver in ("ancestral", "dpm2m")] == [1.0, 0.0]
    assert [resolve_eta(solver, None, default=2.0, x_T="inverted") for solver in ("ddim", "dpm2m")] == [0.0, 0.0]
    assert resolve_eta("ddim", 0.5, default=2.0) == 0.5
    assert (Sami.guided_eta, DiffAE.guided_eta) == (2.0, 0.0)


# There and back: inversion


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("kind", ["uniform_logsnr", "cosine"])
def test_inversion_comes_back_the_closer_the_more_steps(kind, guided):
    exact = ExactGaussian(kind)
    x_0 = exact.mean + exact.std * noise(4)
    z = x_0.flatten(1) @ exact.A.T if guided else None
    errors = []
    for num_steps in (50, 100, 200):
        options = {"num_steps": num_steps, "guidance_clip": None, "clip_x_0": False}
        x_T = invert(exact.sami, x_0, z, **options)
        errors.append((reverse_process(exact.sami, x_T, z, eta=0.0, **options) - x_0).abs().max().item())
    assert errors[-1] < 2e-3
    assert all(coarse / fine > 3 for coarse, fine in pairwise(errors)), errors  # second order: 4


def test_inverted_noise_is_that_of_the_probability_flow():
    exact = ExactGaussian()
    x_0 = exact.mean + exact.std * noise(4)
    x_T = invert(exact.sami, x_0, num_steps=2000, clip_x_0=False)
    alpha_T, sigma_T = alpha_sigma(torch.tensor(-9.0, dtype=torch.float64))
    expected = alpha_T * exact.mean + (alpha_T**2 * exact.std**2 + sigma_T**2).sqrt() * (x_0 - exact.mean) / exact.std
    assert torch.allclose(x_T, expected, atol=0.01)


def test_inversion_of_networks(sami):
    sami.double()  # with guidance the way back is unstable, and rounding would grow
    x_0 = starting_noise(sami, 5, 5).clamp(-0.9, 0.9).double()
    x_T = invert(sami, x_0, num_steps=20)
    assert torch.allclose(x_T, invert(sami, x_0, num_steps=20, batch_size=2), atol=1e-4)
    assert not x_T.requires_grad
    z = encode(sami, x_0).mu
    guided = invert(sami, x_0, z, num_steps=20)
    assert torch.allclose(guided, invert(sami, x_0, z, num_steps=20, batch_size=2), atol=1e-4)
    assert not torch.allclose(guided, x_T, atol=1e-3)
    errors = []
    for num_steps in (10, 40, 160):
        back = reverse_process(sami, invert(sami, x_0, num_steps=num_steps), num_steps=num_steps, eta=0.0)
        errors.append((back - x_0).square().mean().item())
    assert errors[2] < errors[1] < errors[0]  # of networks that know nothing of images: steep, so many steps
    assert errors[2] < 0.02


@pytest.mark.parametrize("eta", [0.0, 2.0])
def test_exact_guidance_gives_the_posterior(eta):
    exact, z = ExactGaussian(), torch.tensor([0.9, -0.4], dtype=torch.float64)
    x_0 = reverse_process(
        exact.sami, noise(4000), z.expand(4000, 2), num_steps=400, eta=eta, guidance_clip=None, clip_x_0=False, batch_size=4000
    )
    mean, std = exact.posterior(z)
    assert torch.allclose(x_0.flatten(1).mean(0), mean, atol=0.03)
    assert torch.allclose(x_0.flatten(1).std(0), std, rtol=0.06)
    unguided = reverse_process(
        exact.sami, noise(4000), z.expand(4000, 2), num_steps=50, eta=eta, guidance_scale=0.0, clip_x_0=False, batch_size=4000
    )
    assert torch.allclose(unguided.flatten(1).mean(0), torch.full((4,), exact.mean, dtype=torch.float64), atol=0.03)


def test_clip_bounds_the_guidance(sami):
    x_t, t = starting_noise(sami, 4, seed=0), torch.full((4,), 0.3)
    with torch.no_grad():
        mu, var = sami.encoder(x_t)
        near, edge, far = (mu + distance * var.sqrt() for distance in (3.0, 4.0, 1e6))
        free = sami.predict_eps(x_t, t)
        assert torch.equal(sami.predict_eps(x_t, t, near, clip=4.0), sami.predict_eps(x_t, t, near))
        at_edge = sami.predict_eps(x_t, t, edge)
        assert torch.allclose(sami.predict_eps(x_t, t, far, clip=4.0), at_edge, atol=1e-5)
        assert (sami.predict_eps(x_t, t, far) - free).abs().max() > 1e4 * (at_edge - free).abs().max()


def test_a_latent_far_off_gives_an_image_all_the_same(sami):
    z = torch.tensor([[1e6, 0.0, -1e6]])
    images = sample(sami, 1, seed=0, z=z, num_steps=20)
    assert images.isfinite().all()
    assert images.abs().max() <= 1


@pytest.mark.parametrize("z", ["prior", None])
def test_a_picture_depends_on_seed_and_index_alone(sami, z):
    together = sample(sami, 7, seed=3, z=z, num_steps=6, batch_size=7)
    assert torch.equal(together, sample(sami, 7, seed=3, z=z, num_steps=6, batch_size=7))
    assert torch.allclose(together, sample(sami, 7, seed=3, z=z, num_steps=6, batch_size=2), atol=1e-4)
    apart = torch.cat([sample(sami, count, seed=3, z=z, first=first, num_steps=6) for first, count in ((0, 3), (3, 4))])
    assert torch.allclose(together, apart, atol=1e-4)
    assert not torch.allclose(together, sample(sami, 7, seed=4, z=z, num_steps=6), atol=0.1)
    assert not torch.allclose(together[0], together[1], atol=0.1)


def test_noise_and_latents_by_index(sami):
    assert torch.equal(starting_noise(sami, 5, 1)[2:], starting_noise(sami, 3, 1, first=2))
    assert torch.equal(prior_latents(sami, 5, 1)[2:], prior_latents(sami, 3, 1, first=2))
    many = starting_noise(sami, 500, 0)
    assert abs(many.mean()) < 0.02
    assert abs(many.std() - 1) < 0.02


def test_fresh_noise_is_not_the_starting_noise(sami):
    """With one level everything is x_T's; with more, eta changes the picture and its default depends on z."""
    z = prior_latents(sami, 2, 0)
    assert torch.equal(sample(sami, 2, seed=0, z=z, num_steps=1, eta=0.0), sample(sami, 2, seed=0, z=z, num_steps=1, eta=2.0))
    pictures = {eta: sample(sami, 2, seed=0, z=z, num_steps=5, eta=eta) for eta in (None, 0.0, 2.0)}
    assert torch.equal(pictures[None], pictures[2.0])
    assert not torch.allclose(pictures[0.0], pictures[2.0], atol=0.05)
    unguided = {eta: sample(sami, 2, seed=0, z=None, num_steps=5, eta=eta) for eta in (None, 1.0)}
    assert torch.equal(unguided[None], unguided[1.0])


def test_encode_and_posterior_latents(sami):
    x_0 = starting_noise(sami, 9, 5).clamp(-1, 1)
    posterior = encode(sami, x_0, batch_size=4)
    mu, var = sami.encoder(x_0)
    assert not posterior.mu.requires_grad
    assert torch.allclose(posterior.mu, mu, atol=1e-5)
    assert torch.allclose(posterior.var, var, atol=1e-5)
    z = posterior_latents(sami, x_0, seed=1)
    assert torch.allclose(z[4:], posterior_latents(sami, x_0[4:], seed=1, first=4), atol=1e-5)
    assert 0.5 < ((z - mu) / var.sqrt()).std() < 1.5


def test_reconstruct_is_sampling_from_the_mean(sami):
    x_0 = starting_noise(sami, 3, 5).clamp(-1, 1)
    found = reconstruct(sami, x_0, seed=2, num_steps=4)
    assert torch.equal(found, sample(sami, 3, seed=2, z=encode(sami, x_0).mu, num_steps=4))
    assert not found.requires_grad


def test_traverse_moves_one_dimension_and_no_noise(sami):
    x_0 = starting_noise(sami, 1, 5).clamp(-1, 1)
    z = encode(sami, x_0).mu
    strip = traverse(sami, x_0, 1, [-1.0, 0.5, 0.5, z[0, 1].item()], seed=2, first=7, num_steps=4)
    assert strip.shape == (4, 1, 8, 8)
    assert torch.allclose(strip[1], strip[2], atol=1e-6)
    assert not torch.allclose(strip[0], strip[1], atol=1e-3)
    assert torch.allclose(strip[3], reconstruct(sami, x_0, seed=2, first=7, num_steps=4)[0], atol=1e-4)
    assert torch.equal(strip, traverse(sami, z, 1, torch.tensor([-1.0, 0.5, 0.5, z[0, 1].item()]), seed=2, first=7, num_steps=4))


@pytest.fixture
def axes() -> Axes:
    """Two skew directions of three dimensions."""
    directions = np.array([[1.0, 0.5, 0.0], [0.0, 1.0, 1.0]])
    return Axes(("size", "tilt"), directions, np.linalg.pinv(directions).T, np.array([0.2, 0.0, -0.1]))


def test_traverse_along_directions(sami, axes):
    z, values = torch.tensor([[0.3, -0.2, 0.5]]), [-0.5, 0.7]
    options = {"seed": 2, "num_steps": 4}
    moved = [torch.from_numpy(axes.moved(z.numpy(), 1, value)).float() for value in values]
    expected = torch.cat([sample(sami, 1, z=each, **options) for each in moved])
    assert torch.allclose(traverse(sami, z, 1, values, axes=axes, **options), expected, atol=1e-5)
    along = traverse(sami, z, torch.tensor([0.0, 0.0, 2.0]), [-0.25, 0.35], **options)  # a unit of it is two of the dimension
    assert torch.allclose(along, traverse(sami, z, 2, values, **options), atol=1e-5)


def test_inverted_start_implies_no_fresh_noise(sami):
    x_0 = starting_noise(sami, 3, 5).clamp(-0.9, 0.9)
    z, x_T = encode(sami, x_0).mu, invert(sami, x_0, num_steps=6)
    found = reconstruct(sami, x_0, seed=1, x_T="inverted", num_steps=6)
    assert torch.allclose(found, reverse_process(sami, x_T, z, eta=0.0, num_steps=6), atol=1e-6)
    assert torch.equal(found, reconstruct(sami, x_0, seed=2, x_T="inverted", eta=0.0, num_steps=6))
    assert torch.allclose(found, reconstruct(sami, x_0, seed=1, x_T="inverted", num_steps=6, batch_size=2), atol=1e-4)
    second = reconstruct(sami, x_0, seed=1, x_T="inverted", num_steps=6, solver="dpm2m")
    assert torch.allclose(second, reverse_process(sami, x_T, z, solver="dpm2m", num_steps=6), atol=1e-6)
    strip = traverse(sami, x_0[:1], 1, [-1.0, z[0, 1].item()], seed=0, x_T="inverted", num_steps=6)
    # In a batch of another size another algorithm may do a convolution, and guidance lets its rounding grow; another start would show at 1.
    difference = (strip[1] - found[0]).abs().max().item()
    assert difference < 1e-3, difference


def test_a_denoiser_that_is_told_z_is_inverted_with_it():
    torch.manual_seed(0)
    image = {"image_channels": 1, "image_size": 8}
    networks = {
        "encoder": image | {"latent_size": 3, "channels": [8, 8]},
        "denoiser": image | {"channels": [4, 8], "embedding_size": 8, "latent_size": 3},
    }
    model = DiffAE.build(networks, {"kind": "cosine", "logsnr_min": -7.0, "logsnr_max": 5.0}).eval()
    nn.init.normal_(model.denoiser.out.weight, std=0.1)
    x_0 = starting_noise(model, 2, 5).clamp(-0.9, 0.9)
    z = encode(model, x_0).mu
    expected = reverse_process(model, invert(model, x_0, z, num_steps=20), z, eta=0.0, num_steps=20)
    found = reconstruct(model, x_0, seed=0, x_T="inverted", num_steps=20)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("x_T", ["inverted", "random"])
def test_edit_adds_to_one_coordinate(sami, axes, x_T):
    x_0 = starting_noise(sami, 3, 5).clamp(-0.9, 0.9)
    z, options = encode(sami, x_0).mu, {"seed": 2, "first": 4, "num_steps": 5, "x_T": x_T}
    images = edit(sami, x_0, 1, [0.0, -0.8], **options)
    assert images.shape == (3, 2, 1, 8, 8)
    assert torch.allclose(images[:, 0], reconstruct(sami, x_0, **options), atol=1e-4)
    for i in range(3):  # one image alone: the same noise, the same picture
        value = z[i, 1].item() - 0.8
        alone = traverse(sami, x_0[i : i + 1], 1, [value], **options | {"first": 4 + i})
        assert torch.allclose(images[i, 1], alone[0], atol=1e-4)
    assert torch.allclose(images, edit(sami, x_0, 1, torch.tensor([0.0, -0.8]), **options, batch_size=2), atol=1e-4)
    along = edit(sami, x_0, torch.tensor([1.0, 0.5, 0.0]), [0.6], **options)
    assert torch.allclose(along, edit(sami, x_0, 0, [0.6], axes=axes, **options), atol=1e-5)
    assert not torch.allclose(along, edit(sami, x_0, 0, [0.6], **options), atol=1e-4)


def test_interpolate(sami):
    x_0 = starting_noise(sami, 2, 5).clamp(-0.9, 0.9)
    a, b = x_0.split(1)
    images = interpolate(sami, a, b, 5, num_steps=6)
    assert images.shape == (5, 1, 8, 8)
    ends = reconstruct(sami, x_0, seed=0, x_T="inverted", num_steps=6)
    assert torch.allclose(images[[0, 4]], ends, atol=1e-4)
    assert torch.allclose(images, interpolate(sami, b, a, 5, num_steps=6, batch_size=2).flip(0), atol=1e-4)
    middle = reverse_process(
        sami, slerp(*invert(sami, x_0, num_steps=6), torch.tensor([0.5])), encode(sami, x_0).mu.mean(0)[None], eta=0.0, num_steps=6
    )
    assert torch.allclose(images[2], middle[0], atol=1e-4)
    options = {"seed": 3, "first": 2, "num_steps": 4}
    drawn = interpolate(sami, a, b, 3, x_T="random", **options)
    for image, z in ((drawn[0], encode(sami, a).mu), (drawn[1], encode(sami, x_0).mu.mean(0)[None])):
        assert torch.allclose(image, sample(sami, 1, z=z, **options)[0], atol=1e-4)  # fresh noise and x_T: those of picture 2


def test_slerp():
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    half = 2 * math.sqrt(0.5)
    assert torch.allclose(slerp(a, b, torch.tensor([0.0, 0.5, 1.0])), torch.tensor([[[2.0, 0.0]], [[half, half]], [[0.0, 2.0]]]))
    many = slerp(torch.randn(1000), torch.randn(1000), torch.linspace(0, 1, 7))
    assert (many.norm(dim=1) / math.sqrt(1000) - 1).abs().max() < 0.1  # a straight line's middle is at 0.71
    assert torch.allclose(slerp(a, a, torch.tensor([0.3])), a[None])
    assert torch.allclose(slerp(a, -a, torch.tensor([0.25])), 0.5 * a[None])
    assert torch.equal(slerp(a, 3 * a, torch.tensor([0.5])), 2 * a[None])


# Saved axes


def test_axes_move_and_read(axes, tmp_path):
    z = np.random.default_rng(0).standard_normal((5, 3))
    coordinates = axes.coordinates(z)
    assert coordinates.shape == (5, 2)
    assert axes.coordinates(axes.center[None]).tolist() == [[0.0, 0.0]]
    moved = axes.moved(z, 0, [0.5, 1.0, 1.5, 2.0, 2.5])
    np.testing.assert_allclose(axes.coordinates(moved)[:, 0], [0.5, 1.0, 1.5, 2.0, 2.5], atol=1e-12)
    np.testing.assert_allclose(axes.coordinates(moved)[:, 1], coordinates[:, 1], atol=1e-12)
    np.testing.assert_allclose(axes.coordinates(axes.shifted(z, 1, -2.0)), coordinates + np.array([0.0, -2.0]), atol=1e-12)
    axes.save(tmp_path / "axes.npz")
    again = Axes.load(tmp_path / "axes.npz")
    assert again.names == ("size", "tilt")
    for name in ("directions", "readouts", "center"):
        assert np.array_equal(getattr(again, name), getattr(axes, name))
    assert [path.name for path in tmp_path.iterdir()] == ["axes.npz"]
    Axes(("a", "b"), axes.directions.astype(np.float32), axes.readouts.astype(np.float32), axes.center)  # rounding is no error


def test_axes_of_one_kind():
    z = np.array([[1.0, 2.0, 3.0]])
    assert Axes.of_latents(3).coordinates(z).tolist() == z.tolist()
    assert Axes.of_latents(3).moved(z, 1, 7.0).tolist() == [[1.0, 7.0, 3.0]]
    assert Axes.along(np.array([0.0, 2.0, 0.0])).coordinates(z).tolist() == [[1.0]]


WRONG_AXES = {
    "readouts: expected shape \\[2, 3\\] beside directions of \\[2, 3\\], found \\[2, 2\\]": {"readouts": np.ones((2, 2))},
    "center: expected shape \\[3\\] beside directions of \\[2, 3\\], found \\[2\\]": {"center": np.zeros(2)},
    "names: expected shape \\[2\\] beside directions of \\[2, 3\\], found \\[1\\]": {"names": np.array(["one"])},
    "center: expected finite numbers": {"center": np.array([0.0, math.nan, 0.0])},
    "directions: expected finite numbers": {"directions": np.full((2, 3), math.inf)},
    "to be the identity, found it off by 1": {"readouts": np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 2.0]])},
}


@pytest.mark.parametrize("message", WRONG_AXES)
def test_axes_that_do_not_fit(message, tmp_path):
    arrays = {
        "names": np.array(["a", "b"]),
        "directions": np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]),
        "readouts": np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]),
        "center": np.zeros(3),
    } | WRONG_AXES[message]
    with pytest.raises(ValueError, match=message):
        Axes(**arrays)
    np.savez(tmp_path / "axes.npz", **arrays)
    with pytest.raises(UserError, match=f"axes.npz: not a file of axes \\(.*{message}"):
        Axes.load(tmp_path / "axes.npz")


def test_files_that_hold_no_axes(tmp_path):
    np.savez(tmp_path / "latents.npz", mu=np.zeros((2, 3)), names=np.array(["a"]))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("text")
    (tmp_path / "empty.npz").write_bytes(b"")
    np.savez(tmp_path / "pickle.npz", names=np.array([{}], dtype=object), directions=np.eye(1), readouts=np.eye(1), center=np.zeros(1))
    for name, message in (
        ("none.npz", "none.npz: no such file of axes"),
        ("latents.npz", "no entry 'center'; expected names, directions, readouts and center"),
        *((name, f"{name}: not a file of axes") for name in ("array.npy", "text.npz", "empty.npz", "pickle.npz")),
    ):
        with pytest.raises(UserError, match=message):
            Axes.load(tmp_path / name)


def test_axis_values():
    mu = torch.stack((torch.linspace(-5, 5, 101), torch.zeros(101)), 1)
    assert torch.allclose(axis_values(mu, 0, 3), torch.tensor([-4.75, 0.0, 4.75]))
    assert torch.equal(axis_values(mu, 1, 2), torch.zeros(2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: reverse_process(s, torch.zeros(1, 3, 8, 8)), r"x_T: expected \[B, 1, 8, 8\], found \[1, 3, 8, 8\]"),
        (lambda s: reverse_process(s, torch.zeros(2, 1, 8, 8), torch.zeros(1, 3)), r"z: expected \[2, Z\], found \[1, 3\]"),
        (lambda s: reverse_process(s, torch.zeros(2, 1, 8, 8), index=torch.zeros(3)), r"index: expected \[2\], found \[3\]"),
        (lambda s: sample(s, 1, seed=0, num_steps=0), "num_steps: expected at least 1, found 0"),
        (lambda s: sample(s, 1, seed=0, eta=-0.5), "eta: expected at least 0, found -0.5"),
        (lambda s: sample(s, 1, seed=0, eta=math.nan), "eta: expected at least 0, found nan"),
        (lambda s: sample(s, 1, seed=0, batch_size=0), "batch_size: expected at least 1, found 0"),
        (lambda s: encode(s, torch.zeros(2, 1, 4, 4)), r"x_0: expected \[N, 1, 8, 8\], found \[2, 1, 4, 4\]"),
        (lambda s: traverse(s, torch.zeros(2, 3), 0, [0.0], seed=0), "start: expected one image or latent, found 2"),
        (lambda s: traverse(s, torch.zeros(1, 3), 3, [0.0], seed=0), "axis: expected 0 to 2, found 3"),
        (lambda s: traverse(s, torch.zeros(1, 3), torch.ones(2), [0.0], seed=0), r"axis: expected a number or a direction \[3\]"),
        (lambda s: traverse(s, torch.zeros(1, 3), torch.zeros(3), [0.0], seed=0), "direction: expected a vector other than 0"),
        (lambda s: traverse(s, torch.zeros(1, 3), 0, [0.0], seed=0, axes=Axes.of_latents(2)), r"z: expected \[N, 2\], as the axes have"),
        (lambda s: traverse(s, torch.zeros(1, 3), 0, [0.0], seed=0, x_T="inverted"), r"start: expected an image \[1, C, H, W\] with x_T"),
        (lambda s: edit(s, torch.zeros(1, 1, 8, 8), 3, [0.0]), "axis: expected 0 to 2, found 3"),
        (lambda s: edit(s, torch.zeros(1, 1, 8, 8), 0, [0.0], eta=2.0), "eta: expected 0 or none with x_T inverted, found 2"),
        (lambda s: reconstruct(s, torch.zeros(1, 1, 8, 8), seed=0, x_T="inverted", solver="ancestral"), "solver: expected ddim or dpm2m"),
        (lambda s: reconstruct(s, torch.zeros(1, 1, 8, 8), seed=0, x_T="given"), "x_T: expected random, inverted, found 'given'"),
        (lambda s: sample(s, 1, seed=0, solver="heun"), "solver: expected ddim, ancestral, dpm2m, found 'heun'"),
        (lambda s: sample(s, 1, seed=0, solver="ancestral", eta=2.0), "eta: expected 1 or none with solver ancestral, found 2"),
        (lambda s: sample(s, 1, seed=0, solver="dpm2m", eta=1.0), "eta: expected 0 or none with solver dpm2m, found 1"),
        (lambda s: invert(s, torch.zeros(2, 3, 8, 8)), r"x_0: expected \[N, 1, 8, 8\], found \[2, 3, 8, 8\]"),
        (lambda s: invert(s, torch.zeros(2, 1, 8, 8), torch.zeros(1, 3)), r"z: expected \[2, Z\], found \[1, 3\]"),
        (lambda s: invert(s, torch.zeros(2, 1, 8, 8), num_steps=0), "num_steps: expected at least 1, found 0"),
        (lambda s: interpolate(s, torch.zeros(2, 1, 8, 8), torch.zeros(1, 1, 8, 8), 3), r"a: expected one image \[1, 1, 8, 8\]"),
        (lambda s: interpolate(s, torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), 1), "count: expected at least 2, found 1"),
        (lambda s: image_grid(torch.zeros(0, 1, 8, 8), 2), "images: expected"),
        (lambda s: image_grid(torch.zeros(1, 1, 8, 8), 0), "columns, scale: expected at least 1, found 0"),
    ],
)
def test_errors_say_what_was_expected(sami, call, message):
    with pytest.raises(ValueError, match=message):
        call(sami)


def test_image_grid_places_and_colours():
    images = torch.stack([torch.full((3, 2, 2), -1.0), torch.full((3, 2, 2), 0.0), torch.full((3, 2, 2), 5.0)])
    images[0, 0] = 1.0
    grid = image_grid(images, 2, scale=3)
    assert grid.shape == (2 * 6 + GAP, 2 * 6 + GAP, 3)
    assert grid.dtype.name == "uint8"
    assert grid[0, 0].tolist() == [255, 0, 0]
    assert grid[5, 6 + GAP].tolist() == [128, 128, 128]
    assert (grid[6 + GAP :] == 255).all()  # the third image is white, and the empty place is too
    assert (grid[:6, 6 : 6 + GAP] == 255).all()


@pytest.mark.parametrize(("channels", "colours"), [(1, 1), (2, 1), (3, 3), (4, 3)])
def test_image_grid_channels(channels, colours):
    images = torch.linspace(-1, 1, channels).view(1, channels, 1, 1).expand(1, channels, 100, 100)
    grid = image_grid(images, 1)
    assert grid.shape == (100, 100, 3)
    assert len(set(grid[0, 0].tolist())) == colours


def test_images_that_tell_a_range_lie_all_over_the_data():
    """Frames of videos come in their order: the first thousand of them are the first videos."""
    assert range_rows(3).tolist() == [0, 1, 2]
    rows = range_rows(6000)
    assert (len(rows), rows[0], rows[-1]) == (RANGE_IMAGES, 0, 5999)
    assert {*rows.diff().tolist()} == {6, 7}
