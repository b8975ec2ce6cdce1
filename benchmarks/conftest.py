"""How `pytest benchmarks/` measures and reports: options, the fixture that makes rows, our own table at the end.

pytest benchmarks/ --rows rows.jsonl --rows rows.csv     # also write the rows; a .jsonl grows with every row
pytest benchmarks/ --rows rows.jsonl --resume            # leave out what has its rows there, of this commit and device
pytest benchmarks/ --device cpu --threads 1 --tiny       # where, with how many threads, at sizes for a rehearsal
pytest benchmarks/test_loops.py --sweeps                 # training loops by size, threads and ranks, and compiled, as well
"""

import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from . import rivals
from .machine import address, keep_memory
from .measure import SECONDS, Contestant, Rounds, rows_of
from .rows import read
from .table import is_ours, shape_label, short, table, to_csv

ROWS = pytest.StashKey[list[dict[str, Any]]]()
LEFT_OUT = pytest.StashKey[list[str]]()
ADDRESS = pytest.StashKey[dict[str, Any]]()
DONE = pytest.StashKey[set[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sami-fast")
    group.addoption("--rows", type=Path, action="append", default=[], metavar="FILE", help="write the rows there, .jsonl or .csv")
    group.addoption("--resume", action="store_true", help="skip what already has rows in --rows FILE.jsonl, of this commit and device")
    group.addoption("--threads", type=int, metavar="N", default=1, help="CPU threads of torch (default: %(default)s)")
    group.addoption("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--seconds", type=float, default=SECONDS, metavar="S", help="of rounds for each implementation (default: %(default)s)")
    group.addoption("--sweeps", action="store_true", help="training loops also by size, threads and ranks, and compiled: 20 minutes")
    group.addoption("--tiny", action="store_true", help="sizes for a rehearsal: figures mean nothing")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    threads, files = config.getoption("--threads"), config.getoption("--rows")
    for file in files:
        if file.suffix not in (".jsonl", ".csv"):
            raise pytest.UsageError(f"--rows: expected a file .jsonl or .csv, found {file}")
        if not file.absolute().parent.is_dir():
            raise pytest.UsageError(f"--rows: no folder {file.absolute().parent}")
    if threads < 1:
        raise pytest.UsageError(f"--threads: expected at least 1, found {threads}")
    torch.set_num_threads(threads)
    device = config.getoption("--device")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device: cuda asked for, and there is no CUDA device")
    keep_memory()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # float32 means float32, as in training
    config.addinivalue_line("markers", "sweep: measured with --sweeps alone")
    config.option.benchmark_quiet = True  # the rows are the report
    config.stash[ROWS], config.stash[LEFT_OUT], config.stash[DONE] = [], [], set()
    config.stash[ADDRESS] = address(device, _command(config)) | ({"tiny": True} if config.getoption("--tiny") else {})
    growing = [file for file in files if file.suffix == ".jsonl"]
    if config.getoption("--resume"):
        try:
            before = read(file for file in growing if file.exists())
        except ValueError as error:
            raise pytest.UsageError(f"--rows: {error}") from None
        here = {key: config.stash[ADDRESS].get(key) for key in ("device", "commit", "tiny")}
        before = [row for row in before if {key: row.get(key) for key in here} == here]
        config.stash[DONE], config.stash[ROWS] = {row["test"] for row in before}, before
    else:
        for file in growing:
            file.unlink(missing_ok=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--sweeps"):
        for item in items:
            if item.get_closest_marker("sweep"):
                item.add_marker(pytest.mark.skip(reason="--sweeps was not asked for"))


def _command(config: pytest.Config) -> str:
    """What makes the rows again: where they are written is no part of it."""
    return re.sub(r" --(rows|durations)[= ]\S+| --resume| -o pythonpath=\S+", "", shlex.join(["pytest", *config.invocation_params.args]))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--device")


@pytest.fixture
def compete(benchmark: Any, request: pytest.FixtureRequest, device: str) -> Iterator[Callable[..., None]]:
    """Times contestants that have been found correct, and keeps their rows."""
    config = request.config
    if request.node.nodeid in config.stash[DONE]:
        pytest.skip("has its rows")
    asked = False

    def measure(
        described: dict[str, Any],  # what all rows share: op, shape, dtype, mode, and its work per call
        contestants: Sequence[Contestant],
        baseline: str,
        dtype: torch.dtype = torch.float32,
        *,
        peak: bool = True,
        rounds: int | None = None,  # in place of those that --seconds allows
        targets: dict[str, float] | None = None,  # ratios that were aimed at
        wrong: dict[str, str] | None = None,  # who has no row, and why
        forgiven: Sequence[str] = (),  # whose fault fails nothing
    ) -> None:
        nonlocal asked
        asked = True
        faults = [f"{name}: {reason}" for name, reason in (wrong or {}).items() if name not in forgiven]
        what = f"{described['op']} {shape_label(described['shape'])} {described['dtype']} {described['mode']}"
        if not benchmark.disabled:
            config.stash[LEFT_OUT].extend(f"{what}: {name}: {reason}" for name, reason in (wrong or {}).items())
        if baseline not in [c.name for c in contestants]:
            pytest.fail("; ".join(faults))  # nothing to divide by
        if not benchmark.disabled:  # else correctness was all that was asked
            # pytest-benchmark clocks ours, or whoever stands last, each time after all the others had their turn.
            contestants = sorted(contestants, key=lambda c: is_ours({"implementation": c.name}))
            turns, last = Rounds(contestants, device, config.getoption("--seconds"), rounds), len(contestants) - 1

            def others() -> None:
                for place in range(last):
                    turns.time(place)

            benchmark.group = what
            benchmark.pedantic(turns.time, args=(last,), setup=others, rounds=turns.rounds)
            rows = rows_of(turns, described, baseline, dtype, peak)
            for row in rows:
                if target := (targets or {}).get(row["implementation"]):
                    row["target"] = target
                where = {"test": request.node.nodeid, **config.stash[ADDRESS]}
                row |= {key: value for key, value in where.items() if key not in row}  # a row may have threads of its own
            benchmark.extra_info["rows"] = rows
            config.stash[ROWS].extend(rows)
            for file in config.getoption("--rows"):
                if file.suffix == ".jsonl":  # at once: a run that is cut off keeps what it has
                    with file.open("a") as out:
                        out.writelines(json.dumps(row) + "\n" for row in rows)
        if faults:
            pytest.fail("; ".join(faults))

    yield measure
    if benchmark.disabled or not asked:
        benchmark(lambda: None)  # pytest-benchmark warns of fixtures that measured nothing


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    write = terminalreporter.line
    terminalreporter.section("sami-fast")
    write(", ".join(f"{key} {value}" for key, value in config.stash[ADDRESS].items()))
    write("rivals: " + ", ".join(f"{name} {state}" for name, state in rivals.installed().items()))
    write("ratio: time of the baseline (*) over time of the implementation, round by round; above 1 is faster")
    write("of bound: the least time this machine needs for the bytes (memory) or products (matmul) over the time taken")
    write("")
    for line in table(rows):
        write(line)
    write("")
    write("Ours against the best rival: above 1 we are faster")
    for line in short(rows):
        write(line)
    if config.stash[LEFT_OUT]:
        write("")
        write("No row, because wrong:")
        for line in config.stash[LEFT_OUT]:
            write(line)


def pytest_sessionfinish(session: pytest.Session) -> None:
    for file in session.config.getoption("--rows"):
        if file.suffix == ".csv":
            file.write_text(to_csv(session.config.stash[ROWS]))
