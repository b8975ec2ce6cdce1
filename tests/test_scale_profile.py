"""Scale profiles of linear encoders on Gaussian data, where information, scale and calibration are known in closed form."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm

from sami_fast.methods.sami import Sami
from sami_fast.metrics.latents import kl_per_dim
from sami_fast.metrics.scale_profile import half_point, scale_profile
from sami_fast.schedule import SCHEDULES

N = 20_000
SHAPE = (1, 2, 3)
VARIANCES = np.array([1.0, 0.2, 0.05, 0.01])  # of the data along the four factors: two decades
LEVELS = np.arange(-8.0, 10.01, 0.5)


class Linear:
    """x = sum_i sqrt(VARIANCES_i) s_i u_i, and q(z_i|x) = N(gain_i u_i x, var_i), float64."""

    def __init__(self, gain: np.ndarray, var: np.ndarray) -> None:
        self.gain, self.var = gain, var
        self.u = torch.linalg.qr(torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
        s = torch.randn(N, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        self.x_0 = (s * torch.tensor(VARIANCES).sqrt() @ self.u.T).view(-1, *SHAPE)
        self.sami = Sami(self.encoder, lambda x_t, t: x_t, SCHEDULES["cosine"](-10.0, 12.0), image_shape=SHAPE, latent_size=len(gain))

    def encoder(self, x):
        mu = x.flatten(1) @ self.u * torch.tensor(self.gain)
        return mu, torch.tensor(self.var).expand_as(mu)

    def images(self, index):
        return self.x_0[index]

    def gap(self, logsnr):
        """E (mu_0 - mu_t)^2."""
        snr = np.exp(np.asarray(logsnr, dtype=float))[..., None]
        alpha_t = np.sqrt(snr / (1 + snr))
        return self.gain**2 * ((1 - alpha_t) ** 2 * VARIANCES + 1 / (1 + snr))

    def information(self, logsnr):
        clean = 0.5 * (self.gain**2 * VARIANCES + self.var - 1 - np.log(self.var))
        return clean - 0.5 * self.gap(logsnr) / self.var

    def profile(self, **changes):
        return scale_profile(self.sami, self.images, N, **{"logsnr": LEVELS, "seed": 3} | changes)


CASES = {
    # Means of unit variance: the scale follows the variance of the data.
    "equal precision": Linear(VARIANCES**-0.5, np.full(4, 0.1)),
    # The posterior of s_i given x_0 and a little white noise of variance 0.001: fine factors are also less certain.
    "clean posterior": Linear(VARIANCES**0.5 / (VARIANCES + 1e-3), 1e-3 / (VARIANCES + 1e-3)),
}


@pytest.fixture(params=CASES, scope="module")
def case(request):
    linear = CASES[request.param]
    return linear, linear.profile()


def test_information_is_the_analytic_value(case):
    linear, profile = case
    expected = linear.information(LEVELS)
    assert profile.information.shape == profile.information_error.shape == expected.shape == (len(LEVELS), 4)
    error = np.abs(profile.information - expected)
    assert (error < 4 * profile.information_error).all()  # 148 values, whose errors go together
    # The error is of the size it claims to be, and small where the profile is not yet far below 0.
    assert (error > 0.05 * profile.information_error).mean() > 0.8
    assert profile.information_error[expected > 0].max() < 0.05


def test_clean_information_is_the_mean_kl(case):
    linear, profile = case
    mu, var = linear.encoder(linear.x_0)
    np.testing.assert_allclose(profile.clean, kl_per_dim(mu.numpy(), var.numpy()), rtol=1e-12)
    assert (np.abs(profile.clean - linear.information(100.0)) < 4 * profile.clean_error).all()


def test_scales_are_where_half_is_left_and_in_the_order_of_the_factors(case):
    linear, profile = case
    for d, found in enumerate(profile.scale):
        clean = linear.information(100.0)[d]
        exact = brentq(lambda logsnr, d=d, clean=clean: linear.information(logsnr)[d] - clean / 2, -12, 14)
        assert found == pytest.approx(exact, abs=0.05)
    assert (np.diff(profile.scale) > 0.1).all()  # coarse factors are read at higher noise


def test_calibration_is_the_analytic_value(case):
    linear, profile = case
    std = np.sqrt(1 + linear.gap(LEVELS) / linear.var)
    np.testing.assert_array_less(np.abs(profile.calibration_mean), 4 * std / math.sqrt(N))
    np.testing.assert_allclose(profile.calibration_std, std, rtol=4 / math.sqrt(2 * N))
    grid = np.linspace(0, 6, 6001)[:, None, None]
    distance = np.abs(norm.cdf(grid / std) - norm.cdf(grid)).max(0)
    np.testing.assert_allclose(profile.calibration_distance, distance, atol=2 / math.sqrt(N))  # a chance of 0.07 % each


def test_error_is_the_spread_over_sets_of_images():
    linear, size = CASES["equal precision"], 400
    sets = [scale_profile(linear.sami, lambda i, k=k: linear.x_0[i + k * size], size, logsnr=[-1.0, 4.0], seed=k) for k in range(N // size)]
    spread = np.std([profile.information for profile in sets], axis=0, ddof=1)
    claimed = np.mean([profile.information_error for profile in sets], axis=0)
    np.testing.assert_allclose(spread, claimed, rtol=0.4)  # four times the error of a spread over 50 sets


def test_a_dead_dimension_has_no_scale():
    linear = Linear(np.array([1.0, 0.0, 0.1, 10.0]), np.array([0.1, 1.0, 0.99, 0.1]))
    profile = linear.profile()
    assert np.isnan(profile.scale).tolist() == [False, True, True, False]
    assert (profile.information[:, 1] == 0).all()
    assert profile.clean[1] == 0
    np.testing.assert_allclose(profile.calibration_std[:, 1], 1.0, rtol=4 / math.sqrt(2 * N))


def test_a_scale_outside_the_levels_is_not_made_up():
    assert np.isnan(CASES["equal precision"].profile(logsnr=[5.0, 6.0]).scale).tolist() == [True, True, False, True]
    assert np.isnan(CASES["equal precision"].profile(logsnr=[-8.0, -7.0]).scale).all()
    assert np.isnan(CASES["equal precision"].profile(logsnr=[3.0]).scale).all()


def test_profile_does_not_depend_on_the_batch_nor_on_the_other_levels():
    linear, seen = CASES["clean posterior"], []
    common = {"seed": 3, "logsnr": LEVELS}
    whole = scale_profile(linear.sami, linear.images, 50, **common)
    pieces = scale_profile(linear.sami, linear.images, 50, batch_size=7, progress=seen.append, **common)
    alone = scale_profile(linear.sami, linear.images, 50, seed=3, logsnr=LEVELS[[4]])
    for name in vars(whole):
        np.testing.assert_allclose(getattr(whole, name), getattr(pieces, name), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(alone.information, whole.information[[4]])
    assert sum(seen) == 50
    assert len(seen) == 8
    assert not np.allclose(scale_profile(linear.sami, linear.images, 50, logsnr=LEVELS, seed=4).information, whole.information)


# Half point


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 1.0, 2.0, 2.0], 1.0),
        ([0.0, 0.0, 0.5, 2.0], 2 + 1 / 3),
        ([-0.1, -50.0, 0.5, 2.0], 2 + 1 / 3),  # worse than nothing at high noise: how much worse does not matter
        ([0.0, 0.9, 0.7, 2.0], 2 + 1 / 6),  # a wobble below half is levelled to 0.8
        ([0.0, 1.3, 0.9, 2.0], 1 / 1.1),  # a wobble across half is levelled to 1.1
        ([0.0, 5.0, 1.0, 2.0], 1 / 1.5),  # cut to 2, then levelled to 1.5
        ([1.0, 1.5, 2.0, 2.0], math.nan),
        ([0.0, 0.1, 0.3, 0.9], math.nan),
    ],
)
def test_half_point_known_values(values, expected):
    assert half_point(np.arange(4.0), np.array(values), 2.0) == pytest.approx(expected, nan_ok=True)


def test_half_point_of_a_noisy_curve():
    logsnr = np.linspace(-8, 8, 65)
    generator = np.random.default_rng(0)
    found = [half_point(logsnr, 3 / (1 + np.exp(-logsnr + 1)) + 0.3 * generator.standard_normal(65), 3.0) for _ in range(200)]
    assert np.mean(found) == pytest.approx(1.0, abs=0.1)
    assert np.std(found) < 0.4


# Errors


@pytest.mark.parametrize("logsnr", [[], [1.0, 1.0], [2.0, 1.0], [[1.0]], [math.nan], [0.0, math.inf]])
def test_levels_that_are_none(logsnr):
    with pytest.raises(ValueError, match=r"logsnr: expected (increasing levels, \[L\]|finite numbers), found"):
        CASES["equal precision"].profile(logsnr=logsnr)


def test_one_image_is_too_few():
    linear = CASES["equal precision"]
    with pytest.raises(ValueError, match="count: expected at least 2 images, found 1"):
        scale_profile(linear.sami, linear.images, 1, logsnr=[0.0], seed=0)
