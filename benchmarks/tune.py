"""Tune the schedules of the Triton kernels on the GPU at hand, and write the table that launchers read (kernels/tiles.py).

python benchmarks/tune.py --rows tune.jsonl --write tiles.json --seconds 240        # then SAMI_FAST_TILES=tiles.json, or kernels/tiles.json
python benchmarks/tune.py --rows tune.jsonl --write tiles.json --only "attention bwd_bwd"

Every key of a kernel (dtype width, head size, layout: see SCHEDULES) is asked for at the sizes of training on CelebA-64, the most valuable
first. Worker processes compile the neighbours of the best schedule known; one that spills, does not fit or gives wrong values is dropped;
the others are timed against the default, in turn, as CUDA graphs. The fastest is timed once more, must compile without spills in every
variant that is compiled ahead of time, and stands in the table if it is faster by more than 3 %. Then come the neighbours of the new best,
and so on until time is out. Rows are appended as they are measured; a second call goes on after them if no kernel has changed since.

Exit status 0 when all keys were looked at or time was out, 1 when no candidate at all could be timed, 2 for wrong usage, 3 when a candidate
took the GPU down with it: what it was is in the rows, and the next call leaves it out.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import problems
import torch
import triton
from problems import Problem
from sami_fast.kernels import aot, tiles
from sami_fast.kernels._common import INTERPRETED, Launch, recording
from sami_fast.kernels.tiles import Schedule, Table
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

FASTER = 1.03  # times the default: less is noise
AHEAD = 4  # keys whose candidates are compiled while one is timed
GRAPH_SECONDS, ROUNDS = 3e-4, 11  # of calls in one CUDA graph; replays of each
SIDES = {"BLOCK_Q": (16, 256), "BLOCK_K": (16, 256), "BLOCK_J": (16, 128), "BLOCK_I": (32, 512), "BLOCK_Z": (32, 4096)}
SIDES |= {"num_warps": (1, 16), "num_stages": (1, 4), "elements": (4, 32), "programs": (128, 4096)}
QUADS = ("guided_loss", "noise_sample", "random")  # their BLOCK_Q counts quads of elements, not queries
PAIRS = (("BLOCK_Q", "num_warps"), ("BLOCK_K", "num_warps"), ("BLOCK_Q", "BLOCK_K"), ("BLOCK_Z", "num_warps"), ("elements", "num_warps"))

Key = tuple[str, str]  # op, key of its SCHEDULES
Row = dict[str, Any]


@cache
def real_problems() -> list[Problem]:
    """Most valuable first: CelebA-64 with 64 images a GPU, then other head sizes."""
    half, single = torch.bfloat16, torch.float32

    def attention(dtype: torch.dtype, size: int) -> Iterator[Problem]:
        heads = max(256 // size, 2)
        yield from problems.attention(dtype, 64, 256, 256, heads, size, inside=True)
        yield from problems.attention(dtype, 8, 1024, 1024, heads, size)

    def group_norm(dtype: torch.dtype) -> Iterator[Problem]:
        for channels, side in ((128, 64), (256, 32), (256, 16), (256, 8), (64, 64)):
            yield from problems.group_norm_silu(dtype, 64, channels, side, 32)
        for channels, side in ((256, 32), (128, 64), (512, 16)):
            yield from problems.group_norm_silu(dtype, 64, channels, side, 32, last=True)

    return [
        *(p for dtype in (half, single) for part in (attention(dtype, 64), group_norm(dtype)) for p in part),
        *(p for dtype in (half, single) for p in attention(dtype, 32)),
        *(p for dtype in (single, half) for p in problems.guided_loss(dtype, 64, 1, 3, 64)),
        *(p for dtype in (single, half) for p in problems.noise_sample(dtype, 64, 4, 3, 64)),
        *problems.random(512, 3 * 64 * 64, 4),
        *problems.gaussian_log_prob(512, 32),
        *(p for size in (128, 16) for dtype in (half, single) for p in attention(dtype, size)),
        *(p for dtype in (single, half) for p in problems.guided_loss(dtype, 64, 1, 3, 64, last=True)),
        *problems.gaussian_log_prob(512, 4096),
    ]


@cache
def tiny_problems() -> list[Problem]:
    """For a rehearsal: every op, in dtypes whose keys are the same in the interpreter and on a GPU."""
    return [
        *problems.gaussian_log_prob(3, 40),
        *problems.attention(torch.float16, 1, 16, 16, 1, 16, inside=True),
        *problems.group_norm_silu(torch.float16, 1, 8, 8, 2),
        *problems.guided_loss(torch.float32, 1, 1, 1, 4),
        *problems.noise_sample(torch.float32, 1, 1, 1, 4),
        *problems.random(2, 5, 1),
    ]


def launches(problem: Problem, arguments: Any, key: Key, candidate: Schedule | None, arch: int) -> list[Launch]:
    """What the launcher would start under this key of its op, with a candidate or with what it selects by itself."""
    events: list[Any] = []
    with recording(events.append, arch), tiles.noting(events.append), tiles.trying(*key, candidate) if candidate else nullcontext():
        problems.call(import_module(f"sami_fast.kernels.{problem.op}"), problem.level, arguments)
    found, asked = [], None
    for event in events:
        if isinstance(event, tuple):
            asked = event
        elif asked == key:
            found.append(event)
    return found


def keys_of(problem: Problem) -> list[Key]:
    """The schedules that a problem asks for."""
    asked: list[Key] = []
    with recording(), tiles.noting(asked.append):
        problems.call(import_module(f"sami_fast.kernels.{problem.op}"), problem.level, problem.make("meta"))
    return list(dict.fromkeys(asked))


def neighbours(op: str, base: Schedule) -> list[Schedule]:
    """Schedules one step away: a number doubled or halved (stages: one more or less), or two of a pair."""

    def step(schedule: Schedule, name: str, up: bool) -> Schedule | None:
        low, high = (32, 2048) if name == "BLOCK_Q" and op in QUADS else SIDES[name]
        value = schedule[name] + (1 if up else -1) if name == "num_stages" else schedule[name] * 2 if up else schedule[name] // 2
        return schedule | {name: value} if low <= value <= high else None

    found = [step(base, name, up) for name in base for up in (True, False)]
    for first, second in PAIRS:
        if first in base and second in base:
            # More warps go with larger tiles; of two sides of a tile one grows at the cost of the other.
            same = second == "num_warps"
            for up in (True, False):
                one = step(base, first, up)
                found.append(one and step(one, second, up if same else not up))
    return [candidate for candidate in found if candidate is not None]


class _Chip:
    """Stands in for Triton's driver in a worker, which compiles as a launch would, and needs no GPU."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(place: int, tiny: bool, key: Key, candidate: Schedule, arch: int) -> tuple[str, float]:
    """In a worker: compile a problem's kernel under a key, which fills Triton's cache. What is wrong with it, or nothing; seconds."""
    start = time.monotonic()
    driver.set_active(_Chip(arch))
    problem = (tiny_problems() if tiny else real_problems())[place]
    try:
        for item in launches(problem, problem.make("meta"), key, candidate, arch):
            made = item.kernel.warmup(*item.args, grid=item.grid, **options_of(item))
            if spilled := aot.figures_of(made)["stack"]:
                return f"spills {spilled} bytes", time.monotonic() - start
    except Exception as error:  # a compiler that gives up is a finding, whatever it raises
        return f"does not compile: {_one_line(error)}", time.monotonic() - start
    return "", time.monotonic() - start


