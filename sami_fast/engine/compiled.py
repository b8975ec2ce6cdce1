"""torch.compile behind one setting, `engine.compile`: what of a step is compiled, with a cache that outlives the process."""

import os
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from ..config import Config
from ..environment import cache_home
from ..methods.latent_model import LatentModel, Parts
from ..methods.ranks import mean_over_ranks
from ..step import Objective, guided_terms


def eager_parts(model: LatentModel, config: Config) -> Parts:
    """Nothing compiled."""
    engine = config.engine
    dual = engine.compile == "step" or engine.zero_stage == engine.encoder_zero_stage == 3
    return model.parts(
        denoiser=recomputing(getattr(model, model.partner), config),
        objective=Objective(**asdict(config.objective)),
        score_method="dual" if dual else engine.score,
        store_eps=engine.store_eps,
        global_mean=mean_over_ranks,
    )


def recomputing(denoiser: Callable[..., Tensor], config: Config) -> Callable[..., Tensor]:
    """The denoiser as `engine.checkpoint_activations` wants it called."""
    return partial(denoiser, recompute=True) if config.engine.checkpoint_activations else denoiser


def compiled_parts(model: LatentModel, config: Config) -> Parts:
    """What `engine.compile` says: nothing, the denoiser, or ("step") the encoder and, as one graph, all from the noisy images to the loss.

    A step's shapes are the same from the first to the last, so graphs are made for them alone. Random numbers are drawn outside: the
    number of the step, which they depend on, would be part of a graph.
    """
    parts, engine = eager_parts(model, config), config.engine
    if engine.compile == "none":
        return parts
    _keep_cache()
    options = inductor_options(cuda_graphs=engine.cuda_graphs)
    if engine.compile == "denoiser":
        return replace(parts, denoiser=torch.compile(parts.denoiser, dynamic=False, options=options))
    whole = torch.compile(guided_terms, fullgraph=True, dynamic=False, options=options)
    return replace(parts, encoder=torch.compile(parts.encoder, dynamic=False, options=options), guided_terms=whole)


def inductor_options(cuda_graphs: bool) -> dict[str, Any]:
    """Options of torch.compile.

    On a GPU, torch before 2.15 may sum one tensor along two directions in a single kernel, and then gives wrong gradients: of a
    convolution's bias where an embedding is added to each channel, under bf16 (pytorch/pytorch #190796, mended in 2.11), and of slices
    of one tensor (#193061, in 2.15). So it is told not to.
    """
    return {"triton.cudagraphs": cuda_graphs} | ({"triton.mix_order_reduction": False} if TorchVersion(torch.__version__) < "2.15" else {})


def _keep_cache() -> None:
    """Compiled code stays where a later process finds it, unless the user has said where."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_home() / "sami-fast" / "compiled"))
