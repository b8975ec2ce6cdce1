"""Discovered axes of Gaussian data with factors of known scale: exact denoiser, exact draws, latents rotated on purpose."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.decomposition import PCA

from sami_fast.latents.axes import Axes
from sami_fast.latents.discovery import (
    default_levels,
    discover,
    generalized_axes,
    gradient_covariance,
    independent_axes,
    joint_axes,
    posterior_draws,
    principal_axes,
    shares,
    within_covariance,
)
from sami_fast.methods.sami import Sami
from sami_fast.metrics.identifiability import mcc
from sami_fast.metrics.scale_profile import half_point
from sami_fast.schedule import SCHEDULES, alpha_sigma

SHAPE = (1, 2, 3)
VARIANCES = np.array([10.0, 1.0, 0.1, 0.03])  # along the four factors: over two decades
LEVELS = np.array([-4.0, -2.0, 0.0, 2.0, 4.0])
LIVE = [0, 2, 3, 5]  # the other two of six latent dimensions are dead
FINE = 400  # steps over 18 nats of logsnr: from fewer steps, an error of 0.3 % is extrapolated at most
N = 2000


def orthogonal(size: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]


class Gaussian:
    """x = sum_i sqrt(VARIANCES_i) s_i u_i + a little white noise; mu = mix s in the dimensions LIVE. All exact, float64."""

    noise_var = 1e-6

    def __init__(self, mix: np.ndarray) -> None:
        self.u = torch.from_numpy(orthogonal(6, 1))
        self.variances = torch.tensor([*VARIANCES, 0.0, 0.0]) + self.noise_var
        generator = torch.Generator().manual_seed(2)
        s = torch.randn(N, 6, generator=generator, dtype=torch.float64)
        self.s = s[:, :4].numpy()
        self.x_0 = (s * self.variances.sqrt() @ self.u.T).view(-1, *SHAPE)
        self.read, self.var = torch.zeros(6, 6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
        self.read[LIVE] = torch.from_numpy(mix) @ (self.u[:, :4] / self.variances[:4].sqrt()).T
        self.var[LIVE] = 0.05
        self.schedule = SCHEDULES["uniform_logsnr"](-8.0, 10.0)
        self.sami = Sami(self.encoder, self.denoiser, self.schedule, image_shape=SHAPE, latent_size=len(self.var))

    def encoder(self, x):
        mu = x.flatten(1) @ self.read.T
        return mu, self.var.expand_as(mu)

    def denoiser(self, x_t, t):
        alpha_t, sigma_t = (v[:, None] for v in alpha_sigma(self.schedule.logsnr(t)))
        along = x_t.flatten(1) @ self.u
        return (sigma_t * along / (alpha_t**2 * self.variances + sigma_t**2) @ self.u.T).view_as(x_t)

    def images(self, index):
        return self.x_0[index]

    def draws(self, logsnr, draws=4, count=N, **changes):
        options = {"seed": 3, "num_steps": FINE, "clip_x_0": False, "batch_size": 8000}
        return posterior_draws(self.sami, self.images, count, logsnr, draws, **options | changes)

    def discover(self, **changes):
        options = {"logsnr": LEVELS, "draws": 4, "seed": 3, "num_steps": 100, "clip_x_0": False, "batch_size": 8000}
        return discover(self.sami, self.images, N, **options | changes)


def undecided(logsnr: float) -> np.ndarray:
    """Share of each factor's variance that x_t leaves open, less what the cleanest level of the schedule leaves open too."""
    return 1 / (1 + VARIANCES * np.exp(logsnr)) - 1 / (1 + VARIANCES * np.exp(10.0))


PLAIN, ROTATED = Gaussian(np.eye(4)), Gaussian(orthogonal(4, 5))


@pytest.fixture(scope="module")
def found():
    return ROTATED.discover()


# Draws


@pytest.mark.parametrize("logsnr", LEVELS)
def test_undecided_share_of_exact_draws(logsnr):
    drawn = PLAIN.draws(logsnr)[:, :, LIVE]
    within, exact = within_covariance(drawn), undecided(logsnr)
    error = math.sqrt(2 / (3 * N))  # relative, of a variance from N sets with 3 degrees of freedom each
    np.testing.assert_allclose(within.diagonal(), exact, rtol=4 * error + 0.003)
    correlation = within / np.sqrt(np.outer(within.diagonal(), within.diagonal()))
    assert np.abs(correlation - np.eye(4)).max() < 4 / math.sqrt(3 * N)
    # Draws are distributed as the data, and know of the image what x_t knows.
    every = drawn.reshape(-1, 4)
    np.testing.assert_allclose(every.var(0), 1.0, atol=4 * math.sqrt(2 / N))
    shared = (drawn.mean(1) * PLAIN.s).mean(0) / (PLAIN.s**2).mean(0)
    np.testing.assert_allclose(shared, 1 - undecided(logsnr), atol=4 * np.sqrt(1 / N))


