"""What all launchers share: the one place where a kernel is started, or recorded to be compiled ahead of time."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on CPU tensors, slowly


@dataclass(frozen=True)
class Launch:
    """A kernel with everything that selects what is compiled: argument types, compile-time constants, schedule."""

    kernel: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    fp_fusion: bool
    grid: tuple[int, ...] = ()


_state = threading.local()  # per thread: a backward pass on another thread still runs its kernels


def takes_cpu_tensors() -> bool:
    """Whether launchers can be called with tensors that no GPU holds: interpreted, or while launches are recorded."""
    return INTERPRETED or getattr(_state, "record", None) is not None


@contextmanager
def recording(note: Callable[[Launch], Any] = lambda launch: launch) -> Iterator[list[Any]]:
    """Collects this thread's launches, or what `note` makes of each, instead of running them; launchers may then be called with meta or
    fake tensors. A launch keeps its tensors alive."""
    record: list[Any] = []
    before = getattr(_state, "record", None)
    _state.record = lambda launch: record.append(note(launch))
    try:
        yield record
    finally:
        _state.record = before


def launch(
    kernel: Any,
    grid: Sequence[int],
    first: Tensor,
    *rest: Tensor | int | float | None,
    num_warps: int = 4,
    num_stages: int = 2,
    fp_fusion: bool = True,
    **constants: Any,
) -> None:
    """Run `kernel` over `grid` on the device of `first`; an empty grid runs nothing.

    Args:
        kernel: A triton.jit function.
        grid: Number of programs along up to three axes.
        first, rest: Its run-time arguments in order.
        num_warps, num_stages: Warps per program, depth of the software pipeline.
        fp_fusion: Let a product and a sum contract into one rounding; False where results must be equal bit for bit.
        constants: Its compile-time arguments by name.
    """
    record = getattr(_state, "record", None)
    if record is not None:
        record(Launch(kernel, (first, *rest), constants, num_warps, num_stages, fp_fusion, tuple(grid)))
        return
    if 0 in grid:
        return
    if INTERPRETED:
        rest = tuple(_truth_value(value) if isinstance(value, bool) else value for value in rest)
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        kernel[tuple(grid)](first, *rest, **constants, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=fp_fusion)


def _truth_value(value: bool) -> Any:
    """As the interpreter of later versions passes it to a kernel; that of Triton 3.6 fails to."""
    from triton.runtime.interpreter import TensorHandle

    return tl.tensor(TensorHandle(torch.tensor([value]).numpy(), tl.int1), tl.int1)
