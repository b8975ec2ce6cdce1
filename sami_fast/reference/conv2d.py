"""Plain torch: a convolution with square kernels, the same stride and as many zeros on every side, no dilation and one group.

It is linear in the image and in the weight, so each of its derivatives is one of the three functions here, to any order.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def conv2d_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """x [B, C, H, W], weight [O, C, h, h], bias [O] -> y [B, O, H', W'] in channels-last memory."""
    return channels_last(F.conv2d(x, weight, bias, stride, padding))


def conv2d_bwd_input(grad_y: Tensor, weight: Tensor, stride: int, padding: int, height: int, width: int) -> Tensor:
    """Gradient in x [B, C, height, width], in channels-last memory."""
    size = weight.shape[2]
    left_over = [(side + 2 * padding - size) % stride for side in (height, width)]  # pixels that no result sees
    return channels_last(F.conv_transpose2d(grad_y, weight, None, stride, padding, left_over))


def conv2d_bwd_weight(grad_y: Tensor, x: Tensor, with_bias: bool, stride: int, padding: int, size: int) -> tuple[Tensor, Tensor]:
    """Gradients in weight, whose kernel has that size, and in bias, the latter empty where it is not asked for."""
    weight = x.new_empty(grad_y.shape[1], x.shape[1], size, size)
    settings = [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1  # with dilation, not transposed, output padding, groups
    mask = (False, True, with_bias)
    _, grad_weight, grad_bias = torch.ops.aten.convolution_backward(grad_y, x, weight, grad_y.shape[1:2], *settings, mask)
    return grad_weight.contiguous(), grad_bias if with_bias else x.new_empty(0)


def channels_last(x: Tensor) -> Tensor:
    """x in channels-last memory. With one channel, too, strides say so: torch would not know which of the two layouts it has."""
    if x.shape[1] == 1:
        return x.contiguous().view(x.shape[0], *x.shape[2:], 1).permute(0, 3, 1, 2)
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
