"""beta over the joint steps: a fixed course, a controller that holds the KL, or a course that begins where latents come alive."""

import math
from collections.abc import Sequence
from typing import Any, Protocol

ALIVE_NATS = 0.2  # smoothed information of batches at which a latent has come alive beyond doubt
SMOOTHING = 0.95  # decay per step of that average


class KLWeightSettings(Protocol):
    kind: str
    start: float
    end: float
    fraction: float
    target: float
    gain: float
    low: float
    high: float
    search: float
    rebound: float
    fall: float
    sharpest: float


class KLWeight:
    """The weight of the KL term, one value per joint step.

    constant:    start
    linear:      from start to end over the first `fraction` of the joint steps, then end
    exponential: the same, geometrically
    controller:  ln beta moves by gain * (KL - target) / target per step, within [low, high]; starts at start
    auto:        halves every `search` of the joint steps from start on, until a latent comes alive; then it is multiplied by `rebound`
                 and halves every `fall` of the joint steps, until the most informative latent holds `sharpest` nats, where it is held

    Too high a beta keeps every latent dead, and the start of a run is the one time at which all of them are; too low a one lets all of
    them come alive together, which leaves the axes tilted. Where the first comes alive depends on the data. A latent is sharp when the
    spread of its means is e^4 = 55 times its standard deviation: below that beta its variance would reach its floor (`models.encoder`),
    and other latents would have to say the same once more.

    Args:
        settings: The `kl_weight` section of a config.
        joint_steps: Steps in which the encoder learns.
        scale: Factor on every beta of a fixed course, and on the first of others: below 1 after a restart.
    """

    def __init__(self, settings: KLWeightSettings, joint_steps: int, scale: float = 1.0) -> None:
        self.settings, self.joint_steps, self.scale = settings, joint_steps, scale
        self.controlled = scale * settings.start  # what controller and auto have come to
        self.information: list[float] = []  # auto: per latent dimension, smoothed over the steps
        self.found: int | None = None  # auto: joint step at which the first latent came alive
        self.highest = settings.high  # auto: beta from then on at most

    def __call__(self, joint_step: int) -> float:
        """beta at a joint step, counted from 0."""
        s = self.settings
        if s.kind in ("controller", "auto"):
            return self.controlled
        if s.kind == "constant":
            return self.scale * s.start
        progress = min(1.0, joint_step / max(1.0, s.fraction * self.joint_steps))
        if s.kind == "linear":
            return self.scale * (s.start + (s.end - s.start) * progress)
        return self.scale * s.start * (s.end / s.start) ** progress

    @property
    def searching(self) -> bool:
        """Whether auto still looks for the beta at which a latent comes alive, and has any left to try."""
        return self.settings.kind == "auto" and self.found is None and self.controlled > self.settings.low

    def observe(self, joint_step: int, kl: float, information: Sequence[float]) -> None:
        """Tell what a joint step measured on its batch, once and in order.

        Args:
            joint_step: Counted from 0.
            kl: Nats per image.
            information: Per latent dimension, nats; as `metrics.latents.gaussian_information`.
        """
        s = self.settings
        if s.kind == "controller":
            error = max(-1.0, min(1.0, (kl - s.target) / s.target))
            self.controlled = min(s.high, max(s.low, self.controlled * math.exp(s.gain * error)))
        if s.kind == "auto":
            before = self.information or [0.0] * len(information)
            self.information = [SMOOTHING * old + (1 - SMOOTHING) * new for old, new in zip(before, information, strict=True)]
            if self.found is None and max(self.information) > ALIVE_NATS:
                self.found = joint_step
                self.controlled = self.highest = min(s.high, s.rebound * self.controlled)
            share = s.search if self.found is None else s.fall
            missing = max(-1.0, min(1.0, 10.0 * (1.0 - max(self.information) / s.sharpest)))  # of full speed, from 10 % off
            self.controlled *= 0.5 ** (missing / max(1.0, share * self.joint_steps))
            self.controlled = min(self.highest, max(s.low, self.controlled))

    @property
    def state(self) -> dict[str, Any]:
        """What a resumed run needs; what JSON can hold."""
        keys = ("controlled", "information", "found", "highest", "scale")
        return {key: getattr(self, key) for key in keys}

    def restore(self, state: dict[str, Any] | float) -> None:
        """Go on from a `state`; checkpoints of before 2026-11-29 hold the controller's alone."""
        if not isinstance(state, dict):
            state = {"controlled": state}
        for key, value in state.items():
            setattr(self, key, value)

    @property
    def reference(self) -> float:
        """One weight that makes validation losses of different steps comparable: where a course ends; else where it starts."""
        return self.settings.end if self.settings.kind in ("linear", "exponential", "auto") else self.settings.start
