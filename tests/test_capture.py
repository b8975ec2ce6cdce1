"""The captured step: bit for bit the plain one in every phase and variant; what cannot be captured stays plain."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import TINY
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import peak_bytes
from sami_fast import Sami, ops
from sami_fast.config import load_config
from sami_fast.engine.bank import Bank
from sami_fast.engine.capture import COMPARED, MOST_LINES, Captured, NotCapturedError, StraightLine, refusal
from sami_fast.errors import UserError
from sami_fast.methods.build import build_model
from sami_fast.methods.latent_model import LatentModel
from sami_fast.step import Draw
from sami_fast.sweeps import Conv2d, Tape
from sami_fast.train import TrainingModule, train

BATCH = 16


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _without_waiting(monkeypatch):
    monkeypatch.setattr(Captured, "wait", 0)


def module_of(*settings: str, model: LatentModel | None = None) -> TrainingModule:
    config = load_config(TINY, ["schedule.logsnr_min=-8", "encoder.channels=[4]", "denoiser.channels=[4]", *settings])
    torch.manual_seed(0)
    model = model or build_model(config, (1, 8, 8))
    for p in model.parameters():  # no layer stays at zero, where it would hide what is before it
        nn.init.normal_(p, std=0.3) if not p.any() else None
    return TrainingModule(model, config)


def images(count: int = BATCH) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(count)) * 2 - 1


def draw(step: int, count: int = BATCH) -> Draw:
    return Draw(3, step, torch.arange(count), 2 * count, step + 100)


def equal(a, b) -> bool:
    same = [x is y if x is None or y is None else torch.equal(x, y) for x, y in zip((a[0], a[1], *a[2]), (b[0], b[1], *b[2]), strict=True)]
    return all(same)


def plain(module: TrainingModule, *step) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    loss, measured = module.plain(*step)
    return loss.detach(), measured, list(torch.autograd.grad(loss, module.captured.parameters, allow_unused=True))


def trusted(captured: Captured) -> int:
    """How many lines are replayed without comparing."""
    return sum(line is not None and line.taken >= COMPARED for line in captured._lines.values())


LEVELS = ["objective.noise_levels=2", "objective.free_bits=0.02", "objective.unconditional_weight=0.3"]
VARIANTS = {
    "sweeps": ("both", ["encoder.channels=[8,8]", "denoiser.channels=[4,8]", *LEVELS]),
    "reverse": ("both", ["engine.score=reverse"]),
    "dual": ("both", ["engine.score=dual", *LEVELS]),
    "attention": ("both", ["encoder.attention=[4]", "denoiser.attention=[8]"]),
    "noise drawn twice": ("both", ["engine.store_eps=false", "objective.noise_levels=2"]),
    "bf16": ("both", ["engine.precision=bf16"]),
    "bias-free": ("both", ["encoder.style=bias_free_relu", "denoiser.style=bias_free_relu"]),
    "encoder alone": ("encoder", LEVELS),
    "beside a bank": ("encoder", LEVELS),
    "beside a frozen denoiser": ("encoder", []),
    "denoiser alone": ("denoiser", ["objective.noise_levels=2"]),
    "beta_vae": ("both", ["method=beta_vae"]),
    "diffae": ("both", ["method=diffae"]),
    "stochastic diffae": ("both", ["method=diffae", "diffae.stochastic=true"]),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_bits_of_the_plain_step(name, capsys):
    """After the comparisons, too: with weights that were updated, another step and another beta."""
    phase, settings = VARIANTS[name]
    module = module_of(*settings)
    if "frozen" in name:
        module.model.denoiser.requires_grad_(False)
        module.captured = Captured(module)
    bank = Bank(module.model.denoiser) if "bank" in name else None
    x_0, found = images(), []
    for step in range(COMPARED + 2):
        arguments = (x_0, draw(step), 0.1 * step, phase, bank)
        if bank is not None:
            bank.turn_to(step, 0)
            with torch.no_grad():  # from the first time on it knows them
                module.plain(*arguments)
        expected = plain(module, *arguments)
        found.append(module.captured(*arguments))
        assert equal(found[-1], expected)
        with torch.no_grad():
            for p in module.captured.parameters:
                p.mul_(0.99)
    assert trusted(module.captured) == 1
    assert capsys.readouterr().out == ""
    assert not torch.equal(found[-1][0], found[-2][0])


@pytest.fixture(scope="module")
def module() -> TrainingModule:
    """One whose step with both networks is replayed."""
    module = module_of(*LEVELS)
    module.captured.wait = 0
    for step in range(COMPARED):
        module.captured(images(), draw(step), 1.0, "both")
    assert trusted(module.captured) == 1
    return module


def test_step_and_beta_are_inputs(module):
    """Also in turn: what a line gave for one step it gives again, and a beta changes what the KL is worth and no more."""
    captured, x_0 = module.captured, images()
    first, second, again = (captured(x_0, draw(step), 1.0, "both") for step in (7, 8, 7))
    assert equal(first, again)
    assert not torch.equal(first[0], second[0])
    other_noise = captured(x_0, replace(draw(7), latent_step=9), 1.0, "both")
    assert not torch.equal(first[0], other_noise[0])
    zero, two = (captured(x_0, draw(7), beta, "both") for beta in (0.0, 2.0))
    assert torch.equal(zero[1][1:], two[1][1:])
    torch.testing.assert_close((zero[0] + two[0]) / 2, first[0])


def test_a_short_run_stays_plain():
    module = module_of()
    module.captured.wait = 2
    for step, lines in enumerate((0, 0, 0, 1)):
        assert equal(module.captured(images(), draw(step), 0.5, "denoiser"), plain(module, images(), draw(step), 0.5, "denoiser"))
        assert trusted(module.captured) == lines


def test_other_batches_have_lines_of_their_own_up_to_a_number():
    module = module_of()
    for count in (4, 3, 4, 3, 4, 3):
        arguments = (images(count), draw(5, count), 0.5, "denoiser")
        assert equal(module.captured(*arguments), plain(module, *arguments))
    assert trusted(module.captured) == 2
    for count in range(5, 5 + MOST_LINES):
        module.captured._lines.setdefault((count,), None)
    arguments = (images(2), draw(5, 2), 0.5, "denoiser")
    before = dict(module.captured._lines)
    assert equal(module.captured(*arguments), plain(module, *arguments))
    assert module.captured._lines == before


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_backward_hands_the_gradients_out(module, factor):
    arguments = (images(), draw(1), 0.5, "both")
    module.zero_grad(set_to_none=True)
    expected, expected_measured = module.plain(*arguments)
    (factor * expected).backward()
    gradients = [p.grad for p in module.parameters()]
    module.zero_grad(set_to_none=True)
    loss, measured = module(*arguments)
    (factor * loss).backward()
    assert torch.equal(loss, expected)
    assert torch.equal(measured, expected_measured)
    assert all(torch.equal(p.grad, g) for p, g in zip(module.parameters(), gradients, strict=True))
    with pytest.raises(RuntimeError, match="gives its gradients once"):
        loss.backward()
    with torch.no_grad():  # validation is never captured
        assert not module(*arguments)[0].requires_grad


def _foreign(what: str) -> Sami:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Linear(64, 6)
            self.calls, self.numbers = 0, random.Random(0)
            self.register_buffer("average", torch.zeros(()))
            if what == "hook":
                self.conv.register_forward_hook(lambda *_: None)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.norm(self.conv(x)) if what == "batch norm" else self.conv(x)
            if what == "branch" and h.sum() > 0:
                h = 2 * h
            if what == "count":
                self.calls += 1
            if what == "average":
                self.average = 0.9 * self.average + 0.1 * h.detach().mean()
            if what == "random":
                h = h * (1 + self.numbers.random())
            h = nn.functional.dropout(torch.tanh(h), 0.5) if what == "dropout" else torch.tanh(h)
            mu, raw = self.head(h.flatten(1)).chunk(2, 1)
            return mu, nn.functional.softplus(raw) + 0.1

    class Attending(nn.Module):
        def __init__(self, denoiser: nn.Module, dropout: float) -> None:
            super().__init__()
            self.denoiser, self.dropout = denoiser, dropout

        def forward(self, x_t: Tensor, logsnr: Tensor) -> Tensor:
            return self.denoiser(x_t, logsnr) + 0.1 * nn.functional.scaled_dot_product_attention(x_t, x_t, x_t, dropout_p=self.dropout)

    config = load_config(TINY, ["schedule.logsnr_min=-8"])
    ours = build_model(config, (1, 8, 8))
    assert isinstance(ours, Sami)
    denoiser = Attending(ours.denoiser, 0.5 * (what == "attention's dropout")) if what.startswith("attention") else ours.denoiser
    return Sami(Encoder(), denoiser, ours.schedule, image_shape=(1, 8, 8), latent_size=3)


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("smooth", ""),
        ("attention", ""),
        ("attention's dropout", "draws random numbers that are not the run's own"),
        ("dropout", "draws random numbers that are not the run's own"),
        ("batch norm", "changes what lasts beyond the step"),
        ("branch", "this step stays plain"),
        ("count", "Encoder.calls changes from call to call"),
        ("average", "Encoder.average changes from call to call"),
        ("random", "other"),  # a number that changes and that the trace cannot see
        ("hook", "Conv2d has hooks"),
    ],
)
def test_what_cannot_be_captured_stays_plain_with_one_line(what, line, capsys):
    module = module_of("engine.score=reverse", model=_foreign(what))
    for step in range(COMPARED + 2):
        torch.manual_seed(step)
        found = module.captured(images(), draw(step), 0.5, "both")
        if what in ("dropout", "attention's dropout", "branch"):
            torch.manual_seed(step)
            assert equal(found, plain(module, images(), draw(step), 0.5, "both"))
    said = capsys.readouterr().out.splitlines()
    assert len(said) == (line != "")
    assert all(s.startswith("engine.capture: this step stays plain (") and line in s for s in said)
    assert trusted(module.captured) == (line == "")


def test_settings_that_leave_steps_plain():
    config = partial(load_config, TINY)
    assert refusal(config([]), "cpu") is None
    for settings in (["engine.capture=off"], ["engine.compile=denoiser"], ["engine.zero_stage=3"]):
        assert refusal(config(settings), "cpu") == ""
    assert "checkpoint_activations" in refusal(config(["engine.checkpoint_activations=true"]), "cpu")
    assert refusal(config([]), "cuda") == ""
    assert "free_bits" in refusal(config(["objective.free_bits=0.1"]), "cpu", world_size=2)
    assert refusal(config(["objective.free_bits=0.1"]), "cpu") is None
    assert refusal(config(["engine.cuda_graphs=true"]), "cuda") is None
    with pytest.raises(UserError, match=r"^engine.cuda_graphs: needs engine.capture auto, or engine.compile"):
        config(["engine.cuda_graphs=true", "engine.capture=off"])
    with pytest.raises(UserError, match=r"^engine.cuda_graphs: expected false with engine.zero_stage 3"):
        config(["engine.cuda_graphs=true", "engine.zero_stage=3"])


class _NoHostReads(TorchDispatchMode):
    """What a CUDA graph could not record raises."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


