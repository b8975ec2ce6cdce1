"""What is made of measured rows: tables, CSV, comparison of two measurements, the chart; and the rows that are committed."""

import csv
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import scaling, tables
from benchmarks.chart import digest, draw
from benchmarks.compare import changes, report
from benchmarks.recovery import trained
from benchmarks.rows import RESULTS, ROOT, read, write_rows
from benchmarks.table import against_best_rival, page_table, select, short, table, to_csv
from sami_fast import plan
from sami_fast.config import load_config


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
    command = [sys.executable, "-m", f"benchmarks.{script}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


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
    assert run("compare", first, first).returncode == 0
    moved = run("compare", first, second, "--within", 0.15)
    assert moved.returncode == 1
    assert "2 ratios, 1 moved by more than 15%" in moved.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("compare", ["no-such-commit"], "no-such-commit: no such commit"),
        ("compare", ["{broken}", "{broken}"], "line 1: not a row"),
        ("table", ["{broken}"], "line 1: not a row"),
        ("chart", ["{broken}", "{broken}.svg"], "line 1: not a row"),
        ("table", ["missing.jsonl"], "missing.jsonl"),
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


@pytest.mark.parametrize("file", ["cpu.jsonl", "loops.jsonl"])
def test_committed_rows_are_of_one_clean_commit(file):
    rows = read([RESULTS / file])
    assert len({r["commit"] for r in rows}) == 1
    assert not rows[0]["commit"].endswith("+")
    assert not any(r.get("tiny") for r in rows)
    for key in ("command", "cpu", "cpu_features", "threads", "torch", "triton", "cuda", "driver", "date"):
        assert all(key in r for r in rows), key


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.jsonl")), ids=lambda path: path.name)
def test_every_row_has_an_address(path):
    for row in read([path]):
        assert not {"command", "date", "commit", "device", "threads", "torch", "triton"} - row.keys(), row
        assert row["commit"] or row.get("source"), row


def test_rows_take_the_place_of_earlier_ones(tmp_path):
    rows = [{"run": "a", "seed": 0, "mcc": 0.98}, {"run": "a", "seed": 1, "mcc": 0.9}]
    write_rows(tmp_path / "runs.jsonl", rows, ("run", "seed"))
    write_rows(tmp_path / "runs.jsonl", [rows[0] | {"mcc": 0.5}, {"run": "new", "seed": 7}], ("run", "seed"))
    found = read([tmp_path / "runs.jsonl"])
    assert [(row["run"], row["seed"], row.get("mcc")) for row in found] == [("a", 0, 0.5), ("a", 1, 0.9), ("new", 7, None)]


# ---- the tables of the docs


@pytest.mark.parametrize("path", tables.documents(), ids=lambda path: path.name)
def test_tables_are_what_their_rows_give(path):
    assert tables.stale(path) == []


def test_every_writer_has_its_table():
    found = [block["name"] for path in tables.documents() for block in tables.blocks(path.read_text())]
    assert {name.split()[0] for name in found} == tables.WRITERS.keys()


def test_a_changed_digit_is_noticed(tmp_path):
    text = (ROOT / "docs/results.md").read_text()
    assert "| yes | 7.7 |" in text
    (tmp_path / "results.md").write_text(text.replace("| yes | 7.7 |", "| yes | 7.6 |", 1))
    assert tables.stale(tmp_path / "results.md") == ["recovery disks_joint"]
    tables.rewrite(tmp_path / "results.md")
    assert (tmp_path / "results.md").read_text() == text


def test_a_table_is_replaced_or_added(tmp_path):
    document = tmp_path / "document.md"
    document.write_text("before\n\n<!-- t -->\nold\n<!-- end of t -->\nafter\n")
    tables.write_block(document, "t", "new")
    assert document.read_text() == "before\n\n<!-- t -->\nnew\n<!-- end of t -->\nafter\n"
    tables.write_block(document, "u", "more")
    assert document.read_text().endswith("after\n\n<!-- u -->\nmore\n<!-- end of u -->\n")


def test_a_table_without_rows_or_writer_fails():
    for name, reason in (("recovery faces", "no such row"), ("weather today", "nobody writes it"), ("performance x", "no such table")):
        with pytest.raises(ValueError, match=reason):
            tables.generated(name)
    with pytest.raises(ValueError, match="t: the end of a table that has no beginning"):
        tables.blocks("0.75\n<!-- end of t -->\n")


def test_what_a_row_does_not_say_stays_empty():
    rows = [{"a": {"b": 0.5}, "c": None}, {"a": None, "c": 1}]
    text = page_table(rows, {"b": ("a.b", ".2f"), "c": ("c", ""), "none": (lambda row: row["d"], "")})
    assert text.splitlines() == ["| b | c |", "| --- | --- |", "| 0.50 |  |", "|  | 1 |"]


@pytest.mark.parametrize("name", ["celeba64", "imagenet64"])
def test_a_plan_follows_from_the_counts_of_its_row(name, monkeypatch):
    """Memory, bytes sent, FLOPs of a step and times, derived anew; the counts take too long here and have tests of their own."""
    (row,) = (row for row in read([RESULTS / "plan.jsonl"]) if row["config"] == name)
    counted = scaling.plan_of(row).networks.values()

    def count_networks(config, model, image_shape):
        sizes = [tuple(p.numel() for p in network.parameters()) for network in model.networks.values()]
        assert [sum(each) for each in sizes] == [network.parameters for network in counted]
        return tuple(replace(network, sizes=each) for network, each in zip(counted, sizes, strict=True))

    monkeypatch.setattr(plan, "count_networks", count_networks)
    found = plan.facts(plan.plan(load_config(name, [scaling.CONFIGS[name]]), scaling.GPUS, scaling.GPU))
    assert json.loads(json.dumps(found)) == {key: row[key] for key in found}


@pytest.mark.parametrize(
    ("said", "whole"),
    [
        ("d: 1 rank(s) on cpu, steps 0 to 9\nr: 1 rank(s) on cpu, steps 0 to 5", True),
        ("d: 1 rank(s) on cpu, steps 0 to 9\nr: 1 rank(s) on cpu, steps 3 to 5", False),
        ("stage 1, the denoiser alone: d, done before\nr: 1 rank(s) on cpu, steps 0 to 5", False),
    ],
)
def test_cpu_time_is_known_only_of_what_was_trained_whole(tmp_path, said, whole):
    seconds = trained([sys.executable, "-c", f"print({said!r}); sum(range(3_000_000))"], tmp_path / "log")
    assert 0.01 < seconds < 60 if whole else seconds is None


def test_a_training_that_fails_gives_no_time_but_its_reason(tmp_path):
    log = tmp_path / "log"
    with pytest.raises(SystemExit) as ended:
        trained([sys.executable, "-c", "print('step 1', flush=True); exit('sami-fast: data.path: nothing there')"], log)
    assert str(ended.value) == f"{log}: exit status 1: sami-fast: data.path: nothing there"
    with pytest.raises(SystemExit, match="nothing was said"):
        trained([sys.executable, "-c", "exit(2)"], log)
