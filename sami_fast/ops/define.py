"""How an operator is made: one schema, one implementation for numbers and for shapes, one derivative formula.

`torch.library.custom_op` does the same, but its operators raise under torch.func (pytorch/pytorch #168393, #170834). So this file registers
the kernel of the dispatch key Autograd, the function that torch calls first where a gradient may be wanted, by itself. With it an operator
works in eager autograd, to any order that has a formula; in torch.func.grad, vjp, jacrev and vmap, nested or not; and in
torch.compile(fullgraph=True) around any of these. In forward mode it raises.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from .launchers import LIBRARY, Launcher

_IMPLEMENTATIONS: dict[Any, Callable[..., Any]] = {}  # by operator


def define(
    name: str,
    implementation: Callable[..., Any] | Launcher[..., Any],
    save: Callable[..., None] | None = None,
    formula: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register `sami_fast::<name>`.

    Args:
        name: Name of the operator.
        implementation: A launcher; or an annotated function of tensors and plain values, the last one `backend`, that calls launchers. It
            keeps none of its inputs and returns none. It also tells shapes: on fake tensors Triton's launchers record and launch nothing,
            and the twins in plain torch run in place of the compiled core.
        save: save(ctx, inputs, output), as in torch.autograd.Function; without it all inputs are saved, see `saved_arguments`.
        formula: formula(ctx, *cotangents) -> gradient of every input; cotangents may be None. None: not differentiable.
    Returns:
        The operator: called with positional arguments, the last one the backend.
    """
    if isinstance(implementation, Launcher):
        schema, implementation = implementation.schema(), implementation.run
    else:
        schema = torch.library.infer_schema(implementation, mutates_args=())
    LIBRARY.define(name + schema, tags=[torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides])
    op = getattr(torch.ops.sami_fast, name).default
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    _IMPLEMENTATIONS[op] = implementation

    def shapes(*args):
        *rest, backend = args
        with _kernels_recorded(backend):
            return implementation(*rest, "triton" if backend == "triton" else "reference")

    shapes = _asked_once(shapes)
    torch.library.register_fake(f"sami_fast::{name}", shapes, lib=LIBRARY)

    def one_by_one(info, in_dims, *args):
        """vmap: call by call, then stacked."""
        if info.batch_size == 0:
            raise ValueError(f"{name}: torch.vmap over nothing: the shape of one call is not known")
        calls = [op(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True))) for i in range(info.batch_size)]
        if isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        return tuple(map(torch.stack, zip(*calls, strict=True))), (0,) * len(calls[0])

    torch.library.register_vmap(f"sami_fast::{name}", one_by_one, lib=LIBRARY)
    if formula is not None:
        LIBRARY.impl(name, _autograd_kernel(name, op, save or _save_all, formula), "Autograd")
    return op


def _asked_once(shapes: Callable[..., Any]) -> Callable[..., Any]:
    """The same, which runs through the twin in plain torch, hundreds of small operations, only for shapes that it has not been asked yet.
    Triton's launchers are to record each call."""
    known: dict[tuple[Any, ...], list[_Layout] | _Layout] = {}

    def remembered(*args):
        given = [_layout(a) if isinstance(a, Tensor) else tuple(a) if isinstance(a, list) else a for a in args]
        numbers = [n for a in given for n in ((*a.shape, *a.strides) if isinstance(a, _Layout) else (a,))]
        if args[-1] == "triton" or any(isinstance(n, torch.SymInt | torch.SymFloat | torch.SymBool) for n in numbers):
            return shapes(*args)
        key = tuple(given)
        if key not in known:
            out = shapes(*args)
            known[key] = _layout(out) if isinstance(out, Tensor) else [_layout(part) for part in out]
            return out
        found = known[key]
        return found.empty() if isinstance(found, _Layout) else tuple(part.empty() for part in found)

    return remembered


