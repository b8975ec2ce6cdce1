"""How close a set of generated images is to a set of real ones: FID, KID, precision and recall, on features of any extractor.

Scores are named after the extractor: `fid_random` says how two sets compare under fixed random filters, and is comparable only with other
`fid_random` of the same N; published FID is `fid_inception`. FID is biased upwards, the more the fewer images; KID is not.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import as_finite
from .image_pairs import as_images

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"


class RandomFeatures(nn.Module):
    """Convolutions with fixed random weights: every extractor of one seed is the same, and nothing needs to be downloaded.

    Means over the image of each of four layers' outputs, [B, 3, H, W] in [0, 1] -> [B, 240]. Weights are not trained, so distances
    between features are distances between statistics of edges and colours at several scales, not of content.
    """

    label = "random"
    widths = (16, 32, 64, 128)
    num_features = sum(widths)

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for layer, (below, width) in enumerate(zip((3, *self.widths[:-1]), self.widths, strict=True)):
            weight = torch.randn(width, below, 3, 3, generator=generator) * (2 / (9 * below)) ** 0.5
            self.register_buffer(f"weight_{layer}", weight)

    def forward(self, images: Tensor) -> Tensor:
        h, means = 2 * images - 1, []
        for layer in range(len(self.widths)):
            h = F.relu(F.conv2d(h, self.get_buffer(f"weight_{layer}"), padding=1, stride=min(2, layer + 1)))
            means.append(h.mean((2, 3)))
        return torch.cat(means, 1)


class InceptionFeatures(nn.Module):
    """The 2048 features of the Inception network that FID and KID are published with, resized as there, from a file of weights.

    Args:
        weights: The file, which torch-fidelity reads as a pickle: one that you trust. None looks where torch.hub keeps its own. Nothing is
            downloaded.
    Raises:
        ValueError: torch-fidelity, which has the network, is not installed, or there is no such file.
    """

    label = "inception"
    num_features = 2048

    def __init__(self, weights: Path | str | None = None) -> None:
        super().__init__()
        file = Path(weights) if weights else Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_WEIGHTS
        if not file.is_file():
            raise ValueError(f"weights: expected Inception weights ({INCEPTION_WEIGHTS} of torch-fidelity), found no file {file}")
        from torchmetrics.image.fid import NoTrainInceptionV3

        try:
            self.network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(file), antialias=False)
        except ModuleNotFoundError:
            raise ValueError("weights: expected torch-fidelity to read them with, found none; pip install torch-fidelity") from None

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images * 255).round().byte())


@dataclass(frozen=True)
class SetScores:
    """Scores of one set of images against another."""

    extractor: str
    num_features: int
    num_real: int
    num_generated: int
    fid: float
    kid: float
    kid_std: float  # over subsets
    kid_subset_size: int
    precision: float
    recall: float
    neighbours: int

    def row(self) -> dict[str, float | int | str]:
        """One flat row, the scores named after the extractor: fid_random, kid_random ..."""
        scores = ("fid", "kid", "kid_std", "precision", "recall")
        return {f"{name}_{self.extractor}" if name in scores else name: value for name, value in vars(self).items()}


@torch.no_grad()
def extract(images: Tensor | Iterable[Tensor], extractor: nn.Module, batch_size: int = 256) -> Tensor:
    """Features of images.

    Args:
        images: [N, C, H, W] in [-1, 1], C 1 or 3; or batches of these. Grey ones are repeated to three channels.
        extractor: [B, 3, H, W] float32 in [0, 1] -> [B, F].
        batch_size: Images at a time; bounds the memory.
    Returns:
        [N, F] float64 on the CPU.
    Raises:
        ValueError: no images, or as `image_pairs.as_images`; or the extractor gives no [B, F], or numbers that are not finite.
    """
    device = next((value.device for value in (*extractor.parameters(), *extractor.buffers())), torch.device("cpu"))
    parts = []
    for batch in images.split(batch_size) if isinstance(images, Tensor) else images:
        as_images("images", batch)
        features = extractor(((batch.to(device).float() + 1) / 2).clamp(0, 1).expand(-1, 3, -1, -1))
        if features.dim() != 2 or len(features) != len(batch):
            raise ValueError(f"extractor: expected features [{len(batch)}, F], found {list(features.shape)}")
        parts.append(as_finite_tensor("extractor", features))
    if not parts:
        raise ValueError("images: expected at least one batch, found none")
    return torch.cat(parts)


class _Given(nn.Module):
    """Features that were extracted before, in the place of a network."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def as_finite_tensor(name: str, features: Tensor) -> Tensor:
    """Features as float64 on the CPU; errors as `checks.as_finite`."""
    return torch.from_numpy(as_finite(name, features.detach().cpu().numpy()))


