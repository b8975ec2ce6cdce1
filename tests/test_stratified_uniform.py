"""u = (k + (rank(b) + v_bk) / global_batch) / K: one image covers all strata, the batch covers every cell of the line."""

import numpy as np
import pytest
import torch
from helpers import LaunchersOn
from scipy import stats

from sami_fast.reference.random import Stream, random_bits, random_uniform
from sami_fast.reference.stratified_uniform import stratified_uniform

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# Values


@pytest.mark.parametrize(("levels", "batch"), [(1, 1), (4, 1), (1, 63), (3, 7), (8, 40)])
def test_every_number(levels, batch):
    """One image after the other: keys sorted by Python, float32 arithmetic by numpy."""
    keys = [(a << 31) | (b >> 1) for a, b in random_bits(6, 5, Stream.RANK, torch.arange(batch), 2)[:, 0, :2].tolist()]
    order = sorted(range(batch), key=keys.__getitem__)
    index = torch.arange(batch).flip(0)
    found = stratified_uniform(index, levels, batch, seed=6, step=5).numpy()
    assert found.shape == (batch, levels)
    assert found.dtype == np.float32
    for b, place in enumerate(index.tolist()):
        v = random_uniform(6, 5, Stream.LOGSNR, torch.tensor([place]), levels)[0].numpy()
        for k in range(levels):
            inner = (np.float32(order[place]) + v[k]) / np.float32(batch)
            assert found[b, k] == (np.float32(k) + inner) / np.float32(levels)


@pytest.mark.parametrize(("levels", "batch"), [(1, 50), (4, 25), (5, 3)])
def test_the_batch_covers_every_cell_and_an_image_every_stratum(levels, batch):
    u = stratified_uniform(torch.arange(batch), levels, batch, seed=1, step=2).double()
    assert (u * levels).floor().long().tolist() == [list(range(levels))] * batch
    assert (u * levels * batch).floor().long().flatten().sort().values.tolist() == list(range(levels * batch))


def test_every_number_is_uniform_over_its_stratum():
    draws = torch.cat([stratified_uniform(torch.tensor([4]), 2, 9, seed=8, step=step) for step in range(500)]).double()
    for k in range(2):
        assert stats.kstest(2 * draws[:, k].numpy() - k, "uniform").pvalue > 1e-3


def test_an_image_does_not_depend_on_its_company():
    whole = stratified_uniform(torch.arange(20), 3, 20, seed=2, step=7)
    for places in ([0], [19, 3], list(range(5, 11))):
        assert torch.equal(stratified_uniform(torch.tensor(places), 3, 20, seed=2, step=7), whole[places])


# Kernels, bit for bit


@pytest.fixture(params=["cpp", "triton", "cuda"])
def kernels(request):
    return LaunchersOn("random", request.param)


def assert_same(kernels, index: torch.Tensor, levels: int, batch: int, **place: int) -> None:
    found = kernels.stratified_uniform(index.to(DEVICE), levels, batch, **place)
    expected = stratified_uniform(index, levels, batch, **place)
    assert found.dtype == torch.float32
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize(("levels", "batch"), [(1, 1), (9, 1), (4, 31), (3, 33), (1, 63), (5, 128), (16, 150)])
def test_kernels_whole_batch(kernels, levels, batch):
    assert_same(kernels, torch.arange(batch), levels, batch, seed=3, step=4)


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (1, 1), (2**32 - 1, 2**28 - 1), (2**31, 2**28), (2**64 - 1, 2**59 - 1)])
def test_kernels_seed_and_step(kernels, seed, step):
    seed = seed if kernels.backend == "triton" else seed % 2**63  # operators take 64 bits with a sign
    assert_same(kernels, torch.tensor([40, 0, 7, 69]), 4, 70, seed=seed, step=step)


def test_kernels_odd_indices(kernels):
    assert_same(kernels, torch.arange(80)[::3], 2, 80, seed=0, step=1)  # non-contiguous
    assert_same(kernels, torch.tensor([5, 5, 60, 5]), 2, 61, seed=0, step=1)  # the same image more than once
    assert_same(kernels, torch.arange(99, 20, -1), 6, 100, seed=0, step=1)


@pytest.mark.parametrize(("images", "levels", "batch"), [(0, 3, 10), (0, 1, 0), (4, 0, 10)])
def test_nothing_to_draw(kernels, images, levels, batch):
    index = torch.zeros(images, dtype=torch.int64)
    assert stratified_uniform(index, levels, batch, seed=0, step=0).shape == (images, levels)
    assert kernels.stratified_uniform(index.to(DEVICE), levels, batch, seed=0, step=0).shape == (images, levels)


@pytest.mark.gpu
@pytest.mark.parametrize(("levels", "batch"), [(1, 1000), (4, 4096), (8, 20_000)])
def test_kernels_at_real_sizes(kernels, levels, batch):
    assert_same(kernels, torch.arange(batch), levels, batch, seed=2**60 + 1, step=2**40)
    assert_same(kernels, torch.arange(0, batch, 8) + 3, levels, batch, seed=2**60 + 1, step=2**40)
    # the reference on the GPU has the same bits
    index = torch.arange(batch)
    on_gpu = stratified_uniform(index.to(DEVICE), levels, batch, seed=1, step=2)
    assert torch.equal(on_gpu.cpu(), stratified_uniform(index, levels, batch, seed=1, step=2))
