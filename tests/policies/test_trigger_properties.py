"""What holds of triggers for every history of the clock."""

from __future__ import annotations

import math
from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.core.clock import Clock
from holdfast.core.records import Moment, Observation
from holdfast.policies import at, best, decide, every, improves, log_spaced, on, relevant

PROFILE = settings(derandomize=True, max_examples=200, deadline=None, database=None)

# A run: how far the clock moves at each safe point, and where a resume takes it back to an earlier one.
JUMPS = st.lists(st.integers(0, 60), min_size=1, max_size=40)
RESUMES = st.sets(st.integers(0, 39), max_size=4)


def moments(jumps: list[int], resumes: set[int]) -> list[Moment]:
    seen, made = [Clock()], []
    for index, jump in enumerate(jumps):
        previous = seen[len(seen) // 2] if index in resumes else seen[-1]
        step = previous.step + jump
        now = Clock(step, step // 7, step * 3, step * 1000, step * 0.25)
        made.append(Moment(previous, now))
        seen.append(now)
    return made


@PROFILE
@given(JUMPS, RESUMES, st.integers(1, 50), st.data())
def test_every_fires_exactly_when_a_grid_point_is_passed(jumps, resumes, interval, data) -> None:
    offset = data.draw(st.integers(0, interval - 1))
    trigger = every(steps=interval, offset=offset)
    for moment in moments(jumps, resumes):
        passed = range(moment.previous.step + 1, moment.now.step + 1)
        assert bool(decide(trigger, moment)) is any(step % interval == offset for step in passed)


@PROFILE
@given(JUMPS, RESUMES, st.sampled_from(["epochs", "samples", "tokens"]), st.integers(1, 50))
def test_every_counts_in_its_own_unit(jumps, resumes, unit, interval) -> None:
    trigger = every(**{unit: interval})
    for moment in moments(jumps, resumes):
        field = "epoch" if unit == "epochs" else unit
        before, now = getattr(moment.previous, field), getattr(moment.now, field)
        points = [i * interval for i in range(1, now // interval + 1)]
        assert bool(decide(trigger, moment)) is any(before < point <= now for point in points)


@PROFILE
@given(JUMPS, RESUMES, st.integers(1, 200))
def test_every_in_seconds_agrees_with_exact_arithmetic(jumps, resumes, eighths) -> None:
    trigger, length = every(seconds=eighths / 8), Fraction(eighths, 8)
    for moment in moments(jumps, resumes):
        before, now = Fraction(moment.previous.active_seconds), Fraction(moment.now.active_seconds)
        assert bool(decide(trigger, moment)) is (math.floor(now / length) > math.floor(before / length))


@PROFILE
@given(JUMPS, RESUMES, st.sets(st.integers(1, 800), min_size=1, max_size=8))
def test_at_fires_exactly_when_a_listed_step_is_passed(jumps, resumes, listed) -> None:
    trigger = at(listed)
    for moment in moments(jumps, resumes):
        passed = range(moment.previous.step + 1, moment.now.step + 1)
        assert bool(decide(trigger, moment)) is any(step in listed for step in passed)


@PROFILE
@given(JUMPS, RESUMES, st.sampled_from([1.1, 1.5, 2, 3, 10]), st.one_of(st.none(), st.integers(1, 500)))
def test_log_spaced_fires_exactly_when_a_power_is_passed(jumps, resumes, base, until) -> None:
    powers = {math.ceil(base**i) for i in range(100)}
    for moment in moments(jumps, resumes):
        passed = range(moment.previous.step + 1, min(moment.now.step, until or moment.now.step) + 1)
        fires = bool(decide(log_spaced(base, until), moment))
        assert fires is any(step in powers for step in passed)


VALUES = st.one_of(st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 0.5, 1.0]), st.floats(-2, 2))
HISTORY = st.lists(st.tuples(st.sampled_from(["loss", "loss", "other"]), VALUES), max_size=20)
MODES = st.sampled_from(["min", "max"])


@PROFILE
@given(HISTORY, VALUES, MODES)
def test_best_fires_exactly_on_a_new_best(history, value, mode) -> None:
    past = [v for name, v in history if name == "loss" and math.isfinite(v)]
    top = (min(past) if mode == "min" else max(past)) if past else None
    moment = Moment(Clock(), Clock(step=1), observed={"loss": value}, history=observations(history))
    assert bool(decide(best("loss", mode=mode), moment)) is improves(value, top, mode)


@PROFILE
@given(HISTORY, MODES, st.integers(1, 3), st.sampled_from([0.0, 0.3]))
def test_the_relevant_history_is_enough(history, mode, k, min_delta) -> None:
    trigger = best("loss", mode=mode, k=k, min_delta=min_delta) | best("other", mode=mode).until(
        step=9
    ) & ~on("end")
    full: tuple[Observation, ...] = ()
    short: tuple[Observation, ...] = ()
    for one in observations(history):
        at_hand = {
            "previous": Clock(one.clock.step - 1),
            "now": one.clock,
            "observed": {one.metric: one.value},
        }
        assert decide(trigger, Moment(history=full, **at_hand)) == decide(
            trigger, Moment(history=short, **at_hand)
        )
        full, short = (*full, one), relevant(trigger, (*short, one))
        assert len(short) <= k + 1


def observations(history: list[tuple[str, float]]) -> tuple[Observation, ...]:
    return tuple(Observation(name, value, Clock(step=i)) for i, (name, value) in enumerate(history, start=1))


@PROFILE
@given(JUMPS, RESUMES, st.integers(1, 30), st.integers(1, 30), st.integers(0, 300))
def test_operators_are_logic(jumps, resumes, first, second, step) -> None:
    a, b = every(steps=first), every(steps=second)
    for moment in moments(jumps, resumes):
        fires_a, fires_b = bool(decide(a, moment)), bool(decide(b, moment))
        assert bool(decide(a | b, moment)) is (fires_a or fires_b)
        assert bool(decide(a & b, moment)) is (fires_a and fires_b)
        assert bool(decide(~a, moment)) is (not fires_a)
        assert bool(decide(a.after(step=step), moment)) is (fires_a and moment.now.step > step)
        assert bool(decide(a.until(step=step), moment)) is (fires_a and moment.now.step <= step)
        assert set(decide(a | b, moment)) == {*decide(a, moment), *decide(b, moment)}
