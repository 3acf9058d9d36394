"""The trash: what is deleted stays whole until its grace has ended, and comes back as the very same checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from manifests import Interrupted, data_key, manifest, put

import holdfast
from holdfast.catalog.checkpoints import entries
from holdfast.catalog.deletion import Ages, collect
from holdfast.catalog.keys import TRASH_SECONDS, parse_trash_key, trash_key
from holdfast.catalog.lease import acquire
from holdfast.catalog.trash import Leaving, list_trash, read_trash, restore_from_trash, retire
from holdfast.core.buffers import Buffer
from holdfast.core.errors import (
    DigestMismatch,
    InvalidFormat,
    LeaseHeld,
    MissingObject,
    NoCheckpoint,
    PolicyError,
    StateError,
    StoreError,
    Truncated,
)
from holdfast.format.manifest import encode_manifest
from holdfast.stores import MemoryStore
from holdfast.testing import MockClock

HOUR = 3600.0


class Dated(MemoryStore):
    """Dates what it holds by a clock that the test moves."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = MockClock()

    def _put(self, objects, *, if_absent: bool) -> None:
        super()._put(objects, if_absent=if_absent)
        for key in objects:
            self._objects[key] = (self._objects[key][0], self.clock.now())

    def append(self, key: str, data: Buffer) -> None:
        super().append(key, data)
        self._objects[key] = (self._objects[key][0], self.clock.now())


@pytest.fixture
def store() -> Dated:
    """Three checkpoints; what never changes is stored with the first."""
    store = Dated()
    for step in (1, 2, 3):
        state = {"m": {"frozen": np.ones(20_000), "w": np.full(3, step)}}
        holdfast.save(store, state, step=step)
    return store


def run_of(store: Dated) -> holdfast.Run:
    return holdfast.Run(store, time=store.clock)


def test_what_is_removed_comes_back_byte_for_byte(store: Dated) -> None:
    run = run_of(store)
    before = dict(store._objects)
    run.tag("mine", 1)
    assert run.remove([1], force=True) == 0, "step 2 and 3 need its large file"
    assert run.steps == [2, 3]
    assert run.tags == {}
    assert [(d.step, d.tags, d.reasons, d.problem) for d in run.trash()] == [
        (1, ("mine",), ("asked for",), "")
    ]
    back = run.undelete(1)
    assert back.step == 1
    assert run.steps == [1, 2, 3]
    assert run.tags == {"mine": 1}
    assert run.trash() == []
    assert run.verify() == {1: [], 2: [], 3: []}
    for key, (raw, _) in before.items():
        if key.startswith(("checkpoints/", "data/")):
            assert store._objects[key][0] == raw
    assert [e.action for e in run.events() if hasattr(e, "action")] == ["removed", "brought back"]


def test_the_bytes_of_what_is_removed_stay_until_the_grace_has_ended_by_the_clock_of_the_store(
    store: Dated,
) -> None:
    run = run_of(store)
    freed = run.remove([3], force=True, grace="2h")
    assert freed > 0
    assert run.collect().nbytes == 0
    store.clock.advance(2 * HOUR - 1)
    assert run_of(store).undelete(3).step == 3
    run.remove([3], force=True, grace="2h")
    store.clock.advance(2 * HOUR)
    assert run.collect().nbytes == freed
    with pytest.raises(NoCheckpoint, match="holds no step 3; it holds: nothing"):
        run.undelete(3)
    assert run_of(store).verify() == {1: [], 2: []}


def test_a_writers_own_clock_frees_nothing(store: Dated) -> None:
    """A machine whose clock is a year ahead takes the run up: the store says how old things are."""
    run_of(store).remove([3], force=True)
    ahead = MockClock(store.clock.now() + 365 * 24 * HOUR)
    assert holdfast.Run(store, time=ahead).collect().trashed == 0
    assert run_of(store).undelete(3).step == 3


def test_collecting_with_a_shorter_grace_empties_the_trash(store: Dated) -> None:
    run = run_of(store)
    run.remove([1, 2], grace="7d")
    store.clock.advance(HOUR)
    run.remove([3], force=True, grace="7d")
    assert run.collect(grace="30m").trashed == 2
    assert [d.step for d in run.trash()] == [3]
    assert run.collect(grace=0).trashed == 1
    assert store.list("data") == []


@pytest.mark.parametrize("grace", ["-1h", "soon", float("nan"), 10**12, "999999999999.5s"])
def test_a_grace_that_makes_no_sense_is_refused_before_anything_is_done(store: Dated, grace: str) -> None:
    with pytest.raises(PolicyError):
        run_of(store).remove([1], grace=grace)
    with pytest.raises(PolicyError):
        run_of(store).prune(holdfast.last(1), grace=grace)
    assert run_of(store).steps == [1, 2, 3]


