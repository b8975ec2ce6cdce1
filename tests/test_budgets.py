"""What is counted stays within its budget, and a deliberate regression of each kind is noticed, with the old figure and the new."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import budgets
from benchmarks.budgets import COLUMNS, FILE, KINDS, BudgetError, Row, cases, compare, main, op_cases
from benchmarks.measure import peak_bytes
from sami_fast import ops, reference, score, step

needs_core = pytest.mark.skipif("cpp" in budgets.refusals(), reason="the compiled core is not built")
needs_interpreter = pytest.mark.skipif("triton" in budgets.refusals(), reason="Triton does not interpret here")


def budget_of(*name: str) -> Row:
    (found,) = (row for row in budgets.read(FILE) if row.name == name)
    return found


def faults(budget: Row, found: Row) -> list[str]:
    return compare([budget], [found], "write").faults


def today(what: str, backend: str) -> Row:
    return budgets.row(what, backend, dict(cases())[what])


def exceeded(what: str, backend: str) -> dict[str, tuple[int, int]]:
    """{kind: (budget, figure)} of what the comparison complains about; its sentences say the same."""
    budget, found = budget_of(what, backend), today(what, backend)
    said, pairs = faults(budget, found), {}
    for kind in KINDS:
        if any(f": {kind} " in sentence for sentence in said):
            pairs[kind] = budget.figures[kind], found.figures[kind]
            assert f"{what}, {backend}: {kind} {pairs[kind][0]} -> {pairs[kind][1]}" in said
    assert len(pairs) == len(said)
    return pairs


# What is counted


def test_budgets_hold(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("backend", budgets.BACKENDS)
@pytest.mark.parametrize(("method", "expected"), [("reverse", 6), ("sweeps", 6), ("dual", 8)])
def test_schedules_do_the_work_they_promise(method: str, expected: int, backend: str):
    """6F, 6F, 8F; without the stem's input gradient in the last pass, which is why the image has few channels."""
    forward, whole = (budget_of(what, backend).figures for what in ("encoder, forward", f"score, {method}"))
    assert whole["convolution_flops"] / forward["convolution_flops"] == pytest.approx(expected, rel=0.02)


def test_counting_twice_gives_the_same():
    assert today("score, sweeps", "reference") == today("score, sweeps", "reference")


@pytest.mark.parametrize("name", ["attention", "group_norm_silu"])
def test_bytes_are_those_of_the_allocator(name: str):
    """Where no library takes memory of its own."""
    run = op_cases()[name].work(2)
    torch.use_deterministic_algorithms(False)
    with ops.use_backend("reference"):
        allocated = peak_bytes(lambda: run(lambda: None))
    assert allocated == pytest.approx(today(f"{name}, second derivatives", "reference").figures["peak_bytes"], rel=0.01)


# A regression of each kind


def test_an_extra_convolution(monkeypatch: pytest.MonkeyPatch):
    """A score that computes its encoder once more than it needs to."""
    plain = score.sweeps

    def again(encoder: Any, x: Tensor, z: Tensor) -> Tensor:
        with torch.no_grad():
            encoder(x)
        return plain(encoder, x, z)

    monkeypatch.setattr(score, "sweeps", again)
    forward = budget_of("encoder, forward", "reference").figures["convolution_flops"]
    old, new = exceeded("score, sweeps", "reference")["convolution_flops"]
    assert new == old + forward


def test_an_extra_operator(monkeypatch: pytest.MonkeyPatch):
    plain = step.per_image
    monkeypatch.setattr(step, "per_image", lambda value, levels: plain(value, levels).neg().neg())
    found = exceeded("step, sweeps", "reference")
    assert found.keys() == {"operator_calls"}
    # Two terms, of which one is differentiated.
    assert found["operator_calls"][1] - found["operator_calls"][0] == 6


