"""Convolution on the CPU as the networks need it: channels-last memory, 3x3 kernels by Winograd's algorithm, others as one product.

`sami_fast::conv2d` -> `conv2d_bwd_input`, `conv2d_bwd_weight`: each is linear in both of its tensors and has the others for derivatives,
so it can be differentiated to any order.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.utils import _pair
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from ..reference.conv2d import channels_last, conv2d_bwd_input, conv2d_bwd_weight, conv2d_fwd
from .backend import choose
from .define import asked_for, define
from .launchers import Launcher, Launchers

# Kernels that the core is faster with than torch; from how many channels on, of images or results; and how many results for each channel
# make up for rearranging the weights, where they come in order and where strides lie between. Measured in channels-last on one thread of
# AVX-512, all three products of a convolution together.
SIZES, FEWEST_CHANNELS, RESULTS_PER_CHANNEL, STRIDED_RESULTS_PER_CHANNEL = (1, 3), 8, 1 / 2, 4
WIDE = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")  # with narrower registers only Winograd's algorithm is faster
Pair = tuple[int, ...]  # two numbers; not tuple[int, int], for the settings of nn.Conv2d are not typed so


class ConvolutionLaunchers(Launchers):
    op = "conv2d"
    backends = ("reference", "cpp")  # on a GPU a convolution is torch's
    fwd = Launcher(conv2d_fwd)
    bwd_input = Launcher(conv2d_bwd_input)
    bwd_weight = Launcher(conv2d_bwd_weight)


def conv2d(
    x: Tensor,  # [B, C, H, W]
    weight: Tensor,  # [O, C / groups, h, w]
    bias: Tensor | None = None,  # [O]
    stride: int | Pair = 1,
    padding: int | Pair | str = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    *,
    backend: str | None = None,
) -> Tensor:  # [B, O, H', W']
    """`torch.nn.functional.conv2d`, whose result lies in channels-last memory on the compiled core; on a GPU where x or weight does.

    There a float32 convolution of 3x3 with stride 1 and padding 1 is Winograd's F(4x4, 3x3), 36 multiplications where there were 144, or
    on small images F(2x2, 3x3), 16 where there were 36. One convolution has rounding errors of 1e-6 to 5e-6 of the largest value
    (torch: 5e-7, in weights 9e-6); all gradients of a training step have no larger ones than with torch. It overflows from a hundredth of
    float32's range on, and an infinite or NaN pixel makes its neighbours NaN. One of 1x1, or of 3x3 with other strides or padding,
    is one matrix product. Everything else is torch's own.

    Args:
        As torch's.
        backend: See `sami_fast.use_backend`.
    Raises:
        What torch raises.
        BackendError: the backend cannot run this call.
    Differentiable: twice and further, in x, weight and bias.
    Runs on: C++, reference (which is torch, on any device).
    Source: Lavin & Gray, arXiv:1509.09308.
    """
    stride, dilation, padding = _two(stride), _two(dilation), padding if isinstance(padding, str) else _two(padding)
    if not _on_core(x, backend):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if _is_ours(x, weight, stride, padding, dilation, groups):
        return _conv2d(x, weight, bias, stride[0], padding[0], "cpp")
    return F.conv2d(channels_last(x), weight, bias, stride, padding, dilation, groups)


def conv2d_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    mask: Sequence[bool],
    *,
    backend: str | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of `conv2d` in x, weight and bias, those that the mask asks for: for callers that schedule the derivatives themselves."""
    stride, padding, dilation = _two(stride), _two(padding), _two(dilation)
    if not _on_core(x, backend) or not _is_ours(x, weight, stride, padding, dilation, groups):
        settings = (stride, padding, dilation, False, (0, 0), groups)
        return torch.ops.aten.convolution_backward(grad_y, x, weight, weight.shape[:1], *settings, mask)
    expected = [x.shape[0], weight.shape[0], *_results(x, weight, stride, padding)]
    if list(grad_y.shape) != expected:
        raise ValueError(f"grad_y: expected {expected}, found {list(grad_y.shape)}")
    to_input, to_weight, to_bias = mask
    steps, size = (stride[0], padding[0]), weight.shape[2]
    grad_x = _conv2d_bwd_input(grad_y, weight, *steps, *x.shape[2:], "cpp") if to_input else None
    grad_weight, grad_bias = _conv2d_bwd_weight(grad_y, x, to_bias, *steps, size, "cpp") if to_weight or to_bias else (None, None)
    return grad_x, grad_weight if to_weight else None, grad_bias if to_bias else None


def _two(value: int | Pair) -> Pair:
    """A setting of both sides, which torch takes as one number, alone or in a sequence, or as two."""
    pair = _pair(value)
    return pair * 2 if len(pair) == 1 else pair


def laid_out(x: Tensor) -> Tensor:
    """x as `conv2d` reads it, in channels-last memory on the compiled core: for callers that keep it for a derivative."""
    return channels_last(x) if x.stride(1) != 1 and _on_core(x, None) else x


def _on_core(x: Tensor, backend: str | None) -> bool:
    if backend is None and (x.device.type != "cpu" or not x.dtype.is_floating_point):
        return False
    chosen = choose("conv2d", backend, x)  # not the launchers' own choice: a backend without convolutions leaves them to torch
    return chosen == "cpp" and x.dim() == 4 and x.layout == torch.strided and not torch.is_autocast_enabled("cpu")


def for_convolutions(x: Tensor) -> Tensor:
    """Images as a network's convolutions want them: on a GPU channels-last, elsewhere as they are. [B, C, H, W].

    There cuDNN makes each result in the layout of the image and the weight that it is given, channels-last if either is, and the ops
    between convolutions keep it: one copy at a network's door does for all of it, and tensor cores ask for no other layout.
    """
    # By the backend in force too, so that a step can be traced for a GPU where there is none.
    wanted = x.dim() == 4 and x.stride(1) != 1 and x.dtype != torch.float64
    return channels_last(x) if wanted and (x.is_cuda or choose("conv2d", None, x) == "triton") else x


