"""Curves of a run, and its latents against the factors."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..evaluation import Latents
from ..metrics.identifiability import correlation_matrix
from ..metrics.latents import LIVE_NATS

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#5A5A5A")
INK, SOFT, FAINT = "#333333", "#777777", "#C4C4C4"
DASHED = (0, (4, 3))
DPI = 200  # twice what the page shows, for sharp screens
RHO = "\N{GREEK SMALL LETTER RHO}"
SCATTER_POINTS = 1500
SCATTER_PANELS = 24  # with more, the matrix of correlations says it all
MAX_AXES = 12  # live dimensions that get a row or a curve of a figure
MATRIX_ROWS = 32
CELL_NUMBERS = 160  # cells of a matrix that are few enough to write into
LEGEND_ENTRIES = 10

# Of the loss, by method: entry of the log, label. The last is what the method minimises beside the KL.
ERRORS = {
    "sami": {"unguided_nats": "without z", "diffusion_nats": "guided by z"},
    "diffae": {"diffusion_nats": "denoising, told z"},
    "beta_vae": {"reconstruction_nats": "reconstruction"},
}


def colour(rank: int) -> str:
    """Of the live dimension with this place in the order of KL: the same in every figure."""
    return COLOURS[rank % len(COLOURS)]


def line(rank: int) -> dict[str, Any]:
    """How the curve of a live dimension is drawn: once the colours are used up, dashed."""
    return {"color": colour(rank), "linewidth": 1.5, "linestyle": "-" if rank < len(COLOURS) else (0, (5, 2))}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches, with a margin around everything that is drawn."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    return figure


def tidy(axes: Axes, title: str, ylabel: str) -> None:
    """The look of every chart."""
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_ylabel(ylabel, fontsize=8.5, color=INK)
    axes.tick_params(labelsize=8, colors=INK, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.grid(color="#EEEEEE", linewidth=0.8)
    axes.set_axisbelow(True)


def training_curves(log: Sequence[dict[str, Any]], method: str, latents: Latents, first_joint_step: int) -> Figure:
    """The terms of the loss over the steps and, of an encoder with a rate, the KL of every latent dimension and beta.

    Args:
        log: Rows of the training log, oldest first.
        method: The run's.
        latents: At the end; the live dimensions get colours.
        first_joint_step: Where the encoder starts to learn; its KL is not shown before.
    """
    rated = latents.kl is not None
    figure = new_figure(10.5 if rated else 5.5, 3.2)
    panels = figure.subplots(1, 3, width_ratios=(1, 1.15, 0.75)) if rated else [figure.subplots()]
    joint = [row for row in log if row["step"] > first_joint_step]
    steps, joint_steps = [row["step"] for row in log], [row["step"] for row in joint]

    errors = panels[0]
    *others, (main, label) = ERRORS[method].items()
    for key, other in others:
        errors.plot(steps, [row[key] for row in log], color="#9A9A9A", linewidth=1.3, label=other)
    errors.plot(joint_steps, [row[main] for row in joint], color=colour(0), linewidth=1.5, label=label)
    if rated:
        errors.plot(joint_steps, [max(row["kl_nats"], 1e-4) for row in joint], color=INK, linewidth=1.1, linestyle=DASHED, label="KL of z")
    errors.set_yscale("log")
    errors.legend(frameon=False, fontsize=8)
    tidy(errors, "Terms of the loss", "nats per image")
    if rated:
        _rates(panels[1], joint, joint_steps, latents.live)
        panels[2].plot(joint_steps, [row["kl_weight"] for row in joint], color=INK, linewidth=1.5)
        panels[2].set_ylim(bottom=0)
        panels[2].locator_params(axis="x", nbins=4)
        tidy(panels[2], "Weight of the KL term", "β")
    for axes in panels:
        axes.set_xlim(0, steps[-1])
        axes.set_xlabel("step", fontsize=8.5, color=INK)
        if first_joint_step:
            axes.axvspan(0, first_joint_step, color="#F4F4F4", zorder=0)
    if first_joint_step:
        place = {"transform": errors.get_xaxis_transform(), "ha": "center"}
        errors.text(first_joint_step / 2, 0.04, "denoiser\nalone", fontsize=7, color=SOFT, **place)
    return figure


def _rates(axes: Axes, rows: Sequence[dict[str, Any]], steps: Sequence[int], live: np.ndarray) -> None:
    if rows:
        kl = np.array([row["kl_per_dim"] for row in rows]).clip(min=1e-4)  # [rows, Z]; a log axis has no 0
        dead = [d for d in range(kl.shape[1]) if d not in live]
        for place, d in enumerate(dead):
            axes.plot(steps, kl[:, d], color=FAINT, linewidth=0.9, label="dead" if place == 0 else None)
        for rank, d in enumerate(live):
            axes.plot(steps, kl[:, d], label=f"z{d}" if rank < LEGEND_ENTRIES else None, **line(rank))
        axes.legend(fontsize=8, ncols=2, loc="lower right", framealpha=0.85, edgecolor="none")
    axes.axhline(LIVE_NATS, color=INK, linewidth=0.8, linestyle=DASHED)
    axes.text(0.01, LIVE_NATS * 1.1, f"live above {LIVE_NATS:g}", transform=axes.get_yaxis_transform(), fontsize=7, color=INK)
    axes.set_yscale("log")
    tidy(axes, "KL of each latent dimension", "nats")


def correlations(latents: Latents, factors: np.ndarray, names: Sequence[str]) -> Figure:
    """|Rank correlation| of sampled latents with factors: a row per live dimension, a column per factor.

    Args:
        latents: With at least one live dimension.
        factors: [N, F], F >= 1.
        names: Of the factors.
    """
    rows = latents.live[:MATRIX_ROWS]
    matrix = correlation_matrix(latents.z[:, rows], factors).T  # [L, F]
    figure = new_figure(1.6 + max(1.6, 0.34 * len(names) if len(names) > 8 else 0.8 * len(names)), 0.9 + 0.34 * len(rows))
    axes = figure.subplots()
    shown = axes.imshow(matrix, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    slanted = {"rotation": 60, "ha": "left", "rotation_mode": "anchor"} if len(names) > 8 else {}
    axes.set_xticks(range(len(names)), names, fontsize=8.5, color=INK, **slanted)
    axes.set_yticks(range(len(rows)), [f"z{dim}" for dim in rows], fontsize=8.5)
    for rank, label in enumerate(axes.get_yticklabels()):
        label.set_color(colour(rank))
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if matrix.size <= CELL_NUMBERS:
        for (row, column), value in np.ndenumerate(matrix):
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if value > 0.55 else INK)
    bar = figure.colorbar(shown, ax=axes, shrink=0.9, ticks=(0, 0.5, 1))
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, colors=INK)
    bar.set_label(f"|{RHO}|", fontsize=8.5, color=INK)
    return figure


def scatter_fits(latents: Latents, names: Sequence[str]) -> bool:
    """Whether there are few enough pairs of latent and factor to show each by itself."""
    return min(len(latents.live), MAX_AXES) * len(names) <= SCATTER_PANELS


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
    figure = new_figure(0.8 + 2.1 * len(names), 0.6 + 1.7 * len(rows))
    grid = figure.subplots(len(rows), len(names), squeeze=False, sharex="col", sharey="row")
    for rank, dim in enumerate(rows):
        for column, name in enumerate(names):
            axes, strength = grid[rank, column], correlation[column, rank]
            axes.scatter(factors[shown, column], latents.z[shown, dim], s=2.5, alpha=0.35, color=colour(rank), linewidths=0)
            tidy(axes, "", f"z{dim}" if column == 0 else "")
            weight = "bold" if strength > 0.5 else "normal"
            axes.set_title(f"|{RHO}| {strength:.2f}", loc="right", fontsize=8, fontweight=weight, color=INK, pad=2)
            if rank == len(rows) - 1:
                axes.set_xlabel(name, fontsize=9.5, color=INK)
    return figure
