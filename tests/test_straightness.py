"""Straightness of clips whose shape is known."""

import math

import numpy as np
import pytest
from scipy.stats import bootstrap

from sami_fast.metrics.straightness import Mean, clip_straightness, delta_curvature, straightness

T = 37


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def rotation(size: int, seed: int = 3) -> np.ndarray:
    return np.linalg.qr(normal(size, size, seed=seed))[0]


def circle(sides: int) -> np.ndarray:
    angle = np.arange(T) * 2 * math.pi / sides
    return np.column_stack((np.cos(angle), np.sin(angle)))


SQUARE = np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0, 0], [1, 0]], dtype=float)
ZIGZAG = np.column_stack((np.arange(T) % 2, np.zeros(T)))
SHAPES = {  # clip, angle, cosine, path ratio
    "line": (np.outer(np.arange(T), [1.0, 2.0, -0.5]), 0.0, 1.0, 1.0),
    "accelerating line": (np.outer(np.arange(T) ** 2, [1.0, 2.0, -0.5]), 0.0, 1.0, 1.0),
    "36-gon": (circle(36), 10.0, math.cos(math.radians(10)), 0.0),
    "square": (SQUARE, 90.0, 0.0, 1 / 5),
    "zig-zag": (ZIGZAG, 180.0, -1.0, 0.0),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_known_shapes(shape):
    clip, angle, cosine, ratio = SHAPES[shape]
    found = clip_straightness(clip[None])
    # arccos turns rounding of 1e-16 in the cosine into 1e-8 radians at 0 and 180 degrees
    assert found.curvature[0] == pytest.approx(angle, abs=3e-6)
    assert found.cosine[0] == pytest.approx(cosine, abs=1e-12)
    assert found.path_ratio[0] == pytest.approx(ratio, abs=1e-12)
    assert found.skipped[0] == 0


def test_the_36_gon_as_published():
    assert clip_straightness(circle(36)[None]).cosine[0] == pytest.approx(0.98481, abs=5e-6)


def test_a_random_walk_turns_by_a_right_angle():
    found = straightness(normal(50, 41, 4096, seed=1).cumsum(1))
    assert found.curvature.mean == pytest.approx(90.0, abs=0.1)
    assert found.cosine.mean == pytest.approx(0.0, abs=0.002)


@pytest.mark.parametrize(("size", "cosine"), [(4096, -0.5), (8, -0.478), (2, -0.405), (1, -1 / 3)])
def test_frames_of_noise(size, cosine):
    """Independent frames turn by 120 degrees in any number of dimensions; the cosine depends on it."""
    count = 20 if size == 4096 else 4000
    found = straightness(normal(count, 41, size, seed=2))
    assert found.curvature.mean == pytest.approx(120.0, abs=0.5)
    assert found.cosine.mean == pytest.approx(cosine, abs=0.003)


def test_pauses_are_skipped_and_counted():
    square = np.repeat(SQUARE, [1, 1, 3, 1, 2, 1], axis=0)  # three steps of no length
    found = clip_straightness(square[None])
    assert found.curvature[0] == pytest.approx(90.0)
    assert found.skipped.tolist() == [3]
    assert found.path_ratio[0] == pytest.approx(1 / 5)


def test_static_clips_leave_the_means_alone():
    moving = normal(5, 11, 3)
    one_step = np.zeros((1, 11, 3))
    one_step[:, 6:] = 1.0  # a single step turns nowhere
    clips = np.concatenate((moving, np.full((1, 11, 3), 0.7), one_step))
    each = clip_straightness(clips)
    assert (
        np.isnan(each.cosine).tolist()
        == np.isnan(each.curvature).tolist()
        == np.isnan(each.path_ratio).tolist()
        == [False] * 5 + [True] * 2
    )
    assert each.skipped.tolist() == [0] * 5 + [10, 9]
    found, without = straightness(clips), straightness(moving)
    assert (found.clips, found.static_clips, found.skipped_steps) == (7, 2, 19)
    assert (found.cosine, found.curvature, found.path_ratio) == (without.cosine, without.curvature, without.path_ratio)


def test_nothing_moves():
    found = straightness(np.ones((3, 5, 2)))
    assert math.isnan(found.curvature.mean)
    assert math.isnan(found.curvature.low)
    assert (found.static_clips, found.skipped_steps) == (3, 12)
    # frames that differ by rounding alone stand still beside clips that move
    clips = np.concatenate((np.full((1, 9, 4), 1.0) + 1e-12 * normal(1, 9, 4), normal(3, 9, 4)))
    assert straightness(clips).static_clips == 1


def test_rotation_shift_and_scale_change_nothing_but_single_axes_do():
    clips = normal(6, 12, 5).cumsum(1)
    found = clip_straightness(clips)
    moved = clip_straightness(1e-6 * clips @ rotation(5) + 1e-3)
    for name in ("cosine", "curvature", "path_ratio"):
        np.testing.assert_allclose(getattr(moved, name), getattr(found, name), rtol=1e-9, atol=1e-12)
    assert np.abs(clip_straightness(clips * [1, 1, 1, 1, 50]).curvature - found.curvature).min() > 5


def test_standardized():
    clips, scale = normal(6, 12, 4).cumsum(1), np.array([3.0, 0.1, 1.0, 20.0])
    found = straightness(clips * scale, std=scale)
    assert found.standardized
    assert found.cosine.mean == pytest.approx(straightness(clips).cosine.mean, abs=1e-12)
    assert not straightness(clips).standardized
    wide = np.concatenate((clips, np.ones((6, 12, 1))), 2)  # a dimension that never varies
    assert clip_straightness(wide, std=np.array([1.0, 1, 1, 1, 0])).curvature == pytest.approx(clip_straightness(clips).curvature)


def test_stride():
    clips = normal(3, 21, 4)
    found, expected = clip_straightness(clips, stride=4), clip_straightness(clips[:, ::4])
    assert np.array_equal(found.curvature, expected.curvature)
    assert straightness(clips, stride=4).stride == 4
    # a circle turns by the stride's multiple
    assert clip_straightness(circle(36)[None], stride=3).curvature[0] == pytest.approx(30.0, abs=1e-6)


def test_delta_curvature():
    angles = np.repeat(np.array([[6.0], [8.0], [12.0]]), T, 1) * np.arange(T)
    latents = np.stack([np.stack((np.cos(a), np.sin(a)), 1) for a in np.radians(angles)])
    pixels = np.stack([circle(18)] * 3) @ np.array([[1.0, 0, 0], [0, 0, 1.0]])  # 20 degrees
    np.testing.assert_allclose(delta_curvature(latents, pixels), [-14.0, -12.0, -8.0], atol=1e-6)
    found = straightness(latents, pixels=pixels).delta_curvature
    assert found.mean == pytest.approx(-34 / 3)
    assert found.low < -34 / 3 < found.high
    assert straightness(latents).delta_curvature is None
    static = pixels.copy()
    static[1] = 0.0
    assert np.isnan(delta_curvature(latents, static)).tolist() == [False, True, False]


def test_interval_against_the_bootstrap_and_its_coverage():
    values = normal(200) + 3.0
    found = Mean.of(values)
    assert found.mean == pytest.approx(values.mean())
    percentile = bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    assert (found.low, found.high) == pytest.approx(tuple(percentile), abs=0.01)
    covered = [low.low < 0 < low.high for low in (Mean.of(row) for row in normal(2000, 5, seed=4))]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)  # three standard errors; with 5 clips too
    assert math.isnan(Mean.of(np.array([1.0, np.nan])).low)
    assert Mean.of(np.full(4, 2.5)) == Mean(2.5, 2.5, 2.5)


