"""`engine.compile`: the same losses and weights as without it, and one cache for all processes."""

import json
import os
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
import torch
from helpers import normal
from safetensors.torch import load_file
from torch._inductor import config as inductor
from torch._inductor.custom_graph_pass import CustomGraphPass

from sami_fast.config import load_config
from sami_fast.engine.compiled import compiled_parts, eager_parts
from sami_fast.methods.build import build_model
from sami_fast.ops.backend import decided_once
from sami_fast.step import Draw, guided_terms
from sami_fast.train import train

TINY = str(Path(__file__).parent / "tiny.yaml")


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    """Compiled code of these tests stays out of the user's own cache, and one test finds the other's."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "compiled"))
    torch._dynamo.reset()


def losses(run: Path) -> list[float]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["loss_nats"] for row in rows if "loss_nats" in row]


@pytest.mark.parametrize("what", ["denoiser", "step"])
def test_same_losses_and_weights(what, tmp_path):
    small = ["encoder.channels=[8]", "denoiser.channels=[4]", "objective.noise_levels=2", "objective.unconditional_weight=0.1"]
    eager, compiled = (
        train(load_config(TINY, [f"runs_dir={tmp_path}", f"name={name}", f"engine.compile={name}", *small])) for name in ("none", what)
    )
    np.testing.assert_allclose(losses(compiled), losses(eager), rtol=2e-5)
    theirs = load_file(compiled / "model/model.safetensors")
    for name, value in load_file(eager / "model/model.safetensors").items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-4, atol=2e-6)


def test_what_is_compiled():
    """`step` is compiled as one graph around the dual numbers; without gradients nothing is compiled."""
    configs = {name: load_config(TINY, [f"engine.compile={name}"]) for name in ("none", "denoiser", "step")}
    model = build_model(configs["none"], (1, 8, 8))
    parts = {name: compiled_parts(model, config) for name, config in configs.items()}
    assert parts["none"] == eager_parts(model, configs["none"])
    assert parts["denoiser"].denoiser is not model.denoiser
    assert parts["denoiser"].guided_terms is guided_terms
    assert parts["denoiser"].score_method == "auto"
    assert parts["step"].guided_terms is not guided_terms
    assert parts["step"].denoiser is model.denoiser  # it is inside the graph
    assert parts["step"].score_method == eager_parts(model, configs["step"]).score_method == "dual"


class Told(CustomGraphPass):
    """What the compiler has been told when it comes to a graph."""

    def __init__(self) -> None:
        self.found: list[tuple[bool, bool]] = []

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.found.append((inductor.triton.mix_order_reduction, inductor.triton.cudagraphs))

    def uuid(self) -> str:  # of its own every time, so that nothing comes out of the cache
        return str(uuid4())


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_sums_in_two_directions_are_left_out_where_torch_gets_them_wrong(cuda_graphs):
    assert inductor.triton.mix_order_reduction  # torch's own choice
    config = load_config(TINY, ["encoder.channels=[8]", "denoiser.channels=[4]", "engine.compile=denoiser"])
    model = build_model(config, (1, 8, 8))
    parts = compiled_parts(model, replace(config, engine=replace(config.engine, cuda_graphs=cuda_graphs)))
    draw = Draw(seed=0, step=0, index=torch.arange(8), global_batch=8)
    told = Told()
    with inductor.patch(post_grad_custom_pre_pass=told):
        model.training_loss(normal(8, 1, 8, 8, dtype=torch.float32), draw, 1.0, parts)[0].backward()
    right = int(torch.__version__.split(".")[1]) >= 15
    assert len(told.found) >= 2  # forward and backward
    assert set(told.found) == {(right, cuda_graphs)}


def test_compiled_code_is_kept_beside_the_other_caches(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = load_config(TINY, ["engine.compile=denoiser"])
    compiled_parts(build_model(config, (1, 8, 8)), config)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "sami-fast/compiled")


def test_what_is_decided_once_bears_torchs_own_mark():
    marked = [mark(lambda: None) for mark in (decided_once, torch.compiler.assume_constant_result)]
    assert vars(marked[0]) == vars(marked[1]) != {}
