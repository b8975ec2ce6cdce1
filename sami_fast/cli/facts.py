"""Commands that say or write facts: env, data, encode, export."""

import argparse
import json
import math
import sys
from typing import TYPE_CHECKING, Any

from ..errors import UserError, printable
from .files import (
    by_name,
    image_count,
    in_rows,
    open_axes,
    open_images,
    open_model,
    output_file,
    run_config,
    write_arrays,
    write_pictures,
)
from .options import (
    AddCommand,
    at_least,
    axes_options,
    data_options,
    model_options,
    non_negative,
    path,
    saved_model_options,
    threads_option,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..data import Dataset
    from ..methods.latent_model import LatentModel

EXPORTS = ("onnx", "torchscript", "torch.export")
TABLES = ("npz", "parquet", "csv")  # what encode writes
CONTACTS = 64  # images of a contact sheet


def run_env(arguments: argparse.Namespace) -> None:
    from ..environment import describe

    facts = describe()
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            print(name)
            for key, entry in value.items():
                print(f"  {key:<24} {_readable(entry)}")
        else:
            print(f"{name:<26} {_readable(value)}")


def _readable(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_readable(entry)}" for key, entry in value.items())
    return "none" if value is None else str(value)


def run_data(arguments: argparse.Namespace) -> None:
    output = output_file(arguments, (".png",)) if arguments.output else None
    import torch

    from ..config import load_config
    from ..data.dataset import image_names
    from ..data.summary import summarize, throughput

    config = load_config(arguments.config, arguments.overrides)
    facts, dataset = summarize(config)
    if arguments.seconds:
        facts["feed alone"] = throughput(config, arguments.seconds)
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        for name, value in facts.items():
            lines = value if isinstance(value, list) else [value]
            print("\n".join(f"{name if not row else '':<18} {printable(line)}" for row, line in enumerate(lines)))
    if output:
        count = image_count(dataset, arguments.count, CONTACTS)
        # A folder's files in their order show one camera, or one day; an endless source has no order.
        generator = torch.Generator().manual_seed(config.seed)
        index = torch.arange(count) if dataset.size is None else torch.randperm(dataset.size, generator=generator)[:count]
        write_pictures(output, in_rows(dataset.training_images(index), image_names(dataset, index)))
        print(f"{output}: {count} images of training, a random sample", file=sys.stderr if arguments.json else sys.stdout)


def run_encode(arguments: argparse.Namespace) -> None:
    output = output_file(arguments, () if arguments.format else tuple(f".{form}" for form in TABLES))
    form = arguments.format or output.suffix[1:]
    import torch

    from .tables import columns_of, write_csv, write_parquet

    model = open_model(arguments)
    axes = open_axes(arguments, model)
    dataset = open_images(arguments, model)
    if dataset.size is None:
        index = torch.arange(image_count(dataset, arguments.count, run_config(arguments).report.images))
    else:
        index = dataset.in_order()[: image_count(dataset, arguments.count, dataset.size)]
    arrays, absent = _encoded(model, dataset, index, arguments.batch_size)
    if dataset.factor_names:
        arrays |= {"factors": dataset.factors(index).numpy(), "factor_names": list(dataset.factor_names)}
    arrays |= dataset.sources(index)
    if arguments.data and arguments.count is None:
        absent = _with_rows_of(dataset.unreadable(), arrays, absent)
    if axes:
        arrays |= {"axes": axes.coordinates(arrays["mu"]), "axis_names": list(axes.names)}
    if missing := sum(map(bool, absent)):
        arrays["absent"] = absent
    if form == "npz":
        write_arrays(output, **arrays)
    else:
        (write_csv if form == "csv" else write_parquet)(output, columns_of(arrays))
    rows, latents = arrays["mu"].shape
    why = f"; {missing} cannot be read: their rows are NaN, and absent says why" if missing else ""
    print(f"{output}: {', '.join(arrays)} of {rows} images, {latents} latent dimensions{why}")


def run_export(arguments: argparse.Namespace) -> None:
    output = output_file(arguments)
    from ..methods.export import FORMATS, export_encoder

    if output.suffix != FORMATS[arguments.format]:
        raise UserError(f"--output: expected a name ending in {FORMATS[arguments.format]} for {arguments.format}, found {output}")
    arguments.device = "cpu"
    model = open_model(arguments)
    difference = export_encoder(model, output, arguments.format)
    shape = ", ".join(map(str, model.image_shape))
    print(
        f"{output}: images [B, {shape}] in [-1, 1] to mu, var [B, {model.latent_size}]; differs from the model by {difference:.1e} at most"
    )


def _encoded(model: "LatentModel", dataset: "Dataset", index: "Tensor", batch_size: int) -> tuple[dict[str, Any], list[str]]:
    """mu and var, a row for each image, NaN where it cannot be read, and why it cannot be or ""."""
    import torch

    from ..latents.sampling import encode
    from ..progress import bar

    rows, absent = {name: torch.full((len(index), model.latent_size), math.nan) for name in ("mu", "var")}, [""] * len(index)
    with bar(len(index), "encoding", "images") as progress:
        for place in torch.arange(len(index)).split(batch_size):
            images, gone = dataset.read(index[place])
            for slot, reason in gone.items():
                absent[int(place[slot])] = reason
            there = torch.tensor([slot not in gone for slot in range(len(place))])
            if there.any():
                posterior = encode(model, images[there.to(images.device)], batch_size)
                rows["mu"][place[there]], rows["var"][place[there]] = posterior.mu.float().cpu(), posterior.var.float().cpu()
            progress.update(len(place))
    return {name: values.numpy() for name, values in rows.items()}, absent


def _with_rows_of(files: dict[str, str], arrays: dict[str, Any], absent: list[str]) -> list[str]:
    """Add rows for files without any image, among the others in the order of names. Returns `absent` of all."""
    import numpy as np

    if not files:
        return absent
    names, lost = [*arrays["files"], *files], len(files)
    order = by_name(names)
    for name, values in arrays.items():
        if name in ("mu", "var", "factors"):
            arrays[name] = np.concatenate((values, np.full((lost, values.shape[1]), math.nan, values.dtype)))[order]
        elif name != "factor_names":
            rows = names if name == "files" else [*values, *[-1] * lost]  # no frame has this number
            arrays[name] = [rows[row] for row in order]
    reasons = [*absent, *(f"{name}: {reason}" for name, reason in files.items())]
    return [reasons[row] for row in order]


def add_commands(command: AddCommand) -> None:
    env = command("env", run_env, "print versions, hardware and which implementation each op would run", "env --json")
    env.add_argument("--json", action="store_true", help="print JSON")

    data_command = command(
        "data",
        run_data,
        "show what a config will feed: counts, sizes, codecs, who decodes each file and why, the feed's speed, a contact sheet",
        "data photos_small data.path=photos --output contact_sheet.png",
    )
    data_command.add_argument("config", type=path, help="a YAML file, or the name of a config that comes with the package")
    data_command.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ: data.path=photos")
    data_command.add_argument("--output", type=path, metavar="FILE", help="PNG of some training images, a random sample by seed")
    data_command.add_argument("--overwrite", action="store_true", help="replace the PNG")
    data_command.add_argument("--count", type=at_least(1), metavar="N", help=f"images on it ({CONTACTS})")
    data_command.add_argument("--seconds", type=non_negative, default=3.0, metavar="S", help="time the feed alone so long (%(default)s)")
    data_command.add_argument("--json", action="store_true", help="print JSON")

    encode = command(
        "encode",
        run_encode,
        "write mu and var [N, Z] of images, their places along --axes [N, A], and their factors where they are known, as arrays (.npz) or "
        "as columns of a table, with standard deviations in place of var (.parquet, .csv); a row for each "
        "image, NaN where it cannot be read, as they lie in a file, by name in a folder, by name and time in one of videos: row n is "
        "--image n of other commands",
        "encode runs/disks --data photos.npy --output latents.csv",
        model_options(),
        data_options(),
        axes_options(),
    )
    encode.add_argument("--count", type=at_least(1), metavar="N", help="the first N images; all of a file when left out")
    encode.add_argument("--format", choices=TABLES, help="what to write; as the ending of the file says, when left out")

    export = command(
        "export",
        run_export,
        "write the encoder as a program for other runtimes: images [B, C, H, W] float32 in [-1, 1], which is pixel / 127.5 - 1, any B, to "
        "mu and var, both [B, Z] float32; its weights are inside the file. The program is made and compared with the model on the CPU, and "
        "kept only if they agree to 1e-5; onnx needs `pip install 'sami-fast[export]'`",
        "export runs/disks --output encoder.onnx",
        saved_model_options(),
        threads_option(),
    )
    export.add_argument(
        "--format", choices=EXPORTS, default="onnx", help="onnx (.onnx), torchscript (.pt), torch.export (.pt2) (%(default)s)"
    )
