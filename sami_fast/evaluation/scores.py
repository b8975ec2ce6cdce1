"""The numbers of a run: what report/metrics.json holds and `sami-fast evaluate` prints."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from ..errors import UserError
from ..methods.latent_model import LatentModel
from ..metrics.bound import fit_decoder_var, is_eight_bit, negative_elbo
from ..metrics.guidance import GuidanceProfile
from ..metrics.identifiability import correlation_matrix
from ..metrics.latents import live_dims
from ..metrics.pixels import pixel_r2
from ..metrics.scale_profile import ScaleProfile, half_point
from . import factors as of_factors
from .health import diagnose, mended, rise
from .latents import Baselines, Latents
from .run import Run
from .table import mean_of

READ_IMAGES, READ_VALUES = 2000, 1 << 25  # images, and values of their pixels, that a linear map is fitted on and scored on, at most
FITTED_PER_LATENT = 4  # images to fit on, at least
COMPONENTS_OF = 512  # images that the principal components are of which the run's latents are measured by
CORRELATED_IMAGES = 512  # from which it is told whether two latents say the same
QUICK_PIXEL_VALUES, QUICK_PIXEL_IMAGES = 2_000_000, 500  # pixels, of this many images at least, that are scored in a second or two
DECODER_IMAGES = 1024  # training images that the decoder's variance is fitted on


def known_factors(run: Run, attributes: bool | None = None) -> tuple[np.ndarray, tuple[str, ...], dict[str, float]]:
    """Factors of the evaluation images that vary among them, [N, K], their names, and the periods of those that come round again.

    Args:
        run: Whose images these are.
        attributes: Only those that are attributes (True) or are not (False); None is both.
    """
    names = run.evaluation.factor_names
    values = run.factors().double().numpy()
    halves = values[: run.count // 2], values[run.count // 2 :]  # what is fitted on one is scored on the other
    varying = [column for column in range(len(names)) if all(len(half) and np.ptp(half[:, column]) > 0 for half in halves)]
    if attributes is not None:
        varying = [column for column in varying if (names[column] in run.evaluation.attribute_names) == attributes]
    return values[:, varying], tuple(names[column] for column in varying), run.evaluation.periods


def rate_scores(latents: Latents) -> dict[str, Any]:
    """What the latents cost and hold, nats; of a deterministic encoder only how many vary."""
    scores: dict[str, Any] = {"active_dims": len(latents.live)}
    for total, each, nats in (
        ("kl_nats", "kl_per_dim", latents.kl),
        ("information_sum_nats", "information_per_dim", latents.information),
    ):
        scores |= {total: None, each: None} if nats is None else {total: float(nats.sum()), each: nats.tolist()}
    return scores


def latent_scores(run: Run, latents: Latents, *, quick: bool = False, jobs: int = 1) -> dict[str, Any]:
    """Rate of the latents and, where factors are known, how well the codes hold them.

    Args:
        run: Whose images and factors these are.
        latents: *Sampled* codes are scored, but for `linear_r2_mu`: from means factors can be read even of an untrained encoder.
        quick: Leave out what takes long or learns.
        jobs: Processes for what takes long.
    """
    factors, names, periods = known_factors(run, attributes=False)
    attributes, _, _ = known_factors(run, attributes=True)
    scores, seed = rate_scores(latents), run.config.seed
    images, dims = latents.z.shape
    if images > dims > 1 and not quick:
        scores |= of_factors.dependence_scores(latents.z)
    if attributes.shape[1]:
        scores |= of_factors.attribute_scores(latents.z, attributes, seed=seed)
    if not names:
        return scores
    scores |= of_factors.recovery_scores(latents.z, factors, names, periods)
    scores["linear_r2_mu"] = scores["linear_r2"] if latents.kl is None else of_factors.linear_scores(latents.mu, factors, names, periods)
    if not quick:
        scores |= of_factors.learned_scores(latents.z, latents.live, factors, names, periods, seed=seed, jobs=jobs)
    return scores


def baseline_scores(
    run: Run, baselines: Baselines, *, quick: bool = False, jobs: int = 1, say: Callable[[str], object] = lambda stage: None
) -> dict[str, dict[str, Any]]:
    """What the same scores say of the untrained encoder, of principal components of the pixels and of the pixels themselves.

    Pixels and principal components are noiseless codes, as those of a deterministic encoder. Of pixels, which are many, only linear R2
    and MCC are taken; with `quick`, as in `latent_scores`, from fewer images where these are large.
    """
    say("untrained encoder")
    scores = {"untrained": latent_scores(run, baselines.untrained_latents, quick=quick, jobs=jobs)}
    scores["untrained"]["pixel_r2"] = pixel_r2_of(run, sampled(run, baselines.untrained))
    say("pca")
    components = baselines.components.transform(baselines.pixels).astype(np.float64)
    noiseless = np.broadcast_to(0.0, components.shape)
    live = np.arange(components.shape[1])
    scores["pca"] = latent_scores(run, Latents(components, noiseless, components, None, live), quick=quick, jobs=jobs)
    scores["pca"]["pixel_r2"] = pixel_r2_of(run, lambda pixels, images, index: baselines.components.transform(pixels))
    say("pixels")
    factors, names, periods = known_factors(run, attributes=False)
    scores["pixels"] = {}
    if names:
        count = max(QUICK_PIXEL_VALUES // baselines.pixels.shape[1], QUICK_PIXEL_IMAGES) if quick else run.count
        first, second = np.array_split(factors[:count], 2)
        if not (np.ptp(first, axis=0).all() and np.ptp(second, axis=0).all()):
            count = run.count
        pixels, factors = baselines.pixels[:count], factors[:count]
        scores["pixels"] = of_factors.matched_scores(pixels, factors, names, periods) | {
            "linear_r2": of_factors.linear_scores(pixels, factors, names, periods)
        }
    return scores


Code = Callable[[np.ndarray, Tensor, Tensor], np.ndarray]  # pixels [n, P], the same images [n, C, H, W], their index [n] -> [n, D]


def sampled(run: Run, model: LatentModel) -> Code:
    """Sampled latents of images."""

    def code(pixels: np.ndarray, images: Tensor, index: Tensor) -> np.ndarray:
        posterior = model.encode(images)
        return posterior.draw(index.to(posterior.mu.device), run.config.seed).double().cpu().numpy()

    return code


@torch.no_grad()
def pixel_r2_of(run: Run, code: Code) -> float | None:
    """R2 of all pixels of evaluation images under a linear map of a code, fitted on training images; None with too few to fit one."""
    most = max(1, min(READ_IMAGES, READ_VALUES // math.prod(run.evaluation.image_shape)))

    def batches(images: Callable[[Tensor], Tensor], count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for index in torch.linspace(0, count - 1, min(count, most)).long().split(run.batch_size):
            shown = images(index)
            pixels = shown.flatten(1).double().cpu().numpy()
            yield code(pixels, shown, index), pixels

    if min(run.num_train, most) < FITTED_PER_LATENT * run.model.latent_size:
        return None
    try:
        return pixel_r2(batches(run.train_images, run.num_train), batches(run.images, run.count))
    except ValueError:  # all evaluation images are the same, or there is one
        return None


def pixel_scores(run: Run) -> dict[str, Any]:
    """What a linear map reads from the run's latents, and from as many principal components of the pixels of some training images."""
    found = pixel_r2_of(run, sampled(run, run.model))
    if found is None:
        return {}
    some = torch.linspace(0, run.num_train - 1, min(run.num_train, COMPONENTS_OF)).long()
    pixels = torch.cat([run.train_images(index).flatten(1).cpu() for index in some.split(run.batch_size)]).numpy()
    components = PCA(min(run.model.latent_size, *pixels.shape), random_state=run.config.seed).fit(pixels)
    return {"pixel_r2": found, "pixel_r2_of_components": pixel_r2_of(run, lambda pixels, images, index: components.transform(pixels))}