def test_the_mean_of_the_draws_is_that_of_the_posterior():
    drawn, again = PLAIN.draws(0.0, draws=200, count=20, seed=3), PLAIN.draws(0.0, draws=2, count=20, seed=3)
    np.testing.assert_allclose(drawn[:, :2], again)  # a draw does not depend on how many there are
    spread = drawn[:, :, LIVE].std(1, ddof=1)
    np.testing.assert_allclose(spread.mean(0), np.sqrt(undecided(0.0)), rtol=0.06)


def test_few_steps_leave_too_little_undecided():
    """What the docstring of `posterior_draws` says of its corrector: 0.46 with 32 levels over 12 nats, and 0.50 in the limit."""
    gaussian = Gaussian(np.eye(4))
    gaussian.schedule = gaussian.sami.schedule = SCHEDULES["uniform_logsnr"](-7.0, 5.0)
    half = float(-np.log(VARIANCES[0]))  # where x_t decides half of the first factor
    within = within_covariance(gaussian.draws(half, num_steps=32, draws=8))[0, 0]
    assert within == pytest.approx(0.459, abs=4 * 0.46 * math.sqrt(2 / (7 * N)))
    fine = within_covariance(gaussian.draws(half, num_steps=300, draws=8))[0, 0]
    assert fine == pytest.approx(0.499, abs=4 * 0.5 * math.sqrt(2 / (7 * N)))


def test_draws_depend_on_seed_image_and_number_alone():
    common = {"num_steps": 10, "draws": 3}
    whole, seen = PLAIN.draws(0.0, count=12, **common), []
    assert whole.shape == (12, 3, 6)
    np.testing.assert_allclose(whole, PLAIN.draws(0.0, count=12, batch_size=5, progress=seen.append, **common), rtol=1e-9, atol=1e-9)
    assert seen == [1] * 12
    np.testing.assert_allclose(whole[:4], PLAIN.draws(0.0, count=4, **common), rtol=1e-9, atol=1e-9)
    shifted = posterior_draws(PLAIN.sami, lambda index: PLAIN.x_0[index * 0], 2, 0.0, 3, seed=3, clip_x_0=False)[..., LIVE]
    assert np.abs(shifted[0] - shifted[1]).min() > 1e-6  # one image under two numbers
    assert np.abs(np.diff(shifted, axis=1)).min() > 1e-6  # two draws of one image
    assert np.abs(whole - PLAIN.draws(0.0, count=12, seed=4, **common))[..., LIVE].min() > 1e-6


def test_estimates_are_clipped():
    x_0 = torch.full((2, *SHAPE), 0.9, dtype=torch.float64)
    reader = Sami(lambda x: (x.flatten(1), torch.ones_like(x.flatten(1))), lambda x_t, t: torch.zeros_like(x_t), PLAIN.schedule)
    free, clipped = (posterior_draws(reader, lambda i: x_0[i], 2, -1.0, 50, seed=0, clip_x_0=clip) for clip in (False, True))
    assert np.abs(free).max() > 1.1
    assert np.abs(clipped).max() <= 1.0


# Axes


def matched(readouts: np.ndarray, mix: np.ndarray) -> np.ndarray:
    """|cosine| of every axis's readout with that of every factor."""
    return np.abs(readouts / np.linalg.norm(readouts, axis=1, keepdims=True) @ mix)


def test_scale_axes_undo_a_rotation(found):
    mu = ROTATED.encoder(ROTATED.x_0)[0].numpy()
    score = {d.method: mcc((mu - d.center) @ d.readouts.T, ROTATED.s, "pearson")[0] for d in found if d.method != "level"}
    raw = mcc(mu[:, LIVE], ROTATED.s, "pearson")[0]
    assert raw < 0.8  # 0.65
    assert score["pca"] < 0.8  # 0.78: the codes are white
    assert score["scale"] > 0.995  # 0.9993
    assert score["gradient"] > 0.99  # pixels see the same scales here


