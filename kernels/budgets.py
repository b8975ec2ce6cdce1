"""Files of budgets: figures that may fall and may not rise, and their comparison with those of today.

A line names one thing (a kernel in a configuration on a chip, a training step), holds what was counted of it, and says with which version
of a compiler or library: with another one most figures differ without our doing. An empty cell: not counted.
"""

import argparse
import csv
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

VERSION = "made_with"  # the last column


class BudgetError(Exception):
    """A file of budgets that cannot be used, in one sentence. Commands print it and exit with status 2."""


@dataclass(frozen=True)
class Row:
    """One thing, counted.

    Attributes:
        name: Values of the table's `names`.
        figures: By the table's `kinds`; those that were not counted are absent.
        version: Of what decides the figures besides our code, such as "triton 3.9.0".
        note: Of the table's column of that kind; not compared.
    """

    name: tuple[str, ...]
    figures: Mapping[str, int]
    version: str
    note: str = ""

    def __str__(self) -> str:
        return ", ".join(self.name)


@dataclass
class Verdict:
    """What a comparison found, in sentences: what is wrong, and what is only worth knowing."""

    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Table:
    """The columns of a file.

    Attributes:
        names: Together they name a row.
        kinds: Of figures.
        note: A column for the reader.
        exact: Kinds that no version of anything else changes.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    note: str = ""
    exact: frozenset[str] = frozenset()

    @property
    def columns(self) -> list[str]:
        return [*self.names, *([self.note] if self.note else []), *self.kinds, VERSION]

    def read(self, path: Path) -> list[Row]:
        """The rows of a file.

        Raises:
            BudgetError: there is none, or it is not such a table.
        """
        try:
            lines = list(csv.reader(StringIO(path.read_text(encoding="utf-8")), strict=True))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise BudgetError(
                f"{path}: no table of budgets can be read from it ({error}); where there is no file, --write makes one"
            ) from None
        if not lines or lines[0] != self.columns:
            raise BudgetError(f"{path}: expected the columns {','.join(self.columns)}, found {','.join(lines[0]) if lines else 'none'}")
        rows: dict[tuple[str, ...], Row] = {}
        for place, cells in enumerate(lines[1:], 2):
            if len(cells) != len(self.columns):
                raise BudgetError(f"{path}, line {place}: expected {len(self.columns)} cells, found {len(cells)}")
            cell = dict(zip(self.columns, cells, strict=True))
            for kind in self.kinds:
                if not re.fullmatch(r"[0-9]*", cell[kind]):
                    raise BudgetError(f"{path}, line {place}: {kind}: expected a whole number or nothing, found {cell[kind]!r}")
            figures = {kind: int(cell[kind]) for kind in self.kinds if cell[kind]}
            row = Row(tuple(cell[name] for name in self.names), figures, cell[VERSION], cell.get(self.note, ""))
            if row.name in rows:
                raise BudgetError(f"{path}, line {place}: a second line for {row}")
            rows[row.name] = row
        return list(rows.values())

    def _cells(self, row: Row) -> list[str]:
        return [*row.name, *([row.note] if self.note else []), *(str(row.figures.get(kind, "")) for kind in self.kinds), row.version]

    def write(self, path: Path, rows: Iterable[Row]) -> None:
        text = StringIO()
        ordered = sorted(rows, key=lambda row: [_natural(part) for part in row.name])
        csv.writer(text, lineterminator="\n").writerows([self.columns, *map(self._cells, ordered)])
        path.write_text(text.getvalue(), encoding="utf-8")

    def text(self, rows: Iterable[Row], budgets: Iterable[Row] = ()) -> str:
        """For a terminal: a line per row; a figure that differs from its budget as "budget -> figure"."""
        before = {row.name: dict(zip(self.columns, self._cells(row), strict=True)) for row in budgets}
        lines = [self.columns]
        for row in rows:
            old, cells = before.get(row.name, {}), zip(self.columns, self._cells(row), strict=True)
            lines.append([f"{was} -> {new}" if (was := old.get(column, new)) != new else new for column, new in cells])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in lines)

    def compare(self, budgets: Iterable[Row], found: Iterable[Row], write: str) -> Verdict:
        """Today's figures against their budgets.

        Args:
            budgets: Of what was counted now: those of other things are left out.
            found: Today's.
            write: The command that writes the file, for messages.
        """
        verdict, lower, versions = Verdict(), [], {}
        before = {row.name: row for row in budgets}
        for row in found:
            budget = before.pop(row.name, None)
            if budget is None:
                verdict.faults.append(f"{row}: has no budget; `{write}` writes it")
                continue
            same = budget.version == row.version
            if not same:
                versions[budget.version, row.version] = versions.get((budget.version, row.version), 0) + 1
            for kind in self.kinds if same else [kind for kind in self.kinds if kind in self.exact]:
                old, new = budget.figures.get(kind), row.figures.get(kind)
                change = f"{row}: {kind} {'none' if old is None else old} -> {'none' if new is None else new}"
                if old != new and (old is None or new is None or new > old):
                    verdict.faults.append(change)
                elif old != new:
                    lower.append(change)
        verdict.faults += [f"{name}: has a budget and is not there any more; `{write}` takes it out" for name in map(str, before.values())]
        for (old, new), count in versions.items():
            kept = f"but {', '.join(kind for kind in self.kinds if kind in self.exact)} " if self.exact else ""
            verdict.notes.append(f"{count} budgets were made with {old}, and here is {new}: nothing {kept}is compared")
        if lower:
            verdict.notes.append(f"figures below their budget: {len(lower)}, such as {lower[0]}; `{write}` tightens them")
        return verdict


class Budgets:
    """The files that a command was given, and what it does with what it counted.

    Args:
        table: Their columns.
        arguments: Parsed, with the options of `add_options`.
        command: Its name, for messages.
    Raises:
        BudgetError: as `Table.read`, or there is no folder to write to; before any work.
    """

    def __init__(self, table: Table, arguments: argparse.Namespace, command: str) -> None:
        self.table, self.to = table, arguments.write
        if self.to is not None and not self.to.absolute().parent.is_dir():
            raise BudgetError(f"--write: no folder {self.to.absolute().parent}")
        file = arguments.budgets if self.to is None else self.to if self.to.exists() else None
        self.rows = table.read(file) if file else []
        self.compares = self.to is None and file is not None
        self.write = f"{command} --write {file}"

    @staticmethod
    def add_options(parser: argparse.ArgumentParser, file: Path | None = None) -> None:
        """--budgets and --write; `file` is the former's default, and the latter's where it is given without one."""
        parser.add_argument("--budgets", type=Path, metavar="FILE", default=file, help="fail where a figure is above its budget there")
        usage = "write the figures there instead; those of what is not counted now stay"
        parser.add_argument("--write", type=Path, metavar="FILE", nargs="?" if file else None, const=file, help=usage)

    def settle(self, rows: Sequence[Row], counted: Callable[[Row], bool], faults: Sequence[str] = ()) -> int:
        """Print the figures, and compare or write them.

        Args:
            rows: Today's.
            counted: Whether a budget is of something that would be among the rows if it still existed.
            faults: What is wrong with them whatever the budgets say.
        Returns:
            Number of faults, each printed to stderr: the exit status is 1 where there are any.
        """
        names, faults = {row.name for row in rows}, list(faults)
        budgets, others = [], []
        for row in self.rows:
            (budgets if row.name in names or counted(row) else others).append(row)
        print(self.table.text(rows, budgets))
        if self.compares:
            verdict = self.table.compare(budgets, rows, self.write)
            faults += verdict.faults
            print("".join(f"{note}\n" for note in verdict.notes), end="")
        if self.to is not None:
            self.table.write(self.to, [*others, *rows])
        print("".join(f"{fault}\n" for fault in faults), end="", file=sys.stderr)
        return len(faults)


def _natural(text: str) -> list[str | int]:
    """Sorts sm_90 before sm_100."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+)", text))]
