"""Hosts of a cluster on one Linux machine: namespaces, each with an address, a name, processes, a /tmp and a home of its own, and an sshd.

They are joined by a bridge that has a namespace of its own too, so nothing of theirs is seen outside. Their file systems are the machine's
but for what each has to itself; `SHARED` is a folder that all of them share. Every process is a child of this one and ends with it, however
it ends, and with the last process of a namespace go its mounts and links: there is nothing to clean up.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path("/mnt")  # on every host
PROGRAMS = {
    **dict.fromkeys(("ip", "tc"), "iproute2"),
    **dict.fromkeys(("unshare", "nsenter", "setpriv", "mount"), "util-linux"),
    **dict.fromkeys(("ssh", "ssh-keygen"), "openssh-client"),
    **{"/usr/sbin/sshd": "openssh-server", "pdsh": "pdsh", "hostname": "hostname", "pkill": "procps"},
}
SLURM = {**dict.fromkeys(("slurmctld", "slurmd", "sbatch", "srun", "scontrol"), "slurm-wlm"), "munged": "munge"}
PATH = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ALONE = ("unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc")


def missing(programs: dict[str, str] = PROGRAMS) -> str:
    """Why there can be no hosts here; empty if there can."""
    if sys.platform != "linux" or os.geteuid():
        return "needs Linux and root"
    if lacking := sorted({package for program, package in programs.items() if not shutil.which(program, path=PATH)}):
        return f"needs the packages {', '.join(lacking)}"
    needed = "mount -t tmpfs none /mnt && ip link add br0 type bridge && ip link add veth0 type veth peer name veth1"
    tried = subprocess.run([*ALONE, "sh", "-c", needed], capture_output=True, text=True, check=False, env={"PATH": PATH})
    return f"needs namespaces, a bridge and pairs of interfaces: {tried.stderr.strip()}" if tried.returncode else ""


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 60.0) -> None:
    """Raises: TimeoutError: it did not come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} within {seconds:.0f} s")
        time.sleep(0.05)


# What a host does first, as its process 1, which then only buries its orphans. Everything that the machine has lies under /run/machine too,
# for the folders that are needed below those it has to itself.
BEGIN = """
set -e
mount --make-rprivate /
mount -t sysfs none /sys  # which shows the network of whoever mounts it
mount -t tmpfs none /run && mkdir -p /run/machine /run/sshd /run/own && mount --rbind / /run/machine
for folder in /tmp /home /dev/shm; do mount -t tmpfs none $folder; done
for folder in {needed}; do mkdir -p $folder && mount --bind /run/machine/$folder $folder; done
mount --bind /run/machine/{shared} /mnt
hostname {name}
mkdir -p /home/of-{name}/.ssh && cp /run/machine/{keys}/* /home/of-{name}/.ssh/ && chmod -R go= /home/of-{name}
sed 's,^root:.*,root:x:0:0:root:/home/of-{name}:/bin/bash,' /etc/passwd > /run/own/passwd && mount --bind /run/own/passwd /etc/passwd
cat > /run/own/hosts && mount --bind /run/own/hosts /etc/hosts
echo ready
until ip link show eth0 > /dev/null 2>&1; do sleep 0.02; done
ip link set lo up
{addresses}
ip link set eth0 up
cd / && env -i PATH={path} /usr/sbin/sshd -f /home/of-{name}/.ssh/sshd_config
echo ready
exec 0<&- 1>&-
while sleep 3600; do :; done
"""
SSHD = """HostKey {home}/host_key
AuthorizedKeysFile {home}/id_ed25519.pub
PidFile /run/sshd.pid
StrictModes no
UsePAM no
PermitRootLogin yes
"""
SSH = """StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
ServerAliveInterval 10
ServerAliveCountMax 3
"""


