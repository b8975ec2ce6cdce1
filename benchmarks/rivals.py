"""Other people's packages as rivals: how each is called, and whether it is there. Those of ops need a CUDA device.

Of two Triton attentions with some second-order support, jvp-flash-attention is here: to first order, and to second, where the check in
`registry.py` decides whether its double backward means anything. ebt-flash-attention computes another function, of two streams
of tokens at once, and has no row.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module, metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
PACKAGES = {  # distribution: module to import
    "jvp-flash-attention": "jvp_flash_attention.jvp_attention",
    "ebt-flash-attention": "ebt_flash_attention.ebt_attention",
    "flash-attn": "flash_attn",
    "liger-kernel": "liger_kernel.ops.group_norm",
    "apex": "apex.contrib.group_norm",  # NVIDIA's; a namesake on PyPI has no such module
    "diffusers": "diffusers",
    "jax": "jax",
    "nvidia-dali-cuda130": "nvidia.dali",
    "av": "av",
    "pillow": "PIL",
}
ON_GPUS = ("jvp-flash-attention", "ebt-flash-attention", "flash-attn", "liger-kernel", "apex")

Rival = tuple[Callable[..., Tensor], Sequence[str], Sequence[torch.dtype] | None]  # call, modes, dtypes: as of `registry.Implementation`


@cache
def missing(package: str) -> str | None:
    """Why a package cannot run here; None if it can."""
    try:
        import_module(PACKAGES[package])
    except Exception as error:  # whatever an extension built for another torch may raise
        return "not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be imported ({type(error).__name__}: {error})"
    return "needs a CUDA device" if package in ON_GPUS and not torch.cuda.is_available() else None


def installed() -> dict[str, str]:
    """Every package known here, with its version and why it has no row, if so."""
    found = {}
    for package in PACKAGES:
        reason = missing(package)
        if package == "ebt-flash-attention" and reason is None:
            reason = "computes another function, of two streams of tokens"
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            version = ""
        found[package] = " ".join(filter(None, (version, f"({reason})" if reason else "")))
    return found


def _present(rivals: dict[str, Rival]) -> dict[str, Rival]:
    return {package: rival for package, rival in rivals.items() if missing(package) is None}


def _jvp_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    attention = import_module(PACKAGES["jvp-flash-attention"]).attention
    return attention(*(x.transpose(1, 2).contiguous() for x in (q, k, v))).transpose(1, 2)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return import_module("flash_attn").flash_attn_func(q, k, v)


def attention() -> dict[str, Rival]:
    jvp, flash = (_jvp_attention, ("fwd", "bwd", "bwd_bwd"), None), (_flash_attn, ("fwd", "bwd"), HALF)
    return _present({"jvp-flash-attention": jvp, "flash-attn": flash})


def _liger_group_norm(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    group_norm: Any = import_module(PACKAGES["liger-kernel"]).LigerGroupNormFunction
    return F.silu(group_norm.apply(x, weight, bias, x.shape[1], num_groups, 1e-5))


def _apex_group_norm(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    functional = import_module(PACKAGES["apex"]).cuda_group_norm_nhwc_one_pass
    return functional(x.contiguous(memory_format=torch.channels_last), num_groups, weight, bias, 1e-5, "silu")


def group_norm_silu() -> dict[str, Rival]:
    modes = ("fwd", "bwd")
    return _present({"liger-kernel": (_liger_group_norm, modes, None), "apex": (_apex_group_norm, modes, None)})
