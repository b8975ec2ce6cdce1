"""The processes of a run: joining them, what they tell one another, and what rank 0 does for all.

A process that works alone needs no process group, and gets none; in a group of any size the functions here mean the same.
"""

import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch.distributed import HashStore, PrefixStore, Store

from ..environment import whole_number
from ..errors import RankLostError, UserError
from ..methods.ranks import ranks
from .watch import Watch, interface, meet

_watch: Watch | None = None
_way_on: Callable[[], str] | None = None  # of `way_on`
_actions = itertools.count()  # every rank counts the same
T = TypeVar("T")


def on_chief(action: Callable[[], object]) -> None:
    """Rank 0 acts while the others wait, however long it takes; what a user must hear of its failure is raised on all of them.

    Raises:
        UserError: the action raised one, or an OSError.
    """
    _meet(action, [0])


def on_each(action: Callable[[], T]) -> T:
    """Every rank acts, each as long as it needs, and all wait for the last; else as `on_chief`. Returns what the rank's own action did."""
    return _meet(action, range(ranks()[1]))


def agreed(value: T) -> T:
    """The first rank's value, on every rank."""
    values = [value]
    if ranks()[1] > 1:
        torch.distributed.broadcast_object_list(values)
    return values[0]


def gathered(value: T) -> list[T]:
    """What every rank gives, so that all of them learn of what happened to one."""
    count = ranks()[1]
    if count == 1:
        return [value]
    values: list[Any] = [None] * count
    torch.distributed.all_gather_object(values, value)
    return values


def wait_for_all() -> None:
    """Go on when every rank has come here."""
    if ranks()[1] > 1:
        torch.distributed.barrier()


def _meet(action: Callable[[], T], acting: Sequence[int]) -> T:
    """Some ranks act, and all wait for them at their store: a collective would end the run after the group's timeout."""
    number, done, heard = next(_actions), None, {}
    assert _watch is not None
    if _watch.rank in acting:
        try:
            done, heard[_watch.rank] = action(), ""
        except (UserError, OSError) as error:
            heard[_watch.rank] = str(error) or type(error).__name__
        _watch.tell(f"action {number} of {_watch.rank}", heard[_watch.rank])
    heard |= {rank: _watch.told(f"action {number} of {rank}") for rank in acting if rank != _watch.rank}
    failure = heard.get(_watch.rank) or next(filter(None, heard.values()), "")
    wait_for_all()  # rank 0 holds what the others read: it must not leave before
    if failure:
        raise UserError(failure)
    return cast(T, done)


def collective_timeout() -> timedelta:
    """How long a collective waits; as DeepSpeed has it, whose variable also means this one."""
    return timedelta(minutes=whole_number("DEEPSPEED_TIMEOUT", 10))


def init_distributed(patience: float) -> tuple[int, int, torch.device]:
    """Join the process group the launcher describes; a process that works alone needs none.

    Args:
        patience: `EngineConfig.patience`.
    Returns:
        rank, world size, this rank's device.
    Raises:
        UserError: the launcher's variables make no sense, or the port cannot be used.
        RankLostError: another rank did not come.
    """
    global _watch
    local_rank, launched = whole_number("LOCAL_RANK", 0), bool(os.environ.get("RANK"))
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if launched and missing:
        raise UserError(f"environment variable {missing[0]}: missing while RANK is set; use a launcher, or unset RANK")
    rank, world_size = (whole_number("RANK", 0), whole_number("WORLD_SIZE", 1)) if launched else (0, 1)
    if rank >= world_size:
        raise UserError(f"environment variable RANK: expected less than WORLD_SIZE, {world_size}, found {rank}")

    device, store = _device(local_rank), None
    if torch.distributed.is_initialized():  # a group that the caller made, or this function before
        rank, world_size = ranks()
        store = None if world_size == 1 or _watch else torch.distributed.distributed_c10d._get_default_store()
    elif world_size > 1:
        os.environ["LOCAL_RANK"] = str(local_rank)  # DeepSpeed asks for it, launcher or not
        store = meet(rank, world_size, patience)
        store.set_timeout(collective_timeout())  # of what the group waits for there; the ranks have met
        if device.type == "cpu" and not os.environ.get("GLOO_SOCKET_IFNAME") and (name := interface(store, rank, world_size)):
            os.environ["GLOO_SOCKET_IFNAME"] = name
        join_group(device, rank, world_size, store)
    if _watch is None:
        _watch = Watch(rank, world_size, store, patience, lambda: _way_on() if _way_on else "")
    return rank, world_size, device


def usable_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        UserError: there is none, or torch cannot use it here.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:  # unknown name, no such device, a torch built without it: every backend has its own kind
        raise UserError(f"--device: {name} cannot be used here ({str(error).splitlines()[0][:120]})") from None
    return device


def take_device(name: str) -> None:
    """Let this process train on a device: said as a launcher would say it, for `init_distributed`.

    Raises:
        UserError: as `usable_device`; or a launcher has given this process a GPU.
    """
    device = usable_device(name)
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    elif os.environ.get("RANK"):
        raise UserError(f"--device: a launcher gives each process a GPU of its own; leave it out, found {name}")
    else:
        os.environ["LOCAL_RANK"] = str(device.index or 0)


def _device(local_rank: int) -> torch.device:
    """This rank's own."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None or os.environ.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    torch.accelerator.set_device_index(local_rank)
    return torch.device(accelerator.type, local_rank)


def join_group(device: torch.device, rank: int, world_size: int, store: Store | None) -> None:
    """Make torch's process group of ranks that have met at a store; of one process, without any port, which another run may have taken."""
    backend = torch.distributed.get_default_backend_for_device(device)
    place = PrefixStore("group", store) if store else HashStore()
    torch.distributed.init_process_group(backend, timeout=collective_timeout(), store=place, rank=rank, world_size=world_size)


def leave_distributed() -> None:
    """Leave the process group, if there is one; `init_distributed` may join another one later."""
    global _watch
    if _watch is not None:
        _watch.close()
        _watch = None  # the others are not missed any more
    if torch.distributed.is_initialized():
        deepspeed = sys.modules.get("deepspeed")
        used = deepspeed is not None and deepspeed.comm.is_initialized()
        (deepspeed.comm if used else torch.distributed).destroy_process_group()


def end_run(words: str, status: int) -> None:
    """Let the other ranks know why this one ends the run."""
    if _watch is not None:
        _watch.end(words, status)


@contextmanager
def way_on(words: Callable[[], str]) -> Iterator[None]:
    """Inside, who hangs because another rank is lost can be told what is kept of the run, and how to go on."""
    global _way_on
    before, _way_on = _way_on, words
    try:
        yield
    finally:
        _way_on = before


def lost_rank() -> RankLostError | None:
    """The rank to blame for an error in this one, if there is one."""
    return _watch.explain() if _watch is not None else None


@contextmanager
def torch_as_it_was() -> Iterator[None]:
    """Afterwards torch has the threads and the arithmetic that it had before."""
    threads, matmul, cudnn = torch.get_num_threads(), torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = before


def set_arithmetic(tf32: bool = False, deterministic: bool = True) -> None:
    """How a GPU computes in float32, of this process: by default in full precision and with the same algorithms every time, so that neither
    a restart nor the number of ranks changes results beyond rounding. Arguments: `EngineConfig`."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = deterministic, not deterministic
