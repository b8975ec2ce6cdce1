"""Our ops inside a model that somebody else wrote: group norm with SiLU, attention, convolutions of 1x1 and 3x3, and channels-last memory.

report = sami_fast.accelerate(model)      # in place; parameters, their names and the numbers stay
print(report)                             # what runs on our ops now, and what does not, and why
report.restore()                          # every layer is what it was

A layer becomes ours by its `__class__`, which is set to a subclass with another forward. So parameters, buffers, hooks, the keys of
state dicts and whatever an optimizer holds are the same objects before and after. The subclass has the name of the class it replaces, which
model formats write down. Captured graphs (torch.fx, torch.export) would see more, functions included; but they freeze shapes and branches,
lose the model's class and its other methods, and refuse much of what people write. Functions are met where they are called instead, by a
TorchFunctionMode around those modules alone whose code names them.
"""

import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from inspect import isfunction, unwrap
from itertools import count, pairwise
from types import CodeType, ModuleType
from typing import Any, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.parametrize import is_parametrized
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils._pytree import tree_leaves, tree_map_only

from . import ops
from .ops.backend import decided_once
from .ops.conv2d import takes

SDPA = {"scaled_dot_product_attention", "dispatch_attention_fn"}  # torch's, and the function of diffusers that calls it
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Module)  # which compute nothing
KINDS = (nn.GroupNorm, nn.SiLU, nn.Conv2d, nn.MultiheadAttention)
REPLACED = "its forward was replaced by another on the instance"

Place = tuple[int, str]  # number of the `accelerate` that changed a module, and the module's name in the model: for warnings
Decision = tuple[type[nn.Module] | None, str]  # what a module becomes and how it computes; or None and why it stays

_serials = count()


@dataclass(frozen=True)
class Entry:
    """One module: its name in the model ("" for the model itself), its class, and what became of it or why nothing did."""

    name: str
    kind: str
    note: str


@dataclass(frozen=True)
class Report:
    """What `accelerate` changed and what it left alone; printed, a list to read.

    Attributes:
        module: The model.
        changed: Modules that run on our ops now, containers that run a norm and a SiLU in one pass, and the model itself where its
            images lie in channels-last memory.
        skipped: Norms, SiLUs, convolutions and attention modules that stay as they are.
    """

    module: nn.Module
    changed: tuple[Entry, ...]
    skipped: tuple[Entry, ...]

    def restore(self) -> None:
        """Every module inside the model is of its own class again, weights lie as they did. Parameters keep the values they have now.

        A copy of an accelerated model is restored by a report of its own: `accelerate(copy).restore()`.
        """
        _restore(self.module)

    def __str__(self) -> str:
        head = f"{type(self.module).__name__}: {len(self.changed)} changed, {len(self.skipped)} left alone"
        return "\n".join([head, *_listed("changed", self.changed), *_listed("left alone", self.skipped)])


def _listed(title: str, entries: tuple[Entry, ...]) -> Iterator[str]:
    groups: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        groups.setdefault((entry.kind, entry.note), []).append(entry.name or "(the model itself)")
    if groups:
        yield title
    for (kind, note), names in groups.items():
        yield f"  {len(names)} x {kind}: {note}"
        yield f"      {', '.join(names)}"


