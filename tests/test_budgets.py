"""What noise cannot blur stays within its budget, and a deliberate regression of each kind is noticed, with the old figure and the new."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import util
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import budgets
import pytest
import torch
from budgets import FILE, TABLE, cases, main, op_cases
from helpers import peak_bytes
from sami_fast.kernels import aot
from sami_fast.kernels.budgets import BudgetError, Row, Table
from torch import Tensor

from sami_fast import ops, reference, score, step

ROOT = Path(__file__).resolve().parents[1]
TRITON, CUDA = (ROOT / "benchmarks/budgets" / name for name in ("triton.csv", "cuda.csv"))
needs_core = pytest.mark.skipif("cpp" in budgets.refusals(), reason="the compiled core is not built")
needs_interpreter = pytest.mark.skipif("triton" in budgets.refusals(), reason="Triton does not interpret here")


def budget_of(table: Table, file: Path, *name: str) -> Row:
    (found,) = (row for row in table.read(file) if row.name == name)
    return found


def faults(budget: Row, found: Row, table: Table = TABLE) -> list[str]:
    return table.compare([budget], [found], "write").faults


def today(what: str, backend: str) -> Row:
    return budgets.row(what, backend, dict(cases())[what])


def exceeded(what: str, backend: str) -> dict[str, tuple[int, int]]:
    """{kind: (budget, figure)} of what the comparison complains about; its sentences say the same."""
    budget, found = budget_of(TABLE, FILE, what, backend), today(what, backend)
    said, pairs = faults(budget, found), {}
    for kind in TABLE.kinds:
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
    forward, whole = (budget_of(TABLE, FILE, what, backend).figures for what in ("encoder, forward", f"score, {method}"))
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
    forward = budget_of(TABLE, FILE, "encoder, forward", "reference").figures["convolution_flops"]
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


@needs_core
def test_an_operator_inside_an_operator(monkeypatch: pytest.MonkeyPatch):
    """What our operators and the core call is counted too."""
    plain = torch.ops.sami_fast_C.gaussian_log_prob_fwd
    wasteful = SimpleNamespace(gaussian_log_prob_fwd=lambda z, mu, var: plain(z.clone(), mu, var))
    monkeypatch.setattr("sami_fast.ops.launchers._home", lambda file, _: wasteful if file == "gaussian_log_prob" else torch.ops.sami_fast_C)
    found = exceeded("gaussian_log_prob, forward", "cpp")
    assert found["operator_calls"] == (3, 4)
    assert found["peak_bytes"][1] - found["peak_bytes"][0] == 64 * 8 * 4


# Compiled kernels. No GPU needed.

VARIANT = """
from dataclasses import replace
from sami_fast.kernels import aot
source = next(s for s in aot.sources("random", 90) if s.label == "normals")
for changes in ({}, {"num_warps": 1}):
    row = aot.build(replace(source, **changes), 90)
    print(row.version, *row.name, *row.figures.values(), sep="|")
"""


def test_a_triton_kernel_of_another_shape():
    """The same tile for one warp instead of four: a thread holds four times as much."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", VARIANT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    plain, changed = (
        Row(tuple(name), dict(zip(aot.TABLE.kinds, map(int, figures), strict=True)), version)
        for version, *cells in (line.split("|") for line in done.stdout.splitlines())
        for name, figures in [(cells[:3], cells[3:])]
    )
    budget = budget_of(aot.TABLE, TRITON, "_random_kernel", "normals", "sm_90")
    if budget.version == plain.version:
        assert faults(budget, plain, aot.TABLE) == []
    old, new = plain.figures["registers"], changed.figures["registers"]
    assert new > old
    assert f"_random_kernel, normals, sm_90: registers {old} -> {new}" in faults(plain, changed, aot.TABLE)


@cache
def check_cuda() -> ModuleType:
    spec = util.spec_from_file_location("check_cuda", ROOT / "csrc/check_cuda.py")
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc in the path")
def test_a_cuda_kernel_that_takes_more_shared_memory(tmp_path: Path):
    home = check_cuda()
    (tmp_path / "launch.h").write_text((ROOT / "csrc/cuda/launch.h").read_text())
    source = (ROOT / "csrc/cuda/random.cu").read_text()
    assert "int TILE = 128;" in source
    (tmp_path / "random.cu").write_text(source.replace("int TILE = 128;", "int TILE = 256;"))
    rows = home.compile_file(tmp_path / "random.cu", "9.0", home.compiler_version())
    (found,) = (row for row in rows if row.name == ("stratified_uniform_kernel", "sm_90"))
    budget = budget_of(home.TABLE, CUDA, *found.name)
    assert found.figures["shared"] == 2 * budget.figures["shared"] > 0
    said = f"stratified_uniform_kernel, sm_90: shared {budget.figures['shared']} -> {found.figures['shared']}"
    assert said in faults(replace(budget, version=found.version), found, home.TABLE)


