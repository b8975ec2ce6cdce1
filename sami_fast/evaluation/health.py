"""How a trained model is doing, in one word, with the reason and what to do next."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..metrics.latents import live_dims

REDUNDANT = 0.6  # mean squared standardised error below which latents say less than their variance admits
OVERSURE = 2.0  # and above which the encoder is surer than it may be
RISING = 0.15  # share of the information that the last fifth of training brought, from which a run was cut short
COPIED = 0.7  # rank correlation of two latents from which they say the same, or tilted factors
MIXED = 0.8  # MCC below which factors that can be read linearly lie on several latents


@dataclass(frozen=True)
class Health:
    """The verdict on a run."""

    word: str  # healthy, collapsed, undertrained, repairing the denoiser, redundant or tilted
    reason: str  # one sentence with its figures
    remedy: str  # what to change, as settings; empty where all is well

    def __str__(self) -> str:
        return f"{self.word}: {self.reason}{f' Next: {self.remedy}.' if self.remedy else ''}"


def rise(log: list[dict[str, Any]]) -> float:
    """Share of the final information that came in the last fifth of the steps in which the encoder learned; 0 where there was none."""
    told = [row["information_sum_nats"] for row in log if row.get("information_sum_nats") is not None and row.get("kl_weight", 0) > 0]
    fifth = len(told) // 5
    if fifth < 2:
        return 0.0
    last, before = np.mean(told[-fifth:][fifth // 2 :]), np.mean(told[-2 * fifth : -fifth][fifth // 2 :])
    return float((last - before) / last) if last > 0 else 0.0


def diagnose(
    information: np.ndarray,  # [Z] nats
    kl: float,
    *,
    gain: float | None = None,
    other: float | None = None,
    zscore_square: np.ndarray | None = None,  # [L, Z]
    rising: float = 0.0,
    correlation: np.ndarray | None = None,  # [Z, Z] rank correlations of the latents
    linear_r2: float | None = None,
    mcc: float | None = None,
) -> Health:
    """The first that applies, the gravest first.

    Args:
        information: Of every latent dimension, nats.
        kl: Sum over dimensions, nats.
        gain, other: What guidance takes off the bound with an image's own latents and with another's (`metrics.guidance`), nats.
        zscore_square: Squared standardised errors over noise levels (`metrics.guidance`).
        rising: As `rise`.
        correlation: Rank correlations of sampled latents.
        linear_r2, mcc: Means over known factors.
    """
    live, told = live_dims(information), float(np.sum(information))
    if not len(live):
        return Health(
            "collapsed",
            f"all {len(information)} latents together hold {told:.2f} nats of information, which is nothing.",
            "kl_weight.kind=auto with train.mode=staged; or a lower kl_weight.start",
        )
    spread = None if zscore_square is None else float(zscore_square[:, live].mean())
    if gain is not None and other is not None:
        if gain > 0 and (other > 0.5 * gain or (gain > kl and spread is not None and spread > OVERSURE)):
            sure = "" if spread is None else f", with standardised errors of {spread:.1f} (1 is right)"
            return Health(
                "repairing the denoiser",
                f"guidance gains {gain:.1f} nats with an image's own latents, {other:.1f} with another's, for a KL of {kl:.1f}{sure}.",
                "a longer first stage (train.denoiser_steps) or a larger denoiser (denoiser.channels)",
            )
        if gain <= 0 and not rising > RISING:
            return Health(
                "redundant",
                f"the latents hold {told:.1f} nats and guidance gains nothing for them ({gain:.1f} nats).",
                "a smaller kl_weight.sharpest, or a higher kl_weight.end",
            )
    if rising > RISING:
        return Health(
            "undertrained",
            f"the last fifth of training brought {rising:.0%} of the {told:.1f} nats of information.",
            "more train.steps (or train.minutes)",
        )
    if spread is not None and spread < REDUNDANT:
        return Health(
            "redundant",
            f"latents miss by less than their variance admits (squared standardised errors of {spread:.2f}; 1 is right): "
            "several say the same.",
            "a smaller encoder.latent_size or kl_weight.sharpest, or a higher kl_weight.end",
        )
    copied = 0.0
    if correlation is not None and len(live) > 1:
        off = np.abs(correlation[np.ix_(live, live)])
        copied = float((off - np.eye(len(live))).max())
    if linear_r2 is not None and mcc is not None and linear_r2 > 0.9 and mcc < MIXED:
        return Health(
            "tilted",
            f"the factors can be read linearly (R2 {linear_r2:.2f}) but not from a latent each (MCC {mcc:.2f}).",
            "a slower fall of beta (kl_weight.search, kl_weight.fall), so that latents come alive one after another",
        )
    if copied > COPIED:
        return Health(
            "tilted",
            f"two latents move together (rank correlation {copied:.2f}).",
            "a slower fall of beta (kl_weight.search, kl_weight.fall), or `sami-fast axes` for directions",
        )
    return Health("healthy", f"{len(live)} of {len(information)} latents hold {told:.1f} nats of information.", "")