def test_the_longest_grace_that_a_key_can_say(store: Dated) -> None:
    run = run_of(store)
    run.remove([1], grace=10**12 - 1)
    assert [d.step for d in run.trash()] == [1]
    assert run.undelete(1).step == 1


def test_without_grace_nothing_stays(store: Dated) -> None:
    run = run_of(store)
    run.prune(holdfast.last(1), grace=0)
    assert run.trash() == []
    assert run.steps == [3]
    assert run.verify() == {3: []}


def test_prune_says_why_in_the_trash(store: Dated) -> None:
    run = run_of(store)
    run.prune(holdfast.last(1))
    assert [(d.step, d.reasons) for d in run.trash()] == [
        (1, ("no rule keeps it",)),
        (2, ("no rule keeps it",)),
    ]


def test_what_only_one_in_the_trash_needs_is_told(store: Dated) -> None:
    run = run_of(store)
    (shared,) = run[1].manifest.file_keys & run[2].manifest.file_keys
    size = store.info(shared).size
    run.remove([1, 2, 3], force=True)
    alone = [d.freed_bytes for d in run.trash()]
    assert alone[0] == 0
    assert run.collect(grace=0).nbytes == sum(alone) + size


def test_a_newer_state_of_the_step_is_not_touched(store: Dated) -> None:
    run = run_of(store)
    run.remove([3], force=True)
    holdfast.save(store, {"m": {"w": np.full(3, 9)}}, step=3)
    with pytest.raises(StateError, match="step 3 has another checkpoint now") as raised:
        run.undelete(3)
    newer = holdfast.Run(store)[3].manifest.attempt
    assert newer in str(raised.value)
    assert holdfast.load(store, step=3)["m"]["w"].tolist() == [9, 9, 9]
    assert [d.step for d in run.trash()] == [3]


def test_several_of_one_step_each_come_back_by_their_attempt(store: Dated) -> None:
    run = run_of(store)
    first = run[3].manifest.attempt
    run.remove([3], force=True)
    store.clock.advance(5)
    holdfast.save(store, {"m": {"w": np.full(3, 9)}}, step=3)
    run.refresh()
    run.remove([3], force=True)
    assert run.undelete(3).manifest.attempt != first
    run.remove([3], force=True)
    assert run.undelete(3, first).manifest.attempt == first


def test_what_the_trash_does_not_take_stays_listed(tmp_path: Path) -> None:
    for step in (1, 2):
        holdfast.save(tmp_path, {"w": np.full(3, step)}, step=step)
    (tmp_path / "trash").write_bytes(b"a file in the place of the directory")
    with pytest.raises(StoreError, match=r"could not replace .*trash"):
        holdfast.Run(tmp_path).remove([1])
    assert holdfast.Run(tmp_path).steps == [1, 2]
    assert holdfast.Run(tmp_path).verify() == {1: [], 2: []}


@pytest.mark.parametrize("harm", ["gone", "short", "changed"])
def test_what_is_not_whole_does_not_come_back(store: Dated, harm: str) -> None:
    run = run_of(store)
    (key,) = run[3].manifest.file_keys - run[2].manifest.file_keys
    run.remove([3], force=True)
    raw = store.read(key)
    store.delete([key])
    if harm != "gone":
        store.create(key, raw[:-1] if harm == "short" else b"X" + raw[1:])
    error = {"gone": MissingObject, "short": Truncated, "changed": DigestMismatch}[harm]
    with pytest.raises(error, match=f"step 3 cannot be brought back whole: {key}"):
        run.undelete(3)
    assert run_of(store).steps == [1, 2]
    assert [d.step for d in run.trash()] == [3]


def test_an_undo_that_was_cut_short_is_finished_by_the_next_one(store: Dated) -> None:
    run = run_of(store)
    run.remove([3], force=True)
    (trashed,) = list_trash(store)
    document = store.read(trashed.key)
    restore_from_trash(store, trashed)
    store.replace(trashed.key, document)  # as if it had died before the last act
    assert run_of(store).steps == [1, 2, 3]
    assert run_of(store).trash() == [], "it is listed"
    restore_from_trash(store, trashed)
    assert run_of(store).collect(grace=0).trashed == 1
    assert run_of(store).verify() == {1: [], 2: [], 3: []}


def test_who_frees_it_in_the_very_moment_wins_and_nothing_broken_is_listed(store: Dated) -> None:
    run_of(store).remove([3], force=True)
    (trashed,) = list_trash(store)
    create = store.create

    def create_as_it_is_freed(key: str, data: Buffer) -> None:
        collect(store, ages=Ages(now=2.0**40))
        create(key, data)

    store.create = create_as_it_is_freed  # type: ignore[method-assign]
    with pytest.raises(MissingObject, match="was just freed"):
        restore_from_trash(store, trashed)
    assert run_of(store).steps == [1, 2]


