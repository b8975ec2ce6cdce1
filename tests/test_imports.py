"""Who may import whom: imports point down only, low layers need nothing but torch, and `import sami_fast` loads nothing heavy."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, KERNELS = ROOT / "sami_fast", ROOT / "kernels"

# What each part of the package may import from the others. Parts that are not listed stand above these.
ALLOWED = {
    "capabilities": set(),
    "environment": {"errors", "ops"},
    "errors": set(),
    "kl_weight": set(),
    "named": {"errors"},
    "pictures": set(),
    "progress": set(),
    "reference": set(),
    "kernels": set(),
    "ops": {"_C", "errors", "kernels", "reference"},
    "schedule": {"ops"},
    "sweeps": {"ops"},
    "accelerate": {"ops"},
    "adapters": {"accelerate", "errors", "named", "schedule"},
    "first_batch": {"adapters", "errors", "methods", "ops", "score", "step"},
    "score": {"errors", "ops", "sweeps"},
    "models": {"ops", "schedule", "sweeps"},
    "step": {"ops", "schedule", "score"},
    "hub": {"errors", "files", "saved"},
    "saved": {"errors", "files"},
    "pretrained": {"accelerate", "adapters", "errors", "hub", "models", "saved", "schedule"},
    "files": {"errors"},
    "config": {"adapters", "capabilities", "errors", "files", "models", "named", "schedule", "score"},
    "data": {"config", "environment", "errors", "files", "named", "ops", "pictures", "progress"},
    "methods": {
        "adapters",
        "config",
        "errors",
        "files",
        "hub",
        "models",
        "ops",
        "pictures",
        "pretrained",
        "saved",
        "schedule",
        "score",
        "step",
    },
    "engine": {"config", "environment", "errors", "files", "methods", "ops", "saved", "step"},
    "budget": {"config", "data", "engine", "errors", "progress", "step"},
    "preview": {"budget", "config", "data", "methods", "progress", "stages"},
    "stages": {"config", "data", "engine", "errors", "methods", "named"},
    "gpu_step": {"config", "kernels", "methods", "models", "ops", "step"},
    "plan": {"config", "data", "errors", "gpu_step", "methods", "score"},
    "metrics": {"methods", "ops", "progress", "schedule"},  # only `bound`, `scale_profile` and `guidance` run networks
    "latents": {"errors", "files", "methods", "metrics", "ops", "progress", "schedule"},
    "evaluation": {"config", "data", "errors", "files", "methods", "metrics", "progress"},
    "explore": {"data", "errors", "evaluation", "files", "latents", "methods", "metrics", "pictures", "progress"},
    "report": {"config", "data", "environment", "errors", "evaluation", "files", "latents", "methods", "metrics", "schedule"},
}

TORCH_ONLY = ("reference", "kernels", "ops", "schedule", "score", "sweeps", "models", "step", "kl_weight", "errors")


def module_name(path: Path) -> str:
    """The dotted name under which a source file is imported."""
    inside = path.relative_to(KERNELS if path.is_relative_to(KERNELS) else PACKAGE).with_suffix("")
    parts = ["sami_fast", *(["kernels"] if path.is_relative_to(KERNELS) else []), *inside.parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for folder in (PACKAGE, KERNELS) for path in sorted(folder.rglob("*.py"))}


def imported_names(module: str, *, at_import_time: bool = False) -> set[str]:
    """Dotted names a module imports, relative ones made absolute; with `at_import_time`, not those in functions or for type checkers."""
    tree, found = ast.parse(SOURCES[module].read_text()), set()
    package = module if SOURCES[module].name == "__init__.py" else module.rpartition(".")[0]
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if at_import_time and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if at_import_time and isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        waiting.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            # `from package import name` may name a module or something inside the package
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in SOURCES else base for alias in node.names}
    return found


def part(name: str) -> str:
    """The first level below the package: sami_fast.models.layers -> models."""
    return ".".join(name.split(".")[1:2])


def modules_of(*parts: str) -> list[str]:
    return [module for module in SOURCES if part(module) in parts]


def test_the_sources_are_found():
    assert {"sami_fast", "sami_fast.step", "sami_fast.models.layers", "sami_fast.kernels"} <= SOURCES.keys()
    for name in ALLOWED:
        assert modules_of(name), f"{name} is listed here but is no part of the package"
    assert imported_names("sami_fast.score") >= {"sami_fast.ops", "torch"}
    assert "sami_fast.models.layers" in imported_names("sami_fast.models.encoder")
    assert "sami_fast.config" in imported_names("sami_fast.data")


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_imports_point_down(name):
    for module in modules_of(name):
        ours = {part(other) for other in imported_names(module) if other.partition(".")[0] == "sami_fast"} - {name, ""}
        assert ours <= ALLOWED[name], f"{module} imports {', '.join(sorted(ours - ALLOWED[name]))}"


@pytest.mark.parametrize("name", TORCH_ONLY)
def test_low_layers_need_only_torch(name):
    allowed = {"sami_fast", "torch"} | ({"triton"} if name in ("kernels", "ops") else {"einops"} if name == "models" else set())
    for module in modules_of(name):
        top = {other.partition(".")[0] for other in imported_names(module)}
        assert top - sys.stdlib_module_names <= allowed, module


def test_the_reference_imports_torch_and_itself_only():
    for module in modules_of("reference"):
        for other in imported_names(module):
            top = other.partition(".")[0]
            assert top in sys.stdlib_module_names or top == "torch" or other.startswith("sami_fast.reference"), (module, other)


def test_models_and_ops_never_see_the_config():
    for module in modules_of("models", "ops", "reference", "kernels", "schedule", "score", "step"):
        assert "sami_fast.config" not in imported_names(module), module
        assert "yaml" not in imported_names(module), module


def test_a_method_does_not_see_the_config():
    """From a config to its networks is the work of one module; methods themselves take plain arguments."""
    for module in set(modules_of("methods")) - {"sami_fast.methods.build"}:
        assert "sami_fast.config" not in imported_names(module), module


def test_earlier_paths_give_the_modules_of_the_rooms():
    import sami_fast.discovery
    import sami_fast.sampling
    from sami_fast.latent_model import LatentModel

    from sami_fast.latents import discovery, sampling
    from sami_fast.methods import LatentModel as there

    assert sami_fast.sampling is sampling
    assert sami_fast.discovery is discovery
    assert LatentModel is there
    assert sampling.__name__ == sampling.__spec__.name == "sami_fast.latents.sampling"
    for old, new in sami_fast._MOVED.items():
        assert importlib.import_module(old) is importlib.import_module(new)


def test_nothing_imports_tests_or_benchmarks():
    for module in SOURCES:
        assert not {other.partition(".")[0] for other in imported_names(module)} & {
            "tests",
            "benchmarks",
            "helpers",
            "conftest",
            "pytest",
        }, module


def test_no_circles():
    """No module needs, while it is being imported, a module that needs it."""
    needs = {
        module: {other for other in imported_names(module, at_import_time=True) if other in SOURCES and other != module}
        for module in SOURCES
    }
    while leaves := {module for module, others in needs.items() if not others & needs.keys()}:
        needs = {module: others for module, others in needs.items() if module not in leaves}
    assert not needs, f"circle among {', '.join(sorted(needs))}"


def test_importing_the_package_loads_neither_torch_nor_deepspeed():
    code = "import sys, sami_fast; print(sami_fast.__version__, *(name for name in ('torch', 'deepspeed', 'numpy') if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True, cwd=ROOT.parent)
    assert len(done.stdout.split()) == 1, done.stdout


def test_no_part_imports_the_compiler():
    """torch._dynamo takes as long to import as the rest of torch."""
    parts = ("train", "cli", "evaluation", "report", "explore", "plan", "accelerate", "latents.sampling", "data")
    code = f"import sys, {', '.join(f'sami_fast.{part}' for part in parts)}; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True, cwd=ROOT.parent)
    assert done.stdout.strip() == "False"


def test_moving_latents_imports_no_compiler():
    code = f"""
import sys, torch
from sami_fast.config import load_config
from sami_fast.latents.sampling import traverse
from sami_fast.methods.build import build_model
model = build_model(load_config({str(ROOT / "tests/tiny.yaml")!r}), (1, 8, 8))
images = traverse(model, torch.zeros(1, 1, 8, 8), 0, [-1.0, 1.0], seed=0, num_steps=3)
print(torch.isfinite(images).all().item(), "torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT.parent)
    assert done.stdout.split() == ["True", "False"], done.stderr


def test_an_unknown_name_of_the_package():
    import sami_fast

    with pytest.raises(AttributeError, match="module 'sami_fast' has no attribute 'sammy'"):
        _ = sami_fast.sammy


def test_no_name_of_a_test_file_is_assigned_twice():
    """A second `pytestmark`, or a second test of the same name, would put the first to sleep without a word."""
    for path in sorted((ROOT / "tests").glob("*.py")):
        names: list[str] = []
        for node in ast.parse(path.read_text()).body:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
            names += [target.id for target in targets if isinstance(target, ast.Name)]
            names += [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
        assert len(names) == len(set(names)), (path.name, [name for name in names if names.count(name) > 1])