def _as_features(real: Tensor, generated: Tensor, least: int = 2) -> tuple[Tensor, Tensor]:
    for name, features in (("real", real), ("generated", generated)):
        if features.dim() != 2 or features.shape[1] != real.shape[1]:
            raise ValueError(f"{name}: expected features [N, {real.shape[-1]}], found {list(features.shape)}")
        if len(features) < least:
            raise ValueError(f"{name}: expected at least {least} images, found {len(features)}")
    return as_finite_tensor("real", real), as_finite_tensor("generated", generated)


def fid(real: Tensor, generated: Tensor) -> float:
    """Fréchet distance between the Gaussians with the means and covariances of two sets of features.

        |mu_1 - mu_2|^2 + tr(C_1 + C_2) - 2 tr (C_1 C_2)^(1/2)

    Args:
        real, generated: [N, F] and [M, F], N and M at least 2; below F the value is finite and of little use.
    Returns:
        At least 0.
    Raises:
        ValueError: wrong shapes, too few rows, or as `checks.as_finite`.
    Source: Heusel et al., arXiv:1706.08500.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    real, generated = _as_features(real, generated)
    metric = FrechetInceptionDistance(_Given(real.shape[1]))
    center = real.mean(0)  # its covariances are differences of sums, which a large mean would drown
    metric.update(real - center, real=True)
    metric.update(generated - center, real=False)
    return max(0.0, metric.compute().item())


def kid(real: Tensor, generated: Tensor, *, seed: int = 0) -> tuple[float, float, int]:
    """Kernel distance: unbiased squared MMD with the kernel (x.y / F + 1)^3, mean over 100 random subsets.

    Args:
        real, generated: [N, F] and [M, F], N and M at least 2.
        seed: Of the subsets.
    Returns:
        The mean, which may be negative; its standard deviation over subsets; and images per subset: 1000, or as many as both sets have.
    Raises:
        ValueError: wrong shapes, too few rows, or as `checks.as_finite`.
    Source: Bińkowski et al., arXiv:1801.01401.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    real, generated = _as_features(real, generated)
    size = min(KID_SUBSET_SIZE, len(real), len(generated))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):  # it draws with torch's global generator
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save all", UserWarning)
        torch.manual_seed(seed)
        metric = KernelInceptionDistance(_Given(real.shape[1]), subsets=KID_SUBSETS, subset_size=size)
        metric.update(real, real=True)
        metric.update(generated, real=False)
        mean, std = metric.compute()
    return mean.item(), std.item(), size


def precision_recall(real: Tensor, generated: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall: the share of one set within the reach of the other.

    A point is within reach of a set if it lies no further from some member than that member's k-th nearest neighbour in the set.

    Args:
        real, generated: [N, F] and [M, F], N and M at least k + 1.
        neighbours: k.
    Returns:
        Share of generated images within reach of the real ones, and of real ones within reach of the generated ones.
    Raises:
        ValueError: wrong shapes, too few rows, or as `checks.as_finite`.
    Source: Kynkäänniemi et al., arXiv:1904.06991.
    """
    if neighbours < 1:
        raise ValueError(f"neighbours: expected at least 1, found {neighbours}")
    real, generated = _as_features(real, generated, neighbours + 1)
    return _within_reach(generated, real, neighbours), _within_reach(real, generated, neighbours)


def _within_reach(points: Tensor, members: Tensor, neighbours: int) -> float:
    def distances(rows: Tensor) -> Tensor:  # directly: by inner products a point would not be at distance 0 from itself
        return torch.cdist(rows, members, compute_mode="donot_use_mm_for_euclid_dist")

    reach = torch.cat([distances(rows).kthvalue(neighbours + 1, dim=1).values for rows in members.split(256)])  # each row counts itself
    return torch.cat([(distances(rows) <= reach).any(1) for rows in points.split(256)]).double().mean().item()


def compare_sets(
    real: Tensor | Iterable[Tensor],
    generated: Tensor | Iterable[Tensor],
    extractor: nn.Module | None = None,
    *,
    neighbours: int = 3,
    seed: int = 0,
    batch_size: int = 256,
) -> SetScores:
    """Every score of a set of generated images.

    Args:
        real, generated: [N, C, H, W] in [-1, 1], or batches of such.
        extractor: See `extract`; None takes `RandomFeatures`. Its `label`, or else the name of its class, names the scores.
        neighbours: k of `precision_recall`.
        seed: Of the subsets of `kid`.
        batch_size: Images at a time.
    Raises:
        ValueError: as `extract` and the scores themselves.
    """
    extractor = RandomFeatures() if extractor is None else extractor
    features = extract(real, extractor, batch_size), extract(generated, extractor, batch_size)
    kid_mean, kid_std, size = kid(*features, seed=seed)
    precision, recall = precision_recall(*features, neighbours)
    return SetScores(
        extractor=getattr(extractor, "label", type(extractor).__name__.lower()),
        num_features=features[0].shape[1],
        num_real=len(features[0]),
        num_generated=len(features[1]),
        fid=fid(*features),
        kid=kid_mean,
        kid_std=kid_std,
        kid_subset_size=size,
        precision=precision,
        recall=recall,
        neighbours=neighbours,
    )