def test_who_collects_sees_what_has_just_come_back(store: Dated) -> None:
    """The other order: the manifest is listed before the place in the trash is taken away."""
    run_of(store).remove([3], force=True)
    (trashed,) = list_trash(store)
    delete, restored = store.delete, []

    def delete_as_it_comes_back(keys) -> None:
        if trashed.key in keys and not restored:
            restored.append(trashed.key)
            restore_from_trash(store, trashed)
        delete(keys)

    store.delete = delete_as_it_comes_back  # type: ignore[method-assign]
    collect(store, ages=Ages(now=2.0**40))
    assert run_of(store).verify() == {1: [], 2: [], 3: []}


def test_undo_works_while_the_run_is_held_and_its_holder_frees_nothing_of_it(store: Dated) -> None:
    run = run_of(store)
    run.remove([2], grace="1h")
    held = acquire(store, store.clock, heartbeat=False)
    with pytest.raises(LeaseHeld):
        run.collect()
    assert run.undelete(2).step == 2
    held.release()
    store.clock.advance(9 * HOUR)
    run.collect()
    assert run_of(store).verify() == {1: [], 2: [], 3: []}


# ---- of older writers, and of nobody ----------------------------------------------------------------------------------


def test_a_plain_manifest_of_an_older_writer_is_read_kept_for_a_day_and_brought_back(store: Dated) -> None:
    (entry,) = [e for e in entries(store) if e.step == 2]
    raw = store.read(entry.key)
    key = trash_key(2, run_of(store)[2].manifest.attempt)
    store.create(key, raw)
    store.delete([entry.key])
    store.clock.advance(TRASH_SECONDS - 1)
    assert run_of(store).collect().trashed == 0
    assert [(d.step, d.reasons) for d in run_of(store).trash()] == [(2, ())]
    run_of(store).undelete(2)
    assert store.read(entry.key) == raw
    store.delete([entry.key])
    store.create(key, raw)
    store.clock.advance(TRASH_SECONDS)
    assert run_of(store).collect().trashed == 1


def test_keys_of_the_trash() -> None:
    assert parse_trash_key(trash_key(7, "ab12")) == (7, "ab12", TRASH_SECONDS)
    assert parse_trash_key(trash_key(7, "ab12", 0)) == (7, "ab12", 0)
    assert parse_trash_key("trash/000000000007-ab12-60.json") == (7, "ab12", 60)
    for other in (
        "trash/x.json",
        "trash/7-ab.json",
        "trash/000000000007-ab--1.json",
        "trash/000000000007-a.txt",
    ):
        assert parse_trash_key(other) is None


def test_what_is_not_ours_in_the_trash_is_left_alone(store: Dated) -> None:
    store.create("trash/notes.txt", b"mine")
    store.clock.advance(1000 * HOUR)
    run_of(store).collect(grace=0)
    assert store.read("trash/notes.txt") == b"mine"


def test_a_document_under_another_name_is_refused(store: Dated) -> None:
    run = run_of(store)
    run.remove([1, 2])
    one, two = list_trash(store)
    store.replace(one.key, store.read(two.key))
    with pytest.raises(InvalidFormat, match="files were swapped"):
        run.undelete(1)
    assert [d.problem != "" for d in run.trash()] == [True, False]
    with pytest.raises(InvalidFormat):
        read_trash(store, one)


def test_a_document_that_does_not_verify_keeps_all_data_and_goes_when_its_time_is_over(store: Dated) -> None:
    run = run_of(store)
    run.remove([1, 2], grace="1h")
    (one, _) = list_trash(store)
    raw = bytearray(store.read(one.key))
    raw[40] ^= 1
    store.replace(one.key, bytes(raw))
    data = store.list("data")
    run.remove([3], force=True, grace=0)
    assert store.list("data") == data
    store.clock.advance(HOUR)
    run.collect()
    assert store.list("data") == []


def test_older_states_of_a_step_do_not_rise_when_the_newest_is_put_into_the_trash() -> None:
    store = Interrupted()
    put(store, manifest(1, "aa"), manifest(1, "bb"))
    (newest,) = entries(store)
    retire(store, [Leaving(newest, "bb")], now=1.0, grace_seconds=60)
    assert entries(store) == []
    entry, _, _ = restore_from_trash_unchecked(store)
    assert entry.key == newest.key
    assert store.read(entry.key) == encode_manifest(manifest(1, "bb"))


def restore_from_trash_unchecked(store: Interrupted):
    """The data of these manifests is of no format: write what they speak of."""
    (trashed,) = list_trash(store)
    with pytest.raises((Truncated, DigestMismatch), match=data_key(1, "bb")):
        restore_from_trash(store, trashed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("holdfast.catalog.trash.open_file", lambda store, entry: None)
        return restore_from_trash(store, trashed)
