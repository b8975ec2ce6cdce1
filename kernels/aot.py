"""Compile every kernel ahead of time, without a GPU, in every configuration that the launchers can select.

python -m sami_fast.kernels.aot                      # all operators, sm_80, sm_90 and sm_100; prints registers, spills, shared memory
python -m sami_fast.kernels.aot --op attention --arch 90

Exit status 1 when a kernel does not compile, or spills registers on sm_90. Schedules were chosen with Triton 3.9: with another version
a spill is printed and fails nothing.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, field, fields
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ._common import Launch

OPS = ("random", "noise_sample", "guided_loss", "gaussian_log_prob", "group_norm_silu", "attention")
ARCHITECTURES = (80, 90, 100)
NO_SPILLS = "sm_90"  # where a spill is an error
CHOSEN_WITH = (3, 9)  # the version of Triton that schedules were chosen with

Case = tuple[str, Callable[[], object]]  # what it stands for, and a call of a launcher with meta tensors


@dataclass(frozen=True)
class Compiled:
    """What a kernel takes of a chip.

    Attributes:
        kernel, configuration, chip: Which one: its name, the case it stands for with its block sizes, and where it runs.
        registers: Per thread.
        spilled: Bytes per thread of registers that went to local memory.
        shared: Bytes of shared memory per program.
    """

    kernel: str
    configuration: str
    chip: str
    registers: int
    spilled: int
    shared: int

    @property
    def fault(self) -> str | None:
        """A spill where there must be none."""
        if self.spilled and self.chip == NO_SPILLS:
            return f"{self.kernel}, {self.configuration}, {self.chip}: spills {self.spilled} bytes"
        return None


def print_table(found: Sequence[Compiled]) -> None:
    lines = [[column.name for column in fields(Compiled)], *([str(cell) for cell in astuple(row)] for row in found)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for cells in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())


_TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
}


def _specialise(name: str, value: Any, on_value: bool) -> tuple[str, Any, bool]:
    """Triton's own rules for an argument: its type, its value where that is compiled in, whether it is a multiple of 16."""
    if value is None or (on_value and isinstance(value, int) and value == 1 and not isinstance(value, bool)):
        return "constexpr", value, False
    if isinstance(value, torch.Tensor):
        return "*" + _TYPES[value.dtype], None, True
    if isinstance(value, bool):
        return "u1", None, False
    if isinstance(value, int):
        return ("i32" if -(2**31) <= value < 2**31 else "i64"), None, on_value and value % 16 == 0
    if isinstance(value, float):
        return "fp32", None, False
    raise TypeError(f"{name}: no type for {value!r}")


@dataclass(frozen=True)
class _Source:
    """A launch in values that another process can be sent: the kernel by name."""

    op: str
    kernel: str
    label: str = field(compare=False)  # of the first launch that needs it
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    num_warps: int
    num_stages: int
    fp_fusion: bool

    @property
    def tiles(self) -> str:
        """Block sizes, warps, stages."""
        blocks = (f"{name.removeprefix('BLOCK_')}{value}" for name, value in self.constants if name.startswith("BLOCK_"))
        return " ".join((*blocks, f"w{self.num_warps}", f"s{self.num_stages}"))


def source_of(op: str, label: str, item: "Launch") -> _Source:
    """What Triton would compile for a launch."""
    constants, signature, divisible = dict(item.constants), [], []
    for place, name in enumerate(item.kernel.arg_names):
        if place < len(item.args):
            kind, value, aligned = _specialise(name, item.args[place], not item.kernel.params[place].do_not_specialize)
            if kind == "constexpr":
                constants[name] = value
            if aligned:
                divisible.append(place)
        else:
            kind = "constexpr"
        signature.append((name, kind))
    return _Source(
        op,
        item.kernel.fn.__name__,
        label,
        tuple(signature),
        tuple(sorted(constants.items())),
        tuple(divisible),
        item.num_warps,
        item.num_stages,
        item.fp_fusion,
    )


def sources(op: str) -> Iterator[_Source]:
    """The distinct kernels that the cases of an op launch."""
    from ._common import recording

    seen = set()
    cases: Iterator[Case] = import_module(f"sami_fast.kernels.{op}").aot_cases()
    for label, call in cases:
        with recording() as launches:
            call()
        for item in launches:
            source = source_of(op, label, item)
            if source not in seen:
                seen.add(source)
                yield source


def registers_of(compiled: Any) -> tuple[int, int]:
    """Registers per thread of a binary that Triton made, and bytes of those that are spilled."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {usage}")
    return int(found[1]), int(found[2])


def build(source: _Source, arch: int) -> Compiled:
    """Compile one kernel for one chip and read its resources from the binary."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(import_module(f"sami_fast.kernels.{source.op}"), source.kernel)
    attrs = {(place,): [["tt.divisibility", 16]] for place in source.divisible}
    ast = ASTSource(kernel, dict(source.signature), dict(source.constants), attrs)
    options = {"num_warps": source.num_warps, "num_stages": source.num_stages, "enable_fp_fusion": source.fp_fusion}
    compiled = triton.compile(ast, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spilled = registers_of(compiled)
    return Compiled(source.kernel, f"{source.label} {source.tiles}", f"sm_{arch}", registers, spilled, compiled.metadata.shared)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--arch", nargs="+", type=int, default=list(ARCHITECTURES))
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args(argv)

    import triton

    if triton.knobs.runtime.interpret:
        print("TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it", file=sys.stderr)
        return 2
    start = time.monotonic()
    jobs = [(source, arch) for op in arguments.op for arch in arguments.arch for source in sources(op)]
    with ProcessPoolExecutor(arguments.jobs) as pool:
        found = list(pool.map(build, *zip(*jobs, strict=True)))
    print_table(found)
    spills = [row.fault for row in found if row.fault]
    counts = tuple(map(int, triton.__version__.split(".")[:2])) == CHOSEN_WITH
    print(*spills, sep="\n", end="\n" if spills else "", file=sys.stderr if counts else sys.stdout)
    faults = len(spills) if counts else 0
    print(f"{len(found)} kernels compiled with triton {triton.__version__} in {time.monotonic() - start:.0f} s, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
