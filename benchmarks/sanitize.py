"""Every Triton kernel and every kernel of the compiled core once, at small odd sizes, values checked: made to run under compute-sanitizer.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m benchmarks.sanitize     # each tensor in memory of its own
compute-sanitizer --tool racecheck python -m benchmarks.sanitize triton

Without a GPU the same calls go to Triton's interpreter (TRITON_INTERPRET=1) and to the core's C++. Exit status 1 where a value is wrong.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sami_fast.ops import AttentionLaunchers, GroupNormSiLULaunchers
from sami_fast.ops.backend import refusal
from sami_fast.ops.gaussian_log_prob import GaussianLaunchers
from sami_fast.ops.guided_loss import GuidedLossLaunchers
from sami_fast.ops.launchers import Launchers
from sami_fast.ops.noise_sample import NoiseSampleLaunchers
from sami_fast.ops.random import RandomLaunchers
from sami_fast.ops.stratified_uniform import StratifiedUniformLaunchers

from .measure import dtype_label, relative_error

SEED, STEP = 2**33 + 5, 2**31 + 3  # both words of each
EXACT = (NoiseSampleLaunchers, RandomLaunchers, StratifiedUniformLaunchers)  # the same bits on every device and backend
# Largest error of an output, in rounding steps of the dtype: about four times the largest of the plain torch twin at these sizes.
LIMIT = 16

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # positional, keyword


@dataclass(frozen=True)
class Case:
    """One call of a launcher. Shape letters as in registry.py."""

    op: type[Launchers]
    launcher: str  # its attribute there
    label: str  # sizes, dtype, layout
    make: Callable[[], Arguments]  # on the CPU

    def __str__(self) -> str:
        return f"{getattr(self.op, self.launcher).twin.__name__} {self.label}"

    def call(self, backend: str, arguments: Arguments) -> list[Tensor]:
        """What the launcher returns, its absent outputs left out."""
        args, kwargs = arguments
        found = getattr(self.op(backend), self.launcher)(*args, **kwargs)
        return [x for x in (found if isinstance(found, tuple | list) else (found,)) if x is not None]


def _normal(dtype: torch.dtype, *shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _wide(*args: Any, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)


def attention(
    dtype: torch.dtype, batch: int, queries: int, keys: int, heads: int, size: int, inside: bool = False, causal: bool = False
) -> Iterator[Case]:
    """Every launcher on [B, S, N, D]; with `inside` tokens lie side by side, as in a feature map. Joint where causal."""

    def tokens(length: int, seed: int) -> Tensor:
        if inside:
            return _normal(dtype, batch, heads, size, length, seed=seed).permute(0, 3, 1, 2)
        return _normal(dtype, batch, length, heads, size, seed=seed)

    def make(launcher: str) -> Arguments:
        q, k, v, tq, tk, tv, grad_out = (tokens(n, seed) for seed, n in enumerate((queries, keys, keys, queries, keys, keys, queries)))
        grad_out, how = grad_out.contiguous(), (size**-0.5, causal)
        if launcher == "fwd":
            return (q, k, v, *how), {}
        twins = AttentionLaunchers("reference")
        out, lse = twins.fwd(*_wide(q, k, v), *how)
        out = out.to(dtype)
        if launcher == "bwd":
            return (grad_out, q, k, v, out, lse, *how), {}
        if launcher == "tan":
            return (tq, tk, tv, q, k, v, out, lse, *how), {}
        tout, tau = twins.tan(*_wide(tq, tk, tv, q, k, v, out, lse), *how)
        return (tq, tk, tv, grad_out, q, k, v, out, lse, tout.to(dtype), tau, *how, grad_out if causal else None), {}

    label = f"B{batch} S{queries}x{keys} N{heads} D{size} {dtype_label(dtype)}{' inside' if inside else ''}{' causal' if causal else ''}"
    for launcher in ("fwd", "bwd", "tan", "bwd_bwd"):
        yield Case(AttentionLaunchers, launcher, label, partial(make, launcher))


def group_norm_silu(dtype: torch.dtype, batch: int, channels: int, side: int, groups: int, last: bool = False) -> Iterator[Case]:
    """Every launcher on [B, C, H, W] with SiLU; `last` is channels last."""

    def image(seed: int) -> Tensor:
        x = _normal(dtype, batch, channels, side, side, seed=seed)
        return x.to(memory_format=torch.channels_last) if last else x

    def make(launcher: str) -> Arguments:
        x, grad_y, ggx, y_bar = (image(seed) for seed in range(4))
        weight, bias, ggweight, ggbias = (_normal(torch.float32, channels, seed=seed) for seed in range(4, 8))
        if launcher == "fwd":
            return (x, weight, bias, groups, 1e-5, True), {}
        _, mean, rstd = GroupNormSiLULaunchers("reference").fwd(*_wide(x, weight, bias), groups, 1e-5, True)
        first = (x, weight, bias, mean, rstd, groups, True)
        if launcher == "bwd":
            return (grad_y, *first), {}
        if launcher == "tan":
            return (ggx, *first), {}
        return (ggx, ggweight, ggbias, grad_y, *first, y_bar, True), {}

    label = f"B{batch} C{channels} H{side} W{side} G{groups} {dtype_label(dtype)}{' last' if last else ''}"
    for launcher in ("fwd", "bwd", "tan", "bwd_bwd"):
        yield Case(GroupNormSiLULaunchers, launcher, label, partial(make, launcher))


def gaussian_log_prob(batch: int, size: int) -> Iterator[Case]:
    """Every launcher on [B, Z], float32."""

    def make(launcher: str) -> Arguments:
        z, mu, raw, ggz, ggmu, ggvar = (_normal(torch.float32, batch, size, seed=seed) for seed in range(6))
        var, grad = (0.3 * raw).exp(), _normal(torch.float32, batch, seed=6)
        if launcher == "fwd":
            return (z, mu, var), {}
        if launcher == "bwd":
            return (grad, z, mu, var), {}
        return (ggz, ggmu, ggvar, grad, z, mu, var), {}

    for launcher in ("fwd", "bwd", "bwd_bwd"):
        yield Case(GaussianLaunchers, launcher, f"B{batch} Z{size}", partial(make, launcher))


def _index(batch: int) -> Tensor:
    return torch.arange(batch) + 2**34


def guided_loss(dtype: torch.dtype, batch: int, levels: int, channels: int, side: int, last: bool = False) -> Iterator[Case]:
    """[B K, C, H, W], with the noise stored and drawn again."""

    def make(stored: bool) -> Arguments:
        images = [_normal(dtype, batch * levels, channels, side, side, seed=seed) for seed in range(3)]
        if last:
            images[1:] = (x.to(memory_format=torch.channels_last) for x in images[1:])
        scalars = [_normal(torch.float32, batch * levels, seed=seed).abs() for seed in range(3, 6)]
        eps, index = (images[0], None) if stored else (None, _index(batch))
        return (eps, *images[1:], *scalars, index, levels, SEED, STEP, 0), {}

    label = f"B{batch} K{levels} C{channels} H{side} W{side} {dtype_label(dtype)}{' last' if last else ''}"
    for stored in (True, False):
        yield Case(GuidedLossLaunchers, "fwd", f"{label}, eps {'stored' if stored else 'drawn'}", partial(make, stored))


def noise_sample(dtype: torch.dtype, batch: int, levels: int, channels: int, side: int) -> Iterator[Case]:
    """x_0 [B, C, H, W] to K noisy copies, with the noise stored."""

    def make() -> Arguments:
        x_0 = _normal(dtype, batch, channels, side, side, seed=0)
        alpha, sigma = (_normal(torch.float32, batch, levels, seed=seed).abs() for seed in (1, 2))
        return (x_0, alpha, sigma, _index(batch), SEED, STEP, 0, True), {}

    yield Case(NoiseSampleLaunchers, "fwd", f"B{batch} K{levels} C{channels} H{side} W{side} {dtype_label(dtype)}", make)


def random(batch: int, size: int, levels: int) -> Iterator[Case]:
    """Normals and uniforms of `size` elements per sample; stratified uniforms of a whole batch."""

    def draw() -> Arguments:
        return (SEED, STEP, 1, _index(batch), size), {}

    def strata() -> Arguments:
        return (torch.arange(batch), levels, batch), {"seed": SEED, "step": STEP}

    yield Case(RandomLaunchers, "normal", f"B{batch} of {size}", draw)
    yield Case(RandomLaunchers, "uniform", f"B{batch} of {size}", draw)
    yield Case(StratifiedUniformLaunchers, "draw", f"B{batch} K{levels}", strata)


def cases(dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """Sizes that fill no tile, one head size per tile, one shape per layout, vector and tile of group norm, several programs and splits."""
    for dtype in dtypes:
        for size, inside in ((3, False), (24, False), (32, True), (40, False), (64, True), (96, False), (128, True)):
            yield from attention(dtype, 2, 72 if inside else 67, 72 if inside else 35, 2, size, inside, causal=inside)
        for channels, side, last in ((24, 1, False), (8, 3, False), (12, 7, False), (8, 8, False), (8, 12, False), (8, 24, False)):
            yield from group_norm_silu(dtype, 2, channels, side, 4, last)
        for channels, side in ((32, 9), (16, 5), (28, 6), (128, 5), (48, 7), (40, 3)):
            yield from group_norm_silu(dtype, 2, channels, side, 4, last=True)
        yield from group_norm_silu(dtype, 1, 2, 150, 1)  # split
        yield from group_norm_silu(dtype, 1, 6, 90, 1, last=True)
        for side, last in ((8, False), (7, False), (6, True), (5, True), (40, False)):
            yield from guided_loss(dtype, 3, 2, 3, side, last)
        for side in (8, 7, 31):
            yield from noise_sample(dtype, 3, 2, 3, side)
    for size in (1, 63, 64, 700):
        yield from gaussian_log_prob(5, size)
    for batch, size, levels in ((3, 7, 1), (37, 1025, 5)):
        yield from random(batch, size, levels)


def truth(case: Case, arguments: Arguments) -> list[Tensor]:
    """Plain torch in float64, or in the dtype of the arguments where every backend must give the same bits."""
    args, kwargs = arguments
    redrawn = case.op is GuidedLossLaunchers and args[0] is None  # noise is rounded to the dtype of the images
    return case.call("reference", (args if case.op in EXACT or redrawn else _wide(*args, dtype=torch.float64), kwargs))


def check(case: Case, backend: str, device: str) -> str | None:
    """What is wrong with a launcher's values; None if nothing is."""
    # Made and judged on the CPU: on the GPU only the kernels run, since a sanitizer slows down everything there.
    args, kwargs = case.make()
    given = tuple(x.to(device) if isinstance(x, Tensor) else x for x in args)
    found = [x.cpu() for x in case.call(backend, (given, kwargs))]
    expected = truth(case, (args, kwargs))
    if case.op in EXACT:
        return None if all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)) else "other bits than the reference"
    step = max(torch.finfo(x.dtype).eps for x in args if isinstance(x, Tensor) and x.is_floating_point())
    errors = [relative_error(a, b) / step for a, b in zip(found, expected, strict=True)]
    return None if all(error <= LIMIT for error in errors) else f"off by {max(errors):.0f} rounding steps"  # a NaN is too


