"""Every outcome that a commit can have: committed, conflict, lost, failed, unknown; and nothing in between."""

from __future__ import annotations

import pytest
from manifests import Interrupted, attempts, fail, manifest

import holdfast
from holdfast.catalog.checkpoints import (
    Entry,
    commit,
    entries,
    read_entry,
)
from holdfast.catalog.keys import lease_key, manifest_key
from holdfast.catalog.lease import Lease, acquire
from holdfast.core.errors import (
    CommitConflict,
    CommitUnknown,
    LeaseLost,
    PolicyError,
    StoreError,
)
from holdfast.format.manifest import encode_manifest
from holdfast.stores import MemoryStore, Store
from holdfast.testing import MockClock


@pytest.fixture
def store() -> Interrupted:
    return Interrupted()


@pytest.fixture
def lease(store: Interrupted) -> Lease:
    return acquire(store, MockClock(), heartbeat=False)


def test_a_commit_makes_a_checkpoint_exist(store: Interrupted, lease: Lease) -> None:
    assert entries(store) == []
    entry = commit(store, manifest(7), lease)
    assert entry == Entry("checkpoints/000000000007.json", 7, 0)
    assert entries(store) == [entry]
    assert encode_manifest(read_entry(store, entry)) == encode_manifest(manifest(7))


def test_a_later_state_of_a_step_takes_its_place(store: Interrupted, lease: Lease) -> None:
    for attempt in ("aa", "bb", "cc"):
        commit(store, manifest(7, attempt), lease)
    commit(store, manifest(8, "dd"), lease)
    assert attempts(store) == [(7, "cc"), (8, "dd")]
    assert [e.ordinal for e in entries(store)] == [2, 0]


def test_a_step_that_was_saved_too_often_keeps_what_it_has(store: Interrupted) -> None:
    holdfast.save(store, {"n": 1}, step=7)
    store.create(manifest_key(7, 9999), store.read(manifest_key(7)))
    with pytest.raises(PolicyError, match="saved 9,999 times more"):
        holdfast.save(store, {"n": 2}, step=7)
    assert holdfast.load(store) == {"n": 1}


def test_a_rival_at_the_same_place_wins_and_stays_intact(store: Interrupted, lease: Lease) -> None:
    store.before = lambda key: MemoryStore.create(store, key, encode_manifest(manifest(7, "rival")))
    with pytest.raises(CommitConflict, match="another writer committed this step first"):
        commit(store, manifest(7, "mine"), lease)
    assert attempts(store) == [(7, "rival")]


def test_a_failure_before_the_manifest_is_there_is_that_failure(store: Interrupted, lease: Lease) -> None:
    store.before = fail
    with pytest.raises(StoreError, match="Input/output error"):
        commit(store, manifest(7), lease)
    assert entries(store) == []
    commit(store, manifest(7), lease)
    assert attempts(store) == [(7, "aa")]


def test_a_failure_after_the_manifest_is_there_is_an_unknown_outcome(
    store: Interrupted, lease: Lease
) -> None:
    store.after = fail
    with pytest.raises(CommitUnknown, match="did not confirm that it is durable"):
        commit(store, manifest(7), lease)
    assert attempts(store) == [(7, "aa")], "what is listed is whole all the same"


def test_a_failure_while_a_rival_commits_is_a_conflict(store: Interrupted, lease: Lease) -> None:
    def rival_then_fail(key: str) -> None:
        MemoryStore.create(store, key, encode_manifest(manifest(7, "rival")))
        fail(key)

    store.before = rival_then_fail
    with pytest.raises(CommitConflict):
        commit(store, manifest(7, "mine"), lease)


def test_a_failure_that_leaves_something_unreadable_is_unknown(store: Interrupted, lease: Lease) -> None:
    def spoil_then_fail(key: str) -> None:
        store.replace(key, b"spoilt")
        fail(key)

    store.after = spoil_then_fail
    with pytest.raises(CommitUnknown, match="cannot be read"):
        commit(store, manifest(7), lease)


def test_a_name_that_is_taken_by_our_own_manifest_is_no_rival(store: Interrupted, lease: Lease) -> None:
    """A request that was carried out and repeated, because its answer was lost, finds its own work."""

    def carried_out_already(key: str) -> None:
        MemoryStore.create(store, key, encode_manifest(manifest(7, "mine")))

    store.before = carried_out_already
    with pytest.raises(CommitUnknown):
        commit(store, manifest(7, "mine"), lease)
    assert attempts(store) == [(7, "mine")]


def overtake(store: Store, generation: int = 2) -> None:
    doc = store.read(lease_key(1))
    store.create(lease_key(generation), doc)


def test_a_stale_holder_is_refused_before_it_commits(store: Interrupted, lease: Lease) -> None:
    overtake(store)
    with pytest.raises(LeaseLost):
        commit(store, manifest(7), lease)
    assert entries(store) == []


def test_a_holder_overtaken_while_it_commits_gets_no_acknowledgement(
    store: Interrupted, lease: Lease
) -> None:
    for when in ("before", "after"):
        setattr(store, when, lambda key, when=when: overtake(store, {"before": 2, "after": 3}[when]))
        with pytest.raises(LeaseLost):
            commit(store, manifest(7, when), lease)
        store.delete([lease_key(2), lease_key(3)])
