"""What data in shards share: files that hold many images each, which are looked into once and then read image by image, in any order.

A shard that is missing, cut off or damaged is left out whole, named and counted among the shards; an image in one among the images.
"""

import glob
import json
import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice, product
from pathlib import Path
from typing import Any, overload

import numpy as np

from ..errors import UserError, printable
from ..files import read_json, write_text_whole, write_whole
from . import cache
from .cache import in_words, tell_once, writable
from .decode import BadFile, image_facts
from .decoded import SHOWN_BAD, sizes
from .identity import content_of, digest
from .image_folder import Encoded, ImageFacts
from .index import VERSION, Index, build_index, left_out, log, report_bad, shown
from .labels import Column, Labels, labels_of

ALL = "all"  # as data.labels: every field that the shards have
MOST_SHARDS = 10**6  # that a pattern may stand for
MOST_FIELDS = 256  # different names of labels
LONGEST_LABEL = 1000  # letters of a label's text
LOOKED_AT = 64  # images, at equal distances, whose formats and sizes stand for all in `facts`
AT_A_TIME = 8  # shards after which what was found in them is kept
SPECIAL = re.compile(r"[{}*?\[\]]")


@dataclass(frozen=True)
class ShardIndex(Index):
    """Images of all shards as an `Index`; `contents` and `facts` are of the shards."""

    @property
    def state(self) -> str:
        """As of an `Index`; also changes with the times of shards, since of a large one not all bytes are in its content."""
        return digest([str(VERSION), *self.contents, *(f"{facts['bytes']} {facts['time']}" for facts in self.facts)])


class Names(Sequence[str]):
    """Names of all images, made as they are asked for: a million of them take no memory. A subclass gives `name`."""

    def __init__(self, count: int) -> None:
        self.size = count

    def name(self, place: int) -> str:
        raise NotImplementedError

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self.name(one) for one in range(*place.indices(self.size))]
        if not -self.size <= place < self.size:
            raise IndexError(place)
        return self.name(place % self.size)


def find_shards(path: str, ending: str) -> tuple[Path, list[str] | None]:
    """The folder of the shards and their names in it, which may be missing; None: all below the folder.

    Args:
        path: A folder, a file, or a pattern with `{000..099}`, `{train,test}`, `*`, `?` or `[0-9]`.
        ending: Of the files, for messages.
    Raises:
        UserError: there is nothing of that name.
    """
    if Path(path).is_dir():
        return Path(path), None
    if Path(path).is_file():
        return Path(path).parent, [Path(path).name]
    if not (special := SPECIAL.search(path)):
        raise UserError(f"data.path: no file or folder {path}")
    folder = os.path.dirname(path[: special.start()]) or "."
    found: list[str] = []
    for pattern in expanded_braces(path):
        wild = not os.path.exists(pattern) and glob.has_magic(pattern)
        found += sorted(glob.glob(pattern, recursive=True)) if wild else [pattern]
    if not found:
        raise UserError(f"data.path: no file matches {path}; expected {ending} files")
    return Path(folder), [*dict.fromkeys(os.path.relpath(file, folder).replace(os.sep, "/") for file in found)]


def expanded_braces(pattern: str) -> list[str]:
    """`a{0..2}.tar` and `a{x,y}.tar` as names, as a shell has them.

    Raises:
        UserError: they would be too many.
    """
    parts: list[Sequence[str]] = []
    for text in re.split(r"(\{[^{}]*\})", pattern):
        if (numbers := re.fullmatch(r"\{(\d{1,12})\.\.(\d{1,12})\}", text)) is not None:
            first, last = map(int, numbers.groups())
            padded = any(len(number) > 1 and number[0] == "0" for number in numbers.groups())
            width = max(map(len, numbers.groups())) if padded else 0
            step = 1 if last >= first else -1
            parts.append([f"{n:0{width}d}" for n in islice(range(first, last + step, step), MOST_SHARDS + 1)])
        else:
            parts.append(text[1:-1].split(",") if text.startswith("{") and "," in text else [text])
    names = ["".join(name) for name in islice(product(*parts), MOST_SHARDS + 1)]
    if len(names) > MOST_SHARDS:
        raise UserError(f"data.path: expected a pattern for at most {MOST_SHARDS} shards, found {pattern}")
    return names


