"""Every figure of the documents stands in a committed row, and the check that says so sees what is wrong."""

import json
from dataclasses import replace

import pytest
import scaling
from figures import RESULTS, ROOT, CitationError, check, documents, field, from_rows, read_rows, write_generated, write_rows

from sami_fast import plan
from sami_fast.config import load_config

ROWS = [
    {"run": "a", "seed": 0, "r2": {"x": 0.99634, "y": 0.9871}, "mcc": 0.98765, "seconds": 224.57, "live": 3, "passes": True},
    {"run": "a", "seed": 1, "r2": {"x": 0.91, "y": 0.95}, "mcc": 0.9, "seconds": 100.0, "live": 3, "passes": False},
    {"run": "b c", "seed": 0, "r2": {"x": -0.0043, "y": 0.5}, "mcc": 0.75, "share": 0.123, "curve": {"800": 0.21}, "kl": [0.5, 2.5]},
]


@pytest.fixture
def problems(tmp_path):
    """Of a document beside rows: line, figure and message of each."""
    write_rows(tmp_path / "runs.jsonl", ROWS, ("run", "seed"))

    def of(text, generated=None):
        document = tmp_path / "document.md"
        document.write_text(text)
        return [(found.line, found.figure, found.text) for found in check(document, tmp_path, generated) if found.problem]

    return of


# ---- the documents


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_figure_stands_in_a_row(path):
    assert not [str(found) for found in check(path) if found.problem]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.jsonl")), ids=lambda path: path.name)
def test_every_row_has_an_address(path):
    for row in read_rows(path):
        assert not {"command", "date", "commit", "device", "threads", "torch", "triton"} - row.keys(), row
        assert row["commit"] or row.get("source"), row


@pytest.mark.parametrize("name", ["celeba64", "imagenet64"])
def test_a_plan_follows_from_the_counts_of_its_row(name, monkeypatch):
    """Memory, bytes sent, FLOPs of a step and times, derived anew; the counts take too long here and have tests of their own."""
    (row,) = (row for row in read_rows(RESULTS / "plan.jsonl") if row["config"] == name)
    counted = scaling.plan_of(row).networks.values()

    def count_networks(config, model, image_shape):
        sizes = [tuple(p.numel() for p in network.parameters()) for network in model.networks.values()]
        assert [sum(each) for each in sizes] == [network.parameters for network in counted]
        return tuple(replace(network, sizes=each) for network, each in zip(counted, sizes, strict=True))

    monkeypatch.setattr(plan, "count_networks", count_networks)
    found = plan.facts(plan.plan(load_config(name, [scaling.CONFIGS[name]]), scaling.GPUS, scaling.GPU))
    assert json.loads(json.dumps(found)) == {key: row[key] for key in found}


# ---- what is right


@pytest.mark.parametrize(
    "text",
    [
        "MCC 0.988, after 225 s. <!-- rows: runs.jsonl run=a seed=0: mcc seconds -->",
        "x 0.996 and y 0.99.\n\n<!-- rows: runs.jsonl run=a seed=0: r2.x r2.y -->",
        "MCC 0.94 ± 0.06 in 3.7 min, 12 %, -0.00. <!-- rows: runs.jsonl run=a: mean(mcc) std(mcc); run=a seed=0: seconds/60;\n"
        'runs.jsonl run="b c": 100*share r2.x -->',
        "1 of 2 seeds pass, the lowest at 0.91 and 0.987. <!-- rows: runs.jsonl run=a: count(passes) rows() min(min(r2)) max(min(r2)) -->",
        'At step 800 it was 0.21, KL 2.5 nats. <!-- rows: runs.jsonl mcc=0.75: curve["800"] kl[1] -->',
        "| a | b |\n| --- | --- |\n| 0.75 | 3 <!-- rows: runs.jsonl seed=0 mcc=0.75: mcc given --> |",
        "Above 0.95 it was 0.75. <!-- rows: runs.jsonl mcc=0.75: given mcc -->",
        "R2 >= 0.95 and 10 % <!-- given: thresholds -->",
        "- 0.75 <!-- rows: runs.jsonl mcc=0.75: mcc -->\n- 64x64, torch 2.13.0+cpu, Python 3.11, 2026-11-22, `0.5`, [a](b/1.5.md), R2",
        "sm_90, 3 factors of arXiv:2512.17127, Apache-2.0, H.264",
        "    code 0.123\n\n```\n0.5 s\n```\n",
        "    loss 0.75\n\n<!-- rows: runs.jsonl mcc=0.75: mcc -->\n",
        "Text\n\n    0.1 <!-- rows: none.jsonl: an example -->\n\nMore",
    ],
)
def test_what_is_right(problems, text):
    assert problems(text) == []


