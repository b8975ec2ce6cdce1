"""Every public metric on NaN, infinity, numbers beyond any use and tiny ones: one sentence or a true score, never a perfect one."""

import math
import warnings

import numpy as np
import pytest
import torch

from sami_fast.metrics.attributes import auroc_matrix, latent_quality, redundancy, tad
from sami_fast.metrics.checks import as_finite
from sami_fast.metrics.dci import dci, dci_from_importance
from sami_fast.metrics.identifiability import correlation_matrix, linear_r2, mcc, nonlinear_r2
from sami_fast.metrics.image_pairs import mse, psnr, ssim
from sami_fast.metrics.image_sets import RandomFeatures, extract, fid, kid, precision_recall
from sami_fast.metrics.interventions import beta_vae_score, factor_vae_score
from sami_fast.metrics.irs import irs
from sami_fast.metrics.latents import information_per_dim, kl_per_dim, live_dims
from sami_fast.metrics.mig import discretize, mig, mig_ceiling
from sami_fast.metrics.modularity import explicitness, modularity, modularity_from_mi
from sami_fast.metrics.sap import sap, sap_discrete
from sami_fast.metrics.scale_profile import half_point
from sami_fast.metrics.straightness import clip_straightness, delta_curvature, straightness
from sami_fast.metrics.total_correlation import gaussian_total_correlation, mean_pairwise_mi

N = 120
CLASSES = np.random.default_rng(0).integers(0, 3, (N, 2))
BINARY = np.random.default_rng(1).integers(0, 2, (N, 2))
CODES = np.random.default_rng(2).standard_normal((N, 2)) + CLASSES
LEVELS = np.array([-2.0, 0.0, 2.0])


def pictures(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.resize(values, (2, 1, 12, 12)))


# Each takes a table like CODES, which may hold anything.
METRICS = {
    "auroc_matrix": lambda x: auroc_matrix(x, BINARY),
    "latent_quality": lambda x: latent_quality(x, BINARY),
    "tad": lambda x: tad(x, BINARY).auroc,
    "redundancy": redundancy,
    "dci": lambda x: dci(x, CLASSES, x, CLASSES),
    "dci of test rows": lambda x: dci(CODES, CLASSES, x, CLASSES),
    "dci_from_importance": dci_from_importance,
    "linear_r2": lambda x: linear_r2(x, CLASSES),
    "linear_r2 of factors": lambda x: linear_r2(CODES, x),
    "linear_r2 of few rows": lambda x: linear_r2(x[:6], CLASSES[:6]),
    "nonlinear_r2": lambda x: nonlinear_r2(x, CLASSES),
    "correlation_matrix": lambda x: correlation_matrix(x, x, "pearson"),
    "mcc": lambda x: mcc(x, CLASSES, "pearson"),
    "fid": lambda x: fid(*[torch.from_numpy(x)] * 2),
    "fid of real": lambda x: fid(torch.from_numpy(x), torch.from_numpy(CODES)),
    "kid": lambda x: kid(*[torch.from_numpy(x)] * 2),
    "precision_recall": lambda x: precision_recall(*[torch.from_numpy(x)] * 2),
    "extract": lambda x: extract(pictures(x), RandomFeatures()),
    "mse": lambda x: mse(pictures(x), pictures(x)),
    "psnr": lambda x: psnr(pictures(x), pictures(x)),
    "ssim": lambda x: ssim(pictures(x), pictures(x)),
    "beta_vae_score": lambda x: beta_vae_score(x, CLASSES),
    "factor_vae_score": lambda x: factor_vae_score(x, CLASSES),
    "classes": lambda x: factor_vae_score(CODES, x),
    "irs": lambda x: irs(x, CLASSES),
    "kl_per_dim": lambda x: kl_per_dim(x, np.ones_like(CODES)),
    "kl_per_dim of var": lambda x: kl_per_dim(CODES, x),
    "information_per_dim": lambda x: information_per_dim(x, np.ones_like(CODES)),
    "live_dims": lambda x: live_dims(x[:, 0]),
    "discretize": discretize,
    "mig": lambda x: mig(x, CLASSES),
    "mig_ceiling": lambda x: mig_ceiling(x, CLASSES),
    "modularity": lambda x: modularity(x, CLASSES),
    "modularity_from_mi": modularity_from_mi,
    "explicitness": lambda x: explicitness(x, CLASSES, x, CLASSES),
    "explicitness of test rows": lambda x: explicitness(CODES, CLASSES, x, CLASSES),
    "sap": lambda x: sap(x, CLASSES),
    "sap of factors": lambda x: sap(CODES, x),
    "sap_discrete": lambda x: sap_discrete(x, CLASSES, x, CLASSES),
    "straightness": lambda x: straightness(x.reshape(12, 10, 2)).row(),
    "straightness of std": lambda x: clip_straightness(CODES.reshape(12, 10, 2), std=x[3]),
    "delta_curvature": lambda x: delta_curvature(CODES.reshape(12, 10, 2), x.reshape(12, 10, 2)),
    "total_correlation": gaussian_total_correlation,
    "mean_pairwise_mi": mean_pairwise_mi,
}

BAD = {
    "NaN": np.where(np.arange(N)[:, None] == 3, np.nan, CODES),
    "all NaN": np.full_like(CODES, np.nan),
    "infinity": np.where(np.arange(N)[:, None] == 3, np.inf, CODES),
    "minus infinity": np.where(np.arange(N)[:, None] == 3, -np.inf, CODES),
    "huge": np.where(np.arange(N)[:, None] == 3, 1e300, CODES),
    "all huge": 1e300 * CODES,
}


@pytest.mark.filterwarnings("error")  # a division by 0 on the way would be one
@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("name", METRICS)
def test_what_is_no_number_to_score_is_refused(name, what):
    with pytest.raises(ValueError, match=r"expected") as caught:
        METRICS[name](BAD[what])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scale", [1e-250, 1e-30, 1e25])
@pytest.mark.parametrize("name", METRICS)
def test_numbers_of_any_size_do_not_crash_it(name, scale):
    """What is refused is refused in a sentence; what is scored is a number or NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            METRICS[name](scale * CODES)
        except ValueError as error:
            assert "expected" in str(error)  # noqa: PT017 (it may pass as well)


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e-30, 1e29])
def test_a_correlation_does_not_see_the_scale(scale):
    expected = correlation_matrix(CODES, CLASSES, "pearson")
    np.testing.assert_allclose(correlation_matrix(scale * CODES, CLASSES, "pearson"), expected, atol=1e-6)
    assert gaussian_total_correlation(scale * CODES) == pytest.approx(gaussian_total_correlation(CODES), abs=1e-6)


@pytest.mark.parametrize("values", ["1", None, 1j, {"a": 1}])
def test_what_is_no_real_number_is_refused(values):
    with pytest.raises(ValueError, match="codes: expected real numbers, found"):
        as_finite("codes", [[values]])


def test_a_curve_with_a_hole_has_no_half_point():
    assert math.isnan(half_point(LEVELS, np.array([0.0, np.nan, 1.0]), 1.0))
    assert math.isnan(half_point(LEVELS, np.array([0.0, 0.5, 1.0]), math.nan))
