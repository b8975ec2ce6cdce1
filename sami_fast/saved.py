"""A saved model's two files, config.json and model.safetensors. A stranger may have made them, so nothing is taken on trust."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import UserError
from .files import open_regular, parse_json, read_json, write_text_whole, write_whole

SETTINGS, WEIGHTS = "config.json", "model.safetensors"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WRAPPED = "module."  # begins every key of what DistributedDataParallel saved
NAMED = 4  # keys in a message


def write_model(folder: Path, settings: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Write settings and weights so that a kill at any moment leaves the old two or the new two.

    The new weights bring the new settings along, with those that they replace: by these a reader knows that the second file is missing.

    Raises:
        OSError: from the system.
    """
    folder.mkdir(parents=True, exist_ok=True)
    new = json.dumps(settings, indent=2)
    try:
        old = json.dumps(read_json(folder / SETTINGS))
    except (OSError, ValueError):
        old = ""
    notes = {"format": "pt", "settings": new, "replaces": old}
    write_whole(folder / WEIGHTS, lambda stream: stream.write(save(weights, metadata=notes)))
    write_text_whole(folder / SETTINGS, new)


def read_model_settings(folder: Path) -> dict[str, Any]:
    """The settings that belong to the weights there; errors as `read_settings`."""
    settings = read_settings(folder / SETTINGS)
    try:
        with _opened(folder / WEIGHTS) as stored:
            notes = stored.metadata() or {}
        if notes.get("replaces") and parse_json(notes["replaces"]) == settings:
            return _as_settings(folder / WEIGHTS, parse_json(notes["settings"]))
    except (SafetensorError, OSError, ValueError, KeyError):
        pass  # no such file, or not of `write_model`
    return settings


def _opened(file: Path) -> Any:
    open_regular(file).close()
    return safe_open(file, "pt")


def read_settings(file: Path) -> dict[str, Any]:
    """The settings in a JSON file.

    Raises:
        UserError: it cannot be read, or is no JSON object.
    """
    try:
        settings = read_json(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error})") from None
    return _as_settings(file, settings)


def _as_settings(file: Path, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{file}: expected settings, found a {type(value).__name__}")
    return value


def count_weights(file: Path) -> int:
    """Numbers in a safetensors file, by its header: more a network that it is for cannot have. Errors as `read_weights`."""
    try:
        with _opened(file) as stored:
            return sum(math.prod(stored.get_slice(name).get_shape()) for name in stored.keys())  # noqa: SIM118 (it is no dict)
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from None


def _damaged(file: Path, error: Exception) -> UserError:
    return UserError(f"{file}: damaged or not a safetensors file ({error})")


def read_weights(
    files: Path | Sequence[Path], expected: Mapping[str, Tensor], rename: Callable[[dict[str, Any]], object] = lambda names: None
) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, in the dtypes of the network that it is for. No pickle is read.

    Args:
        files: As `save_pretrained` writes it, or with the keys of a network inside DistributedDataParallel; or its parts.
        expected: A state of the network, of which names, shapes and dtypes count. It may be on the meta device.
        rename: Gives the keys of a dict the names of today, where earlier versions had others.
    Raises:
        UserError: damaged or no such file; keys missing or too many; another shape; dtypes that are no floating-point numbers where such
            are expected; NaN or infinity.
    """
    weights, files = {}, [files] if isinstance(files, Path) else files
    file = files[0]
    try:
        with ExitStack() as stack:
            names = {}
            for file in files:
                stored = stack.enter_context(_opened(file))
                names |= {name: (stored, name) for name in stored.keys()}  # noqa: SIM118 (it is no dict)
            while names and not expected.keys() & names.keys() and all(name.startswith(WRAPPED) for name in names):
                names = {name.removeprefix(WRAPPED): place for name, place in names.items()}
            rename(names)
            file = file if len(files) == 1 else file.parent
            _require_same_keys(file, names.keys(), expected.keys())
            for name, (stored, key) in names.items():
                weights[name] = _fitting(file, name, stored.get_tensor(key), expected[name])
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from None
    return weights


def _require_same_keys(file: Path, found: Any, expected: Any) -> None:
    for what, keys in (("lacks", expected - found), ("has unexpected", found - expected)):
        if keys:
            more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
            raise UserError(f"{file}: weights of another architecture: it {what} {', '.join(sorted(keys)[:NAMED])}{more}")


def _fitting(file: Path, name: str, value: Tensor, expected: Tensor) -> Tensor:
    if value.shape != expected.shape:
        raise UserError(
            f"{file}: weights of another architecture: expected {name} of shape {list(expected.shape)}, found {list(value.shape)}"
        )
    if value.dtype != expected.dtype and not (value.dtype in FLOATS and expected.dtype in FLOATS):
        raise UserError(f"{file}: expected {name} in {expected.dtype}, found {value.dtype}")
    value = value.to(expected.dtype)
    if value.dtype in FLOATS and not value.isfinite().all():
        raise UserError(f"{file}: {name} holds NaN or infinity, or numbers too large for {expected.dtype}")
    return value
