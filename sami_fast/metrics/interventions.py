"""Which factor was held fixed? The FactorVAE score (Kim & Mnih, arXiv:1802.05983) and the BetaVAE score (Higgins et al., ICLR 2017).

Both draw images that share the class of one factor. Here they are rows of a table: the class is that of a uniformly drawn row, and the
other rows are drawn uniformly, with replacement, from all of that class. If the table is the whole grid of factors, or any table in which
they are independent, this is the published protocol; otherwise what depends on the fixed factor is held with it.
"""

from collections.abc import Callable

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from .checks import as_codes_and_classes

MIN_STD = 0.05  # a code with less is left out of the vote
# Ratios of variances this close are a tie, and the first code wins: two codes that mix two factors equally tie in every batch.
ROUNDING = 1e-9
TRAIN, TEST = 10_000, 5_000  # votes, or points, that are learnt from and scored on
VALUES_AT_ONCE = 1 << 22  # code values gathered together: 32 MiB


def factor_vae_score(codes: np.ndarray, factor_classes: np.ndarray, *, seed: int = 0, batch_size: int = 64) -> tuple[float, int]:
    """Accuracy of a majority vote that names the fixed factor from the code that varies least beside its variance over the table.

    Codes with a standard deviation below 0.05 do not vote: a constant one would win every time. The score is blind to further codes that
    know the same factor, and to small rotations.

    Args:
        codes: [N, D], with a spread of order 1.
        factor_classes: [N, K] ints, K >= 2.
        seed: Of all draws.
        batch_size: Rows in the batch of one vote.
    Returns:
        The accuracy (chance 1 / K; 0 if no code votes), and how many codes were left out.
    Raises:
        ValueError: lengths differ, wrong rank, values that are not finite, fewer than two factors, a factor with a single value, or
            batches of fewer than two rows.
    """
    codes, classes = as_codes_and_classes(codes, factor_classes, columns=2)
    if batch_size < 2:
        raise ValueError(f"batch_size: expected at least 2, for a variance, found {batch_size}")
    varies = codes.std(0, ddof=1) >= MIN_STD
    pruned = int((~varies).sum())
    if not varies.any():
        return 0.0, pruned
    codes = codes[:, varies] / codes[:, varies].std(0, ddof=1)
    generator = np.random.default_rng(seed)
    factor = generator.integers(0, classes.shape[1], TRAIN + TEST)
    first = generator.integers(0, len(codes), len(factor))
    rows = _same_class(classes, factor, np.broadcast_to(first[:, None], (len(factor), batch_size)), generator)

    def steadiest(part: slice) -> np.ndarray:
        ratio = codes[rows[part]].var(1, ddof=1)
        return (ratio <= ratio.min(1, keepdims=True) + ROUNDING).argmax(1)

    winner = _by_chunk(steadiest, rows.shape, codes.shape[1])
    votes = np.zeros((codes.shape[1], classes.shape[1]))
    np.add.at(votes, (winner[:TRAIN], factor[:TRAIN]), 1)
    return float((votes.argmax(1)[winner[TRAIN:]] == factor[TRAIN:]).mean()), pruned


def beta_vae_score(codes: np.ndarray, factor_classes: np.ndarray, *, seed: int = 0, batch_size: int = 64) -> float:
    """Test accuracy of a logistic regression that names the fixed factor from the mean |z_1 - z_2| over pairs that share its class.

    A weak test: a code that misses one of the factors, or turns them into one another, can still score 1.

    Args:
        codes: [N, D], of any spread.
        factor_classes: [N, K] ints, K >= 2.
        seed: Of all draws.
        batch_size: Pairs that are averaged into one point.
    Returns:
        The accuracy, chance 1 / K.
    Raises:
        ValueError: lengths differ, wrong rank, values that are not finite, fewer than two factors, or a factor with a single value.
    """
    codes, classes = as_codes_and_classes(codes, factor_classes, columns=2)
    generator = np.random.default_rng(seed)
    factor = generator.integers(0, classes.shape[1], TRAIN + TEST)
    first = generator.integers(0, len(codes), (len(factor), batch_size))
    second = _same_class(classes, factor, first, generator)
    points = _by_chunk(lambda part: np.abs(codes[first[part]] - codes[second[part]]).mean(1), first.shape, codes.shape[1])
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(points[:TRAIN], factor[:TRAIN])
    return float(model.score(points[TRAIN:], factor[TRAIN:]))


def _same_class(classes: np.ndarray, factor: np.ndarray, rows: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """For every row a uniformly drawn one with the same class of the factor. classes [N, K], factor [V], rows [V, B] -> [V, B]."""
    drawn = np.empty_like(rows)
    for k, column in enumerate(classes.T):
        _, label, count = np.unique(column, return_inverse=True, return_counts=True)
        by_class, start = np.argsort(label, kind="stable"), np.cumsum(count) - count
        wanted = label[rows[factor == k]]
        drawn[factor == k] = by_class[start[wanted] + generator.integers(0, count[wanted])]
    return drawn


def _by_chunk(statistic: Callable[[slice], np.ndarray], shape: tuple[int, int], width: int) -> np.ndarray:
    """The statistic of all [V, B] rows of `width` codes, a bounded number of values at a time."""
    step = max(1, VALUES_AT_ONCE // (shape[1] * width))
    return np.concatenate([statistic(slice(start, start + step)) for start in range(0, shape[0], step)])
