"""Interventional robustness score (Suter et al., arXiv:1811.00007) with the settings of disentanglement_lib."""

import numpy as np

from .checks import as_codes_and_classes


def irs(codes: np.ndarray, factor_classes: np.ndarray) -> tuple[float, np.ndarray]:
    """How little does a code move while one factor stays and the others change?

        1 - min_k mean_{values of k} q99 |z_d - E[z_d | value]| / max |z_d - E z_d|,   q99 the 99th percentile

    averaged over codes with max |z_d - E z_d| as their weight. Not corrected for chance: pure noise scores about 0.35.

    Args:
        codes: [N, D].
        factor_classes: [N, K] ints.
    Returns:
        The weighted mean, and the score of each code. [D]; 0, without weight, where a code is constant.
    Raises:
        ValueError: lengths differ, wrong rank, values that are not finite, or a factor with a single value.
    """
    codes, factor_classes = as_codes_and_classes(codes, factor_classes)
    largest = np.where(np.ptp(codes, axis=0) > 0, np.abs(codes - codes.mean(0)).max(0), 0.0)

    def spread(rows: np.ndarray) -> np.ndarray:
        return np.percentile(np.abs(rows - rows.mean(0)), 99, axis=0)

    spreads = [np.mean([spread(codes[factor == value]) for value in np.unique(factor)], axis=0) for factor in factor_classes.T]
    per_code = np.where(largest > 0, 1.0 - np.min(spreads, axis=0) / np.where(largest > 0, largest, 1.0), 0.0)
    return (float(np.average(per_code, weights=largest)) if largest.any() else 0.0), per_code
