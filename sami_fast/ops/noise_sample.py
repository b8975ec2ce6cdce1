"""Multiscale noising: K noisy copies of each image, generator inside.

`sami_fast::noise_sample` is linear in x_0, alpha_t and sigma_t; its formula is plain torch, which can be differentiated again.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import reference
from ..reference import Stream
from ..reference.noise_sample import check_noise_sample, noise_sample_fwd
from .arguments import check_device, check_together
from .define import define
from .launchers import Launcher, Launchers
from .random import check_draw, check_index, random_normal


class NoiseSampleLaunchers(Launchers):
    op = "noise_sample"
    fwd = Launcher(noise_sample_fwd)


@dataclass(frozen=True)
class Noise:
    """Noise that was not kept: what it takes to draw it again."""

    index: Tensor  # [B] int64
    levels: int  # K
    seed: int
    step: int
    stream: int

    def draw(self, like: Tensor, backend: str | None = None) -> Tensor:
        """The noise, in the shape [B*K, C, H, W] and the dtype of `like`."""
        places = torch.arange(self.levels, device=self.index.device)
        sample = (self.index[:, None] * self.levels + places).flatten()
        size = like.shape[1:].numel()
        return random_normal(self.seed, self.step, self.stream, sample, size, backend=backend).to(like.dtype).view(like.shape)


def noise_sample(
    x_0: Tensor,  # [B, C, H, W]
    alpha_t: Tensor,  # [B, K]
    sigma_t: Tensor,  # [B, K]
    index: Tensor,  # [B]
    *,
    seed: int,
    step: int,
    stream: int = Stream.EPS,
    store_eps: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | Noise]:  # [B*K, C, H, W] twice
    """Draw x_t = alpha_t x_0 + sigma_t eps with eps ~ N(0, I).

    Level k of the image with global index b is sample b * K + k of the stream, so the same image gets the same noise whatever the batch
    split or the number of ranks.

    Args:
        x_0: Clean images. [B, C, H, W], any floating dtype; arithmetic in float32 (float64 for float64).
        alpha_t, sigma_t: Signal and noise amplitudes of K levels per image. [B, K], floating.
        index: Global index of each image in the step's whole batch. [B] int64, >= 0.
        seed, step, stream: See `random_normal`.
        store_eps: Return eps; otherwise a `Noise`, from which `guided_loss` draws it again: 4 bytes per element less memory.
        backend: See `sami_fast.use_backend`.
    Returns:
        x_t and eps, both [B*K, C, H, W] in the dtype of x_0, contiguous and image-major (the K levels of an image lie together), in
        float32 bit for bit the same on every backend. In half precision x_t is made of the rounded eps.
    Raises:
        ValueError: shapes do not fit, devices differ, there is no such stream, or seed or step is out of range.
        TypeError: a dtype that is not floating, or an index that is not int64.
        BackendError: the backend cannot run this call.
    Differentiable: twice and further, in x_0, alpha_t and sigma_t.
    Runs on: C++, Triton, CUDA, reference.
    Source: SAMI, arXiv:2512.17127, forward process.
    """
    check_noise_sample(x_0, alpha_t, sigma_t, index)
    check_together("noise_sample", x_0=x_0)
    check_together("noise_sample", alpha_t=alpha_t, sigma_t=sigma_t)
    check_device("noise_sample", x_0=x_0, alpha_t=alpha_t, sigma_t=sigma_t, index=index)
    check_index(index)
    check_draw(seed, step, stream)
    backend = NoiseSampleLaunchers.choose(backend, x_0)
    if backend == "reference":
        x_t, eps = reference.noise_sample(x_0, alpha_t, sigma_t, index, seed=seed, step=step, stream=stream)
    else:
        x_t, eps = _noise_sample(x_0, alpha_t, sigma_t, index, seed, step, int(stream), store_eps, backend)
    return x_t, eps if store_eps else Noise(index, alpha_t.shape[1], seed, step, int(stream))


def _fwd(
    x_0: Tensor,
    alpha_t: Tensor,
    sigma_t: Tensor,
    index: Tensor,
    seed: int,
    step: int,
    stream: int,
    store_eps: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    x_t, eps = NoiseSampleLaunchers(backend).fwd(x_0, alpha_t, sigma_t, index, seed, step, stream, store_eps)
    return x_t, x_t.new_empty(0) if eps is None else eps


def _save(ctx, inputs, output):
    x_0, alpha_t, _, index, *ctx.noise, ctx.stored, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_0, alpha_t, index, output[1])


def _formula(ctx, grad_x_t, _):
    if grad_x_t is None:
        return (None,) * 9
    x_0, alpha_t, index, eps = ctx.saved_tensors
    if not ctx.stored:
        eps = Noise(index, alpha_t.shape[1], *ctx.noise).draw(grad_x_t, ctx.backend)
    shape = *alpha_t.shape, *x_0.shape[1:]  # [B, K, C, H, W]
    grad_x_t, eps = grad_x_t.view(shape).to(alpha_t.dtype), eps.view(shape).to(alpha_t.dtype)
    grad_x_0 = torch.einsum("bkchw,bk->bchw", grad_x_t, alpha_t).to(x_0.dtype)
    grad_alpha_t = torch.einsum("bkchw,bchw->bk", grad_x_t, x_0.to(alpha_t.dtype))
    return grad_x_0, grad_alpha_t, torch.einsum("bkchw,bkchw->bk", grad_x_t, eps), *(None,) * 6


_noise_sample = define("noise_sample", _fwd, _save, _formula)
