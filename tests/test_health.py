"""A run's health in a word: the gain of guidance against its known value, the rules, and small trained models that are ill in each way."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from sami_fast.config import load_config
from sami_fast.data import open_dataset
from sami_fast.evaluation import Health, Latents, encode, guidance, open_run
from sami_fast.evaluation.health import diagnose, rise
from sami_fast.evaluation.scores import guidance_scores, health_of, rate_scores
from sami_fast.methods.sami import Sami
from sami_fast.metrics.guidance import guidance_profile
from sami_fast.metrics.identifiability import correlation_matrix
from sami_fast.metrics.latents import information_per_dim, kl_per_dim, live_dims
from sami_fast.schedule import UniformLogsnr, alpha_sigma
from sami_fast.train import train

LEVEL = 0.7
VAR = np.array([3.0, 0.5])  # of the two pixels
NOISE = 0.2  # of z about the first pixel


class Optimal:
    """Of pixels x_0 ~ N(0, VAR) and z ~ N(x_0[0], NOISE): the posterior of z and the denoiser, both exact, at one noise level."""

    def __init__(self) -> None:
        self.alpha, self.sigma = (float(v) for v in alpha_sigma(torch.tensor(LEVEL, dtype=torch.float64)))

    def encoder(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        clean = bool((x[:, 0, 1, 1] == 0).all())  # a mark that only clean images bear
        alpha, sigma = (1.0, 0.0) if clean else (self.alpha, self.sigma)
        total = alpha**2 * VAR[0] + sigma**2
        mu = x[:, 0, 0, :1] * alpha * VAR[0] / total
        return mu, torch.full_like(mu, VAR[0] - alpha**2 * VAR[0] ** 2 / total + NOISE)

    def denoiser(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        total = self.alpha**2 * torch.tensor([[VAR[0], VAR[1]], [0, 0]]).to(x_t) + self.sigma**2
        return self.sigma * x_t / total


def pixels(index: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(20000, 2, generator=generator, dtype=torch.float64) * torch.from_numpy(VAR).sqrt()
    image = torch.zeros(len(index), 1, 2, 2, dtype=torch.float64)
    image[:, 0, 0] = values[index]
    return image


def test_the_gain_of_guidance_is_what_z_tells_about_the_noise():
    """With everything exact and Gaussian: half of what knowing z takes off the variance of the noise, by hand."""
    optimal = Optimal()
    model = Sami(optimal.encoder, optimal.denoiser, UniformLogsnr(-7, 5), image_shape=(1, 2, 2), latent_size=1)
    found = guidance_profile(model, pixels, 20000, logsnr=[LEVEL], seed=0, batch_size=5000)
    alpha, sigma = optimal.alpha, optimal.sigma
    total = alpha**2 * VAR[0] + sigma**2
    without = 1 - sigma**2 / total  # variance of the noise in the first pixel, given x_t
    x_given_z = VAR[0] * NOISE / (VAR[0] + NOISE)
    within = 1 - sigma**2 / (alpha**2 * x_given_z + sigma**2)  # given z as well
    assert found.gain[0] == pytest.approx(0.5 * (without - within), rel=0.03)
    assert found.other[0] < -0.1  # another image's z misleads
    assert found.zscore_square[0, 0] == pytest.approx(1.0, abs=0.03)  # the encoder is calibrated


def test_another_image_is_no_neighbour():
    """Frames of a clip lie side by side, and one frame's latents help with the next."""
    optimal = Optimal()
    model = Sami(optimal.encoder, optimal.denoiser, UniformLogsnr(-7, 5), image_shape=(1, 2, 2), latent_size=1)
    for batch_size in (1000, 7):
        still = guidance_profile(model, lambda index: pixels(index // 50), 1000, logsnr=[LEVEL], seed=0, batch_size=batch_size)
        assert still.gain[0] > 0.05
        assert still.other[0] < -0.1
    assert guidance_profile(model, pixels, 8, logsnr=[LEVEL], seed=0, batch_size=1).other[0] < -0.1


def test_the_total_is_the_integral_over_levels():
    optimal = Optimal()
    model = Sami(optimal.encoder, optimal.denoiser, UniformLogsnr(-7, 5), image_shape=(1, 2, 2), latent_size=1)
    found = guidance_profile(model, pixels, 64, logsnr=[-1.0, 0.0, 3.0], seed=0, batch_size=16)
    assert found.total == pytest.approx(0.5 * (found.gain[0] + found.gain[1]) + 1.5 * (found.gain[1] + found.gain[2]))
    whole = guidance_profile(model, pixels, 64, logsnr=[-1.0, 0.0, 3.0], seed=0, batch_size=64)
    np.testing.assert_allclose(found.gain, whole.gain, rtol=1e-6)
    with pytest.raises(ValueError, match="at least 2 images"):
        guidance_profile(model, pixels, 1, logsnr=[0.0], seed=0)


# ---- the rules

TOLD = np.array([3.0, 2.0, 0.0, 0.0])


def log(*told: float) -> list[dict]:
    return [{"step": step, "information_sum_nats": value, "kl_weight": 0.1} for step, value in enumerate(told)]


def test_rise_is_what_the_last_fifth_brought():
    assert rise(log(*[5.0] * 100)) == 0
    assert rise(log(*np.linspace(0, 10, 100))) == pytest.approx(0.2, abs=0.03)
    assert rise(log(*np.linspace(0, 10, 5))) == 0  # too few to say
    warm = [{"step": 0, "information_sum_nats": 0.0, "kl_weight": 0.0}] * 300
    assert rise(warm + log(*[5.0] * 100)) == 0


def correlated(one: int, other: int) -> np.ndarray:
    table = np.eye(4)
    table[one, other] = table[other, one] = 0.9
    return table


@pytest.mark.parametrize(
    ("facts", "word"),
    [
        ({}, "healthy"),
        ({"gain": 3.0, "other": -50.0, "zscore_square": np.ones((5, 4))}, "healthy"),
        ({"information": np.full(4, 0.01)}, "collapsed"),
        ({"gain": 90.0, "other": -5.0, "zscore_square": np.full((5, 4), 70.0)}, "repairing the denoiser"),
        ({"gain": 3.0, "other": 2.0, "zscore_square": np.ones((5, 4))}, "repairing the denoiser"),
        ({"gain": 6.0, "other": -9.0, "zscore_square": np.ones((5, 4))}, "healthy"),  # cheap latents, calibrated
        ({"gain": -1.0, "other": -9.0}, "redundant"),
        ({"zscore_square": np.full((5, 4), 0.2)}, "redundant"),
        ({"correlation": correlated(0, 1)}, "redundant"),
        ({"correlation": correlated(2, 3)}, "healthy"),  # of dead latents nothing is asked
        ({"rising": 0.3}, "undertrained"),
        ({"rising": 0.3, "gain": -1.0, "other": -9.0}, "undertrained"),
        ({"linear_r2": 0.97, "mcc": 0.6}, "tilted"),
        ({"linear_r2": 0.5, "mcc": 0.4}, "healthy"),  # other latents than the factors are no illness
        ({"linear_r2": 0.97, "mcc": 0.95}, "healthy"),
    ],
)
def test_rules(facts, word):
    health = diagnose(facts.pop("information", TOLD), 5.0, **facts)
    assert health.word == word
    assert bool(health.remedy) == (word != "healthy")
    assert str(health).startswith(f"{word}: ")


# ---- small trained models

SMALL = [
    *(
        "encoder.channels=[16,32,32]",
        "denoiser.channels=[8,16,16]",
        "train.encoder_warmup=1",
        "train.mode=staged",
        "kl_weight.kind=constant",
    ),
    *(
        "log.every=10",
        "log.tensorboard=false",
        "engine.threads=1",
        "checkpoint.every=10000",
        "report.images=512",
        "optimizer.warmup_steps=20",
    ),
]


def health_of_run(folder: Path) -> Health:
    run = open_run(folder)
    latents, guided = encode(run, run.model), guidance(run)
    scores = rate_scores(latents)
    assert all(map(math.isfinite, guidance_scores(guided, scores)["gain_by_level"]))
    return Health(**health_of(run, latents, guided, scores)["health"])


def test_a_collapsed_run_is_named(tmp_path):
    options = ["train.denoiser_steps=250", "train.steps=120", "kl_weight.start=3"]
    health = health_of_run(train(load_config("disks", [f"runs_dir={tmp_path}", *SMALL, *options])))
    assert health.word == "collapsed"
    assert health.remedy == "kl_weight.kind=auto"  # the stages, which are advised in general, it has


def test_a_weak_denoiser_is_named(tmp_path):
    """Ten steps of a denoiser: whatever the encoder learns beside it holds for all images."""
    options = ["train.denoiser_steps=10", "train.steps=250", "kl_weight.start=0.1"]
    health = health_of_run(train(load_config("disks", [f"runs_dir={tmp_path}", *SMALL, *options])))
    assert health.word == "repairing the denoiser"
    assert health.remedy == "denoiser.skip_logsnr=-5 and train.denoiser_steps=20"


def test_a_redundant_model_is_named_and_the_same_without_the_double_is_healthy():
    """Of a trained model with three latents, a fourth that reads what the first reads."""
    model = Sami.from_pretrained(Path(__file__).parent / "disks_model")
    data = load_config("disks").data
    images = open_dataset(data, 0, split=1).images(torch.arange(512))

    def verdict() -> Health:
        with torch.no_grad():
            posterior = model.encode(images)
        mu, var = posterior.mu.double().numpy(), posterior.var.double().numpy()
        z = posterior.draw(torch.arange(512), 0).double().numpy()
        latents = Latents(mu, var, z, kl_per_dim(mu, var), live_dims(information_per_dim(mu, var)))
        levels = np.linspace(model.schedule.logsnr_min, model.schedule.logsnr_max, 9)
        guided = guidance_profile(model, lambda index: images[index], 128, logsnr=levels, seed=0)
        assert latents.information is not None
        return diagnose(
            latents.information,
            float(latents.kl.sum()),
            gain=guided.total,
            other=guided.other_total,
            zscore_square=guided.zscore_square,
            correlation=correlation_matrix(z, z),
        )

    assert verdict().word == "healthy"
    encoder = model.encoder
    with torch.no_grad():
        told = information_per_dim(*(v.double().numpy() for v in encoder(images)))
        live, dead = int(told.argmax()), int(told.argmin())
        for head in (encoder.mu, encoder.raw_var):
            head.weight[dead], head.bias[dead] = head.weight[live], head.bias[live]
    assert verdict().word == "redundant"
