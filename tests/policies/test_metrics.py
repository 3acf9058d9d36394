"""Comparing metric values."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.core.clock import Clock
from holdfast.core.errors import PolicyError
from holdfast.core.records import CheckpointRecord, Observation
from holdfast.policies import best_of, improves, order_key

PROFILE = settings(derandomize=True, max_examples=200, deadline=None, database=None)
NAN, INF = math.nan, math.inf
VALUES = st.one_of(
    st.none(), st.sampled_from([NAN, INF, -INF]), st.floats(-3, 3), st.sampled_from([0.0, 1.0])
)
MODES = st.sampled_from(["min", "max"])


@pytest.mark.parametrize(
    ("value", "reference", "mode", "min_delta", "relative", "better"),
    [
        (0.9, 1.0, "min", 0.0, False, True),
        (1.0, 1.0, "min", 0.0, False, False),
        (1.1, 1.0, "min", 0.0, False, False),
        (1.1, 1.0, "max", 0.0, False, True),
        (0.75, 1.0, "min", 0.25, False, False),
        (0.74, 1.0, "min", 0.25, False, True),
        (1.25, 1.0, "max", 0.25, False, False),
        (95.0, 100.0, "min", 0.1, True, False),
        (89.0, 100.0, "min", 0.1, True, True),
        (-111.0, -100.0, "min", 0.1, True, True),
        (-109.0, -100.0, "min", 0.1, True, False),
        (5.0, None, "min", 1.0, False, True),
        (5.0, NAN, "min", 1.0, False, True),
        (5.0, -INF, "min", 1.0, False, True),
        (NAN, None, "min", 0.0, False, False),
        (NAN, 1.0, "max", 0.0, False, False),
        (-INF, 1.0, "min", 0.0, False, False),
        (INF, 1.0, "max", 0.0, False, False),
    ],
)
def test_improves(value, reference, mode, min_delta, relative, better) -> None:
    assert improves(value, reference, mode, min_delta, relative) is better


def test_order() -> None:
    for mode, wanted in (("min", [-1.0, 2.0, None]), ("max", [2.0, -1.0, None])):
        values = [NAN, None, 2.0, -1.0]
        random.Random(0).shuffle(values)
        ordered = sorted(values, key=lambda value: order_key(value, mode))
        assert ordered[:3] == wanted
        assert math.isnan(ordered[3])
    assert order_key(-INF, "min") == order_key(NAN, "min") > order_key(None, "min")


def record(step: int, value: float | None) -> CheckpointRecord:
    return CheckpointRecord(step, "a", float(step), metrics={} if value is None else {"loss": value})


@PROFILE
@given(st.lists(VALUES, max_size=12), MODES, st.integers(1, 4), st.randoms(use_true_random=False))
def test_best_of_agrees_with_a_search_by_hand(values, mode, k, rng) -> None:
    records = [record(step, value) for step, value in enumerate(values)]
    finite = [
        (v if mode == "min" else -v, s) for s, v in enumerate(values) if v is not None and math.isfinite(v)
    ]
    wanted = [step for _, step in sorted(finite)[:k]]
    rng.shuffle(records)
    assert [one.step for one in best_of(records, "loss", mode, k)] == wanted


def test_best_of_observations_takes_the_metric_asked_for() -> None:
    history = [Observation(name, value, Clock(step=step)) for step, (name, value) in enumerate(HISTORY)]
    assert [one.clock.step for one in best_of(history, "loss", "min", 5)] == [3, 0]
    assert best_of(history, "accuracy", "max") == ()


HISTORY = [("loss", 2.0), ("other", 0.0), ("loss", NAN), ("loss", 1.0)]


def test_what_best_of_refuses() -> None:
    with pytest.raises(PolicyError, match=r"mode='auto' of metric 'loss' must be 'min' .* or 'max'"):
        best_of([], "loss", "auto")  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match="k=0 must be a whole number of at least 1"):
        best_of([], "loss", "min", 0)
