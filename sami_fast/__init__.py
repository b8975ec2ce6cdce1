"""sami-fast: train and use SAMI (Score-based Autoencoder for Multiscale Inference, arXiv:2512.17127).

import sami_fast
model = sami_fast.load_model("runs/disks")
posterior = model.encode(images)          # mu, var: [B, Z]
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .environment import let_threads_sleep

if TYPE_CHECKING:
    from . import ops
    from .accelerate import accelerate
    from .config import Config, load_config
    from .errors import UserError
    from .latents.axes import Axes
    from .latents.sampling import edit, interpolate, reconstruct, sample, traverse
    from .methods.registry import load_model
    from .methods.sami import Sami
    from .ops import use_backend
    from .train import train

let_threads_sleep()

__version__ = "0.1.0"
__all__ = [
    "Axes",
    "Config",
    "Sami",
    "UserError",
    "__version__",
    "accelerate",
    "edit",
    "interpolate",
    "load_config",
    "load_model",
    "ops",
    "reconstruct",
    "sample",
    "train",
    "traverse",
    "use_backend",
]

# Where each public name stands; `ops` is a module.
_HOME = {
    "Axes": "latents.axes",
    "Config": "config",
    "Sami": "methods.sami",
    "UserError": "errors",
    "accelerate": "accelerate",
    "load_config": "config",
    "load_model": "methods.registry",
    "train": "train",
    "use_backend": "ops",
} | dict.fromkeys(("edit", "interpolate", "reconstruct", "sample", "traverse"), "latents.sampling")

# Modules by the paths they had before there were rooms, which people's code imports still.
_MOVED = {
    "sami_fast.axes_file": "sami_fast.latents.axes",
    "sami_fast.baselines": "sami_fast.methods.baselines",
    "sami_fast.discovery": "sami_fast.latents.discovery",
    "sami_fast.images": "sami_fast.latents.images",
    "sami_fast.latent_model": "sami_fast.methods.latent_model",
    "sami_fast.networks": "sami_fast.methods.build",
    "sami_fast.sami": "sami_fast.methods.sami",
    "sami_fast.sampling": "sami_fast.latents.sampling",
}


class _MovedModules(MetaPathFinder, Loader):
    """Imports of an earlier path give the very module that stands elsewhere now."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in _MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(_MOVED[spec.name])
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to run; the import system has just written the earlier path into `__spec__`, which is put right."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


sys.meta_path.append(_MovedModules())


class _Package(ModuleType):
    """`sami_fast.train` and `sami_fast.accelerate` are functions, each in a file of its own name.

    Python binds a file that is imported to its name in the package; here that name stays the function's. So `from sami_fast.train import
    main` reads the file, and `sami_fast.train` is the same function before and after.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


if not TYPE_CHECKING:  # which know the names from above, and would take any other for one

    def __getattr__(name: str) -> Any:
        """Names load on first use: `import sami_fast` works anywhere and costs nothing."""
        if name == "ops":
            return import_module(".ops", __name__)
        if name in _HOME:
            return getattr(import_module(f".{_HOME[name]}", __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
