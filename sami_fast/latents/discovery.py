"""Axes of latent space found without labels: which directions a noise level leaves undecided, and their order from coarse to fine.

At a noise level, several x_0' ~ p(x_0|x_t) are drawn by the unconditional reverse process and encoded. The covariance of their means
within one draw set, averaged over x_t, is what x_t leaves open. By the law of total covariance it is a part of that over the data:

    within(logsnr) v = share total v,   v^T total v = 1

    level      one level's generalised eigenvectors
    scale      one set of directions for all levels, by joint approximate diagonalisation; each axis has a share that falls with logsnr,
               and its scale is the logsnr at which a quarter of it is left undecided: draws from the noisiest levels are narrower than
               the data where the denoiser is not perfect, and a larger share may never be reached
    pca        principal axes of mu over the data: the aggregated posterior's, blind to noise levels
    gradient   E[ J J^T ] v = value total v with J = d mu / d x at clean images: axes that small changes of pixels move most
    ica        independent components of mu over the data (FastICA): what tells factors of one scale apart, unless they are Gaussian

All coordinates have unit variance over the data. Axes whose shares fall alike cannot be told apart, in `level` and `scale` any rotation
of them fits; nor do PCA's where the latents are white. Source: SAMI, arXiv:2512.17127, axes from the model's own probabilities.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.linalg import eigh
from scipy.stats import kurtosis
from sklearn.decomposition import FastICA
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from .. import ops
from ..methods.latent_model import LatentModel
from ..metrics.bound import Images
from ..metrics.checks import as_table
from ..metrics.latents import LIVE_RULE, information_per_dim, live_dims, whitening
from ..metrics.scale_profile import as_levels, half_point
from ..progress import bar
from ..schedule import Schedule, alpha_sigma
from .axes import Axes

DISCOVERY_STEP = 2 * ops.EVALUATION_STEP  # evaluation's own noise lies below
MAX_DRAWS = 1 << 16
NUM_LEVELS = 8
NUM_STEPS, MIN_STEPS = 32, 4
UNDECIDED = 0.25


@dataclass(frozen=True)
class Discovered:
    """As many axes as there are live latent dimensions, A of them; directions and readouts are 0 in the other dimensions.

    coordinates(z) = readouts (z - center),   readouts directions^T = I
    """

    method: str  # one of DISCOVERY_METHODS
    names: tuple[str, ...]  # A
    directions: np.ndarray  # [A, Z], row a is the step in z when coordinate a grows by one
    readouts: np.ndarray  # [A, Z]
    center: np.ndarray  # [Z], the mean of mu
    score: np.ndarray  # [A]
    score_name: str
    profile: np.ndarray  # [L, A], undecided share of the variance along each axis at each level
    logsnr: np.ndarray  # [L] increasing; of `level` the one level

    @property
    def axes(self) -> Axes:
        """What can be saved, and moved along."""
        return Axes(self.names, self.directions, self.readouts, self.center)


def default_levels(schedule: Schedule) -> np.ndarray:
    """Noise levels uniform in logsnr, inside the schedule's range by half a spacing at either end. [NUM_LEVELS] increasing."""
    return schedule.logsnr_min + (schedule.logsnr_max - schedule.logsnr_min) * (np.arange(NUM_LEVELS) + 0.5) / NUM_LEVELS