def bound_scores(run: Run) -> dict[str, Any]:
    """The negative ELBO and its terms; see `metrics/bound.py` for what they are. Of a deterministic encoder there is none."""
    if run.model.deterministic:
        return {}
    common = {"seed": run.config.seed, "batch_size": run.batch_size}
    eight_bit = all(is_eight_bit(run.images(index)) for index in run.index())
    try:
        decoder_var = fit_decoder_var(run.model, run.train_images, min(DECODER_IMAGES, run.num_train), **common)
    except ValueError as error:
        raise UserError(f"{run.folder}: its model cannot be scored ({error})") from None
    bound = negative_elbo(run.model, run.images, run.count, decoder_var=decoder_var, eight_bit=eight_bit, **common)
    elbo = float(bound.total.mean())
    terms = {name: float(getattr(bound, name).mean()) for name in ("diffusion", "prior", "reconstruction")}
    if bound.unguided is not None:
        terms["unguided"] = float(bound.unguided.mean())
    return {
        "elbo_nats": elbo,
        "elbo_standard_error_nats": bound.standard_error,
        "bits_per_dim": elbo / (math.prod(run.evaluation.image_shape) * math.log(2)),
        "elbo_of": "8-bit pixels" if eight_bit else "density",
        **{f"{name}_nats": value for name, value in terms.items()},
        "decoder_std": math.sqrt(decoder_var),
    }


