"""Scores of several runs side by side: a column per method, a row per number, mean and standard deviation over seeds."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any

from ..config import Config
from ..methods.card import BASELINES
from ..metrics.latents import live_dims
from .health import Health

Scores = dict[str, Any]
NOT_THE_METHOD = ("seed", "name", "runs_dir", "log", "checkpoint", "report", "engine")  # settings in which runs of one column may differ


@dataclass(frozen=True)
class Evaluated:
    """A run's settings and scores."""

    folder: str
    config: Config
    scores: Scores  # of the run
    baselines: dict[str, Scores]  # by name; empty where another run on the same images has them
    straightness: dict[str, Scores]  # by representation; empty without clips


def mean_of(by_factor: dict[str, float] | None) -> float | None:
    """The mean over factors; None where there is none."""
    return mean(by_factor.values()) if by_factor else None


def lines(scores: Scores) -> list[tuple[str, Callable[[Scores], Any], int]]:
    """Every number that runs are compared by: label, how to read it, and digits. Factors are those of these scores."""
    factors = list(scores.get("linear_r2", {}))

    def of(key: str) -> Callable[[Scores], Any]:
        return lambda s: s.get(key)

    def of_factor(key: str, factor: str) -> Callable[[Scores], Any]:
        return lambda s: s[key][factor] if s.get(key) else None

    return [
        ("linear R2, mean over factors", lambda s: mean_of(s.get("linear_r2")), 3),
        *((f"linear R2 {factor}", of_factor("linear_r2", factor), 3) for factor in factors),
        ("linear R2 from means, mean over factors", lambda s: mean_of(s.get("linear_r2_mu")), 3),
        ("nonlinear R2, mean over factors", lambda s: mean_of(s.get("nonlinear_r2")), 3),
        ("MCC, rank correlation", of("mcc"), 3),
        *((f"MCC {factor}", of_factor("mcc_per_factor", factor), 3) for factor in factors),
        ("MCC, Pearson", of("mcc_pearson"), 3),
        ("MIG", of("mig"), 3),
        ("MIG, ceiling", of("mig_ceiling"), 3),
        ("DCI disentanglement", of("dci_d"), 3),
        ("DCI completeness", of("dci_c"), 3),
        ("DCI informativeness, accuracy", of("dci_i"), 3),
        ("SAP, continuous", of("sap"), 3),
        ("FactorVAE score", of("factor_vae"), 3),
        ("BetaVAE score", of("beta_vae"), 3),
        ("modularity", of("modularity"), 3),
        ("explicitness", of("explicitness"), 3),
        ("IRS", of("irs"), 3),
        ("TAD, NashAE protocol", of("tad_nashae"), 3),
        ("attributes captured, NashAE protocol", of("attributes_captured_nashae"), 1),
        ("TAD, InfoDiffusion protocol", of("tad_infodiffusion"), 3),
        ("attributes captured, InfoDiffusion protocol", of("attributes_captured_infodiffusion"), 1),
        ("latent quality, AUROC", of("latent_quality"), 3),
        ("linear R2 of all pixels", of("pixel_r2"), 3),
        ("total correlation, nats", of("total_correlation"), 2),
        ("live dimensions", of("active_dims"), 1),
        ("information, sum over dimensions, nats", of("information_sum_nats"), 2),
        ("KL, nats", of("kl_nats"), 2),
        ("gain of guidance, nats", of("gain_nats"), 2),
        ("gain of guidance per nat of KL", of("gain_per_kl"), 3),
        ("diffusion term, nats", of("diffusion_nats"), 1),
        ("endpoint at logsnr_min, nats", of("prior_nats"), 2),
        ("endpoint at logsnr_max, nats", of("reconstruction_nats"), 1),
        ("negative ELBO, nats", of("elbo_nats"), 1),
        ("negative ELBO, bits per dimension", of("bits_per_dim"), 3),
        ("training, last stage, minutes", lambda s: s["wall_seconds"] / 60 if "wall_seconds" in s else None, 1),
        ("training, all stages, CPU minutes", lambda s: s["cpu_seconds"] / 60 if "cpu_seconds" in s else None, 1),  # of benchmarks
    ]


def spread(values: Sequence[float | None], digits: int) -> str:
    """Mean and, of several, standard deviation; empty where a value is missing."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return ""
    text = f"{mean(known):.{digits}f}"
    return f"{text} ± {stdev(known):.{digits}f}" if len(known) > 1 else text


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that also lines up as plain text."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def _key(config: Config, without: Sequence[str]) -> str:
    return json.dumps({name: value for name, value in asdict(config).items() if name not in without}, sort_keys=True, default=str)


def _grouped(runs: Sequence[Evaluated]) -> dict[str, list[Evaluated]]:
    """Runs that differ by their seed alone, under their method's name, or their own where a method is there twice."""
    groups: dict[str, list[Evaluated]] = {}
    for run in runs:
        groups.setdefault(_key(run.config, NOT_THE_METHOD), []).append(run)
    methods = [group[0].config.method for group in groups.values()]
    names = [group[0].config.name for group in groups.values()]
    labels = {}
    for method, name, group in zip(methods, names, groups.values(), strict=True):
        own = name if name.startswith(method) else f"{method} {name}"
        label = method if methods.count(method) == 1 else own
        labels[label if names.count(name) == 1 or label == method else f"{method} {group[0].folder}"] = group
    return labels


