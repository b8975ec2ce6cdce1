"""Every Triton kernel and every kernel of the compiled core once, at small odd sizes, values checked: made to run under compute-sanitizer.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python benchmarks/sanitize.py     # each tensor in memory of its own
compute-sanitizer --tool racecheck python benchmarks/sanitize.py triton

Without a GPU the same calls go to Triton's interpreter (TRITON_INTERPRET=1) and to the core's C++. Exit status 1 where a value is wrong.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

import problems
import torch
from problems import Problem

from sami_fast.ops.backend import refusal

# Largest error of an output, in rounding steps of the dtype: about four times the largest of the plain torch twin at these sizes.
LIMIT = 16


def cases(dtypes: Sequence[torch.dtype]) -> Iterator[Problem]:
    """Sizes that fill no tile, one head size per tile, one shape per layout, vector and tile of group norm, several programs and splits."""
    for dtype in dtypes:
        for size, inside in ((3, False), (24, False), (32, True), (40, False), (64, True), (96, False), (128, True)):
            yield from problems.attention(dtype, 2, 72 if inside else 67, 72 if inside else 35, 2, size, inside, causal=inside)
        for channels, side, last in ((24, 1, False), (8, 3, False), (12, 7, False), (8, 8, False), (8, 12, False), (8, 24, False)):
            yield from problems.group_norm_silu(dtype, 2, channels, side, 4, last)
        for channels, side in ((32, 9), (16, 5), (28, 6), (128, 5), (48, 7), (40, 3)):
            yield from problems.group_norm_silu(dtype, 2, channels, side, 4, last=True)
        yield from problems.group_norm_silu(dtype, 1, 2, 150, 1)  # split
        yield from problems.group_norm_silu(dtype, 1, 6, 90, 1, last=True)
        for side, last in ((8, False), (7, False), (6, True), (5, True), (40, False)):
            yield from problems.guided_loss(dtype, 3, 2, 3, side, last)
        for side in (8, 7, 31):
            yield from problems.noise_sample(dtype, 3, 2, 3, side)
    for size in (1, 63, 64, 700):
        yield from problems.gaussian_log_prob(5, size)
    for batch, size, levels in ((3, 7, 1), (37, 1025, 5)):
        yield from problems.random(batch, size, levels)


def check(problem: Problem, levels: Any, device: str) -> str | None:
    """What is wrong with a level's values; None if nothing is."""
    # Made and judged on the CPU: on the GPU nothing runs, and is slowed down by a sanitizer, but the kernels.
    arguments = problem.make("cpu")
    given = tuple(x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments[0])
    found = tuple(x.cpu() for x in problems.call(levels, problem.level, (given, arguments[1])))
    expected = problems.twin(problem, arguments)
    if problem.exact:
        return None if all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)) else "other bits than the reference"
    dtypes = [x.dtype for x in arguments[0] if isinstance(x, torch.Tensor) and x.is_floating_point()]
    step = max(torch.finfo(dtype).eps for dtype in dtypes)
    error = problems.error(found, expected)
    return None if error <= LIMIT * step else f"relative error {error:.2g}, {error / step:.0f} rounding steps"


def run(backend: str, device: str, dtypes: Sequence[torch.dtype], only: str, every: int) -> int:
    """The number of cases that are wrong."""
    wrong = number = 0
    for problem in [problem for problem in cases(dtypes) if only in str(problem)][::every]:
        levels = import_module(f"sami_fast.kernels.{problem.op}") if backend == "triton" else torch.ops.sami_fast_C
        reason = check(problem, levels, device)
        number += 1
        if reason:
            wrong += 1
            print(f"{backend}: {problem}: {reason}", flush=True)
    print(f"{backend} on {device}: {number} calls, {wrong} wrong", flush=True)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backends = ("triton", "cuda" if device == "cuda" else "cpp")
    parser.add_argument("backends", nargs="*", metavar="backend", help=f"{' and '.join(backends)} here")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds this")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth case")
    arguments = parser.parse_args()
    wrong = 0
    for backend in arguments.backends or backends:
        reason = refusal(backend, device, torch.float32) if backend in backends else f"expected {' or '.join(backends)}"
        if reason:
            print(f"{backend}: {reason}", file=sys.stderr)
            return 2
        # The interpreter's bfloat16 is cut, not rounded.
        half = {"triton": torch.bfloat16 if device == "cuda" else torch.float16, "cuda": torch.bfloat16}.get(backend)
        dtypes = [torch.float32, *([half] if half else [])]
        wrong += run(backend, device, dtypes, arguments.only, max(1, arguments.every))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
