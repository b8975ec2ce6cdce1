"""Multiscale noising in one pass: x_0 is read once for its K noise levels, the noise is made in registers.

Forward, for level k of image b, sample s = b * K + k, eps drawn for sample index[b] * K + k of the stream:

    x_t = alpha_bk x_0 + sigma_bk eps

Backward and second backward are linear and run on the results of autograd's own products; no kernel of theirs is here.

Arithmetic is float32, and bit for bit that of `sami_fast.reference.noise_sample`: no product contracts with a sum. In half precision eps is
rounded to the dtype first, so that x_t is made of the eps that is stored, or drawn again by the loss kernel.
"""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import launch
from .random import COUNTER, counter, random_normals


@triton.jit(do_not_specialize=["levels", "size", "blocks", *COUNTER])
def _noise_sample_fwd_kernel(
    x_0_ptr, alpha_ptr, sigma_ptr, index_ptr, x_t_ptr,
    eps_ptr,  # None: not stored
    levels,
    size,  # C * H * W
    blocks,  # per image
    seed_low, seed_high, offset_low, offset_high,
    WIDE: tl.constexpr,  # size is a multiple of 16
    BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Per element of x_t, in elements of its dtype: reads 1/K, writes 1, or 2 with eps. Eager torch moves about 9 and keeps eps."""
    program = tl.program_id(0)
    image = (program // blocks).to(tl.int64)
    if WIDE:
        size = size // 16 * 16  # no change, but the compiler now knows that rows start where 16-byte accesses may
    quad = (program % blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    element = quad[:, None] * 4 + tl.arange(0, 4)[None, :]
    mask = element < size
    x_0 = tl.load(x_0_ptr + image * size + element, mask=mask, other=0.0).to(tl.float32)
    quads = (size + 3) // 4
    first_sample = tl.load(index_ptr + image) * levels
    for k in range(levels):
        row = image * levels + k
        alpha, sigma = tl.load(alpha_ptr + row).to(tl.float32), tl.load(sigma_ptr + row).to(tl.float32)
        eps = random_normals((first_sample + k) * quads + quad, seed_low, seed_high, offset_low, offset_high)
        eps = eps.to(x_t_ptr.dtype.element_ty)
        x_t = alpha * x_0 + sigma * eps.to(tl.float32)
        tl.store(x_t_ptr + row * size + element, x_t.to(x_t_ptr.dtype.element_ty), mask=mask)
        if eps_ptr is not None:
            tl.store(eps_ptr + row * size + element, eps, mask=mask)


BLOCK_Q = 128  # quads of elements per program


def noise_sample_fwd(
    x_0: Tensor,  # [B, C, H, W]
    alpha_t: Tensor,  # [B, K]
    sigma_t: Tensor,  # [B, K]
    index: Tensor,  # [B]
    seed: int,
    step: int,
    stream: int,
    store_eps: bool,
) -> tuple[Tensor, Tensor | None]:  # [B*K, C, H, W] twice
    """x_t and, where asked for, eps; contiguous, in the dtype of x_0: float32, float16 or bfloat16."""
    levels, size = alpha_t.shape[1], x_0.shape[1:].numel()
    x_t = x_0.new_empty((x_0.shape[0] * levels, *x_0.shape[1:]))
    eps = torch.empty_like(x_t) if store_eps else None
    blocks = triton.cdiv(size, 4 * BLOCK_Q)
    x_0, alpha_t, sigma_t, index = (value.contiguous() for value in (x_0, alpha_t, sigma_t, index))
    arguments = x_0, alpha_t, sigma_t, index, x_t, eps, levels, size, blocks, *counter(seed, step, stream)
    launch(_noise_sample_fwd_kernel, (x_0.shape[0] * blocks,), *arguments, fp_fusion=False, WIDE=size % 16 == 0, BLOCK_Q=BLOCK_Q)
    return x_t, eps


def aot_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for size in (64, 63):
            for store_eps in (True, False):
                x_0 = torch.empty(2, 3, size, 1, dtype=dtype, device="meta")
                amplitude, index = torch.empty(2, 4, device="meta"), torch.empty(2, dtype=torch.int64, device="meta")
                label = (
                    f"{str(dtype).removeprefix('torch.')}, size {'16n' if size % 16 == 0 else 'any'}{', eps stored' if store_eps else ''}"
                )
                yield label, lambda x_0=x_0, a=amplitude, i=index, store=store_eps: noise_sample_fwd(x_0, a, a, i, 0, 0, 0, store)
