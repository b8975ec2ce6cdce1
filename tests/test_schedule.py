"""Noise levels: the map t -> logsnr and its slope, how t is sampled, how levels are weighted."""

import math

import pytest
import torch
from helpers import relative_error
from scipy import integrate, optimize, stats

from sami_fast.schedule import SCHEDULES, WEIGHTINGS, alpha_sigma

RANGES = [(-7.0, 5.0), (-12.0, 9.0), (-1.0, 2.0), (-20.0, 20.0)]
KINDS = sorted(SCHEDULES)
each_kind = pytest.mark.parametrize("kind", KINDS)
each_range = pytest.mark.parametrize("limits", RANGES)
times = torch.linspace(0, 1, 1001, dtype=torch.float64)


def raw_logsnr(kind: str, raw: float) -> float:
    """logsnr of the uncut schedules from their definitions of alpha_t."""
    if kind == "uniform_logsnr":
        return -raw
    if kind == "cosine":
        return math.log(math.cos(math.pi / 2 * raw) ** 2 / math.sin(math.pi / 2 * raw) ** 2)
    integral = integrate.quad(lambda s: 0.1 + (20.0 - 0.1) * s, 0, raw)[0]  # of the linear betas
    return math.log(math.exp(-integral) / -math.expm1(-integral))


# Values


@each_kind
@each_range
def test_endpoints(kind, limits):
    schedule = SCHEDULES[kind](*limits)
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        first, last = schedule.logsnr(torch.tensor([0.0, 1.0], dtype=dtype)).tolist()
        assert first == pytest.approx(limits[1], abs=limit)
        assert last == pytest.approx(limits[0], abs=1e-3 if (dtype, limits[0]) == (torch.float32, -20.0) else limit)
        assert schedule.t(torch.tensor(limits, dtype=dtype)).tolist() == pytest.approx([1.0, 0.0], abs=1e-6)


@each_kind
@each_range
def test_inverse(kind, limits):
    schedule = SCHEDULES[kind](*limits)
    assert (schedule.t(schedule.logsnr(times)) - times).abs().max() < 1e-9
    levels = torch.linspace(*limits, 500, dtype=torch.float64)
    assert (schedule.logsnr(schedule.t(levels)) - levels).abs().max() < 1e-9


@each_kind
@each_range
def test_decreasing_and_within_its_limits(kind, limits):
    for dtype in (torch.float64, torch.float32):
        logsnr = SCHEDULES[kind](*limits).logsnr(times.to(dtype))
        assert logsnr.dtype == dtype
        assert (logsnr.diff() <= 0).all()
        assert logsnr.min() >= limits[0]
        assert logsnr.max() <= limits[1]


@each_kind
@pytest.mark.parametrize("limits", RANGES[:3])
def test_definition(kind, limits):
    """The published alpha_t, cut at the limits and rescaled."""
    bracket = {"uniform_logsnr": (-50.0, 50.0), "cosine": (1e-9, 1 - 1e-9), "linear_beta": (1e-9, 1.5)}[kind]
    first, last = (optimize.brentq(lambda raw, level=level: raw_logsnr(kind, raw) - level, *bracket) for level in limits[::-1])
    schedule = SCHEDULES[kind](*limits)
    for t in (0.0, 0.01, 0.3, 0.5, 0.77, 1.0):
        assert schedule.logsnr(torch.tensor(t, dtype=torch.float64)).item() == pytest.approx(
            raw_logsnr(kind, first + t * (last - first)), abs=1e-6
        )


def test_variance_is_preserved():
    logsnr = torch.linspace(-30, 30, 1001, dtype=torch.float64)
    alpha_t, sigma_t = alpha_sigma(logsnr)
    assert (alpha_t**2 + sigma_t**2 - 1).abs().max() < 1e-15
    assert (torch.log(alpha_t**2 / sigma_t**2) - logsnr).abs().max() < 1e-12
    alpha_32, sigma_32 = alpha_sigma(logsnr.float())
    assert ((alpha_32 - alpha_t) / alpha_t).abs().max() < 2e-6
    assert ((sigma_32 - sigma_t) / sigma_t).abs().max() < 2e-6


