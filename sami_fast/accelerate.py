"""Our ops inside a model that somebody else wrote: group norm with SiLU, attention, and the 3x3 convolution.

report = sami_fast.accelerate(model)      # in place; parameters, their names and the numbers stay
print(report)                             # what runs on our ops now, and what does not, and why
report.restore()                          # every layer is what it was

A layer becomes ours by its `__class__`, which is set to a subclass with another forward. So parameters, buffers, hooks, the keys of
state dicts and whatever an optimizer holds are the same objects before and after. The subclass has the name of the class it replaces, which
model formats write down.
"""

import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from inspect import isfunction, unwrap
from itertools import count, pairwise
from types import CodeType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import TorchFunctionMode

from . import ops
from .ops.conv2d import MIN_CHANNELS

# Blocks of diffusers in whose forward a group norm is followed by a SiLU and nothing lies between, by the attributes that hold the two.
FUSED = {
    "diffusers.models.resnet.ResnetBlock2D": (("norm1", "nonlinearity"), ("norm2", "nonlinearity")),
    "diffusers.models.unets.unet_2d.UNet2DModel": (("conv_norm_out", "conv_act"),),
    "diffusers.models.unets.unet_2d_condition.UNet2DConditionModel": (("conv_norm_out", "conv_act"),),
}
SDPA = {"scaled_dot_product_attention", "dispatch_attention_fn"}  # torch's, and the function of diffusers that calls it
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
        changed: Modules that run on our ops now, and containers that run two of their layers in one pass.
        skipped: Group norms, SiLUs, convolutions and attention modules that do not, and pairs that stay two passes.
    """

    module: nn.Module
    changed: tuple[Entry, ...]
    skipped: tuple[Entry, ...]

    def restore(self) -> None:
        """Every module inside the model is of its own class again. Parameters keep the values they have now.

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
      - nn.GroupNorm, and with it an nn.SiLU that directly follows in an nn.Sequential or a known block of diffusers;
      - nn.MultiheadAttention, and modules whose own code or diffusers processor calls F.scaled_dot_product_attention;
      - nn.Conv2d of 3x3 with stride 1 and padding 1, which is faster on the CPU and torch's own elsewhere.
    Modules of these very classes, that is: a subclass may compute something else and is left alone. So is every SiLU by itself.
    Who needs first gradients only gains little: on a CPU torch's own attention is then as fast.

    What our attention does not have (masks but the causal one, dropout, weights as an output, unequal shapes, autocast to another dtype)
    goes to torch's mathematical attention where gradients are wanted, call by call. The first such call of a module warns and names it.

    Hooks work as before: one on a group norm or on its SiLU keeps the two apart. A result lies in memory as torch's would. Calling this
    again is harmless, and finds layers that were added since.

    Args:
        module: Any module; it is changed in place.
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
    return Report(module, tuple(changed), tuple(skipped))


class Accelerated(nn.Module):
    """A module that runs on our ops.

    Attributes:
        _original_class: What it was.
        _place: See `Place`.
        _original_processor: That of a diffusers Attention, where it was replaced as well.
    """

    _original_class: type[nn.Module]
    _place: Place


def _become(module: Any, replacement: type[nn.Module], place: Place) -> None:
    if _forms_weights(module):
        module._original_processor = module.processor
        module.processor = _diffusers_attention().AttnProcessor2_0()
    module._place = place
    module.__class__ = replacement


def _restore(module: nn.Module) -> None:
    ours: list[Any] = [part for part in module.modules() if isinstance(part, Accelerated)]
    for part in ours:
        part.__class__ = part._original_class
        del part._place
        if "_original_processor" in vars(part):
            if type(part.processor) is _diffusers_attention().AttnProcessor2_0:  # and nobody has set another since
                part.processor = part._original_processor
            del part._original_processor


