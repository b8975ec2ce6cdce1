"""Labels of one's own files: a table of factors and attributes, and groups of files that are held out whole."""

import csv
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Self

import numpy as np

from ..errors import UserError, one_line
from ..files import absent
from .storage import held_out_places

FILE_COLUMNS = ("file", "image_id", "filename")  # which column names the files; the first column where there is none of these
MAX_CATEGORIES = 20  # different texts of a column that are told apart; a column with more, such as of names, is not scored
TRUTH = {"true": 1.0, "false": 0.0}

Table = dict[str, list[str]]  # columns of equal length by name; a cell without a value is ""


@dataclass(frozen=True)
class Column:
    """A column of texts, in a form that stays small where they repeat.

    Args:
        texts: The different ones, without blanks around them; "" where there is none.
        codes: Which of them each row has. [N] int32.
    """

    texts: list[str]
    codes: np.ndarray

    @classmethod
    def of(cls, cells: Iterable[str]) -> Self:
        texts: dict[str, int] = {}
        codes = np.fromiter((texts.setdefault(cell.strip(), len(texts)) for cell in cells), np.int32)
        return cls([*texts], codes)


@dataclass(frozen=True)
class Labels:
    """What a table says of files, in the files' order.

    Args:
        names: Of the factors and attributes, in the order of the columns.
        attributes: Those of them that are attributes, 0 or 1.
        values: [N, F] float32.
        groups: The column that was asked for, a text for each file; None: none was.
        unscored: Columns that are neither factors nor attributes.
    """

    names: tuple[str, ...]
    attributes: frozenset[str]
    values: np.ndarray
    groups: list[str] | None
    unscored: tuple[str, ...]


def read_labels(path: str, files: Sequence[str], ignored: Collection[str] = (), group: str = "") -> Labels:
    """A table with a row for each file, joined with the files.

    A column of numbers is a factor, or an attribute if it has two different ones, the larger of which is 1. A column of true and false is
    an attribute. A column of at most `MAX_CATEGORIES` different texts gives an attribute `column=text` for each of them, or for the second
    where there are two. A column with one value, and one with more texts, is not scored, nor is the one that groups the files.

    Args:
        path: .csv, UTF-8 with commas and names in its first line, or .parquet. Files are named relative to their folder.
        files: Names of files, which all need a row.
        ignored: Names of files that may have a row.
        group: A column that says to which group a file belongs; "": none.
    Raises:
        UserError: missing or damaged table, no such column, no column to score, a file that is missing here or there or is twice, a cell
            that is no number among numbers.
    """
    return labels_of(read_columns(path, files, ignored, group), files, path, group)


def read_columns(path: str, files: Sequence[str], ignored: Collection[str] = (), group: str = "") -> dict[str, Column]:
    """The columns of a table but that of the files, with a row for each file. Arguments and errors as in `read_labels`."""
    table = _read(Path(path))
    key = next((name for name in FILE_COLUMNS if name in table), next(iter(table)))
    if group and group not in table:
        raise UserError(f"data.holdout_by: no column {group!r} in {path}, which has {', '.join(table)}")
    rows: dict[str, int] = {}
    for row, name in enumerate(table[key]):
        if rows.setdefault(name.replace("\\", "/").removeprefix("./"), row) != row:
            raise UserError(f"data.labels: {name} is more than once in column {key!r} of {path}")
    if unknown := sorted(rows.keys() - {*files} - {*ignored}):
        found = f"{len(unknown)} file(s) that are not in the folder, such as {unknown[0]}"
        raise UserError(f"data.labels: column {key!r} of {path} names {found}")
    if missing := [name for name in files if name not in rows]:
        raise UserError(f"data.labels: {len(missing)} of {len(files)} files have no row in {path}, such as {missing[0]}")
    order = [rows[name] for name in files]
    return {name: Column.of(cells[row] for row in order) for name, cells in table.items() if name == group or name != key}


def labels_of(columns: Mapping[str, Column], files: Sequence[str], path: str, group: str = "") -> Labels:
    """Factors and attributes by the rules of `read_labels`.

    Args:
        columns: By name; each has a row for every file.
        files, group: As in `read_labels`.
        path: Where the columns stand, for messages.
    Raises:
        UserError: no column to score, or a cell that is no number among numbers.
    """
    scored: dict[str, np.ndarray] = {}
    attributes, unscored = set(), []
    for name, column in columns.items():
        if name == group:
            continue
        found = _scored(name, column, files, path)
        if twice := sorted(found.keys() & scored.keys()):
            raise UserError(f"data.labels: two columns of {path} make the label {twice[0]!r}; name one of them differently")
        scored |= found
        attributes |= {one for one, values in found.items() if len(np.unique(values)) == 2}
        unscored += [] if found else [name]
    if not scored and not group:
        wanted = f"different numbers, true and false, or 2 to {MAX_CATEGORIES} different texts"
        raise UserError(f"data.labels: no column of {path} has {wanted}")
    values = np.column_stack([*scored.values()]) if scored else np.empty((len(files), 0))
    groups = [columns[group].texts[code] for code in columns[group].codes] if group else None
    return Labels(tuple(scored), frozenset(attributes), values.astype(np.float32), groups, tuple(unscored))


