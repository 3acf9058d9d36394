"""The plan of what to keep: a pure function of the records and the rules, with a reason for each decision.

It promises: guards are never overridden; a run with checkpoints keeps at least one; the order of rules does
not matter; a plan of what was kept keeps it all; and joining a rule with `|` never drops more, except for
`limit`, which is there to drop.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

from holdfast.core.errors import PolicyError
from holdfast.core.records import CheckpointRecord, Moment, Observation
from holdfast.policies.retention import Demote, Limit
from holdfast.policies.rules import AnyOf, Kept, Key, Place, Rule, identity

__all__ = [
    "Action",
    "Decision",
    "decide",
    "guards",
    "plan",
    "relevant",
    "require_retention",
    "require_trigger",
]

Action: TypeAlias = Literal["keep", "drop", "demote"]


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with one checkpoint, and why."""

    step: int
    attempt: str
    action: Action
    reasons: tuple[str, ...]


def decide(trigger: Rule, moment: Moment) -> tuple[str, ...]:
    """Return every reason of `trigger` to save at this moment, each once; empty means: do not save.

    Raises PolicyError if `trigger` is not a trigger.
    """
    return require_trigger(trigger).reasons(moment)


def relevant(trigger: Rule, history: Sequence[Observation]) -> tuple[Observation, ...]:
    """Return the part of the history that can still change an answer of `trigger`, oldest first.

    Passing this instead of the whole history, extended by each new observation, gives the same decisions and
    keeps the cost of a step independent of the length of the run.
    """
    return require_trigger(trigger).relevant(history)


def require_trigger(rule: object) -> Rule:
    """Return `rule` if it can say when to save. Raises PolicyError that names the part which cannot."""
    return _require(rule, "save=")


def require_retention(rule: object) -> Rule:
    """Return `rule` if it can say what to keep. Raises PolicyError that names the part which cannot."""
    return _require(rule, "keep=")


def plan(
    records: Iterable[CheckpointRecord],
    rule: Rule | None,
    *,
    now: float,
    stored_together: Callable[[Sequence[CheckpointRecord]], int] | None = None,
) -> tuple[Decision, ...]:
    """Decide for every checkpoint whether to keep, demote or drop it; one decision per record, in step order.

    `rule=None` keeps everything. `now` is wall time in seconds since the epoch. `stored_together` returns the
    bytes that a set of checkpoints takes up, of fewer checkpoints never more; without it, a `limit` in bytes adds
    up `stored_bytes`, which counts shared files more than once and so may drop more than it had to, never less.
    Raises PolicyError if `rule` says nothing about what to keep, or if a `where` function fails.
    """
    ordered = sorted(records, key=_age)
    terms = _terms(None if rule is None else require_retention(rule))
    whole = _merge(term.keeps(ordered, now) for term in terms if not isinstance(term, (Demote, Limit)))
    weights = _merge(term.keeps(ordered, now) for term in terms if isinstance(term, Demote))
    if all(isinstance(term, Limit) for term in terms):
        everything = "no rule but the limit" if terms else "no retention rule: everything is kept"
        whole = {identity(record): (everything,) for record in ordered}
    draft = _Draft(ordered, guards(ordered), whole, weights)
    caps = sorted((term for term in terms if isinstance(term, Limit)), key=repr)
    over: dict[Key, str] = {}
    if caps:
        prized = _merge(
            term.keeps(ordered, now) for term in terms if any(leaf.prized for leaf in term.leaves())
        )
        over = _enforce(draft, caps, prized, stored_together or _added_up)
    return tuple(draft.decision(record, over.get(identity(record))) for record in ordered)


