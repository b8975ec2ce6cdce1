"""Metrics against codes whose score is known. K factors, N >= 10 000; tolerances are those of the sampling error at that N."""

import math

import numpy as np
import pytest
import torch

from sami_fast.methods.sami import Posterior, Sami
from sami_fast.metrics.bound import eight_bit_nats, fit_decoder_var, gaussian_nats, is_eight_bit, negative_elbo
from sami_fast.metrics.identifiability import correlation_matrix, linear_r2, mcc
from sami_fast.metrics.latents import information_per_dim, kl_per_dim, live_dims
from sami_fast.metrics.mig import discretize, mig, mig_ceiling, mutual_information
from sami_fast.schedule import SCHEDULES, alpha_sigma

N = 10_000


def classes(sizes: list[int], count: int = N, seed: int = 0) -> np.ndarray:
    """[count, K] independent uniform factor classes."""
    generator = np.random.default_rng(seed)
    return np.column_stack([generator.integers(0, size, count) for size in sizes])


def normal(columns: int, count: int = N, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, columns))


def rotated(values: np.ndarray, degrees: float) -> np.ndarray:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return values @ np.array([[c, -s], [s, c]])


# Discretiser and mutual information


def test_discretize_known_bins():
    assert discretize(np.array([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]]).T, 3)[:, 0].tolist() == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("value", [0.0, -3.7, 1e30])
def test_discretize_constant_column_falls_in_one_bin(value):
    assert len(np.unique(discretize(np.full((10, 1), value)))) == 1


def test_discretize_neighbouring_floats():
    # Two values with no float between them leave no room for 20 distinct edges.
    binned = discretize(np.array([[1.0], [np.nextafter(1.0, 2.0)]]))
    assert binned.min() >= 1
    assert binned.max() <= 20


def test_mutual_information_known_values():
    table = mutual_information(np.array([[1, 2, 1, 2], [1, 1, 2, 2]]).T, np.array([[1, 2, 1, 2]]).T)
    np.testing.assert_allclose(table, [[math.log(2), 0.0]], atol=1e-12)


# MIG


def test_mig_identity():
    factors = classes([10] * 5)
    score, per_factor = mig(factors, factors)
    assert score >= 0.997
    assert per_factor.shape == (5,)
    assert (per_factor >= 0.99).all()


def test_mig_unchanged_by_permutation_sign_and_scale():
    factors = classes([10] * 5)
    changed = factors[:, [3, 0, 4, 1, 2]] * np.array([-1, 100, -0.01, 3, 1])
    assert mig(changed, factors)[0] == pytest.approx(mig(factors, factors)[0], abs=1e-12)


def test_mig_duplicated_code_is_zero():
    factors = classes([10] * 5)
    assert mig(np.hstack((factors, factors)), factors)[0] == pytest.approx(0.0, abs=1e-12)


def test_mig_constant_code_is_zero():
    assert mig(np.ones((N, 5)), classes([10] * 5))[0] == pytest.approx(0.0, abs=1e-12)


def test_mig_pure_noise():
    assert mig(normal(5), classes([10] * 5))[0] < 0.001


def test_mig_extra_constant_dimensions_change_nothing():
    factors = classes([10] * 5)
    with_dead = np.hstack((factors, np.zeros((N, 5))))
    assert mig(with_dead, factors)[0] == pytest.approx(mig(factors, factors)[0], abs=1e-12)


@pytest.mark.parametrize(("degrees", "expected"), [(5, 0.70), (10, 0.44), (20, 0.23), (30, 0.11)])
def test_mig_rotation(degrees, expected):
    factors = classes([10, 10])
    assert mig(rotated(factors, degrees), factors)[0] == pytest.approx(expected, abs=0.02)


def test_mig_rotation_by_45_degrees():
    # Every pair of values equally often: two codes that know the same in theory differ by 0.005 on 10 000 random draws.
    factors = np.tile(np.indices((10, 10)).reshape(2, -1).T, (100, 1))
    assert mig(rotated(factors, 45), factors)[0] < 0.001


