"""Separated attribute predictability (Kumar et al., arXiv:1711.00848): how far the best single code is ahead of the second."""

import numpy as np
from sklearn.svm import LinearSVC

from .checks import as_split, as_tables
from .identifiability import correlation_matrix

MIN_VARIANCE = 1e-12  # a code that varies less is taken as constant


def sap(codes: np.ndarray, factors: np.ndarray) -> tuple[float, np.ndarray]:
    """SAP of continuous factors: the gap between the two largest squared correlations. It does not depend on the codes' scale.

    Args:
        codes: [N, D]; one with a variance of at most 1e-12 scores 0.
        factors: [N, K] values, or the numbers of ordered classes.
    Returns:
        The mean over factors, and the gap of each, in [0, 1]. [K]. A single code has a runner-up of 0.
    Raises:
        ValueError: lengths differ, wrong rank, values that are not finite, or a factor that does not vary.
    """
    codes, factors = as_tables(codes=codes, factors=factors)
    if (constant := np.flatnonzero(np.ptp(factors, axis=0) == 0)).size:
        raise ValueError(f"factors: expected values that vary, found one value in column {constant[0]}; drop it")
    return _gap(np.where(codes.var(0) > MIN_VARIANCE, correlation_matrix(codes, factors, "pearson") ** 2, 0.0))


def sap_discrete(
    codes: np.ndarray, factor_classes: np.ndarray, test_codes: np.ndarray, test_classes: np.ndarray
) -> tuple[float, np.ndarray]:
    """SAP of classes: the gap between the two best test accuracies of a linear support vector machine on a single code.

    The form of published tables, for comparison with them alone: it depends on the scale of the codes, and one line against the rest cannot
    separate the middle classes of an ordered factor. A code equal to the number of the class scores 1 - 1/S for S <= 4 classes, but 0.33
    for 6 and 0.20 for 10.

    Args:
        codes: [N, D], to fit on.
        factor_classes: [N, K] ints.
        test_codes, test_classes: [M, D] and [M, K], to score on.
    Returns:
        As `sap`.
    Raises:
        ValueError: lengths or columns differ, wrong rank, values that are not finite, or a factor with a single value.
    """
    codes, factor_classes, test_codes, test_classes = as_split(codes, factor_classes, test_codes, test_classes)

    def accuracy(d: int, k: int) -> float:
        model = LinearSVC(C=0.01, class_weight="balanced", dual=False).fit(codes[:, [d]], factor_classes[:, k])
        return model.score(test_codes[:, [d]], test_classes[:, k])

    return _gap(np.array([[accuracy(d, k) for d in range(codes.shape[1])] for k in range(factor_classes.shape[1])]))


def _gap(scores: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean and values over rows of the largest score less the second. [K, D]."""
    ranked = np.sort(scores, axis=1)
    gaps = ranked[:, -1] - (ranked[:, -2] if ranked.shape[1] > 1 else 0.0)
    return float(gaps.mean()), gaps
