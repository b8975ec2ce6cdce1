"""DeepSpeed: processes, one engine around both networks or one around each, backward and update, averaged weights, checkpoints."""

import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import Config, bucket_elements, deepspeed_dicts
from ..errors import UserError
from ..files import PARTIAL, write_text_whole
from . import shards
from .checkpoints import FORMAT, MANIFEST, fingerprint, read_manifest, sync, write_failure

WEIGHTS = "training.safetensors"


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

    # Not for users: torch renamed two collectives that DeepSpeed calls.
    warnings.filterwarnings("ignore", r".*(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated", FutureWarning)

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


def build_optimizers(networks: dict[str, nn.Module], config: Config, device: torch.device) -> dict[str, torch.optim.Optimizer | None]:
    """The optimiser of each engine, by the engine's name; None where nothing is trained. Errors as `build_optimizer`."""
    inside = {"both": networks} if config.engine.zero_stage < 3 else {name: {name: network} for name, network in networks.items()}
    return {
        name: build_optimizer(held, config, device) if any(p.requires_grad for n in held.values() for p in n.parameters()) else None
        for name, held in inside.items()
    }


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


class _Remote:
    """A network in an engine of its own, seen from the step of another: it hands out a leaf, and goes on backward from there.

    The loss is a function of the network's output and of what the other engine holds. So d loss / d output, which the other engine's
    backward leaves at the leaf, is all that its backward needs.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self._outputs: list[tuple[Tensor, Tensor]] = []

    def __call__(self, *inputs: Tensor) -> Tensor:
        output = self.engine(*inputs)
        if not output.requires_grad:
            return output
        leaf = output.detach().requires_grad_()
        self._outputs.append((output, leaf))
        return leaf

    def backward(self) -> None:
        outputs, self._outputs = self._outputs, []
        product = sum((output * leaf.grad).sum() for output, leaf in outputs if leaf.grad is not None)
        # The other engine has divided by the number of micro-batches already.
        self.engine.backward(product, scale_wrt_gas=False)


class _Half(nn.Module):
    """What the encoder's own engine wraps: the encoder's parameters, and the step around both networks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.encoder = module.model.encoder
        self._step = [module]  # in a list, so that its other network is no part of this module

    def forward(self, *arguments: Any) -> Any:
        return self._step[0](*arguments)