def with_gradient_laid_out(y: Tensor) -> Tensor:
    """y, whose gradient will lie as `for_convolutions` has it: flattened features send theirs back as in files, torch's activations pass
    on what they are sent, and the convolution before them would copy it."""
    if y.requires_grad and y.dim() == 4 and y.stride(1) == 1:
        y.register_hook(for_convolutions)
    return y


def _is_ours(x: Tensor, weight: Tensor, stride: Pair, padding: Pair | str, dilation: Pair, groups: int) -> bool:
    if not (x.dtype == weight.dtype == torch.float32 and x.numel() > 0 and weight.dim() == 4 and x.shape[1] == weight.shape[1]):
        return False
    if isinstance(padding, str) or not takes(tuple(weight.shape[2:]), stride, padding, dilation, groups):
        return False
    if max(weight.shape[:2]) < FEWEST_CHANNELS:
        return False
    height, width = _results(x, weight, stride, padding)
    fewest = RESULTS_PER_CHANNEL if stride == (1, 1) else STRIDED_RESULTS_PER_CHANNEL
    return min(height, width) > 0 and x.shape[0] * height * width >= fewest * max(weight.shape[:2])


def takes(size: Pair, stride: Pair, padding: Pair | str, dilation: Pair, groups: int) -> bool:
    """Whether the compiled core has a convolution with these settings."""
    return (
        not isinstance(padding, str)
        and size[0] == size[1] in SIZES
        and stride[0] == stride[1] >= 1
        and 0 <= padding[0] == padding[1] < size[0]
        and dilation == (1, 1)
        and groups == 1
        and (WIDE or (size[0], stride[0], padding[0]) == (3, 1, 1))
    )


def _results(x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> tuple[int, ...]:
    return tuple((side + 2 * p - size) // s + 1 for side, size, s, p in zip(x.shape[2:], weight.shape[2:], stride, padding, strict=True))


def _save(ctx, inputs, output):
    tensors, ctx.settings = [a for a in inputs if isinstance(a, Tensor)], [a for a in inputs if not isinstance(a, Tensor | None)]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _fwd_formula(ctx, grad_y):
    if grad_y is None:
        return (None,) * 6
    x, weight, *_ = ctx.saved_tensors
    stride, padding, backend = ctx.settings
    to_x, to_weight, to_bias, *_ = asked_for(ctx)
    grad_x = _conv2d_bwd_input(grad_y, weight, stride, padding, *x.shape[2:], backend) if to_x else None
    grad_weight = grad_bias = None
    if to_weight or to_bias:
        grad_weight, grad_bias = _conv2d_bwd_weight(grad_y, x, to_bias, stride, padding, weight.shape[2], backend)
    return grad_x, grad_weight, grad_bias if to_bias else None, None, None, None


def _bwd_input_formula(ctx, ggx):
    if ggx is None:
        return (None,) * 7
    grad_y, weight = ctx.saved_tensors
    stride, padding, *_, backend = ctx.settings
    to_grad_y, to_weight, *_ = asked_for(ctx)
    v_grad_y = _conv2d(ggx, weight, None, stride, padding, backend) if to_grad_y else None
    v_weight = _conv2d_bwd_weight(grad_y, ggx, False, stride, padding, weight.shape[2], backend)[0] if to_weight else None
    return v_grad_y, v_weight, None, None, None, None, None


def _bwd_weight_formula(ctx, ggweight, ggbias):
    grad_y, x = ctx.saved_tensors
    _, stride, padding, _, backend = ctx.settings
    to_grad_y, to_x, *_ = asked_for(ctx)
    v_grad_y = v_x = None
    if ggweight is not None:
        v_grad_y = _conv2d(x, ggweight, None, stride, padding, backend) if to_grad_y else None
        v_x = _conv2d_bwd_input(grad_y, ggweight, stride, padding, *x.shape[2:], backend) if to_x else None
    if ggbias is not None and ggbias.numel() and to_grad_y:
        more = ggbias[:, None, None].expand_as(grad_y)
        v_grad_y = more if v_grad_y is None else v_grad_y + more
    return v_grad_y, v_x, None, None, None, None, None


_conv2d = define("conv2d", ConvolutionLaunchers.fwd, _save, _fwd_formula)
_conv2d_bwd_input = define("conv2d_bwd_input", ConvolutionLaunchers.bwd_input, _save, _bwd_input_formula)
_conv2d_bwd_weight = define("conv2d_bwd_weight", ConvolutionLaunchers.bwd_weight, _save, _bwd_weight_formula)


# FLOPs as torch counts them: those of the plain convolution, whatever the algorithm saves.


@register_flop_formula(torch.ops.sami_fast.conv2d)
def _fwd_flops(x_shape, weight_shape, *_, out_shape: Any = None, **__) -> int:
    return conv_flop_count(x_shape, weight_shape, out_shape)


@register_flop_formula(torch.ops.sami_fast.conv2d_bwd_input)
def _bwd_input_flops(grad_y_shape, weight_shape, *_, out_shape: Any = None, **__) -> int:
    return conv_flop_count(out_shape, weight_shape, grad_y_shape)


@register_flop_formula(torch.ops.sami_fast.conv2d_bwd_weight)
def _bwd_weight_flops(grad_y_shape, x_shape, *_, out_shape: Any = None, **__) -> int:
    return conv_flop_count(x_shape, out_shape[0], grad_y_shape)
