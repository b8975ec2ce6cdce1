"""Group normalisation with the SiLU that usually follows it: the op, and the twins of its launchers as explicit formulas.

x_hat = (x - mean) rstd,  h = weight x_hat + bias,  s = sigmoid(h),  y = h s.
Without SiLU y = h, f1 = 1 and f2 = 0; with it

    f1 = dy/dh   = s (1 + h (1 - s))
    f2 = d2y/dh2 = s (1 - s) (2 + h (1 - 2 s))

M[.] is the mean over a group. The twins know nothing of autograd; the launchers in `sami_fast.kernels.group_norm_silu` have the same
names and signatures.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def check_group_norm_silu(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None) -> None:
    """ValueError unless num_groups divides the channels of x and the parameters have one value per channel.

    TypeError: num_groups is a tensor, for whoever has the arguments in another order.
    """
    if isinstance(num_groups, Tensor):
        raise TypeError("num_groups: expected an int, found a tensor; the order is (x, num_groups, weight, bias, eps), torch's own")
    if x.dim() < 2:
        raise ValueError(f"x: expected [B, C, ...], found {list(x.shape)}")
    channels = x.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups: expected a divisor of {channels} channels, found {num_groups}")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.shape != (channels,):
            raise ValueError(f"{name}: expected [{channels}], found {list(value.shape)}")


def with_defaults(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The parameters; 1 and 0 for those that are None, in the dtype of the other one, else in that of x."""
    like = next((value for value in (weight, bias) if value is not None), x)
    weight = like.new_ones(x.shape[1]) if weight is None else weight
    return weight, like.new_zeros(x.shape[1]) if bias is None else bias


def group_norm_silu(
    x: Tensor,  # [B, C, ...]
    num_groups: int,
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    eps: float = 1e-5,
    *,
    silu: bool = True,
) -> Tensor:  # [B, C, ...]
    """h = weight x_hat + bias with x_hat normalised over each group; returns h sigmoid(h), or h without SiLU.

    Arguments and errors as `sami_fast.ops.group_norm_silu` describes them. Differentiable: twice and further, in x, weight and bias.
    """
    check_group_norm_silu(x, num_groups, weight, bias)
    weight, bias = with_defaults(x, weight, bias)
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    gamma, beta = weight.to(wide.dtype), bias.to(wide.dtype)
    if x.numel():
        # Not F.group_norm: it refuses a single image with a single pixel.
        h = torch.group_norm(wide, num_groups, gamma, beta, eps)
    else:  # where images have no positions, torch's gradient for the weight is NaN
        channelwise = -1, *(1,) * (x.dim() - 2)
        h = wide * gamma.view(channelwise) + beta.view(channelwise)
    return (F.silu(h) if silu else h).to(x.dtype)


def group_norm_silu_dual(
    x: Tensor,  # [B, C, ...]
    tx: Tensor,  # [B, C, ...]
    num_groups: int,
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    eps: float = 1e-5,
    *,
    silu: bool = True,
) -> tuple[Tensor, Tensor]:  # [B, C, ...] twice
    """`group_norm_silu` and its tangent along tx, written out so that autograd can differentiate both."""
    check_group_norm_silu(x, num_groups, weight, bias)
    weight, bias = with_defaults(x, weight, bias)
    wide = torch.promote_types(x.dtype, torch.float32)
    grouped = num_groups, x.shape[1] // num_groups
    channelwise = *x.shape[:2], x.shape[2:].numel()
    # Positions before channels: with channels first and one channel per group, torch 2.13 compiles wrong code (pytorch/pytorch #185702).
    groups, t = (value.to(wide).reshape(channelwise).mT.unflatten(2, grouped) for value in (x, tx))  # [B, P, G, C/G]
    gamma, beta = (value.to(wide).view(grouped) for value in (weight, bias))
    count = groups.shape[1] * groups.shape[3]

    def mean(value: Tensor) -> Tensor:  # not Tensor.mean, whose backward writes a whole tensor in the order of this view
        return value.sum((1, 3), keepdim=True) / count

    centred = groups - mean(groups)
    rstd = torch.rsqrt(mean(centred.square()) + eps)
    x_hat = centred * rstd
    h, th = gamma * x_hat + beta, gamma * rstd * (t - mean(t) - x_hat * mean(t * x_hat))
    if silu:
        s = torch.sigmoid(h)
        h, th = h * s, s * (1 + h * (1 - s)) * th
    h, th = (value.flatten(2).mT.reshape(x.shape).to(x.dtype) for value in (h, th))
    return h, th


# The twins of the launchers


def _wide(*tensors: Tensor) -> list[Tensor]:
    """The arguments contiguous and in the dtype of the arithmetic, which the first one decides."""
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return [tensor.to(dtype).contiguous() for tensor in tensors]


def _as(value: Tensor, x: Tensor) -> Tensor:
    """A contiguous result in the shape and dtype of x, and in its layout where that is channels-last."""
    value = value.view(x.shape)
    if x.is_contiguous() or not x.movedim(1, -1).is_contiguous():
        return value.to(x.dtype)
    return torch.empty_like(x).copy_(value)


