"""Fake CUDA tensors on a torch for CPUs: the device that torch asks for (device.cpp), and steps of configs on it (worker.py)."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def missing() -> str | None:
    """Why there are no such tensors here; None where there are."""
    if torch.backends.cuda.is_built():
        return "a torch for CUDA asks for a real device"
    return None if os.uname().sysname == "Linux" and shutil.which("g++") else "the fake device needs Linux and g++"


def watched(jobs: Sequence[dict[str, Any]]) -> list[list[Any]]:
    """What worker.py says of these jobs."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SAMI_FAST", "TRITON"))}
    command = [sys.executable, str(HERE / "worker.py"), str(_device()), json.dumps(jobs)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def _device() -> Path:
    """device.cpp, compiled once for each of its versions and torch's."""
    source, home = HERE / "device.cpp", Path(torch.__file__).parent
    library = (
        ROOT / "build/fake_gpu" / f"{hashlib.sha256(source.read_bytes() + str(home).encode()).hexdigest()[:12]}-{torch.__version__}.so"
    )
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=library.parent, delete=False) as unfinished:
            libraries = (f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{home / 'lib'}")
            flags = ("-std=c++20", "-shared", "-fPIC", f"-I{home / 'include'}")
            subprocess.run(["g++", *flags, str(source), "-o", unfinished.name, *libraries], check=True)
        Path(unfinished.name).rename(library)
    return library
