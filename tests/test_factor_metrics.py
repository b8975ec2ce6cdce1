"""Factor metrics against codes whose score is known, and against scikit-learn, scipy and the published protocols written out plainly.

K factors, N = 10 000 unless said otherwise; tolerances are those of the sampling error at that N. DCI, whose trees are slow, has N = 2000.
"""

import math
import warnings
from itertools import combinations

import numpy as np
import pytest
from scipy.stats import chi2, multivariate_normal, norm, pearsonr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import mutual_info_score, roc_auc_score
from sklearn.model_selection import KFold
from sklearn.preprocessing import StandardScaler

from sami_fast.metrics import interventions
from sami_fast.metrics.attributes import auroc_matrix, latent_quality, redundancy, tad
from sami_fast.metrics.dci import dci, dci_from_importance
from sami_fast.metrics.identifiability import linear_r2, nonlinear_r2
from sami_fast.metrics.interventions import beta_vae_score, factor_vae_score
from sami_fast.metrics.irs import irs
from sami_fast.metrics.mig import discretize, mutual_information
from sami_fast.metrics.modularity import explicitness, modularity, modularity_from_mi
from sami_fast.metrics.sap import sap, sap_discrete
from sami_fast.metrics.total_correlation import gaussian_total_correlation, mean_pairwise_mi

N = 10_000


def classes(sizes: list[int], count: int = N, seed: int = 0) -> np.ndarray:
    """[count, K] independent uniform factor classes."""
    generator = np.random.default_rng(seed)
    return np.column_stack([generator.integers(0, size, count) for size in sizes])


def grid(sizes: list[int], repeats: int = 1) -> np.ndarray:
    """[repeats * product, K]: every combination of classes equally often, the last factor fastest."""
    return np.tile(np.indices(sizes).reshape(len(sizes), -1).T, (repeats, 1))


def normal(columns: int, count: int = N, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, columns))


def rotated(values: np.ndarray, degrees: float) -> np.ndarray:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return values @ np.array([[c, -s], [s, c]])


def permuted(values: np.ndarray) -> np.ndarray:
    """Five columns in another order, with other signs and scales."""
    return values[:, [3, 0, 4, 1, 2]] * np.array([-1, 100, -0.1, 3, 1])


def rotation(size: int) -> np.ndarray:
    return np.linalg.qr(normal(size, size, seed=7))[0]


# Matrices of importance and of information


@pytest.mark.parametrize(
    ("matrix", "disentanglement", "completeness", "modular"),
    [
        (5 * np.eye(5), 1, 1, 1),
        (np.zeros((4, 3)), 0, 0, 0),
        (np.vstack((5 * np.eye(5),) * 2), 1, 1 - math.log(2) / math.log(10), 1),
        (np.hstack((5 * np.eye(5),) * 2), 1 - math.log(2) / math.log(10), 1, 8 / 9),
        (np.eye(3, 2), 1, 1, 2 / 3),
        (np.array([[0.75, 0.25], [0.25, 0.75]]), 0.188722, 0.188722, 8 / 9),
        (np.ones((4, 3)), 0, 0, 0),
        (np.array([[1.0, 0, 0], [0, 1, 1]]), 1 / 3 + 2 / 3 * (1 - math.log(2) / math.log(3)), 1, (1 + 1 / 2) / 2),
    ],
)
def test_scores_of_a_matrix(matrix, disentanglement, completeness, modular):
    assert dci_from_importance(matrix) == pytest.approx((disentanglement, completeness), abs=1e-6)
    assert modularity_from_mi(matrix)[0] == pytest.approx(modular, abs=1e-12)


def test_scores_of_a_matrix_do_not_see_its_scale_or_order():
    matrix = np.random.default_rng(0).random((6, 4))
    changed = 7 * matrix[::-1][:, [2, 0, 3, 1]]
    assert dci_from_importance(changed) == pytest.approx(dci_from_importance(matrix), abs=1e-9)
    assert modularity_from_mi(changed)[0] == pytest.approx(modularity_from_mi(matrix)[0])
    assert dci_from_importance(matrix.T) == pytest.approx(dci_from_importance(matrix)[::-1])


# DCI


def dci_of(codes: np.ndarray, factors: np.ndarray, **options):
    return dci(codes[:2000], factors[:2000], codes[2000:], factors[2000:], **options)


def test_dci_identity():
    factors = classes([10] * 5, 3000)
    result = dci_of(factors, factors)
    assert (result.disentanglement, result.completeness, result.informativeness) == pytest.approx((1, 1, 1), abs=1e-6)
    np.testing.assert_allclose(result.importance, np.eye(5), atol=1e-6)


def test_dci_permuted_with_constant_dimensions():
    factors = classes([4] * 5, 3000)
    result = dci_of(np.hstack((permuted(factors), np.ones((3000, 5)))), factors)
    assert (result.disentanglement, result.completeness, result.informativeness) == pytest.approx((1, 1, 1), abs=1e-6)
    np.testing.assert_allclose(result.importance, np.vstack((np.eye(5)[[3, 0, 4, 1, 2]], np.zeros((5, 5)))), atol=1e-6)


