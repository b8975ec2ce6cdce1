"""Rows of images with labels: samples, reconstructions, traversals."""

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ..errors import printable
from ..evaluation import Latents, Run, known_factors
from ..evaluation.factors import factor_correlations
from ..latents import sampling
from ..latents.axes import Axes
from ..latents.discovery import Discovered
from ..latents.images import image_grid
from .charts import DPI, INK, MAX_AXES, RHO, colour, literal

CELL = 160  # pixels: smaller images are enlarged to about this side, larger ones are shrunk to it
GAP, ROW_GAP, MARGIN, LABEL_WIDTH, TICK_HEIGHT = 8, 24, 24, 300, 40  # pixels, as is CELL
LABEL_LETTERS, LETTER = 20, 13  # letters of a label's line; pixels of one letter of a tick
COLUMNS = 9
FRAMES, EVERY = 17, 2  # of a slider; of these a strip shows every second, which are COLUMNS
PNG_BYTES = 700_000  # a larger picture gets by with 256 colours, so that a report folder stays small


@dataclass(frozen=True)
class Strip:
    """One row of a picture."""

    label: str  # may hold several lines
    images: Tensor  # [n, C, H, W] in [-1, 1]
    ticks: Sequence[str] = ()  # a word under each image
    colour: str = INK  # of the label


def png(figure: Figure, most: float = PNG_BYTES) -> bytes:
    """The figure as a PNG file: the same bytes for the same figure. One with more bytes than `most` is reduced to 256 colours."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # in the name of a file; it is drawn as a box
        figure.savefig(buffer, format="png", metadata={"Software": None})  # no version in the file
    if buffer.tell() <= most:
        return buffer.getvalue()
    reduced = io.BytesIO()
    image = Image.open(buffer).convert("RGB")
    few = image.quantize(256)
    colours = np.array(few.getpalette()).reshape(-1, 3)
    colours[colours.sum(1).argmax()] = 255  # paper stays white
    few.putpalette(colours.flatten().tolist())
    image.quantize(palette=few).save(reduced, format="PNG")  # with a palette given, it dithers
    return reduced.getvalue()


def shortened(text: str, most: int) -> str:
    """On one line, of `most` letters at most: of a file's name the end tells most."""
    text = printable(text)
    return text if len(text) <= most else "\N{HORIZONTAL ELLIPSIS}" + text[1 - most :]


