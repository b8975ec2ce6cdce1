"""What many images in shards cost: the first batch, and the memory of the process that reads them.

python -m benchmarks.shards                    # up to a million images, about ten minutes; results/shards.jsonl and docs/data.md
python -m benchmarks.shards --images 10000 --output try.md

The images are tiny, so that little but their number costs anything. Each row is of a process of its own: it opens the shards, for the first
time or again, and takes batches as training does. The files were written just before, so they lie in the memory of the system; from a disk
the first start also takes what reading every header takes there.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil
import torch

from sami_fast.config import DataConfig
from sami_fast.data import Feed, open_dataset
from sami_fast.data.pack import ENDINGS, Item, encode_image, write_parquet, write_tar
from sami_fast.environment import describe

from .performance import feed
from .rows import RESULTS, ROOT, Row, address, committed, write_rows
from .table import Columns, page_table
from .tables import rewrite, write_block

SIDE = 8  # pixels
SHARDS = 100
BATCH, BATCHES = 64, 400  # batches after which memory is looked at again
KEY = ("kind", "images", "start")


def items(numbers: range) -> Iterator[Item]:
    """Grey images whose first pixels spell their numbers, so that no two are the same."""
    for number in numbers:
        pixels = np.zeros(SIDE * SIDE, np.uint8)
        pixels[:4] = np.frombuffer(number.to_bytes(4), np.uint8)
        content, ending = encode_image((pixels / np.float32(127.5) - 1).reshape(1, SIDE, SIDE), None)
        yield Item(f"{number:07}", ending, content, {})


def write_shard(path: Path, numbers: range) -> None:
    with open(path, "wb") as stream:
        if path.suffix == ENDINGS["parquet"]:
            write_parquet(stream, items(numbers), {})
        else:
            write_tar(stream, items(numbers))


def opened(kind: str, folder: Path, images: int) -> Row:
    """The measurement itself, in a process of its own: seconds since it began, and bytes of it that no other process shares."""
    process = psutil.Process()

    def now() -> dict[str, float]:
        used = process.cpu_times()
        return {"seconds": time.time() - process.create_time(), "cpu_seconds": used.user + used.system}

    loaded = now()
    config = DataConfig(kind=kind, path=str(folder), image_size=SIDE, channels=1, holdout=0.01, cache_dir=str(folder.parent / "cache"))
    feed = Feed(open_dataset(config, 0), BATCH, 1, 0, 1, 0, torch.device("cpu"))
    feed.micro_batch(0, 0)
    first, own = now(), process.memory_full_info()
    for step in range(1, BATCHES):
        feed.micro_batch(step, 0)
    later = process.memory_full_info()
    shown = feed.dataset.size
    feed.close()
    assert shown == images - round(0.01 * images), f"{shown} of {images} images"
    since = {key: first[key] - loaded[key] for key in first}
    return {**since, "process_seconds": first["seconds"], "uss": own.uss, "rss": own.rss, "uss_later": later.uss, "rss_later": later.rss}


def measured(kind: str, images: int) -> list[Row]:
    """Two starts on new shards."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "shards"
        folder.mkdir()
        for shard in range(SHARDS):
            numbers = range(shard * images // SHARDS, (shard + 1) * images // SHARDS)
            write_shard(folder / f"{shard:05}{ENDINGS[kind]}", numbers)
        rows = []
        for start in ("first", "later"):
            command = [sys.executable, "-m", "benchmarks.shards", "--measure", kind, str(folder), "--images", str(images)]
            said = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
            rows.append({"kind": kind, "images": images, "start": start, **json.loads(said.splitlines()[-1])})
            print(rows[-1], flush=True)
        return rows


def table(rows: list[Row]) -> str:
    columns: Columns = {
        "`data.kind`": (lambda row: f"`{row['kind']}`", ""),
        "images": ("images", ","),
        "start": ("start", ""),
        "first batch after, s": ("seconds", ".1f"),
        "of these CPU, s": ("cpu_seconds", ".1f"),
        "own memory then, MB": (lambda row: row["uss"] / 1e6, ".0f"),
        f"after {BATCHES} batches, MB": (lambda row: row["uss_later"] / 1e6, ".0f"),
    }
    return page_table(rows, columns)


def generated(what: str) -> str:
    """The tables of docs/data.md: starts and memory, or, `feed`, rows of `pytest benchmarks/test_feed.py -k shards`."""
    return feed(committed("shards_feed.jsonl")) if what else table(committed("shards.jsonl"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="numbers of images (%(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=ENDINGS, default=[*ENDINGS], help="(%(default)s)")
    parser.add_argument("--output", type=Path, help="markdown file for the table, with rows beside it; docs/data.md by default")
    parser.add_argument("--measure", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        kind, folder = arguments.measure
        print(json.dumps(opened(kind, Path(folder), *arguments.images)))
        return
    where = address(describe(), "python -m benchmarks.shards", str(datetime.now(UTC).date()))
    rows = [row | where for kind in arguments.kinds for images in arguments.images for row in measured(kind, images)]
    write_rows(arguments.output.with_suffix(".jsonl") if arguments.output else RESULTS / "shards.jsonl", rows, KEY)
    if arguments.output:
        write_block(arguments.output, "shards", table(rows))
    else:
        rewrite(ROOT / "docs/data.md", "shards")


if __name__ == "__main__":
    main()
