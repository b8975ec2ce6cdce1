"""What the CUDA kernels do, counted in the emulator on small fixed cases: mma and ldmatrix, barriers, passes through shared memory, bytes.

python tests/emulator_counts.py            # a table, and what differs from the budgets
python tests/emulator_counts.py --write    # writes the budgets, tests/emulator/counts.csv, and the table in docs/kernels.md
"""

import argparse
import csv
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from pathlib import Path

if __name__ == "__main__":  # as conftest.py does for tests, before Triton is imported
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import torch
from emulator import Counts, Emulator
from helpers import emulator, normal, positive, relative_error
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
BUDGETS, PAGE = ROOT / "tests/emulator/counts.csv", ROOT / "docs/kernels.md"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MEMORY = ("wavefronts", "conflicts", "global_read", "global_write")  # which the compiler has a say in
MARKS = "<!-- counted by tests/emulator_counts.py -->", "<!-- end -->"


@dataclass(frozen=True)
class Case:
    """One call of all launchers of an op."""

    op: str
    dtype: torch.dtype
    name: str
    run: Callable[[object], list[Tensor]]  # of launchers
    exact: Callable[[], list[Tensor]]  # of their twins, in float64


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for shape in ((1, 64, 64, 1, 64), (1, 40, 70, 2, 32), (1, 33, 40, 1, 128)):
            yield _attention(shape, dtype)
        for shape, last in (((2, 8, 16, 16), False), ((2, 8, 16, 16), True), ((1, 40, 33), False)):
            yield _group_norm(shape, last, dtype)
        for shape in ((2, 3, 32, 32), (2, 3, 5, 7)):
            yield _guided_loss(shape, dtype)
            yield _noise_sample(shape, dtype)
    yield _gaussian((5, 20))
    yield _random()


