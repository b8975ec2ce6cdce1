"""What every engine does alike: learning rates, averaged weights, measurements on their way, weights whole, checkpoints, monitors."""

import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import Config, OptimizerConfig
from ..errors import UserError
from ..files import partial_of
from ..methods.ranks import mean_over_ranks, ranks
from ..saved import read_weights, tensors_of
from . import interruption, partitions
from .checkpoints import WEIGHTS, sync, write_failure, write_manifest
from .monitors import Monitors
from .processes import gathered


def adam_arguments(settings: OptimizerConfig) -> dict[str, Any]:
    """What every implementation of Adam is made with."""
    return {"lr": settings.lr, "betas": tuple(settings.betas), "eps": settings.eps, "weight_decay": settings.weight_decay}


def torch_adam(groups: list[dict[str, Any]], settings: OptimizerConfig) -> torch.optim.Optimizer:
    """torch's fused Adam, or AdamW, of parameter groups."""
    kind = torch.optim.AdamW if settings.kind == "adamw" else torch.optim.Adam
    return kind(groups, fused=True, **adam_arguments(settings))


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


Losses = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Sequence[Tensor | None]]
"""Loss to differentiate, measurements [M]; third, of a captured step in `direct`, the loss's gradients, None for 0."""


class BaseEngine:
    """Both networks, their optimiser and what is kept of them; `direct` and `deepspeed` carry out the steps.

    Args:
        networks: Encoder and partner by name.
        config: The run's settings.
    """

    denoiser: Callable[..., Tensor] | None = None  # takes the place of the step's own, if there is one

    def __init__(self, networks: dict[str, nn.Module], config: Config) -> None:
        self.config, self.networks = config, networks
        self.rank, self.world_size = ranks()
        self.parameters = {
            f"{name}.{key}": parameter for name, network in networks.items() for key, parameter in network.named_parameters()
        }
        self._trained = {name: parameter for name, parameter in self.parameters.items() if parameter.requires_grad}
        self.averaged: dict[str, Tensor] = {}  # of trained weights, by name: this rank's parts
        self._monitors = Monitors(config) if self.rank == 0 else None

    def losses(self, x_0: Tensor, draw: Any, kl_weight: float, phase: str, denoiser: Callable[..., Tensor] | None = None) -> Losses:
        """What the step returns for these arguments; `update` takes the gradients. `denoiser` takes the place of its own."""
        raise NotImplementedError

    def update(self, step: int, losses: Callable[[int], Losses]) -> Measurement:
        """One optimiser step over all micro-batches.

        Args:
            step: Optimiser step, for the learning rates.
            losses: micro -> what `losses` returned.
        Returns:
            Measurements averaged over micro-batches and ranks. [M].
        """
        raise NotImplementedError

    def _moment(self, name: str, moment: str) -> Tensor:
        """One of Adam's moments of a trained parameter, in its shape. Every rank calls it."""
        raise NotImplementedError

    def _restore(self, name: str, weight: Tensor, moments: dict[str, Tensor]) -> None:
        """Write a trained parameter's weight and moments, from whole tensors."""
        raise NotImplementedError

    def _begin_restoring(self) -> None:
        """Make places for what `_restore` writes."""

    def _steps_taken(self) -> int:
        """How many steps Adam has taken."""
        raise NotImplementedError

    def _set_steps_taken(self, count: int) -> None:
        raise NotImplementedError

    def _refresh(self) -> None:
        """Make the networks use what was written to the parts of their weights."""

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

    def _average(self, step: int, averages: list[Tensor], weights: list[Tensor]) -> None:
        """Move averages of weights towards these weights."""
        decay = min(self.config.optimizer.ema_decay, (1 + step) / (10 + step))  # early averages forget the start quickly
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1.0 - decay)

    def _measured(self, total: Tensor) -> Measurement:
        """Measurements summed over micro-batches, as `update` returns them."""
        asked = total.new_full((1,), interruption.asked())
        return Measurement(mean_over_ranks(torch.cat((total / self.config.engine.gradient_accumulation, asked))))

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, the networks hold the averaged weights, if any: for validation and export. Afterwards, bit for bit the trained ones."""
        trained = [partitions.local(self.parameters[name]).detach().clone() for name in self.averaged]
        self._put(self.averaged.values())
        try:
            yield
        finally:
            self._put(trained)

    def _put(self, values: Iterable[Tensor]) -> None:
        with torch.no_grad():
            for name, value in zip(self.averaged, values, strict=True):
                partitions.local(self.parameters[name]).copy_(value)
        self._refresh()

    def log(self, values: dict[str, float], step: int) -> None:
        """Send scalars to TensorBoard, CSV and W&B, as far as they are switched on."""
        if self._monitors is not None:
            self._monitors.write(values, step)

    def log_again(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write the files of TensorBoard and CSV from a log, each row with its step: one file for all starts of a run, without the steps
        that a resumed run takes again. W&B has them already."""
        if self._monitors is not None:
            of_step = ((row["step"], {name: value for name, value in row.items() if isinstance(value, int | float)}) for row in rows)
            self._monitors.write_files(of_step)

    def not_finite(self) -> str | None:
        """The name of a parameter with numbers that are not finite, the same on every rank; None if there is none."""
        bad = next((name for name, p in self.parameters.items() if not partitions.local_values(p).isfinite().all()), None)
        return next(filter(None, gathered(bad)), None)

    def close(self) -> None:
        """Leave torch as it was for whatever comes after training in this process."""
        if self._monitors is not None:
            self._monitors.close()

    def weights(self) -> dict[str, Tensor]:
        """Every weight whole, and every buffer, on the CPU, by name, on rank 0; on the others nothing. Every rank calls it."""
        weights = ((name, partitions.whole_weight(p)) for name, p in self.parameters.items())
        held = {f"{name}.{key}": value for name, network in self.networks.items() for key, value in tensors_of(network).items()}
        return self._on_chief(chain(weights, ((name, value) for name, value in held.items() if name not in self.parameters)))

    def _on_chief(self, named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        # One at a time: no rank but the first holds more than one whole tensor.
        whole = torch.contiguous_format  # safetensors takes no other
        return {name: value.detach().cpu().clone(memory_format=whole) for name, value in named if self.rank == 0}

    def _training_state(self) -> Iterator[tuple[str, Tensor]]:
        """What a resumed run needs of each trained parameter, whole: its weight, Adam's moments and its average."""
        for name, parameter in self._trained.items():
            yield f"{name}/weight", partitions.whole_weight(parameter)
            for moment in partitions.MOMENTS:
                yield f"{name}/{moment}", self._moment(name, moment)
            if name in self.averaged:
                yield f"{name}/averaged", partitions.whole(parameter, self.averaged[name])

    def mix_rows(self, name: str, mixing: Tensor) -> None:
        """Put mixtures of a trained weight's rows in their place, and of its average's and its moments' with them. Every rank calls it,
        between two steps.

        The moments are those of the new rows' gradients where the mixing is a rotation and gradients of two rows are independent; otherwise
        Adam learns them anew, in 1 / (1 - decay) steps.

        Args:
            name: Of the parameter.
            mixing: [rows, rows]; row r says what the new row r is of the old ones.
        """
        parameter, is_averaged = self._trained[name], name in self.averaged

        def mixed(values: Tensor, by: Tensor = mixing) -> Tensor:
            return torch.tensordot(by.to(values), values, 1)

        moments = {
            kind: mixed(self._moment(name, kind), mixing.square() if kind == "exp_avg_sq" else mixing) for kind in partitions.MOMENTS
        }
        averaged = mixed(partitions.whole(parameter, self.averaged[name])) if is_averaged else None
        self._restore(name, mixed(partitions.whole_weight(parameter)), moments)
        if averaged is not None:
            self.averaged[name].copy_(partitions.part_of(parameter, averaged))
        self._refresh()

    def save(self, folder: Path, step: int, state: dict[str, Any], facts: dict[str, Any]) -> None:
        """Write checkpoint step_<n>: whole tensors, then a manifest, then one rename. Any engine can read it: any number of ranks, at any
        ZeRO stage.

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
                    "adam_steps": self._steps_taken(),
                }
                write_manifest(partial, stated)
                if final.exists():
                    shutil.rmtree(final)
                os.rename(partial, final)
                sync(folder)
            except (OSError, SafetensorError) as error:
                failure = write_failure(error, folder)
                shutil.rmtree(partial, ignore_errors=True)
        reason = next(filter(None, gathered(failure)), "")
        if reason:
            raise UserError(f"{folder}: cannot write a checkpoint ({reason}); the checkpoints before it are whole")

    def _kinds(self, name: str) -> list[str]:
        """What a checkpoint holds of a trained parameter."""
        return ["weight", *partitions.MOMENTS, *(["averaged"] if name in self.averaged else [])]

    def unfit(self, checkpoint: Path) -> str:
        """Why a checkpoint's tensors are not those of these networks, or an empty string; the first rank's to ask."""
        expected = {f"{name}/{kind}": partitions.whole_like(p) for name, p in self._trained.items() for kind in self._kinds(name)}
        try:
            read_weights(checkpoint / WEIGHTS, expected)
        except UserError as error:
            return str(error)
        return ""

    def load(self, checkpoint: Path, manifest: dict[str, Any]) -> dict[str, Any]:
        """Restore weights, optimiser and averaged weights; returns the `state` given to `save`, with "step"."""
        self._begin_restoring()
        with safe_open(checkpoint / WEIGHTS, "pt") as stored:
            for name, parameter in self._trained.items():
                read = {kind: stored.get_tensor(f"{name}/{kind}") for kind in self._kinds(name)}
                averaged = read.pop("averaged", None)
                self._restore(name, read.pop("weight"), read)
                if averaged is not None:
                    self.averaged[name].copy_(partitions.part_of(parameter, averaged))
        self._refresh()
        self._set_steps_taken(manifest["adam_steps"])
        return {**manifest["state"], "step": manifest["step"]}
