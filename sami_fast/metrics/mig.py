"""Mutual information gap (Chen et al., arXiv:1802.04942) with the binning of disentanglement_lib."""

import numpy as np
from sklearn.metrics import mutual_info_score

from .checks import as_codes_and_classes, as_table


def discretize(values: np.ndarray, bins: int = 20) -> np.ndarray:
    """Equal-width bins per column, from the column's minimum to its maximum.

    Args:
        values: [N, D] floats.
        bins: Number of bins; a constant column falls in one of them.
    Returns:
        [N, D] ints in 1..bins.
    Raises:
        ValueError: wrong rank, values that are not finite, or no bins.
    """
    values = as_table("values", values)
    if bins < 1:
        raise ValueError(f"bins: expected at least 1, found {bins}")
    # The maximum closes the last bin, so the last edge is left out.
    edges = [np.linspace(column.min(), column.max(), bins + 1)[:-1] for column in values.T]
    return np.stack([np.digitize(column, edge) for column, edge in zip(values.T, edges, strict=True)], axis=1)


def mutual_information(codes: np.ndarray, factor_classes: np.ndarray) -> np.ndarray:
    """Plug-in mutual information of discrete columns, without bias correction.

    Args:
        codes: [N, D] ints.
        factor_classes: [N, F] ints.
    Returns:
        [F, D], nats.
    """
    return np.array([[mutual_info_score(factor, code) for code in codes.T] for factor in factor_classes.T])


def mig(codes: np.ndarray, factor_classes: np.ndarray, bins: int = 20) -> tuple[float, np.ndarray]:
    """Gap between the two codes that know most about a factor, as a share of the factor's entropy.

        MIG = mean_F [ (I_1 - I_2) / H(factor) ],   I_1 >= I_2 the largest two of I(binned code; factor); I_2 = 0 for a single code

    Its bias upwards in I is about (bins - 1)^2 / 2N nats for codes and factors that know nothing of each other.

    Args:
        codes: [N, D] floats, binned here.
        factor_classes: [N, F] ints; bin continuous factors with `discretize` first.
        bins: Number of equal-width bins per code.
    Returns:
        The mean over factors, and the gap of each. [F].
    Raises:
        ValueError: lengths differ, wrong rank, values that are not finite, or a factor with a single value (its entropy is 0: drop it).
    """
    codes, factor_classes = as_codes_and_classes(codes, factor_classes)
    entropy = np.array([mutual_info_score(factor, factor) for factor in factor_classes.T])
    information = np.sort(mutual_information(discretize(codes, bins), factor_classes), axis=1)[:, ::-1]
    runner_up = information[:, 1] if information.shape[1] > 1 else 0.0
    gaps = (information[:, 0] - runner_up) / entropy
    return float(gaps.mean()), gaps


def mig_ceiling(factors: np.ndarray, factor_classes: np.ndarray) -> float:
    """MIG of the perfect code: one dimension per factor, equal to it, under the same binning.

    At most 1; less where a factor has more values than there are bins, and less by the bias of I_2 on few images.

    Args:
        factors: [N, F] values of the factors.
        factor_classes: [N, F] ints, the classes that the codes themselves are scored against.
    Raises:
        ValueError: as in `mig`.
    """
    return mig(factors, factor_classes)[0]
