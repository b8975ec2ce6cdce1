"""The command that makes shards out of any source of images."""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError, printable
from ..progress import bar
from .options import AddCommand, at_least, path

if TYPE_CHECKING:
    from ..config import Config

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
SHOWN = 5  # names of images that could not be packed


def size(text: str) -> int:
    found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?) ?([kmg]?)b?", text.lower())
    nbytes = float(found[1]) * UNITS[found[2]] if found else 0
    if not 10**3 <= nbytes <= 10**12:
        raise argparse.ArgumentTypeError(f"expected a size from 1KB to 1000GB, such as 100MB, found {text!r}")
    return int(nbytes)


def _source(arguments: argparse.Namespace) -> "Config":
    """The settings of a config, or those that a folder or a file needs."""
    from ..config import load_config
    from ..data.pack import guess_kind

    kind = guess_kind(arguments.source)
    if kind or Path(arguments.source).is_dir():
        if not kind and not any(override.startswith("data.kind=") for override in arguments.overrides):
            raise UserError(f"{arguments.source}: expected images, videos or shards in it, found none; data.kind=... names another kind")
        named = [f"data.kind={kind}"] if kind else []
        return load_config(None, [*named, f"data.path={arguments.source}", *arguments.overrides])
    return load_config(arguments.source, arguments.overrides)


def run_pack(arguments: argparse.Namespace) -> None:
    from ..data.cache import in_words
    from ..data.pack import Packing, pack
    from ..environment import cores

    config = _source(arguments)
    packing = Packing(
        config.data, config.seed, arguments.format, arguments.shard_size, arguments.samples, arguments.quality, arguments.count
    )
    with bar(0, "packing", "images") as seen:

        def progress(done: int, total: int) -> None:
            seen.total = total
            seen.update(done - seen.n)

        made = pack(packing, Path(arguments.shards), arguments.workers or cores(), arguments.overwrite, progress)
    print(f"{arguments.shards}: {made.images} images in {made.shards} shards, {in_words(made.nbytes)}")
    if made.skipped:
        named = ", ".join(f"{name} ({reason})" for name, reason in list(made.skipped.items())[:SHOWN])
        more = f" and {len(made.skipped) - SHOWN} more" if len(made.skipped) > SHOWN else ""
        print(f"{len(made.skipped)} images could not be read and are not in them: {printable(named)}{more}")
    print("read them with " + " ".join(f"data.{name}={value}" for name, value in made.settings.items()))


def add_commands(command: AddCommand) -> None:
    added = command(
        "pack",
        run_pack,
        "make shards out of a folder of images or videos, an array, other shards, or what a config feeds: image files go in as they are, "
        "other images as PNG, labels beside them; an interrupted call goes on where it was",
        "pack photos shards/ --shard-size 100MB",
    )
    added.add_argument("source", type=path, help="a folder, a file, a pattern of shards, a YAML file, or a config of the package")
    added.add_argument("shards", type=path, help="the folder to write them into")
    added.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the source: data.labels=labels.csv")
    added.add_argument(
        "--format", choices=("webdataset", "parquet"), default="webdataset", help="tar archives, or parquet files (%(default)s)"
    )
    added.add_argument("--shard-size", type=size, default=10**8, metavar="SIZE", help="about how large each is (100MB)")
    added.add_argument("--samples", type=at_least(1), metavar="N", help="images of each shard, in place of its size")
    added.add_argument("--quality", type=at_least(1, 95), metavar="Q", help="images that are no files yet become JPEGs of this quality")
    added.add_argument("--count", type=at_least(1), metavar="N", help="the first N images; all when left out")
    added.add_argument("--workers", type=at_least(1, 256), metavar="N", help="processes; as many as there are CPU cores when left out")
    added.add_argument("--overwrite", action="store_true", help="replace other shards in the folder")
