"""From an op to what runs it: one class per op, with the op's launchers on one backend as attributes.

    class AttentionLaunchers(Launchers):
        op = "attention"
        fwd = Launcher(attention_fwd)                              # the twin, from sami_fast.reference.attention

    AttentionLaunchers("triton").fwd(q, k, v, scale, causal)       # calls sami_fast.kernels.attention.attention_fwd

A launcher is the function that starts a kernel; it knows nothing of autograd. Its twin in `sami_fast/reference` is plain torch with the
same name, arguments and results, and says their shapes and formulas. So the twin gives every launcher its type: editors jump to it, type
checkers hold calls against it, and `define` takes an operator's schema from it. Only this differs: where a twin gives None for a result
that was not asked for, the compiled core gives an empty tensor.
"""

import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, ClassVar, Generic, ParamSpec, Self, TypeVar, get_args, overload

import torch
from torch import Tensor

from .backend import BACKENDS, OPS, choose

LIBRARY = torch.library.Library("sami_fast", "DEF")
P = ParamSpec("P")
R = TypeVar("R")


class Launcher(Generic[P, R]):
    """An attribute of `Launchers`: its backend's function with the name and the signature of a twin.

    Args:
        twin: The function in plain torch.
        file: The file of `kernels/` that holds the Triton one; that of the twin's name when empty.
    """

    def __init__(self, twin: Callable[P, R], file: str = "") -> None:
        self.twin, self.file = twin, file or twin.__module__.rpartition(".")[2]

    @overload
    def __get__(self, launchers: None, owner: type) -> Self: ...
    @overload
    def __get__(self, launchers: "Launchers", owner: type) -> Callable[P, R]: ...
    def __get__(self, launchers: "Launchers | None", owner: type) -> Self | Callable[P, R]:
        return self if launchers is None else _find(self.twin, self.file, launchers.backend)

    def schema(self) -> str:
        """An operator's: the twin's own, with the backend as a last argument."""
        return torch.library.infer_schema(self.twin, mutates_args=()).replace(") ->", ", str backend) ->", 1)

    def run(self, *args: Any) -> Any:
        """Call it on the backend that comes last among the arguments."""
        *rest, backend = args
        return _find(self.twin, self.file, backend)(*rest)


def _find(twin: Callable[..., Any], file: str, backend: str) -> Callable[..., Any]:
    if backend == "triton" and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        return _as_operator(twin, file)
    return twin if backend == "reference" else getattr(_home(file, backend), twin.__name__)


@cache
def _as_operator(twin: Callable[..., Any], file: str) -> Callable[..., Any]:
    """A launcher of Triton's as an operator: `make_fx`, which is at work here, writes down nothing else."""
    launcher, signature = getattr(_home(file, "triton"), twin.__name__), inspect.signature(twin, eval_str=True)
    results = len(get_args(signature.return_annotation))  # none for a single tensor

    def launch(*args: Any, **options: Any) -> Any:
        out = launcher(*args, **options)
        if not results:
            return out
        like = next(x for x in out if x is not None)
        return tuple(like.new_empty(0) if x is None else x for x in out)  # operators cannot give None

    of_operator: Any = tuple.__class_getitem__((Tensor,) * results) if results else Tensor
    launch.__signature__ = signature.replace(return_annotation=of_operator)  # pyrefly: ignore[missing-attribute] (`inspect` reads it)
    name = f"triton_{twin.__name__}"
    LIBRARY.define(name + torch.library.infer_schema(launch, mutates_args=()))
    LIBRARY.impl(name, launch, "CompositeExplicitAutograd")
    return getattr(torch.ops.sami_fast, name).default


@cache
def _home(file: str, backend: str) -> Any:
    return import_module(f"sami_fast.kernels.{file}") if backend == "triton" else torch.ops.sami_fast_C


class Launchers:
    """An op on one backend. Each subclass is one op: it states the op's name, what can run it, and its launchers.

    Attributes:
        op: Name of the op, for messages and for `sami-fast env`.
        backends: Those that have the op.
        absent: By backend that lacks the op, a reason for messages.
        backend: Whose launchers the attributes are.
    """

    op: ClassVar[str]
    backends: ClassVar[tuple[str, ...]] = BACKENDS
    absent: ClassVar[dict[str, str]]

    def __init_subclass__(cls) -> None:
        OPS[cls.op] = cls.backends
        cls.absent = {name: "it does not have this op" for name in BACKENDS if name not in cls.backends}

    def __init__(self, backend: str) -> None:
        self.backend = backend

    @staticmethod
    def limits(like: Tensor) -> dict[str, str]:
        """By backend, why it cannot take a call with such a tensor, where device and dtype do not say so already."""
        return {}

    @classmethod
    def choose(cls, backend: str | None, like: Tensor) -> str:
        """The backend of a call, see `backend.choose`."""
        return choose(cls.op, backend, like, cls.absent | cls.limits(like))

    @classmethod
    def in_force(cls, like: Tensor) -> Self:
        """Those of the backend in force, for a caller that orders the derivatives itself."""
        return cls(cls.choose(None, like))