def accelerate(module: nn.Module) -> Report:
    """Let the layers inside a module run on our ops: differentiable twice, in memory linear in the tokens of attention.

    Changed are
      - nn.GroupNorm and its subclasses, and F.group_norm in the code of a module; with the nn.SiLU or F.silu that directly follows in an
        nn.Sequential or in the code of the module that holds the norm, in one pass;
      - nn.MultiheadAttention, and modules whose own code or diffusers processor calls F.scaled_dot_product_attention;
      - nn.Conv2d of 1x1 and 3x3, which is faster on the CPU and torch's own elsewhere. Shapes at which ours is slower
        stay torch's, call by call;
      - the layout of images: weights of convolutions are laid out channels-last, and so are images that enter the model. What it returns
        lies as it would have. Code that calls `view` or `contiguous` on
        images meets versions of them that keep the layout.
    A subclass of a convolution, of nn.SiLU or of nn.MultiheadAttention may compute something else and is left alone. So are RMS norms,
    batch norms, and attention whose weights are formed in its code: plain torch, which can be differentiated twice. The latter keeps the
    layout it was written for.
    Who needs first gradients only gains little: on a CPU torch's own attention is then as fast.

    What our attention does not have (masks but the causal one, dropout, weights as an output, unequal shapes, autocast to another dtype)
    goes to torch's mathematical attention where gradients are wanted, call by call. The first such call of a module warns and names it.

    Hooks work as before: one on a group norm keeps it apart from its SiLU. Parametrizations may come before or after. Optimizers may be
    older: their state follows the layout of the weights at their next step. Calling this again is harmless, and finds layers that were
    added since.

    Args:
        module: Any module; it is changed in place. Its parameters may be on the meta device.
    Returns:
        What was changed and what was left alone; its `restore` undoes all of it.
    Differentiable: twice; further on the reference backend.
    """
    _restore(module)
    serial, root = next(_serials), type(module).__name__
    changed: list[Entry] = []
    skipped: list[Entry] = []
    modules = dict(module.named_modules())
    # Containers come last: they fuse group norms that are ours already.
    for decide in (_layer, _attention_module, _container):
        for name, part in modules.items():
            kind = type(part).__name__
            for replacement, note in decide(part):
                if replacement is not None:
                    _become(part, replacement, (serial, f"{root}.{name}" if name else root))
                (skipped if replacement is None else changed).append(Entry(name, kind, note))
    if any(isinstance(part, (Conv2d, GroupNorm)) for part in modules.values()) and _use_channels_last(module):
        changed.append(Entry("", root, "channels-last memory inside, weights included; results lie as they did"))
    return Report(module, tuple(changed), tuple(skipped))


class Accelerated(nn.Module):
    """A module that runs on our ops.

    Attributes:
        _original_class: What it was.
        _place: See `Place`.
        _original_processor: That of a diffusers Attention, where it was replaced as well.
        _relaid: Of a module whose inside is channels-last, the names of the parameters that were not.
    """

    _original_class: type[nn.Module]
    _place: Place = (-1, "a module made of an accelerated one")  # by slicing, or by `type(layer)(...)`
    _relaid: tuple[str, ...] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._relaid is None:
            return super().__call__(*args, **kwargs)
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if any(map(_is_channels_last, tensors)):
            return super().__call__(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, _as_channels_last, (args, kwargs))
        return tree_map_only(Tensor, _as_contiguous, super().__call__(*args, **kwargs))


def _own_class(module: nn.Module) -> type[nn.Module]:
    """The class, beneath the one that torch puts over it when a parameter of the module gets a parametrization."""
    return type(module).__bases__[0] if is_parametrized(module) else type(module)


def _set_own_class(module: nn.Module, kind: type[nn.Module]) -> None:
    if is_parametrized(module):
        over = type(module)
        kind = type(over.__name__, (kind,), {k: v for k, v in vars(over).items() if k not in ("__dict__", "__weakref__")})
    module.__class__ = kind


def _become(module: Any, replacement: type[nn.Module], place: Place) -> None:
    if _forms_weights(module):
        module._original_processor = module.processor
        module.processor = _diffusers_attention().AttnProcessor2_0()
    module._place = place
    _set_own_class(module, replacement)


def _restore(module: nn.Module) -> None:
    ours: list[Any] = [part for part in module.modules() if isinstance(part, Accelerated)]
    for part in ours:
        for name in part._relaid or ():
            _lay_out(part, name, torch.contiguous_format)
        _set_own_class(part, part._original_class)
        for attribute in ("_place", "_relaid"):
            vars(part).pop(attribute, None)
        if "_original_processor" in vars(part):
            if type(part.processor) is _diffusers_attention().AttnProcessor2_0:  # and nobody has set another since
                part.processor = part._original_processor
            del part._original_processor


