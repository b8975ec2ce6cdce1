"""Who is there: the ranks meet before a run begins, and each gives a sign of life every second, so that who is missing can be named.

A collective that waits for a rank which is gone fails late and in words of its own, or never. So the ranks also speak through a store of
keys and values, the one at which torch's process groups meet, from a thread that no collective holds up.
"""

import atexit
import ipaddress
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import timedelta
from queue import Empty, Queue

import psutil
from torch.distributed import DistNetworkError, DistStoreError, PrefixStore, Store, TCPStore

from ..environment import speaks, whole_number
from ..errors import RankLostError, UserError, one_line

BEAT = 1.0  # seconds between two signs of life
SPEAK = 10.0  # seconds of waiting before it is said who is waited for
GRACE = 10.0  # seconds in which a process may end by itself once the run has ended
ENDED = "ended"  # key of who ended the run, and why
LEFT = "left"  # key of the first rank whose launcher is gone


def named(ranks: Iterable[int], hosts: Mapping[int, str] | None = None) -> str:
    """Ranks in words, and where each is; of many, the first."""
    ranks = list(ranks)
    words = [f"{rank} on {hosts[rank]}" if hosts and rank in hosts else str(rank) for rank in ranks[:8]]
    text = ", ".join(words) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"


def meet(rank: int, world_size: int, patience: float) -> Store:
    """Wait for all ranks. Returns a store that they share.

    Args:
        rank, world_size: This process among all.
        patience: Seconds.
    Raises:
        UserError: MASTER_ADDR or MASTER_PORT cannot be used.
        RankLostError: some rank did not come.
    """
    began, told = time.monotonic(), False

    def wait_for(missing: Callable[[], str], speaks: bool) -> None:
        nonlocal told
        waited = time.monotonic() - began
        if waited > patience:
            raise RankLostError(f"{missing()} did not come within {patience:.0f} s (engine.patience)", speaks)
        if waited > SPEAK and speaks and not told:
            told = True
            print(f"waiting for {missing()}", file=sys.stderr, flush=True)

    while (store := _store(rank, min(SPEAK, patience))) is None:
        wait_for(lambda: f"rank 0, at {_place()},", rank == 1)  # it holds the store: who else is missing cannot be known yet
    if store.add(f"rank {rank}", 1) > 1:
        raise UserError(f"MASTER_PORT: another training uses {_place()} already; {OTHER_PORT}")
    store.set(f"alive {rank}", _sign(0))
    while away := [other for other in range(world_size) if not store.check([f"alive {other}"])]:
        wait_for(lambda away=away: named(away), rank == 0)
        time.sleep(0.05)
    return store


def interface(store: Store, rank: int, world_size: int) -> str:
    """Of this machine's network interfaces, that by which other machines reach it; empty where all ranks are on one, or it is not found.

    Gloo would take the address of the machine's name: on many machines that is the machine itself, or there is none.
    """
    target = (os.environ["MASTER_ADDR"], whole_number("MASTER_PORT", 0))
    store.set(f"address {rank}", _own_address(*target) if rank else "")
    told = [store.get(f"address {other}").decode() for other in range(world_size)]
    outside = [address for address in told if address and not ipaddress.ip_address(address).is_loopback]
    own = told[rank] if told[rank] in outside else _own_address(outside[0], target[1]) if outside else ""
    return next((name for name, places in psutil.net_if_addrs().items() if own in [place.address for place in places]), "")