@each_kind
def test_sampled_levels_cover_every_cell_once(kind):
    schedule = SCHEDULES[kind](-7.0, 5.0)
    for batch, levels in ((1, 1), (1, 5), (7, 3), (64, 4), (1000, 1)):
        t = schedule.sample(torch.arange(batch), levels, batch, seed=1, step=2)
        assert t.shape == (batch, levels)
        assert t.dtype == torch.float32
        cells = torch.arange(batch * levels) / (batch * levels)
        ordered = t.flatten().sort().values
        assert (ordered >= cells - 1e-6).all()
        assert (ordered <= cells + 1 / (batch * levels) + 1e-6).all()
        # the levels of one image lie in different strata, in order
        assert (t >= torch.arange(levels) / levels - 1e-6).all()
        assert (t <= (torch.arange(levels) + 1) / levels + 1e-6).all()


def test_sampled_levels_of_one_image_are_uniform_over_steps():
    schedule = SCHEDULES["cosine"](-7.0, 5.0)
    for batch, levels, place in ((1, 1, 0), (7, 1, 4), (5, 3, 2)):
        draws = torch.stack([schedule.sample(torch.tensor([place]), levels, batch, seed=0, step=s)[0] for s in range(300)]).double()
        for k in range(levels):
            within = draws[:, k] * levels - k  # place inside the stratum
            assert stats.kstest(within.numpy(), "uniform").pvalue > 1e-3


def test_time_power():
    schedule = SCHEDULES["uniform_logsnr"](-7.0, 5.0)
    for power in (0.5, 3.0):
        arguments = torch.arange(500), 2, 500
        t = schedule.sample(*arguments, seed=4, step=0, power=power)
        u = schedule.sample(*arguments, seed=4, step=0)
        assert relative_error(t, u ** (1 / power)) < 1e-6
        assert stats.kstest(t.flatten().double().numpy(), lambda x, a=power: x**a).statistic < 2e-3  # stratified: closer than chance


@pytest.mark.parametrize("power", [1.0, 3.0])
def test_samples_do_not_depend_on_the_split(power):
    schedule, batch = SCHEDULES["linear_beta"](-7.0, 5.0), 13
    options = {"seed": 2, "step": 9, "power": power}
    whole = schedule.sample(torch.arange(batch), 3, batch, **options)
    parts = [schedule.sample(torch.tensor(place), 3, batch, **options) for place in ([0], list(range(1, 6)), [12, 6], [7, 8, 9, 10, 11])]
    shuffled = torch.cat(parts)
    assert torch.equal(shuffled, whole[[0, *range(1, 6), 12, 6, *range(7, 12)]])


# First gradients


@each_kind
@each_range
def test_slope_is_the_derivative(kind, limits):
    schedule = SCHEDULES[kind](*limits)
    t = times[1:-1].clone().requires_grad_()
    (derivative,) = torch.autograd.grad(schedule.logsnr(t).sum(), t)
    assert ((schedule.slope(times[1:-1]) + derivative) / derivative).abs().max() < 1e-8
    assert schedule.slope(times).min() > 0
    assert schedule.slope(times).isfinite().all()
    assert schedule.slope(times.float()).isfinite().all()


# Weighting


def probe(logsnr):
    """A smooth function of the level that tells its two ends apart."""
    return torch.exp(-((logsnr - 1.0) ** 2) / 20) * (5.0 - logsnr) ** 2 / 20


def numeric(function, limits=(-7.0, 5.0)) -> float:
    return integrate.quad(lambda x: function(torch.tensor(x, dtype=torch.float64)).item(), *limits, epsabs=1e-10, limit=200)[0]


def assert_mean_is(expected: float, schedule, weighting: str, power: float, first: float = 0.0, probe=probe) -> None:
    """The weighted mean over sampled levels, within five of its standard errors and one of them small enough to mean something."""
    means, batch = [], 1000
    for step in range(12):
        t = schedule.sample(torch.arange(batch), 3, batch, seed=7, step=step, power=power, first=first).double()
        assert first <= t.min()
        means.append((schedule.weight(t, weighting, power, first) * probe(schedule.logsnr(t))).mean())
    means = torch.stack(means)
    standard_error = (means.std() / len(means) ** 0.5).item()
    assert standard_error < 3e-3 * expected
    assert abs(means.mean().item() - expected) < 5 * standard_error + 1e-5 * expected