class Host:
    """One of them.

    Attributes:
        pid: Of its process 1, as the machine counts.
    """

    def __init__(self, name: str, number: int, folder: Path, families: Sequence[int], names: str) -> None:
        self.name, self.home = name, Path(f"/home/of-{name}")
        self._started: list[subprocess.Popen] = []
        self.v4, self.v6 = f"10.77.0.{number}", f"fd77::{number:x}"
        keys = folder / "keys" / name
        keys.mkdir(parents=True)
        for file in (folder / "key").iterdir():
            shutil.copy(file, keys)
        (keys / "sshd_config").write_text(SSHD.format(home=self.home / ".ssh"))
        (keys / "config").write_text(SSH)
        places = {4: f"ip address add {self.v4}/24 dev eth0", 6: f"ip address add {self.v6}/64 dev eth0 nodad"}
        own = [
            place for place in (ROOT, Path(sys.prefix), Path(sys.base_prefix)) if place.is_relative_to("/tmp") or "home" in place.parts[:2]
        ]
        script = BEGIN.format(
            name=name,
            needed=" ".join(map(str, own)) or "''",
            shared=folder / "shared",
            keys=keys,
            addresses="\n".join(places[family] for family in families),
            path=PATH,
        )
        if not own:
            script = script.replace("for folder in ''; do", "for folder in; do")
        self._unshare = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *ALONE, "bash", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"PATH": PATH},
        )
        assert self._unshare.stdin is not None
        self._unshare.stdin.write(names)
        self._unshare.stdin.close()
        self.ready()
        (self.pid,) = (child.pid for child in psutil.Process(self._unshare.pid).children())

    def ready(self) -> None:
        assert self._unshare.stdout is not None
        assert self._unshare.stdout.readline() == "ready\n", f"{self.name} did not begin"

    def command(self, command: str, folder: Path = ROOT) -> list[str]:
        """What carries out a shell command there, as a user who has logged in and activated the virtual environment."""
        inside = ["nsenter", "--target", str(self.pid), "--all", f"--wd={folder}", "env", "-i", f"HOME={self.home}", f"PATH={PATH}"]
        return [*inside, "USER=root", "LANG=C.UTF-8", "bash", "-c", command]

    def run(self, command: str, seconds: float = 300.0, check: bool = True) -> str:
        """Carry it out; returns what it printed."""
        done = subprocess.run(self.command(command), capture_output=True, text=True, timeout=seconds, check=False, stdin=subprocess.DEVNULL)
        assert not check or done.returncode == 0, f"{self.name}: {command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def start(self, command: str, output: Path) -> subprocess.Popen:
        """Begin it, on this machine's side in a session of its own; it ends with this host."""
        words = ["setpriv", "--pdeathsig", "KILL", *self.command(command)]
        with open(output, "w") as file:
            self._started.append(subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True))
        return self._started[-1]

    def processes(self, words: str) -> list[psutil.Process]:
        """Those whose command holds these words."""
        everyone = psutil.Process(self.pid).children(recursive=True)
        return [process for process in _others(everyone, self.pid) if words in " ".join(_words(process))]

    def sent(self) -> int:
        """Bytes that have left its network interface."""
        return int(self.run("cat /sys/class/net/eth0/statistics/tx_bytes"))

    def vanish(self) -> None:
        """All of it ends at once, as when a machine loses its power."""
        self._unshare.kill()
        self._unshare.wait()
        for process in self._started:
            process.send_signal(signal.SIGCONT)  # of a process that was stopped, so is what waits for it here
            process.wait(10)


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _others(children: list[psutil.Process], pid: int) -> list[psutil.Process]:
    """Children, and all that share their PID namespace: what was started from outside is nobody's child there."""
    inside = os.readlink(f"/proc/{pid}/ns/pid")
    found = {child.pid: child for child in children}
    for process in psutil.process_iter():
        try:
            if os.readlink(f"/proc/{process.pid}/ns/pid") == inside:
                found[process.pid] = process
        except OSError:
            pass
    return list(found.values())


