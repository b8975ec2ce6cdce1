"""Whole training loops, in steps a second: ours against the loop a competent user writes in torch, against torch.compile and JAX.

Data, optimiser and averaged weights are part of a step. The base is eager torch in channels-last. With one thread the processor's
time counts, which other programs hardly change; with more threads or ranks, the clock on the wall. By default four runs and four batch
sizes are measured; with --sweeps also larger images, two threads, two ranks and torch.compile.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from signal import SIGCONT, SIGSTOP
from typing import Any

import pytest
import torch

from sami_fast.config import Config, load_config
from sami_fast.data import open_dataset
from sami_fast.methods.build import build_model
from sami_fast.ops.backend import refusal
from sami_fast.train import parse

from .loops import COMPILED, JAX, LAST, NCHW, OURS, Case, Loop, check_same
from .measure import MIN_ROUNDS, SECONDS, Contestant, gather
from .registry import GAUSSIAN_LOG_PROB, GUIDED_LOSS, Op, Problem
from .steps import Step

RUNS = {"disks16": 1.5, "disks32": 1.7, "sprites32": 1.7, "faces64": 2.0}  # what was aimed at, to channels-last
BATCHES, OF_BATCHES = (16, 32, 128, 256), 1.1
OVER_JAX = 3.0
ALSO = ("disks16", "faces64")  # where torch.compile and JAX are measured, too: they take minutes to compile
SIZES = {64: 16, 128: 16}  # images of disks by their side, and how many a step
TURN = 0.4  # seconds of a turn
CAPTURED = 34  # steps after which ours is (`sami_fast.engine.capture`), with two to spare
ROUNDS = 16
KEPT = 0.6  # share of its speed that training keeps while one of two cores is busy
# Before OMP_WAIT_POLICY was set for a run, threads waited for one another by spinning for so long: OpenMP's default.
POLICIES = {"": {}, "spinning": {"GOMP_SPINCOUNT": "300000"}, "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"}}

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(autouse=True)
def on_a_cpu(device: str) -> None:
    if device != "cpu":
        pytest.skip("loops are compared on a CPU")


@pytest.fixture
def shrunk(request: pytest.FixtureRequest) -> Callable[[Case], Case]:
    """A case as it is, or its rehearsal."""
    tiny = request.config.getoption("--tiny")
    return lambda case: replace(case, run="tiny", batch=min(case.batch, 16), size=0) if tiny else case


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    return max(MIN_ROUNDS, round(ROUNDS * request.config.getoption("--seconds") / SECONDS))


def config_of(case: Case) -> Config:
    parsed = parse(case.arguments)
    return load_config(parsed.config, parsed.overrides)


def described(case: Case) -> dict[str, Any]:
    """What rows of a case share. A row says how many threads each process had, and of which clock its seconds are."""
    config = config_of(case)
    channels, *sides = open_dataset(config.data, config.seed).image_shape
    batch = config.train.batch_size
    return {
        "op": f"loop {case}",
        "shape": {"B": batch, "K": 1, "C": channels, "H": sides[0], "W": sides[1]},
        "dtype": "float32",
        "mode": "loop",
        "images": batch,
        "bytes": None,
        "bound": None,
        "threads": case.threads,  # 0: what ours takes by itself
        "ranks": case.ranks,
        "clock": clock_of(case),
    }


def clock_of(case: Case) -> str:
    return "processor" if (case.threads, case.ranks) == (1, 1) else "wall"


@contextmanager
def started(whos: Sequence[str], case: Case, **environment: str) -> Iterator[dict[str, Loop]]:
    """The loops of a case, all starting at once; they end with the block."""
    loops = {}
    try:
        for who in whos:
            loops[who] = Loop(who, case, **environment)
        yield loops
    finally:
        for loop in loops.values():
            loop.close()


def contestant(name: str, loop: Loop, case: Case, turn: Callable[[int], tuple[float, float]], **extra: Any) -> Contestant:
    """A loop that has begun; its turns take about TURN seconds. Ours is captured by then, as in every run of more than a few steps."""
    place = 1 if clock_of(case) == "processor" else 0
    turn(CAPTURED if loop.who == OURS else 1)  # the first turn of others may compile, too
    steps = max(1, round(TURN / turn(2)[place]))
    found = {"from_cache": False, "steps": steps, **extra}

    def run() -> float:
        seconds = turn(steps)[place]
        found["peak_bytes"] = loop.peak if loop.who not in (COMPILED, JAX) else None  # theirs holds compilers
        return seconds

    return Contestant(name, run, loop.first, found, own_clock=True)


def compare(case: Case, whos: Sequence[str], target: float | None, rounds: int, compete: Callable[..., None]) -> None:
    """Ours beside others, who have to compute the same."""
    config = config_of(case)
    start = dict(build_model(config, open_dataset(config.data, config.seed).image_shape).named_parameters())
    with started([OURS, *whos], case) as loops:
        ours = loops[OURS].begin()

        def ready(who: str) -> Contestant:
            loop = loops[who] if who == OURS else loops[who].begin()
            check_same(loop, ours, start)
            return contestant(who, loop, case, loop.turn, **({"ours_target": OVER_JAX} if who == JAX else {}))

        found, wrong = gather({who: partial(ready, who) for who in loops})
        targets = {OURS: target} if target else None
        compete(described(case), found, LAST, peak=False, rounds=rounds, targets=targets, wrong=wrong, forgiven=[COMPILED, JAX])


@pytest.mark.parametrize("run", RUNS)
def test_loop(run: str, rounds: int, compete: Callable[..., None], shrunk: Callable[[Case], Case], request: pytest.FixtureRequest) -> None:
    whos = [LAST, NCHW]
    if run in ALSO:
        whos += [COMPILED] if request.config.getoption("--sweeps") else []
        whos += [JAX] if find_spec("jax") else []  # pip install 'sami-fast[jax]'
    compare(shrunk(Case(run)), whos, RUNS[run], rounds, compete)


@pytest.mark.parametrize("batch", BATCHES)
def test_batch(batch: int, rounds: int, compete: Callable[..., None], shrunk: Callable[[Case], Case]) -> None:
    compare(shrunk(Case("disks16", batch)), [LAST], OF_BATCHES, rounds, compete)


@pytest.mark.sweep
@pytest.mark.parametrize("size", SIZES)
def test_size(size: int, rounds: int, compete: Callable[..., None], shrunk: Callable[[Case], Case]) -> None:
    compare(shrunk(Case("disks16", SIZES[size], size)), [LAST], None, rounds, compete)


@pytest.mark.sweep
@pytest.mark.parametrize("run", RUNS)
def test_two_threads(run: str, rounds: int, compete: Callable[..., None], shrunk: Callable[[Case], Case]) -> None:
    compare(shrunk(Case(run, threads=2)), [LAST], None, rounds, compete)


@pytest.mark.sweep
@pytest.mark.parametrize("run", ALSO)
def test_two_ranks(run: str, rounds: int, compete: Callable[..., None], shrunk: Callable[[Case], Case]) -> None:
    """Through the launcher; the loop by hand under DistributedDataParallel."""
    compare(shrunk(Case(run, ranks=2)), [LAST], None, rounds, compete)


def test_small_ops(compete: Callable[..., None], shrunk: Callable[[Case], Case]) -> None:
    """Two ops that have no fused second order on a CPU, beside the gradients of a step: what there is to gain."""
    config = config_of(shrunk(Case("disks16")))
    dataset = open_dataset(config.data, config.seed)
    batch, (channels, height, width) = config.train.batch_size, dataset.image_shape
    images = {"S": batch, "C": channels, "H": height, "W": width}
    work = {
        "step": Step.of(config, dataset.images(torch.arange(batch))).ours("auto"),
        "guided_loss": _of_op(GUIDED_LOSS, images, "bwd"),  # the order that a step asks for
        "gaussian_log_prob": _of_op(GAUSSIAN_LOG_PROB, {"B": batch, "Z": config.encoder.latent_size}, "bwd_bwd"),
    }
    what = {"op": "share of a step, disks16", "shape": images, "dtype": "float32", "mode": "share", "bytes": None, "bound": None}
    compete(what, [Contestant(name, run) for name, run in work.items()], "step", peak=False)


def _of_op(op: Op, shape: dict[str, int], mode: str) -> Callable[[], object]:
    """Forward and derivatives of an op by the backend that a step runs it on."""
    backend = "cpp" if refusal("cpp", "cpu", torch.float32) is None else "reference"
    return Problem.make(op, shape, torch.float32, mode).runner(op.implementations[backend])


@contextmanager
def busy_core(core: int) -> Iterator[subprocess.Popen]:
    """A process that computes on this core and never rests; asleep until it gets SIGCONT."""
    endless = f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", endless])
    process.send_signal(SIGSTOP)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("policy", [pytest.param(p, marks=[pytest.mark.sweep] if p else [], id=p or "default") for p in POLICIES])
def test_a_busy_core(
    policy: str, rounds: int, compete: Callable[..., None], shrunk: Callable[[Case], Case], request: pytest.FixtureRequest
) -> None:
    """Training with its default settings on two cores, quiet and while something else has one of them."""
    before = os.sched_getaffinity(0)
    cores = sorted(before)[:2]
    if len(cores) < 2:
        pytest.skip("needs two cores")
    case = shrunk(Case("disks16", threads=2 if policy else 0))
    os.sched_setaffinity(0, cores)
    try:
        with started([OURS], case, **POLICIES[policy]) as loops, busy_core(cores[0]) as other:
            loop = loops[OURS].begin()

            def beside(steps: int) -> tuple[float, float]:
                other.send_signal(SIGCONT)
                try:
                    return loop.turn(steps)
                finally:
                    other.send_signal(SIGSTOP)

            both = [contestant("quiet", loop, case, loop.turn), contestant("one core busy", loop, case, beside)]
            what = described(case) | {"op": f"busy core{', ' if policy else ''}{policy}", "mode": "busy"}
            compete(what, both, "quiet", peak=False, rounds=rounds, targets={} if policy else {"one core busy": KEPT})
    finally:
        os.sched_setaffinity(0, before)