def test_mig_single_code_has_no_runner_up():
    factors = classes([10])
    assert mig(factors, factors)[0] == pytest.approx(1.0, abs=1e-12)


def test_mig_fewer_codes_than_factors():
    factors = classes([10] * 3)
    _, per_factor = mig(factors[:, :2], factors)
    np.testing.assert_allclose(per_factor, [1, 1, 0], atol=0.005)


@pytest.mark.parametrize(("size", "ceiling"), [(2, 1.0), (20, 1.0), (24, 0.927), (32, 0.850), (40, 0.812), (183, 0.575)])
def test_mig_ceiling_of_one_factor(size, ceiling):
    factor = np.tile(np.arange(size), 100)[:, None]
    assert mig_ceiling(factor, factor) == pytest.approx(ceiling, abs=0.0006)


@pytest.mark.parametrize(
    ("sizes", "ceiling"),
    [
        ([3, 6, 40, 32, 32], 0.895),
        ([6, 6, 2, 3, 3, 40, 40], 0.942),
        ([4, 24, 183], 0.819),
        ([10, 10, 10, 8, 4, 15], 0.998),
        ([5, 9, 18, 6], 0.998),
    ],
    ids=["dsprites", "mpi3d", "cars3d", "shapes3d", "smallnorb"],
)
def test_mig_ceiling_of_known_data(sizes, ceiling):
    factors = classes(sizes)
    assert mig_ceiling(factors, factors) == pytest.approx(ceiling, abs=0.004)


def test_mig_ceiling_of_binned_continuous_factors():
    factors = np.random.default_rng(0).random((N, 3))
    assert 0.98 < mig_ceiling(factors, discretize(factors)) <= 1.0


# MCC


def test_mcc_identity_permuted_and_duplicated():
    factors = normal(5)
    for kind in ("spearman", "pearson"):
        assert mcc(factors, factors, kind)[0] == pytest.approx(1.0)
        assert mcc(factors[:, ::-1] * np.array([-1, 2, 3, -4, 5]), factors, kind)[0] == pytest.approx(1.0)
        assert mcc(np.hstack((factors, factors)), factors, kind)[0] == pytest.approx(1.0)


def test_mcc_constant_code_is_zero():
    score, per_factor = mcc(np.full((N, 5), 0.1), normal(5))
    assert score == 0.0
    assert (per_factor == 0).all()


def test_mcc_extra_constant_dimensions_change_nothing():
    factors = normal(5)
    assert mcc(np.hstack((factors, np.full((N, 5), 0.1))), factors)[0] == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["spearman", "pearson"])
def test_mcc_pure_noise(kind):
    assert mcc(normal(5, seed=2), normal(5, seed=3), kind)[0] < 0.02


@pytest.mark.parametrize("degrees", [5, 10, 20, 30, 45])
def test_mcc_rotation_is_the_cosine(degrees):
    factors = normal(2, 50_000)
    assert mcc(rotated(factors, degrees), factors, "pearson")[0] == pytest.approx(math.cos(math.radians(degrees)), abs=0.01)


def test_mcc_missing_factor_counts_nothing():
    factors = normal(5)
    score, per_factor = mcc(factors[:, [0, 1, 3, 4]], factors)
    assert score == pytest.approx(0.8)
    assert per_factor.tolist() == pytest.approx([1, 1, 0, 1, 1])


def test_mcc_one_of_two_dimensions_constant():
    factors = normal(2)
    assert mcc(factors * np.array([1.0, 0.0]), factors)[0] == pytest.approx(0.5, abs=0.005)


def test_mcc_one_code_goes_to_its_best_factor():
    factors = normal(3)
    _, per_factor = mcc(factors[:, [1]] + 0.1 * factors[:, [0]], factors)
    assert per_factor[1] > 0.98
    assert per_factor[[0, 2]].tolist() == [0, 0]


def test_mcc_of_an_exponential_code():
    factors = normal(1, 400_000)
    assert mcc(np.exp(factors), factors, "pearson")[0] == pytest.approx(1 / math.sqrt(math.e - 1), abs=0.01)
    assert mcc(np.exp(factors), factors, "spearman")[0] == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["spearman", "pearson"])
