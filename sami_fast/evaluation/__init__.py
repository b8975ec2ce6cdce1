"""A finished run, scored: what its latents hold, what they cost, at which noise levels, how straight its clips are."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ..methods.sami import Sami
from ..metrics.guidance import GuidanceProfile, guidance_profile
from ..metrics.scale_profile import ScaleProfile, scale_profile
from .clips import representations, straightness_scores
from .factors import ceiling
from .health import Health
from .latents import Latents, encode, make_baselines
from .run import Run, evenly, open_run
from .scores import (
    baseline_scores,
    bound_scores,
    guidance_scores,
    health_of,
    known_factors,
    latent_scores,
    pixel_scores,
    plain,
    profile_scores,
    training_scores,
)
from .table import Evaluated, tables

__all__ = [
    "Evaluated",
    "Health",
    "Latents",
    "Run",
    "encode",
    "evaluate",
    "evaluate_run",
    "known_factors",
    "num_stages",
    "open_run",
    "profile",
    "score",
    "tables",
]

Say = Callable[[str], object]
PROFILE_IMAGES = 1024  # that information and calibration over noise levels are taken from
GUIDANCE_IMAGES = 256  # that the gain of guidance is taken from, which runs the denoiser too
LEVELS = 15


def _over_levels(run: Run) -> dict[str, Any]:
    """Arguments of what is measured over noise levels."""
    schedule = run.model.schedule
    step = (schedule.logsnr_max - schedule.logsnr_min) / (LEVELS - 1)
    levels = [schedule.logsnr_min + step * level for level in range(LEVELS)]
    return {"logsnr": levels, "seed": run.config.seed, "batch_size": run.batch_size}


def _some(run: Run, most: int) -> tuple[Callable[[Tensor], Tensor], int]:
    """At most so many of the evaluation images, spread over all: frames of videos stand in their order."""
    some = evenly(run.count, most)
    return lambda index: run.images(some[index]), len(some)


def profile(run: Run) -> ScaleProfile | None:
    """Information and calibration over the run's noise levels; None of a deterministic encoder, which has no density."""
    if run.model.deterministic or run.count < 2:
        return None
    return scale_profile(run.model, *_some(run, PROFILE_IMAGES), **_over_levels(run))


def guidance(run: Run) -> GuidanceProfile | None:
    """What guidance is worth over the run's noise levels; None of methods that do not guide."""
    if not isinstance(run.model, Sami) or run.count < 2:
        return None
    return guidance_profile(run.model, *_some(run, GUIDANCE_IMAGES), **_over_levels(run))


def score(run: Run, latents: Latents, measured: ScaleProfile | None, *, jobs: int = 1, say: Say = lambda stage: None) -> dict:
    """Every number of a run but those of its clips and baselines: plain numbers, lists and dicts, flat where they can be."""
    say("bound")
    scores = training_scores(run) | bound_scores(run) | profile_scores(measured)
    say("factors")
    scores |= latent_scores(run, latents, jobs=jobs) | pixel_scores(run)
    guided = guidance(run)
    scores |= guidance_scores(guided, scores) | health_of(run, latents, guided, scores)
    factors, *_ = known_factors(run, attributes=False)
    return plain(scores | ({"mig_ceiling": ceiling(factors)} if "mig" in scores else {}))


def num_stages(baselines: bool) -> int:
    """How often `evaluate_run` says what it does."""
    return 5 + (3 if baselines else 0)


def evaluate(
    folder: str | os.PathLike[str], *, images: int | None = None, jobs: int = 1, baselines: bool = True, trust_remote_code: bool = False
) -> Evaluated:
    """Open a run and score it.

    Args:
        folder: The run's.
        images: Evaluation images, at most as many as there are; as the run's config says when None.
        jobs, baselines: As in `evaluate_run`.
        trust_remote_code: As in `open_run`.
    Raises:
        UserError: not a run folder, no model in it yet, no log, or data gone.
    """
    return evaluate_run(open_run(Path(folder), images, trust_remote_code=trust_remote_code), jobs=jobs, baselines=baselines)


def evaluate_run(run: Run, *, jobs: int = 1, baselines: bool = True, say: Say = lambda stage: None) -> Evaluated:
    """Score an open run.

    Args:
        run: The run.
        jobs: Processes for the metrics that grow trees.
        baselines: Also score the untrained encoder, principal components and pixels.
        say: Told what is being done: `num_stages` times.
    """
    say("encoding")
    latents = encode(run, run.model)
    say("noise levels")
    measured = profile(run)
    scores = score(run, latents, measured, jobs=jobs, say=say)
    say("clips")
    others = make_baselines(run) if baselines else None
    straightness = plain(straightness_scores(run, representations(run, latents, others)))
    beside = plain(baseline_scores(run, others, jobs=jobs, say=say)) if others else {}
    return Evaluated(str(run.folder), run.config, scores, beside, straightness)
