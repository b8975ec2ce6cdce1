"""The machine at hand: the address that every row carries, and what it can do at best, measured."""

import ctypes
import os
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sami_fast.environment import cores, describe
from sami_fast.plan import GPUS

SMALLEST, LARGEST = 1 << 16, {"cpu": 1 << 28, "cuda": 1 << 31}  # bytes moved by the copies whose bandwidth bounds a row
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")  # that matter to kernels here


def address(device: str, command: str) -> dict[str, Any]:
    """Where and with what a row is measured: plain JSON values, one level deep.

    Args:
        device: "cpu" or "cuda".
        command: What makes the row again.
    """
    here, flags = describe(), (_cpuinfo("flags") or _cpuinfo("Features")).split()
    cuda = device == "cuda"
    return {
        "command": command,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "driver": _driver() if cuda else None,
        "cpu": _cpuinfo("model name") or platform.processor(),
        "cpu_features": " ".join(f for f in CPU_FEATURES if f in flags),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "python": here["python"],
        "torch": torch.__version__,
        "triton": here["packages"]["triton"],
        "cuda": here["cuda"],
        "commit": here["commit"] or os.environ.get("SAMI_FAST_COMMIT"),  # a tree without .git is told
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _driver() -> str | None:
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10).stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def _cpuinfo(key: str) -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


def keep_memory() -> None:
    """Freed memory stays with this process, as in a training run that has found its size.

    Otherwise glibc's malloc hands large tensors back to the system, or does not, by what happened to be freed before: the same call then
    takes or does not take thousands of page faults, a matter of a process' past and not of the op.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, (1 << 31) - 1)):
            mallopt(parameter, value)


def seconds(run: Callable[[], object], device: str, calls: int = 1) -> float:
    """Wall time of one call of `run`, among `calls` in a row; on a GPU by its own clock, from idle to idle."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize()
        return 1e-3 * begin.elapsed_time(end) / calls
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def best_seconds(run: Callable[[], object], device: str, budget: float = 0.15) -> float:
    """The shortest of several calls: what the machine can do when nothing else wants it. `budget` in seconds."""
    best, spent = seconds(run, device), 0.0
    calls = max(1, int(2e-3 / best)) if device == "cuda" else 1
    while spent < budget:
        once = seconds(run, device, calls)
        best, spent = min(best, once), spent + once * calls
    return best


@cache
def copy_bandwidth(size: int, device: str) -> float:
    """Bytes per second of a copy that moves so many bytes, read and written."""
    source = torch.ones(size // 8, device=device)  # half of the bytes, 4 each
    target = torch.empty_like(source)
    return size / best_seconds(lambda: target.copy_(source), device)


@cache
def matmul_rate(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of a large matrix product, as torch does it."""
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / best_seconds(lambda: a @ b, device)


def peak_rate(dtype: str) -> float | None:
    """FLOP/s of this GPU's tensor cores by its data sheet, dense; outside them for float32, which the engine does not round to TF32."""
    name = torch.cuda.get_device_name().lower() if torch.cuda.is_available() else ""
    found = next((gpu for key, gpu in GPUS.items() if key.split("-")[0] in name), None)
    return found.peak("bf16" if dtype == "bfloat16" else "fp32") if found else None


def roofline(moved: int | None, flops: int | None, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """The least time in which this machine could move these bytes and do these products, and which of the two decides.

    Args:
        moved: Bytes that must be read and written once; None if unknown.
        flops: Multiplications and additions of matrix products; None or 0 where only memory matters.
    Returns:
        bound_ms, None without either; bound, "memory" or "matmul"; bound_rate, what was measured for it in bytes/s or FLOP/s.
    """
    rates = {}
    if moved:
        # A copy of about the same size, so that caches count for the row where they count for the copy.
        size = min(max(SMALLEST, 1 << (moved - 1).bit_length()), LARGEST[device])
        rates["memory"] = (moved, copy_bandwidth(size, device))
    if flops:
        rates["matmul"] = (flops, matmul_rate(dtype, device))
    if not rates:
        return {"bound": None, "bound_ms": None, "bound_rate": None}
    name, (work, rate) = max(rates.items(), key=lambda item: item[1][0] / item[1][1])
    return {"bound": name, "bound_ms": 1e3 * work / rate, "bound_rate": rate}