def test_a_tensor_saved_needlessly(monkeypatch: pytest.MonkeyPatch):
    class Same(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.copy = x.clone()  # not by save_for_backward: a note, as `score.sweeps` takes them
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    plain = step.ops.noise_sample

    def noised(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        x_t, eps = plain(*args, **kwargs)
        return Same.apply(x_t.requires_grad_()), eps

    monkeypatch.setattr(step.ops, "noise_sample", noised)
    old, new = exceeded("step, dual", "reference")["kept_bytes"]
    assert new - old >= 64 * 16 * 16 * 4


def test_a_larger_temporary(monkeypatch: pytest.MonkeyPatch):
    """Freed before its operator returns."""
    plain = reference.attention

    def wasteful(*args: Any, **kwargs: Any) -> Tensor:
        torch.empty(1 << 20)
        return plain(*args, **kwargs)

    monkeypatch.setattr(reference, "attention", wasteful)
    old, new = exceeded("attention, forward", "reference")["peak_bytes"]
    assert new == 1 << 22 > old


@needs_interpreter
@pytest.mark.parametrize("what", ["group_norm_silu, second derivatives", "step, reverse"])
def test_an_extra_launch(what: str, monkeypatch: pytest.MonkeyPatch):
    from sami_fast.kernels import group_norm_silu as home

    plain = home.group_norm_silu_fwd

    def twice(*args: Any) -> tuple[Tensor, ...]:
        plain(*args)
        return plain(*args)

    monkeypatch.setattr(home, "group_norm_silu_fwd", twice)
    old, new = exceeded(what, "triton")["launches"]
    assert new > old


@needs_interpreter
def test_an_image_that_lies_otherwise(monkeypatch: pytest.MonkeyPatch):
    """A network whose door leaves an image as it came: on a GPU all its convolutions would follow."""
    monkeypatch.setattr("sami_fast.models.denoiser.for_convolutions", lambda x: x)
    monkeypatch.setattr("sami_fast.gpu_step.lay_out_weights", lambda network: None)
    budget, found = budget_of("step of disks, 64 images, sweeps", "gpu"), budgets.gpu_step_row("disks", 64, "sweeps", True)
    said = faults(budget, found)
    assert f"{found}: channels_outside 0 -> {found.figures['channels_outside']}" in said
    assert found.figures["channels_outside"] > 30


@needs_core
def test_an_operator_inside_an_operator(monkeypatch: pytest.MonkeyPatch):
    """What our operators and the core call is counted too."""
    plain = torch.ops.sami_fast_C.gaussian_log_prob_fwd
    wasteful = SimpleNamespace(gaussian_log_prob_fwd=lambda z, mu, var: plain(z.clone(), mu, var))
    monkeypatch.setattr("sami_fast.ops.launchers._home", lambda file, _: wasteful if file == "gaussian_log_prob" else torch.ops.sami_fast_C)
    found = exceeded("gaussian_log_prob, forward", "cpp")
    assert found["operator_calls"] == (3, 4)
    assert found["peak_bytes"][1] - found["peak_bytes"][0] == 64 * 8 * 4


# The file

A = Row("a", "cpp", {"convolution_flops": 0, "operator_calls": 3, "kept_bytes": 64, "peak_bytes": 64, "launches": 1}, "torch 2.13")


def changed(row: Row, **figures: int) -> Row:
    return replace(row, figures=row.figures | figures)


def test_what_is_written_is_read(tmp_path: Path):
    rows = [replace(A, what="c, 90"), A, replace(A, what="b", figures={"peak_bytes": 0})]
    budgets.write(tmp_path / "x.csv", rows)
    assert budgets.read(tmp_path / "x.csv") == [rows[1], rows[2], rows[0]]
    assert (tmp_path / "x.csv").read_text().splitlines()[:2] == [",".join(COLUMNS), "a,cpp,0,3,64,64,1,,,,,,,torch 2.13"]


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ({}, []),
        ({"operator_calls": 2, "peak_bytes": 0}, []),
        ({"operator_calls": 4, "peak_bytes": 65}, ["a, cpp: operator_calls 3 -> 4", "a, cpp: peak_bytes 64 -> 65"]),
    ],
)
def test_comparison(figures: dict[str, int], expected: list[str]):
    assert faults(A, changed(A, **figures)) == expected


