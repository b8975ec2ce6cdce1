"""The batch script of the pages, under Slurm on two hosts."""

import time

import pytest
from helpers import TINY, assert_same_weights, rows
from hosts import Cluster, Ranks, wait_until
from slurm import Slurm

LONG = 1800  # seconds
OPTIONS = "--nodes=2 --ntasks-per-node=1"  # of the script's 64 processes
SETTINGS = f"--config {TINY} train.steps=300 checkpoint.every=1000 engine.zero_stage=1 engine.patience=60"


@pytest.mark.timeout(7200)
def test_a_job_whose_time_is_up_comes_back_and_goes_on(tmp_path):
    """To the bit, by itself; and one that is cancelled or mistaken does not come back."""
    with Cluster(tmp_path) as cluster:
        slurm = Slurm(cluster)
        cluster.slow_down("700kbit")  # a step takes 0.4 s at least, and Slurm counts in minutes
        number = slurm.submit(f"{OPTIONS} --time=60 --signal=TERM@60", f"{SETTINGS} runs_dir=/mnt/runs", "/mnt/job.txt")
        run, log = cluster.shared / "runs/tiny", cluster.shared / "job.txt"
        wait_until(lambda: (run / "metrics.jsonl").exists() and len(rows(run)) > 20, "steps", LONG)
        minutes = int(slurm.job(number)["RunTime"].split(":")[1])
        slurm.head.run(f"scontrol update JobId={number} TimeLimit={minutes + 2}")
        wait_until(lambda: slurm.job(number)["Restarts"] == "1", f"a restart\n{slurm.state()}", 300)
        slurm.head.run(f"scontrol update JobId={number} TimeLimit=60")
        cluster.slow_down("1gbit")
        job = slurm.wait(number, LONG)
        assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log.read_text() + slurm.state()
        (step,) = {line.split("; step ")[1].split(" of ")[0] for line in log.read_text().splitlines() if "sami-fast: interrupted" in line}
        assert f"resumed from /mnt/runs/tiny/checkpoints/step_{step}" in log.read_text()

        ranks = Ranks([cluster[0]] * 2, f"sami_fast/train.py {SETTINGS} runs_dir=/mnt/whole --no-report", tmp_path / "whole")
        assert ranks.wait(LONG) == [0, 0], ranks.said()
        assert_same_weights(run, cluster.shared / "whole/tiny")
        found, expected = ([row.get("loss_nats") for row in rows(folder)] for folder in (run, cluster.shared / "whole/tiny"))
        assert found == expected

        number = slurm.submit(f"{OPTIONS} --time=9", f"{SETTINGS} runs_dir=/mnt/runs train.step=12", "/mnt/mistake.txt")
        job = slurm.wait(number, LONG)
        assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("FAILED", "0", "2:0"), slurm.state()
        number = slurm.submit(f"{OPTIONS} --time=9", f"{SETTINGS} runs_dir=/mnt/cancelled", "/mnt/cancelled.txt")
        wait_until(lambda: slurm.job(number)["JobState"] == "RUNNING", "a job")
        slurm.head.run(f"scancel {number}")
        slurm.wait(number, 120)
        time.sleep(10)
        job = slurm.job(number)
        assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0"), slurm.state()
