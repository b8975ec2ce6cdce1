"""Shards out of any source of images: tar archives in WebDataset's layout, or parquet files as Hugging Face datasets have them.

Image files go in as they are. Of all other images, such as the frames of videos, come PNGs, which hold their pixels exactly, or JPEGs.
"""

import io
import json
import os
import re
import signal
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from multiprocessing import get_context, parent_process
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from ..config import DECODED, USED_BY, DataConfig
from ..errors import UserError
from ..files import read_json, remove_partial, write_text_whole, write_whole
from . import open_dataset
from .dataset import Dataset
from .decode import IMAGE_SUFFIXES, VIDEO_SUFFIXES, BadFile, image_facts
from .decoded import Decoded
from .identity import digest
from .image_folder import Encoded
from .parquet import arrow
from .shards import SPECIAL
from .video_folder import VideoFolder

ENDINGS = {"webdataset": ".tar", "parquet": ".parquet"}  # by `DataConfig.kind`
MANIFEST = ".pack.json"  # in the folder of the shards: what they are made from, by which an interrupted pack goes on
PIECE = 64  # images that are read at once, and by which the size of all is estimated
ROW_GROUP = 100  # rows of a row group: what has to be read to see one of its images
MOST_GUESSED = 1000  # files by whose endings a folder's kind is told
IMAGE = "image"  # the column of the images


class Item(NamedTuple):
    """An image on its way into a shard.

    Args:
        key: A name without an ending.
        ending: "png", "jpg" ...
        content: The image file.
        labels: What is known of it, by name.
    """

    key: str
    ending: str
    content: bytes
    labels: dict[str, Any]


@dataclass(frozen=True)
class Packing:
    """What to make.

    Args:
        data: The source; its holdout is packed too.
        seed: The run's, for sources that depend on it.
        form: A key of `ENDINGS`.
        shard_bytes: About how large a shard is.
        samples: Images of each shard, in place of that.
        quality: Of JPEGs; None: PNG.
        count: The first so many images; None: all.
    """

    data: DataConfig
    seed: int = 0
    form: str = "webdataset"
    shard_bytes: int = 100 * 10**6
    samples: int | None = None
    quality: int | None = None
    count: int | None = None


@dataclass(frozen=True)
class PackedShards:
    """What was made: shards and images in them, their bytes, how to read them, and why others are not in it, by name."""

    shards: int
    images: int
    nbytes: int
    settings: dict[str, Any]
    skipped: dict[str, str] = field(default_factory=dict)


def guess_kind(path: str) -> str:
    """The `DataConfig.kind` of a file, a folder or a pattern, by endings; "" where they say nothing."""
    of_ending = {ending: kind for kind, ending in ENDINGS.items()} | dict.fromkeys((".npy", ".npz", ".h5", ".hdf5"), "array")
    if not os.path.isdir(path):
        return of_ending.get(os.path.splitext(path)[1].lower(), "") if os.path.isfile(path) or SPECIAL.search(path) else ""
    of_ending = {ending: kind for kind, ending in ENDINGS.items()}
    of_ending |= dict.fromkeys(VIDEO_SUFFIXES, "video_folder") | dict.fromkeys(IMAGE_SUFFIXES, "image_folder")
    seen: dict[str, int] = {}
    for _, _, files in os.walk(path, followlinks=True):
        for name in files:
            if (kind := of_ending.get(os.path.splitext(name)[1].lower())) is not None:
                seen[kind] = seen.get(kind, 0) + 1
        if sum(seen.values()) > MOST_GUESSED:
            break
    return max(seen, key=lambda kind: seen[kind]) if seen else ""


