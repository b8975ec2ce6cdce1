"""The negative ELBO on Gaussian data with exact denoisers: every term against closed form, the total against the true likelihood.

x_0 ~ N(m, C) with eigenvectors u_i and variances A_i; z_j ~ N(b_j u_j (x_0 - m), v_j) for the first three; n_i = e^logsnr A_i.

    silent    b = 0: z carries nothing, guidance is 0
    exact     b_j^2 A_j + v_j = 1, so that z ~ N(0, I), and the encoder is the true q(z|x_t) at every level. No encoder that sees x_t
              alone can be that: this one recognises the noisy images which the denoiser saw last
    blind     the same q(z|x_0), used at every noise level as the model does: the guidance is wrong, and the bound not tight

Where the model is exact, and A_i' = A_i v_i is what z leaves of the variance along an informed u_i (A_i along the others),

    diffusion        1/2 integral sum_i n_i' / (1 + n_i') d logsnr = 1/2 sum_i ln (1 + n_i') between logsnr_min and logsnr_max
    reconstruction   1/2 sum_i (A_i' / (1 + n_i') / decoder_var + ln 2 pi decoder_var) at logsnr_max
    KL               -1/2 sum_j ln v_j

and their sum, with the prior's KL, is E[-ln p(x_0)] but for the two ends. For the blind encoder eps - eps_hat is linear in (x_0, eps,
the noise of z), which gives the integrand in closed form; the integral is left to quadrature.
"""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import multivariate_normal

from sami_fast.methods.sami import Sami
from sami_fast.metrics.bound import Bound, fit_decoder_var, negative_elbo
from sami_fast.schedule import SCHEDULES, alpha_sigma

SHAPE = (2, 2, 2)
D, INFORMED = 8, 3
VARIANCES = torch.tensor([1.5, 0.6, 0.3, 0.2, 0.1, 0.05, 0.05, 0.02], dtype=torch.float64)
LATENT_VAR = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)  # v
U = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
MEAN = torch.linspace(-0.4, 0.5, D, dtype=torch.float64)
N = 100_000
LOW, HIGH = 0.0, 3.0  # a short range: the terms of its two ends count
VERY_LOW, VERY_HIGH = -9.0, 8.0
CASES = ("silent", "exact", "blind")


def images(index: torch.Tensor, first: int = 0) -> torch.Tensor:
    table = torch.randn(N, D, generator=torch.Generator().manual_seed(5 + first), dtype=torch.float64)
    return (MEAN + table[index] * VARIANCES.sqrt() @ U.T).view(-1, *SHAPE)


class Model:
    def __init__(self, case: str, kind: str = "cosine", low: float = LOW, high: float = HIGH) -> None:
        self.case, self.low, self.high, self.schedule = case, low, high, SCHEDULES[kind](low, high)
        self.v = torch.ones(INFORMED, dtype=torch.float64) if case == "silent" else LATENT_VAR
        self.b = ((1 - self.v) / VARIANCES[:INFORMED]).sqrt()
        self.seen, self.levels = torch.empty(0), None
        self.sami = Sami(self.encoder, self.denoiser, self.schedule)

    def denoiser(self, x_t, t):
        self.seen, self.levels = x_t, alpha_sigma(self.schedule.logsnr(t)[:, None])
        alpha_t, sigma_t = self.levels
        centred = (x_t.flatten(1) - alpha_t * MEAN) @ U
        return (sigma_t * centred / (alpha_t**2 * VARIANCES + sigma_t**2) @ U.T).view_as(x_t)

    def encoder(self, x):
        along = (x.flatten(1) - MEAN) @ U[:, :INFORMED]
        var = self.v.expand_as(along)
        if self.case == "exact" and torch.equal(x.detach(), self.seen):  # x_0 averaged over p(x_0|x_t)
            alpha_t, sigma_t = self.levels
            gain = 1 / (alpha_t**2 * VARIANCES[:INFORMED] + sigma_t**2)
            along = alpha_t * VARIANCES[:INFORMED] * gain * ((x.flatten(1) - alpha_t * MEAN) @ U[:, :INFORMED])
            var = self.v + self.b**2 * VARIANCES[:INFORMED] * sigma_t**2 * gain
        return self.b * along, var

    def squared_error(self, logsnr: float, guided: bool = True) -> float:
        """E ||eps - eps_hat||^2, eps_hat = eps_theta - sigma_t grad log q(z|x_t)."""
        alpha_t, sigma_t = (float(v) for v in alpha_sigma(torch.tensor(logsnr, dtype=torch.float64)))
        left = VARIANCES.clone()
        if guided and self.case == "exact":
            left[:INFORMED] *= self.v
        snr = math.exp(logsnr) * left
        if self.case != "blind" or not guided:
            return float((snr / (1 + snr)).sum())
        # Along u_i: eps - eps_theta + sigma_t b (z - b (x_t - m)) / v, a sum over x_0 - m, eps, the noise of z, and m itself, for
        # which the encoder takes x_t for a clean image.
        denoise = sigma_t / (alpha_t**2 * VARIANCES + sigma_t**2)
        pull = torch.cat((sigma_t * self.b**2 / self.v, torch.zeros(D - INFORMED)))
        from_x_0 = -alpha_t * denoise + (1 - alpha_t) * pull
        from_eps = 1 - sigma_t * denoise - sigma_t * pull
        from_z = (sigma_t * self.b / self.v.sqrt()).square().sum()
        from_mean = (1 - alpha_t) * pull * (MEAN @ U)
        return float((from_x_0.square() * VARIANCES + from_eps.square() + from_mean.square()).sum() + from_z)

    def expected(self, decoder_var: float) -> dict[str, float]:
        """Mean of each term over data and noise, and of the total, nats."""
        alpha_1, sigma_1 = (float(v) for v in alpha_sigma(torch.tensor(self.low, dtype=torch.float64)))
        second_moment = float(VARIANCES.sum() + MEAN.square().sum())
        x_hat_error = math.exp(-self.high) * self.squared_error(self.high)
        terms = {
            "diffusion": 0.5 * quad(self.squared_error, self.low, self.high, epsabs=1e-9)[0],
            "kl": float(-0.5 * self.v.log().sum()),
            "prior": 0.5 * (alpha_1**2 * second_moment + D * (sigma_1**2 - 1 - 2 * math.log(sigma_1))),
            "reconstruction": 0.5 * (x_hat_error / decoder_var + D * math.log(2 * math.pi * decoder_var)),
        }
        unguided = 0.5 * quad(lambda logsnr: self.squared_error(logsnr, guided=False), self.low, self.high, epsabs=1e-9)[0]
        return terms | {"total": sum(terms.values()), "unguided": unguided}


