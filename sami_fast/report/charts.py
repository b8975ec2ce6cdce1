"""Charts: the training's curves, the latents against the factors, and the latents over noise levels. On paper, light or dark."""

import io
import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor

from ..evaluation import Latents, Run
from ..latents.images import image_grid
from ..metrics.latents import LIVE_NATS
from ..metrics.scale_profile import ScaleProfile
from ..schedule import alpha_sigma

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#5A5A5A")
INK, SOFT, FAINT, GRID, SHADE = "#333333", "#777777", "#C4C4C4", "#EEEEEE", "#F4F4F4"
# What stands for these on dark paper; colours that are not named here are seen on both.
ON_DARK = ("#4DA6E0", "#EE8A4A", "#2DBB93", "#DDA0C4", "#EDB84D", "#7CC6F0", "#C08A7E", "#A3A3A3")
DARK = dict(zip((*COLOURS, INK, SOFT, FAINT, GRID, SHADE), (*ON_DARK, "#DFE2E6", "#9AA2AC", "#565C64", "#2A2E33", "#212529"), strict=True))
BLUE = (0.0, 0.447, 0.698)
STRENGTH = LinearSegmentedColormap.from_list("strength", [(*BLUE, 0.0), (*BLUE, 1.0)])  # of a correlation: where it is 0 the paper shows
DASHED = (0, (4, 3))
DPI = 200  # of what an SVG holds as pixels
RHO = "\N{GREEK SMALL LETTER RHO}"
SCATTER_POINTS = 1500
SCATTER_PANELS = 24  # with more, the matrix of correlations says it all
MAX_AXES = 12  # live dimensions that get a row or a curve of a figure
MATRIX_ROWS = 32
CELL_NUMBERS = 160  # cells of a matrix that are few enough to write into
LEGEND_ENTRIES = 10
THUMBNAILS = 7  # noisy copies of an image below a profile


def colour(rank: int) -> str:
    """Of the live dimension with this place in the order of KL: the same in every figure."""
    return COLOURS[rank % len(COLOURS)]


def line(rank: int) -> dict[str, Any]:
    """How the curve of a live dimension is drawn: once the colours are used up, dashed."""
    return {"color": colour(rank), "linewidth": 1.5, "linestyle": "-" if rank < len(COLOURS) else (0, (5, 2))}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches, with a margin around everything that is drawn."""
    figure = Figure(figsize=(width, height), dpi=DPI)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    return figure


def literal(text: str) -> str:
    """Text that Matplotlib shows as it is: between two dollar signs it would read mathematics."""
    return text.replace("$", r"\$")


def svg(figure: Figure) -> str:
    """The figure as an SVG without a background, whose lines and words follow the reader's light or dark paper: the same for the same."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "sami-fast"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn = buffer.getvalue()
    light, dark = [], []
    for place, (colour, on_dark) in enumerate(DARK.items()):
        drawn = drawn.replace(f": {colour.lower()}", f": var(--c{place})")
        light.append(f"--c{place}:{colour}")
        dark.append(f"--c{place}:{on_dark}")
    style = f"<style>:root{{{';'.join(light)}}}@media(prefers-color-scheme:dark){{:root{{{';'.join(dark)}}}}}</style>"
    attributes, _, content = drawn[drawn.index("<svg") :].partition(">")
    return f"{attributes}>{style}{content}"


