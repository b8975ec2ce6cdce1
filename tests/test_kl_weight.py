"""beta over the joint steps: fixed courses and the controller."""

import json
import math
from types import SimpleNamespace

import pytest

from sami_fast.config import KLWeightConfig
from sami_fast.kl_weight import KLWeight


def settings(**changes) -> SimpleNamespace:
    base = {"kind": "constant", "start": 0.25, "end": 0.08, "fraction": 0.8, "target": 0.0, "gain": 0.002, "low": 1e-3, "high": 1.0}
    base |= {"search": 0.04, "rebound": 1.0, "fall": 0.2, "patience": 1.0, "sharpest": 4.0, "settle": 0.0}
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


def test_fixed_courses_do_not_observe():
    for kind in ("constant", "linear", "exponential"):
        weight = KLWeight(settings(kind=kind), 10)
        before = weight(3)
        weight.observe(0, 1e6, [])
        assert weight(3) == before


# The controller


def held(weight: KLWeight, response, steps: int) -> list[float]:
    """KL at every step of an encoder that follows beta with a delay."""
    kl, course = 0.0, []
    for step in range(steps):
        kl += 0.05 * (response(weight(step)) - kl)
        weight.observe(0, kl, [])
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
    weight.observe(0, 15.0, [])
    assert weight(0) == pytest.approx(0.1 * math.exp(0.02 * 0.5))
    weight.observe(0, 5.0, [])
    assert weight(0) == pytest.approx(0.1)


@pytest.mark.parametrize("kl", [1e9, math.inf])
def test_one_wild_measurement_moves_beta_by_the_gain_at_most(kl):
    weight = KLWeight(settings(kind="controller", start=0.1, target=10.0, gain=0.02), 1)
    weight.observe(0, kl, [])
    assert weight(0) == pytest.approx(0.1 * math.exp(0.02))
    weight.observe(0, 0.0, [])
    assert weight(0) == pytest.approx(0.1)


def test_bounds_hold():
    weight = KLWeight(settings(kind="controller", start=0.1, target=5.0, gain=0.5, low=0.02, high=0.4), 1)
    for kl, bound in ((100.0, 0.4), (0.0, 0.02)):
        for _ in range(50):
            weight.observe(0, kl, [])
            assert 0.02 <= weight(0) <= 0.4
        assert weight(0) == bound


# auto


def alive(weight: KLWeight, threshold: float, steps: int) -> list[float]:
    """beta at every step, with a latent that comes alive below a threshold and then holds more, the lower beta is."""
    told, course = 1e-3, []
    for step in range(steps):
        beta = weight(step)
        course.append(beta)
        wanted = max(1e-3, 2 * math.log(threshold / beta)) if beta < threshold else 1e-3
        told += 0.05 * (wanted - told)
        weight.observe(step, 1.0, [0.01, told])
    return course


@pytest.mark.parametrize("threshold", [0.5, 0.2, 0.05])
def test_auto_falls_until_a_latent_lives_and_then_slowly_until_it_is_sharp(threshold):
    weight = KLWeight(settings(kind="auto", start=1.0), 2000)
    course = alive(weight, threshold, 2000)
    assert course[0] == 1.0
    assert course[80] == pytest.approx(0.5, rel=0.05)  # halves every 4 % of the steps
    beta = course[weight.found]
    assert 0.5 * threshold < beta < threshold  # found a little late, as information takes time to grow
    sharp = threshold * math.exp(-2.0)  # where the latent holds 4 nats
    lowest = min(course)
    assert lowest == pytest.approx(sharp, rel=0.2) or lowest > sharp  # held there, or not yet reached
    assert course[-1] < beta


