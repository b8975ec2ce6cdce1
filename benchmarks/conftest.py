"""How the benchmarks measure and report: interleaved timing, peak memory, the address of every row, our own table."""

import json
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from registry import peak_bytes, shape_label

from sami_fast.environment import describe

ROWS = pytest.StashKey[list[dict[str, Any]]]()
ADDRESS = pytest.StashKey[dict[str, Any]]()

SECONDS = 0.6  # that a pair of implementations is timed for, warm-up apart
WARMUP_ROUNDS, MIN_ROUNDS, MAX_ROUNDS = 2, 7, 300
UNITS = {"GB/s": ("bytes", 1e9), "GFLOP/s": ("flops", 1e9), "images/s": ("images", 1.0)}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sami-fast")
    group.addoption("--rows", type=Path, metavar="FILE", help="write the measured rows there, one JSON object per line")
    group.addoption("--threads", type=int, metavar="N", help="CPU threads of torch (default: torch's own choice)")


def pytest_configure(config: pytest.Config) -> None:
    rows_file, threads = config.getoption("--rows"), config.getoption("--threads")
    if rows_file is not None and not rows_file.absolute().parent.is_dir():
        raise pytest.UsageError(f"--rows: no folder {rows_file.absolute().parent}")
    if threads is not None:
        if threads < 1:
            raise pytest.UsageError(f"--threads: expected at least 1, found {threads}")
        torch.set_num_threads(threads)
    config.stash[ROWS] = []
    config.stash[ADDRESS] = _address()


