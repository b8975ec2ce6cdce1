"""A report of a run: scores as JSON, pictures as PNG, and one HTML page that shows both."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from ..environment import cores
from ..errors import UserError
from ..evaluation import Latents, Run, encode, known_factors, open_run, profile, score
from ..evaluation.latents import untrained
from ..evaluation.scores import latent_scores
from ..evaluation.table import Scores
from ..files import write_whole
from ..latents.discovery import Discovered
from ..methods.latent_model import LatentModel
from ..metrics.scale_profile import ScaleProfile
from .charts import calibration, correlations, guidance, information, latents_against_factors, scatter_fits, training_curves
from .discoveries import axis_scores, discoveries
from .motion import Clips, clip_scores, curvatures, read_clips, trajectories
from .page import render
from .strips import axis_strips, central_image, png, reconstructions, samples, traversals

__all__ = ["write_report"]


def _write(file: Path, content: bytes) -> None:
    try:
        write_whole(file, lambda stream: stream.write(content))
    except OSError as error:
        raise UserError(f"{file}: cannot write the report ({error})") from None


def _figures(
    run: Run,
    latents: Latents,
    factors: np.ndarray,  # [N, F], F may be 0
    names: tuple[str, ...],
    measured: ScaleProfile | None,
    found: dict[str, Discovered],
    clips: Clips | None,
    scores: Scores,
) -> dict[str, Figure]:
    """What the run has to show, by the names of templates/figures.html."""
    figures = {"reconstructions": reconstructions(run), "samples": samples(run, latents), "training": training_curves(run, latents)}
    if len(latents.live):
        figures["traversals"] = traversals(run, latents)
        if names:
            figures["correlations"] = correlations(latents, factors, names)
            if scatter_fits(latents, names):
                figures["latents"] = latents_against_factors(latents, factors, names)
        if measured is not None:
            x_0 = run.images(torch.tensor([central_image(latents)]))
            figures |= {"information": information(measured, latents, x_0), "calibration": calibration(measured, latents)}
    if scores.get("gain_by_level") and len(latents.live):
        keys = ("gain_logsnr", "gain_by_level", "gain_of_another_by_level", "zscore_square_by_level")
        figures["guidance"] = guidance(*(np.array(scores[key], dtype=float) for key in keys))
    if "scale" in found:
        figures["axes"] = axis_strips(run, found["scale"], latents)
    if clips is not None and len(latents.live) > 1:
        figures["trajectories"] = trajectories(clips, latents)
    if clips is not None and np.isfinite(clips.curvature).any():
        figures["curvature"] = curvatures(clips)
    return figures


def write_report(
    run_folder: str | os.PathLike[str],
    *,
    trust_remote_code: bool = False,
    model: LatentModel | None = None,
    dataset: Any = None,
    device: torch.device | str | None = None,
) -> Path:
    """Score a finished run and write its report/ folder.

    report/ then holds index.html (one page that needs nothing else), metrics.json (every number of it) and the pictures as .png; an
    earlier report is replaced. The same run on the same machine gives the same scores.

    Args:
        run_folder: With config.yaml, environment.json, metrics.jsonl and model/.
        trust_remote_code: Whether classes that its model names may be imported, which runs their code.
        model, dataset, device: As in `open_run`.
    Returns:
        Path of report/index.html.
    Raises:
        UserError: not a run folder, no model in it yet, no log, data gone, or the disk refuses.
    """
    run = open_run(Path(run_folder), trust_remote_code=trust_remote_code, model=model, dataset=dataset, device=device)
    latents = encode(run, run.model)
    factors, names, _ = known_factors(run)
    measured = profile(run)
    scores = score(run, latents, measured, jobs=cores())
    scores["untrained"] = latent_scores(run, encode(run, untrained(run)), quick=True)
    found, clips = discoveries(run, latents), read_clips(run)
    if found:
        recovered, recovered_names, _ = known_factors(run, attributes=False)
        scores["axes"] = axis_scores(found, latents, recovered, recovered_names)
    if clips is not None:
        scores |= clip_scores(clips)
    figures = _figures(run, latents, factors, names, measured, found, clips, scores)
    pictures = {name: png(figure) for name, figure in figures.items()}

    folder = run.folder / "report"
    try:
        folder.mkdir(exist_ok=True)
        for stale in folder.glob("*.png"):
            stale.unlink()
    except OSError as error:
        raise UserError(f"{folder}: cannot write the report ({error})") from None
    for name, picture in pictures.items():
        _write(folder / f"{name}.png", picture)
    _write(folder / "metrics.json", (json.dumps(scores, indent=2) + "\n").encode())
    _write(folder / "index.html", render(run, scores, names, pictures).encode())
    return folder / "index.html"
