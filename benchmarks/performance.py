"""The tables of docs/performance.md, from the rows of `make bench`: written by `python -m benchmarks.tables`.

Ratios, shares and memory; no times, which mean nothing on another machine or another day.
"""

from collections.abc import Callable, Sequence

from .chart import MODES
from .rows import Row, committed
from .table import Columns, against_best_rival, best_of, comparisons, markdown, page_table, peak_mebibytes, shape_label


def _ratio(row: Row) -> str:
    return f"{row['ratio']:.2f} ({row['ratio_q20']:.2f} to {row['ratio_q80']:.2f})"


def _target(row: Row) -> str:
    return f"{row['target']:g}, {'met' if row['ratio'] >= row['target'] else 'missed'}" if row.get("target") else ""


def _bound(row: Row) -> str:
    return f"{row['of_bound']:.0%} of {row['bound']}" if row.get("of_bound") else ""


def _all(rows: Sequence[Row], key: str) -> str:
    return ", ".join(map(str, sorted({row[key] for row in rows})))


def where(rows: Sequence[Row]) -> str:
    first = rows[0]
    return (
        f"`{first['command']}`, {first['date'][:10]}, {first['cpu']} with {first['cpu_capability']}, threads: {_all(rows, 'threads')}, "
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
        cells.append([*what, first["baseline"], _ratio(ours), against, _bound(ours), peak_mebibytes(ours), peak_mebibytes(rival)])
    titles = ["op", "shape", "through", "plain torch", "ours to it (20 to 80 %)", "ours to the best rival", "bound", "MiB", "rival's MiB"]
    return markdown(titles, cells)


def networks(rows: Sequence[Row]) -> str:
    """Steps, samples and other people's networks: everybody against the baseline."""
    columns: Columns = {
        "what": ("op", ""),
        "shape": (lambda row: shape_label(row["shape"]), ""),
        "through": (lambda row: MODES[row["mode"]], ""),
        "who": ("implementation", ""),
        "to": ("baseline", ""),
        "ratio (20 to 80 %)": (_ratio, ""),
        "target": (_target, ""),
        "bound": (_bound, ""),
        "MiB": (peak_mebibytes, ""),
    }
    found = [row for group in comparisons(rows) for row in group if "images" in row and row["mode"] in ("bwd", "bwd_bwd", "step", "sample")]
    return page_table([row for row in found if row["implementation"] != row["baseline"]], columns)


def feed(rows: Sequence[Row]) -> str:
    columns: Columns = {
        "files": (lambda row: row["op"].removeprefix("feed "), ""),
        "feed": ("implementation", ""),
        "to": ("baseline", ""),
        "ratio (20 to 80 %)": (_ratio, ""),
        "target": (_target, ""),
    }
    return page_table([row for row in rows if row["mode"] == "feed" and row["implementation"] != row["baseline"]], columns)


def slower(rows: Sequence[Row]) -> str:
    """Where a rival is faster than the best of ours; the feed has a table of its own."""
    cells = []
    for group in comparisons(rows):
        (ours, rival), ratio = best_of(group), against_best_rival(group)
        if rival and ratio is not None and ratio < 1 and group[0]["mode"] != "feed":
            what = [group[0]["op"], shape_label(group[0]["shape"]), MODES.get(group[0]["mode"], group[0]["mode"])]
            cells.append([*what, rival["implementation"], f"{ratio:.2f}", peak_mebibytes(ours), peak_mebibytes(rival)])
    return markdown(["what", "shape", "through", "rival", "ours to it", "MiB", "rival's MiB"], cells)


def loops(rows: Sequence[Row]) -> str:
    """Whole training loops, a line per run: how many times as fast as each rival ours is."""

    def to(who: str, group: dict[str, Row]) -> str:
        if who not in group:
            return ""
        ratio, target = group["sami-fast"]["ratio"] / group[who]["ratio"], group[who].get("ours_target")
        return f"{ratio:.2f}" + (f" ({target:g}, {'met' if ratio >= target else 'missed'})" if target else "")

    def kilobytes(row: Row) -> str:
        return f"{row['peak_bytes'] / row['images'] / 1000:.0f}"

    cells = []
    for rows_of_run in comparisons(row for row in rows if row["mode"] == "loop"):
        group = {row["implementation"]: row for row in rows_of_run}
        ours, base = group["sami-fast"], group[rows_of_run[0]["baseline"]]
        what = [
            ours["op"].removeprefix("loop "),
            shape_label(ours["shape"]),
            f"{ours['images_per_second']:.0f}",
            _ratio(ours),
            _target(ours),
        ]
        cells.append([*what, *(to(who, group) for who in ("torch", "torch.compile", "jax")), kilobytes(ours), kilobytes(base)])
    titles = ["run", "shape", "images/s", "to eager channels-last (20 to 80 %)", "target"]
    return markdown([*titles, "to eager NCHW", "to torch.compile", "to JAX", "kB an image", "eager channels-last's"], cells)


def busy(rows: Sequence[Row]) -> str:
    """What training keeps of its speed beside a busy core."""
    columns: Columns = {
        "settings": (lambda row: row["op"].removeprefix("busy core").removeprefix(", ") or "as they come", ""),
        "share of images/s that is kept (20 to 80 %)": (_ratio, ""),
        "target": (_target, ""),
    }
    found = [row for row in rows if row["mode"] == "busy" and row["implementation"] != row["baseline"]]
    return page_table(found, columns) if found else "Not measured yet."


def shares(rows: Sequence[Row]) -> str:
    """What a few ops are of a step."""
    small = [row for row in rows if row["mode"] == "share" and row["implementation"] != row["baseline"]]
    parts = " and ".join(f"`{row['implementation']}` {1 / row['ratio']:.2%}" for row in small)
    return f"Of the time that the gradients of a step of disks take, 64 images of 16x16, {parts}, their derivatives included."


def cold(rows: Sequence[Row]) -> str:
    """Seconds until the first result of what has to be compiled."""
    columns: Columns = {
        "what": ("op", ""),
        "through": (lambda row: MODES.get(row["mode"], row["mode"]), ""),
        "who": ("implementation", ""),
        "s": ("first_seconds", ".1f"),
    }
    compiled = [row for row in rows if row["implementation"].startswith("torch.compile") and row.get("first_seconds")]
    return page_table([row for row in compiled if not row.get("from_cache")], columns)


def score(rows: Sequence[Row]) -> str:
    """The ways to differentiate the encoder's score, within a step."""
    columns: Columns = {
        "what": ("op", ""),
        "shape": (lambda row: shape_label(row["shape"]), ""),
        "who": ("implementation", ""),
        "to": ("baseline", ""),
        "ratio (20 to 80 %)": (_ratio, ""),
        "MiB": (peak_mebibytes, ""),
    }
    return page_table(rows, columns)


def repeats() -> str:
    """How many ratios of two runs agree."""
    columns: Columns = {
        **{key: (key, "") for key in ("threads", "ratios")},
        "within 15 %": ("within_15", ""),
        "within 8 %": ("within_8", ""),
        "largest change": ("largest", ".0%"),
    }
    return page_table(committed("repeat.jsonl", what="ops"), columns)


BLOCKS: dict[str, Callable[[Sequence[Row]], str]] = {f.__name__: f for f in (where, ops, networks, feed, slower, cold)}


LOOPS = {"loops": lambda rows: f"{where(rows)}\n\n{loops(rows)}", "busy": busy, "shares": shares}


def generated(name: str) -> str:
    """A table by its name. ValueError: there is no such table."""
    if name == "repeats":
        return repeats()
    if name == "foreign":
        rows = committed("foreign.jsonl")
        return f"{where(rows)}\n\n{networks(rows)}"
    if name in LOOPS:
        return LOOPS[name](committed("loops.jsonl"))
    if name == "score":
        rows = committed("score.jsonl")
        return f"{where(rows)}\n\n{score(rows)}"
    if name not in BLOCKS:
        raise ValueError(f"performance {name}: no such table; there are {', '.join([*BLOCKS, *LOOPS, 'repeats', 'foreign', 'score'])}")
    return BLOCKS[name](committed("cpu.jsonl"))
