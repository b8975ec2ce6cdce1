"""Is every measured figure in the documents the field of a committed row? Lists each with its row, and what has none.

python benchmarks/figures.py                     # README.md, docs/*.md, csrc/README.md, kernels/README.md; exit status 1 if one has no row
python benchmarks/figures.py docs/results.md
python benchmarks/figures.py --write             # also makes the generated tables again, from the rows

Rows lie in benchmarks/results/*.jsonl, one JSON object a line: values, and their address (command, commit, date, device, threads, torch).
A row with a `source` was not written by its command: it says what it was taken from, and how it was rounded there.

A figure is cited by a comment behind it, which no reader sees: in the same paragraph, list item, heading or table, or after a blank line.

    After 225 s R2 of x was 0.996, of y 0.997. <!-- rows: train.jsonl run=disks: wall_seconds linear_r2.x linear_r2.y -->

It names a file, filters, a colon, and a field for each figure since the last comment in the same block, **in their order**. Each field
gives its figure, rounded as that is. `;` separates further rows; the file may be left out where it is the one before.

- A filter is `key=value`, with quotes where the value holds spaces: `settings="a=1 b=2"`. A `;` or a colon with a space must not be in it.
- A field is an expression without spaces: `mcc`, `untrained.mcc`, `kl_per_dim[2]`, `wall_seconds/60`, `100*share`. Where filters leave
  several rows, or a field has several values, it says which number of them: `mean(mcc)`, `min(linear_r2)`, `mean(min(linear_r2))`;
  there are min, max, mean, median, std, sum, `count(passes)` and `rows()`.
- What is no measurement, a threshold, a setting, somebody else's figure, is `given` in its place in the list; `<!-- given: thresholds -->`
  stands for all figures since the last comment, and says what they are.

Figures that must be cited: decimals, powers of ten, whole numbers with a unit or a %, "3 of 8". Other whole numbers may be. Nothing inside
`code`, code blocks, links, versions and dates must be; a code block that is followed by a comment is read as text. What stands between
`<!-- NAME -->` and `<!-- end of NAME -->`, each a line of its own, is generated from rows (WRITERS) and must equal what they give.
"""

import argparse
import ast
import importlib
import json
import operator
import re
import shlex
import statistics
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from table import Row, read

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
# First word of a generated block's name: the module here whose `generated(rest of the name)` gives its text.
WRITERS = {"recovery": "recovery", "methods": "methods", "pretrained": "pretrained", "plan": "scaling", "performance": "performance"}


def documents() -> list[Path]:
    """All that quote figures."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "csrc/README.md", ROOT / "kernels/README.md"]


class CitationError(ValueError):
    """A citation or a generated block that no row bears out."""


# ---- rows


def read_rows(path: Path) -> list[Row]:
    return read([path]) if path.exists() else []


def select(path: Path, **fields: object) -> list[Row]:
    """Rows with these fields.

    Raises:
        CitationError: there is none.
    """
    rows = [row for row in read_rows(path) if all(row.get(key) == value for key, value in fields.items())]
    if not rows:
        raise CitationError(f"{path.name} {' '.join(f'{key}={value}' for key, value in fields.items())}: no such row")
    return rows


def write_rows(path: Path, rows: Iterable[Row], key: Sequence[str]) -> None:
    """Put rows in, each in place of an earlier one that agrees with it in `key`, new ones at the end."""
    kept = {tuple(row.get(k) for k in key): row for row in read_rows(path)}
    kept |= {tuple(row.get(k) for k in key): row for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept.values()))


def address(environment: Row, command: str, date: str) -> Row:
    """Where a row is from: of a run's environment.json, or of `sami_fast.environment.describe()`."""
    packages = environment["packages"]
    return {
        "command": command,
        "date": date,
        "commit": environment["commit"],
        "device": ", ".join(environment["gpus"]) or "cpu",
        "machine": environment["cpu"]["machine"],
        "cores": environment["cpu"]["cores"],
        "threads": environment["cpu"]["threads"],
        "python": environment["python"],
        "torch": packages["torch"],
        "triton": packages["triton"],
    }


# ---- fields of rows

