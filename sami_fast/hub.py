"""Where a saved model lies: a folder here, or a model of the Hugging Face hub, which is fetched."""

import os
import re
from functools import cache
from pathlib import Path

from .errors import UserError
from .files import absent

# Of this package's models and of diffusers' UNets with their schedulers; nothing pickled.
WEIGHTS = ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-*-of-*.safetensors"]  # a large model's lie in several files
FILES = ["config.json", "model.safetensors", "model_index.json", "scheduler_config.json", *WEIGHTS]
FOLDERS = ["unet/config.json", *(f"unet/{name}" for name in WEIGHTS), "scheduler/scheduler_config.json"]

RUNS = "runs"  # where runs lie unless they are told otherwise: `runs/disks` is one that is not there, and nobody's model


def located(folder_or_id: str | os.PathLike[str]) -> Path:
    """The folder of a saved model.

    Args:
        folder_or_id: A run folder (its model/ is meant), a folder, or, as a string, when online and huggingface_hub is installed, a hub
            id. What looks like a path is one.
    Raises:
        UserError: a file, a run that has no model yet, or a hub id that cannot be fetched.
    """
    folder = Path(folder_or_id)
    if folder.is_file():
        raise UserError(
            f"{absent(folder, 'folder')}; a saved model is a folder with config.json and safetensors, and nothing pickled is read"
        )
    if (folder / "model" / "config.json").is_file():
        return folder / "model"
    if (folder / "config.yaml").is_file() and not (folder / "config.json").is_file():
        raise UserError(f"{folder}: has no model/ yet; train to the end first (--resume continues a run)")
    if isinstance(folder_or_id, str) and not folder.exists() and _is_hub_id(folder_or_id):
        return _fetched(folder_or_id)
    return folder


def _is_hub_id(name: str) -> bool:
    """Whether a name is owner/model; as a path it would begin with a folder that is there, with `runs`, or with a dot or a tilde."""
    owner, _, _ = name.partition("/")
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name, re.ASCII) is not None and owner != RUNS and not Path(owner).is_dir()


@cache
def _fetched(hub_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{hub_id}: no such folder; loading a hub id needs `pip install huggingface_hub`") from None
    try:
        return Path(snapshot_download(hub_id, allow_patterns=FILES + FOLDERS))
    except Exception as error:  # offline, unknown id, no permission: each has a kind of its own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{hub_id}: neither a folder here nor a model the hub would give ({reason})") from None
