"""How an operator is made: one schema, one implementation for numbers and for shapes, one derivative formula.

`torch.library.custom_op` would do all of this but for one thing: what it registers cannot be used under torch.func
(pytorch/pytorch #168393, #170834). So the autograd kernel is written out here; it serves eager autograd to any order that has a formula,
torch.func.grad, vjp, jacrev and vmap, nested or not, and torch.compile(fullgraph=True) around them; forward mode raises.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("sami_fast", "DEF")


def define(
    name: str,
    implementation: Callable[..., Any],
    save: Callable[..., None] | None = None,
    formula: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register `sami_fast::<name>`.

    Args:
        name: Name of the operator.
        implementation: Annotated function of tensors and plain values, the last one `backend`; calls level functions (`backend.levels`),
            keeps none of its inputs and returns none. It also tells shapes: on fake tensors Triton's launchers record and launch nothing,
            and the compiled core has its twins in plain torch run instead.
        save: save(ctx, inputs, output), as in torch.autograd.Function; without it all inputs are saved as `ctx.args`.
        formula: formula(ctx, *cotangents) -> gradient of every input; cotangents may be None. None: not differentiable.
    Returns:
        The operator.
    """
    schema = torch.library.infer_schema(implementation, mutates_args=())
    LIBRARY.define(name + schema, tags=[torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides])
    op = getattr(torch.ops.sami_fast, name).default
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")

    def shapes(*args):
        *rest, backend = args
        with _kernels_recorded(backend):
            return implementation(*rest, "triton" if backend == "triton" else "reference")

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


def _kernels_recorded(backend: str) -> Any:
    if backend != "triton":
        return nullcontext()
    from ..kernels._common import recording

    return recording()


def _save_all(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(a for a in inputs if isinstance(a, Tensor)))
    ctx.args = [None if isinstance(a, Tensor) else a for a in inputs]


def saved_arguments(ctx) -> list[Any]:
    """The inputs that the default `save` kept, in order."""
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if a is None else a for a in ctx.args]


def asked_for(ctx) -> tuple[bool, ...]:
    """`ctx.needs_input_grad`, less what this very pass has no use for: an inner gradient may ask for x alone, not for weights.

    For operators whose tensors come first among their arguments.
    """
    nodes = [node for node, _ in ctx.next_functions]
    nodes += [None] * (len(ctx.needs_input_grad) - len(nodes))
    return tuple(needed and _is_executed(node) for needed, node in zip(ctx.needs_input_grad, nodes, strict=True))


def _is_executed(node: Any) -> bool:
    try:
        return node is None or torch._C._will_engine_execute_node(node)
    except RuntimeError:  # it does not say so of a leaf that a gradient is being taken in, which is what was asked
        return True


def _autograd_kernel(name: str, op: Callable[..., Any], save: Callable[..., None], formula: Callable[..., Any]) -> Callable[..., Any]:
    def below_autograd(*args):
        # Both modes of differentiation are on again for the levels of torch.func below this one.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    function = type(
        name,
        (torch.autograd.function._SingleLevelFunction,),  # torch.func already stands at one of its levels here
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
        raise RuntimeError(f"{op}: this derivative has no kernel; backend='reference' can be differentiated further")

    return formula
