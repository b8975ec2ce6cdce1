"""HTML pieces of the report. Every text that comes in is escaped here, and nowhere else."""

import base64
from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fdfdfc; --ink: #22252a; --soft: #5d646e; --line: #dfe1e4; --shade: #f3f4f4; --alarm: #b5452c;
  --serif: Charter, "Bitstream Charter", "Sitka Text", Cambria, Georgia, serif;
  --sans: system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #16181b; --ink: #dfe2e6; --soft: #9aa2ac; --line: #33383e; --shade: #1f2226; --alarm: #e08a74;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 17px/1.6 var(--serif); }
main { max-width: 60rem; margin: 0 auto; padding: 3.5rem 1.5rem 5rem; }
h1, h2, table, figcaption, .facts, summary, footer { font-family: var(--sans); }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 0.4rem; }
h2 { font-size: 1.2rem; letter-spacing: -0.01em; margin: 3rem 0 0.6rem; }
p { max-width: 42rem; margin: 0.7rem 0; }
.facts { color: var(--soft); font-size: 0.88rem; max-width: none; }
nav { display: flex; flex-wrap: wrap; gap: 0.1rem 1.1rem; font: 0.88rem/1.6 var(--sans); margin: 1.6rem 0 0; }
a { color: inherit; text-decoration-color: var(--soft); text-underline-offset: 0.2em; }
.alarm { border-left: 3px solid var(--alarm); padding-left: 1rem; }
.scroll { overflow-x: auto; margin: 1.2rem 0 1.8rem; }
table { border-collapse: collapse; font-size: 0.88rem; line-height: 1.45; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: 0.5rem; }
th, td { text-align: left; padding: 0.42rem 1.6rem 0.42rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { font-weight: 600; font-size: 0.82rem; border-bottom-color: var(--soft); }
tbody th { font-weight: 500; white-space: nowrap; }
.number { text-align: right; white-space: nowrap; }
td:not(.number) { color: var(--soft); min-width: 14rem; }
figure { margin: 1.2rem 0 2rem; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 4px; }
figcaption { color: var(--soft); font-size: 0.88rem; line-height: 1.5; margin-top: 0.7rem; max-width: 46rem; }
pre { background: var(--shade); border: 1px solid var(--line); border-radius: 4px; padding: 0.8rem 1rem; overflow-x: auto; }
pre { font: 0.8rem/1.5 var(--mono); }
summary { cursor: pointer; font-weight: 600; font-size: 0.92rem; margin: 0.6rem 0; }
footer { margin-top: 4rem; padding-top: 1rem; border-top: 1px solid var(--line); color: var(--soft); font-size: 0.85rem; }
@media print { pre { white-space: pre-wrap; } }
"""

# What a browser may load or run: pictures inside the page and its own style, nothing else.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def paragraph(text: str, kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f"<p{attribute}>{escape(text)}</p>\n"


def header(title: str, facts: str) -> str:
    return f"<header>\n<h1>{escape(title)}</h1>\n{paragraph(facts, 'facts')}</header>\n"


def footer(text: str) -> str:
    return f"<footer>{escape(text)}</footer>\n"


def section(title: str, *content: str) -> str:
    """A part of the page, which `contents` can point to; content is HTML already."""
    return f'<section id="{_anchor(title)}">\n<h2>{escape(title)}</h2>\n{"".join(content)}</section>\n'


def _anchor(title: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in title.lower())


def contents(titles: Sequence[str]) -> str:
    """Links to sections by their titles."""
    links = "\n".join(f'<a href="#{_anchor(title)}">{escape(title)}</a>' for title in titles)
    return f"<nav>\n{links}\n</nav>\n"


def preformatted(text: str) -> str:
    return f"<pre>{escape(text)}</pre>\n"


def details(summary: str, text: str) -> str:
    """Text that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary>{preformatted(text)}</details>\n"


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int]) -> str:
    """A table whose first column names the rows.

    Args:
        numbers: Columns that hold numbers: aligned right.
    """

    def cells(texts: Sequence[str], scope: str) -> str:
        """A row; its first cell is a heading, in the table's head (scope "col") all are."""
        row = []
        for column, text in enumerate(texts):
            kind = ' class="number"' if column in numbers else ""
            heading = column == 0 or scope == "col"
            row.append(f'<th scope="{scope}"{kind}>{escape(text)}</th>' if heading else f"<td{kind}>{escape(text)}</td>")
        return f"<tr>{''.join(row)}</tr>\n"

    return (
        f'<div class="scroll"><table>\n<caption>{escape(caption)}</caption>\n'
        f"<thead>\n{cells(header, 'col')}</thead>\n<tbody>\n{''.join(cells(row, 'row') for row in rows)}</tbody>\n</table></div>\n"
    )


def image(png: bytes, alt: str, caption: str) -> str:
    """A picture inside the page itself, shown at half the size it was drawn at."""
    source = "data:image/png;base64," + base64.b64encode(png).decode()
    # A PNG's first chunk begins with width and height.
    width, height = (int.from_bytes(png[start : start + 4], "big") // 2 for start in (16, 20))
    return (
        f'<figure><img width="{width}" height="{height}" src="{source}" alt="{escape(alt)}">\n'
        f"<figcaption>{escape(caption)}</figcaption></figure>\n"
    )


def document(title: str, *content: str) -> str:
    """The whole page; content is HTML already."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(content)}</main>\n</body>\n</html>\n"
    )
