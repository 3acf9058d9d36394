"""A pass over a mirror: whatever became of the primary, the mirror becomes it too, and a pass may be cut off anywhere."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable

import pytest

import holdfast
from holdfast import best, every, last
from holdfast.catalog.lease import acquire
from holdfast.catalog.readers import reading
from holdfast.core.errors import LeaseHeld, OutOfSpace, StateError, StoreError
from holdfast.format.packed import Pack
from holdfast.replication.reconcile import Goal, Reconciler
from holdfast.stores import LocalStore, MemoryStore, Store
from holdfast.testing import Crash, Fault, FaultPlan, FaultStore, MockClock, every_call
from replication.places import flip
from replication.runs import (
    assert_is_copy,
    assert_sound,
    attempts,
    copy_of,
    left_over,
    reconcile,
    roll_back,
    save,
    source_of,
    steps,
    train,
)


@pytest.fixture
def primary() -> MemoryStore:
    store = MemoryStore("primary")
    train(store, 4)
    return store


@pytest.fixture(params=["local", "memory"])
def mirror(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Store:
    return LocalStore(tmp_path / "mirror") if request.param == "local" else MemoryStore("mirror")


# ---- what became of the primary becomes of the mirror ---------------------------------------------------------------


def nothing(primary: Store) -> None:
    pass


def more(primary: Store) -> None:
    train(primary, 7)


def rolled_back(primary: Store) -> None:
    roll_back(primary, 2, 4)


def pruned(primary: Store) -> None:
    train(primary, 6, keep=last(2))


def demoted(primary: Store) -> None:
    holdfast.Run(primary).prune(last(1) | holdfast.demote(every(steps=2)))


def removed_by_hand(primary: Store) -> None:
    holdfast.Run(primary).remove([2], grace=0)


def committed_again(primary: Store) -> None:
    save(primary, 3)  # a newer state of step 3


def retagged(primary: Store) -> None:
    run = holdfast.Run(primary)
    run.tag("good", 1)
    run.tag("gone", 2)
    run.tag("good", 3)
    run.untag("gone")


CHANGES = [nothing, more, rolled_back, pruned, demoted, removed_by_hand, committed_again, retagged]


@pytest.mark.parametrize("change", CHANGES)
def test_a_mirror_that_follows_becomes_what_the_primary_became(
    primary: MemoryStore, mirror: Store, change: Callable[[Store], None]
) -> None:
    holdfast.Run(primary).tag("gone", 2)
    reconcile(primary, mirror)
    assert_is_copy(mirror, primary)
    holdfast.Run(primary).untag("gone")
    change(primary)
    outcome = reconcile(primary, mirror)
    assert_is_copy(mirror, primary)
    assert (outcome.missing, outcome.failed, outcome.newest) == ([], {}, max(steps(primary)))
    assert not left_over(mirror)
    again = reconcile(primary, mirror)
    assert (again.copied.objects, again.removed) == (0, [])


def test_passes_of_one_reconciler_follow_a_run_that_goes_on(primary: MemoryStore, mirror: Store) -> None:
    reconciler = Reconciler(mirror, Goal(), MockClock())
    for change in (nothing, more, rolled_back, retagged, committed_again, removed_by_hand, demoted, pruned):
        change(primary)
        reconciler.run(source_of(primary))
        assert_is_copy(mirror, primary)


def test_a_pass_sees_what_others_did_to_the_mirror(primary: MemoryStore, mirror: Store) -> None:
    reconciler = Reconciler(mirror, Goal(), clock := MockClock())
    reconciler.run(source_of(primary))
    holdfast.Run(mirror).remove([2], grace=0)
    assert reconciler.run(source_of(primary)).placed == [2]
    mirror.delete(mirror.names("data")[:1])
    assert reconciler.run(source_of(primary)).placed == []
    clock.advance(1000)
    assert reconciler.run(source_of(primary)).placed != []
    assert attempts(mirror) == attempts(primary)
    assert_sound(mirror)


def test_a_rule_of_its_own(primary: MemoryStore, mirror: Store) -> None:
    rule = every(steps=3) | best("loss", mode="min")
    reconcile(primary, mirror, Goal(rule))
    assert steps(mirror) == [3, 4]  # 4 is the newest
    train(primary, 8, keep=last(1))
    reconcile(primary, mirror, Goal(rule))
    assert steps(primary) == [4, 8]  # training went on from 4
    assert steps(mirror) == [3, 4, 8]
    assert_sound(mirror)


def test_packed_copies_hold_the_same_checkpoints(primary: MemoryStore, mirror: Store) -> None:
    reconcile(primary, mirror, Goal(pack=Pack(), verify=True))
    assert_is_copy(mirror, primary)
    assert all(key.endswith(".zst") for key in mirror.names("data"))
    holdfast.Run(primary).remove([2], grace=0)
    reconcile(primary, mirror, Goal(pack=Pack()))
    assert_is_copy(mirror, primary)
    assert not left_over(mirror)
    assert all(key.endswith(".zst") for key in mirror.names("data"))


# ---- what a mirror never does ---------------------------------------------------------------------------------------


def test_what_the_primary_lost_without_a_word_stays(primary: MemoryStore, mirror: Store) -> None:
    reconcile(primary, mirror)
    primary.delete(["checkpoints/000000000002.json"])
    outcome = reconcile(primary, mirror)
    assert steps(mirror) == [1, 2, 3, 4]
    assert outcome.plan.only_here == (2,)


def test_another_run_is_refused_by_name(primary: MemoryStore, mirror: Store) -> None:
    save(mirror, 1)
    before = attempts(mirror)
    with pytest.raises(StateError, match=mirror.url):
        reconcile(primary, mirror)
    assert attempts(mirror) == before


def test_a_mirror_that_is_being_written_is_left_alone(primary: MemoryStore, mirror: Store) -> None:
    reconcile(primary, mirror)
    lease = acquire(mirror, MockClock(), heartbeat=False)
    with pytest.raises(LeaseHeld):
        reconcile(primary, mirror)
    lease.release()
    reconcile(primary, mirror)


def test_what_is_bad_at_the_primary_is_not_copied_and_keeps_nothing_else_from_it(
    primary: MemoryStore, mirror: Store
) -> None:
    (key,) = [k for k in primary.names("data") if k.startswith("data/000000000003") and "model" in k]
    flip(primary, key, primary.info(key).size - 1)
    outcome = reconcile(primary, mirror)
    assert steps(mirror) == [1, 2, 4]
    assert "data/000000000003" in outcome.failed[3]
    assert [h.step for h in outcome.missing] == [3]
    assert outcome.missing_bytes > 0
    assert_sound(mirror)


def test_a_bad_manifest_at_the_primary_takes_nothing_away(primary: MemoryStore, mirror: Store) -> None:
    reconcile(primary, mirror)
    flip(primary, "checkpoints/000000000003.json", 40)
    reconcile(primary, mirror)
    assert steps(mirror) == [1, 2, 3, 4]
    assert_sound(mirror)


def test_a_bad_tag_at_the_primary_stops_removals(primary: MemoryStore, mirror: Store) -> None:
    holdfast.Run(primary).tag("good", 2)
    reconcile(primary, mirror)
    holdfast.Run(primary).remove([1], grace=0)
    flip(primary, "tags/good.json", 10)
    reconcile(primary, mirror)
    assert steps(mirror) == [1, 2, 3, 4]


def test_bad_objects_of_the_mirror_are_written_anew(primary: MemoryStore, mirror: Store) -> None:
    reconcile(primary, mirror)
    flip(mirror, "checkpoints/000000000003.json", 40)
    reconcile(primary, mirror)
    assert_is_copy(mirror, primary)


def test_a_copy_is_read_back_where_that_is_asked_for(primary: MemoryStore) -> None:
    class Rotting(MemoryStore):
        """Changes a byte of each large object the first time it is written."""

        rotten = 0

        def _put(self, objects, *, if_absent):  # type: ignore[no-untyped-def]
            super()._put(objects, if_absent=if_absent)
            for key in objects:
                if key.startswith("data/") and "model" in key and not self.rotten:
                    self.rotten += 1
                    flip(self, key, self.info(key).size - 1)

    mirror = Rotting("rotting")
    reconcile(primary, mirror, Goal(verify=True))
    assert mirror.rotten == 1
    assert_is_copy(mirror, primary)


def test_the_next_owner_of_a_mirror_has_a_log_of_its_own(primary: MemoryStore, mirror: Store) -> None:
    for total in (5, 6, 7):  # each start of training has a generation, and a series of the log
        train(primary, total)
    reconcile(primary, mirror)
    before = {o.key: mirror.read(o.key) for o in mirror.list("log")}
    save(mirror, 9)
    after = {o.key: mirror.read(o.key) for o in mirror.list("log")}
    assert {key: after[key] for key in before} == before
    assert len(after) == len(before) + 1


# ---- a pass that is cut off, a store that fails ---------------------------------------------------------------------


def a_mirror_with_all_kinds_of_work(primary: MemoryStore) -> MemoryStore:
    """A mirror that lacks steps, holds an abandoned branch, and has another state of a step."""
    mirror = MemoryStore("mirror")
    reconcile(primary, mirror)
    roll_back(primary, 2, 5)
    holdfast.Run(primary).remove([1], grace=0)
    save(primary, 2)
    holdfast.Run(primary).tag("good", 4)
    return mirror


@pytest.mark.parametrize("when", ["before", "after", "torn"])
def test_killed_at_any_call_the_next_pass_finishes(primary: MemoryStore, when: str) -> None:
    start = a_mirror_with_all_kinds_of_work(primary)
    rounds = 0
    for plan in every_call("kill", when):  # type: ignore[arg-type]
        mirror = copy_of(start)
        try:
            reconcile(primary, FaultStore(mirror, plan))
        except Crash:
            rounds += 1
        assert max(steps(mirror), default=0) >= 4, "a mirror is never left without a newest checkpoint"
        assert_sound(mirror)
        outcome = reconcile(primary, mirror)
        assert outcome.missing == []
        assert_is_copy(mirror, primary)
        assert not left_over(mirror)
    assert rounds > 20


@pytest.mark.parametrize("kind", ["EIO", "ENOSPC", "503", "timeout"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_after_an_error_at_any_call_the_next_pass_finishes(
    primary: MemoryStore, kind: str, when: str
) -> None:
    start = a_mirror_with_all_kinds_of_work(primary)
    for plan in every_call(kind, when):  # type: ignore[arg-type]
        mirror = copy_of(start)
        reconciler = Reconciler(FaultStore(mirror, plan), Goal(), MockClock())
        for _ in range(2):
            try:
                reconciler.run(source_of(primary))
            except StoreError:
                assert plan.fired
            assert_sound(mirror)
        plan.faults.clear()
        reconciler.run(source_of(primary))
        assert_is_copy(mirror, primary)


def test_a_store_that_fails_again_and_again_ends_the_pass(primary: MemoryStore) -> None:
    plan = FaultPlan(Fault("EIO", call="write_streams", times=None))
    mirror = MemoryStore("mirror")
    outcome = reconcile(primary, FaultStore(mirror, plan))
    assert len(outcome.failed) == 2
    assert steps(mirror) == []


class Full(MemoryStore):
    """A store with so many bytes of room."""

    def __init__(self, room: int) -> None:
        super().__init__("full")
        self.total = room

    def _put(self, objects, *, if_absent):  # type: ignore[no-untyped-def]
        used = sum(o.size for o in self.list("data"))
        new = sum(len(data) for key, data in objects.items() if key.startswith("data/"))
        if new and used + new > self.total:
            raise OutOfSpace(28, f"{self.url}: no space left")
        super()._put(objects, if_absent=if_absent)


def test_a_full_mirror_makes_room_by_what_it_may_give_up_and_keeps_its_newest_until_then() -> None:
    primary = MemoryStore("primary")
    save(primary, 1)
    size = sum(o.size for o in primary.list("data"))
    mirror = Full(int(size * 2.2))
    reconcile(primary, mirror)
    for step in range(2, 6):
        save(primary, step)
        holdfast.Run(primary).prune(last(1))
        outcome = reconcile(primary, mirror)
        assert outcome.failed == {}
        assert steps(mirror) == [step]
    mirror.total = 0
    save(primary, 6)
    holdfast.Run(primary).prune(last(1))
    outcome = reconcile(primary, mirror)
    assert "no space left" in outcome.failed[6]
    assert steps(mirror) == [5]
    assert_sound(mirror)
    mirror.total = 10 * size
    reconcile(primary, mirror)
    assert_is_copy(mirror, primary)


# ---- the trash, and those who read ----------------------------------------------------------------------------------


def test_what_can_be_brought_back_at_the_primary_can_be_at_the_mirror(
    primary: MemoryStore, mirror: Store
) -> None:
    reconcile(primary, mirror)
    holdfast.Run(primary).remove([2])
    reconcile(primary, mirror)
    assert steps(mirror) == [1, 3, 4]
    holdfast.Run(mirror).undelete(2)
    assert steps(mirror) == [1, 2, 3, 4]
    reconcile(primary, mirror)
    assert steps(mirror) == [1, 3, 4]
    holdfast.Run(primary).undelete(2)
    reconcile(primary, mirror)
    assert steps(mirror) == [1, 2, 3, 4]
    assert_sound(mirror)


def test_what_is_being_read_at_a_mirror_stays(primary: MemoryStore, mirror: Store) -> None:
    reconcile(primary, mirror, Goal(every(steps=1)))
    manifest = holdfast.Run(mirror)[2].manifest
    with reading(mirror, manifest, "a test reads it"):
        reconcile(primary, mirror, Goal(last(1)))
        assert steps(mirror) == [2, 4]
        assert_sound(mirror)
    reconcile(primary, mirror, Goal(last(1)))
    assert steps(mirror) == [4]


def test_a_state_gives_way_only_when_the_data_of_the_next_one_is_there() -> None:
    primary = MemoryStore("primary")
    save(primary, 1)
    start = MemoryStore("mirror")
    reconcile(primary, start)
    save(primary, 1)  # a newer state of the only step
    needed = {key for held in source_of(primary).location.held.values() for key in held.sizes()}
    for plan in every_call("kill"):
        mirror = copy_of(start)
        with contextlib.suppress(Crash):
            reconcile(primary, FaultStore(mirror, plan))
        assert steps(mirror) == [1] or needed <= {*mirror.names("data")}