@cache
def _subclass(original: type[nn.Module], forward: Callable[..., Any] | None) -> type[nn.Module]:
    """The class with another forward, or its own if that is None, under its own name.

    No module holds it, so instances are pickled as the pair it is made of.
    """

    def __reduce_ex__(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        return _blank, (original, forward), self.__getstate__()

    # The old forward is a member of its own, since diffusers marks Attention with torch._dynamo.allow_in_graph, and torch.compile does not
    # look up `original.forward` on a class so marked.
    members: dict[str, Any] = {} if forward is None else {"forward": forward, "_original_forward": staticmethod(original.forward)}
    members |= {"_original_class": original, "__reduce_ex__": __reduce_ex__}
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    return type(original.__name__, (Accelerated, original), members | names)


def _blank(original: type[nn.Module], forward: Callable[..., Any] | None) -> nn.Module:
    kind = _subclass(original, forward)
    return kind.__new__(kind)


@decided_once
def _say(serial: int, name: str, what: str) -> None:
    """Warn, once for each module and reason. torch.compile runs this once, while it traces."""
    _warn_once(serial, f"{name}: {what}")


@cache
def _warn_once(serial: int, message: str) -> None:
    warnings.warn(message, stacklevel=4)


# Channels-last memory


def _use_channels_last(module: Any) -> bool:
    """Whether the module holds convolutions whose weights are laid out now, and images will be."""
    convolutions = {name: part for name, part in module.named_modules() if isinstance(part, nn.Conv2d)}
    if not convolutions:
        return False
    if not isinstance(module, Accelerated):
        own = _own_class(module)
        _set_own_class(module, Sequential if own is nn.Sequential else _subclass(own, None))
    written_out = [part for part in module.modules() if _writes_attention_out(part)]
    theirs = {part for attention in written_out for part in attention.modules()}
    for part in written_out:
        _set_own_class(part, _subclass(_own_class(part), _written_out_forward))
    for part in convolutions.values():
        if _own_class(part) is nn.Conv2d and part.padding_mode == "zeros" and "forward" not in vars(part) and part not in theirs:
            _set_own_class(part, Conv2d)
    parameters = [f"{name}.{key}".lstrip(".") for name, part in convolutions.items() for key, _ in part.named_parameters(recurse=False)]
    module._relaid = tuple(name for name in parameters if _lay_out(module, name, torch.channels_last))
    _watch_optimizers()
    return True


def _writes_attention_out(module: nn.Module) -> bool:
    """Whether it makes tokens of images and forms the weights among them in its own code."""
    if isinstance(module, Accelerated) or "forward" in vars(module) or not _is_called_attention(module):
        return False
    convolves = any(isinstance(part, nn.Conv2d) for part in module.children())
    return convolves and bool({"softmax", "einsum"} & _names_in(_own_class(module), "forward"))


def _written_out_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """In the layout it was written for, where images are tokens without a copy; there are more channels inside than outside."""
    args, kwargs = tree_map_only(Tensor, _as_contiguous, (args, kwargs))
    return tree_map_only(Tensor, _as_channels_last, self._original_forward(self, *args, **kwargs))


def _lay_out(module: nn.Module, name: str, layout: torch.memory_format) -> bool:
    """Whether this parameter of four dimensions lay otherwise. It stays the same object, with its hooks."""
    parent, _, key = name.rpartition(".")
    p = module.get_submodule(parent)._parameters.get(key)  # gone, if a parametrization took its place
    if p is None or type(p.data) is not Tensor or p.dim() != 4 or p.is_contiguous(memory_format=layout):
        return False
    p.data = p.data.contiguous(memory_format=layout)
    if p.grad is not None:
        p.grad = p.grad.contiguous(memory_format=layout)
    return True


@cache
def _watch_optimizers() -> None:
    register_optimizer_step_pre_hook(_lay_out_state)


def _lay_out_state(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """What an optimizer keeps of a weight lies as the weight does: fused ones go through memory without a look at strides."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p] if p.dim() == 4 and p in optimizer.state else {}
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == p.shape and value.stride() != p.stride():
                    state[key] = torch.empty_like(p, dtype=value.dtype, requires_grad=False).copy_(value)


def _is_channels_last(x: Tensor) -> bool:
    if x.layout != torch.strided or x.is_nested or x.dim() != 4:
        return False
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _as_channels_last(x: Tensor) -> Tensor:
    image = x.layout == torch.strided and not x.is_nested and x.dim() == 4 and x.is_floating_point()
    return x.contiguous(memory_format=torch.channels_last) if image else x


def _as_contiguous(x: Tensor) -> Tensor:
    return x.contiguous() if _is_channels_last(x) else x


# Group norm, with the SiLU that follows


class GroupNorm(Accelerated, nn.GroupNorm):
    """nn.GroupNorm on `ops.group_norm_silu`."""

    _original_class = nn.GroupNorm

    def forward(self, input: Tensor) -> Tensor:
        norm = PendingNorm if _is_awaited(self) else _group_norm
        return norm(input, self.num_groups, self.weight, self.bias, self.eps)


def _norm_forward(self: Any, input: Tensor) -> Tensor:
    """Of a subclass of nn.GroupNorm."""
    with _OurFunctions(self._place, _is_awaited(self)):
        y = self._original_forward(self, input)
    return y if _is_awaited(self) else PendingNorm.settled(y)


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *, silu: bool = False
) -> Tensor:
    """F.group_norm, and with `silu` F.silu after it."""
    dtype = _result_dtype(input)
    x = input if dtype == input.dtype else input.float()
    return ops.group_norm_silu(x, num_groups, weight, bias, eps, silu=silu).to(dtype)


def _result_dtype(x: Tensor) -> torch.dtype:
    half = x.dtype in (torch.float16, torch.bfloat16)
    return _autocast_result(x.device.type, x.dtype) if half and _autocast_dtype(x) else x.dtype


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast casts to; None where it is off, or not known."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if not x.is_meta and torch.is_autocast_enabled(kind) else None


@cache
def _autocast_result(device: str, dtype: torch.dtype) -> torch.dtype:
    """What torch's group norm makes of this dtype under autocast, which differs from device to device."""
    with torch.autocast(device, torch.get_autocast_dtype(device)):
        return F.group_norm(torch.zeros(1, 1, 2, device=device, dtype=dtype), 1).dtype


class PendingNorm(Tensor):
    """A group norm that waits for a SiLU: if that is what comes, both are one pass. All else gets the norm's result."""

    _value: Tensor | None
    _norm: Callable[..., Tensor]
    _dtype: torch.dtype

    @staticmethod
    def __new__(cls, input: Tensor, *args: Any, **kwargs: Any) -> Self:
        dtype = _result_dtype(input)
        pending = Tensor._make_wrapper_subclass(cls, input.shape, strides=input.stride(), dtype=dtype, device=input.device)
        pending._value, pending._norm, pending._dtype = None, partial(_group_norm, input, *args, **kwargs), dtype
        return pending

    @staticmethod
    def settled(value: Any) -> Any:
        """The norm's own result; anything else as it is."""
        if not isinstance(value, PendingNorm):
            return value
        if value._value is None:
            value._value = value._norm()
        return value._value

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        norm = args[0] if args else None
        if isinstance(norm, cls) and norm._value is None:
            if func is F.silu:
                y = norm._norm(silu=True)
                if kwargs.get("inplace"):
                    norm._value = y
                return y
            if func in (Tensor.to, Tensor.type) and len(args) == 2 and args[1] is norm._dtype and not kwargs:
                return norm  # a cast to the dtype that it has
        args, kwargs = tree_map_only(cls, cls.settled, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # pyrefly: ignore[bad-override]
        raise TypeError(f"{func}: met a PendingNorm of sami_fast.accelerate, which torch's Python functions know and C++ ones do not")


def _is_awaited(norm: nn.Module) -> bool:
    """Whether the code around a norm is one in which a SiLU may follow, and nobody looks in between."""
    mode = None if torch.compiler.is_compiling() else _get_current_function_mode()
    return isinstance(mode, _OurFunctions) and mode.awaits_silu and not _is_hooked(norm)


def _is_hooked(module: nn.Module) -> bool:
    own = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(own) or bool(_has_any_global_hook())


class Sequential(Accelerated, nn.Sequential):
    """nn.Sequential that runs a group norm and a SiLU after it in one pass. Its layers, called one by one, are what they were."""

    _original_class = nn.Sequential

    def __getitem__(self, idx: Any) -> Any:
        part: Any = super().__getitem__(idx)
        if isinstance(idx, slice):
            part._relaid = ()  # a model by itself: what it returns lies as it would have
        return part

    def forward(self, input: Tensor) -> Tensor:
        layers = [*self]
        for layer, following in zip(layers, [*layers[1:], None], strict=True):
            ours = isinstance(layer, nn.GroupNorm) and isinstance(layer, Accelerated)
            if ours and type(following) is nn.SiLU and not _is_hooked(following):
                with _OurFunctions(self._place, awaits_silu=not torch.compiler.is_compiling()):
                    input = layer(input)
            else:
                input = layer(input)
        return input


def _fusing_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    # A backward hook wraps what goes into its module, in C++.
    awaits_silu = not torch.compiler.is_compiling() and not any(m._backward_hooks or m._backward_pre_hooks for m in self.modules())
    with _OurFunctions(self._place, awaits_silu):
        return tree_map_only(PendingNorm, PendingNorm.settled, self._original_forward(self, *args, **kwargs))


# Convolution


class Conv2d(Accelerated, nn.Conv2d):
    """nn.Conv2d on `ops.conv2d`, in channels-last memory: what comes otherwise, as out of a reshape, would spread to all that follows."""

    _original_class = nn.Conv2d

    def forward(self, input: Tensor) -> Tensor:
        x = _as_channels_last(input)
        if self.padding_mode != "zeros":
            return super().forward(x)
        return ops.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def _is_ours(conv: nn.Conv2d) -> bool:
    settings = conv.stride, conv.padding, conv.dilation, conv.groups
    return conv.padding_mode == "zeros" and takes(conv.kernel_size, *settings)


# Attention


def _refusal(q: Tensor, k: Tensor, v: Tensor, masked: bool, dropout_p: float, is_causal: bool) -> str | None:
    """Why `ops.attention` does not take this call of F.scaled_dot_product_attention; None when it does."""
    if q.is_nested or k.is_nested or v.is_nested:
        return "nested tensors"
    if masked:
        return "a mask other than is_causal"
    if dropout_p > 0:
        return "dropout of attention weights"
    if q.dim() not in (3, 4) or k.shape != v.shape or q.shape[:-2] != k.shape[:-2] or q.shape[-1] != k.shape[-1] or k.shape[-2] == 0:
        return "shapes other than q [B, N, S_q, D] and k, v [B, N, S_k, D], or the same without N"
    if is_causal and q.shape[-2] != k.shape[-2]:
        return "is_causal with another number of queries than keys"
    if (dtype := _autocast_dtype(q)) is not None and not q.dtype == k.dtype == v.dtype == dtype:
        return "autocast to another dtype than that of queries, keys and values"
    return None


def _instead(reason: str) -> str:
    return f"attention is torch's, whose memory grows with the square of the tokens: ours does not take {reason}"


def _twice_differentiable(query: Tensor) -> AbstractContextManager[Any]:
    """Of torch's ways to compute attention only the mathematical one has a second derivative. It takes no nested tensors.

    Without gradients torch may choose.
    """
    return sdpa_kernel(SDPBackend.MATH) if torch.is_grad_enabled() and not query.is_nested else nullcontext()


def _attention(
    place: Place,
    query: Tensor,  # [B, N, S_q, D] or [B, S_q, D]
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """F.scaled_dot_product_attention: ours where it takes the arguments, else torch's."""
    reason = _refusal(query, key, value, attn_mask is not None, dropout_p, is_causal)
    if reason is not None:
        _say(*place, _instead(reason))
        with _twice_differentiable(query):
            return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    heads = query.dim() == 4
    q, k, v = (t.transpose(1, 2) if heads else t.unsqueeze(2) for t in (query, key, value))
    out = ops.attention(q, k, v, scale=scale, causal=is_causal)
    return out.transpose(1, 2) if heads else out.squeeze(2)


class _OurFunctions(TorchFunctionMode):
    """Inside the `with` block F.scaled_dot_product_attention and F.group_norm are ours, and images stay channels-last.

    That is, `contiguous` leaves them so, and `view` can do what `reshape` can.
    """

    def __init__(self, place: Place, awaits_silu: bool = False) -> None:
        super().__init__()
        self.place, self.awaits_silu = place, awaits_silu

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(self.place, *args, **kwargs)
        if func is F.group_norm:
            return PendingNorm(*args, **kwargs) if self.awaits_silu else _group_norm(*args, **kwargs)
        if func is Tensor.view and _is_channels_last(args[0]) and not isinstance(args[-1], torch.dtype) and not kwargs:
            return args[0].reshape(*args[1:])
        if func is Tensor.contiguous and len(args) == 1 and not kwargs and _is_channels_last(args[0]):
            return args[0]
        if torch.compiler.is_compiling() and getattr(Tensor, func.__name__, None) is func:
            return getattr(args[0], func.__name__)(*args[1:], **kwargs)  # the compiler knows methods of tensors only as such
        return func(*args, **kwargs)


def _calling_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    with _OurFunctions(self._place):
        return self._original_forward(self, *args, **kwargs)


class MultiheadAttention(Accelerated, nn.MultiheadAttention):
    """nn.MultiheadAttention on `ops.attention`."""

    _original_class = nn.MultiheadAttention

    def forward(
        self,
        query: Tensor,  # [S, E], or [B, S, E] with batch_first, or [S, B, E]
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        # As in torch, is_causal then stands for attn_mask, which is not looked at.
        causal = is_causal and attn_mask is not None and key_padding_mask is None and not need_weights
        reason = None
        if need_weights:
            reason = "need_weights=True, the default of nn.MultiheadAttention"
        elif self.bias_k is not None or self.add_zero_attn:
            reason = "add_bias_kv and add_zero_attn"
        elif query.is_nested or key.is_nested or value.is_nested:
            reason = "nested tensors"
        elif key_padding_mask is not None or ((is_causal or attn_mask is not None) and not causal):
            reason = "a mask other than is_causal"
        if reason is None:
            return self._attend(query, key, value, causal), None
        _say(*self._place, _instead(reason))
        with _twice_differentiable(query):
            return super().forward(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
        packed = self.in_proj_weight is not None
        if packed and query is key and key is value:
            projected = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            weights = self.in_proj_weight.chunk(3) if packed else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            projected = [F.linear(*one) for one in zip((query, key, value), weights, biases, strict=True)]
        torchs = "S (N D)" if query.dim() == 2 else "B S (N D)" if self.batch_first else "S B (N D)"
        ours = "1 N S D" if query.dim() == 2 else "B N S D"
        q, k, v = (rearrange(t, f"{torchs} -> {ours}", N=self.num_heads) for t in projected)
        out = _attention(self._place, q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=causal)
        return F.linear(rearrange(out, f"{ours} -> {torchs}"), self.out_proj.weight, self.out_proj.bias)


# Which module becomes what: each function decides on the modules that it is about, and says nothing of others.


def _layer(module: nn.Module) -> Iterator[Decision]:
    kind = next((kind for kind in KINDS if isinstance(module, kind)), None)
    if kind is None:
        return
    own = _own_class(module)
    if own.__module__.startswith("sami_fast."):
        yield None, "runs on our ops by itself"
    elif "forward" in vars(module):
        yield None, REPLACED
    elif own is not kind:
        if kind is nn.GroupNorm:
            yield _subclass(own, _norm_forward), "ops.group_norm_silu for the F.group_norm in its code"
        else:
            yield None, f"a subclass of nn.{kind.__name__}, which may compute something else"
    elif kind is nn.SiLU:
        yield None, "torch's, which can be differentiated twice; a pass that it shares with a group norm is listed with their container"
    elif kind is nn.GroupNorm:
        yield GroupNorm, "ops.group_norm_silu"
    elif kind is nn.MultiheadAttention:
        yield MultiheadAttention, "ops.attention"
    elif isinstance(module, nn.Conv2d) and _is_ours(module):
        yield Conv2d, "ops.conv2d"
    else:
        yield (
            None,
            "ours differs from torch's only for 1x1 and 3x3 with strides, and with zeros around, alike in both directions, and one group",
        )


def _attention_module(module: nn.Module) -> Iterator[Decision]:
    if isinstance(module, (*KINDS, Accelerated)):
        return
    processor = getattr(module, "processor", None)
    forms_weights = _forms_weights(module)
    if forms_weights or SDPA & (_names_in(_own_class(module)) | _names_in(type(processor))):
        if "forward" in vars(module):
            yield None, REPLACED
        else:
            how = "AttnProcessor2_0, which stands in for AttnProcessor" if forms_weights else "F.scaled_dot_product_attention"
            yield _subclass(_own_class(module), _calling_forward), f"ops.attention for {how}"
    elif _is_called_attention(module) and not any(_is_called_attention(part) for part in module.modules() if part is not module):
        where = "its class" if processor is None else f"its processor {type(processor).__name__}"
        yield None, f"no F.scaled_dot_product_attention in the code of {where}: what forms its weights can be differentiated twice"
    elif re.search("RMS_?Norm", type(module).__name__, re.IGNORECASE):
        yield None, "an RMS norm, of which we have no op: torch's can be differentiated twice"


def _container(module: nn.Module) -> Iterator[Decision]:
    if isinstance(module, (*KINDS, Accelerated)):
        return
    own, children = _own_class(module), [*module.named_children()]
    norms = [name for name, part in children if isinstance(part, nn.GroupNorm) and isinstance(part, Accelerated)]
    acts = [name for name, part in children if type(part) is nn.SiLU]
    if "forward" in vars(module):
        if norms and acts:
            yield None, f"{', '.join(norms)} and {', '.join(acts)} stay two passes: {REPLACED}"
    elif own is nn.Sequential:
        together = [f"{name} + {act}" for (name, _), (act, _) in pairwise(children) if name in norms and act in acts]
        if together:
            yield Sequential, f"one pass for {', '.join(together)}"
    elif own not in CONTAINERS:
        called = _names_in(own, "forward")
        if (norms and (acts or "silu" in called)) or {"group_norm", "silu"} <= called:
            yield _subclass(own, _fusing_forward), f"one pass for {', '.join(norms) or 'F.group_norm'} where a SiLU follows"
        elif "group_norm" in called:
            yield _subclass(own, _calling_forward), "ops.group_norm_silu for the F.group_norm in its code"
        elif called & {"view", "contiguous"}:
            yield _subclass(own, _calling_forward), "`view` and `contiguous` that leave images channels-last"


def _is_called_attention(module: nn.Module) -> bool:
    return re.search("attention|attn", type(module).__name__, re.IGNORECASE) is not None


@cache
def _names_in(kind: type, start: str | None = None) -> set[str]:
    """The names in the methods of a class, or in the one method and those it calls; and in functions of the same file that they call."""
    members = {name: member for base in reversed(kind.__mro__) if base not in (nn.Module, object) for name, member in vars(base).items()}
    waiting = [*members.values()] if start is None else [members.get(start)]
    found, seen = set(), set()
    while waiting:
        function = unwrap(waiting.pop())
        if not isfunction(function) or function in seen:
            continue
        seen.add(function)
        names = set(_names(function.__code__))
        found |= names
        known = function.__globals__
        waiting += [known[name] for name in names & known.keys() if getattr(known[name], "__module__", None) == function.__module__]
        waiting += [members[name] for name in names & members.keys()]
    return found


def _names(code: CodeType) -> Iterator[str]:
    """The names that a function's code refers to, and those of the functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _diffusers_attention() -> ModuleType:
    """Where diffusers keeps its Attention; an empty module where nobody has imported it."""
    name = "diffusers.models.attention_processor"
    return sys.modules.get(name, ModuleType(name))


def _forms_weights(module: Any) -> bool:
    """A diffusers Attention whose processor forms the weights, and for which AttnProcessor2_0 computes the same.

    `upcast_attention` and `upcast_softmax` ask for sums in float32, which ours has anyway.
    """
    home = _diffusers_attention()
    attention: Any = getattr(home, "Attention", None)
    return (
        type(module) is attention
        and type(module.processor) is home.AttnProcessor
        and module.scale == (module.inner_dim // module.heads) ** -0.5
        and module.norm_q is module.norm_k is None
    )
