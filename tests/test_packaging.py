"""`kernels/` and `configs/` lie at the top of the tree and install inside the package, editable and as a wheel."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import sami_fast

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "sami_fast", "kernels", "configs", "csrc")


# Without .pth files: an editable install would lend the unpacked wheel its own core.
ALONE = (sys.executable, "-S", "-c")


def beside_torch(site: Path) -> str:
    return os.pathsep.join([str(site), *(p for p in sys.path if p.endswith("site-packages"))])


def run(*command: str, cwd: Path, pythonpath: Path | str | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """A fresh process in some folder that sees the installed package, or first of all what lies in `pythonpath`."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    if pythonpath is not None:
        environment["PYTHONPATH"] = str(pythonpath)
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=500, check=False)


def succeed(*command: str, cwd: Path, pythonpath: Path | str | None = None) -> str:
    done = run(*command, cwd=cwd, pythonpath=pythonpath)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def installed_editable() -> bool:
    # An .egg-info left in the source tree is a distribution of the same name, and found first from there.
    origins = [found.read_text("direct_url.json") for found in metadata.distributions(name="sami-fast")]
    return any(json.loads(origin).get("dir_info", {}).get("editable", False) for origin in origins if origin)


@pytest.mark.skipif(not installed_editable(), reason="sami-fast is not installed with `pip install -e .` here")
def test_editable_install_from_any_folder(tmp_path: Path) -> None:
    code = "import sami_fast.kernels, sami_fast.config as c; print(sami_fast.kernels.__file__, c.builtin_configs(), sep='\\n')"
    for folder in (tmp_path, ROOT):
        kernels, configs = succeed(sys.executable, "-c", code, cwd=folder).splitlines()
        assert Path(kernels) == ROOT / "kernels" / "__init__.py"
        assert Path(configs) == ROOT / "configs"


def test_bare_kernels_is_refused() -> None:
    # From the repository root the folder would otherwise pass for the unrelated package `kernels`.
    done = run(sys.executable, "-c", "import kernels", cwd=ROOT)
    assert done.returncode == 1
    assert "ImportError: import sami_fast.kernels, not kernels: this folder is installed inside the package" in done.stderr


