"""The random numbers of every backend against the reference, bit for bit."""

import pytest
import torch
from helpers import LaunchersOn

from sami_fast import reference
from sami_fast.ops.backend import BACKENDS

DRAWS = ["random_normal", "random_uniform"]
PLACES = [(0, 0, 0), (2**31, 2**32 - 1, 15), (2**63 - 1, 2**40, 3), (7, 2**59 - 1, 1)]
SIZES = [1, 3, 4, 63, 64, 255, 256, 257, 1000, 4100]


@pytest.fixture(params=BACKENDS)
def core(request):
    return LaunchersOn("random", request.param)


class Strata:
    """stratified_uniform, whose twin has a file of its own."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.launchers = LaunchersOn("stratified_uniform" if backend == "reference" else "random", backend)

    def __call__(self, *args, **options) -> torch.Tensor:
        return self.launchers.stratified_uniform(*args, **options)


@pytest.fixture
def strata(core):
    return Strata(core.backend)


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal as 32-bit patterns, signs of zeros included."""
    assert found.dtype == expected.dtype == torch.float32
    return torch.equal(found.cpu().view(torch.int32), expected.contiguous().view(torch.int32))


# Values


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("draw", DRAWS)
def test_draws(core, draw, size):
    for place in PLACES:
        index = torch.tensor([0, 5, 2**33 + 1, 2**61, 4])
        found = getattr(core, draw)(*place, index, size)
        assert found.is_contiguous()
        assert same_bits(found, getattr(reference, draw)(*place, index, size))


@pytest.mark.parametrize("core", ["cpp", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("draw", DRAWS)
def test_a_million_draws(core, draw):
    index = torch.arange(64) * 3
    assert same_bits(getattr(core, draw)(11, 4, 0, index, 16384), getattr(reference, draw)(11, 4, 0, index, 16384))


@pytest.mark.parametrize("levels", [1, 2, 4, 5])
@pytest.mark.parametrize("global_batch", [1, 2, 63, 1000])
def test_strata(strata, global_batch, levels):
    for seed, step in ((0, 0), (2**40, 7), (3, 2**35)):
        index = reference.random_permutation(1, step, 0, global_batch)[:50]
        found = strata(index, levels, global_batch, seed=seed, step=step)
        assert same_bits(found, reference.stratified_uniform(index, levels, global_batch, seed=seed, step=step))


def test_one_image_may_be_asked_for_twice(strata):
    index = torch.tensor([4, 4, 0])
    assert same_bits(strata(index, 3, 9, seed=1, step=1), reference.stratified_uniform(index, 3, 9, seed=1, step=1))


# Odd inputs


@pytest.mark.parametrize("draw", DRAWS)
def test_strided_and_misaligned_indices(core, strata, draw):
    index = torch.arange(1, 40)
    for view in (index[::3], index[1:], index.view(13, 3)[:, 1]):
        assert same_bits(getattr(core, draw)(5, 6, 2, view, 30), getattr(reference, draw)(5, 6, 2, view.clone(), 30))
    assert same_bits(strata(index[1::2], 2, 40, seed=1, step=2), reference.stratified_uniform(index[1::2], 2, 40, seed=1, step=2))


def test_no_samples_and_no_elements(core, strata):
    nobody, some = torch.zeros(0, dtype=torch.int64), torch.arange(3)
    for draw in DRAWS:
        assert getattr(core, draw)(0, 0, 0, nobody, 5).shape == (0, 5)
        assert getattr(core, draw)(0, 0, 0, some, 0).shape == (3, 0)
    assert strata(nobody, 2, 8, seed=0, step=0).shape == (0, 2)
    assert strata(some, 0, 8, seed=0, step=0).shape == (3, 0)


@pytest.mark.parametrize("core", ["cpp"], indirect=True)
@pytest.mark.parametrize(("samples", "size"), [(1, 100_000), (500, 10), (7, 3000)])
def test_number_of_threads(core, samples, size):
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append([getattr(core, draw)(1, 2, 3, torch.arange(samples), size) for draw in DRAWS])
    assert all(same_bits(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


# Error messages


@pytest.mark.parametrize("core", ["cpp", "cuda"], indirect=True)
def test_errors(core):
    with pytest.raises(RuntimeError, match=r"expected index \[S\] int64"):
        core.random_normal(0, 0, 0, torch.zeros(2, 2, dtype=torch.int64), 4)
    with pytest.raises(RuntimeError, match=r"expected index \[S\] int64"):
        core.random_uniform(0, 0, 0, torch.zeros(2), 4)


@pytest.mark.parametrize("place", [-1, 8])
def test_an_image_outside_the_batch(strata, place):
    """On a GPU nobody waits for the answer, so there it gets NaN."""
    index = torch.tensor([0, place])
    if strata.backend == "cpp":
        with pytest.raises(RuntimeError, match=f"expected 0 <= index < 8, found {place}"):
            strata(index, 2, 8, seed=0, step=0)
    elif strata.backend != "reference":  # which indexes, as torch does
        found = strata(index, 2, 8, seed=0, step=0)
        assert same_bits(found[:1], reference.stratified_uniform(index[:1], 2, 8, seed=0, step=0))
        assert found[1].isnan().all()
