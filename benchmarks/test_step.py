"""The whole training step: ours by every method against eager torch in both layouts and torch.compile; correct first, then timed in turn.

Loss and the gradients of all parameters of both networks; no optimiser. On a GPU the joint step of configs/celeba64.yaml as well, in
float32 and bfloat16, with memory and the share of the chip's peak.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial

import pytest
import torch

from sami_fast.config import Config
from sami_fast.ops.backend import AUTO, refusal

from .machine import peak_rate
from .measure import Contestant, check_close, gather
from .steps import BASELINE, CONFIGS, REFERENCE, SCORE_METHODS, Run, Step, convolution_bound, least_bytes, named_step

ON = {"disks": ("cpu", "cuda"), "faces": ("cpu", "cuda"), "celeba64": ("cuda",)}
COMPILED = {"cpu": (), "cuda": ("disks", "faces", "celeba64")}  # where our own compiled step is measured too: a CPU gains nothing by it
TARGETS = {"cpp sweeps": 2.0}  # our own choice on a CPU, over eager torch in channels-last
UNITS = {"float32": 2**-23, "bfloat16": 2**-8}


def contestants(step: Step, config: Config, name: str, tiny: bool, bf16: bool, part: str) -> Iterator[tuple[str, str, Callable[[], Run]]]:
    """Name, method that its FLOPs are counted by, and what makes its call."""
    device = step.device
    yield BASELINE, REFERENCE, lambda: step.reference(bf16=bf16, layout=torch.channels_last)
    yield REFERENCE, REFERENCE, lambda: step.reference(bf16=bf16)
    if part == "compiled":
        yield "torch.compile", REFERENCE, lambda: step.compiled_torch(bf16=bf16)
    backends = [b for b in AUTO[device] if b != "reference" and refusal(b, device, torch.bfloat16 if bf16 else torch.float32) is None]
    for backend in backends:
        for method in SCORE_METHODS if part == "eager" else ():
            yield f"{backend} {method}", method, lambda b=backend, m=method: step.ours(b, m, bf16=bf16)
        if part == "compiled" and (name in COMPILED[device] or tiny):
            yield f"{backend} dual, compiled", "dual", lambda b=backend: step.ours(b, "dual", compile_for=config, bf16=bf16)


@pytest.mark.parametrize("part", ["eager", "compiled"])  # compiling takes minutes: eager rows are written before it
@pytest.mark.parametrize("precision", UNITS)
@pytest.mark.parametrize("name", CONFIGS)
def test_step(name: str, precision: str, part: str, device: str, compete: Callable[..., None], request: pytest.FixtureRequest) -> None:
    tiny = request.config.getoption("--tiny")
    bf16 = precision == "bfloat16"
    if not tiny and device not in ON[name]:
        pytest.skip(f"measured on {' and '.join(ON[name])}")
    if bf16 and device == "cpu" and not tiny:
        pytest.skip("nobody trains in bfloat16 there")
    torch._dynamo.reset()
    step, config = named_step(name, device, tiny)
    exact, yardstick = step.reference(torch.float64)(), step.reference(bf16=bf16)()

    def ready(contestant: str, method: str, make: Callable[[], Run]) -> Contestant:
        check = partial(check_close, f"step {name} {precision}", "step", truth=exact, same_dtype=yardstick, unit=UNITS[precision])
        return Contestant.ready(contestant, make, check, device, **step.flops(method))

    found, wrong = gather({c[0]: partial(ready, *c) for c in contestants(step, config, name, tiny, bf16, part)})
    described = {
        "op": f"step {name}",
        "shape": step.shape,
        "dtype": precision,
        "mode": "step",
        "images": step.shape["B"],
        "bytes": least_bytes(step.x_0, step.sami),
        "config": {section: asdict(getattr(config, section)) for section in ("encoder", "denoiser", "schedule", "objective")},
        **convolution_bound(step.reference(bf16=bf16), device),
    }
    if (peak := peak_rate(precision) if device == "cuda" else None) is not None:
        # All rows count the same work, that of the cheapest method: one that does more gains nothing by it.
        described |= {"model_flops": step.flops("sweeps")["flops"], "peak_flops_per_second": peak}
    compete(described, found, BASELINE, targets=TARGETS, wrong=wrong, forgiven=["torch.compile"])
