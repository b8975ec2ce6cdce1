"""How straight clips run through a representation of their frames, each frame encoded by itself.

    v_t = z_{t+1} - z_t,   cosine = mean_t <v_t, v_{t+1}> / (|v_t| |v_{t+1}|),   curvature = mean_t arccos of the same, in degrees

Both are means over a clip, then over clips; the angle of a mean cosine is not the mean angle. They do not change when the representation is
rotated, shifted or scaled as a whole, but do when its dimensions are scaled one by one: report raw and standardised values, the
stride, and the pixels of the same clips. Frames that are noise have a cosine of -1/2 in many dimensions, not 0; a random walk has 0.

Source: curvature, Hénaff et al., Nature Neuroscience 22 (2019); cosine, Niu, Savin & Simoncelli (2024), and SAMI, arXiv:2512.17127; against
pixels, Harrington et al. (2023).
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import ttest_1samp

from .checks import as_finite

STILL = 1e-8  # of the spread of all frames: a shorter step has no direction


@dataclass(frozen=True)
class Mean:
    """A mean over clips with its 95 % confidence interval from Student's t, which takes clips as independent."""

    mean: float
    low: float  # NaN with fewer than two clips, as is high
    high: float

    @classmethod
    def of(cls, values: np.ndarray) -> "Mean":
        """Of one value per clip, [N]; NaN marks clips that have none and are left out. NaN where no clip is left."""
        values = values[~np.isnan(values)]
        if len(values) < 2:
            return cls(float(values[0]) if len(values) else np.nan, np.nan, np.nan)
        mean = float(values.mean())
        if np.ptp(values) == 0:
            return cls(mean, mean, mean)
        low, high = ttest_1samp(values, 0.0).confidence_interval()
        return cls(mean, float(low), float(high))


@dataclass(frozen=True)
class ClipStraightness:
    """One value per clip. [N] each; NaN in the first three for a clip with fewer than two steps that have a direction."""

    cosine: np.ndarray  # in [-1, 1]
    curvature: np.ndarray  # degrees, 0 to 180
    path_ratio: np.ndarray  # distance from the first to the last frame over the length of the path
    skipped: np.ndarray  # steps without length; a path goes on after a pause as if there were none


@dataclass(frozen=True)
class Straightness:
    """What a table says about the clips of one representation."""

    cosine: Mean
    curvature: Mean  # degrees
    path_ratio: Mean
    delta_curvature: Mean | None  # degrees, from pixels; negative where the representation is straighter
    clips: int
    static_clips: int  # left out of the means
    skipped_steps: int
    stride: int
    standardized: bool

    def row(self) -> dict[str, float | int | bool]:
        """One flat row: a column per number, intervals as <name>_low and <name>_high."""
        row: dict[str, float | int | bool] = {}
        for name, value in vars(self).items():
            if isinstance(value, Mean):
                row |= {name: value.mean, f"{name}_low": value.low, f"{name}_high": value.high}
            elif value is not None:
                row[name] = value
        return row


def _as_clips(name: str, clips: np.ndarray, stride: int) -> np.ndarray:
    """Every `stride`-th frame, float64 [N, T, D]."""
    clips = as_finite(name, clips)
    if clips.ndim != 3 or 0 in clips.shape:
        raise ValueError(f"{name}: expected [N clips, T frames, D], none of them 0, found shape {list(clips.shape)}")
    if stride < 1:
        raise ValueError(f"stride: expected at least 1, found {stride}")
    if clips.shape[1] <= 2 * stride:
        raise ValueError(f"{name}: expected at least {2 * stride + 1} frames, two steps of stride {stride}, found {clips.shape[1]}")
    return clips[:, ::stride]


def clip_straightness(clips: np.ndarray, *, stride: int = 1, std: np.ndarray | None = None) -> ClipStraightness:
    """Straightness of each clip.

    Args:
        clips: Codes, or pixels, of the frames. [N, T, D] floats.
        stride: Every how many frames one is taken, from the first on.
        std: Standard deviation of each dimension over a dataset, [D]: dimensions are divided by it, and those at 0 left out. None: raw.
    Raises:
        ValueError: wrong rank, values that are not finite, fewer than 3 frames at this stride, or std does not fit.
    """
    clips = _as_clips("clips", clips, stride)
    if std is not None:
        std = as_finite("std", std)
        if std.shape != clips.shape[2:] or not (std >= 0).all() or not std.any():
            raise ValueError(f"std: expected [{clips.shape[2]}], none negative and not all 0, found shape {list(std.shape)}")
        clips = clips[:, :, std > 0] / std[std > 0]
    center = clips.mean((0, 1))
    spread = np.sqrt(np.mean([np.square(clip - center).sum(1).mean() for clip in clips]))
    columns = []
    for clip in clips:
        steps = np.diff(clip, axis=0)  # [T - 1, D]
        lengths = np.linalg.norm(steps, axis=1)
        moves = lengths > STILL * spread
        values = [np.nan] * 3
        if moves.sum() >= 2:
            directions = steps[moves] / lengths[moves, None]
            cosines = np.clip((directions[:-1] * directions[1:]).sum(1), -1.0, 1.0)
            path_ratio = np.linalg.norm(clip[-1] - clip[0]) / lengths.sum()
            values = [cosines.mean(), np.degrees(np.arccos(cosines)).mean(), path_ratio]
        columns.append((*values, np.sum(~moves)))
    cosine, curvature, path_ratio, skipped = np.array(columns).T
    return ClipStraightness(cosine, curvature, path_ratio, skipped.astype(np.int64))


def delta_curvature(clips: np.ndarray, pixels: np.ndarray, *, stride: int = 1, std: np.ndarray | None = None) -> np.ndarray:
    """Curvature of each clip less that of another representation of the same frames.

    Args:
        clips, stride, std: As in `clip_straightness`.
        pixels: The other one, always raw. [N, T, P].
    Returns:
        [N], degrees; negative where `clips` are the straighter ones, NaN where either has no curvature.
    Raises:
        ValueError: as `clip_straightness`; or clips and frames are not as many.
    """
    if np.shape(pixels)[:2] != np.shape(clips)[:2]:
        raise ValueError(f"pixels: expected {list(np.shape(clips)[:2])} clips and frames, as clips has, found {list(np.shape(pixels)[:2])}")
    return clip_straightness(clips, stride=stride, std=std).curvature - clip_straightness(pixels, stride=stride).curvature


def straightness(clips: np.ndarray, *, stride: int = 1, std: np.ndarray | None = None, pixels: np.ndarray | None = None) -> Straightness:
    """Straightness of a set of clips: means over the clips, with confidence intervals.

    Args:
        clips, stride, std: As in `clip_straightness`; with std the result is `standardized`.
        pixels: [N, T, P] of the same frames, for `delta_curvature`; None leaves that out.
    Raises:
        ValueError: as `clip_straightness` and `delta_curvature`.
    """
    each = clip_straightness(clips, stride=stride, std=std)
    return Straightness(
        cosine=Mean.of(each.cosine),
        curvature=Mean.of(each.curvature),
        path_ratio=Mean.of(each.path_ratio),
        delta_curvature=None if pixels is None else Mean.of(delta_curvature(clips, pixels, stride=stride, std=std)),
        clips=len(each.cosine),
        static_clips=int(np.isnan(each.cosine).sum()),
        skipped_steps=int(each.skipped.sum()),
        stride=stride,
        standardized=std is not None,
    )