@each_kind
@pytest.mark.parametrize("power", [1.0, 3.0])
def test_elbo_is_half_the_integral_over_logsnr(kind, power):
    assert_mean_is(0.5 * numeric(probe), SCHEDULES[kind](-7.0, 5.0), "elbo", power)


@each_kind
@pytest.mark.parametrize("power", [1.0, 3.0])
def test_an_integral_over_the_noisier_levels(kind, power):
    schedule = SCHEDULES[kind](-7.0, 5.0)
    first = schedule.t(torch.tensor(-1.0, dtype=torch.float64)).item()

    def vanishing(logsnr):  # at the first level, where the density of power 3 does
        return probe(logsnr + 6.0)

    assert_mean_is(0.5 * numeric(vanishing, (-7.0, -1.0)), schedule, "elbo", power, first, vanishing)


@each_kind
@pytest.mark.parametrize("power", [1.0, 3.0])
def test_simple_is_the_mean_over_t(kind, power):
    schedule = SCHEDULES[kind](-7.0, 5.0)
    assert_mean_is(numeric(lambda t: probe(schedule.logsnr(t)), (0.0, 1.0)), schedule, "simple", power)


@each_kind
@pytest.mark.parametrize("power", [1.0, 3.0])
def test_min_snr_is_the_truncated_mean_over_t(kind, power):
    schedule = SCHEDULES[kind](-7.0, 5.0)

    def integrand(t):
        logsnr = schedule.logsnr(t)
        return min(1.0, 5.0 / math.exp(logsnr.item())) * probe(logsnr)

    assert_mean_is(numeric(integrand, (0.0, 1.0)), schedule, "min_snr", power)


@each_kind
@pytest.mark.parametrize("power", [1.0, 3.0])
def test_sigmoid_weighs_the_integral_over_logsnr(kind, power):
    expected = 0.5 * numeric(lambda logsnr: probe(logsnr) / (1 + math.exp(logsnr.item() - 2.0)))
    assert_mean_is(expected, SCHEDULES[kind](-7.0, 5.0), "sigmoid", power)


@each_kind
def test_stratified_elbo_does_not_need_a_vanishing_end(kind):
    schedule = SCHEDULES[kind](-7.0, 5.0)
    t = schedule.sample(torch.arange(4000), 2, 4000, seed=0, step=0).double()
    found = (schedule.weight(t, "elbo") * torch.sigmoid(schedule.logsnr(t))).mean().item()
    assert found == pytest.approx(0.5 * (math.log1p(math.exp(5.0)) - math.log1p(math.exp(-7.0))), rel=1e-3)


# Odd inputs


@each_kind
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_are_finite_everywhere(kind, weighting):
    for limits in (*RANGES, (-30.0, 30.0)):
        schedule = SCHEDULES[kind](*limits)
        for dtype in (torch.float32, torch.float64):
            weight = schedule.weight(times.to(dtype), weighting)
            assert weight.shape == times.shape
            assert weight.isfinite().all()
            assert weight.min() >= 0
    for power in (0.1, 3.0, 100.0):
        t = SCHEDULES[kind](-7.0, 5.0).sample(torch.arange(1000), 4, 1000, seed=0, step=0, power=power)
        assert SCHEDULES[kind](-7.0, 5.0).weight(t, weighting, power).isfinite().all()


@each_kind
def test_empty_batch(kind):
    schedule = SCHEDULES[kind](-7.0, 5.0)
    t = schedule.sample(torch.zeros(0, dtype=torch.int64), 3, 10, seed=0, step=0)
    assert t.shape == schedule.logsnr(t).shape == schedule.weight(t, "elbo").shape == (0, 3)


# Error messages


@each_kind
def test_unknown_weighting(kind):
    with pytest.raises(ValueError, match="weighting: expected one of elbo, simple, min_snr, sigmoid, found 'ELBO'"):
        SCHEDULES[kind](-7.0, 5.0).weight(times, "ELBO")


@each_kind
@pytest.mark.parametrize("limits", [(5.0, -7.0), (1.0, 1.0)])
def test_limits_out_of_order(kind, limits):
    with pytest.raises(ValueError, match=f"logsnr_min: expected less than logsnr_max = {limits[1]}, found {limits[0]}"):
        SCHEDULES[kind](*limits)
