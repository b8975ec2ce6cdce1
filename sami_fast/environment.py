"""What this machine is, asked in one place, since not every machine has an answer: its cores, its launcher, a place for caches.

`describe` says it together with which implementation each op would run: written into every run folder, printed by `sami-fast env`.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import UserError

PACKAGES = ("torch", "triton", "deepspeed", "numpy", "scipy", "scikit-learn", "pyyaml", "safetensors", "tensorboard", "pillow")
DATA_PACKAGES = (
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "av",
    "h5py",
    "pyarrow",
    "pillow-heif",
    "panda3d",
    "python-avatars",
    "resvg-py",
)  # of extras


def whole_number(name: str, default: int) -> int:
    """A whole number that a launcher left in the environment; the default where it left none, or left it empty.

    Raises:
        UserError: it is something else.
    """
    text = os.environ.get(name) or str(default)
    if not (text.isascii() and text.isdecimal()):
        raise UserError(f"environment variable {name}: expected a whole number, found {text!r}")
    return int(text)


WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")  # how a user says it to OpenMP, GNU's or Intel's


def let_threads_sleep() -> None:
    """Let the threads of torch's pool sleep soon while they wait for work, unless the user has said how they wait. Too late once torch is
    there; of GNU's OpenMP, which torch has on Linux.

    By default they spin for milliseconds, and where anything else uses one of the cores, every loop of every operator waits for the thread
    that has none. To sleep at once, OMP_WAIT_POLICY=PASSIVE, is slower than either where all cores are free: waking takes long.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in WAITING):
        os.environ["GOMP_SPINCOUNT"] = "10000"  # a few tenths of a millisecond


def cores() -> int:
    """Processors that this process may use: on a shared machine often fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS cannot say


def cores_of_rank() -> int:
    """This rank's share of the cores, if all ranks on this machine take the same; all of them where no launcher started it.

    Raises:
        UserError: as `whole_number`.
    """
    if not os.environ.get("RANK"):
        return cores()
    name = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if os.environ.get(name)), "WORLD_SIZE")
    return max(1, cores() // max(1, whole_number(name, 1)))


def is_first_rank() -> bool:
    """Whether this process is rank 0 of all, or works alone; known before the ranks have met."""
    return (os.environ.get("RANK") or "0") == "0"


def speaks() -> bool:
    """Whether this process prints errors: one per machine, since what is wrong may be wrong on one of them only."""
    return not os.environ.get("RANK") or (os.environ.get("LOCAL_RANK") or "0") == "0"


def temporary_home() -> Path:
    """A folder of this user's own among the temporary ones, where processes find what others of this user keep."""
    import tempfile  # here, as below: `import sami_fast` reads this file, and costs nothing

    folder = Path(tempfile.gettempdir()) / f"sami-fast-{os.geteuid()}"
    with suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        if not folder.is_symlink() and folder.stat().st_uid == os.geteuid():
            return folder
    return Path(tempfile.mkdtemp(prefix="sami-fast-"))  # that name is somebody else's


def cache_home() -> Path:
    """Where to keep what can be made again. A container may run as a user who has no home: then it is among the temporary files."""
    if home := os.environ.get("XDG_CACHE_HOME"):
        return Path(home)
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        return temporary_home()


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the source tree this package runs from, with a + when it has local changes; None for a wheel."""
    import subprocess

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
    import platform

    import torch

    from . import __version__, ops

    return {
        "sami_fast": __version__,
        "commit": _commit(),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {"machine": platform.machine(), "cores": cores(), "threads": torch.get_num_threads()},
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "packages": {name: _version(name) for name in (*PACKAGES, *DATA_PACKAGES)},
        "ops": ops.describe(),
    }
