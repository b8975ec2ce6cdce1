"""How straight the clips of a dataset run: through the latents, and through what they are compared with."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import AbsentError, UserError
from ..methods.latent_model import LatentModel
from ..metrics.straightness import straightness
from .latents import Baselines, Latents
from .run import Run

MAX_CLIPS = 256

Represent = Callable[[Tensor], np.ndarray]  # [n, C, H, W] on the model's device -> [n, D]


def num_clips(run: Run) -> int:
    """Clips that straightness is taken from; 0 where the data have none that are long enough."""
    known = run.evaluation.num_clips
    return 0 if run.evaluation.clip_length < 3 else MAX_CLIPS if known is None else min(MAX_CLIPS, known)


def whole_clips(run: Run) -> Iterator[Tensor]:
    """Evaluation clips, [T, C, H, W] each, without those of which a frame cannot be read."""
    for index in range(num_clips(run)):
        with suppress(AbsentError):
            yield run.evaluation.clips(torch.tensor([index]))[0]


@torch.no_grad()
def through(run: Run, *represent: Represent) -> list[np.ndarray]:
    """Evaluation clips, each frame by itself, in every representation: the frames, which may have to be decoded, are read once.

    Returns:
        [N, T, D] float64 for each, with its own D.
    Raises:
        UserError: none can be read.
    """
    clips: list[list[np.ndarray]] = [[] for _ in represent]
    for clip in whole_clips(run):
        frames = clip.to(run.model.device).split(run.batch_size)
        for paths, codes in zip(clips, represent, strict=True):
            paths.append(np.concatenate([codes(part) for part in frames]))
    if not clips[0]:
        raise UserError("data.path: no evaluation clip can be read")
    return [np.stack(paths).astype(np.float64) for paths in clips]


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


def representations(run: Run, latents: Latents, baselines: Baselines | None = None) -> dict[str, tuple[Represent, np.ndarray]]:
    """What the clips of a run are taken through.

    Args:
        run: The run.
        latents: Of its evaluation images, whose spread standardises.
        baselines: Also these.
    Returns:
        By name, how a frame is taken to its codes, and their standard deviation over images, [D].
    """
    rows = {"latents": (means(run.model), _std(latents))}
    if baselines is not None:
        pca = baselines.components
        rows["untrained"] = means(baselines.untrained), baselines.untrained_latents.mu.std(0)
        rows["pca"] = (lambda part: pca.transform(flat(part))), np.sqrt(pca.explained_variance_)
        rows["pixels"] = flat, baselines.pixels.std(0)
    return rows


def straightness_scores(run: Run, rows: Mapping[str, tuple[Represent, np.ndarray]]) -> dict[str, dict[str, Any]]:
    """Straightness by representation, each raw and standardised (keys `standardized_...`); {} without clips."""
    if not rows or not num_clips(run):
        return {}
    frames, *paths = through(run, flat, *(represent for represent, _ in rows.values()))
    scores = {}
    for (name, (_, std)), clips in zip(rows.items(), paths, strict=True):
        scores[name] = straightness(clips, pixels=frames).row() | {"frames": clips.shape[1]}
        if std.any():
            standardized = straightness(clips, std=std, pixels=frames).row()
            scores[name] |= {f"standardized_{key}": standardized[key] for key in standardized if key.startswith(("curvature", "cosine"))}
    return scores
