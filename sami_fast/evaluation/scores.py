"""The numbers of a run: what report/metrics.json holds and `sami-fast evaluate` prints."""

import math
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch

from ..metrics.bound import fit_decoder_var, is_eight_bit, negative_elbo
from ..metrics.scale_profile import ScaleProfile
from . import factors as of_factors
from .latents import Latents, encode, pixels, principal_components, untrained
from .run import Run

DECODER_IMAGES = 1024  # training images that the decoder's variance is fitted on


def known_factors(run: Run) -> tuple[np.ndarray, tuple[str, ...], dict[str, float]]:
    """Factors of the evaluation images that vary among them, [N, K], their names, and the periods of those that come round again."""
    names = run.evaluation.factor_names
    values = run.evaluation.factors(torch.arange(run.count)).double().numpy()
    varying = [column for column in range(len(names)) if np.ptp(values[:, column]) > 0]
    return values[:, varying], tuple(names[column] for column in varying), getattr(run.evaluation, "periods", {})


def rate_scores(latents: Latents) -> dict[str, Any]:
    """Rate of the latents, nats; of a deterministic encoder only how many vary."""
    if latents.kl is None:
        return {"kl_nats": None, "kl_per_dim": None, "active_dims": len(latents.live)}
    return {"kl_nats": float(latents.kl.sum()), "kl_per_dim": latents.kl.tolist(), "active_dims": len(latents.live)}


def latent_scores(run: Run, latents: Latents, *, quick: bool = False, jobs: int = 1) -> dict[str, Any]:
    """Rate of the latents and, where factors are known, how well the codes hold them.

    Args:
        run: Whose images and factors these are.
        latents: *Sampled* codes are scored; `linear_r2_mu` is from their means, which no noise blurs: it shows how little that tells.
        quick: Leave out what takes long or learns.
        jobs: Processes for what takes long.
    """
    factors, names, periods = known_factors(run)
    scores, seed = rate_scores(latents), run.config.seed
    images, dims = latents.z.shape
    if images > dims > 1 and not quick:
        scores |= of_factors.dependence_scores(latents.z)
    if not names:
        return scores
    if run.config.data.kind == "celeba":
        return scores | of_factors.attribute_scores(latents.z, factors, seed=seed)
    scores |= of_factors.recovery_scores(latents.z, factors, names, periods)
    scores["linear_r2_mu"] = of_factors.recovery_scores(latents.mu, factors, names, periods)["linear_r2"]
    if not quick:
        scores |= of_factors.learned_scores(latents.z, latents.live, factors, names, periods, seed=seed, jobs=jobs)
    return scores


def baseline_scores(run: Run, *, jobs: int = 1, say: Callable[[str], object] = lambda stage: None) -> dict[str, dict[str, Any]]:
    """What the same scores say of the untrained encoder, of principal components of the pixels and of the pixels themselves.

    Pixels and principal components are noiseless codes, as those of a deterministic encoder. Trees are not grown on pixels.
    """
    say("untrained encoder")
    scores = {"untrained": latent_scores(run, encode(run, untrained(run)), jobs=jobs)}
    table = pixels(run)
    components = principal_components(run).transform(table).astype(np.float64)
    for name, codes, quick in (("pca", components, False), ("pixels", table.astype(np.float64), True)):
        say(name)
        zeros = np.zeros_like(codes)
        scores[name] = latent_scores(run, Latents(codes, zeros, codes, None, np.arange(codes.shape[1])), quick=quick, jobs=jobs)
    return scores


def bound_scores(run: Run) -> dict[str, Any]:
    """The negative ELBO and its terms; see `metrics/bound.py` for what they are. Of a deterministic encoder there is none."""
    if run.model.deterministic:
        return {}
    common = {"seed": run.config.seed, "batch_size": run.batch_size}
    eight_bit = all(is_eight_bit(run.images(index)) for index in run.index())
    fitted_on = DECODER_IMAGES if run.train.size is None else min(DECODER_IMAGES, run.train.size)
    decoder_var = fit_decoder_var(run.model, run.train_images, fitted_on, **common)
    bound = negative_elbo(run.model, run.images, run.count, decoder_var=decoder_var, eight_bit=eight_bit, **common)
    elbo = float(bound.total.mean())
    terms = {name: float(getattr(bound, name).mean()) for name in ("diffusion", "prior", "reconstruction")}
    if run.model.method == "sami":
        terms["unguided"] = float(bound.unguided.mean())
    return {
        "elbo_nats": elbo,
        "elbo_standard_error_nats": bound.standard_error,
        "bits_per_dim": elbo / (math.prod(run.evaluation.image_shape) * math.log(2)),
        "elbo_of": "8-bit pixels" if eight_bit else "density",
        **{f"{name}_nats": value for name, value in terms.items()},
        "decoder_std": math.sqrt(decoder_var),
    }


def profile_scores(profile: ScaleProfile | None) -> dict[str, Any]:
    """Information and calibration over noise levels, as plain lists; what has no value is None."""
    if profile is None:
        return {}

    def plain(values: np.ndarray) -> Any:
        return [plain(row) for row in values] if values.ndim > 1 else [float(v) if math.isfinite(v) else None for v in values]

    return {
        "logsnr_levels": plain(profile.logsnr),
        "information_nats": plain(profile.information.T),  # [Z][L]
        "characteristic_logsnr": plain(profile.scale),  # [Z]
        "calibration_mean": plain(profile.calibration_mean.T),
        "calibration_std": plain(profile.calibration_std.T),
        "calibration_distance": plain(profile.calibration_distance.T),
    }


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