def test_a_cuda_kernel_that_spills():
    budget = check_cuda().TABLE.read(CUDA)[0]
    found = replace(budget, figures={**budget.figures, "spilled": 8})
    assert faults(budget, found, check_cuda().TABLE) == [f"{budget}: spilled {budget.figures['spilled']} -> 8"]


# The files

SMALL = Table(("what",), ("calls", "bytes"), note="remark", exact=frozenset({"calls"}))
A = Row(("a",), {"calls": 3, "bytes": 64}, "torch 2.13", "why")


def test_what_is_written_is_read(tmp_path: Path):
    rows = [replace(A, name=("b, 100",)), A, replace(A, name=("b, 90",), figures={"bytes": 0})]
    SMALL.write(tmp_path / "x.csv", rows)
    assert SMALL.read(tmp_path / "x.csv") == [rows[1], rows[2], rows[0]]  # 90 before 100
    assert (tmp_path / "x.csv").read_text().splitlines()[:2] == ["what,remark,calls,bytes,made_with", "a,why,3,64,torch 2.13"]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"calls": 3, "bytes": 64}, []),
        ({"calls": 2, "bytes": 0}, []),
        ({"calls": 4, "bytes": 65}, ["a: calls 3 -> 4", "a: bytes 64 -> 65"]),
        ({"calls": 3}, ["a: bytes 64 -> none"]),
    ],
)
def test_comparison(found: dict[str, int], expected: list[str]):
    assert SMALL.compare([A], [replace(A, figures=found)], "write").faults == expected


def test_a_lower_figure_is_reported():
    verdict = SMALL.compare([A], [replace(A, figures={"calls": 3, "bytes": 60})], "write")
    assert verdict.faults == []
    assert verdict.notes == ["figures below their budget: 1, such as a: bytes 64 -> 60; `write` tightens them"]


def test_another_version():
    """Only what no version changes is compared."""
    other = replace(A, version="torch 2.12", figures={"calls": 3, "bytes": 100})
    verdict = SMALL.compare([A], [other], "write")
    assert verdict.faults == []
    assert verdict.notes == ["1 budgets were made with torch 2.13, and here is torch 2.12: nothing but calls is compared"]
    assert SMALL.compare([A], [replace(other, figures={"calls": 5, "bytes": 64})], "write").faults == ["a: calls 3 -> 5"]


def test_unknown_and_gone():
    verdict = SMALL.compare([A], [replace(A, name=("b",))], "make it")
    assert verdict.faults == ["b: has no budget; `make it` writes it", "a: has a budget and is not there any more; `make it` takes it out"]


MALFORMED = {
    "": "expected the columns what,remark,calls,bytes,made_with, found none",
    "what,calls\n": "expected the columns what,remark,calls,bytes,made_with, found what,calls",
    "what,remark,calls,bytes,made_with\na,,3\n": "line 2: expected 5 cells, found 3",
    "what,remark,calls,bytes,made_with\na,,3,-1,x\n": "line 2: bytes: expected a whole number or nothing, found '-1'",
    "what,remark,calls,bytes,made_with\na,,3,1,x\na,,3,1,x\n": "line 3: a second line for a",
    'what,remark,calls,bytes,made_with\n"a': "no table of budgets can be read from it",
}


@pytest.mark.parametrize("text", MALFORMED)
def test_malformed_file(text: str, tmp_path: Path):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(BudgetError) as raised:
        SMALL.read(tmp_path / "x.csv")
    assert str(tmp_path / "x.csv") in str(raised.value)
    assert MALFORMED[text] in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("command", ["counted", "triton", "cuda"])
def test_commands_say_so_before_any_work(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run: dict[str, Callable[[list[str]], int]] = {"counted": main, "triton": aot.main, "cuda": lambda argv: check_cuda().main(argv)}
    assert run[command](["--budgets", str(tmp_path / "none.csv")]) == 2
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
    elsewhere = Row(("encoder, forward", "elsewhere"), {}, "torch 2.13")
    monkeypatch.setattr(budgets, "measure", lambda: [found])
    monkeypatch.setattr(budgets, "refusals", lambda: dict.fromkeys(("cpp", "triton", "elsewhere"), "it is not there"))
    calls = found.figures["operator_calls"]
    TABLE.write(file, [replace(found, figures={**found.figures, "operator_calls": calls - 1}), elsewhere])
    assert main(["--budgets", str(file)]) == 1
    said = capsys.readouterr()
    assert said.err == f"{what}, reference: operator_calls {calls - 1} -> {calls}\n"
    assert f"{calls - 1} -> {calls}" in said.out
    assert "cpp is not counted here: it is not there" in said.out
    TABLE.write(file, [elsewhere])
    assert main(["--budgets", str(file)]) == 1
    assert f"{what}, reference: has no budget; `python benchmarks/budgets.py --write {file}` writes it" in capsys.readouterr().err
    assert main(["--write", str(file)]) == 0
    assert TABLE.read(file) == [elsewhere, found]
    assert main(["--budgets", str(file)]) == 0
