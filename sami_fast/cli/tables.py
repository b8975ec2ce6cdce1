"""Encodings as a table, a row for each image: Parquet or CSV."""

import csv
import io
import itertools
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .files import write_bytes


def columns_of(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """What `encode` has found, as columns of one length, in the order of reading.

    Returns:
        image, the number of the row; file and frame, where there are any; mu_0 ... and std_0 ..., the places along axes and the factors, by
        their names, float32, NaN where an image cannot be read; and why it cannot be, absent, where there is such an image. Of equal names
        the second one gets _2 behind it, and so on.
    """
    columns: dict[str, Any] = {"image": np.arange(len(arrays["mu"]))}
    if "files" in arrays:
        columns["file"] = [*map(_text, arrays["files"])]
    if "frames" in arrays:
        columns["frame"] = np.asarray(arrays["frames"])
    for name, values in (("mu", arrays["mu"]), ("std", np.sqrt(arrays["var"]))):
        columns |= {f"{name}_{latent}": values[:, latent] for latent in range(values.shape[1])}
    for values, names, kind in (("axes", "axis_names", "axis"), ("factors", "factor_names", "factor")):
        if values in arrays:
            for place, name in enumerate(arrays[names]):
                columns[_free(f"{kind}_{_text(name)}", columns)] = np.asarray(arrays[values])[:, place]
    if "absent" in arrays:
        columns["absent"] = [*map(_text, arrays["absent"])]
    return columns


def _free(name: str, taken: Collection[str]) -> str:
    """The name, or where it is taken the first that is free of it with _2, _3, ... behind it."""
    names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
    return next(each for each in names if each not in taken)


def _text(text: object) -> str:
    """As UTF-8 can hold it: the bytes of a file's name need not be text."""
    return str(text).encode(errors="backslashreplace").decode()


def write_parquet(path: Path, columns: Mapping[str, Any]) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError("--output: .parquet needs pyarrow, which is not installed; `pip install 'sami-fast[parquet]'`") from None
    stream = io.BytesIO()
    parquet.write_table(pyarrow.table(dict(columns)), stream)
    write_bytes(path, stream.getvalue())


def write_csv(path: Path, columns: Mapping[str, Any]) -> None:
    """In UTF-8; what is NaN is left empty, as programs that read tables expect it."""
    stream = io.StringIO(newline="")
    rows = csv.writer(stream, lineterminator="\n")
    rows.writerow(columns)
    rows.writerows(zip(*map(_cells, columns.values()), strict=True))
    write_bytes(path, stream.getvalue().encode())


def _cells(values: Any) -> list[Any]:
    if not isinstance(values, np.ndarray):
        return list(values)
    return ["" if math.isnan(value) else str(value) for value in values]  # of a float32, as few digits as say which it is
