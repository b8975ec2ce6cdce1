"""Do the codes contain the factors (linear R2), and one factor each (MCC)?

Both are blind to scale: an untrained encoder or a dead dimension can score high. Score *sampled* codes, or live dimensions only.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.stats import rankdata

from .checks import as_tables

CORRELATIONS = ("spearman", "pearson")


def linear_r2(codes: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Held-out R2 of each factor under ordinary least squares from all codes; fitted on the first half, scored on the second.

    Args:
        codes: [N, D], with N well above 2 D.
        factors: [N, F].
    Returns:
        [F], 1 is perfect, 0 is no better than the mean, negative is worse.
    Raises:
        ValueError: lengths differ, wrong rank, values that are not finite, fewer than 4 rows, or a factor that does not vary.
    """
    codes, factors = as_tables(codes=codes, factors=factors)
    if len(codes) < 4:
        raise ValueError(f"codes: expected at least 4 rows, two to fit and two to score, found {len(codes)}")
    half = len(codes) // 2
    design = np.column_stack((codes, np.ones(len(codes))))
    solution, *_ = np.linalg.lstsq(design[:half], factors[:half], rcond=None)
    held_out = factors[half:]
    if (constant := np.flatnonzero(np.ptp(held_out, axis=0) == 0)).size:
        raise ValueError(f"factors: expected values that vary in the second half, found one value in column {constant[0]}; drop it")
    residual = ((held_out - design[half:] @ solution) ** 2).sum(0)
    return 1.0 - residual / ((held_out - held_out.mean(0)) ** 2).sum(0)


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
