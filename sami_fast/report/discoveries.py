"""Axes that the report finds without labels, and how they compare where the factors are known."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..evaluation import Latents, Run
from ..evaluation.factors import matched_scores
from ..latents.discovery import Discovered, discover

# For a report in seconds; `sami-fast axes` takes more of each.
IMAGES, DRAWS, STEPS = 128, 2, 16


def discoveries(run: Run, latents: Latents) -> dict[str, Discovered]:
    """Axes by method; empty where a model draws nothing without latents, fewer than two are live, or the images are too few to tell."""
    count = min(max(IMAGES, 4 * len(latents.live)), run.count)
    if not run.model.guides or len(latents.live) < 2 or count <= 2 * len(latents.live):
        return {}
    settings: Any = {"encoded": run.count, "draws": DRAWS, "num_steps": STEPS, "seed": run.config.seed, "batch_size": run.batch_size}
    try:
        found = discover(run.model, run.images, count, **settings)
    except ValueError:  # on so few images no latent is live, or two are the same
        return {}
    return {axes.method: axes for axes in found if axes.method != "level"}  # level has a set of axes per noise level


def axis_scores(
    found: dict[str, Discovered], latents: Latents, factors: np.ndarray, names: Sequence[str], periods: Mapping[str, float]
) -> dict[str, Any]:
    """What the page says of the axes, as plain numbers: the score of each and, with factors, MCC of the live latents and of each method.

    Args:
        found: By method.
        latents: Of the evaluation images; sampled z is scored.
        factors: [N, F], F may be 0.
        names: Of the factors, none of them an attribute.
        periods: Of those that come round again.
    """

    def recovery(codes: np.ndarray) -> dict[str, Any]:
        if not names:
            return {}
        scores = matched_scores(codes, factors, names, periods)
        return {key: scores[key] for key in ("mcc", "mcc_per_factor")}

    scores = {"latents": recovery(latents.z[:, latents.live])} if found and names else {}
    for method, axes in found.items():
        codes = axes.axes.coordinates(latents.z)
        each = [float(value) if math.isfinite(value) else None for value in axes.score]
        undecided = axes.profile.T.tolist()  # [A][L]
        scores[method] = {"score_name": axes.score_name, "score": each, "undecided": undecided, **recovery(codes)}
        scores["logsnr_levels"] = axes.logsnr.tolist()
    return scores
