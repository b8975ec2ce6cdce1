"""Layers that can be swept: the four passes over an encoder that give its score and the score's gradients without a double backward.

Let y = f(x; p) be a layer. One evaluation of grad_x log q and of its derivative runs over all layers four times:

    forward   x -> y
    adjoint   grad_y -> grad_x            with grad_x = (df/dx)^T grad_y, from the heads down to the image: the score
    tangent   tx -> ty                    with ty = (df/dx) tx, from the image up, along what arrived for the score
    joint     y_bar -> x_bar, p_bar       the gradient of <y_bar, y> + <grad_y, ty> in x and in the parameters

What one sweep leaves for the next goes to a `Tape`. A new type of layer is one class with these four methods, and a `forward` that also
takes a tangent (x, tx) -> (y, ty), which the dual-number schedule uses. Sums of layers and chains of them are swept here too.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from . import ops
from .ops.conv2d import with_gradient_laid_out

Out = TypeVar("Out", Tensor, tuple[Tensor, Tensor])  # what a layer makes: features, or a Gaussian's mu and var


class Tape:
    """The notes that the sweeps of one evaluation leave for each other, and the parameter gradients they end with.

    Args:
        dtype: Of convolutions with float32 weights, autocast's; None for that of the weights.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype
        self.gradients: dict[Tensor, Tensor] = {}
        self._notes: dict[nn.Module, SimpleNamespace] = {}

    def note(self, layer: nn.Module, **values: object) -> SimpleNamespace:
        """The note of a layer, with these values added."""
        note = self._notes.setdefault(layer, SimpleNamespace())
        note.__dict__.update(values)
        return note

    def take(self, layer: nn.Module) -> SimpleNamespace:
        """The note of a layer, for the last time: its tensors can be freed."""
        return self._notes.pop(layer)

    def cast(self, value: Tensor, parameter: Tensor) -> Tensor:
        """`value` in the dtype that a product with this parameter runs in."""
        return value.to(self.dtype if self.dtype is not None and parameter.dtype == torch.float32 else parameter.dtype)

    def add(self, parameter: Tensor | None, gradient: Tensor | None) -> None:
        """Add to the gradient of a parameter; nothing where there is no parameter, no gradient or no use for it."""
        if parameter is None or gradient is None or not parameter.requires_grad:
            return
        gradient = gradient.to(parameter.dtype)
        known = self.gradients.get(parameter)
        self.gradients[parameter] = gradient if known is None else known.add_(gradient)


class Layer(nn.Module, ABC, Generic[Out]):
    """A layer that can be swept. `need_input` of the joint sweep is False where nobody asks for x_bar, which may then be None."""

    @abstractmethod
    def sweep_forward(self, x: Tensor, tape: Tape) -> Out: ...

    @abstractmethod
    def sweep_adjoint(self, grad_y: Out, tape: Tape) -> Tensor: ...

    @abstractmethod
    def sweep_tangent(self, tx: Tensor, tape: Tape) -> Out: ...

    @abstractmethod
    def sweep_joint(self, y_bar: Out, tape: Tape, need_input: bool = True) -> Tensor | None: ...


def sweepable(module: nn.Module) -> bool:
    """Whether the sweeps do what calling the module does: layers of this kind all through, each at one place, none with hooks on it."""
    if not isinstance(module, Layer):
        return False
    inside = [layer for _, layer in module.named_modules(remove_duplicate=False)]
    return len(set(inside)) == len(inside) and all(
        isinstance(layer, Layer)
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
        and "forward" not in vars(layer)
        and not is_parametrized(layer)
        for layer in inside
    )


