"""A saved model's files: config.json and safetensors, one or several. A stranger may have made them, so nothing is taken on trust.

The names are those of the Hugging Face hub: model.safetensors, or model-00001-of-00002.safetensors and so on, which are listed in
model.safetensors.index.json; of a variant such as fp16, model.fp16.safetensors and model.safetensors.index.fp16.json.
"""

import json
import math
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .errors import UserError
from .files import open_regular, parse_json, read_json, write_text_whole, write_whole

SETTINGS, WEIGHTS = "config.json", "model"  # WEIGHTS begins the names of a saved model's files of weights
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WRAPPERS = ("module.", "_orig_mod.")  # begin every key of what DistributedDataParallel and torch.compile saved
SAVE = "save"  # a note in every file of weights that were saved together: which save it was
MOST_FILES = 1000  # of weights
NAMED = 4  # keys in a message


def weights_name(stem: str, variant: str | None = None) -> str:
    """Of the one file of weights."""
    return f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"


def index_name(stem: str, variant: str | None = None) -> str:
    """Of the list of several files of weights."""
    return f"{stem}.safetensors.index.{variant}.json" if variant else f"{stem}.safetensors.index.json"


def weights_patterns(stem: str, variant: str | None = None) -> list[str]:
    """Of all files that weights may lie in; diffusers once named the parts of a variant otherwise."""
    parts = [f"{stem}.{variant}-*-of-*.safetensors", f"{stem}-*-of-*.{variant}.safetensors"] if variant else [f"{stem}-*-of-*.safetensors"]
    return [weights_name(stem, variant), index_name(stem, variant), *parts]


def weight_files(folder: Path, stem: str = WEIGHTS, variant: str | None = None) -> list[Path]:
    """The files of weights in a folder: the one, or those of the index.

    Raises:
        UserError: there are none; the index cannot be read, or names what is no file beside it.
    """
    whole, index = folder / weights_name(stem, variant), folder / index_name(stem, variant)
    if whole.is_file():
        return [whole]
    if not index.is_file():
        raise UserError(f"{folder}: no {whole.name} there{_instead(folder, stem, variant)}")
    names = read_settings(index).get("weight_map")
    if not (isinstance(names, dict) and names and all(isinstance(name, str) for name in names.values())):
        raise UserError(f"{index}: expected a weight_map from tensors to files")
    files = sorted(set(names.values()))
    if len(files) > MOST_FILES:
        raise UserError(f"{index}: expected at most {MOST_FILES} files, found {len(files)}")
    for name in files:
        if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name, re.ASCII):
            raise UserError(f"{index}: expected names of safetensors files beside it, found {name[:80]!r}")
        if not (folder / name).is_file():
            raise UserError(f"{index}: {name} is not there, one of {len(files)} files of weights")
    return [folder / name for name in files]


def _instead(folder: Path, stem: str, variant: str | None) -> str:
    """What lies there in place of a file of weights, for a message."""
    found = {re.sub(r"-\d+-of-\d+$", "", file.name.removesuffix(".safetensors")) for file in folder.glob(f"{stem}*.safetensors")}
    others = sorted(name.removeprefix(f"{stem}.") for name in found if name.startswith(f"{stem}."))
    if variant and stem in found:
        others.append("none")
    if others:
        return f"; of its variants there is {', '.join(others)}"
    pickled = any(folder.glob(f"{stem}*.bin"))
    return "; pickled weights are not read, convert them first" if pickled else "; expected a run folder or a saved model"


def tensors_of(network: nn.Module) -> dict[str, Tensor]:
    """A network's state dict, but for extra state that is no tensor, which safetensors cannot hold."""
    return {name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)}


