"""Do the codes contain the factors (linear R2), and one factor each (MCC)?

Both are blind to scale: an untrained encoder or a dead dimension can score high. Score *sampled* codes, or live dimensions only.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.stats import rankdata


def linear_r2(codes: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Held-out R2 of each factor under ordinary least squares from all codes; fitted on the first half, scored on the second.

    Args:
        codes: [N, D]. factors: [N, F].
    Returns:
        [F], 1 is perfect, 0 is no better than the mean, negative is worse.
    """
    half = len(codes) // 2
    design = np.column_stack((codes, np.ones(len(codes))))
    solution, *_ = np.linalg.lstsq(design[:half], factors[:half], rcond=None)
    held_out = factors[half:]
    residual = ((held_out - design[half:] @ solution) ** 2).sum(0)
    return 1.0 - residual / ((held_out - held_out.mean(0)) ** 2).sum(0)


def correlation_matrix(codes: np.ndarray, factors: np.ndarray, kind: str = "spearman") -> np.ndarray:
    """|correlation| of every factor with every code. [F, D]; 0 where either is constant.

    Args:
        codes: [N, D]. factors: [N, F].
        kind: "pearson" or "spearman".
    """
    if kind not in ("pearson", "spearman"):
        raise ValueError(f"kind: expected pearson or spearman, found {kind!r}")
    columns = (rankdata(a, axis=0) if kind == "spearman" else a.astype(np.float64) for a in (factors, codes))
    centred = [a - a.mean(0) for a in columns]
    scales = [np.linalg.norm(a, axis=0) for a in centred]
    unit = [np.divide(a, s, out=np.zeros_like(a), where=s > 0) for a, s in zip(centred, scales, strict=True)]
    return np.abs(unit[0].T @ unit[1])


def mcc(codes: np.ndarray, factors: np.ndarray, kind: str = "spearman") -> tuple[float, np.ndarray]:
    """Mean correlation coefficient after the best one-to-one matching of factors to codes.

    Returns:
        The mean over factors (an unmatched factor counts 0) and the matched correlation of each factor. [F].
    """
    matrix = correlation_matrix(codes, factors, kind)
    rows, columns = linear_sum_assignment(-matrix)
    matched = np.zeros(matrix.shape[0])
    matched[rows] = matrix[rows, columns]
    return float(matched.mean()), matched