class Shards(Encoded):
    """Images in shards. A subclass says what is in a shard, by `inspect`, `names_of`, `encoded` and `columns`.

    Args:
        path: A folder of shards, at any depth, one shard, or a pattern: see `find_shards`.
        labels: Fields that are scored as factors and attributes by the rules of `data.labels`, with commas between them, or `ALL`.
        holdout_by: A field, or "folder", the folder that an image is in within its shard.
        others: Settings and errors as in `Encoded`.
    """

    ending: str  # of the files
    unit: str  # what one image of them is called, in the plural

    shards: Index  # the files; their facts are what `inspect` says
    firsts: np.ndarray  # [S + 1] int64, place of the first image of each shard, and the number of all

    kept: Path  # the cache folder
    listing: str  # stands for the path, which may be one of several patterns for the same folder

    def __init__(self, path: str, **others: Any) -> None:
        self.lost_shards: dict[str, str] = {}  # that turned out to be unreadable while they were read
        self.listing = digest([path])[:8]
        super().__init__(path, self.inspect, frozenset({self.ending}), self.unit, part=self.listing, **others)

    def inspect(self, path: Path) -> dict[str, Any]:
        """What is to be known of a shard, as plain JSON.

        Returns:
            "images", their number; "bytes" and "time" of the file; "digest", changes with what lies where in it; "fields", names of the
            labels that were seen; "others", how many files of which endings in it are not used. A subclass may add to these.
        Raises:
            OSError, BadFile: the shard cannot be used.
        """
        raise NotImplementedError

    def names_of(self, index: Index) -> Names:
        """Names of all images: that of the shard, a slash, and the name inside. `index` lacks its names."""
        raise NotImplementedError

    def columns(self, wanted: Set[str] | None) -> dict[str, Column]:
        """Fields by name, those that are wanted or all, a row for each image, "" where it has none.

        Raises:
            UserError: a shard cannot be read any more.
        """
        raise NotImplementedError

    def _look(self, path: str, inspect: Any, suffixes: Any, what: str, names: Any, max_bad: float, cache_dir: str) -> Index:
        folder, listed = find_shards(path, self.ending)
        self.kept = cache.cache_dir(cache_dir, folder)
        shards = build_index(
            folder,
            inspect,
            suffixes,
            what=f"{self.ending[1:]} shards",
            max_bad=max_bad,
            configured_cache=cache_dir,
            names=listed,
            content=partial(content_of, block=2**12, blocks=2**12),
            piece=AT_A_TIME,
        )
        self.shards, self.firsts = shards, np.cumsum([0, *(facts["images"] for facts in shards.facts)])
        self._first_of = self.firsts.tolist()
        if not self.firsts[-1]:
            inside = left_out(self._others()) or "nothing"
            raise UserError(f"data.path: no images in the {len(shards.names)} {self.ending} file(s) of {folder}, found {inside}")
        known = zip(shards.names, shards.contents, shards.facts, strict=True)
        contents = [f"{name} {content} {facts['digest']}" for name, content, facts in known]
        index = ShardIndex(folder, shards.cache, (), shards.facts, {}, contents, shards.others)
        try:
            return replace(index, names=self.names_of(index))
        except OSError as error:
            raise UserError(f"data.cache_dir: cannot keep the index of {folder} there ({error})") from None

    def _others(self) -> Counter[str]:
        return sum((Counter(facts["others"]) for facts in self.shards.facts), Counter())

    # Labels

    def _labels(self, labels: str, holdout_by: str) -> Labels | None:
        group = "" if holdout_by == "folder" else holdout_by
        if not (labels or group):
            return None
        kept = self.index.cache / f"labels_{digest([self.index.state, labels, group])}"
        if (found := _kept_labels(kept)) is not None:
            return found
        asked = {name.strip() for name in labels.split(",") if name.strip()} | ({group} if group else set())
        tell_once(f"{self.index.folder}: reading the labels of {len(self.index.names)} {self.unit}, once")
        columns = self.columns(None if ALL in asked else asked)
        if missing := sorted(asked - {ALL} - columns.keys()):
            has = ", ".join(sorted({field for facts in self.shards.facts for field in facts["fields"]})[:SHOWN_BAD]) or "none"
            setting = "data.holdout_by" if missing == [group] else "data.labels"
            raise UserError(f"{setting}: no label {missing[0]!r} in the shards of {self.index.folder}, which have {has}")
        made = labels_of(columns, self.index.names, f"the shards of {self.index.folder}", group)
        try:
            _keep_labels(writable(self.index.cache) / kept.name, made)
        except OSError as error:
            log.warning("%s: labels are not kept: %s", self.index.cache, error.strerror)
        return made

    def label_columns(self) -> dict[str, Column]:
        return self.columns(None)

    # Reading

    def shard_of(self, place: int) -> int:
        """In which shard an image is."""
        return bisect_right(self._first_of, place) - 1

    def facts_of(self, place: int, encoded: np.ndarray) -> ImageFacts:
        return image_facts(encoded.tobytes())

    def any_lost(self) -> bool:
        return bool(self.lost or self.lost_shards)

    def why_lost(self, name: str) -> str:
        shard = next((shard for shard in self.lost_shards if name.startswith(f"{shard}/")), "")
        return self.lost_shards.get(shard) or super().why_lost(name)

    def _instead(self, place: int) -> int:
        """For a lost shard the next one stands, image by image."""
        shard = self.shard_of(place)
        if self.shards.names[shard] not in self.lost_shards:
            return 1
        first, last = np.searchsorted(self.places, self.firsts[shard : shard + 2])
        return int(last - first)

    def lose_shard(self, number: int, reason: str) -> BadFile:
        """Count a shard that cannot be read any more, and what to raise for the image that was wanted of it.

        Raises:
            UserError: they have become too many.
        """
        name, shards = self.shards.names[number], self.shards
        with self._lock:
            known = name in self.lost_shards
            self.lost_shards[name] = reason
            bad = shards.bad | self.lost_shards
        if not known:
            log.warning("%s: %s; in training other shards take its place", printable(f"{shards.folder}/{name}"), reason)
            total = len(shards.names) + len(shards.bad)
            if len(bad) > self.max_bad * total:
                report_bad(shards.folder, bad, total, self.max_bad, f"{self.ending[1:]} shards", shards.cache)
        return BadFile(reason)

    def check_shard(self, number: int, found: os.stat_result) -> None:
        """A `BadFile` where an open shard is not the one that was looked into."""
        facts = self.shards.facts[number]
        if (found.st_size, found.st_mtime_ns) != (facts["bytes"], facts["time"]):
            raise BadFile("changed since it was looked at")

    @cached_property
    def fingerprint(self) -> str:
        grouped = map(str, self.places) if self.groups else []
        return digest([*self.index.contents, str(self.size), *grouped])

    # What is known, in words

    def looked_at(self) -> list[ImageFacts]:
        """What a few images are, at equal distances among all."""
        found = []
        for place in np.unique(np.linspace(0, self.count - 1, LOOKED_AT).astype(np.int64)).tolist():
            with suppress(OSError, BadFile):
                found.append(self.facts_of(place, self.encoded(place)))
        return found

    def facts(self) -> dict[str, Any]:
        shards, some = self.shards, self.looked_at()
        each, nbytes = np.diff(self.firsts), [facts["bytes"] for facts in shards.facts]
        fields = Counter(field for facts in shards.facts for field in facts["fields"])
        decoders = Counter((form, *self.described(form, suits)) for _, _, form, suits in some)
        of_some = f"of {len(some)} that were looked at"
        return {
            "folder": str(shards.folder),
            "shards": f"{len(shards.names)}, {in_words(sum(nbytes))}, {in_words(min(nbytes))} to {in_words(max(nbytes))} each",
            self.unit: f"{self.count}, {each.min()} to {each.max()} in a shard",
            "pixels": f"{sizes([(width, height) for width, height, _, _ in some])} ({of_some})" if some else "none could be read",
            "decoders": [f"{count} x {form}: {decoder}, {why} ({of_some})" for (form, decoder, why), count in decoders.most_common()],
            "labels": ", ".join(f"{field}" for field in fields) + "; data.labels chooses which are scored" if fields else "none",
            "left out": left_out(self._others()) or "nothing in the shards",
            "unreadable": f"{len(shards.bad)} shards" + (f": {shown(shards.bad, SHOWN_BAD)}" if shards.bad else ""),
            **self.notes(),
        }