def _sizes(x: Tensor, num_groups: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """[B, C, P] with P positions, and [B, G, C/G P]."""
    batch, channels = x.shape[:2]
    positions = x.shape[2:].numel()
    return (batch, channels, positions), (batch, num_groups, channels // num_groups * positions)


def _silu_backward(grad: Tensor, h: Tensor) -> Tensor:
    """grad f1, written over h: fresh memory costs a CPU more than the arithmetic."""
    return torch.ops.aten.silu_backward.grad_input(grad, h, grad_input=h)


def _normalise(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """x_hat. [B, G, m]. The mean is subtracted first: x rstd - mean rstd would cancel where |mean| is large."""
    return torch.sub(x, mean.unsqueeze(-1)).mul_(rstd.unsqueeze(-1))


def _norm_backward(grad_h: Tensor, x_hat: Tensor, rstd: Tensor, weight: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """rstd (u - M[u] - x_hat M[u x_hat]) with u = weight grad_h; sums of grad_h x_hat and of grad_h per channel. [B, C, P]."""
    batch, channels, positions = grad_h.shape
    # torch's formula sees x_hat as an input that is already normalised; what it lacks is the factor rstd.
    zero, one = torch.zeros_like(rstd), torch.ones_like(rstd)
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_group_norm_backward(
        grad_h, x_hat.view_as(grad_h), zero, one, weight, batch, channels, positions, num_groups, [True, True, True]
    )
    grad_x.view(batch, num_groups, -1 if batch else 0).mul_(rstd.unsqueeze(-1))
    return grad_x, grad_weight, grad_bias


def _x_hat_dot(t: Tensor, x_hat: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tangent of x_hat along t, rstd (t - c - x_hat e), with c = M[t] and e = M[t x_hat] [B, G, 1]. [B, G, m]."""
    rho, count, out = rstd.unsqueeze(-1), max(t.shape[-1], 1), t * x_hat
    c, e = t.sum(-1, keepdim=True) / count, out.sum(-1, keepdim=True) / count
    return torch.addcmul(-rho * c, t, rho, out=out).addcmul_(x_hat, -rho * e), c, e


def group_norm_silu_fwd(
    x: Tensor,  # [B, C, ...]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    num_groups: int,
    norm_eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # [B, C, ...], [B, G], [B, G]
    """y, and what the derivatives need of each group: mean, rstd = 1 / sqrt(variance + norm_eps), float32 (float64 for float64).

    Where a group has no elements both are 0.
    """
    wide, gamma, beta = _wide(x, weight, bias)
    y, mean, rstd = torch.native_group_norm(wide, gamma, beta, *_sizes(x, num_groups)[0], num_groups, norm_eps)
    if not x.numel():  # torch leaves NaN
        rstd.zero_()
    return _as(F.silu(y, inplace=True) if silu else y, x), mean, rstd


def group_norm_silu_bwd(
    grad_y: Tensor,  # [B, C, ...]
    x: Tensor,  # [B, C, ...]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    mean: Tensor,  # [B, G]
    rstd: Tensor,  # [B, G]
    num_groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # [B, C, ...], [C], [C]
    """The gradient of <grad_y, y>; a = M[u] and b = M[u x_hat] come from u = weight grad_y f1.

    grad_x      = rstd (u - a - x_hat b)
    grad_weight = sum grad_y f1 x_hat
    grad_bias   = sum grad_y f1
    """
    wide, grad_h, gamma, beta = _wide(x, grad_y, weight, bias)
    channelwise, groupwise = _sizes(x, num_groups)
    x_hat = _normalise(wide.view(groupwise), mean, rstd).view(channelwise)
    grad_h = grad_h.view(channelwise)
    if silu:
        grad_h = _silu_backward(grad_h, torch.addcmul(beta[:, None], x_hat, gamma[:, None]))
    grad_x, grad_weight, grad_bias = _norm_backward(grad_h, x_hat, rstd, gamma, num_groups)
    return _as(grad_x, x), grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def group_norm_silu_tan(
    tx: Tensor,  # [B, C, ...]
    x: Tensor,  # [B, C, ...]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    mean: Tensor,  # [B, G]
    rstd: Tensor,  # [B, G]
    num_groups: int,
    silu: bool,
) -> Tensor:  # [B, C, ...]
    """The tangent of y along tx, parameters constant: f1 weight rstd (tx - M[tx] - x_hat M[tx x_hat])."""
    wide, t, gamma, beta = _wide(x, tx, weight, bias)
    channelwise, groupwise = _sizes(x, num_groups)
    x_hat = _normalise(wide.view(groupwise), mean, rstd)
    h_dot = _x_hat_dot(t.view(groupwise), x_hat, rstd)[0].view(channelwise).mul_(gamma[:, None])
    if silu:
        h_dot = _silu_backward(h_dot, x_hat.view(channelwise).mul_(gamma[:, None]).add_(beta[:, None]))
    return _as(h_dot, x)


def group_norm_silu_bwd_bwd(
    ggx: Tensor,  # [B, C, ...]
    ggweight: Tensor | None,  # [C]
    ggbias: Tensor | None,  # [C]
    grad_y: Tensor,  # [B, C, ...]
    x: Tensor,  # [B, C, ...]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    mean: Tensor,  # [B, G]
    rstd: Tensor,  # [B, G]
    num_groups: int,
    silu: bool,
    y_bar: Tensor | None,  # [B, C, ...]
    need_tangent: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:  # [B, C, ...] or None, [B, C, ...], [C], [C]
    """The gradient of <ggx, grad_x> + <ggweight, grad_weight> + <ggbias, grad_bias> + <y_bar, y>, terms that are None left out.

    With t = ggx, w = grad_y f1, u = weight w, a = M[u], b = M[u x_hat], c = M[t], e = M[t x_hat], q = M[u t]:

        x_hat_dot  = rstd (t - c - x_hat e)
        h_dot      = weight x_hat_dot + ggweight x_hat + ggbias
        h_bar      = grad_y f2 h_dot + y_bar f1
        v          = weight h_bar + ggweight w

        gg_y       = f1 h_dot
        x_bar      = rstd (v - M[v] - x_hat M[v x_hat]) - rstd^2 (e (u - a) + b (t - c) + x_hat (q - a c - 3 b e))
        weight_bar = sum (x_hat_dot w + h_bar x_hat)
        bias_bar   = sum h_bar

    Returns:
        gg_y (None unless need_tangent), x_bar, weight_bar, bias_bar: for grad_y, x, weight and bias; the dependence of mean
        and rstd on x is included.
    """
    wide, t, g, gamma, beta = _wide(x, ggx, grad_y, weight, bias)
    channelwise, groupwise = _sizes(x, num_groups)
    count, column, rho = max(groupwise[2], 1), gamma[:, None], rstd.unsqueeze(-1)
    x_hat = _normalise(wide.view(groupwise), mean, rstd)
    x_hat_dot, c, e = _x_hat_dot(t.view(groupwise), x_hat, rstd)
    x_hat, x_hat_dot, t, g = (value.view(channelwise) for value in (x_hat, x_hat_dot, t, g))

    h_dot = x_hat_dot * column
    dd_gamma = None if ggweight is None else ggweight.to(gamma.dtype)[:, None]
    if dd_gamma is not None:
        h_dot.addcmul_(x_hat, dd_gamma)
    if ggbias is not None:
        h_dot.add_(ggbias.to(gamma.dtype)[:, None])

    y_bar = None if y_bar is None else _wide(x, y_bar)[1].view(channelwise)
    if silu:
        h = torch.addcmul(beta[:, None], x_hat, column)
        s = h.sigmoid()
        slope = torch.ops.aten.sigmoid_backward(g, s)  # grad_y s (1 - s), in both w and grad_y f2
        w = (g * s).addcmul_(h, slope)
        gg_y = torch.ops.aten.silu_backward(h_dot, h) if need_tangent else None
        h_bar = torch.addcmul(h, h, s, value=-2, out=s).add_(2).mul_(slope).mul_(h_dot)
        if y_bar is not None:
            h_bar.add_(_silu_backward(y_bar, h))
    else:
        w, gg_y = g, h_dot if need_tangent else None
        h_bar = torch.zeros_like(x_hat) if y_bar is None else y_bar.clone()

    # Per image and channel, then per group.
    product = w * x_hat
    sum_w, sum_wx, sum_wt = w.sum(-1), product.sum(-1), torch.mul(w, t, out=product).sum(-1)
    a, b, q = ((s * gamma).view(*groupwise[:2], -1 if groupwise[0] else 0).sum(-1, keepdim=True) / count for s in (sum_w, sum_wx, sum_wt))

    # The norm's own backward serves h_bar and the part -rstd^2 e (u - a - x_hat b) of x_bar at once.
    h_bar.view(groupwise).addcmul_(w.view(groupwise), -rho * e)
    x_bar, weight_bar, bias_bar = _norm_backward(h_bar, x_hat, rstd, gamma, num_groups)
    if dd_gamma is not None:
        x_bar.add_(_norm_backward(w, x_hat, rstd, dd_gamma[:, 0].contiguous(), num_groups)[0])
    x_bar = x_bar.view(groupwise).addcmul_(x_hat_dot.view(groupwise), -rho * b)
    x_bar.addcmul_(x_hat.view(groupwise), -rho * rho * (q - a * c - b * e))

    # [B, G, 1] against [B, G, C/G]; the sums above were of h_bar - rstd e w.
    sum_w, sum_wt = (s.view(*groupwise[:2], channelwise[1] // num_groups) for s in (sum_w, sum_wt))
    weight_bar = weight_bar + (rho * (sum_wt - c * sum_w)).sum(0).flatten()
    bias_bar = bias_bar + (rho * e * sum_w).sum(0).flatten()
    return (
        None if gg_y is None else _as(gg_y, x),
        _as(x_bar, x),
        weight_bar.to(weight.dtype),
        bias_bar.to(bias.dtype),
    )
