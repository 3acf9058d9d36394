"""The best checkpoints by a metric: when a value is among them, and which checkpoints hold them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeAlias, TypeVar

from holdfast.core.records import CheckpointRecord, Moment, Observation
from holdfast.policies.arguments import Mode, amount, metric_name, optimisation_mode, whole
from holdfast.policies.metrics import improves, order_key
from holdfast.policies.peers import Peer, better, improves_like, single, worst
from holdfast.policies.rules import Kept, Rule, identity

__all__ = ["Best", "best", "monitored"]

Item = TypeVar("Item")
Places: TypeAlias = list[tuple[float, Item]]


@dataclass(frozen=True, slots=True, repr=False)
class Best(Rule):
    """Fires when a value enters the best `k`, keeps the checkpoints of the best `k`; made by `best()`.

    `k=None` is without bound. `threshold` is a value that the first one must improve on. `like` names the
    program whose comparisons, ties and treatment of NaN apply; the presets set it.
    """

    triggers: ClassVar[bool] = True
    retains: ClassVar[bool] = True
    prized: ClassVar[bool] = True
    metric: str
    mode: Mode
    k: int | None = 1
    min_delta: float = 0.0
    threshold: float | None = None
    like: Peer = "holdfast"

    def fires(self, moment: Moment) -> str | None:
        value = moment.observed.get(self.metric)
        if value is None:
            return None
        places = self._fold((one.value, one) for one in moment.history if one.metric == self.metric)
        if not self._enters(value, places):
            return None
        if not places:
            return f"{self.metric} improved to {value:.6g} (first value)"
        top = min((held for held, _ in places), key=lambda held: order_key(held, self.mode))
        if improves(value, top, self.mode):
            return f"{self.metric} improved to {value:.6g} (was {top:.6g})"
        return f"{self.metric} reached {value:.6g}, among the best {self.k or 'values'} (best {top:.6g})"

    def keeps(self, records: Sequence[CheckpointRecord], now: float) -> Kept:
        # `min_delta` says when a new value is worth a save. What exists is kept by its value alone: otherwise
        # the answer would depend on checkpoints that are gone, and change from one pass to the next.
        rule = replace(self, min_delta=0.0)
        held = rule._fold(
            (record.metrics[self.metric], record) for record in records if self.metric in record.metrics
        )
        return {identity(record): (f"{self!r}: {value:.6g}",) for value, record in held}

    def relevant(self, history: Sequence[Observation]) -> tuple[Observation, ...]:
        return tuple(
            one for _, one in self._fold((one.value, one) for one in history if one.metric == self.metric)
        )

    def _fold(self, values: Iterable[tuple[float, Item]]) -> Places[Item]:
        """Return what holds the best places after all values, oldest first."""
        places: Places[Item] = []
        for value, item in values:
            if self._enters(value, places):
                if len(places) == self.k:
                    del places[self._weakest(places)]
                places.append((self._stored(value), item))
        return places

    def _enters(self, value: float, places: Places[Item]) -> bool:
        if self.k is not None and len(places) >= self.k:
            reference: float | None = places[self._weakest(places)][0]
        elif self.like == "lightning":
            return True  # a free place is given to any value
        else:
            reference = worst(self.mode) if self.like == "hf" else self.threshold
        return improves_like(self.like, value, reference, self.mode, self.min_delta)

    def _weakest(self, places: Places[Item]) -> int:
        """Return which place is lost next. Among equals that is the latest one, in Lightning the earliest."""
        weakest = 0
        for index, (value, _) in enumerate(places):
            if better(places[weakest][0], value, self.mode) or (
                self.like != "lightning" and value == places[weakest][0]
            ):
                weakest = index
        return weakest

    def _stored(self, value: float) -> float:
        if self.like != "lightning":
            return value
        return worst(self.mode) if math.isnan(value) else single(value)

    def __repr__(self) -> str:
        mode, k = f"mode={self.mode!r}", -1 if self.k is None else self.k
        if self.like == "hf":
            return f"hf_best_model({self.metric!r}, greater_is_better={self.mode == 'max'})"
        if self.like == "lightning":
            return f"lightning_save_top_k({self.metric!r}, {mode}, save_top_k={k})"
        if self.like == "keras":
            return f"keras_save_best({self.metric!r}, {mode}, initial_value_threshold={self.threshold!r})"
        extras = ("" if k == 1 else f", k={k}") + (
            f", min_delta={self.min_delta!r}" if self.min_delta else ""
        )
        return f"best({self.metric!r}, {mode}{extras})"


def best(metric: str, *, mode: Mode, k: int = 1, min_delta: float = 0.0) -> Best:
    """Save when `metric` improves; or keep the checkpoints with its `k` best values.

    As a trigger it fires when this step's value is better, by more than `min_delta`, than the last one that
    counted (with `k` above 1: than the worst of the best `k`). As retention `min_delta` plays no part. Ties
    go to the earlier step. NaN, infinite and missing values never win. Raises PolicyError unless `mode` is
    "min" or "max".
    """
    mode = optimisation_mode(metric_name(metric), mode)
    return Best(metric, mode, whole("k", k), amount("min_delta", min_delta, zero=True))


def monitored(rule: Rule) -> frozenset[str]:
    """Return the metrics that a rule speaks of."""
    return frozenset(leaf.metric for leaf in rule.leaves() if isinstance(leaf, Best))
