"""The processes of a run: joining them, what rank 0 does for all, averages over them."""

import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import UserError


def from_environment(name: str, default: int) -> int:
    """A whole number that a launcher left in the environment.

    Raises:
        UserError: it is something else.
    """
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise UserError(f"environment variable {name}: expected a whole number, found {text!r}")
    return int(text)


def on_chief(action: Callable[[], object]) -> None:
    """Rank 0 acts while the others wait; what a user must hear of its failure is raised on all of them.

    Raises:
        UserError: the action raised one, or an OSError.
    """
    failure = [""]
    if torch.distributed.get_rank() == 0:
        try:
            action()
        except (UserError, OSError) as error:
            failure = [str(error)]
    torch.distributed.broadcast_object_list(failure)
    if failure[0]:
        raise UserError(failure[0])


def init_distributed() -> tuple[int, int, torch.device]:
    """Join the process group the launcher describes, or make one of a single process.

    Returns:
        rank, world size, this rank's device.
    """
    local_rank = from_environment("LOCAL_RANK", 0)
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if "RANK" in os.environ and missing:
        raise UserError(f"environment variable {missing[0]}: missing while RANK is set; use a launcher, or unset RANK")
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # What DeepSpeed logs below errors helps its developers only. It reads these when it is first imported.
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    os.environ.setdefault("LOG_LEVEL", "error")
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    # DeepSpeed would spend a minute compiling a shared-memory collective for CPU inference, which training never calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    # torch has renamed two collectives that DeepSpeed calls; a user can do nothing about it.
    warnings.filterwarnings("ignore", r".*(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated", FutureWarning)

    # No TF32, and the same algorithm every time, so that neither a restart nor the number of ranks changes results beyond rounding.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True

    accelerator = get_accelerator()
    if accelerator.is_available() and accelerator.device_name() != "cpu":
        accelerator.set_device(local_rank)
        device = torch.device(accelerator.device_name(local_rank))
    else:
        device = torch.device("cpu")
    if not deepspeed.comm.is_initialized():
        backend = "gloo" if device.type == "cpu" else accelerator.communication_backend_name()
        if "RANK" not in os.environ:  # no launcher: a group of one needs no port and no environment variables
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for this one all the same
            torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
    return torch.distributed.get_rank(), torch.distributed.get_world_size(), device


def leave_distributed() -> None:
    """Leave the process group; `init_distributed` may join another one later."""
    import deepspeed

    deepspeed.comm.destroy_process_group()


def set_threads(threads: int) -> None:
    """CPU threads of this rank; 0 gives every rank of the machine an equal share of the cores it may use."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    name = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in os.environ), "WORLD_SIZE")
    local_ranks = max(1, from_environment(name, 1) if "RANK" in os.environ else 1)
    torch.set_num_threads(threads or max(1, available // local_ranks))


def mean_over_ranks(local_mean: Tensor) -> Tensor:
    """Average of a small tensor over ranks; the tensor itself where one process works alone."""
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if ranks == 1:
        return local_mean
    total = local_mean.clone()
    torch.distributed.all_reduce(total)
    return total / ranks