REDUCE: dict[str, Callable[[list[Any]], float]] = {
    "min": min,
    "max": max,
    "mean": statistics.mean,
    "median": statistics.median,
    "std": statistics.stdev,
    "sum": sum,
    "count": lambda values: sum(map(bool, values)),
}
OPERATE = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def _values(node: ast.AST, rows: Sequence[Row]) -> list[Any]:
    """Value of an expression for each row, or one for all."""
    match node:
        case ast.Constant():
            return [node.value]
        case ast.Name():
            return [_get(row, node.id) for row in rows]
        case ast.Attribute():
            return [_get(value, node.attr) for value in _values(node.value, rows)]
        case ast.Subscript(slice=ast.Constant()):
            return [_get(value, node.slice.value) for value in _values(node.value, rows)]
        case ast.UnaryOp(op=ast.USub()):
            return [-value for value in _values(node.operand, rows)]
        case ast.BinOp() if type(node.op) in OPERATE:
            left, right = _values(node.left, rows), _values(node.right, rows)
            length = max(len(left), len(right))
            pairs = zip(*(side * length if len(side) == 1 else side for side in (left, right)), strict=True)
            return [OPERATE[type(node.op)](*pair) for pair in pairs]
        case ast.Call(func=ast.Name(id="rows"), args=[]):
            return [len(rows)]
        case ast.Call(func=ast.Name(), args=[inner]) if node.func.id in REDUCE:
            reduce, values = REDUCE[node.func.id], _values(inner, rows)
            if isinstance(values[0], dict | list):  # of each row by itself
                return [reduce(list(value.values()) if isinstance(value, dict) else value) for value in values]
            return [reduce(values)]
    raise CitationError("not understood: see benchmarks/figures.py")


def _get(value: Any, key: str | int) -> Any:
    try:
        return value[key]
    except (KeyError, IndexError, TypeError):
        there = f"has {', '.join(map(str, value))}" if isinstance(value, dict) else f"is {value!r}"
        raise CitationError(f"no field {key!r}: the row {there}") from None


def field(expression: str, rows: Sequence[Row]) -> float:
    """The number that an expression says of the rows.

    Raises:
        CitationError: it says none, or several.
    """
    try:
        values = _values(ast.parse(expression, mode="eval").body, rows)
    except CitationError as error:
        raise CitationError(f"{expression}: {error}") from None
    except (SyntaxError, TypeError, ArithmeticError, statistics.StatisticsError) as error:
        raise CitationError(f"{expression}: {error}") from None
    if len(values) > 1:
        raise CitationError(f"{expression}: the filters leave {len(values)} rows; say which, or min, max, mean, std of them")
    if isinstance(values[0], bool) or not isinstance(values[0], int | float):
        raise CitationError(f"{expression}: is {values[0]!r}, not a number")
    return values[0]


@dataclass(frozen=True)
class Cited:
    """One field of a citation; without an expression any figure, which then is given."""

    expression: str = ""
    value: float = 0.0
    label: str = "given"  # of the rows

    def __str__(self) -> str:
        return f"{self.expression} = {self.value:.6g} of {self.label}" if self.expression else self.label


@cache
def _file(path: Path) -> list[Row]:
    return read_rows(path)


def citations(comment: str, results: Path = RESULTS) -> list[Cited]:
    """The fields of what stands behind `rows:` in a comment.

    Raises:
        CitationError: no such file, row or field.
    """
    found, name = [], ""
    for part in comment.split(";"):
        selection, colon, expressions = re.sub(r"\s+", " ", part).partition(": ")
        try:
            words = shlex.split(selection)
        except ValueError as error:
            raise CitationError(f"{part.strip()!r}: {error}") from None
        if words and "=" not in words[0]:
            name = words.pop(0)
        if not colon or not name.endswith(".jsonl") or not expressions.split():
            raise CitationError(f"{part.strip()!r}: expected FILE.jsonl KEY=VALUE ...: FIELD ...")
        filters = dict(word.partition("=")[::2] for word in words)
        if not (results / name).exists():
            raise CitationError(f"{name}: no such file in benchmarks/results")
        rows = [row for row in _file(results / name) if all(_matches(row, *item) for item in filters.items())]
        label = " ".join([name, *(f"{key}={shlex.quote(value)}" for key, value in filters.items())])
        if not rows:
            raise CitationError(f"{label}: no such row")
        for expression in expressions.split():
            found.append(Cited() if expression == "given" else Cited(expression, field(expression, rows), label))
    return found


