"""Rows as a table that a person can read, as JSON lines and as CSV.

python -m benchmarks.table rows.jsonl [more.jsonl ...]               # the table
python -m benchmarks.table rows.jsonl --short                        # ours against the best rival, a line per comparison
python -m benchmarks.table rows.jsonl --where op=attention mode=bwd_bwd
"""

import argparse
import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from .rows import Row, read

OURS = ("triton", "cuda", "cpp", "sami-fast")  # implementations that are ours begin with one of these words
COMPARISON = ("device", "op", "shape", "dtype", "mode")  # rows that agree in these were measured against each other


# Of a page's table: by title, the field of a row ("linear_r2.x" is nested) or a function of it, and the format.
Columns = dict[str, tuple[str | Callable[[Row], Any], str]]


def shape_label(shape: dict[str, int]) -> str:
    return " ".join(f"{letter}{size}" for letter, size in shape.items())


def is_ours(row: Row) -> bool:
    return row["implementation"].startswith(OURS)


def comparison(row: Row) -> tuple[Any, ...]:
    return tuple(shape_label(row[key]) if key == "shape" else row[key] for key in COMPARISON)


def comparisons(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows that were measured against each other, together, in the order of their first."""
    together: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        together.setdefault(comparison(row), []).append(row)
    return list(together.values())


def _of_bound(row: Row) -> str:
    return f"{row['of_bound']:.0%} {row['bound']}" if row.get("of_bound") else ""


def peak_mebibytes(row: Row | None) -> str:
    return f"{row['peak_bytes'] / 2**20:.2f}" if row and row.get("peak_bytes") else ""


def _cold(row: Row) -> str:
    """The first call, where it is worth a word: something was compiled."""
    first = row.get("first_seconds")
    return f"{first:.1f}" if first and first > 1.0 and 1e3 * first > 5 * row["median_ms"] else ""


def _missed(row: Row) -> str:
    target = row.get("target")
    return "" if not target else f"{target:g} met" if row["ratio"] >= target else f"{target:g} missed"


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("op", lambda r: r["op"]),
    ("shape", lambda r: shape_label(r["shape"])),
    ("dtype", lambda r: r["dtype"]),
    ("mode", lambda r: r["mode"]),
    ("implementation", lambda r: r["implementation"] + (" *" if r["implementation"] == r["baseline"] else "")),
    ("median ms", lambda r: f"{r['median_ms']:.3f}"),
    ("20 %", lambda r: f"{r['q20_ms']:.3f}"),
    ("80 %", lambda r: f"{r['q80_ms']:.3f}"),
    ("ratio", lambda r: f"{r['ratio']:.2f}"),
    ("20 %", lambda r: f"{r['ratio_q20']:.2f}"),
    ("80 %", lambda r: f"{r['ratio_q80']:.2f}"),
    ("target", _missed),
    ("of bound", _of_bound),
    ("MFU", lambda r: f"{r['mfu']:.0%}" if r.get("mfu") is not None else ""),
    ("images/s", lambda r: f"{r['images_per_second']:.0f}" if r.get("images_per_second") else ""),
    ("peak MiB", peak_mebibytes),
    ("first s", _cold),
)
TEXT_COLUMNS = 5  # the first ones are aligned to the left


def lines(titles: Sequence[str], groups: Sequence[Sequence[Sequence[str]]], text_columns: int = TEXT_COLUMNS) -> list[str]:
    """Aligned cells; columns that are empty throughout fall away, a blank line stands between groups that hold several lines."""
    cells = [line for group in groups for line in group]
    used = [place for place in range(len(titles)) if any(line[place] for line in cells)]
    widths = {place: max(len(line[place]) for line in [titles, *cells]) for place in used}

    def aligned(line: Sequence[str]) -> str:
        return "  ".join(line[p].ljust(widths[p]) if p < text_columns else line[p].rjust(widths[p]) for p in used).rstrip()

    text = [aligned(titles)]
    for place, group in enumerate(groups):
        if place and max(len(group), len(groups[place - 1])) > 1:
            text.append("")
        text += [aligned(line) for line in group]
    return text


def markdown(titles: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table for a page; columns that are empty throughout fall away."""
    used = [place for place in range(len(titles)) if any(line[place] for line in cells)]
    return "\n".join("| " + " | ".join(line[place] for place in used) + " |" for line in (titles, ["---"] * len(titles), *cells))


def page_table(rows: Iterable[Row], columns: Columns) -> str:
    """A line per row; what a row does not say stays empty."""

    def cell(row: Row, field: str | Callable[[Row], Any], form: str) -> str:
        try:
            value = field(row) if callable(field) else reduce(lambda inside, key: inside[key], field.split("."), row)
        except (KeyError, TypeError):  # absent, or none of None
            return ""
        return "" if value is None else format(value, form)

    return markdown(list(columns), [[cell(row, *column) for column in columns.values()] for row in rows])


def table(rows: Sequence[Row]) -> list[str]:
    """Every row; above a comparison's ratios stands 1 for the baseline, marked by *."""
    groups = [[[cell(row) for _, cell in COLUMNS] for row in group] for group in comparisons(rows)]
    return lines([title for title, _ in COLUMNS], groups)


def best_of(group: Sequence[Row]) -> tuple[Row | None, Row | None]:
    """Our fastest and the fastest of the others; None where there is none."""

    def fastest(ours: bool) -> Row | None:
        return min((row for row in group if is_ours(row) == ours), key=lambda row: row["median_ms"], default=None)

    return fastest(True), fastest(False)


def against_best_rival(group: Sequence[Row]) -> float | None:
    """Our fastest over the fastest rival: above 1 we are faster. From ratios to the common baseline, taken round by round."""
    ours, rival = best_of(group)
    return ours["ratio"] / rival["ratio"] if ours and rival else None


def short(rows: Sequence[Row]) -> list[str]:
    titles = ("op", "shape", "dtype", "mode", "ours", "ratio to the best rival", "rival", "of bound", "peak MiB", "rival's")
    cells = []
    for group in comparisons(rows):
        (ours, rival), ratio, first = best_of(group), against_best_rival(group), group[0]
        cells.append(
            [
                *(cell(first) for _, cell in COLUMNS[:4]),
                ours["implementation"] if ours else "",
                f"{ratio:.2f}" if ratio else "",
                rival["implementation"] if rival else "",
                _of_bound(ours or first),
                peak_mebibytes(ours),
                peak_mebibytes(rival),
            ]
        )
    return lines(titles, [[line] for line in cells])


def select(rows: Iterable[Row], conditions: Iterable[str]) -> list[Row]:
    """Rows of which every key=value holds, as text; a shape is written as in the table."""
    wanted = [condition.partition("=")[::2] for condition in conditions]

    def text(row: Row, key: str) -> str:
        return shape_label(row[key]) if key == "shape" and isinstance(row[key], dict) else str(row.get(key))

    return [row for row in rows if all(text(row, key) == value for key, value in wanted)]


def to_csv(rows: Sequence[Row]) -> str:
    """Flat: what is nested stands as JSON."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(keys)
    for row in rows:
        writer.writerow([json.dumps(v) if isinstance(v, dict | list) else v for v in (row.get(key) for key in keys)])
    return out.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--short", action="store_true", help="ours against the best rival, a line per comparison")
    parser.add_argument("--where", nargs="+", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    try:
        rows = select(read(arguments.files), arguments.where)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    measured = [row for row in rows if "ratio" in row and "implementation" in row]
    print("\n".join((short if arguments.short else table)(measured) if measured else ["no rows"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