class Packer:
    """Writes any of the shards, whole. Each process has its own.

    Args:
        packing: What to make.
        per_shard: Images of each; 0: it is told later.
    Raises:
        UserError: the source cannot be read, has no end, or its images have other channels than 1 or 3.
    """

    def __init__(self, packing: Packing, per_shard: int = 0) -> None:
        self.packing, self.per_shard = packing, per_shard
        data = packing.data
        if data.kind in DECODED:
            data = replace(data, cache_gib=0.0)  # each image is read once
        splits = (0, 1) if data.kind == "celeba" else (0,)
        if data.kind in USED_BY["holdout"]:
            data = replace(data, holdout=0.0)
        self.sources = [open_dataset(data, packing.seed, split) for split in splits]
        self.channels = self.sources[0].image_shape[0]
        if self.channels not in (1, 3):
            raise UserError(f"data.channels: images in shards have 1 channel or 3, found {self.channels}")
        if self.sources[0].size is None and packing.count is None:
            raise UserError(f"--count: data.kind {data.kind} has no end; say how many of its images are wanted")
        sizes = [packing.count if source.size is None else source.size for source in self.sources]
        self.firsts = np.cumsum([0, *(size or 0 for size in sizes)])
        if packing.count is not None and packing.count > self.firsts[-1]:
            raise UserError(f"--count: expected at most {self.firsts[-1]}, the number of images there are, found {packing.count}")
        self.count = int(self.firsts[-1]) if packing.count is None else packing.count
        self.orders = [torch.arange(packing.count or 0) if source.size is None else source.in_order() for source in self.sources]
        self.skipped: dict[str, str] = {}

    @property
    def shards(self) -> int:
        return -(-self.count // self.per_shard)

    def name(self, shard: int) -> str:
        return f"{shard:06}{ENDINGS[self.packing.form]}"

    @cached_property
    def labels(self) -> list[dict[str, tuple[list[Any], np.ndarray]]]:
        """Columns of labels of each source: their different values, and which of them each file has; {} where there is no table."""
        found = [source.label_columns() if isinstance(source, Decoded) else {} for source in self.sources]
        return [{name: (typed(column.texts), column.codes) for name, column in columns.items()} for columns in found]

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the images and their labels."""
        data = self.packing.data
        parts = [repr((data.celeba, data.video, data.range))]
        parts += [part for source in self.sources for part in (source.fingerprint, *map(str, source.image_shape), *source.factor_names)]
        for columns in self.labels:
            for name, (values, codes) in columns.items():
                parts += [name, repr(values), digest(map(str, codes.tolist()))]
        return digest(parts)

    def items(self, first: int, last: int) -> Iterator[Item | None]:
        """Images of these numbers, in order; None for one that cannot be read, which is remembered in `skipped`."""
        for number, source in enumerate(self.sources):
            begin, end = (max(0, edge - int(self.firsts[number])) for edge in (first, last))
            index = self.orders[number][begin:end]
            for place, piece in enumerate(index.split(PIECE)):
                yield from self._piece(number, source, piece, int(self.firsts[number]) + begin + place * PIECE)

    def _piece(self, number: int, source: Dataset, index: torch.Tensor, first: int) -> Iterator[Item | None]:
        if not len(index):
            return
        labels, names = self._labels_of(number, source, index)
        kept = isinstance(source, Encoded) and source.crop == "center"  # else what is read back would be another part
        images, absent = (None, {}) if kept else source.read(index)
        for slot in range(len(index)):
            name = names[slot] or str(first + slot)
            folder = PurePosixPath(name if isinstance(source, VideoFolder) else PurePosixPath(name).parent)
            try:
                if slot in absent:
                    raise BadFile(absent[slot].removeprefix(f"{name}: "))
                if isinstance(source, Encoded) and kept:
                    content = source.encoded(int(source.places_of(index[slot : slot + 1])[0])).tobytes()
                    ending = _ending(name, content)
                else:
                    assert images is not None
                    content, ending = encode_image(images[slot].cpu().numpy(), self.packing.quality)
            except (OSError, BadFile) as error:
                self.skipped[name] = getattr(error, "strerror", None) or str(error)
                yield None
                continue
            key = f"{first + slot:09}"
            yield Item(key if str(folder) == "." else f"{folder}/{key}", ending, content, labels[slot])

    def _labels_of(self, number: int, source: Dataset, index: torch.Tensor) -> tuple[list[dict[str, Any]], list[str]]:
        """What is known of each image, and the names of their files or ""."""
        found = source.sources(index)
        names = found.get("files", [""] * len(index))
        rows: list[dict[str, Any]] = [{"file": name} if name else {} for name in names]
        for row, frame in zip(rows, found.get("frames", []), strict=False):
            row["frame"] = frame
        if len(self.sources) > 1:
            part = ("train", self.packing.data.celeba.evaluation)[number]
            rows = [row | {"split": part} for row in rows]
        if isinstance(source, Decoded) and self.labels[number]:
            files = source.files_of(index).tolist()
            table = self.labels[number].items()
            rows = [row | {name: values[codes[file]] for name, (values, codes) in table} for row, file in zip(rows, files, strict=True)]
        elif source.factor_names:
            factors = source.factors(index).tolist()
            rows = [row | dict(zip(source.factor_names, values, strict=True)) for row, values in zip(rows, factors, strict=True)]
        return rows, names

    def estimate(self) -> int:
        """Images of a shard of about the size that is asked for, by a few of them."""
        if self.packing.samples is not None:
            return self.packing.samples
        some = np.unique(np.linspace(0, self.count - 1, PIECE).astype(np.int64)).tolist()
        sizes = [_room(item) for place in some for item in self.items(place, place + 1) if item is not None]
        if not sizes:
            raise UserError(f"data.path: none of the images that were looked at can be read: {next(iter(self.skipped.items()))}")
        self.skipped.clear()
        return max(1, int(self.packing.shard_bytes / np.mean(sizes)))

    def write(self, folder: Path, shard: int, tell: Callable[[int], object]) -> dict[str, str]:
        """Make one shard, which appears whole. `tell` is told how many images are done. Returns why others are not in it, by name."""
        self.skipped = {}
        first = shard * self.per_shard

        def items() -> Iterator[Item]:
            for item in self.items(first, min(first + self.per_shard, self.count)):
                if item is not None:
                    yield item
                tell(1)

        write = write_tar if self.packing.form == "webdataset" else self._write_parquet
        write_whole(folder / self.name(shard), lambda stream: write(stream, items()))
        return self.skipped

    def _write_parquet(self, stream: BinaryIO, items: Iterable[Item]) -> None:
        write_parquet(stream, items, self._types())

    def _types(self) -> dict[str, type]:
        """Of the labels, which are the same in every shard."""
        types: dict[str, type] = {}
        for number, source in enumerate(self.sources):
            (row,), _ = self._labels_of(number, source, self.orders[number][:1])
            for name, value in row.items():
                column = self.labels[number].get(name)
                kinds = {type(one) for one in column[0] if one is not None} if column else {type(value)}
                types[name] = kinds.pop() if len(kinds) == 1 else str
        return types


def typed(texts: list[str]) -> list[Any]:
    """Texts of a column as numbers or truth values, where all of them are, and are written in the one way that these are."""
    if {*texts} - {""} <= {"true", "false"}:
        return [{"true": True, "false": False}.get(text) for text in texts]
    for kind in (int, float):
        with suppress(ValueError, OverflowError):
            numbers = [kind(text) if text else None for text in texts]
            if all(str(number) == text for number, text in zip(numbers, texts, strict=True) if text):
                return numbers
    return [*texts]


def encode_image(image: np.ndarray, quality: int | None) -> tuple[bytes, str]:
    """[C, H, W] float32 in [-1, 1] -> an image file of 8 bits, and its ending: a JPEG of this quality, or a PNG."""
    from PIL import Image

    pixels = np.rint((np.clip(image, -1, 1) + 1) * 127.5).astype(np.uint8)
    shown = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    target = io.BytesIO()
    if quality is None:
        shown.save(target, "PNG")
        return target.getvalue(), "png"
    shown.save(target, "JPEG", quality=quality)
    return target.getvalue(), "jpg"


def _ending(name: str, content: bytes) -> str:
    """What the name of an image ends in, or should."""
    ending = PurePosixPath(name).suffix.lower()
    if ending in IMAGE_SUFFIXES:
        return ending[1:]
    form = image_facts(content)[2].split()[0].lower()
    ending = {"jpeg": "jpg", "mpo": "jpg", "jpeg2000": "jp2"}.get(form, form)
    if f".{ending}" not in IMAGE_SUFFIXES:
        raise BadFile(f"{form} images have no place in shards")
    return ending


def _room(item: Item) -> int:
    """Bytes of a sample in a shard: of the archive, two headers and what its files are padded to."""
    return len(item.content) + len(json.dumps(item.labels)) + 1536


def write_tar(stream: BinaryIO, items: Iterable[Item]) -> None:
    """An archive that depends on the images alone: no times, no owners."""
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for item in items:
            files = {item.ending: item.content}
            if item.labels:
                files["json"] = json.dumps(item.labels, ensure_ascii=False).encode("utf-8", "backslashreplace")
            for ending, content in files.items():
                info = tarfile.TarInfo(f"{item.key}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def write_parquet(stream: BinaryIO, items: Iterable[Item], types: Mapping[str, type]) -> None:
    """A file with a column of images, as Hugging Face datasets know it, and one for each label.

    Raises:
        UserError: a label is called as the column of images is.
    """
    if IMAGE in types:
        raise UserError(f"--format: parquet has its images in the column {IMAGE!r}, and so is a label called; use webdataset")
    pyarrow, parquet = arrow()
    of_type = {bool: ("bool", pyarrow.bool_()), int: ("int64", pyarrow.int64()), float: ("float64", pyarrow.float64())}
    columns = {name: of_type.get(kind, ("string", pyarrow.string())) for name, kind in types.items()}
    features = {IMAGE: {"_type": "Image"}} | {name: {"dtype": kind, "_type": "Value"} for name, (kind, _) in columns.items()}
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema(
        [(IMAGE, image), *((name, kind) for name, (_, kind) in columns.items())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    with parquet.ParquetWriter(stream, schema, use_dictionary=[*columns], write_statistics=False) as writer:
        rows: list[dict[str, Any]] = []

        def flush() -> None:
            if rows:
                writer.write_table(pyarrow.Table.from_pylist(rows, schema), row_group_size=ROW_GROUP)
                rows.clear()

        for item in items:
            labels = {name: _as(item.labels.get(name), types[name]) for name in columns}
            rows.append({IMAGE: {"bytes": item.content, "path": f"{item.key}.{item.ending}"}} | labels)
            if len(rows) == ROW_GROUP:
                flush()
        flush()


def _as(value: Any, kind: type) -> Any:
    return str(value) if kind is str and value is not None else value


# All shards, by several processes

_packer: Packer | None = None
_done: Any = None


def _begin(packing: Packing, per_shard: int, done: Any) -> None:
    global _packer, _done
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _packer, _done = Packer(packing, per_shard), done


def _end_with_parent() -> None:
    """Who asked for shards may be killed: nobody would end this process then."""
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(1)


def _tell(images: int) -> None:
    with _done.get_lock():
        _done.value += images


def _write(folder: Path, shard: int) -> dict[str, str]:
    assert _packer is not None
    return _packer.write(folder, shard, _tell)


def pack(packing: Packing, folder: Path, workers: int, overwrite: bool, progress: Callable[[int, int], object]) -> PackedShards:
    """Make shards of all images of a source. What an interrupted call has finished is kept, if it was to make the same.

    Args:
        packing: What to make.
        folder: Where; made if need be.
        workers: Processes.
        overwrite: Replace other shards that are there.
        progress: Told after a while how many images of how many are done.
    Raises:
        UserError: the source cannot be packed, or the folder holds something else.
    """
    packer = Packer(packing)
    asked = {"source": packer.fingerprint, **{name: value for name, value in asdict(packing).items() if name not in ("data", "seed")}}
    per_shard, skipped = _goes_on(folder, asked, overwrite)
    packer.per_shard = per_shard or packer.estimate()
    folder.mkdir(parents=True, exist_ok=True)
    remove_partial(folder)

    def remember(more: dict[str, str]) -> None:
        skipped.update(more)
        write_text_whole(folder / MANIFEST, json.dumps({"asked": asked, "per_shard": packer.per_shard, "skipped": skipped}))

    remember({})
    missing = [shard for shard in range(packer.shards) if not (folder / packer.name(shard)).exists()]
    done = packer.count - sum(min(packer.per_shard, packer.count - shard * packer.per_shard) for shard in missing)
    progress(done, packer.count)
    if workers > 1 and len(missing) > 1:
        context = get_context("spawn")  # torch's threads do not survive a fork
        told = context.Value("q", 0)
        with ProcessPoolExecutor(min(workers, len(missing)), context, _begin, (packing, packer.per_shard, told)) as pool:
            waiting = {pool.submit(_write, folder, shard) for shard in missing}
            try:
                while waiting:
                    finished, waiting = wait(waiting, timeout=0.5)
                    progress(done + told.value, packer.count)
                    for future in finished:
                        if found := future.result():
                            remember(found)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    else:
        for shard in missing:
            written = [done]

            def tell(images: int, written: list[int] = written) -> None:
                written[0] += images
                progress(written[0], packer.count)

            if found := packer.write(folder, shard, tell):
                remember(found)
            done = written[0]
    files = [folder / packer.name(shard) for shard in range(packer.shards)]
    nbytes = sum(file.stat().st_size for file in files)
    return PackedShards(len(files), packer.count - len(skipped), nbytes, _settings(packer, folder), skipped)


def _settings(packer: Packer, folder: Path) -> dict[str, Any]:
    """With which the shards are read as their source was."""
    channels, side, _ = packer.sources[0].image_shape
    found = {"kind": packer.packing.form, "path": str(folder), "image_size": side, "channels": channels}
    return found | ({"labels": "all"} if any(packer.labels) or packer.sources[0].factor_names else {})


def _goes_on(folder: Path, asked: dict[str, Any], overwrite: bool) -> tuple[int, dict[str, str]]:
    """Images of each shard, and those that are not in them, where the folder holds a part of what is to be made, else 0 and none.

    Other shards are removed, or refused.
    """
    if not folder.exists():
        return 0, {}
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; expected a folder for the shards")
    shards = [file for file in folder.iterdir() if re.fullmatch(r"\d{6,}\.(tar|parquet)", file.name)]
    with suppress(OSError, ValueError, LookupError, TypeError):
        known = read_json(folder / MANIFEST)
        if known["asked"] == asked and not overwrite:
            return int(known["per_shard"]), dict(known["skipped"])
    if shards and not overwrite:
        raise UserError(f"{folder} holds {len(shards)} shards of something else; choose another folder or add --overwrite")
    (folder / MANIFEST).unlink(missing_ok=True)  # before any of them: without it, nobody goes on with what is left
    for shard in shards:
        shard.unlink(missing_ok=True)
    return 0, {}
