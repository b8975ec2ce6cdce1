"""Group normalisation with SiLU that can be differentiated twice.

`sami_fast::group_norm_silu` -> `group_norm_silu_bwd` -> `group_norm_silu_bwd_bwd`: three chained operators, each the derivative of the
one before. `mean` and `rstd` are passed along as saved values: the formulas contain how they depend on x.
"""

import torch
from torch import Tensor

from .. import reference
from ..reference.group_norm_silu import (
    check_group_norm_silu,
    group_norm_silu_bwd,
    group_norm_silu_bwd_bwd,
    group_norm_silu_fwd,
    group_norm_silu_tan,
    with_defaults,
)
from .arguments import check_device, check_together
from .define import define, linear_in_cotangents, no_third_derivative, saved_arguments
from .launchers import Launcher, Launchers


class GroupNormSiLULaunchers(Launchers):
    op = "group_norm_silu"
    fwd = Launcher(group_norm_silu_fwd)
    bwd = Launcher(group_norm_silu_bwd)
    tan = Launcher(group_norm_silu_tan)
    bwd_bwd = Launcher(group_norm_silu_bwd_bwd)


def group_norm_silu(
    x: Tensor,  # [B, C, ...]
    num_groups: int,
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    eps: float = 1e-5,
    *,
    silu: bool = True,
    backend: str | None = None,
) -> Tensor:  # [B, C, ...]
    """`torch.nn.functional.group_norm` and the SiLU that usually follows, in one pass; the arguments are in torch's order.

        h = weight x_hat + bias,  x_hat = (x - mean) / sqrt(var + eps) over each group;  y = h sigmoid(h), or h without SiLU

    Contiguous and channels-last features are read and written in place; other layouts are copied first.

    Args:
        x: Features. [B, C, ...], any floating dtype; float16 and bfloat16 are computed in float32.
        num_groups: G, divides C.
        weight, bias: Scale and shift per channel; 1 and 0 when None. [C], one floating dtype, that of x or a wider one.
        eps: Added to the variance.
        silu: Apply SiLU after the norm.
        backend: See `sami_fast.use_backend`.
    Returns:
        Same shape and dtype as x.
    Raises:
        ValueError: C is not divisible by G, weight or bias is not [C], or devices differ.
        TypeError: a dtype that is not floating, weight and bias differ in dtype, or num_groups is a tensor.
        BackendError: the backend cannot run this call.
    Differentiable: twice, in x, weight and bias (the reference further).
    Runs on: C++, Triton, CUDA, reference.
    Source: Wu & He, arXiv:1803.08494.
    """
    weight, bias, backend = _prepare(x, num_groups, weight, bias, backend)
    if backend == "reference":
        return reference.group_norm_silu(x, num_groups, weight, bias, eps, silu=silu)
    return _group_norm_silu(x, weight, bias, num_groups, float(eps), silu, backend)[0]


def group_norm_silu_dual(
    x: Tensor,  # [B, C, ...]
    tx: Tensor,  # [B, C, ...]
    num_groups: int,
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    eps: float = 1e-5,
    *,
    silu: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # [B, C, ...] twice
    """`group_norm_silu` and its tangent along tx, the parameters constant: a dual number in, a dual number out.

    Args:
        tx: Tangent, shape and dtype of x.
        The rest: as in `group_norm_silu`.
    Returns:
        y and its tangent.
    Raises:
        As `group_norm_silu`.
    Differentiable: once, in x, tx, weight and bias (the reference further).
    Runs on: C++, Triton, CUDA, reference.
    """
    weight, bias, backend = _prepare(x, num_groups, weight, bias, backend)
    check_together("group_norm_silu_dual", x=x, tx=tx)
    if tx.shape != x.shape:
        raise ValueError(f"tx: expected {list(x.shape)}, found {list(tx.shape)}")
    if backend == "reference":
        return reference.group_norm_silu_dual(x, tx, num_groups, weight, bias, eps, silu=silu)
    return _group_norm_silu_dual(x, tx, weight, bias, num_groups, float(eps), silu, backend)[:2]


def _prepare(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, backend: str | None) -> tuple[Tensor, Tensor, str]:
    """The parameters that the kernels take, and the backend."""
    check_group_norm_silu(x, num_groups, weight, bias)
    check_together("group_norm_silu", x=x)
    weight, bias = with_defaults(x, weight, bias)
    check_together("group_norm_silu", weight=weight, bias=bias)
    check_device("group_norm_silu", x=x, weight=weight, bias=bias)
    return weight, bias, GroupNormSiLULaunchers.choose(backend, x)


def _save_fwd(ctx, inputs, output):
    x, weight, bias, num_groups, _, silu, backend = inputs
    _, mean, rstd = output
    ctx.settings = num_groups, silu, backend
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, mean, rstd)


