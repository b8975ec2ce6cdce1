"""How straight the clips of a dataset run: through the latents, and through what they are compared with."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..latent_model import LatentModel
from ..metrics.straightness import straightness
from .latents import Latents, encode, pixels, principal_components, untrained
from .run import Run

MAX_CLIPS = 256

Represent = Callable[[Tensor], np.ndarray]  # [n, C, H, W] on the model's device -> [n, D]


def num_clips(run: Run) -> int:
    """Clips that straightness is taken from; 0 where the data have none that are long enough."""
    if not hasattr(run.evaluation, "clips") or run.evaluation.clip_length < 3:
        return 0
    return min(MAX_CLIPS, getattr(run.evaluation, "num_clips", MAX_CLIPS))


@torch.no_grad()
def through(run: Run, represent: Represent) -> np.ndarray:
    """Evaluation clips, each frame by itself. [N, T, D] float64."""
    clips = []
    for index in range(num_clips(run)):
        frames = run.evaluation.clips(torch.tensor([index]))[0].to(run.model.device)
        clips.append(np.concatenate([represent(part) for part in frames.split(run.batch_size)]))
    return np.stack(clips).astype(np.float64)


def means(model: LatentModel) -> Represent:
    """A frame as the mean of q(z|x)."""
    return lambda frames: model.encode(frames).mu.cpu().numpy()


def flat(frames: Tensor) -> np.ndarray:
    """A frame as its pixels."""
    return frames.flatten(1).cpu().numpy()


def _std(latents: Latents) -> np.ndarray:
    """Standard deviation over the images of every dimension in use, 0 of the others, which standardising would only amplify. [Z]"""
    used = np.isin(np.arange(latents.mu.shape[1]), latents.live)
    return np.where(used, latents.mu.std(0), 0.0)


def straightness_scores(run: Run, latents: Latents, *, baselines: bool = True) -> dict[str, dict[str, Any]]:
    """Straightness by representation, each raw and standardised (keys `standardized_...`); {} without clips.

    Args:
        run: The run.
        latents: Of its evaluation images, whose spread standardises.
        baselines: Also of the encoder before training, of principal components and of pixels.
    """
    if not num_clips(run):
        return {}
    frames = through(run, flat)
    rows = [("latents", through(run, means(run.model)), _std(latents))]
    if baselines:
        fresh, components = untrained(run), principal_components(run)
        rows.append(("untrained", through(run, means(fresh)), encode(run, fresh).mu.std(0)))
        rows.append(("pca", through(run, lambda part: components.transform(flat(part))), np.sqrt(components.explained_variance_)))
        rows.append(("pixels", frames, pixels(run).std(0)))
    scores = {}
    for name, clips, std in rows:
        scores[name] = straightness(clips, pixels=frames).row() | {"frames": clips.shape[1]}
        if std.any():
            standardized = straightness(clips, std=std, pixels=frames).row()
            scores[name] |= {f"standardized_{key}": standardized[key] for key in standardized if key.startswith(("curvature", "cosine"))}
    return scores
