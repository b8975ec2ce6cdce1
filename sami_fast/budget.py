"""Minutes into steps: how long a step of each kind takes on this machine, and how many of them fit."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor, nn

from .config import Config
from .data import Dataset
from .engine.bank import Bank
from .errors import UserError
from .progress import hms
from .step import Draw

TIMED, WARM = 5, 2  # steps of each kind
OVERHEAD = 1.15  # time of a run over that of its steps: optimiser, data, log, validation, checkpoints
DENOISER_SHARE = 0.45  # of the minutes of a staged run, for its first stage
VALUES = 1 << 20  # pixel values of a batch that is timed; of larger ones a part stands for the whole
FEWEST = 20  # steps that are worth a run


@dataclass(frozen=True)
class Pace:
    """Seconds per optimiser step on this machine."""

    denoiser: float  # the denoiser alone
    outputs: float  # its outputs without gradients
    encoder: float  # the encoder alone, with the outputs at hand
    both: float


def measure(module: nn.Module, denoiser: nn.Module | None, config: Config, dataset: Dataset, device: torch.device, ranks: int) -> Pace:
    """Time a few steps of each kind, forward and backward.

    Args:
        module: Called as training calls it, (x_0, draw, kl_weight, phase, denoiser) -> (loss, measurements); no weight changes.
        denoiser: Its denoiser; None of methods that know no phases.
        config: The run's.
        dataset: Images to take the steps with.
        device: Where the networks are.
        ranks: Processes that share a batch.
    """
    pieces = config.engine.gradient_accumulation
    whole = max(1, config.train.batch_size // (pieces * ranks))
    count = min(whole, max(1, VALUES // math.prod(dataset.image_shape)))
    place = torch.arange(count)
    x_0 = dataset.training_images(place % (dataset.size or count)).to(device)
    draw = Draw(config.seed, 0, place.to(device), config.train.batch_size)

    def timed(step: Callable[[], object]) -> float:
        seconds = []
        for _ in range(WARM + TIMED):
            began = time.perf_counter()
            step()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            seconds.append(time.perf_counter() - began)
            module.zero_grad(set_to_none=True)
        return pieces * median(seconds[WARM:]) * whole / count

    def learning(phase: str, outputs: Callable[..., Tensor] | None = None) -> Callable[[], object]:
        return lambda: module(x_0, draw, 1.0, phase, outputs)[0].backward()

    both = timed(learning("both"))
    if denoiser is None:
        return Pace(both, 0.0, both, both)
    noisy = x_0.repeat_interleave(config.objective.noise_levels, 0)
    at = torch.full((len(noisy),), 0.5, device=device)

    @torch.no_grad()
    def outputs() -> Tensor:
        return denoiser(noisy, at)

    known = Bank(lambda x_t, t: outputs())  # as training knows them
    with torch.no_grad():
        known(noisy, at)
    return Pace(timed(learning("denoiser")), timed(outputs), timed(learning("encoder", known)), both)


def laid_out(config: Config, pace: Pace) -> Config:
    """The config with the steps that fit into its minutes.

    Raises:
        UserError: hardly any do.
    """
    train, minutes = config.train, config.train.minutes
    seconds = 60 * minutes / OVERHEAD
    denoiser_steps = train.denoiser_steps
    if config.mode == "staged":
        denoiser_steps = _enough(DENOISER_SHARE * seconds, pace.denoiser, minutes)
        seconds *= 1 - DENOISER_SHARE
    alone = config.encoder_share
    if config.mode == "denoiser":
        per_step = pace.denoiser
    elif config.mode == "joint":
        warmup = train.denoiser_warmup if config.capabilities.warmup else 0.0
        per_step = warmup * pace.denoiser + (1 - warmup) * pace.both
    else:
        per_step = alone * pace.encoder + (1 - alone) * pace.both
        if not train.bank_steps or seconds / (per_step + alone * pace.outputs) < train.bank_steps:
            per_step += alone * pace.outputs
        else:
            seconds -= train.bank_steps * pace.outputs
    steps = _enough(seconds, per_step, minutes)
    return replace(config, train=replace(train, steps=steps, denoiser_steps=denoiser_steps))


def course(config: Config, pace: Pace) -> tuple[list[str], float]:
    """What a run does until when, a line per stage, and its seconds; `config` as `laid_out` gives it, or with steps that were asked for."""
    train, elapsed, lines = config.train, 0.0, []

    def stage(what: str, steps: int, seconds: float, note: str = "") -> None:
        nonlocal elapsed
        elapsed += OVERHEAD * seconds
        if steps:
            lines.append(f"{what}: {steps} steps of {seconds / steps:.2g} s, until {hms(elapsed)}{note}")

    alone = train.denoiser_steps if config.mode == "staged" else config.first_joint_step
    stage("the denoiser alone", alone, alone * pace.denoiser)
    if config.mode == "denoiser":
        return lines, elapsed
    first = 0 if config.mode == "staged" else config.first_joint_step
    encoder = max(0, config.first_denoiser_step - first)
    new = min(encoder, train.bank_steps or encoder)
    beta, joint = config.kl_weight, train.steps - first
    halved = f"; beta halves every {beta.search * joint:.0f} steps from {beta.start:g} on, until a latent lives"
    rises = f", then rises by a factor of {beta.rebound:g} and halves every {beta.fall * joint:.0f}, to {beta.low:g} at the least"
    found = halved + rises if beta.kind == "auto" else ""
    stage("the encoder beside it", encoder, encoder * pace.encoder + new * pace.outputs, found)
    both = train.steps - first - encoder
    stage("both networks", both, both * pace.both, "" if encoder else found)
    return lines, elapsed


def _enough(seconds: float, per_step: float, minutes: float) -> int:
    """Steps that fit into seconds, down to two digits: the rest would only be noise of the clock.

    Raises:
        UserError: hardly any do.
    """
    steps = int(seconds / per_step)
    if steps < FEWEST:
        raise UserError(
            f"train.minutes: {minutes:g} minutes are {steps} steps of {per_step:.2g} s here; give more, or take smaller images or networks"
        )
    unit = 10 ** (len(str(steps)) - 2)
    return steps // unit * unit
