"""The latents over noise levels: what is left of them in a noisy image, and whether the encoder knows how much."""

import math

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ..evaluation import Latents
from ..latents.images import image_grid
from ..metrics.scale_profile import ScaleProfile
from ..schedule import alpha_sigma
from .charts import DASHED, FAINT, INK, LEGEND_ENTRIES, MAX_AXES, SOFT, line, new_figure, tidy

THUMBNAILS = 7  # noisy copies of an image below a profile


def _over_levels(axes: Axes, levels: np.ndarray) -> None:
    axes.set_xlim(levels[0], levels[-1])
    axes.set_xlabel("mostly noise  ←  noise level (log of signal to noise)  →  nearly clean", fontsize=8.5, color=INK)


def _legend(axes: Axes, count: int) -> None:
    axes.legend(frameon=False, fontsize=8, ncols=2 if count > 6 else 1)


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
            axes.plot([scale, scale], [0, half], color=line(rank)["color"], linewidth=0.9, linestyle=DASHED)
            axes.plot(scale, half, marker="o", markersize=5, color=line(rank)["color"])
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
