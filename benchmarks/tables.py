"""The tables of README.md and docs/, made from the committed rows.

python -m benchmarks.tables            # writes all of them again
python -m benchmarks.tables --check    # exit status 1 where one differs from its rows, and which

A table stands between `<!-- NAME -->` and `<!-- end of NAME -->`, each a line of its own. The first word of the name says which module
here writes it, the rest is what its function `generated` is given.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from .rows import RESULTS, ROOT, Row, write_rows

# By the first word of a table's name, the module that writes it.
WRITERS = {name: name for name in ("claims", "recovery", "methods", "pretrained", "performance", "shards", "wire")} | {"plan": "scaling"}
BLOCK = re.compile(r"^<!-- (?P<name>[\w -]+?) -->\n(?P<inside>(?:.*\n)*?)<!-- end of (?P=name) -->$", re.MULTILINE)


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def generated(name: str) -> str:
    """What must stand between the markers of this name. ValueError: nobody writes it, or there are no rows for it."""
    first, _, rest = name.partition(" ")
    if first not in WRITERS:
        raise ValueError(f"{name}: nobody writes it; the first word is one of {', '.join(WRITERS)}")
    return import_module(f".{WRITERS[first]}", __package__).generated(rest)


def blocks(text: str) -> list[re.Match[str]]:
    """The tables of a document. ValueError: one has no beginning."""
    found = list(BLOCK.finditer(text))
    if lost := set(re.findall(r"^<!-- end of (.+) -->$", text, re.MULTILINE)) - {block["name"] for block in found}:
        raise ValueError(f"{', '.join(sorted(lost))}: the end of a table that has no beginning")
    return found


def write_block(path: Path, name: str, table: str) -> None:
    """Put a table between its markers in a file, or at its end."""
    text = path.read_text() if path.exists() else "# Results\n"
    old = next((block[0] for block in blocks(text) if block["name"] == name), None)
    new = f"<!-- {name} -->\n{table}\n<!-- end of {name} -->"
    path.write_text(text.replace(old, new) if old else f"{text.rstrip()}\n\n{new}\n")


def rewrite(path: Path, first: str = "") -> None:
    """Make the tables of a document again, or those alone whose name begins with this word."""
    for name in [block["name"] for block in blocks(path.read_text())]:
        if name.split()[0] == (first or name.split()[0]):
            write_block(path, name, generated(name))


def publish(rows: list[Row], key: Sequence[str], file: str, output: Path | None, blocks: dict[str, str]) -> None:
    """Rows of a command into a file of RESULTS, and the tables of all documents made again; or both beside `output`, for a trial.

    Args:
        rows, key: As `write_rows`.
        file: Name of the file without its ending, and first word of the tables' names.
        output: Markdown file of a trial.
        blocks: Its tables by name.
    """
    write_rows(output.with_suffix(".jsonl") if output else RESULTS / f"{file}.jsonl", rows, key)
    for path in documents() if output is None else []:
        for written in (file, "claims"):
            rewrite(path, written)
    for name, text in blocks.items():
        if output is not None:
            write_block(output, name, text)
        print(text)


def stale(path: Path) -> list[str]:
    """Names of the tables of a document that are not what their rows give."""
    return [block["name"] for block in blocks(path.read_text()) if block["inside"] != generated(block["name"]) + "\n"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    differ = [f"{path.relative_to(ROOT)}: {name}" for path in documents() for name in stale(path)]
    for path in [] if check else documents():
        rewrite(path)
    print(*differ, f"{len(differ)} tables {'differ from their rows' if check else 'are new'}", sep="\n")
    return 1 if check and differ else 0


if __name__ == "__main__":
    sys.exit(main())
