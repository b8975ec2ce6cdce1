"""Rows of images with labels: samples, reconstructions, traversals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from .. import sampling
from ..images import image_grid
from ..metrics.identifiability import correlation_matrix
from .charts import DPI, INK, MAX_AXES, RHO, colour
from .run import Run
from .scores import Latents

CELL = 160  # smaller images are enlarged to about this side
GAP, ROW_GAP, MARGIN, LABEL_WIDTH, TICK_HEIGHT = 8, 24, 24, 300, 40  # pixels, as is CELL
COLUMNS = 9
COVERAGE = 0.95  # of the sampled latents, by the range of a traversal


@dataclass(frozen=True)
class Strip:
    """One row of a picture."""

    label: str  # may hold several lines
    images: Tensor  # [n, C, H, W] in [-1, 1]
    ticks: Sequence[str] = ()  # a word under each image
    colour: str = INK  # of the label


def strips(rows: Sequence[Strip]) -> Figure:
    """Rows of images below each other, pixel for pixel: no resampling blurs them."""
    scale = max(1, CELL // rows[0].images.shape[-1])
    side = scale * rows[0].images.shape[-1]
    heights = [side + (TICK_HEIGHT if row.ticks else 0) + ROW_GAP for row in rows]
    width = 2 * MARGIN + LABEL_WIDTH + max(len(row.images) for row in rows) * (side + GAP) - GAP
    height = 2 * MARGIN + sum(heights) - ROW_GAP
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    top = height - MARGIN
    for row, row_height in zip(rows, heights, strict=True):
        left, bottom = MARGIN + LABEL_WIDTH, top - side
        beside, middle = (left - MARGIN) / width, (bottom + side / 2) / height
        figure.text(beside, middle, row.label, ha="right", va="center", fontsize=9, color=row.colour)
        for place, image in enumerate(row.images):
            figure.figimage(image_grid(image[None], 1, scale), left + place * (side + GAP), bottom, origin="upper")
        for place, tick in enumerate(row.ticks):
            centre = left + place * (side + GAP) + side / 2
            figure.text(centre / width, (bottom - 8) / height, tick, ha="center", va="top", fontsize=8, color=INK)
        top -= row_height
    return figure


def _options(run: Run) -> sampling.SamplerOptions:
    return {"num_steps": run.config.report.sample_steps}


def samples(run: Run) -> Figure:
    """Images of the data, new images guided by latents from the prior, and what the denoiser draws alone."""
    x_0 = run.images(torch.arange(min(COLUMNS, run.count)))
    drawn = sampling.sample(run.model, COLUMNS, seed=run.config.seed, **_options(run))
    alone = sampling.sample(run.model, COLUMNS, seed=run.config.seed, z=None, **_options(run))
    return strips([Strip("data", x_0), Strip("samples", drawn), Strip("denoiser alone", alone)])


def reconstructions(run: Run) -> Figure:
    """Images above what their mean latents and new noise make."""
    x_0 = run.images(torch.arange(min(COLUMNS, run.count)))
    rebuilt = sampling.reconstruct(run.model, x_0, seed=run.config.seed, **_options(run))
    return strips([Strip("input", x_0), Strip("reconstruction", rebuilt)])


def central_image(latents: Latents) -> int:
    """Index of the image whose live latents lie nearest to the medians, so that a traversal stays among images like the data."""
    mu = latents.mu[:, latents.live]
    spread = np.maximum(mu.std(axis=0), 1e-12)  # a single image has none
    return int(np.square((mu - np.median(mu, axis=0)) / spread).sum(1).argmin())


def traversals(run: Run, latents: Latents, factors: np.ndarray) -> Figure:
    """One strip per live axis, most informative first: its value moves, everything else and the noise stay.

    Args:
        run: The run.
        latents: With at least one live dimension.
        factors: [N, F], F may be 0; an axis is labelled with the factor it follows best.
    """
    names = run.evaluation.factor_names
    x_0 = run.images(torch.tensor([central_image(latents)]))
    rows = []
    for rank, axis in enumerate(latents.live[:MAX_AXES]):
        values = sampling.axis_values(torch.from_numpy(latents.z), int(axis), COLUMNS, COVERAGE)
        images = sampling.traverse(run.model, x_0, int(axis), values, seed=run.config.seed, **_options(run))
        label = f"z{axis} · {latents.kl[axis]:.1f} nats"
        if names:
            correlation = correlation_matrix(latents.z[:, [axis]], factors)[:, 0]  # [F]
            best = int(correlation.argmax())
            label += f"\n{names[best]}, |{RHO}| {correlation[best]:.2f}"
        rows.append(Strip(label, images, [f"{value:.1f}" for value in values.numpy().round(1) + 0.0], colour(rank)))
    return strips(rows)