def tidy(axes: Axes, title: str, ylabel: str) -> None:
    """The look of every chart."""
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_ylabel(ylabel, fontsize=8.5, color=INK)
    axes.tick_params(labelsize=8, colors=INK, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def training_curves(run: Run, latents: Latents) -> Figure:
    """The terms of the loss over the steps and, of an encoder with a rate, the information in every latent dimension and beta.

    Args:
        run: Whose log is drawn; the KL and the information are not shown before the encoder starts to learn. A log that was written before
            there was information in it shows the KL of every dimension in its place.
        latents: At the end; the live dimensions get colours.
    """
    log, first_joint_step = run.log, run.config.first_joint_step
    rated = latents.kl is not None
    figure = new_figure(10.5 if rated else 5.5, 3.2)
    panels = figure.subplots(1, 3, width_ratios=(1, 1.15, 0.75)) if rated else [figure.subplots()]
    joint = [row for row in log if row["step"] > first_joint_step]
    steps, joint_steps = [row["step"] for row in log], [row["step"] for row in joint]

    errors = panels[0]
    *others, main = run.model.terms
    for term in others:
        errors.plot(steps, [row[term.name] for row in log], color="#9A9A9A", linewidth=1.3, label=term.legend)
    errors.plot(joint_steps, [row[main.name] for row in joint], color=colour(0), linewidth=1.5, label=main.legend)
    if rated:
        errors.plot(joint_steps, [max(row["kl_nats"], 1e-4) for row in joint], color=INK, linewidth=1.1, linestyle=DASHED, label="KL of z")
    errors.set_yscale("log")
    errors.legend(frameon=False, fontsize=8, labelcolor=INK)
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
            axes.axvspan(0, first_joint_step, color=SHADE, zorder=0)
    if first_joint_step:
        place = {"transform": errors.get_xaxis_transform(), "ha": "center"}
        errors.text(first_joint_step / 2, 0.04, "denoiser\nalone", fontsize=7, color=SOFT, **place)
    return figure


def _rates(axes: Axes, rows: Sequence[dict[str, Any]], steps: Sequence[int], live: np.ndarray) -> None:
    measure = "information" if all("information_per_dim" in row for row in rows) else "kl"
    if rows:
        nats = np.array([row[f"{measure}_per_dim"] for row in rows]).clip(min=1e-4)  # [rows, Z]; a log axis has no 0
        dead = [d for d in range(nats.shape[1]) if d not in live]
        # Hundreds of lines are one picture in the SVG, of few bytes; a picture does not follow the paper, so it lets that show through.
        look: dict[str, Any] = {"color": SOFT, "alpha": 0.4, "rasterized": True} if len(dead) > MATRIX_ROWS else {"color": FAINT}
        for place, d in enumerate(dead):
            axes.plot(steps, nats[:, d], linewidth=0.9, label="dead" if place == 0 else None, **look)
        for rank, d in enumerate(live):
            axes.plot(steps, nats[:, d], label=f"z{d}" if rank < LEGEND_ENTRIES else None, **line(rank))
        axes.legend(fontsize=8, ncols=2, loc="lower right", frameon=False, labelcolor=INK)
    axes.axhline(LIVE_NATS, color=INK, linewidth=0.8, linestyle=DASHED)
    axes.text(0.01, LIVE_NATS * 1.1, f"live above {LIVE_NATS:g}", transform=axes.get_yaxis_transform(), fontsize=7, color=INK)
    axes.set_yscale("log")
    tidy(axes, f"{'Information in' if measure == 'information' else 'KL of'} each latent dimension", "nats")


def correlations(latents: Latents, strength: np.ndarray, names: Sequence[str]) -> Figure:
    """|Rank correlation| of sampled latents with factors: a row per live dimension, a column per factor.

    Args:
        latents: With at least one live dimension.
        strength: As `evaluation.factors.factor_correlations` gives it. [F, Z], F >= 1.
        names: Of the factors.
    """
    rows = latents.live[:MATRIX_ROWS]
    matrix = strength[:, rows].T  # [L, F]
    figure = new_figure(1.6 + max(1.6, 0.34 * len(names) if len(names) > 8 else 0.8 * len(names)), 0.9 + 0.34 * len(rows))
    axes = figure.subplots()
    shown = axes.imshow(matrix, cmap=STRENGTH, vmin=0, vmax=1, aspect="auto")
    slanted: dict[str, Any] = {"rotation": 60, "ha": "left", "rotation_mode": "anchor"} if len(names) > 8 else {}
    axes.set_xticks(range(len(names)), names, fontsize=8.5, color=INK, **slanted)
    axes.set_yticks(range(len(rows)), [f"z{dim}" for dim in rows], fontsize=8.5)
    for rank, label in enumerate(axes.get_yticklabels()):
        label.set_color(colour(rank))
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if matrix.size <= CELL_NUMBERS:
        for (row, column), value in np.ndenumerate(matrix):
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if value > 0.6 else INK)
    bar = figure.colorbar(shown, ax=axes, shrink=0.9, ticks=(0, 0.5, 1))
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, colors=INK)
    bar.set_label(f"|{RHO}|", fontsize=8.5, color=INK)
    return figure


