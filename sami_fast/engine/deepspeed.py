"""DeepSpeed: one engine around both networks or one around each, optimisers, backward and update, averaged weights, checkpoints."""

import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import Config, bucket_elements, deepspeed_dicts
from ..errors import UserError
from ..files import partial_of
from ..methods.ranks import mean_over_ranks
from ..saved import read_weights, tensors_of
from . import interruption, shards
from .checkpoints import WEIGHTS, sync, write_failure, write_manifest
from .compiled import recomputing


def _nvidia_apex_adam() -> Callable[..., torch.optim.Optimizer]:
    try:
        from apex.optimizers import FusedAdam  # pyrefly: ignore[missing-import] (optional)
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
    """A few numbers on their way from the device: reading them waits for the step that made them, not for the ones queued since.

    Args:
        values: The numbers, and last one above 0 if some rank was asked to stop. [M + 1].
    """

    def __init__(self, values: Tensor) -> None:
        self._values, self._arrived = values, None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[float]:
        return self._read()[:-1]

    def asked_to_stop(self) -> bool:
        """Whether some rank was, when the step ended. The same on all ranks."""
        return self._read()[-1] > 0

    def _read(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()


class _Remote:
    """The denoiser where it has a DeepSpeed engine of its own, as the step calls it from within the encoder's engine.

    The step gets a copy of the output that no gradient flows through. Once the encoder's backward has left d loss / d output at that copy,
    `backward` carries it on into the denoiser: of all that the two engines share, the output is the only thing that has a gradient.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self._outputs: list[tuple[Tensor, Tensor]] = []

    def __call__(self, *inputs: Tensor, **options: Any) -> Tensor:
        output = self.engine(*inputs, **options)
        if not output.requires_grad:
            return output
        leaf = output.detach().requires_grad_()
        self._outputs.append((output, leaf))
        return leaf

    def backward(self) -> None:
        outputs, self._outputs = self._outputs, []
        product = sum((output * leaf.grad).sum() for output, leaf in outputs if leaf.grad is not None)
        # The encoder's engine has divided by the number of micro-batches already.
        self.engine.backward(product, scale_wrt_gas=False)


class _EncoderStep(nn.Module):
    """What the encoder's own DeepSpeed engine wraps: called, it takes the step around both networks.

    DeepSpeed takes charge of every parameter of the module that it wraps. The denoiser has another engine, so the step comes as a function:
    as a submodule it would bring the denoiser along.
    """

    def __init__(self, encoder: nn.Module, step: Callable[..., Any]) -> None:
        super().__init__()
        self.encoder, self.step = encoder, step

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self.step(*arguments, **options)


class Engine:
    """Both networks in DeepSpeed: in one engine, or at ZeRO stage 3 in one each, which share nothing but the denoiser's output.

    Args:
        step: Holds both networks; called with the step's arguments and `denoiser`, what takes the place of its own denoiser or None, it
            returns (loss to differentiate, measurements [M]).
        networks: Encoder and partner by name.
        optimizers: From `build_optimizers`.
        config: The run's settings.
    """

    def __init__(
        self, step: nn.Module, networks: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer | None], config: Config
    ) -> None:
        import deepspeed
        from deepspeed.utils import logger

        logger.setLevel("ERROR")
        self.config, self.networks = config, networks
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.parameters = {
            f"{name}.{key}": parameter for name, network in networks.items() for key, parameter in network.named_parameters()
        }
        self._trained = {name: parameter for name, parameter in self.parameters.items() if parameter.requires_grad}
        self._linear = nn.functional.linear  # for which ZeRO 3 puts one of its own, that has no forward derivatives, and leaves it there
        self.engines: dict[str, Any] = {}
        for name, settings in deepspeed_dicts(config, self.world_size).items():
            if self.rank:
                for monitor in ("tensorboard", "csv_monitor", "wandb"):
                    settings.pop(monitor, None)
            wrapped = {"both": step, "encoder": _EncoderStep(networks["encoder"], step.forward)}.get(name) or networks[name]
            learning = [p for p in wrapped.parameters() if p.requires_grad] or list(wrapped.parameters())
            settings["zero_optimization"] |= _sizes(settings["zero_optimization"]["stage"], learning)
            for p in wrapped.parameters():  # DeepSpeed views weights as bytes, which `accelerate` may have laid out channels-last
                p.data = p.data.contiguous()
            self.engines[name], *_ = deepspeed.initialize(model=wrapped, optimizer=optimizers[name], config=settings)
        self._remote = _Remote(self.engines["denoiser"]) if "denoiser" in self.engines else None
        self.denoiser = recomputing(self._remote, config) if self._remote else None  # takes the place of the step's own, if there is one
        self._around_step = next(iter(self.engines.values()))
        self._learning = [engine for name, engine in self.engines.items() if optimizers[name] is not None]
        averaged = self._trained if config.optimizer.ema_decay > 0 else {}
        self._averaged_parts = [shards.local(p) for p in averaged.values()]
        self.averaged = {name: part.detach().clone() for name, part in zip(averaged, self._averaged_parts, strict=True)}

    def losses(
        self, x_0: Tensor, draw: Any, kl_weight: float, phase: str, denoiser: Callable[..., Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the step returns for these arguments; `update` takes the gradients. `denoiser` takes the place of its own."""
        return self._around_step(x_0, draw, kl_weight, phase, denoiser=denoiser or self.denoiser)

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
        total = torch.zeros(())
        micro_batches = self.config.engine.gradient_accumulation
        for micro in range(micro_batches):
            loss, measured = losses(micro)
            self._around_step.backward(loss)
            if self._remote is not None and self._remote.engine in self._learning:
                self._remote.backward()
                if micro + 1 == micro_batches and self.config.optimizer.clip > 0:
                    self._share_clip()
            total = total + measured if micro else measured
            for engine in self._learning:
                engine.step()
        if self.averaged:
            decay = min(self.config.optimizer.ema_decay, (1 + step) / (10 + step))  # early averages forget the start quickly
            with torch.no_grad():
                torch._foreach_lerp_(list(self.averaged.values()), self._averaged_parts, 1.0 - decay)
        asked = total.new_full((1,), interruption.asked())
        return Measurement(mean_over_ranks(torch.cat((total / micro_batches, asked))))

    def _share_clip(self) -> None:
        """Each engine clips by its own norm. Set its limit so that it shrinks its gradients as much as the norm over both asks for."""
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

    def log(self, values: dict[str, float], step: int) -> None:
        """Send scalars to TensorBoard, CSV and W&B, as far as they are switched on."""
        monitor = self._around_step.monitor
        if self.rank == 0 and monitor.enabled:
            monitor.write_events([(name, value, step) for name, value in values.items()])

    def log_again(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write the files of TensorBoard and CSV from a log, each row with its step: one file for all starts of a run, without the steps
        that a resumed run takes again. W&B has them already."""
        events = [(name, value, row["step"]) for row in rows for name, value in row.items() if isinstance(value, int | float)]
        for monitor in (self._around_step.monitor.tb_monitor, self._around_step.monitor.csv_monitor):
            if self.rank == 0 and monitor is not None and events:
                monitor.write_events(events)

    def not_finite(self) -> str | None:
        """The name of a parameter with numbers that are not finite, the same on every rank; None if there is none."""
        bad = next((name for name, p in self.parameters.items() if not shards.local_values(p).isfinite().all()), None)
        return next(filter(None, self._gathered(bad)), None)

    def close(self) -> None:
        """Leave torch as it was for whatever comes after training in this process."""
        nn.functional.linear = self._linear

    def weights(self) -> dict[str, Tensor]:
        """Every weight whole, and every buffer, on the CPU, by name, on rank 0; on the others nothing. Every rank calls it."""
        weights = ((name, shards.whole_weight(p)) for name, p in self.parameters.items())
        held = {f"{name}.{key}": value for name, network in self.networks.items() for key, value in tensors_of(network).items()}
        return self._on_chief(chain(weights, ((name, value) for name, value in held.items() if name not in self.parameters)))

    def _on_chief(self, named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        # One at a time: no rank but the first holds more than one whole tensor.
        whole = torch.contiguous_format  # safetensors takes no other
        return {name: value.detach().cpu().clone(memory_format=whole) for name, value in named if self.rank == 0}

    def _training_state(self) -> Iterator[tuple[str, Tensor]]:
        """What a resumed run needs of each trained parameter, whole: its weight, Adam's moments and its average."""
        for name, parameter in self._trained.items():
            yield f"{name}/weight", shards.whole_weight(parameter)
            for moment in shards.MOMENTS:
                yield f"{name}/{moment}", shards.whole_moment(self._engine_of(name), parameter, moment)
            if name in self.averaged:
                yield f"{name}/averaged", shards.whole(parameter, self.averaged[name])

    def _engine_of(self, name: str) -> Any:
        return self.engines.get(name.partition(".")[0], self._around_step)

    def save(self, folder: Path, step: int, state: dict[str, Any], facts: dict[str, Any]) -> None:
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
        final = folder / name
        partial = partial_of(final)
        tensors = self._on_chief(self._training_state())
        failure = ""
        if self.rank == 0:
            try:
                partial.mkdir()
                save_file(tensors, partial / WEIGHTS)
                sync(partial / WEIGHTS)
                stated = {
                    **facts,
                    "step": step,
                    "world_size": self.world_size,
                    "state": state,
                    # Networks in one engine have one count, and in two the same one: both take every step.
                    "adam_steps": shards.steps_taken(self._learning[0]),
                }
                write_manifest(partial, stated)
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

    def _gathered(self, value: Any) -> list[Any]:
        """What every rank gives, so that all of them learn of what happened to one."""
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def _kinds(self, name: str) -> list[str]:
        """What a checkpoint holds of a trained parameter."""
        return ["weight", *shards.MOMENTS, *(["averaged"] if name in self.averaged else [])]

    def unfit(self, checkpoint: Path) -> str:
        """Why a checkpoint's tensors are not those of these networks, or an empty string; the first rank's to ask."""
        expected = {f"{name}/{kind}": shards.whole_like(p) for name, p in self._trained.items() for kind in self._kinds(name)}
        try:
            read_weights(checkpoint / WEIGHTS, expected)
        except UserError as error:
            return str(error)
        return ""

    def load(self, checkpoint: Path, manifest: dict[str, Any]) -> dict[str, Any]:
        """Restore weights, optimiser and averaged weights; returns the `state` given to `save`, with "step"."""
        for engine in self._learning:
            shards.start(engine)
        with safe_open(checkpoint / WEIGHTS, "pt") as stored:
            for name, parameter in self._trained.items():
                read = {kind: stored.get_tensor(f"{name}/{kind}") for kind in self._kinds(name)}
                averaged = read.pop("averaged", None)
                shards.restore(self._engine_of(name), parameter, read.pop("weight"), read)
                if averaged is not None:
                    self.averaged[name].copy_(shards.part_of(parameter, averaged))
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
        "stage3_param_persistence_threshold": vectors,  # biases and norms, a small share of all weights, stay whole
    }
