"""Which implementation of an op runs. `auto` takes the first of an op's implementations that can run where the tensors are.

    reference   plain torch, anywhere, any dtype: the truth
    cpp         csrc/cpu, on the CPU: float32 and float64
    triton      kernels/, on CUDA devices (and on the CPU through Triton's interpreter, for tests: TRITON_INTERPRET=1)
    cuda        csrc/cuda, on CUDA devices, where it was built

`backend=` of an op overrides `use_backend(...)`, which overrides the environment variable SAMI_FAST_BACKEND.
"""

import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from importlib import import_module
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import UserError

BACKENDS = ("reference", "cpp", "triton", "cuda")
AUTO = {"cuda": ("triton", "cuda", "reference"), "cpu": ("cpp", "reference")}  # by device type, best first
DTYPES = {  # of a backend's floating inputs; any where it is not listed
    "cpp": (torch.float32, torch.float64),
    "triton": (torch.float32, torch.float16, torch.bfloat16),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
}
HOME_DEVICES = {"cpp": "cpu", "cuda": "cuda"}  # the device type that a backend is compiled for
OPS: dict[str, tuple[str, ...]] = {}  # every op and the backends that have it, as `launchers.Launchers` finds them

# The backend that was asked for, and by what. Each thread and each asyncio task has its own, so `use_backend` in one changes no other.
_wanted: ContextVar[tuple[str, str]] = ContextVar("backend", default=(os.environ.get("SAMI_FAST_BACKEND") or "auto", "SAMI_FAST_BACKEND"))


F = TypeVar("F", bound=Callable[..., Any])


class BackendError(UserError, RuntimeError):
    """The backend that was asked for does not exist, or cannot run here."""


