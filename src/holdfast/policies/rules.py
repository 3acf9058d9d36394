"""What triggers and retention rules share: one family of values, and the operators that combine them.

A rule answers one or both of two questions: when to save (`fires`) and what to keep (`keeps`). Rules are
frozen values without state; all they know comes from the moment or the records they are shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeAlias

from holdfast.core.clock import Clock
from holdfast.core.errors import PolicyError
from holdfast.core.records import CheckpointRecord, Moment, Observation
from holdfast.policies.arguments import whole
from holdfast.policies.intervals import Interval, Unit, reading_of, recorded

__all__ = ["AllOf", "AnyOf", "AtMost", "Kept", "Key", "Not", "Place", "Rule", "Window", "identity"]

Key: TypeAlias = tuple[int, str]
Kept: TypeAlias = dict[Key, tuple[str, ...]]
Place: TypeAlias = Literal["save=", "keep="]
Bounds: TypeAlias = tuple[tuple[Unit, int], ...]


def identity(record: CheckpointRecord) -> Key:
    """Return what tells a record from all others of its run: step and attempt."""
    return (record.step, record.attempt)


class Rule:
    """A trigger, a retention rule, or both; combined with `|` (any of them), `&` (all of them) and `~` (not).

    Every rule can be limited with `.after(step=...)`, `.until(epoch=...)` and `.at_most(per=every(...))`.
    """

    __slots__ = ()
    triggers: ClassVar[bool] = False
    retains: ClassVar[bool] = False
    pointwise: ClassVar[bool] = False  # looks at each checkpoint alone, whatever others there are
    prized: ClassVar[bool] = False  # a limit drops what this rule keeps last
    whole_plan: ClassVar[bool] = (
        False  # speaks about the plan as a whole: stands at the top, joined by `|` only
    )
    instead: ClassVar[str] = ""  # what to use where this rule makes no sense

    @property
    def parts(self) -> tuple[Rule, ...]:
        """The rules that this one is made of; empty for a rule that stands on its own."""
        return ()

    @property
    def per(self) -> Interval | None:
        """The interval that `.at_most(per=...)` takes from it; None unless it is a plain `every(...)`."""
        return None

    def fires(self, moment: Moment) -> str | None:
        """Return why to save at this moment, or None. Raises PolicyError if the rule is no trigger."""
        raise PolicyError(self.refusal("save=") or f"{self!r} is no trigger")

    def reasons(self, moment: Moment) -> tuple[str, ...]:
        """Return every reason to save at this moment, each once."""
        reason = self.fires(moment)
        return () if reason is None else (reason,)

    def keeps(self, records: Sequence[CheckpointRecord], now: float) -> Kept:
        """Return the records to keep, with reasons; `records` are in step order, `now` in seconds.

        Raises PolicyError if the rule does not say what to keep.
        """
        raise PolicyError(self.refusal("keep=") or f"{self!r} is no retention rule")

    def relevant(self, history: Sequence[Observation]) -> tuple[Observation, ...]:
        """Return the observations that this trigger must see again; the others cannot change an answer."""
        wanted = {id(one) for part in self.parts for one in part.relevant(history)}
        return tuple(one for one in history if id(one) in wanted)

    def refusal(self, place: Place) -> str | None:
        """Return why this rule, apart from its parts, cannot serve as `save=` or `keep=`, or None."""
        if self.triggers if place == "save=" else self.retains:
            return None
        does = (
            "says what to keep, not when to save" if self.retains else "says when to save, not what to keep"
        )
        return f"{self!r} {does}, so it cannot be used as {place}; use {self.instead} instead"

    def nodes(self) -> Iterator[Rule]:
        """Yield this rule and all that it is made of."""
        yield self
        for part in self.parts:
            yield from part.nodes()

    def leaves(self) -> Iterator[Rule]:
        """Yield the rules that this one is made of and that have no parts themselves."""
        if not self.parts:
            yield self
        for part in self.parts:
            yield from part.leaves()

    def __or__(self, other: Rule) -> Rule:
        return AnyOf((*_terms(self, AnyOf), *_terms(_operand(self, "|", other), AnyOf)))

    def __and__(self, other: Rule) -> Rule:
        return AllOf((*_terms(self, AllOf), *_terms(_operand(self, "&", other), AllOf)))

    def __invert__(self) -> Rule:
        return Not(self)

    def __bool__(self) -> bool:
        # `every(...) or best(...)` would silently mean `every(...)`.
        raise PolicyError(
            f"{self!r} is neither true nor false; combine rules with |, & and ~ (not or, and, not)"
        )

    def after(
        self,
        *,
        step: int | None = None,
        epoch: int | None = None,
        samples: int | None = None,
        tokens: int | None = None,
    ) -> Rule:
        """Return this rule limited to what comes after the given counts; each one given must be exceeded.

        It sees only the observations and checkpoints of that range. Raises PolicyError without a count or for
        a negative one.
        """
        return Window(self, "after", _bounds("after", step=step, epoch=epoch, samples=samples, tokens=tokens))

    def until(
        self,
        *,
        step: int | None = None,
        epoch: int | None = None,
        samples: int | None = None,
        tokens: int | None = None,
    ) -> Rule:
        """Return this rule limited to the given counts, themselves included; none of them may be exceeded.

        It sees only the observations and checkpoints of that range. Raises PolicyError without a count or for
        a negative one.
        """
        return Window(self, "until", _bounds("until", step=step, epoch=epoch, samples=samples, tokens=tokens))

    def at_most(self, *, per: Rule) -> Rule:
        """Return this trigger held back until the interval `per` has passed since the last save.

        Any save counts, whatever caused it; nothing is held back before the first. Raises PolicyError if
        `per` is no plain `every(...)`. In `keep=`, combine with `& every(...)` instead.
        """
        return AtMost(self, per)


@dataclass(frozen=True, slots=True, repr=False)
class AnyOf(Rule):
    """Rules joined by `|`: fires when any fires, keeps what any keeps."""

    triggers: ClassVar[bool] = True
    retains: ClassVar[bool] = True
    rules: tuple[Rule, ...]

    @property
    def parts(self) -> tuple[Rule, ...]:
        return self.rules

    def fires(self, moment: Moment) -> str | None:
        return "; ".join(self.reasons(moment)) or None

    def reasons(self, moment: Moment) -> tuple[str, ...]:
        return tuple(dict.fromkeys(reason for rule in self.rules for reason in rule.reasons(moment)))

    def keeps(self, records: Sequence[CheckpointRecord], now: float) -> Kept:
        kept: Kept = {}
        for rule in self.rules:
            for key, reasons in rule.keeps(records, now).items():
                kept[key] = tuple(dict.fromkeys((*kept.get(key, ()), *reasons)))
        return kept

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.rules))


@dataclass(frozen=True, slots=True, repr=False)
class AllOf(Rule):
    """Rules joined by `&`: fires when all fire, keeps what all keep."""

    triggers: ClassVar[bool] = True
    retains: ClassVar[bool] = True
    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        for rule in self.rules:
            _refuse_whole_plan(rule, "&")

    @property
    def parts(self) -> tuple[Rule, ...]:
        return self.rules

    def fires(self, moment: Moment) -> str | None:
        reasons = [rule.fires(moment) for rule in self.rules]
        return " and ".join(dict.fromkeys(r for r in reasons if r)) if None not in reasons else None

    def keeps(self, records: Sequence[CheckpointRecord], now: float) -> Kept:
        each = [rule.keeps(records, now) for rule in self.rules]
        common = [key for key in each[0] if all(key in kept for kept in each)]
        return {key: (" and ".join(sorted({r for kept in each for r in kept[key]})),) for key in common}

    def __repr__(self) -> str:
        return " & ".join(_bracketed(rule) for rule in self.rules)


@dataclass(frozen=True, slots=True, repr=False)
class Not(Rule):
    """A rule turned around by `~`: fires when it does not, keeps what it does not."""

    triggers: ClassVar[bool] = True
    retains: ClassVar[bool] = True
    rule: Rule

    def __post_init__(self) -> None:
        _refuse_whole_plan(self.rule, "~")

    @property
    def parts(self) -> tuple[Rule, ...]:
        return (self.rule,)

    def refusal(self, place: Place) -> str | None:
        if place == "save=" or all(leaf.pointwise for leaf in self.leaves()):
            return None
        # What is left after a pass decides the next one: `~last(3)` would eat its way through the run.
        return (
            f"{self!r} as keep= would drop more on every pass; ~ takes only tagged(...) and where(...) there"
        )

    def fires(self, moment: Moment) -> str | None:
        return repr(self) if self.rule.fires(moment) is None else None

    def keeps(self, records: Sequence[CheckpointRecord], now: float) -> Kept:
        left_out = self.rule.keeps(records, now)
        return {identity(record): (repr(self),) for record in records if identity(record) not in left_out}

    def __repr__(self) -> str:
        return f"~{_bracketed(self.rule)}"


@dataclass(frozen=True, slots=True, repr=False)
class Window(Rule):
    """A rule limited by `.after()` or `.until()` to a range of the run."""

    triggers: ClassVar[bool] = True
    retains: ClassVar[bool] = True
    rule: Rule
    side: str
    bounds: Bounds

    def __post_init__(self) -> None:
        _refuse_whole_plan(self.rule, f".{self.side}()")

    @property
    def parts(self) -> tuple[Rule, ...]:
        return (self.rule,)

    def _holds(self, readings: Sequence[float]) -> bool:
        beyond = [reading > bound for reading, (_, bound) in zip(readings, self.bounds, strict=True)]
        return all(beyond) if self.side == "after" else not any(beyond)

    def _inside(self, clock: Clock) -> bool:
        return self._holds([reading_of(clock, unit) for unit, _ in self.bounds])

    def fires(self, moment: Moment) -> str | None:
        return "; ".join(self.reasons(moment)) or None

    def reasons(self, moment: Moment) -> tuple[str, ...]:
        if not self._inside(moment.now):
            return ()
        history = tuple(one for one in moment.history if self._inside(one.clock))
        return self.rule.reasons(replace(moment, history=history))

    def keeps(self, records: Sequence[CheckpointRecord], now: float) -> Kept:
        inside = [r for r in records if self._holds([recorded(r, unit) for unit, _ in self.bounds])]
        return self.rule.keeps(inside, now)

    def relevant(self, history: Sequence[Observation]) -> tuple[Observation, ...]:
        return self.rule.relevant([one for one in history if self._inside(one.clock)])

    def __repr__(self) -> str:
        bounds = ", ".join(f"{unit}={bound}" for unit, bound in self.bounds)
        return f"{_bracketed(self.rule)}.{self.side}({bounds})"


@dataclass(frozen=True, slots=True, repr=False)
class AtMost(Rule):
    """A trigger slowed down by `.at_most(per=every(...))`."""

    triggers: ClassVar[bool] = True
    instead: ClassVar[str] = "`& every(...)`"
    rule: Rule
    pace: Rule

    def __post_init__(self) -> None:
        _refuse_whole_plan(self.rule, ".at_most()")
        if not isinstance(self.pace, Rule) or self.pace.per is None:
            raise PolicyError(
                f"per={self.pace!r} of .at_most() must be a plain interval such as every(minutes=10)"
            )

    @property
    def parts(self) -> tuple[Rule, ...]:
        return (self.rule,)

    def _interval(self) -> Interval:
        interval = self.pace.per
        assert interval is not None
        return interval

    def fires(self, moment: Moment) -> str | None:
        return "; ".join(self.reasons(moment)) or None

    def reasons(self, moment: Moment) -> tuple[str, ...]:
        interval = self._interval()
        passed = reading_of(moment.now, interval.unit) - reading_of(moment.last_save, interval.unit)
        held_back = moment.last_save.step > 0 and passed < interval.length
        return () if held_back else self.rule.reasons(moment)

    def __repr__(self) -> str:
        return f"{_bracketed(self.rule)}.at_most(per={self.pace!r})"


def _operand(left: Rule, operator: str, right: object) -> Rule:
    if not isinstance(right, Rule):
        raise PolicyError(
            f"{left!r} {operator} {right!r}: the right side must be a rule such as every(steps=100)"
        )
    return right


def _terms(rule: Rule, kind: type[AnyOf] | type[AllOf]) -> tuple[Rule, ...]:
    return rule.parts if isinstance(rule, kind) else (rule,)


def _bracketed(rule: Rule) -> str:
    return f"({rule!r})" if isinstance(rule, (AnyOf, AllOf, Not)) else repr(rule)


def _refuse_whole_plan(rule: Rule, operator: str) -> None:
    for leaf in rule.leaves():
        if leaf.whole_plan:
            raise PolicyError(
                f"{leaf!r} speaks about the whole plan and does not go with {operator}; join it with `|`"
            )


def _bounds(method: str, **given: int | None) -> Bounds:
    units: dict[str, Unit] = {"step": "step", "epoch": "epoch", "samples": "samples", "tokens": "tokens"}
    bounds: Bounds = tuple((units[n], whole(n, v, minimum=0)) for n, v in given.items() if v is not None)
    if not bounds:
        raise PolicyError(f".{method}() takes at least one of step=, epoch=, samples=, tokens=; found none")
    return bounds
