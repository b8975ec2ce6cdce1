"""The pages' blocks of code, where they stand and what a comment above them says. Readers of a page do not see such a comment."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Block:
    """A block of code and where it stands."""

    page: str
    line: int
    language: str  # "" of an indented block
    text: str
    comment: str  # the HTML comment right above, "" where there is none

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def said(self, what: str) -> str | None:
        """What stands in a comment `<!-- what: ... -->` above the block."""
        found = re.fullmatch(rf"{what}:(.*)", self.comment, re.DOTALL)
        return found[1].strip() if found else None


def split(page: str) -> tuple[str, list[Block]]:
    """The prose of a page, and its blocks of code."""
    prose, blocks = [], []
    lines = (ROOT / page).read_text().splitlines()
    at = 0
    while at < len(lines):
        start, line = at, lines[at]
        fence, indented = (
            re.match(r"```(\w*)$", line),
            line.startswith("    ") and (not at or not lines[at - 1].strip() or lines[at - 1].endswith("-->")),
        )
        if not fence and not indented:
            prose.append(line)
            at += 1
            continue
        at += 1
        while at < len(lines) and (not lines[at].startswith("```") if fence else lines[at].startswith("    ") or not lines[at]):
            at += 1
        text = "\n".join(lines[start + 1 : at] if fence else (inner[4:] for inner in lines[start:at]))
        at += bool(fence)
        above = re.search(r"<!--((?:(?!-->).)*)-->\s*\Z", "\n".join(lines[:start]), re.DOTALL)
        blocks.append(Block(page, start + 1, fence[1] if fence else "", text, above[1].strip() if above else ""))
    return "\n".join(prose), blocks
