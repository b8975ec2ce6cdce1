"""Bytes that leave a host in a step, counted at its network interface, against what `sami-fast plan` says."""

import pytest
from hosts import Cluster
from wire import measured

from sami_fast import plan

DENOISER = 838_433  # parameters, of wire_worker.py; the encoder is at a stage of its own


@pytest.mark.timeout(4000)
def test_hosts_send_what_was_planned(tmp_path):
    """At stage 3 gloo adds gradients up on all ranks where only a part of the sum is asked for; NCCL, which the plan is of, does not."""
    with Cluster(tmp_path) as cluster:
        rows = measured(cluster, tmp_path / "log", 3, ["free"])
    for row in rows:
        print(row)
    for row in rows:
        twice = 0.5 * plan.FLOAT * DENOISER if row["stage"] == 3 else 0
        assert row["sent"] == pytest.approx(row["planned_sent"] + twice, rel=0.1), row