def test_what_a_cuda_graph_would_record(monkeypatch):
    """The part after the draws takes tensors alone, reads none of them on the host, and gives the results of the line."""
    monkeypatch.setattr(StraightLine, "forget_graph", lambda line: None)  # a CUDA graph takes its parts before that
    module = module_of()
    module.captured(images(), draw(0), 0.5, "both")
    (line,) = (entry.run for entry in module.captured._lines.values())
    tensors, numbers = (images(), draw(4).index, torch.tensor(0.5)), (4, 104)
    drawn, rest = line.parts()
    read = drawn(*tensors, *numbers)
    assert all(isinstance(x, Tensor) for x in read)
    with _NoHostReads():
        found = rest(*read)
    loss, measured, *gradients = found
    assert equal((loss, measured, gradients), plain(module, tensors[0], draw(4), 0.5, "both"))
    module = module_of("engine.store_eps=false")
    module.captured(images(), draw(0), 0.5, "both")
    (line,) = (entry.run for entry in module.captured._lines.values())
    with pytest.raises(NotCapturedError, match=r"engine\.store_eps=true"):
        line.parts()


def test_memory_is_freed_as_early_as_autograd_frees_it(module):
    arguments = (images(), draw(1), 0.5, "both")
    assert peak_bytes(lambda: module.captured(*arguments)) <= 1.03 * peak_bytes(lambda: plain(module, *arguments))


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_launchers_are_written_down(backend):
    """Those of the compiled core, and Triton's, which are Python, as operators."""
    if (reason := ops.backend.refusal(backend, "cpu", torch.float32)) is not None:
        pytest.skip(reason)
    x, weight = torch.randn(1, 2, 2, 2), torch.randn(2)

    def function(x: Tensor) -> list[Tensor]:
        on = ops.GroupNormSiLULaunchers.in_force(x)
        y, mean, rstd = on.fwd(x, weight, weight, 1, 1e-5, True)
        saved = (x, weight, weight, mean, rstd, 1, True)
        _, x_bar, weight_bar, _ = on.bwd_bwd(y, None, None, y, *saved, y_bar=y, need_tangent=False)
        return [y, x_bar, weight_bar, ops.random_normal(0, 5, 0, torch.arange(1), 2)]

    with ops.use_backend(backend):
        line = StraightLine(function, [x], [5])
        other = torch.randn_like(x)
        for a, b in zip(line([other], [5]), function(other), strict=True):
            assert torch.equal(a, b)
        assert not torch.equal(line([other], [6])[3], function(other)[3])


