"""Rules that only say what to keep: by number, age, generation, tag, predicate, size, or as weights alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import ClassVar

from holdfast.core.errors import PolicyError
from holdfast.core.names import matches
from holdfast.core.records import CheckpointRecord
from holdfast.core.units import exact_bytes, parse_bytes
from holdfast.policies.arguments import amount, only_one, whole
from holdfast.policies.rules import Kept, Rule, identity

__all__ = ["Demote", "Last", "Limit", "Tagged", "Thin", "Where", "Within"]
__all__ += ["demote", "last", "limit", "tagged", "thin", "where", "within"]

_SPANS = {"minutes": 60, "hours": 3600, "days": 86400, "weeks": 604800}


@dataclass(frozen=True, slots=True, repr=False)
class Retention(Rule):
    """A rule that says what to keep and not when to save."""

    retains: ClassVar[bool] = True
    instead: ClassVar[str] = "every(...), at([...]), on(...), best(...) or auto()"


@dataclass(frozen=True, slots=True, repr=False)
class Last(Retention):
    """Keeps the newest `n`; made by `last()`."""

    n: int

    def keeps(self, records: Sequence[CheckpointRecord], now: float) -> Kept:
        return {identity(record): (repr(self),) for record in records[-self.n :]}

    def __repr__(self) -> str:
        return f"last({self.n})"


@dataclass(frozen=True, slots=True, repr=False)
class Within(Retention):
    """Keeps what is younger than a duration; made by `within()`."""

    name: str
    count: float

    def keeps(self, records: Sequence[CheckpointRecord], now: float) -> Kept:
        anchor = max((record.time for record in records if record.time <= now), default=now)
        oldest = anchor - self.count * _SPANS[self.name]
        return {identity(record): (repr(self),) for record in records if record.time >= oldest}

    def __repr__(self) -> str:
        return f"within({self.name}={self.count!r})"


@dataclass(frozen=True, slots=True, repr=False)
class Thin(Retention):
    """Keeps one checkpoint per hour, day, week and month; made by `thin()`."""

    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0

    def keeps(self, records: Sequence[CheckpointRecord], now: float) -> Kept:
        kept: Kept = {}
        by_time = sorted(records, key=lambda record: record.time)
        for name, period in _PERIODS.items():
            newest = {period(record.time): record for record in by_time}
            for record in list(newest.values())[len(newest) - min(getattr(self, name), len(newest)) :]:
                kept[identity(record)] = (*kept.get(identity(record), ()), f"{self!r}: {name}")
        return kept

    def __repr__(self) -> str:
        return f"thin({', '.join(f'{n}={getattr(self, n)}' for n in _PERIODS if getattr(self, n))})"


@dataclass(frozen=True, slots=True, repr=False)
class Tagged(Retention):
    """Keeps what carries a matching tag; made by `tagged()`."""

    pointwise: ClassVar[bool] = True
    globs: tuple[str, ...]

    def keeps(self, records: Sequence[CheckpointRecord], now: float) -> Kept:
        found = [
            (record, sorted(tag for tag in record.tags if matches(tag, self.globs))) for record in records
        ]
        return {identity(record): (f"{self!r}: {', '.join(tags)}",) for record, tags in found if tags}

    def __repr__(self) -> str:
        return f"tagged({', '.join(map(repr, self.globs))})"


@dataclass(frozen=True, slots=True, repr=False)
class Where(Retention):
    """Keeps what a function says yes to; made by `where()`."""

    pointwise: ClassVar[bool] = True
    predicate: Callable[[CheckpointRecord], bool]

    def keeps(self, records: Sequence[CheckpointRecord], now: float) -> Kept:
        return {identity(record): (repr(self),) for record in records if self._accepts(record)}

    def _accepts(self, record: CheckpointRecord) -> bool:
        try:
            return bool(self.predicate(record))
        except Exception as error:
            raise PolicyError(
                f"{self!r} failed on the checkpoint of step {record.step} ({type(error).__name__}: {error}); "
                "nothing was decided. Make the function answer for every record"
            ) from error

    def __repr__(self) -> str:
        return f"where({getattr(self.predicate, '__qualname__', type(self.predicate).__name__)})"


@dataclass(frozen=True, slots=True, repr=False)
class Limit(Retention):
    """Caps what the other rules keep; made by `limit()`."""

    whole_plan: ClassVar[bool] = True
    max_bytes: int | None = None
    max_count: int | None = None

    def exceeded(self, kept_bytes: int, kept_count: int) -> bool:
        """Return whether this many bytes and checkpoints are more than the cap allows."""
        over_bytes = self.max_bytes is not None and kept_bytes > self.max_bytes
        return over_bytes or (self.max_count is not None and kept_count > self.max_count)

    def keeps(self, records: Sequence[CheckpointRecord], now: float) -> Kept:
        return {}

    def __repr__(self) -> str:
        size = [] if self.max_bytes is None else [repr(exact_bytes(self.max_bytes))]
        return f"limit({', '.join(size + ([] if self.max_count is None else [f'count={self.max_count}']))})"


@dataclass(frozen=True, slots=True, repr=False)
class Demote(Retention):
    """Keeps the weights of what a rule keeps; made by `demote()`."""

    whole_plan: ClassVar[bool] = True
    rule: Rule

    def keeps(self, records: Sequence[CheckpointRecord], now: float) -> Kept:
        kept = self.rule.keeps(records, now)
        return {key: tuple(f"demote: {reason}" for reason in reasons) for key, reasons in kept.items()}

    def __repr__(self) -> str:
        return f"demote({self.rule!r})"


def last(n: int) -> Last:
    """Keep the `n` checkpoints with the highest steps. Raises PolicyError unless `n` is at least 1."""
    return Last(whole("n", n))


def within(
    *,
    minutes: float | None = None,
    hours: float | None = None,
    days: float | None = None,
    weeks: float | None = None,
) -> Within:
    """Keep the checkpoints of the last stretch of time.

    Takes exactly one unit. Age counts back from the newest checkpoint, not from the wall clock, so a run that
    pauses loses nothing; times in the future, from a clock that was wrong, do not move that anchor. Raises
    PolicyError for a duration that is not above zero.
    """
    name, count = only_one("within", {"minutes": minutes, "hours": hours, "days": days, "weeks": weeks})
    amount(name, count)
    return Within(name, count)


def thin(*, hourly: int = 0, daily: int = 0, weekly: int = 0, monthly: int = 0) -> Thin:
    """Keep the newest checkpoint of each of the last so many hours, days, weeks and months.

    Periods are those of the calendar in UTC, weeks start on Monday; periods without a checkpoint do not
    count, so a run that pauses loses nothing. Raises PolicyError for negative counts, and if all are zero.
    """
    counts = {"hourly": hourly, "daily": daily, "weekly": weekly, "monthly": monthly}
    checked = {name: whole(name, count, minimum=0) for name, count in counts.items()}
    if not any(checked.values()):
        raise PolicyError(
            "thin() takes at least one of hourly=, daily=, weekly=, monthly= above zero; found none"
        )
    return Thin(**checked)


def tagged(*globs: str) -> Tagged:
    """Keep the checkpoints with a tag that matches any of the globs; without globs, those with any tag.

    A tagged checkpoint is never dropped in any case; this rule is for `&`, `~` and mirrors.
    """
    for glob in globs:
        if not isinstance(glob, str) or not glob:
            raise PolicyError(f"tagged({glob!r}) takes tags or globs such as 'release-*'")
    return Tagged(globs or ("**",))


def where(predicate: Callable[[CheckpointRecord], bool]) -> Where:
    """Keep the checkpoints for which `predicate(record)` is true.

    The answer should depend on the record alone. If the function raises, no plan is made (PolicyError).
    """
    if not callable(predicate):
        raise PolicyError(f"where({predicate!r}) takes a function of a checkpoint record")
    return Where(predicate)


def limit(size: str | int | None = None, *, count: int | None = None) -> Limit:
    """Cap what is kept, in bytes ("200GB") or in number of checkpoints; join it to other rules with `|`.

    Dropped first are weights-only checkpoints, then the oldest, and last those that a `best` rule keeps.
    Guarded checkpoints stay even if they exceed the cap. Alone, it caps everything. A checkpoint to be
    demoted still counts with all its bytes. Raises PolicyError without a cap.
    """
    if size is None and count is None:
        raise PolicyError("limit() takes a size such as '200GB', count=, or both; found none")
    return Limit(
        None if size is None else parse_bytes(size), None if count is None else whole("count", count)
    )


def demote(rule: Rule) -> Demote:
    """Keep only the weights of what `rule` keeps and no other rule keeps whole; join it with `|`.

    Raises PolicyError if `rule` does not say what to keep, or is itself a `limit` or `demote`.
    """
    if not isinstance(rule, Rule):
        raise PolicyError(f"demote({rule!r}) takes a retention rule such as every(steps=1000)")
    for node in rule.nodes():
        if node.whole_plan:
            raise PolicyError(f"{node!r} cannot stand inside demote(); join it with `|`")
        if refusal := node.refusal("keep="):
            raise PolicyError(refusal)
    return Demote(rule)


def _month(time: float) -> int:
    date = datetime.fromtimestamp(time, UTC)
    return date.year * 12 + date.month


_PERIODS: dict[str, Callable[[float], int]] = {
    "hourly": lambda time: int(time // 3600),
    "daily": lambda time: int(time // 86400),
    "weekly": lambda time: int((time // 86400 + 3) // 7),  # 1 January 1970 was a Thursday
    "monthly": _month,
}
