"""How much do codes know of one another? Two scores that need no factors (Locatello et al., arXiv:1811.12359)."""

from itertools import combinations

import numpy as np
from sklearn.metrics import mutual_info_score

from .checks import as_table
from .mig import discretize


def gaussian_total_correlation(codes: np.ndarray) -> float:
    """Total correlation of the Gaussian with the codes' covariance C.

        1/2 ( sum_d ln C_dd - ln det C )

    Args:
        codes: [N, D], N > D; constant ones are left out.
    Returns:
        Nats, >= 0; 0 where codes are uncorrelated, infinite where they are linearly dependent, as they are with N <= D.
    Raises:
        ValueError: wrong rank, values that are not finite, or a single row.
    """
    codes = as_table("codes", codes)
    if len(codes) < 2:
        raise ValueError("codes: expected at least two rows, found 1")
    codes = codes[:, np.ptp(codes, axis=0) > 0]
    if codes.shape[1] < 2:
        return 0.0
    correlation = np.corrcoef(codes / np.ptp(codes, axis=0), rowvar=False)  # the scales drop out; the squares of tiny numbers are 0
    if np.linalg.matrix_rank(correlation, hermitian=True) < len(correlation):
        return float("inf")
    return float(-0.5 * np.linalg.slogdet(correlation).logabsdet)


def mean_pairwise_mi(codes: np.ndarray, bins: int = 20) -> float:
    """Mean mutual information of two different codes, binned.

    Its bias upwards is about (bins - 1)^2 / 2N nats.

    Args:
        codes: [N, D], D >= 2.
        bins: Number of equal-width bins per code.
    Returns:
        Nats, >= 0; constant codes count 0.
    Raises:
        ValueError: wrong rank, values that are not finite, or a single code.
    """
    binned = discretize(as_table("codes", codes), bins)
    if binned.shape[1] < 2:
        raise ValueError("codes: expected at least two columns, found 1")
    return float(np.mean([mutual_info_score(first, second) for first, second in combinations(binned.T, 2)]))
