"""Scores of image pairs and image sets whose value is known; skimage, scipy and plain formulas as second opinions."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn
from torchmetrics.functional.image import peak_signal_noise_ratio

from sami_fast.metrics.image_pairs import lpips, mse, psnr, ssim
from sami_fast.metrics.image_sets import InceptionFeatures, RandomFeatures, compare_sets, extract, fid, kid, precision_recall


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def images(count: int = 4, channels: int = 3, side: int = 24, seed: int = 0) -> torch.Tensor:
    """Smooth pictures in [-1, 1], float32."""
    coarse = torch.rand(count, channels, 5, 7, generator=torch.Generator().manual_seed(seed))
    return 2 * torch.nn.functional.interpolate(coarse, (side, side + 6), mode="bicubic").clamp(0, 1) - 1


def noisy(x: torch.Tensor, amount: float = 0.1, seed: int = 1) -> torch.Tensor:
    return (x + amount * normal(*x.shape, seed=seed).to(x)).clamp(-1, 1)


# Pairs


def test_mse_and_psnr_of_known_errors():
    x = torch.zeros(2, 3, 4, 5)
    y = torch.stack((x[0] + 0.2, x[1]))  # 0.1 of the range, and nothing
    assert torch.allclose(mse(x, y), torch.tensor([0.01, 0.0], dtype=torch.float64), atol=1e-9)
    assert psnr(x, y)[0].item() == pytest.approx(20.0, abs=1e-5)
    assert psnr(x, y)[1].item() == math.inf


def test_psnr_against_torchmetrics():
    x = images()
    y = noisy(x)
    expected = peak_signal_noise_ratio((x + 1) / 2, (y + 1) / 2, data_range=1.0, reduction="none", dim=(1, 2, 3))
    assert torch.allclose(psnr(x, y), expected.double(), atol=1e-4)


def test_ssim_of_equal_and_of_constant_images():
    x = images()
    assert torch.allclose(ssim(x, x), torch.ones(4, dtype=torch.float64), atol=1e-12)
    constant = torch.zeros(1, 1, 11, 11)  # 0.5 against 0.6 in [0, 1]
    assert ssim(constant, constant + 0.2).item() == pytest.approx((2 * 0.3 + 1e-4) / (0.61 + 1e-4), abs=1e-8)
    assert ssim(constant, constant + 0.2).item() == pytest.approx(0.983609, abs=5e-7)


@pytest.mark.parametrize(("channels", "side"), [(1, 11), (1, 30), (3, 24)])
def test_ssim_against_skimage(channels, side):
    structural_similarity = pytest.importorskip("skimage.metrics").structural_similarity
    x = images(3, channels, side)
    y = noisy(x, 0.3)
    expected = [
        structural_similarity(
            (a.numpy().astype(np.float64) + 1) / 2,
            (b.numpy().astype(np.float64) + 1) / 2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1.0,
            channel_axis=0,
        )
        for a, b in zip(x, y, strict=True)
    ]
    np.testing.assert_allclose(ssim(x, y).numpy(), expected, atol=1e-8)


def test_ssim_takes_no_pixel_from_beyond_the_image():
    """Of 12 x 11 pixels two windows fit: the mean is theirs, computed here by hand."""
    x, y = images(1, 1, 24)[:, :, :12, :11], images(1, 1, 24, seed=5)[:, :, :12, :11]
    weight = torch.exp(-torch.arange(-5.0, 6.0).double().square() / (2 * 1.5**2))
    window = torch.outer(weight, weight) / weight.sum() ** 2
    values = []
    for top in (0, 1):
        a, b = (((part[0, 0, top : top + 11].double()) + 1) / 2 for part in (x, y))
        mean_a, mean_b = (window * a).sum(), (window * b).sum()
        var_a, var_b = (window * a**2).sum() - mean_a**2, (window * b**2).sum() - mean_b**2
        cov = (window * a * b).sum() - mean_a * mean_b
        c1, c2 = 0.01**2, 0.03**2
        values.append(((2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).item())
    assert ssim(x, y).item() == pytest.approx(np.mean(values), abs=1e-6)


def test_ssim_does_not_mind_which_way_up_but_channels_last_is_refused():
    x = images()
    y = noisy(x)
    assert torch.allclose(ssim(x, y), ssim(x.transpose(2, 3), y.transpose(2, 3)), atol=1e-12)
    for score in (mse, ssim, lpips):
        with pytest.raises(ValueError, match=r"x: expected \[N, C, H, W\] with 1 or 3 channels, found \[4, 24, 30, 3\]"):
            score(x.permute(0, 2, 3, 1), y.permute(0, 2, 3, 1))


def test_pairs_are_scored_one_by_one():
    x = images(5)
    y = noisy(x)
    for score in (mse, psnr, ssim):
        assert score(x, y).shape == (5,)
        assert score(x, y).dtype == torch.float64
        assert torch.allclose(score(x, y)[2:3], score(x[2:3], y[2:3]), atol=1e-12)
    assert torch.allclose(ssim(x, y), ssim(x, y, batch_size=2), atol=1e-12)


def test_lpips_without_its_weights_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"lpips: expected (torchvision|the weights of)"):
        lpips(torch.zeros(1, 1, 32, 32), torch.zeros(1, 1, 32, 32))


# Distances between sets of features


def test_fid_of_equal_and_of_moved_sets():
    x = normal(400, 8)
    scale = x.var(0).sum().item()
    assert fid(x, x) == pytest.approx(0.0, abs=1e-6 * scale)
    assert fid(x, x + 0.3) == pytest.approx(8 * 0.3**2, rel=1e-8)
    centred = x - x.mean(0)
    assert fid(centred, 2 * centred) == pytest.approx(scale, rel=1e-8)  # (s - 1)^2 tr C
    assert fid(centred, 0.5 * centred) == pytest.approx(0.25 * scale, rel=1e-8)
    assert fid(x + 1e6, x + 1e6 + 0.3) == pytest.approx(8 * 0.3**2, rel=1e-6)  # a large mean costs no digits


@pytest.mark.parametrize("size", [3, 20])
def test_fid_against_the_matrix_square_root(size):
    x, y = normal(300, size), normal(200, size, seed=1) @ (torch.eye(size) + 0.3 * normal(size, size, seed=2)) + 0.1
    a, b = np.cov(x.numpy().T), np.cov(y.numpy().T)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum().item() + np.trace(a) + np.trace(b) - 2 * np.trace(sqrtm(a @ b)).real
    assert fid(x, y) == pytest.approx(expected, rel=1e-8)
    assert fid(x, y) == pytest.approx(fid(y, x), rel=1e-10)


def test_fid_of_fewer_images_than_features():
    x, y = normal(10, 50), normal(12, 50, seed=1)
    # tr (C1 C2)^(1/2) is the sum of singular values of the product of the centred sets
    a, b = ((part - part.mean(0)) / math.sqrt(len(part) - 1) for part in (x, y))
    expected = (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum()
    assert fid(x, y) == pytest.approx(expected.item(), rel=1e-6)
    assert fid(x, x) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(("count", "expected"), [(100, 22.1), (500, 4.5), (2000, 1.1)])
def test_fid_is_biased_by_few_images(count, expected):
    assert fid(normal(count, 64), normal(count, 64, seed=1)) == pytest.approx(expected, rel=0.05)


def test_kid_by_hand():
    x, y = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    assert kid(x, y) == (pytest.approx(-2.375), pytest.approx(0.0), 2)
    assert kid(x, x)[0] == pytest.approx(-2.375)


def test_kid_is_unbiased_and_seeded():
    same, other = kid(normal(600, 16), normal(600, 16, seed=1)), kid(normal(600, 16), normal(600, 16, seed=1) + 0.5)
    assert abs(same[0]) < 0.02
    assert other[0] > 0.1
    assert same[2] == 600
    x, y = normal(1500, 4), normal(1200, 4, seed=1)
    before = torch.get_rng_state()
    found = kid(x, y, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert found[2] == 1000
    assert found[1] > 0
    assert found == kid(x, y, seed=3)
    assert found != kid(x, y, seed=4)


def test_precision_and_recall_of_known_sets():
    x = normal(500, 4)
    assert precision_recall(x, x) == (1.0, 1.0)
    assert precision_recall(x, x + 1000) == (0.0, 0.0)
    precision, recall = precision_recall(x, x[:1].expand(500, -1))  # everything at one real image
    assert precision == 1.0
    assert recall == 1 / 500
    precision, recall = precision_recall(x, 3 * normal(500, 4, seed=1))
    assert precision == pytest.approx(0.15, abs=0.05)
    assert recall == pytest.approx(0.98, abs=0.02)


def test_precision_and_recall_by_hand():
    real, generated = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[4.9], [5.1], [2.0]])
    # nearest neighbours lie at 1, 1 and 2 in the real set, at .2, .2 and 2.9 in the other
    assert precision_recall(real, generated, neighbours=1) == (pytest.approx(2 / 3), 1.0)


def test_a_copied_set_with_repeats_reaches_itself():
    x = torch.cat((normal(10, 6), normal(10, 6)))  # nearest neighbours at distance 0
    assert precision_recall(x, x, neighbours=1) == (1.0, 1.0)


# Extractors, and all of it


def test_random_features_are_fixed():
    x = (images(6) + 1) / 2
    first, second = RandomFeatures(), RandomFeatures()
    torch.manual_seed(5)
    assert torch.equal(first(x), second(x))
    assert first(x).shape == (6, first.num_features)
    assert not torch.allclose(first(x), RandomFeatures(seed=1)(x), atol=1e-2)
    assert not list(first.parameters())
    assert RandomFeatures()(torch.rand(2, 3, 8, 8)).isfinite().all()
    # these numbers are what makes scores of different machines comparable
    probe = first(torch.linspace(0, 1, 3 * 16 * 16).view(1, 3, 16, 16))[0]
    assert probe.sum().item() == pytest.approx(36.676, rel=1e-4)


def test_extract_batches_and_repeats_grey():
    x = images(7, 1)
    found = extract(x, RandomFeatures(), batch_size=3)
    assert found.dtype == torch.float64
    assert torch.allclose(found, extract(x.expand(-1, 3, -1, -1), RandomFeatures()), atol=1e-6)
    assert torch.allclose(found, extract((x[:2], x[2:]), RandomFeatures()), atol=1e-6)

    class Recorder(nn.Module):
        def forward(self, x):
            assert x.dtype == torch.float32
            assert x.min() >= 0
            assert x.max() <= 1
            return x.mean((2, 3))

    assert torch.allclose(extract(x, Recorder()), ((x + 1) / 2).mean((2, 3)).expand(-1, 3).double(), atol=1e-6)


def test_compare_sets_tells_like_from_unlike():
    real, like, blurred = images(200, seed=1), images(200, seed=2), 0.3 * images(200, seed=3)
    near, far = compare_sets(real, like), compare_sets(real, blurred)
    assert far.fid > 10 * near.fid
    assert far.kid > 10 * abs(near.kid)
    assert near.precision > 0.7
    assert near.recall > 0.7
    assert far.precision < 0.2
    assert (near.extractor, near.num_features, near.num_real, near.num_generated) == ("random", 240, 200, 200)
    row = near.row()
    assert row["fid_random"] == near.fid
    assert "fid" not in row
    assert (row["num_real"], row["kid_subset_size"], row["neighbours"]) == (200, 200, 3)
    features = [extract(part, RandomFeatures()) for part in (real, like)]
    assert near.fid == fid(*features)
    assert (near.precision, near.recall) == precision_recall(*features)

    class Mine(nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    assert "fid_mine" in compare_sets(real, like, Mine()).row()


def test_inception_without_its_weights_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"weights: expected Inception weights .*, found no file"):
        InceptionFeatures()
    with pytest.raises(ValueError, match=r"found no file .*mine\.pth"):
        InceptionFeatures(tmp_path / "mine.pth")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: mse(torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 8, 8)),
            r"x: expected \[N, C, H, W\] with 1 or 3 channels, found \[1, 2, 8, 8\]",
        ),
        (lambda: mse(torch.zeros(3, 8, 8), torch.zeros(3, 8, 8)), r"found \[3, 8, 8\]"),
        (lambda: mse(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 9)), r"y: expected \[1, 1, 8, 8\], as x has, found \[1, 1, 8, 9\]"),
        (lambda: mse(torch.zeros(1, 1, 8, 8), torch.full((1, 1, 8, 8), 255.0)), r"y: expected values in \[-1, 1\], found 255 to 255"),
        (lambda: mse(torch.zeros(1, 1, 8, 8), torch.full((1, 1, 8, 8), math.nan)), r"y: expected values in \[-1, 1\], found nan"),
        (lambda: ssim(torch.zeros(1, 1, 10, 20), torch.zeros(1, 1, 10, 20)), "at least 11 x 11 pixels, found 10 x 20"),
        (lambda: lpips(torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16)), "at least 31 x 31 pixels, found 16 x 16"),
        (lambda: fid(torch.zeros(5, 3), torch.zeros(5, 4)), r"generated: expected features \[N, 3\], found \[5, 4\]"),
        (lambda: fid(torch.zeros(1, 3), torch.zeros(5, 3)), "real: expected at least 2 images, found 1"),
        (lambda: kid(torch.zeros(4, 3), torch.zeros(1, 3)), "generated: expected at least 2 images, found 1"),
        (lambda: precision_recall(torch.zeros(3, 3), torch.zeros(5, 3)), "real: expected at least 4 images, found 3"),
        (lambda: precision_recall(torch.zeros(5, 3), torch.zeros(5, 3), 0), "neighbours: expected at least 1, found 0"),
        (lambda: extract(torch.zeros(2, 3, 4, 4), nn.Identity()), r"extractor: expected features \[2, F\], found \[2, 3, 4, 4\]"),
        (lambda: extract(iter(()), nn.Identity()), "images: expected at least one batch, found none"),
        (lambda: extract(torch.zeros(2, 4, 4, 3), RandomFeatures()), r"images: expected \[N, C, H, W\] with 1 or 3 channels"),
    ],
)
def test_errors_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
