"""sami-fast: train and use SAMI (Score-based Autoencoder for Multiscale Inference, arXiv:2512.17127).

from sami_fast import Sami
model = Sami.from_pretrained("runs/disks")
posterior = model.encode(images)          # mu, var: [B, Z]
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["Sami", "UserError", "__version__", "accelerate", "use_backend"]

_HOME = {"Sami": "sami", "UserError": "errors", "accelerate": "accelerate", "use_backend": "ops"}


def __getattr__(name: str) -> Any:
    """Names load on first use: `import sami_fast` works anywhere and costs nothing."""
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