ENTROPY = 0.5 * float((2 * math.pi * math.e * VARIANCES).log().sum())  # E[-ln p(x_0)]
DECODER_VAR = 0.5 * math.exp(-HIGH)  # deliberately not the best


@pytest.fixture(params=CASES, scope="module")
def case(request) -> tuple[Model, Bound]:
    model = Model(request.param)
    return model, negative_elbo(model.sami, images, N, seed=3, decoder_var=DECODER_VAR, eight_bit=False, batch_size=5000)


def minus_log_p() -> np.ndarray:
    """-ln p(x_0) of the images. [N] nats."""
    density = multivariate_normal(MEAN.numpy(), (U * VARIANCES @ U.T).numpy())
    return -density.logpdf(images(torch.arange(N)).flatten(1).numpy())


def test_the_entropy_is_that_of_the_data():
    values = minus_log_p()
    assert values.mean() == pytest.approx(ENTROPY, abs=3 * values.std() / math.sqrt(N))


@pytest.mark.parametrize("term", ["diffusion", "unguided", "kl", "prior", "reconstruction", "total"])
def test_each_term_is_the_analytic_value(case, term):
    """Within 3 standard errors, which are below 1 % of the value: a factor or a term that was forgotten fails by far."""
    model, bound = case
    values, expected = getattr(bound, term), model.expected(DECODER_VAR)[term]
    if model.case == "silent" and term == "kl":
        assert (values == 0).all()
        return
    error = values.std(ddof=1) / math.sqrt(N)
    assert error < 0.01 * abs(expected)
    assert values.mean() == pytest.approx(expected, abs=3 * error)


def test_every_term_counts_in_the_total(case):
    model, bound = case
    for term, expected in model.expected(DECODER_VAR).items():
        assert abs(expected) > 8 * bound.standard_error or (model.case, term) == ("silent", "kl")


def test_the_analytic_integrals_of_the_exact_models():
    """The quadrature above gives the closed forms at the top of this file."""
    for name, left in (("silent", VARIANCES), ("exact", torch.cat((VARIANCES[:INFORMED] * LATENT_VAR, VARIANCES[INFORMED:])))):
        closed = 0.5 * float((torch.log1p(math.exp(HIGH) * left) - torch.log1p(math.exp(LOW) * left)).sum())
        assert Model(name).expected(1.0)["diffusion"] == pytest.approx(closed, rel=1e-8)


def test_decoder_variance_is_the_analytic_value(case):
    model, _ = case
    found = fit_decoder_var(model.sami, lambda index: images(index, first=1), N, seed=4, batch_size=5000)
    expected = math.exp(-HIGH) * model.squared_error(HIGH) / D
    assert found == pytest.approx(expected, rel=4 * math.sqrt(2 / (N * D)))


@pytest.mark.parametrize("name", ["silent", "exact"])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_bound_of_an_exact_model_is_tight(name, kind):
    model = Model(name, kind, VERY_LOW, VERY_HIGH)
    decoder_var = math.exp(-VERY_HIGH) * model.squared_error(VERY_HIGH) / D
    gap = model.expected(decoder_var)["total"] - ENTROPY
    assert 0 < gap < 0.002  # nats, of the two ends: one variance for all directions, and x_1 that is not quite N(0, I)
    bound = negative_elbo(model.sami, images, N, seed=3, decoder_var=decoder_var, eight_bit=False, batch_size=5000)
    difference = bound.total - minus_log_p()
    error = difference.std(ddof=1) / math.sqrt(N)
    assert error < 0.005 * bound.diffusion.mean()
    assert difference.mean() == pytest.approx(gap, abs=3 * error)


def test_the_bound_lies_above_the_likelihood_by_the_analytic_gap(case):
    """Of the two ends, and for the blind encoder also of what it makes of noisy images."""
    model, bound = case
    gap = model.expected(DECODER_VAR)["total"] - ENTROPY
    difference = bound.total - minus_log_p()
    error = difference.std(ddof=1) / math.sqrt(N)
    assert difference.mean() == pytest.approx(gap, abs=3 * error)
    assert difference.mean() > 10 * error
    tight = Model("exact").expected(DECODER_VAR)["total"] - ENTROPY
    assert gap > tight + 0.5 if model.case == "blind" else gap < tight + 1e-9