def test_dci_duplicated():
    factors = classes([4] * 5, 3000)
    result = dci_of(np.hstack((factors, factors)), factors)
    assert result.disentanglement == pytest.approx(1, abs=1e-6)
    assert result.completeness == pytest.approx(1 - math.log(2) / math.log(10), abs=0.02)


def test_dci_constant_code_is_zero():
    factors = classes([4] * 5, 3000)
    result = dci_of(np.ones((3000, 5)), factors)
    assert (result.disentanglement, result.completeness) == (0, 0)
    assert result.informativeness == pytest.approx(0.25, abs=0.03)
    assert (result.importance == 0).all()


def test_dci_pure_noise():
    result = dci_of(normal(5, 3000), classes([2] * 5, 3000))
    assert result.disentanglement < 0.01
    assert result.completeness < 0.01
    assert result.informativeness == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(("degrees", "expected", "tolerance"), [(10, 0.30, 0.05), (45, 0.0, 0.01)])
def test_dci_rotation(degrees, expected, tolerance):
    factors = classes([10, 10], 3000)
    result = dci_of(rotated(factors, degrees), factors)
    assert (result.disentanglement, result.completeness) == pytest.approx((expected, expected), abs=tolerance)


def test_dci_does_not_depend_on_the_number_of_jobs():
    factors = classes([2] * 3, 300)
    codes = factors + 0.5 * normal(3, 300)
    one, two = (dci(codes[:200], factors[:200], codes[200:], factors[200:], jobs=jobs) for jobs in (1, 2))
    np.testing.assert_array_equal(one.importance, two.importance)
    assert one.informativeness == two.informativeness
    assert 0 < one.disentanglement < 1
    assert one.importance.shape == (3, 3)
    assert (one.importance >= 0).all()
    np.testing.assert_allclose(one.importance.sum(0), 1)


def test_dci_importances_are_never_negative():
    # Impurity gains of codes that split nothing come out at -4e-18 here.
    factors = classes([2] * 5, 3000)
    assert dci_of(np.hstack((factors, factors)), factors).importance.min() >= 0


# SAP


def test_sap_identity_and_changes_that_keep_it():
    factors = classes([10] * 5)
    score, per_factor = sap(factors, factors)
    assert score == pytest.approx(1.0, abs=0.0005)
    assert per_factor.shape == (5,)
    assert sap(grid([4] * 5), grid([4] * 5))[0] == pytest.approx(1.0, abs=1e-12)
    assert sap(permuted(factors), factors)[0] == pytest.approx(score, abs=1e-12)
    assert sap(np.hstack((factors, np.full((N, 5), 0.1))), factors)[0] == pytest.approx(score, abs=1e-12)


def test_sap_duplicated_constant_and_noise():
    factors = classes([10] * 5)
    assert sap(np.hstack((factors, factors)), factors)[0] == pytest.approx(0.0, abs=1e-12)
    assert sap(np.full((N, 5), 0.1), factors)[0] == 0.0
    assert sap(factors * 1e-7, factors)[0] == 0.0  # float32 rounding of a constant would look like this
    assert sap(normal(5), factors)[0] < 0.01


def test_sap_rotation():
    factors = classes([10, 10])
    assert sap(rotated(factors, 45), factors)[0] < 0.03
    assert sap(rotated(factors, 30), factors)[0] == pytest.approx(math.cos(math.radians(60)), abs=0.03)


def test_sap_missing_factor_and_single_code():
    factors = classes([10] * 5)
    np.testing.assert_allclose(sap(factors[:, :4], factors)[1], [1, 1, 1, 1, 0], atol=0.001)
    np.testing.assert_allclose(sap(factors[:, :1], factors[:, :2])[1], [1, 0], atol=0.001)


def test_sap_against_pearsonr():
    codes, factors = normal(4, 50), normal(3, 50, seed=2) + normal(4, 50)[:, 1:]
    squares = np.array([sorted(pearsonr(factor, code).statistic ** 2 for code in codes.T) for factor in factors.T])
    np.testing.assert_allclose(sap(codes, factors)[1], squares[:, -1] - squares[:, -2], atol=1e-12)


