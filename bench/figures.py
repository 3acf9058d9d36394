"""Raw figures of every round, and what is made of them: medians, and ratios to the limit of the same round."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from bench.contestants import LIMIT


@dataclass(frozen=True, slots=True)
class Column:
    """A figure as the reports show it.

    `unit` is "s", "x" (a multiple) or "bytes", where lower is better, or "ratio" or "MB/s", where higher is.
    """

    key: str
    title: str
    unit: str = "s"
    against: str | None = None  # the limit's figure that it is a multiple of
    chart: bool = False


@dataclass(slots=True)
class CaseResult:
    """What one case found."""

    key: str
    title: str
    about: str
    columns: tuple[Column, ...]
    facts: dict[str, float] = field(default_factory=dict)  # sizes and counts
    rounds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    limits_before: dict[str, dict[str, int]] = field(default_factory=dict)  # rounds that went without someone

    def add(self, who: str, figures: Mapping[str, float]) -> None:
        """Take the figures of one turn."""
        for key, value in figures.items():
            self.rounds.setdefault(who, {}).setdefault(key, []).append(value)

    def median(self, who: str, key: str) -> float | None:
        """Return the median over the rounds, or None where there is no such figure."""
        values = self.rounds.get(who, {}).get(key)
        return statistics.median(values) if values else None

    def ratio(self, who: str, column: Column) -> float | None:
        """Return the median of the multiples of the limit, each taken within its round."""
        values = self.rounds.get(who, {}).get(column.key)
        limits = self.rounds.get(LIMIT, {}).get(column.against) if column.against else None
        if not values or not limits:
            return None
        assert column.against is not None
        limits = limits[self.limits_before.get(who, {}).get(column.against, 0) :]
        pairs = zip(values, limits, strict=False)  # who is slow has only the first of the rounds
        return statistics.median(value / limit for value, limit in pairs)

    def to_json(self) -> dict[str, object]:
        figures = {who: {k: self.median(who, k) for k in found} for who, found in self.rounds.items()}
        ratios = {
            who: {c.key: r for c in self.columns if (r := self.ratio(who, c)) is not None}
            for who in self.rounds
            if who != LIMIT
        }
        return {
            "title": self.title,
            "about": self.about,
            "columns": {c.key: {"title": c.title, "unit": c.unit, "limit": c.against} for c in self.columns},
            "facts": self.facts,
            "medians": figures,
            "times the limit": ratios,
            "rounds": self.rounds,
            "rounds of the limit before": {who: n for who, n in self.limits_before.items() if n},
            "missing": self.missing,
        }