def copy_sources(to: Path) -> Path:
    to.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(ROOT / name, to / name)
    return to


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, so that nothing is left in the tree and nothing old in it gets in."""
    folder = tmp_path_factory.mktemp("wheel")
    source, built = folder / "source", folder / "built"
    copy_sources(source)
    # Both build with the setuptools of this environment, so no network is needed.
    try:
        metadata.version("build")
        command = ["build", "--wheel", "--no-isolation", "--outdir", str(built), str(source)]
    except metadata.PackageNotFoundError:
        command = ["pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(built), str(source)]
    succeed(sys.executable, "-m", *command, cwd=folder)
    (found,) = built.glob("*.whl")
    return found


def test_wheel_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = archive.read(f"sami_fast-{PROJECT['version']}.dist-info/entry_points.txt").decode()
    assert {
        "sami_fast/__init__.py",
        "sami_fast/py.typed",
        "sami_fast/step.py",
        "sami_fast/kernels/__init__.py",
        "sami_fast/configs/disks.yaml",
    } <= names
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "sami_fast").rglob("*.py")}
    assert modules <= names
    configs = {f"sami_fast/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    assert configs <= names
    for folder in ("sami_fast/report/templates", "sami_fast/explore/page"):
        templates = {str(path.relative_to(ROOT)) for path in (ROOT / folder).iterdir()}
        assert templates
        assert templates <= names
    tops = {name.split("/")[0] for name in names}
    assert tops == {"sami_fast", f"sami_fast-{PROJECT['version']}.dist-info"}
    assert "sami-fast = sami_fast.cli:main" in entry_points


def test_the_source_distribution_is_typed(tmp_path: Path) -> None:
    """What a wheel is built from has the mark by which type checkers believe annotations."""
    pytest.importorskip("build", reason="the package build is not installed")
    source = copy_sources(tmp_path / "source")
    succeed(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(tmp_path), str(source), cwd=tmp_path)
    (found,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(found) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"sami_fast/py.typed", "sami_fast/__init__.py", "sami_fast/hub.py", "kernels/__init__.py"} <= names


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler in the path")
def test_the_core_in_the_wheel_is_one_library_for_many_versions(wheel: Path, tmp_path: Path) -> None:
    """Python's limited API and torch's stable ABI: no symbol of torch's C++, which changes from version to version."""
    assert "-cp311-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        (library,) = (name for name in archive.namelist() if name.endswith(".so"))
        archive.extract(library, tmp_path)
    assert library == "sami_fast/_C.abi3.so"
    needed = succeed("nm", "--dynamic", "--undefined-only", "--demangle", str(tmp_path / library), cwd=tmp_path)
    assert "aoti_torch" in needed
    assert not [line for line in needed.splitlines() if any(name in line for name in ("at::", "c10::", "torch::", "pybind11"))]


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler in the path")
def test_the_wheel_runs_on_its_core(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "import torch, sami_fast.ops as o; q = torch.ones(1, 3, 1, 8); print(o.attention(q, q, q, backend='cpp').sum().item())"
    assert succeed(*ALONE, code, cwd=tmp_path, pythonpath=beside_torch(tmp_path / "site")).strip() == "24.0"


def test_without_a_compiler_the_install_goes_on_and_a_run_says_so_once(tmp_path: Path) -> None:
    built = tmp_path / "built"
    built.mkdir()
    source = copy_sources(tmp_path / "source")
    done = run(sys.executable, "-c", f"import setup; setup.build_wheel({str(built)!r})", cwd=source, PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "installed without its compiled core, ops run on plain torch: there is no C++ compiler" in done.stderr
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(tmp_path / "site")
    code = "import torch, sami_fast.ops as o; q = torch.ones(1, 3, 1, 8); [o.attention(q, q, q) for _ in range(3)]"
    done = run(*ALONE, code, cwd=tmp_path, pythonpath=beside_torch(tmp_path / "site"), PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("ops on the CPU run on plain torch, which is slower; the compiled core: not built") == 1


@pytest.mark.parametrize(("known", "newest"), [("sm_90\\nsm_100\\nsm_120", "120"), ("sm_90\\nsm_100", "100")])
def test_a_build_holds_ptx_for_gpus_that_come_later(tmp_path: Path, known: str, newest: str) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\nprintf '{known}'\n")
    nvcc.chmod(0o755)
    code = "import setup; print(*setup.nvcc_command(setup.Path(), setup.architectures()))"
    said = run(sys.executable, "-c", code, cwd=ROOT, PATH=str(tmp_path)).stdout
    targets = re.findall(r"arch=compute_(\d+),code=(\w+)", said)
    assert {chip for chip, _ in targets} == {"80", "90", "100", newest}
    assert [pair for pair in targets if pair[1].startswith("compute")] == [(newest, f"compute_{newest}")]


def test_wheel_works_away_from_the_sources(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = "import sami_fast.kernels, sami_fast.config as c; print(sami_fast.kernels.__file__, c.builtin_configs(), sep='\\n')"
    kernels, configs = succeed(sys.executable, "-c", code, cwd=elsewhere, pythonpath=site).splitlines()
    assert Path(kernels) == site / "sami_fast" / "kernels" / "__init__.py"
    assert Path(configs) == site / "sami_fast" / "configs"
    assert (Path(configs) / "disks.yaml").is_file()

    command = [sys.executable, "-m", "sami_fast.train", "--config", "disks", "--dry-run", "--verbose", "engine.threads=1"]
    printed = succeed(*command, cwd=elsewhere, pythonpath=site)
    assert "name: disks" in printed
    assert "# Direct: no DeepSpeed" in printed
    assert not any(elsewhere.iterdir())


# Imports whose package has another name, and apex: NVIDIA's is built from source, what PyPI has of that name is something else.
PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml", "nvidia": "nvidia-dali-cuda130", "apex": None}


def test_every_import_is_declared() -> None:
    """In the dependencies or an extra: a package that comes only with another one may stop to come."""
    required = [*PROJECT["dependencies"], *(line for extra in PROJECT["optional-dependencies"].values() for line in extra)]
    declared = {re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in required} | {None, "sami_fast"}
    for file in [*(ROOT / "sami_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for top in {name.partition(".")[0] for name in names} - sys.stdlib_module_names:
                assert PACKAGES.get(top, top) in declared, f"{file} imports {top}, which pyproject.toml does not name"


def test_console_script_is_declared() -> None:
    assert PROJECT["scripts"] == {"sami-fast": "sami_fast.cli:main"}
    assert callable(metadata.EntryPoint("sami-fast", PROJECT["scripts"]["sami-fast"], "console_scripts").load())


def test_version_is_the_same_everywhere() -> None:
    assert PROJECT["version"] == sami_fast.__version__