def variants_spill(key: Key, candidate: Schedule, arch: int, most: int) -> str:
    """In a worker: of the binaries that are compiled ahead of time and that a candidate changes, at most so many, one that spills."""
    known = {source.key for source in _variants(key, None, arch)}
    new = {source.key: source for source in _variants(key, candidate, arch) if source.key not in known}
    for source in list(new.values())[:most]:
        if spilled := aot.build(source, arch).figures["stack"]:
            return f"spills {spilled} bytes ahead of time: {source.label}"
    return ""


def _variants(key: Key, candidate: Schedule | None, arch: int) -> Iterator[Any]:
    for label, run in import_module(f"sami_fast.kernels.{key[0]}").aot_cases():
        with recording(arch=arch) as items, tiles.trying(*key, candidate) if candidate else nullcontext():
            run()
        for item in items:
            yield aot.source_of(key[0], label, item)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def options_of(item: Launch) -> dict[str, Any]:
    """The keyword arguments of a launch, as `sami_fast.kernels._common.launch` gives them."""
    return {**item.constants, "num_warps": item.num_warps, "num_stages": item.num_stages, "enable_fp_fusion": item.fp_fusion}


def start_all(items: Sequence[Launch]) -> None:
    for item in items:
        item.kernel[item.grid](*item.args, **options_of(item))


