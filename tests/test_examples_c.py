"""The examples of loops and data of one's own run as they are, with fewer steps."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sami_fast import load_model
from sami_fast.evaluation import open_run

ROOT = Path(__file__).resolve().parents[1]
OF_LAUNCHERS = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # training in this process may have left some


def run(script: str, folder: Path, *arguments: str) -> str:
    """What a script prints, in a folder of its own."""
    command = [sys.executable, str(ROOT / script), *arguments]
    alone = {name: value for name, value in os.environ.items() if name not in OF_LAUNCHERS}
    done = subprocess.run(command, cwd=folder, env=alone, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_own_loop(tmp_path):
    said = run("examples/own_loop.py", tmp_path, "12")
    assert re.findall(r"^(\w+): linear R2 (-?\d\.\d{3})$", said, re.MULTILINE)
    assert [line.split(":")[0] for line in said.splitlines()[:3]] == ["x", "y", "background"]
    assert re.search(r"^MCC 0\.\d{3}$", said, re.MULTILINE)
    assert load_model(tmp_path / "own_loop").encode(torch.zeros(2, 1, 16, 16)).mu.shape == (2, 8)
    loop = (ROOT / "examples/own_loop.py").read_text().partition("\noptimizer = ")[2].partition("\n\nmodel.eval")[0]
    assert len(loop.splitlines()) == 10  # as its page says


@pytest.mark.parametrize("library", ["lightning", "accelerate"])
def test_loops_of_others(tmp_path, library):
    pytest.importorskip(library, reason=f"needs {library}")
    said = run(f"examples/{library}_loop.py", tmp_path, "3")
    nats = re.search(r"validation_nats +([0-9.]+)|step 3: ([0-9.]+) nats", said)
    assert nats
    assert 100 < float(nats[1] or nats[2]) < 10_000
    trained = load_model(tmp_path / f"{library}_loop")
    assert trained.encode(torch.zeros(2, 1, 16, 16)).mu.shape == (2, 8)


def test_own_dataset(tmp_path):
    assert run("examples/own_dataset.py", tmp_path, "4").splitlines()[-1] == "runs/squares"
    model = load_model(tmp_path / "runs/squares")
    assert model.image_shape == (1, 16, 16)
    printed = next(line for line in (ROOT / "examples/own_dataset.py").read_text().splitlines() if "data.class=" in line)
    settings = printed.replace("examples/", f"{ROOT}/examples/").split()[2:]
    smaller = ["name=named", "train.steps=4", "train.denoiser_steps=2", "data.kwargs.count=50", "data.kwargs.size=8", "--no-report"]
    run("sami_fast/train.py", tmp_path, *(word for word in settings if not word.startswith("name=")), *smaller)
    assert open_run(tmp_path / "runs/named", 4, trust_remote_code=True).train.size == 45
