"""What this machine is and which implementation each op would run: written into every run folder, printed by `sami-fast env`."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "deepspeed", "numpy", "scipy", "scikit-learn", "pyyaml", "safetensors", "tensorboard", "pillow")
DATA_PACKAGES = (
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "av",
    "h5py",
    "pyarrow",
    "panda3d",
    "python-avatars",
    "resvg-py",
)  # of extras


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the source tree this package runs from, with a + when it has local changes; None for a wheel."""
    here = Path(__file__).resolve().parents[1]
    if not (here / ".git").exists():
        return None
    try:
        run = {"cwd": here, "capture_output": True, "text": True, "check": True, "timeout": 10}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **run).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain"], **run).stdout.strip()
        return commit + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def describe() -> dict[str, Any]:
    """Versions, hardware and the implementation of every op. Plain JSON values."""
    import torch

    from . import __version__, ops

    return {
        "sami_fast": __version__,
        "commit": _commit(),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {"machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "packages": {name: _version(name) for name in (*PACKAGES, *DATA_PACKAGES)},
        "ops": ops.describe(),
    }
