"""One training step: against the method written out literally, against the reference, and against Gaussians whose answer is known.

The golden losses are compared with tests/losses/toy.json; after a change that is meant to alter them, write them anew with

    pytest tests/test_step.py -k golden --rewrite-losses
"""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_same_gradients, core_launchers, gradients, normal, relative_error, tiny_denoiser, tiny_encoder
from torch import Tensor, nn

from sami_fast import Sami, ops, score
from sami_fast.data import Disks, Feed
from sami_fast.models import Denoiser, Encoder
from sami_fast.reference.step import step as reference_step
from sami_fast.schedule import SCHEDULES, Cosine, LinearBeta, UniformLogsnr
from sami_fast.step import Draw, Objective, denoising_step, training_step

LOSSES = Path(__file__).parent / "losses"
BETA = 0.7

OBJECTIVES = [
    Objective(weighting=weighting, noise_levels=levels, unconditional_weight=u)
    for weighting in ("elbo", "simple")
    for levels in (1, 3)
    for u in (0.0, 0.3)
]
each_objective = pytest.mark.parametrize(
    "objective", OBJECTIVES, ids=lambda o: f"{o.weighting}-K{o.noise_levels}-u{o.unconditional_weight}"
)


def whole_batch(size: int, seed: int = 5, step: int = 7) -> Draw:
    return Draw(seed, step, torch.arange(size), size)


def images(size: int, side: int = 8) -> Tensor:
    return normal(size, 1, side, side, seed=11).tanh()


def literal_loss(encoder, denoiser, schedule, x_0, draw, objective, kl_weight, guided_from=0.0, shown_from=0.0) -> Tensor:
    """L = mean_b [ mean_k w ( ||eps - eps_hat||^2 + u ||eps - eps_theta||^2 ) + beta KL ], image by image and level by level."""
    levels, power, u = objective.noise_levels, objective.time_power, objective.unconditional_weight
    times = schedule.sample(draw.index, levels, draw.global_batch, seed=draw.seed, step=draw.step, power=power, first=shown_from)
    losses = []
    for b, place in enumerate(draw.index.tolist()):
        # z ~ q(z | x_0)
        mu_0, var_0 = (head[0] for head in encoder(x_0[b : b + 1]))
        eps_z = ops.random_normal(draw.seed, draw.step, ops.Stream.EPS_Z, torch.tensor([place]), len(mu_0))[0].double()
        z = mu_0 + torch.exp(0.5 * torch.log(var_0)) * eps_z
        # KL of N(mu, var) from N(0, 1): the mean under q of log q - log p
        loss = kl_weight * (0.5 * (mu_0**2 + var_0) - 0.5 * torch.log(var_0) - 0.5).sum()
        for k in range(levels):
            t = times[b, k].double().requires_grad_()
            logsnr = schedule.logsnr(t)
            (slope,) = torch.autograd.grad(logsnr, t)
            t, logsnr = t.detach(), logsnr.detach()
            snr = torch.exp(logsnr)
            alpha, sigma = (snr / (1 + snr)) ** 0.5, (1 / (1 + snr)) ** 0.5
            # d logsnr = |slope| dt, and s, the place of t between the first one and 1, has density a s^(a-1)
            assert shown_from <= t <= 1
            density = power * ((t - shown_from) / (1 - shown_from)) ** (power - 1) / (1 - shown_from)
            w = {"elbo": -0.5 * slope, "simple": 1.0}[objective.weighting] / density

            sample = torch.tensor([place * levels + k])
            eps = ops.random_normal(draw.seed, draw.step, ops.Stream.EPS, sample, x_0[b].numel())[0].double().view_as(x_0[b])
            x_t = (alpha * x_0[b] + sigma * eps).detach().requires_grad_()
            # grad log q = J_mu' (z - mu) / var + J_var' ((z - mu)^2 / var - 1) / (2 var)
            mu, var = encoder(x_t[None])
            toward_mu, toward_var = (z - mu) / var, ((z - mu) ** 2 / var - 1) / (2 * var)
            (grad_log_q,) = torch.autograd.grad((mu, var), x_t, (toward_mu, toward_var), create_graph=True)
            eps_theta = denoiser(x_t.detach()[None], t[None])[0]
            eps_hat = eps_theta - sigma * grad_log_q if t >= guided_from else eps_theta
            loss = loss + w / levels * (((eps - eps_hat) ** 2).sum() + u * ((eps - eps_theta) ** 2).sum())
        losses.append(loss)
    return sum(losses) / len(losses)


