"""Steps of two hosts, what they send and how long they take on slow wires, beside what `sami-fast plan` derives; writes rows and the table
of docs/scaling.md.

python -m benchmarks.wire        # Linux, root, and the Debian packages that `make cluster` takes; two minutes of a machine at rest

Bytes are counted at the interface of a host, headers included. In place of the plan's compute stands the same step on a wire without a
limit; transfer is the planned bytes over the rate. A step is predicted to take from the larger of the two to their sum. A machine with
other work to do makes times worthless.
"""

import argparse
import json
import os
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from sami_fast.environment import describe

from .rows import RESULTS, ROOT, Row, address, committed, write_rows
from .table import Columns, page_table
from .tables import rewrite

SENDS = {"all_reduce": "all-reduces", "all_gather_into_tensor": "all-gathers", "reduce_scatter_tensor": "reduce-scatters"}


def generated(_: str) -> str:
    """The table of docs/scaling.md."""
    return table(committed("wire.jsonl"))


def table(rows: list[Row]) -> str:
    """Prediction is of the sum of compute and transfer."""
    columns: Columns = {
        "ZeRO": ("stage", ""),
        "wire": ("rate", ""),
        "collectives": (lambda row: ", ".join(f"{row[name]:.0f} {word}" for name, word in SENDS.items() if row.get(name)), ""),
        "planned, MB": (lambda row: row["planned_sent"] / 1e6, ".2f"),
        "counted, MB": (lambda row: row["sent"] / 1e6, ".2f"),
        "compute, s": ("compute", ".3f"),
        "transfer, s": ("transfer", ".3f"),
        "step, s": ("seconds", ".3f"),
        "step over compute + transfer": (lambda row: row["seconds"] / row["predicted"][1], ".2f"),
    }
    about = rows[0]
    where = f"{about['date']}, torch {about['torch']}, gloo, {about['cores']} cores, commit {about['commit']}"
    return f"`{about['command']}`, {where}. One-way delay {1e3 * about['delay']:g} ms.\n\n{page_table(rows, columns)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", default=["1gbit", "100mbit"], help="as tc has them (%(default)s)")
    parser.add_argument("--delay", type=float, default=0.001, metavar="SECONDS", help="of the wire, one way (%(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="of each (%(default)s)")
    parser.add_argument("--output", type=Path, help="file for the rows alone; benchmarks/results and docs/scaling.md by default")
    arguments = parser.parse_args()

    sys.path.append(str(ROOT / "tests/cluster"))
    from hosts import Cluster
    from wire import measured

    where = address(describe(), "python -m benchmarks.wire", str(datetime.now(UTC).date()))
    about = {"delay": arguments.delay, "load": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder)) as cluster:
        if arguments.delay:
            cluster.delay(arguments.delay)
        rows = measured(cluster, Path(folder) / "log", arguments.steps, ["free", *arguments.rates])
    rows = [row | about | where for row in rows]
    if arguments.output:
        arguments.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return
    write_rows(RESULTS / "wire.jsonl", rows, ("stage", "rate"))
    rewrite(ROOT / "docs/scaling.md", "wire")


if __name__ == "__main__":
    main()