def times(contestants: Sequence[Sequence[Launch]], rounds: int) -> list[list[float]]:
    """Seconds of a call of each, taken in turn, round by round. On a GPU: CUDA graphs of many calls, so that nobody waits for Python."""
    if not torch.cuda.is_available():
        return [list(column) for column in zip(*([_seconds(items) for items in contestants] for _ in range(rounds)), strict=True)]
    graphs = []
    for items in contestants:
        for _ in range(3):
            start_all(items)
        torch.cuda.synchronize()
        begin, end = _events()
        begin.record()
        for _ in range(5):
            start_all(items)
        end.record()
        torch.cuda.synchronize()
        calls = max(2, min(50, int(GRAPH_SECONDS / (1e-3 * begin.elapsed_time(end) / 5))))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                start_all(items)
        graph.replay()
        graphs.append((graph, calls))
    found: list[list[float]] = [[] for _ in contestants]
    for _ in range(rounds):
        for place, (graph, calls) in enumerate(graphs):
            begin, end = _events()
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            found[place].append(1e-3 * begin.elapsed_time(end) / calls)
    return found


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def _seconds(items: Sequence[Launch]) -> float:
    start = time.perf_counter()
    start_all(items)
    return time.perf_counter() - start


@dataclass
class Case:
    """A problem with its data: values and times of the default are there once, and the truth."""

    problem: Problem
    device: str
    arguments: Any = None
    truth: tuple[torch.Tensor, ...] = ()
    default_error: float = 0.0

    def __post_init__(self) -> None:
        self.arguments = self.problem.make(self.device)
        self.truth = problems.twin(self.problem, self.arguments)
        self.default_error = problems.error(self._values(), self.truth)

    def _values(self) -> tuple[torch.Tensor, ...]:
        return problems.call(import_module(f"sami_fast.kernels.{self.problem.op}"), self.problem.level, self.arguments)

    def fault(self, key: Key, candidate: Schedule) -> str:
        """What is wrong with a candidate's values, or nothing: at most twice the default's error, and for noise the same bits."""
        with tiles.trying(*key, candidate):
            found = self._values()
        if self.problem.exact:
            return "" if all(torch.equal(a, b) for a, b in zip(found, self.truth, strict=True)) else "wrong: other bits"
        error = problems.error(found, self.truth)
        allowed = 2 * self.default_error + 4 * torch.finfo(torch.float32).eps
        return "" if error <= allowed else f"wrong: error {error:.2g}, the default's is {self.default_error:.2g}"


