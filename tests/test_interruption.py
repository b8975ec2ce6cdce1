"""What ends a run from outside: Ctrl-C, SIGTERM, ranks that are gone; and that nothing is lost by it."""

import multiprocessing
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from helpers import TINY, assert_same_weights, rows, tiny
from kill_campaign import campaign

from sami_fast.engine import checkpoints, interruption
from sami_fast.engine import watch as watching
from sami_fast.engine.processes import init_distributed
from sami_fast.engine.watch import Watch, interface, meet, named
from sami_fast.errors import Interrupted, RankLostError, UserError
from sami_fast.train import main, train

MODES = {"joint": (), "staged": ("train.mode=staged", "train.denoiser_steps=60", "train.bank_steps=3")}


@pytest.fixture(autouse=True)
def heard():
    """Ctrl-C is heard also where a shell has put the tests into the background, and there it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def send_when(number, condition, patience=120.0):
    """The signal to this process, from a thread, once it is safe to send and the condition holds."""

    def wait():
        deadline = time.monotonic() + patience  # never into a later test
        while signal.getsignal(signal.SIGINT) is not interruption._arrived or not condition():
            if time.monotonic() > deadline:
                return
            time.sleep(0.001)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()


@pytest.mark.parametrize("number", interruption.SIGNALS)
@pytest.mark.parametrize("mode", MODES)
def test_a_signal_keeps_the_step_and_says_how_to_go_on(mode, number, tmp_path, capsys):
    """In the first stage of a staged run, and in the only one of a joint run."""
    options = ["train.steps=60", "checkpoint.every=100", *MODES[mode]]
    expected = train(tiny(tmp_path / "whole", *options))
    before = signal.getsignal(number)
    command = ["--config", TINY, "--no-report", f"runs_dir={tmp_path}/stopped", *options]
    capsys.readouterr()
    send_when(number, lambda: any(log.read_text().count("\n") > 2 for log in (tmp_path / "stopped").rglob("metrics.jsonl")))
    assert main(command) == 128 + number
    assert signal.getsignal(number) is before
    said = capsys.readouterr().err
    kept, folder = re.search(
        r"interrupted; step (\d+) of 60 is kept in (.*); the same command with --resume goes on from there\n", said
    ).groups()
    (checkpoint,) = (tmp_path / "stopped").rglob("step_*")
    assert (checkpoint.name, str(checkpoint.parent)) == (f"step_{kept}", folder)
    assert ("denoisers" in folder) == (mode == "staged")
    assert not checkpoints.damage(checkpoint)
    assert main([*command, "--resume"]) == 0
    assert_same_weights(tmp_path / "stopped/tiny", expected)
    assert [row["loss_nats"] for row in rows(tmp_path / "stopped/tiny")] == [row["loss_nats"] for row in rows(expected)]


SHELL = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
job = subprocess.Popen(sys.argv[1:], process_group=0)
os.tcsetpgrp(0, job.pid)
status = job.wait()
while True:
    try:
        os.killpg(job.pid, 0)
    except ProcessLookupError:
        break
    time.sleep(0.05)
print("status", status, flush=True)
"""  # as far as it gives a job the terminal


