"""Noise levels: alpha_t, sigma_t and logsnr as functions of t, how t is sampled and how a level is weighted.

Variance preserving throughout: x_t = alpha_t x_0 + sigma_t eps with alpha_t^2 + sigma_t^2 = 1 and logsnr = ln(alpha_t^2 / sigma_t^2),
so that alpha_t^2 = sigmoid(logsnr). t in [0, 1] runs from the cleanest level (logsnr_max) to the noisiest (logsnr_min).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops

MOST_LOGSNR = 100.0  # of float64, where alpha_t or sigma_t is 0 in all but name
WEIGHTINGS = ("elbo", "simple", "min_snr", "sigmoid")


class Schedule(ABC):
    """A decreasing map t -> logsnr, cut to [logsnr_min, logsnr_max] and rescaled so that t covers [0, 1].

    Args:
        logsnr_min, logsnr_max: The noisiest and the cleanest level, natural log of alpha_t^2 / sigma_t^2.
    """

    kind: str

    def __init__(self, logsnr_min: float, logsnr_max: float) -> None:
        if not logsnr_min < logsnr_max:
            raise ValueError(f"logsnr_min: expected less than logsnr_max = {logsnr_max}, found {logsnr_min}")
        if not max(-logsnr_min, logsnr_max) <= MOST_LOGSNR:
            raise ValueError(f"logsnr: expected at most {MOST_LOGSNR:g} either way, found {logsnr_min:g} to {logsnr_max:g}")
        self.logsnr_min, self.logsnr_max = logsnr_min, logsnr_max
        self._raw_first, self._raw_last = (
            self._raw_time(torch.tensor(level, dtype=torch.float64)).item() for level in (logsnr_max, logsnr_min)
        )

    @abstractmethod
    def _raw_logsnr(self, raw: Tensor) -> Tensor:
        """logsnr of the uncut schedule."""

    @abstractmethod
    def _raw_time(self, logsnr: Tensor) -> Tensor:
        """Inverse of `_raw_logsnr`."""

    @abstractmethod
    def _raw_slope(self, raw: Tensor, logsnr: Tensor) -> Tensor:
        """-d logsnr / d raw, > 0."""

    @property
    def settings(self) -> dict[str, Any]:
        """What `build_schedule` needs to make this schedule again."""
        return {"kind": self.kind, "logsnr_min": self.logsnr_min, "logsnr_max": self.logsnr_max}

    def _raw(self, t: Tensor) -> Tensor:
        return self._raw_first + t * (self._raw_last - self._raw_first)

    def logsnr(self, t: Tensor) -> Tensor:
        """[...] -> [...]: natural log of alpha_t^2 / sigma_t^2, any t in [0, 1]."""
        return self._raw_logsnr(self._raw(t)).clamp(self.logsnr_min, self.logsnr_max)

    def t(self, logsnr: Tensor) -> Tensor:
        """Inverse of `logsnr`, in [0, 1]."""
        return ((self._raw_time(logsnr) - self._raw_first) / (self._raw_last - self._raw_first)).clamp(0, 1)

    def nearest(self, logsnr: Tensor) -> Tensor:
        """The schedule's own levels nearest to these: themselves, where it has all levels between its ends."""
        return logsnr

    def slope(self, t: Tensor) -> Tensor:
        """-d logsnr / dt, > 0: the density of t over logsnr is its inverse when t is uniform."""
        raw = self._raw(t)
        return self._raw_slope(raw, self.logsnr(t)) * (self._raw_last - self._raw_first)

    def weight(self, t: Tensor, weighting: str, power: float = 1.0, first: float = 0.0) -> Tensor:
        """Factor on ||eps - eps_hat||^2 that makes its mean over sampled t the wanted integral over logsnr, in nats.

        elbo:    1/2 integral ||.||^2 d logsnr, the bound itself
        simple:  integral ||.||^2 dt, DDPM's (Ho et al., arXiv:2006.11239, eq. 14)
        min_snr: simple times min(1, 5 / snr) (Hang et al., arXiv:2303.09556)
        sigmoid: elbo times sigmoid(2 - logsnr) (Kingma & Gao, arXiv:2303.00848)

        Args:
            t: Sampled times in [0, 1], any shape.
            weighting: One of the four names.
            power, first: Of the density that t was drawn from (`sample`).
        Returns:
            Same shape as t.
        """
        if weighting not in WEIGHTINGS:
            raise ValueError(f"weighting: expected one of {', '.join(WEIGHTINGS)}, found {weighting!r}")
        logsnr = self.logsnr(t)
        if weighting == "elbo":
            weight = 0.5 * self.slope(t)
        elif weighting == "simple":
            weight = torch.ones_like(t)
        elif weighting == "min_snr":
            weight = (math.log(5.0) - logsnr).clamp_max(0).exp()
        else:
            weight = 0.5 * self.slope(t) * torch.sigmoid(2.0 - logsnr)
        if first:
            weight, t = (1.0 - first) * weight, (t - first) / (1.0 - first)
        return weight / (power * t ** (power - 1.0)) if power != 1.0 else weight

    def sample(
        self, index: Tensor, levels: int, global_batch: int, *, seed: int, step: int, power: float = 1.0, first: float = 0.0
    ) -> Tensor:
        """K noise levels per image, nested stratified: one image covers all K strata, the whole batch covers all B*K.

            u = (k + (rank(b) + v_bk) / B) / K,   t = first + (1 - first) u^(1/a)

        (`ops.stratified_uniform`). A level picked at random among the K of an image has density
        a s^(a-1) on [0, 1], with s = (t - first) / (1 - first); level k alone is confined to its stratum.

        Args:
            index: Place of each local image in the global batch. [B_local] int64.
            levels: K.
            global_batch: B, images of one step over all ranks and micro-batches.
            power: a; above 1 favours high noise.
            first: The smallest t, below 1: cleaner levels do not come up.
        Returns:
            [B_local, K] float32.
        """
        u = ops.stratified_uniform(index, levels, global_batch, seed=seed, step=step)
        if power == 1.0:
            return u if first == 0.0 else first + (1.0 - first) * u
        # Zero has density zero but may come up in float32, where elbo weights of some schedules are not finite. The power is taken in
        # float64, since in float32 its last bit can depend on how many others are taken with it.
        u = (u.clamp_min(1e-6).double() ** (1.0 / power)).float()
        return u if first == 0.0 else first + (1.0 - first) * u