# Values and first gradients (the encoder's are second gradients of log q)


@each_objective
def test_against_the_method_written_out(objective):
    encoder, denoiser, schedule = tiny_encoder(), tiny_denoiser(), Cosine(-6.0, 4.0)
    arguments = encoder, denoiser, schedule, images(3), whole_batch(3), objective, BETA
    loss, _ = training_step(*arguments)
    expected = literal_loss(*arguments)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert_same_gradients(gradients(loss, encoder, denoiser), gradients(expected, encoder, denoiser), 1e-10)


@pytest.mark.parametrize("kind", sorted(SCHEDULES))
@pytest.mark.parametrize("style", ["group_norm_silu", "silu", "bias_free_relu"])
def test_other_schedules_styles_and_densities(kind, style):
    encoder, denoiser, schedule = tiny_encoder(style=style), tiny_denoiser(style=style), SCHEDULES[kind](-7.0, 5.0)
    objective = Objective(noise_levels=2, time_power=2.0, unconditional_weight=0.1)
    arguments = encoder, denoiser, schedule, images(2), whole_batch(2), objective, BETA
    loss, expected = training_step(*arguments)[0], literal_loss(*arguments)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert_same_gradients(gradients(loss, encoder, denoiser), gradients(expected, encoder, denoiser), 1e-10)


@pytest.mark.parametrize("method", ["reverse", "sweeps", "dual"])
@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize("shown_from", [0.0, 0.45])
def test_latents_guide_from_a_noise_level_on(method, power, shown_from):
    """At cleaner levels the denoiser goes its own way, or they are not shown at all."""
    encoder, denoiser, schedule = tiny_encoder(), tiny_denoiser(), Cosine(-6.0, 4.0)
    objective = Objective(noise_levels=3, time_power=power, unconditional_weight=0.2)
    arguments = encoder, denoiser, schedule, images(4), whole_batch(4), objective, BETA
    bounds = {"guided_from": 0.45, "shown_from": shown_from}
    loss, terms = training_step(*arguments, score_method=method, **bounds)
    expected = literal_loss(*arguments, **bounds)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert_same_gradients(gradients(loss, encoder, denoiser), gradients(expected, encoder, denoiser), 1e-10)
    everywhere, _ = training_step(*arguments, score_method=method)
    assert abs(everywhere - loss) > 1e-3
    if not shown_from:  # the levels are the same, and without guidance so is what they cost
        assert torch.equal(terms.unguided, training_step(*arguments, score_method=method)[1].unguided)


def test_a_model_guides_up_to_its_level():
    schedule = Cosine(-6.0, 4.0)
    model = Sami(tiny_encoder(), tiny_denoiser(), schedule, logsnr_max=-1.0)
    x_t, z = images(5), normal(5, 3, seed=3)
    t = schedule.t(torch.tensor([3.0, -0.9, -1.0, -1.1, -6.0], dtype=torch.float64))
    everywhere = Sami(model.encoder, model.denoiser, schedule)
    assert everywhere.settings == {}
    assert model.settings == {"logsnr_max": -1.0}
    alone, guided = model.predict_eps(x_t, t), everywhere.predict_eps(x_t, t, z)
    found = model.predict_eps(x_t, t, z)
    assert torch.equal(found[:2], alone[:2])
    assert torch.equal(found[2:], guided[2:])
    assert not torch.isclose(guided, alone).all(dim=(1, 2, 3)).any()

    # In training alike: the encoder's own phase shows no cleaner levels, a joint one does and leaves them alone.
    draw, parts = whole_batch(4), model.parts()
    arguments = model.encoder, model.denoiser, schedule, images(4), draw, parts.objective, BETA
    for phase, shown_from in (("encoder", model.guided_from), ("both", 0.0)):
        loss, *_ = model.training_loss(images(4), draw, BETA, parts, phase)
        expected, _ = training_step(*arguments, guided_from=model.guided_from, shown_from=shown_from)
        assert loss.item() == expected.item()
    for unusable in (math.nan, "auto", None):
        with pytest.raises(ValueError, match="logsnr_max: expected a number, found"):
            Sami(model.encoder, model.denoiser, schedule, logsnr_max=unusable)


