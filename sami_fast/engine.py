"""DeepSpeed: processes, one engine around both networks, backward and update, averaged weights, checkpoints."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import Config, deepspeed_dict
from .errors import UserError
from .files import PARTIAL, write_text_whole

MANIFEST = "manifest.json"


def quiet_logging() -> None:
    """Keep DeepSpeed's own news to warnings; must run before its first import to hold for import-time lines too."""
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    os.environ.setdefault("LOG_LEVEL", "error")


def init_distributed() -> tuple[int, int, torch.device]:
    """Join the process group the launcher describes, or make one of a single process.

    Returns:
        rank, world size, this rank's device.
    """
    quiet_logging()
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    # DeepSpeed would spend a minute compiling a shared-memory collective for CPU inference, which training never calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    accelerator = get_accelerator()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
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
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", os.environ.get("WORLD_SIZE", "1"))))
    torch.set_num_threads(threads or max(1, available // local_ranks))


def build_optimizer(encoder: nn.Module, denoiser: nn.Module, config: Config, device: torch.device) -> torch.optim.Optimizer:
    """One optimiser with a parameter group per trained network.

    Raises:
        UserError: the asked-for implementation cannot run here.
    """
    settings = config.optimizer
    decoupled = settings.kind == "adamw"
    groups = [
        {"params": trained, "name": name}
        for name, network in (("encoder", encoder), ("denoiser", denoiser))
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
            from apex.optimizers import FusedAdam

            return FusedAdam(groups, adam_w_mode=decoupled, **arguments)
        from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

        if device.type == "cpu":
            return DeepSpeedCPUAdam(groups, adamw_mode=decoupled, **arguments)
        return FusedAdam(groups, adam_w_mode=decoupled, **arguments)
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
        self.module = module
        self.averaged: dict[str, Tensor] = {}
        if config.optimizer.ema_decay > 0:
            self.averaged = {name: p.detach().clone() for name, p in module.named_parameters()}

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
            with torch.no_grad():
                weights = dict(self.module.named_parameters())
                averages = list(self.averaged.values())
                torch._foreach_lerp_(averages, [weights[name] for name in self.averaged], 1.0 - self.config.optimizer.ema_decay)
        return Measurement(self.mean_over_ranks(total / micro_batches))

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

    # Checkpoints. A folder step_<n> either holds everything its manifest lists, byte for byte, or is ignored.

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
            failure = _reason(error, folder)
        self._agree(failure, partial, "write")
        if self.rank == 0:
            try:
                facts = {**facts, "step": step, "world_size": self.world_size, "zero_stage": self.config.engine.zero_stage}
                manifest = {
                    **facts,
                    "files": {str(f.relative_to(partial)): _fingerprint(f) for f in sorted(partial.rglob("*")) if f.is_file()},
                }
                write_text_whole(partial / MANIFEST, json.dumps(manifest, indent=1))
                if final.exists():
                    shutil.rmtree(final)
                os.rename(partial, final)
                _sync(folder)
            except OSError as error:
                failure = _reason(error, folder)
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


def _reason(error: Exception, folder: Path) -> str:
    full = shutil.disk_usage(folder).free < 1 << 20
    return "the disk is full" if full else " ".join(str(error).split())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fingerprint(path: Path, sync: bool = True) -> str:
    if sync:
        _sync(path)
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint, or None when it has none that can be read."""
    try:
        return json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError):
        return None


def damage(checkpoint: Path) -> str:
    """Why a checkpoint cannot be used, or an empty string when every byte is as written."""
    manifest = read_manifest(checkpoint)
    if manifest is None:
        return "its manifest is missing or unreadable"
    for name, expected in manifest["files"].items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if _fingerprint(file, sync=False) != expected:
            return f"{name} is truncated or altered"
    return ""


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first, whole or not."""
    found = [p for p in folder.glob("step_*") if p.is_dir() and p.name[5:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)


def newest_whole_checkpoint(folder: Path, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that passes `damage`; tells `report` about every newer one that does not."""
    for checkpoint in list_checkpoints(folder):
        reason = damage(checkpoint)
        if not reason:
            return checkpoint
        report(f"{checkpoint}: {reason}; falling back to the checkpoint before it")
    return None


def remove_partial(folder: Path) -> None:
    """Remove what a killed process left half-written."""
    for leftover in folder.glob(f"{PARTIAL}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def prune_checkpoints(folder: Path, keep_last: int, keep_best: bool) -> None:
    """Delete all but the newest `keep_last` and, if asked, the one with the lowest validation loss."""
    checkpoints = list_checkpoints(folder)
    keep = set(checkpoints[:keep_last])
    if keep_best:
        scored = [(m["validation_nats"], c) for c in checkpoints if (m := read_manifest(c)) and m.get("validation_nats") is not None]
        if scored:
            keep.add(min(scored, key=lambda pair: pair[0])[1])
    for checkpoint in checkpoints:
        if checkpoint not in keep:
            # Rename first: a kill in the middle must not leave a folder that looks like a checkpoint.
            doomed = checkpoint.with_name(PARTIAL + checkpoint.name)
            os.rename(checkpoint, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
