"""A report of a run: scores as JSON, pictures as PNG and SVG, and one HTML page to play with. Runs side by side, on one page."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from ..environment import cores
from ..errors import UserError
from ..evaluation import Latents, Run, encode, known_factors, open_run, profile, score
from ..evaluation.factors import factor_correlations
from ..evaluation.latents import make_baselines, untrained
from ..evaluation.scores import baseline_scores, latent_scores, plain
from ..evaluation.table import Scores
from ..files import parse_json, write_whole
from ..latents.axes import Axes
from ..latents.discovery import Discovered
from ..methods.latent_model import LatentModel
from ..metrics.scale_profile import ScaleProfile
from .cards import cards_and_gallery, frames, latent_names, sheet_of
from .charts import calibration, correlations, guidance, information, latents_against_factors, literal, scatter_fits, svg, training_curves
from .discoveries import axis_scores, discoveries
from .motion import Clips, clip_scores, curvatures, read_clips, trajectories
from .page import View, render, render_comparison
from .strips import Traversal, axis_strips, central_image, png, reconstructions, samples, strips, traversal_strips, traversals

__all__ = ["write_comparison", "write_report"]

NAMES = "axes.npz"  # of a run folder: axes that give their names to the latents they run along


def _write(file: Path, content: bytes) -> None:
    try:
        write_whole(file, lambda stream: stream.write(content))
    except OSError as error:
        raise UserError(f"{file}: cannot write the report ({error})") from None


def _charts(
    run: Run,
    latents: Latents,
    factors: np.ndarray,  # [N, F], F may be 0
    names: tuple[str, ...],
    measured: ScaleProfile | None,
    clips: Clips | None,
    scores: Scores,
) -> dict[str, Figure]:
    """What the run has to show, by the names of templates/figures.html."""
    figures = {"training": training_curves(run, latents)}
    if len(latents.live):
        if names:
            strength = factor_correlations(latents.z, factors, names, run.evaluation.periods)
            names = tuple(map(literal, names))
            figures["correlations"] = correlations(latents, strength, names)
            if scatter_fits(latents, names):
                figures["latents"] = latents_against_factors(latents, factors, strength, names)
        if measured is not None:
            x_0 = run.images(torch.tensor([central_image(latents)]))
            figures |= {"information": information(measured, latents, x_0), "calibration": calibration(measured, latents)}
    if scores.get("gain_by_level") and len(latents.live):
        keys = ("gain_logsnr", "gain_by_level", "gain_of_another_by_level", "zscore_square_by_level")
        figures["guidance"] = guidance(*(np.array(scores[key], dtype=float) for key in keys))
    if clips is not None and len(latents.live) > 1:
        figures["trajectories"] = trajectories(clips, latents)
    if clips is not None and np.isfinite(clips.curvature).any():
        figures["curvature"] = curvatures(clips)
    return figures


def _named(run: Run, axes: str | os.PathLike[str] | None) -> dict[int, str]:
    """Names of latents: of the file of axes that was given, or of the run's own where it has one."""
    file, size = Path(axes) if axes is not None else run.folder / NAMES, run.model.latent_size
    if axes is None and not file.is_file():
        return {}
    named = Axes.load(file)
    if axes is not None and len(named.center) != size:
        raise UserError(f"{file}: expected axes of {size} latent dimensions, found {len(named.center)}")
    return latent_names(named, size)


def _view(
    run: Run, latents: Latents, measured: ScaleProfile | None, scores: Scores, names: dict[int, str], prefix: str = ""
) -> tuple[View, list[Traversal]]:
    """What one plays with, without charts."""
    moved = traversals(run, latents) if len(latents.live) else []
    cards, gallery = cards_and_gallery(run, latents, measured, moved, names)
    rows = {"reconstructions": reconstructions(run)}
    sheets = {name: sheet_of(strip) for name, strip in rows.items()}
    if moved:
        sheets["frames"] = frames(moved)
    if gallery:
        sheets["images"] = gallery.thumbnails
    return View(run, scores, known_factors(run)[1], cards, gallery, rows, sheets, prefix=prefix), moved


def _scores(
    run: Run, latents: Latents, measured: ScaleProfile | None, found: dict[str, Discovered], clips: Clips | None, jobs: int | None
) -> Scores:
    """Everything that metrics.json holds."""
    scores = score(run, latents, measured, jobs=jobs or cores())
    if known_factors(run)[1]:
        scores |= plain(baseline_scores(run, make_baselines(run), quick=True))
    else:  # nothing of principal components and pixels could be scored
        scores["untrained"] = latent_scores(run, encode(run, untrained(run)), quick=True)
    if found:
        recovered, recovered_names, _ = known_factors(run, attributes=False)
        scores["axes"] = axis_scores(found, latents, recovered, recovered_names, run.evaluation.periods)
    return scores | (clip_scores(clips) if clips is not None else {})


