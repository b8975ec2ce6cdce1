"""Every Triton kernel compiles for every chip, in every configuration the launchers select, without spills on sm_90; CUDA kernels are
looked at in the same way. No GPU needed."""

import os
import re
import shutil
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def compiling(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own: this one interprets its kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_kernel_compiles(arch: int):
    result = compiling("-m", "sami_fast.kernels.aot", "--arch", str(arch))
    print(result.stdout)
    assert result.returncode == 0, result.stderr
    assert ", 0 faults" in result.stdout.splitlines()[-1]


SPILLING = """
import sys
from dataclasses import replace
from sami_fast.kernels import aot
plain = aot.sources
def sources(op):
    source = next(s for s in plain(op) if s.kernel == "_gaussian_log_prob_bwd_bwd_kernel" and dict(s.constants)["BLOCK_Z"] == 1024)
    yield replace(source, num_warps=1)
aot.sources = sources
aot.CHOSEN_WITH = eval(sys.argv[1]) or aot.CHOSEN_WITH
sys.exit(aot.main(["--op", "gaussian_log_prob", "--arch", "90", "--jobs", "1"]))
"""


def test_a_kernel_that_spills_fails():
    """The tile of four warps in one warp: more numbers for each thread than it has registers."""
    import triton

    this = tuple(map(int, triton.__version__.split(".")[:2]))
    result = compiling("-c", SPILLING, repr(this))
    assert result.returncode == 1, result.stderr
    assert re.fullmatch(r"_gaussian_log_prob_bwd_bwd_kernel, .*, sm_90: spills [0-9]+ bytes\n", result.stderr)
    other = compiling("-c", SPILLING, "(3, 0)")
    assert other.returncode == 0
    assert "sm_90: spills" in other.stdout


def test_spills_count_on_sm_90():
    from sami_fast.kernels.aot import Compiled

    assert Compiled("k", "", "sm_90", 255, 8, 0).fault == "k, , sm_90: spills 8 bytes"
    assert Compiled("k", "", "sm_90", 255, 0, 0).fault is None
    assert Compiled("k", "", "sm_80", 255, 8, 0).fault is None


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc in the path")
def test_a_cuda_kernel_that_spills(tmp_path: Path):
    """More numbers at a time than the registers that so many threads leave."""
    spec = util.spec_from_file_location("check_cuda", ROOT / "csrc/check_cuda.py")
    home = util.module_from_spec(spec)
    spec.loader.exec_module(home)
    source = tmp_path / "spilling.cu"
    source.write_text(CUDA)
    (found,) = home.compile_file(source, "9.0")
    assert (found.kernel, found.chip, found.shared) == ("spilling_kernel", "sm_90", 128)
    assert found.registers == 32
    assert found.fault == f"spilling_kernel, , sm_90: spills {found.spilled} bytes"


CUDA = """
__global__ void __launch_bounds__(1024, 2) spilling_kernel(const float* x, float* y) {
  __shared__ float factor[32];
  factor[threadIdx.x % 32] = x[threadIdx.x];
  __syncthreads();
  float held[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) held[i] = x[1024 * i + threadIdx.x] * factor[i % 32];
#pragma unroll
  for (int i = 0; i < 96; ++i) y[1024 * i + threadIdx.x] = held[95 - i] * held[(7 * i) % 96];
}
"""


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
