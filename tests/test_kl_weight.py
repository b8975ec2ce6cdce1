"""beta over the joint steps: fixed courses and the controller."""

import math
from types import SimpleNamespace

import pytest

from sami_fast.config import KLWeightConfig
from sami_fast.kl_weight import KLWeight


def settings(**changes) -> SimpleNamespace:
    base = {"kind": "constant", "start": 0.25, "end": 0.08, "fraction": 0.8, "target": 0.0, "gain": 0.002, "low": 1e-3, "high": 1.0}
    return SimpleNamespace(**base | changes)


# Values


def test_constant():
    weight = KLWeight(settings(), 100)
    assert [weight(step) for step in (0, 50, 1000)] == [0.25] * 3
    assert weight.reference == 0.25


def test_linear():
    weight = KLWeight(settings(kind="linear", start=0.0, end=0.4), 100)
    assert [weight(step) for step in (0, 20, 40, 80, 81, 1000)] == pytest.approx([0.0, 0.1, 0.2, 0.4, 0.4, 0.4])
    assert weight.reference == 0.4


def test_exponential():
    weight = KLWeight(settings(kind="exponential", start=0.25, end=0.01), 100)
    assert [weight(step) for step in (0, 40, 80, 99)] == pytest.approx([0.25, 0.05, 0.01, 0.01])
    ratios = [weight(step + 1) / weight(step) for step in range(79)]
    assert ratios == pytest.approx([ratios[0]] * 79)
    assert weight.reference == 0.01


def test_courses_may_rise():
    for kind in ("linear", "exponential"):
        course = KLWeight(settings(kind=kind, start=0.01, end=1.0), 50)
        values = [course(step) for step in range(60)]
        assert values == sorted(values)
        assert values[-1] == pytest.approx(1.0)


def test_a_config_section_fits():
    weight = KLWeight(KLWeightConfig(), 1000)
    assert weight(0) == KLWeightConfig().start
    assert weight(999) == pytest.approx(KLWeightConfig().end)


def test_only_the_controller_observes():
    for kind in ("constant", "linear", "exponential"):
        weight = KLWeight(settings(kind=kind), 10)
        before = weight(3)
        weight.observe(1e6)
        assert weight(3) == before


# The controller


def held(weight: KLWeight, response, steps: int) -> list[float]:
    """KL at every step of an encoder that follows beta with a delay."""
    kl, course = 0.0, []
    for step in range(steps):
        kl += 0.05 * (response(weight(step)) - kl)
        weight.observe(kl)
        course.append(kl)
    return course


@pytest.mark.parametrize("target", [2.0, 5.0, 12.0])
@pytest.mark.parametrize("start", [0.002, 0.05, 0.9])
def test_controller_drives_the_kl_to_its_target(target, start):
    weight = KLWeight(settings(kind="controller", start=start, target=target, gain=0.01), 4000)
    assert weight(0) == weight.reference == start
    course = held(weight, lambda beta: -4.0 * math.log(beta), 4000)
    assert course[-500:] == pytest.approx([target] * 500, rel=0.01)
    assert weight(0) == pytest.approx(math.exp(-target / 4.0), rel=0.02)


def test_controller_step():
    weight = KLWeight(settings(kind="controller", start=0.1, target=10.0, gain=0.02), 1)
    weight.observe(15.0)
    assert weight(0) == pytest.approx(0.1 * math.exp(0.02 * 0.5))
    weight.observe(5.0)
    assert weight(0) == pytest.approx(0.1)


@pytest.mark.parametrize("kl", [1e9, math.inf])
def test_one_wild_measurement_moves_beta_by_the_gain_at_most(kl):
    weight = KLWeight(settings(kind="controller", start=0.1, target=10.0, gain=0.02), 1)
    weight.observe(kl)
    assert weight(0) == pytest.approx(0.1 * math.exp(0.02))
    weight.observe(0.0)
    assert weight(0) == pytest.approx(0.1)


def test_bounds_hold():
    weight = KLWeight(settings(kind="controller", start=0.1, target=5.0, gain=0.5, low=0.02, high=0.4), 1)
    for kl, bound in ((100.0, 0.4), (0.0, 0.02)):
        for _ in range(50):
            weight.observe(kl)
            assert 0.02 <= weight(0) <= 0.4
        assert weight(0) == bound


# Odd inputs


@pytest.mark.parametrize("kind", ["linear", "exponential"])
@pytest.mark.parametrize("joint_steps", [0, 1])
def test_runs_without_room_for_a_course(kind, joint_steps):
    weight = KLWeight(settings(kind=kind), joint_steps)
    assert weight(0) == pytest.approx(0.25)
    assert weight(1) == pytest.approx(0.08)
