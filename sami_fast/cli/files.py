"""What commands read and write: the model, the images, the axes, the output file."""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import UserError
from ..files import write_whole

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..config import Config
    from ..data import Dataset
    from ..latents.axes import Axes
    from ..methods.latent_model import LatentModel


def output_file(arguments: argparse.Namespace, endings: tuple[str, ...]) -> Path:
    """The file to write, checked before any work is done."""
    path = Path(arguments.output)
    if path.suffix not in endings:
        raise UserError(f"--output: expected a name ending in {' or '.join(endings)}, found {path}")
    if not path.parent.is_dir():
        raise UserError(f"--output: no folder {path.parent}")
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


def write_pictures(path: Path, grid: "Tensor", columns: int, **arrays: Any) -> None:
    """A PNG of the grid, or an NPZ of the arrays, as the name says."""
    from ..latents.images import image_grid, write_png

    if path.suffix == ".npz":
        write_arrays(path, **arrays)
    else:
        _write(path, lambda stream: write_png(stream, image_grid(grid, columns)))


def _device(name: str | None) -> "torch.device":
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
    except Exception as error:  # unknown name, no such device, a torch built without it: every backend has its own kind
        raise UserError(f"--device: {name} cannot be used here ({str(error).splitlines()[0][:120]})") from None
    return device


def open_model(arguments: argparse.Namespace) -> "LatentModel":
    folder = Path(arguments.run)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a run folder or a saved model")
    device = _device(arguments.device)
    from ..methods.registry import load_model

    return load_model(folder, device)


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
    from ..data import ArrayImages, ImageFolder, VideoFolder, open_dataset

    if arguments.data:
        try:
            if Path(arguments.data).is_dir():
                file = Path(arguments.run) / "config.yaml"
                videos = file.is_file() and run_config(arguments).data.kind == "video_folder"
                channels, size, _ = model.image_shape
                folder = VideoFolder if videos else ImageFolder
                dataset: Dataset = folder(arguments.data, image_size=size, channels=channels, holdout=0.0)
            else:
                dataset = ArrayImages(arguments.data, arguments.array_key, holdout=0.0)
        except UserError as error:  # speaks of the settings of a run; the user gave options
            raise UserError(str(error).replace("data.path", "--data").replace("data.array_key", "--array-key")) from None
    else:
        config = run_config(arguments)
        dataset = open_dataset(config.data, config.seed, split=1)
    if dataset.image_shape != model.image_shape:
        raise UserError(
            f"{arguments.data or arguments.run}: expected images of shape {list(model.image_shape)} (C, H, W) for this model, "
            f"found {list(dataset.image_shape)}"
        )
    return dataset


def image_count(dataset: "Dataset", asked: int | None, default: int) -> int:
    """As many as asked for, else `default` or as many as there are."""
    size = math.inf if dataset.size is None else dataset.size
    if asked is not None and asked > size:
        raise UserError(f"--count: expected at most {size}, the number of images there are, found {asked}")
    return asked or int(min(default, size))


def open_axes(arguments: argparse.Namespace, model: "LatentModel") -> "Axes | None":
    """The axes of --axes, if there are any."""
    if not arguments.axes:
        return None
    from ..latents.axes import Axes

    axes = Axes.load(arguments.axes)
    if len(axes.center) != model.latent_size:
        raise UserError(f"--axes: expected axes of {model.latent_size} latent dimensions for this model, found {len(axes.center)}")
    return axes
