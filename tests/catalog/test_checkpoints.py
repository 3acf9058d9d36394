"""List, read, set aside, remove, reclaim: each on manifests alone."""

from __future__ import annotations

import pytest
from manifests import Interrupted, attempts, data_key, known, manifest, put, set_aside

from holdfast.catalog.checkpoints import Entry, entries, read_entry
from holdfast.catalog.deletion import Ages, collect, remove
from holdfast.catalog.lease import Lease, acquire
from holdfast.catalog.trash import Leaving, retire
from holdfast.core.errors import (
    InvalidFormat,
    MissingObject,
)
from holdfast.format.manifest import encode_manifest
from holdfast.stores import Store
from holdfast.testing import MockClock

EVERYTHING = Ages(now=2.0**40)


@pytest.fixture
def store() -> Interrupted:
    return Interrupted()


@pytest.fixture
def lease(store: Interrupted) -> Lease:
    return acquire(store, MockClock(), heartbeat=False)


def data(store: Store) -> list[str]:
    return [o.key for o in store.list("data")]


# ---- reading --------------------------------------------------------------------------------------------------------


def test_swapped_manifests_are_refused(store: Interrupted) -> None:
    one, two = put(store, manifest(1), manifest(2, "bb"))
    raw = store.read(one.key), store.read(two.key)
    store.replace(one.key, raw[1])
    store.replace(two.key, raw[0])
    for entry in (one, two):
        with pytest.raises(InvalidFormat, match="files were swapped"):
            read_entry(store, entry)


def test_a_manifest_that_is_gone_is_missing(store: Interrupted) -> None:
    (entry,) = put(store, manifest(1))
    store.delete([entry.key])
    with pytest.raises(MissingObject):
        read_entry(store, entry)


@pytest.mark.parametrize(
    "name", ["1.json", "000000000001.json.bak", "000000000001-1.json", "000000000001-aa.json", "notes"]
)
def test_other_names_are_no_checkpoints(store: Interrupted, name: str) -> None:
    put(store, manifest(2))
    store.create(f"checkpoints/{name}", encode_manifest(manifest(1)))
    assert [e.step for e in entries(store)] == [2]


# ---- setting aside, removing, reclaiming ----------------------------------------------------------------------------


def test_what_is_set_aside_is_not_listed_and_keeps_its_bytes(store: Interrupted) -> None:
    one, _ = put(store, manifest(1, "aa"), manifest(2, "bb"))
    retire(store, [Leaving(one, "aa")], now=1.0, grace_seconds=60)
    retire(store, [Leaving(one, "aa")], now=1.0, grace_seconds=60)  # again, after a crash: nothing left to do
    assert attempts(store) == [(2, "bb")]
    assert [(m.step, m.attempt) for m in set_aside(store)] == [(1, "aa")]
    assert collect(store).nbytes == 0
    assert data(store) == [data_key(1, "aa"), data_key(2, "bb")]
    assert collect(store, ages=EVERYTHING).nbytes == 10
    assert data(store) == [data_key(2, "bb")]
    assert set_aside(store) == []


def test_setting_aside_takes_older_states_of_the_step_along(store: Interrupted) -> None:
    put(store, manifest(1, "aa"), manifest(1, "bb"))
    (newest,) = entries(store)
    retire(store, [Leaving(newest, "bb")], now=1.0, grace_seconds=60)
    assert entries(store) == [], "the older state does not rise again"


def test_removing_frees_what_nobody_else_needs(store: Interrupted) -> None:
    shared = data_key(1, "aa")
    one, two = manifest(1, "aa"), manifest(2, "bb", files=(data_key(2, "bb"), shared))
    first, second = put(store, one, two)
    assert remove(store, [first], known((first, one), (second, two))) == 0
    assert data(store) == [shared, data_key(2, "bb")]
    assert attempts(store) == [(2, "bb")]
    assert remove(store, [second], known((second, two))) == 8192
    assert data(store) == []


