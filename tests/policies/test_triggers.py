"""When to save: what each trigger and operator does, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest

from holdfast.core.clock import Clock
from holdfast.core.errors import PolicyError
from holdfast.core.records import Moment, Observation
from holdfast.policies import (
    EarlyStopping,
    Rule,
    at,
    auto,
    best,
    best_interval,
    decide,
    every,
    last,
    limit,
    log_spaced,
    on,
    relevant,
    require_trigger,
    when_idle,
)

NAN, INF = math.nan, math.inf


def firing_steps(trigger: Rule, clocks: list[Clock]) -> list[int]:
    pairs = zip([Clock(), *clocks], clocks, strict=False)
    return [now.step for previous, now in pairs if decide(trigger, Moment(previous, now))]


STEPS = [Clock(step=i) for i in range(1, 41)]


@pytest.mark.parametrize(
    ("trigger", "steps"),
    [
        (every(steps=10), [10, 20, 30, 40]),
        (every(steps=10, offset=3), [3, 13, 23, 33]),
        (every(steps=1), list(range(1, 41))),
        (at([5, 7, 100]), [5, 7]),
        (log_spaced(), [1, 2, 4, 8, 16, 32]),
        (log_spaced(base=3, until=9), [1, 3, 9]),
        (log_spaced(base=1.5), [1, 2, 3, 4, 6, 8, 12, 18, 26, 39]),
        (every(steps=10).after(step=20), [30, 40]),
        (every(steps=10).until(step=20), [10, 20]),
        (every(steps=10).after(step=10).until(step=30), [20, 30]),
        (every(steps=4) & every(steps=6), [12, 24, 36]),
        (every(steps=10) & ~every(steps=20), [10, 30]),
        (every(steps=15) | at([1]), [1, 15, 30]),
    ],
)
def test_over_forty_steps(trigger: Rule, steps: list[int]) -> None:
    assert firing_steps(trigger, STEPS) == steps


def test_jumping_clocks_miss_no_point() -> None:
    assert firing_steps(every(steps=10), [Clock(step=s) for s in (4, 9, 11, 19, 35, 39, 40)]) == [11, 35, 40]
    assert firing_steps(at([5, 6, 30]), [Clock(step=s) for s in (4, 9, 20, 31)]) == [9, 31]


@pytest.mark.parametrize(
    ("trigger", "field", "length"),
    [
        (every(epochs=2), "epoch", 2),
        (every(samples=100), "samples", 100),
        (every(tokens=1e6), "tokens", 10**6),
        (every(seconds=0.5), "active_seconds", 0.5),
        (every(minutes=1.5), "active_seconds", 90),
        (every(hours=2), "active_seconds", 7200),
    ],
)
def test_units(trigger: Rule, field: str, length: float) -> None:
    def moment(previous: float, now: float) -> Moment:
        return Moment(Clock(**{field: previous}), Clock(step=1, **{field: now}))

    assert trigger.fires(moment(0, length * 0.999 if field == "active_seconds" else length - 1)) is None
    assert trigger.fires(moment(0, length))
    assert trigger.fires(moment(length, length)) is None
    assert trigger.fires(moment(length, 2 * length))


def test_step_zero_does_not_fire() -> None:
    assert decide(every(steps=1) | log_spaced() | every(seconds=1), Moment(Clock(), Clock())) == ()


@pytest.mark.parametrize(
    ("trigger", "reason"),
    [
        (every(steps=10), "every 10 steps"),
        (every(steps=1), "every step"),
        (every(tokens=2), "every 2 tokens"),
        (every(hours=0.5), "every 0.5 hours"),
        (at([40]), "at step 40"),
        (log_spaced(), "log-spaced step 32"),
        (on("end", "preempt"), "on end"),
        (~on("exception"), "~on('exception')"),
        (every(steps=10) & on("end"), "every 10 steps and on end"),
    ],
)
def test_reasons(trigger: Rule, reason: str) -> None:
    now = Clock(step=40, tokens=40, active_seconds=7200)
    assert decide(trigger, Moment(Clock(step=30), now, events=frozenset({"end"}))) == (reason,)


def test_all_reasons_that_fire_together_are_collected_once() -> None:
    trigger = every(steps=10) | on("end") | (every(steps=10) | at([40])).after(step=3) | on("preempt")
    moment = Moment(Clock(step=39), Clock(step=40), events=frozenset({"end"}))
    assert decide(trigger, moment) == ("every 10 steps", "on end", "at step 40")


def test_when_idle() -> None:
    saved = Clock(step=5, active_seconds=50)
    later = Clock(step=6, active_seconds=60)
    assert when_idle().fires(Moment(saved, later, last_save=saved)) == "no save in flight"
    assert when_idle().fires(Moment(saved, later, last_save=saved, save_in_flight=True)) is None
    assert when_idle(min_gap_seconds=10).fires(Moment(saved, later, last_save=saved))
    assert when_idle(min_gap_seconds=11).fires(Moment(saved, later, last_save=saved)) is None
    assert when_idle().fires(Moment(saved, saved, last_save=saved)) is None, (
        "the same step is not saved twice"
    )


def test_the_interval_of_young_and_daly() -> None:
    # Young: sqrt(2 * 50 * 3600) = 600; Daly: 600 * (1 + sqrt(50 / 7200) / 3 + 50 / 7200 / 9)
    assert best_interval(50, 3600, 1.0) == pytest.approx(617.1296)
    assert best_interval(50, 3600, 0.01) == 5000  # stretched: 50 s are 1 % of 5000 s
    assert best_interval(0, 3600, 0.01) == 1


def test_auto() -> None:
    def moment(passed: float, cost: float | None, *, in_flight: bool = False) -> Moment:
        saved = Clock(step=5, active_seconds=1000)
        now = Clock(step=6, active_seconds=1000 + passed)
        return Moment(saved, now, last_save=saved, save_seconds=cost, save_in_flight=in_flight)

    trigger = auto(max_overhead=1.0, mtbf="1h")
    assert trigger.fires(moment(1, None)) == "first save, to measure its cost"
    assert trigger.fires(moment(1, None, in_flight=True)) is None
    assert trigger.fires(moment(617, 50)) is None
    assert trigger.fires(moment(618, 50)) == "every 10m 17s, as a save costs 50s"
    assert trigger.fires(moment(618, 50, in_flight=True)) is None
    assert auto(max_overhead=0.01, mtbf=3600).fires(moment(4999, 50)) is None


def observed(value: float | None, *history: float) -> Moment:
    past = tuple(Observation("loss", v, Clock(step=i)) for i, v in enumerate(history, start=1))
    now = Clock(step=len(history) + 1)
    return Moment(
        Clock(step=len(history)), now, observed={} if value is None else {"loss": value}, history=past
    )


@pytest.mark.parametrize(
    ("moment", "reason"),
    [
        (observed(0.123), "loss improved to 0.123 (first value)"),
        (observed(0.123, NAN), "loss improved to 0.123 (first value)"),
        (observed(0.123, 0.5, 0.2), "loss improved to 0.123 (was 0.2)"),
        (observed(0.2, 0.5, 0.2), None),
        (observed(0.3, 0.5, 0.2), None),
        (observed(None, 0.5), None),
        (observed(NAN), None),
        (observed(-INF, 0.5), None),
    ],
)
def test_best(moment: Moment, reason: str | None) -> None:
    assert best("loss", mode="min").fires(moment) == reason


def test_best_k_fires_when_a_value_enters_the_best_k() -> None:
    trigger = best("loss", mode="min", k=2)
    assert trigger.fires(observed(0.4, 0.5, 0.2)) == "loss reached 0.4, among the best 2 (best 0.2)"
    assert trigger.fires(observed(0.9, 0.5)) == "loss reached 0.9, among the best 2 (best 0.5)"
    assert trigger.fires(observed(0.5, 0.5, 0.2)) is None
    assert trigger.fires(observed(0.1, 0.5, 0.2)) == "loss improved to 0.1 (was 0.2)"


def test_small_gains_add_up_to_an_improvement() -> None:
    trigger = best("loss", mode="min", min_delta=0.1)
    assert trigger.fires(observed(0.96, 1.0)) is None
    assert trigger.fires(observed(0.89, 1.0, 0.96, 0.93))


def test_a_window_hides_what_was_observed_before() -> None:
    trigger = best("loss", mode="min").after(step=2)
    assert trigger.fires(observed(0.5, 0.1, 0.2)) == "loss improved to 0.5 (first value)"
    assert trigger.fires(observed(0.5, 0.1)) is None
    assert [one.value for one in relevant(trigger, observed(None, 0.1, 0.2, 0.5, 0.4).history)] == [0.4]


def test_at_most() -> None:
    trigger = every(steps=1).at_most(per=every(steps=10))
    first = Moment(Clock(step=2), Clock(step=3))
    assert trigger.fires(first) == "every step", "nothing is held back before the first save"
    for step, fires in ((5, False), (12, False), (13, True), (40, True)):
        moment = Moment(Clock(step=step - 1), Clock(step=step), last_save=Clock(step=3))
        assert bool(decide(trigger, moment)) is fires


def test_windows_count_in_all_units() -> None:
    trigger = every(steps=1).after(epoch=1, tokens=10).until(samples=100)
    for clock, fires in (
        (Clock(step=9, epoch=2, tokens=11, samples=100), True),
        (Clock(step=9, epoch=1, tokens=11, samples=100), False),
        (Clock(step=9, epoch=2, tokens=10, samples=100), False),
        (Clock(step=9, epoch=2, tokens=11, samples=101), False),
    ):
        assert bool(decide(trigger, Moment(Clock(step=8), clock))) is fires


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: every(steps=0), "steps=0 must be a whole number of at least 1"),
        (lambda: every(steps=-5), "steps=-5 must be a whole number of at least 1"),
        (lambda: every(steps=2.5), "steps=2.5 must be a whole number of at least 1"),
        (lambda: every(steps=True), "steps=True must be a whole number of at least 1"),
        (lambda: every(epochs=0.5), "epochs=0.5 must be a whole number of at least 1"),
        (lambda: every(steps="100"), "steps='100' must be a whole number of at least 1"),
        (lambda: every(minutes=0), "minutes=0 must be a finite number above 0"),
        (lambda: every(minutes=NAN), "minutes=nan must be a finite number above 0"),
        (lambda: every(minutes=10**400), "must be a finite number above 0"),
        (lambda: every(minutes=5, offset=10**400), "must be a finite number of at least 0"),
        (lambda: every(hours=INF), "hours=inf must be a finite number above 0"),
        (lambda: every(seconds=True), "seconds=True must be a finite number above 0"),
        (lambda: every(), "every() takes exactly one of steps, .*; found none"),
        (lambda: every(steps=1, hours=1), "every() takes exactly one of .*; found steps=1, hours=1"),
        (
            lambda: every(steps=10, offset=10),
            "offset=10 must be below the interval, steps=10; to start later use",
        ),
        (lambda: every(steps=10, offset=-1), "offset=-1 must be a whole number of at least 0"),
        (lambda: at([]), "at([]) names no step"),
        (lambda: at([0]), "a step of at()=0 must be a whole number of at least 1"),
        (lambda: at(5), "at(5) takes a list of steps; write at([5])"),
        (lambda: log_spaced(base=1), "base=1 must be at least 1.01"),
        (lambda: log_spaced(until=0), "until=0 must be a whole number of at least 1"),
        (lambda: on(), "on() takes one or more of 'start', .*; found none"),
        (lambda: on("finish"), "on() takes one or more of .*; found 'finish'"),
        (lambda: when_idle(-1), "min_gap_seconds=-1 must be a finite number of at least 0"),
        (lambda: auto(max_overhead=0), "max_overhead=0 must be a finite number above 0"),
        (lambda: auto(max_overhead=2), "max_overhead=2 must be a fraction of the training time"),
        (lambda: auto(mtbf="soon"), "duration 'soon' is not understood"),
        (lambda: auto(mtbf=0), "mtbf=0.0 must be a finite number above 0"),
        (lambda: best("loss", mode="auto"), "mode='auto' of metric 'loss' must be 'min'"),
        (lambda: best("", mode="min"), "metric='' must be the name of a metric"),
        (lambda: best("loss", mode="min", k=0), "k=0 must be a whole number of at least 1"),
        (
            lambda: best("loss", mode="min", min_delta=-1),
            "min_delta=-1 must be a finite number of at least 0",
        ),
        (lambda: every(steps=1).after(), ".after() takes at least one of step=, .*; found none"),
        (lambda: every(steps=1).until(step=-1), "step=-1 must be a whole number of at least 0"),
        (lambda: on("end").at_most(per=last(3)), "per=last(3) of .at_most() must be a plain interval"),
        (lambda: on("end").at_most(per=60), "per=60 of .at_most() must be a plain interval"),
        (lambda: every(steps=1) | 5, "every(steps=1) | 5: the right side must be a rule"),
        (lambda: every(steps=1) & None, "every(steps=1) & None: the right side must be a rule"),
        (lambda: every(steps=1) or on("end"), "every(steps=1) is neither true nor false; combine rules with"),
    ],
)
def test_what_is_refused(make, message: str) -> None:
    pattern = ".*".join(
        part.replace("(", r"\(").replace(")", r"\)").replace("[", r"\[") for part in message.split(".*")
    )
    with pytest.raises(PolicyError, match=pattern.replace("|", r"\|")):
        make()


@pytest.mark.parametrize(
    ("rule", "named"),
    [
        (last(3), r"last\(3\)"),
        (every(steps=10) | last(3), r"last\(3\)"),
        ((on("end") & ~last(2)).after(step=3), r"last\(2\)"),
        (limit("1GB") | every(steps=3), r"limit\('1.0 GB'\)"),
    ],
)
def test_a_retention_rule_is_no_trigger(rule: Rule, named: str) -> None:
    message = rf"{named} says what to keep, not when to save, so it cannot be used as save=; use every"
    with pytest.raises(PolicyError, match=message):
        require_trigger(rule)
    with pytest.raises(PolicyError, match=message):
        decide(rule, Moment(Clock(), Clock(step=1)))


def test_integers_of_numpy_count() -> None:
    given = (every(steps=np.int64(2)), last(np.int32(3)), at(np.arange(1, 3)))
    assert given == (every(steps=2), last(3), at([1, 2]))
    assert repr(given) == "(every(steps=2), last(3), at([1, 2]))"
    assert EarlyStopping("loss", mode="min", patience=np.int64(3)).patience == 3
    for value in (np.int64(0), np.float32(2.5), np.bool_(True)):
        with pytest.raises(PolicyError, match="must be a whole number of at least 1"):
            every(steps=value)


def test_something_else_is_no_trigger() -> None:
    with pytest.raises(PolicyError, match="save=100 is a int; expected a rule such as"):
        require_trigger(100)
