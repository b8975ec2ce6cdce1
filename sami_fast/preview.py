"""What a run would do, take and write, as a page for a person: what `--dry-run` prints."""

import resource
import sys
from dataclasses import dataclass

import psutil
import torch

from .budget import Pace, course
from .config import Config, micro_batch
from .data import Dataset
from .methods.latent_model import LatentModel
from .progress import hms
from .stages import DENOISERS

LABEL = 11  # letters of a line's first column


@dataclass(frozen=True)
class Measured:
    """What a few steps here have shown.

    Args:
        config: The run's, with its steps laid out.
        dataset: The images to train on.
        model: The networks, fresh.
        pace: How long steps take; None where nothing was timed.
        device: Where they were taken.
        checkpoint_bytes: Of one checkpoint.
    """

    config: Config
    dataset: Dataset
    model: LatentModel
    pace: Pace | None
    device: torch.device
    checkpoint_bytes: int


def page(config: Config, ranks: int, measured: Measured | None, taken: bool) -> str:
    """The page.

    Args:
        config: The run's.
        ranks: Processes that would train it.
        measured: Of one process; None where several would train, and nothing was opened.
        taken: Whether the run's folder holds a run already.
    """
    config = measured.config if measured else config
    lines = [f"{config.name}: method {config.method}, train.mode {config.mode}; nothing was started or written", ""]

    def say(label: str, *texts: str) -> None:
        lines.extend(f"{label if not row else '':<{LABEL}} {text}" for row, text in enumerate(texts))

    accumulated = config.engine.gradient_accumulation
    pieces = f", {accumulated} after one another" if accumulated > 1 else ""
    shared = f", {micro_batch(config, ranks)} at a time on each of {ranks} process(es){pieces}" if ranks * accumulated > 1 else ""
    batch = f"{config.train.batch_size} images a step{shared}"
    if measured is None:
        say("images", f"data.kind {config.data.kind}" + (f", from {config.data.path}" if config.data.path else ""))
        say("batch", batch)
        say("time", "measured where one process trains; sami-fast plan estimates many")
    else:
        say("images", *_images(config, measured.dataset))
        say("networks", *_networks(measured.model))
        say("batch", batch)
        if measured.pace is not None:
            stages, seconds = course(config, measured.pace)
            say("stages", *stages)
            say("time", f"{hms(seconds)} by the speed of a few steps here, on {_where(measured.device)}; the report comes after it")
        say("memory", _memory(measured.device))
    say("folder", f"{config.run_dir}{', which holds a run: --resume goes on with it, --overwrite replaces it' if taken else ''}")
    say("writes", *_writes(config, measured.checkpoint_bytes if measured else None))
    return "\n".join(lines)


def _images(config: Config, dataset: Dataset) -> list[str]:
    channels, height, width = dataset.image_shape
    number = "endless" if dataset.size is None else f"{dataset.size} to train on"
    factors = f", with known factors {', '.join(dataset.factor_names)}" if dataset.factor_names else ""
    place = config.data.path or config.data.class_ or f"made by data.kind {config.data.kind}"
    return [f"{number}, {width}x{height} pixels, {channels} channel(s){factors}", place]


def _networks(model: LatentModel) -> list[str]:
    found = []
    for name, network in model.networks.items():
        count = sum(p.numel() for p in network.parameters())
        frozen = "" if any(p.requires_grad for p in network.parameters()) else ", frozen"
        latents = f", to {model.latent_size} latents" if name == "encoder" else ""
        found.append(f"{name}: {count:,} parameters{frozen}{latents}")
    return found


def _where(device: torch.device) -> str:
    return f"{torch.get_num_threads()} CPU thread(s)" if device.type == "cpu" else str(device)


def _memory(device: torch.device) -> str:
    """What steps of the run's size have taken at most in this process."""
    if device.type == "cuda":
        most, there = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
    else:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # bytes there, KiB elsewhere
        there = psutil.virtual_memory().total
    return f"{most / 1e9:.1f} GB at most in a rehearsed step, of {there / 1e9:.1f} GB"


def _writes(config: Config, checkpoint_bytes: int | None) -> list[str]:
    kept = config.checkpoint.keep_last + config.checkpoint.keep_best
    each = f" of {checkpoint_bytes / 1e6:.1f} MB" if checkpoint_bytes is not None else ""
    monitors = [name for name, wanted in (("tensorboard/", config.log.tensorboard), ("csv/", config.log.csv)) if wanted]
    found = [
        ", ".join(("config.yaml, environment.json, metrics.jsonl", *monitors)),
        f"checkpoints/: every {config.checkpoint.every} steps, at most {kept}{each} kept",
        "model/, and report/ unless --no-report",
    ]
    if config.mode == "staged":
        found.append(f"{config.runs_dir}/{DENOISERS}/: the first stage, for every run that needs the same")
    if config.log.wandb:
        found.append("to Weights & Biases")
    return found
