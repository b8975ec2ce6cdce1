"""The folder of a run: who may write there, its log, its small files. Everything here happens on one rank."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UserError
from ..files import PARTIAL, append_text, is_removed, open_lock, open_regular, parse_json, take_lock, write_text_whole, write_whole
from . import checkpoints

CONTENTS = {"config.yaml", "environment.json", "metrics.jsonl", "tensorboard", "csv", "checkpoints", "model", "report", ".lock"}
BLANK = {"config.yaml", "environment.json", "tensorboard", "csv", "checkpoints"}  # before the first step


class RunFolder:
    """runs/<name>/ of one training process.

    Args:
        path: The folder; need not exist.
        patient: Wait for another process that trains there, instead of refusing.
    """

    def __init__(self, path: Path, patient: bool = False) -> None:
        self.path, self.checkpoints, self.patient = path, path / "checkpoints", patient
        self._lock: BinaryIO | None = None

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Whether a run may begin here.

        Raises:
            UserError: it holds a run and neither resume nor overwrite is asked for, or it is no run folder.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: expected a run folder, found a file; set name= or runs_dir=")
        entries = {entry.name for entry in self.path.iterdir()} if self.path.exists() else set()
        entries = {name for name in entries if not (name.startswith(PARTIAL) or is_removed(Path(name)))} - {".lock"}
        if entries and not (resume or overwrite) and not self._is_blank(entries):
            raise UserError(f"{self.path}: holds a run already; continue it with --resume, replace it with --overwrite, or set name=")
        if entries and not (entries & {"checkpoints", "environment.json"} and (resume or entries <= CONTENTS)):
            strange = ", ".join(sorted(entries - CONTENTS)[:1]) or "no run"
            raise UserError(f"{self.path}: expected a run folder, and this one holds {strange}; set name= or runs_dir=")

    def _is_blank(self, entries: set[str]) -> bool:
        """Whether it holds a run of which nothing is lost: one that ended before its first step."""
        return "environment.json" in entries and entries <= BLANK and not checkpoints.list_checkpoints(self.checkpoints)

    def require_room(self, needed: int, *, overwrite: bool) -> None:
        """Whether so many bytes can be written here.

        Raises:
            UserError: they cannot.
        """
        place = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.is_dir())
        free = shutil.disk_usage(place).free
        if overwrite and self.path.is_dir():
            free += sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())
        if free < needed:
            raise UserError(
                f"{self.path}: expected room for a checkpoint of {needed / 1e6:.1f} MB, found {free / 1e6:.1f} MB; "
                "free some, set runs_dir= to another disk, or take smaller networks"
            )

    def lock(self) -> None:
        """Make the folder this process's own until `release` or the process's end, if it is not yet.

        Raises:
            UserError: another process trains there, and this one is not `patient`.
            OSError: the system refuses.
        """
        if self._lock is not None:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        lock = self._lock = open_lock(self.path / ".lock")  # held as long as the run
        taken = take_lock(lock, wait=False)
        if taken is None:
            print(f"{self.path}: this file system has no locks; see to it that nothing else trains there", flush=True)
        elif not taken:
            if not self.patient:
                self.release()
                raise UserError(f"{self.path}: another process is training there")
            print(f"{self.path}: another process is training there; waiting for it", flush=True)
            take_lock(lock, wait=True)

    def claim(self, *, resume: bool, overwrite: bool, afresh: Sequence[str] = ()) -> None:
        """`lock` the folder, and clear it of what a killed process left half-written.

        Args:
            afresh: Folders in it that are made again from the log, and are removed.
        Raises:
            UserError: as `check` and `lock`.
            OSError: the system refuses.
        """
        self.check(resume=resume, overwrite=overwrite)
        self.lock()
        if overwrite:
            # Last what makes it a run folder: a kill in between must leave one.
            for entry in sorted(self.path.iterdir(), key=lambda entry: entry.name == "environment.json"):
                if entry.is_dir():
                    shutil.rmtree(entry)
                elif entry.name != ".lock" and not is_removed(entry):
                    entry.unlink()
        for name in afresh:
            shutil.rmtree(self.path / name, ignore_errors=True)
        self.checkpoints.mkdir(exist_ok=True)
        for folder in (self.path, self.checkpoints, self.path / "model", self.path / "report"):
            checkpoints.clear(folder)

    def release(self) -> None:
        """Let other processes have the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write(self, name: str, text: str) -> None:
        """Replace a small file."""
        write_text_whole(self.path / name, text)

    def append(self, row: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl.

        Raises:
            UserError: the disk refuses.
        """
        try:
            append_text(self.path / "metrics.jsonl", json.dumps(row) + "\n")
        except OSError as error:
            raise UserError(f"{self.path}/metrics.jsonl: cannot write ({error}); the last checkpoint is whole") from None

    def logged(self) -> list[dict[str, Any]]:
        """The rows of the log; after `cut_log`, which leaves no other lines."""
        log = self.path / "metrics.jsonl"
        if not log.exists():
            return []
        with open_regular(log) as stream:
            return [parse_json(line) for line in stream]

    def cut_log(self, step: int) -> None:
        """Drop the log lines after a step: a resumed run writes them again."""
        log = self.path / "metrics.jsonl"
        if not log.exists():
            return
        kept = []
        with open_regular(log) as stream:
            for line in stream:
                try:
                    if parse_json(line)["step"] <= step:
                        kept.append(line.rstrip(b"\n") + b"\n")
                except (ValueError, KeyError, TypeError):
                    continue  # a line cut short by a kill
        write_whole(log, lambda stream: stream.writelines(kept))