@each_objective
@pytest.mark.parametrize("charged", [3, 1])
def test_against_the_reference_step(objective, charged):
    """With free bits between the KLs of the three dimensions, so that all or one of them are charged."""
    encoder, denoiser, schedule = tiny_encoder(), tiny_denoiser(), UniformLogsnr(-7.0, 5.0)
    x_0, draw, levels = images(4), whole_batch(4), objective.noise_levels
    kl = ops.gaussian_kl(*encoder(x_0)).mean(0).detach().sort().values
    objective = replace(objective, free_bits=kl[1:].mean().item() if charged == 1 else 0.0)
    loss, _ = training_step(encoder, denoiser, schedule, x_0, draw, objective, BETA)

    t = schedule.sample(draw.index, levels, 4, seed=draw.seed, step=draw.step).double()
    eps = ops.random_normal(draw.seed, draw.step, ops.Stream.EPS, torch.arange(4 * levels), 64).double().view(4, levels, 1, 8, 8)
    eps_z = ops.random_normal(draw.seed, draw.step, ops.Stream.EPS_Z, draw.index, 3).double()
    weight = schedule.weight(t, objective.weighting)
    expected = reference_step(
        encoder, denoiser, x_0, t, schedule.logsnr(t), weight, eps, eps_z, BETA, objective.unconditional_weight, objective.free_bits
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-13)
    assert_same_gradients(gradients(loss, encoder, denoiser), gradients(expected, encoder, denoiser), 1e-11)


def test_gradient_against_finite_differences():
    """Along one random direction through the parameters of each network."""
    encoder, denoiser = tiny_encoder(), tiny_denoiser()
    arguments = encoder, denoiser, Cosine(-6.0, 4.0), images(3), whole_batch(3), Objective(noise_levels=2, unconditional_weight=0.2), BETA
    for network in (encoder, denoiser):
        parameters = list(network.parameters())
        direction = [normal(*p.shape, seed=place) for place, p in enumerate(parameters)]
        grads = torch.autograd.grad(training_step(*arguments)[0], parameters)
        exact = sum((g * v).sum() for g, v in zip(grads, direction, strict=True)).item()

        def loss_at(h, parameters=parameters, direction=direction):
            with torch.no_grad():
                torch._foreach_add_(parameters, direction, alpha=h)
                loss = training_step(*arguments)[0].item()
                torch._foreach_add_(parameters, direction, alpha=-h)
            return loss

        h = 1e-4
        numeric = (8 * (loss_at(h) - loss_at(-h)) - (loss_at(2 * h) - loss_at(-2 * h))) / (12 * h)
        assert numeric == pytest.approx(exact, rel=1e-6)


def test_loss_is_made_of_its_terms():
    objective = Objective(noise_levels=3, unconditional_weight=0.3)
    loss, terms = training_step(tiny_encoder(), tiny_denoiser(), Cosine(-6.0, 4.0), images(4), whole_batch(4), objective, BETA)
    assert terms.diffusion.shape == terms.unguided.shape == (4,)
    assert terms.kl.shape == (4, 3)
    assert not any(term.requires_grad for term in (terms.diffusion, terms.unguided, terms.kl))
    total = terms.diffusion + 0.3 * terms.unguided + BETA * terms.kl.sum(1)
    assert loss.item() == pytest.approx(total.mean().item(), rel=1e-13)


def test_float32_is_close_to_float64():
    encoder, denoiser, objective = tiny_encoder(), tiny_denoiser(), Objective(noise_levels=2, unconditional_weight=0.2)
    results = []
    for dtype in (torch.float64, torch.float32):
        loss, _ = training_step(
            encoder.to(dtype), denoiser.to(dtype), Cosine(-6.0, 4.0), images(4).to(dtype), whole_batch(4), objective, BETA
        )
        assert loss.dtype == dtype
        results.append((loss, gradients(loss, encoder, denoiser)))
    (exact, exact_gradients), (loss, found) = results
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert_same_gradients({name: g.double() for name, g in found.items()}, {name: g.double() for name, g in exact_gradients.items()}, 1e-3)


def test_bfloat16_autocast():
    encoder, denoiser = tiny_encoder().float(), tiny_denoiser().float()
    arguments = encoder, denoiser, Cosine(-6.0, 4.0), images(4).float(), whole_batch(4), Objective(noise_levels=2), BETA
    exact, _ = training_step(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        loss, terms = training_step(*arguments)
    assert loss.dtype == terms.diffusion.dtype == terms.kl.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)
    for name, gradient in gradients(loss, encoder, denoiser).items():
        assert gradient.isfinite().all(), name


# Random numbers