def _matches(row: Row, key: str, value: str) -> bool:
    for part in key.split("."):
        if not isinstance(row, dict) or part not in row:
            return False
        row = row[part]
    return (row if isinstance(row, str) else json.dumps(row)) == value


# ---- figures of documents

UNITS = "x|ns|us|µs|ms|s|min|minutes?|seconds?|hours?|nats?|degrees|times|[KMGT]i?B|[kKMGT]?B/s|images/s|[kKMGTP]FLOPs?(?:/s)?"
UNIT = rf"(?:%|°|\u00d7|(?:{UNITS})\b)"
NUMBER = re.compile(
    rf"(?:(?<![\w.,\u2212-])[\u2212-]|(?<![\w.]))(\d{{1,3}}(?:,\d{{3}})+|\d+)(\.\d+)?(e[-+]?\d+)?(?!\.?\d)(?:(?!\w)|(?={UNIT}))"
)
RANGE = re.compile(r"\s*(?:,|to|and|or|±|\u2013|-|, and|, or)\s*")
PRODUCTS = "torch|Triton|Python|DeepSpeed|CUDA|GCC|Clang|diffusers|setuptools|pip|ABI of|API of|OpenMP|eq\\.|equation|section|§"
HIDDEN = re.compile(  # what quotes no figure
    "|".join(
        (
            r"(`+)(?:(?!\1).)+?\1",  # code
            r"\]\([^)]*\)|https?://\S+|arXiv:[\d.]+",  # where links lead
            r"\b\d{4}-\d\d-\d\d\b",  # dates
            rf"\b\d+(?:\.\d+){{2,}}\S*|(?:{PRODUCTS})\s*[<>=v]*\d[\d.]*|(?<![\d.])[A-Za-z]-\d[\d.]*",  # versions
        )
    ),
    re.DOTALL,
)
LIST_ITEM = r" {0,6}(?:[-*+]|\d+\.)\s"
COMMENT = re.compile(r"<!--(.*?)-->", re.DOTALL)
END = re.compile(r"^<!-- end of (.+?) -->$", re.MULTILINE)


@dataclass(frozen=True)
class Figure:
    text: str
    start: int  # place in the document
    must: bool  # be cited

    @property
    def value(self) -> Decimal:
        return Decimal(self.text.replace(",", "").replace("\u2212", "-"))

    def is_(self, value: float) -> bool:
        """Whether the value, rounded to the digits of this figure, is this figure."""
        half = Decimal((0, (5,), self.value.as_tuple().exponent - 1))
        return abs(Decimal(repr(float(value))) - self.value) <= half * (1 + Decimal("1e-9"))


@dataclass(frozen=True)
class Finding:
    """A figure and the row that holds it, or a problem."""

    document: str
    line: int
    figure: str
    text: str
    problem: bool = False

    def __str__(self) -> str:
        return f"{self.document}:{self.line}: {self.figure + ': ' if self.figure else ''}{self.text}"


def blank(text: str, found: re.Match | None = None) -> str:
    """Spaces in its place: what stands behind it keeps its line and column."""
    return re.sub(r"[^\n]", " ", found[0] if found else text)


def figures(text: str, start: int = 0) -> list[Figure]:
    """All numbers of a text in which everything else is blank. `start` is the text's place."""
    found = list(NUMBER.finditer(text))
    must = [bool(m[2] or m[3] or re.match(rf"\s?{UNIT}", text[m.end() :])) for m in found]
    for i in reversed(range(len(found) - 1)):  # "62 to 70 %", "6, 8 and 9 s", "3 of 8"
        between = text[found[i].end() : found[i + 1].start()]
        has_unit = re.match(rf"\s?{UNIT}", text[found[i + 1].end() :]) or (must[i + 1] and not (found[i + 1][2] or found[i + 1][3]))
        if has_unit and RANGE.fullmatch(between):
            must[i] = True
        if re.fullmatch(r"\s+of\s+", between):
            must[i] = must[i + 1] = True
    return [Figure(m[0].strip(), start + m.start(), needed) for m, needed in zip(found, must, strict=True)]


