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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from setup import ARCHITECTURES, PROCESSORS, architecture_names, nvcc_command, torch_home  # noqa: E402

NO_SPILLS = ("sm_90",)


@dataclass(frozen=True)
class Kernel:
    name: str
    arch: str
    registers: int
    spilled: int  # bytes stored to local memory
    shared: int  # bytes, those known to the compiler


def compile_file(source: Path, architecture: str) -> list[Kernel]:
    with tempfile.TemporaryDirectory() as folder:
        command = [*nvcc_command(torch_home(), architecture), "-Xptxas=-v", "-c", str(source), "-o", f"{folder}/out.o"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{source.relative_to(ROOT)}: does not compile for {architecture}\n{done.stderr}")
    entries = re.split(r"Compiling entry function '", done.stderr)[1:]
    names = subprocess.run(["c++filt"], input="\n".join(e.split("'")[0] for e in entries), capture_output=True, text=True, check=True)

    def number(pattern: str, text: str) -> int:
        found = re.search(pattern, text)
        return int(found[1]) if found else 0

    return [
        Kernel(
            re.sub(r"^void |sami_fast::|\(anonymous namespace\)::|\(.*", "", name.replace("(anonymous namespace)::", "")),
            re.search(r"for '(\w+)'", entry)[1],
            number(r"Used (\d+) registers", entry),
            number(r"(\d+) bytes spill stores", entry),
            number(r"(\d+) bytes smem", entry),
        )
        for name, entry in zip(names.stdout.splitlines(), entries, strict=True)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default=os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES)
    parser.add_argument("--jobs", type=int, default=PROCESSORS)
    arguments = parser.parse_args()
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"), key=lambda path: -path.stat().st_size)
    tasks = [(source, architecture) for source in sources for architecture in architecture_names(arguments.arch)]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        kernels = [kernel for found in pool.map(lambda task: compile_file(*task), tasks) for kernel in found]
    width = max((len(kernel.name) for kernel in kernels), default=0)
    print(f"{'kernel':{width}}  chip    registers  spilled  shared")
    for k in sorted(kernels, key=lambda k: (k.name, len(k.arch), k.arch)):
        print(f"{k.name:{width}}  {k.arch:6}  {k.registers:9}  {k.spilled:7}  {k.shared:6}")
    faulty = [k for k in kernels if k.spilled and k.arch in NO_SPILLS]
    print(f"{len(kernels)} kernels of {len(sources)} CUDA files for {arguments.arch}, {len(faulty)} with spills where there may be none")
    return 1 if faulty or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