def write_report(
    run_folder: str | os.PathLike[str],
    *,
    trust_remote_code: bool = False,
    model: LatentModel | None = None,
    dataset: Any = None,
    device: torch.device | str | None = None,
    axes: str | os.PathLike[str] | None = None,
    jobs: int | None = None,
) -> Path:
    """Score a finished run and write its report/ folder.

    report/ then holds index.html (one page that needs nothing else), metrics.json (every number of it), rows of images as .png and charts
    as .svg; an earlier report is replaced. The same run on the same machine gives the same scores.

    Args:
        run_folder: With config.yaml, environment.json, metrics.jsonl and model/.
        trust_remote_code: Whether classes that its model names may be imported, which runs their code.
        model, dataset, device: As in `open_run`.
        axes: A file of axes (`Axes.save`) whose names the latents get, where an axis runs along one; when None, axes.npz of the run folder
            if there is one.
        jobs: Processes for the metrics that grow trees; as many as there are cores when None.
    Returns:
        Path of report/index.html.
    Raises:
        UserError: not a run folder, no model in it yet, no log, data gone, no file of axes or of other latents, or the disk refuses.
    """
    run = open_run(Path(run_folder), trust_remote_code=trust_remote_code, model=model, dataset=dataset, device=device)
    named = _named(run, axes)
    latents = encode(run, run.model)
    factors, names, _ = known_factors(run)
    measured = profile(run)
    found, clips = discoveries(run, latents), read_clips(run)
    scores = _scores(run, latents, measured, found, clips, jobs)
    view, moved = _view(run, latents, measured, scores, named)
    view.rows["samples"] = samples(run, latents)
    if "scale" in found:
        view.rows["axes"] = axis_strips(run, found["scale"], latents)
    view.sheets.update({name: sheet_of(rows) for name, rows in view.rows.items() if name not in view.sheets})
    view.charts.update({name: svg(figure) for name, figure in _charts(run, latents, factors, names, measured, clips, scores).items()})
    drawn = view.rows | ({"traversals": traversal_strips(moved, latents)} if moved else {})

    folder = run.folder / "report"
    try:
        folder.mkdir(exist_ok=True)
        for stale in (*folder.glob("*.png"), *folder.glob("*.svg")):
            stale.unlink()
    except OSError as error:
        raise UserError(f"{folder}: cannot write the report ({error})") from None
    for name, rows in drawn.items():
        _write(folder / f"{name}.png", png(strips(rows)))
    for name, chart in view.charts.items():
        _write(folder / f"{name}.svg", chart.encode())
    _write(folder / "metrics.json", (json.dumps(scores, indent=2) + "\n").encode())
    _write(folder / "index.html", render(view).encode(errors="backslashreplace"))
    return folder / "index.html"


def _kept_scores(run: Run) -> Scores | None:
    """Those of the run's report, if it was written after its last step, by code that measures what is shown now."""
    file = run.folder / "report" / "metrics.json"
    try:
        scores = parse_json(file.read_text())
        newer = file.stat().st_mtime >= (run.folder / "model" / "model.safetensors").stat().st_mtime
    except (OSError, ValueError):
        return None
    known = isinstance(scores, dict) and {"steps", "num_images", "active_dims", "kl_nats"} <= scores.keys()
    known = known and (run.model.deterministic or isinstance(scores.get("health"), dict))
    known = known and (isinstance(scores.get("pca"), dict) or not known_factors(run)[1])
    return scores if known and newer and scores["steps"] == run.log[-1]["step"] and scores["num_images"] == run.count else None


def write_comparison(
    run_folders: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    trust_remote_code: bool = False,
    device: torch.device | str | None = None,
    jobs: int | None = None,
) -> Path:
    """Runs side by side on one page: how they are doing, their scores, what their latents do.

    Scores come from the runs' reports where these are newer than their models, and are measured otherwise.

    Args:
        run_folders: Two or more, as in `write_report`.
        output: The page, one HTML file that needs nothing else; replaced.
        trust_remote_code, device, jobs: As in `write_report`.
    Returns:
        `output`.
    Raises:
        UserError: as `write_report`.
    """
    runs = [open_run(Path(folder), trust_remote_code=trust_remote_code, device=device) for folder in run_folders]
    views = []
    for place, run in enumerate(runs):
        latents, measured = encode(run, run.model), profile(run)
        scores = _kept_scores(run) or _scores(run, latents, measured, {}, None, jobs)
        views.append(_view(run, latents, measured, scores, _named(run, None), prefix=f"r{place}-")[0])
    _write(Path(output), render_comparison(views).encode(errors="backslashreplace"))
    return Path(output)