@cache
def _subclass(original: type[nn.Module], forward: Callable[..., Any]) -> type[nn.Module]:
    """The class with another forward, under its own name. No module holds it, so instances are pickled as the pair it is made of."""

    def __reduce_ex__(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        return _blank, (original, forward), self.__getstate__()

    # The old forward is a member of its own, since diffusers marks Attention with torch._dynamo.allow_in_graph, and torch.compile does not
    # look up `original.forward` on a class so marked.
    members = {"forward": forward, "_original_forward": staticmethod(original.forward)}
    members |= {"_original_class": original, "__reduce_ex__": __reduce_ex__}
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    return type(original.__name__, (Accelerated, original), members | names)


def _blank(original: type[nn.Module], forward: Callable[..., Any]) -> nn.Module:
    kind = _subclass(original, forward)
    return kind.__new__(kind)


@torch.compiler.assume_constant_result
def _say(serial: int, name: str, what: str) -> None:
    """Warn, once for each module and reason. torch.compile runs this once, while it traces."""
    _warn_once(serial, f"{name}: {what}")


@cache
def _warn_once(serial: int, message: str) -> None:
    warnings.warn(message, stacklevel=4)


# Group norm, with the SiLU that follows


class GroupNorm(Accelerated, nn.GroupNorm):
    """nn.GroupNorm on `ops.group_norm_silu`."""

    _original_class = nn.GroupNorm

    def forward(self, input: Tensor) -> Tensor:
        return _group_norm(self, input, silu=False)


def _group_norm(norm: GroupNorm, x: Tensor, silu: bool) -> Tensor:
    if torch.is_autocast_enabled(x.device.type) and x.dtype in (torch.float16, torch.bfloat16):
        y = ops.group_norm_silu(x.float(), norm.weight, norm.bias, norm.num_groups, norm_eps=norm.eps, silu=silu)
        return y.to(_autocast_result(x.device.type, x.dtype))
    return ops.group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm_eps=norm.eps, silu=silu)


@cache
def _autocast_result(device: str, dtype: torch.dtype) -> torch.dtype:
    """What torch's group norm makes of this dtype under autocast, which differs from device to device."""
    with torch.autocast(device, torch.get_autocast_dtype(device)):
        return F.group_norm(torch.zeros(1, 1, 2, device=device, dtype=dtype), 1).dtype


def _why_apart(norm: nn.Module, act: nn.Module) -> str | None:
    """Why a group norm and the module after it cannot run in one pass now; None when they can."""
    if type(norm) is not GroupNorm:
        return "the norm is not ours"
    if type(act) is not nn.SiLU or "forward" in vars(act):
        return "what follows is no plain nn.SiLU"
    hooked = any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in (norm, act))
    if hooked or _has_any_global_hook():
        return "a hook sees what lies between"
    return None


class Sequential(Accelerated, nn.Sequential):
    """nn.Sequential that runs a group norm and a SiLU after it in one pass. Its layers, called one by one, are what they were."""

    _original_class = nn.Sequential

    def forward(self, input: Tensor) -> Tensor:
        waiting = [*self]
        while waiting:
            layer = waiting.pop(0)
            if waiting and isinstance(layer, GroupNorm) and _why_apart(layer, waiting[0]) is None:
                input = _group_norm(layer, input, silu=True)
                waiting.pop(0)  # the SiLU is done
            else:
                input = layer(input)
        return input


class GroupNormAwaitingSiLU:
    """What a group norm gives to the SiLU that follows. It is no tensor: whatever else meets it raises an error with this name."""

    def __init__(self, norm: GroupNorm, x: Tensor) -> None:
        self.norm = norm
        self.x = x


def _act(act: nn.SiLU, x: Tensor | GroupNormAwaitingSiLU) -> Tensor:
    return _group_norm(x.norm, x.x, silu=True) if isinstance(x, GroupNormAwaitingSiLU) else act(x)


class _Stage:
    """A block as its own forward sees it: its group norms leave the work to the SiLU after them, all else is the block.

    The layers themselves stay as they are for others who call them, and the SiLU does for other values: ResnetBlock2D has a single one for
    its norms and its time embedding.
    """

    def __init__(self, block: nn.Module, pairs: list[tuple[str, str]]) -> None:
        self._block = block
        self._norms = [norm for norm, _ in pairs]
        self._acts = [act for _, act in pairs]

    def __getattr__(self, name: str) -> Any:
        part = getattr(self._block, name)
        if name in self._norms:
            return partial(GroupNormAwaitingSiLU, part)
        return partial(_act, part) if name in self._acts else part


def _fusing_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    pairs = [pair for pair in _pairs(self) if _why_two_passes(self, *pair) is None]
    return self._original_forward(_Stage(self, pairs) if pairs else self, *args, **kwargs)


def _pairs(block: nn.Module) -> Iterable[tuple[str, str]]:
    """The names of a group norm and of the activation after it, in an nn.Sequential or a known block."""
    kind = block._original_class if isinstance(block, Accelerated) else type(block)
    if kind is nn.Sequential:
        children = pairwise(block._modules.items())
        return [(n, a) for (n, norm), (a, act) in children if isinstance(norm, nn.GroupNorm) and isinstance(act, nn.SiLU)]
    pairs = FUSED.get(f"{kind.__module__}.{kind.__qualname__}", ())
    return [pair for pair in pairs if isinstance(getattr(block, pair[0], None), nn.GroupNorm)]