def test_a_generated_block_that_its_rows_give(problems):
    assert problems("<!-- t -->\n0.75\n<!-- end of t -->\n", lambda name: "0.75") == []


# ---- what is wrong


@pytest.mark.parametrize(
    ("text", "line", "figure", "message"),
    [
        ("MCC\n0.989. <!-- rows: runs.jsonl run=a seed=0: mcc -->", 2, "0.989", "is not mcc = 0.98765 of runs.jsonl run=a seed=0"),
        ("0.9880 <!-- rows: runs.jsonl run=a seed=0: mcc -->", 1, "0.9880", "mcc = 0.98765"),  # 0.988, but not to four digits
        ("y 0.987, x 0.996. <!-- rows: runs.jsonl run=a seed=0: r2.x r2.y -->", 1, "0.987", "the nearest is r2.y = 0.9871"),
        ("226 s <!-- rows: runs.jsonl run=a seed=0: seconds -->", 1, "226", "seconds = 224.57"),
        ("4 live <!-- rows: runs.jsonl run=a seed=0: live -->", 1, "", "live = 3 of runs.jsonl run=a seed=0: no figure is left for it"),
        ("0.75 and 0.5 <!-- rows: runs.jsonl mcc=0.75: mcc -->", 1, "0.5", "has no field in its citation"),
        ("0.75 <!-- rows: runs.jsonl mcc=0.75: mcc share -->", 1, "", "share = 0.123"),
        ("0.75 <!-- rows: runs.jsonl run=z: mcc -->", 1, "", "no such row"),
        ("0.75 <!-- rows: runs.jsonl color=red: mcc -->", 1, "", "no such row"),
        ("0.75 <!-- rows: none.jsonl: mcc -->", 1, "", "no such file"),
        ("0.75 <!-- rows: runs.jsonl mcc=0.75: mmc -->", 1, "", "no field 'mmc': the row has run, seed, r2, mcc"),
        ("0.75 <!-- rows: runs.jsonl mcc=0.75: r2 -->", 1, "", "not a number"),
        ("0.75 <!-- rows: runs.jsonl mcc=0.75: __import__('os') -->", 1, "", "not understood"),
        ("0.9 <!-- rows: runs.jsonl run=a: mcc -->", 1, "", "the filters leave 2 rows"),
        ("0.75 <!-- rows: runs.jsonl mcc=0.75 -->", 1, "", "expected FILE.jsonl"),
        ('0.75 <!-- rows: runs.jsonl run="b c: mcc -->', 1, "", "No closing quotation"),
        ("0.75 <!-- rows: runs.jsonl mcc=0.75: mcc/0 -->", 1, "", "division"),
        ("0.75 <!-- given -->", 1, "", "does not say what"),
        ("<!-- rows: runs.jsonl mcc=0.75: mcc -->", 1, "", "nothing before it"),
        ("0.75 <!-- rows: runs.jsonl mcc=0.75: mcc --> and 0.76", 1, "0.76", "no row"),
        ("- 0.75\n- 0.75 <!-- rows: runs.jsonl mcc=0.75: mcc -->", 1, "0.75", "no row"),
        ("    loss 0.74\n\n<!-- rows: runs.jsonl mcc=0.75: mcc -->\n", 1, "0.74", "is not mcc = 0.75"),
    ],
)
def test_what_is_wrong(problems, text, line, figure, message):
    found = problems(text)
    assert [(place, quoted) for place, quoted, _ in found] == [(line, figure)]
    assert message in found[0][2]


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("It took 4.4 minutes.", ["4.4"]),
        ("# Now 1.5x as fast", ["1.5"]),
        ("62 to 70 % of 12 images", ["62", "70"]),
        ("6, 8 and 9 s", ["6", "8", "9"]),
        ("8 of 8 seeds, 1e-12, \u22120.5", ["8", "8", "1e-12", "\u22120.5"]),
        ("| 2x | 30 GiB | 5 ms | 25.3-25.8 |", ["2", "30", "5", "25.3", "25.8"]),
        ("1. an item\n\n    goes on: 0.5\n", ["0.5"]),
        ("a line\n- **1,200 images/s** ([more](x.md))", ["1,200"]),
    ],
)
def test_a_figure_without_a_row_fails(problems, text, quoted):
    assert [figure for _, figure, _ in problems(text)] == quoted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- t -->\n0.75\n0.6\n<!-- end of t -->", "'0.6' instead of '0.5'; run --write"),
        ("<!-- t -->\n0.75\n<!-- end of t -->", "'' instead of '0.5'"),
        ("0.75\n<!-- end of t -->", "has no beginning"),
    ],
)
def test_a_generated_block_that_its_rows_do_not_give_fails(problems, text, message):
    assert any(message in found for *_, found in problems(text, lambda name: "0.75\n0.5"))