class Cluster:
    """Hosts node1, node2, ... with one folder in common.

    Args:
        folder: Where that folder and the keys are made.
        count: Of hosts.
        families: Of addresses, 4 and 6.
        unknown: {host: names that its /etc/hosts lacks}.
    """

    def __init__(
        self, folder: Path, count: int = 2, families: Sequence[int] = (4, 6), unknown: dict[str, Sequence[str]] | None = None
    ) -> None:
        self.shared = folder / "shared"
        self.shared.mkdir(parents=True)
        (folder / "key").mkdir()
        for name in ("id_ed25519", "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key" / name], check=True)
        self._switch = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sleep", "infinity"], env={"PATH": PATH})
        wait_until(lambda: os.readlink(f"/proc/{self._switch.pid}/ns/net") != os.readlink("/proc/self/ns/net"), "a switch")
        self._relay: subprocess.Popen | None = None
        self._ip("link add br0 type bridge")
        self._ip("link set br0 up")
        names = [f"node{number}" for number in range(1, count + 1)]
        self.hosts: list[Host] = []
        for number, name in enumerate(names, start=1):
            known = [other for other in names if other not in (unknown or {}).get(name, ())]
            lines = ["127.0.0.1 localhost", "::1 localhost"]
            if name in known and 4 in families:  # as Debian has it: a machine finds itself under its name, and no other does there
                lines.append(f"127.0.1.1 {name}")
                known.remove(name)
            for family, address in ((4, "10.77.0.{}"), (6, "fd77::{:x}")):
                lines += [f"{address.format(names.index(other) + 1)} {other}" for other in known if family in families]
            host = Host(name, number, folder, families, "\n".join(lines) + "\n")
            self.hosts.append(host)
            self._ip(f"link add {name} type veth peer name eth0 netns {host.pid}")
            self._ip(f"link set {name} master br0 up")
            host.ready()

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            host.vanish()
        for process in filter(None, (self._switch, self._relay)):
            process.kill()
            process.wait()

    def __getitem__(self, number: int) -> Host:
        return self.hosts[number]

    def _ip(self, words: str) -> None:
        subprocess.run(["nsenter", "--target", str(self._switch.pid), "--net", "ip", *shlex.split(words)], check=True)

    def unplug(self, host: Host) -> None:
        self._ip(f"link set {host.name} down")

    def plug(self, host: Host) -> None:
        self._ip(f"link set {host.name} up")

    def slow_down(self, rate: str) -> None:
        """What each host sends, to a rate as `tc` has it: 100mbit."""
        for host in self.hosts:
            host.run(f"tc qdisc replace dev eth0 root tbf rate {rate} burst 128kb latency 100ms")

    def delay(self, seconds: float) -> None:
        """What the first two hosts send each other arrives so much later, for good."""
        for host in self.hosts[:2]:
            self._ip(f"link set {host.name} nomaster promisc on")
        words = [sys.executable, str(Path(__file__).with_name("relay.py")), str(seconds), *(host.name for host in self.hosts[:2])]
        inside = ["setpriv", "--pdeathsig", "KILL", "nsenter", "--target", str(self._switch.pid), "--net", *words]
        self._relay = subprocess.Popen(inside, stdout=subprocess.PIPE, text=True)
        assert self._relay.stdout is not None
        assert self._relay.stdout.readline() == "ready\n"


class Ranks:
    """A process of training on each of some hosts, as a batch system starts them: nothing but variables says who they are.

    Args:
        hosts: Of rank 0, 1, ...; one may have several.
        script: Of the tree, with its arguments.
        log: A folder.
        variables: More of them, by host.
    """

    def __init__(self, hosts: Sequence[Host], script: str, log: Path, variables: dict[str, str] | None = None) -> None:
        log.mkdir(exist_ok=True)
        self.script, self.hosts, self.outputs = script.split()[0], hosts, [log / f"rank{rank}.txt" for rank in range(len(hosts))]
        self.processes = []
        for rank, (host, output) in enumerate(zip(hosts, self.outputs, strict=True)):
            local = sum(other is host for other in hosts[:rank])
            who = f"RANK={rank} WORLD_SIZE={len(hosts)} LOCAL_RANK={local} LOCAL_WORLD_SIZE={hosts.count(host)}"
            where = f"MASTER_ADDR={hosts[0].name} MASTER_PORT=29500 DS_ACCELERATOR=cpu {(variables or {}).get(host.name, '')}"
            self.processes.append(host.start(f"exec env {who} {where} python -u {script}", output))

    def wait(self, seconds: float) -> list[int]:
        """Until all have ended. Returns their exit statuses."""
        deadline = time.monotonic() + seconds
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{self.said()}\nafter {seconds:.0f} s some go on") from None

    def said(self) -> str:
        return "\n".join(output.read_text() for output in self.outputs)

    def signal(self, rank: int, number: int) -> None:
        """To the process of a rank itself."""
        (process,) = [p for p in self.hosts[rank].processes(f"python -u {self.script}") if p.environ().get("RANK") == str(rank)]
        process.send_signal(number)
