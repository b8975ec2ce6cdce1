"""Where a saved model lies: a folder here, or a model of the Hugging Face hub, which is fetched."""

import os
from functools import cache
from pathlib import Path

from .errors import UserError

# Of this package's models and of diffusers' UNets with their schedulers; nothing pickled.
FILES = ["config.json", "model.safetensors", "model_index.json", "scheduler_config.json", "diffusion_pytorch_model.safetensors"]
FOLDERS = ["unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"]


def located(folder_or_id: str | os.PathLike[str]) -> Path:
    """The folder of a saved model.

    Args:
        folder_or_id: A run folder (its model/ is meant), a folder, or, when online and huggingface_hub is installed, a hub id.
    Raises:
        UserError: a run that has no model yet, or a hub id that cannot be fetched.
    """
    folder = Path(folder_or_id)
    if (folder / "model" / "config.json").is_file():
        return folder / "model"
    if (folder / "config.yaml").is_file() and not (folder / "config.json").is_file():
        raise UserError(f"{folder}: has no model/ yet; train to the end first (--resume continues a run)")
    if not folder.exists() and str(folder_or_id).count("/") == 1:
        return _fetched(str(folder_or_id))
    return folder


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