def scatter_fits(latents: Latents, names: Sequence[str]) -> bool:
    """Whether there are few enough pairs of latent and factor to show each by itself."""
    return min(len(latents.live), MAX_AXES) * len(names) <= SCATTER_PANELS


def latents_against_factors(latents: Latents, factors: np.ndarray, strength: np.ndarray, names: Sequence[str]) -> Figure:
    """One sampled latent per image against each factor, a row per live dimension.

    Args:
        latents: With at least one live dimension.
        factors: [N, F], F >= 1.
        strength, names: As in `correlations`.
    """
    rows = latents.live[:MAX_AXES]
    shown = slice(0, SCATTER_POINTS)
    figure = new_figure(0.8 + 2.1 * len(names), 0.6 + 1.7 * len(rows))
    grid = figure.subplots(len(rows), len(names), squeeze=False, sharex="col", sharey="row")
    for rank, dim in enumerate(rows):
        for column, name in enumerate(names):
            axes, follows = grid[rank, column], strength[column, dim]
            axes.scatter(
                factors[shown, column], latents.z[shown, dim], s=2.5, alpha=0.35, color=colour(rank), linewidths=0, rasterized=True
            )
            tidy(axes, "", f"z{dim}" if column == 0 else "")
            weight = "bold" if follows > 0.5 else "normal"
            axes.set_title(f"|{RHO}| {follows:.2f}", loc="right", fontsize=8, fontweight=weight, color=INK, pad=2)
            if rank == len(rows) - 1:
                axes.set_xlabel(name, fontsize=9.5, color=INK)
    return figure


def _over_levels(axes: Axes, levels: np.ndarray) -> None:
    axes.set_xlim(levels[0], levels[-1])
    axes.set_xlabel("mostly noise  ←  noise level (log of signal to noise)  →  nearly clean", fontsize=8.5, color=INK)


def _legend(axes: Axes, count: int) -> None:
    axes.legend(frameon=False, fontsize=8, ncols=2 if count > 6 else 1, labelcolor=INK)


def information(profile: ScaleProfile, latents: Latents, x_0: Tensor) -> Figure:
    """I_d over noise levels, a curve per live dimension with its characteristic scale, above noisy copies of an image.

    Args:
        profile: Of the run.
        latents: With at least one live dimension.
        x_0: The image. [1, C, H, W].
    """
    levels, rows = profile.logsnr, latents.live[:MAX_AXES]
    figure = new_figure(7.2, 4.3)
    axes, below = figure.subplots(2, 1, height_ratios=(1, 0.24))
    for rank, dim in enumerate(rows):
        scale = profile.scale[dim]
        known = math.isfinite(scale)
        label = f"z{dim}, half at {scale:.1f}" if known else f"z{dim}"
        axes.plot(levels, profile.information[:, dim], label=label if rank < LEGEND_ENTRIES else None, **line(rank))
        if known:
            half = profile.clean[dim] / 2
            axes.plot([scale, scale], [0, half], color=colour(rank), linewidth=0.9, linestyle=DASHED)
            axes.plot(scale, half, marker="o", markersize=5, color=colour(rank))
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -high), high)  # an encoder that was never shown noise may be wrong without limit
    axes.axhline(0, color=FAINT, linewidth=0.9)
    _legend(axes, len(rows))
    tidy(axes, "Information about each latent in a noisy image", "nats")
    _over_levels(axes, levels)

    width = (levels[-1] - levels[0]) / THUMBNAILS
    shown = levels[0] + width * (np.arange(THUMBNAILS) + 0.5)
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)).to(x_0)
    alpha, sigma = (v.to(x_0) for v in alpha_sigma(torch.from_numpy(shown)))
    for level, a, s in zip(shown, alpha, sigma, strict=True):
        inset = below.inset_axes((level - 0.42 * width, 0, 0.84 * width, 1), transform=below.transData)
        inset.imshow(image_grid(a * x_0 + s * noise, 1, 1), interpolation="nearest")
        inset.set_anchor("N")
        inset.axis("off")
    below.set_ylim(0, 1)
    below.set_xlim(levels[0], levels[-1])
    below.axis("off")
    return figure