def pressed(command, come):
    """What a terminal shows of a command in which somebody presses Ctrl-C at a moment, until nobody is left; and the command's status."""
    shell, terminal = pty.fork()
    if shell == 0:
        os.execv(sys.executable, [sys.executable, "-c", SHELL, *map(str, command)])
    shown = bytearray()

    def read():
        with suppress(OSError):  # nobody holds its other end any more
            while piece := os.read(terminal, 4096):
                shown.extend(piece)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        while not come() and reader.is_alive():
            time.sleep(0.01)
        os.write(terminal, b"\x03")
        reader.join(200)
        assert not reader.is_alive(), shown.decode()
    finally:
        with suppress(ProcessLookupError):
            os.kill(shell, signal.SIGKILL)
        os.waitpid(shell, 0)
        os.close(terminal)
    text = shown.decode().replace("\r\n", "\n")
    return text, int(text.rpartition("status ")[2])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_in_a_terminal(ranks, port, tmp_path):
    """It reaches every process of the command at once, and the launcher passes it on as well."""
    bin = Path(sys.executable).parent
    launcher = [bin / "deepspeed", "-q", "--num_accelerators", ranks, "--master_port", os.environ["MASTER_PORT"]]
    script = [Path(__file__).parents[1] / "sami_fast/train.py", "--config", TINY, f"runs_dir={tmp_path}", "train.steps=100000"]
    log = tmp_path / "tiny/metrics.jsonl"
    text, status = pressed([*(launcher if ranks > 1 else [sys.executable]), *script], lambda: log.exists() and log.stat().st_size > 0)
    assert text.count("stopping at the end of this step, which is kept; Ctrl-C once more stops at once\n") == 1
    said = re.findall(
        r"sami-fast: interrupted; step (\d+) of 100000 is kept in (.*); the same command with --resume goes on from there\n", text
    )
    assert len(said) == 1, text
    text = re.sub(r"^.*\[WARNING\] \[real_accelerator\.py.*\n", "", text, flags=re.MULTILINE)  # DeepSpeed's own word, before it reads -q
    assert not re.search(r"INFO|WARNING|CUDA_VISIBLE", text)  # `deepspeed -q` says nothing else, on a CPU too
    ((kept, folder),) = said
    assert not checkpoints.damage(Path(folder, f"step_{kept}"))
    if ranks == 1:
        assert status == 130
        assert "Traceback" not in text


def test_a_signal_before_the_first_step_ends_the_command_at_once(tmp_path, capsys):
    command = ["--config", TINY, "--no-report", f"runs_dir={tmp_path}/runs", "train.steps=100000"]
    send_when(signal.SIGINT, lambda: True)
    assert main(command) == 130
    assert capsys.readouterr().err == "sami-fast: interrupted; nothing was kept yet; the same command with --resume starts again\n"
    assert not list(tmp_path.rglob("step_*"))


@pytest.mark.parametrize(
    ("signals", "status"),
    [
        (["SIGINT", "SIGINT"], 130),  # the second stops at once
        (["SIGINT", "SIGTERM"], 0),  # how a launcher passes Ctrl-C on
        (["SIGTERM", "SIGTERM", "SIGINT"], 0),
    ],
)
def test_a_second_ctrl_c_stops_at_once(signals, status):
    script = f"""
import os, signal
from sami_fast.engine import interruption
try:
    with interruption.handled(), interruption.held_back("wait"):
        for name in {signals}:
            os.kill(os.getpid(), getattr(signal, name))
        print("still there", interruption.asked())
except interruption.Interrupted as error:
    print("then", error.status)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert done.stderr == "wait\n"
    first = getattr(signal, signals[0])
    assert done.stdout == ("" if status else f"still there {first:d}\nthen {128 + first}\n")


def test_a_command_in_the_background_goes_on_ignoring_ctrl_c():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruption.handled():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is interruption._arrived
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_that_comes_after_the_last_step_is_not_forgotten():
    with interruption.handled():
        with pytest.raises(Interrupted) as caught, interruption.held_back():
            os.kill(os.getpid(), signal.SIGTERM)
        assert caught.value.status == 143
    assert interruption.asked() == 0


# ---- ranks


@pytest.fixture
def port(monkeypatch):
    """A free one, as a launcher would give it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(number))
    return number


def test_a_rank_that_does_not_come_is_named(port):
    with pytest.raises(RankLostError, match=r"ranks 1, 2 did not come within 1 s \(engine.patience\)") as caught:
        meet(0, 3, 1.0)
    assert caught.value.speaks
    assert caught.value.status == 1


def test_a_first_rank_that_does_not_come_is_named_by_the_second(port):
    for rank, speaks in ((1, True), (2, False)):
        with pytest.raises(RankLostError, match=f"rank 0, at 127.0.0.1:{port}, did not come within 1 s") as caught:
            meet(rank, 3, 1.0)
        assert caught.value.speaks == speaks


