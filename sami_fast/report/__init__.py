"""A report of a run: scores as JSON, pictures as PNG, and one HTML page that shows both."""

import json
import os
from pathlib import Path

from ..errors import UserError
from ..evaluation import encode, known_factors, open_run, profile, score
from ..evaluation.latents import untrained
from ..evaluation.scores import latent_scores
from ..files import write_whole
from .discoveries import axis_scores, discoveries
from .figures import make_figures
from .motion import clip_scores, read_clips
from .page import render

__all__ = ["write_report"]


def _write(file: Path, content: bytes) -> None:
    try:
        write_whole(file, lambda stream: stream.write(content))
    except OSError as error:
        raise UserError(f"{file}: cannot write the report ({error})") from None


def write_report(run_folder: str | os.PathLike[str]) -> Path:
    """Score a finished run and write its report/ folder.

    report/ then holds index.html (one page that needs nothing else), metrics.json (every number of it) and the pictures as .png; an
    earlier report is replaced. The same run on the same machine gives the same scores.

    Args:
        run_folder: With config.yaml, environment.json, metrics.jsonl and model/.
    Returns:
        Path of report/index.html.
    Raises:
        UserError: not a run folder, no model in it yet, no log, data gone, or the disk refuses.
    """
    run = open_run(Path(run_folder))
    latents = encode(run, run.model)
    factors, names, _ = known_factors(run)
    measured = profile(run)
    scores = score(run, latents, measured, jobs=os.cpu_count() or 1)
    scores["untrained"] = latent_scores(run, encode(run, untrained(run)), quick=True)
    found, clips = discoveries(run, latents), read_clips(run)
    if found:
        scores["axes"] = axis_scores(found, latents, factors, names if "mcc" in scores else ())
    if clips is not None:
        scores |= clip_scores(clips)
    figures = make_figures(run, latents, factors, names, measured, found, clips)

    folder = run.folder / "report"
    try:
        folder.mkdir(exist_ok=True)
        for stale in folder.glob("*.png"):
            stale.unlink()
    except OSError as error:
        raise UserError(f"{folder}: cannot write the report ({error})") from None
    for figure in figures:
        _write(folder / f"{figure.name}.png", figure.png)
    _write(folder / "metrics.json", (json.dumps(scores, indent=2) + "\n").encode())
    _write(folder / "index.html", render(run, scores, names, figures).encode())
    return folder / "index.html"
