"""Compile every CUDA file for every architecture, without a GPU, and print what each kernel takes of it.

python csrc/check_cuda.py [--arch 9.0] [--jobs 2]
python csrc/check_cuda.py --budgets benchmarks/budgets/cuda.csv      # nothing may be above its budget
python csrc/check_cuda.py --write benchmarks/budgets/cuda.csv        # today's figures become the budgets

Exit status 1 when a file does not compile, or a kernel spills registers on sm_90 or exceeds its budget; 2 when the budgets cannot be read.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sami_fast.kernels.budgets import BudgetError, Budgets, Row, Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from setup import ARCHITECTURES, PROCESSORS, architecture_names, nvcc_command, torch_home  # noqa: E402

NO_SPILLS = "sm_90"  # where a spill is an error
# Registers per thread; bytes stored to local memory; bytes of shared memory, those known to the compiler
TABLE = Table(("kernel", "chip"), ("registers", "spilled", "shared"))


def compiler_version() -> str:
    """Of nvcc, down to the patch."""
    done = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    return f"nvcc {re.search(r'V([0-9.]+)', done.stdout)[1]}"


def compile_file(source: Path, architecture: str, version: str) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        command = [*nvcc_command(torch_home(), architecture), "-Xptxas=-v", "-c", str(source), "-o", f"{folder}/out.o"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{source.name}: does not compile for {architecture}\n{done.stderr}")
    entries = re.split(r"Compiling entry function '", done.stderr)[1:]
    names = subprocess.run(["c++filt"], input="\n".join(e.split("'")[0] for e in entries), capture_output=True, text=True, check=True)

    def number(pattern: str, text: str) -> int:
        found = re.search(pattern, text)
        return int(found[1]) if found else 0

    return [
        Row(
            (
                re.sub(r"^void |sami_fast::|\(anonymous namespace\)::|\(.*", "", name.replace("(anonymous namespace)::", "")),
                re.search(r"for '(\w+)'", entry)[1],
            ),
            {
                "registers": number(r"Used (\d+) registers", entry),
                "spilled": number(r"(\d+) bytes spill stores", entry),
                "shared": number(r"(\d+) bytes smem", entry),
            },
            version,
        )
        for name, entry in zip(names.stdout.splitlines(), entries, strict=True)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default=os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES)
    parser.add_argument("--jobs", type=int, default=PROCESSORS)
    Budgets.add_options(parser)
    arguments = parser.parse_args(argv)
    try:
        budgets = Budgets(TABLE, arguments, "python csrc/check_cuda.py")
    except BudgetError as error:
        print(error, file=sys.stderr)
        return 2
    version = compiler_version()
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"), key=lambda path: -path.stat().st_size)
    tasks = [(source, architecture, version) for source in sources for architecture in architecture_names(arguments.arch)]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        rows = [row for found in pool.map(lambda task: compile_file(*task), tasks) for row in found]
    rows.sort(key=lambda row: (row.name[0], len(row.name[1]), row.name[1]))
    chips = {row.name[-1] for row in rows}
    spilled = [f"{row}: spills {row.figures['spilled']} bytes" for row in rows if row.figures["spilled"] and row.name[-1] == NO_SPILLS]
    faults = budgets.settle(rows, lambda row: row.name[-1] in chips, spilled)
    print(f"{len(rows)} kernels of {len(sources)} CUDA files for {arguments.arch}, {faults} faults")
    return 1 if faults or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