class _Layout(NamedTuple):
    """What there is to a tensor besides its numbers."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def empty(self) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)


def _layout(tensor: Tensor) -> _Layout:
    return _Layout(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def below_operators() -> dict[Any, Callable[..., Any]]:
    """Decompositions for `make_fx`: each operator as the launchers of the compiled core that it calls; on other backends as it is."""

    def launchers(implementation: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: implementation(*args) if args[-1] in ("cpp", "cuda") else NotImplemented

    return {op: launchers(implementation) for op, implementation in _IMPLEMENTATIONS.items()}


def _kernels_recorded(backend: str) -> Any:
    if backend != "triton":
        return nullcontext()
    from ..kernels._common import recording  # pyrefly: ignore[missing-import]  # setup.py maps kernels/ to this name

    return recording()


def _save_all(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(a for a in inputs if isinstance(a, Tensor)))
    ctx.args = [Tensor if isinstance(a, Tensor) else a for a in inputs]


def saved_arguments(ctx) -> list[Any]:
    """The inputs that the default `save` kept, in order."""
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if a is Tensor else a for a in ctx.args]


def asked_for(ctx) -> tuple[bool, ...]:
    """For each input of an operator, whether this backward pass has a use for its gradient.

    `ctx.needs_input_grad` is True for a weight whenever the weight requires a gradient. But in torch.autograd.grad(log_q, x) nobody takes
    it: autograd would drop what the formula computed. Here such a weight gets False. Holds for operators whose inputs the default `save`
    kept, and for those whose tensors come first among their arguments.
    """
    # Nodes of the graph that the gradients go to: one per tensor, None where no gradient is required.
    nodes = [node for node, _ in ctx.next_functions]
    args = getattr(ctx, "args", [Tensor] * len(nodes) + [None] * (len(ctx.needs_input_grad) - len(nodes)))
    tensors = iter(nodes)
    of_inputs = [next(tensors) if a is Tensor else None for a in args]
    return tuple(needed and _is_executed(node) for needed, node in zip(ctx.needs_input_grad, of_inputs, strict=True))


def _is_executed(node: Any) -> bool:
    try:
        return node is None or torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch refuses to answer for a leaf in whose gradient torch.autograd.grad is interested: that one is wanted
        return True


def _autograd_kernel(name: str, op: Callable[..., Any], save: Callable[..., None], formula: Callable[..., Any]) -> Callable[..., Any]:
    def below_autograd(*args):
        # torch turns differentiation off inside a Function. Where transforms of torch.func are nested, the outer ones see this very call
        # and have still to differentiate it, so both modes go on again; only this transform's own autograd is passed by.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    function: Any = type(
        name,
        (torch.autograd.function._SingleLevelFunction,),  # not Function, which would go through torch.func's transforms once more
        {"forward": staticmethod(below_autograd), "setup_context": staticmethod(save), "backward": staticmethod(formula)},
    )

    def kernel(*args):
        if forward_ad._current_level >= 0 and any(isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args):
            raise RuntimeError(
                f"{name}: no forward-mode derivative (torch.func.jvp, jacfwd, hessian) on this backend: "
                "take reverse mode, a `_dual` op, or backend='reference'"
            )
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            with enable_single_level_autograd_function():
                return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return kernel


def no_third_derivative(op: str) -> Callable[..., Any]:
    """Formula of an operator that is itself a second derivative."""

    def formula(ctx, *cotangents):
        raise _no_kernel(op)

    return formula


def linear_in_cotangents(op: str) -> Callable[..., Any]:
    """Formula of `op`_bwd_bwd in its first three arguments, the cotangents that it is linear in; the rest would be a third derivative.

    With f the op, J its Jacobian in three arguments p and H the Hessian of <grad_y, f(p)> in them, (gg_y, p_bar) = (J gg, H gg). H is
    symmetric, so the gradients in gg are J^T c_y + H c: kernels that are there. Products of Hessians with vectors by two backward passes,
    as torch.autograd.functional.hvp makes them, need these.
    """

    def formula(ctx, c_y, *c):
        if any(asked_for(ctx)[3:]):
            raise _no_kernel(op)
        saved = saved_arguments(ctx)
        gg, grad_y, p = saved[:3], saved[3], saved[4:7]
        found: list[Tensor | None] = [None] * 3
        if c_y is not None:
            found = list(getattr(torch.ops.sami_fast, f"{op}_bwd")(c_y, *saved[4:]))
        if any(value is not None for value in c):
            c = (torch.zeros_like(primal) if value is None else value for value, primal in zip(c, p, strict=True))
            _, *more = getattr(torch.ops.sami_fast, f"{op}_bwd_bwd")(*c, grad_y, *saved[4:])
            found = [b if a is None else a + b for a, b in zip(found, more, strict=True)]
        return *(None if value is None else g for value, g in zip(gg, found, strict=True)), *(None,) * (len(saved) - 3)

    return formula


def _no_kernel(op: str) -> RuntimeError:
    return RuntimeError(f"{op}: this derivative has no kernel; backend='reference' can be differentiated further")