def _why_two_passes(block: nn.Module, norm: str, act: str) -> str | None:
    if norm == "norm2" and getattr(block, "time_embedding_norm", None) == "scale_shift":
        return "the time embedding scales and shifts what lies between"
    return _why_apart(getattr(block, norm), getattr(block, act))


# Convolution


class Conv2d(Accelerated, nn.Conv2d):
    """nn.Conv2d on `ops.conv2d`."""

    _original_class = nn.Conv2d

    def forward(self, input: Tensor) -> Tensor:
        y = ops.conv2d(input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        # Laid out as torch's result is, for those who view it in another shape.
        return y if _is_channels_last(input) or _is_channels_last(self.weight) else y.contiguous()


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _is_winograd(conv: nn.Conv2d) -> bool:
    settings = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode
    return settings == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros") and conv.in_channels >= MIN_CHANNELS


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
    if torch.is_autocast_enabled(q.device.type) and not q.dtype == k.dtype == v.dtype == torch.get_autocast_dtype(q.device.type):
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


class _OurAttention(TorchFunctionMode):
    """Inside the `with` block F.scaled_dot_product_attention is `_attention`."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(self.place, *args, **kwargs)
        if torch.compiler.is_compiling() and getattr(Tensor, func.__name__, None) is func:
            return getattr(args[0], func.__name__)(*args[1:], **kwargs)  # the compiler knows methods of tensors only as such
        return func(*args, **kwargs)


def _attending_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    with _OurAttention(self._place):
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
    if type(module).__module__.startswith("sami_fast."):
        yield None, "runs on our ops by itself"
    elif type(module) is not kind:
        yield None, f"a subclass of nn.{kind.__name__}, which may compute something else"
    elif "forward" in vars(module):
        yield None, REPLACED
    elif kind is nn.SiLU:
        yield None, "torch's, which can be differentiated twice; a pass that it shares with a group norm is listed with their container"
    elif kind is nn.GroupNorm:
        yield (GroupNorm, "ops.group_norm_silu") if module.affine else (None, "ours has a weight and a bias, this one has neither")
    elif kind is nn.MultiheadAttention:
        yield MultiheadAttention, "ops.attention"
    elif isinstance(module, nn.Conv2d) and _is_winograd(module):
        yield Conv2d, "ops.conv2d"
    else:
        yield None, f"ours differs from torch's only for 3x3, stride 1, padding 1 of zeros, one group, {MIN_CHANNELS} channels or more"


def _attention_module(module: nn.Module) -> Iterator[Decision]:
    if isinstance(module, (*KINDS, Accelerated)):
        return
    processor = getattr(module, "processor", None)
    forms_weights = _forms_weights(module)
    if forms_weights or _calls_sdpa(type(module)) or _calls_sdpa(type(processor)):
        if "forward" in vars(module):
            yield None, REPLACED
        else:
            how = "AttnProcessor2_0, which stands in for AttnProcessor" if forms_weights else "F.scaled_dot_product_attention"
            yield _subclass(type(module), _attending_forward), f"ops.attention for {how}"
    elif _is_called_attention(module) and not any(_is_called_attention(part) for part in module.modules() if part is not module):
        where = "its class" if processor is None else f"its processor {type(processor).__name__}"
        yield None, f"no F.scaled_dot_product_attention in the code of {where}"


def _container(module: nn.Module) -> Iterator[Decision]:
    if isinstance(module, Accelerated):
        return
    together = []
    for norm, act in _pairs(module):
        reason = REPLACED if "forward" in vars(module) else _why_two_passes(module, norm, act)
        if reason is None:
            together.append(f"{norm} + {act}")
        else:
            yield None, f"{norm} + {act} stay two passes: {reason}"
    if together:
        replacement = Sequential if type(module) is nn.Sequential else _subclass(type(module), _fusing_forward)
        yield replacement, f"one pass for {', '.join(together)}"


def _is_called_attention(module: nn.Module) -> bool:
    return re.search("attention|attn", type(module).__name__, re.IGNORECASE) is not None


@cache
def _calls_sdpa(kind: type) -> bool:
    """Whether a method of the class, or a function of the same file that it calls, names F.scaled_dot_product_attention."""
    waiting = [member for base in kind.__mro__ if base not in (nn.Module, object) for member in vars(base).values()]
    seen = set()
    while waiting:
        function = unwrap(waiting.pop())
        if not isfunction(function) or function in seen:
            continue
        seen.add(function)
        names = set(_names(function.__code__))
        if names & SDPA:
            return True
        known = function.__globals__
        waiting += [known[name] for name in names & known.keys() if getattr(known[name], "__module__", None) == function.__module__]
    return False


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