def text_of(value: Any) -> str | None:
    """A label as the text that a table would have; None of what is no label, such as a list."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float | str):
        return encodable(str(value)[:LONGEST_LABEL])
    return "" if value is None else None


def encodable(text: str) -> str:
    """A text that UTF-8 can hold: JSON may have halves of letters, which become question marks."""
    return text.encode("utf-8", "replace").decode()


class Columns:
    """Labels as they are read, row after row.

    Args:
        rows: Number of all of them.
        wanted: Fields; None: all.
    """

    def __init__(self, rows: int, wanted: Set[str] | None) -> None:
        self.rows, self.wanted = rows, wanted
        self.codes: dict[str, np.ndarray] = {}
        self.texts: dict[str, dict[str, int]] = {}

    def add(self, row: int, labels: Mapping[str, Any]) -> None:
        """Those of a row. Raises `UserError` where there are too many fields."""
        for name, value in labels.items():
            if (self.wanted is not None and name not in self.wanted) or (text := text_of(value)) is None:
                continue
            if name not in self.codes:
                if len(self.codes) == MOST_FIELDS:
                    raise UserError(f"data.labels: more than {MOST_FIELDS} different labels in the shards; name those that you want")
                self.codes[name], self.texts[name] = np.zeros(self.rows, np.int32), {"": 0}
            texts = self.texts[name]
            self.codes[name][row] = texts.setdefault(text.strip(), len(texts))

    def columns(self) -> dict[str, Column]:
        found = {}
        for name, codes in self.codes.items():
            used, new = np.unique(codes, return_inverse=True)  # without "" where every row has a text
            texts = [*self.texts[name]]
            found[name] = Column([texts[code] for code in used], new.astype(np.int32))
        return found


def _keep_labels(stem: Path, labels: Labels) -> None:
    texts = [*dict.fromkeys(labels.groups)] if labels.groups is not None else None
    codes = {text: code for code, text in enumerate(texts or [])}
    write_whole(stem.with_suffix(".npy"), lambda stream: np.save(stream, labels.values))
    groups = np.array([codes[text] for text in labels.groups or []], np.int32)
    write_whole(stem.with_suffix(".groups.npy"), lambda stream: np.save(stream, groups))
    facts = {"names": labels.names, "attributes": sorted(labels.attributes), "unscored": labels.unscored, "groups": texts}
    write_text_whole(stem.with_suffix(".json"), json.dumps(facts))


def _kept_labels(stem: Path) -> Labels | None:
    """Values are mapped, not read: those of a million images need no memory."""
    try:
        facts = read_json(stem.with_suffix(".json"))
        values, codes = np.load(stem.with_suffix(".npy"), mmap_mode="r"), np.load(stem.with_suffix(".groups.npy"))
        groups = None if facts["groups"] is None else [facts["groups"][code] for code in codes.tolist()]
        return Labels(tuple(facts["names"]), frozenset(facts["attributes"]), values, groups, tuple(facts["unscored"]))
    except (OSError, EOFError, ValueError, LookupError, TypeError):
        return None  # not there, or damaged: made anew
