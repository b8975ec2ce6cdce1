"""The chart in docs/performance.md, from rows: python -m benchmarks.chart benchmarks/results/cpu.jsonl docs/performance.svg

Every comparison is a line; on it stand all implementations by their speed relative to the plain torch that is the baseline.
"""

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

from .rows import Row, read
from .table import comparisons, is_ours, shape_label

mpl.use("svg")
import matplotlib.pyplot as plt
from matplotlib.artist import Artist

MODES = {"fwd": "forward", "bwd": "first gradients", "bwd_bwd": "second gradients", "step": "training step", "sample": "sampling"}
MODES |= {"loop": "training loop"}
RIVALS = {  # colour and sign of everybody who is not us; others are grey
    "reference": ("#777777", "|"),
    "torch.compile": ("#c0392b", "D"),
    "torch.sdpa_flash": ("#8e44ad", "s"),
    "torch.channels_last": ("#e67e22", "s"),
}
OURS = ("#0b6e4f", "o")


def digest(rows: Path) -> str:
    """Of the file that a chart was made from; it stands in the chart."""
    return hashlib.sha256(rows.read_bytes()).hexdigest()[:16]


def draw(rows: Sequence[Row], output: Path, source: str) -> None:
    """Write the chart; `source` names the rows' digest."""
    groups = [group for group in comparisons(rows) if group[0]["mode"] in MODES]
    figure, axis = plt.subplots(figsize=(9, 0.24 * len(groups) + 1.6))
    seen: dict[str, Artist] = {}
    for place, group in enumerate(groups):
        axis.axhline(place, color="#eeeeee", linewidth=0.8, zorder=0)
        for row in sorted(group, key=is_ours):
            if row["implementation"] == row["baseline"]:
                continue
            ours = is_ours(row)
            colour, sign = OURS if ours else RIVALS.get(row["implementation"], ("#3476b5", "^"))
            label = "sami-fast" if ours else row["implementation"]
            axis.plot([row["ratio_q20"], row["ratio_q80"]], [place, place], color=colour, linewidth=1.2, alpha=0.5)
            (seen[label],) = axis.plot([row["ratio"]], [place], sign, color=colour, markersize=6 if ours else 4.5, label=label)
    labels = [f"{g[0]['op']}, {MODES[g[0]['mode']]}  {shape_label(g[0]['shape'])}" for g in groups]
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set(
        yticks=range(len(groups)), xscale="log", xlabel="times as fast as the plain eager torch beside it; lines: 20 % to 80 % of rounds"
    )
    axis.set_yticklabels(labels, fontsize=7)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    first = rows[0]
    where = f"{first['device'] if first['device'] != 'cpu' else first['cpu']}, {first['threads']} threads, torch {first['torch']}"
    axis.set_title(f"{where}, {first['date'][:10]}, commit {str(first['commit'])[:10]}", fontsize=8)
    axis.legend(seen.values(), seen.keys(), fontsize=7, loc="lower right")
    figure.tight_layout()
    with mpl.rc_context({"svg.hashsalt": "sami-fast", "svg.fonttype": "none"}):
        figure.savefig(output, format="svg", metadata={"Date": None, "Source": source})
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    try:
        rows = [row for row in read([arguments.rows]) if "ratio" in row]
        if not rows:
            raise ValueError(f"{arguments.rows}: no rows")
        draw(rows, arguments.output, digest(arguments.rows))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
