"""Who is there: the ranks meet before a run begins, and each gives a sign of life every second, so that who is missing can be named.

A collective that waits for a rank which is gone fails late and in words of its own, or never. So the ranks also speak through a store of
keys and values, the one at which torch's process groups meet, from a thread that no collective holds up.
"""

import atexit
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta

import psutil
from torch.distributed import DistNetworkError, DistStoreError, PrefixStore, Store, TCPStore

from ..environment import speaks, whole_number
from ..errors import RankLostError, UserError, one_line

BEAT = 1.0  # seconds between two signs of life
SPEAK = 10.0  # seconds of waiting before it is said who is waited for
GRACE = 10.0  # seconds in which a process may end by itself once the run has ended
ENDED = "ended"  # key of who ended the run, and why


def named(ranks: Iterable[int]) -> str:
    """Ranks in words; of many, the first."""
    ranks = list(ranks)
    text = ", ".join(str(rank) for rank in ranks[:8]) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
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
    store.set(f"alive {rank}", "0")
    while away := [other for other in range(world_size) if not store.check([f"alive {other}"])]:
        wait_for(lambda away=away: named(away), rank == 0)
        time.sleep(0.05)
    return store


OTHER_PORT = "give the launcher another port, deepspeed --master_port 29501"


def _place() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


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
        store = TCPStore(os.environ["MASTER_ADDR"], port, None, holds, limit, wait_for_workers=False, multi_tenant=True)
    except (OSError, DistNetworkError, DistStoreError) as error:
        if not holds:
            time.sleep(0.2)
            return None
        raise UserError(f"MASTER_PORT: cannot listen at {_place()} ({_reason(error)}); {OTHER_PORT}") from None
    return PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store) if held else store


def _reason(error: Exception) -> str:
    return "it is taken" if "EADDRINUSE" in str(error) else one_line(error, 200)


class Watch:
    """A thread beside training: this rank's signs of life, and an eye on the other ranks and the launcher.

    Args:
        rank, world_size: This process among all.
        store: From `meet`; None where one process works alone.
        patience: Seconds of silence after which a rank is given up.
    """

    def __init__(self, rank: int, world_size: int, store: Store | None, patience: float) -> None:
        self.rank, self.world_size, self.patience = rank, world_size, patience
        # A connection of its own: another thread may wait in the first.
        self._store, self._beats = store, store.clone() if store else None  # pyrefly: ignore[missing-attribute] (stubs lack it)
        self._launchers = _launchers()
        self._over, self._known = threading.Event(), threading.Event()  # the run; who is lost
        self._farewell: dict | None = None  # rank, words and status of who ended the run
        self._answers = 0  # of the store, so far
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        if store and rank:
            threading.Thread(target=self._mind_the_store, name="watch of the store", daemon=True).start()
        if store or self._launchers:
            self._thread.start()
            atexit.register(self.close)  # torch aborts the process if its end finds a thread inside the store

    def close(self) -> None:
        """The run is over: nobody is missed any more."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
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
            before = self._counts()
            for _ in range(4):
                time.sleep(BEAT)
                if self._farewell:
                    return self._lost([])
            silent = [rank for rank, count in self._counts().items() if count == before[rank]]
        except RuntimeError:
            return self._lost([0])
        return self._lost(silent) if silent else None

    def _lost(self, silent: list[int]) -> RankLostError:
        """In words, which one rank says: rank 0, if it is there."""
        if (farewell := self._farewell) is not None:
            return RankLostError(f"rank {farewell['rank']}: {farewell['words']}", self.rank == 0, farewell["status"], explained=True)
        speaks = self.rank == (1 if 0 in silent else 0)
        return RankLostError(f"{named(silent)} ended without a word, or answers no more", speaks)

    def _counts(self) -> dict[int, bytes]:
        assert self._store is not None
        ranks = [rank for rank in range(self.world_size) if rank != self.rank]
        return dict(zip(ranks, self._store.multi_get([f"alive {rank}" for rank in ranks]), strict=True))

    def _look(self) -> None:
        beat, heard = 0, {}  # time is counted in beats: who has been stopped, as by Ctrl-Z, misses nobody
        while not self._over.wait(BEAT):
            if self._launchers and not _are_there(self._launchers):
                self._launchers = []
                if speaks():
                    print("the launcher has ended", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGTERM)
            if self._beats is None:
                continue
            beat += 1
            try:
                self._beats.set(f"alive {self.rank}", str(beat))
                if self._beats.check([ENDED]):
                    self._farewell = json.loads(self._beats.get(ENDED))
                silent = self._silent(heard, beat) if self.rank == 0 else []
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
        # The main thread ends by itself, unless it waits in a collective that nobody will ever answer.
        if not self._over.wait(GRACE):
            _leave(lost)

    def _mind_the_store(self) -> None:
        """End this process where rank 0, which holds the store, lives and answers no more: asking it would wait for ever, in any thread."""
        waited, answers = 0.0, 0
        while not (self._over.wait(BEAT) or self._known.is_set()):
            waited, answers = waited + BEAT if self._answers == answers else 0.0, self._answers
            if waited > self.patience:
                _leave(self._lost([0]))

    def _silent(self, heard: dict[int, tuple[bytes, int]], beat: int) -> list[int]:
        """Ranks whose count has stood still for too long; `heard` is at which beat each was last seen to change."""
        for rank, count in self._counts().items():
            if rank not in heard or heard[rank][0] != count:
                heard[rank] = count, beat
        return [rank for rank, (_, when) in heard.items() if (beat - when) * BEAT > self.patience]


def _leave(lost: RankLostError) -> None:
    """End the process, whatever its threads wait for."""
    if lost.speaks:
        print(f"sami-fast: {lost}", file=sys.stderr, flush=True)
    os._exit(lost.status)


def _launchers() -> list[int]:
    """Processes that look after this rank, upwards: DeepSpeed's launcher and the command behind it, or torchrun. A shell may end."""
    if not os.environ.get("RANK"):
        return []
    try:
        parent = psutil.Process(os.getppid())
        if "deepspeed.launcher.launch" in parent.cmdline():
            command = parent.parent()
            return [parent.pid, command.pid] if command and "deepspeed" in " ".join(command.cmdline()) else [parent.pid]
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