def write_model(
    folder: Path,
    settings: dict[str, Any],
    weights: dict[str, Tensor],
    *,
    variant: str | None = None,
    max_shard_size: int | str | None = None,
) -> None:
    """Write settings and weights so that a kill at any moment leaves the old model or the new one, or, where files of the same names are
    replaced by several, an error that says so.

    The new weights bring the new settings along, with those that they replace: by these a reader knows that the last file is missing.

    Args:
        variant: Goes into the names of the files of weights, say "fp16".
        max_shard_size: Bytes, or words like "5GB", beyond which weights are written to several files; None for one file.
    Raises:
        UserError: no such variant or size; more than one file without huggingface_hub.
        OSError: from the system.
    """
    check_variant(variant)
    parts = _parts(weights, variant, max_shard_size)
    folder.mkdir(parents=True, exist_ok=True)
    new = json.dumps(settings, indent=2)
    try:
        old = json.dumps(read_json(folder / SETTINGS))
    except (OSError, ValueError):
        old = ""
    notes = {"format": "pt", "settings": new, "replaces": old}
    whole, index = folder / weights_name(WEIGHTS, variant), folder / index_name(WEIGHTS, variant)
    if len(parts) == 1:
        write_whole(whole, lambda stream: stream.write(save(weights, metadata=notes)))
    else:
        mark, sizes = {"format": "pt", SAVE: secrets.token_hex(8)}, [value.numel() * value.element_size() for value in weights.values()]
        for name, part in parts.items():
            write_whole(folder / name, lambda stream, part=part: stream.write(save(part, metadata=mark)))
        places = {key: name for name, part in parts.items() for key in part}
        write_text_whole(index, json.dumps({"metadata": {"total_size": sum(sizes), **notes}, "weight_map": places}, indent=2))
        whole.unlink(missing_ok=True)  # which a reader would take first
    write_text_whole(folder / SETTINGS, new)
    if len(parts) == 1:
        index.unlink(missing_ok=True)
    stem = weights_name(WEIGHTS, variant).removesuffix(".safetensors")
    for file in folder.glob(f"{stem}-*-of-*.safetensors"):
        if file.name not in parts and re.fullmatch(rf"{re.escape(stem)}-\d{{5}}-of-\d{{5}}\.safetensors", file.name):
            file.unlink()


def check_variant(variant: str | None) -> None:
    """A `UserError` where the word cannot be a part of a file's name."""
    if variant is not None and not re.fullmatch(r"[A-Za-z0-9_]+", variant):
        raise UserError(f"variant: expected a word such as fp16, found {variant!r}")


def _parts(weights: dict[str, Tensor], variant: str | None, max_shard_size: int | str | None) -> dict[str, dict[str, Tensor]]:
    """Weights by the names of the files that they go into."""
    whole = weights_name(WEIGHTS, variant)
    if max_shard_size is None:
        return {whole: weights}
    try:
        from huggingface_hub import split_torch_state_dict_into_shards
    except ImportError:
        raise UserError("max_shard_size: needs `pip install 'sami-fast[hub]'`; leave it out for one file") from None
    try:
        if isinstance(max_shard_size, int) and max_shard_size < 1:
            raise ValueError("above 0")
        pattern = whole.replace(".safetensors", "{suffix}.safetensors")
        split = split_torch_state_dict_into_shards(weights, filename_pattern=pattern, max_shard_size=max_shard_size)
    except (ValueError, TypeError) as error:
        raise UserError(f"max_shard_size: expected bytes or words such as 5GB, found {max_shard_size!r} ({error})") from None
    return {name: {key: weights[key] for key in keys} for name, keys in split.filename_to_tensors.items()}


def read_model_settings(folder: Path, variant: str | None = None) -> dict[str, Any]:
    """The settings that belong to the weights there; errors as `read_settings`."""
    settings = read_settings(folder / SETTINGS)
    try:
        notes = _notes(folder, variant)
        if notes.get("replaces") and parse_json(notes["replaces"]) == settings:
            return _as_settings(folder / weights_name(WEIGHTS, variant), parse_json(notes["settings"]))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # no such file, or not of `write_model`
    return settings


def _notes(folder: Path, variant: str | None) -> Any:
    """What `write_model` noted of the settings, in the one file of weights or in the index of several."""
    whole = folder / weights_name(WEIGHTS, variant)
    if not whole.is_file():
        return read_json(folder / index_name(WEIGHTS, variant))["metadata"]
    with _opened(whole) as stored:
        return stored.metadata() or {}


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


