"""How a comparison is measured: everything correct first, then all implementations in turn, round by round, and one row for each.

A row is a flat dict: what was measured, how long a call took (median, 20 % and 80 %), the ratio of the baseline's time to its own within
each round, peak memory, the first call, the roofline; the fixture `compete` of conftest.py adds the address.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from .machine import roofline, seconds

SECONDS = 0.8  # that the rounds of one implementation may take together
MIN_ROUNDS, MAX_ROUNDS = 5, 200
SHORTEST = 1e-3  # seconds of a measurement: shorter calls are repeated within it
WARMUP_ROUNDS = 2


# Errors are root mean squares relative to the float64 reference, in units of the dtype's rounding step. The reference in the same
# dtype sets the scale; FLOOR forgives a lucky reference, CAP catches a broken one. Largest errors seen of the reference (x86, AVX512):
# ops 3.3 units in float32 and 1.1 in bfloat16, step 1032 (the sines of the time embedding, whose angles reach 1600 radians).
ERROR_FACTOR = {"fwd": 2.0, "bwd": 3.0, "bwd_bwd": 3.0, "step": 3.0, "sample": 3.0}
FLOOR = 4.0
CAP = {"fwd": 16.0, "bwd": 16.0, "bwd_bwd": 16.0, "step": 2.0**14, "sample": 4096.0}


class Incorrect(AssertionError):
    """An implementation computes something else than its op: it gets no row."""


def dtype_label(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def relative_error(found: Tensor, truth: Tensor, least: float = 0.0) -> float:
    """Root mean square of the difference over that of the truth, or over `least` where that is more; inf for another shape."""
    if found.shape != truth.shape:
        return math.inf
    return _rms(found.double() - truth.double()) / max(_rms(truth), least, torch.finfo(torch.float64).tiny)


def check_close(
    what: str, mode: str, found: Sequence[Tensor], truth: Sequence[Tensor], same_dtype: Sequence[Tensor], unit: float | None = None
) -> None:
    """Raise Incorrect unless every tensor is as close to the float64 truth as the reference in the same precision, by ERROR_FACTOR.

    `unit` is that precision's rounding step; the dtype's own where it is None. The gradients of a step belong together: those that are
    zero but for rounding errors, as of a bias before a norm, are held against the others.
    """
    least = 1e-3 * max(_rms(t) for t in truth[1:]) if mode == "step" else 0.0
    forms, expected = ([(list(t.shape), dtype_label(t.dtype)) for t in tensors] for tensors in (found, same_dtype))
    if forms != expected:
        raise Incorrect(f"{what}: expected {expected}, found {forms}")
    for place, (value, exact, yardstick) in enumerate(zip(found, truth, same_dtype, strict=True)):
        step = unit or torch.finfo(value.dtype).eps
        allowed = step * min(ERROR_FACTOR[mode] * relative_error(yardstick, exact, least) / step + FLOOR, CAP[mode])
        error = relative_error(value, exact, least)
        if not error <= allowed:  # also true for NaN
            raise Incorrect(f"{what}, tensor {place}: relative error {error:.2e}, allowed {allowed:.2e}")


@dataclass(frozen=True)
class Contestant:
    """One implementation, found correct.

    Attributes:
        name: As in the row.
        run: One call.
        fresh: `run` makes, outside the clock, what a round times once.
        own_clock: `run` returns the seconds that count.
        first: Seconds of its very first call in this process: compiling included, or loading what an earlier process compiled (from_cache).
        extra: More fields of its row.
    """

    name: str
    run: Callable[[], Any]
    first: float | None = None
    extra: dict[str, Any] | None = None
    fresh: bool = False
    own_clock: bool = False

    @classmethod
    def ready(
        cls, name: str, make: Callable[[], Callable[[], Any]], check: Callable[[Any], object], device: str, **extra: Any
    ) -> "Contestant":
        """Make an implementation, call it once, and let `check` raise when its results are wrong."""
        hits = counters["inductor"]["fxgraph_cache_hit"]
        start = time.perf_counter()
        run = make()
        found = run()
        if device == "cuda":
            torch.cuda.synchronize()
        first = time.perf_counter() - start
        check(found)
        return cls(name, run, first, {"from_cache": counters["inductor"]["fxgraph_cache_hit"] > hits, **extra})


def gather(makers: dict[str, Callable[[], Contestant]]) -> tuple[list[Contestant], dict[str, str]]:
    """Those that are right; and of the others, by name, what was wrong. One that fails does not keep the others from their rows."""
    ready, wrong = [], {}
    for name, make in makers.items():
        try:
            ready.append(make())
        except Exception as error:  # whatever other people's code may raise
            wrong[name] = f"{type(error).__name__}: {error}"
    return ready, wrong


def peak_bytes(run: Callable[[], object], device: str = "cpu") -> int:
    """The most that torch's allocator held during a call, over what was there before: outputs, saved tensors, temporaries."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(held.max(initial=0))