def test_any_split_of_the_batch_gives_the_same_terms():
    encoder, denoiser, schedule, x_0 = tiny_encoder(), tiny_denoiser(), UniformLogsnr(-7.0, 5.0), images(6)
    objective, draw = Objective(noise_levels=2, unconditional_weight=0.2), whole_batch(6)
    _, whole = training_step(encoder, denoiser, schedule, x_0, draw, objective, BETA)
    for places in ([[0, 1, 2], [3, 4, 5]], [[0], [1, 2, 3, 4, 5]], [[5, 0], [3, 1], [2, 4]]):
        for place in map(torch.tensor, places):
            part = replace(draw, index=place)
            _, terms = training_step(encoder, denoiser, schedule, x_0[place], part, objective, BETA)
            for name in ("diffusion", "unguided", "kl"):
                assert relative_error(getattr(terms, name), getattr(whole, name)[place]) < 1e-12, name


def test_equal_parts_average_to_the_whole_gradient():
    encoder, denoiser, schedule, x_0 = tiny_encoder(), tiny_denoiser(), UniformLogsnr(-7.0, 5.0), images(6)
    draw, objective = whole_batch(6), Objective(noise_levels=2)
    whole = gradients(training_step(encoder, denoiser, schedule, x_0, draw, objective, BETA)[0], encoder, denoiser)
    parts = []
    for place in (torch.tensor([0, 4, 2]), torch.tensor([5, 1, 3])):
        loss, _ = training_step(encoder, denoiser, schedule, x_0[place], replace(draw, index=place), objective, BETA)
        parts.append(gradients(loss, encoder, denoiser))
    assert_same_gradients({name: (parts[0][name] + parts[1][name]) / 2 for name in whole}, whole, 1e-10)


def test_seed_and_step_change_the_noise_and_nothing_else_does():
    arguments = tiny_encoder(), tiny_denoiser(), UniformLogsnr(-7.0, 5.0), images(3)
    losses = []
    for seed, step in ((5, 7), (6, 7), (5, 8), (5, 7)):
        torch.manual_seed(seed * step)  # torch's own generator plays no part
        losses.append(training_step(*arguments, whole_batch(3, seed, step), Objective(), BETA)[0].item())
    assert losses[0] == losses[3]
    assert len(set(losses)) == 3


# Gaussian data, exact denoiser, linear encoder: every expectation is known