@pytest.mark.parametrize("value", ["0", "99999"])
def test_a_port_that_is_none(value, port, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", value)
    with pytest.raises(UserError, match=f"MASTER_PORT: expected a port, 1 to 65535, found {value}"):
        meet(0, 2, 1.0)


def test_a_port_that_is_taken(port):
    with socket.socket() as other:
        other.bind(("0.0.0.0", port))
        other.listen()
        with pytest.raises(UserError, match=f"cannot listen at 127.0.0.1:{port} .it is taken.; give the launcher another port"):
            meet(0, 2, 1.0)


def test_a_port_where_another_program_listens_and_says_nothing(port, monkeypatch):
    """Torch binds what is left of the port, IPv4, and both ranks reach the other program."""
    monkeypatch.setenv("MASTER_ADDR", "::1")
    with socket.create_server(("::1", port), family=socket.AF_INET6):
        with pytest.raises(UserError, match=rf"cannot listen at \[::1\]:{port} .it is taken.; give the launcher another port"):
            meet(0, 2, 2.0)
        with pytest.raises(RankLostError, match=rf"rank 0, at \[::1\]:{port}, did not come within 2 s"):
            meet(1, 2, 2.0)


def together(port, patience=60.0):
    """The store of two ranks, as each sees it."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda rank: meet(rank, 2, patience), (0, 1)))


def test_two_trainings_do_not_mix(port):
    stores = together(port)
    with pytest.raises(UserError, match=f"another training uses 127.0.0.1:{port} already"):
        meet(1, 2, 5.0)
    del stores


@pytest.mark.parametrize("explained", [False, True], ids=["without a word", "with its own words"])
def test_a_process_that_hangs_says_what_is_kept(explained, monkeypatch, capsys):
    """Its main thread waits in a collective that nobody will answer, so the watch speaks for it."""
    statuses: list[int] = []
    monkeypatch.setattr(watching, "GRACE", 0.05)
    monkeypatch.setattr(os, "_exit", statuses.append)
    watch = Watch(0, 1, None, 60.0, lambda: "step_12 is kept; go on")
    watch._end_process(RankLostError("rank 1: lost", True, explained=explained))
    assert statuses == [1]
    assert capsys.readouterr().err == ("sami-fast: rank 1: lost\n" if explained else "sami-fast: rank 1: lost; step_12 is kept; go on\n")
    watch.close()


@pytest.mark.parametrize("silent", [0, 1])
def test_a_silent_rank_is_named_by_the_other(silent, port):
    stores = together(port)
    if silent == 0:  # it holds the store: the process would be gone, and the store with it
        watch = Watch(1, 2, stores[1], 60.0)
        stores.clear()
    else:
        watch = Watch(0, 2, stores[0], 60.0)
    lost = watch.explain()
    watch.close()
    assert str(lost) == f"rank {silent} ended without a word, or answers no more"
    assert lost.speaks
    assert lost.status == 1


def _rank(rank: int, hung: int, port: int, output: Path) -> None:
    """Of three, one of which hangs while the others wait for it in a collective."""
    watching.GRACE = 2.0
    sys.stderr = output.open("w")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    init_distributed(patience=4.0)
    torch.distributed.barrier()
    output.with_suffix(".met").touch()
    if rank == hung:
        os.kill(os.getpid(), signal.SIGSTOP)
    torch.distributed.barrier()


@pytest.mark.timeout(200)
@pytest.mark.parametrize("hung", [0, 2])
def test_a_rank_that_hangs_is_named_in_time(hung, port, tmp_path):
    """It is alive, its connections too; rank 0 also holds the store at which all are asked for."""
    run = partial(multiprocessing.get_context("spawn").Process, target=_rank)
    ranks = [run(args=(rank, hung, int(os.environ["MASTER_PORT"]), tmp_path / str(rank))) for rank in range(3)]
    others = [rank for place, rank in enumerate(ranks) if place != hung]
    try:
        for rank in ranks:
            rank.start()
        while len(list(tmp_path.glob("*.met"))) < 3:
            time.sleep(0.01)
            assert all(rank.is_alive() for rank in ranks)
        began = time.monotonic()
        for rank in others:
            rank.join(60)
        assert time.monotonic() - began < 4 + 2 + 6  # patience, grace, and some signs of life
        assert [rank.exitcode for rank in others] == [1, 1]
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    speaks = 1 if hung == 0 else 0
    said = {place: (tmp_path / str(place)).read_text() for place in range(3)}
    assert said.pop(speaks) == f"sami-fast: rank {hung} ended without a word, or answers no more\n"
    assert set(said.values()) == {""}


def test_why_a_rank_ends_the_run_is_heard_by_the_others(port):
    stores = together(port)
    watches = [Watch(rank, 2, store, 60.0) for rank, store in enumerate(stores)]
    watches[1].end("data.path: no images", 2)
    with pytest.raises(RankLostError, match=r"rank 1: data\.path: no images") as caught:
        watches[0].told("a word that never comes")
    assert caught.value.speaks
    assert caught.value.status == 2
    assert watches[0].explain() is not None
    for watch in watches:
        watch.close()


def test_nobody_is_blamed_while_all_are_there(port):
    watches = [Watch(rank, 2, store, 60.0) for rank, store in enumerate(together(port))]
    assert watches[0].explain() is None
    for watch in reversed(watches):
        watch.close()


def test_ranks_in_words():
    assert named([3]) == "rank 3"
    assert named(range(20)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more"
    assert named([1, 3], {0: "a", 1: "a", 2: "b", 3: "b"}) == "ranks 1 on a, 3 on b"


RANK = """
import sys, time
from sami_fast.engine import watch
watch.GRACE = 1.0
rank = int(sys.argv[1])
own = watch.Watch(rank, 2, watch.meet(rank, 2, 60.0), 3.0)
time.sleep(3 * watch.BEAT)
print("met", flush=True)
own.told("a word that never comes")
"""


def test_a_machine_that_is_cut_off_is_named(port):
    """The connection to the store of rank 0 stays open, and nobody answers there: whoever asks it for anything would wait for good."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    first, second = (subprocess.Popen([sys.executable, "-c", RANK, str(rank)], **pipes) for rank in (0, 1))
    try:
        assert [rank.stdout.readline() for rank in (first, second)] == ["met\n"] * 2
        first.send_signal(signal.SIGSTOP)
        _, said = second.communicate(timeout=120)
        assert (second.returncode, said) == (1, "sami-fast: rank 0 ended without a word, or answers no more\n")
    finally:
        first.kill()
        second.kill()


def test_a_first_rank_ends_where_torchrun_with_the_store_is_cut_off(port):
    holds = f"import torch.distributed as d; s = d.TCPStore('127.0.0.1', {port}, None, True); print('met', flush=True); input()"
    around = os.environ | {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    torchrun = subprocess.Popen([sys.executable, "-c", holds], stdin=subprocess.PIPE, **pipes)
    first, second = (subprocess.Popen([sys.executable, "-c", RANK, str(rank)], env=around, **pipes) for rank in (0, 1))
    try:
        assert [process.stdout.readline() for process in (torchrun, first, second)] == ["met\n"] * 3
        torchrun.send_signal(signal.SIGSTOP)
        _, said = first.communicate(timeout=120)
        assert (first.returncode, said) == (1, "sami-fast: the store of keys, which torchrun holds, answers no more\n")
    finally:
        for process in (torchrun, first, second):
            process.kill()


def test_the_interface_to_other_machines(port):
    """All on one machine: none is better than another. One elsewhere: that by which it is reached, whatever this machine's name means."""
    with ThreadPoolExecutor(2) as pool:
        stores = together(port)
        assert list(pool.map(lambda rank: interface(stores[rank], rank, 2), (0, 1))) == ["", ""]
    own = next(
        (p.address for places in psutil.net_if_addrs().values() for p in places if p.family == socket.AF_INET and "127." not in p.address),
        "",
    )
    if not own:
        pytest.skip("this machine has no network")
    name = interface(OneElsewhere(stores[0], own), 0, 2)
    assert own in [place.address for place in psutil.net_if_addrs()[name]]


class OneElsewhere:
    """A store where rank 1 has left the address of another machine: any that is not this one's loopback."""

    def __init__(self, store, address):
        self.store, self.address = store, address

    def set(self, key, value):
        self.store.set(key, value)

    def get(self, key):
        return self.address.encode() if key == "address 1" else self.store.get(key)


# ---- all of it together


@pytest.mark.parametrize("ranks", [1, 2])
def test_kills_lose_nothing(ranks, tmp_path):
    """A short form of what tests/kill_campaign.py does at length."""
    assert campaign(tmp_path, 3, [ranks], seed=ranks).total() == 3