def alpha_sigma(logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """Signal and noise amplitude of a level: alpha_t = sqrt(sigmoid(logsnr)), sigma_t = sqrt(sigmoid(-logsnr)); same shape."""
    return torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()


class UniformLogsnr(Schedule):
    """logsnr linear in t."""

    kind = "uniform_logsnr"

    def _raw_logsnr(self, raw: Tensor) -> Tensor:
        return -raw

    def _raw_time(self, logsnr: Tensor) -> Tensor:
        return -logsnr

    def _raw_slope(self, raw: Tensor, logsnr: Tensor) -> Tensor:
        return torch.ones_like(raw)


class Cosine(Schedule):
    """alpha_t = cos(pi/2 raw) (Nichol & Dhariwal, arXiv:2102.09672); cutting the range takes the place of their offset."""

    kind = "cosine"

    def _raw_logsnr(self, raw: Tensor) -> Tensor:
        return -2.0 * torch.log(torch.tan(math.pi / 2 * raw))

    def _raw_time(self, logsnr: Tensor) -> Tensor:
        return torch.atan(torch.exp(-0.5 * logsnr)) * (2 / math.pi)

    def _raw_slope(self, raw: Tensor, logsnr: Tensor) -> Tensor:
        return 2 * math.pi / torch.sin(math.pi * raw)


class LinearBeta(Schedule):
    """alpha_t^2 = exp(-B), B = 0.1 raw + (20 - 0.1) raw^2 / 2: DDPM's linear betas in continuous time (Song et al., arXiv:2011.13456)."""

    kind = "linear_beta"
    beta_min, beta_max = 0.1, 20.0

    def _raw_logsnr(self, raw: Tensor) -> Tensor:
        integral = self.beta_min * raw + 0.5 * (self.beta_max - self.beta_min) * raw.square()
        return -torch.log(torch.expm1(integral))

    def _raw_time(self, logsnr: Tensor) -> Tensor:
        integral, spread = F.softplus(-logsnr), self.beta_max - self.beta_min
        return 2 * integral / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * spread * integral))

    def _raw_slope(self, raw: Tensor, logsnr: Tensor) -> Tensor:
        # d/dB ln(expm1(B)) = 1 / (1 - exp(-B)) = 1 / sigma_t^2
        return (self.beta_min + (self.beta_max - self.beta_min) * raw) / torch.sigmoid(-logsnr)


