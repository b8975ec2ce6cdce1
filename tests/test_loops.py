"""The training loops that ours is measured against: they compute what ours computes, in turns, and one that does not gets no row."""

from dataclasses import asdict

import pytest
import torch

from benchmarks import performance
from benchmarks.loops import JAX, JOINT, LAST, OURS, Case, Loop, check_same
from benchmarks.measure import Incorrect
from benchmarks.plain import PlainLoop
from benchmarks.steps import FACES, TINY, Step
from benchmarks.turns import GIVEN
from sami_fast.config import load_config
from sami_fast.methods.build import build_model
from sami_fast.step import Draw, Objective

EVERY_LAYER = "colour, attention"
CONFIGS = {
    "grey": ("disks", ["train.batch_size=4", "encoder.channels=[16,16]", "denoiser.channels=[8,16]"]),
    EVERY_LAYER: (None, [*FACES, *TINY, "data.image_size=8"]),
}


def loop_and_truth(name, make, monkeypatch):
    """A loop, a step of it whose noise is ours, and its loss and gradients in float64 by the reference; no weight is zero."""
    file, overrides = CONFIGS[name]
    config = load_config(file, [*overrides, *JOINT])
    ours = build_model(config, (config.data.channels or 1, *[config.data.image_size or 16] * 2))
    torch.nn.init.normal_(ours.denoiser.out.weight, std=0.02)
    monkeypatch.setattr("benchmarks.plain.build_model", lambda *_: ours)
    loop = make(config)
    x_0, place = loop.feed.micro_batch(GIVEN - 1, 0)
    step = Step(ours, x_0, Objective(**asdict(config.objective)), config.kl_weight.start)
    step.draw = Draw(config.seed, GIVEN - 1, place, config.train.batch_size)
    loss, *gradients = step.reference(torch.float64)()
    return loop, loss, dict(zip((name for name, _ in ours.named_parameters()), gradients, strict=True))


def require_close(loss, gradients, exact_loss, exact):
    assert loss == pytest.approx(exact_loss.item(), rel=1e-6)
    largest = max(g.norm() for g in exact.values())
    for name, g in exact.items():
        assert (gradients[name].double() - g).norm() <= 1e-4 * g.norm() + 1e-6 * largest, name


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["last", "first"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_loop_in_torch_has_the_reference_s_loss_and_gradients(name, layout, monkeypatch):
    loop, loss, exact = loop_and_truth(name, lambda config: PlainLoop(config, layout), monkeypatch)
    found = loop.gradients(GIVEN - 1).item()
    values = loop.feed.dataset.image_shape
    scale = values[0] * values[1] * values[2]  # the optimiser's gradients are per value
    require_close(found, {name: scale * p.grad for name, p in loop.sami.named_parameters()}, loss, exact)


def test_the_loop_in_jax_has_the_reference_s_loss_and_gradients(monkeypatch):
    jax = pytest.importorskip("jax", reason="needs JAX: pip install 'sami-fast[jax]'")
    from benchmarks.plain_jax import JaxLoop, loss_of, to_jax, to_torch

    loop, loss, exact = loop_and_truth(EVERY_LAYER, JaxLoop, monkeypatch)
    x_0, place = loop.feed.micro_batch(GIVEN - 1, 0)
    t, eps, eps_z = loop.our_noise(GIVEN - 1, x_0, place)
    images = [jax.numpy.asarray(value.permute(0, 2, 3, 1).contiguous().numpy()) for value in (x_0, eps)]
    weights = {name: to_jax(p) for name, p in loop.sami.named_parameters()}
    arguments = images[0], t.numpy(), images[1], eps_z.numpy(), loop.config.kl_weight.start
    found, gradients = jax.jit(jax.value_and_grad(lambda w: loss_of(loop.sami, w, *arguments)))(weights)
    require_close(float(found), {name: to_torch(g) for name, g in gradients.items()}, loss, exact)


def test_loops_take_turns_and_agree():
    """Ours, the real command, beside the one by hand; and losses or weights that differ are noticed."""
    case = Case("tiny")
    config = load_config("disks", case.arguments[2:])
    start = dict(build_model(config, (1, 16, 16)).named_parameters())
    loops = [Loop(OURS, case), Loop(LAST, case)]
    try:
        ours, plain = (loop.begin() for loop in loops)
        check_same(plain, ours, start)
        for loop in (ours, plain):
            wall, cpu = loop.turn(2)
            assert 0 < cpu < 1.5 * wall + 0.1
            assert 2**20 < loop.peak < 2**30
        plain.losses[-1] *= 1 + 1e-4
        with pytest.raises(Incorrect, match=f"loss of .* in step {GIVEN - 1}"):
            check_same(plain, ours, start)
        plain.losses, name = ours.losses, next(iter(start))
        plain.weights[name] = start[name].detach()
        with pytest.raises(Incorrect, match="apart from ours"):
            check_same(plain, ours, start)
    finally:
        for loop in loops:
            loop.close()


def test_a_loop_that_ends_says_why():
    loop = Loop(LAST, Case("tiny", batch=-1))
    with pytest.raises(RuntimeError, match=r"train\.batch_size"):
        loop.begin()
    loop.close()


def loop_row(implementation, ratio, **more):
    what = {"op": "loop disks16", "shape": {"B": 64, "H": 16}, "dtype": "float32", "mode": "loop", "device": "cpu", "images": 64}
    figures = {"ratio": ratio, "ratio_q20": ratio, "ratio_q80": ratio, "images_per_second": 100.0 * ratio, "peak_bytes": 64_000 * ratio}
    return {**what, "implementation": implementation, "baseline": LAST, **figures, **more}


def test_the_table_of_loops_says_where_we_lose():
    rows = [loop_row(LAST, 1.0), loop_row(JAX, 0.5, ours_target=3.0), loop_row(OURS, 0.9, target=1.5)]
    cells = [line.split(" | ") for line in performance.loops(rows).splitlines()]
    assert cells[2] == ["| disks16", "B64 H16", "90", "0.90 (0.90 to 0.90)", "1.5, missed", "1.80 (3, missed)", "1", "1 |"]
    assert "to JAX" in cells[0]
    assert "to torch.compile" not in cells[0]  # nobody measured it
