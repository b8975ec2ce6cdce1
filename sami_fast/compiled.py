"""torch.compile behind one setting, `engine.compile`: what of a step is compiled, with a cache that outlives the process."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .config import Config
from .latent_model import LatentModel
from .step import guided_terms


class Compiled:
    """The parts of a step as the config wants them, compiled or as they are.

    Args:
        model: The networks.
        config: Its `engine.compile`: "denoiser" compiles the network beside the encoder, "step" also the encoder and, as one graph,
            everything from the noisy images to the loss, with the score method `dual`.
    """

    def __init__(self, model: LatentModel, config: Config) -> None:
        engine = config.engine
        self.score_method = "dual" if engine.compile == "step" else engine.score
        self.encoder: Callable[..., Any] = model.encoder
        self.denoiser: Callable[..., Any] = getattr(model, model.partner)
        self.guided_terms: Callable[..., Any] = guided_terms
        if engine.compile == "off":
            return
        _keep_cache()
        # Shapes are those of the config from the first step to the last; validation has its own.
        options = {"dynamic": False, "mode": "reduce-overhead" if engine.cuda_graphs else None}
        if engine.compile == "denoiser":
            self.denoiser = torch.compile(self.denoiser, **options)
        else:
            self.encoder = torch.compile(self.encoder, **options)
            self.guided_terms = torch.compile(guided_terms, fullgraph=True, **options)


def _keep_cache() -> None:
    """Compiled code stays where a later process finds it, unless the user has said where."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(home) / "sami-fast" / "compiled"))