class Discrete(Schedule):
    """The noise levels of a model of discrete timesteps, and none between: t falls into one of as many cells as there are levels.

    The weight of a level is the width of its cell in logsnr, so that a mean over t is the trapezoidal rule over the levels.

    Args:
        levels: logsnr of timesteps that follow one another, decreasing. [N], N >= 2.
    """

    kind = "discrete"

    def __init__(self, levels: Sequence[float]) -> None:
        self.levels = torch.tensor(levels, dtype=torch.float64)
        if self.levels.dim() != 1 or len(self.levels) < 2 or not (self.levels.diff() < 0).all():
            raise ValueError(f"levels: expected at least two decreasing numbers, found {list(self.levels.shape)}")
        self._widths = -torch.gradient(self.levels)[0]
        super().__init__(self.levels[-1].item(), self.levels[0].item())

    @property
    def settings(self) -> dict[str, Any]:
        return {"kind": self.kind, "levels": self.levels.tolist()}

    def nearest(self, logsnr: Tensor) -> Tensor:
        return self.levels.to(logsnr)[fractional_index(self.levels, logsnr).round().long()]

    def _index(self, raw: Tensor) -> Tensor:
        return (raw * len(self.levels)).long().clamp(0, len(self.levels) - 1)

    def _raw_logsnr(self, raw: Tensor) -> Tensor:
        return self.levels.to(raw)[self._index(raw)]

    def _raw_time(self, logsnr: Tensor) -> Tensor:
        # From middle to middle of the outermost cells, of which half is used: the ends of the trapezoidal rule.
        return (fractional_index(self.levels, logsnr).round() + 0.5) / len(self.levels)

    def _raw_slope(self, raw: Tensor, logsnr: Tensor) -> Tensor:
        return self._widths.to(raw)[self._index(raw)] * len(self.levels)


def fractional_index(levels: Tensor, logsnr: Tensor) -> Tensor:
    """Where levels lie in a decreasing list of them, by linear interpolation: 1.5 is halfway from levels[1] to levels[2].

    Args:
        levels: [N] float64, decreasing.
        logsnr: Any shape; a level beyond the ends counts as the end.
    Returns:
        Shape, dtype and device of logsnr, in [0, N - 1].
    """
    levels = levels.to(logsnr.device)
    wanted = logsnr.double().clamp(levels[-1], levels[0])
    after = torch.searchsorted(-levels, -wanted.contiguous()).clamp(1, len(levels) - 1)
    before = after - 1
    return (before + (levels[before] - wanted) / (levels[before] - levels[after])).to(logsnr.dtype)


SCHEDULES: dict[str, type[Schedule]] = {cls.kind: cls for cls in (UniformLogsnr, Cosine, LinearBeta)}
KINDS = (*SCHEDULES, Discrete.kind)


def build_schedule(settings: dict[str, Any]) -> Schedule:
    """The schedule whose `settings` these are."""
    arguments = {name: value for name, value in settings.items() if name != "kind"}
    return Discrete(**arguments) if settings["kind"] == Discrete.kind else SCHEDULES[settings["kind"]](**arguments)
