"""Which images lie at the two ends of a latent, or of an axis."""

import numpy as np

from ..metrics.checks import as_finite


def extremes(values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The images with the lowest and those with the highest values.

    Args:
        values: One per image. [N].
        count: Images at each end, >= 1; fewer where they would meet in the middle, so that none stands at both ends.
    Returns:
        Places in `values`, both with increasing values: the first of the lowest and the last of the highest are the very ends. [n] int64
        each.
    Raises:
        ValueError: values is not [N] or not finite, or count is below 1.
    """
    values = as_finite("values", values)
    if values.ndim != 1 or count < 1:
        raise ValueError(f"values, count: expected [N] and at least 1, found {list(values.shape)} and {count}")
    order = np.argsort(values, kind="stable")
    count = min(count, len(order) // 2)
    return order[:count], order[len(order) - count :]
