"""Do the codes contain the factors (linear and nonlinear R2), and one factor each (MCC)?

All are blind to scale: an untrained encoder or a dead dimension can score high. Score *sampled* codes, or live dimensions only.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.stats import rankdata
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score
from sklearn.neural_network import MLPRegressor
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from .checks import as_tables

CORRELATIONS = ("spearman", "pearson")
MIN_ROWS_PER_CODE = 20


def linear_r2(codes: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Held-out R2 of each factor under least squares from all codes; fitted on the first half, scored on the second.

    Ordinary least squares where there are at least 20 rows per code to fit on; with fewer, such as for pixels, ridge regression, its
    penalty chosen by leave-one-out on the first half. That one sees the codes' scales among each other: a pixel that is rarely lit is not
    magnified.

    Args:
        codes: [N, D].
        factors: [N, F].
    Returns:
        [F], 1 is perfect, 0 is no better than the mean, negative is worse.
    Raises:
        ValueError: lengths differ, wrong rank, values that are not finite, fewer than 4 rows, or a factor that does not vary.
    """
    codes, factors = as_tables(codes=codes, factors=factors)
    half = _half(codes, factors, 4)
    if half < MIN_ROWS_PER_CODE * codes.shape[1]:
        penalties = np.logspace(-3, 4, 15) * max(codes[:half].var(0).mean(), 1e-300)
        model = RidgeCV(penalties, alpha_per_target=True).fit(codes[:half], factors[:half])
        return r2_score(factors[half:], model.predict(codes[half:]).reshape(factors[half:].shape), multioutput="raw_values")
    design = np.column_stack((codes, np.ones(len(codes))))
    solution, *_ = np.linalg.lstsq(design[:half], factors[:half], rcond=None)
    return r2_score(factors[half:], design[half:] @ solution, multioutput="raw_values")


def nonlinear_r2(codes: np.ndarray, factors: np.ndarray, seed: int = 0) -> np.ndarray:
    """Held-out R2 of each factor under a small network from all codes; fitted on the first half, scored on the second.

    One network per factor: two hidden layers of 64 ReLU, Adam on the squared error, stopped early on a tenth of its half. Codes and factors
    are standardised first. Where it is well above `linear_r2`, the factor is in the codes but bent or folded.

    Args:
        codes: [N, D].
        factors: [N, F]. A factor that depends on the codes with a jump, such as an angle at 0, is better given by its sine and cosine.
        seed: Of the initial weights, the batches and the rows to stop on.
    Returns:
        [F], 1 is perfect, 0 is no better than the mean, negative is worse.
    Raises:
        ValueError: as in `linear_r2`, with at least 40 rows.
    """
    codes, factors = as_tables(codes=codes, factors=factors)
    half = _half(codes, factors, 40)
    codes, factors = (StandardScaler().fit(values[:half]).transform(values) for values in (codes, factors))
    settings = {"hidden_layer_sizes": (64, 64), "early_stopping": True, "max_iter": 1000, "random_state": seed}
    # The matrices are small: alone, a second thread gains a sixth of the time; beside another program, it takes four times as long.
    with threadpool_limits(1, user_api="blas"):
        guesses = [MLPRegressor(**settings).fit(codes[:half], factor[:half]).predict(codes[half:]) for factor in factors.T]
    return r2_score(factors[half:], np.column_stack(guesses), multioutput="raw_values")


def _half(codes: np.ndarray, factors: np.ndarray, rows: int) -> int:
    """The row at which the held-out half begins, of at least `rows` rows."""
    if len(codes) < rows:
        raise ValueError(f"codes: expected at least {rows} rows, half to fit and half to score, found {len(codes)}")
    half = len(codes) // 2
    if (constant := np.flatnonzero(np.ptp(factors[half:], axis=0) == 0)).size:
        raise ValueError(f"factors: expected values that vary in the second half, found one value in column {constant[0]}; drop it")
    return half


def correlation_matrix(codes: np.ndarray, factors: np.ndarray, kind: str = "spearman") -> np.ndarray:
    """|correlation| of every factor with every code.

    Args:
        codes: [N, D].
        factors: [N, F].
        kind: "spearman" (of ranks: any monotonic code scores 1) or "pearson" (a linear code scores 1).
    Returns:
        [F, D] in [0, 1]; 0 where either is constant.
    Raises:
        ValueError: lengths differ, wrong rank, values that are not finite, or another kind.
    """
    if kind not in CORRELATIONS:
        raise ValueError(f"kind: expected {' or '.join(CORRELATIONS)}, found {kind!r}")

    def unit(columns: np.ndarray) -> np.ndarray:
        if kind == "spearman":
            columns = rankdata(columns, axis=0)
        varies = np.ptp(columns, axis=0) > 0  # asked of the values: rounding leaves a centred constant a little off 0
        centred = np.where(varies, columns - columns.mean(0), 0.0)
        centred /= np.where(varies, np.abs(centred).max(0), 1.0)  # the squares of tiny numbers are 0, and what is divided by it counts as 1
        return centred / np.where(varies, np.linalg.norm(centred, axis=0), 1.0)

    codes, factors = as_tables(codes=codes, factors=factors)
    return np.abs(unit(factors).T @ unit(codes)).clip(max=1.0)


def mcc(codes: np.ndarray, factors: np.ndarray, kind: str = "spearman") -> tuple[float, np.ndarray]:
    """Mean correlation coefficient after the one-to-one matching of factors to codes that makes it largest.

    Args:
        codes, factors, kind: As in `correlation_matrix`.
    Returns:
        The mean over factors (an unmatched factor, D < F, counts 0) and the matched correlation of each factor. [F].
    Raises:
        ValueError: as in `correlation_matrix`.
    """
    matrix = correlation_matrix(codes, factors, kind)
    rows, columns = linear_sum_assignment(-matrix)
    matched = np.zeros(matrix.shape[0])
    matched[rows] = matrix[rows, columns]
    return float(matched.mean()), matched
