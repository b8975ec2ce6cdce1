"""Every Triton kernel compiles for every chip, in every configuration the launchers select, within its budget and without spills on sm_90;
no GPU needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BUDGETS = ROOT / "benchmarks/budgets/triton.csv"


def compile_all(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: this one interprets its kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "sami_fast.kernels.aot", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_kernel_compiles(arch: int):
    result = compile_all("--arch", str(arch), "--budgets", str(BUDGETS))
    print(result.stdout)
    assert result.returncode == 0, result.stderr
    assert ", 0 faults" in result.stdout.splitlines()[-1]


def test_a_spill_is_an_error():
    from sami_fast.kernels.aot import Row, spills

    def row(chip: str, stack: int) -> Row:
        return Row(("k", "", chip), {"registers": 255, "stack": stack, "shared": 0}, "")

    assert spills(row("sm_90", 8))
    assert not spills(row("sm_90", 0))
    assert not spills(row("sm_80", 8))


def test_not_under_the_interpreter():
    command = [sys.executable, "-m", "sami_fast.kernels.aot"]
    result = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "TRITON_INTERPRET is set" in result.stderr


def test_what_is_compiled_is_what_is_launched():
    """Recorded launches carry Triton's own specialisation: 1 and multiples of 16 are values of their own, and types follow the tensor."""
    from sami_fast.kernels.aot import _specialise

    assert _specialise("n", 1, True) == ("constexpr", 1, False)
    assert _specialise("n", 32, True) == ("i32", None, True)
    assert _specialise("n", 33, True) == ("i32", None, False)
    assert _specialise("n", 1, False) == ("i32", None, False)
    assert _specialise("n", 1 << 40, True) == ("i64", None, True)
    assert _specialise("x", torch.empty(1, dtype=torch.bfloat16), True) == ("*bf16", None, True)
    assert _specialise("x", None, True)[0] == "constexpr"