def test_mcc_of_a_squared_code_is_zero(kind):
    factors = normal(1, 100_000)
    assert mcc(factors**2, factors, kind)[0] < 0.02


def test_mcc_of_a_discrete_missing_factor():
    factors = classes([10] * 5)
    assert mcc(factors[:, :4], factors)[0] == pytest.approx(0.8)


# Linear R2


def test_linear_r2_of_an_invertible_mix():
    factors = normal(3)
    mix = np.array([[1.0, 2.0, 0.0], [0.5, -1.0, 1.0], [0.0, 1.0, 3.0]])
    np.testing.assert_allclose(linear_r2(factors @ mix + 7.0, factors), 1.0, atol=1e-9)


def test_linear_r2_of_a_square_is_zero():
    factors = normal(2)
    np.testing.assert_allclose(linear_r2(factors**2, factors), 0.0, atol=0.01)


def test_linear_r2_of_noise_and_constants_is_zero():
    factors = normal(2)
    np.testing.assert_allclose(linear_r2(normal(5, seed=4), factors), 0.0, atol=0.01)
    np.testing.assert_allclose(linear_r2(np.full((N, 2), 3.0), factors), 0.0, atol=0.01)


def test_linear_r2_of_half_the_variance():
    factors = normal(1)
    np.testing.assert_allclose(linear_r2(factors + normal(1, seed=5), factors), 0.5, atol=0.02)


def test_linear_r2_one_code_serves_several_factors():
    factors = normal(3)
    np.testing.assert_allclose(linear_r2(factors[:, :1].astype(np.float32), factors), [1, 0, 0], atol=0.01)


def test_linear_r2_of_more_codes_than_rows_is_a_ridge():
    factors = normal(2, 400)
    pixels = factors @ normal(800, 2, seed=8) + normal(800, 400, seed=6)
    pixels[:, 5] = 0.0  # one that never changes
    assert (linear_r2(pixels, factors) > 0.97).all()
    assert (linear_r2(normal(800, 400, seed=7), factors) > -0.3).all()


# Latents


def test_kl_per_dim_known_values():
    mu, var = np.tile([0.0, 1.0, 0.0], (N, 1)), np.tile([1.0, 1.0, math.e], (N, 1))
    np.testing.assert_allclose(kl_per_dim(mu, var), [0.0, 0.5, 0.5 * (math.e - 2)])


def test_information_of_a_gaussian_channel_and_of_an_offset():
    """mu = a s, s ~ N(0, 1), and noise of variance v holds 1/2 ln(1 + a^2 / v); an offset shared by all images holds none and costs."""
    s = np.random.default_rng(0).standard_normal((4000, 1))
    s = (s - s.mean()) / s.std()
    mu = s * [3.0, 0.1, 0.0, 0.0] + [0.0, 2.0, 2.0, 0.0]
    var = np.broadcast_to([0.25, 0.01, 0.5, 1.0], mu.shape)
    np.testing.assert_allclose(information_per_dim(mu, var), 0.5 * np.log([37.0, 2.0, 1.0, 1.0]), atol=1e-12)
    assert kl_per_dim(mu, var)[2] > 2
    assert live_dims(information_per_dim(mu, var)).tolist() == [0, 1]
    assert (information_per_dim(mu, var) <= kl_per_dim(mu, var) + 1e-12).all()
    wide = np.random.default_rng(1).exponential(1.0, mu.shape)  # the noise of an image may be any; its mean counts
    np.testing.assert_allclose(information_per_dim(mu, wide), 0.5 * np.log1p(mu.var(0) / wide.mean(0)))


def test_live_dims_ordered_and_above_the_threshold():
    assert live_dims(np.array([0.01, 2.0, 0.05, 0.06, 5.0])).tolist() == [4, 1, 3]
    assert live_dims(np.array([0.0, 0.049])).tolist() == []


# Negative ELBO

DATA_STD = 0.5
SHAPE = (1, 4, 4)


