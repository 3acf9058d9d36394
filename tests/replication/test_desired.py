"""What a mirror ought to hold, as properties of the pure plan."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.catalog.checkpoints import Entry
from holdfast.catalog.keys import manifest_key
from holdfast.core.records import CheckpointRecord
from holdfast.policies import Rule, best, every, last, limit, plan, tagged, within
from holdfast.replication.desired import (
    Departure,
    Held,
    Location,
    MirrorPlan,
    Past,
    Turn,
    plan_mirror,
    removable,
)

NOW = 10_000.0
RULES: list[Rule | None] = [
    None,
    last(2),
    every(steps=4),
    best("loss", mode="min", k=2),
    last(1) | tagged(),
    within(hours=1),
    limit(count=3),
]


def held(step: int, attempt: str, *, ordinal: int = 0, generation: int = 1, **fields: object) -> Held:
    fields = {"time": float(step), "metrics": {"loss": (step * 7) % 5}, "stored_bytes": 10} | fields
    record = CheckpointRecord(step=step, attempt=attempt, **fields)  # type: ignore[arg-type]
    return Held(Entry(manifest_key(step, ordinal), step, ordinal), record, generation)


@st.composite
def a_held(draw: st.DrawFn, step: int, attempts: str) -> Held:
    demoted = draw(st.booleans()) if draw(st.integers(0, 4)) == 0 else False
    return held(
        step,
        f"{step}{draw(st.sampled_from(attempts))}",
        ordinal=draw(st.sampled_from([0, 0, 0, 1, 2])),
        generation=draw(st.integers(1, 3)),
        demoted=demoted,
        tags=frozenset(["deployed"]) if draw(st.integers(0, 5)) == 0 else frozenset(),
        verified=draw(st.integers(0, 5)) == 0,
    )


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Location, Location, Past]:
    """A primary and a mirror whose histories have grown apart in every way."""
    ours, theirs = [], []
    ours_broken, theirs_broken = [], []
    departed: dict[str, Departure] = {}
    for step in range(1, 13):
        there = draw(st.sampled_from(["no", "same", "other", "broken", "no", "same"]))
        here = draw(st.sampled_from(["no", "yes", "yes", "broken"]))
        one = draw(a_held(step, "ab"))
        if here == "yes":
            ours.append(one)
        elif here == "broken":
            ours_broken.append(one.entry)
        if there == "same":
            theirs.append(one)
        elif there == "other":
            theirs.append(draw(a_held(step, "abc")))
        elif there == "broken":
            theirs_broken.append(one.entry)
        for attempt in "abc":
            word = draw(st.sampled_from([None, None, None, "set aside", "removed", "removed by hand"]))
            if word is not None:
                departed[f"{step}{attempt}"] = word  # type: ignore[assignment]
    turns = draw(
        st.lists(st.builds(Turn, st.integers(1, 3), st.floats(0, 14), st.integers(0, 12)), max_size=2)
    )
    return Location.of(ours, ours_broken), Location.of(theirs, theirs_broken), Past(departed, tuple(turns))


def carried_out(decided: MirrorPlan, mirror: Location, copied: set[int]) -> Location:
    """What the mirror holds when these copies succeeded and what may be removed was."""
    there = dict(mirror.held)
    broken = dict(mirror.broken)
    for one in decided.copy:
        if one.step in copied:
            there[one.step] = one
            broken.pop(one.step, None)
    for gone in removable(decided, mirror, copied):
        there.pop(gone.step, None)
        broken.pop(gone.step, None)
    return Location(there, broken)


def decide(world: tuple[Location, Location, Past], rule: Rule | None) -> MirrorPlan:
    primary, mirror, past = world
    return plan_mirror(primary, mirror, past, rule, now=NOW)


@given(worlds(), st.sampled_from(RULES))
@settings(max_examples=150)
def test_one_whole_pass_leaves_nothing_to_do(
    world: tuple[Location, Location, Past], rule: Rule | None
) -> None:
    primary, mirror, past = world
    first = decide(world, rule)
    after = carried_out(first, mirror, {h.step for h in first.copy})
    again = plan_mirror(primary, after, past, rule, now=NOW)
    assert (again.copy, again.remove) == ((), ())
    assert {*first.kept} == {*after.held} | {
        s for s in first.kept if s in mirror.broken and s not in after.held
    }


@given(worlds(), st.sampled_from(RULES), st.data())
@settings(max_examples=150)
def test_passes_that_are_cut_off_anywhere_converge_to_the_same(
    world: tuple[Location, Location, Past], rule: Rule | None, data: st.DataObject
) -> None:
    primary, mirror, past = world
    undisturbed = carried_out(first := decide(world, rule), mirror, {h.step for h in first.copy})
    for _ in range(3):
        decided = plan_mirror(primary, mirror, past, rule, now=NOW)
        order = [h.step for h in decided.copy]
        mirror = carried_out(decided, mirror, {*order[: data.draw(st.integers(0, len(order)))]})
    decided = plan_mirror(primary, mirror, past, rule, now=NOW)
    mirror = carried_out(decided, mirror, {h.step for h in decided.copy})
    decided = plan_mirror(primary, mirror, past, rule, now=NOW)
    assert decided.copy == ()
    mirror = carried_out(decided, mirror, set())
    if rule is None:  # a rule also looks at what is there, which a cut-off pass has changed
        assert mirror == undisturbed
    assert {s for s in primary.held if s in undisturbed.held} <= {*mirror.held}


@given(worlds(), st.sampled_from(RULES), st.data())
@settings(max_examples=150)
def test_a_mirror_is_never_left_without_its_newest_whole_checkpoint(
    world: tuple[Location, Location, Past], rule: Rule | None, data: st.DataObject
) -> None:
    decided = decide(world, rule)
    mirror = world[1]
    copied = data.draw(st.sets(st.sampled_from([h.step for h in decided.copy]))) if decided.copy else set()
    after = carried_out(decided, mirror, copied)
    if mirror.newest_whole is not None:
        assert after.newest_whole is not None
        if decided.newest is None or (
            decided.newest not in copied and decided.newest in {h.step for h in decided.copy}
        ):
            assert mirror.newest_whole.step in after.held
    if decided.newest is not None and (decided.newest in copied or decided.newest in mirror.held):
        assert decided.newest in after.held


@given(worlds(), st.sampled_from(RULES))
@settings(max_examples=150)
def test_only_what_a_word_or_a_rule_gives_up_is_removed(
    world: tuple[Location, Location, Past], rule: Rule | None
) -> None:
    primary, mirror, past = world
    decided = decide(world, rule)
    for gone in decided.remove:
        assert gone.reasons
        if rule is None and gone.attempt != "broken":
            assert gone.step not in primary.held
            assert past.departed.get(mirror.held[gone.step].record.attempt) is not None
    for step, one in mirror.held.items():
        word = past.departed.get(one.record.attempt)
        if step in primary.broken:
            assert step in decided.kept, "the mirror's may be the last good copy"
        if step not in primary.held and step not in primary.broken and word is None and rule is None:
            assert step in decided.kept, "the primary lost it without a word"
            assert step in decided.only_here
        if step not in primary.held and step not in primary.broken and word == "set aside":
            assert step not in decided.kept


@given(worlds(), st.sampled_from(RULES))
@settings(max_examples=150)
def test_guards_hold_on_a_mirror(world: tuple[Location, Location, Past], rule: Rule | None) -> None:
    primary, _, _ = world
    decided = decide(world, rule)
    ours = [h.record for h in primary.held.values()]
    for d in plan(ours, last(1), now=NOW):
        if any("tagged" in reason for reason in d.reasons):
            assert d.step in decided.kept
    newest = primary.newest_whole
    if newest is not None:
        assert decided.newest is not None
        assert decided.newest >= newest.step


def test_a_mirror_that_follows_gets_what_the_primary_holds_the_newest_first() -> None:
    primary = Location.of([held(1, "a"), held(2, "b"), held(3, "c", demoted=True)])
    decided = plan_mirror(primary, Location.of([held(1, "a")]), Past(), None, now=NOW)
    assert [h.step for h in decided.copy] == [2, 3]
    assert decided.newest == 2


def test_a_rule_of_its_own_keeps_what_the_primary_let_go() -> None:
    primary, mirror = Location.of([held(9, "z")]), Location.of([held(3, "c"), held(4, "d")])
    past = Past({"3c": "removed", "c": "removed", "d": "removed"})
    follows = plan_mirror(primary, mirror, past, None, now=NOW)
    own = plan_mirror(primary, mirror, past, every(steps=4), now=NOW)
    assert [r.step for r in follows.remove] == [3, 4]
    assert [r.step for r in own.remove] == [3]
    assert {*own.kept} == {4, 9}


@pytest.mark.parametrize("rule", [None, every(steps=1)])
def test_what_a_rollback_set_aside_is_set_aside_on_the_mirror(rule: Rule | None) -> None:
    primary = Location.of([held(5, "e")])
    mirror = Location.of([held(5, "e"), held(8, "h")])
    decided = plan_mirror(primary, mirror, Past({"h": "set aside"}), rule, now=NOW)
    assert [(r.step, r.how) for r in decided.remove] == [(8, "set aside")]
    assert decided.newest == 5


def test_a_branch_that_training_left_without_a_word_stays_and_counts_for_no_rule() -> None:
    primary, mirror = Location.of([held(5, "e")]), Location.of([held(8, "h", generation=1)])
    past = Past(turns=(Turn(2, 9.0, 4),))
    decided = plan_mirror(primary, mirror, past, last(1), now=NOW)
    assert decided.remove == ()
    assert decided.only_here == (8,)
    assert decided.newest == 5


def test_a_demotion_reaches_a_mirror_that_follows_and_no_other() -> None:
    whole, lighter = held(5, "e"), held(5, "e", ordinal=1, demoted=True, stored_bytes=3)
    primary, mirror = Location.of([lighter, held(9, "i")]), Location.of([whole, held(9, "i")])
    follows = plan_mirror(primary, mirror, Past(), None, now=NOW)
    assert (follows.copy, follows.displace) == ((lighter,), {5})
    own = plan_mirror(primary, mirror, Past(), every(steps=5), now=NOW)
    assert (own.copy, own.remove) == ((), ())


def test_another_state_of_a_step_gives_way_to_the_primarys() -> None:
    ours = held(5, "new", ordinal=1)
    for theirs in (
        held(5, "old"),
        held(5, "old", ordinal=3),
        replace(ours, record=replace(ours.record, attempt="x")),
    ):
        decided = plan_mirror(Location.of([ours]), Location.of([theirs]), Past(), None, now=NOW)
        assert (decided.copy, decided.displace, decided.remove) == ((ours,), {5}, ())
