"""The hostfile and the commands of the pages, on two hosts, against two ranks of one."""

import pytest
from helpers import TINY, assert_same_weights, rows
from hosts import ROOT, Cluster, Ranks, wait_until

LONG = 1800  # seconds
HOSTFILE = "--hostfile examples/cluster/hosts --num_accelerators 1"  # one of the eight GPUs of each machine


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("cluster")) as hosts:
        yield hosts


@pytest.mark.timeout(4000)
@pytest.mark.parametrize("stage", [0, 2, 1, 3], ids="stage{}".format)
def test_two_hosts_train_what_two_ranks_do(stage, cluster, tmp_path):
    """Their homes, and with them the default places of caches, are in different folders."""
    settings = f"--config {TINY} --no-report engine.zero_stage={stage}"
    said = cluster[0].run(f"deepspeed -q {HOSTFILE} sami_fast/train.py {settings} runs_dir=/mnt/two{stage} --resume", LONG)
    assert "node1: /mnt/two" in said
    ranks = Ranks([cluster[0]] * 2, f"sami_fast/train.py {settings} runs_dir=/mnt/one{stage}", tmp_path / "one")
    assert ranks.wait(LONG) == [0, 0], ranks.said()
    two, one = (cluster.shared / f"{name}{stage}/tiny" for name in ("two", "one"))
    assert_same_weights(two, one)
    assert [row.get("loss_nats") for row in rows(two)] == [row.get("loss_nats") for row in rows(one)]


@pytest.mark.timeout(7200)
def test_a_lost_connection_ends_the_run_which_goes_on_again(cluster, tmp_path):
    """The step is kept, it is said where, and the script of the pages starts anew; in the end there is no difference."""
    settings = f"--config {TINY} --no-report train.steps=60 checkpoint.every=100 engine.zero_stage=1"
    (cluster.shared / "hosts").write_text((ROOT / "examples/cluster/hosts").read_text().replace("slots=8", "slots=1"))
    run, output = cluster.shared / "again/tiny", tmp_path / "again.txt"
    script = cluster[0].start(f"PAUSE=1 examples/cluster/again.sh /mnt/hosts {settings} runs_dir=/mnt/again", output)
    wait_until(lambda: (run / "metrics.jsonl").exists() and len(rows(run)) > 5, "steps", LONG)
    cluster[1].run("pkill -f 'sshd: root@notty'")
    assert script.wait(LONG) == 0, output.read_text()
    said = output.read_text()
    assert "rank 1 on node2: the launcher has ended, or the connection to it" in said
    assert "sami-fast: interrupted; step " in said
    assert "resumed from /mnt/again/tiny/checkpoints/step_" in said
    ranks = Ranks([cluster[0]] * 2, f"sami_fast/train.py {settings} runs_dir=/mnt/undisturbed", tmp_path / "one")
    assert ranks.wait(LONG) == [0, 0], ranks.said()
    assert_same_weights(run, cluster.shared / "undisturbed/tiny")


def test_the_pages_show_the_files_that_run_here():
    page = (ROOT / "docs/scaling.md").read_text()
    for name in ("hosts", "job.sbatch", "again.sh"):
        lines = (ROOT / "examples/cluster" / name).read_text().splitlines()
        assert "\n".join(f"    {line}".rstrip() for line in lines) in page, name
