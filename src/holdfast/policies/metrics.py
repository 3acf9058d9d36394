"""Comparing metric values: one total order, in which a value that is not finite or not there never wins."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from typing import TypeVar

from holdfast.core.records import CheckpointRecord, Observation
from holdfast.policies.arguments import Mode, metric_name, optimisation_mode, whole

__all__ = ["best_of", "improves", "order_key"]

Scored = TypeVar("Scored", CheckpointRecord, Observation)


def improves(
    value: float, reference: float | None, mode: Mode, min_delta: float = 0.0, relative: bool = False
) -> bool:
    """Return whether `value` is better than `reference` by more than `min_delta`.

    A tie is no improvement, so the earlier of two equal values wins. `relative=True` reads `min_delta` as a
    fraction of `abs(reference)`. NaN and infinity never improve; any finite value improves on a reference
    that is None or not finite.
    """
    if not math.isfinite(value):
        return False
    if reference is None or not math.isfinite(reference):
        return True
    margin = min_delta * abs(reference) if relative else min_delta
    return value + margin < reference if mode == "min" else value - margin > reference


def order_key(value: float | None, mode: Mode) -> tuple[int, float]:
    """Return a sort key, best value first: finite values, then missing (None), then NaN and infinity."""
    if value is None:
        return (1, 0.0)
    if not math.isfinite(value):
        return (2, 0.0)
    return (0, value if mode == "min" else -value)


def best_of(items: Iterable[Scored], metric: str, mode: Mode, k: int = 1) -> tuple[Scored, ...]:
    """Return up to `k` records or observations with the best finite values of `metric`, best first.

    Ties go to the earlier step. Items without a finite value of this metric are never returned, so the result
    may be empty. Raises PolicyError for a `mode` other than "min" or "max" and for `k` below 1.
    """
    mode, k = optimisation_mode(metric_name(metric), mode), whole("k", k)
    scored = ((order_key(_value(item, metric), mode), _step(item), item) for item in items)
    finite = (entry for entry in scored if entry[0][0] == 0)
    return tuple(item for _, _, item in heapq.nsmallest(k, finite, key=lambda entry: entry[:2]))


def _value(item: CheckpointRecord | Observation, metric: str) -> float | None:
    if isinstance(item, Observation):
        return item.value if item.metric == metric else None
    return item.metrics.get(metric)


def _step(item: CheckpointRecord | Observation) -> int:
    return item.clock.step if isinstance(item, Observation) else item.step
