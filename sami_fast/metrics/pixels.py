"""How much of the images a linear map reads from codes."""

from collections.abc import Iterable

import numpy as np

from .checks import as_tables

RIDGE = 1e-6  # times the mean variance of the codes: so that codes which depend on each other have one answer

Batch = tuple[np.ndarray, np.ndarray]  # codes [n, D] and the pixels of the same images, [n, P]


def pixel_r2(fitted: Iterable[Batch], scored: Iterable[Batch]) -> float:
    """R2 of all pixels together under least squares from codes: the share of the images' variance that a linear map reads.

    Principal components have the largest that any code of their number can have on the images they are fitted on. What moves is hardly
    read linearly from where it is, so a good code may have less; one that has next to nothing has overlooked what is largest in the images.

    Args:
        fitted: Batches that the map is fitted on; only sums over them are kept.
        scored: Batches of other images that it is scored on.
    Returns:
        1 is perfect, 0 is no better than the mean image, negative is worse.
    Raises:
        ValueError: lengths differ, wrong rank, values that are not finite, no batch to fit on, or images to score on that do not vary.
    """
    products: np.ndarray | None = None
    targets = np.zeros(0)
    for codes, pixels in fitted:
        design, pixels = _design(codes, pixels)
        first = products is None
        products = design.T @ design + (0.0 if first else products)
        targets = design.T @ pixels + (0.0 if first else targets)
    if products is None:
        raise ValueError("fitted: expected images, found none")
    count, columns = products[-1, -1], len(products) - 1
    variance = np.diag(products)[:-1] / count - (products[-1, :-1] / count) ** 2
    penalty = np.diag([*[RIDGE * count * (max(variance.mean(), 0.0) or 1.0)] * columns, 0.0])
    solution = np.linalg.solve(products + penalty, targets)

    missed, squares, total, number = 0.0, 0.0, 0.0, 0
    for codes, pixels in scored:
        design, pixels = _design(codes, pixels)
        missed += np.square(pixels - design @ solution).sum()
        squares += np.square(pixels).sum()
        total = total + pixels.sum(0)
        number += len(pixels)
    spread = squares - np.square(total).sum() / max(1, number)
    if number < 2 or not spread > 0:
        raise ValueError("scored: expected images that vary, found none")
    return float(1.0 - missed / spread)


def _design(codes: np.ndarray, pixels: np.ndarray) -> Batch:
    codes, pixels = as_tables(codes=codes, pixels=pixels)
    return np.column_stack((codes, np.ones(len(codes)))), pixels
