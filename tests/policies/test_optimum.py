"""The formulas against what they stand for: failures drawn at random, and a search for the least waste."""

from __future__ import annotations

import math
import random

import pytest

from holdfast.policies.optimum import best_interval, daly_interval, expected_seconds, wasted, young_interval

CASES = [(0.5, 6 * 3600.0, 60.0), (10.0, 3600.0, 30.0), (60.0, 3600.0, 300.0), (300.0, 1800.0, 60.0)]


def lived_through(period: float, mtbf: float, recovery: float, chance: random.Random) -> float:
    """Go through one period: failures come when they come, and each is followed by a recovery, itself not spared."""
    passed = 0.0
    needed = period
    while True:
        failure = chance.expovariate(1 / mtbf)
        if failure >= needed:
            return passed + needed
        passed += failure
        needed = recovery + period


@pytest.mark.parametrize(("save", "mtbf", "recovery"), CASES)
def test_the_expected_time_is_that_of_random_failures(save: float, mtbf: float, recovery: float) -> None:
    """The draws are the same each time (the seed is fixed), so this cannot fail by bad luck."""
    chance = random.Random(1)
    for period in (mtbf / 10, mtbf / 2, mtbf):
        many = 40_000
        mean = sum(lived_through(period, mtbf, recovery, chance) for _ in range(many)) / many
        assert mean == pytest.approx(expected_seconds(period, mtbf, recovery), rel=0.015)


@pytest.mark.parametrize(("save", "mtbf", "recovery"), CASES)
def test_nothing_near_the_optimum_wastes_less(save: float, mtbf: float, recovery: float) -> None:
    """Daly's interval against the least of a fine search over the exact expectation."""
    least = min(wasted([period], save, mtbf, recovery) for period in (save * 1.01**i for i in range(1, 2000)))
    at_daly = wasted([daly_interval(save, mtbf)], save, mtbf, recovery)
    at_young = wasted([young_interval(save, mtbf)], save, mtbf, recovery)
    assert at_daly < least * 1.002
    assert at_daly < at_young, "the higher order is worth its terms"


def test_the_higher_order_finds_the_interval_itself() -> None:
    """Waste is flat around its least, so the interval is compared too: within 0.2 %, where Young's is 3 % off."""
    for save, mtbf in ((1.0, 3600.0), (10.0, 3600.0), (36.0, 3600.0)):
        young = young_interval(save, mtbf)
        tried = [young * (0.9 + i / 10_000) for i in range(2500)]
        least = min(tried, key=lambda period: wasted([period], save, mtbf, 0.0))
        assert daly_interval(save, mtbf) == pytest.approx(least, rel=0.002)


def test_the_ends_of_the_range() -> None:
    assert daly_interval(0, 3600) == 0
    assert daly_interval(7200, 3600) == 3600 + 7200
    assert young_interval(50, 3600) == 600
    assert best_interval(50, 3600, 0.01) == 5000
    assert expected_seconds(1e9, 1.0, 0.0) == math.inf
    assert wasted([1e9], 1.0, 1.0, 0.0) == 1.0
    assert wasted([], 1.0, 1.0, 0.0) == 0.0
    assert wasted([100.0], 1.0, 1e15, 0.0) == pytest.approx(0.01)
