"""Plain torch: the convolution that most layers of both networks are, 3x3 with stride 1 and one pixel of zeros around the image.

It is linear in the image and in the weight, so each of its derivatives is one of the three functions here, to any order.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_SETTINGS = ((1, 1), (1, 1), (1, 1), False, (0, 0), 1)  # stride, padding, dilation, not transposed, output padding, groups


def conv2d_fwd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [B, C, H, W], weight [O, C, 3, 3], bias [O] -> y [B, O, H, W] in channels-last memory."""
    return channels_last(F.conv2d(x, weight, bias, 1, 1))


def conv2d_bwd_input(grad_y: Tensor, weight: Tensor) -> Tensor:
    """Gradient in x, in channels-last memory."""
    return channels_last(F.conv2d(grad_y, weight.transpose(0, 1).flip(2, 3), None, 1, 1))


def conv2d_bwd_weight(grad_y: Tensor, x: Tensor, with_bias: bool) -> tuple[Tensor, Tensor]:
    """Gradients in weight and in bias, the latter empty where it is not asked for."""
    weight = x.new_empty(grad_y.shape[1], x.shape[1], 3, 3)
    mask = (False, True, with_bias)
    _, grad_weight, grad_bias = torch.ops.aten.convolution_backward(grad_y, x, weight, grad_y.shape[1:2], *_SETTINGS, mask)
    return grad_weight.contiguous(), grad_bias if with_bias else x.new_empty(0)


def channels_last(x: Tensor) -> Tensor:
    """x in channels-last memory. With one channel, too, strides say so: torch would not know which of the two layouts it has."""
    if x.shape[1] == 1:
        return x.contiguous().view(x.shape[0], *x.shape[2:], 1).permute(0, 3, 1, 2)
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
