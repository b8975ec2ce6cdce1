"""Frames from planes: the compiled core against its twin in plain torch, and both against the formula by hand."""

import pytest
import torch
from helpers import core_launchers

from sami_fast.data import pixels
from sami_fast.data.pixels import yuv_to_rgb

BT601, BT709 = (0.299, 0.114), (0.2126, 0.0722)


def frame(height: int, width: int, down: int, seed: int = 0, smooth: bool = False) -> list[torch.Tensor]:
    """Three planes, each a window of wider rows as decoders leave them."""
    random = torch.Generator().manual_seed(seed)
    planes = []
    for step in (1, down, down):
        h, w = -(-height // step), -(-width // step)
        values = torch.randint(0, 256, (h, w + 7), dtype=torch.uint8, generator=random)
        if smooth:
            values = (torch.arange(h)[:, None] * 100 // h + torch.arange(w + 7)[None] * 100 // w).to(torch.uint8)
        planes.append(values[:, :w])
    return planes


def twin(monkeypatch, *arguments) -> torch.Tensor:
    with monkeypatch.context() as patched:
        patched.setattr(pixels, "core", lambda: None)
        return yuv_to_rgb(*arguments)


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("weights", [BT601, BT709])
@pytest.mark.parametrize(
    ("height", "width", "down", "box", "size"),
    [
        (240, 320, 2, (0, 40, 240), 64),
        (240, 320, 1, (0, 40, 240), 64),
        (64, 64, 2, (0, 0, 64), 64),
        (18, 32, 2, (2, 4, 16), 64),  # enlarged
        (97, 131, 2, (0, 16, 96), 33),
        (97, 131, 1, (0, 17, 97), 31),
        (8, 8, 2, (2, 4, 4), 1),
        (2, 2, 2, (0, 0, 2), 5),
        (1, 1, 1, (0, 0, 1), 3),
        (400, 300, 2, (50, 0, 300), 16),
    ],
)
def test_core_equals_its_twin(monkeypatch, height, width, down, box, size, weights, full_range):
    core_launchers()
    planes = frame(height, width, down)
    found, expected = yuv_to_rgb(*planes, box, size, weights, full_range), twin(monkeypatch, *planes, box, size, weights, full_range)
    assert found.shape == (3, size, size)
    assert found.dtype == torch.uint8
    difference = (found.int() - expected.int()).abs()
    assert difference.max() <= 1  # of sums that round one way or the other
    assert difference.float().mean() < 0.01


@pytest.mark.parametrize(
    ("yuv", "full_range", "rgb"),
    [
        ((16, 128, 128), False, (0, 0, 0)),
        ((235, 128, 128), False, (255, 255, 255)),
        ((81, 90, 240), False, (254, 0, 0)),  # ITU-R BT.601's red, to its own rounding
        ((0, 128, 128), True, (0, 0, 0)),
        ((255, 128, 128), True, (255, 255, 255)),
        ((76, 85, 255), True, (254, 0, 0)),
        ((150, 44, 21), True, (0, 255, 1)),
        ((29, 255, 107), True, (0, 0, 254)),
    ],
)
@pytest.mark.parametrize("by_core", [True, False])
def test_known_colours(monkeypatch, yuv, full_range, rgb, by_core):
    planes = [torch.full((16, 16), value, dtype=torch.uint8) for value in yuv]
    arguments = (*planes, (0, 0, 16), 4, BT601, full_range)
    if by_core:
        core_launchers()
    found = yuv_to_rgb(*arguments) if by_core else twin(monkeypatch, *arguments)
    assert (found - torch.tensor(rgb)[:, None, None]).abs().max() <= 1


def test_a_grey_frame_is_resized_as_an_image_is():
    core_launchers()
    y, *_ = frame(120, 160, 1)
    neutral = torch.full((120, 160), 128, dtype=torch.uint8)
    found = yuv_to_rgb(y, neutral, neutral, (0, 20, 120), 32, BT601, True)
    expected = pixels.resize(y[None, None], 32)[0]
    assert torch.equal(found[0], found[1])
    assert (found[:1].int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((0, 0, 18), "leaves the frame"),
        ((-2, 0, 4), "leaves the frame"),
        ((1, 0, 4), "whole pixels"),
        ((0, 0, 0), "leaves the frame"),
        ((2**63 - 1, 0, 1), "leaves the frame"),
        ((0, 2**63 - 8, 8), "leaves the frame"),
    ],
)
def test_a_square_that_does_not_fit(box, message):
    core_launchers()
    with pytest.raises(RuntimeError, match=message):
        yuv_to_rgb(*frame(16, 16, 2), box, 4, BT601, False)