def test_removing_keeps_all_data_while_something_cannot_be_read(store: Interrupted) -> None:
    one = manifest(1)
    (entry,) = put(store, one)
    store.create("trash/000000000009-aa.json", b"no manifest")
    assert remove(store, [entry], known((entry, one))) == 0
    assert data(store) == [data_key(1, "aa")]
    assert entries(store) == []


def test_removing_spares_what_a_listed_checkpoint_needs_though_the_caller_forgot_it(
    store: Interrupted,
) -> None:
    """After an unknown outcome the caller does not know what it committed; the listing does."""
    shared = data_key(1, "aa")
    one, forgotten = manifest(1, "aa"), manifest(2, "bb", files=(shared,))
    first, second = put(store, one, forgotten)
    remove(store, [first], known((first, one)))
    assert data(store) == [shared]
    assert entries(store) == [second]


def test_removing_goes_by_what_is_listed_and_not_by_how_many_are_known(store: Interrupted) -> None:
    shared = data_key(1, "aa")
    one, forgotten = manifest(1, "aa"), manifest(2, "bb", files=(shared,))
    first, _ = put(store, one, forgotten)
    gone = Entry("checkpoints/000000000009.json", 9, 0)
    remove(store, [first], known((first, one), (gone, manifest(9, "gone"))))
    assert data(store) == [shared]


def test_removing_takes_older_states_of_the_step_along(store: Interrupted) -> None:
    old, new = manifest(1, "aa"), manifest(1, "bb")
    put(store, old, new)
    (newest,) = entries(store)
    remove(store, [newest], known((newest, new)))
    assert entries(store) == [], "the older state does not rise again"


def test_replacing_a_state_of_a_step_removes_the_one_before_only(store: Interrupted) -> None:
    old, new = manifest(1, "aa"), manifest(1, "bb")
    before, after = put(store, old, new)
    remove(store, [before], known((before, old), (after, new)))
    assert entries(store) == [after]
    assert data(store) == [data_key(1, "bb")]


def test_reclaiming_frees_attempts_that_never_committed_and_older_states(store: Interrupted) -> None:
    put(store, manifest(1, "aa"), manifest(1, "bb"), manifest(2, "cc"))
    store.write("data/000000000003-dead/m.safetensors", [b"y" * 33])
    store.write("data/000000000003-dead/o.safetensors", [b"y" * 4])
    assert collect(store).nbytes == 10 + 33 + 4
    assert attempts(store) == [(1, "bb"), (2, "cc")]
    assert data(store) == [data_key(1, "bb"), data_key(2, "cc")]
    assert collect(store).nbytes == 0


@pytest.mark.parametrize("place", ["checkpoints/000000000009.json", "trash/000000000009-aa.json"])
@pytest.mark.parametrize("content", [b"spoilt", encode_manifest(manifest(9, format=2))])
def test_nothing_is_reclaimed_while_a_manifest_cannot_be_read(
    store: Interrupted, place: str, content: bytes
) -> None:
    put(store, manifest(1))
    store.replace(place, content)
    store.write("data/000000000003-dead/m.safetensors", [b"y"])
    assert collect(store).nbytes == 0
    assert len(data(store)) == 2
    store.delete([place])
    assert collect(store).nbytes == 1


def test_other_peoples_files_neither_stop_reclaiming_nor_are_touched(store: Interrupted) -> None:
    put(store, manifest(1))
    store.create("checkpoints/README.txt", b"do not touch")
    store.write("data/000000000003-dead/m.safetensors", [b"y"])
    mine = [
        "data/backup.tar",
        "data/000000000001-aa/notes.txt",
        "data/000000000003-dead/deeper/x.safetensors",
        "log/x",
        "y",
    ]
    for key in mine:
        store.create(key, b"do not touch")
    assert collect(store).nbytes == 1
    for key in (*mine, "checkpoints/README.txt"):
        assert store.read(key) == b"do not touch"