@torch.no_grad()
def posterior_draws(
    model: LatentModel,
    images: Images,
    count: int,
    logsnr: float,
    draws: int,
    *,
    seed: int,
    num_steps: int = NUM_STEPS,
    clip_x_0: bool = True,
    batch_size: int = 256,
    progress: Callable[[int], object] | None = None,
) -> np.ndarray:
    """Means of q(z|x_0') for several x_0' ~ p(x_0|x_t), x_t one noisy copy of each image.

    Ancestral sampling (eta 1) by the denoiser alone, levels uniform in t from t(logsnr) to 0, with a corrector:

        base  = kept sigma_s / sigma_t x_t + sigma_s sqrt(1 - kept^2) n,   kept = exp(-(logsnr_s - logsnr_t) / 2)
        x_s'  = base + alpha_s (1 - kept^2) x_0(x_t)
        x_s   = base + alpha_s ((1 - kept^2 - w) x_0(x_t) + w x_0(x_s')),   w = 1 - (1 - kept^2) / (logsnr_s - logsnr_t)

    x_0(x_s') is the next step's estimate too, so that correcting costs nothing. Without it the draws lack the variance that x_0 gains
    within a step: of Gaussian data half decided by x_t, 32 levels over 12 nats of logsnr leave 0.37 undecided, with it 0.46.
    The draws are the last estimates of x_0, which lack what the cleanest level leaves open.

    Args:
        model: One that `guides`, since its denoiser has to draw without latents.
        images: Images by index, in [-1, 1].
        count: N.
        logsnr: Noise level of x_t, within the schedule's range, below its cleanest level.
        draws: Per image, 1 to 65536.
        seed: Key of the noise: a draw is a function of (seed, image, number of the draw).
        num_steps: Levels of the whole range, >= 1; from t on the share t of them is taken, at least 4, with one evaluation of the
            denoiser each.
        clip_x_0: Keep every estimate of x_0 within [-1, 1].
        batch_size: Draws at a time.
        progress: Called after every batch with the number of images finished, N in all.
    Returns:
        [N, draws, Z] float64.
    Raises:
        ValueError: an argument is out of range.
    Source: SA-Solver (Xue et al., arXiv:2309.05019), its one-step predictor and corrector.
    """
    schedule = model.schedule
    if not schedule.logsnr_min <= logsnr < schedule.logsnr_max:
        wanted = f"{schedule.logsnr_min:g} to less than {schedule.logsnr_max:g}, the schedule's range"
        raise ValueError(f"logsnr: expected {wanted}, found {logsnr:g}")
    for name, value, low, high in (("draws", draws, 1, MAX_DRAWS), ("num_steps", num_steps, 1, math.inf), ("count", count, 1, math.inf)):
        if not low <= value <= high:
            raise ValueError(f"{name}: expected at least {low}" + (f" and at most {high}" if high < math.inf else "") + f", found {value}")
    start = float(schedule.t(torch.tensor(logsnr, dtype=torch.float64)))
    t = start * torch.linspace(1, 0, max(MIN_STEPS, math.ceil(start * num_steps)), dtype=torch.float64)
    parts = []
    for index in torch.arange(count).split(max(1, batch_size // draws)):
        x_0 = images(index)
        index = index.to(x_0.device)
        alpha_t, sigma_t = (v.to(x_0).expand(len(index), 1) for v in alpha_sigma(schedule.logsnr(t[:1])))
        x_t, _ = ops.noise_sample(x_0, alpha_t, sigma_t, index, seed=seed, step=DISCOVERY_STEP)
        numbers = index[:, None] * MAX_DRAWS + torch.arange(draws, device=index.device)
        drawn = _reverse(model, x_t.repeat_interleave(draws, 0), t, numbers.flatten(), seed, clip_x_0)
        parts.append(model.encode(drawn).mu.view(len(index), draws, -1).double().cpu())
        if progress is not None:
            progress(len(index))
    return torch.cat(parts).numpy()


def _reverse(model: LatentModel, x_t: Tensor, t: Tensor, index: Tensor, seed: int, clip_x_0: bool) -> Tensor:
    """The last estimate of x_0, from x_t at level t[0] down the levels t. [S, C, H, W] -> [S, C, H, W]"""
    logsnr = model.schedule.logsnr(t)
    distinct = logsnr.diff(prepend=logsnr.new_tensor([-math.inf])) != 0  # a schedule of discrete levels may have fewer than asked for
    t, logsnr = t[distinct], logsnr[distinct]
    alpha, sigma = (v.tolist() for v in alpha_sigma(logsnr))

    def estimate(x: Tensor, step: int) -> Tensor:
        eps_pred = model.predict_eps(x, t[step].to(x).expand(len(x)))
        x_0 = (x - sigma[step] * eps_pred) / alpha[step]
        return x_0.clamp(-1, 1) if clip_x_0 else x_0

    x_0 = estimate(x_t, 0)
    for step, span in enumerate(logsnr.diff().tolist(), start=1):
        kept, fresh = math.exp(-0.5 * span), -math.expm1(-span)
        noise = ops.random_normal(seed, DISCOVERY_STEP + step, ops.Stream.INIT, index, x_t[0].numel()).to(x_t).view_as(x_t)
        base = kept * sigma[step] / sigma[step - 1] * x_t + sigma[step] * math.sqrt(fresh) * noise
        later = estimate(base + alpha[step] * fresh * x_0, step)
        weight = 1 - fresh / span
        x_t = base + alpha[step] * ((fresh - weight) * x_0 + weight * later)
        x_0 = later
    return x_0


def within_covariance(drawn: np.ndarray) -> np.ndarray:
    """Covariance of mu within one draw set, unbiased, mean over the images. [N, draws, Z] -> [Z, Z]

    Raises:
        ValueError: other than three axes, or fewer than 2 draws.
    """
    drawn = np.asarray(drawn, dtype=np.float64)
    if drawn.ndim != 3 or drawn.shape[1] < 2:
        raise ValueError(f"drawn: expected [N, draws, Z] with at least 2 draws, found shape {list(drawn.shape)}")
    centred = drawn - drawn.mean(1, keepdims=True)
    return np.einsum("ndz,ndy->zy", centred, centred) / (drawn.shape[0] * (drawn.shape[1] - 1))


def generalized_axes(within: np.ndarray, total: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Axes of within v = value total v.

    Args:
        within: Symmetric; of a noise level, the covariance of mu within draw sets. [Z, Z].
        total: Covariance of mu over the data, of full rank. [Z, Z].
    Returns:
        value: Largest first; undecided shares, in [0, 1] up to errors of sampling and of the model. [Z].
        readouts: Rows v with v^T total v = 1. [Z, Z]; directions are readouts @ total.
    Raises:
        ValueError: total is not of full rank.
    """
    white = whitening(total)
    values, vectors = eigh(white @ as_table("within", within) @ white)
    return values[::-1], vectors.T[::-1] @ white  # pyrefly: ignore[missing-attribute, bad-return]


def joint_axes(
    withins: np.ndarray, total: np.ndarray, logsnr: Sequence[float] | np.ndarray, undecided: float = 0.5
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One set of axes for all noise levels, from coarse to fine.

    The matrices are whitened by total and made as diagonal as one rotation can make all of them: it minimises the sum over levels of
    ln det diag - ln det, which is the most likely one for sample covariances of a common number of draws. A level where little is
    undecided so counts as much as one where much is.

    Args:
        withins: Covariances of mu within draw sets. [L, Z, Z].
        total: Covariance of mu over the data, of full rank. [Z, Z].
        logsnr: Levels of the L matrices, increasing.
        undecided: Share that sets an axis's scale, 0 to 1.
    Returns:
        scale: logsnr at which an axis's share falls to `undecided` (as `half_point`); NaN where no level asked for is that noisy or
            that clean. Axes go by it, those decided at all levels first, those undecided at all last. [Z].
        profile: Undecided share of each axis. [L, Z].
        readouts: Rows v with v^T total v = 1. [Z, Z]; directions are readouts @ total.
    Raises:
        ValueError: total is not of full rank, or as many levels as matrices were not given.
    Source: the criterion of Pham, SIAM J. Matrix Anal. Appl. 22 (2001); Jacobi angles of Cardoso & Souloumiac, 17 (1996), weighted.
    """
    levels, withins, white = as_levels(logsnr), np.asarray(withins, dtype=np.float64), whitening(total)
    if withins.shape != (len(levels), *white.shape):
        raise ValueError(f"withins: expected shape {[len(levels), *white.shape]}, found {list(withins.shape)}")
    readouts = _joint_rotation(white @ withins @ white).T @ white
    profile = shares(withins, readouts)
    scale = np.array([half_point(levels, 1.0 - share, 2.0 * (1.0 - undecided)) for share in profile.T])
    mean = profile.mean(0)
    place = np.where(np.isnan(scale), np.where(mean < undecided, -np.inf, np.inf), scale)
    order = np.lexsort((mean, place))
    return scale[order], profile[:, order], readouts[order]


def shares(withins: np.ndarray, readouts: np.ndarray) -> np.ndarray:
    """Variance along each axis within draw sets; a share where the coordinate has unit variance over the data. -> [L, A]"""
    return np.einsum("az,lzy,ay->la", readouts, withins, readouts)


def _joint_rotation(matrices: np.ndarray) -> np.ndarray:
    """V that makes the V^T M_l V as diagonal as can be: the least sum of ln (V^T M_l V)_aa. [L, A, A] symmetric -> [A, A]"""
    matrices = matrices.copy()
    rotation = np.eye(matrices.shape[1])
    for _ in range(100):
        largest = 0.0
        for p in range(len(rotation)):
            for q in range(p + 1, len(rotation)):
                # Turned by an angle, 2 M_pq becomes cos(2 angle) off - sin(2 angle) gap. The angle with the least sum of its squares over
                # M_pp M_qq lessens the sum of logarithms too, which is concave in these squares. Shares of 1e-6 are rounding.
                first, second, off = matrices[:, p, p], matrices[:, q, q], 2 * matrices[:, p, q]
                size = np.sqrt(np.maximum(first, 1e-6) * np.maximum(second, 1e-6))
                gap, off = (first - second) / size, off / size
                angle = 0.25 * math.atan2(2 * gap @ off, gap @ gap - off @ off)
                largest = max(largest, abs(angle))
                turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
                matrices[:, :, [p, q]] = matrices[:, :, [p, q]] @ turn
                matrices[:, [p, q]] = turn.T @ matrices[:, [p, q]]
                rotation[:, [p, q]] = rotation[:, [p, q]] @ turn
        if largest < 1e-6:
            break
    return rotation


def principal_axes(mu: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Principal axes of the aggregated posterior's means.

    Args:
        mu: [N, Z], more images than dimensions.
    Returns:
        share: Of the variance of mu, largest first. [Z].
        readouts: Rows v with v^T total v = 1, total the covariance of mu. [Z, Z]; directions are readouts @ total.
    """
    values, vectors = eigh(_covariance(as_table("mu", mu)))
    return values[::-1] / values.sum(), (vectors / np.sqrt(values)).T[::-1]  # pyrefly: ignore[missing-attribute] (scipy has no types)


def independent_axes(mu: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Independent components of the aggregated posterior's means.

    Args:
        mu: [N, Z], thousands of images.
        seed: Of the first guess.
    Returns:
        peakedness: |excess kurtosis| of each component, 0 where Gaussian and thus arbitrary, largest first. [Z].
        readouts: As in `principal_axes`.
    Source: Hyvärinen, FastICA, IEEE Transactions on Neural Networks 10 (1999), by scikit-learn.
    """
    model = FastICA(whiten="unit-variance", max_iter=1000, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # components that are Gaussian have no fixed point to converge to
        components = model.fit_transform(as_table("mu", mu))
    peakedness = np.abs(kurtosis(components))
    order = np.argsort(-peakedness)
    deviation = components.std(0, ddof=1)[:, None]
    return peakedness[order], (model.components_ / deviation)[order]


def gradient_covariance(model: LatentModel, x_0: Tensor, dims: Sequence[int] | np.ndarray) -> np.ndarray:
    """Sum over the images of J J^T, J = d mu / d x.

    Args:
        x_0: [N, C, H, W].
        dims: Latent dimensions, one pass back through the encoder for each. D of them.
    Returns:
        [D, D] float64, per unit of x squared.
    """
    with torch.enable_grad():
        x_0 = x_0.detach().requires_grad_()
        mu = model.encode(x_0).mu.sum(0)
        rows = [torch.autograd.grad(mu[d], x_0, retain_graph=True)[0].flatten().double() for d in dims]
    jacobian = torch.stack(rows)
    return (jacobian @ jacobian.T).cpu().numpy()


def gradient_axes(
    model: LatentModel, images: Images, count: int, total: np.ndarray, dims: Sequence[int] | np.ndarray, batch_size: int = 256
) -> tuple[np.ndarray, np.ndarray]:
    """Axes by how much pixels move them: E[ J J^T ] v = value total v.

    Args:
        model, images, count: As in `posterior_draws`; clean images.
        total: Covariance of mu over the data along `dims`, of full rank. [D, D].
        dims: Latent dimensions to work in. D of them.
        batch_size: Images at a time.
    Returns:
        value: Mean squared gradient of each coordinate, largest first, per unit of x squared. [D].
        readouts: As in `generalized_axes`. [D, D].
    """
    gradients = np.sum([gradient_covariance(model, images(index), dims) for index in torch.arange(count).split(batch_size)], axis=0)
    return generalized_axes(gradients / count, total)


def _covariance(mu: np.ndarray) -> np.ndarray:
    return np.atleast_2d(np.cov(mu, rowvar=False))


def discover(
    model: LatentModel,
    images: Images,
    count: int = 256,
    *,
    encoded: int | None = None,
    logsnr: Sequence[float] | np.ndarray | None = None,
    draws: int = 3,
    seed: int = 0,
    num_steps: int = NUM_STEPS,
    clip_x_0: bool = True,
    batch_size: int = 256,
    progress: Callable[[int], object] | None = None,
) -> list[Discovered]:
    """Axes by all methods: scale, pca, gradient, ica, then level at every noise level.

    The denoiser is evaluated about count * levels * draws * num_steps / 2 times.

    Args:
        model, images, count: As in `posterior_draws`; more images than live dimensions.
        encoded: Images whose means give the covariance over the data and the independent components, at least `count`; as many when None.
        logsnr: Noise levels, increasing, each as in `posterior_draws`; 8 levels over the schedule's range when None.
        draws: Per image and level, at least 2.
        seed, num_steps, clip_x_0, batch_size: As in `posterior_draws`.
        progress: Called after every batch with the number of images finished, count * levels in all.
    Returns:
        One `Discovered` per method and, of level, per noise level; every one with the shares along its axes.
    Raises:
        ValueError: an argument is out of range, no dimension is live, or the images are fewer than the live dimensions.
    """
    levels = default_levels(model.schedule) if logsnr is None else as_levels(logsnr)
    encoded = count if encoded is None else encoded
    if encoded < count:
        raise ValueError(f"encoded: expected at least count = {count} images, found {encoded}")
    mu, var = _means(model, images, encoded, batch_size)
    live = np.sort(live_dims(information_per_dim(mu, var)))
    if not live.size:
        raise ValueError(f"model: expected a latent dimension with {LIVE_RULE}, found none")
    if count <= len(live):
        raise ValueError(f"count: expected more images than the {len(live)} live dimensions, found {count}")
    total = _covariance(mu[:, live])
    with bar(count * len(levels), "drawing", "images") as seen:
        common: Any = {"seed": seed, "num_steps": num_steps, "clip_x_0": clip_x_0, "batch_size": batch_size}
        common["progress"] = progress or seen.update
        withins = np.stack(
            [within_covariance(posterior_draws(model, images, count, level, draws, **common)[:, :, live]) for level in levels.tolist()]
        )

    def expanded(
        method: str, label: str, score_name: str, score: np.ndarray, readouts: np.ndarray, chosen: slice = slice(None)
    ) -> Discovered:
        directions = readouts @ total
        sign = np.sign(np.take_along_axis(directions, np.abs(directions).argmax(1)[:, None], 1))  # the largest component grows
        wide_directions, wide_readouts = np.zeros((2, len(live), mu.shape[1]))
        wide_directions[:, live], wide_readouts[:, live] = sign * directions, sign * readouts
        names = tuple(f"{label} {axis}" for axis in range(len(live)))
        profile = shares(withins[chosen], readouts)
        return Discovered(method, names, wide_directions, wide_readouts, mu.mean(0), score, score_name, profile, levels[chosen])

    scale, _, readouts = joint_axes(withins, total, levels, UNDECIDED)
    found = [
        expanded("scale", "scale", f"logsnr at which {UNDECIDED:g} is undecided", scale, readouts),
        expanded("pca", "pca", "share of the variance of mu", *principal_axes(mu[:, live])),
        expanded("gradient", "gradient", "mean squared gradient in x", *gradient_axes(model, images, count, total, live, batch_size)),
        expanded("ica", "ica", "absolute excess kurtosis", *independent_axes(mu[:, live], seed)),
    ]
    for place, (level, within) in enumerate(zip(levels, withins, strict=True)):
        share, readouts = generalized_axes(within, total)
        found.append(expanded("level", f"level {level:.1f}:", "undecided share", share, readouts, slice(place, place + 1)))
    return found


@torch.no_grad()
def _means(model: LatentModel, images: Images, count: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """mu and var of q(z|x_0). [N, Z] twice, float64."""
    parts = [model.encode(images(index)) for index in torch.arange(count).split(batch_size)]
    mu, var = torch.cat([part.mu for part in parts]), torch.cat([part.var for part in parts])
    return mu.double().cpu().numpy(), var.double().cpu().numpy()