def _fwd_formula(ctx, grad_y, *_):
    if grad_y is None:
        return (None,) * 7
    return *_group_norm_silu_bwd(grad_y, *ctx.saved_tensors, *ctx.settings), None, None, None, None


def _bwd_formula(ctx, ggx, ggweight, ggbias):
    if ggx is None and ggweight is None and ggbias is None:
        return (None,) * 9
    saved = saved_arguments(ctx)
    ggx = torch.zeros_like(saved[1]) if ggx is None else ggx
    return *_group_norm_silu_bwd_bwd(ggx, ggweight, ggbias, *saved), None, None, None, None, None


def _bwd_bwd(
    ggx: Tensor,
    ggweight: Tensor | None,
    ggbias: Tensor | None,
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    silu: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    on = GroupNormSiLULaunchers(backend)
    gg_y, x_bar, weight_bar, bias_bar = on.bwd_bwd(
        ggx, ggweight, ggbias, grad_y, x, weight, bias, mean, rstd, num_groups, silu, y_bar=None, need_tangent=True
    )
    assert gg_y is not None  # need_tangent asks for it
    return gg_y, x_bar, weight_bar, bias_bar


def _dual(
    x: Tensor, tx: Tensor, weight: Tensor, bias: Tensor, num_groups: int, norm_eps: float, silu: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    on = GroupNormSiLULaunchers(backend)
    y, mean, rstd = on.fwd(x, weight, bias, num_groups, norm_eps, silu)
    return y, on.tan(tx, x, weight, bias, mean, rstd, num_groups, silu), mean, rstd


def _save_dual(ctx, inputs, output):
    x, tx, weight, bias, num_groups, _, silu, backend = inputs
    _, _, mean, rstd = output
    ctx.settings = num_groups, silu, backend
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, tx, weight, bias, mean, rstd)


def _dual_formula(ctx, y_bar, ty_bar, *_):
    x = ctx.saved_tensors[0]
    if y_bar is None and ty_bar is None:
        return (None,) * 8
    y_bar = torch.zeros_like(x) if y_bar is None else y_bar
    ty_bar = torch.zeros_like(x) if ty_bar is None else ty_bar
    return *_group_norm_silu_dual_bwd(y_bar, ty_bar, *ctx.saved_tensors, *ctx.settings), None, None, None, None


def _dual_bwd(
    y_bar: Tensor,
    ty_bar: Tensor,
    x: Tensor,
    tx: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    silu: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # <ty_bar, ty> is linear in tx, with the first derivative as its matrix; its derivative in x and the parameters is the joint backward.
    on = GroupNormSiLULaunchers(backend)
    _, x_bar, weight_bar, bias_bar = on.bwd_bwd(
        tx, None, None, ty_bar, x, weight, bias, mean, rstd, num_groups, silu, y_bar=y_bar, need_tangent=False
    )
    tx_bar, _, _ = on.bwd(ty_bar, x, weight, bias, mean, rstd, num_groups, silu)
    return x_bar, tx_bar, weight_bar, bias_bar


_group_norm_silu = define("group_norm_silu", GroupNormSiLULaunchers.fwd, _save_fwd, _fwd_formula)
_group_norm_silu_bwd = define("group_norm_silu_bwd", GroupNormSiLULaunchers.bwd, None, _bwd_formula)
_group_norm_silu_bwd_bwd = define("group_norm_silu_bwd_bwd", _bwd_bwd, None, linear_in_cotangents("group_norm_silu"))
_group_norm_silu_dual = define("group_norm_silu_dual", _dual, _save_dual, _dual_formula)
_group_norm_silu_dual_bwd = define("group_norm_silu_dual_bwd", _dual_bwd, None, no_third_derivative("group_norm_silu_dual"))