def test_a_generated_block_without_rows_or_writer_fails(tmp_path):
    for name in ("recovery disks", "plan celeba64", "weather today"):
        with pytest.raises(CitationError, match=r"no such row|nobody writes it"):
            from_rows(name, tmp_path)


def test_changed_digits_of_the_results_fail(tmp_path):
    """In prose, in a table written by hand and in a generated one."""
    text = (ROOT / "docs/results.md").read_text()
    changes = {"R2 0.996, 0.997 and": "R2 0.996, 0.998 and", "| 0.968 | 0.991 |": "| 0.968 | 0.992 |", "| yes | 7.7 |": "| yes | 7.6 |"}
    for right, wrong in changes.items():
        assert right in text
        text = text.replace(right, wrong, 1)
    (tmp_path / "results.md").write_text(text)
    found = sorted((f for f in check(tmp_path / "results.md") if f.problem), key=lambda f: f.figure)
    assert [f.figure for f in found] == ["", "0.992", "0.998"]
    assert "'recovery disks' is not what its rows give" in found[0].text


# ---- rows and blocks are written


def test_rows_take_the_place_of_earlier_ones(tmp_path):
    write_rows(tmp_path / "runs.jsonl", ROWS, ("run", "seed"))
    write_rows(tmp_path / "runs.jsonl", [ROWS[0] | {"mcc": 0.5}, {"run": "new", "seed": 7}], ("run", "seed"))
    rows = read_rows(tmp_path / "runs.jsonl")
    assert [(row["run"], row["seed"], row.get("mcc")) for row in rows] == [("a", 0, 0.5), ("a", 1, 0.9), ("b c", 0, 0.75), ("new", 7, None)]


def test_a_block_is_replaced_or_added(tmp_path):
    document = tmp_path / "document.md"
    document.write_text("before\n\n<!-- t -->\nold\n<!-- end of t -->\nafter\n")
    write_generated(document, "t", "new")
    assert document.read_text() == "before\n\n<!-- t -->\nnew\n<!-- end of t -->\nafter\n"
    write_generated(document, "u", "more")
    assert document.read_text().endswith("after\n\n<!-- u -->\nmore\n<!-- end of u -->\n")


def test_expressions():
    assert field("mean(r2)-1", ROWS[:1]) == pytest.approx((0.99634 + 0.9871) / 2 - 1)
    assert field("max(seconds)/min(seconds)", ROWS[:2]) == pytest.approx(2.2457)
    with pytest.raises(CitationError, match="leave 2 rows"):
        field("seconds/60", ROWS[:2])
