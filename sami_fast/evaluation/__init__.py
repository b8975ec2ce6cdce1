"""A finished run, scored: what its latents hold, what they cost, at which noise levels, how straight its clips are."""

import os
from collections.abc import Callable
from pathlib import Path

from ..metrics.scale_profile import ScaleProfile, scale_profile
from .clips import straightness_scores
from .factors import ceiling
from .latents import Latents, encode
from .run import Run, open_run
from .scores import baseline_scores, bound_scores, known_factors, latent_scores, profile_scores, training_scores
from .table import Evaluated, tables

__all__ = ["Evaluated", "Latents", "Run", "encode", "evaluate", "known_factors", "open_run", "profile", "score", "tables"]

PROFILE_IMAGES = 1024  # that information and calibration over noise levels are taken from
LEVELS = 15


def profile(run: Run, progress: Callable[[int], object] | None = None) -> ScaleProfile | None:
    """Information and calibration over the run's noise levels; None of a deterministic encoder, which has no density."""
    if run.model.deterministic or run.count < 2:
        return None
    schedule = run.model.schedule
    step = (schedule.logsnr_max - schedule.logsnr_min) / (LEVELS - 1)
    return scale_profile(
        run.model,
        run.images,
        min(PROFILE_IMAGES, run.count),
        logsnr=[schedule.logsnr_min + step * level for level in range(LEVELS)],
        seed=run.config.seed,
        batch_size=run.batch_size,
        progress=progress,
    )


def score(run: Run, latents: Latents, measured: ScaleProfile | None, *, jobs: int = 1) -> dict:
    """Every number of a run but those of its clips and baselines: plain numbers, lists and dicts, flat where they can be."""
    scores = training_scores(run) | bound_scores(run) | latent_scores(run, latents, jobs=jobs) | profile_scores(measured)
    factors, *_ = known_factors(run)
    return scores | ({"mig_ceiling": ceiling(factors)} if "mig" in scores else {})


def evaluate(
    folder: str | os.PathLike[str],
    *,
    images: int | None = None,
    jobs: int = 1,
    baselines: bool = True,
    say: Callable[[str], object] = lambda stage: None,
) -> Evaluated:
    """Open a run and score it.

    Args:
        folder: The run's.
        images: Evaluation images, at most as many as there are; as the run's config says when None.
        jobs: Processes for the metrics that grow trees.
        baselines: Also score the untrained encoder, principal components and pixels.
        say: Told what is being done.
    Raises:
        UserError: not a run folder, no model in it yet, no log, or data gone.
    """
    say("reading")
    run = open_run(Path(folder), images)
    say("encoding")
    latents = encode(run, run.model)
    say("noise levels")
    measured = profile(run)
    say("factors and bound")
    scores = score(run, latents, measured, jobs=jobs)
    say("clips")
    straightness = straightness_scores(run, latents, baselines=baselines)
    others = {}
    if baselines:
        say("baselines")
        others = baseline_scores(run, jobs=jobs)
    return Evaluated(str(folder), run.config, scores, others, straightness)
