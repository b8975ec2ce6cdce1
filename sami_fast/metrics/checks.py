"""What every metric asks of its arguments."""

import numpy as np


def as_table(name: str, values: np.ndarray) -> np.ndarray:
    """The values as float64 [N, columns].

    Raises:
        ValueError: not two axes, no rows or columns, or NaN or infinity among the values.
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or 0 in table.shape:
        raise ValueError(f"{name}: expected [N, columns], none of them 0, found shape {list(table.shape)}")
    if not np.isfinite(table).all():
        raise ValueError(f"{name}: expected finite numbers, found NaN or infinity")
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
