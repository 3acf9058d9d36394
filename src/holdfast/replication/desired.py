"""What a mirror ought to hold: a pure function of the primary's history, the run log, the mirror's rule and what lies
there.

The primary is the truth: what it lists is what a step is. What only the mirror holds goes if the run log (or the
primary's trash) says that this very checkpoint was set aside, or removed and the mirror has no rule of its own; of what
merely is not there any more a mirror is the last copy, and it stays. The guards of retention hold on a mirror too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal, TypeAlias

from holdfast.catalog.checkpoints import Entry
from holdfast.catalog.summary import Summary
from holdfast.core.records import CheckpointRecord
from holdfast.policies import Rule, plan

__all__ = [
    "Departure",
    "Held",
    "Location",
    "MirrorPlan",
    "Past",
    "Removal",
    "Turn",
    "plan_mirror",
    "removable",
]

Departure: TypeAlias = Literal["set aside", "removed", "removed by hand"]
Why: TypeAlias = Literal["set aside", "removed"]


@dataclass(frozen=True, slots=True)
class Held:
    """A checkpoint in one location: where its manifest lies, what policies see, and whose lease it was made under."""

    entry: Entry
    record: CheckpointRecord
    generation: int = 0
    summary: Summary | None = field(default=None, compare=False, repr=False)

    @property
    def step(self) -> int:
        return self.entry.step

    def sizes(self) -> dict[str, int]:
        """Return the sizes of the data files that it needs, by key."""
        if self.summary is None:
            return {self.entry.key: self.record.stored_bytes}
        return self.summary.sizes()

    def is_state(self, other: Held) -> bool:
        """Return whether both are the same state of a step: equal bytes under an equal key."""
        return (self.entry, self.record.attempt, self.record.demoted) == (
            other.entry,
            other.record.attempt,
            other.record.demoted,
        )


@dataclass(frozen=True, slots=True)
class Location:
    """The newest state of each step that a location holds, and the steps whose manifest there does not verify. Of the
    `incomplete` ones data is known to be missing there."""

    held: Mapping[int, Held] = field(default_factory=lambda: MappingProxyType({}))
    broken: Mapping[int, Entry] = field(default_factory=lambda: MappingProxyType({}))
    incomplete: frozenset[int] = frozenset()

    @staticmethod
    def of(held: Iterable[Held], broken: Iterable[Entry] = ()) -> Location:
        """Return a location that holds these."""
        return Location({h.step: h for h in held}, {e.step: e for e in broken})

    @property
    def newest_whole(self) -> Held | None:
        """The newest checkpoint that can be resumed from."""
        whole = [h for s, h in self.held.items() if not h.record.demoted and s not in self.incomplete]
        return max(whole, key=lambda h: h.step, default=None)


@dataclass(frozen=True, slots=True, order=True)
class Turn:
    """Training went on from `step`: what an earlier holder, or this one before `time`, saved beyond it is left."""

    generation: int
    time: float
    step: int


@dataclass(frozen=True, slots=True)
class Past:
    """What the run log and the primary's trash say of checkpoints that are gone, by attempt, and where training turned
    back. Those that were `undone` had left, and are back because somebody wanted them."""

    departed: Mapping[str, Departure] = field(default_factory=lambda: MappingProxyType({}))
    turns: tuple[Turn, ...] = ()
    in_trash: frozenset[str] = frozenset()  # what can still be brought back at the primary
    undone: frozenset[str] = frozenset()

    def left_behind(self, step: int, attempt: str, generation: int, time: float) -> bool:
        """Return whether training went on from an earlier step after this was saved."""
        saved = (generation, time)
        return attempt not in self.undone and any(
            step > t.step and saved < (t.generation, t.time) for t in self.turns
        )

    def joined(self, other: Past) -> Past:
        """Return what both say; where they differ this one's word goes before that of the other."""
        theirs: dict[str, Departure] = {a: how for a, how in other.departed.items() if a not in self.undone}
        return Past(
            {**theirs, **self.departed},
            tuple(sorted({*self.turns, *other.turns})),
            self.in_trash | other.in_trash,
            self.undone | other.undone.difference(self.departed),
        )


@dataclass(frozen=True, slots=True)
class Removal:
    """A checkpoint that a mirror ought not to list any more: deleted, or set aside, so that for a while it can be
    brought back as on the primary."""

    step: int
    attempt: str
    how: Why
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MirrorPlan:
    """What to do: `copy`, the most precious first, and `remove` afterwards.

    `displace` are the steps where another state, or a manifest that does not verify, is to be set aside as the copy is
    put in its place. `kept` says why for every step that the mirror ought to hold.
    """

    copy: tuple[Held, ...]
    displace: frozenset[int]
    remove: tuple[Removal, ...]
    kept: Mapping[int, tuple[str, ...]]
    newest: int | None  # the newest step that can be resumed from of what the mirror ought to hold
    only_here: tuple[int, ...] = ()  # steps that the primary lost without a word


