"""The numbers of a report: what report/metrics.json holds."""

import math
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

from ..metrics.bound import fit_decoder_var, is_eight_bit, negative_elbo
from ..metrics.identifiability import linear_r2, mcc
from ..metrics.latents import kl_per_dim, live_dims
from ..metrics.mig import discretize, mig, mig_ceiling
from ..latent_model import LatentModel
from .run import Run

DECODER_IMAGES = 1024  # training images that the decoder's variance is fitted on
VALUES_PER_BATCH = 1 << 18  # pixels of one batch of encodings


@dataclass(frozen=True)
class Latents:
    """Encodings of the evaluation images, in their order."""

    mu: np.ndarray  # [N, Z]
    z: np.ndarray  # [N, Z], one sample of q(z|x_0) each
    kl: np.ndarray  # [Z], mean over the images, nats
    live: np.ndarray  # [L] indices of the live dimensions, most informative first


@torch.no_grad()
def encode(run: Run, model: LatentModel) -> Latents:
    """Encode the evaluation images with a model of the run's architecture."""
    mu, var, z = [], [], []
    for index in torch.arange(run.count).split(batch_size(run)):
        posterior = model.encode(run.images(index))
        z.append(posterior.draw(index.to(posterior.mu.device), run.config.seed))
        mu.append(posterior.mu)
        var.append(posterior.var)
    mu, var, z = (torch.cat(parts).double().cpu().numpy() for parts in (mu, var, z))
    kl = kl_per_dim(mu, var)
    return Latents(mu, z, kl, live_dims(kl))


def batch_size(run: Run) -> int:
    """Images that are encoded together."""
    return max(1, VALUES_PER_BATCH // math.prod(run.evaluation.image_shape))


def untrained(run: Run) -> LatentModel:
    """The run's networks as they were before the first step: same architecture, same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.config.seed)
        fresh = type(run.model).build(run.model.architecture, run.model.schedule.settings, **run.model.settings)
    return fresh.to(run.model.device).eval()


def _by_factor(names: tuple[str, ...], values: np.ndarray) -> dict[str, float]:
    return dict(zip(names, values.tolist(), strict=True))


def latent_scores(latents: Latents, factors: np.ndarray, names: tuple[str, ...]) -> dict[str, Any]:
    """Rate of the latents and, where factors are known, how well *sampled* latents hold them.

    Args:
        latents: Of the images.
        factors: [N, F], F may be 0.
        names: Of the factors.
    """
    scores: dict[str, Any] = {
        "kl_nats": float(latents.kl.sum()),
        "kl_per_dim": latents.kl.tolist(),
        "active_dims": len(latents.live),
    }
    if names:
        scores["linear_r2"] = _by_factor(names, linear_r2(latents.z, factors))
        # From the mean, which no noise blurs: shown only to tell how little it means.
        scores["linear_r2_mu"] = _by_factor(names, linear_r2(latents.mu, factors))
        scores["mcc"], per_factor = mcc(latents.z, factors)
        scores["mcc_per_factor"] = _by_factor(names, per_factor)
        scores["mig"], per_factor = mig(latents.z, discretize(factors))
        scores["mig_per_factor"] = _by_factor(names, per_factor)
    return scores


def bound_scores(run: Run) -> dict[str, Any]:
    """The negative ELBO and its terms; see `metrics/bound.py` for what they are."""
    common = {"seed": run.config.seed, "batch_size": batch_size(run)}
    eight_bit = all(is_eight_bit(run.images(index)) for index in torch.arange(run.count).split(batch_size(run)))
    fitted_on = DECODER_IMAGES if run.train.size is None else min(DECODER_IMAGES, run.train.size)
    decoder_var = fit_decoder_var(run.model, run.train_images, fitted_on, **common)
    bound = negative_elbo(run.model, run.images, run.count, decoder_var=decoder_var, eight_bit=eight_bit, **common)
    elbo = float(bound.total.mean())
    return {
        "elbo_nats": elbo,
        "elbo_standard_error_nats": bound.standard_error,
        "bits_per_dim": elbo / (math.prod(run.evaluation.image_shape) * math.log(2)),
        "elbo_of": "8-bit pixels" if eight_bit else "density",
        "diffusion_nats": float(bound.diffusion.mean()),
        "unguided_nats": float(bound.unguided.mean()),
        "prior_nats": float(bound.prior.mean()),
        "reconstruction_nats": float(bound.reconstruction.mean()),
        "decoder_std": math.sqrt(decoder_var),
    }


def training_scores(run: Run) -> dict[str, Any]:
    """Cost of the run, from its log."""
    last = run.log[-1]
    joint = [row["images_per_second"] for row in run.log if row["step"] > run.config.first_joint_step]
    return {
        "images_per_second": median(joint or [row["images_per_second"] for row in run.log]),
        "wall_seconds": last["seconds"],
        "steps": last["step"],
        "seed": run.config.seed,
        "num_images": run.count,
    }


def compute_scores(run: Run, latents: Latents, factors: np.ndarray) -> dict[str, Any]:
    """Everything that report/metrics.json holds: plain numbers, lists and dicts.

    Args:
        run: The run.
        latents: Of its evaluation images, by its trained encoder.
        factors: [N, F] of the same images, F may be 0.
    """
    names = run.evaluation.factor_names
    scores = bound_scores(run) | latent_scores(latents, factors, names) | training_scores(run)
    if names:
        scores["mig_ceiling"] = mig_ceiling(factors, discretize(factors))
    scores["untrained"] = latent_scores(encode(run, untrained(run)), factors, names)
    return scores
