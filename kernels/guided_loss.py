"""Score-weighted loss with both of its cotangents in one pass.

Forward, per sample s with sigma, w, u its noise amplitude, weight and unconditional weight:

    d = eps - eps_pred        r = d + sigma grad_log_q
    loss = w sum r^2 + u sum d^2        unguided = sum d^2

Backward, for an upstream gradient of 1 per sample, made in the same pass while r and d are in registers:

    d loss / d eps_pred   = -2 (w r + u d)
    d loss / d grad_log_q =  2 w sigma r

Second backward: the loss is quadratic, so these two are linear in (eps_pred, grad_log_q); a training step never asks for it.

Noise that was not stored is drawn again from its counters, as `noise_sample` drew it, and rounded to the dtype of eps_pred as it would have
been stored. Sums are taken in float32, as trees inside a program, and finished by a second sum over programs: no atomics, so two runs agree
bit for bit.
"""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import launch
from .random import COUNTER, counter, random_normals

_STRIDES = ("stride_pred_c", "stride_pred_p", "stride_grad_c", "stride_grad_p")


@triton.jit(do_not_specialize=["blocks", "levels", "channels", "pixels", *_STRIDES, *COUNTER])
def _guided_loss_fwd_kernel(
    eps_pred_ptr, grad_log_q_ptr,
    eps_ptr,  # None: draw it again
    index_ptr,  # None where eps is given
    sigma_ptr, weight_ptr, unconditional_ptr, grad_eps_pred_ptr, grad_grad_log_q_ptr,
    loss_ptr, unguided_ptr,  # [S, blocks]
    blocks, levels, channels,
    pixels,  # a multiple of 4 where there are several channels, so that no quad lies in two of them
    stride_pred_c, stride_pred_p, stride_grad_c, stride_grad_p, seed_low, seed_high, offset_low, offset_high,
    FLAT: tl.constexpr,  # one channel, strides 1, pixels a multiple of 16
    BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Per element: reads 3 tensors and writes 2, or reads 2 and writes 2 where eps is drawn again: 20 or 16 bytes in float32, 10 or 8 in
    half precision; eager forward and backward move 100 to 176 in float32.

    A program takes the same pixels of all channels, so that channels-last lines are used whole while they are in the cache. A contiguous
    sample counts as one channel.
    """
    program = tl.program_id(0)
    sample = (program // blocks).to(tl.int64)
    if FLAT:
        pixels = pixels // 16 * 16  # no change, but the compiler now knows that rows start where 16-byte accesses may
    quad = (program % blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    pixel = quad[:, None] * 4 + tl.arange(0, 4)[None, :]
    mask = pixel < pixels
    row = sample * channels * pixels
    quads = (pixels + 3) // 4

    sigma = tl.load(sigma_ptr + sample).to(tl.float32)
    weight = tl.load(weight_ptr + sample).to(tl.float32)
    unconditional = tl.load(unconditional_ptr + sample).to(tl.float32)
    if eps_ptr is None:
        first_quad = (tl.load(index_ptr + sample // levels) * levels + sample % levels) * (channels * quads)
    guided = tl.zeros((BLOCK_Q, 4), tl.float32)
    unguided = tl.zeros((BLOCK_Q, 4), tl.float32)
    for c in range(channels):
        if FLAT:
            pred_offset, grad_offset = pixel, pixel
        else:
            pred_offset = c * stride_pred_c + pixel * stride_pred_p
            grad_offset = c * stride_grad_c + pixel * stride_grad_p
        eps_pred = tl.load(eps_pred_ptr + row + pred_offset, mask=mask, other=0.0)
        grad_log_q = tl.load(grad_log_q_ptr + row + grad_offset, mask=mask, other=0.0).to(tl.float32)
        if eps_ptr is None:
            eps = random_normals(first_quad + c * quads + quad, seed_low, seed_high, offset_low, offset_high)
            eps = eps.to(eps_pred.dtype).to(tl.float32)
        else:
            eps = tl.load(eps_ptr + row + (c * pixels + pixel), mask=mask, other=0.0).to(tl.float32)
        # Noise is drawn beyond the end of a sample as well; the mask keeps it out of the sums.
        d = tl.where(mask, eps - eps_pred.to(tl.float32), 0.0)
        r = d + sigma * grad_log_q
        guided += r * r
        unguided += d * d
        grad_eps_pred = -2.0 * (weight * r + unconditional * d)
        grad_grad_log_q = 2.0 * weight * sigma * r
        tl.store(grad_eps_pred_ptr + row + pred_offset, grad_eps_pred.to(grad_eps_pred_ptr.dtype.element_ty), mask=mask)
        tl.store(grad_grad_log_q_ptr + row + grad_offset, grad_grad_log_q.to(grad_grad_log_q_ptr.dtype.element_ty), mask=mask)
    guided_sum, unguided_sum = tl.sum(guided), tl.sum(unguided)
    tl.store(loss_ptr + program, weight * guided_sum + unconditional * unguided_sum)
    tl.store(unguided_ptr + program, unguided_sum)


BLOCK_Q = 256  # quads of elements per program


def _dense(x: Tensor) -> Tensor:
    return x if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def guided_loss_fwd(
    eps: Tensor | None,  # [S, C, H, W]
    eps_pred: Tensor,  # [S, C, H, W]
    grad_log_q: Tensor,  # [S, C, H, W]
    sigma_t: Tensor,  # [S]
    weight: Tensor,  # [S]
    unconditional_weight: Tensor,  # [S]
    index: Tensor | None,  # [B]
    levels: int,
    seed: int,
    step: int,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [S], [S], [S, C, H, W] twice
    """loss, unguided (float32), d loss / d eps_pred and d loss / d grad_log_q, each cotangent with the dtype and layout of its tensor."""
    samples, channels, height, width = eps_pred.shape
    pixels = height * width
    eps_pred, grad_log_q = _dense(eps_pred), _dense(grad_log_q)
    if pixels % 4:
        eps_pred, grad_log_q = eps_pred.contiguous(), grad_log_q.contiguous()
    if eps_pred.is_contiguous() and grad_log_q.is_contiguous():
        channels, pixels = 1, channels * pixels
        strides = [0, 1, 0, 1]
        flat = pixels % 16 == 0
    else:
        strides = [s for x in (eps_pred, grad_log_q) for s in ((pixels, 1) if x.is_contiguous() else (1, channels))]
        flat = False
    blocks = triton.cdiv(pixels, 4 * BLOCK_Q)
    grad_eps_pred, grad_grad_log_q = torch.empty_like(eps_pred), torch.empty_like(grad_log_q)
    loss, unguided = (eps_pred.new_empty((samples, blocks), dtype=torch.float32) for _ in range(2))
    noise = (eps.contiguous(), None) if eps is not None else (None, None if index is None else index.contiguous())
    inputs = eps_pred, grad_log_q, *noise, *(value.contiguous() for value in (sigma_t, weight, unconditional_weight))
    numbers = blocks, levels, channels, pixels, *strides, *counter(seed, step, stream)
    arguments = *inputs, grad_eps_pred, grad_grad_log_q, loss, unguided, *numbers
    launch(_guided_loss_fwd_kernel, (samples * blocks,), *arguments, fp_fusion=False, FLAT=flat, BLOCK_Q=BLOCK_Q)
    loss, unguided = (partial.squeeze(1) if blocks == 1 else partial.sum(1) for partial in (loss, unguided))
    return loss, unguided, grad_eps_pred, grad_grad_log_q


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    scalars, index = torch.empty(4, device="meta"), torch.empty(2, dtype=torch.int64, device="meta")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for layout in (torch.contiguous_format, torch.channels_last):
            images = torch.empty(4, 3, 4, 4, dtype=dtype, device="meta").to(memory_format=layout)
            for eps in (images, None):
                label = (
                    f"{str(dtype).removeprefix('torch.')}, {'flat' if layout == torch.contiguous_format else 'any layout'}, "
                    f"eps {'drawn' if eps is None else 'stored'}"
                )
                yield label, lambda eps=eps, x=images: guided_loss_fwd(eps, x, x, scalars, scalars, scalars, index, 2, 0, 0, 0)