def calibration(profile: ScaleProfile, latents: Latents) -> Figure:
    """Standard deviation and mean of (z - mu_t) / std_t over noise levels, a curve per live dimension."""
    levels, rows = profile.logsnr, latents.live[:MAX_AXES]
    figure = new_figure(10.5, 3.2)
    panels = figure.subplots(1, 2)
    for axes, values, target, title, ylabel in (
        (panels[0], profile.calibration_std, 1.0, "Is the encoder as sure as it should be?", "spread of its errors, in its own units"),
        (panels[1], profile.calibration_mean, 0.0, "Does it lean to one side?", "mean of its errors, in its own units"),
    ):
        for rank, dim in enumerate(rows):
            axes.plot(levels, values[:, dim], label=f"z{dim}" if rank < LEGEND_ENTRIES else None, **line(rank))
        axes.axhline(target, color=INK, linewidth=0.9, linestyle=DASHED)
        tidy(axes, title, ylabel)
        _over_levels(axes, levels)
    low, high = panels[0].get_ylim()
    panels[0].set_ylim(max(0.0, min(low, 0.5)), max(high, 1.5))
    edge = max(0.5, *map(abs, panels[1].get_ylim()))
    panels[1].set_ylim(-edge, edge)
    for place, text in ((0.97, "too sure"), (0.05, "too modest")):
        panels[0].text(0.99, place, text, transform=panels[0].transAxes, ha="right", va="center", fontsize=7.5, color=SOFT)
    _legend(panels[1], len(rows))
    return figure


def guidance(levels: np.ndarray, own: np.ndarray, other: np.ndarray, zscore_square: np.ndarray) -> Figure:
    """What guidance gains over noise levels with an image's own latents and with another's, and how far latents lie off.

    Args:
        levels: logsnr, increasing. [L].
        own, other: Gains, nats per unit of logsnr. [L].
        zscore_square: Squared standardised errors, a mean over live dimensions. [L]; NaN where there are none.
    """
    figure = new_figure(10.5, 3.2)
    gains, errors = figure.subplots(1, 2)
    top = 1.15 * max(own.max(), 1e-3)
    gains.plot(levels, own, label="own latents", **line(0))
    gains.plot(levels, other.clip(min=-10 * top), label="another image's", **line(1))
    gains.axhline(0, color=FAINT, linewidth=0.9)
    gains.set_ylim(max(-top, min(other.min(), own.min()) - 0.05 * top), max(top, 1.15 * other.max()))
    _legend(gains, 2)
    tidy(gains, "What guidance gains", "nats per unit of log signal to noise")
    errors.plot(levels, zscore_square, **line(0))
    errors.axhline(1, color=INK, linewidth=0.9, linestyle=DASHED)
    errors.set_yscale("log")
    tidy(errors, "Squared errors in the encoder's own units", "mean over live latents")
    for axes in (gains, errors):
        _over_levels(axes, levels)
    return figure
