"""What steps of two hosts send, and take on wires of some rates, beside what `sami-fast plan` derives: a row for each ZeRO stage and rate.

python tests/cluster/wire.py --rates 1gbit 100mbit --delay 0.001

Bytes are counted at the interface of a host, headers included. In place of the plan's compute stands the same step on
a wire without a limit; transfer is the planned bytes over the rate. A step is predicted to take from the larger of the two to their sum. A
machine with other work to do makes times worthless.
"""

import argparse
import json
import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hosts import Cluster, Ranks
from wire_worker import STAGES, config_of

from sami_fast import plan

LONG = 3600  # seconds
UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


def bytes_per_second(rate: str) -> float:
    number, unit = rate[:-4], rate[-4:]
    return float(number) * UNITS[unit] / 8


def measured(cluster: Cluster, folder: Path, steps: int, rates: list[str]) -> list[dict[str, Any]]:
    """A row for each stage and rate, the first of which is "free"; of several hosts what the busiest sends."""
    count = len(cluster.hosts)
    ranks = Ranks(cluster.hosts, f"tests/cluster/wire_worker.py /mnt {steps} {' '.join(rates)}", folder)
    assert ranks.wait(LONG) == [0] * count, ranks.said()
    found = [json.loads((cluster.shared / f"rank_{rank}.json").read_text()) for rank in range(count)]
    planned = {row.stage: row.sent for row in plan.plan(config_of(0, "runs"), [count], mfu=plan.MFU).rows}
    rows = []
    for stage in STAGES:
        of_stage = [rank[str(stage)] for rank in found]
        compute = max(rank["free"]["seconds"] for rank in of_stage)
        for rate in rates:
            figures = {name: max(rank[rate].get(name, 0) for rank in of_stage) for name in {n for rank in of_stage for n in rank[rate]}}
            row = {"hosts": count, "stage": stage, "rate": rate, "planned_sent": planned[stage], **figures}
            if rate != "free":
                transfer = planned[stage] / bytes_per_second(rate)
                row |= {"compute": compute, "transfer": transfer, "predicted": [max(compute, transfer), compute + transfer]}
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", nargs="+", default=["1gbit", "100mbit"], help="as tc has them (%(default)s)")
    parser.add_argument("--delay", type=float, default=0.0, metavar="SECONDS", help="of the wire, one way (none)")
    parser.add_argument("--steps", type=int, default=4, help="of each (%(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder)) as cluster:
        if arguments.delay:
            cluster.delay(arguments.delay)
        about = {"delay": arguments.delay, "load": os.getloadavg()[0], "cores": os.cpu_count(), "date": str(datetime.now(UTC).date())}
        for row in measured(cluster, Path(folder) / "log", arguments.steps, ["free", *arguments.rates]):
            print(json.dumps(row | about))


if __name__ == "__main__":
    main()