def test_scale_axes_go_from_coarse_to_fine_at_the_right_scales(found):
    axes = next(d for d in found if d.method == "scale")
    assert (matched(axes.readouts[:, LIVE], orthogonal(4, 5)).diagonal() > 0.99).all()  # axis a is factor a
    assert (np.diff(axes.profile, axis=0) < 0).all()
    exact = np.stack([undecided(level) for level in LEVELS])
    np.testing.assert_allclose(axes.profile, exact, rtol=0.1, atol=0.01)  # 100 steps lack up to 5 %, N images 3 %
    assert axes.logsnr.tolist() == LEVELS.tolist()
    read_off = [half_point(LEVELS, 1.0 - share, 1.5) for share in exact.T]  # where a quarter is undecided, on lines between levels 2 apart
    np.testing.assert_allclose(axes.score, read_off, atol=0.25)
    np.testing.assert_allclose(read_off[:3], math.log(3) - np.log(VARIANCES[:3]), atol=0.35)  # 1 / (1 + a^2 snr) = 1 / 4


def test_gradient_axes_go_from_fine_to_coarse(found):
    axes = next(d for d in found if d.method == "gradient")
    np.testing.assert_allclose(axes.score, 1 / VARIANCES[::-1], rtol=0.15)  # of s_i = u_i x / sqrt(VARIANCES_i)
    assert (matched(axes.readouts[::-1][:, LIVE], orthogonal(4, 5)).diagonal() > 0.99).all()


def test_level_axes_are_those_of_one_level(found):
    levels = [d for d in found if d.method == "level"]
    assert [float(d.logsnr[0]) for d in levels] == LEVELS.tolist()
    for axes in levels:
        np.testing.assert_allclose(axes.profile[0], axes.score)
        assert (np.diff(axes.score) <= 0).all()
        np.testing.assert_allclose(axes.score, np.sort(undecided(axes.logsnr[0]))[::-1], rtol=0.15, atol=0.01)
    apart = levels[3]  # where all shares differ much: finest first
    assert (matched(apart.readouts[::-1][:, LIVE], orthogonal(4, 5)).diagonal() > 0.98).all()


def test_every_set_of_axes_is_dual_normal_and_blind_to_dead_dimensions(found):
    mu = ROTATED.encoder(ROTATED.x_0)[0].numpy()
    assert [d.method for d in found] == ["scale", "pca", "gradient", "ica"] + ["level"] * len(LEVELS)
    assert len({name for d in found for name in d.names}) == 4 * len(found)
    for d in found:
        np.testing.assert_allclose(d.center, mu.mean(0), atol=1e-12)
        assert d.directions.shape == d.readouts.shape == (4, 6)
        np.testing.assert_allclose(d.readouts @ d.directions.T, np.eye(4), atol=1e-9)
        np.testing.assert_allclose(np.cov((mu - d.center) @ d.readouts.T, rowvar=False), np.eye(4), atol=1e-9)
        assert (np.delete(d.directions, LIVE, 1) == 0).all()
        assert (np.delete(d.readouts, LIVE, 1) == 0).all()
        assert d.profile.shape == (len(d.logsnr), 4)
        assert d.score.shape == (4,)
        axes = d.axes
        assert isinstance(axes, Axes)
        np.testing.assert_allclose(axes.moved(mu[:5], 1, 2.0) - mu[:5], np.outer(2.0 - axes.coordinates(mu[:5])[:, 1], d.directions[1]))


def test_discovery_repeats_and_reports():
    seen = []
    options = {"logsnr": None, "num_steps": 6, "draws": 2}
    first, second = ROTATED.discover(progress=seen.append, **options), ROTATED.discover(batch_size=500, **options)
    assert sum(seen) == 8 * N
    assert first[0].logsnr.tolist() == default_levels(ROTATED.schedule).tolist()
    assert first[0].logsnr[0] == pytest.approx(-8 + 18 / 16)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(a.readouts, b.readouts, atol=1e-6)


# Algebra


def random_covariance(size: int, seed: int) -> np.ndarray:
    factor = np.random.default_rng(seed).standard_normal((size, 2 * size))
    return factor @ factor.T / size


def test_generalized_axes_are_scipys():
    within, total = random_covariance(5, 0), random_covariance(5, 1)
    values, readouts = generalized_axes(within, total)
    expected, vectors = scipy.linalg.eigh(within, total)
    np.testing.assert_allclose(values, expected[::-1])
    np.testing.assert_allclose(np.abs(readouts), np.abs(vectors.T[::-1]))
    np.testing.assert_allclose(within @ readouts.T, total @ readouts.T * values, atol=1e-12)


