"""The folder of a run: who may write there, its log, its small files. Everything here happens on one rank."""

import fcntl
import json
import shutil
from pathlib import Path
from typing import Any, TextIO

from ..errors import UserError
from ..files import PARTIAL, write_text_whole
from . import checkpoints

CONTENTS = {"config.yaml", "environment.json", "metrics.jsonl", "tensorboard", "csv", "checkpoints", "model", "report", ".lock"}


class RunFolder:
    """runs/<name>/ of one training process.

    Args:
        path: The folder; need not exist.
        patient: Wait for another process that trains there, instead of refusing.
    """

    def __init__(self, path: Path, patient: bool = False) -> None:
        self.path, self.checkpoints, self.patient = path, path / "checkpoints", patient
        self._lock: TextIO | None = None

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Whether a run may begin here.

        Raises:
            UserError: it holds a run and neither resume nor overwrite is asked for, or it is no run folder.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: expected a run folder, found a file; set name= or runs_dir=")
        entries = {entry.name for entry in self.path.iterdir()} if self.path.exists() else set()
        entries = {name for name in entries if not name.startswith(PARTIAL)} - {".lock"}
        if entries and not (resume or overwrite):
            raise UserError(f"{self.path}: holds a run already; continue it with --resume, replace it with --overwrite, or set name=")
        if entries and not (entries & {"checkpoints", "environment.json"} and (resume or entries <= CONTENTS)):
            strange = ", ".join(sorted(entries - CONTENTS)[:1]) or "no run"
            raise UserError(f"{self.path}: expected a run folder, and this one holds {strange}; set name= or runs_dir=")

    def lock(self) -> None:
        """Make the folder this process's own until `release` or the process's end, if it is not yet.

        Raises:
            UserError: another process trains there, and this one is not `patient`.
            OSError: the system refuses.
        """
        if self._lock is not None:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        lock = self._lock = open(self.path / ".lock", "w")  # noqa: SIM115 (held as long as the run)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not self.patient:
                self.release()
                raise UserError(f"{self.path}: another process is training there") from None
            print(f"{self.path}: another process is training there; waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)

    def claim(self, *, resume: bool, overwrite: bool) -> None:
        """`lock` the folder, and clear it of what a killed process left half-written.

        Raises:
            UserError: as `check` and `lock`.
            OSError: the system refuses.
        """
        self.check(resume=resume, overwrite=overwrite)
        self.lock()
        if overwrite:
            for entry in self.path.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
                elif entry.name != ".lock":
                    entry.unlink()
        self.checkpoints.mkdir(exist_ok=True)
        for folder in (self.path, self.checkpoints, self.path / "model", self.path / "report"):
            checkpoints.remove_partial(folder)

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
            with open(self.path / "metrics.jsonl", "a") as stream:
                stream.write(json.dumps(row) + "\n")
        except OSError as error:
            raise UserError(f"{self.path}/metrics.jsonl: cannot write ({error}); the last checkpoint is whole") from None

    def cut_log(self, step: int) -> None:
        """Drop the log lines after a step: a resumed run writes them again."""
        log = self.path / "metrics.jsonl"
        if not log.exists():
            return
        kept = []
        for line in log.read_text(errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # a line cut short by a kill
        write_text_whole(log, "".join(kept))
