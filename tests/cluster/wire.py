"""What steps of two hosts send, and how long they take on wires of some rates, beside what `sami-fast plan` derives."""

import json
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
    planned = {row.stage: row.sent for row in plan.plan(config_of(0, "runs"), [count], mfu=plan.MFU, collectives="gloo").rows}
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