def held_out_files(files: Sequence[str], groups: Sequence[str] | None, holdout: float, split: int) -> np.ndarray:
    """Which files a split sees: a fixed random share of them is held out, or of the groups where there are any.

    Args:
        files: Names.
        groups: The group of each file; None: each is on its own.
        holdout, split: As in `held_out_places`.
    Returns:
        [n] int64, ascending.
    Raises:
        UserError: all files are of one group, and some are to be held out.
    """
    if groups is None:
        return held_out_places(len(files), holdout, split)
    different = sorted({*groups})
    if holdout > 0 and len(different) < 2:
        raise UserError(f"data.holdout_by: expected two groups of files or more, found all {len(files)} in {different[0]!r}")
    shown = {different[place] for place in held_out_places(len(different), holdout, split)}
    return np.flatnonzero([group in shown for group in groups])


def folders_of(files: Sequence[str]) -> list[str]:
    """The name of the folder that each file is in, "" where it is in none of its own."""
    return [PurePosixPath(file).parent.name for file in files]


def _scored(name: str, column: Column, files: Sequence[str], path: str) -> dict[str, np.ndarray]:
    """The factor or the attributes of one column, [N] float64 by name; {} where there are none."""
    texts, codes = column.texts, column.codes
    if {text.lower() for text in texts} <= TRUTH.keys():
        numbers: list[float | None] = [TRUTH[text.lower()] for text in texts]
    else:
        numbers = [_number(text) for text in texts]
    if any(number is not None for number in numbers):
        if None in numbers:
            row = int(np.flatnonzero(np.isin(codes, [code for code, number in enumerate(numbers) if number is None]))[0])
            found = texts[codes[row]][:40]
            raise UserError(f"data.labels: expected a number in column {name!r} of {path} for {files[row]}, found {found!r}")
        values = np.array(numbers, np.float64)[codes]
        different = np.unique(values)
        if len(different) == 2:
            values = (values == different[1]).astype(np.float64)
        return {name: values} if len(different) > 1 else {}
    categories = sorted(texts)
    if not 2 <= len(categories) <= MAX_CATEGORIES:
        return {}
    if "" in categories:
        row = int(np.flatnonzero(codes == texts.index(""))[0])
        raise UserError(f"data.labels: expected a text in column {name!r} of {path} for {files[row]}, found none")
    told = categories[1:] if len(categories) == 2 else categories  # of two, one says all
    return {f"{name}={category}": (codes == texts.index(category)).astype(np.float64) for category in told}


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _read(path: Path) -> Table:
    """The table, which has a column and a row at least."""
    if not path.is_file():
        raise UserError(f"data.labels: {absent(path, 'file')}")
    if path.suffix.lower() not in (".csv", ".parquet"):
        raise UserError(f"data.labels: expected a .csv or .parquet file, found {path}")
    table = _read_csv(path) if path.suffix.lower() == ".csv" else _read_parquet(path)
    if not table or not next(iter(table.values())):
        raise UserError(f"data.labels: no rows in {path}")
    return table


def _read_csv(path: Path) -> Table:
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:  # as spreadsheets write it, too
            reader = csv.reader(stream, strict=True)
            names = [name.strip() for name in next(reader, [])]
            rows = []
            for row in reader:
                if row and len(row) != len(names):
                    found = f"{len(row)} in line {reader.line_num}"
                    raise UserError(f"data.labels: expected {len(names)} values, as {path} has column names, found {found}")
                rows += [row] if row else []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"data.labels: {path} is not a readable .csv file ({error})") from None
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"data.labels: {path} has more than one column {twice!r}")
    return {name: [row[column].strip() for row in rows] for column, name in enumerate(names)}


def _read_parquet(path: Path) -> Table:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"data.labels: {path} needs pyarrow, which is not installed; `pip install 'sami-fast[parquet]'`") from None

    try:
        found = pyarrow.parquet.read_table(path)
        names = [name for name in found.column_names if not name.startswith("__index_level_")]  # row numbers that pandas kept
        return {name: ["" if cell is None else str(cell).strip() for cell in found.column(name).to_pylist()] for name in names}
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # ValueError: a text that is no UTF-8
        raise UserError(f"data.labels: {path} is not a readable .parquet file ({one_line(error)})") from None