def tables(runs: Sequence[Evaluated], axes: bool = True) -> str:
    """Markdown: for each dataset a table of scores, with `axes` each run's live axes, and, where there are clips, their straightness."""
    datasets: dict[str, list[Evaluated]] = {}
    for run in runs:
        datasets.setdefault(json.dumps(asdict(run.config.data), sort_keys=True, default=str), []).append(run)
    return "\n\n".join(_dataset_table(same, axes) for same in datasets.values())


def _baselines(runs: Sequence[Evaluated]) -> dict[str, tuple[str, list[Evaluated]]]:
    """By label, the key and the runs that hold a baseline's scores; runs of another encoder, and so of another Z, have their own."""
    encoders = {json.dumps(asdict(run.config.encoder)): run for run in runs if run.baselines}
    found = {}
    for key, label in BASELINES.items():
        for encoder, first in encoders.items():
            name = label if len(encoders) == 1 else f"{label} ({first.config.name})"
            found[name] = key, [run for run in runs if run.baselines and json.dumps(asdict(run.config.encoder)) == encoder]
    return found


def _axes_table(run: Evaluated) -> str:
    """Of a run with rates and noise levels: its live axes, the most informative first."""
    scores = run.scores
    if not scores.get("information_per_dim") or "calibration_std" not in scores:
        return ""
    rows = []
    information = scores["information_per_dim"]
    for d in live_dims(information):
        spreads = scores["calibration_std"][d]
        numbers = (
            information[d],
            scores["kl_per_dim"][d],
            scores["one_nat_logsnr"][d],
            scores["characteristic_logsnr"][d],
            min(spreads),
            max(spreads),
        )
        rows.append([f"z{d}", *("" if number is None else f"{number:.2f}" for number in numbers)])
    header = [
        "axis",
        "information, nats",
        "KL, nats",
        "logsnr at one nat",
        "logsnr at half its information",
        "least spread of errors",
        "largest",
    ]
    return f"{run.config.name}: live axes. Spread of errors over noise levels: 1 is calibrated.\n\n{markdown(header, rows)}" if rows else ""


def _health_lines(runs: Sequence[Evaluated]) -> str:
    """A line per run whose health is known."""
    return "\n".join(f"- {run.config.name}: {Health(**run.scores['health'])}" for run in runs if run.scores.get("health"))


def _dataset_table(runs: Sequence[Evaluated], axes: bool) -> str:
    groups = {name: [run.scores for run in group] for name, group in _grouped(runs).items()}
    for label, (key, owners) in _baselines(runs).items():
        groups[label] = [run.baselines[key] for run in owners]
    rows = []
    for label, read, digits in lines(runs[0].scores):
        cells = [spread([read(scores) for scores in group], digits) for group in groups.values()]
        if any(cells):
            rows.append([label, *cells])
    first = runs[0]
    seeds = [f"{name}: {len(group)}" for name, group in _grouped(runs).items()]
    images = ", ".join(sorted({str(run.scores["num_images"]) for run in runs}))
    title = f"Data: {first.config.data.kind}, {images} evaluation images. Seeds: {', '.join(seeds)}. Mean ± standard deviation over seeds."
    parts = [title, markdown(["", *groups], rows), _health_lines(runs), *(map(_axes_table, runs) if axes else ())]
    parts = list(filter(None, parts))
    if any(run.straightness for run in runs):
        parts.append(_straightness_table(runs))
    return "\n\n".join(parts)


def _straightness_table(runs: Sequence[Evaluated]) -> str:
    """A row per representation: the runs' own latents, then what they are compared with."""
    rows: dict[str, list[Scores]] = {}
    for name, group in _grouped(runs).items():
        rows[name] = [run.straightness["latents"] for run in group if run.straightness]
    for label, (key, owners) in _baselines(runs).items():
        rows[label] = [run.straightness[key] for run in owners if key in run.straightness]
    columns = [
        ("curvature, degrees", "curvature", 1),
        ("95 % over clips", "curvature", None),
        ("minus pixels'", "delta_curvature", 1),
        ("cosine", "cosine", 3),
        ("path ratio", "path_ratio", 3),
        ("standardised codes: curvature", "standardized_curvature", 1),
        ("95 % over clips ", "standardized_curvature", None),
        ("cosine ", "standardized_cosine", 3),
        ("skipped steps", "skipped_steps", 0),
    ]
    cells = []
    for label, found in rows.items():
        if not found:
            continue
        row = [label]
        for _, key, digits in columns:
            if digits is None:
                ends = [spread([s.get(f"{key}_{end}") for s in found], 1).partition(" ")[0] for end in ("low", "high")]
                row.append(" to ".join(ends) if all(ends) else "")
            else:
                row.append(spread([s.get(key) for s in found], digits))
        cells.append(row)
    clips = next(run.straightness["latents"] for run in runs if run.straightness)
    note = f"Straightness of {clips['clips']} clips of {clips['frames']} frames; smaller curvature and larger cosine are straighter. "
    note += "Intervals over clips are those of a run, averaged over seeds."
    return note + "\n\n" + markdown(["", *(column[0] for column in columns)], cells)