def _unknown(name: str, source: str) -> str | None:
    return None if name in ("auto", *BACKENDS) else f"{source}: expected auto, {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}, found {name!r}"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Every op of this thread inside the `with` block runs on this backend; "auto" lets each op choose again.

    "auto" is the best that can run where the tensors are; inside torch's forward mode (jvp, jacfwd, hessian) the reference.

    A derivative runs on the backend of its forward pass, inside the block or after it; compiled code keeps the backend it was compiled for.

    Args:
        name: "auto", "reference", "cpp", "triton" or "cuda".
    Raises:
        BackendError: there is no such backend; or, at the call of an op, it cannot run there (the message says why and what can).
    """
    if (reason := _unknown(name, "use_backend")) is not None:
        raise BackendError(reason)
    token = _wanted.set((name, "use_backend"))
    try:
        yield
    finally:
        _wanted.reset(token)


@cache
def _missing(backend: str) -> str | None:
    """Why a backend cannot run on this machine at all."""
    if backend == "triton":
        try:
            import_module("sami_fast.kernels._common")
        except ImportError as error:
            return f"Triton cannot be imported ({error})"
    if backend in ("cpp", "cuda"):
        try:
            import_module("sami_fast._C")
        except ModuleNotFoundError:
            if shutil.which("c++") is None:
                return "not built, there is no C++ compiler (c++) in the path; with one, install sami-fast again"
            return (
                "not built when sami-fast was installed, which a second installation may mend (pip install -v says what stands in the way)"
            )
        except ImportError as error:
            return f"the compiled core cannot be loaded ({error})"
    if backend == "cuda" and not torch._C._dispatch_has_kernel_for_dispatch_key("sami_fast_C::noise_sample_fwd", "CUDA"):
        return "the compiled core was built without CUDA (no nvcc, or a torch without CUDA)"
    return None


def refusal(backend: str, device_type: str, dtype: torch.dtype | None) -> str | None:
    """Why a backend cannot take tensors of this device and dtype; None when it can."""
    if backend in HOME_DEVICES and (home := HOME_DEVICES[backend]) != device_type:
        return f"it needs tensors on {home}, these are on {device_type}"
    if (reason := _missing(backend)) is not None:
        return reason
    if backend == "triton" and device_type != "cuda":
        from ..kernels._common import takes_cpu_tensors  # pyrefly: ignore[missing-import]  # setup.py maps kernels/ to this name

        if not takes_cpu_tensors():
            return f"it needs tensors on a CUDA device, these are on {device_type}"
    dtypes = DTYPES.get(backend)
    if dtype is not None and dtypes is not None and dtype not in dtypes:
        return f"it takes {', '.join(_short(d) for d in dtypes)}, not {_short(dtype)}"
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def decided_once(function: F) -> F:
    """What torch.compiler.assume_constant_result does: torch.compile calls the function while it traces, and keeps what it gave. That one
    imports the compiler, which takes two seconds, even for commands that compile nothing."""
    function._dynamo_marked_constant = True  # pyrefly: ignore[missing-attribute]
    return function


def never_compiled(function: F) -> F:
    """What torch.compiler.disable does: in a compiled function the call stands between two graphs. That one, too, imports the compiler."""
    apart = torch._disable_dynamo(function)  # which does so at its first call

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        return (apart if "torch._dynamo" in sys.modules else function)(*args, **kwargs)

    return cast(F, called)


@cache
def _warn_once(message: str) -> None:
    if (os.environ.get("LOCAL_RANK") or "0") == "0":
        warnings.warn(message, stacklevel=2)


@decided_once
def _pick(
    op: str, wanted: str, wanted_by: str, device_type: str, dtype: torch.dtype | None, limits: tuple[tuple[str, str], ...]
) -> tuple[str, str | None]:
    """The backend, or why there is none: torch.compile runs this once, while it traces, and would wrap an exception in one of its own."""

    def refuses(backend: str) -> str | None:
        return refusal(backend, device_type, dtype) or dict(limits).get(backend)

    if (reason := _unknown(wanted, wanted_by)) is not None:
        return "", reason
    if wanted != "auto":
        if (reason := refuses(wanted)) is not None:
            able = [name for name in BACKENDS if refuses(name) is None]
            return "", f"{op}: {wanted} ({wanted_by}) cannot run here: {reason}; what can: {', '.join(able)}"
        return wanted, None
    order = [name for name in AUTO.get(device_type, ("reference",)) if name in OPS.get(op, BACKENDS)]
    if order[0] == "cpp" and (reason := _missing("cpp")) is not None:
        _warn_once(f"sami-fast: ops on the CPU run on plain torch, which is slower; the compiled core: {reason}")
    chosen = next(name for name in order if refuses(name) is None)
    if chosen != order[0] and (reason := dict(limits).get(order[0])) is not None:
        warnings.warn(f"{op}: {chosen} instead of {order[0]}: {reason}", stacklevel=5)
    return chosen, None


@decided_once
def _in_force() -> tuple[str, str]:
    wanted, wanted_by = _wanted.get()
    if wanted == "auto" and forward_ad._current_level >= 0:
        return "reference", "torch's forward mode, which kernels have no derivatives for"
    return wanted, wanted_by


def choose(op: str, backend: str | None, like: Tensor, limits: Mapping[str, str] | None = None) -> str:
    """The backend that an op's call runs on.

    Args:
        op: Name of the op, for messages.
        backend: The call's own `backend=`; None for the one in force.
        like: A tensor of the call: its device and dtype decide.
        limits: By backend, why it cannot take these arguments; absent when it can.
    Raises:
        BackendError: the backend that was asked for does not exist or cannot run this call.
    """
    wanted, wanted_by = _in_force() if backend is None else (backend, "backend")
    dtype = like.dtype if like.dtype.is_floating_point else None
    chosen, reason = _pick(op, wanted, wanted_by, like.device.type, dtype, tuple((limits or {}).items()))
    if reason is not None:
        raise BackendError(reason)
    return chosen


def check_backend(device_type: str) -> None:
    """What a program that runs ops on this device asks first.

    Raises:
        BackendError: SAMI_FAST_BACKEND names no backend, or one that cannot run there.
    """
    _, reason = _pick("this run", *_wanted.get(), device_type, torch.float32, ())
    if reason is not None:
        raise BackendError(reason)


def describe() -> dict[str, dict[str, str]]:
    """{op: {device type: what float32 tensors there would run on, and what stands in the way of the rest}} for this machine.

    Raises:
        BackendError: SAMI_FAST_BACKEND names no backend.
    """
    if (reason := _unknown(*_wanted.get())) is not None:
        raise BackendError(reason)
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {op: {kind: _explain(op, kind) for kind in kinds} for op in sorted(OPS)}


def _explain(op: str, device_type: str) -> str:
    names = OPS[op]
    reasons = {name: refusal(name, device_type, torch.float32) for name in names}
    wanted, _ = _wanted.get()
    order = AUTO[device_type] if wanted == "auto" or wanted not in names else (wanted,)
    chosen = next((name for name in order if name in names and reasons[name] is None), "nothing")
    others = [f"{name}: {reason or 'only when asked for'}" for name, reason in reasons.items() if name not in (chosen, "reference")]
    return chosen + (f" ({'; '.join(others)})" if others else "")
