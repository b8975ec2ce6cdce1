"""Networks of other conventions: every one of them, what is said of wrong ones, and the loss and gradients that they give."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_gradients, gradients
from their_networks import AttentiveEncoder, Denoiser, Encoder, Output, TimedEncoder
from torch.nn.attention import SDPBackend, sdpa_kernel

from sami_fast import ops
from sami_fast.adapters import PREDICTS, TIMES, DenoiserAdapter, EncoderAdapter, alphas_cumprod
from sami_fast.config import load_config
from sami_fast.errors import UserError
from sami_fast.first_batch import check_first_batch
from sami_fast.methods.build import build_model
from sami_fast.methods.sami import Sami
from sami_fast.metrics.guidance import guidance_profile
from sami_fast.metrics.scale_profile import scale_profile
from sami_fast.pretrained import DiscreteTimeDenoiser, timestep_levels
from sami_fast.reference.step import step as reference_step
from sami_fast.schedule import alpha_sigma, build_schedule
from sami_fast.step import Draw, Objective, noised, training_step

THEIRS = Path(__file__).resolve().with_name("their_networks.py")
SHAPE = (2, 8, 8)
SCHEDULE = build_schedule({"kind": "cosine", "logsnr_min": -6.0, "logsnr_max": 5.0})


def images(count: int = 3) -> torch.Tensor:
    return torch.rand(count, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def build(*overrides: str) -> Sami:
    """The model of a config that names classes of their_networks.py."""
    return build_model(load_config(None, ["data.channels=2", *overrides]), SHAPE)


def named(encoder: str, *overrides: str) -> list[str]:
    return [f"encoder.class={THEIRS}:{encoder}", *overrides]


def denoiser(name: str, *overrides: str) -> list[str]:
    return [f"denoiser.class={THEIRS}:{name}", *overrides]


# ---- encoders


@pytest.mark.parametrize("kind", ["mu_var", "mu_logvar", "mu_std", "one", "normal", "independent"])
def test_an_encoder_of_each_convention(kind):
    network, x = Encoder(SHAPE, kind=kind).double(), images()
    raw_mu, raw = network.heads(network.features(x)).chunk(2, 1)
    std = torch.exp(raw / 2) if kind in ("mu_logvar", "one") else F.softplus(raw) + 0.1
    returns = {"one": "mu_logvar", "normal": "mu_logvar", "independent": "mu_var"}.get(kind, kind)  # a distribution knows better
    mu, var = EncoderAdapter(network, returns)(x)
    torch.testing.assert_close(mu, raw_mu + network.offset)
    torch.testing.assert_close(var, std**2)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("three", "expected mu and its spread, one tensor of both, or a torch Normal, found 3 things"),
        ("laplace", "expected mu and its spread, one tensor of both, or a torch Normal, found a Independent"),
        ("unlike", r"expected mu and its spread as \[2, Z\] each, found \[2, 8\] and \[2, 1\]"),
        ("images", r"one tensor \[B, 2 Z\] of both, found one of \[2, 2, 8, 8\]"),
    ],
)
def test_outputs_of_no_convention(kind, words):
    with pytest.raises(UserError, match=rf"^encoder.class: .*their_networks.py:Encoder: .*{words}"):
        build(*named("Encoder", f"encoder.kwargs.kind={kind}"))


def test_unknown_conventions():
    with pytest.raises(ValueError, match="returns: expected one of mu_var, mu_logvar, mu_std, found 'logvar'"):
        EncoderAdapter(Encoder(SHAPE), "logvar")
    with pytest.raises(ValueError, match="takes: expected one of x, x_t, found 't'"):
        EncoderAdapter(Encoder(SHAPE), takes="t")
    with pytest.raises(ValueError, match="time: expected one of unit, timestep, sigma, logsnr, edm, found 'ms'"):
        DenoiserAdapter(Denoiser(SHAPE), SCHEDULE, time="ms")
    with pytest.raises(ValueError, match="predicts: expected one of eps, v, x_0, found 'x'"):
        DenoiserAdapter(Denoiser(SHAPE), SCHEDULE, predicts="x")


def test_half_precision_ends_at_the_heads():
    encoder = EncoderAdapter(Encoder(SHAPE), "mu_logvar")
    with torch.autocast("cpu", torch.bfloat16):
        mu, var = encoder(images().float())
    assert mu.dtype == var.dtype == torch.float32


def test_an_encoder_that_is_told_the_level_is_told_it_everywhere(monkeypatch):
    """Clean images are at t = 0; in the step, in guidance with and without a clip, and where noisy images are encoded, at their own."""
    encoder = EncoderAdapter(TimedEncoder(SHAPE), "mu_logvar", "x_t")
    model = Sami(encoder, DenoiserAdapter(Denoiser(SHAPE), SCHEDULE), SCHEDULE, image_shape=SHAPE, latent_size=4)
    told = []
    inner = encoder.network.forward
    monkeypatch.setattr(encoder.network, "forward", lambda x, t: told.append(t.tolist()) or inner(x, t))
    x, t = images().float(), torch.tensor([0.25, 0.5, 1.0])
    z = model.encode(x).mu
    assert told.pop() == [0, 0, 0]
    model.encode(x, t)
    assert told.pop() == t.tolist()
    model.predict_eps(x, t, z, clip=2.0)
    assert [told.pop(), told.pop()] == [t.tolist()] * 2
    draw = Draw(0, 0, torch.arange(3), 3)
    training_step(model.encoder, model.denoiser, SCHEDULE, x, draw, Objective(noise_levels=2), 1.0)
    _, _, levels, _, _ = noised(SCHEDULE, x, draw, Objective(noise_levels=2), True)
    assert told == [[0, 0, 0], levels.tolist()]


def test_profiles_over_noise_levels_tell_the_encoder_theirs(monkeypatch):
    encoder = EncoderAdapter(TimedEncoder(SHAPE), "mu_logvar", "x_t")
    model = Sami(encoder, DenoiserAdapter(Denoiser(SHAPE), SCHEDULE), SCHEDULE, image_shape=SHAPE, latent_size=4)
    told = set()
    inner = encoder.network.forward
    monkeypatch.setattr(encoder.network, "forward", lambda x, t: told.update(t.tolist()) or inner(x, t))
    x, logsnr = images().float(), [-4.0, 2.0]
    expected = {0.0, *SCHEDULE.t(torch.tensor(logsnr, dtype=torch.float64)).float().tolist()}
    for profile in (scale_profile, guidance_profile):
        profile(model, lambda index: x[index], 3, logsnr=logsnr, seed=0)
        assert told == expected
        told.clear()


# ---- denoisers


@pytest.mark.parametrize("predicts", PREDICTS)
@pytest.mark.parametrize("time", TIMES)
def test_a_denoiser_of_each_convention(time, predicts):
    """A network that knows image and noise, and finds alpha and sigma from what it is told alone, comes out as the noise."""
    x_0, t = images(), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    alphas = alphas_cumprod("linear", 1000)
    if time == "timestep":  # levels that are timesteps
        t = SCHEDULE.t(timestep_levels(alphas)[torch.tensor([200, 400, 700])])
    eps = torch.randn(x_0.shape, dtype=x_0.dtype, generator=torch.Generator().manual_seed(1))
    alpha_t, sigma_t = (a.view(-1, 1, 1, 1) for a in alpha_sigma(SCHEDULE.logsnr(t)))
    x_t = alpha_t * x_0 + sigma_t * eps

    def network(image, told):
        level = {
            "unit": lambda: torch.sigmoid(SCHEDULE.logsnr(told)),
            "timestep": lambda: alphas[told],
            "sigma": lambda: 1 - told**2,
            "logsnr": lambda: torch.sigmoid(told),
            "edm": lambda: 1 / (1 + told**2),
        }[time]()
        a, s = level.sqrt().view(-1, 1, 1, 1), (1 - level).sqrt().view(-1, 1, 1, 1)
        expected = x_0 + told.view(-1, 1, 1, 1) * eps if time == "edm" else a * x_0 + s * eps
        torch.testing.assert_close(image, expected, rtol=1e-5, atol=1e-5)
        return {"eps": eps, "v": a * eps - s * x_0, "x_0": x_0}[predicts]

    if time == "timestep":
        words = {"eps": "epsilon", "v": "v_prediction", "x_0": "sample"}
        found = DiscreteTimeDenoiser(network, alphas, SCHEDULE, prediction=words[predicts], fractional=False)(x_t, t)
    else:
        found = DenoiserAdapter(network, SCHEDULE, time=time, predicts=predicts)(x_t, t)
    torch.testing.assert_close(found, eps, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gives", ["tensor", "sample", "pred", "tuple", "variance"])
def test_what_a_denoiser_may_return(gives):
    network, x, t = Denoiser(SHAPE, gives=gives).double(), images(), torch.rand(3, dtype=torch.float64)
    found = DenoiserAdapter(network, SCHEDULE)(x, t)
    network.gives = "tensor"
    assert torch.equal(found, network(x, t))


def test_a_method_called_sample_is_no_prediction():
    with pytest.raises(ValueError, match=r"expected a prediction of .*, found a Output"):
        DenoiserAdapter(lambda x, t: Output(sample=lambda: x), SCHEDULE)(images(), torch.rand(3))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["denoiser.kwargs.gives=small"], r"denoiser.class: .*: expected a prediction of \[2, 2, 8, 8\], found \[2, 2, 8, 7\]"),
        (["denoiser.kwargs.gives=text"], r"denoiser.class: .*: expected a prediction of \[2, 2, 8, 8\], found a str"),
    ],
)
def test_predictions_of_no_convention(overrides, words):
    with pytest.raises(UserError, match=words):
        build(*denoiser("Denoiser", *overrides))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("predicts", PREDICTS)
@pytest.mark.parametrize("time", sorted({*TIMES} - {"timestep"}))  # which keep their own dtype
def test_networks_of_every_dtype_are_told_the_level_in_theirs(time, predicts, dtype):
    torch.manual_seed(0)
    encoder = EncoderAdapter(TimedEncoder(SHAPE), "mu_logvar", "x_t")
    model = Sami(encoder, DenoiserAdapter(Denoiser(SHAPE), SCHEDULE, time=time, predicts=predicts), SCHEDULE)
    x_t, t, z = images().float(), torch.tensor([0.3, 0.5, 0.9]), torch.zeros(3, 4)
    expected, loss = model.predict_eps(x_t, t, z), model.loss(x_t, step=1)
    model.to(dtype)
    found = model.predict_eps(x_t, t, z)
    assert found.dtype == torch.float32
    rounding = {torch.float16: 4e-3, torch.bfloat16: 4e-2, torch.float64: 1e-5}[dtype] * expected.abs().max()
    assert (found - expected).abs().max() < rounding
    assert model.denoiser(x_t.to(dtype), t).dtype == dtype
    again = model.loss(x_t, step=1)
    assert again.item() == pytest.approx(loss.item(), rel=0.05)
    again.backward()
    assert all(p.grad.isfinite().all() for p in model.encoder.parameters())


@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "cosine"])
def test_betas_are_those_of_diffusers(betas):
    schedulers = pytest.importorskip("diffusers.schedulers")
    name = "squaredcos_cap_v2" if betas == "cosine" else betas
    ends = {"beta_start": 0.00085, "beta_end": 0.012} if betas == "scaled_linear" else {}
    theirs = schedulers.DDPMScheduler(beta_schedule=name, **ends).alphas_cumprod
    torch.testing.assert_close(alphas_cumprod(betas, 1000).float(), theirs, rtol=1e-4, atol=1e-9)


def test_fewer_timesteps_end_at_the_same_level():
    for betas in ("linear", "scaled_linear", "cosine"):
        ends = [timestep_levels(alphas_cumprod(betas, steps))[-1].item() for steps in (250, 1000)]
        assert ends[0] == pytest.approx(ends[1], abs=0.6 if betas != "cosine" else 3), betas


# ---- loss and gradients


def noise(x_0: torch.Tensor, draw: Draw, objective: Objective, latents: int = 4) -> dict[str, torch.Tensor]:
    """The random numbers of a step, for the reference."""
    levels = objective.noise_levels
    t = SCHEDULE.sample(draw.index, levels, draw.global_batch, seed=draw.seed, step=draw.step).to(x_0.dtype)
    _, eps, _, _, _ = noised(SCHEDULE, x_0, draw, objective, True)
    eps_z = ops.random_normal(draw.seed, draw.step, ops.Stream.EPS_Z, draw.index, latents).to(x_0.dtype)
    weight = SCHEDULE.weight(t, objective.weighting, 1.0)
    return {"t": t, "logsnr": SCHEDULE.logsnr(t), "weight": weight, "eps": eps.unflatten(0, (-1, levels)), "eps_z": eps_z}


@pytest.mark.parametrize("takes", ["x", "x_t"])
def test_loss_and_gradients_are_those_of_plain_autograd(takes):
    encoder, network = (TimedEncoder if takes == "x_t" else Encoder)(SHAPE).double(), Denoiser(SHAPE, gives="sample").double()
    x_0, draw, objective = images(), Draw(3, 5, torch.arange(3), 3), Objective(noise_levels=2)
    adapted = EncoderAdapter(encoder, "mu_logvar", takes), DenoiserAdapter(network, SCHEDULE, time="logsnr", predicts="v")
    loss, _ = training_step(*adapted, SCHEDULE, x_0, draw, objective, 0.3)
    found = gradients(loss, encoder, network)
    given = noise(x_0, draw, objective)
    a, s = (v.flatten().view(-1, 1, 1, 1) for v in alpha_sigma(given["logsnr"]))

    def plain_encoder(x):
        at = (given["t"].flatten() if len(x) == 6 else torch.zeros(3, dtype=x.dtype),) if takes == "x_t" else ()
        mu, logvar = encoder(x, *at)
        return mu, torch.exp(logvar)

    def plain_denoiser(x, t):
        return s * x + a * network(x, given["logsnr"].flatten()).sample

    expected = reference_step(plain_encoder, plain_denoiser, x_0, kl_weight=0.3, **given)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert_same_gradients(found, gradients(expected, encoder, network), 1e-9)


def test_accelerated_attention_has_the_gradients_of_plain_attention():
    model = build(*named("AttentiveEncoder", "encoder.returns=mu_logvar", "encoder.accelerate=true")).double()
    plain = AttentiveEncoder(SHAPE, 8).double()
    plain.load_state_dict(model.encoder.network.state_dict())
    x_0, draw, objective = images(), Draw(3, 5, torch.arange(3), 3), Objective(noise_levels=2)
    loss, _ = training_step(model.encoder, model.denoiser, SCHEDULE, x_0, draw, objective, 0.3)
    found = gradients(loss, model.encoder.network)

    def plain_encoder(x):
        mu, logvar = plain(x)
        return mu, torch.exp(logvar)

    with sdpa_kernel(SDPBackend.MATH):
        expected = reference_step(plain_encoder, model.denoiser, x_0, kl_weight=0.3, **noise(x_0, draw, objective, 8))
        assert_same_gradients(found, gradients(expected, plain), 1e-9)


# ---- the check on one batch


def checked(*overrides: str) -> list[str]:
    return check_first_batch(build(*overrides), images(4).float(), 0)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        named("Encoder", "encoder.returns=mu_logvar"),
        named("Encoder", "encoder.kwargs={kind: normal}"),
        named("make_encoder", "encoder.returns=mu_logvar"),
        named("TimedEncoder", "encoder.returns=mu_logvar", "encoder.takes=x_t"),
        named("AttentiveEncoder", "encoder.returns=mu_logvar", "encoder.accelerate=true"),
        denoiser("Denoiser", "denoiser.time=edm", "denoiser.predicts=x_0"),
        denoiser("SteppedDenoiser", "denoiser.time=timestep"),
        [*named("Encoder", "encoder.kwargs.kind=mu_std", "encoder.returns=mu_std"), *denoiser("Denoiser", "denoiser.kwargs.gives=pred")],
    ],
)
def test_nothing_is_said_of_right_ones(overrides):
    assert checked(*overrides) == []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            named("Encoder"),
            "encoder.returns: .* returns variances below 0; if they are log variances, set encoder.returns=mu_logvar",
        ),
        (named("Encoder", "encoder.returns=mu_std"), "encoder.returns: .* returns standard deviations below 0; if they are log variances"),
        (named("Encoder", "encoder.kwargs.kind=flat"), "encoder.returns: expected var above 0, .*Encoder returns 0 for images"),
        (
            named("Encoder", "encoder.kwargs.kind=huge", "encoder.returns=mu_logvar"),
            "encoder.returns: var of images .* not finite; if it returns a variance, set encoder.returns=mu_var",
        ),
        (named("Encoder", "encoder.kwargs.kind=nan"), "encoder.returns: mu of images by .* is not finite"),
        (named("TimedEncoder"), "encoder.takes: .* missing 1 required positional argument.*set encoder.takes=x_t"),
        (named("Encoder", "encoder.takes=x_t"), "encoder.takes: .* takes 2 positional arguments but 3.*set encoder.takes=x$"),
        (
            named("Encoder", "encoder.kwargs.kind=chance"),
            "encoder.class: .* another result beside other images than alone, or another each",
        ),
        (named("Encoder", "encoder.kwargs.kind=batch"), "encoder.class: .* another result beside other images than alone"),
        (named("Encoder", "encoder.kwargs.kind=detached"), "encoder.class: the latents of .* have no gradient in the image"),
        (
            named("AttentiveEncoder", "encoder.returns=mu_logvar"),
            "encoder.accelerate: .* has no second derivative; set encoder.accelerate=true",
        ),
        (
            named("IdleEncoder", "encoder.returns=mu_logvar", "encoder.kwargs.tied=true"),
            "each weight under one name, found .*heads.weight again as",
        ),
        (denoiser("SteppedDenoiser"), "denoiser.time: .*; if it wants whole timesteps, set denoiser.time=timestep"),
        (
            denoiser("SteppedDenoiser", "denoiser.time=timestep", "denoiser.kwargs.steps=100"),
            "denoiser.timesteps: .* set denoiser.timesteps",
        ),
        (denoiser("Denoiser", "denoiser.time=timestep"), "denoiser.time: .* if it wants no whole timesteps, set denoiser.time to unit"),
        (denoiser("Denoiser", "denoiser.kwargs.gives=nan"), "denoiser.class: the prediction of .* is not finite"),
        (
            named("Encoder", "encoder.latent_size=5", "encoder.kwargs.latent_size=3", "encoder.returns=mu_logvar"),
            "latent_size: expected 3, .* found 5",
        ),
        (named("make_encoder", "encoder.latent_size=5"), "encoder.latent_size: expected 4, the latents that .* returns, found 5"),
        (named("Encoder", "encoder.kwargs.depth=3"), r"encoder.kwargs: .*:Encoder cannot be made with .*'depth': 3.* unexpected keyword"),
        (named("make_nothing"), "encoder.class: expected a torch.nn.Module from .*make_nothing, found a Tensor"),
        (
            denoiser("SteppedDenoiser", "denoiser.time=timestep", "schedule.logsnr_max=12"),
            "schedule: expected logsnr within .* to 9.21, those of",
        ),
    ],
)
def test_what_is_said_of_wrong_ones(overrides, words):
    with pytest.raises(UserError, match=words) as found:
        checked(*overrides)
    assert "\n" not in str(found.value)


def test_what_nothing_reaches_stays_as_it_is():
    model = build(*named("IdleEncoder", "encoder.returns=mu_logvar"))
    assert check_first_batch(model, images(4).float(), 0) == ["encoder: no gradient reaches idle.weight, idle.bias, which stay as they are"]
    assert {name for name, p in model.encoder.named_parameters() if not p.requires_grad} == {"network.idle.weight", "network.idle.bias"}


def test_training_does_not_turn_on_dropout_and_batch_statistics():
    model = build(*named("IdleEncoder", "encoder.returns=mu_logvar"))
    model.train()
    assert not model.encoder.network.norm.training
    assert not model.encoder.network.dropout.training
