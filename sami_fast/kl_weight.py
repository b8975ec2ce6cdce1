"""beta over the joint steps: a fixed course, a controller that holds the KL, or a course that begins where latents come alive."""

import math
from collections.abc import Sequence
from typing import Any, Protocol

ALIVE_NATS = 0.2  # smoothed information of batches at which a latent has come alive beyond doubt
DEAD_NATS = 0.05  # of the most informative one, below which that was too early
SMOOTHING = 0.95  # decay per step of that average
GROWTH_SMOOTHING = 0.98  # the same, of what is added to it per step


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
    patience: float
    sharpest: float
    settle: float


class KLWeight:
    """The weight of the KL term, one value per joint step.

    constant:    start
    linear:      from start to end over the first `fraction` of the joint steps, then end
    exponential: the same, geometrically
    controller:  ln beta moves by gain * (KL - target) / target per step, within [low, high]; starts at start
    auto:        halves every `search` of the joint steps from start on, until a latent comes alive; then it is multiplied by `rebound`,
                 once, and halves every `fall` of the joint steps, until the most informative latent holds `sharpest` nats, where it is
                 held; slower by `patience`, or not at all, while the information grows fast enough to get there in the time of a halving.
                 If no latent lives any more, it falls as at first until one does, and never again rises to where they died. Where one
                 lives it may only rise over the last `settle` of the joint steps

    Too high a beta keeps every latent dead, and too low a one lets all of them come alive together, which leaves the axes tilted. Where
    the first comes alive depends on the data. What lives holds on at a higher beta than the one at which it came alive: a low start with a
    high rebound wakes latents at once, and only those survive the rebound that are worth most. What already grows needs no lower beta,
    only time. A latent is sharp when the spread of its means is e^4 = 55 times its standard deviation: below that beta its variance would
    reach its floor (`models.encoder`), and other latents would have to say the same once more. At the end latents that the last of the
    fall has woken need time too.

    Args:
        settings: The `kl_weight` section of a config.
        joint_steps: Steps in which the encoder learns.
        scale: Factor on every beta of a fixed course, on the first of others, and on auto's least: below 1 after a restart.
    """

    def __init__(self, settings: KLWeightSettings, joint_steps: int, scale: float = 1.0) -> None:
        self.settings, self.joint_steps, self.scale = settings, joint_steps, scale
        self.controlled = scale * settings.start  # what controller and auto have come to
        self.information: list[float] = []  # auto: per latent dimension, smoothed over the steps
        self.growth = 0.0  # auto: of the information of the most informative latent, nats per step, smoothed
        self.found: int | None = None  # auto: joint step at which the first latent came alive
        self.asleep = True  # auto: whether no latent lives
        self.low = scale * settings.low if settings.kind == "auto" else settings.low
        self.highest = settings.high  # auto: beta from now on at most; lower where latents died

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
        """Whether auto looks for the beta at which a latent comes alive, and has any left to try."""
        return self.settings.kind == "auto" and self.asleep and self.controlled > self.low

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
            self.controlled = min(s.high, max(self.low, self.controlled * math.exp(s.gain * error)))
        if s.kind == "auto":
            before = self.information or [0.0] * len(information)
            self.information = [SMOOTHING * old + (1 - SMOOTHING) * new for old, new in zip(before, information, strict=True)]
            most = max(self.information)
            self.growth = GROWTH_SMOOTHING * self.growth + (1 - GROWTH_SMOOTHING) * (most - max(before))
            if self.asleep and most > ALIVE_NATS:
                self.asleep = False
                if self.found is None:
                    self.found = joint_step
                    self.controlled = min(self.highest, s.rebound * self.controlled)
            elif not self.asleep and most < DEAD_NATS:
                self.asleep = True
                self.highest = min(self.highest, self.controlled)
            share, wanted = (s.search, ALIVE_NATS) if self.asleep else (s.fall, s.sharpest)
            halving = max(1.0, share * self.joint_steps)
            speed = max(-1.0, min(1.0, 10.0 * (1.0 - most / wanted)))  # full from 10 % off
            if speed > 0:
                speed *= 1.0 - s.patience * max(0.0, min(1.0, self.growth * halving / (wanted - most)))
            if not self.asleep and joint_step >= (1.0 - s.settle) * self.joint_steps:
                speed = min(0.0, speed)
            self.controlled *= 0.5 ** (speed / halving)
            self.controlled = min(self.highest, max(self.low, self.controlled))

    @property
    def state(self) -> dict[str, Any]:
        """What a resumed run needs; what JSON can hold."""
        keys = ("controlled", "information", "growth", "found", "asleep", "highest", "scale")
        return {key: getattr(self, key) for key in keys}

    def restore(self, state: dict[str, Any] | float) -> None:
        """Go on from a `state`; checkpoints of before 2026-11-29 hold the controller's alone.

        Raises:
            ValueError: it is none; nothing is changed.
        """
        if not isinstance(state, dict):
            state = {"controlled": state}
        known = {} if state.get("found") is None else {"asleep": False}  # checkpoints of before 2026-11-30 do not say it
        # Nor is what they said besides, where latents woke, of use.
        state = {key: value for key, value in (self.state | known | state).items() if key != "woken"}
        information, found = state["information"], state["found"]
        numbers = [*(state[key] for key in ("controlled", "highest")), *(information if isinstance(information, list) else [None])]
        if (
            state.keys() != self.state.keys()
            or not all(isinstance(number, int | float) and 0 <= number < math.inf for number in [*numbers, state["scale"]])
            or not state["scale"] > 0
            or not isinstance(found, int | None)
            or not isinstance(state["asleep"], bool)
        ):
            raise ValueError(f"state: expected what `KLWeight.state` gives, found {state}")
        for key, value in state.items():
            setattr(self, key, value)

    @property
    def reference(self) -> float:
        """One weight that makes validation losses of different steps comparable: where a course ends; else where it starts."""
        return self.settings.end if self.settings.kind in ("linear", "exponential", "auto") else self.settings.start
