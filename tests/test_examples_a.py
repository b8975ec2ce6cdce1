"""examples/derivatives.py: it runs as printed, and its derivatives are those of plain torch."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import normal, relative_error

from sami_fast import ops

FILE = Path(__file__).resolve().parents[1] / "examples/derivatives.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("derivatives", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_runs_and_the_penalty_falls():
    done = subprocess.run([sys.executable, FILE], capture_output=True, text=True, timeout=120, check=True)
    penalties = [float(number) for number in re.findall(r"penalty ([\d.]+)", done.stdout)]
    assert len(penalties) == 4
    assert penalties[-1] < 0.5 * penalties[0]
    assert "|H v|" in done.stdout


def test_the_derivatives_are_torchs(example):
    torch.manual_seed(0)
    critic, x, v = example.Critic(8).double(), normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)
    results = []
    for backend in ("auto", "reference"):
        with ops.use_backend(backend):
            penalty = example.gradient_penalty(critic, x)
            gradients = torch.autograd.grad(penalty, list(critic.parameters()), allow_unused=True, materialize_grads=True)
            results.append([penalty, *gradients, example.hessian_vector_product(critic, x, v)])
    for found, expected in zip(*results, strict=True):
        assert relative_error(found, expected) < 1e-9 or (found - expected).abs().max() < 1e-12

    def whole(x):
        return torch.autograd.functional.hessian(lambda x: critic(x).sum(), x)

    with ops.use_backend("reference"):
        expected = torch.einsum("bchwdefg,defg->bchw", whole(x), v)
    assert relative_error(results[0][-1], expected) < 1e-9
