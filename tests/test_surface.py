"""What `sami_fast` offers: a frozen list of names, one object each however and in whatever order it is imported, known to type checkers."""

import ast
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sami_fast

ROOT = Path(__file__).resolve().parents[1]

# Users import these names. One that is taken away or moved breaks their code: change this list with the changelog.
SURFACE = {
    "Axes": "sami_fast.latents.axes",
    "Config": "sami_fast.config",
    "Sami": "sami_fast.methods.sami",
    "UserError": "sami_fast.errors",
    "accelerate": "sami_fast.accelerate",
    "edit": "sami_fast.latents.sampling",
    "interpolate": "sami_fast.latents.sampling",
    "load_config": "sami_fast.config",
    "load_model": "sami_fast.methods.registry",
    "reconstruct": "sami_fast.latents.sampling",
    "sample": "sami_fast.latents.sampling",
    "train": "sami_fast.train",
    "traverse": "sami_fast.latents.sampling",
    "use_backend": "sami_fast.ops",
}

# Names of files and of functions in them, of rooms, and of paths of before there were rooms.
ORDERS = [
    "import sami_fast",
    "import sami_fast.train, sami_fast.accelerate, sami_fast.ops",
    "from sami_fast.accelerate import Report; from sami_fast.train import main",
    "from sami_fast import accelerate, train; import sami_fast.accelerate, sami_fast.train, sami_fast.sampling, sami_fast.sami",
]


def test_the_list_is_frozen():
    assert set(sami_fast.__all__) == SURFACE.keys() | {"ops", "__version__"}
    assert dir(sami_fast) == sorted(sami_fast.__all__)
    exported = {
        alias.name
        for node in ast.parse((ROOT / "sami_fast/__init__.py").read_text()).body
        if isinstance(node, ast.If)
        for imported in node.body
        if isinstance(imported, ast.ImportFrom)
        for alias in imported.names
    }
    assert exported == SURFACE.keys() | {"ops"}  # for editors and type checkers


@pytest.mark.parametrize("name", SURFACE)
def test_each_name_is_one_object(name):
    home = importlib.import_module(SURFACE[name])
    assert getattr(sami_fast, name) is getattr(home, name)
    assert not isinstance(getattr(sami_fast, name), type(sys))


@pytest.mark.parametrize("first", ORDERS)
def test_each_name_is_one_object_in_every_order_of_imports(first):
    code = f"""
import importlib, sys
{first}
import sami_fast
for again in range(2):
    for name, home in {SURFACE!r}.items():
        found = getattr(importlib.import_module(home), name)
        assert callable(found) and getattr(sami_fast, name) is found is getattr(__import__("sami_fast", fromlist=[name]), name), name
    assert sami_fast.ops is sys.modules["sami_fast.ops"] and importlib.import_module("sami_fast.train").main
    from sami_fast.train import main, train
    from sami_fast.accelerate import Report, accelerate
    assert sami_fast.train is train and sami_fast.accelerate is accelerate
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_a_pickled_layer_finds_the_file_whose_name_is_a_function(tmp_path):
    """Pickles name the file: models that were accelerated and saved whole must load in a new process."""
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.GroupNorm(2, 4), torch.nn.SiLU())
    sami_fast.accelerate(model)
    torch.save(model, tmp_path / "model.pt")
    code = f"import torch; print(torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False))"
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=300, capture_output=True, text=True)
    assert "GroupNorm(2, 4" in done.stdout


def pyrefly(file: Path) -> str:
    """What the type checker says of a file."""
    places = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    if (program := shutil.which("pyrefly", path=places)) is None:
        pytest.skip("pyrefly, the type checker, is not installed")
    options = ["--summary=none", "--output-format=min-text", "--config", "pyproject.toml", "--python-interpreter-path", sys.executable]
    done = subprocess.run([program, "check", *options, str(file)], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


def test_the_type_checker_knows_every_name(tmp_path):
    good = ROOT / "tests/typed_surface.py"
    tree = ast.parse(good.read_text())
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "sami_fast"}
    assert used == set(sami_fast.__all__)
    wrong = tmp_path / "wrong.py"
    calls = ("sample(3, 4, seed=0)", "train(1)", "accelerate.main", "Ax", "load_model('runs/disks', revison='main')")
    wrong.write_text("\n".join(("import sami_fast", *(f"sami_fast.{call}" for call in calls))))
    assert pyrefly(good) == ""
    found = pyrefly(wrong).splitlines()
    assert len(found) == len(calls)
    for line, error in enumerate(found, start=2):
        assert f"wrong.py:{line}:" in error