class Rounds:
    """Times the contestants one after the other, as often as asked: whatever else the machine does hits all alike."""

    def __init__(self, contestants: Sequence[Contestant], device: str, budget: float = SECONDS, rounds: int | None = None) -> None:
        self.contestants, self.device = contestants, device
        self.seconds: dict[str, list[float]] = {c.name: [] for c in contestants}
        warm = [[self._time(c, 1) for _ in range(1 if c.fresh else WARMUP_ROUNDS)] for c in contestants]
        self.calls = [1 if c.fresh or c.own_clock else max(1, int(SHORTEST / min(t))) for c, t in zip(contestants, warm, strict=True)]
        # The slow rounds of the warm-up set the number: a busy machine gets fewer, not a longer run.
        round_seconds = sum(max(max(t), n * min(t)) for n, t in zip(self.calls, warm, strict=True))
        self.rounds = rounds or min(MAX_ROUNDS, max(MIN_ROUNDS, int(budget * len(contestants) / round_seconds)))

    def _time(self, contestant: Contestant, calls: int) -> float:
        if contestant.own_clock:
            return contestant.run()
        return seconds(contestant.run() if contestant.fresh else contestant.run, self.device, calls)

    def time(self, place: int) -> None:
        contestant = self.contestants[place]
        self.seconds[contestant.name].append(self._time(contestant, self.calls[place]))


def rows_of(
    rounds: Rounds,
    described: dict[str, Any],
    baseline: str,
    dtype: torch.dtype,
    peak: bool,
) -> list[dict[str, Any]]:
    """One row per contestant, without the address.

    Args:
        rounds: Timed.
        described: What all rows share: op, shape, dtype, mode; bytes and flops, from which the bound follows, or bound and bound_ms;
            images, for a rate; model_flops and peak_flops_per_second, for the share of the peak.
        baseline: The contestant that ratios divide by.
        dtype: Of the matrix products.
        peak: Measure peak memory, in one more call.
    """
    base = np.array(rounds.seconds[baseline])
    bound = {} if "bound" in described else roofline(described.get("bytes"), described.get("flops"), dtype, rounds.device)
    described = described | bound
    rows = []
    for contestant in rounds.contestants:
        times = np.array(rounds.seconds[contestant.name])
        ratios, median = base / times, float(np.median(times))
        row = {
            **described,
            "implementation": contestant.name,
            "baseline": baseline,
            **{f"{key}_ms": 1e3 * float(np.quantile(times, q)) for key, q in (("median", 0.5), ("q20", 0.2), ("q80", 0.8))},
            **{key: float(np.quantile(ratios, q)) for key, q in (("ratio", 0.5), ("ratio_q20", 0.2), ("ratio_q80", 0.8))},
            "rounds": rounds.rounds,
            "first_seconds": contestant.first,
            "peak_bytes": peak_bytes(contestant.run, rounds.device) if peak and not contestant.fresh else None,
            **(contestant.extra or {}),
        }
        if described["bound"]:
            row["of_bound"] = described["bound_ms"] / (1e3 * median)
        if "images" in described:
            row["images_per_second"] = described["images"] / median
        if "model_flops" in described:
            row["mfu"] = described["model_flops"] / median / described["peak_flops_per_second"]
        rows.append(row)
    return rows
