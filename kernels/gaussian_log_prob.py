"""Log density of a diagonal Gaussian.

With d = z - mu and r = d / var, a row at a time:

Forward
    log_q = -1/2 sum_Z [ d r + ln var + ln 2 pi ]
Backward, for the gradient `grad` of log_q
    grad_z = -grad r,  grad_mu = grad r,  grad_var = 1/2 grad (d r - 1) / var
Second backward, for the gradients ggz, ggmu, ggvar of those three, with delta = ggmu - ggz
    gg      = sum_Z [ r delta + 1/2 ggvar (d r - 1) / var ]
    z_bar   = grad (delta + ggvar r) / var,  mu_bar = -z_bar
    var_bar = grad (-r delta + ggvar (1/2 - d r) / var) / var

Everything is float32. No formula squares or cubes var: at var = 1e9 or 1e-9 its third power would leave float32's range.
"""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import launch

LN_2_PI = tl.constexpr(1.8378770664093453)


@triton.jit
def _gaussian_log_prob_fwd_kernel(z_ptr, mu_ptr, var_ptr, log_q_ptr, size, stride_zb, stride_mub, stride_varb, BLOCK_Z: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK_Z], tl.float32)
    for start in range(0, size, BLOCK_Z):
        cols = start + tl.arange(0, BLOCK_Z)
        mask = cols < size
        var = tl.load(var_ptr + row * stride_varb + cols, mask, other=1.0)
        d = tl.load(z_ptr + row * stride_zb + cols, mask, other=0.0) - tl.load(mu_ptr + row * stride_mub + cols, mask, other=0.0)
        total += tl.where(mask, d * (d / var) + tl.log(var) + LN_2_PI, 0.0)
    tl.store(log_q_ptr + row, -0.5 * tl.sum(total, 0))


