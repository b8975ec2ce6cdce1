"""Images of parquet files, as Hugging Face datasets have them: a column of image files, and columns of labels.

Parquet is read a row group at a time, so an epoch shows a few row groups at a time, mixed, in random order: see `order.pooled_order`.
"""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Set
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError, one_line
from ..files import open_regular
from .cache import in_words
from .decode import LARGEST_FILE, BadFile
from .index import Index
from .labels import Column
from .order import pooled_order
from .own import IMAGE_KEYS
from .shards import Columns, Names, Shards

POOL = 4096  # images that are mixed with each other
HELD = 1 << 29  # bytes of row groups that a batch may be mixed from, over all ranks; a rank keeps twice as much at most
LARGEST_GROUP = (1 << 31) - 1  # bytes of a row group: it is held in memory whole, as one array
ROWS = 8  # that are unpacked at once: what becomes too large is noticed in time


@cache
def arrow() -> tuple[ModuleType, ModuleType]:
    """The packages pyarrow and pyarrow.parquet.

    Raises:
        UserError: they are not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("data.kind parquet needs pyarrow, which is not installed; `pip install 'sami-fast[parquet]'`") from None
    return pyarrow, pyarrow.parquet


class RowNames(Names):
    """Rows by their numbers in the file."""

    def __init__(self, shards: list[str], firsts: np.ndarray) -> None:
        super().__init__(int(firsts[-1]))
        self.shards, self.firsts = shards, firsts

    def name(self, place: int) -> str:
        shard = int(np.searchsorted(self.firsts, place, side="right")) - 1
        return f"{self.shards[shard]}/{place - int(self.firsts[shard])}"


class Parquet(Shards):
    """The images of every .parquet file below a folder, or of a pattern, in the order of files and rows.

    They are in the first column, of usual names before others, that holds bytes, by itself or beside a path, which is never opened. Labels
    are the columns of numbers, truth values and texts. Arguments and errors as in `Shards`; pyarrow must be installed.
    """

    ending, unit = ".parquet", "rows"

    def __init__(self, path: str, **others: Any) -> None:
        arrow()
        # Row groups, by number among all: the image files, an array of pyarrow, or None and why it cannot be read.
        self._groups: OrderedDict[int, Future[tuple[Any, str]]] = OrderedDict()
        self._held = 0  # bytes of those that have been read
        super().__init__(path, **others)
        facts = self.shards.facts
        self._rows = np.array([rows for each in facts for rows in each["groups"]])
        self._starts = np.cumsum([0, *self._rows])  # place of the first image of each row group
        self._first_group = np.cumsum([0, *(len(each["groups"]) for each in facts)])
        self._group_bytes = max(sum(each["image bytes"] for each in facts) // len(self._rows), 1)

    def inspect(self, path: Path) -> dict[str, Any]:
        pyarrow, parquet = arrow()
        try:
            with open_regular(path) as stream:
                found = os.fstat(stream.fileno())
                file = parquet.ParquetFile(stream)
                metadata, schema = file.metadata, file.schema_arrow
        except (OSError, pyarrow.ArrowException) as error:
            if getattr(error, "errno", None):
                raise
            raise BadFile(f"not a readable parquet file ({one_line(error, 120)})") from None
        column = image_column(schema)
        groups = [metadata.row_group(n) for n in range(metadata.num_row_groups)]
        nbytes = [sum(group.column(n).total_uncompressed_size for n in _parts_of(group, column)) for group in groups]
        if max(nbytes, default=0) > LARGEST_GROUP:
            raise BadFile(f"a row group of {in_words(max(nbytes))}, more than the {in_words(LARGEST_GROUP)} that are held in memory")
        if metadata.num_rows != sum(group.num_rows for group in groups):
            raise BadFile("its row groups have another number of rows than it says")
        places = [[group.column(n).data_page_offset for n in range(group.num_columns)] for group in groups]
        known = f"{schema} {[group.num_rows for group in groups]} {places}"
        return {
            "images": metadata.num_rows,
            "bytes": found.st_size,
            "time": found.st_mtime_ns,
            "digest": hashlib.blake2b(known.encode(), digest_size=16).hexdigest(),
            "fields": [field.name for field in schema if field.name != column and _is_label(field.type)],
            "others": {},
            "groups": [group.num_rows for group in groups],
            "image bytes": sum(nbytes),
            "column": column,
        }

    def names_of(self, index: Index) -> Names:
        return RowNames([*self.shards.names], self.firsts)

    def order(self, epoch: int, seed: int, batch_size: int) -> Tensor:
        """Indices in the order in which an epoch shows them, [size] int64: random, and such that each rank reads few row groups at a time.

        A batch takes equal parts, side by side, of as many row groups as `HELD` has room for, and of as many as it has images at most.
        """
        _, run = np.unique(np.searchsorted(self._starts, self.places, side="right"), return_inverse=True)
        lanes = max(n for n in range(1, batch_size + 1) if batch_size % n == 0 and (n == 1 or n * self._group_bytes <= HELD))
        order = pooled_order(torch.from_numpy(run), seed, epoch, len(run), lanes, POOL)
        return order[side_by_side(epoch * len(run), len(run), batch_size, lanes)]

    def encoded(self, place: int) -> np.ndarray:
        group = int(np.searchsorted(self._starts, place, side="right")) - 1
        cells, reason = self._group(group)
        if reason:
            raise BadFile(reason)
        cell = cells[place - int(self._starts[group])]
        if not cell.is_valid:
            raise BadFile("no image in this row")
        content = np.frombuffer(cell.as_buffer(), np.uint8)
        if len(content) > LARGEST_FILE:
            raise BadFile(f"{in_words(len(content))}, more than the {in_words(LARGEST_FILE)} of an image file")
        if not len(content):
            raise BadFile("zero bytes")
        return content

    def _group(self, number: int) -> tuple[Any, str]:
        """A row group: read by one thread, while others that want it wait, and kept for a while."""
        with self._lock:
            mine = number not in self._groups
            future = self._groups.setdefault(number, Future())
            self._groups.move_to_end(number)
        if mine:
            try:
                found = self._read_group(number), ""
            except BadFile as error:
                found = None, str(error)
            except BaseException as error:
                with self._lock:
                    self._groups.pop(number, None)
                future.set_exception(error)
                raise
            with self._lock:
                future.set_result(found)
                self._held += _nbytes(future)
                while len(self._groups) > 2 and self._held > 2 * HELD:
                    oldest = next(n for n, one in self._groups.items() if one.done())
                    self._held -= _nbytes(self._groups.pop(oldest))
        return future.result()

    def _read_group(self, number: int) -> Any:
        shard = int(np.searchsorted(self._first_group, number, side="right")) - 1
        facts, path = self.shards.facts[shard], self.shards.folder / self.shards.names[shard]
        pyarrow, parquet = arrow()
        try:
            stream = open_regular(path)
            self.check_shard(shard, os.fstat(stream.fileno()))
        except (OSError, BadFile) as error:
            raise self.lose_shard(shard, getattr(error, "strerror", None) or str(error)) from None
        with stream:
            try:
                group, pieces, nbytes = number - int(self._first_group[shard]), [], 0
                batches = parquet.ParquetFile(stream).iter_batches(ROWS, [group], [facts["column"]], use_threads=False)
                for batch in batches:
                    cells = batch.column(facts["column"])
                    pieces.append(cells.field("bytes") if pyarrow.types.is_struct(cells.type) else cells)
                    nbytes += pieces[-1].nbytes
                    if nbytes > LARGEST_GROUP:
                        raise BadFile(f"its row group unpacks to more than the {in_words(LARGEST_GROUP)} that are held in memory")
                found = pyarrow.concat_arrays(pieces)
            except (OSError, ValueError, pyarrow.ArrowException) as error:  # whenever it is read: its images are lost, one by one
                raise BadFile(f"its row group cannot be read ({one_line(error, 120)})") from None
        if len(found) != self._rows[number]:
            raise BadFile(f"its row group has {len(found)} rows, not the {self._rows[number]} that the file says")
        return found

    def columns(self, wanted: Set[str] | None) -> dict[str, Column]:
        pyarrow, parquet = arrow()
        columns = Columns(int(self.firsts[-1]), wanted)
        for number, (name, facts) in enumerate(zip(self.shards.names, self.shards.facts, strict=True)):
            try:
                with open_regular(self.shards.folder / name) as stream:
                    self.check_shard(number, os.fstat(stream.fileno()))
                    fields = [field for field in facts["fields"] if wanted is None or field in wanted]
                    row = int(self.firsts[number])
                    for batch in parquet.ParquetFile(stream).iter_batches(columns=fields, use_threads=False) if fields else ():
                        for labels in batch.to_pylist():
                            columns.add(row, labels)
                            row += 1
            except (OSError, ValueError, BadFile, pyarrow.ArrowException) as error:  # ValueError: a text that is no UTF-8
                raise UserError(f"data.labels: {self.shards.folder}/{name}: {one_line(error)}") from None
        return columns.columns()


def image_column(schema: Any) -> str:
    """The column of the images.

    Raises:
        BadFile: there is none.
    """
    types = arrow()[0].types
    found = []
    for field in schema:
        kind = field.type
        if types.is_struct(kind):
            kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else kind
        if types.is_binary(kind) or types.is_large_binary(kind):
            found.append(field.name)
    if not found:
        raise BadFile(f"no column of images among {', '.join(schema.names)[:100]}; expected one of bytes, or of struct<bytes, path>")
    return next((name for name in IMAGE_KEYS if name in found), found[0])


def _parts_of(group: Any, column: str) -> list[int]:
    paths = [group.column(n).path_in_schema for n in range(group.num_columns)]
    return [n for n, path in enumerate(paths) if path == column or path.startswith(f"{column}.")]


def _nbytes(group: Future[tuple[Any, str]]) -> int:
    cells, _ = group.result()
    return 0 if cells is None else cells.nbytes


def _is_label(kind: Any) -> bool:
    types = arrow()[0].types
    if types.is_dictionary(kind):
        kind = kind.value_type
    return any(is_one(kind) for is_one in (types.is_integer, types.is_floating, types.is_boolean, types.is_string, types.is_large_string))


def side_by_side(first: int, count: int, batch_size: int, lanes: int) -> Tensor:
    """Where each position of an epoch takes its item from, so that what a batch has of one lane stands side by side, and goes to one rank.

    Args:
        first: Positions before the epoch.
        count: Positions of the epoch.
        batch_size: Of all ranks, a multiple of `lanes`.
        lanes: Position p belongs to lane p modulo `lanes` so far.
    Returns:
        [count] int64. Batches that lie in two epochs stay as they are.
    """
    position = first + torch.arange(count)
    batch, slot = position // batch_size, position % batch_size
    each = batch_size // lanes
    source = batch * batch_size + slot % each * lanes + slot // each - first
    whole = (batch * batch_size >= first) & ((batch + 1) * batch_size <= first + count)
    return torch.where(whole, source, torch.arange(count))