@dataclass(slots=True)
class _Draft:
    """A plan in the making. `candidates` are what the rule decides on, by step; `there` are those in place already."""

    candidates: dict[int, Held] = field(default_factory=dict)
    there: set[int] = field(default_factory=set)
    kept: dict[int, tuple[str, ...]] = field(default_factory=dict)
    remove: dict[int, Removal] = field(default_factory=dict)
    only_here: list[int] = field(default_factory=list)

    def leave(self, held: Held, how: Why, *reasons: str) -> None:
        self.remove[held.step] = Removal(held.step, held.record.attempt, how, reasons)


def plan_mirror(
    primary: Location,
    mirror: Location,
    past: Past,
    rule: Rule | None,
    *,
    now: float,
) -> MirrorPlan:
    """Decide what a mirror gets, keeps and gives up. `rule=None` follows the primary.

    `now` is wall time in seconds since the Unix epoch.
    """
    draft = _Draft()
    for step in sorted({*primary.held, *primary.broken, *mirror.held, *mirror.broken}):
        ours, theirs = primary.held.get(step), mirror.held.get(step)
        if ours is not None:
            _of_both(draft, ours, theirs, follows=rule is None, complete=step not in mirror.incomplete)
        elif theirs is not None and step in mirror.incomplete:
            draft.kept[step] = ("its data is missing, and the primary does not list it",)
        elif theirs is not None and step in primary.broken:
            draft.kept[step] = ("the primary's own does not verify",)
        elif theirs is not None:
            _of_mirror_alone(draft, theirs, past, follows=rule is None)

    def together(records: Sequence[CheckpointRecord]) -> int:
        sizes: dict[str, int] = {}
        for record in records:
            sizes.update(draft.candidates[record.step].sizes())
        return sum(sizes.values())

    records = [h.record for h in draft.candidates.values()]
    for d in plan(records, rule, now=now, stored_together=together):
        held = mirror.held.get(d.step)
        if d.action == "keep":
            draft.kept[d.step] = d.reasons
        elif held is not None:
            draft.leave(held, "removed", *d.reasons)
    for step in mirror.broken:
        if step in draft.candidates and step not in draft.kept:
            draft.remove[step] = Removal(
                step, "broken", "set aside", ("it does not verify, and no rule keeps it",)
            )
    wanted = [h for s, h in draft.candidates.items() if s in draft.kept]
    copy = [h for h in wanted if h.step not in draft.there]
    copy.sort(key=lambda h: (not h.record.demoted, h.step), reverse=True)
    return MirrorPlan(
        tuple(copy),
        frozenset(h.step for h in copy if _is_in_the_way(h, mirror)),
        tuple(draft.remove.values()),
        draft.kept,
        newest=max((h.step for h in wanted if not h.record.demoted), default=None),
        only_here=tuple(draft.only_here),
    )


def _of_both(draft: _Draft, ours: Held, theirs: Held | None, *, follows: bool, complete: bool) -> None:
    """Take in a step that the primary lists."""
    if theirs is not None:
        ours = replace(ours, record=replace(ours.record, leased=theirs.record.leased))
    draft.candidates[ours.step] = ours
    if theirs is None or not complete:
        return
    same_attempt = ours.record.attempt == theirs.record.attempt
    if ours.is_state(theirs):
        draft.there.add(ours.step)
    elif same_attempt and ours.record.demoted and not theirs.record.demoted and not follows:
        # The primary kept the weights alone; a mirror with a rule of its own keeps what it has.
        stored, new = theirs.record.stored_bytes, theirs.record.new_bytes
        whole = replace(ours.record, demoted=False, stored_bytes=stored, new_bytes=new)
        draft.candidates[ours.step] = replace(theirs, record=whole)
        draft.there.add(ours.step)


def _of_mirror_alone(draft: _Draft, theirs: Held, past: Past, *, follows: bool) -> None:
    """Take in a step that only the mirror lists."""
    attempt = theirs.record.attempt
    gone = past.departed.get(attempt)
    if gone == "set aside":
        draft.leave(theirs, "set aside", "it was set aside on the primary")
    elif gone is not None and follows:
        undoable = gone == "removed by hand" or attempt in past.in_trash
        draft.leave(theirs, "set aside" if undoable else "removed", "it was removed from the primary")
    elif gone is None and past.left_behind(theirs.step, attempt, theirs.generation, theirs.record.time):
        # No word says that it was given up on purpose: no rule decides on it, and it stays.
        draft.kept[theirs.step] = ("only here, of a branch that training left",)
        draft.only_here.append(theirs.step)
    else:
        draft.candidates[theirs.step] = theirs
        draft.there.add(theirs.step)
        if gone is None:
            draft.only_here.append(theirs.step)


def _is_in_the_way(held: Held, mirror: Location) -> bool:
    theirs = mirror.held.get(held.step)
    return held.step in mirror.broken or (theirs is not None and not held.is_state(theirs))


def removable(decided: MirrorPlan, mirror: Location, copied: Iterable[int]) -> list[Removal]:
    """Return what may be removed now that `copied` steps are in place; `mirror` is what was there before.

    As long as the newest checkpoint that ought to be there is not, the newest one that is there stays.
    """
    missing = {h.step for h in decided.copy}.difference(copied)
    in_place = decided.newest is not None and decided.newest not in missing
    newest = mirror.newest_whole
    spared = None if in_place or newest is None else newest.step
    return [r for r in decided.remove if r.step != spared]
