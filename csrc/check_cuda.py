"""Compile every CUDA file for every architecture, without a GPU, and print what each kernel takes of it.

python csrc/check_cuda.py [--arch 9.0] [--jobs 2]

Exit status 1 when a file does not compile, or a kernel spills registers on sm_90.
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

from sami_fast.kernels.aot import Compiled, print_table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from setup import ARCHITECTURES, PROCESSORS, architecture_names, nvcc_command, torch_home  # noqa: E402


def compile_file(source: Path, architecture: str) -> list[Compiled]:
    """What its kernels take of the chip; shared memory is that known to the compiler."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*nvcc_command(torch_home(), architecture), "-Xptxas=-v", "-c", str(source), "-o", f"{folder}/out.o"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{source.name}: does not compile for {architecture}\n{done.stderr}")
    entries = re.split(r"Compiling entry function '", done.stderr)[1:]
    names = subprocess.run(["c++filt"], input="\n".join(e.split("'")[0] for e in entries), capture_output=True, text=True, check=True)

    def said(pattern: str, entry: str) -> str:
        match = re.search(pattern, entry)
        return match[1] if match else "0"

    found = []
    for name, entry in zip(names.stdout.splitlines(), entries, strict=True):
        call = re.sub(r"^void |sami_fast::|\(.*", "", name.replace("(anonymous namespace)::", ""))
        kernel, _, configuration = call.partition("<")
        counted = (int(said(what, entry)) for what in (r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes smem"))
        found.append(Compiled(kernel, configuration.removesuffix(">"), said(r"for '(\w+)'", entry), *counted))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default=os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES)
    parser.add_argument("--jobs", type=int, default=PROCESSORS)
    arguments = parser.parse_args(argv)
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"), key=lambda path: -path.stat().st_size)
    tasks = [(source, architecture) for source in sources for architecture in architecture_names(arguments.arch)]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = [row for rows in pool.map(lambda task: compile_file(*task), tasks) for row in rows]
    found.sort(key=lambda row: (row.kernel, row.configuration, len(row.chip), row.chip))
    print_table(found)
    faults = [row.fault for row in found if row.fault]
    print(*faults, sep="\n", end="\n" if faults else "", file=sys.stderr)
    print(f"{len(found)} kernels of {len(sources)} CUDA files for {arguments.arch}, {len(faults)} faults")
    return 1 if faults or not found else 0


if __name__ == "__main__":
    sys.exit(main())