class LinearGaussian:
    """Data N(0, S), the exact eps*(x_t) = sigma_t (alpha_t^2 S + sigma_t^2 I)^-1 x_t, and z | x ~ N(W x, diag v) at every level."""

    def __init__(self, schedule, side: int, latent_size: int, informative: bool = True) -> None:
        self.schedule, self.side, d = schedule, side, side * side
        rotation = torch.linalg.qr(normal(d, d, seed=1)).Q
        self.spectrum, self.rotation = torch.linspace(0.05, 0.9, d, dtype=torch.float64), rotation
        self.S = rotation @ torch.diag(self.spectrum) @ rotation.T
        self.W = normal(latent_size, d, seed=2) * (0.5 if informative else 0.0)
        self.v = torch.linspace(0.5, 0.8, latent_size, dtype=torch.float64) if informative else torch.ones(latent_size, dtype=torch.float64)

    def data(self, count: int, seed: int) -> Tensor:
        return (normal(count, self.side**2, seed=seed) * self.spectrum.sqrt() @ self.rotation.T).view(count, 1, self.side, self.side)

    def encoder(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.flatten(1) @ self.W.T, self.v.expand(len(x), -1)

    def denoiser(self, x_t: Tensor, t: Tensor) -> Tensor:
        logsnr = self.schedule.logsnr(t)[:, None]
        alpha_2, sigma_2 = torch.sigmoid(logsnr), torch.sigmoid(-logsnr)
        gain = sigma_2.sqrt() / (alpha_2 * self.spectrum + sigma_2)
        return (x_t.flatten(1) @ self.rotation * gain @ self.rotation.T).view_as(x_t)

    def error(self, logsnr: float, guided: bool) -> float:
        """E ||eps - eps_hat||^2: eps - eps_hat = A eps + B x_0 + C eps_z, three matrices and three traces."""
        alpha, sigma = (1 / (1 + math.exp(-logsnr))) ** 0.5, (1 / (1 + math.exp(logsnr))) ** 0.5
        one = torch.eye(self.side**2, dtype=torch.float64)
        M = sigma * torch.linalg.inv(alpha**2 * self.S + sigma**2 * one)
        G = self.W.T @ torch.diag(1 / self.v) if guided else torch.zeros_like(self.W.T)  # grad log q = G (z - W x_t)
        # eps - M x_t + sigma G (W x_0 + sqrt(v) eps_z - W x_t) with x_t = alpha x_0 + sigma eps
        A = one - sigma * M - sigma**2 * G @ self.W
        B = -alpha * M + (1 - alpha) * sigma * G @ self.W
        C = sigma * G @ torch.diag(self.v.sqrt())
        return (A @ A.T + B @ self.S @ B.T + C @ C.T).trace().item()

    def diffusion(self, guided: bool = True) -> float:
        """1/2 integral of the error over logsnr, by Gauss-Legendre quadrature."""
        low, high = self.schedule.logsnr_min, self.schedule.logsnr_max
        nodes, weights = np.polynomial.legendre.leggauss(120)
        levels = low + (high - low) * (nodes + 1) / 2
        return 0.25 * (high - low) * sum(w * self.error(level, guided) for w, level in zip(weights, levels, strict=True))

    def kl(self) -> float:
        """E KL( N(W x, v) || N(0, I) )."""
        return (0.5 * ((self.W @ self.S @ self.W.T).diag() + self.v - 1 - self.v.log())).sum().item()

    def endpoints(self) -> float:
        """Prior KL at logsnr_min and reconstruction by N(x_t / alpha, sigma^2 / alpha^2) at logsnr_max."""
        low, high, d = self.schedule.logsnr_min, self.schedule.logsnr_max, self.side**2
        alpha_2, sigma_2 = 1 / (1 + math.exp(-low)), 1 / (1 + math.exp(low))
        prior = 0.5 * (alpha_2 * self.S.trace().item() + d * (sigma_2 - 1 - math.log(sigma_2)))
        return prior + 0.5 * d * (math.log(2 * math.pi) + 1 - high)

    def negative_log_likelihood(self) -> float:
        """E -ln N(x; 0, S): the entropy."""
        return 0.5 * torch.logdet(2 * math.pi * math.e * self.S).item()

    def measured(self, objective: Objective, kl_weight: float, steps: int = 30, batch: int = 3000) -> dict[str, tuple[float, float]]:
        """Mean of every term of `training_step` over many batches, with its standard error."""
        rows = []
        with torch.no_grad():
            for step in range(steps):
                loss, terms = training_step(
                    self.encoder, self.denoiser, self.schedule, self.data(batch, step), whole_batch(batch, 3, step), objective, kl_weight
                )
                rows.append([loss, terms.diffusion.mean(), terms.unguided.mean(), terms.kl.sum(1).mean()])
        table = torch.tensor(rows)
        errors = table.std(0) / steps**0.5
        return dict(zip(("loss", "diffusion", "unguided", "kl"), zip(table.mean(0).tolist(), errors.tolist(), strict=True), strict=True))


def assert_measured(found: tuple[float, float], expected: float, relative: float) -> None:
    mean, standard_error = found
    assert standard_error < relative * abs(expected)
    assert abs(mean - expected) < 4 * standard_error


@pytest.mark.parametrize(
    ("schedule", "objective"),
    [
        (UniformLogsnr(-7.0, 5.0), Objective(noise_levels=2)),
        (Cosine(-6.0, 4.0), Objective(noise_levels=1, unconditional_weight=0.4)),
        (LinearBeta(-7.0, 3.0), Objective(noise_levels=3, unconditional_weight=0.1)),
        (UniformLogsnr(-5.0, 3.0), Objective(noise_levels=2, time_power=1.5)),
    ],
    ids=["uniform", "cosine", "linear_beta", "time_power"],
)
def test_gaussian_objective(schedule, objective):
    case = LinearGaussian(schedule, 2, 3)
    beta, u = 0.3, objective.unconditional_weight
    found = case.measured(objective, beta)
    diffusion, unguided, kl = case.diffusion(), case.diffusion(guided=False), case.kl()
    assert abs(diffusion - unguided) > 0.3  # guidance is not a detail here
    assert_measured(found["diffusion"], diffusion, 1e-2)
    assert_measured(found["unguided"], unguided, 1e-2)
    assert_measured(found["kl"], kl, 5e-3)
    assert_measured(found["loss"], diffusion + u * unguided + beta * kl, 1e-2)


@pytest.mark.parametrize("schedule", [UniformLogsnr(-13.0, 13.0), Cosine(-13.0, 13.0)], ids=["uniform", "cosine"])
def test_gaussian_bound_is_the_likelihood(schedule):
    """An encoder that says nothing: KL 0, no guidance, and the bound with both endpoint terms is tight."""
    silent = LinearGaussian(schedule, 3, 2, informative=False)
    exact = silent.negative_log_likelihood()
    assert silent.kl() == 0
    assert silent.diffusion() + silent.endpoints() == pytest.approx(exact, abs=1e-3)
    found = silent.measured(Objective(noise_levels=4), 1.0, steps=20, batch=2000)
    assert found["kl"] == (0.0, 0.0)
    assert found["diffusion"][0] == pytest.approx(found["unguided"][0], rel=1e-12)
    loss, standard_error = found["loss"]
    assert_measured((loss, standard_error), silent.diffusion(), 1e-2)
    assert abs(loss + silent.endpoints() - exact) < 4 * standard_error + 1e-3


def test_gaussian_bound_holds_for_any_encoder():
    """A linear encoder that does say something can only be above the likelihood, however it is scaled."""
    for scale in (0.1, 0.3, 1.0):
        for variance in (0.3, 0.9, 1.0):
            case = LinearGaussian(UniformLogsnr(-13.0, 13.0), 2, 2)
            case.W, case.v = scale * case.W, torch.full((2,), variance, dtype=torch.float64)
            assert case.diffusion() + case.kl() + case.endpoints() > case.negative_log_likelihood()


# Free bits


class LinearEncoder(nn.Module):
    """mu = W x, one free variance per dimension."""

    def __init__(self, scales: list[float]) -> None:
        super().__init__()
        self.W = nn.Parameter(normal(len(scales), 64, seed=3) * torch.tensor(scales, dtype=torch.float64)[:, None])
        self.raw = nn.Parameter(torch.full((len(scales),), -0.1, dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.flatten(1) @ self.W.T, self.raw.exp().expand(len(x), -1)


def kl_gradients(free_bits: float, **options) -> tuple[dict[str, Tensor], Tensor, float]:
    """Gradient of the KL cost alone, the batch mean of the raw KL per dimension, and the cost."""
    encoder = LinearEncoder([0.001, 0.3, 0.05])
    results = []
    for kl_weight in (1.0, 0.0):
        loss, terms = training_step(
            encoder,
            tiny_denoiser(),
            UniformLogsnr(-7.0, 5.0),
            images(4),
            whole_batch(4),
            Objective(free_bits=free_bits),
            kl_weight,
            **options,
        )
        results.append((loss, gradients(loss, encoder)))
    (charged, with_kl), (free, without) = results
    return {name: with_kl[name] - without[name] for name in with_kl}, terms.kl.mean(0), (charged - free).item()


def test_free_bits_stop_the_gradient_of_dimensions_below_the_floor():
    full, kl, cost = kl_gradients(0.0)
    assert kl[0] < kl[2] < kl[1]
    floor = (kl[2] + kl[1]).item() / 2
    found, same_kl, same_cost = kl_gradients(floor)
    assert torch.equal(kl, same_kl)  # the measured KL has no floor
    assert same_cost == pytest.approx(cost, rel=1e-9)  # nor has the value of the loss
    for name in full:
        assert full[name][0].abs().max() > 1e-8
        assert relative_error(found[name][1], full[name][1]) < 1e-9
        assert found[name][[0, 2]].abs().max() < 1e-12 * full[name].abs().max()
    for gradient in kl_gradients(1e9)[0].values():
        assert gradient.abs().max() < 1e-9


def test_the_mean_over_all_ranks_decides_about_free_bits():
    seen = []

    def others_have_less(local_mean: Tensor) -> Tensor:
        seen.append(local_mean)
        return 0.0 * local_mean

    full, kl, _ = kl_gradients(0.0)
    floor = kl.min().item() / 2  # every dimension is above it here
    spared, _, _ = kl_gradients(floor, global_mean=others_have_less)
    assert all(g.abs().max() < 1e-12 for g in spared.values())
    assert all(mean.shape == (3,) and not mean.requires_grad and torch.equal(mean, kl) for mean in seen)
    charged, _, _ = kl_gradients(2 * kl.max().item(), global_mean=lambda local_mean: 10 * local_mean.max().expand(3))
    assert all(relative_error(charged[name], full[name]) < 1e-9 for name in full)


# The denoiser alone


@each_objective
def test_denoising_step_is_the_unguided_term(objective):
    denoiser, schedule, x_0, draw = tiny_denoiser(), Cosine(-6.0, 4.0), images(3), whole_batch(3)
    loss, unguided = denoising_step(denoiser, schedule, x_0, draw, objective)
    _, terms = training_step(tiny_encoder(), denoiser, schedule, x_0, draw, objective, BETA)
    assert relative_error(unguided, terms.unguided) < 1e-13
    assert loss.item() == pytest.approx(unguided.mean().item(), rel=1e-13)
    assert not unguided.requires_grad

    # The literal loss of an encoder that says nothing is the same, and so is its gradient.
    def silent(x):
        return 0.0 * x.flatten(1)[:, :2], torch.ones(len(x), 2, dtype=x.dtype) + 0.0 * x.flatten(1)[:, :2]

    expected = literal_loss(silent, denoiser, schedule, x_0, draw, replace(objective, unconditional_weight=0.0), 1.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert_same_gradients(gradients(loss, denoiser), gradients(expected, denoiser), 1e-10)


def test_denoising_step_leaves_the_encoder_alone():
    encoder, denoiser = tiny_encoder(), tiny_denoiser()
    loss, _ = denoising_step(denoiser, Cosine(-6.0, 4.0), images(2), whole_batch(2), Objective())
    loss.backward()
    assert all(p.grad is None for p in encoder.parameters())
    assert all(p.grad is not None for p in denoiser.parameters())


def test_a_frozen_denoiser_changes_nothing_for_the_encoder():
    encoder, denoiser = tiny_encoder(), tiny_denoiser()
    arguments = encoder, denoiser, Cosine(-6.0, 4.0), images(3), whole_batch(3), Objective(noise_levels=2), BETA
    expected = gradients(training_step(*arguments)[0], encoder)
    denoiser.requires_grad_(False)
    loss, _ = training_step(*arguments)
    assert_same_gradients(gradients(loss, encoder), expected, 1e-12)


# The score


def test_score_of_a_linear_encoder():
    encoder, x_t, z = LinearEncoder([0.1, 0.3, 0.2]), images(4), normal(4, 3, seed=6)
    mu, var = encoder(x_t)
    expected = ((z - mu) / var) @ encoder.W
    assert relative_error(score.reverse(encoder, x_t, z), expected.view(4, 1, 8, 8)) < 1e-13


def test_score_treats_the_image_as_constant_and_leaves_it_alone():
    encoder, z = tiny_encoder(), normal(2, 3, seed=6, grad=True)
    x_t = images(2).requires_grad_()
    grad_log_q = score.reverse(encoder, x_t, z)
    assert x_t.grad is None
    assert all(p.grad is None for p in encoder.parameters())
    assert torch.autograd.grad(grad_log_q.sum(), (x_t, z), allow_unused=True)[0] is None


@pytest.mark.parametrize("noise_levels", [1, 2])
def test_without_gradients(noise_levels):
    arguments = tiny_encoder(), tiny_denoiser(), Cosine(-6.0, 4.0), images(3), whole_batch(3), Objective(noise_levels=noise_levels), BETA
    loss, terms = training_step(*arguments)
    with torch.no_grad():
        quiet_loss, quiet_terms = training_step(*arguments)
        assert not score.reverse(arguments[0], images(3), normal(3, 3)).requires_grad
    assert not quiet_loss.requires_grad
    assert quiet_loss.item() == pytest.approx(loss.item(), rel=1e-13)
    assert all(relative_error(getattr(quiet_terms, name), getattr(terms, name)) < 1e-13 for name in ("diffusion", "unguided", "kl"))


# Golden losses


def toy_losses() -> list[float]:
    """50 steps on small disks with tiny networks in float64: 10 of the denoiser alone, 40 of both."""
    torch.manual_seed(0)
    encoder = Encoder(1, 8, 4, [8, 8], blocks=1, attention=[4]).double()
    denoiser = Denoiser(1, 8, [8, 8], embedding_size=16).double()
    ranges = {"x": (0.25, 0.75), "y": (0.4, 0.6), "background": (0.0, 0.5), "radius": (0.25, 0.25), "brightness": (1.0, 1.0)}
    feed = Feed(Disks(8, 1, ranges, 1.5, seed=0), 16, 1, 0, 1, seed=0, device=torch.device("cpu"))
    schedule, objective = UniformLogsnr(-7.0, 5.0), Objective(noise_levels=2, unconditional_weight=0.1, free_bits=0.001)
    optimizer = torch.optim.Adam([*encoder.parameters(), *denoiser.parameters()], lr=3e-3)
    losses = []
    for step in range(50):
        x_0, place = feed.micro_batch(step, 0)
        draw = Draw(0, step, place, 16)
        if step < 10:
            loss, _ = denoising_step(denoiser, schedule, x_0.double(), draw, objective)
        else:
            loss, _ = training_step(encoder, denoiser, schedule, x_0.double(), draw, objective, 0.1)
        optimizer.zero_grad()
        (loss / 64).backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_golden_losses(request):
    losses, file = toy_losses(), LOSSES / "toy.json"
    assert sum(losses[40:]) < 0.7 * sum(losses[:10])
    if request.config.getoption("--rewrite-losses"):
        file.write_text(json.dumps({"loss_nats": [round(loss, 6) for loss in losses]}, indent=1) + "\n")
    assert losses == pytest.approx(json.loads(file.read_text())["loss_nats"], rel=1e-4)


# Odd inputs


@pytest.mark.parametrize("batch", [1, 63])
def test_odd_batches(batch):
    objective = Objective(noise_levels=2)
    loss, terms = training_step(tiny_encoder(), tiny_denoiser(), Cosine(-6.0, 4.0), images(batch), whole_batch(batch), objective, BETA)
    assert loss.isfinite()
    assert terms.diffusion.shape == (batch,)


def test_images_that_are_not_contiguous():
    arguments = tiny_encoder(), tiny_denoiser(), Cosine(-6.0, 4.0)
    x_0 = images(3).transpose(2, 3)
    found, _ = training_step(*arguments, x_0, whole_batch(3), Objective(), BETA)
    expected, _ = training_step(*arguments, x_0.contiguous(), whole_batch(3), Objective(), BETA)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)


# Error messages


def test_unknown_weighting():
    with pytest.raises(ValueError, match=r"weighting: expected one of .*, found 'bound'"):
        training_step(tiny_encoder(), tiny_denoiser(), Cosine(-6.0, 4.0), images(2), whole_batch(2), Objective(weighting="bound"), BETA)


def test_an_index_that_does_not_fit_the_images():
    draw = Draw(0, 0, torch.arange(3), 3)
    with pytest.raises(ValueError, match="expected"):
        training_step(tiny_encoder(), tiny_denoiser(), Cosine(-6.0, 4.0), images(2), draw, Objective(), BETA)


# The compiled core


def step_gradients(
    encoder: nn.Module, denoiser: nn.Module, backend: str, method: str, dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    encoder, denoiser = copy.deepcopy(encoder).to(dtype), copy.deepcopy(denoiser).to(dtype)
    objective = Objective(noise_levels=2, unconditional_weight=0.3)
    with ops.use_backend(backend):
        arguments = encoder, denoiser, UniformLogsnr(-7.0, 5.0), images(6, 16).to(dtype), whole_batch(6), objective, BETA
        loss, _ = training_step(*arguments, score_method=method)
        return loss.detach(), gradients(loss, encoder, denoiser)


@pytest.mark.parametrize("method", score.SCORE_METHODS)
def test_compiled_core_takes_the_same_step(method):
    """Every parameter's gradient is no further from float64 than three times plain torch in float32.

    On three threads it is the same to the rounding of torch's own part of the step.
    """
    core_launchers()
    encoder = tiny_encoder(image_size=16, channels=[8, 12], attention=[8], groups=4)
    denoiser = tiny_denoiser(image_size=16, channels=[8, 12], groups=4)
    exact_loss, exact = step_gradients(encoder, denoiser, "reference", "reverse", torch.float64)
    rival_loss, rival = step_gradients(encoder, denoiser, "reference", "reverse", torch.float32)
    loss, found = step_gradients(encoder, denoiser, "cpp", method, torch.float32)
    unit = torch.finfo(torch.float32).eps
    assert (loss - exact_loss).abs() <= 3 * (rival_loss - exact_loss).abs() + 8 * unit * exact_loss.abs()
    scale = max(value.norm().item() for value in exact.values())
    for name, want in exact.items():
        error, allowed = ((value[name] - want).norm().item() for value in (found, rival))
        assert error <= 3 * allowed + 8 * unit * want.norm().item() + unit * scale, name
    torch.set_num_threads(3)
    again_loss, again = step_gradients(encoder, denoiser, "cpp", method, torch.float32)
    assert torch.allclose(again_loss, loss, rtol=1e-6)
    assert_same_gradients(again, found, rtol=1e-5)