def count_weights(files: Sequence[Path]) -> int:
    """Numbers in safetensors files, by their headers: more a network that they are for cannot have. Errors as `read_weights`."""
    found = 0
    for file in files:
        try:
            with _opened(file) as stored:
                found += sum(math.prod(stored.get_slice(name).get_shape()) for name in stored.keys())  # noqa: SIM118 (it is no dict)
        except (SafetensorError, OSError) as error:
            raise _damaged(file, error) from None
    return found


def _damaged(file: Path, error: Exception) -> UserError:
    return UserError(f"{file}: damaged or not a safetensors file ({error})")


def read_weights(
    files: Path | Sequence[Path], expected: Mapping[str, Tensor], rename: Callable[[dict[str, Any]], object] = lambda names: None
) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, in the dtypes of the network that it is for. No pickle is read.

    Args:
        files: As `save_pretrained` writes it, or its parts. Keys may be those of networks inside DistributedDataParallel or torch.compile:
            `module.` and `_orig_mod.` before all keys, or before all of encoder or denoiser, are taken off.
        expected: A state of the network, of which names, shapes and dtypes count. It may be on the meta device. Extra state that is no
            tensor is returned as it is.
        rename: Gives the keys of a dict the names of today, where earlier versions had others.
    Raises:
        UserError: damaged or no such file; parts that do not belong together; keys missing or too many; another shape; dtypes that are no
            floating-point numbers where such are expected; NaN, or infinity where the network itself has none, as in a mask.
    """
    files = [files] if isinstance(files, Path) else files
    weights: dict[str, Any] = {name: value for name, value in expected.items() if not isinstance(value, Tensor)}
    expected = {name: value for name, value in expected.items() if name not in weights}
    file = files[0]
    try:
        with ExitStack() as stack:
            names: dict[str, tuple[Any, str]] = {}
            marks = set()
            for file in files:
                stored = stack.enter_context(_opened(file))
                marks.add((stored.metadata() or {}).get(SAVE))
                inside = {name: (stored, name) for name in stored.keys()}  # noqa: SIM118 (it is no dict)
                if twice := sorted(inside.keys() & names.keys()):
                    raise UserError(f"{file}: {', '.join(twice[:NAMED])} in two files of weights, expected in one")
                names |= inside
            if len(marks) > 1:
                raise UserError(f"{file.parent}: files of weights from two saves, the later of which was cut short; save the model again")
            names = _unwrapped(names, expected)
            rename(names)
            file = file if len(files) == 1 else file.parent
            _require_same_keys(file, names.keys(), expected.keys())
            for name, (stored, key) in names.items():
                weights[name] = _fitting(file, name, stored.get_tensor(key), expected[name])
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from None
    return weights


def _unwrapped(names: dict[str, tuple[Any, str]], expected: Mapping[str, Tensor]) -> dict[str, tuple[Any, str]]:
    """Without the wrappers that stand before all keys, or before all keys of one of the networks, if none of these is expected as it is."""
    for head in ("", *sorted({f"{name.partition('.')[0]}." for name in expected})):
        while True:
            group = {name for name in names if name.startswith(head)}
            wrapper = next((w for w in WRAPPERS if all(name.startswith(head + w) for name in group)), None)
            if not group or wrapper is None or group & expected.keys():
                break
            names = {head + name.removeprefix(head + wrapper) if name in group else name: place for name, place in names.items()}
    return names


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
    if value.dtype in FLOATS and not _possible(value, expected).all():
        raise UserError(f"{file}: {name} holds NaN or infinity, or numbers too large for {expected.dtype}")
    return value


def _possible(value: Tensor, expected: Tensor) -> Tensor:
    """Which numbers are finite, or the infinity that a fresh network has in the same place, as in a mask."""
    finite = value.isfinite()
    return finite if expected.is_meta else finite | (value == expected.to(value.device))