def guards(ordered: Sequence[CheckpointRecord]) -> Kept:
    """Return the checkpoints that no rule may touch, with reasons. `ordered` is in step order."""
    found: defaultdict[Key, list[str]] = defaultdict(list)
    whole = [record for record in ordered if not record.demoted]
    for record in (whole or ordered)[-1:]:
        found[identity(record)].append("guard: newest committed")
    verified = [record for record in ordered if record.verified]
    for record in ([record for record in verified if not record.demoted] or verified)[-1:]:
        found[identity(record)].append("guard: newest verified")
    for record in ordered:
        if record.resumed_from:
            found[identity(record)].append("guard: resumed from")
        if record.leased:
            found[identity(record)].append("guard: in use by a reader")
        if record.foreign:
            found[identity(record)].append("guard: not written by holdfast")
        if record.tags:
            found[identity(record)].append(f"guard: tagged {', '.join(sorted(record.tags))}")
    return {key: tuple(reasons) for key, reasons in found.items()}


@dataclass(frozen=True, slots=True)
class _Draft:
    """The plan before limits: who is guarded, who is kept whole, and of whom the weights are kept."""

    ordered: Sequence[CheckpointRecord]
    guarded: Kept
    whole: Kept
    weights: Kept

    def reasons(self, key: Key) -> tuple[str, ...]:
        whole, weights, guarded = (
            self.whole.get(key, ()),
            self.weights.get(key, ()),
            self.guarded.get(key, ()),
        )
        if len(whole) + len(weights) < 2:
            return (*guarded, *whole, *weights)
        return (*guarded, *sorted({*whole, *weights}))

    def decision(self, record: CheckpointRecord, over: str | None) -> Decision:
        key = identity(record)
        reasons = self.reasons(key)
        action: Action = "keep"
        if over is not None:
            action, reasons = "drop", (over, *(f"otherwise kept by {reason}" for reason in reasons))
        elif not reasons:
            action, reasons = "drop", ("no rule keeps it",)
        elif key not in self.guarded and key not in self.whole and not record.demoted:
            action = "demote"
        return Decision(record.step, record.attempt, action, reasons)


def _enforce(
    draft: _Draft,
    caps: Sequence[Limit],
    prized: Kept,
    stored_together: Callable[[Sequence[CheckpointRecord]], int],
) -> dict[Key, str]:
    """Return what to drop to come under all caps: weights-only first, then the oldest, the best last."""
    kept = [record for record in draft.ordered if draft.reasons(identity(record))]
    free = [record for record in kept if identity(record) not in draft.guarded]
    free.sort(key=lambda record: (identity(record) in draft.whole, identity(record) in prized, _age(record)))
    goes = [identity(record) for record in free]

    def fits(cap: Limit, drops: int) -> bool:
        gone = set(goes[:drops])
        left = [record for record in kept if identity(record) not in gone]
        return not cap.exceeded(stored_together(left), len(left))

    # What is left only shrinks as more goes, so how many must go for a cap is found by halving.
    least = [bisect_left(range(len(goes)), x=True, key=partial(fits, cap)) for cap in caps]
    return {
        key: f"over {next(cap for cap, drops in zip(caps, least, strict=True) if place < drops)!r}"
        for place, key in enumerate(goes[: max(least)])
    }


def _added_up(records: Sequence[CheckpointRecord]) -> int:
    return sum(record.stored_bytes for record in records)


def _age(record: CheckpointRecord) -> tuple[int, float, str]:
    return (record.step, record.time, record.attempt)


def _terms(rule: Rule | None) -> tuple[Rule, ...]:
    if rule is None:
        return ()
    return rule.parts if isinstance(rule, AnyOf) else (rule,)


def _merge(each: Iterable[Kept]) -> Kept:
    merged: Kept = {}
    for kept in each:
        for key, reasons in kept.items():
            merged[key] = (*merged.get(key, ()), *reasons)
    return merged


def _require(rule: object, place: Place) -> Rule:
    if not isinstance(rule, Rule):
        raise PolicyError(
            f"{place}{rule!r} is a {type(rule).__name__}; expected a rule such as every(steps=100)"
        )
    for node in rule.nodes():
        if refusal := node.refusal(place):
            raise PolicyError(refusal)
    return rule
