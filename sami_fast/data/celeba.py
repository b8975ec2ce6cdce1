"""CelebA's text files: which image is in which part, and what it shows. Source: Liu et al., ICCV 2015."""

from pathlib import Path

import numpy as np

from ..errors import UserError
from ..files import absent
from .storage import readable

ATTRIBUTES = 40
PARTITION = {"train": "0", "valid": "1", "test": "2"}


def celeba_listing(folder: Path, split: int, evaluation: str) -> tuple[Path, list[str], np.ndarray, tuple[str, ...]]:
    """The images of a split, in the order of list_attr_celeba.txt. Whether each of them is there is not checked.

    Args:
        folder: Holds img_align_celeba/, list_attr_celeba.txt and list_eval_partition.txt, or the same three below Img/, Anno/ and Eval/.
        split: 0 for the official training part, 1 for evaluation.
        evaluation: The part that evaluation sees: "valid" or "test".
    Returns:
        The folder of the images; N file names; attributes [N, 40] float32, 0 or 1; the names of the attributes.
    Raises:
        UserError: missing or damaged file; files that contradict each other; no images in the split.
    """
    if not folder.is_dir():
        raise UserError(f"data.path: {absent(folder, 'folder')}")
    images = _find(folder, "Img", "img_align_celeba")
    attribute_file, partition_file = _find(folder, "Anno", "list_attr_celeba.txt"), _find(folder, "Eval", "list_eval_partition.txt")
    if not images.is_dir():
        raise UserError(f"data.path: expected {images} to be a folder of images")
    names, attributes, attribute_names = _attributes(attribute_file)
    parts = _partition(partition_file)
    for here, there, file, other in ((names, parts, attribute_file, partition_file), (parts, set(names), partition_file, attribute_file)):
        if missing := [name for name in here if name not in there]:
            raise UserError(f"data.path: {len(missing)} names of {file} are not in {other}, such as {missing[0]}")
    part = evaluation if split else "train"
    places = [place for place, name in enumerate(names) if parts[name] == PARTITION[part]]
    if not places:
        raise UserError(f"data.path: no image has partition {PARTITION[part]} ({part}) in {partition_file}")
    return images, [names[place] for place in places], attributes[places], attribute_names


def _find(folder: Path, below: str, name: str) -> Path:
    for found in (folder / name, folder / below / name):
        if found.exists():
            return found
    raise UserError(f"data.path: neither {name} nor {below}/{name} in {folder}")


def _lines(file: Path) -> list[str]:
    with readable(file, "text file"):
        return file.read_text("utf-8").rstrip().splitlines()


def _attributes(file: Path) -> tuple[list[str], np.ndarray, tuple[str, ...]]:
    """(file names, [N, 40] float32, attribute names)."""
    lines = _lines(file)
    count = lines[0].strip() if lines else ""
    if not count.isdecimal():
        raise UserError(f"data.path: expected the number of images in line 1 of {file}, found {count[:40]!r}")
    if int(count) != len(lines) - 2:
        raise UserError(f"data.path: expected {count} images after the two first lines of {file}, as line 1 says, found {len(lines) - 2}")
    attribute_names = tuple(lines[1].split())
    if len(attribute_names) != ATTRIBUTES:
        raise UserError(f"data.path: expected {ATTRIBUTES} names in line 2 of {file}, found {len(attribute_names)}")
    names, attributes = [], np.empty((int(count), ATTRIBUTES), np.float32)
    for place, line in enumerate(lines[2:]):
        name, *values = line.split() or [""]
        if len(values) != ATTRIBUTES:
            raise UserError(f"data.path: expected a name and {ATTRIBUTES} values in line {place + 3} of {file}, found {len(values)} values")
        if wrong := set(values) - {"-1", "1"}:
            raise UserError(f"data.path: expected -1 or 1 in line {place + 3} of {file}, found {min(wrong)!r}")
        names.append(name)
        attributes[place] = [value == "1" for value in values]
    if len(set(names)) < len(names):
        raise UserError(f"data.path: a name is more than once in {file}")
    return names, attributes, attribute_names


def _partition(file: Path) -> dict[str, str]:
    """Name -> "0", "1" or "2"."""
    parts: dict[str, str] = {}
    for number, line in enumerate(_lines(file), 1):
        fields = line.split()
        if len(fields) != 2 or fields[1] not in PARTITION.values():
            raise UserError(f"data.path: expected a name and 0, 1 or 2 in line {number} of {file}, found {line[:40]!r}")
        if fields[0] in parts:
            raise UserError(f"data.path: {fields[0]} is more than once in {file}")
        parts[fields[0]] = fields[1]
    return parts
