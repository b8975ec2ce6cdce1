"""Checkpoint folders: a folder step_<n> either holds everything its manifest lists, byte for byte, or is not used."""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard

from ..errors import UserError, one_line
from ..files import PARTIAL, is_partial, open_regular, partial_of, read_json, remove_partial, write_text_whole

MANIFEST = "manifest.json"
WEIGHTS = "training.safetensors"
FORMAT = 3  # of what `Engine.save` writes; 2 had no hash of the manifest itself, and is read; 1 was DeepSpeed's own files
READ = (2, FORMAT)
HASH = "manifest_sha256"


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value of a file is a finite number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e308


def is_count(value: Any) -> TypeGuard[int]:
    """Whether a value of a file is a whole number from 0 to what a file of any size could count."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


# What every manifest states, and what may stand there.
FACTS: dict[str, Callable[[Any], bool]] = {
    "format": lambda value: value in READ,
    "files": lambda value: isinstance(value, dict) and value.keys() == {WEIGHTS},
    "step": is_count,
    "world_size": is_count,
    "architecture": lambda value: isinstance(value, dict),
    "settings": lambda value: isinstance(value, dict),
    "validation_nats": lambda value: value is None or is_number(value),
    "state": lambda value: isinstance(value, dict),
    "adam_steps": is_count,
}


def write_failure(error: Exception, folder: Path) -> str:
    """Why a write failed, in a user's words."""
    full = shutil.disk_usage(folder).free < 1 << 20
    return "the disk is full" if full else one_line(error)


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes."""
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _hash_of(manifest: dict[str, Any]) -> str:
    """sha256 of all that a manifest states but this."""
    stated = {name: value for name, value in manifest.items() if name != HASH}
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()


def write_manifest(checkpoint: Path, facts: dict[str, Any]) -> None:
    """State what a checkpoint is and holds, in a way that shows any change of it.

    Raises:
        OSError: from the system.
    """
    manifest = {**facts, "format": FORMAT, "files": {WEIGHTS: sha256_of(checkpoint / WEIGHTS)}}
    write_text_whole(checkpoint / MANIFEST, json.dumps({**manifest, HASH: _hash_of(manifest)}, indent=1))


def read_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint, or None when it has none that can be trusted."""
    manifest = _stated(checkpoint)
    return None if _fault(checkpoint, manifest) else manifest


def _stated(checkpoint: Path) -> dict[str, Any]:
    """What stands in a manifest, of whichever format; empty where nothing can be read."""
    try:
        manifest = read_json(checkpoint / MANIFEST)
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _altered(manifest: dict[str, Any]) -> bool:
    return HASH in manifest and manifest[HASH] != _hash_of(manifest)


def _fault(checkpoint: Path, manifest: dict[str, Any]) -> str:
    """Why a manifest cannot be trusted; empty when it can."""
    if not manifest:
        return "its manifest is missing or unreadable"
    if _altered(manifest) or (HASH not in manifest and manifest.get("format") == FORMAT):
        return "its manifest is altered"
    if wrong := next((name for name, right in FACTS.items() if name not in manifest or not right(manifest[name])), None):
        return f"its manifest has no {wrong}, or a wrong one"
    if checkpoint.name != f"step_{manifest['step']}" or manifest["adam_steps"] > manifest["step"]:
        return f"its manifest says step {manifest['step']} and {manifest['adam_steps']} steps of Adam"
    return ""


def refuse_other_formats(folder: Path) -> None:
    """Checkpoints that another version wrote are neither damaged nor readable.

    Raises:
        UserError: there is one among those of a run.
    """
    for checkpoint in list_checkpoints(folder):
        manifest = _stated(checkpoint)
        found = manifest.get("format", 1)
        if manifest.keys() >= {"files", "step"} and not _altered(manifest) and is_count(found) and found not in READ:
            raise UserError(
                f"{checkpoint}: expected format {FORMAT}, found {found}; finish the run with the version of sami-fast "
                "that began it, or start again with --overwrite"
            )


def damage(checkpoint: Path) -> str:
    """Why a checkpoint cannot be used, or an empty string when every byte is as written."""
    manifest = _stated(checkpoint)
    if fault := _fault(checkpoint, manifest):
        return fault
    for name, expected in manifest["files"].items():
        try:
            if sha256_of(checkpoint / name) != expected:
                return f"{name} is truncated or altered"
        except OSError as error:
            return f"{name} is missing" if isinstance(error, FileNotFoundError) else f"{name} cannot be read ({error})"
    return ""


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first, whole or not."""
    found = [p for p in folder.glob("step_*") if p.is_dir() and re.fullmatch("step_[0-9]+", p.name)]
    return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)


def set_damaged_aside(
    folder: Path, report: Callable[[str], None], unfit: Callable[[Path, dict[str, Any]], str] = lambda checkpoint, manifest: ""
) -> None:
    """Rename the newest checkpoints to damaged_* until one can be used, and tell `report` about each.

    Args:
        unfit: Of a checkpoint whose every byte is as written and its manifest: why it is of no use all the same, or an empty string.
    """
    for checkpoint in list_checkpoints(folder):
        reason = damage(checkpoint) or unfit(checkpoint, _stated(checkpoint))
        if not reason:
            return
        report(f"{checkpoint}: {reason}; falling back to the checkpoint before it")
        aside = checkpoint.with_name(f"damaged_{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(checkpoint, aside)


def clear(folder: Path) -> None:
    """Remove what a killed process of this version or an earlier one left half-written, where no other trains."""
    remove_partial(folder)
    for leftover in folder.glob(f"{PARTIAL}*"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        elif not is_partial(leftover):  # of an earlier version: others are being written
            leftover.unlink(missing_ok=True)


def prune_checkpoints(folder: Path, keep_last: int, keep_best: bool) -> None:
    """Delete all but the newest `keep_last` and, if asked, the one with the lowest validation loss."""
    checkpoints = list_checkpoints(folder)
    keep = set(checkpoints[:keep_last])
    if keep_best:
        scored = [
            (nats, c) for c in checkpoints if (m := read_manifest(c)) and (nats := m["validation_nats"]) is not None and math.isfinite(nats)
        ]
        if scored:
            keep.add(min(scored, key=lambda pair: pair[0])[1])
    for checkpoint in checkpoints:
        if checkpoint not in keep:
            # Rename first: a kill in the middle must not leave a folder that looks like a checkpoint.
            doomed = partial_of(checkpoint)
            os.rename(checkpoint, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