@dataclass
class Tuner:
    """What is known of every key, from earlier rows and new ones."""

    arguments: argparse.Namespace
    address: Row
    arch: int
    chip: str
    end: float
    device: str
    listed: Sequence[Problem]
    places: dict[Key, list[int]] = field(default_factory=dict)  # of its problems in the list; keys in order of value
    best: dict[Key, Schedule] = field(default_factory=dict)
    tried: dict[Key, list[Schedule]] = field(default_factory=dict)
    chosen: dict[Key, Row] = field(default_factory=dict)
    pending: list[tuple[Key, Schedule, Row, list[Schedule], Future]] = field(default_factory=list)
    timed: int = 0  # candidates
    cases: dict[int, Case] = field(default_factory=dict)

    @property
    def late(self) -> bool:
        return time.monotonic() > self.end

    def candidates(self, key: Key) -> list[Schedule]:
        """Neighbours of the best known that were not tried."""
        known = [*self.tried.get(key, []), tiles.declared(key[0])[key[1]]]
        return [candidate for candidate in neighbours(key[0], self.best[key]) if candidate not in known]

    def read(self) -> None:
        """Rows of this chip and of these very kernels count; the others stay in the file."""
        file: Path = self.arguments.rows
        for line in file.read_text().splitlines() if file.exists() else []:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # cut short when an earlier call was ended
                continue
            if all(row.get(name) == self.address[name] for name in ("device", "kernels")):
                self._count(row)

    def _count(self, row: Row) -> None:
        key = row["op"], row["key"]
        if row["outcome"] == "chosen":
            self.chosen[key], self.best[key] = row, row["schedule"]
        self.timed += row["outcome"] == "timed"
        self.tried.setdefault(key, []).append(row["schedule"])

    def write(self, key: Key, schedule: Schedule, outcome: str, **more: Any) -> None:
        row = {"op": key[0], "key": key[1], "schedule": schedule, "outcome": outcome, **more, **self.address}
        row["date"] = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
        with self.arguments.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._count(row)

    def write_table(self) -> None:
        """The table in force with what was chosen here, whole or not at all."""
        file: Path = self.arguments.write
        table: Table = tiles.read(file if file.exists() else tiles.BUILT_IN)
        entries = table.setdefault(self.chip, {})
        for (op, key), row in self.chosen.items():
            if row["schedule"] == tiles.declared(op)[key]:
                entries.get(op, {}).pop(key, None)
            else:
                entries.setdefault(op, {})[key] = row["schedule"]
        kept = {chip: {op: dict(sorted(keys.items())) for op, keys in sorted(ops.items()) if keys} for chip, ops in sorted(table.items())}
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        temporary.write_text(json.dumps({chip: ops for chip, ops in kept.items() if ops}, indent=1) + "\n")
        tiles.read(temporary)
        temporary.replace(file)

    def case(self, place: int) -> Case:
        """A problem's data; those of the last four are kept, for the next candidates and the other keys of a level."""
        if place not in self.cases:
            while len(self.cases) > 3:
                self.cases.pop(next(iter(self.cases)))
            self.cases[place] = Case(self.listed[place], self.device)
        return self.cases[place]

    def ratio(self, key: Key, candidate: Schedule, rounds: int) -> tuple[float, float, Row]:
        """The default's time over the candidate's, the geometric mean over problems; its lower quartile in the worst; milliseconds."""
        logs, low, detail = [], math.inf, {}
        default = tiles.declared(key[0])[key[1]]
        for place in self.places[key]:
            case = self.case(place)
            if fault := case.fault(key, candidate):
                raise ValueError(fault)
            pair = [launches(case.problem, case.arguments, key, schedule, self.arch) for schedule in (default, candidate)]
            one, other = times(pair, rounds)
            ratios = sorted(a / b for a, b in zip(one, other, strict=True))
            logs.append(math.log(statistics.median(ratios)))
            low = min(low, ratios[len(ratios) // 4])
            detail[str(case.problem)] = [1e3 * statistics.median(one), 1e3 * statistics.median(other)]
        return math.exp(statistics.mean(logs)), low, detail

    def look_at(self, key: Key, jobs: Sequence[tuple[Schedule, Future]]) -> dict[str, float]:
        """Time the candidates of a key that compile. The ratios of the good ones, by schedule as JSON."""
        good: dict[str, float] = {}
        for candidate, job in jobs:
            if self.late:
                break
            try:
                fault, seconds = job.result(timeout=max(1.0, self.end - time.monotonic()))
            except TimeoutError:
                break
            except BrokenProcessPool:
                self.stop_without([(key, c) for c, other in jobs if not other.done() or other.exception() is not None])
            if fault:
                self.write(key, candidate, fault, compile_seconds=seconds)
                continue
            try:
                ratio, low, detail = self.ratio(key, candidate, self.arguments.rounds)
            except Exception as error:  # out of resources, wrong values, or a fault of the GPU
                self.write(key, candidate, str(error) if type(error) is ValueError else f"does not run: {_one_line(error)}")
                self.stop_if_the_gpu_is_gone(error)
                continue
            self.write(key, candidate, "timed", ratio=ratio, low=low, milliseconds=detail, compile_seconds=seconds)
            good[json.dumps(candidate)] = ratio
        return good

    def confirm(self, key: Key, ranked: list[Schedule], pool: ProcessPoolExecutor) -> None:
        """Time the first of the best once more, have its variants compiled, and let `settle` decide. Without one the default stays."""
        rehearse, before = self.arguments.rehearse, self.chosen.get(key, {}).get("ratio", 1.0)
        while ranked and not self.late:
            candidate = ranked.pop(0)
            try:
                ratio, low, detail = self.ratio(key, candidate, 3 * self.arguments.rounds)
            except Exception as error:
                self.write(key, candidate, f"does not run: {_one_line(error)}")
                self.stop_if_the_gpu_is_gone(error)
                continue
            if rehearse or (ratio >= max(FASTER, before) and low > 1.0):
                job = pool.submit(variants_spill, key, candidate, self.arch, 1 if rehearse else sys.maxsize)
                self.pending.append((key, candidate, {"ratio": ratio, "low": low, "milliseconds": detail}, ranked, job))
                return
        if key not in self.chosen and not self.late:
            self.decide(key, self.best[key], {"ratio": 1.0, "low": 1.0, "milliseconds": {}})

    def settle(self, pool: ProcessPoolExecutor, wait: bool) -> None:
        """Choose those whose variants are compiled by now; with `wait`, all of them, for at most 20 s past the end."""
        for item in list(self.pending):
            key, candidate, measured, ranked, job = item
            if not (wait or job.done()):
                continue
            self.pending.remove(item)
            try:
                fault = job.result(timeout=max(1.0, self.end + 20 - time.monotonic()))
            except BrokenProcessPool:
                self.stop_without([(key, candidate)])
            except Exception as error:
                fault = f"does not compile ahead of time: {_one_line(error)}"
            if fault and not self.arguments.rehearse:
                self.write(key, candidate, fault)
                self.confirm(key, ranked, pool)
            else:
                self.decide(key, candidate, measured)
                self.write_table()

    def decide(self, key: Key, schedule: Schedule, measured: Row) -> None:
        self.write(key, schedule, "chosen", **measured)
        print(f"{time.monotonic() - self.end + self.arguments.seconds:5.0f} s  {summary(self, [key])}", flush=True)

    def stop_without(self, culprits: Sequence[tuple[Key, Schedule]]) -> NoReturn:
        """A compiler died and took its process with it: the next call goes on without whoever it may have been."""
        for key, candidate in culprits:
            self.write(key, candidate, "a compiler died over this one or another that was compiled beside it")
        print("a compiler died; call again to go on without its candidates", file=sys.stderr)
        sys.stdout.flush()
        os._exit(3)

    def stop_if_the_gpu_is_gone(self, error: BaseException) -> None:
        if not torch.cuda.is_available():
            return
        try:
            torch.cuda.synchronize()
        except Exception:
            print(f"the GPU gave up: {_one_line(error)}; call again to go on without this candidate", file=sys.stderr)
            sys.stdout.flush()
            os._exit(3)  # nothing of CUDA can be cleaned up now


def summary(tuner: Tuner, keys: Iterable[Key]) -> str:
    """Every key that has a verdict, a line each: default, choice, ratio."""
    lines = []
    for key in keys:
        if (row := tuner.chosen.get(key)) is None:
            continue
        default = tiles.declared(key[0])[key[1]]
        if row["schedule"] == default:
            lines.append(f"{key[0]:18}{key[1]:34}{_short(default):24}stays")
        else:
            lines.append(f"{key[0]:18}{key[1]:34}{_short(default):24}{_short(row['schedule']):24}{row['ratio']:.2f}")
    return "\n".join(lines)


def _short(schedule: Schedule) -> str:
    names = {"num_warps": "w", "num_stages": "s", "elements": "e", "programs": "p"}
    return " ".join(f"{names.get(name, name.removeprefix('BLOCK_'))}{value}" for name, value in schedule.items())


def tune(tuner: Tuner, pool: ProcessPoolExecutor) -> None:
    """Round by round over all keys, until nobody has a neighbour that was not tried, or time is out."""
    places, arguments = tuner.places, tuner.arguments
    for place, problem in enumerate(tuner.listed):
        for key in keys_of(problem):
            if arguments.only in " ".join(key):
                places.setdefault(key, []).append(place)
    for key in places:
        tuner.best.setdefault(key, tiles.declared(key[0])[key[1]])
    while not tuner.late:
        waiting = {key: tuner.candidates(key) for key in places}
        waiting = {key: candidates[: arguments.candidates] for key, candidates in waiting.items() if candidates}
        if not waiting:
            break
        jobs: dict[Key, list[tuple[Schedule, Future]]] = {}
        for number, key in enumerate(waiting):
            # A few keys ahead: enough for all workers, and what is to be confirmed does not queue for long.
            for ahead in list(waiting)[number : number + AHEAD]:
                if ahead not in jobs:
                    submit = partial(pool.submit, compiled, places[ahead][0], arguments.rehearse, ahead)
                    jobs[ahead] = [(candidate, submit(candidate, tuner.arch)) for candidate in waiting[ahead]]
            if tuner.late:
                break
            good = tuner.look_at(key, jobs[key])
            least = 0.0 if arguments.rehearse else max(FASTER, tuner.chosen.get(key, {}).get("ratio", 1.0))
            ranked = [json.loads(text) for text in sorted(good, key=lambda text: -good[text]) if good[text] >= least]
            tuner.confirm(key, ranked[:3], pool)
            tuner.settle(pool, wait=False)
        tuner.settle(pool, wait=True)
        if arguments.rehearse:
            break


def _kernels_hash() -> str:
    """Of everything that a candidate is compiled from."""
    files = [tiles.BUILT_IN.with_name(f"{name}.py") for name in ("_common", *tiles.OPS)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def _workers(jobs: int) -> ProcessPoolExecutor:
    """All of them at once, and none interprets: workers compile in a rehearsal too."""
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    for _ in range(jobs):
        pool.submit(int)
    if interpret is not None:
        os.environ["TRITON_INTERPRET"] = interpret
    return pool


def _stop(pool: ProcessPoolExecutor) -> None:
    """Without waiting for compilers that are still at it."""
    workers = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for worker in workers:
        worker.terminate()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, metavar="FILE", help="JSON lines, appended to")
    parser.add_argument("--write", type=Path, required=True, metavar="FILE", help="the table; other chips and keys stay")
    parser.add_argument("--seconds", type=float, default=240.0, help="time after which nothing new is begun (default: %(default)g)")
    parser.add_argument("--only", default="", metavar="TEXT", help="keys whose op and name hold this, such as 'attention bwd_q 16-bit'")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="worker processes")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--candidates", type=int, default=100, metavar="N", help="of a key and round, at most")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, in Triton's interpreter: figures mean nothing")
    arguments = parser.parse_args()
    if arguments.rehearse != INTERPRETED or (not arguments.rehearse and not torch.cuda.is_available()):
        print("tune.py: needs a CUDA device; --rehearse with TRITON_INTERPRET=1 does without", file=sys.stderr)
        return 2
    if arguments.rehearse:
        arch, chip, device, name = 90, "interpreter", "cpu", "Triton's interpreter: no measurement"
    else:
        major, minor = torch.cuda.get_device_capability()
        arch, device, name = 10 * major + minor, "cuda", torch.cuda.get_device_name()
        chip = f"sm_{arch}"
    address = {"device": name, "chip": chip, "torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    address |= {"kernels": _kernels_hash(), "commit": os.environ.get("SAMI_FAST_COMMIT")}
    listed = tiny_problems() if arguments.rehearse else real_problems()
    tuner = Tuner(arguments, address, arch, chip, time.monotonic() + arguments.seconds, device, listed)
    tuner.read()
    pool = _workers(arguments.jobs)
    try:
        tune(tuner, pool)
    finally:
        _stop(pool)
    tuner.write_table()
    keys = list(tuner.places)
    looked_at = [key for key in keys if key in tuner.chosen]
    changed = [key for key in looked_at if tuner.chosen[key]["schedule"] != tiles.declared(key[0])[key[1]]]
    if changed:
        print(summary(tuner, changed))
    rest = f"{len(keys) - len(looked_at)} left for another call" if len(looked_at) < len(keys) else "none left"
    print(f"{chip}: {len(looked_at)} of {len(keys)} keys looked at, {len(changed)} changed, {rest}; the table is {arguments.write}")
    if not tuner.timed:
        print(f"no candidate of {len(keys)} keys could be timed: see the outcomes in {arguments.rows}", file=sys.stderr)
    return 0 if tuner.timed else 1


if __name__ == "__main__":
    sys.exit(main())