def blocks(text: str) -> Iterator[tuple[int, int, bool]]:
    """Start and end of each paragraph, list item, heading, table or code block, and whether it is code. Comments must be blank already."""
    start, code, fence, in_list = None, False, False, False
    place = last = 0  # where the line begins, and where the last one ended that was not blank
    for line in text.splitlines(keepends=True):
        bare = line.strip()
        marks = bare.startswith("```")
        in_list = bool(re.match(LIST_ITEM, line)) or (in_list and (not bare or line.startswith("  ")))
        indented = line.startswith(" " * (7 if in_list else 4)) and (code or start is None)  # four spaces go on with a list item
        ends = (bare and not indented) if code else (not bare or marks)
        if start is not None and not fence and (ends or _opens(line)):
            yield start, last, code
            start, code = None, False
        if start is None and bare:
            start, code = place, marks or indented
            fence = marks
        elif fence and marks:
            fence = False
            yield start, place + len(line), True
            start, code = None, False
        place += len(line)
        last = place if bare else last
        if start is not None and bare.startswith("#") and not code:
            yield start, place, False
            start = None
    if start is not None:
        yield start, last, code


def _opens(line: str) -> bool:
    return bool(re.match(rf"{LIST_ITEM}|#+\s", line))


def align(found: Sequence[Figure], fields: Sequence[Cited]) -> list[int | None] | tuple[int, int]:
    """Which field each figure is, in order; every field is one, and every figure that must be cited has one.

    Returns:
        For each figure its field or None; or, where it cannot be, how many figures and fields went well together.
    """
    furthest = (0, 0)

    @cache
    def rest(i: int, j: int) -> tuple[int | None, ...] | None:
        nonlocal furthest
        furthest = max(furthest, (j, i))
        if i == len(found):
            return () if j == len(fields) else None
        if j < len(fields) and (not fields[j].expression or found[i].is_(fields[j].value)) and (after := rest(i + 1, j + 1)) is not None:
            return (j, *after)
        if not found[i].must and (after := rest(i + 1, j)) is not None:
            return (None, *after)
        return None

    whole = rest(0, 0)
    return list(whole) if whole is not None else (furthest[1], furthest[0])


# ---- checks


def check(path: Path, results: Path = RESULTS, generated: Callable[[str], str] | None = None) -> list[Finding]:
    """Every figure of a document with its row, and every problem.

    Args:
        path: The document.
        results: Folder of the rows.
        generated: What a generated block must hold, by its name; WRITERS unless given.
    """
    document, text = (str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name), path.read_text()
    lines = [0, *(m.end() for m in re.finditer("\n", text))]
    findings: list[Finding] = []

    def say(place: int, figure: str, message: str, problem: bool = True) -> None:
        findings.append(Finding(document, bisect_right(lines, place), figure, message, problem))

    for name, start, end, inside in generated_blocks(text):
        if start < 0:
            say(end, "", f"generated block {name!r} has no beginning")
            continue
        try:
            right = (generated or partial(from_rows, results=results))(name)
        except CitationError as error:
            say(start, "", f"generated block {name!r}: {error}")
        else:
            if inside == right:
                say(start, "", f"{len(inside.splitlines())} lines, generated", problem=False)
            else:
                pairs = zip_longest(inside.splitlines(), right.splitlines(), fillvalue="")
                found, expected = next(pair for pair in pairs if pair[0] != pair[1])
                say(start, "", f"generated block {name!r} is not what its rows give: {found!r} instead of {expected!r}; run --write")
        text = text[:start] + blank(text[start:end]) + text[end:]

    comments = [(m.start(), m.end(), m[1].strip()) for m in COMMENT.finditer(text) if m[1].strip().startswith(("rows:", "given"))]
    plain = COMMENT.sub(partial(blank, ""), text)
    spans = list(blocks(plain))
    owners: dict[int, list[tuple[int, int, str]]] = {}
    for comment in comments:
        before = [n for n, (start, _, _) in enumerate(spans) if start <= comment[0]]
        if not before:
            say(comment[0], "", "a citation with nothing before it")
            continue
        _, end, code = spans[before[-1]]
        if not code or comment[0] >= end:  # in code it is an example
            owners.setdefault(before[-1], []).append(comment)
    for n, (start, end, code) in enumerate(spans):
        own = owners.get(n, [])
        if code and not own:
            continue
        shown = plain[start:end] if code else HIDDEN.sub(partial(blank, ""), plain[start:end])
        left = figures(shown, start)
        for place, _, comment in own:
            mine, left = [f for f in left if f.start < place], [f for f in left if f.start > place]
            _compare(mine, place, comment, results, say)
        for figure in left:
            if figure.must:
                say(figure.start, figure.text, "no row: cite one, or say `given`")
    return sorted(findings, key=lambda finding: finding.line)


