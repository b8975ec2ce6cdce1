"""Two commits on this machine, or two files of rows: by how much each of our implementations got faster or slower.

python -m benchmarks.compare HEAD~3                                  # that commit against this tree, everything
python -m benchmarks.compare v0.1 --repeats 3 -- benchmarks/test_ops.py -k "attention and bwd_bwd"
python -m benchmarks.compare first.jsonl second.jsonl --within 0.15  # exit status 1 where a ratio moved by more

Both commits are built and installed apart, and this tree's benchmarks measure the one and the other in turn, each in a process of its own.
What is compared is the ratio to the baseline that stood beside it: plain torch, the same on both sides.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from .rows import Row, read
from .table import COLUMNS, comparison, is_ours, lines

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("old", "new")


def install(source: Path, target: Path) -> None:
    """Build the package, compiled core included, from a tree, into a folder of its own."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(target), str(source)]
    subprocess.run(command, check=True)


def measure(site: Path, rows: Path, arguments: Sequence[str]) -> None:
    """This tree's benchmarks on the package of `site`."""
    environment = os.environ | {"PYTHONPATH": str(site)}
    # -P, pythonpath: this tree in the path would hide that package.
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-o", "pythonpath=tests", "--rows", str(rows), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
    if done.returncode not in (0, 1) or not rows.exists():
        raise ValueError(f"the benchmarks of this tree do not run on {site.name}: exit status {done.returncode}")


def measure_both(ref: str, repeats: int, arguments: Sequence[str], folder: Path) -> dict[str, list[list[Row]]]:
    """Rows of each side, a list per repeat."""
    tree = folder / "tree"
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(tree), ref], cwd=ROOT, check=True)
    try:
        install(tree, folder / "old")
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=False)
    own = folder / "own"  # a copy: a build leaves its objects behind
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(lambda name: (ROOT / name).is_file(), files.splitlines()):
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, own / name)
    install(own, folder / "new")
    found: dict[str, list[list[Row]]] = {side: [] for side in SIDES}
    for repeat in range(repeats):
        for side in SIDES if repeat % 2 == 0 else SIDES[::-1]:
            rows = folder / f"{side}_{repeat}.jsonl"
            measure(folder / side, rows, arguments)
            found[side].append(read([rows]))
    return found


def changes(found: dict[str, list[list[Row]]], everybody: bool) -> list[tuple[Row, list[float], list[float]]]:
    """A row of each implementation that both sides have, and its ratios to the baseline on either, one per repeat."""
    ratios: dict[str, dict[tuple, list[float]]] = {side: {} for side in SIDES}
    first: dict[tuple, Row] = {}
    for side in SIDES:
        for rows in found[side]:
            for row in rows:
                if (is_ours(row) or everybody) and row["implementation"] != row["baseline"]:
                    key = (*comparison(row), row["implementation"])
                    first.setdefault(key, row)
                    ratios[side].setdefault(key, []).append(row["ratio"])
    return [(row, ratios["old"][key], ratios["new"][key]) for key, row in first.items() if all(key in ratios[side] for side in SIDES)]


def _text(values: Sequence[float]) -> str:
    spread = f" ({min(values):.2f}-{max(values):.2f})" if len(values) > 1 else ""
    return f"{median(values):.2f}{spread}"


def report(changed: Sequence[tuple[Row, list[float], list[float]]], within: float) -> tuple[list[str], int]:
    """The table, and how many moved by more than `within`; below it a mark stands only where the repeats of the sides do not overlap."""
    titles, cells, moved = ("op", "shape", "dtype", "mode", "implementation", "old", "new", "new / old", ""), [], 0
    for row, old, new in changed:
        change = median(new) / median(old)
        apart = max(old) < min(new) or max(new) < min(old)
        beyond = not 1 / (1 + within) <= change <= 1 + within
        moved += beyond
        mark = ("faster" if change > 1 else "slower") if beyond and (apart or len(old) == 1) else "noisy" if beyond else ""
        cells.append([*(cell(row) for _, cell in COLUMNS[:5]), _text(old), _text(new), f"{change:.2f}", mark])
    return lines(titles, [[line] for line in cells]), moved


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", metavar="REF|FILE", help="a commit, or rows measured before")
    parser.add_argument("new", nargs="?", type=Path, metavar="FILE", help="rows measured afterwards")
    parser.add_argument("--repeats", type=int, default=2, help="measurements of each side, taken in turn (default: %(default)s)")
    parser.add_argument("--within", type=float, default=0.05, help="share that a ratio may move by (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="rivals too")
    own, given = (sys.argv[1 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :]) if "--" in sys.argv else (sys.argv[1:], [])
    arguments = parser.parse_args(own)
    try:
        if arguments.new is not None:
            found = {"old": [read([Path(arguments.old)])], "new": [read([arguments.new])]}
        else:
            known = subprocess.run(
                ["git", "rev-parse", "--verify", f"{arguments.old}^{{commit}}"], cwd=ROOT, capture_output=True, check=False
            )
            if known.returncode:
                raise ValueError(f"{arguments.old}: no such commit, and no second file of rows was named")
            with tempfile.TemporaryDirectory() as folder:
                found = measure_both(arguments.old, arguments.repeats, given or ["benchmarks"], Path(folder))
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        return 2
    changed = changes(found, arguments.all)
    if not changed:
        print("the two sides have no row of ours in common", file=sys.stderr)
        return 2
    text, moved = report(changed, arguments.within)
    print("\n".join(text))
    print(f"{len(changed)} ratios, {moved} moved by more than {arguments.within:.0%}")
    return 1 if moved and arguments.new is not None else 0


if __name__ == "__main__":
    sys.exit(main())