@pytest.mark.parametrize(
    ("growth", "patience", "halvings"),
    [(0.0, 1.0, 1.0), (-0.01, 1.0, 1.0), (0.0025, 1.0, 0.5), (0.0025, 0.5, 0.75), (0.02, 1.0, 0.0), (0.02, 0.0, 1.0)],
    ids=["none", "negative", "half of it", "half the patience", "ample", "no patience"],
)
def test_auto_waits_for_a_latent_that_grows(growth, patience, halvings):
    weight = KLWeight(settings(kind="auto", start=1.0, patience=patience), 2000)  # halves every 400 steps
    weight.restore({"controlled": 0.1, "information": [2.0], "found": 0, "growth": growth})
    for step in range(20):  # 2 nats are missing: 0.005 a step would bring them in the time of a halving
        smooth = weight.information[0] + growth
        weight.observe(step, 1.0, [weight.information[0] + growth / 0.05])
        assert weight.information[0] == pytest.approx(smooth)
    assert weight(20) == pytest.approx(0.1 * 0.5 ** (halvings * 20 / 400), rel=2e-3)


def test_auto_is_held_where_the_sharpest_latent_is():
    weight = KLWeight(settings(kind="auto", start=1.0, fall=0.05), 4000)
    course = alive(weight, 0.3, 4000)
    assert course[2000:] == pytest.approx([0.3 * math.exp(-2.0)] * 2000, rel=0.05)


def test_auto_falls_no_further_at_the_end():
    """From there on it may only rise, where a latent is too sharp; and where none lives it goes on looking for one."""
    weight = KLWeight(settings(kind="auto", start=1.0, settle=0.3), 1000)
    course = alive(weight, 0.3, 1000)
    assert course[699] < course[600]
    assert course[700:] == [course[700]] * 300
    weight.observe(1000, 1.0, [0.0, 400.0])
    assert weight(1001) > course[700]
    nothing = alive(KLWeight(settings(kind="auto", start=1.0, settle=0.3, low=1e-9), 1000), 0.0, 1000)
    assert nothing[999] == pytest.approx(0.5 * nothing[959], rel=1e-6)


def test_auto_may_rebound():
    weight = KLWeight(settings(kind="auto", start=1.0, rebound=1.5), 1000)
    course = alive(weight, 0.2, 1000)
    assert course[weight.found + 1] == pytest.approx(1.5 * course[weight.found], rel=0.01)


def test_auto_rises_past_its_rebound_where_latents_are_too_sharp():
    """Latents that came alive late, at a beta far below the one that holds them where they should be."""
    weight = KLWeight(settings(kind="auto", start=1.0, fall=0.05, rebound=1.5), 4000)
    course, told = [], 1e-3
    for step in range(4000):
        course.append(weight(step))
        threshold = 0.05 if told < 0.1 else 1.0  # what lives holds on
        told += 0.05 * ((2 * math.log(threshold / course[-1]) if course[-1] < threshold else 1e-3) - told)
        weight.observe(step, 1.0, [told])
    assert course[weight.found] < 0.05
    assert max(course[weight.found :]) > 1.5 * 0.05
    assert course[-1] == pytest.approx(math.exp(-2.0), rel=0.1)


def test_auto_searches_on_from_a_rebound_that_no_latent_survives():
    """At the higher beta all die; far below it one lives again."""
    weight = KLWeight(settings(kind="auto", start=1.0, rebound=2.0), 2000)
    threshold, told, course, died = 0.5, 1e-3, [], None
    for step in range(2000):
        course.append(weight(step))
        if weight.found is not None and course[-1] > threshold:
            threshold = 0.2  # what has died wakes later
        told += 0.05 * ((2 * math.log(threshold / course[-1]) if course[-1] < threshold else 1e-3) - told)
        weight.observe(step, 1.0, [told])
        if weight.found is not None and weight.asleep and died is None:
            died = step
        assert weight.searching == weight.asleep
    assert course[weight.found + 1] == pytest.approx(2 * course[weight.found], rel=0.02)
    assert died - weight.found < 200  # of 2000 steps, in which a halving takes 400 while a latent lives
    assert course[died + 80] == pytest.approx(course[died] / 2, rel=0.02)  # halves every 4 % of the steps again
    assert weight.highest == pytest.approx(course[died], rel=0.02)
    assert max(course[died + 1 :]) <= weight.highest
    assert not weight.asleep
    assert min(course) < 0.2 * math.exp(-1.0)