@pytest.mark.parametrize(("size", "expected"), [(2, 1 / 2), (3, 2 / 3), (4, 3 / 4), (6, 1 / 3), (10, 1 / 5)])
def test_sap_discrete_of_a_perfect_code(size, expected):
    factors = grid([size] * 2, -(-N // size**2))
    assert sap_discrete(factors, factors, factors, factors)[0] == pytest.approx(expected, abs=0.005)


def test_sap_discrete_duplicated_noise_and_test_rows():
    factors, others = classes([3] * 2), classes([3] * 2, seed=9)
    doubled = np.hstack((factors, factors))
    assert sap_discrete(doubled, factors, doubled, factors)[0] == 0.0
    assert sap_discrete(normal(3), factors, normal(3, seed=3), others)[0] < 0.02
    assert sap_discrete(factors, factors, 0 * others, others)[0] == pytest.approx(0, abs=0.02)  # scored on the test rows


# FactorVAE and BetaVAE


def both_scores(codes: np.ndarray, factors: np.ndarray) -> tuple[float, float, int]:
    score, pruned = factor_vae_score(codes, factors)
    return score, beta_vae_score(codes, factors), pruned


def test_interventions_identity_permuted_and_duplicated():
    factors = classes([10] * 5)
    assert both_scores(factors, factors) == (1.0, 1.0, 0)
    assert both_scores(permuted(factors), factors) == (1.0, 1.0, 0)
    assert both_scores(np.hstack((factors, factors)), factors) == (1.0, 1.0, 0)
    assert both_scores(np.hstack((np.full((N, 5), 0.1), factors)), factors) == (1.0, 1.0, 5)


def test_interventions_constant_code():
    factor_vae, beta_vae, pruned = both_scores(np.full((N, 5), 0.1), classes([10] * 5))
    assert (factor_vae, pruned) == (0.0, 5)
    assert beta_vae == pytest.approx(0.2, abs=0.03)


def test_interventions_pure_noise():
    assert both_scores(normal(5), classes([10] * 5)) == pytest.approx((0.2, 0.2, 0), abs=0.03)


@pytest.mark.parametrize("degrees", [5, 10, 20, 30])
def test_interventions_do_not_see_a_small_rotation(degrees):
    factors = classes([10, 10])
    assert both_scores(rotated(factors, degrees), factors) == (1.0, 1.0, 0)


@pytest.mark.parametrize("seed", [0, 1])
def test_interventions_rotation_by_45_degrees(seed):
    # Both codes vary equally whichever factor is held: rounding must not break the tie, since it knows the factor (it scored 0.78).
    factors = grid([10, 10], 100)
    assert factor_vae_score(rotated(factors, 45), factors, seed=seed)[0] == pytest.approx(0.5, abs=0.03)
    assert beta_vae_score(rotated(factors, 45), factors, seed=seed) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_beta_vae_score_is_blind_to_the_spread_of_codes(scale):
    factors = classes([5] * 4, 2000)
    codes = factors @ rotation(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a classifier that does not converge
        assert beta_vae_score(scale * codes, factors) == pytest.approx(beta_vae_score(codes, factors), abs=0.005)


def test_interventions_missing_factor():
    factors = classes([10] * 5)
    factor_vae, beta_vae, _ = both_scores(factors[:, :4], factors)
    assert factor_vae == pytest.approx(0.8, abs=0.03)
    assert beta_vae == 1.0


def test_interventions_cannot_tell_factors_that_are_equal():
    one = classes([10])
    factors = np.hstack((one, one, classes([10], seed=3)))
    assert both_scores(factors, factors)[:2] == pytest.approx((2 / 3, 2 / 3), abs=0.03)


def test_factor_vae_prunes_by_the_standard_deviation():
    codes = normal(3) / normal(3).std(0, ddof=1) * np.array([0.0499, 0.0501, 1.0])
    assert factor_vae_score(codes, classes([10, 10]))[1] == 1


def test_interventions_repeat_by_seed_and_not_by_chunk(monkeypatch):
    factors = classes([4, 4, 4], 500)
    codes = factors @ rotation(3)
    settings = {"batch_size": 8, "seed": 3}
    whole = [metric(codes, factors, **settings) for metric in (factor_vae_score, beta_vae_score)]
    monkeypatch.setattr(interventions, "VALUES_AT_ONCE", 100_000)
    assert [metric(codes, factors, **settings) for metric in (factor_vae_score, beta_vae_score)] == whole
    assert factor_vae_score(codes, factors, batch_size=8, seed=4) != whole[0]


SIZES = [3, 5, 4]


def mixed_table() -> np.ndarray:
    """[60, 3] codes of the whole grid that mix its factors, on three scales."""
    return (grid(SIZES) @ rotation(3) + 0.3 * normal(3, 60)) * np.array([1.0, 10.0, 0.3])


def drawn_codes(table: np.ndarray, factors: np.ndarray) -> np.ndarray:
    return table[np.ravel_multi_index(factors.T, SIZES)]


def test_factor_vae_score_against_the_protocol_written_out():
    table, generator = mixed_table(), np.random.default_rng(5)
    variance = table.var(0, ddof=1)

    def votes(count: int) -> np.ndarray:
        found = np.zeros((3, 3))
        for _ in range(count):
            held = generator.integers(3)
            factors = np.column_stack([generator.integers(0, size, 3) for size in SIZES])
            factors[:, held] = factors[0, held]
            found[np.argmin(drawn_codes(table, factors).var(0, ddof=1) / variance), held] += 1
        return found

    by_code, fresh = votes(4000).argmax(1), votes(4000)
    plain = fresh[np.arange(3), by_code].sum() / fresh.sum()
    assert 0.5 < plain < 0.9
    ours = factor_vae_score(table, grid(SIZES), batch_size=3)[0]
    assert ours == pytest.approx(plain, abs=0.03)  # three standard errors


def test_beta_vae_score_against_the_protocol_written_out():
    table, generator = mixed_table(), np.random.default_rng(5)
    points, held = np.empty((8000, 3)), generator.integers(0, 3, 8000)
    for point, k in zip(points, held, strict=True):
        first, second = (np.column_stack([generator.integers(0, size, 2) for size in SIZES]) for _ in range(2))
        second[:, k] = first[:, k]
        point[:] = np.abs(drawn_codes(table, first) - drawn_codes(table, second)).mean(0)
    plain = LogisticRegression(max_iter=1000).fit(points[:4000], held[:4000]).score(points[4000:], held[4000:])
    assert 0.5 < plain < 0.9
    assert beta_vae_score(table, grid(SIZES), batch_size=2) == pytest.approx(plain, abs=0.03)


# Modularity, explicitness, IRS


def test_modularity_identity_and_what_it_does_not_see():
    factors = classes([10] * 5)
    for codes in (factors, permuted(factors), np.hstack((factors, factors)), factors[:, :4]):
        score, per_code = modularity(codes, factors)
        assert score == pytest.approx(1.0, abs=0.0005)
        assert per_code.shape == (codes.shape[1],)
    assert modularity(permuted(factors), factors)[0] == pytest.approx(modularity(factors, factors)[0], abs=1e-12)


def test_modularity_dead_dimensions_stay_in_the_mean():
    factors = classes([10] * 5)
    score, per_code = modularity(np.hstack((factors, np.full((N, 5), 0.1))), factors)
    assert score == pytest.approx(0.5, abs=0.0005)
    assert (per_code[5:] == 0).all()
    assert modularity(np.full((N, 5), 0.1), factors)[0] == 0.0


def test_modularity_of_noise_is_that_of_chi_square_information():
    # 2 N I of independent columns is chi-square with (bins - 1) (classes - 1) degrees of freedom.
    factors = classes([10] * 5)
    draws = chi2(19 * 9).rvs((100_000, 5), random_state=0) / (2 * N)
    expected = modularity_from_mi(draws)[0]
    assert 0.2 < expected < 0.3
    per_code = modularity(np.random.default_rng(2).random((N, 100)), factors)[1]
    assert per_code.mean() == pytest.approx(expected, abs=3 * per_code.std() / 10)


def test_modularity_rotation_by_45_degrees():
    factors = grid([10, 10], 100)
    assert modularity(rotated(factors, 45), factors)[0] < 0.01


def test_modularity_is_that_of_its_table_of_information():
    factors, codes = classes([3, 7, 4], 500), normal(5, 500) + classes([3], 500)
    table = np.array([[mutual_info_score(factor, code) for factor in factors.T] for code in discretize(codes, 9).T])
    assert modularity(codes, factors, bins=9)[0] == modularity_from_mi(table)[0]
    np.testing.assert_allclose(mutual_information(discretize(codes, 9), factors).T, table)


def explicitness_of(codes: np.ndarray, factors: np.ndarray) -> tuple[float, np.ndarray]:
    return explicitness(codes[:6000], factors[:6000], codes[6000:], factors[6000:])


def test_explicitness_known_values():
    factors = classes([10] * 5)
    for codes in (factors, factors @ rotation(5), np.hstack((factors, np.full((N, 2), 0.1)))):
        assert explicitness_of(codes, factors)[0] == pytest.approx(1.0, abs=0.0005)
    assert explicitness_of(normal(5), factors)[0] == pytest.approx(0.5, abs=0.01)
    assert explicitness_of(np.full((N, 5), 0.1), factors)[0] == 0.5
    np.testing.assert_allclose(explicitness_of(factors[:, :4], factors)[1], [1, 1, 1, 1, 0.5], atol=0.02)


def test_explicitness_against_roc_auc_score():
    factors = classes([2, 5])
    codes = 0.3 * factors @ np.array([[1.0, 2, 3], [3, -1, 0]]) + normal(3)
    score, per_factor = explicitness_of(codes, factors)
    scaler = StandardScaler().fit(codes[:6000])
    train, test = scaler.transform(codes[:6000]), scaler.transform(codes[6000:])
    binary, several = (LogisticRegression().fit(train, factor[:6000]).predict_proba(test) for factor in factors.T)
    expected = [roc_auc_score(factors[6000:, 0], binary[:, 1]), roc_auc_score(factors[6000:, 1], several, multi_class="ovr")]
    np.testing.assert_allclose(per_factor, expected, atol=1e-4)
    assert 0.6 < per_factor.min() < per_factor.max() < 0.95
    assert score == pytest.approx(per_factor.mean())


def test_explicitness_leaves_out_classes_that_one_set_lacks():
    factors = classes([4], 1000)
    seen = factors[:, 0] < 3
    # The unseen class looks more like the third than the third itself, which so loses to one row in three of the others.
    assert explicitness(factors[seen], factors[seen], factors, factors)[0] == pytest.approx((1 + 1 + 2 / 3) / 3, abs=0.02)
    assert explicitness(factors, factors, factors[seen], factors[seen])[0] == pytest.approx(1.0, abs=0.0005)
    with pytest.raises(ValueError, match="test_classes: expected a class that factor_classes holds too, found none in column 0"):
        explicitness(factors, factors, factors, factors + 10)


def test_irs_known_values():
    factors = classes([10] * 5)
    for codes in (factors, permuted(factors), np.hstack((factors, factors)), np.hstack((factors, np.full((N, 5), 0.1)))):
        assert irs(codes, factors)[0] == pytest.approx(1.0, abs=1e-9)
    assert irs(np.full((N, 5), 0.1), factors)[0] == 0.0
    assert irs(normal(5), factors)[0] == pytest.approx(0.35, abs=0.03)  # 1 - q99 / max: of 10 000 normal numbers 2.6 / 3.9
    assert irs(np.random.default_rng(0).random((N, 5)), factors)[0] == pytest.approx(0.01, abs=0.01)  # of uniform ones 0.99 / 1
    pairs = grid([10, 10], 100)
    assert irs(rotated(pairs, 45), pairs)[0] == pytest.approx(0.5, abs=0.02)


def test_irs_by_hand():
    # Factor 0 leaves code 0 within 1 of its mean and code 1 within 1; factor 1 leaves code 1 alone. Largest deviations 6 and 1.
    factors = grid([2, 2], 50)
    codes = factors @ np.array([[10.0, 0], [2, 2]])
    score, per_code = irs(codes, factors)
    np.testing.assert_allclose(per_code, [1 - 1 / 6, 1])
    assert score == pytest.approx((6 * (1 - 1 / 6) + 1) / 7)


# Total correlation


def test_gaussian_total_correlation_known_values():
    pair = normal(2, 500_000)
    for rho in (0.0, 0.5, -0.9):
        codes = np.column_stack((pair[:, 0], rho * pair[:, 0] + math.sqrt(1 - rho**2) * pair[:, 1]))
        assert gaussian_total_correlation(codes) == pytest.approx(-0.5 * math.log(1 - rho**2), abs=0.01)
    assert gaussian_total_correlation(np.hstack((pair, pair[:, :1]))) == math.inf
    assert gaussian_total_correlation(normal(5, 5)) == math.inf
    assert gaussian_total_correlation(np.full((N, 3), 0.1)) == 0.0


def test_gaussian_total_correlation_against_scipy():
    codes = normal(5) @ normal(5, 5, seed=3)
    covariance = np.cov(codes, rowvar=False)
    expected = sum(norm(scale=math.sqrt(v)).entropy() for v in covariance.diagonal()) - multivariate_normal(cov=covariance).entropy()
    assert gaussian_total_correlation(codes) == pytest.approx(expected)
    changed = np.hstack((permuted(codes) + 3, np.full((N, 2), 0.1)))
    assert gaussian_total_correlation(changed) == pytest.approx(expected)


def test_mean_pairwise_mi():
    factors = grid([4, 4, 4])
    assert mean_pairwise_mi(factors) == pytest.approx(0.0, abs=1e-12)
    assert mean_pairwise_mi(np.hstack((factors, factors))) == pytest.approx(3 * math.log(4) / 15)
    assert mean_pairwise_mi(np.ones((20, 3))) == 0.0
    codes = normal(4, 300)
    binned = discretize(codes, 6)
    assert mean_pairwise_mi(codes, 6) == pytest.approx(np.mean([mutual_info_score(a, b) for a, b in combinations(binned.T, 2)]))


# Attributes

RATES = [0.5, 0.3, 0.5, 0.2]


def attributes_of(rates: list[float] = RATES, count: int = 8000, seed: int = 0) -> np.ndarray:
    """[count, M] independent attributes of 0 and 1."""
    return (np.random.default_rng(seed).random((count, len(rates))) < rates).astype(int)


def balanced_attributes() -> np.ndarray:
    """[10 000, 4] at the same rates, exactly independent: 8 000 random draws correlate by chance, which costs TAD 0.02 +- 0.007."""
    return (grid([10] * 4) < 10 * np.array(RATES)).astype(int)


def test_auroc_matrix_against_roc_auc_score():
    attributes = attributes_of([0.5, 0.1, 0.9], 500)
    codes = np.column_stack((normal(2, 500), classes([3, 2], 500), np.exp(5 * normal(1, 500)), attributes[:, 0]))
    expected = [[roc_auc_score(y, z) for z in codes.T] for y in attributes.T]
    np.testing.assert_allclose(auroc_matrix(codes, attributes), expected, atol=1e-12)


def test_auroc_matrix_by_hand_and_constants():
    assert auroc_matrix(np.array([[1.0], [2], [2], [3]]), np.array([[0], [0], [1], [1]]))[0, 0] == 3.5 / 4
    codes = np.hstack((normal(1), np.full((N, 1), 0.1)))
    attributes = np.hstack((np.ones((N, 1)), np.zeros((N, 1)), attributes_of([0.5], N)))
    matrix = auroc_matrix(codes, attributes)
    assert matrix.shape == (3, 2)
    assert (matrix[:2] == 0.5).all()
    assert matrix[2, 1] == 0.5
    np.testing.assert_array_equal(auroc_matrix(codes, attributes.astype(bool)), matrix)


def test_auroc_does_not_see_a_monotonic_change():
    attributes = attributes_of()
    codes = normal(4, 8000) + attributes
    np.testing.assert_allclose(auroc_matrix(np.exp(3 * codes), attributes), auroc_matrix(codes, attributes), atol=1e-12)
    np.testing.assert_allclose(auroc_matrix(-codes, attributes), 1 - auroc_matrix(codes, attributes), atol=1e-12)


@pytest.mark.parametrize(("flipped", "expected"), [(0.0, 1.0), (0.1, 0.53), (0.2, 0.28), (0.3, 0.12)])
def test_redundancy_of_a_noisy_copy(flipped, expected):
    one = attributes_of([0.5], 100_000)
    copy = np.where(np.random.default_rng(1).random(one.shape) < flipped, 1 - one, one)
    np.testing.assert_allclose(redundancy(np.hstack((one, copy))), expected, atol=0.01)


def test_redundancy_against_mutual_info_score():
    attributes = attributes_of([0.5, 0.3, 0.2], 300)
    attributes = np.column_stack((attributes, attributes[:, 0] & attributes[:, 1], np.ones(300, int)))
    expected = [
        max(mutual_info_score(y, other) for j, other in enumerate(attributes.T) if j != i) / mutual_info_score(y, y)
        for i, y in enumerate(attributes.T[:-1])
    ]
    np.testing.assert_allclose(redundancy(attributes), [*expected, 0.0], atol=1e-12)
    assert redundancy(attributes[:, :1]).tolist() == [0]


@pytest.mark.parametrize("protocol", ["nashae", "infodiffusion"])
def test_tad_of_one_code_per_attribute(protocol):
    attributes = balanced_attributes()
    codes = attributes + 0.01 * normal(4)
    result = tad(codes, attributes, protocol=protocol)
    assert result.score == pytest.approx(1.98, abs=0.02)
    assert result.count == 4
    assert result.captured.all()
    changed = tad(-codes[:, [2, 0, 3, 1]], attributes, protocol=protocol)
    assert (changed.score, changed.count) == pytest.approx((result.score, result.count))
    doubled = tad(np.hstack((codes, codes)), attributes, protocol=protocol)
    assert (doubled.score, doubled.count) == (0, 4)


@pytest.mark.parametrize("protocol", ["nashae", "infodiffusion"])
@pytest.mark.parametrize("codes", [np.full((N, 4), 0.1), normal(4)], ids=["constant", "noise"])
def test_tad_of_codes_that_know_nothing(codes, protocol):
    result = tad(codes, balanced_attributes(), protocol=protocol)
    assert (result.score, result.count) == (0, 0)
    assert not result.captured.any()


def test_tad_with_many_noise_dimensions():
    attributes = balanced_attributes()
    codes = np.hstack((attributes + 0.01 * normal(4), normal(60, seed=2)))
    result = tad(codes, attributes)
    assert result.score == pytest.approx(1.93, abs=0.02)
    assert result.auroc.shape == (4, 64)


def test_tad_of_two_attributes_that_are_mixed():
    attributes = attributes_of([0.5, 0.5])
    result = tad(rotated(attributes + 0.01 * normal(2, 8000), 45), attributes)
    assert result.score < 0.03
    assert result.count == 2
    np.testing.assert_allclose(result.auroc, 0.875, atol=0.015)  # a tie of two in four pairs: (1 + 1 + 1 + 1/2) / 4


@pytest.mark.parametrize(("separation", "auroc", "captured"), [(2.0, 0.921, 1), (0.8, 0.714, 0)])
def test_tad_of_two_normal_distributions(separation, auroc, captured):
    attributes = attributes_of([0.5], 100_000)
    result = tad(separation * attributes + normal(1, 100_000), attributes)
    assert result.auroc[0, 0] == pytest.approx(norm.cdf(separation / math.sqrt(2)), abs=0.005)
    assert result.auroc[0, 0] == pytest.approx(auroc, abs=0.005)
    assert result.count == captured
    assert result.score == pytest.approx(captured * (auroc - 0.5), abs=0.005)  # a single code: the runner-up is chance


def test_tad_drops_attributes_that_tell_each_other():
    attributes = attributes_of([0.5, 0.3])
    attributes = attributes[:, [0, 0, 1]]
    result = tad(attributes + 0.01 * normal(3, 8000), attributes)
    assert result.score == pytest.approx(0.49, abs=0.01)
    assert result.captured.tolist() == [False, False, True]
    np.testing.assert_allclose(result.redundancy, [1, 1, 0], atol=0.001)


def test_tad_never_captures_a_constant_attribute():
    attributes = np.column_stack((attributes_of([0.5]), np.ones(8000, int)))
    result = tad(attributes[:, :1] + 0.01 * normal(2, 8000), attributes)
    assert result.captured.tolist() == [True, False]
    assert (result.auroc[1] == 0.5).all()


def test_tad_dead_dimensions():
    attributes = attributes_of()
    codes = (attributes + 0.01 * normal(4, 8000)) * np.array([0.15, 1, 1, 1])  # the first spans 0.16
    assert tad(codes, attributes).count == 3
    assert tad(codes, attributes, protocol="infodiffusion").count == 4
    assert tad(codes, attributes, protocol="infodiffusion", min_std=0.1).count == 3
    assert (tad(codes, attributes).auroc[:, 0] == 0.5).all()


def test_tad_folds_are_those_of_scikit_learn_and_scale_does_not_matter():
    attributes = attributes_of()
    codes = normal(6, 8000) + 1.5 * attributes @ np.eye(4, 6)
    result = tad(codes, attributes, protocol="infodiffusion")
    folds = [tad(codes[rows], attributes[rows]) for rows, _ in KFold(5, shuffle=True, random_state=0).split(codes)]
    scores = [fold.score for fold in folds]
    assert (result.score, result.std) == pytest.approx((np.mean(scores), np.std(scores)))
    assert result.count == np.mean([fold.count for fold in folds]) == 4
    assert 0 < result.std < 0.02
    scaled = tad(StandardScaler().fit_transform(codes), attributes, protocol="infodiffusion")
    assert (scaled.score, scaled.std) == pytest.approx((result.score, result.std))
    whole = tad(codes, attributes)
    assert whole.std is None
    np.testing.assert_array_equal(whole.auroc, result.auroc)


def test_latent_quality_known_values():
    attributes = balanced_attributes()[:, :2]
    assert latent_quality(attributes + 0.01 * normal(2), attributes)[0] == pytest.approx(1.0, abs=1e-6)
    np.testing.assert_allclose(latent_quality(normal(3), attributes)[1], 0.5, atol=0.02)
    assert latent_quality(np.full((N, 2), 0.1), attributes)[0] == 0.5
    # Two codes that both tell with d' = 1 tell together with sqrt(2); the second attribute is not in them.
    score, per_attribute = latent_quality(100 * (attributes[:, :1] + normal(2)), attributes)
    np.testing.assert_allclose(per_attribute, [norm.cdf(1.0), 0.5], atol=0.02)
    assert score == pytest.approx(per_attribute.mean())


def test_latent_quality_depends_little_on_the_seed_and_repeats():
    attributes = attributes_of([0.5], 1000)
    codes = attributes + normal(2, 1000)
    assert latent_quality(codes, attributes, seed=1)[0] == latent_quality(codes, attributes, seed=1)[0]
    assert latent_quality(codes, attributes, seed=1)[0] != latent_quality(codes, attributes, seed=2)[0]


# Nonlinear R2


def test_nonlinear_r2_finds_what_is_bent_or_mixed():
    factors = normal(2)
    np.testing.assert_allclose(nonlinear_r2(factors @ np.array([[1.0, 2], [0.5, -1]]) + 7, factors), 1.0, atol=0.01)
    np.testing.assert_allclose(nonlinear_r2(np.exp(factors), factors), 1.0, atol=0.02)
    folded = np.column_stack((np.abs(factors[:, 0]), np.sign(factors[:, 0])))
    assert linear_r2(folded, factors[:, :1])[0] < 0.7
    np.testing.assert_allclose(nonlinear_r2(folded, factors), [1, 0], atol=0.02)


def test_nonlinear_r2_of_what_is_lost():
    factors = normal(1)
    for codes in (factors**2, normal(3, seed=4), np.full((N, 2), 0.1)):
        np.testing.assert_allclose(nonlinear_r2(codes, factors), 0.0, atol=0.02)
    np.testing.assert_allclose(nonlinear_r2(factors + normal(1, seed=5), factors), 0.5, atol=0.03)
    np.testing.assert_allclose(nonlinear_r2(factors, factors**2), 1.0, atol=0.02)
    assert linear_r2(factors, factors**2)[0] < 0.01


def test_nonlinear_r2_does_not_see_scale_or_other_factors():
    codes, factors = normal(3, 1000), normal(3, 1000) @ np.array([[1.0, 0], [1, 1], [0, 2]])
    score = nonlinear_r2(codes, factors, seed=3)
    np.testing.assert_allclose(nonlinear_r2(codes * [1e-3, 8, -1] + 5, factors[:, 1:] * 1e4 - 9, seed=3), score[1:], atol=0.01)
    np.testing.assert_array_equal(nonlinear_r2(codes, factors[:, 1:], seed=3), score[1:])


# Errors

WITH_CLASSES = [factor_vae_score, beta_vae_score, modularity, irs, sap]
WITH_TEST_ROWS = [dci, sap_discrete, explicitness]


@pytest.mark.parametrize("metric", [*WITH_CLASSES, nonlinear_r2, tad, latent_quality, auroc_matrix])
def test_rows_that_do_not_match(metric):
    with pytest.raises(ValueError, match="expected 20 rows, as codes has, found 10"):
        metric(np.zeros((20, 2)), np.zeros((10, 2)))


@pytest.mark.parametrize(
    "metric", [*WITH_CLASSES, nonlinear_r2, tad, latent_quality, auroc_matrix, gaussian_total_correlation, mean_pairwise_mi]
)
@pytest.mark.parametrize("codes", [np.zeros(20), np.zeros((20, 0)), np.full((20, 2), np.nan)], ids=["rank", "empty", "nan"])
def test_codes_that_are_no_table(metric, codes):
    others = () if metric in (gaussian_total_correlation, mean_pairwise_mi) else (classes([2, 2], 20),)
    with pytest.raises(ValueError, match=r"codes: expected (\[N, columns\]|finite numbers)"):
        metric(codes, *others)


@pytest.mark.parametrize("metric", WITH_CLASSES)
def test_factors_that_do_not_vary(metric):
    with pytest.raises(ValueError, match="column 1; drop it"):
        metric(normal(2, 20), np.column_stack((classes([3], 20), np.zeros(20, int))))


@pytest.mark.parametrize("metric", [factor_vae_score, beta_vae_score, modularity, irs])
def test_classes_that_are_no_whole_numbers(metric):
    with pytest.raises(ValueError, match="factor_classes: expected whole numbers"):
        metric(normal(2, 20), normal(2, 20))


@pytest.mark.parametrize("metric", [factor_vae_score, beta_vae_score, modularity])
def test_too_few_factors(metric):
    with pytest.raises(ValueError, match="factor_classes: expected at least 2 columns, one per factor, found 1"):
        metric(normal(2, 20), classes([3], 20))


@pytest.mark.parametrize("metric", WITH_TEST_ROWS)
def test_test_rows_that_do_not_match(metric):
    codes, factors = normal(3, 20), classes([2, 2], 20)
    with pytest.raises(ValueError, match="test_codes: expected 3 columns, as codes has, found 2"):
        metric(codes, factors, codes[:, :2], factors)
    with pytest.raises(ValueError, match="test_classes: expected 2 columns, as factor_classes has, found 1"):
        metric(codes, factors, codes, factors[:, :1])
    with pytest.raises(ValueError, match="test_classes: expected 20 rows, as test_codes has, found 10"):
        metric(codes, factors, codes, factors[:10])
    with pytest.raises(ValueError, match="test_classes: expected whole numbers"):
        metric(codes, factors, codes, factors + 0.5)
    with pytest.raises(ValueError, match="factor_classes: expected at least two values in every column, found one in column 0"):
        metric(codes, np.zeros((20, 2)), codes, factors)


def test_other_misuse():
    codes, pair = normal(2, 20), classes([2, 2], 20)
    with pytest.raises(ValueError, match="codes: expected at least 2 columns, found 1"):
        dci(codes[:, :1], pair, codes[:, :1], pair)
    with pytest.raises(ValueError, match="factor_classes: expected at least 2 columns, one per factor, found 1"):
        dci(codes, pair[:, :1], codes, pair[:, :1])
    with pytest.raises(ValueError, match=r"matrix: expected at least two codes and two factors, \[D, K\], found shape \[3, 1\]"):
        dci_from_importance(np.ones((3, 1)))
    with pytest.raises(ValueError, match="matrix: expected no negative importance, found -1"):
        dci_from_importance(-np.ones((3, 3)))
    with pytest.raises(ValueError, match=r"matrix: expected \[D, K\] with K >= 2"):
        modularity_from_mi(np.ones((3, 1)))
    with pytest.raises(ValueError, match="batch_size: expected at least 2"):
        factor_vae_score(codes, pair, batch_size=1)
    with pytest.raises(ValueError, match="protocol: expected nashae or infodiffusion, found 'celeba'"):
        tad(codes, pair, protocol="celeba")
    for metric in (tad, latent_quality, auroc_matrix):
        with pytest.raises(ValueError, match="attributes: expected 0 and 1 only"):
            metric(codes, 2 * pair - 1)
    with pytest.raises(ValueError, match="attributes: expected 0 and 1 only"):
        redundancy(2 * pair - 1)
    with pytest.raises(ValueError, match="codes: expected at least 5 rows, one per fold, found 4"):
        tad(codes[:4], pair[:4], protocol="infodiffusion")
    with pytest.raises(ValueError, match="attributes: expected at least 5 rows of either value, found 0 in column 1; drop it"):
        latent_quality(codes, pair * [1, 0])
    with pytest.raises(ValueError, match="codes: expected at least 40 rows, half to fit and half to score, found 20"):
        nonlinear_r2(codes, codes)
    with pytest.raises(ValueError, match="codes: expected at least two columns"):
        mean_pairwise_mi(codes[:, :1])
    with pytest.raises(ValueError, match="codes: expected at least two rows"):
        gaussian_total_correlation(codes[:1])