def test_joint_axes_of_matrices_that_share_them():
    total, generator = random_covariance(6, 2), np.random.default_rng(3)
    directions = scipy.linalg.sqrtm(total).real @ orthogonal(6, 4)  # columns
    profile = np.sort(generator.random((5, 6)), axis=0)[::-1]
    withins = np.einsum("za,la,ya->lzy", directions, profile, directions)
    scale, found, readouts = joint_axes(withins, total, np.arange(5.0))
    order = [int(np.abs(readout @ directions).argmax()) for readout in readouts]
    assert sorted(order) == list(range(6))
    np.testing.assert_allclose(np.abs(readouts @ directions[:, order]), np.eye(6), atol=1e-8)
    np.testing.assert_allclose(found, profile[:, order], atol=1e-8)
    np.testing.assert_allclose(shares(withins, readouts), found)
    assert (np.diff(scale[np.isfinite(scale)]) >= 0).all()


def test_joint_axes_of_one_matrix_are_the_generalized_ones():
    within, total = random_covariance(5, 0), random_covariance(5, 1)
    values, readouts = generalized_axes(within, total)
    _, profile, joint = joint_axes(within[None], total, [0.0])
    np.testing.assert_allclose(np.sort(profile[0]), values[::-1])
    np.testing.assert_allclose(np.abs(joint @ total @ readouts.T).max(1), 1.0)


def test_joint_axes_are_the_most_likely_ones():
    """No rotation of two of the axes makes sample covariances more diagonal, and none makes them diagonal."""
    generator, mix = np.random.default_rng(5), orthogonal(3, 6)
    true = np.stack([mix @ np.diag(share) @ mix.T for share in ([0.9, 0.8, 0.9], [0.8, 0.4, 0.2], [0.04, 0.02, 0.01], [1e-3, 1e-4, 3e-4])])
    samples = np.stack([np.cov(generator.multivariate_normal(np.zeros(3), matrix, 200), rowvar=False) for matrix in true])
    _, profile, readouts = joint_axes(samples, np.eye(3), np.arange(4.0))

    def likelihood(rotation):
        return -np.log(np.diagonal(rotation @ samples @ rotation.T, axis1=1, axis2=2)).sum()

    best = likelihood(readouts)
    np.testing.assert_allclose(-np.log(profile).sum(), best)
    assert likelihood(mix.T) < best < -np.linalg.slogdet(samples)[1].sum()
    for angle in np.linspace(-math.pi / 4, math.pi / 4, 90):
        for p, q in ((0, 1), (0, 2), (1, 2)):
            turn = np.eye(3)
            turn[[p, p, q, q], [p, q, p, q]] = math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle)
            assert likelihood(turn @ readouts) < best
    # The levels where little is undecided say most here: least squares would not hear them.
    assert np.abs(readouts @ mix).max(1).min() > 0.995


def test_joint_axes_of_equal_diagonals():
    # Half way between two axes, where the sum of squares is largest and flat.
    _, profile, _ = joint_axes(np.array([[[0.5, 0.3], [0.3, 0.5]], [[0.4, 0.1], [0.1, 0.4]]]), np.eye(2), [0.0, 1.0])
    np.testing.assert_allclose(profile, [[0.2, 0.8], [0.3, 0.5]])


def test_joint_axes_without_a_crossing_stand_at_the_ends():
    rows = [[0.9, 0.3, 0.99, 0.4, 0.8, 0.55, 0.99], [0.3, 0.1, 0.98, 0.2, 0.7, 0.53, 0.45], [0.1, 0.0, 0.9, 0.1, 0.2, 0.0, 0.4]]
    scale, found, _ = joint_axes(np.stack([np.diag(row) for row in rows]), np.eye(7), [-1.0, 0.0, 1.0])
    np.testing.assert_allclose(found, np.array(rows)[:, [1, 3, 0, 6, 5, 4, 2]], atol=1e-12)
    np.testing.assert_allclose(scale, [math.nan, math.nan, -1 / 3, -5 / 54, 3 / 53, 0.4, math.nan], atol=1e-12)


def test_within_covariance_is_the_mean_of_numpys():
    drawn = np.random.default_rng(0).standard_normal((7, 4, 3))
    np.testing.assert_allclose(within_covariance(drawn), np.mean([np.cov(rows, rowvar=False) for rows in drawn], axis=0))


