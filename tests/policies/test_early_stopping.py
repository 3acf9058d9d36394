"""Early stopping: what each setting does, and that a verdict follows from the observations alone."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.core.clock import Clock
from holdfast.core.errors import PolicyError
from holdfast.core.records import Observation
from holdfast.policies import EarlyStopping, Verdict

PROFILE = settings(derandomize=True, max_examples=200, deadline=None, database=None)
NAN, INF = math.nan, math.inf


def observe(values, metric: str = "loss") -> list[Observation]:
    return [
        Observation(metric, value, Clock(step=10 * i, epoch=i)) for i, value in enumerate(values, start=1)
    ]


def actions(rule: EarlyStopping, values) -> str:
    """Return the first letters of the verdicts: (c)ontinue, (i)mprove, (w)ait, (s)top."""
    fold = rule.start()
    return "".join(fold.observe(one).action[0] for one in observe(values))


def stopping(**settings: object) -> EarlyStopping:
    return EarlyStopping("loss", **({"mode": "min", "patience": 2} | settings))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "values", "wanted"),
    [
        ({}, [3, 2, 2, 2, 2], "iiwss"),
        ({}, [3, 4, 2, 4, 2, 1], "iwiwsi"),  # not latched
        ({"mode": "max"}, [3, 4, 4, 3, 5], "iiwsi"),
        ({"patience": 0}, [3, 2, 2], "iis"),
        ({"patience": 1}, [3, 2, 2], "iis"),
        ({"min_delta": 1.0}, [5, 4, 3.5, 3.9, 2.5], "iwiws"),
        ({"min_delta": 1.0, "patience": 9}, [5, 4.5, 4.1, 3.9, 3.0, 2.8], "iwwiwi"),
        ({"min_delta": 1.0, "patience": 9, "reference": "best_ever"}, [5, 4.5, 4.1, 3.9, 3.0, 1.9], "iwwwwi"),
        ({"min_delta": 0.1, "relative": True}, [100, 91, 89, 81, 80], "iwiwi"),
        ({"start_after": 2}, [1, 1, 3, 2, 2, 2], "cciiws"),
        ({"start_after_epoch": 2}, [1, 1, 3, 2, 2, 2], "cciiws"),
        ({"baseline": 1.0}, [3, 2.5, 2.6, 2.7], "iiss"),
        ({"baseline": 1.0}, [3, 2.5, 0.5, 0.6, 0.4], "iiiwi"),
        ({"target": 1.0}, [3, 1.0, 2], "isi"),
        ({"target": 1.0}, [3, 0.9], "is"),
        ({"diverge": 4.0}, [3, 4.0, 4.1], "iws"),
        ({"diverge": 4.0, "mode": "max"}, [5, 4.0, 3.9], "iws"),
        ({}, [3, NAN, 2, INF, -INF], "isiss"),
        ({"non_finite": "ignore"}, [3, NAN, 2, INF, -INF, 1], "iwiwsi"),
        ({"non_finite": "ignore"}, [NAN, 3, 3, 2], "wiwi"),
    ],
)
def test_what_each_setting_does(settings: dict, values: list[float], wanted: str) -> None:
    assert actions(stopping(**settings), values) == wanted


@pytest.mark.parametrize(("after", "wanted"), [(0, "iwsss"), (1, "cccciw"), (2, "cccccciw")])
def test_steps_of_the_first_epoch_are_before_its_end_too(after: int, wanted: str) -> None:
    fold = stopping(start_after_epoch=after).start()
    seen = [Observation("loss", 1.0, Clock(step=i, epoch=i // 2)) for i in range(len(wanted))]
    assert "".join(fold.observe(one).action[0] for one in seen) == wanted


def test_the_verdict_explains_itself() -> None:
    rule = stopping(patience=3, target=0.1)
    assert rule.verdict([]) == Verdict("continue", 0, 3, "no value of loss yet")
    assert rule.verdict(observe([0.5])).reason == "loss improved to 0.5 (first value)"
    assert rule.verdict(observe([0.5, 0.25])) == Verdict(
        "improve", 0, 3, "loss improved to 0.25 (was 0.5)", 0.25, 20
    )
    waiting = rule.verdict(observe([0.5, 0.25, 0.3]))
    assert waiting == Verdict("wait", 1, 3, "loss = 0.3 does not improve on 0.25: 1 of 3", 0.25, 20)
    assert rule.verdict(observe([0.5, 0.05])).reason == "loss = 0.05 reached the target 0.1"
    assert rule.verdict(observe([0.5, NAN])).reason == "loss = nan is not finite"
    assert stopping(diverge=9).verdict(observe([10])).reason == "loss = 10 is worse than 9"
    assert stopping(start_after=1).verdict(observe([1])).reason == "loss is not judged before its start"


def test_the_best_is_any_gain_even_where_the_reference_stays() -> None:
    verdict = stopping(min_delta=1.0).verdict(observe([5, 4.5, NAN, 4.6]))
    assert (verdict.best, verdict.best_step) == (4.5, 20)


def test_the_patience_of_the_code_wins_and_the_count_survives() -> None:
    history = observe([3, 2, 2, 2, 2])
    assert stopping(patience=3).verdict(history).action == "stop"
    later = stopping(patience=5).verdict(history)
    assert (later.action, later.waited, later.patience) == ("wait", 3, 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "auto"}, "mode='auto' of metric 'loss' must be 'min'"),
        ({"patience": -1}, "patience=-1 must be a whole number of at least 0"),
        ({"patience": 1.5}, "patience=1.5 must be a whole number"),
        ({"patience": True}, "patience=True must be a whole number"),
        ({"min_delta": -0.1}, "min_delta=-0.1 must be a finite number of at least 0"),
        ({"min_delta": NAN}, "min_delta=nan must be a finite number"),
        ({"baseline": -(10**400)}, "must be a finite number"),
        ({"start_after": -1}, "start_after=-1 must be"),
        ({"baseline": INF}, "baseline=inf must be a finite number"),
        ({"reference": "best"}, "reference='best' must be one of 'last_significant', 'best_ever'"),
        ({"non_finite": "raise"}, "non_finite='raise' must be one of 'stop', 'ignore'"),
        ({"target": 2.0, "diverge": 1.0}, "target=2.0 must be better than diverge=1.0 for mode='min'"),
        ({"like": "keras", "relative": True}, "like='keras' does not go with relative=True"),
        ({"like": "ignite"}, "like='ignite' must be one of"),
    ],
)
def test_settings_that_make_no_sense(settings: dict, message: str) -> None:
    with pytest.raises(PolicyError, match=message.replace("(", r"\(")):
        stopping(**settings)


def test_an_empty_metric_name_is_refused() -> None:
    with pytest.raises(PolicyError, match="metric='' must be the name of a metric"):
        EarlyStopping("", mode="min", patience=1)


VALUES = st.one_of(st.floats(-2, 2), st.sampled_from([NAN, INF, -INF, 0.0, 1.0, 0.5]))
OBSERVATIONS = st.lists(st.tuples(st.sampled_from(["loss", "loss", "other"]), VALUES), max_size=25).map(
    lambda pairs: [Observation(name, v, Clock(step=i, epoch=i // 3)) for i, (name, v) in enumerate(pairs)]
)
OPTIONAL = st.one_of(st.none(), st.floats(-1, 1))
RULES = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(["min", "max"]),
        "patience": st.integers(0, 4),
        "min_delta": st.sampled_from([0.0, 0.01, 0.5]),
        "relative": st.booleans(),
        "reference": st.sampled_from(["last_significant", "best_ever"]),
        "start_after": st.integers(0, 3),
        "start_after_epoch": st.integers(0, 2),
        "baseline": OPTIONAL,
        "target": OPTIONAL,
        "non_finite": st.sampled_from(["stop", "ignore"]),
    }
).map(lambda given: EarlyStopping("loss", **given))


@PROFILE
@given(RULES, OBSERVATIONS)
def test_the_fold_equals_the_verdict_derived_anew(rule: EarlyStopping, history: list[Observation]) -> None:
    fold = rule.start()
    for end, observation in enumerate(history, start=1):
        assert fold.observe(observation) == rule.verdict(history[:end])


@PROFILE
@given(RULES, OBSERVATIONS)
def test_other_metrics_change_nothing(rule: EarlyStopping, history: list[Observation]) -> None:
    assert rule.verdict(history) == rule.verdict([one for one in history if one.metric == "loss"])


@PROFILE
@given(RULES, OBSERVATIONS)
def test_a_verdict_keeps_its_word(rule: EarlyStopping, history: list[Observation]) -> None:
    """Against the definition: the best by search, the count by counting back."""
    fold, since = rule.start(), 0
    for end, observation in enumerate(history, start=1):
        before, verdict = fold.verdict.waited, fold.observe(observation)
        finite = [o for o in history[:end] if o.metric == "loss" and math.isfinite(o.value)]
        sign = 1 if rule.mode == "min" else -1
        best = min(finite, key=lambda o: (sign * o.value, o.clock.step), default=None)
        assert (verdict.best, verdict.best_step) == ((best.value, best.clock.step) if best else (None, None))
        assert verdict.patience == rule.patience
        if observation.metric != "loss":
            assert verdict.waited == before
        elif verdict.action == "improve":
            assert math.isfinite(observation.value), "what is not finite never improves"
            assert verdict.waited in (0, before + 1)
            since = verdict.waited
        elif verdict.action == "wait":
            since += 1
            assert verdict.waited == since < rule.patience
        elif "does not improve" in verdict.reason:
            since += 1
            assert verdict.waited == since >= rule.patience
        else:
            assert verdict.waited == since