def test_auto_wakes_latents_at_a_low_start_and_prunes_them_at_a_high_rebound():
    """Two latents come alive together; the one that is worth less dies at the rebound and comes back as beta falls."""
    weight, worth, told, lives = KLWeight(settings(kind="auto", start=0.03, rebound=4.0), 2000), (0.3, 0.06), [1e-3] * 2, []
    for step in range(2000):
        beta = weight(step)
        told = [old + 0.05 * ((2 * math.log(most / beta) if beta < most else 1e-3) - old) for old, most in zip(told, worth, strict=True)]
        weight.observe(step, 1.0, told)
        lives.append([nats > 0.05 for nats in told])
    assert weight.found < 40
    assert lives[weight.found] == [True, True]
    assert lives[weight.found + 150] == [True, False]
    assert lives[-1] == [True, True]
    assert weight.highest == 1.0


def test_a_restart_has_all_of_beta_lower():
    """Its first and its least: where the first try came down to its least, nothing else would be another one."""
    weight = KLWeight(settings(kind="auto", start=0.03, low=0.015, fall=0.05), 1000, 1 / 3)
    course = alive(weight, 0.02, 1000)
    assert course[0] == pytest.approx(0.01)
    assert min(course) == pytest.approx(0.005)
    nothing = KLWeight(settings(kind="auto", start=0.03, low=0.015), 1000, 1 / 3)
    assert alive(nothing, 0.0, 1000)[-1] == pytest.approx(0.005)
    assert not nothing.searching
    assert KLWeight(settings(kind="controller", target=1.0, start=0.03, low=0.03), 10, 1 / 3).low == 0.03


def test_auto_finds_nothing_where_nothing_lives():
    weight = KLWeight(settings(kind="auto", start=1.0, low=0.01), 500)
    course = alive(weight, 0.0, 500)
    assert weight.found is None
    assert course[-1] == 0.01


def test_auto_takes_one_lucky_batch_for_noise():
    weight = KLWeight(settings(kind="auto", start=1.0), 500)
    weight.observe(0, 1.0, [2.0, 0.0])
    assert weight.found is None


@pytest.mark.parametrize("stop", [0, 30, 200, 900])
@pytest.mark.parametrize("kind", ["auto", "controller", "exponential"])
def test_a_restored_course_goes_on_as_if_nothing_had_happened(kind, stop):
    changes = {"kind": kind, "target": 2.0}
    whole = KLWeight(settings(start=1.0, **changes), 1000)
    expected, resumed = [], []
    for weight, course in ((whole, expected), (KLWeight(settings(start=1.0, **changes), 1000), resumed)):
        told = 1e-3
        for step in range(1000):
            if weight is not whole and step == stop:
                state = json.loads(json.dumps(weight.state))
                weight = KLWeight(settings(start=1.0, **changes), 1000)
                weight.restore(state)
            beta = weight(step)
            course.append(beta)
            told = min(3.0, told * math.exp(0.2 if beta < 0.2 else -0.02))
            weight.observe(step, 3.0 * told, [told, 0.0])
    assert resumed == expected


def test_a_checkpoint_that_says_where_latents_woke_is_read():
    weight = KLWeight(settings(kind="auto"), 100)
    weight.restore(weight.state | {"controlled": 0.1, "found": 3, "woken": 0.2})
    assert (weight(5), weight.found) == (0.1, 3)


def test_a_checkpoint_of_before_auto_holds_the_controllers_beta_alone():
    weight = KLWeight(settings(kind="controller", target=1.0), 10)
    weight.restore(0.125)
    assert weight(3) == 0.125


# Odd inputs


@pytest.mark.parametrize("kind", ["linear", "exponential"])
@pytest.mark.parametrize("joint_steps", [0, 1])
def test_runs_without_room_for_a_course(kind, joint_steps):
    weight = KLWeight(settings(kind=kind), joint_steps)
    assert weight(0) == pytest.approx(0.25)
    assert weight(1) == pytest.approx(0.08)
