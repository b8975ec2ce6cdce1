"""Mutual information gap (Chen et al., arXiv:1802.04942) with the binning of disentanglement_lib."""

import numpy as np
from sklearn.metrics import mutual_info_score


def discretize(values: np.ndarray, bins: int = 20) -> np.ndarray:
    """Equal-width bins per column, from the column's minimum to its maximum. [N, D] -> [N, D] ints in 1..bins."""
    columns = [np.digitize(column, np.histogram(column, bins)[1][:-1]) for column in values.T]
    return np.stack(columns, axis=1)


def mig(codes: np.ndarray, factor_classes: np.ndarray, bins: int = 20) -> tuple[float, np.ndarray]:
    """Gap between the two codes that know most about a factor, as a share of the factor's entropy.

    Args:
        codes: [N, D] floats, binned here.
        factor_classes: [N, F] ints; bin continuous factors with `discretize` first.
    Returns:
        The mean over factors, and the gap of each. [F].
    """
    binned = discretize(codes, bins)
    gaps = []
    for factor in factor_classes.T:
        entropy = mutual_info_score(factor, factor)
        information = sorted((mutual_info_score(factor, code) for code in binned.T), reverse=True)
        gaps.append((information[0] - (information[1] if len(information) > 1 else 0.0)) / entropy)
    return float(np.mean(gaps)), np.array(gaps)


def mig_ceiling(factors: np.ndarray, factor_classes: np.ndarray, bins: int = 20) -> float:
    """MIG of the perfect code, one dimension per factor equal to it, under the same binning: at most 1, less where a factor has more values than there are bins."""
    return mig(factors, factor_classes, bins)[0]
