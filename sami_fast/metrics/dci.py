"""Disentanglement, completeness and informativeness (Eastwood & Williams, ICLR 2018) with the trees of disentanglement_lib."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import entropy
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.utils.parallel import Parallel, delayed

from .checks import as_split, as_table


@dataclass(frozen=True)
class DCI:
    """The three scores, in [0, 1]; published columns headed DCI are disentanglement alone."""

    disentanglement: float  # does a code know of one factor only?
    completeness: float  # is a factor known to one code only?
    informativeness: float  # accuracy on the test rows, mean over factors; the original paper reports an error instead
    importance: np.ndarray  # [D, K], of code d for factor k; each column sums to 1, or to 0 where no code helped


def dci(
    codes: np.ndarray, factor_classes: np.ndarray, test_codes: np.ndarray, test_classes: np.ndarray, *, seed: int = 0, jobs: int = 1
) -> DCI:
    """DCI with one gradient-boosted classifier per factor, on all codes; its impurity importances are the matrix.

    Each of its 100 rounds fits a tree per class, so the time is proportional to the number of classes. Random forests are no substitute:
    their importances spread over codes that carry nothing.

    Args:
        codes: [N, D], D >= 2, to fit on.
        factor_classes: [N, K] ints, K >= 2.
        test_codes, test_classes: [M, D] and [M, K], for the accuracy.
        seed: Of the order in which equally good splits are tried.
        jobs: Processes to share the factors; changes no result.
    Raises:
        ValueError: lengths or columns differ, wrong rank, values that are not finite, fewer than two codes or factors, or a factor with a
            single value.
    """
    codes, factor_classes, test_codes, test_classes = as_split(codes, factor_classes, test_codes, test_classes, columns=2)
    if codes.shape[1] < 2:
        raise ValueError(f"codes: expected at least 2 columns, found {codes.shape[1]}")

    def one(factor: np.ndarray, test_factor: np.ndarray) -> tuple[np.ndarray, float]:
        model = GradientBoostingClassifier(random_state=seed).fit(codes, factor)
        return model.feature_importances_.clip(min=0.0), model.score(test_codes, test_factor)  # rounding leaves some at -1e-18

    pairs = zip(factor_classes.T, test_classes.T, strict=True)
    importances, accuracies = zip(*Parallel(n_jobs=jobs)(delayed(one)(*pair) for pair in pairs), strict=True)  # pyrefly: ignore[not-callable]
    matrix = np.column_stack(importances)
    return DCI(*dci_from_importance(matrix), float(np.mean(accuracies)), matrix)


def dci_from_importance(matrix: np.ndarray) -> tuple[float, float]:
    """Disentanglement and completeness of a matrix of importances.

        D = sum_d w_d (1 - H_K(row d)),   C = sum_k w_k (1 - H_D(column k))

    H_K: entropy to the base K of the row as probabilities; the weights are the shares of the rows, or columns, in the total.

    Args:
        matrix: [D, K], none negative, both at least 2. Of all zeros, both scores are 0.
    Raises:
        ValueError: another shape, negative values or values that are not finite.
    Source: Eastwood & Williams, ICLR 2018.
    """
    matrix = as_table("matrix", matrix)
    if min(matrix.shape) < 2:
        raise ValueError(f"matrix: expected at least two codes and two factors, [D, K], found shape {list(matrix.shape)}")
    if (matrix < 0).any():
        raise ValueError(f"matrix: expected no negative importance, found {matrix.min():g}")

    def concentration(rows: np.ndarray) -> float:
        weight = rows.sum(1)
        if not weight.any():
            return 0.0
        # 1e-11 gives a row of zeros a distribution; its weight is 0
        return float(weight @ (1.0 - entropy(rows + 1e-11, base=rows.shape[1], axis=1)) / weight.sum())

    return concentration(matrix), concentration(matrix.T)
