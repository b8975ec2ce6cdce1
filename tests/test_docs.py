"""The pages hold: links lead somewhere, snippets and commands fit the code, what describes the tree names what is there, the site builds.

An HTML comment `<!-- unchecked: reason -->` above a block leaves it out.
"""

import argparse
import ast
import glob
import inspect
import os
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec

import pytest
from pages import ROOT, split

from sami_fast.cli import parser
from sami_fast.config import load_config
from sami_fast.train import parse

PACKAGE = ROOT / "sami_fast"
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "csrc/*.md", "examples/*.md", "kernels/*.md")
    for path in ROOT.glob(pattern)
)
OF_THE_TREE = ("README.md", "CONTRIBUTING.md", "docs/architecture.md")
OUTPUTS = ("runs/", "build/", "model/", "report/", "checkpoints/", "tensorboard/")  # what runs and builds write
SPAN = re.compile(r"`([^`\n]+)`")


PROSE = {page: split(page)[0] for page in PAGES}
BLOCKS = [block for page in PAGES for block in split(page)[1] if block.said("unchecked") is None]


def test_the_pages_are_found():
    assert {*OF_THE_TREE, "CHANGELOG.md", "docs/latents.md", "docs/reference/ops.md"} <= set(PAGES)
    assert sum(block.language == "python" for block in BLOCKS) >= 5
    assert sum(block.language == "" for block in BLOCKS) >= 10


# Links


def anchors(page: str) -> set[str]:
    """Those of the headings, as the repository's web view and the site make them."""
    titles = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", line.lstrip("# ")) for line in PROSE[page].splitlines() if re.match(r"#+ ", line)]
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", SPAN.sub("", PROSE[page])):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert file.exists(), f"{page}: no {target}"
        if anchor:
            there = file.relative_to(ROOT).as_posix()
            assert anchor in anchors(there), f"{page}: no heading {target}"


# Python


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python"], ids=str)
def test_python_blocks(block):
    """They compile, what they import from here exists, and calls of it take these arguments."""
    tree = ast.parse(block.text)
    known: dict[str, object] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "sami_fast":
            module = import_module(node.module)
            known |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            known |= {alias.name: import_module(alias.name) for alias in node.names if alias.name.partition(".")[0] == "sami_fast"}

    def meant(node: ast.expr) -> object:
        """What a name or `a.b.c` stands for; None where it is the block's own."""
        if isinstance(node, ast.Name):
            return known.get(node.id)
        if isinstance(node, ast.Attribute) and (owner := meant(node.value)) is not None:
            return getattr(owner, node.attr)
        return None

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            meant(node)
        if isinstance(node, ast.Call) and callable(called := meant(node.func)) and not any(isinstance(a, ast.Starred) for a in node.args):
            inspect.signature(called).bind(*node.args, **{item.arg: item.value for item in node.keywords if item.arg})


# Commands


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def check(words: list[str], whole: bool = True) -> None:
    """A command line fits what it starts; one that is not `whole` names it and some of its options."""
    program, *rest = words
    if program == "sami-fast" and not whole:
        commands = next(action for action in parser()._actions if isinstance(action, argparse._SubParsersAction)).choices
        if rest:
            assert rest[0] in commands, rest[0]
            unknown = {word for word in rest if word.startswith("--")} - set(commands[rest[0]]._option_string_actions)
            assert not unknown, unknown
    elif program == "sami-fast":
        arguments = parser().parse_args(rest)
        if hasattr(arguments, "config"):
            load_config(arguments.config, arguments.overrides)
    elif "sami_fast/train.py" in words:
        arguments = parse(words[words.index("sami_fast/train.py") + 1 :])
        load_config(arguments.config, arguments.overrides)
    elif program == "make":
        targets = {word for word in rest if "=" not in word}
        assert targets <= make_targets(), targets - make_targets()
    elif program == "python" and rest[:1] == ["-m"]:
        assert find_spec(rest[1]), rest[1]
    elif program in ("python", "bash"):
        script = ROOT / rest[0]
        assert script.is_file(), rest[0]
        beside = "".join(path.read_text() for path in (script, *script.parent.glob("*.py"), *ROOT.glob("kernels/*.py")))
        for option in (word for word in rest[1:] if word.startswith("--")):
            assert f'"{option}"' in beside, option
    elif program == "pytest":
        for path in (word for word in rest if re.match(r"(tests|benchmarks)/", word)):
            assert glob.glob(str(ROOT / path)), path
    elif program.startswith("csrc/"):
        assert (ROOT / program).is_file()