def test_principal_axes_are_scikit_learns():
    mu = np.random.default_rng(0).standard_normal((200, 4)) @ random_covariance(4, 1) + 3.0
    share, readouts = principal_axes(mu)
    pca = PCA(whiten=True).fit(mu)
    np.testing.assert_allclose(share, pca.explained_variance_ratio_)
    np.testing.assert_allclose(np.abs((mu - mu.mean(0)) @ readouts.T), np.abs(pca.transform(mu)), atol=1e-9)


def test_independent_axes_tell_factors_of_one_scale_apart():
    factors = np.random.default_rng(0).random((4000, 4)) - 0.5
    factors[:, 3] = np.random.default_rng(1).standard_normal(4000)  # one Gaussian can be told from the others
    mixed = factors / factors.std(0) @ orthogonal(4, 5) + 7.0
    peakedness, readouts = independent_axes(mixed, seed=3)
    coordinates = (mixed - mixed.mean(0)) @ readouts.T
    assert mcc(mixed, factors)[0] < 0.8
    assert mcc(coordinates, factors)[0] > 0.99
    np.testing.assert_allclose(np.cov(coordinates, rowvar=False), np.eye(4), atol=1e-6)
    np.testing.assert_allclose(peakedness[:3], 1.2, atol=0.05)  # of a uniform: -6/5
    assert peakedness[3] < 0.2


def test_means_of_more_images_than_are_drawn_from():
    options = {"logsnr": [0.0], "num_steps": 4, "draws": 2}
    found = discover(ROTATED.sami, ROTATED.images, 50, encoded=N, clip_x_0=False, seed=3, **options)
    np.testing.assert_allclose(found[0].center, ROTATED.encoder(ROTATED.x_0)[0].numpy().mean(0))
    with pytest.raises(ValueError, match="encoded: expected at least count = 50 images, found 5"):
        discover(ROTATED.sami, ROTATED.images, 50, encoded=5, seed=3, **options)


def test_gradients_of_a_linear_and_of_a_curved_encoder():
    expected = ROTATED.read[LIVE] @ ROTATED.read[LIVE].T
    np.testing.assert_allclose(gradient_covariance(ROTATED.sami, ROTATED.x_0[:7], LIVE), 7 * expected, rtol=1e-9)

    def curved(x):
        flat = x.flatten(1)
        return torch.stack((flat.square().sum(1), flat[:, 0], flat.sum(1)), 1), torch.ones(len(x), 3)

    x_0 = ROTATED.x_0[:5]
    flat = x_0.flatten(1)
    expected = [[4 * flat.square().sum(), 2 * flat.sum()], [2 * flat.sum(), 5 * 6]]
    np.testing.assert_allclose(gradient_covariance(Sami(curved, None, None), x_0, [0, 2]), expected)


# Errors


def test_misuse_of_draws():
    for logsnr in (-8.1, 10.0):
        with pytest.raises(ValueError, match=f"logsnr: expected -8 to less than 10, the schedule's range, found {logsnr:g}"):
            PLAIN.draws(logsnr)
    for name, value in (("draws", 0), ("num_steps", 0), ("count", 0)):
        with pytest.raises(ValueError, match=rf"{name}: expected at least 1.*, found 0"):
            PLAIN.draws(0.0, **{name: value})
    with pytest.raises(ValueError, match="draws: expected at least 1 and at most 65536, found 65537"):
        PLAIN.draws(0.0, draws=65537)
    with pytest.raises(ValueError, match="at least 2 draws, found shape"):
        within_covariance(np.zeros((5, 1, 3)))


def test_misuse_of_covariances():
    with pytest.raises(ValueError, match=r"total: expected a covariance of full rank 3 .*, found rank 2"):
        generalized_axes(np.eye(3), np.diag([1.0, 1.0, 0.0]))
    with pytest.raises(ValueError, match=r"withins: expected shape \[2, 3, 3\], found \[1, 3, 3\]"):
        joint_axes(np.eye(3)[None], np.eye(3), [0.0, 1.0])
    with pytest.raises(ValueError, match="logsnr: expected increasing levels"):
        ROTATED.discover(logsnr=[1.0, 0.0])


def test_nothing_to_discover():
    collapsed = Sami(lambda x: (0 * x.flatten(1), 0 * x.flatten(1) + 1), PLAIN.denoiser, PLAIN.schedule)
    with pytest.raises(ValueError, match=r"expected a latent dimension with information above 0.05 nats, found none"):
        discover(collapsed, PLAIN.images, 10)
    with pytest.raises(ValueError, match="count: expected more images than the 4 live dimensions, found 4"):
        discover(PLAIN.sami, PLAIN.images, 4)