def _own_address(host: str, port: int) -> str:
    """That from which this machine would speak to another; empty if it cannot. Nothing is sent."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as ours:
            ours.connect(place)
            return ours.getsockname()[0]
    except OSError:
        return ""


OTHER_PORT = "give the launcher another port, deepspeed --master_port 29501"


def _sign(beat: int) -> str:
    """Of life: how many there were, and the host they come from."""
    return f"{beat} {socket.gethostname()}"


def _place() -> str:
    address = os.environ["MASTER_ADDR"]
    return f"{f'[{address}]' if ':' in address else address}:{os.environ['MASTER_PORT']}"


def _store(rank: int, seconds: float) -> Store | None:
    """The store of the ranks, which rank 0 holds, or torchrun; None while nobody answers."""
    port = whole_number("MASTER_PORT", 0)
    if not 0 < port < 1 << 16:
        raise UserError(f"environment variable MASTER_PORT: expected a port, 1 to 65535, found {port}")
    held = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    holds = rank == 0 and not held
    limit = timedelta(seconds=seconds)
    try:
        if not holds:  # torch would wait for rank 0 too, but deaf to signals, and with a stack of C++ at the end
            socket.create_connection((os.environ["MASTER_ADDR"], port), seconds).close()
        store = _within(
            seconds, lambda: TCPStore(os.environ["MASTER_ADDR"], port, None, holds, limit, wait_for_workers=False, multi_tenant=True)
        )
    except (OSError, DistNetworkError, DistStoreError) as error:
        if not holds:
            time.sleep(0.2)
            return None
        raise UserError(f"MASTER_PORT: cannot listen at {_place()} ({_reason(error)}); {OTHER_PORT}") from None
    return PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store) if held else store


def _within(seconds: float, make: Callable[[], TCPStore]) -> TCPStore:
    """A store, unless who listens there is another program: torch would wait for its first word for ever."""
    made: Queue[TCPStore | Exception] = Queue()

    def begin() -> None:
        try:
            made.put(make())
        except Exception as error:  # for who waits to judge
            made.put(error)

    threading.Thread(target=begin, name="store", daemon=True).start()
    try:
        found = made.get(timeout=seconds)
    except Empty:
        raise TimeoutError("no answer") from None
    if isinstance(found, Exception):
        raise found
    return found


def _reason(error: Exception) -> str:
    return "it is taken" if isinstance(error, TimeoutError) or "EADDRINUSE" in str(error) else one_line(error, 200)


class Watch:
    """Threads beside training: this rank's signs of life, and an eye on the other ranks, the launcher and the machine with the store.

    Args:
        rank, world_size: This process among all.
        store: From `meet`; None where one process works alone.
        patience: Seconds of silence after which a rank is given up.
        way_on: Says what is kept of the run and how to go on, for where this process can only be ended from here.
    """

    def __init__(self, rank: int, world_size: int, store: Store | None, patience: float, way_on: Callable[[], str] = lambda: "") -> None:
        self.rank, self.world_size, self.patience, self._way_on = rank, world_size, patience, way_on
        # A connection of its own: another thread may wait in the first.
        self._store, self._beats = store, store.clone() if store else None  # pyrefly: ignore[missing-attribute] (stubs lack it)
        self._launchers = _launchers()
        self._over, self._known = threading.Event(), threading.Event()  # the run; who is lost
        self._farewell: dict | None = None  # rank, words and status of who ended the run
        self._answers = 0  # of the store, so far
        self._hosts: dict[int, str] = {}  # of each rank, where there are several
        held = bool(rank) or "TORCHELASTIC_RUN_ID" in os.environ  # by another process: rank 0, or torchrun
        looks = [self._look, *([self._mind_the_store] if store and held else [])]
        self._threads = [threading.Thread(target=look, name="watch", daemon=True) for look in looks]
        if store or self._launchers:
            for thread in self._threads:
                thread.start()
            atexit.register(self.close)  # torch aborts the process if its end finds a thread inside the store

    def close(self) -> None:
        """The run is over: nobody is missed any more."""
        self._over.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(GRACE)  # the store may answer no more
        atexit.unregister(self.close)

    def end(self, words: str, status: int) -> None:
        """Tell the other ranks why this one ends the run. The words of the first stay."""
        if self._store is None:
            return
        try:
            self._store.compare_set(ENDED, "", json.dumps({"rank": self.rank, "words": words, "status": status}))
            if self.rank == 0:
                time.sleep(2 * BEAT)  # the store ends with this process: let the others hear of it
        except RuntimeError:
            pass  # there is no store any more, and nobody to tell

    def told(self, key: str) -> str:
        """What some rank left under a key, once it is there. Unlike a collective this waits as long as it takes, and signals are heard.

        Raises:
            RankLostError: another rank has ended the run.
            RuntimeError: rank 0 is gone.
        """
        assert self._store is not None
        pause = 0.005
        while not self._store.check([key]):
            if self._farewell:
                raise self._lost([])
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
        return self._store.get(key).decode()

    def tell(self, key: str, value: str) -> None:
        """Leave what `told` waits for."""
        if self._store is not None:
            self._store.set(key, value)

    def explain(self) -> RankLostError | None:
        """Which rank is to blame for an error in this one, which may be that of a collective; None if all are there."""
        if self._store is None:
            return None
        try:
            before = self._signs(self._store)
            for _ in range(4):
                time.sleep(BEAT)
                if self._farewell:
                    return self._lost([])
            silent = [rank for rank, sign in self._signs(self._store).items() if sign == before[rank]]
        except RuntimeError:
            return self._lost([0])
        return self._lost(silent) if silent else None

    def _lost(self, silent: list[int]) -> RankLostError:
        """In words, which one rank says: rank 0, if it is there."""
        if (farewell := self._farewell) is not None:
            who = named([farewell["rank"]], self._hosts)
            return RankLostError(f"{who}: {farewell['words']}", self.rank == 0, farewell["status"], explained=True)
        if self.rank in silent:
            return RankLostError("the store of keys, which torchrun holds, answers no more", True)
        speaks = self.rank == (1 if 0 in silent else 0)
        return RankLostError(f"{named(silent, self._hosts)} ended without a word, or answers no more", speaks)

    def _signs(self, store: Store) -> dict[int, bytes]:
        """The last sign of life of each other rank."""
        ranks = [rank for rank in range(self.world_size) if rank != self.rank]
        return dict(zip(ranks, store.multi_get([f"alive {rank}" for rank in ranks]), strict=True))

    def _look(self) -> None:
        beat, heard, left = 0, {}, False  # time is counted in beats: who has been stopped, as by Ctrl-Z, misses nobody
        while not self._over.wait(BEAT):
            if self._launchers and not _are_there(self._launchers):
                self._launchers, left = [], True
                os.kill(os.getpid(), signal.SIGTERM)
                if speaks():
                    _say("the launcher has ended")
            if self._beats is None:
                continue
            beat += 1
            try:
                self._beats.set(f"alive {self.rank}", _sign(beat))
                if left:
                    self._beats.compare_set(LEFT, "", str(self.rank))
                self._hosts = self._hosts if beat > 1 else self._places(self._beats)
                if self._beats.check([ENDED]):
                    self._farewell = json.loads(self._beats.get(ENDED))
                if not left and self._beats.check([LEFT]):
                    left = True
                    self._tell_who_left(int(self._beats.get(LEFT)))
                silent = self._silent(self._beats, heard, beat) if self.rank == 0 else []
            except RuntimeError:
                silent = [0]
            self._answers += 1
            if self._farewell or silent:
                self._known.set()
                break
        else:
            return
        lost = self._lost(silent)
        if silent and self.rank == 0:
            self.end(str(lost), lost.status)
        self._end_process(lost)

    def _mind_the_store(self) -> None:
        """End this process where who holds the store, rank 0 or torchrun, hangs or is cut off: asking it waits for ever, in any thread."""
        waited, answers = 0.0, 0
        while not (self._over.wait(BEAT) or self._known.is_set()):
            waited, answers = waited + BEAT if self._answers == answers else 0.0, self._answers
            if waited > self.patience:
                return self._end_process(self._lost([0]))

    def _end_process(self, lost: RankLostError) -> None:
        """The main thread ends by itself, unless it waits in a collective that nobody will ever answer."""
        if not self._over.wait(GRACE):
            if lost.speaks:
                _say(f"sami-fast: {'; '.join(filter(None, [str(lost), '' if lost.explained else self._kept()]))}")
            os._exit(lost.status)

    def _kept(self) -> str:
        """The words of `way_on`; none where there are none in time: they come from files, and a file system may be gone as well."""
        found: Queue[str] = Queue()

        def ask() -> None:
            with suppress(Exception):
                found.put(self._way_on())

        threading.Thread(target=ask, name="way on", daemon=True).start()
        with suppress(Empty):
            return found.get(timeout=GRACE)
        return ""

    def _places(self, store: Store) -> dict[int, str]:
        """The host of each rank; none where all have the same."""
        hosts = {rank: sign.decode().partition(" ")[2] for rank, sign in self._signs(store).items()} | {self.rank: socket.gethostname()}
        return hosts if len(set(hosts.values())) > 1 else {}

    def _tell_who_left(self, rank: int) -> None:
        if self.rank == (1 if rank == 0 else 0):
            _say(f"{named([rank], self._hosts)}: the launcher has ended, or the connection to it")

    def _silent(self, store: Store, heard: dict[int, tuple[bytes, int]], beat: int) -> list[int]:
        """Ranks whose sign has stood still for too long; `heard` is at which beat each was last seen to change."""
        for rank, sign in self._signs(store).items():
            if rank not in heard or heard[rank][0] != sign:
                heard[rank] = sign, beat
        return [rank for rank, (_, when) in heard.items() if (beat - when) * BEAT > self.patience]


def _say(words: str) -> None:
    with suppress(OSError):  # with the launcher may be gone who reads it
        print(words, file=sys.stderr, flush=True)


def _launchers() -> list[int]:
    """Processes that look after this rank, upwards: DeepSpeed's launcher and the command behind it, or the connection that the command has
    to this machine; or torchrun. A shell may end."""
    if not os.environ.get("RANK"):
        return []
    try:
        parent = psutil.Process(os.getppid())
        if "deepspeed.launcher.launch" in parent.cmdline():
            launchers, above = [parent.pid], parent.parent()
            words = " ".join(above.cmdline()) if above else ""
            if above and "deepspeed" in words:
                launchers.append(above.pid)
                above = above.parent() if "deepspeed.launcher.launch" in words else None  # a shell that does what the command has asked
            return [*launchers, above.pid] if above and above.name() == "sshd" else launchers
    except psutil.Error:
        return []
    return [parent.pid] if "TORCHELASTIC_RUN_ID" in os.environ else []


def _are_there(launchers: list[int]) -> bool:
    """Whoever has lost its parent has been given another one."""
    try:
        parents = [os.getppid()] + [psutil.Process(pid).ppid() for pid in launchers[:-1]]
    except psutil.Error:
        return False
    return parents == launchers