def test_a_figure_that_is_not_counted_any_more():
    found = replace(A, figures={kind: value for kind, value in A.figures.items() if kind != "peak_bytes"})
    assert faults(A, found) == ["a, cpp: peak_bytes 64 -> none"]


def test_a_lower_figure_is_reported():
    verdict = compare([A], [changed(A, peak_bytes=60)], "write")
    assert verdict.faults == []
    assert verdict.notes == ["figures below their budget: 1, such as a, cpp: peak_bytes 64 -> 60; `write` tightens them"]


def test_another_version():
    """Only what no version changes is compared."""
    other = replace(changed(A, peak_bytes=100), version="torch 2.12")
    verdict = compare([A], [other], "write")
    assert verdict.faults == []
    kept = "convolution_flops, launches, matmul_flops, channels_outside"
    said = f"1 budgets were made with torch 2.13, and here is torch 2.12: nothing but {kept} is compared"
    assert verdict.notes == [said]
    assert compare([A], [changed(other, launches=5)], "write").faults == ["a, cpp: launches 1 -> 5"]


def test_unknown_and_gone():
    verdict = compare([A], [replace(A, what="b")], "make it")
    assert verdict.faults == [
        "b, cpp: has no budget; `make it` writes it",
        "a, cpp: has a budget and is not there any more; `make it` takes it out",
    ]


TITLES = ",".join(COLUMNS)
MALFORMED = {
    "": f"expected the columns {TITLES}, found none",
    "what,calls\n": f"expected the columns {TITLES}, found what,calls",
    f"{TITLES}\na,cpp,3\n": "line 2: expected 14 cells, found 3",
    f"{TITLES}\na,cpp,1,3,-1,1,,,,,,,,x\n": "line 2: kept_bytes: expected a whole number or nothing, found '-1'",
    f"{TITLES}\na,cpp,1,3,1,1,,,,,,,,x\na,cpp,1,3,1,1,,,,,,,,x\n": "line 3: a second line for a, cpp",
    f'{TITLES}\n"a': "no table of budgets can be read from it",
}


@pytest.mark.parametrize("text", MALFORMED)
def test_malformed_file(text: str, tmp_path: Path):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(BudgetError) as raised:
        budgets.read(tmp_path / "x.csv")
    assert str(tmp_path / "x.csv") in str(raised.value)
    assert MALFORMED[text] in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_command_says_so_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--budgets", str(tmp_path / "none.csv")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "none.csv: no table of budgets can be read from it" in said.err


def test_no_folder_to_write_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--write", str(tmp_path / "none/x.csv")]) == 2
    assert capsys.readouterr().err == f"--write: no folder {tmp_path / 'none'}\n"


def test_command_fails_and_rewrites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """One line with a budget too low, one without a budget; --write mends both and leaves those of another backend alone."""
    file, what = tmp_path / "counted.csv", "gaussian_log_prob, forward"
    found = today(what, "reference")
    elsewhere = Row("encoder, forward", "elsewhere", {}, "torch 2.13")
    monkeypatch.setattr(budgets, "measure", lambda: [found])
    monkeypatch.setattr(budgets, "refusals", lambda: dict.fromkeys(("cpp", "triton", "elsewhere"), "it is not there"))
    calls = found.figures["operator_calls"]
    budgets.write(file, [replace(found, figures={**found.figures, "operator_calls": calls - 1}), elsewhere])
    assert main(["--budgets", str(file)]) == 1
    said = capsys.readouterr()
    assert said.err == f"{what}, reference: operator_calls {calls - 1} -> {calls}\n"
    assert f"{calls - 1} -> {calls}" in said.out
    assert "cpp is not counted here: it is not there" in said.out
    budgets.write(file, [elsewhere])
    assert main(["--budgets", str(file)]) == 1
    assert f"{what}, reference: has no budget; `python -m benchmarks.budgets --write {file}` writes it" in capsys.readouterr().err
    assert main(["--write", str(file)]) == 0
    assert budgets.read(file) == [elsewhere, found]
    assert main(["--budgets", str(file)]) == 0
