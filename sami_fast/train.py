"""Train SAMI: arguments -> config -> data, models, engine -> loop -> a run folder with a report.

deepspeed -q sami_fast/train.py --config configs/disks.yaml
python sami_fast/train.py --config disks train.steps=500 name=short
sami-fast train --config disks train.steps=500 name=short
"""

import os
import signal
import sys

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch reads it when it is loaded; a rank that ends would fill pages of warnings

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # while libraries load, there is nothing to keep and little to say

if __name__ == "__main__" and not __package__:
    # As a script, this folder would come first and `data`, `ops`, `step` ... would hide other people's modules.
    sys.path = [entry for entry in sys.path if os.path.realpath(entry) != os.path.dirname(os.path.realpath(__file__))]

import sami_fast  # noqa: F401, I001  # before torch: it says how torch's threads wait

import argparse
import copy
import json
import math
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sami_fast import __version__, budget, ops, preview, score, stages, turning
from sami_fast.cli.options import SEVERAL, add_training_arguments
from sami_fast.config import (
    Config,
    DataConfig,
    ScheduleConfig,
    deepspeed_dicts,
    load_config,
    micro_batch,
    settings_table,
    steps_beside_minutes,
    to_yaml,
)
from sami_fast.data import Dataset, Feed
from sami_fast.data.own import given
from sami_fast.engine import checkpoints, deepspeed, direct, interruption
from sami_fast.engine.bank import Bank
from sami_fast.engine.base import BaseEngine, Losses, Measurement
from sami_fast.engine.capture import Captured, refusal
from sami_fast.engine.compiled import compiled_parts, eager_parts
from sami_fast.engine.memory import enough_memory, keep_freed_memory
from sami_fast.engine.processes import (
    agreed,
    end_run,
    init_distributed,
    leave_distributed,
    lost_rank,
    on_chief,
    set_arithmetic,
    take_device,
    torch_as_it_was,
    wait_for_all,
    way_on,
)
from sami_fast.engine.run_folder import RunFolder
from sami_fast.engine.threads import multiplications, set_threads
from sami_fast.environment import describe, speaks, whole_number
from sami_fast.errors import CollapsedError, Interrupted, NonFiniteError, RankLostError, UserError, printable
from sami_fast.first_batch import check_first_batch, refuse_tied
from sami_fast.kl_weight import KLWeight
from sami_fast.methods.build import build_model, weights_sha256
from sami_fast.methods.latent_model import FORMAT, GIVEN, LatentModel
from sami_fast.methods.ranks import ranks
from sami_fast.metrics.latents import gaussian_information, live_dims
from sami_fast.models import Encoder, HalfUNet
from sami_fast.progress import hms, shown
from sami_fast.saved import tensors_of, weight_files, write_model
from sami_fast.schedule import Discrete
from sami_fast.step import Draw

RESTART_SCALE, RESTARTS = 1 / 3, 3  # beta of a restart after a collapse, and how often
REMEDY = "use train.mode=staged with kl_weight.kind=auto, lower kl_weight.start and kl_weight.low, or set objective.free_bits"
COLLAPSED_NATS = 0.05  # less information than this in all latents after a fifth of the joint steps is worth a warning
VALIDATION_BATCH = 64  # images at a time
FIRST_LINE = 3.0  # seconds after which a first step is shown, however many steps log.every is
KEPT_OF_DATA = ("holdout", "image_size", "channels", "flip", "range", "workers", "cache_gib")  # beside a dataset that is given
LESS_MEMORY = "lower it, raise engine.gradient_accumulation, set engine.checkpoint_activations=true, or take smaller images or networks"