def _attention(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    from test_attention import double, launcher_inputs, run_launchers, twins

    given, options = launcher_inputs(*shape, dtype=dtype), {"scale": shape[-1] ** -0.5, "causal": False}
    return Case(
        *("attention", dtype, "x".join(map(str, shape))),
        lambda launchers: run_launchers(launchers, **given, **options),
        lambda: run_launchers(twins, **double(given), **options),
    )


def _group_norm(shape: tuple[int, ...], last: bool, dtype: torch.dtype) -> Case:
    from test_group_norm_silu import double, launcher_inputs, run_launchers, twins

    given = launcher_inputs(shape, dtype, last=last, device="cpu")
    name = "x".join(map(str, shape)) + (" channels last" if last else "")
    return Case(
        *("group_norm_silu", dtype, name),
        lambda launchers: list(run_launchers(launchers, given, 2).values()),
        lambda: list(run_launchers(twins, double(given), 2).values()),
    )


def _guided_loss(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    twins = import_module("sami_fast.reference.guided_loss")
    images = [normal(*shape, seed=seed, dtype=dtype) for seed in range(3)]
    scalars = [positive(shape[0], low=0.1, high=3.0, seed=seed, dtype=torch.float32) for seed in range(3)]
    stored = None, 1, 0, 0, 0
    return Case(
        *("guided_loss", dtype, "x".join(map(str, shape))),
        lambda launchers: list(launchers.guided_loss_fwd(*images, *scalars, *stored)),
        lambda: list(twins.guided_loss_fwd(*(x.double() for x in (*images, *scalars)), *stored)),
    )


def _noise_sample(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    twins = import_module("sami_fast.reference.noise_sample")
    arguments = normal(*shape, dtype=dtype), torch.full((shape[0], 2), 0.6), torch.full((shape[0], 2), 0.8), torch.arange(shape[0])
    return Case(
        *("noise_sample", dtype, "x".join(map(str, shape))),
        lambda launchers: list(launchers.noise_sample_fwd(*arguments, 1, 2, 0, True)),
        lambda: list(twins.noise_sample_fwd(*arguments, 1, 2, 0, True)),
    )


def _gaussian(shape: tuple[int, int]) -> Case:
    from test_core_gaussian_log_prob import inputs, run, twins

    given = inputs(*shape, dtype=torch.float32)
    return Case(
        *("gaussian_log_prob", torch.float32, "x".join(map(str, shape))),
        lambda launchers: list(run(launchers, *given)),
        lambda: list(run(twins, *(x.double() for x in given))),
    )


def _random() -> Case:
    from sami_fast import reference

    index = torch.arange(3)

    def run(launchers: object) -> list[Tensor]:
        draws = [getattr(launchers, name)(1, 2, 3, index, 101) for name in ("random_normal", "random_uniform")]
        return [*draws, launchers.stratified_uniform(index, 5, 300, seed=1, step=2)]

    return Case("random", torch.float32, "3x101", run, lambda: run(reference))


@dataclass(frozen=True)
class Row:
    """A kernel in one case."""

    case: str
    kernel: str
    counts: Counts
    made_with: str


def compiler() -> str:
    return "g++ " + subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True, check=True).stdout.split(".")[0].strip()


def count(cuda: Emulator) -> tuple[list[Row], list[list[str]]]:
    """The budgets' rows, and those of the table in the docs."""
    rows, table, made_with = [], {}, compiler()
    for case in cases():
        cuda.clear()
        found = case.run(cuda)
        errors = [relative_error(a, b) for a, b in zip(found, case.exact(), strict=True)]
        dtype = str(case.dtype).removeprefix("torch.")
        counts = cuda.counts
        rows += [Row(f"{case.op} {dtype} {case.name}", kernel, c, made_with) for kernel, c in sorted(counts.items())]
        entry = table.setdefault((case.op, dtype), [0, 0.0, 0, 0, 0, 0])
        entry[0] += 1
        entry[1] = max(entry[1], *errors)
        for place, name in enumerate(("mma", "ldmatrix", "conflicts", "barriers"), 2):
            entry[place] += sum(getattr(c, name) for c in counts.values())
    lines = []
    for (op, dtype), (number, error, mma, ldmatrix, conflicts, barriers) in sorted(table.items()):
        ratio = f"{mma / ldmatrix:.2f}" if ldmatrix else "none"
        lines.append([op, dtype, str(number), f"{error:.1e}", ratio, str(conflicts), str(barriers)])
    return rows, lines


def read_budgets() -> list[Row]:
    with BUDGETS.open(newline="") as file:
        return [
            Row(line["case"], line["kernel"], Counts(*(int(line[f.name]) for f in fields(Counts))), line["made_with"])
            for line in csv.DictReader(file)
        ]


def exceeded(found: list[Row], budgets: list[Row]) -> list[str]:
    """What stands above its budget, or on one side alone."""
    allowed = {(row.case, row.kernel): row for row in budgets}
    faults = [f"{case}, {kernel}: no such launch any more" for case, kernel in allowed.keys() - {(row.case, row.kernel) for row in found}]
    for row in found:
        if (budget := allowed.get((row.case, row.kernel))) is None:
            faults.append(f"{row.case}, {row.kernel}: no budget")
            continue
        for name, value in asdict(row.counts).items():
            old = getattr(budget.counts, name)
            if value > old and (row.made_with == budget.made_with or name not in MEMORY):
                faults.append(f"{row.case}, {row.kernel}: {name} {old} -> {value}")
    return sorted(faults)


def page_table(lines: list[list[str]]) -> str:
    head = ["Op", "dtype", "Cases", "Largest error against float64", "mma per ldmatrix", "Bank conflicts", "Barriers"]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *lines])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    torch.set_num_threads(1)
    cuda = emulator()
    cuda.counting = True
    rows, lines = count(cuda)
    print(page_table(lines))
    if write:
        names = [f.name for f in fields(Counts)]
        with BUDGETS.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["case", "kernel", *names, "made_with"])
            writer.writerows([row.case, row.kernel, *asdict(row.counts).values(), row.made_with] for row in rows)
        between = re.compile(f"({re.escape(MARKS[0])}\n).*?(\n{re.escape(MARKS[1])})", re.DOTALL)
        PAGE.write_text(between.sub(lambda m: m[1] + page_table(lines) + m[2], PAGE.read_text()))
        return 0
    faults = exceeded(rows, read_budgets())
    print(*faults, sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
