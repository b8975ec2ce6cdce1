"""Bytes that leave a host in a step, counted at its network interface, against what `sami-fast plan` says."""

import pytest
from hosts import Cluster
from wire import measured


@pytest.mark.timeout(4000)
def test_hosts_send_what_was_planned(tmp_path):
    with Cluster(tmp_path) as cluster:
        rows = measured(cluster, tmp_path / "log", 3, ["free"])
    for row in rows:
        print(row)
    for row in rows:
        assert row["sent"] == pytest.approx(row["planned_sent"], rel=0.1), row
