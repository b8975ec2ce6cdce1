"""The processes of a run: joining them, and what rank 0 does for all."""

import itertools
import os
import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch

from ..environment import cores_of_rank, whole_number
from ..errors import RankLostError, UserError
from .watch import Watch, meet

_watch: Watch | None = None
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
    return _meet(action, range(torch.distributed.get_world_size()))


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
    torch.distributed.barrier()  # rank 0 holds what the others read: it must not leave before
    if failure:
        raise UserError(failure)
    return cast(T, done)


def init_distributed(patience: float) -> tuple[int, int, torch.device]:
    """Join the process group the launcher describes, or make one of a single process.

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
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # What DeepSpeed logs below errors helps its developers only. It reads these when it is first imported.
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    os.environ.setdefault("LOG_LEVEL", "error")
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.constants import default_pg_timeout

    # DeepSpeed would spend a minute compiling a shared-memory collective for CPU inference, which training never calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    # torch has renamed two collectives that DeepSpeed calls; a user can do nothing about it.
    warnings.filterwarnings("ignore", r".*(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated", FutureWarning)

    accelerator = get_accelerator()
    if accelerator.is_available() and accelerator.device_name() != "cpu":
        accelerator.set_device(local_rank)
        device = torch.device(accelerator.device_name(local_rank))
    else:
        device = torch.device("cpu")
    if not deepspeed.comm.is_initialized():
        backend = "gloo" if device.type == "cpu" else accelerator.communication_backend_name()
        os.environ["LOCAL_RANK"] = str(local_rank)  # DeepSpeed asks for it, launcher or not
        alone = world_size == 1  # a group of one needs no port, which another run may have taken
        store = None if alone else meet(rank, world_size, patience)
        if store is not None:
            store.set_timeout(default_pg_timeout)  # of what the group waits for there; the ranks have met
        group = torch.distributed.PrefixStore("group", store) if store else torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, timeout=default_pg_timeout, store=group, rank=rank, world_size=world_size)
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
        _watch = Watch(rank, world_size, store, patience)
    elif _watch is None:  # a group that the caller made
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        store = None if world_size == 1 else torch.distributed.distributed_c10d._get_default_store()
        _watch = Watch(rank, world_size, store, patience)
    return rank, world_size, device


def leave_distributed() -> None:
    """Leave the process group; `init_distributed` may join another one later."""
    global _watch
    import deepspeed

    if _watch is not None:
        _watch.close()
        _watch = None  # the others are not missed any more
    deepspeed.comm.destroy_process_group()


def end_run(words: str, status: int) -> None:
    """Let the other ranks know why this one ends the run."""
    if _watch is not None:
        _watch.end(words, status)


def lost_rank() -> RankLostError | None:
    """The rank to blame for an error in this one, if there is one."""
    return _watch.explain() if _watch is not None else None


def set_arithmetic(tf32: bool = False, deterministic: bool = True) -> None:
    """How a GPU computes in float32, of this process: by default in full precision and with the same algorithms every time, so that neither
    a restart nor the number of ranks changes results beyond rounding. Arguments: `EngineConfig`."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = deterministic, not deterministic


def set_threads(threads: int) -> None:
    """CPU threads of this rank; 0 gives every rank of the machine an equal share of the cores it may use."""
    torch.set_num_threads(threads or cores_of_rank())