class Engine:
    """Both networks in DeepSpeed: in one engine, or at ZeRO stage 3 in one each, which share nothing but the denoiser's output.

    Args:
        module: Called with the step's arguments, returns (loss to differentiate, anything). Has `model`, the networks, and
            `remote_denoiser`, what stands for the denoiser where it has an engine of its own.
        optimizers: From `build_optimizers`.
        config: The run's settings.
    """

    def __init__(self, module: nn.Module, optimizers: dict[str, torch.optim.Optimizer | None], config: Config) -> None:
        import deepspeed
        from deepspeed.utils import logger

        logger.setLevel("ERROR")
        self.config = config
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        networks = module.model.networks
        self.parameters = {
            f"{name}.{key}": parameter for name, network in networks.items() for key, parameter in network.named_parameters()
        }
        self._trained = {name: parameter for name, parameter in self.parameters.items() if parameter.requires_grad}
        self._remote: _Remote | None = None
        self.engines: dict[str, Any] = {}
        for name, settings in deepspeed_dicts(config, self.world_size).items():
            if self.rank:
                for monitor in ("tensorboard", "csv_monitor", "wandb"):
                    settings.pop(monitor, None)
            wrapped = {"both": module, "encoder": _Half(module)}.get(name) or networks[name]
            learning = [p for p in wrapped.parameters() if p.requires_grad] or list(wrapped.parameters())
            settings["zero_optimization"] |= _sizes(settings["zero_optimization"]["stage"], learning)
            self.engines[name], *_ = deepspeed.initialize(model=wrapped, optimizer=optimizers[name], config=settings)
        if "denoiser" in self.engines:
            self._remote = module.remote_denoiser = _Remote(self.engines["denoiser"])
        self.losses = next(iter(self.engines.values()))  # called with the step's arguments
        self._learning = [engine for name, engine in self.engines.items() if optimizers[name] is not None]
        averaged = self._trained if config.optimizer.ema_decay > 0 else {}
        self._averaged_parts = [shards.local(p) for p in averaged.values()]
        self.averaged = {name: part.detach().clone() for name, part in zip(averaged, self._averaged_parts, strict=True)}

    def learning_rate(self, network: str, step: int) -> float:
        """Linear warm-up from the network's first training step, and one cosine over the whole run."""
        settings = self.config.optimizer
        first = self.config.first_joint_step if network == "encoder" else self.config.first_denoiser_step
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
        for engine in self._learning:
            for group in engine.optimizer.param_groups:
                group["lr"] = self.learning_rate(group["name"], step)
        total: Tensor | None = None
        micro_batches = self.config.engine.gradient_accumulation
        for micro in range(micro_batches):
            loss, measured = losses(micro)
            self.losses.backward(loss)
            if self._remote is not None and self._remote.engine in self._learning:
                self._remote.backward()
                if micro + 1 == micro_batches and self.config.optimizer.clip > 0:
                    self._share_clip()
            total = measured if total is None else total + measured
            for engine in self._learning:
                engine.step()
        if self.averaged:
            decay = min(self.config.optimizer.ema_decay, (1 + step) / (10 + step))  # early averages forget the start quickly
            with torch.no_grad():
                torch._foreach_lerp_(list(self.averaged.values()), self._averaged_parts, 1.0 - decay)
        return Measurement(self.mean_over_ranks(total / micro_batches))

    def _share_clip(self) -> None:
        """Each engine clips by its own norm: give it the limit at which that shrinks as the norm over both would."""
        norms = [shards.gradient_norm(engine).item() for engine in self._learning]
        both = math.hypot(*norms)
        for engine, norm in zip(self._learning, norms, strict=True):
            shards.set_clip(engine, self.config.optimizer.clip * (norm + 1e-6) / (both + 1e-6) if math.isfinite(both) else 1.0)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, the networks hold the averaged weights, if any: for validation and export. Afterwards, bit for bit the trained ones."""
        trained = [part.detach().clone() for part in self._averaged_parts]
        self._put(self.averaged.values())
        try:
            yield
        finally:
            self._put(trained)

    def _put(self, values: Iterable[Tensor]) -> None:
        with torch.no_grad():
            for part, value in zip(self._averaged_parts, values, strict=True):
                part.copy_(value)
        for engine in self._learning:
            shards.refresh(engine)

    def mean_over_ranks(self, local_mean: Tensor) -> Tensor:
        """Average of a small tensor over ranks; the tensor itself when there is one rank."""
        if self.world_size == 1:
            return local_mean
        total = local_mean.clone()
        torch.distributed.all_reduce(total)
        return total / self.world_size

    def log(self, values: dict[str, float], step: int) -> None:
        """Send scalars to TensorBoard, CSV and W&B, as far as they are switched on."""
        monitor = self.losses.monitor
        if self.rank == 0 and monitor.enabled:
            monitor.write_events([(name, value, step) for name, value in values.items()])

    def not_finite(self) -> str | None:
        """The name of a parameter with numbers that are not finite, the same on every rank; None if there is none."""
        bad = next((name for name, p in self.parameters.items() if not shards.local(p).isfinite().all()), None)
        return next(filter(None, self._gathered(bad)), None)

    def weights(self) -> dict[str, Tensor]:
        """Every weight whole and on the CPU, by name, on rank 0; on the others nothing. Every rank calls it."""
        return self._on_chief((name, shards.whole_weight(p)) for name, p in self.parameters.items())

    def _on_chief(self, named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        # One at a time: no rank but the first holds more than one whole tensor.
        return {name: value.detach().cpu().clone() for name, value in named if self.rank == 0}

    def _training_state(self) -> Iterator[tuple[str, Tensor]]:
        """What a resumed run needs of each trained parameter, whole: its weight, Adam's moments and its average."""
        for name, parameter in self._trained.items():
            yield f"{name}/weight", shards.whole_weight(parameter)
            for moment in shards.MOMENTS:
                yield f"{name}/{moment}", shards.whole_moment(self._engine_of(name), parameter, moment)
            if name in self.averaged:
                yield f"{name}/averaged", shards.whole(parameter, self.averaged[name])

    def _engine_of(self, name: str) -> Any:
        return self.engines.get(name.partition(".")[0], self.losses)

    def save(self, folder: Path, step: int, state: dict[str, Any], facts: dict[str, Any]) -> Path:
        """Write checkpoint step_<n>: whole tensors, then a manifest, then one rename. Any number of ranks can read it, at any ZeRO stage.

        Args:
            folder: The run's checkpoints folder.
            step: Optimiser steps done.
            state: What else a resumed run needs; what JSON can hold.
            facts: What others may want to know without opening tensors (architecture, validation loss).
        Raises:
            UserError: the disk refuses; nothing half-written stays.
        """
        name = f"step_{step}"
        partial, final = folder / f"{PARTIAL}{name}", folder / name
        tensors = self._on_chief(self._training_state())
        failure = ""
        if self.rank == 0:
            try:
                partial.mkdir(exist_ok=True)
                save_file(tensors, partial / WEIGHTS)
                sync(partial / WEIGHTS)
                manifest = {
                    **facts,
                    "format": FORMAT,
                    "step": step,
                    "world_size": self.world_size,
                    "state": state,
                    # Networks in one engine have one count, and in two the same one: both take every step.
                    "adam_steps": shards.steps_taken(self._learning[0]),
                    "files": {WEIGHTS: fingerprint(partial / WEIGHTS)},
                }
                write_text_whole(partial / MANIFEST, json.dumps(manifest, indent=1))
                if final.exists():
                    shutil.rmtree(final)
                os.rename(partial, final)
                sync(folder)
            except (OSError, SafetensorError) as error:
                failure = write_failure(error, folder)
                shutil.rmtree(partial, ignore_errors=True)
        reason = next(filter(None, self._gathered(failure)), "")
        if reason:
            raise UserError(f"{folder}: cannot write a checkpoint ({reason}); the checkpoints before it are whole")
        return final

    def _gathered(self, value: Any) -> list[Any]:
        """What every rank gives, so that all of them learn of what happened to one."""
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Restore weights, optimiser and averaged weights; returns the `state` given to `save`, with "step"."""
        manifest = read_manifest(checkpoint)
        for engine in self._learning:
            shards.start(engine)
        with safe_open(checkpoint / WEIGHTS, "pt") as stored:
            for name, parameter in self._trained.items():
                read = {kind: stored.get_tensor(f"{name}/{kind}") for kind in ("weight", *shards.MOMENTS)}
                shards.restore(self._engine_of(name), parameter, read.pop("weight"), read)
                if name in self.averaged:
                    self.averaged[name].copy_(shards.part_of(parameter, stored.get_tensor(f"{name}/averaged")))
        for engine in self._learning:
            shards.refresh(engine)
            shards.set_steps_taken(engine, manifest["adam_steps"])
        return {**manifest["state"], "step": manifest["step"]}


def _sizes(stage: int, parameters: list[nn.Parameter]) -> dict[str, int]:
    """Sizes that DeepSpeed would guess for networks of billions of parameters."""
    total = sum(p.numel() for p in parameters)
    bucket = bucket_elements(total)
    if stage < 3:
        return {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    vectors = max((p.numel() for p in parameters if p.dim() < 2), default=0)
    return {
        "reduce_bucket_size": bucket,
        "stage3_prefetch_bucket_size": min(50_000_000, total),
        "stage3_param_persistence_threshold": vectors,  # biases and norms stay whole; the rest is almost everything
    }
