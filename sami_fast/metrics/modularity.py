"""Modularity and explicitness (Ridgeway & Mozer, arXiv:1802.05312) with the settings of disentanglement_lib."""

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from .checks import as_codes_and_classes, as_split, as_table
from .mig import discretize, mutual_information


def modularity(codes: np.ndarray, factor_classes: np.ndarray, bins: int = 20) -> tuple[float, np.ndarray]:
    """Does a code know of one factor only? Pure noise does not score 0 but about 0.25 for five factors of ten classes.

    Noise: however many rows, the largest of K estimates of an information of 0 is well above the others.

    Args:
        codes: [N, D] floats, binned here.
        factor_classes: [N, K] ints, K >= 2.
        bins: Number of equal-width bins per code.
    Returns:
        The mean over codes, and the score of each. [D].
    Raises:
        ValueError: lengths differ, wrong rank, values that are not finite, fewer than two factors, or a factor with a single value.
    """
    codes, factor_classes = as_codes_and_classes(codes, factor_classes, columns=2)
    return modularity_from_mi(mutual_information(discretize(codes, bins), factor_classes).T)


def modularity_from_mi(matrix: np.ndarray) -> tuple[float, np.ndarray]:
    """Modularity of a table of mutual information.

        1 - sum_{k != best} I_dk^2 / (I_d,best^2 (K - 1))

    Args:
        matrix: [D, K] nats, K >= 2: the transpose of `mutual_information`. A code that knows nothing of any factor scores 0 and
            stays in the mean.
    Returns:
        The mean over codes, and the score of each. [D].
    Raises:
        ValueError: wrong rank, values that are not finite or negative, or fewer than two factors.
    """
    matrix = as_table("matrix", matrix)
    if matrix.shape[1] < 2 or (matrix < 0).any():
        raise ValueError(f"matrix: expected [D, K] with K >= 2, none negative, found shape {list(matrix.shape)}, least {matrix.min():g}")
    largest = matrix.max(1)
    knows = largest > 1e-12  # less is rounding
    squares = (matrix / np.where(knows, largest, 1.0)[:, None]) ** 2
    per_code = np.where(knows, 1.0 - (squares.sum(1) - 1.0) / (matrix.shape[1] - 1), 0.0)
    return float(per_code.mean()), per_code


def explicitness(
    codes: np.ndarray, factor_classes: np.ndarray, test_codes: np.ndarray, test_classes: np.ndarray
) -> tuple[float, np.ndarray]:
    """Can the classes be read off linearly? Test AUROC of a logistic regression on all codes, standardised by their training rows.

    Args:
        codes: [N, D], to fit on; a constant one changes nothing.
        factor_classes: [N, K] ints.
        test_codes, test_classes: [M, D] and [M, K], to score on.
    Returns:
        The mean over factors, and that of each over its classes, each against the rest; chance 0.5, perfect 1. [K]. Classes that only one
        of the two sets holds are left out.
    Raises:
        ValueError: lengths or columns differ, wrong rank, values that are not finite, a factor with a single value, or no class in common.
    """
    codes, factor_classes, test_codes, test_classes = as_split(codes, factor_classes, test_codes, test_classes)

    def one(k: int) -> float:
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(codes, factor_classes[:, k])
        chances = model.predict_proba(test_codes).T
        known = [roc_auc_score(test_classes[:, k] == c, p) for c, p in zip(model.classes_, chances, strict=True) if c in test_classes[:, k]]
        if not known:
            raise ValueError(f"test_classes: expected a class that factor_classes holds too, found none in column {k}")
        return np.mean(known)

    per_factor = np.array([one(k) for k in range(factor_classes.shape[1])])
    return float(per_factor.mean()), per_factor
