"""Commands that say or write facts: env, data, encode."""

import argparse
import json
import math
import sys
from typing import Any

from .files import image_count, open_axes, open_images, open_model, output_file, run_config, write_arrays, write_pictures
from .options import AddCommand, at_least, axes_options, data_options, model_options, non_negative

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
            print("\n".join(f"{name if not row else '':<18} {line}" for row, line in enumerate(lines)))
    if output:
        count = image_count(dataset, arguments.count, CONTACTS)
        images = dataset.images(torch.arange(count))
        write_pictures(output, images, math.ceil(math.sqrt(count)), images=images)
        print(f"{output}: {count} images of training", file=sys.stderr if arguments.json else sys.stdout)


def run_encode(arguments: argparse.Namespace) -> None:
    output = output_file(arguments, (".npz",))
    import torch

    from ..latents.sampling import encode

    model = open_model(arguments)
    axes = open_axes(arguments, model)
    dataset = open_images(arguments, model)
    default = run_config(arguments).report.images if dataset.size is None else dataset.size
    index = torch.arange(image_count(dataset, arguments.count, default))
    parts = [encode(model, dataset.images(part), arguments.batch_size) for part in index.split(arguments.batch_size)]
    arrays: dict[str, Any] = {"mu": torch.cat([part.mu for part in parts]).cpu(), "var": torch.cat([part.var for part in parts]).cpu()}
    if axes:
        arrays |= {"axes": axes.coordinates(arrays["mu"].numpy()), "axis_names": list(axes.names)}
    if dataset.factor_names:
        arrays |= {"factors": dataset.factors(index), "factor_names": list(dataset.factor_names)}
    arrays |= dataset.sources(index)
    write_arrays(output, **arrays)
    print(f"{output}: {', '.join(arrays)} of {len(index)} images, {arrays['mu'].shape[1]} latent dimensions")


def add_commands(command: AddCommand) -> None:
    env = command("env", run_env, "print versions, hardware and which implementation each op would run", "env --json")
    env.add_argument("--json", action="store_true", help="print JSON")

    data_command = command(
        "data",
        run_data,
        "show what a config will feed: counts, sizes, codecs, who decodes each file and why, the feed's speed, a contact sheet",
        "data video data.path=clips --output contact_sheet.png",
    )
    data_command.add_argument("config", help="a YAML file, or the name of a config that comes with the package")
    data_command.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ: data.path=photos")
    data_command.add_argument("--output", metavar="FILE", help="PNG of the first training images")
    data_command.add_argument("--overwrite", action="store_true", help="replace the PNG")
    data_command.add_argument("--count", type=at_least(1), metavar="N", help=f"images on it ({CONTACTS})")
    data_command.add_argument("--seconds", type=non_negative, default=3.0, metavar="S", help="time the feed alone so long (%(default)s)")
    data_command.add_argument("--json", action="store_true", help="print JSON")

    encode = command(
        "encode",
        run_encode,
        "write mu and var [N, Z] of images, their places along --axes [N, A], and their factors where they are known",
        "encode runs/disks --data photos.npy --output latents.npz",
        model_options(),
        data_options(),
        axes_options(),
    )
    encode.add_argument("--count", type=at_least(1), metavar="N", help="the first N images; all of a file when left out")
