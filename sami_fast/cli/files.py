"""What commands read and write: the model, the images, the axes, the output file."""

import argparse
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import UserError
from ..files import absent, write_whole

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..config import Config
    from ..data import Dataset
    from ..latents.axes import Axes
    from ..methods.latent_model import LatentModel
    from ..report.strips import Strip

MANY = 144  # images of a picture from which each gets less room


def output_file(arguments: argparse.Namespace, endings: tuple[str, ...] = ()) -> Path:
    """The file to write, checked before any work is done; its name ends in one of these, if there are any."""
    path = Path(arguments.output)
    if endings and path.suffix not in endings:
        raise UserError(f"--output: expected a name ending in {' or '.join(endings)}, found {path}")
    if not path.parent.is_dir():
        raise UserError(f"--output: {absent(path.parent, 'folder')}")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--output: may not write into {path.parent}")
    if path.is_dir() or (path.exists() and not arguments.overwrite):
        raise UserError(f"--output: {path} exists; choose another name" + ("" if path.is_dir() else " or add --overwrite"))
    return path


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    try:
        write_whole(path, write)
    except OSError as error:
        raise UserError(f"--output: cannot write {path} ({error.strerror or error})") from None


def write_bytes(path: Path, content: bytes) -> None:
    _write(path, lambda stream: stream.write(content))


def write_arrays(path: Path, **arrays: Any) -> None:
    import numpy as np

    written: Any = {name: np.asarray(values) for name, values in arrays.items()}
    _write(path, lambda stream: np.savez(stream, **written))


def write_pictures(path: Path, rows: "Sequence[Strip]", **arrays: Any) -> None:
    """A PNG of the rows with their labels, or an NPZ of the arrays, as the name says."""
    if path.suffix == ".npz":
        write_arrays(path, **arrays)
        return
    from ..report.strips import CELL, png, strips

    cell = CELL if sum(len(row.images) for row in rows) <= MANY else CELL // 2
    try:
        picture = png(strips(rows, cell, shrink=False), most=math.inf)
    except ValueError as error:  # more pixels than a figure may have
        raise UserError(f"--output: {path}: so many images make no picture ({error}); name an .npz") from None
    write_bytes(path, picture)


def in_rows(images: "Tensor", names: Sequence[str]) -> "list[Strip]":
    """Images with a name each, in about as many rows as columns."""
    from ..report.strips import Strip

    columns = math.ceil(math.sqrt(len(images)))
    return [Strip("", images[first : first + columns], names[first : first + columns]) for first in range(0, len(images), columns)]


def chosen_device(arguments: argparse.Namespace) -> "torch.device":
    """That of --device; the first GPU, if there is one, when left out."""
    import torch

    from ..engine.processes import usable_device

    return usable_device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def open_model(arguments: argparse.Namespace) -> "LatentModel":
    folder = Path(arguments.run)
    if not folder.is_dir():
        raise UserError(f"{absent(folder, 'folder')}; expected a run folder or a saved model")
    device = chosen_device(arguments)
    from ..engine.processes import set_arithmetic
    from ..methods.registry import load_model

    set_arithmetic()  # whatever the run was trained with
    return load_model(folder, trust_remote_code=arguments.trust).placed(device)


def open_sampler(arguments: argparse.Namespace) -> "LatentModel":
    """A model that can draw images in the way that the options ask for."""
    model = open_model(arguments)
    if model.decodes and getattr(arguments, "x_T", None) == "inverted":
        raise UserError(f"{arguments.run}: a model of method {model.method} decodes and has no noise to invert; use --x-T random")
    if not model.guides and (arguments.guidance_scale != 1 or getattr(arguments, "source", None) == "none"):
        raise UserError(f"{arguments.run}: a model of method {model.method} draws only from latents and at --guidance-scale 1")
    return model


def run_config(arguments: argparse.Namespace) -> "Config":
    """What the run was trained with."""
    from ..config import load_config

    file = Path(arguments.run) / "config.yaml"
    if not file.is_file():
        raise UserError(f"--data: {arguments.run} has no config.yaml that says which images belong to it; name a file of images")
    return load_config(str(file))