def test_row():
    clips = normal(4, 6, 3)
    row = straightness(clips, pixels=normal(4, 6, 9, seed=1)).row()
    found = straightness(clips)
    assert (row["cosine"], row["cosine_low"], row["cosine_high"]) == (found.cosine.mean, found.cosine.low, found.cosine.high)
    assert {"curvature", "path_ratio", "delta_curvature", "clips", "static_clips", "skipped_steps", "stride", "standardized"} < row.keys()
    assert "delta_curvature" not in found.row()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: straightness(np.zeros((3, 4))), r"clips: expected \[N clips, T frames, D\], none of them 0, found shape \[3, 4\]"),
        (lambda: straightness(np.zeros((0, 4, 2))), r"found shape \[0, 4, 2\]"),
        (lambda: straightness(np.full((1, 4, 2), np.nan)), "clips: expected finite numbers"),
        (lambda: straightness(np.zeros((1, 2, 2))), "clips: expected at least 3 frames, two steps of stride 1, found 2"),
        (lambda: straightness(np.zeros((1, 6, 2)), stride=3), "clips: expected at least 7 frames, two steps of stride 3, found 6"),
        (lambda: straightness(np.zeros((1, 6, 2)), stride=0), "stride: expected at least 1, found 0"),
        (lambda: straightness(np.zeros((1, 6, 2)), std=np.ones(3)), r"std: expected \[2\], none negative and not all 0, found shape \[3\]"),
        (lambda: straightness(np.zeros((1, 6, 2)), std=np.zeros(2)), "std: expected"),
        (
            lambda: straightness(np.zeros((2, 6, 2)), pixels=np.zeros((2, 5, 9))),
            r"pixels: expected \[2, 6\] clips and frames, as clips has, found \[2, 5\]",
        ),
    ],
)
def test_errors_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
