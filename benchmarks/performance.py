"""The tables of docs/performance.md, from the rows of `make bench`: written by `python -m benchmarks.figures --write`.

Ratios, shares and memory; no times, which mean nothing on another machine or another day.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from .chart import MODES
from .figures import RESULTS, CitationError, read_rows
from .table import Row, against_best_rival, best_of, comparisons, shape_label

ROWS = "cpu.jsonl"


def _markdown(titles: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    rows = [titles, ["---"] * len(titles), *cells]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _ratio(row: Row) -> str:
    return f"{row['ratio']:.2f} ({row['ratio_q20']:.2f} to {row['ratio_q80']:.2f})"


def _peak(row: Row | None) -> str:
    return f"{row['peak_bytes'] / 2**20:.2f}" if row and row.get("peak_bytes") else ""


def _bound(row: Row) -> str:
    return f"{row['of_bound']:.0%} of {row['bound']}" if row.get("of_bound") else ""


def where(rows: Sequence[Row]) -> str:
    first = rows[0]
    return (
        f"`{first['command']}`, {first['date'][:10]}, {first['cpu']} with {first['cpu_capability']}, threads: {first['threads']}, "
        f"Python {first['python']}, torch {first['torch']}, commit {first['commit']}."
    )


def ops(rows: Sequence[Row]) -> str:
    """Ours against the baseline and the best rival, a line per comparison."""
    cells = []
    for group in comparisons(rows):
        (ours, rival), first = best_of(group), group[0]
        if first["mode"] not in ("fwd", "bwd", "bwd_bwd") or "images" in first or ours is None or rival is None:
            continue
        what = [first["op"], shape_label(first["shape"]), MODES[first["mode"]]]
        against = f"{against_best_rival(group):.2f} {rival['implementation']}"
        cells.append([*what, first["baseline"], _ratio(ours), against, _bound(ours), _peak(ours), _peak(rival)])
    titles = ["op", "shape", "through", "plain torch", "ours to it (20 to 80 %)", "ours to the best rival", "bound", "MiB", "rival's MiB"]
    return _markdown(titles, cells)


def networks(rows: Sequence[Row]) -> str:
    """Steps, samples and other people's networks: everybody against the baseline."""
    cells = []
    for group in comparisons(rows):
        if "images" not in group[0] or group[0]["mode"] == "feed":
            continue
        for row in group:
            if row["implementation"] != row["baseline"]:
                target = f"{row['target']:g}, {'met' if row['ratio'] >= row['target'] else 'missed'}" if row.get("target") else ""
                what = [row["op"], shape_label(row["shape"]), MODES[row["mode"]]]
                cells.append([*what, row["implementation"], row["baseline"], _ratio(row), target, _bound(row), _peak(row)])
    return _markdown(["what", "shape", "through", "who", "to", "ratio (20 to 80 %)", "target", "bound", "MiB"], cells)


def feed(rows: Sequence[Row]) -> str:
    cells = []
    for row in rows:
        if row["mode"] == "feed" and row["implementation"] != row["baseline"]:
            target = f"{row['target']:g}, {'met' if row['ratio'] >= row['target'] else 'missed'}" if row.get("target") else ""
            cells.append([row["op"].removeprefix("feed "), row["implementation"], row["baseline"], _ratio(row), target])
    return _markdown(["files", "feed", "to", "ratio (20 to 80 %)", "target"], cells)


def slower(rows: Sequence[Row]) -> str:
    """Where a rival is faster than the best of ours ; the feed has a table of its own."""
    cells = []
    for group in comparisons(rows):
        (ours, rival), ratio = best_of(group), against_best_rival(group)
        if group[0]["mode"] != "feed" and ratio is not None and ratio < 1:
            what = [group[0]["op"], shape_label(group[0]["shape"]), MODES.get(group[0]["mode"], group[0]["mode"])]
            cells.append([*what, rival["implementation"], f"{ratio:.2f}", _peak(ours), _peak(rival)])
    return _markdown(["what", "shape", "through", "rival", "ours to it", "MiB", "rival's MiB"], cells)


def cold(rows: Sequence[Row]) -> str:
    """Seconds until the first result of what has to be compiled."""
    cells = [
        [row["op"], MODES.get(row["mode"], row["mode"]), row["implementation"], f"{row['first_seconds']:.1f}"]
        for row in rows
        if row["implementation"].startswith("torch.compile") and row.get("first_seconds") and not row.get("from_cache")
    ]
    return _markdown(["what", "through", "who", "s"], cells)


BLOCKS: dict[str, Callable[[Sequence[Row]], str]] = {
    "where": where,
    "ops": ops,
    "networks": networks,
    "feed": feed,
    "slower": slower,
    "cold": cold,
}


def generated(name: str, results: Path = RESULTS) -> str:
    """Text of a generated block.

    Raises:
        CitationError: no rows, or there is no such block.
    """
    rows = read_rows(results / ROWS)
    if not rows or name not in BLOCKS:
        raise CitationError(f"{ROWS}: no rows, or no block named {name!r}; blocks: {', '.join(BLOCKS)}")
    return BLOCKS[name](rows)
