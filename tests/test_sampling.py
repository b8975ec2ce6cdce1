"""The reverse process: exact Gaussians, guidance, what a picture depends on, the functions built on it, errors."""

import math

import pytest
import torch
from torch import nn

from sami_fast.images import GAP, image_grid
from sami_fast.sami import Sami
from sami_fast.sampling import axis_values, ddim, encode, posterior_latents, prior_latents, reconstruct, sample, starting_noise, traverse
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
    x_0 = ddim(exact.sami, noise(4000), num_steps=400, eta=eta, clip_x_0=False, batch_size=4000).flatten(1)
    assert torch.allclose(x_0.mean(0), torch.full((4,), exact.mean, dtype=torch.float64), atol=0.03)
    # first-order steps lose a little variance, the more the larger eta: 2 to 3 % of the standard deviation at eta 2
    assert torch.allclose(x_0.std(0), torch.full((4,), exact.std, dtype=torch.float64), rtol=0.05)


def test_without_fresh_noise_the_map_is_the_probability_flow():
    """For Gaussian data that flow keeps every pixel's quantile: x_0 = mean + std (x_T - alpha_T mean) / std_T."""
    exact, x_T = ExactGaussian(), noise(5)
    x_0 = ddim(exact.sami, x_T, num_steps=2000, eta=0.0, clip_x_0=False)
    alpha_T, sigma_T = alpha_sigma(torch.tensor(-9.0, dtype=torch.float64))
    quantile = (x_T - alpha_T * exact.mean) / (alpha_T**2 * exact.std**2 + sigma_T**2).sqrt()
    assert torch.allclose(x_0, exact.mean + exact.std * quantile, atol=0.01)


@pytest.mark.parametrize("eta", [0.0, 2.0])
def test_exact_guidance_gives_the_posterior(eta):
    exact, z = ExactGaussian(), torch.tensor([0.9, -0.4], dtype=torch.float64)
    x_0 = ddim(exact.sami, noise(4000), z.expand(4000, 2), num_steps=400, eta=eta, guidance_clip=None, clip_x_0=False, batch_size=4000)
    mean, std = exact.posterior(z)
    assert torch.allclose(x_0.flatten(1).mean(0), mean, atol=0.03)
    assert torch.allclose(x_0.flatten(1).std(0), std, rtol=0.06)
    unguided = ddim(exact.sami, noise(4000), z.expand(4000, 2), num_steps=50, eta=eta, guidance_scale=0.0, clip_x_0=False, batch_size=4000)
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


def test_axis_values():
    mu = torch.stack((torch.linspace(-5, 5, 101), torch.zeros(101)), 1)
    assert torch.allclose(axis_values(mu, 0, 3), torch.tensor([-4.9, 0.0, 4.9]))
    assert torch.equal(axis_values(mu, 1, 2), torch.zeros(2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: ddim(s, torch.zeros(1, 3, 8, 8)), r"x_T: expected \[B, 1, 8, 8\], found \[1, 3, 8, 8\]"),
        (lambda s: ddim(s, torch.zeros(2, 1, 8, 8), torch.zeros(1, 3)), r"z: expected \[2, Z\], found \[1, 3\]"),
        (lambda s: ddim(s, torch.zeros(2, 1, 8, 8), index=torch.zeros(3)), r"index: expected \[2\], found \[3\]"),
        (lambda s: sample(s, 1, seed=0, num_steps=0), "num_steps: expected at least 1, found 0"),
        (lambda s: sample(s, 1, seed=0, eta=-0.5), "eta: expected at least 0, found -0.5"),
        (lambda s: sample(s, 1, seed=0, eta=math.nan), "eta: expected at least 0, found nan"),
        (lambda s: sample(s, 1, seed=0, batch_size=0), "batch_size: expected at least 1, found 0"),
        (lambda s: encode(s, torch.zeros(2, 1, 4, 4)), r"x_0: expected \[N, 1, 8, 8\], found \[2, 1, 4, 4\]"),
        (lambda s: traverse(s, torch.zeros(2, 3), 0, [0.0], seed=0), "start: expected one image or latent, found 2"),
        (lambda s: traverse(s, torch.zeros(1, 3), 3, [0.0], seed=0), "axis: expected 0 to 2, found 3"),
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
