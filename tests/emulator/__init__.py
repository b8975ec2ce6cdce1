"""csrc/cuda on a CPU: the CUDA execution model in C++ (emulator.h, runtime.cpp), and the kernels rewritten for it (rewrite.py).

    cuda = Emulator()                                     # builds it, once per content of csrc/ and of this folder, into build/emulator/
    out, lse = cuda.attention_fwd(q, k, v, 0.3, False)    # any launcher, on CPU tensors
    cuda.counts["attention_fwd_kernel<...>"].mma

What a kernel does wrong raises a RuntimeError that names kernel, block, thread, address and line.
"""

import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .rewrite import rewrite

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC, BUILD = ROOT / "csrc", ROOT / "build/emulator"
# Shared memory of a block, with what a kernel asks for by cudaFuncSetAttribute and what it declares: CUDA C++ Programming Guide, table of
# technical specifications per compute capability.
SHARED_LIMITS = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10}


@dataclass(frozen=True)
class Edit:
    """A change of a source before it is compiled: `old`, which stands there once, becomes `new`."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Counts:
    """Of one kernel, summed over its launches."""

    launches: int
    blocks: int
    barriers: int
    mma: int
    ldmatrix: int
    shuffles: int
    wavefronts: int  # passes through the banks of shared memory; where `counting`
    conflicts: int  # how many of them would not be there without bank conflicts; where `counting`
    global_read: int  # bytes; where `tracking`
    global_write: int  # bytes; where `tracking`
    shared_bytes: int  # of a block, the most


class Emulator:
    """A build of the kernels.

    Args:
        files: Which of csrc/cuda; all when empty.
        edits: To make to them.
    Attributes:
        seed: Of the order in which threads and blocks run.
        tracking: Check every load and store, which takes longer; without it guard pages alone catch accesses out of bounds.
        counting: Count them as well, and the passes that they take through the banks of shared memory.
        device: One of SHARED_LIMITS.
        planted: Which of the faults in `edits` is in force, as emulator::planted(n) asks; 0 for none.
    """

    def __init__(self, files: Sequence[str] = (), edits: Sequence[Edit] = ()) -> None:
        self.seed, self.tracking, self.counting, self.device, self.planted = 0, True, False, "sm_90", 0
        self._files, self._edits = files, edits

    @cached_property
    def _library(self) -> ctypes.CDLL:
        path, self._namespace = build(self._files, self._edits)
        torch.ops.load_library(path)
        library = ctypes.CDLL(path)
        library.emulator_configure.argtypes = (
            *(ctypes.c_uint64, ctypes.c_bool, ctypes.c_bool),
            *(ctypes.c_int, ctypes.c_size_t, ctypes.c_int),
        )
        library.emulator_counts.restype = ctypes.c_char_p
        library.emulator_attribute_calls.restype = ctypes.c_uint64
        self._path = path
        return library

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """A launcher. Its tensors are copied between guard pages first, storages whole, so that views stay views."""
        if name.startswith("_"):
            raise AttributeError(name)
        launcher = getattr(getattr(torch.ops, (self._library, self._namespace)[1]), name)

        def launch(*args: Any, **options: Any) -> Any:
            with self._guarded():
                storages: dict[int, Tensor] = {}
                args = tuple(_guard(x, storages) if isinstance(x, Tensor) else x for x in args)
                return self._run(launcher, args, options)

        return launch

    def in_place(self, name: str, *args: Any) -> Any:
        """A launcher on tensors where they are, for those too large to copy."""
        self._configure()
        return self._run(getattr(getattr(torch.ops, (self._library, self._namespace)[1]), name), args, {})

    def _run(self, launcher: Callable[..., Any], args: tuple, options: dict) -> Any:
        try:
            return launcher(*args, **options)
        except RuntimeError as error:
            message = re.sub(r"\[\+(\w+)\]", lambda m: f"({_line(self._path, m[1])})", str(error))
            raise RuntimeError(re.sub(r"^void .*?\)(?: \[with .*?\])?(?=[,:])", lambda m: _short(m[0]), message)) from None

    def _configure(self) -> None:
        number = list(SHARED_LIMITS).index(self.device)
        self._library.emulator_configure(self.seed, self.tracking, self.counting, number, SHARED_LIMITS[self.device], self.planted)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        self._configure()
        self._library.emulator_guard(True)
        try:
            yield
        finally:
            self._library.emulator_guard(False)

    @property
    def counts(self) -> dict[str, Counts]:
        """By kernel, since `clear`."""
        rows = (line.split("\t") for line in self._library.emulator_counts().decode().splitlines())
        return {_short(name): Counts(*map(int, numbers)) for name, *numbers in rows}

    @property
    def attribute_calls(self) -> int:
        """How often cudaFuncSetAttribute was called."""
        return self._library.emulator_attribute_calls()

    def clear(self) -> None:
        self._library.emulator_clear_counts()


def _guard(x: Tensor, storages: dict[int, Tensor]) -> Tensor:
    if x.device.type != "cpu" or x.numel() == 0:
        return x
    storage = x.untyped_storage()
    if storage.data_ptr() not in storages:
        copy = torch.empty(storage.nbytes() // x.element_size(), dtype=x.dtype)
        copy.untyped_storage().copy_(storage)
        storages[storage.data_ptr()] = copy
    copy = storages[storage.data_ptr()]
    return torch.empty(0, dtype=x.dtype).set_(copy.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def _short(name: str) -> str:
    """void sami_fast::{anonymous}::f_kernel(...) [with T = float; int D = 16] -> f_kernel<float, 16>"""
    kernel = re.search(r"(\w+)\(", name.replace("(anonymous namespace)", ""))[1]
    arguments = re.search(r"\[with (.*)\]$", name)
    pairs = [part.split(" = ", 1) for part in arguments[1].split("; ")] if arguments else []
    values = [value for parameter, value in pairs if not re.search(r"::|_t$", parameter)]
    return kernel + (f"<{', '.join(values)}>" if values else "")


def _line(path: str, offset: str) -> str:
    if shutil.which("addr2line") is None:
        return f"code at {offset}"
    said = subprocess.run(["addr2line", "-s", "-e", path, offset], capture_output=True, text=True, check=False).stdout
    return said.split(" ")[0].strip()


def cuda_headers() -> Path | None:
    """The toolkit's, or those that come with Triton."""
    folders = [Path("/usr/local/cuda/include")]
    if (nvcc := shutil.which("nvcc")) is not None:
        folders.insert(0, Path(nvcc).resolve().parents[1] / "include")
    try:
        import triton

        folders.append(Path(triton.__file__).parent / "backends/nvidia/include")
    except ImportError:
        pass
    return next((folder for folder in folders if (folder / "cuda_fp16.h").is_file()), None)


