"""Packages of sami-fast and its compiled core, and the build backend; everything else about the project stands in pyproject.toml.

The core (csrc/) is built where there is a C++20 compiler, its CUDA part where torch has CUDA and nvcc is in the path. Without them the
install goes on and says what is missing. A build needs torch's headers: those of the environment that is installed into, else the backend
asks for a torch of its own.

    SAMI_FAST_CUDA=1                   build the CUDA part for another machine, whatever torch is installed here; 0: leave it out
    TORCH_CUDA_ARCH_LIST="9.0 10.0"    architectures, instead of 8.0, 9.0, 10.0, and 12.0 where nvcc knows it, with PTX of the newest
    SAMI_FAST_CFLAGS="-fsanitize=…"    more flags for compiler and linker of the CPU part
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, build_meta, find_packages, setup
from setuptools.build_meta import *  # noqa: F403
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_TARGET = "0x020a000000000000"  # the oldest torch whose stable ABI is used: 2.10
ARCHITECTURES = "8.0 9.0 10.0"
PROCESSORS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
HEADERS = ["csrc/include", "{torch}/include", "{torch}/include/torch/csrc/api/include"]


def torch_home() -> Path | None:
    """The folder of torch: one that can be imported, or the installed one, which an isolated build does not see."""
    found = find_spec("torch")
    folders = [Path(found.origin).parent] if found and found.origin else []
    folders += [Path(sysconfig.get_path(key)) / "torch" for key in ("purelib", "platlib")]
    return next((folder for folder in folders if (folder / "include/torch/csrc/stable/library.h").is_file()), None)


def compiler() -> str | None:
    return shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def _with_torch(requirements: list[str]) -> list[str]:
    if torch_home() is not None or compiler() is None or platform.system() != "Linux":
        return requirements
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*requirements, *(needed for needed in project["dependencies"] if re.match(r"torch\b", needed))]


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    return _with_torch(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    return _with_torch(build_meta.get_requires_for_build_editable(config_settings))


def with_cuda(torch: Path) -> bool:
    """Whether the CUDA part is wanted and can be compiled."""
    wanted = os.environ.get("SAMI_FAST_CUDA") or ("1" if (torch / "lib/libtorch_cuda.so").is_file() else "0")
    if wanted not in ("0", "1"):
        raise SystemExit(f"SAMI_FAST_CUDA: expected 0 or 1, found {wanted!r}")
    if wanted == "1" and shutil.which("nvcc") is None:
        print("sami-fast: installed without CUDA kernels in its compiled core: nvcc is not in the path", file=sys.stderr)
        return False
    return wanted == "1"


def architecture_names(text: str) -> list[str]:
    names = [name for name in re.split(r"[;,\s]+", text) if name]
    for name in names:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: expected numbers such as 9.0, 9.0a or 10.0+PTX, found {name!r}")
    return names


def architectures() -> str:
    """Of a build that names none; GPUs newer than these compile the PTX of the newest."""
    known = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True, check=False).stdout.split()
    return ARCHITECTURES + (" 12.0+PTX" if "sm_120" in known else "+PTX")


def nvcc_command(torch: Path, architectures: str) -> list[str]:
    """The compiler of a `.cu` file, without the file; architectures as in TORCH_CUDA_ARCH_LIST, "8.0;9.0a 10.0+PTX"."""
    targets = []
    for name in architecture_names(architectures):
        chip = name.removesuffix("+PTX").replace(".", "")
        targets.append(f"-gencode=arch=compute_{chip},code=sm_{chip}")
        if name.endswith("+PTX"):
            targets.append(f"-gencode=arch=compute_{chip},code=compute_{chip}")
    return [
        *("nvcc", "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"),
        *(f"-I{folder.format(torch=torch)}" for folder in HEADERS),
        *(f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-DUSE_CUDA"),
        *targets,
    ]


def toolkit() -> Path:
    """Where CUDA's libraries lie: nvcc itself knows, while the one in the path may be a script that starts another."""
    said = subprocess.run(["nvcc", "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.+)$", said.stderr, re.MULTILINE)
    return Path(top[1].strip()) if top else Path(shutil.which("nvcc")).resolve().parents[1]


class BuildCore(build_ext):
    """Builds the extension, or says why not."""

    def run(self) -> None:
        self.force = True  # what is there may be of another torch, other flags, other architectures
        if torch_home() is None:
            self.skip("there is no torch to build against")
        elif compiler() is None:
            self.skip("there is no C++ compiler (c++, g++ or clang++) in the path")
        else:
            try:
                super().run()
            except Exception as error:
                self.skip(f"it does not compile here ({type(error).__name__}: {error})")

    def skip(self, reason: str) -> None:
        for extension in self.extensions:  # no older one may pass for this build's
            Path(self.build_lib, self.get_ext_filename(extension.name)).unlink(missing_ok=True)
            if self.inplace or self.editable_mode:
                (ROOT / self.get_ext_filename(extension.name)).unlink(missing_ok=True)
        self.extensions = []
        print(f"sami-fast: installed without its compiled core, ops run on plain torch: {reason}", file=sys.stderr)

    def build_extension(self, extension: Extension) -> None:
        """As in any build_ext, but one file per processor at a time, and nvcc for what is CUDA."""
        torch = torch_home()
        build = Path(self.build_temp)
        build.mkdir(parents=True, exist_ok=True)
        compile_one = self.compiler.compile

        def compile_all(sources: list[str], **arguments: object) -> list[str]:
            with ThreadPoolExecutor(PROCESSORS) as pool:
                return [found for one in pool.map(lambda source: compile_one([source], **arguments), sources) for found in one]

        def compile_cuda(source: Path) -> str:
            to = build / f"{source.stem}.cu.o"
            wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or architectures()
            subprocess.run([*nvcc_command(torch, wanted), "-c", str(source), "-o", str(to)], check=True)
            return str(to)

        self.compiler.compile = compile_all
        if with_cuda(torch):
            with ThreadPoolExecutor(PROCESSORS) as pool:
                extension.extra_objects = list(pool.map(compile_cuda, sorted(Path("csrc/cuda").glob("*.cu"))))
            folders = [*toolkit().glob("lib64"), *toolkit().glob("targets/*/lib"), torch / "lib"]
            if not (torch / "lib/libtorch_cuda.so").is_file():
                # Only its name is needed, for a machine that has it.
                subprocess.run([compiler(), "-shared", "-fPIC", "-x", "c++", os.devnull, "-o", str(build / "libtorch_cuda.so")], check=True)
                extension.extra_link_args += ["-Wl,--no-as-needed", f"-L{build}", "-ltorch_cuda"]
            else:
                extension.libraries.append("torch_cuda")
            extension.library_dirs += map(str, folders)
            extension.libraries += ["cudart_static", "dl", "rt", "pthread"]
        super().build_extension(extension)


def core() -> list[Extension]:
    torch = torch_home() or Path("torch")
    more = shlex.split(os.environ.get("SAMI_FAST_CFLAGS", ""))
    flags = ["-std=c++20", "-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
    return [
        Extension(
            "sami_fast._C",
            sources=["csrc/library.cpp", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cpu").glob("*.cpp"))],
            include_dirs=[folder.format(torch=torch) for folder in HEADERS],
            depends=[str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh", ".cu")],
            define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET), ("Py_LIMITED_API", "0x030b0000")],
            extra_compile_args=[*flags, "-Wall", "-Wno-psabi", *more],
            extra_link_args=more,
            library_dirs=[str(torch / "lib")],
            libraries=["torch_cpu"],
            py_limited_api=True,
        )
    ]


if __name__ == "__main__":
    setup(
        # `kernels` and `configs` lie at the top of the tree and install inside the package: a PyPI package `kernels` exists.
        packages=[*find_packages(include=["sami_fast", "sami_fast.*"]), "sami_fast.kernels", "sami_fast.configs"],
        package_dir={"sami_fast": "sami_fast", "sami_fast.kernels": "kernels", "sami_fast.configs": "configs"},
        package_data={
            "sami_fast": ["py.typed"],
            "sami_fast.configs": ["*.yaml"],
            "sami_fast.kernels": ["README.md"],
            "sami_fast.report": ["templates/*"],
            "sami_fast.explore": ["page/*"],
        },
        ext_modules=core() if platform.system() == "Linux" else [],
        cmdclass={"build_ext": BuildCore},
        # Python without its lock has no limited API yet.
        options={} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"bdist_wheel": {"py_limited_api": "cp311"}},
    )
