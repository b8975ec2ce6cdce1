"""Compile every kernel ahead of time, without a GPU, in every configuration that the launchers can select.

python -m sami_fast.kernels.aot                      # all operators, sm_80, sm_90 and sm_100; prints registers, spills, shared memory
python -m sami_fast.kernels.aot --op attention --arch 90
python -m sami_fast.kernels.aot --budgets benchmarks/budgets/triton.csv      # none of these may be above its budget
python -m sami_fast.kernels.aot --write benchmarks/budgets/triton.csv        # they become the budgets

Exit status 1 when a kernel does not compile, spills registers on sm_90 or exceeds its budget; 2 when the budgets cannot be read.
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
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from .budgets import BudgetError, Budgets, Row, Table

if TYPE_CHECKING:
    from ._common import Launch

OPS = ("random", "noise_sample", "guided_loss", "gaussian_log_prob", "group_norm_silu", "attention")
ARCHITECTURES = (80, 90, 100)
NO_SPILLS = "sm_90"  # where a spill is an error
# Registers per thread; bytes of local memory, which are spilled registers; bytes of shared memory
TABLE = Table(("kernel", "configuration", "chip"), ("registers", "stack", "shared"), note="tiles, warps, stages")

Case = tuple[str, Callable[[], object]]  # what it stands for, and a call of a launcher with meta tensors


def spills(row: Row) -> bool:
    """Whether it does where it must not."""
    return row.figures["stack"] > 0 and row.name[-1] == NO_SPILLS


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
    label: str
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

    @property
    def key(self) -> tuple[Any, ...]:
        return self.kernel, self.signature, self.constants, self.divisible, self.num_warps, self.num_stages, self.fp_fusion


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
            if source.key not in seen:
                seen.add(source.key)
                yield source


def figures_of(compiled: Any) -> dict[str, int]:
    """What a binary that Triton made takes of a chip."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage).group(1)) for word in ("REG", "STACK"))
    return {"registers": registers, "stack": stack, "shared": compiled.metadata.shared}


def build(source: _Source, arch: int) -> Row:
    """Compile one kernel for one chip and read its resources from the binary."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(import_module(f"sami_fast.kernels.{source.op}"), source.kernel)
    attrs = {(place,): [["tt.divisibility", 16]] for place in source.divisible}
    ast = ASTSource(kernel, dict(source.signature), dict(source.constants), attrs)
    options = {"num_warps": source.num_warps, "num_stages": source.num_stages, "enable_fp_fusion": source.fp_fusion}
    compiled = triton.compile(ast, target=GPUTarget("cuda", arch, 32), options=options)
    figures = figures_of(compiled)
    return Row((source.kernel, source.label, f"sm_{arch}"), figures, f"triton {triton.__version__}", source.tiles)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--arch", nargs="+", type=int, default=list(ARCHITECTURES))
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    Budgets.add_options(parser)
    arguments = parser.parse_args(argv)

    import triton

    try:
        budgets = Budgets(TABLE, arguments, "python -m sami_fast.kernels.aot")
    except BudgetError as error:
        print(error, file=sys.stderr)
        return 2
    if triton.knobs.runtime.interpret:
        print("TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it", file=sys.stderr)
        return 2
    start = time.monotonic()
    jobs = [(source, arch) for op in arguments.op for arch in arguments.arch for source in sources(op)]
    with ProcessPoolExecutor(arguments.jobs) as pool:
        rows = list(pool.map(build, *zip(*jobs, strict=True)))
    chips = {f"sm_{arch}" for arch in arguments.arch} if set(arguments.op) == set(OPS) else set()
    spilled = [f"{row}: spills {row.figures['stack']} bytes" for row in rows if spills(row)]
    faults = budgets.settle(rows, lambda row: row.name[-1] in chips, spilled)
    print(f"{len(rows)} kernels compiled with triton {triton.__version__} in {time.monotonic() - start:.0f} s, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
