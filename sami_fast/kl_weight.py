"""beta over the joint steps: a fixed course, or a controller that holds the KL at a target."""

import math
from typing import Protocol


class KLWeightSettings(Protocol):
    kind: str
    start: float
    end: float
    fraction: float
    target: float
    gain: float
    low: float
    high: float


class KLWeight:
    """The weight of the KL term, one value per joint step.

    constant:    start
    linear:      from start to end over the first `fraction` of the joint steps, then end
    exponential: the same, geometrically
    controller:  ln beta moves by gain * (KL - target) / target per step, within [low, high]; starts at start

    Args:
        settings: The `kl_weight` section of a config.
        joint_steps: Steps in which the encoder learns.
    """

    def __init__(self, settings: KLWeightSettings, joint_steps: int) -> None:
        self.settings, self.joint_steps = settings, joint_steps
        self.controlled = settings.start

    def __call__(self, joint_step: int) -> float:
        """beta at a joint step, counted from 0."""
        s = self.settings
        if s.kind == "controller":
            return self.controlled
        if s.kind == "constant":
            return s.start
        progress = min(1.0, joint_step / max(1.0, s.fraction * self.joint_steps))
        if s.kind == "linear":
            return s.start + (s.end - s.start) * progress
        return s.start * (s.end / s.start) ** progress

    def observe(self, kl: float) -> None:
        """Tell the controller the batch's KL in nats per image, once per joint step."""
        s = self.settings
        if s.kind == "controller":
            error = max(-1.0, min(1.0, (kl - s.target) / s.target))
            self.controlled = min(s.high, max(s.low, self.controlled * math.exp(s.gain * error)))

    @property
    def reference(self) -> float:
        """One weight that makes validation losses of different steps comparable: where a course ends; else where it starts."""
        return self.settings.end if self.settings.kind in ("linear", "exponential") else self.settings.start
