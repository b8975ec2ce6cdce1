"""What is made of measured rows: the table, CSV, comparison of two measurements, the chart; and the rows that are committed."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from chart import digest, draw
from compare import changes, report
from table import against_best_rival, read, select, short, table, to_csv

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"


def row(implementation: str, ratio: float, mode: str = "bwd", **more) -> dict:
    return {
        "op": "attention",
        "shape": {"B": 2, "S": 64},
        "dtype": "float32",
        "mode": mode,
        "implementation": implementation,
        "baseline": "torch",
        "median_ms": 2.0 / ratio,
        "q20_ms": 1.9 / ratio,
        "q80_ms": 2.1 / ratio,
        "ratio": ratio,
        "ratio_q20": 0.9 * ratio,
        "ratio_q80": 1.1 * ratio,
        "device": "cpu",
        "cpu": "a processor",
        "threads": 2,
        "torch": "2.13",
        "date": "2026-01-01",
        "commit": "abc",
        **more,
    }


ROWS = [row("torch", 1.0), row("torch.compile", 1.6), row("cpp", 2.0), row("torch", 1.0, "fwd"), row("cpp", 0.5, "fwd")]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_table_has_every_row_and_separates_comparisons():
    text = table(ROWS)
    assert len(text) == 1 + len(ROWS) + 1
    assert text[4] == ""
    assert "torch *" in text[1]
    assert "target" not in text[0]  # empty throughout


def test_ours_against_the_best_rival():
    assert against_best_rival(ROWS[:3]) == pytest.approx(2.0 / 1.6)
    assert "1.25" in short(ROWS)[1]
    assert "0.50" in short(ROWS)[2]


def test_select_by_text_and_shape():
    assert select(ROWS, ["shape=B2 S64", "mode=fwd", "implementation=cpp"]) == [ROWS[4]]


def test_csv_holds_what_rows_hold():
    parsed = list(csv.DictReader(io.StringIO(to_csv(ROWS))))
    assert [float(r["ratio"]) for r in parsed] == [r["ratio"] for r in ROWS]
    assert json.loads(parsed[0]["shape"]) == ROWS[0]["shape"]


def test_comparison_says_what_moved():
    slower = [*ROWS[:2], row("cpp", 1.5), *ROWS[3:]]
    text, moved = report(changes({"old": [ROWS], "new": [slower]}, False), 0.05)
    assert moved == 1
    assert "0.75" in text[1]
    assert text[1].endswith("slower")
    _, moved = report(changes({"old": [ROWS], "new": [slower]}, False), 0.35)
    assert moved == 0


def test_overlapping_repeats_are_noise():
    sides = {"old": [[row("cpp", 2.0)], [row("cpp", 1.0)]], "new": [[row("cpp", 1.2)], [row("cpp", 1.1)]]}
    text, _ = report(changes(sides, False), 0.05)
    assert text[1].endswith("noisy")


def test_files_are_compared(tmp_path):
    first, second = write(tmp_path / "a.jsonl", ROWS), write(tmp_path / "b.jsonl", [*ROWS[:2], row("cpp", 1.5), *ROWS[3:]])
    assert run("compare.py", first, first).returncode == 0
    moved = run("compare.py", first, second, "--within", 0.15)
    assert moved.returncode == 1
    assert "2 ratios, 1 moved by more than 15%" in moved.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("compare.py", ["no-such-commit"], "no-such-commit: no such commit"),
        ("compare.py", ["{broken}", "{broken}"], "line 1: not a row"),
        ("table.py", ["{broken}"], "line 1: not a row"),
        ("chart.py", ["{broken}", "{broken}.svg"], "line 1: not a row"),
        ("table.py", ["missing.jsonl"], "missing.jsonl"),
    ],
)
def test_mistakes(script, arguments, said, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text("nonsense\n")
    result = run(script, *(a.format(broken=broken) for a in arguments))
    assert result.returncode == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_chart(tmp_path):
    rows = write(tmp_path / "rows.jsonl", ROWS)
    draw(ROWS, tmp_path / "chart.svg", digest(rows))
    text = (tmp_path / "chart.svg").read_text()
    assert "attention, first gradients" in text
    assert "torch.compile" in text
    assert digest(rows) in text
    draw(ROWS, tmp_path / "again.svg", digest(rows))
    assert (tmp_path / "again.svg").read_text() == text


def test_the_chart_in_the_docs_is_of_the_committed_rows():
    assert digest(RESULTS / "cpu.jsonl") in (ROOT / "docs/performance.svg").read_text()


def test_committed_rows_are_of_one_clean_commit():
    rows = read([RESULTS / "cpu.jsonl"])
    assert len({r["commit"] for r in rows}) == 1
    assert not rows[0]["commit"].endswith("+")
    assert not any(r.get("tiny") for r in rows)
    for key in ("command", "cpu", "cpu_features", "threads", "torch", "triton", "cuda", "driver", "date"):
        assert all(key in r for r in rows), key