class TrainingModule(nn.Module):
    """What an engine takes steps with: both networks and the step between them.

    `forward` returns the loss in nats per image *and dimension*, so that gradient norms do not grow with the image, and the
    measured numbers [1 + terms + 4 Z]: the loss, the terms under their names in the log and the KL per latent dimension, in nats per
    image, then the means of mu, var and mu^2 per latent dimension, from which follows how much the dimension tells.
    """

    def __init__(self, model: LatentModel, config: Config) -> None:
        super().__init__()
        self.model = model
        self.bf16 = config.engine.precision == "bf16"
        self.captured = Captured(self, config.engine.cuda_graphs) if refusal(config, model.device.type, ranks()[1]) is None else None
        self.parts = {True: compiled_parts(model, config), False: eager_parts(model, config)}  # with gradients, and for validation

    def forward(
        self, x_0: Tensor, draw: Draw, kl_weight: float, phase: str, denoiser: Callable[..., Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        step = self.captured.loss if self.captured is not None and torch.is_grad_enabled() else self.plain
        return step(x_0, draw, kl_weight, phase, denoiser)

    def plain(
        self,
        x_0: Tensor,
        draw: Draw,
        kl_weight: float | Tensor,
        phase: str,
        denoiser: Callable[..., Tensor] | None = None,
        idle_gradients: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """The same, never from a captured step. `idle_gradients` as in `Parts`."""
        parts = replace(self.parts[torch.is_grad_enabled()], idle_gradients=idle_gradients)
        if denoiser is not None:  # in an engine of its own
            parts = replace(parts, denoiser=denoiser)
        with torch.autocast(x_0.device.type, torch.bfloat16, enabled=self.bf16):
            loss, terms, codes = self.model.training_loss(x_0, draw, kl_weight, parts, phase)
        measured = torch.stack((loss.detach(), *(term.mean() for term in terms)))
        codes = codes.double()  # the variance of mu is a small difference of two of these means
        return loss / x_0[0].numel(), torch.cat((measured, codes.mean(1).flatten(), codes[1].square().mean(0)))


def _kept_bytes(model: LatentModel, config: Config, weights: bool) -> int:
    """Of the trained weights, if asked for, Adam's two moments and the average."""
    copies = weights + 2 + (config.optimizer.ema_decay > 0)
    return copies * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def _engine(module: TrainingModule, config: Config, device: torch.device, world_size: int) -> Callable[[], BaseEngine]:
    """What makes a run's engine, once all that can be wrong with it has been looked at.

    Raises:
        UserError: something is.
    """
    networks = module.model.networks
    if config.direct(world_size):
        return lambda: direct.Engine(module, networks, config)
    deepspeed.start(device)
    optimizers = deepspeed.build_optimizers(networks, config, device)
    return lambda: deepspeed.Engine(module, networks, optimizers, config)


def _checked(model: LatentModel, config: Config, dataset: Dataset, device: torch.device) -> list[str]:
    """`check_first_batch` on images of the data."""
    if not (config.encoder.class_ or config.denoiser.class_):
        return []
    count = 4 if dataset.size is None else min(4, dataset.size)
    return check_first_batch(model, dataset.training_images(torch.arange(max(2, count)) % count).to(device), config.seed)


def _beside_step(model: LatentModel, config: Config, device: torch.device, ranks: int) -> int:
    """Bytes of a rank beside the weights, gradients and activations of a step: Adam's moments, the average, and what DeepSpeed adds."""
    if config.direct(ranks):
        return _kept_bytes(model, config, weights=False)
    from sami_fast.plan import FLOAT, held  # one process needs none of it

    memory = held(model, config, ranks)
    known = sum(p.numel() * (1 + p.requires_grad) for p in model.parameters())  # which a step holds
    return max(0, round(memory.gpu + (memory.host if device.type == "cpu" else 0)) - FLOAT * known)


def _rehearse(module: TrainingModule, config: Config, device: torch.device, ranks: int) -> None:
    """A step and a validation batch of blank images, beside room for all that a run keeps: what does not fit is said now, not hours later.

    Raises:
        UserError: there is not enough memory.
    """

    def blank(count: int) -> tuple[Tensor, Draw]:
        x_0 = torch.zeros(count, *module.model.image_shape, device=device)
        return x_0, Draw(config.seed, 0, torch.arange(count, device=device), count)

    count = config.train.batch_size // (ranks * config.engine.gradient_accumulation)
    with enough_memory(f"train.batch_size: a step of {count} images at a time", LESS_MEMORY):
        beside = torch.empty(_beside_step(module.model, config, device, ranks), dtype=torch.uint8, device=device)
        module.plain(*blank(count), 1.0, config.phase(config.train.steps - 1))[0].backward()
    module.zero_grad(set_to_none=True)
    count = min(VALIDATION_BATCH, config.checkpoint.validation_images)
    with torch.no_grad(), enough_memory(f"checkpoint.validation_images: {count} images at a time", "lower it"):
        module(*blank(count), 1.0, "denoiser" if config.mode == "denoiser" else "both")
    del beside
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _take_threads(module: TrainingModule, config: Config, device: torch.device, ranks: int) -> None:
    """As many CPU threads as the work of this rank is worth; nothing to choose where that is on a GPU."""
    if device.type == "cpu" and not config.engine.threads:
        phase = "denoiser" if config.mode == "denoiser" else "both"
        work = multiplications(module, module.model.image_shape, phase, device)
        set_threads(0, work * config.train.batch_size / (ranks * config.engine.gradient_accumulation))


class Trainer:
    """One run: its folder, its networks, its place in the loop."""

    def __init__(
        self,
        config: Config,
        *,
        resume: bool,
        overwrite: bool,
        run_folder: RunFolder | None = None,
        attempt: int = 0,
        model: LatentModel | None = None,
    ) -> None:
        self.rank, self.world_size, self.device = init_distributed(config.engine.patience)
        keep_freed_memory()
        set_threads(config.engine.threads)
        set_arithmetic(config.engine.tf32, config.engine.deterministic)
        ops.check_backend(self.device.type)
        self.chief = self.rank == 0
        config, self.dataset = stages.with_data(config)
        self.validation = stages.opened(config, split=1)
        name = config.name if model is not None else ""
        self.asked, self.config = config, (config := stages.beside_denoiser(config, self.dataset, name))
        self.run_folder = run_folder or RunFolder(config.run_dir)
        self.folder, self.checkpoints = self.run_folder.path, self.run_folder.checkpoints
        micro_batch(config, self.world_size)  # all that can be wrong is found before the run folder is touched
        with enough_memory("encoder, denoiser", "lower encoder.channels or denoiser.channels"):
            self.model = _networks(config, self.dataset, model).placed(self.device)
        pretrained = weights_sha256(self.model.networks["denoiser"]) if config.denoiser.pretrained else ""
        for said in _checked(self.model, config, self.dataset, self.device):
            self.say(said)
        self.lasting = stages.lasting_settings(config, self.dataset, pretrained)
        self.module = TrainingModule(self.model, config)
        engine = _engine(self.module, config, self.device, self.world_size)
        on_chief(lambda: self.run_folder.check(resume=resume, overwrite=overwrite))
        on_chief(lambda: self.run_folder.require_room(_kept_bytes(self.model, config, weights=True), overwrite=overwrite))
        _rehearse(self.module, config, self.device, self.world_size)
        _take_threads(self.module, config, self.device, self.world_size)
        if resume:
            on_chief(self._refuse_others)
        monitors = [name for name, wanted in (("tensorboard", config.log.tensorboard), ("csv", config.log.csv)) if wanted]
        on_chief(lambda: self.run_folder.claim(resume=resume, overwrite=overwrite, afresh=monitors))
        if reason := refusal(config, self.device.type, self.world_size):
            self.say(reason)
        self.engine = engine()
        denoiser = self.engine.denoiser or self.module.parts[True].denoiser
        self.bank = Bank(denoiser) if config.train.bank_steps else None
        self.feed = Feed(
            self.dataset,
            config.train.batch_size,
            config.engine.gradient_accumulation,
            self.rank,
            self.world_size,
            config.seed,
            self.device,
            config.data.flip,
        )
        joint_steps = config.train.steps - config.first_joint_step
        scale = RESTART_SCALE**attempt
        turns = config.train.turn if config.method == "sami" and _has_heads(self.model.encoder) else []
        # Steps before which axes are turned.
        self.turning_steps = {config.first_joint_step + max(1, round(share * joint_steps)) for share in turns}
        self.kl_weight = KLWeight(config.kl_weight, joint_steps, scale)  # pyrefly: ignore[bad-argument-type] (it only reads the settings)
        self.step, self.seconds, self.warned = 0, 0.0, False
        # Measurements are read one step late, so that the host never waits for the step it has just queued.
        self.pending: tuple[int, Measurement] | None = None
        if resume:
            try:
                self._restore()
            except UserError:
                self.run_folder.release()
                raise
        on_chief(self._describe)

    def _describe(self) -> None:
        self.run_folder.write("config.yaml", to_yaml(self.asked))
        self.run_folder.write("environment.json", json.dumps(describe(), indent=2))

    @property
    def _stopped(self) -> str:
        good = checkpoints.list_checkpoints(self.checkpoints)
        return f"stopped, the last good checkpoint is {good[0]}" if good else "stopped before the first checkpoint"

    def say(self, message: str) -> None:
        if self.chief:
            # Who reads it may be gone with the connection to this machine: the watch notices, and the step is kept.
            with suppress(BrokenPipeError) if self.world_size > 1 else nullcontext():
                print(printable(message), flush=True)

    def _refuse_others(self) -> None:
        """Before anything is written there: what lies in the folder must be of this run.

        Raises:
            UserError: it is of a run with other settings, or of an earlier version.
        """
        checkpoints.refuse_other_formats(self.checkpoints)
        for checkpoint in checkpoints.list_checkpoints(self.checkpoints):
            if (manifest := checkpoints.read_manifest(checkpoint)) is not None:
                return self._refuse_other_run(checkpoint, manifest)
        stages.refuse_other_settings(self.asked, self.dataset)

    def _restore(self) -> None:
        on_chief(lambda: checkpoints.set_damaged_aside(self.checkpoints, self.say, self._unfit))
        checkpoint = next(iter(checkpoints.list_checkpoints(self.checkpoints)), None)
        if checkpoint is None:
            on_chief(lambda: self.run_folder.cut_log(0))
            self.say(f"{self.folder}: no checkpoint to resume from, starting at step 0")
            return
        manifest = checkpoints.read_manifest(checkpoint)
        assert manifest is not None  # what has none has just been set aside
        state = self.engine.load(checkpoint, manifest)
        self.step, self.seconds, self.warned = state["step"], state["seconds"], state["warned"]
        self.kl_weight.restore(state["kl_weight"])
        step, measured = state["pending"]
        self.pending = (step, Measurement(torch.tensor([*measured, 0.0], dtype=torch.float64)))
        on_chief(lambda: self.run_folder.cut_log(self.step))
        if self.chief:
            self.engine.log_again(row for row in self.run_folder.logged() if "loss_nats" in row)
        self.say(f"resumed from {checkpoint}")

    def _unfit(self, checkpoint: Path, manifest: dict[str, Any]) -> str:
        """Why a checkpoint whose every byte is as written is none that this run could have left; empty if it could."""
        self._refuse_other_run(checkpoint, manifest)
        return self._unfit_state(manifest["state"]) or self.engine.unfit(checkpoint)

    def _refuse_other_run(self, checkpoint: Path, manifest: dict[str, Any]) -> None:
        changed = stages.difference(manifest["architecture"], _described(self.model))
        if changed:
            raise UserError(f"{checkpoint}: holds another architecture: {', '.join(changed)}")
        changed = stages.difference(stages.as_written_now(manifest["settings"], self.lasting), self.lasting)
        if changed:
            raise UserError(f"{checkpoint}: belongs to a run with other settings: {', '.join(changed)}; set name= for a new run")

    def _unfit_state(self, state: dict[str, Any]) -> str:
        """The same of what `_checkpoint` gave as state."""
        latents, least = self.model.latent_size, 1 + len(self.model.terms) + self.model.latent_size
        try:
            kl_weight = copy.copy(self.kl_weight)
            kl_weight.restore(state["kl_weight"])
            step, measured = state["pending"]
            right = (
                checkpoints.is_number(state["seconds"])
                and isinstance(state["warned"], bool)
                and checkpoints.is_count(step)
                and len(kl_weight.information) in (0, latents)
                and len(measured) in (least, least + 3 * latents)
                and all(map(checkpoints.is_number, measured))
            )
        except (KeyError, TypeError, ValueError):
            right = False
        return "" if right else "its manifest has no state of this run"

    def run(self) -> Path:
        """Train to the last step and save the model. Returns the run folder, which other processes may use again."""
        try:
            with enough_memory("train.batch_size", LESS_MEMORY):
                self._steps()
            with self.engine.averaged_weights():
                weights = self.engine.weights()
            on_chief(lambda: _save(self.model, self.folder / "model", weights))
        finally:
            self.feed.close()
            self.engine.close()
            self.run_folder.release()
        self.say(f"trained in {self.seconds:.0f} s")
        return self.folder

    @interruption.held_back("stopping at the end of this step, which is kept; Ctrl-C once more stops at once")
    def _steps(self) -> None:
        config, steps = self.config, self.config.train.steps
        place = f"{self.world_size} rank(s) on {self.device}, {torch.get_num_threads()} CPU thread(s) each"
        self.say(f"{self.folder}: {place}, steps {self.step} to {steps}")
        schedule = self.model.schedule
        if isinstance(schedule, Discrete):
            self.say(
                f"noise levels: {len(schedule.levels)} of the denoiser's, logsnr {schedule.logsnr_min:.2f} to {schedule.logsnr_max:.2f}"
            )
        begun, first, told = time.perf_counter(), self.step, False
        interval_start, interval_step, waited = begun, self.step, self.feed.waited
        while self.step < steps:
            kl_weight, measured = self.update()
            stop = self._settle() or (self.world_size == 1 and interruption.asked() > 0)
            self.pending = (self.step, measured)
            self.step += 1
            if self.step % config.log.every == 0 or self.step == steps:
                now = time.perf_counter()
                rate = (self.step - interval_step) * config.train.batch_size / (now - interval_start)
                self.seconds += now - interval_start
                data_wait = (self.feed.waited - waited) / (now - interval_start)
                self._log(kl_weight, measured, rate, data_wait)
                told = True
                interval_start, interval_step, waited = time.perf_counter(), self.step, self.feed.waited
            elif not told and (passed := time.perf_counter() - begun) > FIRST_LINE:
                told = True
                pace = self._pace((self.step - first) * config.train.batch_size / passed)
                self.say(f"step {self.step}/{steps} | loss {self._parts(measured.read())[0]:.2f} nats | {pace}")
            regular = self.step % config.checkpoint.every == 0 or self.step == steps
            if regular or stop:
                self.seconds += time.perf_counter() - interval_start
                self._checkpoint(validate=regular)
                interval_start, interval_step, waited = time.perf_counter(), self.step, self.feed.waited
            if stop:
                raise Interrupted(interruption.asked() or signal.SIGTERM, f"step {self.step} of {steps} is kept in {self.checkpoints}")

    def update(self) -> tuple[float, Measurement]:
        """Take the optimiser step that is number `step`. Returns its beta and what it measured."""
        if self.step in self.turning_steps:
            self._turn_axes()
        phase = self.config.phase(self.step)
        kl_weight = self.kl_weight(self.step - self.config.first_joint_step) if phase != "denoiser" else 0.0
        return kl_weight, self.engine.update(self.step, lambda micro: self._losses(micro, kl_weight, phase))

    def _turn_axes(self) -> None:
        """Before a step: turn the latents' axes, and with them the encoder's heads. All ranks read the same images, and take the turn of
        the first.

        Raises:
            NonFiniteError: the step before left numbers that are not finite.
        """
        self._require_finite_weights()
        places = torch.arange(turning.IMAGES)
        if self.dataset.size is not None:
            places = torch.randperm(self.dataset.size, generator=torch.Generator().manual_seed(self.config.seed))[: turning.IMAGES]
        batch_size = min(VALIDATION_BATCH, self.config.checkpoint.validation_images)  # which there is memory for: it has been tried
        found = turning.read(self.model.encode, self.dataset.training_images, places, batch_size, self.config.seed)
        turn = torch.from_numpy(agreed(turning.turn_of(*found)))
        # raw_var is nearly the logarithm of a small deviation. Its mixture by squares is a geometric mean of variances, where a mixture of
        # latents has their sum; the steps that follow make up for the difference.
        for head, mixing in (("mu", turn), ("raw_var", turn.square())):
            for name in [name for name in self.engine.parameters if name.startswith(f"encoder.{head}.")]:
                self.engine.mix_rows(name, mixing)
        angles = torch.rad2deg(torch.acos(turn.diag().clamp(-1, 1)))
        self.say(f"step {self.step}: {int((angles > 1).sum())} latent axes turned, by {angles.max():.0f} degrees at most")

    def _losses(self, micro: int, kl_weight: float, phase: str) -> Losses:
        shown = self.config.shown(self.step)
        x_0, place = self.feed.micro_batch(shown, micro)
        draw = Draw(self.config.seed, shown, place, self.config.train.batch_size, self.step)
        if phase != "encoder":
            self.bank = None  # for good: who learns in the end is both
        if self.bank is None:
            return self.engine.losses(x_0, draw, kl_weight, phase)
        self.bank.turn_to(shown, micro)
        return self.engine.losses(x_0, draw, kl_weight, phase, self.bank)

    def _settle(self) -> bool:
        """Look at the measurements of the step before: stop on bad numbers, steer the KL. Returns whether some rank was asked to stop."""
        if self.pending is None:
            return False
        step, measured = self.pending
        values = measured.read()
        self._require_finite(step, values)
        if step >= self.config.first_joint_step:
            told = self._information(values) if self.kl_weight.settings.kind == "auto" else []
            self.kl_weight.observe(step - self.config.first_joint_step, sum(self._parts(values)[2]), told)
        self.pending = None
        return measured.asked_to_stop()

    def _require_finite(self, step: int, values: list[float]) -> None:
        loss, terms, kl = self._parts(values)
        named = [(term.fault, terms[term.name]) for term in self.model.terms]
        for what, value in (named[0], ("the encoder's KL", sum(kl)), *named[1:], ("the loss", loss)):
            if not abs(value) < float("inf"):
                raise NonFiniteError(f"step {step}: {what} is {value}; {self._stopped}")

    def _require_finite_weights(self) -> None:
        if (bad := self.engine.not_finite()) is not None:
            raise NonFiniteError(f"step {self.step - 1}: the update left {bad} not finite; {self._stopped}")

    def _parts(self, values: list[float]) -> tuple[float, dict[str, float], list[float]]:
        """Measured numbers as the loss, the terms by name, and the KL per latent dimension."""
        names = [term.name for term in self.model.terms]
        count = 1 + len(names)
        return values[0], dict(zip(names, values[1:count], strict=True)), values[count : count + self.model.latent_size]

    def _information(self, values: list[float]) -> list[float]:
        """Of one step's batch, per latent dimension, nats (`metrics.latents.information_per_dim`)."""
        if self.model.deterministic:  # without noise it has no bound
            return [0.0] * self.model.latent_size
        # They stand last. A checkpoint of before 2026-11-29 has a step without them, of which nobody asks this.
        mean, var, mean_square = np.split(np.array(values[-3 * self.model.latent_size :]), 3)
        return gaussian_information((mean_square - mean**2).clip(min=0.0), var).tolist()

    def _log(self, kl_weight: float, measured: Measurement, rate: float, data_wait: float) -> None:
        values = measured.read()
        self._require_finite(self.step - 1, values)
        loss, terms, kl_per_dim = self._parts(values)
        information = self._information(values)
        kl, told, live = sum(kl_per_dim), sum(information), len(live_dims(information))
        config, joint_done = self.config, self.step - self.config.first_joint_step
        row = {
            "step": self.step,
            "images": self.step * config.train.batch_size,
            "loss_nats": loss,
            **terms,
            "kl_nats": kl,
            "information_sum_nats": told,
            "kl_weight": kl_weight,
            "learning_rate": self.engine.learning_rate(config.first_network, self.step - 1),
            "images_per_second": rate,
            "data_wait": data_wait,  # share of the time in which the step waited for images
            "seconds": self.seconds,
        }
        self.engine.log(row, self.step)
        if self.chief:
            self.run_folder.append({**row, "kl_per_dim": kl_per_dim, "information_per_dim": information})
        waits = f" | waits for data {data_wait:.0%}" if data_wait > 0.02 else ""
        state = (
            f"KL {kl:.2f} nats, information {told:.2f} in {live} of {len(kl_per_dim)} latents, beta {kl_weight:.3f}"
            if joint_done > 0
            else "denoiser alone"
        )
        state = "deterministic encoder" if self.model.deterministic else state
        self.say(f"step {self.step}/{config.train.steps} | loss {loss:.2f} nats | {state} | {self._pace(rate)}{waits}")
        if (
            self.model.deterministic or self.warned or self.kl_weight.searching
        ):  # auto may begin, or go on, with a beta that latents cannot live with
            return
        if joint_done > 0.2 * (config.train.steps - config.first_joint_step) and told < COLLAPSED_NATS:
            self.warned = True
            collapsed = f"the posterior has collapsed ({told:.3f} nats of information), the latents carry nothing"
            if config.train.on_collapse != "go_on":
                raise CollapsedError(f"step {self.step}: {collapsed}; {REMEDY}")
            self.say(f"warning: {collapsed}; {REMEDY}")

    def _pace(self, rate: float) -> str:
        """Images per second, and the time that is left at this rate."""
        left = (self.config.train.steps - self.step) * self.config.train.batch_size / rate
        return f"{rate:.0f} images/s | {hms(left)} left"

    def _checkpoint(self, validate: bool) -> None:
        self._require_finite_weights()
        with self.engine.averaged_weights():
            validation_nats = self._validate() if validate else None
        if validation_nats is not None and not math.isfinite(validation_nats):
            raise NonFiniteError(f"step {self.step - 1}: the update left a validation loss of {validation_nats}; {self._stopped}")
        facts = {"architecture": _described(self.model), "settings": self.lasting, "validation_nats": validation_nats}
        assert self.pending is not None  # the step just taken
        step, measured = self.pending
        state = {
            "seconds": self.seconds,
            "warned": self.warned,
            "kl_weight": self.kl_weight.state,
            "pending": (step, measured.read()),
        }
        if self.chief and validate:  # before the checkpoint: a resumed run drops log lines after its step, and cannot write this one again
            self.run_folder.append({"step": self.step, "validation_nats": validation_nats})
        self.engine.save(self.checkpoints, self.step, state, facts)
        if self.chief:
            checkpoints.prune_checkpoints(self.checkpoints, self.config.checkpoint.keep_last, self.config.checkpoint.keep_best)
        wait_for_all()

    @torch.no_grad()
    @enough_memory("checkpoint.validation_images", "lower it")
    def _validate(self) -> float | None:
        """Loss on held-out images with fixed noise and one fixed beta, nats per image; None before the encoder learns, if it ever does."""
        alone = self.config.mode == "denoiser"
        if self.step <= self.config.first_joint_step and not alone:
            return None
        count = self.config.checkpoint.validation_images
        count = count if self.validation.size is None else min(count, self.validation.size)
        total = 0.0
        for place in torch.arange(count).split(VALIDATION_BATCH):
            draw = Draw(self.config.seed, ops.EVALUATION_STEP, place.to(self.device), count)
            x_0 = self.validation.training_images(place).to(self.device)
            loss, _ = self.module(x_0, draw, self.kl_weight.reference, "denoiser" if alone else "both", self.engine.denoiser)
            total += loss.item() * len(place)
        return total / count * math.prod(self.model.image_shape)


def train(
    config: Config | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    model: LatentModel | None = None,
    dataset: Any = None,
    *,
    settings: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Path:
    """Train and save a model; of several processes every one calls it.

    Args:
        config: A YAML file or the name of a config that comes with the package, settings that differ from the defaults, such as
            {"name": "faces", "train.steps": 500}, or a `Config`.
        model: A `Sami`, of any networks, or another method's model, in place of the config's networks; train.mode joint, denoiser or
            staged. A copy of it is trained, in eval mode: dropout is off, and batch norms use their running statistics and leave them as
            they are. In the end it has the weights that are saved, and is in eval mode.
        dataset: In place of the config's data: a torch Dataset, a Hugging Face dataset or column, an iterable of images, a WebDataset, or a
            `sami_fast.data.Dataset`; see docs/data.md for what images may be. An iterable is read into memory once.
        settings: Settings that differ from the config that is named.
        resume: Go on from the newest whole checkpoint, if there is one, with the same model and the same images.
        overwrite: Replace the run folder.
    Returns:
        The run folder. `sami-fast` commands cannot make objects again: `write_report(folder, model=model, dataset=dataset)` can.
    Raises:
        UserError: something in the config, the data or the folder cannot work.
        NonFiniteError: a loss term became NaN or infinite.
        CollapsedError: the latents carry nothing, and train.on_collapse is not to go on.
    """
    config = _settled(config, settings or {}, model, dataset)
    with nullcontext() if dataset is None else given(dataset), torch_as_it_was():
        folder = _train(config, model, resume=resume, overwrite=overwrite)
    if model is not None:
        model.load_state_dict({**model.state_dict(), **load_file(weight_files(folder / "model")[0])})  # extra state stays
        model.eval()
    return folder


def _settled(
    config: Config | Mapping[str, Any] | str | os.PathLike[str] | None, settings: Mapping[str, Any], model: Any, dataset: Any
) -> Config:
    """The config that the arguments of `train` ask for."""
    data = {} if dataset is None else {"data.kind": "given"}
    if isinstance(config, Config):
        if settings:
            raise UserError("settings: expected none beside a Config, which holds them all; use dataclasses.replace")
        if dataset is not None:
            kept = {name: getattr(config.data, name) for name in KEPT_OF_DATA}
            config = replace(config, data=DataConfig(kind="given", **kept))
    elif isinstance(config, Mapping):
        config = load_config(None, {**config, **settings, **data})
    else:
        config = load_config(None if config is None else os.fspath(config), {**settings, **data})
    if model is None:
        return config
    if not isinstance(model, LatentModel):
        raise UserError(f"model: expected a Sami(encoder, denoiser, schedule), found {type(model).__name__}")
    if config.mode in ("frozen", "finetune"):
        raise UserError(f"train.mode: expected joint, denoiser or staged with a model that is given, found {config.mode}")
    try:
        score.pick(model.encoder, config.engine.score)
    except TypeError as error:
        raise UserError(f"engine.{error}") from None
    levels = model.schedule.settings
    schedule = config.schedule if levels["kind"] == Discrete.kind else ScheduleConfig(**levels)
    return replace(config, method=model.method, schedule=schedule)


def _networks(config: Config, dataset: Dataset, model: LatentModel | None) -> LatentModel:
    """The networks of a run: the config's, or a copy of a model that was given, which knows its sizes.

    Raises:
        UserError: they do not fit the images, or a weight has two names.
    """
    if model is None:
        return build_model(config, dataset.image_shape)
    refuse_tied("model", model)
    model.know_sizes(dataset.images(torch.zeros(1, dtype=torch.int64)))
    model = copy.deepcopy(model).eval()  # q(z|x) depends neither on chance nor on other images, as in `adapters`
    if model.image_shape != dataset.image_shape:
        raise UserError(
            f"dataset: expected images of shape {list(model.image_shape)} (C, H, W), the model's, found {list(dataset.image_shape)}"
        )
    if config.denoiser.pretrained:
        denoiser, file = model.networks["denoiser"], weight_files(Path(config.denoiser.pretrained) / "model")[0]
        trained = {name.removeprefix("denoiser."): value for name, value in load_file(file).items() if name.startswith("denoiser.")}
        expected = tensors_of(denoiser)
        if lacking := [name for name, value in expected.items() if name not in trained or trained[name].shape != value.shape]:
            raise UserError(
                f"{file}: holds no {lacking[0]} of this model's denoiser: it is of another model; overwrite=True trains it anew"
            )
        denoiser.load_state_dict({**denoiser.state_dict(), **{name: trained[name] for name in expected}})
        denoiser.requires_grad_(config.first_denoiser_step < config.train.steps)
    return model


def _has_heads(encoder: object) -> bool:
    """Whether an encoder ends in two linear heads that are known, and learn."""
    if not isinstance(encoder, Encoder | HalfUNet):
        return False
    return all(parameter.requires_grad for head in (encoder.mu, encoder.raw_var) for parameter in head.parameters())


def _described(model: LatentModel) -> dict[str, Any]:
    """The architecture of a model; of networks that nobody can make again from settings, their classes by name."""
    return model.architecture or {name: {"class": type(network).__qualname__} for name, network in model.networks.items()}


def _save(model: LatentModel, folder: Path, weights: dict[str, Tensor]) -> None:
    """`save_pretrained`; of such networks, the weights."""
    if model.architecture is not None:
        return model.save_pretrained(folder, weights)
    settings = {"format": FORMAT, "method": model.method, GIVEN: _described(model), "schedule": model.schedule.settings}
    write_model(folder, settings, weights)


def _train(config: Config, model: LatentModel | None, *, resume: bool, overwrite: bool) -> Path:
    if config.train.minutes or config.mode == "staged":
        config, dataset, device = _opened(config)  # what is left to the data is settled once for all that follows
        if config.train.minutes:
            before = stages.begun(config) if resume else None
            if before is None and ranks()[0] == 0:
                print("measuring how long steps take here", flush=True)
            config = (
                budget.laid_out(config, _pace(config, dataset, device, model)) if before is None else stages.with_steps_of(config, before)
            )
        if config.mode == "staged":
            _train_denoiser(config, dataset, device, model, resume=resume, overwrite=overwrite)
    attempt = 0
    while True:
        trainer = Trainer(config, resume=resume, overwrite=overwrite, attempt=attempt, model=model)
        try:
            return trainer.run()
        except CollapsedError as error:
            attempt = round(math.log(trainer.kl_weight.scale, RESTART_SCALE)) + 1  # a resumed run knows how often it had begun
            if config.train.on_collapse == "stop" or attempt > RESTARTS:
                raise
            trainer.say(f"{error}; restart {attempt} of {RESTARTS} with {RESTART_SCALE**attempt:.2g} of beta")
            resume, overwrite = False, True


def _opened(config: Config) -> tuple[Config, Dataset, torch.device]:
    """Join the other ranks, and `stages.with_data`; also this rank's device."""
    *_, device = init_distributed(config.engine.patience)
    set_threads(config.engine.threads)
    set_arithmetic(config.engine.tf32, config.engine.deterministic)
    return *stages.with_data(config), device


def _pace(config: Config, dataset: Dataset, device: torch.device, model: LatentModel | None = None) -> budget.Pace:
    """How fast this machine takes a run's steps; every rank calls it, and hears the first's."""
    model = _networks(config, dataset, model).placed(device)
    denoiser = model.networks["denoiser"] if config.capabilities.warmup else None
    module, count = TrainingModule(model, config), ranks()[1]
    with enough_memory("train.batch_size", LESS_MEMORY):
        if module.captured is not None:
            module.captured.wait = 0
        _take_threads(module, config, device, count)
        return agreed(budget.measure(module, denoiser, config, dataset, device, count))


def _preview(config: Config, world_size: int) -> str:
    """The page of a run that is not started; of one process, with what a few steps here have shown."""
    measured = None
    if world_size == 1:
        try:
            config, dataset, device = _opened(config)
            pace = _pace(config, dataset, device)
            config = budget.laid_out(config, pace) if config.train.minutes else config
            model = _networks(config, dataset, None).placed(device)
            _rehearse(TrainingModule(model, config), config, device, 1)
            measured = preview.Measured(config, dataset, model, pace, device, _kept_bytes(model, config, weights=True))
        finally:
            leave_distributed()
    return preview.page(config, world_size, measured, checkpoints.list_checkpoints(config.run_dir / "checkpoints") != [])


def _train_denoiser(
    config: Config, dataset: Dataset, device: torch.device, model: LatentModel | None, *, resume: bool, overwrite: bool
) -> None:
    """The first stage of a staged run, unless it has been done. What would stop the second is looked for first."""
    name, anew = (config.name, not resume) if model is not None else ("", False)  # of objects, no other run can use it
    on_chief(lambda: RunFolder(config.run_dir).check(resume=resume, overwrite=overwrite))
    if resume:
        on_chief(lambda: stages.refuse_other_settings(config, dataset))
    if config.encoder.start == "fresh":
        rehearsing = _networks(config, dataset, model).placed(device)
        _checked(rehearsing, config, dataset, device)
        _rehearse(TrainingModule(rehearsing, config), config, device, ranks()[1])
    folder = RunFolder(stages.denoiser_stage(config, dataset, name).run_dir, patient=True)
    on_chief(folder.lock)
    # One rank looks, and only while no other run can train there: what is found holds for all ranks until the end.
    first, finished = agreed((stages.denoiser_stage(config, dataset, name), stages.is_finished(folder.path) and not anew))
    if ranks()[0] == 0:
        print(f"stage 1, the denoiser alone: {folder.path}{', done before' if finished else ''}", flush=True)
    if finished:
        folder.release()
    else:
        Trainer(first, resume=not anew, overwrite=anew, run_folder=folder, model=model).run()
    if ranks()[0] == 0:
        print("stage 2, the encoder beside it", flush=True)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sami_fast/train.py",
        description="Train SAMI and write a run folder: config, log, checkpoints, model, report.",
        epilog="example: deepspeed -q --num_accelerators 2 sami_fast/train.py --config disks train.steps=50 name=short",
    )
    parser.add_argument("--version", action="version", version=f"sami-fast {__version__}")
    add_training_arguments(parser)
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; as `run`."""
    return run(parse(sys.argv[1:] if argv is None else argv))


def run(arguments: argparse.Namespace) -> int:
    """What the arguments of `parse`, or of `sami-fast train`, ask for.

    Exit status: 0 done, 1 stopped by bad numbers or a lost rank, 2 something the user gave cannot work, 130 Ctrl-C, 143 SIGTERM,
    138 SIGUSR1.
    """
    if arguments.cpu_threads:
        arguments.overrides = [*arguments.overrides, f"engine.threads={arguments.cpu_threads}"]
    with way_on(lambda: _way_on(arguments)), interruption.handled(), shown() if speaks() else nullcontext():
        try:
            return _command(arguments)
        except (Exception, Interrupted) as error:
            with interruption.held_back(then_raised=False):  # a launcher ends all ranks when one has ended
                return _ended(error, arguments)


def _ended(error: BaseException, arguments: argparse.Namespace) -> int:
    """Say what ended a run, here and to the other ranks. Returns the exit status; a mistake of ours is raised again."""
    if isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError):
        error = lost_rank() or error  # a collective says in words of its own that a rank is gone
    says = speaks()
    if isinstance(error, UserError | OSError):  # OSError: a name too long, no permission, a folder gone: the system's own words
        words, status = str(error), 2
    elif isinstance(error, NonFiniteError | CollapsedError):
        words, status = str(error), 1
    elif isinstance(error, Interrupted):
        words, status = f"interrupted; {_way_on(arguments, error.kept)}", error.status
    elif isinstance(error, RankLostError):
        words, status, says = str(error) if error.explained else f"{error}; {_way_on(arguments)}", error.status, error.speaks
    else:
        end_run(f"{type(error).__name__}: {error}", 1)
        raise error
    if says:
        with suppress(BrokenPipeError):
            print(printable(f"sami-fast: {words}"), file=sys.stderr, flush=True)
    end_run(words, status)
    return status


def _way_on(arguments: argparse.Namespace, kept: str = "") -> str:
    """How to go on with a run that was stopped."""
    with suppress(UserError):  # it was interrupted before the config was read
        config = load_config(arguments.config, arguments.overrides)
        kept = kept or next((f"{found} is kept" for found in checkpoints.list_checkpoints(config.run_dir / "checkpoints")), "")
        first = Path(config.runs_dir) / stages.DENOISERS
        if not kept and config.mode == "staged" and first.is_dir():
            kept = f"what the first stage has kept is in {first}"
    if kept:
        return f"{kept}; the same command with --resume goes on from there"
    return "nothing was kept yet; the same command with --resume starts again"


def _for_ranks(arguments: argparse.Namespace, count: int) -> str:
    """The command that does the same in several processes."""
    config = ["--config", arguments.config] if arguments.config else []
    flags = [f"--{name.replace('_', '-')}" for name in ("resume", "overwrite", "no_report", "dry_run") if getattr(arguments, name)]
    return f"{SEVERAL.format(ranks=count)} {shlex.join([*config, *arguments.overrides, *flags])}"


def _command(arguments: argparse.Namespace) -> int:
    """What the arguments ask for."""
    if arguments.settings:
        print(settings_table())
        return 0
    if arguments.resume and arguments.overwrite:
        raise UserError("--resume and --overwrite: choose one")
    if (arguments.ranks or 1) > 1:
        raise UserError(f"--num_accelerators: this is one process; several are started by {_for_ranks(arguments, arguments.ranks)}")
    if arguments.device:
        take_device(arguments.device)
    config = load_config(arguments.config, arguments.overrides)
    if (ignored := steps_beside_minutes(arguments.config)) and speaks():
        print(printable(ignored), file=sys.stderr, flush=True)
    if arguments.dry_run:
        world_size = max(1, whole_number("WORLD_SIZE", 1))
        if whole_number("RANK", 0) == 0:
            given = "# Direct: no DeepSpeed"
            if not config.direct(world_size):
                given = f"# DeepSpeed\n{json.dumps(deepspeed_dicts(config, world_size), indent=2)}"
            micro_batch(config, world_size)
            print(_preview(config, world_size))
            if arguments.verbose:
                print(f"\n{to_yaml(config)}\n{given}")
        return 0
    if not arguments.device and not os.environ.get("RANK") and (count := torch.cuda.device_count()) > 1:
        print(f"one process trains on one of {count} GPUs; on all of them: {_for_ranks(arguments, count)}", flush=True)
    folder = train(config, resume=arguments.resume, overwrite=arguments.overwrite)
    chief = ranks()[0] == 0
    leave_distributed()
    if chief and (arguments.no_report or config.mode == "denoiser"):
        print(folder, flush=True)
    elif chief:
        from sami_fast.engine.monitors import show_report
        from sami_fast.evaluation import Health
        from sami_fast.report import write_report

        print("writing the report", flush=True)
        set_arithmetic()  # as every command that uses a trained model
        page = write_report(folder, trust_remote_code=True, device=arguments.device)  # of what this command has named
        show_report(folder)
        if health := json.loads((page.parent / "metrics.json").read_text()).get("health"):
            print(Health(**health), flush=True)
        print(page, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