def plain(values: Any) -> Any:
    """The same as JSON can hold it: lists for arrays, None for what is not finite."""
    if isinstance(values, dict):
        return {name: plain(value) for name, value in values.items()}
    if isinstance(values, np.ndarray | list):
        return [plain(value) for value in values]
    if isinstance(values, float | np.floating):
        return float(values) if math.isfinite(values) else None
    return values


def profile_scores(profile: ScaleProfile | None) -> dict[str, Any]:
    """Information and calibration over noise levels, as plain lists; what has no value is None."""
    if profile is None:
        return {}
    return {
        "logsnr_levels": plain(profile.logsnr),
        "information_nats": plain(profile.information.T),  # [Z][L]
        "characteristic_logsnr": plain(profile.scale),  # [Z]
        "one_nat_logsnr": plain(np.array([half_point(profile.logsnr, values, 2.0) for values in profile.information.T])),  # [Z]
        "calibration_mean": plain(profile.calibration_mean.T),
        "calibration_std": plain(profile.calibration_std.T),
        "calibration_distance": plain(profile.calibration_distance.T),
    }


def guidance_scores(guided: GuidanceProfile | None, scores: dict[str, Any]) -> dict[str, Any]:
    """What guidance is worth, nats, over noise levels and in all; `scores` holds the rate."""
    if guided is None:
        return {}
    kl, live = scores["kl_nats"], live_dims(np.array(scores["information_per_dim"]))
    spread = guided.zscore_square[:, live].mean(1) if len(live) else np.full(len(guided.logsnr), math.nan)
    return {
        "gain_nats": guided.total,
        "gain_of_another_nats": guided.other_total,
        "gain_per_kl": guided.total / kl if kl > 0 else None,
        "gain_logsnr": plain(guided.logsnr),  # [L]
        "gain_by_level": plain(guided.gain),  # [L], nats per unit of logsnr
        "gain_of_another_by_level": plain(guided.other),
        "zscore_square_by_level": plain(spread),
    }


@torch.no_grad()
def _training_codes(run: Run) -> np.ndarray:
    """Sampled latents of training images. [N, Z]."""
    parts = []
    for index in torch.arange(min(CORRELATED_IMAGES, run.num_train)).split(run.batch_size):
        posterior = run.model.encode(run.train_images(index))
        parts.append(posterior.draw(index.to(posterior.mu.device), run.config.seed + 1).double().cpu())
    return torch.cat(parts).numpy()


def health_of(run: Run, latents: Latents, guided: GuidanceProfile | None, scores: dict[str, Any]) -> dict[str, Any]:
    """The verdict on the run; of a deterministic encoder, of which no information is known, none."""
    if latents.information is None:
        return {}
    # Few images have many chance correlations, so few held-out ones are joined by some of training.
    codes = latents.z if run.count >= CORRELATED_IMAGES else np.concatenate((latents.z, _training_codes(run)))
    found = diagnose(
        latents.information,
        scores["kl_nats"],
        gain=guided.total if guided else None,
        other=guided.other_total if guided else None,
        zscore_square=guided.zscore_square if guided else None,
        rising=rise(run.log),
        correlation=correlation_matrix(codes, codes),
        linear_r2=mean_of(scores.get("linear_r2")),
        mcc=scores.get("mcc"),
        pixel_r2=scores.get("pixel_r2"),
        pixel_r2_of_components=scores.get("pixel_r2_of_components"),
    )
    # What is advised in general may be set already.
    settings = " and ".join(mended(run.config, found.word, len(latents.live)))
    if settings:
        beside = ", or `sami-fast axes` for directions" if found.word == "tilted" else ""
        found = replace(found, remedy=f"{settings}{beside}")
    return {"health": asdict(found)}


def training_scores(run: Run) -> dict[str, Any]:
    """Cost of the run, from its log."""
    last = run.log[-1]
    joint = [row["images_per_second"] for row in run.log if row["step"] > run.config.first_joint_step]
    return {
        "method": run.config.method,
        "images_per_second": median(joint or [row["images_per_second"] for row in run.log]),
        "wall_seconds": last["seconds"],
        "steps": last["step"],
        "seed": run.config.seed,
        "num_images": run.count,
    }
