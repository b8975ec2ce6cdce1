"""DeepSpeed: processes, one engine around both networks, backward and update, averaged weights, checkpoints."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoints import MANIFEST, fingerprint, sync, write_failure
from .config import Config, deepspeed_dict
from .errors import UserError
from .files import PARTIAL, write_text_whole


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
    # DeepSpeed's own news are for its developers; these must stand before its first import.
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    os.environ.setdefault("LOG_LEVEL", "error")
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    # DeepSpeed would spend a minute compiling a shared-memory collective for CPU inference, which training never calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    # float32 means float32: rank counts and restarts must not show. bf16 is the switch for speed.
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
            os.environ.setdefault("LOCAL_RANK", "0")  # the one DeepSpeed insists on
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


def _nvidia_apex_adam() -> type[torch.optim.Optimizer]:
    try:
        from apex.optimizers import FusedAdam
    except Exception:  # the namesake on PyPI may fail in any way, at import or for lack of optimizers
        raise UserError(
            "optimizer.implementation: apex asked for, but NVIDIA apex is not installed (the `apex` on PyPI is another project); use torch"
        ) from None
    return FusedAdam


def build_optimizer(networks: dict[str, nn.Module], config: Config, device: torch.device) -> torch.optim.Optimizer:
    """One optimiser with a parameter group per trained network, under the network's name.

    Raises:
        UserError: the asked-for implementation cannot run here.
    """
    settings = config.optimizer
    decoupled = settings.kind == "adamw"
    groups = [
        {"params": trained, "name": name}
        for name, network in networks.items()
        if (trained := [p for p in network.parameters() if p.requires_grad])
    ]
    arguments: dict[str, Any] = {
        "lr": settings.lr,
        "betas": tuple(settings.betas),
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    if settings.implementation == "torch":
        return (torch.optim.AdamW if decoupled else torch.optim.Adam)(groups, fused=True, **arguments)
    try:
        if settings.implementation == "apex":
            return _nvidia_apex_adam()(groups, adam_w_mode=decoupled, **arguments)
        from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

        if device.type == "cpu":
            cache = os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")
            print(f"DeepSpeed compiles its Adam once; if this never ends, a killed build left a file `lock` under {cache}", flush=True)
            return DeepSpeedCPUAdam(groups, adamw_mode=decoupled, **arguments)
        return FusedAdam(groups, adam_w_mode=decoupled, **arguments)
    except UserError:
        raise
    except Exception as error:  # a just-in-time build can fail in many ways
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"optimizer.implementation: {settings.implementation} cannot run here ({reason}); use torch") from None


class Measurement:
    """A few numbers on their way from the device: reading them waits for the step that made them, not for the ones queued since."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._arrived = values, None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()


