"""Committed rows, `benchmarks/results/*.jsonl`: one JSON object a line, values and their address (command, commit, date, device, versions).

A row with a `source` was not written by its command: it says what it was taken from, and how it was rounded there.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"

Row = dict[str, Any]


def read(files: Iterable[Path]) -> list[Row]:
    """The rows of JSON-lines files. ValueError names a file and line that holds no row."""
    rows = []
    for file in files:
        for number, text in enumerate(file.read_text().splitlines(), 1):
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number}: not a row ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{file}, line {number}: not a row")
            rows.append(row)
    return rows


def committed(name: str, **fields: object) -> list[Row]:
    """Rows of a file of RESULTS with these fields. ValueError: there is none."""
    rows = [row for row in read([RESULTS / name]) if all(row.get(key) == value for key, value in fields.items())]
    if not rows:
        raise ValueError(f"{name} {' '.join(f'{key}={value}' for key, value in fields.items())}: no such row")
    return rows


def write_rows(path: Path, rows: Iterable[Row], key: Sequence[str]) -> None:
    """Put rows in, each in place of an earlier one that agrees with it in `key`, new ones at the end."""
    kept = {tuple(row.get(k) for k in key): row for row in (read([path]) if path.exists() else [])}
    kept |= {tuple(row.get(k) for k in key): row for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept.values()))


def address(environment: Row, command: str, date: str) -> Row:
    """Where a run's row is from: by its environment.json, or by `sami_fast.environment.describe()`."""
    packages = environment["packages"]
    return {
        "command": command,
        "date": date,
        "commit": environment["commit"],
        "device": ", ".join(environment["gpus"]) or "cpu",
        "machine": environment["cpu"]["machine"],
        "cores": environment["cpu"]["cores"],
        "threads": environment["cpu"]["threads"],
        "python": environment["python"],
        "torch": packages["torch"],
        "triton": packages["triton"],
    }