@triton.jit
def _gaussian_log_prob_bwd_kernel(
    z_ptr, mu_ptr, var_ptr, grad_ptr, dz_ptr, dmu_ptr, dvar_ptr,
    size, stride_zb, stride_mub, stride_varb, stride_gradb, BLOCK_Z: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    grad = tl.load(grad_ptr + row * stride_gradb)
    for start in range(0, size, BLOCK_Z):
        cols = start + tl.arange(0, BLOCK_Z)
        mask = cols < size
        var = tl.load(var_ptr + row * stride_varb + cols, mask, other=1.0)
        d = tl.load(z_ptr + row * stride_zb + cols, mask, other=0.0) - tl.load(mu_ptr + row * stride_mub + cols, mask, other=0.0)
        r = d / var
        out = row * size + cols
        tl.store(dz_ptr + out, -(grad * r), mask)
        tl.store(dmu_ptr + out, grad * r, mask)
        tl.store(dvar_ptr + out, 0.5 * grad * ((d * r - 1.0) / var), mask)


@triton.jit
def _gaussian_log_prob_bwd_bwd_kernel(
    z_ptr, mu_ptr, var_ptr, grad_ptr, ggz_ptr, ggmu_ptr, ggvar_ptr, gg_ptr, z_bar_ptr, mu_bar_ptr, var_bar_ptr,
    size, stride_zb, stride_mub, stride_varb, stride_gradb, stride_ggzb, stride_ggmub, stride_ggvarb, has_ggz, has_ggmu, has_ggvar,
    BLOCK_Z: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    grad = tl.load(grad_ptr + row * stride_gradb)
    total = tl.zeros([BLOCK_Z], tl.float32)
    for start in range(0, size, BLOCK_Z):
        cols = start + tl.arange(0, BLOCK_Z)
        mask = cols < size
        var = tl.load(var_ptr + row * stride_varb + cols, mask, other=1.0)
        d = tl.load(z_ptr + row * stride_zb + cols, mask, other=0.0) - tl.load(mu_ptr + row * stride_mub + cols, mask, other=0.0)
        # Optional cotangents need no variant of the kernel: run-time flags mask off their loads.
        ggz = tl.load(ggz_ptr + row * stride_ggzb + cols, mask & has_ggz, other=0.0)
        ggmu = tl.load(ggmu_ptr + row * stride_ggmub + cols, mask & has_ggmu, other=0.0)
        ggvar = tl.load(ggvar_ptr + row * stride_ggvarb + cols, mask & has_ggvar, other=0.0)
        r = d / var
        delta = ggmu - ggz
        scaled = ggvar / var
        z_bar = grad * (delta / var + scaled * r)
        total += r * delta + 0.5 * scaled * (d * r - 1.0)  # 0 where masked: delta and scaled are
        out = row * size + cols
        tl.store(z_bar_ptr + out, z_bar, mask)
        tl.store(mu_bar_ptr + out, -z_bar, mask)
        tl.store(var_bar_ptr + out, grad * ((scaled * (0.5 - d * r) - r * delta) / var), mask)
    tl.store(gg_ptr + row, tl.sum(total, 0))


def _launch(kernel: triton.JITFunction, z: Tensor, *rest: Tensor | int) -> None:
    """A program per row: of one warp for the usual latent, of four where the row is long."""
    block, num_warps = (128, 1) if z.shape[1] <= 512 else (1024, 4)
    launch(kernel, (z.shape[0],), z, *rest, num_warps=num_warps, BLOCK_Z=block)


def _rows(tensor: Tensor) -> Tensor:
    """Rows may be any distance apart (mu and var are often two halves of one output); the elements of a row must be contiguous."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def gaussian_log_prob_fwd(
    z: Tensor,  # [B, Z]
    mu: Tensor,  # [B, Z]
    var: Tensor,  # [B, Z]
) -> Tensor:  # [B]
    """log_q."""
    z, mu, var = map(_rows, (z, mu, var))
    log_q = z.new_empty(z.shape[0])
    strides = z.stride(0), mu.stride(0), var.stride(0)
    _launch(_gaussian_log_prob_fwd_kernel, z, mu, var, log_q, z.shape[1], *strides)
    return log_q


def gaussian_log_prob_bwd(
    grad: Tensor,  # [B]
    z: Tensor,  # [B, Z]
    mu: Tensor,  # [B, Z]
    var: Tensor,  # [B, Z]
) -> tuple[Tensor, Tensor, Tensor]:  # [B, Z] each
    """grad_z, grad_mu, grad_var: the gradient of <grad, log_q>."""
    z, mu, var = map(_rows, (z, mu, var))
    batch, size = z.shape
    outputs = z.new_empty(batch, size), z.new_empty(batch, size), z.new_empty(batch, size)
    strides = z.stride(0), mu.stride(0), var.stride(0), grad.stride(0)
    _launch(_gaussian_log_prob_bwd_kernel, z, mu, var, grad, *outputs, size, *strides)
    return outputs


def gaussian_log_prob_bwd_bwd(
    ggz: Tensor | None,  # [B, Z]
    ggmu: Tensor | None,  # [B, Z]
    ggvar: Tensor | None,  # [B, Z]
    grad: Tensor,  # [B]
    z: Tensor,  # [B, Z]
    mu: Tensor,  # [B, Z]
    var: Tensor,  # [B, Z]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [B], [B, Z], [B, Z], [B, Z]
    """gg, z_bar, mu_bar, var_bar: the gradient of <ggz, grad_z> + <ggmu, grad_mu> + <ggvar, grad_var>; None stands for zeros."""
    z, mu, var = map(_rows, (z, mu, var))
    batch, size = z.shape
    given = [value is not None for value in (ggz, ggmu, ggvar)]
    # An absent one is never read, but its pointer must be valid.
    cotangents = [z if value is None else _rows(value) for value in (ggz, ggmu, ggvar)]
    outputs = z.new_empty(batch), z.new_empty(batch, size), z.new_empty(batch, size), z.new_empty(batch, size)
    strides = [tensor.stride(0) for tensor in (z, mu, var, grad, *cotangents)]
    _launch(_gaussian_log_prob_bwd_bwd_kernel, z, mu, var, grad, *cotangents, *outputs, size, *strides, *given)
    return outputs


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Short and long rows; rows that start on 16-byte boundaries, and rows that do not."""
    for size in (64, 63, 2048, 1000):

        def call(size: int = size) -> None:
            z, mu, var, grad = (torch.empty(8, *shape, device="meta") for shape in ((size,), (size,), (size,), ()))
            gaussian_log_prob_fwd(z, mu, var)
            gaussian_log_prob_bwd(grad, z, mu, var)
            gaussian_log_prob_bwd_bwd(None, mu, var, grad, z, mu, var)

        yield f"float32, Z = {size}", call
