"""Compile every kernel ahead of time, without a GPU, in every configuration that the launchers can select.

python -m sami_fast.kernels.aot                      # all operators, sm_80, sm_90 and sm_100; prints registers, spills, shared memory
python -m sami_fast.kernels.aot --op attention --arch 90 --write docs/kernels.md

Exit status 1 when a kernel does not compile, or spills registers on sm_90.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

OPS = ("random", "noise_sample", "guided_loss", "gaussian_log_prob", "group_norm_silu", "attention")
ARCHITECTURES = (80, 90, 100)
NO_SPILLS = (90,)  # architectures on which a spill is an error

Case = tuple[str, Callable[[], object]]  # what it stands for, and a call of a launcher with meta tensors


@dataclass(frozen=True)
class Build:
    """One binary: a kernel, what was specialised in it, and for which chip."""

    op: str
    kernel: str
    label: str
    schedule: str
    arch: int
    registers: int
    stack: int  # bytes of local memory: spilled registers
    shared: int  # bytes

    @property
    def faulty(self) -> bool:
        return self.stack > 0 and self.arch in NO_SPILLS


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


def sources(op: str) -> Iterator[_Source]:
    """The distinct kernels that the cases of an op launch."""
    from ._common import recording

    seen = set()
    cases: Iterator[Case] = import_module(f"sami_fast.kernels.{op}").aot_cases()
    for label, call in cases:
        with recording() as launches:
            call()
        for item in launches:
            names = item.kernel.arg_names
            constants, signature, divisible = dict(item.constants), [], []
            for place, name in enumerate(names):
                if place < len(item.args):
                    kind, value, aligned = _specialise(name, item.args[place], not item.kernel.params[place].do_not_specialize)
                    if kind == "constexpr":
                        constants[name] = value
                    if aligned:
                        divisible.append(place)
                else:
                    kind = "constexpr"
                signature.append((name, kind))
            source = _Source(
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
            if source.key not in seen:
                seen.add(source.key)
                yield source


def build(source: _Source, arch: int) -> Build:
    """Compile one kernel for one chip and read its resources from the binary."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(import_module(f"sami_fast.kernels.{source.op}"), source.kernel)
    attrs = {(place,): [["tt.divisibility", 16]] for place in source.divisible}
    ast = ASTSource(kernel, dict(source.signature), dict(source.constants), attrs)
    options = {"num_warps": source.num_warps, "num_stages": source.num_stages, "enable_fp_fusion": source.fp_fusion}
    compiled = triton.compile(ast, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage).group(1)) for word in ("REG", "STACK"))
    return Build(source.op, source.kernel, source.label, source.tiles, arch, registers, stack, compiled.metadata.shared)


def _row(kernel: str, label: str, schedule: str) -> str:
    return f"| `{kernel}` | {label} | {schedule} |"


def table(builds: list[Build]) -> str:
    """Markdown: a row per kernel and configuration, the chips side by side."""
    rows: dict[tuple[str, ...], dict[int, Build]] = {}
    for item in builds:
        rows.setdefault((item.kernel, item.label, item.schedule), {})[item.arch] = item
    architectures = sorted({item.arch for item in builds})
    lines = [
        "| kernel | configuration | tiles, warps, stages | " + " | ".join(f"sm_{arch}" for arch in architectures) + " |",
        "| --- | --- | --- |" + " --- |" * len(architectures),
    ]
    for (kernel, label, schedule), by_arch in rows.items():
        cells = [f"{b.registers} / {b.stack} / {b.shared / 1024:.0f}" if (b := by_arch.get(arch)) else "" for arch in architectures]
        lines.append(f"{_row(kernel, label, schedule)} {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--arch", nargs="+", type=int, default=list(ARCHITECTURES))
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--list", action="store_true", help="only print the first three columns of the table, one line per configuration")
    parser.add_argument("--write", type=Path, metavar="FILE", help="markdown file whose generated part is replaced")
    arguments = parser.parse_args()

    import triton

    if triton.knobs.runtime.interpret:
        print("TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it", file=sys.stderr)
        return 2
    if arguments.list:
        print("\n".join(dict.fromkeys(_row(s.kernel, s.label, s.tiles) for op in arguments.op for s in sources(op))))
        return 0
    start = time.monotonic()
    jobs = [(source, arch) for op in arguments.op for source in sources(op) for arch in arguments.arch]
    with ProcessPoolExecutor(arguments.jobs) as pool:
        builds = list(pool.map(build, *zip(*jobs, strict=True)))
    text = table(builds)
    print(text)
    faulty = [item for item in builds if item.faulty]
    for item in faulty:
        print(f"spills {item.stack} bytes on sm_{item.arch}: {item.kernel}, {item.label}, {item.schedule}", file=sys.stderr)
    print(f"{len(builds)} kernels compiled with triton {triton.__version__} in {time.monotonic() - start:.0f} s, {len(faulty)} faulty")
    if arguments.write:
        begin, end = "<!-- kernels -->", "<!-- end of kernels -->"
        head, _, rest = arguments.write.read_text().partition(begin)
        arguments.write.write_text(f"{head}{begin}\nTriton {triton.__version__}.\n\n{text}\n{end}{rest.partition(end)[2]}")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