def run(backend: str, device: str, dtypes: Sequence[torch.dtype], only: str, every: int) -> int:
    """The number of cases that are wrong."""
    wrong = number = 0
    for case in [case for case in cases(dtypes) if only in str(case)][::every]:
        reason = check(case, backend, device)
        number += 1
        if reason:
            wrong += 1
            print(f"{backend}: {case}: {reason}", flush=True)
    print(f"{backend} on {device}: {number} calls, {wrong} wrong", flush=True)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backends = ("triton", "cuda" if device == "cuda" else "cpp")
    parser.add_argument("backends", nargs="*", metavar="backend", help=f"{' and '.join(backends)} here")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds this")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth case")
    arguments = parser.parse_args()
    wrong = 0
    for backend in arguments.backends or backends:
        reason = refusal(backend, device, torch.float32) if backend in backends else f"expected {' or '.join(backends)}"
        if reason:
            print(f"{backend}: {reason}", file=sys.stderr)
            return 2
        # The interpreter's bfloat16 is cut, not rounded.
        half = {"triton": torch.bfloat16 if device == "cuda" else torch.float16, "cuda": torch.bfloat16}.get(backend)
        dtypes = [torch.float32, *([half] if half else [])]
        wrong += run(backend, device, dtypes, arguments.only, max(1, arguments.every))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
