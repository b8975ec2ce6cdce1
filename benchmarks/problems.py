"""Calls of single level functions, for what looks at kernels one by one: `tune.py` at real sizes, `sanitize.py` at small odd ones.

A level function, such as `attention_bwd_bwd`, has the same name and arguments in Triton's launchers, in the compiled core and in plain
torch. Shape letters as in `registry.py`; `meta` as the device makes arguments without data, for compiling ahead of time.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

SEED, STEP = 2**33 + 5, 2**31 + 3  # both words of each
LEVELS = {
    "attention": ("attention_fwd", "attention_bwd", "attention_tan", "attention_bwd_bwd"),
    "group_norm_silu": ("group_norm_silu_fwd", "group_norm_silu_bwd", "group_norm_silu_tan", "group_norm_silu_bwd_bwd"),
    "gaussian_log_prob": ("gaussian_log_prob_fwd", "gaussian_log_prob_bwd", "gaussian_log_prob_bwd_bwd"),
    "guided_loss": ("guided_loss_fwd",),
    "noise_sample": ("noise_sample_fwd",),
    "random": ("random_normal", "random_uniform", "stratified_uniform"),
}
EXACT = ("noise_sample", "random")  # ops whose values are the same bits on every device and backend


@dataclass(frozen=True)
class Problem:
    """One call.

    Attributes:
        op: As kernels/<op>.py is called.
        level: The function.
        label: Sizes, dtype, layout.
        make: Device -> positional and keyword arguments.
    """

    op: str
    level: str
    label: str
    make: Callable[[str], tuple[tuple[Any, ...], dict[str, Any]]]

    @property
    def exact(self) -> bool:
        return self.op in EXACT

    def __str__(self) -> str:
        return f"{self.level} {self.label}"


def call(levels: Any, level: str, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[Tensor, ...]:
    """What a level returns, its absent outputs left out."""
    args, kwargs = arguments
    found = getattr(levels, level)(*args, **kwargs)
    return tuple(x for x in (found if isinstance(found, tuple | list) else (found,)) if x is not None)


def twin(problem: Problem, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[Tensor, ...]:
    """The truth: the level in plain torch, in float64; in the dtype of the arguments where every backend must give the same bits."""
    module = import_module(f"sami_fast.reference.{'stratified_uniform' if problem.level == 'stratified_uniform' else problem.op}")
    args, kwargs = arguments
    redrawn = problem.op == "guided_loss" and args[0] is None  # noise is rounded to the dtype of the images
    if not (problem.exact or redrawn):
        args = tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)
    return call(module, problem.level, (args, kwargs))


def error(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest of the outputs' root mean squares of the difference, over that of the expected; inf for another shape or for a NaN."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if a.shape != b.shape:
            return math.inf
        a, b = a.double(), b.to(a.device, torch.float64)
        size = (a - b).norm() / b.norm().clamp_min(1e-30) if b.numel() else b.sum()
        worst = max(worst, size.item() if size.isfinite() else math.inf)
    return worst


def dtype_label(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _normal(device: str, dtype: torch.dtype, *shape: int, seed: int) -> Tensor:
    if device == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)


def _twins(op: str, level: str, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """Arguments of later levels, from plain torch in float32."""
    args = tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)
    return call(import_module(f"sami_fast.reference.{op}"), level, (args, kwargs))


def attention(
    dtype: torch.dtype, batch: int, queries: int, keys: int, heads: int, size: int, inside: bool = False, causal: bool = False
) -> Iterator[Problem]:
    """Every level on [B, S, N, D]; with `inside` tokens lie side by side, as in a feature map. Joint where causal."""

    def tokens(device: str, length: int, seed: int) -> Tensor:
        if inside:
            return _normal(device, dtype, batch, heads, size, length, seed=seed).permute(0, 3, 1, 2)
        return _normal(device, dtype, batch, length, heads, size, seed=seed)

    def make(level: str, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        q, k, v, tq, tk, tv, grad_out = (
            tokens(device, n, seed) for seed, n in enumerate((queries, keys, keys, queries, keys, keys, queries))
        )
        grad_out, how = grad_out.contiguous(), (size**-0.5, causal)
        if level == "attention_fwd":
            return (q, k, v, *how), {}
        out, lse = _twins("attention", "attention_fwd", q, k, v, *how)
        out = out.to(dtype)
        if level == "attention_bwd":
            return (grad_out, q, k, v, out, lse, *how), {}
        if level == "attention_tan":
            return (tq, tk, tv, q, k, v, out, lse, *how), {}
        tout, tau = _twins("attention", "attention_tan", tq, tk, tv, q, k, v, out, lse, *how)
        return (tq, tk, tv, grad_out, q, k, v, out, lse, tout.to(dtype), tau, *how, grad_out if causal else None), {}

    label = f"B{batch} S{queries}x{keys} N{heads} D{size} {dtype_label(dtype)}{' inside' if inside else ''}{' causal' if causal else ''}"
    for level in LEVELS["attention"]:
        yield Problem("attention", level, label, partial(make, level))


def group_norm_silu(dtype: torch.dtype, batch: int, channels: int, side: int, groups: int, last: bool = False) -> Iterator[Problem]:
    """Every level on [B, C, H, W] with SiLU; `last` is channels last."""

    def image(device: str, seed: int) -> Tensor:
        x = _normal(device, dtype, batch, channels, side, side, seed=seed)
        return x.to(memory_format=torch.channels_last) if last else x

    def make(level: str, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x, grad_y, ggx, y_bar = (image(device, seed) for seed in range(4))
        weight, bias, ggweight, ggbias = (_normal(device, torch.float32, channels, seed=seed) for seed in range(4, 8))
        if level == "group_norm_silu_fwd":
            return (x, weight, bias, groups, 1e-5, True), {}
        _, mean, rstd = _twins("group_norm_silu", "group_norm_silu_fwd", x, weight, bias, groups, 1e-5, True)
        first = (x, weight, bias, mean, rstd, groups, True)
        if level == "group_norm_silu_bwd":
            return (grad_y, *first), {}
        if level == "group_norm_silu_tan":
            return (ggx, *first), {}
        return (ggx, ggweight, ggbias, grad_y, *first, y_bar, True), {}

    label = f"B{batch} C{channels} H{side} W{side} G{groups} {dtype_label(dtype)}{' last' if last else ''}"
    for level in LEVELS["group_norm_silu"]:
        yield Problem("group_norm_silu", level, label, partial(make, level))


def gaussian_log_prob(batch: int, size: int) -> Iterator[Problem]:
    """Every level on [B, Z], float32."""

    def make(level: str, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        z, mu, raw, ggz, ggmu, ggvar = (_normal(device, torch.float32, batch, size, seed=seed) for seed in range(6))
        var, grad = (0.3 * raw).exp(), _normal(device, torch.float32, batch, seed=6)
        if level == "gaussian_log_prob_fwd":
            return (z, mu, var), {}
        if level == "gaussian_log_prob_bwd":
            return (grad, z, mu, var), {}
        return (ggz, ggmu, ggvar, grad, z, mu, var), {}

    for level in LEVELS["gaussian_log_prob"]:
        yield Problem("gaussian_log_prob", level, f"B{batch} Z{size}", partial(make, level))


def _index(device: str, batch: int) -> Tensor:
    return torch.arange(batch, device=device) + (1 if device == "meta" else 2**34)


def guided_loss(dtype: torch.dtype, batch: int, levels: int, channels: int, side: int, last: bool = False) -> Iterator[Problem]:
    """[B K, C, H, W], with the noise stored and drawn again."""

    def make(stored: bool, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        images = [_normal(device, dtype, batch * levels, channels, side, side, seed=seed) for seed in range(3)]
        if last:
            images[1:] = (x.to(memory_format=torch.channels_last) for x in images[1:])
        scalars = [_normal(device, torch.float32, batch * levels, seed=seed).abs() for seed in range(3, 6)]
        eps, index = (images[0], None) if stored else (None, _index(device, batch))
        return (eps, *images[1:], *scalars, index, levels, SEED, STEP, 0), {}

    label = f"B{batch} K{levels} C{channels} H{side} W{side} {dtype_label(dtype)}{' last' if last else ''}"
    for stored in (True, False):
        yield Problem("guided_loss", "guided_loss_fwd", f"{label}, eps {'stored' if stored else 'drawn'}", partial(make, stored))


def noise_sample(dtype: torch.dtype, batch: int, levels: int, channels: int, side: int) -> Iterator[Problem]:
    """x_0 [B, C, H, W] to K noisy copies, with the noise stored."""

    def make(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x_0 = _normal(device, dtype, batch, channels, side, side, seed=0)
        alpha, sigma = (_normal(device, torch.float32, batch, levels, seed=seed).abs() for seed in (1, 2))
        return (x_0, alpha, sigma, _index(device, batch), SEED, STEP, 0, True), {}

    yield Problem("noise_sample", "noise_sample_fwd", f"B{batch} K{levels} C{channels} H{side} W{side} {dtype_label(dtype)}", make)


def random(batch: int, size: int, levels: int) -> Iterator[Problem]:
    """Normals and uniforms of `size` elements per sample; stratified uniforms of a whole batch."""

    def draw(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (SEED, STEP, 1, _index(device, batch), size), {}

    def strata(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.arange(batch, device=device), levels, batch), {"seed": SEED, "step": STEP}

    yield Problem("random", "random_normal", f"B{batch} of {size}", draw)
    yield Problem("random", "random_uniform", f"B{batch} of {size}", draw)
    yield Problem("random", "stratified_uniform", f"B{batch} K{levels}", strata)