def gaussian_images(index: torch.Tensor, split: int = 0) -> torch.Tensor:
    """Images that are white Gaussian noise of a known size."""
    rows = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(2 * int(i) + split)) for i in index]
    return DATA_STD * torch.stack(rows)


def prior_encoder(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q(z|x) = N(0, I) whatever x: z carries nothing and its score is 0."""
    zero = 0.0 * x.flatten(1)[:, :2]
    return zero, zero + 1.0


def gaussian_sami(kind: str = "uniform_logsnr") -> Sami:
    """The exact denoiser of `gaussian_images`."""
    schedule = SCHEDULES[kind](-9.0, 6.0)

    def denoiser(x_t, t):
        alpha_t, sigma_t = (v.view(-1, 1, 1, 1) for v in alpha_sigma(schedule.logsnr(t)))
        return sigma_t * x_t / (alpha_t**2 * DATA_STD**2 + sigma_t**2)

    return Sami(prior_encoder, denoiser, schedule)


def gaussian_bound(sami: Sami, count: int = 3000, **changes):
    decoder_var = fit_decoder_var(sami, lambda index: gaussian_images(index, split=1), 1000, seed=3)
    return negative_elbo(sami, gaussian_images, count, **{"seed": 3, "decoder_var": decoder_var, "eight_bit": False} | changes)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_bound_is_the_likelihood_where_the_model_is_exact(kind):
    bound = gaussian_bound(gaussian_sami(kind))
    exact = gaussian_nats(x_0 := gaussian_images(torch.arange(3000)), torch.zeros_like(x_0), DATA_STD**2).numpy()
    assert bound.kl.max() == 0.0
    assert bound.standard_error < 1.0
    assert bound.total.mean() == pytest.approx(exact.mean(), abs=3 * bound.standard_error)
    np.testing.assert_allclose(bound.unguided, bound.diffusion)


def test_terms_of_the_bound_where_they_are_known():
    bound, dims = gaussian_bound(gaussian_sami()), math.prod(SHAPE)
    # integral of d snr s^2 / (1 + snr s^2) / 2 over logsnr, and the entropy of x_0 given x_t at the cleanest level
    diffusion = 0.5 * dims * (math.log1p(DATA_STD**2 * math.exp(6.0)) - math.log1p(DATA_STD**2 * math.exp(-9.0)))
    reconstruction = 0.5 * dims * math.log(2 * math.pi * math.e / (math.exp(6.0) + DATA_STD**-2))
    assert bound.diffusion.mean() == pytest.approx(diffusion, abs=3 * bound.standard_error)
    assert bound.reconstruction.mean() == pytest.approx(reconstruction, abs=0.2)
    alpha_1, sigma_1 = alpha_sigma(torch.tensor(-9.0))
    noisy = torch.distributions.Normal(alpha_1 * gaussian_images(torch.arange(3000)), sigma_1)
    prior = torch.distributions.kl_divergence(noisy, torch.distributions.Normal(0.0, 1.0)).flatten(1).sum(1)
    np.testing.assert_allclose(bound.prior, prior, atol=1e-5)


def test_bound_of_a_worse_model_is_higher():
    sami = gaussian_sami()
    exact, denoiser = gaussian_bound(sami), sami.denoiser
    sami.denoiser = lambda x_t, t: 0.8 * denoiser(x_t, t)
    assert (gaussian_bound(sami).total - exact.total).mean() > 0.5  # same images, same noise


def test_bound_does_not_depend_on_the_batch():
    sami = gaussian_sami()
    whole, pieces = (gaussian_bound(sami, 50, decoder_var=0.01, batch_size=size) for size in (50, 7))
    np.testing.assert_allclose(whole.total, pieces.total, rtol=1e-5)


def test_bound_of_one_image_has_no_standard_error():
    assert gaussian_bound(gaussian_sami(), 1, decoder_var=0.01).standard_error is None


def test_bound_of_eight_bit_images_is_the_density_times_the_bins():
    def quantised(index):
        return ((gaussian_images(index).clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1

    sami, common = gaussian_sami(), {"seed": 3, "decoder_var": 0.05**2}
    density, probability = (negative_elbo(sami, quantised, 200, eight_bit=flag, **common) for flag in (False, True))
    inside = (quantised(torch.arange(200)).abs() < 1).flatten(1).all(1).numpy()  # the outer bins are open
    np.testing.assert_allclose(probability.total[inside], density.total[inside] - 16 * math.log(2 / 255), rtol=0.01)


@pytest.mark.parametrize("std", [1e-4, 0.003, 0.1, 10.0])
def test_eight_bit_probabilities_sum_to_one(std):
    levels = (torch.arange(256.0) / 127.5 - 1).view(256, 1, 1, 1)
    nats = eight_bit_nats(levels, torch.full_like(levels, 0.3), std**2)
    assert nats.isfinite().all()
    assert torch.exp(-nats).sum().item() == pytest.approx(1.0, abs=1e-6)


def test_eight_bit_levels_are_recognised():
    levels = torch.arange(256, dtype=torch.uint8).float() / 127.5 - 1.0
    assert is_eight_bit(levels)
    assert is_eight_bit(torch.tensor([-1.0, 1.0]))
    assert not is_eight_bit(levels + 0.001)


def test_sampled_latents_follow_the_image_not_the_batch():
    index = torch.arange(6)
    posterior = Posterior(torch.zeros(6, 3), torch.ones(6, 3))
    z = posterior.draw(index, seed=5)
    part = Posterior(posterior.mu[:2], posterior.var[:2]).draw(index[4:], seed=5)
    assert torch.equal(z[4:], part)
    assert not torch.equal(z, posterior.draw(index, seed=6))


# Errors


@pytest.mark.parametrize("metric", [linear_r2, mcc, mig, correlation_matrix])
def test_mismatched_lengths_are_named(metric):
    with pytest.raises(ValueError, match="expected 20 rows, as codes has, found 10"):
        metric(np.zeros((20, 2)), np.zeros((10, 2)))


@pytest.mark.parametrize("metric", [linear_r2, mcc, mig, correlation_matrix])
@pytest.mark.parametrize("shape", [(20,), (20, 2, 2), (20, 0), (0, 2)])
def test_wrong_rank_or_nothing_to_score(metric, shape):
    with pytest.raises(ValueError, match=r"codes: expected \[N, columns\]"):
        metric(np.zeros(shape), np.zeros((20, 2)))


@pytest.mark.parametrize("metric", [linear_r2, mcc, mig])
def test_values_that_are_not_finite(metric):
    codes = normal(2, 20)
    codes[3, 1] = np.nan
    with pytest.raises(ValueError, match="codes: expected finite numbers"):
        metric(codes, classes([3, 3], 20))


def test_factors_that_do_not_vary():
    with pytest.raises(ValueError, match="column 1"):
        mig(normal(2, 20), np.column_stack((classes([3], 20), np.zeros(20, int))))
    with pytest.raises(ValueError, match="column 0"):
        linear_r2(normal(2, 20), np.ones((20, 1)))


def test_other_misuse():
    with pytest.raises(ValueError, match="whole numbers"):
        mig(normal(2, 20), normal(2, 20))
    with pytest.raises(ValueError, match="kind: expected spearman or pearson, found 'kendall'"):
        mcc(normal(2, 20), normal(2, 20), "kendall")
    with pytest.raises(ValueError, match="bins: expected at least 1"):
        discretize(normal(2, 20), 0)
    with pytest.raises(ValueError, match="at least 4 rows"):
        linear_r2(normal(1, 3), normal(1, 3))
    with pytest.raises(ValueError, match="var: expected shape"):
        kl_per_dim(np.zeros((5, 2)), np.ones((5, 3)))
    with pytest.raises(ValueError, match="positive"):
        kl_per_dim(np.zeros((5, 2)), np.zeros((5, 2)))
    with pytest.raises(ValueError, match="var: expected positive values"):
        information_per_dim(np.zeros((5, 2)), np.zeros((5, 2)))
    with pytest.raises(ValueError, match=r"information: expected one value per dimension"):
        live_dims(np.zeros((2, 2)))
