"""The clips of a dataset as paths through the latents, and how much these bend."""

from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from einops import rearrange
from matplotlib import colormaps
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from torch import Tensor

from ..evaluation import Latents, Run
from ..evaluation.clips import flat, means, num_clips, through, whole_clips
from ..latents.images import image_grid
from ..metrics.straightness import clip_straightness
from .charts import DASHED, FAINT, INK, SOFT, colour, new_figure, tidy

SHOWN = 6  # clips whose paths are drawn
COLUMNS = 3
CLOUD = 800  # images that show where the data lie


@dataclass(frozen=True)
class Clips:
    """Evaluation clips, and the curvature of each. N clips of T frames."""

    frames: Tensor  # [n, T, C, H, W] of the first clips, those that are drawn
    codes: np.ndarray  # [N, T, Z], the mean latents of each frame by itself
    curvature: np.ndarray  # [N] degrees, along the mean latents; NaN of a clip that stands still
    pixel_curvature: np.ndarray  # [N] degrees, along the pixels


def read_clips(run: Run) -> Clips | None:
    """The evaluation clips of a run; None where its data have none, or none of three frames or more."""
    if not num_clips(run):
        return None
    codes, pixels = through(run, means(run.model), flat)
    frames = torch.stack([*islice(whole_clips(run), SHOWN)])
    return Clips(frames, codes, clip_straightness(codes).curvature, clip_straightness(pixels).curvature)


def clip_scores(clips: Clips) -> dict[str, list[float | None]]:
    """Curvatures as plain numbers; None for a clip that stands still."""
    each = {"clip_curvature": clips.curvature, "clip_pixel_curvature": clips.pixel_curvature}
    return {name: [float(value) if np.isfinite(value) else None for value in values] for name, values in each.items()}


def trajectories(clips: Clips, latents: Latents) -> Figure:
    """Paths of the first clips in the plane of their first two principal components, with frames of each.

    Args:
        clips: Of a run with at least two latents.
        latents: Of its evaluation images: the cloud behind the paths.
    """
    codes = clips.codes[: len(clips.frames)]
    plane: Any = PCA(2, random_state=0)  # scikit-learn's stubs refuse numpy's arrays
    plane.fit(rearrange(codes, "clips frames z -> (clips frames) z"))
    paths = [plane.transform(clip) for clip in codes]
    cloud = plane.transform(latents.mu[:CLOUD])
    points = np.concatenate([*paths, cloud])
    low, high = points.min(0), points.max(0)
    centre, reach = (low + high) / 2, 0.55 * max((high - low).max(), 1e-6)
    columns = min(COLUMNS, len(paths))
    rows = -(-len(paths) // columns)
    figure = new_figure(0.6 + 3.2 * columns, 0.2 + 4.1 * rows)
    grid = figure.add_gridspec(2 * rows, columns, height_ratios=(1, 0.27) * rows)
    share = plane.explained_variance_ratio_
    time, viridis = np.arange(len(paths[0])), colormaps["viridis"]
    for number, (path, frames) in enumerate(zip(paths, clips.frames, strict=True)):
        row, column = divmod(number, columns)
        axes = figure.add_subplot(grid[2 * row, column])
        axes.scatter(*cloud.T, s=2, color=SOFT, alpha=0.3, linewidths=0, rasterized=True)
        axes.plot(*path.T, color=FAINT, linewidth=1)
        axes.scatter(*path.T, c=time, cmap=viridis, s=22, zorder=3)
        bend = clips.curvature[number]
        tidy(axes, f"clip {number}" + (f": bends by {bend:.0f}° a frame" if np.isfinite(bend) else ": stands still"), "")
        axes.set_xlim(centre[0] - reach, centre[0] + reach)
        axes.set_ylim(centre[1] - reach, centre[1] + reach)
        axes.set_box_aspect(1)
        axes.set_xlabel(f"first direction ({share[0]:.0%} of variance)", fontsize=8, color=INK)
        if column == 0:
            axes.set_ylabel(f"second direction ({share[1]:.0%})", fontsize=8, color=INK)
        below = figure.add_subplot(grid[2 * row + 1, column])
        below.axis("off")
        for place, which in enumerate((0, len(frames) // 2, len(frames) - 1)):
            inset = below.inset_axes((place / 3, 0.1, 1 / 3.2, 0.9))
            inset.imshow(image_grid(frames[which, None], 1, 1), interpolation="nearest")
            inset.set_xticks([])
            inset.set_yticks([])
            inset.set_xlabel(f"frame {which}", fontsize=7.5, color=INK, labelpad=2)
            inset.spines[:].set_color(viridis(which / max(1, len(frames) - 1)))
            inset.spines[:].set_linewidth(1.6)
    return figure


def curvatures(clips: Clips) -> Figure:
    """Mean curvature of every clip, along its latents against along its pixels."""
    figure = new_figure(4.6, 4.2)
    axes = figure.subplots()
    axes.scatter(clips.pixel_curvature, clips.curvature, s=12, alpha=0.6, color=colour(0), linewidths=0)
    edge = 1.08 * np.nanmax([clips.pixel_curvature, clips.curvature, np.full_like(clips.curvature, 10.0)])
    axes.plot([0, edge], [0, edge], color=INK, linewidth=0.8, linestyle=DASHED)
    axes.text(0.96 * edge, 0.03 * edge, "latents straighter", ha="right", fontsize=8, color=INK)
    axes.text(0.03 * edge, 0.95 * edge, "pixels straighter", ha="left", va="top", fontsize=8, color=INK)
    tidy(axes, "Curvature of each clip", "along the latents, degrees a frame")
    axes.set_xlabel("along the pixels, degrees a frame", fontsize=8.5, color=INK)
    axes.set_xlim(0, edge)
    axes.set_ylim(0, edge)
    axes.set_box_aspect(1)
    return figure
