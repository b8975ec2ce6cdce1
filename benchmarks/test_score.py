"""The ways to differentiate the encoder's score, within the whole training step: time and peak memory on each backend, `reverse` the base.

pytest benchmarks/ -k score_methods --rows score.jsonl     # the rows of docs/performance.md, which lie in benchmarks/results/
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from sami_fast.config import load_config
from sami_fast.data import open_dataset
from sami_fast.ops.backend import AUTO, refusal

from .measure import Contestant, check_close
from .steps import SCORE_METHODS, Step, named_step

NAMED = {"disks32": "disks", "faces64": "faces"}  # of `steps.CONFIGS`
SHIPPED = {"disks16": "disks", "sprites32": "sprites"}  # configs as they come, with their own images


def step_of(name: str, device: str, tiny: bool) -> Step:
    if name in NAMED:
        return named_step(NAMED[name], device, tiny)[0]
    config = load_config(SHIPPED[name], ["train.batch_size=2"] if tiny else [])
    torch.manual_seed(0)
    step = Step.of(config, open_dataset(config.data, config.seed).images(torch.arange(config.train.batch_size)).to(device))
    torch.nn.init.normal_(step.sami.denoiser.out.weight, std=0.02)
    return step


@pytest.mark.parametrize("backend", ["cpp", "triton", "cuda", "reference"])
@pytest.mark.parametrize("name", ["disks16", "disks32", "sprites32", "faces64"])
def test_score_methods(name: str, backend: str, device: str, compete: Callable[..., None], request: pytest.FixtureRequest) -> None:
    reason = refusal(backend, device, torch.float32) if backend in AUTO[device] else f"auto never picks it on {device}"
    if reason is not None:
        pytest.skip(reason)
    step = step_of(name, device, request.config.getoption("--tiny"))
    exact, yardstick = step.reference(torch.float64)(), step.reference()()
    check = partial(check_close, f"step {name}", "step", truth=exact, same_dtype=yardstick)
    found = [
        Contestant.ready(f"{backend} {method}", partial(step.ours, backend, method), check, device, **step.flops(method))
        for method in SCORE_METHODS
    ]
    described = {
        "op": f"step {name}",
        "shape": step.shape,
        "dtype": "float32",
        "mode": "step",
        "images": step.shape["B"],
    }
    compete(described, found, f"{backend} reverse")