def _address() -> dict[str, Any]:
    """Where and with what a row was measured."""
    here = describe()
    return {
        "device": "cpu",
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": here["python"],
        "torch": here["packages"]["torch"],
        "triton": here["packages"]["triton"],
        "commit": here["commit"],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@pytest.fixture
def record(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Measures an implementation that has been found correct and keeps its row."""

    def measure(
        row: dict[str, Any],  # what is measured: op, shape, dtype, mode, implementation, baseline, and its work per call
        unit: str,  # of the rate, a key of UNITS
        run: Callable[[], object],
        run_baseline: Callable[[], object],
        whole: Callable[[], object] | None,  # what peak memory is taken over
        fresh: bool = False,  # `run` and `run_baseline` make, outside the clock, what a round times
    ) -> None:
        benchmark.group = f"{row['op']} {shape_label(row['shape'])} {row['dtype']} {row['mode']}"
        if benchmark.disabled:
            benchmark(lambda: None)  # --benchmark-disable: correctness was all that was asked
            return
        peak = peak_bytes(whole) if whole else 0
        timed, timed_baseline = (run, run_baseline) if fresh else (lambda: run, lambda: run_baseline)
        # Warm-up; its slowest pair sets the number of rounds, so that a busy machine gets fewer and not a longer run.
        slowest = max(_seconds(timed()) + _seconds(timed_baseline()) for _ in range(WARMUP_ROUNDS))
        rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(SECONDS / slowest)))

        # Each round times the baseline and then the implementation, so that whatever else the machine does hits both alike.
        baseline_seconds: list[float] = []

        def time_baseline() -> tuple[tuple[Callable[[], object]], dict[str, Any]]:
            baseline_seconds.append(_seconds(timed_baseline()))
            return (timed(),), {}

        def drop_results(run_one: Callable[[], object]) -> None:
            run_one()

        benchmark.pedantic(drop_results, setup=time_baseline, rounds=rounds)
        seconds = np.array(benchmark.stats.stats.data)
        ratios = np.array(baseline_seconds) / seconds

        median, ratio = float(np.median(seconds)), float(np.median(ratios))
        work, scale = UNITS[unit]
        full_row = {
            **row,
            "median_ms": 1e3 * median,
            "q20_ms": 1e3 * float(np.quantile(seconds, 0.2)),
            "q80_ms": 1e3 * float(np.quantile(seconds, 0.8)),
            "rounds": rounds,
            "ratio": ratio,
            "ratio_q20": float(np.quantile(ratios, 0.2)),
            "ratio_q80": float(np.quantile(ratios, 0.8)),
            "rate": row[work] / scale / median,
            "rate_unit": unit,
            "peak_bytes": peak,
            **request.config.stash[ADDRESS],
        }
        benchmark.extra_info.update(full_row)
        request.config.stash[ROWS].append(full_row)

    return measure


def _rival(row: dict[str, Any]) -> str:
    """The baseline, where it has no row of its own."""
    alone = ("target" in row and row["mode"] != "step") or row["mode"] == "feed" or "compile_seconds" in row
    return f" to {row['baseline']}" if alone else ""


def _target(row: dict[str, Any]) -> str:
    """The ratio that was aimed at, where there is one, and by how much it was missed."""
    target = row.get("target")
    if target is None:
        return ""
    return f"{target:g} met" if row["ratio"] >= target else f"{target:g} missed by {1 - row['ratio'] / target:.0%}"


COLUMNS = (
    ("op", lambda r: r["op"]),
    ("shape", lambda r: shape_label(r["shape"])),
    ("dtype", lambda r: r["dtype"]),
    ("mode", lambda r: r["mode"]),
    ("implementation", lambda r: r["implementation"] + (" *" if r["implementation"] == r["baseline"] else _rival(r))),
    ("median ms", lambda r: f"{r['median_ms']:.3f}"),
    ("20 %", lambda r: f"{r['q20_ms']:.3f}"),
    ("80 %", lambda r: f"{r['q80_ms']:.3f}"),
    ("ratio", lambda r: f"{r['ratio']:.2f}"),
    ("20 %", lambda r: f"{r['ratio_q20']:.2f}"),
    ("80 %", lambda r: f"{r['ratio_q80']:.2f}"),
    ("target", lambda r: _target(r)),
    ("rate", lambda r: f"{r['rate']:.2f} {r['rate_unit']}"),
    ("peak MiB", lambda r: f"{r['peak_bytes'] / 2**20:.2f}" if r["peak_bytes"] else ""),
)
TEXT_COLUMNS = 5  # the first ones are aligned to the left


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    titles = [title for title, _ in COLUMNS]
    table = [[cell(row) for _, cell in COLUMNS] for row in rows]
    widths = [max(map(len, column)) for column in zip(titles, *table, strict=True)]

    def line(cells: list[str]) -> str:
        return "  ".join(c.ljust(w) if i < TEXT_COLUMNS else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))

    terminalreporter.section("sami-fast")
    terminalreporter.line(", ".join(f"{key} {value}" for key, value in config.stash[ADDRESS].items()))
    terminalreporter.line("ratio: time of the baseline (*) over time of the implementation, round by round; above 1 is faster")
    terminalreporter.line("")
    terminalreporter.line(line(titles))
    comparison = None
    for cells in table:
        if comparison not in (None, cells[:4]):
            terminalreporter.line("")
        comparison = cells[:4]
        terminalreporter.line(line(cells))
    bounds = {(row["op"], row["convolutions_ms"]) for row in rows if "convolutions_ms" in row}
    for op, milliseconds in sorted(bounds):
        shares = ", ".join(f"{row['implementation']} {milliseconds / row['median_ms']:.0%}" for row in rows if row["op"] == op)
        terminalreporter.line("")
        terminalreporter.line(
            f"{op}: torch's convolutions alone, each in its faster layout, take {milliseconds:.1f} ms; of the step's time that is: {shares}"
        )

    for row in rows:
        if "compile_seconds" in row:
            empty, full = (row["compile_seconds"][cache] for cache in ("empty", "full"))
            terminalreporter.line(
                f"{row['op']}: the first step with {row['implementation']} took {empty:.1f} s, with everything in the cache {full:.1f} s"
            )


def pytest_sessionfinish(session: pytest.Session) -> None:
    rows_file = session.config.getoption("--rows")
    if rows_file is not None:
        rows_file.write_text("".join(json.dumps(row) + "\n" for row in session.config.stash[ROWS]))
