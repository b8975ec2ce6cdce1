"""What the documentation site (mkdocs.yml) needs beyond its tools: pages that lie elsewhere in the tree, links, settings, docstrings.

The same Markdown files are read in the repository's web view and on the site. Links in them are relative to the file. Here they are
turned to the page of the site that shows the file; a link to a file that is no page, such as a source file, becomes its text, or leads
to the repository where mkdocs.yml gives a `repo_url`.
"""

import html
import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {  # files outside docs/ that are pages of the site
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
    "kernels/README.md": "triton.md",
    "csrc/README.md": "core.md",
}
HOME = {page: file for file, page in PAGES.items()}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that lie elsewhere."""
    for file, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / file).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Turns links between files of the tree to links between pages, and fills in the settings."""
    here = page.file.src_uri
    folder = dirname(HOME.get(here, join("docs", here)))

    def turned(match: re.Match[str]) -> str:
        image, text, target, anchor = match[1], match[2], match[3], match[4] or ""
        file = normpath(join(folder, target))
        there = PAGES.get(file) or (file.removeprefix("docs/") if file.startswith("docs/") else None)
        if there is not None:
            return f"{image}[{text}]({relpath(there, dirname(here) or '.')}{anchor})"
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{file}{anchor})" if config.repo_url else text

    if "<!-- settings -->" in markdown:
        markdown = markdown.replace("<!-- settings -->", settings())
    return LINK.sub(turned, markdown)


def settings() -> str:
    """Every setting of a run under its dotted key."""
    from sami_fast.config import settings_table

    lines, section = [], None
    for line in settings_table().splitlines():
        if line.startswith(" "):
            lines += [f":   {html.escape(line.strip())}", ""]
            continue
        above = line.partition("=")[0].rpartition(".")[0] or "Run"
        if above != section:
            section = above
            lines += [f"## {section}", ""]
        lines.append(f"`{line}`")
    return "\n".join(lines)


SECTIONS = re.compile(r"(?<!\n)\n(?=(?:Args|Attributes|Shapes|Returns|Raises|Differentiable|Runs on|Source):)")


class SectionsApart(griffe.Extension):
    """Docstrings here have no empty lines between their sections; griffe's parser wants them."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = SECTIONS.sub("\n\n", obj.docstring.value)
