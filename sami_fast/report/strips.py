"""Rows of images with labels: samples, reconstructions, traversals."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ..evaluation import Latents, Run, known_factors
from ..latents import sampling
from ..latents.axes import Axes
from ..latents.discovery import Discovered
from ..latents.images import image_grid
from ..metrics.identifiability import correlation_matrix
from .charts import DPI, INK, MAX_AXES, RHO, colour

CELL = 160  # pixels: smaller images are enlarged to about this side, larger ones are shrunk to it
GAP, ROW_GAP, MARGIN, LABEL_WIDTH, TICK_HEIGHT = 8, 24, 24, 300, 40  # pixels, as is CELL
COLUMNS = 9
COVERAGE = 0.95  # of the data, by the range of a traversal
PNG_BYTES = 700_000  # a larger picture gets by with 256 colours, so that the page stays below 10 MB


@dataclass(frozen=True)
class Strip:
    """One row of a picture."""

    label: str  # may hold several lines
    images: Tensor  # [n, C, H, W] in [-1, 1]
    ticks: Sequence[str] = ()  # a word under each image
    colour: str = INK  # of the label


def png(figure: Figure) -> bytes:
    """The figure as a PNG file: the same bytes for the same figure. One above `PNG_BYTES` is reduced to 256 colours."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})  # no version in the file
    if buffer.tell() <= PNG_BYTES:
        return buffer.getvalue()
    reduced = io.BytesIO()
    image = Image.open(buffer).convert("RGB")
    few = image.quantize(256)
    colours = np.array(few.getpalette()).reshape(-1, 3)
    colours[colours.sum(1).argmax()] = 255  # paper stays white
    few.putpalette(colours.flatten().tolist())
    image.quantize(palette=few).save(reduced, format="PNG")  # with a palette given, it dithers
    return reduced.getvalue()


def strips(rows: Sequence[Strip]) -> Figure:
    """Rows of images below each other, pixel for pixel: no resampling blurs those that fit their place."""
    if rows[0].images.shape[-1] > CELL:
        rows = [replace(row, images=F.interpolate(row.images.float(), (CELL, CELL), mode="area")) for row in rows]
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


def fitted_latents(mu: Tensor, like: Tensor) -> Tensor:
    """Latents from the normal distribution with the mean and the covariance of the data's, for an encoder without a prior.

    Args:
        mu: Latents of the data. [N, Z].
        like: Standard normal noise. [n, Z].
    Returns:
        [n, Z], as `like`.
    """
    mean, scaled = mu.mean(0), (mu - mu.mean(0)) / math.sqrt(max(1, len(mu) - 1))
    _, values, vectors = torch.linalg.svd(scaled, full_matrices=False)
    noise = like.to(mu)[:, : len(values)]
    return (mean + noise * values @ vectors).to(like)


def samples(run: Run, latents: Latents) -> Figure:
    """Images of the data, new images from latents of the prior and, of a model that guides a denoiser, what this draws alone."""
    x_0, model, seed = run.images(torch.arange(min(COLUMNS, run.count))), run.model, run.config.seed
    z = sampling.prior_latents(model, COLUMNS, seed)
    if model.deterministic:
        z = fitted_latents(torch.from_numpy(latents.mu), z)
    rows = [Strip("data", x_0), Strip("samples", sampling.sample(model, COLUMNS, seed=seed, z=z, **_options(run)))]
    if model.guides:
        rows.append(Strip("denoiser alone", sampling.sample(model, COLUMNS, seed=seed, z=None, **_options(run))))
    return strips(rows)


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


def _traversed(
    run: Run,
    latents: Latents,
    rows: Sequence[tuple[int, str, str]],
    codes: np.ndarray,
    coordinates: np.ndarray,
    axes: Axes | None = None,
) -> Figure:
    """One strip per row: one coordinate of one image moves over the range that the data take along it.

    Args:
        rows: Axis, label, colour of the label.
        codes: [N, A]; where factors are known, a label says which of them its column follows best.
        coordinates: [N, A], those whose range is shown.
        axes: What they are coordinates of; None for the latents themselves.
    """
    factors, names, _ = known_factors(run)
    x_0 = run.images(torch.tensor([central_image(latents)]))
    drawn = []
    for axis, label, ink in rows:
        values = sampling.axis_values(torch.from_numpy(coordinates), axis, COLUMNS, COVERAGE)
        images = sampling.traverse(run.model, x_0, axis, values, seed=run.config.seed, axes=axes, **_options(run))
        if names:
            correlation = correlation_matrix(codes[:, [axis]], factors)[:, 0]  # [F]
            label += f"\n{names[correlation.argmax()]}, |{RHO}| {correlation.max():.2f}"
        ticks = [f"{value:.1f}" for value in values.cpu().numpy().round(1) + 0.0]  # + 0.0: no -0.0
        drawn.append(Strip(label, images, ticks, ink))
    return strips(drawn)


def traversals(run: Run, latents: Latents) -> Figure:
    """One strip per live latent, most informative first: its value moves, everything else and the noise stay. Needs a live latent."""
    live = latents.live[:MAX_AXES].tolist()
    nats = latents.information
    labels = [f"z{axis}" if nats is None else f"z{axis} · {nats[axis]:.1f} nats" for axis in live]
    rows = [(axis, label, colour(rank)) for rank, (axis, label) in enumerate(zip(live, labels, strict=True))]
    return _traversed(run, latents, rows, latents.z, latents.z)


def axis_strips(run: Run, discovered: Discovered, latents: Latents) -> Figure:
    """One strip per discovered axis in their order: its coordinate moves over the data's range, the others and the noise stay.

    The number beside an axis's name is its score, where it has one.

    Args:
        run: The run.
        discovered: Its axes; the first 12 are shown.
        latents: Of the evaluation images.
    """
    axes = discovered.axes
    scores = [f" · {score:.2g}" if math.isfinite(score) else "" for score in discovered.score]
    rows = [(axis, name + score, INK) for axis, (name, score) in enumerate(zip(axes.names, scores, strict=True))]
    return _traversed(run, latents, rows[:MAX_AXES], axes.coordinates(latents.z), axes.coordinates(latents.mu), axes)
