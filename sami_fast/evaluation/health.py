"""How a trained model is doing, in one word, with the reason and what to do next."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import NO_SKIP, Config, SamiConfig
from ..metrics.latents import live_dims

MODEST = 0.3  # mean squared standardised error below which latents say less than their variance admits
OVERSURE = 2.0  # and above which the encoder is surer than it may be
RISING = 0.15  # share of the information that the last fifth of training brought, from which a run was cut short
COPIED = 0.7  # rank correlation of two latents above which they share half of their variance: they say the same
OVERLOOKED = 0.3  # share of what principal components tell of the pixels, below which latents tell of something else
DEARER = "a higher kl_weight.low (kl_weight.end of a fixed course), or a smaller encoder.latent_size"
READABLE, MIXED = 0.9, 0.8  # linear R2 and MCC: factors that can be read, but lie on several latents each


@dataclass(frozen=True)
class Health:
    """The verdict on a run."""

    word: str  # healthy, collapsed, undertrained, repairing the denoiser, overlooking, redundant or tilted
    reason: str  # one sentence with its figures
    remedy: str  # what to change; empty where all is well

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
    pixel_r2: float | None = None,
    pixel_r2_of_components: float | None = None,
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
        pixel_r2, pixel_r2_of_components: R2 of all pixels (`metrics.pixels`) from the latents, and from as many principal components.
    """
    live, told = live_dims(information), float(np.sum(information))
    if not len(live):
        return Health(
            "collapsed",
            f"all {len(information)} latents together hold {told:.2f} nats of information, which is nothing.",
            "kl_weight.kind=auto with train.mode=staged; or a lower kl_weight.start and kl_weight.low",
        )
    spread = None if zscore_square is None else float(zscore_square[:, live].mean())
    if gain is not None and other is not None:
        if gain > 0 and (other > 0.5 * gain or (gain > kl and spread is not None and spread > OVERSURE)):
            sure = "" if spread is None else f", with standardised errors of {spread:.1f} (1 is right)"
            return Health(
                "repairing the denoiser",
                f"guidance gains {gain:.1f} nats with an image's own latents, {other:.1f} with another's, for a KL of {kl:.1f}{sure}.",
                "denoiser.skip_logsnr=-5 if there is none, a longer first stage (train.denoiser_steps) or a larger denoiser "
                "(denoiser.channels)",
            )
        if gain <= 0 and not rising > RISING:
            return Health(
                "redundant",
                f"the latents hold {told:.1f} nats and guidance gains nothing for them ({gain:.1f} nats).",
                DEARER,
            )
    if pixel_r2 is not None and pixel_r2_of_components is not None and pixel_r2 < OVERLOOKED * pixel_r2_of_components:
        return Health(
            "overlooking",
            f"the latents hold {told:.1f} nats, but a linear map reads {max(0.0, pixel_r2):.0%} of the pixels' variance from them, and "
            f"{pixel_r2_of_components:.0%} from as many principal components: they miss what is largest in the images.",
            "encoder.style=silu, encoder.smooth=0.5 and sami.logsnr_max=auto",
        )
    if rising > RISING:
        return Health(
            "undertrained",
            f"the last fifth of training brought {rising:.0%} of the {told:.1f} nats of information.",
            "more train.steps (or train.minutes)",
        )
    copied = 0.0 if correlation is None or len(live) < 2 else float((np.abs(correlation[np.ix_(live, live)]) - np.eye(len(live))).max())
    if copied > COPIED:
        return Health(
            "redundant",
            f"two latents say the same (rank correlation {copied:.2f}).",
            f"train.turn=[0.6], {DEARER}",
        )
    if spread is not None and spread < MODEST:
        return Health(
            "redundant",
            f"latents miss by less than their variance admits (squared standardised errors of {spread:.2f}; 1 is right): "
            "they pull the same pixels.",
            DEARER,
        )
    if linear_r2 is not None and mcc is not None and linear_r2 > READABLE and mcc < MIXED:
        return Health(
            "tilted",
            f"the factors can be read linearly (R2 {linear_r2:.2f}) but not from a latent each (MCC {mcc:.2f}).",
            "train.turn=[0.6], a slower fall of beta (kl_weight.fall), or `sami-fast axes` for directions",
        )
    return Health("healthy", f"{len(live)} of {len(information)} latents hold {told:.1f} nats of information.", "")


def mended(config: Config, word: str, live: int) -> list[str]:
    """Settings that are worth a try next, as `key=value`; none where no setting is known to help.

    Args:
        config: Of the run.
        word: Its health.
        live: Number of its live latents.
    """
    train, price = config.train, config.kl_weight
    can_turn = config.method == "sami" and not config.encoder.class_ and not train.turn
    longer = [f"train.minutes={2 * train.minutes:g}" if train.minutes else f"train.steps={2 * train.steps}"]
    if word == "undertrained":
        return longer
    if word == "repairing the denoiser":
        knows = ["denoiser.skip_logsnr=-5"] if config.denoiser.skip_logsnr == NO_SKIP and not config.denoiser.class_ else []
        if config.mode == "staged":
            return [*knows, f"train.denoiser_steps={2 * (train.denoiser_steps or train.steps)}"]
        return [*knows, f"train.denoiser_warmup={min(0.5, 2 * train.denoiser_warmup or 0.2):g}"] if config.mode == "joint" else []
    if word == "collapsed" and config.method == "sami" and price.kind != "auto":
        return ["kl_weight.kind=auto", *(["train.mode=staged"] if config.mode == "joint" else [])]
    if word == "collapsed":
        return [
            f"kl_weight.start={price.start / 4:g}",
            *([f"kl_weight.low={price.low / 4:g}"] if price.kind in ("controller", "auto") else []),
        ]
    if word == "overlooking" and config.own_encoder:
        wanted = {"encoder.style": (config.encoder.style, "silu"), "encoder.smooth": (config.encoder.smooth, 0.5)}
        changed = [f"{key}={value}" for key, (found, value) in wanted.items() if found != value]
        if config.method == "sami" and config.sami.logsnr_max == SamiConfig().logsnr_max:
            changed.append("sami.logsnr_max=auto")
        return changed or longer
    if word in ("redundant", "tilted") and can_turn:
        return ["train.turn=[0.6]"]
    if word == "redundant" and 0 < live < config.encoder.latent_size:
        return [f"encoder.latent_size={live}"]
    if word == "redundant":
        return [f"kl_weight.low={min(price.start, 2 * price.low):g}" if price.kind == "auto" else f"kl_weight.end={2 * price.end:g}"]
    if word == "tilted" and price.kind == "auto":
        return [f"kl_weight.fall={min(1.0, 2 * price.fall):g}"]
    return []
