"""Curves of a run, and its latents against the factors."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..metrics.identifiability import correlation_matrix
from ..metrics.latents import LIVE_NATS
from .scores import Latents

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#5A5A5A")
INK, SOFT, FAINT = "#333333", "#777777", "#C4C4C4"
DPI = 200  # twice what the page shows, for sharp screens
RHO = "\N{GREEK SMALL LETTER RHO}"
SCATTER_POINTS = 1500
MAX_AXES = 12  # live dimensions that get a row of a figure
LEGEND_ENTRIES = 10


def colour(rank: int) -> str:
    """Of the live dimension with this place in the order of KL: the same in every figure."""
    return COLOURS[rank % len(COLOURS)]


def _figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches, with a margin around everything that is drawn."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    return figure


def _tidy(axes: Axes, title: str, ylabel: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_ylabel(ylabel, fontsize=8.5, color=INK)
    axes.tick_params(labelsize=8, colors=INK, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.grid(color="#EEEEEE", linewidth=0.8)
    axes.set_axisbelow(True)


def training_curves(log: Sequence[dict[str, Any]], live: np.ndarray, first_joint_step: int) -> Figure:
    """Denoising error, KL of every latent dimension and beta over the steps.

    Args:
        log: Rows of the training log, oldest first.
        live: Live dimensions at the end, most informative first: these get colours.
        first_joint_step: Where the encoder starts to learn; its KL is not shown before.
    """
    figure = _figure(10.5, 3.2)
    errors, rates, weights = figure.subplots(1, 3, width_ratios=(1, 1.15, 0.75))
    joint = [row for row in log if row["step"] > first_joint_step]

    steps = [row["step"] for row in log]
    errors.plot(steps, [row["unguided_nats"] for row in log], color="#9A9A9A", linewidth=1.3, label="without z")
    joint_steps = [row["step"] for row in joint]
    errors.plot(joint_steps, [row["diffusion_nats"] for row in joint], color=colour(0), linewidth=1.5, label="guided by z")
    errors.set_yscale("log")
    errors.legend(frameon=False, fontsize=8)
    _tidy(errors, "Denoising error", "nats per image")

    if joint:
        kl = np.array([row["kl_per_dim"] for row in joint]).clip(min=1e-4)  # [rows, Z]; a log axis has no 0
        dead = [d for d in range(kl.shape[1]) if d not in live]
        for place, d in enumerate(dead):
            rates.plot(joint_steps, kl[:, d], color=FAINT, linewidth=0.9, label="dead" if place == 0 else None)
        for rank, d in enumerate(live):
            rates.plot(joint_steps, kl[:, d], color=colour(rank), linewidth=1.5, label=f"z{d}" if rank < LEGEND_ENTRIES else None)
        weights.plot(joint_steps, [row["kl_weight"] for row in joint], color=INK, linewidth=1.5)
    rates.axhline(LIVE_NATS, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    rates.text(0.99, LIVE_NATS * 1.1, f"live above {LIVE_NATS:g}", transform=rates.get_yaxis_transform(), ha="right", fontsize=7, color=INK)
    rates.set_yscale("log")
    if joint:
        rates.legend(frameon=False, fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1, 0.0))
    _tidy(rates, "KL of each latent dimension", "nats")

    weights.set_ylim(bottom=0)
    _tidy(weights, "Weight of the KL term", "β")
    for axes in (errors, rates, weights):
        axes.set_xlim(0, steps[-1])
        axes.set_xlabel("step", fontsize=8.5, color=INK)
        if first_joint_step:
            axes.axvspan(0, first_joint_step, color="#F4F4F4", zorder=0)
    if first_joint_step:
        place = {"transform": errors.get_xaxis_transform(), "ha": "center"}
        errors.text(first_joint_step / 2, 0.04, "denoiser\nalone", fontsize=7, color=SOFT, **place)
    return figure


def latents_against_factors(latents: Latents, factors: np.ndarray, names: Sequence[str]) -> Figure:
    """One sampled latent per image against each factor, a row per live dimension.

    Args:
        latents: With at least one live dimension.
        factors: [N, F], F >= 1.
        names: Of the factors.
    """
    rows = latents.live[:MAX_AXES]
    shown = slice(0, SCATTER_POINTS)
    correlation = correlation_matrix(latents.z[:, rows], factors)  # [F, L]
    figure = _figure(0.8 + 2.1 * len(names), 0.6 + 1.7 * len(rows))
    grid = figure.subplots(len(rows), len(names), squeeze=False, sharex="col", sharey="row")
    for rank, dim in enumerate(rows):
        for column, name in enumerate(names):
            axes, strength = grid[rank, column], correlation[column, rank]
            axes.scatter(factors[shown, column], latents.z[shown, dim], s=2.5, alpha=0.35, color=colour(rank), linewidths=0)
            _tidy(axes, "", f"z{dim}" if column == 0 else "")
            weight = "bold" if strength > 0.5 else "normal"
            axes.set_title(f"|{RHO}| {strength:.2f}", loc="right", fontsize=8, fontweight=weight, color=INK, pad=2)
            if rank == len(rows) - 1:
                axes.set_xlabel(name, fontsize=9.5, color=INK)
    return figure
