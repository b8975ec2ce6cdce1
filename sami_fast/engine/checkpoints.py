"""Checkpoint folders: a folder step_<n> either holds everything its manifest lists, byte for byte, or is not used."""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import PARTIAL

MANIFEST = "manifest.json"
FORMAT = 2  # of what `Engine.save` writes; 1 was DeepSpeed's own files
# What every manifest states.
FACTS = {"format", "files", "step", "world_size", "architecture", "settings", "validation_nats", "state", "adam_steps"}


def write_failure(error: Exception, folder: Path) -> str:
    """Why a write failed, in a user's words."""
    full = shutil.disk_usage(folder).free < 1 << 20
    return "the disk is full" if full else " ".join(str(error).split())


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fingerprint(path: Path) -> str:
    """sha256 of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint, or None when it has none that can be read."""
    manifest = _stated(checkpoint)
    complete = manifest.keys() >= FACTS and isinstance(manifest["files"], dict) and manifest["files"]
    return manifest if complete else None


def _stated(checkpoint: Path) -> dict[str, Any]:
    """What stands in a manifest, of whichever format; empty where nothing can be read."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def refuse_other_formats(folder: Path) -> None:
    """Checkpoints that another version wrote are neither damaged nor readable.

    Raises:
        UserError: there is one among those of a run.
    """
    for checkpoint in list_checkpoints(folder):
        manifest = _stated(checkpoint)
        if manifest.keys() >= {"files", "step"} and (found := manifest.get("format", 1)) != FORMAT:
            raise UserError(
                f"{checkpoint}: expected format {FORMAT}, found {found}; finish the run with the version of sami-fast "
                "that began it, or start again with --overwrite"
            )


def damage(checkpoint: Path) -> str:
    """Why a checkpoint cannot be used, or an empty string when every byte is as written."""
    manifest = read_manifest(checkpoint)
    if manifest is None:
        return "its manifest is missing or unreadable"
    for name, expected in manifest["files"].items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if fingerprint(file) != expected:
            return f"{name} is truncated or altered"
    return ""


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first, whole or not."""
    found = [p for p in folder.glob("step_*") if p.is_dir() and re.fullmatch("step_[0-9]+", p.name)]
    return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)


def set_damaged_aside(folder: Path, report: Callable[[str], None]) -> None:
    """Rename the newest checkpoints to damaged_* until one is whole, and tell `report` about each."""
    for checkpoint in list_checkpoints(folder):
        reason = damage(checkpoint)
        if not reason:
            return
        report(f"{checkpoint}: {reason}; falling back to the checkpoint before it")
        aside = checkpoint.with_name(f"damaged_{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(checkpoint, aside)


def remove_partial(folder: Path) -> None:
    """Remove what a killed process left half-written."""
    for leftover in folder.glob(f"{PARTIAL}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
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
            doomed = checkpoint.with_name(PARTIAL + checkpoint.name)
            os.rename(checkpoint, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
