"""What a reader plays with: a card for each live latent, and a map of images. Plain values and pictures, which templates/ shows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..data.dataset import image_names
from ..errors import printable
from ..evaluation import Latents, Run
from ..latents.axes import Axes
from ..latents.extremes import extremes
from ..metrics.scale_profile import ScaleProfile
from .sheets import Sheet, sheet
from .strips import Strip, Traversal

ENDS = 6  # images at each end of a latent
MAPPED = 300  # images of the map, among them those at the ends of each of up to 12 latents
SHEET_COLUMNS = 20
FRAME_SIDE, THUMBNAIL_SIDE = 128, 64  # pixels
ALONG = 0.95  # of the length of an axis: that much of it along one latent, and its name is the latent's


@dataclass(frozen=True)
class Thumbnail:
    """An evaluation image in the page's sheet of thumbnails."""

    number: int  # place in that sheet
    caption: str  # as `captions`
    value: float  # of the latent it stands beside


@dataclass(frozen=True)
class Card:
    """What a live latent does and where it comes from."""

    latent: int
    rank: int  # the most informative is 0
    name: str  # "" where nobody named it
    nats: float | None  # I(x; z); None of latents without noise
    moved: Traversal
    lowest: list[Thumbnail]
    highest: list[Thumbnail]
    scale: float | None  # logsnr at which half of its information is left
    profile: list[tuple[float, float]]  # that information over the noise levels: both from 0 to 1


@dataclass(frozen=True)
class Gallery:
    """Evaluation images and where they lie along the live latents."""

    thumbnails: Sheet
    captions: list[str]  # [M]
    latents: list[int]  # the live ones that are shown, L of them
    positions: np.ndarray  # [M, L], means

    def spots(self, across: int, up: int) -> list[tuple[float, float]]:
        """Where each image stands on the map, per cent from the left and from below; page.js moves them to other latents alike."""
        shown = self.positions[:, [across, up]]
        return (4 + 92 * (shown - shown.min(0)) / np.where(np.ptp(shown, axis=0) > 0, np.ptp(shown, axis=0), 1)).tolist()

    @property
    def data(self) -> dict[str, Any]:
        """What page.js places images by."""
        return {"latents": self.latents, "positions": self.positions.T.round(3).tolist()}


def latent_names(axes: Axes | None, latent_size: int) -> dict[int, str]:
    """Names that a file of axes gives to latents: those of axes that run along one. The first axis along a latent names it."""
    if axes is None or axes.directions.shape[1] != latent_size:
        return {}
    names: dict[int, str] = {}
    share = np.abs(axes.directions) / np.linalg.norm(axes.directions, axis=1, keepdims=True)
    for name, along in zip(axes.names, share, strict=True):
        latent = int(along.argmax())
        if along[latent] >= ALONG and name != f"z{latent}":
            names.setdefault(latent, name)
    return names


def captions(run: Run, index: Sequence[int]) -> list[str]:
    """What evaluation images are called, as a page can show it."""
    return [printable(name) for name in image_names(run.evaluation, run.chosen[list(index)])]


def _profile(measured: ScaleProfile, latent: int) -> list[tuple[float, float]]:
    full = max(measured.clean[latent], 1e-9)
    heights = np.clip(measured.information[:, latent] / full, 0, 1)
    places = (measured.logsnr - measured.logsnr[0]) / np.ptp(measured.logsnr)
    return list(zip(places.tolist(), heights.tolist(), strict=True))


def cards_and_gallery(
    run: Run, latents: Latents, measured: ScaleProfile | None, moved: Sequence[Traversal], names: dict[int, str]
) -> tuple[list[Card], Gallery | None]:
    """A card for each traversed latent, and the map of their images; no map of a single image, or where nothing is live.

    Args:
        moved: Of the live latents that get a card, most informative first.
        names: As `latent_names`.
    """
    shown = [each.axis for each in moved]
    ends = [extremes(latents.mu[:, axis], ENDS) for axis in shown]
    wanted = [int(place) for both in ends for part in both for place in part] + list(range(run.count))
    mapped = list(dict.fromkeys(wanted))[:MAPPED]
    place_of, called = {image: number for number, image in enumerate(mapped)}, captions(run, mapped)

    def thumbnails(places: np.ndarray, axis: int) -> list[Thumbnail]:
        return [Thumbnail(place_of[int(p)], called[place_of[int(p)]], float(latents.mu[p, axis])) for p in places]

    nats, cards = latents.information, []
    for rank, (each, (low, high)) in enumerate(zip(moved, ends, strict=True)):
        axis = each.axis
        scale = None if measured is None or not np.isfinite(measured.scale[axis]) else float(measured.scale[axis])
        curve = [] if measured is None else _profile(measured, axis)
        held = None if nats is None else float(nats[axis])
        ended = thumbnails(low, axis), thumbnails(high, axis)
        cards.append(Card(axis, rank, names.get(axis, ""), held, each, *ended, scale, curve))
    if not shown or run.count < 2:
        return cards, None
    images = torch.cat([run.images(index).cpu() for index in torch.tensor(mapped).split(run.batch_size)])
    return cards, Gallery(sheet(images, SHEET_COLUMNS, THUMBNAIL_SIDE), called, shown, latents.mu[mapped][:, shown])


def sheet_of(rows: Sequence[Strip]) -> Sheet:
    """Rows of a picture, all of one length, as a sheet of as many rows."""
    return sheet(torch.cat([row.images.cpu() for row in rows]), len(rows[0].images), FRAME_SIDE)


def frames(moved: Sequence[Traversal]) -> Sheet:
    """A row for each traversal, a column for each of its values."""
    return sheet(torch.cat([each.images for each in moved]), len(moved[0].values), FRAME_SIDE)