def test_sums_go_into_memory_that_nobody_reads_again():
    def function(x):
        drawn = ops.random_normal(1, 5, 2, torch.arange(3), 4)
        a, b, c = 2 * x, 3 * x, drawn + 1
        kept = a[:, :2]  # a view that outlives the sum
        into_b = a + b
        whole = c + x.sum(0)  # into c, though x.sum(0) is smaller
        changed = 4 * x
        shown = changed[:, :2]
        changed.add_(x)  # what lies in one memory lives on as long as any view of it
        once_more = changed + x
        return [into_b, kept + 1, whole, x + drawn, drawn.sum(), once_more, 2 * shown]

    x = torch.randn(3, 4)
    before, line = x.clone(), StraightLine(function, [x], [5])
    assert all(torch.equal(a, b) for a, b in zip(line([x], [5]), function(x), strict=True))
    assert torch.equal(x, before)
    in_place = [node.args[0] for node in line._nodes if node.target is torch.ops.aten.add_.Tensor]
    assert len(in_place) >= 2
    assert not any(node.op == "placeholder" for node in in_place)


def test_sweeps_keep_images_as_convolutions_read_them(monkeypatch):
    """A gradient in a weight takes three to seven times as long where the image lies channel by channel."""
    layer, tape, read = Conv2d(3, 4, 3, 2, 1), Tape(), []
    backward = layer._backward
    monkeypatch.setattr(layer, "_backward", lambda grad_y, x, weight, mask: (read.append(x), backward(grad_y, x, weight, mask))[1])
    y = layer.sweep_forward(torch.randn(2, 3, 8, 8), tape)
    layer.sweep_adjoint(torch.randn_like(y), tape)
    layer.sweep_tangent(torch.randn(2, 3, 8, 8), tape)
    layer.sweep_joint(torch.randn_like(y), tape)
    assert len(read) == 3
    if ops.backend.refusal("cpp", "cpu", torch.float32) is None:
        assert all(x.is_contiguous(memory_format=torch.channels_last) for x in read)


