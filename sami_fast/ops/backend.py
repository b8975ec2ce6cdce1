"""Which implementation of an op runs. `auto` takes the first of an op's implementations that can run where the tensors are.

    reference   plain torch, anywhere, any dtype: the truth
    triton      kernels/, on CUDA devices (and on the CPU through Triton's interpreter, for tests: TRITON_INTERPRET=1)

`backend=` of an op overrides `use_backend(...)`, which overrides the environment variable SAMI_FAST_BACKEND.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from ..errors import UserError

BACKENDS = ("reference", "triton")
AUTO = {"cuda": ("triton", "reference"), "cpu": ("reference",)}  # by device type, best first
HOMES = {"reference": "sami_fast.reference", "triton": "sami_fast.kernels"}
DTYPES = {"triton": (torch.float32, torch.float16, torch.bfloat16)}  # of a backend's floating inputs; any where it is not listed

_wanted = os.environ.get("SAMI_FAST_BACKEND", "auto")
_wanted_by = "SAMI_FAST_BACKEND"


class BackendError(UserError, RuntimeError):
    """The backend that was asked for does not exist, or cannot run here."""


def _check_name(name: str, source: str) -> None:
    if name not in ("auto", *BACKENDS):
        raise BackendError(f"{source}: expected auto, {' or '.join(BACKENDS)}, found {name!r}")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Every op inside the `with` block runs on this backend; "auto" lets each op choose again.

    A derivative runs on the backend of its forward pass, inside the block or after it.

    Args:
        name: "auto", "reference" or "triton".
    Raises:
        BackendError: there is no such backend; or, at the call of an op, it cannot run there (the message says why and what can).
    """
    global _wanted, _wanted_by
    _check_name(name, "use_backend")
    before = _wanted, _wanted_by
    _wanted, _wanted_by = name, "use_backend"
    try:
        yield
    finally:
        _wanted, _wanted_by = before


@cache
def _missing(backend: str) -> str | None:
    """Why a backend cannot run on this machine at all."""
    if backend == "triton":
        try:
            import_module(HOMES["triton"] + "._common")
        except ImportError as error:
            return f"Triton cannot be imported ({error})"
    return None


def refusal(backend: str, device_type: str, dtype: torch.dtype | None) -> str | None:
    """Why a backend cannot take tensors of this device and dtype; None when it can."""
    if (reason := _missing(backend)) is not None:
        return reason
    if backend == "triton" and device_type != "cuda":
        from ..kernels._common import INTERPRETED

        if not INTERPRETED:
            return f"it needs tensors on a CUDA device, these are on {device_type}"
    dtypes = DTYPES.get(backend)
    if dtype is not None and dtypes is not None and dtype not in dtypes:
        return f"it takes {', '.join(_short(d) for d in dtypes)}, not {_short(dtype)}"
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@torch.compiler.assume_constant_result
def _pick(op: str, wanted: str, wanted_by: str, device_type: str, dtype: torch.dtype | None, limits: tuple[tuple[str, str], ...]) -> str:
    def refuses(backend: str) -> str | None:
        return refusal(backend, device_type, dtype) or dict(limits).get(backend)

    _check_name(wanted, wanted_by)
    if wanted != "auto":
        if (reason := refuses(wanted)) is not None:
            able = [name for name in BACKENDS if refuses(name) is None]
            raise BackendError(f"{op}: {wanted} ({wanted_by}) cannot run here: {reason}; what can: {', '.join(able)}")
        return wanted
    order = AUTO.get(device_type, ("reference",))
    chosen = next(name for name in order if refuses(name) is None)
    if chosen != order[0] and (reason := dict(limits).get(order[0])) is not None:
        warnings.warn(f"{op}: {chosen} instead of {order[0]}: {reason}", stacklevel=4)
    return chosen


def choose(op: str, backend: str | None, like: Tensor, **limits: str | None) -> str:
    """The backend that an op's call runs on.

    Args:
        op: Name of the op, for messages.
        backend: The call's own `backend=`; None for the one in force.
        like: A tensor of the call: its device and dtype decide.
        limits: Per backend, why it cannot take these arguments; None or absent when it can.
    Raises:
        BackendError: the backend that was asked for does not exist or cannot run this call.
    """
    wanted, wanted_by = (_wanted, _wanted_by) if backend is None else (backend, "backend")
    dtype = like.dtype if like.dtype.is_floating_point else None
    stated = tuple((name, reason) for name, reason in limits.items() if reason is not None)
    return _pick(op, wanted, wanted_by, like.device.type, dtype, stated)


@cache
def levels(op: str, backend: str) -> ModuleType:
    """The module with an op's level functions (`<op>_fwd`, `<op>_bwd`, ...): launchers of kernels, or their twins in plain torch."""
    return import_module(f"{HOMES[backend]}.{op}")


def sweep_levels(op: str, like: Tensor, **limits: str | None) -> ModuleType:
    """The level functions of the backend in force, for a caller that schedules the derivatives itself; arguments as in `choose`."""
    return levels(op, choose(op, None, like, **limits))


def describe() -> dict[str, dict[str, str]]:
    """{op: {device type: what float32 tensors there would run on, and what stands in the way of the rest}} for this machine."""
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {op: {kind: _explain(kind) for kind in kinds} for op in WITH_KERNELS}


def _explain(device_type: str) -> str:
    reasons = {name: refusal(name, device_type, torch.float32) for name in BACKENDS}
    order = AUTO[device_type] if _wanted == "auto" else (_wanted,)
    chosen = next((name for name in order if reasons.get(name) is None), "nothing")
    others = [f"{name}: {reason or 'only when asked for'}" for name, reason in reasons.items() if name not in (chosen, "reference")]
    return chosen + (f" ({'; '.join(others)})" if others else "")


WITH_KERNELS = ("noise_sample", "guided_loss", "attention", "group_norm_silu", "gaussian_log_prob", "random_normal", "stratified_uniform")
