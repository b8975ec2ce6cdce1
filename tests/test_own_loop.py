"""The loss in one line: what `step.training_step` gives, in loops that are not this package's."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_same_gradients, gradients, tiny_denoiser, tiny_encoder
from own_loop_worker import OPTIONS, images, make, train
from safetensors.torch import load_file, save_file

from sami_fast import ops
from sami_fast.methods import METHODS, LatentModel, load_model
from sami_fast.methods.own_loop import LOSS_STEP
from sami_fast.methods.sami import Sami
from sami_fast.schedule import Cosine
from sami_fast.step import Draw, Objective, denoising_step, training_step

HERE = Path(__file__).resolve().parent
ARCHITECTURE = {
    "encoder": {"image_channels": 1, "image_size": 8, "channels": [4, 6], "latent_size": 3, "groups": 2},
    "denoiser": {"image_channels": 1, "image_size": 8, "channels": [4, 6], "groups": 2, "embedding_size": 8},
}
SCHEDULE = {"kind": "cosine", "logsnr_min": -6.0, "logsnr_max": 4.0}


def of_method(method: str) -> LatentModel:
    """A tiny model of each method, float32."""
    torch.manual_seed(0)
    partner = dict(ARCHITECTURE["denoiser"])
    if method != "sami":
        partner["latent_size"] = 3
    if method == "beta_vae":
        del partner["embedding_size"]
    cls = METHODS[method]
    return cls.build({"encoder": ARCHITECTURE["encoder"], cls.partner: partner}, SCHEDULE)


# Values and gradients


@pytest.mark.parametrize("score_method", ["auto", "reverse", "dual", "sweeps"])
@pytest.mark.parametrize("objective", [Objective(), Objective("simple", 2, 1.5, 0.3, 0.05)], ids=["default", "all"])
def test_it_is_the_training_step(objective, score_method):
    model, x = make(), images(0)
    draw = Draw(7, 11, torch.arange(6), 6)
    expected, parts = training_step(model.encoder, model.denoiser, model.schedule, x, draw, objective, 0.3, score_method=score_method)
    options = vars(objective) | {"seed": 7, "step": 11, "kl_weight": 0.3, "score_method": score_method}
    loss, terms = model.training_step(x, **options)
    assert torch.equal(loss, expected)
    assert torch.equal(model.loss(x, **options), expected)
    assert torch.equal(model(x, **options), expected)
    found, wanted = (gradients(each, *model.networks.values()) for each in (loss, expected))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert max(g.abs().max() for name, g in found.items() if name.startswith("0.")) > 0
    named = {"diffusion_nats": parts.diffusion, "unguided_nats": parts.unguided, "kl_nats": parts.kl.sum(1), "kl_per_dim": parts.kl}
    assert all(torch.equal(terms[name], value) for name, value in (named | {"mu": parts.mu, "var": parts.var}).items())
    assert terms.keys() == {*named, "mu", "var"}
    assert not any(value.requires_grad for value in terms.values())


def test_it_is_the_method_for_networks_that_are_no_modules():
    encoder, denoiser = tiny_encoder(), tiny_denoiser()
    plain = Sami(lambda x: encoder(x), lambda x_t, t: denoiser(x_t, t), Cosine(-6.0, 4.0))
    loss = plain.loss(images(0), step=2, kl_weight=0.5)
    expected = Sami(encoder, denoiser, Cosine(-6.0, 4.0)).loss(images(0), step=2, kl_weight=0.5)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert_same_gradients(gradients(loss, encoder, denoiser), gradients(expected, encoder, denoiser), 1e-9)


def test_phases_say_who_learns():
    model, x = make(), images(0)
    draw = Draw(0, 4, torch.arange(6), 6)
    alone, terms = model.training_step(x, step=4, phase="denoiser")
    expected, unguided = denoising_step(model.denoiser, model.schedule, x, draw, Objective())
    assert alone.item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.equal(terms["unguided_nats"], unguided)
    assert terms["kl_per_dim"].shape == (1, 3)
    assert terms["kl_nats"].item() == 0
    assert not any(g.any() for name, g in gradients(alone, *model.networks.values()).items() if name.startswith("0."))
    beside = gradients(model.loss(x, step=4, phase="encoder"), *model.networks.values())
    both = gradients(model.loss(x, step=4), *model.networks.values())
    assert not any(g.any() for name, g in beside.items() if name.startswith("1."))
    assert all(torch.equal(g, both[name]) for name, g in beside.items() if name.startswith("0."))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_has_it(method):
    model, x = of_method(method), images(0).float()
    loss, terms = model.training_step(x, step=3, kl_weight=0.5, noise_levels=2)
    draw = Draw(0, 3, torch.arange(6), 6)
    expected, measured, codes = model.training_loss(x, draw, 0.5, model.parts(objective=Objective(noise_levels=2)))
    assert torch.equal(loss, expected)
    for term, value in zip(model.terms, measured, strict=True):
        assert torch.equal(terms[term.name], value)
    assert torch.equal(torch.stack((terms["kl_per_dim"], terms["mu"], terms["var"])), codes)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


# In which dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("method", "phase"), [*((each, "both") for each in sorted(METHODS)), ("sami", "encoder"), ("sami", "denoiser")])
def test_weights_of_every_dtype_learn_from_the_same_noise(method, dtype, phase):
    """Only the networks round; noise, latents and sums are float32, or float64 where the weights are."""
    x, options = images(0).float(), {"step": 3, "kl_weight": 0.1, "noise_levels": 2, "phase": phase}
    expected, single = of_method(method).training_step(x, **options)
    model = of_method(method).to(dtype)
    loss, terms = model.training_step(x, **options)
    rounding = {torch.float16: 3e-3, torch.bfloat16: 3e-2, torch.float64: 1e-5}[dtype]
    assert loss.item() == pytest.approx(expected.item(), rel=rounding)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(value.dtype == loss.dtype for value in terms.values())
    assert torch.allclose(terms["mu"].float(), single["mu"], atol=rounding)
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_images_of_every_dtype_are_taken(dtype):
    model, x = of_method("sami"), images(0).to(dtype)
    found = model.loss(x, step=1)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.item() == pytest.approx(model.loss(x.float(), step=1).item(), rel=1e-5)


# Which step


def test_steps_count_themselves():
    model, other, x = make(), make(), images(0)
    losses = [model.loss(x).item() for _ in range(3)]
    assert losses == [other.loss(x, step=step).item() for step in range(3)]
    assert len(set(losses)) == 3
    assert (model.loss_step, other.loss_step) == (3, 0)


def test_without_gradients_an_evaluated_model_sees_the_same_noise_each_time():
    model, x = make().eval(), images(0)
    with torch.no_grad():
        first, again = model.loss(x), model.loss(x)
    assert torch.equal(first, again)
    assert torch.equal(first, model.loss(x, step=ops.EVALUATION_STEP))
    assert model.loss_step == 0
    with torch.inference_mode():
        inference = x + 0.0
        assert inference.is_inference()
        loss, terms = model.training_step(inference)
        assert torch.equal(loss, first)
    assert not terms["mu"].requires_grad
    model.loss(x)  # in eval mode, but to learn from
    assert model.loss_step == 1
    with torch.no_grad():
        model.train().loss(x)
    assert model.loss_step == 2


def test_the_count_is_a_part_of_the_state(tmp_path):
    fresh, used = of_method("sami"), of_method("sami")
    before = copy.deepcopy(used.state_dict())
    used.loss(images(0).float())
    used.loss(images(0).float())
    assert list(used.state_dict()) == list(before)  # averages of weights go through two of them side by side
    assert (before[LOSS_STEP], used.state_dict()[LOSS_STEP]) == (0, 2)
    assert copy.deepcopy(used).loss_step == 2
    fresh.load_state_dict(used.state_dict())
    assert fresh.loss_step == 2
    fresh.load_state_dict({name: value for name, value in before.items() if name != LOSS_STEP})  # of weights alone
    assert fresh.loss_step == 0
    wrapped = torch.nn.Sequential(of_method("sami"))
    wrapped.load_state_dict(torch.nn.Sequential(used).state_dict())
    assert wrapped[0].loss_step == 2
    used.save_pretrained(tmp_path)  # for use, which takes no steps
    assert load_file(tmp_path / "model.safetensors").keys() == before.keys() - {LOSS_STEP}
    save_file(used.state_dict(), tmp_path / "model.safetensors")  # by hand, as a loop of one's own may
    assert load_model(tmp_path).loss_step == 0
    with pytest.raises(RuntimeError, match="Unexpected key"):
        fresh.load_state_dict(used.state_dict() | {"lost_step": torch.tensor(2)})


def test_a_loop_that_is_stopped_goes_on_as_if_it_had_not_been(tmp_path):
    def steps(model, optimizer, first, last):
        for step in range(first, last):
            optimizer.zero_grad()
            model.loss(images(step), kl_weight=0.1).backward()
            optimizer.step()

    whole, stopped, resumed = make(), make(), make()
    optimizers = [torch.optim.Adam(model.parameters(), lr=1e-3) for model in (whole, stopped, resumed)]
    steps(whole, optimizers[0], 0, 4)
    steps(stopped, optimizers[1], 0, 2)
    torch.save({"model": stopped.state_dict(), "optimizer": optimizers[1].state_dict()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(state["model"])
    optimizers[2].load_state_dict(state["optimizer"])
    steps(resumed, optimizers[2], 2, 4)
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), resumed.parameters(), strict=True))


# Which image


def test_two_halves_with_their_places_are_the_whole():
    model, x = make(), images(0)
    options = {"step": 3, "kl_weight": 0.2, "noise_levels": 2, "global_batch": 6}
    whole = model.loss(x, **options)
    halves = [model.loss(x[part], index=torch.arange(6)[part], **options) for part in (slice(0, 3), slice(3, 6))]
    assert sum(halves).item() / 2 == pytest.approx(whole.item(), rel=1e-12)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_of_distributed_data_parallel_are_one_process_with_the_whole_batch(tmp_path, ranks):
    command = [sys.executable, str(HERE / "own_loop_worker.py")]
    started = [subprocess.Popen([*command, str(rank), str(ranks), str(tmp_path)], cwd=HERE) for rank in range(ranks)]
    try:
        assert [process.wait(240) for process in started] == [0] * ranks
    finally:
        for process in started:
            process.kill()
    before, alone = dict(make().named_parameters()), train(make(), slice(0, 6))
    for rank in range(ranks):
        found = torch.load(tmp_path / f"weights_{rank}.pt", weights_only=True)
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            moved = (value - before[name]).abs().max()
            assert (found[name] - value).abs().max() <= 1e-9 * moved + 1e-15, name
    kl = make().training_step(images(0))[1]["kl_per_dim"]  # free bits are granted to the mean over ranks, which is not a rank's own
    assert ((kl[: 6 // ranks].mean(0) > OPTIONS["free_bits"]) != (kl.mean(0) > OPTIONS["free_bits"])).any()


# Mistakes


@pytest.mark.parametrize(
    ("x", "kind", "words"),
    [
        ([torch.zeros(1)], TypeError, "x: expected a tensor of images, found list; of a batch with labels, pass the images"),
        (torch.zeros(1, 8, 8), ValueError, r"x: expected images \[B, C, H, W\], found shape \[1, 8, 8\]"),
        (torch.zeros(0, 1, 8, 8), ValueError, r"x: expected images \[B, C, H, W\], found shape \[0, 1, 8, 8\]"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), TypeError, r"x: expected floats in \[-1, 1\], found torch.uint8; bytes become"),
        (torch.zeros(2, 1, 9, 9), ValueError, r"x: expected images of shape \[1, 8, 8\] \(C, H, W\), found \[1, 9, 9\]"),
        (torch.zeros(2, 3, 8, 8), ValueError, r"x: expected images of shape \[1, 8, 8\] \(C, H, W\), found \[3, 8, 8\]"),
        (torch.full((2, 1, 8, 8), 255.0), ValueError, r"x: expected values in \[-1, 1\], found 255; of pixels in 0 to 255 give x /"),
        (torch.full((2, 1, 8, 8), float("nan")), ValueError, r"x: expected values in \[-1, 1\], found nan"),
    ],
)
def test_images_that_are_none(x, kind, words):
    model = make()
    with pytest.raises(kind, match=words):
        model.loss(x)
    assert model.loss_step == 0  # no step has been taken


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"phase": "decoder"}, "phase: expected one of both, encoder, denoiser, found 'decoder'"),
        ({"weighting": "vdm"}, "weighting: expected one of elbo, .* found 'vdm'"),
        ({"step": -1}, "step: expected 0 to"),
        ({"seed": -1}, "seed: expected 0 to"),
        ({"score_method": "forward"}, "score: expected one of auto"),
        ({"index": torch.zeros(2, 2, dtype=torch.int64)}, r"index: expected \[S\]"),
    ],
)
def test_settings_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        make().loss(images(0), **options)