def missing() -> str | None:
    """Why there is no emulator here; None where there is."""
    if os.uname().sysname != "Linux" or os.uname().machine != "x86_64":
        return "the emulator runs on Linux on x86-64"
    if shutil.which("g++") is None:
        return "the emulator needs g++"
    return None if cuda_headers() is not None else "the emulator needs CUDA's headers, of the toolkit or of Triton"


def build(files: Sequence[str] = (), edits: Sequence[Edit] = ()) -> tuple[str, str]:
    """The library and its namespace of torch.ops; compiled where there is none of the same content yet, a file at a time and processor."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build(files, edits)


def _build(files: Sequence[str], edits: Sequence[Edit]) -> tuple[str, str]:
    torch_home = Path(torch.__file__).parent
    flags = [
        *("-std=c++20", "-O1", "-g1", "-fPIC", "-ffp-contract=off", "-fno-gnu-unique", "-fno-tree-sra", "-fvisibility=hidden", "-w"),
        *(f"-I{folder}" for folder in (HERE / "include", HERE, CSRC / "include", torch_home / "include")),
        *("-I" + str(torch_home / "include/torch/csrc/api/include"), f"-I{cuda_headers()}", "-DUSE_CUDA"),
    ]
    kernels = [*flags, "-DTORCH_TARGET_VERSION=0x020a000000000000", "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"]
    version = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
    found = [*CSRC.glob("*.h"), *(CSRC / "include").rglob("*.h"), *(CSRC / "cuda").iterdir(), CSRC / "library.cpp"]
    texts = {path: path.read_text() for path in sorted(found)}
    for edit in edits:
        path = CSRC / "cuda" / edit.file
        if texts[path].count(edit.old) != 1:
            raise ValueError(f"{edit.file}: expected once, found {texts[path].count(edit.old)} times: {edit.old}")
        texts[path] = texts[path].replace(edit.old, edit.new)
    ours = [(HERE / name).read_text() for name in ("prelude.h", "emulator.h", "rewrite.py", "include/nv/target")]
    common = _digest(torch.__version__, version, *kernels, *ours)
    headers = _digest(common, *(text for path, text in texts.items() if path.suffix in (".h", ".cuh")))
    sources = [path for path in texts if path.suffix == ".cu" and (not files or path.name in files)]
    engine = _digest(*flags, *((HERE / name).read_text() for name in ("emulator.h", "memory.h", "runtime.cpp", "memory.cpp")))
    whole = _digest(headers, engine, *(path.name + texts[path] for path in sources), texts[CSRC / "library.cpp"])
    namespace, library = f"sami_fast_emulated_{whole}", BUILD / f"{whole}.so"
    if library.exists():
        return str(library), namespace

    prelude = BUILD / common / "prelude.h"
    if not prelude.with_suffix(".h.gch").exists():
        prelude.parent.mkdir(exist_ok=True)
        prelude.write_text((HERE / "prelude.h").read_text())
        _compile([*kernels, "-x", "c++-header", str(prelude)], prelude.with_suffix(".h.gch"))
    folder = BUILD / headers / "cuda"
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        if path.suffix in (".h", ".cuh") and CSRC / "include" not in path.parents:
            target = BUILD / headers / path.relative_to(CSRC)
            target.parent.mkdir(exist_ok=True)
            target.write_text(rewrite(text, str(path.relative_to(ROOT)), namespace))

    def compile_one(path: Path) -> Path:
        source = folder / f"{path.stem}_{whole}.cpp"
        source.write_text(
            rewrite(texts[path], str(path.relative_to(ROOT)), namespace)
            .replace("#include <Python.h>", "")
            .partition("static struct PyModuleDef")[0]
        )
        return _compile([*kernels, "-include", str(prelude), "-c", str(source)], source.with_suffix(".o"))

    def compile_engine(path: Path) -> Path:
        return _compile([*flags, "-O3", "-c", str(path)], BUILD / f"{path.stem}_{engine}.o")

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        tasks = [pool.submit(compile_one, path) for path in (*sorted(sources, key=lambda path: -len(texts[path])), CSRC / "library.cpp")]
        tasks += [pool.submit(compile_engine, HERE / name) for name in ("runtime.cpp", "memory.cpp")]
        objects = [str(task.result()) for task in tasks]
    libraries = ["-L" + str(torch_home / "lib"), "-ltorch_cpu", "-lc10", "-ldl"]
    _compile(["-shared", "-Wl,-Bsymbolic", "-Wl,-z,defs", *objects, *libraries], library)
    for done in BUILD.iterdir():  # what it was made of, but for the precompiled headers of now, which are large
        if done.is_dir() and done != prelude.parent:
            shutil.rmtree(done)
    return str(library), namespace


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def _compile(arguments: list[str], target: Path) -> Path:
    if not target.exists():
        unfinished = target.with_name(target.name + ".part")
        done = subprocess.run(["g++", *arguments, "-o", str(unfinished)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the emulator does not compile:\n{done.stderr[-8000:]}")
        unfinished.rename(target)
    return target
