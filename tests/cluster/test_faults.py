"""What happens to a run on two hosts when one of them fails, and that nothing is lost by it."""

import signal
import time
from pathlib import Path

import pytest
from helpers import TINY, assert_same_weights, rows
from hosts import Cluster, Ranks, wait_until

PATIENCE = 20  # seconds, engine.patience
SOON = 60  # seconds within which a run must end beside those; it takes about 15 where a core is free
LONG = 900  # seconds for what takes one where a core is free
STEPS = 80
SETTINGS = f"train.steps={STEPS} checkpoint.every=4 engine.zero_stage=2 engine.patience={PATIENCE}"
TRAIN = f"sami_fast/train.py --config {TINY} --resume --no-report {SETTINGS}"
# No namespace gives a host a clock of its own. libfaketime does, and breaks the waits of Python's threads, so this is Python's clock alone.
AHEAD = """import time
now, now_ns = time.time, time.time_ns
time.time, time.time_ns = lambda: now() + 420, lambda: now_ns() + 420 * 10**9
"""


def kept(run: Path) -> int:
    """The step of the newest checkpoint."""
    return max((int(folder.name.removeprefix("step_")) for folder in run.glob("checkpoints/step_*")), default=0)


def logged(run: Path) -> int:
    return max((row["step"] for row in rows(run)), default=0) if (run / "metrics.jsonl").exists() else 0


def killed(cluster, ranks):
    ranks.signal(1, signal.SIGKILL)


def stopped(cluster, ranks):
    ranks.signal(1, signal.SIGSTOP)


def unplugged(cluster, ranks):
    cluster.unplug(cluster[1])


def announced(cluster, ranks):
    for rank in (0, 1):
        ranks.signal(rank, signal.SIGUSR1)


def powerless(cluster, ranks):
    cluster[1].vanish()


LOST = "sami-fast: rank 1 on node2 ended without a word, or answers no more; {kept} is kept; the same command with --resume goes on"
FAULTS = {  # what is done: the exit statuses that follow, None where nothing is known; the sentence
    announced: ([138, 138], "sami-fast: interrupted; step {step} of {steps} is kept in"),
    killed: ([1, None], LOST),
    stopped: ([1, None], LOST),
    unplugged: ([1, 1], LOST),
    powerless: ([1, None], LOST),
}


@pytest.mark.timeout(7200)
def test_a_run_outlives_every_fault(tmp_path):
    """One after the other, to the bit; the clock of the second host is seven minutes ahead, and in the end the first goes on alone."""
    with Cluster(tmp_path) as cluster:
        whole, run = cluster.shared / "whole/tiny", cluster.shared / "runs/tiny"
        (cluster.shared / "sitecustomize.py").write_text(AHEAD)
        assert float(cluster[1].run("PYTHONPATH=/mnt python -c 'import time; print(time.time())'")) > time.time() + 400
        ranks = Ranks(cluster.hosts, f"{TRAIN} runs_dir=/mnt/whole", tmp_path / "whole")
        assert ranks.wait(LONG) == [0, 0], ranks.said()
        for fault, (statuses, sentence) in FAULTS.items():
            before = kept(run)
            ranks = Ranks(cluster.hosts, f"{TRAIN} runs_dir=/mnt/runs", tmp_path / fault.__name__, {"node2": "PYTHONPATH=/mnt"})
            wait_until(lambda ranks=ranks, before=before: kept(run) > before or ranks.processes[0].poll() is not None, "a checkpoint", LONG)
            assert ranks.processes[0].poll() is None, ranks.said()
            assert kept(run) < STEPS
            began = time.monotonic()
            fault(cluster, ranks)
            found = [ranks.processes[0].wait(PATIENCE + SOON)]
            print(f"{fault.__name__}: rank 0 ended after {time.monotonic() - began:.0f} s")
            if fault is stopped:
                ranks.processes[1].send_signal(signal.SIGCONT)  # nsenter stops and goes on with what it runs, which finds itself alone
            found.append(ranks.processes[1].wait(PATIENCE + SOON))
            print(f"{fault.__name__}: rank 1 ended after {time.monotonic() - began:.0f} s, {found}")
            newest = f"/mnt/runs/tiny/checkpoints/step_{kept(run)}"
            assert sentence.format(kept=newest, step=kept(run), steps=STEPS) in ranks.outputs[0].read_text(), ranks.said()
            assert [ours if ours is None else theirs for ours, theirs in zip(statuses, found, strict=True)] == statuses
            if fault is unplugged:
                cluster.plug(cluster[1])
        ranks = Ranks([cluster[0]] * 2, f"{TRAIN} runs_dir=/mnt/runs", tmp_path / "end")
        assert ranks.wait(LONG) == [0, 0], ranks.said()
        assert_same_weights(run, whole)
        assert [row["loss_nats"] for row in rows(run) if "loss_nats" in row] == [
            row["loss_nats"] for row in rows(whole) if "loss_nats" in row
        ]


@pytest.mark.timeout(3600)
def test_addresses_and_names(tmp_path):
    """Six as the only kind of address, and a host that does not know its own name; then a port that somebody else uses."""
    with Cluster(tmp_path, families=(6,), unknown={"node2": ["node2"]}) as cluster:
        assert "10.77" not in cluster[0].run("ip address")
        assert cluster[1].run("getent hosts node2", check=False) == ""
        command = f"sami_fast/train.py --config {TINY} --no-report --overwrite train.steps=4 engine.patience={PATIENCE} runs_dir=/mnt/runs"
        ranks = Ranks(cluster.hosts, command, tmp_path / "log")
        assert ranks.wait(LONG) == [0, 0], ranks.said()
        taken = cluster[0].start(
            "exec python -c 'import socket, time; s = socket.create_server((\"::\", 29500), family=socket.AF_INET6); time.sleep(3600)'",
            tmp_path / "taken.txt",
        )
        ranks = Ranks(cluster.hosts, command, tmp_path / "log")
        assert ranks.wait(LONG) == [2, 1], ranks.said()
        taken.kill()
        assert "sami-fast: MASTER_PORT: cannot listen at node1:29500 (it is taken); give the launcher another port" in ranks.said()
        assert f"sami-fast: rank 0, at node1:29500, did not come within {PATIENCE} s" in ranks.said()