def commands(text: str) -> Iterator[list[str]]:
    """The command lines of a block of shell, as words; `$variables` become 0."""
    for line in text.replace("\\\n", " ").splitlines():
        line = re.sub(r"\$\{?\w+\}?", "0", re.split(r"(?:^|\s)#", line)[0]).strip().rstrip("'")
        try:
            words = shlex.split(line)
        except ValueError:  # the first line of a quoted script
            continue
        while words and (words[0] == "exec" or re.match(r"[A-Z_]+=", words[0])):
            words = words[1:]
        if words:
            yield words


@pytest.mark.parametrize("page", PAGES)
def test_commands(page, capsys):
    """Commands in blocks name options, settings and configs that exist; those in the text name commands and files that do."""
    found = [(str(block), words, True) for block in BLOCKS if block.page == page and not block.language for words in commands(block.text)]
    for span in SPAN.findall(PROSE[page]):
        if re.match(r"(sami-fast|make|python|pytest|deepspeed|bash) ", span) and "<" not in span:
            words = shlex.split(span)
            found.append((page, [word for word in words if word != "..."], False))
    for where, words, whole in found:
        try:
            check(words, whole)
        except (SystemExit, Exception) as error:
            pytest.fail(f"{where}: {shlex.join(words)}: {capsys.readouterr().err.strip() or repr(error)}")


# The tree


@pytest.mark.parametrize("page", OF_THE_TREE)
def test_named_paths_exist(page):
    for span in SPAN.findall(PROSE[page]):
        named = re.fullmatch(r"\.?[\w.-]+(/[\w.*-]+)*/?", span) and ("/" in span or re.search(r"\.(py|md|yaml|toml|cpp|cu|h|cff)$", span))
        if named and not span.startswith(OUTPUTS) and "my_" not in span:
            assert glob.glob(str(ROOT / span)) or (PACKAGE / span).exists(), f"{page}: no {span}"


def test_every_room_is_named():
    rooms = [path.parent.name for path in PACKAGE.glob("*/__init__.py")]
    for page in ("README.md", "docs/architecture.md"):
        missing = [room for room in rooms if f"`sami_fast/{room}/`" not in PROSE[page]]
        assert not missing, f"{page} does not name {', '.join(missing)}"
    files = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}
    assert not {file for file in files if f"{file}`" not in PROSE["docs/architecture.md"]}


def test_the_drawing_names_what_is_there():
    words = [text.text or "" for text in ElementTree.parse(ROOT / "docs/architecture.svg").iter() if text.tag.endswith("}text")]
    paths = {path for word in words for path in re.findall(r"[\w/]+(?:\.py|/)(?=[:,\s]|$)", word) if not path.startswith("runs")}
    assert {"step.py", "data/", "ops/", "csrc/cuda/"} <= paths
    for path in paths:
        assert (ROOT / path).exists() or (PACKAGE / path).exists(), path


# The site


def test_the_site_builds(tmp_path):
    """Without a warning, so without a link that leads nowhere; and its pages fetch nothing."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings_handlers.python")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    pages = {path.relative_to(tmp_path / "site").as_posix(): path.read_text() for path in (tmp_path / "site").rglob("*.html")}
    assert {"index.html", "architecture.html", "contributing.html", "changelog.html", "reference/ops.html"} <= pages.keys()
    assert "gaussian_log_prob" in pages["reference/ops.html"]
    assert "kl_weight.start" in pages["reference/settings.html"]
    for name, text in pages.items():
        fetched = re.findall(r"<(?:script|img)[^>]+src=\"https?:[^>]*>|<link[^>]+stylesheet[^>]+href=\"https?:[^>]*>", text)
        assert not fetched, f"{name} fetches {fetched}"
