"""What can be counted of a computation and is the same on every machine: operator calls, FLOPs, bytes of tensors, launches of Triton;
and a step as a GPU would run it."""

import gc
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Self
from weakref import finalize

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from sami_fast import ops
from sami_fast.gpu_step import Step

aten = torch.ops.aten


class Meter(TorchDispatchMode):
    """Counts what runs inside, down to the operators that our own and the compiled core's call.

    Bytes are those of tensors that came into being inside; not those of the inputs, nor what libraries and the core take for themselves
    while an operator runs, which depends on the processor.

    Attributes:
        calls: How often each operator was called.
        flops: FLOPs of the convolutions and matrix products, by operator; torch's formulas, algorithms that save some count in full.
        convolutions: How often torch was asked for each convolution, by operator and arguments; of a tensor its shape and dtype.
        held, peak: Bytes alive now, and the most there were at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.convolutions: Counter[tuple[Any, ...]] = Counter()
        self.held = self.peak = 0

    @property
    def convolution_flops(self) -> int:
        return sum(count for op, count in self.flops.items() if "conv" in op)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = str(func.overloadpacket)
        self.calls[name] += 1
        if func in (aten.convolution.default, aten.convolution_backward.default):
            described = ((a.shape, a.dtype) if isinstance(a, Tensor) else tuple(a) if isinstance(a, list) else a for a in args)
            self.convolutions[(func, *described)] += 1
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if func.namespace in ("sami_fast", "sami_fast_C"):
            with self:
                out = func._op_dk(_key(func, tensors), *args, **kwargs)
        else:
            out = func(*args, **kwargs)
            given = {t.untyped_storage()._cdata for t in tensors}
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor):
                    self._watch(tensor.untyped_storage(), given)
        if count := _flops(func, args, kwargs, out):
            self.flops[name] += count
        return out

    def _watch(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in given:  # else a view, or written in place
            given.add(key)
            self.held += size
            self.peak = max(self.peak, self.held)
            finalize(storage, self._freed, size).atexit = False

    def _freed(self, size: int) -> None:
        self.held -= size


def _key(func: Any, tensors: Sequence[Tensor]) -> DispatchKey:
    """What an operator of ours, or a launcher of the core, is registered under."""
    if func.namespace == "sami_fast":
        return DispatchKey.CompositeExplicitAutograd
    return DispatchKey.CUDA if any(t.is_cuda for t in tensors) else DispatchKey.CPU


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Multiplications and additions of one call, 0 where torch has no formula."""
    # Autograd's second derivatives take an image for a kernel: the same number of products, which torch's own formula overstates.
    if func is aten.convolution.default:
        x, weight, transposed = args[0], args[1], args[6]
        return _products((x if transposed else out).shape, weight.shape)
    if func is aten.convolution_backward.default:
        grad_y, x, weight, transposed, mask = args[0], args[1], args[2], args[7], args[10]
        return (mask[0] + mask[1]) * _products((x if transposed else grad_y).shape, weight.shape)
    formula = flop_registry.get(func.overloadpacket)
    return formula(*args, **kwargs, out_val=out) if formula else 0


def _products(positions: torch.Size, weight: torch.Size) -> int:
    return 2 * positions.numel() * weight[1:].numel()


@dataclass(frozen=True)
class Counts:
    """Of one computation.

    Attributes:
        convolution_flops: FLOPs of the convolutions.
        operator_calls: Calls of torch's operators, those inside our own included.
        kept_bytes: Bytes alive when it said so: between forward and backward what is kept for the latter, and the results until then.
        peak_bytes: The most bytes alive at once.
        launches: Triton kernels started; None on another backend.
    """

    convolution_flops: int
    operator_calls: int
    kept_bytes: int
    peak_bytes: int
    launches: int | None


@dataclass(frozen=True)
class GPUCounts:
    """Of one training step as a GPU would run it (`sami_fast.gpu_step`): forward, score, backward and update.

    Attributes:
        kernels: That the host starts.
        views: Calls of operators that start none.
        moved_bytes: That the kernels read and write, each once.
        matmul_flops: Of convolutions, matrix products and attention.
        channels_outside: Convolutions whose images do not lie channels-last.
        relaid: Copies for the sake of another layout.
    """

    kernels: int
    views: int
    moved_bytes: int
    matmul_flops: int
    channels_outside: int
    relaid: int

    @classmethod
    def of(cls, step: Step) -> Self:
        micro, update = step.micro, step.update
        return cls(
            kernels=len(micro.kernels) + len(update.kernels),
            views=micro.views + update.views,
            moved_bytes=micro.bytes + update.bytes,
            matmul_flops=micro.flops,
            channels_outside=micro.channels_outside,
            relaid=len(micro.relaid) + len(update.relaid),
        )


def count(work: Callable[[Callable[[], None]], object], backend: str) -> Counts:
    """Count one computation on CPU tensors. With the backend "triton" launches are recorded and no kernel runs, so values mean nothing.

    Args:
        work: Is given a function to call where kept bytes are to be taken; called twice, the first time to warm up.
        backend: "cpp", "reference" or, in a process with TRITON_INTERPRET=1, "triton".
    """
    threads, deterministic, collecting = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), gc.isenabled()
    kept = 0

    def keep() -> None:
        nonlocal kept
        kept = meter.held

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)  # other operators
    recorded: AbstractContextManager[list[str]] = nullcontext([])
    if backend == "triton":
        from sami_fast.kernels._common import recording

        recorded = recording(lambda launch: launch.kernel.fn.__name__)
    try:
        with ops.use_backend(backend), recorded as launches:
            work(lambda: None)
            launches.clear()
            gc.disable()  # it frees tensors in reference cycles at times that differ from run to run
            with Meter() as meter:
                work(keep)
    finally:
        if collecting:
            gc.enable()
        torch.use_deterministic_algorithms(deterministic)
        torch.set_num_threads(threads)
    started = len(launches) if backend == "triton" else None
    return Counts(meter.convolution_flops, meter.calls.total(), kept, meter.peak, started)
