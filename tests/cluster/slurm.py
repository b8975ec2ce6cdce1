"""Slurm on the hosts of a cluster: munged and slurmd on each, slurmctld on the first."""

import json
import os
import re
import time

from hosts import Cluster, wait_until

# Sixteen processors and eight GPUs are what a host says it has, so that the script's demands are met. A job that is put back waits
# as long as credentials hold, two minutes by default.
CONF = """ClusterName=hosts
SlurmctldHost=node1({address})
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=cred_expire=5
StateSaveLocation=/run/slurm/state
SlurmdSpoolDir=/run/slurm/spool
SlurmctldPidFile=/run/slurm/slurmctld.pid
SlurmdPidFile=/run/slurm/slurmd.pid
SlurmctldLogFile=/run/slurm/slurmctld.log
SlurmdLogFile=/run/slurm/slurmd.log
SlurmdTimeout=60
KillWait=30
ReturnToService=2
MpiDefault=none
SchedulerParameters=batch_sched_delay=1,sched_interval=2
"""
BEGIN = """
# slurmd looks for control groups, of version 1 where the kernel still has them; the host's own /sys shows none
mount -t tmpfs none /sys/fs/cgroup && mkdir /sys/fs/cgroup/systemd /sys/fs/cgroup/freezer
{ mount -t cgroup -o none,name=systemd none /sys/fs/cgroup/systemd && mount -t cgroup -o freezer none /sys/fs/cgroup/freezer; } ||
    mount -t cgroup2 none /sys/fs/cgroup
mkdir -p /run/munge /run/slurm/state /run/slurm/spool && chmod 755 /run /run/munge
for n in {0..7}; do mknod /run/gpu$n c 1 3; done; mount -t tmpfs none /etc/slurm && cp /mnt/slurm/*.conf /etc/slurm/
cp /mnt/slurm/munge.key /run/munge/key && chmod 400 /run/munge/key
munged --force --key-file=/run/munge/key --socket=/run/munge/munge.socket.2 --pid-file=/run/munge/munged.pid \
    --log-file=/run/munge/munged.log --seed-file=/run/munge/seed
"""


class Slurm:
    """What a user of it sees from the first host. It ends with the hosts."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.head = cluster, cluster[0]
        folder = cluster.shared / "slurm"
        folder.mkdir()
        nodes = [f"NodeName={host.name} NodeAddr={host.v4} CPUs=16 RealMemory=1000 Gres=gpu:8 State=UNKNOWN" for host in cluster.hosts]
        (folder / "slurm.conf").write_text(CONF.format(address=self.head.v4, nodes="\n".join(nodes)))
        (folder / "gres.conf").write_text("AutoDetect=off\nName=gpu File=/run/gpu[0-7]\n")
        (folder / "munge.key").write_bytes(os.urandom(128))
        for host in cluster.hosts:
            host.run(BEGIN)
        self.head.run("slurmctld -i")
        for host in cluster.hosts:
            host.run(f"slurmd -N {host.name}")
        wait_until(lambda: self.head.run("sinfo -h -o %D:%t", check=False).strip() == f"{len(cluster.hosts)}:idle", self.state())

    def state(self) -> str:
        return self.head.run("sinfo; squeue; tail -n 30 /run/slurm/*.log", check=False)

    def submit(self, options: str, arguments: str, output: str) -> int:
        """The script of the pages. Returns the job's number."""
        said = self.head.run(f"sbatch {options} --output={output} examples/cluster/job.sbatch {arguments}")
        return int(re.findall(r"Submitted batch job (\d+)", said)[0])

    def job(self, number: int) -> dict[str, str]:
        """What is known of it, by Slurm's names."""
        text = self.head.run(f"scontrol show job {number}", check=False)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait(self, number: int, seconds: float) -> dict[str, str]:
        """Until it is neither waiting nor running."""
        deadline = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "STOPPED"):
            assert time.monotonic() < deadline, f"{json.dumps(job, indent=1)}\n{self.state()}"
            time.sleep(1.0)
        return job
