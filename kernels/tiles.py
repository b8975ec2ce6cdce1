"""Block sizes, warps and stages by chip: those an op declares in its SCHEDULES, or what was tuned in their place.

`tiles.json` beside this file holds what `benchmarks/tune.py` found; empty until a GPU has spoken:

    {"sm_90": {"attention": {"fwd 16-bit D=64": {"BLOCK_Q": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}}}}

chip, op, key of the op's SCHEDULES, and all the names that stand there. SAMI_FAST_TILES names a file to read instead; it is read once.

A chip is its compute capability, not its name: registers, shared memory and instructions decide which tiles fit and how well they overlap,
and kernels are compiled ahead of time by it. An H100 and an H200 differ in bandwidth, which all tiles of a kernel share. What Triton's
interpreter runs has a chip of its own, "interpreter". No schedule changes a random number; sums may round differently.
"""

import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path

import torch

from ._common import INTERPRETED, recorded_arch

Schedule = dict[str, int]  # keyword arguments of `launch`, or what a launcher makes them of
Table = dict[str, dict[str, dict[str, Schedule]]]  # by chip, op and key

BUILT_IN = Path(__file__).with_name("tiles.json")
OPS = ("attention", "gaussian_log_prob", "group_norm_silu", "guided_loss", "noise_sample", "random")
LARGEST = {"num_warps": 32, "num_stages": 8}
NO_POWERS_OF_TWO = ("num_stages", "programs")

_state = threading.local()


def schedule(op: str, key: str, device: torch.device) -> Schedule:
    """The schedule of a kernel for where it will run; inside `recording(arch)`, for that chip.

    Args:
        op: The module's name.
        key: Of its SCHEDULES.
        device: Of the tensors.
    Raises:
        ValueError: the table is not one; the message names file, entry, what was expected and what came.
    """
    if (note := getattr(_state, "note", None)) is not None:
        note((op, key))
    tried = getattr(_state, "tried", None)
    if tried is not None and tried[:2] == (op, key):
        return tried[2]
    return _selected(op, key, chip(device))


@contextmanager
def trying(op: str, key: str, candidate: Schedule) -> Iterator[None]:
    """Inside the block this thread's launchers take this schedule for this key, whatever the table says."""
    _check(f"{op}, {key}", declared(op)[key], candidate)
    _state.tried = op, key, candidate
    try:
        yield
    finally:
        _state.tried = None


@contextmanager
def noting(note: Callable[[tuple[str, str]], object]) -> Iterator[None]:
    """Inside the block, `note` is called with op and key of every schedule that this thread's launchers ask for, before they launch."""
    _state.note = note
    try:
        yield
    finally:
        _state.note = None


def chip(device: torch.device) -> str | None:
    """The table's name of the chip that a device, or the recording in progress, stands for; None where there is none."""
    recorded = recorded_arch()
    if recorded is not None:
        return f"sm_{recorded}" if recorded else None
    if device.type == "cuda":
        return _cuda_chip(device)
    return "interpreter" if INTERPRETED and device.type == "cpu" else None


@cache
def _cuda_chip(device: torch.device) -> str | None:
    if not torch.cuda.is_available():  # a fake tensor's device
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def _selected(op: str, key: str, name: str | None) -> Schedule:
    default = declared(op)[key]
    return default if name is None else _table().get(name, {}).get(op, {}).get(key, default)


@cache
def _table() -> Table:
    return read(Path(os.environ.get("SAMI_FAST_TILES") or BUILT_IN))


def declared(op: str) -> Mapping[str, Schedule]:
    """Every key of an op with its default."""
    return import_module(f"{__package__}.{op}").SCHEDULES


def read(file: Path) -> Table:
    """A whole table, checked.

    Raises:
        ValueError: it cannot be read, or an entry is not one.
    """
    try:
        table = json.loads(file.read_text())
        for name, ops in _entries(table, ""):
            if not re.fullmatch(r"sm_\d+|interpreter", name):
                raise ValueError(f"{name}: expected a chip such as sm_90")
            for op, keys in _entries(ops, name):
                if op not in OPS:
                    raise ValueError(f"{name}, {op}: expected one of {', '.join(OPS)}")
                for key, found in _entries(keys, f"{name}, {op}"):
                    if key not in declared(op):
                        raise ValueError(f"{name}, {op}, {key}: no such key; the keys are those of SCHEDULES in kernels/{op}.py")
                    _check(f"{name}, {op}, {key}", declared(op)[key], found)
    except (OSError, ValueError) as error:  # ValueError: JSON's and Unicode's errors are ones too
        raise ValueError(f"tile table {file}: {error}") from None
    return table


def _entries(value: object, place: str) -> list[tuple[str, object]]:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: expected an object, found {value!r}".removeprefix(": "))
    return list(value.items())


def _check(place: str, default: Schedule, found: object) -> None:
    if not isinstance(found, dict) or found.keys() != default.keys():
        raise ValueError(f"{place}: expected {', '.join(default)}, found {', '.join(found) if isinstance(found, dict) else repr(found)}")
    for name, value in found.items():
        limit = LARGEST.get(name, 1 << 16)
        whole = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= limit
        if not whole or (name not in NO_POWERS_OF_TWO and value & (value - 1)):
            kind = "a whole number" if name in NO_POWERS_OF_TWO else "a power of two"
            raise ValueError(f"{place}, {name}: expected {kind} from 1 to {limit}, found {value!r}")