def _result(folder: Path) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("images_per_second", "data_wait", "seconds")
    return load_file(folder / "model/model.safetensors"), [{k: v for k, v in row.items() if k not in timed} for row in rows]


def test_runs_are_the_same_with_and_without_and_resumed_across(tmp_path, capsys):
    """All phases, accumulation, EMA, ZeRO 2; and a run that began plain goes on captured, bit for bit."""
    settings = [
        f"runs_dir={tmp_path}",
        "encoder.channels=[4]",
        "engine.gradient_accumulation=2",
        "engine.zero_stage=2",
        "checkpoint.keep_last=3",
        *LEVELS,
    ]
    run: Callable[..., Path] = lambda name, *more, **options: train(load_config(TINY, [*settings, f"name={name}", *more]), **options)  # noqa: E731
    captured, off = run("captured"), run("off", "engine.capture=off")
    weights, rows = _result(captured)
    for folder in (off, _cut_short(off, 8)):
        if folder is not off:
            run(folder.name, resume=True)
        found, found_rows = _result(folder)
        assert found_rows == rows
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert "engine.capture" not in capsys.readouterr().out


def _cut_short(run: Path, step: int) -> Path:
    """A copy of a run as it was at a checkpoint."""
    folder = shutil.copytree(run, run.with_name("resumed"))
    shutil.rmtree(folder / "model")
    for checkpoint in (folder / "checkpoints").iterdir():
        if checkpoint.name.startswith("step_") and int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)
    return folder