def _compare(found: Sequence[Figure], place: int, comment: str, results: Path, say: Callable[..., None]) -> None:
    """The figures before a comment against its fields."""
    kind, _, rest = comment.partition(":")
    if kind == "given":
        if not rest.strip():
            say(place, "", "`given` does not say what: a threshold, a setting, whose figure?")
        for figure in found:
            if figure.must:
                say(figure.start, figure.text, f"given: {rest.strip()}", problem=False)
        return
    try:
        fields = citations(rest, results)
    except CitationError as error:
        say(place, "", str(error))
        return
    paired = align(found, fields)
    if isinstance(paired, list):
        for figure, j in zip(found, paired, strict=True):
            if j is not None:
                say(figure.start, figure.text, str(fields[j]), problem=False)
        return
    i, j = paired
    if i == len(found):
        say(place, "", f"{fields[j]}: no figure is left for it; before it stand {', '.join(f.text for f in found) or 'none'}")
        return
    message = f"is not {fields[j]}" if j < len(fields) else "has no field in its citation"
    nearest = min((f for f in fields if f.expression), key=lambda f: abs(f.value - float(found[i].value)), default=None)
    if nearest and fields[j : j + 1] != [nearest]:
        message += f"; the nearest is {nearest}"
    say(found[i].start, found[i].text, message)


# ---- generated blocks


def generated_blocks(text: str) -> list[tuple[str, int, int, str]]:
    """Name, start, end and content of each; a start of -1 where there is none."""
    found = []
    for end in END.finditer(text):
        opening = f"<!-- {end[1]} -->\n"
        start = text.rfind(opening, 0, end.start())
        found.append((end[1], start, end.end(), text[start + len(opening) : end.start()].removesuffix("\n")))
    return found


def from_rows(name: str, results: Path = RESULTS) -> str:
    """What a generated block must hold."""
    first, _, rest = name.partition(" ")
    if first not in WRITERS:
        raise CitationError("nobody writes it: see WRITERS in benchmarks/figures.py")
    try:
        return importlib.import_module(WRITERS[first]).generated(rest, results)
    except KeyError as error:
        raise CitationError(f"a row has no field {error}") from None


def write_generated(path: Path, name: str, generated: str) -> None:
    """Replace what stands between the markers of this name, or append it."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    text = path.read_text() if path.exists() else "# Results\n"
    block = f"{start}\n{generated}\n{end}"
    if start in text:
        head, _, rest = text.partition(start)
        text = head + block + rest.partition(end)[2]
    else:
        text = text.rstrip() + "\n\n" + block + "\n"
    path.write_text(text)


def rewrite(path: Path, first: str = "") -> None:
    """Make a document's generated blocks again, or those whose name begins with this word."""
    for name, start, *_ in generated_blocks(path.read_text()):
        if start >= 0 and name.partition(" ")[0] == (first or name.partition(" ")[0]):
            write_generated(path, name, from_rows(name))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="example: python benchmarks/figures.py docs/results.md")
    parser.add_argument("documents", nargs="*", type=Path, help="all of them unless given")
    parser.add_argument("--write", action="store_true", help="make the generated blocks again")
    parser.add_argument("--problems", action="store_true", help="leave out what is well")
    arguments = parser.parse_args()
    found = []
    for path in [document.resolve() for document in arguments.documents] or documents():
        if arguments.write:
            rewrite(path)
        found += check(path)
    problems = [finding for finding in found if finding.problem]
    print("\n".join(map(str, problems if arguments.problems else [f for f in found if not f.problem])), flush=True)
    if problems and not arguments.problems:
        print("\nWithout a row:", *problems, sep="\n")
    print(f"{len(found) - len(problems)} figures and tables stand in rows or are given, {len(problems)} do not")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.modules["figures"] = sys.modules["__main__"]  # what the writers import
    sys.exit(main())
