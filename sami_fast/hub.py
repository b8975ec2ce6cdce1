"""Where a saved model lies: a folder here, or a model of the Hugging Face hub, which is fetched; and how one gets there."""

import os
import re
from functools import cache
from pathlib import Path
from typing import TypedDict, Unpack

from .errors import UserError, one_line
from .files import absent
from .saved import SETTINGS, WEIGHTS, check_variant, weights_patterns

UNET = "diffusion_pytorch_model"  # begins the names of files of weights of a diffusers UNet


class HubOptions(TypedDict, total=False):
    """Which of a model's files are meant, in the words of huggingface_hub.

    Attributes:
        revision: Branch, tag or commit of a model of the hub; its main branch otherwise.
        token: Of a user of the hub, for private models; True or None for the one of `hf auth login`, False for none.
        cache_dir: Where models of the hub are kept; the hub's own cache otherwise.
        local_files_only: Whether only what was fetched before is looked at.
        subfolder: Inside the folder or the model of the hub.
        variant: In the names of the files of weights: "fp16" for model.fp16.safetensors.
    """

    revision: str | None
    token: str | bool | None
    cache_dir: str | Path | None
    local_files_only: bool
    subfolder: str
    variant: str | None


def _patterns(subfolder: str, variant: str | None) -> list[str]:
    """Of this package's models and of diffusers' UNets with their schedulers, beside each other or each in a folder; nothing pickled."""
    settings = [SETTINGS, "model_index.json", "scheduler_config.json", f"unet/{SETTINGS}", "scheduler/scheduler_config.json"]
    weights = [name for stem in (WEIGHTS, UNET, f"unet/{UNET}") for name in weights_patterns(stem, variant)]
    return [f"{subfolder}/{name}" if subfolder else name for name in settings + weights]


RUNS = "runs"  # where runs lie unless they are told otherwise: `runs/disks` is one that is not there, and nobody's model


def located(folder_or_id: str | os.PathLike[str], **options: Unpack[HubOptions]) -> Path:
    """The folder of a saved model.

    Args:
        folder_or_id: A run folder (its model/ is meant), a folder, or, as a string, when online and huggingface_hub is installed, a hub
            id. What looks like a path is one.
        options: `HubOptions`; of a folder that is here, only `subfolder` and `variant` mean anything.
    Raises:
        UserError: a file, a run that has no model yet, a hub id that cannot be fetched, or a subfolder that leads out of the folder.
    """
    check_variant(options.get("variant"))
    subfolder = options.get("subfolder") or ""
    if Path(subfolder).is_absolute() or ".." in Path(subfolder).parts:
        raise UserError(f"subfolder: expected a folder inside the model's, found {subfolder!r}")
    if isinstance(folder_or_id, str) and not Path(folder_or_id).exists() and _is_hub_id(folder_or_id):
        return _fetched(folder_or_id, **options) / subfolder
    folder = Path(folder_or_id) / subfolder
    if folder.is_file():
        raise UserError(
            f"{absent(folder, 'folder')}; a saved model is a folder with config.json and safetensors, and nothing pickled is read"
        )
    if (folder / "model" / "config.json").is_file():
        return folder / "model"
    if (folder / "config.yaml").is_file() and not (folder / "config.json").is_file():
        raise UserError(f"{folder}: has no model/ yet; train to the end first (--resume continues a run)")
    return folder


def _is_hub_id(name: str) -> bool:
    """Whether a name is owner/model; as a path it would begin with a folder that is there, with `runs`, or with a dot or a tilde."""
    owner, _, _ = name.partition("/")
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name, re.ASCII) is not None and owner != RUNS and not Path(owner).is_dir()


@cache  # one run asks for the same model several times
def _fetched(hub_id: str, **options: Unpack[HubOptions]) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{hub_id}: no such folder; loading a hub id needs `pip install huggingface_hub`") from None
    patterns = _patterns((options.get("subfolder") or "").strip("/"), options.get("variant"))
    try:
        found = snapshot_download(
            hub_id,
            revision=options.get("revision"),
            token=options.get("token"),
            cache_dir=options.get("cache_dir"),
            local_files_only=options.get("local_files_only", False),
            allow_patterns=patterns,
        )
    except Exception as error:  # offline, unknown id, no permission: each has a kind of its own
        raise UserError(f"{hub_id}: neither a folder here nor a model the hub would give ({one_line(error)})") from None
    return Path(found)


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload a model of sami-fast",
    variant: str | None = None,
) -> str:
    """Put the files of a folder into a model of the hub, which is made if it is not there. Weights of the same variant are replaced.

    Args:
        folder: What `save_pretrained` wrote.
        repo_id: owner/name, or a name of one's own.
        private: Whether a new model is; the owner's default when None.
        token: As in `HubOptions`.
        revision: Branch to commit to, made if it is not there; the main branch when None.
        create_pr: Propose the commit instead of making it.
        commit_message: Its first line.
        variant: Whose weights these are.
    Returns:
        Where the commit can be seen.
    Raises:
        UserError: huggingface_hub is not installed, or the hub refuses.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise UserError("push_to_hub: needs `pip install 'sami-fast[hub]'`") from None
    try:
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            delete_patterns=weights_patterns(WEIGHTS, variant),  # of what is there before, not of what is uploaded
        )
    except Exception as error:  # offline, no permission, no such owner: each has a kind of its own
        raise UserError(f"{repo_id}: the hub would not take the model ({one_line(error)})") from None
    _fetched.cache_clear()  # what was fetched before may be of a branch that has moved now
    return str(commit.commit_url)