def strips(rows: Sequence[Strip], cell: int = CELL, shrink: bool = True) -> Figure:
    """Rows of images below each other, pixel for pixel: no resampling blurs those that fit their place.

    Args:
        rows: At least one, with images of one size. Labels and ticks are shown as they are, shortened where they would meet.
        cell: Smaller images are enlarged to about this side, pixels.
        shrink: Whether larger images are shrunk to it.
    """
    if shrink and rows[0].images.shape[-1] > cell:
        rows = [replace(row, images=F.interpolate(row.images.float(), (cell, cell), mode="area")) for row in rows]
    scale = max(1, cell // rows[0].images.shape[-1])
    side, high = scale * rows[0].images.shape[-1], scale * rows[0].images.shape[-2]
    heights = [high + (TICK_HEIGHT if row.ticks else 0) + ROW_GAP for row in rows]
    beside = LABEL_WIDTH if any(row.label for row in rows) else 0
    width = 2 * MARGIN + beside + max(len(row.images) for row in rows) * (side + GAP) - GAP
    height = 2 * MARGIN + sum(heights) - ROW_GAP
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    top = height - MARGIN
    for row, row_height in zip(rows, heights, strict=True):
        left, bottom = MARGIN + beside, top - high
        label = "\n".join(literal(shortened(line, LABEL_LETTERS)) for line in row.label.split("\n"))
        figure.text((left - MARGIN) / width, (bottom + high / 2) / height, label, ha="right", va="center", fontsize=9, color=row.colour)
        for place, image in enumerate(row.images):
            figure.figimage(image_grid(image[None], 1, scale), left + place * (side + GAP), bottom, origin="upper")
        for place, tick in enumerate(row.ticks):
            centre = left + place * (side + GAP) + side / 2
            text = literal(shortened(tick, side // LETTER))
            figure.text(centre / width, (bottom - 8) / height, text, ha="center", va="top", fontsize=8, color=INK)
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


def samples(run: Run, latents: Latents) -> list[Strip]:
    """Images of the data, new images from latents of the prior and, of a model that guides a denoiser, what this draws alone."""
    x_0, model, seed = run.images(torch.arange(min(COLUMNS, run.count))), run.model, run.config.seed
    z = sampling.prior_latents(model, COLUMNS, seed)
    if model.deterministic:
        z = fitted_latents(torch.from_numpy(latents.mu), z)
    rows = [Strip("data", x_0), Strip("samples", sampling.sample(model, COLUMNS, seed=seed, z=z, **_options(run)))]
    if model.guides:
        rows.append(Strip("denoiser alone", sampling.sample(model, COLUMNS, seed=seed, z=None, **_options(run))))
    return rows


def reconstructions(run: Run) -> list[Strip]:
    """Images above what their mean latents and new noise make."""
    x_0 = run.images(torch.arange(min(COLUMNS, run.count)))
    rebuilt = sampling.reconstruct(run.model, x_0, seed=run.config.seed, **_options(run))
    return [Strip("input", x_0), Strip("reconstruction", rebuilt)]


def central_image(latents: Latents) -> int:
    """Index of the image whose live latents lie nearest to the medians, so that a traversal stays among images like the data."""
    mu = latents.mu[:, latents.live]
    spread = np.maximum(mu.std(axis=0), 1e-12)  # a single image has none
    return int(np.square((mu - np.median(mu, axis=0)) / spread).sum(1).argmin())


@dataclass(frozen=True)
class Traversal:
    """One coordinate of one image, moved over the range that the data take along it."""

    axis: int
    values: np.ndarray  # [V]
    images: Tensor  # [V, C, H, W]
    start: int  # which of them is nearest to the image itself
    follows: tuple[str, float] | None  # where factors are known, the one that the coordinate follows best, and their rank correlation

    @property
    def ticks(self) -> list[str]:
        return [f"{value:.1f}" for value in self.values.round(1) + 0.0]  # + 0.0: no -0.0

    def strip(self, label: str, ink: str = INK, every: int = 1) -> Strip:
        """Every so-many-th image as a row of a picture."""
        label += f"\n{self.follows[0]}, |{RHO}| {self.follows[1]:.2f}" if self.follows else ""
        return Strip(label, self.images[::every], self.ticks[::every], ink)


def traversed(run: Run, latents: Latents, picked: Sequence[int], count: int, axes: Axes | None = None) -> list[Traversal]:
    """The central image along each coordinate; its other coordinates and the noise stay as they are.

    Args:
        picked: The coordinates.
        count: Values of each.
        axes: What they are coordinates of; None for the latents themselves.
    """
    factors, names, periods = known_factors(run)
    center = central_image(latents)
    codes, own = (latents.z, latents.mu) if axes is None else (axes.coordinates(latents.z), axes.coordinates(latents.mu))
    x_0, found, rows = run.images(torch.tensor([center])), [], sampling.range_rows(len(codes))
    strength = factor_correlations(codes, factors, names, periods) if names else None  # [F, D]
    for axis in picked:
        values = sampling.axis_values(torch.from_numpy(codes)[rows], axis, count)
        images = sampling.traverse(run.model, x_0, axis, values, seed=run.config.seed, axes=axes, **_options(run))
        follows = None
        if strength is not None:
            follows = names[strength[:, axis].argmax()], float(strength[:, axis].max())
        nearest = int(np.abs(values.numpy() - own[center, axis]).argmin())
        found.append(Traversal(axis, values.numpy(), images.cpu(), nearest, follows))
    return found


def traversals(run: Run, latents: Latents) -> list[Traversal]:
    """Of each live latent, most informative first."""
    return traversed(run, latents, latents.live[:MAX_AXES].tolist(), FRAMES)


def traversal_strips(moved: Sequence[Traversal], latents: Latents) -> list[Strip]:
    """One row per live latent."""
    nats = latents.information
    labels = [f"z{each.axis}" if nats is None else f"z{each.axis} \N{MIDDLE DOT} {nats[each.axis]:.1f} nats" for each in moved]
    return [each.strip(label, colour(rank), EVERY) for rank, (each, label) in enumerate(zip(moved, labels, strict=True))]


def axis_strips(run: Run, discovered: Discovered, latents: Latents) -> list[Strip]:
    """One row per discovered axis in their order: its coordinate moves over the data's range, the others and the noise stay.

    The number beside an axis's name is its score, where it has one.

    Args:
        run: The run.
        discovered: Its axes; the first 12 are shown.
        latents: Of the evaluation images.
    """
    axes = discovered.axes
    scores = [f" \N{MIDDLE DOT} {score:.2g}" if math.isfinite(score) else "" for score in discovered.score]
    moved = traversed(run, latents, range(min(MAX_AXES, len(axes.names))), COLUMNS, axes)
    return [each.strip(axes.names[each.axis] + scores[each.axis]) for each in moved]
