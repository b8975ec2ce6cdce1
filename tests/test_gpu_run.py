"""The rehearsal of benchmarks/gpu_run.sh in small: its own logic and the sanitizer's cases, without a GPU.

`benchmarks/gpu_run.sh --rehearse OUTPUT_DIR` is the whole of it, in minutes: it also builds, with nvcc where there is one.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_run.sh"
ABSENT = ("deepspeed", "nvidia.dali", "av", "diffusers")  # on a machine that only measures


def gpu_run(*arguments: str, python: str = sys.executable, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SAMI_FAST", "TRITON", "PYTEST"))}
    environment |= {"PYTHON": python, "REHEARSE_SMALL": "1", "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run([str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False)


def statuses(out: str) -> dict[str, str]:
    """Stage and status in the table at the end."""
    lines = out.splitlines()
    (begin,) = (number for number, line in enumerate(lines) if line.startswith("stage "))
    return {line[:11].strip(): line[11:25].strip() for line in lines[begin + 1 :]}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "expected OUTPUT_DIR"),
        (["--fast", "x"], "no such option: --fast"),
        (["/dev/null/x"], "cannot write to /dev/null/x"),
        (["--minutes", "ten", "x"], "--minutes: expected a number, found 'ten'"),
    ],
)
def test_wrong_usage(arguments, reason):
    done = gpu_run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"gpu_run.sh: {reason}")
    assert len(done.stderr.splitlines()) == 1


def test_unknown_stage(tmp_path):
    done = gpu_run(str(tmp_path / "out"), "ops", "oops")
    assert (done.returncode, done.stderr.splitlines()) == (
        2,
        ["gpu_run.sh: no such stage: oops; expected some of build test sanitize ops step deepspeed"],
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(tmp_path):
    done = gpu_run(str(tmp_path), "ops")
    assert done.returncode == 2
    assert done.stderr == "gpu_run.sh: there is no GPU that torch can use; --rehearse does without\n"


def test_rehearsal(tmp_path):
    """Cases are run and checked; what is done is not done again."""
    first = gpu_run("--rehearse", str(tmp_path), "sanitize")
    assert first.returncode == 0, first.stdout + first.stderr
    assert statuses(first.stdout) == {"sanitize": "ok"}
    assert "no GPU: nothing measured here is a GPU figure" in first.stdout
    assert "triton on cpu: 4 calls, 0 wrong" in (tmp_path / "run.log").read_text()
    again = gpu_run("--rehearse", str(tmp_path), "sanitize")
    assert again.returncode == 0
    assert statuses(again.stdout) == {"sanitize": "done before"}


def test_a_stage_that_fails_does_not_stop_the_next(tmp_path):
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *.sanitize*) echo it broke; exit 9 ;; *.deepspeed_steps*) echo not here; exit 0 ;; esac\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    done = gpu_run("--rehearse", str(tmp_path / "out"), "sanitize", "deepspeed", python=str(python))
    assert done.returncode == 1
    assert statuses(done.stdout) == {"sanitize": "failed (9)", "deepspeed": "ok"}
    assert "it broke" in done.stdout


def test_what_runs_there_needs_nothing_else():
    """GPU tests are collected without what such a machine lacks; the script finds them by their marker."""
    marker = "mark" + ".gpu"
    files = [str(file) for file in sorted(Path(__file__).parent.glob("test_*.py")) if marker in file.read_text()]
    assert any(file.endswith("test_gpu.py") for file in files)
    options = ["--collect-only", "-q", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    code = f"import sys\nfor name in {ABSENT}: sys.modules[name] = None\nimport pytest; sys.exit(pytest.main({options!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert "test_gpu.py" in done.stdout