class Engine:
    """One DeepSpeed engine around a module that holds both networks.

    Args:
        module: Called with the step's arguments, returns (loss to differentiate, anything).
        optimizer: From `build_optimizer`.
        config: The run's settings.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, config: Config) -> None:
        import deepspeed
        from deepspeed.utils import logger

        logger.setLevel("ERROR")
        self.config = config
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        settings = deepspeed_dict(config, self.world_size)
        # The default buckets are 2 GB each, however small the networks.
        bucket = min(500_000_000, 2 * sum(p.numel() for p in module.parameters()))
        settings["zero_optimization"] |= {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
        if self.rank:
            for monitor in ("tensorboard", "csv_monitor", "wandb"):
                settings[monitor]["enabled"] = False
        self.deepspeed, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad} if config.optimizer.ema_decay > 0 else {}
        self.averaged = {name: p.detach().clone() for name, p in trained.items()}
        self._averaged_parameters = list(trained.values())  # in the order of `averaged`

    def learning_rate(self, network: str, step: int) -> float:
        """Linear warm-up from the network's first training step, and one cosine over the whole run."""
        settings = self.config.optimizer
        first = self.config.first_joint_step if network == "encoder" else 0
        if step < first:
            return 0.0
        warmup = min(1.0, (step - first + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
        cosine = 0.5 * (1.0 + math.cos(math.pi * step / self.config.train.steps))
        peak = settings.encoder_lr or settings.lr if network == "encoder" else settings.lr
        return peak * warmup * (settings.final_fraction + (1.0 - settings.final_fraction) * cosine)

    def update(self, step: int, losses: Callable[[int], tuple[Tensor, Tensor]]) -> Measurement:
        """One optimiser step over all micro-batches.

        Args:
            step: Optimiser step, for the learning rates.
            losses: micro -> (loss to differentiate, measurements [M]).
        Returns:
            Measurements averaged over micro-batches and ranks. [M].
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = self.learning_rate(group["name"], step)
        total: Tensor | None = None
        micro_batches = self.config.engine.gradient_accumulation
        for micro in range(micro_batches):
            loss, measured = losses(micro)
            self.deepspeed.backward(loss)
            total = measured if total is None else total + measured
            self.deepspeed.step()
        if self.averaged:
            decay = min(self.config.optimizer.ema_decay, (1 + step) / (10 + step))  # early averages forget the start quickly
            with torch.no_grad():
                torch._foreach_lerp_(list(self.averaged.values()), self._averaged_parameters, 1.0 - decay)
        return Measurement(self.mean_over_ranks(total / micro_batches))

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, the networks hold the averaged weights, if any: for validation and export. Afterwards, bit for bit the trained ones."""
        parameters = self._averaged_parameters
        trained = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for parameter, average in zip(parameters, self.averaged.values(), strict=True):
                parameter.copy_(average)
            try:
                yield
            finally:
                for parameter, value in zip(parameters, trained, strict=True):
                    parameter.copy_(value)

    def mean_over_ranks(self, local_mean: Tensor) -> Tensor:
        """Average of a small tensor over ranks; the tensor itself when there is one rank."""
        if self.world_size == 1:
            return local_mean
        total = local_mean.clone()
        torch.distributed.all_reduce(total)
        return total / self.world_size

    def log(self, values: dict[str, float], step: int) -> None:
        """Send scalars to TensorBoard, CSV and W&B, as far as they are switched on."""
        monitor = self.deepspeed.monitor
        if self.rank == 0 and monitor.enabled:
            monitor.write_events([(name, value, step) for name, value in values.items()])

    def save(self, folder: Path, step: int, state: dict[str, Any], facts: dict[str, Any]) -> Path:
        """Write checkpoint step_<n>: DeepSpeed's files, then a manifest, then one rename.

        Args:
            folder: The run's checkpoints folder.
            step: Optimiser steps done.
            state: What else a resumed run needs; plain numbers and tensors.
            facts: What others may want to know without opening tensors (architecture, validation loss).
        Raises:
            UserError: the disk refuses; nothing half-written stays.
        """
        name = f"step_{step}"
        partial, final = folder / f"{PARTIAL}{name}", folder / name
        state = {**state, "step": step, "averaged": self.averaged}
        failure = ""
        try:
            self.deepspeed.save_checkpoint(str(folder), tag=partial.name, client_state=state, save_latest=False)
        except (OSError, RuntimeError) as error:  # torch reports a short write as RuntimeError
            failure = write_failure(error, folder)
            torch.distributed.barrier()  # DeepSpeed's own last one, where the other ranks wait
        self._agree(failure, partial, "write")
        if self.rank == 0:
            try:
                facts = {**facts, "step": step, "world_size": self.world_size, "zero_stage": self.config.engine.zero_stage}
                written = sorted(f for f in partial.rglob("*") if f.is_file())
                for file in written:
                    sync(file)
                manifest = {
                    **facts,
                    "files": {str(f.relative_to(partial)): fingerprint(f) for f in written},
                }
                write_text_whole(partial / MANIFEST, json.dumps(manifest, indent=1))
                if final.exists():
                    shutil.rmtree(final)
                os.rename(partial, final)
                sync(folder)
            except OSError as error:
                failure = write_failure(error, folder)
        self._agree(failure, partial, "finish")
        return final

    def _agree(self, failure: str, partial: Path, action: str) -> None:
        """Every rank learns whether any failed, so that all stop together."""
        failures: list[str] = [""] * self.world_size
        torch.distributed.all_gather_object(failures, failure)
        reason = next(filter(None, failures), "")
        if reason:
            if self.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise UserError(f"{partial.parent}: cannot {action} a checkpoint ({reason}); the checkpoints before it are whole")

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Restore weights, optimiser and averaged weights; returns the `state` given to `save`, with "step"."""
        _, state = self.deepspeed.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
        for name, value in state.pop("averaged").items():
            self.averaged[name].copy_(value)
        return state
