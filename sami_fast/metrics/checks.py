"""What every metric asks of its arguments."""

import numpy as np

LARGEST = 1e30  # of a value: its square, and what trees and kernels make of it, stay finite


def as_finite(name: str, values: np.ndarray) -> np.ndarray:
    """The values as float64, of the same shape.

    Raises:
        ValueError: no real numbers, NaN or infinity among them, or one beyond 1e30 either way.
    """
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name}: expected real numbers, found {array.dtype}")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite numbers, found NaN or infinity")
    if array.size and (largest := np.abs(array).max()) > LARGEST:
        raise ValueError(f"{name}: expected numbers of at most {LARGEST:g} either way, found {largest:g}")
    return array


def as_table(name: str, values: np.ndarray) -> np.ndarray:
    """The values as float64 [N, columns].

    Raises:
        ValueError: as `as_finite`; or not two axes, no rows or no columns.
    """
    table = as_finite(name, values)
    if table.ndim != 2 or 0 in table.shape:
        raise ValueError(f"{name}: expected [N, columns], none of them 0, found shape {list(table.shape)}")
    return table


def as_tables(**named: np.ndarray) -> list[np.ndarray]:
    """Several arguments of one call, each as by `as_table`.

    Raises:
        ValueError: as `as_table`; or the numbers of rows differ.
    """
    tables = [as_table(name, values) for name, values in named.items()]
    first = next(iter(named))
    for name, table in zip(named, tables, strict=True):
        if len(table) != len(tables[0]):
            raise ValueError(f"{name}: expected {len(tables[0])} rows, as {first} has, found {len(table)}")
    return tables


def as_codes_and_classes(
    codes: np.ndarray, factor_classes: np.ndarray, *, columns: int = 1, prefix: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    """Codes as float64 [N, D] and the classes of their factors as int64 [N, K].

    Args:
        codes, factor_classes: One row per image.
        columns: The least number of factors.
        prefix: "test_" where the arguments are called test_codes and test_classes.
    Raises:
        ValueError: as `as_tables`; or a class is no whole number, a factor has a single value, or there are too few factors.
    """
    name = f"{prefix}classes" if prefix else "factor_classes"
    codes, classes = as_tables(**{f"{prefix}codes": codes, name: factor_classes})
    if (classes != np.round(classes)).any() or np.abs(classes).max() > 2**53:
        raise ValueError(f"{name}: expected whole numbers of at most 2^53; bin continuous factors with discretize first")
    if (constant := np.flatnonzero(np.ptp(classes, axis=0) == 0)).size:
        raise ValueError(f"{name}: expected at least two values in every column, found one in column {constant[0]}; drop it")
    if classes.shape[1] < columns:
        raise ValueError(f"{name}: expected at least {columns} columns, one per factor, found {classes.shape[1]}")
    return codes, classes.astype(np.int64)


def as_split(
    codes: np.ndarray, factor_classes: np.ndarray, test_codes: np.ndarray, test_classes: np.ndarray, *, columns: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The four arguments of a metric that learns on some rows and is scored on others, each pair as by `as_codes_and_classes`.

    Raises:
        ValueError: as `as_codes_and_classes`; or the two pairs differ in their columns.
    """
    codes, factor_classes = as_codes_and_classes(codes, factor_classes, columns=columns)
    test_codes, test_classes = as_codes_and_classes(test_codes, test_classes, prefix="test_")
    for name, test, train_name, train in (
        ("test_codes", test_codes, "codes", codes),
        ("test_classes", test_classes, "factor_classes", factor_classes),
    ):
        if test.shape[1] != train.shape[1]:
            raise ValueError(f"{name}: expected {train.shape[1]} columns, as {train_name} has, found {test.shape[1]}")
    return codes, factor_classes, test_codes, test_classes