class Conv2d(nn.Conv2d, Layer[Tensor]):
    """nn.Conv2d with zero padding by whole numbers."""

    padding: tuple[int, ...]  # pyrefly: ignore[bad-override-mutable-attribute]  # a str is refused

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            raise ValueError(f"padding: expected numbers of zeros, found {self.padding!r}, {self.padding_mode}")

    # pyrefly: ignore[bad-override]  # torch's takes no tangent
    def forward(self, x: Tensor, tx: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if tx is None:
            return self._conv(x, self.weight, self.bias)
        y, ty = self._conv(torch.cat((x, tx)), self.weight, None).chunk(2)
        return (y if self.bias is None else y + self.bias.to(y.dtype)[:, None, None]), ty

    def _conv(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return ops.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def _backward(self, grad_y: Tensor, x: Tensor, weight: Tensor, mask: Sequence[bool]) -> tuple[Any, ...]:
        """Gradients of input, weight and bias: a Tensor where the mask asks for one, None where it does not."""
        return ops.conv2d_backward(grad_y, x, weight, self.stride, self.padding, self.dilation, self.groups, mask)

    def sweep_forward(self, x: Tensor, tape: Tape) -> Tensor:
        x, weight = ops.laid_out(tape.cast(x, self.weight)), tape.cast(self.weight, self.weight)
        tape.note(self, x=x, weight=weight)
        return self._conv(x, weight, None if self.bias is None else self.bias.to(weight.dtype))

    def sweep_adjoint(self, grad_y: Tensor, tape: Tape) -> Tensor:
        note = tape.note(self, grad_y=grad_y)
        return self._backward(grad_y, note.x, note.weight, (True, False, False))[0]

    def sweep_tangent(self, tx: Tensor, tape: Tape) -> Tensor:
        note = tape.note(self)
        tx = ops.laid_out(tape.cast(tx, self.weight))
        if self.weight.requires_grad:  # this half of its gradient asks for nothing of the joint sweep: neither tensor waits for it
            tape.add(self.weight, self._backward(note.grad_y, tx, note.weight, (False, True, False))[1])
        del note.grad_y
        return self._conv(tx, note.weight, None)

    def sweep_joint(self, y_bar: Tensor, tape: Tape, need_input: bool = True) -> Tensor | None:
        note = tape.take(self)
        mask = (need_input, self.weight.requires_grad, self.bias is not None and self.bias.requires_grad)
        x_bar, weight_bar, bias_bar = self._backward(y_bar, note.x, note.weight, mask)
        tape.add(self.weight, weight_bar)
        tape.add(self.bias, bias_bar)
        return x_bar


class Linear(nn.Linear, Layer[Tensor]):
    """nn.Linear on [B, features], always in the dtype of its weight."""

    # pyrefly: ignore[bad-override]  # torch's takes no tangent
    def forward(self, x: Tensor, tx: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if tx is None:
            return super().forward(x)
        y, ty = F.linear(torch.cat((x, tx)), self.weight).chunk(2)
        return (y if self.bias is None else y + self.bias), ty

    def sweep_forward(self, x: Tensor, tape: Tape) -> Tensor:
        tape.note(self, x=x)
        return F.linear(x, self.weight, self.bias)

    def sweep_adjoint(self, grad_y: Tensor, tape: Tape) -> Tensor:
        tape.note(self, grad_y=grad_y)
        return grad_y @ self.weight

    def sweep_tangent(self, tx: Tensor, tape: Tape) -> Tensor:
        tape.note(self, tx=tx)
        return F.linear(tx, self.weight)

    def sweep_joint(self, y_bar: Tensor, tape: Tape, need_input: bool = True) -> Tensor | None:
        note = tape.take(self)
        if self.weight.requires_grad:
            tape.add(self.weight, torch.addmm(y_bar.mT @ note.x, note.grad_y.mT, note.tx))
        if self.bias is not None:
            tape.add(self.bias, y_bar.sum(0))
        return y_bar @ self.weight if need_input else None


class Pointwise(Layer[Tensor]):
    """y = f(x), element by element."""

    @abstractmethod
    def function(self, x: Tensor) -> Tensor:
        """f(x), by operations that autograd knows."""

    @abstractmethod
    def slope(self, x: Tensor) -> Tensor:
        """f'(x), likewise."""

    @abstractmethod
    def curvature(self, x: Tensor) -> Tensor | None:
        """f''(x); None where it is zero."""

    def forward(self, x: Tensor, tx: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if tx is not None:
            return self.function(x), self.slope(x) * tx
        return with_gradient_laid_out(self.function(x))

    def sweep_forward(self, x: Tensor, tape: Tape) -> Tensor:
        tape.note(self, x=x)
        return self.function(x)

    def sweep_adjoint(self, grad_y: Tensor, tape: Tape) -> Tensor:
        note = tape.note(self, grad_y=grad_y)
        return self.slope(note.x) * grad_y

    def sweep_tangent(self, tx: Tensor, tape: Tape) -> Tensor:
        note = tape.note(self, tx=tx)
        return self.slope(note.x) * tx

    def sweep_joint(self, y_bar: Tensor, tape: Tape, need_input: bool = True) -> Tensor | None:
        note = tape.take(self)
        if not need_input:
            return None
        curvature = self.curvature(note.x)
        x_bar = self.slope(note.x) * y_bar
        return x_bar if curvature is None else x_bar + curvature * note.grad_y * note.tx


class ReLU(Pointwise):
    """max(x, 0); slope 0 at 0."""

    def function(self, x: Tensor) -> Tensor:
        return F.relu(x)

    def slope(self, x: Tensor) -> Tensor:
        return (x > 0).to(x.dtype)

    def curvature(self, x: Tensor) -> None:
        return None


class SiLU(Pointwise):
    """x sigmoid(x)."""

    def function(self, x: Tensor) -> Tensor:
        return F.silu(x)

    def slope(self, x: Tensor) -> Tensor:
        s = torch.sigmoid(x)
        return s * (1 + x * (1 - s))

    def curvature(self, x: Tensor) -> Tensor:
        s = torch.sigmoid(x)
        return s * (1 - s) * (2 + x * (1 - 2 * s))


# Layers one after another, which share one tape


def chain_forward(layers: Sequence[Layer[Tensor]], x: Tensor, tape: Tape) -> Tensor:
    for layer in layers:
        x = layer.sweep_forward(x, tape)
    return x


def chain_adjoint(layers: Sequence[Layer[Tensor]], grad_y: Tensor, tape: Tape) -> Tensor:
    for layer in reversed(layers):
        grad_y = layer.sweep_adjoint(grad_y, tape)
    return grad_y


def chain_tangent(layers: Sequence[Layer[Tensor]], tx: Tensor, tape: Tape) -> Tensor:
    for layer in layers:
        tx = layer.sweep_tangent(tx, tape)
    return tx


def chain_joint(layers: Sequence[Layer[Tensor]], y_bar: Tensor, tape: Tape, need_input: bool = True) -> Tensor | None:
    bar: Tensor | None = y_bar
    for place in reversed(range(len(layers))):
        assert bar is not None
        bar = layers[place].sweep_joint(bar, tape, need_input or place > 0)
    return bar


def chain_dual(layers: Sequence[Layer[Tensor]], x: Tensor, tx: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    for layer in layers:
        if tx is None:
            x = layer(x)
        else:
            x, tx = layer(x, tx)
    return x if tx is None else (x, tx)


class Chain(nn.Sequential, Layer[Tensor]):
    """One layer after another; its methods are the functions above."""

    forward = chain_dual
    sweep_forward, sweep_adjoint, sweep_tangent, sweep_joint = chain_forward, chain_adjoint, chain_tangent, chain_joint


class Identity(Chain):
    """y = x: no layer at all."""


class Residual(Layer[Tensor]):
    """y = skip(x) + branch(x), the branch a chain of at least one layer that makes new tensors."""

    skip: Layer[Tensor]

    @property
    @abstractmethod
    def branch(self) -> tuple[Layer[Tensor], ...]: ...

    def forward(self, x: Tensor, tx: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if tx is None:
            return self.skip(x) + chain_dual(self.branch, x)
        (skip, t_skip), (h, th) = self.skip(x, tx), chain_dual(self.branch, x, tx)
        return skip + h, t_skip + th

    def sweep_forward(self, x: Tensor, tape: Tape) -> Tensor:
        return chain_forward(self.branch, x, tape).add_(self.skip.sweep_forward(x, tape))

    def sweep_adjoint(self, grad_y: Tensor, tape: Tape) -> Tensor:
        return chain_adjoint(self.branch, grad_y, tape).add_(self.skip.sweep_adjoint(grad_y, tape))

    def sweep_tangent(self, tx: Tensor, tape: Tape) -> Tensor:
        return chain_tangent(self.branch, tx, tape).add_(self.skip.sweep_tangent(tx, tape))

    def sweep_joint(self, y_bar: Tensor, tape: Tape, need_input: bool = True) -> Tensor | None:
        skip = self.skip.sweep_joint(y_bar, tape, need_input)
        branch = chain_joint(self.branch, y_bar, tape, need_input)
        return branch.add_(skip) if need_input and branch is not None and skip is not None else None