def open_images(arguments: argparse.Namespace, model: "LatentModel") -> "Dataset":
    """The images of --data, or the run's own that training never saw."""
    from ..data import open_dataset

    if arguments.data:
        try:
            dataset = _given_images(arguments, model)
        except UserError as error:  # speaks of the settings of a run; the user gave options
            message = str(error)
            for setting, option in {"data.path": "--data", "data.array_key": "--array-key", "data.cache_dir": "$XDG_CACHE_HOME"}.items():
                message = message.replace(setting, option)
            raise UserError(message) from None
    else:
        config = run_config(arguments)
        try:
            dataset = open_dataset(config.data, config.seed, split=1, trust_remote_code=arguments.trust)
        except UserError as error:
            raise UserError(f"{arguments.run}/config.yaml: {error}") from None
    if dataset.image_shape != model.image_shape:
        raise UserError(
            f"{arguments.data or arguments.run}: expected images of shape {list(model.image_shape)} (C, H, W) for this model, "
            f"found {list(dataset.image_shape)}"
        )
    return dataset


def _given_images(arguments: argparse.Namespace, model: "LatentModel") -> "Dataset":
    """The images of --data: a folder's fitted to the model, an array's as those that the run was trained on."""
    from ..data import ArrayImages, ImageFolder, Parquet, VideoFolder, WebDataset
    from ..data.decode import HEIC_SUFFIXES, IMAGE_SUFFIXES, VIDEO_SUFFIXES
    from ..data.pack import guess_kind

    path = Path(arguments.data)
    settings = run_config(arguments).data if (Path(arguments.run) / "config.yaml").is_file() else None
    kinds = {"webdataset": WebDataset, "parquet": Parquet}
    shards = kinds.get(guess_kind(arguments.data))
    if path.is_dir() or shards:
        channels, size, _ = model.image_shape
        if channels not in (1, 3):
            raise UserError(f"--data: a folder has images of 1 or 3 channels, and this model takes {channels}; give an array")
        kind = shards or (VideoFolder if settings and settings.kind == "video_folder" else ImageFolder)
        # Whatever share of them is broken: each file has its row, or is named where it is asked for.
        return kind(arguments.data, image_size=size, channels=channels, holdout=0.0, max_bad=1.0)
    if path.suffix.lower() in IMAGE_SUFFIXES | HEIC_SUFFIXES | VIDEO_SUFFIXES:
        raise UserError(f"--data: expected a folder, or an .npy or .npz of images, found the file {path}; give its folder")
    size, channels = (settings.image_size, settings.channels) if settings and settings.kind == "array" else (0, 0)
    value_range = arguments.range or (settings.range if settings else "auto")
    return ArrayImages(arguments.data, arguments.array_key, holdout=0.0, value_range=value_range, image_size=size, channels=channels)


def image_count(dataset: "Dataset", asked: int | None, default: int) -> int:
    """As many as asked for, else `default` or as many as there are."""
    size = math.inf if dataset.size is None else dataset.size
    if asked is not None and asked > size:
        raise UserError(f"--count: expected at most {size}, the number of images there are, found {asked}")
    return asked or int(min(default, size))


def numbered(arguments: argparse.Namespace, dataset: "Dataset", picked: Sequence[int]) -> "Tensor":
    """Images by the numbers that the user counts them by, which are the rows that `encode` writes. [n] int64."""
    import torch

    if dataset.size is None:
        return torch.tensor(picked)
    lost = dataset.unreadable() if arguments.data else {}
    if wrong := [image for image in picked if image >= dataset.size + len(lost)]:
        raise UserError(f"--image: expected 0 to {dataset.size + len(lost) - 1}, found {wrong[0]}")
    order = dataset.in_order()
    if not lost:
        return order[list(picked)]
    names = [*dataset.sources(order)["files"], *lost]
    rows = by_name(names)
    for image in picked:
        if (name := names[rows[image]]) in lost:
            raise UserError(f"--image {image}: cannot read {Path(arguments.data) / name}: {lost[name]}")
    return order[[rows[image] for image in picked]]


def by_name(names: Sequence[str]) -> list[int]:
    """The order of rows by the names of their files; stable, so that the frames of a video stay in theirs."""
    return sorted(range(len(names)), key=names.__getitem__)


def open_axes(arguments: argparse.Namespace, model: "LatentModel") -> "Axes | None":
    """The axes of --axes, if there are any."""
    if not arguments.axes:
        return None
    from ..latents.axes import Axes

    axes = Axes.load(arguments.axes)
    if len(axes.center) != model.latent_size:
        raise UserError(f"--axes: expected axes of {model.latent_size} latent dimensions for this model, found {len(axes.center)}")
    return axes
