"""torch.compile behind one setting, `engine.compile`: what of a step is compiled, with a cache that outlives the process."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import Config
from ..methods.latent_model import LatentModel
from ..step import guided_terms


@dataclass(frozen=True)
class Parts:
    """What a training step calls, each as it is or compiled."""

    encoder: Callable[..., Any]  # of clean images; the score differentiates the encoder itself
    denoiser: Callable[..., Any]
    guided_terms: Callable[..., Any]
    score_method: str


def eager_parts(model: LatentModel, config: Config) -> Parts:
    """Nothing compiled."""
    engine = config.engine
    dual = engine.compile == "step" or engine.zero_stage == engine.encoder_zero_stage == 3
    return Parts(model.encoder, getattr(model, model.partner), guided_terms, "dual" if dual else engine.score)


def compiled_parts(model: LatentModel, config: Config) -> Parts:
    """What `engine.compile` says: nothing, the denoiser, or ("step") the encoder and, as one graph, all from the noisy images to the loss.

    A step's shapes are the same from the first to the last, so graphs are made for them alone. Random numbers are drawn outside: the
    number of the step, which they depend on, would be part of a graph.
    """
    parts, engine = eager_parts(model, config), config.engine
    if engine.compile == "none":
        return parts
    _keep_cache()
    options = {"dynamic": False, "mode": "reduce-overhead" if engine.cuda_graphs else None}
    if engine.compile == "denoiser":
        return Parts(parts.encoder, torch.compile(parts.denoiser, **options), guided_terms, parts.score_method)
    whole = torch.compile(guided_terms, fullgraph=True, **options)
    return Parts(torch.compile(parts.encoder, **options), parts.denoiser, whole, parts.score_method)


def _keep_cache() -> None:
    """Compiled code stays where a later process finds it, unless the user has said where."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(home) / "sami-fast" / "compiled"))
